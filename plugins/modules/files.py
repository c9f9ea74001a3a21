#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Bring a set of directories, files and links to the wanted state in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: files
short_description: Bring a set of directories, files and links to the wanted state in one call
description:
  - Usually called through the action C(tribrick.media.templates), which renders templates on the controller first.
  - All files are validated before the first one is replaced, so a bad set leaves the host as it was.
  - Each file is replaced atomically (temporary file in the same directory, then rename).
  - Order is directories, files, links, absent. Check mode and diff are supported.
options:
  directories:
    description: Directories to make, in this order. Parents are made too, with the same owner and mode.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Absolute path., type: path, required: true}
      owner: {description: User name or number., type: str}
      group: {description: Group name or number., type: str}
      mode: {description: Octal mode as a string., type: str, default: "0755"}
  files:
    description: Files to write.
    type: list
    elements: dict
    default: []
    suboptions:
      dest: {description: Absolute path., type: path, required: true}
      content: {description: The whole text of the file., type: str, required: true}
      owner: {description: User name or number., type: str}
      group: {description: Group name or number., type: str}
      mode: {description: Octal mode as a string., type: str, default: "0644"}
      validate:
        description:
          - Command with C(%s) in place of the path of the new file, run before anything is replaced.
          - In check mode it is left out when its program is not installed yet.
        type: str
  links:
    description: Symbolic links to make. Something else at the path is an error, unless it is a link.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Absolute path of the link., type: path, required: true}
      target: {description: What it points to., type: str, required: true}
  absent:
    description: Files or links to remove. A directory is refused.
    type: list
    elements: path
    default: []
  owner: {description: Owner of entries that name none., type: str, default: root}
  group: {description: Group of entries that name none., type: str, default: root}
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Write two files and a link
  tribrick.media.files:
    directories: [{path: /etc/tribrick}]
    files:
      - {dest: /etc/tribrick/site.env, content: "A=1\n", mode: "0640"}
      - {dest: /etc/logrotate.d/glusterfs, content: "{{ text }}"}
    links: [{path: /etc/tribrick/current.env, target: site.env}]
"""

RETURN = r"""
changed_files:
  description: Every path that was (in check mode, would be) made, replaced, removed or given other rights.
  returned: always
  type: list
  elements: str
"""

import grp
import os
import pwd
import shlex
import shutil
import stat
import tempfile

from ansible.module_utils.basic import AnsibleModule


def user_id(name: str) -> int | None:
    """The number of a user given by name or number; None when there is no such user (yet)."""
    if name.isdigit():
        return int(name)
    try:
        return pwd.getpwnam(name).pw_uid
    except KeyError:
        return None


def group_id(name: str) -> int | None:
    """The number of a group given by name or number; None when there is no such group (yet)."""
    if name.isdigit():
        return int(name)
    try:
        return grp.getgrnam(name).gr_gid
    except KeyError:
        return None


class Files:
    """One pass over the wanted entries; ``changed`` lists the paths in order."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.changed: list[str] = []
        self.diff: list[dict[str, str]] = []

    def owners(self, entry: dict) -> tuple[int | None, int | None]:
        owner = entry.get("owner") or self.module.params["owner"]
        group = entry.get("group") or self.module.params["group"]
        uid, gid = user_id(owner), group_id(group)
        if not self.module.check_mode:
            path = entry.get("dest") or entry["path"]
            if uid is None:
                self.module.fail_json(msg=f"{path}: there is no user {owner}")
            if gid is None:
                self.module.fail_json(msg=f"{path}: there is no group {group}")
        return uid, gid

    def mark(self, path: str, before: str = "", after: str = "") -> None:
        if path not in self.changed:
            self.changed.append(path)
        self.diff.append({"before_header": path, "after_header": path, "before": before, "after": after})

    def rights(self, path: str, entry: dict) -> None:
        """Compare and set owner, group and mode of something that exists."""
        uid, gid = self.owners(entry)
        mode = int(entry["mode"], 8)
        found = os.stat(path)
        before = f"{found.st_uid}:{found.st_gid} {stat.S_IMODE(found.st_mode):04o}\n"
        after = f"{uid}:{gid} {mode:04o}\n"
        if before == after:
            return
        self.mark(path, before, after)
        if not self.module.check_mode:
            os.chown(path, uid, gid)
            os.chmod(path, mode)

    def directory(self, entry: dict) -> None:
        path = entry["path"]
        if os.path.isdir(path):
            self.rights(path, entry)
            return
        if os.path.lexists(path):
            self.module.fail_json(msg=f"{path} should be a directory and is something else; move it away and run again")
        self.mark(path, "", f"directory {entry['mode']}\n")
        if self.module.check_mode:
            return
        missing = []
        while not os.path.isdir(path):
            missing.append(path)
            path = os.path.dirname(path)
        for folder in reversed(missing):
            os.mkdir(folder, 0o700)
            uid, gid = self.owners(entry)
            os.chown(folder, uid, gid)
            os.chmod(folder, int(entry["mode"], 8))

    def validate(self, entry: dict) -> None:
        """Run the entry's checker on the new text in a private place; ends the module when it says no."""
        command = shlex.split(entry["validate"])
        if not any("%s" in word for word in command):
            self.module.fail_json(msg=f"{entry['dest']}: validate needs %s: {entry['validate']}")
        if self.module.check_mode and shutil.which(command[0]) is None:
            return
        with tempfile.TemporaryDirectory(dir=self.module.tmpdir) as folder:
            path = os.path.join(folder, os.path.basename(entry["dest"]))
            with open(path, "w", encoding="utf-8") as stream:
                stream.write(entry["content"])
            code, out, err = self.module.run_command([word.replace("%s", path) for word in command])
        if code != 0:
            self.module.fail_json(
                msg=f"{entry['dest']} was refused by its checker, nothing was changed: {(err or out).strip()}",
                rc=code,
            )

    @staticmethod
    def current(path: str) -> str | None:
        """The text of the file, or None when there is none."""
        try:
            # Line ends as they are: a certificate that was made on Windows would differ from itself each time.
            with open(path, encoding="utf-8", errors="surrogateescape", newline="") as stream:
                return stream.read()
        except FileNotFoundError:
            return None

    def file(self, entry: dict) -> None:
        path, after = entry["dest"], entry["content"]
        if os.path.isdir(path):
            self.module.fail_json(msg=f"{path} should be a file and is a directory; move it away and run again")
        before = self.current(path)
        if before == after and not os.path.islink(path):
            self.rights(path, entry)
            return
        self.mark(path, before or "", after)
        if self.module.check_mode:
            return
        uid, gid = self.owners(entry)
        handle, temporary = tempfile.mkstemp(prefix=".tribrick-", dir=os.path.dirname(path))
        try:
            with os.fdopen(handle, "w", encoding="utf-8") as stream:
                stream.write(after)
                stream.flush()
                os.fchown(stream.fileno(), uid, gid)
                os.fchmod(stream.fileno(), int(entry["mode"], 8))
                os.fsync(stream.fileno())
            os.replace(temporary, path)
        except OSError as error:
            os.unlink(temporary)
            self.module.fail_json(msg=f"{path} could not be written: {error}")

    def link(self, entry: dict) -> None:
        path, target = entry["path"], entry["target"]
        found = os.readlink(path) if os.path.islink(path) else None
        if found == target:
            return
        if found is None and os.path.lexists(path):
            self.module.fail_json(
                msg=f"{path} should be a link to {target} and is something else; move it away and run again"
            )
        self.mark(path, f"{found or ''}\n", f"{target}\n")
        if self.module.check_mode:
            return
        temporary = f"{path}.tribrick-{os.getpid()}"
        os.symlink(target, temporary)
        os.replace(temporary, path)

    def remove(self, path: str) -> None:
        if not os.path.lexists(path):
            return
        if os.path.isdir(path) and not os.path.islink(path):
            self.module.fail_json(msg=f"{path} is a directory and is not removed; look at it and remove it by hand")
        self.mark(path, "present\n", "absent\n")
        if not self.module.check_mode:
            os.unlink(path)


def main() -> None:
    rights = {"owner": {"type": "str"}, "group": {"type": "str"}}
    module = AnsibleModule(
        argument_spec={
            "directories": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "mode": {"type": "str", "default": "0755"},
                    **rights,
                },
            },
            "files": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "dest": {"type": "path", "required": True},
                    # Secrets are hidden by no_log on the task: hiding here would blind the diff of every other file.
                    "content": {"type": "str", "required": True, "no_log": False},
                    "mode": {"type": "str", "default": "0644"},
                    "validate": {"type": "str"},
                    **rights,
                },
            },
            "links": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {"path": {"type": "path", "required": True}, "target": {"type": "str", "required": True}},
            },
            "absent": {"type": "list", "elements": "path", "default": []},
            "owner": {"type": "str", "default": "root"},
            "group": {"type": "str", "default": "root"},
        },
        supports_check_mode=True,
    )
    files = Files(module)
    for entry in module.params["files"]:
        if entry["validate"] and files.current(entry["dest"]) != entry["content"]:
            files.validate(entry)
    for entry in module.params["directories"]:
        files.directory(entry)
    for entry in module.params["files"]:
        files.file(entry)
    for entry in module.params["links"]:
        files.link(entry)
    for path in module.params["absent"]:
        files.remove(path)
    module.exit_json(changed=bool(files.changed), changed_files=files.changed, diff=files.diff)


if __name__ == "__main__":
    main()
