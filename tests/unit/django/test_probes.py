"""Probes: never hang, never pile up."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tribrick.probes import Probe


class Gate:
    """A check that hangs until it is opened."""

    def __init__(self) -> None:
        self.open = threading.Event()
        self.calls = 0

    def __call__(self) -> str:
        self.calls += 1
        assert self.open.wait(30), "the test never opened the gate"
        return f"call {self.calls}"


@pytest.fixture
def gate() -> Iterator[Gate]:
    made = Gate()
    yield made
    made.open.set()


def threads(name: str) -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == f"probe-{name}"]


def await_end(name: str) -> None:
    for thread in threads(name):
        thread.join(10)
    assert not threads(name)


def test_yes_and_no() -> None:
    def refuse() -> None:
        raise OSError(107, "Transport endpoint\nis not connected")

    yes = Probe("yes", lambda: "fine").ask()
    assert (yes.ok, yes.detail) == (True, "fine")
    assert Probe("none", lambda: None).ask().detail == "ok"
    no = Probe("no", refuse).ask()
    assert (no.ok, no.detail) == (False, "[Errno 107] Transport endpoint is not connected")


def test_a_hung_check_is_answered_within_the_deadline(gate: Gate) -> None:
    probe = Probe("hung", gate, deadline=0.2)
    begin = time.monotonic()
    result = probe.ask()
    took = time.monotonic() - begin
    assert 0.2 <= took < 5.0
    assert not result.ok
    assert result.detail == "timed out after 0.2 s; never answered before"


def test_only_one_call_is_outstanding_over_many_askers(gate: Gate) -> None:
    probe = Probe("crowd", gate, deadline=0.2)
    answers: list[float] = []

    def ask() -> None:
        begin = time.monotonic()
        assert not probe.ask().ok
        answers.append(time.monotonic() - begin)

    askers = [threading.Thread(target=ask) for _ in range(50)]
    for asker in askers:
        asker.start()
    for asker in askers:
        asker.join(10)
    assert len(answers) == 50
    assert max(answers) < 1.5
    assert len(threads("crowd")) == gate.calls == 1
    begin = time.monotonic()
    for _ in range(200):  # past the deadline nobody waits at all
        assert not probe.ask().ok
    assert time.monotonic() - begin < 1.0
    assert len(threads("crowd")) == gate.calls == 1


def test_it_recovers_and_then_tells_the_last_known_state(gate: Gate) -> None:
    probe = Probe("again", gate, deadline=0.2)
    assert not probe.ask().ok
    gate.open.set()
    await_end("again")
    assert probe.ask().detail == "call 2"
    await_end("again")
    gate.open.clear()
    assert "last answer 0 s ago: call 2" in probe.ask().detail


def test_threads_do_not_keep_the_process_alive(gate: Gate) -> None:
    probe = Probe("daemon", gate, deadline=0.01)
    probe.ask()
    assert [thread.daemon for thread in threads("daemon")] == [True]


def test_a_forked_process_asks_anew() -> None:
    code = """
import os, threading
from tribrick.probes import Probe
gate = threading.Event()
probe = Probe("fork", lambda: gate.wait(30), deadline=0.05)
assert not probe.ask().ok  # a call is outstanding, in the parent only
gate.set()
child = os.fork()
if child == 0:
    probe.deadline = 10
    os._exit(0 if probe.ask().ok else 1)
raise SystemExit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    source = Path(__file__).resolve().parents[3] / "src"
    environment = os.environ | {"PYTHONPATH": str(source)}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, timeout=60, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_a_deadline_is_needed() -> None:
    with pytest.raises(ValueError, match="greater than zero"):
        Probe("x", lambda: None, deadline=0)
