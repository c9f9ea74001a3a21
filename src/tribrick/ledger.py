"""The ledger: the catalog's changes, copied to a SQLite file that is there when the database is not.

``follow`` copies; :class:`Ledger` reads and needs no Django settings; ``verify`` compares; ``rebuild``
makes a lost catalog again.

The file uses a rollback journal, because a reader that may not write to the directory can open it
at any time, which a write-ahead log does not allow. A batch of changes is one transaction, so a
killed follower leaves whole batches, and goes on where it was. Each row holds the SHA-256 of itself
and of the row before (*chain*), so one value stands for the whole history: two ledgers whose last
number and chain are equal are equal. The file's modification time is that at which the last whole pass began.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import logging
import os
import socket
import sqlite3
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

if TYPE_CHECKING:
    from tribrick.models import Change, Media, MediaFile

log = logging.getLogger("tribrick.ledger")
FORMAT: Final = 1
BATCH: Final = 1000
INTERVAL: Final = 2.0
SILENCE = 3.0
"""Seconds without an answer after which the database is away."""
_COLUMNS: Final = "number, kind, name, sha256, size, at, details"
_SCHEMA: Final = f"""
CREATE TABLE changes (
    number INTEGER PRIMARY KEY, kind TEXT NOT NULL, name TEXT NOT NULL, sha256 TEXT NOT NULL,
    size INTEGER NOT NULL, at TEXT NOT NULL, details TEXT NOT NULL, chain TEXT NOT NULL
);
CREATE TABLE files (
    name TEXT PRIMARY KEY, state TEXT NOT NULL, storage TEXT NOT NULL, sha256 TEXT NOT NULL, size INTEGER NOT NULL
) WITHOUT ROWID;
PRAGMA user_version = {FORMAT};
"""


class LedgerError(Exception):
    """The ledger cannot be used as it is."""


class LedgerDamaged(LedgerError):
    """The file is not what a follower has written."""


class Diverged(LedgerError):
    """Ledger and database hold different histories."""


@dataclass(frozen=True)
class Entry:
    """One change."""

    number: int
    kind: str
    name: str
    sha256: str
    size: int
    at: str
    details: str

    def chain(self, before: str) -> str:
        """Return the hash of this change and all before it."""
        text = json.dumps([before, *self.values()], ensure_ascii=False, separators=(",", ":"))
        return hashlib.sha256(text.encode()).hexdigest()

    def values(self) -> tuple[Any, ...]:
        """Return the columns in the order of the table."""
        return (self.number, self.kind, self.name, self.sha256, self.size, self.at, self.details)

    @property
    def storage(self) -> str:
        """The key in STORAGES; known of an added file."""
        return str(json.loads(self.details).get("storage", "default"))


@dataclass(frozen=True)
class Known:
    """What the ledger knows of a name: ``stored``, ``deleted`` or ``purged``, and the bytes it had."""

    name: str
    state: str
    storage: str
    sha256: str
    size: int


class Ledger:
    """The ledger in the file *path*, for reading. Close it, or use it in a ``with`` statement."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise LedgerError(f"there is no ledger at {self.path}")
        # "rw" so that who may write rolls back the journal of a killed follower; SQLite opens the
        # file for reading where it may not be written to. Nothing is ever written here.
        try:
            self._db = _connect(self.path, "rw")
            try:
                _check_format(self._db, self.path)
                self._db.execute("PRAGMA query_only = ON")
            except BaseException:
                self._db.close()
                raise
        except sqlite3.OperationalError as error:
            raise LedgerError(f"{self.path}: {error}") from error

    def __enter__(self) -> Ledger:
        return self

    def __exit__(self, *_error: object) -> None:
        self.close()

    def close(self) -> None:
        """Close the file."""
        self._db.close()

    def get(self, name: str) -> Known | None:
        """Return what is known of *name*; None if it was never added."""
        row = self._db.execute(
            "SELECT name, state, storage, sha256, size FROM files WHERE name = ?", (name,)
        ).fetchone()
        return Known(*row) if row else None

    def files(self, after: str = "", limit: int = -1) -> list[Known]:
        """Return files of every state whose name comes after *after*, by name."""
        rows = self._db.execute(
            "SELECT name, state, storage, sha256, size FROM files WHERE name > ? ORDER BY name LIMIT ?", (after, limit)
        )
        return [Known(*row) for row in rows]

    def last(self) -> tuple[int, str]:
        """Return the last number and the chain there; ``(0, "")`` of an empty ledger."""
        return _last(self._db)

    def chain(self, number: int) -> str | None:
        """Return the chain at a number; None if there is no such change."""
        row = self._db.execute("SELECT chain FROM changes WHERE number = ?", (number,)).fetchone()
        return str(row[0]) if row else None

    def changes(self, after: int = 0) -> Iterator[Entry]:
        """Yield the changes after a number, in order."""
        for row in self._db.execute(f"SELECT {_COLUMNS} FROM changes WHERE number > ? ORDER BY number", (after,)):  # noqa: S608
            yield Entry(*row)

    def age(self) -> float:
        """Return the seconds since the follower last knew that nothing was missing.

        A time that is still to come is that of a clock that was set back meanwhile: the ledger may be any age.
        """
        return abs(time.time() - self.path.stat().st_mtime)

    def check(self) -> None:
        """Read everything; raise ``LedgerDamaged`` unless each row is as it was written."""
        try:
            # One look: a batch that a follower writes between two of them is no damage. It waits.
            self._db.execute("BEGIN")
            said = self._db.execute("PRAGMA integrity_check").fetchone()[0]
            if said != "ok":
                raise LedgerDamaged(f"{self.path}: {said}")
            chain = ""
            files: dict[str, tuple[Any, ...]] = {}
            for *values, written in self._db.execute(f"SELECT {_COLUMNS}, chain FROM changes ORDER BY number"):  # noqa: S608
                entry = Entry(*values)
                chain = entry.chain(chain)
                if chain != written:
                    raise LedgerDamaged(f"{self.path}: number {entry.number} is not as it was written")
                state = _STATES.get(entry.kind)
                if state == "stored":
                    files[entry.name] = (state, entry.storage, entry.sha256, entry.size)
                elif state and entry.name in files:
                    files[entry.name] = (state, *files[entry.name][1:])
            count = self._db.execute("SELECT count(*) FROM files").fetchone()[0]
            for name, *known in self._db.execute("SELECT name, state, storage, sha256, size FROM files"):
                if files.get(name) != tuple(known):
                    raise LedgerDamaged(f"{self.path}: what it says of {name} does not follow from its changes")
            if count != len(files):
                raise LedgerDamaged(f"{self.path}: it has {count} files, its changes {len(files)}")
        except sqlite3.DatabaseError as error:
            raise LedgerDamaged(f"{self.path}: {error}") from error
        finally:
            if self._db.in_transaction:
                self._db.execute("ROLLBACK")


_STATES: Final = {"added": "stored", "deleted": "deleted", "purged": "purged"}


def _connect(path: Path, mode: str) -> sqlite3.Connection:
    uri = f"{path.absolute().as_uri()}?mode={mode}"
    return sqlite3.connect(uri, uri=True, timeout=10, isolation_level=None)


def _check_format(database: sqlite3.Connection, path: Path) -> None:
    try:
        version = database.execute("PRAGMA user_version").fetchone()[0]
        database.execute("SELECT 1 FROM changes LIMIT 1").fetchone()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error):
            raise LedgerDamaged(f"{path} is not a ledger") from error
        raise
    except sqlite3.DatabaseError as error:
        raise LedgerDamaged(f"{path}: {error}") from error
    if version != FORMAT:
        raise LedgerDamaged(f"{path} has format {version}, not {FORMAT}")


def _last(database: sqlite3.Connection) -> tuple[int, str]:
    row = database.execute("SELECT number, chain FROM changes ORDER BY number DESC LIMIT 1").fetchone()
    return (row[0], row[1]) if row else (0, "")


# Following


def _entries(after: int, *, to: int | None = None) -> Iterator[Entry]:
    from tribrick.catalog import database
    from tribrick.models import Change

    rows = Change.objects.using(database()).filter(number__gt=after).order_by("number")
    if to is not None:
        rows = rows.filter(number__lte=to)
    for change in rows.iterator(chunk_size=BATCH):
        yield _entry(change)


def _entry(change: Change) -> Entry:
    from django.utils.timezone import is_naive, make_aware

    at = (make_aware(change.at) if is_naive(change.at) else change.at).astimezone(timezone.utc)
    assert change.number is not None  # noqa: S101  the query asked for a number
    return Entry(
        number=change.number,
        kind=str(change.kind),
        name=change.name,
        sha256=change.sha256,
        size=change.size,
        at=at.isoformat("T", "microseconds"),
        details=json.dumps(change.details, ensure_ascii=False, sort_keys=True, separators=(",", ":")),
    )


def _time(text: str) -> datetime:
    """Return a time of the ledger as the models of this site want it."""
    from django.conf import settings
    from django.utils.timezone import is_naive, make_aware, make_naive

    at = datetime.fromisoformat(text)
    if settings.USE_TZ:
        return make_aware(at) if is_naive(at) else at
    return at if is_naive(at) else make_naive(at)


def _writable(path: Path) -> sqlite3.Connection:
    if not path.exists():
        _create(path)
    database = _connect(path, "rw")
    try:
        _check_format(database, path)
        database.execute("PRAGMA synchronous = FULL")
    except BaseException:
        database.close()
        raise
    return database


def _create(path: Path) -> None:
    """Make an empty ledger. It appears whole or not at all."""
    new = path.with_name(f".{path.name}.{os.getpid()}")
    new.unlink(missing_ok=True)
    database = sqlite3.connect(new, isolation_level=None)
    try:
        database.executescript(_SCHEMA)
    finally:
        database.close()
    new.chmod(0o644)
    os.utime(new, (0, 0))  # nobody has looked yet
    with contextlib.suppress(FileExistsError):
        os.link(new, path)
    new.unlink()


def follow_once(path: str | os.PathLike[str], *, node: str = "", beat: Callable[[], None] = lambda: None) -> int:
    """Copy what is new in the database; return the number of changes. With *node*, confirm it there.

    *beat* is called after each batch.

    A damaged file is set aside as ``<name>.damaged`` and made again from the database. Raises
    ``Diverged`` when the database lacks what the ledger has, and changes nothing then.
    """
    from tribrick import catalog
    from tribrick.models import Change, Node

    path = Path(path)
    using = catalog.database()
    Change.objects.using(using).exists()  # is the database there? Nothing is set aside if not
    try:
        return _copy(path, node, beat)
    except LedgerDamaged as error:
        aside = path.with_name(f"{path.name}.damaged")
        log.error("%s; kept as %s, made again from the database", error, aside)
        os.replace(path, aside)
        path.with_name(f"{path.name}-journal").unlink(missing_ok=True)
        Node.objects.using(using).filter(name=node).update(number=0)
        return _copy(path, node, beat)


def _copy(path: Path, node: str, beat: Callable[[], None]) -> int:
    cut_off = path.with_name(f"{path.name}-journal").exists()
    database = _writable(path)
    try:
        if cut_off:  # a follower was killed in a batch, and SQLite has rolled that back: the time is not that of a pass
            os.utime(path, (0, 0))
        number, chain = _last(database)
        if number:
            _check_tail(database, number, path)
        copied = 0
        before, looked = path.stat().st_mtime_ns, time.time_ns()
        entries = _entries(number)
        while batch := list(itertools.islice(entries, BATCH)):
            database.execute("BEGIN IMMEDIATE")
            try:
                if _last(database)[0] != number:
                    raise LedgerError(f"{path}: another follower is at work")
                for entry in batch:
                    chain = entry.chain(chain)
                    _write(database, entry, chain)
                database.execute("COMMIT")
            except BaseException:
                if database.in_transaction:
                    database.execute("ROLLBACK")
                raise
            os.utime(path, ns=(before, before))  # SQLite has touched it, but more may be missing
            number = batch[-1].number
            copied += len(batch)
            beat()
        os.utime(path, ns=(looked, looked))
    except sqlite3.DatabaseError as error:
        if isinstance(error, sqlite3.OperationalError):  # locked, full, not writable: not damage
            raise
        raise LedgerDamaged(f"{path}: {error}") from error
    finally:
        database.close()
    if node:
        _confirm(node, number)
    return copied


def _write(database: sqlite3.Connection, entry: Entry, chain: str) -> None:
    database.execute("INSERT INTO changes VALUES (?, ?, ?, ?, ?, ?, ?, ?)", (*entry.values(), chain))
    state = _STATES.get(entry.kind)
    if state == "stored":
        database.execute(
            "INSERT OR REPLACE INTO files VALUES (?, ?, ?, ?, ?)",
            (entry.name, state, entry.storage, entry.sha256, entry.size),
        )
    elif state:
        database.execute("UPDATE files SET state = ? WHERE name = ?", (state, entry.name))


def _check_tail(database: sqlite3.Connection, number: int, path: Path) -> None:
    own = Entry(*database.execute(f"SELECT {_COLUMNS} FROM changes WHERE number = ?", (number,)).fetchone())  # noqa: S608
    theirs = next(_entries(number - 1, to=number), None)
    if theirs != own:
        what = "lacks" if theirs is None else "has another"
        raise Diverged(
            f"the database {what} change {number}, which {path} holds: it lost its last changes, or it is not the "
            f"database that this ledger followed. See docs/catalog.md, 'The database lost changes'."
        )


def _confirm(node: str, number: int) -> None:
    from tribrick import catalog
    from tribrick.models import Node

    if not Node.objects.using(catalog.database()).filter(name=node, number=number).exists():
        catalog.confirm(node, number)


class _Watch:
    """Cuts the connection of an attempt that hears nothing from the database.

    A server that hangs, or a network that swallows packets, is silent for ever otherwise: no time-out
    of the server's helps.
    """

    def __init__(self, stop: threading.Event) -> None:
        from django.db import connections

        from tribrick.catalog import database

        self._connection = connections[database()]
        if self._connection.vendor == "postgresql":
            self._connection.settings_dict.setdefault("OPTIONS", {}).setdefault("connect_timeout", round(SILENCE))
        self._stop, self._over = stop, threading.Event()
        self._heard = time.monotonic()
        self._thread = threading.Thread(target=self._run, name="tribrick-ledger-watch", daemon=True)

    def beat(self) -> None:
        """Note that the database has answered, or was not asked until now."""
        self._heard = time.monotonic()

    def __enter__(self) -> _Watch:
        self.beat()
        self._thread.start()
        return self

    def __exit__(self, *_error: object) -> None:
        self._over.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._over.wait(0.1):
            silent = time.monotonic() - self._heard
            if silent > SILENCE or (self._stop.is_set() and silent > 1):
                self._cut()

    def _cut(self) -> None:
        raw = self._connection.connection
        with contextlib.suppress(Exception), socket.socket(fileno=os.dup(raw.fileno())) as line:
            line.shutdown(socket.SHUT_RDWR)


def follow(
    path: str | os.PathLike[str],
    *,
    node: str = "",
    interval: float = INTERVAL,
    stop: threading.Event | None = None,
    said: Callable[[str], None] = log.warning,
) -> None:
    """Copy for ever, or until *stop* is set; go on after errors, saying each kind once.

    An attempt that hears nothing from the database for ``SILENCE`` seconds is over, so the ledger
    follows again that soon, and an interval, after the database does.
    """
    from django.db import DatabaseError, InterfaceError, connections

    from tribrick.catalog import database

    stop = stop or threading.Event()
    trouble = ""
    while not stop.is_set():
        try:
            with _Watch(stop) as watch:
                follow_once(path, node=node, beat=watch.beat)
            if trouble:
                said("the ledger follows again")
            trouble = ""
        except (DatabaseError, InterfaceError, LedgerError, sqlite3.Error, OSError) as error:
            kind = "database" if isinstance(error, (DatabaseError, InterfaceError)) else type(error).__name__
            if kind != trouble and not stop.is_set():
                said(f"the ledger cannot follow: {' '.join(str(error).split())}")
            trouble = kind
            connections[database()].close()
        stop.wait(interval)


# Verifying


def verify(path: str | os.PathLike[str], *, database: bool = True) -> tuple[int, str, int]:
    """Check the file, and against the database if asked; return last number, chain and changes behind.

    Raises ``LedgerDamaged`` or ``Diverged`` with the first difference.
    """
    with Ledger(path) as ledger:
        ledger.check()
        number, chain = ledger.last()
        if not database:
            return number, chain, 0
        # What a follower has written since is not asked for.
        _compare((entry for entry in ledger.changes() if entry.number <= number), _entries(0, to=number))
    from tribrick import catalog
    from tribrick.models import Change

    rows = Change.objects.using(catalog.database())
    if unnumbered := rows.filter(number__isnull=True).count():
        raise Diverged(f"{unnumbered} changes in the database have no number: was its trigger switched off?")
    return number, chain, rows.filter(number__gt=number).count()


def _compare(own: Iterable[Entry], theirs: Iterable[Entry]) -> None:
    for mine, other in itertools.zip_longest(own, theirs):
        if mine == other:
            continue
        if other is None or (mine is not None and mine.number < other.number):
            raise Diverged(f"the database lacks change {mine.number} ({mine.kind} {mine.name})")
        if mine is None or mine.number > other.number:
            raise Diverged(f"the ledger lacks change {other.number} ({other.kind} {other.name})")
        raise Diverged(f"change {mine.number} differs: {mine.kind} {mine.name} here, {other.kind} {other.name} there")


# Rebuilding


@dataclass(frozen=True)
class Rebuilt:
    """How many changes and rows were missing in the database."""

    changes: int
    files: int
    updated: int


def rebuild(path: str | os.PathLike[str], *, apply: bool = False) -> Rebuilt:
    """Write into the catalog what the ledger has and the catalog has lost; count only unless *apply*.

    The database may be empty, or older than the ledger, or have lost rows of the catalog. It must not
    have changes that the ledger lacks, nor different ones.
    """
    from django.db import transaction

    from tribrick import catalog

    with Ledger(path) as ledger:
        ledger.check()
        with transaction.atomic(using=catalog.database()):
            done = _Rebuild(ledger, catalog.database()).run()
            if not apply:
                transaction.set_rollback(True, using=catalog.database())
    return done


class _Rebuild:
    def __init__(self, ledger: Ledger, using: str) -> None:
        self.ledger, self.using = ledger, using
        self.rows: dict[str, MediaFile] = {}
        self.media: dict[int, Media] = {}
        self.versions: dict[int, list[MediaFile]] = {}
        self.current: dict[int, str | None] = {}
        self.there = 0  # the last number that the database has
        self.touched: set[str] = set()  # names changed by what the database had lost

    def run(self) -> Rebuilt:
        from django.db import connections

        from tribrick.models import Change

        if connections[self.using].vendor == "postgresql":
            with connections[self.using].cursor() as cursor:
                cursor.execute("LOCK TABLE tribrick_change, tribrick_mediafile, tribrick_media IN EXCLUSIVE MODE")
        changes = Change.objects.using(self.using)
        there = changes.exclude(number=None).order_by("-number").values_list("number", flat=True).first() or 0
        self.there = there
        last = self.ledger.last()[0]
        if there > last:
            raise Diverged(f"the database is at change {there}, the ledger at {last}: it has nothing to give")
        _compare((entry for entry in self.ledger.changes() if entry.number <= there), _entries(0, to=there))
        missing = []
        for entry in self.ledger.changes():
            self._replay(entry)
            if entry.number > there:
                self.touched.add(entry.name)
                at, details = _time(entry.at), json.loads(entry.details)
                missing.append(
                    Change(
                        number=entry.number, kind=entry.kind, name=entry.name, sha256=entry.sha256, size=entry.size,
                        at=at, details=details,
                    )
                )  # fmt: skip
        changes.bulk_create(missing, batch_size=BATCH)
        new, updated = self._save()
        self._set_number(last)
        return Rebuilt(len(missing), new, updated)

    def _replay(self, entry: Entry) -> None:
        from tribrick.models import Media, MediaFile

        if entry.kind == "added":
            known = json.loads(entry.details)
            logical: int | None = known.get("logical")
            row = self.rows[entry.name] = MediaFile(
                id=known.get("id"),
                name=entry.name,
                storage=known.get("storage", "default"),
                original=known.get("original", ""),
                sha256=entry.sha256,
                size=entry.size,
                content_type=known.get("content_type", ""),
                owner_id=known.get("owner"),
                node=known.get("node", ""),
                created=_time(known.get("created", entry.at)),
                logical_id=logical,
                version=known.get("version", 1),
            )
            if logical is not None:
                replaced = self.rows.get(known.get("replaces") or "")
                if logical not in self.media:
                    created = replaced.created if replaced else row.created
                    self.media[logical] = Media(id=logical, created=created)
                    self.versions[logical] = []
                if replaced is not None and replaced.logical_id is None:
                    replaced.logical_id = logical
                    self.versions[logical].append(replaced)
                    if entry.number > self.there:
                        self.touched.add(replaced.name)
                self.versions[logical].append(row)
                self.current[logical] = row.name
            return
        known_row = self.rows.get(entry.name)
        if known_row is None:
            return
        logical = known_row.logical_id
        if entry.kind == "deleted":
            known_row.state, known_row.deleted = "deleted", _time(entry.at)
            if logical is not None and self.current.get(logical) == entry.name:
                self.current[logical] = self._newest(logical)
        elif entry.kind == "purged":
            known_row.state = "purged"
        elif entry.kind == "current" and logical is not None:
            self.current[logical] = entry.name

    def _newest(self, logical: int) -> str | None:
        live = [row for row in self.versions[logical] if row.state == "stored"]
        return max(live, key=lambda row: row.version).name if live else None

    def _save(self) -> tuple[int, int]:
        from django.contrib.auth import get_user_model
        from django.utils.timezone import now

        from tribrick.catalog import TOMBSTONE_AGE
        from tribrick.models import Media, MediaFile

        files, media = MediaFile.objects.using(self.using), Media.objects.using(self.using)
        users = get_user_model()
        owners = {str(pk) for pk in users._default_manager.using(self.using).values_list("pk", flat=True)}
        there = dict(files.values_list("name", "pk"))
        taken = set(there.values())
        expired = now() - TOMBSTONE_AGE
        new, old = [], []
        for name, row in self.rows.items():
            row.owner_id = users._meta.pk.to_python(row.owner_id) if str(row.owner_id) in owners else None
            if name in there:
                row.pk = there[name]
                if name in self.touched:
                    old.append(row)
            elif row.state != "purged" or (row.deleted is not None and row.deleted > expired):
                if row.pk in taken:
                    row.pk = None
                new.append(row)
        used = {row.logical_id for row in new + old if row.logical_id is not None}
        groups = set(media.values_list("pk", flat=True))
        media.bulk_create([one for pk, one in self.media.items() if pk in used - groups], batch_size=BATCH)
        files.bulk_create([row for row in new if row.pk is not None], batch_size=BATCH)
        self._reset_ids()
        files.bulk_create([row for row in new if row.pk is None], batch_size=BATCH)
        files.bulk_update(old, ["state", "deleted", "logical"], batch_size=BATCH)
        pks = dict(files.values_list("name", "pk"))
        changed = []
        for pk in used & set(self.media):
            one = self.media[pk]
            one.current_id = pks.get(self.current[pk] or "")
            changed.append(one)
        media.bulk_update(changed, ["current"], batch_size=BATCH)
        return len(new), len(old)

    def _reset_ids(self) -> None:
        """Rows were written with their old ids: let new ones come after them."""
        from django.core.management.color import no_style
        from django.db import connections

        from tribrick.models import Change, Media, MediaFile

        connection = connections[self.using]
        with connection.cursor() as cursor:
            for statement in connection.ops.sequence_reset_sql(no_style(), [Change, Media, MediaFile]):
                cursor.execute(statement)

    def _set_number(self, last: int) -> None:
        from django.db import connections

        from tribrick.models import Counter

        connection = connections[self.using]
        if connection.vendor != "postgresql":
            Counter.objects.using(self.using).update_or_create(pk=1, defaults={"value": last})
        elif last:
            with connection.cursor() as cursor:
                cursor.execute(
                    "SELECT setval('tribrick_change_number',"
                    " greatest(%s, (SELECT last_value FROM tribrick_change_number)))",
                    [last],
                )
