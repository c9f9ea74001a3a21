"""Runs on a node in the site's environment, for ``./scripts/bench upload``: a plain Django site.

It takes an upload as the example site does, stores it with Django's ``FileSystemStorage`` (on the mount or on local
disk) and writes one row. No fsync, no hash, no catalog.

``benchnode_upload.py serve PORT PROCESSES THREADS``   runs it until standard input ends, then cleans up
``benchnode_upload.py app PORT PROCESSES THREADS``     is the web server itself
"""

from __future__ import annotations

import contextlib
import http.client
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

DIRECTORY = "bench-upload"  # on the mount
SCHEMA = "tribrick_bench_upload"  # a table of our own beside the site's
LOCAL = Path("/var/tmp/tribrick-bench-upload")  # noqa: S108  this user's own


def say(answer: dict[str, Any]) -> None:
    """Answer with one line."""
    print(json.dumps(answer), flush=True)


def storage(way: str) -> Any:
    """Return Django's own storage, on the mount or on local disk."""
    from django.core.files.storage import FileSystemStorage

    return FileSystemStorage() if way == "stock" else FileSystemStorage(location=str(LOCAL))


class Urls:
    """The addresses; in place of a module."""

    def __init__(self) -> None:
        from django.urls import path

        self.urlpatterns = [path("alive", self.alive), path("<str:way>/", self.upload)]

    @staticmethod
    def alive(_request: Any) -> Any:
        """Answer."""
        from django.http import HttpResponse

        return HttpResponse(status=204)

    @staticmethod
    def upload(request: Any, way: str) -> Any:
        """Store the file, write a row, tell its name."""
        from django.db import connection
        from django.http import JsonResponse

        file = request.FILES["file"]
        name = storage(way).save(f"{DIRECTORY}/{file.name}", file)
        with connection.cursor() as cursor:
            cursor.execute("INSERT INTO uploads (name, size) VALUES (%s, %s)", [name, file.size])
        return JsonResponse({"name": name}, status=201)


def configure() -> None:
    """Take the site's database and media root, and nothing else of the site."""
    import django
    from django.conf import Settings, settings

    site: Any = Settings(os.environ["DJANGO_SETTINGS_MODULE"])
    database = dict(site.DATABASES["default"])
    options = dict(database.get("OPTIONS", {}))
    options["options"] = f"{options.get('options', '')} -c search_path={SCHEMA}".strip()
    settings.configure(
        DATABASES={"default": {**database, "OPTIONS": options}},
        MEDIA_ROOT=site.MEDIA_ROOT,
        SECRET_KEY=site.SECRET_KEY,
        ALLOWED_HOSTS=["*"],
        FILE_UPLOAD_PERMISSIONS=site.FILE_UPLOAD_PERMISSIONS,
        ROOT_URLCONF=Urls(),
        LOGGING={  # why an upload failed goes to the bench's log
            "version": 1,
            "disable_existing_loggers": False,
            "handlers": {"stderr": {"class": "logging.StreamHandler"}},
            "root": {"handlers": ["stderr"], "level": "WARNING"},
        },
        USE_TZ=True,
    )
    django.setup()


def clean() -> None:
    """Remove files and table, also those of a run that was killed."""
    from django.conf import settings
    from django.db import connection

    with connection.cursor() as cursor:
        cursor.execute("SET client_min_messages = warning")
        cursor.execute(f"DROP SCHEMA IF EXISTS {SCHEMA} CASCADE")
    for directory in (Path(settings.MEDIA_ROOT) / DIRECTORY, LOCAL):
        if directory.exists():
            shutil.rmtree(directory)


def app(port: int, processes: int, threads: int) -> None:
    """Be the web server, with as many processes and threads as the site's."""
    from gunicorn.app.base import BaseApplication  # type: ignore[import-untyped]  # shipped without types

    class Server(BaseApplication):  # type: ignore[misc]  # its base has no types
        def load_config(self) -> None:
            given = {"bind": f"127.0.0.1:{port}", "workers": processes, "worker_class": "gthread", "threads": threads}
            given |= {"keepalive": 60, "graceful_timeout": 10, "loglevel": "warning"}
            for name, value in given.items():
                self.cfg.set(name, value)
            if "control_socket_disable" in self.cfg.settings:
                self.cfg.set("control_socket_disable", True)

        def load(self) -> Any:
            from django.core.wsgi import get_wsgi_application

            return get_wsgi_application()

    Server().run()


def serve(words: list[str]) -> None:
    """Run it until standard input ends."""
    from django.db import connection

    clean()
    command = [sys.executable, "-P", __file__, "app", *words]
    server = None
    try:
        LOCAL.mkdir(mode=0o700)
        with connection.cursor() as cursor:
            cursor.execute(f"CREATE SCHEMA {SCHEMA}")
            cursor.execute("CREATE TABLE uploads (id bigserial PRIMARY KEY, name text, size bigint)")
        server = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=sys.stderr)
        wait_alive(server, int(words[0]))
        say({"ready": "a plain Django site"})
        sys.stdin.read()
    finally:
        if server is not None:
            end(server)
        clean()


def end(server: subprocess.Popen[bytes]) -> None:
    """End the web server; nobody waits for its answers any more."""
    server.send_signal(signal.SIGQUIT)  # gunicorn's quick shutdown
    try:
        server.wait(30)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def wait_alive(server: subprocess.Popen[bytes], port: int) -> None:
    """Wait until it answers."""
    end = time.monotonic() + 60
    while True:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        try:
            connection.request("GET", "/alive")
            answer = connection.getresponse()
            if answer.status == 204:
                return
            seen = f"status {answer.status}"
        except OSError as error:
            seen = str(error)
        finally:
            connection.close()
        if server.poll() is not None or time.monotonic() > end:
            raise RuntimeError(f"the plain site does not answer: {seen}")
        time.sleep(0.1)  # between two tries; the deadline is above


def main() -> None:
    """Run the command line; an error is the answer."""
    configure()
    if sys.argv[1] == "app":
        port, processes, threads = map(int, sys.argv[2:])
        app(port, processes, threads)
        return
    try:
        serve(sys.argv[2:])
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):
            say({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
