# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""What a wheelhouse is made of, decided without touching the network: pure functions and hashing."""

from __future__ import annotations

import fnmatch
import hashlib
import io
import json
import os
import re
import stat
import tarfile
from collections.abc import Callable, Iterable, Iterator

# Part of every digest: a new layout of the bundle is a new bundle.
FORMAT = "1"
# Never part of a site: version control, caches, virtual environments, earlier builds.
SKIPPED = (
    ".*",
    "__pycache__",
    "*.pyc",
    "*.pyo",
    "*.egg-info",
    "build",
    "dist",
    "node_modules",
    "venv",
    "env",
    "*.sqlite3",
    "*.log",
)
# What a wheel is built from when the project keeps its packages under src/.
SRC_LAYOUT = ("pyproject.toml", "setup.py", "setup.cfg", "MANIFEST.in", "README*", "LICEN[CS]E*", "src")
# glibc of the oldest supported Debian (12) is 2.36.
NEWEST_MANYLINUX = 36
OLDEST_MANYLINUX = {"x86_64": 5, "aarch64": 17}


class WheelhouseError(Exception):
    """Something an operator has to mend; the text says what."""


def platform_tags(machine: str) -> list[str]:
    """The platform tags whose wheels run on a node of this machine type, best first."""
    if machine not in OLDEST_MANYLINUX:
        raise WheelhouseError(
            f"Nodes of machine type {machine} are not supported; known are {', '.join(OLDEST_MANYLINUX)}"
        )
    tags = [f"manylinux_2_{minor}_{machine}" for minor in range(NEWEST_MANYLINUX, OLDEST_MANYLINUX[machine] - 1, -1)]
    legacy = {"x86_64": ["manylinux2014", "manylinux2010", "manylinux1"], "aarch64": ["manylinux2014"]}[machine]
    return [*tags, *(f"{tag}_{machine}" for tag in legacy), f"linux_{machine}"]


def target_environment(python_version: str, machine: str) -> dict[str, str]:
    """Values of the environment markers (PEP 508) on a node."""
    return {
        "implementation_name": "cpython",
        "implementation_version": f"{python_version}.0",
        "os_name": "posix",
        "platform_machine": machine,
        "platform_python_implementation": "CPython",
        "platform_release": "",
        "platform_system": "Linux",
        "platform_version": "",
        "python_full_version": f"{python_version}.0",
        "python_version": python_version,
        "sys_platform": "linux",
        "extra": "",
    }


def select_requirements(text: str, applies: Callable[[str], bool], source: str = "the lock file") -> list[str]:
    """The locked requirements that apply on the node, each ``name==version --hash=...`` without its marker.

    pip evaluates markers for the Python it runs under, also when it downloads for another one; so they are
    evaluated here. Anything that is not an exact, hashed pin is refused.
    """
    selected = []
    for line in re.sub(r"\\\n", " ", text).splitlines():
        line = re.sub(r"(^|\s)#.*$", "", line).strip()
        if not line:
            continue
        if line.startswith("-"):
            raise WheelhouseError(f"{source}: options are not allowed in the lock: {line}")
        head, *hashes = re.split(r"\s+(?=--hash=)", line)
        requirement, _, marker = head.partition(";")
        requirement = requirement.strip()
        if not re.match(r"[A-Za-z0-9][A-Za-z0-9._-]*(\[[A-Za-z0-9,._ -]*\])?==[^\s*,;]+\Z", requirement):
            raise WheelhouseError(f"{source}: {requirement!r} is not pinned to one version; lock it with hashes")
        if not hashes or not all(re.match(r"--hash=sha256:[0-9a-f]{64}\Z", item) for item in hashes):
            raise WheelhouseError(f"{source}: {requirement} has no SHA-256 hash; lock it with hashes")
        if not marker.strip() or applies(marker.strip()):
            selected.append(" ".join([requirement, *hashes]))
    if not selected:
        raise WheelhouseError(f"{source} names no package for this Python")
    return selected


def _matches(name: str, patterns: Iterable[str]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def source_files(root: str) -> list[str]:
    """The files of a source tree that count, as sorted relative paths."""
    top = sorted(os.listdir(root))
    packaged = any(name in top for name in ("pyproject.toml", "setup.py", "setup.cfg"))
    if packaged and os.path.isdir(os.path.join(root, "src")):
        top = [name for name in top if _matches(name, SRC_LAYOUT)]
    found = []

    def walk(relative: str) -> None:
        full = os.path.join(root, relative)
        if _matches(os.path.basename(relative), SKIPPED):
            return
        if os.path.isdir(full) and not os.path.islink(full):
            if os.path.exists(os.path.join(full, "pyvenv.cfg")):
                return
            for name in sorted(os.listdir(full)):
                walk(f"{relative}/{name}")
        elif os.path.isfile(full):
            found.append(relative)

    for name in top:
        walk(name)
    return sorted(found)


def is_packaged(root: str) -> bool:
    """Whether a source tree can be built into a wheel; else it is shipped as it is."""
    if os.path.exists(os.path.join(root, "setup.py")):
        return True
    path = os.path.join(root, "pyproject.toml")
    if not os.path.exists(path):
        return False
    with open(path, encoding="utf-8") as stream:
        return re.search(r"^\[(build-system|project)\]", stream.read(), re.MULTILINE) is not None


def hash_file(path: str) -> str:
    """SHA-256 of a file's content."""
    with open(path, "rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def hash_project(path: str) -> str:
    """One hash for a wheel or a source tree: names, execute bits and contents."""
    if os.path.isfile(path):
        return f"{os.path.basename(path)} {hash_file(path)}"
    digest = hashlib.sha256()
    for name in source_files(path):
        full = os.path.join(path, name)
        executable = "x" if os.stat(full).st_mode & stat.S_IXUSR else "-"
        digest.update(f"{executable} {hash_file(full)} {name}\n".encode("utf-8", "surrogateescape"))
    return digest.hexdigest()


def bundle_digest(requirements: Iterable[str], projects: Iterable[str], python_version: str, machine: str) -> str:
    """The name of the bundle that these inputs give."""
    inputs = [FORMAT, python_version, machine, list(requirements), list(projects)]
    return hashlib.sha256(json.dumps(inputs).encode()).hexdigest()[:20]


def explain_pip(output: str, python_version: str) -> str:
    """A sentence for what pip says when it fails."""
    lines = [line.strip() for line in output.splitlines() if line.strip()]
    errors = [line.removeprefix("ERROR: ") for line in lines if line.startswith("ERROR: ")]
    missing = next(
        (m.group(1) for e in errors if (m := re.search(r"No matching distribution found for (\S+)", e))), None
    )
    versions = next((m.group(1) for e in errors if (m := re.search(r"\(from versions: ([^)]*)\)", e))), None)
    if re.search(
        r"Max retries exceeded|NewConnectionError|Could not fetch URL|Temporary failure in name resolution", output
    ):
        return (
            "The package index could not be reached from the controller. Set index-url in its pip configuration, "
            "or PIP_NO_INDEX=1 and PIP_FIND_LINKS to a directory of wheels"
        )
    if missing is not None and versions not in (None, "none"):
        newest = ", ".join(versions.split(", ")[-5:])
        return f"There is no wheel of {missing} for Python {python_version}; the index has {newest}"
    if missing is not None:
        return (
            f"There is no wheel of {missing} for Python {python_version} on Linux in the package index "
            "(or the index could not be reached). Choose a version that has one, "
            "or add its wheel to a directory in PIP_FIND_LINKS"
        )
    if any("THESE PACKAGES DO NOT MATCH THE HASHES" in line for line in lines):
        return "A downloaded file does not match the hash in the lock file. " + " ".join(lines[-3:])
    return " ".join(errors or lines[-3:]) or "pip failed and said nothing"


def _add(archive: tarfile.TarFile, name: str, data: bytes, mode: int) -> None:
    member = tarfile.TarInfo(name)
    member.size, member.mode, member.mtime = len(data), mode, 0
    archive.addfile(member, io.BytesIO(data))


def write_bundle(path: str, manifest: dict, wheels: Iterable[str], sources: Iterable[str]) -> None:
    """Write the tar of wheels and plain source trees; the same inputs give the same bytes.

    It appears under its name only when it is whole and on disk.
    """
    temporary = f"{path}.{os.getpid()}"
    with open(temporary, "wb") as stream:
        with tarfile.open(fileobj=stream, mode="w", format=tarfile.GNU_FORMAT) as archive:
            _add(archive, "manifest.json", (json.dumps(manifest, indent=1, sort_keys=True) + "\n").encode(), 0o644)
            for wheel in sorted(wheels):
                with open(wheel, "rb") as content:
                    _add(archive, f"wheels/{os.path.basename(wheel)}", content.read(), 0o644)
            for number, root in enumerate(sources):
                for name in source_files(root):
                    full = os.path.join(root, name)
                    with open(full, "rb") as content:
                        mode = 0o755 if os.stat(full).st_mode & stat.S_IXUSR else 0o644
                        _add(archive, f"source/{number}/{name}", content.read(), mode)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(temporary, path)


def surplus(directory: str, suffix: str, keep: int) -> Iterator[str]:
    """The oldest entries of a directory beyond the newest ``keep``."""
    entries = [os.path.join(directory, name) for name in os.listdir(directory) if name.endswith(suffix)]
    entries.sort(key=lambda entry: os.stat(entry).st_mtime, reverse=True)
    yield from entries[keep:]
