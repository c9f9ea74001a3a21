# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""What the recovery modules decide: pure functions of what was read."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.tribrick.media.plugins.module_utils.gluster import BrickHeal, is_are

Tree = Mapping[str, Mapping[str, Any]]


def left_to_heal(bricks: Sequence[BrickHeal]) -> int:
    """Entries that wait on any brick. Each brick lists what it knows, so the largest number is the nearest."""
    return max((brick.total or 0 for brick in bricks), default=0)


def heal_obstacles(bricks: Sequence[BrickHeal], absent: Sequence[str] = ()) -> list[str]:
    """Why healing cannot come to its end."""
    said = []
    away = [brick.brick for brick in bricks if not brick.connected and brick.brick.partition(":")[0] not in absent]
    if away:
        said.append(
            f"{is_are(away)} not connected; playbooks/check_health.yml says why. What waits for "
            f"{'it' if len(away) == 1 else 'them'} can only be healed then"
        )
    broken = max((brick.split_brain or 0 for brick in bricks), default=0)
    if broken:
        said.append(
            f"{broken} {'entry has' if broken == 1 else 'entries have'} copies that contradict each other; run "
            "playbooks/recover_split_brain.yml -e confirm=yes"
        )
    return said


def stuck(history: Sequence[tuple[float, int]], now: float, patience: float) -> bool:
    """Whether the number of waiting entries has not fallen for so many seconds."""
    if not history:
        return False
    lowest = min(count for _, count in history)
    since = next(at for at, count in history if count == lowest)
    return now - since >= patience


def full_crawls(text: str) -> tuple[frozenset[tuple[str, str]], bool]:
    """``volume heal NAME statistics``: ended full crawls by brick and start, and whether any crawl goes on."""
    ended = set()
    for part in re.split(r"^Crawl statistics for brick no ", text, flags=re.MULTILINE)[1:]:
        brick = part.split("\n", 1)[0].strip()
        for crawl in part.split("Starting time of crawl: ")[1:]:
            if "Ending time of crawl" in crawl and "Type of crawl: FULL" in crawl:
                ended.add((brick, crawl.split("\n", 1)[0].strip()))
    return frozenset(ended), "in progress" in text


def differing_directories(trees: Mapping[str, Mapping[str, str]]) -> list[str]:
    """Directories whose digest is not the same on every node, or that a node lacks."""
    names = set().union(*(tree.keys() for tree in trees.values())) if trees else set()
    return sorted(name for name in names if len({tree.get(name) for tree in trees.values()}) > 1)


def differences(trees: Mapping[str, Tree]) -> dict[str, dict[str, Any]]:
    """Names whose entry is not the same on every node: name -> node -> entry, None for none."""
    names = set().union(*(tree.keys() for tree in trees.values())) if trees else set()
    found = {}
    for name in sorted(names):
        entries = {node: tree.get(name) for node, tree in trees.items()}
        first = next(iter(entries.values()))
        if any(entry != first for entry in entries.values()):
            found[name] = entries
    return found


def lasting(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, Any]:
    """Differences that two looks saw alike. What was being written or deleted looks different the second time."""
    return {name: entry for name, entry in second.items() if first.get(name) == entry}


def explain(found: Mapping[str, Mapping[str, Any]], limit: int = 20) -> list[str]:
    """Differences for a person."""
    lines = []
    for name, entries in list(found.items())[:limit]:
        words = []
        for node, entry in entries.items():
            if entry is None:
                words.append(f"{node}: missing")
            else:
                digest = str(entry.get("sha256") or entry.get("error") or "directory")
                words.append(f"{node}: {entry.get('size', '-')} B, {digest[:12]}, gfid {str(entry.get('gfid'))[:8]}")
        lines.append(f"{name}  ({'; '.join(words)})")
    if len(found) > limit:
        lines.append(f"and {len(found) - limit} more")
    return lines
