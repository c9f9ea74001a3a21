"""A new CA in a vault: two values change, and nothing else."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from ansible.parsing.vault import VaultLib, VaultSecret
from cryptography import x509

from kit import inventory, new_ca

SPEC = inventory.SiteSpec(
    name="demo",
    nodes={f"node{n}": f"192.0.2.1{n}" for n in (1, 2, 3)},
    database_url="postgres://app:secret@db.example/app",
)


@pytest.fixture
def site(tmp_path: Path) -> tuple[Path, Path]:
    inventory.render(SPEC, tmp_path / "demo", tmp_path / "password")
    return tmp_path / "demo", tmp_path / "password"


def clear(file: Path, password_file: Path) -> str:
    vault = VaultLib([("default", VaultSecret(password_file.read_bytes().strip()))])
    return vault.decrypt(file.read_text()).decode()


def test_only_the_ca_is_another_one(site, capsys):
    directory, password = site
    file = directory / "group_vars/all/vault.yml"
    before = clear(file, password)
    assert new_ca.main([str(directory), f"--vault-password-file={password}", "--years=3"]) == 0
    after, old = yaml.safe_load(clear(file, password)), yaml.safe_load(before)
    assert {key for key in old if old[key] != after[key]} == set(new_ca._KEYS) and set(after) == set(old)
    assert clear(file, password).count("#") == before.count("#")
    made, was = (x509.load_pem_x509_certificate(one[new_ca._KEYS[1]].encode()) for one in (after, old))
    assert made.subject != was.subject and made.public_key() != was.public_key()
    assert 3 * 365 - 2 < (made.not_valid_after_utc - made.not_valid_before_utc).days < 3 * 366 + 2
    (kept,) = file.parent.glob("vault.before-*")
    assert clear(kept, password) == before and kept.suffix not in (".yml", ".yaml", ".json", "")
    assert "renew_certificates.yml" in capsys.readouterr().out


def test_twice_is_refused_by_nothing_and_works_on_its_own_form(site):
    directory, password = site
    for _ in range(2):
        new_ca.renew(directory, password, 3)
    assert yaml.safe_load(clear(directory / "group_vars/all/vault.yml", password))


@pytest.mark.parametrize("text", ["other: 1\n", "vault_tribrick_gluster_ca_key: a\n" * 2])
def test_a_vault_that_is_not_understood_is_left(text):
    with pytest.raises(inventory.SiteError, match="not once"):
        new_ca.replace(text, {"vault_tribrick_gluster_ca_key": "new"})


def test_a_wrong_password_and_no_site_are_a_sentence(site, tmp_path, capsys):
    directory, password = site
    (tmp_path / "wrong").write_text("wrong\n")
    assert new_ca.main([str(directory), f"--vault-password-file={tmp_path / 'wrong'}"]) == 2
    assert "does not open" in capsys.readouterr().err
    assert new_ca.main([str(tmp_path), f"--vault-password-file={password}"]) == 2
    assert "no site" in capsys.readouterr().err
