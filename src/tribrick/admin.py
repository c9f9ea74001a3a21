"""The catalog in Django's admin: to look at, to go back to a version, to delete. Nothing is edited.

What is not asked: the storage. A page costs queries only; the browser fetches the previews.
"""

from __future__ import annotations

from typing import Any

from django.contrib import admin, messages
from django.contrib.auth import get_user_model
from django.core.exceptions import ImproperlyConfigured
from django.db.models import QuerySet
from django.http import HttpRequest
from django.template.defaultfilters import date, filesizeformat
from django.urls import reverse
from django.utils.html import format_html, format_html_join

from tribrick import catalog
from tribrick.models import Change, MediaFile, Node, Outbox, State

# What a browser shows as a picture; SVG in an <img> runs no script.
PICTURES = frozenset({"image/avif", "image/bmp", "image/gif", "image/jpeg", "image/png", "image/svg+xml", "image/webp"})


def _address(file: MediaFile) -> str:
    """Return the address of a file; "" when its storage has none, or is in STORAGES no longer."""
    try:
        return file.url
    except (ImproperlyConfigured, ValueError):
        return ""


class _ReadOnly(admin.ModelAdmin):  # type: ignore[type-arg]
    show_full_result_count = False

    def has_add_permission(self, request: HttpRequest) -> bool:  # noqa: ARG002
        return False

    def has_change_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return False

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:  # noqa: ARG002
        return False


@admin.register(MediaFile)
class MediaFileAdmin(_ReadOnly):
    """Stored files with preview and version history."""

    class Media:
        """What the pages need besides Django's own."""

        css = {"all": ("tribrick/admin.css",)}

    list_display = ("preview", "original", "name", "bytes", "owner", "version", "state", "created")
    list_display_links = ("original", "name")
    list_filter = ("state", "spooled", "storage", "created")
    list_select_related = ("owner",)
    ordering = ("-id",)
    fields = (
        "large_preview", "original", "name", "storage", "bytes", "size", "sha256", "content_type", "owner", "node",
        "created", "state", "spooled", "deleted", "history",
    )  # fmt: skip
    readonly_fields = ("large_preview", "bytes", "history")
    actions = ("restore",)
    search_help_text = "Stored or original name, SHA-256, owner"

    def get_search_fields(self, request: HttpRequest) -> tuple[str, ...]:  # noqa: ARG002
        return ("name", "original", "=sha256", f"=owner__{get_user_model().USERNAME_FIELD}")

    def has_delete_permission(self, request: HttpRequest, obj: Any = None) -> bool:
        return admin.ModelAdmin.has_delete_permission(self, request, obj)

    def has_restore_permission(self, request: HttpRequest) -> bool:
        """Whether the account may change stored files."""
        return admin.ModelAdmin.has_change_permission(self, request)

    def delete_model(self, request: HttpRequest, obj: MediaFile) -> None:  # noqa: ARG002
        """Write a tombstone; the row stays as one."""
        catalog.delete(obj)

    def delete_queryset(self, request: HttpRequest, queryset: QuerySet[MediaFile]) -> None:  # noqa: ARG002
        """The same for each; those that are deleted already stay so."""
        for file in queryset.order_by("pk"):
            catalog.delete(file)

    @admin.action(description="Make the selected versions the current ones", permissions=["restore"])
    def restore(self, request: HttpRequest, queryset: QuerySet[MediaFile]) -> None:
        """Go back to older versions."""
        done = 0
        for file in queryset.order_by("pk"):
            try:
                catalog.restore(file)
            except catalog.FileIsDeleted as error:
                self.message_user(request, str(error), messages.ERROR)
            else:
                done += 1
        if done:
            self.message_user(request, f"{done} made current.", messages.SUCCESS)

    @admin.display(description="")
    def preview(self, file: MediaFile) -> str:
        """Return a small picture."""
        return self._picture(file, "small")

    @admin.display(description="preview")
    def large_preview(self, file: MediaFile) -> str:
        """Return a larger picture with a link to the file."""
        if file.state != State.STORED or not (url := _address(file)):
            return "-"
        picture = self._picture(file, "large")
        return format_html('<a href="{}">{}</a>', url, picture or "open the file")

    @staticmethod
    def _picture(file: MediaFile, size: str) -> str:
        if file.state != State.STORED or file.content_type not in PICTURES or not (url := _address(file)):
            return ""
        return format_html('<img src="{}" alt="" loading="lazy" class="tribrick-{}">', url, size)

    @admin.display(description="size", ordering="size")
    def bytes(self, file: MediaFile) -> str:
        """Return the size for people."""
        return str(filesizeformat(file.size))

    @admin.display(description="versions")
    def history(self, file: MediaFile) -> str:
        """Return all versions, the newest first, the current one in bold."""
        shown = catalog.current(file)
        rows = format_html_join(
            "",
            '<tr><td>{}</td><td><a href="{}">{}</a></td><td>{}</td><td>{}</td><td>{}</td></tr>',
            (
                (
                    one.version,
                    reverse(f"{self.admin_site.name}:tribrick_mediafile_change", args=[one.pk]),
                    format_html("<strong>{}</strong>" if one == shown else "{}", one.original or one.name),
                    filesizeformat(one.size),
                    "current" if one == shown else one.state,
                    date(one.created, "DATETIME_FORMAT"),
                )
                for one in catalog.versions(file)
            ),
        )
        return format_html("<table>{}</table>", rows)


@admin.register(Change)
class ChangeAdmin(_ReadOnly):
    """The ledger."""

    list_display = ("number", "kind", "name", "size", "at")
    list_filter = ("kind",)
    search_fields = ("name", "=sha256")
    ordering = ("-number",)


@admin.register(Outbox)
class OutboxAdmin(_ReadOnly):
    """Deliveries to media hosts."""

    list_display = ("id", "operation", "name", "host", "created", "attempts", "last_error", "done")
    list_filter = (("done", admin.EmptyFieldListFilter), "operation", "host")
    search_fields = ("name", "host")
    ordering = ("-id",)


@admin.register(Node)
class NodeAdmin(_ReadOnly):
    """How far the ledgers of the nodes are."""

    list_display = ("name", "number", "seen")
