#!/usr/bin/python3 -I
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""The peer watcher: sees a silent or hung node of the pool within a second, and fences it so that GlusterFS goes on.

The first half decides and does nothing else: no clock, no socket, no process. The second half asks the brick, talks to
the other watchers, and carries out what was decided. docs/peer-watch.md tells why it is so.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import hashlib
import hmac
import ipaddress
import itertools
import json
import os
import re
import secrets
import select
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

CONFIG = "/etc/tribrick/peer-watch.json"
CONTROL = "/run/tribrick-peer-watch/control"
OK, SICK, NONE = "ok", "sick", "none"  # of a brick: it answers, it does not, there is no process that could
NODE, BRICK = "node", "brick"  # what a fence shuts off
FENCE, PARDON = "fence", "pardon"  # what an operator orders
LARGEST = 8192  # bytes of a message
LONGEST_ORDER = 3600.0


# --- messages ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class Vote:
    """What a node would have fenced. The port is the brick's, and 0 where the whole node is meant."""

    target: str
    kind: str
    port: int = 0


@dataclass(frozen=True)
class Order:
    """What an operator wants of all watchers, for so many more seconds."""

    act: str
    target: str = ""
    kind: str = BRICK
    left: float = 0.0


@dataclass(frozen=True)
class Beat:
    """One heartbeat."""

    sender: str
    boot: str  # chosen at random when the watcher starts
    count: int
    echo: Mapping[str, str] = field(default_factory=dict)  # the other watchers' boots, as last heard
    brick: str = NONE
    port: int = 0
    vote: Vote | None = None
    order: Order | None = None
    expires: float | None = None  # when the node's first certificate ends
    bye: bool = False


def seal(key: bytes, beat: Beat) -> bytes:
    """Return a heartbeat as it goes over the wire: its HMAC-SHA256, then JSON."""
    body = json.dumps(asdict(beat), separators=(",", ":")).encode()
    return hmac.new(key, body, hashlib.sha256).digest() + body


def unseal(key: bytes, data: bytes) -> Beat:
    """Return the heartbeat of a datagram; ValueError for whatever is none, or was made with another key."""
    mac, body = data[:32], data[32:]
    if not hmac.compare_digest(mac, hmac.new(key, body, hashlib.sha256).digest()):
        raise ValueError("not signed with this site's key")
    try:
        given = json.loads(body)
        vote, order, expires = given["vote"], given["order"], given["expires"]
        beat = Beat(
            sender=str(given["sender"]),
            boot=str(given["boot"]),
            count=int(given["count"]),
            echo={str(name): str(boot) for name, boot in given["echo"].items()},
            brick=str(given["brick"]),
            port=int(given["port"]),
            vote=None if vote is None else Vote(str(vote["target"]), str(vote["kind"]), int(vote["port"])),
            order=None
            if order is None
            else Order(str(order["act"]), str(order["target"]), str(order["kind"]), float(order["left"])),
            expires=None if expires is None else float(expires),
            bye=bool(given["bye"]),
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"no heartbeat: {error}") from error
    if beat.brick not in {OK, SICK, NONE} or (beat.vote and beat.vote.kind not in {NODE, BRICK}):
        raise ValueError("a heartbeat of another version")
    return beat


# --- the verdicts ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """What a watcher goes by; times in seconds."""

    node: str
    nodes: tuple[str, ...]
    ports: tuple[int, int]  # first and last port of bricks
    interval: float = 0.2  # between two heartbeats
    silence: float = 0.8  # after which a peer is not heard any more
    answer: float = 0.7  # in which a brick must answer
    well: float = 1.0  # for which a peer must be well again before a vote is taken back
    lifetime: float = 3.0  # of an element of the sets, unless it is refreshed
    stall: float = 0.5  # between two looks after which this watcher itself was stopped
    quick: int = 3  # fences of a peer within `window` before the next one has to wait
    window: float = 600.0
    longest_wait: float = 30.0
    margin: float = 86400.0  # before a certificate ends: no fence

    @property
    def majority(self) -> int:
        """Of all nodes of the inventory, whether they are up or not."""
        return len(self.nodes) // 2 + 1


@dataclass
class Peer:
    """What is known of another node."""

    boot: str = ""
    offered: str = ""  # the boot of its latest message, which is echoed; believed once it echoes ours
    count: int = -1
    retired: set[str] = field(default_factory=set)  # its earlier boots; nothing of them is believed again
    known: bool = False  # heard since this watcher started, and not gone in order
    heard: float = 0.0
    brick: str = NONE
    port: int = 0
    vote: Vote | None = None
    order: Order | None = None
    order_heard: float = 0.0
    expires: float | None = None
    since: float | None = None  # when what speaks against it began
    well: float | None = None  # since when nothing does
    fenced: deque[float] = field(default_factory=deque)  # when it was fenced, of late


class Judge:
    """Decides: which heartbeats count, whom this node votes for, and what it shuts off.

    Time is handed in. One vote at a time, a majority of all nodes for a fence: so at most one node is fenced.
    """

    def __init__(self, rules: Rules, boot: str, now: float) -> None:
        self.rules, self.boot = rules, boot
        self.peers = {name: Peer() for name in rules.nodes if name != rules.node}
        self.count = 0
        self.brick, self.port = NONE, 0
        self.expires: float | None = None
        self.vote: Vote | None = None
        self.fence: Vote | None = None
        self.order: Order | None = None
        self.order_ends = 0.0
        self.barred = ""  # why no vote is given at present
        self.news: list[str] = []  # for the journal
        self.counters = dict.fromkeys(("verdicts_node", "verdicts_brick", "replays", "stalls"), 0)
        self._looked = now
        self._greet = False  # somebody new waits for an echo
        self._given = ("", now)  # the last target of a vote of ours, and until when it was

    # What comes in.

    def hear(self, beat: Beat, now: float) -> bool:
        """Take a heartbeat; return whether it counts. It does not when it may have been sent before."""
        peer = self.peers.get(beat.sender)
        if peer is None or beat.boot in peer.retired:
            self.counters["replays"] += 1
            return False
        if beat.boot != peer.offered:
            peer.offered, self._greet = beat.boot, True
        if beat.boot != peer.boot:
            # Recorded messages carry an earlier boot: theirs, which is retired, or ours, which they echo.
            if beat.echo.get(self.rules.node) != self.boot:
                return False
            if peer.boot:
                peer.retired.add(peer.boot)
            peer.boot, peer.count = beat.boot, -1
        if beat.count <= peer.count:
            self.counters["replays"] += 1
            return False
        peer.count, peer.heard, peer.known = beat.count, now, not beat.bye
        peer.brick, peer.port, peer.expires = beat.brick, beat.port, beat.expires
        peer.vote = None if beat.bye else beat.vote
        peer.order, peer.order_heard = (None if beat.bye else beat.order), now
        if beat.order and beat.order.act == PARDON:
            self._forget_fences_ordered()
        if beat.bye:
            self.news.append(f"the watcher of {beat.sender} was stopped in order")
        return True

    def refused(self, name: str) -> None:
        """The peer's kernel says that no watcher runs there: the node lives, and nobody speaks for its brick."""
        peer = self.peers[name]
        if peer.known:
            self.news.append(f"no watcher runs on {name}, but its kernel answers")
        peer.known, peer.vote, peer.order = False, None, None

    def command(self, order: Order, now: float) -> None:
        """Take an operator's order, given here."""
        self.order, self.order_ends = order, now + order.left
        self.news.append(f"ordered: {order.act} {order.target} {order.kind if order.act == FENCE else ''}".rstrip())

    # What goes out.

    def beat(self, now: float, bye: bool = False) -> Beat:
        """Return the next heartbeat."""
        self.count += 1
        order = self.order and Order(self.order.act, self.order.target, self.order.kind, self.order_ends - now)
        echo = {name: peer.offered for name, peer in self.peers.items() if peer.offered}
        self._greet = False
        return Beat(
            self.rules.node, self.boot, self.count, echo, self.brick, self.port, self.vote, order, self.expires, bye
        )

    # The verdict.

    def look(self, now: float, wall: float) -> bool:
        """Judge anew; return whether the others should hear of it at once."""
        before = (self.vote, self.fence)
        gap, self._looked = now - self._looked, now
        if gap > self.rules.stall:
            self._after_a_stall(gap, now)
        if self.order and now >= self.order_ends:
            self.order = None
        for name, peer in self.peers.items():
            if self.symptom(name, now) is None:
                peer.since, peer.well = None, now if peer.well is None else peer.well
            else:
                peer.since, peer.well = now if peer.since is None else peer.since, None
        self.barred = self._bar(now, wall)
        self._vote(now)
        self._judge(now)
        return self._greet or before != (self.vote, self.fence)

    def symptom(self, name: str, now: float) -> Vote | None:
        """What speaks against a peer: the vote that it would get."""
        peer = self.peers[name]
        if not peer.known:
            return None
        if now - peer.heard > self.rules.silence:
            return Vote(name, NODE)
        if peer.brick == SICK and self._is_port(peer.port):
            return Vote(name, BRICK, peer.port)
        return None

    def patience(self, name: str, now: float) -> float:
        """Seconds for which something must speak against a peer before it gets the vote: more with each fence."""
        fenced = self.peers[name].fenced
        while fenced and now - fenced[0] > self.rules.window:
            fenced.popleft()
        if len(fenced) < self.rules.quick:
            return 0.0
        doublings = min(len(fenced) - self.rules.quick, 10)
        return float(min(self.rules.longest_wait, self.rules.silence * 2**doublings))

    def _is_port(self, port: int) -> bool:
        first, last = self.rules.ports
        return first <= port <= last

    def _after_a_stall(self, gap: float, now: float) -> None:
        """Whoever was stopped knows nothing of the others: begin to listen anew, without a vote."""
        self.counters["stalls"] += 1
        self.news.append(f"this watcher was stopped for {gap:.1f} s; it listens anew before it votes")
        self._withdraw(now)
        for peer in self.peers.values():
            peer.vote = None
            if peer.known:
                peer.heard = now

    def _forget_fences_ordered(self) -> None:
        if self.order and self.order.act == FENCE:
            self.order = None

    def _orders(self, now: float) -> list[Order]:
        """All orders that stand: the one given here, and those of peers that are heard."""
        heard = [
            peer.order
            for peer in self.peers.values()
            if peer.order and now - peer.order_heard < min(peer.order.left, self.rules.silence)
        ]
        return ([self.order] if self.order else []) + heard

    def _ordered(self, now: float) -> Vote | None:
        """The vote that an operator asks for, where this node may give it."""
        for order in sorted((o for o in self._orders(now) if o.act == FENCE), key=lambda o: (o.target, o.kind)):
            peer = self.peers.get(order.target)
            if peer is not None and order.kind == NODE:
                return Vote(order.target, NODE)
            if peer is not None and order.kind == BRICK and self._is_port(peer.port):
                return Vote(order.target, BRICK, peer.port)
        return None

    def _bar(self, now: float, wall: float) -> str:
        """Why nobody may be fenced; empty when nothing is in the way."""
        if any(order.act == PARDON for order in self._orders(now)):
            return "an operator has lifted all fences"
        ends = {self.rules.node: self.expires} | {n: p.expires for n, p in self.peers.items() if p.known}
        for name, end in sorted(ends.items()):
            if end is None:
                return f"{name} cannot tell when its certificates end"
            if end - wall < self.rules.margin:
                # A fence makes every client connect again, which it then perhaps could not.
                return f"a certificate of {name} ends within a day"
        return ""

    def _withdraw(self, now: float) -> None:
        if self.vote:
            self._given, self.vote = (self.vote.target, now), None

    def _vote(self, now: float) -> None:
        """Keep, change or take back the one vote."""
        ordered = self._ordered(now)
        if self.barred:
            return self._withdraw(now)
        if self.vote:
            name = self.vote.target
            well = self.peers[name].well
            if ordered and ordered.target == name:
                self.vote = ordered
            elif found := self.symptom(name, now):
                self.vote = found
            elif well is None or now - well >= self.rules.well or not self.peers[name].known:
                self._withdraw(now)
        if self.vote is None:
            self.vote = self._choice(ordered, now)
        return None

    def _choice(self, ordered: Vote | None, now: float) -> Vote | None:
        """Whom to vote for, with a vote that is free."""
        since = sorted((peer.since, name) for name, peer in self.peers.items() if peer.since is not None)
        ripe = [name for began, name in since if now - began >= self.patience(name, now)]
        choice = ordered or next((self.symptom(name, now) for name in ripe), None)
        last, ended = self._given
        # What others made of the last vote must be over before another one is given, else two nodes could be fenced.
        if choice and last and choice.target != last and now - ended < self.rules.silence + self.rules.lifetime:
            return None
        return choice

    def votes(self, now: float) -> dict[str, Vote]:
        """The votes that count at present, by who gave them."""
        found = {
            name: peer.vote
            for name, peer in self.peers.items()
            if peer.vote and peer.known and peer.vote.target != name and now - peer.heard <= self.rules.silence
        }
        return found | ({self.rules.node: self.vote} if self.vote else {})

    def _judge(self, now: float) -> None:
        """Shut off what a majority of all nodes votes for."""
        votes = self.votes(now)
        fence = None
        for target in self.rules.nodes:
            given = [vote for vote in votes.values() if vote.target == target]
            if len(given) >= self.rules.majority:
                fence = self._verdict(target, given)
        if fence == self.fence:
            return
        if self.fence and (not fence or fence.target != self.fence.target):
            self.news.append(f"verdict over: {self.fence.target} is not fenced any more")
        if fence and (not self.fence or (fence.target, fence.kind) != (self.fence.target, self.fence.kind)):
            self.counters[f"verdicts_{fence.kind}"] += 1
            said = {"node": "node silent", "brick": f"brick sick, port {fence.port}"}[fence.kind]
            self.news.append(f"verdict: {fence.target} is fenced ({said}), by the votes of {', '.join(sorted(votes))}")
        target = fence.target if fence else ""
        if target in self.peers and (not self.fence or self.fence.target != target) and not self._ordered(now):
            self.peers[target].fenced.append(now)
        self.fence = fence

    def _verdict(self, target: str, given: Sequence[Vote]) -> Vote | None:
        """What this node shuts off: the node where a majority cannot hear it, else its brick's port alone."""
        if sum(vote.kind == NODE for vote in given) >= self.rules.majority:
            # The silent node itself has nothing to shut off: it would cut itself from all others.
            return None if target == self.rules.node else Vote(target, NODE)
        own = self.port if target == self.rules.node else self.peers[target].port
        ports = [port for port in (own, *(vote.port for vote in given)) if self._is_port(port)]
        return Vote(target, BRICK, ports[0]) if ports else None


# --- certificates, and where the brick listens ---------------------------------------------------


def _element(data: bytes, at: int) -> tuple[int, int, int]:
    """Return tag, start and end of the DER element at a position."""
    tag, length, start = data[at], data[at + 1], at + 2
    if length & 0x80:
        more = length & 0x7F
        length, start = int.from_bytes(data[start : start + more], "big"), start + more
    if start + length > len(data):
        raise ValueError("a certificate that breaks off")
    return tag, start, start + length


def expiry(der: bytes) -> float:
    """Return when a certificate ends, in seconds since 1970. The standard library reads this of CAs only."""
    try:
        _, at, _ = _element(der, 0)  # the certificate
        _, at, _ = _element(der, at)  # what was signed
        if der[at] == 0xA0:  # its version
            at = _element(der, at)[2]
        for _ in range(3):  # number, algorithm, issuer
            at = _element(der, at)[2]
        _, at, _ = _element(der, at)  # its validity
        at = _element(der, at)[2]
        tag, start, end = _element(der, at)
        text = der[start:end].decode("ascii")
        form = {0x17: "%y%m%d%H%M%SZ", 0x18: "%Y%m%d%H%M%SZ"}[tag]
        return datetime.strptime(text, form).replace(tzinfo=timezone.utc).timestamp()
    except (IndexError, KeyError) as error:
        raise ValueError(f"no certificate: {error!r}") from error


def first_expiry(paths: Iterable[str]) -> float | None:
    """Return when the first of the certificates in these files ends; None when one cannot be read."""
    ends = []
    try:
        for path in paths:
            blocks = re.findall(
                "-----BEGIN CERTIFICATE-----.*?-----END CERTIFICATE-----", Path(path).read_text("ascii"), re.DOTALL
            )
            ends += [expiry(ssl.PEM_cert_to_DER_cert(block)) for block in blocks]
            if not blocks:
                return None
    except (OSError, ValueError):
        return None
    return min(ends, default=None)


def brick_port(words: Sequence[str], path: str) -> int:
    """Return the port of a brick's process by its command line; 0 when it is another process."""
    options = dict(itertools.pairwise(words))
    if not words or os.path.basename(words[0]) != "glusterfsd" or options.get("--brick-name") != path:
        return 0
    port = options.get("--brick-port", "")
    return int(port) if port.isdigit() else 0


def find_brick(path: str, root: str = "/proc") -> int:
    """Return the port on which the brick of a directory listens here; 0 when it has no process."""
    for entry in os.scandir(root):
        if entry.name.isdigit():
            try:
                words = Path(entry.path, "cmdline").read_bytes().decode(errors="replace").split("\0")
            except OSError:  # it has ended
                continue
            if port := brick_port(words, path):
                return port
    return 0


# --- asking the own brick ---------------------------------------------------------------------

# GlusterFS's own ping (program GF-DUMP): a call without credentials. The brick's network threads answer it, whatever
# its disk does; a disk that hangs is found by GlusterFS's health check, which ends the brick.
PING_PROGRAM, PING_VERSION, PING_PROCEDURE = 123451501, 1, 2


def ping_call(number: int) -> bytes:
    """Return the ping as a record of Sun RPC."""
    call = struct.pack(">10I", number, 0, 2, PING_PROGRAM, PING_VERSION, PING_PROCEDURE, 0, 0, 0, 0)
    return struct.pack(">I", 0x80000000 | len(call)) + call


class Probe(threading.Thread):
    """Asks the own brick over and over, one question at a time, and waits for each answer however long it takes.

    It asks at the loopback address, which no fence shuts off. Any answer counts, also one that refuses the certificate:
    the question is whether the brick's process runs. A connection that is refused means that there is no process; then
    the kernel has told the clients, and nothing has to be fenced.
    """

    def __init__(self, brick: str, address: str, context: ssl.SSLContext, pause: float, clock: Callable[[], float]):
        super().__init__(name="probe", daemon=True)
        self.brick, self.address, self.context, self.pause, self.clock = brick, address, context, pause, clock
        self.asked: float | None = None  # when the question was put that is not answered yet
        self.found, self.port = NONE, 0
        self.refusal = ""

    def state(self, now: float, limit: float) -> tuple[str, int]:
        """Return what may be said of the brick, and its port."""
        asked = self.asked
        return (SICK if asked is not None and now - asked > limit else self.found), self.port

    def run(self) -> None:
        """Ask for ever."""
        while True:
            port = find_brick(self.brick)
            if not port:
                self.found, self.port, self.asked = NONE, 0, None
            else:
                self.port = port
                self._talk(port)
            time.sleep(self.pause)  # between two connections; the watcher does not wait for this thread

    def _talk(self, port: int) -> None:
        """Ping on one connection until it ends."""
        number = 0
        self.asked = self.clock()
        try:
            with socket.create_connection((self.address, port)) as plain, self.context.wrap_socket(plain) as secure:
                while True:
                    number = number % 0x7FFFFFFF + 1
                    self.asked = self.clock()
                    secure.sendall(ping_call(number))
                    self._answer(secure)
                    self.found, self.asked, self.refusal = OK, None, ""
                    time.sleep(self.pause)  # between two questions: this is the probe's rate
        except ssl.SSLError as error:  # an alert is an answer
            self.found, self.refusal = OK, str(error)
        except OSError:
            # Closed or refused: there is nobody, or somebody else by now. The next look tells.
            self.found = NONE
        self.asked = None

    @staticmethod
    def _answer(secure: ssl.SSLSocket) -> None:
        """Read one record."""
        head = Probe._exactly(secure, 4)
        Probe._exactly(secure, min(struct.unpack(">I", head)[0] & 0x7FFFFFFF, LARGEST))

    @staticmethod
    def _exactly(secure: ssl.SSLSocket, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = secure.recv(size - len(data))
            if not more:
                raise ConnectionResetError("the brick closed the connection")
            data += more
        return data


# --- shutting off -------------------------------------------------------------------------------

TABLE = "inet tribrick_peer_watch"
NFT, SS = "/usr/sbin/nft", "/usr/bin/ss"
GLUSTERD, _NEW = 24007, "tcp flags & (syn | ack) == syn"


def table(first: int, last: int) -> str:
    """Return the table: sets whose elements run out, and rules that answer with a TCP reset.

    Resets themselves pass, so that the other side hears of the end, too. What leaves is answered to our own sockets,
    what comes from a silent node to its.

    To a silent node's glusterd no new connection is made: a client asks it where the brick is, the kernel of a node
    that hangs takes the connection, and a TLS handshake that nobody answers keeps GlusterFS's network threads in a loop
    at full load. Connections that there are stay.
    """
    ports = f"{first}-{last}"
    rules = {
        "output": [
            "ip daddr . tcp dport @brick_ipv4 counter reject with tcp reset",
            "ip6 daddr . tcp dport @brick_ipv6 counter reject with tcp reset",
            *_node_rules("daddr", ports),
            f"ip daddr @node_ipv4 tcp dport {GLUSTERD} {_NEW} counter reject with tcp reset",
            f"ip6 daddr @node_ipv6 tcp dport {GLUSTERD} {_NEW} counter reject with tcp reset",
        ],
        "input": _node_rules("saddr", ports),
    }
    chains = "".join(
        f"  chain {name} {{\n    type filter hook {name} priority filter - 20; policy accept;\n"
        "    tcp flags & rst == rst accept\n" + "".join(f"    {rule}\n" for rule in lines) + "  }\n"
        for name, lines in rules.items()
    )
    sets = "".join(
        f"  set {kind}_{family} {{ type {family}_addr{more}; flags timeout; }}\n"
        for kind, more in (("brick", " . inet_service"), ("node", ""))
        for family in ("ipv4", "ipv6")
    )
    return f"table {TABLE} {{}}\ndelete table {TABLE}\ntable {TABLE} {{\n{sets}{chains}}}\n"


def _node_rules(side: str, ports: str) -> list[str]:
    return [
        f"{family} {side} @node_{kind} tcp {end} {ports} counter reject with tcp reset"
        for family, kind in (("ip", "ipv4"), ("ip6", "ipv6"))
        for end in ("dport", "sport")
    ]


def elements(fence: Vote | None, addresses: Mapping[str, str], lifetime: float) -> str:
    """Return the transaction that makes the sets say what is to be fenced, and nothing else."""
    script = "".join(f"flush set {TABLE} {kind}_{family}\n" for kind in (BRICK, NODE) for family in ("ipv4", "ipv6"))
    if fence:
        address = addresses[fence.target]
        family = f"ipv{ipaddress.ip_address(address).version}"
        what = f"{address} . {fence.port}" if fence.kind == BRICK else address
        script += f"add element {TABLE} {fence.kind}_{family} {{ {what} timeout {round(lifetime * 1000)}ms }}\n"
    return script


def kill_filter(fence: Vote, addresses: Mapping[str, str], first: int, last: int) -> list[str]:
    """Return ss's expression for the connections to end."""
    address = addresses[fence.target]
    shown = f"[{address}]" if ":" in address else address
    if fence.kind == BRICK:
        return ["dst", shown, "and", "dport", "=", f":{fence.port}"]
    there = f"( dport >= :{first} and dport <= :{last} )"
    here = f"( sport >= :{first} and sport <= :{last} )"
    return ["dst", shown, "and", *f"( {there} or {here} )".split()]


def run(words: Sequence[str], given: str = "") -> str:
    """Run a program for at most two seconds; return what it printed, or fail with a sentence."""
    try:
        done = subprocess.run(
            words, input=given, capture_output=True, text=True, timeout=2, check=False, env={"LC_ALL": "C"}
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise RuntimeError(f"{words[0]}: {error}") from error
    if done.returncode != 0:
        raise RuntimeError(f"{words[0]} gave {done.returncode}: {(done.stderr or done.stdout).strip()[:300]}")
    return done.stdout


class Hands(threading.Thread):
    """Keeps nftables as the verdict wants it, and ends connections; apart from the heartbeats, which must not wait."""

    def __init__(
        self, addresses: Mapping[str, str], ports: tuple[int, int], lifetime: float, certificates: Sequence[str]
    ) -> None:
        super().__init__(name="hands", daemon=True)
        self.addresses, self.ports, self.lifetime, self.certificates = addresses, ports, lifetime, certificates
        self.expires = first_expiry(certificates)
        self.wanted: Vote | None = None
        self.killed, self.failures = 0, 0
        self._changed = threading.Event()

    def want(self, fence: Vote | None) -> None:
        """Set what is to be fenced from now on."""
        if fence != self.wanted:
            self.wanted = fence
            self._changed.set()

    def run(self) -> None:
        """Carry out changes at once, and refresh what stands three times in its lifetime."""
        last: Vote | None = None
        read = 0
        while True:
            self._changed.wait(self.lifetime / 3)
            self._changed.clear()
            read += 1
            if read % 60 == 0:
                self.expires = first_expiry(self.certificates)
            fence = self.wanted
            if fence or last:
                try:
                    self.act(fence)
                    last = fence
                except RuntimeError as error:
                    self.failures += 1
                    say(f"cannot fence: {error}", 3)

    def act(self, fence: Vote | None) -> None:
        """Bring the sets to this verdict; end the connections that it means."""
        script = elements(fence, self.addresses, self.lifetime)
        try:
            run([NFT, "-f", "-"], script)
        except RuntimeError:
            # Somebody flushed the whole ruleset.
            run([NFT, "-f", "-"], table(*self.ports) + script)
        if fence:
            killed = len(run([SS, "-KHtn", *kill_filter(fence, self.addresses, *self.ports)]).splitlines())
            if killed:
                self.killed += killed
                say(f"connections with {fence.target} ended: {killed}", 6)


def check_means() -> None:
    """Fail with a sentence where connections cannot be ended; better at the start than in need."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(server.getsockname()) as client:
            run([SS, "-KHtn", "dst", "127.0.0.1", "and", "dport", "=", f":{port}"])
            client.settimeout(1)
            try:
                if client.recv(1) == b"":
                    return
            except ConnectionError:
                return
            except TimeoutError:
                pass
    raise RuntimeError("ss -K ends no connection here (CONFIG_INET_DIAG_DESTROY, CAP_NET_ADMIN): no fence is possible")


# --- the service --------------------------------------------------------------------------------


def say(text: str, level: int = 5) -> None:
    """Write a line to the journal; a journal that hangs loses it, rather than keeping the heartbeats waiting."""
    with contextlib.suppress(BlockingIOError):
        os.write(2, f"<{level}>{text}\n".encode())


def notify(text: str) -> None:
    """Tell systemd."""
    path = os.environ.get("NOTIFY_SOCKET", "")
    if path:
        with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as channel:
            channel.sendto(text.encode(), path.replace("@", "\0", 1) if path.startswith("@") else path)


def lock_memory() -> None:
    """Keep every page in memory: a watcher that waits for the disk sees nothing."""
    current_and_future = 3
    if ctypes.CDLL(None, use_errno=True).mlockall(current_and_future) != 0:
        say(f"memory cannot be locked: {os.strerror(ctypes.get_errno())}", 4)


def credential(name: str) -> str:
    """Return the path of a secret that systemd handed over."""
    return os.path.join(os.environ["CREDENTIALS_DIRECTORY"], name)


class Service:
    """Ties the parts together: one loop for heartbeats, orders and the verdict."""

    def __init__(self, config: Mapping[str, Any], key: bytes, context: ssl.SSLContext) -> None:
        self.config, self.key = config, key
        self.addresses: dict[str, str] = config["nodes"]
        ports = (config["first_port"], config["last_port"])
        rules = Rules(
            node=config["node"],
            nodes=tuple(self.addresses),
            ports=ports,
            interval=config["interval"],
            silence=config["silence"],
            answer=config["answer"],
        )
        self.rules = rules
        own = self.addresses[rules.node]
        family = socket.AF_INET6 if ":" in own else socket.AF_INET
        self.judge = Judge(rules, secrets.token_hex(16), time.monotonic())
        self.probe = Probe(
            config["brick"], "::1" if ":" in own else "127.0.0.1", context, rules.interval, time.monotonic
        )
        self.hands = Hands(self.addresses, ports, rules.lifetime, config["certificates"])
        self.foreign = 0  # datagrams that were not ours
        self.ends = False
        self.sockets = {name: self._socket(family, own, name) for name in self.judge.peers}

    def _socket(self, family: int, own: str, peer: str) -> socket.socket:
        """One for each peer: connected, so that it hears that peer alone, and the answer that nobody listens there."""
        channel = socket.socket(family, socket.SOCK_DGRAM)
        channel.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        channel.setblocking(False)
        channel.bind((own, self.config["port"]))
        channel.connect((self.addresses[peer], self.config["port"]))
        return channel

    def run(self) -> None:
        """Watch until systemd says stop."""
        check_means()
        run([NFT, "-f", "-"], table(*self.rules.ports))
        self.probe.start()
        self.hands.start()
        control = self._listen()
        signal.signal(signal.SIGTERM, lambda *_: setattr(self, "ends", True))
        notify("READY=1")
        say(f"watching {', '.join(self.judge.peers)}; a fence takes {self.rules.majority} votes", 6)
        self._loop(control)
        for _ in range(2):
            self._send(bye=True)

    def _listen(self) -> socket.socket:
        control = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        Path(CONTROL).unlink(missing_ok=True)
        control.bind(CONTROL)
        control.listen(4)
        control.setblocking(False)
        return control

    def _loop(self, control: socket.socket) -> None:
        poll = select.poll()
        names = {channel.fileno(): name for name, channel in self.sockets.items()}
        callers: dict[int, socket.socket] = {}
        for number in (control.fileno(), *names):
            poll.register(number, select.POLLIN)
        beaten = 0.0
        while not self.ends:
            for number, _ in poll.poll(50):
                if number in names:
                    self._receive(names[number])
                elif number == control.fileno():
                    caller, _ = control.accept()
                    caller.setblocking(False)
                    callers[caller.fileno()] = caller
                    poll.register(caller, select.POLLIN)
                else:
                    poll.unregister(number)
                    self._serve(callers.pop(number))
            now = time.monotonic()
            if self._look(now) or now - beaten >= self.rules.interval:
                self._send()
                beaten = now
                notify("WATCHDOG=1")

    def _look(self, now: float) -> bool:
        """Judge, have it carried out, and say what is new; return whether the peers should know at once."""
        judge = self.judge
        before = judge.brick
        judge.brick, judge.port = self.probe.state(now, self.rules.answer)
        judge.expires = self.hands.expires
        if before != judge.brick:
            said = {OK: "answers", SICK: "does not answer", NONE: "has no process"}[judge.brick]
            say(f"the brick of this node {said}", 4 if judge.brick == SICK else 5)
        changed = judge.look(now, time.time())
        self.hands.want(judge.fence)
        while judge.news:
            line = judge.news.pop(0)
            say(line, 4 if line.startswith("verdict: ") else 5)
        return changed or before != judge.brick

    def _send(self, bye: bool = False) -> None:
        data = seal(self.key, self.judge.beat(time.monotonic(), bye))
        for name, channel in self.sockets.items():
            try:
                channel.send(data)
            except ConnectionRefusedError:
                self.judge.refused(name)
            except OSError:
                # No way there at present. The silence will tell.
                continue

    def _receive(self, name: str) -> None:
        try:
            beat = unseal(self.key, self.sockets[name].recv(LARGEST))
        except ConnectionRefusedError:
            self.judge.refused(name)
        except OSError:
            # No way there, or nothing to read after all.
            return
        except ValueError:
            self.foreign += 1
        else:
            if beat.sender == name:
                self.judge.hear(beat, time.monotonic())
            else:
                self.foreign += 1

    def _serve(self, caller: socket.socket) -> None:
        """Answer one call of the command line."""
        with caller:
            try:
                answer = self._answer(json.loads(caller.recv(LARGEST)))
            except (OSError, ValueError, KeyError, TypeError) as error:
                answer = {"error": str(error)}
            try:
                caller.send(json.dumps(answer).encode())
            except OSError:
                return

    def _answer(self, call: Mapping[str, Any]) -> dict[str, Any]:
        now = time.monotonic()
        if call["do"] != "status":
            order = Order(str(call["do"]), str(call["target"]), str(call["kind"]), float(call["left"]))
            if order.act not in {FENCE, PARDON} or (order.act == FENCE and order.target not in self.rules.nodes):
                raise ValueError(f"no node '{order.target}'; there are {', '.join(self.rules.nodes)}")
            if order.kind not in {BRICK, NODE}:
                raise ValueError(f"'{order.kind}' is neither {BRICK} nor {NODE}")
            if not 0 < order.left <= LONGEST_ORDER:
                raise ValueError(f"give a time up to {LONGEST_ORDER:.0f} s")
            if order.act == FENCE and self.judge.barred:
                raise ValueError(f"nobody is fenced at present: {self.judge.barred}")
            self.judge.command(order, now)
        return self._status(now)

    def _status(self, now: float) -> dict[str, Any]:
        judge = self.judge
        peers = {
            name: {
                "heard": round(now - peer.heard, 2) if peer.known else None,
                "brick": peer.brick if peer.known else None,
                "vote": asdict(peer.vote) if peer.vote else None,
                "fences": len(peer.fenced),
            }
            for name, peer in judge.peers.items()
        }
        return {
            "node": self.rules.node,
            "majority": self.rules.majority,
            "brick": judge.brick,
            "port": judge.port,
            "refusal": self.probe.refusal,
            "vote": asdict(judge.vote) if judge.vote else None,
            "fence": asdict(judge.fence) if judge.fence else None,
            "barred": judge.barred,
            "peers": peers,
            "counters": {
                **judge.counters,
                "foreign": self.foreign,
                "connections_ended": self.hands.killed,
                "failures": self.hands.failures,
            },
        }


def give_up(caught: threading.ExceptHookArgs) -> None:
    """End the service with a thread that failed: without it a watcher would look healthy and see nothing."""
    say(f"{caught.exc_type.__name__}: {caught.exc_value}", 3)
    os._exit(1)


def watch() -> int:
    """Run the service."""
    threading.excepthook = give_up
    threading.stack_size(512 * 1024)  # all of it is locked
    os.set_blocking(2, False)
    config = json.loads(Path(CONFIG).read_text(encoding="utf-8"))
    key = Path(credential("key")).read_bytes().strip()
    if len(key) < 32:
        say("the key has less than 32 characters", 3)
        return 1
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    # It asks its own host whether somebody answers, and tells nothing.
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.load_cert_chain(credential("certificate"), credential("certificate-key"))
    lock_memory()
    try:
        Service(config, key, context).run()
    except (RuntimeError, OSError) as error:
        say(str(error), 3)
        return 1
    return 0


# --- the command line ---------------------------------------------------------------------------


def seconds(text: str) -> float:
    """Read a time such as 30, 60s or 2m."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?)(s|m)?", text)
    if not found or not 0 < (time_ := float(found[1]) * (60 if found[2] == "m" else 1)) <= LONGEST_ORDER:
        raise argparse.ArgumentTypeError(f"'{text}' is no time from 1s to {LONGEST_ORDER / 60:.0f}m")
    return time_


def ask(call: Mapping[str, Any]) -> dict[str, Any]:
    """Ask the watcher of this node."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
        channel.settimeout(3)
        channel.connect(CONTROL)
        channel.send(json.dumps(call).encode())
        answer: dict[str, Any] = json.loads(channel.recv(1 << 16))
    return answer


def settled(call: Mapping[str, Any], reached: Callable[[Mapping[str, Any]], bool], limit: float) -> dict[str, Any]:
    """Give an order, and wait until it shows or the time is up."""
    status = ask(call)
    end = time.monotonic() + limit
    while "error" not in status and not reached(status) and time.monotonic() < end:
        time.sleep(0.05)  # the service tells when it is asked; ask again until `end`
        status = ask({"do": "status"})
    return status


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    main_parser = argparse.ArgumentParser(
        prog="peer_watch",
        description="The watcher of the pool's nodes: what it sees, and fences by hand. It answers in JSON.",
        epilog="Each line of its journal: journalctl -u tribrick-peer-watch",
    )
    commands = main_parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("status", help="what this node's watcher sees, its vote, and who is fenced")
    fence = commands.add_parser(
        "fence",
        help="have a node fenced by all watchers",
        description="Ask all watchers to fence a node. It takes the votes of a majority, as every fence does.",
    )
    fence.add_argument("peer", metavar="PEER", help="the node's name in the inventory")
    fence.add_argument("--for", dest="left", type=seconds, default=60.0, metavar="TIME", help="60s, 2m (default: 60s)")
    fence.add_argument(
        "--kind",
        choices=[BRICK, NODE],
        default=BRICK,
        help="brick: connections to its brick, on all nodes, without an error anywhere; node: GlusterFS to and from "
        "it, on the other nodes, with errors on its own mount (default: brick)",
    )
    unfence = commands.add_parser("unfence", help="lift every fence, on all nodes, and fence nobody for a while")
    unfence.add_argument(
        "--for", dest="left", type=seconds, default=10.0, metavar="TIME", help="nobody is fenced (default: 10s)"
    )
    commands.add_parser("run", help="the service itself; systemd starts it")
    return main_parser


def main(words: Sequence[str] | None = None) -> int:
    """Do what the command line says."""
    given = parser().parse_args(words)
    if given.command == "run":
        return watch()
    try:
        if given.command == "fence":
            call = {"do": FENCE, "target": given.peer, "kind": given.kind, "left": given.left}
            status = settled(call, lambda seen: bool(seen["fence"] and seen["fence"]["target"] == given.peer), 2.0)
            if "error" not in status and not (status["fence"] and status["fence"]["target"] == given.peer):
                node = status["node"] == given.peer and given.kind == NODE
                status["error"] = (
                    f"{given.peer} fences nothing itself; ask another node" if node else "no majority in two seconds"
                )
        elif given.command == "unfence":
            call = {"do": PARDON, "target": "", "kind": BRICK, "left": given.left}
            status = settled(call, lambda seen: not seen["fence"], 2.0)
        else:
            status = ask({"do": "status"})
    except (OSError, ValueError) as error:
        status = {"error": f"the watcher of this node does not answer ({error}): systemctl status tribrick-peer-watch"}
    print(json.dumps(status, indent=2))
    return 1 if "error" in status else 0


if __name__ == "__main__":
    sys.exit(main())
