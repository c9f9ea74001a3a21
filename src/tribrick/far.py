"""What :class:`tribrick.far_copies.SshCopy` runs on the far side, sent there as text.

It needs Python 3.8 and its standard library, nothing that is installed. Each line of its input is a
question in JSON; the first gives the ``root``. Answers are JSON lines, the last of them is ``"end"``.
Names never meet a shell.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import stat
import sys
import time
from collections.abc import Iterator
from typing import Any

CHUNK = 1024 * 1024
TAIL = 4096
INCOMING = ".tribrick-incoming"
OLD = 24 * 3600
TEMPORARY = re.compile(r"\.[a-z2-7]{20}\.part")


def path_of(root: str, name: str) -> str:
    """Return where *name* lies; no name leads out of the root or into its dot directories."""
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts) or "\0" in name or (len(parts) > 1 and parts[0].startswith(".")):
        raise OSError(errno.EINVAL, "is not the name of a stored file")
    return os.path.join(root, *parts)


def look(root: str, name: str, durable: bool) -> dict[str, Any]:
    """Return hash and size of a file; with *durable* it is flushed under its name."""
    descriptor = os.open(path_of(root, name), os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
    try:
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            raise OSError(errno.EINVAL, "is not a regular file")
        hasher, size, tail = hashlib.sha256(), 0, b""
        while True:
            chunk = os.read(descriptor, CHUNK)
            if not chunk:
                break
            hasher.update(chunk)
            size += len(chunk)
            tail = (tail + chunk[-TAIL:])[-TAIL:]
        if durable:
            os.fsync(descriptor)
            directory = os.open(os.path.dirname(path_of(root, name)), os.O_RDONLY | os.O_DIRECTORY)
            try:
                os.fsync(directory)
            finally:
                os.close(directory)
    finally:
        os.close(descriptor)
    return {"sha256": hasher.hexdigest(), "size": size, "zero_tail": bool(tail) and not any(tail)}


def hashes(root: str, question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Answer for each name, in order."""
    for name in question["names"]:
        try:
            found = look(root, name, question.get("durable", False))
        except (FileNotFoundError, NotADirectoryError):
            yield {"name": name, "error": "missing"}
        except OSError as error:
            yield {"name": name, "error": "unreadable", "detail": error.strerror or str(error)}
        else:
            yield dict(found, name=name)


def walk(root: str, _question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield every file but those in dot names of the root."""
    waiting = [""]
    while waiting:
        directory = waiting.pop()
        try:
            with os.scandir(os.path.join(root, directory)) as entries:
                listed = sorted(entries, key=lambda entry: entry.name)
        except FileNotFoundError:
            if not directory:
                raise
            continue
        below = []
        for entry in listed:
            if not directory and entry.name.startswith(".") and not TEMPORARY.fullmatch(entry.name):
                continue
            name = directory + "/" + entry.name if directory else entry.name
            if entry.is_dir(follow_symlinks=False):
                below.append(name)
                continue
            try:
                status = entry.stat(follow_symlinks=False)
            except FileNotFoundError:
                continue
            changed = max(status.st_mtime, status.st_ctime)
            yield {"name": name, "size": status.st_size, "changed": changed, "modified": status.st_mtime}
        waiting.extend(reversed(below))


def prepare(root: str, _question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Make the directory for files on their way, and remove what killed transfers left in it."""
    incoming = os.path.join(root, INCOMING)
    os.makedirs(incoming, mode=0o700, exist_ok=True)
    with os.scandir(incoming) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False) and time.time() - entry.stat().st_mtime > OLD:
                os.unlink(entry.path)
    return iter(())


def remove(root: str, question: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Unlink each name; one that is gone already is no error."""
    for name in question["names"]:
        try:
            os.unlink(path_of(root, name))
        except (FileNotFoundError, NotADirectoryError):
            pass
        except OSError as error:
            yield {"name": name, "error": error.strerror or str(error)}
            continue
        yield {"name": name}


def main() -> None:
    """Answer the questions of standard input."""
    questions = [json.loads(line) for line in sys.stdin]
    root = questions[0]["root"]
    if not os.path.isdir(root):
        raise SystemExit("there is no directory " + json.dumps(root))
    for question in questions[1:]:
        for answer in ACTIONS[question["do"]](root, question):
            sys.stdout.write(json.dumps(answer) + "\n")
            sys.stdout.flush()
    sys.stdout.write('"end"\n')


ACTIONS = {"hashes": hashes, "walk": walk, "prepare": prepare, "remove": remove}

if __name__ == "__main__":
    main()
