"""The catalog: what is stored, what was deleted, and in which order that happened.

Rows are written by :mod:`tribrick.catalog` only, so that each change of a file has its entry in
:class:`Change`.
"""

from __future__ import annotations

from datetime import datetime
from typing import Any

from django.conf import settings
from django.core.files.storage import storages
from django.db import models
from django.utils import timezone


class Media(models.Model):
    """A logical file, made when a stored file is replaced for the first time.

    *current* is the version to show; it is empty when every version is deleted.
    """

    created: models.DateTimeField[datetime, datetime] = models.DateTimeField(default=timezone.now)
    versions: Any  # the manager of the related files
    current_id: int | None
    current: models.ForeignKey[MediaFile | None, MediaFile | None] = models.ForeignKey(
        "MediaFile", models.SET_NULL, null=True, blank=True, related_name="+"
    )

    class Meta:
        verbose_name = "logical file"

    def __str__(self) -> str:
        return f"file {self.pk}"


class State(models.TextChoices):
    """The states of a stored file; it goes through them in this order and never back."""

    STORED = "stored"
    DELETED = "deleted", "deleted, bytes may still be there"
    PURGED = "purged", "deleted, bytes removed"


class MediaFile(models.Model):
    """One stored file. Bytes never change under a name.

    In the states ``deleted`` and ``purged`` the row is a tombstone: the name is never alive again.
    """

    name: models.CharField[str, str] = models.CharField(max_length=255, unique=True)
    storage: models.CharField[str, str] = models.CharField(
        max_length=64, default="default", help_text="The key in STORAGES."
    )
    original: models.CharField[str, str] = models.CharField("original name", max_length=1024, blank=True)
    sha256: models.CharField[str, str] = models.CharField("SHA-256", max_length=64)
    size: models.BigIntegerField[int, int] = models.BigIntegerField()
    content_type: models.CharField[str, str] = models.CharField(max_length=100, blank=True)
    owner: models.ForeignKey[Any, Any] = models.ForeignKey(
        settings.AUTH_USER_MODEL, models.SET_NULL, null=True, blank=True, related_name="+"
    )
    node: models.CharField[str, str] = models.CharField("origin node", max_length=253, blank=True)
    created: models.DateTimeField[datetime, datetime] = models.DateTimeField(default=timezone.now)
    state: models.CharField[str, str] = models.CharField(max_length=7, choices=State.choices, default=State.STORED)
    deleted: models.DateTimeField[datetime | None, datetime | None] = models.DateTimeField(null=True, blank=True)
    logical: models.ForeignKey[Media | None, Media | None] = models.ForeignKey(
        Media, models.PROTECT, null=True, blank=True, related_name="versions"
    )
    logical_id: int | None
    owner_id: Any
    version: models.PositiveIntegerField[int, int] = models.PositiveIntegerField(default=1)
    spooled: models.BooleanField[bool, bool] = models.BooleanField(
        default=False, help_text="The bytes are in the spools of some nodes, and not yet known to be on the volume."
    )

    class Meta:
        verbose_name = "stored file"
        constraints = [
            models.UniqueConstraint(fields=["logical", "version"], name="tribrick_version"),
        ]
        indexes = [
            models.Index(fields=["owner", "-id"], name="tribrick_owner", condition=models.Q(state="stored")),
            models.Index(fields=["id"], name="tribrick_unpurged", condition=models.Q(state="deleted")),
            models.Index(fields=["deleted"], name="tribrick_tombstones", condition=models.Q(state="purged")),
            models.Index(fields=["id"], name="tribrick_spooled", condition=models.Q(spooled=True)),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def url(self) -> str:
        """The address of the bytes, as the storage gives it."""
        return str(storages[self.storage].url(self.name))


class Kind(models.TextChoices):
    """What a change did. ``current`` says that an older version is shown again."""

    ADDED = "added"
    DELETED = "deleted"
    PURGED = "purged"
    CURRENT = "current"


class Change(models.Model):
    """One entry of the ledger.

    *number* is given when the transaction commits (see migration 0002), so the numbers are in the
    order of commits: who has seen a number has been able to see every smaller one. Rows are never
    changed or removed; they outlive the tombstone of a name. *details* is what a lost catalog row
    is made of again.
    """

    number: models.BigIntegerField[int | None, int | None] = models.BigIntegerField(
        null=True, unique=True, editable=False
    )
    kind: models.CharField[str, str] = models.CharField(max_length=7, choices=Kind.choices)
    name: models.CharField[str, str] = models.CharField(max_length=255, db_index=True)
    sha256: models.CharField[str, str] = models.CharField(max_length=64)
    size: models.BigIntegerField[int, int] = models.BigIntegerField()
    at: models.DateTimeField[datetime, datetime] = models.DateTimeField(default=timezone.now)
    details: models.JSONField[Any, Any] = models.JSONField(default=dict, blank=True)

    def __str__(self) -> str:
        return f"{self.number}: {self.kind} {self.name}"


class Counter(models.Model):
    """The last number given, on databases other than PostgreSQL (which has a sequence for it)."""

    value: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)

    def __str__(self) -> str:
        return str(self.value)


class Node(models.Model):
    """How far the ledger of one node is. A tombstone expires only after all of them have it."""

    name: models.CharField[str, str] = models.CharField(max_length=253, unique=True)
    number: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)
    seen: models.DateTimeField[datetime, datetime] = models.DateTimeField(default=timezone.now)

    def __str__(self) -> str:
        return f"{self.name} at {self.number}"


class Operation(models.TextChoices):
    """What is to be done on a host. ``intent``: a save has begun; see :mod:`tribrick.outbox`."""

    PUT = "put"
    DELETE = "delete"
    INTENT = "intent"


class Outbox(models.Model):
    """Work for one host, written in the transaction it belongs to; done in order of id per host and name.

    *storage* is the key in ``STORAGES``; rows of older releases have none. The host ``local:NODE`` is the
    local directory of a node.
    """

    name: models.CharField[str, str] = models.CharField(max_length=255, db_index=True)
    operation: models.CharField[str, str] = models.CharField(max_length=6, choices=Operation.choices)
    host: models.CharField[str, str] = models.CharField(max_length=255)
    storage: models.CharField[str, str] = models.CharField(max_length=64, default="", blank=True)
    sha256: models.CharField[str, str] = models.CharField(max_length=64, blank=True)
    size: models.BigIntegerField[int, int] = models.BigIntegerField(default=0)
    created: models.DateTimeField[datetime, datetime] = models.DateTimeField(default=timezone.now)
    attempts: models.PositiveIntegerField[int, int] = models.PositiveIntegerField(default=0)
    not_before: models.DateTimeField[datetime, datetime] = models.DateTimeField(default=timezone.now)
    last_error: models.TextField[str, str] = models.TextField(blank=True)
    done: models.DateTimeField[datetime | None, datetime | None] = models.DateTimeField(null=True, blank=True)

    class Meta:
        verbose_name = "delivery"
        verbose_name_plural = "outbox"
        indexes = [
            models.Index(fields=["host", "id"], name="tribrick_pending", condition=models.Q(done__isnull=True)),
            models.Index(fields=["host", "name", "id"], name="tribrick_order"),
            models.Index(fields=["not_before"], name="tribrick_intents", condition=models.Q(operation="intent")),
        ]

    def __str__(self) -> str:
        return f"{self.operation} {self.name} on {self.host}"
