"""./scripts/bench: statistics, gluster's profile, the command line."""

from __future__ import annotations

import argparse
import json
import os
import re
import signal
import subprocess
import sys
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kit import bench, bench_storages
from kit.benchlib import Ratio, Remote, Series, median_ratio, p99_ratio, picture_of_ratios, quantile
from kit.run import KitError

# Parts


@pytest.mark.parametrize("name", ["upload", "scale", "rollout", "options", "peers"])
def test_a_part_says_how_long_it_takes(name: str) -> None:
    said = re.search(r"Expected to take about (\d+) s", " ".join((bench.parts()[name].__doc__ or "").split()))
    assert said and 30 < int(said[1]) < 360


# Statistics


@pytest.mark.parametrize(
    ("values", "part", "expected"),
    [
        ([3.0], 0.5, 3.0),
        ([1.0, 2.0], 0.5, 1.0),
        ([5.0, 1.0, 3.0], 0.5, 3.0),
        ([float(n) for n in range(1, 101)], 0.99, 99.0),
        ([float(n) for n in range(1, 101)], 1.0, 100.0),
        ([float(n) for n in range(1, 51)], 0.99, 50.0),  # of few values it is the largest
        ([float(n) for n in range(1, 101)], 0.07, 7.0),  # 0.07 * 100 is a bit more than 7
    ],
)
def test_quantile(values: list[float], part: float, expected: float) -> None:
    assert quantile(values, part) == expected


@pytest.mark.parametrize(("values", "part"), [([], 0.5), ([1.0], 0.0), ([1.0], 1.1)])
def test_quantile_refuses(values: list[float], part: float) -> None:
    with pytest.raises(ValueError, match="no "):
        quantile(values, part)


def test_a_ratio_is_taken_within_each_block() -> None:
    # The machine was ten times slower in the second block; the ratio is not touched by that.
    assert median_ratio([[1, 1, 9], [10, 10, 90]], [[2, 2, 2], [20, 20, 20]]) == Ratio(0.5, 0.5, 0.5)
    assert median_ratio([[1], [4], [3]], [[1], [2], [2]]) == Ratio(1.5, 1.0, 2.0)


def test_the_99th_percentile_is_of_all_values() -> None:
    ours = [[1.0] * 99 + [7.0], [1.0] * 100]
    assert p99_ratio(ours, [[1.0] * 100, [1.0] * 100]) == Ratio(1.0, 1.0, 1.0)
    assert p99_ratio([[1.0] * 50 + [8.0] * 50, [2.0] * 100], [[2.0] * 100] * 2) == Ratio(4.0, 1.0, 4.0)


@pytest.mark.parametrize("compare", [median_ratio, p99_ratio])
def test_blocks_are_compared_one_by_one(compare: Any) -> None:
    for ours, theirs in (([[1.0]], [[1.0], [2.0]]), ([], [])):
        with pytest.raises(ValueError, match="blocks"):
            compare(ours, theirs)


def test_figures_of_a_size() -> None:
    figures = bench_storages.evaluate("50kb", {"django": [[2.0, 4.0], [2.0, 2.0]], "volume": [[1.0, 1.0], [2.0, 2.0]]})
    bench.check_flat(figures)
    assert figures["volume_to_django_50kb_median"] == pytest.approx(0.667, abs=0.001)
    assert (figures["volume_to_django_50kb_median_low"], figures["volume_to_django_50kb_median_high"]) == (0.333, 1.0)
    assert figures["django_50kb_saves"] == 4
    assert not any(name.startswith(("row", "hybrid")) for name in figures)


@pytest.mark.parametrize("value", [float("nan"), None, [1], {"a": 1}])
def test_figures_are_flat(value: object) -> None:
    with pytest.raises(ValueError, match="figure"):
        bench.check_flat({"x": value})


def test_a_picture_holds_every_ratio() -> None:
    series = [Series("a < b", [Ratio(0.75, 0.5, 1), None]), Series("c", [Ratio(3, 2, 4), Ratio(1.5, 1, 2)])]
    drawn = picture_of_ratios("Title & more", "note", ["10 KB", "1 MB"], series)
    texts = [element.text for element in ET.fromstring(drawn).iter() if element.tag.endswith("text")]  # noqa: S314
    assert {"Title & more", "a < b", "c", "10 KB", "1 MB", "0.75", "3.00", "1.50"} <= set(texts)
    assert "http" not in drawn.replace("http://www.w3.org/2000/svg", ""), "it loads something"


# gluster volume profile

ANSWER = """<?xml version="1.0" encoding="UTF-8" standalone="yes"?>
<cliOutput><opRet>0</opRet><opErrno>0</opErrno><opErrstr/><volProfile><volname>media</volname><profileOp>3</profileOp>
<brickCount>2</brickCount>
<brick><brickName>node1:/srv/gluster/media/brick</brickName><intervalStats><fopStats>
<fop><name>WRITE</name><hits>200</hits><avgLatency>40</avgLatency></fop>
<fop><name>CREATE</name><hits>200</hits></fop></fopStats><duration>2</duration></intervalStats></brick>
<brick><brickName>node2:/srv/gluster/media/brick</brickName><intervalStats><fopStats>
<fop><name>WRITE</name><hits>100</hits></fop></fopStats></intervalStats></brick>
</volProfile></cliOutput>"""
REFUSAL = "<cliOutput><opRet>-1</opRet><opErrstr>Profile on Volume media is not started</opErrstr></cliOutput>"


def test_operations_are_summed_over_the_bricks() -> None:
    assert bench_storages.operations(ANSWER) == {"WRITE": 300, "CREATE": 200}


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (REFUSAL, "not started"),
        ("gluster: no such command", "no XML"),
        ("<cliOutput><opRet>0</opRet></cliOutput>", "names no brick"),
        (ANSWER.replace("intervalStats", "cumulativeStats"), "no interval"),
    ],
)
def test_a_profile_that_says_nothing_is_refused(text: str, said: str) -> None:
    with pytest.raises(KitError, match=said):
        bench_storages.operations(text)


class Volume:
    """A volume as far as its profile goes."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.options = {"nfs.disable": "on"}
        self.lab: Any = SimpleNamespace(
            state=tmp_path, ssh=lambda _: ["ssh"], site_variables=lambda: {"tribrick_volume": "media"}
        )
        self.said: list[str] = []
        monkeypatch.setattr(bench_storages, "capture", self.gluster)

    def gluster(self, command: list[str], **_: object) -> Any:
        words = command[command.index("volume") + 1 :]
        if words[0] == "info":
            each = "".join(f"<option><name>{k}</name><value>{v}</value></option>" for k, v in self.options.items())
            return SimpleNamespace(stdout=f"<cliOutput><opRet>0</opRet>{each}</cliOutput>")
        if words[0] == "reset":
            del self.options[words[2]]
        elif words[2] in {"start", "stop"}:
            self.options |= dict.fromkeys(bench_storages.OPTIONS, "on" if words[2] == "start" else "off")
        return SimpleNamespace(stdout="<cliOutput><opRet>0</opRet></cliOutput>")

    def profile(self) -> bench_storages.Profile:
        return bench_storages.Profile(self.lab, self.said.append)

    @property
    def is_on(self) -> bool:
        return any(self.options.get(name) == "on" for name in bench_storages.OPTIONS)


@pytest.fixture
def a_volume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Volume:
    return Volume(tmp_path, monkeypatch)


def test_the_profile_is_on_for_a_while_and_leaves_nothing(a_volume: Volume) -> None:
    with a_volume.profile().on():
        assert a_volume.is_on
    assert a_volume.options == {"nfs.disable": "on"}
    assert list(a_volume.lab.state.iterdir()) == []


def test_the_profile_is_off_after_an_interruption(a_volume: Volume) -> None:
    before = signal.getsignal(signal.SIGTERM)
    with pytest.raises(KeyboardInterrupt), bench.polite_end(), a_volume.profile().on():
        os.kill(os.getpid(), signal.SIGTERM)
    assert not a_volume.is_on
    assert signal.getsignal(signal.SIGTERM) == before


def test_the_next_run_switches_off_what_a_killed_one_left_on(a_volume: Volume) -> None:
    killed = a_volume.profile().on()
    killed.__enter__()  # and nothing after it
    assert a_volume.is_on
    a_volume.profile().recover()
    assert a_volume.options == {"nfs.disable": "on"}
    assert a_volume.said


def test_a_profile_of_somebody_else_is_left_on(a_volume: Volume) -> None:
    a_volume.options |= dict.fromkeys(bench_storages.OPTIONS, "on")
    a_volume.profile().recover()
    with pytest.raises(KitError, match="Somebody else"), a_volume.profile().on():
        pytest.fail("it went on")
    assert a_volume.is_on


# A program on a node; here the "node" is this machine, and ssh and sudo are a shell.


@pytest.fixture
def remote(tmp_path: Path) -> Any:
    (tmp_path / "sh").write_text(
        "#!/bin/sh\nshift\n"  # the host
        '[ "$2" = install ] && exec cat >"$0.program"\n'
        f'shift 4\nexec "{sys.executable}" "$0.program" "$@"\n'
    )
    (tmp_path / "sh").chmod(0o755)
    (tmp_path / "program.py").write_text(
        "import json, sys, pathlib\n"
        "print(json.dumps({'ready': sys.argv[1:]}), flush=True)\n"
        "for line in sys.stdin:\n"
        "    asked = json.loads(line)\n"
        "    if asked == {'say': 'nonsense'}: print('nonsense', flush=True)\n"
        "    elif asked == {'say': 'nothing'}: continue\n"
        "    elif asked == {'say': 'end'}: break\n"
        "    else: print(json.dumps(asked), flush=True)\n"
        f"pathlib.Path({str(tmp_path / 'cleaned')!r}).touch()\n"
    )
    return lambda: Remote([str(tmp_path / "sh"), "node1"], tmp_path / "program.py", ["a", "b"], tmp_path / "log")


def test_a_program_on_a_node_answers_and_ends_with_us(remote: Any, tmp_path: Path) -> None:
    with remote() as program:
        assert program.answer(20) == {"ready": ["a", "b"]}
        assert program.ask({"x": 1}, 20) == {"x": 1}
        with pytest.raises(KitError, match="it is broken"):
            program.ask({"error": "it is broken"}, 20)
        assert not (tmp_path / "cleaned").exists()
    assert (tmp_path / "cleaned").exists()


@pytest.mark.parametrize(
    ("what", "said"), [("nonsense", "said: nonsense"), ("nothing", "gave no answer"), ("end", "ended")]
)
def test_a_program_that_does_not_answer(remote: Any, what: str, said: str) -> None:
    with remote() as program:
        program.answer(20)
        with pytest.raises(KitError, match=said):
            program.ask({"say": what}, 0.3 if what == "nothing" else 20)


# The command line


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    """What the command ends with, prints, and says on standard error."""
    try:
        code = bench.main(words)
    except SystemExit as end:
        code = int(end.code or 0)
    shown = capsys.readouterr()
    return code, shown.out, shown.err


def test_the_script_runs() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "kit.bench", "storages", "--json", "--name", "there-is-none"],
        env=os.environ | {"PYTHONPATH": str(bench.ROOT / "scripts" / "lib")},
        capture_output=True, text=True, timeout=60, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("error: There is no lab 'there-is-none'")


def test_help_names_every_part_and_its_options(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = run(capsys, "--help")
    assert code == 0
    assert all(name in out for name in bench.parts())
    code, out, _ = run(capsys, "storages", "--help")
    assert code == 0
    assert all(word in out for word in ("--json", "--name", "--size", "--blocks", "FileSystemStorage"))


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ([], 2, "PART"),
        (["nothing"], 2, "invalid choice: 'nothing'"),
        (["storages", "--size", "3kb"], 2, "invalid choice: '3kb'"),
        (["storages", "--blocks", "0"], 2, "must be at least 1"),
        (["storages", "--name", "../lab"], 2, "a lab's name"),
        (["storages", "--json", "--name", "there-is-none"], 1, "There is no lab 'there-is-none'; make it"),
    ],
)
def test_bad_input_is_one_clear_sentence(
    words: list[str], code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    ended, out, error = run(capsys, *words)
    assert (ended, out) == (code, "")
    assert said in error.splitlines()[-1]


class Part:
    """Says one thing."""

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        parser.add_argument("--figure", type=float, default=1.5)

    def run(self, lab: Any, options: argparse.Namespace, say: Any) -> dict[str, Any]:
        say(f"measuring in {lab.name}")
        return {"x": options.figure}

    def lines(self, figures: dict[str, Any]) -> list[str]:
        return [f"x is {figures['x']}"]

    def picture(self, _figures: dict[str, Any]) -> str:
        return "<svg/>"


@pytest.fixture
def with_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(bench, "parts", lambda: {"one": Part()})
    monkeypatch.setattr(bench, "require", lambda lab: None)
    monkeypatch.setattr(bench, "circumstances", lambda lab: {"lab": lab.name})
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench, "RESULTS", tmp_path / "results")
    monkeypatch.setattr("kit.lab.ROOT", tmp_path)
    return tmp_path


def test_json_is_all_there_is_on_standard_output(with_part: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["one", "--json", "--name", "x"]) == 0
    shown = capsys.readouterr()
    assert json.loads(shown.out) == {"lab": "x", "x": 1.5}
    assert shown.out.count("\n") == 1
    assert "measuring in x" in shown.err
    assert json.loads((with_part / "results" / "one.json").read_text()) == {"lab": "x", "x": 1.5}
    assert (with_part / "results" / "one.svg").read_text() == "<svg/>"


def test_a_table_for_people(with_part: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert bench.main(["one"]) == 0
    assert capsys.readouterr().out == "x is 1.5\nkept: results/one.json, results/one.svg\n"


def test_an_end_from_outside_is_no_result(
    with_part: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Part, "run", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    assert bench.main(["one", "--json"]) == 130
    assert capsys.readouterr().out == ""
    assert not (with_part / "results").exists()
