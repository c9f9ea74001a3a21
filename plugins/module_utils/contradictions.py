# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Which of the copies that contradict each other is the right one: pure functions."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any


def choose(
    differences: Mapping[str, Mapping[str, Any]], catalog: Mapping[str, str]
) -> tuple[dict[str, dict[str, Any]], dict[str, str]]:
    """(losers by node: name -> entry as seen, unresolved: name -> why).

    *differences* are names whose entries the bricks do not share, *catalog* the SHA-256 of names that it knows. Only a
    copy with the catalog's hash can win; no guess by time, size or number. Names that a brick merely lacks need nobody
    to lose.
    """
    losers: dict[str, dict[str, Any]] = {}
    unresolved: dict[str, str] = {}
    for name, entries in differences.items():
        there = {node: entry for node, entry in entries.items() if entry is not None}
        first = next(iter(there.values()))
        if all(entry == first for entry in there.values()):
            continue
        if not all("size" in entry for entry in there.values()):
            unresolved[name] = "it is not a regular file everywhere, or cannot be read"
            continue
        wanted = catalog.get(name)
        if not wanted:
            unresolved[name] = "the catalog does not know it as stored"
            continue
        right = {node: entry for node, entry in there.items() if entry["sha256"] == wanted}
        if not right:
            unresolved[name] = "no copy has the catalog's hash"
            continue
        # Copies with the right bytes can still have two identities; the more frequent one stays, else the first node's.
        gfid = Counter(entry.get("gfid") for entry in right.values()).most_common(1)[0][0]
        for node, entry in there.items():
            if node not in right or entry.get("gfid") != gfid:
                losers.setdefault(node, {})[name] = entry
    return losers, unresolved
