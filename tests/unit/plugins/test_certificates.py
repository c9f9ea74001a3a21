"""Certificates that the controller signs: what is kept, and what is made anew."""

from __future__ import annotations

import subprocess
from datetime import datetime, timedelta, timezone
from pathlib import Path
from types import SimpleNamespace

import pytest
from ansible.errors import AnsibleActionFail
from ansible_collections.tribrick.media.plugins.action import certificates as action
from ansible_collections.tribrick.media.plugins.modules import tls_key
from ansible_collections.tribrick.media.plugins.plugin_utils import certificates
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ec


def new_key():
    return ec.generate_private_key(ec.SECP256R1())


def pem_of(key) -> str:
    return key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    ).decode()


def request(tmp_path: Path, key, name: str) -> str:
    """Make a signing request as the node does."""
    (tmp_path / "key").write_text(pem_of(key))
    words = ["openssl", "req", "-new", "-key", tmp_path / "key", "-subj", f"/CN={name}"]
    words += ["-addext", f"subjectAltName=DNS:{name}"]
    return subprocess.run(words, check=True, capture_output=True, text=True).stdout


@pytest.fixture
def ca():
    key = new_key()
    return certificates.authority("", key, "Test", 100), key


def test_a_certificate_is_kept_while_it_fits(tmp_path, ca):
    key = new_key()
    first = certificates.issue("", request(tmp_path, key, "node1"), *ca, 100)
    again = certificates.issue(certificates.to_pem(first), request(tmp_path, key, "node1"), *ca, 100)
    assert again == first


def test_it_is_made_anew_for_another_key_name_or_ca(tmp_path, ca):
    key = new_key()
    first = certificates.to_pem(certificates.issue("", request(tmp_path, key, "node1"), *ca, 100))
    for asked, by in (
        (request(tmp_path, new_key(), "node1"), ca),
        (request(tmp_path, key, "node2"), ca),
        (request(tmp_path, key, "node1"), (certificates.authority("", (other := new_key()), "Test", 100), other)),
    ):
        made = certificates.issue(first, asked, *by, 100)
        assert certificates.to_pem(made) != first
        made.verify_directly_issued_by(by[0])


NOW = datetime.now(timezone.utc)


@pytest.mark.parametrize(
    ("days", "before", "why"),
    [
        (0, None, ""),
        (99, None, ""),
        (101, None, "it ends on"),
        (0, NOW - timedelta(hours=1), ""),
        (0, NOW + timedelta(hours=1), "it was made before"),
    ],
)
def test_a_certificate_is_renewed_when_it_is_time(tmp_path, ca, days, before, why):
    asked = request(tmp_path, new_key(), "node1")
    pem = certificates.to_pem(certificates.issue("", asked, *ca, 100))
    said = certificates.renewal(pem, asked, ca[0], days, before)
    assert said.startswith(why) and bool(said) == bool(why)


def test_it_is_renewed_when_it_does_not_fit_or_has_run_out(tmp_path, ca):
    asked = request(tmp_path, new_key(), "node1")
    pem = certificates.to_pem(certificates.issue("", asked, *ca, 100))
    later = NOW + timedelta(days=101)
    assert certificates.renewal("", asked, ca[0], 0) == "there is none"
    assert "does not fit" in certificates.renewal(pem, request(tmp_path, new_key(), "node1"), ca[0], 0)
    other = certificates.authority("", new_key(), "Test", 100)
    assert "does not fit" in certificates.renewal(pem, asked, other, 0)
    assert "only" in certificates.renewal(pem, asked, ca[0], 0, now=later)
    known = certificates.load_certificate(pem)
    assert certificates.holds(known) and not certificates.holds(known, later)
    assert certificates.signed_by(known, ca[0]) and not certificates.signed_by(known, other)


def test_the_ca_is_found_among_others(ca):
    certificate, key = ca
    others = [certificates.authority("", new_key(), "Test", 100) for _ in range(2)]
    bundle = "".join(map(certificates.to_pem, [others[0], certificate, others[1]]))
    assert certificates.authority(bundle, key, "Test", 5) == certificate
    assert certificates.unique(certificates.load_bundle(bundle * 2)) == [others[0], certificate, others[1]]
    assert certificates.load_bundle("") == certificates.load_bundle("rubbish") == []


@pytest.fixture
def pair(tmp_path):
    """A key and its certificate in place, and a new key with a certificate beside it, not yet installed."""

    def openssl(*words):
        return subprocess.run(["openssl", *words], check=True, capture_output=True, text=True).stdout

    for name in ("key", "key.new"):
        openssl("genpkey", "-algorithm", "EC", "-pkeyopt", "ec_paramgen_curve:P-256", "-out", tmp_path / name)
    signed = {n: openssl("req", "-x509", "-new", "-key", tmp_path / n, "-subj", "/CN=n") for n in ("key", "key.new")}
    (tmp_path / "pem").write_text(signed["key"])
    wanted = {"path": str(tmp_path / "key"), "certificate_path": str(tmp_path / "pem")}

    class Module:
        def get_bin_path(self, name, **_):
            return name

        def run_command(self, words):
            done = subprocess.run(words, capture_output=True, text=True, check=False)
            return done.returncode, done.stdout, done.stderr

        def fail_json(self, **said):
            raise RuntimeError(said["msg"])

    return tmp_path, wanted, signed, Module()


def test_key_and_certificate_are_replaced_together(pair):
    place, wanted, signed, module = pair
    fresh = (place / "key.new").read_bytes()
    tls_key._install(module, {**wanted, "certificate": signed["key.new"]})
    assert (place / "key").read_bytes() == fresh
    assert (place / "pem").read_text() == signed["key.new"]
    assert sorted(one.name for one in place.iterdir()) == ["key", "pem"]


def test_a_certificate_of_another_key_is_not_installed(pair):
    place, wanted, signed, module = pair
    before = (place / "key").read_bytes()
    with pytest.raises(RuntimeError, match="nothing was replaced"):
        tls_key._install(module, {**wanted, "certificate": signed["key"]})
    assert (place / "key").read_bytes() == before and (place / "pem").read_text() == signed["key"]


@pytest.mark.parametrize("found", ["", "rubbish", "-----BEGIN CERTIFICATE-----\nAA\n-----END CERTIFICATE-----\n"])
def test_what_is_no_certificate_is_replaced(tmp_path, ca, found):
    made = certificates.issue(found, request(tmp_path, new_key(), "node1"), *ca, 100)
    assert made.subject.rfc4514_string() == "CN=node1"


def test_openssl_believes_it_for_its_name(tmp_path, ca):
    made = certificates.issue("", request(tmp_path, new_key(), "node1"), *ca, 100)
    (tmp_path / "ca").write_text(certificates.to_pem(ca[0]))
    (tmp_path / "crt").write_text(certificates.to_pem(made))

    def verify(host: str) -> int:
        words = ["openssl", "verify", "-x509_strict", "-verify_hostname", host, "-CAfile", tmp_path / "ca"]
        return subprocess.run([*words, tmp_path / "crt"], check=False, capture_output=True).returncode

    assert verify("node1") == 0
    assert verify("node2") != 0


def test_the_ca_is_kept_for_its_key_and_name(ca):
    certificate, key = ca
    kept = certificates.to_pem(certificate)
    assert certificates.authority(kept, key, "Test", 5) == certificate
    assert certificates.authority(kept, new_key(), "Test", 5) != certificate
    assert certificates.authority(kept, key, "Other", 5) != certificate
    assert certificates.authority("rubbish", key, "Test", 5).subject == certificate.subject


def test_a_key_that_is_none_is_refused():
    with pytest.raises(ValueError, match="PEM"):
        certificates.load_key("rubbish")


# --- the action: what it writes, and what it refuses


class Host:
    """A host with a bundle, keys and certificates, as the modules of the action find and leave them."""

    def __init__(self, tmp_path, bundle=""):
        self.place, self.bundle, self.keys, self.found, self.links = tmp_path, bundle, {}, {}, []

    def csr(self, path, name, renew):
        which = f"{path}.new" if renew else path
        return request(self.place, self.keys.setdefault(which, new_key()), name)

    def __call__(self, name, args, _task_vars):
        if name == "files":
            for one in args["files"]:
                if one["dest"] == "ca":
                    self.bundle = one["content"]
                else:
                    self.found[one["dest"]] = one["content"]
            return {"changed": True}
        for one in args.get("install", []):
            self.keys[one["path"]] = self.keys.pop(one["path"] + ".new")
            self.found[one["certificate_path"]] = one["certificate"]
        keys = [
            {
                "csr": self.csr(one["path"], one["common_name"], one.get("renew")),
                "certificate": self.found.get(one["certificate_path"], ""),
            }
            for one in args["keys"]
        ]
        return {"changed": False, "keys": keys, "ca_certificate": self.bundle}


@pytest.fixture
def act(tmp_path, monkeypatch):
    host = Host(tmp_path)
    monkeypatch.setattr(action.ActionBase, "run", lambda self, tmp, task_vars: {})

    def run(ca, **more):
        module = action.ActionModule.__new__(action.ActionModule)
        one = {"path": "key", "certificate_path": "pem", "common_name": "node1"}
        args = {
            "certificates": [one], "days": 100, "ca_path": "ca", "ca_key": pem_of(ca[1]),
            "ca_certificate": certificates.to_pem(ca[0]), **more,
        }  # fmt: skip
        module._task = SimpleNamespace(args=args, check_mode=more.pop("check", False))
        module._module = host
        return module.run(None, {})

    run.host = host
    return run


def test_a_rollout_makes_keeps_and_refuses_another_ca(act, ca):
    other = (certificates.authority("", key := new_key(), "Other", 100), key)
    act(ca)
    first = dict(act.host.found)
    assert act.host.bundle == certificates.to_pem(ca[0])
    assert act(ca)["invalid"] == [] and act.host.found == first
    with pytest.raises(AnsibleActionFail, match="renew_certificates"):
        act(other)
    act.host.bundle += certificates.to_pem(other[0])  # an exchange that was killed
    with pytest.raises(AnsibleActionFail, match="renew_certificates"):
        act(ca)
    assert act.host.found == first


def test_a_ca_is_exchanged_in_three_steps(act, ca):
    new = (certificates.authority("", key := new_key(), "New", 100), key)
    act(ca)
    old_key, old = act.host.keys["key"], act.host.found["pem"]
    both = {certificates.to_pem(new[0]), certificates.to_pem(ca[0])}
    trust = [certificates.to_pem(ca[0])]
    for _ in range(2):  # each step may be repeated
        act(new, certificates=[], renew={"keep": True, "trust": trust})
        assert set(map(certificates.to_pem, certificates.load_bundle(act.host.bundle))) == both
        assert act.host.found["pem"] == old
    said = act(new, renew={"days": 10, "keep": True, "trust": trust})
    assert "does not fit" in said["reasons"]["pem"] and said["invalid"] == []
    made = certificates.load_certificate(act.host.found["pem"])
    assert certificates.signed_by(made, new[0]) and act.host.keys["key"] is not old_key
    assert act(new, renew={"days": 10, "keep": True, "trust": trust})["reasons"] == {}
    act(new, certificates=[], renew={"keep": False, "trust": []})
    assert act.host.bundle == certificates.to_pem(new[0])


def test_another_hosts_certificate_of_the_same_ca_is_not_needed(act, ca):
    twin = certificates.authority("", ca[1], "Test", 100)
    assert twin != ca[0]
    act(ca)
    act(ca, certificates=[], renew={"keep": True, "trust": [certificates.to_pem(twin)]})
    assert act.host.bundle == certificates.to_pem(ca[0])


def test_a_certificate_that_nobody_believes_is_told(act, ca):
    act(ca)
    act.host.found["pem"] = certificates.to_pem(certificates.issue("", act.host.csr("key", "node1", False), *ca, -0.5))
    said = act(ca, certificates=[{"path": "key", "certificate_path": "pem", "common_name": "node1"}], renew={"days": 0})
    assert said["invalid"] == ["pem"] and "only" in said["reasons"]["pem"]


def test_the_vaults_ca_must_hold_and_fit_its_key(act, ca):
    over = certificates.authority("", ca[1], "Test", -0.5)
    with pytest.raises(AnsibleActionFail, match="new-ca"):
        act((over, ca[1]))
    with pytest.raises(AnsibleActionFail, match="belong together"):
        act((ca[0], new_key()))
    with pytest.raises(AnsibleActionFail, match="no time"):
        act(ca, renew={"before": "yesterday"})
