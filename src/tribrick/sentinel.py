"""The sentinel: a file in the volume's root which proves that a directory is the mount.

It holds ``{"tribrick": 1, "volume": "media", "id": "<id>"}``. The directory below an absent mount
has none, so nothing is written where it would be hidden by the next mount.
"""

from __future__ import annotations

import errno
import json
import os
from typing import Final

from tribrick.errors import StorageUnavailable

HISTORY: Final = ".tribrick-history"
"""Also a mark of a root: the directory that :mod:`tribrick.sync` keeps there. Files may be changed past the catalog."""
_LARGEST: Final = 4096
_Key = tuple[int, int, int, int]


def _key(status: os.stat_result) -> _Key:
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_size


class Sentinel:
    """Checks the sentinel relative to an open root directory.

    Each check costs one ``stat``. Only a file that was read and found right is remembered, by
    device, inode, time and size; a failure is never remembered.
    """

    def __init__(self, name: str, expected_id: str) -> None:
        self.name = name
        self.expected_id = expected_id
        self._good: _Key | None = None

    def check(self, root: int, shown_root: str, *, reread: bool = False) -> None:
        """Raise ``StorageUnavailable`` unless *root* (a directory's descriptor) is the volume's.

        ``ESTALE`` is passed on, so that the caller can try again with a new descriptor.
        """
        try:
            if not reread and _key(self._stat(root)) == self._good:
                return
            descriptor = os.open(self.name, os.O_RDONLY | os.O_NOFOLLOW, dir_fd=root)
            try:
                key = _key(os.fstat(descriptor))
                text = os.read(descriptor, _LARGEST)
            finally:
                os.close(descriptor)
        except FileNotFoundError as error:
            raise StorageUnavailable(
                errno.ENODEV,
                f"{shown_root} is not the media volume: it has no {self.name} (is it mounted?)",
            ) from error
        except OSError as error:
            if error.errno == errno.ESTALE:
                raise
            raise StorageUnavailable(
                error.errno,
                f"the media volume at {shown_root} is not available: {self.name}: {error.strerror or error}",
            ) from error
        found = self._read_id(text)
        if found != self.expected_id:
            raise StorageUnavailable(
                errno.ENODEV,
                f"{shown_root} is not the expected media volume: {self.name} has "
                f"{'no readable id' if found is None else f'id {found!r}'}, "
                f"not {self.expected_id!r}",
            )
        self._good = key

    def _stat(self, root: int) -> os.stat_result:
        return os.stat(self.name, dir_fd=root, follow_symlinks=False)

    @staticmethod
    def _read_id(text: bytes) -> str | None:
        try:
            parsed = json.loads(text)
        except ValueError:
            return None
        if not isinstance(parsed, dict) or not isinstance(parsed.get("id"), str):
            return None
        return str(parsed["id"])
