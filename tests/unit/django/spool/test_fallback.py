"""Leaving the volume for the nodes' own disks and coming back: nothing lost, nothing back that was deleted."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
from collections.abc import Callable, Iterator
from io import StringIO
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from django.conf import settings
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.core.management import CommandError, call_command
from django.test import override_settings

from tribrick import audit, catalog, copies, drain, fallback
from tribrick.errors import StorageUnavailable
from tribrick.models import MediaFile
from tribrick.storage.derived import DerivedStorage
from tribrick.testing import wait_for

pytestmark = pytest.mark.usefixtures("cluster")
DATA = b"picture" * 1000


def save(data: bytes = DATA, name: str = "photos/a.jpg") -> str:
    return str(default_storage.save(name, ContentFile(data)))


def put(root: Path, name: str, data: bytes) -> None:
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(data)


def files(root: Path) -> dict[str, bytes]:
    found = {str(path.relative_to(root)): path for path in root.rglob("*") if path.is_file()}
    return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".")}


class Places(NamedTuple):
    """Of one node: the tree, the mirror, the brick."""

    tree: Path
    mirror: Path
    brick: Path


@pytest.fixture
def places(tmp_path: Path) -> Places:
    made = Places(*(tmp_path / name for name in Places._fields))
    for place in made:
        place.mkdir()
        place.chmod(0o2775)
    return made


def complete(places: Places, **options: Any) -> fallback.Completed:
    """Complete the tree from mirror, brick and the volume."""
    where = fallback.sources(
        "default",
        directories={"mirror": str(places.mirror), "brick": str(places.brick)},
        volume=settings.MEDIA_ROOT,
    )
    given: dict[str, Any] = {"apply": True, "reserve": 0, "foreign": where[0], **options}
    return fallback.Complete(str(places.tree), where, **given).run()


@pytest.fixture
def without_gluster(cluster: Any) -> Callable[[str], contextlib.AbstractContextManager[None]]:
    """Be a node in Gluster-free mode: its tree is what its receiver serves."""

    @contextlib.contextmanager
    def on(node: str) -> Iterator[None]:
        others = [spool.host for name, spool in cluster.spools.items() if name != node]
        storage = {
            "BACKEND": "tribrick.storage.HybridStorage",
            "OPTIONS": {"location": str(cluster.spools[node].root), "directory_permissions_mode": 0o775},
        }
        tribrick = {
            **settings.TRIBRICK,
            "NODE": node,
            "SPOOL": None,
            "SPOOL_PEERS": [],
            "MEDIA_HOSTS": others,
            "WRITE_QUORUM": 1,
            "TIMEOUT": 5.0,
            "TRANSPORT": {"base_url": "http:///spool/"},
        }
        with override_settings(STORAGES={**settings.STORAGES, "default": storage}, TRIBRICK=tribrick):
            yield

    return on


def merge(cluster: Any, node: str = "node1", **options: Any) -> fallback.Merged:
    tree = str(cluster.spools[node].root)
    return fallback.Merge(tree, str(cluster.volume), **{"apply": True, **options}).run()


# The way in


def test_every_living_file_comes_from_wherever_its_right_bytes_are(cluster: Any, places: Places) -> None:
    names = {place: save(place.encode() * 500) for place in ("mirror", "brick", "mount", "here")}
    for place in ("mirror", "brick", "here"):
        (cluster.volume / names[place]).unlink()
        root = {"mirror": places.mirror, "brick": places.brick, "here": places.tree}[place]
        put(root, names[place], place.encode() * 500)
    with cluster.volume_away():
        names["spool"] = save(b"spool" * 500)
    done = complete(places)
    assert done.copied == {"mirror": 1, "brick": 1, "mount": 1, "spool": 1} and done.right == 1
    assert not done.missing and not done.away and done.number == fallback.last_change()
    assert files(places.tree) == {name: place.encode() * 500 for place, name in names.items()}
    again = complete(places)
    assert again.right == 5 and not again.copied and again.needed == 0


def test_a_spooled_file_of_other_nodes_is_fetched_from_them(cluster: Any, places: Places) -> None:
    with cluster.volume_away(), cluster.on("node2"):
        name = save()
    for node in cluster.holders(name):
        if node == "node1":
            (cluster.spools[node].root / name).unlink()
    with cluster.volume_away():
        done = complete(places)
    assert done.copied == {"peers": 1} and "mount" in done.away
    assert files(places.tree) == {name: DATA}


@pytest.mark.parametrize("bad", [b"", DATA[:-1], bytes(len(DATA)), DATA + b"x"], ids=["empty", "torn", "zeros", "long"])
def test_wrong_bytes_are_never_taken_and_those_in_the_tree_are_replaced(
    bad: bytes, cluster: Any, places: Places
) -> None:
    name = save()
    put(places.mirror, name, bad)
    put(places.tree, name, bad)
    done = complete(places)
    assert done.copied == {"mount": 1} and files(places.tree) == {name: DATA}
    (cluster.volume / name).unlink()
    put(places.tree, name, bad)
    done = complete(places)
    assert list(done.missing) == [name] and "mirror" in done.missing[name] and not done.copied
    assert files(places.tree) == {}, "what is wrong is not served"


def test_a_name_found_nowhere_is_named(cluster: Any, places: Places) -> None:
    lost, there = save(), save(b"other")
    (cluster.volume / lost).unlink()
    done = complete(places)
    assert list(done.missing) == [lost] and files(places.tree) == {there: b"other"}


def test_files_of_a_storage_with_the_same_directory_come_along_and_go_back(
    cluster: Any, places: Places, without_gluster: Callable[..., Any]
) -> None:
    """They have another address, but a name means the same file."""
    default = settings.STORAGES["default"]
    options = {**default.get("OPTIONS", {}), "base_url": "/other/"}
    with override_settings(STORAGES={**settings.STORAGES, "other": {**default, "OPTIONS": options}}):
        name = catalog.add(ContentFile(DATA), "photos/a.jpg", storage="other").name
        done = complete(places)
        assert done.copied == {"mount": 1} and files(places.tree) == {name: DATA}
        (cluster.volume / name).unlink()
        put(cluster.spools["node1"].root, name, DATA)
        assert merge(cluster).written == [name] and cluster.on_volume() == {name: DATA}


def test_deleted_names_leave_the_tree_and_never_come(cluster: Any, places: Places) -> None:
    name, expired = save(), save(b"other")
    for place in places:
        put(place, name, DATA)
        put(place, expired, b"other")
    for one in (name, expired):
        default_storage.delete(one)
    MediaFile.objects.filter(name=expired).delete()  # as an old tombstone
    done = complete(places)
    assert sorted(done.removed) == sorted([name, expired]) and done.foreign == 0
    assert files(places.tree) == {}


def test_what_is_deleted_while_it_is_copied_does_not_stay(
    cluster: Any, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = save()
    original = copies.PathCopy.put

    def put_late(self: Any, known: Any, source: Any) -> str:
        default_storage.delete(name)
        put(cluster.volume, name, DATA)  # whoever reads now still has it open
        return original(self, known, source)

    monkeypatch.setattr(copies.PathCopy, "put", put_late)
    done = complete(places)
    assert done.removed == [name] and files(places.tree) == {}


@pytest.mark.parametrize("when", ["before it is looked at", "while it is copied"])
def test_what_is_deleted_in_a_tree_that_is_served_is_not_there_until_the_end(
    when: str, cluster: Any, places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In the mode the trees are what visitors see, and a run over all files takes hours or is killed."""
    name = save()
    put(places.mirror, name, DATA)
    place, step = (audit, "examine") if when.startswith("before") else (copies.PathCopy, "put")
    real, put_ones = getattr(place, step), []

    def deleted_first(*arguments: Any, **options: Any) -> Any:
        default_storage.delete(name)
        return real(*arguments, **options)

    def killed() -> None:
        raise KeyboardInterrupt

    def noted(_self: Any, known: Any, _source: Any) -> str:
        put_ones.append(known.name)
        return ""

    if when.startswith("before"):
        monkeypatch.setattr(copies.PathCopy, "put", noted)
    monkeypatch.setattr(place, step, deleted_first)
    monkeypatch.setattr(fallback.Catalog, "dead", lambda _self: killed())
    with pytest.raises(KeyboardInterrupt):
        complete(places)
    assert files(places.tree) == {} and put_ones == []


def test_files_unknown_to_the_catalog_come_from_the_mirror_only(places: Places) -> None:
    put(places.mirror, "derived/small.jpg", b"thumbnail")
    put(places.mirror, f"derived/.{'a' * 20}.part", b"unfinished")
    put(places.brick, "derived/other.jpg", b"not verified")
    done = complete(places)
    assert done.foreign == 1 and files(places.tree) == {"derived/small.jpg": b"thumbnail"}


def test_a_mirror_that_has_never_run_keeps_nobody_from_it(places: Places) -> None:
    name = save()
    places.mirror.rmdir()
    done = complete(places)
    assert done.copied == {"mount": 1} and list(done.away) == ["mirror"] and done.foreign == 0
    assert files(places.tree) == {name: DATA}


def test_only_what_changed_after_a_number(cluster: Any, places: Places) -> None:
    first, gone = save(), save(b"gone")
    before = complete(places)
    (places.tree / first).unlink()  # not looked at again
    second = save(b"second")
    default_storage.delete(gone)
    done = complete(places, after=before.number)
    assert done.copied == {"mount": 1} and done.removed == [gone] and done.right == 0
    assert files(places.tree) == {second: b"second"}
    assert done.number > before.number


def test_nothing_is_written_without_apply(places: Places) -> None:
    name = save()
    dead = save(b"dead")
    default_storage.delete(dead)
    put(places.tree, dead, b"dead")
    done = complete(places, apply=False)
    assert done.copied == {"mount": 1} and done.needed == len(DATA) and done.removed == [dead]
    assert files(places.tree) == {dead: b"dead"} and name not in files(places.tree)


def test_a_disk_that_is_too_small_is_refused_before_anything_is_written(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    save()
    free = 1 << 30
    monkeypatch.setattr(fallback, "free_at", lambda _path: free)
    with pytest.raises(audit.AuditError, match=r"to stay free.*nothing was written"):
        complete(places, reserve=free - len(DATA) // 2)
    assert files(places.tree) == {}


def test_a_disk_that_fills_meanwhile_ends_it(places: Places, monkeypatch: pytest.MonkeyPatch) -> None:
    save()

    def full(*_arguments: Any) -> str:
        raise OSError(errno.ENOSPC, "no space")

    monkeypatch.setattr(copies.PathCopy, "put", full)
    with pytest.raises(audit.AuditError, match="is full"):
        complete(places)


def test_a_volume_that_is_away_is_said_once(cluster: Any, places: Places) -> None:
    name = save()
    put(places.mirror, name, DATA)
    with cluster.volume_away():
        done = complete(places)
    assert list(done.away) == ["mount"] and done.copied == {"mirror": 1}


def test_group_and_modes_let_the_receiver_write_and_nginx_read(places: Places) -> None:
    name = save()
    complete(places)
    directory = (places.tree / name).parent
    while directory != places.tree:
        assert directory.stat().st_mode & 0o7775 == 0o2775
        directory = directory.parent
    assert (places.tree / name).stat().st_mode & 0o644 == 0o644


def test_once_switched_a_node_fetches_from_the_others_what_it_lacks(
    cluster: Any, without_gluster: Callable[..., Any]
) -> None:
    one, two = save(b"one"), save(b"two")
    shutil.rmtree(cluster.volume / "photos")
    tree = cluster.spools["node1"].root
    put(cluster.spools["node2"].root, one, b"one")
    put(cluster.spools["node3"].root, one, b"0ne")
    put(cluster.spools["node3"].root, two, b"tw0")
    with without_gluster("node1"):
        where = fallback.sources("default", directories={}, volume=settings.MEDIA_ROOT)
        done = fallback.Complete(str(tree), where, reserve=0, apply=True).run()
    assert done.copied == {"peers": 1} and list(done.missing) == [two] and "peers" in done.missing[two]
    assert files(tree) == {one: b"one"}


# The way back


def test_everything_of_the_time_without_gluster_is_merged(
    cluster: Any, without_gluster: Callable[..., Any], places: Places
) -> None:
    before, doomed = save(b"before"), save(b"doomed")
    for spool in cluster.spools.values():
        put(spool.root, before, b"before")
        put(spool.root, doomed, b"doomed")
    with without_gluster("node2"), cluster.volume_away():
        new = save(b"new")
        default_storage.delete(doomed)
    with without_gluster("node1"):
        dry = merge(cluster, apply=False)
        assert dry.written == [new] and new not in files(cluster.volume)
        done = merge(cluster)
    assert done.written == [new] and done.right == 1 and not done.failed and done.removed == 1
    assert files(cluster.volume) == {before: b"before", new: b"new"}
    with default_storage.open(new) as file:
        assert file.read() == b"new"
    with without_gluster("node1"):
        again = merge(cluster)
    assert again.right == 2 and not again.written


def test_what_only_another_node_has_is_fetched(cluster: Any, without_gluster: Callable[..., Any]) -> None:
    with without_gluster("node2"):
        name = save()
    for node in ("node1", "node3"):
        (cluster.spools[node].root / name).unlink(missing_ok=True)
    with without_gluster("node1"):
        done = merge(cluster)
    assert done.written == [name] and files(cluster.volume) == {name: DATA}


def test_a_rebuilt_volume_is_filled_and_wrong_bytes_are_replaced(
    cluster: Any, without_gluster: Callable[..., Any]
) -> None:
    one, two = save(b"one"), save(b"two")
    for name, data in ((one, b"one"), (two, b"two")):
        put(cluster.spools["node1"].root, name, data)
    (cluster.volume / one).unlink()
    (cluster.volume / two).write_bytes(b"tw0")
    with without_gluster("node1"):
        done = merge(cluster)
    assert sorted(done.written) == sorted([one, two])
    assert files(cluster.volume) == {one: b"one", two: b"two"}


def test_wrong_bytes_of_the_tree_never_reach_the_volume(cluster: Any, without_gluster: Callable[..., Any]) -> None:
    with without_gluster("node1"):
        name = save()  # is acknowledged before all have it
        trees = [spool.root for spool in cluster.spools.values()]
        wait_for(lambda: all((tree / name).exists() for tree in trees), "all nodes have it")
        for tree in trees:
            (tree / name).write_bytes(bytes(len(DATA)))
        done = merge(cluster)
    assert list(done.failed) == [name] and "other bytes" in done.failed[name]
    assert files(cluster.volume) == {}


def test_a_file_deleted_while_it_is_merged_does_not_come_back(
    cluster: Any, without_gluster: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    with without_gluster("node1"):
        name = save()
        original = fallback.Merge._write

        def write_late(self: Any, *arguments: Any) -> None:
            default_storage.delete(name)
            original(self, *arguments)

        monkeypatch.setattr(fallback.Merge, "_write", write_late)
        put(cluster.spools["node1"].root, name, DATA)
        done = merge(cluster)
    assert not done.written and not done.failed and files(cluster.volume) == {}


def test_deleted_files_are_removed_from_the_volume_once_more(cluster: Any, without_gluster: Callable[..., Any]) -> None:
    name = save()
    default_storage.delete(name)
    put(cluster.volume, name, DATA)  # a brick that was away had it
    with without_gluster("node1"):
        merge(cluster)
    assert files(cluster.volume) == {}


def test_a_spooled_file_is_settled(cluster: Any, without_gluster: Callable[..., Any]) -> None:
    with cluster.volume_away():
        name = save()
    with without_gluster("node1"):
        done = merge(cluster)
    assert done.written == [name] and not MediaFile.objects.get(name=name).spooled
    cluster.drain()
    assert cluster.in_spools() == set() and files(cluster.volume) == {name: DATA}


def test_a_volume_that_is_away_is_no_success(cluster: Any, without_gluster: Callable[..., Any]) -> None:
    with without_gluster("node1"):
        save()
        with cluster.volume_away(), pytest.raises(StorageUnavailable):
            merge(cluster)


def test_files_put_into_the_tree_directly_are_named_and_stay(cluster: Any, without_gluster: Callable[..., Any]) -> None:
    put(cluster.spools["node1"].root, "photos/by-hand.jpg", b"by hand")
    with without_gluster("node1"):
        done = merge(cluster)
    assert done.foreign == ["photos/by-hand.jpg"] and not done.failed
    assert "photos/by-hand.jpg" in files(cluster.spools["node1"].root)


def test_the_last_part_looks_at_what_is_new_only(cluster: Any, without_gluster: Callable[..., Any]) -> None:
    with without_gluster("node1"):
        save(b"first")
        done = merge(cluster)
        new = save(b"second")
        last = merge(cluster, after=done.number)
    assert last.written == [new] and last.right == 0


class _Killed(BaseException):
    """As a signal would end it."""


@pytest.mark.parametrize("seed", range(6))
def test_whatever_happens_the_volume_has_what_is_alive_and_nothing_else(
    seed: int, cluster: Any, without_gluster: Callable[..., Any], places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    chance = random.Random(seed)
    alive: dict[str, bytes] = {}
    dead: dict[str, bytes] = {}

    def keep(data: bytes) -> None:
        alive[save(data)] = data

    def bury() -> None:
        if alive:
            name = chance.choice(sorted(alive))
            default_storage.delete(name)
            dead[name] = alive.pop(name)

    def with_kills(work: Callable[[], Any], owner: Any, step: str) -> Any:
        """Run *work* again and again, killed at a random call of a step, until it comes to its end."""
        original = getattr(owner, step)
        while True:
            left = [chance.randrange(8)]

            def maybe(*arguments: Any, left: list[int] = left, **more: Any) -> Any:
                left[0] -= 1
                if left[0] == 0:
                    raise _Killed
                return original(*arguments, **more)

            with monkeypatch.context() as patch:
                patch.setattr(owner, step, maybe)
                try:
                    return work()
                except _Killed:
                    continue

    for number in range(8):
        keep(b"before %d" % number)
    bury()
    for name, data in alive.items():
        put(places.mirror, name, data if chance.random() < 0.7 else bytes(len(data)))
    with contextlib.ExitStack() as stack:
        if chance.random() < 0.5:  # gone already; spool and mirror must do
            for name in [name for name in alive if files(places.mirror)[name] != alive[name]]:
                put(places.brick, name, alive[name])
            stack.enter_context(cluster.volume_away())
            keep(b"spooled")
        for node in cluster.spools:
            tree = places._replace(tree=cluster.spools[node].root)
            with cluster.on(node):
                done = with_kills(lambda tree=tree: complete(tree), copies.PathCopy, "put")
                assert not done.missing, done.missing
    for number in range(12):
        node, away = chance.sample(sorted(cluster.spools), 2)
        with without_gluster(node):
            cluster.spools[away].stop()
            try:
                if chance.random() < 0.7:
                    keep(b"without %d" % number)
                else:
                    bury()
            finally:
                cluster.spools[away].start()
    for name, data in (alive | dead).items():  # what a repaired volume may be like
        what = chance.choice(["as it was", "gone", "old bytes", "back"])
        if what == "gone":
            (cluster.volume / name).unlink(missing_ok=True)
        elif what == "old bytes":
            put(cluster.volume, name, bytes(len(data)))
        elif what == "back":
            put(cluster.volume, name, data)
    node = chance.choice(sorted(cluster.spools))
    with without_gluster(node):
        first = with_kills(lambda: merge(cluster, node), drain._Draining, "publish")
        assert not first.failed
        keep(b"last")
        bury()
        last = merge(cluster, node, after=first.number)
        assert not last.failed
    found = {name: data for name, data in files(cluster.volume).items() if not name.endswith(".part")}
    assert found == alive
    for name, data in alive.items():
        with default_storage.open(name) as file:
            assert file.read() == data


# Holding uploads up


def test_uploads_are_refused_while_the_mark_is_there(cluster: Any, tmp_path: Path) -> None:
    mark = tmp_path / "mark"
    with cluster.on("node1", CLOSED=str(mark)):
        name = save()
        mark.touch()
        with pytest.raises(StorageUnavailable, match="held up"):
            save()
        with pytest.raises(StorageUnavailable, match="held up"):
            default_storage.open("photos/other.txt", "wb")
        with default_storage.open(name) as file:
            assert file.read() == DATA
        assert MediaFile.objects.count() == 1 and cluster.in_spools() == set()
        DerivedStorage().save("small.jpg", ContentFile(b"x"))  # no upload
        default_storage.delete(name)
        mark.unlink()
        save()


def test_uploads_are_refused_without_the_volume_too(
    cluster: Any, without_gluster: Callable[..., Any], tmp_path: Path
) -> None:
    mark = tmp_path / "mark"
    mark.touch()
    with without_gluster("node1"), override_settings(TRIBRICK={**settings.TRIBRICK, "CLOSED": str(mark)}):
        with pytest.raises(StorageUnavailable, match="held up"):
            save()
    assert cluster.in_spools() == set() and not MediaFile.objects.exists()


# The command


def told(*words: str) -> tuple[int, dict[str, Any]]:
    out = StringIO()
    try:
        call_command("tribrick", "fallback", *words, "--json", stdout=out)
    except CommandError as error:
        return error.returncode, json.loads(out.getvalue() or "{}")
    return 0, json.loads(out.getvalue())


def test_the_command(cluster: Any, without_gluster: Callable[..., Any], places: Places) -> None:
    name = save()
    put(places.mirror, name, DATA)
    tree = str(places.tree)
    words = ["complete", "--tree", tree, "--from", f"mirror={places.mirror}", "--reserve", "0"]
    code, said = told(*words)
    assert code == 0 and not said["applied"] and files(places.tree) == {}
    code, said = told(*words, "--foreign", "mirror", "--apply")
    assert code == 0 and said["copied"] == {"mirror": 1} and files(places.tree) == {name: DATA}
    (cluster.volume / name).unlink()
    code, said = told("merge", "--tree", tree, "--volume", str(cluster.volume), "--apply")
    assert code == 0 and said["written"] == [name] and files(cluster.volume) == {name: DATA}
    (places.tree / name).unlink()
    (places.mirror / name).unlink()
    (cluster.volume / name).unlink()
    code, said = told(*words, "--apply")
    assert code == 1 and list(said["missing"]) == [name]
    code, said = told("merge", "--tree", tree, "--volume", str(cluster.volume), "--apply")
    assert code == 1 and list(said["failed"]) == [name]
    with cluster.volume_away():
        assert told("merge", "--tree", tree, "--volume", str(cluster.volume)) == (2, {})


def test_the_status_reads_no_file(cluster: Any, places: Places) -> None:
    name, deleted = save(), save(b"x")
    default_storage.delete(deleted)
    put(places.tree, name, bytes(len(DATA)))
    with cluster.volume_away():
        save(b"spooled")
        code, said = told("status", "--tree", str(places.tree / "new"), "--volume", str(cluster.volume))
    assert code == 0 and "volume" in said["volume"] and said["needed"] == len(DATA) + len(b"spooled")
    code, said = told("status", "--tree", str(places.tree), "--volume", str(cluster.volume))
    assert code == 0 and said["volume"] == "" and said["needed"] == len(b"spooled")
    assert (said["living"], said["spooled"], said["number"]) == (2, 1, fallback.last_change())
    assert said["free"] > 0


def test_a_tree_that_is_not_there_yet_is_empty_until_it_is_written_to(cluster: Any, places: Places) -> None:
    save()
    words = ["complete", "--tree", str(places.tree / "new"), "--volume", str(cluster.volume), "--reserve", "0"]
    code, said = told(*words)
    assert code == 0 and said["copied"] == {"mount": 1}
    assert told(*words, "--apply") == (2, {})


@pytest.mark.parametrize(
    "words",
    [
        ["complete", "--tree", "relative"],
        ["status", "--tree", "/"],
        ["complete", "--tree", "/", "--from", "mirror"],
        ["complete", "--tree", "/", "--foreign", "mirror"],
        ["merge", "--tree", "/"],
    ],
)
def test_the_command_refuses(words: list[str]) -> None:
    code, said = told(*words)
    assert code == 1 and said == {}


def test_progress_goes_to_the_journal_where_there_is_no_terminal(
    places: Places, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tribrick.management.commands import tribrick

    lines: list[str] = []
    monkeypatch.setattr(tribrick, "_EVERY", 0.0)
    monkeypatch.setattr(tribrick.syslog, "syslog", lambda _level, text: lines.append(text))
    save()
    told("complete", "--tree", str(places.tree), "--reserve", "0", "--volume", settings.MEDIA_ROOT, "--apply")
    assert lines == ["1 of 1 files"]
    assert os.umask(0o022) == 0o022, "the umask is what it was"
    assert catalog.database() == "default"
