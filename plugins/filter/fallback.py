# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Filters of the role media_fallback: what speaks against it, what is nowhere, and what was done."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from typing import Any

SHOWN = 50


def fallback_obstacles(
    status: Mapping[str, Any], mirror: Mapping[str, Any], host: str, tree: str, reserve_mib: int
) -> list[str]:
    """What speaks against it on one host, in sentences that say what to do."""
    if status.get("unreachable"):
        why = str(status.get("msg", "")).strip()
        return [f"{host} does not answer: {why}. If it is dead, run it with -e absent={host}."]
    found = []
    if not mirror.get("skipped") and not mirror.get("stat", {}).get("exists"):
        found.append(
            f"{host} has no mirror: put it into the group media_mirror_servers and run playbooks/deploy_mirror.yml."
        )
    try:
        said = json.loads(status.get("stdout") or "")
    except ValueError:
        said = None
    if status.get("rc") != 0 or said is None:
        why = (status.get("stderr") or status.get("msg") or "it said nothing").strip().splitlines()[-1]
        found.append(
            f"{host} cannot ask the catalog: {why}. Without the database nothing can be compared; bring it back first. "
            "A release older than this command needs playbooks/deploy_site.yml first."
        )
    elif said["needed"] and said["needed"] + (int(reserve_mib) << 20) > said["free"]:
        found.append(
            f"{host} has {said['free'] >> 20} MiB free for {tree}; {said['needed'] >> 20} MiB are to come and "
            f"{reserve_mib} MiB are to stay free. Give it more space, or keep fewer snapshots."
        )
    return found


def fallback_nowhere(reports: Iterable[Mapping[str, Any]]) -> list[str]:
    """The files that no host could get, of what each host's ``complete`` said."""
    missing = [set(one["missing"]) for one in reports]
    return sorted(set.intersection(*missing)) if missing else []


def explain_fallback(said: Mapping[str, Any]) -> list[str]:
    """What ``complete`` or ``merge`` did, line by line."""
    lines = [] if said["applied"] else ["only looked at"]
    lines.append(f"{said['right']} were right already; up to change {said['number']}")
    if "copied" in said:
        lines += [f"{count} from {source}" for source, count in said["copied"].items()]
        lines += [f"{said['foreign']} that the catalog does not know, from the mirror"] if said["foreign"] else []
        lines += [f"cannot be asked: {source}: {why}" for source, why in said["away"].items()]
        lines += _listed("deleted, removed", said["removed"])
        return lines + _listed("missing here", [f"{name}: {why}" for name, why in said["missing"].items()])
    lines += _listed("written", said["written"], said["count"])
    lines.append(f"{said['removed']} deleted ones removed once more")
    lines += _listed("unknown to the catalog, left in the tree", said["foreign"])
    return lines + _listed("failed", [f"{name}: {why}" for name, why in said["failed"].items()])


def _listed(what: str, entries: list[str], count: int = 0) -> list[str]:
    """The number and the first entries; *count* where only the first were told."""
    count = count or len(entries)
    if not entries:
        return []
    more = [f"  ... and {count - SHOWN} more"] if count > SHOWN else []
    return [f"{count} {what}", *(f"  {one}" for one in entries[:SHOWN]), *more]


class FilterModule:
    """Entering and leaving the Gluster-free mode."""

    def filters(self) -> dict[str, Any]:
        return {
            "fallback_obstacles": fallback_obstacles,
            "fallback_nowhere": fallback_nowhere,
            "explain_fallback": explain_fallback,
        }
