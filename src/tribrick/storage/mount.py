"""The volume as the storages see it: a root that is checked, and calls with a deadline."""

from __future__ import annotations

import contextlib
import errno
import os
import stat
import time
from collections.abc import Callable, Hashable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final, TypeVar

from tribrick.errors import StorageFull, StorageUnavailable, translate
from tribrick.sentinel import Sentinel
from tribrick.storage.guard import Call, Guard

_ROOT_FLAGS: Final = getattr(os, "O_PATH", os.O_RDONLY) | os.O_DIRECTORY
_ROOM_KNOWN: Final = 5.0  # seconds for which a look at the free space is good
_room: dict[str, float] = {}
T = TypeVar("T")


@contextlib.contextmanager
def translated() -> Iterator[None]:
    """Turn a mount's errors into ``StorageUnavailable`` and ``StorageFull``."""
    try:
        yield
    except OSError as error:
        finer = translate(error)
        if finer is error:
            raise
        raise finer from error


@dataclass(frozen=True)
class Mount:
    """A volume's root with what is needed to use it. ``start``, ``result_of``, ``call`` and
    ``clean_up`` are for any thread; everything else touches the mount and is for workers.
    """

    location: str
    sentinel: Sentinel | None
    guard: Guard
    deadline: float
    file_mode: int | None = None
    directory_mode: int | None = None
    reserve: int = 0

    # For any thread

    def start(self, work: Callable[[Call[T]], T], *, late: Callable[[], object] | None = None) -> Call[T]:
        """Begin a call in a worker; ask :meth:`result_of` for its answer."""
        return self.guard.start(work, self.deadline, late=late)

    @staticmethod
    def result_of(call: Call[T]) -> T:
        """Wait for the answer of a call, no longer than the deadline."""
        with translated():
            return call.result()

    def call(
        self,
        work: Callable[[int], T],
        *,
        late: Callable[[], object] | None = None,
        subject: Hashable = None,
        reread: bool = False,
    ) -> T:
        """Run *work* in a worker with the checked root's descriptor; once more after ``ESTALE``.

        If the caller has stopped waiting before the root was checked, *work* is not run at all.
        """

        def once(call: Call[T]) -> T:
            with self.root(reread=reread) as root:
                go_on(call)
                return work(root)

        def twice(call: Call[T]) -> T:
            try:
                return once(call)
            except OSError as error:
                if error.errno != errno.ESTALE:
                    raise
            return once(call)

        with translated():
            return self.guard.call(twice, self.deadline, late=late, subject=subject)

    def clean_up(self, work: Callable[[], object]) -> None:
        """Do *work* in a worker, now or once the mount answers again."""
        self.guard.clean_up(work, self.deadline)

    # For workers

    def open_root(self, *, reread: bool = False) -> int:
        """Open the root and check that it is the volume's."""
        try:
            root = os.open(self.location, _ROOT_FLAGS)
        except OSError as error:
            if error.errno == errno.ESTALE:
                raise
            raise StorageUnavailable(
                error.errno, f"the media root {self.location} cannot be opened: {error.strerror}"
            ) from error
        try:
            if self.sentinel is not None:
                self.sentinel.check(root, self.location, reread=reread)
        except BaseException:
            os.close(root)
            raise
        return root

    @contextlib.contextmanager
    def root(self, *, reread: bool = False) -> Iterator[int]:
        """Give the checked root's descriptor."""
        root = self.open_root(reread=reread)
        try:
            yield root
        finally:
            os.close(root)

    def check_room(self, root: int) -> None:
        """Raise ``StorageFull`` when less than *reserve* bytes are free. Only plenty is remembered, for 5 seconds."""
        now = time.monotonic()
        if not self.reserve or now - _room.get(self.location, -_ROOM_KNOWN) < _ROOM_KNOWN:
            return
        space = os.statvfs(root)
        free = space.f_bavail * space.f_frsize
        if free < self.reserve:
            raise StorageFull(
                errno.ENOSPC, f"{self.location} is nearly full: {free} bytes are free, {self.reserve} are kept free"
            )
        _room[self.location] = now

    def create(self, root: int, relative: str, flags: int = os.O_WRONLY) -> int:
        """Create a file that does not exist, with its directories, and return its descriptor."""
        flags |= os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
        mode = 0o666 if self.file_mode is None else self.file_mode
        try:
            return os.open(relative, flags, mode, dir_fd=root)
        except FileNotFoundError:
            self._make_directories(root, os.path.dirname(relative))
            return os.open(relative, flags, mode, dir_fd=root)

    def _make_directories(self, root: int, relative: str) -> None:
        """Make what is missing. The kit provisions directories, so this is for other sites."""
        mode = self.directory_mode
        made = ""
        for part in Path(relative).parts:
            made = os.path.join(made, part)
            with contextlib.suppress(FileExistsError):
                os.mkdir(made, 0o777 if mode is None else mode, dir_fd=root)
                if mode is not None:
                    os.chmod(made, mode, dir_fd=root)

    def set_mode(self, descriptor: int) -> None:
        """Undo the umask where it took something away; no change on the volume otherwise."""
        mode = self.file_mode
        if mode is not None and stat.S_IMODE(os.fstat(descriptor).st_mode) != mode:
            os.fchmod(descriptor, mode)


def go_on(call: Call[Any]) -> None:
    """Raise unless somebody still waits for *call*."""
    if call.abandoned:
        raise StorageUnavailable(errno.ETIMEDOUT, "nobody waits for this call any more")
