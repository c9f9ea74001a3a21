"""The command ./scripts/torture: load, faults, and a verdict on every file of a lab that is up."""

from __future__ import annotations

import argparse
import dataclasses
import json
import secrets
import shlex
import sys
import threading
import time
from collections.abc import Sequence
from pathlib import Path

from faults import observer, timeline
from faults.checker import RED, Report, Seen, report, together
from faults.history import History, Operation, operations
from faults.nemesis import CLEAN_WAIT, NOTHING, SCENARIOS, Nemesis, choices
from faults.workload import EXTENSION, PAUSE, Workload
from kit.faults import inside
from kit.lab import NODES, Lab, _name, containers
from kit.run import Console, KitError, wait_for

STEADY = 10.0  # seconds of load before the first fault and after the last
CACHED = 1.0  # seconds that a mount believes what it knows of a file (performance.md-cache-timeout, entry-timeout)
CACHE_WAIT = 30.0  # and so long may others on that node go on looking at it
GONE_WAIT = 90.0  # the bytes of a deleted file may outlive its tombstone for as long: a timer removes them
EXAMPLES = f"""\
scenarios: {", ".join(SCENARIOS)}, all, {NOTHING}, or one fault by its name (./scripts/lab fault --help)

examples:
  ./scripts/lab up --disks xfs
  ./scripts/torture --scenario node_loss --seed 7 --minutes 5
  ./scripts/torture --scenario power-cut --hold 20
  ./scripts/torture --scenario all --seeds 10 --minutes 4     ten runs, then the sum

The history, the verdicts and a picture are in .lab/NAME/torture/SCENARIO-SEED, the sum of several seeds in
SCENARIO-FIRST-to-LAST.json beside them. Exit code: 0 nothing was lost, torn,
corrupted or resurrected; 1 something was; 2 the run could not be judged.
"""


def account(lab: Lab, user: str) -> str:
    """Make an account of this run's own, so that its list of files is ours; return its token."""
    token = secrets.token_hex(20)
    script = (
        f"export P={secrets.token_urlsafe(12)} K={token}; "
        f"exec tribrick-manage ensure_account {shlex.quote(user)} --password-env P --token-env K"
    )
    inside(lab, observer.FIRST, script, deadline=120)
    return token


@dataclasses.dataclass
class Run:
    """One run: load and faults on a lab, then the judgement."""

    lab: Lab
    console: Console
    seed: str
    place: Path  # where the files of this run go
    clients: int = 8
    renames: bool = True
    largest: int = 8 * 1024 * 1024
    pause: float = PAUSE
    files: int = 0  # that a client keeps at most; 0: no limit but the space

    def __post_init__(self) -> None:
        """Open the history."""
        self.place.mkdir(parents=True, exist_ok=True)
        self.history = History(self.place / "history.jsonl")
        # A file in each client's hands, and its directory: three bricks count them.
        under_way = 6 * (self.clients + len(NODES))
        self.nemesis = Nemesis(self.lab, self.history, self.console, self.seed, under_way)
        self.renames = self.renames and not observer.without_gluster(self.lab)
        self.mark = f"{secrets.token_hex(3)}"
        self.token = account(self.lab, f"judge-{self.mark}")
        self.directory = f"judge-{self.mark}" if self.renames else ""
        self.load = Workload(
            self.lab, self.token, self.seed, self.history, self.clients, directory=self.directory, largest=self.largest,
            pause=self.pause, files=self.files,
        )  # fmt: skip

    @property
    def root(self) -> str:
        """The mount."""
        return str(self.lab.site_variables()["tribrick_media_root"])

    def start(self) -> None:
        """Begin the load."""
        if self.directory:
            inside(self.lab, observer.FIRST, f"mkdir {self.root}/{self.directory}")
        self.load.start()

    def torture(self, scenario: str, minutes: float, hold: float, pause: float) -> None:
        """Load with faults for some minutes; the fault that is under way is ended in order."""
        end = time.monotonic() + minutes * 60
        self.start()
        try:
            self.nemesis.hold(STEADY)
            for name, hosts in self.nemesis.order(scenario):
                with self.nemesis.under(name, hosts):
                    self.nemesis.hold(hold)
                self.nemesis.hold(pause)
                if time.monotonic() >= end:
                    break
            else:
                self.nemesis.hold(max(0.0, end - time.monotonic()))
            self.nemesis.hold(STEADY)
        finally:
            self.load.finish()

    def judge(self) -> Report:
        """Wait until all is clean, look at every name, judge, write what was found."""
        self.load.finish()
        self.console.say("judging")
        self.nemesis.under_way = 0
        self.nemesis.recover()
        kinds = observer.kinds_of(self.lab)
        listed = observer.listing(self.lab, self.token, observer.FIRST, EXTENSION)
        ops = list(operations(self.history.events))
        uploads = {op.name for op in ops if op.invoke.what in ("upload", "replace") and op.outcome == "ok"}
        mounted = {op.invoke.name for op in ops if op.invoke.what == "create"}
        mounted |= {op.invoke.target for op in ops if op.invoke.what == "rename"}
        self._await_removal(uploads - listed.keys(), kinds[1])
        seen = observer.look_everywhere(self.lab, uploads | listed.keys(), kinds)
        seen += self._past_caches(observer.look_everywhere(self.lab, mounted, ("mount", "brick")), ops)
        self.history.close()
        result = report(self.seed, self.history.events, seen, listed, observer.places(kinds))
        self._write(result)
        if self.directory and not result.red:  # what was found is to be looked at
            inside(self.lab, observer.FIRST, f"rm -r {self.root}/{self.directory}", deadline=120)
        if self.load.problems:
            raise KitError(f"The load was not what it should be: {'; '.join(self.load.problems)}")
        return result

    def _past_caches(self, seen: list[Seen], ops: Sequence[Operation]) -> list[Seen]:
        """Ask mounts again for old names of renamed files; return what is seen in the end.

        A mount that has listed the directory answers for an old name from its cache, as long as it knows the file's
        attributes, which is a second after anybody looked at it there. So does the mount that made the rename, when it
        was told a failure and the bricks had done it. What the bricks say is not touched by this.
        """
        renames = [op for op in ops if op.invoke.what == "rename" and op.outcome in ("ok", "info")]
        old = {op.invoke.name for op in renames if op.outcome == "ok"}
        unsure = {op.invoke.name: op.invoke.target for op in renames if op.outcome == "info"}
        files = {(one.place, one.name) for one in seen if one.state == "file"}
        # Where it is under both names.
        both = {(place, name) for place, name in files if name in unsure and (place, unsure[name]) in files}
        end = time.monotonic() + CACHE_WAIT
        while cached := [
            one
            for one in seen
            if one.state == "file"
            and one.place.startswith("mount ")
            and (one.name in old or (one.place, one.name) in both)
        ]:
            if time.monotonic() > end:
                break
            threading.Event().wait(2 * CACHED)
            self.console.say(f"  {len(cached)} old names from caches of mounts; asking again")
            fresh: dict[tuple[str, str], Seen] = {}
            for place in {one.place for one in cached}:
                kind, node = place.split()
                names = sorted({one.name for one in cached if one.place == place})
                fresh |= {(place, one.name): one for one in observer.look(self.lab, kind, node, names)}
            seen = [fresh.get((one.place, one.name), one) for one in seen]
        return seen

    def _await_removal(self, names: set[str], kind: str) -> None:
        """Give the bytes of deleted files, and the caches of the web servers, the time that they may take."""
        end = time.monotonic() + GONE_WAIT
        while names and time.monotonic() < end:
            seen = observer.look(self.lab, kind, observer.FIRST, sorted(names))
            seen += [one for node in NODES for one in observer.look(self.lab, "web", node, sorted(names))]
            names = {one.name for one in seen if one.state != "absent"}
            if names:
                threading.Event().wait(2)

    def _write(self, result: Report) -> None:
        with (self.place / "verdicts.jsonl").open("w", encoding="utf-8") as file:
            file.writelines(json.dumps(dataclasses.asdict(verdict)) + "\n" for verdict in result.verdicts)
        write_facts(self.place / "report.json", self.seed, result)
        timeline.write(self.place / "timeline", self.history.events, list(NODES))


def write_facts(path: Path, seed: str, result: Report) -> None:
    """Write a report for programs."""
    bad = [v for v in result.verdicts if v.verdict not in ("stable", "unknown")]
    facts = {
        "seed": seed,
        "counts": result.counts,
        "numbers": result.numbers,
        "faults": result.faults,
        "findings": [dataclasses.asdict(verdict) for verdict in bad[:100]],
    }
    path.write_text(json.dumps(facts, indent=2) + "\n", encoding="utf-8")


def summary(result: Report) -> str:
    """Return what a person wants to know, before the last line."""
    lines = []
    columns = ("fault", "hosts", "read s", "upload s", "errors", "first upload s", "clean s")
    rows = []
    for fault in result.faults:
        healthy = {kind: fault.get(f"{kind} healthy", {}) for kind in ("read", "upload")}
        hit = {kind: fault.get(f"{kind} hit", {}) for kind in ("read", "upload")}
        rows.append(
            (
                fault["fault"], ",".join(fault["hosts"]),
                f"{healthy['read'].get('longest_stall', '-')}/{hit['read'].get('longest_stall', '-')}",
                f"{healthy['upload'].get('longest_stall', '-')}/{hit['upload'].get('longest_stall', '-')}",
                "/".join(str(sum(row.get("errors", 0) for row in side.values())) for side in (healthy, hit)),
                str(healthy["upload"].get("first_success_after_fault", "-")),
                str(fault.get("seconds_to_clean", "-")),
            )
        )  # fmt: skip
    if rows:
        widths = [max(len(row[i]) for row in (columns, *rows)) for i in range(len(columns))]
        lines += ["  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
                  for row in (columns, *rows)]  # fmt: skip
        lines.append("longest stall and errors: on healthy nodes / on the nodes that the fault hit")
    numbers = result.numbers
    share = numbers["acknowledged_under_fault"] / numbers["acknowledged"] if numbers["acknowledged"] else 0.0
    lines.append(
        f"{numbers['acknowledged']} acknowledged in {numbers['seconds']:.0f} s by {numbers['clients']} clients, "
        f"{numbers['acknowledged_writes']} of them writes, "
        f"{share:.0%} during a fault or within 60 s after it; {numbers['failed']} refused, {numbers['unknown']} unknown"
    )
    if numbers["longest_stale"]:
        lines.append(f"not found although acknowledged: {numbers['longest_stale']:.1f} s after it at the latest")
    lines.append(f"sizes: {', '.join(f'{word} {share:.0%}' for word, share in numbers['sizes'].items())}")
    for verdict in [v for v in result.verdicts if v.verdict in RED][:20]:
        lines.append(f"  {verdict.verdict}: {verdict.label} {verdict.name}: {'; '.join(verdict.reasons[:3])}")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    main_ = argparse.ArgumentParser(
        prog="./scripts/torture",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    main_.add_argument("--name", type=_name, default="lab", help="which lab (default: lab)")
    main_.add_argument("--scenario", required=True, help="see below")
    main_.add_argument("--seed", default="1", help="decides contents, choices and nodes (default: 1)")
    main_.add_argument("--seeds", type=int, default=1, help="so many runs, with the seeds that follow (default: 1)")
    main_.add_argument("--minutes", type=float, default=2.0, help="of load and faults, each run (default: 2)")
    main_.add_argument("--clients", type=int, default=8, help="that upload (default: 8)")
    main_.add_argument("--files", type=int, default=0, help="that a client keeps at most (default: what 24 MiB hold)")
    main_.add_argument("--hold", type=float, default=20.0, help="seconds that a fault holds (default: 20)")
    main_.add_argument("--pause", type=float, default=10.0, help="seconds between faults (default: 10)")
    return main_


def seeds(first: str, count: int) -> list[str]:
    """Return the seeds of some runs: the first, and the numbers after it."""
    if count == 1:
        return [first]
    if count < 1 or not first.isdecimal():
        raise KitError("Several seeds need a count of at least 1 and a number to start from: --seed 1 --seeds 10.")
    return [str(int(first) + number) for number in range(count)]


def one_run(console: Console, lab: Lab, seed: str, options: argparse.Namespace) -> Report:
    """Torture a lab with one seed, tell what was found, leave nothing behind."""
    wait_for(console, "the lab to be clean", lambda: observer.clean(lab), deadline=CLEAN_WAIT, interval=1)
    place = lab.state / "torture" / f"{options.scenario}-{seed}"
    run = Run(lab, console, seed, place, options.clients, files=options.files)
    run.torture(options.scenario, options.minutes, options.hold, options.pause)
    result = run.judge()
    print(f"{summary(result)}\n{place}/timeline.png\nseed {seed}: {result.line()}", flush=True)
    if not result.red:  # what was found is to be looked at
        run.load.tidy()
    return result


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    options = parser().parse_args(arguments)
    console = Console()
    lab = Lab(options.name)
    try:
        choices(options.scenario)
        chosen = seeds(options.seed, options.seeds)
        if not lab.recall().get("subnet") or not containers(lab):
            raise KitError(f"There is no lab '{lab.name}'; make it: ./scripts/lab up --disks xfs")
        if options.scenario == "outage" and not lab.spool:
            name = "" if lab.name == "lab" else f" --name {lab.name}"
            raise KitError(
                f"The lab '{lab.name}' has no spool, so every upload would be refused; give it one:"
                f" ./scripts/lab up{name} --spool"
            )
        with lab.alone():
            result = together([one_run(console, lab, seed, options) for seed in chosen])
    except (KitError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted; ./scripts/lab up repairs what is left", file=sys.stderr)
        return 130
    if len(chosen) > 1:
        print(f"all {len(chosen)} seeds\n{summary(result)}")
        name = f"{options.scenario}-{chosen[0]}-to-{chosen[-1]}.json"
        write_facts(lab.state / "torture" / name, f"{chosen[0]} to {chosen[-1]}", result)
    print(result.line())
    return 1 if result.red else 0


if __name__ == "__main__":
    sys.exit(main())
