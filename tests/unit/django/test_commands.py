"""Management commands of the example site, and the site in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import authenticate, get_user_model
from django.core.management import CommandError, call_command
from django.test import Client

SOURCES = Path(__file__).resolve().parents[3]


@pytest.fixture
def ensure(database: None, capsys: pytest.CaptureFixture[str]) -> Any:
    def run(*arguments: str) -> str:
        call_command("ensure_account", *arguments)
        return capsys.readouterr().out.strip()

    return run


def test_ensure_account(ensure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("P", "one")
    monkeypatch.setenv("T", "token-one")
    arguments = ["ada", "--superuser", "--password-env", "P", "--token-env", "T"]
    assert ensure(*arguments) == "changed"
    assert ensure(*arguments) == "unchanged"
    assert ensure("ada") == "unchanged"
    user = authenticate(username="ada", password="one")
    assert user
    assert user.is_superuser
    assert user.is_staff

    def status(token: str) -> int:
        return Client().get("/api/media/", HTTP_AUTHORIZATION=f"Token {token}").status_code

    assert status("token-one") == 200
    monkeypatch.setenv("P", "two")
    monkeypatch.setenv("T", "token-two")
    assert ensure(*arguments) == "changed"
    assert ensure(*arguments) == "unchanged"
    assert authenticate(username="ada", password="one") is None
    assert authenticate(username="ada", password="two")
    assert (status("token-one"), status("token-two")) == (401, 200)


def test_ensure_account_without_secrets(ensure: Any) -> None:
    assert ensure("bob") == "changed"
    assert ensure("bob") == "unchanged"
    user = get_user_model().objects.get(username="bob")
    assert not user.has_usable_password()
    assert not user.is_superuser


def test_ensure_account_refuses(ensure: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("P", raising=False)
    with pytest.raises(CommandError, match="variable P is not set"):
        ensure("ada", "--password-env", "P")
    assert not get_user_model().objects.exists()
    monkeypatch.setenv("T", "shared")
    ensure("ada", "--token-env", "T")
    with pytest.raises(CommandError, match="another account"):
        ensure("bob", "--token-env", "T")
    assert not get_user_model().objects.filter(username="bob").exists()


def test_models_and_migrations_agree(database: None) -> None:
    call_command("makemigrations", "--check", "--dry-run", verbosity=0)


def _run(*arguments: str, **changed: str) -> subprocess.CompletedProcess[str]:
    paths = os.pathsep.join([str(SOURCES / "src"), str(SOURCES / "example")])
    return subprocess.run(
        [sys.executable, *arguments],
        env=os.environ | {"PYTHONPATH": paths} | changed,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def test_deployment_checks_pass() -> None:
    done = _run("-m", "example", "check", "--fail-level", "ERROR")
    assert done.returncode == 0, done.stderr
    done = _run(str(SOURCES / "example" / "manage.py"), "version")
    assert done.returncode == 0, done.stderr


def test_missing_settings_are_named() -> None:
    done = _run("-m", "example", "check", SECRET_KEY="", MEDIA_ROOT="")
    assert done.returncode != 0
    assert "Not set in the environment: SECRET_KEY, MEDIA_ROOT." in done.stderr


LOOK = """
import json
import django
django.setup()
from django.conf import settings
from django.core.files.storage import storages
from example.gallery.health import readyz
answer = json.loads(readyz().content)
told = {"storage": type(storages["default"]).__name__, "tribrick": settings.TRIBRICK, "ready": answer["checks"]}
told |= {"modes": [settings.FILE_UPLOAD_PERMISSIONS, settings.FILE_UPLOAD_DIRECTORY_PERMISSIONS]}
print(json.dumps(told))
"""
KIT = {
    "TRIBRICK_NODES": "node1,node2,node3",
    "TRIBRICK_LEDGER": "/var/lib/tribrick/ledger.sqlite",
    "TRIBRICK_COPIES": '[{"name": "node1", "kind": "hashes", "address": "https://node1:8443/"}]',
    "TRIBRICK_SPOOL": "/srv/media-spool",
    "TRIBRICK_SPOOL_PEERS": "192.0.2.2:8443,192.0.2.3:8443",
    "TRIBRICK_SPOOL_COPIES": "3",
    "TRIBRICK_SPOOL_LIMIT": "1000000",
    "TRIBRICK_CLOSED": "/etc/tribrick/uploads-held",
    "TRIBRICK_MEDIA_HOSTS": "192.0.2.1:8080,192.0.2.2:8080,192.0.2.3:8080",
    "TRIBRICK_WRITE_QUORUM": "2",
    "TRIBRICK_TRANSPORT": "{}",
}


@pytest.mark.parametrize(
    ("backend", "storage", "modes"),
    [
        ("volume", "VolumeStorage", [0o644, None]),
        ("hybrid", "HybridStorage", [0o664, 0o775]),
        ("async", "AsyncStorage", [0o664, 0o775]),
        ("distributed", "DistributedStorage", [0o644, None]),
    ],
)
def test_backends(database: None, media: Path, backend: str, storage: str, modes: list[int | None]) -> None:
    kit = dict(KIT)
    for unneeded in {"volume": [], "distributed": ["TRIBRICK_SENTINEL_ID", "MEDIA_ROOT"]}.get(
        backend, ["TRIBRICK_SENTINEL_ID"]
    ):
        kit[unneeded] = ""
    done = _run("-c", LOOK, TRIBRICK_BACKEND=backend, **kit)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert (told["storage"], told["modes"]) == (storage, modes)
    assert told["tribrick"] == {
        "NODE": "node7",
        "NODES": ["node1", "node2", "node3"],
        "LEDGER": "/var/lib/tribrick/ledger.sqlite",
        "COPIES": [{"name": "node1", "kind": "hashes", "address": "https://node1:8443/"}],
        "SPOOL": "/srv/media-spool",
        "SPOOL_PEERS": ["192.0.2.2:8443", "192.0.2.3:8443"],
        "SPOOL_COPIES": 3,
        "SPOOL_LIMIT": 1000000,
        "SYNC": {},
        "CLOSED": "/etc/tribrick/uploads-held",
        "MEDIA_HOSTS": ["192.0.2.1:8080", "192.0.2.2:8080", "192.0.2.3:8080"],
        "WRITE_QUORUM": 2,
        "TRANSPORT": {},
        "SENTINEL_ID": "" if backend != "volume" else told["tribrick"]["SENTINEL_ID"],
        "HASH_LEVELS": 2,
        "HASH_WIDTH": 1,
    }
    assert {name: check["ok"] for name, check in told["ready"].items()} == (
        {"database": True} if backend == "distributed" else {"mount": True, "database": True}
    )


def test_not_ready_where_nothing_can_be_written(database: None) -> None:
    kit = KIT | {"TRIBRICK_BACKEND": "hybrid"}
    for root, sentence in (("/proc/self", "/proc/self cannot be written to"), ("/nowhere", "cannot be opened")):
        done = _run("-c", LOOK, **kit, MEDIA_ROOT=root)
        assert done.returncode == 0, done.stderr
        check = json.loads(done.stdout)["ready"]["mount"]
        assert not check["ok"]
        assert sentence in check["detail"]


@pytest.mark.parametrize(
    ("changed", "sentence"),
    [
        ({"TRIBRICK_BACKEND": "cloud"}, "TRIBRICK_BACKEND must be one of volume, hybrid, async, distributed"),
        ({"TRIBRICK_BACKEND": "hybrid"}, "Not set in the environment: TRIBRICK_MEDIA_HOSTS."),
        ({"TRIBRICK_SENTINEL_ID": ""}, "Not set in the environment: TRIBRICK_SENTINEL_ID."),
        ({"TRIBRICK_COPIES": "{}"}, "TRIBRICK_COPIES must be a JSON array"),
    ],
)
def test_bad_settings_are_said(changed: dict[str, str], sentence: str) -> None:
    done = _run("-m", "example", "check", **changed)
    assert done.returncode != 0
    assert sentence in done.stderr


def test_wsgi_module() -> None:
    done = _run("-c", "from example.wsgi import application; print(callable(application))")
    assert done.stdout == "True\n", done.stderr


def test_the_site_runs_on_sqlite_for_unit_tests(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/db"
    done = _run("-m", "example", "migrate", "-v", "0", DATABASE_URL=url)
    assert done.returncode == 0, done.stderr
    done = _run("-m", "example", "ensure_account", "ada", DATABASE_URL=url)
    assert done.stdout == "changed\n", done.stderr
