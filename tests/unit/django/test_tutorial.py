"""docs/tutorial-moving.md, carried out block by block on a small site.

Blocks of ``python`` become the file that their first line names, blocks of ``sh`` are run, and each line of a block of
``text`` must stand in the output of the commands before it (``...`` stands for anything). Paths below /srv and the
addresses of media hosts are replaced by temporary ones; "Start the site" is an upload.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tribrick.testing import TestHttpServer

SOURCES = Path(__file__).resolve().parents[3]
DOCUMENT = SOURCES / "docs" / "tutorial-moving.md"
SENTINEL = '{"tribrick": 1, "volume": "media", "id": "4c1f0d5e-6f3a-4a53-9a7e-2f60d1c58b11"}\n'
PHOTOS = {"a.jpg": b"first", "Été 1.jpg": b"second" * 100_000, "b.png": b"third"}
NEW = {"new.jpg": b"a new one"}

SETTINGS = """\
import django
from pathlib import Path
SECRET_KEY = "only for tests"
DATABASES = {"default": {"ENGINE": "django.db.backends.sqlite3", "NAME": Path(__file__).parent.parent / "site.sqlite"}}
if django.VERSION >= (5, 1):  # SQLite refuses a reader that wants to write while another one writes
    DATABASES["default"]["OPTIONS"] = {"transaction_mode": "IMMEDIATE", "timeout": 20}
INSTALLED_APPS = ["django.contrib.contenttypes", "django.contrib.auth", "album"]
DEFAULT_AUTO_FIELD = "django.db.models.BigAutoField"
USE_TZ = True
STATIC_URL = "/static/"
"""
MODELS = """\
from django.db import models

class Photo(models.Model):
    title = models.CharField(max_length=50)
    image = models.ImageField(upload_to="photos")  # an ImageField is a FileField
    scan = models.FileField(upload_to="scans", blank=True)
"""
# The storages of the old packages, as far as a move meets them.
OLD_STORAGES = """\
import urllib.request
from urllib.parse import quote
from django.conf import settings
from django.core.files.base import ContentFile
from django.core.files.storage import FileSystemStorage

def ask(method, name, data=None):
    for host in getattr(settings, "RESTO_MEDIA_HOSTS", None) or settings.DUST_MEDIA_HOSTS:
        url = f"http://{host}{settings.MEDIA_URL}{quote(name)}"
        yield urllib.request.urlopen(urllib.request.Request(url, data, method=method), timeout=10).read()

class HybridStorage(FileSystemStorage):
    def _save(self, name, content):
        name = super()._save(name, content)
        content.seek(0)
        list(ask("PUT", name, content.read()))
        return name

class AsyncStorage(HybridStorage):
    pass

class DistributedStorage(FileSystemStorage):
    def exists(self, name):
        return False
    def _save(self, name, content):
        list(ask("PUT", name, content.read()))
        return name
    def _open(self, name, mode="rb"):
        return ContentFile(next(ask("GET", name)), name)
"""
QUEUE = """\
from django.core.management.base import BaseCommand

class Command(BaseCommand):
    def handle(self, **options):
        self.stdout.write("nothing waits")
"""
# Not from the document: what visitors do, and what is looked at afterwards.
UPLOAD = """\
import json, sys
from album.models import Photo
from django.core.files.base import ContentFile
for title, content in json.loads(sys.argv[1]).items():
    Photo.objects.create(title=title, image=ContentFile(bytes.fromhex(content), title))
"""
STATE = """\
import hashlib, json
from album.models import Photo
from django.apps import apps
photos = {one.image.name: [one.title, hashlib.sha256(one.image.open("rb").read()).hexdigest()]
          for one in Photo.objects.all()}
rows, waiting = {}, 0
if apps.is_installed("tribrick"):
    from tribrick.models import MediaFile, Outbox
    waiting = Outbox.objects.filter(done=None).exclude(operation="intent").count()
    rows = {one.name: [one.state, one.sha256] for one in MediaFile.objects.all()}
print(json.dumps({"photos": photos, "rows": rows, "waiting": waiting}))
"""
# Runs several commands in one process, each as if it had been typed. For adopt and audit files are two hours old.
DRIVER = """\
import contextlib, io, json, runpy, sys, time, traceback
now = time.time
answers = []
for words in json.loads(sys.stdin.read()):
    said, code = io.StringIO(), 0
    with contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        sys.argv = words
        time.time = (lambda: now() + 7200) if {"adopt", "audit"} & set(words) else now
        try:
            runpy.run_path(words[0], run_name="__main__")
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(bool(end.code))
        except BaseException:
            traceback.print_exc(file=said)
            code = 70
    answers.append([code, said.getvalue()])
print(json.dumps(answers))
"""
MANAGE = """\
import os, sys
os.environ.setdefault("DJANGO_SETTINGS_MODULE", "mysite.settings")
from django.core.management import execute_from_command_line
execute_from_command_line(sys.argv)
"""
START = "import os, django\nos.environ['DJANGO_SETTINGS_MODULE'] = 'mysite.settings'\ndjango.setup()\n"

Event = tuple[str, str]  # "python" | "sh" | "text" | "start" | "back", and what it holds


def chapters() -> dict[str, list[Event]]:
    """Return what happens in each chapter, by its heading."""
    found: dict[str, list[Event]] = {}
    pattern = re.compile(
        r"^## (?P<chapter>[^\n]+)$|^```(?P<kind>\w+)\n(?P<block>.*?)^```$|^\*\*\d\. (?P<start>Start the site)"
        r"|^### (?P<back>Going back)$",
        re.MULTILINE | re.DOTALL,
    )
    events: list[Event] = []
    for match in pattern.finditer(DOCUMENT.read_text(encoding="utf-8")):
        if match["chapter"]:
            events = found.setdefault(match["chapter"], [])
        elif match["kind"]:
            events.append((match["kind"], match["block"]))
        else:
            events.append(("start", "") if match["start"] else ("back", ""))
    return found


def is_python(command: str) -> bool:
    return command.startswith("python ")


def shows(output: str, expected: str) -> bool:
    """Whether each line of *expected* stands in the output, in this order."""
    lines = [".*".join(map(re.escape, line.split("..."))) for line in expected.splitlines() if line.strip()]
    return re.search(r"(?s:.*?)".join(lines), output) is not None


class Site:
    """A small project, before and after its move."""

    def __init__(self, root: Path, hosts: list[TestHttpServer]) -> None:
        self.root, self.hosts = root, hosts
        self.expected: dict[str, bytes] = {}
        files = {
            "manage.py": MANAGE, "mysite/__init__.py": "", "album/__init__.py": "", "album/models.py": MODELS,
            "album/migrations/__init__.py": "", "driver.py": DRIVER,
            "upload.py": START + UPLOAD, "state.py": START + STATE,
            "packages/django_resto/__init__.py": "", "packages/django_resto/storage.py": OLD_STORAGES,
            "packages/django_dust/__init__.py": "", "packages/django_dust/storage.py": OLD_STORAGES,
            "packages/django_dust/management/commands/process_failed_media.py": QUEUE,
        }  # fmt: skip
        for name, text in files.items():
            (root / name).parent.mkdir(parents=True, exist_ok=True)
            (root / name).write_text(text)
        for name in ("old-media", "media", "local-media"):
            (root / "srv" / name).mkdir(parents=True)
        (root / "srv" / "media" / ".tribrick-volume").write_text(SENTINEL)  # the kit's work

    def here(self, text: str) -> str:
        """Replace the document's places by those of the test."""
        for number, host in enumerate(self.hosts, 11):
            text = text.replace(f"192.0.2.{number}:8080", host.host)
        return text.replace("/srv/", f"{self.root}/srv/")

    def write(self, block: str) -> None:
        """Write a file of the document; settings come on top of the project's own."""
        first, text = block.split("\n", 1)
        name = first.removeprefix("# ")
        assert re.fullmatch(r"\w+\.py", name), f"the first line of a block names its file, not {first!r}"
        if name == "settings.py":
            (self.root / "mysite" / name).write_text(SETTINGS + self.here(text))
        else:
            (self.root / name).write_text(self.here(text))

    def python(self, *commands: list[str]) -> list[tuple[int, str]]:
        """Run programs of the project in a process of their own."""
        environment = {key: value for key, value in os.environ.items() if not key.startswith(("DJANGO_", "PYTHON"))}
        environment["PYTHONPATH"] = f"{self.root}:{self.root}/packages"
        done = subprocess.run(
            [sys.executable, "driver.py"], cwd=self.root, env=environment, input=json.dumps(commands),
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return [(code, said) for code, said in json.loads(done.stdout)]

    def shell(self, command: str) -> tuple[int, str]:
        """Run another command; pip puts the package where the project finds it."""
        if command.startswith("pip install ./tribrick-"):
            assert not (self.root / "packages" / "tribrick").exists(), "installed twice"
            (self.root / "packages" / "tribrick").symlink_to(SOURCES / "src" / "tribrick")
            return 0, ""
        done = subprocess.run(
            ["bash", "-euc", self.here(command)], cwd=self.root, capture_output=True, text=True, timeout=60, check=False
        )
        return done.returncode, done.stdout + done.stderr

    def run(self, block: str, expected: str) -> None:
        """Run a block of commands; each must succeed unless the document shows its error."""
        answers: list[tuple[int, str]] = []
        waiting: list[list[str]] = []
        commands = [line for line in block.splitlines() if line.strip()]
        for number, command in enumerate(commands):
            if is_python(command):
                waiting.append(shlex.split(command)[1:])
            last = number + 1 == len(commands) or not is_python(commands[number + 1])
            if waiting and (last or "--settings" in command or "--settings" in commands[number + 1]):
                answers += self.python(*waiting)
                waiting = []
            if not is_python(command):
                answers.append(self.shell(command))
        output = "".join(said for _, said in answers)
        fails = re.search(r"^(CommandError|SystemCheckError)", expected, re.MULTILINE) is not None
        codes = [code for code, _ in answers]
        assert len(codes) == len(commands)
        assert not any(codes[:-1]) and (codes[-1] != 0) == fails, f"{block}ended with {codes} and said:\n{output}"
        assert shows(output, self.here(expected)), f"{block}was to say\n{expected}but said\n{output}"

    def upload(self, photos: dict[str, bytes]) -> None:
        """Store files through a FileField, as a visitor does."""
        [(code, said)] = self.python(["upload.py", json.dumps({name: data.hex() for name, data in photos.items()})])
        assert code == 0, said
        self.expected |= photos

    def state(self) -> dict[str, Any]:
        """Return photos by name with title and hash, and the catalog's rows."""
        [(code, said)] = self.python(["state.py"])
        assert code == 0, said
        state: dict[str, Any] = json.loads(said)
        return state

    def begin(self) -> None:
        """Fill the site under its old storage."""
        answers = self.python(["manage.py", "makemigrations", "album"], ["manage.py", "migrate"])
        assert [code for code, _ in answers] == [0, 0], answers
        self.upload(PHOTOS)
        if self.hosts[0].files:
            # The directory of the best host; the other one has missed a file.
            for name, data in self.hosts[0].files.items():
                path = self.root / "srv" / "files-of-the-host" / name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(data)
            self.hosts[1].delete_file(next(iter(self.hosts[1].files)))

    def deliver(self) -> None:
        """Do what the worker does while it runs: deliver until nothing waits."""
        for _ in range(30):  # a run takes a second, an attempt that failed is due again after one
            self.run("python manage.py tribrick replicate --once\n", "")
            if not self.state()["waiting"]:
                return
        pytest.fail("the outbox was not delivered")

    def check(self, moved: bool) -> None:
        """Every row has its bytes; once moved, the catalog has a row for each file and nothing else."""
        from hashlib import sha256

        state = self.state()
        assert dict(state["photos"].values()) == {k: sha256(v).hexdigest() for k, v in self.expected.items()}
        catalogued = {name: ["stored", sha] for name, (_, sha) in state["photos"].items()}
        assert state["rows"] == (catalogued if moved else {})
        if moved:
            only = " --copy storage" if "COPIES" in (self.root / "mysite" / "settings.py").read_text() else ""
            self.run(f"python manage.py tribrick audit{only}\n", "0 differences\n")


@pytest.fixture
def hosts() -> Iterator[list[TestHttpServer]]:
    with contextlib.ExitStack() as stack:
        yield [stack.enter_context(TestHttpServer()) for _ in range(2)]


def test_the_document_has_the_chapters_that_are_tested() -> None:
    assert list(chapters()) == [
        "Before you begin",
        "From FileSystemStorage",
        "From django-resto",
        "From django_dust",
        "From storages without local files",
    ]


@pytest.mark.parametrize(
    ("chapter", "instead"),
    [
        ("From FileSystemStorage", {}),
        ("From django-resto", {}),
        ("From django-resto", {"HybridStorage": "AsyncStorage"}),
        ("From django_dust", {}),
        ("From storages without local files", {}),
        (
            "From storages without local files",
            {"django_resto.storage": "django_dust.storage", "RESTO_MEDIA_HOSTS": "DUST_MEDIA_HOSTS"},
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "-".join(value.values()) or "as-it-is",
)
def test_a_move(chapter: str, instead: dict[str, str], tmp_path: Path, hosts: list[TestHttpServer]) -> None:
    site, events = Site(tmp_path, hosts), chapters()[chapter]
    for old, new in instead.items():
        events = [(kind, text.replace(old, new)) for kind, text in events]
    assert events[0][0] == "python", "a chapter begins with the old settings"
    site.write(events[0][1])
    site.begin()
    events = [*chapters()["Before you begin"], *events[1:]]
    went_back = False
    for number, (kind, text) in enumerate(events):
        after = events[number + 1] if number + 1 < len(events) else ("", "")
        if kind == "python":
            site.write(text)
        elif kind == "sh":
            site.run(text, after[1] if after[0] == "text" else "")
        elif kind == "start":
            site.upload(NEW)
            if site.hosts[0].files:
                site.deliver()
        elif kind == "back":
            site.check(moved=True)
            went_back = True
    site.check(moved=not went_back)
    for host in hosts if hosts[0].files else []:
        assert sorted(host.files.values()) == sorted(site.expected.values())


@pytest.mark.parametrize(
    ("output", "expected", "good"),
    [
        ("a\nb 1 c\n", "a\nb ... c\n", True),
        ("a\nb\n", "b\na\n", False),
        ("3 files open, 1 do not\n", "3 files open, 0 do not\n", False),
        ("anything", "", True),
    ],
)
def test_output_is_compared(output: str, expected: str, good: bool) -> None:
    assert shows(output, expected) is good
