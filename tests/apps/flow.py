"""One step of the libraries' life on one node: upload, derive, read, renew, sweep, delete. Answers with JSON.

Rows are found by their titles, so the steps share nothing but the database and the volume.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import sys
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))
os.environ["DJANGO_SETTINGS_MODULE"] = "libraries.settings"

import django

django.setup()

from django.conf import settings  # noqa: E402
from django.contrib.auth import get_user_model  # noqa: E402
from django.core.files.base import ContentFile  # noqa: E402
from django.core.files.images import ImageFile  # noqa: E402
from django.core.files.storage import default_storage  # noqa: E402
from django.core.files.uploadedfile import SimpleUploadedFile  # noqa: E402
from django.core.management import call_command  # noqa: E402
from filer.models import File as FilerFile  # noqa: E402
from filer.models import Image as FilerImage  # noqa: E402
from libraries.models import Picture  # noqa: E402
from PIL import Image  # noqa: E402
from wagtail.documents import get_document_model  # noqa: E402
from wagtail.images import get_image_model  # noqa: E402
from wagtail.models import Collection  # noqa: E402

from tribrick import audit  # noqa: E402

# easy-thumbnails 2.10 takes a `default_storage` that nothing has used yet for another storage, and then does not find
# the thumbnails to delete.
assert default_storage.base_url
WagtailImage, Document = get_image_model(), get_document_model()
ROOT = Path(settings.MEDIA_ROOT)


def jpeg(shade: int) -> bytes:
    out = io.BytesIO()
    Image.new("RGB", (640, 480), (shade, 80, 90)).save(out, "JPEG")
    return out.getvalue()


def look(file: Any) -> dict[str, str]:
    """Return name and hash of a stored file, read through its storage."""
    with file.storage.open(file.name, "rb") as opened:
        return {"name": file.name, "sha256": hashlib.sha256(opened.read()).hexdigest()}


def originals() -> dict[str, Any]:
    """Return every original by library."""
    return {
        "easy": Picture.objects.get().image,
        "wagtail 1": WagtailImage.objects.get(title="one").file,
        "wagtail 2": WagtailImage.objects.get(title="two").file,
        "document": Document.objects.get().file,
        "filer public": FilerImage.objects.get(name="public").file,
        "filer private": FilerImage.objects.get(name="private").file,
        "filer file": FilerFile.objects.get(name="text").file,
    }


def derived() -> dict[str, Any]:
    """Return every thumbnail and rendition by library; make those that are not there."""
    easy = Picture.objects.get().image
    found = {
        "easy small": easy.get_thumbnail({"size": (50, 50)}),
        "easy cropped": easy.get_thumbnail({"size": (100, 100), "crop": True}),
    }
    for title in ("one", "two"):
        found[f"wagtail {title}"] = WagtailImage.objects.get(title=title).get_rendition("fill-100x100").file
    for name in ("public", "private"):
        found[f"filer {name}"] = FilerImage.objects.get(name=name).file.get_thumbnail({"size": (80, 80)})
    return found


def upload() -> dict[str, Any]:
    call_command("migrate", verbosity=0, interactive=False, run_syncdb=True)
    Collection.add_root(name="Root")  # what Wagtail's first migration does
    owner = get_user_model().objects.create_superuser("proof", "proof@proof.example", "proof")
    Picture().image.save("Ein Bild.JPG", ContentFile(jpeg(1)))
    for shade, title in ((2, "one"), (3, "two")):
        WagtailImage.objects.create(title=title, file=ImageFile(io.BytesIO(jpeg(shade)), name="Grün.jpg"))
    Document.objects.create(title="document", file=ContentFile(b"text", name="document.txt"))
    for shade, name in ((4, "public"), (5, "private")):
        FilerImage.objects.create(
            owner=owner, original_filename="Bild.jpg", name=name, is_public=name == "public",
            file=SimpleUploadedFile("Bild.jpg", jpeg(shade), "image/jpeg"),
        )  # fmt: skip
    FilerFile.objects.create(
        owner=owner, original_filename="a.txt", name="text", file=SimpleUploadedFile("a.txt", b"text", "text/plain")
    )
    return {key: look(file) for key, file in originals().items()}


def derive() -> dict[str, Any]:
    return {key: look(file) for key, file in derived().items()}


def read() -> dict[str, Any]:
    """Read originals, and thumbnails that another node made; none may be made again here."""
    before = walk()
    found = {key: look(file) for key, file in (originals() | derived()).items()}
    assert walk() == before, "reading made or changed files"
    return found


def renew() -> dict[str, Any]:
    """Make renditions again, and move a file from private to public and back.

    filer looks at ``is_public`` when ``file`` is first read, and finds the old thumbnails only if that was before the
    change. Its admin does so; a program that does not leaves them behind, with any storage.
    """
    call_command("wagtail_update_image_renditions", verbosity=0)
    for _ in range(2):
        image = FilerImage.objects.get(name="private")
        assert image.file.name
        image.is_public = not image.is_public
        image.save()
    return {key: look(file) for key, file in (originals() | derived()).items()}


def sweep() -> dict[str, Any]:
    """Say what sweep and adopt would take of all this, if it were old."""
    audit.settled_before = lambda: datetime.now(timezone.utc) + timedelta(hours=1)
    found = audit.strays("default")
    return {"seen": found.seen, "strays": [one.name for one in [*found.own, *found.foreign, *found.rests]]}


def delete() -> dict[str, Any]:
    picture = Picture.objects.get()
    picture.image.delete()  # with its thumbnails
    picture.delete()
    for rows in (WagtailImage.objects, Document.objects, FilerImage.objects, FilerFile.objects):
        for row in rows.all():
            row.delete()
    return {}


def walk() -> dict[str, str]:
    """Return every file below MEDIA_ROOT with its hash."""
    files = [path for path in ROOT.rglob("*") if path.is_file() and path.name != ".tribrick-volume"]
    return {str(path.relative_to(ROOT)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


ALL: tuple[Callable[[], dict[str, Any]], ...] = (upload, derive, read, renew, sweep, delete)
STEPS = {step.__name__: step for step in ALL}

if __name__ == "__main__":
    answer = STEPS[sys.argv[1]]()
    print("\n" + json.dumps(answer))
