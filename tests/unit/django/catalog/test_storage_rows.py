"""Files that a site saves through the storage alone, as a ``FileField`` does, have rows too."""

from __future__ import annotations

import contextlib
import hashlib
import os
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage, storages
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import DataError, IntegrityError, OperationalError, connection, models, transaction
from django.test import override_settings
from django.test.utils import CaptureQueriesContext, isolate_apps

from tribrick import catalog
from tribrick.models import Change, MediaFile
from tribrick.storage import DerivedStorage, StorageUnavailable, VolumeStorage, mount, saving

Agree = Callable[..., None]
Process = Callable[..., "subprocess.CompletedProcess[str]"]
FilesIn = Callable[[Path], list[str]]


def root() -> Path:
    return Path(settings.MEDIA_ROOT)


def save(data: bytes = b"one", name: str = "photos/été.txt") -> str:
    return str(default_storage.save(name, ContentFile(data)))


@pytest.fixture
def document() -> Iterator[Any]:
    """A developer's own model, with a plain ``FileField``."""
    with isolate_apps("tribrick"):

        class Document(models.Model):
            file = models.FileField(upload_to="papers")

            class Meta:
                app_label = "tribrick"

        with connection.schema_editor() as editor:
            editor.create_model(Document)
        try:
            yield Document
        finally:
            with connection.schema_editor() as editor:
                editor.delete_model(Document)


# Saving


def test_a_file_field(document: Any, agree: Agree) -> None:
    made = document.objects.create(file=SimpleUploadedFile("Été 1.PDF", b"%PDF", "application/pdf"))
    row = MediaFile.objects.get()
    assert row.name == made.file.name
    assert len(row.name) <= 100
    assert (row.original, row.content_type, row.storage) == ("Été 1.PDF", "application/pdf", "default")
    assert (row.sha256, row.size, row.node) == (hashlib.sha256(b"%PDF").hexdigest(), 4, "node7")
    agree()
    made.file.delete()
    assert MediaFile.objects.get().state == "purged"
    agree()


def test_a_rollback_takes_the_row_and_leaves_the_bytes_to_sweep(document: Any, files_in: FilesIn, agree: Agree) -> None:
    with transaction.atomic():
        document.objects.create(file=SimpleUploadedFile("a.pdf", b"x"))
        assert MediaFile.objects.count() == 1
        transaction.set_rollback(True)
    assert not MediaFile.objects.exists()
    assert len(files_in(root())) == 1
    agree(files_in(root()))


def test_a_save_costs_the_volume_what_it_did(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[str] = []

    class Counting:
        def __getattr__(self, name: str) -> Any:
            found = getattr(os, name)
            if callable(found) and name not in {"fspath", "fsdecode"}:
                made.append(name)
            return found

    with override_settings(TRIBRICK={**settings.TRIBRICK, "HASH_LEVELS": 0}):
        save()
        for part in (mount, saving):
            monkeypatch.setattr(part, "os", Counting())
        default_storage.store(ContentFile(b"x"), "photos/a.txt")
        alone, made[:] = list(made), []
        save()
    assert made == alone
    assert "fsync" in alone


def test_few_queries() -> None:
    save()
    with CaptureQueriesContext(connection) as queries:
        save()
    statements = [query["sql"].split()[0] for query in queries if "SAVEPOINT" not in query["sql"]]
    assert statements == ["BEGIN", "SELECT", "INSERT", "INSERT", "COMMIT"]


def test_a_refused_row_takes_its_bytes_away(files_in: FilesIn, monkeypatch: pytest.MonkeyPatch) -> None:
    too_long = "/".join(["d" * 90] * 3) + "/x.txt"
    with pytest.raises(DataError):
        save(name=too_long)
    with pytest.raises(DataError), transaction.atomic():
        save(name=too_long)
    monkeypatch.setattr(catalog, "record", _raise(OperationalError("gone")))
    with pytest.raises(OperationalError):
        save()
    assert files_in(root()) == []
    assert not Change.objects.exists()


def test_without_the_database_nothing_is_stored(database_away: Any, files_in: FilesIn) -> None:
    with database_away():
        with pytest.raises(OperationalError):
            save()
        with pytest.raises(OperationalError):
            catalog.add(ContentFile(b"x"), "photos/x.txt")
    assert files_in(root()) == []


def test_bytes_stay_when_nobody_knows_whether_the_row_was_committed(
    monkeypatch: pytest.MonkeyPatch, agree: Agree
) -> None:
    real = connection._commit

    def lost() -> None:
        real()
        raise OperationalError("the connection died")

    with monkeypatch.context() as patch:
        patch.setattr(connection, "_commit", lost)
        with pytest.raises(OperationalError):
            save()
    connection.close()
    agree()
    assert MediaFile.objects.count() == 1


def test_add_writes_one_row(agree: Agree) -> None:
    catalog.add(ContentFile(b"x"), "photos/x.txt")
    assert MediaFile.objects.count() == Change.objects.count() == 1
    agree()


def test_what_the_catalog_could_not_find_again_gets_no_row(tmp_path: Path) -> None:
    elsewhere = VolumeStorage(location=tmp_path, sentinel_id=False)
    name = elsewhere.save("a.txt", ContentFile(b"x"))
    assert not MediaFile.objects.exists()
    elsewhere.delete(name)
    assert not (tmp_path / name).exists()
    VolumeStorage().save("a.txt", ContentFile(b"x"))  # made with the arguments of STORAGES["default"]
    assert MediaFile.objects.get().storage == "default"


def test_derived_files_have_no_rows() -> None:
    derived = {"BACKEND": "tribrick.storage.DerivedStorage"}
    with override_settings(STORAGES={**settings.STORAGES, "derived": derived}):
        vars(storages).update(backends=settings.STORAGES, _storages={})  # 4.2 loses overridden OPTIONS
        assert isinstance(storages["derived"], DerivedStorage)
        storages["derived"].save("thumb.jpg", ContentFile(b"x"))
        assert not MediaFile.objects.exists()
        storages["derived"].delete("thumb.jpg")
        assert not (root() / "derived/thumb.jpg").exists()


def test_a_second_storage_is_noted_by_its_key(tmp_path: Path) -> None:
    other = {"BACKEND": "tribrick.storage.VolumeStorage", "OPTIONS": {"location": str(tmp_path), "sentinel_id": False}}
    with override_settings(STORAGES={**settings.STORAGES, "other": other}):
        vars(storages).update(backends=settings.STORAGES, _storages={})  # 4.2 loses overridden OPTIONS
        name = storages["other"].save("a.txt", ContentFile(b"x"))
        assert MediaFile.objects.get().storage == "other"
        catalog.delete(name)
        assert not (tmp_path / name).exists()


KILL = """
import os
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.db import connection
from tribrick import catalog
from tribrick.models import MediaFile
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
    "bytes": "VolumeStorage, '_write'",
    "row": "MediaFile, 'save'",
    "change": "catalog, '_change'",
    "commit": "connection, '_commit'",
}


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("step", STEPS)
def test_killed_in_a_save(step: str, after: bool, process: Process, files_in: FilesIn, agree: Agree) -> None:
    done = process(f"{KILL}kill({STEPS[step]}, {after})\ndefault_storage.save('a.txt', ContentFile(b'x'))\nos._exit(1)")
    assert done.returncode == 9, done.stderr
    if step == "commit" and after:
        assert MediaFile.objects.count() == 1
        agree()
    else:
        assert not MediaFile.objects.exists()
        assert len(files_in(root())) == (0 if step == "bytes" and not after else 1)
        agree(files_in(root()))


# Several files and the site's own rows


def test_together_all_of_it_or_nothing(files_in: FilesIn, agree: Agree, user: Any) -> None:
    def store() -> None:
        save(name="photos/a.txt")
        with catalog.together():
            catalog.add(ContentFile(b"x"), "photos/b.txt")
            catalog.replace(old, ContentFile(b"y"))
        user.first_name = "Ada"
        user.save()

    old = catalog.add(ContentFile(b"x"), "photos/x.txt")
    with contextlib.suppress(ZeroDivisionError), catalog.together():
        store()
        assert len(files_in(root())) == 4
        raise ZeroDivisionError
    assert files_in(root()) == [old.name]
    agree()
    with catalog.together():
        store()
        with contextlib.suppress(ZeroDivisionError), catalog.together():  # this part fails alone
            save()
            raise ZeroDivisionError
    user.refresh_from_db()
    assert user.first_name == "Ada"
    assert MediaFile.objects.count() == len(files_in(root())) == 4
    agree()


def test_together_keeps_what_may_be_committed(monkeypatch: pytest.MonkeyPatch, agree: Agree) -> None:
    real = connection._commit

    def lost() -> None:
        real()
        raise OperationalError("the connection died")

    with monkeypatch.context() as patch:
        patch.setattr(connection, "_commit", lost)
        with pytest.raises(OperationalError), catalog.together():
            save()
    connection.close()
    agree()
    assert MediaFile.objects.count() == 1


def test_together_keeps_what_was_committed_when_a_hook_fails(agree: Agree, user: Any) -> None:
    """The site's own work after the COMMIT is refused by the database, which is not about the COMMIT."""

    def hook() -> None:
        type(user).objects.create_user(user.username)

    def store() -> None:
        save()
        transaction.on_commit(hook)

    with pytest.raises(IntegrityError), catalog.together():
        store()
    assert MediaFile.objects.count() == 1
    agree()


# Deleting


def test_a_delete_belongs_to_the_transaction(agree: Agree) -> None:
    name = save()
    with transaction.atomic():
        default_storage.delete(name)
        assert MediaFile.objects.get().state == "deleted"
        transaction.set_rollback(True)
    assert MediaFile.objects.get().state == "stored"
    agree()
    with transaction.atomic():
        default_storage.delete(name)
        assert (root() / name).exists()
    assert MediaFile.objects.get().state == "purged"
    agree()
    default_storage.delete(name)
    agree()


def test_a_delete_without_the_volume_is_finished_later(agree: Agree) -> None:
    name = save()
    sentinel = root() / ".tribrick-volume"
    sentinel.rename(root().parent / "put-away")
    try:
        default_storage.delete(name)
        with pytest.raises(StorageUnavailable):
            catalog.finish_deletes()
    finally:
        (root().parent / "put-away").rename(sentinel)
    assert (root() / name).exists()
    assert catalog.finish_deletes() == (1, 0)
    agree()


def test_a_delete_without_the_database_touches_nothing(database_away: Any, agree: Agree) -> None:
    name = save()
    with database_away(), pytest.raises(OperationalError):
        default_storage.delete(name)
    agree()


@pytest.mark.parametrize("spelling", ["./{}", "photos/../{}", "{}/", "{}/."])
def test_another_spelling_is_the_same_file(spelling: str, agree: Agree) -> None:
    name = save()
    default_storage.delete(spelling.format(name))
    assert MediaFile.objects.get().state == "purged"
    agree()


def test_files_without_rows_go_at_once() -> None:
    (root() / "old.txt").write_bytes(b"from before")
    with transaction.atomic():
        default_storage.delete("old.txt")
        assert not (root() / "old.txt").exists()
    assert not Change.objects.exists()


# Files opened for writing


def test_a_written_file_has_a_row(agree: Agree) -> None:
    with default_storage.open("papers/list.txt", "wb") as file:
        file.write(b"abc")
        assert not MediaFile.objects.exists()
    with default_storage.open("papers/./other.txt", "w+b") as file:
        file.write(b"abcdef" * 400_000)
        file.seek(2)
        file.write(b"XX")
    rows = {row.name: row for row in MediaFile.objects.all()}
    assert set(rows) == {"papers/list.txt", "papers/other.txt"}
    assert rows["papers/list.txt"].original == "list.txt"
    for name, row in rows.items():
        data = (root() / name).read_bytes()
        assert (row.sha256, row.size) == (hashlib.sha256(data).hexdigest(), len(data))
    agree()


def test_a_written_file_without_row_is_no_file(monkeypatch: pytest.MonkeyPatch, files_in: FilesIn) -> None:
    file = default_storage.open("papers/list.txt", "wb")
    file.write(b"abc")
    monkeypatch.setattr(catalog, "record", _raise(OperationalError("gone")))
    with pytest.raises(OperationalError):
        file.close()
    assert files_in(root()) == []


def test_a_dead_name_is_not_written_again(files_in: FilesIn) -> None:
    with default_storage.open("papers/list.txt", "wb") as file:
        file.write(b"abc")
    default_storage.delete("papers/list.txt")
    for spelling in ("papers/list.txt", "papers/../papers/list.txt"):
        with pytest.raises(FileExistsError, match="was deleted"):
            default_storage.open(spelling, "wb")
    assert files_in(root()) == []


def _raise(error: BaseException) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call
