"""Real media hosts in threads, and a site that keeps its files on them."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.conf import settings
from django.core.files.storage import storages
from django.db import connection
from django.test import override_settings

from tribrick.testing import TestHttpServer

if not apps.is_installed("tribrick"):
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "tribrick"]
    apps.set_installed_apps(settings.INSTALLED_APPS)

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[3]
BACKENDS = {
    "hybrid": "tribrick.storage.HybridStorage",
    "async": "tribrick.storage.AsyncStorage",
    "distributed": "tribrick.storage.DistributedStorage",
}


@pytest.fixture
def servers() -> Iterator[Callable[[int], list[TestHttpServer]]]:
    """Start media hosts."""
    with contextlib.ExitStack() as stack:
        yield lambda count: [stack.enter_context(TestHttpServer()) for _ in range(count)]


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Make a storage the site's default one: ``site("hybrid", servers, TIMEOUT=1)``."""
    with contextlib.ExitStack() as stack:

        def configure(kind: str, hosts: list[TestHttpServer], options: Any = None, **tribrick: Any) -> Any:
            local = {} if kind == "distributed" else {"location": str(tmp_path / "local")}
            Path(tmp_path / "local").mkdir(exist_ok=True)
            stack.enter_context(
                override_settings(
                    STORAGES={
                        **settings.STORAGES,
                        "default": {"BACKEND": BACKENDS[kind], "OPTIONS": {**local, **(options or {})}},
                    },
                    TRIBRICK={
                        **settings.TRIBRICK,
                        "MEDIA_HOSTS": [server.host for server in hosts],
                        "TIMEOUT": 0.8,
                        **tribrick,
                    },
                )
            )
            vars(storages).update(backends=settings.STORAGES, _storages={})  # 4.2 loses overridden OPTIONS
            return storages["default"]

        yield configure


@pytest.fixture
def local_files(tmp_path: Path) -> Callable[[], list[str]]:
    """Return the names of the local copies."""
    root = tmp_path / "local"
    return lambda: sorted(str(path.relative_to(root)) for path in root.rglob("*") if path.is_file())


@pytest.fixture
def database(postgresql: None) -> Iterator[None]:
    """The database; only what the package writes is emptied, which is quicker than a flush."""
    yield
    connection.close()
    with connection.cursor() as cursor:
        tables = ", ".join(model._meta.db_table for model in apps.get_app_config("tribrick").get_models())
        cursor.execute(f"TRUNCATE {tables} CASCADE")
    connection.close()


@pytest.fixture(autouse=True)
def _no_late_puts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Do not wait a minute for what the tests wait for themselves."""
    from tribrick import outbox

    monkeypatch.setattr(outbox, "LATE", 0.0)
    monkeypatch.setattr(outbox, "SOON", 0.0)


@pytest.fixture
def make_due() -> Callable[[], None]:
    """Let the waiting work of the outbox be due."""
    from django.utils import timezone

    from tribrick.models import Outbox

    return lambda: Outbox.objects.filter(done=None).update(not_before=timezone.now()) and None


@pytest.fixture
def waiting() -> Callable[[], list[tuple[str, str]]]:
    """Return the operation and the host of what waits in the outbox."""
    from tribrick.models import Outbox

    rows = Outbox.objects.filter(done=None).exclude(operation="intent")
    return lambda: sorted(rows.all().values_list("operation", "host"))


@pytest.fixture
def process() -> Iterator[Callable[[str], subprocess.Popen[str]]]:
    """Start another process of the site as it is configured now, which runs some code."""
    started: list[subprocess.Popen[str]] = []

    def start(code: str) -> subprocess.Popen[str]:
        given = {"default": settings.STORAGES["default"], "tribrick": dict(settings.TRIBRICK)}
        running = subprocess.Popen(
            [sys.executable, "-c", f"import django; django.setup()\n{code}"],
            env=_environment() | {"DJANGO_SETTINGS_MODULE": "settings", "REMOTE_TEST": json.dumps(given)},
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


def _environment() -> dict[str, str]:
    paths = [str(SOURCES / "src"), str(SOURCES / "example"), str(HERE)]
    return os.environ | {"PYTHONPATH": os.pathsep.join(paths)}


@pytest.fixture(scope="module")
def _forks() -> Iterator[subprocess.Popen[str]]:
    given = {"default": settings.STORAGES["default"], "tribrick": {}}
    with subprocess.Popen(
        [sys.executable, str(HERE / "forks.py")],
        env=_environment() | {"DJANGO_SETTINGS_MODULE": "settings", "REMOTE_TEST": json.dumps(given)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as running:
        yield running
        assert running.stdin is not None
        running.stdin.close()
        running.wait(30)


@pytest.fixture
def forked(_forks: subprocess.Popen[str]) -> Callable[[str], tuple[int, str]]:
    """Run code in another process of the site as it is configured now; return its code and standard error.

    The process is a fork of one that has started before, which takes a tenth of the time.
    """

    def run(code: str) -> tuple[int, str]:
        given = {"storage": settings.STORAGES["default"], "tribrick": dict(settings.TRIBRICK), "code": code}
        assert _forks.stdin is not None
        assert _forks.stdout is not None
        _forks.stdin.write(json.dumps(given) + "\n")
        _forks.stdin.flush()
        answer = json.loads(_forks.stdout.readline())
        return answer["code"], answer["said"]

    return run
