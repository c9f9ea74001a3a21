# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""One entry of a brick, as it has to be the same on all bricks."""

from __future__ import annotations

import hashlib
import os
import stat


def entry(path: str) -> dict:
    """What must be the same on each brick."""
    try:
        seen = os.lstat(path)
        found = {"mode": oct(seen.st_mode), "uid": seen.st_uid, "gid": seen.st_gid}
        try:
            found["gfid"] = os.getxattr(path, "trusted.gfid", follow_symlinks=False).hex()
        except OSError:
            found["gfid"] = None
        if stat.S_ISREG(seen.st_mode):
            found["size"] = seen.st_size
            with open(path, "rb") as stream:
                found["sha256"] = hashlib.file_digest(stream, "sha256").hexdigest()
        elif stat.S_ISLNK(seen.st_mode):
            found["sha256"] = hashlib.sha256(os.readlink(path).encode()).hexdigest()
    except FileNotFoundError:
        return {}
    except OSError as error:
        return {"error": os.strerror(error.errno or 0)}
    return found
