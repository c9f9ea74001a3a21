"""From the spools to the volume: killed at every step, two at once, deletes at every moment, damaged copies."""

from __future__ import annotations

import contextlib
import errno
import json
import os
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from io import StringIO
from typing import Any

import pytest
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.core.management import CommandError, call_command
from django.db import OperationalError, connection, connections, transaction
from django.utils import timezone

from tribrick import audit, catalog, copies, drain, ledger
from tribrick.models import Change, MediaFile
from tribrick.storage import guard, saving
from tribrick.storage.spool import SpoolStorage
from tribrick.testing import wait_for

pytestmark = pytest.mark.usefixtures("cluster")
DATA = b"picture" * 1000
LARGE = bytes(range(256)) * 10_000  # more than one piece


def spooled(cluster: Any, data: bytes = DATA, *, on: str = "node1") -> str:
    with cluster.volume_away(), cluster.on(on):
        return str(default_storage.save("photos/a.jpg", ContentFile(data)))


def read(name: str) -> bytes:
    with default_storage.open(name) as file:
        return bytes(file.read())


def is_drained(cluster: Any, *expected: tuple[str, bytes]) -> None:
    assert cluster.on_volume() == dict(expected)
    assert cluster.in_spools() == set()
    alive = MediaFile.objects.filter(state="stored")
    assert set(alive.values_list("name", "spooled")) == {(name, False) for name, _ in expected}
    for name, data in expected:
        assert read(name) == data


def elsewhere(work: Callable[[], Any]) -> Any:
    """Do it in a thread with a connection of its own."""
    found: list[Any] = []

    def run() -> None:
        try:
            found.append(work())
        except Exception as error:  # noqa: BLE001  handed to the test
            found.append(error)
        finally:
            connections.close_all()

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(60)
    assert not thread.is_alive()
    return found[0]


@pytest.mark.parametrize("data", [DATA, LARGE, b""], ids=["small", "large", "empty"])
def test_a_file_is_brought_to_the_volume_and_leaves_all_spools(data: bytes, cluster: Any) -> None:
    name = spooled(cluster, data)
    [report] = cluster.drain("node1")
    assert report.drained == [name] and not report.waiting and not report.away and not report.corrupt
    is_drained(cluster, (name, data))
    assert all(not any(vars(report).values()) for report in cluster.drain()), "nothing is left to do"


def test_a_node_without_a_copy_drains_from_a_peer(cluster: Any) -> None:
    name = spooled(cluster)
    other = next(node for node in cluster.spools if node not in cluster.holders(name))
    assert cluster.drain(other)[0].drained == [name]
    is_drained(cluster, (name, DATA))


def test_the_order_of_the_steps(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Temp, write, fsync, rename, fsync of the open file, read back, row, spools: in this order."""
    name = spooled(cluster)
    done: list[str] = []

    class Watched:
        def __getattr__(self, called: str) -> Any:
            real = getattr(os, called)
            if called not in {"open", "write", "fsync", "rename"}:
                return real

            def call(*given: Any, **options: Any) -> Any:
                answer = real(*given, **options)
                done.append(called if called != "open" or not given[1] & os.O_CREAT else "create")
                return answer

            return call

    for module in (drain, saving):
        monkeypatch.setattr(module, "os", Watched())
    monkeypatch.setattr(
        saving.Saving, "close", lambda self, real=saving.Saving.close: done.append("close") or real(self)
    )
    real_reader = drain.Reader
    monkeypatch.setattr(drain, "Reader", lambda *given: done.append("read") or real_reader(*given))
    real_settle = drain.Drain._settle
    monkeypatch.setattr(drain.Drain, "_settle", lambda self, row: done.append("row") or real_settle(self, row))
    monkeypatch.setattr(SpoolStorage, "remove", lambda *_given: done.append("spools") or (True, []))
    cluster.drain("node1")
    steps = [step for step in done if step not in {"open"}]
    assert steps[:9] == ["write", "fsync", "rename", "fsync", "close", "fsync", "read", "row", "spools"], steps
    assert read(name) == DATA


# Killed.

KILL = """
import os
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.db import connection
from django.db.models.query import QuerySet
from tribrick import catalog, copies, drain, receiver
from tribrick.models import MediaFile
from tribrick.storage import DefaultTransport, hybrid, mount, opened, saving
from tribrick.storage import volume as module


class Dying:
    CALLS = set("open mkdir chmod write pread fsync close unlink rename stat fstat".split())
    count = 0

    def __getattr__(self, name):
        real = getattr(os, name)
        return self.watched(name, real) if name in self.CALLS else real

    def point(self, name):
        self.count += 1
        if self.count == AT:
            os.write(2, name.encode())
            os._exit(9)

    def watched(self, name, real):
        def call(*given, **options):
            self.point(f"before {name}")
            done = real(*given, **options)
            self.point(f"after {name}")
            return done
        return call


connection.ensure_connection()
dying = Dying()
for part in (module, mount, saving, opened, hybrid, drain):
    part.os = dying
for place, name in (
    (DefaultTransport, "create"), (DefaultTransport, "delete"), (MediaFile, "save"), (catalog, "_change"),
    (connection, "_commit"), (QuerySet, "update"),
):
    setattr(place, name, dying.watched(name, getattr(place, name)))
"""


def killed_at(forked: Any, node: str, code: str) -> Iterator[tuple[int, str]]:
    """Run code in a process that dies before or after its n-th step; yield how it ended, for each n."""
    at = 0
    while True:
        at += 1
        ended, said = forked(node, f"AT = {at}\n{KILL}\n{code}\nos._exit(0)")
        assert ended in (0, 9), said
        yield ended, said.rpartition("\n")[2]  # after what was logged
        if ended == 0:
            return


def age(cluster: Any) -> None:
    """Let everything in the spools be older than two days."""
    for spool in cluster.spools.values():
        for path in spool.root.rglob("*"):
            if path.is_file():
                os.utime(path, (time.time() - 200_000,) * 2)


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Let what lies there without a row be old enough: the change time of a file cannot be set."""
    return lambda: monkeypatch.setattr(audit, "SETTLED", timedelta(seconds=-3600))


def test_killed_at_every_step_of_a_spooled_save(
    cluster: Any, forked: Any, empty: Any, settled: Callable[[], None]
) -> None:
    settled()
    seen: dict[str, int] = {}
    with contextlib.ExitStack() as stack:
        stack.enter_context(cluster.volume_away())
        for ended, said in killed_at(forked, "node1", f"default_storage.save('photos/new.jpg', ContentFile({DATA!r}))"):
            rows = list(MediaFile.objects.values_list("name", flat=True))
            assert len(rows) <= 1
            seen[said] = seen.get(said, 0) + 1
            if ended == 0:
                assert rows, "it was acknowledged"
            for name in rows:  # committed: two copies, to be read from every node
                assert len(cluster.holders(name)) == 2, said
                for node in cluster.spools:
                    with cluster.on(node):
                        assert read(name) == DATA
            stack.pop_all().close()  # the volume is back
            reports = cluster.drain()
            is_drained(cluster, *[(name, DATA) for name in rows])
            assert not any(report.waiting or report.away or report.corrupt for report in reports)
            empty()
            stack.enter_context(cluster.volume_away())
    assert sum(seen.values()) > 50, f"too few steps were seen: {seen}"
    assert {"before create", "after create", "before fsync", "before save", "after _commit", "before _commit"} <= set(
        seen
    )


@pytest.mark.sample(1)
@pytest.mark.parametrize("size", ["small", "large"])
def test_killed_at_every_step_of_a_drain(size: str, cluster: Any, forked: Any, empty: Any) -> None:
    data = DATA if size == "small" else LARGE
    seen: dict[str, int] = {}
    name = spooled(cluster, data)
    for ended, said in killed_at(forked, "node1", "drain.Drain().run()"):
        seen[said] = seen.get(said, 0) + 1
        for node in cluster.spools:  # whatever it has done, nothing is missing at any moment
            with cluster.on(node):
                assert read(name) == data, said
        rests = [rest for rest in cluster.on_volume() if saving.TEMPORARY.fullmatch(os.path.basename(rest))]
        assert len(rests) <= 1
        for rest in rests:
            (cluster.volume / rest).unlink()
        assert cluster.on_volume() in ({}, {name: data}), f"killed {said}"
        cluster.drain()
        is_drained(cluster, (name, data))
        assert Change.objects.count() == 1
        if ended:
            empty()
            name = spooled(cluster, data)
    assert sum(seen.values()) > 40, f"too few steps were seen: {seen}"
    wanted = {"rename", "fsync", "write", "_commit", "update", "delete", "unlink"}
    assert {f"{when} {step}" for when in ("before", "after") for step in wanted} <= set(seen)


def test_killed_while_deleting_a_spooled_file(cluster: Any, forked: Any, empty: Any) -> None:
    name = spooled(cluster)
    for ended, said in killed_at(forked, "node1", "default_storage.delete(MediaFile.objects.get().name)"):
        alive = MediaFile.objects.get().state == "stored"
        assert not alive or ended
        if alive:
            assert read(name) == DATA, said
        else:
            with pytest.raises(FileNotFoundError):
                default_storage.open(name)
        cluster.drain()
        is_drained(cluster, *([(name, DATA)] if alive else []))
        empty()
        name = spooled(cluster)


# Several at once.

RACE = """
import json, sys
from tribrick.drain import Drain
sys.stdin.readline()
report = Drain().run()
print(json.dumps(report.as_dict()))
"""


def test_three_nodes_drain_the_same_files_at_once(cluster: Any, process: Any) -> None:
    files = {spooled(cluster, b"%d" % number * 5000, on=f"node{number % 3 + 1}"): number for number in range(12)}
    running = [process(node, RACE) for node in cluster.spools]
    for one in running:
        one.stdin.write("go\n")
        one.stdin.flush()
    reports = []
    for one in running:
        said, complaints = one.communicate(timeout=90)
        assert one.returncode == 0, complaints
        reports.append(json.loads(said))
    drained = [name for report in reports for name in report["drained"]]
    assert sorted(drained) == sorted(files), "each was drained once, by one of them"
    assert not any(report["away"] or report["corrupt"] for report in reports)
    is_drained(cluster, *[(name, b"%d" % number * 5000) for name, number in files.items()])


def interrupted_by(monkeypatch: pytest.MonkeyPatch, what: Callable[[], None], step: str) -> None:
    """Do something else once, right before a step of the drain."""
    real = getattr(drain.Drain, step)
    done: list[int] = []

    def first(self: Any, *given: Any) -> Any:
        if not done:
            done.append(1)
            what()
        return real(self, *given)

    monkeypatch.setattr(drain.Drain, step, first)


def test_another_drain_is_faster(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = spooled(cluster)
    other: list[Any] = []

    def drains() -> None:
        assert [os.path.basename(path).endswith(".part") for path in cluster.on_volume()] == [True]
        other.append(elsewhere(lambda: cluster.drain("node2")[0]))

    interrupted_by(monkeypatch, drains, "_locked")
    [report] = cluster.drain("node1")
    assert other[0].drained == [name] and report.drained == []
    is_drained(cluster, (name, DATA))


def test_nothing_is_renamed_over_a_file_that_came_in_between(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """The other one was killed after its rename: the row is spooled still, and the file there."""
    name = spooled(cluster)

    def comes() -> None:
        (cluster.volume / name).write_bytes(DATA)

    interrupted_by(monkeypatch, comes, "_locked")
    renamed: list[str] = []
    real = os.rename
    monkeypatch.setattr(drain.os, "rename", lambda *given, **options: renamed.append("x") or real(*given, **options))
    assert cluster.drain("node1")[0].drained == [name]
    assert renamed == []
    is_drained(cluster, (name, DATA))


def test_what_is_torn_on_the_volume_is_replaced(cluster: Any) -> None:
    """As after a power cut in the middle of a drain."""
    name = spooled(cluster)
    (cluster.volume / name).parent.mkdir(parents=True)
    for torn in (b"", DATA[:-1], b"\0" * len(DATA)):
        (cluster.volume / name).write_bytes(torn)
        MediaFile.objects.update(spooled=True)
        assert cluster.drain("node1")[0].drained == [name]
        assert cluster.on_volume() == {name: DATA}
        if torn != b"\0" * len(DATA):
            for node in ("node1", "node2"):
                (cluster.spools[node].root / name).parent.mkdir(parents=True, exist_ok=True)
                (cluster.spools[node].root / name).write_bytes(DATA)
    is_drained(cluster, (name, DATA))


def test_a_volume_that_lies_keeps_the_file_in_the_spools(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = spooled(cluster)
    real = drain._Draining.publish

    def lying(self: Any, call: Any, there: Any) -> None:
        real(self, call, there)
        (cluster.volume / name).write_bytes(b"x" * len(DATA))

    monkeypatch.setattr(drain._Draining, "publish", lying)
    [report] = cluster.drain("node1")
    assert "lies" in report.waiting[name] and report.drained == []
    assert MediaFile.objects.get().spooled and len(cluster.holders(name)) == 2
    monkeypatch.undo()
    cluster.drain("node1")
    assert cluster.on_volume() == {name: DATA}


# Deletes.


def test_a_tombstone_before_the_drain(cluster: Any) -> None:
    name = spooled(cluster)
    with cluster.volume_away():
        default_storage.delete(name)
    for node in cluster.spools:  # as if nothing had been removed
        path = cluster.spools[node].root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(DATA)
    reports = cluster.drain()
    assert not any(report.drained for report in reports)
    is_drained(cluster)
    assert MediaFile.objects.get().state == "purged"


@pytest.mark.parametrize("step", ["_write", "_source", "_locked", "_settle"])
def test_a_tombstone_during_the_drain(step: str, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = spooled(cluster)
    interrupted_by(monkeypatch, lambda: elsewhere(lambda: default_storage.delete(name)), step)
    cluster.drain()
    is_drained(cluster)
    row = MediaFile.objects.get()
    assert (row.state, row.spooled) == ("purged", True), "its bytes are removed once more, later"
    with pytest.raises(FileNotFoundError):
        default_storage.open(name)


def test_a_delete_that_comes_while_the_row_is_locked_waits(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = spooled(cluster)
    real = drain._Draining.publish
    deleting: list[threading.Thread] = []

    def publish(self: Any, call: Any, there: Any) -> None:
        def delete() -> None:
            try:
                default_storage.delete(name)
            finally:
                connections.close_all()

        deleting.append(threading.Thread(target=delete))
        deleting[0].start()
        deleting[0].join(0.3)
        assert deleting[0].is_alive(), "it did not wait for the lock of the row"
        real(self, call, there)

    monkeypatch.setattr(drain._Draining, "publish", publish)
    cluster.drain("node1")
    deleting[0].join(30)
    cluster.drain()
    is_drained(cluster)


def test_a_tombstone_after_the_drain(cluster: Any) -> None:
    name = spooled(cluster)
    cluster.drain("node1")
    default_storage.delete(name)
    is_drained(cluster)
    cluster.drain()
    is_drained(cluster)


def test_a_row_that_is_being_deleted_is_left_for_the_next_time(cluster: Any) -> None:
    name = spooled(cluster)
    with transaction.atomic():
        catalog.delete(name)
        report = elsewhere(lambda: cluster.drain("node2")[0])
        assert "locked" in report.waiting[name]
        assert all(path.endswith(".part") is False for path in cluster.on_volume())
        transaction.set_rollback(True)
    cluster.drain("node1")
    is_drained(cluster, (name, DATA))


def test_a_rename_that_ends_late_does_not_bring_a_deleted_file_back(
    cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It hangs in the volume; meanwhile the file is drained by another node and deleted."""
    name = spooled(cluster)
    gate, hangs = threading.Event(), threading.Event()
    real = os.rename

    def rename(*given: Any, **options: Any) -> None:
        if not hangs.is_set():
            hangs.set()
            assert gate.wait(30)
        real(*given, **options)

    monkeypatch.setattr(drain.os, "rename", rename)
    cluster.options["DEADLINE"] = 0.3
    [report] = cluster.drain("node1")
    assert "no answer" in report.waiting[name]
    del cluster.options["DEADLINE"]
    guard._guards.clear()  # the other node has a mount of its own
    assert cluster.drain("node2")[0].drained == [name]
    default_storage.delete(name)
    gate.set()
    wait_for(lambda: cluster.on_volume() == {}, "the late file is removed")
    assert cluster.in_spools() == set()


def test_a_deleted_file_is_removed_once_more_an_hour_later(cluster: Any) -> None:
    name = spooled(cluster)
    default_storage.delete(name)
    row = MediaFile.objects.get()
    assert (row.state, row.spooled) == ("purged", True)
    (cluster.volume / name).parent.mkdir(parents=True, exist_ok=True)
    (cluster.volume / name).write_bytes(DATA)  # by a rename that was on its way
    assert cluster.drain("node1")[0].removed == []
    MediaFile.objects.update(deleted=timezone.now() - timedelta(hours=2))
    assert cluster.drain("node1")[0].removed == [name]
    assert cluster.on_volume() == {} and not MediaFile.objects.get().spooled


# Damaged copies.


@pytest.mark.parametrize("damage", [DATA[:-1], b"", b"x" * len(DATA)], ids=["short", "empty", "other"])
def test_a_corrupt_copy_is_reported_and_the_other_one_used(damage: bytes, cluster: Any) -> None:
    name = spooled(cluster)
    (cluster.spools["node1"].root / name).write_bytes(damage)
    [report] = cluster.drain("node1")
    assert report.corrupt == {name: "here"} and report.drained == [name]
    is_drained(cluster, (name, DATA))


def test_without_a_right_copy_nothing_is_drained(cluster: Any) -> None:
    name = spooled(cluster)
    for holder in cluster.holders(name):
        (cluster.spools[holder].root / name).write_bytes(b"damaged")
    reports = cluster.drain()
    assert all(name in report.corrupt and name in report.waiting for report in reports)
    assert cluster.on_volume() == {} and MediaFile.objects.get().spooled
    assert len(cluster.holders(name)) == 2, "nothing was thrown away"
    with pytest.raises(CommandError) as ended:
        command()
    assert ended.value.returncode == 1


def test_a_copy_that_is_alone_right_is_away(cluster: Any) -> None:
    name = spooled(cluster)
    other = next(node for node in cluster.holders(name) if node != "node1")
    (cluster.spools["node1"].root / name).write_bytes(b"damaged")
    cluster.spools[other].stop()
    with cluster.on("node1", TIMEOUT=0.5):
        report = drain.Drain().run()
        assert name in report.away and report.corrupt
        with pytest.raises(CommandError) as ended:
            command()
        assert ended.value.returncode == 2
    cluster.spools[other].start()
    assert cluster.drain("node1")[0].drained == [name]
    is_drained(cluster, (name, DATA))


# What else lies in a spool.


def test_a_copy_of_a_node_that_was_away_goes_when_it_is_back(cluster: Any) -> None:
    name = spooled(cluster)
    other = next(node for node in cluster.holders(name) if node != "node1")
    cluster.spools[other].stop()
    cluster.options["TIMEOUT"] = 0.5
    assert cluster.drain("node1")[0].drained == [name]
    assert cluster.holders(name) == [other]
    cluster.spools[other].start()
    assert cluster.drain(other)[0].removed == [name]
    is_drained(cluster, (name, DATA))


def test_a_silent_peer_costs_its_deadline_once(cluster: Any) -> None:
    files = [spooled(cluster) for _ in range(6)]
    silent = cluster.spools["node2"]
    silent.slow = 30.0
    with cluster.on("node1", TIMEOUT=0.6):
        report = drain.Drain().run()
    assert [method for method, _ in silent.log].count("DELETE") == 1
    here = [name for name in files if name in cluster.spools["node1"].files()]
    assert sorted(report.drained) == sorted(files) and here == []
    assert len(cluster.on_volume()) == 6


def test_a_copy_is_only_removed_when_the_volume_has_the_file(cluster: Any) -> None:
    """The row says drained, and is wrong: as after a catalog that was written again from the ledger."""
    lost, torn = spooled(cluster), spooled(cluster, LARGE)
    MediaFile.objects.update(spooled=False)
    (cluster.volume / torn).parent.mkdir(parents=True)
    (cluster.volume / torn).write_bytes(LARGE[:100])
    with cluster.volume_away():
        cluster.drain("node1")
        assert cluster.in_spools() == {lost, torn}
    assert sorted(cluster.drain("node1")[0].drained) == sorted([lost, torn])
    is_drained(cluster, (lost, DATA), (torn, LARGE))


def test_what_never_got_a_row_is_set_aside_a_day_later(cluster: Any, settled: Callable[[], None]) -> None:
    with cluster.volume_away(), transaction.atomic():
        name = default_storage.save("photos/a.jpg", ContentFile(DATA))
        transaction.set_rollback(True)
    holders = cluster.holders(name)
    assert [report.young for report in cluster.drain(*holders)] == [1, 1]
    assert cluster.holders(name) == holders
    settled()
    assert [report.quarantined for report in cluster.drain(*holders)] == [[name], [name]]
    assert cluster.in_spools() == set() and cluster.on_volume() == {}
    today = timezone.now().strftime("%Y-%m-%d")
    assert (cluster.spools["node1"].root / ".tribrick-quarantine" / today / name).read_bytes() == DATA


def test_what_the_ledger_knows_is_not_set_aside(cluster: Any, settled: Callable[[], None], tmp_path: Any) -> None:
    name = spooled(cluster)
    path = tmp_path / "ledger.sqlite"
    ledger.follow_once(path)
    MediaFile.objects.all().delete()
    settled()
    with cluster.on("node1", LEDGER=str(path)):
        report = drain.Drain().run()
    assert "lost rows" in report.waiting[name]
    assert len(cluster.holders(name)) == 2


# The volume.


@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOTCONN, errno.EIO], ids=errno.errorcode.get)
def test_a_volume_that_refuses_keeps_everything_in_the_spools(
    code: int, cluster: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    files = [spooled(cluster) for _ in range(5)]
    tried: list[int] = []

    def refuse(*_given: Any) -> None:
        tried.append(1)
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(saving.Saving, "_write", refuse)
    [report] = cluster.drain("node1")
    assert "storage default" in report.away and len(tried) == 3, "the rest is not tried"
    assert cluster.in_spools() == set(files) and cluster.on_volume() == {}
    with pytest.raises(CommandError) as ended:
        command()
    assert ended.value.returncode == 2
    monkeypatch.undo()
    monkeypatch.setattr("tribrick.receiver.Usage.EVERY", 0.0)
    cluster.drain("node1")
    is_drained(cluster, *[(name, DATA) for name in files])


def test_a_full_volume_is_told_and_lives(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    name = spooled(cluster)

    def full(*_given: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patched:
        patched.setattr(saving.Saving, "_write", full)
        [report] = cluster.drain("node1")
        assert "full" in report.waiting[name] and not report.away
        with pytest.raises(CommandError) as ended:
            command()
        assert ended.value.returncode == 1
    cluster.drain("node1")
    is_drained(cluster, (name, DATA))


@pytest.mark.parametrize("step", ["open", "fsync", "rename", "pread"])
def test_a_hung_volume_does_not_hang_the_drain(step: str, cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from tribrick.storage import opened

    files = [spooled(cluster) for _ in range(6)]
    gate = threading.Event()

    class Hanging:
        def __getattr__(self, name: str) -> Any:
            real = getattr(os, name)
            if name != step:
                return real

            def call(*given: Any, **options: Any) -> Any:
                if (
                    "mount" in threading.current_thread().name
                    and str(cluster.volume) in threading.current_thread().name
                ):
                    assert gate.wait(30)
                return real(*given, **options)

            return call

    try:
        with monkeypatch.context() as patched:
            for module in (drain, saving, opened):
                patched.setattr(module, "os", Hanging())
            cluster.options["DEADLINE"] = 0.3
            began = time.monotonic()
            [report] = cluster.drain("node1")
            assert time.monotonic() - began < 5
            assert "storage default" in report.away
            assert cluster.in_spools() == set(files)
            assert MediaFile.objects.filter(spooled=True).count() == 6
    finally:
        gate.set()
    del cluster.options["DEADLINE"]
    one = guard._guards[str(cluster.volume)]
    wait_for(lambda: not one.overdue and not one._keeping, "late calls have returned")
    cluster.drain("node1"), cluster.drain("node1")
    is_drained(cluster, *[(name, DATA) for name in files])


# The command.


def command(*arguments: str) -> str:
    out = StringIO()
    call_command("tribrick", "drain", *arguments, stdout=out)
    return out.getvalue()


def test_the_command_tells_what_it_did(cluster: Any) -> None:
    name = spooled(cluster)
    told = json.loads(command("--json", "--once"))
    assert (told["drained"], told["left"], told["corrupt"]) == ([name], 0, {})
    assert command() == "0 drained, 0 removed, 0 too young to tell\n0 are left\n"
    with cluster.volume_away():
        name = spooled_here()
        with pytest.raises(CommandError) as ended:
            command()
        assert ended.value.returncode == 2 and "storage default" in str(ended.value)
    with cluster.on("node1", SPOOL=None), pytest.raises(CommandError, match="there is no spool"):
        command()
    command()
    assert read(name) == DATA


def spooled_here() -> str:
    return str(default_storage.save("photos/a.jpg", ContentFile(DATA)))


def test_the_database_is_away(cluster: Any, database_away: Any) -> None:
    name = spooled(cluster)
    with database_away():
        with pytest.raises(OperationalError):
            drain.Drain().run()
        with pytest.raises(CommandError) as ended:
            command()
    assert ended.value.returncode == 2
    cluster.drain()
    is_drained(cluster, (name, DATA))


WATCH = """
import sys, threading
from django.core.management import call_command
threading.Thread(target=lambda: (sys.stdin.readline(), None), daemon=True).start()
call_command("tribrick", "drain", "--watch", "--interval", "1")
print("ended")
"""


def test_watching_drains_when_the_volume_is_back_and_ends_on_sigterm(cluster: Any, process: Any) -> None:
    with cluster.volume_away():
        name = spooled_here()
        running = process("node1", WATCH)
        line = running.stdout.readline()
        assert line.startswith("away: storage default"), line
    wait_for(lambda: cluster.on_volume() == {name: DATA} and not cluster.in_spools(), "it is drained", 20)
    running.terminate()
    said, complaints = running.communicate(timeout=20)
    assert running.returncode == 0 and said.strip().endswith("ended"), complaints
    connection.close()
    is_drained(cluster, (name, DATA))


def test_an_audit_says_what_waits_in_the_spools(cluster: Any) -> None:
    name, lost = spooled(cluster), str(default_storage.save("photos/b.jpg", ContentFile(DATA)))
    (cluster.volume / lost).unlink()

    def notes() -> dict[str, str]:
        report = audit.Audit(audit.CatalogSource("default"), copies.copies()).run()
        assert {finding.kind for finding in report.findings} == {"missing"}
        return {finding.name: finding.note for finding in report.findings}

    assert notes() == {name: "it is in the spools; drain brings it", lost: ""}
    cluster.drain("node1")
    assert notes() == {lost: ""}
