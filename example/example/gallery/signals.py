"""Following the catalog, whoever changes it: a page, the API, the admin, ``tribrick versions``.

The catalog saves its rows one by one, so Django's own signals tell of each change, in its transaction.
"""

from __future__ import annotations

from typing import Any

from django.db.models.signals import post_save, pre_delete
from django.dispatch import receiver

from example.gallery.models import Picture, Version
from tribrick import catalog
from tribrick.models import Media, MediaFile, State


@receiver(post_save, sender=Media)
def follow_current(instance: Media, **_: Any) -> None:
    """Let the picture show the current version. A new one is not a version yet: its maker sets it."""
    current = Version.objects.filter(pk=instance.current_id).first()
    if current is not None or instance.current_id is None:
        Picture.objects.filter(versions__file__logical=instance).update(current=current)


@receiver(post_save, sender=MediaFile)
def follow_delete(instance: MediaFile, **_: Any) -> None:
    """Show a deleted file no more, and delete its thumbnail with it."""
    if instance.state == State.STORED:
        return
    Picture.objects.filter(current=instance.pk).update(current=None)
    for thumbnail in MediaFile.objects.filter(pk__in=Version.objects.filter(pk=instance.pk).values("thumbnail")):
        catalog.delete(thumbnail)


@receiver(pre_delete, sender=Version)
def delete_file(instance: Version, **_: Any) -> None:
    """Delete the file of a version that goes, as all of an account's do with the account."""
    if not instance.deleted:
        catalog.delete(instance.file)
