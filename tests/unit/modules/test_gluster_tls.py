"""Who is connected to the bricks, and which processes are older than their certificates."""

from __future__ import annotations

import os
import time

from ansible_collections.tribrick.media.plugins.modules import gluster_tls

from .conftest import read

NODES = {"node1": "192.0.2.11", "node2": "192.0.2.12", "node3": "192.0.2.13"}
ADDRESSES = {name: frozenset([address]) for name, address in NODES.items()}
BRICKS = [f"{name}:/srv/gluster/media/brick" for name in NODES]


def test_clients_of_a_real_pool():
    seen = gluster_tls.parse_clients(read("status_clients"))
    assert set(seen) == set(BRICKS)
    assert all(set(one) == set(NODES.values()) for one in seen.values())
    assert gluster_tls.unconnected(BRICKS, seen, dict.fromkeys(NODES, 2), ADDRESSES) == []


def test_what_is_missing_is_named():
    seen = gluster_tls.parse_clients(read("status_clients"))
    del seen[BRICKS[0]]
    seen[BRICKS[2]]["192.0.2.12"] = 1
    assert gluster_tls.unconnected(BRICKS, seen, dict.fromkeys(NODES, 2), ADDRESSES) == [
        f"{BRICKS[0]} does not answer",
        f"{BRICKS[2]} has 1 of 2 connections of node2",
    ]


def test_a_process_is_older_than_a_file_that_came_after_it(tmp_path):
    file = tmp_path / "pem"
    file.write_text("new")
    assert gluster_tls.newest([str(file), str(tmp_path / "none")]) == file.stat().st_ctime
    assert gluster_tls.newest([]) == 0.0
    mine = gluster_tls.started(os.getpid())
    assert time.time() - 3600 < mine < file.stat().st_ctime


def test_a_keeper_that_a_killed_run_left_stopped_is_started(run, monkeypatch):
    monkeypatch.setattr(gluster_tls, "find_process", lambda program, word: 7)
    monkeypatch.setattr(gluster_tls, "started", lambda pid: 1.0)
    stopped: list[bool] = [True]

    def command(words, **_):
        if "is-active" in words:
            return (3 if stopped[0] else 0), "", ""
        if words[-3:] == ["systemctl", "start", gluster_tls.KEEPER]:
            stopped[0] = False
        return 0, "", ""

    asked = {"state": "used", "node": "app", "nodes": ["node1"], "volume": "media", "brick_path": "/b", "files": [],
             "mount": "/srv/media", "unit": "srv-media.mount"}  # fmt: skip
    assert run(gluster_tls, command, check=True, **asked).result["changed"] and stopped == [True]
    assert run(gluster_tls, command, **asked).result["restarted"] == [gluster_tls.KEEPER] and stopped == [False]
    assert not run(gluster_tls, command, **asked).result["changed"]
