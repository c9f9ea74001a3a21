"""The standby answers as the kit's nginx does for the mount: the same requests to both, the same answers.

nginx runs with the directives that the role media_edge has for the origin.
"""

from __future__ import annotations

import contextlib
import http.client
import os
import random
import re
import shutil
import socket
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from tribrick.standby import PIECE, Standby
from tribrick.testing import wait_for

from .conftest import LARGE, MODIFIED, NAME, SMALL, Answered, Node, ask

ROOT = Path(__file__).resolve().parents[4]
COMPARED = ("etag", "last-modified", "content-length", "content-range", "accept-ranges")
EMPTY = "photos/a/3/nothing-abcdefghijklmnopqrst.bin"
Asked = Callable[[str, str, dict[str, str]], Answered]


@pytest.fixture
def nginx(tmp_path: Path) -> Iterator[tuple[Path, Asked]]:
    """A directory that nginx serves as the mount is served, and how to ask."""
    program = shutil.which("nginx", path=f"{os.environ.get('PATH', '')}:/usr/sbin")
    if program is None:
        pytest.fail("nginx is not there: apt-get install nginx-light", pytrace=False)
    template = (ROOT / "roles/media_edge/templates/origin.conf.j2").read_text()
    # What decides about these headers in the template; others of its kind would have to be copied here.
    assert re.findall(r"^ *((?:etag|if_modified_since|max_ranges|expires) .*;)$", template, re.MULTILINE) == [
        "etag on;",
        "max_ranges 16;",
    ]
    root = tmp_path / "mount"
    root.mkdir()
    work = tmp_path / "nginx"
    work.mkdir()
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    temporary = "".join(
        f"{kind}_temp_path {work}/{kind};\n" for kind in ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    )
    (work / "nginx.conf").write_text(
        f"{'user root;' if os.geteuid() == 0 else ''}\ndaemon off;\npid {work}/pid;\nevents {{}}\nhttp {{\n"
        f"access_log off;\n{temporary}server {{\nlisten 127.0.0.1:{port};\nlocation ^~ /media/ {{\nalias {root}/;\n"
        f"disable_symlinks on from={root};\nopen_file_cache off;\nautoindex off;\netag on;\nmax_ranges 16;\n"
        "default_type application/octet-stream;\ntypes {}\n}\n}\n}\n"
    )
    process = subprocess.Popen(
        [program, "-e", f"{work}/error.log", "-p", str(work), "-c", f"{work}/nginx.conf"], stderr=subprocess.DEVNULL
    )

    def fetch(name: str, method: str, headers: dict[str, str]) -> Answered:
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=20)
        with contextlib.closing(connection):
            connection.request(method, f"/media/{name}", headers=headers)
            answer = connection.getresponse()
            given = {key.lower(): value for key, value in answer.getheaders()}
            return Answered(answer.status, given, answer.read(), None)

    def up() -> bool:
        assert process.poll() is None, (work / "error.log").read_text()
        with socket.socket() as line:
            return line.connect_ex(("127.0.0.1", port)) == 0

    try:
        wait_for(up, "nginx listens")
        yield root, fetch
    finally:
        process.terminate()
        process.wait(15)


@pytest.fixture
def pair(node: Node, nginx: tuple[Path, Asked]) -> tuple[Standby, Asked]:
    """A standby with a brick, and an nginx with the same files."""
    for name, data in ((NAME, LARGE), (SMALL_NAME, SMALL), (EMPTY, b"")):
        node.note("added", name, data)
        node.put(node.brick, name, data)
        node.put(nginx[0], name, data)
    return node.standby(), nginx[1]


SMALL_NAME = "photos/b/4/dog-abcdefghijklmnopqrst.txt"
ETAG = f'"{MODIFIED:x}-{len(LARGE):x}"'
DATE = "Tue, 14 Nov 2023 22:13:20 GMT"
LATER, EARLIER = "Tue, 14 Nov 2023 22:13:21 GMT", "Tue, 14 Nov 2023 22:13:19 GMT"
N = len(LARGE)
RANGES = [
    "bytes=0-0", "bytes=0-", "bytes=5-9", f"bytes={N - 1}-", f"bytes={N}-", f"bytes={N - 1}-{N + 100}", "bytes=-1",
    "bytes=-0",
    f"bytes=-{N}", f"bytes=-{N + 1}", "bytes=9-5", "bytes=0-5,9-12", "bytes=0-0,-1", f"bytes=0-{N - 1},0-0",
    "bytes=1-2,1-2,1-2",
    f"bytes={PIECE - 1}-{PIECE}", f"bytes={PIECE}-{2 * PIECE - 1}", "BYTES=0-1", "bytes= 3 - 7 ", "bytes=3-7 , 9-",
    "bytes=", "bytes",
    "bytes=-", "bytes=x-", "bytes=1", "bytes=1-x", "bytes=1-2,", "bytes=,1-2", "items=0-1", "bytes=5-9,1000000000-",
    "bytes=1-0,5-9",
    "bytes=0-0x", f"bytes={2 * PIECE}-{N + 5}, 0-3", "bytes=99999999999999999999-", "bytes=0-99999999999999999999",
    "bytes=0-5,9-5",
]  # fmt: skip
CONDITIONS = [
    {"If-None-Match": ETAG}, {"If-None-Match": f"W/{ETAG}"}, {"If-None-Match": '"x"'}, {"If-None-Match": "*"},
    {"If-None-Match": f'"x", {ETAG}'}, {"If-None-Match": f'"x",W/{ETAG} , "y"'},
    {"If-Match": ETAG}, {"If-Match": f"W/{ETAG}"}, {"If-Match": '"x"'}, {"If-Match": "*"}, {"If-Match": f'"x", {ETAG}'},
    {"If-Modified-Since": DATE}, {"If-Modified-Since": LATER}, {"If-Modified-Since": EARLIER},
    {"If-Modified-Since": "x"},
    {"If-Modified-Since": "Tuesday, 14-Nov-23 22:13:20 GMT"}, {"If-Modified-Since": "Tue Nov 14 22:13:20 2023"},
    {"If-Unmodified-Since": DATE}, {"If-Unmodified-Since": LATER}, {"If-Unmodified-Since": EARLIER},
    {"If-Unmodified-Since": "x"},
    {"If-None-Match": ETAG, "If-Modified-Since": DATE}, {"If-None-Match": '"x"', "If-Modified-Since": DATE},
    {"If-None-Match": ETAG, "If-Modified-Since": EARLIER}, {"If-None-Match": ETAG, "If-Match": '"x"'},
    {"If-None-Match": ETAG, "If-Unmodified-Since": EARLIER}, {"If-Match": ETAG, "If-Unmodified-Since": LATER},
    {"Range": "bytes=5-9", "If-Range": ETAG}, {"Range": "bytes=5-9", "If-Range": '"x"'},
    {"Range": "bytes=5-9", "If-Range": f"W/{ETAG}"}, {"Range": "bytes=5-9", "If-Range": DATE},
    {"Range": "bytes=5-9", "If-Range": LATER}, {"Range": "bytes=5-9", "If-Range": EARLIER},
    {"Range": "bytes=5-9", "If-Range": "x"},
    {"Range": f"bytes={N}-", "If-Range": '"x"'}, {"Range": "bytes=5-9", "If-None-Match": ETAG},
    {"Range": "bytes=5-9", "If-Match": '"x"'}, {"Range": f"bytes={N}-", "If-None-Match": ETAG},
]  # fmt: skip


def both(pair: tuple[Standby, Asked], name: str, method: str, headers: dict[str, str]) -> None:
    made, fetch = pair
    theirs = fetch(name, method, headers)
    ours = ask(made, name, method, **{f"HTTP_{key.upper().replace('-', '_')}": value for key, value in headers.items()})
    said = (method, headers)
    assert ours.status == theirs.status, said
    assert ours.broken is None
    multipart = "multipart" in theirs.headers.get("content-type", "")
    if theirs.status in (200, 206):
        sizes = ("content-length",) if multipart else ()  # the boundary's length is each server's own
        for header in COMPARED:
            if header not in sizes:
                assert ours.headers.get(header) == theirs.headers.get(header), (header, said)
        assert parts(ours) == parts(theirs), said
        assert method == "HEAD" or len(ours.body) == int(ours.headers["content-length"]), said
    elif theirs.status == 304:
        for header in COMPARED:
            assert ours.headers.get(header) == theirs.headers.get(header), (header, said)
        assert ours.body == b"" and "content-type" not in ours.headers
    else:
        assert ours.headers.get("content-range") == theirs.headers.get("content-range"), said
        assert LARGE[:50] not in ours.body


def parts(answer: Answered) -> bytes:
    """The body, of one with several parts without its boundary."""
    match = re.fullmatch(r"multipart/byteranges; boundary=(\w+)", answer.headers.get("content-type", ""))
    return answer.body.replace(match[1].encode(), b"BOUNDARY") if match else answer.body


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_ranges(pair: tuple[Standby, Asked], method: str) -> None:
    for name in (NAME, SMALL_NAME, EMPTY):
        for given in RANGES:
            both(pair, name, method, {"Range": given})
        both(pair, name, method, {})


def test_ranges_at_random(pair: tuple[Standby, Asked]) -> None:
    rng = random.Random(f"{os.environ.get('TRIBRICK_SEED', '0')} ranges")
    numbers = ["", "0", "1", "7", "4999", "5000", "5001", "2500", "00", "x", " 3", "4 "]
    for _ in range(200):
        stretches = [
            rng.choice(numbers) + rng.choice(["-", "-", "-", " - ", ""]) + rng.choice(numbers)
            for _ in range(rng.choice([1, 1, 1, 2, 3]))
        ]
        both(pair, SMALL_NAME, "GET", {"Range": f"bytes={rng.choice([',', ', ']).join(stretches)}"})


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_conditions(pair: tuple[Standby, Asked], method: str) -> None:
    for headers in CONDITIONS:
        both(pair, NAME, method, headers)


def test_more_ranges_than_are_served_one_by_one_are_the_whole_file(node: Node) -> None:
    """Each range costs the reading of a piece; the whole file is right, too."""
    node.note("added", NAME, LARGE)
    node.put(node.brick, NAME, LARGE)
    few, many = (",".join(f"{number}-{number}" for number in range(0, 2 * count, 2)) for count in (16, 17))
    assert ask(node.standby(), NAME, HTTP_RANGE=f"bytes={few}").status == 206
    answer = ask(node.standby(), NAME, HTTP_RANGE=f"bytes={many}")
    assert (answer.status, answer.body) == (200, LARGE)
