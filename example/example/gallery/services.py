"""Adding, replacing and removing files. Pages and API both come here.

The order of an upload: file durable, then its row, then the answer. So an acknowledged upload has
both. If the transaction certainly failed, the file is removed; if nobody knows whether it was
committed (the connection died at COMMIT), the file stays: an orphan is better than a row without
bytes.
"""

from __future__ import annotations

import functools
import hashlib
import logging
from typing import Any

from django.conf import settings
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.core.files.uploadedfile import UploadedFile
from django.db import DatabaseError, DataError, IntegrityError, transaction
from django.db.models import Max
from django.utils import timezone

from example.gallery import thumbnails
from example.gallery.models import Picture, RequestKey, StoredMedia
from tribrick import names
from tribrick.storage import StorageError, StoredFile, VolumeStorage

log = logging.getLogger("example.gallery")


class Refused(Exception):
    """The request is refused; *code* is a word for programs, the text a sentence for people."""

    def __init__(self, status: int, code: str, detail: str) -> None:
        super().__init__(detail)
        self.status, self.code, self.detail = status, code, detail


def storage() -> VolumeStorage:
    """Return the default storage, which has ``store``."""
    return default_storage  # type: ignore[return-value]  the settings name a VolumeStorage


def find(user: Any, name: str, *, change: bool = False) -> StoredMedia:
    """Return the row of *name* if *user* may see (or change) it; deleted rows are found too."""
    media = StoredMedia.objects.filter(name=name).first() if "\0" not in name else None
    if media is None or (media.private and media.owner_id != user.pk):
        raise Refused(404, "not_found", "There is no such file.")
    if change and media.owner_id != user.pk and not user.is_superuser:
        raise Refused(403, "forbidden", "This file belongs to someone else.")
    return media


def check_replaceable(user: Any, name: str) -> StoredMedia:
    """Return the row of a file that *user* may replace."""
    return _refuse_deleted(find(user, name, change=True))


def save_upload(
    owner: Any,
    content: UploadedFile,
    original: str,
    *,
    private: bool = False,
    replaces: str | None = None,
    key: str = "",
) -> StoredMedia:
    """Store *content* as a new picture, or as a new version of the file *replaces*.

    With *key*, a repeated call gives the row of the first one.
    """
    old = None
    if replaces is not None:
        old = check_replaceable(owner, replaces)
        private = old.private
    fingerprint = _fingerprint(content, replaces) if key else ""
    stored: list[str] = []
    committing = False
    try:
        with transaction.atomic(durable=True):
            request_key = None
            if key:
                request_key = _claim(owner, key, fingerprint)
                if request_key.media is not None:
                    return _refuse_deleted(request_key.media)
            media = _store(owner, content, original, private, stored)
            _insert(media, old)
            if request_key is not None:
                request_key.media = media
                request_key.save(update_fields=["media"])
            committing = True
    except BaseException as error:
        if stored and (not committing or isinstance(error, (IntegrityError, DataError))):
            _discard(stored)
        elif stored:
            log.error("unknown whether the row was committed; kept %s", ", ".join(stored))
        raise
    return media


def _refuse_deleted(media: StoredMedia) -> StoredMedia:
    if media.deleted is not None:
        raise Refused(409, "deleted", "This file was deleted.")
    return media


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
        known = RequestKey.objects.select_related("media").get(owner=owner, key=key)
    if known.fingerprint != fingerprint:
        raise Refused(422, "key_reused", "This Idempotency-Key was used for another file or address.")
    return known


def _store(owner: Any, content: UploadedFile, original: str, private: bool, stored: list[str]) -> StoredMedia:
    """Store file and thumbnail; return the row, not yet written. *stored* gets every name."""
    directory = "private" if private else "photos"
    stem, extension = names.split(original)
    file = storage().store(content, f"{directory}/{names.safe_name(original)}", max_length=255)
    stored.append(file.name)
    seen = thumbnails.look(content, extension)
    thumbnail = _store_thumbnail(seen.thumbnail, f"{directory}/{stem}-thumb.jpg")
    if thumbnail is not None:
        stored.append(thumbnail.name)
    return StoredMedia(
        owner=owner,
        name=file.name,
        original=names.display_name(original),
        sha256=file.sha256,
        size=file.size,
        content_type=seen.content_type,
        width=seen.width,
        height=seen.height,
        thumbnail=thumbnail.name if thumbnail else "",
        node=settings.TRIBRICK_NODE,
        picture=Picture(owner=owner, private=private),
    )


def _store_thumbnail(data: bytes | None, name: str) -> StoredFile | None:
    if data is None:
        return None
    try:
        return storage().store(ContentFile(data), name, max_length=255)
    except OSError as error:
        log.warning("a thumbnail could not be stored: %s", error)
        return None


def _insert(media: StoredMedia, old: StoredMedia | None) -> None:
    if old is None:
        media.picture.save()
        media.version = 1
    else:
        # Two who replace the same picture at once wait for each other here: both are kept.
        media.picture = Picture.objects.select_for_update().get(pk=old.picture_id)
        _refuse_deleted(StoredMedia.objects.get(pk=old.pk))
        last = media.picture.versions.aggregate(last=Max("version"))["last"]
        media.version = last + 1
    media.save(force_insert=True)
    media.picture.current = media
    media.picture.save(update_fields=["current"])


def _discard(stored: list[str]) -> None:
    for name in stored:
        try:
            storage().delete(name)
        except OSError as error:
            log.warning("a failed upload left %s behind: %s", name, error)


def delete_version(user: Any, name: str) -> None:
    """Delete one stored file; an older version of the picture, if any, becomes the current one.

    Deleting it again is no error.
    """
    media = find(user, name, change=True)
    with transaction.atomic():
        picture = Picture.objects.select_for_update().get(pk=media.picture_id)
        _bury(list(picture.versions.filter(pk=media.pk)))
        picture.current = picture.versions.filter(deleted__isnull=True).order_by("-version").first()
        picture.save(update_fields=["current"])


def delete_picture(user: Any, picture: Picture) -> None:
    """Delete a picture with all its versions."""
    if picture.owner_id != user.pk and not user.is_superuser:
        raise Refused(403, "forbidden", "This picture belongs to someone else.")
    with transaction.atomic():
        locked = Picture.objects.select_for_update().get(pk=picture.pk)
        _bury(list(locked.versions.all()))
        locked.current = None
        locked.save(update_fields=["current"])


def _bury(versions: list[StoredMedia]) -> None:
    """Write tombstones; the bytes go once these are committed."""
    for media in versions:
        if media.deleted is None:
            media.deleted = timezone.now()
            media.save(update_fields=["deleted"])
        if media.bytes_removed is None:
            transaction.on_commit(functools.partial(_remove_bytes_after_commit, media))


def _remove_bytes_after_commit(media: StoredMedia) -> None:
    try:
        remove_bytes(media)
    except (StorageError, DatabaseError) as error:
        log.warning("%s is deleted, its bytes will go later: %s", media.name, error)


def remove_bytes(media: StoredMedia) -> None:
    """Remove the bytes of a tombstone; may be repeated."""
    for name in filter(None, (media.thumbnail, media.name)):
        storage().delete(name)
    StoredMedia.objects.filter(pk=media.pk).update(bytes_removed=timezone.now())
