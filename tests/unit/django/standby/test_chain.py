"""templates/standby/nginx-standby.conf: the origin fails, and the standby serves."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import socket
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path
from socketserver import ThreadingMixIn
from typing import Any
from urllib.parse import quote, unquote
from wsgiref.simple_server import WSGIRequestHandler, WSGIServer, make_server

import pytest

from tribrick import standby as module
from tribrick.hasher import listen
from tribrick.signature import sign
from tribrick.standby import PIECE, Server, Standby
from tribrick.testing import wait_for

from .conftest import LARGE, NAME, SMALL, Answered, Node, ask

ROOT = Path(__file__).resolve().parents[4]
KEYS = {"web": "a secret of the site"}
PRIVATE = "private/a/3/Été-abcdefghijklmnopqrst.jpg"


class _Threads(ThreadingMixIn, WSGIServer):
    daemon_threads = True


class _Quiet(WSGIRequestHandler):
    def log_message(self, *arguments: object) -> None:
        pass


def site(environ: Any, start_response: Any) -> list[bytes]:
    """What the site does for a private file: it lets everybody in who says so."""
    name = f"private/{unquote(environ['PATH_INFO'].encode('latin-1').decode().removeprefix('/site/'))}"
    headers = [("X-Accel-Redirect", f"/_protected/{quote(name)}")]
    if environ.get("HTTP_COOKIE") == "ada":
        headers.append(("X-Tribrick-Signed", sign(KEYS["web"], "GET", name, key_id="web")))
    start_response("200 OK", headers)
    return [b""]


class Front:
    """nginx in front of a mount that has failed."""

    def __init__(self, port: int, node: Node, standby: Standby) -> None:
        self.port, self.node, self.standby = port, node, standby

    def get(self, path: str, method: str = "GET", **headers: str) -> Answered:
        """Ask nginx; a body that breaks off is an error."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=20)
        with contextlib.closing(connection):
            connection.request(
                method, quote(path), headers={key.replace("_", "-"): value for key, value in headers.items()}
            )
            answer = connection.getresponse()
            given = {key.lower(): value for key, value in answer.getheaders()}
            try:
                return Answered(answer.status, given, answer.read(), None)
            except http.client.IncompleteRead as error:
                return Answered(answer.status, given, error.partial, error)


@pytest.fixture
def front(node: Node, tmp_path: Path, request: pytest.FixtureRequest) -> Iterator[Front]:
    """nginx with the documented configuration, the standby, and a site; by parameter with a cache."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.fail("nginx is not there: apt-get install nginx-light", pytrace=False)
    text = (ROOT / "templates/standby/nginx-standby.conf").read_text()
    work = tmp_path / "nginx"
    work.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    pages = make_server("127.0.0.1", 0, site, _Threads, _Quiet)
    standby = Server(node.standby(keys=KEYS), listen(str(tmp_path / "standby.sock"), None), 8)
    text = text.replace("unix:/run/tribrick/standby.sock", f"unix:{tmp_path}/standby.sock")
    # What nginx makes of a mount without its FUSE process (not connected); nothing here can play one.
    text, locations = re.subn(r"(error_page 500 502 504 = @\w+;)", r"\1 return 500;", text)
    assert locations == 2 and str(tmp_path) in text
    assert text.count("server {") == 1
    cache = ""
    if hasattr(request, "param"):
        cache = f"proxy_cache_path {work}/cache keys_zone=edge:1m;\nproxy_cache edge;\nproxy_cache_valid 200 1h;\n"
    more = f"listen 127.0.0.1:{port};\nlocation /site/ {{ proxy_pass http://127.0.0.1:{pages.server_port}; }}\n"
    kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    (work / "nginx.conf").write_text(
        f"{'user root;' if os.geteuid() == 0 else ''}\ndaemon off;\npid {work}/pid;\nevents {{}}\nhttp {{\n{cache}"
        + "".join(f"{kind}_temp_path {work}/{kind};\n" for kind in kinds)
        + text.replace("server {", f"server {{\naccess_log off;\n{more}")
        + "}\n"
    )
    for server in (pages, standby):
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    process = subprocess.Popen(
        [program, "-e", f"{work}/error.log", "-p", str(work), "-c", f"{work}/nginx.conf"], stderr=subprocess.DEVNULL
    )

    def up() -> bool:
        assert process.poll() is None, (work / "error.log").read_text()
        with socket.socket() as line:
            return line.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(up, "nginx listens")
        yield Front(port, node, standby.get_app())
    finally:
        process.terminate()
        process.wait(15)
        for server in (pages, standby):
            server.shutdown()
            server.server_close()


def test_a_file_of_a_failed_mount_comes_from_the_brick(front: Front) -> None:
    for name, data in ((NAME, LARGE), ("photos/Été %.jpg", SMALL)):
        assert front.get(f"/media/{name}").status == 404
        front.node.note("added", name, data)
        assert front.get(f"/media/{name}").status == 503
        front.node.put(front.node.brick, name, data)
        answer = front.get(f"/media/{name}")
        assert (answer.status, answer.body) == (200, data)
        again = front.get(f"/media/{name}", If_None_Match=answer.headers["etag"])
        assert (again.status, again.body) == (304, b"")
        part = front.get(f"/media/{name}", Range="bytes=5-9")
        assert (part.status, part.body) == (206, data[5:10])
        assert front.get(f"/media/{name}", "HEAD").headers["content-length"] == str(len(data))
    front.node.note("deleted", NAME)
    assert front.get(f"/media/{NAME}").status == 404


def test_private_files_need_the_sites_word(front: Front) -> None:
    front.node.note("added", PRIVATE, SMALL)
    front.node.put(front.node.brick, PRIVATE, SMALL)
    own = sign(KEYS["web"], "GET", PRIVATE, key_id="web")
    short = PRIVATE.removeprefix("private/")
    for path, headers in (
        (f"/media/{PRIVATE}", {}),
        (f"/media/{PRIVATE}", {"Authorization": own, "X_Tribrick_Signed": own}),  # stolen: not from a visitor
        (f"/_protected/{PRIVATE}", {"Authorization": own}),
        (f"/site/{short}", {"Authorization": own, "X_Tribrick_Signed": own}),
        ("/site/a/3/other.jpg", {"Cookie": "bob"}),
    ):
        answer = front.get(path, **headers)
        assert answer.status in (401, 404), path
        assert SMALL not in answer.body
    answer = front.get(f"/site/{short}", Cookie="ada")
    assert (answer.status, answer.body) == (200, SMALL)
    assert answer.headers["cache-control"] == "private"
    assert not {"x-tribrick-signed", "x-accel-redirect"} & set(answer.headers)
    assert front.get(f"/site/{short}", "HEAD", Cookie="ada").status == 200


@pytest.mark.parametrize("front", ["cache"], indirect=True)
def test_an_answer_that_broke_off_is_not_kept_in_a_cache(front: Front, monkeypatch: pytest.MonkeyPatch) -> None:
    front.node.note("added", NAME, LARGE)
    path = front.node.put(front.node.brick, NAME, LARGE)
    assert ask(front.standby, NAME).status == 200, "verified"
    read = module._pread
    with monkeypatch.context() as patch:
        patch.setattr(module, "_pread", lambda *given: read(*given) if given[1] < 2 * PIECE else bytes(given[2]))
        answer = front.get(f"/media/{NAME}")
        assert answer.broken is not None
        assert LARGE.startswith(answer.body) and len(answer.body) < len(LARGE)
    assert front.get(f"/media/{NAME}").body == LARGE
    path.unlink()
    assert front.get(f"/media/{NAME}").body == LARGE, "whole answers are kept"
