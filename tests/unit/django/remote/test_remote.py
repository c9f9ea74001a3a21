"""The storages with media hosts: what a site sees of them, beyond the matrix of faults."""

from __future__ import annotations

import contextlib
import io
import os
import pickle
import time
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files import File
from django.core.files.base import ContentFile
from django.core.files.storage import storages
from django.core.files.uploadedfile import SimpleUploadedFile, TemporaryUploadedFile
from django.db import OperationalError, transaction
from django.db.migrations.writer import MigrationWriter
from django.test import override_settings

from tribrick import catalog
from tribrick.models import MediaFile, Outbox
from tribrick.outbox import Worker
from tribrick.sentinel import HISTORY
from tribrick.storage import (
    AsyncStorage,
    DefaultTransport,
    DistributedStorage,
    HybridStorage,
    Outcome,
    ReplicationError,
    StorageUnavailable,
    hybrid,
)
from tribrick.testing import TestHttpServer

pytestmark = pytest.mark.usefixtures("database")
KINDS = ["hybrid", "async", "distributed"]
Hosts = Callable[[int], list[TestHttpServer]]


def forget_local(storage: HybridStorage, name: str) -> None:
    os.unlink(storage.path(name))


# Reading.


def test_reads_go_on_to_the_next_host(site: Any, servers: Hosts) -> None:
    """One of two hosts is down: django-resto failed in half of all reads."""
    hosts = servers(2)
    storage = site("distributed", hosts)
    name = storage.save("a.txt", ContentFile(b"x" * 1000))
    uncatalogued = "b.txt"
    for server in hosts:
        server.files[uncatalogued] = b"y"
    hosts[0].stop()
    for _ in range(20):
        storage._failed.clear()
        assert storage.open(name).read() == b"x" * 1000
        storage._failed.clear()
        assert storage.size(uncatalogued) == 1
        storage._failed.clear()
        assert storage.exists(uncatalogued)


@pytest.mark.parametrize("kind", ["hybrid", "distributed"])
@pytest.mark.parametrize("size", [1000, 3_000_000])
@pytest.mark.parametrize("fault", ["dies", "corrupt", "missing", "hangs"])
def test_a_bad_body_is_asked_of_the_next_host(kind: str, size: int, fault: str, site: Any, servers: Hosts) -> None:
    hosts = servers(2)
    storage = site(kind, hosts, TIMEOUT=2)
    data = os.urandom(size)
    name = storage.save("a.bin", ContentFile(data))
    if kind == "hybrid":
        forget_local(storage, name)
    bad = hosts[0]
    if fault == "dies":
        bad.dies_mid_body = True
    elif fault == "corrupt":
        bad.files[name] = data[:-1] + bytes([data[-1] ^ 1])
    elif fault == "missing":
        bad.delete_file(name)
    else:
        bad.slow = 30
    storage._read_order = lambda given: list(given)  # the bad one first
    with storage.open(name) as file:
        assert file.read() == data
        file.seek(10)
        assert file.read(5) == data[10:15]
    assert ("GET", f"/media/{name}", 200) in hosts[1].log
    bad.slow = 0


def test_hosts_that_failed_a_moment_ago_are_asked_last(site: Any, servers: Hosts) -> None:
    hosts = servers(2)
    storage = site("distributed", hosts)
    name = storage.save("a.txt", ContentFile(b"x"))
    hosts[0].stop()
    storage._failed[hosts[0].host] = time.monotonic()
    for _ in range(20):
        assert storage._read_order(storage.hosts)[0] == hosts[1].host
    assert storage.open(name).read() == b"x"


def test_nobody_can_say_is_not_a_no(site: Any, servers: Hosts) -> None:
    hosts = servers(2)
    storage = site("distributed", hosts)
    assert storage.exists("nothing.txt") is False
    with pytest.raises(FileNotFoundError):
        storage.open("nothing.txt")
    hosts[0].override_code = 500
    with pytest.raises(StorageUnavailable):
        storage.exists("nothing.txt")
    with pytest.raises(ReplicationError) as caught:
        storage.open("nothing.txt")
    assert set(caught.value.results) == {server.host for server in hosts}


@pytest.mark.parametrize("kind", KINDS)
def test_a_deleted_file_is_gone_even_where_its_bytes_are_left(kind: str, site: Any, servers: Hosts) -> None:
    hosts = servers(2)
    storage = site(kind, hosts)
    name = storage.save("a.txt", ContentFile(b"x"))
    Worker().work()
    hosts[1].readonly = True
    storage.delete(name)
    assert name in hosts[1].files
    assert storage.exists(name) is False
    for ask in (storage.open, storage.size):
        with pytest.raises(FileNotFoundError):
            ask(name)


def test_what_was_changed_directly_is_left_to_reconciliation(site: Any, servers: Hosts) -> None:
    hosts = servers(1)
    storage = site("hybrid", hosts)
    changed, same = (storage.save(name, ContentFile(b"x")) for name in ("a.txt", "b.txt"))
    place = Path(storage.path(changed))
    place.write_bytes(b"by SFTP")
    Path(storage.path(HISTORY)).mkdir()
    for name in (changed, same):
        storage.delete(name)
        assert storage.exists(name) is False and name not in hosts[0].files
    assert place.read_bytes() == b"by SFTP"
    assert not Path(storage.path(same)).exists()
    Path(storage.path(HISTORY)).rmdir()
    storage.delete(changed)
    assert not place.exists(), "nobody reconciles here"


@pytest.mark.parametrize("kind", KINDS)
def test_text_and_write_modes(kind: str, site: Any, servers: Hosts) -> None:
    storage = site(kind, servers(1))
    name = storage.save("a.txt", ContentFile("é\n"))
    with storage.open(name, "r") as file:
        assert file.read() == "é\n"
    for mode in ("w", "wb", "a", "r+"):
        with pytest.raises(io.UnsupportedOperation):
            storage.open(name, mode)


@pytest.mark.parametrize("name", ["../a", "a/../../b", "/etc/passwd", "a\0b", ""])
def test_names_that_lead_out_are_refused(name: str, site: Any, servers: Hosts) -> None:
    hosts = servers(1)
    storage = site("distributed", hosts)
    for ask in (storage.open, storage.exists, storage.size):
        with pytest.raises(SuspiciousFileOperation):
            ask(name)
    assert hosts[0].log == []


# Writing.


@pytest.mark.parametrize("kind", ["hybrid", "distributed"])
def test_a_save_is_one_put_to_each_host_and_nothing_else(kind: str, site: Any, servers: Hosts) -> None:
    hosts = servers(3)
    storage = site(kind, hosts)
    name = storage.save("photos/Été à Paris.JPG", ContentFile(b"x"))
    again = storage.save("photos/Été à Paris.JPG", ContentFile(b"y"))
    assert name != again
    assert name.startswith("photos/") and name.endswith(".jpg") and name.isascii()
    for server in hosts:
        assert server.log == [("PUT", f"/media/{name}", 201), ("PUT", f"/media/{again}", 201)]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("content", ["read", "upload", "temporary", "plain", "empty"])
def test_every_kind_of_content_arrives_whole(kind: str, content: str, site: Any, servers: Hosts) -> None:
    """django-resto stored an upload that had been read before as an empty file."""
    hosts = servers(1)
    storage = site(kind, hosts)
    data = os.urandom(2_500_000) if content != "empty" else b""
    if content == "temporary":
        file: Any = TemporaryUploadedFile("a.bin", "image/png", len(data), None)
        file.write(data)
    elif content == "upload":
        file = SimpleUploadedFile("a.bin", data)
    elif content == "plain":
        file = io.BytesIO(data)
    else:
        file = ContentFile(data)
    if content == "read":
        file.read()
    name = storage.save("a.bin", file)
    Worker().work()
    assert hosts[0].files == {name: data}
    row = MediaFile.objects.get()
    assert (row.size, row.storage) == (len(data), "default")


def test_one_deadline_for_the_whole_save(site: Any, servers: Hosts) -> None:
    """Each host is slow in its own way; the save ends in time all the same."""
    hosts = servers(3)
    storage = site("distributed", hosts, TIMEOUT=2)
    for server in hosts:
        server.slow = 30
    started = time.monotonic()
    with pytest.raises(ReplicationError) as caught:
        storage.save("a.txt", ContentFile(b"x"))
    assert time.monotonic() - started < 3.5
    assert all(isinstance(outcome.error, TimeoutError) for outcome in caught.value.results.values())


def test_undoing_a_save_is_part_of_its_deadline(servers: Hosts) -> None:
    """Without an outbox the hosts that hang are asked to undo it, too."""
    hosts = servers(2)
    for server in hosts:
        server.slow = 30
    started = time.monotonic()
    with pytest.raises(ReplicationError):
        DistributedStorage([server.host for server in hosts], timeout=3).save("a.txt", ContentFile(b"x"))
    assert 2.9 < time.monotonic() - started < 5.5
    assert [len(server.headers) for server in hosts] == [2, 2]


def test_a_slow_host_does_not_hold_up_a_save_that_has_its_quorum(site: Any, servers: Hosts, waiting: Any) -> None:
    hosts = servers(3)
    storage = site("distributed", hosts, TIMEOUT=20)
    hosts[1].slow = 15
    started = time.monotonic()
    storage.save("a.txt", ContentFile(b"x"))
    assert time.monotonic() - started < 5
    assert waiting() == [("put", hosts[1].host)]


def test_results_say_what_became_of_each_host(site: Any, servers: Hosts) -> None:
    hosts = servers(3)
    storage = site("distributed", hosts)
    hosts[1].override_code = 418
    hosts[2].stop()
    with pytest.raises(ReplicationError) as caught:
        storage.save("a.txt", ContentFile(b"x"))
    for error in (caught.value, pickle.loads(pickle.dumps(caught.value))):  # noqa: S301
        good, teapot, refused = (error.results[server.host] for server in hosts)
        assert good.ok and not teapot.ok and not refused.ok
        assert teapot.error.status == 418
        assert refused.error.certain
        assert "1 of 3 hosts, 2 are needed" in str(error)


def test_hosts_without_space_are_told_apart(site: Any, servers: Hosts) -> None:
    import errno

    hosts = servers(2)
    storage = site("distributed", hosts)
    for server in hosts:
        server.capacity = 0
    with pytest.raises(ReplicationError) as caught:
        storage.save("a.txt", ContentFile(b"x"))
    assert caught.value.errno == errno.ENOSPC


@pytest.mark.parametrize("kind", KINDS)
def test_a_row_that_cannot_be_written_undoes_the_save(
    kind: str, site: Any, servers: Hosts, local_files: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    hosts = servers(2)
    storage = site(kind, hosts)

    def away(*_: Any, **__: Any) -> None:
        raise OperationalError("the database went away")

    monkeypatch.setattr(catalog, "record", away)
    with pytest.raises(OperationalError):
        storage.save("a.txt", ContentFile(b"x"))
    assert [server.files for server in hosts] == [{}, {}]
    assert local_files() == []
    assert not Outbox.objects.exists()


@pytest.mark.parametrize("kind", ["hybrid", "distributed"])
def test_the_task_that_undoes_a_save_survives_the_rollback_of_its_caller(
    kind: str, site: Any, servers: Hosts, make_due: Any
) -> None:
    hosts = servers(2)
    storage = site(kind, hosts)
    hosts[1].slow = 1.2
    with pytest.raises(ReplicationError), transaction.atomic():
        storage.save("a.txt", ContentFile(b"x"))
    hosts[1].wait_idle()
    assert len(hosts[1].files) == 1, "the host stored it after all"
    assert [(row.operation, row.host) for row in Outbox.objects.all()] == [("delete", hosts[1].host)]
    hosts[1].slow = 0
    make_due()
    Worker().work()
    assert [server.files for server in hosts] == [{}, {}]


def test_the_background_work_is_part_of_the_callers_transaction(site: Any, servers: Hosts) -> None:
    hosts = servers(1)
    storage = site("async", hosts)
    with contextlib.suppress(ZeroDivisionError), transaction.atomic():
        storage.save("a.txt", ContentFile(b"x"))
        assert Outbox.objects.count() == 1
        raise ZeroDivisionError
    assert not Outbox.objects.exists()
    Worker().work()
    assert hosts[0].log == []

    name = storage.save("a.txt", ContentFile(b"x"))
    Worker().work()
    with contextlib.suppress(ZeroDivisionError), transaction.atomic():
        storage.delete(name)
        raise ZeroDivisionError
    Worker().work()
    assert storage.exists(name)
    assert hosts[0].files == {name: b"x"}


@pytest.mark.parametrize("kind", KINDS)
def test_a_rolled_back_delete_keeps_the_file(kind: str, site: Any, servers: Hosts) -> None:
    hosts = servers(2)
    storage = site(kind, hosts)
    name = storage.save("a.txt", ContentFile(b"x"))
    Worker().work()
    with contextlib.suppress(ZeroDivisionError), transaction.atomic():
        storage.delete(name)
        assert [server.files for server in hosts] == [{name: b"x"}] * 2
        raise ZeroDivisionError
    Worker().work()
    assert [server.files for server in hosts] == [{name: b"x"}] * 2
    assert storage.open(name).read() == b"x"


@pytest.mark.parametrize("kind", KINDS)
def test_the_catalog_works_on_them(kind: str, site: Any, servers: Hosts, local_files: Any) -> None:
    hosts = servers(2)
    site(kind, hosts)
    row = catalog.add(ContentFile(b"x"), "photos/a.txt", original="ä.txt")
    Worker().work()
    assert [server.files for server in hosts] == [{row.name: b"x"}] * 2
    assert MediaFile.objects.count() == 1
    catalog.delete(row)
    Worker().work()
    assert [server.files for server in hosts] == [{}] * 2
    assert local_files() == []


def test_the_names_of_local_copies_are_made_durable(
    site: Any, servers: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    synced: list[str] = []
    real = os.fsync

    def fsync(descriptor: int) -> None:
        synced.append(os.readlink(f"/proc/self/fd/{descriptor}"))
        real(descriptor)

    storage = site("hybrid", servers(1))
    monkeypatch.setattr(hybrid.os, "fsync", fsync)
    name = storage.save("photos/a.txt", ContentFile(b"x"))
    path = tmp_path / "local" / name
    wanted = [str(path), *(str(parent) for parent in path.parents)]
    assert synced == wanted[: wanted.index(str(tmp_path))]


def test_a_delete_of_a_local_copy_is_durable_before_it_counts(
    site: Any, servers: Hosts, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nobody looks for it again: after a power cut it would be served once more."""
    steps: list[str] = []
    fsync, unlink = os.fsync, os.unlink
    storage = site("hybrid", servers(1))
    name = storage.save("photos/a.txt", ContentFile(b"x"))
    directory = (tmp_path / "local" / name).parent

    def synced(descriptor: int) -> None:
        fsync(descriptor)
        if os.readlink(f"/proc/self/fd/{descriptor}") == str(directory):
            steps.append("fsync")

    def unlinked(path: Any, **options: Any) -> None:
        unlink(path, **options)
        steps.append("unlink")

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "unlink", unlinked)
    change = catalog._change

    def changed(file: MediaFile, kind: Any, *rest: Any, **options: Any) -> None:
        change(file, kind, *rest, **options)
        steps.append(str(kind.value))

    monkeypatch.setattr(catalog, "_change", changed)
    catalog.delete(name)
    assert steps == ["deleted", "unlink", "fsync", "purged"]
    steps.clear()
    storage.delete(name)  # gone from the directory already, perhaps by who was killed before the fsync
    assert steps == ["fsync"]


# Without the app, or without a name in STORAGES, there is no outbox.


def test_without_an_outbox_all_hosts_must_confirm(servers: Hosts, tmp_path: Path) -> None:
    hosts = servers(3)
    addresses = [server.host for server in hosts]
    for storage in (DistributedStorage(addresses), HybridStorage(addresses, location=tmp_path)):
        hosts[2].readonly = True
        with pytest.raises(ReplicationError):
            storage.save("a.txt", ContentFile(b"x"))
        assert [server.files for server in hosts] == [{}, {}, {}]
        hosts[2].readonly = False
        name = storage.save("a.txt", ContentFile(b"x"))
        assert [server.files for server in hosts] == [{name: b"x"}] * 3
        hosts[2].readonly = True
        with pytest.raises(ReplicationError, match="delete"):
            storage.delete(name)
        hosts[2].readonly = False
        storage.delete(name)
        assert [server.files for server in hosts] == [{}, {}, {}]
        assert not Outbox.objects.exists() and not MediaFile.objects.exists()


def test_without_an_outbox_background_work_is_refused(servers: Hosts, tmp_path: Path, local_files: Any) -> None:
    (tmp_path / "local").mkdir()
    storage = AsyncStorage([servers(1)[0].host], location=tmp_path / "local")
    with pytest.raises(ImproperlyConfigured, match="STORAGES"):
        storage.save("a.txt", ContentFile(b"x"))
    assert local_files() == []


def test_without_the_catalog_lists_and_times_are_not_made_up(servers: Hosts) -> None:
    storage = DistributedStorage([servers(1)[0].host])
    for ask in (lambda: storage.listdir(""), lambda: storage.get_created_time("a")):
        with pytest.raises(NotImplementedError, match="STORAGES"):
            ask()


# Configuration.


@pytest.mark.parametrize("kind", [HybridStorage, AsyncStorage, DistributedStorage])
@pytest.mark.parametrize("hosts", [[], "10.0.0.1", ["a", "a"]])
def test_hosts_that_would_store_nothing_are_refused(kind: Any, hosts: Any) -> None:
    with pytest.raises(ImproperlyConfigured):
        kind(hosts=hosts)
    with override_settings(TRIBRICK={"MEDIA_HOSTS": hosts}), pytest.raises(ImproperlyConfigured):
        kind()


@pytest.mark.parametrize("quorum", [0, 3, -1, "most", True, 1.5])
def test_a_quorum_that_cannot_be_is_refused(quorum: Any) -> None:
    with pytest.raises(ImproperlyConfigured, match="write_quorum"):
        DistributedStorage(["a", "b"], write_quorum=quorum)


def test_settings_are_read_when_needed() -> None:
    with override_settings(TRIBRICK={"MEDIA_HOSTS": ["a"]}, MEDIA_URL="/one/"):
        storage = DistributedStorage()
        transport: Any = storage.transport
        assert (storage.hosts, storage.quorum, transport.path) == (("a",), 1, "/one/")
        assert storage.fatal_exceptions is True and storage.show_traceback is False
    changed = {
        "MEDIA_HOSTS": ["b", "c", "d"],
        "WRITE_QUORUM": "all",
        "FATAL_EXCEPTIONS": False,
        "SHOW_TRACEBACK": True,
        "TIMEOUT": 7,
        "TRANSPORT": {"base_url": "https:///two/", "server_name": "media.example"},
    }
    with override_settings(TRIBRICK=changed, MEDIA_URL="/other/"):
        transport = storage.transport
        assert (storage.hosts, storage.quorum, transport.path) == (("b", "c", "d"), 3, "/two/")
        assert transport.scheme == "https"
        assert storage.fatal_exceptions is False and storage.show_traceback is True
        assert storage.deadline().seconds == 7
        assert storage.url("ä b.txt") == "/other/%C3%A4%20b.txt"


@pytest.mark.parametrize(
    "leftovers",
    [
        {"RESTO_MEDIA_HOSTS": ["a"], "RESTO_FATAL_EXCEPTIONS": False, "RESTO_TIMEOUT": 9},
        {"DUST_MEDIA_HOSTS": ["a"], "DUST_FATAL_EXCEPTIONS": False, "DUST_TIMEOUT": 9},
        {"DUST_HOSTS": ["a"], "DUST_FATAL_EXCEPTIONS": False, "DUST_TIMEOUT": 9},
    ],
)
def test_settings_of_the_older_packages_are_understood(leftovers: dict[str, Any]) -> None:
    with override_settings(TRIBRICK={}, **leftovers):
        storage = DistributedStorage()
        assert (storage.hosts, storage.fatal_exceptions, storage.deadline().seconds) == (("a",), False, 9)
    with override_settings(TRIBRICK={"MEDIA_HOSTS": ["b"], "FATAL_EXCEPTIONS": True, "TIMEOUT": 2.0}, **leftovers):
        assert (storage.hosts, storage.fatal_exceptions, storage.deadline().seconds) == (("b",), True, 2)


@pytest.mark.parametrize("kind", [HybridStorage, AsyncStorage, DistributedStorage])
def test_deconstructed_and_pickled(kind: Any, servers: Hosts) -> None:
    hosts = servers(1)
    storage = kind([hosts[0].host], "/m/", DefaultTransport("/files/"), write_quorum=1)
    storage.transport.exists(hosts[0].host, "a", storage.deadline())
    text, imports = MigrationWriter.serialize(storage)
    assert text == (
        f"tribrick.storage.{kind.__name__}(['{hosts[0].host}'], '/m/', "
        "tribrick.storage.DefaultTransport('/files/'), write_quorum=1)"
    )
    assert imports == {"import tribrick.storage"}
    again = pickle.loads(pickle.dumps(storage))  # noqa: S301
    assert again.url("a") == "/m/a"
    again.transport.exists(hosts[0].host, "a", again.deadline())
    assert [path for _, path, _ in hosts[0].log] == ["/files/a", "/files/a"]


@pytest.mark.parametrize("transport", [None, DefaultTransport("/media/")])
def test_an_equal_storage_shares_the_outbox(transport: Any, site: Any, servers: Hosts, waiting: Any) -> None:
    """The copy in a task queue, and the storage of a model's field that was given the same arguments."""
    hosts = servers(3)
    site("distributed", hosts, {"transport": transport})
    hosts[2].readonly = True
    copy = pickle.loads(pickle.dumps(storages["default"]))  # noqa: S301
    made = DistributedStorage(transport=DefaultTransport("/media/") if transport else None)
    for storage in (copy, made):
        assert storage.alias == "default"
        storage.save("a.txt", ContentFile(b"x"))
    assert waiting() == [("put", hosts[2].host)] * 2
    assert DistributedStorage(timeout=1).alias is None


class Memory:
    """A transport that is not HTTP at all."""

    def __init__(self, base_url: str = "") -> None:
        self.base_url = base_url
        self.files: dict[tuple[str, str], bytes] = {}

    def content(self, host: str, name: str, _deadline: Any) -> Any:
        return io.BytesIO(self.files[host, name])

    def exists(self, host: str, name: str, _deadline: Any) -> bool:
        return (host, name) in self.files

    def size(self, host: str, name: str, _deadline: Any) -> int:
        return len(self.files[host, name])

    def create(self, host: str, name: str, body: Any, _deadline: Any) -> bool:
        with body.open() as stream:
            self.files[host, name] = stream.read()
        return False

    def delete(self, host: str, name: str, _deadline: Any) -> bool:
        return self.files.pop((host, name), None) is not None


@pytest.mark.parametrize("transport", ["object", "class", "path"])
def test_the_transport_can_be_replaced(transport: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tribrick.testing.Memory", Memory, raising=False)
    given = {"object": Memory("/media/"), "class": Memory, "path": "tribrick.testing.Memory"}[transport]
    storage = DistributedStorage(["a", "b"], "/media/", given)
    name = storage.save("x.txt", ContentFile(b"x"))
    memory: Any = storage.transport
    assert memory.base_url == "/media/"
    assert memory.files == {("a", name): b"x", ("b", name): b"x"}
    assert storage.open(name).read() == b"x" and storage.size(name) == 1
    storage.delete(name)
    assert memory.files == {}


QUEUE: list[tuple[str, str, str]] = []


class QueuedStorage(HybridStorage):
    """Hands its work to a task queue."""

    def execute(self, operation: str, name: str, body: Any = None) -> dict[str, Outcome]:  # noqa: ARG002
        QUEUE.extend((operation, host, name) for host in self.hosts)
        return {host: Outcome(host, queued=True) for host in self.hosts}


class NotingStorage(HybridStorage):
    """Does something around each upload."""

    def upload(self, host: str, name: str, body: Any, deadline: Any) -> bool:
        QUEUE.append(("upload", host, name))
        return super().upload(host, name, body, deadline)


def test_the_hooks_serve_a_task_queue(servers: Hosts, tmp_path: Path) -> None:
    QUEUE.clear()
    hosts = servers(2)
    storage = QueuedStorage([server.host for server in hosts], location=tmp_path)
    name = storage.save("a.txt", ContentFile(b"x"))
    assert [server.log for server in hosts] == [[], []]
    assert [(operation, host) for operation, host, _ in QUEUE] == [("upload", server.host) for server in hosts]
    for task in QUEUE:
        storage.execute_one(*task)
    assert [server.files for server in hosts] == [{name: b"x"}] * 2
    QUEUE.clear()
    storage.delete(name)
    for task in QUEUE:
        storage.execute_one(*task)
    assert [server.files for server in hosts] == [{}] * 2


def test_the_upload_hook(servers: Hosts, tmp_path: Path) -> None:
    QUEUE.clear()
    hosts = servers(2)
    name = NotingStorage([server.host for server in hosts], location=tmp_path).save("a.txt", ContentFile(b"x"))
    assert sorted(QUEUE) == sorted(("upload", server.host, name) for server in hosts)


@pytest.mark.parametrize("shown", [False, True])
def test_failures_are_logged(shown: bool, servers: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    hosts = servers(1)
    hosts[0].readonly = True
    with pytest.raises(ReplicationError):
        DistributedStorage([hosts[0].host], show_traceback=shown).save("a.txt", ContentFile(b"x"))
    record = caplog.records[0]
    assert record.levelname == "ERROR"
    assert record.getMessage().startswith("Failed to upload ") and hosts[0].host in record.getMessage()
    assert bool(record.exc_info) is shown


# Times and lists.


def test_times_and_lists_come_from_the_catalog(site: Any, servers: Hosts) -> None:
    hosts = servers(1)
    storage = site("distributed", hosts, HASH_LEVELS=0)
    one = storage.save("photos/a.txt", ContentFile(b"x"))
    two = storage.save("b.txt", File(io.BytesIO(b"y"), "b.txt"))
    deleted = storage.save("gone/c.txt", ContentFile(b"z"))
    storage.delete(deleted)
    asked = len(hosts[0].log)
    assert storage.listdir("") == (["photos"], [two])
    assert storage.listdir("photos") == ([], [one.rpartition("/")[2]])
    assert storage.listdir("photos/") == storage.listdir("/photos")
    assert storage.listdir("phot") == ([], [])
    now = datetime.now(tz=timezone.utc)
    for ask in (storage.get_created_time, storage.get_modified_time, storage.get_accessed_time):
        assert now - timedelta(minutes=1) < ask(one) <= now
        with pytest.raises(FileNotFoundError):
            ask(deleted)
    assert len(hosts[0].log) == asked
