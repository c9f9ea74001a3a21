"""The modules against a gluster that replays captured answers."""

from __future__ import annotations

from typing import Any

import pytest
from ansible_collections.tribrick.media.plugins.module_utils import gluster
from ansible_collections.tribrick.media.plugins.modules import gluster_peer, gluster_volume, gluster_volume_info

from .conftest import Clock, Gluster, Run, read

NODES = ["node1", "node2", "node3"]
BRICKS = [f"{node}:/srv/gluster/media/brick" for node in NODES]
DOWN = (1, read("daemon_down"), "")
PEER = {"nodes": NODES, "node": "node1"}
OPTIONS = [
    {"name": "network.ping-timeout", "value": "20"},
    {"name": "cluster.quorum-type", "value": "auto"},
    {"name": "auth.allow", "value": "198.18.9.11,198.18.9.12,198.18.9.13"},
]
VOLUME = {"name": "media", "nodes": NODES, "node": "node1", "bricks": BRICKS, "options": OPTIONS}
CREATE = f"volume create media replica 3 transport tcp {' '.join(BRICKS)}"
SET = "volume set media network.ping-timeout 20 cluster.quorum-type auto auth.allow 198.18.9.11,198.18.9.12,198.18.9.13"
START = "volume start media"


def drifted(value: str = "42") -> str:
    good = read("volume_started")
    assert "<value>20</value>" in good
    return good.replace("<value>20</value>", f"<value>{value}</value>")


# --- gluster_peer -------------------------------------------------------------------------


def test_peer_nothing_to_do(run: Run) -> None:
    fake = Gluster({"pool list": read("pool_three")})
    ended = run(gluster_peer, fake, **PEER)
    assert not ended.failed and not ended.result["changed"] and not ended.result["acted"]
    assert ended.result["coordinator"] == "node1" and fake.calls == ["pool list"]
    assert ended.result["diff"]["before"] == ended.result["diff"]["after"]


def test_peer_bootstrap_by_the_first_node(run: Run) -> None:
    alone, two, three = read("pool_alone"), read("pool_joining"), read("pool_three")
    joining = two.replace("<state>3</state>", "<state>4</state>")
    fake = Gluster(
        {
            "pool list": [alone, joining, two, three],
            "peer probe node2": read("probe_ok"),
            "peer probe node3": read("probe_node3"),
        }
    )
    ended = run(gluster_peer, fake, **PEER)
    assert not ended.failed, ended
    assert ended.result["changed"] and ended.result["commands"] == [
        "gluster peer probe node2",
        "gluster peer probe node3",
    ]
    # node3 is probed only after node2 was seen as a full member
    assert fake.calls[:5] == ["pool list", "peer probe node2", "pool list", "pool list", "peer probe node3"]
    assert list(ended.result["diff"]["before"]["pool"]) == ["node1"]
    assert list(ended.result["diff"]["after"]["pool"]) == NODES


def test_peer_bootstrap_predicted(run: Run) -> None:
    fake = Gluster({"pool list": read("pool_alone")})
    ended = run(gluster_peer, fake, check=True, **PEER)
    assert ended.result["changed"] and len(ended.result["commands"]) == 2 and not fake.changes
    assert list(ended.result["diff"]["after"]["pool"]) == NODES
    ended = run(gluster_peer, fake, check=True, **{**PEER, "node": "node2"})
    assert not ended.failed and not ended.result["changed"] and not fake.changes


def test_peer_others_wait(run: Run, clock: Clock) -> None:
    fake = Gluster({"pool list": [read("pool_alone")] * 5 + [read("pool_three_view3")]})
    ended = run(gluster_peer, fake, **{**PEER, "node": "node3"})
    assert not ended.failed and not ended.result["changed"] and not ended.result["acted"]
    assert ended.result["coordinator"] == "node1" and not fake.changes and clock.now > 0


def test_peer_others_fail_with_what_they_saw(run: Run, clock: Clock) -> None:
    fake = Gluster({"pool list": read("pool_alone")})
    ended = run(gluster_peer, fake, **{**PEER, "node": "node3", "wait_timeout": 20})
    assert ended.failed and "node3: waited 20 s" in str(ended) and "node1 adds them" in str(ended)
    assert "node1: not in the pool; node2: not in the pool" in str(ended)
    assert 20 <= clock.now < 25


def test_peer_a_probe_without_answer(run: Run) -> None:
    fake = Gluster({"pool list": read("pool_alone"), "peer probe node2": read("probe_unknown")})
    ended = run(gluster_peer, fake, **PEER)
    assert ended.failed and "node2 cannot be reached on port 24007" in str(ended)
    assert "gluster --mode=script --xml peer probe node2" in str(ended)
    assert not ended.result["changed"] and "peer probe node3" not in fake.calls


def test_peer_a_node_of_another_pool(run: Run) -> None:
    fake = Gluster({"pool list": read("pool_alone"), "peer probe node2": read("probe_other_pool")})
    assert "node2 belongs to another pool" in str(run(gluster_peer, fake, **PEER))


def test_peer_down_peers_are_no_fault(run: Run) -> None:
    fake = Gluster({"pool list": read("pool_node3_down")})
    ended = run(gluster_peer, fake, **PEER)
    assert not ended.failed and not ended.result["changed"] and ended.result["disconnected"] == ["node3"]


def test_peer_a_change_names_the_peer_that_is_down(run: Run, clock: Clock) -> None:
    pool = read("pool_joining").replace("<connected>1</connected>", "<connected>0</connected>", 1)
    ended = run(gluster_peer, Gluster({"pool list": pool}), **PEER)
    assert ended.failed and "node2 is not connected" in str(ended) and "-e absent=node2" in str(ended)
    assert gluster.SETTLE <= clock.now < gluster.SETTLE + 5, "a peer that restarts is given a moment"


def test_peer_a_peer_that_restarts_is_waited_for(run: Run) -> None:
    pool = read("pool_joining").replace("<connected>1</connected>", "<connected>0</connected>", 1)
    fake = Gluster(
        {
            "pool list": [pool, pool, pool, read("pool_joining"), read("pool_three")],
            "peer probe node3": read("probe_node3"),
        }
    )
    ended = run(gluster_peer, fake, **PEER)
    assert not ended.failed and ended.result["commands"] == ["gluster peer probe node3"]


def test_peer_rejected(run: Run) -> None:
    ended = run(gluster_peer, Gluster({"pool list": read("pool_rejected")}), **PEER)
    assert ended.failed and "node1 sees node3 as Peer Rejected" in str(ended)


@pytest.fixture
def names(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"node1": "11", "tribrick-modules-node1.tribrick-modules": "11", "node2": "12", "node3": "13"}
    monkeypatch.setattr(gluster_peer, "resolve", lambda name: frozenset(known[name].split()))


@pytest.mark.usefixtures("names")
def test_peer_the_second_node_names_the_first(run: Run) -> None:
    fake = Gluster(
        {"pool list": [read("misnamed_view2")] * 3 + [read("renamed_view2")], "peer probe node1": read("probe_ok")}
    )
    ended = run(gluster_peer, fake, **{**PEER, "node": "node2"})
    assert not ended.failed and ended.result["changed"] and ended.result["coordinator"] == "node1"
    assert ended.result["commands"] == ["gluster peer probe node1"]
    assert "known as" in ended.result["diff"]["before"]["pool"]["node1"]
    assert "known as" not in ended.result["diff"]["after"]["pool"]["node1"]


@pytest.mark.usefixtures("names")
def test_peer_the_third_node_waits_for_the_name(run: Run) -> None:
    fake = Gluster({"pool list": [read("misnamed_view3")] * 4 + [read("renamed_view3")]})
    ended = run(gluster_peer, fake, **{**PEER, "node": "node3"})
    assert not ended.failed and not ended.result["changed"] and not fake.changes
    fake = Gluster({"pool list": read("misnamed_view3")})
    ended = run(gluster_peer, fake, **{**PEER, "node": "node3"})
    assert ended.failed and "node1 to be known to the pool by its name" in str(ended)


def test_peer_dead_glusterd(run: Run) -> None:
    ended = run(gluster_peer, Gluster({"pool list": DOWN}), **PEER)
    assert ended.failed and "node1: glusterd does not answer" in str(ended)
    assert "systemctl status glusterd" in str(ended)


@pytest.mark.parametrize("answer", [DOWN, (127, "", "timeout: failed to run command 'gluster'")])
def test_peer_check_mode_before_anything_is_installed(
    run: Run, answer: tuple[int, str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = Gluster({"pool list": answer})
    monkeypatch.setattr(gluster, "never_pooled", lambda: True)
    ended = run(gluster_peer, fake, check=True, **PEER)
    assert not ended.failed and ended.result["changed"] and not fake.changes
    assert run(gluster_peer, fake, **PEER).failed, "without check mode it is an error"
    monkeypatch.setattr(gluster, "never_pooled", lambda: False)
    assert run(gluster_peer, fake, check=True, **PEER).failed, "a pool with a dead glusterd cannot be predicted"


def test_never_pooled(tmp_path: Any) -> None:
    assert gluster.never_pooled(str(tmp_path / "missing")) and gluster.never_pooled(str(tmp_path))
    (tmp_path / "peers").mkdir()
    (tmp_path / "vols").mkdir()
    assert gluster.never_pooled(str(tmp_path))
    (tmp_path / "vols" / "media").mkdir()
    assert not gluster.never_pooled(str(tmp_path))


def test_peer_wrong_names(run: Run) -> None:
    ended = run(gluster_peer, Gluster({}), **{**PEER, "absent": ["nodeX"]})
    assert ended.failed and "absent names nodeX" in str(ended)


def test_a_call_that_hangs(run: Run) -> None:
    ended = run(gluster_peer, Gluster({"pool list": (124, "", "")}), **{**PEER, "timeout": 7})
    assert ended.failed and "no answer within 7 s" in str(ended) and "pool list" in str(ended)


def test_truncated_xml(run: Run) -> None:
    ended = run(gluster_peer, Gluster({"pool list": read("pool_three")[:400]}), **PEER)
    assert ended.failed and "broken or truncated XML" in str(ended) and "node1: " in str(ended)


# --- gluster_volume -----------------------------------------------------------------------


def test_volume_nothing_to_do(run: Run) -> None:
    for pool in ("pool_three", "pool_node3_down"):
        fake = Gluster({"pool list": read(pool), "volume info all": read("volume_started")})
        ended = run(gluster_volume, fake, **VOLUME)
        assert not ended.failed and not ended.result["changed"] and not fake.changes
        assert ended.result["volume"]["bricks"] == BRICKS and ended.result["drift"] == []


def fresh(**more: Any) -> Gluster:
    return Gluster(
        {
            "pool list": read("pool_three"),
            "volume info all": [read("volumes_none"), read("volume_started")],
            CREATE: read("create_ok"),
            SET: read("set_ok"),
            START: read("start_ok"),
            **more,
        }
    )


def test_volume_create(run: Run) -> None:
    fake = fresh()
    ended = run(gluster_volume, fake, **VOLUME)
    assert not ended.failed and ended.result["changed"] and ended.result["acted"]
    assert fake.changes == [CREATE, SET, START]
    assert ended.result["commands"] == [f"gluster {line}" for line in fake.changes]
    assert ended.result["diff"]["before"] == {} and ended.result["diff"]["after"]["status"] == "Started"


def test_volume_create_predicted(run: Run) -> None:
    fake = Gluster({"pool list": read("pool_alone"), "volume info all": read("volumes_none")})
    ended = run(gluster_volume, fake, check=True, **VOLUME)
    assert ended.result["changed"] and not fake.changes and len(ended.result["commands"]) == 3
    assert ended.result["diff"]["after"]["bricks"] == BRICKS and ended.result["volume"] is None
    ended = run(gluster_volume, fake, check=True, **{**VOLUME, "node": "node2"})
    assert not ended.failed and not ended.result["changed"]


def test_volume_create_before_the_pool_is_refused(run: Run) -> None:
    fake = Gluster({"pool list": read("pool_alone"), "volume info all": read("volumes_none")})
    ended = run(gluster_volume, fake, **VOLUME)
    assert ended.failed and "node2 and node3 are not in the pool" in str(ended)


def test_volume_others_wait(run: Run) -> None:
    fake = Gluster(
        {
            "pool list": read("pool_three_view2"),
            "volume info all": [read("volumes_none")] * 3 + [read("volume_created")] * 3 + [read("volume_started")],
        }
    )
    ended = run(gluster_volume, fake, **{**VOLUME, "node": "node2"})
    assert not ended.failed and not ended.result["changed"] and ended.result["volume"]["status"] == "Started"
    fake = Gluster({"pool list": read("pool_three_view2"), "volume info all": read("volume_created")})
    ended = run(gluster_volume, fake, **{**VOLUME, "node": "node2"})
    assert ended.failed and "seen last: volume media is Created" in str(ended)


def test_volume_a_refused_create(run: Run) -> None:
    fake = fresh(**{"volume info all": read("volumes_none"), CREATE: read("create_old_brick")})
    ended = run(gluster_volume, fake, **VOLUME)
    assert ended.failed and "/srv/gluster/media/brick is already part of a volume" in str(ended)
    assert not ended.result["changed"] and fake.changes == [CREATE]


def test_volume_a_create_that_a_killed_run_left_behind(run: Run) -> None:
    fake = fresh(**{CREATE: read("create_again")})
    ended = run(gluster_volume, fake, **VOLUME)
    assert not ended.failed and fake.changes == [CREATE, SET, START]


def test_volume_waits_for_another_transaction(run: Run) -> None:
    fake = fresh(**{START: [read("busy"), read("busy"), read("start_ok")]})
    ended = run(gluster_volume, fake, **VOLUME)
    assert not ended.failed and fake.changes.count(START) == 3 and len(ended.result["commands"]) == 3
    ended = run(gluster_volume, fresh(**{START: read("busy")}), **VOLUME)
    assert ended.failed and "Another transaction is in progress" in str(ended)


def test_volume_repairs_drift(run: Run) -> None:
    fix = "volume set media network.ping-timeout 20"
    fake = Gluster(
        {
            "pool list": read("pool_three"),
            "volume info all": [drifted(), read("volume_started")],
            fix: read("set_ok"),
        }
    )
    ended = run(gluster_volume, fake, **VOLUME)
    assert ended.result["changed"] and fake.changes == [fix] and ended.result["drift"][0]["found"] == "42"


def test_volume_a_repair_that_does_not_last_is_an_error(run: Run) -> None:
    fix = "volume set media network.ping-timeout 20"
    fake = Gluster({"pool list": read("pool_three"), "volume info all": drifted(), fix: read("set_ok")})
    ended = run(gluster_volume, fake, **VOLUME)
    assert ended.failed and "yet is not as wanted" in str(ended) and "set network.ping-timeout to 20" in str(ended)
    assert ended.result["changed"]


def test_volume_names_the_option_at_fault(run: Run) -> None:
    singles = {
        "volume set media network.ping-timeout 20": read("set_ok"),
        "volume set media cluster.quorum-type auto": read("set_bad_value"),
        "volume set media auth.allow 198.18.9.11,198.18.9.12,198.18.9.13": read("set_ok"),
    }
    fake = fresh(**{"volume info all": read("volume_created"), SET: read("set_bad_value"), **singles})
    ended = run(gluster_volume, fake, **VOLUME)
    assert ended.failed and "cluster.quorum-type cannot be set to 'auto'" in str(ended)
    assert "ping-timeout cannot" not in str(ended) and fake.changes == [SET, *singles]
    assert len(ended.result["commands"]) == 2 and ended.result["changed"]


def test_volume_other_bricks(run: Run) -> None:
    for node in NODES:
        pool = {"node1": "pool_three", "node2": "pool_three_view2", "node3": "pool_three_view3"}[node]
        fake = Gluster({"pool list": read(pool), "volume info all": read("volume_started")})
        wanted = [*BRICKS[:2], "node3:/srv/new/brick"]
        ended = run(gluster_volume, fake, **{**VOLUME, "node": node, "bricks": wanted})
        assert ended.failed and not fake.changes and not ended.result["changed"]
        assert "found node3:/srv/gluster/media/brick, expected node3:/srv/new/brick" in str(ended)


def test_volume_with_a_peer_down(run: Run) -> None:
    fake = Gluster({"pool list": read("pool_node3_down"), "volume info all": drifted()})
    ended = run(gluster_volume, fake, **VOLUME)
    assert ended.failed and "node3 is not connected" in str(ended) and "-e absent=node3" in str(ended)
    assert ended.result["drift"] and not fake.changes
    ended = run(gluster_volume, fake, **{**VOLUME, "absent": ["node3"]})
    assert not ended.failed and not ended.result["changed"] and not fake.changes
    assert ended.result["pending"] == ["volume media: network.ping-timeout is 42, wanted 20 (waits for node3)"]


def test_volume_create_with_an_absent_node(run: Run) -> None:
    fake = Gluster({"pool list": read("pool_node3_down"), "volume info all": read("volumes_none")})
    for check in (False, True):
        ended = run(gluster_volume, fake, check=check, **{**VOLUME, "absent": ["node3"]})
        assert ended.failed and "node3 is absent; run again when it is back" in str(ended)


def test_volume_two_nodes_only(run: Run) -> None:
    two = {"nodes": NODES[:2], "bricks": BRICKS[:2]}
    ended = run(gluster_volume, Gluster({}), **{**VOLUME, **two})
    assert ended.failed and "2 bricks are not a multiple of 3 replicas" in str(ended)
    ended = run(gluster_volume, Gluster({}), **{**VOLUME, **two, "replicas": 2})
    assert ended.failed and "odd and at least 3" in str(ended)


def test_volume_options_for_other_versions(run: Run) -> None:
    options = [*OPTIONS, {"name": "a.b", "value": "1", "min_version": "12", "reason": "new"}]
    fake = Gluster({"pool list": read("pool_three"), "volume info all": read("volume_started")})
    ended = run(gluster_volume, fake, **{**VOLUME, "options": options})
    assert not ended.failed and [option["name"] for option in ended.result["not_for_this_version"]] == ["a.b"]
    fake = Gluster({"--version": "glusterfs 12.0\n", **fake.answers, "volume set media a.b 1": read("set_ok")})
    fake.answers["--version"] = ["glusterfs 12.0\n"]
    ended = run(gluster_volume, fake, check=True, **{**VOLUME, "options": options})
    assert ended.result["commands"] == ["gluster volume set media a.b 1"]


def test_volume_dead_glusterd(run: Run) -> None:
    ended = run(gluster_volume, Gluster({"pool list": DOWN}), **VOLUME)
    assert ended.failed and "glusterd does not answer" in str(ended)


# --- gluster_volume_info ------------------------------------------------------------------

INFO = {"name": "media", "gather": ["info", "status", "heal"]}
STATUS, HEAL = "volume status media", "volume heal media info summary"


def test_info(run: Run) -> None:
    fake = Gluster(
        {
            "pool list": read("pool_three"),
            "volume info all": read("volume_started"),
            STATUS: [read("busy"), read("status_ok")],
            HEAL: read("heal_ok"),
        }
    )
    ended = run(gluster_volume_info, fake, **INFO)
    (volume,) = ended.result["volumes"]
    assert not ended.failed and not ended.result["changed"] and not fake.changes
    assert ended.result["version"] == "11.1" and len(ended.result["pool"]) == 3
    assert volume["bricks_online"] == 3 and volume["heal_pending"] == 0 and volume["errors"] == []


def test_info_with_a_node_down(run: Run) -> None:
    fake = Gluster(
        {
            "pool list": read("pool_node3_down"),
            "volume info all": read("volume_node3_down"),
            STATUS: read("status_node3_down"),
            HEAL: read("heal_node3_down"),
        }
    )
    (volume,) = run(gluster_volume_info, fake, **INFO).result["volumes"]
    assert volume["bricks_online"] == 2 and [brick["online"] for brick in volume["brick_status"]] == [True, True, False]
    assert [brick["pending"] for brick in volume["heal"]] == [4, 4, None]
    assert volume["heal_pending"] is None and volume["split_brain"] is None, "silence is not health"


def test_info_parts_that_cannot_be_read(run: Run) -> None:
    fake = Gluster(
        {
            "pool list": read("pool_three"),
            "volume info all": read("volume_started"),
            STATUS: read("busy"),
            HEAL: (251, read("heal_stopped"), ""),
        }
    )
    (volume,) = run(gluster_volume_info, fake, **INFO).result["volumes"]
    assert volume["brick_status"] is None and volume["bricks_online"] is None and volume["heal"] is None
    assert "Another transaction" in volume["errors"][0] and "Not able to fetch volfile" in volume["errors"][1]


def test_info_of_a_stopped_volume(run: Run) -> None:
    fake = Gluster({"pool list": read("pool_three"), "volume info all": read("volume_stopped")})
    (volume,) = run(gluster_volume_info, fake, **INFO).result["volumes"]
    assert volume["bricks_online"] == 0 and volume["heal_pending"] is None and "not started" in volume["errors"][0]


def test_info_asks_only_what_was_asked_for(run: Run) -> None:
    fake = Gluster({"pool list": read("pool_three"), "volume info all": read("volume_started")})
    (volume,) = run(gluster_volume_info, fake, gather=["info"]).result["volumes"]
    assert "heal" not in volume and "brick_status" not in volume
    assert run(gluster_volume_info, fake, name="other").result["volumes"] == []


def test_info_dead_glusterd(run: Run) -> None:
    ended = run(gluster_volume_info, Gluster({"pool list": DOWN}), **INFO)
    assert ended.failed and "systemctl status glusterd" in str(ended)
    fake = Gluster({"pool list": read("pool_three"), "volume info all": read("volume_started"), STATUS: DOWN})
    assert run(gluster_volume_info, fake, **INFO).failed, "glusterd died on the way"
