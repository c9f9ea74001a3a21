"""The mount hangs: FUSE process stopped, or two of three bricks stopped."""

from __future__ import annotations

import contextlib
import re
import time
from collections.abc import Iterator
from typing import Any

import pytest

from helpers import LONG, NODES, Rig, chance, wait_until
from proof import Agent, Proof, same

DEADLINE, OUTSTANDING = 3.0, 4
SLACK = 1.5  # two cores for four hosts
# Before the volume gives a brick up (network.ping-timeout 20) the hang must have ended.
BRICK_HANG = 16.0
HUNG_NODES = NODES if LONG else (chance("hung mount").choice(NODES),)


def processes(rig: Rig, host: str, kind: str) -> list[str]:
    """Return the numbers of a node's FUSE client or brick process."""
    name, ending = {"mount": ("glusterfs", f" {rig.mount}$"), "brick": ("glusterfsd", "")}[kind]
    found = rig.root(host, f"pgrep --exact --list-full {name} | grep -- '{ending}' | cut -d' ' -f1").split()
    assert found, f"{host} has no {kind} process"
    return found


@contextlib.contextmanager
def stopped(rig: Rig, hosts: list[str], kind: str) -> Iterator[None]:
    """Stop a kind of process, so that it hangs; let it go on afterwards."""
    numbers = {host: " ".join(processes(rig, host, kind)) for host in hosts}
    try:
        for host in hosts:
            rig.root(host, f"kill -STOP {numbers[host]}")
        yield
    finally:
        for host in hosts:
            rig.root(host, f"kill -CONT {numbers[host]}")


def hangs(rig: Rig, host: str) -> bool:
    """Whether a call on the mount gets no answer."""
    return rig.run_root(host, f"timeout -s KILL 1 stat -f {rig.mount}; test $? = 137", timeout=10).returncode == 0


def refused(answers: list[dict[str, Any]], within: float) -> None:
    """All were refused as unavailable, none of them late."""
    assert answers and {one.get("error") for one in answers} == {"StorageUnavailable"}, answers
    assert max(one["seconds"] for one in answers) <= within, sorted(one["seconds"] for one in answers)


def recovered(agent: Agent) -> bool:
    """Whether a save works and nothing is outstanding."""
    (answer,) = agent.ask("try_add", "photos/again.jpg", 30_000)
    guard = agent.ask("guard")
    assert "result" in answer and guard["state"] == "closed" and guard["overdue"] == 0, (answer, guard)
    return True


def begin_half(agent: Agent) -> None:
    """Begin a save that has written a part of its file before the hang, and that must take it back afterwards."""
    assert agent.ask("begin_add", "photos/half.bin")
    assert any(map(has_no_name_yet, agent.ask("walk"))), "no half-written file is there"


def has_no_name_yet(path: str) -> bool:
    """A file gets its name once it is whole."""
    return re.fullmatch(r"\.[a-z2-7]{20}\.part", path.rpartition("/")[2]) is not None


def left_by_nobody(proof: Proof) -> None:
    """No late call left a file without a row, or a row without a file."""
    proof.check_clean(proof.agents["node1"])


@pytest.mark.parametrize("host", HUNG_NODES)
def test_a_hung_mount_holds_few_threads_and_nobody_waits(proof: Proof, host: str) -> None:
    rig = proof.rig
    with proof.another(host, DEADLINE=DEADLINE, OUTSTANDING=OUTSTANDING) as agent:
        doomed = agent.ask("add", "photos/doomed.jpg", 30_000)
        assert not hangs(rig, host) and not agent.ask("calls_inside")
        before = agent.ask("rows")
        begin_half(agent)
        with stopped(rig, [host], "mount"):
            assert hangs(rig, host), "the mount was to hang"
            refused(agent.ask("end_add", "photos/hung.jpg", 30_000, 12), DEADLINE + SLACK)
            guard, inside = agent.ask("guard"), agent.ask("calls_inside")
            assert guard["state"] == "open" and 1 <= guard["overdue"] <= OUTSTANDING, guard
            assert 1 <= sum(inside.values()) <= OUTSTANDING + 1, inside  # and the probe

            refused(agent.ask("try_add", "photos/hung.jpg", 30_000, 50), SLACK)
            again = agent.ask("calls_inside")
            assert sum(again.values()) <= max(sum(inside.values()), guard["overdue"] + 1), (inside, again)
            gone = agent.ask("try_delete", doomed["name"])
            assert gone["result"]["state"] == "deleted" and gone["seconds"] <= DEADLINE + SLACK, gone
            assert [row for row in agent.ask("rows") if row["name"] != doomed["name"]] == [
                row for row in before if row["name"] != doomed["name"]
            ], "a save that was refused wrote a row"
        # No restart: the same process works again.
        wait_until("the agent to save again", lambda: recovered(agent), 30)
        assert agent.ask("guard")["workers"] <= OUTSTANDING
        answer = agent.tribrick("replicate", "--once")
        assert answer["code"] == 0, answer
        for other in proof.agents.values():
            wait_until(f"the deleted file to be gone on {other.host}",
                       lambda other=other: other.ask("hashes", [doomed["name"]]) == {doomed["name"]: None}, 5)
        left_by_nobody(proof)


def test_two_hung_bricks_and_a_process_that_dies_meanwhile(proof: Proof) -> None:
    rig, sick = proof.rig, chance("hung bricks").sample(NODES, 2)
    with contextlib.ExitStack() as stack:
        agents = {
            host: stack.enter_context(proof.another(host, DEADLINE=DEADLINE, OUTSTANDING=OUTSTANDING)) for host in NODES
        }
        victim = chance("victim").choice(NODES)
        for agent in agents.values():
            agent.ask("add", "photos/before.jpg", 30_000)
        before = agents["node1"].ask("rows")
        for agent in agents.values():
            begin_half(agent)
        began = time.monotonic()
        with stopped(rig, sick, "brick"):
            for agent in agents.values():
                agent.send("end_add", "photos/hung.jpg", 30_000, 6)
            for agent in agents.values():
                refused(agent.answer(), DEADLINE + SLACK)
                assert 1 <= agent.ask("guard")["overdue"] <= OUTSTANDING
                refused(agent.ask("try_add", "photos/hung.jpg", 30_000, 20), SLACK)
            assert agents["node1"].ask("rows") == before
            agents[victim].kill()
        took = time.monotonic() - began
        assert took < BRICK_HANG, f"the bricks hung for {took:.0f} s, too near to the volume's own time-out"
        for host in set(NODES) - {victim}:
            wait_until(f"the agent on {host} to save again", lambda host=host: recovered(agents[host]), 30)

        def ended() -> bool:
            return rig.run_root(victim, f"test ! -e /proc/{agents[victim].pid}").returncode == 0

        wait_until("the killed process to end", ended, 30)
    wait_until("heal to end", lambda: rig.unhealed() == 0, 60)
    # What the killed process left has no row: sweep takes it away, and nothing else.
    with proof.another("node1") as sweeper:
        stored = {row["name"]: row["sha256"] for row in sweeper.ask("rows") if row["state"] == "stored"}
        there = sweeper.ask("walk")
        rest = set(there) - set(stored)
        assert len(rest) <= OUTSTANDING and any(map(has_no_name_yet, rest)), rest
        sweeper.ask("age")
        swept = sweeper.tribrick("sweep", "--apply", "--accept", "20")
        assert swept["code"] == 0 and set(swept["said"]["quarantined"]) == rest, (swept, rest)
        same(sweeper.ask("walk"), stored)
    left_by_nobody(proof)
