"""A Django set up on a throw-away PostgreSQL and a temporary volume.

PostgreSQL is the real server, from the distribution's package, on a socket in a temporary
directory. Nothing is installed and nothing outside that directory is touched.
"""

from __future__ import annotations

import contextlib
import io
import os
import pwd
import random
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

# The long set looks for new cases; what lands must not depend on luck.
LONG = os.environ.get("TRIBRICK_SET", "short") == "long"
hypothesis.settings.register_profile("tribrick", deadline=None, database=None, derandomize=not LONG)
hypothesis.settings.load_profile("tribrick")

WORK = Path(tempfile.mkdtemp(prefix="tribrick-django-"))
SENTINEL_ID = "7c0f3b7e-0000-4000-8000-000000000001"
LIMIT = 300_000
SOURCES = Path(__file__).resolve().parents[3]

os.environ.update(
    {
        "DJANGO_SETTINGS_MODULE": "example.settings",
        "SECRET_KEY": "only for tests",
        "DATABASE_URL": f"postgresql://postgres@/tribrick?host={WORK}/socket",
        "ALLOWED_HOSTS": "testserver",
        "MEDIA_ROOT": str(WORK / "media"),
        "STATIC_ROOT": str(WORK / "static"),
        "TRIBRICK_NODE": "node7",
        "TRIBRICK_SENTINEL_ID": SENTINEL_ID,
        "TRIBRICK_MAX_UPLOAD_BYTES": str(LIMIT),
        "TRIBRICK_ACCEL_PREFIX": "/_protected/",
        "SECURE_PROXY": "1",
    }
)
for unwanted in ("DEBUG", "CSRF_TRUSTED_ORIGINS", "TRIBRICK_HASH_LEVELS", "TRIBRICK_HASH_WIDTH"):
    os.environ.pop(unwanted, None)

import django  # noqa: E402

django.setup()

from django.conf import settings  # noqa: E402
from django.core.management import call_command  # noqa: E402
from django.db import connection  # noqa: E402

settings.PASSWORD_HASHERS = ["django.contrib.auth.hashers.MD5PasswordHasher"]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Leave most cases of a ``sample`` to the long set. The seed picks; what is named by its id runs."""
    if os.environ.get("TRIBRICK_SET", "short") == "long" or any("::" in argument for argument in config.args):
        return
    seed = os.environ.get("TRIBRICK_SEED", "0")
    cases: dict[str, list[pytest.Item]] = {}
    for item in items:
        if marker := item.get_closest_marker("sample"):
            group = marker.args[1] if marker.args[1:] else item.nodeid.partition("[")[0]
            cases.setdefault(group, []).append(item)
    left: set[pytest.Item] = set()
    for group, given in cases.items():
        marker = given[0].get_closest_marker("sample")
        assert marker is not None
        picked = random.Random(f"{seed} {group}").sample(given, min(marker.args[0], len(given)))
        left |= set(given) - set(picked)
    if left:
        config.hook.pytest_deselected(items=[item for item in items if item in left])
        items[:] = [item for item in items if item not in left]


@pytest.fixture(scope="session", autouse=True)
def _clean_up() -> Iterator[None]:
    yield
    shutil.rmtree(WORK)


# Volumes


def make_volume(root: Path, sentinel_id: str = SENTINEL_ID) -> Path:
    """Make a directory that looks like the root of the volume."""
    root.mkdir(parents=True)
    sentinel = f'{{"tribrick": 1, "volume": "media", "id": "{sentinel_id}"}}\n'
    (root / ".tribrick-volume").write_text(sentinel)
    return root


def stored_files(root: Path) -> list[str]:
    """Return the names of all files in a volume but the sentinel."""
    return sorted(
        str(path.relative_to(root)) for path in root.rglob("*") if path.is_file() and path.name != ".tribrick-volume"
    )


@pytest.fixture
def volume(tmp_path: Path) -> Path:
    """A volume of its own, for tests of the storage alone."""
    return make_volume(tmp_path / "volume")


@pytest.fixture
def files_in() -> Callable[[Path], list[str]]:
    """Give :func:`stored_files`."""
    return stored_files


@pytest.fixture
def media() -> Iterator[Path]:
    """The site's volume, empty."""
    yield make_volume(Path(settings.MEDIA_ROOT))
    shutil.rmtree(settings.MEDIA_ROOT)


# PostgreSQL


def _server_programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"), key=lambda p: int(p.parts[4]))
    if found:
        return found[-1].parent
    on_path = shutil.which("initdb")
    if on_path:
        return Path(on_path).resolve().parent
    pytest.fail("These tests need a PostgreSQL server: apt-get install postgresql", pytrace=False)


def _server_run(program: Path, *arguments: str) -> None:
    command = [str(program), *arguments]
    if os.geteuid() == 0:  # PostgreSQL refuses to run as root
        command = ["runuser", "-u", "postgres", "--", *command]
    done = subprocess.run(
        command,
        cwd="/",
        stdin=subprocess.DEVNULL,
        stdout=(WORK / "postgresql.out").open("ab"),
        stderr=subprocess.STDOUT,
        timeout=60,
        check=False,
    )
    if done.returncode != 0:
        said = (WORK / "postgresql.out").read_text(errors="replace")[-2000:]
        pytest.fail(f"{program.name} failed with {done.returncode}:\n{said}", pytrace=False)


@pytest.fixture(scope="session")
def postgresql(_clean_up: None) -> Iterator[None]:
    """A running server with the site's tables."""
    programs = _server_programs()
    data, socket = WORK / "data", WORK / "socket"
    for directory in (data, socket):
        directory.mkdir(mode=0o700)
        if os.geteuid() == 0:
            owner = pwd.getpwnam("postgres")
            os.chown(directory, owner.pw_uid, owner.pw_gid)
    WORK.chmod(0o711)
    arguments = ["--auth=trust", "--encoding=UTF8", "--locale=C", "--no-sync", "-U", "postgres"]
    _server_run(programs / "initdb", "-D", str(data), *arguments)
    options = f"-c listen_addresses= -c unix_socket_directories={socket} -c fsync=off"
    _server_run(programs / "pg_ctl", "-D", str(data), "-o", options, "-w", "-t", "30", "start")
    try:
        _server_run(programs / "createdb", "-h", str(socket), "-U", "postgres", "tribrick")
        call_command("migrate", verbosity=0, interactive=False)
        yield
    finally:
        connection.close()
        _server_run(programs / "pg_ctl", "-D", str(data), "-w", "-m", "immediate", "stop")


@pytest.fixture
def database(postgresql: None) -> Iterator[None]:
    """The database, emptied afterwards."""
    yield
    connection.close()
    call_command("flush", verbosity=0, interactive=False)
    connection.close()


@pytest.fixture
def database_away() -> Callable[[], contextlib.AbstractContextManager[None]]:
    """A context in which the database cannot be reached."""

    @contextlib.contextmanager
    def away() -> Iterator[None]:
        connection.close()
        host = connection.settings_dict["HOST"]
        connection.settings_dict["HOST"] = str(WORK / "nowhere")
        try:
            yield
        finally:
            connection.close()
            connection.settings_dict["HOST"] = host

    return away


@pytest.fixture(scope="session")
def static(_clean_up: None) -> None:
    """The collected static files, with their manifest."""
    call_command("collectstatic", verbosity=0, interactive=False)


# Accounts and files


@pytest.fixture
def user(database: None) -> Any:
    """An account with the token ``secret-of-ada``."""
    return make_user("ada")


def make_user(name: str) -> Any:
    """Make an account whose token is ``secret-of-NAME``."""
    from django.contrib.auth import get_user_model
    from example.gallery.models import Token

    made = get_user_model().objects.create_user(name, password="a good password")
    Token.objects.create(user=made, digest=Token.hash(f"secret-of-{name}"))
    return made


@pytest.fixture
def other(user: Any) -> Any:
    """Another account, with the token ``secret-of-bob``."""
    return make_user("bob")


@pytest.fixture(scope="session")
def png() -> Callable[..., bytes]:
    """Make a PNG file; another *shade*, other bytes."""
    from PIL import Image

    def make(shade: int = 0, size: tuple[int, int] = (64, 48)) -> bytes:
        out = io.BytesIO()
        Image.new("RGB", size, (shade % 256, shade // 256 % 256, 90)).save(out, "PNG")
        return out.getvalue()

    return make


@pytest.fixture
def site_process() -> Callable[[str], subprocess.CompletedProcess[str]]:
    """Run Python code in another process of the site."""

    def run(code: str) -> subprocess.CompletedProcess[str]:
        paths = [str(SOURCES / "src"), str(SOURCES / "example")]
        return subprocess.run(
            [sys.executable, "-c", f"import django; django.setup()\n{code}"],
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )

    return run
