"""What the recovery modules decide, and the modules against replayed answers and real directories."""

from __future__ import annotations

import os

import pytest
from ansible_collections.tribrick.media.plugins.module_utils import gluster, recovery
from ansible_collections.tribrick.media.plugins.modules import brick_tree, media_mount

from .conftest import read

# --- healing ---


def heal(brick, total=0, broken=0, connected=True):
    status = "Connected" if connected else "Transport endpoint is not connected"
    return gluster.BrickHeal(f"{brick}:/b", connected, status, total if connected else None, None, broken, None)


def test_the_longest_list_counts():
    assert recovery.left_to_heal([]) == 0
    assert recovery.left_to_heal([heal("node1", 3), heal("node2", 5), heal("node3", connected=False)]) == 5


@pytest.mark.parametrize("release", ["10.3", "11.1"])
def test_a_brick_that_is_away_is_an_obstacle(release):
    assert recovery.heal_obstacles(gluster.parse_heal(read("heal_ok", release))) == []
    said = recovery.heal_obstacles(gluster.parse_heal(read("heal_node3_down", release)))
    assert len(said) == 1 and "check_health" in said[0]


def test_split_brain_is_an_obstacle_with_a_way_out():
    said = recovery.heal_obstacles([heal("node1", 2, broken=1), heal("node2", 2, broken=1)])
    assert said == [
        "1 entry has copies that contradict each other; run playbooks/recover_split_brain.yml -e confirm=yes"
    ]


def test_stuck_is_no_progress_for_too_long():
    assert not recovery.stuck([], 100, 10)
    falling = [(0.0, 9), (20.0, 5), (40.0, 4)]
    assert not recovery.stuck(falling, 45, 10)
    assert recovery.stuck(falling, 50, 10)
    assert recovery.stuck([*falling, (50.0, 6)], 51, 10)  # more work is no progress


CRAWLS = """Gathering crawl statistics on volume media has been successful
------------------------------------------------

Crawl statistics for brick no 0
Hostname of brick node1

Starting time of crawl: Fri Nov 20 13:25:44 2026

Ending time of crawl: Fri Nov 20 13:25:45 2026

Type of crawl: FULL
No. of entries healed: 0

Starting time of crawl: Fri Nov 20 13:26:43 2026

{end}
Type of crawl: {kind}
No. of entries healed: 0
"""


def test_full_crawls():
    first = ("0", "Fri Nov 20 13:25:44 2026")
    running = CRAWLS.format(end="Crawl is in progress", kind="FULL")
    assert recovery.full_crawls(running) == (frozenset({first}), True)
    ended = CRAWLS.format(end="Ending time of crawl: Fri Nov 20 13:26:50 2026", kind="FULL")
    assert recovery.full_crawls(ended) == (frozenset({first, ("0", "Fri Nov 20 13:26:43 2026")}), False)
    index = CRAWLS.format(end="Ending time of crawl: Fri Nov 20 13:26:50 2026", kind="INDEX")
    assert recovery.full_crawls(index) == (frozenset({first}), False)
    assert recovery.full_crawls("nonsense") == (frozenset(), False)


# --- comparing bricks ---


def test_directories_that_differ():
    same = {".": "a", "photos": "b"}
    assert recovery.differing_directories({}) == []
    assert recovery.differing_directories({"node1": same, "node2": dict(same)}) == []
    assert recovery.differing_directories({"node1": same, "node2": {".": "a"}, "node3": {".": "c"}}) == [".", "photos"]


def test_differences_that_pass_are_none():
    one = {"node1": {"a": {"size": 1}, "b": {"size": 2}}, "node2": {"a": {"size": 1}}}
    first = recovery.differences(one)
    assert first == {"b": {"node1": {"size": 2}, "node2": None}}
    assert recovery.lasting(first, recovery.differences(one)) == first
    growing = recovery.differences({"node1": {"b": {"size": 3}}, "node2": {}})
    assert recovery.lasting(first, growing) == {}
    assert recovery.lasting({}, first) == {}


def test_differences_in_words():
    found = {
        f"n{i:02}": {"node1": {"size": 1, "sha256": "abc", "gfid": "0123456789"}, "node2": None} for i in range(22)
    }
    lines = recovery.explain(found)
    assert lines[0] == "n00  (node1: 1 B, abc, gfid 01234567; node2: missing)"
    assert len(lines) == 21 and lines[-1] == "and 2 more"


def tree(root):
    """The digests of a directory, as the module makes them, for its root alone."""
    return brick_tree.read(str(root), ".")


def test_a_brick_is_read_past_gluster(tmp_path):
    for brick in ("one", "two"):
        root = tmp_path / brick
        (root / ".glusterfs").mkdir(parents=True)
        (root / ".glusterfs" / brick).touch()
        (root / "file").write_bytes(b"same")
        (root / "photos").mkdir()
        os.symlink("file", root / "link")
    one, two = tmp_path / "one", tmp_path / "two"
    assert tree(one) == tree(two) and set(tree(one)) == {"file", "photos", "link"}
    os.utime(one / "file", (0, 0))
    assert tree(one) == tree(two)  # times differ between replicas
    for change in (
        lambda: (one / "file").write_bytes(b"sane"),
        lambda: (one / "file").chmod(0o600),
        lambda: (one / "file").unlink(),
    ):
        (one / "file").write_bytes(b"same")
        (one / "file").chmod(0o644)
        (two / "file").chmod(0o644)
        assert tree(one) == tree(two)
        change()
        assert tree(one) != tree(two)
    assert brick_tree.read(str(one), "gone") == {}


# --- the mount ---


def test_the_connection_of_a_mount():
    text = (
        "22 1 0:20 / / rw - ext4 /dev/sda rw\n"
        "40 22 0:155 / /srv/media rw,relatime shared:1 - fuse.glusterfs node1:/media rw\n"
        "41 22 0:156 / /srv/media\\040two rw - fuse.glusterfs node1:/media rw\n"
        "42 22 0:157 / /srv/media rw - tmpfs none rw\nbroken\n"
    )
    assert media_mount.connections(text, "/srv/media") == ["155"]
    assert media_mount.connections(text, "/srv/media two") == ["156"]
    assert media_mount.connections("", "/srv/media") == []
