#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Install Debian packages and hold some of them, in one step."""

from __future__ import annotations

DOCUMENTATION = r"""
module: debian_packages
short_description: Install Debian packages and hold some of them
description:
  - Installs what is missing and puts chosen packages on hold, so that no unattended upgrade restarts them.
  - Unlike M(ansible.builtin.apt) it needs no C(python3-apt) and no package index to answer in check mode,
    so a check run works on a machine that was never set up. With nothing to do it starts C(dpkg-query) only.
  - An installation that was killed half-way is finished first.
options:
  name:
    description: Names of real packages. Virtual packages and versions are refused.
    type: list
    elements: str
    required: true
  hold:
    description: Those of O(name) that are put on hold once they are installed.
    type: list
    elements: str
    default: []
  cache_valid_time:
    description:
      - Seconds for which a downloaded package index counts as fresh. It is looked at only when something is missing.
      - An index that is older than the newest apt source is fetched again whatever its age.
    type: int
    default: 86400
  lock_timeout:
    description: Seconds to wait for another package manager.
    type: int
    default: 300
author: [Tribrick authors]
attributes:
  check_mode:
    description: Predicts.
    support: full
  diff_mode:
    description: Shows packages and holds.
    support: full
"""

EXAMPLES = r"""
- name: Install the storage server and keep its version
  tribrick.media.debian_packages:
    name: [glusterfs-server, logrotate]
    hold: [glusterfs-server]
"""

RETURN = r"""
missing:
  description: Packages that were not installed before.
  type: list
  elements: str
  returned: always
versions:
  description: Installed version of each package of O(name).
  type: dict
  returned: always
"""

import os
import re
import time

from ansible.module_utils.basic import AnsibleModule

QUERY = "${Package}\t${db:Status-Want}\t${db:Status-Status}\t${Version}\n"
PACKAGE_NAME = re.compile(r"[a-z0-9][a-z0-9.+-]+\Z")
LISTS = "/var/lib/apt/lists"
SOURCES = ("/etc/apt/sources.list", "/etc/apt/sources.list.d", "/etc/apt/apt.conf.d", "/etc/apt/tribrick.sources.d")


def parse_status(text):
    """Return {package: (want, status, version)} from the lines of QUERY."""
    packages = {}
    for line in text.splitlines():
        fields = line.split("\t")
        if len(fields) != 4:
            raise ValueError(f"dpkg-query printed a line that is not understood: {line!r}")
        name, want, status, version = fields
        # A foreign architecture may add a second line; the installed one counts.
        if name not in packages or status == "installed":
            packages[name] = (want, status, version)
    return packages


def plan(packages, names, hold):
    """Return what is missing, what is broken and what needs a hold."""
    unknown = ("unknown", "not-installed", "")
    missing = [
        n for n in names if packages.get(n, unknown)[1] not in ("installed", "triggers-pending", "triggers-awaited")
    ]
    broken = [n for n in missing if packages.get(n, unknown)[1] in ("half-installed", "half-configured", "unpacked")]
    unheld = [n for n in hold if packages.get(n, unknown)[0] != "hold"]
    return missing, broken, unheld


def newest(paths):
    """Return the newest change time of files, directories and their entries."""
    times = [0.0]
    for path in paths:
        if os.path.exists(path):
            times.append(os.stat(path).st_mtime)
            if os.path.isdir(path):
                times += [entry.stat().st_mtime for entry in os.scandir(path)]
    return max(times)


class Apt:
    def __init__(self, module):
        self.module = module
        self.deadline = time.monotonic() + module.params["lock_timeout"]
        self.environment = {"DEBIAN_FRONTEND": "noninteractive", "LC_ALL": "C.UTF-8", "UCF_FORCE_CONFFOLD": "1"}
        self.updated = False

    def status(self, names):
        _rc, out, _err = self.module.run_command(
            ["dpkg-query", "-W", "-f", QUERY, *names], environ_update=self.environment
        )
        return parse_status(out)

    def run(self, argv, purpose, fatal=True):
        """Run a command, waiting for locks until the deadline."""
        while True:
            rc, out, err = self.module.run_command(argv, environ_update=self.environment)
            if rc == 0:
                return True
            locked = "Could not get lock" in err or "Unable to lock" in err or "frontend lock" in err
            if locked and time.monotonic() < self.deadline:
                time.sleep(1)
                continue
            if locked:
                self.module.fail_json(
                    msg=f"{purpose}: another package manager held the lock for {self.module.params['lock_timeout']} s",
                    stderr=err,
                )
            if fatal:
                lines = [line for line in (err or out).splitlines() if line.startswith(("E:", "Err:"))] or (
                    err or out
                ).splitlines()
                self.module.fail_json(msg=f"{purpose} failed: {' '.join(lines[-4:])}", cmd=argv, stdout=out, stderr=err)
            return False

    def update(self):
        self.run(
            ["apt-get", "update", "-q", "-o", "APT::Update::Error-Mode=any", "-o", "Acquire::Retries=2"],
            "Fetching the package index",
        )
        # apt leaves the directory alone when nothing is new; the stamp says that we looked.
        os.utime(LISTS)
        self.updated = True

    def stale(self):
        names = os.listdir(LISTS) if os.path.isdir(LISTS) else []
        if not any("Packages" in name for name in names):
            return True
        fetched = os.stat(LISTS).st_mtime
        return time.time() - fetched > self.module.params["cache_valid_time"] or newest(SOURCES) > fetched

    def install(self, names):
        argv = ["apt-get", "install", "-y", "-q", "--no-install-recommends"]
        argv += ["-o", "Dpkg::Options::=--force-confdef", "-o", "Dpkg::Options::=--force-confold"]
        argv += ["-o", f"DPkg::Lock::Timeout={self.module.params['lock_timeout']}", *names]
        if self.stale():
            self.update()
        purpose = f"Installing {', '.join(names)}"
        # An index that is fresh by its age may still name files that the mirror has replaced.
        if not self.run(argv, purpose, fatal=self.updated):
            self.update()
            self.run(argv, purpose)


def main():
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "list", "elements": "str", "required": True},
            "hold": {"type": "list", "elements": "str", "default": []},
            "cache_valid_time": {"type": "int", "default": 86400},
            "lock_timeout": {"type": "int", "default": 300},
        },
        supports_check_mode=True,
    )
    names = list(dict.fromkeys(module.params["name"]))
    hold = list(dict.fromkeys(module.params["hold"]))
    for name in names:
        if not PACKAGE_NAME.match(name):
            module.fail_json(msg=f"{name!r} is not the name of a Debian package")
    if set(hold) - set(names):
        module.fail_json(
            msg=f"hold names packages that are not installed here: {', '.join(sorted(set(hold) - set(names)))}"
        )
    if not names:
        module.exit_json(changed=False, missing=[], versions={})

    apt = Apt(module)
    before = apt.status(names)
    missing, broken, unheld = plan(before, names, hold)
    result = {"changed": bool(missing or unheld), "missing": missing}
    result["diff"] = {
        "before": "".join(
            f"{n} {'held' if n in hold and n not in unheld else 'installed'}\n" for n in names if n not in missing
        ),
        "after": "".join(f"{n} {'held' if n in hold else 'installed'}\n" for n in names),
    }
    if not module.check_mode and result["changed"]:
        updates = "/var/lib/dpkg/updates"
        if broken or (os.path.isdir(updates) and os.listdir(updates)):
            apt.run(
                ["dpkg", "--configure", "-a", "--force-confdef", "--force-confold"],
                "Finishing an interrupted installation",
            )
            apt.run(["apt-get", "install", "-y", "-q", "--fix-broken"], "Repairing an interrupted installation")
        if missing:
            apt.install(missing)
        if unheld:
            apt.run(["apt-mark", "hold", *unheld], "Holding packages")
        before = apt.status(names)
        left = plan(before, names, hold)
        if left[0] or left[2]:
            module.fail_json(
                msg=f"After the installation these are still missing or not held: {', '.join(left[0] + left[2])}"
            )
    result["versions"] = {n: before[n][2] for n in names if n in before and before[n][1] == "installed"}
    module.exit_json(**result)


if __name__ == "__main__":
    main()
