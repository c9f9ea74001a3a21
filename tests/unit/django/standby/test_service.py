"""The programs as they run: sockets, rights, limits, memory."""

from __future__ import annotations

import contextlib
import grp
import hashlib
import json
import os
import pwd
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tribrick import opener
from tribrick import standby as module
from tribrick.hasher import Tree, listen
from tribrick.standby import Server
from tribrick.testing import wait_for

from .conftest import LARGE, NAME, SMALL, Node

SOURCES = Path(__file__).resolve().parents[4] / "src"
MIB = 1024 * 1024
# As systemd starts the opener: nobody in particular, with one capability.
ONE = "-all,+dac_read_search"
READ_ALL = [
    "setpriv",
    "--reuid=nobody",
    "--regid=nogroup",
    "--clear-groups",
    f"--inh-caps={ONE}",
    f"--ambient-caps={ONE}",
]
READ_ALL += [f"--bounding-set={ONE}", "--no-new-privs", "--"]


def request(path: Path, name: str, *lines: str, method: str = "GET") -> tuple[int, dict[str, str], bytes]:
    """Ask at a Unix socket; return status, headers and the body as far as it came."""
    with connected(path) as line:
        line.sendall("\r\n".join([f"{method} {name} HTTP/1.1", "Host: x", *lines, "", ""]).encode())
        said = b""
        while more := line.recv(MIB):
            said += more
    head, _, body = said.partition(b"\r\n\r\n")
    first, *rest = head.decode().split("\r\n")
    headers = {key.lower(): value for key, value in (one.split(": ", 1) for one in rest)}
    return int(first.split()[1]), headers, body


def connected(path: Path) -> socket.socket:
    line = socket.socket(socket.AF_UNIX)
    line.settimeout(60)
    line.connect(str(path))
    return line


Start = Callable[..., subprocess.Popen[bytes]]


@pytest.fixture
def start() -> Iterator[Start]:
    """Start a program of the package at a socket and wait for it; all end with the test."""
    running: list[subprocess.Popen[bytes]] = []

    def begin(
        what: str,
        path: Path,
        *arguments: str,
        user: str | None = None,
        before: Sequence[str] = (),
        **environment: str,
    ) -> subprocess.Popen[bytes]:
        # Python itself may lie where the other user cannot reach it: import first, then become that user.
        drop = (
            f"os.setgroups([]); os.setgid({pwd.getpwnam(user).pw_gid}); os.setuid({pwd.getpwnam(user).pw_uid});"
            if user
            else ""
        )
        code = f"import os, sys, tribrick.{what} as program; {drop} sys.exit(program.main(sys.argv[1:]))"
        process = subprocess.Popen(
            [*before, sys.executable, "-c", code, "--socket", str(path), *arguments],
            env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCES), **environment},
            cwd="/",
            stderr=subprocess.PIPE,
        )
        running.append(process)

        def listens() -> bool:
            assert process.poll() is None, process.stderr.read().decode()  # type: ignore[union-attr]
            with socket.socket(socket.AF_UNIX) as probe:
                return probe.connect_ex(str(path)) == 0

        wait_for(listens, f"the {what} listens")
        return process

    yield begin
    for process in running:
        process.terminate()
        process.wait(10)
        assert process.stderr is not None
        process.stderr.close()


def settings_of(node: Node, *sources: str, **more: str) -> dict[str, str]:
    places = {"spool": node.spool, "mirror": node.mirror, "brick": node.socket}
    patient = {"DEADLINE": "120", "STALL": "30"}  # the machine may be busy
    given = {"LEDGER": str(node.ledger), **{name.upper(): str(places[name]) for name in sources}, **patient, **more}
    return {f"TRIBRICK_STANDBY_{key}": value for key, value in given.items()}


# The standby as a process


def test_over_its_socket(node: Node, start: Start, tmp_path: Path) -> None:
    for name, data in ((NAME, LARGE), ("photos/Été.jpg", SMALL), ("photos/empty", b"")):
        node.note("added", name, data)
        node.put(node.brick, name, data)
    start("standby", tmp_path / "s", **settings_of(node, "spool", "mirror", "brick"))
    status, headers, body = request(tmp_path / "s", f"/{NAME}")
    assert (status, body, headers["content-length"]) == (200, LARGE, str(len(LARGE)))
    assert headers["content-type"] == "application/octet-stream" and headers["x-content-type-options"] == "nosniff"
    assert request(tmp_path / "s", "/photos/%C3%89t%C3%A9.jpg?x=1")[::2] == (200, SMALL)
    status, headers, body = request(tmp_path / "s", "/photos/empty")
    assert (status, body, headers["content-length"]) == (200, b"", "0")
    status, headers, body = request(tmp_path / "s", f"/{NAME}", method="HEAD")
    assert (status, body, headers["content-length"]) == (200, b"", str(len(LARGE)))
    status, headers, body = request(tmp_path / "s", f"/{NAME}", f"If-None-Match: {headers['etag']}")
    assert (status, body) == (304, b"") and "content-length" not in headers
    status, headers, body = request(tmp_path / "s", f"/{NAME}", "Range: bytes=5-9")
    assert (status, body, headers["content-range"]) == (206, LARGE[5:10], f"bytes 5-9/{len(LARGE)}")
    assert request(tmp_path / "s", f"/{NAME}", f"Range: bytes={len(LARGE)}-")[0] == 416
    assert request(tmp_path / "s", "/photos/never")[0] == 404
    assert request(tmp_path / "s", "/photos/%ff")[0] == 400
    assert request(tmp_path / "s", "/x", method="PUT")[0] == 405
    assert request(tmp_path / "s", "/" + "x" * 70_000)[0] == 414
    status, headers, body = request(tmp_path / "s", "/-/ready")
    assert (status, json.loads(body)["sources"]) == (200, {"spool": "ok", "mirror": "ok", "brick": "ok"})


def test_an_answer_that_breaks_off_is_shorter_than_it_says(node: Node, start: Start, tmp_path: Path) -> None:
    data = LARGE * 8
    node.note("added", NAME, data)
    path = node.put(node.mirror, NAME, data)
    process = start("standby", tmp_path / "s", **settings_of(node, "mirror"))
    with connected(tmp_path / "s") as line:
        line.sendall(f"GET /{NAME} HTTP/1.0\r\n\r\n".encode())
        said = line.recv(1000)
        with path.open("r+b") as file:  # the rest is in no buffer yet
            file.seek(len(data) - 100)
            file.write(bytes(100))
        while more := line.recv(MIB):
            said += more
    head, _, body = said.partition(b"\r\n\r\n")
    assert f"Content-Length: {len(data)}".encode() in head
    assert len(body) < len(data) and data.startswith(body)
    process.terminate()
    assert process.stderr is not None
    assert process.stderr.read().decode().splitlines() == [
        "an answer from the mirror was broken off: it was changed since it was verified"
    ], "one line, no traceback"


def test_memory_does_not_grow_with_the_file(node: Node, start: Start, tmp_path: Path) -> None:
    """Four readers of 600 MiB, each of another range at the same time, and as many whole readings as there may be."""
    size = 600 * MIB
    hasher = hashlib.sha256()
    for _ in range(600):
        hasher.update(bytes(MIB))
    for number in range(2):
        node.note("added", f"photos/{number}", sha256=hasher.hexdigest(), size=size)
        path = node.put(node.mirror, f"photos/{number}", b"")
        os.truncate(path, size)
    process = start("standby", tmp_path / "s", **settings_of(node, "mirror"))
    counted = [0, 0, 0, 0]

    def read(number: int) -> None:
        with connected(tmp_path / "s") as line:
            line.sendall(f"GET /photos/{number % 2} HTTP/1.0\r\nRange: bytes={number}-\r\n\r\n".encode())
            while more := line.recv(MIB):
                counted[number] += len(more)

    readers = [threading.Thread(target=read, args=(number,)) for number in range(4)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(240)
    assert all(size - number < count < size + 1000 for number, count in enumerate(counted)), counted
    status = Path(f"/proc/{process.pid}/status").read_text()
    peak = next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM"))
    assert peak < 64 * 1024, f"{peak} KiB"


def test_requests_at_a_time_are_bounded(node: Node, start: Start, tmp_path: Path) -> None:
    node.note("added", NAME, LARGE)
    node.put(node.mirror, NAME, LARGE)
    process = start("standby", tmp_path / "s", **settings_of(node, "mirror", REQUESTS="3"))
    wait_for(lambda: request(tmp_path / "s", "/-/ready")[0] == 200, "the connections of the start are over")
    held = [connected(tmp_path / "s") for _ in range(2)]

    def third() -> bool:
        """Hold another one, which is sent a file and takes nothing of it."""
        held[2:] = [connected(tmp_path / "s")]
        held[2].sendall(f"GET /{NAME} HTTP/1.0\r\n\r\n".encode())
        return held[2].recv(12, socket.MSG_PEEK) == b"HTTP/1.0 200"

    wait_for(third, "three are held, and nothing of the start is left")
    began = time.monotonic()
    for _ in range(20):
        status, headers, body = request(tmp_path / "s", f"/{NAME}")
        assert (status, headers["retry-after"], body) == (503, "5", b"too many requests are being answered\n")
    assert time.monotonic() - began < 20
    threads = len(os.listdir(f"/proc/{process.pid}/task"))
    assert threads < 3 + 20, "the main thread, requests, and workers for calls on disks"
    for line in held:
        line.close()
    wait_for(lambda: request(tmp_path / "s", f"/{NAME}")[0] == 200, "there is room again")


def test_who_sends_or_takes_nothing_is_dropped(
    node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    assert module._Handler.timeout == 30
    monkeypatch.setattr(module._Handler, "timeout", 1.5)
    data = LARGE * 3
    node.note("added", NAME, data)
    node.put(node.mirror, NAME, data)
    server = Server(node.standby(["mirror"]), listen(str(tmp_path / "s"), None), 4)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    with contextlib.closing(connected(tmp_path / "s")) as silent, contextlib.closing(connected(tmp_path / "s")) as full:
        full.sendall(f"GET /{NAME} HTTP/1.0\r\n\r\n".encode())
        began = time.monotonic()
        assert silent.recv(10) == b""
        wait_for(lambda: server.free._value == 4, "both are dropped")
        assert time.monotonic() - began < 15
        said = 0
        while more := full.recv(MIB):
            said += len(more)
        assert 0 < said < len(data)
    assert "a request failed: timed out" in caplog.messages, "one line, no traceback"
    server.shutdown()
    server.server_close()


def test_it_needs_no_settings_and_says_what_it_needs(tmp_path: Path) -> None:
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCES), "COLUMNS": "120"}

    def said(what: str, *arguments: str, **more: str) -> tuple[int, str]:
        command = [sys.executable, "-m", f"tribrick.{what}", *arguments]
        done = subprocess.run(command, env={**environment, **more}, capture_output=True, text=True, timeout=60)
        return done.returncode, done.stdout + done.stderr

    code, text = said("standby", "--help")
    assert code == 0
    read = set(re.findall(r'"([A-Z_]+)"', re.sub(r'"""(?:.|\n)*?"""', "", Path(module.__file__).read_text())))
    read -= {
        "REQUEST_METHOD",
        "PATH_INFO",
        "HTTP_AUTHORIZATION",
        "GET",
        "HEAD",
        "CONTENT_LENGTH",
        "SCRIPT_NAME",
        "T",
        "TRIBRICK_STANDBY_KEYS",
    }
    named = set(re.findall(r"TRIBRICK_STANDBY_([A-Z_]+)", text))
    assert named == {key for key in read if not key.startswith(("HTTP_", "SERVER_", "GATEWAY_", "REMOTE_"))}
    assert said("opener", "--help")[0] == 0
    assert said("standby") == (1, "error: TRIBRICK_STANDBY_LEDGER must be given\n")
    enough = {"TRIBRICK_STANDBY_LEDGER": "/l", "TRIBRICK_STANDBY_MIRROR": "/m"}
    code, text = said("standby", **enough)
    assert code == 2 and "--socket must be given" in text
    assert said("standby", "--socket", str(tmp_path / "s"), **enough, TRIBRICK_STANDBY_REQUESTS="many")[0] == 1
    (tmp_path / "file").write_bytes(b"mine")
    code, text = said("standby", "--socket", str(tmp_path / "file"), **enough)
    assert code == 1 and "is not a socket" in text
    assert (tmp_path / "file").read_bytes() == b"mine"
    code, text = said("opener", "--root", "/r", "--socket", str(tmp_path / "file"))
    assert code == 1 and "is not a socket" in text


def test_a_socket_passed_by_systemd(node: Node, tmp_path: Path) -> None:
    node.note("added", NAME, SMALL)
    node.put(node.brick, NAME, SMALL)
    code = "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); os.execv(sys.executable, sys.argv[1:])"
    running = []
    programs = {
        "opened": ["tribrick.opener", "--root", str(node.brick), "--proof", ".glusterfs"],
        "served": ["tribrick.standby"],
    }
    for place, arguments in programs.items():
        with socket.socket(socket.AF_UNIX) as listening:
            listening.bind(str(tmp_path / place))
            listening.listen()
            fixed = f"import os; os.dup2({listening.fileno()}, 3); {code}"
            given = {
                **settings_of(node, "brick"),
                "TRIBRICK_STANDBY_BRICK": str(tmp_path / "opened"),
                "LISTEN_FDS": "1",
            }
            running.append(
                subprocess.Popen(
                    [sys.executable, "-c", fixed, sys.executable, "-m", *arguments],
                    env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCES), **given},
                    pass_fds=(3, listening.fileno()) if listening.fileno() != 3 else (3,),
                )
            )
    try:
        assert request(tmp_path / "served", f"/{NAME}")[::2] == (200, SMALL)
    finally:
        for process in running:
            process.terminate()
            process.wait(10)


# Rights


@pytest.fixture
def shared() -> Iterator[Path]:
    """A directory that every user may reach."""
    made = Path(tempfile.mkdtemp(prefix="tribrick-standby-"))
    made.chmod(0o755)
    yield made
    shutil.rmtree(made)


def test_a_user_without_rights_serves_a_brick_that_only_root_can_read(shared: Path, start: Start) -> None:
    if os.geteuid() != 0:
        pytest.skip("only root can become somebody else")
    node = Node(shared)
    node.note("added", NAME, LARGE)
    node.put(node.brick, NAME, LARGE).chmod(0o600)
    node.brick.chmod(0o700)
    (shared / "run").mkdir()
    shutil.chown(shared / "run", "nobody")
    node.socket = shared / "run/brick.sock"
    group = grp.getgrgid(pwd.getpwnam("nobody").pw_gid).gr_name
    given = settings_of(node, "spool", "mirror", "brick")
    start("standby", shared / "run/s", user="nobody", **given)
    status, _headers, body = request(shared / "run/s", f"/{NAME}")
    assert status == 503 and b"the brick cannot be read" in body, "nobody opens it yet"
    process = start(
        "opener", node.socket, "--root", str(node.brick), "--proof", ".glusterfs", "--group", group, before=READ_ALL
    )
    effective = re.search(r"CapEff:\s*(\w+)", Path(f"/proc/{process.pid}/status").read_text())
    assert effective is not None and int(effective[1], 16) == 1 << 2, "CAP_DAC_READ_SEARCH and nothing else"
    assert oct(node.socket.stat().st_mode & 0o777) == oct(0o660)
    assert request(shared / "run/s", f"/{NAME}")[::2] == (200, LARGE)
    process.kill()
    process.wait(10)
    assert request(shared / "run/s", f"/{NAME}")[0] == 503
    node.socket.unlink()
    start("opener", node.socket, "--root", str(node.brick), "--group", group, before=READ_ALL)
    assert request(shared / "run/s", f"/{NAME}")[::2] == (200, LARGE), "a new opener, the same standby"


# The opener


def test_what_is_opened_can_be_read_and_nothing_else(node: Node) -> None:
    node.put(node.brick, NAME, SMALL)
    descriptor = opener.ask(node.socket, NAME, 5)
    assert descriptor is not None
    try:
        assert os.read(descriptor, 10_000) == SMALL
        assert not os.get_inheritable(descriptor)
        for wrong in (lambda: os.write(descriptor, b"x"), lambda: os.ftruncate(descriptor, 0)):
            with pytest.raises(OSError, match="Errno"):
                wrong()
    finally:
        os.close(descriptor)
    assert opener.ask(node.socket, "", 5) is None


@pytest.mark.parametrize(
    "name",
    [
        "photos/never", "photos/never/there", f"{NAME}/below", "photos/pointer", ".glusterfs/ab/x", ".tribrick-volume",
        "/", "..",
        "../secret", "photos/../../secret", "photos/./x", f"/{NAME}", f"{NAME}/", "a\0b", "photos/\udcff", "x" * 300,
        "x" * 5000,
    ],
)  # fmt: skip
def test_what_is_not_there(node: Node, name: str) -> None:
    node.put(node.brick, NAME, SMALL)
    node.put(node.brick, ".glusterfs/ab/x", SMALL)
    node.put(node.brick, ".tribrick-volume", SMALL)
    node.put(node.brick, "photos/pointer", b"").chmod(0o1000)
    (node.work / "secret").write_bytes(b"secret")
    with pytest.raises(FileNotFoundError):
        opener.ask(node.socket, name, 5)


def test_a_name_that_is_too_long_is_not_cut(node: Node, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(opener, "_LONGEST", len(NAME) - 3)
    node.put(node.brick, NAME, SMALL)
    with pytest.raises(FileNotFoundError):
        opener.ask(node.socket, NAME, 5)


def test_what_cannot_be_read(node: Node) -> None:
    (node.work / "secret").write_bytes(b"secret")
    (node.brick / "photos").mkdir()
    (node.brick / "photos/link").symlink_to(node.work / "secret")
    (node.brick / "out").symlink_to(node.work)
    os.mkfifo(node.brick / "photos/pipe")
    for name in ("photos", "photos/link", "photos/pipe"):
        with pytest.raises(OSError, match="Errno") as caught:
            opener.ask(node.socket, name, 5)
        assert not isinstance(caught.value, FileNotFoundError), name
    with pytest.raises(OSError, match="Errno"):
        opener.ask(node.socket, "out/secret", 5)


def test_an_unmounted_brick_is_away_not_empty(node: Node) -> None:
    node.brick.rename(node.work / "away")
    for prepare in (lambda: None, node.brick.mkdir):
        prepare()
        for name in (NAME, ""):
            with pytest.raises(OSError, match="Errno") as caught:
                opener.ask(node.socket, name, 5)
            assert not isinstance(caught.value, FileNotFoundError)


def test_its_questions_are_bounded(node: Node, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a disk that hangs, so many are outstanding; the others are turned away at once."""
    monkeypatch.setattr(opener, "PARALLEL", 2)
    gate = threading.Event()

    class Hangs(Tree):
        def check(self) -> None:
            gate.wait(30)

    server = opener.Opener(Hangs(node.brick), listen(str(tmp_path / "o"), None))
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    errors: list[Any] = []

    def outstanding() -> None:
        try:
            opener.ask(tmp_path / "o", "", 0.5)
        except OSError as error:
            errors.append(error)

    askers = [threading.Thread(target=outstanding) for _ in range(2)]
    for asker in askers:
        asker.start()
    wait_for(lambda: server.free._value == 0, "both are outstanding")
    began = time.monotonic()
    with pytest.raises(OSError, match="Errno"):
        opener.ask(tmp_path / "o", "", 20)
    assert time.monotonic() - began < 10
    for asker in askers:
        asker.join(10)
    assert [type(error) for error in errors] == [TimeoutError] * 2
    gate.set()
    wait_for(lambda: server.free._value == 2, "they are over")
    assert opener.ask(tmp_path / "o", "", 5) is None
    server.shutdown()
    server.server_close()


def test_the_opener_imports_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; import tribrick.opener\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCES)}
    command = [sys.executable, "-S", "-c", code]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
    assert done.stdout.strip() == "['__main__', 'tribrick']", done.stderr
