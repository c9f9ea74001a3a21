"""Decisions of the module units: pure functions of what systemd says."""

from __future__ import annotations

import pytest
from ansible_collections.tribrick.media.plugins.module_utils.systemd import Unit, parse_show, verbs

SHOW = """\
Id=glusterd.service
LoadState=loaded
ActiveState=active
SubState=running
UnitFileState=enabled
NeedDaemonReload=yes
ReloadResult=exit-code
ActiveEnterTimestampMonotonic=5000000
StateChangeTimestampMonotonic=6000000

Id=missing.service
LoadState=not-found
ActiveState=inactive
SubState=dead
UnitFileState=
NeedDaemonReload=no
ActiveEnterTimestampMonotonic=0
StateChangeTimestampMonotonic=0
"""


def unit(
    active: str = "active", enabled: str = "enabled", started: float = 10.0, changed: float = 10.0, reloaded: bool = True
) -> Unit:
    return Unit("x.service", True, active, enabled, False, started, changed, reloaded)


def wanted(**changes: object) -> dict:
    return {"name": "x.service", "state": "started", "enabled": True, "on_change": "restart", "files": [], **changes}


def test_parse_show_reads_each_unit_under_the_name_it_was_asked_by() -> None:
    units = parse_show(SHOW, ["glusterd.service", "missing.service"])
    assert units["glusterd.service"] == Unit("glusterd.service", True, "active", "enabled", True, 5.0, 6.0, False)
    assert not units["missing.service"].loaded


def test_parse_show_refuses_an_answer_for_fewer_units() -> None:
    with pytest.raises(ValueError, match="answered 2 blocks for 3 units"):
        parse_show(SHOW, ["a", "b", "c"])


@pytest.mark.parametrize(
    ("want", "found", "newest", "expected"),
    [
        (wanted(), unit(), 5.0, []),
        (wanted(), unit(active="inactive"), 5.0, ["start"]),
        (wanted(), unit(active="failed"), 50.0, ["start"]),
        (wanted(), unit(active="activating"), 5.0, []),
        (wanted(), unit(enabled="disabled"), 5.0, ["enable"]),
        (wanted(), unit(enabled=""), 5.0, ["enable"]),
        (wanted(enabled=None), unit(enabled="disabled"), 5.0, []),
        (wanted(enabled=False), unit(), 5.0, ["disable"]),
        (wanted(), unit(enabled="static"), 5.0, []),
        (wanted(), unit(), 11.0, ["restart"]),
        (wanted(on_change=None), unit(), 11.0, []),
        (wanted(on_change="reload"), unit(), 11.0, ["reload"]),
        (wanted(on_change="reload"), unit(changed=12.0), 11.0, []),
        (wanted(on_change="reload"), unit(changed=12.0, reloaded=False), 11.0, ["reload"]),
        (wanted(), unit(reloaded=False), 5.0, []),
        (wanted(on_change="restart"), unit(changed=12.0), 11.0, ["restart"]),
        (wanted(state="stopped", enabled=False), unit(), 11.0, ["disable", "stop"]),
        (wanted(state="stopped", enabled=None), unit(active="failed"), 11.0, []),
        (wanted(state=None), unit(active="inactive"), 11.0, []),
        (wanted(), unit(), float("-inf"), []),
    ],
)
def test_verbs(want: dict, found: Unit, newest: float, expected: list[str]) -> None:
    assert verbs(want, found, newest) == expected


def test_a_unit_whose_work_is_not_in_effect_is_restarted() -> None:
    assert verbs(wanted(on_change="reload"), unit(), 5.0, proven=False) == ["restart"]
    assert verbs(wanted(), unit(active="inactive"), 5.0, proven=False) == ["start"]
