"""Files changed directly on two sides of a cut: both contents are kept, deleted stays deleted, the catalog agrees."""

from __future__ import annotations

import json
import shlex
from typing import Any

import pytest

from helpers import NODES, Rig, chance, sha256, wait_until
from kit import faults

ROOT = "/srv/media"
PLACE = "photos/direct"
ALONE = chance("alone").choice(NODES)  # its side has neither the other nodes nor the database
OTHER = next(node for node in NODES if node != ALONE)
SOON = 30.0  # seconds from a change to all nodes, by the service
LATER = 120.0


@pytest.fixture(scope="module", autouse=True)
def reconciled(rig: Rig) -> None:
    """Roll the service out for these tests alone: the others move files about on the disks. The last one ends it."""
    rig.rollout("-e", "media_sync=true").good()


def write(rig: Rig, node: str, name: str, content: str) -> None:
    """Write a file as somebody does who comes by SFTP."""
    path = shlex.quote(f"{ROOT}/{name}")
    script = f"umask 0002; mkdir -p {ROOT}/{PLACE}; cat > {path}.tmp && mv {path}.tmp {path}"
    somebody = "setpriv --reuid tribrick --regid tribrick --init-groups"
    rig.root(node, f"{somebody} sh -c {shlex.quote(script)}", text_in=content)


def remove(rig: Rig, node: str, name: str) -> None:
    rig.root(node, f"rm {ROOT}/{name}")


def tree(rig: Rig, node: str) -> dict[str, str]:
    """Return name -> SHA-256 of what a node shows below the place."""
    said = rig.root(node, f"cd {ROOT} && find {PLACE} -type f ! -name '.*' -exec sha256sum {{}} +")
    return {name: hashed for hashed, name in (line.split(maxsplit=1) for line in said.splitlines())}


def run(rig: Rig, node: str) -> dict[str, Any]:
    """Reconcile now, as an operator does; return what was done. The service may be at it just then."""
    done = rig.run_root(node, "tribrick sync run --json", timeout=120)
    assert done.stdout.startswith("{"), f"{node}: {done.returncode} {done.stdout} {done.stderr}"
    return json.loads(done.stdout)


def same(rig: Rig, deadline: float, *more: Any) -> dict[str, str]:
    """Wait until all nodes show the same files; return them."""
    def agreed() -> dict[str, str]:
        for step in more:
            step()
        seen = [tree(rig, node) for node in NODES]
        assert seen[0] == seen[1] == seen[2], seen
        return seen[0]

    return wait_until("all nodes to show the same files", agreed, deadline, interval=1.0)


def recorded(rig: Rig, node: str) -> bool:
    """Tell whether a node's state knows all that is on its disk."""
    scan = json.loads(rig.run_root(node, "tribrick sync plan --json", timeout=120).stdout or "{}").get("scan")
    return scan is not None and not any(scan[word] for word in ("new", "changed", "gone", "young"))


def everywhere(rig: Rig) -> None:
    for node in NODES:
        run(rig, node)


def audited(rig: Rig) -> None:
    """Rows and files agree on every node's disk."""
    for node in NODES:
        done = rig.run_root(node, "tribrick audit --json", timeout=120)
        said = json.JSONDecoder().raw_decode(done.stdout[done.stdout.index("{"):])[0]
        assert not said["away"] and said["checked"] and not said["findings"], said
        assert done.returncode == 0


def test_what_is_changed_on_one_node_is_on_all_soon_and_in_the_catalog(rig):
    write(rig, NODES[0], f"{PLACE}/one.txt", "of node1")
    write(rig, NODES[1], f"{PLACE}/two.txt", "of node2")
    wanted = {f"{PLACE}/one.txt": sha256(b"of node1"), f"{PLACE}/two.txt": sha256(b"of node2")}
    wait_until("both files on all nodes", lambda: all(tree(rig, node) == wanted for node in NODES), SOON, interval=1.0)
    for node in NODES:
        assert rig.request("GET", node, f"/media/{PLACE}/one.txt").content == b"of node1"
    remove(rig, NODES[2], f"{PLACE}/two.txt")
    del wanted[f"{PLACE}/two.txt"]
    wait_until("the file to be gone", lambda: all(tree(rig, node) == wanted for node in NODES), SOON, interval=1.0)
    wait_until("the catalog to agree", lambda: audited(rig) is None, LATER, interval=2.0)


def test_the_same_names_on_two_sides_of_a_cut(rig):
    names = {word: f"{PLACE}/{word}.txt" for word in ("alone-first", "alone-last", "deleted", "same", "once")}
    for word in ("deleted", "once"):
        write(rig, OTHER, names[word], f"{word} before")
    before = {names["deleted"], names["once"]}
    wait_until("them on all nodes", lambda: all(before <= {*tree(rig, node)} for node in NODES), SOON, interval=1.0)
    upload = rig.upload(OTHER)
    cut = faults.make(rig.lab, "silence", [ALONE])
    with cut.holding():
        write(rig, ALONE, names["alone-first"], "earlier, alone")
        write(rig, OTHER, names["alone-first"], "later, others")
        write(rig, OTHER, names["alone-last"], "earlier, others")
        write(rig, ALONE, names["alone-last"], "later, alone")
        for node in (ALONE, OTHER):
            write(rig, node, names["same"], "both wrote this")
        write(rig, ALONE, names["deleted"], "changed, alone")
        remove(rig, OTHER, names["deleted"])
        write(rig, ALONE, names["once"], "changed once")
        # Each side has recorded its own before they hear of each other.
        for node in (ALONE, OTHER):
            wait_until(f"{node} to have recorded it", lambda node=node: recorded(rig, node), LATER, interval=1.0)
    seen = same(rig, LATER, lambda: everywhere(rig))
    print(json.dumps(seen, indent=2))
    contents = {hashed: name for name, hashed in seen.items()}
    for text in ("earlier, alone", "later, others", "earlier, others", "later, alone", "both wrote this",
                 "changed, alone", "changed once"):  # fmt: skip
        assert sha256(text.encode()) in contents, f"{text!r} is nowhere: {seen}"
    assert seen[names["alone-first"]] == sha256(b"later, others"), "the last writer has the name"
    assert f"/alone-first.conflict-{ALONE}-" in contents[sha256(b"earlier, alone")]
    assert names["deleted"] not in seen, "deleted stays deleted"
    assert f"/deleted.conflict-{ALONE}-" in contents[sha256(b"changed, alone")]
    assert seen[names["same"]] == sha256(b"both wrote this"), "the same content is no conflict"
    wait_until("the catalog to agree", lambda: audited(rig) is None, LATER, interval=2.0)
    assert same(rig, LATER, lambda: everywhere(rig)) == seen, "a further run changes nothing"
    for node in NODES:
        for name, hashed in seen.items():
            answer = rig.request("GET", node, f"/media/{name}")
            assert (answer.status_code, sha256(answer.content)) == (200, hashed), f"{node} {name}"
        told = json.loads(rig.run_root(node, "tribrick sync conflicts --json").stdout)
        assert {one["name"] for one in told["conflicts"]} >= {name for name in seen if ".conflict-" in name}
        assert rig.fetch(node, upload).status_code == 200
    rig.check_known()


def test_the_door_is_closed_again(rig):
    """Without the variable nobody comes in, and the service is gone."""
    rig.rollout().good()
    for node in NODES:
        assert rig.run_root(node, "systemctl is-active tribrick-sync").stdout.strip() != "active"
        assert rig.run_root(node, "test ! -e /etc/tribrick/sync/authorized_keys").returncode == 0
        assert rig.run_root(node, "test ! -e /etc/ssh/sshd_config.d/60-tribrick-sync.conf").returncode == 0
