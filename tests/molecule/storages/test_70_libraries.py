"""Wagtail, easy-thumbnails and django-filer with the settings that docs/volume-storage.md gives, on three nodes."""

from __future__ import annotations

import json
import re
import secrets
from collections.abc import Callable
from typing import Any

import pytest

from helpers import NODES, Rig, wait_until
from kit.lab import ROOT
from proof import build_wheels, copy_directory, install_wheels, make_database, make_place, packed, same, unpack

NAME = "libraries"
VENV, PROJECT = "/opt/libraries-venv", "/opt/libraries"
Step = Callable[[str, str], dict[str, Any]]


def documented() -> str:
    """Return the page's settings as one program."""
    page = (ROOT / "docs/volume-storage.md").read_text(encoding="utf-8")
    blocks = re.findall(r"^```python\n(.*?)^```$", page, re.MULTILINE | re.DOTALL)
    text = "\n".join(blocks)
    for setting in ("THUMBNAIL_DEFAULT_STORAGE_ALIAS", "WAGTAILIMAGES_RENDITION_STORAGE", "FILER_STORAGES"):
        assert setting in text, f"docs/volume-storage.md no longer gives {setting}"
    return text


@pytest.fixture(scope="module")
def step(rig: Rig) -> Step:
    """Run one step of tests/apps/flow.py on a node."""
    sentinel = secrets.token_hex(16)
    root = make_place(rig, NAME, sentinel)
    make_database(rig, NAME)
    bundle = build_wheels(ROOT / "tests/apps/requirements.txt")
    install_wheels(rig, "node1", bundle, VENV)
    copy_directory(rig, "node1", NODES[1:], VENV, bundle)
    texts = {"libraries/documented.txt": documented()}
    for host in NODES:
        rig.root(host, f"rm -rf {PROJECT}; mkdir {PROJECT}")
        with packed({name: ROOT / "tests/apps" / name for name in ("flow.py", "libraries")}, texts) as content:
            unpack(rig, host, content, PROJECT)

    def run(host: str, name: str) -> dict[str, Any]:
        said = rig.root(
            host,
            f"export LIBRARIES_ROOT={root} LIBRARIES_DATABASE={NAME} LIBRARIES_SENTINEL={sentinel};"
            f" nice tribrick-manage --release {VENV} --python {PROJECT}/flow.py {name}",
            timeout=180,
        )
        found: dict[str, Any] = json.loads(said.splitlines()[-1])
        return found

    return run


def walk(rig: Rig, host: str) -> dict[str, str]:
    """Return name -> hash of every file that the libraries keep, as one node's mount shows it."""
    said = rig.root(host, f"cd {rig.mount}/{NAME} && find . -type f ! -name .tribrick-volume -exec sha256sum {{}} +")
    return {name.removeprefix("./"): found for found, name in (line.split("  ", 1) for line in said.splitlines())}


def test_upload_here_derive_there_read_and_delete_elsewhere(rig: Rig, step: Step) -> None:
    uploaded = step("node1", "upload")
    assert len({one["name"] for one in uploaded.values()}) == len(uploaded) == 7
    derived = step("node2", "derive")
    assert len({one["name"] for one in derived.values()}) == len(derived) == 6
    # node3 has made nothing; it reads what the others made, byte for byte.
    same(step("node3", "read"), uploaded | derived)

    renewed = step("node2", "renew")
    # Wagtail made its renditions again under new names, and filer moved a file there and back.
    assert renewed["wagtail one"]["name"] != derived["wagtail one"]["name"]
    assert renewed["filer private"]["name"] != derived["filer private"]["name"]
    assert {key: one["sha256"] for key, one in renewed.items()} == {
        key: one["sha256"] for key, one in (uploaded | derived).items()
    }
    there = walk(rig, "node1")
    # Nothing is left of what was replaced; what is more are thumbnails of its own that filer makes (icons).
    assert {one["sha256"] for one in renewed.values()} <= set(there.values())
    gone = {one["name"] for one in (uploaded | derived).values()} - {one["name"] for one in renewed.values()}
    assert not [path for path in there for name in gone if path.endswith(name)], (gone, sorted(there))

    swept = step("node1", "sweep")
    assert swept["seen"] >= 7 and swept["strays"] == [], "files in use would be taken away, or adopted"

    step("node3", "delete")
    for host in NODES:
        wait_until(f"every file to be gone on {host}", lambda host=host: same(walk(rig, host), {}), 10)


