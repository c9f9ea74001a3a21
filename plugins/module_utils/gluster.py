# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""What the gluster modules share: run the command line, parse its XML, decide, plan.

Everything above the heading "the outside world" is a pure function of its arguments.
"""

from __future__ import annotations

import os
import re
import shlex
import socket
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, TypeVar

PEER_IN_CLUSTER = 3
PEER_REJECTED = 6

# Set by glusterd itself when a volume is created or a brick replaced; not drift unless the profile names them.
SET_BY_GLUSTER = frozenset(
    {
        "cluster.granular-entry-heal",
        "nfs.disable",
        "old.auth.allow",
        "performance.client-io-threads",
        "storage.fips-mode-rchecksum",
        "transport.address-family",
    }
)
# Switched by commands of their own (quota, bitrot, profile); reported, never reset.
SWITCHED_ELSEWHERE = frozenset(
    {
        "diagnostics.count-fop-hits",
        "diagnostics.latency-measurement",
        "features.bitrot",
        "features.inode-quota",
        "features.quota",
        "features.quota-deem-statfs",
        "features.scrub",
    }
)

# A restarted glusterd is away for a moment; nobody is called down before this many seconds.
SETTLE = 15

T = TypeVar("T")


# --- errors -------------------------------------------------------------------------------


class GlusterError(Exception):
    """A gluster command failed, or its answer could not be read."""

    def __init__(self, message: str, command: Sequence[str] = (), host: str = "") -> None:
        self.message = message
        self.command = list(command)
        self.host = host
        super().__init__(message)

    def __str__(self) -> str:
        where = f"{self.host}: " if self.host else ""
        what = f" (command: {shlex.join(self.command)})" if self.command else ""
        return f"{where}{self.message}{what}"


class GlusterMissing(GlusterError):
    """The gluster program is not installed."""


class GlusterUnavailable(GlusterError):
    """The own glusterd does not answer."""


class GlusterBusy(GlusterError):
    """Another transaction holds the cluster's lock; the same command may succeed soon."""


class GlusterSlow(GlusterError):
    """No answer in time."""


class Refused(Exception):
    """The wanted state cannot or must not be reached from what was found."""


# --- data ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Peer:
    uuid: str
    hostnames: tuple[str, ...]
    connected: bool
    state: int
    state_text: str

    @property
    def local(self) -> bool:
        return "localhost" in self.hostnames

    @property
    def ready(self) -> bool:
        return self.connected and self.state == PEER_IN_CLUSTER


@dataclass(frozen=True)
class Volume:
    name: str
    uuid: str
    type: str
    status: str
    transport: str
    replicas: int
    arbiters: int
    bricks: tuple[str, ...]
    options: Mapping[str, str]

    @property
    def started(self) -> bool:
        return self.status == "Started"


@dataclass(frozen=True)
class BrickStatus:
    brick: str
    online: bool
    port: int | None
    pid: int | None


@dataclass(frozen=True)
class BrickHeal:
    """Entries to heal on one brick; None where the brick could not be asked."""

    brick: str
    connected: bool
    status: str
    total: int | None
    pending: int | None
    split_brain: int | None
    healing: int | None


@dataclass(frozen=True)
class Option:
    name: str
    value: str
    min_version: str | None = None
    max_version: str | None = None
    reason: str = ""


@dataclass(frozen=True)
class Members:
    """The pool as one node sees it, by the names of the inventory."""

    peers: Mapping[str, Peer]  # wanted name -> peer; the own node is not in it
    misnamed: tuple[str, ...] = ()  # wanted names that the pool knows only under another name
    unexpected: tuple[str, ...] = ()  # peers that are none of the wanted nodes


# --- parsers (text -> data) ---------------------------------------------------------------


def parse(text: str) -> ET.Element:
    """The root element of an answer, checked; opRet and opErrno are left to the caller."""
    if not text.strip():
        raise GlusterError("gluster answered with nothing where XML was expected")
    try:
        root = ET.fromstring(text)  # noqa: S314 (the text is from our own gluster, run as root)
    except ET.ParseError as error:
        raise GlusterError(f"gluster answered with broken or truncated XML ({error}): {_shorten(text)}") from error
    if root.tag != "cliOutput":
        raise GlusterError(f"gluster answered with <{root.tag}> where <cliOutput> was expected")
    return root


def parse_failure(text: str) -> str | None:
    """The error that an answer carries, or None if it reports success."""
    root = parse(text)
    code = _integer(root, "opRet")
    if code == 0:
        return None
    words = (root.findtext("opErrstr") or "").strip()
    return words or f"opRet {code}, opErrno {(root.findtext('opErrno') or '?').strip()}{_NO_TEXT}"


def parse_pool(text: str) -> list[Peer]:
    """`pool list` or `peer status`."""
    section = _need(parse(text), "peerStatus")
    peers = []
    for item in section.findall("peer"):
        names = [name.text.strip() for name in item.findall("hostnames/hostname") if name.text]
        first = _text(item, "hostname")
        peers.append(
            Peer(
                uuid=_text(item, "uuid"),
                hostnames=tuple(dict.fromkeys([first, *names])),
                connected=_text(item, "connected") == "1",
                state=_integer(item, "state") if item.find("state") is not None else PEER_IN_CLUSTER,
                state_text=(item.findtext("stateStr") or "").strip(),
            )
        )
    return peers


def parse_volumes(text: str) -> list[Volume]:
    """`volume info`."""
    section = _need(_need(parse(text), "volInfo"), "volumes")
    volumes = []
    for item in section.findall("volume"):
        bricks = tuple(_text(brick, "name") for brick in item.findall("bricks/brick"))
        if len(bricks) != _integer(item, "brickCount"):
            raise GlusterError(
                f"volume {_text(item, 'name')}: gluster counts {_integer(item, 'brickCount')} "
                f"bricks and lists {len(bricks)}"
            )
        volumes.append(
            Volume(
                name=_text(item, "name"),
                uuid=_text(item, "id"),
                type=_text(item, "typeStr"),
                status=_text(item, "statusStr"),
                transport={0: "tcp", 1: "rdma", 2: "tcp,rdma"}.get(_integer(item, "transport"), "unknown"),
                replicas=_integer(item, "replicaCount"),
                arbiters=_integer(item, "arbiterCount"),
                bricks=bricks,
                options={
                    _text(option, "name"): (option.findtext("value") or "").strip()
                    for option in item.findall("options/option")
                },
            )
        )
    if len(volumes) != _integer(section, "count"):
        raise GlusterError(f"gluster counts {_integer(section, 'count')} volumes and lists {len(volumes)}")
    return volumes


def parse_status(text: str, volume: Volume) -> list[BrickStatus]:
    """`volume status NAME`, one entry for each brick of the volume.

    Gluster leaves out the bricks of a node that is down; they are reported as offline.
    """
    section = _need(_need(parse(text), "volStatus"), "volumes")
    found: dict[str, BrickStatus] = {}
    for item in section.findall("volume"):
        if _text(item, "volName") != volume.name:
            continue
        for node in item.findall("node"):
            name = f"{_text(node, 'hostname')}:{_text(node, 'path')}"
            online = _text(node, "status") == "1"
            found[name] = BrickStatus(
                brick=name,
                online=online,
                port=_number(node.findtext("port")) if online else None,
                pid=(_number(node.findtext("pid")) or None) if online else None,
            )
    return [found.get(brick, BrickStatus(brick, False, None, None)) for brick in volume.bricks]


def parse_heal(text: str) -> list[BrickHeal]:
    """`volume heal NAME info summary`."""
    section = _need(_need(parse(text), "healInfo"), "bricks")
    bricks = []
    for item in section.findall("brick"):
        status = _text(item, "status")
        bricks.append(
            BrickHeal(
                brick=_text(item, "name"),
                connected=status == "Connected",
                status=status,
                total=_number(item.findtext("totalNumberOfEntries")),
                pending=_number(item.findtext("numberOfEntriesInHealPending")),
                split_brain=_number(item.findtext("numberOfEntriesInSplitBrain")),
                healing=_number(item.findtext("numberOfEntriesPossiblyHealing")),
            )
        )
    if not bricks:  # nothing to heal nowhere would pass for all healed
        raise GlusterError("gluster's answer names no brick")
    return bricks


def parse_version(text: str) -> str:
    """`gluster --version`, e.g. "11.1"."""
    match = re.match(r"glusterfs\s+(\d+(?:\.\d+)*)", text)
    if not match:
        raise GlusterError(f"no GlusterFS version in the answer: {_shorten(text)}")
    return match.group(1)


def _shorten(text: str, limit: int = 200) -> str:
    flat = " ".join(text.split())
    return flat if len(flat) <= limit else flat[:limit] + "..."


def _need(parent: ET.Element, tag: str) -> ET.Element:
    child = parent.find(tag)
    if child is None:
        raise GlusterError(f"gluster's answer has no <{tag}> in <{parent.tag}>")
    return child


def _text(parent: ET.Element, tag: str) -> str:
    words = (_need(parent, tag).text or "").strip()
    if not words:
        raise GlusterError(f"gluster's answer has an empty <{tag}> in <{parent.tag}>")
    return words


def _integer(parent: ET.Element, tag: str) -> int:
    words = _text(parent, tag)
    number = _number(words)
    if number is None:
        raise GlusterError(f"gluster's answer has {words!r} in <{tag}>, a number was expected")
    return number


def _number(words: str | None) -> int | None:
    words = (words or "").strip()
    return int(words) if re.fullmatch(r"-?\d+", words) else None


# --- values and versions ------------------------------------------------------------------

_TRUE = frozenset({"on", "yes", "true", "enable", "enabled"})
_FALSE = frozenset({"off", "no", "false", "disable", "disabled"})
_UNITS = {"": 1, "k": 1 << 10, "m": 1 << 20, "g": 1 << 30, "t": 1 << 40, "p": 1 << 50}
_TIMES = {"s": 1, "sec": 1, "min": 60, "hr": 3600, "h": 3600, "days": 86400, "d": 86400}


def normalise(name: str, value: str) -> str:
    """One spelling for values that gluster takes as equal."""
    words = value.strip().lower()
    if words in _TRUE:
        return "on"
    if words in _FALSE:
        return "off"
    if name.startswith("auth."):
        return ",".join(sorted(part.strip() for part in words.split(",") if part.strip()))
    match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(%|[a-z]*)", words)
    if match:
        number, unit = float(match.group(1)), match.group(2)
        size = unit[:-1] if unit.endswith("b") and unit != "b" else unit
        if unit in _TIMES:
            number *= _TIMES[unit]
        elif size in _UNITS:
            number *= _UNITS[size]
        elif unit not in ("%", "b"):
            return words
        return f"{number:.6f}".rstrip("0").rstrip(".")
    return words


def spell(value: str) -> str:
    """The value as gluster is told it: YAML's booleans arrive here as True and False."""
    return {"True": "on", "False": "off"}.get(value, value)


def version_tuple(version: str) -> tuple[int, ...]:
    if not re.fullmatch(r"\d+(\.\d+)*", version):
        raise Refused(f"{version!r} is not a version number such as 11.1")
    parts = [int(part) for part in version.split(".")]
    while len(parts) > 1 and parts[-1] == 0:
        parts.pop()
    return tuple(parts)


def split_options(options: Iterable[Option], version: str | None) -> tuple[list[Option], list[Option]]:
    """Options for this version of gluster, and the others. An unknown version takes all."""
    fitting: list[Option] = []
    skipped: list[Option] = []
    for option in options:
        low = version_tuple(option.min_version) if option.min_version else None
        high = version_tuple(option.max_version) if option.max_version else None
        have = version_tuple(version) if version else None
        fits = have is None or ((low is None or have >= low) and (high is None or have <= high))
        (fitting if fits else skipped).append(option)
    return fitting, skipped


# --- decisions ----------------------------------------------------------------------------


def check_names(nodes: Sequence[str], node: str, absent: Sequence[str]) -> None:
    """Refuse lists that contradict themselves."""
    if len(set(nodes)) != len(nodes):
        raise Refused(f"nodes names a host twice: {', '.join(nodes)}")
    if node not in nodes:
        raise Refused(f"{node} is not one of the nodes {', '.join(nodes)}")
    strangers = [name for name in absent if name not in nodes]
    if strangers:
        raise Refused(
            f"absent names {', '.join(strangers)}, the nodes are {', '.join(nodes)}; use the names of the inventory"
        )
    if node in absent:
        raise Refused(f"{node} is named as absent, yet this runs on it; take it out of absent")


def identify(
    pool: Sequence[Peer],
    nodes: Sequence[str],
    node: str,
    resolve: Callable[[str], frozenset[str]],
) -> Members:
    """Match the pool's entries with the wanted names; by address where no name fits."""
    peers: dict[str, Peer] = {}
    unnamed: list[Peer] = []
    for peer in pool:
        if peer.local:
            continue
        name = next((name for name in nodes if name != node and name in peer.hostnames), None)
        if name is None:
            unnamed.append(peer)
        else:
            peers[name] = peer
    misnamed: list[str] = []
    unexpected: list[str] = []
    for peer in unnamed:
        addresses = frozenset().union(*(resolve(name) for name in peer.hostnames))
        name = next(
            (name for name in nodes if name != node and name not in peers and addresses & resolve(name)),
            None,
        )
        if name is None:
            unexpected.append(peer.hostnames[0])
        else:
            peers[name] = peer
            misnamed.append(name)
    return Members(peers, tuple(n for n in nodes if n in misnamed), tuple(unexpected))


def coordinator(nodes: Sequence[str], node: str, members: Members, absent: Sequence[str] = ()) -> str:
    """The node that may change things, as `node` sees it.

    The first node in the agreed order that is not known to be away. A node that this one has
    never met is not known to be away: a node on its own leaves the work to the first one.
    """
    for name in nodes:
        if name == node:
            return name
        if name in absent:
            continue
        peer = members.peers.get(name)
        if peer is None or peer.connected:
            return name
    raise Refused(f"{node} is not one of the nodes {', '.join(nodes)}")


def away(nodes: Sequence[str], members: Members, absent: Sequence[str] = ()) -> list[str]:
    """Known peers that are not connected and were not declared absent."""
    return [
        name for name in nodes if name in members.peers and name not in absent and not members.peers[name].connected
    ]


def unready(nodes: Sequence[str], node: str, members: Members, absent: Sequence[str]) -> list[str]:
    """Wanted nodes that are not full, connected members of the pool, with what was seen."""
    seen = []
    for name in nodes:
        if name == node or name in absent:
            continue
        peer = members.peers.get(name)
        if peer is None:
            seen.append(f"{name}: not in the pool")
        elif not peer.ready:
            link = "connected" if peer.connected else "disconnected"
            seen.append(f"{name}: {peer.state_text or peer.state}, {link}")
    return seen


def join_words(words: Sequence[str]) -> str:
    return " and ".join(words) if len(words) < 3 else f"{', '.join(words[:-1])} and {words[-1]}"


def is_are(words: Sequence[str]) -> str:
    return f"{join_words(words)} {'is' if len(words) == 1 else 'are'}"


def advice_away(names: Sequence[str]) -> str:
    return (
        f"{is_are(names)} not connected; bring {'it' if len(names) == 1 else 'them'} back and "
        f"run again, or roll out on the other nodes with -e absent={','.join(names)}"
    )


def advice_absent(absent: Sequence[str]) -> str:
    back = "it is back" if len(absent) == 1 else "they are back"
    return f"{is_are(absent)} absent; run again when {back}"


# --- plan: peers --------------------------------------------------------------------------


@dataclass(frozen=True)
class PeerPlan:
    probe: tuple[str, ...] = ()  # nodes to add
    rename: tuple[str, ...] = ()  # nodes to make known by their name, from this node
    settling: tuple[str, ...] = ()  # members that are not yet "Peer in Cluster"
    pending: tuple[str, ...] = ()  # what waits for absent nodes
    away: tuple[str, ...] = ()  # set if the change must wait for these nodes
    refusal: str | None = None

    @property
    def empty(self) -> bool:
        return not (self.probe or self.rename or self.settling or self.refusal)


def plan_peers(nodes: Sequence[str], node: str, members: Members, absent: Sequence[str] = ()) -> PeerPlan:
    """Steps towards a pool of all nodes, as seen by `node`, whoever is to take them."""
    others = [name for name in nodes if name != node]
    rejected = [name for name in others if name in members.peers and members.peers[name].state == PEER_REJECTED]
    pending = [f"{name} is not in the pool" for name in absent if name not in members.peers] + [
        f"{name} is rejected by the pool" for name in rejected if name in absent
    ]
    rejected = [name for name in rejected if name not in absent]
    if rejected:
        return PeerPlan(pending=tuple(pending), refusal=explain_rejection(nodes, node, members, rejected))
    missing = [name for name in others if name not in members.peers and name not in absent]
    down = away(nodes, members, absent)
    if missing and absent:
        return PeerPlan(
            pending=tuple(pending),
            refusal=(
                f"{is_are(missing)} not in the pool, and the pool is not changed while a node "
                f"is left out: {advice_absent(absent)}"
            ),
        )
    if missing and down:
        return PeerPlan(
            pending=tuple(pending),
            away=tuple(down),
            refusal=f"{is_are(missing)} not in the pool, and adding needs every node: " + advice_away(down),
        )
    misnamed = [name for name in members.misnamed if name not in absent]
    if absent or down or missing:  # names wait until everybody is there
        pending += [f"{name} is known to the pool under another name" for name in misnamed]
        misnamed = []
    return PeerPlan(
        probe=tuple(missing),
        rename=tuple(misnamed),
        settling=tuple(
            name
            for name in others
            if name in members.peers and name not in absent and members.peers[name].state != PEER_IN_CLUSTER
        ),
        pending=tuple(pending),
    )


def explain_rejection(nodes: Sequence[str], node: str, members: Members, rejected: Sequence[str]) -> str:
    """Who is the odd one out, and what to do there. Never advises to wipe a majority."""
    fine = [name for name in nodes if name == node or (name in members.peers and members.peers[name].ready)]
    seen = f"{node} sees {join_words(rejected)} as Peer Rejected: configurations of volumes differ; nothing was changed"
    if len(fine) > len(rejected):
        odd, good = list(rejected), fine[0]
    elif len(rejected) > len(fine):
        odd, good = fine, rejected[0]
    else:
        return (
            f"{seen}. As many nodes agree with {node} as do not, so it cannot be told who is right: compare "
            "/var/lib/glusterd/vols on all nodes"
        )
    return (
        f"{seen}. {join_words(odd)} differs from the others: there stop glusterd, put "
        f"/var/lib/glusterd/vols aside, copy that directory from {good}, start glusterd and run again"
    )


def renamer(nodes: Sequence[str], node: str, target: str, members: Members) -> str:
    """Who makes `target` known by its name: the first other node that is there."""
    return next(
        name
        for name in nodes
        if name != target and (name == node or (name in members.peers and members.peers[name].connected))
    )


# --- plan: volume -------------------------------------------------------------------------


@dataclass(frozen=True)
class VolumeSpec:
    name: str
    bricks: tuple[str, ...]
    replicas: int = 3
    transport: str = "tcp"
    state: str = "started"
    options: tuple[Option, ...] = ()  # those that fit this version
    exclusive: bool = False
    force: bool = False


@dataclass(frozen=True)
class VolumePlan:
    create: bool = False
    stop: bool = False
    start: bool = False
    set: tuple[tuple[str, str], ...] = ()
    reset: tuple[str, ...] = ()
    drift: tuple[dict[str, Any], ...] = ()
    pending: tuple[str, ...] = ()
    away: tuple[str, ...] = ()  # set if the change must wait for these nodes
    refusal: str | None = None

    @property
    def empty(self) -> bool:
        return not (self.create or self.stop or self.start or self.set or self.reset or self.refusal)

    @property
    def words(self) -> list[str]:
        """The plan for people."""
        return (
            ["create the volume"] * self.create
            + ["stop the volume"] * self.stop
            + [f"set {name} to {value}" for name, value in self.set]
            + [f"reset {name}" for name in self.reset]
            + ["start the volume"] * self.start
        )


def check_spec(spec: VolumeSpec, nodes: Sequence[str]) -> None:
    """Refuse a description that must never become a volume."""
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]*", spec.name) or spec.name == "all":
        raise Refused(f"{spec.name!r} is not a name for a volume (letters, digits, _ and -)")
    if spec.replicas < 3 or spec.replicas % 2 == 0:
        raise Refused(
            f"replicas is {spec.replicas}; it must be odd and at least 3: with an even number "
            "of replicas neither half can outvote the other"
        )
    if not spec.bricks or len(spec.bricks) % spec.replicas:
        raise Refused(
            f"{len(spec.bricks)} bricks are not a multiple of {spec.replicas} replicas: "
            f"{', '.join(spec.bricks) or 'none'}"
        )
    for brick in spec.bricks:
        host, separator, path = brick.partition(":")
        if not separator or not re.fullmatch(r"(/[^/\s:]+)+", path):
            raise Refused(f"brick {brick!r} is not of the form HOST:/ABSOLUTE/PATH")
        if host not in nodes:
            raise Refused(f"brick {brick} is on {host}, the nodes are {', '.join(nodes)}")
    if len(set(spec.bricks)) != len(spec.bricks):
        raise Refused(f"a brick is named twice: {', '.join(spec.bricks)}")
    for group in replica_sets(spec.bricks, spec.replicas):
        if len({brick.partition(":")[0] for brick in group}) != spec.replicas:
            raise Refused(f"two replicas of one file would be on one host: {', '.join(sorted(group))}")
    names = [option.name for option in spec.options]
    for option in spec.options:
        if not re.fullmatch(r"[a-z]+(\.[A-Za-z0-9_-]+)+", option.name):
            raise Refused(f"option {option.name!r} needs its full name, as network.ping-timeout")
        if names.count(option.name) > 1:
            raise Refused(f"option {option.name} is given twice for this version of gluster")
        if not option.value.strip():
            raise Refused(f"option {option.name} has no value")


def replica_sets(bricks: Sequence[str], replicas: int) -> list[frozenset[str]]:
    """Bricks in groups that hold the same files; the order within a group has no meaning."""
    if replicas < 1:
        return [frozenset(bricks)]
    return [frozenset(bricks[i : i + replicas]) for i in range(0, len(bricks), replicas)]


def mismatch(spec: VolumeSpec, found: Volume) -> str | None:
    """Why an existing volume is not the wanted one and cannot be made so."""
    advice = (
        "nothing was changed. Put what was found into the inventory, or, if its data is not "
        f"needed, remove it by hand (gluster volume stop {spec.name}; gluster volume delete "
        f"{spec.name}) and run again"
    )
    unexpected = [brick for brick in found.bricks if brick not in spec.bricks]
    missing = [brick for brick in spec.bricks if brick not in found.bricks]
    if unexpected or missing:
        return (
            f"volume {spec.name} exists with other bricks: found "
            f"{join_words(unexpected) or 'nothing more'}, expected "
            f"{join_words(missing) or 'nothing more'}; {advice}"
        )
    if found.type not in ("Replicate", "Distributed-Replicate") or found.arbiters:
        kind = f"{found.type} with arbiter" if found.arbiters else found.type
        return (
            f"volume {spec.name} exists with the type {kind} on {', '.join(found.bricks)}; "
            f"a replicated volume without arbiter was expected; {advice}"
        )
    if found.replicas != spec.replicas:
        return (
            f"volume {spec.name} exists with {found.replicas} replicas on "
            f"{', '.join(found.bricks)}; {spec.replicas} were expected; {advice}"
        )
    wanted_sets = set(replica_sets(spec.bricks, spec.replicas))
    if set(replica_sets(found.bricks, found.replicas)) != wanted_sets:
        return (
            f"volume {spec.name} exists with its bricks grouped in another way: found "
            f"{', '.join(found.bricks)}, expected {', '.join(spec.bricks)}; {advice}"
        )
    if found.transport != spec.transport:
        return (
            f"volume {spec.name} exists with the transport {found.transport}; {spec.transport} was expected; {advice}"
        )
    return None


def option_drift(spec: VolumeSpec, found: Volume) -> list[dict[str, Any]]:
    """Options that differ from the profile, and options that the profile does not know."""
    drift: list[dict[str, Any]] = []
    for option in spec.options:
        have = found.options.get(option.name)
        if have is None or normalise(option.name, have) != normalise(option.name, option.value):
            drift.append(
                {
                    "name": option.name,
                    "found": have,
                    "wanted": spell(option.value),
                    "reason": option.reason,
                }
            )
    known = {option.name for option in spec.options} | SET_BY_GLUSTER
    drift += [
        {"name": name, "found": value, "wanted": None, "reason": "not in the profile"}
        for name, value in sorted(found.options.items())
        if name not in known
    ]
    return drift


def plan_volume(
    spec: VolumeSpec,
    found: Volume | None,
    nodes: Sequence[str],
    node: str,
    members: Members,
    absent: Sequence[str] = (),
    *,
    pool_pending: bool = False,
) -> VolumePlan:
    """Steps from what was found to what is wanted, or the reason why not.

    `pool_pending` (check mode): missing peers are about to be added, so they do not count.
    """
    missing = [n for n in nodes if n != node and n not in absent and n not in members.peers]
    down = away(nodes, members, absent)
    if found is None:
        create = VolumePlan(
            create=True,
            start=spec.state == "started",
            set=tuple((option.name, spell(option.value)) for option in spec.options),
        )
        reason = f"volume {spec.name} does not exist, and creating it needs every node: "
        if absent:
            return VolumePlan(refusal=reason + advice_absent(absent))
        if down:
            return VolumePlan(refusal=reason + advice_away(down), away=tuple(down))
        if missing and not pool_pending:
            return VolumePlan(
                refusal=f"{reason}{is_are(missing)} not in the pool; add "
                f"{'it' if len(missing) == 1 else 'them'} with gluster_peer first",
                away=tuple(missing),
            )
        return create

    wrong = mismatch(spec, found)
    if wrong:
        return VolumePlan(refusal=wrong)

    drift = option_drift(spec, found)
    changes = tuple((d["name"], d["wanted"]) for d in drift if d["wanted"] is not None)
    resets = tuple(
        d["name"] for d in drift if spec.exclusive and d["wanted"] is None and d["name"] not in SWITCHED_ELSEWHERE
    )
    start = spec.state == "started" and not found.started
    stop = spec.state == "stopped" and found.started
    plan = VolumePlan(stop=stop, start=start, set=changes, reset=resets, drift=tuple(drift))
    if plan.empty:
        return plan

    if absent:
        if stop:
            return VolumePlan(
                drift=plan.drift,
                refusal=f"volume {spec.name} is not stopped while a node is left out: " + advice_absent(absent),
            )
        here = [n for n in nodes if n == node or (n in members.peers and members.peers[n].ready)]
        if start and 2 * len(here) <= len(nodes):
            return VolumePlan(
                drift=plan.drift,
                refusal=f"volume {spec.name} is stopped, and {join_words(here)} of "
                f"{len(nodes)} nodes are no majority to start it: {advice_absent(absent)}",
            )
        waits = f"waits for {join_words(list(absent))}"
        pending = [
            f"volume {spec.name}: {d['name']} is {d['found'] or 'not set'}, wanted {d['wanted']} ({waits})"
            for d in drift
            if d["wanted"] is not None
        ] + [f"volume {spec.name}: {name} is not in the profile ({waits})" for name in resets]
        return VolumePlan(start=start, drift=plan.drift, pending=tuple(pending))
    if down or missing:
        advice = advice_away(down) if down else f"{is_are(missing)} not in the pool; add with gluster_peer first"
        return VolumePlan(
            drift=plan.drift,
            refusal=f"volume {spec.name} needs a change ({'; '.join(plan.words)}), and a change "
            f"needs every node: {advice}",
            away=tuple(down or missing),
        )
    return plan


def plan_commands(spec: VolumeSpec, plan: VolumePlan) -> list[tuple[str, ...]]:
    """The plan as arguments of gluster, in order: options come before the start."""
    commands: list[tuple[str, ...]] = []
    if plan.create:
        replica = ("replica", str(spec.replicas), "transport", spec.transport)
        force = ("force",) if spec.force else ()
        commands.append(("volume", "create", spec.name, *replica, *spec.bricks, *force))
    if plan.stop:
        commands.append(("volume", "stop", spec.name))
    if plan.set:
        commands.append(("volume", "set", spec.name, *(word for pair in plan.set for word in pair)))
    commands += [("volume", "reset", spec.name, name) for name in plan.reset]
    if plan.start:
        commands.append(("volume", "start", spec.name))
    return commands


def predict(spec: VolumeSpec, found: Volume | None, plan: VolumePlan) -> dict[str, Any]:
    """The volume after the plan, as `describe` shows it."""
    options = dict(found.options) if found else {}
    options.update(plan.set)
    for name in plan.reset:
        options.pop(name, None)
    status = found.status if found else "Created"
    if plan.start:
        status = "Started"
    if plan.stop:
        status = "Stopped"
    return {
        "name": spec.name,
        "status": status,
        "replicas": spec.replicas,
        "bricks": list(found.bricks if found else spec.bricks),
        "options": dict(sorted(options.items())),
    }


def describe(found: Volume | None) -> dict[str, Any]:
    """The parts of a volume that a diff shows."""
    if found is None:
        return {}
    return {
        "name": found.name,
        "status": found.status,
        "replicas": found.replicas,
        "bricks": list(found.bricks),
        "options": dict(sorted(found.options.items())),
    }


def plain(item: Any) -> dict[str, Any]:
    """A dataclass as module output."""
    data = asdict(item)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in data.items()}


# --- the outside world --------------------------------------------------------------------

_BUSY = re.compile(
    r"another transaction is in progress|locking (failed|volume)|"
    r"unable to (get|acquire) lock|failed to acquire lock|operation already in progress",
    re.IGNORECASE,
)
_NO_TEXT = ", no text"
READ_PATIENCE = 15.0  # seconds
_NO_DAEMON = re.compile(r"connection failed|is gluster ?d(aemon)? (running|operational)", re.I)


@dataclass
class Cli:
    """Runs gluster with a hard time-out, in the C locale, and never through a shell.

    `run_command` is AnsibleModule.run_command; `changing` collects the commands that change.
    """

    run_command: Callable[..., tuple[int, str, str]]
    host: str
    timeout: int = 120
    program: str = "gluster"
    changing: list[str] = field(default_factory=list)

    def version(self) -> str:
        return parse_version(self._run([self.program, "--version"])[1])

    def pool(self) -> list[Peer]:
        return self._ask(parse_pool, "pool", "list")

    def volumes(self) -> list[Volume]:
        return self._ask(parse_volumes, "volume", "info", "all")

    def volume(self, name: str) -> Volume | None:
        return next((volume for volume in self.volumes() if volume.name == name), None)

    def status(self, volume: Volume) -> list[BrickStatus]:
        return self._ask(lambda text: parse_status(text, volume), "volume", "status", volume.name)

    def heal(self, name: str) -> list[BrickHeal]:
        return self._ask(parse_heal, "volume", "heal", name, "info", "summary")

    def change(self, *arguments: str, patience: float = 60) -> None:
        """Run a command that changes the cluster; wait while another transaction runs."""
        deadline = time.monotonic() + patience
        while True:
            try:
                self.xml(*arguments)
                self.changing.append(shlex.join(["gluster", *arguments]))
                return
            except GlusterBusy:
                if time.monotonic() >= deadline:
                    raise
            time.sleep(1)

    def xml(self, *arguments: str) -> str:
        """The text of a successful answer."""
        command = [self.program, "--mode=script", "--xml", *arguments]
        code, out, err = self._run(command, check=False)
        words: str | None
        try:
            words = parse_failure(out)
        except GlusterError as error:
            if code == 0:
                raise GlusterError(error.message, command, self.host) from error
            words = _shorten(f"{out} {err}".strip()) or f"exit code {code} and no text"
        if words is None and code != 0:
            words = _shorten(err) or f"exit code {code} and no text"
        if words is None:
            return out
        if _NO_DAEMON.search(words):
            raise GlusterUnavailable(
                f"glusterd does not answer ({words}); look at 'systemctl status glusterd' and "
                f"'journalctl -u glusterd' on {self.host}",
                command,
                self.host,
            )
        kind = GlusterBusy if _BUSY.search(words) else GlusterError
        raise kind(words, command, self.host)

    def _ask(self, reader: Callable[[str], T], *arguments: str) -> T:
        """Read something. While a peer joins, glusterd refuses reads for a moment, without a word: ask again then."""
        deadline = time.monotonic() + READ_PATIENCE
        while True:
            try:
                text = self.xml(*arguments)
                break
            except GlusterError as error:
                passing = isinstance(error, GlusterBusy) or error.message.endswith(_NO_TEXT)
                if not passing or time.monotonic() >= deadline:
                    raise
            time.sleep(0.5)
        try:
            return reader(text)
        except GlusterError as error:
            raise GlusterError(error.message, [self.program, *arguments], self.host) from error

    def _run(self, command: list[str], check: bool = True) -> tuple[int, str, str]:
        full = ["timeout", "-k", "5", str(self.timeout), *command]
        code, out, err = self.run_command(full, environ_update={"LC_ALL": "C", "LANG": "C", "LANGUAGE": "C"})
        if code in (124, 137):
            raise GlusterSlow(
                f"no answer within {self.timeout} s; the change may still go on, run again",
                command,
                self.host,
            )
        if code in (126, 127) and not out.strip():
            raise GlusterMissing(
                f"{self.program} cannot be run ({_shorten(err) or 'no text'}); is glusterfs-server installed?",
                command,
                self.host,
            )
        if check and code != 0:
            raise GlusterError(_shorten(f"{out} {err}"), command, self.host)
        return code, out, err


def poll(read: Callable[[], T], done: Callable[[T], bool], patience: float, interval: float = 0.5) -> T:
    """Read until `done`, or until patience ends; the last reading either way."""
    deadline = time.monotonic() + patience
    while True:
        value = read()
        if done(value) or time.monotonic() >= deadline:
            return value
        time.sleep(interval)


def wait_until(read: Callable[[], T], unmet: Callable[[T], str], patience: float, what: str, host: str = "") -> T:
    """Read until `unmet` has nothing to say; at the deadline fail with what it said."""
    value = poll(read, lambda seen: not unmet(seen), patience)
    words = unmet(value)
    if words:
        raise GlusterError(f"waited {patience:g} s for {what}; seen last: {words}", host=host)
    return value


def resolve(name: str) -> frozenset[str]:
    """The addresses of a name, none if it is unknown."""
    try:
        return frozenset(str(entry[4][0]) for entry in socket.getaddrinfo(name, None, type=socket.SOCK_STREAM))
    except OSError:
        return frozenset()


def never_pooled(state: str = "/var/lib/glusterd") -> bool:
    """True where glusterd has neither peers nor volumes, running or not."""
    return not any(
        os.path.isdir(path) and os.listdir(path) for path in (os.path.join(state, "peers"), os.path.join(state, "vols"))
    )


def read_or_predict(module: Any, read: Callable[[], T], empty: T) -> T:
    """The reading. In check mode a node that glusterd never ran on counts as empty.

    A first run in check mode finds nothing installed or started, yet has a certain outcome.
    """
    try:
        return read()
    except (GlusterMissing, GlusterUnavailable) as error:
        if not (module.check_mode and never_pooled()):
            raise
        module.warn(f"predicted as for a node without pool and volumes: {error.message}")
        return empty
