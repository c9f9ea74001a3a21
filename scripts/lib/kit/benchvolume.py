"""A lab's volume for the parts of ./scripts/bench that change its options, and one beside it to throw away."""

from __future__ import annotations

import contextlib
import re
import xml.etree.ElementTree as ET
from collections.abc import Iterable, Iterator
from typing import Final

from kit.benchlib import Quiet
from kit.faults import inside
from kit.lab import NODES, Lab
from kit.run import KitError, wait_for

NODE: Final = "node1"  # whose gluster is asked


def waiting(text: str) -> list[int | None]:
    """Return how many entries wait on each brick, by `gluster volume heal VOLUME statistics heal-count`.

    None stands for a brick that is away.
    """
    bricks = re.split(r"^Brick ", text, flags=re.MULTILINE)[1:]
    found = [re.search(r"^Number of entries: (\d+)$", brick, re.MULTILINE) for brick in bricks]
    return [int(one[1]) if one else None for one in found]


def options_set(text: str) -> dict[str, str]:
    """Return the options that `gluster volume info VOLUME` lists."""
    _, _, listed = text.partition("Options Reconfigured:\n")
    return {name: value.strip() for name, value in re.findall(r"^([a-z0-9.-]+): (.*)$", listed, re.MULTILINE)}


def online(text: str) -> int:
    """Return how many bricks run, by `gluster --xml volume status VOLUME`."""
    try:
        root = ET.fromstring(text)  # noqa: S314  gluster's own answer
    except ET.ParseError as error:
        raise KitError(f"gluster's status is no XML: {error}") from None
    return sum(
        node.findtext("status") == "1" and (node.findtext("path") or "").startswith("/") for node in root.iter("node")
    )


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
        if pairs := [f"{name} {value}" for name, value in values.items() if value]:
            self.gluster(f"set {self.name} {' '.join(pairs)}", deadline=120)
        for name in (name for name, value in values.items() if not value):
            self.gluster(f"reset {self.name} {name}")

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


class Scratch(Volume):
    """A volume like the lab's, with its options, on the same disks and with TLS; mounted on one node."""

    def __init__(self, lab: Lab) -> None:
        super().__init__(lab)
        self.like = self.name
        self.place = f"{self.brick.rpartition('/')[0]}/bench-volume"
        self.name, self.mount, self.brick = "tribrick-bench", "/mnt/tribrick-bench", f"{self.place}/brick"

    @contextlib.contextmanager
    def there(self) -> Iterator[None]:
        """Have it for a while."""
        self.remove()
        try:
            self.create()
            yield
        finally:
            self.remove()

    def create(self) -> None:
        """Make and start it."""
        for node in NODES:
            inside(self.lab, node, f"mkdir -p {self.brick}")
        bricks = " ".join(f"{node}:{self.brick}" for node in NODES)
        self.gluster(f"create {self.name} replica {len(NODES)} {bricks} force", deadline=120)
        wanted, have = (options_set(self.gluster(f"info {name}")) for name in (self.like, self.name))
        self.set({name: value for name, value in wanted.items() if have.get(name) != value})
        self.start()

    def start(self) -> None:
        """Start it and wait for its bricks."""
        self.gluster(f"start {self.name}", deadline=120)

        def away() -> str | None:
            # A health check that asks at the same moment holds the volume's lock: then this one is refused.
            said = inside(self.lab, NODE, f"gluster --mode=script --xml volume status {self.name}", check=False)
            try:
                found = online(said)
            except KitError as error:
                return str(error)
            return None if found == len(NODES) else f"{found} of {len(NODES)} run"

        wait_for(Quiet(), "the bricks of the volume to throw away", away, deadline=90)

    def stop(self) -> None:
        """Stop it."""
        self.gluster(f"stop {self.name} force", deadline=120)

    def remount(self, options: str, environment: str = "") -> None:
        """Mount it anew: a client without anything in its memory, with the volume's options of now.

        *environment* is a variable of its process, NAME=VALUE.
        """
        self.unmount()
        command = f"mount -t glusterfs -o {options} {NODE}:/{self.name} {self.mount}"
        inside(self.lab, NODE, f"mkdir -p {self.mount} && {environment} {command}", deadline=60)

        def away() -> str | None:
            said = inside(self.lab, NODE, f"stat --format=%i {self.mount} || :", check=False).strip()
            return None if said == "1" else f"inode {said or 'none'}"  # the root of a volume

        wait_for(Quiet(), f"the mount {self.mount}", away, deadline=60)

    def unmount(self) -> None:
        """Unmount it, if it is mounted.

        It may be dead, so it is not looked at. A run that was interrupted has left a program at work in it, which ends
        within seconds: it is waited for.
        """
        mounted = f"grep -q ' {self.mount} ' /proc/self/mounts"

        def busy() -> str | None:
            script = f"! {mounted} || umount {self.mount} 2>&1; ! {mounted} || echo mounted"
            return inside(self.lab, NODE, script, deadline=60, check=False).strip() or None

        wait_for(Quiet(), f"{self.mount} to be unmounted", busy, deadline=60)

    def remove(self) -> None:
        """Remove all of it, also what a run that was killed has left."""
        self.unmount()

        def there() -> str | None:
            if self.name not in self.gluster("list").split():
                return None
            try:  # a command of a run that was interrupted may still be at work on the volume
                if "Status: Started" in self.gluster(f"info {self.name}"):
                    self.stop()
                self.gluster(f"delete {self.name}", deadline=120)
            except KitError as error:
                return str(error)
            return None

        wait_for(Quiet(), f"the volume {self.name} to be deleted", there, deadline=120, interval=2)
        logs = f"bricks/*bench-volume-brick.log* {self.mount[1:].replace('/', '-')}.log*"
        for node in NODES:
            inside(self.lab, node, f"rm -rf {self.place}; cd /var/log/glusterfs && rm -f {logs}", deadline=300)
        inside(self.lab, NODE, f"! test -d {self.mount} || rmdir {self.mount}")
