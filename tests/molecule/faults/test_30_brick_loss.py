"""A brick's process or disk fails: uploads go on while two copies can be written, and are refused when they cannot."""

from __future__ import annotations

import pytest

from helpers import NODES, chance, wait_until
from judged import CLEAN, acknowledged, faults, hold, verdict

HOLD = hold(5.0)
# What an operator runs; the other faults end by themselves or with the disk.
RECOVERY = {"brick-kill": ["recover_heal"], "brick-freeze": ["recover_heal"]}
ONE = ("brick-kill", "brick-freeze", "disk-full", "inodes-full", "read-only", "disk-wiped")


@pytest.mark.parametrize(("fault", "node"), faults(*ONE))
def test_two_bricks_are_enough(run, fault, node):
    with run.nemesis.under(fault, [node], RECOVERY.get(fault, ()), clean=CLEAN):
        holds = run.history.now()
        for what in ("upload", "read"):
            wait_until(
                f"{what}s with {node}'s brick lost",
                lambda what=what: all(acknowledged(run, holds, what, (host,)) >= 2 for host in NODES), 90,
            )  # fmt: skip
        run.nemesis.hold(HOLD)


def test_two_full_disks(run, rig):
    """Refused with a word that means it; reads go on."""
    pair = chance("two full disks").sample(NODES, 2)
    with run.nemesis.under("disks-full", pair):
        answer = rig.try_upload(pair[0], b"x" * 200_000, "full.bin", timeout=60)
        assert answer.status_code in (503, 507), f"{answer.status_code} {answer.text[:300]}"
        late = run.history.now()
        wait_until("reads", lambda: all(acknowledged(run, late, "read", (host,)) >= 2 for host in NODES), 60)


def test_verdict(run):
    verdict(run)
