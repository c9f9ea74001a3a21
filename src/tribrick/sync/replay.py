"""Tells the catalog what reconciliation has changed on this disk. PostgreSQL is the truth.

In the catalog a name has one content for ever, and a deleted name is never alive again. So:

============================  =========================  ===================================================
the disk shows                the catalog has            what is done
============================  =========================  ===================================================
a file                        nothing                    a row, as ``adopt`` writes it
a file                        the same content           nothing
a file                        another content            the disk's content gets a name of its own and becomes
                                                         a new version in the catalog; the name gets the
                                                         catalog's content back, from the history
a file                        a tombstone, the same      the file goes, as the catalog says
                              content
a file                        a tombstone, another       the same, and the content gets a name of its own
                              content
no file                       a stored file              the catalog's delete
============================  =========================  ===================================================

Each step can be done again, also by another node at the same time: the names depend on the content.
"""

from __future__ import annotations

import mimetypes
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from functools import partial
from typing import Final

from django.db import IntegrityError
from django.utils import timezone as django_timezone

from tribrick import catalog, names
from tribrick.audit import is_own, settled_before
from tribrick.models import Change, Kind, MediaFile, State
from tribrick.storage.volume import StoredFile
from tribrick.sync import versions
from tribrick.sync.plan import too_many
from tribrick.sync.run import Sync
from tribrick.sync.state import State as SyncState
from tribrick.sync.state import SyncError
from tribrick.sync.versions import Version

_PAGE: Final = 500
_TRIES: Final = 100


@dataclass
class Replayed:
    """What the catalog was told."""

    added: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    """Names whose content was changed, with the name that the change got."""
    deleted: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    """Names that were there though the catalog says that they are deleted."""
    failed: dict[str, str] = field(default_factory=dict)


@dataclass(frozen=True)
class _Known:
    """What the catalog has of a name; *contents* are those that it was ever added with."""

    row: MediaFile | None
    dead: bool
    contents: frozenset[str]


class Replay:
    """Tells the catalog, for the storage *alias*."""

    def __init__(self, sync: Sync, alias: str = "default", *, accept: int = 0) -> None:
        self.sync, self.alias, self.accept = sync, alias, accept
        self.done = Replayed()
        self._same: list[Version] = []

    def run(self) -> Replayed:
        """Tell what was not told yet. May be repeated."""
        changed: list[tuple[Version, MediaFile]] = []
        dead: list[tuple[Version, _Known]] = []
        new: list[Version] = []
        gone: list[tuple[Version, MediaFile]] = []
        waiting = self.sync.state.to_replay()
        settled = int(settled_before().timestamp() * 1e9)
        for start in range(0, len(waiting), _PAGE):
            page = waiting[start : start + _PAGE]
            known = self._known([version.name for version in page])
            for version in page:
                there = known[version.name]
                row = there.row
                if row is not None and row.storage != self.alias:
                    self.done.failed[version.name] = f"the catalog has this name in the storage {row.storage}"
                elif version.deleted:
                    if row is not None and row.state == State.STORED:
                        gone.append((version, row))
                    else:
                        self._same.append(version)
                elif there.dead:
                    dead.append((version, there))
                elif row is None:
                    # A file that our own code made gets its row from the save, which may not be over.
                    if not is_own(version.name, self.alias) or max(version.modified, version.at) < settled:
                        new.append(version)
                elif row.sha256 != version.sha256:
                    changed.append((version, row))
                else:
                    self._same.append(version)
        stored = MediaFile.objects.using(catalog.database()).filter(storage=self.alias, state=State.STORED).count()
        if why := too_many(len(gone), stored, self.accept):
            raise SyncError(f"the catalog: {why}")
        for version, row in changed:
            self._try(version, partial(self._version, version, row))
        for version, there in dead:
            self._try(version, partial(self._bury, version, there))
        for number, version in enumerate(new):
            if version.name not in self.done.versions.values():
                self._try(version, partial(self._add, version))
            self.sync.progress("catalog", number + 1, len(new))
        for version, row in gone:
            self._try(version, partial(self._delete, version, row))
        self.sync.state.replayed(self._same)
        return self.done

    def _try(self, version: Version, do: Callable[[], None]) -> None:
        try:
            do()
        except (OSError, ValueError, SyncError) as error:
            self.done.failed[version.name] = str(error)

    def _known(self, wanted: Sequence[str]) -> dict[str, _Known]:
        using = catalog.database()
        rows = {row.name: row for row in MediaFile.objects.using(using).filter(name__in=wanted)}
        dead: set[str] = {name for name, row in rows.items() if row.state != State.STORED}
        contents: dict[str, set[str]] = {}
        changes = Change.objects.using(using).filter(name__in=wanted, kind__in=[Kind.ADDED, Kind.DELETED])
        for name, kind, sha256 in changes.values_list("name", "kind", "sha256"):
            contents.setdefault(name, set()).add(sha256)
            if kind == Kind.DELETED:
                dead.add(name)
        return {
            name: _Known(rows.get(name), name in dead, frozenset(contents.get(name, ())))
            for name in dict.fromkeys(wanted)
        }

    # The cases of the table.

    def _add(self, version: Version, *, replaces: MediaFile | None = None) -> None:
        if len(version.name) > catalog.NAME_LENGTH:
            raise ValueError(f"its name is longer than {catalog.NAME_LENGTH} characters")
        created = datetime.fromtimestamp(version.modified / 1e9, tz=timezone.utc)
        try:
            catalog.record(
                StoredFile(version.name, version.sha256, version.size),
                original=names.display_name(names.basename(version.origin or version.name)),
                content_type=mimetypes.guess_type(version.name)[0] or "",
                node=version.node,
                storage=self.alias,
                created=created
                if django_timezone.is_aware(django_timezone.now())
                else django_timezone.make_naive(created),
                replaces=replaces,
            )
        except IntegrityError:  # another node was faster
            row = MediaFile.objects.using(catalog.database()).filter(name=version.name).first()
            if row is None or (row.sha256, row.storage) != (version.sha256, self.alias):
                raise ValueError("the catalog has another file of this name by now") from None
        self.done.added.append(version.name)
        self._same.append(version)

    def _version(self, version: Version, row: MediaFile) -> None:
        """A catalogued file was changed: its new content becomes a version with a name of its own."""
        old = replace(version, sha256=row.sha256, size=row.size)
        if not self.sync.side.has(row.sha256):
            raise ValueError(
                "it was changed, and the catalog's content is not in the history here; "
                "`tribrick reconcile` can mend it from a copy"
            )
        own = self._own_name(version)
        self._show({own: version})
        if not self._is_stored(own, version):
            self._add(replace(version, name=own, origin=version.name), replaces=row)
        self._show({version.name: old})
        self.done.versions[version.name] = own

    def _bury(self, version: Version, there: _Known) -> None:
        """A name is dead in the catalog: the file goes, and a content that the catalog never had is kept."""
        if version.sha256 not in there.contents:
            own = self._own_name(version)
            self._show({own: version})
            if not self._is_stored(own, version):
                self._add(replace(version, name=own, origin=version.name))
            self.done.versions[version.name] = own
        self._show({version.name: None})
        self.done.dead.append(version.name)

    def _delete(self, version: Version, row: MediaFile) -> None:
        catalog.delete(row)
        self.done.deleted.append(version.name)
        self._same.append(version)

    # Helpers.

    def _own_name(self, version: Version) -> str:
        """Return a name for a content: the same each time, and on every node, unless somebody has used it."""
        for number in range(1, _TRIES):
            name = versions.conflict_name(version, "changed", number)
            there = self._known([name])[name]
            if there.dead or (there.row is not None and there.row.sha256 != version.sha256):
                continue
            heads = self.sync.state.heads(name)
            if all(head.sha256 == version.sha256 for head in heads):
                return name
        raise ValueError("there is no free name for its content")

    def _is_stored(self, name: str, version: Version) -> bool:
        rows = MediaFile.objects.using(catalog.database()).filter(name=name, state=State.STORED, sha256=version.sha256)
        return rows.exists()

    def _show(self, wishes: dict[str, Version | None]) -> None:
        """Write versions of this side and show them on the disk."""

        def wish(state: SyncState) -> None:
            for name, content in wishes.items():
                heads = state.heads(name)
                wanted = "" if content is None else content.sha256
                if [head.sha256 for head in heads] != [wanted]:
                    state.write(name, content, at=time.time_ns())

        applied = self.sync.show(wish)
        for name in wishes:
            if name in applied.failed:
                raise ValueError(applied.failed[name])


def replay(sync: Sync, alias: str = "default", *, accept: int = 0) -> Replayed:
    """Tell the catalog what the disk shows and was not told yet."""
    return Replay(sync, alias, accept=accept).run()
