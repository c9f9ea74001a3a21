"""What scripts/new-site and the lab write, and what they refuse."""

from __future__ import annotations

import dataclasses
import datetime
import json
import os
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from ansible.parsing.vault import VaultLib, VaultSecret
from cryptography import x509
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec

ROOT = Path(__file__).resolve().parents[3]
sys.path.insert(0, str(ROOT / "scripts" / "lib"))

from kit import inventory, new_site  # noqa: E402 (the package lies in scripts/lib)

NODES = {"node1": "192.0.2.11", "node2": "192.0.2.12", "node3": "192.0.2.13"}
SPEC = inventory.SiteSpec(name="demo", nodes=NODES, database_host=("db1", "192.0.2.21"))
NODE_ARGUMENTS = [f"--node={name}={address}" for name, address in NODES.items()]
URL = "postgres://app:s3cret@db.example/app"


def secrets_of(directory: Path, password_file: Path) -> dict[str, str]:
    vault = VaultLib([("default", VaultSecret(password_file.read_bytes().strip()))])
    text = vault.decrypt((directory / "group_vars/all/vault.yml").read_bytes())
    return dict(yaml.safe_load(text))


def show(directory: Path, password_file: Path) -> subprocess.CompletedProcess[str]:
    """Run a play that prints variables of all hosts, and connects to none."""
    wanted = {
        "host": "{{ ansible_host }}",
        "url": "{{ tribrick_database_url }}",
        "limit": "{{ tribrick_max_upload_mib }}",
    }
    return run_tasks(directory, password_file, {"ansible.builtin.debug": {"msg": wanted}})


def run_tasks(directory: Path, password_file: Path, task: dict[str, object]) -> subprocess.CompletedProcess[str]:
    play = {"hosts": "all", "gather_facts": False, "tasks": [task]}
    playbook = directory.parent / "play.yml"
    playbook.write_text(json.dumps([play]))
    (directory.parent / "ansible.cfg").write_text("[defaults]\n")  # and not this project's
    return subprocess.run(
        [
            Path(sys.executable).with_name("ansible-playbook"),
            f"--inventory={directory}",
            f"--vault-password-file={password_file}",
            playbook,
        ],
        capture_output=True,
        text=True,
        check=False,
        env=os.environ
        | {
            "ANSIBLE_CONFIG": str(directory.parent / "ansible.cfg"),
            "ANSIBLE_STDOUT_CALLBACK": "ansible.posix.json",
        },
        timeout=120,
    )


def seen_by_ansible(directory: Path, password_file: Path) -> dict[str, dict[str, object]]:
    """Host -> variables, all templated, as a play sees them."""
    output = show(directory, password_file)
    assert output.returncode == 0, output.stdout + output.stderr
    hosts = json.loads(output.stdout)["plays"][0]["tasks"][0]["hosts"]
    return {host: result["msg"] for host, result in hosts.items()}


def test_the_example_is_what_the_templates_give() -> None:
    directory = ROOT / "inventories" / "example"
    found = {str(path.relative_to(directory)): path.read_text() for path in directory.rglob("*") if path.is_file()}
    assert found == inventory.example_files(), "run: PYTHONPATH=scripts/lib python -m kit.inventory"


def test_every_variable_is_explained() -> None:
    lines = (ROOT / "templates/inventory/tribrick.yml.j2").read_text().splitlines()
    blocks = "\n".join(lines).split("\n\n")
    for block in blocks:
        if "tribrick_" in block and not block.startswith("---"):
            text = [line for line in block.splitlines() if not line.startswith("[%")]
            assert text[0].startswith("# "), f"no comment above: {block}"


def test_a_site_is_written_once_and_whole(tmp_path: Path) -> None:
    directory, password = tmp_path / "demo", tmp_path / "demo" / ".vault-password"
    changed = inventory.render(SPEC, directory, password)
    assert "hosts.yml" in changed
    assert "group_vars/all/vault.yml" in changed
    assert [p.name for p in tmp_path.iterdir()] == ["demo"], "no temporary directory stays"
    assert (directory / ".gitignore").read_text() == "/.vault-password\n"
    for secret in (password, directory / "group_vars/all/vault.yml"):
        assert stat.S_IMODE(secret.stat().st_mode) == 0o600
    hosts = yaml.safe_load((directory / "hosts.yml").read_text())
    assert list(hosts["gluster_servers"]["hosts"]) == list(NODES)
    assert list(hosts["database_servers"]["hosts"]) == ["db1"]
    clear = b"".join(path.read_bytes() for path in directory.rglob("*") if path.is_file() and path != password)
    for value in secrets_of(directory, password).values():
        assert value.encode() not in clear, "a secret stands in a plain file"


def test_ansible_reads_it_and_overrides_win(tmp_path: Path) -> None:
    directory, password = tmp_path / "demo", tmp_path / "password"
    spec = dataclasses.replace(SPEC, overrides={"tribrick_max_upload_mib": 7})
    inventory.render(spec, directory, password)
    seen = seen_by_ansible(directory, password)
    assert {name: str(v["host"]) for name, v in seen.items()} == spec.hosts
    assert {v["limit"] for v in seen.values()} <= {7, "7"}
    word = secrets_of(directory, password)["vault_tribrick_database_password"]
    assert {v["url"] for v in seen.values()} == {f"postgres://tribrick:{word}@192.0.2.21:5432/tribrick"}


def test_a_delegated_task_reaches_the_host_it_names(tmp_path: Path) -> None:
    """The address must not follow the host that the task runs for."""
    calls = tmp_path / "calls"
    ssh = tmp_path / "ssh"
    ssh.write_text(f'#!/bin/sh\necho "$@" >> {calls}\nexit 255\n')
    ssh.chmod(0o755)
    spec = dataclasses.replace(SPEC, overrides={"ansible_ssh_executable": str(ssh)})
    inventory.render(spec, tmp_path / "demo", tmp_path / "password")
    task = {"ansible.builtin.raw": "true", "delegate_to": "node2"}
    assert run_tasks(tmp_path / "demo", tmp_path / "password", task).returncode != 0
    reached = calls.read_text().splitlines()
    assert len(reached) == len(SPEC.hosts)
    assert all(" 192.0.2.12 " in call for call in reached), reached


def test_a_wrong_vault_password_ends_a_play_before_its_first_task(tmp_path: Path) -> None:
    directory, password = tmp_path / "demo", tmp_path / "password"
    inventory.render(SPEC, directory, password)
    password.write_text("another\n")
    output = show(directory, password)
    assert output.returncode != 0
    assert "Decryption failed" in output.stderr
    assert "ansible_host" not in output.stdout
    assert "192.0.2.11" not in output.stdout, "a task ran"


def test_the_ca_signs_for_twenty_years_and_nothing_else(tmp_path: Path) -> None:
    inventory.render(SPEC, tmp_path / "demo", tmp_path / "password")
    values = secrets_of(tmp_path / "demo", tmp_path / "password")
    pem = values["vault_tribrick_gluster_ca_certificate"].encode()
    certificate = x509.load_pem_x509_certificate(pem)
    key = serialization.load_pem_private_key(values["vault_tribrick_gluster_ca_key"].encode(), password=None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert key.public_key() == certificate.public_key()
    certificate.verify_directly_issued_by(certificate)
    assert certificate.subject.rfc4514_string() == "CN=tribrick demo CA"
    span = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert span >= datetime.timedelta(days=20 * 365)
    basic = certificate.extensions.get_extension_for_class(x509.BasicConstraints)
    assert basic.critical
    assert basic.value.ca


@pytest.mark.parametrize("years", [0, 51])
def test_an_odd_lifetime_of_the_ca_is_refused(years: int, tmp_path: Path) -> None:
    with pytest.raises(inventory.SiteError, match=f"cannot be valid for {years} years"):
        inventory.render(dataclasses.replace(SPEC, ca_years=years), tmp_path / "site", tmp_path / "password")


def test_the_lifetime_of_the_ca_can_be_chosen() -> None:
    certificate = x509.load_pem_x509_certificate(inventory.make_ca("site", 3)[1].encode())
    span = certificate.not_valid_after_utc - certificate.not_valid_before_utc
    assert span.days == round(3 * 365.25)


def test_a_second_rendering_keeps_secrets_and_volume_id(tmp_path: Path) -> None:
    directory, password = tmp_path / "lab", tmp_path / "password"
    assert inventory.render(SPEC, directory, password, update=True)
    vault = (directory / "group_vars/all/vault.yml").read_bytes()
    shared = (directory / "group_vars/all/tribrick.yml").read_text()
    assert inventory.render(SPEC, directory, password, update=True) == []
    moved = dataclasses.replace(SPEC, nodes=NODES | {"node3": "192.0.2.99"})
    changed = inventory.render(moved, directory, password, update=True)
    assert changed == ["group_vars/all/hosts.yml", "RUNBOOK.md"]
    assert (directory / "group_vars/all/vault.yml").read_bytes() == vault
    assert (directory / "group_vars/all/tribrick.yml").read_text() == shared


def test_a_directory_is_never_written_over(tmp_path: Path) -> None:
    inventory.render(SPEC, tmp_path / "demo", tmp_path / "password")
    before = (tmp_path / "demo/group_vars/all/vault.yml").read_bytes()
    with pytest.raises(inventory.SiteError, match="exists already"):
        inventory.render(SPEC, tmp_path / "demo", tmp_path / "password")
    assert (tmp_path / "demo/group_vars/all/vault.yml").read_bytes() == before


@pytest.mark.parametrize(
    ("content", "message"),
    [(None, "put it back"), ("another\n", "does not open"), ("\n", "is empty")],
)
def test_a_lost_or_wrong_vault_password_stops_an_update(tmp_path: Path, content: str | None, message: str) -> None:
    inventory.render(SPEC, tmp_path / "lab", tmp_path / "password", update=True)
    if content is None:
        (tmp_path / "password").unlink()
    else:
        (tmp_path / "password").write_text(content)
    with pytest.raises(inventory.SiteError, match=message):
        inventory.render(SPEC, tmp_path / "lab", tmp_path / "password", update=True)


def test_a_failure_leaves_no_half_inventory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object) -> dict[str, str]:
        raise RuntimeError("disk gone")

    monkeypatch.setattr(inventory, "plain_files", broken)
    with pytest.raises(RuntimeError):
        inventory.render(SPEC, tmp_path / "demo", tmp_path / "demo/.vault-password")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"nodes": {}}, "0 nodes cannot keep"),
        ({"nodes": dict(list(NODES.items())[:1])}, "1 node cannot keep"),
        ({"nodes": dict(list(NODES.items())[:2])}, "2 nodes cannot keep three copies"),
        ({"nodes": NODES | {f"node{n}": f"192.0.2.1{n}" for n in (4, 5, 6)}}, "6 nodes are too many"),
        ({"nodes": NODES | {"node3": "192.0.2.11"}}, "node1 and node3 have the same address"),
        ({"nodes": NODES | {"node3": "192.0.2.13/24"}}, "no plain IP address for node3"),
        ({"nodes": NODES | {"node3": "127.0.1.1"}}, "cannot be the address of node3"),
        ({"database_host": ("node1", "192.0.2.21")}, "give it one address"),
        ({"database_host": None}, "either a database URL"),
        ({"database_url": URL}, "either a database URL"),
        ({"name": "../demo"}, "cannot be a site's name"),
        ({"app_servers": ("node9",)}, "app server node9 is none of"),
        ({"domain": "https://x"}, "no domain name"),
        ({"ssh_user": "-oProxyCommand=x"}, "no name of a login user"),
        ({"ssh_port": 0}, "no TCP port"),
        ({"overrides": {"a-b": 1}}, "no name of a variable"),
    ],
)
def test_refused_sites(tmp_path: Path, change: dict[str, object], message: str) -> None:
    with pytest.raises(inventory.SiteError, match=message):
        inventory.render(dataclasses.replace(SPEC, **change), tmp_path / "demo", tmp_path / "p")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "name", ["Node1", "node_1", "-node", "192.0.2.1", "a" * 64, "a." * 40 + "a", f"{'a' * 55}.test", "all", "", "a..b"]
)
def test_refused_host_names(name: str) -> None:
    with pytest.raises(inventory.SiteError, match="cannot be a host's name"):
        inventory.parse_host(f"{name}=192.0.2.1")


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (["192.0.2.1", "192.0.2.2"], "choose the one"),
        (["127.0.1.1"], "other hosts do not reach it"),
        ([], "has 0 addresses"),
        (OSError("Name or service not known"), "node1 has no address here"),
    ],
)
def test_a_name_that_cannot_be_pinned(answer: list[str] | OSError, message: str) -> None:
    def resolve(_: str) -> list[str]:
        if isinstance(answer, OSError):
            raise answer
        return answer

    with pytest.raises(inventory.SiteError, match=message):
        inventory.parse_host("node1", resolve)


def test_a_bare_name_is_looked_up_and_pinned() -> None:
    found = ["192.0.2.5", "2001:db8::5"]
    assert inventory.parse_host("node1", lambda _: found) == ("node1", "192.0.2.5")
    assert inventory.parse_host("node1=2001:DB8::0:5") == ("node1", "2001:db8::5")


@pytest.mark.parametrize(
    "url",
    [
        URL,
        "postgresql://app@a.example:5432,b.example:5433/app?target_session_attrs=read-write",
        "postgres://app:p%40ss@[2001:db8::1]:5432/app",
    ],
)
def test_database_urls(url: str) -> None:
    inventory.check_database_url(url)
    assert "p%40ss" not in inventory.redacted(url)
    assert "s3cret" not in inventory.redacted(url)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("mysql://a:b@c/d", "starts with 'mysql'"),
        ("postgres://host/db", "names no user"),
        ("postgres://a:b@/db", "host '' is not valid"),
        ("postgres://a:b@host:99999/db", "host 'host:99999'"),
        ("postgres://a:b@host", "names no database"),
        ("postgres://a:b c@host/db", "%-encoded"),
        ("postgres://a:{{ x }}@host/db", "%-encoded"),
        ("postgres://a:{{x}}@host/db", "%-encoded"),
    ],
)
def test_refused_database_urls(url: str, message: str) -> None:
    with pytest.raises(inventory.SiteError, match=message):
        inventory.check_database_url(url)


def run(tmp_path: Path, *arguments: str) -> int:
    return new_site.main([*arguments, f"--directory={tmp_path}"])


def test_new_site_says_what_to_do_next(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(tmp_path, "demo", *NODE_ARGUMENTS, f"--database-url={URL}") == 0
    output = capsys.readouterr().out
    directory = tmp_path / "demo"
    assert f"-i {directory} --vault-password-file {directory}/.vault-password site.yml" in output
    assert "s3cret" not in output
    assert secrets_of(directory, directory / ".vault-password")["vault_tribrick_database_url"] == URL


def test_new_site_takes_a_node_as_the_database_host(tmp_path: Path) -> None:
    assert run(tmp_path, "demo", *NODE_ARGUMENTS, "--database-host=node1") == 0
    hosts = yaml.safe_load((tmp_path / "demo/group_vars/all/hosts.yml").read_text())
    assert list(hosts["tribrick_hosts"]) == list(NODES)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["demo", *NODE_ARGUMENTS[:2], "--database-url", URL], "2 nodes cannot keep three copies"),
        (
            ["demo", *NODE_ARGUMENTS, NODE_ARGUMENTS[0], "--database-url", URL],
            "node1 is given twice",
        ),
        (["lab", *NODE_ARGUMENTS, "--database-url", URL], "belongs to the kit itself"),
        (["demo", *NODE_ARGUMENTS, "--database-url", "mysql://a:b@c/d"], "starts with 'mysql'"),
    ],
)
def test_new_site_refuses_in_one_sentence(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    assert run(tmp_path, *arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith("new-site: ")
    assert message in error
    assert "s3cret" not in error
    assert list(tmp_path.iterdir()) == []


def test_new_site_needs_a_database(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        run(tmp_path, "demo", *NODE_ARGUMENTS)
    assert "--database-url --database-host is required" in capsys.readouterr().err


def test_new_site_writes_the_media_back_end(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    nodes = [word for number in (1, 2, 3) for word in ("--node", f"n{number}=192.0.2.{number}")]
    more = ["--database-host", "n1", "--backend", "hybrid", "--directory", str(tmp_path)]
    assert new_site.main(["site", *nodes, *more]) == 0
    shared = yaml.safe_load((tmp_path / "site/group_vars/all/tribrick.yml").read_text(encoding="utf-8"))
    assert shared["media_backend"] == "hybrid"
    assert "for the brick" not in capsys.readouterr().out.split("Next:")[1]
