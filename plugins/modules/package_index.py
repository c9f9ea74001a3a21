#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Make a directory of .deb files usable as an apt source."""

from __future__ import annotations

DOCUMENTATION = r"""
module: package_index
short_description: Make a directory of .deb files usable as an apt source
description:
  - Writes the C(Packages) file of a flat directory with C(dpkg-deb), which every Debian system has.
  - A directory that brings its own index is left alone as long as the index names the same files with the same sizes.
options:
  path:
    description: The directory.
    type: path
    required: true
author: [Tribrick authors]
attributes:
  check_mode:
    description: Predicts.
    support: full
"""

EXAMPLES = r"""
- name: Index the pushed packages
  tribrick.media.package_index:
    path: /var/lib/tribrick-packages
"""

RETURN = r"""
packages:
  description: Number of .deb files.
  type: int
  returned: always
"""

import hashlib
import os

from ansible.module_utils.basic import AnsibleModule


def parse_index(text):
    """Return {file name: size} of a Packages file."""
    files = {}
    for paragraph in text.split("\n\n"):
        fields = dict(
            line.split(": ", 1) for line in paragraph.splitlines() if ": " in line and not line.startswith(" ")
        )
        if "Filename" in fields:
            name = fields["Filename"]
            files[name[2:] if name.startswith("./") else name] = int(fields.get("Size", "-1"))
    return files


def main():
    module = AnsibleModule(argument_spec={"path": {"type": "path", "required": True}}, supports_check_mode=True)
    path = module.params["path"]
    if not os.path.isdir(path):
        if module.check_mode:
            module.exit_json(changed=True, packages=0)
        module.fail_json(msg=f"{path} is not a directory")
    debs = {
        name: os.path.getsize(os.path.join(path, name)) for name in sorted(os.listdir(path)) if name.endswith(".deb")
    }
    index = os.path.join(path, "Packages")
    if not debs and not os.path.exists(index):
        module.fail_json(msg=f"{path} holds neither .deb files nor a Packages file")
    have = {}
    if os.path.exists(index):
        with open(index, encoding="utf-8") as stream:
            have = parse_index(stream.read())
    # An index over sub-directories came with the files; only flat directories are indexed here.
    changed = have != debs and not any("/" in name for name in have)
    if changed and not module.check_mode:
        paragraphs = []
        for name, size in debs.items():
            full = os.path.join(path, name)
            _rc, control, _err = module.run_command(["dpkg-deb", "--field", full], check_rc=True)
            with open(full, "rb") as stream:
                digest = hashlib.file_digest(stream, "sha256").hexdigest()
            paragraphs.append(f"{control.rstrip()}\nFilename: ./{name}\nSize: {size}\nSHA256: {digest}\n")
        with open(index + ".new", "w", encoding="utf-8") as stream:
            stream.write("\n".join(paragraphs))
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(index + ".new", index)
    module.exit_json(changed=changed, packages=len(debs))


if __name__ == "__main__":
    main()
