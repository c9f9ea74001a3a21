#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""What a brick holds, by hash, so that bricks can be compared."""

from __future__ import annotations

DOCUMENTATION = r"""
module: brick_tree
short_description: What a brick holds, by hash, so that bricks can be compared
description:
  - Reads the brick's own files, past GlusterFS, and changes nothing. Everything but C(.glusterfs) counts.
  - Without O(directories), returns one digest for each directory, over its entries' names, kinds, modes, owners,
    GlusterFS identities (gfid), sizes and SHA-256. With O(directories), returns the entries of these directories.
  - Times are left out, they differ between replicas.
options:
  path: {description: The brick's directory., type: path, required: true}
  directories:
    description: Directories to list, relative to O(path); the brick's root is C(.).
    type: list
    elements: str
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Hash the brick
  tribrick.media.brick_tree:
    path: /srv/gluster/media/brick
"""

RETURN = r"""
digests: {description: Digest of each directory., returned: without O(directories), type: dict}
directories: {description: "As given.", returned: with O(directories), type: list, elements: str}
entries: {description: Entry of each name., returned: with O(directories), type: dict}
files: {description: Files that were hashed., returned: always, type: int}
bytes: {description: Their bytes., returned: always, type: int}
"""

import hashlib
import json
import os

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.brick_files import entry, meant, shown


def read(root: str, directory: str) -> dict[str, dict]:
    """The entries of one directory, by their name below the root. A directory that is gone is empty."""
    try:
        names = sorted(os.listdir(os.path.join(root, directory)))
    except (FileNotFoundError, NotADirectoryError):
        return {}
    found = {}
    for name in names:
        if directory == "." and name == ".glusterfs":
            continue
        seen = entry(os.path.join(root, directory, name))
        if seen:
            found[os.path.normpath(os.path.join(directory, name))] = seen
    return found


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "directories": {"type": "list", "elements": "str"},
        },
        supports_check_mode=True,
    )
    root, wanted = module.params["path"], module.params["directories"]
    if not os.path.isdir(os.path.join(root, ".glusterfs")):
        module.fail_json(msg=f"{root} is no brick: it holds no .glusterfs")
    digests: dict[str, str] = {}
    entries: dict[str, dict] = {}
    files = size = 0
    waiting = [meant(root, name) for name in wanted] if wanted is not None else ["."]
    while waiting:
        directory = waiting.pop()
        found = read(root, directory)
        files += sum("size" in one for one in found.values())
        size += sum(one.get("size", 0) for one in found.values())
        if wanted is not None:
            entries.update({shown(name): one for name, one in found.items()})
            continue
        digests[shown(directory)] = hashlib.sha256(
            json.dumps(found, sort_keys=True).encode("utf-8", "surrogateescape")
        ).hexdigest()
        waiting += [name for name, one in found.items() if str(one.get("mode", "")).startswith("0o4")]
    result = {"digests": digests} if wanted is None else {"directories": wanted, "entries": entries}
    module.exit_json(changed=False, files=files, bytes=size, **result)


if __name__ == "__main__":
    main()
