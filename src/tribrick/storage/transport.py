"""How files travel to and from media hosts: plain HTTP requests, streamed, under one deadline."""

from __future__ import annotations

import base64
import contextlib
import errno
import http.client
import io
import logging
import os
import select
import socket
import ssl
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from hashlib import sha256
from typing import IO, Any, Final, Protocol
from urllib.parse import quote, urlsplit

from django.utils.deconstruct import deconstructible

from tribrick.errors import StorageUnavailable
from tribrick.signature import EMPTY, sign

log = logging.getLogger("tribrick.storage")
CHUNK: Final = 1024 * 1024
_BLOCK: Final = 128 * 1024
_REST: Final = 64 * 1024  # of an answer's unwanted body; more is not worth a kept connection
_STALE: Final = (http.client.BadStatusLine, ConnectionResetError, BrokenPipeError, ConnectionAbortedError)


class TransportError(StorageUnavailable):
    """A host did not do what was asked, or it is not known whether it did."""

    certain = False
    """True if the request had no effect on the host and will have none."""
    late = False
    """True if the request may still take effect after now."""


class HostUnreachable(TransportError):
    """No connection to the host: nothing happened there."""

    certain = True


class TransportTimeout(TransportError, TimeoutError):
    """The deadline passed. The host may still carry the request out."""

    late = True


class UnexpectedStatusCode(TransportError):
    """The host answered with a status that is not proof of what was asked.

    202 says that the host may do it later, so it is no proof, and neither is a 200 to a PUT.
    """

    def __init__(self, host: str, method: str, name: str, status: int) -> None:
        code = {404: errno.ENOENT, 410: errno.ENOENT, 507: errno.ENOSPC}.get(status, errno.EIO)
        super().__init__(code, f"{method} {name} on {host} was answered with {status}")
        self.status = status
        self.certain = 300 <= status < 500 or status == http.HTTPStatus.INSUFFICIENT_STORAGE
        self.late = status == http.HTTPStatus.ACCEPTED

    def __reduce__(self) -> tuple[Any, ...]:
        return _unpickled_status, (self.errno, self.strerror, self.status)


def _unpickled_status(code: int, text: str, status: int) -> UnexpectedStatusCode:
    made = UnexpectedStatusCode("", "", "", status)
    made.errno, made.strerror, made.args = code, text, (code, text)
    return made


class Deadline:
    """The end of one whole operation, however many reads and writes it takes.

    *rate* (bytes a second) is what a transfer may take longer, added once its size is known.
    """

    def __init__(self, seconds: float, rate: float | None = None) -> None:
        self.seconds = seconds
        self.rate = rate
        self.allowed = 0.0
        self.at = time.monotonic() + seconds

    def left(self) -> float:
        """Return the seconds that are left; raise :class:`TransportTimeout` if there are none."""
        left = self.at - time.monotonic()
        if left <= 0:
            raise TransportTimeout(errno.ETIMEDOUT, f"not done within {self.seconds:.3g} s")
        return left

    def allow(self, size: int) -> None:
        """Add the time that a transfer of *size* bytes may take."""
        if self.rate:
            more = size / self.rate
            self.allowed += more
            self.seconds += more
            self.at += more

    def share(self, parts: int) -> Deadline:
        """Return the deadline of the first of *parts* attempts, so that the others get their turn."""
        return Deadline(self.left() / parts, self.rate)


@dataclass(frozen=True)
class Body:
    """What is sent to each host: *open* gives a new stream from the start every time."""

    size: int
    sha256: str
    open: Callable[[], IO[bytes]]


class _Shared:
    """A descriptor of its own of a file that several readers share; closed with the last of them.

    So a request that was given up may go on reading after the file was closed.
    """

    def __init__(self, descriptor: int) -> None:
        self.number = os.dup(descriptor)

    def __del__(self) -> None:
        with contextlib.suppress(OSError):
            os.close(self.number)


class _Window(io.RawIOBase):
    """A reader of a shared file with a position of its own."""

    def __init__(self, shared: _Shared, size: int) -> None:
        super().__init__()
        self._shared, self._size, self._position = shared, size, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        wanted = min(len(buffer), self._size - self._position)
        data = os.pread(self._shared.number, wanted, self._position) if wanted > 0 else b""
        buffer[: len(data)] = data
        self._position += len(data)
        return len(data)


def opener_of(descriptor: int, size: int) -> Callable[[], IO[bytes]]:
    """Return a function that gives readers of an open file, each with a position of its own."""
    shared = _Shared(descriptor)
    return lambda: io.BufferedReader(_Window(shared, size), _BLOCK)


@contextlib.contextmanager
def spooled(chunks: Iterable[bytes | str]) -> Iterator[Body]:
    """Yield a :class:`Body` of *chunks*: in memory up to 1 MiB, else in a temporary file."""
    hasher, size = sha256(), 0
    spool = Spool()
    try:
        for chunk in chunks:
            data = chunk.encode() if isinstance(chunk, str) else chunk
            hasher.update(data)
            size += len(data)
            spool.write(data)
        yield Body(size, hasher.hexdigest(), spool.opener())
    finally:
        spool.file.close()


class Spool:
    """Collects bytes: in memory up to 1 MiB, then in a temporary file."""

    def __init__(self) -> None:
        self.file: IO[bytes] = io.BytesIO()
        self._size = 0

    def write(self, data: bytes) -> None:
        """Add *data*."""
        self._size += len(data)
        if self._size > CHUNK and isinstance(self.file, io.BytesIO):
            held, self.file = self.file.getvalue(), tempfile.TemporaryFile()
            self.file.write(held)
        self.file.write(data)

    def opener(self) -> Callable[[], IO[bytes]]:
        """Return a function that gives readers of what was collected."""
        if isinstance(self.file, io.BytesIO):
            held = self.file.getvalue()
            return lambda: io.BytesIO(held)
        self.file.flush()
        return opener_of(self.file.fileno(), self._size)


class Download(Protocol):
    """The body of a file on its way: ``read(size)`` until ``b""``, then ``close()``."""

    def read(self, size: int = -1, /) -> bytes: ...

    def close(self) -> None: ...


class Transport(Protocol):
    """What a storage needs to reach its hosts. Every call must end at its *deadline*.

    All raise :class:`TransportError` when the host did not do it.
    """

    def content(self, host: str, name: str, deadline: Deadline) -> Download:
        """Return the body; a file that is not there is ``UnexpectedStatusCode`` with status 404."""

    def exists(self, host: str, name: str, deadline: Deadline) -> bool:
        """Return whether the host has the file."""

    def size(self, host: str, name: str, deadline: Deadline) -> int:
        """Return the size in bytes."""

    def create(self, host: str, name: str, body: Body, deadline: Deadline) -> bool:
        """Store the file; return True if the host had the name before."""

    def delete(self, host: str, name: str, deadline: Deadline) -> bool:
        """Remove the file; return False if the host did not have it."""


# Connections.


class _TimedReader(io.RawIOBase):
    def __init__(self, raw: io.RawIOBase, connection: _Connection) -> None:
        super().__init__()
        self._raw, self._connection = raw, connection

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        self._connection.arm()
        try:
            return self._raw.readinto(buffer) or 0
        except TimeoutError as error:
            raise self._connection.timed_out() from error

    def close(self) -> None:
        self._raw.close()
        super().close()


class _TimedSocket:
    """A socket whose every read and write is cut at the connection's deadline."""

    def __init__(self, plain: socket.socket, connection: _Connection) -> None:
        self.plain, self._connection = plain, connection

    def sendall(self, data: Any) -> None:
        view = memoryview(data).cast("B")
        while view:
            self._connection.arm()
            try:
                view = view[self.plain.send(view) :]
            except TimeoutError as error:
                raise self._connection.timed_out() from error

    def makefile(self, _mode: str) -> io.BufferedReader:
        return io.BufferedReader(_TimedReader(self.plain.makefile("rb", buffering=0), self._connection), _BLOCK)

    def close(self) -> None:
        self.plain.close()


class _Connection(http.client.HTTPConnection):
    def __init__(self, host: str, port: int, context: ssl.SSLContext | None, server_name: str) -> None:
        super().__init__(host, port, blocksize=_BLOCK)
        self.deadline = Deadline(0)
        self.idle_since = 0.0
        self._context, self._server_name = context, server_name
        self._plain: socket.socket | None = None

    def arm(self) -> None:
        if self._plain is not None:
            self._plain.settimeout(self.deadline.left())

    def timed_out(self) -> TransportTimeout:
        return TransportTimeout(errno.ETIMEDOUT, f"not done within {self.deadline.seconds:.3g} s")

    def connect(self) -> None:
        error: OSError | None = None
        for family, kind, protocol, _canonical, address in socket.getaddrinfo(
            self.host, self.port, type=socket.SOCK_STREAM
        ):
            plain = socket.socket(family, kind, protocol)
            try:
                plain.settimeout(self.deadline.left())
                plain.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
                plain.connect(address)
                if self._context is not None:
                    plain.settimeout(self.deadline.left())
                    plain = self._context.wrap_socket(plain, server_hostname=self._server_name)
            except OSError as caught:
                plain.close()
                error = caught
                continue
            self._plain = plain
            self.sock = _TimedSocket(plain, self)
            return
        raise error or OSError(errno.EHOSTUNREACH, "the host has no address")

    def is_stale(self) -> bool:
        """Return whether the host has closed, or sent something that nobody asked for."""
        if self._plain is None:
            return True
        poll = select.poll()
        poll.register(self._plain, select.POLLIN | select.POLLERR | select.POLLHUP)
        return bool(poll.poll(0))


class _Pool:
    """Idle connections by host. Not shared with a process that forked off."""

    def __init__(self, size: int, idle: float) -> None:
        self._size, self._longest_idle = size, idle
        self._lock = threading.Lock()
        self._idle: dict[str, list[_Connection]] = {}
        self._process = os.getpid()

    def take(self, host: str) -> _Connection | None:
        while True:
            with self._lock:
                if self._process != os.getpid():
                    self._idle, self._process = {}, os.getpid()
                idle = self._idle.get(host)
                connection = idle.pop() if idle else None
            if connection is None:
                return None
            if time.monotonic() - connection.idle_since < self._longest_idle and not connection.is_stale():
                return connection
            connection.close()

    def give(self, host: str, connection: _Connection) -> None:
        connection.idle_since = time.monotonic()
        with self._lock:
            idle = self._idle.setdefault(host, [])
            if self._process == os.getpid() and len(idle) < self._size:
                idle.append(connection)
                return
        connection.close()

    def close(self) -> None:
        with self._lock:
            idle, self._idle = self._idle, {}
        for connections in idle.values():
            for connection in connections:
                connection.close()


class HttpDownload:
    """The body of a GET. It ends after exactly the announced number of bytes, or raises."""

    def __init__(self, response: http.client.HTTPResponse, done: Callable[[bool], None], what: str) -> None:
        self._response, self._done, self._what = response, done, what
        self.size = response.length
        self._missing = response.length

    def read(self, size: int = -1, /) -> bytes:
        """Return up to *size* bytes; ``b""`` at the end."""
        with _as_transport_errors(self._what):
            data = self._response.read(size) if size >= 0 else self._response.read()
        if self._missing is not None:
            self._missing -= len(data)
            if not data and size != 0 and self._missing > 0:
                raise TransportError(errno.EIO, f"{self._what} broke off {self._missing} bytes before its end")
        return data

    def close(self) -> None:
        """Give the connection back if everything was read, else close it."""
        self._done(self._response.isclosed() and not self._missing)


@contextlib.contextmanager
def _as_transport_errors(what: str) -> Iterator[None]:
    try:
        yield
    except TransportTimeout as error:
        raise TransportTimeout(errno.ETIMEDOUT, f"{what}: {error.strerror}") from error
    except TransportError:
        raise
    except TimeoutError as error:
        raise TransportTimeout(errno.ETIMEDOUT, f"{what}: time-out") from error
    except (OSError, http.client.HTTPException) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise TransportError(getattr(error, "errno", None) or errno.EIO, f"{what}: {reason}") from error


@deconstructible(path="tribrick.storage.DefaultTransport")
class DefaultTransport:
    """HTTP to media hosts, with the standard library.

    *base_url* gives scheme (``http`` when absent) and path of the URLs on every host; its own host
    is not used. Bodies are streamed, connections are kept, redirects are not followed, and the
    proxies of the environment are ignored.

    For ``https``: *ca* (file with the certificates to trust; the system's when absent),
    *certificate* and *key* (the client's), *server_name* (the name in the hosts' certificates when
    it is not the host itself). *hmac_key* signs every request as :mod:`tribrick.signature` says,
    under the name *hmac_key_id*.

    Keep secrets out of the arguments of a model's field: migrations write those down.
    ``TRIBRICK["TRANSPORT"]`` is the place for them.
    """

    def __init__(
        self,
        base_url: str = "/",
        *,
        ca: str | None = None,
        certificate: str | None = None,
        key: str | None = None,
        server_name: str | None = None,
        hmac_key: str | None = None,
        hmac_key_id: str = "default",
        connections_per_host: int = 8,
        idle_seconds: float = 30.0,
    ) -> None:
        parts = urlsplit(base_url)
        if parts.query or parts.fragment:
            raise ValueError(f"base_url {base_url!r} must have neither query nor fragment")
        self.scheme = parts.scheme or "http"
        if self.scheme not in ("http", "https"):
            raise ValueError(f"base_url {base_url!r}: the scheme must be http or https")
        if self.scheme == "http" and (ca or certificate or server_name):
            raise ValueError('ca, certificate and server_name need a base_url with "https://"')
        path = parts.path if parts.path.startswith("/") else f"/{parts.path}"
        self.path = path if path.endswith("/") else f"{path}/"
        self._ca, self._certificate, self._key, self._server_name = ca, certificate, key, server_name
        self._hmac_key, self._hmac_key_id = hmac_key, hmac_key_id
        self._pool_options = (connections_per_host, idle_seconds)
        self._pool = _Pool(*self._pool_options)
        self._context: ssl.SSLContext | None = None

    _constructor_args: Any  # written by deconstructible

    def __eq__(self, other: object) -> bool:
        return isinstance(other, DefaultTransport) and (type(self), self._constructor_args) == (
            type(other),
            other._constructor_args,
        )

    def __hash__(self) -> int:
        return hash((type(self), self.scheme, self.path))

    def __getstate__(self) -> dict[str, Any]:
        return {key: value for key, value in self.__dict__.items() if key not in ("_pool", "_context")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._pool, self._context = _Pool(*self._pool_options), None

    # The five operations.

    def content(self, host: str, name: str, deadline: Deadline) -> HttpDownload:
        """GET: return the body as a stream."""
        connection, response = self._ask("GET", host, name, deadline)

        def done(clean: bool) -> None:
            self._finish(host, connection, response, reuse=clean)

        if response.status != http.HTTPStatus.OK:
            status = response.status
            self._drop(host, connection, response)
            raise UnexpectedStatusCode(host, "GET", name, status)
        what = f"GET {name} on {host}"
        if response.length is None and not response.chunked:
            done(False)
            raise TransportError(errno.EIO, f"{what}: the answer has no length, so a lost end could not be seen")
        deadline.allow(response.length or 0)
        return HttpDownload(response, done, what)

    def exists(self, host: str, name: str, deadline: Deadline) -> bool:
        """HEAD: 200 is yes, 404 and 410 are no."""
        status, _ = self._status("HEAD", host, name, deadline)
        if status == http.HTTPStatus.OK:
            return True
        if status in (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.GONE):
            return False
        raise UnexpectedStatusCode(host, "HEAD", name, status)

    def size(self, host: str, name: str, deadline: Deadline) -> int:
        """HEAD: the Content-Length."""
        status, length = self._status("HEAD", host, name, deadline)
        if status != http.HTTPStatus.OK:
            raise UnexpectedStatusCode(host, "HEAD", name, status)
        if length is None:
            raise TransportError(errno.EIO, f"HEAD {name} on {host}: the answer has no Content-Length")
        return length

    def create(self, host: str, name: str, body: Body, deadline: Deadline) -> bool:
        """PUT: 201 is a new file, 204 one that was there before (logged); nothing else is proof."""
        status, _ = self._status("PUT", host, name, deadline, body)
        if status == http.HTTPStatus.CREATED:
            return False
        if status == http.HTTPStatus.NO_CONTENT:
            log.warning("PUT on existing file %s on %s", name, host)
            return True
        raise UnexpectedStatusCode(host, "PUT", name, status)

    def delete(self, host: str, name: str, deadline: Deadline) -> bool:
        """DELETE: 200 and 204 are done, 404 and 410 were not there (logged)."""
        status, _ = self._status("DELETE", host, name, deadline)
        if status in (http.HTTPStatus.OK, http.HTTPStatus.NO_CONTENT):
            return True
        if status in (http.HTTPStatus.NOT_FOUND, http.HTTPStatus.GONE):
            log.warning("DELETE on missing file %s on %s", name, host)
            return False
        raise UnexpectedStatusCode(host, "DELETE", name, status)

    def close(self) -> None:
        """Close the idle connections."""
        self._pool.close()

    # Hooks for subclasses.

    def target(self, name: str) -> str:
        """Return the path that is asked for *name*, percent-encoded.

        Never one that a server may take for another, or for a directory: nginx removes the tree below ``name/``.
        """
        if {"", ".", ".."} & set(name.split("/")):
            raise ValueError(f"{name!r} is not the name of a file")
        return quote(self.path) + quote(name)

    def headers(self, method: str, name: str, body: Body | None) -> dict[str, str]:
        """Return the headers of a request."""
        headers = {"User-Agent": "tribrick", "Accept-Encoding": "identity"}
        if body is not None:
            headers["Content-Length"] = str(body.size)
            headers["Content-Type"] = "application/octet-stream"
            headers["Content-Digest"] = f"sha-256=:{base64.b64encode(bytes.fromhex(body.sha256)).decode()}:"
        if self._hmac_key:
            digest = body.sha256 if body is not None else EMPTY
            headers["Authorization"] = sign(self._hmac_key, method, name, digest, key_id=self._hmac_key_id)
        return headers

    # Requests.

    def _ask(
        self, method: str, host: str, name: str, deadline: Deadline, body: Body | None = None
    ) -> tuple[_Connection, http.client.HTTPResponse]:
        """Send one request; return the connection and the answer's head."""
        what = f"{method} {name} on {host}"
        kept = self._pool.take(host)
        if kept is not None:
            kept.deadline = deadline
            try:
                with _as_transport_errors(what):
                    return kept, self._exchange(kept, method, name, body)
            except TransportError as error:
                kept.close()
                # The host closed the kept connection meanwhile. All five may be asked twice.
                if not isinstance(error.__cause__, _STALE):
                    raise
            except BaseException:
                kept.close()
                raise
        connection = self._connection(host)
        connection.deadline = deadline
        try:
            with _as_transport_errors(what):
                try:
                    connection.connect()
                except ssl.SSLError as error:
                    raise HostUnreachable(errno.EPROTO, f"{what}: TLS: {error.reason or error}") from error
                except OSError as error:
                    reason = error.strerror or str(error)
                    raise HostUnreachable(error.errno or errno.EIO, f"{what}: no connection: {reason}") from error
                return connection, self._exchange(connection, method, name, body)
        except BaseException:
            connection.close()
            raise

    def _exchange(self, connection: _Connection, method: str, name: str, body: Body | None) -> http.client.HTTPResponse:
        headers = self.headers(method, name, body)
        if body is None:
            connection.request(method, self.target(name), headers=headers)
            return connection.getresponse()
        with body.open() as stream:
            try:
                connection.request(method, self.target(name), body=stream, headers=headers)
            except (BrokenPipeError, ConnectionResetError) as error:
                # A host that refuses may answer and close without reading to the end.
                try:
                    response = connection.getresponse()
                except (http.client.HTTPException, ConnectionError):
                    raise error from None
                response.will_close = True
                return response
        return connection.getresponse()

    def _status(
        self, method: str, host: str, name: str, deadline: Deadline, body: Body | None = None
    ) -> tuple[int, int | None]:
        connection, response = self._ask(method, host, name, deadline, body)
        status, length = response.status, None
        announced = response.getheader("Content-Length")
        if announced is not None and announced.isascii() and announced.isdigit():
            length = int(announced)
        self._drop(host, connection, response)
        return status, length

    def _drop(self, host: str, connection: _Connection, response: http.client.HTTPResponse) -> None:
        """Read the rest of an answer that nobody wants, if it is short; the answer stands anyway."""
        reuse = False
        if response.length is not None and response.length <= _REST and not response.will_close:
            with contextlib.suppress(OSError, http.client.HTTPException):
                response.read()
                reuse = True
        self._finish(host, connection, response, reuse=reuse)

    def _finish(self, host: str, connection: _Connection, response: http.client.HTTPResponse, *, reuse: bool) -> None:
        reuse = reuse and response.isclosed() and not response.will_close
        response.close()
        if reuse:
            self._pool.give(host, connection)
        else:
            connection.close()

    def _connection(self, host: str) -> _Connection:
        parts = urlsplit(f"//{host}")
        if not parts.hostname or parts.path or parts.query or parts.username:
            raise ValueError(f"{host!r} is not a host: give a name or an address, with or without :port")
        secure = self.scheme == "https"
        port = parts.port or (443 if secure else 80)
        return _Connection(parts.hostname, port, self._tls() if secure else None, self._server_name or parts.hostname)

    def _tls(self) -> ssl.SSLContext:
        if self._context is None:
            context = ssl.create_default_context(cafile=self._ca)
            context.minimum_version = ssl.TLSVersion.TLSv1_2
            if self._certificate:
                context.load_cert_chain(self._certificate, self._key)
            self._context = context
        return self._context
