"""A brick's process or disk fails: uploads go on while two copies can be written; a full disk refuses them in time."""

from __future__ import annotations

import pytest

from helpers import LONG, NODES, chance, wait_until
from judged import CLEAN, faults, goes_on, hold, joined, verdict

HOLD = hold(5.0)
# The brick of a read-only disk ends by itself; the next fault gives it a new disk.
ONE = ("brick-kill", "brick-freeze", "disk-full", "inodes-full", "read-only", "disk-wiped")


def recovery(fault, node):
    """Return what an operator runs; the other faults end by themselves or with the disk."""
    if fault == "disk-wiped":
        return ["recover_brick", "-e", f"node={node}", "-e", "confirm=yes"]
    return ["recover_heal"] if fault == "brick-freeze" or (fault == "brick-kill" and LONG) else []


def upload(rig, node: str) -> int:
    return rig.try_upload(node, b"x" * 1000, "full.bin", timeout=60).status_code


@pytest.mark.parametrize(("fault", "node"), faults(*ONE))
def test_two_bricks_are_enough(run, rig, fault, node):
    with run.nemesis.under(fault, [node], recovery(fault, node), clean=CLEAN):
        goes_on(run, whats=("read",) if fault == "disk-full" else ("upload", "read"), deadline=90)
        if fault == "disk-full":
            # What is free on the volume is what its fullest brick has: refused before a second disk is full as well.
            full = "uploads to be refused on every node"
            wait_until(full, lambda: [upload(rig, one) for one in NODES] == [507] * len(NODES), 30)
        run.nemesis.hold(HOLD)
    if fault != "read-only":
        joined(run)


def test_two_full_disks(run, rig):
    """Refused with a word that means it; reads go on."""
    pair = chance("two full disks").sample(NODES, 2)
    with run.nemesis.under("disks-full", pair, clean=CLEAN) as fault:
        for _ in range(10):
            answer = rig.try_upload(pair[0], b"x" * 200_000, "full.bin", timeout=60)
            if answer.status_code != 201:
                break
            fault.proof()  # a client's delete had made room on both; it is used up now
        assert answer.status_code in (503, 507), f"{answer.status_code} {answer.text[:300]}"
        goes_on(run, whats=("read",))


def test_verdict(run):
    assert set(run.nemesis.done) == {*ONE, "disks-full"}
    verdict(run)
