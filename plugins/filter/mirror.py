# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Filters of the role media_mirror: which host restores, and what it did."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from ansible.errors import AnsibleFilterError

SHOWN = 200


def choose_mirror(answers: Mapping[str, Mapping[str, Any]], date: str = "") -> dict[str, str]:
    """The host with the newest fitting snapshot, and the directory of it there.

    *answers* is what each host said to ``tribrick-mirror list --json``. With the date ``current`` it is the mirror
    that is furthest. Raises AnsibleFilterError with what each host said if none has one.
    """
    fitting, without = [], []
    for host, answer in sorted(answers.items()):
        try:
            said = json.loads(answer.get("stdout") or "")
            if answer.get("rc") != 0:
                raise ValueError
            if date == "current":
                fitting.append((f"{said['number']:020d}", host, said["current"]))
            else:
                fitting += [(one["snapshot"], host, one["path"]) for one in said["snapshots"][-1:]]
        except (ValueError, KeyError, TypeError):
            why = answer.get("stderr") or answer.get("msg") or "no answer"
            without.append(f"{host}: {str(why).strip().splitlines()[0]}")
    if not fitting:
        raise AnsibleFilterError(f"no host has a mirror to restore from. {'; '.join(without)}")
    newest = max(one[0] for one in fitting)
    _, host, tree = min(one for one in fitting if one[0] == newest)
    return {"host": host, "tree": tree}


def furthest_ledger(answers: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The host whose ledger knows most changes, and the number of the last; an empty host if none knows any.

    *answers* is what each host said to ``tribrick ledger verify --no-database --json``.
    """
    found: dict[str, Any] = {"host": "", "number": 0}
    for host, answer in sorted(answers.items()):
        try:
            number = json.loads(answer.get("stdout") or "")["number"] if answer.get("rc") == 0 else 0
        except (ValueError, KeyError, TypeError):
            continue
        if number > found["number"]:
            found = {"host": host, "number": number}
    return found


def explain_restore(said: Mapping[str, Any]) -> list[str]:
    """What a restore did, line by line."""
    lines = [f"from {said['tree']}{'' if said['applied'] else ', only looked at'}"]
    for key, what in (
        ("restored", "restored"), ("adopted", "newer than the database, adopted"), ("dead", "deleted, skipped"),
        ("again", "deleted, stored again"), ("before", "deleted, was stored again before"),
        ("lacking", "lacking, row without a file here"), ("refused", "refused"),
    ):  # fmt: skip
        entries = said[key]
        listed = [f"{name}: {more}" for name, more in entries.items()] if isinstance(entries, Mapping) else entries
        lines.append(f"{len(entries)} {what}")
        lines += [f"  {one}" for one in listed[:SHOWN]]
        lines += [f"  ... and {len(listed) - SHOWN} more"] if len(listed) > SHOWN else []
    return [*lines, f"{said['right']} were right already"]


class FilterModule:
    """Restoring from mirrors."""

    def filters(self) -> dict[str, Any]:
        return {"choose_mirror": choose_mirror, "furthest_ledger": furthest_ledger, "explain_restore": explain_restore}
