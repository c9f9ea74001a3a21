"""Decisions of the module units: pure functions of what systemd says."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import yaml
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.testing import patch_module_args
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from ansible_collections.tribrick.media.plugins.module_utils.systemd import Unit, parse_show, retirement, verbs
from ansible_collections.tribrick.media.plugins.modules import units
from unit.node.test_edge import ROOT, render

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
    active: str = "active",
    enabled: str = "enabled",
    started: float = 10.0,
    changed: float = 10.0,
    reloaded: bool = True,
) -> Unit:
    return Unit("x.service", True, active, enabled, False, started, changed, reloaded)


def wanted(**changes: object) -> dict:
    return {"name": "x.service", "state": "started", "enabled": True, "on_change": "restart", "files": [], **changes}


def test_parse_show_reads_each_unit_under_the_name_it_was_asked_by() -> None:
    found = parse_show(SHOW, ["glusterd.service", "missing.service"])
    assert found["glusterd.service"] == Unit("glusterd.service", True, "active", "enabled", True, 5.0, 6.0, False)
    assert not found["missing.service"].loaded


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


# The module, with a systemctl that only remembers.


class Systemd:
    """Stands in for systemctl: what runs and what is enabled, by unit."""

    def __init__(self, running: set[str], enabled: set[str]) -> None:
        self.running, self.enabled, self.calls = running, enabled, []

    def __call__(self, command: list[str], **_more: object) -> tuple[int, str, str]:
        verb, *names = command[command.index("systemctl") + 1 :]
        if verb == "show":
            return 0, "\n".join(self.block(name) for name in names[2:]), ""
        self.calls.append(" ".join([verb, *names]))
        if verb in ("start", "stop"):
            (self.running.add if verb == "start" else self.running.discard)(names[0])
        if verb in ("enable", "disable"):
            (self.enabled.add if verb == "enable" else self.enabled.discard)(names[0])
        return 0, "", ""

    def block(self, name: str) -> str:
        active, enabled = name in self.running, name in self.enabled
        return (
            f"Id={name}\nLoadState=loaded\nActiveState={'active' if active else 'inactive'}\n"
            f"UnitFileState={'enabled' if enabled else 'disabled'}\nNeedDaemonReload=no\n"
        )


def of_the_site(place: Path, names: list[str]) -> dict:
    """What the role's activate.yml gives the module, for services and periodic commands of these names."""
    (place / "multi-user.target.wants").mkdir(exist_ok=True)
    for name in names:
        service = {"name": name, "arguments": name, "description": name}
        text = render("django_site", "tribrick-service.service.j2", __django_site_service=service)
        (place / f"{name}.service").write_text(text)
        timer = place / f"multi-user.target.wants/tribrick-site-run@{name}.timer"
        if not timer.is_symlink():
            timer.symlink_to("../tribrick-site-run@.timer")
    tasks = yaml.safe_load((ROOT / "roles/django_site/tasks/activate.yml").read_text(encoding="utf-8"))
    exclusive = tasks[-1]["tribrick.media.units"]["exclusive"]
    mine = [one | {"pattern": one["pattern"].replace("/etc/systemd/system", str(place))} for one in exclusive]
    wanted = [f"{names[0]}.service", f"tribrick-site-run@{names[0]}.timer"]
    return {"units": [{"name": name, "state": "started", "enabled": True} for name in wanted], "exclusive": mine}


def test_what_the_site_lists_no_more_is_taken_away(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def run(check: bool = False) -> dict:
        given = {**arguments, "_ansible_check_mode": check}
        with patch_module_args(given), pytest.raises(SystemExit):
            units.main()
        return json.loads(capsys.readouterr().out)

    arguments = of_the_site(tmp_path, ["kept", "gone"])
    (tmp_path / "foreign.service").write_text("[Service]\nExecStart=/opt/tribrick/site/bin/django-admin mine\n")
    every = {"kept.service", "gone.service", "foreign.service"} | {
        f"tribrick-site-run@{name}.timer" for name in ("kept", "gone")
    }
    systemd = Systemd(set(every), set(every))
    monkeypatch.setattr(AnsibleModule, "run_command", lambda _module, *given, **more: systemd(*given, **more))
    expected = [
        "stop gone.service", "disable gone.service", f"remove {tmp_path}/gone.service",
        "stop tribrick-site-run@gone.timer", "disable tribrick-site-run@gone.timer",
    ]  # fmt: skip
    assert run(check=True)["actions"] == expected and not systemd.calls
    assert (tmp_path / "gone.service").exists()
    assert run()["actions"] == expected and systemd.calls[-1] == "daemon-reload"
    assert not (tmp_path / "gone.service").exists() and (tmp_path / "kept.service").exists()
    assert systemd.running == every - {"gone.service", "tribrick-site-run@gone.timer"}
    (tmp_path / "multi-user.target.wants/tribrick-site-run@gone.timer").unlink()  # systemctl disable did
    assert run()["changed"] is False


@pytest.mark.parametrize(
    ("server", "gone"),
    [
        ("tribrick", ["tribrick-lighttpd.service"]),
        ("lighttpd", ["tribrick-receiver.socket", "tribrick-receiver.service"]),
        ("none", ["tribrick-receiver.socket", "tribrick-receiver.service", "tribrick-lighttpd.service"]),
    ],
)
def test_receivers_that_nobody_asks_any_more_are_stopped(server: str, gone: list[str]) -> None:
    variables = yaml.safe_load((ROOT / "roles/media_receiver/vars/main.yml").read_text(encoding="utf-8"))
    asked = trust_as_template(variables["__media_receiver_gone"])
    stopped = Templar(loader=DataLoader(), variables=variables | {"media_receiver_server": server}).template(asked)
    assert stopped == [{"name": name, "state": "stopped", "enabled": False} for name in gone]
    tasks = yaml.safe_load((ROOT / "roles/media_receiver/tasks/main.yml").read_text(encoding="utf-8"))
    assert "__media_receiver_gone" in tasks[-1]["tribrick.media.units"]["units"]


def test_what_never_was_costs_no_daemon_reload(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    absent = "Id=x.service\nLoadState=not-found\nActiveState=inactive\nUnitFileState=\nNeedDaemonReload=no\n"
    calls = []

    def run(_module: object, command: list[str], **_more: object) -> tuple[int, str, str]:
        calls.append(command[command.index("systemctl") + 1])
        return 0, absent, ""

    monkeypatch.setattr(AnsibleModule, "run_command", run)
    given = {"units": [{"name": "x.service", "state": "stopped", "enabled": False}]}
    with patch_module_args(given), pytest.raises(SystemExit):
        units.main()
    assert json.loads(capsys.readouterr().out)["changed"] is False and calls == ["show"]


def test_a_unit_that_failed_is_forgotten_when_it_is_taken_away() -> None:
    assert retirement(unit(active="failed", enabled="enabled")) == ["disable", "reset-failed"]
    assert retirement(unit(active="activating", enabled="disabled")) == ["stop"]
