"""``sync watch``: a run at the start, soon after a file has changed here or on a peer, and from time to time.

Changes here are told by ``inotifywait`` (Debian's inotify-tools), and when a run has recorded some, the peers are woken
through their doors, so that they run, too. Without inotifywait, and where a peer could not be woken, the run from time
to time finds everything: nothing depends on being told.
"""

from __future__ import annotations

import contextlib
import subprocess
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import IO, Any, Final

from tribrick.sentinel import HISTORY

QUIET: Final = 1.0
"""Seconds without a change after which a run begins; it does not wait longer than ten times that."""
_EVENTS: Final = "close_write,moved_to,moved_from,delete,create"


def wake_file(state: str | Path) -> Path:
    """Return the file beside a state that a peer's :mod:`tribrick.sync.door` writes to wake the side."""
    return Path(f"{state}.wake")


class Changes:
    """What inotifywait tells, while the block lasts. *told* is set by each change; *trouble* says why nothing comes."""

    def __init__(self, root: Path, wake: Path, program: str = "inotifywait") -> None:
        self.told, self.trouble = threading.Event(), ""
        self._command = [
            program, "--monitor", "--recursive", "--quiet", "--event", _EVENTS, "--format", "%e",
            "--exclude", f"/{HISTORY.replace('.', '[.]')}(/|$)", str(root), str(wake),
        ]  # fmt: skip
        self._process: subprocess.Popen[str] | None = None
        self._wake = wake

    def __enter__(self) -> Changes:
        self._wake.touch(mode=0o600)
        try:
            self._process = subprocess.Popen(
                self._command, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
            )
        except OSError as error:
            self.trouble = f"{self._command[0]}: {error.strerror}"
        else:
            threading.Thread(target=self._read, args=(self._process,), daemon=True).start()
        return self

    def _read(self, process: subprocess.Popen[str]) -> None:
        for _line in process.stdout or ():
            self.told.set()
        # It ends by itself only when it cannot watch: too many directories, or the directory is gone.
        complaint = process.stderr.read() if process.stderr else ""
        self.trouble = " ".join(complaint.split())[:300] or "inotifywait has ended"
        self.told.set()

    def __exit__(self, *_error: object) -> None:
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            for stream in (self._process.stdout, self._process.stderr):
                with contextlib.suppress(OSError, ValueError):
                    _close(stream)


def _close(stream: IO[str] | None) -> None:
    if stream is not None:
        stream.close()


def follow(
    turn: Callable[[], bool], changes: Changes, *, every: float, quiet: float, stop: threading.Event,
    said: Callable[[str], Any],
) -> None:  # fmt: skip
    """Do a *turn*, wait for a change or for *every* seconds, and so on until *stop* is set.

    A turn that returns True has left something for soon, such as a file that somebody still writes to.
    """
    trouble = ""
    while not stop.is_set():
        changes.told.clear()
        soon = turn()
        if changes.trouble != trouble:
            trouble = changes.trouble
            said(f"changes are not told, so they are found within {every:g} s: {trouble}")
        _wait(changes.told, min(every, quiet + 1) if soon else every, stop, alone=bool(trouble))
        end = time.monotonic() + 10 * quiet
        while not trouble and changes.told.is_set() and not stop.is_set() and time.monotonic() < end:
            changes.told.clear()
            changes.told.wait(quiet)


def _wait(told: threading.Event, seconds: float, stop: threading.Event, *, alone: bool) -> None:
    end = time.monotonic() + seconds
    while (left := end - time.monotonic()) > 0 and not stop.is_set():
        if not alone and told.wait(min(left, 0.5)):
            return
        if alone:
            stop.wait(min(left, 0.5))


def wake(doors: Sequence[Any]) -> list[str]:
    """Wake peers; return the names of those that could not be. They find the changes in time."""
    return [door.name for door in doors if not door.wake()]
