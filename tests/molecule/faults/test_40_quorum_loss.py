"""No majority: nobody acknowledges. All nodes without power: what was acknowledged is there, deleted files are not."""

from __future__ import annotations

import itertools

import pytest

from helpers import LONG, NODES, chance, wait_until
from judged import CLEAN, acknowledged, hold, older, still_served, verdict
from kit import faults

ORDERS = list(itertools.permutations(NODES))
HOLD = hold(8.0)


@pytest.mark.parametrize("left", NODES if LONG else (chance("left").choice(NODES),))
def test_two_nodes_down(run, rig, left):
    row = older(rig)
    with run.nemesis.under("two-killed", [node for node in NODES if node != left], clean=CLEAN):
        wait_until(f"{left} to refuse", lambda: rig.request("GET", left, "/readyz", timeout=10).status_code == 503, 60)
        late = run.history.now()
        answer = rig.try_upload(left, b"alone", "alone.bin", timeout=60)
        assert answer.status_code == 503 and "Retry-After" in answer.headers, answer.text
        assert still_served(rig, left, row) == "standby"
        run.nemesis.hold(HOLD)
        assert acknowledged(run, late, "upload", (left,)) == 0


@pytest.mark.parametrize("order", ORDERS if LONG else [chance("order").choice(ORDERS)], ids="-".join)
def test_power_cut_of_all_nodes(run, rig, order):
    """Started one after the other: the first alone must wait."""
    before = run.history.now()
    wait_until("load", lambda: acknowledged(run, before, "upload", NODES) >= 10, 120)
    with run.nemesis.under("all-power-cut", list(order), clean=CLEAN):
        first = order[0]
        faults.power_on(rig.lab, [first])
        wait_until(f"{first} to boot", lambda: faults.running(rig.lab, [first]) is None, 60)
        wait_until(f"{first} alone to say 503", lambda: rig.request("GET", first, "/readyz", timeout=10).json(), 60)
        answer = rig.request("GET", first, "/readyz", timeout=10)
        assert answer.status_code == 503, "a node alone must not be ready"
    back = run.history.now()
    wait_until("uploads", lambda: acknowledged(run, back, "upload", NODES) >= 2, 60)


@pytest.mark.parametrize("order", ORDERS if LONG else [chance("cycle").choice(ORDERS)], ids="-".join)
def test_cyclic_failure(run, order):
    """Each node misses something of its own; no wait for heal between, so that nobody has seen everything."""
    for node in order:
        fault = faults.make(run.lab, "kill", [node])
        run.history.mark("inject cycle", node)
        with fault.holding():
            run.history.mark(f"holds {node} exited", node)
            run.nemesis.hold(HOLD / 2)
            run.history.mark("lift", node)
        run.history.mark("ended", node)
    run.nemesis.recover(",".join(order))


def test_verdict(run):
    verdict(run)
