"""A lab's volume for the parts of ./scripts/bench that change its options."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Final

from kit.faults import inside
from kit.lab import Lab

NODE: Final = "node1"  # whose gluster is asked


def waiting(text: str) -> list[int | None]:
    """Return how many entries wait on each brick, by `gluster volume heal VOLUME statistics heal-count`.

    None stands for a brick that is away.
    """
    bricks = re.split(r"^Brick ", text, flags=re.MULTILINE)[1:]
    found = [re.search(r"^Number of entries: (\d+)$", brick, re.MULTILINE) for brick in bricks]
    return [int(one[1]) if one else None for one in found]


class Volume:
    """The lab's volume, through one node's gluster."""

    def __init__(self, lab: Lab) -> None:
        shared = lab.site_variables()
        self.lab, self.name = lab, str(shared["tribrick_volume"])
        self.mount, self.brick = str(shared["tribrick_media_root"]), str(shared["tribrick_brick_path"])

    def gluster(self, words: str, deadline: float = 60.0) -> str:
        """Run a command of `gluster volume`."""
        return inside(self.lab, NODE, f"gluster --mode=script volume {words}", deadline=deadline)

    def option(self, name: str) -> str:
        """Return what an option is set to; empty if it is not."""
        found = re.search(rf"^{re.escape(name)}: (.*)$", self.gluster(f"info {self.name}"), re.MULTILINE)
        return found[1].strip() if found else ""

    def set(self, values: dict[str, str]) -> None:
        """Set options; those with an empty value are reset."""
        for name, value in values.items():
            self.gluster(f"set {self.name} {name} {value}" if value else f"reset {self.name} {name}")

    @contextlib.contextmanager
    def back(self, names: Iterable[str]) -> Iterator[dict[str, str]]:
        """Put options back that are changed meanwhile; gives what was set."""
        before = {name: self.option(name) for name in names}
        try:
            yield before
        finally:
            self.set(before)

    def waiting(self) -> list[int | None]:
        """Return how many entries wait to be healed on each brick; None for one that is away."""
        return waiting(self.gluster(f"heal {self.name} statistics heal-count"))

    def unclean(self) -> str | None:
        """Return what waits to be healed, by brick, or None."""
        left = self.waiting()
        return None if left and all(count == 0 for count in left) else f"waiting to be healed, by brick: {left}"
