"""A rollout: the first, a second with nothing to do, and one with one variable changed; seconds and tasks.

It makes a lab of its own (--name, default: rollout), runs site.yml there as an operator would, and takes the lab down
again. The base packages are in the lab's image, as everywhere in the lab; with --image bare the rollout installs them.
Tasks are those that ansible-playbook prints: of a play that takes host by host, once for each host. Expected to take
about 330 s if the lab's images are there, else 80 s more. What ansible-playbook said is in .lab/bench/rollout.log.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from statistics import median
from typing import Final

from kit.bench import RESULTS, Figures, Say
from kit.benchlib import Quiet, Ratio, Series, picture_of_ratios, positive
from kit.lab import PLAYBOOK, ROLLOUT_WAIT, ROOT, Lab, containers
from kit.run import KitError, stream

OWN_LAB: Final = "rollout"  # main() makes no demands on the lab: this part makes it
REPEATS: Final = 2
LAB_WAIT: Final = 1800.0
END_WAIT: Final = 60.0  # for ./scripts/lab to end what it has started
LOG: Final = RESULTS / "rollout.log"  # beside the figures: the lab's own directory goes with the lab
# What an operator changes: a line in nginx's configuration on every node.
VARIABLE: Final = "media_browser_max_age"
ENVIRONMENT: Final = {
    "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
    "ANSIBLE_NOCOLOR": "1",
    "ANSIBLE_FORCE_COLOR": "0",
    "PYTHONUNBUFFERED": "1",
    "LC_ALL": "C.UTF-8",
}
RUNS: Final = {"first": "first run", "again": "nothing changed", "change": "one variable changed"}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the part's options."""
    parser.add_argument("--repeats", type=positive, default=REPEATS, metavar="N", help=f"runs (default: {REPEATS})")
    parser.add_argument("--image", choices=["ready", "bare"], default="ready", help="what the nodes start with")


@dataclass(frozen=True)
class Run:
    """What a run of site.yml took: tasks as they are printed, results once for each host."""

    seconds: float
    tasks: int
    results: int
    changed: int


class Count:
    """Counts tasks in ansible-playbook's output, and reads its recap."""

    def __init__(self) -> None:
        """Nothing seen yet."""
        self.tasks = self.results = self.changed = 0
        self.hosts = 0
        self.task = "starting"

    def __call__(self, line: str) -> str | None:
        """Take a line; nothing is printed but failures."""
        if found := re.match(r"(?:TASK|RUNNING HANDLER) \[(.*)\]", line):
            self.tasks += 1
            self.task = found[1]
        elif found := re.match(r"\S+\s+: ok=(\d+)\s+changed=(\d+)\s+unreachable=(\d+)\s+failed=(\d+)\s", line):
            self.hosts += 1
            self.results += int(found[1])
            self.changed += int(found[2])
        return line if line.startswith(("fatal:", "ERROR!", "[ERROR]")) else None

    def result(self, seconds: float) -> Run:
        """Return what was counted; without a recap there is no figure."""
        if not self.hosts or not self.tasks:
            raise KitError("ansible-playbook ended well, but without a recap.")
        return Run(seconds, self.tasks, self.results, self.changed)


def rollout(lab: Lab, say: Say, extra: Sequence[str] = ()) -> Run:
    """Run site.yml once."""
    count, started = Count(), time.monotonic()
    words = ["--inventory", str(lab.inventory), "--vault-password-file", str(lab.vault_password), *extra, "site.yml"]
    stream(
        Quiet(log=LOG), [*PLAYBOOK, *words], what="site.yml", deadline=ROLLOUT_WAIT,
        show=count, now_at=lambda: count.task, env=ENVIRONMENT, cwd=ROOT,
    )  # fmt: skip
    done = count.result(time.monotonic() - started)
    say(f"site.yml: {done.seconds:.1f} s, {done.tasks} tasks, {done.results} results, {done.changed} changed")
    return done


def lab_command(*words: str) -> None:
    """Run ./scripts/lab; what it prints is progress."""
    # A program that is started in the background ignores Ctrl-C, and so would what it starts.
    command = ["env", "--default-signal=INT", str(ROOT / "scripts" / "lab"), *words]
    # In a session of its own: with Ctrl-C it is ended once, by us, and not in the midst of ending its own programs.
    process = subprocess.Popen(command, stdout=sys.stderr, stdin=subprocess.DEVNULL, start_new_session=True)
    try:
        code = process.wait(LAB_WAIT)
    except subprocess.TimeoutExpired:
        end(process)
        raise KitError(f"'./scripts/lab {' '.join(words)}' was not done within {LAB_WAIT:.0f} s.") from None
    except BaseException:
        end(process)
        raise
    if code:
        raise KitError(f"'./scripts/lab {' '.join(words)}' failed ({code}).")


def end(process: subprocess.Popen[bytes]) -> None:
    """End ./scripts/lab as Ctrl-C does, so that it ends its ansible-playbook: nothing may go on in a lab that goes."""
    process.send_signal(signal.SIGINT)
    try:
        process.wait(END_WAIT)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


@contextlib.contextmanager
def without_site(lab: Lab, image: str, say: Say) -> Iterator[None]:
    """Have a lab for a while."""
    try:
        say(f"a lab '{lab.name}' without the site")
        lab_command("up", "--name", lab.name, "--no-site", "--image", image)
        yield
    except BaseException:
        try:
            lab_command("down", "--name", lab.name)
        except KitError as error:  # what went wrong first is what must be told
            say(f"the lab is still there: {error}")
        raise
    lab_command("down", "--name", lab.name)


def run(lab: Lab, options: argparse.Namespace, say: Say) -> Figures:
    """Measure in a lab of its own."""
    if containers(lab) or lab.state.exists():
        raise KitError(
            f"There is a lab '{lab.name}' already; give another name, or: ./scripts/lab down --name {lab.name}"
        )
    LOG.parent.mkdir(parents=True, exist_ok=True)
    LOG.write_bytes(b"")
    found: dict[str, list[Run]] = {}
    with without_site(lab, options.image, say):
        release = str(lab.recall()["release"])
        found["first"] = [rollout(lab, say)]
        found["again"] = [rollout(lab, say) for _ in range(options.repeats)]
        found["change"] = [
            rollout(lab, say, ["--extra-vars", json.dumps({VARIABLE: 3600 + number})])
            for number in range(options.repeats)
        ]
    return {"debian": release} | figures(found, options.image)


def figures(found: dict[str, list[Run]], image: str) -> Figures:
    """Return medians of each kind of run. A change that changed nothing is an error."""
    if not all(one.changed for one in found["change"]):
        raise KitError(f"{VARIABLE} had another value, and a run changed nothing.")
    values: Figures = {"image": image, "variable": VARIABLE, "repeats": len(found["again"])}
    for name, runs in found.items():
        values[f"{name}_seconds"] = round(median(one.seconds for one in runs), 1)
        values[f"{name}_seconds_low"] = round(min(one.seconds for one in runs), 1)
        values[f"{name}_seconds_high"] = round(max(one.seconds for one in runs), 1)
        values[f"{name}_tasks"] = runs[-1].tasks
        values[f"{name}_results"] = runs[-1].results
        values[f"{name}_changed"] = max(one.changed for one in runs)
    return values


def lines(values: Figures) -> list[str]:
    """Return a table for people."""
    out = [f"site.yml, three nodes and a database, Debian {values['debian']}, image {values['image']}"]
    for name, text in RUNS.items():
        start = f"{name}_"
        spread = f"({values[f'{start}seconds_low']:g}-{values[f'{start}seconds_high']:g})"
        out.append(
            f"{text:<22}{values[f'{start}seconds']:>7.1f} s {spread:<16}{values[f'{start}tasks']} tasks, "
            f"{values[f'{start}results']} results, {values[f'{start}changed']} changed"
        )
    return out


def picture(values: Figures) -> str:
    """Draw the seconds as a part of the first run's."""
    first = values["first_seconds"]
    ratios = [Ratio(*(values[f"{name}_seconds{end}"] / first for end in ("", "_low", "_high"))) for name in RUNS]
    note = f"time of site.yml, as a part of the first run's {first:g} s; three nodes in containers"
    return picture_of_ratios("Rolling out", note, list(RUNS.values()), [Series("seconds / first run", ratios)])
