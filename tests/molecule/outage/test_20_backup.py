"""Files come back from the mirror; then the database is lost, then all hosts and disks, and all of it comes back.

The commands are those of docs/runbooks/restore_media.md.
"""

from __future__ import annotations

import contextlib
import gzip
import json
import subprocess
import time
from dataclasses import dataclass, field
from pathlib import Path

import pytest

from faults import observer
from helpers import LONG, NODES, Rig, chance, picture, sha256, wait_until
from kit.lab import DATABASE, ROOT, containers, create
from kit.run import Console, capture
from mending import playbook

PLACE = ROOT / ".lab" / "test" / "outage" / "backup"  # the drill's numbers, and what is off-site
SNAPSHOTS = "/srv/media-mirror/snapshots"
CONFIRM = "--extra-vars=confirm=yes"
GONE = 90.0  # seconds that the bytes of a deleted file may outlive its tombstone


@dataclass
class Stock:
    """What was stored, and by which snapshot."""

    node: str  # whose mirror takes the snapshots
    public: dict[str, str] = field(default_factory=dict)  # name -> SHA-256
    private: dict[str, dict[str, str]] = field(default_factory=dict)  # name -> row
    deleted: list[str] = field(default_factory=list)
    first: str = ""
    last: str = ""
    newer: dict[str, str] = field(default_factory=dict)  # stored after the last snapshot
    late: str = ""  # deleted after the last snapshot
    manifest: dict[str, tuple[str, int]] = field(default_factory=dict)  # what the last snapshot holds


@pytest.fixture(scope="module")
def stock(rig: Rig) -> Stock:
    made = Stock(chance("mirror").choice(NODES))
    rig.wait_ready(60)
    return made


def snapshot(rig: Rig, node: str) -> str:
    """Take one on a node, as cron does; return its name."""
    def run() -> subprocess.CompletedProcess[str] | None:
        done = rig.run_root(node, "tribrick-mirror run --full --snapshot --json", timeout=180)
        return None if "another run is at work" in done.stderr else done  # cron's

    done = wait_until(f"a snapshot on {node}", run, 120)
    assert done.returncode == 0, done.stdout + done.stderr
    report = json.loads(done.stdout)
    assert report["good"] and not report["problems"] and not report["volume"], report
    return str(report["snapshot"])


def lose(rig: Rig, *names: str) -> None:
    """Remove files on the volume behind the catalog, and see that no node serves them."""
    for name in names:
        rig.root(NODES[0], f"rm -r '{rig.mount}/{name}'")
    for name in names:
        wait_until(
            f"{name} to be away", lambda name=name: not rig.run_root(NODES[1], f"ls '{rig.mount}/{name}'").stdout, 30
        )


def wrong(rig: Rig, wanted: dict[str, str], kinds: tuple[str, ...] = ("web", "mount", "brick")) -> list[str]:
    """Return where files (name -> SHA-256) are not as they should be, in all places of all nodes."""
    seen = observer.look_everywhere(rig.lab, wanted, kinds)
    assert len(seen) == len(kinds) * len(NODES) * len(wanted)
    return [f"{one.place} {one.name}: {one.state} {one.size} B" for one in seen if one.sha256 != wanted[one.name]]


def audited(rig: Rig, node: str) -> None:
    """Rows and files agree: on the mount, and by the hashes of all bricks."""
    done = rig.run_root(node, "tribrick audit --json", timeout=300)
    said = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{"):])[0]
    assert not said["away"], said["away"]
    assert said["checked"] and not said["findings"], said["findings"][:20]
    assert done.returncode == 0


def dead(rig: Rig, *names: str) -> None:
    """Deleted names are nowhere."""
    def left() -> list[str]:
        seen = observer.look_everywhere(rig.lab, names)
        return [f"{one.place} {one.name}: {one.state}" for one in seen if one.state != "absent"]

    wait_until(f"{len(names)} deleted names to be nowhere", lambda: not left(), GONE)


def private(rig: Rig, stock: Stock) -> None:
    """Private files come to their owner and to nobody else."""
    for name, row in stock.private.items():
        for node in NODES:
            mine = rig.fetch(node, row, headers=rig.auth)
            assert mine.status_code == 200, f"{node} {name}: {mine.status_code}"
            assert sha256(mine.content) == row["sha256"], f"{node} {name}: other bytes"
            assert rig.request("GET", node, f"/media/{name}").status_code == 404


def restore(rig: Rig, *extra: str):
    return playbook(rig, "restore_media", *[f"--extra-vars={one}" for one in extra], CONFIRM)


def test_a_snapshot_holds_files_and_database(rig, stock):
    for number in range(6):
        row = rig.upload(NODES[number % 3])
        stock.public[row["name"]] = row["sha256"]
    replaced = next(iter(stock.public))
    content = picture()
    version = {"file": ("v2.png", content)}
    answer = rig.request("PUT", NODES[1], f"/api/media/{replaced}", headers=rig.auth, files=version)
    assert answer.status_code == 201, answer.text
    stock.public[answer.json()["name"]] = sha256(content)
    for node in NODES[:2]:
        row = rig.upload(node, data={"private": "1"})
        stock.private[row["name"]] = row
    for node in NODES:
        name = rig.upload(node)["name"]
        assert rig.request("DELETE", node, f"/api/media/{name}", headers=rig.auth).status_code == 204
        stock.deleted.append(name)
    stock.first = snapshot(rig, stock.node)
    place = f"{SNAPSHOTS}/{stock.first}"
    held = rig.root(stock.node, f"cd {place}/files && find . -type f -printf '%P\\n'").split()
    assert {*stock.public, *stock.private} <= set(held) and not set(stock.deleted) & set(held)
    assert "tribrick_mediafile" in rig.root(stock.node, f"pg_restore --list {place}/database.dump")
    assert "0 differences" in rig.ssh(stock.node, "tribrick-mirror verify", timeout=120)


def test_a_file_a_folder_and_a_date_come_back(rig, stock):
    old = list(stock.public)
    row = rig.upload(NODES[2])  # of the second snapshot
    stock.public[row["name"]] = row["sha256"]
    stock.last = snapshot(rig, stock.node)
    assert stock.last > stock.first

    lose(rig, old[1])
    assert restore(rig, f"path={old[1]}").good().text.count(old[1]) == 1
    folder = old[2].rpartition("/")[0]
    inside = {name: sha for name, sha in stock.public.items() if name.startswith(f"{folder}/")}
    lose(rig, folder)
    restore(rig, f"path={folder}").good()
    assert not wrong(rig, {old[1]: stock.public[old[1]], **inside})

    lose(rig, old[3], row["name"])
    restore(rig, f"date={stock.first}").refused(f"{row['name']}: the mirror does not have it")
    assert not wrong(rig, {old[3]: stock.public[old[3]]})
    restore(rig, "everything=yes").good()
    assert not wrong(rig, stock.public)
    assert not any(restore(rig, "everything=yes").good().changed().values())
    dead(rig, *stock.deleted)
    audited(rig, stock.node)


def test_the_database_alone_is_lost(rig, stock):
    """What is newer than the dump is in the ledgers: nothing is missing."""
    row = rig.upload(NODES[0])
    gone = rig.upload(NODES[1])["name"]
    assert rig.request("DELETE", NODES[2], f"/api/media/{gone}", headers=rig.auth).status_code == 204
    for node in NODES:
        wait_until(
            f"the ledger of {node} to know it",
            lambda node=node: ", 0 behind" in rig.root(node, "tribrick ledger verify"), 30,
        )  # fmt: skip
    number = rig.root(NODES[0], "tribrick ledger verify --json")
    name, user = rig.variables["tribrick_database_name"], rig.variables["tribrick_database_user"]
    for one in (f"drop database {name} with (force)", f"create database {name} owner {user}"):
        rig.root(DATABASE[0], "su postgres -c 'psql -q -v ON_ERROR_STOP=1'", text_in=one)
    assert rig.request("GET", NODES[0], "/api/media/", headers=rig.auth).status_code >= 500, "it was to be empty"
    done = playbook(rig, "restore_database", CONFIRM).good()
    print(f"database restored, and the site ready again, in {done.seconds:.0f} s")
    rig.wait_ready(60)
    assert rig.root(NODES[0], "tribrick ledger verify --json") == number, "changes that the ledgers had are missing"
    stock.public[row["name"]] = row["sha256"]
    assert not wrong(rig, stock.public)
    dead(rig, *stock.deleted, gone)
    audited(rig, stock.node)


def destroy(rig: Rig, console: Console) -> None:
    """Take all hosts and disks away, and give fresh ones their names; see that nothing is left."""
    hosts = [*NODES, DATABASE[0]]
    capture(["docker", "rm", "--force", "--volumes", *map(rig.container, hosts)], deadline=120)
    for node in NODES:
        disk = rig.lab.disks[node]
        disk.unmount()
        disk.format()
    assert not containers(rig.lab)
    for node in NODES:
        rig.lab.disks[node].mount()
    create(console, rig.lab, rig.lab.recall(), outsider=False)
    for node in NODES:
        left = f"ls -A {rig.brick} /srv/media-mirror /var/lib/glusterd/vols /var/lib/tribrick 2>/dev/null || :"
        assert not rig.root(node, left).strip()
    # Debian's package makes PostgreSQL's own databases; one that somebody made has a number from 16384 on.
    made = rig.root(DATABASE[0], "ls -A /var/lib/postgresql/*/*/base 2>/dev/null || :").split()
    assert all(int(number) < 16384 for number in made), made


def off_site(rig: Rig, stock: Stock) -> Path:
    """Fetch the newest snapshot, as an off-site host has it."""
    target = PLACE / "off-site"
    capture(["rm", "-rf", str(target)], deadline=60)
    target.mkdir(parents=True)
    with (PLACE / "snapshot.tar").open("wb") as file:
        words = ["docker", "exec", rig.container(stock.node), "tar", "-C", SNAPSHOTS, "-c", stock.last]
        subprocess.run(words, stdout=file, check=True, timeout=120)
    capture(["tar", "-C", str(target), "-xf", str(PLACE / "snapshot.tar")], deadline=120)
    return target / stock.last


def send(rig: Rig, node: str, snapshot: Path) -> None:
    """Copy a snapshot to a node as the runbook says."""
    rig.ssh(node, f"install -d -o tribrick-mirror -g tribrick -m 0750 {SNAPSHOTS}")
    tar = subprocess.Popen(["tar", "-C", str(snapshot.parent), "-c", snapshot.name], stdout=subprocess.PIPE)
    into = f"sudo tar -C {SNAPSHOTS} -x && sudo chown -R tribrick-mirror:tribrick {SNAPSHOTS}/{snapshot.name}"
    with tar:
        subprocess.run([*rig.lab.ssh(node), into], stdin=tar.stdout, check=True, timeout=120)
    assert tar.returncode == 0


def manifest(snapshot: Path) -> dict[str, tuple[str, int]]:
    """Return name -> SHA-256, size of all that a snapshot holds."""
    with gzip.open(snapshot / "manifest.gz", "rt", encoding="utf-8") as lines:
        rows = [json.loads(line) for line in lines]
    return {row["name"]: (row["sha256"], row["size"]) for row in rows if row["state"] in ("stored", "foreign")}


@contextlib.contextmanager
def timed(took: dict[str, float], step: str):
    start = time.monotonic()
    yield
    took[step] = round(time.monotonic() - start, 1)


def test_everything_is_lost_and_comes_back(rig, stock):
    stock.last = snapshot(rig, stock.node)
    taken = time.monotonic()
    kept = off_site(rig, stock)
    held = manifest(kept)
    assert {*stock.public, *stock.private} <= held.keys()
    for node in NODES:
        row = rig.upload(node)
        stock.newer[row["name"]] = row["sha256"]
    stock.late = list(stock.public)[4]
    assert rig.request("DELETE", NODES[0], f"/api/media/{stock.late}", headers=rig.auth).status_code == 204
    window = time.monotonic() - taken

    destroy(rig, Console())
    took: dict[str, float] = {}
    with timed(took, "site.yml"):
        rig.rollout().good()
    dead(rig, *stock.public)
    at = chance("restores").choice(NODES)
    with timed(took, "copy of the snapshot"):
        send(rig, at, kept)
    with timed(took, "restore_database"):
        playbook(rig, "restore_database", CONFIRM).good()
    with timed(took, "restore_media"):
        done = restore(rig, "everything=yes").good()
    assert sum(done.changed().values()) == 1
    rig.wait_ready(60)

    hashes = {name: sha for name, (sha, _) in held.items()}
    assert not wrong(rig, hashes, ("mount", "brick"))
    assert not wrong(rig, {name: sha for name, sha in hashes.items() if not name.startswith("private/")}, ("web",))
    private(rig, stock)
    dead(rig, *stock.deleted, *stock.newer)
    audited(rig, at)
    for node in NODES:
        answer = rig.request("GET", node, f"/media/{stock.late}")
        assert answer.status_code == 200, "what was deleted after the snapshot is back, as the runbook says"
    assert not any(restore(rig, "everything=yes").good().changed().values())
    for name in [*stock.newer, *stock.deleted]:
        rig.known.pop(name, None)
    rig.known = {name: sha for name, sha in rig.known.items() if name in held}
    rig.settle(120)

    numbers = {
        "files": len(held), "bytes": sum(size for _, size in held.values()), "snapshot": stock.last,
        "seconds": took, "total": round(sum(took.values()), 1), "window": round(window, 1),
        "lost": sorted(stock.newer), "deleted_and_back": [stock.late],
    }  # fmt: skip
    (PLACE / "report.json").write_text(json.dumps(numbers, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(numbers, indent=2))
    if LONG:
        assert not any(rig.rollout().good().changed().values())
