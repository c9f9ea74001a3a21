"""The catalog takes over, step 2 of 3: the gallery's rows become the catalog's, tombstones too.

All in one transaction. Thumbnails get rows as well, for which their bytes are read from the storage;
one that is not there is left out, and an absent volume fails the migration, which may be repeated.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from django.core.files.storage import default_storage
from django.db import migrations

from tribrick.storage import StorageError

log = logging.getLogger("example.gallery")


def _look(name: str) -> tuple[str, int] | None:
    hasher, size = hashlib.sha256(), 0
    try:
        with default_storage.open(name) as file:
            for chunk in file.chunks():
                hasher.update(chunk)
                size += len(chunk)
    except StorageError:
        raise
    except OSError as error:
        log.warning("the thumbnail %s is left out: %s", name, error)
        return None
    return hasher.hexdigest(), size


class _Carrier:
    def __init__(self, apps: Any) -> None:
        for label, model in (
            ("tribrick", "Media"), ("tribrick", "MediaFile"), ("tribrick", "Change"), ("tribrick", "Counter"),
            ("gallery", "Picture"), ("gallery", "StoredMedia"), ("gallery", "Version"), ("gallery", "RequestKey"),
        ):  # fmt: skip
            setattr(self, model, apps.get_model(label, model))
        self.number: int | None = None  # given by PostgreSQL at COMMIT; counted elsewhere

    def change(self, kind: str, file: Any, at: Any, details: dict[str, Any] | None = None) -> None:
        if self.number is not None:
            self.number += 1
        self.Change.objects.create(
            number=self.number,
            kind=kind,
            name=file.name,
            sha256=file.sha256,
            size=file.size,
            at=at,
            details=details or {},
        )

    def file(self, old: Any, replaces: str | None = None, **values: Any) -> Any:
        """Write a catalog row with its changes, as ``tribrick.catalog`` would have."""
        values = {
            "storage": "default",
            "node": old.node,
            "created": old.created,
            "deleted": old.deleted,
            "state": "stored" if old.deleted is None else "deleted" if old.bytes_removed is None else "purged",
            **values,
        }
        file = self.MediaFile.objects.create(**values)
        details = {
            "id": file.pk,
            "storage": file.storage,
            "original": file.original,
            "content_type": file.content_type,
            "owner": None if file.owner_id is None else str(file.owner_id),
            "node": file.node,
            "created": file.created.isoformat(),
            "logical": file.logical_id,
            "version": file.version,
            "replaces": replaces,
        }
        self.change("added", file, file.created, details)
        if old.deleted is not None:
            self.change("deleted", file, old.deleted)
        if old.bytes_removed is not None:
            self.change("purged", file, old.bytes_removed)
        return file

    def version(self, old: Any, logical: Any, replaces: str | None) -> Any:
        file = self.file(
            old,
            replaces,
            name=old.name,
            original=old.original,
            sha256=old.sha256,
            size=old.size,
            content_type=old.content_type,
            owner_id=old.owner_id,
            logical=logical,
            version=old.version,
        )
        thumbnail = None
        if old.thumbnail and old.deleted is None and (seen := _look(old.thumbnail)):
            thumbnail = self.file(
                old,
                name=old.thumbnail,
                original=old.thumbnail.rpartition("/")[2],
                sha256=seen[0],
                size=seen[1],
                content_type="image/jpeg",
            )
        return self.Version.objects.create(
            file=file, picture_id=old.picture_id, thumbnail=thumbnail, width=old.width, height=old.height
        )

    def picture(self, olds: list[Any]) -> None:
        """Carry over a picture with all its versions."""
        picture = self.Picture.objects.get(pk=olds[0].picture_id)
        logical = self.Media.objects.create(created=olds[0].created) if len(olds) > 1 else None
        replaces = None
        for old in sorted(olds, key=lambda old: old.version):
            version = self.version(old, logical, replaces)
            replaces = old.name
            self.RequestKey.objects.filter(old=old.pk).update(version=version)
            if picture.old_id == old.pk:
                picture.current = version
                picture.save()
                if logical is not None:
                    logical.current = version.file
                    logical.save()


def carry_over(apps: Any, schema_editor: Any) -> None:
    """Write the catalog's rows."""
    carrier: Any = _Carrier(apps)
    if schema_editor.connection.vendor != "postgresql":
        last = carrier.Change.objects.order_by("-number").first()
        carrier.number = last.number if last else 0
    olds: list[Any] = []
    for old in carrier.StoredMedia.objects.order_by("picture_id", "version").iterator():
        if olds and olds[0].picture_id != old.picture_id:
            carrier.picture(olds)
            olds = []
        olds.append(old)
    if olds:
        carrier.picture(olds)
    if carrier.number:
        carrier.Counter.objects.update_or_create(pk=1, defaults={"value": carrier.number})
    # Keys of requests that never ended in a file.
    carrier.RequestKey.objects.filter(version=None).delete()


class Migration(migrations.Migration):
    """See the module's text."""

    dependencies = [("gallery", "0002_catalog")]
    operations = [migrations.RunPython(carry_over)]
