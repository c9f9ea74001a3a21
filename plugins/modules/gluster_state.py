#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Give a node's glusterd the identity and the peers back that the other nodes know it by."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gluster_state
short_description: Give a node's glusterd the identity and the peers back that the other nodes know it by
description:
  - Without O(views), returns what this node knows of the pool and changes nothing.
  - With O(views), which other nodes returned so, finds the identity by which they know O(node). A majority of O(nodes),
    this one included, must agree. Where this node's identity or peers differ, or others reject it, its state is put
    aside as C(/var/lib/glusterd.before-TIME), identity and peers are written, and glusterd fetches the volumes from its
    peers.
  - A glusterd that runs and answers nothing is killed and started anew, with the state that it has.
  - Nothing is deleted. The node's brick is started anew with it, as glusterd has forgotten its port; without the bricks
    of all O(views) it refuses. Killed in between, it is finished by the next run.
options:
  node: {description: The name of the node that this runs on., type: str, required: true}
  nodes: {description: Names of all nodes of the pool., type: list, elements: str, required: true}
  volume: {description: The volume that the node must know in the end., type: str, required: true}
  views: {description: What the module returned as RV(view) on other nodes., type: list, elements: dict}
  offline:
    description:
      - Only write what is missing, before glusterd is installed or started. A glusterd that does not start with the
        state that it has counts as one without. Whether the pool rejects the node cannot be known then.
    type: bool
    default: false
  brick_path: {description: The brick's directory., type: path, required: true}
  wait_timeout: {description: Seconds to wait for the pool., type: int, default: 120}
attributes:
  check_mode: {support: full, description: Predicts.}
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Read what the others know
  tribrick.media.gluster_state:
    node: "{{ inventory_hostname }}"
    nodes: [node1, node2, node3]
    volume: media
    brick_path: /srv/gluster/media/brick
"""

RETURN = r"""
view: {description: "What this node knows: its name, uuid, op_version, peers by uuid.", returned: always, type: dict}
reasons: {description: "Why the state was (would be) replaced.", returned: with O(views), type: list, elements: str}
aside: {description: Where the old state lies., returned: when replaced, type: str}
"""

import os
import shutil
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.gluster import (
    Cli,
    GlusterError,
    GlusterSlow,
    Refused,
    identify,
    join_words,
    resolve,
    unready,
    wait_until,
)
from ansible_collections.tribrick.media.plugins.module_utils.health import find_brick
from ansible_collections.tribrick.media.plugins.module_utils.recovery import (
    agree_on_identity,
    parse_properties,
    state_reasons,
)

STATE = "/var/lib/glusterd"
STOP_BRICKS = "/usr/local/lib/tribrick/stop-bricks"


def read(path: str) -> str:
    try:
        with open(path, encoding="utf-8") as stream:
            return stream.read()
    except OSError:
        return ""


def look(node: str, state: str = STATE) -> dict:
    """The node's own view, from glusterd's files: they are there when glusterd does not run, too."""
    info = parse_properties(read(os.path.join(state, "glusterd.info")))
    peers = {}
    folder = os.path.join(state, "peers")
    for name in sorted(os.listdir(folder)) if os.path.isdir(folder) else []:
        values = parse_properties(read(os.path.join(folder, name)))
        if values.get("uuid"):
            peers[values["uuid"]] = [value for key, value in sorted(values.items()) if key.startswith("hostname")]
    return {
        "node": node,
        "uuid": info.get("UUID", ""),
        "op_version": info.get("operating-version", ""),
        "peers": peers,
        "volumes": sorted(os.listdir(os.path.join(state, "vols")))
        if os.path.isdir(os.path.join(state, "vols"))
        else [],
    }


def write(path: str, text: str) -> None:
    """Whole or not at all, and durable."""
    os.makedirs(os.path.dirname(path), mode=0o755, exist_ok=True)
    with open(f"{path}.new", "w", encoding="utf-8") as stream:
        stream.write(text)
        stream.flush()
        os.fsync(stream.fileno())
    os.replace(f"{path}.new", path)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "node": {"type": "str", "required": True},
            "nodes": {"type": "list", "elements": "str", "required": True},
            "volume": {"type": "str", "required": True},
            "views": {"type": "list", "elements": "dict"},
            "offline": {"type": "bool", "default": False},
            "brick_path": {"type": "path", "required": True},
            "wait_timeout": {"type": "int", "default": 120},
        },
        supports_check_mode=True,
    )
    node, nodes, volume = module.params["node"], module.params["nodes"], module.params["volume"]
    own = look(node)
    brick = module.params["brick_path"]
    unit = module.run_command(["systemctl", "is-active", "glusterd.service"])[1].strip()
    if module.params["views"] is None:
        module.exit_json(changed=False, view=own | {"brick": bool(find_brick(brick)), "running": unit == "active"})
    cli = Cli(module.run_command, node, 30)

    def systemctl(*words: str) -> None:
        code, out, err = module.run_command(["timeout", "-k", "5", "120", "systemctl", *words, "glusterd.service"])
        if code != 0:
            module.fail_json(msg=f"systemctl {words[0]} glusterd failed: {(err or out).strip()}", changed=True)

    def unmet() -> str:
        try:
            members = identify(cli.pool(), nodes, node, resolve)
            said = list(unready(nodes, node, members, absent))
            if cli.volume(volume) is None:
                said.append(f"the volume {volume} is not known yet")
        except GlusterError as error:
            return str(error)
        return "; ".join(said)

    def silent() -> bool:
        try:
            cli.pool()
        except GlusterSlow:
            return True
        except GlusterError:
            pass
        return False

    def settle() -> None:
        """A glusterd that has just started needs its time before its state is called wrong."""
        deadline = time.monotonic() + (0 if module.check_mode else 30)
        while unmet() and time.monotonic() < deadline:
            time.sleep(0.5)  # poll, until the deadline above

    changed, aside = False, ""
    try:
        identity, op_version, peers = agree_on_identity(node, nodes, module.params["views"])
        there = {view["node"] for view in module.params["views"] if view.get("running")}
        absent = [name for name in nodes if name != node and name not in there]
        offline, rejected = module.params["offline"], False
        broken = ["glusterd does not start with the state that it has"] * (offline and unit in ("activating", "failed"))
        if not offline:
            if unit != "active" and not module.check_mode:
                changed = True
                systemctl("start")
            settle()
            if silent():
                changed = True
                if not module.check_mode:
                    # One that hangs does not end by itself. It keeps its state, and the bricks do not notice.
                    systemctl("kill", "--kill-who=main", "--signal=SIGKILL")
                    systemctl("start")
                    settle()
            own, rejected = look(node), "Rejected" in unmet()
        reasons = state_reasons(own, identity, peers, volume, rejected) + broken
        if offline and own["uuid"] == identity and not own["volumes"] and unit in ("inactive", "unknown"):
            reasons = []  # written by a run that was killed; the volumes come when glusterd starts
        if reasons:
            if find_brick(brick) and (
                down := [view["node"] for view in module.params["views"] if not view.get("brick")]
            ):
                raise Refused(f"the brick of {join_words(down)} is down, and this would restart that of {node}, too")
            changed = True
            aside = f"{STATE}.before-{time.strftime('%Y%m%dT%H%M%SZ', time.gmtime())}"
            if not module.check_mode:
                if unit in ("active", "activating", "failed"):
                    systemctl("stop")
                # A glusterd with a new state knows no port of a running brick, and nobody could connect to it again.
                code, out, err = module.run_command([STOP_BRICKS]) if os.path.exists(STOP_BRICKS) else (0, "", "")
                if code != 0:
                    raise Refused(f"the brick does not end: {(err or out).strip()}")
                os.makedirs(aside, exist_ok=True)
                for name in ("glusterd.info", "peers", "vols"):
                    if os.path.lexists(os.path.join(STATE, name)):
                        shutil.move(os.path.join(STATE, name), os.path.join(aside, name))
                for number, names in peers.items():
                    lines = [f"uuid={number}", "state=3", *(f"hostname{i}={n}" for i, n in enumerate(names, 1))]
                    write(os.path.join(STATE, "peers", number), "\n".join(lines) + "\n")
                # Last: a run that was killed before finds no identity and does it all again.
                write(os.path.join(STATE, "glusterd.info"), f"UUID={identity}\noperating-version={op_version}\n")
                if not offline:
                    systemctl("start")
        if not (offline or module.check_mode):
            wait_until(unmet, str, module.params["wait_timeout"], "the pool to take the node back", node)
    except (GlusterError, Refused) as error:
        module.fail_json(msg=str(error), changed=changed, aside=aside, view=own)
    module.exit_json(changed=changed, reasons=reasons, aside=aside, view=look(node))


if __name__ == "__main__":
    main()
