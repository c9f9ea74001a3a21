"""./scripts/bench upload: requests, what was stored, figures. The plain site is seen in a lab only."""

from __future__ import annotations

import argparse
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from kit import bench, bench_upload, benchnode_storages
from kit.run import KitError


class Site(BaseHTTPRequestHandler):
    """Takes uploads and deletes; notes who asked for what."""

    seen: list[tuple[str, str, str | None]] = []  # noqa: RUF012
    bodies: list[bytes] = []  # noqa: RUF012
    status = 201
    deleted = 0  # another status for DELETE
    protocol_version = "HTTP/1.1"

    def answer(self, status: int, said: bytes) -> None:
        """Answer."""
        self.seen.append((self.command, self.path, self.headers.get("Authorization")))
        self.send_response(status)
        if status != 204:
            self.send_header("Content-Length", str(len(said)))
        self.end_headers()
        self.wfile.write(said)

    def do_POST(self) -> None:
        """Store."""
        self.bodies.append(self.rfile.read(int(self.headers["Content-Length"])))
        self.answer(self.status, json.dumps({"name": f"photos/{len(self.bodies)} é.bin"}).encode())

    def do_DELETE(self) -> None:
        """Delete."""
        self.answer(self.deleted or (204 if self.status == 201 else 500), b"")

    def log_message(self, *_words: Any) -> None:
        """Say nothing."""


@pytest.fixture
def target() -> Iterator[bench_upload.Target]:
    Site.seen, Site.bodies, Site.status, Site.deleted = [], [], 201, 0
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield bench_upload.Target(f"http://127.0.0.1:{server.server_address[1]}/api/media/", "secret")
        server.shutdown()


@pytest.mark.parametrize("connections", [1, 3, 8])
def test_each_body_is_sent_once_and_its_name_is_kept(target: bench_upload.Target, connections: int) -> None:
    bodies = [bench_upload.form(100) for _ in range(7)]
    assert bench_upload.send(target, bodies, connections) > 0
    assert sorted(Site.bodies) == sorted(body for body, _ in bodies)
    assert {who for _, _, who in Site.seen} == {"Token secret"}
    assert len(set(target.stored)) == 7
    bench_upload.remove(target)
    assert target.stored == []
    assert sum(method == "DELETE" for method, *_ in Site.seen) == 7
    assert "/api/media/photos/1%20%C3%A9.bin" in {path for _, path, _ in Site.seen}


def test_no_two_bodies_are_the_same() -> None:
    (one, kind), (other, _) = bench_upload.form(50), bench_upload.form(50)
    mark = kind.partition("boundary=")[2].encode()
    assert one != other and one.startswith(b"--" + mark) and one.endswith(b"--" + mark + b"--\r\n")


@pytest.mark.parametrize("status", [200, 413, 503])
def test_anything_but_201_is_no_figure(target: bench_upload.Target, status: int) -> None:
    Site.status = status
    with pytest.raises(KitError, match=str(status)):
        bench_upload.send(target, [bench_upload.form(10)], 1)


def test_what_was_stored_before_an_error_is_deleted(target: bench_upload.Target) -> None:
    bench_upload.send(target, [bench_upload.form(10)] * 2, 1)
    Site.status = 503
    with pytest.raises(KitError):
        bench_upload.send(target, [bench_upload.form(10)], 1)
    assert len(target.stored) == 2
    with pytest.raises(KitError, match="could not be deleted"):
        bench_upload.remove(target)


def test_what_is_gone_already_is_deleted(target: bench_upload.Target) -> None:
    target.stored, Site.deleted = ["x"], 404
    bench_upload.remove(target)
    assert target.stored == [] and len(Site.seen) == 1


def test_a_lab_without_a_site() -> None:
    lab: Any = argparse.Namespace(name="t", recall=dict, url=lambda _node: "http://x")
    with pytest.raises(KitError, match="no site yet"):
        bench_upload.api(lab)


def test_nobody_there() -> None:
    with pytest.raises(KitError, match="refused"):
        bench_upload.send(bench_upload.Target("http://127.0.0.1:9/"), [bench_upload.form(1)], 1)
    with pytest.raises(KitError, match=r"could not be deleted.*refused"):
        bench_upload.remove(bench_upload.Target("http://127.0.0.1:9/", "", ["x"]))


def test_ways_take_turns_and_become_ratios(monkeypatch: pytest.MonkeyPatch) -> None:
    asked, speed = list[str](), {"local": 100.0, "stock": 50.0, "ours": 40.0}

    def send(way: Any, bodies: Any, _connections: int) -> float:
        asked.append(way)
        return speed[way] * len(asked)

    monkeypatch.setattr(bench_upload, "send", send)
    where: Any = {way: way for way in bench_upload.WAYS}
    rates = bench_upload.whole_stack(where, "50k", 8, 2, lambda _text: None)
    assert asked[3:] == [*bench_upload.WAYS, *reversed(bench_upload.WAYS)], "the first three are the warm-up"
    figures: bench.Figures = {"debian": "13", **bench_upload.compare("50k_8", rates, "per_second")}
    figures |= bench_upload.compare("50k_save", {way: [[1.0], [2.0]] for way in bench_upload.WAYS}, "ms")
    figures |= bench_upload.tree_figures({"local": [[1.0], [2.0]], "mount": [[3.0], [8.0]]})
    bench.check_flat(figures)
    assert figures["ours_50k_8_to_stock_low"] <= figures["ours_50k_8_to_stock"] <= figures["ours_50k_8_to_stock_high"]
    assert (figures["mount_tree_to_local"], figures["mount_tree_to_local_high"]) == (3.5, 4.0)
    told = bench_upload.lines(figures)
    assert len(told) == 4 and told[1].startswith("50k 8") and told[2].startswith("50k save")
    assert "50k, 8 at a time" in bench_upload.picture(figures)


class FakeRemote:
    """In place of the program on a node."""

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def ask(self, command: dict[str, Any], _deadline: float) -> dict[str, Any]:
        self.asked.append(command)
        return {"times": {way: [1.0] * command["rounds"] for way in command["ways"]}}


def test_the_storage_is_asked_by_its_own_names() -> None:
    remote: Any = FakeRemote()
    times = bench_upload.storage(remote, "50k", 2, lambda _text: None)
    assert set(times) == set(bench_upload.WAYS) and all(len(blocks) == 2 for blocks in times.values())
    assert remote.asked[0]["ways"] == ["local", "django", "row"]
    assert benchnode_storages.IN_MEMORY > bench_upload.SIZES["1m"][0], "all of them are uploads in memory"


def test_a_tree_is_copied_in_turns_and_removed(monkeypatch: pytest.MonkeyPatch) -> None:
    done = list[str]()

    def inside(_lab: Any, _node: str, script: str, **_more: Any) -> str:
        done.append(script.strip().split("'")[-1].strip() or script)
        return "2.5\n"

    monkeypatch.setattr(bench_upload, "inside", inside)
    lab: Any = argparse.Namespace(site_variables=lambda: {"tribrick_media_root": "/srv/media"})
    seconds = bench_upload.tree(lab, 2, lambda _text: None)
    assert seconds == {"local": [[2.5], [2.5]], "mount": [[2.5], [2.5]]}
    assert f"until rm -rf {bench_upload.HERE}-tree /srv/media/bench-tree-" in done[-1]


def test_the_options() -> None:
    parser = argparse.ArgumentParser()
    bench_upload.arguments(parser)
    assert parser.parse_args(["--connections", "1", "--size", "1m"]).connections == [1]
    with pytest.raises(SystemExit):
        parser.parse_args(["--size", "2g"])
