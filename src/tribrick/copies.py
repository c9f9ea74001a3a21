"""The places that should hold the files: the storage, its media hosts, and ``TRIBRICK["COPIES"]``."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import http.client
import os
import secrets
import stat
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.core.files.storage import FileSystemStorage, storages

from tribrick import catalog, names
from tribrick.conf import setting
from tribrick.ledger import Known
from tribrick.storage.catalogued import below as places_below
from tribrick.storage.saving import TEMPORARY, temporary_beside
from tribrick.storage.volume import StoredFile

CHUNK: Final = 1024 * 1024
HTTP_TIMEOUT: Final = 10.0
QUARANTINE: Final = ".tribrick-quarantine"
_TAIL: Final = 4096


class AuditError(Exception):
    """The comparison or the repair cannot go on; nothing was changed by the last step."""


class CopyAway(OSError):
    """The whole copy cannot be reached, so nothing is said of its files."""


@dataclass(frozen=True)
class Seen:
    """The bytes found under a name."""

    sha256: str
    size: int
    zero_tail: bool  # the last block holds zeros only, as after a write that never reached the disk


def look_at(chunks: Iterable[bytes]) -> Seen:
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
    batched: bool = False
    """Whether it is asked about many files at once. Then ``CopyAway`` may end every question."""
    readable: bool = True
    """Whether it gives bytes, not only their hashes."""
    writable: bool = False

    def check(self) -> None:
        """Raise ``OSError`` unless the copy is there."""

    def exists(self, name: str) -> bool:
        """Whether there is anything under *name*."""
        raise NotImplementedError

    def chunks(self, name: str) -> Iterator[bytes]:
        """Yield the bytes."""
        raise NotImplementedError

    def look(self, wanted: Sequence[Known]) -> Iterator[Seen | OSError]:
        """Yield for each file, in order, what is under its name, or why that cannot be said."""
        for known in wanted:
            try:
                yield look_at(self.chunks(known.name))
            except OSError as error:
                yield error

    def walk(self) -> Iterator[Found] | None:
        """Yield every file; None where that cannot be asked."""
        return None

    @contextlib.contextmanager
    def at_hand(self, wanted: Sequence[Known]) -> Iterator[Copy]:  # noqa: ARG002
        """Yield a copy from which ``chunks`` gives these files without asking far away for each."""
        yield self

    def put(self, known: Known, source: Copy) -> str:  # noqa: ARG002
        """Make the file from *source*; return what was done. ``AuditError`` where that cannot be."""
        raise AuditError(f"{self.name}: {self.why_not}")

    def put_all(self, wanted: Sequence[Known], source: Copy) -> Iterator[str | Exception]:
        """Do :meth:`put` for many; yield what was done, or why not, in order."""
        for known in wanted:
            yield _said(self.put, known, source)

    def remove(self, known: Known) -> str:  # noqa: ARG002
        """Remove a deleted file; return what was done."""
        raise AuditError(f"{self.name}: {self.why_not}")

    def remove_all(self, wanted: Sequence[Known]) -> Iterator[str | Exception]:
        """Do :meth:`remove` for many; yield what was done, or why not, in order."""
        for known in wanted:
            yield _said(self.remove, known)


def _said(do: Callable[..., str], *arguments: Any) -> str | Exception:
    try:
        return do(*arguments)
    except (AuditError, OSError) as error:
        return error


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
        others = places_below(self.storage)
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
                    if name not in others:
                        below.append(name)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    changed = max(status.st_mtime, status.st_ctime)
                    yield Found(name, status.st_size, changed, status.st_mtime)
            waiting.extend(reversed(below))

    def quarantine(self, name: str, *, keep: bool = False) -> None:
        """Move a file to the quarantine of today. Same file system, so no bytes are copied.

        With *keep* it keeps its name too, where that can be.
        """
        today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        area = self.root / QUARANTINE
        area.mkdir(mode=0o700, exist_ok=True)
        target = area / today / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if os.path.lexists(target):
            target = target.with_name(f"{target.name}.{secrets.token_hex(4)}")
        if keep:
            with contextlib.suppress(OSError):  # another's file, or a file system without hard links
                os.link(self._path(name), target, follow_symlinks=False)
                return
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
                self.check()  # unmounted meanwhile? Then this is another disk
                if os.path.lexists(target):
                    if target.is_dir() and not target.is_symlink():
                        raise AuditError(f"{self.name}: {known.name} is a directory; move it away")
                    # Killed here, the name must not be without a file: `sync` would take that for a deletion.
                    self.quarantine(known.name, keep=True)
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
            try:
                while chunk := answer.read(CHUNK):
                    yield chunk
            except http.client.HTTPException as error:
                raise OSError(errno.EIO, f"{self.address}: {error!r}") from error
            if answer.length:
                raise OSError(errno.EIO, f"{self.address}: the answer broke off")


class HostCopy(Copy):
    """A media host of a storage, over the storage's own transport; written to through the outbox."""

    writable = True

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
            alias = self.storage.alias or ""
            add_put(StoredFile(known.name, known.sha256, known.size), [self.host], storage=alias)
        return "put into the outbox"

    def remove(self, known: Known) -> str:
        from tribrick.outbox import add_delete

        add_delete(known.name, [self.host], storage=self.storage.alias or "")
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
        if entry.get("storage", "default") == alias:
            found.append(_configured(entry))
    if len({copy.name for copy in found}) != len(found):
        raise ImproperlyConfigured('TRIBRICK["COPIES"]: two copies have the same name')
    return found


def _configured(entry: Mapping[str, Any]) -> Copy:
    from tribrick import far_copies

    if not {"name", "kind", "address"} <= set(entry):
        raise ImproperlyConfigured(f'TRIBRICK["COPIES"]: {dict(entry)!r} needs name, kind and address')
    name, kind, address = str(entry["name"]), entry["kind"], str(entry["address"])
    allowed = {
        "path": {"writable"},
        "http": set(),
        "hashes": set(),
        "ssh": {"writable", "port", "identity", "known_hosts"},
    }
    if kind not in allowed:
        raise ImproperlyConfigured(f'TRIBRICK["COPIES"]: the kind of {name} is one of {", ".join(allowed)}')
    options = {key: value for key, value in entry.items() if key not in {"name", "kind", "address", "storage"}}
    if unknown := set(options) - allowed[kind]:
        raise ImproperlyConfigured(
            f'TRIBRICK["COPIES"]: {name}, of the kind {kind}, does not know {", ".join(sorted(unknown))}'
        )
    if kind == "path":
        return PathCopy(name, address, writable=bool(options.get("writable")))
    if kind == "http":
        return HttpCopy(name, address)
    if kind == "hashes":
        return far_copies.HashesCopy(name, address)
    return far_copies.SshCopy(name, address, **options)
