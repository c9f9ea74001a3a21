"""Thumbnails and what a file really is. Nothing here may fail an upload."""

from __future__ import annotations

import io
import logging
import warnings
from typing import IO, Any, NamedTuple

from PIL import Image, ImageOps

log = logging.getLogger("example.gallery")

SIZE = (480, 480)
MOST_PIXELS = 60_000_000
TYPES = {
    "JPEG": "image/jpeg",
    "PNG": "image/png",
    "GIF": "image/gif",
    "WEBP": "image/webp",
    "BMP": "image/bmp",
    "TIFF": "image/tiff",
}
# By extension, for files that are no picture. Nothing that a browser would run.
OTHER_TYPES = {
    "pdf": "application/pdf",
    "txt": "text/plain",
    "csv": "text/csv",
    "zip": "application/zip",
    "mp3": "audio/mpeg",
    "ogg": "audio/ogg",
    "mp4": "video/mp4",
    "webm": "video/webm",
}
UNKNOWN = "application/octet-stream"


class Seen(NamedTuple):
    """What a look at the bytes told."""

    content_type: str
    width: int | None
    height: int | None
    thumbnail: bytes | None


def look(content: IO[Any], extension: str) -> Seen:
    """Return type, dimensions and a JPEG thumbnail; the client's word on the type is not asked."""
    kind, width, height = OTHER_TYPES.get(extension, UNKNOWN), None, None
    try:
        content.seek(0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            # Only these formats: others start external programs or are rarely tested parsers.
            with Image.open(content, formats=tuple(TYPES)) as image:
                kind, (width, height) = TYPES[image.format or ""], image.size
                if width * height > MOST_PIXELS:
                    log.info("no thumbnail: %d x %d pixels are too many", width, height)
                    return Seen(kind, width, height, None)
                return Seen(kind, width, height, _thumbnail(image))
    except Exception as error:  # noqa: BLE001  a decoder fed with hostile bytes raises anything
        log.info("no thumbnail: %s: %s", type(error).__name__, error)
        return Seen(kind, width, height, None)
    finally:
        content.seek(0)


def _thumbnail(image: Image.Image) -> bytes:
    image.draft("RGB", SIZE)  # JPEG is decoded at a fraction of its size
    small = ImageOps.exif_transpose(image) or image
    small.thumbnail(SIZE)
    if small.mode in {"RGBA", "LA", "PA"} or "transparency" in small.info:
        small = small.convert("RGBA")
        ground = Image.new("RGB", small.size, (255, 255, 255))
        ground.paste(small, mask=small.getchannel("A"))
        small = ground
    out = io.BytesIO()
    small.convert("RGB").save(out, "JPEG", quality=82, progressive=True)
    return out.getvalue()
