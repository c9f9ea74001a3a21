"""Without the database files are read as ever, uploads are refused with 503, and nothing needs a restart afterwards."""

from __future__ import annotations

import pytest

from helpers import NODES, wait_until
from judged import CLEAN, acknowledged, goes_on, verdict

DEADLINE = 20.0
FAULTS = ("database-stop", "database-cut", "database-restart", "database-full")


def site(rig):
    """Return each node's site process."""
    return {node: rig.root(node, "systemctl show -P MainPID tribrick-site.service").strip() for node in NODES}


def refused(rig, node):
    """Upload through a node; tell whether it was refused in time with the word that means it."""
    answer = rig.try_upload(node, b"nobody keeps this", "away.bin", timeout=DEADLINE)
    if answer.status_code == 201:
        return False
    assert answer.status_code == 503 and "Retry-After" in answer.headers, f"{answer.status_code} {answer.text}"
    return True


@pytest.mark.parametrize("fault", FAULTS[:2])
def test_away(run, rig, fault):
    row, started = rig.upload("node1"), site(rig)
    with run.nemesis.under(fault, [], clean=CLEAN):
        late = run.history.now()
        for node in NODES:
            assert refused(rig, node)
            assert rig.fetch(node, row, timeout=5).status_code == 200
        goes_on(run, whats=("read",))
        assert acknowledged(run, late, "upload", NODES) == 0
    goes_on(run)
    assert site(rig) == started, "the site was restarted"


def test_restarted(run, rig):
    started = site(rig)
    with run.nemesis.under("database-restart", [], clean=CLEAN):
        goes_on(run)
    assert site(rig) == started, "the site was restarted"


def test_full(run, rig):
    """Rows fit into pages that are there for a while; then each upload is refused, until there is space again."""
    row, started = rig.upload("node1"), site(rig)
    with run.nemesis.under("database-full", [], clean=CLEAN) as fault:
        for node in NODES:
            wait_until(f"{node} to refuse an upload", lambda node=node: refused(rig, node), 60)
            assert rig.fetch(node, row, timeout=5).status_code == 200
        goes_on(run, whats=("read",))
        fault.free()
        goes_on(run)
    goes_on(run)
    assert site(rig) == started, "the site was restarted"


def test_verdict(run):
    assert set(run.nemesis.done) == set(FAULTS)
    verdict(run)
