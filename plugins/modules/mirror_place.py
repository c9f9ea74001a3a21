#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Refuse a place for the mirror that is too small or dies with what it protects."""

from __future__ import annotations

DOCUMENTATION = r"""
module: mirror_place
short_description: Refuse a place for the mirror that is too small or dies with what it protects
description:
  - Changes nothing. O(path) need not exist yet; then the directory it will be made in counts.
  - Space that the mirror has already taken for files counts as free.
options:
  path: {description: Where the mirror lies or will lie., type: path, required: true}
  apart_from:
    description: Paths whose file systems it must not share. One that does not exist is passed over.
    type: list
    elements: path
    default: []
  data_mount:
    description: Mount point of the data. There must be room for all that is used there; empty for none.
    type: str
    default: ""
  min_free_gib: {description: GiB that must be free., type: float, default: 5.0}
  allow_shared:
    description: Let it share a file system, as in a lab. What is used on a shared one says nothing and is not compared.
    type: bool
    default: false
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Look at the mirror's place
  tribrick.media.mirror_place:
    path: /srv/media-mirror
    apart_from: [/srv/gluster/media, /var/lib/postgresql]
    data_mount: /srv/gluster/media
"""

RETURN = r"""
free: {description: Bytes that are free there., returned: always, type: int}
held: {description: Bytes of files that the mirror has already., returned: always, type: int}
needed: {description: Bytes that the data takes now., returned: always, type: int}
shared: {description: The paths whose file system it shares., returned: always, type: list, elements: str}
"""

import json
import os

from ansible.module_utils.basic import AnsibleModule

GIB = 1 << 30


def existing(path: str) -> str:
    """The path, or the nearest of its parents that exists."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def wrong(path: str, seen: dict, min_free: float, data_mount: str, allow_shared: bool) -> list[str]:
    """What speaks against the place, in sentences. *seen* are free, held and needed bytes, and what is shared."""
    found = []
    if seen["shared"] and not allow_shared:
        found.append(
            f"{path} is on the same file system as {' and '.join(seen['shared'])}, so one disk would take both. Mount "
            "a disk of its own there, or set media_mirror_path (for a lab: tribrick_allow_shared_filesystem)."
        )
    if seen["free"] < min_free * GIB:
        found.append(
            f"{path} has {seen['free'] / GIB:.1f} GiB free, {min_free:g} GiB are the least. Give it more space, keep "
            "fewer snapshots, or lower media_mirror_min_free_gib."
        )
    if seen["free"] + seen["held"] < seen["needed"]:
        found.append(
            f"{path} has room for {(seen['free'] + seen['held']) / GIB:.1f} GiB, {seen['needed'] / GIB:.1f} GiB are "
            f"used on {data_mount}. Give it more space."
        )
    return found


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "apart_from": {"type": "list", "elements": "path", "default": []},
            "data_mount": {"type": "str", "default": ""},
            "min_free_gib": {"type": "float", "default": 5.0},
            "allow_shared": {"type": "bool", "default": False},
        },
        supports_check_mode=True,
    )
    path, data_mount = module.params["path"], module.params["data_mount"]
    place = existing(path)
    device, space = os.stat(place).st_dev, os.statvfs(place)
    others = [other for other in module.params["apart_from"] if os.path.exists(other)]
    held = needed = 0
    try:
        with open(os.path.join(path, "state.json"), encoding="utf-8") as stream:
            held = int(json.load(stream)["bytes"])
    except (OSError, ValueError, KeyError, TypeError):
        pass  # nothing was copied yet
    if data_mount and not module.params["allow_shared"] and os.path.exists(data_mount):
        data = os.statvfs(data_mount)
        needed = (data.f_blocks - data.f_bfree) * data.f_frsize
    seen = {
        "free": space.f_bavail * space.f_frsize,
        "held": held,
        "needed": needed,
        "shared": [other for other in others if os.stat(other).st_dev == device],
    }
    found = wrong(path, seen, module.params["min_free_gib"], data_mount, module.params["allow_shared"])
    if found:
        module.fail_json(msg=" ".join(found), **seen)
    module.exit_json(changed=False, **seen)


if __name__ == "__main__":
    main()
