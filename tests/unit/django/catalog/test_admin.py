"""The catalog in the admin."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.contrib.auth import get_user_model
from django.contrib.auth.models import Permission
from django.contrib.staticfiles import finders
from django.core.files.base import ContentFile
from django.db import connection
from django.test import Client
from django.test.utils import CaptureQueriesContext

from tribrick import catalog
from tribrick.models import Change, MediaFile, Node, Outbox

pytestmark = pytest.mark.usefixtures("static")
FILES = "/admin/tribrick/mediafile/"


@pytest.fixture
def boss() -> Client:
    client = Client()
    client.force_login(get_user_model().objects.create_superuser("boss", password="x"))
    return client


def add(data: bytes = b"one", **options: Any) -> MediaFile:
    return catalog.add(ContentFile(data), "photos/a.png", **options)


def page(client: Client, path: str) -> str:
    answer = client.get(path)
    assert answer.status_code == 200, answer
    return answer.content.decode()


def test_list_with_previews(boss: Client, user: Any) -> None:
    picture = add(content_type="image/png", owner=user, original="<b>Ä.png")
    page_file = add(content_type="text/html", original="evil.html")
    gone = add(content_type="image/png", original="gone.png")
    catalog.delete(gone)
    text = page(boss, FILES)
    assert f'<img src="{picture.url}"' in text and "&lt;b&gt;Ä.png" in text and "<b>Ä" not in text
    assert text.count('loading="lazy"') == 1, "neither of a page nor of a deleted file"
    assert page_file.name in text and gone.name in text


def test_search(boss: Client, user: Any) -> None:
    one = add(b"1", original="Sunset.png", owner=user)
    two = add(b"2", original="Dawn.png")
    for query in ("sunset", one.name, one.sha256, "ada"):
        text = page(boss, f"{FILES}?q={query}")
        assert one.name in text and two.name not in text, query


def test_the_list_costs_the_same_for_many(boss: Client, user: Any) -> None:
    def cost() -> int:
        with CaptureQueriesContext(connection) as queries:
            page(boss, FILES)
        return len(queries)

    add(owner=user)
    few = cost()
    for _ in range(10):
        add(owner=user, content_type="image/png")
    assert cost() == few


def test_version_history_and_restore(boss: Client) -> None:
    one = add(b"1", original="first.png", content_type="image/png")
    two = catalog.replace(one, ContentFile(b"2"), original="second.png")
    text = page(boss, f"{FILES}{one.pk}/change/")
    assert f'href="{FILES}{two.pk}/change/"><strong>second.png</strong>' in text
    assert f'href="{FILES}{one.pk}/change/">first.png' in text
    assert f'<a href="{one.url}"><img' in text
    boss.post(FILES, {"action": "restore", "_selected_action": [one.pk]})
    assert catalog.current(two) == one
    catalog.delete(two)
    answer = boss.post(FILES, {"action": "restore", "_selected_action": [two.pk]}, follow=True)
    assert f"{two.name[1:]} was deleted" in answer.content.decode()
    assert catalog.current(two) == one
    page(boss, f"{FILES}{two.pk}/change/")


def test_pages_work_under_a_strict_content_security_policy(boss: Client) -> None:
    one = add(content_type="image/png")
    for where in (FILES, f"{FILES}{one.pk}/change/"):
        text = page(boss, where)
        assert re.search(r"/tribrick/admin[.0-9a-f]*\.css", text) and 'class="tribrick-' in text
        assert " style=" not in text, "an inline style is not applied there"
    assert finders.find("tribrick/admin.css")


def test_delete_writes_a_tombstone(boss: Client) -> None:
    one, two, three = add(), add(), add()
    assert boss.post(f"{FILES}{one.pk}/delete/", {"post": "yes"}).status_code == 302
    boss.post(FILES, {"action": "delete_selected", "_selected_action": [one.pk, two.pk], "post": "yes"})
    assert dict(MediaFile.objects.values_list("pk", "state")) == {
        one.pk: "purged", two.pk: "purged", three.pk: "stored",
    }  # fmt: skip
    assert not (Path(settings.MEDIA_ROOT) / one.name).exists()
    assert (Path(settings.MEDIA_ROOT) / three.name).exists()
    assert boss.post(f"{FILES}{one.pk}/delete/", {"post": "yes"}).status_code == 302, "again is no error"
    assert Change.objects.filter(name=one.name).count() == 3


def test_nothing_can_be_added_or_edited(boss: Client) -> None:
    row = add()
    assert boss.get(f"{FILES}add/").status_code == 403
    assert boss.post(f"{FILES}{row.pk}/change/", {"name": "x"}).status_code == 403
    for model in ("change", "outbox", "node"):
        assert boss.get(f"/admin/tribrick/{model}/add/").status_code == 403
    change = Change.objects.get()
    assert boss.post(f"/admin/tribrick/change/{change.pk}/delete/", {"post": "yes"}).status_code == 403
    boss.post("/admin/tribrick/change/", {"action": "delete_selected", "_selected_action": [change.pk], "post": "yes"})
    assert Change.objects.count() == 1


def test_who_may_only_look() -> None:
    one = add()
    two = catalog.replace(one, ContentFile(b"2"))
    viewer = get_user_model().objects.create_user("viewer", is_staff=True)
    viewer.user_permissions.add(Permission.objects.get(codename="view_mediafile"))
    client = Client()
    client.force_login(viewer)
    assert one.name in page(client, FILES)
    client.post(FILES, {"action": "restore", "_selected_action": [one.pk]})
    client.post(FILES, {"action": "delete_selected", "_selected_action": [one.pk], "post": "yes"})
    assert client.post(f"{FILES}{one.pk}/delete/", {"post": "yes"}).status_code == 403
    assert catalog.current(one) == two and MediaFile.objects.filter(state="stored").count() == 2


def test_ledger_outbox_and_nodes(boss: Client) -> None:
    row = add()
    Outbox.objects.create(name="waiting.png", operation="put", host="10.0.0.1", last_error="refused")
    catalog.confirm("node1", 7)
    assert row.name in page(boss, "/admin/tribrick/change/?kind=added")
    assert "refused" in page(boss, "/admin/tribrick/outbox/?done__isempty=1&q=waiting")
    assert "node1" in page(boss, "/admin/tribrick/node/") and Node.objects.get().number == 7
