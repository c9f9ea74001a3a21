"""Pictures read through nginx: from local disk, straight from the mount, from the origin, through the edge.

On node1 an nginx of this command's own serves the same files from the node's local disk ("local"), from the mount as
one would without this kit ("stock"), and passes requests to the kit's origin ("origin", one hop more). The site's own
nginx, with its cache, is the "edge". The four take turns; wrk on this machine asks for random files. Hot: every file
was read once before, and the edge has it in its cache. Cold: files that this node has never read, each once, through an
edge whose cache is empty. Any answer but 200 ends the run. The cache is empty in the end, too.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import re
import secrets
import sys
import tempfile
import time
import urllib.parse
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPConnection, HTTPException
from statistics import median
from typing import Final

from kit.bench import Figures, Say
from kit.benchlib import Ratio, Series, median_ratio, picture_of_ratios, positive
from kit.benchnginx import HERE, PORT, nginx
from kit.engine import apt_install
from kit.faults import inside
from kit.lab import Lab
from kit.run import Console, KitError, capture

# Size -> bytes, files, files of a cold pass.
SIZES: Final = {"50k": (51_200, 500, 200), "5m": (5 * 2**20, 10, 10)}
WAYS: Final = ("local", "stock", "origin", "edge")
NODE, WRITER = "node1", "node2"
BLOCKS, SECONDS, CONNECTIONS = 3, 4.0, (16,)
ORIGIN: Final = "/run/tribrick-origin/origin.sock"
CACHE: Final = "/var/cache/nginx/media"
WRITE: Final = """
import os, sys
place, files, size = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
os.makedirs(place)
for number in range(files):
    with open(f"{place}/{number}.jpg", "xb") as file:
        file.write(os.urandom(size))
        os.fchmod(file.fileno(), 0o644)
"""
LOCATIONS: Final = """
        location /local/ { alias HERE/files/; }
        location /stock/ { alias MEDIA/; }
        location /origin/ {
            proxy_pass http://unix:ORIGIN:/;
            proxy_http_version 1.1;
            proxy_set_header Connection "";
            proxy_buffering on;
        }
"""
WRK: Final = """
math.randomseed(SEED)
request = function() return wrk.format("GET", "BASE/" .. math.random(0, COUNT - 1) .. ".jpg") end
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the part's options."""
    parser.add_argument("--size", action="append", choices=list(SIZES), help="only this size; may be repeated")
    parser.add_argument("--blocks", type=positive, default=BLOCKS, metavar="N", help=f"turns (default: {BLOCKS})")
    parser.add_argument("--connections", type=positive, action="append", metavar="N", help="at a time (default: 16)")
    parser.add_argument("--files", type=positive, metavar="N", help="files of a hot set, instead of 500 and 10")
    parser.add_argument("--no-cold", action="store_true", help="leave the cold passes out")


class Servers:
    """The four ways to the same files, on one node."""

    def __init__(self, lab: Lab) -> None:
        self.lab, self.media = lab, str(lab.site_variables()["tribrick_media_root"])
        self.directory = f"bench-read-{secrets.token_hex(3)}"
        self.address = lab.addresses[NODE]

    def ways(self) -> list[str]:
        """Return the ways that this lab has."""
        there = inside(self.lab, NODE, f"test -S {ORIGIN} && echo yes", check=False).strip() == "yes"
        return [way for way in WAYS if there or way != "origin"]

    def base(self, way: str, place: str) -> str:
        """Return the address of a directory."""
        if way == "edge":
            return f"http://{self.address}/media/{self.directory}/{place}"
        return f"http://{self.address}:{PORT}/{way}/{self.directory}/{place}"

    def write(self, place: str, files: int, size: int, way: str = "") -> None:
        """Write files through the mount of another node; for local disk, copy them."""
        words = f"{self.media}/{self.directory}/{place} {files} {size}"
        patience = 300 + files / 10
        inside(self.lab, WRITER, f"python3 -c '{WRITE}' {words}", deadline=patience)
        if way in ("", "local"):
            to = f"{HERE}/files/{self.directory}"
            copy = f"mkdir -p {to} && cp -a {self.media}/{self.directory}/{place} {to}/"
            inside(self.lab, NODE, copy, deadline=patience)

    def empty(self) -> None:
        """Take everything out of the edge's cache, as docs/serving.md says; nginx may go on meanwhile."""
        inside(self.lab, NODE, f"! test -d {CACHE} || find {CACHE} -ignore_readdir_race -type f -delete", deadline=300)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Serve for a while; leave nothing behind."""
        words = {"HERE": HERE, "MEDIA": self.media, "ORIGIN": ORIGIN}
        text = re.sub("|".join(words), lambda match: words[match[0]], LOCATIONS)
        try:
            with nginx(self.lab, NODE, text):
                yield
        finally:
            inside(self.lab, WRITER, f"rm -rf {self.media}/{self.directory}", deadline=3600)
            self.empty()


def wrk(base: str, files: int, connections: int, seconds: float) -> float:
    """Return requests a second of random files."""
    url = urllib.parse.urlsplit(base)
    script = WRK.replace("BASE", url.path).replace("COUNT", str(files)).replace("SEED", str(os.getpid()))
    with tempfile.NamedTemporaryFile("w", suffix=".lua", encoding="utf-8") as file:
        file.write(script)
        file.flush()
        command = [
            "wrk", f"--threads={min(2, connections)}", f"--connections={connections}", f"--duration={seconds:g}s",
            "--timeout=20s", f"--script={file.name}", f"{url.scheme}://{url.netloc}/",
        ]  # fmt: skip
        return rate(capture(command, deadline=seconds + 60).stdout, base)


def rate(said: str, base: str) -> float:
    """Return the rate that wrk printed. An error of any request is an error."""
    if bad := re.search(r"Non-2xx or 3xx responses: \d+|Socket errors: .*", said):
        raise KitError(f"{base}: {bad[0]}")
    if not (found := re.search(r"^Requests/sec:\s+([0-9.]+)", said, re.MULTILINE)):
        raise KitError(f"{base}: wrk gave no rate: {said[-200:]}")
    return float(found[1])


def once(base: str, files: int, size: int, connections: int) -> float:
    """Read each file once; return files a second. Anything but the whole file is an error."""
    url = urllib.parse.urlsplit(base)

    def some(start: int) -> None:
        connection = HTTPConnection(url.hostname or "", url.port or 80, timeout=60)
        try:
            for number in range(start, files, connections):
                connection.request("GET", f"{url.path}/{number}.jpg")
                answer = connection.getresponse()
                if len(answer.read()) != size or answer.status != 200:
                    raise KitError(f"{base}/{number}.jpg: {answer.status}")
        except (OSError, HTTPException) as error:
            raise KitError(f"{base}: {error!r}") from None
        finally:
            connection.close()

    started = time.monotonic()
    with ThreadPoolExecutor(connections) as pool:
        list(pool.map(some, range(connections)))
    return files / (time.monotonic() - started)


def check_cached(base: str) -> None:
    """Refuse to call an edge hot whose cache gives nothing away. Without this kit's edge there is no such header."""
    url = urllib.parse.urlsplit(base)
    connection = HTTPConnection(url.hostname or "", url.port or 80, timeout=60)
    try:
        connection.request("HEAD", f"{url.path}/0.jpg")
        said = connection.getresponse().getheader("X-Cache")
    except (OSError, HTTPException) as error:
        raise KitError(f"{base}: {error!r}") from None
    finally:
        connection.close()
    if said not in (None, "HIT"):
        raise KitError(f"{base}/0.jpg was read before, and is {said} in the cache; ask {NODE}: tribrick-edge status")


def run(lab: Lab, options: argparse.Namespace, say: Say) -> Figures:
    """Measure."""
    if capture(["which", "wrk"], deadline=10, check=False).returncode:
        with contextlib.redirect_stdout(sys.stderr):
            apt_install(Console(), ["wrk"], "it makes the load")
    servers = Servers(lab)
    ways = servers.ways()
    figures: Figures = {"connections": ", ".join(map(str, options.connections or CONNECTIONS)), "ways": ", ".join(ways)}
    with servers.running():
        for name in options.size or SIZES:
            size, files, few = SIZES[name]
            files = options.files or files
            say(f"{name}: {files} files are written, and read once each way")
            servers.write(name, files, size)
            for way in ways:
                once(servers.base(way, name), files, size, 8)
            check_cached(servers.base("edge", name))
            for connections in options.connections or CONNECTIONS:
                tag = name if connections == CONNECTIONS[0] else f"{name}_{connections}"
                figures |= hot(servers, ways, Hot(name, tag, files), connections, options.blocks, say)
            if not options.no_cold:
                figures |= cold(servers, ways, name, few, options.blocks, say)
    return figures


@dataclass(frozen=True)
class Hot:
    """A set of files that were read before: its place, the name of its figures, and how many."""

    name: str
    tag: str
    files: int


def hot(servers: Servers, ways: Sequence[str], of: Hot, connections: int, blocks: int, say: Say) -> Figures:
    """Measure files that were read before."""
    rates: dict[str, list[list[float]]] = {way: [] for way in ways}
    for block in range(blocks):
        for way in ways if block % 2 == 0 else reversed(ways):
            rates[way].append([wrk(servers.base(way, of.name), of.files, connections, SECONDS)])
        said = ", ".join(f"{way} {rates[way][-1][0]:.0f}" for way in ways)
        say(f"hot {of.tag}, block {block + 1} of {blocks}, requests a second: {said}")
    return compare(f"hot_{of.tag}", rates)


def cold(servers: Servers, ways: Sequence[str], name: str, files: int, blocks: int, say: Say) -> Figures:
    """Measure files that this node has never read, new ones for each way and block."""
    size = SIZES[name][0]
    rates: dict[str, list[list[float]]] = {way: [] for way in ways}
    for block in range(blocks):
        for way in ways if block % 2 == 0 else reversed(ways):
            place = f"cold-{name}-{way}-{block}"
            servers.write(place, files, size, way)
            servers.empty()
            rates[way].append([once(servers.base(way, place), files, size, 8)])
        said = ", ".join(f"{way} {rates[way][-1][0]:.0f}" for way in ways)
        say(f"cold {name}, block {block + 1} of {blocks}, files a second: {said}")
    return compare(f"cold_{name}", rates)


def compare(what: str, rates: dict[str, list[list[float]]]) -> Figures:
    """Return rates and, against local disk, ratios."""
    found: Figures = {}
    for way, blocks in rates.items():
        found[f"{way}_{what}_per_second"] = round(median(value for block in blocks for value in block), 1)
        if way != "local":
            found |= median_ratio(blocks, rates["local"]).flat(f"{way}_{what}_to_local")
    return found


def _measured(figures: Figures) -> list[str]:
    return [name.removeprefix("local_").removesuffix("_per_second") for name in figures if name.startswith("local_")]


def _ratio(figures: Figures, way: str, what: str) -> Ratio | None:
    name = f"{way}_{what}_to_local"
    return Ratio(*(figures[f"{name}{end}"] for end in ("", "_low", "_high"))) if name in figures else None


def lines(figures: Figures) -> list[str]:
    """Return a table for people."""
    ways = str(figures["ways"]).split(", ")
    out = [f"Debian {figures['debian']}; answers a second, and against local disk (spread over the blocks)"]
    for what in _measured(figures):
        cells = []
        for way in ways:
            ratio = _ratio(figures, way, what)
            against = f" = {ratio.value:.2f} ({ratio.low:.2f}-{ratio.high:.2f})" if ratio else ""
            cells.append(f"{way} {figures[f'{way}_{what}_per_second']:g}{against}")
        out.append(f"{what.replace('_', ' '):<14}" + "; ".join(cells))
    return out


def picture(figures: Figures) -> str:
    """Draw the ratios."""
    columns = _measured(figures)
    ways = [way for way in str(figures["ways"]).split(", ") if way != "local"]
    series = [Series(f"{way} / nginx on local disk", [_ratio(figures, way, what) for what in columns]) for way in ways]
    note = f"answers a second as a ratio; {figures['connections']} connections, cold with 8; one node in a container"
    return picture_of_ratios("Reading", note, [what.replace("_", " ") for what in columns], series)
