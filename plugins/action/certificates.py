# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Keys made on the host, certificates signed on the controller, in one task."""

from __future__ import annotations

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.tribrick.media.plugins.plugin_utils import certificates


class ActionModule(ActionBase):
    """Makes what is missing of ``certificates`` and keeps what fits.

    ``certificates``: a list of ``path`` (the key's), ``certificate_path``, ``common_name`` and, for the key,
    ``group`` and ``mode``. ``ca_key``: the CA's private key, PEM; it stays on the controller. Its
    certificate is ``ca_certificate`` (PEM), or one called ``ca_name`` that is made once, for ``ca_days``, and kept in
    ``ca_path`` on the host. ``ca_path`` is written in both cases. ``days``: how long a new certificate holds.
    ``links``: as in ``templates``. A certificate that merely runs out is kept.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(
        ("certificates", "ca_key", "ca_certificate", "ca_name", "ca_path", "ca_days", "days", "links")
    )

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        del tmp
        args = self._task.args
        seen = self._execute_module(
            "tribrick.media.tls_key",
            module_args={"keys": args["certificates"], "ca_path": args["ca_path"]},
            task_vars=task_vars,
        )
        if seen.get("failed"):
            return {**result, **seen}
        try:
            key = certificates.load_key(str(args["ca_key"]))
        except (ValueError, TypeError) as error:
            raise AnsibleActionFail("The CA's key in the vault is no private key in PEM without a password.") from error
        if args.get("ca_certificate"):
            ca = certificates.load_certificate(str(args["ca_certificate"]))
            if ca is None:
                raise AnsibleActionFail("The CA's certificate in the vault is no certificate in PEM.")
            text = str(args["ca_certificate"])
        else:
            ca = certificates.authority(seen["ca_certificate"], key, str(args["ca_name"]), int(args["ca_days"]))
            text = certificates.to_pem(ca)
        files = [{"dest": args["ca_path"], "content": text}]
        for wanted, found in zip(args["certificates"], seen["keys"], strict=True):
            # In check mode there may be no key yet, so nothing to sign.
            if found["csr"]:
                issued = certificates.issue(found["certificate"], found["csr"], ca, key, int(args["days"]))
                files.append({"dest": wanted["certificate_path"], "content": certificates.to_pem(issued)})
        written = self._execute_module(
            "tribrick.media.files",
            module_args={"files": files, "links": args.get("links") or []},
            task_vars=task_vars,
        )
        result.update(written)
        result["changed"] = bool(seen.get("changed") or written.get("changed"))
        return result
