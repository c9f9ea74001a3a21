#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Put a release of a site into service and wait until it says that it is ready."""

from __future__ import annotations

DOCUMENTATION = r"""
module: django_activate
short_description: Put a release of a site into service and wait until it says that it is ready
description:
  - Points the link at the release, enables the units, and restarts the service if it runs with anything else than
    the wanted release and the present files. What it runs with is read from a record that the unit writes at each
    start, so a run that was killed before the restart is completed by the next one.
  - The listening socket stays open during the restart; requests wait in its queue.
  - Fails when the site is not ready in time. If a release was ready before, that one is put back first.
options:
  release: {description: Directory of the release., type: path, required: true}
  current: {description: Link to the release in use., type: path, required: true}
  service: {description: Unit of the service., type: str, required: true}
  socket: {description: Unit of the socket., type: str, required: true}
  address: {description: Path of the socket., type: path, required: true}
  inputs:
    description: Files that the service was started with. The record holds their hashes in this order.
    type: list
    elements: path
    required: true
  record: {description: The record that the unit writes., type: path, required: true}
  path: {description: Path of the site that answers 200 when it is ready., type: str, default: /readyz}
  host: {description: Host header of the question., type: str, default: localhost}
  timeout: {description: Seconds to wait for 200., type: int, default: 60}
attributes:
  check_mode:
    description: Predicts.
    support: full
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Put the release into service
  tribrick.media.django_activate:
    release: /opt/tribrick/releases/0123456789abcdef0123
    current: /opt/tribrick/site
    service: tribrick-site.service
    socket: tribrick-site.socket
    address: /run/tribrick/site.sock
    inputs: [/etc/tribrick/site.env]
    record: /run/tribrick-site/started-with
"""

RETURN = r"""
reasons: {description: Why the service was (or would be) changed., type: list, elements: str, returned: always}
seconds: {description: Time from the restart until it was ready., type: float, returned: when restarted}
"""

import os
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.django_site import (
    ask,
    differences,
    started_with,
    wait_ready,
)


class Site:
    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.params = module.params
        self.units = [self.params["socket"], self.params["service"]]

    def systemctl(self, *words: str) -> str:
        code, out, err = self.module.run_command(
            ["timeout", "240", "systemctl", *words], environ_update={"LC_ALL": "C"}
        )
        if code != 0:
            self.fail(f"systemctl {' '.join(words)} failed: {(err or out).strip() or f'code {code}'}")
        return out

    def journal(self) -> list[str]:
        command = ["journalctl", "--no-pager", "--lines=25", "--output=cat", f"--unit={self.params['service']}"]
        return self.module.run_command(command)[1].splitlines()

    def fail(self, message: str) -> None:
        self.module.fail_json(msg=message, journal=self.journal())

    def state(self, unit: str) -> dict[str, str]:
        out = self.systemctl("show", "--property=LoadState,ActiveState,UnitFileState,NeedDaemonReload", unit)
        return dict(line.split("=", 1) for line in out.splitlines() if "=" in line)

    def probe(self, timeout: float) -> tuple[int | None, str]:
        return ask(self.params["address"], self.params["path"], self.params["host"], timeout)

    def target(self) -> str | None:
        return os.path.realpath(self.params["current"]) if os.path.islink(self.params["current"]) else None

    def point(self, release: str) -> None:
        temporary = f"{self.params['current']}.new"
        if os.path.lexists(temporary):
            os.unlink(temporary)
        os.symlink(release, temporary)
        os.replace(temporary, self.params["current"])

    def reasons(self) -> list[str]:
        found = []
        if self.target() != os.path.realpath(self.params["release"]):
            found.append("release")
        for unit in self.units:
            state = self.state(unit)
            if state["LoadState"] != "loaded" or state["ActiveState"] != "active":
                found.append(f"{unit} is {state['ActiveState']}")
            if state.get("UnitFileState") != "enabled":
                found.append(f"{unit} is not enabled")
            if state.get("NeedDaemonReload") == "yes":
                found.append(f"{unit} is not loaded anew")
        try:
            with open(self.params["record"], encoding="utf-8") as stream:
                recorded = stream.read()
        except FileNotFoundError:
            recorded = ""
        return found + [
            x
            for x in differences(recorded, started_with(self.params["inputs"], self.params["release"]))
            if x not in found
        ]

    def restart(self, reasons: list[str]) -> None:
        # A socket that listens elsewhere needs a moment without it; all other changes keep it open.
        if any(os.path.basename(reason) == self.params["socket"] for reason in reasons) and self.target() is not None:
            self.systemctl("stop", *self.units)
        self.systemctl("start", self.params["socket"])
        # Earlier failures must not count against this start.
        self.module.run_command(["systemctl", "reset-failed", self.params["service"]])
        self.systemctl("restart", self.params["service"])

    def activate(self) -> dict:
        if not self.module.check_mode:
            if any(
                self.state(unit).get("NeedDaemonReload") == "yes" or self.state(unit)["LoadState"] != "loaded"
                for unit in self.units
            ):
                self.systemctl("daemon-reload")
        reasons = self.reasons()
        result: dict = {"changed": bool(reasons), "reasons": reasons}
        if self.module.check_mode:
            return result
        previous = self.target()
        was_ready, before = (
            (False, "it was not running")
            if previous is None
            else wait_ready(self.probe, 0 if reasons else self.params["timeout"])
        )
        if not reasons:
            if not was_ready:
                self.fail(
                    f"The site runs the wanted release but is not ready after {self.params['timeout']} s: {before}"
                )
            return result
        started = time.monotonic()
        self.point(self.params["release"])
        self.systemctl("enable", *self.units)
        self.restart(reasons)
        ready, seen = wait_ready(self.probe, self.params["timeout"])
        if ready:
            return {**result, "seconds": round(time.monotonic() - started, 2)}
        journal = self.journal()
        message = f"The site did not become ready within {self.params['timeout']} s after its restart: {seen}."
        if not was_ready:
            message += f" It was not ready before either: {before}. The next node is left alone."
        elif previous != os.path.realpath(self.params["release"]):
            self.point(previous)
            self.systemctl("restart", self.params["service"])
            back, seen = wait_ready(self.probe, self.params["timeout"])
            outcome = "ready" if back else f"not ready: {seen}"
            message += f" The release before, {os.path.basename(previous)}, is back in service here and {outcome}."
        self.module.fail_json(msg=message, journal=journal)
        raise AssertionError


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "release": {"type": "path", "required": True},
            "current": {"type": "path", "required": True},
            "service": {"type": "str", "required": True},
            "socket": {"type": "str", "required": True},
            "address": {"type": "path", "required": True},
            "inputs": {"type": "list", "elements": "path", "required": True},
            "record": {"type": "path", "required": True},
            "path": {"type": "str", "default": "/readyz"},
            "host": {"type": "str", "default": "localhost"},
            "timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    module.exit_json(**Site(module).activate())


if __name__ == "__main__":
    main()
