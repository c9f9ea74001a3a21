"""Storages on real media hosts: what each kind of host does with each request."""

from __future__ import annotations

import contextlib
import hashlib
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from django.core.files.base import ContentFile
from django.core.management import CommandError, call_command

from tribrick.storage.transport import Body, Deadline, DefaultTransport, HostUnreachable, UnexpectedStatusCode

KINDS = ("receiver", "nginx", "lighttpd")
LARGE = random.Random(3).randbytes(20 * 1024 * 1024)


@pytest.fixture(scope="module")
def hosts(machine: Any) -> Callable[[str], Any]:
    """Start the media host of each kind once."""
    running: dict[str, Any] = {}

    def get(kind: str) -> Any:
        if kind not in running:
            place = machine(kind)
            start = {"receiver": place.receiver, "nginx": place.nginx_dav, "lighttpd": place.lighttpd_dav}[kind]
            running[kind] = start()
        return running[kind]

    return get


@pytest.fixture(params=KINDS)
def host(request: pytest.FixtureRequest, hosts: Callable[[str], Any]) -> Any:
    """A running media host of each kind."""
    return hosts(request.param)


def body_of(data: bytes) -> Body:
    return Body(len(data), hashlib.sha256(data).hexdigest(), lambda: io.BytesIO(data))


def soon() -> Deadline:
    return Deadline(30)


def read(transport: DefaultTransport, host: Any, name: str) -> bytes:
    with contextlib.closing(transport.content(host.host, name, soon())) as download:
        return download.read()


def test_requests(host: Any) -> None:
    transport, name = host.transport(), "pictures/a/3/one.txt"
    assert transport.exists(host.host, name, soon()) is False
    if host.kind == "lighttpd":  # it makes no directories
        with pytest.raises(UnexpectedStatusCode) as caught:
            transport.create(host.host, name, body_of(b"one"), soon())
        assert caught.value.status == 409
    host.prepare(name)
    assert transport.create(host.host, name, body_of(b"one"), soon()) is False
    assert (host.files / name).read_bytes() == b"one", "two levels of directories were made"
    assert transport.create(host.host, name, body_of(b"one"), soon()) is True
    assert transport.exists(host.host, name, soon()) is True
    assert transport.size(host.host, name, soon()) == 3
    assert read(transport, host, name) == b"one"
    assert transport.delete(host.host, name, soon()) is True
    assert not (host.files / name).exists()
    assert transport.delete(host.host, name, soon()) is (host.kind == "receiver")
    assert transport.exists(host.host, name, soon()) is False
    if host.kind == "receiver":
        with pytest.raises(UnexpectedStatusCode) as caught:
            transport.create(host.host, name, body_of(b"one"), soon())
        assert caught.value.status == 410
    transport.close()


def test_a_large_body(host: Any) -> None:
    transport = host.transport()
    host.prepare("large/0/1/x.bin")
    assert transport.create(host.host, "large/0/1/x.bin", body_of(LARGE), soon()) is False
    assert transport.size(host.host, "large/0/1/x.bin", soon()) == len(LARGE)
    assert hashlib.sha256(read(transport, host, "large/0/1/x.bin")).digest() == hashlib.sha256(LARGE).digest()
    assert (host.files / "large/0/1/x.bin").read_bytes() == LARGE
    assert transport.delete(host.host, "large/0/1/x.bin", soon()) is True
    if host.kind == "receiver":  # nginx passes the answer on although it comes before the body's end
        with pytest.raises(UnexpectedStatusCode) as caught:
            transport.create(host.host, "large/0/1/x.bin", body_of(LARGE), soon())
        assert caught.value.status == 410


RANGES = [
    ("bytes=0-0", 206, LARGE[:1]),
    ("bytes=5-9", 206, LARGE[5:10]),
    ("bytes=-7", 206, LARGE[-7:]),
    (f"bytes={len(LARGE) - 3}-", 206, LARGE[-3:]),
    (f"bytes={len(LARGE) - 3}-{len(LARGE) + 9}", 206, LARGE[-3:]),
    (f"bytes={len(LARGE)}-", 416, None),
]


class Ranged(DefaultTransport):
    """Asks for a part of a file."""

    wanted = ""

    def headers(self, method: str, name: str, body: Body | None) -> dict[str, str]:
        return {**super().headers(method, name, body), "Range": self.wanted}


@pytest.mark.parametrize(("wanted", "status", "content"), RANGES, ids=[wanted for wanted, _, _ in RANGES])
def test_ranges(wanted: str, status: int, content: bytes | None, host: Any) -> None:
    plain, name = host.transport(), "large/0/1/ranges.bin"
    host.prepare(name)
    if not plain.exists(host.host, name, soon()):
        plain.create(host.host, name, body_of(LARGE), soon())
    transport = Ranged(base_url=host.base_url, **host.options)
    transport.wanted = wanted
    connection, response = transport._ask("GET", host.host, name, soon())
    with contextlib.closing(connection):
        assert response.status == status
        if content is not None:
            assert response.read() == content


@pytest.mark.parametrize("name", ["café/ä b.txt", "a%20b/c+d&e=f.txt", "x/y#z;w,v@u~t$s!.txt", "q/what?.txt"])
def test_unusual_names(name: str, host: Any) -> None:
    transport = host.transport()
    host.prepare(name)
    assert transport.create(host.host, name, body_of(b"odd"), soon()) is False
    assert (host.files / name).read_bytes() == b"odd"
    assert read(transport, host, name) == b"odd"
    assert transport.delete(host.host, name, soon()) is True
    assert not (host.files / name).exists()


# Storages


def settings_of(host: Any) -> dict[str, Any]:
    return {"TRANSPORT": {"base_url": host.base_url, **host.options}, "TIMEOUT": 10, "MINIMUM_RATE": 1024 * 1024}


@pytest.mark.parametrize("kind", ["hybrid", "distributed"])
def test_a_storage_on_it(kind: str, host: Any, site: Callable[..., Any], database: None) -> None:
    from tribrick.models import MediaFile, Outbox

    small, large = (random.Random(f"{kind} {size}").randbytes(size) for size in (70_000, 20 * 1024 * 1024))
    storage = site(kind, [host], **settings_of(host))
    for letter in "0123456789abcdef" if host.kind == "lighttpd" else "":
        for second in "0123456789abcdef":
            host.prepare(f"{kind}/{letter}/{second}/x")
    names = [storage.save(f"{kind}/x.bin", ContentFile(data)) for data in (small, large)]
    for name, data in zip(names, (small, large), strict=True):
        assert name.count("/") == 3, "two levels of hash directories"
        assert (host.files / name).read_bytes() == data
        assert MediaFile.objects.get(name=name).sha256 == hashlib.sha256(data).hexdigest()
        assert storage.exists(name)
        assert storage.size(name) == len(data)
        with storage.open(name) as file:
            assert file.read() == data
    for name in names:
        storage.delete(name)
        assert not storage.exists(name)
        assert not (host.files / name).exists()
    assert not Outbox.objects.filter(done=None).exclude(operation="intent").exists()


def test_reconcile_mends_receivers(
    machine: Any, site: Callable[..., Any], database: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tribrick import outbox
    from tribrick.ledger import follow_once
    from tribrick.models import MediaFile

    monkeypatch.setattr(outbox, "SOON", 0.0)
    ledger = tmp_path / "ledger.sqlite"
    first = machine("first").receiver(LEDGER=str(ledger))
    second = machine("second").receiver(LEDGER=str(ledger), certificates=first.files.parent)
    storage = site("distributed", [first, second], **settings_of(first), WRITE_QUORUM="all")
    data = {
        storage.save(f"mend/{word}.txt", ContentFile(word.encode())): word.encode() for word in ("torn", "gone", "dead")
    }
    torn, gone, dead = data
    (first.files / torn).write_bytes(b"to\0\0")
    (second.files / gone).unlink()
    storage.delete(dead)

    def reconcile() -> None:
        with contextlib.suppress(CommandError):
            call_command("tribrick", "reconcile", "--apply", "--json", stdout=io.StringIO(), stderr=io.StringIO())
        outbox.Worker().work()

    follow_once(ledger)
    reconcile()
    waiting = outbox.Outbox.objects.filter(done=None).exclude(operation="intent")
    assert not waiting.exists(), "nothing is left to be done"
    for host in (first, second):
        assert {name: (host.files / name).read_bytes() for name in host.names()} == {torn: b"torn", gone: b"gone"}
    # A PUT that was late: the catalog has buried the file, and so has each receiver.
    for host in (first, second):
        with pytest.raises(UnexpectedStatusCode) as caught:
            host.transport().create(host.host, dead, body_of(b"dead"), soon())
        assert caught.value.status == 410
    assert MediaFile.objects.filter(state="stored").count() == 2


# Who may


def test_no_certificate_no_request(hosts: Callable[[str], Any]) -> None:
    host = hosts("receiver")
    transport = host.transport()
    assert transport.create(host.host, "tls/one.txt", body_of(b"x"), soon()) is False
    signed = {key: value for key, value in host.options.items() if key not in ("certificate", "key")}
    for method, call in {
        "GET": lambda asked: asked.content(host.host, "tls/one.txt", soon()),
        "HEAD": lambda asked: asked.exists(host.host, "tls/one.txt", soon()),
        "PUT": lambda asked: asked.create(host.host, "tls/two.txt", body_of(b"x"), soon()),
        "DELETE": lambda asked: asked.delete(host.host, "tls/one.txt", soon()),
    }.items():
        with pytest.raises(UnexpectedStatusCode) as caught:
            call(DefaultTransport(base_url=host.base_url, **signed))
        assert caught.value.status == 400, f"{method}: nginx's answer to no certificate"
    stranger = {"certificate": f"{host.files.parent}/stranger.pem", "key": f"{host.files.parent}/stranger.key"}
    with pytest.raises(UnexpectedStatusCode) as caught:
        host.transport(**stranger).delete(host.host, "tls/one.txt", soon())
    assert caught.value.status == 400, "a certificate of another CA is none"
    with pytest.raises(HostUnreachable):
        host.transport(ca=f"{host.files.parent}/other-ca.pem").exists(host.host, "tls/one.txt", soon())
    assert transport.exists(host.host, "tls/one.txt", soon()) is True
    assert not (host.files / "tls/two.txt").exists()


def test_ready_through_nginx(hosts: Callable[[str], Any]) -> None:
    host = hosts("receiver")
    unsigned = {key: value for key, value in host.options.items() if not key.startswith("hmac")}
    assert read(DefaultTransport(base_url=host.base_url, **unsigned), host, "-/ready") == b"ready\n"


def test_a_certificate_without_a_signature_is_not_enough(hosts: Callable[[str], Any]) -> None:
    host = hosts("receiver")
    unsigned = {key: value for key, value in host.options.items() if not key.startswith("hmac")}
    with pytest.raises(UnexpectedStatusCode) as caught:
        DefaultTransport(base_url=host.base_url, **unsigned).create(host.host, "a.txt", body_of(b"x"), soon())
    assert caught.value.status == 401
    assert not (host.files / "a.txt").exists()


@pytest.mark.parametrize("kind", KINDS)
def test_only_listed_addresses_write(kind: str, one_machine: Any) -> None:
    start = {"receiver": one_machine.receiver, "nginx": one_machine.nginx_dav, "lighttpd": one_machine.lighttpd_dav}
    host = start[kind](writers="198.51.100.0/24")
    (host.files / "there.txt").write_bytes(b"x")
    transport = host.transport()
    for call in (
        lambda: transport.create(host.host, "new.txt", body_of(b"x"), soon()),
        lambda: transport.delete(host.host, "there.txt", soon()),
    ):
        with pytest.raises(UnexpectedStatusCode) as caught:
            call()
        assert caught.value.status == 403
    assert host.names() == ["there.txt"]
    if kind != "receiver":
        assert read(transport, host, "there.txt") == b"x"


@pytest.mark.parametrize("kind", KINDS)
def test_a_body_that_is_too_large(kind: str, one_machine: Any) -> None:
    if kind == "receiver":
        host = one_machine.receiver(changed={"client_max_body_size 4g": "client_max_body_size 1m"})
    elif kind == "nginx":
        host = one_machine.nginx_dav(changed={"client_max_body_size 4g": "client_max_body_size 1m"})
    else:
        host = one_machine.lighttpd_dav(changed={"max-request-size = 4194304": "max-request-size = 1024"})
    transport = host.transport()
    transport.create(host.host, "fits.bin", body_of(b"x" * 1024 * 1024), soon())
    with pytest.raises(UnexpectedStatusCode) as caught:
        transport.create(host.host, "large.bin", body_of(LARGE), soon())
    assert caught.value.status == 413
    assert host.names() == ["fits.bin"]
