"""Pictures, their versions, tokens, and keys of repeated requests. The files are the catalog's."""

from __future__ import annotations

import hashlib
import secrets

from django.conf import settings
from django.db import models
from django.db.models import Q
from django.urls import reverse

from tribrick.models import MediaFile, State


class Picture(models.Model):
    """What a visitor sees: a logical file. Its bytes are those of the current version.

    Which version that is, the catalog decides; :mod:`example.gallery.signals` follows it.
    """

    owner = models.ForeignKey(settings.AUTH_USER_MODEL, models.CASCADE, related_name="pictures")
    private = models.BooleanField(default=False)
    created = models.DateTimeField(auto_now_add=True)
    current = models.OneToOneField("Version", models.SET_NULL, null=True, blank=True, related_name="+")

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


class Version(models.Model):
    """What the gallery knows of one stored file; the catalog's row knows the rest.

    The thumbnail is a stored file as any other: so it is on every node with every storage, private
    where its picture is, and cached for ever, since its name is never used again.
    """

    file = models.OneToOneField(MediaFile, models.CASCADE, primary_key=True, related_name="gallery")
    picture = models.ForeignKey(Picture, models.CASCADE, related_name="versions")
    thumbnail = models.ForeignKey(MediaFile, models.SET_NULL, null=True, blank=True, related_name="+")
    width = models.PositiveIntegerField(null=True, blank=True)
    height = models.PositiveIntegerField(null=True, blank=True)

    def __str__(self) -> str:
        return self.file.name

    @property
    def deleted(self) -> bool:
        """Whether the file is a tombstone."""
        return self.file.state != State.STORED

    @property
    def private(self) -> bool:
        """Whether only the owner may see it."""
        return self.file.name.startswith("private/")

    @property
    def url(self) -> str:
        """Return the address of the bytes."""
        return self._url(self.file)

    @property
    def thumbnail_url(self) -> str:
        """Return the address of the thumbnail, empty if there is none."""
        return self._url(self.thumbnail) if self.thumbnail else ""

    def _url(self, file: MediaFile) -> str:
        if self.private:
            return reverse("private-file", args=[file.name.removeprefix("private/")])
        return file.url

    @property
    def kind(self) -> str:
        """Return what stands on the placeholder, e.g. ``PDF``."""
        extension = self.file.name.rpartition("/")[2].partition(".")[2]
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
    version = models.ForeignKey(Version, models.CASCADE, null=True, related_name="+")
    created = models.DateTimeField(auto_now_add=True)

    class Meta:
        constraints = [models.UniqueConstraint(fields=["owner", "key"], name="gallery_request_key")]

    def __str__(self) -> str:
        return self.key
