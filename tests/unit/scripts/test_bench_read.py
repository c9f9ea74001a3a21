"""./scripts/bench read: what wrk says, whole answers only, and the figures."""

from __future__ import annotations

import argparse
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kit import bench, bench_read, benchnginx
from kit.lab import ROOT
from kit.run import KitError

SAID = """Running 4s test @ http://198.18.0.11/
  2 threads and 16 connections
  Thread Stats   Avg      Stdev     Max   +/- Stdev
    Latency     3.03ms    1.20ms  20.79ms   75.00%
Requests/sec:   5280.42
Transfer/sec:    258.61MB
"""


def test_what_wrk_says() -> None:
    assert bench_read.rate(SAID, "x") == 5280.42


@pytest.mark.parametrize(
    "more", ["  Non-2xx or 3xx responses: 3", "  Socket errors: connect 0, read 1, write 0, timeout 0"]
)
def test_an_error_of_any_request_is_no_figure(more: str) -> None:
    with pytest.raises(KitError, match=re.escape(more.strip())):
        bench_read.rate(SAID.replace("Requests/sec", f"{more}\nRequests/sec"), "http://x")


def test_no_rate() -> None:
    with pytest.raises(KitError, match="gave no rate"):
        bench_read.rate("unable to connect", "http://x")


class Files(BaseHTTPRequestHandler):
    """Ten files of 100 bytes; what is asked for is noted."""

    asked: list[str] = []  # noqa: RUF012
    bad: dict[str, tuple[int, int]] = {}  # noqa: RUF012
    cache = ""
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        """Answer."""
        self.asked.append(self.path)
        status, size = self.bad.get(self.path, (200, 100))
        self.send_response(status)
        self.send_header("Content-Length", str(size))
        if self.cache:
            self.send_header("X-Cache", self.cache)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(b"x" * size)

    do_HEAD = do_GET

    def log_message(self, *_words: Any) -> None:
        """Say nothing."""


@pytest.fixture
def base() -> Iterator[str]:
    Files.asked, Files.bad = [], {}
    with ThreadingHTTPServer(("127.0.0.1", 0), Files) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}/local/d"
        server.shutdown()


@pytest.mark.parametrize("connections", [1, 3, 16])
def test_each_file_once(base: str, connections: int) -> None:
    assert bench_read.once(base, 10, 100, connections) > 0
    assert sorted(Files.asked) == sorted(f"/local/d/{number}.jpg" for number in range(10))


@pytest.mark.parametrize("bad", [(404, 100), (503, 0), (200, 99)])
def test_anything_but_the_whole_file_ends_it(base: str, bad: tuple[int, int]) -> None:
    Files.bad["/local/d/7.jpg"] = bad
    with pytest.raises(KitError, match=r"7\.jpg"):
        bench_read.once(base, 10, 100, 3)


def test_nobody_there(base: str) -> None:
    with pytest.raises(KitError, match="refused"):
        bench_read.once("http://127.0.0.1:9/x", 1, 1, 1)


@pytest.mark.parametrize("said", ["", "HIT"])
def test_a_hot_edge_answers_from_its_cache(base: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Files, "cache", said)
    bench_read.check_cached(base)


@pytest.mark.parametrize("said", ["MISS", "BYPASS", "STALE"])
def test_an_edge_that_caches_nothing_is_not_hot(base: str, said: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Files, "cache", said)
    with pytest.raises(KitError, match=f"is {said} in the cache"):
        bench_read.check_cached(base)


def test_an_nginx_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()
    lab: Any = argparse.Namespace(addresses={"node1": "198.18.0.11"})
    monkeypatch.setattr(benchnginx, "inside", lambda _lab, _node, script, **_more: done.append(script))

    def ends() -> None:
        with benchnginx.nginx(lab, "node1", "location /x/ { return 204; }") as address:
            assert address == "http://198.18.0.11:18088"
            assert "location /x/" in done[1] and "listen 18088" in done[1] and "PID" not in done[1]
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ends()
    assert "rm -rf /var/lib/tribrick-bench" in done[0] and done[-1] == done[0]


def test_the_paths_are_those_of_the_roles() -> None:
    def text(role: str, file: str) -> str:
        return (ROOT / "roles" / role / file).read_text(encoding="utf-8")

    assert f"__media_edge_origin: {bench_read.ORIGIN.rpartition('/')[0]}\n" in text("media_edge", "vars/main.yml")
    assert f"media_edge_cache: {bench_read.CACHE}\n" in text("media_edge", "defaults/main.yml")


class FakeServers:
    """In place of a lab: addresses that nobody asks."""

    def __init__(self) -> None:
        self.written: list[tuple[str, int, int, str]] = []
        self.emptied = 0

    def base(self, way: str, place: str) -> str:
        return f"{way} {place}"

    def write(self, place: str, files: int, size: int, way: str = "") -> None:
        self.written.append((place, files, size, way))

    def empty(self) -> None:
        self.emptied += 1


SPEED = {"local": 100.0, "stock": 25.0, "origin": 50.0, "edge": 95.0}


def test_ways_take_turns_and_become_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = list[str]()

    def speed(where: str, *_words: Any) -> float:
        asked.append(where)
        return SPEED[where.split()[0]] * len(asked)

    monkeypatch.setattr(bench_read, "wrk", speed)
    monkeypatch.setattr(bench_read, "once", speed)
    servers: Any = FakeServers()
    found = bench_read.hot(servers, bench_read.WAYS, bench_read.Hot("50k", "50k", 500), 16, 2, lambda _text: None)
    assert [one.split()[0] for one in asked] == [*bench_read.WAYS, *reversed(bench_read.WAYS)]
    assert found["edge_hot_50k_to_local_low"] <= found["edge_hot_50k_to_local"] <= found["edge_hot_50k_to_local_high"]
    assert found["stock_hot_50k_to_local"] < found["origin_hot_50k_to_local"]
    found |= bench_read.cold(servers, bench_read.WAYS, "5m", 10, 2, lambda _text: None)
    assert len({place for place, *_ in servers.written}) == 8, "no file is read twice"
    assert servers.emptied == 8, "the cache is empty before each pass"
    figures: bench.Figures = found | {"ways": ", ".join(bench_read.WAYS), "debian": "13", "connections": "16"}
    bench.check_flat(figures)
    told = bench_read.lines(figures)
    assert len(told) == 3 and "edge" in told[1] and told[2].startswith("cold 5m")
    assert bench_read.picture(figures).count("<circle") >= 3 * 3


def test_the_goal_has_its_name() -> None:
    found = bench_read.compare("hot_50k", {"local": [[100.0]], "edge": [[90.0]]})
    assert found == {
        "local_hot_50k_per_second": 100.0, "edge_hot_50k_per_second": 90.0, "edge_hot_50k_to_local": 0.9,
        "edge_hot_50k_to_local_low": 0.9, "edge_hot_50k_to_local_high": 0.9,
    }  # fmt: skip


def test_the_options() -> None:
    parser = argparse.ArgumentParser()
    bench_read.arguments(parser)
    assert parser.parse_args(["--connections", "1", "--connections", "64"]).connections == [1, 64]
    with pytest.raises(SystemExit):
        parser.parse_args(["--connections", "0"])
