"""What to do so that a disk shows what the state says: pure functions."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Final

from tribrick.sync.versions import Version

FEW: Final = 10
"""So many files may go in one run, and ``SHARE`` of all, before a person must have agreed."""
SHARE: Final = 0.05
PORTION_BYTES: Final = 256 * 1024 * 1024
PORTION_FILES: Final = 1000
# Compressed already: compressing once more costs time and saves nothing.
_DENSE: Final = frozenset(
    "7z aac apk avi avif br bz2 docx epub flac gif gz heic heif jar jpeg jpg jxl lz4 m4a m4v mkv mov mp3 mp4 "
    "mpeg mpg odt ogg ogv opus oxps png pptx rar tgz webm webp wma wmv xlsx xz zip zst".split()
)
_WORTH: Final = 512


@dataclass(frozen=True)
class Step:
    """One change of the disk: *before* is what lies there now (None: nothing ever did)."""

    name: str
    after: Version
    before: Version | None

    @property
    def kind(self) -> str:
        """``write``, ``remove``, or ``note``: the disk is right already, only the version is newer."""
        there = "" if self.before is None else self.before.sha256
        if there == self.after.sha256:
            return "note"
        return "remove" if self.after.deleted else "write"


@dataclass(frozen=True)
class Fetch:
    """Contents to get in one transfer, with what rsync may start from: pairs of hash and basis or ``""``."""

    contents: tuple[tuple[str, str], ...]
    size: int
    compress: bool

    def without(self, here: Collection[str]) -> Fetch:
        """Return what is left when some contents have come."""
        return Fetch(tuple(pair for pair in self.contents if pair[0] not in here), self.size, self.compress)


@dataclass
class Plan:
    """Steps in an order in which they can be done, and contents to fetch before."""

    steps: list[Step] = field(default_factory=list)
    fetches: list[Fetch] = field(default_factory=list)
    open: list[str] = field(default_factory=list)
    """Names with concurrent versions that nobody has decided about; their files stay as they are."""

    def count(self, kind: str) -> int:
        """Return how many steps are of a kind."""
        return sum(step.kind == kind for step in self.steps)


def plan(wanted: Mapping[str, list[Version]], disk: Mapping[str, Version], history: Collection[str]) -> Plan:
    """Return the plan for names of which the state (*wanted*: the heads) and the disk differ.

    *history* holds the hashes of the contents that are here. Removals come first, the deepest names
    first, so that a directory can make way for a file; then the writes by name.
    """
    made = Plan()
    for name in sorted(wanted):
        heads = wanted[name]
        if len(heads) != 1:
            made.open.append(name)
            continue
        if disk.get(name) != heads[0]:
            made.steps.append(Step(name, heads[0], disk.get(name)))
    order = {"note": 0, "remove": 1, "write": 2}
    made.steps.sort(
        key=lambda step: (order[step.kind], -step.name.count("/") if step.kind == "remove" else 0, step.name)
    )
    made.fetches = portions(step for step in made.steps if step.kind == "write" and step.after.sha256 not in history)
    return made


def portions(steps: Iterable[Step]) -> list[Fetch]:
    """Cut contents to fetch into transfers: alike in compression, of bounded size, each content once.

    A file larger than a portion travels alone.
    """
    groups: dict[bool, dict[str, Step]] = {}
    for step in steps:
        groups.setdefault(pays(step.after), {}).setdefault(step.after.sha256, step)
    found: list[Fetch] = []
    for compress, group in sorted(groups.items()):
        part: list[tuple[str, str]] = []
        size = 0
        for sha256, step in group.items():
            if part and (size + step.after.size > PORTION_BYTES or len(part) >= PORTION_FILES):
                found.append(Fetch(tuple(part), size, compress))
                part, size = [], 0
            part.append((sha256, "" if step.before is None else step.before.sha256))
            size += step.after.size
        if part:
            found.append(Fetch(tuple(part), size, compress))
    return found


def pays(version: Version) -> bool:
    """Whether compression on the way is worth it, by the name."""
    return version.size >= _WORTH and version.name.rpartition(".")[2].lower() not in _DENSE


def too_many(gone: int, known: int, accept: int) -> str:
    """Say why so many deletions are not done without a person; nothing when they may be.

    A disk that is not mounted, or a directory that was moved away, looks like a deletion of everything.
    """
    if gone <= max(FEW, int(known * SHARE), accept):
        return ""
    return (
        f"{gone} of {known} files would be deleted; nothing was changed. Is the directory complete? "
        f"If they are to go: --accept {gone}"
    )
