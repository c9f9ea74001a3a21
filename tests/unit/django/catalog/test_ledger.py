"""The ledger: a copy that is whole, fresh, checkable, and enough to make the catalog again."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import socket
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.core.files.base import ContentFile
from django.db import InterfaceError, OperationalError, connection, transaction
from django.utils import timezone

from tribrick import catalog, ledger
from tribrick.ledger import Diverged, Ledger, LedgerDamaged, LedgerError
from tribrick.models import Change, Media, MediaFile, Node
from tribrick.testing import wait_for

Away = Callable[[], AbstractContextManager[None]]
Process = Callable[..., "subprocess.CompletedProcess[str]"]


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "ledger.sqlite"


def add(data: bytes = b"one", **options: Any) -> MediaFile:
    return catalog.add(ContentFile(data), "photos/été.txt", **options)


def some_history(user: Any = None) -> list[MediaFile]:
    """A bit of everything; returns a file alone, its logical file's versions, a deleted one."""
    alone = add(b"alone", owner=user, content_type="text/plain", original="Ä ☃.txt", node="n3")
    one = add(b"1")
    two = catalog.replace(one, ContentFile(b"2"))
    three = catalog.replace(two, ContentFile(b"3"))
    catalog.restore(one)
    catalog.delete(two)
    gone = add(b"gone")
    catalog.delete(gone)
    return [alone, one, two, three, gone]


# Following and reading


def test_follow_copies_what_is_new(path: Path) -> None:
    assert ledger.follow_once(path) == 0
    rows = some_history()
    count = Change.objects.count()
    assert ledger.follow_once(path) == count
    assert ledger.follow_once(path) == 0
    late = add()
    assert ledger.follow_once(path) == 1
    with Ledger(path) as own:
        assert own.last()[0] == count + 1
        assert [entry.number for entry in own.changes()] == list(range(1, count + 2))
        assert [entry.name for entry in own.changes(count)] == [late.name]
        known = own.get(rows[0].name)
        assert known and (known.state, known.sha256, known.size) == ("stored", rows[0].sha256, 5)
        gone = own.get(rows[4].name)
        assert gone and gone.state == "purged"
        assert own.get("photos/unknown.txt") is None
        assert {known.name: known.state for known in own.files()} == dict(
            MediaFile.objects.values_list("name", "state")
        )
        assert own.files(after=own.files()[2].name, limit=1) == [own.files()[3]]
    assert os.listdir(path.parent) == [path.name]


def test_more_than_a_batch(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "BATCH", 3)
    for _ in range(8):
        add()
    assert ledger.follow_once(path) == 8
    assert ledger.verify(path)[0] == 8


def test_as_old_as_before_until_nothing_is_missing(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A node that comes back after days: a part of what it has missed does not make its ledger young."""

    def age() -> float:
        with Ledger(path) as own:
            return own.age()

    class Killed(BaseException):
        pass

    def kill() -> None:
        ages.append(age())
        raise Killed

    ages: list[float] = []
    monkeypatch.setattr(ledger, "BATCH", 1)
    add()
    add()
    with pytest.raises(Killed):
        ledger.follow_once(path, beat=kill)
    assert ages.pop() > 10**6 and age() > 10**6, "it never knew that nothing was missing"
    ledger.follow_once(path)
    assert age() < 5
    then = time.time() - 100
    os.utime(path, (then, then))
    add()
    add()
    with pytest.raises(Killed):
        ledger.follow_once(path, beat=kill)
    assert ages.pop() > 99 and age() > 99
    ledger.follow_once(path, beat=lambda: ages.append(age()))
    assert min(ages) > 99 and age() < 5


def test_a_batch_that_was_cut_off_makes_no_ledger_young(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Killed within a COMMIT: what SQLite then rolls back touches the file as well."""
    add()
    ledger.follow_once(path)
    journal = path.with_name(f"{path.name}-journal")
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as database:
        database.execute("PRAGMA cache_size = 5")
        database.execute("BEGIN IMMEDIATE")
        values = ("added", "x", "", 0, "", "x" * 2000, "")
        for number in range(100, 200):
            database.execute("INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (number, *values))
        cut_off = path.read_bytes(), journal.read_bytes()
        database.execute("ROLLBACK")
    path.write_bytes(cut_off[0])
    journal.write_bytes(cut_off[1])
    ages: list[float] = []

    def beat() -> None:
        with Ledger(path) as own:
            ages.append(own.age())

    monkeypatch.setattr(ledger, "BATCH", 1)
    add()
    add()
    assert ledger.follow_once(path, beat=beat) == 2 and not journal.exists()
    assert min(ages) > 10**6
    assert ledger.verify(path)[0] == 3


def test_what_comes_while_it_is_copied_does_not_count_as_looked_at(path: Path) -> None:
    def slow() -> None:
        looked.append(time.time())
        time.sleep(0.3)  # the pass itself is to take time: that is what the age must count

    looked: list[float] = []
    add()
    ledger.follow_once(path, beat=slow)
    assert path.stat().st_mtime <= looked[0]


def test_a_clock_that_was_set_back_makes_no_ledger_young(path: Path) -> None:
    ledger.follow_once(path)
    ahead = time.time() + 3600
    os.utime(path, (ahead, ahead))
    with Ledger(path) as own:
        assert own.age() > 3500


def test_readable_while_the_database_is_away(path: Path, database_away: Away) -> None:
    row = add()
    ledger.follow_once(path)
    os.utime(path, (time.time() - 100,) * 2)
    with database_away():
        with pytest.raises(Exception, match="No such file"):
            ledger.follow_once(path)
        with Ledger(path) as own:
            known = own.get(row.name)
            assert known and known.state == "stored"
            assert own.age() > 99
        assert ledger.verify(path, database=False)[0] == 1
    ledger.follow_once(path)
    with Ledger(path) as own:
        assert own.age() < 5


def test_follow_goes_on_after_the_database_was_away(path: Path, database_away: Away) -> None:
    said: list[str] = []
    stop = threading.Event()
    first = add()
    options = dict(connection.settings_dict)

    def loop() -> None:
        try:
            ledger.follow(path, interval=0.02, stop=stop, said=said.append, node="node7")
        finally:
            connection.close()

    def until(condition: Callable[[], bool], what: str) -> None:
        deadline = time.monotonic() + 20
        while not condition():
            assert time.monotonic() < deadline, f"waited for {what}; it said {said}"
            time.sleep(0.01)

    def holds(name: str) -> bool:
        try:
            with Ledger(path) as own:
                return own.get(name) is not None
        except LedgerError:
            return False

    follower = threading.Thread(target=loop, daemon=True)
    follower.start()
    try:
        until(lambda: holds(first.name), "the first change")
        with connection.cursor() as cursor:
            cursor.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity WHERE pid <> pg_backend_pid()"
                " AND datname = current_database()"
            )
        second = add()
        until(lambda: holds(second.name), "the second change, after its connection was cut")
        until(lambda: Node.objects.filter(name="node7", number=2).exists(), "the node's confirmation")
    finally:
        stop.set()
        follower.join(20)
    assert not follower.is_alive()
    assert options == connection.settings_dict
    assert all(text.startswith(("the ledger cannot follow", "the ledger follows again")) for text in said)


def test_a_reader_without_write_access(path: Path) -> None:
    row = add()
    ledger.follow_once(path)
    code = (
        "import os\nfrom tribrick.ledger import Ledger\nos.setgroups([])\nos.setgid(65534)\nos.setuid(65534)\n"
        f"with Ledger({str(path)!r}) as own: print(own.get({row.name!r}).state)"
    )
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    for directory in path.parents:
        if directory.stat().st_uid == os.geteuid() and directory != Path("/"):
            directory.chmod(directory.stat().st_mode | 0o055)
    source = str(Path(ledger.__file__).parents[1])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env={"PYTHONPATH": source}, check=False
    )
    assert done.stdout.strip() == "stored", done.stderr


class Following:
    """A follower in a thread."""

    def __init__(self, path: Path) -> None:
        self.said: list[str] = []
        self._path, self._stop = path, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            ledger.follow(self._path, interval=0.02, stop=self._stop, said=self.said.append)
        finally:
            connection.close()

    def __enter__(self) -> Following:
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._stop.set()
        self._thread.join(20)
        assert not self._thread.is_alive()

    def holds(self, name: str) -> bool:
        with contextlib.suppress(LedgerError), Ledger(self._path) as own:
            return own.get(name) is not None
        return False


def test_a_silent_database_is_given_up_and_said_once(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ledger, "SILENCE", 0.4)
    tried: list[float] = []
    real = ledger.follow_once

    def counted(*arguments: Any, **options: Any) -> int:
        tried.append(time.monotonic())
        return real(*arguments, **options)

    monkeypatch.setattr(ledger, "follow_once", counted)
    first = add()
    with Following(path) as follower:
        wait_for(lambda: follower.holds(first.name), "the first change", 20)
        with transaction.atomic():
            with connection.cursor() as cursor:
                cursor.execute("LOCK TABLE tribrick_change IN ACCESS EXCLUSIVE MODE")
            wait_for(lambda: bool(follower.said), "an attempt to be given up", 20)
            before = len(tried)
            wait_for(lambda: len(tried) >= before + 3, "more attempts", 20)
            assert len(follower.said) == 1 and "cannot follow" in follower.said[0]
        second = add()
        wait_for(lambda: follower.holds(second.name), "the second change", 20)
        wait_for(lambda: follower.said[1:] == ["the ledger follows again"], "the good news", 20)


def test_other_words_are_no_other_state(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []

    def away(*_arguments: Any, **_options: Any) -> int:
        tried.append(1)
        if len(tried) > 5:
            raise Diverged("different")
        raise (OperationalError if len(tried) % 2 else InterfaceError)(f"attempt {len(tried)}")

    monkeypatch.setattr(ledger, "follow_once", away)
    with Following(path) as follower:
        wait_for(lambda: len(tried) > 8, "some attempts", 20)
    assert follower.said == ["the ledger cannot follow: attempt 1", "the ledger cannot follow: different"]


def test_a_change_is_there_within_five_seconds(path: Path) -> None:
    assert ledger.INTERVAL + ledger.SILENCE <= 5
    with Following(path) as follower:
        row = add()
        wait_for(lambda: follower.holds(row.name), "the change", 5)


@pytest.mark.parametrize("why", ["nobody there", "silent", "hangs while connecting"])
def test_sigterm_ends_it_while_the_database_is_away(path: Path, tmp_path: Path, why: str) -> None:
    here = Path(__file__).parent
    paths = os.pathsep.join([str(Path(ledger.__file__).parents[1]), str(here.parents[3] / "example"), str(here)])
    code = (
        "import django; django.setup()\nfrom django.core.management import call_command\n"
        f"call_command('tribrick', 'ledger', 'follow', '--path', {str(path)!r}, '--interval', '0.1')"
    )
    given = os.environ | {"PYTHONPATH": paths, "DJANGO_SETTINGS_MODULE": "settings"}
    if why != "silent":
        given["DATABASE_URL"] = f"postgresql://postgres@/tribrick?host={tmp_path}"
    with contextlib.ExitStack() as stack:
        hangs = stack.enter_context(socket.socket(socket.AF_UNIX))
        if why == "hangs while connecting":
            hangs.bind(str(tmp_path / ".s.PGSQL.5432"))
            hangs.listen()
        if why == "silent":
            stack.enter_context(transaction.atomic())
            cursor = stack.enter_context(connection.cursor())
            cursor.execute("LOCK TABLE tribrick_change IN ACCESS EXCLUSIVE MODE")
        follower = stack.enter_context(
            subprocess.Popen([sys.executable, "-c", code], env=given, stderr=subprocess.PIPE, text=True)
        )
        stack.callback(follower.kill)
        assert follower.stderr is not None
        assert "cannot follow" in follower.stderr.readline()
        follower.send_signal(signal.SIGTERM)
        started = time.monotonic()
        assert follower.wait(30) == 0
        assert time.monotonic() - started < 5


def test_a_reader_takes_the_journal_of_a_killed_follower_away(path: Path, process: Process) -> None:
    add()
    ledger.follow_once(path)
    done = process(
        f"""
import os, sqlite3
database = sqlite3.connect({str(path)!r}, isolation_level=None)
database.execute("PRAGMA cache_spill = ON")
database.execute("PRAGMA cache_size = 1")
database.execute("BEGIN IMMEDIATE")
database.execute("UPDATE files SET sha256 = 'half'")
for number in range(100, 300):
    database.execute("INSERT INTO changes VALUES (?, 'added', 'x', ?, 1, '', '{{}}', '')", (number, "x" * 500))
os._exit(9)"""  # noqa: S608
    )
    assert done.returncode == 9, done.stderr
    assert path.with_name("ledger.sqlite-journal").exists()
    with Ledger(path) as own:
        own.check()
        assert own.last()[0] == 1
    with Ledger(path) as own, pytest.raises(sqlite3.OperationalError, match="readonly"):
        own._db.execute("DELETE FROM files")


def test_no_ledger(path: Path) -> None:
    with pytest.raises(LedgerError, match="there is no ledger"):
        Ledger(path)


# Crashes


def test_a_killed_follower_leaves_whole_batches(path: Path, process: Process) -> None:
    for _ in range(7):
        add()
    done = process(
        f"""
import os
from tribrick import ledger
ledger.BATCH = 3
real = ledger._write
def write(database, entry, chain):
    database.execute("PRAGMA cache_size = 1")
    real(database, entry, chain)
    if entry.number == 5:
        os._exit(9)
ledger._write = write
ledger.follow_once({str(path)!r})"""
    )
    assert done.returncode == 9, done.stderr
    with Ledger(path) as own:
        assert own.last()[0] == 3
        own.check()
    assert ledger.follow_once(path) == 4
    assert ledger.verify(path)[0] == 7


def test_killed_at_any_time(path: Path) -> None:
    """Twelve followers are killed at random moments while files come and go."""
    dice = random.Random()
    here = Path(__file__).parent
    source = str(Path(ledger.__file__).parents[1])
    paths = os.pathsep.join([source, str(here.parents[3] / "example"), str(here)])
    code = f"import django; django.setup()\nfrom tribrick import ledger\nledger.follow({str(path)!r}, interval=0)"
    for _turn in range(12):
        follower = subprocess.Popen(
            [sys.executable, "-c", code], env=os.environ | {"PYTHONPATH": paths, "DJANGO_SETTINGS_MODULE": "settings"}
        )
        try:
            end = time.monotonic() + 0.4 + dice.random() * 0.4
            while time.monotonic() < end:
                catalog.delete(add())
        finally:
            follower.send_signal(signal.SIGKILL)
            follower.wait(20)
        if path.exists():
            with Ledger(path) as own:
                own.check()
    ledger.follow_once(path)
    assert ledger.verify(path) == (Change.objects.count(), Ledger(path).last()[1], 0)


@pytest.mark.parametrize("content", [b"", b"not a database at all" * 100])
def test_a_damaged_file_is_set_aside(path: Path, content: bytes, database_away: Away) -> None:
    add()
    ledger.follow_once(path, node="node7")
    path.write_bytes(content)
    with pytest.raises(LedgerDamaged):
        Ledger(path)
    with database_away(), pytest.raises(Exception, match="No such file"):
        ledger.follow_once(path)
    assert path.read_bytes() == content
    assert ledger.follow_once(path, node="node7") == 1
    assert path.with_name("ledger.sqlite.damaged").read_bytes() == content
    assert Node.objects.get().number == 1
    ledger.verify(path)


def test_two_followers(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    add()
    add()
    monkeypatch.setattr(ledger, "BATCH", 1)
    real, other = ledger._write, []

    def write(database: sqlite3.Connection, entry: ledger.Entry, chain: str) -> None:
        real(database, entry, chain)
        if not other:
            other.append(1)
            database.execute("COMMIT")
            monkeypatch.setattr(ledger, "_write", real)
            assert ledger.follow_once(path) == 1
            database.execute("BEGIN")

    monkeypatch.setattr(ledger, "_write", write)
    with pytest.raises(LedgerError, match="another follower"):
        ledger.follow_once(path)
    assert ledger.follow_once(path) == 0
    assert ledger.verify(path)[0] == 2


# Verifying


def test_verify(path: Path) -> None:
    some_history()
    ledger.follow_once(path)
    number, chain, behind = ledger.verify(path)
    assert (number, behind) == (Change.objects.count(), 0)
    add()
    assert ledger.verify(path) == (number, chain, 1)


@pytest.mark.parametrize("when", ["SELECT count(*) FROM files", "SELECT name, state, storage, sha256, size FROM files"])
def test_what_is_followed_during_a_check_is_no_damage(path: Path, when: str) -> None:
    some_history()
    ledger.follow_once(path)
    add()
    tries: list[str] = []

    def follow() -> None:
        try:
            with contextlib.closing(sqlite3.connect(path, timeout=0, isolation_level=None)) as database:
                database.execute("BEGIN IMMEDIATE")
                for entry in ledger._entries(ledger._last(database)[0]):
                    ledger._write(database, entry, entry.chain(ledger._last(database)[1]))
                database.execute("COMMIT")
            tries.append("written")
        except sqlite3.OperationalError as error:
            tries.append(str(error))

    with Ledger(path) as one:
        one._db.set_trace_callback(lambda sql: follow() if sql == when else None)
        one.check()
        one._db.set_trace_callback(None)
    assert tries == ["database is locked"], "the follower waits for the end of the check"


def test_what_is_followed_during_a_verification_is_no_difference(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    some_history()
    ledger.follow_once(path)
    real = Ledger.last

    def last(one: Ledger) -> tuple[int, str]:
        found = real(one)
        add()
        ledger.follow_once(path)
        return found

    monkeypatch.setattr(Ledger, "last", last)
    assert ledger.verify(path)[2] == 1


@pytest.mark.parametrize(
    "statement",
    [
        "UPDATE changes SET sha256 = 'x' WHERE number = 3",
        "DELETE FROM changes WHERE number = 3",
        "DELETE FROM changes WHERE number = 1",
        "UPDATE changes SET details = '{}' WHERE number = 1",
        "UPDATE files SET state = 'stored'",
        "DELETE FROM files WHERE state = 'purged'",
        "UPDATE files SET size = 7",
        "INSERT INTO files VALUES ('x', 'stored', 'default', 'x', 1)",
    ],
)
def test_verify_sees_what_was_changed_here(path: Path, statement: str) -> None:
    some_history()
    ledger.follow_once(path)
    with sqlite3.connect(path) as file:
        assert file.execute(statement).rowcount > 0
    with pytest.raises(LedgerDamaged):
        ledger.verify(path, database=False)


def test_verify_sees_a_flipped_byte(path: Path) -> None:
    some_history()
    ledger.follow_once(path)
    data = bytearray(path.read_bytes())
    with Ledger(path) as own:
        place = data.index(own.files()[0].sha256.encode())
    data[place] ^= 1
    path.write_bytes(data)
    with pytest.raises(LedgerDamaged):
        ledger.verify(path, database=False)


@pytest.mark.parametrize(
    ("statement", "says"),
    [
        ("UPDATE tribrick_change SET size = 99 WHERE number = 2", "change 2 differs"),
        ("DELETE FROM tribrick_change WHERE number = 2", "the database lacks change 2"),
        ("UPDATE tribrick_change SET number = 2 WHERE number = 4", "ledger lacks change 2"),
    ],
)
def test_verify_sees_what_was_changed_there(path: Path, statement: str, says: str) -> None:
    if "SET number" in statement:
        some_history()
        ledger.follow_once(path)
        Change.objects.filter(number=2).delete()
        path.unlink()
        ledger.follow_once(path)
        connection.cursor().execute("UPDATE tribrick_change SET number = 2 WHERE number = 4")
    else:
        some_history()
        ledger.follow_once(path)
        connection.cursor().execute(statement)
    with pytest.raises(Diverged, match=says):
        ledger.verify(path)


def test_verify_sees_changes_without_numbers(path: Path) -> None:
    ledger.follow_once(path)
    with connection.cursor() as cursor:
        cursor.execute("ALTER TABLE tribrick_change DISABLE TRIGGER tribrick_number_change")
        add()
        cursor.execute("ALTER TABLE tribrick_change ENABLE TRIGGER tribrick_number_change")
    with pytest.raises(Diverged, match=r"1 changes .* no number"):
        ledger.verify(path)


@pytest.mark.parametrize("how", ["lost", "different"])
def test_a_database_with_another_history_is_not_followed(path: Path, how: str) -> None:
    some_history()
    ledger.follow_once(path)
    last = Change.objects.order_by("number").last()
    assert last is not None
    last.delete()
    if how == "different":
        Change.objects.create(number=last.number, kind="added", name="b", sha256="", size=0)
    add()
    before = path.read_bytes()
    with pytest.raises(Diverged, match="lacks" if how == "lost" else "has another"):
        ledger.follow_once(path)
    assert path.read_bytes() == before


# Rebuilding


def picture() -> dict[str, Any]:
    """Everything the catalog knows."""
    return {
        "files": list(MediaFile.objects.order_by("name").values()),
        "media": list(Media.objects.order_by("pk").values()),
        "changes": list(
            Change.objects.order_by("number").values("number", "kind", "name", "sha256", "size", "at", "details")
        ),
    }


def forget() -> None:
    with connection.cursor() as cursor:
        cursor.execute(
            "TRUNCATE tribrick_mediafile, tribrick_media, tribrick_change, tribrick_node RESTART IDENTITY CASCADE"
        )
        cursor.execute("ALTER SEQUENCE tribrick_change_number RESTART")


def test_rebuild_a_lost_catalog(path: Path, user: Any) -> None:
    some_history(user)
    busy = add(b"busy")
    for n in range(3):
        catalog.replace(busy, ContentFile(b"%d" % n))
    catalog.delete(catalog.versions(busy)[0])
    ledger.follow_once(path)
    before = picture()
    forget()
    planned = ledger.rebuild(path)
    assert not Change.objects.exists() and not MediaFile.objects.exists()
    assert ledger.rebuild(path, apply=True) == planned
    assert (planned.changes, planned.files) == (len(before["changes"]), len(before["files"]))
    assert picture() == before
    ledger.verify(path)
    nothing = ledger.rebuild(path, apply=True)
    assert (nothing.changes, nothing.files, nothing.updated) == (0, 0, 0)
    new = catalog.replace(busy, ContentFile(b"life goes on"))  # ids and numbers go on
    assert ledger.follow_once(path) == 1
    assert new.version == 5


def test_rebuild_what_an_older_database_lacks(path: Path) -> None:
    rows = some_history()
    doomed = add(b"doomed")
    lone = add(b"lone")
    old_changes = Change.objects.count()
    old = picture()
    catalog.delete(doomed)
    catalog.replace(lone, ContentFile(b"second"))
    catalog.replace(rows[1], ContentFile(b"fourth"))
    add(b"newest")
    ledger.follow_once(path)
    new = picture()
    forget()
    Media.objects.bulk_create([Media(**{**one, "current_id": None}) for one in old["media"]])
    MediaFile.objects.bulk_create([MediaFile(**one) for one in old["files"]])
    for one in old["media"]:
        Media.objects.filter(pk=one["id"]).update(current_id=one["current_id"])
    Change.objects.bulk_create([Change(**one) for one in old["changes"]])
    assert Change.objects.count() == old_changes
    done = ledger.rebuild(path, apply=True)
    assert (done.changes, done.files) == (len(new["changes"]) - old_changes, 3)
    assert picture() == new
    assert ledger.follow_once(path) == 0


def test_rebuild_lost_rows_only(path: Path) -> None:
    rows = some_history()
    ledger.follow_once(path)
    before = picture()
    Media.objects.update(current=None)
    MediaFile.objects.filter(pk__in=[rows[0].pk, rows[1].pk]).delete()
    assert ledger.rebuild(path, apply=True).files == 2
    assert picture() == before


def test_rebuild_leaves_expired_tombstones_out(path: Path) -> None:
    row = add()
    catalog.delete(row)
    Change.objects.update(at=timezone.now() - timedelta(days=40))
    ledger.follow_once(path)
    forget()
    assert ledger.rebuild(path, apply=True).files == 0
    with pytest.raises(catalog.NameIsDead):
        catalog.record(catalog.StoredFile(row.name, row.sha256, row.size))


def test_rebuild_refuses_another_history(path: Path) -> None:
    some_history()
    ledger.follow_once(path)
    Change.objects.filter(number=2).update(size=99)
    with pytest.raises(Diverged, match="change 2"):
        ledger.rebuild(path, apply=True)
    Change.objects.filter(number=2).update(size=1)
    MediaFile.objects.filter(state="stored").order_by("pk")[0].delete()
    add()
    with pytest.raises(Diverged, match="nothing to give"):
        ledger.rebuild(path, apply=True)


def test_rebuild_with_ids_taken_and_owners_gone(path: Path, user: Any) -> None:
    rows = some_history(user)
    ledger.follow_once(path)
    forget()
    user.delete()
    MediaFile.objects.create(id=rows[0].pk, name="other", sha256="", size=0)
    ledger.rebuild(path, apply=True)
    assert MediaFile.objects.get(name="other").pk == rows[0].pk
    again = MediaFile.objects.get(name=rows[0].name)
    assert again.owner is None and again.sha256 == rows[0].sha256


def test_rebuild_refuses_a_damaged_ledger(path: Path) -> None:
    some_history()
    ledger.follow_once(path)
    with sqlite3.connect(path) as file:
        file.execute("UPDATE changes SET size = 99 WHERE number = 2")
    forget()
    with pytest.raises(LedgerDamaged):
        ledger.rebuild(path, apply=True)
    assert not Change.objects.exists()
