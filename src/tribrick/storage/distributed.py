"""The storage that keeps nothing here: every file lives on the media hosts."""

from __future__ import annotations

import io
from collections.abc import Sequence
from datetime import datetime
from typing import IO, Any, cast
from urllib.parse import quote, urljoin

from django.conf import settings
from django.core.exceptions import SuspiciousFileOperation
from django.core.files import File
from django.core.files.storage import Storage
from django.core.files.utils import validate_file_name
from django.utils.deconstruct import deconstructible

from tribrick import names
from tribrick.conf import setting
from tribrick.storage.base_remote import RemoteStorage
from tribrick.storage.transport import CHUNK, spooled
from tribrick.storage.volume import StoredFile, _readable


@deconstructible(path="tribrick.storage.DistributedStorage")
class DistributedStorage(RemoteStorage, Storage):
    """Files on media hosts only, written to all of them in parallel and read from any.

    A save returns when ``write_quorum`` hosts have confirmed it. The others get the file from the
    outbox; without one, all must confirm. A read goes on to the next host when one fails.
    """

    def __init__(
        self,
        hosts: Sequence[str] | None = None,
        base_url: str | None = None,
        transport: Any = None,
        *,
        write_quorum: int | str | None = None,
        fatal_exceptions: bool | None = None,
        show_traceback: bool | None = None,
        timeout: float | None = None,
        hash_levels: int | None = None,
        hash_width: int | None = None,
    ) -> None:
        self._base_url = base_url
        self._hash_levels, self._hash_width = hash_levels, hash_width
        self._set_remote(hosts, transport, write_quorum, fatal_exceptions, show_traceback, timeout)

    @property
    def base_url(self) -> str:
        """The prefix of the files' addresses: ``MEDIA_URL`` by default."""
        url = str(self._base_url if self._base_url is not None else settings.MEDIA_URL)
        return url if url.endswith("/") else f"{url}/"

    def _checked(self, name: str) -> str:
        name = str(name).replace("\\", "/")
        if "\0" in name or {"", ".", ".."} & set(name.split("/")):
            raise SuspiciousFileOperation(f"{name!r} is not a stored file's name")
        return str(validate_file_name(name, allow_relative_path=True))

    def _canonical(self, name: str) -> str:
        return self._checked(name)

    # Names.

    def get_valid_name(self, name: str) -> str:
        """Return the client's file name as a safe ASCII name."""
        return names.safe_name(name)

    def is_name_available(self, name: str, max_length: int | None = None) -> bool:
        """Never ask a host: names from :meth:`get_available_name` are unique."""
        return not (max_length and len(name) > max_length)

    def get_available_name(self, name: str, max_length: int | None = None) -> str:
        """Return a new unique name for ``<dir>/<file name>``."""
        levels = self._hash_levels if self._hash_levels is not None else setting("HASH_LEVELS")
        width = self._hash_width if self._hash_width is not None else setting("HASH_WIDTH")
        return names.unique_name(str(name), levels=int(levels), width=int(width), max_length=max_length)

    # Writing.

    def store(self, content: IO[Any] | File[Any], name: str, max_length: int | None = None) -> StoredFile:
        """Store *content* under a new unique name and say what was stored; for ``tribrick.catalog.add``."""
        file = content if hasattr(content, "chunks") else File(content, name)
        return self._put(self.get_available_name(name, max_length), cast("File[Any]", file), None)

    def _save(self, name: str, content: File[Any]) -> str:
        return self._put(name, content, content).name

    def _put(self, name: str, content: File[Any], described: File[Any] | None) -> StoredFile:
        name = self._checked(name)
        with _readable(content) as source, spooled(source.chunks(CHUNK)) as body:
            stored = StoredFile(name, body.sha256, body.size)
            self._intend(name, body.size)
            self._replicate(stored, body, described, local=False)
        return stored

    # Reading.

    def _open(self, name: str, mode: str = "rb") -> File[Any]:
        if set(mode) - set("rbt"):
            raise io.UnsupportedOperation(f"mode {mode!r}: stored files are never changed; save a new one")
        file: IO[Any] = self._download(self._checked(name))
        return File(file if "b" in mode else io.TextIOWrapper(file, encoding="utf-8"), name)

    def exists(self, name: str) -> bool:
        """Ask the catalog, and the hosts about what it does not know. No answer is an exception, not a no."""
        return self._exists_remotely(self._checked(name))

    def size(self, name: str) -> int:
        """Return the size in bytes, from the catalog or a host."""
        return self._size_remotely(self._checked(name))

    def url(self, name: str | None) -> str:
        """Return the address of a file."""
        return urljoin(self.base_url, quote(str(name or "").replace("\\", "/").lstrip("/"), safe="/~!*()'"))

    def listdir(self, path: str) -> tuple[list[str], list[str]]:
        """Return directories and files below *path*, as the catalog knows them."""
        return self._listed(path)

    def get_accessed_time(self, name: str) -> datetime:
        """Return the time of the save: nobody counts reads."""
        return self._created(name)

    def get_created_time(self, name: str) -> datetime:
        """Return the time of the save."""
        return self._created(name)

    def get_modified_time(self, name: str) -> datetime:
        """Return the time of the save: stored files never change."""
        return self._created(name)
