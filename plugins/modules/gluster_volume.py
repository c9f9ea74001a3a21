#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Create and start a replicated GlusterFS volume and keep its options."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gluster_volume
short_description: Create and start a replicated GlusterFS volume and keep its options
description:
  - Run it on all nodes of the pool at the same time, without C(run_once), after M(tribrick.media.gluster_peer). The
    first of O(nodes) that is not known to be away is the coordinator, the one that acts. The others change nothing and
    wait until they see the result.
  - All of the plan is made, and refused if need be, before the first change. A volume that exists with other bricks,
    another type or another number of replicas is never touched.
  - A change needs every node. While a node is down and not named in O(absent), a needed change fails and names it.
    If nothing is to change, nodes may be down.
  - Options are set before the volume is started, all in one transaction. If gluster refuses it, they are set one by
    one to find the one at fault.
  - Volumes are never deleted.
  - In check mode, a node whose glusterd has never had a pool is treated as empty, installed or not, and nodes that
    M(tribrick.media.gluster_peer) is about to add count as added.
options:
  name:
    description: Name of the volume.
    type: str
    required: true
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
      - Nodes known to be dead. The volume is then neither created nor stopped; options that differ are left and
        reported in RV(pending). A stopped volume is started if a majority of the nodes is there.
    type: list
    elements: str
    default: []
  bricks:
    description:
      - Bricks as C(HOST:/PATH), in the order of gluster. Each group of O(replicas) bricks holds the same files and has
        to be on as many hosts.
    type: list
    elements: str
    required: true
  replicas:
    description: Copies of each file. Odd and at least 3; two copies cannot outvote each other.
    type: int
    default: 3
  transport:
    description: Transport.
    type: str
    choices: [tcp]
    default: tcp
  state:
    description: V(present) leaves a volume started or stopped as it is.
    type: str
    choices: [started, present, stopped]
    default: started
  options:
    description:
      - The profile. Values are compared in meaning (V(on) is V(enable), V(64MB) is V(67108864)).
    type: list
    elements: dict
    default: []
    suboptions:
      name:
        description: Full name of the option, for example V(network.ping-timeout).
        type: str
        required: true
      value:
        description: Value of the option.
        type: str
        required: true
      min_version:
        description: First GlusterFS version that the entry is for.
        type: str
      max_version:
        description: Last GlusterFS version that the entry is for.
        type: str
      reason:
        description: Why it is set; shown with the drift.
        type: str
        default: ""
  exclusive_options:
    description:
      - Reset options that are set on the volume and not in O(options). Without it they are only reported in RV(drift).
      - Options that gluster sets itself are left alone, and so are those that have commands of their own (quota,
        bitrot, profile).
    type: bool
    default: false
  force:
    description: Create the volume even if gluster advises against it (brick on the root file system). For labs.
    type: bool
    default: false
  timeout:
    description: Seconds after which a single call of C(gluster) is given up.
    type: int
    default: 120
  wait_timeout:
    description: Seconds to wait for other transactions, and for the coordinator, before the module fails.
    type: int
    default: 60
attributes:
  check_mode:
    support: full
    description: The coordinator predicts; nobody waits.
  diff_mode:
    support: full
    description: Shows the volume before and after.
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Create and start the volume
  tribrick.media.gluster_volume:
    name: media
    nodes: [node1, node2, node3]
    node: "{{ inventory_hostname }}"
    bricks:
      - node1:/srv/gluster/media/brick
      - node2:/srv/gluster/media/brick
      - node3:/srv/gluster/media/brick
    options:
      - {name: cluster.quorum-type, value: auto, reason: a minority must not write}
      - {name: network.ping-timeout, value: "20"}
      - {name: performance.nl-cache, value: "off", min_version: "10.0"}
"""

RETURN = r"""
acted:
  description: Whether this node ran a command that changes the cluster (in check mode, would run one).
  returned: always
  type: bool
coordinator:
  description: The node that may change the cluster, as this node sees it.
  returned: success
  type: str
  sample: node1
commands:
  description: The changing commands that this node ran (in check mode, would run).
  returned: always
  type: list
  elements: str
  sample: [gluster volume start media]
drift:
  description:
    - Options that differed from the profile when the module began. C(wanted) is V(null) for an option that the
      profile does not know. C(found) is V(null) for an option that was not set.
  returned: always
  type: list
  elements: dict
  sample: [{name: network.ping-timeout, found: "42", wanted: "20", reason: ""}]
pending:
  description: What waits until absent nodes are back, in sentences.
  returned: success
  type: list
  elements: str
not_for_this_version:
  description: Entries of the profile that are for other versions of GlusterFS.
  returned: success
  type: list
  elements: dict
version:
  description: GlusterFS version of this node; V(null) in check mode if it is not installed.
  returned: success
  type: str
  sample: "11.1"
volume:
  description: The volume afterwards, as read back; V(null) in check mode if it does not exist.
  returned: success
  type: dict
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
"""

from typing import Any

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.gluster import (
    SETTLE,
    Cli,
    GlusterBusy,
    GlusterError,
    GlusterMissing,
    GlusterUnavailable,
    Members,
    Option,
    Refused,
    Volume,
    VolumePlan,
    VolumeSpec,
    check_names,
    check_spec,
    coordinator,
    describe,
    identify,
    plain,
    plan_commands,
    plan_volume,
    poll,
    predict,
    read_or_predict,
    resolve,
    split_options,
    wait_until,
)

State = tuple[Members, Volume | None]


class Work:
    """One run of the module."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.nodes: list[str] = module.params["nodes"]
        self.node: str = module.params["node"]
        self.absent: list[str] = module.params["absent"]
        self.patience: int = module.params["wait_timeout"]
        self.cli = Cli(module.run_command, self.node, module.params["timeout"])
        self.drift: list[dict[str, Any]] = []

    def specify(self) -> tuple[VolumeSpec, list[Option], str | None]:
        given = self.module.params
        try:
            version: str | None = self.cli.version()
        except GlusterMissing:
            if not self.module.check_mode:
                raise
            version = None
        fitting, skipped = split_options(
            [Option(**{**entry, "reason": entry["reason"] or ""}) for entry in given["options"]], version
        )
        spec = VolumeSpec(
            name=given["name"],
            bricks=tuple(given["bricks"]),
            replicas=given["replicas"],
            transport=given["transport"],
            state=given["state"],
            options=tuple(fitting),
            exclusive=given["exclusive_options"],
            force=given["force"],
        )
        check_spec(spec, self.nodes)
        return spec, skipped, version

    def read(self) -> State:
        name = self.module.params["name"]
        pool, found = read_or_predict(self.module, lambda: (self.cli.pool(), self.cli.volume(name)), ([], None))
        return identify(pool, self.nodes, self.node, resolve), found

    def plan(self, spec: VolumeSpec, state: State) -> VolumePlan:
        members, found = state
        return plan_volume(
            spec, found, self.nodes, self.node, members, self.absent, pool_pending=self.module.check_mode
        )

    def set_options(self, name: str, options: tuple[tuple[str, str], ...]) -> None:
        """All in one transaction; one by one if that is refused, to name the one at fault."""
        words = [word for pair in options for word in pair]
        try:
            self.cli.change("volume", "set", name, *words, patience=self.patience)
            return
        except (GlusterBusy, GlusterUnavailable):
            raise
        except GlusterError as error:
            if len(options) == 1:
                raise GlusterError(
                    f"volume {name}: option {options[0][0]} cannot be set to {options[0][1]!r}: {error.message}",
                    error.command,
                    error.host,
                ) from error
        refused = []
        for key, value in options:
            try:
                self.cli.change("volume", "set", name, key, value, patience=self.patience)
            except (GlusterBusy, GlusterUnavailable):
                raise
            except GlusterError as error:
                refused.append(f"{key} cannot be set to {value!r}: {error.message}")
        if refused:
            raise GlusterError(f"volume {name}: {'; '.join(refused)}. The other options were set", host=self.node)

    def create(self, command: tuple[str, ...], name: str) -> None:
        try:
            self.cli.change(*command, patience=self.patience)
        except (GlusterBusy, GlusterUnavailable):
            raise
        except GlusterError as error:
            if self.cli.volume(name) is None:
                raise
            self.module.debug(f"the volume was made by a transaction begun before: {error}")

    def apply(self, spec: VolumeSpec, plan: VolumePlan) -> None:
        for command in plan_commands(spec, plan):
            if command[:2] == ("volume", "create"):
                self.create(command, spec.name)
            elif command[:2] == ("volume", "set"):
                self.set_options(spec.name, plan.set)
            else:
                self.cli.change(*command, patience=self.patience)

    def run(self) -> dict[str, Any]:
        check_names(self.nodes, self.node, self.absent)
        spec, skipped, version = self.specify()
        state = self.read()
        if not self.module.check_mode and self.plan(spec, state).away:
            state = poll(self.read, lambda seen: not self.plan(spec, seen).away, min(SETTLE, self.patience))
        members, found = state
        plan = self.plan(spec, state)
        self.drift = list(plan.drift)
        lead = coordinator(self.nodes, self.node, members, self.absent)
        if plan.refusal:
            raise Refused(plan.refusal)
        before = after = describe(found)
        commands: list[str] = []
        if not plan.empty and lead == self.node:
            if self.module.check_mode:
                commands = [" ".join(("gluster", *command)) for command in plan_commands(spec, plan)]
                after = predict(spec, found, plan)
            else:
                self.apply(spec, plan)
                members, found = state = self.read()
                left = self.plan(spec, state)
                if not left.empty:
                    raise GlusterError(
                        f"volume {spec.name} was changed, yet is not as wanted: "
                        + (left.refusal or "still to do: " + "; ".join(left.words)),
                        host=self.node,
                    )
                commands = self.cli.changing
                after = describe(found)
        elif not plan.empty and not self.module.check_mode:
            _, found = wait_until(
                self.read,
                lambda seen: unmet(spec, seen[1]),
                self.patience,
                f"{lead} to bring volume {spec.name} to the state {spec.state}",
                self.node,
            )
        return {
            "changed": bool(commands),
            "acted": bool(commands),
            "coordinator": lead,
            "commands": commands,
            "drift": self.drift,
            "pending": list(plan.pending),
            "not_for_this_version": [plain(option) for option in skipped],
            "version": version,
            "volume": plain(found) if found else None,
            "diff": {"before": before, "after": after},
        }


def unmet(spec: VolumeSpec, found: Volume | None) -> str:
    """What a node that waits still misses."""
    if found is None:
        return f"volume {spec.name} does not exist"
    if (spec.state == "started" and not found.started) or (spec.state == "stopped" and found.started):
        return f"volume {spec.name} is {found.status}"
    return ""


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "nodes": {"type": "list", "elements": "str", "required": True},
            "node": {"type": "str", "required": True},
            "absent": {"type": "list", "elements": "str", "default": []},
            "bricks": {"type": "list", "elements": "str", "required": True},
            "replicas": {"type": "int", "default": 3},
            "transport": {"type": "str", "choices": ["tcp"], "default": "tcp"},
            "state": {"type": "str", "choices": ["started", "present", "stopped"], "default": "started"},
            "options": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "name": {"type": "str", "required": True},
                    "value": {"type": "str", "required": True},
                    "min_version": {"type": "str"},
                    "max_version": {"type": "str"},
                    "reason": {"type": "str", "default": ""},
                },
            },
            "exclusive_options": {"type": "bool", "default": False},
            "force": {"type": "bool", "default": False},
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
        module.fail_json(
            msg=str(error), changed=bool(commands), acted=bool(commands), commands=commands, drift=work.drift
        )
    module.exit_json(**result)


if __name__ == "__main__":
    main()
