"""A rollout while a node is dead."""

from __future__ import annotations

import json

import pytest

from helpers import LONG, NODES

DEAD = NODES[::-1] if LONG else ("node2",)


@pytest.mark.parametrize("dead", DEAD)
def test_rollout_without_a_dead_node(rig, dead):
    alive = [node for node in NODES if node != dead]
    host = alive[0]
    volume = rig.volume_state(host)
    rig.docker("kill", rig.container(dead))
    try:
        assert not rig.running(dead)
        refused = rig.rollout().refused(rf"{dead} does not answer over SSH", rf"-e absent={dead}")
        assert sum(refused.changed().values()) == 0

        done = rig.rollout("-e", f"absent={dead}").good()
        assert sum(done.changed().values()) == 0, done.changed()  # the others were up to date
        assert dead not in done.changed()
        assert f"{dead} was left out and may be out of date" in done.text
        assert rig.volume_state(host) == volume

        # A wish that changes the pool waits for the node, or is refused; it is never half done.
        wish = json.dumps({"absent": dead, "tribrick_brick_path": "/srv/gluster/media/other"})
        rig.rollout("-e", wish).refused("exists with other bricks")
        two = ",".join([dead, alive[1]])
        rig.rollout("-e", f"absent={two}").refused(r"no majority", r"Bring one of them back first")
        rig.rollout("-e", "absent=db1").refused(r"absent names db1, where the site's database runs")
        rig.rollout("-e", "absent=nodeX").refused(r"absent names nodeX, which is no host of the inventory")
        assert rig.volume_state(host) == volume
        row = rig.upload(host)
        for node in alive:
            assert rig.fetch(node, row, timeout=60).status_code == 200
    finally:
        if not rig.running(dead):
            rig.docker("start", rig.container(dead))
    rig.settle(90)
    assert set(rig.rollout().good().changed()) >= {*NODES, "db1"}
