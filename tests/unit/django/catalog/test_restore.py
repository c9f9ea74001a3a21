"""Restoring from the mirror and its snapshots, with the real catalog, ledger, rsync and pg_dump."""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.files.base import ContentFile
from django.core.management import CommandError, call_command
from django.db import connection
from django.test import override_settings

from tribrick import catalog, ledger, mirror
from tribrick.mirror import Config, Mirror
from tribrick.models import Change, Media, MediaFile


def root() -> Path:
    return Path(settings.MEDIA_ROOT)


def add(data: bytes = b"one", name: str = "photos/a.txt", **more: Any) -> MediaFile:
    return catalog.add(ContentFile(data), name, **more)


def tree() -> dict[str, bytes]:
    return {
        str(file.relative_to(root())): file.read_bytes()
        for file in root().rglob("*")
        if file.is_file() and not str(file.relative_to(root())).startswith(".")
    }


@pytest.fixture
def config(tmp_path: Path, _site: None) -> Iterator[Config]:
    """A mirror of the site's volume; the site knows the ledger."""
    (tmp_path / "mirror").mkdir()
    path = str(tmp_path / "ledger.sqlite")
    with override_settings(TRIBRICK={**settings.TRIBRICK, "LEDGER": path}):
        yield Config(
            node="node7", source=str(root()), volume_id=settings.TRIBRICK["SENTINEL_ID"],
            place=str(tmp_path / "mirror"), ledger=path, database_url=os.environ["DATABASE_URL"], reserve_mib=0,
        )  # fmt: skip


def snapshot(config: Config) -> str:
    """Take one; return its directory."""
    ledger.follow_once(config.ledger)
    report = Mirror(config).run(snapshot=True)
    assert report.good
    return str(Path(config.place) / "snapshots" / report.snapshot)


def restore(*words: str) -> tuple[int, dict[str, Any]]:
    out, code = io.StringIO(), 0
    try:
        call_command("tribrick", "restore", *words, "--json", stdout=out, stderr=io.StringIO())
    except CommandError as error:
        code = error.returncode
    return code, json.loads(out.getvalue() or "{}")


def lose_volume() -> None:
    """Replace the volume by a new, empty one with the same identity."""
    for path in root().iterdir():
        if path.is_dir():
            shutil.rmtree(path)
        elif path.name != ".tribrick-volume":
            path.unlink()


def test_everything_into_a_new_volume(config: Config) -> None:
    for n in range(5):
        add(b"%d" % n)
    place = snapshot(config)
    before = tree()
    lose_volume()
    code, said = restore(place)
    assert code == 0 and not said["applied"] and set(said["restored"]) == set(before) and tree() == {}
    code, said = restore(place, "--apply")
    assert code == 0 and set(said["restored"]) == set(before) and tree() == before
    modes = {(root() / name).stat().st_mode & 0o777 for name in before}
    assert modes == {0o644}, "as an upload has it, not as the mirror has it"
    code, said = restore(place, "--apply")
    assert (code, said["right"], said["restored"]) == (0, 5, []), "a second time there is nothing to do"


def test_a_file_and_a_folder(config: Config) -> None:
    one, two, other = add(b"1", "photos/x.txt"), add(b"2", "photos/y.txt"), add(b"3", "private/z.txt")
    place = snapshot(config)
    lose_volume()
    assert restore(place, "--apply", "--under", one.name)[1]["restored"] == [one.name]
    assert set(tree()) == {one.name}
    code, said = restore(place, "--apply", "--under", "/photos/")
    assert (code, said["restored"], said["right"]) == (0, [two.name], 1)
    assert set(tree()) == {one.name, two.name}
    code, said = restore(place, "--apply", "--under", "photo")
    assert code == 1 and list(said["refused"]) == ["photo"], "part of a name is not a folder"
    assert said["right"] == 0
    assert restore(f"{config.place}/current", "--apply", "--under", "private")[1]["restored"] == [other.name]


def test_wrong_bytes_are_replaced_and_kept_aside(config: Config) -> None:
    row, fine = add(b"right"), add(b"fine")
    place = snapshot(config)
    (root() / row.name).write_bytes(b"wrong")
    inode = (root() / fine.name).stat().st_ino
    code, said = restore(place, "--apply")
    assert (code, said["restored"], said["right"]) == (0, [row.name], 1)
    assert (root() / row.name).read_bytes() == b"right" and (root() / fine.name).stat().st_ino == inode
    assert [path.read_bytes() for path in (root() / ".tribrick-quarantine").rglob("*.txt")] == [b"wrong"]


def test_spoilt_bytes_of_the_mirror_are_never_restored(config: Config) -> None:
    row = add(b"right")
    place = snapshot(config)
    (Path(place) / "files" / row.name).write_bytes(b"wrong")
    lose_volume()
    code, said = restore(place, "--apply")
    assert code == 1 and list(said["lacking"]) == [row.name] and tree() == {}


def test_rows_newer_than_the_files_are_listed(config: Config) -> None:
    old = add(b"old")
    place = snapshot(config)
    new = add(b"new")
    here = add(b"new and there")
    (root() / new.name).unlink()
    (root() / old.name).unlink()
    code, said = restore(place, "--apply")
    assert code == 1 and said["restored"] == [old.name]
    assert said["lacking"] == {new.name: "the mirror does not have it"} and said["right"] == 1
    assert (root() / here.name).read_bytes() == b"new and there"
    assert restore(place, "--under", new.name)[1]["lacking"]


def test_deleted_files_stay_deleted(config: Config) -> None:
    row, other = add(b"deleted"), add(b"other")
    place = snapshot(config)
    catalog.delete(row)
    lose_volume()
    code, said = restore(place, "--apply")
    assert (code, said["dead"], said["restored"]) == (0, [row.name], [other.name])
    assert set(tree()) == {other.name}
    MediaFile.objects.filter(pk=row.pk).delete()  # an expired tombstone: its changes stay
    assert restore(place, "--apply")[1]["dead"] == [row.name]


def test_deleted_files_come_back_under_new_names(config: Config, user: Any) -> None:
    row = add(b"deleted by mistake", original="Été.txt", owner=user, content_type="text/plain")
    place = snapshot(config)
    catalog.delete(row)
    ledger.follow_once(config.ledger)
    code, said = restore(place, "--include-deleted")
    assert code == 0 and said["again"] == {row.name: ""} and tree() == {}
    code, said = restore(place, "--apply", "--include-deleted", "--under", row.name)
    new = said["again"][row.name]
    assert code == 0 and new != row.name and tree() == {new: b"deleted by mistake"}
    made = MediaFile.objects.get(name=new)
    assert (made.original, made.owner, made.content_type) == ("Été.txt", user, "text/plain")
    assert restore(place, "--apply", "--include-deleted")[1]["before"] == {row.name: new}, "once"
    assert set(tree()) == {new}
    assert MediaFile.objects.get(pk=row.pk).state == "purged", "a name is never alive again"


def dump_restored(config: Config, place: str) -> None:
    """Bring the database back to a snapshot's dump, as playbooks/restore_database.yml does."""
    connection.close()
    mirror.restore_database(config, Path(place))


def test_files_newer_than_the_database_are_adopted(config: Config, user: Any) -> None:
    old, deleted = add(b"old"), add(b"deleted")
    first = snapshot(config)
    new = add(b"new", original="Neu.txt", owner=user, content_type="text/plain")
    created = MediaFile.objects.get(pk=new.pk).created
    catalog.delete(deleted)
    second = snapshot(config)
    dump_restored(config, first)
    lose_volume()
    code, said = restore(second, "--apply")
    assert code == 1 and said["restored"] == [old.name] and said["adopted"] == [new.name]
    assert list(said["lacking"]) == [deleted.name], "the older database has a row of a file that was deleted"
    row = MediaFile.objects.get(name=new.name)
    assert (row.original, row.owner, row.content_type, row.created) == ("Neu.txt", user, "text/plain", created)
    assert tree() == {old.name: b"old", new.name: b"new"}
    # The first snapshot has the bytes, but the ledger of this node knows that they were deleted.
    assert restore(first, "--apply")[1]["dead"] == [deleted.name] and deleted.name not in tree()
    assert restore(first, "--apply", "--include-deleted")[1]["restored"] == [deleted.name]


def test_the_manifest_knows_tombstones_without_a_ledger(config: Config) -> None:
    deleted, new = add(b"deleted"), add(b"new")
    place = snapshot(config)
    catalog.delete(deleted)
    second = snapshot(config)
    # Somebody's old copy of the files, beside a snapshot that knows better.
    (Path(second) / "files" / deleted.name).parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(Path(place) / "files" / deleted.name, Path(second) / "files" / deleted.name)
    for model in (Media, MediaFile, Change):
        model.objects.all().delete()
    lose_volume()
    with override_settings(TRIBRICK={**settings.TRIBRICK, "LEDGER": None}):
        code, said = restore(second, "--apply")
    assert (code, said["dead"], said["adopted"]) == (0, [deleted.name], [new.name])


def test_a_disaster_of_all_nodes(config: Config, user: Any) -> None:
    """Volume, database and ledger are gone; one snapshot brings back exactly what it held."""
    rows = [add(b"%d" % n, owner=user) for n in range(4)]
    catalog.replace(rows[0], ContentFile(b"new version"))
    catalog.delete(rows[1])
    (root() / "foreign.txt").write_bytes(b"foreign")
    os.utime(root() / "foreign.txt", (1, 1))
    young, mirror.YOUNG = mirror.YOUNG, 0.0
    try:
        place = snapshot(config)
    finally:
        mirror.YOUNG = young
    before, listed = tree(), list(MediaFile.objects.order_by("pk").values())
    lose_volume()
    with connection.cursor() as cursor:
        cursor.execute("DROP SCHEMA public CASCADE; CREATE SCHEMA public")
    Path(config.ledger).unlink()
    dump_restored(config, place)
    code, said = restore(place, "--apply")
    assert (code, said["adopted"]) == (0, ["foreign.txt"]) and tree() == before
    assert list(MediaFile.objects.exclude(name="foreign.txt").order_by("pk").values()) == listed
    assert ledger.follow_once(config.ledger) > 0, "the numbers go on"


def test_another_file_in_the_way_is_left_alone(config: Config) -> None:
    row, same = add(b"from the mirror"), add(b"the same")
    place = snapshot(config)
    inode = (root() / same.name).stat().st_ino
    for model in (Media, MediaFile, Change):
        model.objects.all().delete()
    (root() / row.name).write_bytes(b"somebody's own")
    code, said = restore(place, "--apply")
    assert code == 1 and list(said["refused"]) == [row.name]
    assert (root() / row.name).read_bytes() == b"somebody's own"
    assert said["adopted"] == [same.name] and (root() / same.name).stat().st_ino == inode


@pytest.mark.parametrize("what", ["nothing", "broken", "place"])
def test_what_is_no_tree_is_refused(config: Config, what: str) -> None:
    add()
    place = snapshot(config)
    lose_volume()
    tree_ = {"nothing": f"{place}x", "broken": place, "place": config.place}[what]
    if what == "broken":
        (Path(place) / "marker.json").unlink()
    code, _said = restore(tree_, "--apply")
    assert code == 1 and tree() == {}


def test_never_under_an_absent_mount(config: Config) -> None:
    add(b"one")
    place = snapshot(config)
    lose_volume()
    (root() / ".tribrick-volume").rename(root().with_name("sentinel"))
    try:
        assert restore(place, "--apply")[0] == 2
    finally:
        root().with_name("sentinel").rename(root() / ".tribrick-volume")
    assert tree() == {}


def test_a_restore_that_is_killed_goes_on(config: Config, process: Callable[..., Any]) -> None:
    for n in range(20):
        add(b"%d" % n)
    place = snapshot(config)
    before = tree()
    lose_volume()
    done = process(
        "import os, signal\nfrom tribrick.copies import PathCopy\nput, count = PathCopy.put, []\n"
        "def dying(self, known, source):\n count.append(1)\n if len(count) == 8: os.kill(os.getpid(), signal.SIGKILL)\n"
        " return put(self, known, source)\nPathCopy.put = dying\n"
        f"from tribrick.restore import Restore\nRestore({place!r}, apply=True).run()"
    )
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert len(tree()) == 7
    code, said = restore(place, "--apply")
    assert (code, said["right"], len(said["restored"])) == (0, 7, 13) and tree() == before
