"""The receiver itself: statuses, names, signatures, ledger, memory, permissions, what it keeps."""

from __future__ import annotations

import base64
import contextlib
import errno
import gc
import hashlib
import http.client
import io
import itertools
import json
import os
import random
import shutil
import signal
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from urllib.parse import quote

import pytest

from tribrick import receiver as module
from tribrick.ledger import _SCHEMA
from tribrick.receiver import INCOMING, Receiver, ReceiverError, application
from tribrick.sentinel import HISTORY
from tribrick.signature import sign
from tribrick.testing import wait_for

SOURCES = Path(__file__).resolve().parents[4] / "src"
KEYS = {"web": "a secret", "old": "an older secret"}
ONE = b"one"
LIMIT = 1024 * 1024
Asked = tuple[int, bytes, dict[str, str]]


class UnixConnection(http.client.HTTPConnection):
    """HTTP to a Unix socket."""

    def __init__(self, path: str) -> None:
        super().__init__("localhost", timeout=60)
        self._path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(60)
        self.sock.connect(self._path)


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def digest(data: bytes) -> dict[str, str]:
    """The header that a transport sends."""
    return {"Content-Digest": f"sha-256=:{base64.b64encode(hashlib.sha256(data).digest()).decode()}:"}


class Client:
    """Speaks to the receiver as gunicorn serves it, at its socket."""

    def __init__(self, listening: str, files: Path) -> None:
        self.listening, self.files = listening, files

    def ask(
        self,
        method: str,
        name: str,
        body: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        *,
        raw: bool = False,
    ) -> tuple[int, bytes, dict[str, str]]:
        """Return status, body and headers of the answer."""
        connection = UnixConnection(self.listening)
        with contextlib.closing(connection):
            connection.request(method, name if raw else f"/{quote(name)}", body=body, headers=dict(headers or {}))
            response = connection.getresponse()
            return response.status, response.read(), {key.lower(): value for key, value in response.getheaders()}

    def put(self, name: str, data: bytes, **headers: str) -> int:
        """PUT as it should be."""
        return self.ask("PUT", name, data, {**digest(data), **headers})[0]

    def visible(self) -> dict[str, bytes]:
        """What lies under a name."""
        return {
            str(path.relative_to(self.files)): path.read_bytes()
            for path in self.files.rglob("*")
            if path.is_file() and not str(path.relative_to(self.files)).startswith(".")
        }

    def incoming(self) -> list[str]:
        """The temporary files."""
        return os.listdir(self.files / INCOMING)


@pytest.fixture(scope="module")
def client(machine: Any) -> Client:
    """A receiver without keys, of which bodies up to 1 MiB are taken."""
    place = machine("receiver-alone")
    _, listening = place.gunicorn(MAX_BYTES=str(LIMIT))
    return Client(listening, place.work / "files")


@pytest.fixture
def direct(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Call a receiver without a server between: ``direct(method, name, data, **environ)``."""
    for name in ("root", "state"):
        (tmp_path / name).mkdir(exist_ok=True)
    with contextlib.ExitStack() as stack:

        def make(**options: Any) -> Callable[..., Any]:
            made = Receiver(tmp_path / "root", tmp_path / "state", **options)

            def ask(method: str, name: str, data: bytes = b"", **environ: Any) -> tuple[int, bytes, dict[str, str]]:
                return call(made, method, name, data, **environ)

            ask.receiver = made  # type: ignore[attr-defined]
            return ask

        yield make
        stack.close()


def call(
    made: Receiver, method: str, name: str, data: bytes = b"", **environ: Any
) -> tuple[int, bytes, dict[str, str]]:
    """Call a WSGI application."""
    told: list[Any] = []
    given = {
        "REQUEST_METHOD": method,
        "PATH_INFO": f"/{name}".encode().decode("latin-1"),
        "wsgi.input": io.BytesIO(data),
        **({"CONTENT_LENGTH": str(len(data)), "HTTP_X_CONTENT_SHA256": sha256(data)} if method == "PUT" else {}),
        **environ,
    }
    body = made(given, lambda status, headers: told.extend([int(status[:3]), dict(headers)]))
    with contextlib.ExitStack() as stack:
        if hasattr(body, "close"):
            stack.callback(body.close)
        return told[0], b"".join(body), told[1]


# Statuses


def test_a_file_from_first_to_last(client: Client) -> None:
    name = "first/a/3/x.bin"
    assert client.ask("GET", name)[0] == client.ask("HEAD", name)[0] == 404
    assert client.put(name, ONE) == 201
    assert client.put(name, ONE) == 204
    assert client.put(name, b"two") == 409
    assert client.put(f"{name}/below", b"two") == 409, "a part of the name is a file"
    assert client.put("first/a", b"two") == 409, "the name is a directory"
    status, body, headers = client.ask("GET", name)
    assert (status, body, headers["content-length"]) == (200, ONE, "3")
    status, body, headers = client.ask("HEAD", name)
    assert (status, body, headers["content-length"]) == (200, b"", "3")
    assert client.ask("GET", "first/a")[0] == 404, "a directory is no file"
    assert client.ask("GET", f"{name}/below")[0] == 404
    assert client.ask("DELETE", name)[0] == 204
    assert client.ask("DELETE", name)[0] == 204
    assert client.ask("DELETE", "first/never/there")[0] == 204
    assert client.ask("DELETE", "first/a")[0] == 204, "a directory is no file, and stays"
    assert client.put(name, ONE) == client.ask("GET", name)[0] == client.ask("HEAD", name)[0] == 410
    assert client.put("first/never/there", ONE) == 410
    assert not [found for found in client.visible() if found.startswith("first/")]
    assert client.incoming() == []


def test_an_empty_file(client: Client) -> None:
    assert client.put("empty.bin", b"") == 201
    assert client.ask("GET", "empty.bin")[:2] == (200, b"")


@pytest.mark.parametrize(
    ("headers", "data", "status"),
    [
        ({}, ONE, 400),
        ({"X-Content-SHA256": sha256(ONE)}, b"ono", 400),
        ({"X-Content-SHA256": sha256(ONE)[:-1]}, ONE, 400),
        ({"Content-Digest": "sha-256=:AAAA:"}, ONE, 400),
        ({"Content-Digest": "sha-512=:AAAA:"}, ONE, 400),
        ({"Content-Digest": ""}, ONE, 400),
        ({**digest(b"two"), "X-Content-SHA256": sha256(ONE)}, ONE, 400),
        ({**digest(ONE), "Content-Range": "bytes 0-2/9"}, ONE, 400),
        ({**digest(ONE), "Content-Encoding": "gzip"}, ONE, 400),
        ({**digest(b"x" * (LIMIT + 1))}, b"x" * (LIMIT + 1), 413),
        ({"Content-Digest": f"sha-512=:AAAA:, {digest(ONE)['Content-Digest']}"}, ONE, 201),
        ({**digest(ONE), "X-Content-SHA256": sha256(ONE).upper()}, ONE, 201),
        ({**digest(b"x" * LIMIT)}, b"x" * LIMIT, 201),
    ],
)
def test_what_a_put_must_bring(headers: dict[str, str], data: bytes, status: int, client: Client) -> None:
    name = f"brings/{sha256(repr((headers, data)).encode())}"
    assert client.ask("PUT", name, data, headers)[0] == status
    assert client.visible().get(name) == (data if status == 201 else None)
    assert client.incoming() == []


def test_a_body_without_a_length_is_refused(client: Client) -> None:
    connection = UnixConnection(client.listening)
    with contextlib.closing(connection):
        connection.request("PUT", "/chunked.bin", body=iter([ONE]), headers=digest(ONE), encode_chunked=True)
        assert connection.getresponse().status == 411
    assert "chunked.bin" not in client.visible()


@pytest.mark.parametrize("method", ["POST", "PATCH", "OPTIONS", "MKCOL", "MOVE", "COPY", "PROPFIND"])
def test_other_methods(method: str, client: Client) -> None:
    assert client.ask(method, "x.bin")[0] == 405


BAD_NAMES = [
    "/",
    "//x",
    "/x/",
    "/a//b",
    "/.",
    "/..",
    "/../x",
    "/a/../b",
    "/a/./b",
    "/.hidden",
    "/a/.hidden",
    "/.tribrick-incoming/x",
    "/%2e%2e/x",
    "/a/%2e%2e/%2e%2e/x",
    "/a%2f..%2f..%2fx",
    "/%2e%2e%2fstate%2ftombstones.sqlite",
    "/a%00b",
    "/a%0ab",
    "/a%7fb",
    "/%ff",
    "/%c0%ae%c0%ae/x",
    "/%ed%a0%80",
    "/-/x",
    "/-",
    f"/{'x' * 256}",
    f"/{'y' * 200}/" + "/".join(["y" * 200] * 5),
    "/x?y=z",
]


@pytest.mark.parametrize("path", BAD_NAMES, ids=range(len(BAD_NAMES)))
def test_hostile_names(path: str, client: Client) -> None:
    before, outside = client.visible(), sorted(os.listdir(client.files.parent))
    assert client.ask("PUT", path, ONE, digest(ONE), raw=True)[0] == 400
    assert client.ask("GET", path, raw=True)[0] == 400
    assert client.ask("DELETE", path, raw=True)[0] == 400
    assert client.visible() == before
    assert sorted(os.listdir(client.files.parent)) == outside


def test_no_link_is_followed(client: Client, tmp_path: Path) -> None:
    (tmp_path / "secret.txt").write_bytes(b"secret")
    (client.files / "link").symlink_to(tmp_path)
    (client.files / "link.txt").symlink_to(tmp_path / "secret.txt")
    assert client.ask("GET", "link/secret.txt")[0] == client.ask("GET", "link.txt")[0] == 404
    assert client.put("link/new.txt", ONE) == client.put("link.txt", b"secret") == 409
    assert client.ask("DELETE", "link/secret.txt")[0] == 204
    assert os.listdir(tmp_path) == ["secret.txt"]


def test_a_pipe_is_no_file(client: Client) -> None:
    os.mkfifo(client.files / "pipe")
    assert client.ask("GET", "pipe")[0] == 404
    assert client.put("pipe", ONE) == 409


@pytest.mark.parametrize(
    ("wanted", "status", "content", "named"),
    [
        ("bytes=0-3", 206, b"0123", "bytes 0-3/10"),
        ("bytes=8-99", 206, b"89", "bytes 8-9/10"),
        ("bytes=8-", 206, b"89", "bytes 8-9/10"),
        ("bytes=-1", 206, b"9", "bytes 9-9/10"),
        ("bytes=-99", 206, b"0123456789", "bytes 0-9/10"),
        ("bytes=10-", 416, None, "bytes */10"),
        ("bytes=-0", 416, None, "bytes */10"),
        ("bytes=0-1,3-4", 200, b"0123456789", None),
        ("lines=0-1", 200, b"0123456789", None),
        ("bytes=-", 200, b"0123456789", None),
        (f"bytes={'9' * 5000}-", 200, b"0123456789", None),
    ],
)
def test_ranges(wanted: str, status: int, content: bytes | None, named: str | None, client: Client) -> None:
    client.put("ranges.bin", b"0123456789")
    answered, body, headers = client.ask("GET", "ranges.bin", headers={"Range": wanted})
    assert answered == status
    assert content is None or (body, headers["content-length"]) == (content, str(len(content)))
    assert headers.get("content-range") == named
    assert client.ask("GET", "ranges.bin", headers={"Range": wanted, "If-Range": '"x"'})[:2] == (200, b"0123456789")


def test_ready(client: Client) -> None:
    assert client.ask("GET", "/-/ready", raw=True)[:2] == (200, b"ready\n")
    assert client.ask("HEAD", "/-/ready", raw=True)[0] == 200
    assert client.ask("PUT", "/-/ready", ONE, digest(ONE), raw=True)[0] == 400


def test_not_ready_without_its_directory(direct: Any, tmp_path: Path) -> None:
    ask = direct()
    assert ask("GET", "-/ready")[0] == 200
    shutil.rmtree(tmp_path / "root")  # as if its disk was unmounted
    assert ask("GET", "-/ready")[0] == 503
    assert ask("PUT", "x", ONE)[0] == 503
    assert not (tmp_path / "root").exists()


def test_accel(direct: Any, tmp_path: Path) -> None:
    ask = direct(accel="/_files/")
    assert ask("PUT", "é/a b%.txt", ONE)[0] == 201
    status, body, headers = ask("GET", "é/a b%.txt")
    assert (status, body, headers["X-Accel-Redirect"]) == (200, b"", "/_files/%C3%A9/a%20b%25.txt")
    assert ask("GET", "missing")[0] == 404


# Signatures


def test_signed_requests(direct: Any, tmp_path: Path) -> None:
    ask = direct(keys=KEYS)

    def signed(method: str, name: str, data: bytes = b"", sent: bytes | None = None, **wrong: Any) -> int:
        said = {
            "method": method,
            "name": name,
            **{key[5:]: wrong.pop(key) for key in list(wrong) if key[:5] == "said_"},
        }
        header = sign(**{"secret": KEYS["web"], "key_id": "web", "digest": sha256(data), **said, **wrong})
        return int(ask(method, name, data if sent is None else sent, HTTP_AUTHORIZATION=header)[0])

    assert signed("PUT", "a/x.txt", ONE) == 201
    assert signed("PUT", "a/y.txt", ONE, secret=KEYS["old"], key_id="old") == 201
    for method in ("GET", "HEAD"):
        assert signed(method, "a/x.txt") == 200
        assert signed(method, "a/x.txt", ONE, b"") == 400, "the digest of a body that is not there"
    now = time.time()
    for method, data in (("PUT", ONE), ("GET", b""), ("HEAD", b""), ("DELETE", b"")):
        assert ask(method, "a/x.txt", data)[0] == 401, "not signed"
        assert ask(method, "a/x.txt", data, HTTP_AUTHORIZATION="Basic eDp5")[0] == 401
        assert signed(method, "a/x.txt", data, secret="wrong") == 401
        assert signed(method, "a/x.txt", data, key_id="unknown") == 401
        assert signed(method, "a/x.txt", data, said_name="a/y.txt") == 401, "signed for another name"
        assert signed(method, "a/x.txt", data, said_method="POST") == 401, "signed for another method"
        assert signed(method, "a/x.txt", data, now=now - 301) == 401
        assert signed(method, "a/x.txt", data, now=now + 310) == 401
    assert signed("PUT", "a/z.txt", ONE, b"two") == 400, "the digest is not that of the body"
    assert ask("GET", "a/x.txt")[2]["WWW-Authenticate"] == "Tribrick"
    assert ask("GET", "-/ready")[0] == 200, "a probe needs no key"
    assert sorted(os.listdir(tmp_path / "root/a")) == ["x.txt", "y.txt"]
    assert signed("DELETE", "a/x.txt") == 204


def test_the_body_is_compared_with_the_signature_even_without_another_header(direct: Any, tmp_path: Path) -> None:
    ask = direct(keys=KEYS)
    header = sign(KEYS["web"], "PUT", "x", sha256(ONE), key_id="web")
    bare = {"HTTP_AUTHORIZATION": header, "HTTP_X_CONTENT_SHA256": None}
    assert ask("PUT", "x", b"two", **bare)[0] == 400
    assert not (tmp_path / "root/x").exists()
    assert ask("PUT", "x", ONE, **bare)[0] == 201


# The ledger


def make_ledger(path: Path, **files: tuple[str, str]) -> Path:
    """Write a ledger that knows these files: name -> (state, SHA-256)."""
    path.unlink(missing_ok=True)
    with contextlib.closing(sqlite3.connect(path)) as database:
        database.executescript(_SCHEMA)
        rows = [(name, state, "default", known, 3) for name, (state, known) in files.items()]
        database.executemany("INSERT INTO files VALUES (?, ?, ?, ?, ?)", rows)
        database.commit()
    return path


def test_what_the_ledger_knows_deleted_stays_deleted(direct: Any, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    ask = direct(ledger=ledger)
    for name in ("dead", "purged", "alive"):
        assert ask("PUT", name, ONE)[0] == 201, "there is no ledger yet"
    make_ledger(ledger, dead=("deleted", ""), purged=("purged", ""), alive=("stored", sha256(ONE)))
    for name in ("dead", "purged"):
        assert ask("PUT", name, ONE)[0] == ask("GET", name)[0] == 410
    assert ask("PUT", "alive", ONE)[0] == 204
    assert ask("GET", "alive")[0] == 200
    (tmp_path / "root/alive").unlink()
    assert ask("PUT", "alive", b"two")[0] == 409, "other bytes than the ledger knows"
    assert not (tmp_path / "root/alive").exists()
    assert ask("PUT", "alive", ONE)[0] == 201
    assert ask("PUT", "unknown", ONE)[0] == 201
    assert ask("GET", "-/ready")[0] == 200


def test_what_was_changed_directly_is_left_to_reconciliation(direct: Any, tmp_path: Path) -> None:
    ledger, root = tmp_path / "ledger.sqlite", tmp_path / "root"
    ask = direct(ledger=ledger)
    for name in ("changed", "same", "unknown"):
        assert ask("PUT", name, ONE)[0] == 201
    make_ledger(ledger, changed=("stored", sha256(ONE)), same=("stored", sha256(ONE)))
    (root / "changed").write_bytes(b"by SFTP")
    (root / HISTORY).mkdir()
    for name in ("changed", "same", "unknown", "never"):
        assert ask("DELETE", name)[0] == 204
        assert ask("GET", name)[0] == ask("PUT", name, ONE)[0] == 410, "deleted all the same"
    assert (root / "changed").read_bytes() == b"by SFTP"
    assert not (root / "same").exists()
    assert (root / "unknown").read_bytes() == ONE, "nobody can say whether it is what was deleted"
    direct(ledger=ledger)
    assert (root / "changed").exists(), "also after a restart"
    ledger.write_bytes(b"no ledger at all" * 1000)
    (root / "late").write_bytes(b"by SFTP")
    assert ask("DELETE", "late")[0] == 204 and (root / "late").exists()
    (root / HISTORY).rmdir()
    assert ask("DELETE", "changed")[0] == 204
    assert not (root / "changed").exists(), "nobody reconciles here"


def test_a_ledger_that_cannot_be_read_is_no_permission(direct: Any, tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.sqlite"
    ask = direct(ledger=ledger)
    ledger.write_bytes(b"no ledger at all" * 1000)
    assert ask("PUT", "x", ONE)[0] == ask("GET", "-/ready")[0] == 503
    assert not (tmp_path / "root/x").exists()
    assert ask("DELETE", "x")[0] == 204, "deleting needs no ledger"


def test_a_damaged_file_is_replaced_by_what_the_ledger_knows(direct: Any, tmp_path: Path) -> None:
    ledger = make_ledger(tmp_path / "ledger.sqlite", torn=("stored", sha256(ONE)))
    ask = direct(ledger=ledger)
    assert ask("PUT", "torn", ONE)[0] == 201
    for damage in (b"\0\0\0", b"on", b""):
        (tmp_path / "root/torn").write_bytes(damage)
        assert ask("PUT", "torn", b"two")[0] == 409
        assert (tmp_path / "root/torn").read_bytes() == damage
        assert ask("PUT", "torn", ONE)[0] == 204
        assert (tmp_path / "root/torn").read_bytes() == ONE
    assert os.listdir(tmp_path / "root" / INCOMING) == []


# The order of things


class Recording:
    """Stands for the module os, and notes what is done to files."""

    def __init__(self, root: Path) -> None:
        self._root = root
        self.done: list[str] = []

    def __getattr__(self, name: str) -> Any:
        real = getattr(os, name)
        if name not in ("fsync", "link", "unlink", "rename", "mkdir"):
            return real

        def noted(*arguments: Any, **options: Any) -> Any:
            result = real(*arguments, **options)
            about = arguments[0]
            if name == "fsync":
                path = Path(os.readlink(f"/proc/self/fd/{about}"))
                about = path.relative_to(self._root) if path.is_relative_to(self._root) else path
            text = f"{name} {about}"
            self.done.append(text.replace(next((p for p in text.split() if p.endswith(".part")), "\0"), "T"))
            return result

        return noted


def test_nothing_is_acknowledged_before_it_is_durable(
    direct: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ask = direct()
    recording = Recording(tmp_path / "root")
    monkeypatch.setattr(module, "os", recording)

    def done(method: str, name: str) -> list[str]:
        recording.done.clear()
        ask(method, name, ONE)
        return [text.replace(f"{INCOMING}/", "") for text in recording.done]

    assert done("PUT", "a/b/x") == [
        "fsync T",
        "mkdir a",
        "mkdir b",
        "link T",
        "fsync T",
        "fsync a/b",
        "fsync .",
        "fsync a",
        "unlink T",
    ]
    # The entries of its directories are durable by now; the file's own is not.
    assert done("PUT", "a/b/y") == ["fsync T", "link T", "fsync T", "fsync a/b", "unlink T"]
    # Who sent it first may have been killed before the fsync.
    assert done("PUT", "a/b/y") == ["fsync T", "fsync a/b/y", "fsync a/b", "unlink T"]
    monkeypatch.setattr(ask.receiver.tombstones, "add", lambda name: recording.done.append(f"tombstone {name}"))
    assert done("DELETE", "a/b/y") == ["tombstone a/b/y", "unlink y", "fsync a/b"]


def test_a_start_knows_no_file_gone_before_that_is_durable(
    direct: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Who began the DELETE was killed between unlink and fsync: after a power cut the file would be back for good."""
    ask = direct()
    assert ask("PUT", "a/b/x", ONE)[0] == 201
    ask.receiver.tombstones.add("a/b/x")
    (tmp_path / "root/a/b/x").unlink()
    recording = Recording(tmp_path / "root")
    monkeypatch.setattr(module, "os", recording)
    again = direct()
    assert "fsync a/b" in recording.done and again.receiver.tombstones.unswept() == []


def test_tombstones_are_durable_at_the_commit(direct: Any) -> None:
    database = direct().receiver.tombstones._database()
    assert database.execute("PRAGMA journal_mode").fetchone()[0] == "wal"
    assert database.execute("PRAGMA synchronous").fetchone()[0] == 2, "FULL"


def test_a_delete_between_look_and_link(direct: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The DELETE is acknowledged while the PUT has found no tombstone and has not linked yet."""
    ask = direct()
    deleted = threading.Event()
    real = os.link

    def delete() -> None:
        assert ask("DELETE", "a/x")[0] == 204
        deleted.set()

    def link(*arguments: Any, **options: Any) -> None:
        other = threading.Thread(target=delete)
        other.start()
        deleted.wait(0.5)  # it must wait for the lock; without one it is through by now
        assert not deleted.is_set()
        real(*arguments, **options)

    monkeypatch.setattr(os, "link", link)
    assert ask("PUT", "a/x", ONE)[0] in (201, 410)
    assert deleted.wait(10)
    assert not (tmp_path / "root/a/x").exists()
    assert ask("GET", "a/x")[0] == 410


def test_a_delete_while_the_body_comes(direct: Any, tmp_path: Path) -> None:
    ask = direct()

    class Body(io.BytesIO):
        def read(self, size: int | None = -1) -> bytes:
            assert ask("DELETE", "x")[0] == 204
            return super().read(size)

    assert ask("PUT", "x", ONE, **{"wsgi.input": Body(ONE)})[0] == 410
    assert not (tmp_path / "root/x").exists()


def test_put_and_delete_at_once(client: Client) -> None:
    """Many times, over the worker processes: after the DELETE's answer the name is never seen again."""
    for number in range(60):
        name, data = f"race/{number}", random.Random(number).randbytes(20_000)
        statuses: list[int] = []
        seen: list[int] = []

        def put(name: str = name, data: bytes = data, statuses: list[int] = statuses) -> None:
            statuses.append(client.put(name, data))

        def delete(name: str = name, seen: list[int] = seen) -> None:
            assert client.ask("DELETE", name)[0] == 204
            seen += [number for number in range(20) if (client.files / name).exists()]

        threads = [threading.Thread(target=put), threading.Thread(target=put), threading.Thread(target=delete)]
        random.Random(number).shuffle(threads)
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert len(statuses) == 2
        assert set(statuses) <= {201, 204, 410}
        assert seen == []
        assert not (client.files / name).exists()
    assert client.incoming() == []


@pytest.mark.parametrize("different", [False, True])
def test_the_same_name_at_once(different: bool, client: Client) -> None:
    bodies = [random.Random(number if different else 0).randbytes(50_000) for number in range(12)]
    name, statuses = f"once/{different}", [0] * len(bodies)

    def put(number: int) -> None:
        statuses[number] = client.put(name, bodies[number])

    threads = [threading.Thread(target=put, args=(number,)) for number in range(len(bodies))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [201] + [409 if different else 204] * 11
    assert client.visible()[name] == bodies[statuses.index(201)]
    assert client.incoming() == []


# What goes wrong


def test_a_full_disk_is_507_and_keeps_room_for_tombstones(
    direct: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert direct(reserve=10**18)("PUT", "a/x", ONE)[0] == 507
    ask = direct(reserve=0)
    assert ask("PUT", "a/x", ONE)[0] == 201

    def full(*_arguments: Any, **_options: Any) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "write", full)
        assert ask("PUT", "a/y", ONE)[0] == 507
    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", full)
        assert ask("PUT", "b/y", ONE)[0] == 507
    assert os.listdir(tmp_path / "root/a") == ["x"]
    assert os.listdir(tmp_path / "root" / INCOMING) == []
    ask = direct(reserve=10**18)
    assert ask("DELETE", "a/x")[0] == 204
    assert ask("GET", "a/x")[0] == 410


def test_a_disk_that_fails_is_503(direct: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ask = direct()

    def broken(_descriptor: int) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, "fsync", broken)
    assert ask("PUT", "x", ONE)[0] == 503
    assert not (tmp_path / "root/x").exists()
    assert os.listdir(tmp_path / "root" / INCOMING) == []


def test_no_descriptor_is_left_open(direct: Any) -> None:
    ask = direct()
    ask("PUT", "a/b/warm", ONE)
    gc.collect()  # what earlier tests have left goes now, and not in the middle of this one
    before = len(os.listdir("/proc/self/fd"))
    for number in range(20):
        ask("PUT", f"a/b/{number}", ONE)
        ask("PUT", f"a/b/{number}", ONE)
        ask("PUT", f"a/b/{number}", b"two")
        ask("PUT", f"a/b/wrong{number}", ONE, HTTP_X_CONTENT_SHA256=sha256(b"two"))
        ask("GET", f"a/b/{number}")
        ask("HEAD", f"a/b/{number}")
        ask("GET", "a/missing")
        ask("DELETE", f"a/b/{number}")
    assert len(os.listdir("/proc/self/fd")) <= before


def head_of(name: str, data: bytes) -> bytes:
    """The head of a PUT."""
    lines = f"PUT /{name} HTTP/1.1", "Host: x", f"Content-Length: {len(data)}", f"X-Content-SHA256: {sha256(data)}"
    return "\r\n".join([*lines, "", ""]).encode()


def test_a_body_that_breaks_off(client: Client) -> None:
    connection = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection):
        connection.connect(client.listening)
        head = (
            f"PUT /broken.bin HTTP/1.1\r\nHost: x\r\nContent-Length: 500000\r\nX-Content-SHA256: {sha256(ONE)}\r\n\r\n"
        )
        connection.sendall(head.encode() + b"x" * 250_000)
        wait_for(lambda: len(client.incoming()) == 1, "the upload has begun")
        assert "broken.bin" not in client.visible()
    wait_for(lambda: client.incoming() == [], "its temporary file is gone")
    assert "broken.bin" not in client.visible()


def test_killed_in_the_middle_of_a_body(one_machine: Any) -> None:
    process, listening = one_machine.gunicorn(workers=1)
    client = Client(listening, one_machine.work / "files")
    data = random.Random(9).randbytes(600_000)
    assert client.put("before.bin", data) == 201
    connection = socket.socket(socket.AF_UNIX)
    with contextlib.closing(connection):
        connection.connect(listening)
        connection.sendall(head_of("killed.bin", data) + data[:400_000])
        wait_for(lambda: len(client.incoming()) == 1, "the upload has begun")
        [worker] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        os.kill(int(worker), signal.SIGKILL)
    assert client.visible() == {"before.bin": data}
    assert client.put("killed.bin", data) == 201, "the next worker takes it"
    [rest] = client.incoming()
    one_machine.stop(process)
    for age, there in ((23 * 3600, [rest]), (25 * 3600, [])):
        os.utime(client.files / INCOMING / rest, (time.time() - age,) * 2)
        again, _ = one_machine.gunicorn(workers=1)
        assert client.ask("GET", "-/ready")[0] == 200  # gunicorn listens before its worker has started
        assert client.incoming() == there, "removed at the start when older than a day"
        one_machine.stop(again)
    assert client.visible() == {"before.bin": data, "killed.bin": data}


def test_bytes_under_a_tombstone_go_at_the_start(direct: Any, tmp_path: Path) -> None:
    ask = direct()
    for name in ("a/dead", "a/alive"):
        ask("PUT", name, ONE)
    ask.receiver.tombstones.add("a/dead")  # killed right after the commit
    assert ask("GET", "a/dead")[0] == 410
    direct()
    assert os.listdir(tmp_path / "root/a") == ["alive"]
    assert ask.receiver.tombstones.unswept() == []
    assert ask("PUT", "a/dead", ONE)[0] == 410


# For each line of its input (directories, method, number) this program forks a child that does the operation and is
# killed before or after its n-th step.
CRASHES = """
import hashlib, io, json, os, signal, sys
from tribrick import receiver as module

NEW = b"new" * 100_000
CALLS = set("open mkdir write fsync fdatasync link unlink rename close fstatvfs pread".split())


class Dying:
    at = 0
    steps = 0

    def __getattr__(self, name):
        return self.watched(name, getattr(os, name)) if name in CALLS else getattr(os, name)

    def point(self, name):
        self.steps += 1
        if self.steps == self.at:
            os.write(1, json.dumps({"at": name}).encode() + b"\\n")
            os.kill(os.getpid(), signal.SIGKILL)

    def watched(self, name, real):
        def call(*arguments, **options):
            self.point(f"before {name}")
            result = real(*arguments, **options)
            self.point(f"after {name}")
            return result
        return call


def work(root, state, ledger, method, at):
    made, dying = module.Receiver(root, state, ledger=ledger), Dying()
    dying.at = int(at)
    made.tombstones.add = dying.watched("commit", made.tombstones.add)
    module.os = dying
    environ = {"REQUEST_METHOD": method, "PATH_INFO": "/a/b/new.bin", "wsgi.input": io.BytesIO(NEW)}
    if method == "PUT":
        environ |= {"CONTENT_LENGTH": str(len(NEW)), "HTTP_X_CONTENT_SHA256": hashlib.sha256(NEW).hexdigest()}
    told = []
    made(environ, lambda status, headers: told.append(int(status[:3])))
    os.write(1, json.dumps({"at": "end", "status": told[0]}).encode() + b"\\n")


for line in sys.stdin:
    child = os.fork()
    if child == 0:
        try:
            work(*line.split())
        finally:
            os._exit(0)
    os.waitpid(child, 0)
    os.write(1, b"\\n")  # in case it has said nothing
"""
NEW = b"new" * 100_000


@pytest.fixture(scope="module")
def crashes() -> Iterator[Callable[..., dict[str, Any]]]:
    """Do an operation in a process that is killed on the way; return what it has told."""
    process = subprocess.Popen(
        [sys.executable, "-c", CRASHES],
        env=os.environ | {"PYTHONPATH": str(SOURCES)},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert process.stdin is not None and process.stdout is not None

    def run(*arguments: object) -> dict[str, Any]:
        process.stdin.write(f"{' '.join(map(str, arguments))}\n")
        process.stdin.flush()
        said = process.stdout.readline().strip()
        assert said, f"it has said nothing of {arguments}"
        assert process.stdout.readline() == "\n"
        told: dict[str, Any] = json.loads(said)
        return told

    yield run
    process.stdin.close()
    process.stdout.close()
    assert process.wait(30) == 0


@pytest.mark.parametrize("operation", ["PUT", "PUT again", "PUT mends", "DELETE"])
def test_killed_at_every_step(operation: str, crashes: Callable[..., dict[str, Any]], tmp_path: Path) -> None:
    """Whole files or none, before and after the next start; an acknowledged DELETE stays one."""
    ledger = make_ledger(tmp_path / "ledger.sqlite", **{"a/b/new.bin": ("stored", sha256(NEW))})
    method = operation.split()[0]
    damaged = b"old" * 9
    seen: set[str] = set()
    for at in itertools.count(1):
        root, state = tmp_path / f"root{at}", tmp_path / f"state{at}"
        file = root / "a/b/new.bin"
        (root / "a/b").mkdir(parents=True) if operation != "PUT" else root.mkdir()
        state.mkdir()
        if operation != "PUT":
            file.write_bytes(damaged if operation == "PUT mends" else NEW)
        told = crashes(root, state, ledger, method, at)
        seen.add(told["at"])
        whole = {NEW, damaged} if operation == "PUT mends" else {NEW}
        assert not file.exists() or file.read_bytes() in whole, f"torn when killed {told}"
        assert [str(path.relative_to(root)) for path in (root / "a").rglob("*") if path.is_file()] in (
            [],
            ["a/b/new.bin"],
        )
        if operation in ("PUT again", "PUT mends"):
            assert file.exists(), f"gone when killed {told}"
        for rest in (root / INCOMING).iterdir():
            os.utime(rest, (time.time() - 90_000,) * 2)
        again = Receiver(root, state, ledger=ledger)
        assert os.listdir(root / INCOMING) == []
        if method == "PUT":
            assert call(again, "PUT", "a/b/new.bin", NEW)[0] in (201, 204)
            assert file.read_bytes() == NEW
            assert call(again, "DELETE", "a/b/new.bin")[0] == 204
        else:
            dead = again.tombstones.has("a/b/new.bin")
            assert file.exists() is not dead
            assert call(again, "PUT", "a/b/new.bin", NEW)[0] == (410 if dead else 204)
            assert call(again, "DELETE", "a/b/new.bin")[0] == 204
        assert not file.exists()
        assert call(again, "PUT", "a/b/new.bin", NEW)[0] == 410
        shutil.rmtree(root)
        shutil.rmtree(state)
        if told["at"] == "end":
            assert told["status"] == (201 if operation == "PUT" else 204)
            break
    expected = {
        "PUT": {"write", "fsync", "mkdir", "link", "unlink"},
        "PUT again": {"write", "fsync", "link", "pread", "unlink"},
        "PUT mends": {"write", "fsync", "link", "rename", "unlink"},
        "DELETE": {"commit", "unlink", "fsync"},
    }[operation]
    # A link that is refused comes back as an error, so it has no "after".
    missing = {f"{when} {what}" for what in expected for when in ("before", "after")} - seen
    assert missing <= {"after link", "after unlink"} if operation != "PUT" else not missing


# Memory, permissions


def test_2_gib_in_less_than_100_mib(one_machine: Any) -> None:
    free = shutil.disk_usage(one_machine.work).free
    assert free > 3 * 2**30, f"the test needs 3 GiB of free space, there are {free / 2**30:.1f}"
    process, listening = one_machine.gunicorn(workers=1)
    block, count = random.Random(2).randbytes(2**20), 2048
    hasher = hashlib.sha256()
    for _ in range(count):
        hasher.update(block)
    connection = UnixConnection(listening)
    with contextlib.closing(connection):
        headers = {"Content-Length": str(count * 2**20), "X-Content-SHA256": hasher.hexdigest()}
        connection.request("PUT", "/large/0/1/x.bin", body=iter([block] * count), headers=headers)
        connection.sock.settimeout(300)
        assert connection.getresponse().status == 201
    assert (one_machine.work / "files/large/0/1/x.bin").stat().st_size == 2 * 2**30
    [worker] = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    status = Path(f"/proc/{worker}/status").read_text()
    assert next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) < 100 * 1024


def test_the_site_may_read_and_delete_what_it_stores() -> None:
    """The receiver runs as a user of its own in the site's group; here with bare numbers."""
    with tempfile.TemporaryDirectory() as made:
        work = Path(made)
        work.chmod(0o755)
        root, state = work / "root", work / "state"
        root.mkdir(), state.mkdir()
        group = 54321 if os.geteuid() == 0 else os.getgid()
        if os.geteuid() == 0:
            os.chown(root, 54001, group)
            os.chown(state, 54001, group)
        root.chmod(0o2775)

        def put() -> str:
            given = {"TRIBRICK_RECEIVER_ROOT": str(root), "TRIBRICK_RECEIVER_STATE": str(state)}
            return str(call(application(given), "PUT", "a/b/x.txt", ONE)[0])

        assert _as(54001, group, put) == "201"
        for path, mode in ((root / "a", 0o2775), (root / "a/b", 0o2775), (root / "a/b/x.txt", 0o644)):
            status = path.stat()
            assert (status.st_gid, oct(status.st_mode & 0o7777)) == (group, oct(mode)), path
        assert _as(54002, group, lambda: (root / "a/b/x.txt").read_text()) == "one"
        assert _as(54002, group, lambda: str((root / "a/b/x.txt").unlink())) == "None"
        assert not (root / "a/b/x.txt").exists()


def _as(user: int, group: int, work: Callable[[], str]) -> str:
    """Return what *work* says in a process of another user, where the test may be one."""
    listen, told = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.umask(0o022)
            if os.geteuid() == 0:
                os.setgroups([])
                os.setgid(group)
                os.setuid(user)
            said = work()
        except BaseException as error:  # noqa: BLE001  this process ends here
            said = repr(error)
        os.write(told, said.encode())
        os._exit(0)
    os.close(told)
    with os.fdopen(listen, "rb") as pipe:
        heard = pipe.read().decode()
    assert os.waitpid(child, 0)[1] == 0
    return heard


# Configuration


def test_configuration_that_cannot_work(tmp_path: Path) -> None:
    for name in ("root", "state"):
        (tmp_path / name).mkdir()
    (tmp_path / "root/below").mkdir()
    good = {"ROOT": str(tmp_path / "root"), "STATE": str(tmp_path / "state")}
    keys = tmp_path / "keys.json"

    def problem(**given: str) -> str:
        before = os.umask(0o022)
        try:
            with pytest.raises(ReceiverError) as caught:
                application({f"TRIBRICK_RECEIVER_{key}": value for key, value in {**good, **given}.items()})
        finally:
            os.umask(before)
        return str(caught.value)

    assert "must be given" in problem(ROOT="")
    assert "must be given" in problem(STATE="")
    assert "ROOT: " in problem(ROOT=str(tmp_path / "nowhere")) and "not a directory" in problem(ROOT=str(keys))
    assert "STATE: " in problem(STATE=str(tmp_path / "nowhere"))
    assert "must not lie in" in problem(STATE=str(tmp_path / "root/below"))
    assert "must not lie in" in problem(STATE=str(tmp_path / "root"))
    assert "MAX_BYTES" in problem(MAX_BYTES="4G")
    assert "cannot be read" in problem(KEYS=str(keys))
    for text in ("{}", "[]", '{"web": ""}', '{"web": 1}', "x"):
        keys.write_text(text)
        keys.chmod(0o640)
        assert "KEYS" in problem(KEYS=str(keys)), text
    keys.write_text('{"web": "secret"}')
    keys.chmod(0o644)
    assert "everybody may read" in problem(KEYS=str(keys))
    assert sorted(os.listdir(tmp_path / "root")) == ["below"], "nothing was made before it was refused"


def test_the_receiver_needs_no_settings_of_django() -> None:
    code = "import sys; import tribrick.receiver; print('django' in sys.modules)"
    environment = {"PYTHONPATH": str(SOURCES), "PATH": os.environ["PATH"]}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=60)
    assert done.stdout == "False\n", done.stderr
