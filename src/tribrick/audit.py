"""Comparing the catalog with the storage and every copy of it, and mending what differs.

What is known comes from the catalog, or from the ledger when the database is away. Nothing here is
on the way of a request, so here the disk is asked, file by file.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import mimetypes
import os
import random
import secrets
import stat
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import datetime, timedelta, timezone
from itertools import islice
from pathlib import Path
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.core.files.storage import FileSystemStorage, storages
from django.utils import timezone as django_timezone

from tribrick import catalog, names
from tribrick.conf import setting
from tribrick.ledger import Known, Ledger
from tribrick.models import Change, Kind, MediaFile, State
from tribrick.storage.saving import TEMPORARY, temporary_beside
from tribrick.storage.volume import StoredFile

CHUNK: Final = 1024 * 1024
PAGE: Final = 500
HTTP_TIMEOUT: Final = 10.0
SAVE_EVERY = 2.0
YOUNG: Final = timedelta(hours=1)
SETTLED: Final = timedelta(hours=24)
QUARANTINE: Final = ".tribrick-quarantine"
QUARANTINE_AGE: Final = timedelta(days=30)
#: What a file can be found to be, see docs/catalog.md.
KINDS: Final = ("missing", "torn", "different", "unreadable", "dead", "extra")
_TAIL: Final = 4096
Progress = Callable[[str, int, int], None]


class AuditError(Exception):
    """The comparison or the repair cannot go on; nothing was changed by the last step."""


def _no_progress(_what: str, _done: int, _total: int) -> None:
    return None


# Copies


@dataclass(frozen=True)
class Seen:
    """The bytes found under a name."""

    sha256: str
    size: int
    zero_tail: bool  # the last block holds zeros only, as after a write that never reached the disk


def _look(chunks: Iterable[bytes]) -> Seen:
    hasher, size, tail = hashlib.sha256(), 0, b""
    for chunk in chunks:
        hasher.update(chunk)
        size += len(chunk)
        tail = (tail + chunk[-_TAIL:])[-_TAIL:]
    return Seen(hasher.hexdigest(), size, bool(tail) and not any(tail))


@dataclass(frozen=True)
class Found:
    """A file met in a walk. *changed* is the later of its two times of change."""

    name: str
    size: int
    changed: float
    modified: float


class Copy:
    """One place that should hold the files. ``chunks`` raises ``FileNotFoundError`` for a missing one."""

    name: str
    why_not: str = "nothing may be written there"

    def check(self) -> None:
        """Raise ``OSError`` unless the copy is there."""

    def exists(self, name: str) -> bool:
        """Whether there is anything under *name*."""
        raise NotImplementedError

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes."""
        raise NotImplementedError

    def walk(self) -> Iterator[Found] | None:
        """Yield every file; None where that cannot be asked."""
        return None

    def put(self, known: Known, source: Copy) -> str:  # noqa: ARG002
        """Make the file from *source*; return what was done. ``AuditError`` where that cannot be."""
        raise AuditError(f"{self.name}: {self.why_not}")

    def remove(self, known: Known) -> str:  # noqa: ARG002
        """Remove a deleted file; return what was done."""
        raise AuditError(f"{self.name}: {self.why_not}")


class PathCopy(Copy):
    """A directory tree. Links are not followed; dot names in its root are not files of the site."""

    def __init__(self, name: str, root: str | os.PathLike[str], *, writable: bool, storage: Any = None) -> None:
        self.name, self.root, self.writable, self.storage = name, Path(root), writable, storage

    def check(self) -> None:
        if self.storage is not None and hasattr(self.storage, "verify"):
            self.storage.verify()
        if not self.root.is_dir():
            raise FileNotFoundError(errno.ENOENT, f"{self.root} is not a directory")

    def _path(self, name: str) -> Path:
        parts = name.split("/")
        if not all(parts) or {".", ".."} & set(parts) or "\0" in name:
            raise OSError(errno.EINVAL, f"{name!r} is not the name of a stored file")
        return self.root.joinpath(*parts)

    def exists(self, name: str) -> bool:
        try:
            os.lstat(self._path(name))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def chunks(self, name: str) -> Iterator[bytes]:
        try:
            descriptor = os.open(self._path(name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except NotADirectoryError as error:
            raise FileNotFoundError(errno.ENOENT, "no such file") from error
        with os.fdopen(descriptor, "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(descriptor).st_mode):
                raise OSError(errno.EINVAL, "is not a regular file")
            while chunk := file.read(CHUNK):
                yield chunk

    def walk(self) -> Iterator[Found]:
        waiting = [""]
        while waiting:
            directory = waiting.pop()
            try:
                with os.scandir(self.root / directory) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
            except FileNotFoundError:
                if not directory:
                    raise
                continue
            below = []
            for entry in listed:
                if not directory and entry.name.startswith(".") and not TEMPORARY.fullmatch(entry.name):
                    continue
                name = f"{directory}/{entry.name}" if directory else entry.name
                if entry.is_dir(follow_symlinks=False):
                    below.append(name)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    changed = max(status.st_mtime, status.st_ctime)
                    yield Found(name, status.st_size, changed, status.st_mtime)
            waiting.extend(reversed(below))

    def quarantine(self, name: str) -> None:
        """Move a file to the quarantine of today. Same file system, so no bytes are copied."""
        today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        area = self.root / QUARANTINE
        area.mkdir(mode=0o700, exist_ok=True)
        target = area / today / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            target = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
        os.rename(self._path(name), target)

    def put(self, known: Known, source: Copy) -> str:
        if not self.writable:
            return super().put(known, source)
        target = self._path(known.name)
        target.parent.mkdir(parents=True, exist_ok=True)
        new = Path(temporary_beside(str(target)))
        mode = getattr(self.storage, "file_permissions_mode", None)
        hasher = hashlib.sha256()
        descriptor = os.open(new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o644 if mode is None else mode)
        try:
            try:
                for chunk in source.chunks(known.name):
                    hasher.update(chunk)
                    view = memoryview(chunk)
                    while view:
                        view = view[os.write(descriptor, view) :]
                if hasher.hexdigest() != known.sha256:
                    raise AuditError(f"{source.name} changed while {known.name} was read from it")
                if mode is not None:
                    os.fchmod(descriptor, mode)
                os.fsync(descriptor)
                if os.path.lexists(target):
                    self.quarantine(known.name)
                os.rename(new, target)
            except BaseException:
                new.unlink(missing_ok=True)
                raise
            # The name is durable once the file is synced under it; the directory too, on a local disk.
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        directory = os.open(target.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(directory)
        finally:
            os.close(directory)
        return f"written from {source.name}"

    def remove(self, known: Known) -> str:
        if self.storage is not None:
            self.storage.delete(known.name)
        elif not self.writable:
            return super().remove(known)
        else:
            self._path(known.name).unlink(missing_ok=True)
        return "removed"


class HttpCopy(Copy):
    """Files below an address, read without regard to proxy settings. Never written to."""

    def __init__(self, name: str, address: str) -> None:
        if urllib.parse.urlsplit(address).scheme not in {"http", "https"}:
            raise ImproperlyConfigured(f"the copy {name} needs an http or https address, not {address!r}")
        self.name, self.address = name, address.rstrip("/") + "/"
        self._opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))

    def _request(self, method: str, name: str) -> Any:
        url = self.address + urllib.parse.quote(name)
        request = urllib.request.Request(url, method=method, headers={"Accept-Encoding": "identity"})  # noqa: S310
        try:
            return self._opener.open(request, timeout=HTTP_TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in {404, 410}:
                raise FileNotFoundError(errno.ENOENT, f"{url}: {error.code}") from error
            raise OSError(errno.EIO, f"{url}: {error.code} {error.reason}") from error

    def check(self) -> None:
        with contextlib.suppress(FileNotFoundError):
            try:
                self._request("HEAD", "").close()
            except OSError as error:
                if isinstance(error, urllib.error.URLError):  # an answer of any kind is an answer
                    raise

    def exists(self, name: str) -> bool:
        try:
            self._request("HEAD", name).close()
        except FileNotFoundError:
            return False
        return True

    def chunks(self, name: str) -> Iterator[bytes]:
        with self._request("GET", name) as answer:
            while chunk := answer.read(CHUNK):
                yield chunk


class HostCopy(Copy):
    """A media host of a storage, over the storage's own transport; written to through the outbox."""

    def __init__(self, storage: Any, host: str) -> None:
        self.name, self.storage, self.host = host, storage, host

    def check(self) -> None:
        self.storage.transport.exists(self.host, names.new_token(), self.storage.deadline())

    def exists(self, name: str) -> bool:
        return bool(self.storage.transport.exists(self.host, name, self.storage.deadline()))

    def chunks(self, name: str) -> Iterator[bytes]:
        if not self.exists(name):
            raise FileNotFoundError(errno.ENOENT, f"{self.host} does not have {name}")
        size = self.storage.transport.size(self.host, name, self.storage.deadline())
        body = self.storage.transport.content(self.host, name, self.storage.deadline(size))
        try:
            while chunk := body.read(CHUNK):
                yield chunk
        finally:
            body.close()

    def put(self, known: Known, source: Copy) -> str:  # noqa: ARG002  the worker chooses the source
        from tribrick.models import Outbox
        from tribrick.outbox import add_put

        waiting = Outbox.objects.using(catalog.database()).filter(host=self.host, name=known.name, done=None)
        if not waiting.exists():
            add_put(StoredFile(known.name, known.sha256, known.size), [self.host])
        return "put into the outbox"

    def remove(self, known: Known) -> str:
        from tribrick.outbox import add_delete

        add_delete(known.name, [self.host])
        return "put into the outbox"


class OpenedCopy(Copy):
    """A storage that has neither a directory nor hosts that we know: what it opens is what it has."""

    def __init__(self, name: str, storage: Any) -> None:
        self.name, self.storage = name, storage

    def exists(self, name: str) -> bool:
        return bool(self.storage.exists(name))

    def chunks(self, name: str) -> Iterator[bytes]:
        with self.storage.open(name, "rb") as file:
            yield from file.chunks(CHUNK)

    def remove(self, known: Known) -> str:
        self.storage.delete(known.name)
        return "removed"


def copies(alias: str = "default") -> list[Copy]:
    """Return the storage *alias* itself (``storage``), its media hosts, and ``TRIBRICK["COPIES"]``."""
    storage = storages[alias]
    hosts = list(getattr(storage, "hosts", ()))
    found: list[Copy] = []
    if isinstance(storage, FileSystemStorage):
        found.append(PathCopy("storage", storage.location, writable=True, storage=storage))
    elif not hosts:
        found.append(OpenedCopy("storage", storage))
    found += [HostCopy(storage, host) for host in hosts]
    for entry in setting("COPIES"):
        if entry.get("storage", "default") != alias:
            continue
        unknown = set(entry) - {"name", "kind", "address", "writable", "storage"}
        if unknown or not {"name", "kind", "address"} <= set(entry):
            raise ImproperlyConfigured(f'TRIBRICK["COPIES"]: {entry!r} needs name, kind and address')
        if entry["kind"] == "path":
            found.append(PathCopy(entry["name"], entry["address"], writable=bool(entry.get("writable"))))
        elif entry["kind"] == "http":
            found.append(HttpCopy(entry["name"], entry["address"]))
        else:
            raise ImproperlyConfigured(f'TRIBRICK["COPIES"]: the kind of {entry["name"]} is path or http')
    if len({copy.name for copy in found}) != len(found):
        raise ImproperlyConfigured('TRIBRICK["COPIES"]: two copies have the same name')
    return found


# What is known


class CatalogSource:
    """The catalog in the database."""

    def __init__(self, alias: str) -> None:
        self.alias = alias

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
        found = {known.name: known for known in self._known(rows)}
        changes = Change.objects.using(catalog.database()).filter(name__in=set(listed) - set(found))
        for change in changes.filter(kind=Kind.DELETED):
            found[change.name] = Known(change.name, State.PURGED, self.alias, change.sha256, change.size)
        return found

    def sample(self, count: int) -> list[Known]:
        """Return *count* stored files at random."""
        return self._known(self._rows().filter(state=State.STORED).order_by("?")[:count])


class LedgerSource:
    """The ledger of this node."""

    def __init__(self, alias: str, ledger: Ledger) -> None:
        self.alias, self.ledger = alias, ledger

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
        return {known.name: known for known in found}

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
    try:
        if known.state != "stored":
            there = copy.exists(known.name)
            return (Finding(copy.name, "dead", known.name, "was deleted") if there else None), 0
        seen = _look(copy.chunks(known.name))
    except FileNotFoundError:
        return Finding(copy.name, "missing", known.name), 0
    except OSError as error:
        return Finding(copy.name, "unreadable", known.name, str(error)), 0
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
        try:
            copy.check()
        except OSError as error:
            self.report.away[copy.name] = str(error)
            return False
        return True

    def _files(self, there: Sequence[Copy]) -> None:
        total = self.source.total()
        while page := self.source.page(self.report.after):
            self._examine(page, there, total)
            self.report.after = page[-1].name
            self._save()

    def _examine(self, files: Sequence[Known], there: Sequence[Copy], total: int) -> None:
        for known in files:
            for copy in there:
                finding, read = examine(copy, known)
                self.report.read += read
                if finding and self.source.get([known.name]).get(known.name) == known:  # not deleted meanwhile
                    self.report.findings.append(finding)
            self.report.checked += 1
            self.progress("files", self.report.checked, total)

    def _walk(self, copy: Copy) -> None:
        met = 0
        for batch in _batches(copy.walk() or ()):
            known = self.source.get(found.name for found in batch)
            for found in batch:
                if found.name in known:
                    continue  # alive or dead, it was examined by name
                if time.time() - found.changed < YOUNG.total_seconds():
                    self.report.young += 1
                else:
                    ours = is_own(found.name) or _is_temporary(found.name)
                    note = "made by our code" if ours else "foreign"
                    self.report.findings.append(Finding(copy.name, "extra", found.name, note))
            met += len(batch)
            self.progress(copy.name, met, met)

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
            state["away"] = {}
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


def _batches(walked: Iterable[Found]) -> Iterator[list[Found]]:
    iterator = iter(walked)
    while batch := list(islice(iterator, PAGE)):
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
    by_name = {copy.name: copy for copy in every}
    for finding in findings:
        if finding.kind == "extra":
            yield Repair(finding, False, "left alone: adopt takes it into the catalog, sweep takes our own away")
            continue
        copy = by_name[finding.copy]
        known = source.get([finding.name]).get(finding.name)
        if known is None or examine(copy, known)[0] is None:
            yield Repair(finding, True, "in order by now")
            continue
        try:
            yield Repair(finding, True, _mend(copy, known, source, every, apply))
        except (AuditError, OSError) as error:
            yield Repair(finding, False, str(error))


def _mend(copy: Copy, known: Known, source: Source, every: Sequence[Copy], apply: bool) -> str:
    if known.state != "stored":
        return copy.remove(known) if apply else "to be removed"
    for other in every:
        if other.name == copy.name:
            continue
        try:
            seen = _look(other.chunks(known.name))
        except OSError:
            continue
        if (seen.sha256, seen.size) == (known.sha256, known.size):
            if isinstance(copy, PathCopy) and not copy.writable:
                raise AuditError(f"{copy.name}: {copy.why_not}; {other.name} has the bytes")
            if not apply:
                return f"to be written from {other.name}"
            done = copy.put(known, other)
            now = source.get([known.name]).get(known.name)
            if now is not None and now.state != "stored":  # deleted while we wrote: it must not come back
                copy.remove(now)
                return "deleted meanwhile, removed again"
            return done
    raise AuditError("no copy has the bytes")


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
                add_put(StoredFile(known.name, known.sha256, known.size), [host])
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
    copy = _storage_copy(alias)
    limit = settled_before().timestamp()
    source, found = CatalogSource(alias), Strays()
    for batch in _batches(copy.walk()):
        known = source.get(one.name for one in batch)
        for one in batch:
            found.seen += 1
            if one.name in known:
                if known[one.name].state != "stored":
                    found.dead.append(known[one.name])
            elif _is_temporary(one.name):
                if one.changed < limit:
                    found.rests.append(one)
            elif not is_own(one.name, alias):
                found.foreign.append(one)
            elif one.changed < limit:
                found.own.append(one)
            else:
                found.young += 1
        progress("files", found.seen, found.seen)
    return found


def _storage_copy(alias: str) -> PathCopy:
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
    _ask_ledger(doomed)
    copy, source = _storage_copy(alias), CatalogSource(alias)
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


def _ask_ledger(doomed: Sequence[Found]) -> None:
    path = setting("LEDGER")
    if not path or not Path(path).exists():
        return
    with Ledger(path) as ledger:
        for one in doomed:
            known = ledger.get(one.name)
            if known is not None and known.state == "stored":
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
        for directory, _directories, files in os.walk(day, topdown=False):
            for name in files:
                os.unlink(os.path.join(directory, name))
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
    copy = _storage_copy(alias)
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
        yield Adopted(one.name, refused)


def _adopt_one(copy: PathCopy, one: Found, alias: str, apply: bool, owner: Any) -> None:
    seen = _look(copy.chunks(one.name))
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
