#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Build the bundle of wheels from which a node installs a site without a package index."""

from __future__ import annotations

DOCUMENTATION = r"""
module: wheelhouse
short_description: Build the bundle of wheels from which a node installs a site without a package index
description:
  - Runs on the controller. Downloads the locked wheels for the node's Python, builds the projects' wheels and packs
    both into one tar, named by a digest over all that goes in. The same inputs give the same bytes.
  - With nothing changed it hashes the sources and looks for the file, nothing more.
  - A project without packaging (no C(pyproject.toml) with C([project]) or C([build-system]), no C(setup.py)) is
    packed as it is; the node puts its directory on the module path.
options:
  requirements:
    description: Lock file, one exact version and SHA-256 hashes for each package; all that the projects need.
    type: path
    required: true
  projects:
    description: Source directories or finished wheels, installed without looking at their dependencies.
    type: list
    elements: path
    default: []
  python_version:
    description: Python of the node, as in C(3.13).
    type: str
    required: true
  machine:
    description: Machine type of the node.
    type: str
    default: x86_64
  cache:
    description: Directory for bundles and downloads.
    type: path
    default: ~/.cache/tribrick/wheelhouse
  keep:
    description: Number of bundles that stay in the cache.
    type: int
    default: 6
  timeout:
    description: Seconds that one call of pip may take.
    type: int
    default: 600
attributes:
  check_mode:
    description: Names the bundle, builds nothing.
    support: full
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Build the wheelhouse
  tribrick.media.wheelhouse:
    requirements: requirements/site.txt
    projects: [., example]
    python_version: "3.13"
  delegate_to: localhost
  become: false
"""

RETURN = r"""
digest: {description: Name of the bundle., type: str, returned: always}
bundle: {description: The bundle on the controller., type: str, returned: always}
exists: {description: Whether the bundle is there now., type: bool, returned: always}
wheels: {description: Files in the bundle., type: list, elements: str, returned: when it exists}
"""

import contextlib
import fcntl
import importlib.util
import json
import os
import shutil
import sys
import tarfile
import tempfile
from collections.abc import Iterator

import tomllib
from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils import wheelhouse as kit


def marker_test(python_version: str, machine: str):
    """A function that says whether a marker holds on the node."""
    from packaging.markers import InvalidMarker, Marker

    environment = kit.target_environment(python_version, machine)

    def applies(marker: str) -> bool:
        try:
            return Marker(marker).evaluate(environment)
        except InvalidMarker as error:
            raise kit.WheelhouseError(f"The lock file has a marker that is not understood: {marker}") from error

    return applies


@contextlib.contextmanager
def only_one(directory: str) -> Iterator[None]:
    """Builds for several nodes may start together; one at a time works in the cache."""
    with open(os.path.join(directory, ".lock"), "w", encoding="utf-8") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        for name in os.listdir(directory):
            # Left behind by a build that was killed: nobody else can be building now.
            if name.startswith(".build-"):
                shutil.rmtree(os.path.join(directory, name))
        yield


class Builder:
    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.python_version = module.params["python_version"]
        self.machine = module.params["machine"]
        self.cache = module.params["cache"]

    def pip(self, *words: str) -> None:
        command = ["timeout", str(self.module.params["timeout"]), sys.executable, "-m", "pip", *words]
        code, out, err = self.module.run_command(
            command,
            environ_update={
                "LC_ALL": "C.UTF-8",
                "SOURCE_DATE_EPOCH": "315532800",
                "PIP_DISABLE_PIP_VERSION_CHECK": "1",
            },
        )
        if code == 124:
            raise kit.WheelhouseError(f"pip {words[0]} took longer than {self.module.params['timeout']} s")
        if code != 0:
            if "No module named pip" in err:
                raise kit.WheelhouseError(
                    f"The controller's {sys.executable} has no pip; run Ansible from the kit's .venv"
                )
            raise kit.WheelhouseError(kit.explain_pip(out + err, self.python_version))

    def download(self, requirements: list[str]) -> list[str]:
        """Fetch the locked wheels once for each lock; return their paths."""
        store = os.path.join(
            self.cache, "downloads", kit.bundle_digest(requirements, [], self.python_version, self.machine)
        )
        if not os.path.isdir(store):
            os.makedirs(os.path.dirname(store), exist_ok=True)
            with tempfile.TemporaryDirectory(dir=os.path.dirname(store), prefix=".new-") as folder:
                lock = os.path.join(folder, "lock.txt")
                with open(lock, "w", encoding="utf-8") as stream:
                    stream.write("\n".join(requirements) + "\n")
                wheels = os.path.join(folder, "wheels")
                platforms = [f"--platform={tag}" for tag in kit.platform_tags(self.machine)]
                self.pip(
                    *(
                        "download",
                        "--quiet",
                        "--no-deps",
                        "--only-binary=:all:",
                        "--require-hashes",
                        "--implementation=cp",
                    ),
                    *(
                        f"--python-version={self.python_version}",
                        *platforms,
                        f"--dest={wheels}",
                        f"--requirement={lock}",
                    ),
                )
                os.replace(wheels, store)
        for old in kit.surplus(os.path.dirname(store), "", self.module.params["keep"]):
            if old != store:
                shutil.rmtree(old)
        return [os.path.join(store, name) for name in sorted(os.listdir(store))]

    def build(self, project: str, folder: str) -> None:
        """Build a project's wheel from a copy, so that its own directory stays clean."""
        copy = os.path.join(folder, "source")
        for name in kit.source_files(project):
            target = os.path.join(copy, name)
            os.makedirs(os.path.dirname(target), exist_ok=True)
            shutil.copyfile(os.path.join(project, name), target)
        backend = "setuptools.build_meta"
        if os.path.exists(os.path.join(project, "pyproject.toml")):
            with open(os.path.join(project, "pyproject.toml"), "rb") as stream:
                backend = tomllib.load(stream).get("build-system", {}).get("build-backend", backend)
        # The controller's own build tool is locked with the kit's tool chain; pip would fetch any version.
        own = ["--no-build-isolation"] if importlib.util.find_spec(backend.split(".", 1)[0].split(":", 1)[0]) else []
        try:
            self.pip("wheel", "--quiet", "--no-deps", *own, f"--wheel-dir={folder}/wheels", copy)
        except kit.WheelhouseError as error:
            raise kit.WheelhouseError(f"The wheel of {project} could not be built. {error}") from error
        shutil.rmtree(copy)

    def bundle(self, path: str, digest: str, requirements: list[str], projects: list[str]) -> None:
        wheels = self.download(requirements)
        with tempfile.TemporaryDirectory(dir=self.cache, prefix=".build-") as folder:
            os.mkdir(os.path.join(folder, "wheels"))
            sources = []
            for project in projects:
                if os.path.isfile(project):
                    wheels.append(project)
                elif kit.is_packaged(project):
                    self.build(project, folder)
                else:
                    sources.append(project)
            built = [
                os.path.join(folder, "wheels", name) for name in sorted(os.listdir(os.path.join(folder, "wheels")))
            ]
            wheels += built
            names = sorted(os.path.basename(wheel) for wheel in wheels)
            if len(set(names)) != len(names):
                raise kit.WheelhouseError(
                    "Two of the projects or locked packages give the same wheel; remove one of them"
                )
            for wheel in built:
                if not wheel.endswith("-none-any.whl"):
                    raise kit.WheelhouseError(
                        f"{os.path.basename(wheel)} was compiled on the controller "
                        "and may not run on a node; give a finished wheel"
                    )
            manifest = {"digest": digest, "python_version": self.python_version, "machine": self.machine}
            manifest.update(
                {"wheels": {os.path.basename(wheel): kit.hash_file(wheel) for wheel in wheels}, "sources": len(sources)}
            )
            kit.write_bundle(path, manifest, wheels, sources)

    def run(self) -> dict:
        params = self.module.params
        projects = [os.path.abspath(project) for project in params["projects"]]
        for project in projects:
            if not os.path.isdir(project) and not (os.path.isfile(project) and project.endswith(".whl")):
                raise kit.WheelhouseError(f"{project} is neither a directory nor a wheel on the controller")
        try:
            with open(params["requirements"], encoding="utf-8") as stream:
                text = stream.read()
        except OSError as error:
            raise kit.WheelhouseError(
                f"The lock file {params['requirements']} cannot be read: {error.strerror}"
            ) from error
        applies = marker_test(self.python_version, self.machine)
        requirements = kit.select_requirements(text, applies, params["requirements"])
        hashes = [kit.hash_project(project) for project in projects]
        digest = kit.bundle_digest(requirements, hashes, self.python_version, self.machine)
        path = os.path.join(self.cache, f"{digest}.tar")
        changed = not os.path.exists(path)
        if changed and not self.module.check_mode:
            os.makedirs(self.cache, mode=0o700, exist_ok=True)
            with only_one(self.cache):
                changed = not os.path.exists(path)
                if changed:
                    self.bundle(path, digest, requirements, projects)
                    for old in kit.surplus(self.cache, ".tar", params["keep"]):
                        os.unlink(old)
        result = {"changed": changed, "digest": digest, "bundle": path, "exists": os.path.exists(path)}
        if result["exists"]:
            os.utime(path)
            with tarfile.open(path) as archive:
                manifest = archive.extractfile("manifest.json")
                result["wheels"] = sorted(json.load(manifest)["wheels"]) if manifest else []
        return result


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "requirements": {"type": "path", "required": True},
            "projects": {"type": "list", "elements": "path", "default": []},
            "python_version": {"type": "str", "required": True},
            "machine": {"type": "str", "default": "x86_64"},
            "cache": {"type": "path", "default": "~/.cache/tribrick/wheelhouse"},
            "keep": {"type": "int", "default": 6},
            "timeout": {"type": "int", "default": 600},
        },
        supports_check_mode=True,
    )
    try:
        module.exit_json(**Builder(module).run())
    except kit.WheelhouseError as error:
        module.fail_json(msg=f"{error}.".replace("..", "."))


if __name__ == "__main__":
    main()
