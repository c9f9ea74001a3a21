#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Make a private key on the host and return a signing request for it."""

from __future__ import annotations

DOCUMENTATION = r"""
module: tls_key
short_description: Make a private key on the host and return a signing request for it
description:
  - The key is made once, on the host, and never leaves it. An existing key is kept.
  - Returns a fresh certificate signing request and the certificate that is there now, so that one call on the host
    and one on the controller (C(community.crypto.x509_certificate_pipe)) issue or keep a certificate.
  - Needs the C(openssl) program on the host, no Python library.
options:
  path: {description: Where the key is kept (mode 0600)., type: path, required: true}
  certificate_path: {description: Where the certificate is kept; only read., type: path, required: true}
  common_name: {description: Subject common name and DNS alternative name., type: str, required: true}
author: [Tribrick authors]
"""

EXAMPLES = r"""
- name: Make the key and a signing request
  tribrick.media.tls_key:
    path: /etc/ssl/glusterfs.key
    certificate_path: /etc/ssl/glusterfs.pem
    common_name: node1
"""

RETURN = r"""
csr: {description: "Signing request, PEM; empty in check mode when there is no key yet.", returned: always, type: str}
certificate: {description: "The certificate found, PEM; empty for none.", returned: always, type: str}
"""

import os
import tempfile

from ansible.module_utils.basic import AnsibleModule


def main() -> None:
    module = AnsibleModule(
        argument_spec={
            "path": {"type": "path", "required": True},
            "certificate_path": {"type": "path", "required": True},
            "common_name": {"type": "str", "required": True},
        },
        supports_check_mode=True,
    )
    path, name = module.params["path"], module.params["common_name"]

    def openssl(*words: str) -> str:
        code, out, err = module.run_command([module.get_bin_path("openssl", required=True), *words])
        if code != 0:
            module.fail_json(msg=f"openssl {words[0]} failed: {(err or out).strip()}")
        return out

    certificate = ""
    if os.path.exists(module.params["certificate_path"]):
        with open(module.params["certificate_path"], encoding="ascii") as stream:
            certificate = stream.read()
    missing = not os.path.exists(path)
    if missing and module.check_mode:
        module.exit_json(changed=True, csr="", certificate=certificate)
    if missing:
        # Complete in a private file first, so that a run killed here leaves no half key behind.
        handle, temporary = tempfile.mkstemp(prefix=".tribrick-", dir=os.path.dirname(path))
        os.close(handle)
        openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", temporary)
        os.chmod(temporary, 0o600)
        os.replace(temporary, path)
    csr = openssl("req", "-new", "-key", path, "-subj", f"/CN={name}", "-addext", f"subjectAltName=DNS:{name}")
    module.exit_json(changed=missing, csr=csr, certificate=certificate)


if __name__ == "__main__":
    main()
