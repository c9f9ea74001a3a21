"""Other processes: killed at each system call, racing for one name, and a file of 2 GiB."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

from tribrick import names
from tribrick.storage.saving import TEMPORARY

FilesIn = Callable[[Path], list[str]]
SOURCES = Path(__file__).resolve().parents[3] / "src"

PREPARE = """
import io, os, sys
from multiprocessing import get_context

import django
from django.conf import settings
from django.core.files import File
from django.core.files.base import ContentFile

root = sys.argv[1]
settings.configure(MEDIA_ROOT=root, MEDIA_URL="/media/", TRIBRICK={"SENTINEL_ID": "x", "DEADLINE": 60})
django.setup()
from tribrick.storage import DerivedStorage, VolumeStorage, derived, mount, opened, saving
from tribrick.storage import volume as module

NEW = b"new" * 1_000_000
OLD = b"old" * 10
"""


def run(code: str, volume: Path, *arguments: str, timeout: float = 300) -> str:
    (volume / ".tribrick-volume").write_text('{"id": "x"}')
    done = subprocess.run(
        [sys.executable, "-c", PREPARE + textwrap.dedent(code), str(volume), *arguments],
        env=os.environ | {"PYTHONPATH": str(SOURCES)},
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


# Each child makes the operation and dies before (odd) or after (even) its n-th system call. What it
# got back is told through a pipe; the parent looks at the disk afterwards.
CRASH = """
OPERATIONS = {
    "save": lambda: VolumeStorage().save("photos/new.bin", ContentFile(NEW)),
    "save small": lambda: VolumeStorage().save("photos/new.bin", ContentFile(NEW[:1000])),
    "derived": lambda: DerivedStorage().save("x.bin", ContentFile(NEW)),
    "open": lambda: write("docs/x.bin"),
    "delete": lambda: VolumeStorage().delete("photos/old.bin") or "gone",
}


def write(name):
    with VolumeStorage().open(name, "wb") as file:
        file.write(NEW)
    return name


class Dying:
    CALLS = set("open mkdir chmod write pwrite fstat stat fchmod fsync close link unlink rename".split())
    at = 0
    count = 0

    def __getattr__(self, name):
        real = getattr(os, name)
        if name not in self.CALLS:
            return real

        def call(*args, **kwargs):
            self.point(name)
            result = real(*args, **kwargs)
            self.point(name)
            return result

        return call

    def point(self, name):
        self.count += 1
        if self.count == self.at:
            os.write(told, f"\\nat {name}".encode())
            os._exit(9)


def look():
    for directory, _, files in os.walk(root):
        for name in files:
            path = os.path.join(directory, name)
            with open(path, "rb") as file:
                data = file.read()
            kind = {NEW: "new", OLD: "old", NEW[:1000]: "new"}.get(data, f"torn {len(data)}")
            yield os.path.relpath(path, root), kind


operation = sys.argv[2]
old = {"photos/old.bin": OLD, "derived/x.bin": OLD}
at = 0
while True:
    at += 1
    for directory, directories, files in os.walk(root, topdown=False):
        for name in files:
            if name != ".tribrick-volume":
                os.unlink(os.path.join(directory, name))
        for name in directories:
            os.rmdir(os.path.join(directory, name))
    for name, data in old.items():
        os.makedirs(os.path.dirname(os.path.join(root, name)), exist_ok=True)
        with open(os.path.join(root, name), "wb") as file:
            file.write(data)
    listen, told = os.pipe()
    child = os.fork()
    if child == 0:
        dying = Dying()
        dying.at = at
        for part in (module, mount, saving, opened, derived):
            part.os = dying
        name = OPERATIONS[operation]()
        os.write(told, f"\\nreturned {name}".encode())
        os._exit(0)
    os.close(told)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    said = os.read(listen, 4096).decode().strip().replace("\\n", ";")
    os.close(listen)
    print(at, status, said, *(f"{name}={kind}" for name, kind in look() if name != ".tribrick-volume"), sep="|")
    if status == 0:
        break
"""


def points(volume: Path, operation: str, least: int) -> list[tuple[str, dict[str, str]]]:
    found = []
    for line in run(CRASH, volume, operation).splitlines():
        _at, status, said, *files = line.split("|")
        assert status in {"0", "9"}, line
        assert said.startswith("returned" if status == "0" else "at"), line
        found.append((said, dict(file.rsplit("=", 1) for file in files)))
    assert len(found) > least, "too few system calls were seen"
    assert [said for said, _ in found if said.startswith("returned")] == [found[-1][0]]
    return found


@pytest.mark.parametrize(("operation", "least"), [("save", 20), ("save small", 14)])
def test_killed_while_saving(volume: Path, operation: str, least: int) -> None:
    """Whatever is left has a name that nobody was told; what was returned is whole."""
    for said, files in points(volume, operation, least):
        assert files.pop("photos/old.bin") == files.pop("derived/x.bin") == "old"
        if said.startswith("returned"):
            assert files == {said.removeprefix("returned "): "new"}
        else:
            assert len(files) <= 1
            for name, content in files.items():
                unnamed = TEMPORARY.fullmatch(os.path.basename(name))
                assert unnamed or (names.parse(name, 2, 1) and content == "new"), said


def test_killed_while_replacing_a_derived_file(volume: Path) -> None:
    seen = set()
    for said, files in points(volume, "derived", 15):
        seen.add(files["derived/x.bin"])
        rest = [name for name in files if name not in {"photos/old.bin", "derived/x.bin"}]
        assert len(rest) <= 1
        assert all(TEMPORARY.fullmatch(os.path.basename(name)) for name in rest), said
    assert seen == {"old", "new"}  # and never torn


def test_killed_while_writing_a_new_file(volume: Path) -> None:
    seen = set()
    for said, files in points(volume, "open", 20):
        seen.add(files.get("docs/x.bin", "none"))
        rest = [name for name in files if name not in {"photos/old.bin", "derived/x.bin", "docs/x.bin"}]
        assert all(TEMPORARY.fullmatch(os.path.basename(name)) for name in rest), said
    assert seen == {"none", "new"}
    assert files == {"photos/old.bin": "old", "derived/x.bin": "old", "docs/x.bin": "new"}


def test_killed_while_deleting(volume: Path) -> None:
    seen = set()
    for _said, files in points(volume, "delete", 4):
        seen.add(files.pop("photos/old.bin", "none"))
        assert files == {"derived/x.bin": "old"}
    assert seen == {"old", "none"}


RACE = """
PROCESSES = 3 * 8


def compete(number, barrier, results):
    data = bytes([number]) * 1_300_000
    barrier.wait(60)
    try:
        if sys.argv[2] == "save":
            name = VolumeStorage().save("photos/same.bin", ContentFile(data))
        elif sys.argv[2] == "derived":
            name = DerivedStorage().save("same.bin", ContentFile(data))
        else:
            with VolumeStorage().open("docs/same.bin", "wb") as file:
                file.write(data)
            name = "docs/same.bin"
        results.put((number, name))
    except FileExistsError:
        results.put((number, ""))


context = get_context("fork")
VolumeStorage().verify()  # a worker before the fork, as with gunicorn's preload
barrier, results = context.Barrier(PROCESSES), context.Queue()
processes = [context.Process(target=compete, args=(number, barrier, results)) for number in range(PROCESSES)]
for process in processes:
    process.start()
for _ in processes:
    number, name = results.get(timeout=120)
    print(number, name, sep="|")
for process in processes:
    process.join(60)
    assert process.exitcode == 0, process.exitcode
"""


def race(volume: Path, kind: str) -> dict[int, str]:
    lines = [line.split("|") for line in run(RACE, volume, kind).splitlines()]
    assert len(lines) == 24
    return {int(number): name for number, name in lines}


def is_from(path: Path, number: int) -> bool:
    return path.read_bytes() == bytes([number]) * 1_300_000


def test_24_processes_save_the_same_name(volume: Path, files_in: FilesIn) -> None:
    saved = race(volume, "save")
    assert files_in(volume) == sorted(saved.values())
    assert len(set(saved.values())) == 24
    assert all(is_from(volume / name, number) for number, name in saved.items())


def test_24_processes_write_one_new_file(volume: Path, files_in: FilesIn) -> None:
    winners = [number for number, name in race(volume, "open").items() if name]
    assert len(winners) == 1
    assert files_in(volume) == ["docs/same.bin"]
    assert is_from(volume / "docs/same.bin", winners[0])


def test_24_processes_replace_one_derived_file(volume: Path, files_in: FilesIn) -> None:
    assert set(race(volume, "derived").values()) == {"same.bin"}
    assert files_in(volume) == ["derived/same.bin"]
    assert any(is_from(volume / "derived/same.bin", number) for number in range(24))


LARGE = """
SIZE = 2 * 2**30


class Stream(io.RawIOBase):
    left = SIZE
    block = os.urandom(2**20)

    def readable(self):
        return True

    def read(self, size=-1):
        assert 0 < size <= 2**20, "asked for more than a piece"
        size = min(size, self.left)
        self.left -= size
        return self.block[:size]


stored = VolumeStorage().store(File(Stream()), "photos/large.bin")
assert stored.size == SIZE == os.stat(os.path.join(root, stored.name)).st_size
read = 0
with VolumeStorage().open(stored.name) as file:
    for chunk in file.chunks(2**20):
        assert chunk == Stream.block
        read += len(chunk)
assert read == SIZE
VolumeStorage().delete(stored.name)
with open("/proc/self/status") as status:  # ru_maxrss would count what the parent had at the fork
    print(next(int(line.split()[1]) // 1024 for line in status if line.startswith("VmHWM")))
"""


def test_2_gib_in_less_than_100_mib(volume: Path) -> None:
    free = shutil.disk_usage(volume).free
    if free < 4 * 2**30:
        pytest.skip(f"needs 4 GiB of free space, there are {free / 2**30:.1f}")
    assert int(run(LARGE, volume)) < 100
