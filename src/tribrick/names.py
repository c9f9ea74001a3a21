"""Names of stored files: pure functions, no disk, no settings.

A stored name is ``<dir>/<hash directories>/<stem>-<token>.<ext>``. The token holds 100 random
bits, so a name is unique without asking the disk, and cannot be guessed before it is told. The
hash directories come from a hash of the token, so they fill evenly.
"""

from __future__ import annotations

import hashlib
import posixpath
import re
import secrets
import unicodedata
from typing import Final, NamedTuple

from django.core.exceptions import SuspiciousFileOperation

TOKEN_LENGTH: Final = 20
STEM_LENGTH: Final = 60
ORIGINAL_LENGTH: Final = 1024
TYPE_LENGTH: Final = 100

_ALPHABET: Final = "abcdefghijklmnopqrstuvwxyz234567"
_EXTENSION: Final = re.compile(r"[a-z0-9]{1,10}")
_DIRECTORY: Final = re.compile(r"[A-Za-z0-9_@+=,-][A-Za-z0-9_@+=,.-]{0,99}")
_OWN: Final = re.compile(
    r"(?:(?P<stem>[a-z0-9][a-z0-9-]*)-)?(?P<token>[a-z2-7]{20})(?:\.(?P<extension>[a-z0-9]{1,10}))?"
)
# Format characters that a name may keep: Persian needs the non-joiner, emoji need the joiner.
_JOINERS: Final = frozenset("\u200c\u200d")


class Parsed(NamedTuple):
    """The parts of a stored name."""

    directory: str
    stem: str
    token: str
    extension: str


def new_token() -> str:
    """Return 20 characters of lower-case base32: 100 random bits."""
    return "".join(secrets.choice(_ALPHABET) for _ in range(TOKEN_LENGTH))


def hash_directories(token: str, levels: int, width: int) -> list[str]:
    """Return the hash directories of *token*, e.g. ``["a", "3"]``."""
    digits = hashlib.sha256(token.encode("ascii")).hexdigest()
    return [digits[level * width : (level + 1) * width] for level in range(levels)]


def _visible(text: str) -> str:
    """Return *text* without control, format (bidi), surrogate and line separator characters."""
    return "".join(
        character
        for character in text
        if character in _JOINERS or unicodedata.category(character) not in {"Cc", "Cf", "Cs", "Zl", "Zp"}
    )


def basename(name: str) -> str:
    """Return what follows the last slash or backslash."""
    return name.replace("\\", "/").rpartition("/")[2]


def split(name: str) -> tuple[str, str]:
    """Return the safe stem and the safe extension (without dot, perhaps empty) of a client's name.

    The stem is an ASCII slug (``file`` when nothing remains), the extension is ``[a-z0-9]{1,10}``.
    """
    plain = unicodedata.normalize("NFKD", _visible(basename(name)))
    stem, dot, extension = plain.rpartition(".")
    if not dot or not stem:
        stem, extension = plain, ""
    if extension and not _EXTENSION.fullmatch(extension.lower()):
        stem, extension = plain, ""
    ascii_stem = stem.encode("ascii", "ignore").decode("ascii").lower()
    slug = re.sub(r"[^a-z0-9]+", "-", ascii_stem).strip("-")[:STEM_LENGTH].rstrip("-")
    return slug or "file", extension.lower()


def safe_name(name: str) -> str:
    """Return ``stem.ext`` made from a client's name; nothing of it can act as a path."""
    stem, extension = split(name)
    return f"{stem}.{extension}" if extension else stem


def display_name(name: str, max_length: int = ORIGINAL_LENGTH) -> str:
    """Return the original name as it may be kept and shown.

    Control characters, newlines and bidi overrides are dropped, since a page or a log that shows
    them can be made to lie. Letters of every script, emoji and their joiners stay. The end is cut
    at *max_length* characters; a name of which nothing remains becomes ``file``.
    """
    return _visible(name).strip()[:max_length].strip() or "file"


def content_type(kind: str) -> str:
    """Return a content type, which may be the client's word, as the catalog can keep it."""
    return _visible(kind).strip()[:TYPE_LENGTH]


def check_directory(directory: str) -> str:
    """Return *directory* normalised, or raise ``SuspiciousFileOperation``.

    The directory is the site's own (``upload_to``), never a client's, so it is refused, not mended.
    """
    parts = [part for part in directory.replace("\\", "/").split("/") if part]
    if directory.startswith(("/", "\\")) or not all(_DIRECTORY.fullmatch(part) for part in parts):
        raise SuspiciousFileOperation(f"directory {directory!r} is not allowed for stored files")
    return "/".join(parts)


def parse(name: str, levels: int, width: int) -> Parsed | None:
    """Return the parts of *name* if :func:`unique_name` made it with these settings, else None."""
    directory, _, last = name.rpartition("/")
    match = _OWN.fullmatch(last)
    if match is None:
        return None
    parents = directory.split("/") if directory else []
    if levels:
        if parents[-levels:] != hash_directories(match["token"], levels, width):
            return None
        parents = parents[:-levels]
    return Parsed("/".join(parents), match["stem"] or "", match["token"], match["extension"] or "")


def unique_name(name: str, *, levels: int, width: int, max_length: int | None = None, token: str | None = None) -> str:
    """Return a new stored name for ``<dir>/<client's name>``.

    A name that is already a stored one gets a new token and hash directories instead of a second
    set of them. With *max_length* the stem is shortened, the token never.
    """
    token = token or new_token()
    own = parse(name, levels, width)
    if own is not None:
        directory, stem, extension = check_directory(own.directory), own.stem, own.extension
    else:
        head, _, tail = name.replace("\\", "/").rpartition("/")
        directory = check_directory(head)
        stem, extension = split(tail)
    suffix = f".{extension}" if extension else ""
    prefix = posixpath.join(directory, *hash_directories(token, levels, width))
    prefix = f"{prefix}/" if prefix else ""
    if max_length is not None:
        room = max_length - len(prefix) - len(token) - len(suffix) - 1
        if room < -1:
            raise SuspiciousFileOperation(
                f"no name for {name!r} fits into {max_length} characters; "
                f'allow at least {max_length - room - 1} ("max_length" of the field)'
            )
        stem = stem[: max(room, 0)].rstrip("-")
    return f"{prefix}{stem}-{token}{suffix}" if stem else f"{prefix}{token}{suffix}"
