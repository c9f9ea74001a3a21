"""What nginx sends with media, what it refuses, and uploads meant to harm."""

from __future__ import annotations

import http.client
import re
import secrets
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from urllib.parse import quote, urlsplit

import pytest
import requests

from helpers import LONG, NODES, picture

WEB = NODES if LONG else ("node1",)


@pytest.fixture(scope="module")
def row(rig):
    return rig.upload("node1", picture(50_000))


@pytest.mark.parametrize("node", WEB)
def test_headers_of_a_picture(rig, row, node):
    answer = rig.fetch(node, row)
    assert answer.headers["Content-Type"] == "image/png"
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in answer.headers["Content-Security-Policy"]
    assert "immutable" in answer.headers["Cache-Control"]
    assert "attachment" not in answer.headers.get("Content-Disposition", "")
    again = rig.fetch(node, row, headers={"If-None-Match": answer.headers["ETag"]})
    assert again.status_code == 304


def test_files_that_may_change_are_asked_for_each_time(rig):
    rig.root("node1", "install -d -o tribrick -g tribrick /srv/media/derived && echo one >/srv/media/derived/thumb.jpg")
    answer = rig.request("GET", "node1", "/media/derived/thumb.jpg")
    assert (answer.status_code, answer.headers["Cache-Control"]) == (200, "no-cache")
    rig.root("node1", "rm -r /srv/media/derived")


@pytest.mark.parametrize("node", WEB)
def test_range(rig, row, node):
    whole = rig.fetch(node, row).content
    part = rig.fetch(node, row, headers={"Range": "bytes=100-299"})
    assert part.status_code == 206
    assert part.headers["Content-Range"] == f"bytes 100-299/{len(whole)}"
    assert part.content == whole[100:300]
    assert rig.fetch(node, row, headers={"Range": f"bytes={len(whole)}-"}).status_code == 416


@pytest.mark.parametrize("name", ["evil.svg", "evil.html", "evil.xml", "evil.xhtml", "evil.js", "evil"])
def test_active_content_is_only_ever_downloaded(rig, name):
    script = b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    row = rig.upload("node1", script, name)
    answer = rig.fetch("node2", row)
    assert answer.status_code == 200
    assert answer.headers["Content-Disposition"].startswith("attachment")
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert "sandbox" in answer.headers["Content-Security-Policy"]


@pytest.mark.parametrize("method", ["POST", "PUT", "DELETE", "PATCH", "OPTIONS", "PROPFIND"])
def test_only_get_and_head_on_media(rig, row, method):
    assert rig.request(method, "node1", urlsplit(row["url"]).path).status_code == 405
    assert rig.fetch("node1", row).status_code == 200


@pytest.mark.parametrize("path", [
    "/media/.tribrick-volume", "/media/.glusterfs/", "/media/.glusterfs/health_check", "/media/photos/",
    "/media/photos/0/.part", "/media/../../etc/passwd", "/media/%2e%2e/%2e%2e/etc/passwd",
    "/media/photos/..%2f..%2fetc", "/_protected/.tribrick-volume", "/static/.hidden",
])
def test_denied_names(rig, path):
    connection = http.client.HTTPConnection(rig.address("node1"), timeout=10)
    connection.request("GET", path)
    answer = connection.getresponse()
    body = answer.read()
    assert answer.status in (400, 403, 404), f"{path}: {answer.status} {body[:200]!r}"
    assert b"root:" not in body


def test_private_file_only_by_the_site(rig):
    content = picture()
    answer = rig.try_upload("node1", content, data={"private": "1"})
    assert answer.status_code == 201
    row = answer.json()
    assert row["name"].startswith("private/")
    for node in NODES:
        assert rig.request("GET", node, f"/media/{row['name']}").status_code == 404
        assert rig.request("GET", node, f"/_protected/{row['name']}").status_code == 404
        assert rig.fetch(node, row).status_code in (302, 401, 403, 404)  # nobody
        mine = rig.fetch(node, row, headers=rig.auth)
        assert mine.status_code == 200
        assert mine.content == content
        assert "private" in mine.headers["Cache-Control"]


def test_https_answers_too(rig, row):
    url = f"https://{rig.address('node1')}{urlsplit(row['url']).path}"
    answer = requests.get(url, timeout=10, verify=False)  # noqa: S501 - the lab's certificate is generated
    assert answer.status_code == 200


# --- uploads


def raw_upload(rig, filename: bytes, content: bytes, path: str = "/api/media/") -> requests.Response:
    """Send a multipart body as it is, since every library mends such names."""
    mark = secrets.token_hex(16).encode()
    body = (
        b"--" + mark + b'\r\nContent-Disposition: form-data; name="file"; filename="' + filename
        + b'"\r\nContent-Type: image/png\r\n\r\n' + content + b"\r\n--" + mark + b"--\r\n"
    )
    headers = {**rig.auth, "Content-Type": f"multipart/form-data; boundary={mark.decode()}"}
    return rig.request("POST", "node1", path, headers=headers, data=body)


HOSTILE = {
    "parent": b"../../../../etc/cron.d/evil.png",
    "backslash": b"..\\..\\evil.png",
    "absolute": b"/etc/passwd",
    "nul": b"evil\x00.png",
    "newline": b"evil\nname.png",
    "bidi": "evil\u202egnp.exe".encode(),
    "dots": b"..",
    "dot": b".htaccess",
    "glusterfs": b".glusterfs",
    "quote": b"a%22b.png",
    "script": b"<script>alert(1)</script>.png",
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_name_is_made_safe_or_refused(rig, name):
    content = picture(500)
    answer = raw_upload(rig, HOSTILE[name], content)
    assert answer.status_code in (201, 400), f"{answer.status_code}: {answer.text[:300]}"
    if answer.status_code == 400:
        assert answer.json()["error"]
        return
    row = answer.json()
    assert re.fullmatch(r"photos/[0-9a-f]/[0-9a-f]/[a-z0-9-]+(\.[a-z0-9]{1,10})?", row["name"]), row
    assert rig.fetch("node3", row).content == content
    original = rig.request("GET", "node2", f"/api/media/{quote(row['name'])}", headers=rig.auth).json()["original"]
    assert not any(unicodedata.category(c) == "Cc" or c in "\u202a\u202b\u202c\u202d\u202e/\\" for c in original)


# In order: long; Persian with a non-joiner; Arabic; emoji with joiners; Latin with marks and an ampersand.
ANY_SCRIPT = [
    "x" * 296 + ".png",
    "\u062a\u0635\u0648\u06cc\u0631 \u0645\u06cc\u200c\u062e\u0648\u0627\u0647\u0645.png",
    "\u0635\u0648\u0631\u0629 \u062c\u0645\u064a\u0644\u0629.png",
    "\U0001f469\u200d\U0001f469\u200d\U0001f467 \U0001f389.png",
    "Grüße & Küsse.png",
]


@pytest.mark.parametrize("original", ANY_SCRIPT, ids=["long", "persian", "arabic", "emoji", "latin"])
def test_name_of_any_script_is_kept_and_shown(rig, original):
    answer = raw_upload(rig, original.encode(), picture(500))
    assert answer.status_code == 201, answer.text[:300]
    row = answer.json()
    assert row["name"].isascii()
    assert len(row["name"]) < 150
    told = rig.request("GET", "node2", f"/api/media/{row['name']}", headers=rig.auth).json()
    assert told["original"] == original


def signed_in(rig) -> requests.Session:
    session = requests.Session()
    url = rig.url("node1")
    session.get(f"{url}/login/", timeout=30)
    answer = session.post(f"{url}/login/", timeout=30, headers={"Referer": f"{url}/login/"}, data={
        "username": "tester", "password": rig.password, "csrfmiddlewaretoken": session.cookies["csrftoken"],
    })
    assert answer.status_code == 200
    assert "sessionid" in session.cookies, answer.text[:500]
    return session


def form_upload(rig, session: requests.Session, content: bytes, name: str = "form.png") -> requests.Response:
    url = f"{rig.url('node1')}/upload/"
    page = session.get(url, timeout=30)
    token = re.search(r'name="csrfmiddlewaretoken" value="([^"]+)"', page.text)
    assert token
    return session.post(url, timeout=120, headers={"Referer": url}, data={"csrfmiddlewaretoken": token[1]},
                        files={"file": (name, content)}, allow_redirects=False)


def test_sizes_are_refused_by_api_and_form(rig):
    limit = int(rig.variables["tribrick_max_upload_mib"]) << 20
    session = signed_in(rig)
    assert rig.try_upload("node1", b"").status_code == 400
    assert form_upload(rig, session, b"").status_code == 400
    large = bytes(limit + 1)
    over = rig.try_upload("node1", large, timeout=120)
    assert over.status_code == 413, over.text[:300]
    assert form_upload(rig, session, large).status_code == 413
    huge = rig.try_upload("node1", bytes(limit + (3 << 20)), timeout=120)  # nginx refuses this one
    assert huge.status_code == 413
    # The way is open for what is allowed: the refusals above mean something.
    answer = form_upload(rig, session, picture())
    assert answer.status_code == 302, answer.text[:500]
    assert answer.headers["Location"].startswith("/picture/")


def test_largest_allowed_upload(rig):
    limit = int(rig.variables["tribrick_max_upload_mib"]) << 20
    content = picture(limit - 200)
    content += bytes(limit - len(content))
    row = rig.upload("node1", content, timeout=180)
    assert row["size"] == limit
    assert rig.fetch("node2", row, timeout=120).content == content
    assert rig.request("DELETE", "node1", f"/api/media/{row['name']}", headers=rig.auth).status_code == 204
    del rig.known[row["name"]]


def test_idempotency_key(rig):
    key, content = {"Idempotency-Key": secrets.token_hex(16)}, picture()
    first = rig.upload("node1", content, headers=key)
    assert rig.upload("node2", content, headers=key) == first
    other = rig.try_upload("node3", picture(), headers=key)
    assert other.status_code == 422, other.text[:300]
    # The same key sent to all nodes at the same moment makes one file.
    key, content = {"Idempotency-Key": secrets.token_hex(16)}, picture()
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda node: rig.try_upload(node, content, headers=key), NODES * 2))
    assert {a.status_code for a in answers} <= {201, 409}, [a.text[:200] for a in answers]
    assert len({a.json()["name"] for a in answers if a.status_code == 201}) == 1


@pytest.mark.parametrize("header", [{}, {"Authorization": "Token wrong"}])
def test_api_needs_a_token(rig, header):
    answer = rig.request("POST", "node1", "/api/media/", headers=header, files={"file": ("a.png", picture())})
    assert answer.status_code == 401
