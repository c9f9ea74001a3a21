"""Management commands of the example site, and the site in a process of its own."""

from __future__ import annotations

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


def test_wsgi_module() -> None:
    done = _run("-c", "from example.wsgi import application; print(callable(application))")
    assert done.stdout == "True\n", done.stderr


def test_the_site_runs_on_sqlite_for_unit_tests(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/db"
    done = _run("-m", "example", "migrate", "-v", "0", DATABASE_URL=url)
    assert done.returncode == 0, done.stderr
    done = _run("-m", "example", "ensure_account", "ada", DATABASE_URL=url)
    assert done.stdout == "changed\n", done.stderr
