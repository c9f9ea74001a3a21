"""A node with spool, mirror and brick, its ledger, and the standby in this process."""

from __future__ import annotations

import contextlib
import hashlib
import os
import random
import socket
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from tribrick import ledger
from tribrick.hasher import Tree, listen
from tribrick.ledger import Entry
from tribrick.opener import Opener
from tribrick.standby import Rules, Standby, brick, directory
from tribrick.testing import wait_for

NAME = "photos/a/3/cat-abcdefghijklmnopqrst.jpg"
SMALL = random.Random(1).randbytes(5000)
LARGE = random.Random(2).randbytes(3 * 1024 * 1024 + 17)
MODIFIED = 1_700_000_000


class Answered:
    """What a request got: status, headers, and the body or the error that broke it off."""

    def __init__(self, status: int, headers: dict[str, str], body: bytes, broken: Exception | None) -> None:
        self.status, self.headers, self.body, self.broken = status, headers, body, broken

    @property
    def text(self) -> str:
        """The body as text."""
        return self.body.decode()


def ask(application: Any, name: str, method: str = "GET", **environ: str) -> Answered:
    """Call a WSGI application; environment variables as they are."""
    told: list[Any] = []
    path = name if name.startswith("/") else f"/{name}"
    given = {"REQUEST_METHOD": method, "PATH_INFO": path.encode().decode("latin-1"), **environ}
    answer = application(given, lambda *said: told.append(said))
    body, broken = b"", None
    try:
        for piece in answer:
            body += piece
    except Exception as error:  # noqa: BLE001  the test looks at it
        broken = error
    finally:
        if hasattr(answer, "close"):
            answer.close()
    [(status, headers)] = told
    return Answered(int(status[:3]), {key.lower(): value for key, value in headers}, body, broken)


class Node:
    """The directories of a node, its ledger, and the opener of its brick."""

    def __init__(self, work: Path) -> None:
        self.work = work
        self.spool, self.mirror, self.brick = (work / name for name in ("spool", "mirror", "brick"))
        for root in (self.spool, self.mirror, self.brick):
            root.mkdir()
        (self.brick / ".glusterfs").mkdir()
        self.ledger = work / "ledger.sqlite"
        ledger._create(self.ledger)
        os.utime(self.ledger)  # as a first pass of the follower does
        self.socket = work / "brick.sock"

    def serve_brick(self) -> Opener:
        """Run the opener in a thread."""
        server = Opener(Tree(self.brick, proof=".glusterfs"), listen(str(self.socket), None))
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        return server

    def standby(self, sources: Sequence[str] = ("spool", "mirror", "brick"), **options: Any) -> Standby:
        """A standby with these sources; *options* that are rules go there. It has time, on a busy machine too."""
        keys, rules = options.pop("keys", None), Rules(**{"deadline": 60.0, "stall": 30.0, **options})
        places = {
            "spool": directory("spool", self.spool, rules.stall),
            "mirror": directory("mirror", self.mirror, rules.stall),
            "brick": brick(self.socket, rules.stall),
        }
        return Standby(self.ledger, [places[name] for name in sources], keys=keys, rules=rules)

    def note(self, kind: str, name: str, data: bytes = b"", *, sha256: str | None = None, size: int = -1) -> None:
        """Write a change to the ledger, as the follower does."""
        database = ledger._writable(self.ledger)
        with contextlib.closing(database):
            number, chain = ledger._last(database)
            known = sha256 or hashlib.sha256(data).hexdigest()
            entry = Entry(
                number + 1, kind, name, known, len(data) if size < 0 else size, "2026-11-26T00:00:00.000000+00:00", "{}"
            )
            ledger._write(database, entry, entry.chain(chain))
        os.utime(self.ledger)

    @staticmethod
    def put(root: Path, name: str, data: bytes, modified: int = MODIFIED) -> Path:
        """Write a file to a source."""
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (modified, modified))
        return path

    def age(self, seconds: float) -> None:
        """Make the ledger so old."""
        import time

        then = time.time() - seconds
        os.utime(self.ledger, (then, then))


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    """A node; its brick is served."""
    made = Node(tmp_path)
    server = made.serve_brick()
    yield made
    server.shutdown()
    server.server_close()


@pytest.fixture(autouse=True)
def _no_descriptor_is_left() -> Iterator[None]:
    """Whatever a test asks, no file of a source stays open."""
    before = opened()
    yield
    # A server's thread closes its file a moment after the last byte.
    wait_for(lambda: not opened() - before, "every file of a source is closed", 10)


def opened() -> set[str]:
    """The regular files that this process has open below a temporary directory of pytest."""
    found = set()
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError):
            target = os.readlink(f"/proc/self/fd/{descriptor}")
            if any(part in target for part in ("/spool/", "/mirror/", "/brick/")):
                found.add(f"{descriptor} {target}")
    return found


class UnixClient:
    """HTTP to a Unix socket, as nginx speaks it."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def connect(self) -> socket.socket:
        """Open a connection."""
        line = socket.socket(socket.AF_UNIX)
        line.settimeout(60)
        line.connect(str(self.path))
        return line
