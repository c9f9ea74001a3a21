"""The edge: cached files while the mount hangs, copies for the others, deletes that reach every cache."""

from __future__ import annotations

import contextlib
import json
import time

import pytest

from helpers import LONG, NODES, picture, wait_until

SOME = NODES if LONG else ("node2",)
PURGED = 5.0


@contextlib.contextmanager
def hung(rig, node):
    """The FUSE process of the mount is stopped: every call on it hangs."""
    number = rig.root(node, f"pgrep --exact --list-full glusterfs | grep -- ' {rig.mount}$' | cut -d' ' -f1").strip()
    assert number.isdigit(), f"{node} has no process of the mount: {number!r}"
    rig.root(node, f"kill -STOP {number}")
    try:
        assert rig.run_root(node, f"timeout -s KILL 1 stat -f {rig.mount}; test $? = 137", timeout=10).returncode == 0
        yield
    finally:
        rig.root(node, f"kill -CONT {number}")


def up_to_date(rig, node):
    """The node's ledger lacks nothing, and the purger has applied it."""
    ledger = json.loads(rig.root(node, "tribrick ledger verify --json"))
    assert ledger["behind"] == 0, ledger
    return status(rig, node)["applied"] >= ledger["number"]


def status(rig, node):
    return json.loads(rig.root(node, "tribrick-edge status"))


@pytest.mark.parametrize("node", NODES)
def test_second_read_comes_from_the_cache(rig, node):
    row = rig.upload("node1", picture(2_500_000))
    first, second = rig.fetch(node, row), rig.fetch(node, row)
    assert (first.headers["X-Cache"], second.headers["X-Cache"]) == ("MISS", "HIT")
    assert first.content == second.content
    assert first.headers["ETag"] == second.headers["ETag"]
    assert first.headers["X-Tribrick-Source"] == "origin"


def test_etag_and_time_are_those_of_every_node(rig):
    row = rig.upload("node1")
    seen = {(a.headers["ETag"], a.headers["Last-Modified"]) for a in (rig.fetch(node, row) for node in NODES)}
    assert len(seen) == 1, seen


@pytest.mark.parametrize("node", SOME)
def test_a_hung_mount_stops_no_visitor(rig, node):
    cached, others = rig.upload(node), [rig.upload(node) for _ in range(6)]
    assert rig.fetch(node, cached).status_code == 200
    wait_until("the ledger to follow", lambda: up_to_date(rig, node), 20)
    with hung(rig, node):
        start = time.monotonic()
        assert rig.fetch(node, cached, timeout=5).headers["X-Cache"] == "HIT"
        assert rig.request("GET", node, "/healthz", timeout=5).status_code == 200
        assert time.monotonic() - start < 1.5
        for row in others:
            start = time.monotonic()
            answer = rig.fetch(node, row, timeout=15)
            assert (answer.status_code, answer.headers["X-Tribrick-Source"]) == (200, "standby")
            assert time.monotonic() - start < 4.0
        assert rig.fetch(node, cached, timeout=5).headers["X-Cache"] == "HIT"
    rig.wait_ready(30, [node])
    wait_until("the origin to be asked again",
               lambda: rig.fetch(node, rig.upload(node)).headers.get("X-Tribrick-Source") == "origin", 20)


def test_a_delete_reaches_every_cache(rig):
    row = rig.upload("node1", picture(2_500_000))
    for node in NODES:
        assert [rig.fetch(node, row).status_code for _ in range(2)] == [200, 200]
    assert rig.request("DELETE", "node2", f"/api/media/{row['name']}", headers=rig.auth).status_code == 204
    del rig.known[row["name"]]
    end = time.monotonic() + PURGED
    for node in NODES:
        wait_until(f"404 on {node}", lambda node=node: rig.fetch(node, row).status_code == 404, end - time.monotonic())
    for node in NODES:
        assert rig.fetch(node, row).status_code == 404


@pytest.mark.parametrize("node", SOME)
def test_what_was_deleted_while_a_node_was_away_is_not_served_when_it_is_back(rig, node):
    row, other = rig.upload("node1"), next(one for one in NODES if one != node)
    assert [rig.fetch(node, row).status_code for _ in range(2)] == [200, 200]
    rig.docker("kill", rig.container(node))
    try:
        gone = wait_until("the delete to be taken", lambda: rig.request(
            "DELETE", other, f"/api/media/{row['name']}", headers=rig.auth, timeout=90).status_code == 204, 120)
        assert gone
        del rig.known[row["name"]]
    finally:
        rig.docker("start", rig.container(node))

    seen = set()

    def found():
        answer = rig.fetch(node, row, timeout=20)
        seen.add((answer.status_code, answer.headers.get("X-Tribrick-Source"), answer.headers.get("X-Cache")))
        return answer.status_code == 404

    wait_until(f"{node} to say that it is not there", found, 90)
    assert 200 not in {status for status, *_ in seen}, seen
    rig.settle(90)
    assert rig.fetch(node, row).status_code == 404
    assert status(rig, node)["current"]
