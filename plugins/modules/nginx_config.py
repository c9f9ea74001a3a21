#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Test a staged nginx configuration as a whole and put it in place in one step."""

from __future__ import annotations

DOCUMENTATION = r"""
module: nginx_config
short_description: Test a staged nginx configuration as a whole and put it in place in one step
description:
  - The files of O(staged) refer to each other below C(/etc/nginx/NAME/). They are tested with C(nginx -t) in a copy of
    the whole of C(/etc/nginx). If the test fails, the configuration in use stays, on disk too.
  - Each set of files gets a directory of its own; C(/etc/nginx/NAME) is a link to the present one, so the change is
    one rename. C(sites-enabled/NAME.conf) points to its C(site.conf). The distribution's default site is disabled.
  - nginx is not reloaded here.
options:
  staged: {description: Directory with the wanted files., type: path, required: true}
  name: {description: Name of the set., type: str, required: true}
  root: {description: Directory of nginx's configuration., type: path, default: /etc/nginx}
attributes:
  check_mode:
    description: Compares and tests, changes nothing.
    support: full
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Test the configuration and put it in place
  tribrick.media.nginx_config:
    staged: /var/lib/tribrick-nginx
    name: tribrick
"""

RETURN = r"""
digest: {description: Name of the set of files., type: str, returned: when staged}
"""

import hashlib
import os
import shutil
import tempfile

from ansible.module_utils.basic import AnsibleModule


def read_tree(root: str) -> dict[str, bytes]:
    """Relative path and content of each file below a directory."""
    tree = {}
    for folder, _folders, names in os.walk(root):
        for name in sorted(names):
            path = os.path.join(folder, name)
            with open(path, "rb") as stream:
                tree[os.path.relpath(path, root)] = stream.read()
    return tree


def tree_digest(tree: dict[str, bytes]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tree):
        digest.update(f"{name}\0{len(tree[name])}\0".encode() + tree[name])
    return digest.hexdigest()[:16]


def write_tree(root: str, tree: dict[str, bytes]) -> None:
    for name, content in tree.items():
        path = os.path.join(root, name)
        os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
        with open(path, "wb") as stream:
            stream.write(content)
            stream.flush()
            os.fsync(stream.fileno())


def point(path: str, target: str) -> None:
    """Make or change a link in one step."""
    temporary = f"{path}.new"
    if os.path.lexists(temporary):
        os.unlink(temporary)
    os.symlink(target, temporary)
    os.replace(temporary, path)


class Config:
    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.root, self.name = module.params["root"], module.params["name"]
        self.link = os.path.join(self.root, self.name)
        self.sets = os.path.join(self.root, f"{self.name}.sets")
        self.entry = os.path.join(self.root, "sites-enabled", f"{self.name}.conf")
        self.default = os.path.join(self.root, "sites-enabled", "default")

    def test(self, tree: dict[str, bytes]) -> None:
        """Run nginx -t on a copy of the whole configuration with the new set in it."""
        with tempfile.TemporaryDirectory(dir=self.module.tmpdir) as folder:
            copy = os.path.join(folder, "nginx")
            own = {os.path.basename(self.link), os.path.basename(self.sets)}

            def left_out(directory: str, names: list[str]) -> set[str]:
                if directory == self.root:
                    return own & set(names)
                if directory == os.path.dirname(self.entry):
                    return {"default", os.path.basename(self.entry)} & set(names)
                return set()

            shutil.copytree(self.root, copy, ignore=left_out)
            write_tree(os.path.join(copy, self.name), tree)
            shutil.copyfile(
                os.path.join(copy, self.name, "site.conf"), os.path.join(copy, "sites-enabled", f"{self.name}.conf")
            )
            for name, content in read_tree(copy).items():
                changed = content.replace(f"{self.root}/".encode(), f"{copy}/".encode())
                if changed != content:
                    with open(os.path.join(copy, name), "wb") as stream:
                        stream.write(changed)
            command = ["nginx", "-t", "-q", "-c", os.path.join(copy, "nginx.conf")]
            code, out, err = self.module.run_command(command)
            if code != 0:
                text = (err or out).replace(copy, self.root).strip()
                self.module.fail_json(
                    msg=f"nginx refuses the new configuration, the present one stays: {text}", rc=code
                )

    def ensure(self) -> dict:
        staged = self.module.params["staged"]
        if not os.path.isdir(staged) or not os.path.isdir(os.path.join(self.root, "sites-enabled")):
            if self.module.check_mode:
                return {"changed": True, "msg": "nginx or the staged files are not there yet."}
            self.module.fail_json(msg=f"There is no {staged}, or nginx is not installed")
        tree = read_tree(staged)
        if "site.conf" not in tree:
            self.module.fail_json(msg=f"{staged} has no site.conf")
        digest = tree_digest(tree)
        target = f"{self.name}.sets/{digest}"
        entry = os.path.join("..", self.name, "site.conf")
        place = os.path.join(self.sets, digest)
        wanted = [(self.link, target), (self.entry, entry)]
        wrong = [(path, to) for path, to in wanted if not os.path.islink(path) or os.readlink(path) != to]
        damaged = not os.path.isdir(place) or read_tree(place) != tree
        stray = os.path.islink(self.default)
        result = {"changed": bool(wrong or damaged or stray), "digest": digest}
        if not result["changed"]:
            return result
        for path, _to in wrong:
            if os.path.lexists(path) and not os.path.islink(path):
                self.module.fail_json(msg=f"{path} should be a link and is something else; move it away and run again")
        self.test(tree)
        if self.module.check_mode:
            return result
        os.umask(0o022)
        if damaged:
            shutil.rmtree(place, ignore_errors=True)
            write_tree(place, tree)
        if stray:
            os.unlink(self.default)
        for path, to in wrong:
            point(path, to)
        for name in os.listdir(self.sets):
            if name != digest:
                shutil.rmtree(os.path.join(self.sets, name))
        return result


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "staged": {"type": "path", "required": True},
            "name": {"type": "str", "required": True},
            "root": {"type": "path", "default": "/etc/nginx"},
        },
        supports_check_mode=True,
    )
    module.exit_json(**Config(module).ensure())


if __name__ == "__main__":
    main()
