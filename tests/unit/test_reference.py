"""The API reference names every module of the package, or it is known to be no interface."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
# Parts of what the reference shows, Django's machinery, and re-exports (tribrick.storage has them).
INSIDE = {
    "tribrick",
    "tribrick.admin",
    "tribrick.apps",
    "tribrick.fallback",
    "tribrick.storage.asynchronous",
    "tribrick.storage.derived",
    "tribrick.storage.distributed",
    "tribrick.storage.hybrid",
    "tribrick.storage.mount",
    "tribrick.storage.saving",
    "tribrick.storage.volume",
    "tribrick.sync.command",
}


def modules() -> set[str]:
    """Every module of the package but migrations and the command line."""
    found = set()
    for file in (ROOT / "src" / "tribrick").rglob("*.py"):
        parts = file.relative_to(ROOT / "src").with_suffix("").parts
        if not {"migrations", "management"} & set(parts):
            found.add(".".join(part for part in parts if part != "__init__"))
    return found


def shown() -> set[str]:
    """The modules and, for classes shown one by one, the modules they are shown from."""
    text = "".join(file.read_text(encoding="utf-8") for file in sorted((ROOT / "docs" / "api").glob("*.rst")))
    found = set(re.findall(r"automodule:: (\S+)", text))
    return found | {name.rpartition(".")[0] for name in re.findall(r"auto(?:class|exception):: (tribrick\.\S+)", text)}


def test_every_module_is_shown_or_known_to_be_internal() -> None:
    there = modules()
    assert len(there) > 20
    assert there - shown() - INSIDE == set(), "name it in docs/api/*.rst, or here if it is no interface"
    assert (shown() | INSIDE) - there == set(), "named, but not there"
    assert shown() & INSIDE == set()
