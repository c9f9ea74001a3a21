"""Three nodes in one process: a spool and a real receiver each, one volume, one catalog."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import pytest
from django.apps import apps
from django.conf import settings
from django.core.files.storage import storages
from django.db import connection
from django.test import override_settings

from tribrick import names
from tribrick.receiver import Receiver
from tribrick.storage import mount

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[3]
NODES = ("node1", "node2", "node3")


class _Server(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


class Spool:
    """The spool of one node: its directory, and its receiver as the peers reach it."""

    def __init__(self, work: Path) -> None:
        self.root, self.state = work / "spool", work / "state"
        for directory in (self.root, self.state):
            directory.mkdir(parents=True)
        self.slow = 0.0
        self.options: dict[str, Any] = {}
        self.log: list[tuple[str, str]] = []
        self._port = 0
        self.start()

    def start(self, **options: Any) -> None:
        """Listen, on the same port as before."""
        self.receiver = Receiver(self.root, self.state, lists=True, **options)
        self._server = make_server("127.0.0.1", self._port, self._answer, _Server, _Quiet)
        self._port = self._server.server_port
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Be away: connections are refused."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()

    def restart(self, **options: Any) -> None:
        """Start again with other options of the receiver."""
        self.stop()
        self.start(**options)

    def _answer(self, environ: Any, start_response: Any) -> Any:
        assert environ["PATH_INFO"].startswith("/spool/")
        environ["PATH_INFO"] = environ["PATH_INFO"].removeprefix("/spool")
        self.log.append((environ["REQUEST_METHOD"], environ["PATH_INFO"]))
        time.sleep(self.slow)
        return self.receiver(environ, start_response)

    @property
    def host(self) -> str:
        return f"127.0.0.1:{self._port}"

    def files(self) -> dict[str, bytes]:
        """What lies in it under a name."""
        found = {str(path.relative_to(self.root)): path for path in self.root.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in found.items() if not name.startswith(".")}


class Cluster:
    """Nodes by name. What is done in ``with cluster.on("node2")`` is done there."""

    def __init__(self, work: Path) -> None:
        self.volume = Path(settings.MEDIA_ROOT)
        self.spools = {node: Spool(work / node) for node in NODES}
        self.options: dict[str, Any] = {}

    def tribrick(self, node: str, **options: Any) -> dict[str, Any]:
        """Return the setting of a node."""
        return {
            **settings.TRIBRICK,
            "NODE": node,
            "SPOOL": str(self.spools[node].root),
            "SPOOL_PEERS": [spool.host for name, spool in self.spools.items() if name != node],
            "TIMEOUT": 5.0,
            **self.options,
            **options,
        }

    @contextlib.contextmanager
    def on(self, node: str, **options: Any) -> Iterator[None]:
        """Be this node."""
        with override_settings(TRIBRICK=self.tribrick(node, **options)):
            yield

    # The volume.

    @contextlib.contextmanager
    def volume_away(self) -> Iterator[None]:
        """Not mounted: there is no sentinel."""
        sentinel, aside = self.volume / ".tribrick-volume", self.volume.with_name("sentinel.aside")
        sentinel.rename(aside)
        try:
            yield
        finally:
            aside.rename(sentinel)

    def on_volume(self) -> dict[str, bytes]:
        """All files of the volume, unfinished ones too."""
        found = {str(path.relative_to(self.volume)): path for path in self.volume.rglob("*") if path.is_file()}
        return {name: path.read_bytes() for name, path in found.items() if name != ".tribrick-volume"}

    def holders(self, name: str) -> list[str]:
        """The nodes whose spool has the file."""
        return [node for node, spool in self.spools.items() if name in spool.files()]

    def in_spools(self) -> set[str]:
        """The names in any spool."""
        return {name for spool in self.spools.values() for name in spool.files()}

    def drain(self, *nodes: str) -> list[Any]:
        """Drain on these nodes, one after the other; return the reports."""
        from tribrick.drain import Drain

        reports = []
        for node in nodes or NODES:
            with self.on(node):
                reports.append(Drain().run())
        return reports


@pytest.fixture
def database(postgresql: None) -> Iterator[None]:
    """The database; only what the package writes is emptied, which is quicker than a flush."""
    yield
    connection.close()
    with connection.cursor() as cursor:
        tables = ", ".join(model._meta.db_table for model in apps.get_app_config("tribrick").get_models())
        cursor.execute(f"TRUNCATE {tables} CASCADE")
    connection.close()


@pytest.fixture
def cluster(database: None, media: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Cluster]:
    """Three nodes; the test itself runs on ``node1``."""
    monkeypatch.setattr("tribrick.receiver.Usage.EVERY", 0.0)
    monkeypatch.setattr("tribrick.receiver.Usage.RATIO", 0.0)
    mount._room.clear()
    vars(storages).update(_storages={})
    made = Cluster(tmp_path)
    with made.on("node1"):
        yield made
    for spool in made.spools.values():
        with contextlib.suppress(Exception):
            spool.stop()


def _environment() -> dict[str, str]:
    paths = [str(SOURCES / "src"), str(SOURCES / "example"), str(HERE.parent / "remote")]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths), "DJANGO_SETTINGS_MODULE": "settings"}


@pytest.fixture
def process(cluster: Cluster) -> Iterator[Callable[[str, str], subprocess.Popen[str]]]:
    """Start another process of the site on a node, which runs some code."""
    started: list[subprocess.Popen[str]] = []

    def start(node: str, code: str) -> subprocess.Popen[str]:
        given = {"default": settings.STORAGES["default"], "tribrick": cluster.tribrick(node)}
        running = subprocess.Popen(
            [sys.executable, "-c", f"import django; django.setup()\n{code}"],
            env=_environment() | {"REMOTE_TEST": json.dumps(given)},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        started.append(running)
        return running

    yield start
    for running in started:
        if running.poll() is None:
            running.kill()
        running.communicate()


@pytest.fixture(scope="module")
def _forks() -> Iterator[subprocess.Popen[str]]:
    given = {"default": settings.STORAGES["default"], "tribrick": {}}
    with subprocess.Popen(
        [sys.executable, str(HERE.parent / "remote" / "forks.py")],
        env=_environment() | {"REMOTE_TEST": json.dumps(given)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        yield running
        assert running.stdin is not None
        running.stdin.close()
        running.wait(30)


@pytest.fixture
def forked(_forks: subprocess.Popen[str], cluster: Cluster) -> Callable[[str, str], tuple[int, str]]:
    """Run code in another process of the site on a node; return its exit code and standard error."""

    def run(node: str, code: str) -> tuple[int, str]:
        given = {"storage": settings.STORAGES["default"], "tribrick": cluster.tribrick(node), "code": code}
        assert _forks.stdin is not None and _forks.stdout is not None
        _forks.stdin.write(json.dumps(given) + "\n")
        _forks.stdin.flush()
        answer = json.loads(_forks.stdout.readline())
        return answer["code"], answer["said"]

    return run


@pytest.fixture
def empty(cluster: Cluster) -> Callable[[], None]:
    """Take everything away between two rounds of one test."""

    def clear() -> None:
        for place in (cluster.volume, *(spool.root for spool in cluster.spools.values())):
            for entry in place.iterdir():
                if entry.is_dir() and not entry.name.startswith(".tribrick-incoming"):
                    shutil.rmtree(entry)
        with connection.cursor() as cursor:
            cursor.execute("TRUNCATE tribrick_mediafile, tribrick_media, tribrick_change CASCADE")

    return clear


@pytest.fixture
def new_token() -> Callable[[], str]:
    """Give :func:`names.new_token`."""
    return names.new_token
