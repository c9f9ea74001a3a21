"""Several storages, some below the directory of another: each keeps to its own files."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.files.base import ContentFile
from django.core.files.storage import storages
from django.test import override_settings

from tribrick import audit, catalog, copies
from tribrick.errors import StorageUnavailable
from tribrick.models import MediaFile
from tribrick.restore import Restore
from tribrick.storage import VolumeStorage
from tribrick.storage.volume import StoredFile


@pytest.fixture(autouse=True)
def _all_files_are_old(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "settled_before", lambda: datetime.now(timezone.utc) + timedelta(hours=1))
    monkeypatch.setattr(audit, "YOUNG", timedelta(hours=-1))


def volume(location: Path | str, **options: Any) -> dict[str, Any]:
    return {
        "BACKEND": "tribrick.storage.VolumeStorage",
        "OPTIONS": {"location": str(location), "sentinel_id": False, **options},
    }


@pytest.fixture
def nested() -> Iterator[None]:
    """Renditions and a private directory below the default storage's."""
    with override_settings(
        STORAGES={
            **settings.STORAGES,
            "renditions": {"BACKEND": "tribrick.storage.DerivedStorage", "OPTIONS": {"unique_names": True}},
            "private": volume(f"{settings.MEDIA_ROOT}/private", base_url="/private/"),
        }
    ):
        yield


@pytest.fixture
def apart(tmp_path: Path) -> Iterator[Path]:
    """Two directories, each with a file logo.png that came from elsewhere; the catalog has that of `a`."""
    for place in "ab":
        (tmp_path / place).mkdir()
        (tmp_path / place / "logo.png").write_bytes(place.encode())
    with override_settings(STORAGES={**settings.STORAGES, "a": volume(tmp_path / "a"), "b": volume(tmp_path / "b")}):
        catalog.record(StoredFile("logo.png", hashlib.sha256(b"a").hexdigest(), 1), storage="a")
        yield tmp_path


def test_sweep_and_audit_of_one_leave_the_others_alone(nested: None) -> None:
    there = Path(settings.MEDIA_ROOT, "private")
    there.mkdir()
    rendition = storages["renditions"].save("images/x.jpg", ContentFile(b"x"))
    private = storages["private"].save("z/z.jpg", ContentFile(b"z"))
    stray = VolumeStorage().store(ContentFile(b"of a killed process"), "photos/left.jpg").name
    found = audit.strays("default")
    assert [one.name for one in found.own] == [stray] and not found.foreign
    assert audit.sweep(found, "default", accept=10).quarantined == [stray]
    assert storages["renditions"].exists(rendition) and storages["private"].exists(private)
    whole = copies.PathCopy("brick", settings.MEDIA_ROOT, writable=False)
    report = audit.Audit(audit.CatalogSource("default"), [whole]).run()
    assert [one.name for one in report.findings] == [], "a copy of the whole directory holds more than this storage"


def test_a_restore_of_one_does_not_adopt_the_files_of_another(nested: None, tmp_path: Path) -> None:
    Path(settings.MEDIA_ROOT, "private").mkdir()
    private = storages["private"].save("z/z.jpg", ContentFile(b"z"))
    own = VolumeStorage().save("photos/x.jpg", ContentFile(b"x"))
    tree = tmp_path / "current"
    shutil.copytree(settings.MEDIA_ROOT, tree)
    for name in (own, f"private/{private}"):
        Path(settings.MEDIA_ROOT, name).unlink()
    done = Restore(tree, apply=True).run()
    assert (done.restored, done.adopted, done.refused) == ([own], [], {})
    assert not Path(settings.MEDIA_ROOT, "private", private).exists()
    done = Restore(tree / "private", alias="private", apply=True).run()
    assert (done.restored, done.adopted, done.refused) == ([private], [], {})
    assert set(MediaFile.objects.values_list("name", "storage")) == {(own, "default"), (private, "private")}


def test_a_restore_writes_no_file_that_cannot_get_a_row(apart: Path, tmp_path: Path) -> None:
    """Its name is another file's, in another directory: what was written would be served, and nobody knew of it."""
    (tmp_path / "b/logo.png").unlink()
    done = Restore(tmp_path / "a", alias="b", apply=True).run()
    assert list(done.refused) == ["logo.png"] and list((tmp_path / "b").iterdir()) == []
    assert list(Restore(tmp_path / "a", alias="b").run().refused) == ["logo.png"], "it is said before, too"


def test_what_a_storage_without_rows_made_is_no_stray(nested: None) -> None:
    rendition = storages["renditions"].save("images/x.jpg", ContentFile(b"x"))
    found = audit.strays("renditions")
    assert not found.own and [one.name for one in found.foreign] == [rendition]
    assert audit.sweep(found, "renditions", accept=10).quarantined == []


def test_a_storage_with_the_same_directory_and_another_address_keeps_rows() -> None:
    """As django-filer's private storage, which is made by hand."""
    for storage in (VolumeStorage(base_url="/elsewhere/"), VolumeStorage(location=settings.MEDIA_ROOT)):
        assert storage.alias == "default"
        name = storage.save("filer/y.jpg", ContentFile(b"y"))
        assert MediaFile.objects.get(name=name).storage == "default"


def test_a_delete_in_one_directory_does_not_reach_another(apart: Path) -> None:
    storages["b"].delete("logo.png")
    assert (apart / "a/logo.png").exists() and not (apart / "b/logo.png").exists()
    assert MediaFile.objects.get(name="logo.png").state == "stored"


def test_sweep_does_not_take_another_directorys_tombstone_for_its_own(apart: Path) -> None:
    catalog.delete(MediaFile.objects.get(name="logo.png"))
    for expired in (False, True):
        if expired:
            MediaFile.objects.all().delete()
        found = audit.strays("b")
        assert not found.dead and [one.name for one in found.foreign] == ["logo.png"], expired
        audit.sweep(found, "b")
        assert (apart / "b/logo.png").exists()
    (apart / "a/logo.png").write_bytes(b"a")
    assert [one.name for one in audit.strays("a").dead] == ["logo.png"], "its own is known to be dead"


def test_a_name_that_another_directory_has_is_not_adopted(apart: Path) -> None:
    (only,) = audit.adopt(audit.strays("b"), "b", apply=True)
    assert "another storage" in only.refused
    assert MediaFile.objects.get(name="logo.png").storage == "a"


def test_what_a_client_says_of_the_type_is_kept_only_if_it_can_be() -> None:
    content = ContentFile(b"x", name="a.txt")
    content.content_type = "text/\0plain" + "x" * 200  # type: ignore[attr-defined]
    name = storages["default"].save("photos/a.txt", content)
    assert MediaFile.objects.get(name=name).content_type == ("text/plain" + "x" * 200)[:100]
    row = catalog.add(ContentFile(b"x"), "photos/a.txt", content_type="\0" + "y" * 200)
    assert row.content_type == "y" * 100


def test_one_storage_that_is_gone_does_not_stop_the_deletes_of_others(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [catalog.add(ContentFile(b"x"), "photos/x.jpg") for _ in range(3)]
    with monkeypatch.context() as patched:
        patched.setattr(catalog, "purge", lambda _file: None)
        for row in rows:
            catalog.delete(row)
    MediaFile.objects.filter(pk=rows[0].pk).update(storage="gone")
    assert catalog.finish_deletes() == (2, 1)
    states = dict(MediaFile.objects.values_list("pk", "state"))
    assert [states[row.pk] for row in rows] == ["deleted", "purged", "purged"]


def test_one_storage_that_is_away_does_not_stop_the_deletes_of_others(
    apart: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ours = catalog.add(ContentFile(b"x"), "photos/x.jpg")
    with monkeypatch.context() as patched:
        patched.setattr(catalog, "purge", lambda _file: None)
        catalog.delete(MediaFile.objects.get(name="logo.png"))
        catalog.delete(ours)
    os.rename(apart / "a", apart / "unmounted")
    with pytest.raises(StorageUnavailable):
        catalog.finish_deletes()
    assert MediaFile.objects.get(pk=ours.pk).state == "purged"
