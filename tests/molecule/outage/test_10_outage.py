"""The volume is away, the nodes live: uploads go on in the spools, and nothing acknowledged is lost on the way back."""

from __future__ import annotations

import contextlib
import json
import re
import shlex
import time
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import urlsplit

import pytest

from faults import observer
from faults.checker import wanted_hash
from faults.history import Event, content
from faults.workload import EXTENSION
from helpers import LONG, NODES, chance, sha256, wait_until
from judged import CLEAN, acknowledged, goes_on, hold, joined, nodes, verdict
from mending import keep

DRAINED = 90.0  # seconds from the volume's return until nothing is left in the spools
DEADLINE = 10.0  # of the site's calls on the volume
# Runs on a node: an upload past nginx, whose workers wait for a hung mount. One JSON object in, one out.
PAST = """
import http.client, json, random, socket, sys, time
q = json.load(sys.stdin)
data = random.Random(q["content"]).randbytes(q["size"])
line = socket.socket(socket.AF_UNIX)
line.settimeout(60)
line.connect("/run/tribrick/site.sock")
site = http.client.HTTPConnection("site")
site.sock = line
head = '--x\\r\\nContent-Disposition: form-data; name="file"; filename="%s"\\r\\n\\r\\n' % q["filename"]
kind = "multipart/form-data; boundary=x"
headers = {"Host": q["host"], "Authorization": "Token " + q["token"], "Content-Type": kind}
start = time.monotonic()
site.request("POST", "/api/media/", head.encode() + data + b"\\r\\n--x--\\r\\n", headers)
answer = site.getresponse()
print(json.dumps([answer.status, answer.read().decode(), time.monotonic() - start]))
"""


def others(node: str) -> tuple[str, ...]:
    return tuple(other for other in NODES if other != node)


def sql(rig, query: str) -> str:
    """Ask the database itself, which answers while no node does."""
    ask = f"su postgres -c 'psql -qtA -d {rig.variables['tribrick_database_name']}'"
    return rig.root("db1", ask, text_in=query).strip()


def left(rig) -> int:
    """Return how many living files are in the spools alone."""
    return int(sql(rig, "select count(*) from tribrick_mediafile where spooled and state = 'stored'"))


def spooled(rig, node: str) -> set[str]:
    """Return the names of the files in a node's spool."""
    path = rig.lab.spool
    return set(rig.root(node, f"find {path} -type f -not -path '{path}/.*' -printf '%P\\n'").split())


def known(rig, names: set[str]) -> set[str]:
    """Return those of the names that have a row."""
    listed = ", ".join(f"'{name}'" for name in names)
    query = f"select name from tribrick_mediafile where name in ({listed or 'null'})"  # noqa: S608 - names of our own
    return set(sql(rig, query).split())


def drained(rig, hosts: tuple[str, ...] = NODES) -> None:
    """Wait until no spool holds a file that has a row, and no row waits for its file."""
    wait_until("the spools to be drained", lambda: left(rig) == 0, DRAINED)
    for node in hosts:
        wait_until(f"the spool of {node} to be empty", lambda node=node: not known(rig, spooled(rig, node)), DRAINED)


def served(run, rig, files: dict[str, tuple[str, int]], hosts: tuple[str, ...]) -> None:
    """Each of these nodes serves each of these files (name -> label, size) now, not after a while."""
    for name, (label, size) in files.items():
        for host in hosts:
            answer = rig.request("GET", host, f"/media/{name}")
            assert answer.status_code == 200, f"{host} {name}: {answer.status_code} {answer.text[:200]}"
            assert sha256(answer.content) == wanted_hash(run.seed, label, size), f"{host} {name}: other bytes"


def delete(run, rig, name: str, host: str) -> None:
    op = run.history.number()
    run.history.add(Event(op, "invoke", "delete", 0.0, "test", host, name=name))
    answer = rig.request("DELETE", host, f"/api/media/{name}", headers={"Authorization": f"Token {run.token}"})
    assert answer.status_code == 204, f"{host} answered {answer.status_code}: {answer.text[:300]}"
    run.history.add(Event(op, "ok", "delete", 0.0, "test", host, name=name, status=204))


def status(rig, host: str, name: str) -> int:
    return rig.request("GET", host, f"/media/{name}").status_code


def refused(rig, host: str) -> bool:
    """Upload through a node; tell whether it was refused with the word that means it."""
    answer = rig.try_upload(host, b"nobody keeps this", "refused.bin")
    if answer.status_code == 201:
        return False
    assert answer.status_code == 503 and "Retry-After" in answer.headers, f"{answer.status_code} {answer.text[:300]}"
    return True


@pytest.mark.parametrize("cut", nodes("power cut of a node with spooled files"))
def test_two_bricks_die_and_a_node_with_spooled_files_loses_its_power(run, rig, cut):
    """The peers serve what that node had in its spool, and drain it when the volume is back without it."""
    alive = others(cut)
    with contextlib.ExitStack() as power:
        with run.nemesis.under("brick-kill", list(alive), clean=False):
            goes_on(run)
            sizes = {f"spooled-{cut}-{number}": 70_000 + number for number in range(6)}
            hosts = [*NODES, *NODES]
            files = {keep(run, rig, label, size, hosts.pop()): (label, size) for label, size in sizes.items()}
            served(run, rig, files, NODES)
            holders = {name: [node for node in NODES if name in spooled(rig, node)] for name in files}
            assert all(len(found) >= 2 for found in holders.values()), holders
            gone = keep(run, rig, f"gone-{cut}", 5000, cut)
            delete(run, rig, gone, alive[0])
            # "Not found" is said only when the volume is there, too.
            assert all(status(rig, node, gone) in (404, 503) for node in NODES)
            mine = {name for name, found in holders.items() if cut in found}
            assert mine, "the node has nothing in its spool that could be lost"
            power.enter_context(run.nemesis.under("power-cut", [cut], clean=False))
            goes_on(run, alive)
            served(run, rig, files, alive)
            assert all(status(rig, node, gone) in (404, 503) for node in alive)
        drained(rig, alive)
        for node in alive:
            seen = observer.look(rig.lab, "mount", node, sorted(files))
            assert {one.name: one.sha256 for one in seen} == {
                name: wanted_hash(run.seed, *file) for name, file in files.items()
            }, f"the volume at {node} lacks what was drained"
    rig.wait_ready(60)
    drained(rig)
    served(run, rig, files, NODES)
    assert [status(rig, node, gone) for node in NODES] == [404] * 3
    if CLEAN:
        run.nemesis.recover(cut)


def past_nginx(run, rig, node: str, label: str, size: int) -> tuple[str, float]:
    """Upload by the site's socket; return the stored name and how long it took."""
    op = run.history.number()
    question = {
        "host": urlsplit(rig.url(node)).netloc, "token": run.token, "filename": f"{label}{EXTENSION}",
        "content": f"{run.seed} {label} {size}", "size": size,
    }  # fmt: skip
    run.history.add(Event(op, "invoke", "upload", 0.0, "test", node, label, size))
    said = rig.root(node, f"python3 -c {shlex.quote(PAST)}", timeout=90, text_in=json.dumps(question))
    code, body, seconds = json.loads(said)
    assert code == 201, f"{node} answered {code}: {body[:300]}"
    row = json.loads(body)
    assert row["sha256"] == sha256(content(run.seed, label, size))
    run.history.add(Event(op, "ok", "upload", 0.0, "test", node, label, size, row["name"], status=201))
    return row["name"], seconds


def waiting(rig, node: str) -> int:
    """Return how many threads of the site wait for an answer of the mount."""
    listed = rig.root(node, "ps -eLo wchan:40,args")
    return len(re.findall(r"^\S*(?:request_wait_answer|fuse)\S* .*gunicorn", listed, re.MULTILINE))


def same_size(rig, place: str, node: str, size: int) -> list[str]:
    """Return all files of a size below a directory; Gluster's own hard links left out."""
    script = f"find {place} -name .glusterfs -prune -o -type f -size {size}c -printf '%P\\n'"
    return rig.root(node, script).split()


@pytest.mark.parametrize("node", nodes("late write"))
def test_a_late_write_races_the_drain(run, rig, node):
    """Its mount hangs, so it spools after its deadline; then the write ends late while all three nodes drain.

    Of one node: where a mount hangs, its nginx does too, and with it the receiver that a peer needs.
    """
    joined(run)
    wanted = {f"late-{node}-{number}": 300_001 + 2 * number for number in range(3)}
    before = {size: set(same_size(rig, rig.mount, node, size)) for size in wanted.values()}
    with run.nemesis.under("mount-hang", [node], clean=False):
        with ThreadPoolExecutor(len(wanted)) as pool:
            answers = list(pool.map(lambda label: past_nginx(run, rig, node, label, wanted[label]), wanted))
        hung = waiting(rig, node)
        assert max(seconds for _, seconds in answers) > 0.9 * DEADLINE, f"nobody had waited for the volume: {answers}"
        assert hung, "no write is left that could end late"
    run.console.say(f"  {hung} calls of the site ended late")
    goes_on(run)
    drained(rig)
    names = [name for name, _ in answers]
    for name, size in zip(names, wanted.values(), strict=True):
        for place in (rig.mount, rig.brick):
            for at in NODES:
                wait_until(
                    f"one new file of {size} bytes below {place} of {at}",
                    lambda place=place, at=at, size=size, name=name: (
                        {*same_size(rig, place, at, size)} - before[size] == {name}
                    ),
                    DRAINED,
                )  # fmt: skip
    served(run, rig, dict(zip(names, wanted.items(), strict=True)), NODES)


def test_the_database_is_away_while_uploads_are_spooled(run, rig):
    """Without a row there is no upload, and no copy is left of one that was refused."""
    hit = chance("bricks and database").sample(NODES, 2)
    with run.nemesis.under("brick-kill", hit, clean=False):
        goes_on(run)
        files = {keep(run, rig, "before-the-database", 9000, hit[0]): ("before-the-database", 9000)}
        with run.nemesis.under("database-stop", [], clean=False):
            late, before = run.history.now(), {node: spooled(rig, node) for node in NODES}
            assert all(refused(rig, node) for node in NODES)
            served(run, rig, files, NODES)
            run.nemesis.hold(hold(8.0))
            assert acknowledged(run, late, "upload", NODES) == 0
            for node in NODES:
                wait_until(
                    f"{node} to take refused uploads back",
                    lambda node=node: spooled(rig, node) <= before[node], 60,
                )  # fmt: skip
        goes_on(run)
    drained(rig)
    served(run, rig, files, NODES)


@pytest.mark.parametrize("alone", NODES if LONG else (chance("alone").choice(NODES),))
def test_two_nodes_are_down(run, rig, alone):
    """One disk is no promise: each upload is refused, and of none a row or a copy is left."""
    added = "select count(*) from tribrick_change where kind = 'added'"  # deletes need no volume, and go on
    joined(run)
    with run.nemesis.under("two-killed", list(others(alone)), clean=CLEAN):
        wait_until(f"{alone} to refuse", lambda: refused(rig, alone), 60)
        late, number, before = run.history.now(), sql(rig, added), spooled(rig, alone)
        assert refused(rig, alone)
        run.nemesis.hold(hold(8.0))
        assert acknowledged(run, late, "upload", (alone,)) == 0
        assert sql(rig, added) == number, "a refused upload has left a row"
        wait_until("refused uploads to be taken back", lambda: spooled(rig, alone) <= before, 60)
    start = time.monotonic()
    goes_on(run)
    run.console.say(f"  uploads through all nodes {time.monotonic() - start:.1f} s after the nodes were back")


def test_verdict(run):
    assert {"brick-kill", "power-cut", "mount-hang", "database-stop", "two-killed"} <= set(run.nemesis.done)
    verdict(run)
