"""How long writes stall on each node of a lab while a fault holds, and what its watchers decided.

On every node a loop writes files of 20 KB with fsync, reads each back and pauses 20 ms. It shows the longest operation
and the errors of each node, for a fault of ./scripts/lab fault, for a fence by hand (fence:brick, fence:node), for a
link that is cut in one direction (one-way-link), or for nothing (none):

    PYTHONPATH=scripts/lib:tests .venv/bin/python -m faults.stalls --name LAB silence node2 --hold 12
    PYTHONPATH=scripts/lib:tests .venv/bin/python -m faults.stalls --name LAB fence:brick node2 --hold 1 --times 25
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from kit import faults
from kit.faults import drop_from, everywhere, filter_off, filter_on, inside
from kit.lab import NODES, Lab
from kit.run import Console, KitError, wait_for

LONG = 0.5  # seconds: operations that take longer are listed
WARM_UP = 3.0
STEPS = 15.0  # seconds that making, proving and lifting a fault may take
DEADLY = ("kill", "power-cut")  # the node's own loop dies with it
# Runs on a node: seconds, directory, where the result goes.
LOOP = f"""
import json, os, sys, time
seconds, directory, result = float(sys.argv[1]), sys.argv[2], sys.argv[3]
os.makedirs(directory, exist_ok=True)
data, number, found = os.urandom(20000), 0, []
end = time.time() + seconds
while time.time() < end:
    number += 1
    began, error = time.time(), ""
    try:
        path = f"{{directory}}/{{os.getpid()}}-{{number}}"
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        try:
            os.write(handle, data)
            os.fsync(handle)
        finally:
            os.close(handle)
        with open(path, "rb") as stream:
            if stream.read() != data:
                error = "other content"
    except OSError as caught:
        error = caught.strerror
    took = time.time() - began
    if error or took > {LONG}:
        found.append([began, took, error])
    time.sleep(0.02)  # a pause, as a visitor makes one
with open(result + ".part", "w") as stream:
    json.dump([number, found], stream)
os.rename(result + ".part", result)
"""


@dataclass(frozen=True)
class Seen:
    """What one node's loop saw."""

    operations: int
    slow: list[tuple[float, float]]  # when, seconds
    errors: list[tuple[float, str]]

    @classmethod
    def of(cls, text: str) -> Seen:
        """Read a loop's result."""
        number, found = json.loads(text)
        slow = [(began, took) for began, took, error in found if not error]
        return cls(number, slow, [(began, error) for began, _, error in found if error])

    def line(self, since: float) -> str:
        """Say it, with times since the fault."""
        worst = max((took for _, took in self.slow), default=0.0)
        text = f"longest {f'{worst:.2f} s' if worst else f'below {LONG} s'}, {self.operations} operations"
        if self.errors:
            first, last = self.errors[0][0] - since, self.errors[-1][0] - since
            kinds = ", ".join(sorted({error for _, error in self.errors}))
            text += f", {len(self.errors)} errors from {first:.1f} to {last:.1f} s ({kinds})"
        listed = " ".join(f"{began - since:.1f}:{took:.1f}" for began, took in self.slow[:12])
        return f"{text}{f'; slow ones (at:seconds) {listed}' if listed else ''}"


@contextlib.contextmanager
def one_way_link(lab: Lab, node: str) -> Iterator[str]:
    """Have one of the other nodes not hear a node, which hears it."""
    deaf = next(name for name in NODES if name != node)
    try:
        filter_on(lab, deaf, [drop_from([lab.addresses[node]])], [])
        yield f"{deaf} does not hear {node}"
    finally:
        filter_off(lab, deaf)


@contextlib.contextmanager
def fenced(lab: Lab, node: str, kind: str, hold: float, turn: int) -> Iterator[str]:
    """Have a node fenced by the watchers, as an operator does; the order ends by itself."""
    askers = [name for name in NODES if kind == "brick" or name != node]
    asker = askers[turn % len(askers)]
    inside(lab, asker, f"peer_watch fence {node} --kind {kind} --for {hold:g}s")
    yield f"{node} is fenced ({kind}), asked for on {asker}"


def fault(lab: Lab, name: str, node: str, hold: float, turn: int) -> contextlib.AbstractContextManager[str]:
    """Return what holds for a while."""
    if name == "none":
        return contextlib.nullcontext("nothing is broken")
    if name == "one-way-link":
        return one_way_link(lab, node)
    if name.startswith("fence:"):
        return fenced(lab, node, name.removeprefix("fence:"), hold, turn)
    return faults.make(lab, name, [node]).holding()


def unhealed(lab: Lab) -> str | None:
    """Return None when no file waits to be healed: else the next fault could hit its last good copy."""
    volume = lab.site_variables()["tribrick_volume"]
    said = inside(lab, next(iter(NODES)), f"gluster --mode=script volume heal {volume} info summary", deadline=60)
    waiting = [int(line.split(":")[1]) for line in said.splitlines() if line.startswith("Total Number of entries: ")]
    if len(waiting) == len(NODES) and not any(waiting):
        return None
    return f"{sum(waiting)} entries wait to be healed, {len(waiting)} bricks answered"


def run(lab: Lab, options: argparse.Namespace, console: Console) -> None:
    """One measurement."""
    wait_for(console, "all to be healed", lambda: unhealed(lab), deadline=300)
    place, result = f"{lab.site_variables()['tribrick_media_root']}/photos/stalls", "/run/stalls.json"
    seconds = WARM_UP + options.times * (options.hold + options.pause) + STEPS
    for node in NODES:
        words = shlex.join(["python3", "-c", LOOP, str(seconds), f"{place}/{node}", result])
        inside(lab, node, f"rm -f {result}; setsid {words} >/dev/null 2>&1 &")
    faults.stay(WARM_UP)
    since = time.time()
    for turn in range(options.times):
        with fault(lab, options.fault, options.node, options.hold, turn) as proof:
            console.say(f"{time.time() - since:6.1f} s: {proof}")
            faults.stay(options.hold)
        console.say(f"{time.time() - since:6.1f} s: over")
        faults.stay(options.pause)

    def read(node: str) -> Seen:
        text = ""

        def there() -> str | None:
            nonlocal text
            text = inside(lab, node, f"cat {result} 2>/dev/null || :")
            return None if text else f"{node} still writes"

        wait_for(console, f"the loop on {node}", there, deadline=seconds + 120)
        return Seen.of(text)

    # A node that was without power has forgotten its loop.
    kept = [node for node in NODES if node != options.node or options.fault not in DEADLY]
    for node, seen in everywhere(read, kept).items():
        print(f"{node}{'*' if node == options.node else ' '} {seen.line(since)}")
    for node in NODES:
        for line in verdicts(lab, node, since):
            print(f"    {node} {line}")


def verdicts(lab: Lab, node: str, since: float) -> list[str]:
    """Return what the node's watcher said since then."""
    said = inside(
        lab, node, f"journalctl -u tribrick-peer-watch --since @{int(since)} -o short-unix --no-pager -q", check=False
    )
    rows = [line.split(" ", 3) for line in said.splitlines()]
    return [f"{float(row[0]) - since:6.2f} s: {row[3]}" for row in rows if len(row) == 4 and "verdict" in row[3]]


def parser() -> argparse.ArgumentParser:
    """Return the command line."""
    main_ = argparse.ArgumentParser(
        prog="faults.stalls", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    main_.add_argument("--name", default="lab", help="which lab (default: lab)")
    main_.add_argument("fault", help="a fault of ./scripts/lab fault, fence:brick, fence:node, one-way-link, or none")
    main_.add_argument("node", choices=NODES)
    main_.add_argument("--hold", type=float, default=12, help="seconds for which it holds (default: 12)")
    main_.add_argument("--pause", type=float, default=12, help="seconds after it (default: 12)")
    main_.add_argument("--times", type=int, default=1, help="how often (default: 1)")
    return main_


def main(words: Sequence[str] | None = None) -> int:
    """Measure; errors are one sentence."""
    options = parser().parse_args(words)
    try:
        run(Lab(options.name), options, Console())
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
