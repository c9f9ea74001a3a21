"""What the recovery modules decide, and the modules against replayed answers and real directories."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible_collections.tribrick.media.plugins.module_utils import contradictions, gluster, recovery
from ansible_collections.tribrick.media.plugins.modules import (
    brick_quarantine,
    brick_tree,
    gluster_heal,
    gluster_replace,
    gluster_state,
    media_lookup,
    media_mount,
)

from .conftest import Gluster, read

ROOT = Path(__file__).resolve().parents[3]

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


def test_names_that_are_no_utf8_are_compared_and_looked_up_too(run, tmp_path, monkeypatch):
    """Ansible takes no such text from a module, and one of them would end every recovery."""
    found = []
    for content in (b"good", b"bad "):
        (tmp_path / ".glusterfs").mkdir(exist_ok=True)
        place = os.path.join(os.fsencode(tmp_path), b"caf\xe9")
        os.makedirs(place, exist_ok=True)
        Path(os.fsdecode(place), os.fsdecode(b"\xfcber.jpg")).write_bytes(content)
        digests = run(brick_tree, None, path=str(tmp_path)).result["digests"]
        entries = run(brick_tree, None, path=str(tmp_path), directories=list(digests)).result["entries"]
        found.append({"digests": digests, "entries": entries})
        json.dumps(found, ensure_ascii=False).encode()
    assert recovery.differing_directories({str(at): one["digests"] for at, one in enumerate(found)}) == ["caf\\xe9"]
    assert set(recovery.differences({str(at): one["entries"] for at, one in enumerate(found)})) == {
        "caf\\xe9/\\xfcber.jpg"
    }
    monkeypatch.setattr(os.path, "ismount", lambda path: True)
    assert (
        run(media_lookup, None, root=str(tmp_path), names=["caf\\xe9/\\xfcber.jpg", "caf\\xe9"]).result["looked"] == 2
    )


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


# --- an empty brick ---

VOLUME = "11111111-1111-4111-8111-111111111111"


def test_only_an_empty_directory_becomes_a_brick():
    assert recovery.judge_brick_directory([], "", VOLUME, "/b")
    assert recovery.judge_brick_directory([], VOLUME, VOLUME, "/b")  # emptied, the mark is still there
    assert recovery.judge_brick_directory([".glusterfs"], VOLUME, VOLUME, "/b")  # a process has started on nothing
    assert not recovery.judge_brick_directory([".glusterfs", "photos"], VOLUME, VOLUME, "/b")


@pytest.mark.parametrize(
    ("entries", "mark", "words"),
    [
        (["photos", ".glusterfs"], "", "without the volume's mark"),
        (["holiday.jpg"], "", "files that are no brick's"),
        (["holiday.jpg"], VOLUME, "files that are no brick's"),
        ([], "22222222-2222-4222-8222-222222222222", "another volume"),
        ([".glusterfs"], "22222222-2222-4222-8222-222222222222", "another volume"),
    ],
)
def test_what_may_be_of_value_is_refused(entries, mark, words):
    with pytest.raises(gluster.Refused, match=words):
        recovery.judge_brick_directory(entries, mark, VOLUME, "/b")


# --- a lost node's place under another name ---

OLD, NEW, OTHER = "lost:/b", "new:/b", "node3:/b"


def test_the_new_brick_stands_where_the_old_one_stood():
    assert recovery.bricks_after([OTHER, OLD], OLD, NEW, [OTHER, NEW]) == [OTHER, NEW]
    with pytest.raises(gluster.Refused, match="where the lost one stood"):
        recovery.bricks_after([OTHER, OLD], OLD, NEW, [NEW, OTHER])
    with pytest.raises(gluster.Refused, match="neither lost:/b nor new:/b"):
        recovery.bricks_after([OTHER], OLD, NEW, [OTHER, NEW])


def test_the_new_node_is_added_to_lists_that_miss_it():
    options = {"auth.ssl-allow": "node1, lost", "auth.allow": "*"}
    assert recovery.let_in(options, {"auth.ssl-allow": "new", "auth.allow": "192.0.2.4"}) == {
        "auth.ssl-allow": "node1,lost,new"
    }
    assert recovery.let_in(options, {"auth.ssl-allow": "lost"}) == {}
    assert recovery.let_in({}, {"auth.allow": "192.0.2.4"}) == {}


DETACH = "peer detach lost force"


@pytest.fixture
def replace(run, tmp_path, monkeypatch):
    """The module on node1, which takes the place of `lost`, a peer that is down."""
    path = tmp_path / "brick"
    monkeypatch.setattr(gluster_replace, "find_brick", lambda path: "S")
    peer = read("pool_three").split("<peer>")[1].replace("node2", "lost").replace("4a2ba81e", "00000000")
    done = read("set_ok")

    def start(volume="lost", connected=0, online=1, **more):
        down = peer.replace("<connected>1", f"<connected>{connected}")
        pool = read("pool_three").replace("<peerStatus>", f"<peerStatus><peer>{down}")
        bricks = read("volume_started").replace("node1:/srv/gluster/media/brick", f"{volume}:{path}")
        bricks = bricks.replace("/srv/gluster/media/brick", str(path)).replace("198.18.9.11,", "")
        state = read("status_ok").replace("/srv/gluster/media/brick", str(path))
        fake = Gluster({
            "pool list": pool, "volume info all": bricks,
            "volume status media": state if online else state.replace("<status>1", "<status>0"),
            "volume set media auth.allow 198.18.9.12,198.18.9.13,198.18.9.11": done,
            f"volume replace-brick media lost:{path} node1:{path} commit force": done, DETACH: done,
        })  # fmt: skip
        words = {"name": "media", "node": "node1", "nodes": NODES, "lost": "lost", "address": "198.18.9.11"}
        return fake, run(gluster_replace, fake, **words | {"path": str(path)} | more)

    start.path = path
    return start


def test_a_new_node_takes_the_place_of_a_lost_one(replace):
    fake, ended = replace()
    assert not ended.failed, str(ended)
    assert [line.split()[1] for line in fake.changes] == ["set", "replace-brick"] and replace.path.is_dir()
    fake, ended = replace(volume="node1")
    assert not ended.failed and not ended.result["changed"] and not fake.changes, "the second run does nothing"


def test_the_lost_node_is_forgotten_when_it_has_no_brick(replace):
    fake, ended = replace(volume="node1", state="peer")
    assert not ended.failed and fake.changes == [DETACH]
    fake, ended = replace(state="peer")
    assert ended.failed and "has a brick on lost" in str(ended) and not fake.changes


def test_whether_the_lost_node_is_gone_is_for_the_others_to_say(replace, clock):
    """The new one gets through to nobody who has not let it in, so the lost one always looks away from there."""
    fake, ended = replace(state="gone", node="node2")
    assert not ended.failed and not ended.result["changed"] and not fake.changes
    fake, ended = replace(state="gone", node="node2", connected=1)
    assert ended.failed and "only a node that is gone is replaced" in str(ended) and clock.now >= 45
    plays = yaml.safe_load((ROOT / "playbooks/recover_node.yml").read_text(encoding="utf-8"))
    asked = next(at for at, play in enumerate(plays) if '"gone"' in json.dumps(play))
    assert plays[asked]["hosts"].startswith("gluster_servers:!") and plays[asked]["any_errors_fatal"]
    assert [play["ansible.builtin.import_playbook"] for play in plays[:asked]] == ["check_fallback.yml"]


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ({"connected": 1}, "lost is connected"),
        ({"nodes": ["node2", "node1", "node3"]}, "where the lost one stood"),
        ({"nodes": ["node1", "lost", "node3"]}, "the inventory still has lost"),
        ({"online": 0}, "must be there first: node2"),
        ({"mount": "/nowhere"}, "nothing is mounted at /nowhere"),
    ],
)
def test_what_would_risk_a_copy_is_refused(replace, more, words):
    fake, ended = replace(**more)
    assert ended.failed and words in str(ended) and not fake.changes and not replace.path.exists()


def test_a_new_nodes_directory_with_files_is_refused(replace):
    replace.path.mkdir()
    (replace.path / "holiday.jpg").touch()
    fake, ended = replace()
    assert ended.failed and "files that are no brick's" in str(ended) and not fake.changes


def test_check_mode_predicts_the_replacement(replace):
    fake, ended = replace(check=True)
    assert not ended.failed and len(ended.result["commands"]) == 2 and not fake.changes


# --- a node's identity ---

NODES = ["node1", "node2", "node3"]
IDS = {"node1": "id1", "node2": "id2", "node3": "id3"}


def view(name, **more):
    peers = {IDS[other]: [other] for other in NODES if other != name}
    return {"node": name, "uuid": IDS[name], "op_version": "110000", "peers": peers, "volumes": ["media"]} | more


def test_the_others_tell_a_node_who_it_is():
    wanted = ("id3", "110000", {"id1": ["node1"], "id2": ["node2"]})
    assert recovery.agree_on_identity("node3", NODES, [view("node1"), view("node2")]) == wanted
    # One of three cannot be asked: the other knows it, and with node3 itself that is a majority.
    assert recovery.agree_on_identity("node3", NODES, [view("node1")]) == wanted


def test_an_identity_that_is_not_certain_is_refused():
    with pytest.raises(gluster.Refused, match="no other node knows node3"):
        recovery.agree_on_identity("node3", NODES, [view("node1", peers={"id2": ["node2"]})])
    with pytest.raises(gluster.Refused, match="Asked: nobody"):
        recovery.agree_on_identity("node3", NODES, [])
    other = view("node2", peers={"id1": ["node1"], "id9": ["node3"]})
    with pytest.raises(gluster.Refused, match="different identities"):
        recovery.agree_on_identity("node3", NODES, [view("node1"), other])
    five = [*NODES, "node4", "node5"]
    with pytest.raises(gluster.Refused, match="bring the others back"):
        recovery.agree_on_identity("node3", five, [view("node1")])
    with pytest.raises(gluster.Refused, match="operating version"):
        recovery.agree_on_identity("node3", NODES, [view("node1", op_version=""), view("node2", op_version="")])


def test_its_own_word_does_not_count():
    with pytest.raises(gluster.Refused, match="no other node knows"):
        recovery.agree_on_identity("node3", NODES, [view("node3", peers={"id3": ["node3"]})])


def test_when_a_state_is_made_anew():
    peers = {"id1": ["node1"], "id2": ["node2"]}
    fine = view("node3")
    assert recovery.state_reasons(fine, "id3", peers, "media") == []
    lost = {"node": "node3", "uuid": "", "op_version": "", "peers": {}, "volumes": []}
    assert len(recovery.state_reasons(lost, "id3", peers, "media")) == 3
    assert "identity is new" in recovery.state_reasons(fine | {"uuid": "new"}, "id3", peers, "media")[0]
    assert "rejects" in recovery.state_reasons(fine, "id3", peers, "media", rejected=True)[0]
    assert "volume" in recovery.state_reasons(fine | {"volumes": ["other"]}, "id3", peers, "media")[0]


def test_the_state_is_read_from_glusterds_files(tmp_path):
    empty = {"node": "node1", "uuid": "", "op_version": "", "peers": {}, "volumes": []}
    assert gluster_state.look("node1", str(tmp_path / "none")) == empty
    (tmp_path / "peers").mkdir()
    (tmp_path / "vols" / "media").mkdir(parents=True)
    (tmp_path / "glusterd.info").write_text("UUID=id1\noperating-version=110000\nbroken\n")
    (tmp_path / "peers" / "id2").write_text("uuid=id2\nstate=3\nhostname1=node2\nhostname2=198.18.0.12\n")
    (tmp_path / "peers" / "half").write_text("")
    assert gluster_state.look("node1", str(tmp_path)) == {
        "node": "node1",
        "uuid": "id1",
        "op_version": "110000",
        "peers": {"id2": ["node2", "198.18.0.12"]},
        "volumes": ["media"],
    }


# --- copies that contradict each other ---


def copy(sha, gfid="g1"):
    return {"size": 3, "sha256": sha, "gfid": gfid, "mode": "0o100644"}


def test_the_catalogs_hash_wins_and_no_majority():
    seen = {"a": {"node1": copy("bad"), "node2": copy("bad"), "node3": copy("good")}}
    losers, unresolved = contradictions.choose(seen, {"a": "good"})
    assert losers == {"node1": {"a": copy("bad")}, "node2": {"a": copy("bad")}} and unresolved == {}


def test_two_identities_of_the_right_bytes():
    seen = {"a": {"node1": copy("good", "g2"), "node2": copy("good"), "node3": copy("good")}}
    assert contradictions.choose(seen, {"a": "good"})[0] == {"node1": {"a": copy("good", "g2")}}
    seen = {"a": {"node1": copy("good", "g2"), "node2": copy("good"), "node3": copy("bad")}}
    assert set(contradictions.choose(seen, {"a": "good"})[0]) == {"node2", "node3"}


def test_a_missing_copy_needs_no_loser():
    seen = {"a": {"node1": copy("good"), "node2": None, "node3": copy("good")}}
    assert contradictions.choose(seen, {}) == ({}, {})


@pytest.mark.parametrize(
    ("entries", "catalog", "why"),
    [
        ({"node1": copy("x"), "node2": copy("y")}, {}, "does not know it"),
        ({"node1": copy("x"), "node2": copy("y")}, {"a": "z"}, "no copy has the catalog's hash"),
        ({"node1": {"mode": "0o40755", "gfid": "d"}, "node2": copy("y")}, {"a": "y"}, "not a regular file"),
        ({"node1": {"error": "Input/output error"}, "node2": copy("y")}, {"a": "y"}, "cannot be read"),
    ],
)
def test_what_a_person_has_to_decide_is_left(entries, catalog, why):
    losers, unresolved = contradictions.choose({"a": entries}, catalog)
    assert losers == {} and why in unresolved["a"]


GFID = "0123456789abcdef0123456789abcdef"


@pytest.fixture
def brick(tmp_path):
    """A brick with one file and its link by identity."""
    root = tmp_path / "brick"
    link = root / ".glusterfs" / "01" / "23" / "01234567-89ab-cdef-0123-456789abcdef"
    link.parent.mkdir(parents=True)
    (root / "photos").mkdir()
    (root / "photos" / "a.jpg").write_bytes(b"bad")
    os.link(root / "photos" / "a.jpg", link)
    (tmp_path / "quarantine").mkdir()
    return root, link, tmp_path / "quarantine"


def test_a_wrong_copy_is_kept_and_its_link_is_gone(brick):
    root, link, quarantine = brick
    brick_quarantine.move(str(root), str(quarantine), "photos/a.jpg", GFID)
    assert not (root / "photos" / "a.jpg").exists() and not link.exists()
    assert (quarantine / f"photos%a.jpg.{GFID}").read_bytes() == b"bad"


def test_an_earlier_copy_in_the_quarantine_stays(brick):
    root, _, quarantine = brick
    for content in (b"bad", b"worse", b"worst"):
        (root / "photos" / "a.jpg").write_bytes(content)
        brick_quarantine.move(str(root), str(quarantine), "photos/a.jpg", GFID)
    assert sorted(one.read_bytes() for one in quarantine.iterdir()) == [b"bad", b"worse", b"worst"]
    assert {name: len(times) for name, times in brick_quarantine.held(str(quarantine)).items()} == {"photos/a.jpg": 3}


def test_the_link_that_a_killed_run_left_is_removed_and_no_other(brick):
    root, link, quarantine = brick
    (root / "photos" / "a.jpg").rename(quarantine / f"photos%a.jpg.{GFID}")
    brick_quarantine.unlink_gfid(str(root), str(quarantine / f"photos%a.jpg.{GFID}"), GFID)
    assert not link.exists()
    link.write_bytes(b"made anew")  # the healed file has the same identity
    brick_quarantine.unlink_gfid(str(root), str(quarantine / f"photos%a.jpg.{GFID}"), GFID)
    assert link.exists()


def test_the_quarantine_tells_names_and_times(brick, monkeypatch):
    root, _, quarantine = brick
    # As read on a brick: what mounts show is GlusterFS's own record, of whole nanoseconds, and not the brick's time.
    record = bytes.fromhex("01" + 16 * "0" + 2 * "000000006b07cdea000000001bf42b9e" + 32 * "0")

    def getxattr(path, name, follow_symlinks=True):
        if not path.endswith(GFID) or not name.endswith("mdata"):
            raise OSError
        return record

    monkeypatch.setattr(os, "getxattr", getxattr, raising=False)
    assert brick_quarantine.held(str(root / "nowhere")) == {}
    os.utime(root / "photos" / "a.jpg", ns=(5, 7))
    brick_quarantine.move(str(root), str(quarantine), "photos/a.jpg", GFID)
    (quarantine / f"photos%a.jpg.{GFID[::-1]}").write_bytes(b"another")
    os.utime(quarantine / f"photos%a.jpg.{GFID[::-1]}", ns=(5, 9))
    assert {name: sorted(times) for name, times in brick_quarantine.held(str(quarantine)).items()} == {
        "photos/a.jpg": [7, 9, 0x6B07CDEA * 10**9 + 0x1BF42B9E]
    }


@pytest.mark.parametrize("name", ["photos/" + "ü" * 110 + ".jpg", "photos/100%.jpg"])
def test_a_long_name_and_one_with_a_percent_sign_are_moved_and_told(brick, monkeypatch, name):
    root, _, quarantine = brick
    kept: dict[tuple[int, str], bytes] = {}

    def getxattr(path, attribute, follow_symlinks=True):
        try:
            return kept[os.lstat(path).st_ino, attribute]
        except KeyError:
            raise OSError from None

    monkeypatch.setattr(os, "getxattr", getxattr, raising=False)

    def setxattr(path, attribute, value):
        kept[os.lstat(path).st_ino, attribute] = value

    monkeypatch.setattr(os, "setxattr", setxattr, raising=False)
    for content in (b"bad", b"worse"):
        (root / name).write_bytes(content)
        brick_quarantine.move(str(root), str(quarantine), name, GFID)
    assert not (root / name).exists() and len(list(quarantine.iterdir())) == 2
    assert {name: len(times) for name, times in brick_quarantine.held(str(quarantine)).items()} == {name: 2}


def test_what_was_mended_gets_another_time_once(tmp_path):
    """The time is a new one for every copy in any quarantine, the same on whichever node it is set, and set once."""
    for name, when in {"mended": 7, "replaced": 20, "whole": 7}.items():
        (tmp_path / name).write_bytes(b"good")
        os.utime(tmp_path / name, ns=(5, when))
    kept = media_lookup.together([{"mended": [7], "gone": [1]}, {}, {"mended": [8], "replaced": [21]}])
    assert kept == {"mended": [7, 8], "gone": [1], "replaced": [21]}

    def ask():
        asked = json.dumps({"names": ["whole", "gone"], "refresh": kept, "memory": 0})
        words = [sys.executable, "-c", media_lookup.PROGRAM, str(tmp_path)]
        return json.loads(subprocess.run(words, input=asked, capture_output=True, text=True, check=True).stdout)

    assert ask() == [1, ["mended"]]
    assert ask() == [1, []]
    assert {one.name: one.stat().st_mtime_ns for one in tmp_path.iterdir()} == {"mended": 9, "replaced": 20, "whole": 7}


# --- the module gluster_heal ---

SUMMARY = "volume heal media info summary"
HEAL = {"name": "media", "node": "node1", "nodes": ["node1", "node2", "node3"], "brick_path": "/srv/brick"}


def test_a_heal_info_that_takes_long_is_waited_for(run):
    """It looks at each entry, and thousands of them take minutes; healing goes on meanwhile."""
    fake = Gluster({"pool list": read("pool_three"), SUMMARY: [(124, "", ""), (124, "", ""), read("heal_ok")]})
    ended = run(gluster_heal, fake, state="clean", **HEAL)
    assert not ended.failed and fake.calls.count(SUMMARY) == 3


def test_but_not_for_ever(run, clock):
    def late():
        clock.now += 600
        return (124, "", "")

    fake = Gluster({"pool list": read("pool_three")})
    ended = run(
        gluster_heal,
        lambda command, **more: late() if "heal" in command else fake(command, **more),
        state="clean", timeout=1000, **HEAL,
    )  # fmt: skip
    assert ended.failed and "no answer within" in str(ended) and 1000 < clock.now < 2000


def test_an_answer_that_names_no_brick_is_not_a_clean_one(run):
    empty = re.sub(r"<brick .*</brick>", "", read("heal_ok"), flags=re.DOTALL)
    assert "<bricks>" in empty and "<brick " not in empty
    ended = run(gluster_heal, Gluster({"pool list": read("pool_three"), SUMMARY: empty}), state="clean", **HEAL)
    assert ended.failed and "names no brick" in str(ended)


def test_a_daemon_that_has_just_been_started_may_refuse_for_a_moment(run, clock):
    ask, refusal = "--mode=script volume heal media", (1, "", "Self-heal daemon is not running.")
    fake = Gluster({"pool list": read("pool_three"), ask: [refusal, refusal, ""]})
    assert not run(gluster_heal, fake, state="asked", **HEAL).failed and clock.now == 2
    ended = run(gluster_heal, Gluster({"pool list": read("pool_three"), ask: refusal}), state="asked", **HEAL)
    assert ended.failed and "not running" in str(ended)


def test_a_heal_is_asked_for_whatever_waits(run):
    fake = Gluster({"pool list": read("pool_three"), "--mode=script volume heal media": ""})
    ended = run(gluster_heal, fake, state="asked", **HEAL)
    assert not ended.failed and ended.result["commands"] == ["gluster volume heal media"]
    second = Gluster({"pool list": read("pool_three_view2")})
    other = run(gluster_heal, second, state="asked", **{**HEAL, "node": "node2"})
    assert not other.failed and other.result["commands"] == []


def test_names_that_wait_are_told_without_the_entries_that_have_only_an_id() -> None:
    answer = (
        "<cliOutput><opRet>0</opRet><healInfo><bricks>"
        '<brick><file gfid="1">/photos/a.jpg</file><file gfid="2">&lt;gfid:2&gt;</file></brick>'
        '<brick><file gfid="1">/photos/a.jpg</file><file gfid="3">/photos/b c.jpg</file></brick>'
        "</bricks></healInfo></cliOutput>"
    )
    assert recovery.waiting_names(answer) == ["/photos/a.jpg", "/photos/b c.jpg"]


# --- a glusterd that hangs ---


@pytest.mark.parametrize("check", [False, True])
def test_a_glusterd_that_runs_and_answers_nothing_is_started_anew(run, clock, monkeypatch, check):
    pool, volumes = read("pool_three"), read("volume_started")
    calls: list[str] = []

    def command(words, **_):
        line = " ".join(words[4:] if words[0] == "timeout" else words)
        calls.append(line)
        if line == "systemctl is-active glusterd.service":
            return 0, "active\n", ""
        if "gluster " in line:
            if "systemctl start glusterd.service" not in calls:
                clock.now += 30
                return 124, "", ""
            return 0, pool if "pool list" in line else volumes, ""
        return 0, "", ""

    own = view("node1")
    monkeypatch.setattr(gluster_state, "look", lambda node, state="": own)
    monkeypatch.setattr(gluster_state, "find_brick", lambda path: "S")
    given = {"views": [view(name, brick=True, running=True) for name in ("node2", "node3")]}
    words = {"node": "node1", "nodes": NODES, "volume": "media", "brick_path": "/srv/brick"}
    ended = run(gluster_state, command, check=check, **words, **given)
    assert not ended.failed and ended.result["changed"] and not ended.result["aside"], str(ended)
    done = [line for line in calls if line.startswith("systemctl") and "is-active" not in line]
    killed = "systemctl kill --kill-who=main --signal=SIGKILL glusterd.service"
    assert done == ([] if check else [killed, "systemctl start glusterd.service"])
