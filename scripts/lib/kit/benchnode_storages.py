"""Runs on a node in the site's environment, for ``./scripts/bench storages`` and ``upload``.

``benchnode_storages.py measure``   saves files and times each save, as it is told on standard input
``benchnode_storages.py serve N``   a media host on port N

Both end, and clean up, when their standard input does.
"""

from __future__ import annotations

import contextlib
import http.client
import itertools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

DIRECTORY = "bench"  # on the mount
SCHEMA = "tribrick_bench"  # tables of our own beside the site's
LOCAL = Path("/var/tmp/tribrick-bench")  # noqa: S108  local disk, and the local half of HybridStorage; this user's own
HOST = Path("/var/tmp/tribrick-bench-host")  # noqa: S108  what a media host stores
IN_MEMORY = 2_621_440  # what is larger, Django keeps in a temporary file while it is uploaded


def say(answer: dict[str, Any]) -> None:
    """Answer with one line."""
    print(json.dumps(answer), flush=True)


def configure(hosts: list[str]) -> None:
    """Take the site's settings for the volume and the database, and nothing else of the site."""
    import django
    from django.conf import Settings, settings

    site: Any = Settings(os.environ["DJANGO_SETTINGS_MODULE"])
    database = dict(site.DATABASES["default"])
    options = dict(database.get("OPTIONS", {}))
    options["options"] = f"{options.get('options', '')} -c search_path={SCHEMA}".strip()
    # In STORAGES, so that it has what a site's has: rows, intents, the outbox.
    options_of_hybrid = {"location": str(LOCAL), "base_url": "/media/"}
    hybrid = {"hybrid": {"BACKEND": "tribrick.storage.HybridStorage", "OPTIONS": options_of_hybrid}} if hosts else {}
    shared = {key: value for key, value in site.TRIBRICK.items() if key.startswith(("SENTINEL", "HASH"))}
    settings.configure(
        DATABASES={"default": {**database, "OPTIONS": options}},
        INSTALLED_APPS=["django.contrib.contenttypes", "django.contrib.auth", "tribrick"],
        MEDIA_ROOT=site.MEDIA_ROOT,
        MEDIA_URL="/media/",
        SECRET_KEY=site.SECRET_KEY,
        STORAGES={
            "default": {"BACKEND": "tribrick.storage.VolumeStorage"},
            "staticfiles": {"BACKEND": "django.contrib.staticfiles.storage.StaticFilesStorage"},
            **hybrid,
        },
        TRIBRICK={**shared, "MEDIA_HOSTS": hosts, "NODE": "bench"},
        FILE_UPLOAD_PERMISSIONS=site.FILE_UPLOAD_PERMISSIONS,
        USE_TZ=True,
    )
    django.setup()


def make_tables() -> None:
    """Make the catalog's tables in a schema of our own."""
    from django.core.management import call_command
    from django.db import connection

    drop_tables()
    with connection.cursor() as cursor:
        cursor.execute(f"CREATE SCHEMA {SCHEMA}")
    call_command("migrate", verbosity=0, interactive=False)


def drop_tables() -> None:
    """Remove them, also those of a run that was killed."""
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SET client_min_messages = warning")
        cursor.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")


class Saves:
    """The ways to save a file that are compared, and what they have saved."""

    def __init__(self, hosts: list[str]) -> None:
        from django.conf import settings
        from django.core.files.storage import FileSystemStorage, storages

        from tribrick import catalog
        from tribrick.storage import VolumeStorage

        self.root = Path(settings.MEDIA_ROOT) / DIRECTORY
        self.saved: list[Callable[[], object]] = []
        self.numbers = itertools.count()

        class WithoutRows(VolumeStorage):
            catalogued = False

        django, volume = FileSystemStorage(), WithoutRows()

        def save(storage: Any) -> Callable[[Any, str], None]:
            def one(content: Any, name: str) -> None:
                stored = storage.save(name, content)
                self.saved.append(lambda: storage.delete(stored))

            return one

        def with_row(content: Any, name: str) -> None:
            row = catalog.add(content, name)
            self.saved.append(lambda: catalog.delete(row))

        self.ways: dict[str, Callable[[Any, str], None]] = {
            "django": save(django), "volume": save(volume), "row": with_row,
        }  # fmt: skip
        LOCAL.mkdir(mode=0o700)
        self.ways["local"] = save(FileSystemStorage(location=str(LOCAL)))
        if hosts:
            self.ways["hybrid"] = save(storages["hybrid"])

    def prepare(self) -> None:
        """Make the directories that a rollout makes for a site, for both sides alike."""
        from tribrick.storage import VolumeStorage

        storage = VolumeStorage()
        digits = ["".join(one) for one in itertools.product("0123456789abcdef", repeat=storage.hash_width)]
        for root in [self.root, *([LOCAL / DIRECTORY] if "hybrid" in self.ways else [])]:
            for path in itertools.product(digits, repeat=storage.hash_levels):
                root.joinpath(*path).mkdir(parents=True)

    def save(self, way: str, size: int) -> float:
        """Save one file and return the milliseconds it took; what is saved was made before."""
        number = next(self.numbers)
        name = f"{DIRECTORY}/picture-{number}.jpg"
        with content_of(size, number) as content:
            started = time.perf_counter()
            self.ways[way](content, name)
            return (time.perf_counter() - started) * 1000

    def clean(self) -> None:
        """Remove what was saved."""
        for remove in self.saved:
            remove()
        self.saved.clear()


@contextlib.contextmanager
def content_of(size: int, number: int) -> Iterator[Any]:
    """Yield an upload as Django hands it over: small ones in memory, large ones in a file."""
    from django.core.files.uploadedfile import InMemoryUploadedFile, TemporaryUploadedFile

    data = number.to_bytes(8, "big") + os.urandom(1024) * (size // 1024 + 1)
    if size <= IN_MEMORY:
        import io

        yield InMemoryUploadedFile(io.BytesIO(data[:size]), None, "picture.jpg", "image/jpeg", size, None)
        return
    file = TemporaryUploadedFile("picture.jpg", "image/jpeg", size, None)
    file.write(data[:size])
    file.flush()
    file.seek(0)
    try:
        yield file
    finally:
        with contextlib.suppress(FileNotFoundError):  # Django's storage has moved it away
            file.close()


def compare(saves: Saves, ways: list[str], size: int, rounds: int) -> dict[str, list[float]]:
    """Save in turns; every order of the turns is as frequent as any other."""
    orders = itertools.cycle(itertools.permutations(ways))
    times: dict[str, list[float]] = {way: [] for way in ways}
    for _ in range(rounds):
        for way in next(orders):
            times[way].append(saves.save(way, size))
    saves.clean()
    return times


def remove_directories() -> None:
    """Remove our directories, also those of a run that was killed."""
    from django.conf import settings

    for directory in (Path(settings.MEDIA_ROOT) / DIRECTORY, LOCAL):
        if directory.exists():
            shutil.rmtree(directory)


def measure(hosts: list[str]) -> None:
    """Carry out what standard input asks for."""
    configure(hosts)
    remove_directories()
    make_tables()
    try:
        saves = Saves(hosts)
        saves.prepare()
        say({"ready": sorted(saves.ways)})
        for line in sys.stdin:
            asked = json.loads(line)
            if asked["do"] == "compare":
                say({"times": compare(saves, asked["ways"], asked["size"], asked["rounds"])})
            elif asked["do"] == "save":
                say({"times": [saves.save(asked["way"], asked["size"]) for _ in range(asked["count"])]})
            elif asked["do"] == "clean":
                saves.clean()
                say({})
    finally:
        drop_tables()
        remove_directories()


def serve(port: int) -> None:
    """Be a media host, as role media_receiver makes it but for nginx in front, until standard input ends."""
    shutil.rmtree(HOST, ignore_errors=True)
    (HOST / "files").mkdir(mode=0o700, parents=True)
    (HOST / "state").mkdir(mode=0o700)
    places = {"TRIBRICK_RECEIVER_ROOT": str(HOST / "files"), "TRIBRICK_RECEIVER_STATE": str(HOST / "state")}
    options = [
        f"--bind=0.0.0.0:{port}",
        "--worker-class=gthread",
        "--threads=8",
        "--keep-alive=60",
        "--log-level=warning",
        "--no-control-socket",
    ]
    command = [sys.executable, "-P", "-m", "gunicorn", *options, "tribrick.receiver:application()"]
    receiver = subprocess.Popen(command, env={**os.environ, **places}, stdin=subprocess.DEVNULL, stdout=sys.stderr)
    try:
        wait_ready(receiver, port)
        say({"ready": "tribrick.receiver"})
        sys.stdin.read()
    finally:
        receiver.terminate()
        receiver.wait(30)
        shutil.rmtree(HOST, ignore_errors=True)


def wait_ready(receiver: subprocess.Popen[bytes], port: int) -> None:
    """Wait until the receiver answers."""
    end = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/-/ready")
            answer = connection.getresponse()
            if answer.status == 200:
                return
            seen = f"status {answer.status}"
        except OSError as error:
            seen = str(error)
        finally:
            connection.close()
        if receiver.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the receiver is not ready: {seen}")
        time.sleep(0.1)


def main() -> None:
    """Run the command line; an error is the answer."""
    try:
        if sys.argv[1] == "serve":
            serve(int(sys.argv[2]))
        else:
            measure(sys.argv[2:])
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):
            say({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
