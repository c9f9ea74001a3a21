"""The storage for a ``MEDIA_ROOT`` on a shared mount."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import logging
import os
import stat
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, Final, TypeVar, cast

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files import File
from django.core.files.storage import FileSystemStorage
from django.utils.deconstruct import deconstructible
from django.utils.timezone import make_naive

from tribrick import names
from tribrick.conf import setting
from tribrick.errors import StorageUnavailable, translate
from tribrick.sentinel import Sentinel

log = logging.getLogger("tribrick.storage")
CHUNK: Final = 1024 * 1024
_ROOT_FLAGS: Final = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY
T = TypeVar("T")


@dataclass(frozen=True)
class StoredFile:
    """What was stored: its name in the storage, the SHA-256 of its bytes (hex), its size."""

    name: str
    sha256: str
    size: int


@deconstructible(path="tribrick.storage.VolumeStorage")
class VolumeStorage(FileSystemStorage):
    """Files on a shared mount: unique immutable names, durable before ``save`` returns.

    Every call opens the root, checks the sentinel there, and works relative to that descriptor, so
    what was checked and what is written are the same file system even if the mount goes away in
    between.

    A file is created under its final name (``O_EXCL``), written, fsynced and closed. That is one of
    the two forms that survive a power cut of all bricks, and the faster one. A reader cannot meet
    the unfinished file: its name holds 100 random bits and is told to nobody before ``save``
    returns. When anything fails, the file is removed again.

    Options (``STORAGES["default"]["OPTIONS"]``) are those of ``FileSystemStorage`` plus
    ``sentinel_id``, ``hash_levels`` and ``hash_width``; what is not given is read from
    ``settings.TRIBRICK`` when needed.

    Raises ``StorageUnavailable`` when the volume is away, ``StorageFull`` when it has no space.
    """

    def __init__(
        self,
        location: str | os.PathLike[str] | None = None,
        base_url: str | None = None,
        file_permissions_mode: int | None = None,
        directory_permissions_mode: int | None = None,
        *,
        sentinel_id: str | bool | None = None,
        hash_levels: int | None = None,
        hash_width: int | None = None,
    ) -> None:
        super().__init__(
            location=os.fspath(location) if location is not None else None,
            base_url=base_url,
            file_permissions_mode=file_permissions_mode,
            directory_permissions_mode=directory_permissions_mode,
        )
        self._sentinel_id = sentinel_id
        self._hash_levels = hash_levels
        self._hash_width = hash_width
        self._sentinel: Sentinel | None = None

    # Settings, read when needed.

    @property
    def hash_levels(self) -> int:
        """Number of hash directories between directory and file."""
        return int(self._hash_levels if self._hash_levels is not None else setting("HASH_LEVELS"))

    @property
    def hash_width(self) -> int:
        """Hexadecimal digits in the name of one hash directory."""
        return int(self._hash_width if self._hash_width is not None else setting("HASH_WIDTH"))

    def _expected_sentinel(self) -> Sentinel | None:
        wanted = self._sentinel_id if self._sentinel_id is not None else setting("SENTINEL_ID")
        name = setting("SENTINEL_NAME")
        if wanted is False:
            return None
        if not isinstance(wanted, str) or not wanted:
            raise ImproperlyConfigured(
                'TRIBRICK["SENTINEL_ID"] is not set. Give the id written in the volume\'s '
                f"{name}, or False if MEDIA_ROOT is a plain directory."
            )
        known = self._sentinel
        if known is None or (known.name, known.expected_id) != (name, wanted):
            known = self._sentinel = Sentinel(name, wanted)
        return known

    # The root and its errors.

    @contextlib.contextmanager
    def _root(self, *, reread: bool = False) -> Iterator[int]:
        """Open the root and check that it is the volume's."""
        sentinel = self._expected_sentinel()
        location = str(self.location)
        try:
            root = os.open(location, _ROOT_FLAGS)
        except OSError as error:
            if error.errno == errno.ESTALE:
                raise
            raise StorageUnavailable(
                error.errno, f"the media root {location} cannot be opened: {error.strerror}"
            ) from error
        try:
            if sentinel is not None:
                sentinel.check(root, location, reread=reread)
            yield root
        finally:
            os.close(root)

    def _on_volume(self, work: Callable[[int], T], *, reread: bool = False) -> T:
        """Run *work* with the checked root's descriptor; once more after ``ESTALE``."""
        try:
            try:
                with self._root(reread=reread) as root:
                    return work(root)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
            with self._root(reread=reread) as root:
                return work(root)
        except OSError as error:
            translated = translate(error)
            if translated is error:
                raise
            raise translated from error

    def _relative(self, name: str) -> str:
        """Return *name* as a path relative to the root; refuse what leads out of the tree."""
        if "\0" in name:
            raise SuspiciousFileOperation("a stored name cannot hold NUL")
        relative = os.path.relpath(self.path(name), str(self.location))
        if relative.startswith("."):
            raise SuspiciousFileOperation(f"{name!r} is not a stored file's name")
        return relative

    def verify(self) -> str:
        """Read the sentinel again and return a sentence; for health checks."""
        self._on_volume(lambda _root: None, reread=True)
        return f"{self.location} is the media volume"

    # Names.

    def get_valid_name(self, name: str) -> str:
        """Return the client's file name as a safe ASCII name."""
        return names.safe_name(name)

    def is_name_available(self, name: str, max_length: int | None = None) -> bool:
        """Never ask the disk: names from :meth:`get_available_name` are unique."""
        return not (max_length and len(name) > max_length)

    def get_available_name(self, name: str, max_length: int | None = None) -> str:
        """Return a new unique name for ``<dir>/<file name>``."""
        return names.unique_name(str(name), levels=self.hash_levels, width=self.hash_width, max_length=max_length)

    # Writing.

    def store(self, content: IO[Any] | File[Any], name: str, max_length: int | None = None) -> StoredFile:
        """Store *content* under a new unique name made from *name*, and say what was stored.

        The same as ``save``, which can only return the name.
        """
        file = content if hasattr(content, "chunks") else File(content, name)
        return self._write(self.get_available_name(name, max_length), cast("File[Any]", file))

    def _save(self, name: str, content: File[Any]) -> str:
        return self._write(name, content).name

    def _write(self, name: str, content: File[Any]) -> StoredFile:
        relative = self._relative(name)
        attempts = 0

        def write(root: int) -> StoredFile:
            nonlocal attempts, relative
            attempts += 1
            if attempts > 1:  # after ESTALE: another name, since the first may exist unseen
                if not source.seekable():
                    raise StorageUnavailable(errno.ESTALE, "the media volume changed while a stream was being stored")
                relative = self._relative(self.get_available_name(name))
            digest, size = self._write_at(root, relative, source)
            return StoredFile(relative.replace(os.sep, "/"), digest, size)

        with _readable(content) as source:
            return self._on_volume(write)

    def _write_at(self, root: int, relative: str, source: File[Any]) -> tuple[str, int]:
        descriptor = self._create(root, relative)
        try:
            try:
                hasher, size = hashlib.sha256(), 0
                for chunk in source.chunks(CHUNK):
                    data = chunk.encode() if isinstance(chunk, str) else chunk
                    hasher.update(data)
                    _write_all(descriptor, data)
                    size += len(data)
                self._set_mode(descriptor)
                os.fsync(descriptor)
            except BaseException:
                with contextlib.suppress(OSError):
                    os.close(descriptor)
                raise
            os.close(descriptor)
        except BaseException:
            self._discard(root, relative)
            raise
        return hasher.hexdigest(), size

    def _create(self, root: int, relative: str) -> int:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        mode = self.file_permissions_mode
        mode = 0o666 if mode is None else mode
        try:
            return os.open(relative, flags, mode, dir_fd=root)
        except FileNotFoundError:
            self._make_directories(root, os.path.dirname(relative))
            return os.open(relative, flags, mode, dir_fd=root)

    def _make_directories(self, root: int, relative: str) -> None:
        """Make what is missing. The kit provisions directories, so this is for other sites."""
        mode = self.directory_permissions_mode
        made = ""
        for part in Path(relative).parts:
            made = os.path.join(made, part)
            with contextlib.suppress(FileExistsError):
                os.mkdir(made, 0o777 if mode is None else mode, dir_fd=root)
                if mode is not None:
                    os.chmod(made, mode, dir_fd=root)

    def _set_mode(self, descriptor: int) -> None:
        """Undo the umask where it took something away; no call to the volume otherwise."""
        mode = self.file_permissions_mode
        if mode is not None and stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
            os.fchmod(descriptor, mode)

    def _discard(self, root: int, relative: str) -> None:
        """Remove the file of a failed save. The name is known to nobody, so a rest is harmless."""
        try:
            os.unlink(relative, dir_fd=root)
        except FileNotFoundError:
            pass
        except OSError as error:
            log.warning("a failed save left %s behind: %s", relative, error)

    def delete(self, name: str) -> None:
        """Remove a file; one that is gone already is no error."""
        if not name:
            raise ValueError("The name must be given to delete().")
        relative = self._relative(name)

        def unlink(root: int) -> None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(relative, dir_fd=root)

        self._on_volume(unlink)

    # Reading.

    def _open(self, name: str, mode: str = "rb") -> File[Any]:
        if set(mode) - set("rbt"):
            raise io.UnsupportedOperation(f"mode {mode!r}: stored files are never changed; save a new one")
        relative = self._relative(name)

        def opened(root: int) -> IO[Any]:
            return open(
                self.path(name),
                mode,
                opener=lambda _path, flags: os.open(relative, flags | os.O_NOFOLLOW, dir_fd=root),
            )

        return File(self._on_volume(opened), name)

    def _stat(self, name: str) -> os.stat_result:
        relative = self._relative(name)
        return self._on_volume(lambda root: os.stat(relative, dir_fd=root, follow_symlinks=False))

    def exists(self, name: str) -> bool:
        """Ask the disk. An absent volume is an exception, not a no."""
        try:
            self._stat(name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def size(self, name: str) -> int:
        """Return the size in bytes."""
        return self._stat(name).st_size

    def listdir(self, path: str) -> tuple[list[str], list[str]]:
        """Return directories and files below *path*, without the root's dot names."""
        relative = self._relative(path) if path.strip("/.") else "."

        def listed(root: int) -> tuple[list[str], list[str]]:
            directories: list[str] = []
            files: list[str] = []
            descriptor = os.open(relative, os.O_RDONLY | os.O_DIRECTORY, dir_fd=root)
            try:
                with os.scandir(descriptor) as entries:
                    for entry in entries:
                        if relative == "." and entry.name.startswith("."):
                            continue
                        (directories if entry.is_dir() else files).append(entry.name)
            finally:
                os.close(descriptor)
            return directories, files

        return self._on_volume(listed)

    @staticmethod
    def _time(seconds: float) -> datetime:
        aware = datetime.fromtimestamp(seconds, tz=timezone.utc)
        return aware if settings.USE_TZ else make_naive(aware)

    def get_accessed_time(self, name: str) -> datetime:
        """Return the time of the last access."""
        return self._time(self._stat(name).st_atime)

    def get_created_time(self, name: str) -> datetime:
        """Return the time of the last change of the inode."""
        return self._time(self._stat(name).st_ctime)

    def get_modified_time(self, name: str) -> datetime:
        """Return the time of the last write."""
        return self._time(self._stat(name).st_mtime)


def _write_all(descriptor: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view) :]


@contextlib.contextmanager
def _readable(content: File[Any]) -> Iterator[File[Any]]:
    """Yield *content* ready to be read from its start; open it again if it was closed.

    Only a file that really lies at an absolute path is opened again: the ``name`` of an upload is
    the client's word and is never used as a path.
    """
    if not content.closed:
        yield content
        return
    if hasattr(content, "storage"):  # the file of a model's field: its storage knows the way
        yield content.open("rb")
        content.close()
        return
    path = getattr(content.file, "name", None)
    if isinstance(path, str) and os.path.isabs(path) and os.path.isfile(path):
        with open(path, "rb") as again:
            yield File(again, content.name)
        return
    raise ValueError("the content is closed and cannot be opened again")
