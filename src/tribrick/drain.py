"""_Draining the spools: what was accepted while the volume refused it is brought there.

For each row that says *spooled*:

1. Whatever lies under the name on the volume is made durable and read, through the mount. Are these
   the bytes, the work was done before, by a drain that was killed or by another node: go to 4.
2. The bytes, from the spool here or of a peer, whichever has the right hash, are written beside the
   name and fsynced. No lock is held meanwhile, so nobody who deletes waits for a large file.
3. Under the lock of the row, if it is still alive and spooled: rename, then fsync of the still open
   file. Nothing is renamed over a file that came in between; then it begins again.
4. The file is read back through the mount. Only when its hash is right the row loses *spooled*, and
   then the copies in the spools are removed.

Killed between any two steps it leaves at most a temporary file, which ``sweep`` takes, and does the
rest when it is run again. Two nodes with the same file write it twice at worst, into one name.

A delete writes its tombstone under the same lock. Before the rename it wins, after it the bytes are
on the volume and are unlinked as always. A rename that hung in the volume may still come later; so the
row of a deleted file stays *spooled* for an hour, and then all its bytes are removed once more.

Then the spool here is looked through: what its row knows as drained is compared on the volume once
more and removed, what was deleted is removed, and what has no row a day later is set aside.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from functools import partial
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.core.files import File
from django.core.files.storage import storages
from django.db import OperationalError, connections, transaction
from django.db.models import Case, Value, When
from django.utils import timezone

from tribrick import audit, catalog
from tribrick.conf import setting
from tribrick.copies import AuditError, Found, PathCopy
from tribrick.errors import StorageFull, StorageUnavailable
from tribrick.models import Change, Kind, MediaFile, State
from tribrick.storage.base_remote import OtherBytes, ReplicationError, _is_missing
from tribrick.storage.guard import Call
from tribrick.storage.mount import go_on
from tribrick.storage.opened import Reader
from tribrick.storage.saving import CHUNK, Saving
from tribrick.storage.spool import spool
from tribrick.storage.volume import VolumeStorage

log = logging.getLogger("tribrick.drain")
LATE = timedelta(hours=1)
"""After so long a rename that hung in the volume has ended, and a deleted file is removed for the last time."""
_ROUNDS: Final = 3
_REFUSALS: Final = 3  # in a row, after which the volume is left alone in this pass
_LOCK: Final = "2s"  # how long a row is waited for; its delete may take longer, then it is drained next time
_PAGE: Final = 500
Identity = tuple[int, int, int, int]
Progress = Callable[[str, int, int], None]


@dataclass
class Report:
    """What one pass did. Names of files; with ``waiting``, ``away`` and ``corrupt`` why, or where."""

    drained: list[str] = field(default_factory=list)
    removed: list[str] = field(default_factory=list)
    """Deleted files, and copies of drained ones, that were still in the spool here."""
    quarantined: list[str] = field(default_factory=list)
    young: int = 0
    corrupt: dict[str, str] = field(default_factory=dict)
    """Copies with other bytes than those that were stored."""
    waiting: dict[str, str] = field(default_factory=dict)
    away: dict[str, str] = field(default_factory=dict)
    """Files, or ``storage KEY``, about which nobody could be asked."""

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        return dict(vars(self))


class _Again(Exception):
    """Something else lies under the name than a moment ago."""


class _Gone(Exception):
    """The row is no longer to be drained."""


class _NoCopy(Exception):
    """No spool has the right bytes; *away* says that one could not be asked."""

    def __init__(self, text: str, *, away: bool) -> None:
        super().__init__(text)
        self.away = away


@dataclass(frozen=True)
class _Seen:
    identity: Identity
    right: bool


def _identity(relative: str, root: int) -> Identity | None:
    try:
        status = os.stat(relative, dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        return None
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


class _Draining(Saving):
    """A file that is written beside its name, and gets the name in a step of its own."""

    def finish(self, call: Call[Any]) -> None:  # noqa: ARG002  called as Saving.finish is
        """Make the bytes durable; the file stays open for the fsync under its name."""
        os.fsync(self.descriptor)

    def let_go(self) -> None:
        """Nothing yet: the root is needed for the name."""

    def publish(self, call: Call[Any], there: Identity | None) -> None:
        """Give the file its name, if that has not changed since *there* was seen, and make it durable."""
        try:
            if _identity(self.relative, self.root) != there:
                raise _Again
            go_on(call)
            os.rename(self.path, self.relative, src_dir_fd=self.root, dst_dir_fd=self.root)
            self._created = False
            os.fsync(self.descriptor)
        finally:
            self.give_up()

    def give_up(self) -> None:
        """Close everything, and remove the file if it has not got its name."""
        super().give_up()
        super().let_go()

    def late(self, pk: Any) -> None:
        """The rename ended after nobody waited any more; undo it if the file was deleted meanwhile."""
        self.give_up()
        try:
            if not MediaFile.objects.using(catalog.database()).filter(pk=pk, state=State.STORED).exists():
                with self.mount.root() as root, contextlib.suppress(FileNotFoundError):
                    os.unlink(self.relative, dir_fd=root)
        finally:
            connections.close_all()


class IntoVolume:
    """Bringing files of the catalog to the volume: what is there is looked at, written and read back."""

    def __init__(self) -> None:
        self._using = catalog.database()

    def _wanted(self) -> Any:
        """Return the rows of which one must still be when its file gets its name."""
        return MediaFile.objects.using(self._using).filter(state=State.STORED)

    def _source(self, row: MediaFile) -> contextlib.AbstractContextManager[Any]:
        """Yield the right bytes as a file, open at its start."""
        raise NotImplementedError

    def _bring(self, storage: VolumeStorage, row: MediaFile) -> bool:
        """Have the file on the volume, read back with the right hash; False if the row is no longer wanted."""
        for _ in range(_ROUNDS):
            there = self._look(storage, row)
            if there is None or not there.right:
                try:
                    self._write(storage, row, None if there is None else there.identity)
                except _Gone:
                    return False
                except _Again:
                    continue
                there = self._look(storage, row)
            if there is not None and there.right:
                return True
        raise OSError("what was written was not read back; the volume changes or lies")

    def _look(self, storage: VolumeStorage, row: MediaFile) -> _Seen | None:
        """Make durable what lies under the name on the volume, and read it through the mount."""
        mount, relative = storage._mount(), storage._relative(row.name)

        def made_durable(root: int) -> Identity | None:
            try:
                descriptor = os.open(relative, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=root)
            except FileNotFoundError:
                return None
            try:
                os.fsync(descriptor)
                os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)  # what is read next comes from the bricks
            finally:
                os.close(descriptor)
            return _identity(relative, root)

        identity = mount.call(made_durable, subject=relative)
        if identity is None:
            return None
        hasher = hashlib.sha256()
        with contextlib.closing(Reader(mount, relative)) as file:
            while piece := file.read(CHUNK):
                hasher.update(piece)
        return _Seen(identity, hasher.hexdigest() == row.sha256)

    def _write(self, storage: VolumeStorage, row: MediaFile, there: Identity | None) -> None:
        """Write the file beside its name and rename it, in place of what is *there*."""
        if there is not None:
            log.error("%s has other bytes on the volume than those that were stored; it is replaced", row.name)
        saving = _Draining(storage._mount(), storage._relative(row.name))
        with self._source(row) as source:
            written = storage._write_once(saving, File(source))
        started = False
        try:
            if written.sha256 != row.sha256:
                raise OSError(f"the copy of {row.name} changed while it was read")
            with self._locked(row):
                call: Call[None] = saving.mount.start(
                    partial(saving.publish, there=there), late=partial(saving.late, row.pk)
                )
                started = True  # from now on the worker cleans up
                saving.mount.result_of(call)
        except BaseException:
            if not started:
                saving.mount.clean_up(saving.give_up)
            raise

    @contextlib.contextmanager
    def _locked(self, row: MediaFile) -> Iterator[None]:
        """Lock the row; raise ``_Gone`` unless it is still to be brought."""
        with transaction.atomic(using=self._using):
            if connections[self._using].vendor == "postgresql":
                with connections[self._using].cursor() as cursor:
                    cursor.execute(f"SET LOCAL lock_timeout = '{_LOCK}'")
            if self._wanted().select_for_update().filter(pk=row.pk).first() is None:
                raise _Gone
            yield


class Drain(IntoVolume):
    """One pass over what is spooled. *stop* is asked between two files."""

    def __init__(
        self, *, progress: Progress = lambda _what, _done, _total: None, stop: Callable[[], bool] = lambda: False
    ) -> None:
        super().__init__()
        self.spool = spool()
        self.report = Report()
        self._progress, self._stop = progress, stop
        self._refusals: dict[str, int] = {}
        self._silent: set[str] = set()

    def run(self) -> Report:
        """Drain what can be drained now. What cannot is in the report; only the catalog's absence raises."""
        wanted = list(self._rows().values_list("pk", "name", "storage"))
        for done, (pk, name, alias) in enumerate(wanted):
            if self._stop():
                return self.report
            self._progress("files", done, len(wanted))
            if f"storage {alias}" not in self.report.away:
                self._try(pk, name, alias)
        if wanted:
            self._progress("files", len(wanted), len(wanted))
        self._look_through()
        return self.report

    def _wanted(self) -> Any:
        return super()._wanted().filter(spooled=True)

    def _rows(self) -> Any:
        """Return the rows to look at. Those of this node first, so that nodes that drain at once do not meet."""
        mine = Case(When(node=str(setting("NODE")), then=Value(0)), default=Value(1))
        rows = MediaFile.objects.using(self._using).filter(spooled=True)
        # A deleted file whose bytes are gone already waits for its last removal.
        return rows.exclude(state=State.PURGED, deleted__gt=timezone.now() - LATE).order_by(mine, "pk")

    def _try(self, pk: Any, name: str, alias: str) -> None:
        report = self.report
        try:
            self._one(pk)
        except StorageFull as error:
            report.waiting[name] = str(error)
        except StorageUnavailable as error:
            self._refused(name, alias, error)
        except _NoCopy as error:
            (report.away if error.away else report.waiting)[name] = str(error)
        except OperationalError as error:
            if connections[self._using].connection is None or not connections[self._using].is_usable():
                raise
            report.waiting[name] = f"its row is locked: {' '.join(str(error).split())}"
        except (OSError, ImproperlyConfigured) as error:  # the latter: its storage is no longer in STORAGES
            report.waiting[name] = str(error)

    def _refused(self, name: str, alias: str, error: StorageUnavailable) -> None:
        """Tell a volume that is away, or refuses everything, from one that cannot take or give one file."""
        self._refusals[alias] = self._refusals.get(alias, 0) + 1
        try:
            storages[alias].verify()  # type: ignore[attr-defined]  # only a VolumeStorage has spooled files
        except StorageUnavailable:
            self._refusals[alias] = _REFUSALS
        if self._refusals[alias] >= _REFUSALS:
            self.report.away[f"storage {alias}"] = str(error)
        self.report.waiting[name] = str(error)

    # One file.

    def _one(self, pk: Any) -> None:
        rows = MediaFile.objects.using(self._using).filter(pk=pk, spooled=True)
        row = rows.first()
        if row is not None and row.state == State.STORED:
            storage = storages[row.storage]
            if not isinstance(storage, VolumeStorage):
                raise ImproperlyConfigured(f"{row.storage} is not a storage on a volume")
            if self._bring(storage, row):
                self._settle(row)
                self._refusals.pop(row.storage, None)
                return
            row = rows.first()
        if row is not None and row.state != State.STORED:  # None: another drain was here
            self._bury(row)

    @contextlib.contextmanager
    def _source(self, row: MediaFile) -> Iterator[Any]:
        """Yield the bytes from a spool whose copy has the right hash."""
        with contextlib.ExitStack() as stack:
            try:
                descriptor = stack.enter_context(self.spool._local(row.name))
                file = stack.enter_context(os.fdopen(os.dup(descriptor), "rb"))
                hasher = hashlib.sha256()
                while piece := file.read(CHUNK):
                    hasher.update(piece)
            except (FileNotFoundError, NotADirectoryError):
                pass
            except OSError as error:
                self._corrupt(row.name, f"here: {error}")
            else:
                if hasher.hexdigest() == row.sha256:
                    file.seek(0)
                    yield file
                    return
                self._corrupt(row.name, "here")
            yield stack.enter_context(contextlib.closing(self._fetch(row.name)))

    def _fetch(self, name: str) -> Any:
        try:
            return self.spool.fetch(name)
        except FileNotFoundError as error:
            raise _NoCopy(f"no spool has it: {error}", away=False) from error
        except ReplicationError as error:
            wrong = [host for host, outcome in error.results.items() if isinstance(outcome.error, OtherBytes)]
            if wrong:
                self._corrupt(name, ", ".join(wrong))
            asked = [outcome.error for outcome in error.results.values()]
            certain = all(isinstance(one, OtherBytes) or _is_missing(one) for one in asked)
            raise _NoCopy(str(error), away=not certain) from error

    def _corrupt(self, name: str, where: str) -> None:
        log.error("the copy of %s in a spool has other bytes than those that were stored: %s", name, where)
        before = self.report.corrupt.get(name)
        self.report.corrupt[name] = f"{before}, {where}" if before else where

    def _settle(self, row: MediaFile) -> None:
        """The volume has the file: say so in the row, then remove the copies."""
        alive = MediaFile.objects.using(self._using).filter(pk=row.pk, state=State.STORED)
        if alive.filter(spooled=True).update(spooled=False):
            self.report.drained.append(row.name)
        if alive.filter(spooled=False).exists():  # a deleted one keeps its mark, by which its copies are removed
            self._remove(row.name)

    def _remove(self, name: str) -> bool:
        """Remove the copies in the spools; return whether all are gone.

        A peer that does not answer is not asked again in this pass, so that it does not cost its
        deadline for each file. Its own drain goes by the rows.
        """
        gone, silent = self.spool.remove(name, [host for host in self.spool.hosts if host not in self._silent])
        self._silent.update(silent)
        return gone and not self._silent

    def _bury(self, row: MediaFile) -> None:
        """Remove all bytes of a deleted file; the last time, an hour later, its row is settled."""
        gone = self._remove(row.name)
        catalog.purge(row)
        self.report.removed.append(row.name)
        if gone and (row.deleted is None or row.deleted < timezone.now() - LATE):
            MediaFile.objects.using(self._using).filter(pk=row.pk).update(spooled=False)

    # What else is in the spool here.

    def _look_through(self) -> None:
        copy = PathCopy("spool", str(self.spool.location), writable=True)
        try:
            copy.check()
            for batch in audit.batches(copy.walk(), _PAGE):
                if self._stop():
                    return
                self._sort(copy, batch)
        except OSError as error:
            self.report.away["spool"] = str(error)

    def _sort(self, copy: PathCopy, batch: list[Found]) -> None:
        listed = [one.name for one in batch if audit._printable(one.name)]
        rows = {row.name: row for row in MediaFile.objects.using(self._using).filter(name__in=listed)}
        deleted = Change.objects.using(self._using).filter(name__in=set(listed) - set(rows), kind=Kind.DELETED)
        dead = set(deleted.values_list("name", flat=True))
        lost = []
        for one in batch:
            row = rows.get(one.name)
            if row is None and one.name not in dead:
                lost.append(one)
            elif row is None or row.state != State.STORED:
                self._take_away(one.name)
            elif not row.spooled and f"storage {row.storage}" not in self.report.away:
                self._compare(row)
        if lost:
            self._set_aside(copy, lost)

    def _take_away(self, name: str) -> None:
        gone, _ = self.spool.remove(name, ())
        if gone:
            self.report.removed.append(name)

    def _compare(self, row: MediaFile) -> None:
        """Remove a copy whose row says that the volume has the file, if that is so; else drain it after all."""
        try:
            storage = storages[row.storage]
            there = self._look(storage, row) if isinstance(storage, VolumeStorage) else None
        except StorageUnavailable as error:
            self.report.away[f"storage {row.storage}"] = str(error)
            return
        except (OSError, ImproperlyConfigured) as error:
            self.report.waiting[row.name] = str(error)
            return
        if there is not None and there.right:
            self._take_away(row.name)
            return
        again = MediaFile.objects.using(self._using).filter(pk=row.pk, state=State.STORED, spooled=False)
        if again.update(spooled=True):
            log.error("%s was not on the volume as it was stored; it is drained again", row.name)
        self._try(row.pk, row.name, row.storage)

    def _set_aside(self, copy: PathCopy, lost: list[Found]) -> None:
        """Move what never got a row to the quarantine, as sweep does."""
        limit = audit.settled_before().timestamp()
        old = [one for one in lost if one.changed < limit]
        self.report.young += len(lost) - len(old)
        if not old:
            return
        try:
            audit._ask_ledger(old, [])
        except AuditError as error:
            self.report.waiting |= {one.name: str(error) for one in old}
            return
        for one in old:
            with contextlib.suppress(FileNotFoundError):
                copy.quarantine(one.name)
                self.report.quarantined.append(one.name)
        audit._empty_quarantine(copy)


def spooled() -> int:
    """Return how many living files are in the spools and not yet known to be on the volume."""
    return int(MediaFile.objects.using(catalog.database()).filter(state=State.STORED, spooled=True).count())
