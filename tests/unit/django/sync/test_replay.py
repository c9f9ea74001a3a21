"""What reconciliation has changed on the disk is told to the catalog, in PostgreSQL."""

from __future__ import annotations

import hashlib
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.files.base import ContentFile
from django.core.management import CommandError, call_command
from django.test import override_settings

from tribrick import catalog
from tribrick.models import Change, MediaFile
from tribrick.storage.volume import StoredFile
from tribrick.sync import versions
from tribrick.sync.side import Side, _hash
from tribrick.sync.state import State


@pytest.fixture
def site(place: Any, database: None) -> Iterator[Any]:
    """A site whose media directory is the side; no peers."""
    storage = {"BACKEND": "tribrick.storage.VolumeStorage", "OPTIONS": {"location": str(place.root)}}
    sync = {"state": str(place.path), "quiet": 0, "peers": []}
    with override_settings(
        TRIBRICK={**settings.TRIBRICK, "NODE": "n1", "SENTINEL_ID": False, "SYNC": sync},
        STORAGES={**settings.STORAGES, "default": storage},
    ):
        yield place


def run(*arguments: str) -> tuple[int, Any]:
    out, code = io.StringIO(), 0
    try:
        call_command("tribrick", "sync", "run", *arguments, "--json", stdout=out, stderr=io.StringIO())
    except CommandError as error:
        code = error.returncode
        if not out.getvalue():
            return code, str(error)
    return code, json.loads(out.getvalue())


def rows() -> dict[str, tuple[str, int]]:
    return {row.name: (row.state, row.version) for row in MediaFile.objects.all()}


def catalogued(place: Any, name: str, data: bytes) -> MediaFile:
    """A file that was adopted: somebody's name, in the catalog."""
    place.write(name, data)
    return catalog.record(StoredFile(name, hashlib.sha256(data).hexdigest(), len(data)))


def in_order(place: Any) -> None:
    """Each row's bytes are there under its name, and nothing is left to do."""
    tree = place.tree()
    stored = {row.name: row.sha256 for row in MediaFile.objects.filter(state="stored")}
    assert {name: hashlib.sha256(data).hexdigest() for name, data in tree.items()} == stored
    code, said = run()
    assert code == 0
    assert said["catalog"] == {"added": [], "versions": {}, "deleted": [], "dead": [], "failed": {}}
    assert said["scan"]["changed"] == said["written"] == said["removed"] == []


def test_a_new_file_gets_a_row(site: Any) -> None:
    site.write("photos/Été.jpg", b"new")
    code, said = run()
    assert code == 0 and said["catalog"]["added"] == ["photos/Été.jpg"]
    [row] = MediaFile.objects.all()
    assert (row.name, row.original, row.content_type, row.size, row.node) == (
        "photos/Été.jpg", "Été.jpg", "image/jpeg", 3, "n1",
    )  # fmt: skip
    in_order(site)


def test_what_django_stores_and_deletes_is_known_already(site: Any) -> None:
    kept, gone = (catalog.add(ContentFile(b"%d" % n), "photos/a.txt") for n in range(2))
    assert run()[0] == 0
    before = rows()
    assert before == {kept.name: ("stored", 1), gone.name: ("stored", 1)}
    catalog.delete(gone)
    assert run()[0] == 0
    assert rows() == {kept.name: ("stored", 1), gone.name: ("purged", 1)}
    assert gone.name not in site.tree()
    in_order(site)


def test_a_save_that_is_not_over_gets_its_row_from_itself(site: Any) -> None:
    """The bytes of an upload are there before its row is; nobody else may write that row."""
    from django.core.files.storage import storages

    stored = storages["default"].store(ContentFile(b"x"), "photos/a.txt")
    assert run()[0] == 0
    assert rows() == {}
    catalog.record(stored)
    assert run()[0] == 0
    in_order(site)


def test_a_file_that_was_removed_is_deleted(site: Any) -> None:
    catalogued(site, "a.jpg", b"one")
    run()
    (site.root / "a.jpg").unlink()
    code, said = run()
    assert code == 0 and said["catalog"]["deleted"] == ["a.jpg"]
    assert rows() == {"a.jpg": ("purged", 1)} and site.contents() == {b"one"}
    in_order(site)


def test_a_changed_file_becomes_a_version_with_its_own_name(site: Any) -> None:
    old = catalogued(site, "d/a.jpg", b"one")
    run()
    site.write("d/a.jpg", b"changed")
    code, said = run()
    assert code == 0
    [own] = said["catalog"]["versions"].values()
    assert said["catalog"]["versions"] == {"d/a.jpg": own} and own.startswith("d/a.changed-n1-")
    assert site.tree() == {"d/a.jpg": b"one", own: b"changed"}, "a catalogued name has one content for ever"
    current = catalog.current(old)
    assert current is not None and current.name == own
    assert [(row.name, row.version) for row in catalog.versions(old)] == [(own, 2), ("d/a.jpg", 1)]
    in_order(site)
    site.write("d/a.jpg", b"changed again")
    assert run()[0] == 0
    assert len(catalog.versions(old)) == 3
    in_order(site)


def test_a_deleted_name_does_not_come_back(site: Any) -> None:
    row = catalogued(site, "a.jpg", b"one")
    run()
    catalog.delete(row)
    run()
    site.write("a.jpg", b"one")
    code, said = run()
    assert code == 0 and said["catalog"]["dead"] == ["a.jpg"]
    assert site.tree() == {}, "the same content goes"
    site.write("a.jpg", b"another")
    code, said = run()
    assert code == 0 and said["catalog"]["dead"] == ["a.jpg"]
    [own] = said["catalog"]["versions"].values()
    assert site.tree() == {own: b"another"}, "another one is kept, under its own name"
    assert rows() == {"a.jpg": ("purged", 1), own: ("stored", 1)}
    in_order(site)


def test_a_conflict_from_elsewhere_gets_rows(site: Any) -> None:
    """Two changes of a catalogued file, here and on another side: both become files of the catalog."""
    catalogued(site, "a.jpg", b"one")
    run()
    with State.open(site.path) as state:
        [base] = state.heads("a.jpg")
        side = Side(state)
        path = side.history / "incoming" / "x"
        path.write_bytes(b"theirs")
        sha256 = _hash(path)
        side.keep([(path, sha256)])
        state.add(
            [versions.replace(base, vector=base.vector.with_count("n2.00000001", 1), sha256=sha256, size=6, node="n2")]
        )
    site.write("a.jpg", b"ours!")
    code, said = run()
    assert code == 0 and len(said["conflicts"]) == 1
    assert sorted(site.tree().values()) == [b"one", b"ours!", b"theirs"]
    assert len(rows()) == 3
    in_order(site)


def test_the_catalogs_content_is_nowhere(site: Any) -> None:
    row = catalogued(site, "a.jpg", b"one")
    site.write("a.jpg", b"changed before we ever looked")
    code, said = run()
    assert code == 1 and "not in the history" in said["catalog"]["failed"]["a.jpg"]
    assert site.tree() == {"a.jpg": b"changed before we ever looked"} and rows() == {row.name: ("stored", 1)}


def test_the_database_is_away(site: Any, database_away: Any) -> None:
    site.write("a.jpg", b"one")
    with database_away():
        code, said = run()
        assert code == 2 and "away" in said["catalog"]
        assert run("--no-catalog")[0] == 0
    code, said = run()
    assert code == 0 and said["catalog"]["added"] == ["a.jpg"], "it is told later"


def test_killed_between_disk_and_catalog(site: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    old = catalogued(site, "a.jpg", b"one")
    run()
    site.write("a.jpg", b"changed")
    from tribrick.sync.replay import Replay

    class Killed(BaseException):
        pass

    for place in ("_show", "_add"):
        for after in (False, True):
            real = getattr(Replay, place)

            def dying(self: Any, *arguments: Any, real: Any = real, after: bool = after, **more: Any) -> None:
                if after:
                    real(self, *arguments, **more)
                raise Killed

            with monkeypatch.context() as patch:
                patch.setattr(Replay, place, dying)
                with pytest.raises(Killed):
                    run()
    assert run()[0] == 0
    assert [row.version for row in catalog.versions(old)] == [2, 1], "once, and as a version"
    assert sorted(site.tree().values()) == [b"changed", b"one"]
    in_order(site)


def test_many_deletions_are_not_told_at_once(site: Any) -> None:
    for number in range(20):
        catalogued(site, f"{number}.jpg", b"%d" % number)
    run()
    for path in Path(site.root).glob("*.jpg"):
        path.unlink()
    code, said = run()
    assert code == 1 and "20 of 20" in said
    assert {state for state, _version in rows().values()} == {"stored"}
    assert Change.objects.filter(kind="deleted").count() == 0
