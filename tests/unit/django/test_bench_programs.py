"""The programs that ./scripts/bench runs in the site's environment on a node, run here."""

from __future__ import annotations

import contextlib
import json
import os
import select
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.contrib.auth import get_user_model
from django.db import connection
from django.db.models import Max
from django.test import Client
from example.gallery.models import Picture, Version

from kit import bench_upload, benchnode_scale, benchnode_storages, benchnode_upload
from tribrick import ledger
from tribrick.models import Change, MediaFile, State

ROOT = Path(__file__).resolve().parents[3]
KIT = ROOT / "scripts" / "lib" / "kit"
pytestmark = pytest.mark.usefixtures("database", "media")


class Program:
    """One that is told what to do by lines of JSON."""

    def __init__(self, program: str, *words: str, **environment: str) -> None:
        path = f"{ROOT / 'src'}:{ROOT / 'example'}"
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(KIT / program), *words], stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "PYTHONPATH": path, **environment},
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 60)[0], "no answer in 60 s"
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        return self.answer()


@contextlib.contextmanager
def running(program: str, *words: str, **environment: str) -> Iterator[Program]:
    made = Program(program, *words, **environment)
    try:
        yield made
    finally:
        assert made.process.stdin is not None and made.process.stdout is not None
        made.process.stdin.close()
        made.process.wait(60)
        made.process.stdout.close()


def schemas() -> set[str]:
    with connection.cursor() as cursor:
        cursor.execute("SELECT nspname FROM pg_namespace")
        return {name for (name,) in cursor.fetchall()}


def test_a_plain_site_for_a_while(media: Path) -> None:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    bodies = [bench_upload.form(5000) for _ in range(6)]
    with running("benchnode_upload.py", "serve", str(port), "2", "2") as program:
        assert program.answer() == {"ready": "a plain Django site"}
        for way, root in (("stock", media), ("local", benchnode_upload.LOCAL)):
            target = bench_upload.Target(f"http://127.0.0.1:{port}/{way}/")
            assert bench_upload.send(target, bodies, 3) > 0
            assert len(set(target.stored)) == 6
            assert {(root / name).stat().st_size for name in target.stored} == {5000}
        with connection.cursor() as cursor:
            cursor.execute("SELECT count(*), sum(size) FROM tribrick_bench_upload.uploads")
            assert cursor.fetchone() == (12, 60_000)
    assert program.process.returncode == 0
    assert not (media / benchnode_upload.DIRECTORY).exists() and not benchnode_upload.LOCAL.exists()
    assert benchnode_upload.SCHEMA not in schemas()


@pytest.mark.usefixtures("static")
def test_many_files_in_the_sites_own_catalog(media: Path, tmp_path: Path) -> None:
    get_user_model().objects.create_user("lab")
    file = tmp_path / "ledger.sqlite"
    with running("benchnode_scale.py", TRIBRICK_LEDGER=str(file)) as program:
        assert program.answer() == {"left": 0}
        program.ask(do="add", start=0, count=40, owner="lab")
        program.ask(do="add", start=40, count=20, owner="lab")
        stored = MediaFile.objects.filter(state=State.STORED)
        assert stored.count() == Version.objects.count() == Picture.objects.filter(current__isnull=False).count() == 60
        assert all((media / one.name).stat().st_size == one.size == benchnode_scale.SIZE for one in stored)
        assert Client().get("/").content.count(b".bin") >= 24, "the gallery shows them"
        middle = program.ask(do="middle")["picture"]
        assert Picture.objects.filter(id__gt=middle).count() == 30
        audit = program.ask(do="audit", sample=20)
        assert audit["seconds"] > 0 and audit["copies"] == 1
        ledger.follow_once(file)
        last = Change.objects.aggregate(last=Max("number"))["last"]
        assert Change.objects.count() == 60 and program.ask(do="ledger", deadline=5)["number"] == last
        assert program.ask(do="remove", count=45) == {"left": 15}
        assert program.ask(do="remove", count=45) == {"left": 0}
    assert not Picture.objects.exists() and not stored.all().exists()
    assert not (media / benchnode_scale.DIRECTORY).exists()


def test_files_once_more_in_the_same_site(media: Path) -> None:
    get_user_model().objects.create_user("lab")
    for _ in range(2):
        with running("benchnode_scale.py") as program:
            assert program.answer() == {"left": 0}
            assert program.ask(do="add", start=0, count=5, owner="lab") == {}
            assert program.ask(do="remove", count=9) == {"left": 0}


def test_a_second_program_waits_for_the_first() -> None:
    with running("benchnode_scale.py") as first:
        first.answer()
        with running("benchnode_scale.py") as second:
            assert second.process.stdout is not None
            assert not select.select([second.process.stdout], [], [], 3)[0], "it does not wait"
            assert first.process.stdin is not None
            first.process.stdin.close()
            assert second.answer() == {"left": 0}


def test_an_audit_that_finds_something_is_no_figure(media: Path) -> None:
    get_user_model().objects.create_user("lab")
    with running("benchnode_scale.py") as program:
        program.answer()
        program.ask(do="add", start=0, count=5, owner="lab")
        one = MediaFile.objects.order_by("name")[3]
        (media / one.name).write_bytes(b"torn")
        assert "CommandError" in program.ask(do="audit", sample=5)["error"]
    assert program.process.returncode != 0


def test_saves_also_on_local_disk() -> None:
    with running("benchnode_storages.py", "measure") as program:
        assert set(program.answer()["ready"]) == {"django", "volume", "row", "local"}
        ways = list(bench_upload.SAVES.values())
        times = program.ask(do="compare", ways=ways, size=1000, rounds=3)["times"]
        assert set(times) == set(ways) and all(len(found) == 3 for found in times.values())
    assert not benchnode_storages.LOCAL.exists() and benchnode_storages.SCHEMA not in schemas()
