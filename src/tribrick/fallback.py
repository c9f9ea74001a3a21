"""Leaving the volume for the nodes' own disks, and coming back: what ``tribrick fallback`` does.

``complete`` makes a directory outside GlusterFS hold every living file: what is there with the
catalog's SHA-256 stays, the rest is written from the first source that has the right bytes, and what
was deleted goes. Files that the catalog does not know (thumbnails) come from the mirror as they are.

``merge`` is the way back: every living file that is not right on the volume is written there as the
drain writes, under the lock of its row, and read back. What was deleted is removed once more.

Both go by the catalog, may be killed anywhere and run again. Both say up to which change they went, and
do with *after* only what came later; so the part during which uploads are refused is short.
"""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import shutil
import tempfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from django.core.files.storage import storages
from django.db.models import Max, Sum

from tribrick import audit, catalog
from tribrick.conf import setting
from tribrick.copies import CHUNK, AuditError, Copy, PathCopy, look_at
from tribrick.drain import IntoVolume
from tribrick.errors import StorageUnavailable
from tribrick.ledger import Known
from tribrick.models import Change, Kind, MediaFile, State
from tribrick.storage.base_remote import RemoteStorage
from tribrick.storage.catalogued import in_storages
from tribrick.storage.opened import Reader
from tribrick.storage.spool import spool
from tribrick.storage.volume import VolumeStorage

Progress = Callable[[str, int, int], None]
SHARED: Final = 0o002
"""The umask for the tree: the receiver, another user of the same group, writes and deletes there, too."""
_NAMED: Final = 1000  # files that are named one by one in a report
_TIRED: Final = 3  # refusals in a row after which a source is not asked any more


def volume_at(location: str) -> VolumeStorage:
    """Return the volume that is mounted at *location*, whatever the site's storage is at the moment."""
    return VolumeStorage(
        location=location,
        file_permissions_mode=0o644,
        directory_permissions_mode=0o755,
        sentinel_id=setting("SENTINEL_ID"),
    )


# What the catalog says


def last_change() -> int:
    """Return the number of the newest change; every smaller one can be seen, too."""
    found = Change.objects.using(catalog.database()).aggregate(last=Max("number"))["last"]
    return int(found or 0)


class Catalog:
    """The files of a directory, whichever storages have it: all of them, or those that were changed after a number."""

    def __init__(self, alias: str, after: int = 0) -> None:
        self.alias, self.after = alias, after
        self.source = audit.CatalogSource(alias)

    def living(self) -> Any:
        """Return the rows of living files."""
        same = [alias for alias, _storage in in_storages() if alias not in self.source.elsewhere]
        rows = MediaFile.objects.using(catalog.database()).filter(storage__in=same, state=State.STORED)
        return rows.filter(name__in=self._changed(Kind.ADDED)) if self.after else rows

    def _changed(self, kind: Kind) -> Any:
        changes = Change.objects.using(catalog.database()).filter(kind=kind)
        if self.after:
            changes = changes.filter(number__gt=self.after)
        return changes.order_by("name").values_list("name", flat=True)

    def pages(self) -> Iterator[list[MediaFile]]:
        """Yield the living files by name."""
        rows, after = self.living().order_by("name"), ""
        while page := list(rows.filter(name__gt=after)[: audit.PAGE]):
            after = page[-1].name
            yield page

    def dead(self) -> Iterator[str]:
        """Yield the names that were deleted; also those whose tombstone has expired."""
        for batch in audit.batches(self._changed(Kind.DELETED).iterator()):
            known = self.source.get(batch)
            yield from (name for name in batch if name in known and known[name].state != State.STORED)

    def still(self, names: Sequence[str]) -> set[str]:
        """Return those of *names* that are alive now."""
        return {name for name, known in self.source.get(names).items() if known.state == State.STORED}


def _known(row: MediaFile) -> Known:
    return Known(row.name, row.state, row.storage, row.sha256, row.size)


# Where the bytes are


class MountCopy(Copy):
    """The volume, read with the deadline of every call."""

    def __init__(self, volume: VolumeStorage) -> None:
        self.name, self.volume = "mount", volume

    def check(self) -> None:
        self.volume.verify()

    def chunks(self, name: str) -> Iterator[bytes]:
        with contextlib.closing(Reader(self.volume._mount(), self.volume._relative(name))) as file:
            while piece := file.read(CHUNK):
                yield piece


class PeersCopy(Copy):
    """The receivers of the other nodes; each answer is compared with the catalog's hash."""

    name = "peers"

    def __init__(self, fetch: Callable[[str], Any]) -> None:
        self._fetch = fetch

    def chunks(self, name: str) -> Iterator[bytes]:
        with contextlib.closing(self._fetch(name)) as file:
            while piece := file.read(CHUNK):
                yield piece


def peers(alias: str) -> PeersCopy | None:
    """Return the other nodes as a source: the storage's media hosts, or the spools."""
    storage = storages[alias]
    if isinstance(storage, RemoteStorage):
        return PeersCopy(storage._download)
    if setting("SPOOL") and setting("SPOOL_PEERS"):
        return PeersCopy(spool().fetch)
    return None


def sources(alias: str, *, directories: Mapping[str, str], volume: str | None = None) -> list[Copy]:
    """Return where to look for bytes, in this order: directories, the spool here, the volume, the other nodes."""
    found: list[Copy] = [PathCopy(name, path, writable=False) for name, path in directories.items()]
    if setting("SPOOL"):
        found.append(PathCopy("spool", str(setting("SPOOL")), writable=False))
    if volume:
        found.append(MountCopy(volume_at(volume)))
    if (others := peers(alias)) is not None:
        found.append(others)
    return found


# How it is


@dataclass
class Status:
    """What there is to do, found without reading a file."""

    number: int
    """The newest change."""
    living: int
    spooled: int
    needed: int
    """Bytes that the tree lacks, by the sizes of its files."""
    free: int
    volume: str
    """Why the volume cannot be used; empty if it can."""


def status(tree: str, volume: str, alias: str = "default") -> Status:
    """Ask the catalog, the tree's disk and the volume."""
    known = Catalog(alias)
    try:
        volume_at(volume).verify()
    except OSError as error:
        why = " ".join(str(error).split())
    else:
        why = ""
    return Status(
        number=last_change(),
        living=known.living().count(),
        spooled=known.living().filter(spooled=True).count(),
        needed=_needed(known, PathCopy("tree", tree, writable=False)),
        free=free_at(Path(tree)),
        volume=why,
    )


def _needed(known: Catalog, tree: PathCopy) -> int:
    """Go by sizes alone: a file of the right size with other bytes is rare, and the reserve is large."""
    there = 0
    for page in known.pages():
        for row in page:
            with contextlib.suppress(OSError):
                there += row.size if os.lstat(tree._path(row.name)).st_size == row.size else 0
    return max(0, int(known.living().aggregate(total=Sum("size"))["total"] or 0) - there)


def free_at(path: Path) -> int:
    """Return the bytes that are free where *path* is, or will be."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def _sync(path: Path) -> None:
    """Have the disk hold what was written, new directories too. ``sync`` would also wait for the volume."""
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
            raise OSError(ctypes.get_errno(), f"syncfs of {path}: {os.strerror(ctypes.get_errno())}")
    finally:
        os.close(descriptor)


# Complete


@dataclass
class Completed:
    """What ``complete`` did, or would do; with *missing* why, by name."""

    tree: str
    after: int
    number: int = 0
    """The newest change that was looked at."""
    right: int = 0
    copied: dict[str, int] = field(default_factory=dict)
    """How many files came from which source."""
    needed: int = 0
    """Bytes that were to come."""
    foreign: int = 0
    removed: list[str] = field(default_factory=list)
    missing: dict[str, str] = field(default_factory=dict)
    away: dict[str, str] = field(default_factory=dict)
    """Sources that could not be asked."""


class _Full(AuditError):
    """The disk of the tree is full."""


class Complete:
    """Make the directory *tree* hold what the catalog says is stored."""

    def __init__(
        self,
        tree: str,
        where: Sequence[Copy],
        *,
        alias: str = "default",
        after: int = 0,
        foreign: Copy | None = None,
        reserve: int = 1 << 30,
        apply: bool = False,
        progress: Progress = lambda _what, _done, _total: None,
    ) -> None:
        self.tree = PathCopy("tree", tree, writable=True)
        self.sources, self.foreign = list(where), foreign
        self.catalog = Catalog(alias, after)
        self.reserve, self.apply, self.progress = reserve, apply, progress
        self.report = Completed(tree, after)
        self._refusals: Counter[str] = Counter()

    def run(self) -> Completed:
        """Do it. ``AuditError`` before anything is written if it would not fit."""
        if self.apply:
            self.tree.check()
        self.report.number = last_change()
        self._make_room()
        before = os.umask(SHARED)
        try:
            self._check_sources()
            total, done = self.catalog.living().count(), 0
            for page in self.catalog.pages():
                for row in page:
                    self._one(_known(row))
                    done += 1
                    self.progress("files", done, max(done, total))
            # A mirror that has never run is away by now.
            if self.foreign in self.sources and not self.catalog.after:
                self._take_foreign(self.foreign)
            # In the end, so that what was deleted while it was copied goes again.
            for batch in audit.batches(self.catalog.dead()):
                self._unlink(batch)
            if self.apply:
                _sync(self.tree.root)
        finally:
            os.umask(before)
        return self.report

    def _make_room(self) -> None:
        self.report.needed = _needed(self.catalog, self.tree)
        free = free_at(self.tree.root)
        if self.report.needed and self.report.needed + self.reserve > free:
            raise AuditError(
                f"{self.tree.root} has {free >> 20} MiB free; {self.report.needed >> 20} MiB are to come and "
                f"{self.reserve >> 20} MiB are to stay free. Give it more space; nothing was written"
            )

    def _check_sources(self) -> None:
        for source in list(self.sources):
            try:
                source.check()
            except OSError as error:
                self._give_up(source, error)

    def _give_up(self, source: Copy, error: Exception) -> None:
        self.report.away[source.name] = " ".join(str(error).split())
        self.sources.remove(source)

    def _one(self, known: Known) -> None:
        if audit.examine(self.tree, known)[0] is None:
            self.report.right += 1
            return
        # In the mode the tree is what visitors see: a file deleted meanwhile must not be there until the end.
        if self._deleted(known.name):
            return
        why = []
        for source in list(self.sources):
            try:
                self._take(known, source)
            except FileNotFoundError:
                continue
            except _Full:
                raise
            except (OSError, AuditError) as error:
                why.append(f"{source.name}: {' '.join(str(error).split())}")
                self._tired(source, error)
            else:
                self._refusals.pop(source.name, None)
                self.report.copied[source.name] = self.report.copied.get(source.name, 0) + 1
                if self._deleted(known.name):
                    self._unlink([known.name])
                return
        self.report.missing[known.name] = "; ".join(why) or "no source has it"
        if self.apply and self.tree.exists(known.name):
            self.tree.quarantine(known.name)  # other bytes must not be served, not even while there are no right ones

    def _deleted(self, name: str) -> bool:
        return name not in self.catalog.still([name])

    def _take(self, known: Known, source: Copy) -> None:
        try:
            if self.apply:
                self.tree.put(known, source)
            elif look_at(source.chunks(known.name)).sha256 != known.sha256:
                raise AuditError("has other bytes")
        except OSError as error:
            if error.errno == errno.ENOSPC and not isinstance(error, StorageUnavailable):
                raise _Full(f"{self.tree.root} is full; what was written so far stays") from error
            raise

    def _tired(self, source: Copy, error: Exception) -> None:
        """Leave a source alone that has refused several files in a row, so that each does not cost its deadline."""
        if not isinstance(error, StorageUnavailable):
            return
        self._refusals[source.name] += 1
        if self._refusals[source.name] >= _TIRED and isinstance(source, MountCopy):
            self._give_up(source, error)

    def _take_foreign(self, source: Copy) -> None:
        """Take along what the catalog does not know; nobody can verify it."""
        if not self.apply:
            return
        walked = source.walk()
        for batch in audit.batches(walked if walked is not None else ()):
            known = self.catalog.source.get(one.name for one in batch)
            for one in batch:
                if one.name in known or audit._is_temporary(one.name) or not audit._printable(one.name):
                    continue
                if self.tree.exists(one.name):
                    continue
                with contextlib.suppress(FileNotFoundError, AuditError):  # gone, or another one, meanwhile
                    seen = look_at(source.chunks(one.name))
                    self.tree.put(Known(one.name, "foreign", "", seen.sha256, seen.size), source)
                    self.report.foreign += 1

    def _unlink(self, names: Sequence[str]) -> None:
        for name in names:
            self.report.missing.pop(name, None)
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                path = self.tree._path(name)
                if self.apply:
                    path.unlink()
                else:
                    path.lstat()
                self.report.removed.append(name)


# Merge


@dataclass
class Merged:
    """What ``merge`` did, or would do; with *failed* why, by name."""

    volume: str
    after: int
    number: int = 0
    right: int = 0
    count: int = 0
    """How many files were written."""
    written: list[str] = field(default_factory=list)
    """The first of their names."""
    removed: int = 0
    """Names of deleted files that were removed from the volume once more."""
    foreign: list[str] = field(default_factory=list)
    """Files of the tree that the catalog does not know; they are left where they are."""
    failed: dict[str, str] = field(default_factory=dict)


class _Elsewhere(Exception):
    """The bytes are neither in the tree nor on another node."""


class Merge(IntoVolume):
    """Bring to the *volume* every living file that is not right there, from *tree* or the other nodes."""

    def __init__(
        self,
        tree: str,
        volume: str,
        *,
        alias: str = "default",
        after: int = 0,
        apply: bool = False,
        progress: Progress = lambda _what, _done, _total: None,
    ) -> None:
        super().__init__()
        storage = storages[alias]
        mine = storage if str(getattr(storage, "location", "")) == os.path.abspath(tree) else None
        self.tree = PathCopy("tree", tree, writable=False, storage=mine)
        self.volume, self.catalog = volume_at(volume), Catalog(alias, after)
        self.sources: list[Copy] = [self.tree]
        if (others := peers(alias)) is not None:
            self.sources.append(others)
        self.apply, self.progress = apply, progress
        self.report = Merged(volume, after)

    def run(self) -> Merged:
        """Do it. ``StorageUnavailable`` if the volume goes away; what was written stays."""
        self.volume.verify()
        self.report.number = last_change()
        total, done, refused = self.catalog.living().count(), 0, 0
        for page in self.catalog.pages():
            for row in page:
                try:
                    self._one(row)
                    refused = 0
                except StorageUnavailable as error:
                    self.volume.verify()
                    refused += 1
                    if refused >= _TIRED:
                        raise
                    self.report.failed[row.name] = " ".join(str(error).split())
                except (OSError, _Elsewhere) as error:
                    if row.name in self.catalog.still([row.name]):
                        self.report.failed[row.name] = " ".join(str(error).split())
                done += 1
                self.progress("files", done, max(done, total))
        self._remove_dead()
        if not self.catalog.after:
            self._find_foreign()
        return self.report

    def _one(self, row: MediaFile) -> None:
        there = self._look(self.volume, row)
        if there is not None and there.right:
            self.report.right += 1
        elif not self.apply:
            with self._source(row):
                self._wrote(row.name)
        elif self._bring(self.volume, row):
            self._wrote(row.name)
        else:
            return  # deleted meanwhile
        if self.apply and row.spooled:
            rows = MediaFile.objects.using(self._using).filter(pk=row.pk, state=State.STORED, spooled=True)
            rows.update(spooled=False)  # the drain removes the copies in the spools

    def _wrote(self, name: str) -> None:
        self.report.count += 1
        if self.report.count <= _NAMED:
            self.report.written.append(name)

    @contextlib.contextmanager
    def _source(self, row: MediaFile) -> Iterator[Any]:
        """Yield the right bytes: checked as a whole before the first of them goes to the volume."""
        why = []
        for source in self.sources:
            with contextlib.ExitStack() as stack:
                try:
                    file = self._fetched(row, source, stack)
                except FileNotFoundError:
                    continue
                except OSError as error:
                    why.append(f"{source.name}: {error}")
                    continue
                if file is None:
                    why.append(f"{source.name} has other bytes")
                    continue
                yield file
                return
        raise _Elsewhere("; ".join(why) or "neither this node nor another has it")

    @staticmethod
    def _fetched(row: MediaFile, source: Copy, stack: contextlib.ExitStack) -> Any:
        file = stack.enter_context(tempfile.SpooledTemporaryFile(max_size=CHUNK))
        hasher = hashlib.sha256()
        for chunk in source.chunks(row.name):
            hasher.update(chunk)
            file.write(chunk)
        if hasher.hexdigest() != row.sha256:
            return None
        file.seek(0)
        return file

    def _remove_dead(self) -> None:
        """An unlink on the volume is not durable, and a rebuilt one may hold old bytes."""
        for name in self.catalog.dead():
            if self.apply:
                self.volume._unlink(name)
            self.report.removed += 1

    def _find_foreign(self) -> None:
        """Name what somebody has put into the tree directly; nothing says whose it is. Our own names are uploads."""
        for batch in audit.batches(self.tree.walk()):
            known = self.catalog.source.get(one.name for one in batch)
            unknown = [one.name for one in batch if one.name not in known and not audit._is_temporary(one.name)]
            self.report.foreign += [name for name in unknown if not audit.is_own(name, self.catalog.alias)]
