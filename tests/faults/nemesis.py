"""Which faults a scenario is made of; one after the other under load: inject, prove, hold, lift, wait until clean."""

from __future__ import annotations

import contextlib
import random
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from faults import observer
from faults.history import History
from kit import faults
from kit.lab import NODES, Lab, playbook
from kit.run import Console, KitError, wait_for

# fault: how many nodes it hits at once.
SCENARIOS: dict[str, dict[str, int]] = {
    "node_loss": {"kill": 1, "power-cut": 1, "pause": 1, "silence": 1, "unplug": 1},
    "partition": {"partition": 1, "alone": 3, "one-way": 1, "bridge": 1, "flapping": 1},
    "brick_loss": {
        "brick-kill": 1, "brick-freeze": 1, "disk-full": 1, "disks-full": 2, "inodes-full": 1, "read-only": 1,
        "disk-wiped": 1,
    },
    "quorum_loss": {"two-killed": 2, "all-power-cut": 3},
    "mount_loss": {"mount-kill": 1, "mount-hang": 1},
    "maintenance": {"glusterd-kill": 1, "glusterd-restart": 1},
    "outage": {"bricks-killed": 2, "bricks-frozen": 2, "gluster-stop": 3},
    "database_loss": {"database-stop": 0, "database-cut": 0, "database-restart": 0, "database-full": 0},
}  # fmt: skip
ALIASES = {
    "two-killed": "kill",
    "disks-full": "disk-full",
    "all-power-cut": "power-cut",
    "bricks-killed": "brick-kill",
    "bricks-frozen": "brick-freeze",
}
NOTHING = "none"
CLEAN_WAIT = 600.0
PATIENCE = 20.0  # how long a brick may stay away after a fault before recover_heal is run
STUCK = 75.0  # how long no entry is healed, though the daemon looks every 30 s, before it is run


def choices(scenario: str) -> dict[str, int]:
    """Return the faults of a scenario; a single fault is one too."""
    every = {name: count for members in SCENARIOS.values() for name, count in members.items()}
    if scenario == "all":
        return every
    if scenario == NOTHING:
        return {}
    if scenario in SCENARIOS:
        return SCENARIOS[scenario]
    if scenario in every:
        return {scenario: every[scenario]}
    raise KitError(f"There is no scenario '{scenario}'; there are: {', '.join([*SCENARIOS, 'all', NOTHING, *every])}.")


@dataclass
class Nemesis:
    """Makes faults under load and writes marks into the history."""

    lab: Lab
    history: History
    console: Console
    seed: str
    under_way: int = 0  # how many files the load may be writing at a time
    done: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        """Let the seed choose nodes."""
        self.chance = random.Random(f"{self.seed} nemesis")

    def order(self, scenario: str) -> Iterator[tuple[str, list[str]]]:
        """Return faults and their nodes without end: each fault once in a round, in an order of the seed's."""
        members = choices(scenario)
        while members:
            for name in self.chance.sample(list(members), len(members)):
                yield name, self.chance.sample(list(NODES), members[name])

    @contextlib.contextmanager
    def under(
        self, name: str, hosts: list[str], recovery: Sequence[str] = (), clean: bool = True
    ) -> Iterator[faults.Fault]:
        """Let a fault hold for the time of the block, then wait until it is over and, unless told not to, all is clean.

        *recovery* is the playbook that an operator would run instead of lifting the fault, with its arguments.
        """
        fault = faults.make(self.lab, ALIASES.get(name, name), hosts)
        where = ",".join(fault.hosts)
        self.console.say(f"{name} on {where}")
        self.history.mark(f"inject {name}", where)
        try:
            fault.inject()
            proof = fault.proof()
            self.history.mark(f"holds {proof}", where)
            self.console.say(f"  holds: {proof}")
            yield fault
        finally:
            self.history.mark("lift", where)
            if recovery:
                self.playbook(*recovery)
            fault.lift()
            wait_for(self.console, f"the end of {name}", fault.ended, deadline=120)
            self.history.mark("ended", where)
        self.done.append(name)
        if clean:
            self.recover(where)

    def recover(self, where: str = "") -> None:
        """Wait until the lab is clean; for a brick that stays away and a stuck heal, do what an operator would."""
        start = since = time.monotonic()
        healed, before = False, ""

        def probe() -> str | None:
            nonlocal healed, before, since
            seen = observer.clean(self.lab, self.under_way)
            now = time.monotonic()
            if seen != before:
                before, since = seen or "", now
            if seen is not None and not healed:
                away = "brick offline" in seen and now - start > PATIENCE
                if away or ("wait to be healed" in seen and now - since > STUCK):
                    healed = True
                    self.console.say(f"  {seen}")
                    self.playbook("recover_heal")
            return seen

        wait_for(self.console, "the lab to be clean", probe, deadline=CLEAN_WAIT, interval=1.0)
        self.history.mark("clean", where)
        self.console.say(f"  clean after {time.monotonic() - start:.1f} s")

    def playbook(self, name: str, *extra: str) -> None:
        """Run a playbook of the kit, as an operator would."""
        self.history.mark(f"playbook {name}")
        words = ["--inventory", str(self.lab.inventory), "--vault-password-file", str(self.lab.vault_password), *extra]
        playbook(self.console, f"playbooks/{name}.yml", words, CLEAN_WAIT)

    def hold(self, seconds: float) -> None:
        """Let things be for a while."""
        threading.Event().wait(seconds)
