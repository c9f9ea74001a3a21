"""./scripts/bench heal: what gluster says, and a heal from the brick's end to the proof, on a volume made up."""

from __future__ import annotations

import argparse
from types import SimpleNamespace
from typing import Any

import pytest

from kit import bench_heal, benchvolume
from kit.run import KitError

COUNTS = """Gathering count of entries to be healed on volume media has been successful

Brick node1:/srv/gluster/media/brick
Number of entries: 47

Brick node2:/srv/gluster/media/brick
{second}

Brick node3:/srv/gluster/media/brick
Number of entries: 98
"""
AWAY = "Status: Transport endpoint is not connected\nNumber of entries: -"


def test_what_waits() -> None:
    assert benchvolume.waiting(COUNTS.format(second="Number of entries: 0")) == [47, 0, 98]
    assert benchvolume.waiting(COUNTS.format(second=AWAY)) == [47, None, 98]
    assert benchvolume.waiting("nothing") == []


class FakeVolume:
    """Has options, and a brick that misses files for some answers."""

    name, mount, brick = "media", "/srv/media", "/srv/brick"

    def __init__(self) -> None:
        self.options = {"cluster.shd-max-threads": "4", "cluster.heal-timeout": "30"}
        self.answers: list[list[int | None]] = []
        self.asked: list[str] = []
        self.held = 5
        self.during: list[dict[str, str]] = []

    def option(self, name: str) -> str:
        return self.options.get(name, "")

    def set(self, values: dict[str, str]) -> None:
        self.options = {name: value for name, value in (self.options | values).items() if value}

    back, unclean = benchvolume.Volume.back, benchvolume.Volume.unclean

    def gluster(self, words: str) -> str:
        self.asked.append(words)
        self.during.append(dict(self.options))
        return ""

    def waiting(self) -> list[int | None]:
        return self.answers.pop(0) if self.answers else [0, 0, 0]


@pytest.fixture
def lab(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Let nothing happen but on the volume; tell what was asked for."""
    volume, done = FakeVolume(), list[str]()
    fault = SimpleNamespace(
        inject=lambda: done.append("inject"), proof=lambda: done.append("proof"), lift=lambda: done.append("lift")
    )
    monkeypatch.setattr(bench_heal.faults, "make", lambda *_words: fault)
    monkeypatch.setattr(bench_heal, "inside", lambda _lab, host, script, **_more: done.append(f"{host} {script[:6]}"))
    monkeypatch.setattr(bench_heal.time, "sleep", lambda _seconds: None)
    monkeypatch.setattr(bench_heal, "Volume", lambda _lab: volume)
    monkeypatch.setattr(bench_heal, "same", lambda volume_, directory: volume_.held if directory else 0)
    return SimpleNamespace(volume=volume, done=done)


MISSED: list[list[int | None]] = [[5, None, 5], [5, None, 5], [5, 0, 5], [2, 0, 3], [0, 0, 0]]


def one(lab: SimpleNamespace) -> float:
    return bench_heal.heal(Any, lab.volume, 5, 10)  # type: ignore[arg-type]


def test_a_heal(lab: SimpleNamespace) -> None:
    lab.volume.answers = [*MISSED]
    assert one(lab) >= 0
    assert lab.done == ["node1 python", "inject", "proof", "node1 python", "lift", "node1 rm -rf"]
    assert lab.volume.asked == ["heal media"] and not lab.volume.answers, "asked once the brick was back, then awaited"


@pytest.mark.parametrize(
    ("answers", "held", "said"),
    [([[0, None, 0]], 5, "nothing waits to be healed"), ([*MISSED], 4, "5 files were written, node2 holds 4")],
)
def test_no_figure_without_proof(lab: SimpleNamespace, answers: Any, held: int, said: str) -> None:
    lab.volume.answers, lab.volume.held = answers, held
    with pytest.raises(KitError, match=said):
        one(lab)
    assert lab.done[-1] == "node1 rm -rf" and "lift" in lab.done


def test_a_heal_that_does_not_end(lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bench_heal, "LIMIT", -1.0)
    lab.volume.answers = [[5, None, 5], [5, 0, 5]]
    with pytest.raises(KitError, match=r"still waiting, by brick: \[5, 0, 5\]"):
        one(lab)


def test_a_run_takes_turns_and_puts_the_options_back(lab: SimpleNamespace) -> None:
    volume, before = lab.volume, dict(lab.volume.options)
    volume.answers = [[0, 0, 0], *MISSED * 4]
    options = argparse.Namespace(files=5, size=10, blocks=2, no_stock=False)
    found = bench_heal.run(Any, options, lambda _text: None)  # type: ignore[arg-type]
    stock = [seen.get("cluster.shd-max-threads") == "1" for seen in volume.during]
    assert stock == [False, True, True, False] and volume.options == before
    assert volume.during[1].get("cluster.use-anonymous-inode") == "on"
    assert found["ours_to_stock_low"] <= found["ours_to_stock"] <= found["ours_to_stock_high"]
    told = bench_heal.lines(found | {"debian": "13"})
    assert len(told) == 4 and "<svg" in bench_heal.picture(found)


def test_without_stock(lab: SimpleNamespace) -> None:
    lab.volume.answers = [[0, 0, 0], *MISSED]
    found = bench_heal.run(Any, argparse.Namespace(files=5, size=10, blocks=1, no_stock=True), lambda _text: None)  # type: ignore[arg-type]
    assert not any("stock" in name for name in found) and len(bench_heal.lines(found | {"debian": "13"})) == 2
    assert "<svg" in bench_heal.picture(found)


def test_a_lab_that_is_not_clean_is_refused(lab: SimpleNamespace) -> None:
    for answer in ([0, 1, 0], [0, None, 0]):
        lab.volume.answers = [answer]
        with pytest.raises(KitError, match="Before anything was done"):
            bench_heal.run(Any, argparse.Namespace(files=5, size=1, blocks=1, no_stock=True), lambda _text: None)  # type: ignore[arg-type]
    assert not lab.done


def test_the_figures() -> None:
    found = bench_heal.figures(100, 10, {"ours": [[20.0], [40.0]], "stock": [[10.0], [10.0]]})
    assert found == {
        "files": 100, "bytes": 10, "ours_files_per_second": 30.0, "ours_seconds": 3.3, "stock_files_per_second": 10.0,
        "stock_seconds": 10.0, "ours_to_stock": 3.0, "ours_to_stock_low": 2.0, "ours_to_stock_high": 4.0,
    }  # fmt: skip
