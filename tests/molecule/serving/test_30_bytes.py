"""Ranges, conditions, HEAD, private files, hostile names at the address: cold and warm the same bytes and headers."""

from __future__ import annotations

import contextlib
import http.client
import json
import shlex
import socket
import time
from hashlib import sha256 as hashing
from urllib.parse import quote, urlsplit

import pytest

from helpers import NODES, SITE, picture, wait_until
from tribrick.signature import sign

MIB = 1 << 20
# Of each request, not of the file.
OF_THE_REQUEST = {"Date", "X-Cache", "X-Tribrick-Source", "Connection", "Keep-Alive"}
RANGES = {
    "inside": "bytes=100-299", "first byte": "bytes=0-0", "suffix": "bytes=-100", "rest": "bytes=3145700-",
    "border": f"bytes={MIB - 1}-{MIB}", "over three pieces": f"bytes={MIB - 5}-{2 * MIB + 5}",
    "beyond the end": "bytes=3145800-9999999", "suffix longer than the file": "bytes=-99999999",
    "several": "bytes=0-9,2000000-2000009", "several that overlap": "bytes=0-99,50-149",
    "no range": "elephants=1-2",
}  # fmt: skip


@pytest.fixture(scope="module")
def large(rig):
    content = picture(3 * MIB + 100)
    return rig.upload(SITE, content), content


def cold(rig, row) -> None:
    """Take a file out of every cache."""
    rig.everywhere(lambda node: rig.root(node, f"tribrick-edge purge {row['name']}"))


def twice(rig, row, method: str = "GET", **headers: str):
    """Ask with cold caches and again; return the one answer that both are."""
    cold(rig, row)
    path, given = urlsplit(row["url"]).path, {key.replace("_", "-"): value for key, value in headers.items()}
    answers = [rig.request(method, SITE, path, headers=given) for _ in range(2)]
    first, second = answers
    assert first.status_code == second.status_code
    assert first.content == second.content
    told = [{key: value for key, value in one.headers.items() if key not in OF_THE_REQUEST} for one in answers]
    assert told[0] == told[1]
    cached = [one.headers.get("X-Cache") for one in answers]
    if first.status_code != 412:  # such an answer is nginx's own page
        assert cached == ["MISS", "HIT"], f"{cached} for {method} {headers}"
    return second


def wanted(asked: str, size: int) -> tuple[int, int] | None:
    """Return first and last byte of what a range asks for; several ranges, and what is none, give the whole file."""
    unit, _, ranges = asked.partition("=")
    first, _, last = ranges.partition("-")
    if unit != "bytes" or "," in ranges:
        return None
    if not first:
        return max(0, size - int(last)), size - 1
    return int(first), min(int(last or size), size - 1)


@pytest.mark.parametrize("kind", RANGES)
def test_range(rig, large, kind):
    row, content = large
    answer, part = twice(rig, row, Range=RANGES[kind]), wanted(RANGES[kind], len(content))
    if part is None:
        assert (answer.status_code, answer.content) == (200, content)
        return
    first, last = part
    assert (answer.status_code, answer.content) == (206, content[first : last + 1])
    assert answer.headers["Content-Range"] == f"bytes {first}-{last}/{len(content)}"


@pytest.mark.parametrize("asked", ["bytes={}-", "bytes=9-1"], ids=["behind the end", "backwards"])
def test_a_range_of_nothing(rig, large, asked):
    row, content = large
    cold(rig, row)
    for _ in range(2):
        answer = rig.fetch(SITE, row, headers={"Range": asked.format(len(content))})
        assert (answer.status_code, answer.headers["Content-Range"]) == (416, f"bytes */{len(content)}")


def test_conditions(rig, large):
    row, content = large
    whole = twice(rig, row)
    assert whole.content == content
    etag, changed = whole.headers["ETag"], whole.headers["Last-Modified"]
    before = "Thu, 01 Jan 2015 00:00:00 GMT"
    for headers, status, size in (
        ({"If_None_Match": etag}, 304, 0),
        ({"If_None_Match": f'W/{etag}, "other"'}, 304, 0),
        ({"If_None_Match": "*"}, 304, 0),
        ({"If_None_Match": '"other"'}, 200, len(content)),
        ({"If_None_Match": '"other"', "If_Modified_Since": changed}, 200, len(content)),
        ({"If_Modified_Since": changed}, 304, 0),
        ({"If_Modified_Since": before}, 200, len(content)),
        ({"If_Match": etag}, 200, len(content)),
        ({"If_Match": '"other"'}, 412, None),
        ({"If_Unmodified_Since": before}, 412, None),
        ({"Range": "bytes=0-9", "If_Range": etag}, 206, 10),
        ({"Range": "bytes=0-9", "If_Range": changed}, 206, 10),
        ({"Range": "bytes=0-9", "If_Range": '"other"'}, 200, len(content)),
        ({"Range": "bytes=0-9", "If_None_Match": etag}, 304, 0),
    ):
        answer = twice(rig, row, **headers)
        assert answer.status_code == status, f"{headers}: {answer.status_code}"
        if size is not None:
            assert len(answer.content) == size, headers
        if status == 304:
            assert answer.headers["ETag"] == etag and "immutable" in answer.headers["Cache-Control"]


@pytest.mark.parametrize("asked", ["", "bytes=10-19"], ids=["whole", "range"])
def test_head_is_get_without_a_body(rig, large, asked):
    row, _ = large
    headers = {"Range": asked} if asked else {}
    head = twice(rig, row, "HEAD", **headers)
    get = rig.fetch(SITE, row, headers=headers)
    assert head.content == b"" and head.status_code == get.status_code
    told = [{key: value for key, value in one.headers.items() if key not in OF_THE_REQUEST} for one in (head, get)]
    assert told[0] == told[1]


def test_one_file_is_one_entry_however_it_is_written(rig):
    """No visitor can fill the cache with copies of a file, or hide one from a delete."""
    row = rig.upload(SITE)
    path = urlsplit(row["url"]).path
    other = f"/media/%{ord('p'):02x}hotos/{path.removeprefix('/media/photos/')}"
    assert rig.request("GET", SITE, path).status_code == 200
    for written in (f"{path}?v=2", other, f"{path}?{'x' * 2000}"):
        assert raw(rig, written)[1]["X-Cache"] == "HIT", written


# --- private files


def ask_standby(rig, node: str, name: str, signature: str) -> int:
    """Ask a node's standby itself; return the status."""
    script = """
import http.client, json, socket, sys
q = json.load(sys.stdin)
line = socket.socket(socket.AF_UNIX)
line.settimeout(20)
line.connect("/run/tribrick/standby.sock")
standby = http.client.HTTPConnection("standby")
standby.sock = line
standby.request("GET", q["path"], headers={"Authorization": q["signature"]} if q["signature"] else {})
print(standby.getresponse().status)
"""
    question = json.dumps({"path": f"/{quote(name)}", "signature": signature})
    return int(rig.root(node, f"python3 -c {shlex.quote(script)}", text_in=question))


@pytest.fixture(scope="module")
def private(rig):
    content = picture()
    answer = rig.try_upload(SITE, content, data={"private": "1"})
    assert answer.status_code == 201
    row = answer.json()
    rig.wait_ready(30)
    for node in NODES:
        wait_until(f"{node} to know it", lambda node=node: signed_status(rig, node, row) == 200, 20)
    return row, content


def key(rig) -> str:
    return hashing(f"{rig.secrets()['vault_tribrick_django_secret_key']} signs for the standby".encode()).hexdigest()


def signed_status(rig, node: str, row) -> int:
    return ask_standby(rig, node, row["name"], sign(key(rig), "GET", row["name"], key_id="site"))


def test_private_file_at_the_address(rig, private):
    row, content = private
    for _ in range(2 * len(NODES)):  # by every site
        mine = rig.fetch(SITE, row, headers=rig.auth)
        assert (mine.status_code, mine.content) == (200, content)
        assert "private" in mine.headers["Cache-Control"]
        assert not {"X-Cache", "X-Tribrick-Signed", "X-Accel-Redirect", "Authorization"} & set(mine.headers)
        assert rig.fetch(SITE, row).status_code in (302, 401, 403, 404), "nobody's"
    part = rig.fetch(SITE, row, headers={**rig.auth, "Range": "bytes=5-14"})
    assert (part.status_code, part.content) == (206, content[5:15])
    head = rig.request("HEAD", SITE, urlsplit(row["url"]).path, headers=rig.auth)
    assert (head.status_code, head.content, head.headers["Content-Length"]) == (200, b"", str(len(content)))


def test_a_signature_is_of_no_use_to_a_visitor(rig, private):
    row, _ = private
    good = sign(key(rig), "GET", row["name"], key_id="site")
    for path in (f"/media/{row['name']}", f"/_protected/{row['name']}", f"/standby/{row['name']}"):
        answer = rig.request("GET", SITE, path, headers={"Authorization": good, "X-Tribrick-Signed": good})
        assert answer.status_code == 404, f"{path}: {answer.status_code}"
    answer = rig.request("GET", SITE, urlsplit(row["url"]).path, headers={"X-Tribrick-Signed": good})
    assert answer.status_code in (302, 401, 403, 404)


def test_standby_wants_a_signature_that_is_valid_now(rig, private):
    row, _ = private
    now, secret, name = time.time(), key(rig), row["name"]
    refused = {
        "none": "",
        "old": sign(secret, "GET", name, key_id="site", now=now - 301),
        "of the future": sign(secret, "GET", name, key_id="site", now=now + 400),
        "of another name": sign(secret, "GET", f"{name}x", key_id="site"),
        "of another method": sign(secret, "DELETE", name, key_id="site"),
        "of another key": sign("guessed", "GET", name, key_id="site"),
        "of an unknown key": sign(secret, "GET", name, key_id="default"),
    }
    for node in NODES:
        assert ask_standby(rig, node, name, sign(secret, "GET", name, key_id="site", now=now - 200)) == 200
    for what, signature in refused.items():
        assert ask_standby(rig, "node1", name, signature) == 401, what


def test_private_file_without_the_origin(rig, private):
    """The holder's nginx gets it from a standby, by what the site of any node has signed; visitors still sign in."""
    row, content = private
    holder = rig.holder()
    rig.root(holder, "systemctl stop tribrick-origin")
    try:
        assert rig.run_root(holder, "test -S /run/tribrick-origin/origin.sock").returncode != 0
        for _ in range(2 * len(NODES)):
            mine = rig.fetch(SITE, row, headers=rig.auth)
            assert (mine.status_code, mine.content) == (200, content)
            assert rig.fetch(SITE, row).status_code in (302, 401, 403, 404)
    finally:
        rig.root(holder, "systemctl start tribrick-origin")
    wait_until("the origin to be asked again",
               lambda: rig.fetch(SITE, rig.upload(SITE)).headers.get("X-Tribrick-Source") == "origin", 20)


# --- what no browser sends


def raw(rig, path: str, headers: dict[str, str] | None = None, method: str = "GET"):
    """Ask for a path as it is written; return status, headers, body."""
    with contextlib.closing(http.client.HTTPConnection(rig.vip, timeout=20)) as connection:
        connection.putrequest(method, path, skip_host=bool(headers and "Host" in headers))
        for name, value in (headers or {}).items():
            connection.putheader(name, value)
        connection.endheaders()
        answer = connection.getresponse()
        return answer.status, answer.headers, answer.read()


@pytest.mark.parametrize("path", [
    "/media/photos/%00.png", "/media/photos/a%00b.png", "/media/photos/%0d%0aX-Evil:%201", "/media/photos/%ff%fe.png",
    "/media/photos/..%2f..%2f..%2fetc%2fpasswd", "/media/photos/%252e%252e/%252e%252e/etc/passwd",
    "/media/%2e%2e/_protected/x",
    "/media/photos/..;/x", "/media/photos/\\..\\..\\etc\\passwd", f"/media/photos/{'a' * 300}.png",
    f"/media/photos/{'a/' * 200}b.png", "/media//private/x", "/media/./private/x", "/media/%70rivate/x",
    "/%6dedia/private/x",
    "/static/../media/private/x", "/static/%2e%2e/%2e%2e/etc/passwd", "/_tribrick_errors/503.html", "/%5fprotected/x",
    "/private/..%2f..%2fetc%2fpasswd", "/private/%00", "/api/media/..%2f..%2fx", "/picture/99999999999999999999/",
])  # fmt: skip
def test_hostile_address(rig, path):
    status, headers, body = raw(rig, path)
    assert status in (302, 400, 401, 403, 404), f"{status} {body[:200]!r}"
    assert b"root:" not in body and "X-Evil" not in headers
    if path.startswith("/media/"):
        assert status in (400, 404), "a name that cannot be is not there; nobody is sent elsewhere for it"


POST = b"POST /login/ HTTP/1.1\r\nHost: x\r\nConnection: close\r\n"
HOSTILE = {
    "bytes": b"GET /caf\xc3\xa9 HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "two hosts": b"GET / HTTP/1.1\r\nHost: x\r\nHost: y\r\n\r\n",
    "no host": b"GET / HTTP/1.1\r\n\r\n",
    "long": b"GET /" + b"a" * 70_000 + b" HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n",
    "smuggled": POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /x HTTP/1.1\r\n\r\n",
    "two lengths": POST + b"Content-Length: 1\r\nContent-Length: 2\r\n\r\nab",
    "unknown coding": POST + b"Transfer-Encoding: xchunked\r\n\r\n0\r\n\r\n",
    "space": b"GET / HTTP/1.1\r\nHost : x\r\n\r\n",
    "version": b"GET / HTTP/9.9\r\nHost: x\r\nConnection: close\r\n\r\n",
}


@pytest.mark.parametrize("kind", HOSTILE)
def test_hostile_request(rig, kind):
    """Refused once, by nginx or behind it; the connection carries no second request."""
    with socket.create_connection((rig.vip, 80), timeout=20) as line:
        line.sendall(HOSTILE[kind])
        said = b""
        with contextlib.suppress(ConnectionResetError):
            while part := line.recv(65536):
                said += part
    assert said.count(b"HTTP/1.1 ") == 1, said[:500]
    assert int(said.split(b" ", 2)[1]) in (400, 403, 414, 501, 505), said[:300]
    assert rig.request("GET", SITE, "/", timeout=10).status_code == 200


def test_what_a_visitor_claims_is_not_believed(rig, private):
    row, _ = private
    for headers in (
        {"X-Accel-Redirect": f"/_protected/{row['name']}"}, {"X-Original-URL": f"/_protected/{row['name']}"},
        {"X-Forwarded-Host": "evil.example"}, {"X-Forwarded-For": "127.0.0.1"}, {"X-Tribrick-Missing": "1"},
        {"X-Forwarded-Proto": "https"}, {"X-HTTP-Method-Override": "DELETE"},
    ):  # fmt: skip
        status, told, body = raw(rig, "/", headers)
        assert status == 200 and b"evil.example" not in body and row["name"].encode() not in body, headers
        assert "evil" not in str(told)
    assert raw(rig, "/", {"Host": "evil.example"})[0] == 400, "only the site's own names"
