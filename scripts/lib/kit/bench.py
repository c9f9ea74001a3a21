"""The command ./scripts/bench: measures in a running lab, as ratios, and keeps what it found.

A part is a module ``kit.bench_NAME`` with

- its docstring, of which the first line is the help,
- ``arguments(parser)``: adds its options,
- ``run(lab, options, say)``: measures and returns one flat dictionary of figures,
- ``lines(figures)``: the same for people,
- ``picture(figures)``: the same as an SVG.

A module with ``OWN_LAB`` makes the lab itself, by this name unless another is given, and takes it down again.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import kit
from kit.lab import ROOT, Lab, containers
from kit.lab import _name as lab_name
from kit.run import KitError, capture

RESULTS = ROOT / ".lab" / "bench"
PREFIX = "bench_"
Figures = dict[str, Any]
Say = Callable[[str], None]

EXAMPLES = """\
examples:
  ./scripts/lab up                  a lab to measure in
  ./scripts/bench storages          a table; progress goes to standard error
  ./scripts/bench storages --json   one flat JSON object and nothing else on standard output

Every run also writes .lab/bench/PART.json and .lab/bench/PART.svg. Ratios travel between machines,
absolute times do not. Leave the machine alone while it measures.
"""


class Part(Protocol):
    """What a module must have to be a part."""

    __doc__: str | None

    def arguments(self, parser: argparse.ArgumentParser) -> None:
        """Add the part's options."""

    def run(self, lab: Lab, options: argparse.Namespace, say: Say) -> Figures:
        """Measure."""

    def lines(self, figures: Figures) -> list[str]:
        """Return the figures as a table for people."""

    def picture(self, figures: Figures) -> str:
        """Return the figures as an SVG."""


def parts() -> dict[str, Part]:
    """Return the parts by name."""
    names = sorted(module.name for module in pkgutil.iter_modules(kit.__path__) if module.name.startswith(PREFIX))
    found: dict[str, Any] = {name.removeprefix(PREFIX): importlib.import_module(f"kit.{name}") for name in names}
    return found


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    main_ = argparse.ArgumentParser(
        prog="./scripts/bench",
        description="Measures in a running lab.",
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = main_.add_subparsers(dest="part", required=True, metavar="PART")
    for name, part in parts().items():
        text = (part.__doc__ or "").strip()
        made = commands.add_parser(
            name, help=text.splitlines()[0], description=text, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        default = getattr(part, "OWN_LAB", "lab")
        made.add_argument("--name", type=lab_name, default=default, help=f"which lab (default: {default})")
        made.add_argument("--json", action="store_true", help="print one flat JSON object and nothing else")
        part.arguments(made)
    return main_


def require(lab: Lab) -> None:
    """Refuse a lab that is not there or not whole."""
    if not lab.recall().get("subnet") or not lab.inventory.exists():
        raise KitError(f"There is no lab '{lab.name}'; make it: ./scripts/lab up --name {lab.name}")
    still = {host: state for host, state in containers(lab).items() if state != "running"}
    if still:
        said = ", ".join(f"{host} is {state}" for host, state in still.items())
        raise KitError(f"The lab '{lab.name}' is not whole: {said}. Mend it: ./scripts/lab up --name {lab.name}")


@contextmanager
def in_lab(lab: Lab, *, own: bool) -> Iterator[None]:
    """Keep other commands off the lab meanwhile; of a part that makes its own, ./scripts/lab does."""
    if own:
        yield
        return
    require(lab)
    with lab.alone():
        yield


def circumstances(lab: Lab) -> Figures:
    """Return what a figure is worth nothing without."""
    commit = capture(["git", "-C", str(ROOT), "describe", "--always", "--dirty"], deadline=30, check=False)
    return {
        "time": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() if commit.returncode == 0 else "",
        "lab": lab.name,
        "debian": str(lab.recall().get("release", "")),
        "processors": os.cpu_count() or 0,
        "load_before": round(os.getloadavg()[0], 2),
    }


def check_flat(figures: Figures) -> None:
    """Refuse what a program could not read as one level of names and values."""
    for name, value in figures.items():
        if not isinstance(value, (str, int, float)) or value != value:
            raise ValueError(f"{name} is {value!r}; a figure is a text or a number")


@contextmanager
def polite_end() -> Iterator[None]:
    """Let SIGTERM end the work as Ctrl-C does, so that what was switched on is switched off."""

    def stop(_number: int, _frame: object) -> None:
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


def say_to_stderr() -> Say:
    """Return a function that prints progress with the time since now."""
    started = time.monotonic()

    def say(text: str) -> None:
        seconds = int(time.monotonic() - started)
        print(f"[{seconds // 60:2d}:{seconds % 60:02d}] {text}", file=sys.stderr, flush=True)

    return say


def keep(name: str, figures: Figures, drawn: str) -> tuple[Path, Path]:
    """Write the results where the next one replaces them."""
    RESULTS.mkdir(parents=True, exist_ok=True)
    data, drawing = RESULTS / f"{name}.json", RESULTS / f"{name}.svg"
    for file, text in ((data, json.dumps(figures, indent=2) + "\n"), (drawing, drawn)):
        fresh = file.with_name(file.name + ".new")
        fresh.write_text(text, encoding="utf-8")
        fresh.replace(file)
    return data, drawing


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; errors are one sentence and exit code 1."""
    options = parser().parse_args(arguments)
    part, lab = parts()[options.part], Lab(options.name)
    try:
        with polite_end(), in_lab(lab, own=hasattr(part, "OWN_LAB")):
            before = circumstances(lab)
            figures = before | part.run(lab, options, say_to_stderr())
        check_flat(figures)
        files = keep(options.part, figures, part.picture(figures))
    except KitError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; nothing was kept", file=sys.stderr)
        return 130
    if options.json:
        print(json.dumps(figures))
    else:
        print("\n".join([*part.lines(figures), f"kept: {', '.join(str(file.relative_to(ROOT)) for file in files)}"]))
    return 0


if __name__ == "__main__":
    sys.exit(main())
