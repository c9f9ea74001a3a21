"""The command ``manage.py tribrick sync``."""

from __future__ import annotations

import argparse
import contextlib
import json
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.core.files.storage import FileSystemStorage, storages
from django.db import DatabaseError

from tribrick.conf import setting
from tribrick.storage import VolumeStorage
from tribrick.storage.catalogued import below
from tribrick.sync.move import doors
from tribrick.sync.plan import Plan
from tribrick.sync.run import STRATEGIES, Report, Sync, status, told
from tribrick.sync.side import Progress, Side
from tribrick.sync.state import QUIET, State, SyncError
from tribrick.sync.versions import Version
from tribrick.sync.watch import Changes, follow, wake, wake_file

MORE: Final = """\
status     what is known here; looks neither at the disk nor at peers
plan       what a run would do; nothing is changed
watch      run, and again when a file changes here or on a peer, and every --every seconds; for a service
run        look at the disk, ask the peers, settle conflicts, fetch, write, tell the catalog
conflicts  the conflict copies that are there, and names that are undecided
resolve    end one conflict: NAME --keep WHAT

Strategies for concurrent changes: newest (the last writer has the name, the loser is kept as a conflict
copy), keep-both (the winner gets a copy too), ask-file (questions go to --file, answers come from there).
A deletion wins against a concurrent change; the change is kept as a conflict copy.
Nothing is overwritten or removed that is not in the history. docs/sync.md tells more."""
_KEYS: Final = {"state", "peers", "storage", "strategy", "linked", "quiet"}
_SHOWN: Final = 20


@dataclass
class Answer:
    """What the command says, and what is wrong, with the exit code."""

    document: dict[str, Any]
    text: list[str] = field(default_factory=list)
    trouble: str = ""
    code: int = 1


def add_arguments(made: argparse.ArgumentParser) -> None:
    """Declare the options."""
    made.add_argument("what", choices=[*_WORK, "watch"], help="see below")
    made.add_argument("name", nargs="?", help="resolve: a conflict copy, or a name that is undecided")
    made.add_argument("--init", action="store_true", help="run: begin a state for this directory, as it is now")
    made.add_argument("--strategy", choices=STRATEGIES, help='how concurrent changes end (TRIBRICK["SYNC"], newest)')
    made.add_argument("--file", metavar="FILE", help="ask-file: for questions and answers")
    made.add_argument(
        "--keep", metavar="WHAT",
        help="resolve: current or copy; of an undecided name newest, both, or a version's node or id",
    )  # fmt: skip
    made.add_argument(
        "--accept", type=_natural, default=0, metavar="N", help="let up to N files be deleted in this run"
    )
    made.add_argument(
        "--every",
        type=_seconds,
        default=300.0,
        metavar="SECONDS",
        help="watch: the longest time between two runs (300)",
    )
    made.add_argument("--peer", action="append", metavar="NAME", help="only this peer; may be repeated")
    made.add_argument("--no-catalog", action="store_true", help="run: do not tell the catalog, a side without it")


def _natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError("must not be negative")
    return number


def _seconds(text: str) -> float:
    number = float(text)
    if not 1 <= number <= 86_400:
        raise argparse.ArgumentTypeError("must be from 1 to 86400 seconds")
    return number


def watch(options: Mapping[str, Any], stop: threading.Event, said: Callable[[str], Any]) -> None:
    """Run again and again until *stop* is set, and say what was done and what is wrong. Begins a state if need be."""
    given = _settings()
    root = Path(storages[str(given.get("storage", "default"))].location).absolute()  # type: ignore[attr-defined]
    peers, before = doors(given.get("peers", ())), ""

    def turn() -> bool:
        nonlocal before
        init = not Path(given["state"]).exists()
        try:
            answer = work({**options, "what": "run", "name": None, "keep": None, "init": init}, lambda *_words: None)
        except SyncError as error:
            answer = Answer({}, [], str(error))
        trouble = "; ".join([*answer.text[:-1], answer.trouble]) if answer.trouble else ""
        if trouble != before:
            said(trouble or "in order again")
        before = trouble
        if answer.document.get("written") or answer.document.get("removed"):
            said(answer.text[-1])
        scan = answer.document.get("scan", {})
        if any(scan.get(word) for word in ("new", "changed", "gone")):
            wake(peers)
        return bool(scan.get("young"))

    with Changes(root, wake_file(given["state"])) as changes:
        follow(turn, changes, every=options["every"], quiet=float(given.get("quiet", QUIET)), stop=stop, said=said)


def work(options: Mapping[str, Any], progress: Progress) -> Answer:
    """Do what the options say."""
    what = options["what"]
    if (what == "resolve") != bool(options["name"] and options["keep"]) or (options["name"] and what != "resolve"):
        raise SyncError("resolve needs NAME and --keep, and nothing else does")
    given = _settings()
    alias = str(given.get("storage", "default"))
    storage = storages[alias]
    if not isinstance(storage, FileSystemStorage):
        raise SyncError(f"the storage {alias} has no directory that could be reconciled")
    init = what == "run" and options["init"]
    with contextlib.closing(_state(given, str(storage.location), init=init)) as state:
        if Path(state.meta("root")) != Path(storage.location).absolute():
            raise SyncError(f"{state.path} is of {state.meta('root')}, not of {storage.location}")
        with state.transaction():
            state.set_meta("exclude", json.dumps(below(storage)))
            state.set_meta("linked", "yes" if given.get("linked") else "no")
            state.set_meta("quiet", str(float(given.get("quiet", QUIET))))
        side = Side(
            state, prove=_proof(storage), linked=bool(given.get("linked")),
            mode=storage.file_permissions_mode, progress=progress,
        )  # fmt: skip
        if init or (what == "run" and not state.meta("mark")):  # the latter: a first run that was killed
            side.begin()
        peers = doors(given.get("peers", ()))
        if unknown := set(options["peer"] or ()) - {peer.name for peer in peers}:
            raise SyncError(f"no peer is called {', '.join(sorted(unknown))}")
        sync = Sync(
            state, side, [peer for peer in peers if not options["peer"] or peer.name in options["peer"]],
            strategy=options["strategy"] or str(given.get("strategy", "newest")), file=options["file"],
            progress=progress,
        )  # fmt: skip
        return _WORK[what](sync, options)


def _settings() -> Mapping[str, Any]:
    given = setting("SYNC")
    if not isinstance(given, Mapping) or set(given) - _KEYS:
        raise ImproperlyConfigured(f'TRIBRICK["SYNC"] may have the keys {", ".join(sorted(_KEYS))}')
    if not given.get("state"):
        raise SyncError('TRIBRICK["SYNC"] needs "state": the path of a file for what is known here')
    return given


def _state(given: Mapping[str, Any], root: str, *, init: bool) -> State:
    if not init:
        return State.open(given["state"])
    if not Path(root).is_dir():
        raise SyncError(f"{root} is not a directory")
    if Path(given["state"]).exists():
        state = State.open(given["state"])
        if state.last():
            state.close()
            raise SyncError(f"there is a state at {given['state']} already; --init is for the first run")
        return state  # a run that was killed at its beginning
    return State.create(given["state"], node=str(setting("NODE")), root=root)


def _proof(storage: FileSystemStorage) -> Callable[[int, str], None] | None:
    """Return the check of the sentinel that the storage asks for, if it asks for one: a local directory has none."""
    sentinel = storage.expected_sentinel() if isinstance(storage, VolumeStorage) else None
    return sentinel.check if sentinel else None


# The commands.


def _status(sync: Sync, _options: Mapping[str, Any]) -> Answer:
    found = status(sync.state, sync.side)
    text = [
        f"{found['node']}: {found['root']}",
        f"{found['files']} files, {found['tombstones']} tombstones, {found['versions']} versions",
        *(f"peer {peer['name']}: heard {peer['heard']}" for peer in found["peers"]),
    ]
    text.append(
        f"{found['pending']} names to bring to the disk, {found['conflicts']} conflict copies, "
        f"{len(found['undecided'])} undecided"
    )
    wrong = [f"{found[key]} {what}" for key, what in (("pending", "pending"), ("conflicts", "conflicts")) if found[key]]
    return Answer(found, text, ", ".join(wrong))


def _plan(sync: Sync, options: Mapping[str, Any]) -> Answer:
    report, made = sync.plan(accept=options["accept"])
    document = {**report.as_dict(), **_planned(made)}
    text = [f"{step.kind}: {step.name}" for step in made.steps if step.kind != "note"]
    text += _about(report)
    size = sum(fetch.size for fetch in made.fetches)
    text.append(
        f"{report.scan.recorded} changes here; {made.count('write')} to write, {made.count('remove')} to remove, "
        f"{sum(len(fetch.contents) for fetch in made.fetches)} contents to fetch, {size} bytes at most"
    )
    text.append("Nothing was done; run does it.")
    return _with_trouble(Answer(document, text), report)


def _planned(made: Plan) -> dict[str, Any]:
    return {
        "steps": [{"name": step.name, "kind": step.kind, "sha256": step.after.sha256} for step in made.steps],
        "fetches": [
            {"files": len(fetch.contents), "bytes": fetch.size, "compress": fetch.compress} for fetch in made.fetches
        ],
    }


def _run(sync: Sync, options: Mapping[str, Any]) -> Answer:
    report = sync.run(accept=options["accept"])
    answer = Answer(report.as_dict(), _about(report))
    away = ""
    if not options["no_catalog"]:
        from tribrick.sync.replay import replay

        try:
            done = replay(sync, str(_settings().get("storage", "default")), accept=options["accept"])
        except DatabaseError as error:
            away = " ".join(str(error).split())
            answer.document["catalog"] = {"away": away}
            answer.text.append(f"away: the catalog: {away}")
        else:
            answer.document["catalog"] = vars(done)
            answer.text += [f"changed: {name!r}: its new content is {own!r}" for name, own in done.versions.items()]
            answer.text += [f"deleted in the catalog: {name!r}" for name in done.dead]
            answer.text += [f"the catalog: {name!r}: {why}" for name, why in done.failed.items()]
            answer.text.append(f"catalog: {len(done.added)} added, {len(done.deleted)} deleted")
            if done.failed:
                answer.trouble = f"{len(done.failed)} could not be told to the catalog"
    applied = report.applied
    answer.text.append(
        f"{report.scan.seen} files, {report.scan.recorded} changed here; {report.fetched} fetched, "
        f"{len(applied.written)} written, {len(applied.removed)} removed, {len(report.conflicts)} new conflicts"
    )
    answer = _with_trouble(answer, report)
    if away:
        answer.trouble, answer.code = answer.trouble or "the catalog is away", 2
    return answer


def _about(report: Report) -> list[str]:
    """Say what a person should know."""
    text = [f"conflict: {copy.origin!r}: a change of {copy.node} is kept as {copy.name!r}" for copy in report.conflicts]
    text += [f"undecided: {name!r}" for name in report.undecided]
    text += [
        f"refused on {node}: {name!r}: {why}" for node, names in report.refused.items() for name, why in names.items()
    ]
    text += [f"failed: {name!r}: {why}" for name, why in report.applied.failed.items()]
    text += [f"no peer gives the content: {name!r}" for name in report.missing[:_SHOWN]]
    text += [f"changed while it was replaced: {name!r}" for name in report.applied.rescued]
    text += [f"away: {name}: {why}" for name, why in report.away.items()]
    return text + report.complaints


def _with_trouble(answer: Answer, report: Report) -> Answer:
    refused = sum(map(len, report.refused.values()))
    wrong = [
        f"{count} {what}"
        for count, what in (
            (len(report.applied.failed), "failed"),
            (len(report.missing), "without content"),
            (len(report.undecided), "undecided"),
            (refused, "refused"),
        )
        if count
    ]
    answer.trouble = ", ".join([*([answer.trouble] if answer.trouble else []), *wrong])
    if report.away:
        answer.trouble, answer.code = f"away: {', '.join(report.away)}", 2
    return answer


def _conflicts(sync: Sync, _options: Mapping[str, Any]) -> Answer:
    copies, undecided = sync.state.copies(), sync.state.undecided()
    document = {
        "conflicts": [{**told(copy), "current": _current(sync, copy)} for copy in copies],
        "undecided": [{"name": name, "choices": [told(one) for one in sync.state.heads(name)]} for name in undecided],
    }
    text = [f"{copy.origin!r}: {copy.node}'s of {told(copy)['at']} is {copy.name!r}" for copy in copies]
    for name in undecided:
        text += [
            f"undecided: {name!r}: {one['id']} of {one['node']}, {one['at']}"
            for one in map(told, sync.state.heads(name))
        ]
    text.append(f"{len(copies)} conflict copies, {len(undecided)} undecided")
    return Answer(document, text, f"{len(copies) + len(undecided)} conflicts" if copies or undecided else "")


def _current(sync: Sync, copy: Version) -> dict[str, Any] | None:
    heads = sync.state.heads(copy.origin)
    return told(heads[-1]) if heads else None


def _resolve(sync: Sync, options: Mapping[str, Any]) -> Answer:
    report = sync.resolve(options["name"], options["keep"])
    answer = Answer(report.as_dict(), _about(report))
    answer.text.append(f"{len(report.applied.written)} written, {len(report.applied.removed)} removed")
    return _with_trouble(answer, report)


_WORK: Final[dict[str, Callable[[Sync, Mapping[str, Any]], Answer]]] = {
    "status": _status,
    "plan": _plan,
    "run": _run,
    "conflicts": _conflicts,
    "resolve": _resolve,
}
