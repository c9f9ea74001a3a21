"""The pages of the example site, and its health addresses."""

from __future__ import annotations

import html
import re
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.test import Client
from example.gallery import health
from example.gallery.models import Picture, Version

from tribrick import catalog
from tribrick.models import MediaFile
from tribrick.probes import Probe
from tribrick.storage import StoredFile, VolumeStorage

FilesIn = Callable[[Path], list[str]]


@pytest.fixture
def site(static: None, media: Path, user: Any) -> Client:
    """A browser that is signed in and, as browsers do, checked for CSRF."""
    client = Client(enforce_csrf_checks=True, raise_request_exception=False)
    client.force_login(user)
    return client


@pytest.fixture
def visitor(static: None, media: Path, database: None) -> Client:
    return Client(raise_request_exception=False)


def form_of(client: Client, address: str) -> dict[str, str]:
    """Return the hidden fields of the upload form at *address*."""
    page = client.get(address).content.decode()
    form = re.search(r'<form class="upload".*?</form>', page, re.DOTALL)
    assert form, page
    return dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', form[0]))


def upload(client: Client, data: bytes, name: str = "a.png", address: str = "/upload/", **extra: Any) -> Any:
    file = SimpleUploadedFile("x", data)
    file._name = name  # type: ignore[attr-defined]
    fields = form_of(client, address) | extra.pop("fields", {}) | {"file": file}
    return client.post("/upload/", fields, **extra)


def test_sign_in_and_out(visitor: Client, user: Any) -> None:
    assert visitor.get("/upload/")["Location"] == "/login/?next=/upload/"
    assert visitor.get("/album/").status_code == 302
    wrong = visitor.post("/login/", {"username": "ada", "password": "wrong"})
    assert "do not match" in wrong.content.decode()
    right = visitor.post("/login/", {"username": "ada", "password": "a good password", "next": "/album/"})
    assert right["Location"] == "/album/"
    assert visitor.get("/album/").status_code == 200
    assert visitor.post("/logout/").status_code == 302
    assert visitor.get("/album/").status_code == 302


def test_upload_form_without_script(site: Client, media: Path, png: Any) -> None:
    response = upload(site, png(), "عکس ۲.png")
    picture = Picture.objects.get()
    assert (response.status_code, response["Location"]) == (302, f"/picture/{picture.pk}/")
    page = site.get(response["Location"]).content.decode()
    version = Version.objects.get()
    stored = version.file
    for text in ("عکس ۲.png", stored.name, stored.sha256, f"{stored.size} bytes", "by node7", "Versions"):
        assert text in page
    gallery = site.get("/").content.decode()
    assert f'src="/media/{version.thumbnail}"' in gallery
    assert "Served by <strong>node7</strong>" in gallery


def test_upload_by_script(site: Client, png: Any) -> None:
    answer = upload(site, png(), HTTP_ACCEPT="application/json")
    assert answer.status_code == 201
    told = answer.json()
    assert told["page"] == f"/picture/{Picture.objects.get().pk}/"
    assert told["node"] == "node7"
    refused = upload(site, b"", HTTP_ACCEPT="application/json")
    assert (refused.status_code, refused.json()["error"]) == (400, "empty_file")


def test_a_form_sent_twice_stores_one_file(site: Client, media: Path, files_in: FilesIn) -> None:
    fields = form_of(site, "/upload/")
    answers = [site.post("/upload/", fields | {"file": SimpleUploadedFile("a.txt", b"x")}) for _ in range(2)]
    assert answers[0]["Location"] == answers[1]["Location"]
    assert len(files_in(media)) == 1
    stale = site.post("/upload/", fields | {"file": SimpleUploadedFile("a.txt", b"y")})
    assert stale.status_code == 422
    assert "Please try again" in stale.content.decode()


@pytest.mark.parametrize(
    ("data", "status", "text"),
    [(b"", 400, "The file is empty."), (b"x" * 300_001, 413, "larger than"), (b"x" * 900_000, 413, "larger than")],
)
def test_refused_by_the_form(site: Client, media: Path, files_in: FilesIn, data: bytes, status: int, text: str) -> None:
    response = upload(site, data)
    assert response.status_code == status
    assert text in response.content.decode()
    assert files_in(media) == []


def test_forms_need_the_csrf_token(site: Client, media: Path, files_in: FilesIn, png: Any) -> None:
    assert upload(site, png(), fields={"csrfmiddlewaretoken": "x"}).status_code == 403
    assert files_in(media) == []
    upload(site, png())
    assert site.post(f"/picture/{Picture.objects.get().pk}/delete/").status_code == 403


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("../../x.png", "x.png"),
        ("a\u202egnp.exe", "agnp.exe"),
        ("a\nb.png", "ab.png"),
        ("n" * 300, "n" * 300),
        ("می\u200cروم 🏖️.png", "می\u200cروم 🏖️.png"),
        ("a & b's.png", "a &amp; b&#x27;s.png"),
    ],
)
def test_hostile_and_foreign_names(site: Client, name: str, shown: str, png: Any) -> None:
    response = upload(site, png(), name)
    page = site.get(response["Location"])
    assert f"<bdi>{shown}</bdi></h1>" in page.content.decode()
    assert "\u202e" not in page.content.decode()


def test_versions_and_delete(site: Client, media: Path, files_in: FilesIn, png: Any) -> None:
    address = upload(site, png(1), "one.png")["Location"]
    assert upload(site, png(2), "two.png", address=address)["Location"] == address
    page = site.get(address).content.decode()
    assert '<li value="2">' in page
    assert '<li value="1">' in page
    assert "<bdi>two.png</bdi></h1>" in page
    assert len(files_in(media)) == 4
    token = form_of(site, address)["csrfmiddlewaretoken"]
    response = site.post(address + "delete/", {"csrfmiddlewaretoken": token})
    assert response["Location"] == "/"
    assert site.get(address).status_code == 404
    assert files_in(media) == []
    assert list(MediaFile.objects.values_list("state", flat=True)) == ["purged"] * 4
    assert "Nothing here yet" in site.get("/").content.decode()


def test_another_user_may_look_but_not_touch(site: Client, other: Any, png: Any) -> None:
    address = upload(site, png())["Location"]
    bob = Client()
    bob.force_login(other)
    page = bob.get(address).content.decode()
    assert "Delete" not in page
    assert "new version" not in page
    assert bob.post(address + "delete/").status_code == 403
    pk = address.split("/")[2]
    reply = bob.post("/upload/", {"picture": pk, "file": SimpleUploadedFile("x.txt", b"x")})
    assert reply.status_code == 403
    assert Picture.objects.get().current.file.version == 1


def test_private_album(site: Client, visitor: Client, other: Any, png: Any) -> None:
    address = upload(site, png(), "نامه.png", fields={"private": "1"})["Location"]
    stored, thumbnail = Version.objects.get().file.name, Version.objects.get().thumbnail.name
    assert stored.startswith("private/")
    assert thumbnail.startswith("private/")
    album = site.get("/album/").content.decode()
    assert f'src="/{thumbnail}"' in album
    assert thumbnail not in site.get("/").content.decode()
    for name, kind in ((stored, "image/png"), (thumbnail, "image/jpeg")):
        got = site.get(f"/{name}")
        assert (got.status_code, got["X-Accel-Redirect"]) == (200, f"/_protected/{name}")
        assert got["Content-Type"] == kind
        assert got["Cache-Control"] == "private, max-age=3600"
        assert got["X-Content-Type-Options"] == "nosniff"
        assert "sandbox" in got["Content-Security-Policy"]
        assert "filename*=utf-8''%D9%86" in got["Content-Disposition"]
        assert got.content == b""
    bob = Client()
    bob.force_login(other)
    for client in (visitor, bob):
        assert client.get(f"/{stored}").status_code == 404
        assert client.get(f"/{thumbnail}").status_code == 404
        assert client.get(address).status_code == 404
        assert "X-Accel-Redirect" not in client.get(f"/{stored}")
    assert "نامه" not in bob.get("/album/").content.decode()
    assert site.get("/private/../photos/x").status_code == 404


def test_a_link_shows_a_private_file_to_everybody_until_its_time(site: Client, visitor: Client, png: Any) -> None:
    address = upload(site, png(), fields={"private": "1"})["Location"]
    upload(site, png(1), fields={"private": "1"})
    stored, other = (version.file.name for version in Version.objects.order_by("pk"))
    shown = site.get(address).content.decode()
    link = html.unescape(re.search(rf'href="(/{re.escape(stored)}\?[^"]+)"', shown)[1])  # type: ignore[index]
    got = visitor.get(link)
    assert (got.status_code, got["X-Accel-Redirect"]) == (200, f"/_protected/{stored}")
    assert got["Cache-Control"].startswith("private")
    until = re.search(r"until=(\d+)", link)[1]  # type: ignore[index]
    later = str(int(until) + 1)
    for wrong in (
        link.replace(stored, other), link.replace(until, later), link[:-1], link.replace("signature", "x"),
        link.replace(until, "%00"), f"{link}%C3%A9", f"/{stored}?until={later}", f"/{stored}",
    ):  # fmt: skip
        assert visitor.get(wrong).status_code == 404, wrong
    with mock.patch("time.time", return_value=float(until)):
        assert visitor.get(link).status_code == 404
    assert site.post(f"{address}delete/", form_of(site, address)).status_code == 302
    assert visitor.get(link).status_code == 404


def test_files_that_a_browser_might_run_are_attachments(site: Client) -> None:
    upload(site, b"<svg onload=alert(1)>", "x.svg", fields={"private": "1"})
    got = site.get("/" + Version.objects.get().file.name)
    assert got["Content-Type"] == "application/octet-stream"
    assert got["Content-Disposition"].startswith("attachment")


def test_without_nginx_the_site_sends_private_files(site: Client, png: Any, settings_of: Any) -> None:
    upload(site, png(), fields={"private": "1"})
    with settings_of(TRIBRICK_ACCEL_PREFIX=""):
        got = site.get("/" + Version.objects.get().file.name)
        assert b"".join(got.streaming_content) == png()  # type: ignore[attr-defined]
        got.close()


@pytest.fixture
def settings_of() -> Any:
    from django.test import override_settings

    return override_settings


def test_broken_pictures_get_a_placeholder(site: Client) -> None:
    upload(site, b"no picture", "broken.jpg")
    page = site.get("/")
    assert page.status_code == 200
    assert '<span class="placeholder">JPG</span>' in page.content.decode()


def test_pages_by_key(visitor: Client, user: Any) -> None:
    for number in range(50):
        picture = Picture.objects.create(owner=user)
        stored = StoredFile(f"photos/{number}", "0" * 64, 1)
        file = catalog.record(stored, original=f"n{number:02}.x", owner=user)
        picture.current = Version.objects.create(picture=picture, file=file)
        picture.save()
    seen: list[str] = []
    address, pages = "/", 0
    while address:
        page = visitor.get(address).content.decode()
        seen += re.findall(r"<bdi>(n\d\d)\.x</bdi>", page)
        older = re.search(r'href="(\?before=\d+)"', page)
        address, pages = "/" + older[1] if older else "", pages + 1
    assert seen == [f"n{number:02}" for number in range(49, -1, -1)]
    assert pages == 3
    for bad in ("x", "-1", "٣", "9" * 19):
        assert visitor.get("/", {"before": bad}).status_code == 404


def test_a_page_costs_the_same_number_of_queries(visitor: Client, user: Any, site: Client, png: Any) -> None:
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    counts = []
    for shade in range(3):
        upload(site, png(shade))
        with CaptureQueriesContext(connection) as queries:
            visitor.get("/")
        counts.append(len(queries))
    assert counts[0] == counts[2] == 1


@pytest.mark.parametrize("address", ["/?before=500", "/album/?before=500", "/api/media/?before=500"])
def test_pages_walk_an_index(site: Client, address: str) -> None:
    from django.db import connection
    from django.test.utils import CaptureQueriesContext

    with CaptureQueriesContext(connection) as queries:
        assert site.get(address, HTTP_AUTHORIZATION="Token secret-of-ada").status_code == 200
    page = [query["sql"] for query in queries.captured_queries if "ORDER BY" in query["sql"]][-1]
    with connection.cursor() as cursor:
        cursor.execute("SET enable_seqscan = off")  # the tables are too small to be worth an index
        cursor.execute("SET enable_bitmapscan = off")
        cursor.execute(f"EXPLAIN {page}")
        plan = "\n".join(row[0] for row in cursor.fetchall())
    connection.close()
    assert "Index" in plan
    assert "Sort" not in plan, plan
    assert "Seq Scan" not in plan, plan


# Headers


def test_headers(visitor: Client) -> None:
    response = visitor.get("/")
    assert "default-src 'self'" in response["Content-Security-Policy"]
    assert response["X-Frame-Options"] == "DENY"
    assert response["X-Content-Type-Options"] == "nosniff"
    page = response.content.decode()
    assert not re.search(r"(src|href)=\"(https?:)?//", page)  # nothing from elsewhere
    assert re.search(r'src="/static/gallery/site\.[0-9a-f]{12}\.js"', page)


@pytest.mark.parametrize(("scheme", "secure"), [("http", ""), ("https", True)])
def test_cookies_are_secure_where_the_request_is(visitor: Client, scheme: str, secure: object) -> None:
    visitor.get("/login/", HTTP_X_FORWARDED_PROTO=scheme)
    assert visitor.cookies["csrftoken"]["secure"] == secure


# Away


def test_pages_without_the_database(site: Client, database_away: Any, png: Any) -> None:
    fields = form_of(site, "/upload/")
    with database_away():
        answers = [site.get("/"), site.post("/upload/", fields | {"file": SimpleUploadedFile("a", b"x")})]
    for answer in answers:
        assert answer.status_code == 503
        assert int(answer["Retry-After"]) > 0
        assert "The database is not available" in answer.content.decode()
        assert "node7" in answer.content.decode()


def test_upload_without_the_volume(site: Client, media: Path) -> None:
    fields = form_of(site, "/upload/")
    (media / ".tribrick-volume").rename(media / "away")
    answer = site.post("/upload/", fields | {"file": SimpleUploadedFile("a", b"x")})
    assert answer.status_code == 503
    assert "The media storage is not available" in answer.content.decode()
    assert site.get("/").status_code == 200


def test_sign_in_without_the_database(visitor: Client, database_away: Any) -> None:
    with database_away():
        assert visitor.post("/login/", {"username": "a", "password": "b"}).status_code == 503


# Health


def test_healthz_touches_nothing(static: None, database_away: Any) -> None:
    with database_away():
        response = Client().get("/healthz", HTTP_HOST="198.18.0.11")
    assert (response.status_code, response.json()) == (200, {"status": "alive", "node": "node7"})


def test_ready(visitor: Client) -> None:
    response = visitor.get("/readyz", HTTP_HOST="198.18.0.11")
    assert response.status_code == 200
    answer = response.json()
    assert (answer["status"], answer["node"]) == ("ready", "node7")
    assert {name: check["ok"] for name, check in answer["checks"].items()} == {"mount": True, "database": True}
    assert response["Cache-Control"] == "no-store"


def test_not_ready_without_the_mount(visitor: Client, media: Path) -> None:
    (media / ".tribrick-volume").unlink()
    response = visitor.get("/readyz")
    assert response.status_code == 503
    checks = response.json()["checks"]
    assert not checks["mount"]["ok"]
    assert "has no .tribrick-volume" in checks["mount"]["detail"]
    assert checks["database"]["ok"]


def test_not_ready_without_the_database(visitor: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from django.db import connections

    # The probe's thread makes its connection from the shared settings.
    monkeypatch.setitem(connections.settings["default"], "HOST", "/nowhere")
    response = visitor.get("/readyz")
    assert response.status_code == 503
    checks = response.json()["checks"]
    assert checks["mount"]["ok"]
    assert not checks["database"]["ok"]
    assert "/nowhere" in checks["database"]["detail"]


def test_not_ready_on_a_read_only_database(visitor: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    from django.db import connections

    options = connections.settings["default"]["OPTIONS"]
    monkeypatch.setitem(options, "options", "-c default_transaction_read_only=on")
    checks = visitor.get("/readyz").json()["checks"]
    assert (checks["database"]["ok"], checks["database"]["detail"]) == (False, "the database is read-only")


def test_ready_answers_in_time_while_both_hang(monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    probes = tuple(Probe(name, lambda: gate.wait(30), deadline=1.0) for name in ("mount", "database"))
    try:
        begin = time.monotonic()
        response = health.readyz(probes)
        assert time.monotonic() - begin < 1.9  # together, not one after the other
        assert response.status_code == 503
        assert b"timed out after 1 s" in response.content
        begin = time.monotonic()
        for _ in range(20):
            assert health.readyz(probes).status_code == 503
        assert time.monotonic() - begin < 5  # at once, each of them
    finally:
        gate.set()


def test_hung_mount_does_not_hang_the_request(visitor: Client, monkeypatch: pytest.MonkeyPatch) -> None:
    gate = threading.Event()
    monkeypatch.setattr(VolumeStorage, "verify", lambda self: gate.wait(30))
    monkeypatch.setattr(health.MOUNT, "deadline", 0.2)
    try:
        begin = time.monotonic()
        answer = visitor.get("/readyz")
        assert time.monotonic() - begin < 1.5
        assert answer.status_code == 503
        assert "timed out" in answer.json()["checks"]["mount"]["detail"]
    finally:
        gate.set()
        for thread in threading.enumerate():
            if thread.name == "probe-mount":
                thread.join(10)


def test_the_admin_shows_the_files(site: Client, user: Any, png: Any) -> None:
    upload(site, png())
    user.is_staff = user.is_superuser = True
    user.save()
    file = Version.objects.get().file
    assert file.name in site.get("/admin/tribrick/mediafile/").content.decode()
    assert site.get("/admin/tribrick/mediafile/add/").status_code == 403


def test_monitors_ask_with_head(visitor: Client) -> None:
    for address in ("/", "/accounts/login/", "/healthz"):
        assert visitor.head(address).status_code == visitor.get(address).status_code != 405, address
