"""Readiness over a real socket, the record of a start, and sets of nginx files."""

from __future__ import annotations

import http.server
import socketserver
import threading
import time

import pytest
from ansible_collections.tribrick.media.plugins.module_utils import django_site as site
from ansible_collections.tribrick.media.plugins.modules import nginx_config as nginx


class Handler(http.server.BaseHTTPRequestHandler):
    answers: list[int]
    seen: list[tuple[str, str]]

    def do_GET(self):
        self.seen.append((self.path, self.headers["Host"]))
        body = b"not\n  yet"
        self.send_response(self.answers.pop(0) if len(self.answers) > 1 else self.answers[0])
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def address_string(self):
        return "local"

    def log_message(self, *args):
        """Quiet."""


@pytest.fixture
def server(tmp_path):
    handler = type("H", (Handler,), {"answers": [200], "seen": []})
    path = str(tmp_path / "s")
    with socketserver.ThreadingUnixStreamServer(path, handler) as running:
        thread = threading.Thread(target=running.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield path, handler
        running.shutdown()
        thread.join()


def test_readiness_is_awaited(server):
    path, handler = server
    handler.answers[:] = [503, 503, 200]
    ready, seen = site.wait_ready(lambda limit: site.ask(path, "/readyz", "media.example", limit), 10, pause=0.01)
    assert ready
    assert seen.startswith("200")
    assert handler.seen == [("/readyz", "media.example")] * 3


def test_the_deadline_ends_it_and_what_was_seen_is_told(server):
    path, handler = server
    handler.answers[:] = [503]
    started = time.monotonic()
    ready, seen = site.wait_ready(lambda limit: site.ask(path, "/readyz", "x", limit), 0.3, pause=0.05)
    assert not ready
    assert seen == "503 not yet"
    assert 0.3 <= time.monotonic() - started < 5


def test_no_socket_is_no_answer(tmp_path):
    status, text = site.ask(str(tmp_path / "absent"), "/", "x", 1)
    assert status is None
    assert "FileNotFoundError" in text


def test_the_record_has_the_form_of_sha256sum_and_readlink(tmp_path):
    (tmp_path / "env").write_text("a")
    (tmp_path / "release").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "release")
    record = site.started_with([str(tmp_path / "env"), str(tmp_path / "absent")], str(tmp_path / "link"))
    first = "ca978112ca1bbdcafac231b39a23dc4da786eff8147c4e72b9807785afee48bb"
    assert record == f"{first}  {tmp_path}/env\n-  {tmp_path}/absent\n{tmp_path}/release\n"


def test_differences_are_named():
    before = "1  /etc/a\n2  /etc/b\n/releases/1\n"
    assert site.differences(before, before) == []
    assert site.differences(before, "1  /etc/a\n3  /etc/b\n/releases/2\n") == ["/etc/b", "release"]
    assert site.differences("", before) == ["/etc/a", "/etc/b", "release"]
    assert site.differences(before, "1  /etc/a\n/releases/1\n") == ["/etc/b"]


def test_a_set_is_named_by_names_and_contents(tmp_path):
    base = {"site.conf": b"a", "errors/503.html": b"b"}
    nginx.write_tree(str(tmp_path / "set"), base)
    assert nginx.read_tree(str(tmp_path / "set")) == base
    others = [{"site.conf": b"a"}, {**base, "site.conf": b"b"}, {"site.conf": b"ab", "errors/503.html": b""}]
    assert len({nginx.tree_digest(tree) for tree in [base, *others]}) == 4


def test_a_link_is_changed_in_one_step_also_after_a_kill(tmp_path):
    link = tmp_path / "link"
    (tmp_path / "link.new").symlink_to("left-behind")
    nginx.point(str(link), "one")
    nginx.point(str(link), "two")
    assert str(link.readlink()) == "two"
    assert not (tmp_path / "link.new").is_symlink()
