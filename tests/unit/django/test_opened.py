"""Files opened from a volume: reading, and new files published at close."""

from __future__ import annotations

import contextlib
import errno
import gc
import io
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.files.base import ContentFile
from django.http import FileResponse
from PIL import Image

from tribrick.storage import StorageFull, StorageUnavailable, VolumeStorage, opened
from tribrick.storage.saving import TEMPORARY

FilesIn = Callable[[Path], list[str]]


@pytest.fixture
def storage(volume: Path) -> VolumeStorage:
    return VolumeStorage(location=volume, base_url="/media/")


SOURCES = str(Path(__file__).resolve().parents[3] / "src")


class Failing:
    """Stands for the module's ``os``: one kind of call fails as often as told."""

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


def descriptors(volume: Path) -> list[str]:
    found = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
    return [path for path in found if path.startswith(str(volume))]


# Reading


def test_reading_is_as_with_any_file(storage: VolumeStorage, volume: Path) -> None:
    data = os.urandom(2_500_000)
    name = storage.save("photos/a.bin", ContentFile(data))
    with storage.open(name) as file, (volume / name).open("rb") as plain:
        for step in (
            lambda f: f.read(10),
            lambda f: f.seek(-5, os.SEEK_END),
            lambda f: f.read(),
            lambda f: f.read(1),
            lambda f: f.seek(7),
            lambda f: f.seek(3, os.SEEK_CUR),
            lambda f: f.tell(),
            lambda f: f.read(1_200_000),
            lambda f: f.readline(),
            lambda f: f.seek(0) or f.read(),
            lambda f: f.seekable() and f.readable(),
        ):
            assert step(file) == step(plain)
        assert file.size == len(data)
        assert b"".join(file.chunks(100_000)) == data
        with pytest.raises(io.UnsupportedOperation):
            file.write(b"x")
    assert file.closed
    assert descriptors(volume) == []
    with pytest.raises(ValueError, match="closed"):
        file.read()


def test_nothing_leads_around_the_deadline(storage: VolumeStorage) -> None:
    """A server that is given a descriptor or a path would read the mount on its own."""
    name = storage.save("photos/a.bin", ContentFile(b"x"))
    with storage.open(name) as file:
        with pytest.raises(io.UnsupportedOperation):
            file.fileno()
        assert not os.path.isabs(file.name)
        assert not hasattr(file.file, "name")


def test_text(storage: VolumeStorage) -> None:
    name = storage.save("docs/a.txt", ContentFile("سلام\nzwei"))
    with storage.open(name, "r") as file:
        assert list(file.file) == ["سلام\n", "zwei"]
    with storage.open(name, "rt") as file:
        assert file.read() == "سلام\nzwei"


def test_libraries_read_it(storage: VolumeStorage, png: Callable[..., bytes]) -> None:
    data = png(7)
    name = storage.save("photos/a.png", ContentFile(data))
    with storage.open(name) as file, Image.open(file) as image:
        image.load()
        assert image.size == (64, 48)
    response = FileResponse(storage.open(name))
    assert response["Content-Length"] == str(len(data))
    assert b"".join(response.streaming_content) == data  # type: ignore[arg-type]
    response.close()


def test_a_copy_is_stored_from_an_open_file(storage: VolumeStorage, volume: Path) -> None:
    data = os.urandom(1_500_000)
    name = storage.save("photos/a.bin", ContentFile(data))
    with storage.open(name) as file:
        copy = storage.save("photos/b.bin", file)
    assert (volume / copy).read_bytes() == data


def test_a_closed_file_is_opened_again(storage: VolumeStorage, volume: Path) -> None:
    """``FieldFile.open`` counts on it, and with it every library of thumbnails."""
    name = storage.save("photos/a.bin", ContentFile(b"0123"))
    file = storage.open(name)
    assert file.read() == b"0123"
    assert file.open().read() == b"0123"
    file.close()
    assert file.open("rb").read() == b"0123"
    file.close()
    copy = storage.save("photos/b.bin", file)
    assert (volume / copy).read_bytes() == b"0123"
    with pytest.raises(io.UnsupportedOperation):
        file.open("wb")
    assert descriptors(volume) == []


def test_directories_are_no_files(storage: VolumeStorage, volume: Path) -> None:
    (volume / "photos").mkdir()
    with pytest.raises(IsADirectoryError):
        storage.open("photos")
    assert descriptors(volume) == []


def test_a_stale_descriptor_is_opened_again(
    storage: VolumeStorage, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = os.urandom(700_000)
    name = storage.save("photos/a.bin", ContentFile(data))
    with storage.open(name) as file:
        start = file.read(300_000)
        monkeypatch.setattr(opened, "os", Failing("pread", errno.ESTALE))
        assert start + file.read() == data
    with storage.open(name) as file:
        monkeypatch.setattr(opened, "os", Failing("pread", errno.ESTALE, times=2))
        with pytest.raises(StorageUnavailable):
            file.read()
    assert descriptors(volume) == []


def test_errors_while_reading(storage: VolumeStorage, volume: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name = storage.save("photos/a.bin", ContentFile(b"x" * 10))
    file = storage.open(name)
    monkeypatch.setattr(opened, "os", Failing("pread", errno.ENOTCONN))
    with pytest.raises(StorageUnavailable):
        file.read()
    assert file.read() == b"x" * 10  # the mount is back
    file.close()
    assert descriptors(volume) == []


def test_a_forgotten_file_is_closed(storage: VolumeStorage, volume: Path) -> None:
    name = storage.save("photos/a.bin", ContentFile(b"x"))
    storage.open(name)
    gc.collect()
    assert descriptors(volume) == []


def test_a_file_left_open_does_not_hold_up_the_end_of_the_process(storage: VolumeStorage) -> None:
    name = storage.save("photos/a.bin", ContentFile(b"x"))
    code = (
        "from django.conf import settings\n"
        "settings.configure(TRIBRICK={'SENTINEL_ID': False})\n"
        "from tribrick.storage import VolumeStorage\n"
        f"storage = VolumeStorage({storage.location!r}, base_url='/media/')\n"
        f"file = storage.open({name!r})\n"
        "print(file.read())\n"
        "file.itself = file\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"PYTHONPATH": SOURCES},
        capture_output=True,
        text=True,
        timeout=30,
        check=True,
    )
    assert (done.stdout, done.stderr) == ("b'x'\n", "")


# New files


@pytest.mark.parametrize("mode", ["w", "wb", "xb", "w+b", "x+"])
def test_a_new_file_appears_whole_when_closed(
    storage: VolumeStorage, volume: Path, files_in: FilesIn, mode: str
) -> None:
    (volume / "docs").mkdir()
    piece: Any = b"0123456789" if "b" in mode else "0123456789"
    file = storage.open("docs/a.txt", mode)
    for _ in range(100_000):
        file.write(piece)
    if "+" in mode:
        file.seek(5)
        assert file.read(3) == piece[5:8]
    (rest,) = files_in(volume)
    assert TEMPORARY.fullmatch(os.path.basename(rest))
    assert storage.listdir("docs") == ([], [])  # nobody is shown the unfinished one
    assert not storage.exists("docs/a.txt")
    file.close()
    assert files_in(volume) == ["docs/a.txt"]
    assert (volume / "docs/a.txt").read_bytes() == b"0123456789" * 100_000
    assert (volume / "docs/a.txt").stat().st_nlink == 1
    assert (volume / "docs/a.txt").stat().st_mode & 0o777 == 0o644
    assert descriptors(volume) == []
    file.close()  # once more is no error


def test_the_form_is_durable(storage: VolumeStorage, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the file has its final name comes an fsync of the still open file."""
    recorder = Failing("", 0)
    monkeypatch.setattr(opened, "os", recorder)
    with storage.open("docs/a.txt", "wb") as file:
        file.write(b"x")
    order = [call for call in recorder.calls if call in {"pwrite", "link", "unlink", "fsync", "close", "rename"}]
    assert order == ["pwrite", "fsync", "link", "unlink", "fsync", "close"]


def test_a_name_that_was_taken_meanwhile_is_not_overwritten(
    storage: VolumeStorage, volume: Path, files_in: FilesIn
) -> None:
    first, second = storage.open("docs/a.txt", "wb"), storage.open("docs/a.txt", "wb")
    first.write(b"first")
    second.write(b"second")
    second.close()
    with pytest.raises(FileExistsError):
        first.close()
    assert files_in(volume) == ["docs/a.txt"]
    assert (volume / "docs/a.txt").read_bytes() == b"second"
    assert descriptors(volume) == []


def test_an_error_discards(storage: VolumeStorage, volume: Path, files_in: FilesIn) -> None:
    with pytest.raises(KeyError), storage.open("docs/a.txt", "wb") as file:  # noqa: PT012
        file.write(b"x" * 1_000_000)
        file.write(b"y")
        raise KeyError
    assert files_in(volume) == []
    assert file.closed
    forgotten = storage.open("docs/b.txt", "w")
    forgotten.write("x" * 1_000_000)
    del forgotten
    gc.collect()
    assert files_in(volume) == []
    assert descriptors(volume) == []


@pytest.mark.parametrize("kind", ["pwrite", "fsync", "link", "unlink", "close"])
def test_a_failed_close_leaves_nothing(
    storage: VolumeStorage, volume: Path, files_in: FilesIn, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    file = storage.open("docs/a.txt", "wb")
    file.write(b"x")
    failing = Failing(kind, errno.ENOSPC)
    monkeypatch.setattr(opened, "os", failing)
    with pytest.raises(StorageFull):
        file.close()
    assert failing.times == 0
    assert files_in(volume) == []
    assert file.closed
    monkeypatch.undo()
    with storage.open("docs/a.txt", "wb") as again:
        again.write(b"x")
    assert files_in(volume) == ["docs/a.txt"]


def test_the_second_fsync_failing_takes_the_name_back(
    storage: VolumeStorage, volume: Path, files_in: FilesIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Second(Failing):
        def __getattr__(self, name: str) -> Any:
            if name == "fsync" and "link" in self.calls:
                self.kind = "fsync"
            return super().__getattr__(name)

    file = storage.open("docs/a.txt", "wb")
    file.write(b"x")
    monkeypatch.setattr(opened, "os", Second("", errno.EIO))
    with pytest.raises(StorageUnavailable):
        file.close()
    assert files_in(volume) == []


def test_truncate(storage: VolumeStorage, volume: Path) -> None:
    with storage.open("docs/a.bin", "w+b") as file:
        file.write(b"0123456789")
        file.seek(0, os.SEEK_END)
        assert file.tell() == 10
        file.truncate(4)
    assert (volume / "docs/a.bin").read_bytes() == b"0123"
