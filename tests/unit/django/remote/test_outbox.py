"""The outbox and its worker: order, tombstones, killed workers, late requests."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.files.base import ContentFile
from django.core.files.storage import storages
from django.db import OperationalError, connections
from django.test import override_settings
from django.utils import timezone

from tribrick import catalog, outbox
from tribrick.models import Change, MediaFile, Outbox
from tribrick.outbox import Worker
from tribrick.storage import StoredFile, TransportError
from tribrick.testing import TestHttpServer, wait_for

pytestmark = pytest.mark.usefixtures("database")
HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[3]
Hosts = Callable[[int], list[TestHttpServer]]


WORK = "from tribrick.outbox import Worker\nWorker().work()"


# Killed workers.


@pytest.mark.parametrize("operation", ["put", "delete"])
def test_a_killed_worker_loses_nothing(
    operation: str, site: Any, servers: Hosts, process: Any, make_due: Any, waiting: Any
) -> None:
    hosts = servers(1)
    storage = site("async", hosts, TIMEOUT=20)
    name = storage.save("a.txt", ContentFile(b"x"))
    if operation == "delete":
        Worker().work()
        storage.delete(name)
    seen = len(hosts[0].headers)
    hosts[0].slow = 15
    worker = process(WORK)
    wait_for(lambda: len(hosts[0].headers) > seen, "the worker's request", 30)
    worker.send_signal(signal.SIGKILL)
    worker.wait(10)
    hosts[0].stop()  # and the host forgets what it was asked
    hosts[0].slow = 0
    hosts[0].start()

    assert waiting() == [(operation, hosts[0].host)]
    assert Worker().work() == 0, "the row is not due before the attempt's deadline is over"
    make_due()
    assert Worker().work() >= 1
    make_due()
    Worker().work()
    assert hosts[0].files == ({name: b"x"} if operation == "put" else {})
    assert waiting() == []


def test_a_killed_save_was_not_acknowledged_and_leaves_no_work(
    site: Any, servers: Hosts, process: Any, waiting: Any
) -> None:
    hosts = servers(2)
    site("hybrid", hosts, TIMEOUT=20)
    hosts[1].slow = 15
    saving = process(
        "from django.core.files.base import ContentFile\n"
        "from django.core.files.storage import default_storage\n"
        "print(default_storage.save('a.txt', ContentFile(b'x')))"
    )
    wait_for(lambda: len(hosts[1].headers) == 1, "the request of the save", 30)
    saving.kill()
    assert saving.communicate()[0] == "", "nobody was told the name"
    assert not MediaFile.objects.exists()
    assert waiting() == []


def test_a_late_end_of_a_worker_that_was_given_up_is_ignored(site: Any, servers: Hosts, make_due: Any) -> None:
    hosts = servers(1)
    storage = site("async", hosts)
    name = storage.save("a.txt", ContentFile(b"x"))
    slow, quick = Worker(), Worker()
    claimed = slow.claim(hosts[0].host)
    assert claimed is not None
    make_due()
    again = quick.claim(hosts[0].host)
    assert again is not None
    slow._settle(claimed[0], last_error="too late", done=timezone.now())
    assert (Outbox.objects.get().done, Outbox.objects.get().last_error) == (None, ""), "the other one is still at it"
    make_due()
    assert quick.work() == 1
    done = Outbox.objects.get().done
    slow._settle(claimed[0], last_error="too late", done=None)
    assert (Outbox.objects.get().done, Outbox.objects.get().last_error) == (done, "")
    assert hosts[0].files == {name: b"x"}


def test_another_storage_that_cannot_be_made_does_not_stop_the_worker(site: Any, servers: Hosts, waiting: Any) -> None:
    storage = site("async", servers(1))
    storage.save("a.txt", ContentFile(b"x"))
    # It wants a STATIC_ROOT, which nothing but a web server needs.
    statics = {"BACKEND": "django.contrib.staticfiles.storage.ManifestStaticFilesStorage"}
    with override_settings(STORAGES={**settings.STORAGES, "staticfiles": statics}, STATIC_URL=None, STATIC_ROOT=None):
        vars(storages).update(backends=settings.STORAGES, _storages={})
        with pytest.raises(ImproperlyConfigured):
            _ = storages["staticfiles"]
        Worker().work()
    assert waiting() == []


def test_a_worker_that_slept_through_its_deadline_sends_nothing(site: Any, servers: Hosts) -> None:
    hosts = servers(1)
    site("async", hosts, TIMEOUT=0.05).save("a.txt", ContentFile(b"x"))
    worker = Worker()
    claimed = worker.claim(hosts[0].host)
    assert claimed is not None
    row, deadline = claimed
    wait_for(lambda: time.monotonic() > deadline.at, "the deadline")
    with pytest.raises(TransportError, match=r"not done within 0\.05 s"):
        worker._deliver(row, deadline)
    assert hosts[0].log == []


# Order and tombstones.


def test_rows_of_one_name_are_delivered_in_order(site: Any, servers: Hosts, make_due: Any) -> None:
    hosts = servers(1)
    storage = site("async", hosts)
    name = storage.save("a.txt", ContentFile(b"x"))
    held = Worker().claim(hosts[0].host)  # somebody is at it
    assert held is not None
    storage.delete(name)
    other = storage.save("b.txt", ContentFile(b"y"))
    assert Worker().work() == 1, "the DELETE waits for the PUT, the other name does not"
    assert hosts[0].log == [("PUT", f"/media/{other}", 201)]
    for _ in range(2):
        make_due()
        Worker().work()
    assert hosts[0].files == {other: b"y"}
    assert not Outbox.objects.filter(done=None).exists()


def test_a_put_is_not_sent_once_the_name_is_deleted(site: Any, servers: Hosts) -> None:
    hosts = servers(1)
    storage = site("async", hosts)
    name = storage.save("a.txt", ContentFile(b"x"))
    storage.delete(name)
    Worker().work()
    assert [method for method, _, _ in hosts[0].log] == ["DELETE"]
    assert not Outbox.objects.filter(done=None).exists(), "a PUT that was never sent cannot come late"


def test_a_put_is_not_sent_once_the_catalog_has_a_tombstone(site: Any, servers: Hosts) -> None:
    hosts = servers(1)
    name = site("async", hosts).save("a.txt", ContentFile(b"x"))
    MediaFile.objects.filter(name=name).update(state="deleted")
    Worker().work()
    assert hosts[0].log == []


def test_a_put_that_arrives_after_the_delete_does_not_bring_the_file_back(
    site: Any, servers: Hosts, make_due: Any, waiting: Any
) -> None:
    """The host is slow with the PUT and quick with the DELETE: django-resto's file came back for good."""
    hosts = servers(1)
    storage = site("async", hosts, TIMEOUT=0.4)
    hosts[0].slow = 1.5
    name = storage.save("a.txt", ContentFile(b"x"))
    Worker().work()  # gives up; the host has the whole request
    hosts[0].slow = 0
    storage.delete(name)
    make_due()
    Worker(late=60).work()
    assert hosts[0].log[0][0] == "DELETE", "the host has done the DELETE first"
    hosts[0].wait_idle()
    assert name in hosts[0].files, "the late PUT"
    assert waiting() == [("delete", hosts[0].host)]
    make_due()
    Worker().work()
    assert hosts[0].files == {}
    assert waiting() == []


def test_a_straggler_of_a_synchronous_save_does_not_bring_the_file_back(
    site: Any, servers: Hosts, make_due: Any, waiting: Any
) -> None:
    hosts = servers(3)
    storage = site("distributed", hosts, TIMEOUT=10)
    hosts[2].slow = 1.5
    name = storage.save("a.txt", ContentFile(b"x"))
    hosts[2].slow = 0
    storage.delete(name)
    hosts[2].wait_idle()
    assert name in hosts[2].files, "the late PUT"
    for _ in range(2):
        make_due()
        Worker().work()
    assert [server.files for server in hosts] == [{}, {}, {}]
    assert waiting() == []


def test_a_host_with_a_tombstone_ends_the_put(site: Any, servers: Hosts, waiting: Any) -> None:
    hosts = servers(1)
    site("async", hosts).save("a.txt", ContentFile(b"x"))
    hosts[0].override_code = 410
    Worker().work()
    assert waiting() == []
    assert "tombstone" in Outbox.objects.get().last_error


# Bytes.


def test_the_bytes_come_from_another_host_when_they_are_not_here(
    site: Any, servers: Hosts, tmp_path: Path, make_due: Any
) -> None:
    """A worker on another node than the upload's."""
    hosts = servers(2)
    storage = site("async", hosts)
    data = os.urandom(3_000_000)
    name = storage.save("a.bin", ContentFile(data))
    hosts[1].readonly = True
    Worker().work()
    hosts[1].readonly = False
    (tmp_path / "local" / name).unlink()
    make_due()
    Worker().work()
    assert [server.files for server in hosts] == [{name: data}] * 2


def test_a_torn_local_copy_is_not_spread(site: Any, servers: Hosts, tmp_path: Path, waiting: Any) -> None:
    hosts = servers(1)
    name = site("async", hosts).save("a.txt", ContentFile(b"whole"))
    (tmp_path / "local" / name).write_bytes(b"who")
    assert Worker().work() == 0
    assert hosts[0].files == {}
    assert waiting() == [("put", hosts[0].host)]
    assert "not those that were stored" in Outbox.objects.get().last_error


# Running.


def test_two_workers_share_the_work(site: Any, servers: Hosts) -> None:
    hosts = servers(2)
    storage = site("async", hosts, TIMEOUT=30)  # none is to be tried twice, however busy the machine
    names = [storage.save("a.txt", ContentFile(b"x")) for _ in range(15)]

    def work() -> None:
        Worker().work()
        connections.close_all()

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for server in hosts:
        assert sorted(server.files) == sorted(names)
        assert len(server.log) == 15, "each row was delivered once"


def test_a_host_that_hangs_holds_up_no_other(site: Any, servers: Hosts, waiting: Any) -> None:
    hosts = servers(2)
    storage = site("async", hosts, TIMEOUT=30)
    hosts[0].slow = 25
    stop = threading.Event()

    def run() -> None:
        Worker(pause=0.05).run(stop)
        connections.close_all()

    worker = threading.Thread(target=run)
    worker.start()
    try:
        names = [storage.save("a.txt", ContentFile(b"x")) for _ in range(3)]
        wait_for(lambda: len(hosts[1].files) == 3, "the healthy host's files")
        assert sorted(hosts[1].files) == sorted(names)
        assert hosts[0].files == {}
    finally:
        stop.set()
        hosts[0].stop()
        worker.join(10)
    assert not worker.is_alive()


def test_a_worker_outlives_an_outage_of_the_database(site: Any, servers: Hosts, database_away: Any) -> None:
    hosts = servers(1)
    storage = site("async", hosts)
    name = storage.save("a.txt", ContentFile(b"x"))
    stop = threading.Event()
    stumbled = threading.Event()
    worker = Worker(pause=0.05)
    real = worker._follow

    def follow(*arguments: Any) -> None:
        try:
            real(*arguments)
        except OperationalError:
            stumbled.set()
            raise

    worker._follow = follow  # type: ignore[method-assign]
    thread = threading.Thread(target=worker.run, args=(stop,))
    try:
        with database_away():
            thread.start()
            assert stumbled.wait(10)
        wait_for(lambda: hosts[0].files == {name: b"x"}, "the delivery after the outage")
    finally:
        stop.set()
        thread.join(10)
    assert not thread.is_alive()


def test_failures_are_tried_again_with_longer_pauses(site: Any, servers: Hosts, make_due: Any) -> None:
    hosts = servers(1)
    site("async", hosts).save("a.txt", ContentFile(b"x"))
    hosts[0].override_code = 500
    pauses = []
    for attempt in range(1, 7):
        make_due()
        assert Worker().work() == 0
        row = Outbox.objects.get()
        assert row.attempts == attempt
        assert "was answered with 500" in row.last_error
        pauses.append((row.not_before - timezone.now()).total_seconds())
    assert pauses[5] > pauses[0] * 8
    assert pauses[5] < 64


def test_what_waits_can_be_seen_and_given_up(site: Any, servers: Hosts) -> None:
    hosts = servers(2)
    storage = site("async", hosts)
    storage.save("a.txt", ContentFile(b"x"))
    hosts[1].override_code = 503
    Worker().work()
    assert [(lag.host, lag.waiting) for lag in outbox.lag()] == [(hosts[1].host, 1)]
    assert "503" in outbox.lag()[0].last_error
    assert outbox.lag()[0].oldest is not None
    assert outbox.forget_host(hosts[1].host) == 1
    assert outbox.lag() == []


def test_old_rows_are_removed_unless_something_of_their_name_waits(site: Any, servers: Hosts) -> None:
    hosts = servers(2)
    storage = site("async", hosts)
    hosts[1].readonly = True
    storage.save("a.txt", ContentFile(b"x"))
    Worker().work()
    Outbox.objects.exclude(done=None).update(done=timezone.now() - timedelta(days=8))
    assert outbox.remove_done() == 0
    Outbox.objects.filter(done=None).update(done=timezone.now())
    assert outbox.remove_done() == 1
    assert Outbox.objects.count() == 1


def test_a_delete_is_noted_once(database: None) -> None:
    outbox.add_delete("a", ["x", "y"])
    outbox.add_delete("a", ["y", "z"])
    assert sorted(Outbox.objects.values_list("host", flat=True)) == ["x", "y", "z"]


def test_unclean_puts(database: None) -> None:
    stored = StoredFile("a", "0" * 64, 1)
    outbox.add_put(stored, ["clean", "waiting", "failed"])
    Outbox.objects.filter(host="clean").update(done=timezone.now(), attempts=1)
    Outbox.objects.filter(host="failed").update(done=timezone.now(), attempts=2, last_error="time-out")
    assert outbox.hosts_of_unclean_puts("a") == ["failed", "waiting"]


def test_tombstones_wait_for_the_outbox(site: Any, servers: Hosts) -> None:
    """A tombstone may not expire while a host has not been told."""
    hosts = servers(1)
    storage = site("hybrid", hosts, NODES=["n"])
    name = storage.save("a.txt", ContentFile(b"x"))
    hosts[0].readonly = True
    storage.delete(name)
    catalog.confirm("n", max(number for number in Change.objects.values_list("number", flat=True) if number))
    MediaFile.objects.update(deleted=timezone.now() - timedelta(days=99))
    assert catalog.expire_tombstones() == 0
    hosts[0].readonly = False
    Outbox.objects.update(not_before=timezone.now())
    Worker().work()
    assert catalog.expire_tombstones() == 1
