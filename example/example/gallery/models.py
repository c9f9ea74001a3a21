"""Pictures, the stored files that are their versions, tokens, and keys of repeated requests."""

from __future__ import annotations

import hashlib
import secrets

from django.conf import settings
from django.core.files.storage import default_storage
from django.db import models
from django.db.models import Q
from django.urls import reverse


class Picture(models.Model):
    """A logical file: what a visitor sees. Its bytes are those of the current version."""

    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="pictures")
    private = models.BooleanField(default=False)
    created = models.DateTimeField(auto_now_add=True)
    current = models.OneToOneField("StoredMedia", models.SET_NULL, null=True, blank=True, related_name="+")

    class Meta:
        indexes = [
            # The pages walk these by key, so a page costs the same at any number of pictures.
            models.Index(
                fields=["-id"],
                name="gallery_public",
                condition=Q(private=False, current__isnull=False),
            ),
            models.Index(
                fields=["owner", "-id"],
                name="gallery_private",
                condition=Q(private=True, current__isnull=False),
            ),
        ]

    def __str__(self) -> str:
        return f"picture {self.pk}"

    def get_absolute_url(self) -> str:
        """Return the address of the picture's page."""
        return reverse("picture", args=[self.pk])


class StoredMedia(models.Model):
    """One stored file: a version of a picture. Bytes never change under a name.

    ``deleted`` makes the row a tombstone: it stays, so that the name is never alive again.
    """

    picture = models.ForeignKey(Picture, models.CASCADE, related_name="versions")
    version = models.PositiveIntegerField()
    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="+")
    name = models.CharField(max_length=255, unique=True)
    original = models.CharField(max_length=1024)
    sha256 = models.CharField(max_length=64)
    size = models.BigIntegerField()
    content_type = models.CharField(max_length=100)
    width = models.PositiveIntegerField(null=True, blank=True)
    height = models.PositiveIntegerField(null=True, blank=True)
    thumbnail = models.CharField(max_length=255, blank=True)
    node = models.CharField(max_length=253)
    created = models.DateTimeField(auto_now_add=True)
    deleted = models.DateTimeField(null=True, blank=True)
    bytes_removed = models.DateTimeField(null=True, blank=True)

    class Meta:
        verbose_name_plural = "stored media"
        constraints = [models.UniqueConstraint(fields=["picture", "version"], name="gallery_version")]
        indexes = [
            models.Index(fields=["owner", "-id"], name="gallery_listing", condition=Q(deleted__isnull=True)),
            models.Index(fields=["thumbnail"], name="gallery_thumbnail"),
            models.Index(
                fields=["id"],
                name="gallery_unfinished",
                condition=Q(deleted__isnull=False, bytes_removed__isnull=True),
            ),
        ]

    def __str__(self) -> str:
        return self.name

    @property
    def private(self) -> bool:
        """Whether only the owner may see it."""
        return self.name.startswith("private/")

    @property
    def url(self) -> str:
        """Return the address of the bytes."""
        return self._url(self.name)

    @property
    def thumbnail_url(self) -> str:
        """Return the address of the thumbnail, empty if there is none."""
        return self._url(self.thumbnail) if self.thumbnail else ""

    def _url(self, name: str) -> str:
        if self.private:
            return reverse("private-file", args=[name.removeprefix("private/")])
        return default_storage.url(name)

    @property
    def kind(self) -> str:
        """Return what stands on the placeholder, e.g. ``PDF``."""
        extension = self.name.rpartition("/")[2].partition(".")[2]
        return extension.upper()[:5] or "FILE"


class Token(models.Model):
    """A token for the API. Only its hash is kept."""

    user = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="api_tokens")
    digest = models.CharField(max_length=64, unique=True)
    created = models.DateTimeField(auto_now_add=True)

    def __str__(self) -> str:
        return f"token of {self.user}"

    @staticmethod
    def hash(secret: str) -> str:
        """Return what is kept of a token. It is long and random, so one plain hash is enough."""
        return hashlib.sha256(secret.encode()).hexdigest()

    @staticmethod
    def new_secret() -> str:
        """Return a new random token."""
        return secrets.token_urlsafe(32)


class RequestKey(models.Model):
    """An ``Idempotency-Key``. The row is written in the transaction of the upload it belongs to.

    So it exists exactly when the upload does: a process that is killed leaves none, and a second
    request with the same key waits at the unique constraint until the first has ended.
    """

    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="+")
    key = models.CharField(max_length=255)
    fingerprint = models.CharField(max_length=64)
    media = models.ForeignKey(StoredMedia, models.CASCADE, null=True, related_name="+")
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["owner", "key"], name="gallery_request_key")]

    def __str__(self) -> str:
        return self.key
