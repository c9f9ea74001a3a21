"""The process is killed before and after each step of an add, a replacement and a delete, on the real mount."""

from __future__ import annotations

import pytest

from helpers import LONG, NODES, chance, wait_until
from proof import Agent, Proof, same

SMALL, THREE_PIECES = 30_000, 2_500_000
CASES = [("add", SMALL), ("replace", SMALL), ("delete", SMALL), *([("add", THREE_PIECES)] if LONG else [])]
KILL_NODES = NODES if LONG else (chance("kill").choice(NODES),)
# What must be among the steps, else they were not watched. Killed at each of them, and in the short set at a few more.
EXPECTED = {
    "add": ["before open", "after write", "after fsync", "after INSERT", "before COMMIT", "after COMMIT"],
    "replace": ["after fsync", "after INSERT", "after UPDATE", "before COMMIT", "after COMMIT"],
    "delete": ["after UPDATE", "after INSERT", "before COMMIT", "after COMMIT", "before unlink", "after unlink"],
}


def prepare(agent: Agent, kind: str, place: str) -> str:
    """Return the name to work with: a new one, or a stored file's. Each in a directory that is not there yet."""
    return f"{place}/killed.jpg" if kind == "add" else agent.ask("add", f"{place}/killed.jpg", SMALL)["name"]


def points(steps: list[str], kind: str) -> list[int]:
    """Return the steps at which to kill."""
    if LONG:
        return list(range(len(steps)))
    last = {label: number for number, label in enumerate(steps)}
    return sorted({last[label] for label in EXPECTED[kind]} | set(chance(f"kill {kind}").sample(range(len(steps)), 4)))


@pytest.mark.parametrize("host", KILL_NODES)
@pytest.mark.parametrize(("kind", "size"), CASES)
def test_killed_at_every_step(proof: Proof, host: str, kind: str, size: int) -> None:
    # Without hash directories every run takes the same steps.
    with proof.another(host, HASH_LEVELS=0) as agent:
        agent.ask("add", "photos/warm.jpg", SMALL)  # reads the sentinel, which the killed processes know then
        place = f"killed-{kind}-{size}-{host}"
        steps = agent.ask("steps", kind, prepare(agent, kind, f"{place}-plan"), size)
        assert set(EXPECTED[kind]) <= set(steps), steps
        acknowledged = {row["name"]: row["sha256"] for row in agent.ask("rows") if row["state"] == "stored"}
        doomed = []
        for at in range(len(steps)):
            name = prepare(agent, kind, f"{place}-{at}")
            if kind == "delete":
                doomed.append(name)
            ended = agent.ask("kill", kind, name, size, at)
            assert ended == "killed", f"step {at}, {steps[at]}: {ended}"

        rows = agent.ask("rows")
        stored = {row["name"]: row["sha256"] for row in rows if row["state"] == "stored"}
        same({name: stored.get(name) for name in acknowledged}, acknowledged)
        there = wait_until(f"{host} to show the files", lambda: agent.ask("walk"), 10)
        # A row is never without its bytes, whenever the process was killed.
        same({name: there.get(name) for name in stored}, stored)
        deleted = {row["name"] for row in rows if row["state"] != "stored"}
        rest = set(there) - set(stored) - deleted
        if kind == "delete":
            # From the commit on it is deleted; the bytes of some are still there.
            survived = [name for name in doomed if name in stored]
            assert doomed[: len(survived)] == survived and 0 < len(survived) < len(doomed), (survived, doomed)
            assert not rest and deleted & set(there), "no kill was between the commit and the unlink"
        else:
            assert rest, "no kill was between the file and its row"

        assert agent.tribrick("replicate", "--once")["code"] == 0
        same(agent.ask("walk"), {name: there[name] for name in set(stored) | rest})
        # Files younger than a day are not touched, so that a running save keeps its own.
        young = agent.tribrick("sweep", "--apply", "--accept", str(len(steps)))
        assert young["code"] == 0 and not young["said"]["quarantined"], young
        agent.ask("age")
        swept = agent.tribrick("sweep", "--apply", "--accept", str(len(steps)))
        assert swept["code"] == 0 and set(swept["said"]["quarantined"]) == rest, swept
    same(proof.check_clean(proof.agents["node1"]), stored)
