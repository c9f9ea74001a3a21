"""scripts/new-ca: puts a new CA into a site's vault, for playbooks/renew_certificates.yml to bring to the hosts."""

from __future__ import annotations

import argparse
import datetime
import json
import re
import sys
from collections.abc import Sequence
from pathlib import Path

import yaml
from ansible.errors import AnsibleError
from ansible.parsing.vault import VaultLib

from kit.inventory import _VAULT, CA_YEARS, SiteError, _vault_secret, _write, make_ca

_KEYS = ("vault_tribrick_gluster_ca_key", "vault_tribrick_gluster_ca_certificate")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="new-ca",
        description="Put a new CA into a site's vault. No host is touched: playbooks/renew_certificates.yml does that, "
        "and until then rollouts refuse. The old vault is kept beside it.",
    )
    parser.add_argument("inventory", metavar="DIR", type=Path, help="the site's inventory, such as inventories/photos")
    parser.add_argument("--years", type=int, default=CA_YEARS, metavar="N", help=f"its lifetime (default: {CA_YEARS})")
    parser.add_argument(
        "--vault-password-file",
        type=Path,
        metavar="FILE",
        help="the vault's password (default: DIR/.vault-password)",
    )
    return parser


def replace(text: str, values: dict[str, str]) -> str:
    """Return the vault's clear text with other values of some keys; everything else stays as it is."""
    before = yaml.safe_load(text)
    for key, value in values.items():
        # The key's line, and those that belong to it: empty or indented.
        line = f"{key}: {json.dumps(value)}\n".replace("\\", r"\\")
        text, number = re.subn(rf"^{key}:.*\n(?:(?:[ \t].*)?\n)*", line, text, flags=re.M)
        if number != 1:
            raise SiteError(f"The vault has {key} {number} times, not once: put it right first.")
    if yaml.safe_load(text) != {**before, **values}:
        raise SiteError("The vault could not be changed without touching something else in it. Nothing was written.")
    return text


def renew(inventory: Path, password_file: Path, years: int) -> Path:
    """Write the new CA into the vault; return where the old vault is kept."""
    file = inventory / _VAULT
    if not file.exists():
        raise SiteError(f"{file} does not exist: {inventory} is no site of ./scripts/new-site.")
    vault = VaultLib([("default", _vault_secret(password_file, create=False))])
    old = file.read_text(encoding="utf-8")
    try:
        text = vault.decrypt(old).decode()
    except AnsibleError:
        raise SiteError(f"The password in {password_file} does not open {file}.") from None
    today = datetime.datetime.now(datetime.timezone.utc)
    # A name of its own, so that people can tell the two apart.
    made = make_ca(f"{inventory.name} {today:%Y-%m-%d}", years)
    changed = replace(text if text.endswith("\n") else f"{text}\n", dict(zip(_KEYS, made, strict=True)))
    kept = file.with_name(f"{file.stem}.before-{today:%Y%m%dT%H%M%S.%f}Z")  # no .yml: Ansible must not read it
    _write(kept, old, 0o600)
    _write(file, vault.encrypt(changed, secret=vault.secrets[0][1]).decode(), 0o600)
    return kept


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line."""
    arguments = _parser().parse_args(argv)
    inventory = arguments.inventory
    password_file = arguments.vault_password_file or inventory / ".vault-password"
    try:
        kept = renew(inventory, password_file, arguments.years)
    except SiteError as error:
        print(f"new-ca: {error}", file=sys.stderr)
        return 2
    print(f"{inventory / _VAULT} has a new CA; the old vault is {kept}. Now bring it to the hosts:")
    print(
        f"  .venv/bin/ansible-playbook -i {inventory} --vault-password-file {password_file} "
        "playbooks/renew_certificates.yml -e confirm=yes"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
