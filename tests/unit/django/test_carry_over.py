"""The migration that gives the rows of a site from before the catalog to the catalog."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from django.db import connection

SOURCES = Path(__file__).resolve().parents[3]
OLD_SITE = """
import datetime, io, json
import django
django.setup()
from django.conf import settings
from django.core.files.base import ContentFile
from django.core.files.storage import default_storage
from django.core.management import call_command
from django.db import connection
from django.db.migrations.executor import MigrationExecutor
from django.utils import timezone
for app in ("auth", "contenttypes", "tribrick"):
    call_command("migrate", app, verbosity=0)
call_command("migrate", "gallery", "0001", verbosity=0)
at = [("gallery", "0001_initial"), ("tribrick", "0003_owner")]
apps = MigrationExecutor(connection).loader.project_state(at).apps
User, Picture, StoredMedia, RequestKey = (
    apps.get_model(*name.split("."))
    for name in ("auth.User", "gallery.Picture", "gallery.StoredMedia", "gallery.RequestKey")
)
ada = User.objects.create(username="ada")
names = {}

def picture(*versions, private=False):
    made = Picture.objects.create(owner=ada, private=private)
    for number, what in enumerate(versions, 1):
        file = default_storage.store(ContentFile(what.encode()), f"photos/{what}.txt")
        thumb = default_storage.store(ContentFile(b"thumb of " + what.encode()), f"photos/{what}-thumb.jpg").name
        gone = "deleted" in what
        removed = timezone.now() if "purged" in what else None
        if removed or "lost" in what:
            default_storage.discard(thumb)
        if removed:
            default_storage.discard(file.name)
        row = StoredMedia.objects.create(
            picture=made, version=number, owner=ada, name=file.name, original=what, sha256=file.sha256, size=file.size,
            content_type="image/png", width=3, height=2, thumbnail=thumb, node="node3",
            deleted=timezone.now() if gone else None, bytes_removed=removed,
        )
        names[what] = [file.name, thumb]
        if not gone:
            made.current = row
    made.save()
    return made

one = picture("one")
many = picture("first", "second deleted", "third")
gone = picture("deleted and purged")
lost = picture("lost thumbnail")
RequestKey.objects.create(owner=ada, key="k", fingerprint="f", media=one.current)
print(json.dumps({"names": names, "one": one.pk, "many": many.pk, "gone": gone.pk, "lost": lost.pk}))
"""
NEW_SITE = """
import hashlib, json, sys
import django
django.setup()
from example.gallery.models import *
from tribrick import audit, catalog
from tribrick.models import Change
from django.test import Client
from django.contrib.auth import get_user_model
told = json.loads(sys.argv[1])
names = told["names"]
def shown(key):
    current = Picture.objects.get(pk=told[key]).current
    return current and current.file.name
assert shown("one") == names["one"][0]
assert shown("many") == names["third"][0]
assert shown("gone") is None
assert shown("lost") == names["lost thumbnail"][0]
assert Version.objects.get(file__name=names["lost thumbnail"][0]).thumbnail is None
one = Version.objects.get(file__name=names["one"][0])
assert (one.width, one.height, one.file.original, one.file.node, one.file.logical) == (3, 2, "one", "node3", None)
assert one.file.owner.username == "ada" and one.file.content_type == "image/png"
assert one.thumbnail.name == names["one"][1]
assert one.thumbnail.sha256 == hashlib.sha256(b"thumb of one").hexdigest() and one.thumbnail.owner is None
third = MediaFile.objects.get(name=names["third"][0])
assert [file.original for file in catalog.versions(third)] == ["third", "second deleted", "first"]
assert [file.version for file in catalog.versions(third)] == [3, 2, 1]
assert catalog.current(third) == third
states = dict(MediaFile.objects.values_list("original", "state"))
assert (states["second deleted"], states["deleted and purged"]) == ("deleted", "purged")
assert RequestKey.objects.get().version == one
kinds = {}
numbers = list(Change.objects.order_by("number").values_list("number", flat=True))
assert None not in numbers and numbers == sorted(set(numbers)), numbers
for change in Change.objects.order_by("number"):
    kinds.setdefault(change.name, []).append(change.kind)
assert kinds[names["first"][0]] == ["added"]
assert kinds[names["second deleted"][0]] == ["added", "deleted"]
assert kinds[names["deleted and purged"][0]] == ["added", "deleted", "purged"]
assert catalog.finish_deletes() == (1, 0)
client = Client()
client.force_login(get_user_model().objects.get())
for key in ("one", "many", "lost"):
    assert client.get(f"/picture/{told[key]}/").status_code == 200
new = catalog.replace(third, __import__("io").BytesIO(b"fourth"))
assert new.version == 4
print("carried over")
"""


def run(code: str, *arguments: str, url: str) -> str:
    done = subprocess.run(
        [sys.executable, "-c", code, *arguments],
        env=os.environ | {"PYTHONPATH": f"{SOURCES}/src:{SOURCES}/example", "DATABASE_URL": url, "DEBUG": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize("kind", ["postgresql", "sqlite"])
def test_rows_are_carried_over(
    kind: str, database: None, media: Path, tmp_path: Path, files_in: Callable[[Path], list[str]]
) -> None:
    url = f"sqlite:///{tmp_path}/db"
    if kind == "postgresql":
        with connection.cursor() as cursor:
            cursor.execute("DROP DATABASE IF EXISTS carried")
            cursor.execute("CREATE DATABASE carried")
        url = os.environ["DATABASE_URL"].replace("/tribrick?", "/carried?")
    told = run(OLD_SITE, url=url)
    before = files_in(media)
    migrate = "import django; django.setup()\nfrom django.core.management import call_command\n"
    # The volume is away: nothing is lost, and the next try does it.
    (media / ".tribrick-volume").rename(media / ".away")
    with pytest.raises(AssertionError, match="StorageUnavailable"):
        run(f"{migrate}call_command('migrate', verbosity=0)", url=url)
    (media / ".away").rename(media / ".tribrick-volume")
    run(f"{migrate}call_command('migrate', verbosity=0)", url=url)
    assert files_in(media) == before
    assert run(NEW_SITE, told, url=url) == "carried over\n"
