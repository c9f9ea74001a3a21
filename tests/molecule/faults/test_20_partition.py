"""Nodes that do not hear each other: the majority goes on, the minority refuses uploads and serves, no split brain."""

from __future__ import annotations

import pytest

from helpers import NODES, wait_until
from judged import CLEAN, acknowledged, goes_on, hold, joined, nodes, older, still_served, verdict

HOLD = hold(8.0)
STALL = 60.0
TURNS = 4
FAULTS = ("partition", "one-way", "flapping", "alone", "bridge")
HIT = nodes("partition")


def refused(rig, node):
    """Upload through a node without a majority; return what is wrong with the refusal, None if nothing is."""
    answer = rig.try_upload(node, b"minority", "minority.bin", timeout=60)
    good = answer.status_code == 503 and "Retry-After" in answer.headers
    return None if good else f"{node}: {answer.status_code} {answer.text[:300]}"


@pytest.mark.parametrize("fault", FAULTS[:2])
@pytest.mark.parametrize("node", HIT)
def test_the_majority_goes_on_and_the_minority_refuses(run, rig, fault, node):
    others = tuple(other for other in NODES if other != node)
    early, late = older(rig), older(rig)
    with run.nemesis.under(fault, [node], clean=CLEAN):
        holds = run.history.now()
        still_served(rig, node, early)
        goes_on(run, others, deadline=STALL)
        assert refused(rig, node) is None
        assert still_served(rig, node, late) != "origin", f"{node} has no majority, and its volume answered"
        run.nemesis.hold(HOLD)
        assert acknowledged(run, holds, "upload", (node,)) == 0, f"{node} has no majority and acknowledged an upload"
    goes_on(run)
    joined(run)


@pytest.mark.parametrize("node", HIT)
def test_flapping(run, node):
    with run.nemesis.under("flapping", [node], clean=CLEAN) as fault:
        wait_until(f"the link to come and go {TURNS} times", lambda: fault.turns >= TURNS, 60)
    goes_on(run)
    joined(run)


def test_everyone_alone(run, rig):
    """From the first moment on, long before anybody has given a connection up."""
    early, late = older(rig), older(rig)
    with run.nemesis.under("alone", list(NODES), clean=CLEAN):
        holds = run.history.now()
        rig.everywhere(lambda node: still_served(rig, node, early))
        assert set(rig.everywhere(lambda node: refused(rig, node)).values()) == {None}
        run.nemesis.hold(hold(45.0))
        assert set(rig.everywhere(lambda node: still_served(rig, node, late)).values()) == {"standby"}
        assert acknowledged(run, holds, "upload", NODES) == 0, "a node without any other acknowledged an upload"
    goes_on(run)
    joined(run)


@pytest.mark.parametrize("node", HIT)
def test_bridge(run, node):
    with run.nemesis.under("bridge", [node], clean=CLEAN):
        goes_on(run, deadline=90)
        run.nemesis.hold(HOLD)


def test_verdict_and_no_split_brain(run, rig):
    assert set(run.nemesis.done) == set(FAULTS)
    verdict(run)
    tree = rig.gluster("node1", f"volume heal {rig.volume} info split-brain")
    assert [n.text for n in tree.iter("numberOfEntries")] == ["0"] * 3
