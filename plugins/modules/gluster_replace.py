#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Give a lost node's place in pool and volume to a node with another name."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gluster_replace
short_description: Give a lost node's place in pool and volume to a node with another name
description:
  - Runs on the new node, which is a member of the pool already (M(tribrick.media.gluster_peer)).
  - With O(state=brick), its empty brick takes the place of the lost node's one by C(gluster volume replace-brick),
    which marks the other bricks so that the self-heal daemon fills it. Before that the volume lets the new node's
    certificate and address in. Does nothing where it has the place already.
  - With O(state=peer), the pool forgets the lost node, which is refused as long as the volume has a brick there.
  - With O(state=gone), on any other node, it only refuses a lost node that is connected there. The new node cannot
    tell, since the lost one's firewall does not let it in.
  - Refuses a lost node that is connected, a new brick directory that holds anything, a cluster in which another brick
    or peer is away, and an inventory in which the new node does not stand where the lost one stood.
  - Deletes nothing. Killed at any point, it is finished by the next run.
options:
  name: {description: The volume., type: str, required: true}
  node: {description: The name of the node that this runs on., type: str, required: true}
  nodes:
    description: Names of all nodes of the pool in the inventory's order, the lost one not among them.
    type: list
    elements: str
    required: true
  lost: {description: The name of the lost node., type: str, required: true}
  address: {description: The new node's plain address., type: str, required: true}
  path: {description: The brick's directory., type: path, required: true}
  mount:
    description: Mount point of the brick's file system; empty where it has none of its own.
    type: str
    default: ""
  state: {description: What is to be given away., type: str, choices: [brick, gone, peer], default: brick}
attributes:
  check_mode: {support: full, description: Refuses and predicts.}
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Take the place of the lost node
  tribrick.media.gluster_replace:
    name: media
    node: node4
    nodes: [node1, node4, node3]
    lost: node2
    address: 192.0.2.14
    path: /srv/gluster/media/brick
    mount: /srv/gluster/media
"""

RETURN = r"""
commands: {description: What was (in check mode, would be) run., returned: always, type: list, elements: str}
"""

import os
from collections.abc import Sequence

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.brick_seed import staging_of
from ansible_collections.tribrick.media.plugins.module_utils.gluster import (
    Cli,
    GlusterError,
    Peer,
    Refused,
    Volume,
    identify,
    poll,
    resolve,
    unready,
    wait_until,
)
from ansible_collections.tribrick.media.plugins.module_utils.health import find_brick
from ansible_collections.tribrick.media.plugins.module_utils.recovery import (
    brick_mark,
    bricks_after,
    judge_brick_directory,
    let_in,
)

# Seconds for which glusterd takes a node that went silent for connected (ping-timeout 30), and some more.
SILENCE = 45


class Work:
    """One run of the module."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.name: str = module.params["name"]
        self.node: str = module.params["node"]
        self.nodes: Sequence[str] = module.params["nodes"]
        self.lost: str = module.params["lost"]
        self.path: str = module.params["path"]
        self.cli = Cli(module.run_command, self.node, 120)
        self.commands: list[str] = []

    def change(self, *words: str) -> None:
        self.commands.append(" ".join(["gluster", *words]))
        if not self.module.check_mode:
            self.cli.change(*words)

    def volume(self) -> Volume:
        found = self.cli.volume(self.name)
        if found is None:
            raise Refused(f"{self.node} does not know the volume {self.name}: it is no member of the pool yet")
        return found

    def lost_peer(self) -> Peer | None:
        """The lost node as the pool knows it. One that is there is not lost."""
        peer = next((one for one in self.cli.pool() if self.lost in one.hostnames), None)
        if peer is not None and peer.connected:
            raise Refused(
                f"{self.lost} is connected to the pool: only a node that is gone is replaced. If it is to go, switch "
                "it off first"
            )
        return peer

    def gone(self) -> None:
        def there() -> str:
            try:
                self.lost_peer()
            except Refused as refusal:
                return str(refusal)
            return ""

        if words := poll(there, lambda seen: not seen, SILENCE):
            raise Refused(words)

    def brick(self) -> None:
        volume = self.volume()
        old, new = f"{self.lost}:{self.path}", f"{self.node}:{self.path}"
        if new not in volume.bricks:
            self.lost_peer()
            bricks_after(volume.bricks, old, new, [f"{node}:{self.path}" for node in self.nodes])
            if self.module.params["mount"] and not os.path.ismount(self.module.params["mount"]):
                raise Refused(
                    f"nothing is mounted at {self.module.params['mount']}: make a file system on the disk and mount it"
                )
            entries = os.listdir(self.path) if os.path.isdir(self.path) else []
            if not judge_brick_directory(entries, brick_mark(self.path), volume.uuid, self.path):
                raise Refused(f"{self.path} holds a brick already; move the directory away and run again")
            away = unready(self.nodes, self.node, identify(self.cli.pool(), self.nodes, self.node, resolve), [])
            away += [f"{one.brick}: down" for one in self.cli.status(volume) if one.brick != old and not one.online]
            if away:
                raise Refused(f"every other node and brick must be there first: {'; '.join(away)}")
            # Before its self-heal daemon and the others' meet, so that none of them is turned away.
            who = {"auth.ssl-allow": self.node, "auth.allow": self.module.params["address"]}
            words = [word for pair in let_in(volume.options, who).items() for word in pair]
            if words:
                self.change("volume", "set", self.name, *words)
            if not self.module.check_mode:
                os.makedirs(self.path, exist_ok=True)
                os.makedirs(staging_of(self.path), exist_ok=True)  # for brick_seed, which fills it
            self.change("volume", "replace-brick", self.name, old, new, "commit", "force")
        if not self.module.check_mode:
            wait_until(
                lambda: find_brick(self.path), lambda seen: "" if seen else "no process", 60, f"{new} to run", self.node
            )

    def peer(self) -> None:
        bricks = [one for one in self.volume().bricks if one.startswith(f"{self.lost}:")]
        if bricks:
            raise Refused(f"the volume {self.name} has a brick on {self.lost}: {', '.join(bricks)}")
        if self.lost_peer() is not None:
            self.change("peer", "detach", self.lost, "force")


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "node": {"type": "str", "required": True},
            "nodes": {"type": "list", "elements": "str", "required": True},
            "lost": {"type": "str", "required": True},
            "address": {"type": "str", "required": True},
            "path": {"type": "path", "required": True},
            "mount": {"type": "str", "default": ""},
            "state": {"type": "str", "choices": ["brick", "gone", "peer"], "default": "brick"},
        },
        supports_check_mode=True,
    )
    work = Work(module)
    try:
        if work.lost in work.nodes:
            raise Refused(f"the inventory still has {work.lost}: put {work.node} in its place, and run again")
        {"brick": work.brick, "gone": work.gone, "peer": work.peer}[module.params["state"]]()
    except (GlusterError, Refused) as error:
        module.fail_json(msg=str(error), changed=bool(work.cli.changing), commands=work.commands)
    module.exit_json(changed=bool(work.commands), commands=work.commands)


if __name__ == "__main__":
    main()
