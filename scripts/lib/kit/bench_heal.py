"""How fast files heal that a brick has missed: this kit's options against GlusterFS's defaults.

One brick process is killed, files are written through the mount of another node into directories that were there
before, the brick is started again, and the time is taken until nothing is left to heal and that brick holds the same
bytes as another one. The two sets of options take turns. Replaced are only options that a heal is bound by; TLS and
quorum stay. They are put back in the end; if this command is killed, the next rollout does it.
"""

from __future__ import annotations

import argparse
import secrets
import time
from statistics import median
from typing import Final

from kit import faults
from kit.bench import Figures, Say
from kit.benchlib import Ratio, Series, median_ratio, picture_of_ratios, positive
from kit.benchvolume import Volume
from kit.faults import inside
from kit.lab import Lab
from kit.run import KitError

SIZE: Final = 20_480
FILES, BLOCKS = 1000, 3
WRITER, SINK = "node1", "node2"
LIMIT: Final = 3600.0  # seconds that one heal may take
# Option of the kit's profile -> GlusterFS's default.
STOCK: Final = {
    "cluster.shd-max-threads": "1",
    "cluster.heal-timeout": "600",
    "cluster.data-self-heal-algorithm": "",
    "cluster.use-anonymous-inode": "on",
    "network.inode-lru-limit": "65536",
}
# Runs on the writer: makes directories, or files of bytes that nothing can compress.
WRITE: Final = """
import os, sys
root, files, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for number in range(256):
    os.makedirs(f"{root}/{number >> 4:x}/{number & 15:x}", exist_ok=True)
for number in range(files):
    with open(f"{root}/{number >> 4 & 15:x}/{number & 15:x}/{number}", "xb") as file:
        file.write(os.urandom(size))
        os.fsync(file.fileno())
"""
SUM: Final = """
cd {place} || exit 1
find . -type f | LC_ALL=C sort | xargs --no-run-if-empty sha256sum | sha256sum
find . -type f | wc -l
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the part's options."""
    parser.add_argument("--files", type=positive, default=FILES, metavar="N", help=f"files a heal (default: {FILES})")
    parser.add_argument("--size", type=positive, default=SIZE, metavar="BYTES", help=f"of a file (default: {SIZE})")
    parser.add_argument("--blocks", type=positive, default=BLOCKS, metavar="N", help=f"turns (default: {BLOCKS})")
    parser.add_argument("--no-stock", action="store_true", help="only this kit's options")


def same(volume: Volume, directory: str) -> int:
    """Return how many files the healed brick holds. Fails unless they are the writer's, byte for byte."""
    script = SUM.format(place=f"{volume.brick}/{directory}")
    found = {node: inside(volume.lab, node, script, deadline=600).split() for node in (WRITER, SINK)}
    if found[WRITER] != found[SINK]:
        raise KitError(f"Nothing waits to be healed, but {SINK} holds {found[SINK]}, {WRITER} {found[WRITER]}.")
    return int(found[SINK][-1])


def heal(lab: Lab, volume: Volume, files: int, size: int) -> float:
    """Let a brick miss files; return the seconds that it took to get them."""
    directory = f"bench-heal-{secrets.token_hex(3)}"
    place = f"{volume.mount}/{directory}"
    fault = faults.make(lab, "brick-kill", [SINK])
    inside(lab, WRITER, f"python3 -c '{WRITE}' {place} 0 {size}", deadline=300)
    try:
        fault.inject()
        try:
            fault.proof()
            inside(lab, WRITER, f"python3 -c '{WRITE}' {place} {files} {size}", deadline=60 + files)
            missed = sum(count or 0 for count in volume.waiting())
            if missed == 0:
                raise KitError("The brick was to miss files, but nothing waits to be healed.")
        finally:
            fault.lift()
        started = time.monotonic()
        asked = False
        while True:
            left = volume.waiting()
            now = time.monotonic() - started
            if asked and not any(left) and None not in left:
                break
            if None not in left and not asked:
                volume.gluster(f"heal {volume.name}")
                asked = True
            if now > LIMIT:
                raise KitError(f"{missed} entries were to heal in {LIMIT:.0f} s; still waiting, by brick: {left}.")
            time.sleep(0.5)  # Gluster tells nobody that it is done; ask again, until LIMIT
        if (held := same(volume, directory)) != files:
            raise KitError(f"{files} files were written, {SINK} holds {held}.")
        return now
    finally:
        inside(lab, WRITER, f"rm -rf {place}", deadline=60 + files)


def run(lab: Lab, options: argparse.Namespace, say: Say) -> Figures:
    """Measure."""
    volume = Volume(lab)
    if unclean := volume.unclean():
        raise KitError(f"Before anything was done: {unclean} (None: a brick that is away).")
    ways = ["ours"] if options.no_stock else ["ours", "stock"]
    rates: dict[str, list[list[float]]] = {way: [] for way in ways}
    with volume.back(STOCK) as ours:
        for block in range(options.blocks):
            for way in ways if block % 2 == 0 else reversed(ways):
                volume.set(ours if way == "ours" else STOCK)
                seconds = heal(lab, volume, options.files, options.size)
                rate = options.files / seconds
                rates[way].append([rate])
                say(f"block {block + 1} of {options.blocks}, {way}: {seconds:.1f} s, {rate:.1f} files/s")
    return figures(options.files, options.size, rates)


def figures(files: int, size: int, rates: dict[str, list[list[float]]]) -> Figures:
    """Return the figures from files a second, by way and block."""
    found: Figures = {"files": files, "bytes": size}
    for way, blocks in rates.items():
        found[f"{way}_files_per_second"] = round(median(rate for block in blocks for rate in block), 2)
        found[f"{way}_seconds"] = round(files / found[f"{way}_files_per_second"], 1)
    if "stock" in rates:
        found |= median_ratio(rates["ours"], rates["stock"]).flat("ours_to_stock")
    return found


def lines(found: Figures) -> list[str]:
    """Return the figures for people."""
    out = [f"{found['files']} files of {found['bytes']} bytes that one brick had missed, Debian {found['debian']}"]
    for way in ("ours", "stock"):
        if f"{way}_seconds" in found:
            out.append(f"{way:<6}{found[f'{way}_seconds']:>8.1f} s {found[f'{way}_files_per_second']:>8.1f} files/s")
    if ratio := _ratio(found):
        out.append(f"ours / stock {ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})")
    return out


def _ratio(found: Figures) -> Ratio | None:
    if "ours_to_stock" not in found:
        return None
    return Ratio(*(found[f"ours_to_stock{end}"] for end in ("", "_low", "_high")))


def picture(found: Figures) -> str:
    """Draw the ratio."""
    note = f"files healed a second, as a ratio; files of {found['bytes']} bytes, three nodes in containers"
    series = [Series("this kit's options / the defaults", [_ratio(found)])]
    return picture_of_ratios("Healing", note, [f"{found['files']} files"], series)
