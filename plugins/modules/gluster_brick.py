#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Put an empty brick in the place of one that was wiped or whose disk was replaced."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gluster_brick
short_description: Put an empty brick in the place of one that was wiped or whose disk was replaced
description:
  - Runs on the node of the brick. Does nothing where the brick carries the volume's mark and its process runs.
  - Refuses a brick directory with files that are no brick's, a brick that belongs to another volume, and a cluster in
    which another brick or a peer is away. Deletes nothing.
  - A brick that M(tribrick.media.brick_seed) is to fill is left as it is, its process running or not.
  - Else C(gluster volume reset-brick), which marks the other bricks so that the self-heal daemon fills this one. Killed
    between its two halves, it is finished by the next run.
options:
  name: {description: The volume., type: str, required: true}
  node: {description: The name of the node that this runs on., type: str, required: true}
  nodes: {description: Names of all nodes of the pool., type: list, elements: str, required: true}
  path: {description: The brick's directory., type: path, required: true}
  mount:
    description: Mount point of the brick's file system; empty where it has none of its own.
    type: str
    default: ""
attributes:
  check_mode: {support: full, description: Refuses and predicts.}
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Use the new disk
  tribrick.media.gluster_brick:
    name: media
    node: node2
    nodes: [node1, node2, node3]
    path: /srv/gluster/media/brick
    mount: /srv/gluster/media
"""

RETURN = r"""
commands: {description: What was (in check mode, would be) run., returned: always, type: list, elements: str}
empty: {description: Whether the brick is to be filled., returned: success, type: bool}
"""

import os
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.brick_seed import staging_of
from ansible_collections.tribrick.media.plugins.module_utils.gluster import (
    Cli,
    GlusterError,
    Refused,
    identify,
    resolve,
    unready,
    wait_until,
)
from ansible_collections.tribrick.media.plugins.module_utils.health import find_brick
from ansible_collections.tribrick.media.plugins.module_utils.recovery import brick_mark, judge_brick_directory
from ansible_collections.tribrick.media.plugins.module_utils.systemd import PROPERTIES, parse_show

# GlusterFS starts bricks in the background after its own start. A reset meanwhile has crashed glusterd, which had then
# lost its description of the brick and did not start again (11.1, seen a second after its start).
SETTLED = 15


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "node": {"type": "str", "required": True},
            "nodes": {"type": "list", "elements": "str", "required": True},
            "path": {"type": "path", "required": True},
            "mount": {"type": "str", "default": ""},
        },
        supports_check_mode=True,
    )
    name, node, path = module.params["name"], module.params["node"], module.params["path"]
    nodes = module.params["nodes"]
    cli = Cli(module.run_command, node, 120)
    brick = f"{node}:{path}"
    commands: list[str] = []

    def reset(*words: str) -> None:
        commands.append(" ".join(["gluster", "volume", "reset-brick", name, *words]))
        if not module.check_mode:
            cli.change("volume", "reset-brick", name, *words)

    def commit_again() -> str:
        """Empty once it is done. The others connect to a glusterd that was restarted in their own time, and check that
        before anything changes; this node sees only its own connections to them. It may have started the brick, too."""
        try:
            reset(brick, "start")
            reset(brick, brick, "commit", "force")
        except GlusterError as error:
            if f"Host {node} not connected" not in error.message:
                raise
            return error.message
        return ""

    def starting() -> str:
        words = ["systemctl", "show", f"--property={','.join(PROPERTIES)}", "glusterd.service"]
        unit = parse_show(module.run_command(words, environ_update={"LC_ALL": "C"})[1], words[-1:])[words[-1]]
        age = time.monotonic() - unit.started
        return "" if unit.active == "active" and age >= SETTLED else f"{unit.active}, for {age:.0f} s"

    def settle() -> None:
        if not module.check_mode:
            wait_until(starting, str, 60, f"glusterd to have run for {SETTLED} s", node)

    def unready_pool() -> str:
        try:
            return "; ".join(unready(nodes, node, identify(cli.pool(), nodes, node, resolve), []))
        except GlusterError as error:
            return str(error)

    try:
        if module.params["mount"] and not os.path.ismount(module.params["mount"]):
            raise Refused(
                f"nothing is mounted at {module.params['mount']}: make a file system on the disk and mount it"
            )
        volume = cli.volume(name)
        if volume is None or brick not in volume.bricks:
            raise Refused(
                f"{brick} is no brick of {name}; if {node} is to replace a lost node, run "
                f"playbooks/recover_node.yml -e node={node} -e instead_of=LOST -e confirm=yes"
            )
        entries = os.listdir(path) if os.path.isdir(path) else []
        wanted = judge_brick_directory(entries, brick_mark(path), volume.uuid, path)
        if not wanted and os.path.isdir(staging_of(path)):
            module.exit_json(changed=False, commands=[], empty=True)
        if not wanted and find_brick(path):
            module.exit_json(changed=False, commands=[], empty=False)
        if not wanted:
            raise Refused(f"{path} is whole, only its process is down: run playbooks/recover_heal.yml")
        members = identify(cli.pool(), nodes, node, resolve)
        away = unready(nodes, node, members, [])
        away += [f"{one.brick}: down" for one in cli.status(volume) if one.brick != brick and not one.online]
        if away:
            raise Refused(f"every other node and brick must be there first: {'; '.join(away)}")
        settle()
        # Ends the brick's process, which may still serve a directory that is gone. May be repeated.
        reset(brick, "start")
        if not module.check_mode:
            os.makedirs(path, exist_ok=True)
        try:
            reset(brick, brick, "commit", "force")
        except GlusterError as error:
            if "destination brick is new" not in error.message:
                raise
            # A glusterd that fetched the volume while the directory was missing keeps no real path of it until it is
            # started again (seen on a fresh host, 11.1).
            commands.append("systemctl restart glusterd.service")
            module.run_command(["timeout", "-k", "5", "120", "systemctl", "restart", "glusterd.service"])
            wait_until(unready_pool, str, 60, "the pool", node)
            settle()
            wait_until(commit_again, str, 60, f"the other nodes to be connected to {node}", node)
        if not module.check_mode:
            wait_until(
                lambda: find_brick(path), lambda state: "" if state else "no process", 60, f"{brick} to run", node
            )
    except (GlusterError, Refused) as error:
        module.fail_json(msg=str(error), changed=bool(cli.changing), commands=commands)
    module.exit_json(changed=True, commands=commands, empty=True)


if __name__ == "__main__":
    main()
