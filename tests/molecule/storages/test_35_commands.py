"""The commands on a node: what an audit finds on the real volume, and how old a node's ledger is."""

from __future__ import annotations

import json
import secrets
import subprocess
import threading

from helpers import NODES, Rig, chance, wait_until
from proof import Proof

LAG = 5.0  # seconds, while the database answers
FLIP = """
import os, sys
with open(sys.argv[1], "r+b", buffering=0) as file:
    place = os.fstat(file.fileno()).st_size // 2
    byte = os.pread(file.fileno(), 1, place)[0]
    os.pwrite(file.fileno(), bytes([byte ^ 1]), place)
    os.fsync(file.fileno())
"""
# In the site's own environment and catalog.
ADD = """
import sys, time
import django
django.setup()
from django.core.files.base import ContentFile
from tribrick import catalog
row = catalog.add(ContentFile(b"ledger"), sys.argv[1])
print(time.time())
if len(sys.argv) > 2:
    catalog.delete(row)
"""
WATCH = """
import sqlite3, sys, time
print("watching", flush=True)
end, seen = time.time() + 60, None
while seen is None and time.time() < end:
    with sqlite3.connect(f"file:{sys.argv[1]}?mode=ro", uri=True) as ledger:
        seen = ledger.execute("SELECT name FROM files WHERE name LIKE ?", [sys.argv[2] + "/%"]).fetchone()
    time.sleep(0 if seen else 0.05)
print(time.time() if seen else "never", flush=True)
"""


def flip(rig: Rig, host: str, path: str) -> None:
    """Flip a bit of a file on a node's brick, behind Gluster's back."""
    done = subprocess.run(
        ["docker", "exec", "-i", rig.container(host), "python3", "-", path],
        input=FLIP, text=True, capture_output=True, timeout=60, check=False,
    )
    assert done.returncode == 0, done.stderr


def test_an_audit_finds_a_flipped_bit_and_a_lost_file(proof: Proof) -> None:
    # A node that has read a file may have its old bytes in memory. So each of three looks at it for the first time.
    agent, finder, last = (proof.agents[host] for host in NODES)
    flipped = agent.ask("add", "photos/flipped.jpg", 40_000)["name"]
    lost = agent.ask("add", "photos/lost.jpg", 40_000)["name"]
    for host in NODES:
        flip(proof.rig, host, f"{proof.brick}/{flipped}")
    proof.rig.root("node1", f"rm {proof.root}/{lost}")

    def found() -> bool:
        report = finder.tribrick("audit")
        kinds = {(one["copy"], one["kind"], one["name"]) for one in report["said"]["findings"]}
        wanted = {("storage", "different", flipped), ("storage", "missing", lost)}
        assert report["code"] == 1 and kinds == wanted, report["said"]["findings"]
        return True

    # The mount may show for a second what it showed before.
    wait_until("the audit to find both", found, 10)
    for host in NODES:
        flip(proof.rig, host, f"{proof.brick}/{flipped}")
    agent.ask("delete", lost)
    wait_until("the audit to be clean again", lambda: last.tribrick("audit")["code"] == 0, 10)
    # node2 goes on showing the flipped bytes: nothing told its caches that they were changed back.
    agent.ask("delete", flipped)


def test_the_sites_audit_finds_a_flipped_bit_on_one_brick(proof: Proof) -> None:
    """The mount may read another brick, so only the bricks' own hashes can tell."""
    rig, sick = proof.rig, chance("flipped brick").choice(NODES)

    def audit(host: str) -> tuple[int, list[dict[str, str]], dict[str, str]]:
        done = rig.run_root(host, "tribrick audit --json", timeout=120)
        said = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{"):])[0]
        return done.returncode, said["findings"], said["away"]

    name = rig.upload("node1")["name"]
    assert audit("node2") == (0, [], {})
    flip(rig, sick, f"{rig.brick}/{name}")
    code, findings, away = audit("node2")
    bricks = [one for one in findings if one["copy"] != "storage"]  # the mount may happen to read this brick
    assert code == 1 and not away and [(one["kind"], one["name"]) for one in bricks] == [("different", name)], findings
    assert sick in bricks[0]["copy"], findings
    flip(rig, sick, f"{rig.brick}/{name}")
    assert audit("node3") == (0, [], {})
    answer = rig.request("DELETE", "node1", f"/api/media/{name}", headers=rig.auth, timeout=60)
    assert answer.status_code == 204, answer.text
    del rig.known[name]


def test_each_ledger_follows_within_five_seconds(proof: Proof) -> None:
    rig, place = proof.rig, f"photos/lag{secrets.token_hex(6)}"
    ledger = "/var/lib/tribrick/ledger.sqlite"
    for host in NODES:
        assert rig.root(host, "systemctl is-active tribrick-ledger").strip() == "active"
    ready, seen = threading.Barrier(len(NODES) + 1, timeout=60), dict.fromkeys(NODES, float("inf"))

    def watch(host: str) -> None:
        with subprocess.Popen(
            ["docker", "exec", "-i", rig.container(host), "python3", "-c", WATCH, ledger, place],
            stdout=subprocess.PIPE, text=True,
        ) as process:
            assert process.stdout is not None and process.stdout.readline().strip() == "watching"
            ready.wait()
            seen[host] = float(process.stdout.readline())

    threads = [threading.Thread(target=watch, args=(host,)) for host in NODES]
    for thread in threads:
        thread.start()
    ready.wait()
    said = rig.root("node2", f"tribrick-manage --python - {place}/lag.txt delete", text_in=ADD)
    added = float(said.split()[-1])
    for thread in threads:
        thread.join(timeout=90)
    lags = {host: moment - added for host, moment in seen.items()}
    assert max(lags.values()) <= LAG, lags
    for host in NODES:
        assert "in order" in rig.root(host, "tribrick ledger verify")
