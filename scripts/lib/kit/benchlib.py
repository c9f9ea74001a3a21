"""What the parts of ./scripts/bench share: statistics, a program on a node, waiting, a picture."""

from __future__ import annotations

import argparse
import json
import math
import os
import select
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from types import TracebackType
from typing import IO, Any
from xml.sax.saxutils import escape

from kit.run import Console, KitError

# Options


def positive(text: str) -> int:
    """Read a number of at least 1 from the command line."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError("must be at least 1")
    return number


# Statistics


def quantile(values: Sequence[float], part: float) -> float:
    """Return the smallest value that *part* (0 to 1) of the values do not exceed; no value is made up."""
    if not values:
        raise ValueError("no values")
    if not 0 < part <= 1:
        raise ValueError(f"{part} is no part of a whole")
    return sorted(values)[math.ceil(round(part * len(values), 9)) - 1]


@dataclass(frozen=True)
class Ratio:
    """A ratio and, as its spread, the smallest and the largest of the blocks'."""

    value: float
    low: float
    high: float

    def flat(self, name: str) -> dict[str, float]:
        """Return three figures under *name*."""
        return {name: round(self.value, 3), f"{name}_low": round(self.low, 3), f"{name}_high": round(self.high, 3)}


def ratio_of(figures: Mapping[str, Any], name: str) -> Ratio | None:
    """Return the ratio that was made flat under *name*, if it was."""
    if name not in figures:
        return None
    return Ratio(*(figures[f"{name}{end}"] for end in ("", "_low", "_high")))


def told(ratio: Ratio | None) -> str:
    """Return a ratio for people."""
    return f"{ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else "-"


Blocks = Sequence[Sequence[float]]


def median_ratio(ours: Blocks, theirs: Blocks) -> Ratio:
    """Compare medians block by block: both were measured in turns, so what slowed one slowed the other."""
    _same(ours, theirs)
    ratios = [median(one) / median(other) for one, other in zip(ours, theirs, strict=True)]
    return Ratio(median(ratios), min(ratios), max(ratios))


def p99_ratio(ours: Blocks, theirs: Blocks) -> Ratio:
    """Compare the 99th percentiles of all values; the spread is that of the blocks' own."""
    _same(ours, theirs)
    ratios = [quantile(one, 0.99) / quantile(other, 0.99) for one, other in zip(ours, theirs, strict=True)]
    whole = quantile([v for b in ours for v in b], 0.99) / quantile([v for b in theirs for v in b], 0.99)
    return Ratio(whole, min(ratios), max(ratios))


def _same(ours: Blocks, theirs: Blocks) -> None:
    if not ours or len(ours) != len(theirs):
        raise ValueError(f"{len(ours)} blocks cannot be compared with {len(theirs)}")


# A program on a node


class Remote:
    """A Python program in the site's environment on a node. One line of JSON asks it, one line answers.

    It ends when its standard input does, so it ends with us, however we end.
    """

    def __init__(self, ssh: Sequence[str], program: Path, words: Sequence[str], log: Path) -> None:
        self.where = ssh[-1]
        self.program = program.stem
        self._log: IO[bytes] = log.open("ab")
        place = f"/run/tribrick-{program.stem}.py"
        try:
            done = subprocess.run(
                [*ssh, "sudo", "install", "-m", "0644", "/dev/stdin", place],
                input=program.read_bytes(), stderr=self._log, stdout=self._log, timeout=60, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise KitError(f"{self.where} did not take {program.name} within 60 s.") from None
        if done.returncode:
            raise KitError(f"{self.where} did not take {program.name}; see {log}")
        self._process = subprocess.Popen(
            [*ssh, "sudo", "tribrick-manage", "--python", place, *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log,
        )  # fmt: skip
        self._rest = b""
        self.log = log

    def ask(self, command: dict[str, Any], deadline: float) -> dict[str, Any]:
        """Send a command, return the answer."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(command).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise KitError(f"{self.program} on {self.where} has ended; see {self.log}") from None
        return self.answer(deadline)

    def answer(self, deadline: float) -> dict[str, Any]:
        """Wait for a line."""
        assert self._process.stdout is not None
        end = time.monotonic() + deadline
        while b"\n" not in self._rest:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._process.stdout], [], [], left)[0]:
                raise KitError(f"{self.program} on {self.where} gave no answer in {deadline:.0f} s; see {self.log}")
            piece = os.read(self._process.stdout.fileno(), 1 << 16)
            if not piece:
                raise KitError(f"{self.program} on {self.where} has ended; see {self.log}")
            self._rest += piece
        line, _, self._rest = self._rest.partition(b"\n")
        try:
            answer: dict[str, Any] = json.loads(line)
        except ValueError:
            raise KitError(f"{self.program} on {self.where} said: {line.decode(errors='replace')[:200]}") from None
        if "error" in answer:
            raise KitError(f"{self.program} on {self.where}: {answer['error']}")
        return answer

    def close(self) -> None:
        """End it, and give it time to clean up."""
        if self._process.stdin is not None:
            try:
                self._process.stdin.close()
            except BrokenPipeError:
                pass
        try:
            self._process.wait(timeout=120)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        finally:
            if self._process.stdout is not None:
                self._process.stdout.close()
            self._log.close()

    def __enter__(self) -> Remote:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


# Waiting


class Quiet(Console):
    """Tells of what it waits for on standard error: standard output is for the figures alone."""

    def say(self, text: str) -> None:
        """Say it there, and in the log."""
        print(text, file=sys.stderr, flush=True)
        self.record(text + "\n")


# Pictures

COLOURS = ("#0b6e99", "#d1495b", "#6a994e", "#7b5ea7")


@dataclass(frozen=True)
class Series:
    """One line of a picture: a ratio for each column, or none where it was not measured."""

    name: str
    ratios: Sequence[Ratio | None]


def picture_of_ratios(title: str, note: str, columns: Sequence[str], series: Sequence[Series]) -> str:
    """Draw ratios as dots with their spread, columns side by side, a line at 1."""
    width, height, left, right, top, bottom = 760, 420, 60, 20, 74 + 20 * len(series), 60
    shown = [ratio for one in series for ratio in one.ratios if ratio is not None]
    ceiling = max([1.0, *(ratio.high for ratio in shown)])
    step = next(s for s in (0.25, 0.5, 1, 2, 5, 10, 25, 50, 100, math.inf) if ceiling / s <= 8)
    ceiling = math.ceil(ceiling / step) * step if step < math.inf else ceiling
    floor_at = height - bottom

    def y(value: float) -> float:
        return round(floor_at - (floor_at - top) * value / ceiling, 1)

    halo = 'font-size="11" stroke="#fff" stroke-width="3" paint-order="stroke"'
    font = 'font-family="sans-serif" font-size="13" fill="#222"'
    out = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" {font}>',
        f'<rect width="{width}" height="{height}" fill="#fff"/>',
        f'<text x="{left}" y="26" font-size="17" font-weight="bold">{escape(title)}</text>',
        f'<text x="{left}" y="46" fill="#555">{escape(note)}</text>',
    ]
    for number, one in enumerate(series):
        at = 68 + 20 * number
        out.append(f'<circle cx="{left + 6}" cy="{at - 4}" r="5" fill="{COLOURS[number % len(COLOURS)]}"/>')
        out.append(f'<text x="{left + 18}" y="{at}">{escape(one.name)}</text>')
    marks = round(ceiling / step) if step < math.inf else 1
    for mark in range(marks + 1):
        value = mark * (step if step < math.inf else ceiling)
        out.append(f'<path d="M{left} {y(value)}H{width - right}" stroke="#ddd"/>')
        out.append(f'<text x="{left - 8}" y="{y(value) + 4}" text-anchor="end">{value:g}</text>')
    out.append(f'<path d="M{left} {y(1)}H{width - right}" stroke="#222" stroke-width="1.5" stroke-dasharray="6 4"/>')
    each = (width - left - right) / max(1, len(columns))
    for column, name in enumerate(columns):
        middle = left + each * (column + 0.5)
        out.append(f'<text x="{middle:.1f}" y="{floor_at + 22}" text-anchor="middle">{escape(name)}</text>')
        for number, one in enumerate(series):
            ratio = one.ratios[column]
            if ratio is None:
                continue
            x = round(middle + (number - (len(series) - 1) / 2) * min(46, each / (len(series) + 1)), 1)
            colour = COLOURS[number % len(COLOURS)]
            out.append(
                f'<path d="M{x} {y(ratio.low)}V{y(ratio.high)}" stroke="{colour}" stroke-width="3" opacity=".4"/>'
            )
            out.append(f'<circle cx="{x}" cy="{y(ratio.value)}" r="5" fill="{colour}"/>')
            out.append(f'<text x="{x + 8}" y="{y(ratio.value) + 4}" {halo}>{ratio.value:.2f}</text>')
    out.append(
        f'<text x="{left}" y="{height - 12}" fill="#555">A dot is the figure, the bar behind it its spread.</text>'
    )
    return "\n".join([*out, "</svg>"]) + "\n"
