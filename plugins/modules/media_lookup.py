#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Look names up through the media mount, so that GlusterFS makes the ones that a brick lacks."""

from __future__ import annotations

DOCUMENTATION = r"""
module: media_lookup
short_description: Look names up through the media mount, so that GlusterFS makes the ones that a brick lacks
description:
  - A file that was removed on a brick behind GlusterFS's back is in no list of what is to be healed, and a full heal
    passes it by as long as its hard link below C(.glusterfs) is there (seen on 11.1). A lookup of its name heals it.
  - A lookup changes nothing by itself. Names that are gone meanwhile are passed over.
options:
  root: {description: The media mount., type: path, required: true}
  names: {description: Names relative to it., type: list, elements: str, default: []}
  refresh:
    description:
      - "Dictionaries of name -> modification times (ns), as C(brick_quarantine) returns them. A mount keeps the bytes
        that it has read from a wrong copy for as long as the file's size and time stay the same (seen on 11.1, minutes
        after all bricks were right). A file that has one of these times gets another one, later by a nanosecond, which
        GlusterFS's memory goes by, and the kernel is asked to forget its pages."
    type: list
    elements: dict
    default: []
  timeout: {description: Seconds that all lookups may take., type: int, default: 300}
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Heal two names
  tribrick.media.media_lookup:
    root: /srv/media
    names: [photos/a/b/one.jpg, photos/a/b/two.jpg]
"""

RETURN = r"""
looked: {description: Names that are there., returned: success, type: int}
refreshed: {description: Names that got another time., returned: success, type: list, elements: str}
"""

import json
import os
import subprocess
import sys

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.brick_files import raw

# Until GlusterFS has looked at the new time, the kernel may get old bytes from its memory once more. That holds for a
# second after a look (time-outs of mount and volume), and nothing tells when it is over.
MEMORY = 3.0

# In a child, since a call on a hung mount cannot be interrupted. Reading a byte makes the data's replica be looked at.
PROGRAM = """
import json, os, stat, sys, time
found, refreshed = 0, []
asked = json.load(sys.stdin)
for name in asked["names"]:
    path = os.path.join(sys.argv[1], name)
    try:
        if os.path.isdir(path):
            found += 1
            continue
        with open(os.path.join(sys.argv[1], name), "rb") as stream:
            stream.read(1)
    except FileNotFoundError:
        continue
    except OSError as error:
        print(f"{name}: {error.strerror}", file=sys.stderr)
        continue
    found += 1
def each(work):
    for name, times in asked["refresh"].items():
        try:
            work(name, os.path.join(sys.argv[1], name), times)
        except (FileNotFoundError, NotADirectoryError):
            continue
        except OSError as error:
            print(f"{name}: {error.strerror}", file=sys.stderr)
def change(name, path, times):
    seen = os.stat(path)
    other = seen.st_mtime_ns
    while other in times:
        other += 1
    if other != seen.st_mtime_ns and stat.S_ISREG(seen.st_mode):
        os.utime(path, ns=(seen.st_atime_ns, other))
        refreshed.append(name)
def forget(name, path, times):
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)
if asked["refresh"]:
    each(change)
    each(forget)
    time.sleep(asked["memory"])
    each(forget)
print(json.dumps([found, refreshed]))
"""


def together(kept: list[dict]) -> dict[str, list[int]]:
    """All times of each name."""
    found: dict[str, list[int]] = {}
    for one in kept:
        for name, times in one.items():
            found.setdefault(name, []).extend(times)
    return found


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "names": {"type": "list", "elements": "str", "default": []},
            "refresh": {"type": "list", "elements": "dict", "default": []},
            "timeout": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    root, limit = module.params["root"], module.params["timeout"]
    if not os.path.ismount(root):
        module.exit_json(changed=False, looked=0, refreshed=[], msg=f"{root} is not mounted here")
    if module.check_mode:
        module.exit_json(changed=False, looked=0, refreshed=[])
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
    )
    names = [one for name in module.params["names"] for one in dict.fromkeys((name, raw(name)))]
    asked = {"names": names, "refresh": together(module.params["refresh"]), "memory": MEMORY}
    try:
        out, err = child.communicate(json.dumps(asked), timeout=limit)
    except subprocess.TimeoutExpired:
        child.kill()
        module.fail_json(msg=f"{root} did not answer within {limit} s; run playbooks/recover_mount.yml")
    if child.returncode != 0:
        module.fail_json(msg=f"{root}: the lookups ended with {child.returncode}: {' '.join(err.split())[-500:]}")
    if err:
        module.warn(f"{root}: {' '.join(err.split())[:500]}")
    looked, refreshed = json.loads(out or "[0, []]")
    module.exit_json(changed=bool(refreshed), looked=looked, refreshed=refreshed)


if __name__ == "__main__":
    main()
