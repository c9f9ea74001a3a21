"""Runs on a node in the site's environment, for ``./scripts/bench scale``: many files in the site's own catalog.

It does what standard input asks for: writes files and their rows, waits for the node's ledger, audits a sample, and
removes all again. The files are not synced: they are only there to be many. One runs at a time; the next waits for it.
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import os
import secrets
import shutil
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

DIRECTORY = "bench-scale"  # on the mount
SIZE = 4096
BATCH = 250
THREADS = 4
RUN = secrets.token_hex(4)  # a name that was deleted is never alive again, so each run has names of its own
LOCK = 0x7472_6962  # an advisory lock of the database
PATIENCE = 100.0


def say(answer: dict[str, Any]) -> None:
    """Answer with one line."""
    print(json.dumps(answer), flush=True)


def name_of(number: int) -> str:
    """Return the stored name of a file."""
    return f"{DIRECTORY}/{RUN}/{number % 16:x}/{number // 16 % 16:x}/{number}.bin"


def alone() -> None:
    """Wait until no other of these runs: one that lost its master goes on until its task is done."""
    from django.db import connection

    end = time.monotonic() + PATIENCE
    while True:
        with connection.cursor() as cursor:
            cursor.execute("SELECT pg_try_advisory_lock(%s)", [LOCK])  # held until we end
            if cursor.fetchone()[0]:
                return
        if time.monotonic() > end:
            raise RuntimeError(f"another of these has been at work for {PATIENCE:.0f} s")
        time.sleep(0.2)  # between two tries; the deadline is above


def in_threads(work: Callable[[list[Any]], None], items: list[Any]) -> None:
    """Let several threads do parts of it, each with a connection to the database of its own."""
    from django.db import connection

    def some(part: list[Any]) -> None:
        try:
            work(part)
        finally:
            connection.close()

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(some, [items[start::THREADS] for start in range(THREADS)]))


def add(start: int, count: int, owner: str) -> None:
    """Write files, then their rows: the catalog's, and those that the gallery's pages show."""
    from django.conf import settings
    from django.contrib.auth import get_user_model

    user = get_user_model().objects.get(username=owner)
    root = Path(settings.MEDIA_ROOT)

    def write(numbers: list[int]) -> None:
        stored = list[Any]()
        for number in numbers:
            data = number.to_bytes(8, "big") + os.urandom(SIZE - 8)
            path = root / name_of(number)
            try:
                handle = path.open("xb")
            except FileNotFoundError:
                path.parent.mkdir(parents=True, exist_ok=True)
                handle = path.open("xb")
            with handle:
                handle.write(data)
            stored.append((name_of(number), hashlib.sha256(data).hexdigest()))
        for first in range(0, len(stored), BATCH):
            rows(stored[first : first + BATCH], user)

    in_threads(write, list(range(start, start + count)))


def rows(stored: list[tuple[str, str]], user: Any) -> None:
    """Write the rows of stored files in one transaction."""
    from django.db import transaction
    from example.gallery.models import Picture, Version  # type: ignore[import-not-found]  # a node has it

    from tribrick import catalog
    from tribrick.storage import StoredFile

    with transaction.atomic():
        files = [
            catalog.record(StoredFile(name, digest, SIZE), original=name.rpartition("/")[2], owner=user)
            for name, digest in stored
        ]
        pictures = Picture.objects.bulk_create([Picture(owner=user) for _ in files])
        pairs = zip(files, pictures, strict=True)
        versions = Version.objects.bulk_create([Version(file=file, picture=picture) for file, picture in pairs])
        for picture, version in zip(pictures, versions, strict=True):
            picture.current = version
        Picture.objects.bulk_update(pictures, ["current"])


def there() -> Any:
    """Return what we have stored and not deleted yet."""
    from tribrick.models import MediaFile, State

    return MediaFile.objects.filter(name__startswith=f"{DIRECTORY}/", state=State.STORED)


def remove(count: int) -> int:
    """Delete some of the files as the site does; with the last, forget pictures and remove directories.

    Returns how many are left.
    """
    from django.conf import settings
    from django.db import transaction
    from example.gallery.models import Picture

    from tribrick import catalog

    def some(files: list[Any]) -> None:
        for first in range(0, len(files), BATCH):
            with transaction.atomic():  # the bytes go once it is committed
                for file in files[first : first + BATCH]:
                    catalog.delete(file)

    in_threads(some, list(there().order_by("name")[:count]))
    left = there().count()
    if left == 0:
        Picture.objects.filter(current=None, versions__file__name__startswith=f"{DIRECTORY}/").delete()
        with contextlib.suppress(FileNotFoundError):  # also files whose rows a killed run did not write
            shutil.rmtree(Path(settings.MEDIA_ROOT) / DIRECTORY)
    return int(left)


def await_ledger(deadline: float) -> int:
    """Wait until the node's ledger has every change of now; return the number of the last one."""
    from django.db.models import Max

    from tribrick.conf import setting
    from tribrick.ledger import Ledger
    from tribrick.models import Change

    wanted = int(Change.objects.aggregate(last=Max("number"))["last"] or 0)
    end = time.monotonic() + deadline
    while True:
        with Ledger(str(setting("LEDGER"))) as ledger:
            number = ledger.last()[0]
        if number >= wanted:
            return wanted
        if time.monotonic() > end:
            raise RuntimeError(f"the ledger is at {number} after {deadline:.0f} s, the database at {wanted}")
        time.sleep(0.2)  # between two looks; the deadline is above


def audit(sample: int) -> dict[str, Any]:
    """Audit a sample by catalog and bricks; return the seconds and how many copies were compared.

    A difference is an error, and so is a sample that was not looked at.
    """
    from django.core.management import call_command

    from tribrick.models import MediaFile, State

    wanted = min(sample, MediaFile.objects.filter(state=State.STORED).count())
    said = io.StringIO()
    started = time.perf_counter()
    call_command("tribrick", "audit", "--sample", str(sample), "--json", stdout=said)
    seconds = time.perf_counter() - started
    report = json.loads(said.getvalue())
    if not report["checked"] == wanted > 0 or not report["read"]:
        raise RuntimeError(f"the audit was to check {wanted} files, and read {report['read']} bytes")
    return {"seconds": seconds, "copies": len(report["counts"])}


def newest_half() -> int:
    """Return the picture in the middle of the gallery."""
    from example.gallery.models import Picture

    shown = Picture.objects.filter(private=False, current__isnull=False).order_by("-id")
    return int(shown.values_list("id", flat=True)[shown.count() // 2])


def main() -> None:
    """Carry out what standard input asks for; an error is the answer."""
    import django

    django.setup()
    try:
        alone()
        say({"left": there().count()})
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["do"] == "add":
                add(asked["start"], asked["count"], asked["owner"])
                say({})
            elif asked["do"] == "remove":
                say({"left": remove(asked["count"])})
            elif asked["do"] == "ledger":
                say({"number": await_ledger(asked["deadline"])})
            elif asked["do"] == "audit":
                say(audit(asked["sample"]))
            elif asked["do"] == "middle":
                say({"picture": newest_half()})
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):
            say({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
