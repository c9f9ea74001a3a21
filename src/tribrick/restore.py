"""Bringing files back from a mirror, or a dated snapshot of it, through the storage.

The catalog decides. What it says is stored is brought back where the storage lacks it or has other
bytes. What it does not know is newer than the database and gets a row. What was deleted stays so.
Every file is written as durably as an upload and only if its SHA-256 is the one that is known, and
what is right already is left alone, so a restore may be killed and run again.
"""

from __future__ import annotations

import gzip
import json
import mimetypes
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path
from typing import Any, Final

from django.contrib.auth import get_user_model
from django.core.files import File
from django.db import IntegrityError
from django.db.models import Q

from tribrick import audit, catalog, names
from tribrick.conf import setting
from tribrick.copies import AuditError, PathCopy, Seen
from tribrick.ledger import Known, Ledger
from tribrick.models import MediaFile, State
from tribrick.storage.catalogued import below
from tribrick.storage.volume import StoredFile

MARKER: Final = "marker.json"
MANIFEST: Final = "manifest.gz"


@dataclass
class Restored:
    """What a restore did, or would do. *lacking* and *refused* say why, by name."""

    tree: str
    right: int = 0
    restored: list[str] = field(default_factory=list)
    adopted: list[str] = field(default_factory=list)
    dead: list[str] = field(default_factory=list)
    again: dict[str, str] = field(default_factory=dict)
    """Deleted files that were stored once more: old name, new name; *before*: by an earlier restore."""
    before: dict[str, str] = field(default_factory=dict)
    lacking: dict[str, str] = field(default_factory=dict)
    """Rows whose bytes are neither here nor there, for instance since they are newer than the tree."""
    refused: dict[str, str] = field(default_factory=dict)

    @property
    def complete(self) -> bool:
        """Whether every file that was asked for is there now."""
        return not self.lacking and not self.refused


class Restore:
    """One restore from *tree*, the directory of a snapshot or a mirror's ``current``.

    *under* are files and directories; none of them means everything. *include_deleted* stores deleted
    files once more, under new names, since a name is never alive again.
    """

    def __init__(
        self,
        tree: str | Path,
        *,
        alias: str = "default",
        under: Sequence[str] = (),
        include_deleted: bool = False,
        apply: bool = False,
        progress: audit.Progress = lambda _what, _done, _total: None,
    ) -> None:
        self.tree, self.alias, self.apply, self.progress = Path(tree), alias, apply, progress
        self.include_deleted = include_deleted
        self.under = [name for one in under if (name := one.strip("/"))]
        self.report = Restored(str(tree))
        self.manifest: dict[str, tuple[str, str, int]] | None = None
        files = self.tree
        if (self.tree / MARKER).exists():
            files = self.tree / "files"
            self.manifest = self._read_manifest()
        elif not self.tree.is_dir() or any((self.tree / name).exists() for name in (MANIFEST, "snapshots")):
            raise AuditError(f"{self.tree} is neither a complete snapshot nor a directory of files (current)")
        self.copy = PathCopy("mirror", files, writable=False)
        self.storage = audit.storage_copy(alias)
        self.source = audit.CatalogSource(alias)
        # What other storages keep below the directory comes back with their own keys and their part of the tree.
        self.others = tuple(f"{place}/" for place in below(self.storage.storage))
        self._ledger = self._open_ledger()
        self._details: dict[str, dict[str, Any]] | None = None

    def run(self) -> Restored:
        """Do it, or with ``apply=False`` find out what would be done."""
        met: set[str] = set()
        try:
            for batch in audit.batches(found for found in self.copy.walk() if self._asked(found.name)):
                known = self.source.get(found.name for found in batch)
                for found in batch:
                    met.add(found.name)
                    self._one(found.name, found.size, known.get(found.name))
                self.progress("files", len(met), len(met))
            self._rows_without(met)
        finally:
            if self._ledger is not None:
                self._ledger.close()
        for name in self.under:
            if not any(one == name or one.startswith(f"{name}/") for one in met | set(self.report.lacking)):
                self.report.refused[name] = "there is nothing of this name, neither here nor in the catalog"
        return self.report

    def _asked(self, name: str) -> bool:
        if name.startswith(self.others):
            return False
        return not self.under or any(name == one or name.startswith(f"{one}/") for one in self.under)

    # One file

    def _one(self, name: str, size: int, known: Known | None) -> None:
        try:
            told = self._told(name)
            if known is None and (told is None or told[0] != "dead"):
                self._adopt(name, size, told)
            elif (
                known is not None
                and known.state == State.STORED
                and (self.include_deleted or not self._buried_since(name))
            ):
                self._restore(known)
            elif self.include_deleted:
                self._again(name, known, told)
            else:
                self.report.dead.append(name)
        except (AuditError, OSError, ValueError) as error:
            self.report.refused[name] = str(error)

    def _restore(self, known: Known) -> None:
        """Write a file that the catalog has, unless it is there."""
        if audit.examine(self.storage, known)[0] is None:
            self.report.right += 1
        elif self._right_here(known):
            if self.apply:
                self.storage.put(known, self.copy)
                self._look_again(known)
            self.report.restored.append(known.name)
        else:
            self.report.lacking[known.name] = "the mirror has other bytes than the catalog"

    def _look_again(self, known: Known) -> None:
        """Read what was written; take it away again if it was deleted meanwhile."""
        wrong, _ = audit.examine(self.storage, known)
        now = self.source.get([known.name]).get(known.name)
        if now is not None and now.state != State.STORED:
            self.storage.remove(now)
            raise AuditError("was deleted meanwhile")
        if wrong is not None:
            raise AuditError(f"was written and reads back {wrong.kind}")

    def _adopt(self, name: str, size: int, told: tuple[str, str, int] | None) -> None:
        """Give a row to a file that the database does not know, because it is newer, or foreign."""
        if len(name) > catalog.NAME_LENGTH:
            raise AuditError(f"its name is longer than {catalog.NAME_LENGTH} characters")
        if MediaFile.objects.using(catalog.database()).filter(name=name).exists():
            raise AuditError("the catalog has a file of this name, in another storage")
        seen = self._seen(self.copy, name)
        if told is not None and (seen.sha256, seen.size) != told[1:]:
            raise AuditError("the mirror has other bytes than were written down for it")
        file = Known(name, State.STORED, self.alias, seen.sha256, size)
        there = self.storage.exists(name)
        if there and audit.examine(self.storage, file)[0] is not None:
            raise AuditError("the storage has another file of this name, which the catalog does not know")
        if self.apply:
            if not there:
                self.storage.put(file, self.copy)
            try:
                self._record(file)
            except (ValueError, IntegrityError) as error:
                raise AuditError(f"got no row: {error}") from error
        self.report.adopted.append(name)

    def _record(self, file: Known) -> None:
        details = self._added(file.name)
        created = datetime.fromisoformat(details["created"]) if details.get("created") else None
        owners = get_user_model()._default_manager
        owner = owners.filter(pk=details["owner"]).first() if details.get("owner") else None
        catalog.record(
            StoredFile(file.name, file.sha256, file.size),
            original=details.get("original") or names.display_name(names.basename(file.name)),
            content_type=details.get("content_type") or mimetypes.guess_type(file.name)[0] or "",
            storage=self.alias,
            owner=owner,
            created=created,
            node=details.get("node"),
        )

    def _again(self, name: str, known: Known | None, told: tuple[str, str, int] | None) -> None:
        """Store a deleted file under a new name, once."""
        seen = self._seen(self.copy, name)
        wanted = (known.sha256, known.size) if known is not None else told[1:] if told is not None else None
        if (seen.sha256, seen.size) != wanted:
            raise AuditError("the mirror has other bytes than were known of it")
        details = self._added(name)
        original = details.get("original") or names.display_name(names.basename(name))
        alive = MediaFile.objects.using(catalog.database()).filter(state=State.STORED, sha256=seen.sha256)
        if (there := alive.filter(original=original).first()) is not None:
            self.report.before[name] = there.name
            return
        if not self.apply:
            self.report.again[name] = ""
            return
        owners = get_user_model()._default_manager
        with (self.copy.root / name).open("rb") as content:
            row = catalog.add(
                File(content, name),
                name,
                original=original,
                content_type=details.get("content_type", ""),
                owner=owners.filter(pk=details["owner"]).first() if details.get("owner") else None,
                storage=self.alias,
            )
        if row.sha256 != seen.sha256:
            catalog.delete(row)
            raise AuditError("the mirror changed while it was read")
        self.report.again[name] = row.name

    def _rows_without(self, met: set[str]) -> None:
        """List rows that the tree does not have and whose bytes are not in the storage either."""
        rows = MediaFile.objects.using(catalog.database()).filter(storage=self.alias, state=State.STORED)
        if self.under:
            asked = Q()
            for one in self.under:
                asked |= Q(name=one) | Q(name__startswith=f"{one}/")
            rows = rows.filter(asked)
        after = ""
        while page := list(rows.filter(name__gt=after).order_by("name")[: audit.PAGE]):
            after = page[-1].name
            for row in page:
                if row.name in met:
                    continue
                known = Known(row.name, State.STORED, self.alias, row.sha256, row.size)
                if audit.examine(self.storage, known)[0] is None:
                    self.report.right += 1
                    met.add(row.name)
                elif self.source.get([row.name]).get(row.name) == known:  # not deleted meanwhile
                    self.report.lacking[row.name] = "the mirror does not have it"

    # What is known besides the catalog

    def _told(self, name: str) -> tuple[str, str, int] | None:
        """Return what manifest and ledger say: ``stored`` or ``dead``, SHA-256 and size; None for nothing."""
        noted = self.manifest.get(name) if self.manifest is not None else None
        known = self._ledger.get(name) if self._ledger is not None else None
        if known is not None and (known.storage == self.alias or known.storage not in self.source.elsewhere):
            return ("stored" if known.state == State.STORED else "dead", known.sha256, known.size)
        return noted

    def _buried_since(self, name: str) -> bool:
        """Whether the ledger has a tombstone that the catalog has lost, as a database restored from a dump has."""
        known = self._ledger.get(name) if self._ledger is not None else None
        return known is not None and known.state != State.STORED and known.storage not in self.source.elsewhere

    def _added(self, name: str) -> dict[str, Any]:
        """Return what the ledger keeps of the time when a file was added; nothing without one."""
        if self._details is None:
            changes: Iterable[Any] = self._ledger.changes() if self._ledger is not None else ()
            self._details = {one.name: json.loads(one.details) for one in changes if one.kind == "added"}
        return self._details.get(name, {})

    @staticmethod
    def _open_ledger() -> Ledger | None:
        path = setting("LEDGER")
        return Ledger(path) if path and Path(path).exists() else None

    def _read_manifest(self) -> dict[str, tuple[str, str, int]]:
        found = {}
        with gzip.open(self.tree / MANIFEST, "rt", encoding="utf-8") as file:
            for line in file:
                one = json.loads(line)
                state = "stored" if one["state"] in (State.STORED, "foreign") else "dead"
                found[one["name"]] = (state, one["sha256"], one["size"])
        return found

    def _right_here(self, known: Known) -> bool:
        seen = self._seen(self.copy, known.name)
        return (seen.sha256, seen.size) == (known.sha256, known.size)

    @staticmethod
    def _seen(copy: PathCopy, name: str) -> Seen:
        (seen,) = copy.look([Known(name, State.STORED, "", "", 0)])
        if isinstance(seen, OSError):
            raise seen
        return seen
