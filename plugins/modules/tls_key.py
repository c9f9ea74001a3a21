#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Make private keys on the host and return signing requests for them."""

from __future__ import annotations

DOCUMENTATION = r"""
module: tls_key
short_description: Make private keys on the host and return signing requests for them
description:
  - Usually called through the action C(tribrick.media.certificates), which signs on the controller.
  - A key is made once, on the host, and never leaves it. An existing key is kept.
  - Returns a fresh signing request for each key and the certificates that are there now.
  - A renewal has two calls. With O(keys[].renew) a new key is made beside the old one, C(PATH.new), and the request is
    for that. Then O(install) puts it and its certificate in place, one right after the other. When that is killed in
    between, the certificate does not fit the key, and the action makes it anew.
  - Needs the C(openssl) program on the host, no Python library.
options:
  keys:
    description: The keys.
    type: list
    elements: dict
    required: true
    suboptions:
      path: {description: Where the key is kept., type: path, required: true}
      certificate_path: {description: Where the certificate is kept; only read., type: path, required: true}
      common_name: {description: Subject common name and DNS alternative name., type: str, required: true}
      group: {description: Group of the key; its owner is root., type: str, default: root}
      mode: {description: Octal mode of the key as a string., type: str, default: "0600"}
      renew: {description: Whether the request is for a new key beside the old one., type: bool, default: false}
  install:
    description: New keys to put in place of the old ones, with their certificates.
    type: list
    elements: dict
    default: []
    suboptions:
      path: {description: Where the key is kept., type: path, required: true}
      certificate_path: {description: Where the certificate is kept., type: path, required: true}
      certificate: {description: "The new certificate, PEM.", type: str, required: true}
      common_name: {description: As in O(keys)., type: str}
      group: {description: Group of the key; its owner is root., type: str, default: root}
      mode: {description: Octal mode of the key as a string., type: str, default: "0600"}
  ca_path: {description: A CA's certificate to return as well., type: path}
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Make the key and a signing request
  tribrick.media.tls_key:
    keys:
      - path: /etc/ssl/glusterfs.key
        certificate_path: /etc/ssl/glusterfs.pem
        common_name: node1
"""

RETURN = r"""
keys:
  description: One entry for each key, in the same order.
  returned: always
  type: list
  elements: dict
  contains:
    csr: {description: "Signing request, PEM; empty in check mode when there is no key yet.", type: str}
    certificate: {description: "The certificate found, PEM; empty for none.", type: str}
ca_certificate: {description: "What was found at ca_path, PEM; empty for none.", returned: always, type: str}
"""

import os
import tempfile

from ansible.module_utils.basic import AnsibleModule


def _read(path: str | None) -> str:
    if not path or not os.path.exists(path):
        return ""
    with open(path, encoding="ascii", errors="replace") as stream:
        return stream.read()


def _openssl(module: AnsibleModule, *words: str) -> str:
    code, out, err = module.run_command([module.get_bin_path("openssl", required=True), *words])
    if code != 0:
        module.fail_json(msg=f"openssl {words[0]} failed: {(err or out).strip()}")
    return str(out)


def _make(module: AnsibleModule, wanted: dict[str, str]) -> tuple[bool, str]:
    """Make the key if it is missing; return whether anything changed, and the signing request."""
    path, name = wanted["path"] + (".new" if wanted["renew"] else ""), wanted["common_name"]
    missing = not os.path.exists(path)
    if missing and module.check_mode:
        return True, ""
    if missing:
        # Complete in a private file first, so that a run killed here leaves no half key behind.
        handle, temporary = tempfile.mkstemp(prefix=".tribrick-", dir=os.path.dirname(path))
        os.close(handle)
        _openssl(module, "genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", temporary)
        os.chmod(temporary, 0o600)
        os.replace(temporary, path)
    changed = module.set_owner_if_different(path, "root", missing)
    changed = module.set_group_if_different(path, wanted["group"], changed)
    changed = module.set_mode_if_different(path, wanted["mode"], changed)
    request = ("req", "-new", "-key", path, "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}")
    return changed, _openssl(module, *request)


def _sync(path: str) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _install(module: AnsibleModule, wanted: dict[str, str]) -> None:
    """Put a new key and its certificate in place: both are on the disk before the first is renamed."""
    key, certificate = wanted["path"], wanted["certificate_path"]
    with open(f"{certificate}.new", "w", encoding="ascii") as stream:
        stream.write(wanted["certificate"])
    os.chmod(f"{certificate}.new", 0o644)
    of_key = _openssl(module, "pkey", "-in", f"{key}.new", "-pubout")
    if _openssl(module, "x509", "-in", f"{certificate}.new", "-noout", "-pubkey").split() != of_key.split():
        module.fail_json(msg=f"the certificate for {certificate} is not of the key {key}.new; nothing was replaced")
    _sync(f"{key}.new")
    _sync(f"{certificate}.new")
    os.replace(f"{key}.new", key)
    os.replace(f"{certificate}.new", certificate)
    for directory in {os.path.dirname(key), os.path.dirname(certificate)}:
        _sync(directory)


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "keys": {
                "type": "list",
                "elements": "dict",
                "required": True,
                "no_log": False,  # paths and names; the keys themselves are not here
                "options": {
                    "path": {"type": "path", "required": True},
                    "certificate_path": {"type": "path", "required": True},
                    "common_name": {"type": "str", "required": True},
                    "group": {"type": "str", "default": "root"},
                    "mode": {"type": "str", "default": "0600"},
                    "renew": {"type": "bool", "default": False},
                },
            },
            "install": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "path": {"type": "path", "required": True},
                    "certificate_path": {"type": "path", "required": True},
                    "certificate": {"type": "str", "required": True},
                    "common_name": {"type": "str"},
                    "group": {"type": "str", "default": "root"},
                    "mode": {"type": "str", "default": "0600"},
                },
            },
            "ca_path": {"type": "path"},
        },
        supports_check_mode=True,
    )
    changed, keys = False, []
    for wanted in module.params["keys"]:
        made, csr = _make(module, wanted)
        changed = changed or made
        keys.append({"csr": csr, "certificate": _read(wanted["certificate_path"])})
    for pair in module.params["install"]:
        changed = True
        if not module.check_mode:
            _install(module, pair)
    module.exit_json(changed=changed, keys=keys, ca_certificate=_read(module.params["ca_path"]))


if __name__ == "__main__":
    main()
