"""A small site of three addresses, honest or not, for the tests of the judge."""

from __future__ import annotations

import json
import random
import re
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from faults.workload import EXTENSION
from kit.lab import NODES


@dataclass
class Site:
    """What all three addresses share. `spoil` may change what a request does."""

    files: dict[str, bytes] = field(default_factory=dict)
    originals: dict[str, str] = field(default_factory=dict)
    keys: dict[str, str] = field(default_factory=dict)
    deleted: list[str] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    chance: random.Random = field(default_factory=lambda: random.Random(1))
    unknown: float = 0.0  # how often an upload is answered 503, done or not
    torn_for: float = 0.0  # how long a reader sees the first half
    born: dict[str, float] = field(default_factory=dict)
    token: str = "t"

    def store(self, key: str, original: str, content: bytes) -> str:
        with self.lock:
            if key in self.keys:
                return self.keys[key]
            name = f"photos/{original.removesuffix(EXTENSION)}-{len(self.files)}{EXTENSION}"
            self.files[name], self.originals[name], self.keys[key] = content, original, name
            self.born[name] = time.monotonic()
            return name


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    site: Site

    def log_message(self, *words: object) -> None:
        pass

    def answer(self, status: int, body: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["Content-Length"]))
        assert self.headers["Authorization"] == f"Token {self.site.token}"
        head, _, rest = body.partition(b"\r\n\r\n")
        mark = head.split(b"\r\n", 1)[0]
        content = rest[: rest.rindex(b"\r\n" + mark)]
        found = re.search(rb'filename="([^"]+)"', head)
        assert found
        with self.site.lock:
            refused, stored = (self.site.chance.random() < self.site.unknown for _ in range(2))
        if not refused or stored:
            name = self.site.store(self.headers["Idempotency-Key"], found[1].decode(), content)
        if refused:
            self.answer(503, b"busy", Retry_After="1")
        else:
            self.answer(201, json.dumps({"name": name, "size": len(content)}).encode())

    do_PUT = do_POST

    def do_DELETE(self) -> None:
        name = self.path.removeprefix("/api/media/")
        with self.site.lock:
            self.site.files.pop(name, None)
            self.site.deleted.append(name)
        self.answer(204)

    def do_GET(self) -> None:
        if self.path.startswith("/api/media/"):
            with self.site.lock:
                rows = [{"name": name, "original": self.site.originals[name]} for name in self.site.files]
            self.answer(200, json.dumps({"results": rows, "next": None}).encode())
            return
        name = self.path.removeprefix("/media/")
        content = self.site.files.get(name)
        if content is None:
            self.answer(404)
        elif time.monotonic() - self.site.born[name] < self.site.torn_for:
            self.answer(200, content[: len(content) // 2])
        else:
            self.answer(200, content)


class FakeLab:
    def __init__(self, ports: list[int]) -> None:
        self.ports = dict(zip(NODES, ports, strict=True))

    def url(self, node: str) -> str:
        return f"http://127.0.0.1:{self.ports[node]}"


@pytest.fixture
def site() -> Iterator[tuple[Site, Any]]:
    site = Site()
    handler = type("Bound", (Handler,), {"site": site})
    servers = [ThreadingHTTPServer(("127.0.0.1", 0), handler) for _ in NODES]
    for server in servers:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
    yield site, FakeLab([server.server_address[1] for server in servers])
    for server in servers:
        server.shutdown()
        server.server_close()
