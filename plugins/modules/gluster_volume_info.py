#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Read the state of a GlusterFS pool and its volumes."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gluster_volume_info
short_description: Read the state of a GlusterFS pool and its volumes
description:
  - Reads the pool, the volumes, the state of their bricks and what is left to heal, as the node
    that it runs on sees them. It never changes anything.
  - It works while peers are down. Bricks of a node that is down are reported as offline.
  - Fails if the own glusterd does not answer. A part that cannot be read while glusterd answers
    (for example what is left to heal on a volume without quorum) is V(null), and the reason
    stands in RV(volumes[].errors).
options:
  name:
    description: Only this volume. Without it, all volumes.
    type: str
  gather:
    description:
      - What to read besides the pool and the volumes themselves.
      - V(info) is always read; V(status) asks all nodes for their bricks; V(heal) asks the bricks
        what they hold back for others and takes longest.
    type: list
    elements: str
    choices: [info, status, heal]
    default: [info, status]
  timeout:
    description: Seconds after which a single call of C(gluster) is given up.
    type: int
    default: 120
  wait_timeout:
    description: Seconds to wait while another transaction keeps the cluster busy.
    type: int
    default: 60
attributes:
  check_mode:
    support: full
    description: Reads only.
  diff_mode:
    support: none
    description: Changes nothing.
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Read what is left to heal
  tribrick.media.gluster_volume_info:
    name: media
    gather: [status, heal]
  register: __state

- name: Wait for an empty heal list
  tribrick.media.gluster_volume_info:
    name: media
    gather: [heal]
  register: __heal
  until: __heal.volumes[0].heal_pending == 0
  retries: 60
  delay: 5
"""

RETURN = r"""
version:
  description: GlusterFS version of this node.
  returned: always
  type: str
  sample: "11.1"
pool:
  description: Members of the pool as this node sees them; it calls itself C(localhost).
  returned: always
  type: list
  elements: dict
  sample:
    - {uuid: 4a2ba81e-3d2a-437a-b01a-9b48e32180ea, hostnames: [node2], connected: true, state: 3,
       state_text: Peer in Cluster}
volumes:
  description: The volumes; empty if O(name) does not exist.
  returned: always
  type: list
  elements: dict
  contains:
    name: {description: Name of the volume., type: str, returned: always}
    uuid: {description: Identity of the volume., type: str, returned: always}
    type: {description: For example C(Replicate)., type: str, returned: always}
    status: {description: "C(Created), C(Started) or C(Stopped).", type: str, returned: always}
    transport: {description: Transport., type: str, returned: always}
    replicas: {description: Number of replicas., type: int, returned: always}
    arbiters: {description: Number of arbiters., type: int, returned: always}
    bricks: {description: The bricks in order., type: list, elements: str, returned: always}
    options: {description: Options that were set., type: dict, returned: always}
    brick_status:
      description: For each brick C(brick), C(online), C(port), C(pid). C(null) if unknown.
      type: list
      elements: dict
      returned: if asked for
    bricks_online:
      description: How many bricks are online. C(null) if unknown.
      type: int
      returned: if asked for
    heal:
      description: >-
        For each brick C(brick), C(connected), C(status), C(total), C(pending), C(split_brain),
        C(healing); the numbers are C(null) for a brick that could not be asked.
        C(null) if unknown.
      type: list
      elements: dict
      returned: if asked for
    heal_pending:
      description: >-
        Entries to heal, all bricks together. C(null) unless every brick answered, so nobody
        mistakes silence for health.
      type: int
      returned: if asked for
    split_brain:
      description: Entries in split brain, all bricks together; C(null) unless every brick answered.
      type: int
      returned: if asked for
    errors: {description: Why a part is C(null)., type: list, elements: str, returned: always}
"""

import socket
import time
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.gluster import (
    BrickHeal,
    BrickStatus,
    Cli,
    GlusterBusy,
    GlusterError,
    GlusterMissing,
    GlusterUnavailable,
    Volume,
    plain,
)

T = TypeVar("T")


def attempt(read: Callable[[], T], patience: float, errors: list[str]) -> T | None:
    """The reading, or None with the reason in `errors`; waits while the cluster is busy."""
    deadline = time.monotonic() + patience
    while True:
        try:
            return read()
        except (GlusterMissing, GlusterUnavailable):
            raise
        except GlusterBusy as error:
            if time.monotonic() >= deadline:
                errors.append(str(error))
                return None
        except GlusterError as error:
            errors.append(str(error))
            return None
        time.sleep(1)


def heal_totals(bricks: Sequence[BrickHeal] | None) -> tuple[int | None, int | None]:
    """Entries to heal and entries in split brain, or None if a brick is silent."""
    if not bricks:
        return None, None
    totals = [brick.total for brick in bricks]
    split = [brick.split_brain for brick in bricks]
    return (
        None if None in totals else sum(n for n in totals if n is not None),
        None if None in split else sum(n for n in split if n is not None),
    )


def gather_volume(cli: Cli, volume: Volume, gather: Sequence[str], patience: float) -> dict[str, Any]:
    errors: list[str] = []
    data = plain(volume)
    if "status" in gather:
        status: list[BrickStatus] | None
        if volume.started:
            status = attempt(lambda: cli.status(volume), patience, errors)
        else:
            status = [BrickStatus(brick, False, None, None) for brick in volume.bricks]
        data["brick_status"] = None if status is None else [plain(brick) for brick in status]
        data["bricks_online"] = None if status is None else sum(brick.online for brick in status)
    if "heal" in gather:
        heal = None
        if volume.started:
            heal = attempt(lambda: cli.heal(volume.name), patience, errors)
        else:
            errors.append(f"volume {volume.name} is not started, so nobody knows what is to heal")
        data["heal"] = None if heal is None else [plain(brick) for brick in heal]
        data["heal_pending"], data["split_brain"] = heal_totals(heal)
    data["errors"] = errors
    return data


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str"},
            "gather": {
                "type": "list",
                "elements": "str",
                "choices": ["info", "status", "heal"],
                "default": ["info", "status"],
            },
            "timeout": {"type": "int", "default": 120},
            "wait_timeout": {"type": "int", "default": 60},
        },
        supports_check_mode=True,
    )
    parameters = module.params
    host = socket.gethostname()
    cli = Cli(module.run_command, host, parameters["timeout"])
    try:
        result = {
            "version": cli.version(),
            "pool": [plain(peer) for peer in cli.pool()],
            "volumes": [
                gather_volume(cli, volume, parameters["gather"], parameters["wait_timeout"])
                for volume in cli.volumes()
                if parameters["name"] in (None, volume.name)
            ],
        }
    except GlusterError as error:
        module.fail_json(msg=str(error))
    module.exit_json(changed=False, **result)


if __name__ == "__main__":
    main()
