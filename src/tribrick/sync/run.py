"""One reconciliation from end to end, and the decisions of a person."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Final

from tribrick.sync import versions
from tribrick.sync.move import Door, PeerAway, Pulled
from tribrick.sync.plan import Plan, Step, plan, too_many
from tribrick.sync.side import Applied, Progress, Scan, Side, _no_progress, _write
from tribrick.sync.state import Peer, State, SyncError
from tribrick.sync.versions import Version

STRATEGIES: Final = ("newest", "keep-both", "ask-file")
PARTIAL_AGE: Final = 7 * 24 * 3600
"""Seconds after which a part of a file that never arrived whole is removed."""


@dataclass
class Report:
    """What a run did."""

    scan: Scan = field(default_factory=Scan)
    pulled: dict[str, int] = field(default_factory=dict)
    away: dict[str, str] = field(default_factory=dict)
    refused: dict[str, dict[str, str]] = field(default_factory=dict)
    """Files that a side cannot record, by the side's name, and why."""
    conflicts: list[Version] = field(default_factory=list)
    undecided: list[str] = field(default_factory=list)
    fetched: int = 0
    fetched_bytes: int = 0
    complaints: list[str] = field(default_factory=list)
    applied: Applied = field(default_factory=Applied)
    missing: list[str] = field(default_factory=list)
    """Names whose content no peer that can be reached has."""

    def as_dict(self) -> dict[str, Any]:
        """Return it for JSON."""
        return {
            "scan": {
                "seen": self.scan.seen, "new": self.scan.new, "changed": self.scan.changed, "gone": self.scan.gone,
                "young": self.scan.young,
            },
            "refused": self.refused,
            "pulled": self.pulled,
            "away": self.away,
            "conflicts": [told(copy) for copy in self.conflicts],
            "undecided": self.undecided,
            "fetched": {"files": self.fetched, "bytes": self.fetched_bytes},
            "written": self.applied.written,
            "removed": self.applied.removed,
            "failed": self.applied.failed,
            "rescued": self.applied.rescued,
            "missing": self.missing,
            "complaints": self.complaints,
        }  # fmt: skip


def told(version: Version) -> dict[str, Any]:
    """Return what a person wants to know of a version."""
    return {
        "id": version.id, "name": version.name, "about": version.origin or version.name, "deleted": version.deleted,
        "node": version.node, "at": when(version.at), "size": version.size, "sha256": version.sha256,
    }  # fmt: skip


def when(nanoseconds: int) -> str:
    """Return a time as text; one that no calendar has, as its number."""
    try:
        return datetime.fromtimestamp(nanoseconds / 1e9, tz=timezone.utc).isoformat(timespec="milliseconds")
    except (ValueError, OverflowError, OSError):
        return f"{nanoseconds} ns"


class Sync:
    """The side of this node with its peers. *state* is open; the caller closes it."""

    def __init__(
        self,
        state: State,
        side: Side,
        doors: Sequence[Door] = (),
        *,
        strategy: str = "newest",
        file: str | os.PathLike[str] | None = None,
        progress: Progress = _no_progress,
    ) -> None:
        if strategy not in STRATEGIES:
            raise SyncError(f"there is no strategy {strategy!r}; there are {', '.join(STRATEGIES)}")
        if strategy == "ask-file" and file is None:
            raise SyncError("the strategy ask-file needs a file for questions and answers: --file")
        self.state, self.side, self.doors, self.strategy, self.progress = state, side, doors, strategy, progress
        self.file = None if file is None else Path(file)

    def run(self, *, accept: int = 0) -> Report:
        """Do all steps but the replay. A step that cannot be done is reported; the others go on."""
        with self.state.locked("run", 0):
            self.side.check()
            answers = self._answers()
            report = Report()
            pulled = self._look(report, accept, scan=True)
            with self.state.locked():
                self._learn(report, pulled)
                self._decide(answers, report)
                made = self._plan()
                self._guard(made, accept)
            self._ask(report)
            self._fetch(made, report, pulled)
            with self.state.locked():
                self._apply(report, accept)
            self._tidy()
        return report

    def plan(self, *, accept: int = 0) -> tuple[Report, Plan]:
        """Return what a run would do. Nothing is changed, here or at a peer; theirs is what they have recorded."""
        self.side.check()
        answers = self._answers()
        report, real = Report(), self.state
        self.state = self.side.state = real.in_memory()
        self.side.dry = True
        try:
            with real.locked():
                pulled = self._look(report, accept, scan=False)
            self._learn(report, pulled)
            self._decide(answers, report)
            made = self._plan()
            self._guard(made, accept)
            report.undecided = made.open
            return report, made
        finally:
            self.state.close()
            self.state = self.side.state = real
            self.side.dry = False

    # The steps.

    def _look(self, report: Report, accept: int, *, scan: bool) -> dict[str, Pulled]:
        """Look at the disk while the peers look at theirs and answer."""
        with ThreadPoolExecutor(max(1, len(self.doors))) as pool:
            asked: dict[str, Future[Pulled]] = {
                door.name: pool.submit(door.pull, self.state.peer(door.name), scan=scan) for door in self.doors
            }
            if scan:
                with self.state.locked():
                    report.scan = self.side.scan(accept=accept)
            else:
                report.scan = self.side.scan(accept=accept)
            if report.scan.refused:
                report.refused[self.state.meta("node")] = report.scan.refused
            answered = {}
            for name, future in asked.items():
                try:
                    answered[name] = future.result()
                except PeerAway as error:
                    report.away[name] = error.strerror or str(error)
        return answered

    def _learn(self, report: Report, pulled: Mapping[str, Pulled]) -> None:
        """Add what the peers know. Each answer is a transaction, so what was added is not asked for again."""
        for name, answer in pulled.items():
            with self.state.transaction():
                report.pulled[name] = len(self.state.add(answer.versions))
                self.state.set_peer(Peer(name, answer.progress.state, answer.progress.seq, time.time()))
            if answer.refused:
                report.refused[name] = answer.refused

    def _decide(self, answers: Mapping[str, Any], report: Report) -> None:
        for name, answer in answers.items():
            self._decide_one(name, answer)
        report.conflicts = self.state.settle(
            keep_both=self.strategy == "keep-both", ask=self.strategy == "ask-file"
        )  # fmt: skip

    def _plan(self) -> Plan:
        names = self.state.dirty()
        wanted = {name: self.state.heads(name) for name in names}
        disk = {name: there for name in names if (there := self.state.on_disk(name)) is not None}
        contents = {heads[-1].sha256 for heads in wanted.values() if heads}
        return plan(wanted, disk, {sha256 for sha256 in contents if sha256 and self.side.has(sha256)})

    def _guard(self, made: Plan, accept: int) -> None:
        if why := too_many(made.count("remove"), self.state.counts()["shown"], accept):
            raise SyncError(f"{self.side.root}: {why}")

    def _fetch(self, made: Plan, report: Report, pulled: Mapping[str, Pulled]) -> None:
        """Ask every peer that answered for the contents that are still missing."""
        total = sum(len(fetch.contents) for fetch in made.fetches)
        here: set[str] = set()
        for fetch in made.fetches:
            left = fetch
            complaints = []
            for door in self.doors:
                if door.name not in pulled or not left.contents:
                    continue
                try:
                    came, complaint = door.fetch(left, self.side)
                except OSError as error:
                    came, complaint = set(), error.strerror or str(error)
                complaints += [complaint] if complaint else []
                here |= came
                left = left.without(here)
                self.progress("fetched", len(here), total)
            report.fetched_bytes += fetch.size if not left.contents else 0
            if left.contents:  # one that lacks a content complains, and another may have it
                report.complaints += complaints
        report.fetched = len(here)

    def _apply(self, report: Report, accept: int = 0) -> None:
        made = self._plan()
        self._guard(made, accept)
        report.undecided = made.open
        steps: list[Step] = []
        for step in made.steps:
            if step.kind == "write" and not self.side.has(step.after.sha256):
                report.missing.append(step.name)
            else:
                steps.append(step)
        report.applied = self.side.apply(steps)

    def _tidy(self) -> None:
        with os.scandir(self.side.history / "fetch") as entries:
            partial = [entry.path for entry in entries if entry.name == "partial"]
        for path in partial:
            with os.scandir(path) as entries:
                for entry in entries:
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > PARTIAL_AGE:
                        os.unlink(entry.path)

    # Questions and answers.

    def _answers(self) -> dict[str, Any]:
        """Read the answers that a person has written into the file."""
        if self.strategy != "ask-file" or self.file is None or not self.file.exists():
            return {}
        try:
            found = json.loads(self.file.read_text(encoding="utf-8"))["conflicts"]
            given = {one["name"]: one for one in found if one["answer"] is not None}
            for one in given.values():
                if not isinstance(one["answer"], str) or not all(isinstance(at["id"], str) for at in one["choices"]):
                    raise ValueError(f"the answer about {one['name']!r} is not one")
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SyncError(f"{self.file}: {error}; nothing was changed") from error
        for name, one in given.items():
            known = self.state.heads(name)
            if {at["id"] for at in one["choices"]} == {head.id for head in known}:
                _chosen(known, one["answer"], name)
        return given

    def _decide_one(self, name: str, one: Mapping[str, Any]) -> None:
        known = self.state.heads(name)
        if len(known) < 2 or {at["id"] for at in one["choices"]} != {head.id for head in known}:
            return  # changed since it was asked: it is asked again
        self.decide(name, one["answer"])

    def decide(self, name: str, answer: str) -> None:
        """End a conflict as a person wants: ``newest``, ``both``, or the node or id of a version."""
        known = self.state.heads(name)
        if answer in {"newest", "both"}:
            self.state.add(versions.settle(known, keep_both=answer == "both"))
        else:
            chosen = _chosen(known, answer, name)
            self.state.write(name, None if chosen.deleted else chosen, at=time.time_ns())

    def _ask(self, report: Report) -> None:
        """Write the questions that are open."""
        if self.strategy != "ask-file" or self.file is None:
            return
        names = [name for name in self.state.undecided() if len({one.sha256 for one in self.state.heads(name)}) > 1]
        asked = [
            {"name": name, "answer": None, "choices": [told(head) for head in self.state.heads(name)]} for name in names
        ]
        how = 'An answer is "newest", "both", or the node or id of a choice. Then run again.'
        _write(self.file, (json.dumps({"how": how, "conflicts": asked}, indent=2) + "\n").encode())
        report.undecided = names

    def resolve(self, name: str, keep: str) -> Report:
        """End a conflict of one name and show the result on this disk.

        *name* is a conflict copy, with *keep* ``current`` (the copy goes) or ``copy`` (its content gets the
        name back that the conflict was about); or a name that is undecided, with an answer of :meth:`decide`.
        """
        report = Report()
        with self.state.locked("run", 0), self.state.locked():
            report.scan = self.side.scan()
            known = self.state.heads(name)
            now = time.time_ns()
            if len(known) > 1:
                self.decide(name, keep)
            elif not known or known[0].deleted or not known[0].origin:
                raise SyncError(
                    f"{name!r} is neither a conflict copy nor undecided; `tribrick sync conflicts` lists them"
                )
            elif keep not in {"current", "copy"}:
                raise SyncError(f"of a conflict copy --keep is current or copy, not {keep!r}")
            else:
                if keep == "copy":
                    if not self.side.has(known[0].sha256):
                        raise SyncError(f"the content of {name!r} is not here yet; run `tribrick sync run` first")
                    if len(self.state.heads(known[0].origin)) > 1:
                        raise SyncError(f"{known[0].origin!r} is undecided; resolve it first")
                    self.state.write(known[0].origin, known[0], at=now)
                self.state.write(name, None, at=now)
            report.conflicts = self.state.settle(ask=self.strategy == "ask-file")
            self._apply(report)
        return report

    def show(self, wish: Callable[[State], None]) -> Applied:
        """Let *wish* write versions, and show them on the disk. For the replay."""
        with self.state.locked("run"), self.state.locked():
            with self.state.transaction():
                wish(self.state)
                self.state.settle(keep_both=self.strategy == "keep-both", ask=self.strategy == "ask-file")
            report = Report()
            self._apply(report)
        return report.applied


def _chosen(known: Sequence[Version], answer: str, name: str) -> Version:
    if answer in {"newest", "both"}:
        return known[-1]
    found = [one for one in known if answer in {one.id, one.node}]
    if len(found) != 1:
        choices = ", ".join(f"{one.id} ({one.node})" for one in known)
        raise SyncError(f"{answer!r} does not say which of the versions of {name!r}: newest, both, or one of {choices}")
    return found[0]


def status(state: State, side: Side) -> dict[str, Any]:
    """Return how this side is, without looking at the disk or at peers."""
    side.check()
    copies = state.copies()
    return {
        "node": state.meta("node"),
        "root": str(side.root),
        **state.counts(),
        "conflicts": len(copies),
        "undecided": state.undecided(),
        "peers": [{"name": peer.name, "seq": peer.seq, "heard": when(int(peer.heard * 1e9))} for peer in state.peers()],
    }
