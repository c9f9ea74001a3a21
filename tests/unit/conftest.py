"""Lets unit tests import the collection's plugins under the name that Ansible gives them."""

from __future__ import annotations

from pathlib import Path

from ansible.utils.collection_loader._collection_finder import _AnsibleCollectionFinder

ROOT = Path(__file__).resolve().parents[2]

_AnsibleCollectionFinder(paths=[str(ROOT / "collections")])._install()
