"""Probes: ask a thing that may hang, without hanging.

A call on a hung mount cannot be killed, not even with its process. So it is made in a daemon
thread, the asker stops waiting at the deadline, and no second call is made while the first is
outstanding: however often a health page is fetched, one thread hangs, not hundreds.
"""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class ProbeResult:
    """One answer. *seconds* is how long the call took, or how long it has been outstanding."""

    name: str
    ok: bool
    detail: str
    seconds: float

    def as_dict(self) -> dict[str, object]:
        """Return the answer as JSON can hold it."""
        return {"ok": self.ok, "detail": self.detail, "seconds": round(self.seconds, 3)}


class _Call:
    def __init__(self, started: float) -> None:
        self.started = started
        self.finished: float | None = None
        self.ok = False
        self.detail = ""
        self.done = threading.Event()


class Probe:
    """Runs *check* on demand, at most one call at a time, and answers within *deadline* seconds.

    *check* raises to say no; what it returns, if a string, is the detail of a yes. Askers that come
    while a call is outstanding share its answer. Once a call is older than the deadline, askers are
    answered at once, until it returns. Times are monotonic. A probe may be made before a fork.
    """

    def __init__(self, name: str, check: Callable[[], object], deadline: float = 2.0) -> None:
        if deadline <= 0:
            raise ValueError("a probe's deadline must be greater than zero")
        self.name = name
        self.deadline = deadline
        self._check = check
        self._reset()

    def _reset(self) -> None:
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._outstanding: _Call | None = None
        self._last: _Call | None = None

    def start(self) -> None:
        """Begin a call if none is outstanding, and do not wait. For asking several at once."""
        self._current()

    def ask(self) -> ProbeResult:
        """Return the state of the thing, waiting no longer than the deadline."""
        call = self._current()
        call.done.wait(max(0.0, call.started + self.deadline - time.monotonic()))
        if call.finished is not None:
            return ProbeResult(self.name, call.ok, call.detail, call.finished - call.started)
        waited = time.monotonic() - call.started
        return ProbeResult(self.name, False, f"timed out after {self.deadline:g} s; {self._history()}", waited)

    def _current(self) -> _Call:
        """Return the outstanding call; start one if there is none."""
        if self._process != os.getpid():  # after a fork the thread and perhaps a held lock are gone
            self._reset()
        with self._lock:
            if self._outstanding is not None:
                return self._outstanding
            call = self._outstanding = _Call(time.monotonic())
            thread = threading.Thread(target=self._run, args=(call,), name=f"probe-{self.name}", daemon=True)
            try:
                thread.start()
            except RuntimeError as error:  # no thread to be had: an answer, not an exception
                self._outstanding = None
                call.detail, call.finished = f"no thread: {error}", time.monotonic()
                call.done.set()
            return call

    def _run(self, call: _Call) -> None:
        try:
            answer = self._check()
            call.ok, call.detail = True, answer if isinstance(answer, str) else "ok"
        except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
            call.detail = " ".join(str(error).split()) or type(error).__name__
        finally:
            with self._lock:
                call.finished = time.monotonic()
                self._last, self._outstanding = call, None
            call.done.set()

    def _history(self) -> str:
        last = self._last
        if last is None or last.finished is None:
            return "never answered before"
        age = time.monotonic() - last.finished
        return f"last answer {age:.0f} s ago: {last.detail}"
