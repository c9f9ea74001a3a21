#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Take wrong copies out of a brick and keep them beside it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: brick_quarantine
short_description: Take wrong copies out of a brick and keep them beside it
description:
  - Moves files of the brick, with their hard link below C(.glusterfs), into a directory on the same file system. A
    lookup through the mount then makes the file anew from the other bricks.
  - A file is moved only while it still is what it was when it was judged (SHA-256, size and identity). Others are left.
  - Nothing is deleted. Killed in between, it is finished by the next run.
  - Returns what the quarantine holds, of earlier runs too, for C(media_lookup), which makes mounts forget wrong copies.
options:
  path: {description: The brick's directory., type: path, required: true}
  quarantine: {description: Directory that keeps them; on the brick's file system., type: path, required: true}
  names: {description: "Name -> entry as C(brick_tree) saw it.", type: dict, required: true}
attributes:
  check_mode: {support: full, description: Names what it would move.}
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Take a wrong copy away
  tribrick.media.brick_quarantine:
    path: /srv/gluster/media/brick
    quarantine: /srv/gluster/media/quarantine
    names: {photos/a/b/one.jpg: {size: 3, sha256: "...", gfid: "..."}}
"""

RETURN = r"""
moved: {description: Names that were (would be) moved., returned: always, type: list, elements: str}
left: {description: Names that are no longer what they were., returned: always, type: list, elements: str}
kept: {description: "Name -> modification times (ns) of what the quarantine holds.", returned: always, type: dict}
"""

import contextlib
import os
import re

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.brick_files import entry

# The whole name, on the copy: what the quarantine calls it may be cut, and a name may have a % of its own.
NAME = "trusted.tribrick.name"


def sync(directory: str) -> None:
    handle = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move(brick: str, quarantine: str, name: str, gfid: str) -> None:
    """The name first: until its link is gone, too, a killed run leaves a file that nobody can reach by name."""
    source, target = os.path.join(brick, name), free_place(quarantine, name, gfid)
    with contextlib.suppress(OSError):  # it is known by its place then
        os.setxattr(source, NAME, os.fsencode(name))
    os.rename(source, target)
    sync(quarantine)
    sync(os.path.dirname(source))
    unlink_gfid(brick, target, gfid)


def free_place(quarantine: str, name: str, gfid: str) -> str:
    """Where a copy goes: beside an earlier one of the same file, never over it."""
    flat, number = os.fsencode(name.replace("/", "%")), 0
    while True:
        end = f".~{number}~.{gfid}" if number else f".{gfid}"
        target = os.path.join(quarantine, os.fsdecode(flat[: 255 - len(end)]) + end)
        if not os.path.lexists(target):
            return target
        number += 1


def times(path: str) -> list[int]:
    """The modification times that a mount may have shown of a copy: GlusterFS's own record of it, and the brick's."""
    found = [os.lstat(path).st_mtime_ns]
    try:
        record = os.getxattr(path, "trusted.glusterfs.mdata", follow_symlinks=False)
    except OSError:
        return found
    if len(record) >= 41:  # a byte, 8 bytes of flags, then seconds and nanoseconds of change and of modification
        found.append(int.from_bytes(record[25:33], "big") * 10**9 + int.from_bytes(record[33:41], "big"))
    return found


def held(quarantine: str) -> dict[str, list[int]]:
    """Name -> modification times of the copies in the quarantine."""
    found: dict[str, list[int]] = {}
    for one in sorted(os.listdir(quarantine)) if os.path.isdir(quarantine) else []:
        path = os.path.join(quarantine, one)
        try:
            name = os.fsdecode(os.getxattr(path, NAME, follow_symlinks=False))
        except OSError:
            name = re.sub(r"\.~\d+~$", "", one.rpartition(".")[0]).replace("%", "/")
        found.setdefault(name, []).extend(times(path))
    return found


def unlink_gfid(brick: str, target: str, gfid: str) -> None:
    """Remove the brick's link by identity to the same bytes; they stay under *target*."""
    dashed = "-".join((gfid[:8], gfid[8:12], gfid[12:16], gfid[16:20], gfid[20:]))
    link = os.path.join(brick, ".glusterfs", gfid[:2], gfid[2:4], dashed)
    if os.path.lexists(link) and os.stat(link).st_ino == os.stat(target).st_ino:
        os.unlink(link)
        sync(os.path.dirname(link))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "quarantine": {"type": "path", "required": True},
            "names": {"type": "dict", "required": True},
        },
        supports_check_mode=True,
    )
    brick, quarantine = module.params["path"], module.params["quarantine"]
    moved, left = [], []
    names = module.params["names"]
    if names and not module.check_mode:
        os.makedirs(quarantine, mode=0o700, exist_ok=True)
        if os.stat(quarantine).st_dev != os.stat(brick).st_dev:
            module.fail_json(msg=f"{quarantine} is not on the file system of {brick}; nothing was changed")
        for name in os.listdir(quarantine):  # links that a killed run has left
            gfid = name.rpartition(".")[2]
            unlink_gfid(brick, os.path.join(quarantine, name), gfid)
    for name, seen in sorted(names.items()):
        path = os.path.normpath(os.path.join(brick, name))
        if not path.startswith(os.path.join(brick, "")) or os.path.islink(path):
            module.fail_json(msg=f"{name} is no name below {brick}", changed=bool(moved), moved=moved, left=left)
        now = entry(path)
        same = all(now.get(key) == seen.get(key) for key in ("size", "sha256", "gfid")) and bool(now.get("gfid"))
        (moved if same else left).append(name)
        if same and not module.check_mode:
            move(brick, quarantine, name, now["gfid"])
    module.exit_json(changed=bool(moved), moved=moved, left=left, kept=held(quarantine))


if __name__ == "__main__":
    main()
