#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Install a site from its bundle into a directory of its own."""

from __future__ import annotations

DOCUMENTATION = r"""
module: django_release
short_description: Install a site from its bundle into a directory of its own
description:
  - Makes a virtual environment from the bundle of M(tribrick.media.wheelhouse), without a package index, and collects
    the static files. Nothing that runs is touched.
  - A marker is written last. A directory without it was left by a run that was killed, and is made anew.
  - Older releases and bundles go, except the one in use.
options:
  bundle: {description: The bundle on the node., type: path, required: true}
  digest: {description: Name of the bundle and of the release., type: str, required: true}
  releases: {description: Directory of all releases., type: path, required: true}
  current: {description: Link to the release in use., type: path, required: true}
  python: {description: Interpreter of the node., type: path, default: /usr/bin/python3}
  manage: {description: Program that runs a release's management commands., type: path, required: true}
  programs:
    description: Programs that the release must bring.
    type: list
    elements: str
    default: [gunicorn]
  collectstatic: {description: Whether to collect static files., type: bool, default: true}
  keep: {description: Number of releases that stay besides the new one and the one in use., type: int, default: 1}
  timeout: {description: Seconds that one step may take., type: int, default: 600}
attributes:
  check_mode:
    description: Predicts.
    support: full
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Install the release
  tribrick.media.django_release:
    bundle: /opt/tribrick/wheelhouse/0123456789abcdef0123.tar
    digest: 0123456789abcdef0123
    releases: /opt/tribrick/releases
    current: /opt/tribrick/site
    manage: /usr/local/bin/tribrick-manage
"""

RETURN = r"""
release: {description: Directory of the release., type: str, returned: always}
removed: {description: Releases and bundles that were removed., type: list, elements: str, returned: always}
"""

import glob
import hashlib
import json
import os
import shutil
import tarfile

from ansible.module_utils.basic import AnsibleModule

COMPLETE = ".complete"
STATIC = ".static-collected"


class Release:
    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.path = os.path.join(self.params["releases"], self.params["digest"])

    def run(self, what: str, *words: str, **more) -> str:
        command = ["timeout", str(self.params["timeout"]), *words]
        environment = {"LC_ALL": "C.UTF-8", "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull, **more}
        code, out, err = self.module.run_command(command, environ_update=environment, cwd="/")
        if code != 0:
            lines = (err or out).strip().splitlines()
            text = f"no end after {self.params['timeout']} s" if code == 124 else " ".join(lines[-5:])
            self.module.fail_json(msg=f"{what} failed: {text}", rc=code, stdout=out, stderr=err)
        return out

    def marked(self, name: str) -> bool:
        return os.path.exists(os.path.join(self.path, name))

    def mark(self, name: str) -> None:
        # The release reaches the disk before its marker, or a power cut leaves one that only looks whole.
        self.run("Writing the release to the disk", "sync", "--file-system", self.path)
        with open(os.path.join(self.path, name), "w", encoding="utf-8") as stream:
            stream.flush()
            os.fsync(stream.fileno())

    def unpack(self) -> dict:
        # Written by hand: Debian 12's Python has no safe filter for extractall.
        with tarfile.open(self.params["bundle"]) as archive:
            for member in archive:
                content = archive.extractfile(member)
                if content is None or member.name.startswith("/") or ".." in member.name.split("/"):
                    self.module.fail_json(
                        msg=f"{self.params['bundle']} holds something that is no plain file: {member.name}"
                    )
                path = os.path.join(self.path, member.name)
                os.makedirs(os.path.dirname(path), exist_ok=True)
                with content, open(path, "wb") as stream:
                    shutil.copyfileobj(content, stream)
                os.chmod(path, member.mode & 0o755)
        with open(os.path.join(self.path, "manifest.json"), encoding="utf-8") as stream:
            manifest = json.load(stream)
        for name, wanted in manifest["wheels"].items():
            with open(os.path.join(self.path, "wheels", name), "rb") as stream:
                if hashlib.file_digest(stream, "sha256").hexdigest() != wanted:
                    self.module.fail_json(
                        msg=f"{self.params['bundle']} is damaged: {name} has a wrong hash; remove it and run again"
                    )
        return manifest

    def build(self) -> None:
        if os.path.lexists(self.path):
            shutil.rmtree(self.path)
        os.makedirs(self.path, mode=0o755)
        manifest = self.unpack()
        version = self.run(
            "Asking Python for its version",
            self.params["python"],
            "-c",
            "import sys; print('%d.%d' % sys.version_info[:2])",
        )
        if version.strip() != manifest["python_version"]:
            self.module.fail_json(
                msg=f"The bundle is for Python {manifest['python_version']}, the node has {version.strip()}"
            )
        pips = sorted(glob.glob("/usr/share/python-wheels/pip-*.whl"))
        if not pips:
            self.module.fail_json(msg="There is no pip wheel in /usr/share/python-wheels; install python3-venv")
        # The release gets no pip of its own: nothing is ever installed into it again.
        self.run("Making the virtual environment", self.params["python"], "-m", "venv", "--without-pip", self.path)
        python = os.path.join(self.path, "bin", "python3")
        wheels = sorted(glob.glob(os.path.join(self.path, "wheels", "*.whl")))
        self.run(
            "Installing the wheels",
            python,
            "-m",
            "pip",
            "install",
            "-q",
            "--no-deps",
            "--no-cache-dir",
            *wheels,
            PYTHONPATH=pips[-1],
        )
        self.run("Checking the packages' dependencies", python, "-m", "pip", "check", PYTHONPATH=pips[-1])
        sources = [os.path.join(self.path, "source", str(number)) for number in range(manifest["sources"])]
        if sources:
            packages = glob.glob(os.path.join(self.path, "lib", "python*", "site-packages"))[0]
            with open(os.path.join(packages, "tribrick-source.pth"), "w", encoding="utf-8") as stream:
                stream.write("\n".join(sources) + "\n")
        for program in self.params["programs"]:
            if not os.path.exists(os.path.join(self.path, "bin", program)):
                self.module.fail_json(
                    msg=f"The release has no {program}; add it to the lock file of the site's requirements"
                )
        shutil.rmtree(os.path.join(self.path, "wheels"))
        self.mark(COMPLETE)

    def surplus(self) -> list[str]:
        """Old releases and bundles, oldest first."""
        in_use = {self.params["digest"], os.path.basename(os.path.realpath(self.params["current"]))}
        names = [n for n in os.listdir(self.params["releases"]) if n not in in_use]
        names.sort(key=lambda n: os.stat(os.path.join(self.params["releases"], n)).st_mtime)
        gone = names[: max(0, len(names) - self.params["keep"])]
        store = os.path.dirname(self.params["bundle"])
        kept = (in_use | set(names)) - set(gone)
        bundles = [n for n in os.listdir(store) if n.endswith(".tar") and n.removesuffix(".tar") not in kept]
        return [os.path.join(self.params["releases"], n) for n in gone] + [os.path.join(store, n) for n in bundles]

    def ensure(self) -> dict:
        installed = self.marked(COMPLETE)
        collected = self.marked(STATIC) or not self.params["collectstatic"]
        result = {"changed": not (installed and collected), "release": self.path, "removed": []}
        if not result["changed"] or self.module.check_mode:
            return result
        os.umask(0o022)
        if not installed:
            self.build()
        if not collected:
            self.run(
                "Collecting static files",
                self.params["manage"],
                "--release",
                self.path,
                "collectstatic",
                "--noinput",
                "--verbosity=0",
            )
            self.mark(STATIC)
        for path in self.surplus():
            result["removed"].append(path)
            if os.path.isdir(path):
                # Without its marker first: a run that is killed here must not leave half a release that looks whole.
                marker = os.path.join(path, COMPLETE)
                if os.path.exists(marker):
                    os.unlink(marker)
                shutil.rmtree(path)
            else:
                os.unlink(path)
        return result


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "bundle": {"type": "path", "required": True},
            "digest": {"type": "str", "required": True},
            "releases": {"type": "path", "required": True},
            "current": {"type": "path", "required": True},
            "python": {"type": "path", "default": "/usr/bin/python3"},
            "manage": {"type": "path", "required": True},
            "programs": {"type": "list", "elements": "str", "default": ["gunicorn"]},
            "collectstatic": {"type": "bool", "default": True},
            "keep": {"type": "int", "default": 1},
            "timeout": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    module.exit_json(**Release(module).ensure())


if __name__ == "__main__":
    main()
