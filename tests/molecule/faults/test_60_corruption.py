"""Copies spoiled behind Gluster's back: found by the audit, mended from the copy that matches the catalog."""

from __future__ import annotations

import subprocess

import pytest

from faults.checker import Seen, wanted_hash
from helpers import LONG, NODES, chance, sha256, wait_until
from judged import nodes, verdict
from mending import audit, bricks, fault, holds, keep, playbook, recovery, wrong_places

# Spoils one copy on its brick. Arguments: how, the brick, the name, and for `split` what the accused bricks are called.
SPOIL = """
import os, sys, uuid
how, brick, name = sys.argv[1:4]
path = os.path.join(brick, name)
was = os.stat(path)
number = os.getxattr(path, "trusted.gfid")
def link(gfid):
    text = str(uuid.UUID(bytes=gfid))
    return os.path.join(brick, ".glusterfs", text[:2], text[2:4], text)
def write(data):
    with open(path, "r+b") as file:
        file.write(data)
        os.fsync(file.fileno())
def read():
    with open(path, "rb") as file:
        return file.read()
def other(data, mask):
    place = len(data) // 2
    return data[:place] + bytes([data[place] ^ mask]) + data[place + 1:]
if how in ("flip1", "flip2", "split"):
    write(other(read(), 2 if how == "flip2" else 1))
elif how == "split-too":
    write(other(read(), 2))
elif how == "zeros":
    write(bytes(was.st_size))
elif how == "gfid":
    data = other(read(), 4)
    marks = {one: os.getxattr(path, one) for one in os.listxattr(path) if one.startswith("trusted.")}
    os.unlink(path)
    os.unlink(link(number))
    with open(path, "wb") as file:
        file.write(data)
    os.chown(path, was.st_uid, was.st_gid)
    os.chmod(path, was.st_mode & 0o7777)
    fresh = uuid.uuid4().bytes
    for one, value in (marks | {"trusted.gfid": fresh}).items():
        os.setxattr(path, one, value)
    os.makedirs(os.path.dirname(link(fresh)), mode=0o700, exist_ok=True)
    os.link(path, link(fresh))
elif how in ("remove", "remove-both"):
    os.unlink(path)
    if how == "remove-both":
        os.unlink(link(number))
if how.startswith("split"):
    # What three writes, each to one brick alone, leave behind: each accuses the others. With less Gluster sees no
    # split-brain: it believes who is accused by fewer than a majority, and heals the right copy away (seen).
    for client in sys.argv[4:]:
        os.setxattr(path, f"trusted.afr.{client}", (1).to_bytes(4, "big") + bytes(8))
if how == "index":  # and wants to be healed; only once all accuse, as one alone would be believed at once
    index = os.path.join(brick, ".glusterfs/indices/xattrop")
    base = [one for one in os.listdir(index) if one.startswith("xattrop-")] or [f"xattrop-{uuid.uuid4()}"]
    open(os.path.join(index, base[0]), "ab").close()
    try:
        os.link(os.path.join(index, base[0]), os.path.join(index, str(uuid.UUID(bytes=number))))
    except FileExistsError:
        pass  # a client that looked at the file has found the accusations, and noted them
if not how.startswith(("remove", "index")):
    os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))  # a disk that goes bad changes no time
"""
# How copies are spoiled: `sick` is the node that the seed chose, `too` a second one; the copy of `right` stays right.
KINDS = {
    "flipped-byte": {"sick": "flip1"},
    "three-copies": {"sick": "flip1", "too": "flip2"},
    "data-split-brain": {"sick": "split", "too": "split-too", "right": "split-only"},
    "gfid-split-brain": {"sick": "gfid"},
    "removed": {"sick": "remove"},
    "removed-with-link": {"sick": "remove-both"},
    "half-healed": {"sick": "zeros"},
}
# What an audit calls them; everything else is `different`.
FOUND = {"remove": "missing", "remove-both": "missing", "zeros": "torn"}
SIZES = {"gfid-split-brain": 65_537, "half-healed": 131_073}
ANSWERS = "recover_split_brain", "--extra-vars=confirm=yes"


def spoil(rig, node: str, how: str, name: str, *more: str) -> None:
    done = subprocess.run(
        ["docker", "exec", "-i", rig.container(node), "python3", "-", how, rig.brick, name, *more],
        input=SPOIL, text=True, capture_output=True, timeout=60, check=False,
    )  # fmt: skip
    assert done.returncode == 0, f"{node} {how} {name}: {done.stderr}"


def in_split_brain(rig) -> int:
    tree = rig.gluster("node1", f"volume heal {rig.volume} info summary", timeout=60)
    return max(int(one.text or 0) for one in tree.iter("numberOfEntriesInSplitBrain"))


def waiting(rig) -> set[str]:
    """Return what Gluster itself wants to heal."""
    tree = rig.gluster("node1", f"volume heal {rig.volume} info", timeout=60)
    return {(one.text or "").lstrip("/") for one in tree.iter("file")}


def prove(run, rig, files: dict[str, str], labels, wrong) -> dict[str, dict[str, Seen]]:
    """Fail unless each brick holds what it is to hold: the wrong copies are wrong, the others are right."""
    found = {}
    for kind, name in files.items():
        found[kind] = bricks(rig, name)
        for node, seen in found[kind].items():
            right = seen.sha256 == wanted_hash(run.seed, *labels[name])
            assert right == ((f"brick-{node}", name) not in wrong), f"{kind} on {node}: {seen}"
    both = found["three-copies"]
    assert len({seen.sha256 for seen in both.values()}) == 3, f"three different copies were to be made: {both}"
    assert in_split_brain(rig) == 1, "Gluster was to see one split-brain"
    known = waiting(rig) & set(files.values())
    assert known == {files["data-split-brain"]}, f"Gluster was to know of the split-brain only: {known}"
    return found


@pytest.mark.parametrize("sick", nodes("corruption"))
def test_spoiled_copies_are_found_and_mended_by_the_catalog(run, rig, sick):
    random = chance(f"corruption {sick}")
    too, right = random.sample([node for node in NODES if node != sick], 2)
    place = {"sick": sick, "too": too, "right": right}
    sizes = {kind: (f"{kind}-{sick}", SIZES.get(kind, 20_000)) for kind in KINDS}
    files = {kind: keep(run, rig, *sizes[kind], random.choice(NODES)) for kind in KINDS}
    labels = {name: sizes[kind] for kind, name in files.items()}
    wrong = {
        (f"brick-{place[who]}", files[kind]): FOUND.get(how, "different")
        for kind, spoilers in KINDS.items() for who, how in spoilers.items() if who != "right"
    }  # fmt: skip
    clients = {node: f"{rig.volume}-client-{position}" for position, node in enumerate(NODES)}
    with fault(run, "corruption", sick):
        for kind, spoilers in KINDS.items():
            for who, how in spoilers.items():
                accused = [clients[node] for node in NODES if node != place[who]] if how.startswith("split") else []
                spoil(rig, place[who], how, files[kind], *accused)
        for node in NODES:
            spoil(rig, node, "index", files["data-split-brain"])
        before = prove(run, rig, files, labels, wrong)
        holds(run, f"{len(wrong)} wrong copies on {sick} and {too}, right ones on {right}, one known to Gluster", sick)
        assert audit(rig, random.choice(NODES)) == wrong
        playbook(rig, ANSWERS[0]).refused("run it again with -e confirm=yes")
        prove(run, rig, files, labels, wrong)
        visit(run, rig, files, labels)
        run.history.mark("lift", sick)
        recovery(run, rig, *ANSWERS)
        assert wrong_places(run, rig, labels) == []
        assert in_split_brain(rig) == 0
        assert audit(rig, random.choice(NODES)) == {}
    for kind, spoilers in KINDS.items():
        for who, how in spoilers.items():
            if who != "right" and not how.startswith("remove"):
                kept_aside(rig, place[who], files[kind], before[kind][place[who]].sha256)


def visit(run, rig, files, labels) -> None:
    """Look at files through every node, as visitors do, so that mounts and caches have wrong bytes in their memory."""
    split = files["data-split-brain"]
    for name in files.values():
        for node in NODES:
            answer = rig.request("GET", node, f"/media/{name}")
            assert answer.status_code in (200, 503)
            # The mount refuses it; whoever serves it instead has compared it with the ledger.
            right = wanted_hash(run.seed, *labels[name])
            assert name != split or answer.status_code == 503 or sha256(answer.content) == right, node


def kept_aside(rig, node: str, name: str, wanted: str) -> None:
    """The wrong copy lies in the quarantine beside the brick, where only root gets at it."""
    place = f"{rig.brick.rpartition('/')[0]}/quarantine"
    assert rig.root(node, f"stat -c '%U %a' {place}").split() == ["root", "700"]
    said = rig.root(node, f"sha256sum {place}/{name.replace('/', '%')}.*").split()
    assert said[0] == wanted, f"{node} {name}: {said}"


if LONG:

    @pytest.mark.parametrize("node", NODES)
    def test_without_a_right_copy_a_person_has_to_decide(run, rig, node):
        """Nothing is guessed: every copy stays where it is."""
        label = f"hopeless-{node}"
        name = keep(run, rig, label, 20_000, node)
        others = [other for other in NODES if other != node]
        with fault(run, "hopeless", node):
            for other, how in zip((node, *others), ("flip1", "flip2", "flip2"), strict=True):
                spoil(rig, other, how, name)
            before = bricks(rig, name)
            assert len({seen.sha256 for seen in before.values()}) == 2
            holds(run, "no copy is right, two of three are alike", node)
            playbook(rig, *ANSWERS).refused("left as they were", "no copy has the catalog's hash")
            assert bricks(rig, name) == before
            for other, how in zip((node, *others), ("flip1", "flip2", "flip2"), strict=True):
                spoil(rig, other, how, name)  # a flip twice is none
        wait_until("the file to be right again", lambda: not wrong_places(run, rig, {name: (label, 20_000)}), 30)


def test_verdict(run):
    verdict(run)


def test_again_changes_nothing(run, rig):
    """Without load, as a load always has something under way."""
    assert not any(playbook(rig, *ANSWERS).good().changed().values())
