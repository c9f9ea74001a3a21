"""The admin shows what is stored; it changes nothing, since files are added and deleted in order."""

from __future__ import annotations

from typing import Any

from django.contrib import admin

from example.gallery.models import StoredMedia


@admin.register(StoredMedia)
class StoredMediaAdmin(admin.ModelAdmin):
    """Read-only list of stored files and tombstones."""

    list_display = ("original", "name", "size", "owner", "node", "created", "deleted")
    search_fields = ("original", "name", "sha256")
    show_full_result_count = False
    list_select_related = ("owner",)

    def has_add_permission(self, *_args: Any) -> bool:
        """Say no."""
        return False

    def has_change_permission(self, *_args: Any) -> bool:
        """Say no."""
        return False

    def has_delete_permission(self, *_args: Any) -> bool:
        """Say no."""
        return False
