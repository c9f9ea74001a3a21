"""``sync watch``: when it runs, whom it wakes; with inotifywait, and without."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tribrick.sync import command, door, move, watch
from tribrick.sync.watch import Changes, follow, wake_file

PATIENCE = 20.0


def wait_for(what: Any) -> None:
    end = time.monotonic() + PATIENCE
    while not what():
        assert time.monotonic() < end, "nothing happened"
        time.sleep(0.02)  # ask again, until PATIENCE is over


class Follower:
    """A follower in a thread, and its turns."""

    def __init__(self, changes: Changes, every: float, quiet: float = 0.2, *, soon: bool = False) -> None:
        self.turns, self.said, self.soon = 0, list[str](), soon
        self.stop = threading.Event()
        self.thread = threading.Thread(
            target=follow, args=(self.turn, changes),
            kwargs={"every": every, "quiet": quiet, "stop": self.stop, "said": self.said.append},
        )  # fmt: skip
        self.thread.start()

    def turn(self) -> bool:
        self.turns += 1
        return self.soon

    def end(self) -> None:
        self.stop.set()
        self.thread.join(PATIENCE)
        assert not self.thread.is_alive()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    (tmp_path / "root/a/b").mkdir(parents=True)
    (tmp_path / "root/.tribrick-history/objects").mkdir(parents=True)
    return tmp_path


@pytest.fixture
def changes(tree: Path) -> Iterator[Changes]:
    with Changes(tree / "root", wake_file(tree / "sync.sqlite")) as made:
        yield made


def settled(follower: Follower) -> int:
    """Wait until inotifywait has set itself up and no turn is due."""
    before, end = -1, time.monotonic() + PATIENCE
    while before != follower.turns:
        assert time.monotonic() < end, "it runs again and again"
        before = follower.turns
        time.sleep(1)  # longer than a turn is put off: nothing tells that none is due
    return before


@pytest.mark.parametrize("what", ["write", "move", "delete", "new directory", "wake"])
def test_a_change_begins_a_run(tree: Path, changes: Changes, what: str) -> None:
    root = tree / "root"
    (root / "a/old").write_text("x")
    follower = Follower(changes, every=3600)
    try:
        before = settled(follower)
        if what == "write":
            (root / "a/b/new").write_text("x")
        elif what == "move":
            (root / "a/old").rename(root / "a/b/old")
        elif what == "delete":
            (root / "a/old").unlink()
        elif what == "new directory":
            (root / "c").mkdir()
        else:
            assert door.main([str(tree / "sync.sqlite")]) == 0
        wait_for(lambda: follower.turns > before)
    finally:
        follower.end()
    assert follower.said == []


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSH_ORIGINAL_COMMAND", "tribrick-sync 1 wake")


def test_its_own_history_begins_none(tree: Path, changes: Changes) -> None:
    follower = Follower(changes, every=3600)
    try:
        before = settled(follower)
        (tree / "root/.tribrick-history/objects/x").write_text("x")
        (tree / "root/.tribrick-history/y").write_text("x")
        assert settled(follower) == before
    finally:
        follower.end()


def test_many_changes_are_one_run(tree: Path, changes: Changes) -> None:
    follower = Follower(changes, every=3600, quiet=0.5)
    try:
        before = settled(follower)
        for number in range(20):
            (tree / f"root/a/{number}").write_text("x")
            time.sleep(0.02)  # they are to come in the course of time, not at once
        wait_for(lambda: follower.turns > before)
        assert settled(follower) <= before + 2
    finally:
        follower.end()


def test_without_inotifywait_it_runs_from_time_to_time_and_says_so(tree: Path) -> None:
    with Changes(tree / "root", tree / "x.wake", program="no-such-program") as none:
        follower = Follower(none, every=0.1)
        wait_for(lambda: follower.turns > 3)
        follower.end()
    assert len(follower.said) == 1 and "no-such-program" in follower.said[0]


def test_a_watch_that_ends_is_said(tree: Path, changes: Changes) -> None:
    follower = Follower(changes, every=0.2)
    wait_for(lambda: follower.turns > 2)
    assert changes._process is not None
    changes._process.kill()
    wait_for(lambda: follower.said)
    before = follower.turns
    wait_for(lambda: follower.turns > before + 2)
    follower.end()
    assert "inotifywait has ended" in follower.said[0]


def test_what_is_left_for_soon_is_done_soon(tree: Path, changes: Changes) -> None:
    follower = Follower(changes, every=3600, soon=True)
    try:
        wait_for(lambda: follower.turns > 2)
    finally:
        follower.end()


class Peer:
    """Notes that it was woken; one of them is away."""

    def __init__(self, name: str) -> None:
        self.name, self.woken = name, 0

    def wake(self) -> bool:
        self.woken += 1
        return self.name != "away"


def test_peers_are_woken_when_something_was_recorded(tree: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    answers = [
        command.Answer({"scan": {"new": 1, "young": 0}, "written": ["x"]}, ["1 written"]),
        command.Answer({"scan": {"new": 0, "young": 0}}, ["nothing"]),
        command.Answer({"scan": {}}, ["failed: x", "nothing"], "1 failed"),
        command.Answer({"scan": {}}, ["failed: x", "nothing"], "1 failed"),
    ]
    peers, said, given, stop = [Peer("n2"), Peer("away")], list[str](), list[bool](), threading.Event()

    def work(options: Any, _progress: Any) -> command.Answer:
        given.append(options["init"])
        (tree / "sync.sqlite").touch()
        if not answers:
            stop.set()
            return command.Answer({"scan": {}}, ["nothing"])
        return answers.pop(0)

    monkeypatch.setattr(command, "work", work)
    monkeypatch.setattr(command, "doors", lambda _entries: peers)
    monkeypatch.setattr(command, "_settings", lambda: {"state": str(tree / "sync.sqlite"), "quiet": 0.01})
    monkeypatch.setattr(command, "storages", {"default": type("Store", (), {"location": str(tree / "root")})})
    command.watch({"every": 1.0}, stop, said.append)
    assert [peer.woken for peer in peers] == [1, 1] and given == [True, False, False, False, False]
    assert said == ["1 written", "failed: x; 1 failed", "in order again"], "a trouble that lasts is said once"
    assert watch.wake(peers) == ["away"]


def test_a_door_that_cannot_be_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    one = move.Door({"name": "n2", "address": "nobody@127.0.0.1", "port": 1})
    assert one.wake() is False
