"""The system checks: storages that would store nothing, and settings of the older packages."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from django.core.checks import run_checks
from django.test import override_settings

from tribrick import checks
from tribrick.storage import DistributedStorage

REMOTE = {"default": {"BACKEND": "tribrick.storage.DistributedStorage"}}


def found() -> dict[str, Any]:
    return {message.id: message for message in run_checks(tags=["tribrick"])}


def test_a_good_site_has_nothing_to_report() -> None:
    with override_settings(STORAGES=REMOTE, TRIBRICK={"MEDIA_HOSTS": ["10.0.0.1"]}):
        assert found() == {}
    with override_settings(STORAGES={"default": {"BACKEND": "django.core.files.storage.FileSystemStorage"}}):
        assert found() == {}


@pytest.mark.parametrize(
    "tribrick",
    [
        {},
        {"MEDIA_HOSTS": "10.0.0.1"},
        {"MEDIA_HOSTS": ["a"], "WRITE_QUORUM": 2},
        {"MEDIA_HOSTS": ["a"], "TRANSPORT": {"base_url": "/?a"}},
    ],
)
def test_a_storage_that_cannot_work_is_an_error(tribrick: Any) -> None:
    with override_settings(STORAGES=REMOTE, TRIBRICK=tribrick):
        messages = found()
    assert list(messages) == ["tribrick.E001"]
    assert 'STORAGES["default"]' in messages["tribrick.E001"].msg


VOLUME = {"default": {"BACKEND": "tribrick.storage.VolumeStorage", "OPTIONS": {"location": "/nowhere"}}}


@pytest.mark.parametrize(
    ("tribrick", "said"),
    [
        ({}, "SENTINEL_ID"),
        ({"SENTINEL_ID": "x", "DEADLINE": -1}, "DEADLINE"),
        ({"SENTINEL_ID": "x", "SENTINAL_NAME": "y"}, "unknown keys: SENTINAL_NAME"),
        ({"SENTINEL_ID": "x", "COPIES": [{"name": "a", "kind": "path"}]}, "needs name, kind and address"),
    ],
)
def test_settings_that_the_first_upload_would_stumble_over(tribrick: Any, said: str) -> None:
    with override_settings(STORAGES=VOLUME, TRIBRICK=tribrick):
        assert said in found()["tribrick.E004"].msg
    with override_settings(STORAGES=VOLUME, TRIBRICK={"SENTINEL_ID": False}):
        assert found() == {}


def test_the_app_is_asked_for() -> None:
    without = [app for app in _apps() if app != "tribrick"]
    with override_settings(STORAGES=REMOTE, TRIBRICK={"MEDIA_HOSTS": ["a"]}, INSTALLED_APPS=without):
        assert list(found()) == ["tribrick.W002"]
    in_background = {"default": {"BACKEND": "tribrick.storage.AsyncStorage", "OPTIONS": {"location": "/nowhere"}}}
    with override_settings(STORAGES=in_background, TRIBRICK={"MEDIA_HOSTS": ["a"]}, INSTALLED_APPS=without):
        assert list(found()) == ["tribrick.E002"]


@pytest.mark.parametrize("hosts", [[], ["10.0.0.1"]])
def test_a_site_without_hosts_does_not_start(hosts: list[str]) -> None:
    """A web server runs no system checks, so the app itself refuses."""
    here = Path(__file__).resolve().parent
    sources = here.parents[3]
    paths = [str(sources / "src"), str(sources / "example"), str(here)]
    done = subprocess.run(
        [sys.executable, "-c", "import django; django.setup()"],
        env=os.environ
        | {
            "PYTHONPATH": os.pathsep.join(paths),
            "DJANGO_SETTINGS_MODULE": "settings",
            "REMOTE_TEST": json.dumps({"default": REMOTE["default"], "tribrick": {"MEDIA_HOSTS": hosts}}),
        },
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    assert (done.returncode == 0) == bool(hosts), done.stderr
    assert ("DistributedStorage has no media hosts" in done.stderr) == (not hosts)


def _apps() -> list[str]:
    from django.conf import settings

    return list(settings.INSTALLED_APPS)


@pytest.mark.parametrize(
    ("name", "value", "instead"),
    [
        ("RESTO_MEDIA_HOSTS", ["a:81"], """TRIBRICK = {"MEDIA_HOSTS": ['a:81']}"""),
        ("RESTO_FATAL_EXCEPTIONS", False, """TRIBRICK = {"FATAL_EXCEPTIONS": False}"""),
        ("RESTO_SHOW_TRACEBACK", True, """TRIBRICK = {"SHOW_TRACEBACK": True}"""),
        ("DUST_TIMEOUT", 3, """TRIBRICK = {"TIMEOUT": 3}"""),
        ("DUST_HOSTS", ["b"], """TRIBRICK = {"MEDIA_HOSTS": ['b']}"""),
        ("DUST_USE_LOCAL_FS", True, "tribrick.storage.HybridStorage"),
        ("DUST_RETRY_STORAGE_BACKEND", "x", "tribrick replicate"),
        ("RESTO_SOMETHING", 1, "nothing reads it"),
    ],
)
def test_leftovers_are_named_with_what_to_write(name: str, value: Any, instead: str) -> None:
    with override_settings(TRIBRICK={"SENTINEL_ID": False}, **{name: value}):
        messages = found()
    assert list(messages) == ["tribrick.W001"]
    assert messages["tribrick.W001"].msg.startswith(name)
    assert instead in messages["tribrick.W001"].hint


def test_a_leftover_that_is_overruled_is_to_be_removed() -> None:
    with override_settings(TRIBRICK={"TIMEOUT": 1}, RESTO_TIMEOUT=9):
        assert "is used instead" in found()["tribrick.W001"].hint


def test_a_leftover_alone_is_enough_for_a_storage() -> None:
    with override_settings(STORAGES=REMOTE, TRIBRICK={}, RESTO_MEDIA_HOSTS=["a"]):
        assert list(found()) == ["tribrick.W001"]
        assert DistributedStorage().hosts == ("a",)


@pytest.mark.parametrize("backend", ["django_resto.storage.HybridStorage", "django_dust.backends.DistributedStorage"])
def test_storages_of_the_older_packages_are_named_with_their_successor(backend: str) -> None:
    with override_settings(STORAGES={"default": {"BACKEND": backend}}):
        messages = found()
    assert list(messages) == ["tribrick.E003"]
    assert f"tribrick.storage.{backend.rpartition('.')[2]}" in messages["tribrick.E003"].hint


def test_the_setting_that_newer_djangos_do_not_read_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    older = SimpleNamespace(DEFAULT_FILE_STORAGE="django_resto.storage.AsyncStorage", STORAGES={}, TRIBRICK={})
    monkeypatch.setattr(checks, "settings", older)
    (message,) = checks.check_leftovers()
    assert message.id == "tribrick.E003"
    assert 'STORAGES["default"]["BACKEND"] = "tribrick.storage.AsyncStorage"' in str(message.hint)
