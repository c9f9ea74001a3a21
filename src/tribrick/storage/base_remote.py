"""What the storages with media hosts have in common: settings, parallel execution, quorum, undo."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import logging
import random
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import partial
from typing import IO, TYPE_CHECKING, Any, Final, cast

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.files import File
from django.utils.module_loading import import_string
from django.utils.timezone import make_naive

from tribrick.conf import setting
from tribrick.errors import StorageUnavailable
from tribrick.storage.catalogued import Catalogued, Commit
from tribrick.storage.transport import (
    CHUNK,
    Body,
    Deadline,
    DefaultTransport,
    Spool,
    Transport,
    TransportError,
    TransportTimeout,
    UnexpectedStatusCode,
    spooled,
)
from tribrick.storage.volume import StoredFile

if TYPE_CHECKING:
    from tribrick.models import MediaFile

log = logging.getLogger("tribrick.storage")
UPLOAD: Final = "upload"
DELETE: Final = "delete"
_LEFTOVERS: Final[Mapping[str, tuple[str, ...]]] = {
    "MEDIA_HOSTS": ("RESTO_MEDIA_HOSTS", "DUST_MEDIA_HOSTS", "DUST_HOSTS"),
    "FATAL_EXCEPTIONS": ("RESTO_FATAL_EXCEPTIONS", "DUST_FATAL_EXCEPTIONS"),
    "SHOW_TRACEBACK": ("RESTO_SHOW_TRACEBACK",),
    "TIMEOUT": ("RESTO_TIMEOUT", "DUST_TIMEOUT"),
}
_SHUNNED: Final = 5.0  # seconds for which a host that failed is asked last
_GRACE: Final = 0.05  # seconds that stragglers get at least once the quorum is reached
_UNDO: Final = 0.25  # the part of a save's deadline that is kept back for undoing it


def remote_setting(key: str) -> Any:
    """Return ``TRIBRICK[key]``; else the setting of django-resto or django_dust; else the default."""
    value = setting(key)
    if key not in getattr(settings, "TRIBRICK", {}):
        for leftover in _LEFTOVERS.get(key, ()):
            if hasattr(settings, leftover):
                return getattr(settings, leftover)
    return value


@dataclass(frozen=True)
class Outcome:
    """What became of one request to one host. *queued* says that the outbox holds it."""

    host: str
    value: Any = None
    error: Exception | None = None
    queued: bool = False

    @property
    def ok(self) -> bool:
        """Whether the host has confirmed it."""
        return self.error is None and not self.queued

    def __str__(self) -> str:
        if self.queued:
            return f"{self.host}: queued"
        return f"{self.host}: {'ok' if self.error is None else self.error}"


class NotWaitedFor(TransportError):
    """The quorum was reached without this host; its request may still be under way."""

    late = True


class OtherBytes(TransportError):
    """A host has other bytes under the name than those that were stored."""


class ReplicationError(StorageUnavailable):
    """Too few hosts did it. *results* has the :class:`Outcome` of each host."""

    def __init__(self, operation: str, name: str, results: Mapping[str, Outcome], needed: int) -> None:
        self.operation, self.name, self.results, self.needed = operation, name, dict(results), needed
        errors = [outcome.error for outcome in results.values() if outcome.error is not None]
        full = bool(errors) and all(getattr(error, "errno", None) == errno.ENOSPC for error in errors)
        done = sum(outcome.ok for outcome in results.values())
        each = "; ".join(map(str, results.values()))
        super().__init__(
            errno.ENOSPC if full else errno.EIO,
            f"{operation} of {name} was confirmed by {done} of {len(results)} hosts, {needed} are needed ({each})",
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), (self.operation, self.name, self.results, self.needed)


class _Calls:
    """Calls to several hosts at once, each in a thread, of which none is waited for too long."""

    def __init__(self, work: Mapping[str, Callable[[], Any]]) -> None:
        self._changed = threading.Condition()
        self._outcomes: dict[str, Outcome] = {}
        self._hosts = list(work)
        for host, call in work.items():
            thread = threading.Thread(target=self._run, args=(host, call), name=f"tribrick-{host}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no thread to be had
                self._outcomes[host] = Outcome(host, error=_never_sent(error))

    def _run(self, host: str, call: Callable[[], Any]) -> None:
        try:
            outcome = Outcome(host, value=call())
        except Exception as error:  # noqa: BLE001  whatever it is, it is this host's outcome
            outcome = Outcome(host, error=error)
        with self._changed:
            self._outcomes[host] = outcome
            self._changed.notify_all()

    def wait(self, deadline: Deadline, enough: int | None = None) -> dict[str, Outcome]:
        """Return an outcome for each host at the latest at the deadline.

        With *enough*, once so many have confirmed, the others get only as long again.
        """
        started = time.monotonic()
        until: float | None = None
        with self._changed:
            while len(self._outcomes) < len(self._hosts):
                confirmed = sum(outcome.ok for outcome in self._outcomes.values())
                now = time.monotonic()
                if until is None and enough is not None and confirmed >= enough:
                    until = now + max(_GRACE, now - started)
                limit = deadline.at if until is None else min(until, deadline.at)
                if now >= limit:
                    break
                self._changed.wait(limit - now)
            found = dict(self._outcomes)
        late: TransportError = TransportTimeout(errno.ETIMEDOUT, f"no answer within {deadline.seconds:.3g} s")
        if until is not None and until < deadline.at:
            late = NotWaitedFor(errno.ETIMEDOUT, "not waited for: enough other hosts have confirmed")
        return {host: found.get(host) or Outcome(host, error=late) for host in self._hosts}


def _never_sent(error: Exception) -> TransportError:
    failed = TransportError(errno.EAGAIN, f"no thread: {error}")
    failed.certain = True
    return failed


class RemoteStorage(Catalogued):
    """The part of the storages that speaks with media hosts. Mixed into a Django storage.

    Subclasses may override the hooks :meth:`execute`, :meth:`execute_one` and :meth:`upload`.
    """

    base_url: Any

    def _set_remote(
        self,
        hosts: Sequence[str] | None,
        transport: Any,
        write_quorum: int | str | None,
        fatal_exceptions: bool | None,
        show_traceback: bool | None,
        timeout: float | None,
    ) -> None:
        if isinstance(hosts, str):
            raise ImproperlyConfigured("hosts must be a list of hosts, not a string.")
        self._hosts = None if hosts is None else tuple(hosts)
        self._transport_given = transport
        self._write_quorum, self._fatal, self._traceback = write_quorum, fatal_exceptions, show_traceback
        self._timeout = timeout
        self._set_runtime()
        _ = self.quorum  # refuses an empty list of hosts and a quorum that cannot be reached

    def _set_runtime(self) -> None:
        self._transports: tuple[Any, Transport] | None = None
        self._failed: dict[str, float] = {}

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_transports", "_failed")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._set_runtime()

    # Settings, read when needed.

    @property
    def hosts(self) -> tuple[str, ...]:
        """The media hosts, at least one."""
        hosts = self._hosts if self._hosts is not None else remote_setting("MEDIA_HOSTS")
        if isinstance(hosts, str) or not hosts:
            raise ImproperlyConfigured(
                f"{type(self).__name__} has no media hosts, so nothing would be stored: give "
                'TRIBRICK["MEDIA_HOSTS"] or the argument hosts, e.g. ["10.0.0.1", "10.0.0.2:8080"].'
            )
        if len(set(hosts)) != len(hosts):
            raise ImproperlyConfigured(f"{type(self).__name__}: a media host is named twice: {', '.join(hosts)}.")
        return tuple(hosts)

    @property
    def quorum(self) -> int:
        """How many hosts must confirm a save: ``write_quorum``, a majority by default.

        It is all of them where the outbox cannot be used, since nobody would complete the rest.
        """
        count = len(self.hosts)
        wanted = self._write_quorum if self._write_quorum is not None else remote_setting("WRITE_QUORUM")
        if wanted is None:
            wanted = count // 2 + 1
        elif wanted == "all":
            wanted = count
        if not isinstance(wanted, int) or isinstance(wanted, bool) or not 1 <= wanted <= count:
            raise ImproperlyConfigured(
                f'write_quorum {wanted!r} is not possible: give 1 to {count} (the number of hosts) or "all".'
            )
        return wanted

    @property
    def fatal_exceptions(self) -> bool:
        """Whether a save without quorum is undone and raises."""
        return bool(self._fatal if self._fatal is not None else remote_setting("FATAL_EXCEPTIONS"))

    @property
    def show_traceback(self) -> bool:
        """Whether the log has the traceback of a host's failure."""
        return bool(self._traceback if self._traceback is not None else remote_setting("SHOW_TRACEBACK"))

    def deadline(self, size: int = 0) -> Deadline:
        """Return the deadline of an operation that moves *size* bytes."""
        timeout = float(self._timeout if self._timeout is not None else remote_setting("TIMEOUT"))
        deadline = Deadline(timeout, float(remote_setting("MINIMUM_RATE")))
        deadline.allow(size)
        return deadline

    @property
    def transport(self) -> Transport:
        """The transport: an object, or a class (or its dotted path) that is called with ``base_url``.

        It is made again when the settings that it is made of have changed.
        """
        given = self._transport_given
        if given is not None and not isinstance(given, (str, type)):
            return given  # type: ignore[no-any-return]
        options = {"base_url": self.base_url, **remote_setting("TRANSPORT")}
        if self._transports is None or self._transports[0] != options:
            factory = import_string(given) if isinstance(given, str) else given or DefaultTransport
            self._transports = (options, factory(**options))
        return self._transports[1]

    # The catalog and the outbox.

    @property
    def has_outbox(self) -> bool:
        """Whether missing copies are completed later: the app is installed and knows this storage."""
        return self.has_catalog

    def _rows(self) -> Any:
        if not self.has_outbox:
            raise NotImplementedError(
                f"{type(self).__name__} knows times and lists from the catalog: add "
                '"tribrick" to INSTALLED_APPS and name the storage in STORAGES.'
            )
        from tribrick.catalog import database
        from tribrick.models import MediaFile, State

        return MediaFile.objects.using(database()).filter(state=State.STORED, storage=self.alias)

    # Hooks.

    def execute(self, operation: str, name: str, body: Body | None = None) -> dict[str, Outcome]:
        """Do *operation* (``"upload"`` or ``"delete"``) on all hosts; return each host's outcome.

        Override it to hand the work to a task queue. A host that you leave for later must be
        answered with ``Outcome(host, queued=True)``, and the task must survive a crash.
        """
        deadline = self.deadline(body.size if body is not None else 0)
        enough = None
        if operation == UPLOAD:
            deadline.at -= deadline.seconds * _UNDO
            enough = self.quorum if self.has_outbox else None
        work = {host: partial(self.execute_one, operation, host, name, body, deadline) for host in self.hosts}
        results = _Calls(work).wait(deadline, enough)
        self._log(operation, name, results)
        return results

    def execute_one(
        self, operation: str, host: str, name: str, body: Body | None = None, deadline: Deadline | None = None
    ) -> Any:
        """Do *operation* on one host now, or raise ``TransportError``. For tasks: host and name suffice."""
        if operation == DELETE:
            return self.transport.delete(host, name, deadline or self.deadline())
        if operation == UPLOAD:
            with contextlib.ExitStack() as stack:
                body = body or stack.enter_context(self.source(name))
                return self.upload(host, name, body, deadline or self.deadline(body.size))
        raise ValueError(f"{operation!r} is neither {UPLOAD!r} nor {DELETE!r}")

    def upload(self, host: str, name: str, body: Body, deadline: Deadline) -> bool:
        """Send one file to one host."""
        return self.transport.create(host, name, body, deadline)

    @contextlib.contextmanager
    def source(self, name: str, *, besides: str | None = None) -> Iterator[Body]:
        """Yield the bytes of a stored file from wherever they are, but not from the host *besides*."""
        with self._download(name, [host for host in self.hosts if host != besides]) as file:
            chunks = iter(lambda: file.read(CHUNK), b"")
            with spooled(chunks) as body:
                yield body

    # Writing.

    def _intend(self, name: str, size: int | None = None) -> None:
        """Commit that a save of *name* begins, before its first byte goes anywhere.

        Whatever happens to this process or the caller's transaction then, the worker removes what
        has no row.
        """
        if self.has_outbox:
            from tribrick import outbox

            outbox.add_intent(name, storage=self.alias or "", seconds=self.deadline(size or 0).seconds)

    def _forget(self, name: str) -> None:
        """Take the intent of a save back that left nothing, or a task for what it left."""
        if self.has_outbox:
            from tribrick import outbox

            outbox.drop_intent(name)

    def _replicate(self, stored: StoredFile, body: Body, content: File[Any] | None, *, local: bool) -> None:
        """Bring a new file to the hosts: enough of them have it and the rest is a task, or none has it.

        With *content* the catalog's row is written too. *local* says that there is a copy here.
        """
        results: dict[str, Outcome] = {}
        commit = Commit()
        try:
            results = self.execute(UPLOAD, stored.name, body)
            done = sum(outcome.ok for outcome in results.values())
            queued = sum(outcome.queued for outcome in results.values())
            needed = self.quorum if self.has_outbox else len(results)
            if done + queued < needed and (self.fatal_exceptions or not (local or done or queued)):
                raise ReplicationError("save", stored.name, results, needed)
            if self.has_outbox:
                from tribrick import outbox

                missing = [outcome for outcome in results.values() if outcome.error is not None]
                with commit.watched():
                    for outcome in missing:
                        outbox.add_put(
                            stored,
                            [outcome.host],
                            storage=self.alias or "",
                            attempts=1,
                            error=str(outcome.error),
                            delay=outbox.SOON,
                        )
                    if content is not None:
                        self._record(stored, content)
        except BaseException:
            if commit.unknown:
                log.error("unknown whether the rows were committed; kept %s", stored.name)
            else:
                self._undo(stored.name, results, stored.size)
            raise

    def _undo(self, name: str, results: Mapping[str, Outcome], size: int) -> None:
        """Remove a failed save from the hosts; what cannot be removed now becomes a durable task."""
        if self._undone(name, results, size):
            self._forget(name)

    def _undone(self, name: str, results: Mapping[str, Outcome], size: int) -> bool:
        if not results:  # interrupted: anything may be under way
            results = {host: Outcome(host, error=NotWaitedFor(errno.EINTR, "interrupted")) for host in self.hosts}
        touched = [
            outcome
            for outcome in results.values()
            if not outcome.queued and not (isinstance(outcome.error, TransportError) and outcome.error.certain)
        ]
        # A host that may still be storing the file must be asked after that, so this is a task at once.
        late = [outcome.host for outcome in touched if getattr(outcome.error, "late", False)]
        now = [outcome.host for outcome in touched if outcome.host not in late or not self.has_outbox]
        if now:
            deadline = Deadline(self.deadline().seconds * _UNDO)
            undone = _Calls({host: partial(self.execute_one, DELETE, host, name, None, deadline) for host in now})
            late += [host for host, outcome in undone.wait(deadline).items() if not outcome.ok and host not in late]
        return not late or self._leave(name, late, size)

    def _leave(self, name: str, hosts: Sequence[str], size: int) -> bool:
        """Note that *name* must go from *hosts*, whatever becomes of the caller's transaction."""
        if self.has_outbox:
            from tribrick import outbox

            try:
                # A PUT that was given up may end as late as its own deadline, and be read by the host later still.
                late = outbox.LATE + self.deadline(size).seconds
                outbox.add_delete_apart(name, hosts, storage=self.alias or "", delay=late)
            except Exception as error:  # noqa: BLE001  the save's own error matters more
                log.error("no task could be written: %s", error)
            else:
                return True
        log.error("a failed save may have left %s on %s; nobody was told this name", name, ", ".join(hosts))
        return False

    def _delete_remotely(self, name: str, *, catalogued: bool) -> None:
        """Delete *name* on all hosts; what fails becomes a durable task, or raises without an outbox."""
        # A PUT that is under way now may arrive after the DELETE, and be done cleanly before we look again.
        late = set(self._hosts_of_puts(name))
        results = self.execute(DELETE, name)
        missing = [outcome.host for outcome in results.values() if outcome.error is not None]
        if self.has_outbox:
            from tribrick import outbox

            add = outbox.add_delete if catalogued else outbox.add_delete_apart
            if missing:
                add(name, missing, storage=self.alias or "", delay=outbox.SOON)
            # Where a PUT may still be under way, it must be deleted after that as well.
            late |= set(outbox.hosts_of_unclean_puts(name))
            if late := late - set(missing):
                add(name, sorted(late), storage=self.alias or "", delay=outbox.SOON)
        elif missing and self.fatal_exceptions:
            raise ReplicationError("delete", name, results, len(results))

    def _hosts_of_puts(self, name: str) -> list[str]:
        if not self.has_outbox:
            return []
        from tribrick import outbox

        return outbox.hosts_of_unclean_puts(name)

    def _delete_bytes(self, name: str, *, catalogued: bool) -> None:
        self._delete_remotely(name, catalogued=catalogued)

    def _log(self, operation: str, name: str, results: Mapping[str, Outcome]) -> None:
        for host, outcome in results.items():
            if outcome.error is None:
                self._failed.pop(host, None)
                continue
            if not isinstance(outcome.error, NotWaitedFor):
                self._failed[host] = time.monotonic()
            trace = outcome.error if self.show_traceback else None
            verb = "upload" if operation == UPLOAD else "delete"
            log.error("Failed to %s %s on %s: %s", verb, name, host, outcome.error, exc_info=trace)

    # Reading.

    def _read_order(self, hosts: Sequence[str]) -> list[str]:
        """Return the hosts in random order; those that failed a moment ago come last."""
        now = time.monotonic()
        return sorted(hosts, key=lambda host: (now - self._failed.get(host, -_SHUNNED) < _SHUNNED, random.random()))  # noqa: S311

    def _ask_hosts(self, name: str, ask: Callable[[str, Deadline], Any], hosts: Sequence[str] | None = None) -> Any:
        """Return the first answer of a host that has the file; go on to the next host otherwise.

        ``FileNotFoundError`` is raised only if every host has said so.
        """
        order = self._read_order(self.hosts if hosts is None else hosts)
        deadline = self.deadline()
        results: dict[str, Outcome] = {}
        for index, host in enumerate(order):
            try:
                part = deadline.share(len(order) - index)
            except TransportTimeout as error:
                results[host] = Outcome(host, error=error)
                continue
            outcome = _Calls({host: partial(ask, host, part)}).wait(part)[host]
            deadline.at += part.allowed  # what the body may take longer is not at the other hosts' expense
            results[host] = outcome
            if outcome.ok:
                self._failed.pop(host, None)
                return outcome.value
            if not _is_missing(outcome.error):
                self._failed[host] = time.monotonic()
                log.warning("Failed to read %s on %s: %s", name, host, outcome.error)
        if results and all(_is_missing(outcome.error) for outcome in results.values()):
            raise FileNotFoundError(errno.ENOENT, f"no media host has {name}")
        raise ReplicationError("read", name, results, 1)

    def _living(self, name: str) -> MediaFile | None:
        """Return the catalog's row of *name*, if it has one; a deleted file is not found, wherever it lies."""
        row = self._row(self._canonical(name))
        if row is not None and row.state != "stored":
            raise FileNotFoundError(errno.ENOENT, f"{name} was deleted")
        return row

    def _exists_remotely(self, name: str) -> bool:
        row = self._row(name)
        if row is not None:
            return row.state == "stored"

        def ask(host: str, deadline: Deadline) -> bool:
            if self.transport.exists(host, name, deadline):
                return True
            raise UnexpectedStatusCode(host, "HEAD", name, 404)

        try:
            return bool(self._ask_hosts(name, ask))
        except FileNotFoundError:
            return False

    def _size_remotely(self, name: str) -> int:
        row = self._living(name)
        if row is not None:
            return row.size
        return int(self._ask_hosts(name, lambda host, deadline: self.transport.size(host, name, deadline)))

    def _download(self, name: str, hosts: Sequence[str] | None = None) -> IO[bytes]:
        """Return the bytes of *name* from a host, as a file: in memory up to 1 MiB, else on disk.

        A body that breaks off, or differs from the catalog's SHA-256, is asked of the next host.
        """
        row = self._living(name)
        expected = row.sha256 if row is not None else None

        def ask(host: str, deadline: Deadline) -> IO[bytes]:
            body = self.transport.content(host, name, deadline)
            spool, hasher = Spool(), hashlib.sha256()
            try:
                while chunk := body.read(CHUNK):
                    hasher.update(chunk)
                    spool.write(chunk)
                if expected and hasher.hexdigest() != expected:
                    raise OtherBytes(errno.EIO, f"GET {name} on {host}: the bytes are not those that were stored")
            except BaseException:
                spool.file.close()
                raise
            finally:
                body.close()
            spool.file.seek(0)
            return spool.file

        return cast("IO[bytes]", self._ask_hosts(name, ask, hosts))

    # Times and lists from the catalog.

    def _created(self, name: str) -> datetime:
        row = self._rows().filter(name=name).first()
        if row is None:
            raise FileNotFoundError(errno.ENOENT, f"the catalog does not know {name}")
        return row.created if settings.USE_TZ else make_naive(row.created)

    def _listed(self, path: str) -> tuple[list[str], list[str]]:
        prefix = path.strip("/")
        prefix = f"{prefix}/" if prefix and prefix != "." else ""
        directories: dict[str, None] = {}
        files: list[str] = []
        rows = self._rows().filter(name__startswith=prefix).order_by("name").values_list("name", flat=True)
        for name in rows.iterator():
            head, slash, _ = name[len(prefix) :].partition("/")
            if slash:
                directories[head] = None
            else:
                files.append(head)
        return list(directories), files


def _is_missing(error: Exception | None) -> bool:
    return isinstance(error, UnexpectedStatusCode) and error.status in (404, 410)
