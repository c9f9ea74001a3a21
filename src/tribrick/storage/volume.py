"""The storage for a ``MEDIA_ROOT`` on a shared mount."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import IO, TYPE_CHECKING, Any, TypeAlias, TypeVar, cast

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files import File
from django.core.files.storage import FileSystemStorage
from django.utils.deconstruct import deconstructible
from django.utils.timezone import make_naive

from tribrick import names
from tribrick.conf import setting
from tribrick.errors import StorageUnavailable
from tribrick.sentinel import Sentinel
from tribrick.storage.catalogued import Catalogued, Commit
from tribrick.storage.guard import Call, guard_for
from tribrick.storage.mount import Mount
from tribrick.storage.opened import BUFFER, NewFile, OpenedFile, Reader, Writer
from tribrick.storage.saving import CHUNK, TEMPORARY, Saving

if TYPE_CHECKING:
    from tribrick.storage.spool import SpoolStorage

log = logging.getLogger("tribrick.storage")
Piece: TypeAlias = bytes | memoryview
T = TypeVar("T")


@dataclass(frozen=True)
class StoredFile:
    """What was stored: its name in the storage, the SHA-256 of its bytes (hex), its size.

    *spooled* says that the volume refused it, and that it waits in the spools.
    """

    name: str
    sha256: str
    size: int
    spooled: bool = False


@deconstructible(path="tribrick.storage.VolumeStorage")
class VolumeStorage(Catalogued, FileSystemStorage):
    """Files on a shared mount: unique immutable names, durable before ``save`` returns.

    Every call opens the root, checks the sentinel there, and works relative to that descriptor, so
    what was checked and what is written are the same file system even if the mount goes away in
    between. Every call has a deadline, see :mod:`tribrick.storage.guard`.

    A file is created beside its name, written, renamed, fsynced and closed. That is one of the two
    forms that survive a power cut of all bricks. Nobody meets an unfinished file under its name, nor
    a mount that has seen one there. When anything fails, the file is removed again.

    Where the app ``tribrick`` is installed and the storage stands in ``STORAGES``, ``save`` writes the
    catalog's row in the caller's transaction, and ``delete`` the tombstone: the bytes go after the
    commit.

    With ``TRIBRICK["SPOOL"]`` an upload that the volume refuses goes to the spools, see
    :mod:`tribrick.storage.spool`.

    Options (``STORAGES["default"]["OPTIONS"]``) are those of ``FileSystemStorage`` plus
    ``sentinel_id``, ``hash_levels`` and ``hash_width``; what is not given is read from
    ``settings.TRIBRICK`` when needed.

    Raises ``StorageUnavailable`` when the volume is away or hangs, ``StorageFull`` when it has no space.
    """

    spools = True

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

    def expected_sentinel(self) -> Sentinel | None:
        """Return the sentinel that must lie in the root; None where none is asked."""
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

    @property
    def root(self) -> str:
        """The directory that holds the sentinel."""
        return str(self.location)

    def _mount(self) -> Mount:
        root = self.root
        deadline, outstanding = float(setting("DEADLINE")), int(setting("OUTSTANDING"))
        if not (deadline > 0 and outstanding > 0):
            raise ImproperlyConfigured('TRIBRICK["DEADLINE"] and ["OUTSTANDING"] must be greater than zero.')
        return Mount(
            location=root,
            sentinel=self.expected_sentinel(),
            guard=guard_for(root, outstanding),
            deadline=deadline,
            file_mode=self.file_permissions_mode,
            directory_mode=self.directory_permissions_mode,
            reserve=int(setting("RESERVE")),
        )

    def _spool(self) -> SpoolStorage | None:
        """Return the spool, if uploads go there; without rows nobody would know what is in it."""
        if not (self.spools and setting("SPOOL") and self.has_catalog):
            return None
        from tribrick.storage.spool import spool

        return spool()

    def check_settings(self) -> None:
        """Raise ``ImproperlyConfigured`` for settings with which no file could be stored. Touches no disk."""
        self._mount()
        if self.spools and setting("SPOOL"):
            from tribrick.storage.spool import spool

            place = os.path.abspath(spool().location)
            if os.path.commonpath([place, self.root]) in (place, self.root):
                raise ImproperlyConfigured(f'TRIBRICK["SPOOL"] is {place}, which is not apart from {self.root}.')

    def verify(self) -> str:
        """Read the sentinel again and return a sentence; for health checks."""
        self._mount().call(lambda _root: None, reread=True)
        return f"{self.root} is the media volume"

    # Names.

    def _relative(self, name: str) -> str:
        """Return *name* as a path relative to the root; refuse what leads out of the tree."""
        if "\0" in name:
            raise SuspiciousFileOperation("a stored name cannot hold NUL")
        relative = os.path.relpath(self.path(name), str(self.location))
        if relative.startswith("."):
            raise SuspiciousFileOperation(f"{name!r} is not a stored file's name")
        return os.path.join(self._prefix(), relative)

    def _prefix(self) -> str:
        """Where the location lies below the root; empty if they are the same."""
        return ""

    def _name(self, relative: str) -> str:
        return os.path.relpath(relative, self._prefix() or ".").replace(os.sep, "/")

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

        The same as ``save`` but for the catalog's row, which is left to ``tribrick.catalog.add``.
        """
        file = content if hasattr(content, "chunks") else File(content, name)
        return self._write(self.get_available_name(name, max_length), cast("File[Any]", file))

    def _save(self, name: str, content: File[Any]) -> str:
        stored = self._write(name, content)
        if self.has_catalog:
            self._enter(stored, content)
        return stored.name

    def _enter(self, stored: StoredFile, content: File[Any]) -> None:
        """Write the row of a stored file; remove the file if it certainly has none."""
        commit = Commit()
        try:
            with commit.watched():
                self._record(stored, content)
        except BaseException:
            if commit.unknown:
                log.error("unknown whether the row was committed; kept %s", stored.name)
            else:
                try:
                    self.discard(stored.name)
                except OSError as error:
                    log.warning("a failed save left %s behind: %s", stored.name, error)
            raise

    def _saving(self, mount: Mount, relative: str) -> Saving:
        """Return the form in which files are written."""
        return Saving(mount, relative)

    def _refuse_while_closed(self) -> None:
        """Refuse a new file while the operator holds uploads up: the site is between volume and own disks."""
        if self.catalogued and (mark := setting("CLOSED")) and os.path.lexists(mark):
            raise StorageUnavailable(errno.EROFS, "uploads are held up for a moment; try again", str(mark))

    def _write(self, name: str, content: File[Any]) -> StoredFile:
        self._refuse_while_closed()
        with _readable(content) as source:
            try:
                return self._write_here(name, source)
            except StorageUnavailable as error:
                if (spool := self._spool()) is None or not source.seekable():
                    raise
                # Another name: what hangs in the volume may still get there late, under the first one.
                return spool.keep(self.get_available_name(name), source, error)

    def _write_here(self, name: str, source: File[Any]) -> StoredFile:
        mount = self._mount()
        try:
            return self._write_once(self._saving(mount, self._relative(name)), source)
        except StorageUnavailable as error:
            if error.errno != errno.ESTALE:
                raise
            if not source.seekable():
                raise StorageUnavailable(
                    errno.ESTALE, "the media volume changed while a stream was being stored"
                ) from error
        again = self._name_after_stale(name)
        return self._write_once(self._saving(mount, self._relative(again)), source)

    def _name_after_stale(self, name: str) -> str:
        """Return another name, since the first may exist although its creation failed."""
        return self.get_available_name(name)

    def _write_once(self, saving: Saving, source: File[Any]) -> StoredFile:
        """Read the source here, and let workers write: none of them ever touches the source.

        A file of one piece is one call. A larger one is a call for each piece: its deadline is for
        progress, not for the whole.
        """
        hasher, size = hashlib.sha256(), 0
        call: Call[None] | None = None
        try:
            pieces = _pieces(source)
            piece = next(pieces, b"")
            while True:
                following = next(pieces, None)
                step = functools.partial(saving.step, data=piece, first=call is None, last=following is None)
                call = saving.mount.start(step, late=saving.give_up)
                hasher.update(piece)  # meanwhile
                saving.mount.result_of(call)
                size += len(piece)
                if following is None:
                    break
                piece = following
        except BaseException:
            if call is not None:
                call.abandon()
                if not (call.abandoned or call.failed):  # else the worker does it
                    saving.mount.clean_up(saving.give_up)
            raise
        saving.let_go()
        return StoredFile(self._name(saving.relative), hasher.hexdigest(), size)

    def _canonical(self, name: str) -> str:
        return self._name(self._relative(name))

    def discard(self, name: str) -> None:
        """Remove the bytes of a save that has failed, from where it has put them."""
        spool = self._spool()
        if spool is None or not spool.discarded(name):
            super().discard(name)

    def _delete_bytes(self, name: str, *, catalogued: bool) -> None:  # noqa: ARG002  others leave tasks
        if (spool := self._spool()) is not None:
            spool.forget(name)
        self._unlink(name)

    def _unlink(self, name: str) -> None:
        """Remove the file, if it is there."""
        relative = self._relative(name)

        def unlink(root: int) -> None:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(relative, dir_fd=root)

        self._mount().call(unlink, subject=relative)

    # Reading, and writing through a file object.

    def _open(self, name: str, mode: str = "rb") -> File[Any]:
        """Open a stored file for reading, or a new one (``w``, ``x``, ``w+``, ``x+``) that ``close`` publishes.

        Text is UTF-8. The file has no ``fileno``, which would lead around the deadline.
        """
        kind = "".join(sorted(set(mode) - set("bt")))
        if kind not in {"r", "w", "x", "+w", "+x"} or {"b", "t"} <= set(mode):
            raise io.UnsupportedOperation(f"mode {mode!r}: stored files are never changed; save a new one")
        if kind == "r":
            return OpenedFile(self._reader(name, mode), name, functools.partial(self._reader, name))
        self._refuse_while_closed()
        enter = None
        if self.has_catalog:
            name = self._canonical(name)
            if self._row(name, strict=True) is not None:
                raise FileExistsError(errno.EEXIST, "this name is taken or was deleted; save a new one", name)
            enter = self._enter_written
        raw = Writer(self._mount(), self._relative(name))
        buffered = io.BufferedRandom(raw, BUFFER) if "+" in mode else io.BufferedWriter(raw, BUFFER)
        return NewFile(raw, _as_text(buffered, mode), name, enter)

    def _enter_written(self, sha256: str, size: int, file: File[Any]) -> None:
        self._enter(StoredFile(str(file.name), sha256, size), file)

    def _reader(self, name: str, mode: str) -> IO[Any]:
        if set(mode) - set("rbt"):
            raise io.UnsupportedOperation(f"mode {mode!r}: stored files are never changed; save a new one")

        def opened(place: VolumeStorage) -> IO[bytes]:
            return io.BufferedReader(Reader(place._mount(), place._relative(name)), BUFFER)

        return _as_text(self._anywhere(name, opened, lambda spool: spool.fetch(name)), mode)

    def _anywhere(self, name: str, here: Callable[[VolumeStorage], T], elsewhere: Callable[[SpoolStorage], T]) -> T:
        """Ask the volume; with a spool that first, and in the end *elsewhere*: the spools of the other nodes."""
        spool = self._spool()
        return here(self) if spool is None else spool.ask(self._canonical(name), self, here, elsewhere)

    def _stat(self, name: str) -> os.stat_result:
        relative = self._relative(name)
        return self._mount().call(lambda root: os.stat(relative, dir_fd=root, follow_symlinks=False), subject=relative)

    def exists(self, name: str) -> bool:
        """Ask the disk. An absent volume is an exception, not a no."""
        try:
            self._anywhere(name, lambda place: place._stat(name), lambda spool: spool.row_of(name))
        except (FileNotFoundError, NotADirectoryError):
            return False
        return True

    def size(self, name: str) -> int:
        """Return the size in bytes."""
        return self._anywhere(name, lambda place: place._stat(name).st_size, lambda spool: spool.row_of(name).size)

    def listdir(self, path: str) -> tuple[list[str], list[str]]:
        """Return directories and files below *path*, without the top's dot names and unfinished files."""
        at_top = not path.strip("/.")
        relative = (self._prefix() or ".") if at_top else self._relative(path)

        def listed(root: int) -> tuple[list[str], list[str]]:
            directories: list[str] = []
            files: list[str] = []
            descriptor = os.open(relative, os.O_RDONLY | os.O_DIRECTORY, dir_fd=root)
            try:
                with os.scandir(descriptor) as entries:
                    for entry in entries:
                        if (at_top and entry.name.startswith(".")) or TEMPORARY.fullmatch(entry.name):
                            continue
                        (directories if entry.is_dir() else files).append(entry.name)
            finally:
                os.close(descriptor)
            return directories, files

        return self._mount().call(listed, subject=relative)

    @staticmethod
    def _time(seconds: float) -> datetime:
        aware = datetime.fromtimestamp(seconds, tz=timezone.utc)
        return aware if settings.USE_TZ else make_naive(aware)

    def _seconds(self, name: str, kind: str) -> float:
        return self._anywhere(
            name,
            lambda place: float(getattr(place._stat(name), kind)),
            lambda spool: spool.row_of(name).created.timestamp(),
        )

    def get_accessed_time(self, name: str) -> datetime:
        """Return the time of the last access."""
        return self._time(self._seconds(name, "st_atime"))

    def get_created_time(self, name: str) -> datetime:
        """Return the time of the last change of the inode."""
        return self._time(self._seconds(name, "st_ctime"))

    def get_modified_time(self, name: str) -> datetime:
        """Return the time of the last write."""
        return self._time(self._seconds(name, "st_mtime"))


def _pieces(source: File[Any]) -> Iterator[Piece]:
    """Yield the content in pieces of bytes that are not empty and not larger than ``CHUNK``."""
    for chunk in source.chunks(CHUNK):
        data = chunk.encode() if isinstance(chunk, str) else chunk
        if len(data) > CHUNK:
            view = memoryview(data)
            for start in range(0, len(view), CHUNK):
                yield view[start : start + CHUNK]
        elif data:
            yield data


def _as_text(buffered: Any, mode: str) -> IO[Any]:
    return cast("IO[Any]", buffered) if "b" in mode else io.TextIOWrapper(buffered, encoding="utf-8")


@contextlib.contextmanager
def _readable(content: File[Any]) -> Iterator[File[Any]]:
    """Yield *content* ready to be read from its start; open it again if it was closed.

    Only a file that really lies at an absolute path is opened again: the ``name`` of an upload is
    the client's word and is never used as a path.
    """
    if not content.closed:
        yield content
        return
    if hasattr(content, "storage") or isinstance(content, OpenedFile):  # its storage knows the way
        try:
            yield content.open("rb")
        finally:
            content.close()
        return
    path = getattr(content.file, "name", None)
    if isinstance(path, str) and os.path.isabs(path) and os.path.isfile(path):
        with open(path, "rb") as again:
            yield File(again, content.name)
        return
    raise ValueError("the content is closed and cannot be opened again")
