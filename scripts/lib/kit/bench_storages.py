"""A durable save against Django's on the same mount, and against three copies by HTTP.

VolumeStorage.save, with and without the catalog's row, against Django's FileSystemStorage.save (no
fsync) on the lab's mount, in turns; HybridStorage on node1 with node2 and node3 as media hosts against
VolumeStorage, both with rows; and the file operations of one save, by `gluster volume profile`, which is off again
afterwards: if this command is killed, the next run switches it off.
"""

from __future__ import annotations

import argparse
import contextlib
import xml.etree.ElementTree as ET
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from kit.bench import Figures, Say
from kit.benchlib import Blocks, Ratio, Remote, Series, median_ratio, p99_ratio, picture_of_ratios, positive, quantile
from kit.lab import Lab
from kit.run import KitError, capture

# Bytes -> rounds in a block.
SIZES = {
    "10kb": (10_240, 100),
    "50kb": (51_200, 100),
    "100kb": (102_400, 60),
    "1mb": (2**20, 25),
    "10mb": (10 * 2**20, 5),
}
BLOCKS, COUNTED, WARM_UP = 6, 200, 10
WAYS = ("django", "volume", "row", "hybrid")
PAIRS = (("volume", "django"), ("row", "django"), ("hybrid", "row"))
NAMES = {
    "django": "Django's FileSystemStorage, no fsync",
    "volume": "VolumeStorage, durable",
    "row": "VolumeStorage with the catalog's row, durable",
    "hybrid": "HybridStorage with the catalog's row, three copies",
}
COUNT_SIZE = 51_200
OPTIONS = ("diagnostics.count-fop-hits", "diagnostics.latency-measurement")
PROGRAM = Path(__file__).with_name("benchnode_storages.py")


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the part's options."""
    parser.add_argument("--size", action="append", choices=list(SIZES), help="only this size; may be repeated")
    parser.add_argument("--blocks", type=positive, default=BLOCKS, metavar="N", help=f"blocks (default: {BLOCKS})")
    parser.add_argument("--no-hosts", action="store_true", help="leave HybridStorage out")


# File operations


def operations(text: str) -> dict[str, int]:
    """Return name -> calls of the latest interval, summed over the bricks, from gluster's XML."""
    try:
        root = ET.fromstring(text)  # noqa: S314  gluster's own answer
    except ET.ParseError as error:
        raise KitError(f"gluster's profile is no XML: {error}") from None
    if root.findtext("opRet") != "0":
        raise KitError(f"gluster refuses its profile: {root.findtext('opErrstr') or 'it does not say why'}")
    bricks = root.findall("volProfile/brick")
    if not bricks:
        raise KitError("gluster's profile names no brick.")
    found: dict[str, int] = {}
    for brick in bricks:
        interval = brick.find("intervalStats")
        if interval is None:
            raise KitError(f"gluster's profile has no interval for {brick.findtext('brickName')}.")
        for fop in interval.findall("fopStats/fop"):
            name, hits = fop.findtext("name") or "", int(fop.findtext("hits") or 0)
            found[name] = found.get(name, 0) + hits
    return found


class Profile:
    """`gluster volume profile` for a while. A marker in the lab's state says that it is ours."""

    def __init__(self, lab: Lab, say: Say) -> None:
        self._lab, self._say = lab, say
        self._volume = str(lab.site_variables()["tribrick_volume"])
        self.marker = lab.state / "bench-profile"

    def _gluster(self, *words: str) -> str:
        command = [*self._lab.ssh("node1"), "sudo", "gluster", "--mode=script", "--xml", "volume", *words]
        text = capture(command, deadline=60).stdout
        try:
            root = ET.fromstring(text)  # noqa: S314  gluster's own answer
        except ET.ParseError as error:
            raise KitError(f"gluster volume {' '.join(words)}: no XML: {error}") from None
        if root.findtext("opRet") != "0":
            raise KitError(f"gluster volume {' '.join(words)}: {root.findtext('opErrstr')}")
        return text

    def options(self) -> dict[str, str]:
        """Return the volume's options that were set."""
        root = ET.fromstring(self._gluster("info", self._volume))  # noqa: S314  gluster's own answer
        return {o.findtext("name") or "": o.findtext("value") or "" for o in root.iter("option")}

    def _off(self) -> None:
        if any(self.options().get(name) == "on" for name in OPTIONS):
            self._gluster("profile", self._volume, "stop")
        for name in OPTIONS:
            if name in self.options():
                self._gluster("reset", self._volume, name)
        self.marker.unlink(missing_ok=True)

    def recover(self) -> None:
        """Switch off what a killed run left on."""
        if self.marker.exists():
            self._say("an earlier run was killed: the volume's profile is switched off")
            self._off()

    @contextlib.contextmanager
    def on(self) -> Iterator[None]:
        """Switch it on for a while."""
        self.recover()
        before = self.options()
        if any(before.get(name) == "on" for name in OPTIONS):
            raise KitError(
                f"Somebody else profiles the volume {self._volume}; "
                f"end that first: gluster volume profile {self._volume} stop"
            )
        self.marker.touch()
        try:
            self._gluster("profile", self._volume, "start")
            yield
        finally:
            self._off()
        if (after := self.options()) != before:
            raise KitError(f"the profile left other options: {sorted(set(after.items()) ^ set(before.items()))}")

    def interval(self) -> dict[str, int]:
        """Return the operations since the last call."""
        return operations(self._gluster("profile", self._volume, "info", "incremental"))


# Measuring


def count(remote: Remote, profile: Profile, say: Say) -> Figures:
    """Count the file operations of a save on the bricks."""
    figures: Figures = {}
    bricks = 3
    for way in ("django", "volume", "row"):
        remote.ask({"do": "save", "way": way, "size": COUNT_SIZE, "count": WARM_UP}, 120)
        profile.interval()
        remote.ask({"do": "save", "way": way, "size": COUNT_SIZE, "count": COUNTED}, 300)
        found = profile.interval()
        remote.ask({"do": "clean"}, 300)
        each = {name: calls / COUNTED / bricks for name, calls in found.items()}
        figures[f"operations_{way}"] = round(sum(each.values()), 2)
        # What rounds to nothing is the cluster's own housekeeping.
        figures |= {f"operations_{way}_{name.lower()}": round(n, 2) for name, n in each.items() if n >= 0.05}
        say(f"{NAMES[way]}: {figures[f'operations_{way}']:.1f} file operations a save on each brick")
    return figures


def evaluate(size: str, times: dict[str, list[list[float]]]) -> Figures:
    """Return the figures of one size: times, and ratios with their spread."""
    figures: Figures = {}
    for way, blocks in times.items():
        every = [value for block in blocks for value in block]
        figures[f"{way}_{size}_median_ms"] = round(quantile(every, 0.5), 2)
        figures[f"{way}_{size}_p99_ms"] = round(quantile(every, 0.99), 2)
        figures[f"{way}_{size}_saves"] = len(every)
    for ours, theirs in PAIRS:
        if ours in times and theirs in times:
            pair: tuple[Blocks, Blocks] = (times[ours], times[theirs])
            figures |= median_ratio(*pair).flat(f"{ours}_to_{theirs}_{size}_median")
            figures |= p99_ratio(*pair).flat(f"{ours}_to_{theirs}_{size}_p99")
    return figures


def run(lab: Lab, options: argparse.Namespace, say: Say) -> Figures:
    """Measure."""
    variables = lab.site_variables()
    port = int(variables["tribrick_brick_ports"]["last"])  # open among the nodes, and the last that a brick takes
    log = lab.state / "bench.log"
    log.write_bytes(b"")
    profile = Profile(lab, say)
    profile.recover()
    version = capture([*lab.ssh("node1"), "sudo", "gluster", "--version"], deadline=60).stdout.splitlines()[0]
    figures: Figures = {"glusterfs": version.split()[-1], "blocks": options.blocks}
    with contextlib.ExitStack() as stack:
        hosts = []
        if not options.no_hosts:
            for node in ("node2", "node3"):
                server = stack.enter_context(Remote(lab.ssh(node), PROGRAM, ["serve", str(port)], log))
                figures["media_hosts"] = server.answer(120)["ready"]
                hosts.append(f"{lab.addresses[node]}:{port}")
            say(f"media hosts: {figures['media_hosts']} on node2 and node3")
        say("node1: directories on the mount and tables for the catalog")
        remote = stack.enter_context(Remote(lab.ssh("node1"), PROGRAM, ["measure", *hosts], log))
        ready = remote.answer(600)["ready"]
        ways = [way for way in WAYS if way in ready]
        for size in options.size or SIZES:
            figures |= evaluate(size, measure_size(remote, ways, size, options.blocks, say))
        with profile.on():
            figures |= count(remote, profile, say)
    return figures


def measure_size(remote: Remote, ways: list[str], size: str, blocks: int, say: Say) -> dict[str, list[list[float]]]:
    """Measure one size, block by block, after a warm-up."""
    amount, rounds = SIZES[size]
    asked = {"do": "compare", "ways": ways, "size": amount}
    say(f"{size}: warm-up")
    remote.ask({**asked, "rounds": max(2, rounds // 10)}, 600)
    times: dict[str, list[list[float]]] = {way: [] for way in ways}
    for block in range(1, blocks + 1):
        answer: dict[str, Any] = remote.ask({**asked, "rounds": rounds}, 600)
        for way in ways:
            times[way].append(answer["times"][way])
        each = ", ".join(f"{way} {quantile(times[way][-1], 0.5):.1f}" for way in ways)
        say(f"{size}, block {block} of {blocks}, median ms: {each}")
    return times


# Showing


def _ratio(figures: Figures, name: str) -> Ratio | None:
    if name not in figures:
        return None
    return Ratio(figures[name], figures[f"{name}_low"], figures[f"{name}_high"])


def _pairs(figures: Figures) -> list[tuple[str, str]]:
    return [(a, b) for a, b in PAIRS if any(name.startswith(f"{a}_to_{b}_") for name in figures)]


def lines(figures: Figures) -> list[str]:
    """Return tables for people."""
    sizes = [size for size in SIZES if f"django_{size}_median_ms" in figures]
    out = [f"GlusterFS {figures['glusterfs']}, Debian {figures['debian']}; a ratio (its spread over the blocks)"]
    out.append(f"{'':<24}{'':>7}" + "".join(f"{size:>20}" for size in sizes))
    for ours, theirs in _pairs(figures):
        for what in ("median", "p99"):
            row = [_ratio(figures, f"{ours}_to_{theirs}_{size}_{what}") for size in sizes]
            cells = [f"{r.value:.2f} ({r.low:.2f}-{r.high:.2f})" if r else "" for r in row]
            out.append(f"{f'{ours} / {theirs}':<24}{what:>7}" + "".join(f"{cell:>20}" for cell in cells))
    for way in WAYS:
        if f"{way}_{sizes[0]}_median_ms" in figures:
            cells = [f"{figures[f'{way}_{s}_median_ms']:.1f}, {figures[f'{way}_{s}_p99_ms']:.1f}" for s in sizes]
            out.append(f"{way:<24}{'ms':>7}" + "".join(f"{cell:>20}" for cell in cells))
    for way in WAYS:
        if f"operations_{way}" in figures:
            start = f"operations_{way}_"
            each = {name.removeprefix(start): n for name, n in figures.items() if name.startswith(start)}
            said = ", ".join(f"{name} {n:g}" for name, n in sorted(each.items(), key=lambda item: -item[1]))
            out.append(f"operations on each brick, {way}: {figures[f'operations_{way}']:g} ({said})")
    return out


def picture(figures: Figures) -> str:
    """Draw the ratios of the medians."""
    sizes = [size for size in SIZES if f"django_{size}_median_ms" in figures]
    columns = [size.upper().replace("B", " B").replace("K B", " KB").replace("M B", " MB") for size in sizes]
    series = [
        Series(f"{NAMES[a]} / {NAMES[b]}", [_ratio(figures, f"{a}_to_{b}_{size}_median") for size in sizes])
        for a, b in _pairs(figures)
    ]
    note = f"median time of a save as a ratio; GlusterFS {figures['glusterfs']}, three nodes in containers"
    return picture_of_ratios("Saving a file", note, columns, series)
