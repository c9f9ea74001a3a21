"""A process that dies before or after each step of a save, a delete and a delivery.

Afterwards the worker runs. Then every file with a row is on every host, and nothing else is anywhere.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.files.base import ContentFile
from django.db import IntegrityError, connection, connections, transaction

from tribrick import catalog, ledger, outbox
from tribrick.models import MediaFile, Operation, Outbox
from tribrick.outbox import Worker
from tribrick.storage import ReplicationError
from tribrick.testing import TestHttpServer, wait_for

pytestmark = pytest.mark.usefixtures("database")
Hosts = Callable[[int], list[TestHttpServer]]
Run = Callable[[str], tuple[int, str]]

KILL = """
import os
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.db import connection, transaction
from tribrick import catalog, outbox
from tribrick.models import MediaFile, Outbox
from tribrick.outbox import Worker
from tribrick.storage import DefaultTransport, VolumeStorage
from tribrick.storage.base_remote import RemoteStorage
def kill(place, name, after, number=1):
    real, calls = getattr(place, name), []
    def killed(*args, **options):
        calls.append(name)
        mine = len(calls) == number
        if mine and not after:
            os._exit(9)
        done = real(*args, **options)
        if mine:
            os._exit(9)
        return done
    setattr(place, name, killed)
connection.ensure_connection()
"""
SAVE_STEPS = {
    "intent": "outbox, 'add_intent'",
    "local bytes": "VolumeStorage, '_write'",
    "first host": "DefaultTransport, 'create'",
    "all hosts": "RemoteStorage, 'execute'",
    "row": "MediaFile, 'save'",
    "change": "catalog, '_change'",
    "commit": "connection, '_commit'",
}
WAYS = {
    "save": "default_storage.save('a.txt', ContentFile(b'new'))",
    "add": "catalog.add(ContentFile(b'new'), 'a.txt')",
    "inside": "with transaction.atomic():\n    default_storage.save('a.txt', ContentFile(b'new'))",
}


def died(ended: tuple[int, str]) -> None:
    code, said = ended
    assert code == 9, said


def settle(make_due: Any) -> None:
    for _ in range(3):
        make_due()
        catalog.finish_deletes()
        Worker().work()
    assert not Outbox.objects.filter(done=None).exists()


def agree(hosts: list[TestHttpServer], local: list[str], kind: str, expected: dict[str, bytes]) -> None:
    for server in hosts:
        server.wait_idle()
        assert server.files == expected
    assert local == (sorted(expected) if kind != "distributed" else [])
    assert set(MediaFile.objects.filter(state="stored").values_list("name", flat=True)) == set(expected)


def save_cases() -> list[Any]:
    cases = []
    for kind in ("hybrid", "distributed"):
        for step in SAVE_STEPS:
            if step == "local bytes" and kind == "distributed":
                continue
            ways = WAYS if step in ("all hosts", "commit") else ["save"]
            cases += [(kind, step, way, after) for way in ways for after in (False, True)]
    return cases


@pytest.mark.sample(12)
@pytest.mark.parametrize(("kind", "step", "way", "after"), save_cases())
def test_killed_in_a_save(
    kind: str, step: str, way: str, after: bool, site: Any, servers: Hosts, forked: Run, make_due: Any,
    local_files: Any,
) -> None:  # fmt: skip
    hosts = servers(2)
    storage = site(kind, hosts, TIMEOUT=5)
    old = storage.save("old.txt", ContentFile(b"old"))
    number = 2 if (step, way) == ("commit", "add") else 1  # the first one is that of the tasks for hosts
    died(forked(f"{KILL}kill({SAVE_STEPS[step]}, {after}, {number})\n{WAYS[way]}\nos._exit(1)"))
    rows = {row.name: b"old" if row.name == old else b"new" for row in MediaFile.objects.all()}
    assert len(rows) == (2 if step == "commit" and after else 1)
    for server in hosts:
        server.wait_idle()
    if step in ("row", "change") or (step == "all hosts" and after):
        assert all(len(server.files) == 2 for server in hosts), "there are bytes without a row"
        assert Worker().work() == 0, "a save has its time"
        assert all(len(server.files) == 2 for server in hosts)
    settle(make_due)
    agree(hosts, local_files(), kind, rows)
    if step == "first host":  # a tombstone stands for what was found
        assert MediaFile.objects.exclude(state="stored").get().state == "purged"


@pytest.mark.parametrize("way", ["save", "add"])
@pytest.mark.parametrize("kind", ["hybrid", "distributed"])
def test_rolled_back_after_a_good_save(
    kind: str, way: str, site: Any, servers: Hosts, make_due: Any, local_files: Any
) -> None:
    hosts = servers(3)
    storage = site(kind, hosts)
    kept = storage.save("a.txt", ContentFile(b"kept"))
    hosts[2].readonly = True
    with transaction.atomic():
        if way == "save":
            storage.save("b.txt", ContentFile(b"x"))
        else:
            catalog.add(ContentFile(b"x"), "b.txt")
        transaction.set_rollback(True)
    hosts[2].readonly = False
    assert [len(server.files) for server in hosts] == [2, 2, 1]
    settle(make_due)
    agree(hosts, local_files(), kind, {kept: b"kept"})


DELETE_STEPS = {
    "change": "catalog, '_change'",
    "commit": "connection, '_commit'",
    "local bytes": "VolumeStorage, '_unlink'",
    "first host": "DefaultTransport, 'delete'",
    "all hosts": "RemoteStorage, 'execute'",
    "purge": "catalog, 'purge'",
}


@pytest.mark.sample(8)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", DELETE_STEPS)
@pytest.mark.parametrize("kind", ["hybrid", "async", "distributed"])
def test_killed_in_a_delete(
    kind: str, step: str, after: bool, site: Any, servers: Hosts, forked: Run, make_due: Any, local_files: Any
) -> None:
    if (kind, step) in {("distributed", "local bytes"), ("async", "first host"), ("async", "all hosts")}:
        return  # it has no such step
    hosts = servers(2)
    storage = site(kind, hosts, TIMEOUT=5)
    name = storage.save("a.txt", ContentFile(b"x"))
    other = storage.save("b.txt", ContentFile(b"y"))
    Worker().work()
    died(forked(f"{KILL}kill({DELETE_STEPS[step]}, {after})\ndefault_storage.delete({name!r})\nos._exit(1)"))
    gone = step not in ("change", "commit") or (step == "commit" and after)
    assert (MediaFile.objects.get(name=name).state != "stored") == gone
    settle(make_due)
    agree(hosts, local_files(), kind, {other: b"y"} if gone else {name: b"x", other: b"y"})


WORK_STEPS = {
    "claim": "Worker, 'claim'",
    "request": "DefaultTransport, {operation!r}",
    "end": "Worker, '_settle'",
}


@pytest.mark.sample(4)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", WORK_STEPS)
@pytest.mark.parametrize("operation", ["create", "delete"])
def test_killed_in_a_delivery(
    operation: str, step: str, after: bool, site: Any, servers: Hosts, forked: Run, make_due: Any, local_files: Any
) -> None:
    hosts = servers(2)
    storage = site("async", hosts, TIMEOUT=5)
    name = storage.save("a.txt", ContentFile(b"x"))
    if operation == "delete":
        Worker().work()
        storage.delete(name)
    place = WORK_STEPS[step].format(operation=operation)
    died(forked(f"{KILL}kill({place}, {after})\nWorker().work()\nos._exit(1)"))
    settle(make_due)
    agree(hosts, local_files(), "async", {name: b"x"} if operation == "create" else {})


ABANDON_STEPS = {
    "tombstone": "MediaFile, 'save'",
    "tasks": "outbox, 'add_delete'",
    "commit": "connection, '_commit'",
    "bytes": "DefaultTransport, 'delete'",
}


@pytest.mark.sample(3)
@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", ABANDON_STEPS)
def test_killed_in_giving_up_a_save(
    step: str, after: bool, site: Any, servers: Hosts, forked: Run, make_due: Any, local_files: Any
) -> None:
    hosts = servers(2)
    storage = site("hybrid", hosts, TIMEOUT=5)
    with transaction.atomic():
        storage.save("a.txt", ContentFile(b"x"))
        transaction.set_rollback(True)
    make_due()
    died(forked(f"{KILL}kill({ABANDON_STEPS[step]}, {after})\nWorker().work()\nos._exit(1)"))
    settle(make_due)
    agree(hosts, local_files(), "hybrid", {})


# Who is first.


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
@pytest.mark.parametrize("kind", ["hybrid", "distributed"])
def test_a_row_that_is_not_committed_yet_is_waited_for(
    kind: str, isolation: str, site: Any, servers: Hosts, make_due: Any, local_files: Any
) -> None:
    hosts = servers(2)
    storage = site(kind, hosts)
    with transaction.atomic():
        with connection.cursor() as cursor:
            cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}")
            cursor.execute("SELECT count(*) FROM tribrick_outbox")  # from here on an old snapshot
        name = storage.save("a.txt", ContentFile(b"x"))
        elsewhere(make_due)
        elsewhere(Worker().work)
        assert all(list(server.files) == [name] for server in hosts)
    settle(make_due)
    agree(hosts, local_files(), kind, {name: b"x"})


@pytest.mark.parametrize("isolation", ["READ COMMITTED", "REPEATABLE READ", "SERIALIZABLE"])
def test_a_save_that_comes_after_its_tombstone_fails(
    isolation: str, site: Any, servers: Hosts, make_due: Any, local_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = servers(2)
    storage = site("hybrid", hosts)
    real = storage.execute

    def slept(operation: str, *arguments: Any) -> Any:
        done = real(operation, *arguments)
        if operation == "upload":  # for hours
            elsewhere(make_due)
            elsewhere(Worker().work)
        return done

    monkeypatch.setattr(storage, "execute", slept)

    @transaction.atomic
    def save() -> None:
        with connection.cursor() as cursor:
            cursor.execute(f"SET TRANSACTION ISOLATION LEVEL {isolation}")
            cursor.execute("SELECT count(*) FROM tribrick_outbox")
        storage.save("a.txt", ContentFile(b"x"))

    with pytest.raises(IntegrityError):
        save()
    settle(make_due)
    agree(hosts, local_files(), "hybrid", {})


def elsewhere(work: Callable[[], Any]) -> None:
    """Do it with another connection."""

    def run() -> None:
        try:
            work()
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()


def test_a_failed_save_takes_its_intent_back(site: Any, servers: Hosts) -> None:
    hosts = servers(1)
    storage = site("hybrid", hosts)
    hosts[0].readonly = True
    with pytest.raises(ReplicationError):
        storage.save("a.txt", ContentFile(b"x"))
    assert not Outbox.objects.exists() and not MediaFile.objects.exists()


def test_no_byte_leaves_without_an_intent(site: Any, servers: Hosts, local_files: Any, database_away: Any) -> None:
    hosts = servers(1)
    storage = site("hybrid", hosts)
    with database_away(), pytest.raises(Exception, match="connection"):
        storage.save("a.txt", ContentFile(b"x"))
    assert not hosts[0].log and not local_files()


def test_another_node_leaves_the_local_bytes_to_their_own(
    site: Any, servers: Hosts, make_due: Any, local_files: Any, tmp_path: Path
) -> None:
    hosts = servers(1)
    storage = site("hybrid", hosts, NODE="here")
    with transaction.atomic():
        name = storage.save("a.txt", ContentFile(b"x"))
        transaction.set_rollback(True)
    (tmp_path / "there").mkdir()
    site("hybrid", hosts, {"location": str(tmp_path / "there")}, NODE="there")
    make_due()
    Worker().work()
    assert hosts[0].files == {} and local_files() == [name]
    assert [row.host for row in Outbox.objects.filter(done=None)] == ["local:here"]
    site("hybrid", hosts, {"location": str(tmp_path / "local")}, NODE="here")
    Worker().work()
    assert local_files() == []
    assert not Outbox.objects.filter(done=None).exists()


def test_what_the_ledger_knows_is_not_removed(
    site: Any, servers: Hosts, make_due: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    hosts = servers(1)
    storage = site("distributed", hosts, LEDGER=str(tmp_path / "ledger.sqlite"))
    name = storage.save("a.txt", ContentFile(b"x"))
    ledger.follow_once(tmp_path / "ledger.sqlite")
    with connection.cursor() as cursor:  # a database restored from a moment within the save
        cursor.execute("TRUNCATE tribrick_mediafile, tribrick_media, tribrick_change CASCADE")
    make_due()
    Worker().work()
    assert hosts[0].files == {name: b"x"} and "the ledger knows" in caplog.text
    assert Outbox.objects.get(operation=Operation.INTENT).name == name


def test_intents_are_no_lag_and_cannot_be_given_up_with_a_host(site: Any, servers: Hosts) -> None:
    hosts = servers(1)
    site("hybrid", hosts).save("a.txt", ContentFile(b"x"))
    assert Outbox.objects.get().operation == Operation.INTENT
    assert outbox.lag() == []
    assert outbox.forget_host(outbox.local_host()) == 0
    assert outbox.settle_intents() == 0 and Outbox.objects.exists(), "it is not due"


def backends() -> set[int]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT pg_stat_clear_snapshot()")
        cursor.execute("SELECT pid FROM pg_stat_activity WHERE datname = current_database()")
        return {pid for (pid,) in cursor.fetchall()}


@pytest.fixture
def alone() -> None:
    """No connection is left of an earlier test."""
    outbox._thread.write(connections.close_all)


def intend(name: str) -> None:
    outbox.add_intent(name, storage="default", seconds=1)


def test_intents_inside_transactions_share_a_connection(alone: None, site: Any, servers: Hosts) -> None:
    site("hybrid", servers(1))
    before = backends()
    with transaction.atomic():
        intend("a")
        (first,) = backends() - before
        intend("b")
        assert backends() - before == {first}
        with connection.cursor() as cursor:  # a stale one is replaced
            cursor.execute("SELECT pg_terminate_backend(%s, 10000)", [first])
        intend("c")
        (second,) = backends() - before
        assert second != first
        transaction.set_rollback(True)
    assert Outbox.objects.count() == 3
    wait_for(lambda: backends() <= before, "the connection to be closed for want of work")
    with transaction.atomic():
        intend("d")
    with transaction.atomic(), pytest.raises(ZeroDivisionError):
        outbox._apart(lambda: 1 // 0)
    assert Outbox.objects.count() == 4


def test_intents_of_many_threads(alone: None, site: Any, servers: Hosts) -> None:
    site("hybrid", servers(1))
    before = backends()
    started, seen = threading.Barrier(8), []

    def save(number: int) -> None:
        try:
            with transaction.atomic():
                started.wait(20)
                intend(str(number))
                started.wait(20)
                seen.append(backends())
                started.wait(20)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=save, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert Outbox.objects.count() == 8
    assert max(len(pids - before) for pids in seen) == 9, "one for all of them, besides their own"


def test_a_fork_has_a_connection_of_its_own(alone: None, site: Any, servers: Hosts, forked: Run) -> None:
    site("hybrid", servers(1))
    code = """
import os, signal
from django.db import connection, transaction
from tribrick import outbox
def intend(name):
    with transaction.atomic():
        outbox.add_intent(name, storage="default", seconds=1)
intend("parent")
connection.close()
pid = os.fork()
if pid == 0:
    signal.alarm(20)
    intend("child")
    os._exit(9)
os._exit(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))
"""
    died(forked(code))
    assert set(Outbox.objects.values_list("name", flat=True)) == {"parent", "child"}


# The storage of a row.


def test_rows_know_their_storage(site: Any, servers: Hosts, make_due: Any, waiting: Any) -> None:
    from django.conf import settings
    from django.core.files.storage import storages
    from django.test import override_settings

    hosts = servers(1)
    site("distributed", hosts)
    second = {"BACKEND": "tribrick.storage.DistributedStorage", "OPTIONS": {"base_url": "/second/"}}
    hosts[0].path = "/"
    with override_settings(STORAGES={**settings.STORAGES, "second": second}):
        vars(storages).update(backends=settings.STORAGES, _storages={})
        for alias, path in (("default", settings.MEDIA_URL), ("second", "/second/")):
            name = storages[alias].save("a.txt", ContentFile(b"x"))
            prefix = path.lstrip("/")
            assert f"{prefix}{name}" in hosts[0].files
            hosts[0].readonly = True
            storages[alias].delete(name)
            hosts[0].readonly = False
            assert Outbox.objects.get(operation="delete", done=None).storage == alias
            MediaFile.objects.all().delete()  # the row says it, not the catalog
            make_due()
            Worker().work()
            assert hosts[0].files == {} and waiting() == []
    vars(storages).update(backends=settings.STORAGES, _storages={})


def test_rows_of_older_releases_are_delivered(site: Any, servers: Hosts, waiting: Any) -> None:
    hosts = servers(1)
    storage = site("async", hosts)
    name = storage.save("a.txt", ContentFile(b"x"))
    Outbox.objects.update(storage="")
    assert Worker().work() == 1
    assert hosts[0].files == {name: b"x"} and waiting() == []


def test_a_row_of_a_storage_that_is_gone_waits(site: Any, servers: Hosts, waiting: Any) -> None:
    hosts = servers(1)
    site("async", hosts).save("a.txt", ContentFile(b"x"))
    Outbox.objects.update(storage="gone")
    Worker().work()
    assert waiting() == [("put", hosts[0].host)]
    assert "the storage gone has no host" in Outbox.objects.get().last_error
