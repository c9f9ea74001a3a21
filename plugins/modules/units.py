#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Bring several systemd units to the wanted state in one call."""

from __future__ import annotations

DOCUMENTATION = r"""
module: units
short_description: Bring several systemd units to the wanted state in one call
description:
  - Enables, starts, restarts, reloads or stops units in the order given, one C(systemctl) call each, only where needed.
  - C(daemon-reload) runs first when systemd says that a unit file on disk is newer than what it has loaded.
  - A unit is restarted or reloaded when one of its O(units[].files) is newer than its last start (or reload). The
    decision rests on times on the host, so it does not get lost when a run is killed half-way.
  - Units that O(exclusive) finds and that O(units) does not name are taken away first.
  - In check mode a unit that does not exist yet is predicted to be changed, so a first run can be predicted.
options:
  units:
    description: The units.
    type: list
    elements: dict
    required: true
    suboptions:
      name: {description: Unit name with its suffix., type: str, required: true}
      state: {description: Wanted state. Leave out to keep it., type: str, choices: [started, stopped]}
      enabled: {description: Whether it starts at boot. Leave out to keep it., type: bool}
      on_change: {description: What to do when one of its files is newer., type: str, choices: [restart, reload]}
      files:
        description: Files that the unit reads when it starts. Missing ones are ignored.
        type: list
        elements: path
        default: []
      proof:
        description:
          - Command that succeeds while the unit's work is in effect.
          - When it fails although the unit is active, the unit is restarted.
        type: list
        elements: str
  exclusive:
    description: Sets of units on the host, of which only those that O(units) names are wanted. The others go.
    type: list
    elements: dict
    default: []
    suboptions:
      pattern:
        description: Paths of unit files, which go too, or of links that enable units. C(*) stands for any characters.
        type: str
        required: true
      line: {description: Line that a file must have to belong to the set. Leave out for all., type: str}
  timeout:
    description: Seconds that one systemctl call may take.
    type: int
    default: 120
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Run nginx with its present configuration
  tribrick.media.units:
    units:
      - {name: nginx.service, state: started, enabled: true, on_change: reload, files: [/etc/nginx/nginx.conf]}
"""

RETURN = r"""
actions:
  description: The systemctl verbs that were (in check mode, would be) used, by unit, in order, and the files removed.
  returned: always
  type: list
  elements: str
"""

import glob
import os
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.systemd import PROPERTIES, parse_show, retirement, verbs


def monotonic_mtime(paths: list[str]) -> float:
    """When the newest of the paths was changed, in seconds of the monotonic clock; minus infinity for none."""
    offset = time.time() - time.clock_gettime(time.CLOCK_MONOTONIC)
    times = [os.lstat(path).st_mtime - offset for path in paths if os.path.lexists(path)]
    return max(times, default=float("-inf"))


def surplus(exclusive: list[dict], names: list[str]) -> dict[str, str]:
    """Path -> unit of what belongs to one of the sets and is not among the names."""
    found = {}
    for entry in exclusive:
        for path in sorted(glob.glob(entry["pattern"])):
            if os.path.basename(path) not in names and (not entry["line"] or entry["line"] in lines(path)):
                found[path] = os.path.basename(path)
    return found


def lines(path: str) -> list[str]:
    """The lines of a unit file; none of a link that leads nowhere."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            return stream.read().splitlines()
    except FileNotFoundError:
        return []


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "units": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "options": {
                    "name": {"type": "str", "required": True},
                    "state": {"type": "str", "choices": ["started", "stopped"]},
                    "enabled": {"type": "bool"},
                    "on_change": {"type": "str", "choices": ["restart", "reload"]},
                    "files": {"type": "list", "elements": "path", "default": []},
                    "proof": {"type": "list", "elements": "str"},
                },
            },
            "exclusive": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {"pattern": {"type": "str", "required": True}, "line": {"type": "str"}},
            },
            "timeout": {"type": "int", "default": 120},
        },
        supports_check_mode=True,
    )
    wanted = module.params["units"]
    unwanted = surplus(module.params["exclusive"], [unit["name"] for unit in wanted])
    names = [*(unit["name"] for unit in wanted), *unwanted.values()]

    def systemctl(*words: str) -> tuple[int, str, str]:
        limit = str(module.params["timeout"])
        command = ["timeout", "--kill-after=5", limit, "systemctl", *words]
        return module.run_command(command, environ_update={"LC_ALL": "C"})

    def show() -> dict:
        if not names:
            return {}
        code, out, err = systemctl("show", "--property", ",".join(PROPERTIES), *names)
        if code != 0:
            module.fail_json(msg=f"systemctl show failed: {(err or out).strip()}; is systemd running here?")
        return parse_show(out, names)

    def reload_files() -> None:
        code, out, err = systemctl("daemon-reload")
        if code != 0:
            module.fail_json(msg=f"systemctl daemon-reload failed: {(err or out).strip()}")

    actions: list[str] = []

    def act(verb: str, name: str) -> None:
        actions.append(f"{verb} {name}")
        if module.check_mode:
            return
        code, out, err = systemctl(verb, name)
        if code == 0:
            return
        log = module.run_command(["journalctl", "--no-pager", "--lines=15", "--output=cat", f"--unit={name}"])[1]
        late = f"took longer than {module.params['timeout']} s"
        why = late if code in (124, 137) else (err or out).strip()
        module.fail_json(msg=f"systemctl {verb} {name} failed: {why}", journal=log.splitlines(), actions=actions)

    found = show()
    stopped = {entry["name"] for entry in wanted if entry["state"] == "stopped"}
    if any(u.stale or not (u.loaded or name in stopped) for name, u in found.items()) and not module.check_mode:
        reload_files()
        found = show()
    removed = [path for path in unwanted if not os.path.islink(path)]
    for path, name in unwanted.items():
        for verb in retirement(found[name]):
            act(verb, name)
        if path in removed:
            actions.append(f"remove {path}")
            if not module.check_mode:
                os.unlink(path)
    if removed and not module.check_mode:
        reload_files()
    for entry in wanted:
        name, unit = entry["name"], found[entry["name"]]
        if not unit.loaded and not module.check_mode and entry["state"] != "stopped":
            module.fail_json(msg=f"there is no unit {name} on this host; `systemctl status {name}` tells more")
        proven = not entry["proof"] or not unit.loaded or module.run_command(entry["proof"])[0] == 0
        for verb in verbs(entry, unit, monotonic_mtime(entry["files"]), proven):
            act(verb, name)
    module.exit_json(changed=bool(actions), actions=actions)


if __name__ == "__main__":
    main()
