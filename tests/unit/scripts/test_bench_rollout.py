"""./scripts/bench rollout: what ansible-playbook prints, the order of runs, figures."""

from __future__ import annotations

import argparse
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kit import bench, bench_rollout
from kit.run import KitError

SAID = """
PLAY [Prepare] ****************************************************************
TASK [tribrick.media.preflight : Look] ****************************************
ok: [node1]
TASK [tribrick.media.node_base : Install] *************************************
changed: [node1]
RUNNING HANDLER [tribrick.media.firewall : Load] ******************************
changed: [node1]
PLAY RECAP ********************************************************************
node1                      : ok=12   changed=2    unreachable=0    failed=0    skipped=3    rescued=0    ignored=0
node2                      : ok=10   changed=1    unreachable=0    failed=0    skipped=3    rescued=0    ignored=0
"""


def test_what_ansible_says() -> None:
    count = bench_rollout.Count()
    assert [line for line in SAID.splitlines() if count(line)] == []
    assert count.result(3.5) == bench_rollout.Run(3.5, 3, 22, 3)
    assert count("fatal: [node1]: FAILED!") is not None


def test_without_a_recap_there_is_no_figure() -> None:
    count = bench_rollout.Count()
    count("TASK [x : y] ***")
    with pytest.raises(KitError, match="recap"):
        count.result(1.0)


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A lab that is never made; *done* is what would have happened."""
    done = list[str]()
    made = SimpleNamespace(name="rollout", state=tmp_path / "none", done=done, changed=4, there={}, broken=())

    def lab_command(*words: str) -> None:
        done.append(words[0])
        if words[0] in made.broken:
            raise KitError(f"'./scripts/lab {words[0]}' failed (1).")

    def rollout(_lab: Any, _say: Any, extra: Any = ()) -> bench_rollout.Run:
        done.append(" ".join(extra) or "site")
        return bench_rollout.Run(float(len(done)), 100, 300, made.changed if extra else 0)

    made.recall = lambda: {"release": "13"}
    monkeypatch.setattr(bench_rollout, "LOG", tmp_path / "bench" / "rollout.log")
    monkeypatch.setattr(bench_rollout, "containers", lambda _lab: made.there)
    monkeypatch.setattr(bench_rollout, "lab_command", lab_command)
    monkeypatch.setattr(bench_rollout, "rollout", rollout)
    return made


def go(lab: Any) -> bench.Figures:
    return bench_rollout.run(lab, argparse.Namespace(repeats=2, image="ready"), lambda _text: None)


def test_three_kinds_of_runs_in_a_lab_of_its_own(lab: SimpleNamespace) -> None:
    figures = go(lab)
    bench.check_flat(figures)
    assert lab.done[:4] == ["up", "site", "site", "site"] and lab.done[-1] == "down"
    assert len(set(lab.done[4:6])) == 2, "each change is one"
    assert (figures["first_seconds"], figures["again_seconds"], figures["change_seconds"]) == (2.0, 3.5, 5.5)
    assert (figures["again_changed"], figures["change_changed"], figures["debian"]) == (0, 4, "13")
    assert len(bench_rollout.lines(figures)) == 4 and "<svg" in bench_rollout.picture(figures)


def test_a_change_that_changes_nothing_is_an_error(lab: SimpleNamespace) -> None:
    lab.changed = 0
    with pytest.raises(KitError, match="changed nothing"):
        go(lab)
    assert lab.done[-1] == "down"


def test_what_went_wrong_first_is_told(lab: SimpleNamespace) -> None:
    lab.broken = ("up", "down")
    with pytest.raises(KitError, match="lab up' failed"):
        go(lab)
    assert lab.done == ["up", "down"]
    lab.broken = ("down",)
    with pytest.raises(KitError, match="lab down' failed"):
        go(lab)


def test_an_interrupted_command_ends_as_with_ctrl_c(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "scripts" / "lab"
    script.parent.mkdir()
    script.write_text(
        "#!/usr/bin/env bash\ntrap 'echo ended >\"$0.ended\"; exit 130' INT\n"
        'touch "$0.began"\nwhile :; do sleep 0.05; done\n',
        encoding="utf-8",
    )
    script.chmod(0o755)
    monkeypatch.setattr(bench_rollout, "ROOT", tmp_path)
    monkeypatch.setattr(bench_rollout, "LAB_WAIT", 1.0)
    with pytest.raises(KitError, match="not done within 1 s"):
        bench_rollout.lab_command("up")
    assert (tmp_path / "scripts" / "lab.ended").exists(), "it had time to end what it had started"


def test_a_lab_that_is_there_is_left_alone(lab: SimpleNamespace) -> None:
    lab.there = {"node1": "running"}
    with pytest.raises(KitError, match="already"):
        go(lab)
    assert lab.done == []


def test_the_command_makes_no_demands_on_its_lab(monkeypatch: pytest.MonkeyPatch, capsys: Any, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "RESULTS", tmp_path)
    monkeypatch.setattr(bench, "ROOT", tmp_path)
    monkeypatch.setattr(bench_rollout, "run", lambda lab, *_words: {"name": lab.name, "first_seconds": 1.0})
    monkeypatch.setattr(bench_rollout, "picture", lambda _figures: "<svg/>")
    monkeypatch.setattr(bench, "require", lambda _lab: pytest.fail("it was asked for"))
    assert bench.main(["rollout", "--json"]) == 0
    assert '"name": "rollout"' in capsys.readouterr().out
