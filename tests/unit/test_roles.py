"""Each role says the same about its variables in defaults, argument specs and README."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).resolve().parents[2]
ROLES = sorted(path.parent.parent.name for path in ROOT.glob("roles/*/tasks/main.yml"))


def load(path: Path) -> dict:
    return (yaml.safe_load(path.read_text(encoding="utf-8")) or {}) if path.exists() else {}


def options(role: str) -> dict:
    """The options of all entry points."""
    found: dict = {}
    for entry in load(ROOT / "roles" / role / "meta/argument_specs.yml").get("argument_specs", {}).values():
        found |= entry.get("options", {})
    return found


def documented(role: str) -> dict[str, str]:
    """Variable -> its row, from the tables of the README."""
    found: dict[str, str] = {}
    for line in (ROOT / "roles" / role / "README.md").read_text(encoding="utf-8").splitlines():
        if line.startswith("| `"):
            for name in re.findall(rf"`({role}_\w+)`", line.split("|")[1]):
                found[name] = line
    return found


def test_roles_were_found():
    assert len(ROLES) >= 10


@pytest.mark.parametrize("role", ROLES)
def test_defaults_agree_with_the_argument_spec(role):
    spec = options(role)
    defaults = load(ROOT / "roles" / role / "defaults/main.yml")
    in_spec = {name: option["default"] for name, option in spec.items() if "default" in option}
    assert defaults == in_spec
    for name, option in spec.items():
        assert name.startswith(f"{role}_"), name
        assert option.get("description"), f"{name} is not described"
        assert option.get("type"), f"{name} has no type"
        assert "default" in option or option.get("required") is not None or "choices" in option, (
            f"{name} has neither a default nor a word on whether it is required"
        )


@pytest.mark.parametrize("role", ROLES)
def test_readme_lists_exactly_the_public_variables(role):
    rows = documented(role)
    spec = options(role)
    assert set(rows) == set(spec)
    for name, option in spec.items():
        assert ("required" in rows[name]) or not option.get("required"), f"{name} is required, its row does not say so"


@pytest.mark.parametrize("role", ROLES)
def test_roles_read_no_shared_or_foreign_variables(role):
    """What two roles share is passed by the playbook: a role reads neither the inventory's nor another role's names."""
    template = (ROOT / "templates/inventory/tribrick.yml.j2").read_text(encoding="utf-8")
    foreign = set(re.findall(r"^(?:# )?(tribrick_\w+):", template, re.MULTILINE))
    assert "tribrick_volume" in foreign
    for other in ROLES:
        if other != role:
            foreign |= set(options(other))
    for file in sorted((ROOT / "roles" / role).rglob("*")):
        if file.is_file() and file.relative_to(ROOT).parts[2] in {"tasks", "templates", "vars", "defaults", "handlers"}:
            for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), 1):
                code = line.split("#")[0] if file.suffix == ".yml" else "".join(re.findall(r"{[{%].*?[%}]}", line))
                read = foreign & set(re.findall(r"(?<![\w$./-])\w+", code))
                assert not read, f"{file.relative_to(ROOT)}:{number}: {line.strip()}"


def directories(role: str) -> list[tuple[str, tuple]]:
    """What a role makes with the action `templates`: path and (owner, group, mode), with its own defaults filled in."""
    known = load(ROOT / "roles" / role / "defaults/main.yml") | load(ROOT / "roles" / role / "vars/main.yml")

    def filled(text: str) -> str:
        return re.sub(r"{{ (\w+) }}", lambda match: str(known.get(match[1], match[0])), text)

    found = []
    for file in (ROOT / "roles" / role / "tasks").glob("*.yml"):
        for task in yaml.safe_load(file.read_text(encoding="utf-8")):
            listed = (task.get("tribrick.media.templates") or {}).get("directories", [])
            for one in listed if isinstance(listed, list) else []:
                # Owner and group stand as written: their names are the inventory's.
                what = (one.get("owner", "root"), one.get("group", "root"), one.get("mode", "0755"))
                found.append((filled(one["path"]), what))
    return found


def written(part: object) -> list[dict]:
    """The files of a task for the action `templates`, in its list or in its own variables."""
    if isinstance(part, dict):
        mine = [part] if "dest" in part and {"src", "content"} & set(part) else []
        return mine + [one for value in part.values() for one in written(value)]
    return [one for value in part for one in written(value)] if isinstance(part, list) else []


def test_what_not_everybody_may_read_is_not_in_logs_and_diffs():
    """Ansible notes in the host's journal what a module is given, and shows it with --diff."""
    # Closed, but without a secret; the configuration of the health check has one in its command only.
    harmless = {
        "secure-access.j2",
        "tribrick.conf.j2",
        "pg_hba.conf.j2",
        "known_hosts.j2",
        "authorized_keys.j2",
        "health.json.j2",
    }
    seen, open_ = set(), set()
    for file in ROOT.glob("roles/*/tasks/*.yml"):
        for task in yaml.safe_load(file.read_text(encoding="utf-8")):
            for one in written(task) if "tribrick.media.templates" in task else []:
                if not int(one.get("mode", "0644"), 8) & 0o004 and (
                    task.get("no_log") or one.get("src") not in harmless
                ):
                    (seen if task.get("no_log") else open_).add(one["dest"])
    assert {"/etc/tribrick/health.json", "/etc/tribrick/peer-watch.key"} <= seen
    assert open_ == set()


def test_a_directory_of_two_roles_is_made_alike_by_both():
    """Else each rollout changes it twice, and in between its owner cannot write."""
    made: dict[str, dict[tuple, list[str]]] = {}
    for role in ROLES:
        for path, what in directories(role):
            made.setdefault(path, {}).setdefault(what, []).append(role)
    assert "/var/lib/tribrick" in made and len(made["/etc/tribrick"]) == 1
    assert {path: kinds for path, kinds in made.items() if len(kinds) > 1} == {}
