"""What the tests of `faults` and `outage` share: load, which nodes and faults, what was acknowledged, the verdict."""

from __future__ import annotations

import os
import shlex
import time
from collections.abc import Iterator, Sequence
from typing import Any

import pytest

from faults import workload
from faults.checker import RED, Report
from faults.torture import Run, summary
from helpers import LONG, NODES, SEED, Rig, chance, sha256, wait_until
from kit.faults import inside
from kit.lab import ROOT
from kit.run import Console

ONLY = os.environ.get("TRIBRICK_ONLY", "").split()
CLIENTS = 8
LARGEST = 8 * 1024 * 1024 if LONG else 1024 * 1024 + 1
# The short set asks no more often than it takes to notice a failure: every file is judged in nine places.
PAUSE = workload.PAUSE if LONG else 0.5
# Files that a client keeps. Healing a disk takes time by the file, and the short set fills several.
FILES = 0 if LONG else 30
# Programs that rename on the mounts are the business of this scenario; the spool has none of their files.
RENAMES = "/faults/"


# In the short set a file's faults hit one node, one right after the other, and only the verdict waits for the heal: the
# two other nodes hold all that the one missed. In the long set the lab is clean again after each.
CLEAN = LONG


def word(path: object) -> str:
    """Return ./scripts/test's name of a file: test_10_node_loss.py -> node_loss."""
    return str(path).rsplit("/", 1)[-1].removesuffix(".py").split("_", 2)[2]


def asked(items: Sequence[Any]) -> list[Any]:
    """Return the tests of the files that ./scripts/test was asked for; all, if it asked for none of them."""
    mine = {word(item.path) for item in items}.intersection(ONLY)
    return [item for item in items if not mine or word(item.path) in mine]


def under_load(request: pytest.FixtureRequest, rig: Rig) -> Iterator[Run]:
    """Keep load on all nodes for as long as a file's tests last. Its last test calls `verdict`."""
    name = word(request.path)
    place = ROOT / ".lab" / "test" / rig.lab.name / name
    run = Run(
        rig.lab, Console(), f"{SEED}-{name}", place, CLIENTS, largest=LARGEST, pause=PAUSE, files=FILES,
        renames=RENAMES in str(request.path),
    )  # fmt: skip
    run.nemesis.recover()
    run.start()
    yield run
    run.load.finish()
    if FILES and not request.session.testsfailed:  # what was found is to be looked at
        run.load.tidy()


def others(node: str) -> tuple[str, ...]:
    """Return the nodes besides one."""
    return tuple(other for other in NODES if other != node)


def hold(long: float, short: float = 3.0) -> float:
    """Return the seconds for which a fault goes on after what was waited for under it."""
    return long if LONG else short


def nodes(purpose: str) -> tuple[str, ...]:
    """Return every node in the long set, else one that the commit chooses."""
    return tuple(NODES) if LONG else (chance(purpose).choice(NODES),)


def faults(*names: str) -> list[tuple[str, str]]:
    """Return fault and node for parametrize; in the short set it is one node for all of them."""
    hit = nodes(" ".join(names))
    return [(name, node) for name in names for node in hit]


def verdict(run: Run) -> Report:
    """Judge; fail if anything acknowledged was lost, torn, corrupted or resurrected, or too little was judged."""
    result = run.judge()
    print(summary(result))
    print(result.line())
    bad = [f"{one.verdict}: {one.label} {one.name}: {one.reasons[:3]}" for one in result.verdicts if one.verdict in RED]
    assert not bad, f"{len(bad)} violations, see {run.place}:\n" + "\n".join(bad[:20])
    assert result.numbers["acknowledged"] >= 100, "hardly anything was acknowledged, so hardly anything was judged"
    assert result.counts["stable"] >= 20, result.counts
    return result


def acknowledged(run: Run, since: float, what: str, hosts: tuple[str, ...]) -> int:
    """Count what these hosts acknowledged of operations that began after a time of the history's."""
    events = run.history.since(since)
    kinds = ("upload", "replace") if what == "upload" else (what,)
    begun = {e.op for e in events if e.kind == "invoke" and e.what in kinds}
    return sum(e.kind == "ok" and e.op in begun and e.host in hosts and e.status in (200, 201, 204) for e in events)


def goes_on(
    run: Run, hosts: tuple[str, ...] = NODES, whats: tuple[str, ...] = ("upload",), deadline: float = 60
) -> None:
    """Wait until each of these hosts has acknowledged one operation of each kind that began after now.

    A replacement is an upload as well. One is enough: a client that asked the lost node is busy while it waits.
    """
    since = run.history.now()
    for what in whats:
        wait_until(
            f"{what}s through {', '.join(hosts)}",
            lambda what=what: all(acknowledged(run, since, what, (host,)) for host in hosts), deadline,
        )  # fmt: skip


def in_ledger(rig: Rig, node: str, name: str) -> str:
    """Return what a node's ledger knows of a name: stored, deleted, purged, or nothing yet."""
    ask = (
        "import sqlite3, sys; ledger = sqlite3.connect('file:/var/lib/tribrick/ledger.sqlite?mode=ro', uri=True);"
        "print(*ledger.execute('SELECT state FROM files WHERE name = ?', sys.argv[1:]).fetchone() or [])"
    )
    return rig.root(node, shlex.join(["python3", "-c", ask, name])).strip()


def older(rig: Rig) -> dict[str, Any]:
    """Upload a file and wait until every node's ledger has it, so that each can serve it without the volume."""
    row = rig.upload(chance("older").choice(NODES))

    for node in NODES:
        wait_until(f"the ledger of {node} to follow", lambda node=node: in_ledger(rig, node, row["name"]), 30)
    return row


def still_served(rig: Rig, node: str, row: dict[str, Any], within: float = 15.0) -> str:
    """Return which source gave the file; fail unless this node, which has not cached it, serves it in time."""
    start = time.monotonic()
    answer = rig.fetch(node, row, timeout=within)
    took = time.monotonic() - start
    assert answer.status_code == 200, f"{node} refused to show a file: {answer.status_code} {answer.text[:200]}"
    assert answer.headers["X-Cache"] != "HIT", "the cache proves nothing about the sources behind it"
    assert sha256(answer.content) == row["sha256"] and took < within, took
    return answer.headers["X-Tribrick-Source"]


def joined(run: Run) -> None:
    """Wait until every mount is connected to every brick: a fault that finds nobody connected proves nothing."""
    state = f"cat {run.root}/.meta/graphs/active/*-client-*/private"

    def connections(node: str) -> int:
        return inside(run.lab, node, state, 10, check=False).count("connected = 1\n")

    wait_until("all mounts to be connected to all bricks", lambda: all(connections(n) == len(NODES) for n in NODES), 60)
