#!/usr/bin/python3
"""The mirror: a plain copy of the media outside GlusterFS, and dated snapshots of it.

It runs on a node, from cron or a systemd timer, and needs the standard library, rsync, ``pg_dump`` and
the files ``ledger.py`` and ``hasher.py`` beside it, but no Django. In its place lie::

    current/                      what the ledger says is stored now; deleted files leave it
    snapshots/2026-11-01T10-00-00Z/
        files/                    the whole tree, hard links to current/
        database.dump             pg_dump's custom format
        manifest.gz               name, SHA-256 and size of every file at this number, one JSON object a line
        marker.json               the ledger's number of both, and whether the snapshot is good
    state.json                    how far it is, and how the last run ended

What to copy is read from the ledger, so unchanged files cost nothing and the volume is not walked
through. A file comes into ``current/`` only after its SHA-256 was found to be the ledger's. A file
leaves it only when the ledger says that it was deleted: what is merely gone from the volume stays.
Once a week the volume is walked through, which also finds files that the ledger does not know, and
every file of the mirror is read.

A snapshot is made from the dump: its newest change is the marker's number, ``current/`` is brought
to exactly that number, compared with the ledger, and linked. Everything appears by a rename, so a
run may be killed anywhere.

Exit codes: 0 all in order, 1 something differs or could not be done, 2 it could not be found out
because the volume, the ledger or the database is away, or another run is at work.
"""

from __future__ import annotations

import argparse
import contextlib
import ctypes
import fcntl
import gzip
import hashlib
import json
import os
import pwd
import random
import re
import selectors
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any, Final

try:
    from tribrick import hasher
    from tribrick.ledger import Entry, Known, Ledger, LedgerError
except ImportError:  # on a node the same files lie beside this one, where the type checker does not see them
    import hasher  # type: ignore[no-redef, import-not-found]
    from ledger import Entry, Known, Ledger, LedgerError  # type: ignore[no-redef, import-not-found]

CONFIGURATION: Final = "/etc/tribrick/mirror.json"
STAMP: Final = "%Y-%m-%dT%H-%M-%SZ"
BATCH: Final = 1000
BATCH_BYTES: Final = 1 << 30
SHOWN: Final = 100
# For so long the ledger is waited for before a file is called missing: it hears of a delete two seconds late.
LAG = 10.0
# A file that nobody knows may be an upload whose row is not committed yet.
YOUNG: Final = 3600.0
MARKER: Final = "marker.json"


class MirrorError(Exception):
    """Something is wrong; the sentence says what to do."""

    code = 1


class Away(MirrorError):
    """The volume, the ledger or the database cannot be asked now."""

    code = 2


@dataclass(frozen=True)
class Config:
    """What the role writes to ``/etc/tribrick/mirror.json``."""

    node: str
    source: str
    volume_id: str
    place: str
    ledger: str
    database_url: str
    sentinel: str = ".tribrick-volume"
    storages: Sequence[str] = ("default",)
    hourly: int = 24
    daily: int = 7
    weekly: int = 8
    full_days: int = 7
    bandwidth_kib: int = 0
    nice: int = 10
    io_class: str = "idle"
    stall: float = 300.0
    dump_timeout: float = 3600.0
    reserve_mib: int = 1024
    push: Mapping[str, Any] = field(default_factory=dict)
    restic: Mapping[str, Any] = field(default_factory=dict)


def read_config(text: str) -> Config:
    """Return the configuration; ``MirrorError`` with a sentence if it is none."""
    try:
        values = json.loads(text)
        unknown = sorted(set(values) - {one.name for one in fields(Config)})
        if unknown:
            raise ValueError(f"unknown: {', '.join(unknown)}")
        config = Config(**values)
    except (ValueError, TypeError) as error:
        raise MirrorError(f"the configuration is not the one that site.yml writes ({error}); run site.yml") from error
    return config


# Decisions: no disk, no clock


@dataclass(frozen=True)
class Snapshot:
    """One dated snapshot. Times are UTC."""

    name: str
    at: datetime
    good: bool
    number: int = 0


def fold(entries: Iterable[Entry]) -> tuple[dict[str, Known], set[str]]:
    """Return what changes come to: the files that are stored after them, and the names deleted by them."""
    stored: dict[str, Known] = {}
    dead: set[str] = set()
    for entry in entries:
        if entry.kind == "added":
            stored[entry.name] = Known(entry.name, "stored", entry.storage, entry.sha256, entry.size)
        elif entry.kind in ("deleted", "purged"):
            stored.pop(entry.name, None)
            dead.add(entry.name)
    return stored, dead


def state_at(now: Iterable[Known], later: Iterable[Entry]) -> dict[str, Known]:
    """Return every file as it was before the changes *later*; *now* are the files after them."""
    then = {known.name: known for known in now}
    for entry in later:
        known = then.get(entry.name)
        if entry.kind == "added":
            then.pop(entry.name, None)
        elif known is not None and entry.kind == "deleted":
            then[entry.name] = Known(known.name, "stored", known.storage, known.sha256, known.size)
    return then


def allowed(name: str) -> bool:
    """Whether *name* can be a stored file's: relative, no dot directories, nothing in the root's dot names."""
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts) or "\0" in name or name.startswith("."):
        return False
    try:
        os.fsencode(name)
    except UnicodeEncodeError:
        return False
    return all(len(os.fsencode(part)) <= 255 for part in parts)


def is_text(name: str) -> bool:
    """Whether a ledger can know *name*; bytes on a disk may be none."""
    try:
        name.encode()
    except UnicodeEncodeError:
        return False
    return True


def judge_rsync(code: int, said: str) -> str:
    """Return why an rsync has failed, or nothing. Only files that vanished while it ran are forgiven."""
    if code in (0, 24):
        return ""
    lines = [line for line in said.splitlines() if line.strip()]
    return f"rsync ended with {code}: {'; '.join(lines[-3:]) or 'it said nothing'}"


def bucket(at: datetime, kind: str) -> str:
    """Return the hour, day or ISO week that a time lies in."""
    return at.strftime({"hourly": "%Y-%m-%d %H", "daily": "%Y-%m-%d", "weekly": "%G-W%V"}[kind])


def due(now: datetime, there: Iterable[Snapshot]) -> bool:
    """Whether this hour has no snapshot yet."""
    return not any(bucket(one.at, "hourly") == bucket(now, "hourly") for one in there)


def expired(there: Iterable[Snapshot], *, hourly: int, daily: int, weekly: int) -> list[Snapshot]:
    """Return the snapshots to remove, the oldest first.

    Of each of the last *hourly* hours that have any, the newest is kept, a good one before a bad one;
    so for days and weeks. The newest of all, those of the hour before it (somebody may have taken one by
    hand, for a reason) and the last good one are never removed.
    """
    newest_first = sorted(there, key=lambda one: one.at, reverse=True)
    keep = {one for one in newest_first if one.at > newest_first[0].at - timedelta(hours=1)}
    keep |= set([one for one in newest_first if one.good][:1])
    for kind, count in (("hourly", hourly), ("daily", daily), ("weekly", weekly)):
        best: dict[str, Snapshot] = {}
        for one in newest_first:
            had = best.setdefault(bucket(one.at, kind), one)
            if one.good and not had.good:
                best[bucket(one.at, kind)] = one
        keep |= set(list(best.values())[:count])
    return sorted(set(newest_first) - keep, key=lambda one: one.at)


def pick(there: Iterable[Snapshot], date: str = "") -> Snapshot:
    """Return the newest good snapshot, with *date* (``2026-11-01``, perhaps with ``T10:30`` UTC) that was there then.

    A snapshot's own name picks it, good or not. ``MirrorError`` if there is none.
    """
    listed = sorted(there, key=lambda one: one.at)
    for one in listed:
        if one.name == date:
            return one
    until = _until(date) if date else None
    fitting = [one for one in listed if one.good and (until is None or one.at < until)]
    if not fitting:
        named = ", ".join(one.name for one in listed if one.good) or "none at all"
        raise MirrorError(f"there is no good snapshot{f' of {date} or before' if date else ''}; good are: {named}")
    return fitting[-1]


def _until(date: str) -> datetime:
    """Return the end of the day or minute that *date* names."""
    for form, length in (
        ("%Y-%m-%d", timedelta(days=1)),
        ("%Y-%m-%dT%H:%M", timedelta(minutes=1)),
        ("%Y-%m-%dT%H:%M:%S", timedelta(seconds=1)),
    ):
        with contextlib.suppress(ValueError):
            return datetime.strptime(date.rstrip("Z"), form).replace(tzinfo=timezone.utc) + length
    raise MirrorError(f"{date!r} is no date: give 2026-11-01, 2026-11-01T10:30 (UTC), or the name of a snapshot")


def libpq(url: str) -> tuple[str, dict[str, str]]:
    """Return a database URL as libpq takes it, and the environment with its password.

    The password is taken out, since every user of a host can read the command line of a process.
    """
    parts = urllib.parse.urlsplit(url)
    if not parts.scheme.startswith(("postgres", "postgis", "pgsql")):
        raise MirrorError(f"the database URL begins with {parts.scheme or 'nothing'}, not postgres")
    login, at, hosts = parts.netloc.rpartition("@")
    user, _, password = login.partition(":")
    clean = urllib.parse.urlunsplit(("postgresql", f"{user}{at}{hosts}", parts.path, parts.query, ""))
    environment = {"PGPASSWORD": urllib.parse.unquote(password)} if password else {}
    return clean, environment | {"PGCONNECT_TIMEOUT": "10"}


def newest_change(lines: Iterable[str]) -> tuple[int, dict[str, str]]:
    """Return the highest number in the table of changes, as ``pg_restore`` writes it out, and that row.

    0 for an empty table.
    """
    columns: list[str] = []
    highest: tuple[int, dict[str, str]] = (0, {})
    met = False
    for line in lines:
        if not columns:
            found = re.match(r"COPY \S*tribrick_change\S* \((.*)\) FROM stdin;", line)
            if found:
                columns, met = [name.strip().strip('"') for name in found[1].split(",")], True
            continue
        if line.startswith("\\."):
            columns = []
            continue
        row = dict(zip(columns, line.rstrip("\n").split("\t"), strict=False))
        if row["number"] != "\\N" and int(row["number"]) > highest[0]:
            highest = int(row["number"]), row
    if not met:
        raise MirrorError("the dump has no table tribrick_change: is this the site's database, and is it migrated?")
    return highest


# Programs with a deadline


class Stalled(Away):
    """A program has shown no progress for too long."""


def run_watched(
    command: Sequence[str],
    *,
    stall: float,
    left: Path,
    environment: Mapping[str, str] | None = None,
    given: bytes = b"",
    heard: Callable[[bytes], None] = lambda _chunk: None,
) -> tuple[int, str]:
    """Run *command*; return its exit code and its error output. *heard* gets what it prints.

    Any output is a sign of life. After *stall* seconds without one it is killed. A process that hangs in a
    call on the volume cannot be killed: it is noted in the file *left* and not waited for.
    """
    with tempfile.TemporaryFile() as errors, tempfile.TemporaryFile() as question:
        question.write(given)
        question.seek(0)
        process = subprocess.Popen(
            # When this process is killed, an rsync that goes on would be in the way of the next run.
            ["setpriv", "--pdeathsig", "KILL", *command],
            stdin=question,
            stdout=subprocess.PIPE,
            stderr=errors,
            env={**os.environ, "LC_ALL": "C.UTF-8", **(environment or {})},
            start_new_session=True,
            cwd="/",
        )
        assert process.stdout is not None  # noqa: S101  it was asked for
        until = time.monotonic() + stall
        try:
            with selectors.DefaultSelector() as selector:
                selector.register(process.stdout, selectors.EVENT_READ)
                while True:
                    if not selector.select(max(0.0, until - time.monotonic())):
                        raise Stalled(f"{command[0]} has not moved for {stall:g} s")
                    chunk = os.read(process.stdout.fileno(), 1 << 16)
                    if not chunk:
                        break
                    heard(chunk)
                    until = time.monotonic() + stall
            try:
                code = process.wait(timeout=max(1.0, until - time.monotonic()))
            except subprocess.TimeoutExpired:
                raise Stalled(f"{command[0]} does not end") from None
        except BaseException:
            _end(process, left)
            raise
        finally:
            process.stdout.close()
        errors.seek(0)
        return code, errors.read().decode(errors="replace")


def _end(process: subprocess.Popen[bytes], left: Path) -> None:
    """Kill a process with its children. One that cannot be killed is noted."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    try:
        process.wait(timeout=5)
    except subprocess.TimeoutExpired:
        left.write_text(json.dumps({"pid": process.pid, "started": _started(process.pid)}))
        process.returncode = -signal.SIGKILL  # nobody waits for it any more


def _started(pid: int) -> str:
    """Return when a process began, in the kernel's ticks: with the number it names one process. Empty for none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[19]
    except (OSError, IndexError):
        return ""


# The mirror


@dataclass
class State:
    """What ``state.json`` keeps. Times are seconds since 1970; ``good`` is that of the last good run."""

    number: int = 0
    chain: str = ""
    pending: list[str] = field(default_factory=list)
    full: float = 0.0
    files: int = 0
    bytes: int = 0
    good: float = 0.0
    started: float = 0.0
    ended: float = 0.0
    snapshot: str = ""
    pushed: str = ""
    restic: str = ""
    problems: list[str] = field(default_factory=list)


@dataclass
class Report:
    """What a run did."""

    number: int = 0
    copied: int = 0
    removed: int = 0
    foreign: int = 0
    mended: int = 0
    full: bool = False
    snapshot: str = ""
    good: bool = True
    expired: list[str] = field(default_factory=list)
    pushed: list[str] = field(default_factory=list)
    seconds: float = 0.0
    problems: list[str] = field(default_factory=list)
    volume: list[str] = field(default_factory=list)
    """What the full pass found wrong with the volume; the mirror is not the worse for it."""


Progress = Callable[[str, int, int], None]


def _no_progress(_what: str, _done: int, _total: int) -> None:
    return None


class Mirror:
    """The mirror in its place. *progress* is told what is done, how much of it, and of how much (0: unknown)."""

    def __init__(self, config: Config, progress: Progress = _no_progress) -> None:
        self.config, self.progress = config, progress
        self.place = Path(config.place)
        self.current = self.place / "current"
        self.incoming = self.place / ".incoming"
        self.snapshots_at = self.place / "snapshots"
        self.left = self.place / ".left"
        self.state = State()
        self.report = Report()
        self._foreign: dict[str, list[Any]] = {}
        self._wrong: dict[str, str] = {}  # of files that the mirror should have

    # A run

    def run(self, *, full: bool = False, snapshot: bool | None = None) -> Report:
        """Bring the mirror up to date; take, expire and push snapshots as they are due.

        *full* asks for the full pass now. *snapshot* takes one now, or none; None: one an hour.
        """
        if not self.place.is_dir():
            raise MirrorError(f"{self.place} is not there; run site.yml")
        with self._lock():
            began = time.monotonic()
            self.load()
            self.state.started = time.time()
            try:
                self._run(full=full, snapshot=snapshot)
                self.report.problems = sorted(self._wrong.values())
                if not self.report.problems:
                    self.state.good = time.time()
            except (MirrorError, LedgerError, sqlite3.Error, OSError) as error:
                self.report.problems = [str(error), *sorted(self._wrong.values())]
                raise
            finally:
                self.report.seconds = round(time.monotonic() - began, 1)
                self.state.ended = time.time()
                self.state.problems = [*self.report.problems, *self.report.volume][:SHOWN]
                self._save()
        return self.report

    def _run(self, *, full: bool, snapshot: bool | None) -> None:
        self._tidy()
        self._look_at_source()
        try:
            ledger = Ledger(self.config.ledger)
        except LedgerError as error:
            raise Away(f"{error}; the service tribrick-ledger writes it") from error
        with ledger:
            self._follow(ledger)
            # A time that is still to come is that of a clock that was set back.
            if full or abs(time.time() - self.state.full) > self.config.full_days * 86400 - YOUNG:
                self._full(ledger)
            if snapshot or (snapshot is None and due(_now(), self.snapshots())):
                self._snapshot(ledger)
        self.expire()
        away: list[MirrorError] = []
        for wanted, send in ((self.config.push, self._push), (self.config.restic, self._push_restic)):
            try:
                if wanted:
                    send()
            except MirrorError as error:  # the other one is sent to all the same
                away.append(error)
        for one in away:
            raise one

    @contextlib.contextmanager
    def _lock(self) -> Iterator[None]:
        # Not inherited: a child that hangs for ever must not keep it.
        descriptor = os.open(self.place / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o640)
        try:
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise Away(f"another run is at work (process {os.pread(descriptor, 20, 0).decode()})") from None
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, str(os.getpid()).encode(), 0)
            yield
        finally:
            os.close(descriptor)

    def _tidy(self) -> None:
        """Refuse to join a process that hangs; remove what a killed run has left."""
        with contextlib.suppress(FileNotFoundError, ValueError):
            noted = json.loads(self.left.read_text())
            if noted["started"] and _started(noted["pid"]) == noted["started"]:
                raise Away(
                    f"process {noted['pid']} of an earlier run still hangs on {self.config.source}; "
                    "playbooks/recover_mount.yml frees it"
                )
        self.left.unlink(missing_ok=True)
        shutil.rmtree(self.incoming, ignore_errors=True)
        for directory in (self.current, self.incoming, self.snapshots_at):
            directory.mkdir(mode=0o750, exist_ok=True)
        for one in self.snapshots_at.iterdir():
            if one.name.startswith("."):
                shutil.rmtree(one)
        self._take_back()

    def _take_back(self) -> None:
        """Set back the names of snapshots of a clock that ran ahead, all alike, so that the newest is an hour old.

        Else it would be the newest until its time comes: nothing would be sent, and a restore would take it.
        """
        limit = _now() + timedelta(hours=1)
        if self.state.pushed > limit.strftime(STAMP):
            self.state.pushed = ""
        if self.state.restic > limit.strftime(STAMP):
            self.state.restic = ""
        ahead = [one for one in self.snapshots() if one.at > limit]
        for one in ahead:
            at = one.at - (ahead[-1].at - _now()) - timedelta(hours=1)
            while (self.snapshots_at / at.strftime(STAMP)).exists():
                at -= timedelta(seconds=1)
            os.rename(self.snapshots_at / one.name, self.snapshots_at / at.strftime(STAMP))

    def _look_at_source(self) -> None:
        """Raise ``Away`` unless the source is the volume. The look cannot hang: it is another process."""
        said = bytearray()
        path = f"{self.config.source}/{self.config.sentinel}"
        try:
            code, why = run_watched(["cat", "--", path], stall=10, left=self.left, heard=said.extend)
        except Stalled as error:
            raise Away(f"{self.config.source} does not answer; playbooks/recover_mount.yml frees it") from error
        if code != 0:
            raise Away(f"{self.config.source} is not the media volume ({why.strip()}); nothing was touched")
        try:
            found = json.loads(bytes(said)).get("id")
        except (ValueError, AttributeError):
            found = None
        if found != self.config.volume_id:
            raise Away(f"{path} has the id {found!r}, not {self.config.volume_id!r}; nothing was touched")

    # Following the ledger

    def _follow(self, ledger: Ledger) -> None:
        """Bring ``current/`` from the number it has to the ledger's last one."""
        to, chain = ledger.last()
        if self.state.number and ledger.chain(self.state.number) != self.state.chain:
            # Another history: a restored database. All of it is looked at; only its tombstones remove.
            self.state.number, self.state.chain = 0, ""
        entries = (entry for entry in ledger.changes(after=self.state.number) if entry.number <= to)
        stored, dead = fold(entries)
        for name in self.state.pending:
            known = ledger.get(name)
            if known is not None and name not in stored and name not in dead:
                if known.state == "stored":
                    stored[name] = known
                else:
                    dead.add(name)
        stored = {name: known for name, known in stored.items() if known.storage in self.config.storages}
        self._remove(dead, ledger)  # first: a directory may have the name of a deleted file by now
        self._wrong = self._copy(list(stored.values()), ledger)
        self._sync()
        self.state.pending = sorted(self._wrong)
        self.state.number, self.state.chain = to, chain
        self.report.number = to
        self._save()

    def _copy(self, wanted: Sequence[Known], ledger: Ledger, what: str = "files") -> dict[str, str]:
        """Copy files from the volume, each checked by its hash first; return what is wrong by name."""
        problems: dict[str, str] = {}
        good = [known for known in wanted if allowed(known.name)]
        for known in wanted:
            if not allowed(known.name):
                problems[known.name] = f"{known.name!r} is not the name of a stored file"
        done = 0
        for batch in batches(good):
            problems |= self._copy_batch(batch, ledger)
            done += len(batch)
            self.progress(what, done, len(good))
        return problems

    def _copy_batch(self, batch: Sequence[Known], ledger: Ledger) -> dict[str, str]:
        tree = hasher.Tree(self.current)
        needed = [known for known in batch if _differs(tree, known)]
        if not needed:
            return {}
        self._make_room(sum(known.size for known in needed))
        why = self._fetch([known.name for known in needed])
        arrived, problems, late = hasher.Tree(self.incoming), {}, []
        for known in needed:
            seen = arrived.hash(known.name)
            if (seen.get("sha256"), seen.get("size")) == (known.sha256, known.size):
                if known.name not in self._foreign:  # of those that were adopted, snapshots hold what they were before
                    self._mend_snapshots(known.name)
                if obstacle := self._put(known.name):
                    problems[known.name] = obstacle
            else:
                late.append((known, seen))
        if any((now := ledger.get(known.name)) is None or now.state == "stored" for known, _ in late):
            self._await_pass(ledger)
        for known, seen in late:
            if (now := ledger.get(known.name)) is not None and now.state != "stored":
                continue  # deleted while we copied
            if seen.get("error") == "missing":
                problems[known.name] = f"missing on the volume: {known.name}{f' ({why})' if why else ''}"
            else:
                problems[known.name] = f"the volume has other bytes than the ledger: {known.name}"
        if problems:
            self._look_at_source()  # gone meanwhile? Then nothing is said of the files
        return problems

    def _await_pass(self, ledger: Ledger) -> None:
        """Wait until the ledger has asked the database after now; not for long, since that may be away."""
        asked, until = time.time() + 1.0, time.monotonic() + LAG  # a pass that is under way began before
        while ledger.path.stat().st_mtime < asked and time.monotonic() < until:
            time.sleep(0.2)  # ask again, until the deadline above

    def _fetch(self, listed: Sequence[str]) -> str:
        """Have rsync bring files to ``.incoming/``; return why not all came, if it said."""
        command = ["rsync", "--times", "--perms", "--chmod=D0750,F0640", "--files-from=-", "--from0",
                   "--ignore-missing-args", "--ignore-times", "--whole-file", "--info=progress2", "--outbuf=N",
                   *self._bandwidth(), f"{self.config.source}/", f"{self.incoming}/"]  # fmt: skip
        # Without the "./" a name that begins with # would be a comment.
        given = b"\0".join(b"./" + os.fsencode(name) for name in listed)
        try:
            code, said = run_watched(command, stall=self.config.stall, left=self.left, given=given)
        except Stalled as error:
            raise Away(
                f"{self.config.source} does not answer ({error}); playbooks/recover_mount.yml frees it"
            ) from error
        return judge_rsync(code, said)

    def _bandwidth(self) -> list[str]:
        return [f"--bwlimit={self.config.bandwidth_kib}"] if self.config.bandwidth_kib else []

    def _put(self, name: str) -> str:
        """Move a file that was checked from ``.incoming/`` to ``current/``; return what is in its way, if anything."""
        target = self.current / name
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            os.replace(self.incoming / name, target)
        except (FileExistsError, NotADirectoryError, IsADirectoryError) as error:
            return f"not copied: {name}: {error.filename2 or error.filename} is in its way; move that away"
        self.report.copied += 1
        return ""

    def _remove(self, dead: Iterable[str], ledger: Ledger) -> None:
        for name in dead:
            known = ledger.get(name)
            if not allowed(name) or known is None or known.storage not in self.config.storages:
                continue
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                os.unlink(self.current / name)
                self.report.removed += 1
                self._remove_empty((self.current / name).parent)

    def _remove_empty(self, directory: Path) -> None:
        """Remove directories that hold nothing, which may be in the way of a file with their name."""
        with contextlib.suppress(OSError):  # not empty
            while directory != self.current:
                directory.rmdir()
                directory = directory.parent

    def _make_room(self, needed: int) -> None:
        """Raise unless *needed* bytes fit, and the reserve stays free. Snapshots are never removed for room."""
        free = shutil.disk_usage(self.place).free
        if free - needed < self.config.reserve_mib << 20:
            raise MirrorError(
                f"{self.place} has {free >> 20} MiB free, {needed >> 20} MiB are to come and {self.config.reserve_mib} "
                "MiB are to stay free: give it more space, or keep fewer snapshots (media_mirror_keep_*)"
            )

    def _sync(self) -> None:
        """Have the disk hold what was written. ``sync`` would also wait for the volume, which may hang."""
        descriptor = os.open(self.place, os.O_RDONLY | os.O_DIRECTORY)
        try:
            if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
                raise OSError(ctypes.get_errno(), f"syncfs of {self.place}: {os.strerror(ctypes.get_errno())}")
        finally:
            os.close(descriptor)

    # The full pass

    def _full(self, ledger: Ledger) -> None:
        """Walk through the volume, take files along that the ledger does not know, read all of the mirror."""
        self.report.full = True
        known = self._known_at(ledger, self.state.number)
        stored = {name: one for name, one in known.items() if one.state == "stored"}
        walked = self._walk_source()
        for name, one in stored.items():
            size = walked.get(name, {}).get("size")
            if size == one.size or (now := ledger.get(name)) is None or now.state != "stored":
                continue
            what = "missing" if size is None else f"{size} bytes instead of {one.size}"
            self.report.volume.append(f"{what} on the volume: {name}")
        self._take_foreign(walked, known, ledger)
        self._wrong |= self._verify_current(stored, ledger)
        self.state.pending = sorted(self._wrong)
        if self.report.volume:
            self._look_at_source()  # gone meanwhile? Then nothing is said of its files
        self._sync()
        self.state.full = time.time()
        self._save()

    def _walk_source(self) -> dict[str, dict[str, Any]]:
        """Return every file of the volume with its size and time, found by another process, which may hang."""
        program = "import runpy, sys; runpy.run_path(sys.argv[1])['converse'](sys.stdin, sys.stdout)"
        found: dict[str, dict[str, Any]] = {}
        rest, ended = b"", False

        def heard(chunk: bytes) -> None:
            nonlocal rest, ended
            *lines, rest = (rest + chunk).split(b"\n")
            for line in lines:
                one = json.loads(line)
                if one == "end":
                    ended = True
                else:
                    found[one["name"]] = one
            self.progress("volume", len(found), 0)

        question = json.dumps({"root": self.config.source, "do": "walk"}) + "\n"
        command = [sys.executable, "-c", program, str(hasher.__file__)]
        code, said = run_watched(
            command, stall=self.config.stall, left=self.left, given=question.encode(), heard=heard
        )  # fmt: skip
        if code != 0 or not ended:
            raise Away(f"{self.config.source} could not be walked through: {said.strip()[-300:]}")
        return found

    def _take_foreign(self, walked: Mapping[str, dict[str, Any]], known: Mapping[str, Known], ledger: Ledger) -> None:
        """Copy files that no ledger knows. Their hash is what was read; they never leave the mirror by themselves."""
        names, here = [], hasher.Tree(self.current)
        for name, one in walked.items():
            ours = name in known or (
                is_text(name) and (now := ledger.get(name)) is not None and now.storage in self.config.storages
            )
            if ours or time.time() - one["changed"] < YOUNG or not allowed(name):
                continue
            if hasher.TEMPORARY.fullmatch(name.rpartition("/")[2]):
                continue
            self.report.foreign += 1
            noted = self._foreign.get(name, ["", "", ""])
            if noted[:2] != [one["size"], one["modified"]] or here.hash(name).get("sha256") != noted[2]:
                names.append(Known(name, "foreign", "", "", one["size"]))
        for batch in batches(names):
            self._make_room(sum(known.size for known in batch))
            why = self._fetch([known.name for known in batch])
            tree = hasher.Tree(self.incoming)
            for wanted in batch:
                seen = tree.hash(wanted.name)
                if "error" in seen:
                    if why:  # else it vanished meanwhile
                        self.report.volume.append(f"not copied: {wanted.name} ({why})")
                    continue
                if seen["sha256"] == self._foreign.get(wanted.name, [""])[-1]:  # the disk has spoilt what was here
                    self._mend_snapshots(wanted.name)
                if obstacle := self._put(wanted.name):
                    self.report.volume.append(obstacle)
                    continue
                self._foreign[wanted.name] = [seen["size"], walked[wanted.name]["modified"], seen["sha256"]]
        for name in [name for name in self._foreign if name in known]:
            del self._foreign[name]  # adopted meanwhile: now it is the ledger's

    def _verify_current(self, stored: Mapping[str, Known], ledger: Ledger) -> dict[str, str]:
        """Read every file of the mirror; fetch again what is not the ledger's, also for the snapshots that share it."""
        tree, wrong = hasher.Tree(self.current), []
        for count, known in enumerate(stored.values(), 1):
            if _differs(tree, known):
                wrong.append(known)
            self.progress("verify", count, len(stored))
        return self._copy(wrong, ledger)

    def _mend_snapshots(self, name: str) -> None:
        """Snapshots share the bytes of ``current/`` by hard links, also when the disk has spoilt them.

        They get the good ones first: a run that is killed here finds those of ``current/`` bad once more.
        """
        try:
            inode = os.lstat(self.current / name).st_ino
        except (FileNotFoundError, NotADirectoryError):
            return
        self.report.mended += 1
        new = self.incoming / ".mended"  # not beside the file, where a killed run would leave it
        for one in self.snapshots():
            path = self.snapshots_at / one.name / "files" / name
            with contextlib.suppress(FileNotFoundError, NotADirectoryError):
                if os.lstat(path).st_ino == inode:
                    os.link(self.incoming / name, new)
                    os.replace(new, path)

    # Snapshots

    def snapshots(self) -> list[Snapshot]:
        """Return the complete snapshots, the oldest first."""
        return read_snapshots(self.snapshots_at)

    def _known_at(self, ledger: Ledger, number: int) -> dict[str, Known]:
        """Return every file of this root, of every state, as it was at *number*."""
        return {
            name: known
            for name, known in state_at(ledger.files(), ledger.changes(after=number)).items()
            if known.storage in self.config.storages
        }

    def _snapshot(self, ledger: Ledger) -> None:
        now = _now()
        while (self.snapshots_at / now.strftime(STAMP)).exists():
            now += timedelta(seconds=1)
        name = now.strftime(STAMP)
        new = self.snapshots_at / f".{name}"
        new.mkdir(mode=0o750)
        number, change = self._dump(new / "database.dump")
        self._wait_for(ledger, number, change)
        known = self._known_at(ledger, number)
        gone = self._compare(known, ledger)
        # rsync makes a link wherever size and time agree, which here is everywhere.
        command = ["rsync", "--archive", f"--link-dest={self.current}", "--info=progress2", "--outbuf=N",
                   f"{self.current}/", f"{new}/files/"]  # fmt: skip
        code, said = run_watched(command, stall=self.config.stall, left=self.left)
        if code != 0:
            raise MirrorError(f"no snapshot was made: {judge_rsync(code, said) or 'files vanished'}")
        manifest = self._write_manifest(new / "manifest.gz", known)
        problems = sorted(self._wrong.values())
        if not known and not self._foreign:
            # That of nodes made new after a loss would be the newest of all, and be restored.
            problems.append("no file was ever stored: it is not taken unless it is named")
        _write_json(
            new / MARKER,
            {
                "format": 1, "snapshot": name, "node": self.config.node, "number": number,
                "chain": ledger.chain(number) or "", "good": not problems, "problems": problems[:SHOWN],
                "deleted_meanwhile": gone, "files": self.state.files, "bytes": self.state.bytes,
                "dump": _file_hash(new / "database.dump"), "manifest": manifest,
            },
        )  # fmt: skip
        self._sync()
        os.rename(new, self.snapshots_at / name)
        self._sync()
        self.report.snapshot, self.report.good = name, not problems
        if not problems:
            self.state.snapshot = name

    def _dump(self, target: Path) -> tuple[int, dict[str, str]]:
        """Dump the database, read the dump back, and return its newest change with the number."""
        url, environment = libpq(self.config.database_url)
        self.progress("dump", 0, 0)
        try:
            done = subprocess.run(
                ["pg_dump", "--format=custom", "--no-password", f"--file={target}", f"--dbname={url}"],
                env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
                timeout=self.config.dump_timeout, check=False,
            )  # fmt: skip
            if done.returncode != 0:
                said = " ".join(done.stderr.split())[-500:]
                raise Away(f"no snapshot: pg_dump ended with {done.returncode}: {said}; the mirror is up to date")
            with subprocess.Popen(
                ["pg_restore", "--data-only", "--table=tribrick_change", "--file=-", str(target)],
                stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True, encoding="utf-8", errors="replace",
            ) as reading:  # fmt: skip
                assert reading.stdout is not None  # noqa: S101  it was asked for
                newest = newest_change(reading.stdout)
        except subprocess.TimeoutExpired as error:
            raise Away(f"no snapshot: the database's dump took longer than {error.timeout:g} s") from error
        except FileNotFoundError as error:
            raise MirrorError(f"no snapshot: {error.filename} is not installed; run site.yml") from error
        if reading.returncode != 0:
            raise MirrorError(f"no snapshot: the dump cannot be read back (pg_restore: {reading.returncode})")
        return newest

    def _wait_for(self, ledger: Ledger, number: int, change: Mapping[str, str]) -> None:
        """Wait until the ledger has what the dump has; it lags by seconds. *change* is the dump's newest one."""
        until = time.monotonic() + 60
        while (last := ledger.last()[0]) < number:
            if time.monotonic() > until:
                raise Away(
                    f"no snapshot: the ledger is at {last}, the database at {number}; is tribrick-ledger running?"
                )
            time.sleep(0.2)  # ask again, until the deadline above
        if number < self.state.number:
            raise Away(
                f"no snapshot: the database is at {number}, the ledger was at {self.state.number} before: the database "
                "lost its last changes; see docs/catalog.md, 'The database lost changes'"
            )
        own = next(ledger.changes(after=number - 1), None) if number else None
        theirs = tuple(map(change.get, ("kind", "sha256", "size")))
        if own is not None and (own.kind, own.sha256, str(own.size)) != theirs:
            raise Away(
                f"no snapshot: the database has another change {number} than the ledger, so its files are not these: "
                "it lost changes and has new ones; see docs/catalog.md, 'The database lost changes'"
            )

    def _compare(self, known: Mapping[str, Known], ledger: Ledger) -> list[str]:
        """Compare names and sizes of ``current/`` with the ledger at the marker; bring it to that number.

        Returns the files that were deleted on the volume after the dump and before they could be copied.
        """
        sizes = {one["name"]: one["size"] for one in hasher.Tree(self.current).walk()}
        stored = [one for one in known.values() if one.state == "stored"]
        lacking = [one for one in stored if sizes.get(one.name) != one.size and one.name not in self.state.pending]
        problems = self._copy(lacking, ledger)
        self._wrong |= problems
        self.state.pending = sorted(self._wrong)
        self._remove({name for name, one in known.items() if one.state != "stored" and name in sizes}, ledger)
        self.state.files, self.state.bytes = len(stored), sum(one.size for one in stored)
        return sorted(
            one.name for one in lacking if one.name not in problems and not (self.current / one.name).exists()
        )

    def _write_manifest(self, path: Path, known: Mapping[str, Known]) -> dict[str, Any]:
        """Write what a restore needs to know of each name, tombstones too."""
        with gzip.open(path, "wt", compresslevel=1, encoding="utf-8") as file:
            for name in sorted(known):
                one = known[name]
                file.write(json.dumps({"name": name, "state": one.state, "storage": one.storage,
                                       "sha256": one.sha256, "size": one.size}) + "\n")  # fmt: skip
            for name in sorted(set(self._foreign) - set(known)):
                size, _modified, sha256 = self._foreign[name]
                file.write(json.dumps({"name": name, "state": "foreign", "sha256": sha256, "size": size}) + "\n")
        return _file_hash(path)

    def expire(self) -> list[str]:
        """Remove the snapshots that retention does not keep."""
        config = self.config
        for one in expired(self.snapshots(), hourly=config.hourly, daily=config.daily, weekly=config.weekly):
            remove_snapshot(self.snapshots_at, one.name)
            self.report.expired.append(one.name)
        return self.report.expired

    # Off-site

    def _to_push(self, pushed: str) -> Snapshot | None:
        good = [one for one in self.snapshots() if one.good]
        return good[-1] if good and good[-1].name > pushed else None

    def _push(self) -> None:
        """Send the last good snapshot over SSH. The marker goes last: without it the far snapshot is not complete."""
        one = self._to_push(self.state.pushed)
        if one is None:
            return
        push = self.config.push
        ssh = ["ssh", "-oBatchMode=yes", "-oConnectTimeout=15", "-oServerAliveInterval=15", f"-p{push.get('port', 22)}",
               f"-i{push['identity']}", "-oIdentitiesOnly=yes", f"-oUserKnownHostsFile={push['known_hosts']}",
               "-oStrictHostKeyChecking=yes"]  # fmt: skip
        command = ["rsync", "--recursive", "--times", "--perms", "--mkpath", "--timeout=120", "--info=progress2",
                   "--outbuf=N", "--rsh", " ".join(ssh), *self._bandwidth()]  # fmt: skip
        base, far = self.snapshots_at / one.name, f"{push['target']}{self.config.node}/{one.name}/"
        # rrsync takes paths from the root of its directory, and no "..".
        before = f"/{push['target'].partition(':')[2].strip('/')}/{self.config.node}/{self.state.pushed}"
        link = [f"--link-dest={before.replace('//', '/')}"] if self.state.pushed else []
        for what in ([f"--exclude=/{MARKER}", *link, f"{base}/", far], [f"{base}/{MARKER}", far]):
            try:
                code, said = run_watched([*command, *what], stall=self.config.stall, left=self.left)
            except Stalled as error:
                raise Away(f"{push['target']} does not answer ({error})") from error
            if code != 0:
                raise Away(f"off-site copy to {push['target']}: {judge_rsync(code, said) or 'files vanished'}")
        self.state.pushed = one.name
        self.report.pushed.append(push["target"])

    def _push_restic(self) -> None:
        one = self._to_push(self.state.restic)
        if one is None:
            return
        restic = self.config.restic
        environment = {"RESTIC_REPOSITORY": restic["repository"], "RESTIC_PASSWORD": restic["password"],
                       "RESTIC_CACHE_DIR": str(self.place / ".restic"), **restic.get("environment", {})}  # fmt: skip
        limit = [f"--limit-upload={self.config.bandwidth_kib}"] if self.config.bandwidth_kib else []
        command = ["restic", "backup", "--quiet", f"--host={self.config.node}", "--tag=tribrick", f"--tag={one.name}",
                   "--time", one.at.strftime("%Y-%m-%d %H:%M:%S"), *limit,
                   str(self.snapshots_at / one.name)]  # fmt: skip
        try:
            done = subprocess.run(
                command, env={**os.environ, "TZ": "UTC", **environment}, stdin=subprocess.DEVNULL, capture_output=True,
                text=True, timeout=self.config.dump_timeout * 6, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired as error:
            raise Away(f"restic took longer than {error.timeout:g} s") from error
        except FileNotFoundError as error:
            raise MirrorError("restic is not installed; run site.yml") from error
        if done.returncode != 0:
            raise Away(f"restic ended with {done.returncode}: {' '.join(done.stderr.split())[-500:]}")
        self.state.restic = one.name
        self.report.pushed.append(restic["repository"])

    # What is remembered

    def load(self) -> None:
        """Read the state; without a readable one everything is looked at again, and nothing is lost."""
        known = {one.name for one in fields(State)}
        with contextlib.suppress(FileNotFoundError, ValueError, TypeError, AttributeError):
            values = json.loads((self.place / "state.json").read_text())
            self.state = State(**{name: value for name, value in values.items() if name in known})
        with contextlib.suppress(FileNotFoundError, ValueError):
            self._foreign = dict(json.loads((self.place / "foreign.json").read_text()))

    def _save(self) -> None:
        _write_json(self.place / "foreign.json", self._foreign)
        _write_json(self.place / "state.json", asdict(self.state))


def batches(files: Sequence[Known]) -> Iterator[list[Known]]:
    """Yield portions of at most 1000 files and about 1 GiB."""
    batch: list[Known] = []
    size = 0
    for known in files:
        if batch and (len(batch) == BATCH or size + known.size > BATCH_BYTES):
            yield batch
            batch, size = [], 0
        batch.append(known)
        size += known.size
    if batch:
        yield batch


def _differs(tree: hasher.Tree, known: Known) -> bool:
    seen = tree.hash(known.name)
    return (seen.get("sha256"), seen.get("size")) != (known.sha256, known.size)


def _now() -> datetime:
    return datetime.now(timezone.utc)


def _write_json(path: Path, value: Any) -> None:
    new = path.with_name(f".{path.name}.new")
    with new.open("w", encoding="utf-8") as file:
        os.fchmod(file.fileno(), 0o640)  # others may pass through the directory
        json.dump(value, file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)


def _file_hash(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(hasher.CHUNK):
            digest.update(chunk)
        return {"sha256": digest.hexdigest(), "size": file.tell()}


def read_snapshots(directory: Path) -> list[Snapshot]:
    """Return the complete snapshots in a directory, the oldest first. Without a readable marker it is none."""
    found = []
    for path in sorted(directory.glob("[0-9]*")):
        try:
            at = datetime.strptime(path.name, STAMP).replace(tzinfo=timezone.utc)
            marker = json.loads((path / MARKER).read_text())
            found.append(Snapshot(path.name, at, bool(marker["good"]), int(marker["number"])))
        except (OSError, ValueError, KeyError, TypeError):
            continue
    return found


def remove_snapshot(directory: Path, name: str) -> None:
    """Remove a snapshot. It is none from the first moment on; the next run ends what a killed one began."""
    hidden = directory / f".expired-{name}"
    os.rename(directory / name, hidden)
    shutil.rmtree(hidden)


def verify(directory: Path, progress: Progress = _no_progress) -> list[str]:
    """Read a whole snapshot; return what differs from its manifest and marker."""
    marker = json.loads((directory / MARKER).read_text())
    wrong = [
        f"{name} is not as it was written"
        for name, key in (("database.dump", "dump"), ("manifest.gz", "manifest"))
        if _file_hash(directory / name) != marker[key]
    ]
    deleted = set(marker["deleted_meanwhile"])
    tree = hasher.Tree(directory / "files")
    with gzip.open(directory / "manifest.gz", "rt", encoding="utf-8") as file:
        for count, line in enumerate(file, 1):
            one = json.loads(line)
            if one["state"] not in ("stored", "foreign") or one["name"] in deleted:
                continue
            seen = tree.hash(one["name"])
            if (seen.get("sha256"), seen.get("size")) != (one["sha256"], one["size"]):
                wrong.append(f"{seen.get('error', 'different')}: {one['name']}")
            progress("verify", count, marker["files"])
    return wrong


def restore_database(config: Config, directory: Path) -> None:
    """Bring the database back to the dump of the snapshot in *directory*; what it holds is replaced.

    One transaction: a dump that cannot be restored whole changes nothing. The site must not be at work.
    """
    dump = directory / "database.dump"
    if _file_hash(dump) != json.loads((directory / MARKER).read_text())["dump"]:
        raise MirrorError(f"{dump} is not as it was written; take another snapshot with --date")
    url, environment = libpq(config.database_url)
    # Somebody who still has a table open is told of, not waited for.
    environment["PGOPTIONS"] = "-c lock_timeout=30s"
    command = ["pg_restore", "--clean", "--if-exists", "--no-owner", "--exit-on-error", "--single-transaction",
               "--no-password", f"--dbname={url}", str(dump)]  # fmt: skip
    try:
        done = subprocess.run(
            command, env={**os.environ, **environment}, stdin=subprocess.DEVNULL, capture_output=True, text=True,
            timeout=config.dump_timeout, check=False,
        )  # fmt: skip
    except subprocess.TimeoutExpired as error:
        raise Away(f"the database was not restored within {error.timeout:g} s; it is as it was") from error
    except FileNotFoundError as error:
        raise MirrorError(f"{error.filename} is not installed; run site.yml") from error
    if done.returncode != 0:
        said = " ".join(done.stderr.split())[-500:]
        raise MirrorError(f"the database is as it was; pg_restore ended with {done.returncode}: {said}")


# The command line


def parser() -> argparse.ArgumentParser:
    """Return the parser of the command line."""
    made = argparse.ArgumentParser(
        prog="tribrick-mirror",
        description="A plain copy of the media outside GlusterFS, with dated snapshots.",
        epilog="Exit codes: 0 all in order, 1 something differs or could not be done, 2 it could not be found out\n"
        "(the volume, the ledger or the database is away, or another run is at work).",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    made.add_argument("--config", default=CONFIGURATION, metavar="FILE", help=f"the configuration ({CONFIGURATION})")
    commands = made.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> argparse.ArgumentParser:
        one = commands.add_parser(name, help=text, description=f"{text}.")
        one.add_argument("--json", action="store_true", help="answer with one JSON document")
        return one

    one = command("run", "Bring the mirror up to date; take, expire and push snapshots as they are due")
    one.add_argument("--full", action="store_true", help="also walk through the volume and read all of the mirror")
    one.add_argument(
        "--snapshot", action=argparse.BooleanOptionalAction, help="take one now, or none; else one an hour"
    )
    one.add_argument(
        "--delay", type=float, default=0.0, metavar="S", help="first wait for a random time, at most S seconds"
    )
    one = command("list", "List the snapshots")
    one.add_argument("--date", default="", help="only the newest good one of this date or before, or of this name")
    one = command("verify", "Read a snapshot and compare it with its manifest, by SHA-256")
    one.add_argument("--date", default="", help="of this date or before, or of this name; else the newest good one")
    one = command("restore-database", "Bring the database back to what a snapshot holds, in one transaction")
    one.add_argument("--date", default="", help="of this date or before, or of this name; else the newest good one")
    one.add_argument("--apply", action="store_true", help="do it; without this it is only said")
    one = command("expire", "Remove snapshots that retention does not keep; also on an off-site host")
    one.add_argument("--directory", metavar="DIR", help="where they lie; then no configuration is needed")
    for kind, default in (("hourly", 24), ("daily", 7), ("weekly", 8)):
        one.add_argument(f"--{kind}", type=int, metavar="N", help=f"keep so many ({default}, or the configuration's)")
    one.add_argument("--apply", action="store_true", help="do it; without this it is only said")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the program; return its exit code."""
    options = parser().parse_args(arguments)
    os.umask(0o027)
    # systemd and cron end a run with SIGTERM: leave through the blocks that clean up.
    signal.signal(signal.SIGTERM, lambda _number, _frame: sys.exit(2))
    try:
        return _COMMANDS[options.command](options)
    except (MirrorError, LedgerError, sqlite3.Error) as error:
        print(f"tribrick-mirror: {error}", file=sys.stderr)
        return error.code if isinstance(error, MirrorError) else 2
    except OSError as error:
        print(f"tribrick-mirror: {error}", file=sys.stderr)
        return 1


def _config(options: argparse.Namespace) -> Config:
    """Read the configuration, and go on as the user that owns the mirror."""
    try:
        config = read_config(Path(options.config).read_text(encoding="utf-8"))
        owner = os.stat(config.place)
    except OSError as error:
        raise MirrorError(f"{error.filename}: {error.strerror}; run site.yml, or use sudo") from error
    if os.geteuid() == 0 and owner.st_uid != 0:  # else the next run could not write what root has made
        os.initgroups(pwd.getpwuid(owner.st_uid).pw_name, owner.st_gid)
        os.setgid(owner.st_gid)
        os.setuid(owner.st_uid)
    return config


def _progress() -> Progress:
    """Return a progress line on a terminal, nothing elsewhere."""
    if not sys.stderr.isatty():
        return _no_progress
    shown = [0.0]

    def show(what: str, done: int, total: int) -> None:
        if done != total and time.monotonic() - shown[0] < 0.2:
            return
        shown[0] = time.monotonic()
        sys.stderr.write(
            f"\r\033[K{what} {done}{f' of {total}' if total else ''}{chr(10) if total and done == total else ''}"
        )
        sys.stderr.flush()

    return show


def step_back(config: Config) -> None:
    """Let other work on this host go first, from now on and for all that this process starts."""
    os.nice(config.nice)
    if shutil.which("ionice"):
        level = {"idle": "3", "best-effort": "2"}[config.io_class]
        subprocess.run(["ionice", "-c", level, "-p", str(os.getpid())], check=False, timeout=10)


def _run(options: argparse.Namespace) -> int:
    config = _config(options)
    if options.delay > 0:
        time.sleep(random.uniform(0, options.delay))  # noqa: S311  so that nodes do not ask all at once
    step_back(config)
    report = Mirror(config, _progress()).run(full=options.full, snapshot=options.snapshot)
    if options.json:
        print(json.dumps(asdict(report)))
    else:
        for problem in [*report.problems, *report.volume][:SHOWN]:
            print(problem, file=sys.stderr)
        text = f"at {report.number}: {report.copied} copied, {report.removed} removed"
        text += f", {report.foreign} foreign files, {report.mended} mended, all read" if report.full else ""
        text += f", snapshot {report.snapshot}{'' if report.good else ' (not good)'}" if report.snapshot else ""
        text += f", {len(report.expired)} snapshots expired" if report.expired else ""
        text += f", sent to {', '.join(report.pushed)}" if report.pushed else ""
        print(f"{text}; {len(report.problems) + len(report.volume)} problems; {report.seconds} s")
    return 1 if report.problems or report.volume else 0


def _list(options: argparse.Namespace) -> int:
    mirror = Mirror(_config(options))
    there = mirror.snapshots()
    shown = [pick(there, options.date)] if options.date else there
    if options.json:
        listed = [
            {"snapshot": one.name, "path": str(mirror.snapshots_at / one.name), "good": one.good, "number": one.number}
            for one in shown
        ]
        mirror.load()
        document = {"node": mirror.config.node, "current": str(mirror.current), "number": mirror.state.number}
        print(json.dumps({**document, "snapshots": listed}))
    else:
        for one in shown:
            print(f"{one.name}  {'good' if one.good else 'not good'}  number {one.number}")
    return 0


def _verify(options: argparse.Namespace) -> int:
    mirror = Mirror(_config(options))
    one = pick(mirror.snapshots(), options.date)
    wrong = verify(mirror.snapshots_at / one.name, _progress())
    if options.json:
        print(json.dumps({"snapshot": one.name, "wrong": wrong}))
    else:
        text = "\n".join([*wrong, f"{one.name}: {len(wrong)} differences"])
        print(text.encode(errors="backslashreplace").decode())  # a foreign name may be no text
    return 1 if wrong else 0


def _restore_database(options: argparse.Namespace) -> int:
    config = _config(options)
    directory = Path(config.place) / "snapshots"
    one = pick(read_snapshots(directory), options.date)
    if options.apply:
        restore_database(config, directory / one.name)
    if options.json:
        print(json.dumps({"applied": options.apply, "snapshot": one.name, "number": one.number}))
    else:
        print(f"{one.name}, number {one.number}: {'restored' if options.apply else 'to restore'}")
    return 0


def _expire(options: argparse.Namespace) -> int:
    keep: dict[str, int] = {"hourly": 24, "daily": 7, "weekly": 8}
    if options.directory:
        directory = Path(options.directory)
    else:
        config = _config(options)
        directory, keep = Path(config.place) / "snapshots", {kind: getattr(config, kind) for kind in keep}
    keep |= {kind: value for kind in keep if (value := getattr(options, kind)) is not None}
    gone = [one.name for one in expired(read_snapshots(directory), **keep)]
    if options.apply and options.directory:  # where no run of a mirror does it
        for left in directory.glob(".expired-*"):
            shutil.rmtree(left)
    for name in gone if options.apply else ():
        remove_snapshot(directory, name)
    if options.json:
        print(json.dumps({"applied": options.apply, "expired": gone}))
    else:
        print("\n".join([*gone, f"{len(gone)} {'removed' if options.apply else 'to remove'}"]))
    return 0


_COMMANDS: Final[Mapping[str, Callable[[argparse.Namespace], int]]] = {
    "run": _run, "list": _list, "verify": _verify, "restore-database": _restore_database, "expire": _expire,
}  # fmt: skip


if __name__ == "__main__":
    sys.exit(main())
