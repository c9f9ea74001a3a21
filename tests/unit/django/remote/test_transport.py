"""The transport and the test server: statuses, streams, deadlines, connections, trust."""

from __future__ import annotations

import hashlib
import io
import pickle
import socket
import ssl
import subprocess
import threading
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.db.migrations.writer import MigrationWriter

from tribrick.signature import EMPTY, SignatureError, sign, verify
from tribrick.storage.transport import (
    Body,
    Deadline,
    DefaultTransport,
    HostUnreachable,
    TransportError,
    TransportTimeout,
    UnexpectedStatusCode,
    spooled,
)
from tribrick.testing import TestHttpServer


@pytest.fixture
def server() -> Iterator[TestHttpServer]:
    with TestHttpServer() as running:
        yield running


@pytest.fixture
def transport() -> DefaultTransport:
    return DefaultTransport("/media/")


def body_of(data: bytes) -> Body:
    return Body(len(data), hashlib.sha256(data).hexdigest(), lambda: io.BytesIO(data))


def soon() -> Deadline:
    return Deadline(10)


def read_all(download: Any, size: int) -> None:
    while download.read(size):
        pass


# What is asked and what answers mean.


def test_round_trip(server: TestHttpServer, transport: DefaultTransport) -> None:
    host = server.host
    assert transport.exists(host, "a.txt", soon()) is False
    assert transport.create(host, "a.txt", body_of(b"one"), soon()) is False
    assert transport.create(host, "a.txt", body_of(b"two"), soon()) is True
    assert transport.exists(host, "a.txt", soon()) is True
    assert transport.size(host, "a.txt", soon()) == 3
    download = transport.content(host, "a.txt", soon())
    assert download.read() == b"two"
    download.close()
    assert transport.delete(host, "a.txt", soon()) is True
    assert transport.delete(host, "a.txt", soon()) is False
    assert server.log == [
        ("HEAD", "/media/a.txt", 404),
        ("PUT", "/media/a.txt", 201),
        ("PUT", "/media/a.txt", 204),
        ("HEAD", "/media/a.txt", 200),
        ("HEAD", "/media/a.txt", 200),
        ("GET", "/media/a.txt", 200),
        ("DELETE", "/media/a.txt", 204),
        ("DELETE", "/media/a.txt", 404),
    ]


CALLS: dict[str, Callable[[DefaultTransport, str], Any]] = {
    "GET": lambda transport, host: transport.content(host, "a", soon()),
    "HEAD": lambda transport, host: transport.exists(host, "a", soon()),
    "SIZE": lambda transport, host: transport.size(host, "a", soon()),
    "PUT": lambda transport, host: transport.create(host, "a", body_of(b"x"), soon()),
    "DELETE": lambda transport, host: transport.delete(host, "a", soon()),
}
GOOD = {"GET": {200}, "HEAD": {200, 404, 410}, "SIZE": {200}, "PUT": {201, 204}, "DELETE": {200, 204, 404, 410}}


@pytest.mark.parametrize("status", [200, 201, 202, 204, 301, 401, 403, 404, 410, 500, 503, 507])
@pytest.mark.parametrize("method", CALLS)
def test_only_proof_is_success(method: str, status: int, server: TestHttpServer, transport: DefaultTransport) -> None:
    server.override_code = status
    if status in GOOD[method]:
        CALLS[method](transport, server.host)
        return
    with pytest.raises(UnexpectedStatusCode) as caught:
        CALLS[method](transport, server.host)
    assert caught.value.status == status
    assert caught.value.certain == (300 <= status < 500 or status == 507)
    assert caught.value.late == (status == 202)
    assert len(server.log) == 1, "no redirect is followed, nothing is asked again"


@pytest.mark.parametrize("name", ["photos/café.txt", "a b#c?d%e.txt", "x\r\ny", "ü/ß"])
def test_names_are_quoted(name: str, server: TestHttpServer, transport: DefaultTransport) -> None:
    transport.create(server.host, name, body_of(b"x"), soon())
    assert list(server.files) == [name]


@pytest.mark.parametrize(
    ("base_url", "path"),
    [("/media/", "/media/x"), ("http://cdn/media", "/media/x"), ("", "/x"), ("https://cdn", "/x"), ("m", "/m/x")],
)
def test_base_url(base_url: str, path: str) -> None:
    assert DefaultTransport(base_url).target("x") == path


@pytest.mark.parametrize("base_url", ["/media/?a=b", "/media/#a", "ftp://x/"])
def test_bad_base_url(base_url: str) -> None:
    with pytest.raises(ValueError, match="base_url"):
        DefaultTransport(base_url)


@pytest.mark.parametrize("host", ["", "a/b", "user@a", "http://a"])
def test_bad_host(host: str, transport: DefaultTransport) -> None:
    with pytest.raises(ValueError, match="not a host"):
        transport.exists(host, "a", soon())


def test_nobody_listens(server: TestHttpServer, transport: DefaultTransport) -> None:
    server.stop()
    with pytest.raises(HostUnreachable) as caught:
        transport.create(server.host, "a", body_of(b"x"), soon())
    assert caught.value.certain


def test_proxies_of_the_environment_are_ignored(
    server: TestHttpServer, transport: DefaultTransport, monkeypatch: pytest.MonkeyPatch
) -> None:
    with TestHttpServer() as proxy:
        for name in ("http_proxy", "HTTP_PROXY", "all_proxy"):
            monkeypatch.setenv(name, f"http://{proxy.host}/")
        transport.create(server.host, "a", body_of(b"x"), soon())
        assert proxy.connections == 0
    assert server.files == {"a": b"x"}


# Streams.


class Peer:
    """A host that does what the test says with a raw connection."""

    def __init__(self, serve: Callable[[socket.socket, bytes], None]) -> None:
        self._socket = socket.create_server(("127.0.0.1", 0))
        self._serve = serve
        self.failed: list[BaseException] = []
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _run(self) -> None:
        try:
            connection, _ = self._socket.accept()
            with connection:
                head = b""
                while b"\r\n\r\n" not in head:
                    head += connection.recv(65536)
                self._serve(connection, head)
        except Exception as error:  # noqa: BLE001  raised again by the test
            self.failed.append(error)

    def __enter__(self) -> str:
        self._thread.start()
        return f"127.0.0.1:{self._socket.getsockname()[1]}"

    def __exit__(self, *_: object) -> None:
        self._thread.join(20)
        self._socket.close()
        assert not self._thread.is_alive()
        assert not self.failed


SIZE = 96 * 1024 * 1024


class Zeros(io.RawIOBase):
    def __init__(self) -> None:
        super().__init__()
        self.left = SIZE

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        count = min(len(buffer), self.left)
        buffer[:count] = bytes(count)
        self.left -= count
        return count


def test_an_upload_is_streamed(transport: DefaultTransport) -> None:
    received = 0

    def serve(connection: socket.socket, head: bytes) -> None:
        nonlocal received
        assert b"Content-Length: %d\r\n" % SIZE in head
        received = len(head.split(b"\r\n\r\n", 1)[1])
        while received < SIZE:
            received += len(connection.recv(65536))
        connection.sendall(b"HTTP/1.1 201 Created\r\nContent-Length: 0\r\n\r\n")

    tracemalloc.start()
    try:
        with Peer(serve) as host:
            transport.create(host, "a", Body(SIZE, "0" * 64, lambda: io.BufferedReader(Zeros())), Deadline(60))
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert received == SIZE


def test_a_download_is_streamed(transport: DefaultTransport) -> None:
    def serve(connection: socket.socket, head: bytes) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % SIZE)
        piece = bytes(65536)
        for _ in range(SIZE // len(piece)):
            connection.sendall(piece)

    tracemalloc.start()
    try:
        with Peer(serve) as host:
            download = transport.content(host, "a", Deadline(60))
            size = 0
            while chunk := download.read(65536):
                size += len(chunk)
            download.close()
        assert tracemalloc.get_traced_memory()[1] < 4 * 1024 * 1024
    finally:
        tracemalloc.stop()
    assert size == SIZE


def test_a_large_spooled_body_gives_each_host_its_own_reader() -> None:
    data = bytes(range(256)) * 8192  # 2 MiB: on disk
    with spooled(data[i : i + 70_000] for i in range(0, len(data), 70_000)) as body:
        first, second = body.open(), body.open()
        assert first.read(10) == data[:10]
        assert second.read() == data
    assert first.read() == data[10:], "a request that was given up may still read"
    assert (body.size, body.sha256) == (len(data), hashlib.sha256(data).hexdigest())
    assert second.read() == b""


def test_a_broken_off_body_is_an_error(server: TestHttpServer, transport: DefaultTransport) -> None:
    server.files["a"] = bytes(100_000)
    server.dies_mid_body = True
    download = transport.content(server.host, "a", soon())
    with pytest.raises(TransportError):
        read_all(download, 4096)
    download.close()


def test_an_end_that_comes_too_early_is_an_error(transport: DefaultTransport) -> None:
    with Peer(lambda c, _: c.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nabc")) as host:
        download = transport.content(host, "a", soon())
        with pytest.raises(TransportError, match="7 bytes before its end"):
            read_all(download, 2)
        download.close()


def test_a_body_without_a_length_is_refused(transport: DefaultTransport) -> None:
    with (
        Peer(lambda c, _: c.sendall(b"HTTP/1.0 200 OK\r\n\r\nabc")) as host,
        pytest.raises(TransportError, match="no length"),
    ):
        transport.content(host, "a", soon())


def test_a_chunked_body_is_read(transport: DefaultTransport) -> None:
    answer = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n"
    with Peer(lambda c, _: c.sendall(answer)) as host:
        download = transport.content(host, "a", soon())
        assert download.read() == b"abc"
        download.close()


def test_a_refusal_before_the_body_was_read_is_understood(transport: DefaultTransport) -> None:
    def serve(connection: socket.socket, head: bytes) -> None:
        connection.sendall(b"HTTP/1.1 413 Too Large\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")
        connection.shutdown(socket.SHUT_WR)
        while connection.recv(65536):  # as a good server does, so that the answer is not lost
            pass

    with Peer(serve) as host, pytest.raises(UnexpectedStatusCode) as caught:
        transport.create(host, "a", Body(SIZE, "0" * 64, lambda: io.BufferedReader(Zeros())), soon())
    assert caught.value.status == 413


# Connections and deadlines.


def test_connections_are_kept(server: TestHttpServer, transport: DefaultTransport) -> None:
    for number in range(5):
        transport.create(server.host, f"{number}", body_of(b"x" * 1000), soon())
        download = transport.content(server.host, f"{number}", soon())
        while download.read(100):
            pass
        download.close()
        transport.delete(server.host, f"{number}", soon())
    assert len(server.log) == 15
    assert server.connections == 1


def test_a_kept_connection_that_the_host_has_closed_is_no_failure(
    server: TestHttpServer, transport: DefaultTransport
) -> None:
    transport.create(server.host, "a", body_of(b"x"), soon())
    server.stop()
    server.start()
    transport.create(server.host, "b", body_of(b"y"), soon())
    assert server.files == {"a": b"x", "b": b"y"}
    assert server.connections == 2


def test_one_deadline_for_the_whole_operation(server: TestHttpServer, transport: DefaultTransport) -> None:
    """A host that sends a byte now and then never meets a time-out of the socket."""
    server.files["a"] = bytes(1000)
    server.drip = 0.05
    started = time.monotonic()
    download = transport.content(server.host, "a", Deadline(0.4))
    with pytest.raises(TransportTimeout):
        read_all(download, 1)
    download.close()
    assert time.monotonic() - started < 2


def test_a_host_that_reads_slowly_meets_the_deadline(transport: DefaultTransport) -> None:
    done = threading.Event()

    def serve(connection: socket.socket, head: bytes) -> None:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        while not done.wait(0.05):
            connection.recv(1)

    with Peer(serve) as host:
        started = time.monotonic()
        with pytest.raises(TransportTimeout) as caught:
            transport.create(host, "a", Body(SIZE, "0" * 64, lambda: io.BufferedReader(Zeros())), Deadline(0.4))
        assert time.monotonic() - started < 2
        assert caught.value.late
        done.set()


def test_a_transfer_gets_time_for_its_size() -> None:
    deadline = Deadline(1, rate=1000)
    deadline.allow(2000)
    assert 2.9 < deadline.left() <= 3
    with pytest.raises(TransportTimeout):
        Deadline(0).left()


# Trust.


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="module")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A CA, and certificates of the host (for 127.0.0.1) and of the client."""
    at = tmp_path_factory.mktemp("tls")
    elliptic = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2"]
    for ca in ("ca", "other"):
        openssl(
            *("req", "-x509", *elliptic, "-subj", f"/CN={ca}", "-addext", "keyUsage=critical,keyCertSign"),
            *("-keyout", f"{at}/{ca}.key", "-out", f"{at}/{ca}.pem"),
        )
    for who in ("host", "client"):
        openssl(
            *("req", "-x509", *elliptic, "-subj", f"/CN={who}", "-addext", "subjectAltName=IP:127.0.0.1"),
            *("-addext", "basicConstraints=critical,CA:FALSE"),
            *("-addext", "authorityKeyIdentifier=keyid", "-CA", f"{at}/ca.pem", "-CAkey", f"{at}/ca.key"),
            *("-keyout", f"{at}/{who}.key", "-out", f"{at}/{who}.pem"),
        )
    return at


@pytest.fixture
def tls_server(certificates: Path) -> Iterator[TestHttpServer]:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(certificates / "host.pem", certificates / "host.key")
    context.load_verify_locations(certificates / "ca.pem")
    context.verify_mode = ssl.CERT_REQUIRED
    with TestHttpServer(context=context) as running:
        yield running


def test_https_with_a_client_certificate(tls_server: TestHttpServer, certificates: Path) -> None:
    at = certificates
    options = {"ca": f"{at}/ca.pem", "certificate": f"{at}/client.pem", "key": f"{at}/client.key"}
    transport = DefaultTransport("https:///media/", **options)
    data = bytes(range(256)) * 1000
    transport.create(tls_server.host, "a", body_of(data), soon())
    download = transport.content(tls_server.host, "a", soon())
    assert download.read() == data
    download.close()
    assert tls_server.connections == 1


def test_https_refuses_strangers(tls_server: TestHttpServer, certificates: Path) -> None:
    at = certificates
    client = {"certificate": f"{at}/client.pem", "key": f"{at}/client.key"}
    for options in (
        {"ca": f"{at}/other.pem", **client},  # a host that nobody we trust has signed
        {"ca": f"{at}/ca.pem"},  # a client without a certificate
        {"ca": f"{at}/ca.pem", "server_name": "elsewhere.example", **client},  # another host's certificate
    ):
        with pytest.raises(TransportError):
            DefaultTransport("https:///media/", **options).create(tls_server.host, "a", body_of(b"x"), soon())
    assert tls_server.files == {}


def test_requests_are_signed(server: TestHttpServer) -> None:
    server.secrets = {"web": "a secret"}
    good = DefaultTransport("/media/", hmac_key="a secret", hmac_key_id="web")
    good.create(server.host, "ü/a b", body_of(b"x"), soon())
    assert good.exists(server.host, "ü/a b", soon())
    for bad in (
        DefaultTransport("/media/"),
        DefaultTransport("/media/", hmac_key="another", hmac_key_id="web"),
        DefaultTransport("/media/", hmac_key="a secret"),
    ):
        with pytest.raises(UnexpectedStatusCode) as caught:
            bad.delete(server.host, "ü/a b", soon())
        assert caught.value.status == 401
    assert list(server.files) == ["ü/a b"]


def test_a_signature_covers_method_name_digest_and_time() -> None:
    digest = "ab" * 32
    header = sign("s", "PUT", "a/ü", digest, key_id="k", now=1000)
    assert verify(header, {"k": "s"}, "PUT", "a/ü", now=1100) == digest
    assert verify(sign("s", "GET", "a", now=5), {"default": "s"}, "GET", "a", now=5) == EMPTY
    wrong: list[tuple[Any, ...]] = [
        (header, {"k": "s"}, "DELETE", "a/ü", 1000),
        (header, {"k": "s"}, "PUT", "a/u", 1000),
        (header.replace("ab", "cd"), {"k": "s"}, "PUT", "a/ü", 1000),
        (header.replace('"1000"', '"1001"'), {"k": "s"}, "PUT", "a/ü", 1000),
        (header, {"k": "t"}, "PUT", "a/ü", 1000),
        (header, {"j": "s"}, "PUT", "a/ü", 1000),
        (header, {"k": ""}, "PUT", "a/ü", 1000),
        (header, {"k": "s"}, "PUT", "a/ü", 1301),
        (header, {"k": "s"}, "PUT", "a/ü", 699),
        (header + ', time="1000"', {"k": "s"}, "PUT", "a/ü", 1000),
        (header.replace("Tribrick", "Basic"), {"k": "s"}, "PUT", "a/ü", 1000),
        (None, {"k": "s"}, "PUT", "a/ü", 1000),
    ]
    for value, secrets, method, name, now in wrong:
        with pytest.raises(SignatureError):
            verify(value, secrets, method, name, now=now)


def test_the_signature_format_is_as_documented() -> None:
    """A fixed example, for those who write the other side in another language."""
    assert sign("secret", "PUT", "photos/é.txt", EMPTY, key_id="web", now=1700000000) == (
        f'Tribrick key="web", time="1700000000", digest="{EMPTY}", '
        'signature="4fc1d55b85b66ff3b88e8d722b91ee9a705f7301a1af2b8ee26953e36f994327"'
    )


@pytest.mark.parametrize("options", [{"hmac_key": "s", "hmac_key_id": 'a"b'}])
def test_bad_key_ids_are_refused(options: dict[str, str], server: TestHttpServer) -> None:
    with pytest.raises(ValueError, match="key id"):
        DefaultTransport("/media/", **options).exists(server.host, "a", soon())


# In migrations and other processes.


def test_pickled_and_deconstructed(server: TestHttpServer) -> None:
    transport = DefaultTransport("http:///files/", idle_seconds=5)
    transport.exists(server.host, "a", soon())
    again = pickle.loads(pickle.dumps(transport))  # noqa: S301
    assert again.target("x") == "/files/x"
    again.exists(server.host, "a", soon())
    text, imports = MigrationWriter.serialize(transport)
    assert text == "tribrick.storage.DefaultTransport('http:///files/', idle_seconds=5)"
    assert imports == {"import tribrick.storage"}


def test_errors_are_pickled() -> None:
    error = pickle.loads(pickle.dumps(UnexpectedStatusCode("h", "PUT", "n", 507)))  # noqa: S301
    assert (error.status, error.certain, str(error)) == (507, True, str(UnexpectedStatusCode("h", "PUT", "n", 507)))


def test_a_forked_process_makes_its_own_connections(server: TestHttpServer, transport: DefaultTransport) -> None:
    import os

    transport.exists(server.host, "a", soon())
    child = os.fork()
    if child == 0:  # pragma: no cover  in the child
        ok = False
        try:
            ok = transport.exists(server.host, "a", soon()) is False
        finally:
            os._exit(0 if ok else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert server.connections == 2
    transport.exists(server.host, "a", soon())
    assert server.connections == 2
