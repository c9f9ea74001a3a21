"""The catalog's operations: what disk, rows and ledger hold after each, and after each failure."""

from __future__ import annotations

import hashlib
import subprocess
import threading
import time
from collections.abc import Callable
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.files.base import ContentFile
from django.core.files.storage import InMemoryStorage, storages
from django.db import DataError, connection, transaction
from django.test import override_settings
from django.test.utils import CaptureQueriesContext
from django.utils import timezone

from tribrick import catalog
from tribrick.errors import StorageUnavailable
from tribrick.models import Change, Media, MediaFile, Outbox
from tribrick.storage import StoredFile, VolumeStorage

Agree = Callable[..., None]
Process = Callable[..., "subprocess.CompletedProcess[str]"]
FilesIn = Callable[[Path], list[str]]


def add(data: bytes = b"one", name: str = "photos/été.txt", **options: Any) -> MediaFile:
    return catalog.add(ContentFile(data), name, **options)


def root() -> Path:
    return Path(settings.MEDIA_ROOT)


def kinds() -> list[tuple[int | None, str]]:
    return list(Change.objects.order_by("number").values_list("number", "kind"))


def in_threads(*works: Callable[[], Any]) -> list[Any]:
    """Run all at once, each with its own connection; return results or exceptions in order."""
    results: list[Any] = [None] * len(works)
    barrier = threading.Barrier(len(works), timeout=20)

    def run(index: int) -> None:
        try:
            barrier.wait()
            results[index] = works[index]()
        except BaseException as error:  # noqa: BLE001
            results[index] = error
        finally:
            connection.close()

    threads = [threading.Thread(target=run, args=(index,)) for index in range(len(works))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
        assert not thread.is_alive()
    return results


# Adding


def test_add(agree: Agree, user: Any) -> None:
    row = add(b"bytes", "photos/x.txt", original="Ein Bild\u202e.txt", owner=user, content_type="text/plain")
    row.refresh_from_db()
    assert (root() / row.name).read_bytes() == b"bytes"
    assert (row.sha256, row.size) == (hashlib.sha256(b"bytes").hexdigest(), 5)
    assert (row.original, row.owner, row.content_type, row.node) == ("Ein Bild.txt", user, "text/plain", "node7")
    assert (row.state, row.version, row.logical) == ("stored", 1, None)
    assert row.url == f"/media/{row.name}"
    change = Change.objects.get()
    assert (change.number, change.kind, change.name, change.sha256, change.size) == (
        1, "added", row.name, row.sha256, 5,
    )  # fmt: skip
    agree()


def test_add_asks_the_disk_nothing_and_the_database_little() -> None:
    add()
    with CaptureQueriesContext(
        connection,
    ) as queries:
        add()
    statements = [query["sql"].split()[0] for query in queries if "SAVEPOINT" not in query["sql"]]
    assert statements == ["BEGIN", "INSERT", "INSERT", "COMMIT"]


def test_a_storage_without_store(user: Any) -> None:
    with override_settings(
        STORAGES={**settings.STORAGES, "memory": {"BACKEND": "django.core.files.storage.InMemoryStorage"}}
    ):
        row = add(b"in memory", "a.txt", storage="memory")
        storage = storages["memory"]
        assert isinstance(storage, InMemoryStorage)
        assert storage.open(row.name).read() == b"in memory"
        assert row.sha256 == hashlib.sha256(b"in memory").hexdigest()
        catalog.delete(row)
        assert not storage.exists(row.name)


def test_a_refused_row_takes_its_bytes_away(files_in: FilesIn) -> None:
    with pytest.raises(DataError):
        add(node="x" * 300)
    assert files_in(root()) == []
    with pytest.raises(DataError), transaction.atomic():
        add(node="x" * 300)
    assert files_in(root()) == []
    assert not Change.objects.exists()


def test_no_row_without_bytes() -> None:
    (root() / ".tribrick-volume").unlink()
    with pytest.raises(StorageUnavailable):
        add()
    assert not MediaFile.objects.exists()


def test_bytes_are_kept_when_nobody_knows_whether_the_row_was_committed(
    monkeypatch: pytest.MonkeyPatch, files_in: FilesIn, agree: Agree
) -> None:
    from django.db import OperationalError

    real = connection._commit

    def lost_answer() -> None:
        real()
        raise OperationalError("the connection was lost")

    monkeypatch.setattr(connection, "_commit", lost_answer)
    with pytest.raises(OperationalError):
        add()
    monkeypatch.undo()
    connection.close()
    assert len(files_in(root())) == 1
    agree()  # here it was committed


def test_rolled_back_by_the_caller() -> None:
    with transaction.atomic():
        add()
        transaction.set_rollback(True)
    assert not MediaFile.objects.exists()
    assert not Change.objects.exists()


# Deleting


def test_delete_is_idempotent(agree: Agree) -> None:
    row = add()
    catalog.delete(row)
    catalog.delete(row.name)
    row.refresh_from_db()
    assert row.state == "purged" and row.deleted is not None
    assert kinds() == [(1, "added"), (2, "deleted"), (3, "purged")]
    catalog.purge(row)
    assert len(kinds()) == 3
    agree()
    with pytest.raises(MediaFile.DoesNotExist):
        catalog.delete("photos/unknown.txt")


def test_bytes_go_with_the_commit_not_before(agree: Agree) -> None:
    row = add()
    with transaction.atomic():
        catalog.delete(row)
        assert (root() / row.name).exists()
    assert not (root() / row.name).exists()
    agree()


def test_a_rollback_keeps_the_bytes(agree: Agree) -> None:
    row = add()
    with transaction.atomic():
        catalog.delete(row)
        transaction.set_rollback(True)
    assert (root() / row.name).exists()
    row.refresh_from_db()
    assert row.state == "stored"
    agree()


def test_purge_refuses_a_live_file() -> None:
    row = add()
    with pytest.raises(ValueError, match="not deleted"):
        catalog.purge(row)
    assert (root() / row.name).exists()


def test_delete_while_the_volume_is_away(agree: Agree) -> None:
    row = add()
    sentinel = root() / ".tribrick-volume"
    text = sentinel.read_text()
    sentinel.unlink()
    catalog.delete(row)
    row.refresh_from_db()
    assert row.state == "deleted"
    with pytest.raises(StorageUnavailable):
        catalog.finish_deletes()
    sentinel.write_text(text)
    assert catalog.finish_deletes() == (1, 0)
    assert catalog.finish_deletes() == (0, 0)
    agree()


def test_one_stubborn_file_does_not_stop_the_others(agree: Agree, monkeypatch: pytest.MonkeyPatch) -> None:
    first, second = add(), add()
    MediaFile.objects.update(state="deleted", deleted=timezone.now())
    real = VolumeStorage.delete

    def stubborn(self: VolumeStorage, name: str) -> None:
        if name == first.name:
            raise PermissionError(13, "no")
        real(self, name)

    monkeypatch.setattr(VolumeStorage, "delete", stubborn)
    assert catalog.finish_deletes() == (1, 1)
    assert (root() / first.name).exists() and not (root() / second.name).exists()


def test_tombstones_unlink_again(files_in: FilesIn) -> None:
    row = add()
    catalog.delete(row)
    (root() / row.name).write_bytes(b"back after a power cut")
    assert catalog.finish_deletes() == (0, 0)
    assert catalog.finish_deletes(again=True) == (1, 0)
    assert files_in(root()) == []
    assert len(kinds()) == 3


def test_what_comes_back_is_removed_by_twice_its_age(files_in: FilesIn, caplog: pytest.LogCaptureFixture) -> None:
    row = add()
    catalog.delete(row)
    dead = MediaFile.objects.get(pk=row.pk).deleted
    assert dead is not None
    (root() / row.name).write_bytes(b"a brick that was not told")
    looked = dead + timedelta(minutes=5)
    for minute in (6, 7):
        assert catalog.remove_returned(looked, dead + timedelta(minutes=minute)) == 0
        looked = dead + timedelta(minutes=minute)
    assert (root() / row.name).exists()
    assert catalog.remove_returned(looked, dead + timedelta(minutes=8)) == 1
    assert files_in(root()) == []
    assert [kind for _, kind in kinds()] == ["added", "deleted", "purged", "purged"]
    assert "had come back" in caplog.text
    assert catalog.remove_returned(looked, dead + timedelta(minutes=8)) == 0, "there is nothing now"
    assert [kind for _, kind in kinds()] == ["added", "deleted", "purged", "purged"]


def test_a_look_that_was_not_possible_is_repeated() -> None:
    row = add()
    catalog.delete(row)
    dead = MediaFile.objects.get(pk=row.pk).deleted
    assert dead is not None
    (root() / row.name).write_bytes(b"a brick that was not told")
    sentinel = root() / ".tribrick-volume"
    text = sentinel.read_text()
    sentinel.unlink()
    with pytest.raises(StorageUnavailable):
        catalog.remove_returned(dead, dead + timedelta(minutes=1))
    sentinel.write_text(text)
    assert catalog.remove_returned(dead, dead + timedelta(minutes=1)) == 1


def test_what_lives_is_never_looked_for() -> None:
    row = add()
    now = timezone.now()
    assert catalog.remove_returned(now - timedelta(days=60), now + timedelta(days=60)) == 0
    assert (root() / row.name).exists()


def test_a_dead_name_stays_dead() -> None:
    row = add()
    catalog.delete(row)
    stored = StoredFile(row.name, row.sha256, row.size)
    with pytest.raises(catalog.NameIsDead):
        catalog.record(stored)
    row.delete()  # as if the tombstone had expired
    with pytest.raises(catalog.NameIsDead):
        catalog.record(stored)


def test_tombstones_expire_when_every_node_has_them() -> None:
    kept, old = add(), add()
    young = catalog.replace(old, ContentFile(b"2"))
    catalog.delete_all(Media.objects.get())
    long_ago = timezone.now() - timedelta(days=31)
    MediaFile.objects.filter(pk=old.pk).update(deleted=long_ago)
    last = Change.objects.order_by("-number").first()
    assert last is not None and last.number is not None
    assert catalog.expire_tombstones() == 0, "no nodes are named"
    with override_settings(TRIBRICK={**settings.TRIBRICK, "NODES": ["n1", "n2"]}):
        catalog.confirm("n1", last.number)
        assert catalog.expire_tombstones() == 0, "n2 is unheard of"
        of_old = Change.objects.get(name=old.name, kind="purged").number
        assert of_old is not None
        catalog.confirm("n2", of_old - 1)
        assert catalog.expire_tombstones() == 0, "n2 does not know the end of it"
        catalog.confirm("n2", last.number)
        task = Outbox.objects.create(name=old.name, operation="delete", host="http://h/")
        assert catalog.expire_tombstones() == 0, "a delivery is open"
        task.done = timezone.now()
        task.save()
        assert catalog.expire_tombstones() == 1
        assert set(MediaFile.objects.values_list("pk", flat=True)) == {kept.pk, young.pk}
        MediaFile.objects.filter(pk=young.pk).update(deleted=long_ago)
        assert catalog.expire_tombstones() == 1
    assert not Media.objects.exists()
    assert Change.objects.filter(name=old.name).count() == 3


# Versions


def test_versions(agree: Agree) -> None:
    one = add(b"1", "photos/a.txt", original="Ä.txt")
    assert catalog.versions(one) == [one] and catalog.current(one) == one
    two = catalog.replace(one, ContentFile(b"2"))
    three = catalog.replace(one, ContentFile(b"3"), "photos/other.txt")
    assert [(row.pk, row.version) for row in catalog.versions(one)] == [(three.pk, 3), (two.pk, 2), (one.pk, 1)]
    assert len({one.name, two.name, three.name}) == 3
    assert [(root() / row.name).read_bytes() for row in (one, two, three)] == [b"1", b"2", b"3"]
    assert catalog.current(two) == three
    catalog.restore(one)
    catalog.restore(one)
    assert catalog.current(two) == one
    assert kinds()[-1] == (4, "current")
    catalog.delete(one)
    assert catalog.current(two) == three
    with pytest.raises(catalog.FileIsDeleted):
        catalog.restore(one)
    catalog.delete_all(Media.objects.get())
    catalog.delete_all(Media.objects.get())
    assert catalog.current(two) is None
    agree()


def test_replacing_a_deleted_file_stores_nothing(files_in: FilesIn) -> None:
    row = add()
    catalog.delete(row)
    with pytest.raises(catalog.FileIsDeleted):
        catalog.replace(row, ContentFile(b"2"))
    assert files_in(root()) == []


def test_deleted_while_the_new_version_was_being_stored(monkeypatch: pytest.MonkeyPatch, agree: Agree) -> None:
    row = add()
    real = VolumeStorage.store

    def slow(self: VolumeStorage, *args: Any, **options: Any) -> StoredFile:
        catalog.delete(row)
        return real(self, *args, **options)

    monkeypatch.setattr(VolumeStorage, "store", slow)
    with pytest.raises(catalog.FileIsDeleted):
        catalog.replace(row, ContentFile(b"2"))
    agree()


def test_expire(agree: Agree) -> None:
    rows = [add(b"0")]
    rows += [catalog.replace(rows[0], ContentFile(b"%d" % n)) for n in range(1, 5)]
    alone = add()
    catalog.restore(rows[1])
    MediaFile.objects.filter(pk__in=[rows[0].pk, rows[2].pk]).update(created=timezone.now() - timedelta(days=9))
    assert list(catalog.expirable(keep=4)) == []
    assert {row.pk for row in catalog.expirable(keep=1)} == {rows[0].pk, rows[2].pk, rows[3].pk}
    assert set(catalog.expire(keep=1, older_than=timedelta(days=8))) == {rows[0].name, rows[2].name}
    assert set(catalog.expire()) == {rows[3].name, rows[4].name}
    assert catalog.current(rows[0]) == rows[1] and catalog.current(alone) == alone
    with pytest.raises(ValueError, match="negative"):
        list(catalog.expirable(keep=-1))
    agree()


def test_a_version_restored_while_others_expire_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    one = add(b"1")
    two = catalog.replace(one, ContentFile(b"2"))
    listed = list(catalog.expirable())
    assert listed == [one]
    catalog.restore(one)
    monkeypatch.setattr(catalog, "expirable", lambda **_rules: listed)
    assert catalog.expire() == []
    assert catalog.current(two) == one


# Many at once


def test_all_replace_the_same_file(agree: Agree) -> None:
    row = add(b"first")
    made = in_threads(*[lambda n=n: catalog.replace(row, ContentFile(b"%d" % n)) for n in range(8)])
    assert all(isinstance(one, MediaFile) for one in made), made
    assert Media.objects.count() == 1
    assert [one.version for one in catalog.versions(row)] == list(range(9, 0, -1))
    assert catalog.current(row) == catalog.versions(row)[0]
    agree()


def test_who_replaces_another_version_waits_for_the_logical_file(agree: Agree) -> None:
    first = add(b"1")
    second = catalog.replace(first, ContentFile(b"2"))
    other = threading.Thread(target=in_threads, args=(lambda: catalog.replace(second, ContentFile(b"4")),))
    with transaction.atomic():
        catalog.replace(first, ContentFile(b"3"))
        other.start()
        deadline = time.monotonic() + 20
        while True:
            with connection.cursor() as cursor:
                cursor.execute("SELECT count(*) FROM pg_locks WHERE NOT granted")
                if cursor.fetchone()[0]:
                    break
            assert time.monotonic() < deadline, "nobody waits"
    other.join(30)
    assert [(root() / one.name).read_bytes() for one in catalog.versions(first)] == [b"4", b"3", b"2", b"1"]
    agree()


@pytest.mark.parametrize("attempt", range(5))
def test_replace_and_delete_at_once(agree: Agree, attempt: int) -> None:
    first = add(b"first")
    second = catalog.replace(first, ContentFile(b"second")) if attempt % 2 else first
    works: list[Callable[[], Any]] = []
    for n in range(3):
        works.append(lambda n=n: catalog.replace(first, ContentFile(b"a%d" % n)))
        works.append(lambda n=n: catalog.replace(second, ContentFile(b"b%d" % n)))
        works.append(lambda: catalog.delete(first))
        works.append(lambda: catalog.restore(second))
    for result in in_threads(*works):
        assert isinstance(result, (MediaFile, catalog.FileIsDeleted, type(None))), result
    agree()
    media = Media.objects.first()
    if media is not None:
        live = MediaFile.objects.filter(logical=media, state="stored")
        assert (media.current is None) == (not live.exists())
        assert media.current is None or media.current.state == "stored"


def test_all_delete_the_same_file(agree: Agree) -> None:
    row = add()
    results = in_threads(*[lambda: catalog.delete(row)] * 6, *[lambda: catalog.delete(row.name)] * 2)
    assert all(isinstance(one, MediaFile) for one in results), results
    assert [kind for _number, kind in kinds()] == ["added", "deleted", "purged"]
    agree()


# A killed process

KILL = """
import os
from django.core.files.base import ContentFile
from django.db import connection, transaction
from tribrick import catalog
from tribrick.models import Change, MediaFile
from tribrick.storage import VolumeStorage
def kill(place, name, after):
    real = getattr(place, name)
    def killed(*args, **options):
        if after:
            real(*args, **options)
        os._exit(9)
    setattr(place, name, killed)
connection.ensure_connection()
"""
STEPS = {
    "store": "VolumeStorage, 'store'",
    "row": "MediaFile, 'save'",
    "change": "catalog, '_change'",
    "commit": "connection, '_commit'",
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", STEPS)
@pytest.mark.parametrize("what", ["add", "replace"])
def test_killed_in_a_save(what: str, step: str, after: bool, process: Process, files_in: FilesIn, agree: Agree) -> None:
    old = add(b"old")
    call = "add(ContentFile(b'new'), 'photos/n.txt')"
    if what == "replace":
        call = f"replace(MediaFile.objects.get(pk={old.pk}), ContentFile(b'new'))"
    done = process(f"{KILL}kill({STEPS[step]}, {after})\ncatalog.{call}\nos._exit(1)")
    assert done.returncode == 9, done.stderr
    if step == "commit" and after:
        assert len(catalog.versions(old)) == (2 if what == "replace" else 1)
        assert MediaFile.objects.count() == 2
        agree()
    else:  # nothing but perhaps an orphan, which nobody was told of
        assert MediaFile.objects.get().pk == old.pk
        assert not Media.objects.exists()
        orphans = [name for name in files_in(root()) if name != old.name]
        assert len(orphans) == (0 if step == "store" and not after else 1)
        agree(orphans)
    catalog.replace(old, ContentFile(b"again"))  # nothing is locked


DELETE_STEPS = {
    "change": ("catalog, '_change'", "stored"),
    "commit": ("connection, '_commit'", "stored"),
    "unlink": ("VolumeStorage, 'delete'", "deleted"),
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", DELETE_STEPS)
def test_killed_in_a_delete(step: str, after: bool, process: Process, agree: Agree) -> None:
    row = add()
    place, state = DELETE_STEPS[step]
    done = process(f"{KILL}kill({place}, {after})\ncatalog.delete(MediaFile.objects.get(pk={row.pk}))\nos._exit(1)")
    assert done.returncode == 9, done.stderr
    row.refresh_from_db()
    assert row.state == ("deleted" if step == "commit" and after else state)
    assert (root() / row.name).exists() == (step != "unlink" or not after)
    if row.state == "deleted":
        assert catalog.finish_deletes() == (1, 0)
    agree()
    catalog.delete(row)
    agree()


def test_killed_before_the_ledger_says_purged(process: Process, agree: Agree) -> None:
    row = add()
    done = process(
        f"""{KILL}
row = MediaFile.objects.get(pk={row.pk})
catalog.delete.__globals__['_purge_after_commit'] = lambda file: None
catalog.delete(row)
kill(catalog, '_change', True)
catalog.purge(row)
os._exit(1)"""
    )
    assert done.returncode == 9, done.stderr
    row.refresh_from_db()
    assert row.state == "deleted" and not (root() / row.name).exists()
    assert catalog.finish_deletes() == (1, 0)
    agree()
