"""The hasher: what it says of a directory, what it refuses, and that it changes nothing."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tribrick.audit import PathCopy
from tribrick.hasher import TEMPORARY, Tree
from tribrick.storage import saving
from tribrick.testing import wait_for

SOURCES = Path(__file__).resolve().parents[4] / "src"
RUNNING: list[subprocess.Popen[bytes]] = []
PART = ".abcdefghijklmnopqrst.part"


class Client:
    """Speaks HTTP to a Unix socket."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def ask(self, method: str, target: str, body: bytes | None = None, version: int = 11) -> tuple[int, bytes]:
        connection = http.client.HTTPConnection("localhost", timeout=60)
        connection._http_vsn = version  # type: ignore[attr-defined]
        connection._http_vsn_str = f"HTTP/{version / 10}"  # type: ignore[attr-defined]
        connection.sock = socket.socket(socket.AF_UNIX)
        connection.sock.settimeout(60)
        connection.sock.connect(str(self.path))
        with contextlib.closing(connection):
            connection.request(method, target, body=body)
            response = connection.getresponse()
            return response.status, response.read()

    def lines(self, method: str, target: str, body: bytes | None = None) -> list[dict[str, Any]]:
        status, said = self.ask(method, target, body)
        assert status == 200, said
        return [json.loads(line) for line in said.splitlines()]

    def hashes(self, *names: str) -> list[dict[str, Any]]:
        return self.lines("POST", "/hashes", "\n".join(map(json.dumps, names)).encode())


def start(root: Path, path: Path, *arguments: str) -> subprocess.Popen[bytes]:
    process = subprocess.Popen(
        [sys.executable, "-m", "tribrick.hasher", "--root", str(root), "--socket", str(path), *arguments],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCES)},
        stderr=subprocess.PIPE,
    )
    RUNNING.append(process)

    def listens() -> bool:
        assert process.poll() is None, process.stderr.read()
        with socket.socket(socket.AF_UNIX) as probe:
            return probe.connect_ex(str(path)) == 0

    wait_for(listens, "the hasher listens")
    return process


def end(process: subprocess.Popen[bytes]) -> None:
    RUNNING.remove(process)
    process.send_signal(signal.SIGTERM)
    process.wait(10)
    assert process.stderr is not None
    process.stderr.close()


@pytest.fixture
def brick(tmp_path: Path) -> Path:
    """A directory as a brick looks, with files of every kind."""
    root = tmp_path / "brick"
    for directory in (".glusterfs/ab/cd", ".tribrick-quarantine/2026-01-01", "photos/a/3", "photos/b", "empty"):
        (root / directory).mkdir(parents=True)
    for name in (".glusterfs/ab/cd/x", ".tribrick-volume", ".tribrick-quarantine/2026-01-01/x"):
        (root / name).write_bytes(b"internal")
    (root / "photos/a/3/one.txt").write_bytes(b"one")
    (root / "photos/b/.hidden").write_bytes(b"hidden")
    (root / PART).write_bytes(b"part")
    (root / f"photos/{PART}").write_bytes(b"part")
    (root / "photos/zeros").write_bytes(b"x" * 10_000 + bytes(4096))
    (root / "photos/nearly").write_bytes(b"x" * 10_000 + bytes(4095))
    (root / "photos/nothing").write_bytes(b"")
    (root / "photos/few-zeros").write_bytes(bytes(5))
    (root / "photos/large").write_bytes(random.Random(1).randbytes(3_000_000))
    (root / "photos/pointer").touch(mode=0o1000)
    (root / "photos/pointer").chmod(0o1000)
    (root / "photos/sticky").write_bytes(b"moving")
    (root / "photos/sticky").chmod(0o1644)
    (root / "photos/link").symlink_to(tmp_path / "secret")
    (root / "out").symlink_to(tmp_path)
    (tmp_path / "secret").write_bytes(b"secret")
    os.mkfifo(root / "photos/pipe")
    (root / os.fsdecode(b"photos/\xff.txt")).write_bytes(b"odd")
    (root / "photos/café ☕.txt").write_bytes(b"coffee")
    return root


@pytest.fixture
def client(brick: Path, tmp_path: Path) -> Iterator[Client]:
    process = start(brick, tmp_path / "hashes.sock")
    yield Client(tmp_path / "hashes.sock")
    end(process)


@pytest.fixture(autouse=True)
def _none_stays() -> Iterator[None]:
    """End what a failed test has left running."""
    yield
    for process in list(RUNNING):
        end(process)


def everything(root: Path) -> list[tuple[str, tuple[int, int, int, int]]]:
    found = [(path, path.lstat()) for path in sorted(root.rglob("*"))]
    return [(str(path), (at.st_mode, at.st_size, at.st_mtime_ns, at.st_ctime_ns)) for path, at in found]


def test_only_files_of_the_root_are_removed(brick: Path, tmp_path: Path) -> None:
    tree = Tree(brick)
    before = everything(tmp_path)
    inside = [".glusterfs/ab/cd/x", ".tribrick-volume", "photos//zeros", "photos/./zeros", "photos/zeros/x", "zeros"]
    for name in ["../secret", "photos/../../secret", "out/secret", str(tmp_path / "secret"), "", "x\0y", *inside]:
        assert tree.remove(name) == {"name": name}, "it is not there, so it is gone"
    assert "detail" in tree.remove("photos")
    assert everything(tmp_path) == before
    assert tree.remove("photos/zeros") == {"name": "photos/zeros"}
    assert not (brick / "photos/zeros").exists()


def test_hashes(client: Client, brick: Path) -> None:
    before = everything(brick)
    names = ["photos/a/3/one.txt", "photos/zeros", "photos/nearly", "photos/nothing", "photos/few-zeros"]
    names += [
        "photos/large",
        "photos/café ☕.txt",
        os.fsdecode(b"photos/\xff.txt"),
        "photos/sticky",
        PART,
        "photos/zeros",
    ]
    said = client.hashes(*names)
    assert [one["name"] for one in said] == names, "in the order of the question"
    for one in said:
        data = (brick / one["name"]).read_bytes()
        zeros = bool(data) and not any(data[-4096:])
        expected = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data), "zero_tail": zeros}
        assert one == {"name": one["name"], **expected}
    assert {one["name"] for one in said if one["zero_tail"]} == {"photos/zeros", "photos/few-zeros"}
    assert everything(brick) == before


MISSING = [
    "photos/never",
    "photos/never/there",
    "photos/a/3/one.txt/below",
    "photos/pointer",
    ".glusterfs/ab/cd/x",
    ".tribrick-volume",
    ".tribrick-quarantine/2026-01-01/x",
    "",
    "/",
    "..",
    "../secret",
    "photos/../../secret",
    "photos/./zeros",
    "/photos/zeros",
    "photos//zeros",
    "photos/zeros/",
    "photos/a\0b",
    "photos/\ud800",
    "x" * 300,
]


def test_what_is_not_there(client: Client, brick: Path) -> None:
    (brick.parent / "secret").write_bytes(b"secret")
    said = client.hashes(*MISSING)
    assert [(one["name"], one["error"]) for one in said] == [(name, "missing") for name in MISSING]


def test_what_cannot_be_read(client: Client) -> None:
    names = ["photos/link", "photos/pipe", "photos/a", "out/secret"]
    said = client.hashes(*names)
    assert [one["name"] for one in said] == names
    assert [one["error"] for one in said] == ["unreadable", "unreadable", "unreadable", "missing"]
    assert all("sha256" not in one for one in said)


def test_the_walk_is_that_of_an_audit(client: Client, brick: Path) -> None:
    said = client.lines("GET", "/walk")
    expected = [vars(found) for found in PathCopy("x", brick, writable=False).walk()]
    expected = [one for one in expected if one["name"] != "photos/pointer"]
    assert said == expected
    names = [one["name"] for one in said]
    assert {PART, f"photos/{PART}", "photos/b/.hidden", "photos/link", "out", "photos/a/3/one.txt"} <= set(names)
    assert not [name for name in names if name.startswith((".glusterfs", ".tribrick"))]
    assert os.fsdecode(b"photos/\xff.txt") in names


def test_temporary_names_are_those_of_the_storage() -> None:
    assert TEMPORARY.pattern == saving.TEMPORARY.pattern


@pytest.mark.parametrize(
    ("method", "target", "body", "status"),
    [
        ("GET", "/-/ready", None, 200),
        ("GET", "/", None, 404),
        ("GET", "/hashes", None, 404),
        ("GET", "/walk?x", None, 404),
        ("POST", "/walk", b"", 404),
        ("POST", "/hashes", b"no json", 400),
        ("POST", "/hashes", b'"a"\n7', 400),
        ("POST", "/hashes", b'"a"\n["b"]', 400),
        ("POST", "/hashes", b"[" * 100_000, 400),
        ("POST", "/hashes", b"", 200),
        ("POST", "/hashes", b"x" * (4 * 1024 * 1024 + 1), 413),
        ("PUT", "/photos/x", b"x", 501),
        ("DELETE", "/photos/zeros", None, 501),
    ],
)
def test_questions(method: str, target: str, body: bytes | None, status: int, client: Client, brick: Path) -> None:
    before = everything(brick)
    with contextlib.suppress(BrokenPipeError):  # it need not read all of what it refuses
        assert client.ask(method, target, body)[0] == status
    assert everything(brick) == before
    assert client.ask("GET", "/-/ready")[0] == 200


def test_an_old_protocol_is_refused(client: Client) -> None:
    for target in ("/walk", "/-/ready"):
        assert client.ask("GET", target, version=10)[0] == 505


def test_an_answer_that_broke_off_is_no_answer(brick: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    process = start(brick, tmp_path / "s")
    (brick / "zz").mkdir()
    for number in range(20_000):
        (brick / f"zz/{number}").touch()
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(tmp_path / "s"))
    with contextlib.closing(connection):
        connection.request("GET", "/walk")
        response = connection.getresponse()
        response.read(100)
        process.kill()
        with pytest.raises((http.client.IncompleteRead, ConnectionResetError)):
            response.read()
    end(process)


def test_kept_connections(client: Client) -> None:
    connection = http.client.HTTPConnection("localhost")
    connection.sock = socket.socket(socket.AF_UNIX)
    connection.sock.connect(str(client.path))
    with contextlib.closing(connection):
        for _ in range(3):
            connection.request("POST", "/hashes", body=b'"photos/zeros"')
            assert json.loads(connection.getresponse().read())["zero_tail"] is True
            assert connection.sock is not None


def test_the_root_must_be_what_it_is_said_to_be(brick: Path, tmp_path: Path) -> None:
    process = start(brick, tmp_path / "s", "--proof", ".glusterfs")
    client = Client(tmp_path / "s")
    assert client.hashes("photos/zeros")[0]["size"] == 14096
    brick.rename(tmp_path / "away")
    assert client.ask("GET", "/-/ready")[0] == client.ask("GET", "/walk")[0] == 503
    brick.mkdir()  # what is left when a file system is unmounted
    assert client.ask("POST", "/hashes", b'"photos/zeros"')[0] == 503, "not: missing"
    brick.rmdir()
    (tmp_path / "away").rename(brick)
    assert client.ask("GET", "/-/ready")[0] == 200
    end(process)


def test_who_may_connect(brick: Path, tmp_path: Path) -> None:
    process = start(brick, tmp_path / "s", "--group", "daemon")
    import grp

    status = (tmp_path / "s").stat()
    assert oct(status.st_mode & 0o777) == oct(0o660)
    assert status.st_gid == grp.getgrnam("daemon").gr_gid
    end(process)


def test_what_stands_in_the_way_of_a_start(brick: Path, tmp_path: Path) -> None:
    def said(*arguments: str) -> str:
        command = [sys.executable, "-m", "tribrick.hasher", *arguments]
        environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCES)}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=30)
        assert done.returncode in (1, 2)
        return done.stderr

    socket_path = str(tmp_path / "s")
    assert "is not a directory" in said("--root", str(tmp_path / "nowhere"), "--socket", socket_path)
    assert "has no .glusterfs" in said("--root", str(tmp_path), "--socket", socket_path, "--proof", ".glusterfs")
    assert "--socket must be given" in said("--root", str(brick))
    assert "no-such-group" in said("--root", str(brick), "--socket", socket_path, "--group", "no-such-group")
    (tmp_path / "file").write_bytes(b"mine")
    assert "is not a socket" in said("--root", str(brick), "--socket", str(tmp_path / "file"))
    assert (tmp_path / "file").read_bytes() == b"mine"
    (tmp_path / "s").unlink(missing_ok=True)
    process = start(brick, tmp_path / "s")
    assert "somebody listens" in said("--root", str(brick), "--socket", socket_path)
    process.kill()
    end(process)
    again = start(brick, tmp_path / "s")  # a socket that a killed process has left is replaced
    assert Client(tmp_path / "s").ask("GET", "/-/ready")[0] == 200
    end(again)


def test_a_socket_passed_by_systemd(brick: Path, tmp_path: Path) -> None:
    listening = socket.socket(socket.AF_UNIX)
    listening.bind(str(tmp_path / "passed"))
    listening.listen()
    code = "import os, sys; os.environ['LISTEN_PID'] = str(os.getpid()); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-m", "tribrick.hasher", "--root", str(brick)]
    process = subprocess.Popen(
        [sys.executable, "-c", f"import os; os.dup2({listening.fileno()}, 3); {code}", *command],
        env={"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCES), "LISTEN_FDS": "1"},
        pass_fds=(3, listening.fileno()) if listening.fileno() != 3 else (3,),
        stderr=subprocess.PIPE,
    )
    RUNNING.append(process)
    listening.close()
    assert Client(tmp_path / "passed").hashes("photos/zeros")[0]["size"] == 14096
    end(process)


def test_it_imports_nothing_but_the_standard_library() -> None:
    code = (
        "import sys; import tribrick.hasher\n"
        "print(sorted({name.partition('.')[0] for name in sys.modules} - set(sys.stdlib_module_names)))"
    )
    environment = {"PATH": os.environ["PATH"], "PYTHONPATH": str(SOURCES)}
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], env=environment, capture_output=True, text=True, timeout=30
    )
    assert done.stdout.strip() == "['__main__', 'tribrick']", done.stderr


def test_memory_does_not_grow_with_a_file(tmp_path: Path, brick: Path) -> None:
    with (brick / "sparse").open("wb") as file:
        file.truncate(500 * 2**20)
    process = start(brick, tmp_path / "s")
    [said] = Client(tmp_path / "s").hashes("sparse")
    assert (said["size"], said["zero_tail"]) == (500 * 2**20, True)
    status = Path(f"/proc/{process.pid}/status").read_text()
    assert next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) < 60 * 1024
    end(process)


def test_a_file_that_goes_during_the_walk(brick: Path) -> None:
    walk = Tree(brick).walk()
    first = next(walk)
    assert first["name"] == PART
    (brick / "photos/a/3/one.txt").unlink()
    (brick / "photos/a/3").rmdir()
    assert "photos/zeros" in [one["name"] for one in walk]
