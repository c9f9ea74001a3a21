"""The documents say what is so: links, commands, playbooks, ports, variables."""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kit import bench, lab, new_ca, new_site, testing

ROOT = Path(__file__).resolve().parents[2]
MADE = {"build", "collections", "dist"}
DOCUMENTS = sorted(
    path
    for path in ROOT.rglob("*.md")
    if not any(part in MADE or part.startswith(".") for part in path.relative_to(ROOT).parts)
    and not re.match(r"inventories/(?!example/)", path.relative_to(ROOT).as_posix())
)
# What the README promises to lead to.
EXPECTED = {
    "README.md",
    "CHANGELOG.md",
    "CONTRIBUTING.md",
    "docs/catalog.md",
    "docs/lab.md",
    "docs/measurements.md",
    "docs/mirror.md",
    "docs/offline.md",
    "docs/one-address.md",
    "docs/operations.md",
    "docs/peer-watch.md",
    "docs/ports.md",
    "docs/receiver.md",
    "docs/runbooks/README.md",
    "docs/security.md",
    "docs/serving.md",
    "docs/spool.md",
    "docs/standby.md",
    "docs/storages.md",
    "docs/sync.md",
    "docs/testing.md",
    "docs/tutorial-moving.md",
    "docs/variables.md",
    "docs/volume-storage.md",
}
VARIABLES = ROOT / "templates" / "inventory"


def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def name_of(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def without_code(text: str) -> str:
    """Leave out code: a bracket in it is no link, a # in it no heading."""
    text = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"`[^`\n]*`", "", text)


def links(text: str) -> list[str]:
    """Targets of links and pictures that lead to a file of the repository."""
    found = re.findall(r"\]\(([^)\s]+)\)", without_code(text))
    return [target for target in found if not re.match(r"[a-z]+:", target)]


def anchors(text: str) -> set[str]:
    """The names by which headings can be reached."""
    fenced = re.sub(r"^ *```.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    heads = re.findall(r"^#+ +(.*)$", fenced, re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", head.lower()).replace(" ", "-") for head in heads}


def broken_links(path: Path, text: str) -> list[str]:
    """Links whose file, or whose heading in it, is not there."""
    broken = []
    for target in links(text):
        file, _, anchor = target.partition("#")
        there = (path.parent / file).resolve() if file else path
        if not there.exists() or (anchor and anchor not in anchors(read(there) if file else text)):
            broken.append(target)
    return broken


def commands(text: str) -> list[list[str]]:
    """Every `./scripts/...` command as words; of a line broken by a backslash the whole."""
    text = re.sub(r"\\\n\s*", " ", text)
    found = re.findall(r"`\.(/scripts/[^`\n]+)`|^[^`\n]*?(?<!`)\.(/scripts/[^`\n]*)$", text, re.MULTILINE)
    return [shlex.split(f".{one or two}", comments=True) for one, two in found]


def refusal(parse: Callable[[list[str]], object], words: list[str]) -> str:
    """What a parser says against the words; nothing when it takes them."""
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try:
            parse(words)
        except SystemExit as end:
            return said.getvalue().strip() if end.code else ""
    return ""


def wrong_commands(text: str) -> list[str]:
    """Commands that do not exist, or that do not take their words."""
    wrong = []
    for script, *words in commands(text):
        file = ROOT / script.rstrip(".,;:")
        said = ""
        if not file.is_file() or not file.stat().st_mode & 0o100:
            said = "there is no such script"
        elif "..." in words or not words:
            continue
        elif file.name == "bench":
            said = refusal(bench.parser().parse_args, words)
        elif file.name == "lab":
            said = refusal(lab.parser().parse_args, words)
        elif file.name == "new-ca":
            said = refusal(new_ca._parser().parse_args, words)
        elif file.name == "new-site":
            said = refusal(new_site._parser().parse_args, words)
        elif file.name == "test":
            said = refusal(testing.parse, [word for word in words if not word.isupper()])
        if said:
            wrong.append(f"{' '.join([script, *words])}: {said}")
    return wrong


def playbooks(text: str) -> set[str]:
    """Paths of the playbooks that a text names."""
    verbs = "deploy|check|recover|restore|reboot|renew|fallback|lab"
    found = set(re.findall(rf"(?<![\w/.-])((?:playbooks/)?(?:{verbs})_\w+\.yml)\b", text))
    found |= set(re.findall(r"(?<![\w/.-])site\.yml\b", text))
    return {name if "/" in name or name == "site.yml" else f"playbooks/{name}" for name in found}


@pytest.fixture(scope="module")
def shared() -> dict[str, Any]:
    """The shared variables as an example site has them."""
    loaded: dict[str, Any] = yaml.safe_load(read(ROOT / "inventories/example/group_vars/all/tribrick.yml"))
    return loaded


def table(text: str) -> Iterator[list[str]]:
    """The rows of all tables."""
    for line in re.findall(r"^\|(.*)\|$", text, re.MULTILINE):
        cells = [cell.strip() for cell in line.split("|")]
        if not set("".join(cells)) <= set("-: "):
            yield cells


def documented_ports(text: str) -> dict[str, tuple[set[str], set[str]]]:
    """Of each rule in docs/ports.md: its ports, and the groups whose hosts may reach them."""
    rules: dict[str, tuple[set[str], set[str]]] = {}
    for port, _what, who, rule in (row for row in table(text) if len(row) == 4 and re.match(r"\d|protocol \d", row[0])):
        ports, groups = rules.setdefault(rule.strip("`"), (set(), set()))
        ports.add(port)
        groups.update(re.findall(r"`(\w+)`", who) or [who])
    return rules


def actual_ports(play: dict[str, Any], values: dict[str, Any]) -> dict[str, tuple[set[str], set[str]]]:
    """The same of a play that gives the role `firewall` its rules."""
    given = next(role["vars"] for role in play["roles"] if role["role"].endswith(".firewall"))

    def fill(template: object) -> str:
        def value(match: re.Match[str]) -> str:
            found: Any = values
            for word in match[1].split("|")[0].strip().split("."):
                found = found[word]
            return str(found)

        return re.sub(r"{{(.*?)}}", value, str(template))

    rules = {}
    for rule in given["__rules"] + given["__vip_rules"]:
        protocol = rule.get("protocol", "tcp")
        kind = {"tcp": "", "udp": " (UDP)"}.get(protocol)
        ports = {f"protocol {protocol}"} if kind is None else {fill(port) + kind for port in rule["ports"]}
        sources = re.sub(r"__\w+", lambda name: str(given[name[0]]), rule["sources"])
        rules[rule["name"]] = (ports, set(re.findall(r"groups\['(\w+)'\]", sources)))
    return rules


def role_variables() -> set[str]:
    """Every public variable of a role: with a default, or in the argument specification."""
    names: set[str] = set()
    for file in ROOT.glob("roles/*/defaults/main.yml"):
        names |= set(yaml.safe_load(read(file)) or {})
    for file in ROOT.glob("roles/*/meta/argument_specs.yml"):
        for entry in yaml.safe_load(read(file))["argument_specs"].values():
            names |= set(entry.get("options", {}))
    return names


def variables_of_templates() -> set[str]:
    """Every variable that a rendered inventory may hold, the commented ones included."""
    found = "".join(read(VARIABLES / f"{name}.yml.j2") for name in ("tribrick", "vault", "group_vars_hosts"))
    return set(re.findall(r"^(?:# )?((?:vault_)?tribrick_\w+):", found, re.MULTILINE))


def test_every_document_is_there_and_looked_at() -> None:
    assert {name_of(path) for path in DOCUMENTS} >= EXPECTED


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_links_lead_somewhere(path: Path) -> None:
    assert broken_links(path, read(path)) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_commands_exist_and_take_their_words(path: Path) -> None:
    assert wrong_commands(read(path)) == []


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_playbooks_exist(path: Path) -> None:
    assert [name for name in sorted(playbooks(read(path))) if not (ROOT / name).is_file()] == []


def test_every_operation_is_in_the_index() -> None:
    index = read(ROOT / "docs/runbooks/README.md")
    there = {name_of(path) for path in (ROOT / "playbooks").glob("*.yml") if not path.name.startswith("lab_")}
    assert there
    assert there <= playbooks(index)


def test_the_table_of_ports_is_that_of_the_firewall(shared: dict[str, Any]) -> None:
    [play] = yaml.safe_load(read(ROOT / "playbooks/deploy_base.yml"))
    documented = documented_ports(read(ROOT / "docs/ports.md"))
    always, without_rule = documented.pop("firewall_always_open"), documented.pop("none")
    database = yaml.safe_load(read(ROOT / "roles/database/defaults/main.yml"))
    assert documented == actual_ports(play, shared | {"database_port": database["database_port"]})
    firewall = yaml.safe_load(read(ROOT / "roles/firewall/defaults/main.yml"))
    web = yaml.safe_load(read(ROOT / "roles/media_web/defaults/main.yml"))
    assert always == ({str(port) for port in firewall["firewall_always_open"]}, {"everybody"})
    assert without_rule == ({str(web["media_web_http_port"]), str(web["media_web_https_port"])}, {"everybody"})


def test_every_shared_variable_is_documented_with_its_default(shared: dict[str, Any]) -> None:
    rows = {row[0].strip("`"): row for row in table(read(ROOT / "docs/variables.md")) if row[0].startswith("`")}
    wanted = variables_of_templates()
    assert wanted
    assert wanted - set(rows) == set()
    assert {name for name in rows if re.fullmatch(r"(vault_)?tribrick_\w+", name)} - wanted == set()
    for name in wanted & set(shared):
        default = rows[name][1].strip("`")
        if "`" in rows[name][1]:
            assert yaml.safe_load(default) == shared[name] or name in {"tribrick_domain"}, f"{name}: {default}"


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_variables_of_roles_exist(path: Path) -> None:
    roles = sorted((folder.name for folder in (ROOT / "roles").iterdir()), key=len, reverse=True)
    spans = re.findall(rf"`((?:{'|'.join(roles)})_[a-z_]+)\b[^`]*`", read(path))
    # In a block of YAML the variable starts the line.
    spans += re.findall(rf"^ *((?:{'|'.join(roles)})_[a-z_]+): ", read(path), re.MULTILINE)
    groups = set(yaml.safe_load(read(ROOT / "inventories/example/hosts.yml")))
    assert sorted(set(spans) - role_variables() - groups) == []


def test_defaults_of_roles_are_those_of_the_roles() -> None:
    defaults: dict[str, Any] = {}
    for file in ROOT.glob("roles/*/defaults/main.yml"):
        defaults |= yaml.safe_load(read(file)) or {}
    compared = 0
    for row in table(read(ROOT / "docs/variables.md")):
        name = row[0].strip("`")
        if name in defaults and (row[1].startswith("`") or row[1] == "empty"):
            shown = "" if row[1] == "empty" else yaml.safe_load(row[1].strip("`"))
            actual = defaults[name]
            if isinstance(actual, str) and "{{ role_path }}/../../" in actual:
                actual = actual.removeprefix("{{ role_path }}/../../")
            assert shown == actual, name
            compared += 1
    assert compared > 10


@pytest.mark.parametrize("path", DOCUMENTS, ids=name_of)
def test_no_address_of_a_registry_and_no_left_over(path: Path) -> None:
    text = read(path)
    # Hosts in documents are of .example, addresses of those kept for documents or of the lab.
    hosts = re.findall(r"https?://([^\s/`\"'<>:)]+)", text)
    allowed = re.compile(r".*\.example|localhost|192\.0\.2\.\d+|198\.1[89]\.\d+\.\d+|[A-Z_]+|.*[{\[<].*")
    assert [host for host in hosts if not allowed.fullmatch(host)] == []
    assert re.findall(r"\b(?:TODO|TBD|FIXME|XXX)\b|@[a-z-]+@", text) == []


@pytest.mark.parametrize(
    ("check", "bad"),
    [
        (lambda text: broken_links(ROOT / "README.md", text), "[x](docs/nowhere.md)"),
        (lambda text: broken_links(ROOT / "README.md", text), "[x](docs/ports.md#nowhere)"),
        (wrong_commands, "`./scripts/nowhere`"),
        (wrong_commands, "`./scripts/lab explode`"),
        (wrong_commands, "```sh\n./scripts/lab up --no-such-option   # words\n```"),
        (wrong_commands, "`./scripts/test nonsense`"),
        (wrong_commands, "`./scripts/bench nonsense`"),
        (lambda text: [n for n in playbooks(text) if not (ROOT / n).exists()], "run `recover_nothing.yml`"),
    ],
)
def test_the_checks_see_what_is_wrong(check: Any, bad: str) -> None:
    assert check(bad)
