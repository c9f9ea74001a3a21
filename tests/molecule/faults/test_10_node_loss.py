"""One node of three is lost, in every way there is: the two others go on, nothing is lost, all heals by itself."""

from __future__ import annotations

import pytest

from helpers import NODES
from judged import CLEAN, faults, goes_on, hold, joined, verdict

HOLD = hold(8.0)
FAULTS = ("kill", "power-cut", "pause", "silence")
# A silent or hung node stops the others until Gluster's ping-timeout (20 s), at worst twice.
STALL = {"kill": 20.0, "power-cut": 60.0, "pause": 60.0, "silence": 60.0}


@pytest.mark.parametrize(("fault", "node"), faults(*FAULTS))
def test_the_others_go_on(run, fault, node):
    others = tuple(other for other in NODES if other != node)
    with run.nemesis.under(fault, [node], clean=CLEAN):
        goes_on(run, others, ("upload", "read"), STALL[fault])
        run.nemesis.hold(HOLD)
    goes_on(run)
    joined(run)


def test_verdict(run):
    assert set(run.nemesis.done) == set(FAULTS)
    verdict(run)
