"""The mirror's place, and which mirror restores."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.errors import AnsibleFilterError
from ansible.module_utils.testing import patch_module_args
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from ansible_collections.tribrick.media.plugins.filter import mirror as filters
from ansible_collections.tribrick.media.plugins.modules import mirror_place

ROOT = Path(__file__).resolve().parents[3]
GIB = 1 << 30
FINE = {"free": 20 * GIB, "held": 0, "needed": 10 * GIB, "shared": []}


def wrong(**seen: Any) -> list[str]:
    return mirror_place.wrong("/srv/media-mirror", {**FINE, **seen}, 5.0, "/srv/gluster/media", False)


def test_a_place_with_room_on_a_disk_of_its_own_is_fine() -> None:
    assert wrong() == []
    assert wrong(free=6 * GIB, held=4 * GIB) == [], "what it holds already needs no room again"


@pytest.mark.parametrize(
    ("seen", "word"),
    [
        ({"shared": ["/srv/gluster/media"]}, "same file system as /srv/gluster/media"),
        ({"free": 4 * GIB, "needed": 0}, "5 GiB are the least"),
        ({"free": 9 * GIB}, "10.0 GiB are used"),
    ],
)
def test_what_speaks_against_a_place(seen: dict[str, Any], word: str) -> None:
    [said] = wrong(**seen)
    assert word in said and "/srv/media-mirror" in said


def test_a_lab_may_share_and_still_needs_space() -> None:
    assert mirror_place.wrong("/x", {**FINE, "shared": ["/y"]}, 5.0, "", True) == []
    assert mirror_place.wrong("/x", {**FINE, "free": 0, "needed": 0, "shared": ["/y"]}, 5.0, "", True)


def run(capsys: pytest.CaptureFixture[str], **arguments: Any) -> dict[str, Any]:
    with patch_module_args(arguments), pytest.raises(SystemExit):
        mirror_place.main()
    said: dict[str, Any] = json.loads(capsys.readouterr().out)
    return said


def test_the_module_looks_and_changes_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    brick = tmp_path / "brick"
    brick.mkdir()
    place = tmp_path / "not/there/yet"
    said = run(capsys, path=str(place), apart_from=[str(brick), "/nowhere"], min_free_gib=0)
    assert said["failed"] and said["shared"] == [str(brick)] and "a disk of its own" in said["msg"]
    shared = {"apart_from": [str(brick)], "data_mount": str(brick), "allow_shared": True}
    said = run(capsys, path=str(place), min_free_gib=0, **shared)
    assert said["changed"] is False and said["needed"] == 0
    assert not place.exists()
    said = run(capsys, path=str(place), min_free_gib=1 << 30)
    assert said["failed"] and "are the least" in said["msg"]
    other = Path("/proc")
    assert os.stat(other).st_dev != os.stat(tmp_path).st_dev
    place.mkdir(parents=True)
    (place / "state.json").write_text('{"bytes": 12345}')
    said = run(capsys, path=str(place), apart_from=[str(other)], min_free_gib=0, data_mount=str(brick))
    assert said["held"] == 12345 and said["needed"] > 0


def test_whatever_works_with_the_database_is_stopped_before_it_is_restored() -> None:
    """A periodic command of the site would write changes before the ledgers have given theirs back."""
    [play, _site] = yaml.safe_load((ROOT / "playbooks/restore_database.yml").read_text(encoding="utf-8"))
    given = {"media_spool": True, "django_site_periodic_commands": ["clearsessions"]}
    variables = {name: trust_as_template(value) for name, value in play["vars"].items()}
    stopped = Templar(DataLoader(), {**variables, **given}).template(variables["media_mirror_stopped_units"])
    assert stopped[:2] == ["tribrick-site-run@clearsessions.timer", "tribrick-site-run@clearsessions.service"]
    services = [f"tribrick-{name}.service" for name in ("site", "ledger", "replicate", "drain")]
    assert stopped[2:] == ["tribrick-site.socket", *services]


def answer(node: str, number: int, *snapshots: str) -> dict[str, Any]:
    listed = [{"snapshot": one, "path": f"/m/snapshots/{one}", "good": True, "number": 1} for one in snapshots]
    said = {"node": node, "current": "/m/current", "number": number, "snapshots": listed}
    return {"rc": 0, "stdout": json.dumps(said), "stderr": ""}


def test_the_host_with_the_newest_snapshot_restores() -> None:
    answers = {
        "node3": answer("node3", 7, "2026-11-02T10-00-00Z"),
        "node1": answer("node1", 9, "2026-11-01T10-00-00Z"),
        "node2": answer("node2", 9, "2026-11-02T10-00-00Z"),
        "node4": {"unreachable": True, "msg": "no route"},
        "node5": {},
    }
    assert filters.choose_mirror(answers) == {"host": "node2", "tree": "/m/snapshots/2026-11-02T10-00-00Z"}
    assert filters.choose_mirror(answers, "current") == {"host": "node1", "tree": "/m/current"}


def test_no_mirror_at_all_names_each_host() -> None:
    answers = {
        "node1": {"rc": 1, "stdout": "", "stderr": "tribrick-mirror: no good snapshot of 2020-01-01"},
        "node2": {"unreachable": True, "msg": "no route to host"},
        "node3": {"rc": 0, "stdout": "nonsense", "stderr": ""},
    }
    with pytest.raises(AnsibleFilterError, match=r"node1: .*2020-01-01.*; node2: no route to host; node3: no answer"):
        filters.choose_mirror(answers, "2020-01-01")


def test_the_ledger_that_knows_most_gives_back() -> None:
    def said(number: int, code: int = 0) -> dict[str, Any]:
        return {"rc": code, "stdout": json.dumps({"number": number, "chain": "x", "behind": 0})}

    answers = {
        "node1": said(3), "node2": said(7), "node3": said(7), "node4": said(9, code=1), "node5": {"unreachable": True},
        "node6": {"rc": 0, "stdout": "nonsense"}, "node7": {},
    }  # fmt: skip
    assert filters.furthest_ledger(answers) == {"host": "node2", "number": 7}
    assert filters.furthest_ledger({"node1": said(0), "node2": {}}) == {"host": "", "number": 0}


def test_what_a_restore_did_is_said_line_by_line() -> None:
    said = {
        "tree": "/m/s", "applied": True, "right": 3, "restored": ["a", "b"], "adopted": [], "dead": [],
        "again": {"c": "d"}, "before": {}, "lacking": {"e": "the mirror does not have it"}, "refused": {},
    }  # fmt: skip
    lines = filters.explain_restore(said)
    assert lines[0] == "from /m/s" and "2 restored" in lines and "  a" in lines and "  c: d" in lines
    assert "  e: the mirror does not have it" in lines and lines[-1] == "3 were right already"
    assert "only looked at" in filters.explain_restore({**said, "applied": False})[0]
    many = filters.explain_restore({**said, "restored": [str(n) for n in range(1000)]})
    assert "  ... and 800 more" in many and len(many) < 250
