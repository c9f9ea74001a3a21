"""The checker of the fault tests: what it must call red, and what not."""

from __future__ import annotations

import dataclasses
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from faults.checker import (
    RED,
    Seen,
    Verdict,
    histogram,
    judge,
    refused_for,
    refused_reads,
    report,
    wanted_hash,
    windows,
    wrong_bytes,
)
from faults.history import CLASSES, SIZES, Event, content, from_line, operations, to_line
from faults.observer import places

SEED = "unit"
WEB = [place for place in places() if place.startswith("web")]


class World:
    """A history with what is there in the end, as an honest store would have it."""

    def __init__(self) -> None:
        self.events: list[Event] = []
        self.there: dict[str, tuple[str, int]] = {}  # name -> label, size
        self.mounted: dict[str, tuple[str, int]] = {}
        self.clock = 0.0

    def op(self, what: str, kind: str | None, **more: object) -> Event:
        number = len(self.events)
        self.clock += 1
        invoke = Event(number, "invoke", what, self.clock, **more)  # type: ignore[arg-type]
        self.events.append(dataclasses.replace(invoke, name="" if what in ("upload", "replace") else invoke.name))
        self.clock += 1
        if kind is not None:
            self.events.append(dataclasses.replace(invoke, kind=kind, time=self.clock))
        return invoke

    def upload(self, label: str, kind: str | None = "ok", size: int = 100, stored: bool = True) -> str:
        name = f"photos/{label}"
        self.op("upload", kind, label=label, size=size, name=name if kind == "ok" else "")
        if stored:
            self.there[name] = (label, size)
        return name

    def replace(self, old: str, label: str, kind: str | None = "ok", stored: bool = True) -> str:
        name = f"photos/{label}"
        self.op("replace", kind, label=label, size=70, target=old, name=name if kind == "ok" else "")
        if stored:
            self.there[name] = (label, 70)
        return name

    def delete(self, name: str, kind: str | None = "ok", gone: bool = True) -> None:
        self.op("delete", kind, name=name)
        if gone:
            self.there.pop(name, None)

    def read(self, name: str, status: int = 200, seen: str = "match") -> None:
        label, size = self.there.get(name, ("", 0))
        self.op("read", "ok", name=name, label=label, size=size)
        self.events[-1].status, self.events[-1].seen = status, seen

    def create(self, label: str, kind: str = "ok", there: bool = True) -> str:
        name = f"dir/{label}-0"
        self.op("create", kind, label=label, size=50, name=name)
        if there:
            self.mounted[name] = (label, 50)
        return name

    def rename(self, label: str, old: str, new: str, kind: str = "ok", moved: bool = True) -> None:
        self.op("rename", kind, label=label, size=50, name=old, target=new)
        if moved:
            self.mounted[new] = self.mounted.pop(old)

    def seen(self) -> list[Seen]:
        every = [(places(), self.there), ([p for p in places() if p not in WEB], self.mounted)]
        return [
            Seen(place, name, "file", size, wanted_hash(SEED, label, size))
            for where, files in every
            for name, (label, size) in files.items()
            for place in where
        ]

    def listed(self) -> dict[str, str]:
        return {name: label for name, (label, _) in self.there.items()}

    def judge(self, seen: list[Seen] | None = None, listed: dict[str, str] | None = None) -> dict[str, Verdict]:
        verdicts = judge(
            SEED,
            self.events,
            self.seen() if seen is None else seen,
            self.listed() if listed is None else listed,
            places(),
        )
        return {verdict.label: verdict for verdict in verdicts}


def but(seen: list[Seen], place: str, name: str, **change: object) -> list[Seen]:
    """What was seen, with one thing otherwise."""
    assert any((one.place, one.name) == (place, name) for one in seen)
    return [dataclasses.replace(s, **change) if (s.place, s.name) == (place, name) else s for s in seen]  # type: ignore[arg-type]


def test_contents_follow_from_seed_label_and_size() -> None:
    assert content("a", "x", 1000) == content("a", "x", 1000)
    assert len({content("a", "x", 1000), content("b", "x", 1000), content("a", "y", 1000)}) == 3
    assert sorted(size for sizes in CLASSES.values() for size in sizes) == sorted(SIZES)


def test_all_is_well() -> None:
    world = World()
    name = world.upload("a")
    world.read(name)
    world.delete(world.upload("b"))
    world.rename("m", world.create("m"), "dir/m-1")
    assert {label: verdict.verdict for label, verdict in world.judge().items()} == dict.fromkeys("abm", "stable")


@pytest.mark.parametrize("place", places())
@pytest.mark.parametrize(
    ("change", "verdict"),
    [
        ({"state": "absent"}, "lost"),
        ({"state": "error"}, "lost"),
        ({"sha256": "00"}, "corrupt"),
        ({"sha256": "00", "size": 99}, "torn"),
        ({"sha256": "00", "zero_tail": 60}, "torn"),
    ],
)
def test_one_place_of_nine_is_enough(place: str, change: dict[str, object], verdict: str) -> None:
    world = World()
    name = world.upload("a")
    found = world.judge(but(world.seen(), place, name, **change))["a"]
    assert found.verdict == verdict and any(place in reason for reason in found.reasons)


@pytest.mark.parametrize("place", places())
def test_a_place_that_shows_nothing_shows_absence(place: str) -> None:
    world = World()
    world.upload("a")
    assert world.judge([one for one in world.seen() if one.place != place])["a"].verdict == "lost"


def test_a_row_without_a_file_and_a_file_without_a_row() -> None:
    world = World()
    world.upload("a")
    assert world.judge(seen=[])["a"].verdict == "lost"
    assert world.judge(listed={})["a"].verdict == "lost"


@pytest.mark.parametrize("place", places())
def test_deleted_and_there_again(place: str) -> None:
    world = World()
    name = world.upload("a")
    before = world.seen()
    world.delete(name)
    assert world.judge()["a"].verdict == "stable"
    assert world.judge([one for one in before if one.place == place])["a"].verdict == "resurrected"
    assert world.judge(listed={name: "a"}, seen=before)["a"].verdict == "resurrected"


@pytest.mark.parametrize("kind", ["info", "fail", None])
@pytest.mark.parametrize("happened", [True, False])
def test_what_nobody_was_told_may_be_either_way(kind: str | None, happened: bool) -> None:
    world = World()
    world.upload("up", kind, stored=happened)
    world.delete(world.upload("del"), "info" if kind == "fail" else kind, gone=happened)
    assert {v.verdict for v in world.judge().values()} == {"unknown"}


def test_a_delete_that_was_refused_is_none() -> None:
    world = World()
    name = world.upload("a")
    world.delete(name, "fail", gone=False)
    assert world.judge()["a"].verdict == "stable"
    assert world.judge(listed={}, seen=[])["a"].verdict == "lost"


def test_an_unknown_upload_that_is_listed_must_be_whole() -> None:
    world = World()
    name = world.upload("a", "info")
    assert world.judge(but(world.seen(), "brick node3", name, sha256="00", size=7))["a"].verdict == "torn"


@pytest.mark.parametrize("kind", ["ok", "info", "fail", None])
def test_a_replaced_file_stays(kind: str | None) -> None:
    world = World()
    old = world.upload("old")
    world.replace(old, "new", kind, stored=kind == "ok")
    assert world.judge()["old"].verdict == "stable"
    del world.there[old]
    assert world.judge()["old"].verdict == "lost"


@pytest.mark.parametrize("bad", ["torn", "corrupt"])
def test_readers_see_what_heals_later(bad: str) -> None:
    world = World()
    world.read(world.upload("a"), seen=bad)
    assert world.judge()["a"].verdict == bad


def test_late_visibility_is_stale() -> None:
    world = World()
    name = world.upload("a")
    world.read(name, status=404, seen="")
    world.read(name)
    verdict = world.judge()["a"]
    assert verdict.verdict == "stale" and "not found 2.0 s after" in verdict.reasons[0] and verdict.stale == 2.0
    numbers = report(SEED, world.events, world.seen(), world.listed(), places()).numbers
    assert numbers["longest_stale"] == 2.0
    world.delete(name)
    world.read(name, status=404, seen="")
    assert len(world.judge()["a"].reasons) == 1, "not found after a delete is no finding"


def test_renames() -> None:
    world = World()
    old = world.create("m")
    world.rename("m", old, "dir/m-1")
    seen = world.seen()
    assert world.judge(seen)["m"].verdict == "stable"
    assert world.judge([s for s in seen if s.place != "brick node2"])["m"].verdict == "lost"
    both = [*seen, *(dataclasses.replace(s, name=old) for s in seen if s.place == "mount node1")]
    assert world.judge(both)["m"].verdict == "resurrected"
    back = [dataclasses.replace(s, name=old) for s in seen]
    assert world.judge(back)["m"].verdict == "resurrected"
    assert world.judge(but(seen, "mount node1", "dir/m-1", sha256="00", size=3))["m"].verdict == "torn"


@pytest.mark.parametrize("moved", [True, False])
def test_a_rename_that_nobody_knows_of_leaves_one_name(moved: bool) -> None:
    world = World()
    old = world.create("m")
    world.rename("m", old, "dir/m-1", "info", moved)
    assert world.judge()["m"].verdict == "unknown"
    assert world.judge(seen=[])["m"].verdict == "lost"
    seen = world.seen()
    other = "dir/m-1" if not moved else old
    differ = [dataclasses.replace(s, name=other) if s.place == "brick node1" else s for s in seen]
    assert world.judge(differ)["m"].verdict == "lost", "places disagree"


@pytest.mark.parametrize(
    ("got", "verdict"),
    [
        (b"abcdef", "match"),
        (b"abc", "torn"),
        (b"", "torn"),
        (b"abc\0\0\0", "torn"),
        (b"\0\0\0\0\0\0", "torn"),
        (b"\0\0", "torn"),
        (b"abXdef", "corrupt"),
        (b"abX", "corrupt"),
        (b"abcdefg", "corrupt"),
    ],
)
def test_bytes_of_a_reader(got: bytes, verdict: str) -> None:
    assert wrong_bytes(b"abcdef", got) == verdict


def build(seed: int) -> World:
    """Any history of an honest store, unknown outcomes included."""
    chance = random.Random(seed)
    world = World()
    names: list[str] = []
    mounted: list[tuple[str, str]] = []
    for number in range(chance.randrange(1, 30)):
        what = chance.choice(("upload", "upload", "replace", "delete", "read", "create", "rename"))
        kind = chance.choice(("ok", "ok", "ok", "info", None))
        if what == "upload":
            name = world.upload(
                f"u{number}", kind, chance.choice(SIZES[:4]), stored=kind == "ok" or chance.random() < 0.5
            )
            if kind == "ok":
                names.append(name)
        elif what == "replace" and names:
            stored = kind == "ok" or chance.random() < 0.5
            name = world.replace(chance.choice(names), f"r{number}", kind, stored)
            if kind == "ok":
                names.append(name)
        elif what == "delete" and names:
            world.delete(names.pop(chance.randrange(len(names))), kind, gone=kind == "ok" or chance.random() < 0.5)
        elif what == "read" and names:
            world.read(chance.choice(names))
        elif what == "create":
            there = kind == "ok" or chance.random() < 0.5
            name = world.create(f"m{number}", kind or "info", there)
            if kind == "ok":
                mounted.append((f"m{number}", name))
        elif what == "rename" and mounted:
            label, old = mounted.pop(chance.randrange(len(mounted)))
            world.rename(label, old, f"dir/{label}-{number}", kind or "info", kind == "ok" or chance.random() < 0.5)
            if kind == "ok":
                mounted.append((label, f"dir/{label}-{number}"))
    return world


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9))
def test_an_honest_store_is_never_red(seed: int) -> None:
    assert not {v.label for v in build(seed).judge().values() if v.verdict in RED}


@settings(max_examples=150, deadline=None)
@given(st.integers(0, 10**9), st.randoms(use_true_random=False))
def test_one_changed_byte_anywhere_is_red(seed: int, chance: random.Random) -> None:
    world = build(seed)
    seen = world.seen()
    acknowledged = {
        op.invoke.name if op.invoke.what == "create" else op.name
        for op in operations(world.events)
        if op.outcome == "ok"
    }
    candidates = [one for one in seen if one.name in world.listed() or one.name in acknowledged & world.mounted.keys()]
    if candidates:
        one = chance.choice(candidates)
        verdicts = world.judge(but(seen, one.place, one.name, sha256="0" * 64))
        assert [v.verdict for v in verdicts.values() if v.verdict in RED] == ["corrupt"]


def test_lines_of_the_history() -> None:
    event = Event(3, "ok", "upload", 1.5, "c1", "node1", "c1-1", 1, "photos/x", status=201)
    assert from_line(to_line(event)) == event
    assert "target" not in to_line(event)


def test_marks_and_measures() -> None:
    world = World()
    world.clock = 10.0
    world.events.append(Event(0, "info", "mark", 10.0, host="node2", note="inject kill"))
    world.events.append(Event(0, "info", "mark", 10.5, host="node2", note="holds node2 exited"))
    start = world.upload("slow")
    world.events[-1].host = world.events[-2].host = "node1"
    world.events[-1].time = world.clock = 15.0
    world.upload("bad", "info", stored=False)
    world.events[-1].host = world.events[-2].host = "node2"
    for note, time in (("lift", 20.0), ("ended", 22.0), ("clean", 29.0)):
        world.events.append(Event(0, "info", "mark", time, host="node2", note=note))
    (window,) = windows(world.events)
    assert (window.fault, window.hosts, window.proof, window.clean) == ("kill", ["node2"], "node2 exited", 29.0)
    result = report(SEED, world.events, world.seen(), world.listed(), places())
    (fault,) = result.faults
    assert fault["upload healthy"]["longest_stall"] == 4.0 and fault["upload hit"]["errors"] == 1
    assert fault["seconds_to_clean"] == 9.0 and fault["upload healthy"]["first_success_after_fault"] == 5.0
    assert result.numbers["acknowledged"] == result.numbers["acknowledged_under_fault"] == 1
    assert result.line().startswith("1 operations acknowledged; files: 0 corrupt, 0 torn, 0 lost, 0 resurrected,")
    assert not result.red and start
    red = report(SEED, world.events, [], world.listed(), places())
    assert red.red and red.counts["lost"] == 1


def test_a_run_without_faults_is_measured_too() -> None:
    world = World()
    world.upload("a")
    result = report(SEED, world.events, world.seen(), world.listed(), places())
    assert result.faults == [] and result.numbers["acknowledged_under_fault"] == 0


def test_buckets() -> None:
    counts = histogram([0.05, 0.1, 0.2, 100.0])
    assert counts["<= 0.1 s"] == 2 and counts["<= 0.3 s"] == 1 and counts["longer"] == 1 and sum(counts.values()) == 4


def refused(world: World, age: float = 5.0, since: float = 0.0, hosts: tuple[str, ...] = ("",)) -> list[int]:
    return [op.end.status for op in refused_reads(world.events, since, world.clock, hosts, age) if op.end is not None]


def test_a_read_is_refused_if_it_does_not_give_a_file_that_is_old_enough() -> None:
    world = World()
    name = world.upload("a")
    world.read(name, 503)  # too young
    world.read(name)
    assert refused(world) == []
    world.read(name, 503)
    world.read(name, 404)
    world.read("photos/never-stored", 404)
    assert refused(world) == [503, 404]
    world.read(name, 0)
    world.events[-1].kind = "fail"
    assert refused(world) == [503, 404, 0]
    assert refused(world, since=world.clock - 1) == [0] and refused(world, hosts=("node2",)) == []
    assert refused(world, age=100.0) == []


@pytest.mark.parametrize("kind", ["ok", "info", None])
def test_a_file_whose_delete_was_asked_for_need_not_be_read(kind: str | None) -> None:
    world = World()
    name = world.upload("a")
    for _ in range(3):
        world.read(name)
    world.delete(name, kind)
    world.read(name, 404)
    world.read(name, 503)
    assert refused(world) == []


def test_how_long_uploads_were_refused() -> None:
    world = World()
    world.upload("a")
    assert refused_for(world.events, 0, world.clock, ("",)) == (0, 0.0)
    before = world.clock
    for kind in ("info", "ok", "fail"):
        world.upload(kind, kind)
    world.upload("open", None)
    assert refused_for(world.events, 0, world.clock, ("",)) == (2, 5.0)
    assert refused_for(world.events, before + 3, world.clock, ("",)) == (1, 1.0)
    assert refused_for(world.events, 0, world.clock, ("node1",)) == (0, 0.0)
