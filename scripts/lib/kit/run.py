"""Runs programs with a deadline, shows that they move on, and keeps a full log."""

from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

HEARTBEAT = 15.0  # seconds of silence after which a running program is reported on


class KitError(Exception):
    """Something an operator must know; the text is one sentence or two, ready to print."""


def _clock(seconds: float) -> str:
    return f"{int(seconds) // 60}:{int(seconds) % 60:02d}"


@dataclass
class Console:
    """What a person sees: lines with the time since the start, and how long each phase took."""

    log: Path | None = None
    started: float = field(default_factory=time.monotonic)
    phases: list[tuple[str, float]] = field(default_factory=list)

    def say(self, text: str) -> None:
        """Print one line of progress."""
        line = f"[{_clock(time.monotonic() - self.started):>5}] {text}"
        print(line, flush=True)
        self.record(line + "\n")

    def record(self, text: str) -> None:
        """Append to the full log only."""
        if self.log is not None:
            with self.log.open("a", encoding="utf-8") as stream:
                stream.write(text)

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Measure a part of the work under a name."""
        start = time.monotonic()
        yield
        self.phases.append((name, time.monotonic() - start))

    def timings(self) -> str:
        """Return one line: what each phase took and the whole."""
        parts = [f"{name} {took:.1f} s" for name, took in self.phases]
        return ", ".join([*parts, f"in all {time.monotonic() - self.started:.1f} s"])


def capture(
    args: Sequence[str],
    *,
    deadline: float,
    check: bool = True,
    text_in: str | None = None,
    env: Mapping[str, str] | None = None,
) -> subprocess.CompletedProcess[str]:
    """Run a short program and return what it printed."""
    try:
        done = subprocess.run(
            list(args),
            capture_output=True,
            check=False,
            encoding="utf-8",
            errors="replace",
            input=text_in,
            stdin=subprocess.DEVNULL if text_in is None else None,
            timeout=deadline,
            env=None if env is None else {**os.environ, **env},
        )
    except subprocess.TimeoutExpired:
        raise KitError(f"'{args[0]} {args[1]}' gave no answer in {deadline:.0f} s.") from None
    except FileNotFoundError:
        raise KitError(f"The program {args[0]} is missing on this machine.") from None
    if check and done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise KitError(f"'{' '.join(args[:3])}' failed ({done.returncode}): {said[-1] if said else 'silently'}")
    return done


def _everything(line: str) -> str | None:
    return line


def stream(
    console: Console,
    args: Sequence[str],
    *,
    what: str,
    deadline: float,
    show: Callable[[str], str | None] = _everything,
    now_at: Callable[[], str] | None = None,
    env: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    stdin: IO[bytes] | None = None,
) -> None:
    """Run a long program; print the lines that `show` lets through, log all of them.

    In a long silence `now_at` names what is under way; without it the latest line does.

    Ends the program and whatever it started when the deadline passes or we are interrupted.
    """
    try:
        process = subprocess.Popen(
            list(args),
            stdin=stdin or subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            encoding="utf-8",
            errors="replace",
            env=None if env is None else {**os.environ, **env},
            cwd=cwd,
            start_new_session=True,
        )
    except FileNotFoundError:
        raise KitError(f"The program {args[0]} is missing on this machine.") from None
    lines: queue.Queue[str | None] = queue.Queue()

    def read(output: IO[str]) -> None:
        for line in output:
            lines.put(line)
        lines.put(None)

    threading.Thread(target=read, args=(process.stdout,), daemon=True).start()
    end = time.monotonic() + deadline
    latest, printed = "", time.monotonic()
    try:
        while True:
            try:
                line = lines.get(timeout=1.0)
            except queue.Empty:
                line = ""
            now = time.monotonic()
            if line is None:
                break
            if line:
                console.record(line)
                latest = line.strip() or latest
                shown = show(line.rstrip("\n"))
                if shown is not None:
                    console.say(shown)
                    printed = now
            if now > end:
                raise KitError(f"{what} was not done within {deadline:.0f} s; last line: {latest}")
            if now - printed > HEARTBEAT:
                console.say(f"... {what}: {now_at() if now_at else latest[:100]}")
                printed = now
        code = process.wait(timeout=max(1.0, end - time.monotonic()))
    except BaseException:
        _end(process)
        raise
    if code != 0:
        where = f" (full log: {console.log})" if console.log else ""
        raise KitError(f"{what} failed with exit code {code}; last line: {latest}{where}")


def _end(process: subprocess.Popen[str]) -> None:
    """End a process group, politely first."""
    for number, patience in ((signal.SIGTERM, 10), (signal.SIGKILL, 5)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        try:
            process.wait(timeout=patience)
            return
        except subprocess.TimeoutExpired:
            continue
    print(f"warning: process {process.pid} could not be ended", file=sys.stderr)


def wait_for(
    console: Console,
    what: str,
    probe: Callable[[], str | None],
    *,
    deadline: float,
    interval: float = 0.5,
) -> None:
    """Wait until `probe` returns None; until then it returns what it saw instead."""
    start = printed = time.monotonic()
    while True:
        seen = probe()
        now = time.monotonic()
        if seen is None:
            return
        if now - start > deadline:
            raise KitError(f"Waited {deadline:.0f} s for {what}; at the end: {seen}")
        if now - printed > HEARTBEAT:
            console.say(f"... waiting for {what}: {seen}")
            printed = now
        time.sleep(interval)
