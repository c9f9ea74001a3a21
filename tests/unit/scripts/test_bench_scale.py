"""./scripts/bench scale: single measurements, the order of things, cleaning up, figures."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kit import bench, bench_scale, benchnode_scale
from kit.bench_upload import Target
from kit.run import KitError


class Site(BaseHTTPRequestHandler):
    """Gives pages and takes uploads."""

    seen: list[str] = []  # noqa: RUF012
    status = {"GET": 200, "POST": 201}  # noqa: RUF012
    protocol_version = "HTTP/1.1"

    def answer(self) -> None:
        """Answer."""
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.seen.append(f"{self.command} {self.path}")
        self.send_response(self.status[self.command])
        self.send_header("Content-Length", "12")
        self.end_headers()
        self.wfile.write(b'{"name":"x"}')

    do_GET = do_POST = answer

    def log_message(self, *_words: Any) -> None:
        """Say nothing."""


@pytest.fixture
def site(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    monkeypatch.setattr(Site, "seen", [])
    monkeypatch.setattr(Site, "status", {"GET": 200, "POST": 201})
    with ThreadingHTTPServer(("127.0.0.1", 0), Site) as server:
        threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True).start()
        yield f"http://127.0.0.1:{server.server_address[1]}"
        server.shutdown()


def test_pages_and_uploads(site: str) -> None:
    assert len(bench_scale.get(f"{site}/?before=7", {}, 3)) == 3
    target = Target(f"{site}/api/media/", "t")
    assert min(bench_scale.post(target, 2)) > 0 and target.stored == ["x", "x"]
    assert Site.seen == ["GET /?before=7"] * 3 + ["POST /api/media/"] * 2


def test_an_error_is_no_figure(site: str) -> None:
    Site.status |= {"GET": 503, "POST": 503}
    with pytest.raises(KitError, match="503"):
        bench_scale.get(f"{site}/", {}, 1)
    with pytest.raises(KitError, match="503"):
        bench_scale.post(Target(f"{site}/"), 1)
    with pytest.raises(KitError, match="refused"):
        bench_scale.get("http://127.0.0.1:9/", {}, 1)


class FakeRemote:
    """In place of the program on a node: counts the files."""

    def __init__(self, left: int = 0) -> None:
        self.files, self.asked, self.stuck, self.dies = left, list[str](), False, ""
        self.copies = 4

    def answer(self, _deadline: float) -> dict[str, Any]:
        return {"left": self.files}

    def ask(self, command: dict[str, Any], _deadline: float) -> dict[str, Any]:
        self.asked.append(command["do"])
        if command["do"] == self.dies:
            raise KitError("the program has ended")
        if command["do"] == "add":
            assert command["start"] == self.files, "no file is written twice"
            self.files += command["count"]
        if command["do"] == "remove" and not self.stuck:
            self.files -= min(self.files, command["count"])
        return {"left": self.files, "seconds": 0.5, "copies": self.copies, "picture": 9, "number": 1}

    def __enter__(self) -> FakeRemote:
        return self

    def __exit__(self, *_error: object) -> None:
        """Nothing to end."""


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A lab in which nothing happens; mirrors copy what the remote program has."""
    made = SimpleNamespace(
        state=tmp_path, recall=lambda: {"token": "t"}, url=lambda _node: "http://x", ssh=lambda _node: [],
        remote=FakeRemote(), uploads=0, copied=None,
    )  # fmt: skip

    @contextlib.contextmanager
    def mirror(lab_: Any) -> Iterator[Any]:
        runs = [lab_.remote.files, 0, 0, 0, 0] if lab_.copied is None else [*lab_.copied]
        yield lambda: (2.0, runs.pop(0))

    def post(target: Target, times: int) -> list[float]:
        target.stored += ["x"] * times
        return [5.0] * times

    def removed(target: Target) -> None:
        made.uploads = len(target.stored)

    monkeypatch.setattr(bench_scale, "mirror", mirror)
    monkeypatch.setattr(bench_scale, "post", post)
    monkeypatch.setattr(bench_scale, "get", lambda _url, _headers, times: [1.0] * times)
    monkeypatch.setattr(bench_scale, "remove_uploads", removed)
    monkeypatch.setattr(bench_scale, "Remote", lambda *_words: made.remote)
    return made


def go(lab: Any, *sizes: int) -> bench.Figures:
    return bench_scale.run(lab, argparse.Namespace(files=sizes or None, blocks=2), lambda _text: None)


def test_sizes_follow_each_other_and_all_is_deleted(lab: SimpleNamespace) -> None:
    figures = go(lab, 2500, 1000)
    bench.check_flat(figures)
    assert lab.remote.asked.count("add") == 3 and lab.remote.files == 0 and lab.uploads > 0
    # The mirror took two seconds each time: of fewer files that is more for each.
    assert figures["mirror_first_1000_ms"] == 2.0 and figures["mirror_first_2500_to_1000"] == 0.4
    assert figures["upload_2500_to_1000"] == 1.0 and "upload_1000_to_1000" not in figures
    told = bench_scale.lines(figures | {"debian": "13"})
    assert len(told) == 1 + len(bench_scale.KINDS) and all("2500" in line for line in told[1:])
    assert "2500 files / 1000" in bench_scale.picture(figures)


@pytest.mark.parametrize(("copied", "said"), [([7, 0], "at least 1000"), ([1000, 3], "copied 3 files")])
def test_a_mirror_that_did_something_else_is_no_figure(lab: SimpleNamespace, copied: list[int], said: str) -> None:
    lab.copied = copied
    with pytest.raises(KitError, match=said):
        go(lab, 1000)
    assert lab.remote.files == 0, "deleted all the same"


def test_a_program_that_ended_is_followed_by_one_that_deletes(
    lab: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    started = list[FakeRemote]()

    def start(*_words: Any) -> FakeRemote:
        started.append(FakeRemote(left=started[-1].files if started else 0))
        started[-1].dies = "audit" if len(started) == 1 else ""
        return started[-1]

    monkeypatch.setattr(bench_scale, "Remote", start)
    with pytest.raises(KitError, match="has ended"):
        go(lab, 1000)
    assert started[0].files == 1000 and started[1].files == 0 and len(started) == 2


def test_an_audit_without_bricks_is_no_figure(lab: SimpleNamespace) -> None:
    lab.remote.copies = 1
    with pytest.raises(KitError, match="4 copies"):
        go(lab, 1000)


def test_files_that_cannot_be_deleted() -> None:
    remote: Any = FakeRemote(left=10)
    remote.stuck = True
    with pytest.raises(KitError, match="10 files do not"):
        bench_scale.empty(remote, lambda _text: None)


def test_files_of_a_killed_run_are_deleted_first(lab: SimpleNamespace) -> None:
    lab.remote = FakeRemote(left=1500)
    go(lab, 10)
    assert lab.remote.asked[:3] == ["remove", "remove", "add"]


@pytest.fixture
def node(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Scripts of a node run here, with a tribrick-mirror that says how it was called and fails if told to."""
    program = tmp_path / "bin" / "tribrick-mirror"
    program.parent.mkdir()
    program.write_text(
        f"""#!/bin/sh
echo "$@" >>{tmp_path}/called
cp "$2" {tmp_path}/used.json
echo '{{"copied": 7, "problems": ["a is missing", "b is torn"], "volume": []}}'
test ! -e {tmp_path}/fails
""",
        encoding="utf-8",
    )
    program.chmod(0o755)
    (tmp_path / "real").mkdir()
    real = {"place": str(tmp_path / "real"), "source": "/srv/media", "push": {"target": "x"}, "restic": {}}
    (tmp_path / "mirror.json").write_text(json.dumps(real), encoding="utf-8")

    def inside(_lab: Any, _node: str, script: str, **_more: Any) -> str:
        script = script.replace("/etc/tribrick/mirror.json", str(tmp_path / "mirror.json"))
        paths = f"{program.parent}:{os.environ['PATH']}"
        done = subprocess.run(
            ["sh", "-c", script], capture_output=True, text=True, timeout=30, env={**os.environ, "PATH": paths}
        )
        if done.returncode:
            raise KitError(done.stderr.strip())
        return done.stdout

    monkeypatch.setattr(bench_scale, "inside", inside)
    monkeypatch.setattr(bench_scale, "MIRROR", str(tmp_path / "bench-mirror"))
    return tmp_path


def test_a_mirror_in_a_new_place(node: Path) -> None:
    place = node / "bench-mirror"
    place.mkdir()
    (place / "left").touch()
    with bench_scale.mirror(None) as run_mirror:  # type: ignore[arg-type]
        assert not (place / "left").exists() and (place / "place").is_dir()
        seconds, copied = run_mirror()
        assert seconds > 0 and copied == 7
    assert not place.exists()
    assert (node / "called").read_text(encoding="utf-8").split()[2:] == ["run", "--no-snapshot", "--json"]
    used = json.loads((node / "used.json").read_text(encoding="utf-8"))
    assert used == {"place": f"{place}/place", "source": "/srv/media", "push": {}, "restic": {}}


def test_a_mirror_with_problems_is_no_figure(node: Path) -> None:
    (node / "fails").touch()
    with bench_scale.mirror(None) as run_mirror, pytest.raises(KitError, match="ended with 1: a is missing; b is torn"):  # type: ignore[arg-type]
        run_mirror()
    assert not (node / "bench-mirror").exists()


def test_names_are_spread_over_directories() -> None:
    names = [benchnode_scale.name_of(number) for number in range(1000)]
    assert len(set(names)) == 1000
    assert len({name.rpartition("/")[0] for name in names}) == 256
