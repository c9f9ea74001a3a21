"""Receiving uploads: the size limit while bytes arrive, and the client's name unharmed."""

from __future__ import annotations

import contextlib
import html
from collections.abc import Iterator
from typing import Any

from django.conf import settings
from django.core.files.uploadedfile import UploadedFile
from django.core.files.uploadhandler import FileUploadHandler, SkipFile, StopUpload
from django.http import HttpRequest, QueryDict
from django.http.multipartparser import MultiPartParser
from django.template.defaultfilters import filesizeformat
from django.utils.datastructures import MultiValueDict

from example.gallery.services import Refused
from tribrick import names

FIELD = "file"
# What a form may add to the file: boundaries, the other fields, the name.
FORM_OVERHEAD = 256 * 1024


def limit() -> int:
    """Return the largest file accepted, in bytes."""
    return int(settings.TRIBRICK_MAX_UPLOAD_BYTES)


def announced_too_large(request: HttpRequest) -> bool:
    """Whether the body is too large by its own word, so that none of it need be read."""
    try:
        return int(request.META.get("CONTENT_LENGTH") or 0) > limit() + FORM_OVERHEAD
    except ValueError:
        return False


class LimitHandler(FileUploadHandler):
    """Stops an upload at the first byte over the limit; takes only the field ``file``, once.

    Must come first. Leaves on the request ``upload_too_large`` and ``upload_name``, the client's
    name in full (Django's upload objects keep 255 characters).
    """

    def __init__(self, request: HttpRequest | None = None) -> None:
        super().__init__(request)
        self.received = 0
        self.taken = False

    def new_file(self, field_name: str, file_name: str, *args: Any, **kwargs: Any) -> None:
        super().new_file(field_name, file_name, *args, **kwargs)
        if field_name != FIELD or self.taken:
            raise SkipFile
        self.taken = True
        self.request.upload_name = file_name

    def receive_data_chunk(self, raw_data: bytes, _start: int) -> bytes:
        self.received += len(raw_data)
        if self.received > limit():
            self.request.upload_too_large = True
            raise StopUpload(connection_reset=True)
        return raw_data

    def file_complete(self, _file_size: int) -> None:
        return None


class NameKeepingParser(MultiPartParser):
    """Keeps joiners in file names, which Persian words and many emoji are written with."""

    def sanitize_file_name(self, file_name: str) -> str | None:
        name = names.basename(html.unescape(file_name))
        name = names.display_name(name, max_length=4096)
        return None if name in {"", ".", ".."} else name


def receive(
    request: HttpRequest, meta: dict[str, Any], body: Any
) -> tuple[QueryDict, MultiValueDict[str, UploadedFile]]:
    """Parse a multipart body. Takes the place of ``HttpRequest.parse_file_upload``."""
    parser = NameKeepingParser(meta, body, request.upload_handlers, request.encoding)
    return parser.parse()


def too_large() -> Refused:
    """Return the refusal of a file over the limit."""
    return Refused(413, "too_large", f"The file is larger than {filesizeformat(limit())}.")


def without_length() -> Refused:
    """Return the refusal of a body of unknown length, which WSGI cannot pass on."""
    return Refused(411, "length_required", "Send the request with a Content-Length.")


@contextlib.contextmanager
def uploaded(request: HttpRequest) -> Iterator[tuple[UploadedFile, str]]:
    """Yield the file of the field ``file`` and its original name, or raise ``Refused``."""
    if request.content_type != "multipart/form-data":
        raise Refused(415, "not_multipart", "Send the file as the multipart field “file”.")
    if request.method == "POST":
        files = request.FILES
    else:
        files = request.parse_file_upload(request.META, request)[1]
    try:
        if getattr(request, "upload_too_large", False):
            raise too_large()
        content = files.get(FIELD)
        if content is None:
            raise Refused(400, "missing_file", "There is no file in the field “file”.")
        if content.size == 0:
            raise Refused(400, "empty_file", "The file is empty.")
        yield content, request.upload_name
    finally:
        for file in files.values():
            file.close()
