"""Links to private files for people without an account, until a time.

The query ``?until=SECONDS&signature=...`` holds the seconds since 1970, and Django's signature of them and the name.
nginx's ``secure_link`` would do the same with MD5, and without asking whether the file was deleted.
"""

from __future__ import annotations

import re
import time
from urllib.parse import urlencode

from django.core.signing import Signer
from django.http import HttpRequest
from django.utils.crypto import constant_time_compare

LONGEST = 30 * 86400
"""Seconds for which a link can be made."""


def _signature(name: str, until: str) -> str:
    return Signer(salt="example.gallery.links").signature(f"{until}:{name}")


def query(name: str, seconds: int) -> str:
    """Return the query that lets everybody see the file *name* for so many seconds."""
    until = str(int(time.time()) + seconds)
    return urlencode({"until": until, "signature": _signature(name, until)})


def allows(request: HttpRequest, name: str) -> bool:
    """Whether the request has a link to *name* that still holds."""
    until, signature = request.GET.get("until", ""), request.GET.get("signature", "")
    if not re.fullmatch(r"[0-9]{1,12}", until) or not signature.isascii():
        return False
    return int(until) > time.time() and constant_time_compare(signature, _signature(name, until))
