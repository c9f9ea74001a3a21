"""Everything at once: saves, reads and deletes, three drains, a volume and peers that come and go."""

from __future__ import annotations

import errno
import os
import random
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.db import connections

from tribrick import catalog, drain
from tribrick.models import MediaFile
from tribrick.storage import StorageUnavailable, saving

SEED = os.environ.get("TRIBRICK_SEED", "0")
SECONDS = 20.0 if os.environ.get("TRIBRICK_SET") == "long" else 6.0


class Work:
    """What was acknowledged, and what was found wrong."""

    def __init__(self, cluster: Any) -> None:
        self.cluster = cluster
        self.lock = threading.Lock()
        self.alive: dict[str, bytes] = {}
        self.deleted: set[str] = set()
        self.wrong: list[str] = []
        self.refused = self.read_away = 0
        self.end = time.monotonic() + SECONDS

    def thread(self, work: Callable[[random.Random], None], number: int) -> threading.Thread:
        def run() -> None:
            dice = random.Random(f"{SEED} {work.__name__} {number}")
            try:
                while time.monotonic() < self.end:
                    work(dice)
            except Exception as error:  # noqa: BLE001  a test's failure
                self.wrong.append(f"{work.__name__}: {error!r}")
            finally:
                connections.close_all()

        return threading.Thread(target=run, name=f"{work.__name__} {number}")

    def save(self, dice: random.Random) -> None:
        data = dice.randbytes(dice.choice([0, 100, 5000, 1_500_000]))
        try:
            name = str(default_storage.save("photos/a.jpg", ContentFile(data)))
        except StorageUnavailable:
            self.refused += 1
            return
        with self.lock:
            assert name not in self.alive
            self.alive[name] = data

    def read(self, dice: random.Random) -> None:
        with self.lock:
            name = dice.choice(sorted(self.alive)) if self.alive else None
        if name is None:
            time.sleep(0.01)
            return
        data = self.alive[name]
        try:
            with default_storage.open(name) as file:
                if file.read() != data:
                    self.wrong.append(f"{name} has other bytes")
            if default_storage.size(name) != len(data):
                self.wrong.append(f"{name} has another size")
        except StorageUnavailable:
            self.read_away += 1
        except FileNotFoundError as error:
            if name not in self.deleted:
                self.wrong.append(f"{name} was not found: {error!r}")

    def delete(self, dice: random.Random) -> None:
        time.sleep(dice.uniform(0.02, 0.1))
        with self.lock:
            left = sorted(set(self.alive) - self.deleted)
            if not left:
                return
            name = dice.choice(left)
            self.deleted.add(name)
        default_storage.delete(name)
        # Bytes that were on the volume stay there while it is away, as ever; from the spools nothing may come back.
        still = (self.cluster.volume / name).exists()
        if default_storage.exists(name) and not still:
            self.wrong.append(f"{name} exists after its delete")

    def trouble(self, dice: random.Random) -> None:
        """The volume goes and comes, and so does one of the peers."""
        with self.cluster.volume_away():
            time.sleep(dice.uniform(0.05, 0.3))
        peer = self.cluster.spools[dice.choice(["node2", "node3"])]
        if dice.random() < 0.3:
            peer.stop()
            time.sleep(dice.uniform(0.05, 0.3))
            peer.start()
        time.sleep(dice.uniform(0.05, 0.2))

    def drains(self, node: str) -> Callable[[random.Random], None]:
        with self.cluster.on(node):
            spool = drain.Drain().spool

        def draining(dice: random.Random) -> None:
            one = drain.Drain()
            one.spool = spool
            report = one.run()
            if report.corrupt:
                self.wrong.append(f"{node}: corrupt {report.corrupt}")
            time.sleep(dice.uniform(0.01, 0.1))

        return draining


def test_nothing_is_lost_and_nothing_comes_back(cluster: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    dice, real = random.Random(SEED), saving.Saving._write

    def write(self: saving.Saving, data: Any) -> None:
        """Fail now and then in the middle of a file on the volume."""
        if self.mount.location == str(cluster.volume) and dice.random() < 0.1:
            real(self, data[: len(data) // 2])
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        real(self, data)

    monkeypatch.setattr(saving.Saving, "_write", write)
    cluster.options["TIMEOUT"] = 3.0
    with cluster.on("node1"):
        work = Work(cluster)
        threads = [work.thread(work.save, number) for number in range(3)]
        threads += [work.thread(work.read, number) for number in range(2)]
        threads += [work.thread(work.delete, 0), work.thread(work.trouble, 0)]
        threads += [work.thread(work.drains(node), number) for number, node in enumerate(cluster.spools)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join(120)
            assert not thread.is_alive(), thread.name
        monkeypatch.setattr(saving.Saving, "_write", real)
        assert work.wrong == []
        for _ in range(2):
            catalog.finish_deletes()
            reports = cluster.drain()
    assert not any(report.waiting or report.away or report.corrupt for report in reports)
    alive = {name: data for name, data in work.alive.items() if name not in work.deleted}
    assert alive and work.deleted
    found = {name: data for name, data in cluster.on_volume().items() if not name.endswith(".part")}
    assert found.keys() == alive.keys()
    assert all(found[name] == data for name, data in alive.items())
    assert cluster.in_spools() == set()
    assert set(MediaFile.objects.filter(state="stored").values_list("name", "spooled")) == {(n, False) for n in alive}
