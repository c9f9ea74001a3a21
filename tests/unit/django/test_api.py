"""The API of the example site, on PostgreSQL and a real directory."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import io
import re
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.core.files.uploadedfile import SimpleUploadedFile
from django.db import OperationalError, connection, connections
from django.test import Client, override_settings
from django.test.client import BOUNDARY, MULTIPART_CONTENT, encode_multipart
from example.gallery import services
from example.gallery.models import Picture, RequestKey, Version

from tribrick import catalog
from tribrick.models import MediaFile
from tribrick.signature import EMPTY, verify
from tribrick.storage import VolumeStorage
from tribrick.storage import volume as module

pytestmark = pytest.mark.usefixtures("static", "media", "user")
FilesIn = Callable[[Path], list[str]]
ROOT = "/api/media/"


class Api:
    """A client with a token."""

    def __init__(self, token: str = "secret-of-ada") -> None:  # noqa: S107
        self.client = Client(raise_request_exception=False)
        self.headers = {"HTTP_AUTHORIZATION": f"Token {token}"}

    def send(self, method: str, path: str, data: bytes | None = None, name: str = "a.png", **extra: Any) -> Any:
        headers = self.headers | {f"HTTP_{k.upper()}": v for k, v in extra.pop("headers", {}).items()}
        if data is None:
            return self.client.generic(method, path, **headers, **extra)
        fields = extra.pop("fields", {}) | {"file": SimpleUploadedFile("x", data)}
        fields["file"]._name = name  # in full: Django would cut it at 255 characters
        body = encode_multipart(BOUNDARY, fields)
        return self.client.generic(method, path, body, MULTIPART_CONTENT, **headers, **extra)

    def post(self, data: bytes, name: str = "a.png", **extra: Any) -> Any:
        return self.send("POST", ROOT, data, name, **extra)


@pytest.fixture
def api() -> Api:
    return Api()


def refused(response: Any, status: int, code: str) -> None:
    assert (response.status_code, response["Content-Type"]) == (status, "application/json")
    answer = response.json()
    assert answer["error"] == code
    assert set(answer) == {"error", "detail"}
    assert answer["detail"].endswith(".")


# Upload


def test_upload(api: Api, media: Path, files_in: FilesIn, png: Any) -> None:
    response = api.post(png(), "Holiday 1.PNG")
    assert response.status_code == 201
    answer = response.json()
    assert set(answer) == {"url", "name", "sha256", "size", "node"}
    assert re.fullmatch(r"photos/[0-9a-f]/[0-9a-f]/holiday-1-[a-z2-7]{20}\.png", answer["name"])
    assert answer["url"] == "/media/" + answer["name"]
    assert answer["node"] == "node7"
    assert (answer["sha256"], answer["size"]) == (hashlib.sha256(png()).hexdigest(), len(png()))
    assert (media / answer["name"]).read_bytes() == png()
    assert response["Location"] == ROOT + answer["name"]

    row = api.send("GET", response["Location"]).json()
    assert row | answer == row
    assert (row["original"], row["content_type"], row["version"]) == ("Holiday 1.PNG", "image/png", 1)
    assert (row["width"], row["height"]) == (64, 48)
    thumbnail = row["thumbnail"].removeprefix("/media/")
    assert files_in(media) == sorted([answer["name"], thumbnail])
    assert (media / thumbnail).read_bytes().startswith(b"\xff\xd8\xff")


@pytest.mark.parametrize(
    ("name", "shown", "stem"),
    [
        ("../../etc/passwd", "passwd", "passwd-"),
        ("..\\..\\x.png", "x.png", "x-"),
        ("a\nb.png", "ab.png", "ab-"),
        ("a\0b.png", "ab.png", "ab-"),
        ("photo\u202egnp.exe", "photognp.exe", "photognp-"),
        ("می\u200cروم.png", "می\u200cروم.png", "file-"),
        ("صورة جميلة.png", "صورة جميلة.png", "file-"),
        ("👩\u200d👩\u200d👧 🏖️.png", "👩\u200d👩\u200d👧 🏖️.png", "file-"),
        ("n" * 296 + ".png", "n" * 296 + ".png", "n" * 60 + "-"),
        ("ب" * 300, "ب" * 300, "file-"),
        ("<script>alert(1)</script>.png", "script>.png", "script-"),
    ],
)
def test_names(api: Api, name: str, shown: str, stem: str, media: Path, png: Any) -> None:
    response = api.post(png(), name)
    assert response.status_code == 201
    stored = response.json()["name"]
    assert re.fullmatch(r"photos/[0-9a-f]/[0-9a-f]/[a-z0-9.-]+", stored)
    assert stored.rpartition("/")[2].startswith(stem)
    assert (media / stored).is_file()
    assert api.send("GET", ROOT + stored).json()["original"] == shown


@pytest.mark.parametrize(
    ("data", "name", "kind"),
    [
        (b"<html><script>", "x.html", "application/octet-stream"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "x.svg", "application/octet-stream"),
        (b"not a picture", "x.png", "application/octet-stream"),
        (b"%PDF-1.4", "x.pdf", "application/pdf"),
        (b"\x89PNG\r\n\x1a\n" + b"\0" * 100, "torn.png", "application/octet-stream"),
    ],
)
def test_files_that_are_no_pictures(api: Api, data: bytes, name: str, kind: str) -> None:
    response = api.post(data, name)
    assert response.status_code == 201
    row = api.send("GET", response["Location"]).json()
    assert (row["content_type"], row["thumbnail"], row["width"]) == (kind, "", None)


def test_type_comes_from_the_bytes(api: Api, png: Any) -> None:
    response = api.post(png(), "movie.mp4")
    assert api.send("GET", response["Location"]).json()["content_type"] == "image/png"


def test_a_decompression_bomb_has_no_thumbnail(api: Api) -> None:
    from PIL import Image

    out = io.BytesIO()
    Image.new("1", (12_000, 12_000)).save(out, "PNG")  # some KB that would be 144 million pixels
    response = api.post(out.getvalue(), "bomb.png")
    assert response.status_code == 201
    row = api.send("GET", response["Location"]).json()
    assert (row["thumbnail"], row["content_type"]) == ("", "image/png")


def test_private_files(api: Api, other: Any, png: Any) -> None:
    response = api.post(png(), fields={"private": "1"})
    answer = response.json()
    assert answer["name"].startswith("private/")
    assert answer["url"] == "/" + answer["name"]
    assert api.send("GET", response["Location"]).json()["private"] is True
    got = api.send("GET", answer["url"])
    assert (got.status_code, got["X-Accel-Redirect"]) == (200, "/_protected/" + answer["name"])
    assert "X-Tribrick-Signed" not in got
    with override_settings(TRIBRICK_STANDBY_KEY="secret"):
        signed = api.send("GET", answer["url"])["X-Tribrick-Signed"]
    assert verify(signed, {"site": "secret"}, "GET", answer["name"]) == EMPTY
    assert "link" not in api.send("GET", response["Location"]).json()
    link = api.send("GET", response["Location"] + "?link=60").json()["link"]
    assert Client().get(link)["X-Accel-Redirect"] == "/_protected/" + answer["name"]
    for seconds in ("0", "-1", "9" * 9, "x"):
        refused(api.send("GET", f"{response['Location']}?link={seconds}"), 400, "bad_request")
    bob = Api("secret-of-bob")
    for method in ("GET", "DELETE"):
        refused(bob.send(method, response["Location"]), 404, "not_found")
        refused(bob.send(method, response["Location"] + "?link=60"), 404, "not_found")
    refused(bob.send("PUT", response["Location"], png()), 404, "not_found")
    assert bob.send("GET", answer["url"]).status_code == 404


# Refusals


def test_missing_or_empty_file(api: Api, media: Path, files_in: FilesIn) -> None:
    refused(api.post(b""), 400, "empty_file")
    body = encode_multipart(BOUNDARY, {"other": SimpleUploadedFile("x.png", b"x"), "text": "y"})
    response = api.client.generic("POST", ROOT, body, MULTIPART_CONTENT, **api.headers)
    refused(response, 400, "missing_file")
    refused(api.send("POST", ROOT), 415, "not_multipart")
    broken = api.client.generic("POST", ROOT, b"x", "multipart/form-data", **api.headers)
    refused(broken, 400, "bad_request")
    chunked = {"HTTP_TRANSFER_ENCODING": "chunked", "CONTENT_LENGTH": ""} | api.headers
    refused(api.client.generic("POST", ROOT, b"", MULTIPART_CONTENT, **chunked), 411, "length_required")
    assert files_in(media) == []
    assert not MediaFile.objects.exists()


@pytest.mark.parametrize("method", ["POST", "PUT"])
def test_too_large(api: Api, media: Path, files_in: FilesIn, method: str) -> None:
    from django.conf import settings

    path = ROOT
    if method == "PUT":
        path += api.post(b"first", "a.txt").json()["name"]
    before = files_in(media)
    limit = settings.TRIBRICK_MAX_UPLOAD_BYTES
    refused(api.send(method, path, b"x" * (limit + 1), "a.txt"), 413, "too_large")
    refused(api.send(method, path, b"x" * (limit * 4), "a.txt"), 413, "too_large")
    assert files_in(media) == before
    assert api.send(method, path, b"x" * limit, "a.txt").status_code == 201


def test_a_too_large_body_is_not_read_to_its_end(api: Api) -> None:
    data = encode_multipart(BOUNDARY, {"file": SimpleUploadedFile("x", b"x" * 5_000_000)})
    body = io.BytesIO(data)
    extra = {"wsgi.input": body, "CONTENT_LENGTH": str(len(data))} | api.headers
    refused(api.client.generic("POST", ROOT, b".", MULTIPART_CONTENT, **extra), 413, "too_large")
    assert body.tell() == 0  # its own word was enough
    with override_settings(TRIBRICK_MAX_UPLOAD_BYTES=4_800_000):
        refused(api.client.generic("POST", ROOT, b".", MULTIPART_CONTENT, **extra), 413, "too_large")
    assert 4_800_000 < body.tell() < 4_999_000


def test_tokens(api: Api, png: Any, user: Any) -> None:
    for headers in ({}, {"HTTP_AUTHORIZATION": "Token wrong"}, {"HTTP_AUTHORIZATION": "Basic c2Vj"}):
        response = Client().post(ROOT, **headers)  # type: ignore[arg-type]
        refused(response, 401, "unauthorized")
        assert response["WWW-Authenticate"] == "Token"
    client = Client()
    client.force_login(user)
    refused(client.get(ROOT), 401, "unauthorized")  # a cookie is not enough
    user.is_active = False
    user.save()
    refused(api.post(png()), 401, "unauthorized")


def test_other_methods_and_addresses(api: Api) -> None:
    response = api.send("DELETE", ROOT)
    refused(response, 405, "method_not_allowed")
    assert response["Allow"] == "GET, HEAD, POST"
    assert api.send("HEAD", ROOT).status_code == 200
    for method in ("GET", "DELETE"):
        refused(api.send(method, ROOT + "photos/none.png"), 404, "not_found")
    refused(api.send("PUT", ROOT + "photos/none.png", b"x"), 404, "not_found")
    refused(api.send("GET", ROOT + "a%00b"), 404, "not_found")
    refused(api.send("GET", "/api/other"), 404, "not_found")


def test_listing_is_by_key(api: Api, other: Any) -> None:
    names = [api.post(b"x", f"{number}.txt").json()["name"] for number in range(5)]
    Api("secret-of-bob").post(b"x", "bob.txt")
    api.send("DELETE", ROOT + names.pop(2))
    seen: list[str] = []
    address: str | None = ROOT + "?limit=2"
    while address:
        page = api.send("GET", address).json()
        assert len(page["results"]) <= 2
        seen += [row["name"] for row in page["results"]]
        address = page["next"]
    assert seen == names[::-1]
    for query in ("limit=0", "limit=201", "limit=x", "before=-1", "before=%D9%A3"):
        refused(api.send("GET", f"{ROOT}?{query}"), 400, "bad_request")


# Delete and replace


def test_delete(api: Api, media: Path, files_in: FilesIn, png: Any, other: Any) -> None:
    location = api.post(png())["Location"]
    refused(Api("secret-of-bob").send("DELETE", location), 403, "forbidden")
    assert len(files_in(media)) == 2
    response = api.send("DELETE", location)
    assert (response.status_code, response.content) == (204, b"")
    assert files_in(media) == []
    assert list(MediaFile.objects.values_list("state", flat=True)) == ["purged", "purged"]
    assert Picture.objects.get().current is None
    refused(api.send("GET", location), 404, "deleted")
    refused(api.send("PUT", location, png()), 409, "deleted")
    assert api.send("DELETE", location).status_code == 204
    assert files_in(media) == []


def test_bytes_stay_when_the_tombstone_is_not_committed(
    api: Api, media: Path, files_in: FilesIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    location = api.post(b"x", "a.txt")["Location"]
    with monkeypatch.context() as patch:
        patch.setattr(catalog, "_change", _raise(OperationalError("gone")))
        refused(api.send("DELETE", location), 503, "database_unavailable")
    assert len(files_in(media)) == 1
    assert api.send("GET", location).status_code == 200


def test_bytes_go_later_when_the_volume_is_away(api: Api, media: Path, files_in: FilesIn) -> None:
    location = api.post(b"x", "a.txt")["Location"]
    with no_sentinel(media):
        assert api.send("DELETE", location).status_code == 204
    refused(api.send("GET", location), 404, "deleted")
    assert len(files_in(media)) == 1
    assert catalog.finish_deletes() == (1, 0)
    assert catalog.finish_deletes() == (0, 0)
    assert files_in(media) == []


def test_versions(api: Api, media: Path, other: Any) -> None:
    first = api.post(b"one", "a.txt")["Location"]
    response = api.send("PUT", first, b"two", "b.txt")
    assert response.status_code == 201
    second = response["Location"]
    assert second != first
    assert set(response.json()) == {"url", "name", "sha256", "size", "node"}
    rows = [api.send("GET", location).json() for location in (first, second)]
    assert [(row["version"], row["original"]) for row in rows] == [(1, "a.txt"), (2, "b.txt")]
    assert rows[0]["picture"] == rows[1]["picture"]
    assert [(media / row["name"]).read_bytes() for row in rows] == [b"one", b"two"]
    refused(Api("secret-of-bob").send("PUT", first, b"x"), 403, "forbidden")

    assert api.send("DELETE", second).status_code == 204
    assert Picture.objects.get().current.file.name == rows[0]["name"]
    assert api.send("PUT", first, b"three").status_code == 201
    assert Picture.objects.get().current.file.version == 3  # a version's number is not used twice
    assert api.send("GET", first).status_code == 200


def test_the_catalog_decides_what_is_shown(api: Api, media: Path, files_in: FilesIn, png: Any) -> None:
    """What the admin and ``tribrick versions`` do is seen on the pages at once."""
    location = api.post(png(1), "a.png")["Location"]
    old, new = (MediaFile.objects.get(name=at.removeprefix(ROOT)) for at in (location, _replaced(api, location, png)))
    shown = lambda: getattr(getattr(Picture.objects.get().current, "file", None), "pk", None)  # noqa: E731
    assert shown() == new.pk
    catalog.restore(old)
    assert shown() == old.pk
    catalog.delete(old)
    assert shown() == new.pk
    assert len(files_in(media)) == 2  # the thumbnail of the deleted version went with it
    catalog.delete_all(Version.objects.get(pk=new.pk).file.logical)  # type: ignore[arg-type]
    assert shown() is None
    assert files_in(media) == []


def _replaced(api: Api, location: str, png: Any) -> str:
    return str(api.send("PUT", location, png(2))["Location"])


def test_an_account_takes_its_files_along(api: Api, media: Path, files_in: FilesIn, png: Any, user: Any) -> None:
    _replaced(api, api.post(png(1))["Location"], png)
    api.post(b"x", "a.txt")
    assert len(files_in(media)) == 5
    user.delete()
    assert files_in(media) == []
    assert set(MediaFile.objects.values_list("state", flat=True)) == {"purged"}
    assert not Picture.objects.exists()


def test_expired_tombstones_take_their_versions_along(api: Api, settings_nodes: None, png: Any) -> None:
    from datetime import timedelta

    api.send("DELETE", api.post(png())["Location"])
    catalog.confirm("node7", 10**9)
    assert catalog.expire_tombstones(timedelta(0)) == 2
    assert not Version.objects.exists()


@pytest.fixture
def settings_nodes() -> Iterator[None]:
    from django.conf import settings

    with override_settings(TRIBRICK={**settings.TRIBRICK, "NODES": ["node7"]}):
        yield


def together(count: int, call: Callable[[int], Any]) -> list[Any]:
    """Run *call* in threads that start as one; return the answers in order."""
    barrier = threading.Barrier(count)
    answers: list[Any] = [None] * count

    def run(number: int) -> None:
        barrier.wait(10)
        try:
            answers[number] = call(number)
        finally:
            connections.close_all()

    threads = [threading.Thread(target=run, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert None not in answers
    return answers


def test_concurrent_replacements_are_all_kept(api: Api, media: Path) -> None:
    first = api.post(b"zero", "a.txt")["Location"]
    answers = together(6, lambda number: Api().send("PUT", first, b"body %d" % number, "a.txt"))
    assert [answer.status_code for answer in answers] == [201] * 6
    files = MediaFile.objects.order_by("version")
    assert [file.version for file in files] == [1, 2, 3, 4, 5, 6, 7]
    assert Picture.objects.get().current.file == files.last() == catalog.current(files[0])
    for number, answer in enumerate(answers):
        assert (media / answer.json()["name"]).read_bytes() == b"body %d" % number


# Idempotency


def test_a_repeated_request_gives_the_same_file(api: Api, media: Path, files_in: FilesIn, other: Any) -> None:
    key = {"headers": {"IDEMPOTENCY_KEY": "abc"}}
    first = api.post(b"x", "a.txt", **key)
    again = api.post(b"x", "a.txt", **key)
    assert first.status_code == again.status_code == 201
    assert first.content == again.content
    assert first["Location"] == again["Location"]
    assert len(files_in(media)) == 1
    refused(api.post(b"y", "a.txt", **key), 422, "key_reused")
    refused(api.send("PUT", first["Location"], b"x", "a.txt", **key), 422, "key_reused")
    assert len(files_in(media)) == 1
    # Keys are each user's own.
    theirs = Api("secret-of-bob").post(b"z", "a.txt", **key)
    assert theirs.status_code == 201
    assert theirs.content != first.content


def test_put_honours_the_key(api: Api) -> None:
    first = api.post(b"x", "a.txt")["Location"]
    key = {"headers": {"IDEMPOTENCY_KEY": "abc"}}
    answers = [api.send("PUT", first, b"y", "a.txt", **key) for _ in range(2)]
    assert answers[0].status_code == 201
    assert answers[0].content == answers[1].content
    assert MediaFile.objects.count() == 2
    refused(api.send("PUT", first, b"z", "a.txt", **key), 422, "key_reused")


def test_a_deleted_file_is_not_acknowledged_again(api: Api) -> None:
    key = {"headers": {"IDEMPOTENCY_KEY": "abc"}}
    location = api.post(b"x", "a.txt", **key)["Location"]
    api.send("DELETE", location)
    refused(api.post(b"x", "a.txt", **key), 409, "deleted")


@pytest.mark.parametrize("key", ["with space", "x" * 256, "é"])
def test_bad_keys(api: Api, key: str) -> None:
    refused(api.post(b"x", headers={"IDEMPOTENCY_KEY": key}), 400, "bad_key")


def test_concurrent_requests_with_one_key(media: Path, files_in: FilesIn) -> None:
    key = {"headers": {"IDEMPOTENCY_KEY": "abc"}}
    answers = together(6, lambda number: Api().post(b"x" * 100_000, "a.txt", **key))
    assert [answer.status_code for answer in answers] == [201] * 6
    assert len({answer.content for answer in answers}) == 1
    assert files_in(media) == [answers[0].json()["name"]]
    assert MediaFile.objects.count() == Version.objects.count() == RequestKey.objects.count() == 1


def test_the_key_of_a_failed_request_is_free(api: Api, media: Path) -> None:
    key = {"headers": {"IDEMPOTENCY_KEY": "abc"}}
    with no_sentinel(media):
        refused(api.post(b"x", **key), 503, "storage_unavailable")
    assert not RequestKey.objects.exists()
    assert api.post(b"another", **key).status_code == 201


def test_the_key_of_a_killed_process_is_free(api: Api, media: Path, files_in: FilesIn, site_process: Any) -> None:
    done = site_process(
        """
import os
from django.contrib.auth import get_user_model
from django.core.files.uploadedfile import SimpleUploadedFile
from example.gallery import services
services._insert = lambda *args: os._exit(9)
user = get_user_model().objects.get(username="ada")
services.save_upload(user, SimpleUploadedFile("a.txt", b"x"), "a.txt", key="abc")
"""
    )
    assert done.returncode == 9, done.stderr
    assert len(files_in(media)) == 1  # an orphan, told to nobody
    response = api.post(b"x", "a.txt", headers={"IDEMPOTENCY_KEY": "abc"})
    assert response.status_code == 201
    assert (media / response.json()["name"]).read_bytes() == b"x"


# Storage or database away


@contextlib.contextmanager
def no_sentinel(media: Path) -> Iterator[None]:
    (media / ".tribrick-volume").rename(media.parent / "put-away")
    try:
        yield
    finally:
        (media.parent / "put-away").rename(media / ".tribrick-volume")


def _raise(error: BaseException) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        raise error

    return call


def test_storage_away(api: Api, media: Path, files_in: FilesIn) -> None:
    location = api.post(b"x", "a.txt")["Location"]
    with no_sentinel(media):
        for response in (api.post(b"x"), api.send("PUT", location, b"x")):
            refused(response, 503, "storage_unavailable")
            assert int(response["Retry-After"]) > 0
        assert api.send("GET", location).status_code == 200  # a row needs no volume
    assert len(files_in(media)) == 1
    assert MediaFile.objects.count() == 1


def test_storage_full(api: Api, media: Path, files_in: FilesIn, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        patch.setattr(module.Saving, "_write", _raise(OSError(errno.ENOSPC, "No space left on device")))
        refused(api.post(b"x"), 507, "storage_full")
    assert files_in(media) == []
    assert not MediaFile.objects.exists()


def test_a_thumbnail_that_cannot_be_stored_is_no_failure(
    api: Api, media: Path, files_in: FilesIn, png: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = VolumeStorage.store

    def store(self: VolumeStorage, content: Any, name: str, **options: Any) -> Any:
        if "-thumb" in name:
            raise OSError(errno.EIO, "I/O error")
        return real(self, content, name, **options)

    monkeypatch.setattr(VolumeStorage, "store", store)
    response = api.post(png())
    assert response.status_code == 201
    assert files_in(media) == [response.json()["name"]]


def test_database_away(api: Api, media: Path, files_in: FilesIn, database_away: Any, png: Any) -> None:
    location = api.post(png())["Location"]
    before = files_in(media)
    with database_away():
        for response in (
            api.post(png()),
            api.send("GET", location),
            api.send("GET", ROOT),
            api.send("PUT", location, png()),
            api.send("DELETE", location),
        ):
            refused(response, 503, "database_unavailable")
            assert int(response["Retry-After"]) > 0
    assert files_in(media) == before


def end_this_connection() -> None:
    """Let the server drop the connection of this thread, as a crash or a fail-over does."""
    process = connection.connection.info.backend_pid
    second = connection.copy()
    try:
        with second.cursor() as cursor:
            cursor.execute("SELECT pg_terminate_backend(%s, 5000)", [process])
            assert cursor.fetchone() == (True,)
    finally:
        second.close()


@pytest.mark.parametrize("key", [{}, {"IDEMPOTENCY_KEY": "abc"}])
def test_a_row_that_certainly_failed_leaves_no_file(
    api: Api, media: Path, files_in: FilesIn, png: Any, monkeypatch: pytest.MonkeyPatch, key: dict[str, str]
) -> None:
    real = services._insert

    def insert(*args: Any) -> Any:
        assert len(files_in(media)) == 2  # the file comes before the row
        end_this_connection()
        return real(*args)

    with monkeypatch.context() as patch:
        patch.setattr(services, "_insert", insert)
        refused(api.post(png(), headers=key), 503, "database_unavailable")
    assert files_in(media) == []
    assert api.post(png(), headers=key).status_code == 201


@pytest.mark.parametrize("key", [{}, {"IDEMPOTENCY_KEY": "abc"}])
def test_an_unknown_outcome_of_commit_keeps_the_file(
    api: Api, media: Path, files_in: FilesIn, monkeypatch: pytest.MonkeyPatch, key: dict[str, str]
) -> None:
    real = services._insert

    def insert(*args: Any) -> Any:
        done = real(*args)
        end_this_connection()
        return done

    with monkeypatch.context() as patch:
        patch.setattr(services, "_insert", insert)
        if key:  # the key's row is written after the file's, so look one step later
            patch.setattr(services, "_insert", real)
            save = RequestKey.save
            patch.setattr(RequestKey, "save", _then_end(save))
        refused(api.post(b"x", "a.txt", headers=key), 503, "database_unavailable")
    assert len(files_in(media)) == 1
    assert api.post(b"x", "a.txt", headers=key).status_code == 201


def _then_end(save: Callable[..., None]) -> Callable[..., None]:
    def call(self: RequestKey, *args: Any, **kwargs: Any) -> None:
        save(self, *args, **kwargs)
        if self.version is not None:
            end_this_connection()

    return call
