"""Disks of a lab's nodes: a sparse file with XFS each, so that a disk can fail alone.

A disk is `DIRECTORY/NODE.img`, mounted on this machine at `DIRECTORY/NODE`; a container gets the directory `root` in
it. That directory exists only while the disk is mounted, so that no container starts with an empty place for its brick.
The loop device belongs to its last mount and goes with it: there is none to lose track of.
"""

from __future__ import annotations

import argparse
import fcntl
import os
import shutil
import struct
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from kit.engine import apt_install
from kit.run import Console, KitError, capture, wait_for

SIZE = 1536 * 1024 * 1024
_SYNCED = b"synced when this disk was new\n" * 200
_GOINGDOWN, _WITHOUT_LOG = 0x8004587D, 2  # XFS_IOC_GOINGDOWN, XFS_FSOP_GOING_FLAGS_NOLOGFLUSH


def _mounted(point: Path) -> bool:
    """Tell whether something is mounted there, without asking the file system: it may be dead."""
    wanted = str(point).replace(" ", "\\040")
    lines = Path("/proc/self/mountinfo").read_text(encoding="utf-8").splitlines()
    return any(line.split()[4] == wanted for line in lines)


@dataclass(frozen=True)
class Disk:
    """One node's disk."""

    directory: Path
    node: str

    @property
    def image(self) -> Path:
        """The file that holds the file system."""
        return self.directory / f"{self.node}.img"

    @property
    def point(self) -> Path:
        """Where it is mounted on this machine."""
        return self.directory / self.node

    @property
    def root(self) -> Path:
        """What the node sees of it."""
        return self.point / "root"

    @property
    def mounted(self) -> bool:
        """Whether it is mounted on this machine."""
        return _mounted(self.point)

    @property
    def dead(self) -> bool:
        """Whether its file system was shut down, by a power cut or an error."""
        if not self.mounted:
            return False
        try:
            os.listdir(self.point)
        except OSError:
            return True
        return False

    def format(self) -> None:
        """Make it empty and new."""
        if self.mounted:
            raise KitError(f"{self.point} is mounted; a disk in use is not formatted.")
        self.directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        fresh = self.image.with_suffix(".new")
        with fresh.open("wb") as file:
            file.truncate(SIZE)
        capture(["mkfs.xfs", "-q", "-f", str(fresh)], deadline=120)
        # Only a finished file system gets the name: a killed run leaves none that cannot be mounted.
        fresh.replace(self.image)

    def mount(self) -> None:
        """Mount it; XFS replays its log."""
        self.point.mkdir(parents=True, exist_ok=True)
        if self.mounted:
            return
        done = capture(
            ["mount", "-t", "xfs", "-o", "loop,noatime", str(self.image), str(self.point)], deadline=120, check=False
        )
        if done.returncode != 0:
            raise KitError(f"{self.image} cannot be mounted: {done.stderr.strip()} (is there XFS in this kernel?)")
        if not self.intact():
            self.root.mkdir(exist_ok=True)
            with self.mark.open("wb") as file:
                file.write(_SYNCED)
                file.flush()
                os.fsync(file.fileno())

    @property
    def mark(self) -> Path:
        """A file that was synced when the disk was new."""
        return self.point / "synced"

    def intact(self) -> bool:
        """Tell whether the bytes that were synced then are there."""
        return self.root.is_dir() and self.mark.exists() and self.mark.read_bytes() == _SYNCED

    def unmount(self) -> None:
        """Unmount it; fails while a program of this machine works in it."""
        if self.mounted:
            capture(["umount", str(self.point)], deadline=120)

    def released(self) -> str | None:
        """Return None once no loop device holds the file any more, else which one does."""
        if not self.image.exists():
            return None
        done = capture(["losetup", "--noheadings", "--output", "NAME", "--associated", str(self.image)], deadline=60)
        return done.stdout.strip() or None

    def cut(self) -> None:
        """Shut the file system down as a power cut would: what was not synced is gone, the log's tail included."""
        handle = os.open(self.point, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.ioctl(handle, _GOINGDOWN, struct.pack("I", _WITHOUT_LOG))
        finally:
            os.close(handle)


def ensure_tools(console: Console) -> None:
    """Make sure that XFS file systems can be made here."""
    if os.geteuid() != 0:
        raise KitError("Disks with XFS are mounted on this machine, which needs root.")
    if shutil.which("mkfs.xfs") is None:
        apt_install(console, ["xfsprogs"], "the lab's disks are XFS file systems")


def found(directory: Path) -> list[Disk]:
    """Return the disks that are there, by file or by mount point."""
    if not directory.is_dir():
        return []
    names = {path.stem for path in directory.glob("*.img")}
    names |= {path.name for path in directory.iterdir() if path.is_dir()}
    return [Disk(directory, name) for name in sorted(names)]


def remove(console: Console, directory: Path) -> None:
    """Unmount all disks and delete them; the containers that used them must be gone."""
    disks = found(directory)
    for disk in disks:
        disk.unmount()
    for disk in disks:
        wait_for(console, f"the disk {disk.image} to be released by its loop device", disk.released, deadline=30)
    if directory.is_dir():
        # Never through a mount: what is left are files and empty mount points.
        for disk in disks:
            if disk.point.is_dir():
                disk.point.rmdir()
        shutil.rmtree(directory)


def main(arguments: Sequence[str] | None = None) -> int:
    """`python -m kit.disks remove DIRECTORY`: what playbooks/lab_destroy.yml calls."""
    parser = argparse.ArgumentParser(prog="python -m kit.disks", description=main.__doc__)
    parser.add_argument("command", choices=["remove"])
    parser.add_argument("directory", type=Path)
    options = parser.parse_args(arguments)
    there = bool(found(options.directory))
    try:
        remove(Console(), options.directory)
    except (KitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print("changed" if there else "unchanged")
    return 0


if __name__ == "__main__":
    sys.exit(main())
