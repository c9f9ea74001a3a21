"""What all storages have in common that keep the catalog: a row a file, a tombstone a delete."""

from __future__ import annotations

import contextlib
import logging
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from django.apps import apps
from django.conf import settings
from django.core.files import File
from django.core.files.storage import storages
from django.db import DataError, IntegrityError, connections, transaction

if TYPE_CHECKING:
    from tribrick.models import MediaFile
    from tribrick.storage.volume import StoredFile

log = logging.getLogger("tribrick.storage")


def in_storages() -> Iterator[tuple[str, Any]]:
    """Yield the keys in ``STORAGES`` with their storages, without those that cannot be made."""
    for alias in settings.STORAGES:
        try:
            storage: Any = storages[alias]
        except Exception:  # noqa: BLE001, S112  another storage's trouble is not ours
            continue
        yield str(alias), storage


def place_of(storage: Any) -> str | None:
    """Return what a storage's names are relative to: its directory, or its media hosts; None if it has neither."""
    if (location := getattr(storage, "location", None)) is not None:
        return str(os.path.abspath(location))
    hosts = getattr(storage, "hosts", None)
    return None if hosts is None else " ".join([*sorted(hosts), str(storage.base_url)])


def elsewhere(storage: Any) -> list[str]:
    """Return the keys in ``STORAGES`` under which a name means another file than in *storage*.

    Two storages with the same directory have the same files, under whatever addresses.
    """
    mine = place_of(storage)
    others = [(alias, other) for alias, other in in_storages() if other is not storage]
    return [alias for alias, other in others if mine is None or place_of(other) != mine]


def below(storage: Any) -> list[str]:
    """Return the directories of other storages below that of *storage*, relative to it: what is not its own."""
    mine = place_of(storage)
    found = {place for _alias, other in in_storages() if (place := place_of(other)) is not None and place != mine}
    if mine is None:
        return []
    return sorted(os.path.relpath(place, mine) for place in found if place.startswith(mine.rstrip(os.sep) + os.sep))


class Commit:
    """Watches a transaction: whether an exception leaves it open if its rows were committed."""

    unknown = False

    @contextlib.contextmanager
    def watched(self) -> Iterator[None]:
        """Run the body in a transaction, or in a part of the caller's."""
        from tribrick.catalog import database

        inside = connections[database()].in_atomic_block
        committing, committed = False, list[bool]()
        try:
            with transaction.atomic(using=database()):
                if not inside:  # the first hook, so that those of the site cannot keep it from being called
                    transaction.on_commit(lambda: committed.append(True), using=database())
                yield
                committing = not inside
        except BaseException as error:
            # What the database refuses at COMMIT was certainly not committed; what fails in a hook after it was.
            self.unknown = bool(committed) or (committing and not isinstance(error, (IntegrityError, DataError)))
            raise


class Catalogued:
    """A storage whose files have rows. Mixed into a Django storage.

    It needs the app ``tribrick`` and a key in ``STORAGES``, by which the catalog finds the storage
    again. Without them files are stored and deleted as ever, and nobody keeps a row.
    """

    catalogued = True
    _constructor_args: Any  # written by deconstructible

    @property
    def alias(self) -> str | None:
        """The key in ``STORAGES`` of this storage, of one made with the same arguments, or with the same directory."""
        like: str | None = None
        near: str | None = None
        # Those with media hosts differ in more than the directory.
        mine = None if hasattr(type(self), "hosts") else place_of(self)
        for alias, other in in_storages():
            if other is self:
                return alias
            if like is None and type(other) is type(self) and other._constructor_args == self._constructor_args:
                like = alias
            if near is None and mine is not None and type(other) is type(self) and place_of(other) == mine:
                near = alias
        return like or near

    @property
    def has_catalog(self) -> bool:
        """Whether files get rows: the app is installed and knows this storage."""
        return self.catalogued and apps.is_installed("tribrick") and self.alias is not None

    def _canonical(self, name: str) -> str:
        """Return the one name under which the catalog knows the file that *name* leads to."""
        return name

    def _row(self, name: str, *, strict: bool = False) -> MediaFile | None:
        """Return the catalog's row of *name*, whatever its state; None if there is none.

        When the catalog does not answer: None, or with *strict* its exception.
        """
        if not self.has_catalog:
            return None
        from django.db import Error

        from tribrick.catalog import database
        from tribrick.models import MediaFile

        try:
            rows = MediaFile.objects.using(database()).filter(name=name)
            return rows.exclude(storage__in=elsewhere(self)).first()
        except Error as error:
            if strict:
                raise
            log.warning("the catalog did not answer: %s", error)
            return None

    def _record(self, stored: StoredFile, content: File[Any]) -> None:
        """Write the catalog's row of a file that came by ``save``; ``tribrick.catalog.add`` writes its own."""
        from tribrick import catalog, names

        original = names.display_name(names.basename(str(getattr(content, "name", None) or stored.name)))
        kind = names.content_type(str(getattr(content, "content_type", None) or ""))
        alias = self.alias or "default"
        catalog.record(stored, original=original, content_type=kind, storage=alias)
        catalog.note_stored(alias, stored.name)

    def delete(self, name: str) -> None:
        """Delete a file; one that is gone already is no error.

        A file that the catalog knows gets its tombstone in the caller's transaction, and its bytes
        go after the commit. Any other goes at once.
        """
        if not name:
            raise ValueError("The name must be given to delete().")
        name = self._canonical(name)
        row = self._row(name, strict=True)
        if row is not None and row.state == "stored":
            self._bury(row)
        else:
            self._delete_bytes(name, catalogued=row is not None)

    def discard(self, name: str) -> None:
        """Remove the bytes of a save that has failed. The catalog is not asked: it may be the reason."""
        self._delete_bytes(name, catalogued=False)

    def _bury(self, row: MediaFile) -> None:
        from tribrick import catalog

        catalog.delete(row)

    def _delete_bytes(self, name: str, *, catalogued: bool) -> None:
        raise NotImplementedError
