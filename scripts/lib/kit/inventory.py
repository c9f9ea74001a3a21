"""Writes a site's inventory from templates/: for scripts/new-site and for the lab alike.

A rendered inventory holds two kinds of files. The plain ones follow from a SiteSpec and the
templates and may be written again. The vault holds secrets made once, here, and never again.
"""

from __future__ import annotations

import datetime
import ipaddress
import os
import re
import secrets
import shutil
import socket
import tempfile
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import indent
from typing import Any
from urllib.parse import quote, urlsplit

import yaml
from ansible.parsing.vault import VaultLib, VaultSecret
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID
from jinja2 import Environment, FileSystemLoader, StrictUndefined

TEMPLATES = Path(__file__).resolve().parents[3] / "templates"
REPLICA = 3
# Where the media lie: on a volume, or by one of the storages for sites without one.
BACKENDS = ("volume", "hybrid", "async", "distributed")
CA_YEARS = 20  # the default lifetime of a site's CA
# A volume id that no volume has: it marks an inventory copied by hand; the preflight refuses it.
EXAMPLE_VOLUME_ID = "00000000-0000-4000-8000-000000000000"

_PLAIN_FILES = {
    "hosts.yml": "inventory/hosts.yml.j2",
    "group_vars/all/hosts.yml": "inventory/group_vars_hosts.yml.j2",
    "group_vars/all/tribrick.yml": "inventory/tribrick.yml.j2",
    # Ansible reads the files of group_vars/all in alphabetical order and the last one wins.
    "group_vars/all/tribrick_overrides.yml": "inventory/tribrick_overrides.yml.j2",
    "RUNBOOK.md": "site/RUNBOOK.md.j2",
    "settings.py.txt": "site/settings.py.j2",
}
_TRIBRICK = "group_vars/all/tribrick.yml"
_VAULT = "group_vars/all/vault.yml"
_LABEL = re.compile(r"[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?")
_SITE_NAME = re.compile(r"[a-z0-9]([a-z0-9-]{0,30}[a-z0-9])?")
_SSH_USER = re.compile(r"[a-z_][a-z0-9_-]{0,31}")
_VARIABLE = re.compile(r"[a-z_][a-z0-9_]*")
_RESERVED_HOSTS = frozenset({"all", "ungrouped", "localhost"})


class SiteError(ValueError):
    """What the operator gave cannot become a site; the text says why and what to do."""


@dataclass(frozen=True)
class SiteSpec:
    """One site: what a person decides. Everything else has a default in the templates."""

    name: str
    nodes: Mapping[str, str]  # host name -> plain address, in order; each carries one brick
    domain: str = "media.example"
    app_servers: tuple[str, ...] | None = None  # default: all nodes
    edge_servers: tuple[str, ...] | None = None  # default: all nodes
    database_host: tuple[str, str] | None = None  # (name, address): the kit sets up PostgreSQL
    database_url: str | None = None  # or a PostgreSQL of the operator's own
    ssh_user: str | None = None
    ssh_port: int = 22
    ca_years: int = CA_YEARS
    backend: str = BACKENDS[0]
    ssh_private_key: Path | None = None
    known_hosts: Path | None = None
    volume_id: str | None = None  # default: a new one, kept by later renderings
    overrides: Mapping[str, Any] = field(default_factory=dict)

    @property
    def hosts(self) -> dict[str, str]:
        """Every host of the site with its address, nodes first."""
        database = dict([self.database_host]) if self.database_host else {}
        return {**self.nodes, **database}


def valid_host_name(name: str, longest: int = 64) -> bool:
    """Tell whether a name can be a host name, a certificate's name (of 64 characters at most) and an inventory name."""
    labels = name.split(".")
    if not all(_LABEL.fullmatch(label) for label in labels) or labels[-1].isdigit():
        return False
    return len(name) <= longest and name not in _RESERVED_HOSTS


def _check_host_name(name: str) -> None:
    # The site on it has a certificate for NAME.site.
    if not valid_host_name(name, 59):
        raise SiteError(
            f"'{name}' cannot be a host's name: use lower-case letters, digits, hyphens and dots, "
            "at most 59 characters, not an address; for an address give NAME=ADDRESS."
        )


def check_address(name: str, address: str) -> str:
    """Return the address in its usual spelling, or refuse it."""
    try:
        ip = ipaddress.ip_address(address)
    except ValueError:
        raise SiteError(
            f"'{address}' is no plain IP address for {name}: give one without prefix or port, as in {name}=192.0.2.11."
        ) from None
    if ip.is_loopback or ip.is_unspecified or ip.is_multicast or ip.is_link_local:
        raise SiteError(
            f"{address} cannot be the address of {name}: other hosts do not reach it there. "
            f"Give the address that they use, as in {name}=192.0.2.11."
        )
    return str(ip)


Resolver = Callable[[str], list[str]]


def lookup(name: str) -> list[str]:
    """Return the addresses of a name, IPv4 first."""
    found = socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)
    addresses = dict.fromkeys(str(entry[4][0]) for entry in found)
    return sorted(addresses, key=lambda text: ":" in text)


def parse_host(text: str, resolve: Resolver = lookup) -> tuple[str, str]:
    """Turn HOST or HOST=ADDRESS into (name, address); a bare HOST is looked up now and pinned."""
    name, separator, address = text.partition("=")
    _check_host_name(name)
    if separator:
        return name, check_address(name, address)
    try:
        found = resolve(name)
    except OSError as error:
        raise SiteError(f"{name} has no address here ({error}): give it, as in {name}=192.0.2.11.") from error
    family = [a for a in found if ":" not in a] or found
    if len(family) != 1:
        raise SiteError(
            f"{name} has {len(family)} addresses ({', '.join(family)}): choose the one that the "
            f"other nodes reach, as in {name}={(family or ['192.0.2.11'])[0]}."
        )
    return name, check_address(name, family[0])


def check_database_url(url: str) -> None:
    """Refuse what is no URL of a PostgreSQL database; several hosts are allowed."""
    hint = "expected postgres://USER:PASSWORD@HOST[:PORT][,HOST[:PORT]]/DATABASE"
    if any(c.isspace() or not c.isprintable() for c in url) or re.search(r"{[{%#]", url):
        raise SiteError(f"The database URL holds characters that must be %-encoded: {hint}.")
    try:
        parts = urlsplit(url)
    except ValueError as error:
        raise SiteError(f"The database URL cannot be read ({error}): {hint}.") from None
    if parts.scheme not in {"postgres", "postgresql"}:
        raise SiteError(f"The database URL starts with '{parts.scheme}': {hint}.")
    user, at, servers = parts.netloc.rpartition("@")
    if not at or not user.split(":")[0]:
        raise SiteError(f"The database URL names no user: {hint}.")
    for server in servers.split(","):
        match = re.fullmatch(r"(\[[0-9a-fA-F:.]+\]|[A-Za-z0-9._-]+)(?::(\d{1,5}))?", server)
        if not match or not 0 < int(match[2] or 5432) < 65536:
            raise SiteError(f"The database URL's host '{server}' is not valid: {hint}.")
    if not re.fullmatch(r"/[^/]+", parts.path):
        raise SiteError(f"The database URL names no database: {hint}.")


def check(spec: SiteSpec) -> None:
    """Refuse a site that could not be safe or could not work."""
    if not _SITE_NAME.fullmatch(spec.name):
        raise SiteError(
            f"'{spec.name}' cannot be a site's name: use lower-case letters, digits and hyphens, at most 32 characters."
        )
    count = len(spec.nodes)
    if count < REPLICA:
        raise SiteError(
            f"{count} node{'s' * (count != 1)} cannot keep three copies: give at least three "
            "nodes. With two, neither can tell a dead peer from a cut line."
        )
    if count > REPLICA and spec.backend == BACKENDS[0]:
        raise SiteError(
            f"{count} nodes are too many: with a volume every file lives on three nodes, and recovery takes all bricks "
            "for copies of each other. Give three; hosts that only run the site are added to app_servers in hosts.yml."
        )
    if (spec.database_host is None) == (spec.database_url is None):
        raise SiteError(
            "Give either a database URL (your own PostgreSQL) or a database host (the kit sets up "
            "PostgreSQL there), and not both."
        )
    if spec.database_url is not None:
        check_database_url(spec.database_url)
    if spec.database_host is not None:
        name, address = spec.database_host
        if spec.nodes.get(name, address) != address:
            raise SiteError(
                f"{name} is given as a node with address {spec.nodes[name]} and as the database "
                f"host with {address}: give it one address."
            )
    owners: dict[str, str] = {}
    for name, address in spec.hosts.items():
        _check_host_name(name)
        plain = check_address(name, address)
        if plain in owners:
            raise SiteError(f"{owners[plain]} and {name} have the same address {plain}.")
        owners[plain] = name
    for group, members in (("app", spec.app_servers), ("edge", spec.edge_servers)):
        for name in members if members is not None else ():
            if name not in spec.hosts:
                raise SiteError(f"The {group} server {name} is none of: {', '.join(spec.hosts)}.")
    if not valid_host_name(spec.domain):
        raise SiteError(f"'{spec.domain}' is no domain name (lower case, no scheme, no port).")
    if spec.ssh_user is not None and not _SSH_USER.fullmatch(spec.ssh_user):
        raise SiteError(f"'{spec.ssh_user}' is no name of a login user.")
    if not 0 < spec.ssh_port < 65536:
        raise SiteError(f"{spec.ssh_port} is no TCP port for SSH.")
    if not 1 <= spec.ca_years <= 50:
        raise SiteError(f"The CA cannot be valid for {spec.ca_years} years: give 1 to 50.")
    for variable in spec.overrides:
        if not _VARIABLE.fullmatch(variable):
            raise SiteError(f"'{variable}' is no name of a variable.")


def _scalar(value: object) -> str:
    """One YAML value on one line, quoted only where YAML needs it."""
    text: str = yaml.safe_dump(value, default_flow_style=True, allow_unicode=True, width=10**6)
    return text.removesuffix("\n").removesuffix("\n...")


def _block(value: object) -> str:
    text: str = yaml.safe_dump(value, allow_unicode=True, sort_keys=False, width=100)
    return text.removesuffix("\n")


def _pem(text: str) -> str:
    """A PEM text as a YAML block; a text of one line stays one."""
    return "|\n" + indent(text.strip(), "  ") if "\n" in text else _scalar(text)


def _environment() -> Environment:
    # The rendered files hold Ansible's own {{ }}, so these templates use other marks.
    environment = Environment(
        loader=FileSystemLoader(TEMPLATES),
        undefined=StrictUndefined,
        variable_start_string="[[",
        variable_end_string="]]",
        block_start_string="[%",
        block_end_string="%]",
        comment_start_string="[#",
        comment_end_string="#]",
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        autoescape=False,  # noqa: S701 (YAML, Python and Markdown, never HTML)
    )
    environment.filters["scalar"] = _scalar
    environment.filters["block"] = _block
    environment.filters["pem"] = _pem
    return environment


def plain_files(spec: SiteSpec, volume_id: str) -> dict[str, str]:
    """Return the files of an inventory that hold no secret: relative path -> text."""
    check(spec)
    environment = _environment()
    context = {
        "site": spec,
        "app_servers": spec.app_servers if spec.app_servers is not None else tuple(spec.nodes),
        "edge_servers": spec.edge_servers if spec.edge_servers is not None else tuple(spec.nodes),
        "volume_id": volume_id,
    }
    files = {path: environment.get_template(template).render(context) for path, template in _PLAIN_FILES.items()}
    host_vars = environment.get_template("inventory/host_vars.yml.j2")
    return files | {f"host_vars/{host}.yml": host_vars.render(host=host) for host in spec.hosts}


def make_ca(site: str, years: int = CA_YEARS) -> tuple[str, str]:
    """Make the key and the self-signed certificate of the pool's own CA, both as PEM; valid for so many years."""
    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, f"tribrick {site} CA")])
    # One day back: a node whose clock is a little behind accepts it too.
    start = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(days=1)
    usage = x509.KeyUsage(
        key_cert_sign=True,
        crl_sign=True,
        digital_signature=False,
        content_commitment=False,
        key_encipherment=False,
        data_encipherment=False,
        key_agreement=False,
        encipher_only=False,
        decipher_only=False,
    )
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + datetime.timedelta(days=round(years * 365.25)))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(usage, critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .sign(key, hashes.SHA256())
    )
    pem = key.private_bytes(
        serialization.Encoding.PEM,
        serialization.PrivateFormat.PKCS8,
        serialization.NoEncryption(),
    )
    return pem.decode(), certificate.public_bytes(serialization.Encoding.PEM).decode()


def vault_text(values: Mapping[str, str]) -> str:
    """Return the vault's clear text, the same for a real vault and for the example."""
    return _environment().get_template("inventory/vault.yml.j2").render(values=values)


def _new_secrets(spec: SiteSpec) -> dict[str, str]:
    key, certificate = make_ca(spec.name, spec.ca_years)
    host = spec.database_host
    return {
        "gluster_ca_key": key,
        "gluster_ca_certificate": certificate,
        "django_secret_key": secrets.token_urlsafe(48),
        "peer_watch_key": secrets.token_urlsafe(32),
        "database_password": secrets.token_urlsafe(24) if host else "",
        "database_url": database_url(*host) if host else str(spec.database_url),
    }


def database_url(name: str, address: str) -> str:
    """Return the URL of the kit's own database; Ansible fills in password and address."""
    host = f"{{{{ tribrick_hosts['{name}'].address }}}}"
    if ":" in address:
        host = f"[{host}]"
    return (
        "postgres://{{ tribrick_database_user }}:{{ vault_tribrick_database_password }}"
        f"@{host}:5432/{{{{ tribrick_database_name }}}}"
    )


def redacted(url: str) -> str:
    """Return a database URL without its password, for people to read."""
    parts = urlsplit(url)
    user, _, servers = parts.netloc.rpartition("@")
    return f"{parts.scheme}://{quote(user.split(':')[0], safe='%')}@{servers}{parts.path}"


def _write(path: Path, text: str, mode: int) -> None:
    """Replace a file whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    try:
        with os.fdopen(descriptor, "w", encoding="utf-8") as stream:
            os.fchmod(descriptor, mode)
            stream.write(text)
            stream.flush()
            os.fsync(descriptor)
        os.replace(temporary, path)
    except BaseException:
        os.unlink(temporary)
        raise


def _vault_secret(file: Path, create: bool) -> VaultSecret:
    if not file.exists():
        if not create:
            raise SiteError(
                f"The vault exists, but its password file {file} does not: put it back. Without "
                "the password the site's secrets cannot be read, and new ones would lock the "
                "nodes out of their own pool."
            )
        file.parent.mkdir(parents=True, exist_ok=True)
        _write(file, secrets.token_urlsafe(32) + "\n", 0o600)
    if file.stat().st_mode & 0o111:
        raise SiteError(f"{file} is executable, so Ansible would run it: chmod 600 {file}.")
    password = file.read_bytes().strip()
    if not password:
        raise SiteError(f"The vault password file {file} is empty.")
    return VaultSecret(password)


def _read_volume_id(directory: Path) -> str | None:
    file = directory / _TRIBRICK
    if not file.exists():
        return None
    content = yaml.safe_load(file.read_text(encoding="utf-8"))
    found = content.get("tribrick_volume_id") if isinstance(content, dict) else None
    if not isinstance(found, str):
        raise SiteError(f"{file} holds no tribrick_volume_id: put the volume's id back.")
    return found


def _write_site(spec: SiteSpec, directory: Path, secret: VaultSecret, volume_id: str, vault: bool) -> list[str]:
    changed = []
    if vault:
        encrypted = VaultLib().encrypt(vault_text(_new_secrets(spec)), secret=secret)
        _write(directory / _VAULT, encrypted.decode(), 0o600)
        changed.append(_VAULT)
    for relative, text in plain_files(spec, volume_id).items():
        file = directory / relative
        if not file.exists() or file.read_text(encoding="utf-8") != text:
            _write(file, text, 0o644)
            changed.append(relative)
    return changed


def render(spec: SiteSpec, directory: Path, vault_password_file: Path, *, update: bool = False) -> list[str]:
    """Write the inventory of a site; return the relative paths of the files that changed.

    Without `update` the directory must not exist and appears whole or not at all. With it the
    plain files are written again where they differ; secrets and the volume's id are kept.
    """
    check(spec)
    if directory.exists() and not update:
        raise SiteError(
            f"{directory} exists already: its secrets and your edits are kept. Edit the files "
            "there, or choose another name."
        )
    if directory.exists():
        old_vault = (directory / _VAULT).exists()
        secret = _vault_secret(vault_password_file, create=not old_vault)
        if old_vault:
            _check_vault(directory / _VAULT, secret, vault_password_file)
        volume_id = spec.volume_id or _read_volume_id(directory) or str(uuid.uuid4())
        return _write_site(spec, directory, secret, volume_id, vault=not old_vault)

    directory.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        inside = vault_password_file.absolute().is_relative_to(directory.absolute())
        if inside:
            relative = vault_password_file.absolute().relative_to(directory.absolute())
            secret = _vault_secret(building / relative, create=True)
            _write(building / ".gitignore", f"/{relative}\n", 0o644)
        else:
            secret = _vault_secret(vault_password_file, create=True)
        volume_id = spec.volume_id or str(uuid.uuid4())
        changed = _write_site(spec, building, secret, volume_id, vault=True)
        building.chmod(0o755)
        building.rename(directory)
    except BaseException:
        shutil.rmtree(building)
        raise
    return changed


def _check_vault(file: Path, secret: VaultSecret, password_file: Path) -> None:
    from ansible.errors import AnsibleError

    try:
        VaultLib([("default", secret)]).decrypt(file.read_bytes())
    except AnsibleError:
        raise SiteError(
            f"The password in {password_file} does not open {file}: give the file that it was made with."
        ) from None


def example_spec() -> SiteSpec:
    """The site shown in inventories/example/; names and addresses are those kept for documents."""
    return SiteSpec(
        name="example",
        nodes={"node1": "192.0.2.11", "node2": "192.0.2.12", "node3": "192.0.2.13"},
        domain="media.example",
        database_url="postgres://tribrick:PASSWORD@db.example:5432/tribrick",
        ssh_user="admin",
        volume_id=EXAMPLE_VOLUME_ID,
    )


def example_files() -> dict[str, str]:
    """Return inventories/example/ as the templates give it today; it holds no secret."""
    spec = example_spec()
    made = "<made by scripts/new-site>"
    values = {
        "gluster_ca_key": made,
        "gluster_ca_certificate": made,
        "django_secret_key": made,
        "peer_watch_key": made,
        "database_password": "",
        "database_url": str(spec.database_url),
    }
    note = (
        "# This is no vault: it shows which secrets a site has. scripts/new-site makes a real one,\n"
        "# group_vars/all/vault.yml, encrypted. Ansible does not read files named *.example.\n"
    )
    vault = {f"{_VAULT}.example": note + vault_text(values)}
    return plain_files(spec, EXAMPLE_VOLUME_ID) | vault


if __name__ == "__main__":  # python -m kit.inventory: write inventories/example/ again
    for _path, _text in example_files().items():
        _write(TEMPLATES.parent / "inventories" / "example" / _path, _text, 0o644)
