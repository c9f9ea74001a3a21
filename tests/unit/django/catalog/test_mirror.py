"""The mirror: real files, rsync, pg_dump and sshd; the volume is a directory with a sentinel."""

from __future__ import annotations

import contextlib
import getpass
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest
from django.conf import settings
from django.core.files.base import ContentFile
from django.db import connection, transaction
from hypothesis import given
from hypothesis import strategies as st

from tribrick import catalog, ledger, mirror
from tribrick.ledger import Entry, Known, Ledger
from tribrick.mirror import Away, Config, Mirror, MirrorError, Snapshot
from tribrick.models import Change, MediaFile
from tribrick.storage import StoredFile
from tribrick.testing import wait_for

SOURCES = Path(__file__).resolve().parents[4] / "src" / "tribrick"
START = datetime(2026, 11, 1, tzinfo=timezone.utc)
HOSTILE = [
    "-rf",
    "--delete",
    "a\nb",
    "$(x)`x`;x",
    "#comment",
    ";x",
    "*.jpg",
    "\\back",
    "été 漢字",
    " spaces ",
    "a:b/c:d",
]


def root() -> Path:
    return Path(settings.MEDIA_ROOT)


def add(data: bytes = b"one", name: str = "photos/a.txt") -> MediaFile:
    return catalog.add(ContentFile(data), name)


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def stored() -> dict[str, bytes]:
    """What the catalog says is stored, read from the volume."""
    names = MediaFile.objects.filter(state="stored").values_list("name", flat=True)
    return {name: (root() / name).read_bytes() for name in names}


@pytest.fixture(autouse=True)
def _as_it_was(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """The program within this process: it must not change how later tests are scheduled and ended."""
    monkeypatch.setattr(mirror, "step_back", lambda config: None)
    monkeypatch.setattr(mirror, "LAG", 0.0)  # nobody follows the catalog here
    before = signal.getsignal(signal.SIGTERM)
    yield
    signal.signal(signal.SIGTERM, before)


@pytest.fixture
def config(tmp_path: Path, _site: None) -> Iterator[Config]:
    """The configuration of a mirror of the test's volume."""
    place = tmp_path / "mirror"
    place.mkdir()
    before = os.umask(0o027)  # as the program has it
    yield Config(
        node="node7", source=str(root()), volume_id=settings.TRIBRICK["SENTINEL_ID"], place=str(place),
        ledger=str(tmp_path / "ledger.sqlite"), database_url=os.environ["DATABASE_URL"], reserve_mib=0, stall=20,
    )  # fmt: skip
    os.umask(before)


def changed(config: Config, **more: Any) -> Config:
    return Config(**{**vars(config), **more})


def run(config: Config, **options: Any) -> mirror.Report:
    """One run, after the node's ledger was brought up to date."""
    ledger.follow_once(config.ledger)
    return Mirror(config).run(**options)


def current(config: Config) -> dict[str, bytes]:
    return tree(Path(config.place) / "current")


def ledger_last(config: Config) -> int:
    with Ledger(config.ledger) as one:
        return one.last()[0]


def only_snapshot(config: Config) -> Path:
    [one] = Mirror(config).snapshots()
    return Path(config.place) / "snapshots" / one.name


@pytest.fixture
def instead(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Put a shell script in place of a program."""
    programs = tmp_path / "programs"
    programs.mkdir()

    def put(name: str, script: str) -> None:
        real = shutil.which(name, path=os.environ["PATH"].removeprefix(f"{programs}:"))
        (programs / name).write_text(f"#!/bin/sh\nreal={real}\n{script}\n")
        (programs / name).chmod(0o755)
        monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH'].removeprefix(f'{programs}:')}")

    return put


# Decisions


def at(hours: float, good: bool = True) -> Snapshot:
    when = START + timedelta(hours=hours)
    return Snapshot(when.strftime(mirror.STAMP), when, good)


def test_retention_keeps_hours_days_and_weeks() -> None:
    there = [at(hour) for hour in range(24 * 70)]  # ten weeks, one an hour
    gone = mirror.expired(there, hourly=24, daily=7, weekly=4)
    kept = [one for one in there if one not in gone]
    assert kept[-24:] == there[-24:], "the last 24 hours"
    days = [one for one in kept if one not in there[-24:]]
    assert {one.at.hour for one in days} == {23}, "the newest of each day or week"
    assert {mirror.bucket(at(24 * day).at, "daily") for day in range(63, 70)} <= {
        mirror.bucket(one.at, "daily") for one in kept
    }
    assert len(kept) == 24 + 6 + 2, "the last of the four weeks is the last hour's, one more is a day's"
    assert len({mirror.bucket(one.at, "weekly") for one in kept}) == 4
    assert gone == sorted(gone, key=lambda one: one.at)


def test_retention_prefers_a_good_snapshot_and_never_takes_the_last_good_one() -> None:
    bad = [at(hour, good=False) for hour in range(1, 400)]
    gone = mirror.expired([at(0), *bad], hourly=2, daily=0, weekly=0)
    assert at(0) not in gone, "the last good one, however old"
    assert [one for one in bad if one not in gone] == bad[-2:]
    there = [at(5.1), at(5.5, good=False), at(7)]
    assert mirror.expired(there, hourly=2, daily=0, weekly=0) == [at(5.5, good=False)]
    assert mirror.expired([at(5.1), at(5.5), at(6)], hourly=1, daily=0, weekly=0) == [], "none of the last hour"
    assert mirror.expired([at(0)], hourly=0, daily=0, weekly=0) == []


@given(
    st.lists(st.tuples(st.integers(0, 5000), st.booleans()), unique_by=lambda one: one[0]),
    st.integers(0, 5), st.integers(0, 5), st.integers(0, 5),
)  # fmt: skip
def test_retention_holds_for_all(listed: list[tuple[int, bool]], hourly: int, daily: int, weekly: int) -> None:
    there = [at(quarter / 4, good) for quarter, good in listed]
    keep = {"hourly": hourly, "daily": daily, "weekly": weekly}
    gone = mirror.expired(there, **keep)
    left = [one for one in there if one not in gone]
    good = [one for one in there if one.good]
    assert not good or max(good, key=lambda one: one.at) in left
    assert not there or max(there, key=lambda one: one.at) in left
    assert mirror.expired(left, **keep) == [], "a second look removes nothing more"
    assert len(left) <= hourly + daily + weekly + 5


def test_which_snapshot_a_date_means() -> None:
    there = [at(1), at(10), at(20, good=False), at(30)]
    assert mirror.pick(there) == at(30)
    assert mirror.pick(there, "2026-11-01") == at(10), "good ones only"
    assert mirror.pick(there, "2026-11-01T01:00") == at(1)
    assert mirror.pick(there, "2026-11-01T20-00-00Z") == at(20, good=False), "unless it is named"
    for date in ("2026-10-31", "yesterday"):
        with pytest.raises(MirrorError, match=date):
            mirror.pick(there, date)


def test_a_snapshot_an_hour() -> None:
    assert mirror.due(START, [])
    assert not mirror.due(START + timedelta(minutes=59), [at(0.1)])
    assert mirror.due(START + timedelta(minutes=61), [at(0.9)])


def test_what_rsync_may_say() -> None:
    assert mirror.judge_rsync(0, "") == ""
    assert mirror.judge_rsync(24, "file has vanished") == "", "files that vanished, and nothing else, are forgiven"
    for code in (1, 5, 11, 12, 20, 23, 25, 30, 35, -9):
        assert str(code) in mirror.judge_rsync(code, "a\nwhy") and "why" in mirror.judge_rsync(code, "a\nwhy")


def test_a_password_is_not_on_the_command_line() -> None:
    url, environment = mirror.libpq("postgres://site:p%40ss@h1:5432,h2:5433/media?sslmode=require")
    assert url == "postgresql://site@h1:5432,h2:5433/media?sslmode=require"
    assert environment["PGPASSWORD"] == "p@ss"
    with pytest.raises(MirrorError):
        mirror.libpq("sqlite:///x")


def test_the_newest_change_of_a_dump() -> None:
    rows = ["1\ta\t7\tx", "2\ta\t\\N\tx", "3\tb\t12\ty", "\\.", "99"]
    head = 'COPY public.tribrick_change (id, kind, "number", name) FROM stdin;'
    number, row = mirror.newest_change(["SET x;", head, *rows])
    assert number == 12 and row == {"id": "3", "kind": "b", "number": "12", "name": "y"}
    assert mirror.newest_change([head, "\\."]) == (0, {})
    with pytest.raises(MirrorError, match="migrated"):
        mirror.newest_change(["SET x;"])


@pytest.mark.parametrize(
    "name", ["", "/x", "../x", "a/../b", "a//b", "a/.", ".tribrick-volume", "a\0b", "x\udcff" * 2, "é" * 128]
)
def test_names_that_no_stored_file_has(name: str) -> None:
    expected = name == "x\udcff" * 2  # bytes that are no text can be a foreign file's
    assert mirror.allowed(name) is expected


def entry(number: int, kind: str, name: str) -> Entry:
    return Entry(number, kind, name, name * 2, number, "", '{"storage": "default"}')


@given(st.lists(st.sampled_from("abcdef"), max_size=12), st.integers(0, 12))
def test_the_state_at_a_number_follows_from_the_state_now(steps: list[str], cut: int) -> None:
    """A name is added, deleted, purged, in this order and once; both ways to look give the same."""
    kinds, entries = {}, []
    for number, name in enumerate(steps, 1):
        kind = {"": "added", "added": "deleted", "deleted": "purged"}.get(kinds.get(name, ""))
        if kind:
            kinds[name] = kind
            entries.append(entry(number, kind, name))
    states = {"added": "stored", "deleted": "deleted", "purged": "purged"}

    def table(upto: int) -> dict[str, Known]:
        found: dict[str, Known] = {}
        for one in entries:
            if one.number <= upto:
                first = next(e for e in entries if e.name == one.name)
                found[one.name] = Known(one.name, states[one.kind], "default", first.sha256, first.size)
        return found

    then = mirror.state_at(table(99).values(), [one for one in entries if one.number > cut])
    alive = {name for name, one in then.items() if one.state == "stored"}
    assert set(then) == set(table(cut))
    assert alive == {name for name, one in table(cut).items() if one.state == "stored"}
    folded, dead = mirror.fold(one for one in entries if one.number <= cut)
    assert set(folded) == alive and not dead & alive


# Runs


def test_a_run_makes_a_pair_of_files_and_database(config: Config) -> None:
    keep, gone = add(b"keep"), add(b"gone")
    catalog.delete(gone)
    young = root() / "foreign.txt"
    young.write_bytes(b"may be an upload without its row yet")
    report = run(config)
    assert (report.problems, report.volume, report.good, report.copied) == ([], [], True, 1)
    assert current(config) == {keep.name: b"keep"}
    snapshot = only_snapshot(config)
    assert tree(snapshot / "files") == {keep.name: b"keep"}
    assert (snapshot / "files" / keep.name).stat().st_ino == (Path(config.place) / "current" / keep.name).stat().st_ino
    marker = json.loads((snapshot / "marker.json").read_text())
    assert marker["number"] == Change.objects.order_by("-number").values_list("number", flat=True)[0] == report.number
    assert marker["good"] and marker["files"] == 1 and marker["bytes"] == 4
    with Ledger(config.ledger) as own:
        assert marker["chain"] == own.last()[1]
    assert mirror.verify(snapshot) == []
    assert all(not stat.S_IMODE(path.stat().st_mode) & 0o007 for path in snapshot.rglob("*")), "private files are in it"

    again = run(config)
    assert (again.copied, again.removed, again.snapshot) == (0, 0, ""), "one snapshot an hour"


def test_a_snapshot_of_nothing_is_not_the_one_to_restore(
    config: Config, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Nodes that were made new after a loss take snapshots before anybody has copied the old one there."""
    add()
    run(config)
    kept = only_snapshot(config)
    (tmp_path / "new").mkdir()
    Change.objects.all().delete()
    MediaFile.objects.all().delete()
    new = changed(config, place=str(tmp_path / "new"), ledger=str(tmp_path / "new.sqlite"))
    shutil.rmtree(root() / "photos")
    report = run(new)
    assert report.snapshot and not report.good and report.problems == []
    shutil.copytree(kept, Path(new.place) / "snapshots" / "2026-01-01T10-00-00Z", symlinks=True)
    code, said = told(capsys, new)
    assert code == 0 and said.startswith("2026-01-01T10-00-00Z")


def test_deleted_files_leave_the_mirror_and_stay_in_snapshots(config: Config) -> None:
    row = add(b"deleted later")
    run(config)
    catalog.delete(row)
    report = run(config, snapshot=False)
    assert report.removed == 1 and current(config) == {}
    assert run(config, snapshot=True).good
    first, second = Mirror(config).snapshots()
    assert tree(Path(config.place) / "snapshots" / first.name / "files") == {row.name: b"deleted later"}
    assert tree(Path(config.place) / "snapshots" / second.name / "files") == {}


def test_unchanged_files_are_not_looked_for_on_the_volume(config: Config, instead: Any, tmp_path: Path) -> None:
    for n in range(5):
        add(b"%d" % n)
    run(config)
    instead("rsync", f'echo "$@" >> {tmp_path}/calls; cat > {tmp_path}/names; exec "$real" "$@" < {tmp_path}/names')
    new = add(b"new")
    report = run(config)
    assert report.copied == 1
    assert len((tmp_path / "calls").read_text().splitlines()) == 1
    assert (tmp_path / "names").read_text() == f"./{new.name}"


def test_a_file_that_vanished_from_the_volume_stays(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "YOUNG", 0.0)
    row = add(b"lost on the volume")
    (root() / "foreign.txt").write_bytes(b"foreign")
    run(config)
    shutil.rmtree(root() / "photos")
    (root() / "foreign.txt").unlink()
    report = run(config, full=True, snapshot=True)
    assert report.volume == [f"missing on the volume: {row.name}"]
    assert report.good, "the mirror has it all"
    assert current(config) == {row.name: b"lost on the volume", "foreign.txt": b"foreign"}
    assert mirror.main(["--config", write(config), "run", "--full", "--no-snapshot"]) == 1


def write(config: Config) -> str:
    path = Path(config.place).parent / "mirror.json"
    path.write_text(json.dumps(vars(config)))
    return str(path)


@pytest.mark.parametrize("how", ["absent", "other", "nonsense"])
def test_never_from_an_absent_mount(config: Config, how: str) -> None:
    row = add(b"one")
    run(config)
    later = add(b"two")
    before = current(config)
    away = root().with_name("away")
    root().rename(away)
    root().mkdir()
    if how != "absent":
        (root() / ".tribrick-volume").write_text('{"id": "another"}' if how == "other" else "\0")
    try:
        with pytest.raises(Away):
            run(config, full=True, snapshot=True)
        assert mirror.main(["--config", write(config), "run"]) == 2
    finally:
        shutil.rmtree(root())
        away.rename(root())
    assert current(config) == before == {row.name: b"one"}
    assert len(Mirror(config).snapshots()) == 1
    assert run(config).copied == 1 and later.name in current(config)


def test_a_mount_that_goes_away_in_the_middle(config: Config, instead: Any, tmp_path: Path) -> None:
    run(config)
    add(b"two")
    # The sentinel goes with the files, just before rsync reads.
    instead("rsync", f'mv {root()} {tmp_path}/away; mkdir {root()}; exec "$real" "$@"')
    try:
        with pytest.raises(Away, match="not the media volume"):
            run(config)
    finally:
        root().rmdir()
        (tmp_path / "away").rename(root())
        instead("rsync", 'exec "$real" "$@"')
    assert run(config).copied == 1


def test_a_volume_that_hangs_does_not_hang_the_run(config: Config, instead: Any) -> None:
    add(b"two")
    instead("rsync", "sleep 1000")
    config = changed(config, stall=1.0)
    began = time.monotonic()
    with pytest.raises(Away, match="does not answer"):
        run(config)
    assert time.monotonic() - began < 10
    instead("cat", "sleep 1000")
    with pytest.raises(Away, match="does not answer"):
        run(config)
    instead("cat", 'exec "$real" "$@"')
    instead("rsync", 'exec "$real" "$@"')
    assert run(config).problems == []


def test_nobody_joins_a_process_that_hangs(config: Config) -> None:
    run(config)
    with subprocess.Popen(["sleep", "1000"]) as hangs, contextlib.ExitStack() as stack:
        stack.callback(hangs.kill)
        left = Path(config.place) / ".left"
        left.write_text(json.dumps({"pid": hangs.pid, "started": mirror._started(hangs.pid)}))
        with pytest.raises(Away, match=f"process {hangs.pid} of an earlier run still hangs"):
            run(config)
        left.write_text(json.dumps({"pid": hangs.pid, "started": "1"}))  # another process of that number
        run(config)


def test_other_bytes_on_the_volume_never_come_in(config: Config) -> None:
    fine, torn, short = add(b"fine"), add(b"torn" * 1000), add(b"short")
    (root() / torn.name).write_bytes(bytes(4000))
    (root() / short.name).write_bytes(b"")
    report = run(config)
    assert not report.good and len(report.problems) == 2
    assert current(config) == {fine.name: b"fine"}
    assert not Mirror(config).snapshots()[0].good
    (root() / torn.name).write_bytes(b"torn" * 1000)
    (root() / short.name).write_bytes(b"short")
    report = run(config, snapshot=True)
    assert report.good and current(config) == stored()
    assert [one.good for one in Mirror(config).snapshots()] == [False, True]


def test_a_file_that_is_missing_is_a_problem_until_it_is_there(config: Config) -> None:
    row = add(b"here")
    (root() / row.name).rename(root() / "aside")
    report = run(config)
    assert report.problems == [f"missing on the volume: {row.name}"] and not report.good
    assert run(config).problems == report.problems, "it is not forgotten"
    state = json.loads((Path(config.place) / "state.json").read_text())
    assert state["good"] == 0 and state["pending"] == [row.name]
    (root() / "aside").rename(root() / row.name)
    assert run(config).problems == [] and current(config) == stored()
    assert json.loads((Path(config.place) / "state.json").read_text())["pending"] == []


@pytest.mark.parametrize("code", [24, 23])
def test_a_file_deleted_while_it_is_copied_is_no_problem(
    config: Config, instead: Any, tmp_path: Path, code: int
) -> None:
    row, other = add(b"deleted"), add(b"stays")
    ledger.follow_once(config.ledger)
    (tmp_path / "go").write_text("")
    # Between the look into the ledger and the copy.
    instead("rsync", f'rm -f "{root() / row.name}"; "$real" "$@"; exit {code}')
    one = Mirror(config)
    fetch = one._fetch

    def deleting(names: Any) -> str:
        if MediaFile.objects.get(pk=row.pk).state == "stored":
            catalog.delete(MediaFile.objects.get(pk=row.pk))
            ledger.follow_once(config.ledger)
        return fetch(names)

    one._fetch = deleting  # type: ignore[method-assign]
    report = one.run(snapshot=False)
    assert report.problems == [] and current(config) == {other.name: b"stays"}


def test_a_delete_of_which_the_ledger_hears_late_is_no_problem(
    config: Config, instead: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    row, other, lost = add(b"deleted"), add(b"stays"), add(b"lost")
    ledger.follow_once(config.ledger)
    catalog.delete(MediaFile.objects.get(pk=row.pk))
    (root() / lost.name).unlink()
    monkeypatch.setattr(mirror, "LAG", 30.0)
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        ledger.follow_once(config.ledger)
        os.utime(config.ledger, (time.time() + 5, time.time() + 5))

    monkeypatch.setattr(mirror.time, "sleep", sleep)
    report = Mirror(config).run(snapshot=False)
    assert waits and report.problems == [f"missing on the volume: {lost.name}"], "the other one was deleted"
    assert current(config) == {other.name: b"stays"}


def test_deleted_after_the_dump_and_before_the_copy(config: Config) -> None:
    """The dump has a row whose bytes are gone: the marker says so, and it is no problem."""
    early = add(b"deleted right before the dump")
    run(config)
    one = Mirror(config)
    dump = one._dump
    rows: list[MediaFile] = []

    def late(target: Path) -> int:
        catalog.delete(early)
        rows.append(add(b"short-lived"))
        number = dump(target)
        catalog.delete(rows[0])
        rows.append(add(b"after the dump"))
        ledger.follow_once(config.ledger)
        return number

    one._dump = late  # type: ignore[method-assign]
    report = one.run(snapshot=True)
    assert report.good
    snapshot = Path(config.place) / "snapshots" / report.snapshot
    assert json.loads((snapshot / "marker.json").read_text())["deleted_meanwhile"] == [rows[0].name]
    assert tree(snapshot / "files") == {}, "what came after the dump is not in it"
    assert mirror.verify(snapshot) == []
    run(config)
    assert current(config) == {rows[1].name: b"after the dump"}


def test_many_that_were_deleted_after_the_dump(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "SHOWN", 1)
    one = Mirror(config)
    dump = one._dump

    def late(target: Path) -> Any:
        rows = [add(), add()]
        newest = dump(target)
        for row in rows:
            catalog.delete(row)
        ledger.follow_once(config.ledger)
        return newest

    run(config)
    one._dump = late  # type: ignore[method-assign]
    report = one.run(snapshot=True)
    assert mirror.verify(Path(config.place) / "snapshots" / report.snapshot) == []


def test_database_away(config: Config, database_away: Any) -> None:
    row = add(b"one")
    ledger.follow_once(config.ledger)
    away = changed(config, database_url="postgresql://postgres@/tribrick?host=/nowhere")
    with pytest.raises(Away, match="pg_dump"):
        Mirror(away).run()
    assert current(config) == {row.name: b"one"}, "the mirror does not need it"
    assert Mirror(config).snapshots() == []
    assert run(config).good


def told(capsys: pytest.CaptureFixture[str], config: Config, *words: str) -> tuple[int, str]:
    """Run the program; return its exit code and what it said."""
    connection.close()
    code = mirror.main(["--config", write(config), "restore-database", *words])
    said = capsys.readouterr()
    return code, said.out + said.err


def constraints() -> set[str]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT conname FROM pg_constraint WHERE connamespace = 'public'::regnamespace")
        return {name for (name,) in cursor.fetchall()}


def test_the_database_comes_back_from_a_snapshot(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    old = add(b"old")
    first = run(config)
    new = add(b"new")
    code, said = told(capsys, config)
    assert (code, said) == (0, f"{first.snapshot}, number {first.number}: to restore\n")
    assert MediaFile.objects.filter(name=new.name).exists(), "it was only said"
    code, said = told(capsys, config, "--apply", "--json", "--date", first.snapshot)
    assert code == 0 and json.loads(said) == {"applied": True, "snapshot": first.snapshot, "number": first.number}
    assert list(MediaFile.objects.values_list("name", flat=True)) == [old.name]


def test_a_dump_that_was_changed_is_not_restored(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    add(b"old")
    run(config)
    row, dump = add(b"new"), only_snapshot(config) / "database.dump"
    dump.chmod(0o640)
    dump.write_bytes(dump.read_bytes()[:-1] + b"x")
    code, said = told(capsys, config, "--apply")
    assert code == 1 and "not as it was written" in said
    assert MediaFile.objects.filter(name=row.name).exists()


def test_a_restore_that_fails_leaves_the_database_as_it_was(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    add(b"old")
    run(config)
    row = add(b"new")
    with connection.cursor() as cursor:  # something that the dump does not know stands in the way of its DROP
        cursor.execute("CREATE VIEW in_the_way AS SELECT name FROM tribrick_mediafile")
    before = constraints()
    try:
        code, said = told(capsys, config, "--apply")
        assert constraints() == before, "what was dropped before the failure is back"
        assert code == 1 and "the database is as it was" in said and "in_the_way" in said
        assert MediaFile.objects.filter(name=row.name).exists()
    finally:
        with connection.cursor() as cursor:
            cursor.execute("DROP VIEW in_the_way")


def test_the_ledger_lags(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config)
    row = add(b"not in the ledger yet")
    waits: list[float] = []

    def sleep(seconds: float) -> None:
        waits.append(seconds)
        ledger.follow_once(config.ledger)

    monkeypatch.setattr(mirror.time, "sleep", sleep)
    report = Mirror(config).run(snapshot=True)
    assert waits and report.good and current(config) == {row.name: b"not in the ledger yet"}


def test_a_ledger_that_cannot_be_read(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    add(b"one")
    run(config)
    with sqlite3.connect(config.ledger) as writer:
        writer.execute("DROP TABLE files")
    assert mirror.main(["--config", write(config), "run", "--full", "--snapshot"]) == 2
    assert "no such table" in capsys.readouterr().err
    Path(config.ledger).unlink()
    assert mirror.main(["--config", write(config), "run"]) == 2
    assert "tribrick-ledger" in capsys.readouterr().err and len(current(config)) == 1


def test_a_database_that_lost_its_last_changes_makes_no_snapshot(config: Config) -> None:
    add(b"one")
    row = add(b"two")
    run(config)
    Change.objects.filter(name=row.name).delete()
    with pytest.raises(Away, match="lost its last changes"):
        Mirror(config).run(snapshot=True)
    assert len(Mirror(config).snapshots()) == 1 and len(current(config)) == 2


def test_a_database_that_has_others_in_place_of_its_last_changes_makes_no_snapshot(config: Config) -> None:
    """As many as it lost: the numbers alone would say that dump and ledger are a pair."""
    add(b"one")
    row = add(b"two")
    run(config)
    Change.objects.filter(name=row.name).delete()
    row.delete()
    with connection.cursor() as cursor:
        cursor.execute("ALTER SEQUENCE tribrick_change_number RESTART WITH 2")
    add(b"another")
    with pytest.raises(Away, match="another change 2 than the ledger"):
        Mirror(config).run(snapshot=True)
    assert len(Mirror(config).snapshots()) == 1


def test_another_history_is_gone_through_from_the_start(config: Config) -> None:
    kept, dead = add(b"kept"), add(b"dead")
    run(config)
    state = json.loads((Path(config.place) / "state.json").read_text())
    (Path(config.place) / "state.json").write_text(json.dumps({**state, "chain": "of another ledger"}))
    (Path(config.place) / "current" / kept.name).unlink()
    catalog.delete(dead)
    report = run(config, snapshot=False)
    assert (report.copied, report.removed) == (1, 1) and current(config) == {kept.name: b"kept"}
    (Path(config.place) / "state.json").write_text("{damaged")
    assert run(config).problems == [] and current(config) == {kept.name: b"kept"}


def test_spoilt_bytes_are_mended_in_snapshots_too(config: Config) -> None:
    row, other = add(b"good bytes"), add(b"other")
    run(config)
    spoilt = Path(config.place) / "current" / row.name
    spoilt.write_bytes(b"bad bytes!")
    snapshot = only_snapshot(config)
    assert mirror.verify(snapshot) == [f"different: {row.name}"]
    assert run(config, snapshot=False).mended == 0, "a usual run does not read everything"
    report = run(config, full=True, snapshot=False)
    assert report.mended == 1 and report.problems == []
    assert current(config) == {row.name: b"good bytes", other.name: b"other"}
    assert mirror.verify(snapshot) == []


@pytest.mark.parametrize("step", ["_mend_snapshots", "_put"])
def test_killed_while_spoilt_bytes_are_mended(config: Config, monkeypatch: pytest.MonkeyPatch, step: str) -> None:
    row = add(b"good bytes")
    run(config)
    (Path(config.place) / "current" / row.name).write_bytes(b"bad bytes!")
    with monkeypatch.context() as patch:
        patch.setattr(Mirror, step, Mock(side_effect=KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            run(config, full=True, snapshot=False)
    assert run(config, full=True, snapshot=False).problems == []
    assert current(config) == {row.name: b"good bytes"} and mirror.verify(only_snapshot(config)) == []


def test_spoilt_bytes_that_the_volume_lacks_for_now_are_mended_later(config: Config) -> None:
    row = add(b"good bytes")
    run(config)
    (Path(config.place) / "current" / row.name).write_bytes(b"bad bytes!")
    (root() / row.name).rename(root() / "away")
    assert len(run(config, full=True, snapshot=False).problems) == 1
    (root() / "away").rename(root() / row.name)
    assert run(config, snapshot=False).problems == []
    assert current(config) == {row.name: b"good bytes"} and mirror.verify(only_snapshot(config)) == []


def test_an_adopted_file_leaves_what_it_was_in_the_snapshots(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "YOUNG", 0.0)
    (root() / "old").write_bytes(b"as it was")
    run(config)
    snapshot = only_snapshot(config)
    (root() / "old").write_bytes(b"as it is ")
    catalog.record(StoredFile("old", hashlib.sha256(b"as it is ").hexdigest(), 9))
    assert run(config, snapshot=False).problems == [] and current(config) == {"old": b"as it is "}
    assert mirror.verify(snapshot) == [] and tree(snapshot / "files") == {"old": b"as it was"}


def test_spoilt_foreign_files_are_mended(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "YOUNG", 0.0)
    (root() / "old").write_bytes(b"good bytes")
    run(config)
    (Path(config.place) / "current/old").write_bytes(b"bad bytes!")
    assert run(config, full=True, snapshot=False).mended == 1
    assert current(config) == {"old": b"good bytes"} and mirror.verify(only_snapshot(config)) == []
    assert run(config, full=True, snapshot=False).copied == 0


def recorded(name: str) -> None:
    (root() / name).parent.mkdir(exist_ok=True)
    (root() / name).write_bytes(name.encode())
    catalog.record(StoredFile(name, hashlib.sha256(name.encode()).hexdigest(), len(name)))


def test_a_file_and_a_directory_of_one_name(config: Config) -> None:
    recorded("a")
    recorded("b/c")
    run(config)
    for name in ("a", "b/c"):
        catalog.delete(name)
    (root() / "b").rmdir()
    recorded("a/d")
    recorded("b")
    assert run(config).problems == [] and current(config) == {"a/d": b"a/d", "b": b"b"} == stored()


def test_a_foreign_file_that_is_in_the_way_is_said(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "YOUNG", 0.0)
    (root() / "a").write_bytes(b"foreign")
    (root() / "b").mkdir()
    (root() / "b/c").write_bytes(b"foreign")
    run(config)
    (root() / "a").unlink()
    (root() / "a").mkdir()
    (root() / "a/e").write_bytes(b"foreign")
    shutil.rmtree(root() / "b")
    for name in ("a/d", "b", "z"):
        recorded(name)
    report = run(config, full=True, snapshot=True)
    assert len(report.problems) == 2 and not report.good and len(report.volume) == 1
    assert all("in its way" in one for one in [*report.problems, *report.volume])
    assert current(config) == {"a": b"foreign", "b/c": b"foreign", "z": b"z"}, "the others come"
    (Path(config.place) / "current/a").unlink()
    shutil.rmtree(Path(config.place) / "current/b")
    assert run(config).problems == [] and current(config) == {"z": b"z", **stored()}


def test_foreign_files_come_along_once_a_week(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mirror, "YOUNG", 0.0)
    (root() / "old").mkdir()
    for number, name in enumerate(HOSTILE):
        path = root() / "old" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
    (root() / "old/link").symlink_to("/etc/passwd")
    (root() / "photos").mkdir(exist_ok=True)
    (root() / f"photos/.{'a' * 20}.part").write_bytes(b"an upload in progress")
    report = run(config)
    assert report.full, "the first run"
    wanted = {f"old/{name}": b"%d" % number for number, name in enumerate(HOSTILE)}
    assert current(config) == wanted and report.foreign == len(wanted) + 1
    assert mirror.verify(only_snapshot(config)) == []
    (root() / "old/-rf").write_bytes(b"changed")
    assert not run(config).full and current(config) == wanted
    report = run(config, full=True)
    assert report.copied == 1 and current(config) == wanted | {"old/-rf": b"changed"}
    assert tree(only_snapshot(config) / "files") == wanted, "a snapshot does not change with the mirror"


def test_a_foreign_name_that_is_no_text(
    config: Config, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(mirror, "YOUNG", 0.0)
    name = os.fsdecode(b"\xe9t\xe9.jpg")
    (root() / name).write_bytes(b"of another time")
    row = add()
    report = run(config)
    assert report.problems == report.volume == [] and report.good and report.foreign == 1
    assert current(config) == {row.name: b"one", name: b"of another time"}
    assert mirror.verify(only_snapshot(config)) == []
    (only_snapshot(config) / "files" / name).unlink()
    assert mirror.main(["--config", write(config), "verify"]) == 1
    assert "missing: \\udce9t\\udce9.jpg" in capsys.readouterr().out


def test_hostile_names_of_the_catalog(config: Config) -> None:
    for number, name in enumerate(HOSTILE):
        path = root() / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"%d" % number)
        catalog.record(StoredFile(name, hashlib.sha256(b"%d" % number).hexdigest(), len(b"%d" % number)))
    report = run(config)
    assert report.problems == [] and current(config) == stored() and len(stored()) == len(HOSTILE)


def test_names_of_a_forged_ledger_stay_inside(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    row = add(b"fine")
    outside = Path(config.place) / "snapshots"
    run(config)
    known = Known("../snapshots/x", "stored", "default", hashlib.sha256(b"x").hexdigest(), 1)
    one = Mirror(config)
    with Ledger(config.ledger) as own:
        assert "../snapshots/x" in one._copy([known], own)
        one._remove({f"../current/{row.name}"}, own)
    assert not (outside / "x").exists() and current(config) == {row.name: b"fine"}


def test_full_disk_is_said_before_anything_is_copied(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    add(b"one")
    run(config)
    add(b"two")
    with pytest.raises(MirrorError, match="give it more space"):
        run(changed(config, reserve_mib=1 << 40))
    assert len(current(config)) == 1 and len(Mirror(config).snapshots()) == 1


def test_a_run_that_was_ended_is_not_a_good_one(config: Config) -> None:
    one = Mirror(config)

    def ended(_ledger: Any) -> None:
        sys.exit(2)

    one._full = ended  # type: ignore[method-assign]
    ledger.follow_once(config.ledger)
    with pytest.raises(SystemExit):
        one.run(full=True)
    assert json.loads((Path(config.place) / "state.json").read_text())["good"] == 0


def test_one_run_at_a_time(config: Config) -> None:
    with Mirror(config)._lock(), pytest.raises(Away, match=f"another run is at work \\(process {os.getpid()}\\)"):
        run(config)
    run(config)


def test_old_snapshots_expire(config: Config) -> None:
    run(config)
    there = Path(config.place) / "snapshots"
    newest = Mirror(config).snapshots()[0]
    for hours in range(1, 6):
        when = (newest.at - timedelta(hours=hours)).strftime(mirror.STAMP)
        shutil.copytree(there / newest.name, there / when)
    report = run(changed(config, hourly=2, daily=0, weekly=0))
    assert len(report.expired) == 4 and len(Mirror(config).snapshots()) == 2
    assert newest in Mirror(config).snapshots()
    (there / "2000-01-01T00-00-00Z").mkdir()  # no marker: not ours to judge
    assert run(config).expired == [] and (there / "2000-01-01T00-00-00Z").exists()


def test_a_clock_that_ran_ahead(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was done then is neither the newest snapshot for ever, nor the last look at everything for as long."""
    add(b"before")
    now, real = mirror._now(), time.time
    ahead = timedelta(days=400)
    with monkeypatch.context() as patch:
        for hours in (0, 1):
            patch.setattr(mirror, "_now", lambda hours=hours: now + ahead + timedelta(hours=hours))
            patch.setattr(time, "time", lambda: real() + ahead.total_seconds())
            run(config)
    old = [one.name for one in Mirror(config).snapshots()]
    numbers = [one.number for one in Mirror(config).snapshots()]
    state = json.loads((Path(config.place) / "state.json").read_text())
    (Path(config.place) / "state.json").write_text(json.dumps({**state, "pushed": old[-1], "restic": old[0]}))
    add(b"after")
    report = run(config)
    assert report.full
    there = Mirror(config).snapshots()
    assert mirror.pick(there).name == report.snapshot and mirror.pick(there).number == ledger_last(config)
    assert [one.number for one in there[:2]] == numbers and there[-1].at < now + timedelta(minutes=5)
    one = Mirror(config)
    one.load()
    assert one._to_push(one.state.pushed) == one._to_push(one.state.restic) == there[-1]


def test_a_snapshot_is_gone_before_its_files_are(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    run(config)
    place = only_snapshot(config)

    def killed(_path: Path) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(mirror.shutil, "rmtree", killed)
        with pytest.raises(KeyboardInterrupt):
            mirror.remove_snapshot(place.parent, place.name)
    assert Mirror(config).snapshots() == []
    assert len(list(place.parent.iterdir())) == 1
    run(config)
    assert len(list(place.parent.iterdir())) == 1, "the next run removes the rest"


def test_off_site_the_next_expire_removes_what_a_killed_one_left(config: Config) -> None:
    run(config)
    place = only_snapshot(config)
    shutil.copytree(place, place.parent / ".expired-2026-01-01T10-00-00Z")
    assert mirror.main(["expire", "--directory", str(place.parent)]) == 0
    assert len(list(place.parent.iterdir())) == 2
    assert mirror.main(["expire", "--directory", str(place.parent), "--apply"]) == 0
    assert list(place.parent.iterdir()) == [place]


@pytest.fixture
def alone(tmp_path: Path) -> list[str]:
    """The program as it lies on a node: its three files and Python."""
    there = tmp_path / "program"
    there.mkdir()
    for name in ("mirror.py", "ledger.py", "hasher.py"):
        shutil.copy(SOURCES / name, there / name)
    return [sys.executable, "-S", str(there / "mirror.py")]


def test_a_run_lets_other_work_go_first(config: Config) -> None:
    lines = [
        "import json, os, subprocess, sys", "from tribrick import mirror", "given = json.load(sys.stdin)",
        "before = os.nice(0)", "mirror.step_back(mirror.Config(**given))",
        "said = subprocess.run(['ionice', '-p', str(os.getpid())], capture_output=True, text=True).stdout.split()[0]",
        "print(os.nice(0) - before, said.rstrip(':'))",
    ]  # fmt: skip
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(lines)], input=json.dumps(vars(changed(config, nice=3))), capture_output=True,
        text=True, timeout=60, check=True, env=os.environ | {"PYTHONPATH": str(SOURCES.parent)},
    )  # fmt: skip
    assert done.stdout.split() == [str(min(3, 19 - os.nice(0))), "idle"]


def test_the_program_needs_no_django(config: Config, alone: list[str]) -> None:
    row = add(b"one")
    ledger.follow_once(config.ledger)
    environment = {"PATH": os.environ["PATH"]}
    options: dict[str, Any] = {"env": environment, "capture_output": True, "text": True, "timeout": 60, "check": False}
    done = subprocess.run([*alone, "--config", write(config), "run", "--json"], **options)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["copied"] == 1 and current(config) == {row.name: b"one"}
    done = subprocess.run([*alone, "--config", write(config), "list", "--date", "2999-01-01", "--json"], **options)
    [listed] = json.loads(done.stdout)["snapshots"]
    assert Path(listed["path"]) == only_snapshot(config) and listed["good"]
    for words in (["verify"], ["expire"], ["expire", "--directory", str(only_snapshot(config).parent), "--apply"]):
        assert subprocess.run([*alone, "--config", write(config), *words], **options).returncode == 0
    done = subprocess.run([*alone, "--config", "/nowhere", "run"], **options)
    assert done.returncode == 1 and "run site.yml" in done.stderr
    Path(write(config)).write_text('{"node": "x", "colour": "red"}')
    done = subprocess.run([*alone, "--config", str(Path(config.place).parent / "mirror.json"), "run"], **options)
    assert done.returncode == 1 and "colour" in done.stderr


@pytest.mark.sample(1)
@pytest.mark.parametrize("seed", range(4))
def test_killed_anywhere_and_run_again(config: Config, alone: list[str], seed: int) -> None:
    chance = random.Random(seed)
    rows = [add(os.urandom(20_000)) for _ in range(150)]
    ledger.follow_once(config.ledger)
    words = [*alone, "--config", write(config), "run", "--full", "--snapshot"]
    began = time.monotonic()
    assert subprocess.run(words, capture_output=True, timeout=60, check=False).returncode == 0
    whole, killed = time.monotonic() - began, 0
    for _ in range(12):
        catalog.delete(rows.pop(chance.randrange(len(rows))))
        rows.append(add(os.urandom(20_000)))
        ledger.follow_once(config.ledger)
        with subprocess.Popen(
            words, start_new_session=True,
            stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
        ) as process:  # fmt: skip
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(chance.uniform(0.1, 0.9) * whole)
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            killed += process.wait() == -signal.SIGKILL
        known = {row.name for row in rows}
        for name, data in current(config).items() if (Path(config.place) / "current").exists() else ():
            if name in known:
                assert data == (root() / name).read_bytes(), "nothing half is ever under a name"
        for one in Mirror(config).snapshots():
            assert mirror.verify(Path(config.place) / "snapshots" / one.name) == []
    assert killed > 3
    report = run(config, full=True, snapshot=True)
    assert report.problems == [] and report.good and current(config) == stored()
    assert not [path for path in (Path(config.place) / "snapshots").iterdir() if path.name.startswith(".")]


def test_what_a_run_over_many_files_costs(config: Config, alone: list[str]) -> None:
    """The figures of docs/measurements.md: ``TRIBRICK_MIRROR_FILES=100000 pytest -s -k many_files``."""
    count = int(os.environ.get("TRIBRICK_MIRROR_FILES", "2000"))
    data = os.urandom(1024)
    digest = hashlib.sha256(data).hexdigest()
    for first in range(0, count, 2000):
        rows = [
            MediaFile(name=f"photos/{n % 16:x}/{n // 16 % 16:x}/{n}.jpg", sha256=digest, size=len(data))
            for n in range(first, min(first + 2000, count))
        ]
        with transaction.atomic():
            MediaFile.objects.bulk_create(rows)
            Change.objects.bulk_create(
                [
                    Change(kind="added", name=row.name, sha256=digest, size=row.size, details={"id": row.pk})
                    for row in rows
                ]
            )
        for row in rows:
            path = root() / row.name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)
    took: dict[str, float] = {}

    def timed(what: str, *words: str) -> dict[str, Any]:
        ledger.follow_once(config.ledger)
        began = time.monotonic()
        done = subprocess.run(
            [*alone, "--config", write(changed(config, stall=300)), "run", "--json", *words],
            capture_output=True, text=True, timeout=1800, check=False,
        )  # fmt: skip
        took[what] = round(time.monotonic() - began, 1)
        assert done.returncode == 0, done.stderr
        said: dict[str, Any] = json.loads(done.stdout)
        return said

    assert timed("first run, all copied, with a snapshot", "--snapshot")["copied"] == count
    for n in range(50):
        catalog.delete(f"photos/{n % 16:x}/{n // 16 % 16:x}/{n}.jpg")
        add(os.urandom(1024))
    said = timed("100 changes, no snapshot", "--no-snapshot")
    assert (said["copied"], said["removed"]) == (50, 50)
    for n in range(50, 100):
        catalog.delete(f"photos/{n % 16:x}/{n // 16 % 16:x}/{n}.jpg")
        add(os.urandom(1024))
    said = timed("100 changes, with a snapshot", "--snapshot")
    assert (said["copied"], said["removed"], said["good"]) == (50, 50, True)
    assert timed("nothing changed, no snapshot", "--no-snapshot")["copied"] == 0
    assert timed("full pass, no snapshot", "--no-snapshot", "--full")["problems"] == []
    print(json.dumps({"files": count, "seconds": took}, indent=2))
    assert took["100 changes, no snapshot"] < 30


# Off-site


@pytest.fixture
def far(tmp_path: Path) -> Iterator[tuple[dict[str, Any], Path]]:
    """An sshd whose only key may write into one directory with rrsync; what a push needs, and the directory."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or shutil.which("rrsync") is None:
        pytest.fail("These tests need sshd and rrsync: apt-get install openssh-server rsync", pytrace=False)
    path, there = tmp_path / "sshd", tmp_path / "far"
    path.mkdir(mode=0o700)
    there.mkdir()
    for name in ("host", "user"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path / name], check=True, timeout=60)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    key = (path / "user.pub").read_text()
    (path / "authorized_keys").write_text(f'restrict,command="rrsync -wo -no-del {there}" {key}')
    (path / "known_hosts").write_text(f"[127.0.0.1]:{port} {(path / 'host.pub').read_text()}")
    (path / "config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {path}/host\nAuthorizedKeysFile {path}/authorized_keys\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nPidFile none\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with subprocess.Popen(
        [program, "-D", "-e", "-f", path / "config"], stderr=(path / "log").open("wb"), stdin=subprocess.DEVNULL
    ) as server:
        wait_for(lambda: "Server listening" in (path / "log").read_text(), "sshd listens")
        yield {
            "target": f"{getpass.getuser()}@127.0.0.1:", "port": port, "identity": str(path / "user"),
            "known_hosts": str(path / "known_hosts"),
        }, there  # fmt: skip
        server.terminate()


def test_push_over_ssh_into_one_directory(config: Config, far: tuple[dict[str, Any], Path]) -> None:
    push, there = far
    config = changed(config, push=push)
    row = add(b"one" * 1000)
    report = run(config)
    assert report.pushed == [push["target"]]
    assert mirror.verify(there / "node7" / report.snapshot) == []
    assert run(config).pushed == [], "once"
    first = report.snapshot
    catalog.delete(row)
    other = add(b"two")
    report = run(config, snapshot=True)
    second = there / "node7" / report.snapshot
    assert tree(second / "files") == {other.name: b"two"} and mirror.verify(second) == []
    third = add(b"three")
    report = run(config, snapshot=True)
    last = there / "node7" / report.snapshot
    assert (last / "files" / other.name).stat().st_ino == (second / "files" / other.name).stat().st_ino, "hard links"
    assert set(tree(last / "files")) == {other.name, third.name}
    assert mirror.verify(there / "node7" / first) == []
    # The far host keeps and removes on its own.
    for number, name in enumerate((first, second.name)):
        (there / "node7" / name).rename(there / "node7" / f"2020-01-0{number + 1}T00-00-00Z")
    keep = ["--hourly", "1", "--daily", "0", "--weekly", "0"]
    assert mirror.main(["expire", "--directory", str(there / "node7"), *keep]) == 0
    assert len(mirror.read_snapshots(there / "node7")) == 3, "it is only said"
    assert mirror.main(["expire", "--directory", str(there / "node7"), *keep, "--apply"]) == 0
    assert [one.name for one in mirror.read_snapshots(there / "node7")] == [report.snapshot]


def test_a_push_that_broke_off_is_no_snapshot_until_it_is_finished(
    config: Config, far: tuple[dict[str, Any], Path], instead: Any
) -> None:
    push, there = far
    add(b"one")
    instead("ssh", "exit 255")
    with pytest.raises(Away, match="off-site"):
        run(changed(config, push=push))
    assert len(Mirror(config).snapshots()) == 1, "the snapshot here does not depend on it"
    # The files go, the marker does not.
    instead("ssh", f'if [ -e {there}/node7 ]; then exit 255; fi; exec "$real" "$@"')
    with pytest.raises(Away, match="off-site"):
        run(changed(config, push=push))
    assert mirror.read_snapshots(there / "node7") == [] and list((there / "node7").iterdir())
    instead("ssh", 'exec "$real" "$@"')
    run(changed(config, push=push))
    [one] = mirror.read_snapshots(there / "node7")
    assert mirror.verify(there / "node7" / one.name) == []


def test_the_key_can_do_nothing_else(config: Config, far: tuple[dict[str, Any], Path]) -> None:
    push, there = far
    run(changed(config, push=push))
    ssh = [
        "ssh",
        "-oBatchMode=yes",
        f"-p{push['port']}",
        f"-i{push['identity']}",
        f"-oUserKnownHostsFile={push['known_hosts']}",
    ]
    host = push["target"].rstrip(":")
    before = tree(there)
    for command in (
        [*ssh, host, "rm -rf node7"],
        ["rsync", "-r", "-e", " ".join(ssh), f"{push['target']}node7/", str(there.parent / "stolen/")],
        [
            "rsync",
            "-r",
            "--delete",
            "-e",
            " ".join(ssh),
            f"{there.parent / 'mirror' / 'current'}/",
            f"{push['target']}node7/",
        ],
    ):
        assert subprocess.run(command, capture_output=True, timeout=30, check=False).returncode != 0
    assert tree(there) == before and not (there.parent / "stolen").exists()


def test_restic_gets_the_snapshot_and_its_password_by_the_environment(
    config: Config, instead: Any, tmp_path: Path
) -> None:
    """A script in place of restic; docs/mirror.md says what was tried with the real one."""
    instead(
        "restic", f'echo "$@" > {tmp_path}/said; echo "$RESTIC_REPOSITORY $RESTIC_PASSWORD $KEY" >> {tmp_path}/said'
    )
    config = changed(config, restic={"repository": "/far", "password": "secret", "environment": {"KEY": "k"}})
    add()
    report = run(config)
    said = (tmp_path / "said").read_text().splitlines()
    assert said[0].startswith("backup") and said[0].endswith(str(only_snapshot(config))) and "secret" not in said[0]
    assert said[1] == "/far secret k" and report.pushed == ["/far"]
    instead("restic", "echo Fatal: no repository >&2; exit 10")
    with pytest.raises(Away, match="no repository"):
        run(config, snapshot=True)


def test_one_off_site_copy_that_is_away_does_not_stop_the_other(config: Config, instead: Any) -> None:
    instead("restic", "exit 0")
    push = {"target": "nobody@127.0.0.1:", "port": 1, "identity": "/nowhere", "known_hosts": "/nowhere"}
    config = changed(config, push=push, restic={"repository": "/far", "password": "secret"})
    add()
    one = Mirror(config)
    ledger.follow_once(config.ledger)
    with pytest.raises(Away, match="off-site copy to nobody"):
        one.run()
    assert one.report.pushed == ["/far"]
