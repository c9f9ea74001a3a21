"""The longest stall when a node is lost or hangs: this kit's settings against GlusterFS's defaults.

Each fault holds for a while. Meanwhile every node that it does not hit writes files and syncs them, reads other
files, both through its mount, and is asked by this machine for one picture again and again (cached). Shown is the
longest that any of these took. Stock: ping-timeout and the TCP time-outs are GlusterFS's, and peer_watch is stopped.
All is put back in the end; if this command is killed, the next rollout does it. The lab must have --disks xfs.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import secrets
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Final

import requests

from kit import faults
from kit.bench import Figures, Say
from kit.benchlib import Quiet, Ratio, Series, picture_of_ratios
from kit.benchvolume import Volume
from kit.faults import inside
from kit.lab import NODES, Lab
from kit.run import KitError, wait_for

SICK: Final = "node3"
FAULTS: Final = ("silence", "power-cut", "pause", "brick-freeze", "kill")
WATCHER: Final = "tribrick-peer-watch.service"
STEADY, HOLD = 3.0, 60.0
CLEAN_WAIT: Final = 900.0
# Option of the kit's profile -> GlusterFS's default; empty: reset.
STOCK: Final = {
    "network.ping-timeout": "42",
    "server.tcp-user-timeout": "42",
    "server.keepalive-time": "",
    "server.keepalive-interval": "",
    "server.keepalive-count": "",
}
# Runs on a healthy node; one line of JSON when its time is over and its last call is back.
LOAD: Final = """
import json, os, sys, time
what, place, end = sys.argv[1], sys.argv[2], time.monotonic() + float(sys.argv[3])
done = errors = 0
longest, data = 0.0, os.urandom(51200)

def write():
    name = f"{place}/{done % 50}-{done}"
    handle = os.open(name, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.write(handle, data)
    os.fsync(handle)
    os.close(handle)
    os.unlink(name)

def read():
    with open(f"{place}/{done % 100}", "rb") as file:
        if len(file.read()) != 51200:
            raise OSError

while time.monotonic() < end:
    start = time.monotonic()
    try:
        write() if what == "write" else read()
    except OSError:
        errors += 1
    longest = max(longest, time.monotonic() - start)
    done += 1
    time.sleep(0.02)  # a pause, as a visitor makes one
print(json.dumps({"longest": longest, "errors": errors, "done": done}))
"""
FILES: Final = """
import os, sys
os.makedirs(sys.argv[1] + "/read")
for node in sys.argv[2:]:
    os.mkdir(sys.argv[1] + "/" + node)
for number in range(100):
    with open(sys.argv[1] + f"/read/{number}", "wb") as file:
        file.write(os.urandom(51200))
        os.fchmod(file.fileno(), 0o644)
"""
WHATS: Final = ("write", "read", "cached")


CONSOLE: Final = Quiet()


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the part's options."""
    parser.add_argument("--fault", action="append", choices=list(FAULTS), help="only this one; may be repeated")
    parser.add_argument("--hold", type=float, default=HOLD, metavar="S", help=f"seconds it holds (default: {HOLD:g})")
    parser.add_argument("--no-stock", action="store_true", help="only this kit's settings")


@contextlib.contextmanager
def settings(lab: Lab, volume: Volume, way: str) -> Iterator[None]:
    """Let the kit's settings or the defaults hold for a while."""
    if way == "ours":
        yield
        return
    ran = [
        node for node in NODES if inside(lab, node, f"systemctl is-active {WATCHER}", check=False).strip() == "active"
    ]
    with volume.back(STOCK):
        volume.set(STOCK)
        for node in ran:
            inside(lab, node, f"systemctl stop {WATCHER}", deadline=60)
        try:
            yield
        finally:
            for node in ran:
                inside(lab, node, f"systemctl start {WATCHER}", deadline=60)


def visitor(url: str, stop: threading.Event) -> dict[str, Any]:
    """Ask for one picture until told to stop."""
    longest, errors, done = 0.0, 0, 0
    with requests.Session() as session:
        while not stop.wait(0.05):
            start = time.monotonic()
            try:
                errors += session.get(url, timeout=(5, 120)).status_code != 200
            except requests.RequestException:
                errors += 1
            longest, done = max(longest, time.monotonic() - start), done + 1
    return {"longest": longest, "errors": errors, "done": done}


def one(lab: Lab, volume: Volume, name: str, hold: float) -> dict[str, dict[str, float]]:
    """Make a fault under load; return by kind the longest time, and the errors, over all healthy nodes."""
    healthy = [node for node in NODES if node != SICK]
    directory = f"bench-fault-{secrets.token_hex(3)}"
    place = f"{volume.mount}/{directory}"
    inside(lab, healthy[0], f"python3 -c '{FILES}' {place} {' '.join(healthy)}", deadline=120)
    fault = faults.make(lab, name, [SICK])
    seconds = STEADY + hold + STEADY
    stop = threading.Event()
    try:
        with ThreadPoolExecutor(3 * len(healthy)) as pool:
            tasks: dict[str, list[Any]] = {what: [] for what in WHATS}
            for node in healthy:
                for what, where in (("write", f"{place}/{node}"), ("read", f"{place}/read")):
                    script = f"python3 -c '{LOAD}' {what} {where} {seconds}"
                    tasks[what].append(pool.submit(inside, lab, node, script, deadline=seconds + 240))
                tasks["cached"].append(pool.submit(visitor, f"{lab.url(node)}/media/{directory}/read/0", stop))
            try:
                stop.wait(STEADY)
                fault.inject()
                fault.proof()
                stop.wait(hold)
            finally:
                fault.lift()
                stop.set()
                wait_for(CONSOLE, f"the end of {name}", fault.ended, deadline=120)
            found = {what: [task.result() for task in all_] for what, all_ in tasks.items()}
        return {what: worst([json.loads(r) if isinstance(r, str) else r for r in all_]) for what, all_ in found.items()}
    finally:
        stop.set()
        inside(lab, healthy[0], f"rm -rf {place}", deadline=120)


def worst(results: Sequence[dict[str, float]]) -> dict[str, float]:
    """Return the longest time of several programs and the sum of their errors. One that did nothing is an error."""
    if idle := [one_ for one_ in results if one_["done"] < 10]:
        raise KitError(f"A program that was to make load did nearly nothing: {idle[0]}")
    return {"longest": max(r["longest"] for r in results), "errors": sum(r["errors"] for r in results)}


def run(lab: Lab, options: argparse.Namespace, say: Say) -> Figures:
    """Measure."""
    volume = Volume(lab)
    figures: Figures = {"hold_s": options.hold}
    for name in options.fault or FAULTS:
        for way in ["ours"] if options.no_stock else ["ours", "stock"]:
            wait_for(CONSOLE, "the volume to be whole", volume.unclean, deadline=CLEAN_WAIT, interval=1)
            with settings(lab, volume, way):
                found = one(lab, volume, name, options.hold)
            for what, numbers in found.items():
                figures[f"{way}_{_key(name)}_{what}_s"] = round(numbers["longest"], 2)
                figures[f"{way}_{_key(name)}_{what}_errors"] = int(numbers["errors"])
            longest = ", ".join(f"{what} {numbers['longest']:.2f} s" for what, numbers in found.items())
            say(f"{name}, {way}: longest {longest}")
    return figures


def _key(name: str) -> str:
    return name.replace("-", "_")


def _measured(figures: Figures) -> list[str]:
    return [name for name in FAULTS if f"ours_{_key(name)}_write_s" in figures]


def lines(figures: Figures) -> list[str]:
    """Return a table for people."""
    out = [f"longest of any healthy node, seconds (errors); Debian {figures['debian']}, held {figures['hold_s']:g} s"]
    for name in _measured(figures):
        for way in ("ours", "stock"):
            start = f"{way}_{_key(name)}"
            if f"{start}_write_s" in figures:
                cells = [
                    f"{what} {figures[f'{start}_{what}_s']:g} ({figures[f'{start}_{what}_errors']})" for what in WHATS
                ]
                out.append(f"{name:<14}{way:<7}{'  '.join(cells)}")
    return out


def picture(figures: Figures) -> str:
    """Draw our longest stalls as a part of stock's."""
    names = _measured(figures)

    def ratio(name: str, what: str) -> Ratio | None:
        theirs = figures.get(f"stock_{_key(name)}_{what}_s")
        value = figures[f"ours_{_key(name)}_{what}_s"] / theirs if theirs else None
        return Ratio(value, value, value) if value is not None else None

    series = [Series(f"{what}, ours / stock", [ratio(name, what) for name in names]) for what in ("write", "read")]
    note = f"longest stall on healthy nodes as a ratio; the fault holds {figures['hold_s']:g} s"
    return picture_of_ratios("A node is lost", note, names, series)
