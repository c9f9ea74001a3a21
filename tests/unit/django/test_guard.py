"""The guard: bounded calls, the breaker, late calls, forks."""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections.abc import Callable, Iterator

import pytest

from tribrick.errors import StorageUnavailable
from tribrick.storage import guard as module
from tribrick.storage.guard import Call, Guard

SHORT = 0.15


class Thing:
    """A mount that hangs on demand."""

    def __init__(self) -> None:
        self.works = threading.Event()
        self.works.set()
        self.probes = 0
        self.in_probe = 0
        self.most_in_probe = 0
        self.calls = 0

    def probe(self) -> None:
        self.probes += 1
        self.in_probe += 1
        self.most_in_probe = max(self.most_in_probe, self.in_probe)
        self.works.wait(20)
        self.in_probe -= 1

    def call(self, _call: object = None) -> str:
        self.calls += 1
        assert self.works.wait(20)
        return "yes"


@pytest.fixture
def thing() -> Iterator[Thing]:
    made = Thing()
    yield made
    made.works.set()


@pytest.fixture
def guard(thing: Thing) -> Guard:
    return Guard("test", thing.probe, limit=3)


def until(condition: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < end, f"not within 10 s: {what}"
        threading.Event().wait(0.002)


def refused_at_once(guard: Guard, thing: Thing, match: str = "not available") -> None:
    before, began = thing.calls, time.monotonic()
    with pytest.raises(StorageUnavailable, match=match):
        guard.call(thing.call, 5)
    assert time.monotonic() - began < 2  # and not the five seconds that it might take
    assert thing.calls == before


def hang(guard: Guard, thing: Thing) -> None:
    """Let one call pass its deadline."""
    thing.works.clear()
    with pytest.raises(StorageUnavailable, match=f"within {SHORT} s"):
        guard.call(thing.call, SHORT)


def test_answers_and_errors_pass(guard: Guard) -> None:
    assert guard.call(lambda _call: 5, 1) == 5

    def fail(_call: object) -> None:
        raise KeyError("x")

    with pytest.raises(KeyError):
        guard.call(fail, 1)
    assert guard.state == "closed"
    assert guard.workers == 1  # the same one did both


def test_a_hung_call_opens_the_breaker_and_one_probe_watches(guard: Guard, thing: Thing) -> None:
    hang(guard, thing)
    assert guard.state == "open"
    for _ in range(20):
        refused_at_once(guard, thing, "does not answer")
    assert (thing.probes, thing.most_in_probe) == (1, 1)
    assert guard.workers == guard.overdue == 1
    thing.works.set()
    until(lambda: guard.state == "half-open", "the probe returned")
    assert guard.call(thing.call, 1) == "yes"
    assert guard.state == "closed"
    until(lambda: guard.overdue == 0, "the late call returned")


def test_half_open_lets_one_through(guard: Guard, thing: Thing) -> None:
    hang(guard, thing)
    thing.works.set()
    until(lambda: guard.state == "half-open" and not guard.overdue, "the probe returned")
    gate = threading.Event()
    trial = guard.start(lambda _call: gate.wait(20), 20)
    refused_at_once(guard, thing, "does not answer")
    gate.set()
    assert trial.result()
    assert guard.call(thing.call, 1) == "yes"


def test_a_failed_trial_opens_it_again(guard: Guard, thing: Thing) -> None:
    hang(guard, thing)
    thing.works.set()
    until(lambda: guard.state == "half-open" and not guard.overdue, "the probe returned")
    hang(guard, thing)
    assert guard.state == "open"
    refused_at_once(guard, thing)
    thing.works.set()
    until(lambda: guard.state == "half-open", "the probe returned")


def test_a_trial_that_gives_up_makes_way(guard: Guard, thing: Thing) -> None:
    hang(guard, thing)
    thing.works.set()
    until(lambda: guard.state == "half-open" and not guard.overdue, "the probe returned")
    gate = threading.Event()
    guard.start(lambda _call: gate.wait(20), 20).abandon()
    assert guard.call(thing.call, 1) == "yes"
    assert guard.state == "closed"
    gate.set()


def test_an_error_is_an_answer(guard: Guard, thing: Thing) -> None:
    def fails() -> None:
        raise OSError(107, "not connected")

    guard._probe = fails
    hang(guard, thing)
    until(lambda: guard.state == "half-open", "the probe returned")
    thing.works.set()


def test_a_slow_probe_does_not_close_it(guard: Guard, thing: Thing) -> None:
    """What needs longer than the deadline has not answered."""
    pauses = [0.0, 2 * SHORT, 2 * SHORT]
    gate = threading.Event()
    guard._probe = lambda: gate.wait(pauses.pop())
    hang(guard, thing)
    until(lambda: guard.state == "half-open", "a probe returned in time")
    assert pauses == []
    thing.works.set()


def test_outstanding_calls_are_bounded(guard: Guard, thing: Thing) -> None:
    guard._probe = lambda: None  # only some calls hang, and the probe is none of them
    threads = threading.active_count()
    thing.works.clear()
    for number in range(3):
        until(lambda: guard.state != "open", "the probe returned")
        with pytest.raises(StorageUnavailable, match="within"):
            guard.call(thing.call, SHORT)
        assert guard.overdue == number + 1
    until(lambda: guard.state != "open", "the probe returned")
    for _ in range(20):
        refused_at_once(guard, thing, "3 calls are outstanding")
    assert guard.workers == 3
    assert threading.active_count() <= threads + 3 + 1
    thing.works.set()
    until(lambda: guard.overdue == 0, "they returned")
    assert guard.call(thing.call, 1) == "yes"
    assert guard.workers == 3


def test_more_askers_than_workers_wait_for_one(guard: Guard) -> None:
    running, most, lock = 0, 0, threading.Lock()
    answers: list[int] = []

    def work(number: int) -> int:
        nonlocal running, most
        with lock:
            running += 1
            most = max(most, running)
        threading.Event().wait(0.01)
        with lock:
            running -= 1
        return number

    def ask(number: int) -> None:
        answers.append(guard.call(lambda _call: work(number), 10))

    threads = [threading.Thread(target=ask, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert sorted(answers) == list(range(30))
    assert most == guard.workers == 3


def test_who_waits_for_a_worker_is_answered_when_the_breaker_opens(guard: Guard, thing: Thing) -> None:
    thing.works.clear()
    calls = [guard.start(thing.call, SHORT if number == 0 else 15) for number in range(3)]
    said: list[str] = []

    def ask() -> None:
        try:
            guard.call(thing.call, 15)
        except StorageUnavailable as error:
            said.append(str(error))

    waiting = threading.Thread(target=ask)
    waiting.start()
    with pytest.raises(StorageUnavailable):
        calls[0].result()
    waiting.join(5)
    assert said and "does not answer" in said[0]
    thing.works.set()
    assert [call.result() for call in calls[1:]] == ["yes", "yes"]  # they had not been given up


def test_a_busy_mount_is_not_a_hung_one(guard: Guard, thing: Thing) -> None:
    thing.works.clear()
    calls = [guard.start(thing.call, 15) for _ in range(3)]
    with pytest.raises(StorageUnavailable, match="3 calls are running"):
        guard.call(thing.call, SHORT)
    assert guard.state == "closed"
    thing.works.set()
    assert [call.result() for call in calls] == ["yes"] * 3


def test_late_calls_are_undone_and_never_answered(guard: Guard, thing: Thing) -> None:
    done: list[str] = []
    thing.works.clear()

    def work(call: Call[str]) -> str:
        thing.call()
        done.append("work" if call.abandoned else "in time")
        return "late"

    with pytest.raises(StorageUnavailable):
        guard.call(work, SHORT, late=lambda: done.append("undone"))
    assert done == []
    thing.works.set()
    until(lambda: len(done) == 2, "the late call returned")
    assert done == ["work", "undone"]


def test_either_answered_or_undone(guard: Guard) -> None:
    """Calls that end at the very deadline: each is exactly one of the two."""
    guard._probe = lambda: None
    outcomes = {"answered": 0, "undone": 0}
    for number in range(150):
        undone = threading.Event()
        pause = 0.002 + (number % 7 - 3) * 0.0003
        until(lambda: guard.state != "open" and not guard.overdue, "the breaker let one through")
        try:
            guard.call(lambda _call, pause=pause: time.sleep(pause), 0.002, late=undone.set)  # type: ignore[misc]
            outcomes["answered"] += 1
            assert not undone.is_set()
        except StorageUnavailable:
            outcomes["undone"] += 1
            assert undone.wait(5)
    assert min(outcomes.values()) > 0, outcomes


def test_who_is_interrupted_leaves_nothing(guard: Guard) -> None:
    undone, gate = threading.Event(), threading.Event()
    call = guard.start(lambda _call: gate.wait(20), 20, late=undone.set)
    call.abandon()
    assert guard.state == "closed"  # not the mount's fault
    gate.set()
    assert undone.wait(5)
    until(lambda: guard.overdue == 0, "the call returned")


def test_a_name_with_an_overdue_call_is_not_asked_again(guard: Guard, thing: Thing) -> None:
    guard._probe = lambda: None
    thing.works.clear()
    with pytest.raises(StorageUnavailable):
        guard.call(thing.call, SHORT, subject="a")
    until(lambda: guard.state == "half-open", "the probe returned")
    with pytest.raises(StorageUnavailable, match="earlier call for a"):
        guard.call(thing.call, SHORT, subject="a")
    assert guard.call(lambda _call: "other", 1, subject="b") == "other"
    thing.works.set()
    until(lambda: guard.overdue == 0, "it returned")
    assert guard.call(thing.call, 1, subject="a") == "yes"


def test_clean_up_waits_for_the_mount(guard: Guard, thing: Thing) -> None:
    done: list[str] = []
    hang(guard, thing)
    began = time.monotonic()
    guard.clean_up(lambda: done.append("cleaned"), 5)
    assert time.monotonic() - began < 2  # and not five
    assert done == []
    thing.works.set()
    until(lambda: done == ["cleaned"], "it was cleaned up")


def test_a_clean_up_that_fails_ends_nothing(guard: Guard, thing: Thing, caplog: pytest.LogCaptureFixture) -> None:
    def fails() -> None:
        raise ValueError("broken")

    done: list[str] = []
    hang(guard, thing)
    guard.clean_up(fails, 5)
    guard.clean_up(lambda: done.append("cleaned"), 5)
    thing.works.set()
    until(lambda: done == ["cleaned"], "the next one was done")
    assert "clean-up on the media volume failed" in caplog.text


def test_idle_workers_end(thing: Thing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE", 0.05)
    guard = Guard("idle", thing.probe, limit=3)
    thing.works.clear()
    calls = [guard.start(thing.call, 10) for _ in range(3)]
    thing.works.set()
    assert [call.result() for call in calls] == ["yes"] * 3
    until(lambda: guard.workers == 0, "the workers ended")
    until(lambda: not any("mount idle" in thread.name for thread in threading.enumerate()), "the threads ended")
    assert guard.call(thing.call, 1) == "yes"


def test_calls_and_idle_ends_do_not_miss_each_other(thing: Thing, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "IDLE", 0.001)
    guard = Guard("race", thing.probe, limit=2)
    pause = threading.Event()
    for number in range(300):
        assert guard.call(thing.call, 5) == "yes"
        pause.wait(0.0005 + number % 10 * 0.0001)


def test_a_call_given_to_a_worker_that_was_about_to_end_is_made(thing: Thing, monkeypatch: pytest.MonkeyPatch) -> None:
    class Inbox:
        """One whose idle time ends at the moment when a call comes in."""

        def __init__(self) -> None:
            self.items: list[object] = []
            self.came = threading.Event()
            self.gets = 0

        def put(self, item: object) -> None:
            self.items.append(item)
            self.came.set()

        def get(self, **_options: float) -> object:
            self.gets += 1
            if not self.came.wait(5) or self.gets == 2:
                raise module.Empty
            self.came.clear()
            return self.items.pop()

    monkeypatch.setattr(module, "SimpleQueue", Inbox)
    guard = Guard("narrow", thing.probe, limit=1)
    assert guard.call(thing.call, 5) == "yes"
    assert guard.call(thing.call, 5) == "yes"
    assert guard.workers == 1


def test_a_call_that_returns_at_the_last_moment_opens_nothing(guard: Guard, thing: Thing) -> None:
    call = guard.start(thing.call, 5)
    until(lambda: call.returned, "the call returned")
    guard._overdue(call)  # as an asker does whose wait ended before it
    guard._left(call)
    assert (guard.state, guard.overdue) == ("closed", 0)
    assert call.result() == "yes"


def test_no_thread_is_an_answer(guard: Guard, thing: Thing, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(_self: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    with monkeypatch.context() as patch:
        patch.setattr(threading.Thread, "start", refuse)
        with pytest.raises(StorageUnavailable, match="no thread"):
            guard.call(thing.call, 1)
    assert guard.call(thing.call, 1) == "yes"


def test_a_child_starts_afresh(thing: Thing) -> None:
    """A fork in the middle of everything: workers, a hung call, an open breaker."""
    root = f"/test/{time.monotonic_ns()}"
    guard = module.guard_for(root, 3)
    guard._probe = thing.probe
    assert guard.call(thing.call, 1) == "yes"
    hang(guard, thing)
    with guard._lock:  # as another thread might hold it
        child = os.fork()
    if child == 0:
        with contextlib.suppress(BaseException):
            thing.works = threading.Event()
            thing.works.set()
            fresh = guard.state == "closed" and guard.workers == guard.overdue == 0
            os._exit(0 if fresh and guard.call(thing.call, 2) == "yes" else 3)
        os._exit(4)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert guard.state == "open"
    assert module.guard_for(root, 3) is guard
    thing.works.set()


def test_a_guard_without_room_is_refused(thing: Thing) -> None:
    with pytest.raises(ValueError, match="at least one"):
        Guard("none", thing.probe, limit=0)
