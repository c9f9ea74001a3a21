"""The purger: takes deleted files out of the cache of the web server in front, by the node's ledger.

A service beside nginx, without Django's settings, a database or a network::

    python -m tribrick.purge run        # what the unit does
    python -m tribrick.purge status     # how far it is, as JSON
    python -m tribrick.purge purge NAME...
    python -m tribrick.purge tell       # the same for a cache elsewhere, such as a CDN's

It is configured by environment variables:

=============================== =====================================================================
``TRIBRICK_PURGE_LEDGER``       the node's ``ledger.sqlite``; must be given, need not be there yet
``TRIBRICK_PURGE_CACHE``        directory of nginx's cache (``levels=1:2``); must be given
``TRIBRICK_PURGE_STATE``        directory in which it notes how far it is; must be given
``TRIBRICK_PURGE_RUN``          directory of the gate (``open``) and the status; must be given
``TRIBRICK_PURGE_DIRECTORIES``  directories below the root in which storages keep their files, with colons
                                between; the root itself by default
``TRIBRICK_PURGE_FILL``         seconds from a request's start until its file lies in the cache; 60
``TRIBRICK_PURGE_FRESH``        age of the ledger in seconds up to which nothing is missing in it; 10
``TRIBRICK_PURGE_GRACE``        seconds that a start waits for such a ledger; 15
``TRIBRICK_PURGE_COMMAND``      for ``tell``: command line of a shell that gets the paths of deleted files,
                                encoded, one a line, on standard input; not 0: it is called again later
=============================== =====================================================================

The order of a delete is tombstone, unlink, purge. A request that was begun before the unlink may put the
file into the cache after the purge, so each name is purged again, at last ``FILL`` seconds later. Only
then the change counts as done, and its number is noted, durably: after a kill or a power cut the purger
begins at the first change that is not done.

nginx keeps an answer in a file whose name is the MD5 of its key; a file that is gone is a miss. The key
is the path, decoded, and the piece: ``/media/photos/cat.jpgbytes=0-1048575``. What nginx is just filling
lies beside it under the same name and a number. It looks whether a file that it has open is still there once a
second, so the cache is opened that much later than all is purged.

nginx serves from the cache only while the file ``open`` is there. It is made when all changes of a ledger
that is up to date are purged. A node that was away is thereby kept from serving what was deleted meanwhile.
If the ledger cannot be brought up to date within ``GRACE`` seconds of a start, because the database is
away, the cache is opened all the same: what was cached before is served, and the status says so.

``tell`` does the same for a cache that only a program of its operator can empty. It keeps a place and a run
directory of its own, and begins with what is deleted after its first start. A command that fails ends it; when
it is started again it begins at the first name that was not taken twice, at the delete and ``FILL`` seconds later.
So the command hears each name twice or more often, and from every node.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import heapq
import json
import logging
import os
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from tribrick.ledger import Ledger, LedgerError

log = logging.getLogger("tribrick.purge")
PIECE: Final = 1024 * 1024
"""Bytes of a piece, the ``slice`` of nginx. A constant: with another one, what was cached before would not be found."""
PREFIX: Final = "/media/"
INTERVAL: Final = 0.5
SOON: Final = 3.0
"""Seconds after which a name is purged for the second time, before the last one at ``FILL``."""
_KINDS: Final = frozenset({"deleted", "purged"})
_TEMPORARY: Final = re.compile(r"\.[0-9]+")
_HEAD: Final = 8192
_KEY: Final = re.compile(rb"\nKEY: (.*)bytes=[0-9]+-[0-9]+\n")
_PAGE: Final = 1000
_BATCH: Final = 100
_PATIENCE: Final = 60.0
"""Seconds that the command of ``tell`` may take for a batch."""


class PurgeError(Exception):
    """The configuration cannot work."""


# The cache of nginx


def keys(path: str, size: int) -> Iterator[bytes]:
    """Yield the keys of all pieces of the file at *path*, which has *size* bytes."""
    plain = path.encode("utf-8", "surrogateescape")
    for start in range(0, max(size, 1), PIECE):
        yield plain + f"bytes={start}-{start + PIECE - 1}".encode()


class Cache:
    """A directory of nginx's cache, made with ``levels=1:2`` and ``use_temp_path=off``."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self._touched: set[Path] = set()

    def place(self, key: bytes) -> Path:
        """Return where the answer with this key lies."""
        name = hashlib.md5(key, usedforsecurity=False).hexdigest()
        return self.root / name[-1] / name[-3:-1] / name

    def drop(self, path: str, size: int) -> int:
        """Remove all pieces of a file, those that are just being filled too; return how many there were."""
        return sum(self._drop(self.place(key)) for key in keys(path, size))

    def _drop(self, place: Path) -> int:
        gone = 0
        try:
            beside = [name for name in os.listdir(place.parent) if name.startswith(place.name)]
        except (FileNotFoundError, NotADirectoryError):
            return 0
        for name in beside:
            if name == place.name or _TEMPORARY.fullmatch(name[len(place.name) :]):
                with contextlib.suppress(FileNotFoundError):
                    os.unlink(place.parent / name)
                    gone += 1
        if gone:
            self._touched.add(place.parent)
        return gone

    def sent(self) -> None:
        """Nothing more is to be done for what was dropped."""

    def settle(self) -> None:
        """Make what was removed durable: after a power cut it must not be back while its number is noted."""
        while self._touched:
            directory = self._touched.pop()
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY)
                try:
                    os.fsync(descriptor)
                finally:
                    os.close(descriptor)

    def drop_by_walk(self, paths: Iterable[str]) -> dict[str, int]:
        """Remove all pieces of files of which the size is not known, by reading the key in every file."""
        plain = {path.encode("utf-8", "surrogateescape"): path for path in paths}
        gone = dict.fromkeys(plain.values(), 0)
        for directory, _below, names in os.walk(self.root):
            for name in names:
                file = Path(directory, name)
                with contextlib.suppress(FileNotFoundError):
                    with file.open("rb") as stream:
                        found = _KEY.search(stream.read(_HEAD))
                    if found and found[1] in plain:
                        file.unlink()
                        self._touched.add(file.parent)
                        gone[plain[found[1]]] += 1
        self.settle()
        return gone


class Told(Cache):
    """A cache elsewhere, which a command empties."""

    def __init__(self, command: str) -> None:
        super().__init__(Path("elsewhere"))
        self.command = command
        self._paths: list[str] = []

    def drop(self, path: str, size: int) -> int:
        """Remember the path; :meth:`sent` tells the command."""
        del size  # its pieces are the other cache's own matter
        self._paths.append(quote(path.encode("utf-8", "surrogateescape")))
        return 1

    def sent(self) -> None:
        """Give the command what was dropped; raise :class:`PurgeError` if it does not take it."""
        while self._paths:
            batch, self._paths = self._paths[:_BATCH], self._paths[_BATCH:]
            text = "".join(f"{path}\n" for path in batch)
            try:
                done = subprocess.run(
                    ["/bin/sh", "-c", self.command],
                    input=text, text=True, capture_output=True, timeout=_PATIENCE, check=False,
                )  # fmt: skip
            except subprocess.TimeoutExpired:
                raise PurgeError(f"the purge command did not end within {_PATIENCE:.0f} s") from None
            if done.returncode != 0:
                said = " ".join((done.stderr or done.stdout).split())[-300:]
                raise PurgeError(f"the purge command ended with {done.returncode}: {said or 'it said nothing'}")


# The purger


@dataclass(frozen=True)
class Times:
    """Seconds; see the module. *held*: that nginx goes on with a file that was removed (``open_file_cache_valid``)."""

    fill: float = 60.0
    fresh: float = 10.0
    grace: float = 15.0
    held: float = 1.5


@dataclass(frozen=True)
class Place:
    """The last change that is done, and the ledger's chain there."""

    number: int
    chain: str


@dataclass(order=True)
class Due:
    """What is to be purged once more: when, up to which change, and what."""

    at: float
    number: int
    chain: str
    names: list[tuple[str, int]]
    last: bool


@dataclass(frozen=True)
class News:
    """What the ledger has after the place where we are: names with their sizes. *anew*: from the beginning."""

    place: Place
    names: list[tuple[str, int]]
    anew: bool = False


class Purger:
    """Follows the ledger, empties the cache of what was deleted, and opens the gate."""

    def __init__(
        self, ledger: Path, cache: Cache, state: Path, run: Path, directories: list[str], times: Times,
        *, only_new: bool = False,
    ) -> None:  # fmt: skip
        self.ledger, self.cache, self.times = ledger, cache, times
        self.directories = directories
        self._only_new = only_new  # at the very first start: begin with what comes from now on
        self.noted, self.gate, self.said = state / "purged.json", run / "open", run / "status.json"
        self._began = time.monotonic()
        self._due: list[Due] = []
        self._seen: Place | None = None  # purged once
        self._done = self._read_place()
        self._removed = 0
        self._caught_up: float | None = None  # when the gate could have been opened first
        self._trouble = ""

    def look(self) -> None:
        """Do what is due now: one pass. Close the cache if that is not possible."""
        age, news, trouble = None, None, ""
        running = time.monotonic() - self._began
        try:
            with Ledger(self.ledger) as ledger:
                age = ledger.age()  # before the look: what comes in between makes it younger, not older
                news = self._read(ledger)
        except (LedgerError, sqlite3.Error, OSError) as error:
            age, trouble = None, f"the ledger cannot be read: {' '.join(str(error).split())}"
        if trouble and trouble != self._trouble:
            log.warning("%s", trouble)
        self._trouble = trouble
        try:
            if news is not None:
                self._take(news)
            self._again()
        except BaseException:
            self.gate.unlink(missing_ok=True)
            raise
        self._decide(age, running)

    # What the ledger says.

    def _read(self, ledger: Ledger) -> News | None:
        before = self._seen or self._done
        if before is None and self._only_new and not self.noted.exists():
            return News(Place(*ledger.last()), [])
        if before is None or (before.number and ledger.chain(before.number) != before.chain):
            return self._everything(ledger)
        names, number = [], before.number
        for entry in ledger.changes(before.number):
            number = entry.number
            if entry.kind in _KINDS:
                known = ledger.get(entry.name)
                names.append((entry.name, max(entry.size, known.size if known else 0)))
        if number == before.number and self._seen is not None:
            return None
        return News(Place(number, ledger.chain(number) or ""), names)

    @staticmethod
    def _everything(ledger: Ledger) -> News:
        """Begin anew: nothing is known, or the ledger has another history."""
        place, names, after = Place(*ledger.last()), [], ""
        while page := ledger.files(after, _PAGE):
            names += [(known.name, known.size) for known in page if known.state != "stored"]
            after = page[-1].name
        return News(place, names, anew=True)

    def _take(self, news: News) -> None:
        if news.anew:
            log.warning("every deleted name of the ledger is purged: %d", len(news.names))
            self._due.clear()
            self._done = None
        self._drop(news.names)
        self._seen, now = news.place, time.monotonic()
        again = sorted({now + min(SOON, self.times.fill), now + self.times.fill}) if news.names else [now]
        for at in again:
            due = Due(at, news.place.number, news.place.chain, news.names, at == again[-1])
            heapq.heappush(self._due, due)

    def _again(self) -> None:
        now, ended = time.monotonic(), []
        while self._due and self._due[0].at <= now:
            due = heapq.heappop(self._due)
            self._drop(due.names)
            if due.last:
                ended.append(Place(due.number, due.chain))
        waiting = min((due.number for due in self._due if due.names), default=None)
        ended = [place for place in ended if waiting is None or place.number < waiting]
        if ended:
            self._note(max(ended, key=lambda place: place.number))

    def _drop(self, names: list[tuple[str, int]]) -> None:
        for name, size in names:
            for directory in self.directories:
                self._removed += self.cache.drop(f"{PREFIX}{directory}{name}", size)
        self.cache.sent()

    # How far it is.

    def _note(self, place: Place) -> None:
        """Note durably that nothing up to here waits for its last purge."""
        if place == self._done:
            return
        self.cache.settle()
        _write(self.noted, {"number": place.number, "chain": place.chain, **self._of()}, durable=True)
        self._done = place

    def _of(self) -> dict[str, Any]:
        return {"cache": str(self.cache.root), "directories": self.directories}

    def _read_place(self) -> Place | None:
        try:
            found = json.loads(self.noted.read_text())
            if {key: found[key] for key in self._of()} != self._of():
                return None  # it is about another cache, or was made without some directory
            return Place(int(found["number"]), str(found["chain"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            log.warning("%s cannot be read, so everything is purged again: %s", self.noted, error)
            return None

    # The gate.

    def _decide(self, age: float | None, running: float) -> None:
        # A ledger that was young when the node went down is not up to date: only one that was followed since.
        followed = age is not None and (self.gate.exists() or age < running)
        fresh = age is not None and age <= self.times.fresh and followed
        if fresh:
            self._open()
            state = "up to date"
        elif self.gate.exists() or time.monotonic() - self._began > self.times.grace:
            # Nobody can say what was deleted meanwhile. What was cached before is served.
            self._open()
            state = "the ledger is not followed: what was cached before is served"
        else:
            self._caught_up = None
            state = "waits for the ledger: nothing is served from the cache"
        _write(
            self.said,
            {
                "state": state,
                "current": fresh,
                "open": self.gate.exists(),
                "ledger_age": None if age is None else round(age, 1),
                "applied": self._seen.number if self._seen else None,
                "done": self._done.number if self._done else None,
                "waiting": sum(len(due.names) for due in self._due if due.last),
                "removed": self._removed,
                "trouble": self._trouble,
                "at": round(time.time(), 1),
            },
            durable=False,
        )

    def _open(self) -> None:
        now = time.monotonic()
        if self._caught_up is None:
            self._caught_up = now
        # Not from the last removal: with deletes without a pause it would never open.
        if not self.gate.exists() and now - self._caught_up >= self.times.held:
            self.gate.touch()
            log.warning("the cache is open")

    def run(self, stop: threading.Event) -> None:
        """Look again and again until *stop* is set."""
        while not stop.is_set():
            self.look()
            stop.wait(INTERVAL)


def _write(path: Path, content: dict[str, Any], *, durable: bool) -> None:
    new = path.with_name(f"{path.name}.new")
    with new.open("w") as stream:
        stream.write(json.dumps(content) + "\n")
        stream.flush()
        if durable:
            os.fsync(stream.fileno())
    os.replace(new, path)
    if durable:
        descriptor = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# Configuration


def _path(given: Mapping[str, str], key: str) -> Path:
    text = given.get(f"TRIBRICK_PURGE_{key}", "")
    if not os.path.isabs(text):
        raise PurgeError(f"TRIBRICK_PURGE_{key} must be given, as an absolute path, not {text!r}")
    return Path(text)


def _number(given: Mapping[str, str], key: str, default: float) -> float:
    text = given.get(f"TRIBRICK_PURGE_{key}") or str(default)
    if not re.fullmatch(r"[0-9]{1,9}(?:\.[0-9]{1,3})?", text) or not float(text):
        raise PurgeError(f"TRIBRICK_PURGE_{key}: {text!r} is not a number greater than zero")
    return float(text)


def _directories(given: Mapping[str, str]) -> list[str]:
    found = []
    for word in given.get("TRIBRICK_PURGE_DIRECTORIES", "").split(":"):
        parts = word.split("/") if word else []
        if any(not part or part.startswith(".") for part in parts):
            raise PurgeError(f"TRIBRICK_PURGE_DIRECTORIES: {word!r} is not a directory below the root")
        found.append(f"{word}/" if word else "")
    return found


def purger(environ: Mapping[str, str] | None = None, *, tell: bool = False) -> Purger:
    """Return the purger that the environment describes, or the one that is to *tell* a command.

    Raises :class:`PurgeError` if it cannot work.
    """
    given = os.environ if environ is None else environ
    times = Times(
        fill=_number(given, "FILL", Times.fill),
        fresh=_number(given, "FRESH", Times.fresh),
        grace=_number(given, "GRACE", Times.grace),
    )
    ledger, state, run = (_path(given, key) for key in ("LEDGER", "STATE", "RUN"))
    if tell:
        command = given.get("TRIBRICK_PURGE_COMMAND", "")
        if not command.strip():
            raise PurgeError("TRIBRICK_PURGE_COMMAND must be given")
        return Purger(ledger, Told(command), state, run, _directories(given), times, only_new=True)
    return Purger(ledger, Cache(_path(given, "CACHE")), state, run, _directories(given), times)


def _status(environ: Mapping[str, str]) -> int:
    try:
        said = json.loads((_path(environ, "RUN") / "status.json").read_text())
    except FileNotFoundError:
        print("error: the purger does not run: nothing is served from the cache", file=sys.stderr)
        return 2
    print(json.dumps(said))
    return 0 if said["current"] else 1


def main(arguments: list[str] | None = None) -> int:
    """Do what is asked; return the exit code."""
    parser = argparse.ArgumentParser(
        prog="python -m tribrick.purge",
        description="Take deleted files out of the web server's cache, by the ledger.",
        epilog=str(__doc__)[str(__doc__).index("It is configured") :],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser("run", help="follow the ledger until the process is ended")
    commands.add_parser("status", help="0: up to date, 1: the ledger is not followed, 2: the purger does not run")
    one = commands.add_parser("purge", help="remove names from the cache of this node now")
    one.add_argument("names", nargs="+", metavar="NAME", help="stored name, e.g. photos/a/3/cat.jpg")
    commands.add_parser("tell", help="follow the ledger, and give what was deleted to TRIBRICK_PURGE_COMMAND")
    options = parser.parse_args(arguments)
    logging.basicConfig(format="%(message)s", level=logging.WARNING)
    try:
        if options.command == "status":
            return _status(os.environ)
        if options.command == "purge":
            gone = Cache(_path(os.environ, "CACHE")).drop_by_walk(PREFIX + name for name in options.names)
            for path, number in gone.items():
                print(f"{path.removeprefix(PREFIX)}: {number} removed")
            return 0
        stop = threading.Event()
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda *_: stop.set())
        purger(tell=options.command == "tell").run(stop)
    except (PurgeError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
