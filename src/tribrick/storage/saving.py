"""One file on its way to the volume."""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import re
from typing import Any, Final

from tribrick import names
from tribrick.storage.guard import Call
from tribrick.storage.mount import Mount, go_on

log = logging.getLogger("tribrick.storage")
CHUNK: Final = 1024 * 1024
# A large file is flushed as it grows, so that the last fsync ends within its deadline.
FLUSH: Final = 32 * CHUNK
TEMPORARY: Final = re.compile(r"\.[a-z2-7]{20}\.part")


def temporary_beside(relative: str) -> str:
    """Return a new unique path in the directory of *relative*, for a file that gets its name later."""
    return os.path.join(os.path.dirname(relative), f".{names.new_token()}.part")


class Saving:
    """A file that is created, written in pieces and made durable. Workers take the steps, one at a time.

    Create beside the name, write, rename, and fsync of the still open file, which makes bytes and name durable.
    Creating it under the name would survive a power cut of all bricks as well, and be faster. But who lists the
    directory on another node meanwhile has that node's mount remember the size of the moment for a second: its web
    server would read, and keep, a part of the acknowledged file, or nothing.

    A step that fails, or ends after its caller has stopped waiting, removes the file.
    """

    def __init__(self, mount: Mount, relative: str) -> None:
        self.mount = mount
        self.relative = relative
        self.path = temporary_beside(relative)  # where the bytes are
        self.root = -1
        self.descriptor = -1
        self._created = False
        self._unflushed = 0

    def step(self, call: Call[Any], data: bytes | memoryview, *, first: bool, last: bool) -> None:
        """Write *data*. With the first piece the file is created, with the last one finished."""
        try:
            if first:
                self.root = self.mount.open_root()
                self.mount.check_room(self.root)
                go_on(call)
                self.descriptor = self.mount.create(self.root, self.path)
                self._created = True
                go_on(call)
            self._write(data)
            if last:
                self.mount.set_mode(self.descriptor)
                self.finish(call)
            elif self._unflushed >= FLUSH:
                self.flush()
        except BaseException:
            self.give_up()
            raise

    def _write(self, data: bytes | memoryview) -> None:
        view = memoryview(data)
        self._unflushed += len(view)
        while view:
            view = view[os.write(self.descriptor, view) :]

    def flush(self) -> None:
        """Make durable what was written so far."""
        os.fsync(self.descriptor)
        self._unflushed = 0

    def finish(self, call: Call[Any]) -> None:
        """Give the file its name, make it durable, and close it."""
        # All bytes are on the bricks before: `set_mode` has asked for the file's size, which waits for the writes.
        go_on(call)
        self._refuse_a_taken_name()
        os.rename(self.path, self.relative, src_dir_fd=self.root, dst_dir_fd=self.root)
        self.path = self.relative
        go_on(call)
        os.fsync(self.descriptor)
        self.close()

    def _refuse_a_taken_name(self) -> None:
        """Names are unique; this is for who gives them by hand. Two at the same moment are not told apart."""
        try:
            os.stat(self.relative, dir_fd=self.root, follow_symlinks=False)
        except FileNotFoundError:
            return
        raise FileExistsError(errno.EEXIST, "this name is taken; stored files are never changed", self.relative)

    def close(self) -> None:
        """Close the file."""
        descriptor, self.descriptor = self.descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def let_go(self) -> None:
        """Close the root, after success. This does not touch the mount: the descriptor is a mere path."""
        root, self.root = self.root, -1
        if root >= 0:
            os.close(root)

    def give_up(self) -> None:
        """Remove the file. Its name is known to nobody, so a rest is harmless."""
        with contextlib.suppress(OSError):
            self.close()
        if self._created:
            self._created = False
            try:
                os.unlink(self.path, dir_fd=self.root)
            except FileNotFoundError:
                pass
            except OSError as error:
                log.warning("a failed save left %s behind: %s", self.path, error)
        self.let_go()
