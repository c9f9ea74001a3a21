"""Many processes on three nodes save at the same moment."""

from __future__ import annotations

import time

from helpers import NODES
from proof import Proof

PROCESSES = 8


def run_race(proof: Proof, name: str, replaces: str | None = None) -> list[dict]:
    """Let 8 processes on each node save at one moment; return what they were told."""
    at = time.time() + 4  # one kernel, one clock
    for host in NODES:
        proof.agents[host].send("race", name, PROCESSES, at, replaces)
    told = [one for host in NODES for one in proof.agents[host].answer()]
    assert len(told) == 24
    failed = [one for one in told if "error" in one]
    assert not failed, failed
    # A race that was none proves nothing: all processes began before the first one had ended.
    assert len({(one["result"]["node"], one["pid"]) for one in told}) >= 12, "too few processes took part"
    started = sorted(one["began"] for one in told)
    ended = min(one["began"] + one["seconds"] for one in told)
    assert sum(moment < ended for moment in started) >= 12, "most had not begun when the first one ended"
    return told


def check_race(proof: Proof, told: list[dict]) -> None:
    """Each has a name, a row, and its own bytes under the name on every mount and brick."""
    wanted = {one["result"]["name"]: one["wanted"] for one in told}
    assert len(wanted) == 24, "two processes were told the same name"
    assert {one["result"]["name"]: one["result"]["sha256"] for one in told} == wanted
    rows = {row["name"]: row for row in proof.agents["node1"].ask("rows")}
    assert {name: rows[name]["sha256"] for name in wanted} == wanted
    for host in NODES:
        assert proof.agents[host].ask("hashes", list(wanted)) == wanted, host
    for host, found in proof.on_bricks(list(wanted)).items():
        assert found == wanted, host


def test_24_processes_that_save_one_name_get_24_files(proof: Proof) -> None:
    told = run_race(proof, "photos/Summer Holiday.JPG")
    check_race(proof, told)
    assert {one["result"]["original"] for one in told} == {"Summer Holiday.JPG"}


def test_24_processes_that_replace_one_file_make_24_versions(proof: Proof) -> None:
    first = proof.agents["node1"].ask("add", "photos/replaced.jpg", 30_000)
    told = run_race(proof, "photos/replaced.jpg", replaces=first["name"])
    check_race(proof, told)
    versions = proof.agents["node2"].ask("versions", first["name"])
    assert [row["version"] for row in versions] == list(range(25, 0, -1))
    assert [row["current"] for row in versions] == [True] + [False] * 24
    assert versions[-1]["name"] == first["name"]


def test_afterwards_catalog_and_mounts_agree(proof: Proof) -> None:
    assert len(proof.check_clean(proof.agents["node3"])) >= 49
