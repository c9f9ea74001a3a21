"""A media host for tests: a real HTTP server in a thread, with its files in a dictionary.

::

    with TestHttpServer() as server:
        storage = DistributedStorage(hosts=[server.host], base_url="/media/")
        server.override_code = 500

It speaks HTTP/1.1 with kept connections on a free port of the loopback address. Attributes may be
changed while it runs:

===================  ==================================================================
``readonly``         answer PUT and DELETE with 403
``override_code``    do nothing and answer with this status
``slow``             seconds to wait between reading a request and carrying it out
``drip``             seconds to wait before each byte of an answer's body
``dies_mid_body``    read (or send) half of a body, then reset the connection
``capacity``         bytes the files may have together; 507 when a PUT does not fit
``secrets``          key ids and secrets; a request must then be signed (401 otherwise)
===================  ==================================================================

``log`` has ``(method, path, status)`` of every request, status 0 when it was reset before an answer.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Mapping
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Final
from urllib.parse import unquote

from tribrick.signature import SignatureError, verify

_BLOCK: Final = 64 * 1024


class TestHttpServer:
    """See the module. *path* is the prefix of the files' URLs; give *context* for HTTPS."""

    __test__ = False  # not a test case, whatever pytest thinks of the name

    def __init__(
        self,
        host: str = "127.0.0.1",
        port: int = 0,
        *,
        path: str = "/media/",
        readonly: bool = False,
        context: ssl.SSLContext | None = None,
        secrets: Mapping[str, str] | None = None,
    ) -> None:
        self.path = path
        self.readonly = readonly
        self.override_code: int | None = None
        self.slow = 0.0
        self.drip = 0.0
        self.dies_mid_body = False
        self.capacity: int | None = None
        self.secrets = secrets
        self.files: dict[str, bytes] = {}
        self.log: list[tuple[str, str, int]] = []
        self.headers: list[Mapping[str, str]] = []
        self.connections = 0
        self._address = (host, port)
        self._context = context
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None
        self._stopping = threading.Event()
        self._busy = threading.Condition()
        self._requests = 0

    # Running.

    def start(self) -> TestHttpServer:
        """Listen; after a stop, on the same port again."""
        self._stopping.clear()
        self._server = _Server(self._address, self, self._context)
        self._address = (self._address[0], self._server.server_address[1])
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.02,), daemon=True)
        self._thread.start()
        return self

    def stop(self) -> None:
        """Stop listening and cut all connections; waiting requests are dropped."""
        if self._server is None or self._thread is None:
            return
        self._stopping.set()
        self._server.shutdown()
        self._server.cut()
        self._server.server_close()
        self._thread.join()
        self._server = self._thread = None

    def __enter__(self) -> TestHttpServer:
        return self.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()

    @property
    def host(self) -> str:
        """``address:port``, as a storage takes it."""
        return f"{self._address[0]}:{self._address[1]}"

    @property
    def url(self) -> str:
        """The address of the files."""
        return f"{'https' if self._context else 'http'}://{self.host}{self.path}"

    def wait_idle(self, seconds: float = 10.0) -> None:
        """Wait until no request is being handled, late ones included."""
        with self._busy:
            if not self._busy.wait_for(lambda: self._requests == 0, seconds):
                raise TimeoutError(f"{self._requests} requests are still being handled after {seconds:g} s")

    # Files.

    def has_file(self, name: str) -> bool:
        """Return whether the server has the file."""
        return name in self.files

    def get_file(self, name: str) -> bytes:
        """Return a file's bytes."""
        return self.files[name]

    def create_file(self, name: str, content: bytes) -> None:
        """Put a file there."""
        self.files[name] = content

    def delete_file(self, name: str) -> None:
        """Take a file away."""
        del self.files[name]

    def methods(self) -> list[str]:
        """Return the methods of all requests so far."""
        return [method for method, _, _ in self.log]


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    block_on_close = False
    request_queue_size = 64

    def __init__(self, address: tuple[str, int], owner: TestHttpServer, context: ssl.SSLContext | None) -> None:
        self.owner = owner
        self._context = context
        self._open: set[socket.socket] = set()
        super().__init__(address, _Handler)

    def get_request(self) -> tuple[socket.socket, Any]:
        connection, address = super().get_request()
        self._open.add(connection)
        self.owner.connections += 1
        return connection, address

    def finish_request(self, request: Any, client_address: Any) -> None:
        if self._context is not None:  # in the connection's own thread, so that a bad client stops nobody
            request = self._context.wrap_socket(request, server_side=True)
        super().finish_request(request, client_address)

    def shutdown_request(self, request: Any) -> None:
        self._open.discard(request)
        with contextlib.suppress(OSError):
            super().shutdown_request(request)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Say nothing: broken connections are what these tests are about."""

    def cut(self) -> None:
        for connection in list(self._open):
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)


class _Reset(Exception):
    pass


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: _Server

    def log_message(self, *arguments: object) -> None:
        pass

    def do_GET(self) -> None:
        self._handle(lambda name, _: self._get(name))

    def do_HEAD(self) -> None:
        self._handle(lambda name, _: self._get(name))

    def do_PUT(self) -> None:
        self._handle(self._put)

    def do_DELETE(self) -> None:
        self._handle(lambda name, _: self._delete(name))

    # Each returns a status and a body.

    def _get(self, name: str) -> tuple[int, bytes]:
        found = self.server.owner.files.get(name)
        return (404, b"") if found is None else (200, found)

    def _put(self, name: str, body: bytes) -> tuple[int, bytes]:
        owner = self.server.owner
        digest = self.headers.get("Content-Digest")
        if digest is not None and digest != f"sha-256=:{base64.b64encode(hashlib.sha256(body).digest()).decode()}:":
            return 400, b""
        if owner.capacity is not None and sum(map(len, owner.files.values())) + len(body) > owner.capacity:
            return 507, b""
        existed = name in owner.files
        owner.files[name] = body
        return (204 if existed else 201), b""

    def _delete(self, name: str) -> tuple[int, bytes]:
        return (404 if self.server.owner.files.pop(name, None) is None else 204), b""

    def _handle(self, work: Callable[[str, bytes], tuple[int, bytes]]) -> None:
        owner = self.server.owner
        with owner._busy:
            owner._requests += 1
        answered = False
        try:
            owner.headers.append(dict(self.headers))
            body = self._read()
            if owner.slow and owner._stopping.wait(owner.slow):
                raise _Reset
            status, answer = self._decide(work, body)
            answered = True
            owner.log.append((self.command, self.path, status))
            self._answer(status, answer)
        except (_Reset, OSError):
            if not answered:
                owner.log.append((self.command, self.path, 0))
            self._reset()
        finally:
            with owner._busy:
                owner._requests -= 1
                owner._busy.notify_all()

    def _decide(self, work: Callable[[str, bytes], tuple[int, bytes]], body: bytes) -> tuple[int, bytes]:
        owner = self.server.owner
        if not self.path.startswith(owner.path):
            return 404, b""
        name = unquote(self.path[len(owner.path) :])
        if owner.secrets is not None:
            try:
                signed = verify(self.headers.get("Authorization"), owner.secrets, self.command, name)
            except SignatureError:
                return 401, b""
            if signed != hashlib.sha256(body).hexdigest():
                return 400, b""
        if owner.override_code is not None:
            return owner.override_code, b""
        if owner.readonly and self.command in ("PUT", "DELETE"):
            return 403, b""
        return work(name, body)

    def _read(self) -> bytes:
        missing = int(self.headers.get("Content-Length") or 0)
        owner = self.server.owner
        if missing and owner.dies_mid_body:
            self.rfile.read(missing // 2)
            raise _Reset
        body = bytearray()
        while missing:
            block = self.rfile.read(min(missing, _BLOCK))
            if not block:
                raise _Reset
            body += block
            missing -= len(block)
        return bytes(body)

    def _answer(self, status: int, body: bytes) -> None:
        owner = self.server.owner
        self.send_response(status)
        if status >= 200 and status != 204:
            self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if owner.dies_mid_body and body:
            self.wfile.write(body[: len(body) // 2])
            raise _Reset
        if not owner.drip:
            self.wfile.write(body)
            return
        for index in range(len(body)):
            if owner._stopping.wait(owner.drip):
                raise _Reset
            self.wfile.write(body[index : index + 1])

    def _reset(self) -> None:
        """Close so that the client sees a reset, not an end."""
        self.close_connection = True
        with contextlib.suppress(OSError):
            self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
            self.connection.close()


def wait_for(condition: Callable[[], bool], what: str, seconds: float = 10.0) -> None:
    """Wait until *condition* holds; fail with *what* after the deadline."""
    deadline = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > deadline:
            raise TimeoutError(f"after {seconds:g} s still not: {what}")
        time.sleep(0.01)
