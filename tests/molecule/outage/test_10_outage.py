"""The volume is away, the nodes live: uploads go on in the spools, and nothing acknowledged is lost on the way back."""

from __future__ import annotations

import contextlib
import re
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from faults import observer
from faults.checker import wanted_hash
from helpers import LONG, NODES, chance, wait_until
from judged import CLEAN, acknowledged, goes_on, hold, in_ledger, joined, nodes, others, verdict
from mending import delete, keep, served

DRAINED = 90.0  # seconds from the volume's return until nothing is left in the spools
DEADLINE = 10.0  # of the site's calls on the volume
FOLLOWED = 10.0  # seconds until a spooled file is served by all nodes


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


def followed(run, rig, files: dict[str, tuple[str, int]], hosts: tuple[str, ...]) -> None:
    """All these nodes serve these files once their ledgers know them: who cannot ask the volume goes by those."""
    start = time.monotonic()
    wait_until("what was spooled to be served", lambda: served(run, rig, files, hosts), FOLLOWED)
    run.console.say(f"  spooled files served by {', '.join(hosts)} after {time.monotonic() - start:.1f} s")


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
            followed(run, rig, files, NODES)
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
    # After its boot the node asks no spool until its ledger is up to date.
    wait_until("the deleted file to be gone", lambda: [status(rig, node, gone) for node in NODES] == [404] * 3, 30)
    if CLEAN:
        run.nemesis.recover(cut)


def timed(run, rig, label: str, size: int, host: str) -> tuple[str, float]:
    """Upload; return the stored name and how long it took."""
    start = time.monotonic()
    return keep(run, rig, label, size, host), time.monotonic() - start


def waiting(rig, node: str) -> int:
    """Return how many threads of the site wait for an answer of the mount."""
    listed = rig.root(node, "ps -eLo wchan:40,args")
    return len(re.findall(r"^\S*(?:request_wait_answer|fuse)\S* .*gunicorn", listed, re.MULTILINE))


def same_size(rig, place: str, node: str, size: int) -> list[str]:
    """Return all files of a size below a directory; Gluster's own hard links left out."""
    script = f"find {place} -name .glusterfs -prune -o -type f -size {size}c -printf '%P\\n'"
    return rig.root(node, script).split()


@pytest.mark.parametrize("hung", [*((node,) for node in nodes("late write")), NODES], ids=",".join)
def test_a_late_write_races_the_drain(run, rig, hung):
    """Its mount hangs, so it spools after its deadline; then the write ends late while all three nodes drain."""
    joined(run)
    wanted = {f"late-{'-'.join(hung)}-{number}": 300_001 + 2 * number for number in range(3)}
    before = {size: set(same_size(rig, rig.mount, hung[0], size)) for size in wanted.values()}
    with run.nemesis.under("mount-hang", list(hung), clean=False):
        hosts = [hung[number % len(hung)] for number in range(len(wanted))]
        with ThreadPoolExecutor(len(wanted)) as pool:
            answers = list(pool.map(lambda *one: timed(run, rig, *one), wanted, wanted.values(), hosts))
        late = {node: waiting(rig, node) for node in hung}
        assert max(seconds for _, seconds in answers) > 0.9 * DEADLINE, f"nobody had waited for the volume: {answers}"
        assert all(late.values()), f"no write is left that could end late: {late}"
        files = dict(zip([name for name, _ in answers], wanted.items(), strict=True))
        followed(run, rig, files, NODES)
    run.console.say(f"  {sum(late.values())} calls of the sites ended late")
    goes_on(run)
    drained(rig)
    for name, (_, size) in files.items():
        for place in (rig.mount, rig.brick):
            for at in NODES:
                wait_until(
                    f"one new file of {size} bytes below {place} of {at}",
                    lambda place=place, at=at, size=size, name=name: (
                        {*same_size(rig, place, at, size)} - before[size] == {name}
                    ),
                    DRAINED,
                )  # fmt: skip
    served(run, rig, files, NODES)


def test_the_database_is_away_while_uploads_are_spooled(run, rig):
    """Without a row there is no upload, and no copy is left of one that was refused."""
    hit = chance("bricks and database").sample(NODES, 2)
    with run.nemesis.under("brick-kill", hit, clean=False):
        goes_on(run)
        files = {keep(run, rig, "before-the-database", 9000, hit[0]): ("before-the-database", 9000)}
        followed(run, rig, files, NODES)
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
    """One disk is no promise: each upload is refused, and of none a row or a copy is left. Reads go on."""
    added = "select count(*) from tribrick_change where kind = 'added'"  # deletes need no volume, and go on
    joined(run)
    sizes = {f"older-{alone}-{number}": 40_000 + number for number in range(4)}
    files = {keep(run, rig, label, size, alone): (label, size) for label, size in sizes.items()}
    gone = keep(run, rig, f"older-gone-{alone}", 6000, alone)
    delete(run, rig, gone, alone)
    for name, wanted in {**dict.fromkeys(files, "stored"), gone: "purged"}.items():
        what = f"the ledger of {alone} to know that {name} is {wanted}"
        wait_until(what, lambda name=name, wanted=wanted: in_ledger(rig, alone, name) == wanted, 30)
    with run.nemesis.under("two-killed", list(others(alone)), clean=CLEAN):
        wait_until(f"{alone} to refuse", lambda: refused(rig, alone), 60)
        for answer in served(run, rig, files, (alone,)):
            assert answer.headers["X-Tribrick-Source"] == "standby", dict(answer.headers)
        assert status(rig, alone, gone) == 404
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
