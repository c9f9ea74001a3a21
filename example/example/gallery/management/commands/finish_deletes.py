"""Remove the bytes of deleted files that a killed process or an absent volume left behind."""

from __future__ import annotations

from typing import Any

from django.core.management.base import BaseCommand, CommandError

from example.gallery.models import StoredMedia
from example.gallery.services import remove_bytes
from tribrick.storage import StorageError


class Command(BaseCommand):
    """See the module's text."""

    help = "Remove the bytes of deleted files whose removal was interrupted. May be repeated."

    def handle(self, *_args: Any, **_options: Any) -> None:
        """Go through the tombstones whose bytes may still be there."""
        removed = 0
        rows = StoredMedia.objects.filter(deleted__isnull=False, bytes_removed__isnull=True)
        for media in rows.order_by("id").iterator():
            try:
                remove_bytes(media)
            except StorageError as error:
                raise CommandError(f"{removed} removed, then: {error}") from error
            removed += 1
        self.stdout.write(f"{removed} removed")
