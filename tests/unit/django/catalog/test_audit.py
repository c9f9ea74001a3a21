"""Audit, reconcile, sweep and adopt, on real trees and a real web server."""

from __future__ import annotations

import contextlib
import functools
import http.server
import io
import json
import os
import socketserver
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from datetime import datetime, timedelta, timezone
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.files.base import ContentFile
from django.core.management import CommandError, call_command
from django.db import connection, transaction
from django.test import override_settings
from django.utils.timezone import now as django_now

from tribrick import audit, catalog, copies, ledger
from tribrick.errors import StorageUnavailable
from tribrick.management.commands import tribrick as commands
from tribrick.models import Change, MediaFile, Outbox
from tribrick.testing import TestHttpServer

Process = Callable[..., "subprocess.CompletedProcess[str]"]
Settings = Callable[..., None]


def root() -> Path:
    return Path(settings.MEDIA_ROOT)


def add(data: bytes = b"one", name: str = "photos/été.txt") -> MediaFile:
    return catalog.add(ContentFile(data), name)


def tribrick(*arguments: str) -> tuple[int, Any]:
    """Run the command; return its exit code and what it says in JSON."""
    out = io.StringIO()
    try:
        call_command("tribrick", *arguments, "--json", stdout=out, stderr=io.StringIO())
        code = 0
    except CommandError as error:
        code = error.returncode
    return code, json.loads(out.getvalue()) if out.getvalue() else None


def findings(said: Any) -> set[tuple[str, str, str]]:
    return {(one["copy"], one["kind"], one["name"]) for one in said["findings"]}


def age(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make every file old enough: the time of a change of the inode cannot be set."""
    monkeypatch.setattr(audit, "YOUNG", timedelta(0))
    monkeypatch.setattr(audit, "settled_before", lambda: datetime.now(timezone.utc) + timedelta(minutes=1))


@pytest.fixture
def tribrick_settings() -> Iterator[Settings]:
    active = []

    def change(**values: Any) -> None:
        context = override_settings(TRIBRICK={**settings.TRIBRICK, **values})
        context.enable()
        active.append(context)

    yield change
    for context in reversed(active):
        context.disable()


@pytest.fixture
def mirror(tmp_path: Path, tribrick_settings: Settings) -> Path:
    """A second copy, which may be written to."""
    path = tmp_path / "mirror"
    path.mkdir()
    tribrick_settings(COPIES=[{"name": "mirror", "kind": "path", "address": str(path), "writable": True}])
    return path


def copy_to(target: Path, *rows: MediaFile) -> None:
    for row in rows:
        (target / row.name).parent.mkdir(parents=True, exist_ok=True)
        (target / row.name).write_bytes((root() / row.name).read_bytes())


# Audit


def test_all_in_order(mirror: Path) -> None:
    rows = [add(b"%d" % n) for n in range(5)]
    copy_to(mirror, *rows)
    code, said = tribrick("audit")
    assert code == 0 and said["clean"] and said["checked"] == 5 and said["read"] == 10
    assert said["counts"] == {copy: dict.fromkeys(audit.KINDS, 0) for copy in ("storage", "mirror")}


def test_every_kind_of_difference(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age(root(), monkeypatch)
    monkeypatch.setattr(audit, "PAGE", 2)
    data = os.urandom(20_000)
    rows = {kind: add(data) for kind in ("missing", "short", "zeros", "half", "different", "longer", "link", "dir")}
    fine, dead, expired = add(), add(), add()
    copy_to(mirror, *rows.values(), fine)
    for row in (dead, expired):
        catalog.delete(row)
        (mirror / row.name).parent.mkdir(parents=True, exist_ok=True)
        (mirror / row.name).write_bytes(b"back")
    MediaFile.objects.get(pk=expired.pk).delete()
    at = {kind: mirror / row.name for kind, row in rows.items()}
    at["missing"].unlink()
    at["short"].write_bytes(data[:100])
    at["zeros"].write_bytes(bytes(20_000))
    at["half"].write_bytes(data[:12_000] + bytes(8_000))
    at["different"].write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
    at["longer"].write_bytes(data + b"x")
    at["link"].unlink()
    at["link"].symlink_to(root() / rows["link"].name)
    at["dir"].unlink()
    at["dir"].mkdir()
    (mirror / "other").mkdir()
    (mirror / "other" / "File.txt").write_bytes(b"x")
    (mirror / ".trash").mkdir()
    (mirror / ".trash" / "ignored").write_bytes(b"x")
    code, said = tribrick("audit")
    assert code == 1
    assert findings(said) == {
        ("mirror", "missing", rows["missing"].name),
        ("mirror", "torn", rows["short"].name),
        ("mirror", "torn", rows["zeros"].name),
        ("mirror", "torn", rows["half"].name),
        ("mirror", "different", rows["different"].name),
        ("mirror", "different", rows["longer"].name),
        ("mirror", "unreadable", rows["link"].name),
        ("mirror", "unreadable", rows["dir"].name),
        ("mirror", "dead", dead.name),
        ("mirror", "extra", "other/File.txt"),
    }
    assert said["counts"]["mirror"]["torn"] == 3 and said["counts"]["storage"] == dict.fromkeys(audit.KINDS, 0)


def test_young_files_are_not_called_extra() -> None:
    (root() / "new.txt").write_bytes(b"being uploaded")
    code, said = tribrick("audit")
    assert (code, said["young"], said["findings"]) == (0, 1, [])


@pytest.mark.parametrize("what", ["audit", "reconcile", "sweep", "adopt"])
def test_a_name_that_is_no_text_is_told(monkeypatch: pytest.MonkeyPatch, what: str) -> None:
    age(root(), monkeypatch)
    (root() / os.fsdecode(b"\xe9t\xe9.jpg")).write_bytes(b"of another time")
    out = io.TextIOWrapper(io.BytesIO(), encoding="utf-8", write_through=True)
    with contextlib.suppress(CommandError):
        call_command("tribrick", what, stdout=out, stderr=io.StringIO())
    assert b"t\\udce9.jpg" in out.buffer.getvalue()  # type: ignore[attr-defined]


def test_one_copy_only(mirror: Path) -> None:
    add()
    assert tribrick("audit", "--copy", "storage")[0] == 0
    assert tribrick("audit", "--copy", "mirror")[0] == 1
    with pytest.raises(CommandError, match="no copy is called other; there are storage, mirror"):
        call_command("tribrick", "audit", "--copy", "other")


def test_an_absent_copy_is_no_difference_and_not_in_order(mirror: Path) -> None:
    add()
    mirror.rmdir()
    code, said = tribrick("audit")
    assert code == 2 and list(said["away"]) == ["mirror"] and said["findings"] == []
    (root() / ".tribrick-volume").unlink()
    code, said = tribrick("audit")
    assert code == 2 and set(said["away"]) == {"mirror", "storage"}


def test_a_volume_that_goes_away_in_the_middle(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [add() for _ in range(4)]
    copy_to(mirror, *rows)
    real, aside = audit.examine, root().with_name("unmounted")

    def unmounted(copy: audit.Copy, known: ledger.Known) -> Any:
        if copy.name == "storage" and known.name == sorted(row.name for row in rows)[1]:
            root().rename(aside)
            root().mkdir()
        return real(copy, known)

    monkeypatch.setattr(audit, "examine", unmounted)
    try:
        code, said = tribrick("audit")
    finally:
        root().rmdir()
        aside.rename(root())
    assert code == 2 and list(said["away"]) == ["storage"] and said["findings"] == [] and said["checked"] == 4


def test_nothing_is_written_where_the_volume_is_no_more(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = add()
    copy_to(mirror, row)
    (root() / row.name).unlink()
    source, storage = copies.PathCopy("mirror", mirror, writable=False), audit.storage_copy("default")
    known = ledger.Known(row.name, "stored", "default", row.sha256, row.size)
    real = source.chunks

    def unmounted(name: str) -> Iterator[bytes]:
        (root() / ".tribrick-volume").rename(root().with_name("sentinel"))
        yield from real(name)

    monkeypatch.setattr(source, "chunks", unmounted)
    try:
        with pytest.raises(StorageUnavailable):
            storage.put(known, source)
    finally:
        root().with_name("sentinel").rename(root() / ".tribrick-volume")
    assert not list(root().rglob("*.txt")), "under no name"


def test_sample(mirror: Path) -> None:
    for _ in range(6):
        add()
    code, said = tribrick("audit", "--sample", "4")
    assert code == 1 and said["checked"] == 4 and len(said["findings"]) == 4
    assert len({one["name"] for one in said["findings"]}) == 4


def test_a_file_deleted_during_the_audit(monkeypatch: pytest.MonkeyPatch) -> None:
    row = add()
    real = audit.examine

    def slow(copy: audit.Copy, known: ledger.Known) -> Any:
        catalog.delete(row)
        return real(copy, known)

    monkeypatch.setattr(audit, "examine", slow)
    assert tribrick("audit")[0] == 0


def test_by_the_ledger_while_the_database_is_away(
    mirror: Path, tmp_path: Path, tribrick_settings: Settings, database_away: Any
) -> None:
    rows = [add(), add()]
    dead = add()
    catalog.delete(dead)
    copy_to(mirror, rows[0])
    (root() / dead.name).write_bytes(b"back")
    path = tmp_path / "ledger.sqlite"
    ledger.follow_once(path)
    tribrick_settings(LEDGER=str(path))
    with database_away():
        code, said = tribrick("audit", "--ledger")
        assert code == 1
        assert findings(said) == {("mirror", "missing", rows[1].name), ("storage", "dead", dead.name)}
        assert tribrick("audit", "--ledger", "--sample", "2")[1]["checked"] == 2
        assert tribrick("audit")[0] == 2


def test_resume(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age(root(), monkeypatch)
    monkeypatch.setattr(audit, "PAGE", 3)
    rows = [add() for _ in range(10)]
    (mirror / "foreign.txt").write_bytes(b"x")
    state = tmp_path / "state.json"
    real, seen = audit.examine, []

    def killed(copy: audit.Copy, known: ledger.Known) -> Any:
        if len(seen) == 14:
            raise KeyboardInterrupt
        seen.append(known.name)
        return real(copy, known)

    monkeypatch.setattr(audit, "examine", killed)
    monkeypatch.setattr(audit, "SAVE_EVERY", 0)
    with pytest.raises(KeyboardInterrupt):
        tribrick("audit", "--resume", str(state))
    kept = json.loads(state.read_text())
    assert kept["checked"] == 6 and len(kept["findings"]) == 6
    second: list[str] = []
    monkeypatch.setattr(audit, "examine", lambda copy, known: (second.append(known.name), real(copy, known))[1])
    code, said = tribrick("audit", "--resume", str(state))
    assert code == 1 and said["checked"] == 10 and len(second) == 8
    assert findings(said) == {("mirror", "missing", row.name) for row in rows} | {("mirror", "extra", "foreign.txt")}
    assert not state.exists()
    state.write_text("{}")
    assert tribrick("audit", "--resume", str(state)) == (1, None)


def test_a_copy_that_was_away_before_an_interruption_is_not_in_order(
    mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit, "PAGE", 1)
    monkeypatch.setattr(audit, "SAVE_EVERY", 0)
    rows = [add() for _ in range(3)]
    mirror.rmdir()
    state = tmp_path / "state.json"
    real = audit.examine

    def killed(copy: audit.Copy, known: ledger.Known) -> Any:
        if known.name == max(row.name for row in rows):
            raise KeyboardInterrupt
        return real(copy, known)

    with monkeypatch.context() as patch:
        patch.setattr(audit, "examine", killed)
        with pytest.raises(KeyboardInterrupt):
            tribrick("audit", "--resume", str(state))
    mirror.mkdir()
    copy_to(mirror, max(rows, key=lambda row: row.name))
    code, said = tribrick("audit", "--resume", str(state))
    assert code == 2 and list(said["away"]) == ["mirror"] and not state.exists()
    assert tribrick("audit", "--resume", str(state))[0] == 1, "the next one asks it about all"


def test_resume_in_the_walk(mirror: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age(root(), monkeypatch)
    monkeypatch.setattr(audit, "PAGE", 1)
    for name in "abc":
        (root() / name).write_bytes(b"x")
        (mirror / name).write_bytes(b"x")
    state = tmp_path / "state.json"
    real, met = audit.is_own, []

    def killed(name: str, alias: str = "default") -> bool:
        met.append(name)
        if len(met) == 5:
            raise KeyboardInterrupt
        return real(name, alias)

    monkeypatch.setattr(audit, "is_own", killed)
    with pytest.raises(KeyboardInterrupt):
        tribrick("audit", "--resume", str(state))
    assert json.loads(state.read_text())["phase"] == "walk mirror"
    said = tribrick("audit", "--resume", str(state))[1]
    assert len(said["findings"]) == 6 == len(findings(said))
    assert len(met) == 8, "the storage was not walked through again"


@pytest.fixture
def web(tmp_path: Path, tribrick_settings: Settings) -> Iterator[Path]:
    """A copy behind a web server."""
    path = tmp_path / "web"
    (path / "media").mkdir(parents=True)

    class Handler(http.server.SimpleHTTPRequestHandler):
        def log_message(self, *_args: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Handler, directory=str(path)))
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    address = f"http://127.0.0.1:{server.server_port}/media"
    tribrick_settings(COPIES=[{"name": "web", "kind": "http", "address": address}])
    try:
        yield path / "media"
    finally:
        server.shutdown()
        server.server_close()
        thread.join(10)


def test_a_copy_behind_a_web_server(web: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:9/")
    rows = [add(b"a" * 3_000_000), add(), add(), add()]
    copy_to(web, *rows)
    assert tribrick("audit")[0] == 0
    (web / rows[1].name).unlink()
    (web / rows[2].name).write_bytes(b"on")
    (web / rows[3].name).write_bytes(b"two")
    (root() / rows[0].name).write_bytes(b"b" * 3_000_000)
    code, said = tribrick("audit")
    assert code == 1
    assert findings(said) == {
        ("web", "missing", rows[1].name), ("web", "torn", rows[2].name), ("web", "different", rows[3].name),
        ("storage", "different", rows[0].name),
    }  # fmt: skip
    code, said = tribrick("reconcile", "--apply")
    assert code == 1
    assert {one["name"]: one["ok"] for one in said["repairs"]} == {
        row.name: ok for row, ok in zip(rows, [True, False, False, False], strict=True)
    }
    assert (root() / rows[0].name).read_bytes() == b"a" * 3_000_000


@pytest.mark.parametrize("answer", ["Content-Length: 9\r\n\r\nhal", "Transfer-Encoding: chunked\r\n\r\n9\r\nhal"])
def test_an_answer_that_breaks_off_is_no_torn_file(tribrick_settings: Settings, answer: str) -> None:
    class Handler(socketserver.StreamRequestHandler):
        def handle(self) -> None:
            method = self.rfile.readline()[:4]
            while self.rfile.readline().strip():
                pass
            self.wfile.write(b"HTTP/1.1 200 OK\r\n" + (b"\r\n" if method == b"HEAD" else answer.encode()))

    with socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        tribrick_settings(
            COPIES=[{"name": "web", "kind": "http", "address": f"http://127.0.0.1:{server.server_address[1]}/"}]
        )
        row = add(b"half of it")
        try:
            code, said = tribrick("audit")
        finally:
            server.shutdown()
    assert code == 1 and findings(said) == {("web", "unreadable", row.name)}


def test_a_web_server_that_is_away(tribrick_settings: Settings) -> None:
    tribrick_settings(COPIES=[{"name": "web", "kind": "http", "address": "http://127.0.0.1:9/media/"}])
    add()
    code, said = tribrick("audit")
    assert code == 2 and list(said["away"]) == ["web"] and not said["findings"]


@pytest.mark.parametrize(
    "entries",
    [
        [{"name": "a", "kind": "rsync", "address": "x"}],
        [{"name": "a", "kind": "path"}],
        [{"name": "a", "kind": "path", "address": "/x", "wirtable": True}],
        [{"name": "storage", "kind": "path", "address": "/x"}],
        [{"name": "a", "kind": "http", "address": "/x"}],
    ],
)
def test_wrong_settings_are_refused(entries: Any, tribrick_settings: Settings) -> None:
    tribrick_settings(COPIES=entries)
    with pytest.raises(ImproperlyConfigured):
        copies.copies()


# Reconcile


def test_reconcile(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    age(root(), monkeypatch)
    missing, torn, different, lost, fine = (add(b"%d" % n * 5000) for n in range(5))
    copy_to(mirror, missing, torn, different, fine)
    dead = add()
    catalog.delete(dead)
    (root() / missing.name).unlink()
    (root() / torn.name).write_bytes(bytes(5000))
    (mirror / different.name).write_bytes(b"bad")
    (root() / lost.name).unlink()
    (root() / dead.name).write_bytes(b"back")
    (root() / "foreign.txt").write_bytes(b"x")
    before = {path: path.read_bytes() for path in [*root().rglob("*"), *mirror.rglob("*")] if path.is_file()}
    code, said = tribrick("reconcile")
    assert code == 1 and not said["applied"]
    assert before == {path: path.read_bytes() for path in [*root().rglob("*"), *mirror.rglob("*")] if path.is_file()}
    code, said = tribrick("reconcile", "--apply")
    assert code == 1
    what = {(one["copy"], one["name"]): (one["ok"], one["what"]) for one in said["repairs"]}
    assert what == {
        ("storage", missing.name): (True, "written from mirror"),
        ("storage", torn.name): (True, "written from mirror"),
        ("mirror", different.name): (True, "written from storage"),
        ("storage", lost.name): (False, "no copy has the bytes"),
        ("mirror", lost.name): (False, "no copy has the bytes"),
        ("storage", dead.name): (True, "removed"),
        ("storage", "foreign.txt"): (
            False, "left alone: adopt takes it into the catalog, sweep takes our own away",
        ),
    }  # fmt: skip
    for number, row in enumerate((missing, torn, different)):
        assert (root() / row.name).read_bytes() == (mirror / row.name).read_bytes() == b"%d" % number * 5000
    assert (root() / missing.name).stat().st_mode & 0o777 == 0o644
    assert not (root() / dead.name).exists() and (root() / "foreign.txt").exists()
    (day,) = (root() / audit.QUARANTINE).iterdir()
    assert (day / torn.name).read_bytes() == bytes(5000)
    assert (root() / audit.QUARANTINE).stat().st_mode & 0o777 == 0o700
    assert not list(root().rglob(".*.part"))
    code, said = tribrick("audit")
    assert {one["kind"] for one in said["findings"]} == {"missing", "extra"}


def test_a_repair_that_is_killed_leaves_a_file_under_the_name(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Else `sync` would take it for a deletion, and tell everybody."""
    row = add(b"right")
    copy_to(mirror, row)
    (root() / row.name).write_bytes(b"wrong")
    real = os.rename

    def killed(source: Any, target: Any, **more: Any) -> None:
        if Path(target) == root() / row.name:
            raise KeyboardInterrupt
        real(source, target, **more)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            tribrick("reconcile", "--host", "storage", "--apply")
    assert (root() / row.name).read_bytes() == b"wrong"
    assert tribrick("reconcile", "--host", "storage", "--apply")[0] == 0
    assert (root() / row.name).read_bytes() == b"right"
    kept = [path.read_bytes() for path in (root() / copies.QUARANTINE).rglob("*.txt*") if path.is_file()]
    assert set(kept) == {b"wrong"}


def test_a_repair_where_no_hard_link_can_be_made(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = add(b"right")
    copy_to(mirror, row)
    (root() / row.name).write_bytes(b"wrong")

    def refused(*_words: Any, **_more: Any) -> None:
        raise PermissionError(1, "fs.protected_hardlinks")

    monkeypatch.setattr(os, "link", refused)
    assert tribrick("reconcile", "--host", "storage", "--apply")[0] == 0
    assert (root() / row.name).read_bytes() == b"right"
    assert [path.read_bytes() for path in (root() / copies.QUARANTINE).rglob("*.txt")] == [b"wrong"]


def test_a_repair_takes_no_directory_away(mirror: Path) -> None:
    row = add()
    copy_to(mirror, row)
    (root() / row.name).unlink()
    (root() / row.name).mkdir()
    (root() / row.name / "somebody's").write_bytes(b"own")
    code, said = tribrick("reconcile", "--host", "storage", "--apply")
    assert code == 1 and "is a directory" in str(said)
    assert (root() / row.name / "somebody's").read_bytes() == b"own"


def test_reconcile_one_host_and_only_where_it_may_write(mirror: Path, tribrick_settings: Settings) -> None:
    row = add()
    assert tribrick("reconcile", "--host", "storage", "--apply")[1]["repairs"] == []
    assert not (mirror / row.name).exists()
    tribrick_settings(COPIES=[{"name": "mirror", "kind": "path", "address": str(mirror)}])
    code, said = tribrick("reconcile", "--apply")
    assert code == 1 and "nothing may be written there; storage has the bytes" in said["repairs"][0]["what"]
    tribrick_settings(COPIES=[{"name": "mirror", "kind": "path", "address": str(mirror), "writable": True}])
    assert tribrick("reconcile", "--host", "mirror", "--apply")[0] == 0
    assert (mirror / row.name).read_bytes() == b"one"


def test_a_repair_does_not_bring_back_what_is_deleted_meanwhile(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = add()
    copy_to(mirror, row)
    (root() / row.name).unlink()
    real = audit.PathCopy.put

    def slow(self: audit.PathCopy, known: ledger.Known, source: audit.Copy) -> str:
        catalog.delete(row)
        return real(self, known, source)

    monkeypatch.setattr(audit.PathCopy, "put", slow)
    code, said = tribrick("reconcile", "--apply", "--host", "storage")
    assert code == 0 and said["repairs"][0]["what"] == "deleted meanwhile, removed again"
    assert not (root() / row.name).exists()


def test_a_source_that_changes_while_it_is_read(mirror: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = add()
    copy_to(mirror, row)
    (root() / row.name).write_bytes(b"bad")
    real = audit.PathCopy.put

    def late(self: audit.PathCopy, known: ledger.Known, source: audit.Copy) -> str:
        (mirror / row.name).write_bytes(b"bad too")
        return real(self, known, source)

    monkeypatch.setattr(audit.PathCopy, "put", late)
    code, said = tribrick("reconcile", "--apply", "--host", "storage")
    assert code == 1 and "changed while" in said["repairs"][0]["what"]
    assert (root() / row.name).read_bytes() == b"bad" and not list(root().rglob(".*.part"))


@pytest.fixture
def hosts(tribrick_settings: Settings) -> Iterator[list[TestHttpServer]]:
    """Three media hosts that take the place of the volume."""
    with contextlib.ExitStack() as stack:
        servers = [stack.enter_context(TestHttpServer()) for _ in range(3)]
        # As settings, not as OPTIONS: Django 4.2 loses those when STORAGES is overridden in a test.
        tribrick_settings(MEDIA_HOSTS=[server.host for server in servers], WRITE_QUORUM="all")
        backend = {"BACKEND": "tribrick.storage.DistributedStorage"}
        stack.enter_context(override_settings(STORAGES={**settings.STORAGES, "default": backend}))
        yield servers


def test_media_hosts(hosts: list[TestHttpServer]) -> None:
    rows = [add(b"%d" % n * 9000) for n in range(3)]
    dead = add()
    catalog.delete(dead)
    assert tribrick("audit")[0] == 0
    one, two, three = hosts
    one.delete_file(rows[0].name)
    two.create_file(rows[1].name, b"1" * 8000)
    three.create_file(dead.name, b"back")
    code, said = tribrick("audit")
    assert code == 1 and findings(said) == {
        (one.host, "missing", rows[0].name),
        (two.host, "torn", rows[1].name),
        (three.host, "dead", dead.name),
    }
    for _ in range(2):  # the second time everything is in the outbox already
        code, said = tribrick("reconcile", "--apply")
        assert code == 0 and {one["what"] for one in said["repairs"]} == {"put into the outbox"}
    assert Outbox.objects.filter(done=None).exclude(operation="intent").count() == 3
    tribrick("replicate", "--once")
    assert one.get_file(rows[0].name) == b"0" * 9000
    assert not three.has_file(dead.name)
    assert Outbox.objects.filter(done=None, operation="put").exclude(host=two.host).count() == 0


def test_an_absent_media_host(hosts: list[TestHttpServer]) -> None:
    add()
    hosts[1].stop()
    code, said = tribrick("audit")
    assert code == 2 and list(said["away"]) == [hosts[1].host] and not said["findings"]


def test_backfill(hosts: list[TestHttpServer]) -> None:
    rows = [add(b"%d" % n) for n in range(3)]
    dead = add()
    catalog.delete(dead)
    new = hosts[2]
    for row in rows:
        new.delete_file(row.name)
    assert tribrick("backfill", new.host) == (0, {"queued": 3})
    assert tribrick("backfill", new.host) == (0, {"queued": 0})
    code, said = tribrick("replicate", "--once")
    assert code == 0 and said["delivered"] == 3
    assert [new.get_file(row.name) for row in rows] == [b"0", b"1", b"2"]
    assert not new.has_file(dead.name)
    assert tribrick("audit")[0] == 0
    with pytest.raises(CommandError, match="not a media host"):
        call_command("tribrick", "backfill", "nowhere")


# Sweep


def orphan(name: str = "photos/x.txt") -> str:
    """A file as a process leaves it that is killed before its row is committed."""
    from django.core.files.storage import default_storage

    return str(default_storage.store(ContentFile(b"orphan"), name).name)


def test_sweep(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [add() for _ in range(100)]
    lost, dead = orphan(), add()
    catalog.delete(dead)
    (root() / dead.name).write_bytes(b"back")
    (root() / "foreign.txt").write_bytes(b"x")
    (root() / "photos" / "été-aaaaaaaaaaaaaaaaaaaa.txt").write_bytes(b"the token is right, its directories are not")
    said = tribrick("sweep", "--apply")[1]
    assert said["own"] == [] and said["young"] == 1 and (root() / lost).exists(), "it is too young"
    age(root(), monkeypatch)
    (root() / dead.name).write_bytes(b"back")
    code, said = tribrick("sweep")
    assert code == 0 and said["own"] == [lost] and said["dead"] == [dead.name]
    assert (root() / lost).exists() and (root() / dead.name).exists()
    code, said = tribrick("sweep", "--apply")
    assert code == 0 and said["quarantined"] == [lost] and said["removed"] == [dead.name]
    assert set(said["foreign"]) == {"foreign.txt", "photos/été-aaaaaaaaaaaaaaaaaaaa.txt"}
    assert all((root() / name).exists() for name in [*said["foreign"], *(row.name for row in rows)])
    assert not (root() / lost).exists() and not (root() / dead.name).exists()
    (day,) = (root() / audit.QUARANTINE).iterdir()
    assert (day / lost).read_bytes() == b"orphan"
    assert tribrick("audit")[1]["counts"]["storage"]["extra"] == 2
    # The quarantine is kept for 30 days.
    assert tribrick("sweep", "--apply")[1]["expired"] == 0
    assert (day / lost).exists()
    now = datetime.now(timezone.utc)
    kept, old = ((now - timedelta(days=days)).strftime("%Y-%m-%d") for days in (30, 32))
    day.rename(day.with_name(kept))
    assert tribrick("sweep", "--apply")[1]["expired"] == 0
    day.with_name(kept).rename(day.with_name(old))
    assert tribrick("sweep", "--apply")[1]["expired"] == 1
    assert list((root() / audit.QUARANTINE).iterdir()) == []


def test_sweep_empties_the_quarantine_of_a_link_to_a_directory(mirror: Path, tmp_path: Path) -> None:
    row = add()
    copy_to(mirror, row)
    (root() / row.name).unlink()
    (root() / row.name).symlink_to(tmp_path)
    assert tribrick("reconcile", "--host", "storage", "--apply")[0] == 0
    (day,) = (root() / audit.QUARANTINE).iterdir()
    day.rename(day.with_name("2026-01-01"))
    assert tribrick("sweep", "--apply")[1]["expired"] == 1
    assert list((root() / audit.QUARANTINE).iterdir()) == [] and list(tmp_path.iterdir())


def test_sweep_takes_temporary_files_of_killed_processes(monkeypatch: pytest.MonkeyPatch) -> None:
    (root() / "photos").mkdir()
    rests = {"photos/." + "a" * 20 + ".part", "." + "b" * 20 + ".part"}
    for name in rests | {".hidden", "photos/.hidden", "photos/." + "a" * 19 + ".part"}:
        (root() / name).write_bytes(b"half")
    assert tribrick("sweep", "--apply", "--accept", "2")[1]["quarantined"] == []
    age(root(), monkeypatch)
    assert not rests & set(tribrick("adopt")[1]["adopted"])
    said = tribrick("sweep", "--apply", "--accept", "2")[1]
    assert set(said["quarantined"]) == rests and len(said["foreign"]) == 2
    assert (root() / ".hidden").exists() and (root() / "photos/.hidden").exists()


def test_sweep_refuses_more_than_one_in_a_hundred(monkeypatch: pytest.MonkeyPatch) -> None:
    age(root(), monkeypatch)
    for _ in range(198):
        add()
    lost = [orphan() for _ in range(3)]
    with pytest.raises(CommandError, match="3 of 201 files would be taken away, more than 1 %"):
        call_command("tribrick", "sweep", "--apply", stdout=io.StringIO())
    assert all((root() / name).exists() for name in lost)
    assert len(tribrick("sweep", "--apply", "--accept", "3")[1]["quarantined"]) == 3


def test_sweep_refuses_when_the_ledger_knows_better(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, tribrick_settings: Settings
) -> None:
    age(root(), monkeypatch)
    row = add()
    tribrick_settings(LEDGER=str(tmp_path / "ledger.sqlite"))
    ledger.follow_once(tmp_path / "ledger.sqlite")
    MediaFile.objects.all().delete()
    with pytest.raises(CommandError, match="the catalog has lost rows".capitalize()):
        call_command("tribrick", "sweep", "--apply", "--accept", "1", stdout=io.StringIO())
    assert (root() / row.name).exists()


def test_sweep_looks_again_before_it_takes(monkeypatch: pytest.MonkeyPatch) -> None:
    age(root(), monkeypatch)
    name = orphan()
    found = audit.strays()
    catalog.record(catalog.StoredFile(name, "0" * 64, 6))
    assert audit.sweep(found, accept=1).quarantined == []
    assert (root() / name).exists()


def test_sweep_without_the_volume() -> None:
    (root() / ".tribrick-volume").unlink()
    with pytest.raises(StorageUnavailable):
        audit.strays()
    assert tribrick("sweep", "--apply")[0] == 2


def test_settled_before_the_oldest_transaction() -> None:
    """24 hours before now, or before the oldest open transaction, whoever has it."""
    now = datetime.now(timezone.utc)
    assert abs(now - audit.settled_before() - timedelta(hours=24)) < timedelta(seconds=5)
    opened, go = threading.Event(), threading.Event()

    def old() -> None:
        with transaction.atomic():
            Change.objects.exists()
            opened.set()
            go.wait(30)
        connection.close()

    thread = threading.Thread(target=old)
    thread.start()
    try:
        assert opened.wait(20)
        first = audit.settled_before()
        time.sleep(0.3)
        assert audit.settled_before() == first
    finally:
        go.set()
        thread.join()
    assert audit.settled_before() > first


def test_hidden_sessions_are_not_guessed_about() -> None:
    own = connection.settings_dict
    with connection.cursor() as cursor:
        cursor.execute("CREATE ROLE modest LOGIN; GRANT pg_read_all_data TO modest")
    import psycopg

    other = psycopg.connect(dbname=own["NAME"], host=own["HOST"], user=own["USER"])
    connection.close()
    before = own["USER"]
    own["USER"] = "modest"
    try:
        with pytest.raises(audit.AuditError, match="hidden"):
            audit.settled_before()
        other.execute("GRANT pg_read_all_stats TO modest")
        other.commit()
        audit.settled_before()
    finally:
        other.close()
        connection.close()
        own["USER"] = before
        with connection.cursor() as cursor:
            cursor.execute("DROP OWNED BY modest; DROP ROLE modest")


# Adopt


def test_adopt(monkeypatch: pytest.MonkeyPatch, user: Any) -> None:
    known = add()
    dead = add()
    catalog.delete(dead)
    lost = orphan()
    files = {
        "old/Été ☃.JPG": b"foreign",
        "old/deep/a.txt": b"a",
        "other/b.txt": b"b",
        "x" * 250 + "/" + "y" * 9: b"long",
    }
    for name, data in files.items():
        (root() / name).parent.mkdir(parents=True, exist_ok=True)
        (root() / name).write_bytes(data)
    bad = os.fsencode(root()) + b"/\xff.txt"
    Path(os.fsdecode(bad)).write_bytes(b"x")
    assert tribrick("adopt")[1]["adopted"] == [], "all changed within the last hour"
    age(root(), monkeypatch)
    os.utime(root() / "old/Été ☃.JPG", (1_000_000_000,) * 2)
    code, said = tribrick("adopt", "--under", "old", "--owner", "ada")
    assert code == 0 and set(said["adopted"]) == {"old/Été ☃.JPG", "old/deep/a.txt"}
    assert MediaFile.objects.filter(state="stored").count() == 1
    tribrick("adopt", "--under", "old", "--owner", "ada", "--apply")
    row = MediaFile.objects.get(name="old/Été ☃.JPG")
    assert (row.size, row.original, row.content_type, row.owner) == (7, "Été ☃.JPG", "image/jpeg", user)
    assert row.created == datetime(2001, 9, 9, 1, 46, 40, tzinfo=timezone.utc)
    code, said = tribrick("adopt", "--apply")
    assert code == 1 and set(said["adopted"]) == {"other/b.txt", lost}
    assert len(said["refused"]) == 2
    assert {row.name for row in MediaFile.objects.filter(state="stored")} == {
        known.name, lost, "other/b.txt", "old/Été ☃.JPG", "old/deep/a.txt",
    }  # fmt: skip
    os.unlink(bad)
    assert tribrick("audit")[1]["counts"]["storage"]["missing"] == 0
    with pytest.raises(CommandError, match="no account bob"):
        call_command("tribrick", "adopt", "--owner", "bob")


def test_adopt_leaves_what_changes_while_it_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    age(root(), monkeypatch)
    (root() / "a.txt").write_bytes(b"a")
    found = audit.strays()
    (root() / "a.txt").write_bytes(b"ab")
    (one,) = audit.adopt(found, apply=True)
    assert "changed while" in one.refused and not MediaFile.objects.exists()


# The other commands


def test_versions_command() -> None:
    one = add(b"1")
    two = catalog.replace(one, ContentFile(b"22"))
    said = tribrick("versions", two.name)[1]
    assert [(row["version"], row["current"], row["size"]) for row in said["versions"]] == [(2, True, 2), (1, False, 1)]
    said = tribrick("versions", one.name, "--restore")[1]
    assert [row["current"] for row in said["versions"]] == [False, True]
    assert tribrick("versions", "--expire", "--keep", "1", "--apply")[1]["expired"] == []
    assert tribrick("versions", "--expire", "--older-than", "1", "--apply")[1]["expired"] == []
    assert tribrick("versions", "--expire")[1] == {"applied": False, "expired": [two.name]}
    assert (root() / two.name).exists()
    assert tribrick("versions", "--expire", "--apply")[1]["expired"] == [two.name]
    assert not (root() / two.name).exists()
    assert tribrick("versions", "unknown") == (1, None)
    assert tribrick("versions", two.name, "--restore") == (1, None)


def test_ledger_commands(tmp_path: Path, tribrick_settings: Settings) -> None:
    with pytest.raises(CommandError, match="LEDGER"):
        call_command("tribrick", "ledger", "verify")
    tribrick_settings(LEDGER=str(tmp_path / "ledger.sqlite"))
    row = add()
    assert tribrick("ledger", "follow", "--once") == (0, {"copied": 1})
    add()
    code, said = tribrick("ledger", "verify")
    assert code == 0 and (said["number"], said["behind"]) == (1, 1)
    assert tribrick("ledger", "rebuild") == (1, None), "the database has more"
    tribrick("ledger", "follow", "--once")
    MediaFile.objects.get(pk=row.pk).delete()
    assert tribrick("ledger", "rebuild")[1]["files"] == 1
    assert not MediaFile.objects.filter(name=row.name).exists()
    assert tribrick("ledger", "rebuild", "--apply")[1]["files"] == 1
    assert MediaFile.objects.get(name=row.name).pk == row.pk
    Path(tmp_path / "ledger.sqlite").write_bytes(b"junk")
    assert tribrick("ledger", "verify") == (1, None)


def test_replicate_finishes_deletes() -> None:
    row = add()
    with transaction.atomic():
        catalog.delete(row)
        connection.run_on_commit = []  # as if it were killed right after COMMIT
    assert (root() / row.name).exists()
    code, said = tribrick("replicate", "--once")
    assert code == 0 and said["removed"] == 1
    assert not (root() / row.name).exists()


def test_replicate_deletes_again_once_a_boot(tmp_path: Path) -> None:
    """After a power cut of all nodes a deleted file may be back."""
    row, marker = add(), tmp_path / "again"
    catalog.delete(row)

    def back() -> bool:
        (root() / row.name).write_bytes(b"back")
        assert tribrick("replicate", "--once", "--again-unless", str(marker))[0] == 0
        return (root() / row.name).exists()

    assert not back() and marker.exists()
    assert back(), "it was done since the boot"
    marker.unlink()
    assert not back()


def test_replicate_removes_what_came_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """A heal may bring a deleted file back long after the unlink."""

    class OnePass(threading.Event):
        passes = 0

        def wait(self, timeout: float | None = None) -> bool:
            if threading.current_thread() is not threading.main_thread():
                return super().wait(timeout)
            self.passes += 1
            if self.passes > 1:
                self.set()
            return self.is_set()

    monkeypatch.setattr(commands, "_stop_on_signals", OnePass)
    row, young = add(), add()
    for one in row, young:
        catalog.delete(one)
        (root() / one.name).write_bytes(b"back")
    MediaFile.objects.filter(pk=row.pk).update(deleted=django_now() - timedelta(minutes=50))
    call_command("tribrick", "replicate")
    assert not (root() / row.name).exists(), "32 minutes of age were within the last hour"
    assert (root() / young.name).exists(), "its first minute is not over"


@pytest.mark.parametrize("arguments", ["'ledger', 'follow', '--interval', '0.1'", "'replicate'"])
def test_services_end_at_sigterm(arguments: str, tmp_path: Path, process: Process) -> None:
    done = process(
        f"""
import os, signal, threading
from django.core.management import call_command
from django.db import connection
from tribrick.management.commands import tribrick as module
real = module._stop_on_signals
def armed():
    stop = real()
    threading.Timer(0.5, os.kill, (os.getpid(), signal.SIGTERM)).start()
    return stop
module._stop_on_signals = armed
from django.conf import settings
settings.TRIBRICK = dict(settings.TRIBRICK, LEDGER={str(tmp_path / "l.sqlite")!r})
call_command('tribrick', {arguments})
print('ended')"""
    )
    assert (done.returncode, done.stdout.strip()) == (0, "ended"), done.stderr


def test_help_of_every_command(process: Process) -> None:
    commands = ["audit", "reconcile", "adopt", "sweep", "versions", "ledger", "replicate", "backfill"]
    done = process(
        "import io, contextlib\nfrom django.core.management import ManagementUtility\n"
        f"for name in {commands}:\n"
        "    with contextlib.suppress(SystemExit):\n"
        "        ManagementUtility(['manage.py', 'tribrick', name, '--help']).execute()\n"
    )
    assert done.returncode == 0 and done.stdout.count("Exit codes:") == len(commands), done.stderr


def test_exit_code_of_the_process(process: Process) -> None:
    row = add()
    run = "from django.core.management import ManagementUtility as M\nM(['manage.py', 'tribrick', 'audit']).execute()"
    done = process(run)
    assert done.returncode == 0 and done.stdout.strip() == "1 files, 1 copies, 0 differences", done.stderr
    (root() / row.name).unlink()
    done = process(run)
    assert done.returncode == 1 and f"missing: {row.name} in storage" in done.stdout
    (root() / ".tribrick-volume").unlink()
    assert process(run).returncode == 2


def test_progress_on_a_terminal_only(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    import sys

    add()
    tribrick("audit")
    assert capsys.readouterr().err == ""
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    tribrick("audit")
    assert "100 % 1 of 1" in capsys.readouterr().err
