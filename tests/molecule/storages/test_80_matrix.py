"""The package's own tests of storages, catalog and outbox with every supported Django, and a real PostgreSQL."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers import LONG, Rig, chance
from kit.lab import ROOT
from kit.testing import Outcome, junit
from proof import build_wheels, install_wheels, packed, unpack

# The database's host has Debian 13's Python and PostgreSQL's programs, and no Gluster that the load would disturb.
HOST, PROJECT = "db1", "/opt/matrix"
LOCKS = {file.stem.removeprefix("django-"): file for file in sorted((ROOT / "tests/matrix").glob("django-*.txt"))}
SUPPORTED = ("4.2", "5.2", "6.0", "6.1")
TESTS = [
    *(f"tests/unit/django/test_{name}.py" for name in (
        "names", "storage", "whole_files", "opened", "derived", "guard", "hung_volume",
    )),
    "tests/unit/django/catalog",
    "tests/unit/django/remote",
]  # fmt: skip
SHORT = [
    *(f"tests/unit/django/test_{name}.py" for name in ("names", "storage", "derived")),
    *(f"tests/unit/django/catalog/test_{name}.py" for name in ("catalog", "numbers", "admin")),
    "tests/unit/django/remote/test_outbox.py",
]
# tests/unit/conftest.py is for Ansible's modules.
FILES = {name: ROOT / name for name in ("pyproject.toml", "src", "example", "tests/unit/django")}
ON_NODE = [(version, "node") for version in SUPPORTED]
# The controller's Python is older: 5.2 with it is what the part `unit` runs, 6.0 and later need Python 3.12.
COMBINATIONS = [*ON_NODE, ("4.2", "controller")] if LONG else [chance("django").choice(ON_NODE)]


def test_every_supported_django_has_a_lock() -> None:
    assert tuple(LOCKS) == SUPPORTED
    for version, file in LOCKS.items():
        assert f"\ndjango=={version}." in file.read_text(encoding="utf-8"), file


def judge(outcome: Outcome, code: int, said: str, least: int) -> None:
    """All ran, none was skipped without a known reason."""
    assert outcome.failed == 0 and code == 0, f"{outcome.problems[:20]}\n{said[-4000:]}"
    assert outcome.passed >= least, f"only {outcome.passed} tests ran"


@pytest.mark.parametrize(("version", "where"), COMBINATIONS)
def test_with_django(rig: Rig, version: str, where: str, tmp_path: Path) -> None:
    if where == "node":
        on_the_node(rig, version, tmp_path)
    else:
        on_the_controller(version, tmp_path)


def on_the_node(rig: Rig, version: str, tmp_path: Path) -> None:
    python = f"{PROJECT}-{version}"
    install_wheels(rig, HOST, build_wheels(LOCKS[version]), python)
    rig.root(HOST, f"rm -rf {PROJECT}; mkdir {PROJECT}")
    with packed(FILES) as content:
        unpack(rig, HOST, content, PROJECT)
    tests = TESTS if LONG else SHORT
    done = rig.run_root(
        HOST, f"cd {PROJECT} && nice {python}/bin/python3 -B -m pytest -q --junitxml=report.xml {' '.join(tests)}",
        timeout=900,
    )
    report = tmp_path / "report.xml"
    report.write_text(rig.root(HOST, f"cat {PROJECT}/report.xml"), encoding="utf-8")
    said = rig.root(HOST, f"{python}/bin/python3 -c 'import django, sys; print(django.__version__, sys.version)'")
    assert said.startswith(f"{version}.") and " 3.13." in said, said
    judge(junit(report), done.returncode, done.stdout + done.stderr, 400 if LONG else 100)


def on_the_controller(version: str, tmp_path: Path) -> None:
    python = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(python)], check=True, timeout=120)
    subprocess.run(
        [sys.executable, "-m", "pip", f"--python={python}/bin/python", "install", "-q", "--require-hashes",
         "--only-binary=:all:", f"--requirement={LOCKS[version]}"], check=True, timeout=600,
    )  # fmt: skip
    project = tmp_path / "project"
    for name, path in FILES.items():
        target = project / name
        target.parent.mkdir(parents=True, exist_ok=True)
        subprocess.run(["cp", "-a", str(path), str(target)], check=True)
    report = tmp_path / "report.xml"
    clean = {name: value for name, value in os.environ.items() if name in {"PATH", "HOME", "LC_ALL", "LANG"}}
    done = subprocess.run(
        ["nice", str(python / "bin/python"), "-B", "-m", "pytest", "-q", f"--junitxml={report}", *TESTS],
        cwd=project, env=clean, capture_output=True, text=True, timeout=1200, check=False,
    )
    judge(junit(report), done.returncode, done.stdout + done.stderr, 400)
