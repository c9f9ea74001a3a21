"""Requests that arrive later than anybody waits for them, on hosts without tombstones of their own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.core.exceptions import SuspiciousFileOperation
from django.core.files.base import ContentFile
from django.db import connections, transaction

from tribrick import audit, catalog, outbox
from tribrick.models import MediaFile, Outbox
from tribrick.testing import wait_for

# A body of 600 bytes may take 1 + 600 / 100 seconds.
LARGE, SLOW = b"x" * 600, {"TIMEOUT": 1.0, "MINIMUM_RATE": 100}


def beside(work: Callable[[], object]) -> threading.Thread:
    """Do something in a thread with connections of its own."""

    def run() -> None:
        try:
            work()
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def under_way(host: Any) -> None:
    """Wait until a host has a request in its hands, which it carries out only after a while; the next ones at once."""
    wait_for(lambda: host._requests == 1, "the request did not come")
    time.sleep(0.3)  # from here to its wait the server has no event to ask for
    host.slow = 0.0


def work_for(seconds: float) -> None:
    """Deliver what is due, as the service does."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        outbox.Worker().work()
        time.sleep(0.1)  # the service's own pause between two passes, shorter


def test_a_put_slower_than_the_second_delete(database: None, site: Any, servers: Any) -> None:
    hosts = servers(3)
    storage = site("distributed", hosts, **SLOW)
    hosts[2].slow = 4.0
    name = storage.save("a/b.txt", ContentFile(LARGE))
    hosts[2].slow = 0
    storage.delete(name)
    work_for(3)
    wait_for(lambda: ("PUT", 201) in [(one[0], one[-1]) for one in hosts[2].log], "the PUT did not arrive", 5)
    waiting = Outbox.objects.filter(done=None, host=hosts[2].host, operation="delete")
    assert waiting.exists() or not hosts[2].has_file(name), "nobody will remove what came late"
    work_for(7)
    assert not hosts[2].has_file(name) and not waiting.exists()


def test_a_put_slower_than_the_undoing_of_its_save(
    database: None, site: Any, servers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = servers(3)
    storage = site("distributed", hosts, **SLOW)
    hosts[2].slow = 4.0
    monkeypatch.setattr(type(storage), "_record", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        storage.save("a/b.txt", ContentFile(LARGE))
    hosts[2].slow = 0
    (task,) = Outbox.objects.filter(done=None, host=hosts[2].host)
    assert (task.not_before - task.created).total_seconds() >= 6, "earlier than the PUT may end"
    work_for(8)
    assert not [host.files for host in hosts if host.files]


def test_a_put_of_the_worker_that_ends_while_the_file_is_deleted(
    database: None, site: Any, servers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (host,) = hosts = servers(1)
    storage = site("hybrid", hosts, TIMEOUT=10.0)
    name = storage.save("a/b.txt", ContentFile(b"x"))
    host.files.clear()
    audit.backfill(host.host)
    host.slow = 2.0
    worker = beside(lambda: outbox.Worker().work())
    under_way(host)
    execute = storage.execute

    def slowly(*args: Any) -> Any:
        done = execute(*args)
        worker.join()  # the PUT has arrived after the DELETE, and its row is done
        return done

    monkeypatch.setattr(storage, "execute", slowly)
    storage.delete(name)
    assert host.has_file(name), "the PUT was to arrive last"
    work_for(1)
    assert not host.has_file(name)


def test_numbers_are_not_in_the_order_of_commits(
    database: None, site: Any, servers: Any, make_due: Callable[[], None]
) -> None:
    (host,) = hosts = servers(1)
    storage = site("async", hosts, TIMEOUT=10.0)
    name = storage.save("a/b.txt", ContentFile(b"x"))
    outbox.Worker().work()
    host.files.clear()
    with transaction.atomic():
        storage.delete(name)
        beside(lambda: audit.backfill(host.host)).join()
        put, delete = Outbox.objects.filter(done=None).order_by("-id")
        assert (put.operation, delete.operation) == ("put", "delete")
        host.slow = 2.0
        worker = beside(lambda: outbox.Worker().work())
        under_way(host)
    outbox.Worker().work()
    worker.join()
    for _ in range(3):
        make_due()
        outbox.Worker().work()
    assert not host.has_file(name) and MediaFile.objects.get().state == "purged"


def test_what_a_node_holds_as_anothers_host_is_removed_by_its_own_worker(
    database: None, site: Any, servers: Any, make_due: Callable[[], None]
) -> None:
    """As the kit sets it up: a node's hosts are the other nodes."""
    _a, b, c = servers(3)
    storage = site("hybrid", [b, c], NODE="a", WRITE_QUORUM=1)
    with transaction.atomic():
        storage.save("a/b.txt", ContentFile(b"x"))
        transaction.set_rollback(True)
    make_due()
    site("hybrid", [c], NODE="b", WRITE_QUORUM=1)
    outbox.Worker().work()
    assert ("delete", "local:b") in Outbox.objects.values_list("operation", "host")


def test_an_add_on_async_is_one_transaction(
    database: None, site: Any, servers: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A process that dies between the work for the hosts and the row leaves neither."""
    hosts = servers(2)
    site("async", hosts)

    def die(*_args: Any) -> None:
        raise SystemExit

    monkeypatch.setattr(catalog, "_record", die)
    monkeypatch.setattr(catalog, "_discard", lambda *_: None)  # nothing runs after the death
    with pytest.raises(SystemExit):
        catalog.add(ContentFile(b"x"), "a/x.txt")
    outbox.Worker().work()
    assert not Outbox.objects.exists() and not [host.files for host in hosts if host.files]


@pytest.mark.parametrize("name", ["photos/", "./", "x/../photos/", "a/../b", "a//b", "./b", "..", "/b"])
def test_no_name_that_a_server_may_take_for_another(database: None, site: Any, servers: Any, name: str) -> None:
    (host,) = hosts = servers(1)
    storage = site("distributed", hosts)
    for ask in (storage.delete, storage.open, storage.exists, storage.size):
        with pytest.raises((SuspiciousFileOperation, ValueError)):
            ask(name)
    with pytest.raises(ValueError, match="not the name of a file"):
        storage.transport.target(name)
    assert host.log == []


def test_a_deleted_file_cannot_be_opened_though_its_bytes_are_here(
    database: None, site: Any, servers: Any, tmp_path: Any
) -> None:
    storage = site("hybrid", servers(1))
    name = storage.save("a/b.txt", ContentFile(b"x"))
    file = tmp_path / "local" / name
    storage.delete(name)
    file.write_bytes(b"x")  # as on a node that was away
    assert not storage.exists(name)
    for ask in (storage.open, storage.size):
        with pytest.raises(FileNotFoundError):
            ask(name)


def test_lists_and_times_are_the_catalogs(database: None, site: Any, servers: Any, tmp_path: Any) -> None:
    storage = site("hybrid", servers(1))
    name = storage.save("a/b.txt", ContentFile(b"x"))
    (tmp_path / "local" / name).unlink()  # as on a node that has missed it
    row = MediaFile.objects.get()
    assert storage.get_modified_time(name) == storage.get_created_time(name) == row.created
    directory, _, last = name.rpartition("/")
    assert storage.listdir(directory) == ([], [last])
    assert storage.open(name).read() == b"x"
