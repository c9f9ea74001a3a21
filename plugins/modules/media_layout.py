#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Sentinel, ownership and hash directories of a mounted media volume."""

from __future__ import annotations

DOCUMENTATION = r"""
module: media_layout
short_description: Sentinel, ownership and hash directories of a mounted media volume
description:
  - Makes the directories, then the layout note, then the sentinel, so that a volume with a sentinel is complete and a
    run that was killed is finished by the next one.
  - Refuses a path that is no GlusterFS mount, and a volume whose sentinel has another identity.
options:
  path: {description: The mount point., type: path, required: true}
  volume: {description: Name of the volume., type: str, required: true}
  volume_id: {description: Identity for the sentinel., type: str, required: true}
  directories: {description: Top directories of uploads., type: list, elements: str, default: []}
  levels: {description: Levels of hash directories., type: int, default: 2}
  width: {description: Hexadecimal digits in each name., type: int, default: 1}
  uid: {description: Owner of the root and the directories., type: int, required: true}
  gid: {description: Group of the root and the directories., type: int, required: true}
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Lay out the volume
  tribrick.media.media_layout:
    path: /srv/media
    volume: media
    volume_id: 6f0f7f5e-5b0e-4f6b-a1b7-0c6b8d2f7a11
    directories: [photos, private]
    uid: 2971
    gid: 2971
  run_once: true
"""

RETURN = r"""
made: {description: Directories and files that were (would be) made., returned: always, type: list, elements: str}
"""

import itertools
import json
import os

from ansible.module_utils.basic import AnsibleModule

SENTINEL = ".tribrick-volume"
LAYOUT = ".tribrick-layout"


def file_system(path: str, mounts: str) -> str | None:
    """Type of the file system mounted exactly at ``path`` (the last one counts), from /proc/self/mounts' text."""
    found = None
    for line in mounts.splitlines():
        fields = line.split()
        if len(fields) > 2 and fields[1] == path:
            found = fields[2]
    return found


def tree(directories: list[str], levels: int, width: int) -> list[str]:
    """All directories of the layout, parents first."""
    names = [f"{number:0{width}x}" for number in range(16**width)]
    paths = []
    for top in directories:
        parts = top.strip("/").split("/")
        paths += ["/".join(parts[: depth + 1]) for depth in range(len(parts))]
        for level in range(1, levels + 1):
            combinations = itertools.product(names, repeat=level)
            paths += ["/".join((top.strip("/"), *combination)) for combination in combinations]
    return list(dict.fromkeys(paths))


def read_json(path: str) -> dict | None:
    """The JSON object in a file; None when it is missing or is none."""
    try:
        with open(path, encoding="utf-8") as stream:
            value = json.load(stream)
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def write_json(path: str, value: dict, mode: int) -> None:
    """Replace a file durably: synced under its final name; GlusterFS does nothing for a directory's sync."""
    temporary = f"{path}.new"
    with open(temporary, "w", encoding="utf-8") as stream:
        json.dump(value, stream, sort_keys=True)
        stream.write("\n")
        stream.flush()
        os.fchmod(stream.fileno(), mode)
        os.rename(temporary, path)
        os.fsync(stream.fileno())


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "volume": {"type": "str", "required": True},
            "volume_id": {"type": "str", "required": True},
            "directories": {"type": "list", "elements": "str", "default": []},
            "levels": {"type": "int", "default": 2},
            "width": {"type": "int", "default": 1},
            "uid": {"type": "int", "required": True},
            "gid": {"type": "int", "required": True},
        },
        supports_check_mode=True,
    )
    want = module.params
    root, owner = want["path"], (want["uid"], want["gid"])
    if not (0 <= want["levels"] <= 3 and 1 <= want["width"] <= 2 and 16 ** (want["levels"] * want["width"]) <= 65536):
        module.fail_json(msg="levels must be 0 to 3, width 1 or 2, and all hash directories together at most 65536")
    parts = [part for top in want["directories"] for part in top.strip("/").split("/")]
    if any(not part or part.startswith(".") for part in parts):
        module.fail_json(msg=f"directories must be plain relative names: {want['directories']}")
    with open("/proc/self/mounts", encoding="utf-8") as stream:
        kind = file_system(root, stream.read())
    if kind != "fuse.glusterfs":
        if module.check_mode:
            module.exit_json(changed=True, made=[SENTINEL], msg=f"{root} is not mounted yet")
        found = kind or "not mounted"
        module.fail_json(
            msg=f"{root} is {found}, expected the GlusterFS volume {want['volume']}; nothing was written"
        )
    sentinel = {"tribrick": 1, "volume": want["volume"], "id": want["volume_id"]}
    layout = {"directories": sorted(want["directories"]), "levels": want["levels"], "width": want["width"]}
    found = read_json(os.path.join(root, SENTINEL))
    if found is not None and found != sentinel:
        module.fail_json(
            msg=f"the volume at {root} carries the sentinel {found}, the inventory says {sentinel}: this is another "
            "site's volume. Correct tribrick_volume_id in the inventory, or mount the right volume; nothing was written"
        )
    made = []
    stat = os.stat(root)
    if (stat.st_uid, stat.st_gid) != owner or stat.st_mode & 0o777 != 0o755:
        made.append(root)
        if not module.check_mode:
            os.chmod(root, 0o755)  # noqa: S103 (nginx, another user, reads the public files)
            os.chown(root, *owner)
    if read_json(os.path.join(root, LAYOUT)) != layout:
        for relative in tree(want["directories"], want["levels"], want["width"]):
            path = os.path.join(root, relative)
            if os.path.isdir(path):
                continue
            made.append(relative)
            if not module.check_mode:
                os.mkdir(path, 0o755)
                os.chown(path, *owner)
        made.append(LAYOUT)
        if not module.check_mode:
            write_json(os.path.join(root, LAYOUT), layout, 0o444)
    if found is None:
        made.append(SENTINEL)
        if not module.check_mode:
            write_json(os.path.join(root, SENTINEL), sentinel, 0o444)
    shown = made if len(made) < 20 else [*made[:10], f"... {len(made) - 11} more", made[-1]]
    module.exit_json(changed=bool(made), made=shown)


if __name__ == "__main__":
    main()
