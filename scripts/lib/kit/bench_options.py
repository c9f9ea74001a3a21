"""What each option of volume and mount is worth: on against off, in turns, on a volume to throw away.

The volume has the lab's options and lies on the same disks. For each option it is mounted anew as the kit does and with
this one thing different, turn by turn; then four threads on node1 read every file once (a client that knows nothing,
as the origin's reads are), read some again and again, save files with fsync, and ask for the attributes of each file
once more, after what the kernel knew has expired. Shown are ratios of what was done a second: above 1 the other value
is faster. What is measured here is not what is safe; the profile in roles/gluster_volume says why each option is as it
is. Not here, since a lab has too few files and clients to fill them: network.inode-lru-limit and the mount's queues.
Expected to take about 320 s with the options that are measured by default, about 800 s with --all, and of single ones
60 s and 30 for each. Quick, to see that it works: --option rename --blocks 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from statistics import median
from typing import Final

from kit.bench import Figures, Say
from kit.benchlib import Quiet, Series, median_ratio, picture_of_ratios, positive, ratio_of, told
from kit.benchvolume import NODE, Scratch, Volume
from kit.faults import inside
from kit.lab import Lab
from kit.run import KitError, wait_for

WORKS: Final = {"cold": "read once", "hot": "read again", "stat": "attributes", "save": "save"}
FILES, SIZE, SECONDS, THREADS, BLOCKS = 300, 51_200, 0.6, 4, 3
MOUNT: Final = {"log-level": "WARNING", "attribute-timeout": "1", "entry-timeout": "1", "negative-timeout": "0"}
FILL: Final = """
import os, sys
for number in range(int(sys.argv[2])):
    with open(f"{sys.argv[1]}/{number}", "wb") as file:
        file.write(os.urandom(int(sys.argv[3])))
os.makedirs(sys.argv[1] + "/saved")
"""
# Runs on the node; prints how often each thing was done a second.
WORK: Final = """
import itertools, json, os, random, sys, threading, time
place, files, size, seconds, threads, form = sys.argv[1], *map(float, sys.argv[2:6]), sys.argv[6]
files, size, threads = int(files), int(size), int(threads)
data, numbers = os.urandom(size), itertools.count()

def read(number):
    with open(f"{place}/{number}", "rb", buffering=0) as file:
        if len(file.read(size + 1)) != size:
            raise OSError(f"{number} is short")

def stat(number):
    os.stat(f"{place}/{number}")

def save(_number):
    name = f"{place}/saved/{os.getpid()}-{next(numbers)}"
    handle = os.open(name + (".tmp" if form == "rename" else ""), os.O_CREAT | os.O_EXCL | os.O_WRONLY)
    os.write(handle, data)
    if form == "rename":
        os.rename(name + ".tmp", name)
    os.fsync(handle)
    os.close(handle)

def rate(work, each, until):
    done, errors = [0] * threads, []
    def some(thread):
        try:
            for number in each(thread):
                if time.monotonic() > until:
                    break
                work(number)
                done[thread] += 1
        except OSError as error:
            errors.append(error)
    started = time.monotonic()
    all_ = [threading.Thread(target=some, args=(thread,)) for thread in range(threads)]
    for one in all_: one.start()
    for one in all_: one.join()
    if errors:
        raise errors[0]
    return sum(done) / (time.monotonic() - started)

def once(thread):
    return range(thread, files, threads)

def again(thread):
    dice = random.Random(thread)
    while True:
        yield dice.randrange(files)

found = {"cold": rate(read, once, time.monotonic() + 600)}
found["hot"] = rate(read, again, time.monotonic() + seconds)
read_until = time.monotonic()
if form != "none":
    found["save"] = rate(save, again, time.monotonic() + seconds)
    for name in os.listdir(place + "/saved"):
        os.unlink(f"{place}/saved/{name}")
# The kernel keeps attributes for a second with the kit's mount; before, only it would be asked.
time.sleep(max(0, read_until + 1.1 - time.monotonic()))
found["stat"] = rate(stat, once, time.monotonic() + 600)
print(json.dumps(found))
"""


@dataclass(frozen=True)
class Trial:
    """One thing that is different."""

    what: str
    options: dict[str, str] = field(default_factory=dict)  # of the volume; empty: reset
    mount: dict[str, str] = field(default_factory=dict)
    restart: bool = False  # bricks take it at their start only
    form: str = "direct"  # how a file is saved; none: it is not
    ciphers: str = ""  # what the client offers for TLS 1.3


TRIALS: Final = {
    "quick-read": Trial("performance.quick-read off", {"performance.quick-read": "off"}),
    "open-behind": Trial("performance.open-behind off", {"performance.open-behind": "off"}),
    "stat-prefetch": Trial("performance.stat-prefetch (md-cache) off", {"performance.stat-prefetch": "off"}),
    "md-cache": Trial(
        "md-cache 600 s with invalidation on; not safe on these releases",
        {
            "features.cache-invalidation": "on",
            "features.cache-invalidation-timeout": "600",
            "performance.cache-invalidation": "on",
            "performance.md-cache-timeout": "600",
        },
    ),
    "write-behind": Trial("performance.write-behind off", {"performance.write-behind": "off"}),
    "flush-behind": Trial("performance.flush-behind on", {"performance.flush-behind": "on"}),
    "io-cache": Trial("performance.io-cache on", {"performance.io-cache": "on"}),
    "read-ahead": Trial("performance.read-ahead on", {"performance.read-ahead": "on"}),
    "client-event-threads": Trial("client.event-threads 4", {"client.event-threads": "4"}),
    "server-event-threads": Trial("server.event-threads 4", {"server.event-threads": "4"}),
    "client-io-threads": Trial("performance.client-io-threads on", {"performance.client-io-threads": "on"}),
    "io-threads": Trial("performance.io-thread-count 32", {"performance.io-thread-count": "32"}),
    "durability": Trial("cluster.ensure-durability off; not safe", {"cluster.ensure-durability": "off"}),
    "reader-threads": Trial("mount reader-thread-count=4", mount={"reader-thread-count": "4"}),
    "read-only": Trial(
        "mount ro, attribute-timeout=30, entry-timeout=30",
        mount={"ro": "", "attribute-timeout": "30", "entry-timeout": "30"},
        form="none",
    ),
    "ctime": Trial("features.ctime on; not safe", {"features.ctime": "on"}),
    # Not ssl.cipher-list: GlusterFS speaks TLS 1.3, for which OpenSSL does not look at it.
    "tls-aes-128": Trial("TLS with AES-128 instead of AES-256", ciphers="TLS_AES_128_GCM_SHA256"),
    "tls-chacha": Trial("TLS with ChaCha20 instead of AES-256", ciphers="TLS_CHACHA20_POLY1305_SHA256"),
    "tls": Trial("no TLS on the data; not safe", {"client.ssl": "off", "server.ssl": "off"}, restart=True),
    "rename": Trial("save as temporary file, rename, fsync", form="rename"),
}
# What is measured without --option and --all: what a site could choose.
USUAL: Final = (
    "quick-read", "stat-prefetch", "flush-behind", "client-event-threads", "client-io-threads", "reader-threads",
    "read-only", "rename",
)  # fmt: skip
# Asked with the variable: by Python, which every node has; OpenSSL's own command may be missing.
OFFERED: Final = """
import ssl
found = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT).get_ciphers()
print(":".join(one["name"] for one in found if one["protocol"] == "TLSv1.3"))
"""
OPENSSL: Final = "/run/tribrick-bench-openssl.cnf"
CIPHERS: Final = """\
openssl_conf = init
[init]
ssl_conf = ssl
[ssl]
system_default = all
[all]
Ciphersuites = {ciphers}
"""


def arguments(parser: argparse.ArgumentParser) -> None:
    """Add the part's options."""
    which = parser.add_mutually_exclusive_group()
    which.add_argument(
        "--option", action="append", choices=list(TRIALS), metavar="NAME",
        help=f"only this one; may be repeated: {', '.join(TRIALS)} (default: {', '.join(USUAL)})",
    )  # fmt: skip
    which.add_argument("--all", action="store_true", help="all of them")
    parser.add_argument("--blocks", type=positive, default=BLOCKS, metavar="N", help=f"turns (default: {BLOCKS})")


def mount_options(changed: dict[str, str]) -> str:
    """Return the kit's mount options with some changed."""
    return ",".join(f"{name}={value}" if value else name for name, value in {**MOUNT, **changed}.items())


@contextlib.contextmanager
def different(volume: Scratch, trial: Trial) -> Iterator[None]:
    """Let the volume's options of a trial hold for a while."""

    def put(values: dict[str, str]) -> None:
        volume.unmount()  # what is mounted would follow each change
        if trial.restart:
            volume.stop()
        volume.set(values)
        if trial.restart:
            volume.start()

    if not trial.options:
        yield
        return
    before = {name: volume.option(name) for name in trial.options}
    put(trial.options)
    try:
        yield
    finally:
        put(before)


def offered(lab: Lab, ciphers: str) -> str:
    """Let OpenSSL offer these ciphers only; return the variable that a process must have for it."""
    variable = f"OPENSSL_CONF={OPENSSL}"
    script = f"cat >{OPENSSL} <<'END'\n{CIPHERS.format(ciphers=ciphers)}END\n{variable} python3 -c '{OFFERED}'"
    if (said := inside(lab, NODE, script).strip()) != ciphers:
        raise KitError(f"OpenSSL on {NODE} was to offer {ciphers}, and offers {said}.")
    return variable


def check_environment(volume: Scratch, variable: str) -> None:
    """Refuse to measure a client that does not have the variable: it would be the kit's own way again."""
    script = f"""
for one in $(pgrep -x glusterfs); do
    tr '\\0' ' ' </proc/$one/cmdline | grep -q ' {volume.mount} $' || continue
    tr '\\0' '\\n' </proc/$one/environ | grep -x '{variable}'
done
:
"""
    if set(inside(volume.lab, NODE, script).split()) != {variable}:  # also of a client of before that still ends
        raise KitError(f"The client of {volume.mount} does not have {variable}.")


def work(volume: Scratch, mount: dict[str, str], form: str, ciphers: str = "") -> dict[str, float]:
    """Mount it and work; return what was done a second."""
    variable = offered(volume.lab, ciphers) if ciphers else ""
    volume.remount(mount_options(mount), variable)
    if variable:
        check_environment(volume, variable)
    words = f"{volume.mount} {FILES} {SIZE} {SECONDS} {THREADS} {form}"
    found: dict[str, float] = json.loads(
        inside(volume.lab, NODE, f"python3 - {words} <<'END'\n{WORK}\nEND", deadline=700)
    )
    return found


def compare(volume: Scratch, name: str, blocks: int, say: Say) -> dict[str, dict[str, list[list[float]]]]:
    """Measure the kit's way and the other in turns; return rates by way, kind of work and block."""
    trial = TRIALS[name]
    # What is not saved with the other way is not saved with the kit's either: the same work before each measurement.
    usual = "none" if trial.form == "none" else "direct"
    rates: dict[str, dict[str, list[list[float]]]] = {"kit": {}, "other": {}}
    for block in range(blocks):
        for way in ("kit", "other") if block % 2 == 0 else ("other", "kit"):
            if way == "kit":
                found = work(volume, {}, usual)
            else:
                with different(volume, trial):
                    found = work(volume, trial.mount, trial.form, trial.ciphers)
            for kind, rate in found.items():
                rates[way].setdefault(kind, []).append([rate])
    said = ", ".join(f"{kind} {told(median_ratio(rates['other'][kind], rates['kit'][kind]))}" for kind in rates["kit"])
    say(f"{trial.what}: {said}")
    return rates


def run(lab: Lab, options: argparse.Namespace, say: Say) -> Figures:
    """Measure."""
    volume = Scratch(lab)
    version = inside(lab, NODE, "gluster --version").split()[1]
    figures: Figures = {"glusterfs": version, "blocks": options.blocks}
    kit: dict[str, list[float]] = {kind: [] for kind in WORKS}
    with volume.there():
        volume.remount(mount_options({}))
        say(f"{FILES} files are written to a volume of its own")
        inside(lab, NODE, f"python3 - {volume.mount} {FILES} {SIZE} <<'END'\n{FILL}\nEND", deadline=300)
        work(volume, {}, "direct")  # warm-up
        try:
            for name in options.option or (TRIALS if options.all else USUAL):
                rates = compare(volume, name, options.blocks, say)
                figures |= evaluate(name, rates)
                for kind, found in rates["kit"].items():
                    kit[kind] += [rate for block in found for rate in block]
        finally:
            inside(lab, NODE, f"rm -f {OPENSSL}")
    # The same self-heal daemons look after the lab's own volume: they must have come through this.
    wait_for(Quiet(), "the lab's own volume to be whole", Volume(lab).unclean, deadline=60)
    return figures | {f"kit_{kind}_per_second": round(median(found), 1) for kind, found in kit.items() if found}


def evaluate(name: str, rates: dict[str, dict[str, list[list[float]]]]) -> Figures:
    """Return the ratios of one trial."""
    figures: Figures = {}
    for kind, theirs in rates["other"].items():
        figures |= median_ratio(theirs, rates["kit"][kind]).flat(f"{_key(name)}_{kind}")
    return figures


def _key(name: str) -> str:
    return name.replace("-", "_")


def _measured(figures: Figures) -> list[str]:
    return [name for name in TRIALS if f"{_key(name)}_cold" in figures]


def lines(figures: Figures) -> list[str]:
    """Return a table for people."""
    rates = ", ".join(
        f"{text} {figures[f'kit_{kind}_per_second']:g}"
        for kind, text in WORKS.items()
        if f"kit_{kind}_per_second" in figures
    )
    out = [f"GlusterFS {figures['glusterfs']}, Debian {figures['debian']}; the kit's own, a second: {rates}"]
    out.append(
        f"{'other value / the kit (spread over the blocks)':<64}" + "".join(f"{text:>19}" for text in WORKS.values())
    )
    for name in _measured(figures):
        cells = "".join(f"{told(ratio_of(figures, f'{_key(name)}_{kind}')):>19}" for kind in WORKS)
        out.append(f"{TRIALS[name].what:<64}{cells}")
    return out


def picture(figures: Figures) -> str:
    """Draw the ratios of first reads and of saves."""
    names = _measured(figures)
    series = [
        Series(WORKS[kind], [ratio_of(figures, f"{_key(name)}_{kind}") for name in names]) for kind in ("cold", "save")
    ]
    note = "done a second with the other value / with the kit's; a column each, in the order of the table"
    return picture_of_ratios("Options", note, [str(number) for number in range(1, len(names) + 1)], series)
