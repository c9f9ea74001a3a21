"""What was asked, when, and how it ended, as JSON lines; and contents that follow from a seed and a label."""

from __future__ import annotations

import bisect
import dataclasses
import json
import random
import threading
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# One byte, and both sides of every boundary: GlusterFS reads 64 KiB at once and writes 128 KiB, Django spools 2.5 MiB.
SIZES = (1, 65_535, 65_536, 65_537, 131_071, 131_072, 131_073, 1_048_575, 1_048_576, 1_048_577, 8 * 1_048_576)
CLASSES = {"1 B": (1,), "64 KiB": SIZES[1:4], "128 KiB": SIZES[4:7], "1 MiB": SIZES[7:10], "8 MiB": SIZES[10:]}


def content(seed: str, label: str, size: int) -> bytes:
    """Return the bytes of a file, the same for the same arguments on every machine."""
    return random.Random(f"{seed} {label} {size}").randbytes(size)


@dataclass
class Event:
    """One line of the history. `invoke` opens an operation; `ok`, `fail` or `info` closes it.

    `fail`: it certainly was refused, or never sent. `info`: nobody knows; a time-out, a reset, an answer 5xx.
    """

    op: int
    kind: str  # invoke, ok, fail, info
    what: str  # upload, replace, delete, read, create, rename; mark for what the nemesis does
    time: float  # seconds since the start
    client: str = ""
    host: str = ""
    label: str = ""  # whose content
    size: int = 0
    name: str = ""  # the stored name, once it is known
    target: str = ""  # rename: the new name; replace: the old version
    status: int = 0  # HTTP status, 0 if there was none
    seen: str = ""  # of a read: match, or what was wrong with the bytes
    note: str = ""


class History:
    """Events in the order of time, written to a file as they happen."""

    def __init__(self, path: Path | None = None, started: float | None = None) -> None:
        """Start with the clock at zero."""
        self.started = time.monotonic() if started is None else started
        self.events: list[Event] = []
        self._file = None if path is None else path.open("w", encoding="utf-8")
        self._lock = threading.Lock()
        self._ops = 0

    def now(self) -> float:
        """Return the seconds since the start."""
        return round(time.monotonic() - self.started, 4)

    def since(self, moment: float) -> list[Event]:
        """Return the events from a moment on."""
        with self._lock:
            return self.events[bisect.bisect_left(self.events, moment, key=lambda event: event.time) :]

    def number(self) -> int:
        """Return a number for a new operation."""
        with self._lock:
            self._ops += 1
            return self._ops

    def add(self, event: Event) -> Event:
        """Keep an event; its time is now."""
        with self._lock:
            event.time = self.now()
            self.events.append(event)
            if self._file is not None:
                self._file.write(to_line(event) + "\n")
                self._file.flush()
        return event

    def mark(self, note: str, host: str = "") -> Event:
        """Keep what the nemesis does."""
        return self.add(Event(self.number(), "info", "mark", 0.0, host=host, note=note))

    def close(self) -> None:
        """Close the file."""
        if self._file is not None:
            self._file.close()
            self._file = None


def to_line(event: Event) -> str:
    """Return an event as one line; empty values are left out."""
    values = {key: value for key, value in dataclasses.asdict(event).items() if value not in ("", 0) or key == "time"}
    return json.dumps(values, separators=(",", ":"))


def from_line(line: str) -> Event:
    """Return the event of a line."""
    values: dict[str, Any] = {"op": 0, "kind": "", "what": "", "time": 0.0} | json.loads(line)
    return Event(**values)


def load(path: Path) -> list[Event]:
    """Read a history."""
    with path.open(encoding="utf-8") as lines:
        return [from_line(line) for line in lines]


@dataclass
class Operation:
    """An invocation with its end; without one it is still open, which is as unknown as a time-out."""

    invoke: Event
    end: Event | None = None

    @property
    def outcome(self) -> str:
        """Return ok, fail or info."""
        return "info" if self.end is None else self.end.kind

    @property
    def name(self) -> str:
        """Return the stored name, if it is known."""
        return (self.end.name if self.end is not None else "") or self.invoke.name

    @property
    def seconds(self) -> float:
        """Return how long it took; an open one took for ever."""
        return float("inf") if self.end is None else self.end.time - self.invoke.time


def operations(events: Iterable[Event]) -> Iterator[Operation]:
    """Pair invocations with their ends, in the order of invocation."""
    found: dict[int, Operation] = {}
    for event in events:
        if event.what == "mark":
            continue
        if event.kind == "invoke":
            found[event.op] = Operation(event)
        elif event.op in found:
            found[event.op].end = event
    yield from found.values()
