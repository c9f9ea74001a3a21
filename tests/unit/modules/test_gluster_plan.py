"""Who acts, and what is to be done: decisions and plans, all of them pure."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from ansible_collections.tribrick.media.plugins.module_utils import gluster

from .conftest import read

NODES = ("node1", "node2", "node3")
BRICKS = tuple(f"{node}:/srv/gluster/media/brick" for node in NODES)


def peer(name: str, connected: bool = True, state: int = 3) -> gluster.Peer:
    text = {3: "Peer in Cluster", 4: "Accepted peer request", 6: "Peer Rejected"}[state]
    return gluster.Peer(f"uuid-{name}", (name,), connected, state, text)


def members(*words: str, **keywords: Any) -> gluster.Members:
    """members("node2", "node3-") : node3 is known and disconnected; "node3!" rejected, "node3~" joining."""
    peers = {}
    for word in words:
        name = word.rstrip("-!~")
        state = 6 if "!" in word else 4 if "~" in word else 3
        peers[name] = peer(name, "-" not in word, state)
    return gluster.Members(peers, **keywords)


# --- coordinator --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("node", "known", "absent", "lead"),
    [
        # nobody has met anybody: the first node leads, whoever asks
        ("node1", [], [], "node1"),
        ("node2", [], [], "node1"),
        ("node3", [], [], "node1"),
        # all is well
        ("node1", ["node2", "node3"], [], "node1"),
        ("node2", ["node1", "node3"], [], "node1"),
        ("node3", ["node1", "node2"], [], "node1"),
        # the first is known and gone
        ("node2", ["node1-", "node3"], [], "node2"),
        ("node3", ["node1-", "node2"], [], "node2"),
        # the first two are gone
        ("node3", ["node1-", "node2-"], [], "node3"),
        # a later one is gone
        ("node1", ["node2-", "node3"], [], "node1"),
        ("node2", ["node1", "node3-"], [], "node1"),
        # half a pool
        ("node2", ["node1"], [], "node1"),
        # a pool that the first node does not belong to (it was put into the list later)
        ("node2", ["node3"], [], "node1"),
        ("node2", ["node3"], ["node1"], "node2"),
        # declared absent, known or not, gone or not
        ("node2", ["node1-", "node3"], ["node1"], "node2"),
        ("node3", ["node2"], ["node1"], "node2"),
        ("node2", ["node1", "node3"], ["node1"], "node2"),
        ("node3", ["node1-", "node2-"], ["node1", "node2"], "node3"),
    ],
)
def test_coordinator(node: str, known: list[str], absent: list[str], lead: str) -> None:
    assert gluster.coordinator(NODES, node, members(*known), absent) == lead


def test_at_most_one_coordinator_while_nodes_see_each_other() -> None:
    for down in [(), ("node1",), ("node2",), ("node3",), ("node1", "node2")]:
        alive = [node for node in NODES if node not in down]
        leads = set()
        for node in alive:
            known = [other + ("-" if other in down else "") for other in NODES if other != node]
            leads.add(gluster.coordinator(NODES, node, members(*known)))
        assert leads == {alive[0]}


@pytest.mark.parametrize(
    ("nodes", "node", "absent", "words"),
    [
        (NODES, "node4", [], "node4 is not one of the nodes"),
        (("node1", "node1"), "node1", [], "names a host twice"),
        (NODES, "node1", ["nodeX"], "absent names nodeX"),
        (NODES, "node1", ["node1"], "node1 is named as absent, yet this runs on it"),
    ],
)
def test_contradicting_names(nodes: tuple[str, ...], node: str, absent: list[str], words: str) -> None:
    with pytest.raises(gluster.Refused, match=words):
        gluster.check_names(nodes, node, absent)


# --- identify -----------------------------------------------------------------------------

ADDRESSES = {
    "node1": {"198.18.9.11"},
    "node2": {"198.18.9.12"},
    "node3": {"198.18.9.13"},
    "tribrick-modules-node1.tribrick-modules": {"198.18.9.11"},
    "198.18.9.11": {"198.18.9.11"},
    "198.18.9.99": {"198.18.9.99"},
}


def resolve(name: str) -> frozenset[str]:
    return frozenset(ADDRESSES.get(name, ()))


def test_identify_by_name_needs_no_lookup() -> None:
    pool = gluster.parse_pool(read("pool_three"))
    found = gluster.identify(pool, NODES, "node1", lambda name: pytest.fail(f"looked up {name}"))
    assert set(found.peers) == {"node2", "node3"} and not found.misnamed and not found.unexpected


def test_identify_by_address() -> None:
    found = gluster.identify(gluster.parse_pool(read("misnamed_view2")), NODES, "node2", resolve)
    assert set(found.peers) == {"node1", "node3"} and found.misnamed == ("node1",)
    found = gluster.identify([peer("198.18.9.11")], NODES, "node2", resolve)
    assert found.misnamed == ("node1",)


def test_identify_takes_any_of_the_names() -> None:
    found = gluster.identify(gluster.parse_pool(read("renamed_view3")), NODES, "node3", resolve)
    assert set(found.peers) == {"node1", "node2"} and not found.misnamed


def test_identify_strangers() -> None:
    found = gluster.identify([peer("198.18.9.99"), peer("ghost")], NODES, "node2", resolve)
    assert not found.peers and found.unexpected == ("198.18.9.99", "ghost")


# --- peers --------------------------------------------------------------------------------


def test_peers_fresh() -> None:
    plan = gluster.plan_peers(NODES, "node1", members())
    assert plan.probe == ("node2", "node3") and not plan.refusal and not plan.empty


def test_peers_half_done() -> None:
    assert gluster.plan_peers(NODES, "node1", members("node2")).probe == ("node3",)


@pytest.mark.parametrize("known", [["node2", "node3"], ["node2-", "node3"], ["node2-", "node3-"]])
@pytest.mark.parametrize("absent", [[], ["node2"]])
def test_peers_nothing_to_do_even_while_some_are_down(known: list[str], absent: list[str]) -> None:
    plan = gluster.plan_peers(NODES, "node1", members(*known), absent)
    assert plan.empty and not plan.pending


def test_peers_adding_needs_all_connected() -> None:
    plan = gluster.plan_peers(NODES, "node1", members("node2-"))
    assert plan.away == ("node2",) and not plan.probe
    assert plan.refusal is not None
    assert "node3 is not in the pool" in plan.refusal and "-e absent=node2" in plan.refusal


def test_peers_adding_is_refused_while_one_is_absent() -> None:
    plan = gluster.plan_peers(NODES, "node1", members("node2-"), ["node2"])
    assert plan.refusal and "node2 is absent; run again when it is back" in plan.refusal
    assert not plan.away, "an absent node is not worth waiting for"


def test_peers_an_absent_node_outside_the_pool_is_pending() -> None:
    plan = gluster.plan_peers(NODES, "node1", members("node2"), ["node3"])
    assert plan.empty and plan.pending == ("node3 is not in the pool",)


def test_peers_rejected() -> None:
    plan = gluster.plan_peers(NODES, "node1", members("node2", "node3!"))
    assert plan.refusal and "node3 differs from the others" in plan.refusal
    assert "copy that directory from node1" in plan.refusal


def test_peers_the_odd_one_out_knows_that_it_is_it() -> None:
    plan = gluster.plan_peers(NODES, "node3", members("node1!", "node2!"))
    assert plan.refusal and "node3 differs from the others" in plan.refusal
    assert "copy that directory from node1" in plan.refusal


def test_peers_a_tie_is_not_decided() -> None:
    plan = gluster.plan_peers(NODES, "node1", members("node2-", "node3!"), ["node2"])
    assert plan.refusal and "cannot be told who is right" in plan.refusal and "copy" not in plan.refusal


def test_peers_rejected_and_absent_is_pending() -> None:
    plan = gluster.plan_peers(NODES, "node1", members("node2", "node3!"), ["node3"])
    assert plan.empty and plan.pending == ("node3 is rejected by the pool",)


def test_peers_joining_is_waited_for() -> None:
    plan = gluster.plan_peers(NODES, "node1", members("node2", "node3~"))
    assert plan.settling == ("node3",) and not plan.probe and not plan.empty


def test_peers_rename() -> None:
    plan = gluster.plan_peers(NODES, "node2", members("node1", "node3", misnamed=("node1",)))
    assert plan.rename == ("node1",)


@pytest.mark.parametrize(("known", "absent"), [(["node1", "node3-"], []), (["node1", "node3-"], ["node3"])])
def test_peers_rename_waits_for_all(known: list[str], absent: list[str]) -> None:
    plan = gluster.plan_peers(NODES, "node2", members(*known, misnamed=("node1",)), absent)
    assert plan.empty and plan.pending == ("node1 is known to the pool under another name",)


@pytest.mark.parametrize(
    ("node", "target", "known", "who"),
    [
        ("node2", "node1", ["node1", "node3"], "node2"),
        ("node3", "node1", ["node1", "node2"], "node2"),
        ("node3", "node1", ["node1", "node2-"], "node3"),
        ("node1", "node2", ["node2", "node3"], "node1"),
        ("node3", "node2", ["node1", "node2"], "node1"),
    ],
)
def test_renamer(node: str, target: str, known: list[str], who: str) -> None:
    assert gluster.renamer(NODES, node, target, members(*known)) == who


def test_unready_says_what_was_seen() -> None:
    seen = gluster.unready(NODES, "node1", members("node2~"), [])
    assert seen == ["node2: Accepted peer request, connected", "node3: not in the pool"]
    assert gluster.unready(NODES, "node1", members("node2-"), ["node3"]) == ["node2: Peer in Cluster, disconnected"]
    assert gluster.unready(NODES, "node1", members("node2", "node3"), []) == []


# --- volume: description ------------------------------------------------------------------

SPEC = gluster.VolumeSpec(
    name="media",
    bricks=BRICKS,
    options=(
        gluster.Option("network.ping-timeout", "20", reason="short stalls"),
        gluster.Option("cluster.quorum-type", "auto"),
        gluster.Option("auth.allow", "198.18.9.13,198.18.9.12,198.18.9.11"),
    ),
)
FOUND = gluster.parse_volumes(read("volume_started"))[0]
ALL = members("node2", "node3")


def test_a_good_description() -> None:
    gluster.check_spec(SPEC, NODES)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"replicas": 2, "bricks": BRICKS[:2]}, "odd and at least 3"),
        ({"replicas": 1, "bricks": BRICKS[:1]}, "odd and at least 3"),
        ({"replicas": 4}, "odd and at least 3"),
        ({"bricks": BRICKS[:2]}, "2 bricks are not a multiple of 3"),
        ({"bricks": (*BRICKS, "node1:/b")}, "4 bricks are not a multiple of 3"),
        ({"bricks": ()}, "0 bricks"),
        ({"bricks": (*BRICKS[:2], "node3/brick")}, "not of the form HOST:/ABSOLUTE/PATH"),
        ({"bricks": (*BRICKS[:2], "node3:brick")}, "not of the form"),
        ({"bricks": (*BRICKS[:2], "node3:/a b")}, "not of the form"),
        ({"bricks": (*BRICKS[:2], "node9:/b")}, "is on node9, the nodes are"),
        ({"bricks": (*BRICKS[:2], BRICKS[0])}, "named twice"),
        ({"bricks": (*BRICKS[:2], "node1:/other")}, "two replicas of one file would be on one host"),
        ({"name": "a/b"}, "is not a name for a volume"),
        ({"name": "-x"}, "is not a name for a volume"),
        ({"name": "all"}, "is not a name for a volume"),
        ({"options": (gluster.Option("ping-timeout", "1"),)}, "needs its full name"),
        ({"options": (gluster.Option("a.b", "1"), gluster.Option("a.b", "2"))}, "given twice"),
        ({"options": (gluster.Option("a.b", " "),)}, "has no value"),
    ],
)
def test_bad_descriptions(change: dict[str, Any], words: str) -> None:
    with pytest.raises(gluster.Refused, match=words):
        gluster.check_spec(replace(SPEC, **change), NODES)


# --- volume: plan -------------------------------------------------------------------------


def plan(
    spec: gluster.VolumeSpec = SPEC,
    found: gluster.Volume | None = FOUND,
    pool: gluster.Members = ALL,
    absent: tuple[str, ...] = (),
    pool_pending: bool = False,
) -> gluster.VolumePlan:
    return gluster.plan_volume(spec, found, NODES, "node1", pool, absent, pool_pending=pool_pending)


def refusal(**keywords: Any) -> str:
    made = plan(**keywords)
    assert made.refusal is not None
    assert not (made.create or made.start or made.stop or made.set or made.reset)
    return made.refusal


def test_create() -> None:
    made = plan(found=None)
    assert gluster.plan_commands(SPEC, made) == [
        ("volume", "create", "media", "replica", "3", "transport", "tcp", *BRICKS),
        (
            *("volume", "set", "media", "network.ping-timeout", "20", "cluster.quorum-type", "auto"),
            *("auth.allow", "198.18.9.13,198.18.9.12,198.18.9.11"),
        ),
        ("volume", "start", "media"),
    ]


@pytest.mark.parametrize("state", ["present", "stopped"])
def test_create_without_start(state: str) -> None:
    spec = replace(SPEC, state=state, options=(), force=True)
    assert gluster.plan_commands(spec, plan(spec, None)) == [
        ("volume", "create", "media", "replica", "3", "transport", "tcp", *BRICKS, "force")
    ]


def test_create_is_refused() -> None:
    words = refusal(found=None, pool=members("node2-", "node3"), absent=("node2",))
    assert "does not exist" in words and "node2 is absent; run again when it is back" in words
    assert "absent=node2" in refusal(found=None, pool=members("node2-", "node3"))
    assert "node3 is not in the pool" in refusal(found=None, pool=members("node2"))
    assert plan(found=None, pool=members("node2-", "node3")).away == ("node2",)


def test_create_is_predicted_for_a_pool_to_come() -> None:
    assert plan(found=None, pool=members(), pool_pending=True).create
    assert "node2 is absent" in refusal(found=None, pool=members(), absent=("node2",), pool_pending=True)


@pytest.mark.parametrize("pool", [ALL, members("node2-", "node3"), members("node2-", "node3-"), members()])
@pytest.mark.parametrize("absent", [(), ("node2",)])
def test_nothing_to_do(pool: gluster.Members, absent: tuple[str, ...]) -> None:
    made = plan(pool=pool, absent=absent)
    assert made.empty and not made.drift and not made.pending


def test_a_killed_run_is_finished() -> None:
    made = plan(found=gluster.parse_volumes(read("volume_created"))[0])
    assert not made.create and made.start and len(made.set) == 3


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            {"bricks": (*BRICKS[:2], "node3:/old")},
            "other bricks: found node3:/old, expected node3:/srv/gluster/media/brick; nothing was changed",
        ),
        ({"bricks": (*BRICKS, "node1:/b", "node2:/b", "node3:/b")}, "found node1:/b, node2:/b and node3:/b, expected"),
        ({"type": "Distribute", "replicas": 1}, "exists with the type Distribute"),
        ({"type": "Disperse"}, "exists with the type Disperse"),
        ({"arbiters": 1}, "Replicate with arbiter"),
        ({"replicas": 1, "type": "Distributed-Replicate"}, "exists with 1 replicas"),
        ({"transport": "rdma"}, "with the transport rdma"),
    ],
)
def test_another_volume_of_that_name(change: dict[str, Any], words: str) -> None:
    text = refusal(found=replace(FOUND, status="Stopped", options={}, **change))
    assert words in text and "Put what was found into the inventory" in text
    assert words in refusal(found=replace(FOUND, **change), absent=("node2",), pool=members("node2-", "node3"))


def test_the_order_of_replicas_has_no_meaning() -> None:
    assert plan(found=replace(FOUND, bricks=BRICKS[::-1])).empty


def test_the_grouping_of_bricks_has_a_meaning() -> None:
    six = (*BRICKS, "node1:/b", "node2:/b", "node3:/b")
    other = ("node1:/b", *BRICKS[1:], BRICKS[0], "node2:/b", "node3:/b")
    spec = replace(SPEC, bricks=six)
    kind = "Distributed-Replicate"
    assert plan(spec, replace(FOUND, type=kind, bricks=six)).empty
    assert "grouped in another way" in refusal(spec=spec, found=replace(FOUND, type=kind, bricks=other))


def with_options(**options: str) -> gluster.Volume:
    changed = {name.replace("__", ".").replace("_", "-"): value for name, value in options.items()}
    return replace(FOUND, options={**FOUND.options, **changed})


def test_drift_is_repaired() -> None:
    made = plan(found=with_options(network__ping_timeout="42"))
    assert made.set == (("network.ping-timeout", "20"),) and not made.reset
    assert made.drift == ({"name": "network.ping-timeout", "found": "42", "wanted": "20", "reason": "short stalls"},)


def test_an_option_that_was_never_set_is_drift() -> None:
    found = replace(FOUND, options={k: v for k, v in FOUND.options.items() if k != "cluster.quorum-type"})
    assert plan(found=found).set == (("cluster.quorum-type", "auto"),)


def test_unknown_options_are_reported_and_reset_only_on_demand() -> None:
    found = with_options(performance__nl_cache="on", features__quota="on")
    made = plan(found=found)
    assert made.empty and [d["name"] for d in made.drift] == ["features.quota", "performance.nl-cache"]
    made = plan(replace(SPEC, exclusive=True), found)
    assert made.reset == ("performance.nl-cache",) and not made.set


def test_options_of_gluster_itself_are_no_drift_unless_in_the_profile() -> None:
    assert FOUND.options["nfs.disable"] == "on"
    assert plan(replace(SPEC, exclusive=True)).empty
    spec = replace(SPEC, options=(*SPEC.options, gluster.Option("nfs.disable", "off")))
    assert plan(spec).set == (("nfs.disable", "off"),)


def test_a_yaml_boolean_reaches_gluster_as_on_or_off() -> None:
    spec = replace(SPEC, options=(*SPEC.options, gluster.Option("performance.nl-cache", "False")))
    assert plan(spec).set == (("performance.nl-cache", "off"),)


def test_drift_with_an_absent_node_is_pending() -> None:
    pool = members("node2-", "node3")
    found = with_options(network__ping_timeout="42", performance__nl_cache="on")
    made = plan(found=found, pool=pool, absent=("node2",))
    assert made.empty and len(made.drift) == 2
    assert made.pending == ("volume media: network.ping-timeout is 42, wanted 20 (waits for node2)",)
    made = plan(replace(SPEC, exclusive=True), found, pool, ("node2",))
    assert made.empty and len(made.pending) == 2 and "nl-cache is not in the profile" in made.pending[1]


def test_drift_with_a_peer_down_is_refused() -> None:
    made = plan(found=with_options(network__ping_timeout="42"), pool=members("node2", "node3-"))
    assert made.away == ("node3",) and made.drift and not made.set
    assert made.refusal and "set network.ping-timeout to 20" in made.refusal and "-e absent=node3" in made.refusal


def test_start_and_stop() -> None:
    stopped = replace(FOUND, status="Stopped")
    assert gluster.plan_commands(SPEC, plan(found=stopped)) == [("volume", "start", "media")]
    assert plan(replace(SPEC, state="present"), stopped).empty
    assert plan(replace(SPEC, state="present")).empty
    spec = replace(SPEC, state="stopped")
    assert gluster.plan_commands(spec, plan(spec)) == [("volume", "stop", "media")]
    assert plan(spec, stopped).empty


def test_start_with_an_absent_node_needs_a_majority() -> None:
    stopped = replace(FOUND, status="Stopped")
    made = plan(found=stopped, pool=members("node2-", "node3"), absent=("node2",))
    assert made.start and not made.refusal
    assert "no majority" in refusal(found=stopped, pool=members("node2-", "node3-"), absent=("node2",))
    assert "no majority" in refusal(found=stopped, pool=members("node2-", "node3!"), absent=("node2",))


def test_start_with_a_peer_down_is_refused() -> None:
    stopped = replace(FOUND, status="Stopped")
    assert "start the volume" in refusal(found=stopped, pool=members("node2-", "node3"))


def test_stop_with_an_absent_node_is_refused() -> None:
    words = refusal(spec=replace(SPEC, state="stopped"), pool=members("node2-", "node3"), absent=("node2",))
    assert "is not stopped while a node is left out" in words


@pytest.mark.parametrize("state", ["started", "present", "stopped"])
@pytest.mark.parametrize("found", [None, FOUND, with_options(network__ping_timeout="42", a__b="1")])
def test_a_prediction_is_a_state_without_further_plan(state: str, found: gluster.Volume | None) -> None:
    spec = replace(SPEC, state=state, exclusive=True)
    after = gluster.predict(spec, found, plan(spec, found))
    then = replace(FOUND, status=after["status"], bricks=tuple(after["bricks"]), options=after["options"])
    assert plan(spec, then).empty
