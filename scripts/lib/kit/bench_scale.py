"""What an upload, a page, an audit sample and a mirror run cost with more and more files.

Files of 4 KB and their rows are put into the site by a program on node1, not uploaded; then, at each size: uploads
of 20 KB by the API, one after the other; pages (the gallery's first, one from its middle, a list of the API); audits
of 50 random files by hash, on the mount and on all bricks; a mirror of node1 into a new place, without a snapshot, and
again when nothing has changed. A size comes after the other, so what else the machine does shows in the ratios: leave
it alone. All is deleted in the end; the site keeps the tombstones, so take a lab that can be thrown away.
Expected to take about 300 s, most of it to make and delete the files; 100,000 files take about ten times that.
Quick, to see that it works: --files 200 --files 400 --blocks 2, about 60 s.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import time
from collections.abc import Callable, Iterator, Sequence
from http.client import HTTPConnection, HTTPException
from pathlib import Path
from statistics import median
from typing import Final
from urllib.parse import urlsplit

from kit.bench import Figures, Say
from kit.bench_upload import Target, api, form
from kit.bench_upload import remove as remove_uploads
from kit.benchlib import Remote, Series, median_ratio, picture_of_ratios, positive, ratio_of, told
from kit.faults import inside
from kit.lab import ACCOUNT, NODES, Lab
from kit.run import KitError

NODE: Final = "node1"
FILES: Final = (1000, 10_000)
BLOCKS, EACH, SAMPLE = 5, 12, 50
STEP: Final = 1000
UPLOAD: Final = 20_480
PROGRAM: Final = Path(__file__).with_name("benchnode_scale.py")
MIRROR: Final = "/var/lib/tribrick-bench-mirror"
KINDS: Final = {
    "upload": "upload",
    "page": "first page",
    "middle": "page in the middle",
    "list": "list of the API",
    "audit": f"audit of {SAMPLE}",
    "mirror_first": "first mirror, a file",
    "mirror_again": "mirror, nothing new",
}


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the part's options."""
    parser.add_argument(
        "--files", type=positive, action="append", metavar="N", help="a size; may be repeated (default: 1000, 10000)"
    )
    parser.add_argument("--blocks", type=positive, default=BLOCKS, metavar="N", help=f"repeats (default: {BLOCKS})")


# Single things, each of which takes some time


def get(url: str, headers: dict[str, str], times: int) -> list[float]:
    """Ask for a page again and again; return the milliseconds. Anything but 200 is an error."""
    parts = urlsplit(url)
    path = f"{parts.path}?{parts.query}" if parts.query else parts.path
    found = list[float]()
    connection = HTTPConnection(parts.hostname or "", parts.port or 80, timeout=60)
    try:
        for _ in range(times):
            started = time.perf_counter()
            connection.request("GET", path, headers=headers)
            answer = connection.getresponse()
            answer.read()
            found.append((time.perf_counter() - started) * 1000)
            if answer.status != 200:
                raise KitError(f"{url}: {answer.status}")
    except (OSError, HTTPException) as error:
        raise KitError(f"{url}: {error!r}") from None
    finally:
        connection.close()
    return found


def post(target: Target, times: int) -> list[float]:
    """Upload again and again; return the milliseconds. Anything but 201 is an error."""
    parts = urlsplit(target.url)
    found = list[float]()
    connection = HTTPConnection(parts.hostname or "", parts.port or 80, timeout=60)
    try:
        for _ in range(times):
            body, kind = form(UPLOAD)
            started = time.perf_counter()
            connection.request("POST", parts.path, body, {"Content-Type": kind, **target.headers})
            answer = connection.getresponse()
            said = answer.read()
            found.append((time.perf_counter() - started) * 1000)
            if answer.status != 201:
                raise KitError(f"{target.url}: {answer.status} {said[:200]!r}")
            target.stored.append(json.loads(said)["name"])
    except (OSError, HTTPException, ValueError, LookupError) as error:
        raise KitError(f"{target.url}: {error!r}") from None
    finally:
        connection.close()
    return found


@contextlib.contextmanager
def mirror(lab: Lab) -> Iterator[Callable[[], tuple[float, int]]]:
    """Give a mirror in a new place; a run of it returns its seconds and how many files it copied."""
    new_place = f"""
import json, os, pathlib
real = pathlib.Path("/etc/tribrick/mirror.json")
values = json.loads(real.read_text())
owner = os.stat(values["place"])
os.mkdir("{MIRROR}", 0o755)
os.mkdir("{MIRROR}/place", 0o751)
os.chown("{MIRROR}/place", owner.st_uid, owner.st_gid)
with open("{MIRROR}/mirror.json", "x", opener=lambda path, flags: os.open(path, flags, 0o600)) as file:
    json.dump({{**values, "place": "{MIRROR}/place", "push": {{}}, "restic": {{}}}}, file)
"""

    timed = f"""
import json, subprocess, sys, time
command = ["tribrick-mirror", "--config", "{MIRROR}/mirror.json", "run", "--no-snapshot", "--json"]
started = time.perf_counter()
done = subprocess.run(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
if done.returncode:
    said = done.stderr.decode(errors="replace").strip()
    if not said and done.stdout:
        report = json.loads(done.stdout)
        said = "; ".join([*report["problems"], *report["volume"]][:3])
    sys.exit(f"tribrick-mirror ended with {{done.returncode}}: {{said}}")
print(json.dumps([time.perf_counter() - started, json.loads(done.stdout)["copied"]]))
"""

    def go() -> tuple[float, int]:
        seconds, copied = json.loads(inside(lab, NODE, f"python3 - <<'END'\n{timed}\nEND", deadline=3600))
        return float(seconds), int(copied)

    # A mirror of an interrupted run may still write; it ends once its place is gone.
    clean = f"n=0; until rm -rf {MIRROR}; do n=$((n + 1)); test $n -lt 60 || exit 1; sleep 0.5; done"
    try:
        inside(lab, NODE, f"{clean}; python3 - <<'END'\n{new_place}\nEND", deadline=600)
        yield go
    finally:
        inside(lab, NODE, clean, deadline=600)


# Measuring


Times = dict[str, list[list[float]]]


def measure(lab: Lab, remote: Remote, ours: Target, files: int, blocks: int) -> Times:
    """Return what each kind takes with so many files, by block: milliseconds; the first mirror, of each file."""
    site, times = lab.url(NODE), {kind: list[list[float]]() for kind in KINDS}
    middle = remote.ask({"do": "middle"}, 60)["picture"]
    pages = {
        "page": f"{site}/",
        "middle": f"{site}/?before={middle}",
        "list": f"{site}/api/media/?limit=50",
    }
    for kind, url in pages.items():
        get(url, ours.headers, 4)  # warm-up
        times[kind] = [get(url, ours.headers, EACH) for _ in range(blocks)]
    # The mount, and each brick by its own program: with fewer something is not measured.
    if (copies := remote.ask({"do": "audit", "sample": SAMPLE}, 300)["copies"]) != 1 + len(NODES):
        raise KitError(f"An audit was to compare {1 + len(NODES)} copies, the mount and each brick, and has {copies}.")
    times["audit"] = [[remote.ask({"do": "audit", "sample": SAMPLE}, 300)["seconds"] * 1000] for _ in range(blocks)]
    post(ours, 4)
    times["upload"] = [post(ours, EACH) for _ in range(blocks)]
    remote.ask({"do": "ledger", "deadline": 300}, 330)
    with mirror(lab) as run_mirror:
        seconds, copied = run_mirror()
        if copied < files:
            raise KitError(f"The mirror was to copy at least {files} files, and copied {copied}.")
        times["mirror_first"] = [[seconds * 1000 / copied]]
        times["mirror_again"] = []
        for _ in range(blocks):
            seconds, copied = run_mirror()
            if copied:
                raise KitError(f"Nothing had changed, and the mirror copied {copied} files.")
            times["mirror_again"].append([seconds * 1000])
    return times


def grow(remote: Remote, have: int, wanted: int, say: Say) -> None:
    """Put more files in."""
    while have < wanted:
        count = min(STEP, wanted - have)
        remote.ask({"do": "add", "start": have, "count": count, "owner": ACCOUNT}, 600)
        have += count
        if have % (10 * STEP) == 0 or have == wanted:
            say(f"{have} files")


def empty(remote: Remote, say: Say) -> None:
    """Delete all files that were put in."""
    left, before = -1, -1
    while left != 0:
        left, before = int(remote.ask({"do": "remove", "count": STEP}, 900)["left"]), left
        if left >= before > 0:
            raise KitError(f"{left} files do not let themselves be deleted.")
        if left % (10 * STEP) == 0:
            say(f"deleting; {left} files are left")


def run(lab: Lab, options: argparse.Namespace, say: Say) -> Figures:
    """Measure."""
    sizes = sorted(set(options.files or FILES))
    log = lab.state / "bench.log"
    log.write_bytes(b"")
    ours = api(lab)
    found: dict[int, Times] = {}
    try:
        with Remote(lab.ssh(NODE), PROGRAM, [], log) as remote:
            if remote.answer(120)["left"]:
                say("an earlier run was killed: its files are deleted")
                empty(remote, say)
            have = 0
            for files in sizes:
                grow(remote, have, files, say)
                have = files
                found[files] = measure(lab, remote, ours, files, options.blocks)
                said = ", ".join(f"{KINDS[kind]} {_middle(blocks):.1f}" for kind, blocks in found[files].items())
                say(f"{files} files, median ms: {said}")
    finally:
        # By a new program: the first one may have ended with an error, or with Ctrl-C.
        with Remote(lab.ssh(NODE), PROGRAM, [], log) as remote:
            say(f"deleting {remote.answer(120)['left']} files")
            empty(remote, say)
        remove_uploads(ours)
    return evaluate(found)


def _middle(blocks: Sequence[Sequence[float]]) -> float:
    return median(value for block in blocks for value in block)


def evaluate(found: dict[int, Times]) -> Figures:
    """Return medians in milliseconds, and ratios to the smallest size."""
    sizes = sorted(found)
    figures: Figures = {"files": ", ".join(map(str, sizes))}
    for files in sizes:
        for kind, blocks in found[files].items():
            figures[f"{kind}_{files}_ms"] = round(_middle(blocks), 3)
            if files != sizes[0]:
                figures |= median_ratio(blocks, found[sizes[0]][kind]).flat(f"{kind}_{files}_to_{sizes[0]}")
    return figures


def _sizes(figures: Figures) -> list[str]:
    return str(figures["files"]).split(", ")


def lines(figures: Figures) -> list[str]:
    """Return a table for people."""
    first, *others = _sizes(figures)
    out = [f"Debian {figures['debian']}; median ms with so many files; against {first} files (spread over the blocks)"]
    for kind, name in KINDS.items():
        cells = [f"{first}: {figures[f'{kind}_{first}_ms']:g}"]
        for files in others:
            ratio = told(ratio_of(figures, f"{kind}_{files}_to_{first}"))
            cells.append(f"{files}: {figures[f'{kind}_{files}_ms']:g} = {ratio}")
        out.append(f"{name:<22}{'; '.join(cells)}")
    return out


def picture(figures: Figures) -> str:
    """Draw the ratios."""
    first, *others = _sizes(figures)
    series = [
        Series(f"{files} files / {first}", [ratio_of(figures, f"{kind}_{files}_to_{first}") for kind in KINDS])
        for files in others
    ]
    note = "time as a ratio; of the first mirror the time of each file; three nodes in containers"
    return picture_of_ratios("More files", note, [kind.replace("_", " ") for kind in KINDS], series)
