"""The standby: serves a file from this node's own disks while the volume cannot.

A service without Django's settings and without a database, behind nginx, which asks it only because the
origin failed::

    python -m tribrick.standby --socket /run/tribrick/standby.sock

It is configured by environment variables:

================================== ==================================================================
``TRIBRICK_STANDBY_LEDGER``        the node's ``ledger.sqlite``; must be given, need not be there yet
``TRIBRICK_STANDBY_SPOOL``         optional: directory of the spool
``TRIBRICK_STANDBY_MIRROR``        optional: directory of the mirror
``TRIBRICK_STANDBY_BRICK``         optional: socket of the opener (:mod:`tribrick.opener`) of the brick
``TRIBRICK_STANDBY_KEYS``          optional: JSON file ``{key id: secret}``; without it nothing private
                                   is served
``TRIBRICK_STANDBY_PRIVATE``       top directories of private files; ``private`` by default
``TRIBRICK_STANDBY_UNCATALOGUED``  top directories whose files the catalog does not have, so that nobody
                                   can verify them; ``derived`` by default
``TRIBRICK_STANDBY_FRESH``         age of the ledger in seconds up to which it is believed that a name
                                   was never stored; 10 by default
``TRIBRICK_STANDBY_MAX_AGE``       age of the ledger in seconds up to which files are served; 3600
``TRIBRICK_STANDBY_DEADLINE``      seconds within which the first byte goes out, or 503; 4
``TRIBRICK_STANDBY_STALL``         seconds after which a disk that does not answer is left alone; 2
``TRIBRICK_STANDBY_REQUESTS``      requests at a time; 16
================================== ==================================================================

The sources are asked in the order spool, mirror, brick. None of them is believed: a copy is served when
its SHA-256 is that of the ledger. A brick in mid-heal has files of full size that are full of zeros, and
no mark on it says so.

A file is hashed as a whole before the first byte goes out, and piece by piece on the way: the hashes of
its pieces are kept, and each piece is compared once more when it is read to be sent. So no byte goes out
that was not part of a right file, whatever happens to the file between the two readings, and however
coarse the clock of the file system is. What a whole reading has found is kept by device, inode, both
times of change and size.

The path of a request is the file's name. Statuses, and why, are in docs/standby.md.
"""

from __future__ import annotations

import argparse
import calendar
import contextlib
import hashlib
import json
import logging
import os
import re
import secrets
import socket
import sqlite3
import stat
import sys
import threading
import time
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from concurrent.futures import TimeoutError as NotYet
from dataclasses import dataclass
from email.utils import formatdate, parsedate
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final, TypeVar
from wsgiref.simple_server import ServerHandler, WSGIRequestHandler

from tribrick import opener
from tribrick.errors import StorageUnavailable
from tribrick.hasher import Tree, listen, passed_socket
from tribrick.ledger import Known, Ledger, LedgerError
from tribrick.receiver import Answer, Environ, ReceiverError, Refused, StartResponse, _keys, _text, check_name
from tribrick.signature import EMPTY, SignatureError, verify
from tribrick.storage.guard import Guard

log = logging.getLogger("tribrick.standby")
PIECE: Final = 256 * 1024
"""Bytes that are hashed, compared and sent at a time. Smaller files need no second reading."""
STEP: Final = 4 * PIECE
VERIFYING: Final = 2
"""Whole readings at a time: they compete with what is being sent."""
WAITING: Final = 32
KEPT: Final = 8 * 1024 * 1024
"""Bytes of hashes of pieces that are kept: enough for 64 GiB of files."""
LARGEST: Final = KEPT // 2 // 32 * PIECE
"""Bytes of a file of which the hashes of the pieces take half of that: 32 GiB."""
SELDOM: Final = 60.0
"""Seconds for which the same sentence is not logged again."""
DOUBT: Final = 5.0
"""Seconds for which a copy that was found wrong is not read again, if nothing about it changes."""
RELOOK: Final = 1.0
"""Seconds of verifying after which the ledger is asked again whether the file is still stored."""
RETRY_AFTER: Final = 5
RANGES: Final = 16
"""Ranges of one request; a request for more gets the whole file, since each costs the reading of a piece."""
READY: Final = "/-/ready"
_OUTSTANDING: Final = 8
_IDLE: Final = 30.0
_ENTRY: Final = 512  # what an entry of the memory costs besides the hashes
_WORD: Final = re.compile(r"[A-Za-z0-9_@+=,-][A-Za-z0-9_@+=,.-]{0,99}")
T = TypeVar("T")
Key = tuple[int, int, int, int, int]


class StandbyError(Exception):
    """The configuration cannot work."""


class Wrong(Exception):
    """A copy does not have the bytes that the ledger knows."""


class NotReady(Exception):
    """A whole reading goes on, and has not ended within the deadline."""


# Sources


def _key(status: os.stat_result) -> Key:
    # The inode's own time of change too: a heal sets the other one back to that of the good copies.
    return status.st_dev, status.st_ino, status.st_mtime_ns, status.st_ctime_ns, status.st_size


class Source:
    """A place on this node with copies. A call on it that hangs is waited for *stall* seconds.

    *open_file* returns a descriptor of a name, *check* raises ``OSError`` when the place is not there.
    """

    def __init__(self, name: str, open_file: Callable[[str], int], check: Callable[[], object], stall: float) -> None:
        self.name, self.stall = name, stall
        self._open, self._check = open_file, check
        self._guard = Guard(f"the {name}", check, _OUTSTANDING)

    def call(self, work: Callable[[], T], late: Callable[[], object] | None = None) -> T:
        """Return what *work* returns, or raise ``StorageUnavailable`` when it takes too long."""
        return self._guard.call(lambda _call: work(), self.stall, late=late)

    def check(self) -> None:
        """Raise ``OSError`` when the place is not there, ``StorageUnavailable`` when it does not answer."""
        self.call(self._check)

    def open(self, name: str) -> Copy:
        """Open *name*; raise ``FileNotFoundError`` if it is not there, or another ``OSError``."""
        opened: list[int] = []

        def work() -> os.stat_result:
            opened.append(self._open(name))
            return os.fstat(opened[0])

        def late() -> None:
            while opened:
                os.close(opened.pop())

        try:
            status = self.call(work, late)
        except StorageUnavailable:  # "late" closes it
            raise
        except BaseException:
            late()
            raise
        copy = Copy(self, opened[0], status)
        if not stat.S_ISREG(status.st_mode):
            copy.close()
            raise FileNotFoundError(f"{name} is no file")
        return copy


class Copy:
    """An open file of a source. Close it."""

    def __init__(self, source: Source, descriptor: int, status: os.stat_result) -> None:
        self.source, self.status, self.key = source, status, _key(status)
        self._descriptor = descriptor

    def read(self, at: int, length: int) -> bytes:
        """Return *length* bytes from *at* on; fewer if the file has become shorter."""
        return self.source.call(lambda: _pread(self._descriptor, at, length))

    def changed(self) -> bool:
        """Whether anything about the file is not as it was when it was opened."""
        return _key(self.source.call(lambda: os.fstat(self._descriptor))) != self.key

    def again(self) -> Copy:
        """Return the same open file once more."""
        return Copy(self.source, os.dup(self._descriptor), self.status)

    def close(self) -> None:
        """Close it; more than once does no harm."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)


def _pread(descriptor: int, at: int, length: int) -> bytes:
    read = b""
    while len(read) < length and (more := os.pread(descriptor, length - len(read), at + len(read))):
        read = read + more if read else more
    return read


def directory(name: str, root: Path, stall: float) -> Source:
    """Return the source that is a directory."""
    tree = Tree(root)
    return Source(name, tree.open, tree.check, stall)


def brick(path: Path, stall: float) -> Source:
    """Return the source that is a brick, by the socket of its opener."""

    def open_file(name: str) -> int:
        descriptor = opener.ask(path, name, 2 * stall)  # longer than it is waited for, so that the guard sees it
        assert descriptor is not None  # noqa: S101  the name is not empty
        return descriptor

    return Source("brick", open_file, lambda: opener.ask(path, "", 2 * stall), stall)


# Verifying


class Memory:
    """What whole readings have found: the hashes of a copy's pieces, or why the copy is wrong."""

    def __init__(self, limit: int = KEPT) -> None:
        self._limit, self._used = limit, 0
        self._lock = threading.Lock()
        self._found: OrderedDict[tuple[Key, str], tuple[bytes | Wrong, float]] = OrderedDict()

    def get(self, key: Key, sha256: str) -> bytes | Wrong | None:
        """Return what is known, None if nothing is."""
        with self._lock:
            found = self._found.get((key, sha256))
            if found is None or found[1] < time.monotonic():
                return None
            self._found.move_to_end((key, sha256))
            return found[0]

    def put(self, key: Key, sha256: str, found: bytes | Wrong) -> None:
        """Note what was found; the longest unused goes when there is too much."""
        until = time.monotonic() + DOUBT if isinstance(found, Wrong) else float("inf")
        with self._lock:
            self._forget((key, sha256))
            self._found[key, sha256] = found, until
            self._used += self._cost(found)
            while self._used > self._limit:
                self._forget(next(iter(self._found)))

    def forget(self, key: Key, sha256: str) -> None:
        """Read this copy again as a whole next time."""
        with self._lock:
            self._forget((key, sha256))

    def _forget(self, entry: tuple[Key, str]) -> None:
        found = self._found.pop(entry, None)
        if found is not None:
            self._used -= self._cost(found[0])

    @staticmethod
    def _cost(found: bytes | Wrong) -> int:
        return _ENTRY + (len(found) if isinstance(found, bytes) else 0)


class Verifier:
    """Reads copies as a whole, a few at a time, each once however many ask for it."""

    def __init__(self) -> None:
        self.memory = Memory()
        self._workers = ThreadPoolExecutor(VERIFYING, thread_name_prefix="verify")
        self._lock = threading.Lock()
        self._running: dict[tuple[Key, str], Future[bytes]] = {}

    def pieces(self, copy: Copy, known: Known, until: float) -> bytes:
        """Return the SHA-256 of each piece of *copy*, one after the other, once it has the ledger's bytes.

        Raises ``Wrong`` if it does not, ``NotReady`` when that is not known at *until* (monotonic); the
        reading goes on then, and the next asker finds its result.
        """
        if copy.status.st_size != known.size:
            raise Wrong(f"it has {copy.status.st_size} bytes, not {known.size}")
        if known.size <= PIECE:  # one piece, whose hash is the ledger's
            if hashlib.sha256(copy.read(0, PIECE)).hexdigest() != known.sha256:
                raise Wrong("it has other bytes")
            return bytes.fromhex(known.sha256)
        if known.size > LARGEST:
            raise Wrong("it is larger than what is served")
        found = self.memory.get(copy.key, known.sha256)
        if isinstance(found, Wrong):
            raise Wrong(*found.args)
        return self._whole(copy, known, until) if found is None else found

    def _whole(self, copy: Copy, known: Known, until: float) -> bytes:
        subject = copy.key, known.sha256
        with self._lock:
            running = self._running.get(subject)
            if running is None:
                if len(self._running) >= WAITING:
                    raise NotReady(f"{WAITING} files are being verified")
                running = self._running[subject] = Future()
                self._workers.submit(self._run, running, copy.again(), known)
        try:
            return running.result(max(0.0, until - time.monotonic()))
        except NotYet as error:
            raise NotReady("the file is being verified") from error

    def _run(self, future: Future[bytes], copy: Copy, known: Known) -> None:
        found: bytes | BaseException
        try:
            found = _read_whole(copy, known)
        except Wrong as error:
            log.warning("the %s's copy of %s is not served: %s", copy.source.name, known.name, error)
            found = error
        except BaseException as error:  # noqa: BLE001  it belongs to the askers
            found = error
        copy.close()
        if isinstance(found, (bytes, Wrong)):
            self.memory.put(copy.key, known.sha256, found)
        with self._lock:
            del self._running[copy.key, known.sha256]
        if isinstance(found, bytes):
            future.set_result(found)
        else:
            future.set_exception(found)


def _read_whole(copy: Copy, known: Known) -> bytes:
    whole, pieces = hashlib.sha256(), bytearray()
    for at in range(0, known.size, STEP):
        read = memoryview(copy.read(at, min(STEP, known.size - at)))
        whole.update(read)
        for start in range(0, len(read), PIECE):
            pieces += hashlib.sha256(read[start : start + PIECE]).digest()
    if whole.hexdigest() != known.sha256:
        raise Wrong("it has other bytes")
    if copy.changed():
        raise Wrong("it was changed while it was read")
    return bytes(pieces)


# Answers


class Body:
    """What is sent: parts, each some text and a stretch ``(from, to)`` of *copy*, then *end*.

    The first piece is read and compared at once, which may raise ``Wrong``. When a later one is not as it
    was, the answer breaks off, so that nobody takes it for a whole one.
    """

    def __init__(
        self, copy: Copy, pieces: bytes, parts: Sequence[tuple[bytes, int, int]], end: bytes, wrong: Callable[[], None]
    ) -> None:
        self._copy, self._pieces, self._parts, self._end, self._wrong = copy, pieces, parts, end, wrong
        self._rest = self._read()
        self._first = next(self._rest, b"")

    @property
    def length(self) -> int:
        """Bytes of the whole answer."""
        return sum(len(head) + end - start for head, start, end in self._parts) + len(self._end)

    def __iter__(self) -> Iterator[bytes]:
        yield self._first
        try:
            yield from self._rest
        except (Wrong, OSError) as error:
            log.error("an answer from the %s was broken off: %s", self._copy.source.name, error)
            raise ConnectionAbortedError(str(error)) from error

    def _read(self) -> Iterator[bytes]:
        for head, start, end in self._parts:
            for number in range(start // PIECE, -(-end // PIECE)):
                at = number * PIECE
                piece = self._copy.read(at, min(PIECE, self._copy.status.st_size - at))
                if hashlib.sha256(piece).digest() != self._pieces[32 * number : 32 * number + 32]:
                    self._wrong()
                    raise Wrong("it was changed since it was verified")
                yield head + piece[max(0, start - at) : end - at]
                head = b""
        if self._end:
            yield self._end

    def close(self) -> None:
        """Called by the server in the end, whatever happened."""
        self._copy.close()


def _time(text: str) -> int | None:
    """Return an HTTP date in seconds, None if it is none."""
    parsed = parsedate(text)
    try:
        return None if parsed is None else calendar.timegm((*parsed[:6], 0, 1, 0))
    except (ValueError, OverflowError):
        return None


def _names(header: str, etag: str, *, weak: bool) -> bool:
    """Whether a list of entity tags has *etag*."""
    tags = re.findall(r'(W/)?("[^"]*")', header)
    return header.strip() == "*" or any(tag == etag and (weak or not mark) for mark, tag in tags)


def _conditions(environ: Environ, etag: str, modified: int) -> HTTPStatus | None:
    """Return 304 or 412 if the request's conditions say so. As nginx has it: a date must be the very one."""
    since, match = environ.get("HTTP_IF_UNMODIFIED_SINCE"), environ.get("HTTP_IF_MATCH")
    if since is not None and ((at := _time(since)) is None or at < modified):
        return HTTPStatus.PRECONDITION_FAILED
    if match is not None and not _names(match, etag, weak=False):
        return HTTPStatus.PRECONDITION_FAILED
    since, match = environ.get("HTTP_IF_MODIFIED_SINCE"), environ.get("HTTP_IF_NONE_MATCH")
    if since is None and match is None:
        return None
    if since is not None and _time(since) != modified:
        return None
    if match is not None and not _names(match, etag, weak=True):
        return None
    return HTTPStatus.NOT_MODIFIED


_RANGE: Final = re.compile(r" *(?:([0-9]{1,18}) *- *([0-9]{0,18})|-([0-9]{1,18})) *")


def _ranges(environ: Environ, etag: str, modified: int, size: int) -> list[tuple[int, int]] | None:
    """Return the stretches that are asked for, None for the whole file; raise ``Refused`` (416) if there are none.

    As nginx has it: all stretches together larger than the file are the whole file.
    """
    header, condition = str(environ.get("HTTP_RANGE", "")), environ.get("HTTP_IF_RANGE")
    if header[:6].lower() != "bytes=" or len(header) < 7:
        return None
    if condition is not None and (condition != etag if condition.endswith('"') else _time(condition) != modified):
        return None
    found: list[tuple[int, int]] = []
    none = Refused(
        HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE, "there are no such bytes", **{"Content-Range": f"bytes */{size}"}
    )
    for text in header[6:].split(","):
        match = _RANGE.fullmatch(text)
        if match is None:
            raise none
        if match[3]:
            start, end = max(0, size - int(match[3])), size
            end = max(end, start)
        else:
            start = int(match[1])
            end = min(int(match[2]) + 1, size) if match[2] else size
        if start < end:
            found.append((start, end))
        elif start == 0:
            return None
    if not found:
        raise none
    return None if len(found) > RANGES or sum(end - start for start, end in found) > size else found


def _unavailable(why: str) -> Refused:
    return Refused(HTTPStatus.SERVICE_UNAVAILABLE, why, **{"Retry-After": str(RETRY_AFTER)})


def _refusal(refused: Refused) -> Answer:
    return _text(refused.status, refused.text, {"Cache-Control": "no-store", **refused.headers})


# The application


@dataclass(frozen=True)
class Rules:
    """What is served, and how long anything is waited for or believed. Ages and times in seconds."""

    private: frozenset[str] = frozenset({"private"})
    uncatalogued: frozenset[str] = frozenset({"derived"})
    fresh: float = 10.0
    max_age: float = 3600.0
    deadline: float = 4.0
    stall: float = 2.0


class Standby:
    """The WSGI application. *sources* are asked in their order; see the module for the rest."""

    def __init__(
        self,
        ledger: str | os.PathLike[str],
        sources: Sequence[Source],
        *,
        keys: Mapping[str, str] | None = None,
        rules: Rules | None = None,
    ) -> None:
        self.ledger, self.sources, self.keys, self.rules = Path(ledger), list(sources), keys, rules or Rules()
        self.verifier = Verifier()
        self._ledger_guard = Guard("the ledger", lambda: os.stat(self.ledger), _OUTSTANDING)

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        head = environ["REQUEST_METHOD"] == "HEAD"
        try:
            answer = self._answer(environ, head=head)
        except Refused as refused:
            answer = _refusal(refused)
        except OSError as error:
            log.error("%s %r failed: %s", environ["REQUEST_METHOD"], environ.get("PATH_INFO"), error)
            answer = _refusal(_unavailable("the request could not be carried out"))
        start_response(f"{answer.status.value} {answer.status.phrase}", list(answer.headers.items()))
        return () if head else answer.body

    def _answer(self, environ: Environ, *, head: bool) -> Answer:
        try:
            path = str(environ.get("PATH_INFO", "")).encode("latin-1").decode()
        except UnicodeError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, "the path is not UTF-8") from error
        if environ["REQUEST_METHOD"] not in ("GET", "HEAD"):
            raise Refused(HTTPStatus.METHOD_NOT_ALLOWED, "there is GET and HEAD", Allow="GET, HEAD")
        if path == READY:
            return self._ready()
        name = check_name(path)
        private = self._may(environ, name)
        answer = self._serve(environ, name, head=head)
        if private:  # whatever is in front must not keep it
            answer.headers["Cache-Control"] = "private"
        return answer

    def _may(self, environ: Environ, name: str) -> bool:
        """Whether the name is private; refuse it then if the site has not signed for it."""
        if name.split("/")[0] not in self.rules.private:
            return False
        try:
            # A right to GET is one to HEAD, and a cache asks with GET for either.
            signed = verify(environ.get("HTTP_AUTHORIZATION"), self.keys or {}, "GET", name)
        except SignatureError as error:
            raise Refused(HTTPStatus.UNAUTHORIZED, str(error), **{"WWW-Authenticate": "Tribrick"}) from error
        if signed != EMPTY:
            raise Refused(HTTPStatus.BAD_REQUEST, "GET has no body")
        return True

    # What the ledger says.

    def _look(self, name: str) -> tuple[Known | None, float, int]:
        """Return what the ledger knows of *name*, its age, and its last number."""

        def work() -> tuple[Known | None, float, int]:
            with Ledger(self.ledger) as ledger:
                age = ledger.age()  # before the look: what comes in between makes it younger, not older
                return ledger.get(name), age, ledger.last()[0]

        try:
            return self._ledger_guard.call(lambda _call: work(), self.rules.stall)
        except StorageUnavailable as error:
            raise _unavailable("the ledger does not answer") from error
        except (LedgerError, sqlite3.Error, OSError) as error:
            there = os.path.lexists(self.ledger)
            log.warning("the ledger cannot be read: %s", error)
            raise _unavailable("the ledger cannot be read" if there else "there is no ledger") from error

    def _alive(self, name: str, *, missing: bool = False) -> Known:
        """Return what the ledger knows of a stored file; refuse every other name.

        *missing*: the mount is well and has not got it, so what the ledger does not know either was never stored.
        """
        known, age, _last = self._look(name)
        if known is not None and known.state != "stored":
            raise Refused(HTTPStatus.NOT_FOUND, "the file was deleted", **{"X-Tribrick-State": "deleted"})
        if known is None and missing:
            raise Refused(HTTPStatus.NOT_FOUND, "neither the mount nor the ledger has it")
        if age > self.rules.max_age:
            raise _unavailable(f"the ledger is {age:.0f} s old, so the file may have been deleted")
        if known is not None:
            return known
        if age > self.rules.fresh:
            raise _unavailable(f"the ledger does not know the name, but it is {age:.0f} s old")
        if name.split("/")[0] in self.rules.uncatalogued:
            raise _unavailable("the catalog does not have such files, so none can be verified")
        for source in self.sources:
            with contextlib.suppress(OSError):
                source.open(name).close()
                raise _unavailable("the ledger does not know the name yet")
        raise Refused(HTTPStatus.NOT_FOUND, "there is no such file")

    # Where the bytes are.

    def _serve(self, environ: Environ, name: str, *, head: bool) -> Answer:
        """Answer from the first copy that is right."""
        began = time.monotonic()
        missing = environ.get("HTTP_X_TRIBRICK_MISSING") == "1"
        known, until, said = self._alive(name, missing=missing), began + self.rules.deadline, []
        for source in self.sources:
            if time.monotonic() > until:
                said.append("the others were not asked in time")
                break
            try:
                with contextlib.ExitStack() as stack:
                    copy = source.open(name)
                    stack.callback(copy.close)
                    pieces = self.verifier.pieces(copy, known, until)
                    if time.monotonic() - began > RELOOK:
                        self._alive(name)  # it may have been deleted meanwhile
                    answer = self._file(environ, copy, pieces, known)
                    if answer.body and not head:
                        stack.pop_all()  # the server closes it with the body
                    return answer
            except NotReady as error:
                raise _unavailable(str(error)) from error
            except (FileNotFoundError, NotADirectoryError):
                said.append(f"the {source.name} does not have it")
            except StorageUnavailable:
                said.append(f"the {source.name} does not answer")
            except OSError as error:
                log.warning("the %s's copy of %s cannot be read: %s", source.name, name, error)
                said.append(f"the {source.name} cannot be read")
            except Wrong as error:
                said.append(f"the {source.name}'s copy is not right: {error}")
        raise _unavailable(f"the file is stored, but not to be had here: {'; '.join(said) or 'there is no source'}")

    def _file(self, environ: Environ, copy: Copy, pieces: bytes, known: Known) -> Answer:
        size, modified = copy.status.st_size, copy.status.st_mtime_ns // 10**9
        etag = f'"{modified:x}-{size:x}"'
        headers = {"Last-Modified": formatdate(modified, usegmt=True), "ETag": etag}
        safe = {"Content-Type": "application/octet-stream", "X-Content-Type-Options": "nosniff"}
        condition = _conditions(environ, etag, modified)
        if condition == HTTPStatus.NOT_MODIFIED:
            return Answer(condition, headers)
        if condition is not None:
            raise Refused(condition, "the file is not the one that was meant")
        ranges = _ranges(environ, etag, modified, size)
        end, status = b"", HTTPStatus.OK if ranges is None else HTTPStatus.PARTIAL_CONTENT
        parts = [(b"", *one) for one in ranges or [(0, size)]]
        if ranges is None:
            headers["Accept-Ranges"] = "bytes"
        elif len(ranges) == 1:
            headers["Content-Range"] = f"bytes {ranges[0][0]}-{ranges[0][1] - 1}/{size}"
        else:
            boundary = secrets.token_hex(10)
            line = f"\r\n--{boundary}\r\nContent-Type: {safe['Content-Type']}\r\nContent-Range: bytes "
            parts = [(f"{line}{one[0]}-{one[1] - 1}/{size}\r\n\r\n".encode(), *one) for one in ranges]
            end = f"\r\n--{boundary}--\r\n".encode()
            safe["Content-Type"] = f"multipart/byteranges; boundary={boundary}"
        body = Body(copy, pieces, parts, end, lambda: self.verifier.memory.forget(copy.key, known.sha256))
        return Answer(status, {**headers, **safe, "Content-Length": str(body.length)}, body)

    # Health.

    def _ready(self) -> Answer:
        """Say which sources there are, and how old the ledger is."""
        said: dict[str, Any] = {"ready": False, "ledger": {}, "sources": {}}
        try:
            _known, age, last = self._look("-")
            said["ledger"] = {"age": round(age, 1), "last": last, "fresh": age <= self.rules.fresh}
            said["ready"] = age <= self.rules.max_age
        except Refused as refused:
            said["ledger"] = {"error": refused.text}
        for source in self.sources:
            try:
                source.check()
                said["sources"][source.name] = "ok"
            except StorageUnavailable:
                said["sources"][source.name] = "does not answer"
            except Exception as error:  # noqa: BLE001  whatever it is, it is the answer
                said["sources"][source.name] = str(error)
        said["ready"] = said["ready"] and "ok" in said["sources"].values()
        data = json.dumps(said).encode() + b"\n"
        headers = {"Content-Type": "application/json", "Content-Length": str(len(data)), "Cache-Control": "no-store"}
        return Answer(HTTPStatus.OK if said["ready"] else HTTPStatus.SERVICE_UNAVAILABLE, headers, [data])


# The server


class Server(opener.Bounded):
    """Serves *application* on a listening socket, to so many at a time; others get 503 at once."""

    base_environ: Final = {
        "SERVER_NAME": "localhost", "SERVER_PORT": "", "GATEWAY_INTERFACE": "CGI/1.1", "REMOTE_HOST": "",
        "CONTENT_LENGTH": "", "SCRIPT_NAME": "",
    }  # fmt: skip

    def __init__(self, application: Standby, listening: socket.socket, limit: int) -> None:
        self._application = application
        super().__init__(listening, _Handler, limit)

    def get_app(self) -> Standby:
        """Return the application, as the handler wants it."""
        return self._application

    def turn_away(self, request: socket.socket) -> None:
        """Answer 503, whatever the question is."""
        text = b"too many requests are being answered\n"
        head = f"HTTP/1.0 503 Service Unavailable\r\nRetry-After: {RETRY_AFTER}\r\nCache-Control: no-store\r\n"
        request.settimeout(0.1)
        with contextlib.suppress(OSError):
            request.recv(65536)  # a question that nobody has read would reset the connection under the answer
        with contextlib.suppress(OSError):
            request.sendall(f"{head}Content-Type: text/plain\r\nContent-Length: {len(text)}\r\n\r\n".encode() + text)


class _Handler(WSGIRequestHandler):
    timeout = _IDLE  # of the asker: for its question, and for taking each piece
    server: Any

    def log_message(self, *arguments: object) -> None:
        """Say nothing of requests."""

    def address_string(self) -> str:
        """Return nothing: a Unix socket has no address."""
        return ""

    def handle(self) -> None:
        """Answer one question, and close."""
        self.raw_requestline = self.rfile.readline(65537)
        if len(self.raw_requestline) > 65536:
            self.requestline = self.request_version = self.command = ""
            self.send_error(HTTPStatus.REQUEST_URI_TOO_LONG)
        elif self.parse_request():
            run = _Run(self.rfile, self.wfile, sys.stderr, self.get_environ(), multithread=True)  # type: ignore[arg-type]
            run.request_handler = self
            run.run(self.server.get_app())


class _Run(ServerHandler):
    status: str
    headers_sent: bool
    request_handler: _Handler

    def finish_content(self) -> None:
        """Send the head of an answer without a body; 304 has no length."""
        if self.status.startswith("304"):
            if not self.headers_sent:
                self.send_headers()
        else:
            super().finish_content()

    def log_exception(self, exc_info: Any) -> None:
        """Say in one line what went wrong."""
        log.warning("a request failed: %s", exc_info[1])


class Seldom(logging.Filter):
    """Keeps a sentence from being logged again and again: every visitor may lead to the same one."""

    def __init__(self) -> None:
        super().__init__()
        self._said: dict[str, float] = {}

    def filter(self, record: logging.LogRecord) -> bool:
        """Whether the record is new."""
        now, text = time.monotonic(), record.getMessage()
        if self._said.get(text, float("-inf")) > now - SELDOM:
            return False
        if len(self._said) >= 1000:
            self._said.clear()
        self._said[text] = now
        return True


# Configuration


def _number(given: Mapping[str, str], key: str, default: float) -> float:
    text = given.get(f"TRIBRICK_STANDBY_{key}") or str(default)
    if not re.fullmatch(r"[0-9]{1,9}(?:\.[0-9]{1,3})?", text) or not float(text):
        raise StandbyError(f"TRIBRICK_STANDBY_{key}: {text!r} is not a number greater than zero")
    return float(text)


def _words(given: Mapping[str, str], key: str, default: str) -> frozenset[str]:
    words = given.get(f"TRIBRICK_STANDBY_{key}", default).split()
    for word in words:
        if not _WORD.fullmatch(word):
            raise StandbyError(f"TRIBRICK_STANDBY_{key}: {word!r} is not the name of a top directory")
    return frozenset(words)


def application(environ: Mapping[str, str] | None = None) -> Standby:
    """Return the application that the environment describes; raise :class:`StandbyError` if it cannot work."""
    given = os.environ if environ is None else environ

    def path(key: str) -> Path | None:
        text = given.get(f"TRIBRICK_STANDBY_{key}")
        if text and not os.path.isabs(text):
            raise StandbyError(f"TRIBRICK_STANDBY_{key}: {text!r} is not an absolute path")
        return Path(text) if text else None

    ledger, keys, spool, mirror, socket_of_brick = map(path, ("LEDGER", "KEYS", "SPOOL", "MIRROR", "BRICK"))
    if ledger is None:
        raise StandbyError("TRIBRICK_STANDBY_LEDGER must be given")
    if not (spool or mirror or socket_of_brick):
        raise StandbyError("one of TRIBRICK_STANDBY_SPOOL, _MIRROR and _BRICK must be given")
    try:
        secrets_of_site = None if keys is None else _keys(keys, "TRIBRICK_STANDBY_KEYS")
    except ReceiverError as error:
        raise StandbyError(str(error)) from error
    rules = Rules(
        private=_words(given, "PRIVATE", "private"),
        uncatalogued=_words(given, "UNCATALOGUED", "derived"),
        fresh=_number(given, "FRESH", Rules.fresh),
        max_age=_number(given, "MAX_AGE", Rules.max_age),
        deadline=_number(given, "DEADLINE", Rules.deadline),
        stall=_number(given, "STALL", Rules.stall),
    )
    places = (("spool", spool), ("mirror", mirror))
    sources = [directory(name, root, rules.stall) for name, root in places if root is not None]
    sources += [brick(socket_of_brick, rules.stall)] if socket_of_brick else []
    return Standby(ledger, sources, keys=secrets_of_site, rules=rules)


def main(arguments: list[str] | None = None) -> int:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(
        prog="python -m tribrick.standby",
        description="Serve files from this node's spool, mirror and brick, once their SHA-256 is that of the ledger.",
        epilog=str(__doc__)[str(__doc__).index("It is configured") :],
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--socket", help="path of the Unix socket; not needed when systemd passes one")
    parser.add_argument("--group", help="group whose members may connect")
    options = parser.parse_args(arguments)
    handler = logging.StreamHandler()
    handler.addFilter(Seldom())
    logging.basicConfig(format="%(message)s", level=logging.WARNING, handlers=[handler])
    try:
        made, limit = application(), _number(os.environ, "REQUESTS", 16)
        listening = passed_socket()
        if listening is None:
            if not options.socket:
                parser.error("--socket must be given, because systemd passes none")
            listening = listen(options.socket, options.group)
    except (StandbyError, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with Server(made, listening, int(limit)) as server:
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
