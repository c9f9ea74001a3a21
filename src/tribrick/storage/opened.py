"""Opened files of a volume: each access to the mount has the deadline of a call."""

from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import io
import logging
import os
import stat
from collections.abc import Callable
from types import TracebackType
from typing import IO, TYPE_CHECKING, Any, Final, TypeVar

from django.core.files import File

from tribrick.errors import StorageUnavailable
from tribrick.storage.guard import Call
from tribrick.storage.mount import Mount
from tribrick.storage.saving import temporary_beside

if TYPE_CHECKING:
    from _typeshed import ReadableBuffer, WriteableBuffer

log = logging.getLogger("tribrick.storage")
BUFFER: Final = 256 * 1024
PIECE: Final = 1024 * 1024
T = TypeVar("T")


class _Raw(io.RawIOBase):
    """A raw file without a descriptor to give away: nothing reaches the mount but through calls.

    The position is kept here and bytes are copied here, so a late call changes neither. While a
    call is overdue its descriptor must not be closed; the call does that when it returns.
    """

    def __init__(self, mount: Mount, relative: str) -> None:
        super().__init__()
        self._mount = mount
        self._relative = relative
        self._descriptor = -1
        self._position = 0
        self._lost = True  # until it is open

    def _call(self, work: Callable[[], T]) -> T:
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        if self._lost:
            raise StorageUnavailable(errno.ETIMEDOUT, "the media volume did not answer for this file before")
        call: Call[T] = self._mount.start(lambda _call: work(), late=self._release)
        try:
            return self._mount.result_of(call)
        finally:
            self._lost = call.abandoned

    def _release(self) -> None:
        """Give the descriptor back; in a worker."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            with contextlib.suppress(OSError):
                os.close(descriptor)

    def _size(self) -> int:
        raise NotImplementedError

    def _read(self, position: int, wanted: int) -> bytes:
        return os.pread(self._descriptor, wanted, position)

    def _next(self, wanted: int) -> bytes:
        position = self._position
        data = self._call(lambda: self._read(position, wanted)) if wanted else b""
        self._position = position + len(data)
        return data

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: WriteableBuffer, /) -> int:
        view = memoryview(buffer).cast("B")
        data = self._next(min(len(view), PIECE))
        view[: len(data)] = data
        return len(data)

    def readall(self) -> bytes:
        return b"".join(iter(lambda: self._next(PIECE), b""))

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if self.closed:
            raise ValueError("I/O operation on closed file.")
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position}.get(whence)
        position = offset + (self._size() if base is None else base)
        if position < 0:
            raise OSError(errno.EINVAL, os.strerror(errno.EINVAL))
        self._position = position
        return position

    def close(self) -> None:
        if not self.closed:
            try:
                if self._descriptor >= 0 and not self._lost:
                    self._mount.clean_up(self._release)
            finally:
                super().close()


class Reader(_Raw):
    """A stored file, opened for reading. Stored files do not change, so its size is asked once."""

    def __init__(self, mount: Mount, relative: str) -> None:
        super().__init__(mount, relative)
        self._known_size = 0
        self._mount.call(self._open, late=self._release, subject=relative)
        self._lost = False

    def _open(self, root: int) -> None:
        descriptor = os.open(self._relative, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=root)
        try:
            status = os.fstat(descriptor)
            if stat.S_ISDIR(status.st_mode):
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), self._relative)
        except BaseException:
            os.close(descriptor)
            raise
        self._known_size = status.st_size
        self._descriptor = descriptor

    def _size(self) -> int:
        return self._known_size

    def _read(self, position: int, wanted: int) -> bytes:
        try:
            return os.pread(self._descriptor, wanted, position)
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
        self._release()
        with self._mount.root() as root:
            self._open(root)
        return os.pread(self._descriptor, wanted, position)


class Writer(_Raw):
    """A new file, written beside its name and published under it.

    Published means: fsync, link to the name (which fails if the name exists), unlink of the
    temporary name, and fsync of the still open file, which makes the new name durable.
    """

    def __init__(self, mount: Mount, relative: str) -> None:
        super().__init__(mount, relative)
        self._temporary = temporary_beside(relative)
        self._made = self._linked = False
        self._mount.call(self._create, late=self._release, subject=relative)
        self._lost = False

    def _create(self, root: int) -> None:
        if _exists(self._relative, root):
            raise self._taken()
        self._mount.check_room(root)
        self._descriptor = self._mount.create(root, self._temporary, os.O_RDWR)
        self._made = True

    def _taken(self) -> FileExistsError:
        return FileExistsError(
            errno.EEXIST, "this name is taken; stored files are never changed, save a new one", self._relative
        )

    def _size(self) -> int:
        return self._call(lambda: os.fstat(self._descriptor).st_size)

    def writable(self) -> bool:
        return True

    def write(self, data: ReadableBuffer, /) -> int:
        view = memoryview(data).cast("B")
        if self._descriptor < 0 and not self.closed:  # given up: what the buffer still holds goes nowhere
            return len(view)
        position, piece = self._position, bytes(view[:PIECE])
        written = self._call(lambda: os.pwrite(self._descriptor, piece, position)) if piece else 0
        self._position = position + written
        return written

    def truncate(self, size: int | None = None, /) -> int:
        wanted = self._position if size is None else size
        self._call(lambda: os.ftruncate(self._descriptor, wanted))
        return wanted

    def look(self) -> tuple[str, int]:
        """Return SHA-256 and size of what was written, wherever in the file it was."""
        hasher, size = hashlib.sha256(), 0
        while data := self._call(functools.partial(self._read, size, PIECE)):
            hasher.update(data)
            size += len(data)
        return hasher.hexdigest(), size

    def publish(self) -> None:
        """Give the file its name, durably."""
        self._call(self._publish)
        self._linked = False  # it stays

    def _publish(self) -> None:
        try:
            self._mount.set_mode(self._descriptor)
            os.fsync(self._descriptor)
            with self._mount.root() as root:
                try:
                    os.link(self._temporary, self._relative, src_dir_fd=root, dst_dir_fd=root, follow_symlinks=False)
                except FileExistsError as error:
                    raise self._taken() from error
                self._linked = True
                os.unlink(self._temporary, dir_fd=root)
                self._made = False
            os.fsync(self._descriptor)
            descriptor, self._descriptor = self._descriptor, -1
            os.close(descriptor)
        except BaseException:
            self._release()
            raise

    def _release(self) -> None:
        """Undo everything, in a worker; the name too if this file has got it."""
        super()._release()
        names = [name for name, there in ((self._relative, self._linked), (self._temporary, self._made)) if there]
        self._linked = self._made = False
        if names:
            try:
                with self._mount.root() as root:
                    for name in names:
                        with contextlib.suppress(FileNotFoundError):
                            os.unlink(name, dir_fd=root)
            except OSError as error:
                log.warning("a file that was not published left %s behind: %s", ", ".join(names), error)


def _exists(relative: str, root: int) -> bool:
    try:
        os.stat(relative, dir_fd=root, follow_symlinks=False)
    except FileNotFoundError:
        return False
    return True


class OpenedFile(File):  # type: ignore[type-arg]
    """A stored file opened for reading. ``open`` opens it again after ``close``, as libraries expect."""

    def __init__(self, file: IO[Any], name: str, again: Callable[[str], IO[Any]]) -> None:
        super().__init__(file, name)
        self._again = again

    def open(self, mode: str | None = None, *args: Any, **kwargs: Any) -> OpenedFile:  # noqa: ARG002
        """Go to the start, after opening the file again if it was closed."""
        if self.closed:
            self.file = self._again(mode or "rb")
        else:
            self.seek(0)
        return self


class NewFile(File):  # type: ignore[type-arg]
    """A new file opened for writing. ``close`` publishes it; leaving ``with`` by an error discards it.

    One that is neither closed nor discarded is discarded. *enter* writes the row of the published
    file, or removes it and raises.
    """

    def __init__(
        self, raw: Writer, file: Any, name: str, enter: Callable[[str, int, NewFile], None] | None = None
    ) -> None:
        super().__init__(file, name)
        self._raw = raw
        self._enter = enter
        self._buffer = file

    def close(self) -> None:
        """Publish the file under its name; an exception means that there is none."""
        if self.closed:
            return
        try:
            self._buffer.flush()
            seen = self._raw.look() if self._enter is not None else ("", 0)
            self._raw.publish()
            if self._enter is not None:
                self._enter(*seen, self)
        finally:
            self.discard()

    def discard(self) -> None:
        """Close the file and leave nothing of it, unless it is published."""
        self._raw.close()
        with contextlib.suppress(ValueError, OSError):  # the buffer has nowhere to go
            self._buffer.close()

    def __exit__(
        self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is None:
            self.close()
        else:
            self.discard()
