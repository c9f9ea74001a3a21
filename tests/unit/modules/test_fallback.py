"""The Gluster-free mode: what speaks against it, what is nowhere, what was done, and what the nodes are given."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible_collections.tribrick.media.plugins.filter import fallback as filters

ROOT = Path(__file__).resolve().parents[3]
MIB = 1 << 20
FINE: dict[str, Any] = {
    "number": 7, "living": 1, "spooled": 0, "needed": 10 * MIB, "free": 2000 * MIB, "volume": "away",
}  # fmt: skip
MIRROR = {"stat": {"exists": True}}


def obstacles(said: dict[str, Any] | str, mirror: dict[str, Any] = MIRROR, **status: Any) -> list[str]:
    text = said if isinstance(said, str) else json.dumps({**FINE, **said})
    return filters.fallback_obstacles({"rc": 0, "stdout": text, **status}, mirror, "node1", "/srv/tree", 1024)


def test_a_host_that_is_fine() -> None:
    assert obstacles({}) == []
    assert obstacles({"needed": 0, "free": 0}) == [], "nothing is to come"


@pytest.mark.parametrize(
    ("found", "words"),
    [
        (obstacles("", rc=2, stderr="x\nCommandError: connection refused\n"), ["connection refused", "database"]),
        (obstacles("", rc=0), ["it said nothing"]),
        (obstacles({}, mirror={"stat": {"exists": False}}), ["no mirror", "playbooks/deploy_mirror.yml"]),
        (obstacles({"free": 1000 * MIB}), ["1000 MiB free", "10 MiB are to come", "/srv/tree"]),
        (obstacles("", unreachable=True, rc=None, msg="timed out"), ["does not answer: timed out", "absent=node1"]),
    ],
)
def test_what_speaks_against_it(found: list[str], words: list[str]) -> None:
    [said] = found
    assert said.startswith("node1 ") and all(word in said for word in words)


def test_all_obstacles_of_a_host_are_told_together() -> None:
    assert len(obstacles("", mirror={}, rc=2)) == 2


def test_a_file_is_nowhere_only_if_no_host_could_get_it() -> None:
    reports = [{"missing": {"a": "", "b": ""}}, {"missing": {"b": "", "c": ""}}, {"missing": {"b": "why"}}]
    assert filters.fallback_nowhere(reports) == ["b"]
    assert filters.fallback_nowhere([*reports, {"missing": {}}]) == []
    assert filters.fallback_nowhere([]) == []


def test_what_was_done_is_told() -> None:
    done = {"applied": True, "right": 3, "number": 9, "copied": {"mirror": 2}, "foreign": 1, "removed": ["x"],
            "missing": {"y": "no source has it"}, "away": {"mount": "not mounted"}}  # fmt: skip
    said = "\n".join(filters.explain_fallback(done))
    assert all(word in said for word in ("3 were right", "2 from mirror", "y: no source", "mount: not mounted", "  x"))
    merged = {
        "applied": False, "right": 3, "number": 9, "written": [f"n{i}" for i in range(60)], "count": 70, "removed": 4,
        "foreign": ["by-hand"], "failed": {"z": "away"},
    }  # fmt: skip
    said = "\n".join(filters.explain_fallback(merged))
    assert all(word in said for word in ("only looked at", "70 written", "20 more", "by-hand", "z: away"))
    assert "n50" not in said


def plays(name: str) -> list[dict[str, Any]]:
    loaded: list[dict[str, Any]] = yaml.safe_load((ROOT / "playbooks" / name).read_text(encoding="utf-8"))
    return loaded


def steps(name: str) -> list[str]:
    """The steps of a playbook in their order: imported playbooks, and the entry points of the roles."""
    found: list[str] = []
    for play in plays(name):
        if "ansible.builtin.import_playbook" in play:
            assert play["vars"]["fallback_step"] in ("enable", "disable"), "or its guard refuses"
            found.append(play["ansible.builtin.import_playbook"])
            continue
        for task in play["tasks"]:
            if (role := task.get("ansible.builtin.import_role")) is not None:
                found.append(role.get("tasks_from", "look"))
    return found


def test_uploads_are_held_up_while_nodes_are_in_different_modes() -> None:
    assert steps("fallback_enable.yml") == [
        "whole", "look", "complete", "hold", "complete", "deploy_receiver.yml", "complete", "deploy_site.yml",
        "release", "complete", "deploy_mirror.yml",
    ]  # fmt: skip
    assert steps("fallback_disable.yml") == [
        "whole", "look", "merge", "hold", "merge", "empty", "deploy_receiver.yml", "deploy_site.yml", "merge",
        "release", "deploy_mirror.yml",
    ]  # fmt: skip


def test_leaving_brings_back_what_the_inventory_says_the_cache_and_the_origin_among_it() -> None:
    given = [play["vars"] for play in plays("fallback_disable.yml") if "ansible.builtin.import_playbook" in play]
    assert given == [{"fallback_step": "disable"}] * 3


@pytest.mark.parametrize("name", ["deploy_site.yml", "deploy_receiver.yml", "deploy_mirror.yml"])
def test_what_would_leave_the_mode_is_guarded(name: str) -> None:
    play = plays(name)[0]
    guard = play["pre_tasks"][0]
    assert guard["ansible.builtin.import_role"]["tasks_from"] == "guard"
    assert str(guard["when"]).startswith("fallback_step is not defined") and play["any_errors_fatal"] is True


def test_the_rollout_looks_for_the_mode_first() -> None:
    [first, *_] = yaml.safe_load((ROOT / "site.yml").read_text(encoding="utf-8"))
    assert first["ansible.builtin.import_playbook"] == "playbooks/check_fallback.yml"


def test_the_names_of_the_marks_are_the_same_everywhere() -> None:
    from ansible_collections.tribrick.media.plugins.module_utils import health

    names = yaml.safe_load((ROOT / "roles/media_fallback/vars/main.yml").read_text(encoding="utf-8"))
    assert names == {"__media_fallback_mark": health.FALLBACK, "__media_fallback_held_mark": health.HELD}
    site = plays("deploy_site.yml")[0]
    assert site["vars"]["__environment"]["TRIBRICK_CLOSED"] == health.HELD
    for name in ("fallback_enable.yml", "fallback_disable.yml"):
        assert health.FALLBACK in (ROOT / "playbooks" / name).read_text(encoding="utf-8")
