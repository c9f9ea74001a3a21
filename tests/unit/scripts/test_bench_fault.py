"""./scripts/bench fault: the programs that make load, the order of things, the figures. Without a lab."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kit import bench, bench_fault
from kit.run import KitError


def program(text: str, *words: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", text, *words], capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, Any] = json.loads(done.stdout or "{}")
    return found


def test_the_programs(tmp_path: Path) -> None:
    place = tmp_path / "bench"
    program(bench_fault.FILES, str(place), "node1", "node2")
    assert len(list((place / "read").iterdir())) == 100
    written = program(bench_fault.LOAD, "write", str(place / "node1"), "0.5")
    read = program(bench_fault.LOAD, "read", str(place / "read"), "0.5")
    for found in (written, read):
        assert found["errors"] == 0 and found["done"] > 3 and 0 < found["longest"] < 10
    assert not list((place / "node1").iterdir()), "what was written is removed"


def test_errors_are_counted(tmp_path: Path) -> None:
    (tmp_path / "0").write_bytes(b"short")
    for what, place in (("read", tmp_path), ("write", tmp_path / "away")):
        found = program(bench_fault.LOAD, what, str(place), "0.3")
        assert found["errors"] == found["done"] > 0


def test_no_quote_breaks_the_shell() -> None:
    for text in (bench_fault.FILES, bench_fault.LOAD):
        assert "'" not in text


def test_the_worst_counts_and_idle_programs_do_not() -> None:
    some = [{"longest": 0.5, "errors": 1, "done": 50}, {"longest": 2.0, "errors": 2, "done": 40}]
    assert bench_fault.worst(some) == {"longest": 2.0, "errors": 3}
    with pytest.raises(KitError, match="nearly nothing"):
        bench_fault.worst([*some, {"longest": 0.0, "errors": 0, "done": 0}])


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Note what is done, do nothing."""
    done = list[str]()

    def inside(_lab: Any, node: str, script: str, **_more: Any) -> str:
        done.append(f"{node} {script}")
        if "is-active" in script:
            return "active" if node != "node2" else "inactive"
        return json.dumps({"longest": 1.5, "errors": 0, "done": 100}) if "json.dumps" in script else ""

    class Volume:
        mount = "/srv/media"

        def set(self, values: dict[str, str]) -> None:
            done.append(f"set {values['network.ping-timeout']}")

        def option(self, _name: str) -> str:
            return "20"

        def unclean(self) -> None:
            done.append("clean")

        back = bench_fault.Volume.back

    fault = SimpleNamespace(
        inject=lambda: done.append("inject"), proof=lambda: done.append("proof"), lift=lambda: done.append("lift"),
        ended=lambda: None,
    )  # fmt: skip
    monkeypatch.setattr(bench_fault, "inside", inside)
    monkeypatch.setattr(bench_fault, "Volume", lambda _lab: Volume())
    monkeypatch.setattr(bench_fault.faults, "make", lambda *_words: fault)
    monkeypatch.setattr(bench_fault, "visitor", lambda _url, stop: {"longest": 0.1, "errors": 0, "done": 20})
    monkeypatch.setattr(bench_fault, "STEADY", 0.01)
    return SimpleNamespace(done=done, url=lambda node: f"http://{node}")


def test_a_run(lab: Any) -> None:
    options = argparse.Namespace(fault=["silence", "kill"], hold=0.05, no_stock=False)
    found = bench_fault.run(lab, options, lambda _text: None)
    bench.check_flat(found)
    assert found["ours_silence_write_s"] == found["stock_kill_read_s"] == 1.5 and found["ours_kill_cached_s"] == 0.1
    steps = [
        step for step in lab.done if step in ("inject", "proof", "lift", "clean") or "set" in step or "stop" in step
    ]
    once = ["clean", "inject", "proof", "lift"]
    stopped = [f"{node} systemctl stop {bench_fault.WATCHER}" for node in ("node1", "node3")]
    assert steps == ([*once, "clean", "set 42", *stopped, *once[1:], "set 20"]) * 2
    assert sum("systemctl start" in step for step in lab.done) == 4, "what ran is started again, what did not is not"
    told = bench_fault.lines(found | {"debian": "13"})
    assert len(told) == 5 and "<svg" in bench_fault.picture(found)


def test_ours_alone(lab: Any) -> None:
    found = bench_fault.run(lab, argparse.Namespace(fault=["pause"], hold=0.01, no_stock=True), lambda _text: None)
    assert not any(name.startswith("stock") for name in found)
    assert len(bench_fault.lines(found | {"debian": "13"})) == 2 and "<svg" in bench_fault.picture(found)
