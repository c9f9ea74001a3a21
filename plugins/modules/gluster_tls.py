#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Have GlusterFS on this host use the certificates that are on its disk, and wait until all is connected with them."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gluster_tls
short_description: Have GlusterFS on this host use the certificates that are on its disk
description:
  - GlusterFS's processes read key, certificate and CA when they start, and never again. With O(state=used), those of
    this host that are older than these files are started anew. The brick and the self-heal daemon first, with glusterd,
    then the media mount. What is decided rests on times, so a run that was killed is finished by the next one.
  - With O(state=proven), waits until the peers of this node are connected, and until every brick has connections of
    every host of O(clients). A process that was started anew has had to connect to all others, and they to it, so for
    each pair of hosts the one that was started last proves the certificates of both.
options:
  state: {description: What to reach., type: str, choices: [used, proven], required: true}
  node: {description: The name of the host that this runs on., type: str, required: true}
  nodes: {description: Names of all nodes of the pool., type: list, elements: str, required: true}
  volume: {description: The volume., type: str, required: true}
  brick_path: {description: The brick's directory on a node of the pool., type: path, required: true}
  mount: {description: The media mount; empty where there is none., type: str, default: ""}
  unit: {description: The mount's unit., type: str, default: ""}
  clients:
    description: Hosts that connect to the bricks, name -> number of their processes that do.
    type: dict
    default: {}
  files:
    description: The files that the processes read.
    type: list
    elements: path
    default: [/etc/ssl/glusterfs.key, /etc/ssl/glusterfs.pem, /etc/ssl/glusterfs.ca]
  timeout: {description: Seconds to wait., type: int, default: 120}
attributes:
  check_mode: {support: full, description: Says what it would start anew; waits for nothing.}
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Use the new certificate
  tribrick.media.gluster_tls:
    state: used
    node: node1
    nodes: [node1, node2, node3]
    volume: media
    brick_path: /srv/gluster/media/brick
    mount: /srv/media
    unit: srv-media.mount
"""

RETURN = r"""
restarted:
  description: What was (in check mode, would be) started anew.
  returned: always
  type: list
  elements: str
"""

import os
import time
from collections import Counter

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.gluster import (
    Cli,
    GlusterError,
    identify,
    parse,
    resolve,
    unready,
    wait_until,
)
from ansible_collections.tribrick.media.plugins.module_utils.health import (
    find_brick,
    find_process,
    parse_mounts,
)

STOP_BRICKS = "/usr/local/lib/tribrick/stop-bricks"
KEEPER = "tribrick-media-keeper.timer"


def started(pid: int) -> float:
    """When a process was started, by the same clock as the times of files. Raises OSError if it is gone."""
    with open(f"/proc/{pid}/stat", encoding="ascii", errors="replace") as stream:
        ticks = int(stream.read().rpartition(")")[2].split()[19])
    return time.time() - time.clock_gettime(time.CLOCK_BOOTTIME) + ticks / os.sysconf("SC_CLK_TCK")


def newest(files: list[str]) -> float:
    """When the newest of these files came to its place."""
    return max((os.stat(path).st_ctime for path in files if os.path.exists(path)), default=0.0)


def mounted(path: str) -> bool:
    """Whether something is mounted there, without asking it: a mount whose bricks are away answers nothing."""
    with open("/proc/self/mounts", encoding="utf-8", errors="surrogateescape") as stream:
        return parse_mounts(stream.read(), path) is not None


def parse_clients(text: str) -> dict[str, Counter]:
    """``volume status NAME clients``: brick (HOST:PATH) -> address -> number of connections."""
    found: dict[str, Counter] = {}
    for node in parse(text).iter("node"):
        if node.find("clientsStatus") is None:
            continue
        addresses = [(one.text or "").rpartition(":")[0] for one in node.findall("clientsStatus/client/hostname")]
        found[f"{node.findtext('hostname')}:{node.findtext('path')}"] = Counter(addresses)
    return found


def unconnected(
    bricks: list[str], seen: dict[str, Counter], clients: dict[str, int], addresses: dict[str, frozenset[str]]
) -> list[str]:
    """Bricks that lack connections of a host."""
    said = []
    for brick in bricks:
        have = seen.get(brick)
        if have is None:
            said.append(f"{brick} does not answer")
            continue
        for name, wanted in clients.items():
            number = sum(count for address, count in have.items() if address == name or address in addresses[name])
            if number < int(wanted):
                said.append(f"{brick} has {number} of {wanted} connections of {name}")
    return said


class Work:
    """One run of the module."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.node: str = module.params["node"]
        self.path: str = module.params["brick_path"]
        self.cli = Cli(module.run_command, self.node, 60)
        self.restarted: list[str] = []

    def call(self, *words: str, limit: int = 120) -> None:
        code, out, err = self.module.run_command(["timeout", "-k", "5", str(limit), *words])
        if code != 0:
            raise GlusterError(" ".join((err or out).split())[-300:] or f"exit code {code}", words, self.node)

    def old(self, pid: int) -> bool:
        """Whether a process does not run, or runs with older certificates."""
        try:
            return not pid or started(pid) < newest(self.module.params["files"])
        except OSError:
            return True

    def used(self) -> None:
        volume = self.module.params["volume"]
        if self.node in self.module.params["nodes"]:
            servers = {
                "glusterd": find_process("glusterd", "--pid-file=/run/glusterd.pid"),
                "the brick": find_process("glusterfsd", self.path),
                "the self-heal daemon": find_process("glusterfs", f"shd/{volume}"),
            }
            if any(self.old(pid) for pid in servers.values()):
                self.restarted += servers
                if not self.module.check_mode:
                    # glusterd starts brick and self-heal daemon; both outlive its own restart.
                    self.call(STOP_BRICKS)
                    self.call("systemctl", "restart", "glusterd.service", "tribrick-bricks.service")
                    wait_until(self.down, str, self.module.params["timeout"], "the brick", self.node)
        mount, unit = self.module.params["mount"], self.module.params["unit"]
        if mount and self.old(find_process("glusterfs", mount)):
            self.restarted.append(mount)
            if not self.module.check_mode:
                # The keeper mounts again, too; what still uses the old mount keeps it until the unit has stopped.
                self.call("systemctl", "stop", KEEPER)
                if mounted(mount):
                    self.call("umount", "--lazy", mount)
                self.call("systemctl", "stop", unit)
                self.module.run_command(["timeout", "-k", "5", "60", "systemctl", "start", unit])
                # It comes back when a majority of the bricks answers; the keeper tries on.
                self.call("systemctl", "start", KEEPER)
        elif mount and self.module.run_command(["systemctl", "is-active", "--quiet", KEEPER])[0] != 0:
            # A run that was killed just before the line above has left it stopped.
            self.restarted.append(KEEPER)
            if not self.module.check_mode:
                self.call("systemctl", "start", KEEPER)

    def down(self) -> str:
        if not find_brick(self.path):
            return "the brick does not run"
        return "" if find_process("glusterfs", f"shd/{self.module.params['volume']}") else "no self-heal daemon runs"

    def proven(self) -> None:
        if self.node not in self.module.params["nodes"] or self.module.check_mode:
            return
        nodes, clients = self.module.params["nodes"], self.module.params["clients"]
        addresses = {name: resolve(name) for name in clients}
        bricks = [f"{name}:{self.path}" for name in nodes]

        def unmet() -> str:
            try:
                said = unready(nodes, self.node, identify(self.cli.pool(), nodes, self.node, resolve), [])
                text = self.cli.xml("volume", "status", self.module.params["volume"], "clients")
                said += unconnected(bricks, parse_clients(text), clients, addresses)
            except GlusterError as error:
                return str(error)
            return "; ".join(said)

        wait_until(unmet, str, self.module.params["timeout"], "all to be connected with these certificates", self.node)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["used", "proven"], "required": True},
            "node": {"type": "str", "required": True},
            "nodes": {"type": "list", "elements": "str", "required": True},
            "volume": {"type": "str", "required": True},
            "brick_path": {"type": "path", "required": True},
            "mount": {"type": "str", "default": ""},
            "unit": {"type": "str", "default": ""},
            "clients": {"type": "dict", "default": {}},
            "files": {
                "type": "list",
                "elements": "path",
                "default": ["/etc/ssl/glusterfs.key", "/etc/ssl/glusterfs.pem", "/etc/ssl/glusterfs.ca"],
            },
            "timeout": {"type": "int", "default": 120},
        },
        supports_check_mode=True,
    )
    work = Work(module)
    try:
        getattr(work, module.params["state"])()
    except GlusterError as error:
        module.fail_json(msg=str(error), changed=bool(work.restarted), restarted=work.restarted)
    module.exit_json(changed=bool(work.restarted), restarted=work.restarted)


if __name__ == "__main__":
    main()
