#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Fill an empty brick from another one before GlusterFS heals the rest."""

from __future__ import annotations

DOCUMENTATION = r"""
module: brick_seed
short_description: Fill an empty brick from another one before GlusterFS heals the rest
description:
  - C(serve) runs on a node with a good brick, in the background. It waits for the other node, proves by its certificate
    that it is that node, and sends names, contents and identities of all files.
  - C(fetch) runs on the node with the empty brick. It ends the brick's process, so that the others mark what they write
    meanwhile, takes the files, moves them in when all are on disk, and starts the process again.
  - A copy is only faster than a heal, and never needed. When it fails, nothing is put into the brick, its process is
    started, and the result says why; the heal does all the work then.
options:
  state: {description: Which side this is., type: str, choices: [serve, fetch], required: true}
  path: {description: The brick's directory., type: path, required: true}
  peer: {description: Name of the other node, as in its certificate., type: str, required: true}
  name: {description: The volume; for C(fetch)., type: str, default: ""}
  node: {description: The name of this node; for C(fetch)., type: str, default: ""}
  port: {description: TCP port of the side that serves., type: int, default: 24008}
  wait: {description: Seconds until the other node must be there., type: int, default: 120}
  certificate: {description: This node's certificate., type: path, default: /etc/ssl/glusterfs.pem}
  key: {description: Its key., type: path, default: /etc/ssl/glusterfs.key}
  ca: {description: The authorities that are believed., type: path, default: /etc/ssl/glusterfs.ca}
attributes:
  check_mode: {support: full, description: Does nothing.}
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Serve what this brick holds
  tribrick.media.brick_seed:
    state: serve
    path: /srv/gluster/media/brick
    peer: node2
  async: 3600
  poll: 0
  delegate_to: node1

- name: Take it
  tribrick.media.brick_seed:
    state: fetch
    path: /srv/gluster/media/brick
    name: media
    node: node2
    peer: node1
"""

RETURN = r"""
files: {description: Files that were sent, or that the brick took., returned: always, type: int}
why: {description: Why nothing was copied; empty if it was., returned: always, type: str}
"""

import contextlib
import errno
import fcntl
import os
import shutil
import signal
import socket
import ssl
import time

from ansible.module_utils.basic import AnsibleModule
from ansible_collections.tribrick.media.plugins.module_utils.brick_seed import (
    SeedError,
    receive,
    send,
    settle,
    staging_of,
)
from ansible_collections.tribrick.media.plugins.module_utils.gluster import Cli, GlusterError, Refused, wait_until
from ansible_collections.tribrick.media.plugins.module_utils.health import find_brick, find_process
from ansible_collections.tribrick.media.plugins.module_utils.recovery import brick_mark

STALL = 300.0  # seconds without a byte
END_WAIT = 60
ORPHAN_WAIT = 1800


def context(module: AnsibleModule, purpose: int) -> ssl.SSLContext:
    """Both sides show a certificate of the pool's authority."""
    made = ssl.SSLContext(purpose)
    made.check_hostname = False  # the name is compared below: GlusterFS's certificates carry it as common name
    made.verify_mode = ssl.CERT_REQUIRED
    made.load_cert_chain(module.params["certificate"], module.params["key"])
    made.load_verify_locations(module.params["ca"])
    return made


def common_name(connection: ssl.SSLSocket) -> str:
    """Return whom the other side's certificate names."""
    subject = (connection.getpeercert() or {}).get("subject", ())
    return next((str(value) for part in subject for key, value in part if key == "commonName"), "")


def serve(module: AnsibleModule) -> dict[str, object]:
    """Wait for the other node and send."""
    made, end = context(module, ssl.PROTOCOL_TLS_SERVER), time.monotonic() + module.params["wait"]
    family = socket.AF_INET6 if socket.has_dualstack_ipv6() else socket.AF_INET
    refused = ""

    def listen() -> socket.socket:
        while True:  # a run that was killed may still serve there, for a while
            try:
                return socket.create_server(
                    ("", module.params["port"]), family=family, dualstack_ipv6=family == socket.AF_INET6
                )
            except OSError as error:
                if error.errno != errno.EADDRINUSE or time.monotonic() > end:
                    raise
                time.sleep(0.5)  # nothing tells when a port is free; ask again until `end`

    with listen() as listener:
        while (left := end - time.monotonic()) > 0:
            listener.settimeout(left)
            try:
                plain, _ = listener.accept()
            except TimeoutError:
                break
            try:
                plain.settimeout(max(1.0, end - time.monotonic()))  # one that says nothing does not hold the others up
                with made.wrap_socket(plain, server_side=True) as connection:
                    connection.settimeout(STALL)
                    if common_name(connection) != module.params["peer"]:
                        refused = f"; refused: {common_name(connection)}"
                        continue
                    with connection.makefile("wb") as out:
                        files, size = send(module.params["path"], out)
                    with contextlib.suppress(OSError):  # the stream has an end of its own
                        connection.unwrap()
                    return {"files": files, "bytes": size, "why": ""}
            except (ssl.SSLError, TimeoutError) as error:
                refused = f"; refused: {error}"
            finally:
                plain.close()
    return {"files": 0, "why": f"{module.params['peer']} did not come within {module.params['wait']} s{refused}"}


def fetch(module: AnsibleModule) -> int:
    """Take all files from the other node, while the brick's process is down."""
    path, peer = module.params["path"], module.params["peer"]
    staging = staging_of(path)
    end, address = time.monotonic() + module.params["wait"], (peer, module.params["port"])
    while True:
        try:
            plain = socket.create_connection(address, timeout=max(1.0, end - time.monotonic()))
            break
        except OSError as error:
            if time.monotonic() > end:
                raise SeedError(f"{peer} does not offer its files: {error}") from None
            time.sleep(0.2)  # the other side is just starting; ask again until `end`
    plain.settimeout(STALL)
    with plain, context(module, ssl.PROTOCOL_TLS_CLIENT).wrap_socket(plain) as connection:
        if common_name(connection) != peer:
            raise SeedError(f"{peer} shows the certificate of {common_name(connection)}")
        with connection.makefile("rb") as stream:
            receive(path, staging, brick_mark(path), stream)
    return settle(path, staging)


def alone(staging: str, node: str) -> bool:
    """Wait for a fetch that goes on although its playbook was killed. Tell whether there was one.

    The lock is on the directory above the staging, and is held until this process ends.
    """
    lock = os.open(os.path.dirname(staging), os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)

    def taken() -> bool:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            return True
        return False

    if not taken():
        return False
    wait_until(taken, lambda busy: "it still copies" if busy else "", ORPHAN_WAIT, "a copy that was begun before", node)
    return True


def stop_brick(path: str, node: str) -> None:
    """End the brick's process, and wait for its end."""
    if pid := find_process("glusterfsd", path):
        os.kill(int(pid), signal.SIGTERM)
    wait_until(lambda: find_brick(path), lambda state: "still runs" if state else "", END_WAIT, "the brick's end", node)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "state": {"type": "str", "choices": ["serve", "fetch"], "required": True},
            "path": {"type": "path", "required": True},
            "peer": {"type": "str", "required": True},
            "name": {"type": "str", "default": ""},
            "node": {"type": "str", "default": ""},
            "port": {"type": "int", "default": 24008},
            "wait": {"type": "int", "default": 120},
            "certificate": {"type": "path", "default": "/etc/ssl/glusterfs.pem"},
            "key": {"type": "path", "default": "/etc/ssl/glusterfs.key", "no_log": False},
            "ca": {"type": "path", "default": "/etc/ssl/glusterfs.ca"},
        },
        required_if=[("state", "fetch", ("name", "node"))],
        supports_check_mode=True,
    )
    if module.check_mode:
        module.exit_json(changed=module.params["state"] == "fetch", files=0, why="")
    if module.params["state"] == "serve":
        try:
            module.exit_json(changed=False, **serve(module))
        except (OSError, SeedError, ValueError) as error:
            module.exit_json(changed=False, files=0, why=f"{type(error).__name__}: {error}")
    path, node = module.params["path"], module.params["node"]
    staging = staging_of(path)
    cli, files, why = Cli(module.run_command, node, 120), 0, ""
    try:
        if alone(staging, node) and not os.path.isdir(staging):
            module.exit_json(changed=False, files=0, why="")
        shutil.rmtree(staging, ignore_errors=True)
        os.mkdir(staging, 0o700)
        stop_brick(path, node)
        try:
            files = fetch(module)
        except (OSError, SeedError, ValueError, KeyError) as error:
            why = f"{type(error).__name__}: {error}"
        cli.change("volume", "start", module.params["name"], "force")
        wait_until(
            lambda: find_brick(path),
            lambda state: "" if state else "no process",
            END_WAIT,
            f"{node}:{path} to run",
            node,
        )
        # Until now it told a run that was killed on its way to begin again.
        shutil.rmtree(staging)
    except (GlusterError, Refused, OSError) as error:
        module.fail_json(msg=f"{error}; run playbooks/recover_heal.yml", changed=True)
    if why:
        module.warn(f"{node}: nothing was copied, so GlusterFS heals everything: {why}")
    module.exit_json(changed=True, files=files, why=why)


if __name__ == "__main__":
    main()
