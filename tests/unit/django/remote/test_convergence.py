"""Any interleaving of saves, deletes, rollbacks, faults, crashes and replays over three hosts converges.

Afterwards every acknowledged file is on every host with its bytes, and no deleted or failed one is
on any.
"""

from __future__ import annotations

import contextlib
import io
import logging
import os
import threading
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.files.base import ContentFile
from django.core.files.storage import storages
from django.db import connections, transaction
from django.test import override_settings
from django.utils import timezone
from hypothesis import HealthCheck
from hypothesis import settings as profile
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, rule, run_state_machine_as_test

from tribrick import catalog, outbox
from tribrick.models import Change, Media, MediaFile, Outbox
from tribrick.outbox import Worker
from tribrick.storage import ReplicationError, TransportError, UnexpectedStatusCode
from tribrick.storage.transport import HostUnreachable, TransportTimeout

HOSTS = ["a", "b", "c"]
EXAMPLES = 40 if os.environ.get("TRIBRICK_SET") == "long" else 8
FAULTS = [*["none"] * 6, "refused", "unanswered", "late", "late", "lost"]


class World:
    """Three hosts without HTTP: each does the next request as its fault says.

    refused: not done, and known so. unanswered: done, but the answer is lost. late: done when it
    pleases, after a time-out. lost: never done, but that is not known.
    """

    def __init__(self) -> None:
        self.files: dict[str, dict[str, bytes]] = {host: {} for host in HOSTS}
        self.faults: dict[str, str] = {}
        self.late: list[Callable[[], object]] = []
        self.lock = threading.Lock()

    def _do(self, host: str, action: Callable[[], Any]) -> Any:
        with self.lock:
            fault = self.faults.get(host, "none")
            if fault == "refused":
                raise HostUnreachable("refused")
            if fault == "late":
                self.late.append(action)
                raise TransportTimeout("no answer")
            if fault == "lost":
                raise TransportTimeout("no answer")
            done = action()
            if fault == "unanswered":
                raise TransportError("the answer was lost")
            return done

    def content(self, host: str, name: str, _deadline: Any) -> io.BytesIO:
        if self.faults.get(host, "none") != "none":
            raise TransportError("cannot be read")
        if name not in self.files[host]:
            raise UnexpectedStatusCode(host, "GET", name, 404)
        return io.BytesIO(self.files[host][name])

    def exists(self, host: str, name: str, _deadline: Any) -> bool:
        return name in self.files[host]

    def size(self, host: str, name: str, _deadline: Any) -> int:
        return len(self.files[host][name])

    def create(self, host: str, name: str, body: Any, _deadline: Any) -> bool:
        with body.open() as stream:
            data = stream.read()

        def put() -> bool:
            existed = name in self.files[host]
            self.files[host][name] = data
            return existed

        return bool(self._do(host, put))

    def delete(self, host: str, name: str, _deadline: Any) -> bool:
        return bool(self._do(host, lambda: self.files[host].pop(name, None) is not None))


class Crash(BaseException):
    """The process dies here."""


faults = st.fixed_dictionaries({host: st.sampled_from(FAULTS) for host in HOSTS})
picks = st.integers(0, 1000)


class Machine(RuleBasedStateMachine):
    """What the site does, and what it may then expect."""

    kind = ""
    location = ""

    def __init__(self) -> None:
        super().__init__()
        for model in (Outbox, Change, MediaFile, Media):
            model.objects.all().delete()
        self.alive: dict[str, bytes] = {}
        self.count = 0
        self.stack = contextlib.ExitStack()

    @initialize()
    def site(self) -> None:
        self.world = World()
        options = {} if self.kind == "Distributed" else {"location": self.location}
        backend = {
            "BACKEND": f"tribrick.storage.{self.kind}Storage",
            "OPTIONS": {"hosts": HOSTS, "transport": self.world, **options},
        }
        self.stack.enter_context(override_settings(STORAGES={**settings.STORAGES, "default": backend}))
        vars(storages).update(backends=settings.STORAGES, _storages={})  # 4.2 loses overridden OPTIONS
        self.storage: Any = storages["default"]

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.settle()
        self.stack.close()

    def _data(self) -> bytes:
        self.count += 1
        return b"%d" % self.count

    @rule(given=faults, by_catalog=st.booleans())
    def save(self, given: dict[str, str], by_catalog: bool) -> None:
        self.world.faults = given
        data = self._data()
        try:
            if by_catalog:
                name = catalog.add(ContentFile(data), "p/x.bin").name
            else:
                name = self.storage.save("p/x.bin", ContentFile(data))
        except ReplicationError:
            return
        self.alive[name] = data

    @rule(given=faults)
    def save_and_roll_back(self, given: dict[str, str]) -> None:
        self.world.faults = given
        with contextlib.suppress(ReplicationError, Crash), transaction.atomic():
            self.storage.save("p/x.bin", ContentFile(self._data()))
            raise Crash

    @rule(
        given=faults,
        step=st.sampled_from(["execute", "_record"]),
        after=st.booleans(),
        inside=st.booleans(),
        by_catalog=st.booleans(),
    )
    def save_and_crash(self, given: dict[str, str], step: str, after: bool, inside: bool, by_catalog: bool) -> None:
        """The process is killed in a save: nothing is undone, what it had not committed is lost."""
        self.world.faults = given
        real = getattr(self.storage, step)

        def killed(*args: Any, **options: Any) -> Any:
            if after:
                real(*args, **options)
            raise Crash

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(self.storage, step, killed)
            patch.setattr(self.storage, "_undo", lambda *_args: None)
            patch.setattr(self.storage, "_forget", lambda _name: None)
            patch.setattr(catalog, "_discard", lambda *_args: None)
            data = self._data()
            with contextlib.suppress(Crash, ReplicationError), contextlib.ExitStack() as stack:
                if inside:
                    stack.enter_context(transaction.atomic())
                if by_catalog:
                    name = catalog.add(ContentFile(data), "p/x.bin").name
                else:
                    name = self.storage.save("p/x.bin", ContentFile(data))
                if inside:
                    raise Crash
                self.alive[name] = data  # it has no such step

    @rule(given=faults, pick=picks)
    def replace(self, given: dict[str, str], pick: int) -> None:
        if not self.alive:
            return
        self.world.faults = given
        old = MediaFile.objects.get(name=sorted(self.alive)[pick % len(self.alive)])
        data = self._data()
        with contextlib.suppress(ReplicationError):
            self.alive[catalog.replace(old, ContentFile(data)).name] = data

    @rule(
        given=faults,
        pick=picks,
        way=st.sampled_from(["storage", "catalog", "rolled back", "crash", "with a save"]),
        then_work=st.booleans(),
    )
    def delete(self, given: dict[str, str], pick: int, way: str, then_work: bool) -> None:
        if not self.alive:
            return
        self.world.faults = given
        name = sorted(self.alive)[pick % len(self.alive)]
        if way == "rolled back":
            with contextlib.suppress(Crash), transaction.atomic():
                self.storage.delete(name)
                raise Crash
            return
        if way == "catalog":
            catalog.delete(name)
        elif way == "crash":  # after the commit, before the bytes
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(catalog, "_purge_after_commit", lambda _file: None)
                self.storage.delete(name)
        elif way == "with a save":
            with transaction.atomic():
                self.storage.delete(name)
                data = self._data()
                with contextlib.suppress(ReplicationError):
                    self.alive[self.storage.save("p/y.bin", ContentFile(data))] = data
        else:
            self.storage.delete(name)
        del self.alive[name]
        if then_work:  # before anything late is done
            self.world.faults = {}
            self.a_while_passes()
            Worker().work()

    @rule(given=faults)
    def work(self, given: dict[str, str]) -> None:
        self.world.faults = given
        Worker().work()

    @rule(given=faults, host=st.sampled_from(HOSTS))
    def work_and_crash(self, given: dict[str, str], host: str) -> None:
        """The worker is killed after its request, before it could write down the end."""
        self.world.faults = given
        worker = Worker()
        claimed = worker.claim(host)
        if claimed is not None:
            with contextlib.suppress(OSError):
                worker._deliver(*claimed)

    @rule(pick=picks)
    def a_late_request_is_done(self, pick: int) -> None:
        if self.world.late:
            self.world.late.pop(pick % len(self.world.late))()

    @rule()
    def a_while_passes(self) -> None:
        """Pauses between attempts and deadlines are over; a late request may still come."""
        soon = timezone.now() + timedelta(seconds=300)
        Outbox.objects.filter(done=None, not_before__lt=soon).update(not_before=timezone.now())

    @rule()
    def long_passes(self) -> None:
        """All that was under way is done or lost by now."""
        while self.world.late:
            self.world.late.pop(0)()
        Outbox.objects.filter(done=None).update(not_before=timezone.now())

    def settle(self) -> None:
        self.world.faults = {}
        for _ in range(3):
            self.long_passes()
            catalog.finish_deletes()
            Worker().work()
        assert not Outbox.objects.filter(done=None).exists()
        for host, files in self.world.files.items():
            assert files == self.alive, f"host {host}"
        for name, data in self.alive.items():
            assert self.storage.open(name).read() == data
        stored = MediaFile.objects.filter(state="stored").values_list("name", flat=True)
        assert set(stored) == set(self.alive)


@pytest.fixture(autouse=True)
def _quiet() -> Iterator[None]:
    logging.disable(logging.CRITICAL)
    yield
    logging.disable(logging.NOTSET)


@pytest.mark.parametrize("kind", ["Hybrid", "Async", "Distributed"])
def test_everything_converges(kind: str, database: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(outbox, "LATE", 3600.0)
    machine = type("Machine", (Machine,), {"kind": kind, "location": str(tmp_path)})
    run_state_machine_as_test(
        machine,
        settings=profile(
            max_examples=EXAMPLES, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
        ),
    )
    connections.close_all()
