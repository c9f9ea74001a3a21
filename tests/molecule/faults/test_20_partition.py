"""Nodes that do not hear each other: the majority goes on, the minority refuses, nobody splits the brain."""

from __future__ import annotations

import pytest

from helpers import NODES, wait_until
from judged import acknowledged, faults, nodes, verdict

HOLD = 8.0
STALL = 60.0


@pytest.mark.parametrize(("fault", "node"), faults("partition", "one-way"))
def test_the_majority_goes_on_and_the_minority_refuses(run, rig, fault, node):
    others = tuple(other for other in NODES if other != node)
    with run.nemesis.under(fault, [node]):
        holds = run.history.now()
        wait_until(
            f"uploads through {' and '.join(others)}",
            lambda: all(acknowledged(run, holds, "upload", (other,)) >= 2 for other in others), STALL,
        )  # fmt: skip
        answer = rig.try_upload(node, b"minority", "minority.bin", timeout=60)
        assert answer.status_code == 503 and "Retry-After" in answer.headers, answer.text
        late = run.history.now()
        run.nemesis.hold(HOLD)
        assert acknowledged(run, late, "upload", (node,)) == 0, f"{node} has no majority and acknowledged an upload"


def test_everyone_alone(run):
    with run.nemesis.under("alone", list(NODES)):
        run.nemesis.hold(45.0)  # until the last connection was given up
        late = run.history.now()
        run.nemesis.hold(HOLD)
        assert acknowledged(run, late, "upload", NODES) == 0, "a node without any other acknowledged an upload"


@pytest.mark.parametrize("node", nodes("bridge"))
def test_bridge(run, node):
    with run.nemesis.under("bridge", [node]):
        holds = run.history.now()
        wait_until(
            "uploads through all nodes", lambda: all(acknowledged(run, holds, "upload", (o,)) >= 1 for o in NODES), 90
        )
        run.nemesis.hold(HOLD)


@pytest.mark.parametrize("node", nodes("flapping"))
def test_flapping(run, node):
    with run.nemesis.under("flapping", [node]) as fault:
        run.nemesis.hold(32.0)
        assert fault.turns >= 4


def test_no_split_brain_and_verdict(run, rig):
    tree = rig.gluster("node1", f"volume heal {rig.volume} info split-brain")
    assert [n.text for n in tree.iter("numberOfEntries")] == ["0"] * 3
    verdict(run)
