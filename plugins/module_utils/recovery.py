# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""What the recovery modules decide: pure functions of what was read, but for the mark of a brick."""

from __future__ import annotations

import os
import re
import uuid
from collections.abc import Mapping, Sequence
from typing import Any

from ansible_collections.tribrick.media.plugins.module_utils.gluster import (
    BrickHeal,
    Refused,
    is_are,
    parse,
)

Tree = Mapping[str, Mapping[str, Any]]


def left_to_heal(bricks: Sequence[BrickHeal]) -> int:
    """Entries that wait on any brick. Each brick lists what it knows, so the largest number is the nearest."""
    return max((brick.total or 0 for brick in bricks), default=0)


def waiting_names(answer: str) -> list[str]:
    """Names in `volume heal NAME info` (XML): what waits on any brick, without what is known by its id only."""
    return sorted({entry.text for entry in parse(answer).iter("file") if entry.text and entry.text.startswith("/")})


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


def judge_brick_directory(entries: Sequence[str], mark: str, volume: str, path: str) -> bool:
    """Whether the directory is to become a new brick. Refuses what may hold something of value."""
    if mark and mark != volume:
        raise Refused(f"{path} is a brick of another volume ({mark}, not {volume}); nothing was changed")
    if ".glusterfs" in entries:
        if mark and len(entries) == 1:
            # A brick's process has started on an empty directory. Nobody has marked what it lacks, so nobody fills it.
            return True
        if not mark:
            raise Refused(
                f"{path} holds a brick's files without the volume's mark; move the directory away, so that nothing is "
                "lost, and run again"
            )
        return False
    if entries:
        raise Refused(
            f"{path} holds files that are no brick's ({', '.join(sorted(entries)[:3])}); move them away and run again"
        )
    return True


def brick_mark(path: str) -> str:
    """The volume's identity on a brick's directory, empty for none."""
    try:
        return str(uuid.UUID(bytes=os.getxattr(path, "trusted.glusterfs.volume-id")))
    except (OSError, ValueError):
        return ""


def bricks_after(bricks: Sequence[str], old: str, new: str, wanted: Sequence[str]) -> list[str]:
    """The volume's bricks with *old* replaced by *new*. Refuses when these are not the inventory's, in its order."""
    if old not in bricks:
        raise Refused(f"neither {old} nor {new} is a brick of the volume, which has {', '.join(bricks)}")
    after = [new if brick == old else brick for brick in bricks]
    if after != list(wanted):
        raise Refused(
            f"the inventory's nodes would make the bricks {', '.join(wanted)}, but the volume will have "
            f"{', '.join(after)}: let the new node stand in gluster_servers where the lost one stood"
        )
    return after


def let_in(options: Mapping[str, str], who: Mapping[str, str]) -> dict[str, str]:
    """Lists of the volume's options, by name, that miss somebody, with them added. A list that lets all in stays."""
    found = {}
    for name, one in who.items():
        listed = [word.strip() for word in options.get(name, "*").split(",") if word.strip()]
        if one not in listed and "*" not in listed:
            found[name] = ",".join([*listed, one])
    return found


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


def parse_properties(text: str) -> dict[str, str]:
    """``NAME=VALUE`` lines, as glusterd keeps its state."""
    pairs = (line.partition("=") for line in text.splitlines())
    return {name.strip(): value.strip() for name, equals, value in pairs if equals}


def agree_on_identity(
    node: str, nodes: Sequence[str], views: Sequence[Mapping[str, Any]]
) -> tuple[str, str, dict[str, list[str]]]:
    """(uuid, operating version, peers by uuid) of *node*, as most nodes know it. Refuses when they do not agree."""
    known: dict[str, list[str]] = {}
    peers: dict[str, list[str]] = {}
    for view in views:
        if view["node"] == node or view["node"] not in nodes:
            continue
        for number, names in view["peers"].items():
            if node in names:
                known.setdefault(number, []).append(view["node"])
        if view.get("uuid"):
            peers[view["uuid"]] = [view["node"]]
    if not known:
        raise Refused(
            f"no other node knows {node}, so its identity cannot be told; nothing was changed. "
            f"Asked: {', '.join(view['node'] for view in views) or 'nobody'}"
        )
    if len(known) > 1:
        said = "; ".join(f"{', '.join(by)}: {number}" for number, by in known.items())
        raise Refused(f"the other nodes know {node} by different identities ({said}); nothing was changed")
    number, by = next(iter(known.items()))
    if 2 * (len(by) + 1) <= len(nodes):
        raise Refused(f"only {', '.join(by)} of {len(nodes)} nodes can say who {node} is; bring the others back first")
    # Peers that could not be asked are known to those that could.
    for view in views:
        for other, names in view["peers"].items():
            if other != number and other not in peers:
                peers[other] = list(names)
    versions = sorted((view["op_version"] for view in views if view.get("op_version")), key=int)
    if not versions:
        raise Refused("no other node knows the pool's operating version; nothing was changed")
    return number, versions[-1], peers


def state_reasons(
    own: Mapping[str, Any], identity: str, peers: Mapping[str, Any], volume: str, rejected: bool = False
) -> list[str]:
    """Why a node's state has to be made anew."""
    said = []
    if own["uuid"] != identity:
        said.append(f"its identity is {own['uuid'] or 'lost'}, the pool knows it as {identity}")
    missing = sorted(set(peers) - set(own["peers"]))
    if missing:
        said.append(f"it does not know the peers {', '.join(missing)}")
    if volume not in own["volumes"]:
        said.append(f"it does not know the volume {volume}")
    if rejected:
        said.append("the pool rejects it: its configuration of volumes differs")
    return said
