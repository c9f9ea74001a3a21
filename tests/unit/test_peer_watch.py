"""The peer watcher: its verdicts in a simulated pool, and what can be seen of its other half without root."""

from __future__ import annotations

import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import random
import signal
import socket
import ssl
import struct
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import serialization

from kit.inventory import make_ca

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = ROOT / "roles/peer_watch/files/peer_watch.py"
STEP = 0.05
WALL = 1_800_000_000.0
YEAR = 365 * 86400.0


def load() -> ModuleType:
    spec = importlib.util.spec_from_file_location("peer_watch", PROGRAM)
    assert spec and spec.loader
    module = importlib.util.module_from_spec(spec)
    sys.modules["peer_watch"] = module
    written, sys.dont_write_bytecode = sys.dont_write_bytecode, True
    spec.loader.exec_module(module)
    sys.dont_write_bytecode = written
    return module


watch = load()
Vote, Order, Beat = watch.Vote, watch.Order, watch.Beat


class Pool:
    """Watchers that send each other heartbeats in simulated time; each fault is a set or a function."""

    def __init__(self, size: int = 3) -> None:
        self.names = tuple(f"node{number}" for number in range(1, size + 1))
        self.now, self.wall = 1000.0, WALL
        self.cut: set[tuple[str, str]] = set()  # (from, to)
        self.hung: set[str] = set()  # nodes whose processes are stopped
        self.sick: set[str] = set()  # nodes whose bricks do not answer
        self.judges = {name: self.start(name) for name in self.names}
        self.beaten = dict.fromkeys(self.names, 0.0)
        self.sent: list[tuple[float, Any]] = []
        self.targets: list[set[str]] = []  # of each step, who was fenced by anybody
        self.run(1)

    def start(self, name: str) -> Any:
        rules = watch.Rules(name, self.names, (49152, 49251))
        judge = watch.Judge(rules, f"boot-{name}-{self.now}", self.now)
        judge.expires, judge.brick, judge.port = WALL + YEAR, watch.OK, 49152
        return judge

    def restart(self, name: str) -> None:
        self.judges[name] = self.start(name)

    def deliver(self, beat: Any) -> None:
        for other, judge in self.judges.items():
            if other != beat.sender and (beat.sender, other) not in self.cut and other not in self.hung:
                judge.hear(beat, self.now)

    def send(self, name: str, bye: bool = False) -> None:
        beat = self.judges[name].beat(self.now, bye)
        self.sent.append((self.now, beat))
        self.beaten[name] = self.now
        self.deliver(beat)

    def step(self) -> None:
        self.now, self.wall = self.now + STEP, self.wall + STEP
        for name, judge in self.judges.items():
            if name in self.hung:
                continue
            brick = watch.SICK if name in self.sick else watch.OK
            told, judge.brick = judge.brick != brick, brick
            if judge.look(self.now, self.wall) or told or self.now - self.beaten[name] >= judge.rules.interval:
                self.send(name)
        self.targets.append({judge.fence.target for judge in self.judges.values() if judge.fence})

    def run(self, seconds: float) -> None:
        for _ in range(round(seconds / STEP)):
            self.step()

    def until_fenced(self, who: str, target: str, limit: float = 5) -> float:
        """Return the seconds until a node fences another one."""
        begun = self.now
        while not ((fence := self.judges[who].fence) and fence.target == target):
            self.step()
            assert self.now - begun < limit, self.fences()
        return self.now - begun

    def isolate(self, name: str) -> None:
        self.cut |= {pair for pair in itertools.permutations(self.names, 2) if name in pair}

    def fences(self) -> dict[str, Any]:
        return {name: judge.fence for name, judge in self.judges.items() if name not in self.hung}

    def nobody(self) -> bool:
        return not any(self.fences().values())


def order(pool: Pool, at: str, target: str, kind: str = "brick", left: float = 1.0) -> None:
    pool.judges[at].command(Order("fence", target, kind, left), pool.now)


# --- verdicts


def test_a_well_pool_fences_nobody() -> None:
    pool = Pool()
    pool.run(60)
    assert not set().union(*pool.targets)
    assert not any(judge.vote for judge in pool.judges.values())


@pytest.mark.parametrize("size", [3, 6])
def test_a_silent_node_is_fenced_by_the_others_within_a_second(size: int) -> None:
    pool = Pool(size)
    pool.isolate("node2")
    assert pool.until_fenced("node1", "node2") <= 1.1
    pool.run(0.1)
    expected = dict.fromkeys(pool.names, Vote("node2", "node")) | {"node2": None}
    assert pool.fences() == expected
    # It lasts as long as the silence, and ends with it.
    pool.run(30)
    assert pool.fences() == expected
    pool.cut.clear()
    pool.run(1.5)
    assert pool.nobody()


def test_a_hung_node_is_fenced_and_fences_nobody_when_it_goes_on() -> None:
    pool = Pool()
    pool.hung = {"node3"}
    assert pool.until_fenced("node1", "node3") <= 1.1
    pool.run(20)
    pool.hung = set()
    pool.targets.clear()
    pool.run(3)
    # node3 had heard nobody for 20 s, and was itself the one who was stopped.
    assert set().union(*pool.targets) == {"node3"}
    assert pool.judges["node3"].counters["stalls"] == 1
    assert pool.nobody()


def test_a_hung_brick_is_fenced_by_all_at_its_port_alone() -> None:
    pool = Pool()
    pool.sick = {"node2"}
    assert pool.until_fenced("node1", "node2") <= 0.2
    pool.run(0.1)
    assert set(pool.fences().values()) == {Vote("node2", "brick", 49152)}
    pool.sick = set()
    pool.run(1.5)
    assert pool.nobody()


def test_a_sick_brick_on_a_node_that_one_peer_cannot_hear_is_no_silent_node() -> None:
    pool = Pool()
    pool.sick, pool.cut = {"node2"}, {("node2", "node1"), ("node1", "node2")}
    pool.until_fenced("node3", "node2")
    pool.run(2)
    # node2 hears one vote of two, and shuts off nothing of its own.
    sick = Vote("node2", "brick", 49152)
    assert pool.fences() == {"node1": sick, "node2": None, "node3": sick}


def test_one_vote_is_no_majority() -> None:
    pool = Pool()
    pool.send("node3", bye=True)
    pool.hung = {"node3"}
    pool.run(0.3)
    pool.hung.add("node2")
    pool.run(30)
    assert pool.judges["node1"].vote == Vote("node2", "node")
    assert pool.nobody()


def test_majority_is_of_the_inventory_not_of_who_is_heard() -> None:
    pool = Pool(6)
    for name in ("node4", "node5", "node6"):
        pool.isolate(name)
    pool.run(30)
    assert pool.nobody(), "three of six are no majority"
    assert [watch.Rules("a", tuple("abcdefghi"[:n]), (1, 2)).majority for n in (3, 4, 5, 6, 9)] == [2, 3, 3, 4, 5]


def test_a_node_alone_fences_nobody() -> None:
    pool = Pool()
    pool.cut = set(itertools.permutations(pool.names, 2))
    pool.run(60)
    assert pool.nobody()


@pytest.mark.parametrize("size", [3, 6])
def test_a_single_cut_link_fences_nobody(size: int) -> None:
    """The bridge: two nodes do not hear each other, all others hear both."""
    pool = Pool(size)
    pool.cut = {("node1", "node2"), ("node2", "node1")}
    pool.run(60)
    assert not set().union(*pool.targets)


@pytest.mark.parametrize("cut", [("node1", "node2"), ("node2", "node1")])
def test_a_link_cut_one_way_fences_nobody(cut: tuple[str, str]) -> None:
    pool = Pool()
    pool.cut = {cut}
    pool.run(60)
    assert not set().union(*pool.targets)


def test_a_node_that_hears_nobody_fences_nobody() -> None:
    pool = Pool()
    pool.cut = {("node1", "node2"), ("node3", "node2")}
    pool.run(60)
    assert not set().union(*pool.targets)


def test_a_node_that_nobody_hears_is_silent_and_shuts_off_nothing_itself() -> None:
    pool = Pool()
    pool.cut = {("node2", "node1"), ("node2", "node3")}
    pool.until_fenced("node1", "node2")
    pool.run(2)
    assert pool.fences() == {"node1": Vote("node2", "node"), "node2": None, "node3": Vote("node2", "node")}


def test_two_sick_nodes_never_two_fences() -> None:
    pool = Pool(6)
    pool.sick = {"node2", "node5"}
    pool.run(10)
    assert set().union(*pool.targets) == {"node2"}
    pool.sick = {"node5"}
    pool.run(10)
    assert pool.targets[-1] == {"node5"}
    assert max(map(len, pool.targets)) == 1
    # Between the two: elements that nobody refreshes have run out before the next node is fenced.
    free = [number for number, targets in enumerate(pool.targets) if not targets and number > 40]
    assert len(free) * STEP >= pool.judges["node1"].rules.lifetime


@pytest.mark.parametrize("seed", range(20))
def test_whatever_happens_at_most_one_node_is_fenced(seed: int) -> None:
    chance = random.Random(seed)
    pool = Pool(chance.choice([3, 3, 6]))
    links = list(itertools.permutations(pool.names, 2))
    for _ in range(12):
        pool.cut = set(chance.sample(links, chance.randrange(len(links) // 2)))
        pool.sick = {name for name in pool.names if chance.random() < 0.3}
        pool.hung = {name for name in pool.names if chance.random() < 0.2}
        pool.run(chance.choice([0.3, 1.2, 4]))
    live = [{f.target for n, f in pool.fences().items() if f}]
    assert max(map(len, pool.targets + live)) <= 1


def test_fences_need_no_word_of_the_fenced() -> None:
    """The votes of the target itself do not count against itself, nor for it."""
    pool = Pool()
    beat = dataclasses.replace(pool.judges["node2"].beat(pool.now), vote=Vote("node2", "brick", 49152))
    pool.judges["node1"].hear(beat, pool.now)
    assert "node2" not in pool.judges["node1"].votes(pool.now)


def test_a_port_outside_the_bricks_range_is_never_shut_off() -> None:
    pool = Pool()
    for port in (22, 24007, 0, 65536):
        pool.judges["node2"].port = port
        pool.sick = {"node2"}
        pool.run(5)
        assert pool.nobody(), port


# --- who is gone, not silent


def test_a_watcher_stopped_in_order_is_no_silent_node() -> None:
    pool = Pool()
    pool.send("node2", bye=True)
    pool.hung = {"node2"}
    pool.run(60)
    assert not set().union(*pool.targets)


def test_a_kernel_that_answers_for_a_dead_watcher_is_no_silent_node() -> None:
    pool = Pool()
    pool.hung = {"node2"}
    for name in ("node1", "node3"):
        pool.judges[name].refused("node2")
    pool.run(60)
    assert not set().union(*pool.targets)


def test_a_restarted_watcher_is_heard_again_at_once() -> None:
    pool = Pool()
    pool.restart("node2")
    pool.run(0.6)
    assert not set().union(*pool.targets)
    assert all(pool.judges[name].peers["node2"].boot == pool.judges["node2"].boot for name in ("node1", "node3"))
    pool.isolate("node2")
    assert pool.until_fenced("node1", "node2") <= 1.1


def test_a_node_never_heard_gets_no_vote() -> None:
    pool = Pool()
    pool.hung = {"node2"}
    pool.restart("node1")
    pool.restart("node3")
    pool.run(30)
    assert pool.nobody()


# --- time


def test_a_watcher_that_was_stopped_listens_anew_before_it_votes() -> None:
    pool = Pool()
    judge = pool.judges["node1"]
    judge.look(pool.now + 30, WALL)
    assert judge.vote is None and judge.counters["stalls"] == 1
    judge.look(pool.now + 30.1, WALL)
    assert judge.vote is None


def test_a_stop_ends_the_vote_and_the_fence() -> None:
    pool = Pool()
    pool.isolate("node2")
    pool.until_fenced("node1", "node2")
    judge = pool.judges["node1"]
    judge.look(pool.now + 5, pool.wall)
    assert (judge.vote, judge.fence) == (None, None)


@pytest.mark.parametrize("jump", [-10 * YEAR, -3600.0, 3600.0])
def test_a_jump_of_the_wall_clock_fences_nobody_and_hinders_no_fence(jump: float) -> None:
    pool = Pool()
    pool.wall += jump
    pool.run(5)
    assert pool.nobody()
    pool.isolate("node2")
    assert pool.until_fenced("node1", "node2") <= 1.1


def test_a_wall_clock_in_the_far_future_fences_nobody() -> None:
    pool = Pool()
    pool.wall += 2 * YEAR
    pool.isolate("node2")
    pool.run(10)
    assert pool.nobody()
    assert "ends within a day" in pool.judges["node1"].barred


@pytest.mark.parametrize("name", ["node1", "node2"])
@pytest.mark.parametrize("left", [86399.0, 0.0, -5.0, None])
def test_no_fence_within_a_day_of_the_end_of_any_certificate(name: str, left: float | None) -> None:
    pool = Pool()
    pool.judges[name].expires = None if left is None else pool.wall + left
    pool.run(1)
    pool.isolate("node2")
    pool.run(10)
    assert pool.nobody()
    assert name in pool.judges["node3"].barred


def test_a_fence_ends_when_a_certificate_has_a_day_left() -> None:
    pool = Pool()
    for judge in pool.judges.values():
        judge.expires = pool.wall + 86400 + 5
    pool.isolate("node2")
    pool.until_fenced("node1", "node2")
    pool.run(6)
    assert pool.nobody()


def test_flapping_is_answered_later_each_time_and_forgotten_in_time() -> None:
    pool = Pool()
    waits = []
    for _ in range(8):
        pool.isolate("node2")
        waits.append(pool.until_fenced("node1", "node2", 40))
        pool.cut.clear()
        pool.run(3)
    assert max(waits[:3]) <= 1.1
    assert all(later > earlier + 0.5 for earlier, later in itertools.pairwise(waits[2:7])), waits
    assert max(waits) < 32
    pool.run(601)
    pool.isolate("node2")
    assert pool.until_fenced("node1", "node2") <= 1.1


def test_flapping_faster_than_it_is_seen_fences_nobody() -> None:
    pool = Pool()
    for _ in range(50):
        pool.isolate("node2")
        pool.run(0.4)
        pool.cut.clear()
        pool.run(0.4)
    assert not set().union(*pool.targets)


# --- orders


@pytest.mark.parametrize("at", ["node1", "node2", "node3"])
def test_a_hundred_false_verdicts(at: str) -> None:
    """Each is carried out by all, is over in time, and does not slow down a true one."""
    pool = Pool()
    for _ in range(100):
        order(pool, at, "node2", left=0.5)
        pool.run(0.3)
        assert set(pool.fences().values()) == {Vote("node2", "brick", 49152)}
        pool.run(1.7)
        assert pool.nobody()
    pool.isolate("node2")
    assert pool.until_fenced("node1", "node2") <= 1.1


def test_an_order_against_a_node_reaches_the_others_only() -> None:
    pool = Pool()
    order(pool, "node1", "node2", "node", 5)
    pool.run(0.3)
    assert pool.fences() == {"node1": Vote("node2", "node"), "node2": None, "node3": Vote("node2", "node")}


def test_an_order_is_no_second_fence() -> None:
    pool = Pool()
    pool.isolate("node2")
    pool.until_fenced("node1", "node2")
    order(pool, "node1", "node3", left=10)
    pool.run(10)
    assert max(map(len, pool.targets)) == 1
    assert pool.judges["node1"].fence.target == "node2"


@pytest.mark.parametrize("at", ["node1", "node2", "node3"])
def test_unfence_lifts_everything_everywhere_for_its_time(at: str) -> None:
    pool = Pool()
    order(pool, "node1", "node2", left=60)
    pool.run(0.5)
    assert not pool.nobody()
    pool.judges[at].command(Order("pardon", left=5.0), pool.now)
    pool.run(0.4)
    assert pool.nobody()
    # Nobody is fenced meanwhile, whatever happens.
    silent = "node3" if at == "node2" else "node2"
    pool.hung = {silent}
    pool.run(2)
    assert pool.nobody()
    pool.run(5)
    assert pool.judges["node1"].fence == Vote(silent, "node")


# --- messages

KEY = b"k" * 32


def test_a_heartbeat_survives_the_wire() -> None:
    beat = Beat(
        "node1",
        "b",
        7,
        {"node2": "c"},
        "sick",
        49152,
        Vote("node2", "node"),
        Order("fence", "node2", "brick", 1.5),
        9.5,
    )
    assert watch.unseal(KEY, watch.seal(KEY, beat)) == beat
    assert watch.unseal(KEY, watch.seal(KEY, Beat("node1", "b", 1))) == Beat("node1", "b", 1)


def test_a_heartbeat_of_a_large_pool_fits_a_datagram() -> None:
    echo = {f"node-with-a-long-name-{n}.example": "f" * 32 for n in range(60)}
    assert len(watch.seal(KEY, Beat("node1", "f" * 32, 10**9, echo))) < watch.LARGEST


def test_another_key_and_every_changed_byte_are_refused() -> None:
    data = watch.seal(KEY, Beat("node1", "b", 1))
    for wrong in (
        data[:-1],
        data[:31],
        b"",
        data + b" ",
        *(data[:at] + bytes([data[at] ^ 1]) + data[at + 1 :] for at in range(len(data))),
    ):
        with pytest.raises(ValueError, match="key"):
            watch.unseal(KEY, wrong)
    with pytest.raises(ValueError, match="key"):
        watch.unseal(b"x" * 32, data)


@pytest.mark.parametrize(
    "change",
    [
        {"count": "x"}, {"echo": 3}, {"vote": [1]}, {"vote": {"target": "a", "kind": "all", "port": 1}},
        {"brick": "maybe"}, {"order": {}}, {"expires": "soon"}, None,
    ],
)  # fmt: skip
def test_what_a_keyholder_of_another_version_sends_is_no_crash(change: dict[str, Any] | None) -> None:
    body: Any = dataclasses.asdict(Beat("node1", "b", 1))
    body = [] if change is None else {**body, **change}
    text = json.dumps(body).encode()
    data = watch.hmac.new(KEY, text, watch.hashlib.sha256).digest() + text
    with pytest.raises(ValueError, match=r"."):
        watch.unseal(KEY, data)


def test_replays_are_dropped() -> None:
    pool = Pool()
    judge = pool.judges["node1"]
    old = [beat for _, beat in pool.sent if beat.sender == "node2"]
    pool.isolate("node2")
    pool.until_fenced("node1", "node2")
    assert not any(judge.hear(beat, pool.now) for beat in old)
    assert judge.counters["replays"] == len(old)
    pool.run(1)
    assert judge.fence == Vote("node2", "node")


def test_replays_of_an_earlier_boot_of_the_sender_are_dropped() -> None:
    pool = Pool()
    pool.restart("node2")
    pool.run(1)
    old = [beat for _, beat in pool.sent if beat.sender == "node2" and beat.boot != pool.judges["node2"].boot]
    assert old and not any(pool.judges["node1"].hear(beat, pool.now) for beat in old)


def test_replays_from_before_the_own_start_are_dropped() -> None:
    pool = Pool()
    old = [beat for _, beat in pool.sent if beat.sender == "node2"]
    pool.restart("node1")
    assert old and not any(pool.judges["node1"].hear(beat, pool.now) for beat in old)
    assert not pool.judges["node1"].peers["node2"].known


def test_a_stranger_and_a_mirror_are_not_heard() -> None:
    pool = Pool()
    judge = pool.judges["node1"]
    assert not judge.hear(Beat("node9", "b", 1, {"node1": judge.boot}), pool.now)
    assert not judge.hear(judge.beat(pool.now), pool.now)


# --- the system


def test_the_end_of_a_certificate_is_read(tmp_path: Path) -> None:
    for years in (1, 20, 50):  # the form of the date changes in 2050
        text = make_ca("demo", years)[1]
        parsed = x509.load_pem_x509_certificate(text.encode())
        assert watch.expiry(parsed.public_bytes(serialization.Encoding.DER)) == parsed.not_valid_after_utc.timestamp()
        (tmp_path / f"{years}.pem").write_text(text)
    ends = watch.first_expiry([str(tmp_path / "20.pem"), str(tmp_path / "1.pem")])
    assert abs(ends - time.time() - YEAR) < 3 * 86400
    (tmp_path / "bad.pem").write_text("nothing")
    assert watch.first_expiry([str(tmp_path / "1.pem"), str(tmp_path / "bad.pem")]) is None
    assert watch.first_expiry([str(tmp_path / "none.pem")]) is None
    for junk in (b"", b"\x30", b"\x30\x82\x01", b"\x02\x01\x00" * 9):
        with pytest.raises(ValueError, match="certificate"):
            watch.expiry(junk)


def test_the_brick_is_found_by_its_process(tmp_path: Path) -> None:
    lines = {
        "12": ["/usr/sbin/glusterd", "--brick-name", "/srv/b", "--brick-port", "49152"],
        "13": ["/usr/sbin/glusterfsd", "--brick-name", "/srv/other", "--brick-port", "49153"],
        "14": ["/usr/sbin/glusterfsd", "-s", "node1", "--brick-name", "/srv/b", "--brick-port", "49154"],
        "15": [""],
        "self": ["x"],
    }
    for pid, words in lines.items():
        (tmp_path / pid).mkdir()
        (tmp_path / pid / "cmdline").write_bytes("\0".join(words).encode() + b"\0")
    (tmp_path / "16").mkdir()  # ended meanwhile
    assert watch.find_brick("/srv/b", str(tmp_path)) == 49154
    assert watch.find_brick("/srv/none", str(tmp_path)) == 0


def test_what_is_shut_off_never_reaches_beyond_the_bricks() -> None:
    text = watch.table(49152, 49251)
    rejects = [line.strip() for line in text.splitlines() if "reject" in line]
    assert len(rejects) == 12
    for line in rejects:
        new_to_glusterd = "daddr @node_ip" in line and "tcp dport 24007 tcp flags & (syn | ack) == syn" in line
        assert "@brick_ip" in line or "49152-49251" in line or new_to_glusterd, line
        assert line.endswith("reject with tcp reset")
    assert text.count("tcp flags & rst == rst accept") == 2
    assert text.count("delete table") == 1 and "flush" not in text


def test_elements_run_out_and_only_own_sets_are_flushed() -> None:
    addresses = {"node1": "192.0.2.1", "node2": "2001:db8::2"}
    script = watch.elements(Vote("node1", "brick", 49152), addresses, 3.0)
    assert "add element inet tribrick_peer_watch brick_ipv4 { 192.0.2.1 . 49152 timeout 3000ms }" in script
    assert "node_ipv6 { 2001:db8::2 timeout 3000ms }" in watch.elements(Vote("node2", "node"), addresses, 3.0)
    nothing = watch.elements(None, addresses, 3.0).splitlines()
    assert len(nothing) == 4 and all(line.startswith("flush set inet tribrick_peer_watch ") for line in nothing)


def test_connections_are_chosen_by_address_and_port() -> None:
    addresses = {"node1": "192.0.2.1", "node2": "2001:db8::2"}
    brick = watch.kill_filter(Vote("node1", "brick", 49152), addresses, 49152, 49251)
    assert " ".join(brick) == "dst 192.0.2.1 and dport = :49152"
    node = " ".join(watch.kill_filter(Vote("node2", "node"), addresses, 49152, 49251))
    assert node == (
        "dst [2001:db8::2] and ( ( dport >= :49152 and dport <= :49251 ) or ( sport >= :49152 and sport <= :49251 ) )"
    )


@pytest.mark.parametrize(("text", "value"), [("60s", 60), ("2m", 120), ("0.5", 0.5), ("3600", 3600)])
def test_times_on_the_command_line(text: str, value: float) -> None:
    assert watch.parser().parse_args(["fence", "node1", "--for", text]).left == value


@pytest.mark.parametrize("text", ["0", "-1", "1h", "61m", "", "s"])
def test_wrong_times_are_refused(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        watch.parser().parse_args(["fence", "node1", f"--for={text}"])
    assert "no time" in capsys.readouterr().err


# --- asking the brick


class Brick:
    """A server that answers GlusterFS's ping over TLS, and stops at will."""

    def __init__(self, directory: Path) -> None:
        key, certificate = make_ca("demo")
        (directory / "key.pem").write_text(key)
        (directory / "crt.pem").write_text(certificate)
        self.context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        self.context.load_cert_chain(directory / "crt.pem", directory / "key.pem")
        self.goes_on = threading.Event()
        self.goes_on.set()
        self.pings = self.connections = 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port = self.listener.getsockname()[1]
        threading.Thread(target=self.serve, daemon=True).start()

    def serve(self) -> None:
        with contextlib.suppress(OSError):
            while True:
                plain, _ = self.listener.accept()
                self.connections += 1
                self.goes_on.wait(20)
                with contextlib.suppress(OSError), plain, self.context.wrap_socket(plain, server_side=True) as secure:
                    self.open = secure
                    while data := secure.recv(4096):
                        self.pings += 1
                        self.goes_on.wait(20)
                        number = struct.unpack(">I", data[4:8])[0]
                        secure.sendall(struct.pack(">7I", 0x80000000 | 24, number, 1, 0, 0, 0, 0))


@pytest.fixture
def brick(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Brick]:
    server = Brick(tmp_path)
    monkeypatch.setattr(watch, "find_brick", lambda path: server.port)
    yield server
    server.listener.close()


def probe_of() -> Any:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return watch.Probe("/srv/b", "127.0.0.1", context, 0.02, time.monotonic)


def becomes(probe: Any, state: str) -> bool:
    end = time.monotonic() + 5
    while time.monotonic() < end:
        if probe.state(time.monotonic(), 0.3)[0] == state:
            return True
        time.sleep(0.01)
    return False


def test_a_brick_that_stops_is_sick_with_one_question_open_and_well_when_it_goes_on(brick: Brick) -> None:
    probe = probe_of()
    probe.start()
    assert becomes(probe, watch.OK)
    assert probe.state(time.monotonic(), 0.3)[1] == brick.port
    brick.goes_on.clear()
    assert becomes(probe, watch.SICK)
    pings, connections = brick.pings, brick.connections
    time.sleep(0.3)
    assert (brick.pings, brick.connections) == (pings, connections) and connections == 1
    brick.goes_on.set()
    assert becomes(probe, watch.OK)


def test_a_brick_that_takes_connections_and_answers_nothing_is_sick(brick: Brick) -> None:
    brick.goes_on.clear()
    probe = probe_of()
    probe.start()
    assert becomes(probe, watch.SICK)
    brick.goes_on.set()
    assert becomes(probe, watch.OK)


def test_a_refused_certificate_is_an_answer(brick: Brick) -> None:
    brick.context.verify_mode = ssl.CERT_REQUIRED
    probe = probe_of()
    probe.start()
    assert becomes(probe, watch.OK)
    assert probe.refusal


def test_no_process_is_not_sick(brick: Brick, monkeypatch: pytest.MonkeyPatch) -> None:
    probe = probe_of()
    probe.start()
    assert becomes(probe, watch.OK)
    monkeypatch.setattr(watch, "find_brick", lambda path: 0)
    brick.open.shutdown(socket.SHUT_RDWR)
    assert becomes(probe, watch.NONE)
    assert probe.state(time.monotonic() + 60, 0.3)[0] == watch.NONE


# --- three services over loopback: real sockets and processes, recorded fences

DRIVER = """
import importlib.util, json, ssl, sys, time
program, node, place, first = sys.argv[1:5]
spec = importlib.util.spec_from_file_location("peer_watch", program)
watch = importlib.util.module_from_spec(spec)
sys.modules["peer_watch"] = watch
spec.loader.exec_module(watch)
watch.CONTROL = f"{place}/{node}.control"
watch.check_means = lambda: None
def record(words, given=""):
    with open(f"{place}/{node}.log", "a") as log:
        log.write(json.dumps([words, given]) + "\\n")
    return ""
watch.run = record
watch.find_brick = lambda path: 0
nodes = {f"node{n}": f"127.0.0.{int(first) + n}" for n in (1, 2, 3)}
config = {"node": node, "nodes": nodes, "port": 17444, "brick": "/b", "first_port": 49152, "last_port": 49251,
          "certificates": [f"{place}/crt.pem"], "interval": 0.1, "silence": 1.0, "answer": 0.7}
watch.Service(config, b"k" * 32, ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)).run()
"""


class Services:
    """Three watchers as processes; what they would do to the system is written down."""

    def __init__(self, place: Path) -> None:
        self.place, self.first = place, 40 + 4 * (os.getpid() % 40)
        (place / "crt.pem").write_text(make_ca("demo")[1])
        self.processes = {f"node{n}": self.start(f"node{n}") for n in (1, 2, 3)}
        self.until(lambda: all(self.heard(name) == {True} for name in self.processes), "all hear each other")

    def start(self, node: str) -> subprocess.Popen[bytes]:
        words = [sys.executable, "-B", "-c", DRIVER, str(PROGRAM), node, str(self.place), str(self.first)]
        return subprocess.Popen(words, stderr=subprocess.DEVNULL)

    def ask(self, node: str, call: Any) -> dict[str, Any]:
        with socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET) as channel:
            channel.settimeout(3)
            channel.connect(str(self.place / f"{node}.control"))
            channel.send(json.dumps(call).encode())
            answer: dict[str, Any] = json.loads(channel.recv(1 << 16))
        return answer

    def heard(self, node: str) -> set[bool]:
        try:
            peers = self.ask(node, {"do": "status"})["peers"].values()
        except OSError:
            return {False}
        return {peer["heard"] is not None for peer in peers}

    def fence(self, node: str) -> str:
        found = self.ask(node, {"do": "status"})["fence"]
        return f"{found['target']} {found['kind']}" if found else ""

    def done(self, node: str) -> str:
        return (self.place / f"{node}.log").read_text()

    @staticmethod
    def until(reached: Any, what: str, limit: float = 15) -> None:
        end = time.monotonic() + limit
        while not reached():
            assert time.monotonic() < end, what
            time.sleep(0.05)


@pytest.fixture
def services(tmp_path: Path) -> Iterator[Services]:
    running = Services(tmp_path)
    yield running
    for process in running.processes.values():
        process.kill()
        process.wait()


def test_services_fence_a_hung_one_and_let_it_go_again(services: Services) -> None:
    services.processes["node2"].send_signal(signal.SIGSTOP)
    services.until(lambda: services.fence("node1") == services.fence("node3") == "node2 node", "node2 is fenced")
    address = f"127.0.0.{services.first + 2}"
    for name in ("node1", "node3"):
        services.until(lambda name=name: f"node_ipv4 {{ {address} timeout 3000ms }}" in services.done(name), "nft")
        services.until(lambda name=name: '["/usr/bin/ss", "-KHtn", "dst"' in services.done(name), "ss")
    services.processes["node2"].send_signal(signal.SIGCONT)
    services.until(lambda: not services.fence("node1") and not services.fence("node3"), "the fence is over")
    assert "add element" not in services.done("node2")


def test_services_do_not_fence_one_that_was_stopped_or_died(services: Services) -> None:
    services.processes["node3"].send_signal(signal.SIGTERM)
    assert services.processes["node3"].wait(5) == 0
    services.until(lambda: services.heard("node1") == {True, False}, "node3 said goodbye")
    services.processes["node3"] = services.start("node3")
    services.until(lambda: services.heard("node1") == services.heard("node3") == {True}, "node3 is back")
    services.processes["node3"].kill()
    services.until(lambda: services.heard("node1") == {True, False}, "its kernel answers")
    time.sleep(1.5)
    assert services.fence("node1") == services.fence("node2") == ""


def test_services_take_orders_and_refuse_nonsense(services: Services) -> None:
    order = {"do": "fence", "target": "node2", "kind": "node", "left": 30}
    services.ask("node1", order)
    services.until(lambda: services.fence("node3") == "node2 node", "the order went round")
    services.ask("node3", {"do": "pardon", "target": "", "kind": "brick", "left": 2})
    services.until(lambda: services.fence("node1") == services.fence("node3") == "", "it was lifted")
    assert "an operator" in services.ask("node1", order)["error"]
    for wrong in (
        {"do": "explode", "target": "node1", "kind": "node", "left": 1},
        {**order, "target": "node9"},
        {**order, "left": 1e9},
        {**order, "kind": "all"},
        {"do": 3},
        [],
    ):
        error = services.ask("node2", wrong)["error"]
        assert error and "an operator" not in error, wrong
