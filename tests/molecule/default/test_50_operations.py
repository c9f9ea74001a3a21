"""Daily life: glusterd restarted, mount lost, settings changed under load."""

from __future__ import annotations

import pytest

from helpers import LONG, NODES, Load, picture, sha256, wait_until

SOME = NODES if LONG else ("node3",)


def brick_pid(rig, node):
    return rig.root(node, "pgrep -x glusterfsd").split()


@pytest.mark.parametrize("node", NODES if LONG else ("node1",))
def test_bricks_survive_a_restart_of_glusterd(rig, node):
    before, old = brick_pid(rig, node), rig.root(node, "pgrep -x glusterd")
    rig.root(node, "systemctl restart glusterd", timeout=60)
    assert rig.root(node, "pgrep -x glusterd") != old
    assert brick_pid(rig, node) == before
    wait_until("all bricks online", lambda: sorted(rig.bricks_online(node)) == sorted(NODES), 30)
    assert brick_pid(rig, node) == before


@pytest.mark.parametrize("node", SOME)
def test_nothing_is_written_beside_the_mount(rig, node):
    earlier = rig.upload(node)
    rig.root(node, "systemctl stop tribrick-media-keeper.timer tribrick-media-keeper.service")
    try:
        rig.root(node, "umount -l /srv/media")
        assert rig.run_root(node, "mountpoint -q /srv/media").returncode != 0  # the fault happened
        write = rig.run_root(node, "touch /srv/media/x || mkdir /srv/media/y")
        assert write.returncode != 0, "root can write under the mount point"
        wait_until("readyz to notice", lambda: rig.request("GET", node, "/readyz").status_code == 503, 10)
        answer = rig.request("GET", node, "/readyz")
        assert answer.headers["Retry-After"]
        assert answer.json()["checks"]["mount"]["ok"] is False
        refused = rig.try_upload(node, picture())
        assert refused.status_code == 503, refused.text[:300]
        assert int(refused.headers["Retry-After"]) > 0
        # A copy of this node's own disks, compared with the ledger. What no copy has, nobody can call missing.
        wait_until("the standby to serve", lambda: rig.fetch(node, earlier).status_code == 200, 10)
        assert sha256(rig.fetch(node, earlier).content) == earlier["sha256"]
        assert rig.fetch(node, earlier).headers["X-Tribrick-Source"] in ("standby", "peer")
        gone = rig.request("GET", node, "/media/photos/never-stored.png")
        assert gone.status_code == 503
        assert gone.headers["Retry-After"]
        assert rig.root(node, "ls -A /srv/media 2>/dev/null | wc -l").strip() == "0"
        other = next(n for n in NODES if n != node)
        assert rig.upload(other)["node"] == other
    finally:
        rig.root(node, "systemctl start tribrick-media-keeper.timer")
    rig.wait_ready(30, [node])
    # For some seconds nginx does not ask an origin that had failed.
    wait_until("the origin to be asked again",
               lambda: rig.fetch(node, rig.upload(node)).headers.get("X-Tribrick-Source") == "origin", 20)
    rig.check_known([node])


def site_starts(rig):
    ask = "systemctl show --property=ExecMainStartTimestampMonotonic --value tribrick-site.service"
    return rig.everywhere(lambda node: rig.root(node, ask))


def test_redeploy_under_load_fails_no_request(rig):
    """Change a setting by -e, and later take it back: every node's site restarts, no request notices."""
    foreign = "table ip operators_own { chain keep { type filter hook input priority 0; policy accept; }; }"
    for node in NODES:
        rig.root(node, "nft -f -", text_in=foreign)
    before = site_starts(rig)
    load = Load(rig)
    with load.running():
        wait_until("the load to run", lambda: load.reads > 50 and load.writes > 5, 60)
        rig.rollout("-e", "tribrick_max_upload_mib=99").good()
    assert not load.problems, f"{len(load.problems)} of {load.reads + load.writes}: {load.problems[:10]}"
    after = site_starts(rig)
    assert all(after[node] != before[node] for node in NODES), (before, after)  # the redeploy happened
    assert load.reads > 500, load
    assert load.writes > 50, load
    assert rig.try_upload("node1", bytes(99 * 2**20 + 1)).status_code == 413
    rig.check_known()

    rig.rollout().good()  # back to the inventory's setting
    assert rig.upload("node1", bytes(99 * 2**20 + 1), timeout=120)
    for node in NODES:
        assert "operators_own" in rig.root(node, "nft list tables"), "a foreign table is gone"
        rig.root(node, "nft delete table ip operators_own")
