"""Without the database files are read as ever, uploads are refused with 503, and nothing needs a restart afterwards."""

from __future__ import annotations

import pytest

from helpers import NODES, wait_until
from judged import acknowledged, verdict

DEADLINE = 20.0


@pytest.mark.parametrize("fault", ["database-stop", "database-cut"])
def test_away(run, rig, fault):
    row = rig.upload("node1")
    started = {node: rig.root(node, "systemctl show -P MainPID tribrick-site.service").strip() for node in NODES}
    with run.nemesis.under(fault, []):
        for node in NODES:
            answer = rig.try_upload(node, b"nobody keeps this", "away.bin", timeout=DEADLINE)
            assert answer.status_code == 503 and "Retry-After" in answer.headers, f"{answer.status_code} {answer.text}"
            assert rig.fetch(node, row, timeout=5).status_code == 200
        late = run.history.now()
        wait_until("reads", lambda: all(acknowledged(run, late, "read", (node,)) >= 5 for node in NODES), 30)
        assert acknowledged(run, late, "upload", NODES) == 0
    late = run.history.now()
    wait_until("uploads", lambda: all(acknowledged(run, late, "upload", (node,)) >= 2 for node in NODES), 60)
    now = {node: rig.root(node, "systemctl show -P MainPID tribrick-site.service").strip() for node in NODES}
    assert now == started, "the site was restarted"


def test_restarted(run):
    with run.nemesis.under("database-restart", []):
        late = run.history.now()
        wait_until("uploads", lambda: all(acknowledged(run, late, "upload", (node,)) >= 2 for node in NODES), 60)


def test_verdict(run):
    verdict(run)
