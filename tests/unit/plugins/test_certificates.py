"""Certificates that the controller signs: what is kept, and what is made anew."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
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
