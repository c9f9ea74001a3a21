"""Versions of files and how they are merged: pure functions, no disk, no clock.

What is known of a name is a set of versions that only grows, so a merge is a union: commutative,
associative and idempotent. Which versions count is derived: those that no other one follows (*heads*).
Comparable versions need no decision, the later one is the head. Several heads are concurrent changes;
:func:`settle` makes one version of them that follows all, and a conflict copy of each loser. It depends
on nothing but the heads, so nodes that settle the same heads make the same versions. Nodes that have
seen different ones settle again, with the same winner: it is the greatest in one order of all.

Version vectors: D. S. Parker et al., Detection of Mutual Inconsistency in Distributed Systems, IEEE
Transactions on Software Engineering SE-9(3), 1983.
"""

from __future__ import annotations

import functools
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Final

NAME_LENGTH: Final = 1024
OWN_NAME_LENGTH: Final = 800
"""The limit for files found on a disk, in characters; the rest is room for the mark of a conflict copy."""
_PART_BYTES: Final = 255
_CATALOG_LENGTH: Final = 255
_LARGEST: Final = 2**63 - 1
_ACTORS: Final = 1000
# Counts the decisions in a vector. No replica can have this name.
SETTLED: Final = "~"
_ACTOR: Final = re.compile(r"~|[A-Za-z0-9_.-]{1,253}\.[0-9a-f]{8}")
NODE: Final = re.compile(r"[A-Za-z0-9_.-]{1,253}")
_SHA256: Final = re.compile(r"[0-9a-f]{64}")
_MARK: Final = re.compile(r"\.(?:conflict|changed)-[A-Za-z0-9_.-]+?-[0-9a-f]{16}(?:-[0-9]+)?(?=\.|$)")
TEMPORARY: Final = re.compile(r"\.[a-z2-7]{20}\.part")


class BadVersion(ValueError):
    """What was read is not a version."""


@dataclass(frozen=True)
class VersionVector:
    """How many changes of each replica a version has seen: pairs in order of the replicas' names."""

    counts: tuple[tuple[str, int], ...] = ()

    @classmethod
    def of(cls, counts: Mapping[str, int]) -> VersionVector:
        """Return the vector of a mapping."""
        return cls(tuple(sorted(counts.items())))

    def __le__(self, other: VersionVector) -> bool:
        theirs = dict(other.counts)
        return all(count <= theirs.get(actor, 0) for actor, count in self.counts)

    def __lt__(self, other: VersionVector) -> bool:
        """Whether *other* has seen all that this one has, and more."""
        return self != other and self <= other

    def join(self, other: VersionVector) -> VersionVector:
        """Return the least vector that has seen both."""
        joined = dict(self.counts)
        for actor, count in other.counts:
            joined[actor] = max(joined.get(actor, 0), count)
        return VersionVector.of(joined)

    def with_count(self, actor: str, count: int) -> VersionVector:
        """Return this vector with one count replaced."""
        return VersionVector.of({**dict(self.counts), actor: count})

    def get(self, actor: str) -> int:
        """Return one count."""
        return dict(self.counts).get(actor, 0)


@dataclass(frozen=True)
class Version:
    """One content of a name, or its deletion (*sha256* is empty: a tombstone).

    *modified* is the file's time, *at* that of the change by the clock of *node*, both in nanoseconds
    since 1970. *origin* is, of a conflict copy, the name that the conflict was about.
    """

    name: str
    vector: VersionVector
    sha256: str
    size: int
    modified: int
    at: int
    node: str
    origin: str = ""

    @property
    def deleted(self) -> bool:
        """Whether this is a tombstone."""
        return not self.sha256

    @property
    def rank(self) -> tuple[bool, int, str, str, int, int, str]:
        """The order in which concurrent versions win: a deletion, then clock, node, and the rest for ties."""
        return (self.deleted, self.at, self.node, self.sha256, self.size, self.modified, self.origin)

    @functools.cached_property
    def text(self) -> str:
        """The version as one line of JSON; equal versions have equal lines."""
        vector = dict(self.vector.counts)
        values = [self.name, vector, self.sha256, self.size, self.modified, self.at, self.node, self.origin]
        return json.dumps(values, separators=(",", ":"), sort_keys=True)

    @functools.cached_property
    def id(self) -> str:
        """A short name of exactly this version."""
        return hashlib.sha256(self.text.encode()).hexdigest()[:32]


def parse(values: Any) -> Version:
    """Return the version that JSON values describe; raise :class:`BadVersion` for anything else."""
    try:
        name, counts, sha256, size, modified, at, node, origin = values
        vector = VersionVector.of(counts)
    except (TypeError, ValueError, AttributeError) as error:
        raise BadVersion(f"{str(values)[:200]!r} is not a version") from error
    numbers = [size, modified, at, *counts.values()]
    if (
        not all(isinstance(text, str) for text in (name, sha256, node, origin))
        or not all(type(number) is int and abs(number) <= _LARGEST for number in numbers)
        or not all(_ACTOR.fullmatch(actor) and count > 0 for actor, count in counts.items())
        or not 0 < len(counts) <= _ACTORS
        or not (sha256 == "" or _SHA256.fullmatch(sha256))
        or size < 0
        or not NODE.fullmatch(node)
    ):
        raise BadVersion(f"{str(values)[:200]!r} is not a version")
    for one in (name, origin) if origin else (name,):
        if why := refusal(one):
            raise BadVersion(f"the name {one[:200]!r} is refused: {why}")
    return Version(name, vector, sha256, size, modified, at, node, origin)


def refusal(name: str, limit: int = NAME_LENGTH) -> str:
    """Say why *name* cannot be that of a reconciled file; nothing when it can."""
    parts = name.split("/")
    if not all(parts) or {".", ".."} & set(parts):
        return "it is not a plain relative path"
    if any(unicodedata.category(character) in {"Cc", "Cs", "Zl", "Zp"} for character in name):
        return "it has control characters or is not text"
    if parts[0].startswith(".") or TEMPORARY.fullmatch(parts[-1]):
        return "such names are for files that are not the site's"
    if len(name) > limit or any(len(part.encode()) > _PART_BYTES for part in parts):
        return "it is too long"
    return ""


def heads(versions: Iterable[Version]) -> list[Version]:
    """Return the versions of one name that no other one follows, the winner last."""
    known = set(versions)
    return sorted((one for one in known if not any(one.vector < other.vector for other in known)), key=lambda v: v.rank)


def merge(mine: Iterable[Version], theirs: Iterable[Version]) -> frozenset[Version]:
    """Return what is known of a name when two sets of versions meet, reduced to the heads.

    Commutative, associative and idempotent: "is followed by" is a partial order, and the greatest
    elements of a union are those of the union of the parts' greatest.
    """
    return frozenset(heads([*mine, *theirs]))


def settle(known: Iterable[Version], *, keep_both: bool = False) -> list[Version]:
    """Return the versions that end a conflict between heads of one name; none when there is no conflict.

    The first follows all heads and has the winner's content, or is a tombstone when one of them is. The
    others are conflict copies: of each other content, with *keep_both* of the winner too.
    """
    rivals = heads(known)
    if len(rivals) < 2:
        return []
    winner = rivals[-1]
    made = [replace(winner, vector=_above(rivals))]
    for rival in rivals:
        if not rival.deleted and (rival.sha256 != winner.sha256 or keep_both):
            made.append(conflict_copy(rival))
    contents = {one.sha256 for one in made[1:]}
    if keep_both and not winner.deleted and contents == {winner.sha256}:
        return made[:1]  # the same content on all sides is no conflict
    return made


def demote(version: Version) -> list[Version]:
    """Return the versions that move a file out of the way of a directory with its name."""
    gone = replace(version, vector=_above([version]), sha256="", size=0)
    return [gone, conflict_copy(version)]


def _above(known: Iterable[Version]) -> VersionVector:
    """Return a vector after all of these. The count of decisions makes it so even if two vectors are equal."""
    joined = functools.reduce(VersionVector.join, (one.vector for one in known))
    return joined.with_count(SETTLED, joined.get(SETTLED) + 1)


def conflict_copy(version: Version) -> Version:
    """Return the first version of the file that keeps a loser's content; the same on every node."""
    return replace(
        version,
        name=conflict_name(version),
        vector=VersionVector(((SETTLED, 1),)),
        origin=version.origin or version.name,
    )


def conflict_name(version: Version, mark: str = "conflict", number: int = 1) -> str:
    """Return the name of a loser: ``photos/a.conflict-node2-0123456789abcdef.jpg``; a higher *number*, another name."""
    directory, slash, last = (version.origin or version.name).rpartition("/")
    last = _MARK.sub("", last) or "file"
    stem, dot, extension = last.rpartition(".")
    if not dot or not stem or len(extension) > 10:
        stem, dot, extension = last, "", ""
    more = f"-{number}" if number > 1 else ""
    end = f".{mark}-{version.node[:60]}-{version.sha256[:16]}{more}{dot}{extension}"
    room = _CATALOG_LENGTH - len(directory) - len(slash) - len(end)
    stem = stem[: max(room, 1)]
    while len(f"{stem}{end}".encode()) > _PART_BYTES:
        stem = stem[:-1]
    return f"{directory}{slash}{stem or 'file'}{end}"
