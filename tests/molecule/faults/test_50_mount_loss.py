"""The mount of one node fails: it answers 503, nothing is written below the mount point, it is back within 30 s."""

from __future__ import annotations

import pytest

from helpers import NODES, wait_until
from judged import CLEAN, acknowledged, faults, goes_on, nodes, verdict

BACK = 30.0


@pytest.mark.parametrize("node", nodes("mount-kill"))
def test_killed(run, rig, node):
    with run.nemesis.under("mount-kill", [node], clean=CLEAN):
        start = run.history.now()
        wait_until(f"{node} to be ready", lambda: rig.ready(node), BACK)
        wait_until(f"uploads through {node}", lambda: acknowledged(run, start, "upload", (node,)), BACK)


@pytest.mark.parametrize(("fault", "node"), faults("mount-hang"))
def test_hung(run, rig, fault, node):
    """The recovery is the playbook's: it frees the mount while its process still hangs.

    Meanwhile the node refuses uploads and serves files: from its cache, or from a standby.
    """
    others = tuple(other for other in NODES if other != node)
    cached, other = rig.upload(node), rig.upload(node)
    assert rig.fetch(node, cached).status_code == 200
    with run.nemesis.under(fault, [node], ["recover_mount", "-e", f"node={node}"], clean=CLEAN):
        answer = rig.try_upload(node, b"hung", "hung.bin", timeout=30)
        assert answer.status_code == 503 and answer.headers["Retry-After"].isdigit(), answer.text[:300]
        hit = rig.fetch(node, cached, timeout=2)
        assert (hit.status_code, hit.headers["X-Cache"]) == (200, "HIT")
        wait_until("the ledger to know the file", lambda: rig.fetch(node, other).status_code == 200, 15)
        assert rig.fetch(node, other, timeout=2).status_code == 200
        goes_on(run, others, deadline=30)
    wait_until(f"{node} to be ready", lambda: rig.ready(node), BACK)


@pytest.mark.parametrize("node", nodes("mount missing"))
def test_missing_at_boot(run, rig, node):
    """Nobody else up to mount from: the site says 503, and not even root writes below the mount point."""
    below = f"mount --bind / /mnt && find /mnt{rig.mount} -mindepth 1 | head -3; umount /mnt"
    with run.nemesis.under("kill", [other for other in NODES if other != node]):
        rig.docker("restart", "--time=0", rig.container(node))
        wait_until(f"the site of {node}", lambda: rig.request("GET", node, "/readyz", timeout=10).json(), 60)
        assert rig.request("GET", node, "/readyz", timeout=10).status_code == 503
        assert rig.root(node, f"findmnt -n -t fuse.glusterfs {rig.mount} || echo none").strip() == "none"
        assert rig.try_upload(node, b"nowhere", "nowhere.bin", timeout=60).status_code == 503
        assert "wrote" not in rig.root(node, f"touch {rig.mount}/x && echo wrote || :")
    assert rig.root(node, below).strip() == "", "something lies below the mount point"


def test_verdict(run):
    verdict(run)
