"""How long a stored file takes to be on all nodes: this kit, GlusterFS as it is, other programs that Debian has.

A file of 50 KB is stored on node1; its time is over when all three nodes have read all of it and its hash is right.
Then many files without a pause, timed until all of them are. "ours" is VolumeStorage on the mount, durable, without
rows; all others are stored by Django's FileSystemStorage, without fsync: on the same mount, and on rsync over SSH once
a second (cron without its minute), lsyncd, unison, Syncthing, MooseFS and CephFS. Each is set up for speed, runs only
in its turn, and lies on the bricks' disk. Programs are downloaded by apt and unpacked, not installed; all is removed in
the end. The loss of a node is not measured here. What was left out and why: docs/measurements.md.
Expected to take about 330 s. Quick, to see that it works: --peer lsyncd --blocks 1.
"""

from __future__ import annotations

import argparse
import contextlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

from kit.bench import Figures, Say
from kit.benchlib import Remote, Series, median_ratio, picture_of_ratios, positive, quantile, ratio_of, told
from kit.benchpeers import FIRST, OTHERS, PEERS, Field, Peer, field
from kit.lab import Lab
from kit.run import KitError

SIZE: Final = 51_200
BLOCKS, COUNT, BURST = 3, 12, 200
WARM_UP: Final = 3
PATIENCE: Final = 120.0  # seconds until files must be everywhere
PROGRAM: Final = Path(__file__).with_name("benchnode_peers.py")
PLAIN: Final = {"ours": "VolumeStorage on the mount", "gluster": "Django's storage on the mount"}
LABELS: Final = PLAIN | {name: peer.label for name, peer in PEERS.items()}

Found = dict[str, list[list[float]]]


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the part's options."""
    parser.add_argument(
        "--peer", action="append", choices=list(PEERS), help="only this one beside GlusterFS; may be repeated"
    )
    parser.add_argument("--blocks", type=positive, default=BLOCKS, metavar="N", help=f"turns (default: {BLOCKS})")
    parser.add_argument(
        "--files", type=positive, default=BURST, metavar="N", help=f"files without a pause in a turn (default: {BURST})"
    )


# Measuring


def choose(ground: Field, names: Sequence[str], say: Say) -> tuple[dict[str, Peer], dict[str, str]]:
    """Unpack programs and set peers up; return those, and why others are left out."""
    absent = {name: missing for name in names if (missing := PEERS[name].missing(ground))}
    left_out = {name: f"this release has no {missing}" for name, missing in absent.items()}
    for name, why in left_out.items():
        say(f"{name} is left out: {why}")
    kinds = [PEERS[name] for name in names if name not in left_out]
    packages = sorted({package for kind in kinds for package in kind.packages})
    say(f"downloading and unpacking {', '.join(packages) or 'nothing'}")
    ground.unpack(packages)
    if any(kind.needs_ssh for kind in kinds):
        ground.ssh()
    found = {kind.name: kind(ground) for kind in kinds}
    for name, peer in found.items():
        say(f"setting up {name}")
        peer.prepare()
    return found, left_out


def turn(ground: Field, way: str, peer: Peer | None, writer: Remote, files: int) -> tuple[list[float], float]:
    """Measure one way: the milliseconds of single files, and files a second of many."""
    asked: dict[str, Any] = {
        "way": way,
        "root": peer.root if peer else ground.media,
        "size": SIZE,
        "deadline": PATIENCE,
    }
    single = {**asked, "do": "latency", "period": peer.period if peer else 0.0}
    try:
        if peer:
            peer.start()
        # It also waits until the peer is at work: programs say in very different ways that they are.
        writer.ask({**single, "count": WARM_UP, "period": 0.0}, 4 * PATIENCE)
        times = writer.ask({**single, "count": COUNT}, (COUNT + 2) * PATIENCE)["ms"]
        seconds = writer.ask({**asked, "do": "burst", "count": files}, 4 * PATIENCE)["seconds"]
    except KitError as error:
        if peer:
            ground.keep_logs(peer.name)
        raise KitError(f"{way}: {error} (what it said: {ground.log}; without it: choose others with --peer)") from None
    finally:
        if peer:
            peer.stop()
    return times, files / seconds


def measure(
    ground: Field, peers: dict[str, Peer], writer: Remote, blocks: int, files: int, say: Say
) -> tuple[Found, Found]:
    """Take turns; return milliseconds and files a second, by way and block."""
    ways = [*PLAIN, *peers]
    times: Found = {way: [] for way in ways}
    rates: Found = {way: [] for way in ways}
    for block in range(blocks):
        for way in ways if block % 2 == 0 else reversed(ways):
            single, rate = turn(ground, way, peers.get(way), writer, files)
            times[way].append(single)
            rates[way].append([rate])
            say(
                f"block {block + 1} of {blocks}, {way}: {quantile(single, 0.5):.1f} ms, "
                f"95 % within {quantile(single, 0.95):.1f} ms; {rate:.1f} files a second"
            )
    return times, rates


def run(lab: Lab, options: argparse.Namespace, say: Say) -> Figures:
    """Measure."""
    log = lab.state / "bench.log"
    log.write_bytes(b"")
    names = [name for name in PEERS if not options.peer or name in options.peer]
    port = str(
        lab.site_variables()["tribrick_brick_ports"]["last"]
    )  # open among the nodes, and the last that a brick takes
    with contextlib.ExitStack() as stack:
        ground = stack.enter_context(field(lab, log, say))
        peers, left_out = choose(ground, names, say)
        for node in OTHERS:
            reader = Remote(lab.ssh(node), PROGRAM, ["read", port, lab.addresses[FIRST]], log)
            stack.enter_context(reader).answer(120)
        readers = [lab.addresses[node] for node in OTHERS]
        writer = stack.enter_context(Remote(lab.ssh(FIRST), PROGRAM, ["write", port, *readers], log))
        writer.answer(300)
        times, rates = measure(ground, peers, writer, options.blocks, options.files, say)
    figures: Figures = {"blocks": options.blocks, "files": options.files, "size": SIZE}
    figures |= {f"{name}_left_out": why for name, why in left_out.items()}
    return figures | evaluate(times, rates)


# Figures


def evaluate(times: Found, rates: Found) -> Figures:
    """Return medians, 95th percentiles, and ratios, of which more is better: ours is 1."""
    figures: Figures = {}
    for way, blocks in times.items():
        every = [value for block in blocks for value in block]
        figures[f"{way}_p50_ms"] = round(quantile(every, 0.5), 2)
        figures[f"{way}_p95_ms"] = round(quantile(every, 0.95), 2)
        figures[f"{way}_files_per_second"] = round(quantile([rate for block in rates[way] for rate in block], 0.5), 2)
        if way != "ours":
            figures |= median_ratio(times["ours"], blocks).flat(f"{way}_speed_to_ours")
            figures |= median_ratio(rates[way], rates["ours"]).flat(f"{way}_files_to_ours")
    return figures


def _ways(figures: Figures) -> list[str]:
    return [way for way in LABELS if f"{way}_p50_ms" in figures]


def lines(figures: Figures) -> list[str]:
    """Return a table for people."""
    out = [
        f"Debian {figures['debian']}; until all three nodes have read a file, and {figures['files']} without a pause",
        f"{'':<40}{'p50 ms':>10}{'p95 ms':>10}{'files/s':>10}  files/s to ours",
    ]
    for way in _ways(figures):
        cells = [figures[f"{way}_{what}"] for what in ("p50_ms", "p95_ms", "files_per_second")]
        ratio = told(ratio_of(figures, f"{way}_files_to_ours"))
        out.append(f"{LABELS[way]:<40}{''.join(f'{cell:>10.1f}' for cell in cells)}  {ratio}")
    left_out = [name for name in PEERS if f"{name}_left_out" in figures]
    return out + [f"{name}: left out, {figures[f'{name}_left_out']}" for name in left_out]


def picture(figures: Figures) -> str:
    """Draw the ratios to ours."""
    columns = [way for way in _ways(figures) if way != "ours"]
    series = [
        Series("one file: our time / its time", [ratio_of(figures, f"{way}_speed_to_ours") for way in columns]),
        Series("many files: its rate / our rate", [ratio_of(figures, f"{way}_files_to_ours") for way in columns]),
    ]
    note = "until all three nodes have read the file; above 1 is faster than ours, which alone syncs to disk"
    return picture_of_ratios("A file on all nodes", note, columns, series)
