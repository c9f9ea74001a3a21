"""What an operator does on a working day: nobody notices, or one node is away for a moment."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import pytest

from faults.history import content
from helpers import LONG, NODES, chance, sha256
from judged import CLEAN, faults, goes_on, hold, verdict

HOLD = hold(5.0)
LARGE = 32 * 1024 * 1024


@pytest.mark.parametrize(("fault", "node"), faults("glusterd-kill"))
def test_no_glusterd(run, fault, node):
    """Bricks and mounts go on without it."""
    with run.nemesis.under(fault, [node], clean=CLEAN):
        goes_on(run)
        run.nemesis.hold(HOLD)


@pytest.mark.parametrize(("fault", "node"), faults("glusterd-restart"))
def test_restart_of_glusterd_during_a_large_upload(run, rig, fault, node):
    wanted = content(run.seed, "large", LARGE)
    with ThreadPoolExecutor(1) as pool:
        upload = pool.submit(rig.upload, node, wanted, "large.bin", timeout=120)
        with run.nemesis.under(fault, [node], clean=CLEAN):
            row = upload.result()
    for host in NODES:
        assert sha256(rig.fetch(host, row, timeout=60).content) == sha256(wanted)


def test_rolling_reboot(run, rig):
    """One node after the other is shut down in order and started, the next one once the volume is whole."""
    for node in NODES if LONG else chance("reboot").sample(NODES, 2):
        run.history.mark("inject reboot", node)
        rig.docker("stop", "--time=100", rig.container(node))
        run.history.mark(f"holds {node} is down", node)
        others = tuple(other for other in NODES if other != node)
        goes_on(run, others)
        run.history.mark("lift", node)
        rig.docker("start", rig.container(node))
        run.nemesis.recover(node)


def test_verdict(run):
    assert set(run.nemesis.done) == {"glusterd-kill", "glusterd-restart"}
    verdict(run)
