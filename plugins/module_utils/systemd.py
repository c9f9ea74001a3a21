# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""What a set of systemd units needs, decided from their properties: pure functions."""

from __future__ import annotations

from dataclasses import dataclass

PROPERTIES = (
    "Id",
    "LoadState",
    "ActiveState",
    "SubState",
    "UnitFileState",
    "NeedDaemonReload",
    "ReloadResult",
    "ActiveEnterTimestampMonotonic",
    "StateChangeTimestampMonotonic",
)

_RUNNING = ("active", "reloading", "activating")


@dataclass(frozen=True)
class Unit:
    """A unit as systemd describes it. Times are seconds of the monotonic clock, 0 when it never happened."""

    name: str
    loaded: bool
    active: str
    enabled: str
    stale: bool
    started: float
    changed: float
    reloaded: bool = True  # False when the last reload failed


def parse_show(text: str, names: list[str]) -> dict[str, Unit]:
    """Units by the name they were asked by, from ``systemctl show -p PROPERTIES NAME...``.

    Blocks come in the order of the names, one empty line between them. Raises ValueError when their number differs.
    """
    blocks = [block for block in text.strip().split("\n\n") if block.strip()]
    if len(blocks) != len(names):
        raise ValueError(f"systemctl show answered {len(blocks)} blocks for {len(names)} units")
    units = {}
    for name, block in zip(names, blocks, strict=True):
        values = dict(line.split("=", 1) for line in block.splitlines() if "=" in line)
        units[name] = Unit(
            name=name,
            loaded=values.get("LoadState") in ("loaded", "masked"),
            active=values.get("ActiveState", "inactive"),
            enabled=values.get("UnitFileState", ""),
            stale=values.get("NeedDaemonReload") == "yes",
            started=int(values.get("ActiveEnterTimestampMonotonic") or 0) / 1e6,
            changed=int(values.get("StateChangeTimestampMonotonic") or 0) / 1e6,
            reloaded=values.get("ReloadResult", "success") == "success",
        )
    return units


def retirement(unit: Unit) -> list[str]:
    """The verbs for a unit that is not wanted any more. It is stopped first: a run that is killed still finds it."""
    steps = ["stop"] if unit.active in _RUNNING else []
    steps += ["disable"] if unit.enabled in ("enabled", "enabled-runtime") else []
    return steps + (["reset-failed"] if unit.active == "failed" else [])


def verbs(wanted: dict, unit: Unit, newest: float, proven: bool = True) -> list[str]:
    """The systemctl verbs that bring ``unit`` to what is ``wanted``, in order.

    ``newest`` is the monotonic time of the last change of the files it was started with. Comparing times, not
    remembering what this run has changed, is what makes a run that was killed between writing a file and
    restarting its service end in the same state when it is run again. ``proven`` is False when the unit's work is
    not in effect although it may be active.
    """
    steps = []
    if wanted["enabled"] is not None:
        is_enabled = unit.enabled in ("enabled", "enabled-runtime", "static", "alias", "indirect", "generated")
        if wanted["enabled"] and not is_enabled:
            steps.append("enable")
        if not wanted["enabled"] and unit.enabled in ("enabled", "enabled-runtime"):
            steps.append("disable")
    running = unit.active in _RUNNING
    if wanted["state"] == "stopped":
        return [*steps, "stop"] if running else steps
    if wanted["state"] == "started":
        if not running:
            steps.append("start")
        elif not proven or (wanted["on_change"] == "restart" and newest > unit.started):
            steps.append("restart")
        # A reload that failed has changed the unit's state, too: the time alone would call it done.
        elif wanted["on_change"] == "reload" and (newest > max(unit.started, unit.changed) or not unit.reloaded):
            steps.append("reload")
    return steps
