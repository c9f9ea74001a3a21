"""Uploads through the whole stack, saves by the storage, a tree copied by rsync: local disk, stock, this kit.

Whole stack: this machine sends files over several connections to node1. "ours" is the site's API behind its nginx:
durable, hashed, with the catalog's rows. "stock" and "local" are a plain Django site with as many processes and
threads behind an nginx of this command's own: Django's FileSystemStorage on the mount, or on local disk, and one row;
no fsync. Storage: the same three called on node1, one save after the other. Tree: 500 files of 20 KB that rsync copies
to the mount and to local disk. All take turns. What was stored is deleted in the end; the site keeps its tombstones.
Expected to take about 240 s. Quick, to see that it works: --size 50k --connections 8 --blocks 1, about 40 s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import median
from typing import Any, Final
from urllib.parse import quote, urlsplit

from kit.bench import Figures, Say
from kit.benchlib import Remote, Series, median_ratio, picture_of_ratios, positive, quantile, ratio_of, told
from kit.benchnginx import HERE, nginx
from kit.faults import inside
from kit.lab import Lab
from kit.run import KitError

NODE: Final = "node1"
# Size -> bytes, uploads of a turn for each connection, saves of a turn.
SIZES: Final = {"50k": (51_200, 30, 60), "1m": (2**20, 8, 20)}
WAYS: Final = ("local", "stock", "ours")
SAVES: Final = {"local": "local", "stock": "django", "ours": "row"}  # way -> its name in benchnode_storages.py
BLOCKS, CONNECTIONS = 4, (1, 8)
APP_PORT: Final = 18_089
TREE: Final = (500, 20_480)
PAIRS: Final = (("ours", "stock"), ("ours", "local"), ("stock", "local"))
LOCATIONS: Final = f"""
        location / {{
            proxy_pass http://127.0.0.1:{APP_PORT};
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            client_max_body_size 101m;
        }}
"""
MAKE_TREE: Final = """
import os, sys
place, files, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
for number in range(files):
    os.makedirs(f"{place}/{number % 16:x}", exist_ok=True)
    with open(f"{place}/{number % 16:x}/{number}.jpg", "wb") as file:
        file.write(os.urandom(size))
"""
COPY_TREE: Final = """
import subprocess, sys, time
start = time.monotonic()
subprocess.run(["rsync", "--archive", sys.argv[1] + "/", sys.argv[2] + "/"], check=True)
print(time.monotonic() - start)
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the part's options."""
    parser.add_argument("--size", action="append", choices=list(SIZES), help="only this size; may be repeated")
    parser.add_argument("--blocks", type=positive, default=BLOCKS, metavar="N", help=f"turns (default: {BLOCKS})")
    parser.add_argument("--connections", type=positive, action="append", metavar="N", help="at a time (default: 1, 8)")
    parser.add_argument("--no-storage", action="store_true", help="only through the whole stack, and the tree")


# Whole stack


@dataclass
class Target:
    """Where one way's uploads go, and what it has stored."""

    url: str
    token: str = ""
    stored: list[str] = field(default_factory=list)

    @property
    def headers(self) -> dict[str, str]:
        """Who we are."""
        return {"Authorization": f"Token {self.token}"} if self.token else {}


def api(lab: Lab) -> Target:
    """Return the site's API."""
    token = str(lab.recall().get("token", ""))
    if not token:
        raise KitError(f"The lab '{lab.name}' has no site yet: ./scripts/lab up --name {lab.name}")
    return Target(f"{lab.url(NODE)}/api/media/", token)


def form(size: int) -> tuple[bytes, str]:
    """Return an upload's body, bytes that nobody has sent before, and its type."""
    mark = secrets.token_hex(16)
    head = f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="{secrets.token_hex(8)}.bin"\r\n\r\n'
    return head.encode() + os.urandom(size) + f"\r\n--{mark}--\r\n".encode(), f"multipart/form-data; boundary={mark}"


def send(target: Target, bodies: Sequence[tuple[bytes, str]], connections: int) -> float:
    """Upload all; return uploads a second. Anything but 201 is an error."""
    url = urlsplit(target.url)

    def some(start: int) -> list[str]:
        names = list[str]()
        connection = HTTPConnection(url.hostname or "", url.port or 80, timeout=60)
        try:
            for body, kind in bodies[start::connections]:
                connection.request("POST", url.path, body, {"Content-Type": kind, **target.headers})
                answer = connection.getresponse()
                said = answer.read()
                if answer.status != 201:
                    raise KitError(f"{target.url}: {answer.status} {said[:200]!r}")
                names.append(json.loads(said)["name"])
        except (OSError, HTTPException, ValueError, LookupError) as error:
            raise KitError(f"{target.url}: {error!r}") from None
        finally:
            connection.close()
            target.stored += names
        return names

    started = time.monotonic()
    with ThreadPoolExecutor(connections) as pool:
        done = sum(len(names) for names in pool.map(some, range(connections)))
    if done != len(bodies):
        raise KitError(f"{target.url}: {done} of {len(bodies)} uploads were answered")
    return done / (time.monotonic() - started)


def remove(target: Target) -> None:
    """Delete what the site has stored."""
    url = urlsplit(target.url)

    def some(start: int) -> None:
        connection = HTTPConnection(url.hostname or "", url.port or 80, timeout=60)
        try:
            for name in target.stored[start::8]:
                connection.request("DELETE", f"{url.path}{quote(name)}", headers=target.headers)
                answer = connection.getresponse()
                answer.read()
                if answer.status not in (204, 404):  # 404: it is gone
                    raise KitError(f"{target.url}{name} could not be deleted: {answer.status}")
        except (OSError, HTTPException) as error:
            raise KitError(f"{target.url}: what was uploaded could not be deleted: {error!r}") from None
        finally:
            connection.close()

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(some, range(8)))
    target.stored.clear()


@contextlib.contextmanager
def targets(lab: Lab, log: Path, say: Say) -> Iterator[dict[str, Target]]:
    """Run the plain site, and delete what was stored afterwards."""
    gunicorn = inside(lab, NODE, "grep -E '^(workers|threads) = ' /etc/tribrick/gunicorn.conf.py")
    numbers = dict(line.split(" = ") for line in gunicorn.split("\n") if line)
    words = ["serve", str(APP_PORT), numbers["workers"], numbers["threads"]]
    ours = api(lab)
    program = Path(__file__).with_name("benchnode_upload.py")
    with Remote(lab.ssh(NODE), program, words, log) as plain:
        plain.answer(120)
        with nginx(lab, NODE, LOCATIONS) as address:
            try:
                yield {"local": Target(f"{address}/local/"), "stock": Target(f"{address}/stock/"), "ours": ours}
            finally:
                say(f"deleting {len(ours.stored)} files that were uploaded to the site")
                remove(ours)


def whole_stack(
    where: dict[str, Target], name: str, connections: int, blocks: int, say: Say
) -> dict[str, list[list[float]]]:
    """Upload in turns; return uploads a second, by way and block."""
    size, each, _ = SIZES[name]
    rates: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for way in WAYS:  # warm-up: connections to the database, directories
        send(where[way], [form(size) for _ in range(16)], connections)
    for block in range(blocks):
        for way in WAYS if block % 2 == 0 else reversed(WAYS):
            bodies = [form(size) for _ in range(each * min(connections, 4))]
            rates[way].append([send(where[way], bodies, connections)])
        said = ", ".join(f"{way} {rates[way][-1][0]:.1f}" for way in WAYS)
        say(f"{name}, {connections} connections, block {block + 1} of {blocks}, uploads a second: {said}")
    return rates


# Storage


def storage(remote: Remote, name: str, blocks: int, say: Say) -> dict[str, list[list[float]]]:
    """Save in turns; return milliseconds, by way and block."""
    size, _, rounds = SIZES[name]
    asked: dict[str, Any] = {"do": "compare", "ways": [SAVES[way] for way in WAYS], "size": size}
    remote.ask({**asked, "rounds": 6}, 600)
    times: dict[str, list[list[float]]] = {way: [] for way in WAYS}
    for block in range(blocks):
        answer = remote.ask({**asked, "rounds": rounds}, 600)["times"]
        for way in WAYS:
            times[way].append(answer[SAVES[way]])
        said = ", ".join(f"{way} {median(times[way][-1]):.2f}" for way in WAYS)
        say(f"{name}, storage, block {block + 1} of {blocks}, median ms: {said}")
    return times


# Tree


def tree(lab: Lab, blocks: int, say: Say) -> dict[str, list[list[float]]]:
    """Let rsync copy a tree in turns; return the seconds by way and block."""
    files, size = TREE
    mount = f"{lab.site_variables()['tribrick_media_root']}/bench-tree-{secrets.token_hex(3)}"
    root = f"{HERE}-tree"
    places = {"local": f"{root}/copy", "mount": mount}
    seconds: dict[str, list[list[float]]] = {way: [] for way in places}
    # An rsync of an interrupted run ends once its source is gone; until then it may still write.
    clean = f"n=0; until rm -rf {root} {mount}; do n=$((n + 1)); test $n -lt 60 || exit 1; sleep 0.5; done"
    try:
        inside(lab, NODE, f"rm -rf {root}; python3 -c '{MAKE_TREE}' {root}/tree {files} {size}", deadline=120)
        inside(lab, NODE, f"python3 -c '{COPY_TREE}' {root}/tree {root}/warm-up", deadline=120)
        for block in range(blocks):
            for way in places if block % 2 == 0 else reversed(places):
                copy = f"python3 -c '{COPY_TREE}' {root}/tree {places[way]}"
                seconds[way].append([float(inside(lab, NODE, copy, deadline=600))])
                inside(lab, NODE, f"rm -rf {places[way]}", deadline=300)
            said = ", ".join(f"{way} {found[-1][0]:.2f}" for way, found in seconds.items())
            say(f"rsync of {files} files, block {block + 1} of {blocks}, seconds: {said}")
    finally:
        inside(lab, NODE, clean, deadline=300)
    return seconds


# Figures


def run(lab: Lab, options: argparse.Namespace, say: Say) -> Figures:
    """Measure."""
    connections = options.connections or CONNECTIONS
    log = lab.state / "bench.log"
    log.write_bytes(b"")
    figures: Figures = {"connections": ", ".join(map(str, connections)), "blocks": options.blocks}
    with targets(lab, log, say) as where:
        for name in options.size or SIZES:
            for count in connections:
                rates = whole_stack(where, name, count, options.blocks, say)
                figures |= compare(f"{name}_{count}", rates, "per_second")
    if not options.no_storage:
        program = Path(__file__).with_name("benchnode_storages.py")
        with Remote(lab.ssh(NODE), program, ["measure"], log) as remote:
            remote.answer(600)
            for name in options.size or SIZES:
                figures |= compare(f"{name}_save", storage(remote, name, options.blocks, say), "ms")
    return figures | tree_figures(tree(lab, options.blocks, say))


def compare(what: str, found: dict[str, list[list[float]]], unit: str) -> Figures:
    """Return medians and ratios."""
    figures: Figures = {}
    for way, blocks in found.items():
        figures[f"{way}_{what}_{unit}"] = round(quantile([value for block in blocks for value in block], 0.5), 2)
    for one, other in PAIRS:
        figures |= median_ratio(found[one], found[other]).flat(f"{one}_{what}_to_{other}")
    return figures


def tree_figures(seconds: dict[str, list[list[float]]]) -> Figures:
    """Return files a second and how much longer the mount takes."""
    figures: Figures = {"tree_files": TREE[0], "tree_bytes": TREE[1]}
    for way, blocks in seconds.items():
        figures[f"{way}_tree_seconds"] = round(median(value for block in blocks for value in block), 2)
    return figures | median_ratio(seconds["mount"], seconds["local"]).flat("mount_tree_to_local")


def _measured(figures: Figures) -> list[str]:
    found = [re.fullmatch(r"ours_(.*)_(?:per_second|ms)", name) for name in figures]
    return [match[1] for match in found if match]


def lines(figures: Figures) -> list[str]:
    """Return a table for people."""
    out = [f"Debian {figures['debian']}; uploads a second, or ms of a save; ratios (spread over the blocks)"]
    for what in _measured(figures):
        unit = "ms" if what.endswith("_save") else "per_second"
        values = ", ".join(f"{way} {figures[f'{way}_{what}_{unit}']:g}" for way in WAYS)
        ratios = "; ".join(
            f"{one} / {other} {told(ratio_of(figures, f'{one}_{what}_to_{other}'))}" for one, other in PAIRS
        )
        out.append(f"{what.replace('_', ' '):<10}{values}; {ratios}")
    copied = f"{figures['tree_files']} files by rsync: local {figures['local_tree_seconds']:g} s"
    ratio = told(ratio_of(figures, "mount_tree_to_local"))
    return [*out, f"{copied}, mount {figures['mount_tree_seconds']:g} s = {ratio}"]


def picture(figures: Figures) -> str:
    """Draw the ratios of uploads a second."""
    columns = [what for what in _measured(figures) if not what.endswith("_save")]
    series = [
        Series(f"{one} / {other}", [ratio_of(figures, f"{one}_{what}_to_{other}") for what in columns])
        for one, other in PAIRS
    ]
    note = "uploads a second as a ratio; local, stock: a plain Django site, no fsync; three nodes in containers"
    shown = [f"{what.split('_')[0]}, {what.split('_')[1]} at a time" for what in columns]
    return picture_of_ratios("Uploading", note, shown, series)
