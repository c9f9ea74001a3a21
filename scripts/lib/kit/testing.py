"""The command ./scripts/test: lint, unit tests, the lab from nothing, every Molecule scenario."""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import shutil
import subprocess
import sys
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import yaml

from kit.engine import apt_install, ensure_engine
from kit.inventory import BACKENDS
from kit.run import Console, KitError, capture, stream

ROOT = Path(__file__).resolve().parents[3]
LOGS = ROOT / ".lab" / "test"
BIN = Path(sys.executable).parent
CHOSEN = ("faults", "outage")  # the scenarios whose test files can be chosen one by one
# Scenarios that have not yet been green from one end to the other; they run only when they are named.
WHEN_NAMED = ("outage", "serving")
# And a file of the others, that takes too long for every run.
FILES_WHEN_NAMED = ("replacement",)
LAB = "fresh"  # a lab of its own: somebody's lab `lab` is left alone
UP_LIMIT, SECOND_RUN_LIMIT = 480.0, 60.0
PART_LIMIT = 5400.0
# The unit tests run as two processes beside each other; these take about as long as all others.
UNIT_HALF = tuple(f"tests/unit/django/{part}" for part in ("catalog", "spool", "remote", "sync"))
REASON_LINES = 12  # of an error, in the closing list
# Skips that are facts of the machine and say so; any other skipped test counts as failed.
ALLOWED_SKIPS: tuple[str, ...] = (r"^no IPv6 in this lab", r"^Django \d+\.\d+ is not installed")
# Debian package -> where its files are, and a program of it that may be elsewhere on the PATH.
UNIT_PACKAGES: dict[str, tuple[str, str]] = {
    "postgresql": ("usr/lib/postgresql/*/bin/postgres", "postgres"),
    "nginx-light": ("usr/sbin/nginx", "nginx"),
    "libnginx-mod-http-dav-ext": ("usr/lib/nginx/modules/ngx_http_dav_ext_module.so", ""),
    "lighttpd": ("usr/sbin/lighttpd", "lighttpd"),
    "lighttpd-mod-webdav": ("usr/lib/lighttpd/mod_webdav.so", ""),
    "haproxy": ("usr/sbin/haproxy", "haproxy"),
    "keepalived": ("usr/sbin/keepalived", "keepalived"),
    "litmus": ("usr/bin/litmus", "litmus"),
    "openssh-server": ("usr/sbin/sshd", "sshd"),
    "rsync": ("usr/bin/rsync", "rsync"),
    "inotify-tools": ("usr/bin/inotifywait", "inotifywait"),
}

EXAMPLES = """\
examples:
  ./scripts/test                 quick, lab, and the short set of every scenario
  ./scripts/test quick           lint and unit tests
  ./scripts/test long [NAME]     the long set: every node, every order
  ./scripts/test default         one part by its name
  ./scripts/test node_loss       one file of the fault tests
  ./scripts/test outage          the volume away; fallback: GlusterFS gone; backup: everything lost; or several words
  ./scripts/test list

TRIBRICK_SEED fixes what is otherwise chosen by the commit; it is printed.
Logs: .lab/test/PART.log. docs/testing.md says what each part proves.
"""


@dataclass
class Outcome:
    """What a part found: how many checks passed and failed, and the sentences for the failures."""

    passed: int = 0
    failed: int = 0
    problems: list[str] = field(default_factory=list)

    def check(self, good: bool, problem: str) -> None:
        """Count one check."""
        if good:
            self.passed += 1
        else:
            self.failed += 1
            self.problems.append(problem)

    def add(self, other: Outcome) -> None:
        """Count another outcome's checks as well."""
        self.passed += other.passed
        self.failed += other.failed
        self.problems += other.problems


@dataclass(frozen=True)
class Run:
    """The circumstances of one run."""

    set: str
    seed: str
    keep: bool = False
    more: Mapping[str, str] = field(default_factory=dict)  # of the environment
    only: tuple[str, ...] = ()  # test files of the scenarios in CHOSEN; none: all of them

    @property
    def env(self) -> dict[str, str]:
        """The environment of every program that is started."""
        return {
            "TRIBRICK_SET": self.set,
            "TRIBRICK_SEED": self.seed,
            "TRIBRICK_ONLY": " ".join(self.only),
            "PYTHONPATH": str(ROOT / "scripts" / "lib"),
            "PATH": f"{BIN}{os.pathsep}{os.environ['PATH']}",
            "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
            "ANSIBLE_NOCOLOR": "1",
            "NO_COLOR": "1",
            "PY_COLORS": "0",
            "PYTHONUNBUFFERED": "1",
            "MOLECULE_COMMAND_BORDERS": "false",
            "LC_ALL": "C.UTF-8",
            **self.more,
        }


Part = Callable[[Console, Run], Outcome]


def seed_of_commit() -> str:
    """Return the seed: given, or by the commit, so that a commit's run can be repeated."""
    given = os.environ.get("TRIBRICK_SEED")
    if given:
        return given
    done = capture(["git", "-C", str(ROOT), "rev-parse", "HEAD"], deadline=30, check=False)
    return done.stdout.strip()[:12] if done.returncode == 0 else "0"


def reason_of(bad: ET.Element) -> str:
    """Return why a test failed: the place, and pytest's lines for the error, shortened."""
    lines = (bad.text or "").splitlines()
    errors = [line[1:].strip() for line in lines if line.startswith("E ")][:REASON_LINES]
    places = re.findall(r"^(\S+\.py:\d+)(?:: |$)", bad.text or "", re.MULTILINE)
    told = errors or (bad.get("message") or "no message").splitlines()[:REASON_LINES]
    return "\n    ".join([places[-1] if places else "", *(line[:300] for line in told)]).strip()


def junit(file: Path) -> Outcome:
    """Read pytest's report; nothing collected, and skips without a known reason, are failures."""
    outcome = Outcome()
    if not file.exists():
        outcome.check(False, f"pytest wrote no report {file.name}: it did not run to its end")
        return outcome
    for case in ET.parse(file).getroot().iter("testcase"):  # noqa: S314 - written by our own pytest
        name = f"{case.get('classname', '')}::{case.get('name', '')}".removeprefix("::")
        bad = case.find("failure") if case.find("failure") is not None else case.find("error")
        skipped = case.find("skipped")
        if bad is not None:
            outcome.check(False, f"{name}: {reason_of(bad)}")
        elif skipped is not None:
            reason = skipped.get("message") or ""
            known = any(re.search(allowed, reason) for allowed in ALLOWED_SKIPS)
            outcome.check(known, f"{name} was skipped: {reason or 'no reason'}")
        else:
            outcome.check(True, "")
    if outcome.passed + outcome.failed == 0:
        outcome.check(False, f"{file.name}: pytest collected no test")
    return outcome


def recap(output: str, scenario: str, steps: Sequence[str]) -> Outcome:
    """Read Molecule's recap: every step ran and succeeded, and none was missing."""
    outcome = Outcome()
    lines = re.findall(
        rf"^{re.escape(scenario)}\s+: actions=(\d+)\s+successful=(\d+)\s+disabled=(\d+)\s+"
        r"skipped=(\d+)\s+missing=(\d+)\s+failed=(\d+)", output, re.MULTILINE,
    )
    if len(lines) != 1:
        reached = re.findall(rf"\[{re.escape(scenario)} > (\w+)\] Executing", output)
        # The step that stopped the scenario is the failure; those before it count.
        outcome.passed += max(0, len(reached) - 1)
        outcome.check(False, f"{scenario} stopped in step '{reached[-1] if reached else 'none'}'")
        return outcome
    # The recap's own number of successes is not used: it counts a step that runs twice (destroy) once.
    actions, _, disabled, skipped, missing, failed = map(int, lines[0])
    done = re.findall(rf"\[{re.escape(scenario)} > (\w+)\] Executed: Successful", output)
    outcome.passed += min(len(done), len(steps))
    if done != list(steps) or actions != len(steps) or disabled or skipped or missing or failed:
        outcome.check(False, f"{scenario}: the steps {', '.join(steps)} were to succeed; these did: {', '.join(done)}; "
                      f"{disabled} disabled, {skipped} skipped, {missing} missing, {failed} failed")
    return outcome


def changed_hosts(output: str) -> tuple[dict[str, int], int]:
    """Return host -> tasks that changed something, summed over all recaps, and the number of recaps."""
    found: dict[str, int] = {}
    for host, changed in re.findall(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)", output, re.MULTILINE):
        found[host] = found.get(host, 0) + int(changed)
    return found, len(re.findall(r"^PLAY RECAP", output, re.MULTILINE))


def execute(
    console: Console, run: Run, what: str, args: Sequence[str],
    show: Callable[[str], str | None], deadline: float = PART_LIMIT,
) -> str | None:
    """Run a program; return None when it succeeded, else one sentence."""
    try:
        stream(console, args, what=what, deadline=deadline, show=show, env=run.env, cwd=ROOT)
    except KitError as error:
        return str(error)
    return None


def silent(_line: str) -> str | None:
    """Show nothing: the log has it."""
    return None


def lint(name: str, arguments: Callable[[], list[str]]) -> Part:
    """Make a part of one program that exits with 0 when all is well."""

    def part(console: Console, run: Run) -> Outcome:
        outcome = Outcome()
        problem = execute(console, run, name, arguments(), silent, deadline=600)
        outcome.check(problem is None, problem or "")
        return outcome

    return part


def shell_scripts() -> list[str]:
    """Return every shell script of the repository, by extension or first line."""
    listed = capture(
        ["git", "-C", str(ROOT), "ls-files", "--cached", "--others", "--exclude-standard"], deadline=60
    ).stdout.splitlines()
    found = []
    for name in listed:
        file = ROOT / name
        if file.is_symlink() or not file.is_file():
            continue
        with file.open("rb") as handle:
            first = handle.readline(100)
        if name.endswith(".sh") or re.match(rb"#!\S*[/ ](env )?(ba|da)?sh\b", first):
            # A template that fills in values is no shell script yet; one that does not is.
            if b"{{" in (text := file.read_bytes()) or b"{%" in text:
                if name.endswith(".j2"):
                    continue
            found.append(name)
    if not found:
        raise KitError("No shell script was found to check.")
    return found


def missing_packages() -> list[str]:
    """Return the Debian packages that unit tests need and that are not there."""
    return [
        package
        for package, (pattern, program) in UNIT_PACKAGES.items()
        if not any(Path("/").glob(pattern)) and (not program or shutil.which(program) is None)
    ]


def unit(console: Console, run: Run) -> Outcome:
    """Unit tests; some take a real database and real web servers."""
    missing = missing_packages()
    if missing:
        apt_install(console, missing, "unit tests use a real database, real web servers and SSH")

    def half(name: str, places: Sequence[str]) -> Outcome:
        report = LOGS / f"unit-{name}.xml"
        report.unlink(missing_ok=True)
        program = [sys.executable, "-m", "pytest", *places, f"--junitxml={report}", "-q"]
        problem = execute(console, run, f"pytest, {name} half", program, silent, deadline=1200)
        return with_exit_code(junit(report), problem)

    outcome, rest = Outcome(), ["tests/unit", *(f"--ignore={place}" for place in UNIT_HALF)]
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(half, ("first", "second"), (UNIT_HALF, rest)):
            outcome.add(done)
    return outcome


def with_exit_code(outcome: Outcome, problem: str | None) -> Outcome:
    """A program that failed is a failure even where its report names none."""
    if problem is not None and outcome.failed == 0:
        outcome.check(False, problem)
    return outcome


def show_ansible(line: str) -> str | None:
    """Condense Molecule's, Ansible's and pytest's output."""
    line = line.rstrip()
    if match := re.match(r"(?:PLAY|TASK|RUNNING HANDLER) \[(.*?)\] \*", line):
        return f"  {match[1]}"
    if match := re.match(r"\S*/tests/molecule/(\S+::.*) (PASSED|FAILED|ERROR|SKIPPED)\b", line):
        return f"  {match[2]} {match[1]}"[:200]
    if re.match(r"(fatal|failed|\[ERROR\]|ERROR|CRITICAL|E  )", line):
        return line[:220]
    if match := re.match(r"INFO\s+\[(\S+ > \w+)\] Executing", line):
        return f"== {match[1]}"
    return line if re.match(r"\S+\s+: ok=\d+", line) else None


def scenarios() -> list[str]:
    """Return the names of Molecule's scenarios, the plainest last."""
    names = [file.parent.name for file in (ROOT / "molecule").glob("*/molecule.yml")]
    return sorted(names, key=lambda name: (name != "default", name != "debian12", name))


def variants(name: str, run: Run) -> list[Run]:
    """Return the runs of a scenario: one; of the media back ends the long set tries all, the short set the seed's."""
    if name != "backends":
        return [run]
    given = os.environ.get("LAB_BACKEND")
    one = given or random.Random(f"{run.seed} backend").choice(BACKENDS[1:])  # noqa: S311 - to repeat, not to hide
    chosen = BACKENDS[1:] if run.set == "long" and not given else [one]
    return [replace(run, more={"LAB_BACKEND": backend}) for backend in chosen]


def scenario(name: str) -> Part:
    """Make a part of one Molecule scenario."""

    def part(console: Console, run: Run) -> Outcome:
        outcome = Outcome()
        for variant in variants(name, run):
            if variant.more:
                console.say(f"{name}: {', '.join(variant.more.values())}")
            outcome.add(once(console, variant))
        return outcome

    def once(console: Console, run: Run) -> Outcome:
        ensure_engine(console, ROOT / ".lab")
        if shutil.which("ssh") is None:
            apt_install(console, ["openssh-client"], "Ansible reaches the lab by SSH")
        config = yaml.safe_load((ROOT / ".config" / "molecule" / "config.yml").read_text(encoding="utf-8"))
        own = yaml.safe_load((ROOT / "molecule" / name / "molecule.yml").read_text(encoding="utf-8"))
        steps = (own.get("scenario") or {}).get("test_sequence") or config["scenario"]["test_sequence"]
        report = LOGS / f"{name}.xml"
        report.unlink(missing_ok=True)
        destroy = "never" if run.keep else "always"
        assert console.log is not None
        before = console.log.stat().st_size if console.log.exists() else 0
        # Molecule notes down that it has made a lab, and believes that when a lab that was kept is gone.
        reset = [str(BIN / "molecule"), "reset", f"--scenario-name={name}"]
        problem = execute(console, run, f"molecule reset {name}", reset, silent, 120) if run.keep else None
        problem = problem or execute(
            console, run, f"molecule {name}",
            [str(BIN / "molecule"), "test", f"--scenario-name={name}", f"--destroy={destroy}", "--report"],
            show_ansible,
        )
        # The log of a part with several runs holds the earlier ones as well; this one's recap is the last.
        outcome = recap(console.log.read_bytes()[before:].decode("utf-8", "replace"), name, steps)
        outcome.add(junit(report))
        return with_exit_code(outcome, problem)

    return part


def lab_left_overs() -> list[str]:
    """Return what carries the label of the part's lab."""
    flag = f"--filter=label=tribrick.lab={LAB}"
    found = []
    for kind in (["ps", "--all", "--format={{.Names}}"], ["network", "ls", "--format={{.Name}}"],
                 ["volume", "ls", "--format={{.Name}}"]):
        found += capture(["docker", *kind, flag], deadline=60).stdout.split()
    return found + [str(d) for d in (ROOT / ".lab" / LAB, ROOT / "inventories" / f"lab-{LAB}") if d.exists()]


def lab(console: Console, run: Run) -> Outcome:
    """./scripts/lab from nothing, again, and down."""
    outcome, script = Outcome(), str(ROOT / "scripts" / "lab")
    assert console.log is not None
    log = console.log

    def command(*words: str) -> tuple[str | None, str, float]:
        before, start = log.stat().st_size if log.exists() else 0, time.monotonic()
        problem = execute(console, run, f"lab {words[0]}", [script, *words], show_lab)
        with log.open("rb") as handle:
            handle.seek(before)
            text = handle.read().decode("utf-8", "replace")
        return problem, text, time.monotonic() - start

    def show_lab(line: str) -> str | None:
        return line.rstrip() if re.match(r"\[ *\d+:\d\d\]|error:|[A-Z]", line) else None

    def files() -> str:
        return capture([script, "ssh", f"--name={LAB}", "node1", "sudo find /srv/media -type f | sort"],
                       deadline=60).stdout

    command("down", f"--name={LAB}")
    left = lab_left_overs()
    outcome.check(not left, f"before the start there was already: {left}")
    problem, text, took = command("up", f"--name={LAB}")
    outcome.check(problem is None, problem or "")
    if problem is not None:
        return outcome
    outcome.check(took <= UP_LIMIT, f"lab up took {took:.0f} s, the limit is {UP_LIMIT:.0f} s")
    rows = re.findall(r"^.*\b(node[123])\b.* ready +\d+ bytes ([0-9a-f]{12})$", text, re.MULTILINE)
    outcome.check(len(rows) == 3 and len({sha for _, sha in rows}) == 1,
                  f"the table should show three ready nodes that served one picture, it shows {rows}")
    console.say(f"lab up from nothing: {took:.0f} s")

    status = json.loads(capture([script, "status", f"--name={LAB}", "--json"], deadline=120).stdout)
    shape = [sorted(node) == ["brick", "mount", "name", "url"] for node in status["nodes"]]
    names = [node["name"] for node in status["nodes"]]
    outcome.check(shape == [True] * 3 and names == ["node1", "node2", "node3"] and bool(status["token"]),
                  f"status --json has another shape: {status['nodes']}")

    kept = files()
    outcome.check(bool(kept.strip()), "no file on the media mount after lab up")
    problem, text, took = command("up", f"--name={LAB}")
    outcome.check(problem is None, problem or "")
    hosts, recaps = changed_hosts((ROOT / ".lab" / LAB / "up.log").read_text(encoding="utf-8"))
    outcome.check(recaps >= 2 and set(hosts) >= {"node1", "node2", "node3", "db1"} and not any(hosts.values()),
                  f"the second lab up changed something: {hosts} in {recaps} recaps")
    phase = re.search(r"site\.yml (\d+\.\d) s", text)
    seconds = float(phase[1]) if phase else float("inf")
    outcome.check(seconds <= SECOND_RUN_LIMIT,
                  f"the second run of site.yml took {seconds:.0f} s, the limit is {SECOND_RUN_LIMIT:.0f} s")
    console.say(f"second run of site.yml: {seconds:.0f} s")
    outcome.check(files() == kept, "the second lab up left or removed media files")

    if run.keep:
        return outcome
    problem, _, _ = command("down", f"--name={LAB}")
    outcome.check(problem is None, problem or "")
    left = lab_left_overs()
    outcome.check(not left, f"lab down left: {left}")
    return outcome


def reference() -> list[str]:
    """Return the command that builds the API reference of the Django package; any warning fails it."""
    options = ["-b", "html", "-E", "-W", "--keep-going", "-q"]
    return [sys.executable, "-m", "sphinx", *options, str(ROOT / "docs" / "api"), str(ROOT / ".lab" / "api")]


def quick_parts() -> dict[str, Part]:
    """Return the parts that need no lab; the slow ones first."""
    tool = BIN.joinpath
    return {
        "ansible-lint": lint("ansible-lint", lambda: [str(tool("ansible-lint")), "--strict", "--offline", "--nocolor"]),
        "unit": unit,
        "mypy": lint("mypy", lambda: [str(tool("mypy"))]),
        "ruff": lint("ruff", lambda: [str(tool("ruff")), "check"]),
        "yamllint": lint("yamllint", lambda: [str(tool("yamllint")), "--strict", "."]),
        "api": lint("api", reference),
        "shellcheck": lint("shellcheck", lambda: ["shellcheck", "--external-sources", *shell_scripts()]),
    }


def files() -> dict[str, str]:
    """Return the words for test files that can be chosen, with their scenarios: test_10_node_loss.py -> node_loss."""
    return {
        file.stem.split("_", 2)[2]: name
        for name in CHOSEN
        for file in sorted((ROOT / "tests" / "molecule" / name).glob("test_*.py"))
    }


def all_parts() -> dict[str, Part]:
    """Return every part by name, in the order of a full run."""
    return {**quick_parts(), "lab": lab, **{name: scenario(name) for name in scenarios()}}


def run_part(name: str, part: Part, run: Run, started: float) -> tuple[str, Outcome, float]:
    """Run one part with a log of its own; an error of the part is its failure."""
    console = Console(log=LOGS / f"{name}.log", started=started)
    assert console.log is not None
    console.log.unlink(missing_ok=True)
    start = time.monotonic()
    console.say(f"=== {name}")
    try:
        outcome = part(console, run)
    except (KitError, OSError, ValueError, KeyError, ET.ParseError, subprocess.SubprocessError) as error:
        outcome = Outcome()
        outcome.check(False, f"{type(error).__name__}: {error}")
    took = time.monotonic() - start
    for problem in outcome.problems:
        console.say(f"FAILED {name}: {problem}")
    console.say(f"=== {name}: {outcome.passed} passed, {outcome.failed} failed, {took:.0f} s")
    return name, outcome, took


def needs(parts: Mapping[str, Part]) -> None:
    """Install the programs that the chosen parts call."""
    if "shellcheck" in parts and shutil.which("shellcheck") is None:
        apt_install(Console(), ["shellcheck"], "shell scripts are checked")
    if shutil.which("git") is None:
        apt_install(Console(), ["git"], "the tests ask for the commit")


def summary(results: Sequence[tuple[str, Outcome, float]]) -> tuple[str, bool]:
    """Return the closing list of failures and table with its last line, and whether all is well.

    The failures come once more at the end: of a long log many a CI keeps only that.
    """
    passed = sum(outcome.passed for _, outcome, _ in results)
    failed = sum(outcome.failed for _, outcome, _ in results)
    lines = [f"FAILED {name}: {problem}" for name, outcome, _ in results for problem in outcome.problems]
    lines += [f"{'part':<14}{'passed':>8}{'failed':>8}{'minutes':>9}"]
    for name, outcome, took in results:
        lines.append(f"{name:<14}{outcome.passed:>8}{outcome.failed:>8}{took / 60:>9.1f}")
        if outcome.passed + outcome.failed == 0:
            failed += 1  # a part that checked nothing has failed
    lines.append(f"{passed} passed, {failed} failed")
    return "\n".join(lines), failed == 0 and passed > 0


def parse(arguments: Sequence[str] | None) -> tuple[dict[str, Part], Run, bool]:
    """Turn the command line into parts and circumstances; the last value: only list the parts."""
    parts = all_parts()
    parser = argparse.ArgumentParser(
        prog="./scripts/test",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("words", nargs="*", metavar="quick | long [NAME] | list | NAME")
    parser.add_argument("--keep", action="store_true", help="leave labs running, to look around after a failure")
    options = parser.parse_args(arguments)
    words = list(options.words)
    kind = "long" if words[:1] == ["long"] else "short"
    words = words[1:] if kind == "long" else words
    there = files()
    only = tuple(word for word in words if word in there)
    words = list(dict.fromkeys(there.get(word, word) for word in words))
    run = Run(set=kind, seed=seed_of_commit(), keep=options.keep, only=only)
    if words == ["list"]:
        return parts, run, True
    if words == ["quick"]:
        return quick_parts(), run, False
    unknown = [word for word in words if word not in parts]
    if unknown:
        names = ", ".join(dict.fromkeys([*parts, *there]))
        parser.error(f"no part is named {', '.join(unknown)}; there are: quick, {names}")
    if not words:
        words = [name for name in parts if name not in WHEN_NAMED]
        if kind == "short":
            run = replace(run, only=tuple(file for file in there if file not in FILES_WHEN_NAMED))
    return {name: parts[name] for name in words}, run, False


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the chosen parts; 0 only when something was checked and nothing failed."""
    parts, run, only_list = parse(arguments)
    if only_list:
        print("\n".join(parts))
        return 0
    LOGS.mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    print(f"set {run.set}, seed {run.seed} (repeat with TRIBRICK_SEED={run.seed})", flush=True)
    results: list[tuple[str, Outcome, float]] = []
    try:
        needs(parts)
        quick = {name: part for name, part in parts.items() if name in quick_parts()}
        with ThreadPoolExecutor(2) as pool:  # one waits for the disk while the other computes
            futures = [pool.submit(run_part, name, part, run, started) for name, part in quick.items()]
            results += [future.result() for future in futures]
        for name, part in parts.items():
            if name not in quick:
                results.append(run_part(name, part, run, started))
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; the labs may still run: ./scripts/test NAME starts afresh", file=sys.stderr)
        return 130
    text, good = summary(results)
    print(f"\n{text}", flush=True)
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
