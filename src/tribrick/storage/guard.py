"""Deadlines for calls on a mount that may hang.

A call on a hung mount cannot be killed, not even with its process. So it is made in a worker
thread, and the asker stops waiting at the deadline. What stays behind is bounded:

- at most *limit* calls of a process are outstanding on one mount; while all of them are overdue,
  askers are answered at once;
- the first overdue call opens a circuit breaker: askers are answered at once and the mount is not
  touched, but for one probe that is never joined by a second one. When the probe answers in time,
  one asker is let through; when that call returns in time, all are.

A call is either answered or abandoned, never both. What an abandoned call brings about late is
undone in its worker: each call may name a function for that.
"""

from __future__ import annotations

import contextlib
import errno
import logging
import os
import sys
import threading
import time
from collections import deque
from collections.abc import Callable, Hashable
from queue import Empty, SimpleQueue
from typing import Any, Final, Generic, Literal, TypeVar

from tribrick.errors import StorageUnavailable

log = logging.getLogger("tribrick.storage")
IDLE: Final = 60.0  # seconds until a worker without work ends
T = TypeVar("T")
State = Literal["closed", "open", "half-open"]


def _unavailable(reason: str, number: int = errno.ETIMEDOUT) -> StorageUnavailable:
    return StorageUnavailable(number, f"the media volume is not available: {reason}")


class Call(Generic[T]):
    """One call in a worker. Its asker calls ``result`` or ``abandon``."""

    def __init__(
        self,
        guard: Guard,
        work: Callable[[Call[T]], T],
        late: Callable[[], object] | None,
        subject: Hashable,
        deadline: float,
    ) -> None:
        self.subject = subject
        self.deadline = deadline
        self.until = time.monotonic() + deadline
        self.trial = False  # the one call of a half-open breaker
        self.returned = False  # the worker is done with it
        self.overdue = False
        self.failed = False
        self._guard = guard
        self._work: Callable[[Call[T]], T] | None = work
        self._late = late
        self._lock = threading.Lock()
        self._answered = threading.Lock()
        self._answered.acquire()
        self._state: Literal["running", "done", "abandoned"] = "running"
        self._result: Any = None
        self._error: BaseException | None = None

    @property
    def abandoned(self) -> bool:
        """Whether nobody waits any more. Work of several steps looks here before the last one."""
        return self._state == "abandoned"

    def result(self) -> T:
        """Wait for the answer, no longer than the deadline; ``StorageUnavailable`` if there is none."""
        try:
            if not self._answered.acquire(timeout=max(0.0, self.until - time.monotonic())) and self._settle(
                "abandoned"
            ):
                self._guard._overdue(self)
                raise _unavailable(f"no answer within {self.deadline:g} s")
        except BaseException:  # a signal's exception, too
            self.abandon()
            raise
        try:
            if self._error is not None:
                raise self._error
            return self._result  # type: ignore[no-any-return]
        finally:
            self._error = self._result = None  # no cycle with the traceback

    def abandon(self) -> None:
        """Stop waiting; what the call brings about is undone."""
        if self._settle("abandoned"):
            self._guard._left(self)

    def _settle(self, state: Literal["done", "abandoned"]) -> bool:
        """Decide, once, whether the call was answered in time."""
        with self._lock:
            if self._state != "running":
                return False
            self._state = state
            return True

    def run(self) -> None:
        """Make the call, in the worker."""
        work, self._work = self._work, None
        result: Any = None
        error: BaseException | None = None
        try:
            result = work(self)  # type: ignore[misc]
        except BaseException as caught:  # noqa: BLE001  it belongs to the asker
            error = caught
        self._result, self._error, self.failed = result, error, error is not None
        if not self._settle("done"):
            self._result = self._error = None
            if self._late is not None:
                try:
                    self._late()
                except Exception:
                    log.exception("cleaning up after a late call on the media volume failed")
        self._late = None

    def announce(self) -> None:
        """Wake the asker."""
        self._answered.release()


class Guard:
    """Makes calls on one mount in at most *limit* worker threads, with a circuit breaker.

    *probe* is a cheap call that cannot be answered without the mount. Workers are made when needed
    and end when idle. A guard may be used from any thread, and in the child after a fork.
    """

    def __init__(self, name: str, probe: Callable[[], object], limit: int = 8) -> None:
        if limit < 1:
            raise ValueError("a guard needs room for at least one call")
        self.name = name
        self.limit = limit
        self._probe = probe
        self.reset()

    def reset(self) -> None:
        """Forget workers and calls: after a fork, the child has none of them."""
        self._lock = threading.Lock()
        self._freed = threading.Condition(self._lock)
        self._idle: list[SimpleQueue[Call[Any]]] = []
        self._workers = 0
        self._stuck: set[Call[Any]] = set()
        self._later: deque[Callable[[], object]] = deque()
        self._state: State = "closed"
        self._trial = False
        self._keeping = False
        self._probe_deadline = 1.0

    # What is going on, for health pages and tests.

    @property
    def state(self) -> State:
        """``closed`` (calls pass), ``open`` (no call passes) or ``half-open`` (one call passes)."""
        return self._state

    @property
    def overdue(self) -> int:
        """Number of calls that nobody waits for any more and that have not returned."""
        return len(self._stuck)

    @property
    def workers(self) -> int:
        """Number of worker threads, idle ones included."""
        return self._workers

    # Calls

    def call(
        self,
        work: Callable[[Call[T]], T],
        deadline: float,
        *,
        late: Callable[[], object] | None = None,
        subject: Hashable = None,
    ) -> T:
        """Return ``work(call)``, made in a worker, or raise ``StorageUnavailable`` after *deadline* seconds.

        If the call ends after it was given up, *late* is called in the worker. A *subject* (a name)
        on which a call is overdue is not asked again before that call has returned.
        """
        return self.start(work, deadline, late=late, subject=subject).result()

    def start(
        self,
        work: Callable[[Call[T]], T],
        deadline: float,
        *,
        late: Callable[[], object] | None = None,
        subject: Hashable = None,
    ) -> Call[T]:
        """Begin a call and do not wait for it, unless all workers are busy."""
        call = Call(self, work, late, subject, deadline)
        with self._lock:
            self._admit(call)
            try:
                self._wait_for_worker(call)
                self._hand_over(call)
            except BaseException:
                self._end_trial(call, succeeded=False)
                raise
        return call

    def clean_up(self, work: Callable[[], object], deadline: float) -> None:
        """Do *work*, now or once the mount answers again.

        At the end of the interpreter no worker runs any more, and waiting for one would never end. The
        kernel closes what is open.
        """
        if sys.is_finalizing():
            return
        try:
            call = self.start(lambda _call: work(), deadline)
        except StorageUnavailable:
            with self._lock:
                self._later.append(work)
                self._start_keeper()
            return
        try:
            call.result()
        except OSError as error:
            if not call.abandoned:
                log.warning("a clean-up on the media volume failed: %s", error)

    def _admit(self, call: Call[Any]) -> None:
        if len(self._stuck) >= self.limit:
            raise _unavailable(f"{self.limit} calls are outstanding")
        if self._state == "open" or (self._state == "half-open" and self._trial and not call.trial):
            if self._state == "open":
                self._start_keeper()
            raise _unavailable("it does not answer")
        if call.subject is not None and any(other.subject == call.subject for other in self._stuck):
            raise _unavailable(f"an earlier call for {call.subject} has not returned")
        if self._state == "half-open":
            self._trial = call.trial = True

    def _wait_for_worker(self, call: Call[Any]) -> None:
        while not self._idle and self._workers >= self.limit:
            left = call.until - time.monotonic()
            if left <= 0:
                raise _unavailable(f"{self.limit} calls are running")
            self._freed.wait(left)
            self._admit(call)

    def _hand_over(self, call: Call[Any]) -> None:
        if self._idle:
            self._idle.pop().put(call)
            return
        inbox: SimpleQueue[Call[Any]] = SimpleQueue()
        inbox.put(call)
        thread = threading.Thread(target=self._serve, args=(inbox,), name=f"mount {self.name}", daemon=True)
        try:
            thread.start()
        except RuntimeError as error:
            raise _unavailable(f"no thread for the call: {error}", errno.EAGAIN) from error
        self._workers += 1

    def _serve(self, inbox: SimpleQueue[Call[Any]]) -> None:
        """Make calls, one after the other: the life of a worker."""
        while True:
            try:
                call = inbox.get(timeout=IDLE)
            except Empty:
                with self._lock:
                    if inbox not in self._idle:  # a call is on its way
                        continue
                    self._idle.remove(inbox)
                    self._workers -= 1
                    return
            call.run()
            with self._lock:
                call.returned = True
                self._stuck.discard(call)
                self._end_trial(call, succeeded=not call.overdue)
                self._idle.append(inbox)
                self._freed.notify()
            call.announce()
            del call

    # The breaker

    def _end_trial(self, call: Call[Any], *, succeeded: bool) -> None:
        if call.trial:
            call.trial = self._trial = False
            if succeeded and self._state == "half-open":
                self._state = "closed"
                log.warning("%s answers again", self.name)
            self._freed.notify_all()

    def _left(self, call: Call[Any]) -> None:
        """Nobody waits for *call*, for a reason that is not the mount's."""
        with self._lock:
            if not call.returned:
                self._stuck.add(call)
                self._end_trial(call, succeeded=False)

    def _overdue(self, call: Call[Any]) -> None:
        with self._lock:
            if call.returned:  # just now
                return
            call.overdue = True
            self._stuck.add(call)
            self._end_trial(call, succeeded=False)
            if self._state == "closed":
                log.error("%s does not answer; it is left alone until a probe returns", self.name)
            self._state = "open"
            self._freed.notify_all()
            self._probe_deadline = call.deadline
            self._start_keeper()

    def _start_keeper(self) -> None:
        if not self._keeping:
            thread = threading.Thread(target=self._keep, name=f"mount probe {self.name}", daemon=True)
            with contextlib.suppress(RuntimeError):  # no thread: the next asker tries again
                thread.start()
                self._keeping = True

    def _keep(self) -> None:
        """Probe until the mount answers in time, then do what was left for later; one thread at most."""
        while True:
            began = time.monotonic()
            with contextlib.suppress(Exception):  # an error is an answer, too
                self._probe()
            if time.monotonic() - began > self._probe_deadline:
                continue
            with self._lock:
                if self._state == "open":
                    self._state = "half-open"
                if not self._later:
                    self._keeping = False
                    return
                work = self._later.popleft()
            try:
                work()
            except Exception:
                log.exception("a clean-up on the media volume failed")


_guards: dict[str, Guard] = {}
_guards_lock = threading.Lock()


def guard_for(root: str, limit: int) -> Guard:
    """Return this process's guard of the mount at *root*."""
    guard = _guards.get(root)
    if guard is None:
        with _guards_lock:
            # Not a stat, which the kernel or a cache may answer.
            guard = _guards.setdefault(root, Guard(root, lambda: os.statvfs(root), limit))
    guard.limit = limit
    return guard


def _after_fork() -> None:
    global _guards_lock
    _guards_lock = threading.Lock()
    for guard in _guards.values():
        guard.reset()


os.register_at_fork(after_in_child=_after_fork)
