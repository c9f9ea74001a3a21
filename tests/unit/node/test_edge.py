"""The edge as media_edge and media_web configure it: real nginx, real files, real standbys, the purger."""

from __future__ import annotations

import contextlib
import hashlib
import http.client
import json
import os
import random
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pytest
import requests
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from unit.node.test_peers import free_port, issue

from tribrick import ledger
from tribrick.hasher import listen
from tribrick.ledger import Entry
from tribrick.purge import PIECE, Cache, Purger, Times
from tribrick.signature import sign
from tribrick.standby import Rules, Server, Standby, directory
from tribrick.testing import wait_for

ROOT = Path(__file__).resolve().parents[3]
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") or "nginx"
KEYS = {"site": "a secret of the site"}
SMALL = b"\x89PNG\r\n\x1a\n" + random.Random(1).randbytes(20_000)
LARGE = random.Random(2).randbytes(3 * PIECE + 17)
PUBLIC = "public, max-age=2592000, immutable"


class Site(BaseHTTPRequestHandler):
    """The Django site's part: it sends everybody to the protected place, and signs where the cookie says so."""

    def do_GET(self) -> None:
        self.send_response(200)
        name = unquote(self.path).removeprefix("/")
        self.send_header("X-Accel-Redirect", f"/_protected/{quote(name)}")
        if self.headers.get("Cookie") == "signed":
            self.send_header("X-Tribrick-Signed", sign(KEYS["site"], "GET", name, key_id="site"))
        self.send_header("Content-Type", "image/x-of-the-site")
        self.send_header("Content-Length", "0")
        self.end_headers()

    do_HEAD = do_GET

    def address_string(self) -> str:
        return "local"

    def log_message(self, *args: object) -> None:
        """Quiet."""


def render(role: str, template: str, **more: Any) -> str:
    """Render a template as the action does, with the role's defaults and variables."""
    base = ROOT / "roles" / role
    variables: dict[str, Any] = {"ansible_managed": "test", "ansible_facts": {"distribution_major_version": "12"}}
    for file in ("defaults/main.yml", "vars/main.yml"):
        if (base / file).exists():
            variables |= yaml.safe_load((base / file).read_text(encoding="utf-8"))
    text = (base / "templates" / template).read_text(encoding="utf-8")
    templar = Templar(loader=DataLoader(), variables=variables | more)
    return str(templar.template(trust_as_template(text), escape_backslashes=False, overrides={"trim_blocks": True}))


class Hung:
    """A web server that takes connections and never answers."""

    def __init__(self, path: Path) -> None:
        self.socket = socket.socket(socket.AF_UNIX)
        self.socket.bind(str(path))
        path.chmod(0o666)
        self.socket.listen(512)

    def close(self) -> None:
        self.socket.close()


class Node:
    """A node: mount, spool, mirror and ledger, origin, standby and edge."""

    other: Node

    def __init__(self, name: str, work: Path) -> None:
        self.name, self.work, self.tls = name, work, work / "tls"
        self.mount, self.spool, self.mirror = work / "mount", work / "spool", work / "mirror"
        self.tree = work / "tree"
        self.cache, self.run, self.state = work / "cache", work / "run", work / "state"
        self.web, self.peer = free_port(), free_port()
        for folder in (
            self.mount, self.spool, self.mirror, self.tree, self.cache, self.run, self.state, self.tls, work / "nginx",
            work / "temporary", work / "sock", work / "origin",
        ):  # fmt: skip
            folder.mkdir(parents=True)
        self.ledger = work / "ledger.sqlite"
        ledger._create(self.ledger)
        os.utime(self.ledger)  # as a first pass of the follower does
        self.sentinel(True)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        self.standby: Server | None = None

    def sentinel(self, there: bool) -> None:
        """The volume is mounted, or not."""
        path = self.mount / ".tribrick-volume"
        path.write_text("id") if there else path.unlink()

    # Configuration.

    def configure(self, others: list[Node], *, spools: bool) -> None:
        listed = [{"name": node.name, "address": f"127.0.0.1:{node.peer}"} for node in others]
        edge = {
            "media_edge_media_root": str(self.mount),
            "media_edge_cache": str(self.cache),
            "media_edge_cache_reserve_mib": 1,
            "media_edge_origin_timeout": 1,
            "media_edge_standby": str(self.work / "standby.sock"),
            "media_edge_peers": listed,
            "media_edge_spools": [{"name": self.name, "address": f"127.0.0.1:{self.peer}"}, *listed] if spools else [],
            "media_edge_peers_ca": str(self.tls / "ca.crt"),
            "media_edge_peers_certificate": str(self.tls / "node.crt"),
            "media_edge_peers_key": str(self.tls / "node.key"),
            "__media_edge_gate": str(self.run / "open"),
            "__media_edge_sockets": str(self.work / "sock"),
            "__media_edge_origin": str(self.work / "origin"),
        }
        self.edge = {
            "media_web_edge": "tribrick_media",
            "media_web_edge_gate": str(self.run / "open"),
            "media_web_http_port": self.web,
            "media_web_https_port": free_port(),
            "media_web_ipv6": False,
            "media_web_socket": str(self.work / "site.sock"),
            "media_web_static_root": str(self.work / "static"),
            "media_web_alive_path": "/_tribrick_alive",
            "__media_web_tls": str(self.tls / "node"),
        }
        # As the playbook fallback_enable has it.
        self.tree_alone = self.edge | {
            "media_web_edge": "",
            "media_web_media_root": str(self.tree),
            "media_web_sentinel": "",
            "media_web_peers": listed,
            "media_web_peers_ca": str(self.tls / "ca.crt"),
            "media_web_peers_certificate": str(self.tls / "node.crt"),
            "media_web_peers_key": str(self.tls / "node.key"),
        }
        receiver = {
            "media_receiver_node": self.name,
            "media_receiver_address": "127.0.0.1",
            "media_receiver_port": self.peer,
            "media_receiver_readers": ["node1", "node2"],
            "media_receiver_standby": str(self.work / "standby.sock"),
            "media_receiver_standby_gate": str(self.run / "open"),
            "media_receiver_server": "nginx" if spools else "none",
            "media_receiver_root": str(self.spool),
            "__media_receiver_tls": str(self.tls),
        }
        (self.spool / ".tribrick-incoming").mkdir()
        chain = render("media_edge", "site.conf.j2", **edge)
        assert "max_fails=2 fail_timeout=5s" in chain
        self.beside = [chain, render("media_receiver", "site.conf.j2", **receiver)]
        self.write(self.edge)
        (self.work / "origin.conf").write_text(self.user + render("media_edge", "origin.conf.j2", **edge))

    @property
    def user(self) -> str:
        return "user root;" if os.geteuid() == 0 else ""

    def write(self, web: dict[str, Any]) -> None:
        """Write nginx's configuration; beside the site's that of edge and receiver, as on a node."""
        (self.work / "nginx/errors").mkdir(exist_ok=True)
        for file in ("503.html", "503.json"):
            (self.work / "nginx/errors" / file).write_text(render("media_web", f"{file}.j2", **web))
        for file in ("maps.conf", "locations.conf", "media-types.conf", "proxy.conf"):
            text = render("media_web", f"{file}.j2", **web)
            (self.work / "nginx" / file).write_text(text.replace("/etc/nginx/tribrick/", f"{self.work}/nginx/"))
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{kind}_temp_path {self.work}/temporary/{kind};\n" for kind in kinds)
        text = "\n".join([*self.beside, render("media_web", "site.conf.j2", **web)])
        text = text.replace("/etc/nginx/tribrick/", f"{self.work}/nginx/")
        text = text.replace("/var/lib/nginx/body", f"{self.work}/temporary/body")
        (self.work / "nginx.conf").write_text(
            f"{self.user}\ndaemon off;\npid {self.work}/nginx.pid;\nworker_processes 2;\nevents {{}}\n"
            f"http {{\n{temporary}access_log off;\n{text}\n}}\n"
        )

    # Processes.

    def start(self, what: str) -> None:
        log = self.work / f"{what}.log"
        command = [NGINX, "-e", str(log), "-p", str(self.work), "-c", str(self.work / f"{what}.conf")]
        with log.open("ab") as out:
            self.processes[what] = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=out, stderr=out)

        def up() -> bool:
            assert self.processes[what].poll() is None, log.read_text()
            if what == "origin":
                return (self.work / "origin/origin.sock").exists()
            with socket.socket() as line:
                return line.connect_ex(("127.0.0.1", self.web)) == 0

        wait_for(up, f"{what} of {self.name} listens")

    def switch(self, web: dict[str, Any]) -> None:
        """Have nginx reload another configuration, and wait until it has."""
        self.write(web)
        self.processes["nginx"].send_signal(signal.SIGHUP)
        one, cached = name(), bool(web["media_web_edge"])
        self.put(self.mount if cached else self.tree, one, b"x")

        def arrived() -> bool:
            answer = self.get(f"/media/{one}")
            return answer.status_code == 200 and ("X-Cache" in answer.headers) is cached

        # Several times: workers with the old configuration may still take connections.
        wait_for(lambda: all(arrived() for _ in range(20)), f"nginx of {self.name} has the other configuration")

    def stop(self, what: str) -> None:
        process = self.processes.pop(what, None)
        if process is not None:
            process.send_signal(signal.SIGTERM)
            process.wait(20)

    @contextlib.contextmanager
    def without(self, what: str) -> Iterator[None]:
        """A process is not there for a while."""
        self.stop(what)
        try:
            yield
        finally:
            self.start(what)

    def await_origin(self) -> None:
        """Wait until the origin is asked first again: it failed, and was left out."""

        def first() -> bool:
            one = name()
            self.put(self.mount, one, SMALL)
            self.put(self.mirror, one, SMALL)
            self.note("added", one, SMALL)
            return self.get(f"/media/{one}").headers["X-Tribrick-Source"] == "origin"

        wait_for(first, "the origin is asked first", 15)

    @contextlib.contextmanager
    def hung(self) -> Iterator[None]:
        """The origin takes connections and never answers."""
        with self.without("origin"):
            hung = Hung(self.work / "origin/origin.sock")
            try:
                yield
            finally:
                hung.close()
                (self.work / "origin/origin.sock").unlink()

    def serve_standby(self) -> None:
        rules = Rules(deadline=6.0, stall=5.0)
        sources = [directory("spool", self.spool, 5.0), directory("mirror", self.mirror, 5.0)]
        made = Standby(self.ledger, sources, keys=KEYS, rules=rules)
        self.standby = Server(made, listen(str(self.work / "standby.sock"), None), 8)
        threading.Thread(target=self.standby.serve_forever, args=(0.01,), daemon=True).start()

    def stop_standby(self) -> None:
        assert self.standby is not None
        self.standby.shutdown()
        self.standby.server_close()
        (self.work / "standby.sock").unlink(missing_ok=True)
        self.standby = None

    # Files, requests.

    def note(self, kind: str, name: str, data: bytes = b"") -> None:
        """Write a change to the ledger, as the follower does."""
        database = ledger._writable(self.ledger)
        with contextlib.closing(database):
            number, chain = ledger._last(database)
            said = hashlib.sha256(data).hexdigest()
            entry = Entry(number + 1, kind, name, said, len(data), "2026-11-26T00:00:00.000000+00:00", "{}")
            ledger._write(database, entry, entry.chain(chain))
        os.utime(self.ledger)

    def put(self, root: Path, name: str, data: bytes, modified: int = 1_700_000_000) -> Path:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
        os.utime(path, (modified, modified))
        return path

    def get(self, path: str, method: str = "GET", **headers: str) -> requests.Response:
        given = {key.replace("_", "-"): value for key, value in headers.items()}
        return requests.request(
            method, f"http://127.0.0.1:{self.web}{path}", headers=given, timeout=30, allow_redirects=False
        )

    def raw(self, path: str) -> tuple[int, bytes]:
        """Ask for a path as it is written."""
        with contextlib.closing(http.client.HTTPConnection("127.0.0.1", self.web, timeout=30)) as connection:
            connection.putrequest("GET", path, skip_host=True)
            connection.putheader("Host", "media.example")
            connection.endheaders()
            answer = connection.getresponse()
            return answer.status, answer.read()

    def cached(self) -> set[bytes]:
        """The keys in the cache."""
        heads = [path.read_bytes()[:4096] for path in self.cache.rglob("*") if path.is_file()]
        return {head.split(b"\nKEY: ")[1].split(b"\n")[0] for head in heads if b"\nKEY: " in head}

    def purger(self, **times: float) -> Purger:
        """One that was started a second ago: the ledger was followed since."""
        made = Purger(self.ledger, Cache(self.cache), self.state, self.run, [""], Times(**{"held": 0.0, **times}))
        made._began -= 1
        return made


def pair(base: Path, *, spools: bool) -> Iterator[Node]:
    ca = issue(base, "ca", "Tribrick nodes")
    one, two = Node("node1", base / "1"), Node("node2", base / "2")
    sites = []
    for node, other in ((one, two), (two, one)):
        issue(node.tls, "node", node.name, ca)
        shutil.copy(base / "ca.crt", node.tls / "ca.crt")
        node.configure([other], spools=spools)
    one.other = two
    try:
        for node in (one, two):
            site = socketserver.ThreadingUnixStreamServer(str(node.work / "site.sock"), Site)
            threading.Thread(target=site.serve_forever, daemon=True).start()
            sites.append(site)
            node.serve_standby()
            node.start("origin")
            node.start("nginx")
        yield one
    finally:
        for node in (one, two):
            for what in list(node.processes):
                node.stop(what)
            if node.standby is not None:
                node.stop_standby()
        for site in sites:
            site.shutdown()
            site.server_close()


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    yield from pair(tmp_path_factory.mktemp("edge"), spools=False)


@pytest.fixture(scope="module")
def spooling(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Node]:
    yield from pair(tmp_path_factory.mktemp("spooling"), spools=True)


@pytest.fixture
def moving(tmp_path: Path) -> Iterator[Node]:
    yield from pair(tmp_path, spools=False)


@pytest.fixture
def node(shared: Node) -> Node:
    for each in (shared, shared.other):
        (each.run / "open").touch()
    os.utime(shared.ledger)
    os.utime(shared.other.ledger)
    return shared


_NUMBER = iter(range(1000, 9999))


def name(extension: str = "png", top: str = "photos") -> str:
    return f"{top}/a/3/cat-{next(_NUMBER)}.{extension}"


# What visitors get.


def test_a_miss_then_hits_with_the_headers_of_media(node: Node) -> None:
    one = name()
    node.put(node.mount, one, SMALL)
    for wanted in ("MISS", "HIT"):
        answer = node.get(f"/media/{one}")
        assert (answer.status_code, answer.content) == (200, SMALL)
        assert answer.headers["X-Cache"] == wanted
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.headers["Cache-Control"] == PUBLIC
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert answer.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
        assert answer.headers["ETag"] == f'"{len(SMALL):x}"'
        assert answer.headers["Last-Modified"] == "Tue, 14 Nov 2023 22:00:00 GMT"
        assert answer.headers["X-Tribrick-Source"] == "origin"
        assert "Content-Disposition" not in answer.headers
    (node.mount / one).unlink()
    assert node.get(f"/media/{one}").content == SMALL, "the cache does not ask the mount"
    head = node.get(f"/media/{one}", "HEAD")
    assert (head.status_code, head.headers["Content-Length"], head.content) == (200, str(len(SMALL)), b"")


def test_active_content_is_downloaded(node: Node) -> None:
    one = name("svg")
    node.put(node.mount, one, b"<svg/>")
    answer = node.get(f"/media/{one}")
    assert answer.headers["Content-Type"] == "application/octet-stream"
    assert answer.headers["Content-Disposition"] == "attachment"


@pytest.mark.parametrize("data", [SMALL, LARGE, b"", bytes(PIECE), bytes(2 * PIECE)], ids=len)
@pytest.mark.parametrize("warm", [False, True])
def test_ranges_and_conditions(node: Node, data: bytes, warm: bool) -> None:
    size, ranges = len(data), [(0, 0), (2, 5), (PIECE - 1, PIECE), (PIECE, 3 * PIECE), (0, 10**9)]
    one = name()
    node.put(node.mount, one, data)
    if warm:
        assert node.get(f"/media/{one}").content == data
    for first, last in ranges:
        answer = node.get(f"/media/{one}", Range=f"bytes={first}-{last}")
        if first < size:
            said = (206, data[first : last + 1], f"bytes {first}-{min(last, size - 1)}/{size}")
            assert (answer.status_code, answer.content, answer.headers.get("Content-Range")) == said
        else:
            assert answer.status_code in ((200, 416) if not size else (416,)), (first, last)
    if size > 5:
        assert node.get(f"/media/{one}", Range="bytes=-5").content == data[-5:]
        assert node.get(f"/media/{one}", Range=f"bytes={size - 3}-").content == data[-3:]
    whole = node.get(f"/media/{one}")
    etag, date = whole.headers["ETag"], whole.headers["Last-Modified"]
    assert whole.content == data
    assert node.get(f"/media/{one}", If_None_Match=etag).status_code == 304
    assert node.get(f"/media/{one}", If_Modified_Since=date).status_code == 304
    assert node.get(f"/media/{one}", If_None_Match='"x"').content == data
    assert node.get(f"/media/{one}", Range="bytes=0-4", If_Range='"x"').content == data
    part = node.get(f"/media/{one}", Range="bytes=0-4", If_Range=etag)
    assert part.content == data[:5]
    assert int(node.get(f"/media/{one}", "HEAD").headers["Content-Length"]) == size


def test_several_ranges_give_the_whole_file(node: Node) -> None:
    one, two = name(), name(top="derived")
    for each in (one, two):
        node.put(node.mount, each, SMALL)
        answer = node.get(f"/media/{each}", Range="bytes=0-1,5-6")
        assert (answer.status_code, answer.content) == (200, SMALL)


def test_not_found_is_never_cached(node: Node) -> None:
    one = name()
    for _ in range(2):
        assert node.get(f"/media/{one}").status_code == 404
    node.put(node.mount, one, SMALL)
    assert node.get(f"/media/{one}").content == SMALL
    assert f"/media/{one}bytes=0-{PIECE - 1}".encode() in node.cached()


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"])
def test_only_get_and_head(node: Node, method: str) -> None:
    for path in (f"/media/{name()}", f"/media/{name(top='derived')}"):
        answer = node.get(path, method)
        assert (answer.status_code, answer.headers["Allow"]) == (405, "GET, HEAD")


@pytest.mark.parametrize("path", [
    "/media/.tribrick-volume", "/media/.glusterfs/", "/media/.glusterfs/x", "/media/photos/", "/media/photos",
    "/media/photos/0/.part", "/media/photos/x.part", "/media/photos/x~", "/media/photos/x.tmp",
    "/media/../../etc/passwd", "/media/%2e%2e/%2e%2e/etc/passwd", "/media/photos/..%2f..%2f..%2fetc/passwd",
    "/media/photos/link.png", "/media/photos/linked/one.png", "/_protected/.tribrick-volume",
    "/_protected/photos/h.png", "/media/photos/" + "x" * 300 + ".png", "/media/" + "x/" * 600 + "y.png",
    "/media/photos/h.png/x", "/media/photos/%00x",
    "/media/photos/%0ax", "/media//private/h.png", "/media/photos/../private/h.png", "/media/private%2fh.png",
    "/media/private", "/media/private/", "/media/derived/", "/media/derived/.x", "/media/photos/%C0%AFx",
    "/media/photos/x%5C..%5Cy.png",
])  # fmt: skip
def test_hostile_and_private_names(node: Node, path: str) -> None:
    for hidden in ("photos/h.png", "photos/0/.part", "photos/x.part", "photos/x~", "photos/x.tmp", "private/h.png"):
        node.put(node.mount, hidden, b"root: hidden")
    node.put(node.mount, "derived/.x", b"root: hidden")
    node.put(node.work, "outside/one.png", b"root: hidden")
    for link, target in (("photos/link.png", "outside/one.png"), ("photos/linked", "outside")):
        if not (node.mount / link).is_symlink():
            (node.mount / link).symlink_to(node.work / target)
    status, body = node.raw(path)
    assert status in (400, 404), f"{path}: {status} {body[:100]!r}"
    assert b"root:" not in body


def test_names_that_need_escapes(node: Node) -> None:
    for one in ("photos/a b%20é?#&.png", "photos/+ ;=@.png", "photos/ünï\u200ccode.png"):
        node.put(node.mount, one, SMALL)
        for wanted in ("MISS", "HIT"):
            answer = node.get(f"/media/{quote(one)}")
            assert (answer.content, answer.headers["X-Cache"]) == (SMALL, wanted)
        node.note("added", one, SMALL)
        node.note("deleted", one)
    (node.state / "purged.json").unlink(missing_ok=True)
    before = len(node.cached())
    node.purger().look()
    assert len(node.cached()) == before - 3


def test_files_that_may_change_are_not_cached(node: Node) -> None:
    one = name(top="derived")
    for data in (b"one", b"two!"):
        node.put(node.mount, one, data)
        answer = node.get(f"/media/{one}")
        assert (answer.content, answer.headers["Cache-Control"]) == (data, "no-cache")
        assert node.get(f"/media/{one}", If_None_Match=answer.headers["ETag"]).status_code == 304
        assert node.get(f"/media/{one}", Range="bytes=1-2").content == data[1:3]
    assert not [key for key in node.cached() if b"/derived/" in key]


def test_private_files_by_the_site_alone_and_uncached(node: Node) -> None:
    one = name(top="private")
    node.put(node.mount, one, LARGE)
    assert node.get(f"/media/{one}").status_code == 404
    assert node.get(f"/_protected/{one}").status_code == 404
    answer = node.get(f"/{one}")
    assert (answer.status_code, answer.content) == (200, LARGE)
    assert answer.headers["Content-Type"] == "image/x-of-the-site"
    assert "private" in answer.headers["Cache-Control"] and "public" not in answer.headers["Cache-Control"]
    assert "X-Tribrick-Signed" not in answer.headers
    assert node.get(f"/{one}", Range="bytes=5-9").content == LARGE[5:10]
    assert node.get(f"/{one}", If_None_Match=answer.headers["ETag"]).status_code == 304
    assert node.get(f"/{name(top='private')}").status_code == 404
    assert not [key for key in node.cached() if b"private" in key]


# When the mount fails.


def test_without_the_volume_a_miss_is_no_404(node: Node) -> None:
    one, hit = name(), name()
    node.put(node.mount, hit, SMALL)
    assert node.get(f"/media/{hit}").status_code == 200
    node.sentinel(False)
    try:
        os.utime(node.ledger, (time.time() - 60, time.time() - 60))
        answer = node.get(f"/media/{one}")
        assert (answer.status_code, answer.headers["Retry-After"]) == (503, "5")
        assert node.get(f"/media/{hit}").content == SMALL
    finally:
        node.sentinel(True)


def test_a_hung_origin_stops_nobody(node: Node) -> None:
    hit, here, there, private = name(), name(), name(), name(top="private")
    node.put(node.mount, hit, SMALL)
    assert node.get(f"/media/{hit}").content == SMALL
    for data, one in ((SMALL, here), (LARGE, there), (SMALL, private)):
        node.note("added", one, data)
        node.other.note("added", one, data)
    node.put(node.mirror, here, SMALL)
    node.put(node.mirror, private, SMALL)
    node.put(node.other.mirror, there, LARGE)
    gone = name()
    node.note("added", gone, SMALL)
    node.note("deleted", gone)
    with node.hung():
        began = time.monotonic()
        assert node.get(f"/media/{hit}").headers["X-Cache"] == "HIT"
        assert time.monotonic() - began < 0.5
        answer = node.get(f"/media/{here}")
        assert (answer.content, answer.headers["X-Tribrick-Source"]) == (SMALL, "standby")
        assert time.monotonic() - began < 4
        assert answer.headers["Content-Type"] == "image/png" and answer.headers["Cache-Control"] == PUBLIC
        assert node.get(f"/media/{here}").headers["X-Cache"] == "HIT"
        answer = node.get(f"/media/{there}")
        assert (answer.content, answer.headers["X-Tribrick-Source"]) == (LARGE, "peer")
        assert node.get(f"/media/{gone}").status_code == 404, "the ledger's word on a delete is the last"
        for _ in range(4):
            assert node.get(f"/media/{name()}").status_code == 503, "only the mount could say that it is not there"
        lost = name()
        node.note("added", lost, SMALL)
        answer = node.get(f"/media/{lost}")
        assert answer.status_code == 503 and answer.headers["Retry-After"]
        assert node.get(f"/{private}").status_code == 503, "not signed"
        own = sign(KEYS["site"], "GET", private, key_id="site")
        assert node.get(f"/{private}", Authorization=own, X_Tribrick_Signed=own).status_code == 503
        answer = node.get(f"/{private}", Cookie="signed")
        assert (answer.content, answer.headers["Content-Type"]) == (SMALL, "image/x-of-the-site")
        assert "private" in answer.headers["Cache-Control"]
    node.await_origin()


def test_visitors_do_not_all_wait_for_an_origin_that_failed(node: Node) -> None:
    names = [name() for _ in range(12)]
    for one in names:
        node.note("added", one, SMALL)
        node.put(node.mirror, one, SMALL)
    with node.hung():
        for one in names[:6]:
            assert node.get(f"/media/{one}").status_code == 200
        began = time.monotonic()
        for one in names[6:]:
            assert node.get(f"/media/{one}").status_code == 200
        assert time.monotonic() - began < 3.5, "six, of which at most two were a new trial"
    node.await_origin()


def test_what_was_uploaded_just_now_is_served_while_the_origin_is_left_out(node: Node) -> None:
    known = [name() for _ in range(6)]
    for one in known:
        node.note("added", one, SMALL)
        node.put(node.mirror, one, SMALL)
    with node.without("origin"):
        assert {node.get(f"/media/{one}").headers["X-Tribrick-Source"] for one in known[:4]} == {"standby"}
    assert node.get(f"/media/{known[4]}").headers["X-Tribrick-Source"] == "standby", "the origin is left out"
    fresh = name()
    node.put(node.mount, fresh, SMALL)
    node.put(node.mirror, fresh, SMALL)  # as on the brick of this node
    answer = node.get(f"/media/{fresh}")
    assert (answer.status_code, answer.content) == (200, SMALL)
    assert answer.headers["X-Tribrick-Source"] == "origin"
    node.await_origin()


def test_pieces_of_one_file_may_come_from_two_sources(node: Node) -> None:
    one = name()
    node.put(node.mount, one, LARGE)
    node.note("added", one, LARGE)
    node.put(node.mirror, one, LARGE, modified=1_700_000_001)
    assert node.get(f"/media/{one}", Range="bytes=0-9").content == LARGE[:10]
    # The whole piece comes into the cache, though the visitor has what was asked for.
    wait_for(lambda: f"/media/{one}bytes=0-{PIECE - 1}".encode() in node.cached(), "the first piece is in the cache")
    with node.without("origin"):
        answer = node.get(f"/media/{one}")
    assert (answer.headers["X-Cache"], answer.headers["X-Tribrick-Source"]) == ("HIT", "origin")
    assert answer.content == LARGE
    node.await_origin()


@pytest.mark.parametrize("elsewhere", [True, False])
def test_nothing_but_its_pieces_comes_in_the_middle_of_a_file(node: Node, elsewhere: bool) -> None:
    """Its beginning is in the cache, and for the rest the mount says 404, or nobody answers."""
    one = name()
    node.put(node.mount, one, LARGE)
    node.note("added", one, LARGE)
    assert node.get(f"/media/{one}", Range="bytes=0-9").content == LARGE[:10]
    wait_for(lambda: f"/media/{one}bytes=0-{PIECE - 1}".encode() in node.cached(), "the first piece is in the cache")
    (node.mount / one).unlink()
    if elsewhere:
        node.put(node.mirror, one, LARGE)
        with pytest.raises(requests.exceptions.ChunkedEncodingError):
            node.get(f"/media/{one}")
    else:
        with node.without("origin"), pytest.raises(requests.exceptions.ChunkedEncodingError):
            node.get(f"/media/{one}")
        node.await_origin()
    assert node.get(f"/media/{name()}").status_code == 404, "nobody else notices"
    node.put(node.mount, one, LARGE)
    assert node.get(f"/media/{one}").content == LARGE


def test_what_the_mount_lost_is_no_404_while_the_ledger_knows_it(node: Node) -> None:
    one = name()
    node.note("added", one, SMALL)
    assert node.get(f"/media/{one}").status_code == 503
    node.put(node.mirror, one, SMALL)
    assert node.get(f"/media/{one}").content == SMALL
    os.utime(node.ledger, (time.time() - 60, time.time() - 60))
    assert node.get(f"/media/{name()}").status_code == 404, "a healthy mount and an old ledger"
    assert node.get(f"/media/{name()}", X_Tribrick_Missing="1").status_code == 404
    node.stop_standby()
    try:
        assert node.get(f"/media/{name()}").status_code == 503
    finally:
        node.serve_standby()


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_a_peers_standby_answers_members_only_and_from_its_own_disks(node: Node) -> None:
    one = name()
    node.put(node.other.mount, one, SMALL)
    node.other.note("added", one, SMALL)
    certificate = (str(node.tls / "node.crt"), str(node.tls / "node.key"))

    def asked(method: str = "GET", cert: tuple[str, str] | None = certificate) -> requests.Response:
        # The name in the certificate is nginx's concern; here the address is enough.
        address = f"https://127.0.0.1:{node.other.peer}/standby/{one}"
        return requests.request(method, address, cert=cert, verify=False, timeout=30)  # noqa: S501

    assert asked().status_code == 503
    node.put(node.other.mirror, one, SMALL)
    assert asked().content == SMALL
    assert asked("POST").status_code == 403
    assert asked(cert=None).status_code == 400


def test_spooled_files_are_read_and_missing_ones_asked_for_everywhere(spooling: Node) -> None:
    node, other = spooling, spooling.other
    for each in (node, other):
        (each.run / "open").touch()
    here, there, private = name(), name(), name(top="private")
    node.put(node.spool, here, SMALL)
    node.put(other.spool, there, SMALL)
    node.put(other.spool, private, SMALL)
    assert node.get(f"/media/{name()}").status_code == 404
    for one in (here, there):
        answer = node.get(f"/media/{one}")
        assert (answer.status_code, answer.content) == (200, SMALL)
        assert (answer.headers["Content-Type"], answer.headers["Cache-Control"]) == ("image/png", PUBLIC)
    assert not [key for key in node.cached() if there.encode() in key], "it will lie on the volume soon"
    answer = node.get(f"/{private}")
    assert (answer.status_code, answer.content) == (200, SMALL)
    with other.without("nginx"):
        missing = node.get(f"/media/{name()}")
        assert missing.status_code == 503 and missing.headers["Retry-After"]
        assert node.get(f"/media/{here}").content == SMALL
    wait_for(lambda: node.get(f"/media/{name()}").status_code == 404, "the other node is asked again")
    # The ledger's word is the last, whatever is left in a spool: that node may not have heard of the delete yet.
    for one in (there, private):
        node.note("added", one, SMALL)
        node.note("deleted", one)
    assert node.get(f"/media/{there}").status_code == 404
    assert node.get(f"/{private}", Cookie="signed").status_code == 404
    with other.without("nginx"):
        assert node.get(f"/media/{there}").status_code == 404


def test_a_closed_gate_keeps_the_spools_from_serving(spooling: Node) -> None:
    """The node has just started: what lies in its spool may have been drained and deleted meanwhile."""
    node, other = spooling, spooling.other
    here, there = name(), name()
    node.put(node.spool, here, SMALL)
    node.put(other.spool, there, SMALL)
    (node.run / "open").unlink(missing_ok=True)
    (other.run / "open").touch()
    for one in (here, there):
        answer = node.get(f"/media/{one}")
        assert (answer.status_code, bool(answer.headers.get("Retry-After"))) == (503, True)
    (node.run / "open").touch()
    assert node.get(f"/media/{here}").content == node.get(f"/media/{there}").content == SMALL


def test_what_has_left_one_spool_is_looked_for_in_the_others(spooling: Node) -> None:
    """A receiver has a tombstone of what was drained, and answers 410, although the file is alive."""
    node, other = spooling, spooling.other
    for each in (node, other):
        (each.run / "open").touch()
    there, nowhere, unknown = (name(top="photos/drained") for _ in range(3))
    for one in (there, nowhere):
        node.note("added", one, SMALL)
    node.put(other.spool, there, SMALL)
    with node.without("nginx"):
        text = (node.work / "nginx.conf").read_text()
        gone = "location /files/ {\n        if ($uri ~ /drained/) { return 410; }"
        (node.work / "nginx.conf").write_text(text.replace("location /files/ {", gone))
    try:
        for _ in range(4):  # one after the other is asked first
            assert node.get(f"/media/{there}").content == SMALL
            assert node.get(f"/media/{nowhere}").status_code == 503, "the ledger knows it alive"
            assert node.get(f"/media/{unknown}").status_code == 404
    finally:
        with node.without("nginx"):
            node.write(node.edge)


# Purging.


def all_of(one: str) -> set[bytes]:
    return {f"/media/{one}bytes={at}-{at + PIECE - 1}".encode() for at in range(0, len(LARGE), PIECE)}


def test_a_deleted_file_leaves_the_cache_with_all_its_pieces(node: Node) -> None:
    one, kept = name(), name()
    for each in (one, kept):
        node.put(node.mount, each, LARGE)
        node.note("added", each, LARGE)
        assert node.get(f"/media/{each}").content == LARGE
    assert all_of(one) | all_of(kept) <= node.cached()
    purger = node.purger(fill=0.2)
    purger.look()
    (node.mount / one).unlink()
    node.note("deleted", one)
    assert node.get(f"/media/{one}").content == LARGE, "not purged yet"
    purger.look()
    assert not all_of(one) & node.cached() and all_of(kept) <= node.cached()
    for more in ({}, {"Range": f"bytes={PIECE}-{PIECE + 5}"}):
        # nginx may have a piece open for a second.
        wait_for(lambda more=more: node.get(f"/media/{one}", **more).status_code == 404, "the piece to be gone", 3)
    assert node.get(f"/media/{kept}").headers["X-Cache"] == "HIT"


class Slow(BaseHTTPRequestHandler):
    """An origin that has opened a file and sends it slowly: half, then what it is told to wait for."""

    go: threading.Event
    begun: threading.Event
    early: bool

    def do_GET(self) -> None:
        if self.early:
            type(self).begun.set()
            self.go.wait(20)
        self.send_response(206)
        self.send_header("Content-Length", str(len(SMALL)))
        self.send_header("Content-Range", f"bytes 0-{len(SMALL) - 1}/{len(SMALL)}")
        self.send_header("ETag", f'"1-{len(SMALL):x}"')
        self.end_headers()
        self.wfile.write(SMALL[:10_000])
        self.wfile.flush()
        type(self).begun.set()
        self.go.wait(20)
        self.wfile.write(SMALL[10_000:])

    def address_string(self) -> str:
        return "local"

    def log_message(self, *args: object) -> None:
        """Quiet."""


@pytest.mark.parametrize("early", [False, True], ids=["within the file", "before its first byte"])
def test_a_purge_during_a_fill(node: Node, early: bool) -> None:
    """What was being filled when it was purged is not there afterwards."""
    one = name()
    node.note("added", one, SMALL)
    purger = node.purger(fill=0.8)
    purger.look()
    Slow.go, Slow.begun, Slow.early = threading.Event(), threading.Event(), early
    with node.without("origin"):
        slow = socketserver.ThreadingUnixStreamServer(str(node.work / "origin/origin.sock"), Slow)
        threading.Thread(target=slow.serve_forever, args=(0.01,), daemon=True).start()
        got: list[bytes] = []
        asking = threading.Thread(target=lambda: got.append(node.get(f"/media/{one}").content))
        try:
            asking.start()
            assert Slow.begun.wait(10)
            if not early:
                wait_for(lambda: list(node.cache.rglob("*.0*")), "the fill has a file")
            node.note("deleted", one)
            purger.look()
            Slow.go.set()
            asking.join(20)
        finally:
            Slow.go.set()
            slow.shutdown()
            slow.server_close()
            (node.work / "origin/origin.sock").unlink()
    assert got == [SMALL]
    key = f"/media/{one}bytes=0-{PIECE - 1}".encode()
    if early:
        assert key in node.cached(), "it came after the purge"
    else:
        assert key not in node.cached(), "its file was taken away while it was filled"

    def purged_again() -> bool:
        purger.look()
        return purger._done is not None and purger._done == purger._seen

    wait_for(purged_again, "the last purge", 10)
    assert key not in node.cached()
    wait_for(lambda: node.get(f"/media/{one}").status_code == 404, "the origin is asked again", 15)


def test_a_closed_gate_keeps_the_cache_from_serving(node: Node) -> None:
    one = name()
    node.put(node.mount, one, LARGE)
    node.note("added", one, LARGE)
    assert node.get(f"/media/{one}").content == LARGE
    (node.run / "open").unlink()
    answer = node.get(f"/media/{one}")
    assert (answer.content, answer.headers["X-Cache"]) == (LARGE, "BYPASS")
    (node.mount / one).unlink()
    node.note("deleted", one)
    assert node.get(f"/media/{one}").status_code == 503, "it was deleted while this node was away"
    node.purger().look()
    assert (node.run / "open").exists()
    assert node.get(f"/media/{one}").status_code == 404


def test_a_closed_gate_keeps_the_standbys_from_serving(node: Node) -> None:
    """After a boot the ledger may not know of a delete yet, and the brick may still have the file."""
    one = name()
    for each in (node, node.other):
        each.note("added", one, SMALL)
        each.put(each.mirror, one, SMALL)
        (each.run / "open").unlink()
    assert node.get(f"/media/{one}").status_code == 503, "the mount has not got it"
    with node.without("origin"):
        assert node.get(f"/media/{one}").status_code == 503
        (node.other.run / "open").touch()
        assert node.get(f"/media/{one}").headers["X-Tribrick-Source"] == "peer"
    (node.run / "open").touch()
    node.await_origin()


def test_nginx_finds_no_fault_with_the_configuration(node: Node) -> None:
    for what in ("nginx", "origin"):
        done = subprocess.run(
            [NGINX, "-t", "-e", "stderr", "-p", str(node.work), "-c", str(node.work / f"{what}.conf")],
            capture_output=True, text=True, timeout=60, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        assert "warn" not in done.stderr.replace("http2", ""), done.stderr


# What else asks, and other modes.


def test_nginx_says_that_it_lives_without_site_mount_and_cache(node: Node) -> None:
    (node.run / "open").unlink()
    with node.hung():
        site = node.work / "site.sock"
        site.rename(site.with_suffix(".away"))
        try:
            answer = node.get("/_tribrick_alive")
        finally:
            site.with_suffix(".away").rename(site)
    assert (answer.status_code, answer.content) == (204, b"")
    assert "X-Cache" not in answer.headers


def empty(cache: Path, work: Path, *, check: bool = False) -> dict[str, Any]:
    """Carry out the role's tasks that empty a cache; return what Ansible has registered."""
    tasks = yaml.safe_load((ROOT / "roles/media_edge/tasks/empty.yml").read_text(encoding="utf-8"))
    copy = {"dest": str(work / "said.json"), "content": "{{ __media_edge_emptied | to_json }}", "mode": "0600"}
    play = {
        "hosts": "localhost",
        "connection": "local",
        "gather_facts": False,
        "vars": {"media_edge_cache": str(cache)},
        "tasks": [*tasks, {"name": "Tell", "ansible.builtin.copy": copy, "check_mode": False}],
    }
    (work / "empty.yml").write_text(yaml.safe_dump([play]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", "--inventory=localhost,", *(["--check"] if check else []),
         f"--extra-vars=ansible_python_interpreter={sys.executable}", str(work / "empty.yml")],
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    said: dict[str, Any] = json.loads((work / "said.json").read_text(encoding="utf-8"))
    return said


def test_emptying_a_cache_predicts_and_is_repeatable(tmp_path: Path) -> None:
    cache = tmp_path / "cache"
    assert empty(cache, tmp_path)["changed"] is False, "a node without an edge has none"
    (cache / "a/bc").mkdir(parents=True)
    files = [cache / "a/bc/one", cache / "a/bc/two.0000000001"]
    for file in files:
        file.write_text("x")
    assert empty(cache, tmp_path, check=True)["changed"] is True
    assert all(file.exists() for file in files), "nothing was changed"
    assert empty(cache, tmp_path)["changed"] is True
    assert not any(file.exists() for file in files) and (cache / "a/bc").is_dir(), "nginx keeps its directories"
    assert empty(cache, tmp_path)["changed"] is False
    assert empty(cache, tmp_path, check=True)["changed"] is False


def test_another_directory_for_the_cache_has_nginx_started_anew(moving: Node) -> None:
    """nginx tests it well and goes on with the old one, which the purger has left: deleted files would come back."""
    node = moving
    (node.run / "open").touch()
    file = node.work / "nginx.conf"
    file.write_text(file.read_text(encoding="utf-8").replace(str(node.cache), f"{node.work}/other"), encoding="utf-8")
    node.processes["nginx"].send_signal(signal.SIGHUP)
    log = node.work / "nginx.log"
    wait_for(lambda: "cache path while previously" in log.read_text(encoding="utf-8"), "nginx refuses it")
    one, two = name(), name()
    for each in (one, two):
        node.put(node.mount, each, SMALL)
    assert node.get(f"/media/{one}").status_code == 200 and node.cached(), "it fills the old one"

    drop_ins = {
        render("media_edge", "nginx.service.conf.j2", media_edge_cache=str(where)) for where in (node.cache, "/x")
    }
    assert len(drop_ins) == 2, "its drop-in tells of the directory"
    [run] = [
        task["tribrick.media.units"]["units"]
        for task in yaml.safe_load((ROOT / "roles/media_edge/tasks/main.yml").read_text(encoding="utf-8"))
        if task["name"] == "Run the origin and nginx with it"
    ]
    restarts = [unit["files"] for unit in run if (unit["name"], unit["on_change"]) == ("nginx.service", "restart")]
    assert restarts == [["/etc/systemd/system/nginx.service.d/tribrick-edge.conf"]]
    node.stop("nginx")
    node.start("nginx")
    assert node.get(f"/media/{two}").status_code == 200
    assert any((node.work / "other").rglob("?*")), "a new one fills the new one"


def test_to_the_gluster_free_mode_and_back(moving: Node) -> None:
    node = moving
    (node.run / "open").touch()
    mended, deleted, private = name(), name(), name(top="private")
    node.put(node.mount, mended, b"wrong bytes")
    node.put(node.mount, deleted, LARGE)
    node.note("added", deleted, LARGE)
    purger = node.purger(fill=0.1)
    purger.look()
    assert node.get(f"/media/{mended}").content == b"wrong bytes"
    assert node.get(f"/media/{deleted}").content == LARGE
    for one, data in ((mended, SMALL), (private, SMALL)):
        node.put(node.tree, one, data)

    with node.hung():
        node.switch(node.tree_alone)
        start = time.monotonic()
        answer = node.get(f"/media/{mended}")
        assert (answer.status_code, answer.content) == (200, SMALL)
        assert {"X-Cache", "X-Tribrick-Source"} & set(answer.headers) == set()
        assert node.get(f"/{private}").content == SMALL
        assert node.get(f"/media/{name()}").status_code == 404, "the other node has not got it either"
        assert node.get("/_tribrick_alive").status_code == 204
        assert time.monotonic() - start < 0.9, "the mount is not asked"
        node.note("deleted", deleted, LARGE)

    node.put(node.mount, mended, SMALL)
    (node.mount / deleted).unlink()
    purger.look()
    assert not [key for key in node.cached() if deleted.encode() in key], "the purger goes on meanwhile"
    assert empty(node.cache, node.work)["changed"] is True and node.cached() == set()
    node.switch(node.edge)
    answer = node.get(f"/media/{mended}")
    assert (answer.content, answer.headers["X-Cache"], answer.headers["X-Tribrick-Source"]) == (SMALL, "MISS", "origin")
    assert node.get(f"/media/{mended}").headers["X-Cache"] == "HIT"
    assert node.get(f"/media/{deleted}").status_code == 404
