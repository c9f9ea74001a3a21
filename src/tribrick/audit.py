"""Comparing the catalog with the storage and every copy of it, and mending what differs.

What is known comes from the catalog, or from the ledger when the database is away. Nothing here is
on the way of a request, so here the disk is asked, file by file.
"""

from __future__ import annotations

import contextlib
import json
import mimetypes
import os
import random
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta, timezone
from itertools import islice
from pathlib import Path
from typing import Any, Final, TypeVar

from django.core.files.storage import FileSystemStorage, storages
from django.db import IntegrityError
from django.utils import timezone as django_timezone

from tribrick import catalog, names
from tribrick.conf import setting
from tribrick.copies import (
    QUARANTINE,
    AuditError,
    Copy,
    CopyAway,
    Found,
    PathCopy,
    Seen,
    look_at,
)
from tribrick.ledger import Known, Ledger
from tribrick.models import Change, Kind, MediaFile, State
from tribrick.storage.catalogued import below, elsewhere
from tribrick.storage.saving import TEMPORARY
from tribrick.storage.volume import StoredFile

PAGE: Final = 500
MENDED_AT_ONCE: Final = 100
SAVE_EVERY = 2.0
YOUNG: Final = timedelta(hours=1)
SETTLED: Final = timedelta(hours=24)
QUARANTINE_AGE: Final = timedelta(days=30)
#: What a file can be found to be, see docs/catalog.md.
KINDS: Final = ("missing", "torn", "different", "unreadable", "dead", "extra")
Progress = Callable[[str, int, int], None]


def _no_progress(_what: str, _done: int, _total: int) -> None:
    return None


# What is known


class CatalogSource:
    """The catalog in the database."""

    def __init__(self, alias: str) -> None:
        self.alias = alias
        # The same name may be another file's in another directory.
        self.elsewhere = elsewhere(storages[alias])

    def _rows(self) -> Any:
        return MediaFile.objects.using(catalog.database()).filter(storage=self.alias)

    @staticmethod
    def _known(rows: Any) -> list[Known]:
        return [Known(*row) for row in rows.values_list("name", "state", "storage", "sha256", "size")]

    def total(self) -> int:
        """Return the number of files of every state."""
        return int(self._rows().count())

    def page(self, after: str) -> list[Known]:
        """Return the next files by name."""
        return self._known(self._rows().filter(name__gt=after).order_by("name")[:PAGE])

    def get(self, wanted: Iterable[str]) -> dict[str, Known]:
        """Return what is known of these names; also of those whose tombstone has expired."""
        listed = [name for name in wanted if _printable(name)]
        rows = MediaFile.objects.using(catalog.database()).filter(name__in=listed)
        found = {known.name: known for known in self._known(rows.exclude(storage__in=self.elsewhere))}
        changes = list(Change.objects.using(catalog.database()).filter(name__in=set(listed) - set(found)))
        others = {c.name for c in changes if c.kind == Kind.ADDED and c.details.get("storage") in self.elsewhere}
        for change in changes:
            if change.kind != Kind.DELETED or change.name in others:
                continue
            found[change.name] = Known(change.name, State.PURGED, self.alias, change.sha256, change.size)
        return found

    def waits(self, name: str) -> bool:
        """Whether a file is in the spools and waits to be drained."""
        return bool(self._rows().filter(name=name, state=State.STORED, spooled=True).exists())

    def sample(self, count: int) -> list[Known]:
        """Return *count* stored files at random."""
        return self._known(self._rows().filter(state=State.STORED).order_by("?")[:count])


class LedgerSource:
    """The ledger of this node."""

    def __init__(self, alias: str, ledger: Ledger) -> None:
        self.alias, self.ledger = alias, ledger
        self.elsewhere = elsewhere(storages[alias])

    def total(self) -> int:
        """Return the number of files of every state."""
        return sum(known.storage == self.alias for known in self.ledger.files())

    def page(self, after: str) -> list[Known]:
        """Return the next files by name."""
        while rows := self.ledger.files(after, PAGE):
            if mine := [known for known in rows if known.storage == self.alias]:
                return mine
            after = rows[-1].name
        return []

    def get(self, wanted: Iterable[str]) -> dict[str, Known]:
        """Return what is known of these names."""
        found = [known for name in wanted if _printable(name) and (known := self.ledger.get(name))]
        return {known.name: known for known in found if known.storage not in self.elsewhere}

    def waits(self, name: str) -> bool:  # noqa: ARG002  asked as the catalog is
        """Say no: a ledger does not know what is in the spools."""
        return False

    def sample(self, count: int) -> list[Known]:
        """Return *count* stored files at random."""
        live = [known for known in self.ledger.files() if (known.storage, known.state) == (self.alias, "stored")]
        return random.sample(live, min(count, len(live)))


Source = CatalogSource | LedgerSource


def _printable(name: str) -> bool:
    try:
        name.encode()
    except UnicodeEncodeError:  # bytes on the disk that are no text: nothing in the catalog can be it
        return False
    return "\0" not in name


# Audit


@dataclass(frozen=True)
class Finding:
    """One difference: *kind* is one of :data:`KINDS`."""

    copy: str
    kind: str
    name: str
    note: str = ""


@dataclass
class Report:
    """What an audit has found so far."""

    copies: list[str] = field(default_factory=list)
    away: dict[str, str] = field(default_factory=dict)
    checked: int = 0
    read: int = 0
    young: int = 0
    findings: list[Finding] = field(default_factory=list)
    phase: str = "files"
    after: str = ""

    @property
    def clean(self) -> bool:
        """Whether every copy was there and agrees."""
        return not self.findings and not self.away

    def as_dict(self) -> dict[str, Any]:
        """Return the report as JSON can hold it."""
        counts = {
            copy: {kind: sum((one.copy, one.kind) == (copy, kind) for one in self.findings) for kind in KINDS}
            for copy in self.copies
        }
        return {
            "clean": self.clean,
            "checked": self.checked,
            "read": self.read,
            "young": self.young,
            "away": self.away,
            "counts": counts,
            "findings": [vars(one) for one in self.findings],
        }


def examine(copy: Copy, known: Known) -> tuple[Finding | None, int]:
    """Compare one file in one copy; return the difference, if any, and the bytes read."""
    if known.state != "stored" and not copy.batched:
        try:
            there = copy.exists(known.name)
        except OSError as error:
            return Finding(copy.name, "unreadable", known.name, str(error)), 0
        return (Finding(copy.name, "dead", known.name, "was deleted") if there else None), 0
    (seen,) = copy.look([known])
    return _difference(copy, known, seen)


def examine_all(copy: Copy, files: Sequence[Known]) -> list[tuple[Finding | None, int]]:
    """Do :func:`examine` for many, at once where the copy can do that. ``CopyAway`` if it cannot be reached."""
    if not copy.batched:
        return [examine(copy, known) for known in files]
    return [_difference(copy, known, seen) for known, seen in zip(files, copy.look(files), strict=True)]


def _difference(copy: Copy, known: Known, seen: Seen | OSError) -> tuple[Finding | None, int]:
    if isinstance(seen, FileNotFoundError):
        return (Finding(copy.name, "missing", known.name) if known.state == "stored" else None), 0
    if known.state != "stored":
        return Finding(copy.name, "dead", known.name, "was deleted"), 0
    if isinstance(seen, OSError):
        return Finding(copy.name, "unreadable", known.name, str(seen)), 0
    if (seen.sha256, seen.size) == (known.sha256, known.size):
        return None, seen.size
    if seen.size < known.size:
        return Finding(copy.name, "torn", known.name, f"{seen.size} of {known.size} bytes"), seen.size
    if seen.zero_tail:
        return Finding(copy.name, "torn", known.name, "ends in zeros"), seen.size
    return Finding(copy.name, "different", known.name, f"SHA-256 {seen.sha256}, {seen.size} bytes"), seen.size


class Audit:
    """One audit over some copies. *resume* is a file that keeps how far it is, until it has ended."""

    def __init__(
        self,
        source: Source,
        over: Sequence[Copy],
        *,
        resume: str | os.PathLike[str] | None = None,
        progress: Progress = _no_progress,
    ) -> None:
        self.source, self.over, self.progress = source, list(over), progress
        self.resume = Path(resume) if resume else None
        self.report = Report(copies=[copy.name for copy in over])
        # A copy of the whole directory holds the files of the storages below it, too.
        self.others = tuple(f"{place}/" for place in below(storages[source.alias]))
        self._saved = time.monotonic()

    def run(self, *, sample: int | None = None) -> Report:
        """Compare everything, or *sample* files (and then not what else the copies hold)."""
        self._load()
        there = [copy for copy in self.over if self._is_there(copy)]
        if sample is not None:
            self._examine(self.source.sample(sample), there, sample)
            return self.report
        if self.report.phase == "files":
            self._files(there)
            self._go_to("walk")
        for copy in there:
            if self.report.phase in {"walk", f"walk {copy.name}"}:
                self._go_to(f"walk {copy.name}")
                self._walk(copy)
                self._go_to("walk")
        if self.resume:
            self.resume.unlink(missing_ok=True)
        return self.report

    def _is_there(self, copy: Copy) -> bool:
        if copy.name in self.report.away:  # before an interruption: it was not asked about all files
            return False
        try:
            copy.check()
        except OSError as error:
            self._is_away(copy, error)
            return False
        return True

    def _files(self, there: list[Copy]) -> None:
        total = self.source.total()
        while page := self.source.page(self.report.after):
            self._examine(page, there, total)
            self.report.after = page[-1].name
            self._save()

    def _examine(self, files: Sequence[Known], there: list[Copy], total: int) -> None:
        asked = self._ask(files, there)
        for index, known in enumerate(files):
            for copy in list(there):
                finding, read = asked[copy.name][index] if copy.name in asked else examine(copy, known)
                self.report.read += read
                if finding and finding.kind in ("missing", "unreadable") and not copy.batched:
                    if not self._is_there(copy):  # gone meanwhile: nothing is said of its files
                        there.remove(copy)
                        continue
                if finding and self.source.get([known.name]).get(known.name) == known:  # not deleted meanwhile
                    if finding.kind == "missing" and self.source.waits(known.name):
                        finding = replace(finding, note="it is in the spools; drain brings it")
                    self.report.findings.append(finding)
            self.report.checked += 1
            self.progress("files", self.report.checked, total)

    def _ask(self, files: Sequence[Known], there: list[Copy]) -> dict[str, list[tuple[Finding | None, int]]]:
        """Return what the copies say that are asked about many files at once; drop those that are away."""
        asked = {}
        for copy in [copy for copy in there if copy.batched]:
            try:
                asked[copy.name] = examine_all(copy, files)
            except CopyAway as error:
                self._is_away(copy, error)
                there.remove(copy)
        return asked

    def _is_away(self, copy: Copy, error: OSError) -> None:
        self.report.away[copy.name] = str(error)

    def _walk(self, copy: Copy) -> None:
        met = 0
        try:
            for batch in batches(copy.walk() or ()):
                known = self.source.get(found.name for found in batch)
                for found in batch:
                    if found.name in known or found.name.startswith(self.others):
                        continue  # alive or dead, it was examined by name; or it is not this storage's
                    if time.time() - found.changed < YOUNG.total_seconds():
                        self.report.young += 1
                    else:
                        ours = is_own(found.name) or _is_temporary(found.name)
                        note = "made by our code" if ours else "foreign"
                        self.report.findings.append(Finding(copy.name, "extra", found.name, note))
                met += len(batch)
                self.progress(copy.name, met, met)
        except CopyAway as error:
            self._is_away(copy, error)

    # How far it is.

    def _go_to(self, phase: str) -> None:
        done = self.report.phase.removeprefix("walk ") if self.report.phase.startswith("walk ") else ""
        self.over = [copy for copy in self.over if copy.name != done]
        self.report.phase = phase
        self._save(now=True)

    def _save(self, *, now: bool = False) -> None:
        if self.resume is None or (not now and time.monotonic() - self._saved < SAVE_EVERY):
            return
        state = {**vars(self.report), "findings": [vars(one) for one in self.report.findings]}
        state["left"] = [copy.name for copy in self.over]
        new = self.resume.with_name(f".{self.resume.name}.new")
        new.write_text(json.dumps(state))
        os.replace(new, self.resume)
        self._saved = time.monotonic()

    def _load(self) -> None:
        if self.resume is None or not self.resume.exists():
            return
        try:
            state = json.loads(self.resume.read_text())
            left = state.pop("left")
            state["findings"] = [Finding(**one) for one in state["findings"]]
            report = Report(**state)
        except (ValueError, TypeError, KeyError) as error:
            raise AuditError(f"{self.resume} is not the state of an audit: {error}") from error
        if report.copies != self.report.copies:
            raise AuditError(f"{self.resume} is of an audit over {', '.join(report.copies)}")
        if report.phase.startswith("walk "):  # this walk begins again
            name = report.phase.removeprefix("walk ")
            report.findings = [one for one in report.findings if (one.copy, one.kind) != (name, "extra")]
        self.report = report
        self.over = [copy for copy in self.over if copy.name in left]


_T = TypeVar("_T")


def batches(walked: Iterable[_T], size: int = PAGE) -> Iterator[list[_T]]:
    """Yield portions of *size* elements."""
    iterator = iter(walked)
    while batch := list(islice(iterator, size)):
        yield batch


def _is_temporary(name: str) -> bool:
    return bool(TEMPORARY.fullmatch(names.basename(name)))


def is_own(name: str, alias: str = "default") -> bool:
    """Whether our code made the name: it has a token, and hash directories that follow from it."""
    storage = storages[alias]
    levels = getattr(storage, "hash_levels", None)
    width = getattr(storage, "hash_width", None)
    return (
        names.parse(
            name,
            int(setting("HASH_LEVELS") if levels is None else levels),
            int(setting("HASH_WIDTH") if width is None else width),
        )
        is not None
    )


# Reconcile


@dataclass(frozen=True)
class Repair:
    """What was done about a finding, or would be; *ok* is whether it could be mended."""

    finding: Finding
    ok: bool
    what: str


def reconcile(
    findings: Iterable[Finding], source: Source, every: Sequence[Copy], *, apply: bool = False
) -> Iterator[Repair]:
    """Mend copies from another copy whose bytes have the hash that is known; extra files are left alone.

    Everything is looked at again first, so what was mended meanwhile is passed over.
    """
    for page in batches(findings, MENDED_AT_ONCE):
        done: dict[Finding, Repair] = {}
        for copy in every:
            mine = [finding for finding in page if finding.copy == copy.name and finding.kind != "extra"]
            if mine:
                done |= {repair.finding: repair for repair in _Mending(copy, source, every, apply).run(mine)}
        for finding in page:
            if finding.kind == "extra":
                text = "left alone: adopt takes it into the catalog, sweep takes our own away"
                yield Repair(finding, False, text)
            else:
                yield done[finding]


class _Mending:
    """Mends some files of one copy."""

    def __init__(self, copy: Copy, source: Source, every: Sequence[Copy], apply: bool) -> None:
        self.copy, self.source, self.every, self.apply = copy, source, every, apply

    def run(self, findings: Sequence[Finding]) -> Iterator[Repair]:
        known = self.source.get(finding.name for finding in findings)
        files = [known[finding.name] for finding in findings if finding.name in known]
        said: dict[str, str | Exception] = {}
        try:
            wrong = [file for file, (now, _) in zip(files, examine_all(self.copy, files), strict=True) if now]
            dead = [file for file in wrong if file.state != "stored"]
            said |= self._remove(dead)
            said |= self._write([file for file in wrong if file.state == "stored"])
        except OSError as error:  # away since the audit
            said = {finding.name: error for finding in findings} | said
        for finding in findings:
            what = said.get(finding.name, "in order by now")
            yield Repair(finding, not isinstance(what, Exception), str(what))

    def _remove(self, dead: Sequence[Known]) -> dict[str, str | Exception]:
        what = self.copy.remove_all(dead) if self.apply else ["to be removed"] * len(dead)
        return {file.name: one for file, one in zip(dead, what, strict=True)}

    def _write(self, wrong: Sequence[Known]) -> dict[str, str | Exception]:
        said: dict[str, str | Exception] = {}
        left = list(wrong)
        for other in self.every:
            if other.name == self.copy.name or not other.readable or not left:
                continue
            has = self._right_in(other, left)
            left = [file for file in left if file not in has]
            if not has:
                continue
            if not self.copy.writable:
                why = AuditError(f"{self.copy.name}: {self.copy.why_not}; {other.name} has the bytes")
                said |= {file.name: why for file in has}
            elif not self.apply:
                said |= {file.name: f"to be written from {other.name}" for file in has}
            else:
                said |= self._put(has, other)
        return said | {file.name: AuditError("no copy has the bytes") for file in left}

    @staticmethod
    def _right_in(other: Copy, files: Sequence[Known]) -> list[Known]:
        try:
            return [
                file
                for file, seen in zip(files, other.look(files), strict=True)
                if isinstance(seen, Seen) and (seen.sha256, seen.size) == (file.sha256, file.size)
            ]
        except CopyAway:
            return []

    def _put(self, files: Sequence[Known], other: Copy) -> dict[str, str | Exception]:
        said: dict[str, str | Exception] = {}
        try:
            with other.at_hand(files) as near:
                for file, what in zip(files, self.copy.put_all(files, near), strict=True):
                    said[file.name] = what
        except (AuditError, OSError) as error:
            said = {file.name: error for file in files} | said
        # Deleted while we wrote: it must not come back.
        now = self.source.get(said)
        dead = [now[file.name] for file in files if file.name in now and now[file.name].state != "stored"]
        for file, what in zip(dead, self.copy.remove_all(dead), strict=True):
            said[file.name] = what if isinstance(what, Exception) else "deleted meanwhile, removed again"
        return said


def backfill(host: str, alias: str = "default", progress: Progress = _no_progress) -> int:
    """Put every stored file into the outbox for a new media host; return how many were put there.

    What is waiting there for this host already is passed over, so it may be repeated.
    """
    from tribrick.models import Operation, Outbox
    from tribrick.outbox import add_put

    if host not in getattr(storages[alias], "hosts", ()):
        raise AuditError(f"{host} is not a media host of the storage {alias}")
    source, after, done, total = CatalogSource(alias), "", 0, CatalogSource(alias).total()
    queued = 0
    while page := source.page(after):
        after = page[-1].name
        waiting = Outbox.objects.using(catalog.database()).filter(host=host, done=None, operation=Operation.PUT)
        noted = set(waiting.filter(name__in=[known.name for known in page]).values_list("name", flat=True))
        for known in page:
            if known.state == "stored" and known.name not in noted:
                add_put(StoredFile(known.name, known.sha256, known.size), [host], storage=alias)
                queued += 1
        done += len(page)
        progress("files", done, total)
    return queued


# Files that the catalog does not know


@dataclass
class Strays:
    """What lies in the storage and is not in the catalog."""

    seen: int = 0
    own: list[Found] = field(default_factory=list)
    young: int = 0
    foreign: list[Found] = field(default_factory=list)
    dead: list[Known] = field(default_factory=list)
    rests: list[Found] = field(default_factory=list)  # temporary files of killed processes


def settled_before() -> datetime:
    """Return the time before which a file of ours must have its row, if it is ever to have one.

    A transaction that is open now may still commit the row of a file that was made while it ran, or
    shortly before. So it is 24 hours before the beginning of the oldest one, at most now.
    """
    from django.db import connections

    connection = connections[catalog.database()]
    now = django_timezone.now()
    if connection.vendor != "postgresql":
        return now - SETTLED
    with connection.cursor() as cursor:
        cursor.execute(
            "SELECT count(*) FROM pg_stat_activity WHERE datname = current_database()"
            " AND query = '<insufficient privilege>'"
        )
        if hidden := cursor.fetchone()[0]:
            raise AuditError(
                f"{hidden} sessions of other roles are hidden, so the oldest transaction is unknown; "
                "GRANT pg_read_all_stats to the site's role, or end them"
            )
        cursor.execute(
            "SELECT extract(epoch FROM least(now(),"
            " (SELECT min(xact_start) FROM pg_stat_activity WHERE datname = current_database()),"
            " (SELECT min(prepared) FROM pg_prepared_xacts WHERE database = current_database())))"
        )
        oldest = datetime.fromtimestamp(float(cursor.fetchone()[0]), tz=timezone.utc)
    return min(oldest, datetime.now(timezone.utc)) - SETTLED


def strays(alias: str = "default", progress: Progress = _no_progress) -> Strays:
    """Walk through the storage and sort what the catalog does not know as stored."""
    copy = storage_copy(alias)
    limit = settled_before().timestamp()
    source, found = CatalogSource(alias), Strays()
    # What a storage without rows has made has none, and is no stray.
    catalogued = getattr(storages[alias], "catalogued", True)
    for batch in batches(copy.walk()):
        known = source.get(one.name for one in batch)
        for one in batch:
            found.seen += 1
            if one.name in known:
                if known[one.name].state != "stored":
                    found.dead.append(known[one.name])
            elif _is_temporary(one.name):
                if one.changed < limit:
                    found.rests.append(one)
            elif not catalogued or not is_own(one.name, alias):
                found.foreign.append(one)
            elif one.changed < limit:
                found.own.append(one)
            else:
                found.young += 1
        progress("files", found.seen, found.seen)
    return found


def storage_copy(alias: str) -> PathCopy:
    """Return the directory of a storage; ``AuditError`` if it has none, ``OSError`` if the volume is away."""
    storage = storages[alias]
    if not isinstance(storage, FileSystemStorage):
        raise AuditError(f"the storage {alias} has no directory that could be walked through")
    copy = PathCopy("storage", storage.location, writable=True, storage=storage)
    copy.check()
    return copy


@dataclass(frozen=True)
class Swept:
    """What ``sweep`` did: moved to the quarantine, removed again, removed from the quarantine for good."""

    quarantined: list[str]
    removed: list[str]
    expired: int


def sweep(found: Strays, alias: str = "default", *, accept: int = 0) -> Swept:
    """Move files of ours that never got a row to the quarantine, and remove dead ones again.

    Refuses, before it touches anything, to take more than 1 % of the files seen, unless *accept* says
    that this many were looked at; and if the ledger of this node knows one of them as stored.
    """
    doomed = [*found.own, *found.rests]
    if len(doomed) > max(found.seen // 100, accept):
        raise AuditError(
            f"{len(doomed)} of {found.seen} files would be taken away, more than 1 %; nothing was touched. "
            f"Has the catalog lost rows (ledger rebuild), or do files come in around it (adopt)?"
        )
    copy, source = storage_copy(alias), CatalogSource(alias)
    _ask_ledger(doomed, source.elsewhere)
    quarantined, removed = [], []
    for one in doomed:
        if not source.get([one.name]):
            with contextlib.suppress(FileNotFoundError):
                copy.quarantine(one.name)
                quarantined.append(one.name)
    for known in found.dead:
        copy.storage.delete(known.name)
        removed.append(known.name)
    return Swept(quarantined, removed, _empty_quarantine(copy))


def _ask_ledger(doomed: Sequence[Found], elsewhere: Sequence[str]) -> None:
    path = setting("LEDGER")
    if not path or not Path(path).exists():
        return
    with Ledger(path) as ledger:
        for one in doomed:
            known = ledger.get(one.name)
            if known is not None and known.state == "stored" and known.storage not in elsewhere:
                raise AuditError(
                    f"the ledger knows {one.name} as stored, the catalog does not; nothing was touched. "
                    "The catalog has lost rows: see ledger rebuild"
                )


def _empty_quarantine(copy: PathCopy) -> int:
    """Remove what has been in the quarantine for 30 days."""
    area, count = copy.root / QUARANTINE, 0
    if not area.is_dir():
        return 0
    oldest = datetime.now(timezone.utc) - QUARANTINE_AGE
    for day in sorted(area.iterdir()):
        try:
            put_there = datetime.strptime(day.name, "%Y-%m-%d").replace(tzinfo=timezone.utc)
        except ValueError:
            continue
        if put_there + timedelta(days=1) > oldest:
            continue
        for directory, directories, files in os.walk(day, topdown=False):
            for name in [*files, *directories]:
                path = os.path.join(directory, name)
                if name in files or os.path.islink(path):  # a link to a directory counts as one
                    os.unlink(path)
                    count += 1
            os.rmdir(directory)
    return count


# Adopt


@dataclass(frozen=True)
class Adopted:
    """A file that was taken into the catalog, or why it was not."""

    name: str
    refused: str = ""


def adopt(
    found: Strays, alias: str = "default", *, under: str = "", apply: bool = False, owner: Any = None
) -> Iterator[Adopted]:
    """Take files into the catalog where they lie: foreign ones, and our own that are settled.

    *under* is a directory; only files below it are taken.
    """
    copy = storage_copy(alias)
    prefix = under.strip("/") + "/" if under.strip("/") else ""
    for one in [*found.foreign, *found.own]:
        if not one.name.startswith(prefix):
            continue
        refused = ""
        if not _printable(one.name):
            refused = "its name is not text"
        elif len(one.name) > catalog.NAME_LENGTH:
            refused = f"its name is longer than {catalog.NAME_LENGTH} characters"
        elif time.time() - one.changed < YOUNG.total_seconds():
            refused = "it changed within the last hour"
        else:
            try:
                _adopt_one(copy, one, alias, apply, owner)
            except (OSError, ValueError) as error:
                refused = str(error)
            except IntegrityError:
                refused = "the catalog has a file of this name, in another storage"
        yield Adopted(one.name, refused)


def _adopt_one(copy: PathCopy, one: Found, alias: str, apply: bool, owner: Any) -> None:
    seen = look_at(copy.chunks(one.name))
    now = os.lstat(copy.root / one.name)
    if (now.st_size, max(now.st_mtime, now.st_ctime)) != (one.size, one.changed) or seen.size != one.size:
        raise ValueError("it changed while it was read")
    if not apply:
        return
    created = datetime.fromtimestamp(one.modified, tz=timezone.utc)
    catalog.record(
        StoredFile(one.name, seen.sha256, seen.size),
        original=names.display_name(names.basename(one.name)),
        content_type=mimetypes.guess_type(one.name)[0] or "",
        storage=alias,
        owner=owner,
        created=created if django_timezone.is_aware(django_timezone.now()) else django_timezone.make_naive(created),
    )
