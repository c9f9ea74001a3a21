"""The role media_standby and the program agree: variables of the environment, options, who may connect."""

from __future__ import annotations

import re
import sys
from pathlib import Path
from typing import Any

import jinja2
import pytest
import yaml

from tribrick import opener, standby

ROOT = Path(__file__).resolve().parents[3]
ROLE = ROOT / "roles" / "media_standby"
EVERYTHING = {
    "media_standby_spool": "/srv/media-spool",
    "media_standby_mirror": "/srv/media-mirror",
    "media_standby_brick": "/srv/gluster/media/brick",
}


def render(name: str, **given: Any) -> str:
    """A template of the role, with its defaults, as Ansible renders it."""
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, keep_trailing_newline=True)  # noqa: S701  no HTML
    values = yaml.safe_load((ROLE / "defaults/main.yml").read_text()) | given | {"ansible_managed": "x"}
    own = yaml.safe_load((ROLE / "vars/main.yml").read_text())
    for key, value in ((key, value) for key, value in own.items() if isinstance(value, str)):
        values[key] = environment.from_string(value).render(values)
    return environment.from_string((ROLE / "templates" / name).read_text()).render(values)


def environment_of(**given: Any) -> dict[str, str]:
    """What systemd makes of the environment file."""
    pairs = re.findall(r'^(\w+)="([^"\\]*)"$', render("standby.env.j2", **given), re.MULTILINE)
    assert len(pairs) == len(render("standby.env.j2", **given).splitlines()) - 1
    return dict(pairs)


def options(unit: str) -> dict[str, list[str]]:
    """The settings of a unit; each may be there several times."""
    found: dict[str, list[str]] = {}
    for key, value in re.findall(r"^(\w+)=(.*)$", unit, re.MULTILINE):
        found.setdefault(key, []).append(value)
    return found


def test_the_program_takes_the_roles_environment() -> None:
    made = standby.application(environment_of(**EVERYTHING))
    assert [source.name for source in made.sources] == ["spool", "mirror", "brick"]
    assert made.rules == standby.Rules(), "the role's defaults are the program's"
    assert made.keys is None
    one = standby.application(environment_of(media_standby_mirror="/m", media_standby_private_directories=[]))
    assert [source.name for source in one.sources] == ["mirror"]
    assert one.rules.private == frozenset()
    documented = set(re.findall(r"``(TRIBRICK_STANDBY_\w+)``", str(standby.__doc__)))
    assert set(environment_of(**EVERYTHING, media_standby_keys={"web": "x"})) == documented


def test_the_units_start_programs_that_are_there(monkeypatch: pytest.MonkeyPatch) -> None:
    for unit, program in (("tribrick-standby", standby), ("tribrick-brick", opener)):
        [line] = options(render(f"{unit}.service.j2", **EVERYTHING))["ExecStart"]
        python, isolated, module, name, *arguments = line.split()
        assert (python, isolated, module, name) == ("/opt/tribrick/site/bin/python3", "-I", "-m", program.__name__)
        # The program gets as far as looking for its socket, so it has understood its arguments.
        monkeypatch.setattr(program, "passed_socket", lambda: (_ for _ in ()).throw(OSError("as far as that")))
        for key, value in environment_of(**EVERYTHING).items():
            monkeypatch.setenv(key, value)
        assert program.main(arguments) == 1
    assert "tribrick" in sys.modules


def test_only_the_standby_may_ask_the_opener_and_only_nginx_the_standby() -> None:
    brick, own = (options(render(f"{name}.socket.j2", **EVERYTHING)) for name in ("tribrick-brick", "tribrick-standby"))
    service = options(render("tribrick-standby.service.j2", **EVERYTHING))
    assert brick["SocketMode"] == own["SocketMode"] == ["0660"]
    assert brick["SocketGroup"] == service["Group"] == ["tribrick-standby"]
    assert own["SocketGroup"] == ["www-data"]
    assert environment_of(**EVERYTHING)["TRIBRICK_STANDBY_BRICK"] == brick["ListenStream"][0]


def test_the_rights_of_both() -> None:
    own, brick = (
        options(render(f"{name}.service.j2", **EVERYTHING)) for name in ("tribrick-standby", "tribrick-brick")
    )
    assert own["CapabilityBoundingSet"] == own["AmbientCapabilities"] == [""]
    assert brick["CapabilityBoundingSet"] == brick["AmbientCapabilities"] == ["CAP_DAC_READ_SEARCH"]
    for unit in (own, brick):
        assert unit["ProtectSystem"] == ["strict"] and unit["ReadOnlyPaths"] == ["/"]
        assert "ReadWritePaths" not in unit
        assert unit["PrivateNetwork"] == unit["NoNewPrivileges"] == ["true"]
        waits = " ".join(unit["After"] + unit["Requires"])
        assert "media" not in waits and "gluster" not in waits, "it is there for when they are not"
