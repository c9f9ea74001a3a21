"""What can go wrong with a volume.

All are ``OSError``, so that code written for Django's ``FileSystemStorage`` keeps working; callers
that can do better (answer 503, use a spool) catch the finer class.
"""

from __future__ import annotations

import errno

UNAVAILABLE = frozenset(
    {
        errno.ENOTCONN,  # no quorum, or the FUSE process has died
        errno.ECONNABORTED,  # the FUSE connection was aborted to free a hung mount
        errno.EROFS,  # the guard below the mount, or a read-only volume
        errno.EIO,
        errno.ESTALE,
        errno.ENODEV,
        errno.ETIMEDOUT,
    }
)
FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class StorageError(OSError):
    """The volume could not do what was asked."""


class StorageUnavailable(StorageError):
    """The volume is away or is not the right one. Nothing was stored. Worth another try later."""


class StorageFull(StorageError):
    """No space, or the quota is used up. Nothing was stored."""


def translate(error: OSError) -> OSError:
    """Return *error* as one of the classes above where it is one of them, else *error* itself."""
    if isinstance(error, StorageError) or error.errno is None:
        return error
    reason = error.strerror or errno.errorcode.get(error.errno, str(error.errno))
    if error.errno in UNAVAILABLE:
        return StorageUnavailable(error.errno, f"the media volume is not available: {reason}")
    if error.errno in FULL:
        return StorageFull(error.errno, f"the media volume is full: {reason}")
    return error
