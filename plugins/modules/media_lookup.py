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
  renew:
    description:
      - Names whose mode is set to what it is, so that GlusterFS keeps a time for them again. See C(brick_tree).
    type: list
    elements: str
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
"""

import os
import subprocess
import sys

from ansible.module_utils.basic import AnsibleModule

# In a child, since a call on a hung mount cannot be interrupted. Reading a byte makes the data's replica be looked at.
PROGRAM = """
import os, stat, sys
found = 0
names, renew = (text.split("\\0") if text else [] for text in sys.stdin.read().split("\\0\\0"))
for name in names + renew:
    path = os.path.join(sys.argv[1], name)
    try:
        if name in renew:
            os.chmod(path, stat.S_IMODE(os.stat(path).st_mode))
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
print(found)
"""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "root": {"type": "path", "required": True},
            "names": {"type": "list", "elements": "str", "default": []},
            "renew": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    root, limit = module.params["root"], module.params["timeout"]
    if not os.path.ismount(root):
        module.exit_json(changed=False, looked=0, msg=f"{root} is not mounted here")
    if module.check_mode:
        module.exit_json(changed=bool(module.params["renew"]), looked=0)
    child = subprocess.Popen(
        [sys.executable, "-c", PROGRAM, root],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="surrogateescape",
    )
    try:
        out, err = child.communicate(
            "\0\0".join("\0".join(module.params[key]) for key in ("names", "renew")), timeout=limit
        )
    except subprocess.TimeoutExpired:
        child.kill()
        module.fail_json(msg=f"{root} did not answer within {limit} s; run playbooks/recover_mount.yml")
    if err:
        module.warn(f"{root}: {' '.join(err.split())[:500]}")
    module.exit_json(changed=bool(module.params["renew"]), looked=int(out or 0))


if __name__ == "__main__":
    main()
