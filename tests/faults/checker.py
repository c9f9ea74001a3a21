"""Says what became of every file, from the history and what was seen in the end. Pure functions; nothing is asked here.

The verdicts, worst first; a file gets the worst that any place or reader gave reason for:

    corrupt      other bytes than were sent
    torn         only a part of them, or zeros at the end
    lost         acknowledged, and not there
    resurrected  there after its delete was acknowledged, or under its old name after a rename
    stale        at some moment not found although it had been acknowledged before; all is well in the end
    unknown      nobody was told that it was stored, or that it was deleted: both ways are fine
    stable       as it was acknowledged, everywhere
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from typing import Any

from faults.history import CLASSES, Event, Operation, content, operations

VERDICTS = ("corrupt", "torn", "lost", "resurrected", "stale", "unknown", "stable")
RED = VERDICTS[:4]
BUCKETS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0)
AFTER = 60.0  # operations this long after a fault still count as under it
WRITES = ("upload", "replace", "delete", "create", "rename")


@dataclass(frozen=True)
class Seen:
    """What one place showed of one name in the end: web, mount or brick of a node."""

    place: str
    name: str
    state: str  # file, absent, error
    size: int = 0
    sha256: str = ""
    zero_tail: int = 0  # how many zeros it ends with
    detail: str = ""


@dataclass
class Verdict:
    """What became of one file, and why."""

    label: str
    name: str
    verdict: str = "stable"
    reasons: list[str] = field(default_factory=list)
    stale: float = 0.0  # for how long after its acknowledgement it was not found

    def add(self, verdict: str, reason: str) -> None:
        """Give another reason; the worst verdict stays."""
        if VERDICTS.index(verdict) < VERDICTS.index(self.verdict):
            self.verdict = verdict
        if verdict != "stable":
            self.reasons.append(f"{verdict}: {reason}")


@lru_cache(maxsize=100_000)
def wanted_hash(seed: str, label: str, size: int) -> str:
    """Return the SHA-256 that a file must have."""
    return hashlib.sha256(content(seed, label, size)).hexdigest()


def wrong_bytes(wanted: bytes, got: bytes) -> str:
    """Name what is wrong with bytes that a reader got: match, torn or corrupt."""
    if got == wanted:
        return "match"
    if len(got) < len(wanted):
        return "torn" if got == wanted[: len(got)] or not got.strip(b"\0") else "corrupt"
    whole = got.rstrip(b"\0")
    return "torn" if wanted.startswith(whole) and len(whole) < len(wanted) else "corrupt"


def _content_verdict(seen: Seen, size: int) -> str:
    """Of a file whose hash is wrong: a part of it, or other bytes?"""
    return "torn" if seen.size < size or (seen.size >= size and seen.zero_tail > 16) else "corrupt"


@dataclass
class Item:
    """One file of the web addresses: how it came, and its deletes."""

    created: Operation
    deletes: list[Operation] = field(default_factory=list)

    @property
    def label(self) -> str:
        """Whose content it has."""
        return self.created.invoke.label


def judge(
    seed: str, events: Sequence[Event], seen: Iterable[Seen], listed: Mapping[str, str], places: Sequence[str]
) -> list[Verdict]:
    """Return a verdict for each file.

    *listed* maps the stored names that the site lists to their labels: what the site itself says is there. *places*
    are those that were looked at; a place that showed nothing of a name is as if it had shown its absence. Places of
    the web know nothing of files that were made on the mounts.
    """
    ops = list(operations(events))
    by_name: dict[str, dict[str, Seen]] = {}
    for one in seen:
        by_name.setdefault(one.name, {})[one.place] = one
    verdicts = _judge_uploads(seed, ops, by_name, listed, places)
    verdicts += _judge_renames(seed, ops, by_name, [place for place in places if not place.startswith("web")])
    return verdicts


def _judge_uploads(
    seed: str,
    ops: Sequence[Operation],
    by_name: Mapping[str, Mapping[str, Seen]],
    listed: Mapping[str, str],
    places: Sequence[str],
) -> list[Verdict]:
    items = {op.invoke.label: Item(op) for op in ops if op.invoke.what in ("upload", "replace")}
    names = {op.name: op.invoke.label for op in ops if op.invoke.what in ("upload", "replace") and op.name}
    names |= listed
    reads: dict[str, list[Operation]] = {}
    for op in ops:
        if op.invoke.what == "delete" and (label := names.get(op.name)) in items:
            items[str(label)].deletes.append(op)
        elif op.invoke.what == "read":
            reads.setdefault(op.name, []).append(op)
    name_of = {label: name for name, label in names.items()}
    found = []
    for label, item in items.items():
        name = name_of.get(label, "")
        verdict = Verdict(label, name)
        deleted = any(op.outcome == "ok" for op in item.deletes)
        asked = any(op.outcome != "fail" for op in item.deletes)
        acknowledged = item.created.outcome == "ok"
        if name in listed and deleted:
            verdict.add("resurrected", "its delete was acknowledged, and the site lists it")
        elif name not in listed and acknowledged and not asked:
            verdict.add("lost", "acknowledged, and the site does not list it")
        if name in listed:
            _must_be_there(seed, verdict, item, by_name.get(name, {}), places)
        elif deleted or (acknowledged and asked):
            _must_be_gone(verdict, by_name.get(name, {}))
        if not acknowledged or (asked and not deleted):
            verdict.add("unknown", f"{item.created.outcome} when stored" if not acknowledged else "delete unknown")
        if name:
            _judge_reads(verdict, item, reads.get(name, []))
        found.append(verdict)
    return found


def _must_be_there(seed: str, verdict: Verdict, item: Item, seen: Mapping[str, Seen], places: Sequence[str]) -> None:
    size = item.created.invoke.size
    wanted = wanted_hash(seed, item.label, size)
    for place in places:
        one = seen.get(place)
        if one is None or one.state == "absent":
            verdict.add("lost", f"not there: {place}")
        elif one.state == "error":
            verdict.add("lost", f"cannot be read: {place}: {one.detail}")
        elif one.sha256 != wanted:
            verdict.add(_content_verdict(one, size), f"{one.size} of {size} bytes, other hash: {place}")


def _must_be_gone(verdict: Verdict, seen: Mapping[str, Seen]) -> None:
    for one in seen.values():
        if one.state == "file":
            verdict.add("resurrected", f"deleted, and there: {one.place}")


def _judge_reads(verdict: Verdict, item: Item, reads: Sequence[Operation]) -> None:
    """Look at what readers saw meanwhile: torn files at any moment, and how long a file was not found."""
    told = item.created.end.time if item.created.outcome == "ok" and item.created.end is not None else None
    asked = min((op.invoke.time for op in item.deletes), default=float("inf"))
    for op in reads:
        if op.end is None or op.end.kind != "ok":
            continue
        if op.end.status == 200 and op.end.seen in ("torn", "corrupt"):
            verdict.add(op.end.seen, f"read at {op.end.time:.1f} s through {op.invoke.host}")
        elif op.end.status in (404, 410) and told is not None and told <= op.invoke.time and op.end.time < asked:
            verdict.stale = max(verdict.stale, round(op.end.time - told, 2))
            verdict.add("stale", f"not found {op.end.time - told:.1f} s after its acknowledgement, {op.invoke.host}")


def _judge_renames(
    seed: str, ops: Sequence[Operation], by_name: Mapping[str, Mapping[str, Seen]], places: Sequence[str]
) -> list[Verdict]:
    """Judge files made and renamed on the mounts: one name at a time, never none, never two."""
    verdicts = []
    renames: dict[str, list[Operation]] = {}
    for op in ops:
        if op.invoke.what == "rename":
            renames.setdefault(op.invoke.label, []).append(op)
    for op in ops:
        if op.invoke.what != "create":
            continue
        label, size = op.invoke.label, op.invoke.size
        verdict = Verdict(label, op.invoke.name)
        possible = {op.invoke.name} if op.outcome == "ok" else {op.invoke.name, ""}
        every = {op.invoke.name}
        for step in renames.get(label, []):
            old, new = step.invoke.name, step.invoke.target
            every.add(new)
            if step.outcome == "ok":
                possible = {new}
            elif step.outcome == "info":
                possible |= {new} if old in possible else set()
        wanted = wanted_hash(seed, label, size)
        shown: dict[str, list[str]] = {}
        for place in places:
            there = {name: by_name[name][place] for name in sorted(every) if place in by_name.get(name, {})}
            there = {name: one for name, one in there.items() if one.state != "absent"}
            shown.setdefault(" ".join(there), []).append(place)
            if not there and "" not in possible:
                verdict.add("lost", f"under no name: {place}")
            for name, one in there.items():
                if one.state == "error":
                    verdict.add("lost", f"cannot be read: {place}: {one.detail}")
                elif one.sha256 != wanted and op.outcome == "ok":
                    verdict.add(_content_verdict(one, size), f"{one.size} of {size} bytes, other hash: {place}")
                if name not in possible or len(there) > 1:
                    verdict.add("resurrected", f"also or again {name}: {place}")
        if len(shown) > 1 and op.outcome == "ok" and verdict.verdict == "stable":
            text = "; ".join(f"{name or 'nothing'} at {', '.join(at)}" for name, at in shown.items())
            verdict.add("lost", f"places disagree: {text}")
        if len(possible) > 1:
            verdict.add("unknown", "the outcome of a step is unknown")
        verdicts.append(verdict)
    return verdicts


# --- times


@dataclass
class Window:
    """One fault as the marks tell it. All times in seconds since the start; none: it did not come to that."""

    fault: str
    hosts: list[str]
    inject: float
    holds: float | None = None
    lift: float | None = None
    ended: float | None = None
    clean: float | None = None
    proof: str = ""

    @property
    def last(self) -> float:
        """Return the last time that is known of it."""
        return next(t for t in (self.clean, self.ended, self.lift, self.holds, self.inject) if t is not None)


def windows(events: Iterable[Event]) -> list[Window]:
    """Read the marks: `inject NAME`, `holds PROOF`, `lift`, `ended`, `clean`."""
    found: list[Window] = []
    for event in events:
        if event.what != "mark":
            continue
        word, _, rest = event.note.partition(" ")
        if word == "inject":
            found.append(Window(rest, event.host.split(",") if event.host else [], event.time))
        elif found and word in ("holds", "lift", "ended", "clean"):
            setattr(found[-1], word, event.time)
            if word == "holds":
                found[-1].proof = rest
    return found


def _group(what: str) -> str:
    return "read" if what == "read" else "upload" if what in ("upload", "replace") else what


def histogram(seconds: Iterable[float]) -> dict[str, int]:
    """Count times by bucket."""
    counts = {f"<= {edge:g} s": 0 for edge in BUCKETS} | {"longer": 0}
    for value in seconds:
        key = next((f"<= {edge:g} s" for edge in BUCKETS if value <= edge), "longer")
        counts[key] += 1
    return counts


def measure(window: Window, ops: Sequence[Operation], until: float) -> dict[str, Any]:
    """Return what one fault cost: stalls, errors, first successes; healthy hosts apart from those it hit."""
    result: dict[str, Any] = asdict(window)
    if window.clean is not None and window.lift is not None:
        result["seconds_to_clean"] = round(window.clean - window.lift, 2)
    for side in ("healthy", "hit"):
        for kind in ("read", "upload", "delete"):
            mine = [
                op
                for op in ops
                if _group(op.invoke.what) == kind
                and (op.invoke.host in window.hosts) == (side == "hit")
                and op.invoke.time < until
                and (op.end.time if op.end is not None else until) >= window.inject
            ]
            if not mine:
                continue
            good = [op for op in mine if op.outcome == "ok"]
            bad = [op for op in mine if op.outcome != "ok" and op.invoke.time >= window.inject]
            row: dict[str, Any] = {
                "operations": len(mine),
                "acknowledged": len(good),
                "errors": len(bad),
                "longest_stall": round(max(min(op.seconds, until - op.invoke.time) for op in mine), 2),
                "longest_acknowledged": round(max((op.seconds for op in good), default=0.0), 2),
            }
            if bad:
                ends = [op.end.time for op in bad if op.end is not None] or [until]
                row["error_window"] = round(max(ends) - min(op.invoke.time for op in bad), 2)
            for mark, start in (("fault", window.inject), ("lift", window.lift)):
                first = [op.end.time for op in good if start is not None and op.end and op.invoke.time >= start]
                if first:
                    row[f"first_success_after_{mark}"] = round(min(first) - (start or 0.0), 2)
            result[f"{kind} {side}"] = row
    return result


def refused_reads(
    events: Sequence[Event], since: float, until: float, hosts: Sequence[str], age: float
) -> list[Operation]:
    """Return reads through *hosts* that did not give a file, though it had been acknowledged *age* seconds before.

    Those that began between *since* and *until* and have ended. A file whose delete was asked for by then is no loss.
    """
    stored: dict[str, float] = {}
    asked: dict[str, float] = {}
    reads = []
    for op in operations(events):
        if op.invoke.what in ("upload", "replace") and op.outcome == "ok" and op.end is not None:
            stored[op.name] = op.end.time
        elif op.invoke.what == "delete":
            asked.setdefault(op.name, op.invoke.time)
        elif op.invoke.what == "read" and op.invoke.host in hosts and since <= op.invoke.time <= until:
            reads.append(op)
    return [
        op
        for op in reads
        if op.end is not None
        and op.end.status != 200
        and stored.get(op.name, until) + age <= op.invoke.time
        and op.end.time < asked.get(op.name, float("inf"))
    ]


def refused_for(events: Sequence[Event], since: float, until: float, hosts: Sequence[str]) -> tuple[int, float]:
    """Return how many uploads through *hosts* were not acknowledged, and the seconds from the first to the last end."""
    bad = [
        op
        for op in operations(events)
        if op.invoke.what in ("upload", "replace") and op.invoke.host in hosts and since <= op.invoke.time <= until
        and op.end is not None and op.outcome != "ok"
    ]  # fmt: skip
    ends = [op.end.time for op in bad if op.end is not None]
    return len(bad), round(max(ends) - min(op.invoke.time for op in bad), 2) if bad else 0.0


@dataclass
class Report:
    """The whole judgement."""

    verdicts: list[Verdict]
    faults: list[dict[str, Any]]
    numbers: dict[str, Any]

    @property
    def counts(self) -> dict[str, int]:
        """Return how many files got each verdict."""
        return {word: sum(v.verdict == word for v in self.verdicts) for word in VERDICTS}

    @property
    def red(self) -> bool:
        """Tell whether anything acknowledged was lost, torn, corrupted or resurrected."""
        return any(self.counts[word] for word in RED)

    def line(self) -> str:
        """Return the last line of torture."""
        counts = ", ".join(f"{count} {word}" for word, count in self.counts.items())
        return f"{self.numbers['acknowledged']} operations acknowledged; files: {counts}"


def report(
    seed: str, events: Sequence[Event], seen: Iterable[Seen], listed: Mapping[str, str], places: Sequence[str]
) -> Report:
    """Judge every file and measure every fault."""
    ops = list(operations(events))
    marks = windows(events)
    end = max((event.time for event in events), default=0.0)
    good = [op for op in ops if op.outcome == "ok"]

    def under(op: Operation) -> bool:
        return any(w.inject <= op.invoke.time <= (w.ended if w.ended is not None else end) + AFTER for w in marks)

    stored = [op.invoke for op in good if op.invoke.what in ("upload", "replace")]
    numbers: dict[str, Any] = {
        "seconds": end,
        "acknowledged": len(good),
        "acknowledged_under_fault": sum(under(op) for op in good),
        "acknowledged_writes": sum(op.invoke.what in WRITES for op in good),
        "stored": len(stored),
        "operations": {what: sum(op.invoke.what == what for op in ops) for what in ("read", *WRITES)},
        "failed": sum(op.outcome == "fail" for op in ops),
        "unknown": sum(op.outcome == "info" for op in ops),
        "clients": len({op.invoke.client for op in ops}),
        "sizes": {
            word: round(sum(e.size in sizes for e in stored) / len(stored), 3) if stored else 0.0
            for word, sizes in CLASSES.items()
        },
        "seconds_of_reads": histogram(op.seconds for op in ops if op.invoke.what == "read"),
        "seconds_of_writes": histogram(op.seconds for op in ops if op.invoke.what in WRITES),
    }
    until = [*(window.inject for window in marks[1:]), end]
    faults = [measure(window, ops, limit) for window, limit in zip(marks, until, strict=False)]
    verdicts = judge(seed, events, seen, listed, places)
    numbers["longest_stale"] = max((verdict.stale for verdict in verdicts), default=0.0)
    return Report(verdicts, faults, numbers)


def together(reports: Sequence[Report]) -> Report:
    """Return several runs as one: every file and fault, numbers added up, the longest of the times."""
    numbers: dict[str, Any] = {}
    for word, value in reports[0].numbers.items():
        every = [one.numbers[word] for one in reports]
        if word == "sizes":  # shares of what was stored
            stored = sum(one.numbers["stored"] for one in reports)
            weighed = {key: sum(one.numbers["sizes"][key] * one.numbers["stored"] for one in reports) for key in value}
            numbers[word] = {key: round(share / stored, 3) if stored else 0.0 for key, share in weighed.items()}
        elif isinstance(value, dict):
            numbers[word] = {key: sum(one[key] for one in every) for key in value}
        elif word == "clients":  # each run has its own, of the same number
            numbers[word] = min(every)
        else:
            numbers[word] = max(every) if word == "longest_stale" else sum(every)
    verdicts = [verdict for one in reports for verdict in one.verdicts]
    return Report(verdicts, [fault for one in reports for fault in one.faults], numbers)
