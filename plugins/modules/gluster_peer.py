#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Join nodes into one GlusterFS pool."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gluster_peer
short_description: Join nodes into one GlusterFS pool
description:
  - Run it on all nodes of the pool at the same time, without C(run_once). Each node asks its own glusterd and finds
    out whether it is the coordinator, the one that acts. The others change nothing and wait until they see the result.
  - The coordinator is the first of O(nodes) that is not known to be away. A node that is alone leaves the work to the
    first one, so no node is named in the playbook and none must be alive for ever.
  - Nodes are added one at a time. Each must reach C(Peer in Cluster) and be connected before the next is added.
  - A node that the pool knows only by its address (or by another name) is made known by its name. As glusterd cannot
    do that itself, the first other node does it, even if it is not the coordinator.
  - Nodes are never removed. If all nodes are members, the module succeeds even while some are down.
  - In check mode, a node whose glusterd has never had a pool is treated as alone, installed or not.
options:
  nodes:
    description: Names of all nodes of the pool, in the same order on each of them.
    type: list
    elements: str
    required: true
  node:
    description: The name of the node that this runs on, as in O(nodes).
    type: str
    required: true
  absent:
    description:
      - Nodes known to be dead. They are not added and not waited for; what they still need is in RV(pending).
      - While a node is absent no other node is added either; the module fails and names the absent node.
    type: list
    elements: str
    default: []
  timeout:
    description: Seconds after which a single call of C(gluster) is given up.
    type: int
    default: 120
  wait_timeout:
    description: Seconds to wait for each new state before the module fails and says what it saw.
    type: int
    default: 60
attributes:
  check_mode:
    support: full
    description: The coordinator predicts; nobody waits.
  diff_mode:
    support: full
    description: Shows the members before and after.
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Join the nodes into one pool
  tribrick.media.gluster_peer:
    nodes: [node1, node2, node3]
    node: "{{ inventory_hostname }}"

- name: Check the pool without a dead node
  tribrick.media.gluster_peer:
    nodes: [node1, node2, node3]
    node: "{{ inventory_hostname }}"
    absent: [node2]
"""

RETURN = r"""
acted:
  description: Whether this node ran a command that changes the pool (in check mode, would run one).
  returned: always
  type: bool
coordinator:
  description: The node that may change the pool, as this node sees it.
  returned: always
  type: str
  sample: node1
commands:
  description: The changing commands that this node ran (in check mode, would run).
  returned: always
  type: list
  elements: str
  sample: [gluster peer probe node2]
pending:
  description: What waits until absent or disconnected nodes are back, in sentences.
  returned: always
  type: list
  elements: str
disconnected:
  description: Members that this node has no connection to now.
  returned: success
  type: list
  elements: str
unexpected:
  description: Members of the pool that are none of O(nodes).
  returned: success
  type: list
  elements: str
pool:
  description: The members as this node sees them afterwards; it calls itself C(localhost).
  returned: success
  type: list
  elements: dict
  sample:
    - {uuid: 4a2ba81e-3d2a-437a-b01a-9b48e32180ea, hostnames: [node2], connected: true, state: 3,
       state_text: Peer in Cluster}
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.gluster import (
    SETTLE,
    Cli,
    GlusterError,
    Members,
    Peer,
    PeerPlan,
    Refused,
    check_names,
    coordinator,
    identify,
    plain,
    plan_peers,
    poll,
    read_or_predict,
    renamer,
    resolve,
    unready,
    wait_until,
)


class Work:
    """One run of the module."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.nodes: list[str] = module.params["nodes"]
        self.node: str = module.params["node"]
        self.absent: list[str] = module.params["absent"]
        self.patience: int = module.params["wait_timeout"]
        self.cli = Cli(module.run_command, self.node, module.params["timeout"])
        self.pool: list[Peer] = []

    def read(self) -> Members:
        self.pool = read_or_predict(self.module, self.cli.pool, [])
        return identify(self.pool, self.nodes, self.node, resolve)

    def plan(self, members: Members) -> PeerPlan:
        return plan_peers(self.nodes, self.node, members, self.absent)

    def unready(self, members: Members) -> str:
        return "; ".join(unready(self.nodes, self.node, members, self.absent))

    def probe(self, name: str) -> None:
        try:
            self.cli.change("peer", "probe", name, patience=self.patience)
        except GlusterError as error:
            raise explain_probe(error, name, self.node) from error

    def rename(self, members: Members) -> Members:
        """Make every member known by its name, each by one agreed node."""
        for name in self.plan(members).rename:
            if renamer(self.nodes, self.node, name, members) == self.node:
                self.probe(name)
            members = wait_until(
                self.read,
                lambda seen, name=name: f"{name} is known under another name" * (name in seen.misnamed),
                self.patience,
                f"{name} to be known to the pool by its name",
                self.node,
            )
        return members

    def run(self) -> dict[str, Any]:
        check_names(self.nodes, self.node, self.absent)
        members = self.read()
        if not self.module.check_mode and self.plan(members).away:
            members = poll(self.read, lambda seen: not self.plan(seen).away, min(SETTLE, self.patience))
        before = describe(self.node, members)
        plan = self.plan(members)
        lead = coordinator(self.nodes, self.node, members, self.absent)
        if plan.refusal:
            raise Refused(plan.refusal)
        after = before
        commands: list[str] = []
        if self.module.check_mode:
            names = list(plan.probe) if lead == self.node else []
            names += [n for n in plan.rename if renamer(self.nodes, self.node, n, members) == self.node]
            commands = [f"gluster peer probe {name}" for name in names]
            after = before | dict.fromkeys(names, "Peer in Cluster")
        elif not plan.empty:
            if lead == self.node:
                for name in plan.probe:
                    self.probe(name)
                    wait_until(
                        self.read,
                        lambda seen, name=name: "; ".join(unready([name], self.node, seen, [])),
                        self.patience,
                        f"{name} to join the pool",
                        self.node,
                    )
            members = wait_until(
                self.read,
                self.unready,
                self.patience,
                "all nodes to be connected members of the pool" + ("" if lead == self.node else f" ({lead} adds them)"),
                self.node,
            )
            members = self.rename(members)
            after = describe(self.node, members)
            commands = self.cli.changing
        return {
            "changed": bool(commands),
            "acted": bool(commands),
            "coordinator": lead,
            "commands": commands,
            "pending": list(self.plan(members).pending),
            "disconnected": [
                name for name in self.nodes if name in members.peers and not members.peers[name].connected
            ],
            "unexpected": list(members.unexpected),
            "pool": [plain(peer) for peer in self.pool],
            "diff": {"before": {"pool": before}, "after": {"pool": after if commands else before}},
        }


def explain_probe(error: GlusterError, name: str, node: str) -> GlusterError:
    """The same error with the node's name and what to do."""
    text = error.message
    if "another cluster" in text:
        hint = (
            f"{name} belongs to another pool. If {node} or {name} was installed anew, it has to be given its old "
            "identity first; otherwise detach it there"
        )
    elif "not connected" in text or "no answer" in text:
        hint = (
            f"{name} cannot be reached on port 24007: look at 'systemctl status glusterd' on {name}, at the firewall "
            "and at the certificates of both"
        )
    else:
        hint = f"{name} could not be added to the pool"
    return type(error)(f"{hint}. Gluster says: {text}", error.command, error.host)


def describe(node: str, members: Members) -> dict[str, str]:
    """The pool for a diff: name -> state."""
    known = {node: "Peer in Cluster"}
    for name, peer in members.peers.items():
        suffix = f", known as {peer.hostnames[0]}" if name in members.misnamed else ""
        known[name] = (peer.state_text or str(peer.state)) + suffix
    return dict(sorted(known.items()))


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "nodes": {"type": "list", "elements": "str", "required": True},
            "node": {"type": "str", "required": True},
            "absent": {"type": "list", "elements": "str", "default": []},
            "timeout": {"type": "int", "default": 120},
            "wait_timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    work = Work(module)
    try:
        result = work.run()
    except (GlusterError, Refused) as error:
        commands = work.cli.changing
        module.fail_json(msg=str(error), changed=bool(commands), acted=bool(commands), commands=commands)
    if result["unexpected"]:
        module.warn(f"the pool has members that are none of the nodes: {', '.join(result['unexpected'])}")
    module.exit_json(**result)


if __name__ == "__main__":
    main()
