"""Works on a node, in the site's environment, for the tests of this directory.

Reads commands as JSON, one a line, and answers each with one line. It has a directory of the mount for itself, with a
sentinel of its own, and a database of its own. So what a test breaks is never a file or a row of the site.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import io
import json
import multiprocessing
import os
import random
import secrets
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import django
from django.conf import settings

OPTIONS = json.loads(sys.argv[1])
ROOT = Path(OPTIONS["root"])


def configure() -> None:
    """Set up Django for the test's directory and database, with the site's access to both."""
    url = urlsplit(os.environ["DATABASE_URL"])
    settings.configure(
        SECRET_KEY="proof",
        USE_TZ=True,
        INSTALLED_APPS=["django.contrib.auth", "django.contrib.contenttypes", "tribrick"],
        DEFAULT_AUTO_FIELD="django.db.models.BigAutoField",
        DATABASES={
            "default": {
                "ENGINE": "django.db.backends.postgresql",
                "NAME": OPTIONS["database"],
                "USER": unquote(url.username or ""),
                "PASSWORD": unquote(url.password or ""),
                "HOST": url.hostname,
                "PORT": url.port or 5432,
                "OPTIONS": {"connect_timeout": 5},
            }
        },
        MEDIA_ROOT=str(ROOT),
        MEDIA_URL="/media/",
        FILE_UPLOAD_PERMISSIONS=0o644,
        STORAGES={
            "default": {"BACKEND": "tribrick.storage.VolumeStorage"},
            "undurable": {"BACKEND": "django.core.files.storage.FileSystemStorage"},
        },
        TRIBRICK={"SENTINEL_ID": OPTIONS["sentinel"], "NODE": OPTIONS["node"], **OPTIONS.get("tribrick", {})},
        LOGGING_CONFIG=None,
    )
    django.setup()


configure()

from django.core.files.base import ContentFile  # noqa: E402
from django.core.files.storage import storages  # noqa: E402
from django.core.management import CommandError, call_command  # noqa: E402
from django.db import connection, connections, transaction  # noqa: E402

from tribrick import audit, catalog  # noqa: E402
from tribrick.models import MediaFile  # noqa: E402
from tribrick.storage.guard import guard_for  # noqa: E402


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def told(row: MediaFile) -> dict[str, Any]:
    fields = ("name", "sha256", "size", "state", "version", "logical_id", "original", "node")
    return {field: getattr(row, field) for field in fields}


def outcome(work: Callable[[], Any]) -> dict[str, Any]:
    """Return what a piece of work gave or raised, and how long it took."""
    began = time.monotonic()
    try:
        said: dict[str, Any] = {"result": work()}
    except Exception as error:  # noqa: BLE001 - the test judges it
        said = {"error": type(error).__name__, "text": str(error)}
    return said | {"seconds": time.monotonic() - began}


# Commands


def hello() -> dict[str, Any]:
    return {"pid": os.getpid(), "django": django.get_version(), "python": sys.version.split()[0]}


def migrate() -> None:
    call_command("migrate", verbosity=0, interactive=False)


def add(name: str, size: int) -> dict[str, Any]:
    """Save random bytes; return the row, its hash taken from the bytes and not from the catalog."""
    content = os.urandom(size)
    return told(catalog.add(ContentFile(content), name)) | {"wanted": sha256(content)}


def write(directory: str, size: int) -> dict[str, Any]:
    """Write random bytes to a file opened under a new name, which is published when it is closed."""
    content, name = os.urandom(size), f"{directory}/opened-{secrets.token_hex(8)}.bin"
    with storages["default"].open(name, "wb") as file:
        file.write(content)
    return {"name": name, "wanted": sha256(content)}


def delete(name: str) -> dict[str, Any]:
    return told(catalog.delete(name))


def try_add(name: str, size: int, count: int = 1) -> list[dict[str, Any]]:
    """Save several times at once."""
    return at_once([lambda: add(name, size)] * count)


class Gated(ContentFile):  # type: ignore[type-arg]
    """Four pieces; the third is not given before the test says so. The first is written by then."""

    def __init__(self) -> None:
        super().__init__(b"")
        self.reached, self.gate = threading.Event(), threading.Event()

    def chunks(self, chunk_size: int | None = None) -> Iterator[bytes]:  # noqa: ARG002
        for number in range(4):
            if number == 2:
                self.reached.set()
                self.gate.wait(60)
            yield os.urandom(1024 * 1024)


half: list[Any] = []


def begin_add(name: str) -> bool:
    """Begin to save a file, and return when a part of it is on the mount."""
    source, answers = Gated(), []
    thread = threading.Thread(target=lambda: answers.extend(at_once([lambda: told(catalog.add(source, name))])))
    thread.start()
    half[:] = [source, thread, answers]
    return source.reached.wait(30)


def end_add(name: str, size: int, count: int) -> list[dict[str, Any]]:
    """Let the save that was begun go on, and save others at the same time; return what all of them gave."""
    source, thread, answers = half
    began = time.monotonic()
    source.gate.set()
    others = try_add(name, size, count)
    thread.join()
    answers[0]["seconds"] = time.monotonic() - began
    return answers + others


def try_delete(name: str) -> dict[str, Any]:
    return outcome(lambda: delete(name))


def at_once(work: list[Callable[[], Any]]) -> list[dict[str, Any]]:
    answers: list[dict[str, Any]] = []

    def one_of_them(one: Callable[[], Any]) -> None:
        answers.append(outcome(one))
        connections.close_all()

    threads = [threading.Thread(target=one_of_them, args=(one,)) for one in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return answers


def undurable(name: str, size: int, count: int) -> dict[str, str]:
    """Save as Django does, without fsync; return name -> SHA-256."""
    found = {}
    for _ in range(count):
        content = os.urandom(size)
        found[storages["undurable"].save(name, ContentFile(content))] = sha256(content)
    return found


def race(name: str, count: int, at: float, replaces: str | None = None) -> list[dict[str, Any]]:
    """Save the same client's name in several processes at the same moment; return what each was told."""
    connections.close_all()
    context = multiprocessing.get_context("fork")
    with context.Pool(count) as pool:
        return pool.starmap(_racer, [(name, at, replaces)] * count, chunksize=1)


def _racer(name: str, at: float, replaces: str | None) -> dict[str, Any]:
    content = os.urandom(random.randrange(20_000, 60_000))
    old = MediaFile.objects.get(name=replaces) if replaces else None
    connection.ensure_connection()
    if at - time.time() > 0:
        time.sleep(at - time.time())  # a moment that all processes on all nodes know
    began = time.time()
    file = ContentFile(content)
    said = outcome(lambda: told(catalog.replace(old, file, name) if old else catalog.add(file, name)))
    connections.close_all()
    return said | {"wanted": sha256(content), "began": began, "pid": os.getpid()}


def rows() -> list[dict[str, Any]]:
    return [told(row) for row in MediaFile.objects.order_by("name")]


def versions(name: str) -> list[dict[str, Any]]:
    file = MediaFile.objects.get(name=name)
    now = catalog.current(file)
    return [told(row) | {"current": row == now} for row in catalog.versions(file)]


def walk() -> dict[str, str]:
    """Return every file below the root with its hash, past all code that is tested."""
    found = {}
    for directory, _directories, files in os.walk(ROOT):
        for file in files:
            path = Path(directory, file)
            name = str(path.relative_to(ROOT))
            if name.startswith((".tribrick-volume", audit.QUARANTINE)):
                continue
            with contextlib.suppress(FileNotFoundError):
                found[name] = sha256(path.read_bytes())
    return found


def hashes(names: list[str]) -> dict[str, str | None]:
    """Return the hash of the bytes under each name, None for what is not there."""
    return {name: sha256((ROOT / name).read_bytes()) if (ROOT / name).is_file() else None for name in names}


def guard() -> dict[str, Any]:
    one = guard_for(str(ROOT), OPTIONS.get("tribrick", {}).get("OUTSTANDING", 8))
    return {"state": one.state, "overdue": one.overdue, "workers": one.workers}


def calls_inside() -> dict[str, int]:
    """Return how many threads of this process are inside a system call about the mount.

    A thread that waits for a lock, a socket or its next command is in futex, poll, recv or read of a pipe.
    """
    found: dict[str, int] = {}
    for task in Path("/proc/self/task").iterdir():
        with contextlib.suppress(OSError):
            wchan = (task / "wchan").read_text()
            if "fuse" in wchan or "request_wait" in wchan:
                found[wchan] = found.get(wchan, 0) + 1
    return found


def command(*words: str) -> dict[str, Any]:
    """Run ``manage.py tribrick ...`` in this process."""
    out = io.StringIO()
    code = 0
    try:
        call_command("tribrick", *words, "--json", stdout=out, stderr=io.StringIO())
    except CommandError as error:
        code = error.returncode
        out.write(f"\n{error}")
    said = out.getvalue()
    with contextlib.suppress(ValueError):
        return {"code": code, "said": json.JSONDecoder().raw_decode(said[said.index("{"):])[0]}
    return {"code": code, "said": said}


def age() -> None:
    """Let sweep and audit take all files for old ones: nobody can set a file's time of change."""
    from datetime import datetime, timedelta, timezone

    audit.settled_before = lambda: datetime.now(timezone.utc) + timedelta(hours=1)
    audit.YOUNG = timedelta(hours=-1)


# Kills


class Tripwire:
    """Counts the steps that a piece of work takes, and kills the process before or after one of them."""

    CALLS = ("open", "write", "fsync", "close", "unlink", "mkdir", "stat")

    def __init__(self, at: int | None) -> None:
        self.at = at
        self.seen: list[str] = []
        self.lock = threading.Lock()

    def step(self, label: str) -> None:
        with self.lock:
            number = len(self.seen)
            self.seen.append(label)
            if number == self.at:
                os.kill(os.getpid(), signal.SIGKILL)
                signal.pause()

    @contextlib.contextmanager
    def armed(self) -> Iterator[None]:
        """Watch the calls on the mount, the statements and the commits. Only ever in a process made for it."""

        def watched(name: str, real: Callable[..., Any]) -> Callable[..., Any]:
            def call(*args: Any, **kwargs: Any) -> Any:
                self.step(f"before {name}")
                result = real(*args, **kwargs)
                self.step(f"after {name}")
                return result

            return call

        def statement(execute: Any, sql: str, params: Any, many: bool, context: Any) -> Any:
            what = sql.split()[0]
            self.step(f"before {what}")
            result = execute(sql, params, many, context)
            self.step(f"after {what}")
            return result

        connection.ensure_connection()
        kept = {name: getattr(os, name) for name in self.CALLS}
        commit = connection._commit
        for name, real in kept.items():
            setattr(os, name, watched(name, real))
        connection._commit = watched("COMMIT", commit)
        try:
            with connection.execute_wrapper(statement):
                yield
        finally:
            for name, real in kept.items():
                setattr(os, name, real)
            connection._commit = commit


WORK: dict[str, Callable[[str, int], Any]] = {
    "add": lambda name, size: catalog.add(ContentFile(os.urandom(size)), name),
    "replace": lambda name, size: catalog.replace(MediaFile.objects.get(name=name), ContentFile(os.urandom(size))),
    "delete": lambda name, _size: catalog.delete(name),
}


def steps(kind: str, name: str, size: int) -> list[str]:
    """Return the steps of one piece of work, in order."""
    wire = Tripwire(None)
    with wire.armed():
        WORK[kind](name, size)
    return wire.seen


def kill(kind: str, name: str, size: int, at: int) -> str:
    """Do a piece of work in a process of its own that is killed at one step; return how it ended."""
    connections.close_all()
    child = os.fork()
    if child == 0:
        try:
            with Tripwire(at).armed():
                WORK[kind](name, size)
        finally:
            os._exit(3)
    _, status = os.waitpid(child, 0)
    return "killed" if os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGKILL else f"ended with {status}"


COMMANDS: dict[str, Callable[..., Any]] = {
    work.__name__: work
    for work in (
        hello, migrate, add, write, delete, try_add, begin_add, end_add, try_delete, undurable, race, rows, versions,
        walk, hashes, guard, calls_inside, command, age, steps, kill,
    )
}  # fmt: skip


def run(name: str, args: list[Any], kwargs: dict[str, Any]) -> Any:
    return COMMANDS[name](*args, **kwargs)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w", buffering=1)
    os.dup2(2, 1)  # what anything else prints is no answer
    for line in sys.stdin:
        answer = outcome(functools.partial(run, *json.loads(line)))
        if not transaction.get_connection().in_atomic_block:
            connection.close_if_unusable_or_obsolete()
        answers.write(json.dumps(answer) + "\n")


if __name__ == "__main__":
    main()
