"""Adding, replacing and deleting files so that bytes, rows and ledger always agree.

The order of an upload: bytes durable, then the row, then the answer. So what was acknowledged has
both. If the row was certainly not committed, the bytes are removed again; if nobody knows (the
connection died at COMMIT), they stay: an orphan, which ``sweep`` finds, is better than a row
without bytes. The same holds when a surrounding transaction is rolled back later. ``together`` is a
transaction that removes the bytes of its files when it fails.

The order of a delete: the tombstone in the caller's transaction, the bytes after its commit. A
rollback keeps them. If the process is killed in between, or the volume is away, ``finish_deletes``
does the rest.

Nothing here asks the disk what the catalog knows.
"""

from __future__ import annotations

import contextlib
import hashlib
import logging
from collections.abc import Iterator
from contextvars import ContextVar
from datetime import datetime, timedelta
from typing import IO, Any, Final

from django.core.exceptions import ImproperlyConfigured
from django.core.files import File
from django.core.files.storage import storages
from django.db import connections, router, transaction
from django.db.models import Exists, F, Max, OuterRef, ProtectedError, Q, QuerySet, RestrictedError
from django.utils import timezone

from tribrick import names
from tribrick.conf import setting
from tribrick.errors import StorageError
from tribrick.models import Change, Counter, Kind, Media, MediaFile, Node, Outbox, State
from tribrick.storage.catalogued import Commit
from tribrick.storage.volume import StoredFile

log = logging.getLogger("tribrick.catalog")
NAME_LENGTH: Final = 255
TOMBSTONE_AGE: Final = timedelta(days=30)
LOOKS: Final = tuple(timedelta(minutes=2**power) for power in range(16))
"""How old a tombstone is when its name is looked for again: 1 minute, 2, 4 and so on up to 23 days."""


class NameIsDead(ValueError):
    """The name was deleted. Names are never alive again."""


class FileIsDeleted(ValueError):
    """The file was deleted, so it can be neither replaced nor restored."""


def database() -> str:
    """Return the alias of the database that holds the catalog."""
    return router.db_for_write(MediaFile)


def _atomic() -> transaction.Atomic:
    return transaction.atomic(using=database())


# The files stored within `together`, as pairs of the storage's key and the name.
_stored: ContextVar[list[tuple[str, str]] | None] = ContextVar("tribrick_stored", default=None)


@contextlib.contextmanager
def together() -> Iterator[None]:
    """A transaction for several files and the site's own rows: all of it, or nothing is left.

    When it certainly failed, the bytes of all files that were stored in it are removed again. When
    nobody knows (the connection died at COMMIT) they stay. Inside another transaction it is a part
    of that, and whether it lasts is decided there: a rollback then leaves the bytes to ``sweep``.
    """
    commit, stored = Commit(), list[tuple[str, str]]()
    token = _stored.set(stored)
    try:
        with commit.watched():
            yield
    except BaseException:
        for alias, name in stored:
            if commit.unknown:
                log.error("unknown whether the row was committed; kept %s", name)
            else:
                _discard(alias, name)
        raise
    finally:
        _stored.reset(token)
    if (outer := _stored.get()) is not None:
        outer.extend(stored)


def note_stored(alias: str, name: str) -> None:
    """Tell a surrounding :func:`together` of a file whose row was just written. For storages."""
    if (stored := _stored.get()) is not None:
        stored.append((alias, name))


# Adding


def add(
    content: IO[Any] | File[Any],
    name: str,
    *,
    original: str | None = None,
    owner: Any = None,
    content_type: str = "",
    node: str | None = None,
    storage: str = "default",
) -> MediaFile:
    """Store *content* under a new name made from *name* (``directory/client's name``); return its row.

    May be called inside a transaction. When it returns outside of one, the file is safe.
    """
    return _store(content, name, original, owner, content_type, node, storage, None)


def replace(
    old: MediaFile,
    content: IO[Any] | File[Any],
    name: str | None = None,
    *,
    original: str | None = None,
    owner: Any = None,
    content_type: str = "",
    node: str | None = None,
) -> MediaFile:
    """Store *content* as a new version of the logical file that *old* is a version of.

    The old version stays. Two who replace the same file at once get a version each. Raises
    ``FileIsDeleted``, having stored nothing, if *old* is deleted.
    """
    if MediaFile.objects.using(database()).filter(pk=old.pk, state=State.STORED).first() is None:
        raise FileIsDeleted(f"{old.name} was deleted")
    return _store(content, name or old.name, original, owner, content_type, node, old.storage, old)


def record(
    stored: StoredFile,
    *,
    original: str = "",
    owner: Any = None,
    content_type: str = "",
    node: str | None = None,
    storage: str = "default",
    created: datetime | None = None,
    replaces: MediaFile | None = None,
) -> MediaFile:
    """Write the row of a file that is stored already, in the caller's transaction if there is one."""
    if Change.objects.using(database()).filter(name=stored.name, kind=Kind.DELETED).exists():
        raise NameIsDead(f"{stored.name} was deleted; a name is never alive again")
    return _record(stored, original, owner, content_type, node, storage, created, replaces)


def _store(
    content: IO[Any] | File[Any],
    name: str,
    original: str | None,
    owner: Any,
    content_type: str,
    node: str | None,
    storage: str,
    replaces: MediaFile | None,
) -> MediaFile:
    if original is None:
        original = names.basename(str(getattr(content, "name", "") or name))
    original = names.display_name(original)
    # Where the storage writes work for the hosts into the outbox, that and the row are one transaction.
    later = getattr(storages[storage], "works_later", False)
    with together() if later else contextlib.nullcontext():
        stored = _store_bytes(storage, content, name)
        commit = Commit()
        try:
            with commit.watched():
                row = _record(stored, original, owner, content_type, node, storage, None, replaces)
        except BaseException:
            if commit.unknown:
                log.error("unknown whether the row was committed; kept %s", stored.name)
            else:
                _discard(storage, stored.name)
            raise
        note_stored(storage, stored.name)
        return row


def _store_bytes(alias: str, content: IO[Any] | File[Any], name: str) -> StoredFile:
    storage = storages[alias]
    if hasattr(storage, "store"):
        stored = storage.store(content, name, max_length=NAME_LENGTH)
        return StoredFile(stored.name, stored.sha256, stored.size, getattr(stored, "spooled", False))
    file = content if isinstance(content, File) else File(content, name)
    hasher, size = hashlib.sha256(), 0
    for chunk in file.chunks():
        data = chunk.encode() if isinstance(chunk, str) else chunk
        hasher.update(data)
        size += len(data)
    return StoredFile(storage.save(name, file, max_length=NAME_LENGTH), hasher.hexdigest(), size)


def _discard(alias: str, name: str) -> None:
    storage = storages[alias]
    try:
        getattr(storage, "discard", storage.delete)(name)
    except Exception as error:  # noqa: BLE001  the save's own error matters more
        log.warning("a failed save left %s behind: %s", name, error)


def _record(
    stored: StoredFile,
    original: str,
    owner: Any,
    content_type: str,
    node: str | None,
    storage: str,
    created: datetime | None,
    replaces: MediaFile | None,
) -> MediaFile:
    with _atomic():
        row = MediaFile(
            name=stored.name,
            storage=storage,
            original=original,
            sha256=stored.sha256,
            size=stored.size,
            content_type=names.content_type(content_type),
            owner=owner,
            node=str(setting("NODE")) if node is None else node,
            created=created or timezone.now(),
            spooled=stored.spooled,
        )
        media = None
        if replaces is not None:
            media = _logical(replaces)
            last = media.versions.aggregate(last=Max("version"))["last"]
            row.logical, row.version = media, last + 1
        row.save(force_insert=True, using=database())
        if media is not None:
            media.current = row
            media.save(update_fields=["current"])
        details = {
            "id": row.pk,
            "storage": row.storage,
            "original": row.original,
            "content_type": row.content_type,
            "owner": None if row.owner_id is None else str(row.owner_id),
            "node": row.node,
            "created": row.created.isoformat(),
            "logical": row.logical_id,
            "version": row.version,
            "replaces": None if replaces is None else replaces.name,
        }
        _change(row, Kind.ADDED, details)
    return row


def _logical(file: MediaFile) -> Media:
    """Return the locked logical file of *file*; make it if this is the first replacement."""
    locked, media = _locked(file.pk)
    if locked.state != State.STORED:
        raise FileIsDeleted(f"{locked.name} was deleted")
    if media is None:
        media = Media.objects.using(database()).create(created=locked.created, current=locked)
        locked.logical = media
        locked.save(update_fields=["logical"])
    return media


def _locked(pk: Any) -> tuple[MediaFile, Media | None]:
    """Lock a file, its logical file first, so that all who do it wait in the same order."""
    files = MediaFile.objects.using(database())
    while True:
        logical = files.values_list("logical_id", flat=True).get(pk=pk)
        try:
            with _atomic():
                media = None
                if logical is not None:
                    media = Media.objects.using(database()).select_for_update().get(pk=logical)
                file = files.select_for_update().get(pk=pk)
                if file.logical_id != logical:
                    raise _Moved
                return file, media
        except _Moved:  # got its logical file while we waited; the savepoint gave back our lock
            continue


class _Moved(Exception):
    pass


def _change(file: MediaFile, kind: Kind, details: dict[str, Any] | None = None, at: datetime | None = None) -> None:
    Change.objects.using(database()).create(
        number=_number(),
        kind=kind,
        name=file.name,
        sha256=file.sha256,
        size=file.size,
        at=at or timezone.now(),
        details=details or {},
    )


def _number() -> int | None:
    """Return the next number, or None on PostgreSQL, which gives it at COMMIT.

    Elsewhere the counter's row stays locked until the transaction ends. Same order, less speed.
    """
    using = database()
    if connections[using].vendor == "postgresql":
        return None
    counters = Counter.objects.using(using)
    if not counters.filter(pk=1).update(value=F("value") + 1):
        last = Change.objects.using(using).aggregate(last=Max("number"))["last"] or 0
        counters.create(pk=1, value=last + 1)
    return int(counters.values_list("value", flat=True).get(pk=1))


# Deleting


def delete(file: MediaFile | str) -> MediaFile:
    """Delete one stored file; the newest of its other versions, if it was current, becomes current.

    The tombstone is written in the caller's transaction, the bytes go after its commit. Deleting
    again is no error. Raises ``MediaFile.DoesNotExist`` for a name that the catalog does not know.
    """
    rows = MediaFile.objects.using(database())
    pk = rows.values_list("pk", flat=True).get(name=file) if isinstance(file, str) else file.pk
    with _atomic():
        locked, media = _locked(pk)
        _bury(locked)
        if media is not None and media.current_id == locked.pk:
            media.current = media.versions.filter(state=State.STORED).order_by("-version").first()
            media.save(update_fields=["current"])
    return locked


def delete_all(media: Media) -> None:
    """Delete a logical file: all its versions."""
    with _atomic():
        locked = Media.objects.using(database()).select_for_update().get(pk=media.pk)
        for file in locked.versions.select_for_update().order_by("version"):
            _bury(file)
        locked.current = None
        locked.save(update_fields=["current"])


def _bury(file: MediaFile) -> None:
    if file.state == State.STORED:
        file.state, file.deleted = State.DELETED, timezone.now()
        file.save(update_fields=["state", "deleted"])
        _change(file, Kind.DELETED, at=file.deleted)
    if file.state == State.DELETED:
        transaction.on_commit(lambda: _purge_after_commit(file), using=database())


def _purge_after_commit(file: MediaFile) -> None:
    try:
        purge(file)
    except Exception as error:  # noqa: BLE001  the delete itself is done; the worker does the rest
        log.warning("%s is deleted, its bytes will go later: %s", file.name, error)


def purge(file: MediaFile) -> None:
    """Remove the bytes of a tombstone and say so in the ledger; may be repeated."""
    if MediaFile.objects.using(database()).filter(pk=file.pk, state=State.STORED).exists():
        raise ValueError(f"{file.name} is not deleted")
    storages[file.storage].delete(file.name)
    with _atomic():
        if MediaFile.objects.using(database()).filter(pk=file.pk, state=State.DELETED).update(state=State.PURGED):
            _change(file, Kind.PURGED)


def finish_deletes(*, again: bool = False) -> tuple[int, int]:
    """Remove the bytes of deleted files that were left behind; return how many went and failed.

    With *again*, of all tombstones: after a power cut of all nodes, a restore or a drain, since an
    unlink is not durable then. A storage that is away is passed over; its ``StorageError`` is raised
    in the end.
    """
    rows = MediaFile.objects.using(database()).exclude(state=State.STORED)
    if not again:
        rows = rows.filter(state=State.DELETED)
    done = failed = 0
    away: dict[str, StorageError] = {}
    for file in rows.order_by("pk").iterator():
        if file.storage in away:
            continue
        try:
            purge(file)
        except StorageError as error:
            away[file.storage] = error
        except (OSError, ImproperlyConfigured) as error:  # the latter: its storage is no longer in STORAGES
            log.warning("the bytes of %s could not be removed: %s", file.name, error)
            failed += 1
        else:
            done += 1
    for why in away.values():
        raise why
    return done, failed


def remove_returned(since: datetime, until: datetime) -> int:
    """Remove the bytes of deleted files that are there once more; return how many there were.

    GlusterFS merges a directory whose bricks accuse each other, and then a name that one of them was not
    told to forget is on all of them. Looked at are the tombstones that came to one of :data:`LOOKS` between
    the two times: what comes back when a tombstone has some age is gone before it has twice that age. The
    ledger is told, so that the edges purge the name again. A storage that is away is passed over; its
    ``StorageError`` is raised in the end, and the same times are to be given again.
    """
    ages = Q()
    for age in LOOKS:
        ages |= Q(deleted__gt=since - age, deleted__lte=until - age)
    count = 0
    away: dict[str, StorageError] = {}
    for file in MediaFile.objects.using(database()).filter(ages, state=State.PURGED).order_by("pk").iterator():
        if file.storage in away:
            continue
        try:
            if not storages[file.storage].exists(file.name):
                continue
            storages[file.storage].delete(file.name)
        except StorageError as error:
            away[file.storage] = error
        except (OSError, ImproperlyConfigured) as error:
            log.warning("%s, which is deleted, could not be looked for: %s", file.name, error)
        else:
            log.warning("%s was deleted and had come back; it is removed again", file.name)
            with _atomic():
                _change(file, Kind.PURGED)
            count += 1
    for why in away.values():
        raise why
    return count


def confirm(node: str, number: int) -> None:
    """Note that the ledger of *node* holds every change up to *number*."""
    nodes = Node.objects.using(database())
    if not nodes.filter(name=node).update(number=number, seen=timezone.now()):
        nodes.get_or_create(name=node, defaults={"number": number})


def expire_tombstones(older_than: timedelta = TOMBSTONE_AGE) -> int:
    """Remove the rows of files deleted long ago that every node of ``TRIBRICK["NODES"]`` knows of.

    Their changes stay in the ledger, so the names stay dead. Without a list of nodes none expires.
    """
    wanted = {str(node) for node in setting("NODES")}
    using = database()
    known = dict(Node.objects.using(using).filter(name__in=wanted).values_list("name", "number"))
    if not wanted or set(known) != wanted:
        return 0
    unconfirmed = Change.objects.filter(name=OuterRef("name")).filter(
        Q(number__isnull=True) | Q(number__gt=min(known.values()))
    )
    undelivered = Outbox.objects.filter(name=OuterRef("name"), done__isnull=True)
    with _atomic():
        rows = MediaFile.objects.using(using).filter(
            ~Exists(unconfirmed),
            ~Exists(undelivered),
            state=State.PURGED,
            spooled=False,
            deleted__lt=timezone.now() - older_than,
        )
        media = set(rows.exclude(logical=None).values_list("logical_id", flat=True))
        count = _remove(rows)
        Media.objects.using(using).filter(pk__in=media, versions=None).delete()
    return count


def _remove(rows: QuerySet[MediaFile]) -> int:
    """Remove rows, but those that rows of the site's own hold on to (``on_delete=PROTECT``)."""
    try:
        with _atomic():
            return int(rows.delete()[1].get(MediaFile._meta.label, 0))
    except (ProtectedError, RestrictedError):
        log.debug("tombstones that rows of the site's own refer to are passed over")
    count = 0
    # One by one costs more, so only some of them a pass, whichever.
    for row in rows.order_by("?")[:100]:
        try:
            with _atomic():
                row.delete()
        except (ProtectedError, RestrictedError):
            log.debug("the tombstone of %s stays: the site's own rows refer to it", row.name)
        else:
            count += 1
    return count


# Versions


def versions(file: MediaFile) -> list[MediaFile]:
    """Return all versions of the logical file that *file* belongs to, the newest first."""
    rows = MediaFile.objects.using(database())
    fresh = rows.get(pk=file.pk)
    if fresh.logical_id is None:
        return [fresh]
    return list(rows.filter(logical_id=fresh.logical_id).order_by("-version"))


def current(file: MediaFile) -> MediaFile | None:
    """Return the current version of the logical file of *file*; None when all are deleted."""
    fresh = MediaFile.objects.using(database()).select_related("logical__current").get(pk=file.pk)
    if fresh.logical is None:
        return fresh if fresh.state == State.STORED else None
    return fresh.logical.current


def restore(file: MediaFile) -> None:
    """Make an older version the current one again. No bytes are moved. May be repeated."""
    with _atomic():
        locked, media = _locked(file.pk)
        if locked.state != State.STORED:
            raise FileIsDeleted(f"{locked.name} was deleted")
        if media is not None and media.current_id != locked.pk:
            media.current = locked
            media.save(update_fields=["current"])
            _change(locked, Kind.CURRENT)


def expirable(*, keep: int = 0, older_than: timedelta = timedelta(0)) -> Iterator[MediaFile]:
    """Yield the old versions that may go: not current, not among the *keep* newest of the others.

    *older_than* is the least age of a version.
    """
    if keep < 0:
        raise ValueError("keep must not be negative")
    rows = (
        MediaFile.objects.using(database())
        .filter(state=State.STORED, logical__isnull=False)
        .exclude(pk=F("logical__current_id"))
        .order_by("logical_id", "-version")
    )
    limit = timezone.now() - older_than
    logical, kept = None, 0
    for file in rows.iterator():
        if file.logical_id != logical:
            logical, kept = file.logical_id, 0
        if kept < keep:
            kept += 1
        elif file.created <= limit:
            yield file


def expire(*, keep: int = 0, older_than: timedelta = timedelta(0)) -> list[str]:
    """Delete what :func:`expirable` yields; return the names."""
    return [name for file in list(expirable(keep=keep, older_than=older_than)) if (name := _expire_one(file))]


def _expire_one(file: MediaFile) -> str | None:
    with _atomic():
        locked, media = _locked(file.pk)
        if media is None or media.current_id == locked.pk:  # restored in the meantime
            return None
        delete(locked)
    return locked.name
