"""Adding, replacing and deleting pictures. Pages and API both come here.

The catalog keeps the order: files durable, then all rows in one transaction, then the answer. See
:func:`tribrick.catalog.together` for what is left when that fails.
"""

from __future__ import annotations

import hashlib
import logging
from typing import Any

from django.core.files.base import ContentFile
from django.core.files.uploadedfile import UploadedFile
from django.db import IntegrityError, transaction

from example.gallery import thumbnails
from example.gallery.models import Picture, RequestKey, Version
from tribrick import catalog, names
from tribrick.models import MediaFile

log = logging.getLogger("example.gallery")


class Refused(Exception):
    """The request is refused; *code* is a word for programs, the text a sentence for people."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail


def find(user: Any, name: str, *, change: bool = False) -> Version:
    """Return the version stored as *name* if *user* may see (or change) it; deleted ones are found too."""
    versions = Version.objects.select_related("file", "thumbnail")
    version = versions.filter(file__name=name).first() if "\0" not in name else None
    if version is None or (version.private and version.file.owner_id != user.pk):
        raise Refused(404, "not_found", "There is no such file.")
    if change and version.file.owner_id != user.pk and not user.is_superuser:
        raise Refused(403, "forbidden", "This file belongs to someone else.")
    return version


def check_replaceable(user: Any, name: str) -> Version:
    """Return the version stored as *name*, which *user* may replace."""
    return _refuse_deleted(find(user, name, change=True))


def save_upload(
    owner: Any,
    content: UploadedFile,
    original: str,
    *,
    private: bool = False,
    replaces: str | None = None,
    key: str = "",
) -> Version:
    """Store *content* as a new picture, or as a new version of the file *replaces*.

    With *key*, a repeated call gives the version of the first one.
    """
    old = None
    if replaces is not None:
        old = check_replaceable(owner, replaces)
        private = old.private
    fingerprint = _fingerprint(content, replaces) if key else ""
    with catalog.together():
        request_key = None
        if key:
            request_key = _claim(owner, key, fingerprint)
            if request_key.version is not None:
                return _refuse_deleted(request_key.version)
        version = _store(owner, content, original, private, old)
        if request_key is not None:
            request_key.version = version
            request_key.save(update_fields=["version"])
    return version


def _refuse_deleted(version: Version) -> Version:
    if version.deleted:
        raise Refused(409, "deleted", "This file was deleted.")
    return version


def _fingerprint(content: UploadedFile, replaces: str | None) -> str:
    hasher = hashlib.sha256(f"{replaces or ''}\n".encode())
    for chunk in content.chunks():
        hasher.update(chunk)
    return hasher.hexdigest()


def _claim(owner: Any, key: str, fingerprint: str) -> RequestKey:
    """Insert the key, waiting for a request that has it; if that one succeeded, return its row."""
    try:
        with transaction.atomic():
            return RequestKey.objects.create(owner=owner, key=key, fingerprint=fingerprint)
    except IntegrityError:
        known = RequestKey.objects.select_related("version__file").get(owner=owner, key=key)
    if known.fingerprint != fingerprint:
        raise Refused(422, "key_reused", "This Idempotency-Key was used for another file or address.")
    return known


def _store(owner: Any, content: UploadedFile, original: str, private: bool, old: Version | None) -> Version:
    """Store file and thumbnail, and write the rows."""
    directory = "private" if private else "photos"
    stem, extension = names.split(original)
    name = f"{directory}/{names.safe_name(original)}"
    seen = thumbnails.look(content, extension)
    options = {"original": original, "owner": owner, "content_type": seen.content_type}
    if old is None:
        file = catalog.add(content, name, **options)
        picture = Picture.objects.create(owner=owner, private=private)
    else:
        try:
            file = catalog.replace(old.file, content, name, **options)
        except catalog.FileIsDeleted as error:
            raise Refused(409, "deleted", "This file was deleted.") from error
        picture = Picture.objects.get(pk=old.picture_id)
    return _insert(
        Version(
            file=file,
            picture=picture,
            thumbnail=_store_thumbnail(seen.thumbnail, f"{directory}/{stem}-thumb.jpg"),
            width=seen.width,
            height=seen.height,
        )
    )


def _store_thumbnail(data: bytes | None, name: str) -> MediaFile | None:
    if data is None:
        return None
    try:
        return catalog.add(ContentFile(data), name, content_type="image/jpeg")
    except OSError as error:
        log.warning("a thumbnail could not be stored: %s", error)
        return None


def _insert(version: Version) -> Version:
    version.save(force_insert=True)
    version.picture.current = version
    version.picture.save(update_fields=["current"])
    return version


def delete_version(user: Any, name: str) -> None:
    """Delete one stored file; an older version of the picture, if any, becomes the current one.

    Deleting it again is no error.
    """
    catalog.delete(find(user, name, change=True).file)


def delete_picture(user: Any, picture: Picture) -> None:
    """Delete a picture with all its versions."""
    if picture.owner_id != user.pk and not user.is_superuser:
        raise Refused(403, "forbidden", "This picture belongs to someone else.")
    version = picture.versions.select_related("file__logical").first()
    if version is None:
        return
    if version.file.logical is None:
        catalog.delete(version.file)
    else:
        catalog.delete_all(version.file.logical)
