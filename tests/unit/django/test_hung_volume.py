"""A volume that hangs: single calls, a FIFO in the tree, and a real FUSE mount that answers nothing."""

from __future__ import annotations

import contextlib
import ctypes
import os
import random
import struct
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.files.base import ContentFile
from django.test import override_settings

from tribrick import sentinel
from tribrick.storage import DerivedStorage, StorageUnavailable, VolumeStorage, guard, mount, opened, saving
from tribrick.storage import volume as module

FilesIn = Callable[[Path], list[str]]
DEADLINE = 0.25
SLACK = 1.0  # of a busy machine; a call that hangs does so until it is let go


@pytest.fixture(autouse=True)
def _short_deadline() -> Iterator[None]:
    with override_settings(TRIBRICK=settings.TRIBRICK | {"DEADLINE": DEADLINE}):
        yield


@pytest.fixture
def storage(volume: Path) -> VolumeStorage:
    return VolumeStorage(location=volume, base_url="/media/")


def until(condition: Callable[[], object], what: str) -> None:
    end = time.monotonic() + 15
    while not condition():
        assert time.monotonic() < end, f"not within 15 s: {what}"
        threading.Event().wait(0.005)


def descriptors(volume: Path) -> list[str]:
    found = []
    for entry in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            found.append(os.readlink(f"/proc/self/fd/{entry}"))
    return [path for path in found if path.startswith(str(volume))]


class Hanging:
    """Stands for the modules' ``os``: one kind of call hangs, before or after it was done."""

    WATCHED = frozenset(
        "open write pwrite pread fsync close unlink stat fstat link rename scandir statvfs mkdir ftruncate".split()
    )

    def __init__(self) -> None:
        self.kind = ""
        self.after = False
        self.only: Callable[[str], bool] = lambda _path: True
        self.gate = threading.Event()
        self.hung = 0
        self.calls: list[str] = []

    def hang(self, kind: str, *, after: bool = False, only: Callable[[str], bool] = lambda _path: True) -> None:
        self.kind, self.after, self.only = kind, after, only

    def let_go(self) -> None:
        self.kind = ""
        self.gate.set()

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in self.WATCHED:
            return real
        if name == "fsync":  # which a busy disk may keep longer than these deadlines

            def real(_descriptor: int) -> None:
                pass

        def call(*args: Any, **kwargs: Any) -> Any:
            self.calls.append(name)
            here = name == self.kind and self.only(str(args[0]))
            if here and not self.after:
                self._wait()
            result = real(*args, **kwargs)
            if here and self.after:
                self._wait()
            return result

        return call

    def _wait(self) -> None:
        self.hung += 1
        assert self.gate.wait(30), "the test never let go"


@pytest.fixture
def hanging(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hanging]:
    made = Hanging()
    for part in (module, mount, saving, opened, sentinel, guard):
        monkeypatch.setattr(part, "os", made)
    yield made
    made.let_go()
    wait_for_workers()


def wait_for_workers() -> None:
    until(lambda: not any(each.overdue or each._keeping for each in guard._guards.values()), "late calls returned")


def in_time(work: Callable[[], object], deadlines: float = 1.0) -> None:
    began = time.monotonic()
    with pytest.raises(StorageUnavailable):
        work()
    assert time.monotonic() - began < deadlines * DEADLINE + SLACK


def is_data(path: str) -> bool:
    return path.endswith((".bin", ".part"))


SAVE = ["open", "stat", "write", "fstat", "rename", "fsync", "close"]


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("size", [1000, 3_000_000], ids=["small", "large"])
@pytest.mark.parametrize("kind", SAVE)
def test_a_save_that_hangs_is_given_up_and_leaves_nothing(
    storage: VolumeStorage,
    volume: Path,
    files_in: FilesIn,
    hanging: Hanging,
    kind: str,
    size: int,
    after: bool,
) -> None:
    kept = storage.save("photos/kept.bin", ContentFile(b"kept"))
    hanging.hang(kind, after=after)
    in_time(lambda: storage.save("photos/lost.bin", ContentFile(b"x" * size)))
    assert hanging.hung == 1
    hanging.let_go()
    wait_for_workers()
    assert files_in(volume) == [kept]
    until(lambda: descriptors(volume) == [], "the descriptors were closed")
    name = storage.save("photos/next.bin", ContentFile(b"next"))
    assert files_in(volume) == sorted([kept, name])


def test_a_file_that_is_created_late_is_not_even_written(
    storage: VolumeStorage, volume: Path, files_in: FilesIn, hanging: Hanging
) -> None:
    hanging.hang("open", only=is_data)
    in_time(lambda: storage.save("photos/lost.bin", ContentFile(b"x")))
    hanging.calls.clear()
    hanging.let_go()
    wait_for_workers()
    assert "write" not in hanging.calls
    assert files_in(volume) == []


@pytest.mark.parametrize("kind", ["open", "write", "close"])
def test_a_derived_file_given_up_does_not_replace_the_old_one(
    volume: Path, files_in: FilesIn, hanging: Hanging, kind: str
) -> None:
    storage = DerivedStorage(location=volume / "derived", root=volume)
    storage.save("x.bin", ContentFile(b"old"))
    hanging.hang(kind, after=True)
    in_time(lambda: storage.save("x.bin", ContentFile(b"new")))
    hanging.let_go()
    wait_for_workers()
    assert files_in(volume) == ["derived/x.bin"]
    assert (volume / "derived/x.bin").read_bytes() == b"old"


CALLS: dict[str, Callable[[VolumeStorage, str], object]] = {
    "save": lambda storage, _name: storage.save("photos/b.bin", ContentFile(b"x")),
    "open": lambda storage, name: storage.open(name),
    "open for writing": lambda storage, _name: storage.open("photos/c.bin", "wb"),
    "delete": lambda storage, name: storage.delete(name),
    "exists": lambda storage, name: storage.exists(name),
    "size": lambda storage, name: storage.size(name),
    "listdir": lambda storage, _name: storage.listdir("photos"),
    "verify": lambda storage, _name: storage.verify(),
    "time": lambda storage, name: storage.get_modified_time(name),
}


@pytest.mark.parametrize("operation", CALLS)
def test_every_operation_is_given_up_and_then_refused_at_once(
    storage: VolumeStorage, volume: Path, files_in: FilesIn, hanging: Hanging, operation: str
) -> None:
    name = storage.save("photos/a.bin", ContentFile(b"x"))
    with override_settings(TRIBRICK=settings.TRIBRICK | {"DEADLINE": 30}):
        assert storage.exists(name)
    hanging.hang("open", only=lambda path: path == str(volume))
    statvfs = threading.Event()
    storage._mount().guard._probe = lambda: statvfs.wait(30)
    in_time(lambda: CALLS[operation](storage, name))
    calls = len(hanging.calls)
    for call in CALLS.values():
        in_time(lambda call=call: call(storage, name), deadlines=0)  # type: ignore[misc]
    in_time(lambda: DerivedStorage(location=volume / "derived", root=volume).exists("x"), deadlines=0)
    assert len(hanging.calls) == calls, "the mount was touched"
    hanging.let_go()
    statvfs.set()
    wait_for_workers()
    assert storage.exists(name)  # a late delete does nothing: the file may still be in use
    assert files_in(volume) == [name]
    assert descriptors(volume) == []


def test_a_late_delete_of_a_given_up_name_is_not_done(storage: VolumeStorage, volume: Path, hanging: Hanging) -> None:
    name = storage.save("photos/a.bin", ContentFile(b"x"))
    hanging.hang("stat")
    in_time(lambda: storage.delete(name))
    hanging.let_go()
    wait_for_workers()
    assert (volume / name).read_bytes() == b"x"


@pytest.mark.parametrize("fails", [True, False], ids=["source fails", "next step refused"])
def test_a_half_file_is_removed_once_the_mount_answers_again(
    storage: VolumeStorage, volume: Path, files_in: FilesIn, hanging: Hanging, fails: bool
) -> None:
    """Between two pieces of a large file the mount hangs for somebody else."""

    class Source(ContentFile):  # type: ignore[type-arg]
        def chunks(self, _size: int | None = None) -> Iterator[bytes]:
            yield b"x" * 10
            yield b"x" * 10
            yield b"x" * 10  # asked for before the second one is written
            hanging.hang("stat")
            with contextlib.suppress(StorageUnavailable):
                storage.exists("photos/other.bin")
            if fails:
                raise KeyError("the client has gone")
            yield b"x" * 10

    storage._mount().guard._probe = lambda: hanging.gate.wait(30)
    began = time.monotonic()
    with pytest.raises(KeyError if fails else StorageUnavailable):
        storage.save("photos/lost.bin", Source(b""))
    assert time.monotonic() - began < DEADLINE * 2 + SLACK
    assert len(files_in(volume)) == 1
    hanging.let_go()
    until(lambda: files_in(volume) == [], "the half file was removed")
    until(lambda: descriptors(volume) == [], "its descriptor was closed")


def test_a_slow_large_file_makes_progress(
    storage: VolumeStorage, volume: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The deadline is for each piece: the whole may take longer."""

    class Slow:
        def __getattr__(self, name: str) -> Any:
            return getattr(os, name)

        def write(self, descriptor: int, data: Any) -> int:
            threading.Event().wait(DEADLINE / 2)
            return os.write(descriptor, data)

    monkeypatch.setattr(saving, "os", Slow())
    began = time.monotonic()
    stored = storage.store(ContentFile(b"x" * 6 * saving.CHUNK), "photos/a.bin")
    assert time.monotonic() - began > 2 * DEADLINE
    assert stored.size == (volume / stored.name).stat().st_size


def test_a_large_file_is_flushed_as_it_grows(
    storage: VolumeStorage, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(saving, "FLUSH", 2 * saving.CHUNK)
    storage.save("photos/a.bin", ContentFile(b"x" * 5 * saving.CHUNK))
    written = [call for call in hanging.calls if call in {"write", "fsync"}]
    assert written == ["write", "write", "fsync", "write", "write", "fsync", "write", "fsync"]


def test_interrupted_saves_leave_nothing(
    storage: VolumeStorage, volume: Path, files_in: FilesIn, hanging: Hanging, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A signal's exception ends the wait, as gunicorn's do."""

    class Alarm(BaseException):
        pass

    def alarm(_call: object) -> None:
        until(lambda: hanging.hung, "the save hangs")
        raise Alarm

    hanging.hang("fsync")
    monkeypatch.setattr(mount.Mount, "result_of", staticmethod(alarm))
    with pytest.raises(Alarm):
        storage.save("photos/a.bin", ContentFile(b"x"))
    assert len(files_in(volume)) == 1
    assert storage._mount().guard.state == "closed"
    hanging.let_go()
    until(lambda: not files_in(volume), "the file was removed")


# Opened files


def test_reads_of_an_open_file_are_given_up(storage: VolumeStorage, volume: Path, hanging: Hanging) -> None:
    data = os.urandom(600_000)
    name = storage.save("photos/a.bin", ContentFile(data))
    file = storage.open(name)
    assert file.read(10) == data[:10]
    hanging.hang("pread")
    in_time(lambda: file.read(500_000))
    in_time(lambda: file.read(500_000), deadlines=0)
    began = time.monotonic()
    file.close()
    assert time.monotonic() - began < SLACK
    assert len(descriptors(volume)) == 1, "a descriptor in use was closed"
    hanging.let_go()
    wait_for_workers()
    assert descriptors(volume) == []
    with storage.open(name) as again:
        assert again.read() == data


def test_closing_does_not_wait_for_ever(storage: VolumeStorage, volume: Path, hanging: Hanging) -> None:
    name = storage.save("photos/a.bin", ContentFile(b"x"))
    file = storage.open(name)
    hanging.hang("close")
    began = time.monotonic()
    file.close()
    assert time.monotonic() - began < DEADLINE + SLACK
    hanging.let_go()
    wait_for_workers()
    assert descriptors(volume) == []


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
@pytest.mark.parametrize("kind", ["fsync", "stat", "link", "unlink", "close"])
def test_a_late_publication_is_taken_back(
    storage: VolumeStorage,
    volume: Path,
    files_in: FilesIn,
    hanging: Hanging,
    kind: str,
    after: bool,
) -> None:
    file = storage.open("photos/a.bin", "wb")
    file.write(b"x" * 10)
    hanging.hang(kind, after=after)
    in_time(file.close)
    hanging.let_go()
    wait_for_workers()
    assert files_in(volume) == []
    assert descriptors(volume) == []


def test_any_save_is_either_returned_or_leaves_nothing(
    storage: VolumeStorage, volume: Path, files_in: FilesIn, hanging: Hanging
) -> None:
    """Eight threads save while the volume hangs again and again, each time somewhere else."""
    dice = random.Random(7)
    kept: dict[str, int] = {}
    refused: list[int] = []
    end = threading.Event()

    def save(number: int) -> None:
        pause = threading.Event()
        while not end.is_set():
            size = 1000 + number if number % 2 else 2_200_000 + number
            try:
                kept[storage.save("photos/a.bin", ContentFile(b"x" * size))] = size
            except StorageUnavailable:
                refused.append(number)
                pause.wait(0.01)

    with override_settings(TRIBRICK=settings.TRIBRICK | {"DEADLINE": 0.05}):
        threads = [threading.Thread(target=save, args=(number,)) for number in range(8)]
        before = threading.active_count()
        for thread in threads:
            thread.start()
        pause = threading.Event()
        for _ in range(25):
            hanging.gate = threading.Event()
            hanging.hang(dice.choice([*SAVE, "unlink", "statvfs"]), after=dice.random() < 0.5)
            pause.wait(dice.uniform(0.02, 0.12))
            assert threading.active_count() <= before + 8 + 8 + 1
            hanging.let_go()
            pause.wait(dice.uniform(0, 0.06))
        end.set()
        for thread in threads:
            thread.join(20)
    wait_for_workers()
    assert refused
    assert kept
    assert {name: (volume / name).stat().st_size for name in files_in(volume)} == kept
    until(lambda: descriptors(volume) == [], "the descriptors were closed")


# Real hangs


def test_a_fifo_hangs_its_own_name_only(storage: VolumeStorage, volume: Path) -> None:
    """Opening a FIFO without a writer blocks in the kernel, as a call on a hung mount does."""
    (volume / "photos").mkdir()
    os.mkfifo(volume / "photos" / "hung.bin")
    in_time(lambda: storage.open("photos/hung.bin"))
    until(lambda: storage._mount().guard.state == "half-open", "the probe returned")
    in_time(lambda: storage.open("photos/hung.bin"), deadlines=0)  # not a second time
    with override_settings(TRIBRICK=settings.TRIBRICK | {"DEADLINE": 20}):
        name = storage.save("photos/a.bin", ContentFile(b"x"))
    assert storage._mount().guard.state == "closed"
    with storage.open(name) as file:
        assert file.read() == b"x"
    with override_settings(TRIBRICK=settings.TRIBRICK | {"OUTSTANDING": 1}):
        in_time(lambda: storage.save("photos/b.bin", ContentFile(b"x")), deadlines=0)
    assert descriptors(volume) == [str(volume)]  # the root of the call that hangs
    with (volume / "photos" / "hung.bin").open("wb"):
        wait_for_workers()
    assert descriptors(volume) == []


class HungMount:
    """A FUSE mount whose server greets the kernel and then never answers. ``abort`` ends it."""

    def __init__(self, at: Path) -> None:
        self.at = at
        self.libc = ctypes.CDLL(None, use_errno=True)
        self.device = os.open("/dev/fuse", os.O_RDWR)
        options = f"fd={self.device},rootmode=40000,user_id=0,group_id=0".encode()
        if self.libc.mount(b"hung", os.fsencode(at), b"fuse.hung", 0, options) != 0:
            number = ctypes.get_errno()
            os.close(self.device)
            raise OSError(number, os.strerror(number))
        length, _opcode, unique = struct.unpack_from("=IIQ", request := os.read(self.device, 1 << 17))
        assert length == len(request)
        body = struct.pack("=IIIIHHIIHHI28x", 7, 31, 65536, 0, 12, 10, 65536, 1, 0, 0, 0)
        os.write(self.device, struct.pack("=IiQ", 16 + len(body), 0, unique) + body)

    def abort(self) -> None:
        if self.device >= 0:
            device, self.device = self.device, -1
            os.close(device)

    def unmount(self) -> None:
        self.abort()
        self.libc.umount2(os.fsencode(self.at), 2)


@pytest.fixture
def hung_mount(tmp_path: Path) -> Iterator[HungMount]:
    at = tmp_path / "mount"
    at.mkdir()
    try:
        made = HungMount(at)
    except OSError as error:
        pytest.skip(f"no FUSE mounts here: {error}")
    yield made
    made.unmount()


def test_a_mount_that_answers_nothing(hung_mount: HungMount) -> None:
    storage = VolumeStorage(location=hung_mount.at, base_url="/media/")

    def threads() -> int:  # of this mount: idle workers of other tests' mounts come to their end meanwhile
        return sum(str(hung_mount.at) in thread.name for thread in threading.enumerate())

    in_time(lambda: storage.save("photos/a.bin", ContentFile(b"x")))
    for call in CALLS.values():
        in_time(lambda call=call: call(storage, "photos/a.bin"), deadlines=0)  # type: ignore[misc]
    assert threads() == 2  # the call and the probe
    assert storage._mount().guard.state == "open"
    hung_mount.abort()  # what frees a hung mount; its calls fail then
    wait_for_workers()
    assert storage._mount().guard.state == "half-open"
    in_time(lambda: storage.save("photos/a.bin", ContentFile(b"x")), deadlines=0)
    assert storage._mount().guard.state == "closed"  # it answers, though with errors
    assert threads() == 1
