"""A picture of a run, drawn twice from one list of shapes: SVG by itself, PNG by Pillow; and its numbers as JSON."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from PIL import Image, ImageDraw

from faults.checker import Window, windows
from faults.history import Event, Operation, operations

WIDTH, LEFT, RIGHT, TOP = 1200, 150, 20, 70
BLUE, GREEN, RED, AMBER, GREY, INK = "#2563eb", "#16a34a", "#dc2626", "#fde68a", "#d1d5db", "#111827"
PINK, PAPER = "#fecaca", "#ffffff"
LANE, GAP = 90, 22


@dataclass(frozen=True)
class Shape:
    """A filled rectangle, a line through points, or a text at its left (or right, or middle) end."""

    kind: str  # rect, line, text
    points: tuple[tuple[float, float], ...]
    colour: str
    text: str = ""
    size: float = 12
    anchor: str = "start"


def per_second(ops: Sequence[Operation], seconds: int) -> dict[str, list[float]]:
    """Count, by the second: acknowledged uploads and reads, errors, and the longest stall that began there."""
    rows = {name: [0.0] * seconds for name in ("uploads", "reads", "errors", "stall")}
    for op in ops:
        begun = min(seconds - 1, int(op.invoke.time))
        took = (seconds - op.invoke.time) if op.end is None else op.seconds
        rows["stall"][begun] = max(rows["stall"][begun], round(took, 3))
        if op.end is None:
            continue
        done = min(seconds - 1, int(op.end.time))
        if op.outcome == "ok":
            rows["reads" if op.invoke.what == "read" else "uploads"][done] += 1
        else:
            rows["errors"][done] += 1
    return rows


def nice(value: float) -> float:
    """Return the next round number above."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return float(next(step * power for step in (1, 2, 5, 10) if step * power >= value))


def draw(events: Sequence[Event], nodes: Sequence[str]) -> tuple[list[Shape], int]:
    """Return the shapes of a run and the picture's height."""
    ops = list(operations(events))
    faults = windows(events)
    seconds = max(2, math.ceil(max((event.time for event in events), default=1.0)) + 1)
    scale = (WIDTH - LEFT - RIGHT) / seconds
    lanes = [("all nodes", per_second(ops, seconds))]
    lanes += [(node, per_second([op for op in ops if op.invoke.host == node], seconds)) for node in nodes]
    height = TOP + (2 + len(nodes)) * (LANE + GAP) + 30
    shapes = [Shape("rect", ((0, 0), (WIDTH, height)), PAPER)]
    bottom = height - 30
    for window in faults:
        shapes += _marks(window, scale, TOP - 14, bottom, seconds, None)
    top = float(TOP)
    for name, rows in lanes:
        shapes += [
            Shape("rect", ((LEFT, top + LANE), (WIDTH - RIGHT, top + LANE + 1)), GREY),
            Shape("text", ((8, top + 14),), INK, name, 14),
        ]
        for window in faults:
            if name in window.hosts:
                shapes += _marks(window, scale, top, top + LANE, seconds, PINK)
        most = nice(max(*rows["uploads"], *rows["reads"], *rows["errors"], 1))
        shapes += _line(rows["reads"], BLUE, most, top, scale) + _line(rows["uploads"], GREEN, most, top, scale)
        shapes += _bars(rows["errors"], RED, most, top, scale)
        shapes.append(Shape("text", ((LEFT - 6, top + 10),), INK, f"{most:g}/s", 11, "end"))
        if any(rows["errors"]):
            worst = max(rows["errors"])
            shapes.append(Shape("text", ((LEFT - 6, top + LANE - 4),), RED, f"{worst:g} errors/s", 11, "end"))
        top += LANE + GAP
        if name == "all nodes":
            longest = max(rows["stall"])
            most = nice(longest)
            shapes += _bars(rows["stall"], INK, most, top, scale)
            shapes += [
                Shape("rect", ((LEFT, top + LANE), (WIDTH - RIGHT, top + LANE + 1)), GREY),
                Shape("text", ((8, top + 14),), INK, "longest stall", 14),
                Shape("text", ((LEFT - 6, top + 10),), INK, f"{most:g} s", 11, "end"),
                Shape("text", ((8, top + 34),), INK, f"at most {longest:.1f} s", 12),
            ]
            top += LANE + GAP
    every = max(1, int(nice(seconds / 12)))
    for second in range(0, seconds, every):
        x = LEFT + second * scale
        shapes += [
            Shape("rect", ((x, bottom - 4), (x + 1, bottom)), INK),
            Shape("text", ((x, bottom + 16),), INK, f"{second} s", 11, "middle"),
        ]
    for x, colour, text in ((LEFT, BLUE, "reads/s"), (LEFT + 90, GREEN, "writes/s"), (LEFT + 190, RED, "errors"),
                            (LEFT + 280, PINK, "fault"), (LEFT + 350, AMBER, "recovery, until clean")):  # fmt: skip
        shapes += [
            Shape("rect", ((x, 10), (x + 14, 22)), colour),
            Shape("text", ((x + 20, 21),), INK, text, 12),
        ]
    return shapes, height


def _marks(window: Window, scale: float, top: float, bottom: float, seconds: int, colour: str | None) -> list[Shape]:
    """Shade a fault from its injection on and the recovery after it; over all lanes only as thin lines with a name."""

    def x(time: float) -> float:
        return LEFT + min(time, seconds) * scale

    ended = window.ended if window.ended is not None else window.last
    clean = window.clean if window.clean is not None else float(seconds)  # never: to the end of the picture
    if colour is not None:
        return [
            Shape("rect", ((x(window.inject), top), (max(x(ended), x(window.inject) + 2), bottom)), colour),
            Shape("rect", ((x(ended), top), (x(clean), bottom)), AMBER),
        ]
    label = window.fault + (f" {', '.join(window.hosts)}" if window.hosts else "")
    return [
        Shape("rect", ((x(window.inject), top), (x(ended), top + 8)), PINK),
        Shape("rect", ((x(ended), top), (x(clean), top + 8)), AMBER),
        *(Shape("rect", ((x(t), top), (x(t) + 1, bottom)), PINK) for t in (window.inject, ended)),
        Shape("rect", ((x(clean), top), (x(clean) + 1, bottom)), AMBER),
        Shape("text", ((x(window.inject), top - 4),), RED, label, 12),
    ]


def _line(values: Sequence[float], colour: str, most: float, top: float, scale: float) -> list[Shape]:
    points = tuple((LEFT + (i + 0.5) * scale, top + LANE * (1 - value / most)) for i, value in enumerate(values))
    return [Shape("line", points, colour)]


def _bars(values: Sequence[float], colour: str, most: float, top: float, scale: float) -> list[Shape]:
    width = max(1.0, scale * 0.8)
    return [
        Shape(
            "rect",
            ((LEFT + i * scale, top + LANE * (1 - value / most)), (LEFT + i * scale + width, top + LANE)),
            colour,
        )
        for i, value in enumerate(values)
        if value
    ]


def svg(shapes: Sequence[Shape], height: int) -> str:
    """Return the picture as SVG."""
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height}" font-family="sans-serif">',
    ]
    for one in shapes:
        if one.kind == "rect":
            (x1, y1), (x2, y2) = one.points
            lines.append(
                f'<rect x="{x1:.1f}" y="{y1:.1f}" width="{max(0, x2 - x1):.1f}" height="{max(0, y2 - y1):.1f}" '
                f'fill="{one.colour}"/>'
            )
        elif one.kind == "line":
            points = " ".join(f"{x:.1f},{y:.1f}" for x, y in one.points)
            lines.append(f'<polyline points="{points}" fill="none" stroke="{one.colour}" stroke-width="1.5"/>')
        else:
            ((x, y),) = one.points
            lines.append(
                f'<text x="{x:.1f}" y="{y:.1f}" font-size="{one.size:g}" fill="{one.colour}" '
                f'text-anchor="{one.anchor}">{html.escape(one.text)}</text>'
            )
    return "\n".join([*lines, "</svg>", ""])


def png(shapes: Sequence[Shape], height: int, path: Path) -> None:
    """Write the picture as PNG."""
    image = Image.new("RGB", (WIDTH, height))
    pen = ImageDraw.Draw(image)
    for one in shapes:
        if one.kind == "rect":
            (x1, y1), (x2, y2) = one.points
            if x2 > x1 and y2 > y1:
                pen.rectangle([x1, y1, max(x1, x2 - 1), max(y1, y2 - 1)], fill=one.colour)
        elif one.kind == "line":
            pen.line(list(one.points), fill=one.colour, width=2)
        else:
            anchor = {"start": "ls", "middle": "ms", "end": "rs"}[one.anchor]
            pen.text(one.points[0], one.text, fill=one.colour, font_size=one.size, anchor=anchor)
    image.save(path, "PNG", optimize=True)


def write(path: Path, events: Sequence[Event], nodes: Sequence[str]) -> None:
    """Write PATH.svg, PATH.png and PATH.json."""
    shapes, height = draw(events, nodes)
    path.with_suffix(".svg").write_text(svg(shapes, height), encoding="utf-8")
    png(shapes, height, path.with_suffix(".png"))
    seconds = max(2, math.ceil(max((event.time for event in events), default=1.0)) + 1)
    ops = list(operations(events))
    facts = {
        "faults": [asdict(window) for window in windows(events)],
        "per_second": {
            "all": per_second(ops, seconds),
            **{node: per_second([op for op in ops if op.invoke.host == node], seconds) for node in nodes},
        },
    }
    path.with_suffix(".json").write_text(json.dumps(facts) + "\n", encoding="utf-8")
