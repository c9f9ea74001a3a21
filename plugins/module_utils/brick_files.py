# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""One entry of a brick, as it has to be the same on all bricks."""

from __future__ import annotations

import hashlib
import os
import re
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


def shown(name: str) -> str:
    """A name as Ansible takes it from a module: bytes that are no UTF-8 become \\xNN."""
    return os.fsencode(name).decode("utf-8", "backslashreplace")


def raw(name: str) -> str:
    """What `shown` made this of, unless it has such words of its own."""
    return os.fsdecode(
        re.sub(rb"\\x([89a-f][0-9a-f])", lambda found: bytes.fromhex(found[1].decode()), os.fsencode(name))
    )


def meant(root: str, name: str) -> str:
    """The name below *root* that `shown` has shown so."""
    return name if os.path.lexists(os.path.join(root, name)) else raw(name)
