# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Keys made on the host, certificates signed on the controller, in one task."""

from __future__ import annotations

from datetime import datetime, timezone

from ansible.errors import AnsibleActionFail
from ansible.plugins.action import ActionBase
from ansible_collections.tribrick.media.plugins.plugin_utils import certificates

_INTERRUPTED = (
    "{path} holds another CA than the inventory's vault, or more than one: the CA is being exchanged. Run "
    "playbooks/renew_certificates.yml -e confirm=yes, which goes on where it was. Nothing was changed here."
)


class ActionModule(ActionBase):
    """Makes what is missing of ``certificates`` and keeps what fits.

    ``certificates``: a list of ``path`` (the key's), ``certificate_path``, ``common_name`` and, for the key,
    ``group`` and ``mode``. ``ca_key``: the CA's private key, PEM; it stays on the controller. Its
    certificate is ``ca_certificate`` (PEM), or one called ``ca_name`` that is made once, for ``ca_days``, and kept in
    ``ca_path`` on the host. ``ca_path`` is written in both cases. ``days``: how long a new certificate holds.
    ``links``: as in ``templates``.

    A certificate that merely runs out is kept, and a ``ca_path`` with another CA is refused: hosts that trust
    different CAs do not speak to each other. With ``renew`` both are what is wanted: certificates that end within
    ``renew.days``, that do not fit, or that were made before ``renew.before`` (a time, ISO 8601) are made anew together
    with their keys. ``ca_path`` then gets the CA, those of ``renew.trust`` (PEM) and, with ``renew.keep``, those that
    are there already.

    Returns ``reasons`` (path of the certificate -> why it was, in check mode would be, made anew), ``trusted`` (what
    was in ``ca_path``, PEM), and ``invalid``: paths of certificates that nobody can believe now.
    """

    TRANSFERS_FILES = False
    _VALID_ARGS = frozenset(
        ("certificates", "ca_key", "ca_certificate", "ca_name", "ca_path", "ca_days", "days", "links", "renew")
    )

    def run(self, tmp=None, task_vars=None):
        result = super().run(tmp, task_vars)
        del tmp
        args = self._task.args
        renew = args.get("renew")
        seen = self._module("tls_key", {"keys": args["certificates"], "ca_path": args["ca_path"]}, task_vars)
        if seen.get("failed"):
            return {**result, **seen}
        key, ca = self._authority(seen["ca_certificate"])
        trusted = certificates.load_bundle(seen["ca_certificate"])
        bundle = [ca]
        if renew:
            bundle += [one for text in renew.get("trust") or [] for one in certificates.load_bundle(str(text))]
            bundle += trusted if renew.get("keep") else []
        elif any(one.public_key() != ca.public_key() for one in trusted):
            raise AnsibleActionFail(_INTERRUPTED.format(path=args["ca_path"]))
        reasons, invalid, install = {}, [], []
        files = [{"dest": args["ca_path"], "content": "".join(map(certificates.to_pem, certificates.unique(bundle)))}]
        for wanted, found in zip(args["certificates"], seen["keys"], strict=True):
            if not found["csr"]:  # in check mode there may be no key yet, so nothing to sign
                continue
            path = wanted["certificate_path"]
            if not self._believed(found["certificate"], [*trusted, ca]):
                invalid.append(path)
            if not renew:
                issued = certificates.issue(found["certificate"], found["csr"], ca, key, int(args["days"]))
                files.append({"dest": path, "content": certificates.to_pem(issued)})
            elif why := certificates.renewal(
                found["certificate"], found["csr"], ca, int(renew.get("days") or 0), _moment(renew.get("before"))
            ):
                reasons[path] = why
                install.append(wanted)
        changed = bool(seen.get("changed") or install)
        # The bundle first: what is installed below may need it.
        written = self._module("files", {"files": files, "links": args.get("links") or []}, task_vars)
        result.update(written)
        if install and not self._task.check_mode and not written.get("failed"):
            fresh = self._module("tls_key", {"keys": [{**one, "renew": True} for one in install]}, task_vars)
            if not fresh.get("failed"):
                pairs = [
                    {
                        **one,
                        "certificate": certificates.to_pem(
                            certificates.issue("", made["csr"], ca, key, int(args["days"]))
                        ),
                    }
                    for one, made in zip(install, fresh["keys"], strict=True)
                ]
                fresh = self._module("tls_key", {"keys": [], "install": pairs}, task_vars)
            if fresh.get("failed"):
                return {**result, **fresh}
        result["changed"] = bool(changed or written.get("changed"))
        result |= {"reasons": reasons, "invalid": invalid, "trusted": [certificates.to_pem(one) for one in trusted]}
        return result

    def _module(self, name, args, task_vars):
        return self._execute_module(f"tribrick.media.{name}", module_args=args, task_vars=task_vars)

    def _authority(self, found):
        """The CA's key and certificate."""
        args = self._task.args
        try:
            key = certificates.load_key(str(args["ca_key"]))
        except (ValueError, TypeError) as error:
            raise AnsibleActionFail("The CA's key in the vault is no private key in PEM without a password.") from error
        if not args.get("ca_certificate"):
            return key, certificates.authority(found, key, str(args["ca_name"]), int(args["ca_days"]))
        ca = certificates.load_certificate(str(args["ca_certificate"]))
        if ca is None:
            raise AnsibleActionFail("The CA's certificate in the vault is no certificate in PEM.")
        if ca.public_key() != key.public_key():
            raise AnsibleActionFail("The CA's certificate and its key in the vault do not belong together.")
        if not certificates.holds(ca):
            raise AnsibleActionFail(
                f"The CA's certificate in the vault holds until {ca.not_valid_after_utc:%Y-%m-%d}; make a new CA with "
                "./scripts/new-ca, then run playbooks/renew_certificates.yml -e confirm=yes."
            )
        return key, ca

    @staticmethod
    def _believed(pem, authorities):
        """Whether a certificate holds now and one of these, which holds now, has signed it."""
        known = certificates.load_certificate(pem)
        return (
            known is not None
            and certificates.holds(known)
            and any(certificates.holds(ca) and certificates.signed_by(known, ca) for ca in authorities)
        )


def _moment(text):
    """A time, of the local zone if it names none; None for an empty text."""
    if not text:
        return None
    try:
        moment = datetime.fromisoformat(str(text))
    except ValueError as error:
        raise AnsibleActionFail(f"{text} is no time such as 2026-11-26 or 2026-11-26T10:30.") from error
    return moment.astimezone(timezone.utc)
