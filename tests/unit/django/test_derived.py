"""DerivedStorage: exact names, replaced whole, on the same volume."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files.base import ContentFile
from django.core.files.storage import storages
from django.db.migrations.writer import MigrationWriter
from django.test import override_settings
from django.utils.module_loading import import_string

from tribrick import names
from tribrick.storage import DerivedStorage, StorageFull, StorageUnavailable, VolumeStorage, derived, saving

FilesIn = Callable[[Path], list[str]]


@pytest.fixture
def storage(volume: Path) -> Iterator[DerivedStorage]:
    with override_settings(MEDIA_ROOT=str(volume), MEDIA_URL="/media/"):
        yield DerivedStorage()


def test_it_lies_below_the_media(storage: DerivedStorage, volume: Path) -> None:
    assert storage.save("a/x.jpg", ContentFile(b"one")) == "a/x.jpg"
    assert (volume / "derived/a/x.jpg").read_bytes() == b"one"
    assert storage.url("a/x.jpg") == "/media/derived/a/x.jpg"
    assert storage.path("a/x.jpg") == str(volume / "derived/a/x.jpg")
    assert storage.exists("a/x.jpg")
    assert storage.size("a/x.jpg") == 3
    assert storage.listdir("") == (["a"], [])
    assert storage.listdir("a") == ([], ["x.jpg"])
    with storage.open("a/x.jpg") as file:
        assert (file.name, file.read()) == ("a/x.jpg", b"one")
    storage.delete("a/x.jpg")
    storage.delete("a/x.jpg")
    assert not storage.exists("a/x.jpg")
    with override_settings(MEDIA_URL="https://cdn.example/m/"):
        assert storage.url("a/x.jpg") == "https://cdn.example/m/derived/a/x.jpg"


def test_saving_replaces(storage: DerivedStorage, volume: Path, files_in: FilesIn) -> None:
    storage.save("x.jpg", ContentFile(b"one"))
    before = (volume / "derived/x.jpg").stat().st_ino
    with storage.open("x.jpg") as old:
        stored = storage.store(ContentFile(b"x" * 3_000_000), "x.jpg")
        assert old.read() == b"one"  # who reads the old one reads it to its end
    assert (stored.name, stored.size) == ("x.jpg", 3_000_000)
    assert files_in(volume) == ["derived/x.jpg"]
    assert (volume / "derived/x.jpg").stat().st_ino != before
    assert (volume / "derived/x.jpg").stat().st_mode & 0o777 == 0o644


def test_readers_never_see_half_a_file(storage: DerivedStorage) -> None:
    contents = [bytes([65 + number]) * (1_100_000 + number) for number in range(4)]
    storage.save("x.bin", ContentFile(contents[0]))
    done = threading.Event()
    wrong: list[int] = []
    reads = 0

    def write(data: bytes) -> None:
        for _ in range(10):
            storage.save("x.bin", ContentFile(data))

    def read() -> None:
        nonlocal reads
        while not done.is_set():
            with storage.open("x.bin") as file:
                data = file.read()
            reads += 1
            if data not in contents:
                wrong.append(len(data))

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=write, args=(data,)) for data in contents]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join(60)
    done.set()
    reader.join(10)
    assert reads > 5
    assert wrong == []


@pytest.mark.parametrize(
    "name", ["photo (1) é 😀.jpg", "a/b/x.jpg.100x100_q85_crop.jpg", "x-token.max-165x165.jpg", "%20"]
)
def test_names_are_exact(storage: DerivedStorage, volume: Path, name: str) -> None:
    assert storage.save(name, ContentFile(b"x")) == name
    assert (volume / "derived" / name).read_bytes() == b"x"
    assert storage.get_available_name(name) == name
    assert storage.exists(name)


@pytest.mark.parametrize(
    "name",
    ["../x", "/etc/x", "a/../../x", ".hidden", "a/.hidden/x", "a\0b", "a\nb", "a/\x7f.jpg", "\udcff", ".", "..", ""],
)
def test_other_names_are_refused(storage: DerivedStorage, volume: Path, files_in: FilesIn, name: str) -> None:
    refused = (SuspiciousFileOperation, ValueError)
    for call in (storage.exists, storage.open, storage.size, storage.delete):
        with pytest.raises(refused):
            call(name)
    with pytest.raises(refused):
        storage._save(name, ContentFile(b"x"))
    assert files_in(volume) == []


def test_unique_names(volume: Path, files_in: FilesIn) -> None:
    """A library that saves again before it deletes the old one keeps the new one."""
    storage = DerivedStorage(location=volume / "derived", root=volume, base_url="/d", unique_names=True)
    old = storage.save("a/x.100x100.jpg", ContentFile(b"old"))
    new = storage.save("a/x.100x100.jpg", ContentFile(b"new"))
    storage.delete(old)
    assert files_in(volume) == [f"derived/{new}"]
    assert names.parse(new, 2, 1)
    assert len(storage.get_available_name("a/" + "x" * 100, max_length=40)) <= 40
    with storage.open(new) as file:
        assert file.read() == b"new"


def test_lengths(storage: DerivedStorage) -> None:
    assert storage.get_available_name("x" * 100, max_length=100) == "x" * 100
    with pytest.raises(SuspiciousFileOperation, match="longer than 99"):
        storage.get_available_name("x" * 100, max_length=99)


def test_names_of_model_fields_are_made_safe(storage: DerivedStorage) -> None:
    assert storage.get_valid_name("a photo (1).JPG") == "a_photo_1.JPG"
    assert storage.generate_filename("d/a photo.jpg") == "d/a_photo.jpg"


def test_the_sentinel_is_the_volume_s(storage: DerivedStorage, volume: Path, files_in: FilesIn) -> None:
    storage.save("x.jpg", ContentFile(b"one"))
    (volume / ".tribrick-volume").rename(volume.parent / "sentinel")
    for call in (
        lambda: storage.save("y.jpg", ContentFile(b"x")),
        lambda: storage.exists("x.jpg"),
        lambda: storage.open("x.jpg"),
        lambda: storage.delete("x.jpg"),
        storage.verify,
    ):
        with pytest.raises(StorageUnavailable):
            call()
    assert files_in(volume) == ["derived/x.jpg"]


def test_other_places(volume: Path, tmp_path: Path) -> None:
    private = DerivedStorage(location=volume / "private" / "derived", root=volume, base_url="/p")
    private.save("x.jpg", ContentFile(b"x"))
    assert (volume / "private/derived/x.jpg").exists()
    assert private.url("x.jpg") == "/p/x.jpg"
    # Not below MEDIA_ROOT: the location is a volume of its own.
    with pytest.raises(StorageUnavailable):
        DerivedStorage(location=tmp_path / "cache").save("x.jpg", ContentFile(b"x"))
    (tmp_path / "cache").mkdir()
    plain = DerivedStorage(location=tmp_path / "cache", sentinel_id=False)
    assert plain.save("x.jpg", ContentFile(b"x")) == "x.jpg"
    assert (tmp_path / "cache/x.jpg").exists()
    with pytest.raises(ImproperlyConfigured, match="not in the volume"):
        DerivedStorage(location=tmp_path / "cache", root=volume).exists("x")


def test_it_shares_the_guard_of_its_volume(storage: DerivedStorage, volume: Path) -> None:
    assert storage._mount().guard is VolumeStorage(location=volume)._mount().guard


class Failing:
    def __init__(self, kind: str, number: int, times: int = 1) -> None:
        self.kind, self.number, self.times = kind, number, times
        self.calls: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if not callable(real) or isinstance(real, type):
            return real

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            if name == self.kind and self.times:
                self.times -= 1
                raise OSError(self.number, os.strerror(self.number))
            return real(*args, **kwargs)

        return call


@pytest.mark.parametrize("kind", ["write", "close", "rename"])
def test_a_failed_save_keeps_the_old_one(
    storage: DerivedStorage, volume: Path, files_in: FilesIn, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    storage.save("x.jpg", ContentFile(b"old"))
    failing = Failing(kind, errno.ENOSPC)
    monkeypatch.setattr(saving, "os", failing)
    monkeypatch.setattr(derived, "os", failing)
    with pytest.raises(StorageFull):
        storage.save("x.jpg", ContentFile(b"new"))
    assert files_in(volume) == ["derived/x.jpg"]
    assert (volume / "derived/x.jpg").read_bytes() == b"old"


def test_a_stale_handle_is_tried_once_more_under_the_same_name(
    storage: DerivedStorage, volume: Path, files_in: FilesIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(derived, "os", Failing("rename", errno.ESTALE))
    assert storage.save("x.jpg", ContentFile(b"new")) == "x.jpg"
    assert files_in(volume) == ["derived/x.jpg"]


def test_no_fsync(storage: DerivedStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Failing("", 0)
    monkeypatch.setattr(saving, "os", recorder)
    storage.save("x.jpg", ContentFile(b"x" * 40_000_000))
    assert "write" in recorder.calls
    assert "fsync" not in recorder.calls


@pytest.mark.parametrize("mode", ["w", "wb", "a", "r+b"])
def test_it_is_saved_not_opened_for_writing(storage: DerivedStorage, mode: str) -> None:
    with pytest.raises(OSError, match="saved"):
        storage.open("x.jpg", mode)


def test_it_is_an_alias_and_goes_into_migrations(volume: Path) -> None:
    setting = {"derived": {"BACKEND": "tribrick.storage.DerivedStorage", "OPTIONS": {"base_url": "/d/"}}}
    with override_settings(STORAGES=setting):
        assert storages["derived"].url("x") == "/d/x"
    text, _ = MigrationWriter.serialize(DerivedStorage(location="/srv/media/derived"))
    assert text == "tribrick.storage.DerivedStorage(location='/srv/media/derived')"
    path, args, options = DerivedStorage(root="/srv/media").deconstruct()  # type: ignore[attr-defined]
    assert isinstance(import_string(path)(*args, **options), DerivedStorage)  # as Wagtail's tasks do
