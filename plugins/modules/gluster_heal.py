#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Start what heals a volume, and wait until it has."""

from __future__ import annotations

DOCUMENTATION = r"""
module: gluster_heal
short_description: Start what heals a GlusterFS volume, and wait until it has
description:
  - With O(state=running), brings up what healing needs on this node. A brick's process that was stopped (SIGSTOP) goes
    on, one that died is started, and so is the self-heal daemon. A brick without the volume's mark is refused.
  - With O(state=clean), the first node of O(nodes) that is there asks for a heal and waits until no brick has anything
    left to heal. The other nodes change nothing and return at once.
  - With O(state=asked), it only asks for a heal, also when copies of other files contradict each other.
  - When the number of waiting entries does not fall for O(patience) seconds, the self-heal daemon is started anew,
    once.
  - Fails as soon as healing cannot come to its end, because a brick is away or copies contradict each other.
options:
  name: {description: The volume., type: str, required: true}
  node: {description: The name of the node that this runs on., type: str, required: true}
  nodes: {description: Names of all nodes of the pool., type: list, elements: str, required: true}
  brick_path: {description: The brick's directory on this node., type: path, required: true}
  state: {description: What to reach., type: str, choices: [running, asked, clean], required: true}
  full: {description: Compare everything and not only what is marked., type: bool, default: false}
  timeout: {description: Seconds until healing must have ended., type: int, default: 3600}
  root:
    description:
      - The media mount. Names that wait without progress are looked up through it. A brick that lost a name after its
        mark was cleared, as by a power cut in the middle of a heal, gets it back by that, not by a heal (seen on 11.1).
    type: path
  patience:
    description: Seconds without progress after which the self-heal daemon is started anew.
    type: int
    default: 120
attributes:
  check_mode: {support: full, description: Says what it would run; does not wait.}
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Heal the volume
  tribrick.media.gluster_heal:
    name: media
    node: "{{ inventory_hostname }}"
    nodes: [node1, node2, node3]
    brick_path: /srv/gluster/media/brick
    state: clean
"""

RETURN = r"""
commands: {description: What was (in check mode, would be) run., returned: always, type: list, elements: str}
healed: {description: The largest number of entries that waited., returned: success, type: int}
seconds: {description: How long healing took., returned: success, type: float}
"""

import contextlib
import os
import signal
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.gluster import (
    Cli,
    GlusterError,
    GlusterSlow,
    Refused,
    coordinator,
    identify,
    resolve,
    wait_until,
)
from ansible_collections.tribrick.media.plugins.module_utils.health import find_brick, find_process
from ansible_collections.tribrick.media.plugins.module_utils.recovery import (
    full_crawls,
    heal_obstacles,
    left_to_heal,
    stuck,
    waiting_names,
)

READY = 60  # seconds for a self-heal daemon that has just been started to be known to glusterd
AGAIN = 5  # seconds without progress before a heal is asked for once more
LOOKUPS = 500  # names looked up at a time


class Work:
    """One run of the module."""

    def __init__(self, module: AnsibleModule) -> None:
        self.module = module
        self.name: str = module.params["name"]
        self.node: str = module.params["node"]
        self.path: str = module.params["brick_path"]
        self.cli = Cli(module.run_command, self.node, 120)
        # GlusterFS looks at each entry that waits before it names them.
        self.patient = Cli(module.run_command, self.node, max(120, module.params["timeout"]))
        self.commands: list[str] = []

    def start_force(self) -> None:
        """Start what is not running; it never touches what runs."""
        self.commands.append(f"gluster volume start {self.name} force")
        if not self.module.check_mode:
            self.cli.change("volume", "start", self.name, "force")

    def healer(self) -> int:
        return find_process("glusterfs", f"shd/{self.name}")

    def running(self) -> None:
        try:
            os.getxattr(self.path, "trusted.glusterfs.volume-id")
        except OSError as error:
            raise Refused(
                f"{self.path} on {self.node} carries no mark of a volume ({error.strerror}). If its disk is not "
                "mounted, mount it; if it is new or was wiped, run "
                f"playbooks/recover_brick.yml -e node={self.node} -e confirm=yes"
            ) from error
        state = find_brick(self.path)
        if state in ("T", "t"):
            pid = find_process("glusterfsd", self.path)
            self.commands.append(f"kill -CONT {pid}")
            if not self.module.check_mode:
                os.kill(pid, signal.SIGCONT)
        if not state or not self.healer():
            self.start_force()
        if not self.module.check_mode:
            wait_until(self.unready, str, 60, "the brick and the self-heal daemon to run", self.node)

    def unready(self) -> str:
        state = find_brick(self.path)
        return "the brick does not run" * (not state) or "the self-heal daemon does not run" * (not self.healer())

    def speaks(self) -> bool:
        """Whether this is the node that asks for all."""
        members = identify(self.cli.pool(), self.module.params["nodes"], self.node, resolve)
        return coordinator(self.module.params["nodes"], self.node, members) == self.node

    def asked(self) -> None:
        if not self.speaks():
            return
        words = ("volume", "heal", self.name)
        self.commands.append(f"gluster {' '.join(words)}")
        if not self.module.check_mode:
            self.ask(*words)

    def ask(self, *words: str) -> None:
        """Ask for a heal. glusterd refuses until the self-heal daemon, perhaps just started, is connected to it."""
        deadline = time.monotonic() + READY
        while True:
            try:
                self.text(*words)
                return
            except GlusterError:
                if time.monotonic() > deadline:
                    raise
            time.sleep(1)  # poll

    def clean(self) -> tuple[int, float]:
        if not self.speaks():
            return 0, 0.0
        began, full = time.monotonic(), self.module.params["full"]
        history: list[tuple[float, int]] = []
        launched = renewed = False
        asked = began
        while True:
            try:
                bricks = self.cli.heal(self.name)
            except GlusterSlow:
                # It looks at each entry that waits: thousands of them take minutes, and healing goes on meanwhile.
                if time.monotonic() - began > self.module.params["timeout"]:
                    raise
                continue
            left, now = left_to_heal(bricks), time.monotonic()
            history.append((now, left))
            if obstacles := heal_obstacles(bricks):
                # A brick that has just been started is not connected at once.
                if now - began > 30 or any("contradict" in words for words in obstacles):
                    raise Refused("; ".join(obstacles))
            elif left == 0 and (launched or not full):
                return max(count for _, count in history), now - began
            if not launched and not obstacles:
                launched, asked = True, now
                words = ["volume", "heal", self.name, *(["full"] if full else [])]
                self.commands.append(f"gluster {' '.join(words)}")
                if self.module.check_mode:
                    return left, 0.0
                if full:
                    self.crawl(words)
                else:
                    self.ask(*words)
            elif left and not obstacles and now - asked >= AGAIN and stuck(history, now, AGAIN):
                # What came up during a crawl waits for the next one, which is up to heal-timeout away. A daemon that is
                # busy may refuse; then that one comes all the same.
                asked = now
                with contextlib.suppress(GlusterError):
                    self.look_up()
                    self.text("volume", "heal", self.name)
            if now - began > self.module.params["timeout"]:
                raise Refused(
                    f"{left} entries are still to be healed after {now - began:.0f} s; run again to wait longer"
                )
            if not renewed and launched and stuck(history, now, self.module.params["patience"]):
                renewed = True
                if pid := self.healer():
                    self.commands.append(f"kill {pid}")
                    os.kill(pid, signal.SIGTERM)
                    wait_until(
                        lambda: self.healer() == pid,
                        lambda old: "it still runs" * old,
                        30,
                        "the self-heal daemon's end",
                    )
                self.start_force()
            time.sleep(1)  # poll

    def look_up(self) -> None:
        """Look up what waits by its name: the heal goes by ids, and cannot make a name that a brick has lost."""
        root = self.module.params["root"]
        if root and os.path.ismount(root):
            answer = self.patient.xml("volume", "heal", self.name, "info")
            names = [name for name in waiting_names(answer) if name != "/"][:LOOKUPS]
            if names:
                paths = [os.path.join(root, name.lstrip("/")) for name in names]
                # In a child with a deadline, since a call on a hung mount does not end. Some may be gone meanwhile.
                self.module.run_command(["timeout", "-k", "2", "60", "stat", "--format=", "--", *paths])

    def crawls(self) -> tuple[frozenset[tuple[str, str]], bool]:
        return full_crawls(self.text("volume", "heal", self.name, "statistics"))

    def text(self, *words: str) -> str:
        """Run one of the few commands that answer in words only; the exit code tells."""
        command = ["timeout", "-k", "5", "120", "gluster", "--mode=script", *words]
        code, out, err = self.module.run_command(command, environ_update={"LC_ALL": "C", "LANG": "C"})
        if code != 0:
            raise GlusterError(" ".join((err or out).split())[:200], command[4:], self.node)
        return str(out)

    def crawl(self, words: list[str]) -> None:
        """Have everything compared, and wait until it is: what a crawl finds is known only then."""

        def going() -> str:
            return "a crawl is in progress" * self.crawls()[1]

        def unfinished() -> str:
            ended, running = self.crawls()
            return "a crawl is in progress" if running else "the crawl has not begun" * (not ended - before)

        patience = self.module.params["timeout"]
        # An older crawl may be past what was lost meanwhile; its end would be taken for that of ours.
        wait_until(going, str, patience, "an older crawl to end", self.node)
        before = self.crawls()[0]
        self.ask(*words)
        wait_until(unfinished, str, patience, "the crawl to end", self.node)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "name": {"type": "str", "required": True},
            "node": {"type": "str", "required": True},
            "nodes": {"type": "list", "elements": "str", "required": True},
            "brick_path": {"type": "path", "required": True},
            "state": {"type": "str", "choices": ["running", "asked", "clean"], "required": True},
            "full": {"type": "bool", "default": False},
            "timeout": {"type": "int", "default": 3600},
            "patience": {"type": "int", "default": 120},
            "root": {"type": "path"},
        },
        supports_check_mode=True,
    )
    work = Work(module)
    healed, seconds = 0, 0.0
    try:
        if module.params["state"] == "running":
            work.running()
        elif module.params["state"] == "asked":
            work.asked()
        else:
            healed, seconds = work.clean()
    except (GlusterError, Refused) as error:
        module.fail_json(msg=str(error), changed=bool(work.commands), commands=work.commands)
    module.exit_json(changed=bool(work.commands), commands=work.commands, healed=healed, seconds=round(seconds, 1))


if __name__ == "__main__":
    main()
