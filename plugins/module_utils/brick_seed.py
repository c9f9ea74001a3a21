# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Copy what a good brick holds into an empty one whose process is down, so that a heal finds nearly all of it there.

GlusterFS's own heal makes each file by some forty round trips under locks. Here the files come as one stream and are
put in place with GlusterFS's identities, and only what changed meanwhile is left to the heal: while this brick is down,
the others mark whatever they write for it.

A stream is a sequence of a line of JSON, the file's bytes, and a line of JSON that says whether they were whole. It
begins with the volume's mark and ends with a count.

Everything is built beside the brick, on its file system, and moved in as whole trees when it is complete and on disk.
A directory that is in the brick already was made by GlusterFS, which knows what it lacks: its children are moved in one
by one, and never in the place of anything. So a copy that is killed leaves an empty brick, not half a one.
"""

from __future__ import annotations

import base64
import ctypes
import errno
import hashlib
import json
import os
import stat
import uuid
from collections.abc import Callable, Iterator
from typing import IO, Any

HANDLES = ".glusterfs"
GFID = "trusted.gfid"
MARK = "trusted.glusterfs.volume-id"
# What accuses other bricks, and what belongs to one brick alone, is not copied.
LEFT = ("trusted.afr.", "trusted.glusterfs.volume-id", "trusted.glusterfs.quota", "security.")
PIECE = 1 << 20


def staging_of(brick: str) -> str:
    """Where the copy for a brick is built, beside it. While it is there, the brick is to be filled."""
    return os.path.join(os.path.dirname(os.path.normpath(brick)), ".tribrick-seed")


Progress = Callable[[int, int], None]


class SeedError(Exception):
    """The copy cannot be made; the text says why. Nothing was put into the brick."""


# --- the side that has


def attributes(path: str | int, follow: bool = False) -> dict[str, str]:
    """Extended attributes that a copy is to have, in base64."""
    names = [name for name in os.listxattr(path, follow_symlinks=follow) if not name.startswith(LEFT)]
    return {name: base64.b64encode(os.getxattr(path, name, follow_symlinks=follow)).decode() for name in names}


def owner(info: os.stat_result) -> dict[str, Any]:
    """Mode, owner and times."""
    return {
        "mode": stat.S_IMODE(info.st_mode), "uid": info.st_uid, "gid": info.st_gid,
        "times": [info.st_atime_ns, info.st_mtime_ns],
    }  # fmt: skip


def entries(brick: str, below: str = "") -> Iterator[tuple[str, os.DirEntry[str]]]:
    """Names of directories and files, a directory before what it holds. What vanishes meanwhile is left out."""
    try:
        with os.scandir(os.path.join(brick, below)) as found:
            children = sorted(found, key=lambda one: one.name)
    except FileNotFoundError:
        return
    for child in children:
        name = os.path.join(below, child.name)
        if name == HANDLES:
            continue
        if child.is_dir(follow_symlinks=False):
            yield name, child
            yield from entries(brick, name)
        elif child.is_file(follow_symlinks=False):
            yield name, child


def send(brick: str, out: IO[bytes]) -> tuple[int, int]:
    """Write the stream; return how many files and bytes went. Links, pipes and sockets are left to the heal."""
    files = size = 0
    told: set[str] = set()

    def line(said: dict[str, Any]) -> None:
        out.write(json.dumps(said).encode() + b"\n")

    line({"volume": str(uuid.UUID(bytes=os.getxattr(brick, MARK)))})
    for name, entry in entries(brick):
        try:
            if entry.is_dir(follow_symlinks=False):
                found = attributes(entry.path)
                if GFID in found:
                    line({"kind": "directory", "name": name, "attributes": found, **owner(os.lstat(entry.path))})
                continue
            with open(entry.path, "rb", opener=_plain) as file:
                info, found = os.fstat(file.fileno()), attributes(file.fileno(), follow=True)
                if GFID not in found:
                    continue
                if info.st_nlink > 2:  # its handle is the second link
                    if found[GFID] in told:
                        line({"kind": "link", "name": name, "attributes": {GFID: found[GFID]}})
                        continue
                    told.add(found[GFID])
                line({"kind": "file", "name": name, "size": info.st_size, "attributes": found, **owner(info)})
                digest, left = hashlib.sha256(), info.st_size
                while left > 0 and (piece := file.read(min(PIECE, left))):
                    digest.update(piece)
                    out.write(piece)
                    left -= len(piece)
                whole = left == 0 and _same(info, os.fstat(file.fileno()))
                while left > 0:  # it was cut meanwhile: the stream keeps its length, the receiver forgets the file
                    out.write(bytes(min(PIECE, left)))
                    left -= min(PIECE, left)
                line({"whole": whole, "sha256": digest.hexdigest()})
                files, size = files + 1, size + info.st_size
        except FileNotFoundError:
            continue
    line({"end": files})
    out.flush()
    return files, size


def _plain(path: str, flags: int) -> int:
    return os.open(path, flags | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)


def _same(before: os.stat_result, after: os.stat_result) -> bool:
    return (before.st_size, before.st_mtime_ns) == (after.st_size, after.st_mtime_ns)


# --- the side that lacks


def handle_of(brick: str, gfid: bytes) -> str:
    """Path of the second name that GlusterFS keeps for an identity."""
    text = str(uuid.UUID(bytes=gfid))
    return os.path.join(brick, HANDLES, text[:2], text[2:4], text)


def receive(brick: str, staging: str, volume: str, stream: IO[bytes], progress: Progress | None = None) -> int:
    """Build the tree of a stream in *staging*, durable; return how many files it has. The brick is not touched."""
    tree = os.path.join(staging, "tree")
    os.makedirs(tree)
    if os.stat(tree).st_dev != os.stat(brick).st_dev:
        raise SeedError(f"{staging} is not on the file system of {brick}")
    head = _line(stream)
    if head.get("volume") != volume:
        raise SeedError(f"that is a brick of the volume {head.get('volume')}, not of {volume}")
    files = size = 0
    directories: list[tuple[str, dict[str, Any]]] = []
    known: dict[str, str] = {}
    while "end" not in (said := _line(stream)):
        place = _inside(tree, said["name"])
        if said["kind"] == "directory":
            os.mkdir(place, 0o700)
            directories.append((place, said))
        elif said["kind"] == "link":
            if said["attributes"][GFID] in known:
                os.link(known[said["attributes"][GFID]], place, follow_symlinks=False)
        else:
            if _file(place, said, stream):
                files, size = files + 1, size + said["size"]
                known[said["attributes"][GFID]] = place
            if progress is not None:
                progress(files, size)
    for place, said in reversed(directories):  # a directory's time changes while it is filled
        _dress(place, said)
    _to_disk(staging)
    return files


def _line(stream: IO[bytes]) -> dict[str, Any]:
    text = stream.readline(1 << 20)
    if not text.endswith(b"\n"):
        raise SeedError("the other node ended in the middle")
    said: dict[str, Any] = json.loads(text)
    return said


def _inside(tree: str, name: str) -> str:
    parts = name.split("/")
    if not name or name.startswith("/") or any(part in ("", ".", "..") for part in parts) or parts[0] == HANDLES:
        raise SeedError(f"{name!r} is no name within a brick")
    return os.path.join(tree, name)


def _file(place: str, said: dict[str, Any], stream: IO[bytes]) -> bool:
    digest, left = hashlib.sha256(), said["size"]
    with open(place, "xb") as file:
        while left > 0:
            if not (piece := stream.read(min(PIECE, left))):
                raise SeedError("the other node ended in the middle")
            digest.update(piece)
            file.write(piece)
            left -= len(piece)
        file.flush()
        whole = _line(stream)
        good = whole["whole"] and whole["sha256"] == digest.hexdigest()
        if good:
            _dress(file.fileno(), said)
    if whole["whole"] and not good:
        raise SeedError(f"{said['name']!r} did not arrive as it was sent")
    if not good:  # written to meanwhile, so marked: the heal brings it
        os.unlink(place)
    return good


def _dress(place: str | int, said: dict[str, Any]) -> None:
    for name, value in said["attributes"].items():
        os.setxattr(place, name, base64.b64decode(value))
    os.chown(place, said["uid"], said["gid"])
    os.chmod(place, said["mode"])
    os.utime(place, ns=(said["times"][0], said["times"][1]))


def _to_disk(path: str) -> None:
    """Let all of a file system be on disk. Python has no syncfs."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if libc.syncfs(descriptor) != 0:
            number = ctypes.get_errno()
            raise OSError(number, os.strerror(number), path)
    finally:
        os.close(descriptor)


def settle(brick: str, staging: str) -> int:
    """Move a received tree into the brick, where nothing stands in its place; return how many files it took."""
    taken = _settle(brick, os.path.join(staging, "tree"), "")
    _to_disk(brick)
    return taken


def _settle(brick: str, tree: str, below: str) -> int:
    taken = 0
    parent = os.getxattr(os.path.join(brick, below), GFID)
    for name in sorted(os.listdir(os.path.join(tree, below))):
        new, place = os.path.join(tree, below, name), os.path.join(brick, below, name)
        if not os.path.lexists(place):
            taken += _handles(brick, new, parent, name)
            if os.path.lexists(new):
                os.rename(new, place)
        elif _same_directory(new, place):
            taken += _settle(brick, tree, os.path.join(below, name))
    return taken


def _same_directory(new: str, place: str) -> bool:
    both = all(stat.S_ISDIR(os.lstat(one).st_mode) for one in (new, place))
    return both and os.getxattr(new, GFID) == os.getxattr(place, GFID)


def _handles(brick: str, place: str, parent: bytes, name: str) -> int:
    """Give a file, or a directory and all below it, the second names by identity; return how many files that were."""
    gfid = os.getxattr(place, GFID)
    handle = handle_of(brick, gfid)
    for made in (os.path.dirname(os.path.dirname(handle)), os.path.dirname(handle)):
        if not os.path.isdir(made):
            os.mkdir(made, 0o700)
    if not stat.S_ISDIR(os.lstat(place).st_mode):
        try:
            os.link(place, handle, follow_symlinks=False)
        except FileExistsError:
            if not os.path.samefile(place, handle):  # left by a copy that was killed, or GlusterFS's own
                if os.lstat(handle).st_nlink > 1:  # the file is in the brick, under another name
                    os.unlink(place)
                    return 0
                os.unlink(handle)
                os.link(place, handle, follow_symlinks=False)
        return 1
    text = str(uuid.UUID(bytes=parent))
    target = os.path.join("..", "..", text[:2], text[2:4], text, name)
    try:
        os.symlink(target, handle)
    except OSError as error:
        if error.errno != errno.EEXIST or os.readlink(handle) != target:
            raise
    return sum(_handles(brick, os.path.join(place, child), gfid, child) for child in sorted(os.listdir(place)))
