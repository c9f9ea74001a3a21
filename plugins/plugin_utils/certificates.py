# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Certificates that the controller signs: kept while they fit, made anew when they do not, or when it is time."""

from __future__ import annotations

from datetime import datetime, timedelta, timezone

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ed448, ed25519
from cryptography.x509.oid import NameOID

# Clocks of the nodes may be behind the controller's.
_EARLIER = timedelta(days=1)


def load_key(pem):
    """The CA's private key; ``ValueError`` if *pem* is none."""
    return serialization.load_pem_private_key(pem.encode(), password=None)


def load_certificate(pem):
    """The certificate in *pem*, or None where there is none that can be read."""
    try:
        return x509.load_pem_x509_certificate(pem.encode()) if pem.strip() else None
    except ValueError:
        return None


def load_bundle(pem):
    """All certificates in *pem*; what cannot be read is as good as none."""
    try:
        return x509.load_pem_x509_certificates(pem.encode()) if pem.strip() else []
    except ValueError:
        return []


def pair_problem(certificate, key):
    """Why a web server could not use this certificate, with its chain, and this key, both PEM; empty if it could."""
    chain = load_bundle(certificate)
    if not chain:
        return "the certificate cannot be read"
    try:
        found = load_key(key)
    except (ValueError, TypeError):  # TypeError: it has a passphrase
        return "the key cannot be read, or has a passphrase"
    if _identity(found.public_key()) != _identity(chain[0].public_key()):
        return "the key is not that of the first certificate in the file"
    return ""


def unique(certificates):
    """One certificate of each name and key, the first: hosts make certificates of one CA of their own."""
    found = {}
    for one in certificates:
        found.setdefault((one.subject.public_bytes(), _identity(one.public_key())), one)
    return list(found.values())


def to_pem(certificate):
    """The certificate as text."""
    return certificate.public_bytes(serialization.Encoding.PEM).decode()


def _identity(public_key):
    return public_key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)


def _algorithm(key):
    return None if isinstance(key, (ed25519.Ed25519PrivateKey, ed448.Ed448PrivateKey)) else hashes.SHA256()


def _start(subject, issuer, public_key, days):
    now = datetime.now(timezone.utc)
    return (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer)
        .public_key(public_key)
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _EARLIER)
        .not_valid_after(now + timedelta(days=days))
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(public_key), critical=False)
    )


def authority(found, key, name, days):
    """A CA's certificate for *key* called *name*: the one *found* (PEM, perhaps among others), else a new one."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    for known in load_bundle(found):
        if known.subject == subject and _identity(known.public_key()) == _identity(key.public_key()):
            return known
    usage = dict.fromkeys(
        ("digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement",
         "crl_sign", "encipher_only", "decipher_only"), False,
    )  # fmt: skip
    return (
        _start(subject, subject, key.public_key(), days)
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.KeyUsage(key_cert_sign=True, **usage), critical=True)
        .sign(key, _algorithm(key))
    )


def fits(certificate, request, ca):
    """Whether a certificate is of the request's key and names, and signed by the CA. Its end is not looked at."""
    if certificate is None or certificate.subject != request.subject:
        return False
    if _identity(certificate.public_key()) != _identity(request.public_key()):
        return False
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        wanted = request.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        certificate.verify_directly_issued_by(ca)
    except (x509.ExtensionNotFound, InvalidSignature, ValueError, TypeError):
        return False
    return names == wanted


def signed_by(certificate, ca):
    """Whether a CA has signed a certificate."""
    try:
        certificate.verify_directly_issued_by(ca)
    except (InvalidSignature, ValueError, TypeError):
        return False
    return True


def holds(certificate, now=None):
    """Whether it is valid now, as far as its dates say."""
    now = now or datetime.now(timezone.utc)
    return certificate.not_valid_before_utc <= now <= certificate.not_valid_after_utc


def renewal(found, request, ca, days, before=None, now=None):
    """Why the certificate *found* (PEM) is to be made anew with a new key, empty if it may stay.

    *days*: so long it has to hold yet. *before*: all that were made earlier go, say because a key may be known.
    """
    now = now or datetime.now(timezone.utc)
    known = load_certificate(found)
    if known is None:
        return "there is none"
    if not fits(known, x509.load_pem_x509_csr(request.encode()), ca):
        return "it does not fit its key, its name, or the CA"
    if not holds(known, now):
        return f"it holds from {known.not_valid_before_utc:%Y-%m-%d} to {known.not_valid_after_utc:%Y-%m-%d} only"
    if known.not_valid_after_utc < now + timedelta(days=days):
        return f"it ends on {known.not_valid_after_utc:%Y-%m-%d}"
    if before is not None and known.not_valid_before_utc + _EARLIER < before:
        return f"it was made before {before:%Y-%m-%d %H:%M}"
    return ""


def issue(found, request, ca, key, days):
    """The certificate for a signing request (PEM): the *found* one (PEM) if it fits, else a new one."""
    asked = x509.load_pem_x509_csr(request.encode())
    known = load_certificate(found)
    if fits(known, asked, ca):
        return known
    builder = _start(asked.subject, ca.subject, asked.public_key(), days).add_extension(
        x509.AuthorityKeyIdentifier.from_issuer_public_key(ca.public_key()), critical=False
    )
    for extension in asked.extensions:
        builder = builder.add_extension(extension.value, extension.critical)
    return builder.sign(key, _algorithm(key))
