"""A save while the volume refuses: what is spooled and what is not, on how many nodes, and who can read it."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import sqlite3
import threading
import time
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.checks import run_checks
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import IntegrityError, connection, transaction
from django.test import Client, override_settings
from django.utils import timezone

from tribrick import catalog, names, receiver
from tribrick.ledger import _SCHEMA
from tribrick.models import Change, MediaFile
from tribrick.receiver import Receiver
from tribrick.storage import DerivedStorage, StorageFull, StorageUnavailable, VolumeStorage, hybrid, mount, saving
from tribrick.storage.spool import SpoolStorage
from tribrick.storage.transport import Deadline, DefaultTransport
from tribrick.testing import wait_for

pytestmark = pytest.mark.usefixtures("cluster")
DATA = b"picture" * 1000


def save(data: bytes = DATA) -> str:
    return str(default_storage.save("photos/a.jpg", ContentFile(data)))


def read(name: str) -> bytes:
    with default_storage.open(name) as file:
        return bytes(file.read())


@pytest.fixture
def refusing(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let each write on the volume fail with an error."""
    real = saving.Saving._write

    def refuse(code: int) -> None:
        def write(self: saving.Saving, data: Any) -> None:
            if self.mount.location == str(cluster.volume):
                raise OSError(code, os.strerror(code))
            real(self, data)

        monkeypatch.setattr(saving.Saving, "_write", write)

    return refuse


# What is spooled.


@pytest.mark.parametrize(
    "code",
    [errno.ENOTCONN, errno.ECONNABORTED, errno.EROFS, errno.EIO, errno.ESTALE, errno.ENODEV, errno.ETIMEDOUT],
    ids=errno.errorcode.get,
)
def test_what_says_that_the_volume_is_away_is_spooled(code: int, cluster: Any, refusing: Any) -> None:
    refusing(code)
    name = save()
    assert cluster.on_volume() == {}
    assert len(cluster.holders(name)) == 2 and "node1" in cluster.holders(name)
    row = MediaFile.objects.get(name=name)
    assert (row.spooled, row.state, row.sha256, row.size) == (True, "stored", hashlib.sha256(DATA).hexdigest(), 7000)
    assert names.parse(name, 2, 1) is not None


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT], ids=errno.errorcode.get)
def test_a_full_volume_is_not_spooled(code: int, cluster: Any, refusing: Any) -> None:
    refusing(code)
    with pytest.raises(StorageFull):
        save()
    assert cluster.in_spools() == set() and not MediaFile.objects.exists()


@pytest.mark.parametrize("code", [errno.EACCES, errno.ENAMETOOLONG, errno.EINVAL], ids=errno.errorcode.get)
def test_what_another_try_would_not_mend_is_not_spooled(code: int, cluster: Any, refusing: Any) -> None:
    refusing(code)
    with pytest.raises(OSError, match=os.strerror(code)) as raised:
        save()
    assert not isinstance(raised.value, StorageUnavailable)
    assert cluster.in_spools() == set() and not MediaFile.objects.exists()


def test_an_absent_mount_is_spooled(cluster: Any) -> None:
    with cluster.volume_away():
        name = save()
        row = catalog.add(ContentFile(b"added"), "photos/b.jpg", original="b.jpg")
        assert read(name) == DATA and read(row.name) == b"added"
    assert cluster.on_volume() == {} and MediaFile.objects.filter(spooled=True).count() == 2


def test_a_healthy_volume_leaves_the_spools_alone(cluster: Any) -> None:
    name = save()
    assert cluster.on_volume() == {name: DATA} and cluster.in_spools() == set()
    assert not MediaFile.objects.get().spooled
    assert read(name) == DATA
    default_storage.delete(name)
    assert [spool.log for spool in cluster.spools.values()] == [[], [], []], "a peer was asked"


def test_without_the_setting_it_is_refused_as_ever(cluster: Any) -> None:
    with cluster.volume_away(), cluster.on("node1", SPOOL=None), pytest.raises(StorageUnavailable):
        save()
    assert cluster.in_spools() == set()


def test_a_storage_without_rows_does_not_spool(cluster: Any) -> None:
    for storage in (DerivedStorage(), VolumeStorage(location=f"{cluster.volume}/other", base_url="/o/")):
        with cluster.volume_away(), pytest.raises(StorageUnavailable):
            storage.save("x.jpg", ContentFile(b"x"))
    assert cluster.in_spools() == set()


def test_the_volume_keeps_a_reserve(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    free = os.statvfs(cluster.volume)
    with cluster.on("node1", RESERVE=free.f_bavail * free.f_frsize * 2):
        with pytest.raises(StorageFull, match="are kept free"):
            save()
        with pytest.raises(StorageFull), default_storage.open("photos/own.jpg", "wb") as file:
            file.write(b"x")
    assert cluster.on_volume() == {} and cluster.in_spools() == set() and not MediaFile.objects.exists()
    asked: list[int] = []
    real = os.statvfs
    monkeypatch.setattr(mount.os, "statvfs", lambda root: asked.append(1) or real(root))
    save(), save()
    assert len(asked) == 1, "enough space is remembered for some seconds"


# A volume that hangs.


def test_a_late_writer_meets_no_spooled_file(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The write on the volume ends after the upload was spooled and drained: other names, and nothing is left."""
    real, gate = saving.Saving._write, threading.Event()

    def write(self: saving.Saving, data: Any) -> None:
        if self.mount.location == str(cluster.volume) and not gate.is_set():
            assert gate.wait(30)
        real(self, data)

    monkeypatch.setattr(saving.Saving, "_write", write)
    cluster.options["DEADLINE"] = 0.3
    with cluster.on("node1"):
        name = save()
    [late] = cluster.on_volume()
    assert saving.TEMPORARY.fullmatch(late.rpartition("/")[2])
    assert len(cluster.holders(name)) == 2
    gate.set()
    wait_for(lambda: cluster.on_volume() == {}, "the late file is removed")
    del cluster.options["DEADLINE"]
    cluster.drain()
    assert cluster.on_volume() == {name: DATA} and cluster.in_spools() == set()


# On how many nodes.


@pytest.mark.parametrize("trouble", ["away", "full", "slow", "limit"])
def test_another_peer_takes_the_place_of_one_that_cannot(trouble: str, cluster: Any) -> None:
    bad = cluster.spools["node2"]
    if trouble == "away":
        bad.stop()
    elif trouble == "slow":
        bad.slow, cluster.options["TIMEOUT"] = 1.2, 2.0
    else:
        bad.restart(**({"limit": 100} if trouble == "limit" else {"reserve": 1 << 60}))
    with cluster.volume_away():
        for _ in range(3):  # whichever is asked first
            with cluster.on("node1"):
                name = save()
            assert {"node1", "node3"} <= set(cluster.holders(name))
            assert read(name) == DATA
    if trouble == "slow":
        wait_for(lambda: len(bad.files()) == sum(method == "PUT" for method, _ in bad.log), "late PUTs have ended")


@pytest.mark.parametrize("trouble", ["away", "full", "slow", "limit", "readonly"])
def test_a_node_alone_refuses_and_leaves_nothing(trouble: str, cluster: Any) -> None:
    for node in ("node2", "node3"):
        peer = cluster.spools[node]
        if trouble == "away":
            peer.stop()
        elif trouble == "slow":
            peer.slow, cluster.options["TIMEOUT"] = 1.5, 1.0
        elif trouble == "readonly":
            peer.receiver = Receiver(peer.root, peer.state, keys={"other": "key"})
        else:
            peer.restart(**({"limit": 100} if trouble == "limit" else {"reserve": 1 << 60}))
    began = time.monotonic()
    with cluster.volume_away(), cluster.on("node1"), pytest.raises(StorageUnavailable):
        save()
    assert time.monotonic() - began < 8
    assert not MediaFile.objects.exists() and not Change.objects.exists()
    assert cluster.spools["node1"].files() == {}
    if trouble == "slow":  # a PUT that came late is refused by the tombstone of the DELETE, or was removed by it
        for node in ("node2", "node3"):
            peer = cluster.spools[node]
            peer.slow = 0
            wait_for(lambda peer=peer: peer.files() == {}, "a late PUT is undone")
    assert cluster.in_spools() == set()


def test_one_copy_is_enough_if_the_operator_says_so(cluster: Any) -> None:
    cluster.spools["node2"].stop()
    cluster.spools["node3"].stop()
    with cluster.volume_away(), cluster.on("node1", SPOOL_COPIES=1):
        name = save()
        assert read(name) == DATA
    assert list(cluster.spools["node1"].files()) == [name]


def test_three_copies_are_three(cluster: Any) -> None:
    with cluster.volume_away(), cluster.on("node1", SPOOL_COPIES=3):
        name = save()
        assert len(cluster.holders(name)) == 3
        cluster.spools["node3"].stop()
        with pytest.raises(StorageUnavailable):
            save()
    assert cluster.spools["node1"].files().keys() == {name}
    assert cluster.spools["node2"].files().keys() == {name}


def test_it_is_acknowledged_only_after_both_copies_are_durable(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The order of what happens: file, name and directories here, the same there, then the row."""
    done: list[str] = []

    class Watched:
        def __init__(self, where: str) -> None:
            self.where = where

        def __getattr__(self, name: str) -> Any:
            if name != "fsync":
                return getattr(os, name)

            def fsync(descriptor: int) -> None:
                kind = "directory" if os.path.isdir(f"/proc/self/fd/{descriptor}") else "file"
                os.fsync(descriptor)
                done.append(f"{self.where} {kind}")

            return fsync

    monkeypatch.setattr(saving, "os", Watched("here"))
    monkeypatch.setattr(hybrid, "os", Watched("here"))
    monkeypatch.setattr(receiver, "os", Watched("there"))
    real = catalog._record
    monkeypatch.setattr(catalog, "_record", lambda *given: done.append("row") or real(*given))
    with cluster.volume_away():
        save()
    assert done[-1] == "row"
    assert done.index("here file") < done.index("here directory") < done.index("there file")
    assert done.count("here directory") == 4, "photos, two hash directories, the root"
    assert "there directory" in done


def test_the_row_decides(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """A save whose row fails is taken back from all spools, and from none of the volume."""

    def fail(*_given: Any) -> None:
        raise IntegrityError("no")

    with monkeypatch.context() as patched, cluster.volume_away():
        patched.setattr(catalog, "_record", fail)
        with pytest.raises(IntegrityError):
            save()
        with pytest.raises(IntegrityError):
            catalog.add(ContentFile(DATA), "photos/b.jpg")
    assert cluster.in_spools() == set()


def test_a_stream_that_cannot_be_read_again_is_refused(cluster: Any) -> None:
    content = ContentFile(DATA)
    content.seekable = lambda: False  # type: ignore[method-assign]
    with cluster.volume_away(), pytest.raises(StorageUnavailable):
        default_storage.save("photos/a.jpg", content)
    assert cluster.in_spools() == set()


# Full.


def test_the_spool_has_a_limit(cluster: Any) -> None:
    with cluster.volume_away(), cluster.on("node1", SPOOL_LIMIT=15_000):
        kept = [save(), save()]
        with pytest.raises(StorageUnavailable, match="SPOOL_LIMIT"):
            save()
        assert [read(name) for name in kept] == [DATA, DATA]
    assert cluster.in_spools() == set(kept)
    cluster.drain()
    with cluster.volume_away(), cluster.on("node1", SPOOL_LIMIT=15_000):
        save()


def test_a_full_disk_of_the_spool_is_unavailable_not_full(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    real = saving.Saving._write

    def write(self: saving.Saving, data: Any) -> None:
        if self.mount.location == str(cluster.spools["node1"].root):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(self, data)

    monkeypatch.setattr(saving.Saving, "_write", write)
    with cluster.volume_away(), pytest.raises(StorageUnavailable, match="nor the spool"):
        save()
    assert cluster.in_spools() == set()


def test_a_missing_spool_directory_is_unavailable(cluster: Any, tmp_path: Path) -> None:
    with cluster.on("node1", SPOOL=str(tmp_path / "nowhere")):
        with cluster.volume_away(), pytest.raises(StorageUnavailable):
            save()
        name = save()  # and is no hindrance while the volume is there
        assert read(name) == DATA
        default_storage.delete(name)
    assert cluster.on_volume() == {}


# Reading.


def test_it_can_be_read_at_once_on_every_node(cluster: Any) -> None:
    with cluster.volume_away():
        name = save()
        seen = []
        for node in cluster.spools:
            with cluster.on(node):
                assert read(name) == DATA
                assert default_storage.exists(name)
                assert default_storage.size(name) == len(DATA)
                assert default_storage.url(name) == f"/media/{name}"
                assert default_storage.get_modified_time(name).year >= 2024
                with default_storage.open(name, "rb") as file:
                    file.seek(5)
                    assert file.read(4) == DATA[5:9]
                seen.append(node in cluster.holders(name))
        assert sorted(seen) == [False, True, True], "one has read it from a peer"
    for node in cluster.spools:  # the volume is back, and does not have it yet
        with cluster.on(node):
            assert read(name) == DATA and default_storage.exists(name)
            assert not default_storage.exists("photos/0/0/nothing-aaaaaaaaaaaaaaaaaaaa.jpg")
            with pytest.raises(FileNotFoundError):
                default_storage.open("photos/0/0/nothing-aaaaaaaaaaaaaaaaaaaa.jpg")


def third(cluster: Any, name: str) -> tuple[str, list[str]]:
    """Return the node that does not have the file, and those that have it."""
    holders = cluster.holders(name)
    return next(node for node in cluster.spools if node not in holders), holders


@pytest.mark.parametrize("volume", ["away", "there"])
def test_a_living_name_whose_holders_are_away_is_unavailable(volume: str, cluster: Any) -> None:
    with cluster.volume_away():
        name = save()
    node, holders = third(cluster, name)
    for holder in holders:
        cluster.spools[holder].stop()
    with cluster.volume_away() if volume == "away" else contextlib.nullcontext(), cluster.on(node, TIMEOUT=1.0):
        with pytest.raises(StorageUnavailable):
            default_storage.open(name)
        if volume == "there":
            with pytest.raises(FileNotFoundError):  # nobody knows this one
                default_storage.open(name.replace("a-", "b-"))


def test_a_living_name_that_no_spool_has_is_not_called_missing(cluster: Any) -> None:
    with cluster.volume_away():
        name = save()
    for spool in cluster.spools.values():
        (spool.root / name).unlink(missing_ok=True)
    with pytest.raises(StorageUnavailable, match="is stored, but"):
        default_storage.open(name)


def test_a_drained_file_that_the_volume_lost_is_missing(cluster: Any) -> None:
    name = save()
    (cluster.volume / name).unlink()
    with pytest.raises(FileNotFoundError):
        default_storage.open(name)
    assert not default_storage.exists(name)


def test_drained_between_the_looks(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The volume is asked, then the file is drained, then the spools are asked: it is found."""
    with cluster.volume_away():
        name = save()
    node, _ = third(cluster, name)
    real = SpoolStorage._living

    def living(self: Any, asked: str) -> Any:
        monkeypatch.setattr(SpoolStorage, "_living", real)
        row = real(self, asked)
        cluster.drain("node1")
        return row

    with cluster.on(node):
        monkeypatch.setattr(SpoolStorage, "_living", living)
        assert read(name) == DATA
    assert cluster.in_spools() == set()


def test_the_ledger_answers_while_the_database_is_away(cluster: Any, database_away: Any, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    with cluster.volume_away():
        alive, dead, young = save(), save(), save()
        written = sqlite3.connect(ledger)
        written.executescript(_SCHEMA)
        for name, state in ((alive, "stored"), (dead, "deleted")):
            digest = hashlib.sha256(DATA).hexdigest()
            written.execute("INSERT INTO files VALUES (?, ?, 'default', ?, ?)", (name, state, digest, len(DATA)))
        written.commit()
        written.close()
        for node in cluster.spools:
            with cluster.on(node, LEDGER=str(ledger)), database_away():
                assert read(alive) == DATA
                with pytest.raises(FileNotFoundError):
                    default_storage.open(dead)
                with pytest.raises(StorageUnavailable):  # it may be deleted as well as alive
                    default_storage.open(young)


# Deleting and replacing.


def test_a_deleted_spooled_file_is_gone_from_all_nodes(cluster: Any) -> None:
    with cluster.volume_away():
        name = save()
        default_storage.delete(name)
        assert cluster.in_spools() == set()
        for node in cluster.spools:
            with cluster.on(node):
                assert not default_storage.exists(name)
                with pytest.raises(FileNotFoundError):
                    default_storage.open(name)
    row = MediaFile.objects.get()
    assert (row.state, row.spooled) == ("deleted", True)
    assert catalog.finish_deletes() == (1, 0)
    cluster.drain()
    assert cluster.on_volume() == {} and MediaFile.objects.get().state == "purged"


def test_a_deleted_file_is_unreadable_where_its_bytes_are_left(cluster: Any) -> None:
    with cluster.volume_away():
        name = save()
        _node, holders = third(cluster, name)
        other = next(holder for holder in holders if holder != "node1")
        cluster.spools[other].stop()
        with cluster.on("node1", TIMEOUT=0.5):
            default_storage.delete(name)
        assert cluster.holders(name) == [other]
        cluster.spools[other].start()
        for each in cluster.spools:
            with cluster.on(each), pytest.raises(FileNotFoundError):
                default_storage.open(name)
    cluster.drain(other)
    assert cluster.in_spools() == set() and cluster.on_volume() == {}


def test_a_rollback_keeps_a_spooled_file(cluster: Any) -> None:
    with cluster.volume_away():
        name = save()
        with transaction.atomic():
            default_storage.delete(name)
            transaction.set_rollback(True)
        assert read(name) == DATA
    cluster.drain()
    assert cluster.on_volume() == {name: DATA}


def test_a_spooled_file_is_replaced(cluster: Any) -> None:
    with cluster.volume_away():
        first = catalog.add(ContentFile(b"first"), "photos/a.jpg")
        second = catalog.replace(first, ContentFile(b"second"))
        assert second.spooled and second.name != first.name
        assert read(first.name) == b"first" and read(second.name) == b"second"
    third_one = catalog.replace(second, ContentFile(b"third"))
    assert not third_one.spooled
    cluster.drain()
    assert sorted(cluster.on_volume().values()) == [b"first", b"second", b"third"]
    assert catalog.current(first) == third_one


def test_a_tombstone_does_not_expire_before_the_spools_are_empty(cluster: Any) -> None:
    with cluster.volume_away():
        name = save()
    cluster.spools["node2"].stop(), cluster.spools["node3"].stop()
    with cluster.on("node1", TIMEOUT=0.5):
        default_storage.delete(name)
    MediaFile.objects.update(deleted=timezone.now() - timedelta(days=90))
    with cluster.on("node1", NODES=["node1"], TIMEOUT=0.5):
        catalog.confirm("node1", 10**6)
        assert catalog.expire_tombstones() == 0
        cluster.spools["node2"].start(), cluster.spools["node3"].start()
        cluster.drain("node1")
        assert catalog.expire_tombstones() == 1


# The receiver of a spool.


def test_what_the_receiver_tells_of_itself(cluster: Any) -> None:
    with cluster.volume_away():
        name = save()
    transport = DefaultTransport("/spool/")
    for node, spool in cluster.spools.items():
        body = transport.content(spool.host, "-/list", Deadline(5))
        listed = [json.loads(line) for line in body.read().splitlines()]
        body.close()
        assert listed == ([{"name": name, "size": len(DATA)}] if node in cluster.holders(name) else [])
    cluster.spools["node1"].receiver.lists = False
    with pytest.raises(StorageUnavailable, match="400"):
        transport.content(cluster.spools["node1"].host, "-/list", Deadline(5))


def test_the_list_must_be_signed(cluster: Any) -> None:
    spool = cluster.spools["node1"]
    spool.restart(keys={"web": "secret"})
    with pytest.raises(StorageUnavailable, match="401"):
        DefaultTransport("/spool/").content(spool.host, "-/list", Deadline(5))
    signed = DefaultTransport("/spool/", hmac_key="secret", hmac_key_id="web")
    assert signed.content(spool.host, "-/list", Deadline(5)).read() == b""


def test_the_receiver_is_configured_by_its_environment(tmp_path: Path) -> None:
    for name in ("root", "state"):
        (tmp_path / name).mkdir()
    given = {"TRIBRICK_RECEIVER_ROOT": str(tmp_path / "root"), "TRIBRICK_RECEIVER_STATE": str(tmp_path / "state")}
    made = receiver.application(given)
    assert (made.limit, made.lists) == (None, False)
    made = receiver.application({**given, "TRIBRICK_RECEIVER_LIMIT": "1000", "TRIBRICK_RECEIVER_LIST": "1"})
    assert (made.limit, made.lists) == (1000, True)
    for key, bad in (("LIMIT", "4g"), ("LIST", "yes")):
        with pytest.raises(receiver.ReceiverError, match=key):
            receiver.application({**given, f"TRIBRICK_RECEIVER_{key}": bad})


def test_a_directory_is_counted_now_and_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()  # the cluster counts every time
    root = tmp_path / "counted"
    (root / "a").mkdir(parents=True)
    (root / "a/one").write_bytes(b"x" * 100)
    (root / ".hidden").mkdir()
    (root / ".hidden/two").write_bytes(b"x" * 10)
    usage = receiver.Usage(root)
    assert usage.used() == 110
    (root / "a/three").write_bytes(b"x" * 1000)
    usage.add(7)
    assert usage.used() == 117, "what this process adds is known, what others add is not yet"
    usage._until = 0
    assert usage.used() == 1110


# Settings.


def test_settings_that_cannot_work_are_errors(cluster: Any) -> None:
    def said(**options: Any) -> dict[str, str]:
        with cluster.on("node1", **options):
            return {str(message.id): message.msg for message in run_checks(tags=["tribrick"])}

    assert said() == {}
    for options, words in (
        ({"SPOOL": "spool"}, "absolute path"),
        ({"SPOOL": f"{cluster.volume}/spool"}, "not apart from"),
        ({"SPOOL": str(cluster.volume.parent)}, "not apart from"),
        ({"SPOOL_COPIES": 4}, "it can be 1 to 3"),
        ({"SPOOL_COPIES": 0}, "it can be 1 to 3"),
        ({"SPOOL_COPIES": True}, "it can be 1 to 3"),
        ({"SPOOL_PEERS": []}, "it can be 1 to 1"),
        ({"SPOOL_PEERS": "node2:80"}, "a list of hosts"),
        ({"SPOOL_PEERS": ["a", "a"]}, "each of them once"),
        ({"SPOOL_LIMIT": 0}, "a number of bytes"),
        ({"SPOOL_LIMIT": "4g"}, "a number of bytes"),
    ):
        found = said(**options)
        assert list(found) == ["tribrick.E004"], options
        assert words in found["tribrick.E004"]
    assert "an acknowledged upload is lost" in said(SPOOL_COPIES=1)["tribrick.W003"]
    without = [app for app in settings.INSTALLED_APPS if app != "tribrick"]
    with override_settings(INSTALLED_APPS=without):
        assert "tribrick.E005" in said()
    kind = {"BACKEND": "tribrick.storage.HybridStorage", "OPTIONS": {"location": "/x", "hosts": ["a"]}}
    with override_settings(STORAGES={**settings.STORAGES, "default": kind}):
        assert list(said()) == ["tribrick.W004"]


# The site.


def test_the_example_site_answers(cluster: Any, refusing: Any, user: Any, png: Any) -> None:
    """201 while a peer is there, 503 with Retry-After when none is, 507 when the volume is full."""

    def upload() -> Any:
        content = SimpleUploadedFile("a.png", png(), "image/png")
        head = {"HTTP_AUTHORIZATION": "Token secret-of-ada"}
        return Client().post("/api/media/", {"file": content}, secure=True, **head)

    with cluster.volume_away():
        answer = upload()
        assert answer.status_code == 201
        name = answer.json()["name"]
        assert len(cluster.holders(name)) == 2
        for node in ("node2", "node3"):
            cluster.spools[node].stop()
        with cluster.on("node1", TIMEOUT=0.5):
            answer = upload()
        assert (answer.status_code, answer["Retry-After"]) == (503, "5")
    refusing(errno.ENOSPC)
    assert upload().status_code == 507


def test_the_release_before_may_go_on_inserting(cluster: Any) -> None:
    """While the nodes are upgraded one after the other."""
    save()
    fields = [
        field.column for field in MediaFile._meta.concrete_fields if field.column not in {"id", "spooled", "name"}
    ]
    listed = ", ".join(fields)
    with connection.cursor() as cursor:
        copied = f"SELECT 'photos/b.jpg', {listed} FROM tribrick_mediafile"  # noqa: S608
        cursor.execute(f"INSERT INTO tribrick_mediafile (name, {listed}) {copied}")
    assert not MediaFile.objects.get(name="photos/b.jpg").spooled
