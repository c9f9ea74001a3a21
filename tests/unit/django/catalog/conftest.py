"""The catalog's app is added to the set-up of the directory above; other processes get it too."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.conf import settings
from django.db import connection
from django.test import override_settings

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[3]

if not apps.is_installed("tribrick"):
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "tribrick"]
    apps.set_installed_apps(settings.INSTALLED_APPS)


@pytest.fixture(autouse=True)
def _site(database: None, media: Path) -> Iterator[None]:
    """Every test here works on the database and the volume."""
    with connection.cursor() as cursor:  # the numbers go on after a flush; tests want them from 1
        cursor.execute("ALTER SEQUENCE tribrick_change_number RESTART")
    with override_settings(TRIBRICK={**settings.TRIBRICK, "NODE": "node7"}):
        yield


@pytest.fixture
def process(_site: None) -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run Python code in another process of the site; it may kill itself."""

    def run(code: str, **environment: str) -> subprocess.CompletedProcess[str]:
        paths = [str(SOURCES / "src"), str(SOURCES / "example"), str(HERE)]
        return subprocess.run(
            [sys.executable, "-c", f"import django; django.setup()\n{code}"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths), "DJANGO_SETTINGS_MODULE": "settings"} | environment,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run


@pytest.fixture
def agree(files_in: Callable[[Path], list[str]]) -> Callable[[], None]:
    """Assert that disk, rows and changes tell the same story, once every delete is finished."""
    from tribrick.models import Change, MediaFile

    def check(extra: Any = ()) -> None:
        root = Path(settings.MEDIA_ROOT)
        stored = sorted(MediaFile.objects.filter(state="stored").values_list("name", flat=True))
        assert files_in(root) == sorted([*stored, *extra])
        story: dict[str, list[str]] = {}
        for change in Change.objects.order_by("number"):
            assert change.number is not None
            story.setdefault(change.name, []).append(change.kind)
        expected = {
            row.name: ["added"] if row.state == "stored" else ["added", "deleted", "purged"]
            for row in MediaFile.objects.exclude(state="deleted")
        }
        assert {name: [kind for kind in kinds if kind != "current"] for name, kinds in story.items()} == expected

    return check
