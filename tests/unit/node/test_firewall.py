"""The role firewall: rules of TCP, UDP and protocols without ports, and what it refuses."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml

from .test_one_address import render

ROOT = Path(__file__).resolve().parents[3]
ROLE = ROOT / "roles/firewall"
HOSTS = ["192.0.2.11", "192.0.2.12", "2001:db8::11"]
RULES: list[dict[str, Any]] = [
    {"name": "files", "ports": [7443, "49152-49251"], "sources": HOSTS},
    {"name": "pages", "ports": [7445], "protocol": "tcp", "sources": HOSTS[:1]},
    {"name": "heartbeats", "ports": [7444], "protocol": "udp", "sources": HOSTS},
    {"name": "vrrp", "protocol": 112, "sources": HOSTS},
    {"name": "ah", "protocol": "51", "sources": []},
]
WRONG: dict[str, dict[str, Any]] = {
    "no ports": {},
    "empty": {"ports": []},
    "udp without ports": {"protocol": "udp"},
    "both": {"protocol": 112, "ports": [80]},
    "all of tcp": {"protocol": 6},
    "all of udp": {"protocol": "17"},
    "too large": {"protocol": 256},
    "zero": {"protocol": 0},
    "a name": {"protocol": "vrrp"},
    "a name with ports": {"protocol": "sctp", "ports": [80]},
}


def lines_of(text: str, name: str) -> list[str]:
    """The lines of the chain that a rule has made."""
    chain = text.split("chain input {")[1]
    return [line.strip() for line in chain.splitlines() if f"@{name}_" in line or f'"{name}"' in line]


@pytest.mark.parametrize(
    ("name", "what"),
    [
        ("files", "tcp dport { 7443, 49152-49251 }"),
        ("pages", "tcp dport { 7445 }"),
        ("heartbeats", "udp dport { 7444 }"),
        ("vrrp", "meta l4proto 112"),
        ("ah", "meta l4proto 51"),
    ],
)
def test_a_rule_lets_its_sources_in_and_nobody_else(name: str, what: str) -> None:
    text = render("firewall", "firewall.nft.j2", firewall_rules=RULES)
    assert lines_of(text, name) == [
        f"{what} ip saddr @{name}_ipv4 accept",
        f"{what} ip6 saddr @{name}_ipv6 accept",
        f'{what} counter drop comment "{name}"',
    ]
    assert text.split(f"set {name}_ipv4")[1].count("192.0.2.11", 0, 90) == (name != "ah")


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """What the role's first tasks, and its argument specification, say to rules."""
    work = tmp_path_factory.mktemp("firewall")
    asserts = [
        task for task in yaml.safe_load((ROLE / "tasks/main.yml").read_text()) if "ansible.builtin.assert" in task
    ]
    spec = yaml.safe_load((ROLE / "meta/argument_specs.yml").read_text())["argument_specs"]["main"]
    given = {"right": RULES} | {name: [{"name": "one", "sources": HOSTS, **rule}] for name, rule in WRONG.items()}
    tasks: list[dict[str, Any]] = [
        {
            "name": "Check the types",
            "ansible.builtin.validate_argument_spec": {"argument_spec": spec["options"]},
            "vars": {"firewall_rules": RULES},
        }
    ]
    for number, rules in enumerate(given.values()):
        steps = [{**task, "vars": task.get("vars", {}) | {"firewall_rules": rules}} for task in asserts]
        kept = {"name": "Keep it", "ansible.builtin.set_fact": {f"said_{number}": "{{ ansible_failed_result.msg }}"}}
        tasks.append({"name": "Judge", "block": steps, "rescue": [kept]})
    said = ", ".join(f"said_{number} | default('')" for number in range(len(given)))
    copy = {"dest": str(work / "said.json"), "content": f"{{{{ [{said}] | to_json }}}}", "mode": "0600"}
    tasks.append({"name": "Tell", "ansible.builtin.copy": copy})
    play = {"hosts": "localhost", "connection": "local", "gather_facts": False, "tasks": tasks}
    (work / "play.yml").write_text(yaml.safe_dump([play]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", "--inventory=localhost,",
         f"--extra-vars=ansible_python_interpreter={sys.executable}", str(work / "play.yml")],
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return dict(zip(given, json.loads((work / "said.json").read_text()), strict=True))


def test_every_kind_of_rule_is_taken(judged: dict[str, str]) -> None:
    assert judged["right"] == ""


@pytest.mark.parametrize("name", WRONG)
def test_protocols_and_ports_that_do_not_go_together_are_refused(judged: dict[str, str], name: str) -> None:
    assert judged[name].startswith("firewall_rules: one: the protocol is tcp or udp, and the rule has ports")
