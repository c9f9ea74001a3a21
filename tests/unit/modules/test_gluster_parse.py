"""Parsers, on captured answers of both releases and on broken ones."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from ansible_collections.tribrick.media.plugins.module_utils import gluster

from .conftest import read

BRICKS = tuple(f"node{n}:/srv/gluster/media/brick" for n in (1, 2, 3))
both = pytest.mark.parametrize("release", ["10.3", "11.1"])


def started(release: str = "11.1") -> gluster.Volume:
    return gluster.parse_volumes(read("volume_started", release))[0]


@both
def test_pool(release: str) -> None:
    peers = gluster.parse_pool(read("pool_three", release))
    assert [peer.hostnames for peer in peers] == [("node2",), ("node3",), ("localhost",)]
    assert [peer.local for peer in peers] == [False, False, True]
    assert all(peer.ready for peer in peers)


@both
def test_pool_alone(release: str) -> None:
    (peer,) = gluster.parse_pool(read("pool_alone", release))
    assert peer.local


@both
def test_pool_with_a_peer_down(release: str) -> None:
    peers = {peer.hostnames[0]: peer for peer in gluster.parse_pool(read("pool_node3_down", release))}
    assert peers["node2"].ready
    assert peers["node3"].state == gluster.PEER_IN_CLUSTER and not peers["node3"].connected
    assert not peers["node3"].ready


def test_pool_with_a_rejected_peer() -> None:
    peers = {peer.hostnames[0]: peer for peer in gluster.parse_pool(read("pool_rejected"))}
    assert peers["node3"].state == gluster.PEER_REJECTED and peers["node3"].state_text == "Peer Rejected"


def test_pool_with_two_names() -> None:
    peers = gluster.parse_pool(read("renamed_view2"))
    assert peers[0].hostnames == ("node1", "tribrick-modules-node1.tribrick-modules")


@both
def test_volumes(release: str) -> None:
    volume = started(release)
    assert (volume.name, volume.type, volume.status, volume.transport) == ("media", "Replicate", "Started", "tcp")
    assert (volume.replicas, volume.arbiters, volume.bricks) == (3, 0, BRICKS)
    assert volume.options["network.ping-timeout"] == "20"
    assert volume.options["auth.allow"] == "198.18.9.11,198.18.9.12,198.18.9.13"
    assert gluster.parse_volumes(read("volume_stopped", release))[0].status == "Stopped"
    assert gluster.parse_volumes(read("volume_created", release))[0].status == "Created"


@both
def test_no_volumes(release: str) -> None:
    assert gluster.parse_volumes(read("volumes_none", release)) == []


@both
def test_status(release: str) -> None:
    bricks = gluster.parse_status(read("status_ok", release), started(release))
    assert tuple(brick.brick for brick in bricks) == BRICKS
    assert all(brick.online and brick.port and brick.pid for brick in bricks)


@both
def test_status_of_a_node_that_is_down(release: str) -> None:
    bricks = gluster.parse_status(read("status_node3_down", release), started(release))
    assert [brick.online for brick in bricks] == [True, True, False]
    assert bricks[2] == gluster.BrickStatus(BRICKS[2], False, None, None)


@both
def test_status_of_a_brick_that_was_killed(release: str) -> None:
    killed = read("status_ok", release).replace("<status>1</status>", "<status>0</status>", 1)
    bricks = gluster.parse_status(killed, started(release))
    assert [brick.online for brick in bricks] == [False, True, True]
    assert bricks[0] == gluster.BrickStatus(BRICKS[0], False, None, None)


@both
def test_heal(release: str) -> None:
    bricks = gluster.parse_heal(read("heal_ok", release))
    assert [(brick.connected, brick.total) for brick in bricks] == [(True, 0)] * 3


@both
def test_heal_with_a_brick_down(release: str) -> None:
    bricks = gluster.parse_heal(read("heal_node3_down", release))
    assert [(brick.total, brick.pending, brick.split_brain) for brick in bricks[:2]] == [(4, 4, 0)] * 2
    assert not bricks[2].connected and bricks[2].total is None
    assert "Transport endpoint is not connected" in bricks[2].status


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("probe_unknown", "Probe returned with Transport endpoint is not connected"),
        ("create_again", "Volume media already exists"),
        ("create_old_brick", "/srv/gluster/media/brick is already part of a volume"),
        ("create_root", "root partition"),
        ("set_bad_value", "'sometimes' is not valid"),
        ("set_invalid", "network.no-such-option does not exist"),
        ("busy", "Another transaction is in progress"),
        ("volume_missing", "Volume does not exist"),
    ],
)
@both
def test_failures(name: str, words: str, release: str) -> None:
    assert words in (gluster.parse_failure(read(name, release)) or "")


@both
def test_success_is_no_failure(release: str) -> None:
    for name in ("probe_ok", "probe_again", "create_ok", "set_ok", "start_ok", "pool_three", "heal_ok"):
        assert gluster.parse_failure(read(name, release)) is None


def test_a_failure_without_words_names_the_numbers() -> None:
    text = "<cliOutput><opRet>-1</opRet><opErrno>17</opErrno><opErrstr/></cliOutput>"
    assert gluster.parse_failure(text) == "opRet -1, opErrno 17, no text"


PARSERS: list[tuple[Callable[[str], Any], str]] = [
    (gluster.parse_failure, "probe_ok"),
    (gluster.parse_pool, "pool_three"),
    (gluster.parse_volumes, "volume_started"),
    (lambda text: gluster.parse_status(text, started()), "status_ok"),
    (gluster.parse_heal, "heal_ok"),
]


@pytest.mark.parametrize(("parser", "name"), PARSERS)
def test_broken_answers(parser: Callable[[str], Any], name: str) -> None:
    good = read(name)
    with pytest.raises(gluster.GlusterError, match="with nothing"):
        parser("  \n")
    with pytest.raises(gluster.GlusterError, match="broken or truncated"):
        parser(good[: len(good) // 2])
    with pytest.raises(gluster.GlusterError, match="broken or truncated"):
        parser(good + good)
    with pytest.raises(gluster.GlusterError, match="<html> where <cliOutput>"):
        parser("<html/>")
    with pytest.raises(gluster.GlusterError, match="Connection failed"):
        parser(read("daemon_down"))
    with pytest.raises(gluster.GlusterError, match="has no <"):
        parser("<cliOutput/>")


@pytest.mark.parametrize(
    ("parser", "name", "old", "new", "words"),
    [
        (gluster.parse_pool, "pool_three", "<state>3</state>", "<state>three</state>", "'three' in <state>"),
        (gluster.parse_pool, "pool_three", "<connected>1</connected>", "", "no <connected> in <peer>"),
        (gluster.parse_pool, "pool_three", "<hostname>node2</hostname>", "<hostname/>", "empty <hostname>"),
        (gluster.parse_volumes, "volume_started", "<count>1<", "<count>2<", "counts 2 volumes and lists 1"),
        (gluster.parse_volumes, "volume_started", "<brickCount>3<", "<brickCount>6<", "counts 6 bricks and lists 3"),
        (gluster.parse_volumes, "volume_started", "<replicaCount>3</replicaCount>", "", "no <replicaCount>"),
        (gluster.parse_heal, "heal_ok", "<status>Connected</status>", "", "no <status> in <brick>"),
    ],
)
def test_answers_that_miss_a_part(parser: Callable[[str], Any], name: str, old: str, new: str, words: str) -> None:
    good = read(name)
    assert old in good
    with pytest.raises(gluster.GlusterError, match=words):
        parser(good.replace(old, new))


def test_version() -> None:
    assert gluster.parse_version("glusterfs 11.1\nRepository revision: git://...") == "11.1"
    with pytest.raises(gluster.GlusterError, match="no GlusterFS version"):
        gluster.parse_version("bash: gluster: command not found")


@pytest.mark.parametrize(
    ("name", "left", "right", "same"),
    [
        ("a.b", "on", "enable", True),
        ("a.b", "True", "yes", True),
        ("a.b", "off", "disable", True),
        ("a.b", "on", "off", False),
        ("a.b", "1", "on", False),
        ("a.b", "64MB", "67108864", True),
        ("a.b", "64MB", "64m", True),
        ("a.b", "1GB", "1024MB", True),
        ("a.b", "64MB", "64GB", False),
        ("a.b", "20", "20s", True),
        ("a.b", "10min", "600", True),
        ("a.b", "20", "21", False),
        ("a.b", "5%", "5", True),
        ("a.b", "0755", "755", True),
        ("a.b", "auto", "AUTO", True),
        ("a.b", "auto", "none", False),
        ("a.b", "10.5", "10.50", True),
        ("a.b", "10", "100", False),
        ("auth.allow", "10.0.0.2,10.0.0.1", "10.0.0.1, 10.0.0.2", True),
        ("auth.allow", "10.0.0.2,10.0.0.1", "10.0.0.1", False),
        ("a.b", "x,y", "y,x", False),
    ],
)
def test_values(name: str, left: str, right: str, same: bool) -> None:
    assert (gluster.normalise(name, left) == gluster.normalise(name, right)) is same


@pytest.mark.parametrize(
    ("low", "high", "version", "fits"),
    [
        (None, None, "10.3", True),
        ("10.3", None, "10.3", True),
        ("10.5", None, "10.3", False),
        ("10.5", None, "11.1", True),
        ("9", None, "11.1", True),
        ("11.0", "11.0", "11", True),
        (None, "10.9", "11.1", False),
        (None, "10.9", "10.3", True),
        ("12", None, None, True),
    ],
)
def test_options_for_a_version(low: str | None, high: str | None, version: str | None, fits: bool) -> None:
    option = gluster.Option("a.b", "1", low, high)
    assert gluster.split_options([option], version) == (([option], []) if fits else ([], [option]))


def test_a_bad_version_limit_is_refused() -> None:
    with pytest.raises(gluster.Refused, match="'new' is not a version"):
        gluster.split_options([gluster.Option("a.b", "1", "new")], "11.1")
