"""scripts/new-site: writes the inventory of a new site, secrets included."""

from __future__ import annotations

import argparse
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from kit.inventory import BACKENDS, CA_YEARS, Resolver, SiteError, SiteSpec, lookup, parse_host, redacted, render

_EXAMPLE = """\
example:
  ./scripts/new-site photos \\
    --node node1=192.0.2.11 --node node2=192.0.2.12 --node node3=192.0.2.13 \\
    --database-host db1=192.0.2.21 --domain photos.example --ssh-user admin

HOST is the host's own name; it becomes the name in certificates. Without =ADDRESS it is looked up
now and the address is pinned. Nothing is sent to any host.
"""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="new-site",
        description="Write the inventory of a new site with generated secrets in a vault.",
        epilog=_EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("name", metavar="NAME", help="name of the site and of its directory")
    parser.add_argument(
        "--node",
        action="append",
        default=[],
        metavar="HOST[=ADDRESS]",
        help="a storage node; give three, or more with a --backend that has no volume",
    )
    database = parser.add_mutually_exclusive_group(required=True)
    database.add_argument(
        "--database-url",
        metavar="URL",
        help="your own PostgreSQL: postgres://USER:PASSWORD@HOST[,HOST]/DATABASE; "
        "- reads the URL from standard input, so that no process list shows the password",
    )
    database.add_argument(
        "--database-host",
        metavar="HOST[=ADDRESS]",
        help="a host on which the kit sets up PostgreSQL; may be a node",
    )
    parser.add_argument(
        "--backend",
        choices=BACKENDS,
        default=BACKENDS[0],
        help="where the media lie: on a GlusterFS volume (default), or on the nodes' own disks; see docs/storages.md",
    )
    parser.add_argument("--domain", default="media.example", help="name that visitors type")
    parser.add_argument("--ssh-user", metavar="USER", help="login user with sudo on every host")
    parser.add_argument(
        "--ca-years", type=int, default=CA_YEARS, metavar="N", help="lifetime of the site's CA (default: 20)"
    )
    parser.add_argument(
        "--directory",
        type=Path,
        default=Path("inventories"),
        metavar="DIR",
        help="parent of the new directory (default: inventories)",
    )
    parser.add_argument(
        "--vault-password-file",
        type=Path,
        metavar="FILE",
        help="existing or new password file (default: DIR/NAME/.vault-password, made now)",
    )
    return parser


def _spec(arguments: argparse.Namespace, resolve: Resolver) -> SiteSpec:
    name = str(arguments.name)
    if name in {"example", "lab"} or name.startswith("lab-"):
        raise SiteError(f"The name '{name}' belongs to the kit itself: choose another.")
    nodes: dict[str, str] = {}
    for text in arguments.node:
        host, address = parse_host(text, resolve)
        if host in nodes:
            raise SiteError(f"{host} is given twice: every node needs a name of its own.")
        nodes[host] = address
    database = None
    if arguments.database_host is not None:
        if arguments.database_host in nodes:  # a node named again without its address
            database = (arguments.database_host, nodes[arguments.database_host])
        else:
            database = parse_host(arguments.database_host, resolve)
    url = arguments.database_url
    if url == "-":
        url = sys.stdin.readline().strip()
    return SiteSpec(
        name=name,
        nodes=nodes,
        domain=arguments.domain,
        database_host=database,
        database_url=url,
        ssh_user=arguments.ssh_user,
        ca_years=arguments.ca_years,
        backend=arguments.backend,
    )


def _next_steps(spec: SiteSpec, directory: Path, password_file: Path) -> str:
    inventory, password = shlex.quote(str(directory)), shlex.quote(str(password_file))
    play = f".venv/bin/ansible-playbook -i {inventory} --vault-password-file {password} site.yml"
    database = (
        f"PostgreSQL will be set up on {spec.database_host[0]}"
        if spec.database_host
        else f"your own PostgreSQL, {redacted(spec.database_url or '')}"
    )
    hosts = "\n".join(f"  {host:<24} {address}" for host, address in spec.hosts.items())
    disk = (
        "On each node make a file system for the brick and mount it on /srv/gluster/media\n"
        "     (same size everywhere, XFS). The kit never formats a disk."
        if spec.backend == BACKENDS[0]
        else "On each node give /srv/media a file system of its own, of the same size everywhere.\n"
        "     The kit never formats a disk."
    )
    return f"""\
Wrote {directory}.

{hosts}
  database: {database}
  domain: {spec.domain}

Next:
  1. Keep a copy of {password_file} in a safe place. Whoever has it and the
     vault has every secret; without it the secrets are lost.
  2. {disk}
  3. Read {directory}/group_vars/all/tribrick.yml; put changes into
     tribrick_overrides.yml beside it.
  4. See what would happen, then roll out:
       {play} --check --diff
       {play}
"""


def main(argv: Sequence[str] | None = None, resolve: Resolver = lookup) -> int:
    arguments = _parser().parse_args(argv)
    directory = arguments.directory / arguments.name
    password_file = arguments.vault_password_file or directory / ".vault-password"
    try:
        spec = _spec(arguments, resolve)
        render(spec, directory, password_file)
    except SiteError as error:
        print(f"new-site: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        where = error.filename or os.fspath(directory)
        print(f"new-site: {where}: {error.strerror}. Nothing was written there.", file=sys.stderr)
        return 1
    print(_next_steps(spec, directory, password_file), end="")
    return 0


if __name__ == "__main__":
    sys.exit(main())
