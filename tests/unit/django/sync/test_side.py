"""A directory and its history: what a scan records, what a step does, and what is refused."""

from __future__ import annotations

import io
import json
import os
import sqlite3
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from tribrick.sentinel import HISTORY
from tribrick.sync import door, versions
from tribrick.sync import side as side_module
from tribrick.sync.plan import Step, plan
from tribrick.sync.side import Side
from tribrick.sync.state import Busy, Stamp, State, StateDamaged, SyncError


def heads(place: Any, name: str) -> Any:
    with State.open(place.path) as state:
        return state.heads(name)


def everything(root: Path) -> dict[str, Any]:
    """Whatever lies below a directory, with its times."""
    return {
        str(path.relative_to(root)): (path.lstat().st_mtime_ns, path.lstat().st_ino, path.lstat().st_size)
        for path in root.rglob("*")
    }


def test_a_scan_records_what_is_new_changed_and_gone(place: Any) -> None:
    place.write("a.jpg", b"one")
    place.write("d/b.jpg", b"two")
    found = place.scan()
    assert (sorted(found.new), found.changed, found.gone, found.seen) == (["a.jpg", "d/b.jpg"], [], [], 2)
    assert place.scan().recorded == 0, "a second look finds nothing"
    place.write("a.jpg", b"three")
    (place.root / "d/b.jpg").unlink()
    found = place.scan()
    assert (found.new, found.changed, found.gone) == ([], ["a.jpg"], ["d/b.jpg"])
    assert place.contents() == {b"one", b"two", b"three"}, "all of it is in the history"
    [one], [two] = heads(place, "a.jpg"), heads(place, "d/b.jpg")
    assert one.size == 5 and two.deleted and one.node == "n1"
    place.write("d/b.jpg", b"four")
    assert place.scan().new == ["d/b.jpg"]
    assert two.vector < heads(place, "d/b.jpg")[0].vector, "who writes after a deletion has seen it"


def test_a_change_that_keeps_size_and_time_is_seen(place: Any) -> None:
    place.write("a.jpg", b"one")
    place.scan()
    before = (place.root / "a.jpg").stat()
    place.write("a.jpg", b"two")
    os.utime(place.root / "a.jpg", ns=(before.st_atime_ns, before.st_mtime_ns))
    assert place.scan().changed == ["a.jpg"]


def test_a_new_time_or_mode_alone_is_no_change(place: Any) -> None:
    place.write("a.jpg", b"one")
    place.scan()
    os.utime(place.root / "a.jpg", (1, 1))
    (place.root / "a.jpg").chmod(0o600)
    assert place.scan().recorded == 0 and len(heads(place, "a.jpg")) == 1


def test_a_file_on_its_way_is_left_for_later(place: Any) -> None:
    place.write("a.jpg", b"one")
    assert place.scan(quiet=30).young == ["a.jpg"]
    assert heads(place, "a.jpg") == []
    assert place.scan().new == ["a.jpg"]


def test_what_is_not_the_sites_is_not_there(place: Any) -> None:
    for name in (".hidden", ".dir/x", "d/.abcdefghijklmnopqrst.part"):
        place.write(name, b"x")
    with State.open(place.path) as state:
        state.set_meta("exclude", '["private"]')
    place.write("private/secret", b"x")
    assert place.scan().seen == 0


def test_names_that_cannot_be_kept_are_said_and_left_alone(place: Any, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(b"secret")
    (place.root / "link").symlink_to(tmp_path / "secret")
    (place.root / "dirlink").symlink_to(tmp_path)
    os.mkfifo(place.root / "pipe")
    place.write("new\nline", b"x")
    (place.root / os.fsdecode(b"latin-\xe9")).write_bytes(b"x")
    place.write("good", b"good")
    before = everything(place.root)
    found = place.scan()
    assert found.new == ["good"]
    assert set(found.refused) == {"link", "dirlink", "pipe", "new\nline", os.fsdecode(b"latin-\xe9")}
    assert place.contents() == {b"good"}, "no link was followed"
    assert {name: status for name, status in everything(place.root).items() if HISTORY not in name} == {
        name: status for name, status in before.items() if HISTORY not in name
    }


def test_a_file_that_becomes_a_link_is_no_deletion(place: Any, tmp_path: Path) -> None:
    place.write("a.jpg", b"one")
    place.scan()
    (place.root / "a.jpg").unlink()
    (place.root / "a.jpg").symlink_to(tmp_path)
    found = place.scan()
    assert found.gone == [] and list(found.refused) == ["a.jpg"]


def test_many_deletions_need_a_person(place: Any) -> None:
    for number in range(30):
        place.write(f"{number}.jpg", b"%d" % number)
    place.scan()
    for number in range(11):
        (place.root / f"{number}.jpg").unlink()
    place.write("new.jpg", b"new")
    with pytest.raises(SyncError, match=r"11 of 30 files would be deleted.*--accept 11"):
        place.scan()
    assert heads(place, "new.jpg") == [] and not heads(place, "0.jpg")[0].deleted, "nothing was recorded"
    assert len(place.scan(accept=11).gone) == 11


def test_an_empty_directory_in_place_of_the_right_one(place: Any, tmp_path: Path) -> None:
    place.write("a.jpg", b"one")
    place.scan()
    place.root.rename(tmp_path / "elsewhere")
    with pytest.raises(SyncError, match="n1: No such file"):
        place.scan()
    place.root.mkdir()
    with pytest.raises(SyncError, match="is it mounted"):
        place.scan()
    (place.root / HISTORY).mkdir()
    (place.root / HISTORY / "side.json").write_text('{"state": "another", "mark": ""}')
    with pytest.raises(SyncError, match="belongs to another state"):
        place.scan()
    assert not heads(place, "a.jpg")[0].deleted


def test_the_sites_sentinel_is_asked(place: Any) -> None:
    def prove(_root: int, _shown: str) -> None:
        raise OSError("not mounted")

    with place.open(prove=prove) as side, pytest.raises(OSError, match="not mounted"):
        side.scan()


def test_a_directory_that_cannot_be_read_is_no_deletion(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    place.write("d/a.jpg", b"one")
    place.write("b.jpg", b"two")
    place.scan()
    (place.root / "b.jpg").unlink()
    real = os.open

    def broken(path: Any, *arguments: Any, **more: Any) -> int:
        if path == "d":
            raise PermissionError(13, "Permission denied")
        return real(path, *arguments, **more)

    with monkeypatch.context() as patch:
        patch.setattr(side_module.os, "open", broken)
        with pytest.raises(SyncError, match=r"cannot be read.*nothing was recorded"):
            place.scan()
    assert not heads(place, "d/a.jpg")[0].deleted and not heads(place, "b.jpg")[0].deleted


@pytest.mark.parametrize("damage", ["text", "empty", "zeros", "page", "other"])
def test_a_damaged_state_is_said_before_anything_is_changed(place: Any, damage: str) -> None:
    for number in range(40):
        place.write(f"{number}.jpg", b"%d" % number)
    place.scan()
    data = place.path.read_bytes()
    if damage == "text":
        place.path.write_bytes(b"this is not a database" * 100)
    elif damage == "empty":
        place.path.write_bytes(b"")
    elif damage == "zeros":
        place.path.write_bytes(bytes(len(data)))
    elif damage == "page":
        place.path.write_bytes(data[: len(data) // 2] + b"\xff" * 2000 + data[len(data) // 2 + 2000 :])
    else:
        place.path.unlink()
        with sqlite3.connect(place.path) as other:
            other.execute("CREATE TABLE x (y)")
    before = everything(place.root)
    with pytest.raises(StateDamaged, match="--init"):
        State.open(place.path)
    assert everything(place.root) == before


def test_a_state_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(SyncError, match=r"there is no state at .*--init"):
        State.open(tmp_path / "none.sqlite")
    assert not list(tmp_path.iterdir())


def test_one_at_a_time(place: Any) -> None:
    with State.open(place.path) as state, State.open(place.path) as other, state.locked():
        started = time.monotonic()
        with pytest.raises(Busy, match="somebody else"), other.locked(wait=0.2):
            pass
        assert 0.2 <= time.monotonic() - started < 5


# Steps


def wish(place: Any, name: str, data: bytes | None) -> Step:
    """Put a content into the history and say that the name should show it, as a peer's version does."""
    with place.open() as side:
        before = side.state.on_disk(name)
        known = None
        if data is not None:
            path = side.history / "incoming" / "x"
            path.write_bytes(data)
            sha256 = side_module._hash(path)
            side.keep([(path, sha256)])
            base = before or versions.Version(name, versions.VersionVector(), "", 0, 0, 0, "n2")
            known = versions.replace(base, sha256=sha256, size=len(data), modified=1_000_000_000)
        made = side.state.write(name, known, at=5)
        return Step(name, made, before)


def apply(place: Any, *steps: Step, **more: Any) -> Any:
    with place.open(**more) as side, side.state.locked():
        return side.apply(steps)


EXCHANGE = pytest.mark.parametrize("exchange", [True, False], ids=["exchange", "no exchange"])


@pytest.fixture
def no_exchange(monkeypatch: pytest.MonkeyPatch) -> Callable[[bool], None]:
    """Take away renameat2, as some file systems do."""

    class Without:
        @staticmethod
        def renameat2(*_arguments: Any) -> int:
            side_module.ctypes.set_errno(22)
            return -1

    def choose(exchange: bool) -> None:
        if not exchange:
            monkeypatch.setattr(side_module, "_libc", Without)

    return choose


@EXCHANGE
def test_steps_write_replace_and_remove(place: Any, exchange: bool, no_exchange: Any) -> None:
    no_exchange(exchange)
    place.write("old.jpg", b"old")
    place.write("gone.jpg", b"gone")
    (place.root / "old.jpg").chmod(0o640)
    place.scan()
    steps = [wish(place, "gone.jpg", None), wish(place, "new/deep/a.jpg", b"new"), wish(place, "old.jpg", b"newer")]
    assert [step.kind for step in steps] == ["remove", "write", "write"]
    done = apply(place, *steps)
    assert (done.written, done.removed, done.failed) == (["new/deep/a.jpg", "old.jpg"], ["gone.jpg"], {})
    assert place.tree() == {"new/deep/a.jpg": b"new", "old.jpg": b"newer"}
    assert (place.root / "old.jpg").stat().st_mode & 0o777 == 0o640, "the mode stays"
    assert (place.root / "new/deep/a.jpg").stat().st_mode & 0o777 == 0o644
    assert (place.root / "old.jpg").stat().st_mtime == 1
    assert place.contents() == {b"old", b"gone", b"new", b"newer"}
    assert list((place.root / HISTORY / "incoming").iterdir()) == []
    assert place.scan().recorded == 0, "what we wrote is no change of anybody's"


@EXCHANGE
@pytest.mark.parametrize("when", ["before", "between"])
@pytest.mark.parametrize("what", ["replaced", "appears", "removed"])
def test_what_somebody_writes_meanwhile_is_not_lost(
    place: Any, what: str, when: str, exchange: bool, no_exchange: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    no_exchange(exchange)
    if what != "appears":
        place.write("a.jpg", b"old")
        place.scan()
    step = wish(place, "a.jpg", None if what == "removed" else b"ours")

    def somebody() -> None:
        new = place.root / "theirs.new"
        new.write_bytes(b"theirs")
        new.rename(place.root / "a.jpg")

    shown: list[int] = []
    fired: list[int] = []
    stat_of, show = os.stat, Side._show

    def looked(path: Any, *arguments: Any, **more: Any) -> Any:
        try:
            return stat_of(path, *arguments, **more)
        finally:
            if path == "a.jpg" and shown and not fired:  # in the moment after we have looked
                fired.append(1)
                somebody()

    def showing(self: Any, *arguments: Any) -> Any:
        shown.append(1)
        return show(self, *arguments)

    if when == "before":
        somebody()
    with monkeypatch.context() as patch:
        if when == "between":
            patch.setattr(Side, "_show", showing)
            patch.setattr(side_module.os, "stat", looked)
        done = apply(place, step)
    if done.failed:
        assert place.tree()["a.jpg"] == b"theirs", "it was left alone"
        assert place.scan().recorded == 1
    else:
        assert done.rescued == ["a.jpg"], "it became a change of its own"
    assert b"theirs" in place.contents()
    contents = {one.sha256 for one in heads(place, "a.jpg")}
    assert side_module.hashlib.sha256(b"theirs").hexdigest() in contents and len(heads(place, "a.jpg")) == 2


def test_a_damaged_history_is_not_shown(place: Any) -> None:
    place.write("a.jpg", b"old")
    place.scan()
    step = wish(place, "a.jpg", b"new")
    with place.open() as side:
        side.object(step.after.sha256).write_bytes(b"bad")
    done = apply(place, step)
    assert "damaged" in done.failed["a.jpg"] and place.tree() == {"a.jpg": b"old"}
    with State.open(place.path) as state:
        assert state.dirty() == ["a.jpg"], "it is tried again"
    with place.open() as side:
        made = plan({"a.jpg": [step.after]}, {}, {one for one in [step.after.sha256] if side.has(one)})
    assert [fetch.contents for fetch in made.fetches] == [((step.after.sha256, ""),)], "and fetched from a peer"


def test_no_link_is_followed_when_writing(place: Any, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "a.jpg").write_bytes(b"outside")
    (place.root / "d").symlink_to(tmp_path / "outside")
    (place.root / "b.jpg").symlink_to(tmp_path / "outside" / "a.jpg")
    done = apply(place, wish(place, "d/new.jpg", b"1"), wish(place, "d/a.jpg", b"2"), wish(place, "b.jpg", b"3"))
    assert set(done.failed) == {"d/new.jpg", "d/a.jpg", "b.jpg"}
    assert [path.name for path in (tmp_path / "outside").iterdir()] == ["a.jpg"]
    assert (tmp_path / "outside" / "a.jpg").read_bytes() == b"outside"


def test_a_directory_makes_way_if_it_is_empty(place: Any) -> None:
    (place.root / "a/b").mkdir(parents=True)
    place.write("c/file", b"x")
    place.scan()
    done = apply(place, wish(place, "a", b"1"), wish(place, "c", b"2"))
    assert done.written == ["a"] and list(done.failed) == ["c"]
    assert place.tree() == {"a": b"1", "c/file": b"x"}


def test_a_linked_history_costs_no_space(place: Any) -> None:
    place.write("a.jpg", b"one")
    place.write("b.jpg", b"one")
    with place.open(linked=True) as side:
        assert side.scan().recorded == 2
        assert side.scan().recorded == 0
    assert place.contents() == {b"one"}
    assert max((place.root / name).stat().st_nlink for name in ("a.jpg", "b.jpg")) == 2
    new = place.root / "new"
    new.write_bytes(b"two")
    new.rename(place.root / "a.jpg")
    place.write("b.jpg", b"in place")
    with place.open(linked=True) as side:
        assert sorted(side.scan().changed) == ["a.jpg", "b.jpg"]
    hashes = {path.name: side_module._hash(path) for path in (place.root / HISTORY / "objects").glob("*/*")}
    assert all(name == sha256 for name, sha256 in hashes.items()), "what was overwritten in place is not called whole"
    done = apply(place, wish(place, "a.jpg", b"three"), linked=True)
    assert done.written == ["a.jpg"] and place.tree()["a.jpg"] == b"three"
    with place.open(linked=True) as side:
        assert side.scan().recorded == 0


def test_linked_files_of_one_content_do_not_change_together(place: Any) -> None:
    place.write("first.jpg", b"one")
    with place.open(linked=True) as side:
        side.scan()
    apply(place, wish(place, "a.jpg", b"one"), wish(place, "b.jpg", b"one"), linked=True)
    (place.root / "a.jpg").write_bytes(b"two")  # in place, as SFTP does
    assert place.tree() == {"first.jpg": b"one", "a.jpg": b"two", "b.jpg": b"one"}
    with place.open(linked=True) as side:
        assert side.scan().changed == ["a.jpg"]


def test_what_is_removed_is_kept_though_its_history_was_just_overwritten(place: Any) -> None:
    for name in ("a.jpg", "b.jpg"):  # the history shares its bytes with the first
        place.write(name, b"one")
        with place.open(linked=True) as side:
            side.scan()
    place.write("a.jpg", b"two")  # in place, after the last scan
    assert place.contents() == {b"two"}
    assert apply(place, wish(place, "b.jpg", None), linked=True).removed == ["b.jpg"]
    assert place.contents() == {b"one"}


def test_what_is_recorded_is_kept_though_the_history_was_just_overwritten(place: Any) -> None:
    place.write("a.jpg", b"one")
    with place.open(linked=True) as side:
        side.scan()
    place.write("b.jpg", b"one")
    changed = (place.root / "b.jpg").stat().st_ctime_ns
    while time.time_ns() < changed + 1_000_000_000:
        time.sleep(0.01)  # ask again: b.jpg is to be older than a.jpg
    place.write("a.jpg", b"two")
    with place.open(linked=True) as side:
        found = side.scan(quiet=0.9)
    assert (found.new, found.young) == (["b.jpg"], ["a.jpg"])
    assert place.contents() == {b"one"}, "peers ask for it"


@pytest.mark.parametrize("restored", ["state", "directory", "both"])
def test_after_a_restore_no_count_is_given_twice(place: Any, monkeypatch: pytest.MonkeyPatch, restored: str) -> None:
    place.write("a.jpg", b"one")
    place.scan()
    side = place.root / HISTORY / "side.json"
    backup = place.path.read_bytes(), side.read_bytes()
    for data in (b"two", b"three"):
        place.write("a.jpg", data)
        place.scan()
    [later] = heads(place, "a.jpg")
    if restored != "directory":
        place.path.write_bytes(backup[0])
    if restored != "state":
        side.write_bytes(backup[1])
    if restored == "both":  # a machine that was set back has booted
        monkeypatch.setattr(side_module, "_boot", lambda: "another")
    place.write("a.jpg", b"four")
    place.scan()
    with State.open(place.path) as state:
        [again] = state.heads("a.jpg")
        assert not again.vector < later.vector, "who knows the later one must not take this for an earlier one"
        state.add([later])
        copies = state.settle()
    assert len(copies) == (0 if restored == "directory" else 1), "neither is lost"


def test_another_name_is_taken_once_a_boot(place: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each time costs the peers a look at everything."""
    place.write("a.jpg", b"one")
    place.scan()
    before, _lines = told(place)
    monkeypatch.setattr(side_module, "_boot", lambda: "another")
    place.scan()
    after, _lines = told(place)
    assert after != before
    place.scan()
    assert told(place)[0] == after


def told(place: Any, after: int = 0, known: str = "-") -> tuple[str, list[Any]]:
    """What a peer hears: how the numbers are called, and the numbered versions."""
    out = io.StringIO()
    door.changes(str(place.path), after, known, False, out)
    head, *lines, _end = map(json.loads, out.getvalue().splitlines())
    return head["state"], lines


def test_after_a_restore_peers_hear_of_what_got_a_number_that_they_know(place: Any) -> None:
    place.write("a.jpg", b"one")
    place.scan()
    backup = place.path.read_bytes()
    for data in (b"two", b"three", b"four"):
        place.write("a.jpg", data)
        place.scan()
    known, lines = told(place)
    assert told(place, lines[-1][0], known)[1] == [], "usually only what is new"
    place.path.write_bytes(backup)
    for number in range(5):
        place.write(f"{number}.jpg", b"new")
        place.scan()
    assert told(place, lines[-1][0], known)[1] == told(place)[1], "all of it"


def test_others_know_more_of_us_than_we_do(place: Any) -> None:
    place.write("a.jpg", b"one")
    place.scan()
    with State.open(place.path) as state:
        [mine] = state.heads("a.jpg")
        before = state.meta("replica")
        state.add([mine])
        assert state.meta("replica") == before
        state.add([versions.replace(mine, vector=mine.vector.with_count(before, 99))])
        assert state.meta("replica") != before


@pytest.mark.parametrize("removed", [True, False])
def test_a_change_that_loses_twice_is_kept_twice(place: Any, removed: bool) -> None:
    """Somebody removed the conflict copy, or changed it; then the same content loses once more."""
    place.write("a.jpg", b"first")
    place.scan()
    for turn in (1, 2):
        with State.open(place.path) as state:
            [known] = state.heads("a.jpg")
        place.write("a.jpg", b"loses")
        place.scan()
        theirs = versions.replace(
            known, vector=known.vector.with_count("n2.00000000", turn), sha256=f"{turn}" * 64, at=2**62, node="n2"
        )
        with State.open(place.path) as state:
            state.add([theirs])
            copies = state.settle()
            assert len(copies) == 1
            assert copies[0] in state.copies(), "it is there to be seen"
            if turn == 1:
                state.write(copies[0].name, None if removed else known, at=1)
            assert state.settle() == [], "once"
            place.write("a.jpg", b"theirs is shown")
            state.set_disk(state.heads("a.jpg")[0], Stamp.of((place.root / "a.jpg").stat()))
    assert copies[0].name.endswith("-2.jpg")


def test_what_a_killed_run_has_written_is_no_change_of_anybodys(place: Any) -> None:
    place.write("a.jpg", b"old")
    place.scan()
    step = wish(place, "a.jpg", b"new")
    place.write("a.jpg", b"new")
    assert place.scan().recorded == 0
    with State.open(place.path) as state:
        assert state.on_disk("a.jpg") == step.after and state.heads("a.jpg") == [step.after]
