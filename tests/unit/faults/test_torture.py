"""The parts of the judge around the checker: scenarios, the picture, the summary."""

from __future__ import annotations

import itertools
import json
import xml.etree.ElementTree as ET
from pathlib import Path

import pytest
from PIL import Image

from faults import nemesis, timeline, torture
from faults.checker import report, together
from faults.history import Event, History, load
from faults.observer import places
from kit import faults
from kit.lab import NODES, Lab
from kit.run import Console, KitError


def events() -> list[Event]:
    found = []
    for number in range(60):
        host = list(NODES)[number % 3]
        what = "read" if number % 2 else "upload"
        kind = "info" if 20 <= number < 26 else "ok"
        found.append(Event(number, "invoke", what, number * 0.5, "c1", host, f"u{number}", 1))
        found.append(
            Event(
                number,
                kind,
                what,
                number * 0.5 + 0.2,
                "c1",
                host,
                f"u{number}",
                1,
                name=f"photos/u{number}",
                status=201,
            )
        )
    for note, time in (
        ("inject kill", 10.0),
        ("holds node2 exited", 10.5),
        ("lift", 15.0),
        ("ended", 16.0),
        ("clean", 20.0),
    ):
        found.append(Event(100, "info", "mark", time, host="node2", note=note))
    return sorted(found, key=lambda event: event.time)


def test_every_fault_of_a_scenario_exists() -> None:
    for members in nemesis.SCENARIOS.values():
        for name, count in members.items():
            kind = faults.FAULTS[nemesis.ALIASES.get(name, name)]
            assert kind.database is (count == 0)
    every = {nemesis.ALIASES.get(name, name) for name in nemesis.choices("all")}
    assert every == set(faults.FAULTS), "each fault is in a scenario"


def test_choices() -> None:
    assert nemesis.choices("power-cut") == {"power-cut": 1}
    assert nemesis.choices("none") == {}
    with pytest.raises(KitError, match=r"no scenario 'x'.*node_loss.*all, none, .*power-cut"):
        nemesis.choices("x")


def test_the_seed_decides_faults_and_nodes() -> None:
    def first(seed: str) -> list[tuple[str, list[str]]]:
        made = nemesis.Nemesis(Lab("unit"), History(), Console(), seed)
        return list(itertools.islice(made.order("node_loss"), 8))

    assert first("1") == first("1") != first("2")
    assert len({tuple(name for name, _ in first(str(seed))) for seed in range(5)}) > 1, "and their order"
    every = set(nemesis.SCENARIOS["node_loss"])
    assert {name for name, _ in first("1")[: len(every)]} == every, "each once before any twice"


def test_history_is_written_as_it_goes(tmp_path: Path) -> None:
    history = History(tmp_path / "h.jsonl")
    history.add(Event(history.number(), "invoke", "upload", 0.0, label="x"))
    assert load(tmp_path / "h.jsonl") == history.events, "before it is closed"
    history.mark("inject kill", "node1")
    history.close()
    assert [event.note for event in load(tmp_path / "h.jsonl")] == ["", "inject kill"]


def test_pictures(tmp_path: Path) -> None:
    timeline.write(tmp_path / "timeline", events(), list(NODES))
    text = (tmp_path / "timeline.svg").read_text(encoding="utf-8")
    root = ET.fromstring(text)  # noqa: S314 - written a line above
    words = "".join(root.itertext())
    assert all(word in words for word in ("kill node2", "node1", "node2", "node3", "longest stall", "errors"))
    with Image.open(tmp_path / "timeline.png") as image:
        assert image.width == timeline.WIDTH and len(image.getcolors(1 << 24) or ()) > 5
    facts = json.loads((tmp_path / "timeline.json").read_text(encoding="utf-8"))
    assert sum(facts["per_second"]["all"]["errors"]) == 6
    assert sum(map(sum, (facts["per_second"][node]["uploads"] for node in NODES))) == 27
    assert facts["faults"][0]["clean"] == 20.0


def test_a_picture_of_nothing() -> None:
    shapes, height = timeline.draw([], list(NODES))
    assert shapes and height > 100


@pytest.mark.parametrize(("value", "round_"), [(0, 1), (1, 1), (1.1, 2), (3, 5), (7, 10), (11, 20), (0.03, 0.05)])
def test_round_numbers(value: float, round_: float) -> None:
    assert timeline.nice(value) == pytest.approx(round_)


def test_summary_names_what_is_red() -> None:
    found = report("unit", events(), [], {f"photos/u{n}": f"u{n}" for n in range(0, 60, 2)}, places())
    text = torture.summary(found)
    assert "kill   node2" in text and "lost: u0 photos/u0: lost: not there: web node1" in text
    assert found.red and found.line().split("; ")[1].startswith("files: 0 corrupt, 0 torn, 30 lost")


def test_several_seeds_are_one_sum() -> None:
    whole = {f"photos/u{n}": f"u{n}" for n in range(0, 60, 2)}
    one, nothing = report("unit", events(), [], whole, places()), report("unit", [], [], {}, places())
    both = together([one, nothing, one])
    assert both.red and both.counts == {word: 2 * count for word, count in one.counts.items()}
    assert len(both.faults) == 2 * len(one.faults) == 2
    assert both.numbers["acknowledged"] == 2 * one.numbers["acknowledged"] > both.numbers["acknowledged_writes"] > 0
    assert both.numbers["sizes"] == pytest.approx(one.numbers["sizes"], abs=0.002)
    assert both.numbers["clients"] == 0, "the fewest of any run: one without clients is not hidden by the others"
    assert both.numbers["operations"]["upload"] == 2 * one.numbers["operations"]["upload"]
    assert not together([nothing]).red


def test_seeds_follow_each_other() -> None:
    assert torture.seeds("abc", 1) == ["abc"]
    assert torture.seeds("8", 3) == ["8", "9", "10"]
    for first, count in (("abc", 2), ("1", 0), ("-3", 2)):
        with pytest.raises(KitError, match="a number to start from"):
            torture.seeds(first, count)


def test_command_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert torture.main(["--scenario", "storm"]) == 2
    assert "There is no scenario 'storm'" in capsys.readouterr().err
    assert torture.main(["--scenario", "kill", "--name", "no-such-lab"]) == 2
    assert "There is no lab 'no-such-lab'" in capsys.readouterr().err
    assert torture.main(["--scenario", "kill", "--name", "no-such-lab", "--seeds", "2", "--seed", "x"]) == 2
    assert "a number to start from" in capsys.readouterr().err


class Told:
    """A fault that only tells what was done with it."""

    def __init__(self, hosts: list[str], proof: str) -> None:
        self.hosts, self.seen, self.done = hosts, proof, list[str]()

    def inject(self) -> None:
        self.done.append("inject")

    def proof(self) -> str:
        if not self.seen:
            raise KitError("it does not hold")
        return self.seen

    def lift(self) -> None:
        self.done.append("lift")

    def ended(self) -> str | None:
        return None


@pytest.fixture
def told(monkeypatch: pytest.MonkeyPatch) -> tuple[nemesis.Nemesis, list[Told], list[str]]:
    made: list[Told] = []
    answers = ["2 entries wait to be healed"]

    def make(_lab: Lab, name: str, hosts: list[str]) -> Told:
        made.append(Told(hosts, "" if name == "bad" else "seen"))
        return made[-1]

    monkeypatch.setattr(nemesis.faults, "make", make)
    monkeypatch.setattr(nemesis.observer, "clean", lambda lab, under_way: answers.pop() if answers else None)
    monkeypatch.setattr(nemesis.Nemesis, "playbook", lambda self, name, *extra: made[-1].done.append(f"{name} {extra}"))
    return nemesis.Nemesis(Lab("unit"), History(), Console(), "1"), made, answers


def notes(made: nemesis.Nemesis) -> list[str]:
    return [event.note for event in made.history.events]


def test_a_fault_is_proven_lifted_and_waited_for(told: tuple[nemesis.Nemesis, list[Told], list[str]]) -> None:
    one, made, _ = told
    with one.under("all-power-cut", ["node1", "node2"]) as fault:
        assert fault is made[0]  # type: ignore[comparison-overlap]
        assert notes(one) == ["inject all-power-cut", "holds seen"]
    assert notes(one)[2:] == ["lift", "ended", "clean"]
    assert made[0].done == ["inject", "lift"] and one.done == ["all-power-cut"]


def test_a_fault_that_does_not_hold_is_lifted_and_fails(told: tuple[nemesis.Nemesis, list[Told], list[str]]) -> None:
    one, made, _ = told
    with pytest.raises(KitError, match="does not hold"), one.under("bad", ["node1"]):
        pytest.fail("nothing may be tested under a fault that does not hold")
    assert made[0].done == ["inject", "lift"] and one.done == []
    with pytest.raises(AssertionError, match="during"), one.under("good", ["node1"]):
        raise AssertionError("during")
    assert made[1].done == ["inject", "lift"]


def test_a_recovery_comes_before_the_fault_is_lifted(told: tuple[nemesis.Nemesis, list[Told], list[str]]) -> None:
    one, made, _ = told
    with one.under("mount-hang", ["node1"], ["recover_mount", "-e", "node=node1"]):
        pass
    assert made[0].done == ["inject", "recover_mount ('-e', 'node=node1')", "lift"]


def test_a_brick_that_stays_away_is_healed_as_an_operator_would(
    told: tuple[nemesis.Nemesis, list[Told], list[str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    one, made, answers = told
    monkeypatch.setattr(nemesis, "PATIENCE", 0.0)
    monkeypatch.setattr(nemesis, "wait_for", lambda console, what, probe, **more: [probe(), probe(), probe()])
    answers[:] = ["brick offline: node1", "brick offline: node1"]
    with one.under("disk-full", ["node1"]):
        pass
    assert made[0].done == ["inject", "lift", "recover_heal ()"], "once, not at every look"
