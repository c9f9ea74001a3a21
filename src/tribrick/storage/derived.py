"""The storage for files that can be made again: thumbnails, renditions."""

from __future__ import annotations

import io
import os
import unicodedata
from functools import cached_property
from typing import Any

from django.conf import settings
from django.core.exceptions import ImproperlyConfigured, SuspiciousFileOperation
from django.core.files import File
from django.core.files.storage import Storage
from django.utils.deconstruct import deconstructible

from tribrick.storage.guard import Call
from tribrick.storage.mount import Mount, go_on
from tribrick.storage.saving import Saving
from tribrick.storage.volume import VolumeStorage


class Replacing(Saving):
    """Write beside the name and rename over it. Readers see the old file or the new one, whole.

    No fsync: after a power cut of all nodes the file may be gone or empty.
    """

    def flush(self) -> None:
        """Do nothing: nothing is promised."""

    def finish(self, call: Call[Any]) -> None:
        """Give the file its name, unless nobody waits for that."""
        self.close()
        go_on(call)
        os.rename(self.path, self.relative, src_dir_fd=self.root, dst_dir_fd=self.root)


@deconstructible(path="tribrick.storage.DerivedStorage")
class DerivedStorage(VolumeStorage):
    """Files that can be made again from others, under exact names, replaced when saved again.

    They lie on the same volume as the originals, by default in ``derived/`` of ``MEDIA_ROOT``, with
    the same checks and deadlines. They are **outside the promises**: not durable, not in the
    catalog, not immutable, so an edge must not cache them for ever.

    A name is used as it is given. What is no plain name (``..``, a part that begins with a dot,
    control characters) is refused and not mended, since two names must never become one.

    With *unique_names* each save gets a new name, as in ``VolumeStorage``. Wagtail needs that: it
    makes a rendition again and then deletes the old one, which must not have the same name. The
    library must keep the name that ``save`` returned.

    *root* is the directory with the sentinel: ``MEDIA_ROOT`` if the location lies in it, else the
    location.
    """

    catalogued = False
    spools = False

    def __init__(
        self,
        location: str | os.PathLike[str] | None = None,
        base_url: str | None = None,
        file_permissions_mode: int | None = None,
        directory_permissions_mode: int | None = None,
        *,
        root: str | os.PathLike[str] | None = None,
        sentinel_id: str | bool | None = None,
        unique_names: bool = False,
    ) -> None:
        super().__init__(location, base_url, file_permissions_mode, directory_permissions_mode, sentinel_id=sentinel_id)
        self._given_location, self._given_url = location, base_url
        self._unique_names = unique_names
        self._root = os.path.abspath(root) if root is not None else None

    @cached_property
    def base_location(self) -> str:
        """``derived`` in ``MEDIA_ROOT`` unless another location was given."""
        given = self._given_location
        return os.path.join(settings.MEDIA_ROOT, "derived") if given is None else os.fspath(given)

    @cached_property
    def base_url(self) -> str:
        """``derived/`` below ``MEDIA_URL`` unless another address was given."""
        given = self._given_url
        url = f"{settings.MEDIA_URL.rstrip('/')}/derived/" if given is None else given
        return url if url.endswith("/") else f"{url}/"

    @property
    def root(self) -> str:
        """The directory that holds the sentinel."""
        location = str(self.location)
        root = self._root if self._root is not None else os.path.abspath(settings.MEDIA_ROOT)
        if os.path.commonpath([root, location]) == root:
            return root
        if self._root is not None:
            raise ImproperlyConfigured(f"the location {location} is not in the volume {root}")
        return location

    def _prefix(self) -> str:
        prefix = os.path.relpath(str(self.location), self.root)
        return "" if prefix == "." else prefix

    def _relative(self, name: str) -> str:
        relative = super()._relative(name)
        for part in os.path.relpath(relative, self._prefix() or ".").split(os.sep):
            if part.startswith(".") or any(unicodedata.category(character) in {"Cc", "Cs"} for character in part):
                raise SuspiciousFileOperation(f"{name!r} is not allowed as a name")
        return relative

    def get_valid_name(self, name: str) -> str:
        """Return a model field's file name as Django makes it safe."""
        if self._unique_names:
            return super().get_valid_name(name)
        return Storage.get_valid_name(self, name)

    def get_available_name(self, name: str, max_length: int | None = None) -> str:
        """Return *name*: it is available, since saving replaces."""
        if self._unique_names:
            return super().get_available_name(name, max_length)
        name = str(name).replace("\\", "/")
        if max_length and len(name) > max_length:
            raise SuspiciousFileOperation(f"{name!r} is longer than {max_length} characters")
        return name

    def _name_after_stale(self, name: str) -> str:
        return super()._name_after_stale(name) if self._unique_names else name

    def _saving(self, mount: Mount, relative: str) -> Saving:
        return Replacing(mount, relative)

    def _open(self, name: str, mode: str = "rb") -> File[Any]:
        if set(mode) - set("rbt"):
            raise io.UnsupportedOperation(f"mode {mode!r}: derived files are saved, not opened for writing")
        return super()._open(name, mode)
