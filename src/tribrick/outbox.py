"""The outbox: work for media hosts that outlives requests, workers and outages.

Rows are written in the transaction that they belong to. For each host and name they are done in
the order of their numbers. A row is claimed by moving its ``not_before`` behind the deadline of
the attempt, so that another worker takes it over when this one was killed.

No deleted file comes back:

- A PUT is not sent once its name has a tombstone or a later DELETE.
- An attempt that was given up, or whose worker was killed, may still reach the host. So where one
  was made, the DELETE is sent twice, the second time ``LATE`` after the first, when the PUT's
  deadline is long over.

No save leaves bytes that nobody knows of: before the first byte goes anywhere an *intent* is
committed, apart from the caller's transaction. When it is due and the catalog has the file, it is
dropped. Else the save was killed or rolled back. Then the name gets a tombstone, and with it, in
one transaction, a DELETE for every host and for the local directory. The catalog has a name once,
so whoever commits first wins, at every isolation level and however long a transaction is open: a
save that comes after the tombstone fails and is undone, and a tombstone waits for a row that is not
committed yet.
"""

from __future__ import annotations

import contextlib
import logging
import os
import queue
import random
import sqlite3
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from datetime import datetime, timedelta
from functools import partial
from pathlib import Path
from typing import Any, Final, cast

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.files.storage import storages
from django.db import DatabaseError, close_old_connections, connections, router, transaction
from django.db.models import Exists, Max, Min, OuterRef, Q
from django.utils import timezone
from django.utils.module_loading import import_string

from tribrick.conf import setting
from tribrick.ledger import Ledger, LedgerError
from tribrick.models import Change, MediaFile, Operation, Outbox, State
from tribrick.storage.base_remote import DELETE, RemoteStorage
from tribrick.storage.transport import Deadline, TransportError, UnexpectedStatusCode
from tribrick.storage.volume import StoredFile, VolumeStorage

log = logging.getLogger("tribrick.outbox")
SOON = 1.0
LATE = 60.0
KEPT = timedelta(days=7)
ABANDONED = 3600.0
"""Seconds after which a save without a row counts as killed or rolled back, besides its deadline."""
IDLE = 0.8
"""Seconds after which an unused connection is closed: sooner than Django drops a test database (1 s)."""
LOCAL: Final = "local:"
_MANY: Final = 100
_LATER: Final = 60.0
_LOOK: Final = 10.0  # seconds between looks at the intents
_LOCK: Final = "200ms"  # how long a tombstone waits for a row that is not committed yet
_LONGEST_PAUSE: Final = 300.0
_MARGIN: Final = 5.0
_NOT_SENT: Final = "not sent: the file was deleted"
_ONCE_MORE: Final = "deleted; once more when no late PUT can arrive"


def database() -> str:
    """Return the alias of the database that holds the outbox."""
    return router.db_for_write(Outbox)


def _rows() -> Any:
    return Outbox.objects.using(database())


def _after(seconds: float) -> datetime:
    return timezone.now() + timedelta(seconds=seconds)


# Writing work down


def local_host() -> str:
    """Return what stands for the local directory of this node in the outbox."""
    return f"{LOCAL}{setting('NODE')}"


def add_put(
    stored: StoredFile,
    hosts: Sequence[str],
    *,
    storage: str = "",
    attempts: int = 0,
    error: str = "",
    delay: float = 0,
) -> None:
    """Note that *hosts* need a file. *attempts* says that one was made and its end is not sure."""
    _rows().bulk_create(
        Outbox(
            name=stored.name,
            operation=Operation.PUT,
            host=host,
            storage=storage,
            sha256=stored.sha256,
            size=stored.size,
            attempts=attempts,
            last_error=error,
            not_before=_after(delay),
        )
        for host in hosts
    )


def add_delete(name: str, hosts: Sequence[str], *, storage: str = "", delay: float = 0) -> None:
    """Note that *name* must go from *hosts*; those where this is noted already are left out."""
    noted = _rows().filter(name=name, storage=storage, operation=Operation.DELETE, done=None)
    there = set(noted.values_list("host", flat=True))
    _rows().bulk_create(
        Outbox(name=name, operation=Operation.DELETE, host=host, storage=storage, not_before=_after(delay))
        for host in hosts
        if host not in there
    )


def add_delete_apart(name: str, hosts: Sequence[str], *, storage: str = "", delay: float = 0) -> None:
    """The same in a transaction of its own, so that the caller's rollback does not take it back."""
    _apart(partial(add_delete, name, hosts, storage=storage, delay=delay))


def add_intent(name: str, *, storage: str, seconds: float) -> None:
    """Commit that a save has begun, which may take *seconds* before its row is written."""
    row = Outbox(
        name=name,
        operation=Operation.INTENT,
        host=local_host(),
        storage=storage,
        not_before=_after(ABANDONED + seconds),
    )
    _apart(partial(row.save, force_insert=True, using=database()))


def drop_intent(name: str) -> None:
    """Forget a save that was undone. Where that fails the worker finds out for itself."""
    with contextlib.suppress(DatabaseError):
        _apart(lambda: _rows().filter(name=name, operation=Operation.INTENT).delete())


class _Apart:
    """A thread that writes in transactions of its own; connections belong to threads.

    Its one connection is kept until there was no work for ``IDLE`` seconds, or a write has failed.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._waiting: queue.SimpleQueue[tuple[Callable[[], Any], Future[None]]] = queue.SimpleQueue()
        self._runs = False

    def write(self, write: Callable[[], Any]) -> None:
        """Have it written; wait until it is, or raise what went wrong."""
        done: Future[None] = Future()
        with self._lock:
            self._waiting.put((write, done))
            if not self._runs:
                threading.Thread(target=self._run, name="tribrick-outbox", daemon=True).start()
                self._runs = True
        done.result()

    def _run(self) -> None:
        while True:
            try:
                write, done = self._waiting.get(timeout=IDLE)
            except queue.Empty:
                with self._lock:
                    if self._waiting.empty():
                        self._runs = False
                        break
                continue
            try:
                self._close_if_stale()
                write()
            except BaseException as error:  # noqa: BLE001  raised again by who waits
                connections.close_all()
                done.set_exception(error)
            else:
                done.set_result(None)
            del write, done
        connections.close_all()

    @staticmethod
    def _close_if_stale() -> None:
        connection = connections[database()]
        if connection.connection is not None and not connection.is_usable():
            connection.close()


_thread = _Apart()


def _after_fork() -> None:
    global _thread
    _thread = _Apart()


os.register_at_fork(after_in_child=_after_fork)


def _apart(write: Callable[[], Any]) -> None:
    """Write in a transaction of its own.

    SQLite allows one writer at a time, so there it is the caller's transaction after all.
    """
    connection = connections[database()]
    if not connection.in_atomic_block or connection.vendor == "sqlite":
        write()
    else:
        _thread.write(write)


def hosts_of_unclean_puts(name: str) -> list[str]:
    """Return the hosts where a PUT of *name* is waiting, under way, or has failed before."""
    unclean = _rows().filter(name=name, operation=Operation.PUT).filter(Q(done=None) | ~Q(last_error=""))
    return sorted(set(unclean.values_list("host", flat=True)))


# Doing it


@dataclass(frozen=True)
class Lag:
    """What is waiting for one host, since when, and what went wrong last."""

    host: str
    waiting: int
    oldest: datetime | None
    last_error: str


def lag() -> list[Lag]:
    """Return what is waiting, by host."""
    found = []
    waiting = _rows().filter(done=None).exclude(operation=Operation.INTENT)
    for host in sorted(set(waiting.values_list("host", flat=True))):
        mine = waiting.filter(host=host)
        failed = mine.exclude(last_error="").order_by("-attempts", "id").first()
        oldest = mine.aggregate(oldest=Min("created"))["oldest"]
        found.append(Lag(host, mine.count(), oldest, failed.last_error if failed is not None else ""))
    return found


def forget_host(host: str) -> int:
    """Give up the work for a host that is gone for good; return how much it was."""
    work = _rows().filter(host=host, done=None).exclude(operation=Operation.INTENT)
    return int(work.update(done=timezone.now(), last_error="the host was given up"))


def settle_intents(name: str | None = None) -> int:
    """Look at the saves that should have ended by now; return how many were abandoned.

    What the catalog has, or the ledger of this node, is a file. The rest gets a tombstone.
    """
    due = _rows().filter(operation=Operation.INTENT, not_before__lte=timezone.now())
    if name is not None:
        due = due.filter(name=name)
    recorded = Exists(MediaFile.objects.filter(name=OuterRef("name")))
    due.filter(recorded | Exists(Change.objects.filter(name=OuterRef("name")))).delete()
    abandoned = 0
    for row in due.order_by("id")[:_MANY]:
        try:
            abandoned += _abandon(row)
        except (DatabaseError, ImproperlyConfigured, LedgerError, sqlite3.Error) as error:
            # Most likely its row is there and not committed yet.
            log.warning("the save of %s is not settled yet: %s", row.name, " ".join(str(error).split()))
            _rows().filter(pk=row.pk).update(not_before=_after(_LATER), last_error=str(error))
    return abandoned


def _abandon(row: Outbox) -> int:
    """Bury a name that was never recorded; its bytes may be anywhere."""
    if _ledger_knows(row.name):
        raise LedgerError(
            f"the ledger knows {row.name} as stored, the catalog does not; nothing was touched. "
            "The catalog has lost rows: see ledger rebuild"
        )
    storage = storages[row.storage]
    using = database()
    with transaction.atomic(using=using):
        mine = _rows().select_for_update(skip_locked=True).filter(pk=row.pk).first()
        if mine is None:  # another worker has it
            return 0
        if connections[using].vendor == "postgresql":
            with connections[using].cursor() as cursor:
                cursor.execute(f"SET LOCAL lock_timeout = '{_LOCK}'")
        now = timezone.now()
        MediaFile(
            name=row.name, storage=row.storage, size=0, state=State.PURGED, deleted=now, created=row.created
        ).save(force_insert=True, using=using)
        add_delete(row.name, list(getattr(storage, "hosts", ())), storage=row.storage)
        if isinstance(storage, VolumeStorage):
            # This node is a host of the other's, so bytes may be here as well.
            add_delete(row.name, sorted({row.host, local_host()}), storage=row.storage)
        mine.delete()
    log.warning("the save of %s was given up before its row was written; its bytes are removed", row.name)
    return 1


def _ledger_knows(name: str) -> bool:
    path = setting("LEDGER")
    if not path or not Path(path).exists():
        return False
    with Ledger(path) as ledger:
        known = ledger.get(name)
        return known is not None and known.state == "stored"


def remove_done(older_than: timedelta = KEPT) -> int:
    """Remove what was done long ago."""
    waiting = Outbox.objects.filter(name=OuterRef("name"), done=None)
    old = _rows().filter(done__lt=timezone.now() - older_than).filter(~Exists(waiting))
    return int(old.delete()[0])


class Worker:
    """Delivers the outbox. Any number of them may run, on any node.

    A worker needs the bytes: the local copy of its own node, or another host that has them.
    """

    def __init__(self, *, late: float | None = None, pause: float = 1.0) -> None:
        self._late = late
        self._pause = pause

    @property
    def late(self) -> float:
        """Seconds after which a PUT that was given up cannot arrive any more."""
        return LATE if self._late is None else self._late

    # Which storage and host.

    @staticmethod
    def storages() -> dict[str, RemoteStorage]:
        """Return the storages with media hosts, by their key in ``STORAGES``."""
        remote: dict[str, RemoteStorage] = {}
        for alias, options in settings.STORAGES.items():
            # Another storage may lack what only a web process is given, such as STATIC_URL; so it is not made here.
            backend = import_string(options["BACKEND"])
            if isinstance(backend, type) and issubclass(backend, RemoteStorage):
                remote[alias] = cast("RemoteStorage", storages[alias])
        return remote

    def hosts(self) -> list[str]:
        """Return all media hosts."""
        return sorted({host for storage in self.storages().values() for host in storage.hosts})

    def _storage(self, row: Outbox, file: MediaFile | None = None) -> RemoteStorage:
        """Return the storage of a row; rows of older releases do not name it."""
        if row.storage:
            named = self.storages().get(row.storage)
            if named is None or (row.host not in named.hosts and not row.host.startswith(LOCAL)):
                raise TransportError(f"the storage {row.storage} has no host {row.host}")
            return named
        fitting = {alias: storage for alias, storage in self.storages().items() if row.host in storage.hosts}
        if file is not None and file.storage in fitting:
            return fitting[file.storage]
        if not fitting:
            raise TransportError(f"no storage has the host {row.host}")
        return next(iter(fitting.values()))

    # Rounds.

    def work(self, *, name: str | None = None) -> int:
        """Do all that is due now, on all hosts in parallel; return how many deliveries succeeded."""
        done: list[int] = []

        def drain(host: str) -> None:
            self._with_connection(lambda: done.append(self._drain(host, name)))

        settle_intents(name)
        hosts = self.hosts()
        places = [*hosts, local_host()] if hosts else []
        threads = [threading.Thread(target=drain, args=(host,)) for host in places]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sum(done)

    def run(self, stop: threading.Event) -> None:
        """Work until *stop* is set, each host in a thread, so that a slow one holds up no other."""
        threads: dict[str, threading.Thread] = {}
        cleaned = timezone.now()
        looked = float("-inf")
        while not stop.is_set():
            for host in self.hosts():
                if host not in threads or not threads[host].is_alive():
                    threads[host] = threading.Thread(
                        target=self._with_connection,
                        args=(partial(self._follow, host, stop),),
                        name=f"tribrick-outbox-{host}",
                        daemon=True,
                    )
                    threads[host].start()
            if time.monotonic() - looked > _LOOK:
                self._with_connection(self._look_at_intents)
                looked = time.monotonic()
            if timezone.now() - cleaned > timedelta(hours=1):
                self._with_connection(remove_done)
                cleaned = timezone.now()
            stop.wait(self._pause)
        for thread in threads.values():
            thread.join()

    def _look_at_intents(self) -> None:
        if self.hosts():
            settle_intents()
            self._drain(local_host(), None)

    @staticmethod
    def _with_connection(work: Callable[[], Any]) -> None:
        try:
            work()
        except Exception:
            log.exception("the outbox worker stumbled; it goes on")
        finally:
            connections.close_all()

    def _follow(self, host: str, stop: threading.Event) -> None:
        while not stop.is_set() and host in self.hosts():
            if not self.deliver_one(host):
                close_old_connections()
                stop.wait(self._pause)

    def _drain(self, host: str, name: str | None) -> int:
        done = 0
        while (result := self.deliver_one(host, name)) is not None:
            done += result
        return done

    # One delivery.

    def claim(self, host: str, name: str | None = None) -> tuple[Outbox, Deadline] | None:
        """Take the next due row of *host* and the deadline of the attempt; None if there is none."""
        earlier = Outbox.objects.filter(host=OuterRef("host"), name=OuterRef("name"), id__lt=OuterRef("id"), done=None)
        earlier = earlier.exclude(operation=Operation.INTENT)
        due = _rows().filter(host=host, done=None, not_before__lte=timezone.now())
        due = due.exclude(operation=Operation.INTENT).filter(~Exists(earlier))
        if name is not None:
            due = due.filter(name=name)
        with transaction.atomic(using=database()):
            row = due.order_by("id").select_for_update(skip_locked=True, of=("self",)).first()
            if row is None:
                return None
            deadline = self._deadline(row)
            row.attempts += 1
            row.not_before = _after(deadline.seconds + _MARGIN)
            row.save(update_fields=["attempts", "not_before"])
        return row, deadline

    def _deadline(self, row: Outbox) -> Deadline:
        known = self.storages()
        return (known.get(row.storage) or next(iter(known.values()))).deadline(row.size)

    def deliver_one(self, host: str, name: str | None = None) -> bool | None:
        """Deliver the next due row of *host*: True if that succeeded; None if there is none."""
        claimed = self.claim(host, name)
        if claimed is None:
            return None
        row, deadline = claimed
        try:
            remark = self._deliver(row, deadline)
        except Exception as error:  # noqa: BLE001  whatever it is, the row stays and is tried again
            log.warning("%s failed, attempt %d: %s", row, row.attempts, error)
            pause = min(_LONGEST_PAUSE, 2.0 ** min(row.attempts, 10)) * random.uniform(0.5, 1.0)  # noqa: S311
            self._settle(row, last_error=" ".join(str(error).split()) or type(error).__name__, not_before=_after(pause))
            return False
        if remark == _ONCE_MORE:
            self._settle(row, last_error=remark, not_before=_after(self.late + self._longest_put(row)))
        elif remark:
            self._settle(row, last_error=remark, done=timezone.now())
        else:
            self._settle(row, done=timezone.now())
        return True

    def _settle(self, row: Outbox, **values: Any) -> None:
        """Write the end of the attempt, unless another worker has taken the row over."""
        _rows().filter(pk=row.pk, attempts=row.attempts, done=None).update(**values)

    def _deliver(self, row: Outbox, deadline: Deadline) -> str:
        file = MediaFile.objects.using(database()).filter(name=row.name).first()
        storage = self._storage(row, file)
        if row.host.startswith(LOCAL):
            if file is not None and file.state == State.STORED:
                raise TransportError("the catalog has the file as stored")
            cast("VolumeStorage", storage)._unlink(row.name)
            return ""
        if row.operation == Operation.DELETE:
            storage.execute_one(DELETE, row.host, row.name, None, deadline)
            return _ONCE_MORE if row.last_error != _ONCE_MORE and self._may_come_late(row) else ""
        if (file is not None and file.state != State.STORED) or self._is_deleted(row):
            return _NOT_SENT
        with storage.source(row.name, besides=row.host) as body:
            if row.sha256 and body.sha256 != row.sha256:
                raise TransportError(f"the bytes at hand are not those that were stored: SHA-256 {body.sha256}")
            try:
                storage.upload(row.host, row.name, body, deadline)
            except UnexpectedStatusCode as error:
                if error.status == 410:
                    return "not taken: the host has a tombstone"
                raise
        return ""

    @staticmethod
    def _is_deleted(row: Outbox) -> bool:
        later = _rows().filter(name=row.name, operation=Operation.DELETE, id__gt=row.pk)
        return bool(later.filter(storage__in=["", row.storage]).exists())

    @staticmethod
    def _may_come_late(row: Outbox) -> bool:
        """Return whether a PUT of this name was tried on this host without a clean end."""
        # Numbers are not given in the order of commits: a PUT with a larger one may be under way, too.
        puts = _rows().filter(host=row.host, name=row.name, operation=Operation.PUT)
        return bool(puts.exclude(done__isnull=False, attempts=1, last_error__in=["", _NOT_SENT]).exists())

    def _longest_put(self, row: Outbox) -> float:
        """Return the seconds that a PUT of this name may take; one that was given up is read to its end."""
        sizes = _rows().filter(host=row.host, name=row.name, operation=Operation.PUT).aggregate(size=Max("size"))
        return self._storage(row).deadline(sizes["size"] or 0).seconds
