"""The door of a side: what a peer's key may ask for, and nothing else.

In ``authorized_keys``, one line a peer::

    restrict,command="/opt/site/bin/python -m tribrick.sync.door /var/lib/tribrick/sync.sqlite" ssh-ed25519 AAAA...

It needs the standard library only, and rsync. Three requests are understood, everything else is refused:

``tribrick-sync 1 changes AFTER STATE scan|look``
    The first line of the answer is an object about this side, the next ones are ``[number, version]``
    for the versions that became known here after the number AFTER, if STATE is what the object called the
    numbers then (``-`` or another one: all of them), the last one is ``"end"``. ``scan`` looks at the disk before.
``rsync --server --sender ... . ./``
    rsync reads contents, by their hash, from the history. Only options that read are let through.

``tribrick-sync 1 wake``
    ``sync watch`` on this side, if it runs, begins a run. One empty file beside the state is written for it.

Nobody can write anything else through the door.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import sys
import threading
from pathlib import Path
from typing import IO, Final

from tribrick.sentinel import HISTORY
from tribrick.sync.side import Side
from tribrick.sync.state import State, SyncError
from tribrick.sync.watch import wake_file

PROTOCOL: Final = 1
BEAT = 5.0
"""Seconds between signs of life while the disk is looked at."""
LONGEST: Final = 24 * 3600
_CHANGES: Final = re.compile(r"tribrick-sync 1 changes ([0-9]{1,18}) (-|[0-9a-f]{32}) (scan|look)")
# What rsync's client sends for the options of tribrick.sync.move, in any of its releases since 3.2: letters for
# times, ignore-times, relative, compress and the like, and after "e." what the client can do.
_OPTION: Final = re.compile(
    r"-[tIRzW]+(e[0-9]*\.[A-Za-z]*)?|--timeout=[0-9]{1,6}|--files-from=-|--from0|--no-implied-dirs|--omit-dir-times"
    r"|--bwlimit=[0-9]{1,9}|--new-compress|--compress-choice=[a-z0-9]{1,10}|--compress-level=[0-9]{1,2}|--no-r|--no-dirs"
)


def main(arguments: list[str] | None = None) -> int:
    """Answer one request."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if len(arguments) != 1 or arguments[0].startswith("-"):
        print("usage: python -m tribrick.sync.door STATE\n\n" + (__doc__ or ""), file=sys.stderr)
        return 2
    asked = os.environ.get("SSH_ORIGINAL_COMMAND", "")
    signal.alarm(LONGEST)
    try:
        if asked == "tribrick-sync 1 wake":
            wake_file(arguments[0]).write_bytes(b"")
            return 0
        if match := _CHANGES.fullmatch(asked):
            changes(arguments[0], int(match[1]), match[2], match[3] == "scan", sys.stdout)
            return 0
        send(arguments[0], asked)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
        return 1
    except (SyncError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


def changes(path: str, after: int, known: str, scan: bool, out: IO[str]) -> None:
    """Write the answer to ``changes``."""
    with State.open(path) as state:
        side = Side(state, linked=state.meta("linked") == "yes")
        side.check()
        told: dict[str, object] = {}
        if scan:
            with _Beat(out), state.locked():
                found = side.scan()
            told = {"recorded": found.recorded, "young": len(found.young), "refused": found.refused}
        mine = state.sequence()
        start = after if known == mine and after <= state.last() else 0
        head = {"tribrick-sync": PROTOCOL, "state": mine, "node": state.meta("node"), "after": start, "scan": told}
        out.write(json.dumps(head) + "\n")
        for number, text in state.changes(start):
            out.write(f"[{number},{text}]\n")
        out.write('"end"\n')
        out.flush()


class _Beat:
    """Says ``{"busy": true}`` every now and then, so that silence means that nobody is there."""

    def __init__(self, out: IO[str]) -> None:
        self._out, self._over = out, threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def __enter__(self) -> None:
        self._thread.start()

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(BEAT):
            try:
                self._out.write('{"busy": true}\n')
                self._out.flush()
            except OSError:
                return


def send(path: str, asked: str) -> None:
    """Become an rsync that sends from the history."""
    try:
        words = shlex.split(asked)
    except ValueError:
        words = []
    options = words[3:-2]
    if (
        words[:3] != ["rsync", "--server", "--sender"]
        or words[-2:] != [".", "./"]
        or not all(_OPTION.fullmatch(option) for option in options)
        or "--files-from=-" not in options
    ):
        raise SyncError("this key may ask for versions and contents only; see docs/sync.md")
    with State.open(path) as state:
        Side(state).check()
        root = Path(state.meta("root"))
    os.chdir(root / HISTORY / "objects")
    environment = {key: value for key, value in os.environ.items() if not key.startswith("RSYNC_")}
    try:
        os.execvpe("rsync", ["rsync", "--server", "--sender", *options, ".", "./"], environment)  # noqa: S606  no shell is meant
    except FileNotFoundError as error:
        raise SyncError("rsync is not installed") from error


if __name__ == "__main__":
    sys.exit(main())
