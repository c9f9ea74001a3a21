"""The state of a side: every version of every name, and what lies on the disk, in a SQLite file.

Versions are only ever added, and numbered in the order in which this state learned them, so a peer
asks for those after the last number that it has. What was written by a transaction is durable, and a
killed process leaves whole transactions.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import os
import secrets
import sqlite3
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Final, NamedTuple

from tribrick.sync import versions
from tribrick.sync.versions import NODE, Version, VersionVector

FORMAT: Final = 1
QUIET: Final = 2.0
"""Seconds that a file must be left alone before it is recorded, if nobody says otherwise: it may be on its way."""
LOCK_WAIT = 60.0
"""Seconds that one waits for another who works on the same state."""
_SCHEMA: Final = f"""
CREATE TABLE meta (key TEXT PRIMARY KEY, value TEXT NOT NULL) WITHOUT ROWID;
CREATE TABLE versions (
    seq INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, name TEXT NOT NULL, head INTEGER NOT NULL,
    sha256 TEXT NOT NULL, origin TEXT NOT NULL, text TEXT NOT NULL
);
CREATE INDEX versions_heads ON versions (name) WHERE head;
CREATE INDEX versions_copies ON versions (origin) WHERE head AND origin <> '';
CREATE TABLE disk (
    name TEXT PRIMARY KEY, sha256 TEXT NOT NULL, size INTEGER NOT NULL, modified INTEGER NOT NULL,
    changed INTEGER NOT NULL, inode INTEGER NOT NULL, text TEXT NOT NULL, replayed TEXT
) WITHOUT ROWID;
CREATE TABLE dirty (name TEXT PRIMARY KEY) WITHOUT ROWID;
CREATE TABLE held (
    token TEXT PRIMARY KEY, name TEXT NOT NULL, before TEXT NOT NULL, after TEXT NOT NULL
) WITHOUT ROWID;
CREATE TABLE peers (
    name TEXT PRIMARY KEY, state TEXT NOT NULL, seq INTEGER NOT NULL, heard REAL NOT NULL
) WITHOUT ROWID;
PRAGMA user_version = {FORMAT};
"""


class SyncError(Exception):
    """The reconciliation cannot go on; the step that says so has changed nothing."""


class StateDamaged(SyncError):
    """The file is not a state, or not as it was written."""


class Busy(SyncError):
    """Somebody else is at work and did not end in time."""


class Stamp(NamedTuple):
    """How a file looked when it was last read. Times in nanoseconds, *changed* is that of the inode."""

    size: int
    modified: int
    changed: int
    inode: int

    @classmethod
    def of(cls, status: os.stat_result) -> Stamp:
        """Return the stamp of a status."""
        return cls(status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino)


NOTHING: Final = Stamp(0, 0, 0, 0)


@dataclass(frozen=True)
class Peer:
    """How far the versions of a peer's state are known here."""

    name: str
    state: str
    seq: int
    heard: float


def _version(text: str) -> Version:
    name, counts, *rest = json.loads(text)
    return Version(name, VersionVector.of(counts), *rest)


class State:
    """An open state. Close it, or use it in a ``with`` statement."""

    def __init__(self, path: str | os.PathLike[str], database: sqlite3.Connection) -> None:
        self.path, self._db = Path(path), database

    @classmethod
    def create(cls, path: str | os.PathLike[str], *, node: str, root: str | os.PathLike[str]) -> State:
        """Begin a state for the directory *root*. It appears whole or not at all."""
        path = Path(path)
        if not NODE.fullmatch(node):
            raise SyncError(f"{node!r} cannot be the name of a node here; letters, digits, dots, dashes and _ can")
        new = path.with_name(f".{path.name}.{os.getpid()}")
        new.unlink(missing_ok=True)
        database = sqlite3.connect(new, isolation_level=None)
        try:
            database.executescript(_SCHEMA)
            meta = {
                "id": secrets.token_hex(16), "node": node, "counter": "0", "mark": "",
                "replica": new_actor(node), "desk": new_actor(node),
                "root": os.path.abspath(root), "exclude": "[]", "linked": "no", "quiet": str(QUIET),
            }  # fmt: skip
            database.executemany("INSERT INTO meta VALUES (?, ?)", meta.items())
        finally:
            database.close()
        new.chmod(0o600)
        try:
            os.link(new, path)
        except FileExistsError as error:
            raise SyncError(f"there is a state at {path} already") from error
        finally:
            new.unlink()
        return cls.open(path)

    @classmethod
    def open(cls, path: str | os.PathLike[str]) -> State:
        """Open a state and check all of it. Raises :class:`StateDamaged`."""
        path = Path(path)
        if not path.exists():
            raise SyncError(f"there is no state at {path}; `tribrick sync run --init` begins one")
        try:
            database = sqlite3.connect(
                f"{path.absolute().as_uri()}?mode=rw", uri=True, timeout=LOCK_WAIT, isolation_level=None
            )
            state = cls(path, database)
            try:
                said = database.execute("PRAGMA quick_check(1)").fetchone()[0]
                found = database.execute("PRAGMA user_version").fetchone()[0]
                if said != "ok" or found != FORMAT:
                    raise StateDamaged(
                        f"{path}: {said if said != 'ok' else f'format {found}, not {FORMAT}'}; {_ADVICE}"
                    )
                database.execute("PRAGMA synchronous = FULL")
                state.meta("id")
            except BaseException:
                database.close()
                raise
        except sqlite3.OperationalError as error:
            if "no such table" in str(error):
                raise StateDamaged(f"{path} is not a state; {_ADVICE}") from error
            raise SyncError(f"{path}: {error}") from error
        except (sqlite3.DatabaseError, TypeError) as error:
            raise StateDamaged(f"{path}: {error}; {_ADVICE}") from error
        return state

    def in_memory(self) -> State:
        """Return a copy that may be changed without anybody noticing."""
        copy = sqlite3.connect(":memory:", isolation_level=None)
        self._db.backup(copy)
        return State(self.path, copy)

    def __enter__(self) -> State:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    @contextlib.contextmanager
    def locked(self, what: str = "lock", wait: float = -1) -> Iterator[None]:
        """Keep others from what this state describes; wait *wait* seconds (``LOCK_WAIT``), then :class:`Busy`.

        A run has ``run`` all the time, and everybody ``lock`` while disk and state are changed together.
        """
        wait = LOCK_WAIT if wait < 0 else wait
        end = time.monotonic() + wait
        descriptor = os.open(f"{self.path}.{what}", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            while True:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError as error:
                    if time.monotonic() >= end:
                        raise Busy(f"somebody else is at work on {self.path}; waited {wait:.0f} s") from error
                    time.sleep(0.05)  # flock has no deadline of its own; ask again until `end`
            yield
        finally:
            os.close(descriptor)

    @contextlib.contextmanager
    def transaction(self) -> Iterator[None]:
        """All that the body writes, or nothing. May be nested."""
        if self._db.in_transaction:
            yield
            return
        self._db.execute("BEGIN IMMEDIATE")
        try:
            yield
            self._db.execute("COMMIT")
        except BaseException:
            with contextlib.suppress(sqlite3.OperationalError):  # SQLite has done it already
                self._db.execute("ROLLBACK")
            raise

    # Facts about the side.

    def meta(self, key: str) -> str:
        """Return one of the facts that stand since :meth:`create`."""
        return str(self._db.execute("SELECT value FROM meta WHERE key = ?", (key,)).fetchone()[0])

    def set_meta(self, key: str, value: str) -> None:
        """Replace a fact."""
        self._db.execute("UPDATE meta SET value = ? WHERE key = ? AND value <> ?", (value, key, value))

    def next_count(self, actor: str) -> tuple[str, int]:
        """Return the name of an actor and a number that it has never given to a change.

        There are two, because a count says that all smaller ones of the actor were seen: ``replica`` for
        what is found on the disk, which follows what the disk showed, and ``desk`` for what is decided,
        which follows all that is known.
        """
        count = int(self.meta("counter")) + 1
        self.set_meta("counter", str(count))
        return self.meta(actor), count

    def rename(self) -> None:
        """Give changes of this side another name from now on, where counts may have been given before."""
        for actor in ("replica", "desk"):
            self.set_meta(actor, new_actor(self.meta("node")))

    # Versions.

    def add(self, new: Iterable[Version]) -> list[Version]:
        """Add versions and return those that were not known."""
        added = []
        with self.transaction():
            by_name: dict[str, list[Version]] = {}
            for version in new:
                by_name.setdefault(version.name, []).append(version)
            self._look_for_own(version for found in by_name.values() for version in found)
            for name, found in by_name.items():
                fresh = [one for one in dict.fromkeys(found) if not self._known(one)]
                if not fresh:
                    continue
                before = self.heads(name)
                after = set(versions.merge(before, fresh))
                for one in fresh:
                    self._db.execute(
                        "INSERT INTO versions (id, name, head, sha256, origin, text) VALUES (?, ?, ?, ?, ?, ?)",
                        (one.id, name, one in after, one.sha256, one.origin, one.text),
                    )
                for one in before:
                    if one not in after:
                        self._db.execute("UPDATE versions SET head = 0 WHERE id = ?", (one.id,))
                self._db.execute("INSERT OR IGNORE INTO dirty VALUES (?)", (name,))
                added += fresh
        return added

    def _known(self, version: Version) -> bool:
        return self._db.execute("SELECT 1 FROM versions WHERE id = ?", (version.id,)).fetchone() is not None

    def _look_for_own(self, new: Iterable[Version]) -> None:
        """Take another replica's name when others know more of us than we do: this is a restored copy.

        Otherwise two changes could get the same number, and one would pass for the other's successor.
        """
        own, count = (self.meta("replica"), self.meta("desk")), int(self.meta("counter"))
        if any(version.vector.get(actor) > count for version in new for actor in own):
            self.rename()

    def heads(self, name: str) -> list[Version]:
        """Return the versions of *name* that no other one follows, the winner last."""
        rows = self._db.execute("SELECT text FROM versions WHERE name = ? AND head", (name,))
        return versions.heads(_version(text) for (text,) in rows)

    def history(self, name: str) -> list[Version]:
        """Return every version of *name*, in the order in which they became known here."""
        rows = self._db.execute("SELECT text FROM versions WHERE name = ? ORDER BY seq", (name,))
        return [_version(text) for (text,) in rows]

    def changes(self, after: int = 0) -> Iterator[tuple[int, str]]:
        """Yield the versions that became known after a number, as numbered lines of JSON."""
        yield from self._db.execute("SELECT seq, text FROM versions WHERE seq > ? ORDER BY seq", (after,))

    def sequence(self) -> str:
        """Return the name of the numbers that versions have here, which peers note with the last that they know.

        It changes with the names of the replica: in a restored copy the same numbers mean other versions.
        """
        return hashlib.sha256(f"{self.meta('id')} {self.meta('replica')}".encode()).hexdigest()[:32]

    def last(self) -> int:
        """Return the last number given."""
        return int(self._db.execute("SELECT coalesce(max(seq), 0) FROM versions").fetchone()[0])

    def write(self, name: str, like: Version | None, *, at: int) -> Version:
        """Add a change of this side that follows all that is known of *name*: the content of *like*, or a deletion."""
        with self.transaction():
            known = self.heads(name)
            vector = VersionVector()
            for head in known:
                vector = vector.join(head.vector)
            actor, count = self.next_count("desk")
            origin = next((head.origin for head in known if head.origin), "")
            new = Version(name, vector.with_count(actor, count), "", 0, 0, at, self.meta("node"), origin)
            if like is not None:
                new = replace(new, sha256=like.sha256, size=like.size, modified=like.modified)
            self.add([new])
        return new

    def settle(self, *, keep_both: bool = False, ask: bool = False) -> list[Version]:
        """End the conflicts of names that have changed; return the new conflict copies.

        With *ask*, conflicts between different contents stay open.
        """
        copies: list[Version] = []
        with self.transaction():
            waiting = self.dirty()
            while waiting:
                made: list[Version] = []
                for name in waiting:
                    made += map(self._with_free_name, self._settle_one(name, keep_both, ask))
                added = self.add(made)
                copies += [one for one in added if one.vector.counts == ((versions.SETTLED, 1),)]
                waiting = sorted({one.name for one in added})
        return copies

    def _with_free_name(self, made: Version) -> Version:
        """Give a conflict copy another name where the usual one was removed or changed: it would be hidden by that."""
        found, number = made, 1
        while made.vector.counts == ((versions.SETTLED, 1),) and any(
            head.sha256 != made.sha256 for head in self.heads(found.name)
        ):
            number += 1
            found = replace(made, name=versions.conflict_name(made, number=number))
        return found

    def _settle_one(self, name: str, keep_both: bool, ask: bool) -> list[Version]:
        known = self.heads(name)
        if len(known) > 1:
            if ask and len({one.sha256 for one in known}) > 1:
                return []
            return versions.settle(known, keep_both=keep_both)
        if not known or known[0].deleted:
            return []
        # A file and a directory of the same name: the file makes way.
        made: list[Version] = []
        parts = name.split("/")
        for length in range(1, len(parts)):
            above = self.heads("/".join(parts[:length]))
            made += [one for head in above if not head.deleted for one in versions.demote(head)]
        below = self._db.execute(
            "SELECT 1 FROM versions WHERE head AND sha256 <> '' AND name > ? AND name < ? LIMIT 1",
            (f"{name}/", f"{name}0"),
        ).fetchone()
        return made + (versions.demote(known[0]) if below else [])

    # Names whose disk may differ from their heads.

    def dirty(self) -> list[str]:
        """Return the names of which the disk may not show the heads."""
        return [name for (name,) in self._db.execute("SELECT name FROM dirty ORDER BY name")]

    def clean(self) -> None:
        """Forget the names of which the disk shows the only head."""
        with self.transaction():
            for name in self.dirty():
                known, there = self.heads(name), self.on_disk(name)
                if len(known) == 1 and (there == known[0] or (there is None and known[0].deleted)):
                    self._db.execute("DELETE FROM dirty WHERE name = ?", (name,))

    # The disk.

    def stamps(self) -> dict[str, Stamp]:
        """Return how each file looked that is there."""
        rows = self._db.execute("SELECT name, size, modified, changed, inode FROM disk WHERE sha256 <> ''")
        return {name: Stamp(*stamp) for name, *stamp in rows}

    def stamp(self, name: str) -> Stamp | None:
        """Return how a file looked; None if none is there."""
        row = self._db.execute(
            "SELECT size, modified, changed, inode FROM disk WHERE name = ? AND sha256 <> ''", (name,)
        ).fetchone()
        return Stamp(*row) if row else None

    def on_disk(self, name: str) -> Version | None:
        """Return the version that the disk shows, perhaps a tombstone; None if the name was never there."""
        row = self._db.execute("SELECT text FROM disk WHERE name = ?", (name,)).fetchone()
        return _version(row[0]) if row else None

    def set_disk(self, version: Version, stamp: Stamp) -> None:
        """Note that the disk shows a version."""
        self._db.execute(
            "INSERT INTO disk VALUES (?, ?, ?, ?, ?, ?, ?, NULL) ON CONFLICT (name) DO UPDATE SET"
            " sha256 = excluded.sha256, size = excluded.size, modified = excluded.modified,"
            " changed = excluded.changed, inode = excluded.inode, text = excluded.text",
            (version.name, version.sha256, stamp.size, stamp.modified, stamp.changed, stamp.inode, version.text),
        )

    def to_replay(self) -> list[Version]:
        """Return what the disk shows and the catalog has not been told."""
        rows = self._db.execute("SELECT text FROM disk WHERE replayed IS NULL OR replayed <> sha256 ORDER BY name")
        return [_version(text) for (text,) in rows]

    def replayed(self, told: Iterable[Version]) -> None:
        """Note that the catalog was told."""
        with self.transaction():
            for version in told:
                self._db.execute(
                    "UPDATE disk SET replayed = ? WHERE name = ? AND sha256 = ?",
                    (version.sha256, version.name, version.sha256),
                )

    # Files that are being replaced.

    def hold(self, rows: Iterable[tuple[str, str, Version | None, Version]]) -> None:
        """Note, before a file is replaced, under which token what lay there will be found."""
        with self.transaction():
            self._db.executemany(
                "INSERT INTO held VALUES (?, ?, ?, ?)",
                [(token, name, before.text if before else "", after.text) for token, name, before, after in rows],
            )

    def held(self) -> list[tuple[str, str, Version | None, Version]]:
        """Return what :meth:`hold` noted and :meth:`let_go` did not."""
        rows = self._db.execute("SELECT token, name, before, after FROM held")
        return [
            (token, name, _version(before) if before else None, _version(after)) for token, name, before, after in rows
        ]

    def let_go(self, tokens: Iterable[str]) -> None:
        """Forget tokens whose files have been looked after."""
        self._db.executemany("DELETE FROM held WHERE token = ?", [(token,) for token in tokens])

    # Peers.

    def peer(self, name: str) -> Peer:
        """Return how far a peer's versions are known."""
        row = self._db.execute("SELECT name, state, seq, heard FROM peers WHERE name = ?", (name,)).fetchone()
        return Peer(*row) if row else Peer(name, "", 0, 0.0)

    def set_peer(self, peer: Peer) -> None:
        """Note how far they are known."""
        self._db.execute(
            "INSERT OR REPLACE INTO peers VALUES (?, ?, ?, ?)", (peer.name, peer.state, peer.seq, peer.heard)
        )

    def peers(self) -> list[Peer]:
        """Return all that were ever asked."""
        return [Peer(*row) for row in self._db.execute("SELECT name, state, seq, heard FROM peers ORDER BY name")]

    # Telling.

    def counts(self) -> dict[str, int]:
        """Return how many files, tombstones and versions there are, and how many names are not settled or shown."""
        one = "SELECT count(*) FROM "
        return {
            "files": self._count(f"{one} versions WHERE head AND sha256 <> ''"),
            "tombstones": self._count(f"{one} versions WHERE head AND sha256 = ''"),
            "versions": self._count(f"{one} versions"),
            "shown": self._count(f"{one} disk WHERE sha256 <> ''"),
            "pending": self._count(f"{one} dirty"),
        }

    def _count(self, query: str) -> int:
        return int(self._db.execute(query).fetchone()[0])

    def copies(self) -> list[Version]:
        """Return the conflict copies that are still there, by name of what the conflict was about."""
        rows = self._db.execute(
            "SELECT text FROM versions WHERE head AND origin <> '' AND sha256 <> '' ORDER BY origin, name"
        )
        return [_version(text) for (text,) in rows]

    def undecided(self) -> list[str]:
        """Return the names with concurrent heads."""
        rows = self._db.execute("SELECT name FROM versions WHERE head GROUP BY name HAVING count(*) > 1 ORDER BY name")
        return [name for (name,) in rows]


def new_actor(node: str) -> str:
    """Return a name under which a node's changes are counted. Nobody has used it."""
    return f"{node}.{secrets.token_hex(4)}"


_ADVICE: Final = "move it away, then `tribrick sync run --init` begins a new one; no file is lost by that"
