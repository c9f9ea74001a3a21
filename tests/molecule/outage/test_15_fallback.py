"""GlusterFS goes as a whole. Under load the site leaves it for the nodes' own disks, works there, and comes back."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Sequence

import pytest

from faults import observer
from faults.checker import refused_for, refused_reads, wanted_hash
from helpers import LONG, NODES, chance, wait_until
from judged import goes_on, in_ledger, nodes, others, verdict
from mending import delete, keep, kill, playbook, served

AGE = 10.0  # seconds after which a file can be read through every node, whatever happens
SENT = 60.0  # until a file is on every node's own disk
MARGIN = 10.0  # of the clients' times beside the playbook's: an upload ends later than it was refused
KILLED = ("fallback_enable", "fallback_disable")  # the short set kills one of them on its way


@pytest.fixture(scope="module")
def stopped() -> Iterator[contextlib.ExitStack]:
    """What is closed when GlusterFS is started again; at the latest when the tests have ended."""
    with contextlib.ExitStack() as stack:
        yield stack


def all_reads_answered(run, since: float, hosts: Sequence[str] = NODES) -> None:
    """No read through these nodes has failed since then, unless the file was new or to be deleted."""
    bad = refused_reads(run.history.since(0.0), since, run.history.now(), hosts, AGE)
    told = [f"{op.end.time:.1f} s {op.invoke.host} {op.name}: {op.end.status} {op.end.note}" for op in bad if op.end]
    assert not bad, f"{len(bad)} reads were refused:\n" + "\n".join(told[:20])


def in_trees(run, hosts: Sequence[str] = NODES) -> None:
    """Every file that the clients have now is on these nodes' own disks, with its bytes."""
    with run.load.known.lock:
        files = dict(run.load.known.files)
    assert files, "nothing is stored"

    def wrong() -> list[str]:
        seen = [one for node in hosts for one in observer.look(run.lab, "tree", node, sorted(files))]
        alive = set(run.load.known.files)  # others are being deleted
        bad = [one for one in seen if one.name in alive and one.sha256 != wanted_hash(run.seed, *files[one.name])]
        return [f"{one.place} {one.name}: {one.state} {one.detail}" for one in bad]

    wait_until("every file to be on every node's disk", lambda: not wrong(), SENT, interval=1.0)


def switch(run, rig, name: str) -> None:
    """Run a playbook of the mode, killed on its way first where it is its turn; see how long uploads are refused."""
    turn = LONG or name == chance("killed fallback").choice(KILLED)
    since = run.history.now()
    if turn:
        kill(run, rig, name)
        all_reads_answered(run, since)
    run.history.mark(f"playbook {name}")
    begun = run.history.now()
    done = playbook(rig, name).good()
    goes_on(run, NODES, ("upload", "delete"))
    count, seconds = refused_for(run.history.since(0.0), begun, run.history.now(), NODES)
    told = [int(number) for number in re.findall(r"Uploads were refused on \S+ for (\d+) s", done.text)]
    run.console.say(
        f"  {name}: {done.seconds:.0f} s; it says that uploads were refused for {max(told, default=0)} s; clients saw "
        f"{count} refusals within {seconds:.0f} s"
    )
    if not turn:
        assert len(told) == len(NODES), "the playbook does not say for how long"
        assert seconds <= max(told) + MARGIN, f"refused for {seconds} s, the playbook says {told}"
    all_reads_answered(run, since)


def test_all_of_gluster_stops(run, rig, stopped):
    """Before anybody does anything: reads go on from the standbys, uploads into the spools."""
    sizes = {f"fallback-before-{number}": 30_000 + number for number in range(6)}
    hosts = [*NODES, *NODES]
    files = {keep(run, rig, label, size, hosts.pop()): (label, size) for label, size in sizes.items()}
    for node in NODES:
        for name in files:
            known = f"the ledger of {node} to know {name}"
            wait_until(known, lambda node=node, name=name: in_ledger(rig, node, name) == "stored", 30)
    since = run.history.now()
    stopped.enter_context(run.nemesis.under("gluster-stop", list(NODES), clean=False))
    goes_on(run, NODES, ("upload", "delete"))
    served(run, rig, files, NODES)
    all_reads_answered(run, since)


def test_the_site_leaves_gluster(run, rig):
    switch(run, rig, "fallback_enable")
    assert observer.without_gluster(rig.lab)
    in_trees(run)
    sizes = {f"fallback-in-{number}": 50_000 + number for number in range(6)}
    hosts = [*NODES, *NODES]
    files = {keep(run, rig, label, size, hosts.pop()): (label, size) for label, size in sizes.items()}
    served(run, rig, files, NODES)
    rig.rollout().refused("Gluster-free mode")


@pytest.mark.parametrize("node", nodes("dies without gluster"))
def test_a_node_dies_in_this_mode_and_comes_back(run, rig, node):
    alive = others(node)
    gone = keep(run, rig, f"fallback-gone-{node}", 7000, node)
    assert [one.status_code for one in served(run, rig, {gone: (f"fallback-gone-{node}", 7000)}, NODES)] == [200] * 3
    since = run.history.now()
    with run.nemesis.under("kill", [node], clean=False):
        goes_on(run, alive, ("upload", "delete"))
        sizes = {f"fallback-away-{node}-{number}": 60_000 + number for number in range(4)}
        hosts = [*alive, *alive]
        files = {keep(run, rig, label, size, hosts.pop()): (label, size) for label, size in sizes.items()}
        delete(run, rig, gone, alive[0])
        served(run, rig, files, alive)
        all_reads_answered(run, since, alive)
    rig.wait_ready(90)
    back = run.history.now()
    served(run, rig, files, NODES)
    goes_on(run, NODES, ("upload", "delete"))
    in_trees(run)

    def left() -> list[str]:
        seen = observer.look_everywhere(rig.lab, [gone], observer.OWN_KINDS)
        return [one.place for one in seen if one.state != "absent"]

    wait_until("the deleted file to be nowhere", lambda: not left(), SENT)
    all_reads_answered(run, back)


def test_the_site_comes_back_to_the_volume(run, rig, stopped):
    stopped.close()
    playbook(rig, "recover_heal").good()
    switch(run, rig, "fallback_disable")
    assert not observer.without_gluster(rig.lab)
    assert not any(rig.root(node, f"ls {observer.MARK} 2>/dev/null || :") for node in NODES)
    run.nemesis.recover()


def test_the_rollout_changes_nothing_afterwards(rig, run):
    assert not any(rig.rollout().good().changed().values())


def test_verdict(run):
    assert {"gluster-stop", "kill"} <= set(run.nemesis.done)
    verdict(run)
