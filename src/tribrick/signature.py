"""Signed requests between a site and its media hosts: one header, HMAC-SHA256.

The header and what is signed (four lines, joined by a line feed, in UTF-8)::

    Authorization: Tribrick key="KEY ID", time="UNIX SECONDS", digest="HEX", signature="HEX"

    METHOD
    NAME        the stored name, not percent-encoded, without the prefix of the URL
    DIGEST      SHA-256 of the body in lower-case hexadecimal; of no bytes when there is no body
    TIME        as in the header

A request may be played again within the window of time. That does no harm: a name holds one
content for ever, and a deleted name never comes back.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
from collections.abc import Mapping
from typing import Final

EMPTY: Final = hashlib.sha256(b"").hexdigest()
WINDOW: Final = 300.0
_SCHEME: Final = "Tribrick "
_HEX: Final = re.compile(r"[0-9a-f]{64}")
_KEY_ID: Final = re.compile(r"[A-Za-z0-9._-]{1,64}")
_FIELD: Final = re.compile(r'([a-z]+)="([^"]*)"')
_HEADER: Final = re.compile(r'Tribrick [a-z]+="[^"]*"(?:, [a-z]+="[^"]*")*')
_FIELDS: Final = ("key", "time", "digest", "signature")


class SignatureError(ValueError):
    """The request is not signed as it must be."""


def _signature(secret: str, method: str, name: str, digest: str, at: str) -> str:
    text = "\n".join((method, name, digest, at))
    return hmac.new(secret.encode(), text.encode(), hashlib.sha256).hexdigest()


def sign(
    secret: str, method: str, name: str, digest: str = EMPTY, *, key_id: str = "default", now: float | None = None
) -> str:
    """Return the value of the ``Authorization`` header."""
    if not secret:
        raise ValueError("an empty secret signs nothing")
    if not _KEY_ID.fullmatch(key_id):
        raise ValueError(f"{key_id!r} is not a key id: up to 64 of A-Z a-z 0-9 . _ -")
    at = str(int(time.time() if now is None else now))
    signature = _signature(secret, method, name, digest, at)
    return f'{_SCHEME}key="{key_id}", time="{at}", digest="{digest}", signature="{signature}"'


def verify(
    header: str | None,
    secrets: Mapping[str, str],
    method: str,
    name: str,
    *,
    now: float | None = None,
    window: float = WINDOW,
) -> str:
    """Return the signed digest of the body, or raise :class:`SignatureError`.

    The caller must still compare the digest with the body that it reads. *secrets* maps key ids to
    secrets, so that a key can be changed without a gap.
    """
    if not header or not _HEADER.fullmatch(header):
        raise SignatureError("the request is not signed")
    found = _FIELD.findall(header)
    fields = dict(found)
    if len(found) != len(_FIELDS) or set(fields) != set(_FIELDS):
        raise SignatureError("the Authorization header does not have the four fields it must have")
    if not fields["time"].isascii() or not fields["time"].isdigit() or not _HEX.fullmatch(fields["digest"]):
        raise SignatureError("the time or the digest of the signature is malformed")
    secret = secrets.get(fields["key"])
    if not secret:
        raise SignatureError("the key of the signature is not known")
    expected = _signature(secret, method, name, fields["digest"], fields["time"])
    if not hmac.compare_digest(expected.encode(), fields["signature"].encode()):
        raise SignatureError("the signature is wrong")
    if abs((time.time() if now is None else now) - int(fields["time"])) > window:
        raise SignatureError(f"the signature's time is more than {window:g} s away from the clock here")
    return str(fields["digest"])
