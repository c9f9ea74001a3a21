"""The storage that keeps a file here and brings it to all media hosts before it answers."""

from __future__ import annotations

import contextlib
import hashlib
import io
import os
from collections.abc import Callable, Iterator, Sequence
from datetime import datetime
from typing import IO, Any, cast

from django.core.files import File
from django.utils.deconstruct import deconstructible

from tribrick.sentinel import HISTORY
from tribrick.storage.base_remote import RemoteStorage, log
from tribrick.storage.transport import CHUNK, Body, opener_of
from tribrick.storage.volume import StoredFile, VolumeStorage


@deconstructible(path="tribrick.storage.HybridStorage")
class HybridStorage(RemoteStorage, VolumeStorage):
    """Files in a local directory and on media hosts: local first, then PUT to all in parallel.

    A save returns when the local copy is durable and ``write_quorum`` hosts have confirmed it. The
    others get the file from the outbox; without one, all must confirm. Reads are local, and go to
    the hosts for what is not here. Do not list a host whose files are this very directory.

    The local directory needs no sentinel unless *sentinel_id* gives one.
    """

    spools = False

    def __init__(
        self,
        hosts: Sequence[str] | None = None,
        base_url: str | None = None,
        transport: Any = None,
        *,
        write_quorum: int | str | None = None,
        fatal_exceptions: bool | None = None,
        show_traceback: bool | None = None,
        timeout: float | None = None,
        location: str | os.PathLike[str] | None = None,
        sentinel_id: str | bool = False,
        **options: Any,
    ) -> None:
        VolumeStorage.__init__(self, location=location, base_url=base_url, sentinel_id=sentinel_id, **options)
        self._set_remote(hosts, transport, write_quorum, fatal_exceptions, show_traceback, timeout)

    # Writing.

    def store(self, content: IO[Any] | File[Any], name: str, max_length: int | None = None) -> StoredFile:
        """Store *content* under a new unique name and say what was stored; for ``tribrick.catalog.add``."""
        file = content if hasattr(content, "chunks") else File(content, name)
        return self._keep(self.get_available_name(name, max_length), cast("File[Any]", file), None)

    def _save(self, name: str, content: File[Any]) -> str:
        return self._keep(name, content, content).name

    def _keep(self, name: str, content: File[Any], described: File[Any] | None) -> StoredFile:
        self._intend(name, _size_of(content))
        try:
            stored = VolumeStorage._write(self, name, content)
        except BaseException:
            self._forget(name)  # nothing is left, or what sweep finds
            raise
        try:
            self._sync_directories(stored.name)
            with self._local(stored.name) as descriptor:
                body = Body(stored.size, stored.sha256, opener_of(descriptor, stored.size))
        except BaseException:
            self._unlink(stored.name)
            self._forget(name)
            raise
        self._replicate(stored, body, described, local=True)
        return stored

    def _sync_directories(self, name: str) -> None:
        """Make the name durable: on a local disk that is a matter of its directories."""
        directory = os.path.dirname(name)
        while True:
            _sync(self.path(directory) if directory else self.location)
            if not directory:
                return
            directory = os.path.dirname(directory)

    def _name_after_stale(self, name: str) -> str:
        new = super()._name_after_stale(name)
        self._intend(new)
        return new

    def _undone(self, name: str, results: Any, size: int) -> bool:
        try:
            done = super()._undone(name, results, size)
        finally:
            self._unlink(name)
        return done

    def _delete_bytes(self, name: str, *, catalogued: bool) -> None:
        if not (catalogued and self._is_changed(name)):
            self._unlink(name)
            # Also where it was gone: who unlinked it may have been killed. No list of deleted names hides it here.
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                _sync(os.path.dirname(self.path(name)))
        super()._delete_bytes(name, catalogued=catalogued)

    def _is_changed(self, name: str) -> bool:
        """Whether a catalogued file has other bytes, on a site that reconciles direct changes.

        They are somebody's only copy, and ``tribrick sync`` looks after them: see the receiver's DELETE.
        """
        row = self._row(name) if os.path.isdir(self.path(HISTORY)) else None
        if row is None:
            return False
        try:
            with self._local(name) as descriptor:
                changed = _sha256(opener_of(descriptor, os.fstat(descriptor).st_size)) != row.sha256
        except (FileNotFoundError, NotADirectoryError):
            return False
        if changed:
            log.warning("%s is deleted, but was changed here directly: it is left to the reconciliation", name)
        return changed

    # Reading.

    def _open(self, name: str, mode: str = "rb") -> File[Any]:
        if set(mode) - set("rbt"):
            raise io.UnsupportedOperation(f"mode {mode!r}: stored files are never changed; save a new one")
        self._living(name)
        try:
            return VolumeStorage._open(self, name, mode)
        except (FileNotFoundError, NotADirectoryError):
            file: IO[Any] = self._download(name)
        return File(file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8"), name)

    def exists(self, name: str) -> bool:
        """Ask the catalog, and about what it does not know the disk, then the hosts."""
        row = self._row(self._canonical(name))
        if row is not None:
            return row.state == "stored"
        return VolumeStorage.exists(self, name) or self._exists_remotely(name)

    def size(self, name: str) -> int:
        """Return the size in bytes."""
        self._living(name)
        try:
            return VolumeStorage.size(self, name)
        except (FileNotFoundError, NotADirectoryError):
            return self._size_remotely(name)

    def listdir(self, path: str) -> tuple[list[str], list[str]]:
        """Return directories and files below *path*, as the catalog knows them; without it, those here."""
        return self._listed(path) if self.has_outbox else VolumeStorage.listdir(self, path)

    def get_created_time(self, name: str) -> datetime:
        """Return the time of the save."""
        return self._created(name) if self._living(name) else VolumeStorage.get_created_time(self, name)

    def get_modified_time(self, name: str) -> datetime:
        """Return the time of the save: stored files never change."""
        return self._created(name) if self._living(name) else VolumeStorage.get_modified_time(self, name)

    @contextlib.contextmanager
    def source(self, name: str, *, besides: str | None = None) -> Iterator[Body]:
        """Yield the bytes of a stored file: from here, or from a host that has it."""
        with contextlib.ExitStack() as stack:
            try:
                descriptor = stack.enter_context(self._local(name))
            except (FileNotFoundError, NotADirectoryError):
                body = stack.enter_context(super().source(name, besides=besides))
            else:
                size = os.fstat(descriptor).st_size
                opener = opener_of(descriptor, size)
                body = Body(size, _sha256(opener), opener)
            yield body

    @contextlib.contextmanager
    def _local(self, name: str) -> Iterator[int]:
        descriptor = os.open(self.path(name), os.O_RDONLY | os.O_NOFOLLOW)
        try:
            yield descriptor
        finally:
            os.close(descriptor)


def _sync(directory: str | os.PathLike[str]) -> None:
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _sha256(opener: Callable[[], Any]) -> str:
    hasher = hashlib.sha256()
    with opener() as file:
        while chunk := file.read(CHUNK):
            hasher.update(chunk)
    return hasher.hexdigest()


def _size_of(content: File[Any]) -> int | None:
    """Return the size of an upload where that is known beforehand."""
    try:
        return int(content.size)
    except (AttributeError, TypeError, ValueError, OSError):
        return None
