"""The receiver: a media host that acknowledges a file only once it cannot be lost.

A WSGI application without Django's settings, behind nginx::

    gunicorn 'tribrick.receiver:application()'

It is configured by environment variables:

=============================== =====================================================================
``TRIBRICK_RECEIVER_ROOT``      directory of the files; must exist
``TRIBRICK_RECEIVER_STATE``     directory of its own data (``tombstones.sqlite``); must exist, not in ROOT
``TRIBRICK_RECEIVER_LEDGER``    optional: ``ledger.sqlite``, only read; what it knows deleted stays deleted
``TRIBRICK_RECEIVER_KEYS``      optional: JSON file ``{key id: secret}``; every request must then be signed
``TRIBRICK_RECEIVER_MAX_BYTES`` optional: largest body, 4 GiB by default
``TRIBRICK_RECEIVER_ACCEL``     optional: prefix; GET is then answered with ``X-Accel-Redirect``
``TRIBRICK_RECEIVER_LIMIT``     optional: bytes that ROOT may hold; a PUT beyond is 507. For a spool
``TRIBRICK_RECEIVER_LIST``      optional: ``1`` lets ``GET /-/list`` tell all names. For a spool
=============================== =====================================================================

The path of a request is the file's name. What each method does, and in what order, is in
docs/receiver.md. The order of a PUT: a temporary file in ``ROOT/.tribrick-incoming``, fsync, the
final name by link(2), which never overwrites, fsync of the file and of its directories, answer.
"""

from __future__ import annotations

import base64
import binascii
import contextlib
import errno
import fcntl
import hashlib
import json
import logging
import os
import re
import secrets
import sqlite3
import stat
import struct
import threading
import time
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from email.utils import formatdate
from http import HTTPStatus
from pathlib import Path
from typing import Any, Final
from urllib.parse import quote

from tribrick.ledger import Ledger, LedgerError
from tribrick.sentinel import HISTORY
from tribrick.signature import EMPTY, SignatureError, verify

log = logging.getLogger("tribrick.receiver")
CHUNK: Final = 256 * 1024
# A large body is flushed as it comes, so that the last fsync does not take long.
FLUSH: Final = 32 * 1024 * 1024
MAX_BYTES: Final = 4 * 1024**3
# What a PUT leaves free, so that a full disk can still write tombstones, without which nothing can be deleted.
RESERVE: Final = 64 * 1024 * 1024
INCOMING: Final = ".tribrick-incoming"
ABANDONED: Final = 24 * 3600.0
READY: Final = "/-/ready"
LIST: Final = "/-/list"
FORMAT: Final = 1
_NAME_BYTES: Final = 1024
_PART_BYTES: Final = 255
_DIGEST: Final = re.compile(r"(?:^|,)\s*sha-256=:([A-Za-z0-9+/]{43}=):")
_HEX: Final = re.compile(r"[0-9a-f]{64}")
_NUMBER: Final = re.compile(r"[0-9]{1,18}")
_RANGE: Final = re.compile(r"bytes=([0-9]{0,18})-([0-9]{0,18})")
_FULL: Final = frozenset({errno.ENOSPC, errno.EDQUOT})
# Directories whose entry in their parent is known to be durable are remembered, up to so many.
_REMEMBERED: Final = 100_000

Environ = Mapping[str, Any]
StartResponse = Callable[[str, list[tuple[str, str]]], Any]


class ReceiverError(Exception):
    """The configuration cannot work."""


class Refused(Exception):
    """The request is answered with *status* and one sentence."""

    def __init__(self, status: HTTPStatus, text: str, **headers: str) -> None:
        super().__init__(text)
        self.status, self.text, self.headers = status, text, headers


@dataclass
class Answer:
    """Status, headers and body of an answer."""

    status: HTTPStatus
    headers: dict[str, str] = field(default_factory=dict)
    body: Iterable[bytes] = ()


def _text(status: HTTPStatus, text: str, headers: Mapping[str, str] | None = None) -> Answer:
    data = f"{text}\n".encode()
    standard = {"Content-Type": "text/plain; charset=utf-8", "Content-Length": str(len(data))}
    return Answer(status, {**standard, **(headers or {})}, [data])


def check_name(path: str) -> str:
    """Return the name that a decoded path stands for; raise :class:`Refused` for one that nothing may have.

    No part may be empty or begin with a dot, so there is neither a way out of the root nor to the
    receiver's own files.
    """
    name = path.removeprefix("/")
    parts = name.split("/")
    if (
        any(not part or part.startswith(".") or len(part.encode()) > _PART_BYTES for part in parts)
        or parts[0] == "-"
        or len(name.encode()) > _NAME_BYTES
        or any(unicodedata.category(character) in ("Cc", "Cs") for character in name)
    ):
        raise Refused(HTTPStatus.BAD_REQUEST, "the path is not the name of a stored file")
    return name


class Usage:
    """How many bytes lie in a directory.

    They are counted at most every 10 seconds, and seldom enough that counting takes a twentieth of the
    time at most; what this process adds meanwhile is added, what other processes add is seen with the
    next count. So a limit that goes by it is kept within what arrives in that time.
    """

    EVERY = 10.0
    RATIO: Final = 20.0

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = root
        self._lock = threading.Lock()
        self._bytes, self._until = 0, float("-inf")

    def used(self) -> int:
        """Return the bytes of all files."""
        with self._lock:
            began = time.monotonic()
            if began >= self._until:
                self._bytes = sum(size for _name, size in _files(self._root, hidden=True))
                took = time.monotonic() - began
                self._until = began + max(self.EVERY, took * self.RATIO)
            return self._bytes

    def add(self, size: int) -> None:
        """Count a file that was just added."""
        with self._lock:
            self._bytes += size


def _files(root: str | os.PathLike[str], *, hidden: bool = False) -> Iterator[tuple[str, int]]:
    """Yield name and size of each file; not what lies in dot directories of the root, unless *hidden*."""
    waiting = [""]
    while waiting:
        directory = waiting.pop()
        with contextlib.suppress(FileNotFoundError), os.scandir(os.path.join(root, directory)) as entries:
            for entry in entries:
                if not hidden and entry.name.startswith("."):
                    continue
                name = f"{directory}/{entry.name}" if directory else entry.name
                if entry.is_dir(follow_symlinks=False):
                    waiting.append(name)
                elif entry.is_file(follow_symlinks=False):
                    with contextlib.suppress(FileNotFoundError):
                        yield name, entry.stat(follow_symlinks=False).st_size


# Locks and tombstones


class _Locks:
    """A lock for each name, among all threads and processes: a byte of one file, by the name's hash.

    The lock belongs to the open file, so a killed process leaves none behind.
    """

    START: Final = 1 << 60  # the byte that is locked while a worker starts

    def __init__(self, path: Path) -> None:
        self._path = path

    @contextlib.contextmanager
    def held(self, name: str | None) -> Iterator[None]:
        at = self.START if name is None else int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")
        descriptor = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLKW, struct.pack("hhqqi0q", fcntl.F_WRLCK, os.SEEK_SET, at, 1, 0))
            yield
        finally:
            os.close(descriptor)


class Tombstones:
    """The names that were deleted here, in a SQLite file; :meth:`add` returns once they are durable."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._local = threading.local()
        database = self._database()
        database.executescript(
            "BEGIN IMMEDIATE; CREATE TABLE IF NOT EXISTS tombstones"
            " (name TEXT PRIMARY KEY, at REAL NOT NULL, swept INTEGER NOT NULL DEFAULT 0) WITHOUT ROWID; COMMIT;"
        )
        version = database.execute("PRAGMA user_version").fetchone()[0]
        if version not in (0, FORMAT):
            raise ReceiverError(f"{path} has format {version}, not {FORMAT}")
        if version != FORMAT:
            database.execute(f"PRAGMA user_version = {FORMAT}")
        _sync_directory(path.parent)

    def _database(self) -> sqlite3.Connection:
        # A connection belongs to one thread, and must not be taken through a fork.
        if getattr(self._local, "process", None) != os.getpid():
            database = sqlite3.connect(self.path, timeout=10, isolation_level=None)
            # With a write-ahead log FULL is durable at the commit; with a rollback journal it is not.
            mode = database.execute("PRAGMA journal_mode = WAL").fetchone()[0]
            if mode != "wal":
                raise ReceiverError(f"{self.path} cannot have a write-ahead log; it needs a local disk")
            database.execute("PRAGMA synchronous = FULL")
            self._local.database, self._local.process = database, os.getpid()
        found: sqlite3.Connection = self._local.database
        return found

    def add(self, name: str) -> None:
        """Note that *name* was deleted."""
        self._database().execute("INSERT OR IGNORE INTO tombstones (name, at) VALUES (?, ?)", (name, time.time()))

    def has(self, name: str) -> bool:
        """Whether *name* was deleted here."""
        return bool(self._database().execute("SELECT 1 FROM tombstones WHERE name = ?", (name,)).fetchone())

    def unswept(self) -> list[str]:
        """Return the names of which it is not known that their bytes are gone."""
        return [row[0] for row in self._database().execute("SELECT name FROM tombstones WHERE swept = 0")]

    def set_swept(self, names: Iterable[str]) -> None:
        """Note that the bytes of *names* are gone for good."""
        database = self._database()
        database.execute("BEGIN IMMEDIATE")
        try:
            database.executemany("UPDATE tombstones SET swept = 1 WHERE name = ?", [(name,) for name in names])
        except BaseException:
            database.execute("ROLLBACK")
            raise
        database.execute("COMMIT")


def _sync_directory(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# The application


class Receiver:
    """The WSGI application. See the module for what the arguments are."""

    def __init__(
        self,
        root: str | os.PathLike[str],
        state: str | os.PathLike[str],
        *,
        ledger: str | os.PathLike[str] | None = None,
        keys: Mapping[str, str] | None = None,
        max_bytes: int = MAX_BYTES,
        accel: str | None = None,
        reserve: int = RESERVE,
        limit: int | None = None,
        lists: bool = False,
    ) -> None:
        self.root, self.state = Path(root).absolute(), Path(state).absolute()
        for what, path in (("ROOT", self.root), ("STATE", self.state)):
            if not path.is_dir():
                raise ReceiverError(f"TRIBRICK_RECEIVER_{what}: {path} is not a directory")
            if not os.access(path, os.W_OK | os.X_OK):
                raise ReceiverError(f"TRIBRICK_RECEIVER_{what}: {path} may not be written to")
        if self.state.resolve().is_relative_to(self.root.resolve()):
            raise ReceiverError("TRIBRICK_RECEIVER_STATE must not lie in TRIBRICK_RECEIVER_ROOT, which is served")
        self.ledger = None if ledger is None else Path(ledger)
        self.keys, self.max_bytes, self.reserve = keys, max_bytes, reserve
        self.limit, self.lists, self.usage = limit, lists, Usage(self.root)
        self.accel = None if accel is None else f"/{accel.strip('/')}/"
        self._locks = _Locks(self.state / "locks")
        self._durable: set[tuple[str, int, int]] = set()
        with self._locks.held(None):
            self.tombstones = Tombstones(self.state / "tombstones.sqlite")
            self._sweep()

    def _sweep(self) -> None:
        """Remove what killed processes have left: old temporary files, and bytes under a tombstone."""
        incoming = self.root / INCOMING
        if not incoming.is_dir():
            incoming.mkdir()
            _sync_directory(self.root)
        with os.scandir(incoming) as entries:
            for entry in entries:
                with contextlib.suppress(FileNotFoundError):
                    if time.time() - entry.stat(follow_symlinks=False).st_mtime > ABANDONED:
                        os.unlink(entry.path)
        names = self.tombstones.unswept()
        for name in names:
            self._unlink(name)
        if names:
            self.tombstones.set_swept(names)

    # Requests.

    def __call__(self, environ: Environ, start_response: StartResponse) -> Iterable[bytes]:
        """Answer one request."""
        try:
            answer = self._answer(environ)
        except Refused as refused:
            answer = _text(refused.status, refused.text, refused.headers)
            self._drain(environ)
        except (OSError, sqlite3.Error, LedgerError) as error:
            full = getattr(error, "errno", None) in _FULL or "is full" in str(error)
            log.error("%s %r failed: %s", environ.get("REQUEST_METHOD"), environ.get("PATH_INFO"), error)
            status = HTTPStatus.INSUFFICIENT_STORAGE if full else HTTPStatus.SERVICE_UNAVAILABLE
            answer = _text(status, "the disk is full" if full else "the request could not be carried out")
            self._drain(environ)
        if environ["REQUEST_METHOD"] == "HEAD":
            answer.body = ()
        start_response(f"{answer.status.value} {answer.status.phrase}", list(answer.headers.items()))
        return answer.body

    def _drain(self, environ: Environ) -> None:
        """Read the rest of a body: nginx takes an answer before the end for a failure, and hides it with 502."""
        left = self._length(environ) or 0
        with contextlib.suppress(OSError):
            while left > 0 and (chunk := environ["wsgi.input"].read(min(left, CHUNK))):
                left -= len(chunk)

    @staticmethod
    def _length(environ: Environ) -> int | None:
        given = str(environ.get("CONTENT_LENGTH") or "")
        return int(given) if _NUMBER.fullmatch(given) else None

    def _answer(self, environ: Environ) -> Answer:
        method = environ["REQUEST_METHOD"]
        try:
            path = str(environ.get("PATH_INFO", "")).encode("latin-1").decode()
        except UnicodeError as error:
            raise Refused(HTTPStatus.BAD_REQUEST, "the path is not UTF-8") from error
        work = {"PUT": self._put, "GET": self._get, "HEAD": self._get, "DELETE": self._delete}.get(method)
        if work is None:
            raise Refused(
                HTTPStatus.METHOD_NOT_ALLOWED, "there is GET, HEAD, PUT, DELETE", Allow="GET, HEAD, PUT, DELETE"
            )
        if path == READY and work == self._get:
            return self._ready()
        if environ.get("QUERY_STRING"):
            raise Refused(HTTPStatus.BAD_REQUEST, "a file has no query")
        if path == LIST and work == self._get and self.lists:
            self._signed(environ, method, LIST.removeprefix("/"))
            return self._list()
        name = check_name(path)
        signed = self._signed(environ, method, name)
        if method != "PUT":
            if self._length(environ) or environ.get("HTTP_TRANSFER_ENCODING") or signed not in (None, EMPTY):
                raise Refused(HTTPStatus.BAD_REQUEST, f"{method} has no body")
            return work(environ, name, "")
        return work(environ, name, self._announced(environ, signed))

    def _signed(self, environ: Environ, method: str, name: str) -> str | None:
        if self.keys is None:
            return None
        try:
            return verify(environ.get("HTTP_AUTHORIZATION"), self.keys, method, name)
        except SignatureError as error:
            challenge = {"WWW-Authenticate": "Tribrick"}
            raise Refused(HTTPStatus.UNAUTHORIZED, str(error), **challenge) from error

    @staticmethod
    def _announced(environ: Environ, signed: str | None) -> str:
        """Return the SHA-256 that the body must have; all that is said of it must agree."""
        said = {signed} - {None}
        if (header := environ.get("HTTP_CONTENT_DIGEST")) is not None:
            match = _DIGEST.search(header)
            try:
                said.add(base64.b64decode(match[1], validate=True).hex() if match else None)
            except binascii.Error:
                said.add(None)
        if (header := environ.get("HTTP_X_CONTENT_SHA256")) is not None:
            said.add(header.lower() if _HEX.fullmatch(header.lower()) else None)
        if not said:
            raise Refused(
                HTTPStatus.BAD_REQUEST, "the body's SHA-256 must be given: Content-Digest or X-Content-SHA256"
            )
        digest = said.pop()
        if said or digest is None:
            raise Refused(HTTPStatus.BAD_REQUEST, "what is said of the body's SHA-256 is malformed or differs")
        return digest

    def _ready(self) -> Answer:
        if not os.access(self.root / INCOMING, os.W_OK | os.X_OK):
            raise Refused(
                HTTPStatus.SERVICE_UNAVAILABLE, "the directory of the files is not there or may not be written"
            )
        self.tombstones.has("-")
        self._known("-")
        return _text(HTTPStatus.OK, "ready")

    def _list(self) -> Answer:
        """Tell every name with its size, one JSON object a line."""
        lines = [json.dumps({"name": name, "size": size}).encode() + b"\n" for name, size in _files(self.root)]
        headers = {"Content-Type": "application/x-ndjson", "Content-Length": str(sum(map(len, lines)))}
        return Answer(HTTPStatus.OK, headers, lines)

    # What is deleted.

    def _known(self, name: str) -> tuple[str, str] | None:
        """Return state and SHA-256 of *name* in the ledger. One that is not there yet knows nothing."""
        if self.ledger is None or not self.ledger.exists():
            return None
        with Ledger(self.ledger) as ledger:
            known = ledger.get(name)
        return None if known is None else (known.state, known.sha256)

    def _refuse_deleted(self, name: str, digest: str | None = None) -> None:
        """Refuse a deleted name, and with *digest* one that the ledger knows with other bytes."""
        known = self._known(name)
        if self.tombstones.has(name) or (known is not None and known[0] != "stored"):
            raise Refused(HTTPStatus.GONE, "the name was deleted, and a deleted name never comes back")
        if digest is not None and known is not None and known[1] != digest:
            raise Refused(HTTPStatus.CONFLICT, "the ledger knows the name with other bytes")

    # GET and HEAD.

    def _get(self, environ: Environ, name: str, _digest: str) -> Answer:
        self._refuse_deleted(name)
        with contextlib.ExitStack() as stack:
            try:
                directory = self._directories(stack, name, create=False)[-1]
                descriptor = self._open(directory, name)
            except (FileNotFoundError, NotADirectoryError) as error:
                raise Refused(HTTPStatus.NOT_FOUND, "there is no such file") from error
            stack.callback(os.close, descriptor)
            status = os.fstat(descriptor)
            if self.accel is not None:
                return Answer(HTTPStatus.OK, {"X-Accel-Redirect": quote(self.accel + name)})
            first, last = 0, status.st_size - 1
            answer = Answer(HTTPStatus.OK)
            wanted = None if environ.get("HTTP_IF_RANGE") else environ.get("HTTP_RANGE")
            if wanted and (match := _RANGE.fullmatch(wanted.strip())) and (match[1] or match[2]):
                first, last = _range(match[1], match[2], status.st_size)
                answer.status = HTTPStatus.PARTIAL_CONTENT
                answer.headers["Content-Range"] = f"bytes {first}-{last}/{status.st_size}"
            answer.headers |= {
                "Content-Type": "application/octet-stream",
                "Content-Length": str(last + 1 - first),
                "Last-Modified": formatdate(status.st_mtime, usegmt=True),
                "Accept-Ranges": "bytes",
                "X-Content-Type-Options": "nosniff",
            }
            if environ["REQUEST_METHOD"] == "GET":
                answer.body = _Window(os.dup(descriptor), first, last + 1)
            return answer

    def _open(self, directory: int, name: str) -> int:
        """Open the regular file *name* for reading; anything else there is not found."""
        last = name.rpartition("/")[2]
        try:
            descriptor = os.open(last, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC, dir_fd=directory)
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENXIO):
                raise FileNotFoundError(errno.ENOENT, "not a regular file") from error
            raise
        if not stat.S_ISREG(os.fstat(descriptor).st_mode):
            os.close(descriptor)
            raise FileNotFoundError(errno.ENOENT, "not a regular file")
        return descriptor

    # PUT.

    def _put(self, environ: Environ, name: str, digest: str) -> Answer:
        length = self._length(environ)
        if length is None:
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "a body needs a Content-Length")
        if environ.get("HTTP_CONTENT_RANGE") or environ.get("HTTP_CONTENT_ENCODING"):
            raise Refused(HTTPStatus.BAD_REQUEST, "a file is sent whole and as it is")
        if length > self.max_bytes:
            raise Refused(HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a body may have {self.max_bytes} bytes")
        self._refuse_deleted(name)
        with contextlib.ExitStack() as stack:
            incoming = os.open(self.root / INCOMING, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
            stack.callback(os.close, incoming)
            free = os.fstatvfs(incoming)
            if free.f_bavail * free.f_frsize < length + self.reserve:
                raise Refused(HTTPStatus.INSUFFICIENT_STORAGE, "the disk is full")
            if self.limit is not None and self.usage.used() + length > self.limit:
                raise Refused(HTTPStatus.INSUFFICIENT_STORAGE, f"all files together may have {self.limit} bytes")
            temporary = f"{secrets.token_hex(16)}.part"
            # Nobody writes into a stored file: reading is for all, removing goes by the directory.
            flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
            descriptor = os.open(temporary, flags, 0o644, dir_fd=incoming)
            stack.callback(os.close, descriptor)
            stack.callback(_unlink_if_there, temporary, incoming)
            self._receive(environ["wsgi.input"], length, digest, descriptor)
            os.fsync(descriptor)
            return self._publish(stack, name, digest, (incoming, temporary, descriptor))

    @staticmethod
    def _receive(stream: Any, length: int, digest: str, descriptor: int) -> None:
        hasher, left, unflushed = hashlib.sha256(), length, 0
        while left:
            try:
                chunk = stream.read(min(left, CHUNK))
            except Exception as error:  # whatever the server raises when the client has gone
                raise Refused(HTTPStatus.BAD_REQUEST, "the body broke off") from error
            if not chunk:
                raise Refused(HTTPStatus.BAD_REQUEST, f"the body broke off {left} bytes before its end")
            hasher.update(chunk)
            left -= len(chunk)
            unflushed += len(chunk)
            view = memoryview(chunk)
            while view:
                view = view[os.write(descriptor, view) :]
            if unflushed >= FLUSH:
                os.fdatasync(descriptor)
                unflushed = 0
        if hasher.hexdigest() != digest:
            raise Refused(HTTPStatus.BAD_REQUEST, "the body does not have the SHA-256 that was announced")

    def _publish(self, stack: contextlib.ExitStack, name: str, digest: str, received: tuple[int, str, int]) -> Answer:
        """Give the received file its name, and answer once that is durable."""
        incoming, temporary, descriptor = received
        last = name.rpartition("/")[2]
        status = HTTPStatus.CREATED
        try:
            directories = self._directories(stack, name, create=True)
        except NotADirectoryError as error:
            raise Refused(HTTPStatus.CONFLICT, "a part of the name is that of a file") from error
        # A DELETE writes its tombstone under the same lock, so none can come between look and link.
        with self._locks.held(name):
            self._refuse_deleted(name, digest)
            try:
                os.link(temporary, last, src_dir_fd=incoming, dst_dir_fd=directories[-1], follow_symlinks=False)
            except FileExistsError:
                status = HTTPStatus.NO_CONTENT
        if status == HTTPStatus.NO_CONTENT:
            try:
                there = self._open(directories[-1], name)
            except FileNotFoundError as error:  # a directory, or a DELETE came right now
                self._refuse_deleted(name)
                raise Refused(HTTPStatus.CONFLICT, "the name is not that of a file") from error
            stack.callback(os.close, there)
            if _sha256(there) == digest:
                descriptor = there
            else:
                self._mend(name, digest, (incoming, temporary), directories[-1])
        if status == HTTPStatus.CREATED:
            self.usage.add(os.fstat(descriptor).st_size)
        # Local disks need the directories for the new name, Gluster the file that already has it.
        os.fsync(descriptor)
        self._sync(directories, name)
        return Answer(status, {"Content-Length": "0"} if status == HTTPStatus.CREATED else {})

    def _mend(self, name: str, digest: str, received: tuple[int, str], directory: int) -> None:
        """Replace a damaged file, of which the ledger says that the received bytes are the right ones."""
        incoming, temporary = received
        with self._locks.held(name):
            self._refuse_deleted(name)
            if self._known(name) != ("stored", digest):
                raise Refused(HTTPStatus.CONFLICT, "the name has other bytes, and is never overwritten")
            os.rename(temporary, name.rpartition("/")[2], src_dir_fd=incoming, dst_dir_fd=directory)
        log.warning("%s did not have the bytes that the ledger knows, and was replaced", name)

    # DELETE.

    def _delete(self, _environ: Environ, name: str, _digest: str) -> Answer:
        with self._locks.held(name):
            self.tombstones.add(name)
            self._unlink(name)
        return Answer(HTTPStatus.NO_CONTENT)

    def _unlink(self, name: str) -> None:
        with contextlib.ExitStack() as stack:
            try:
                directory = self._directories(stack, name, create=False)[-1]
            except (FileNotFoundError, NotADirectoryError):
                return
            with contextlib.suppress(FileNotFoundError, IsADirectoryError):
                if self._is_changed(directory, name):
                    log.warning("%s is deleted, but was changed here directly: it is left to the reconciliation", name)
                    return
                os.unlink(name.rpartition("/")[2], dir_fd=directory)
            os.fsync(directory)  # also where it was gone: who unlinked it may not have come to this

    def _is_changed(self, directory: int, name: str) -> bool:
        """Whether the file has other bytes than the deleted one, on a site that reconciles direct changes.

        Such bytes are somebody's only copy: ``tribrick sync`` gives them a name of their own, and removes
        the name. An unlink here would look to it like that person's own.
        """
        if self.ledger is None or not (self.root / HISTORY).is_dir():
            return False
        with contextlib.ExitStack() as stack:
            descriptor = self._open(directory, name)
            stack.callback(os.close, descriptor)
            known = None
            with contextlib.suppress(LedgerError):
                known = self._known(name)
            return known is None or known[1] != _sha256(descriptor)

    # Directories.

    def _directories(self, stack: contextlib.ExitStack, name: str, *, create: bool) -> list[int]:
        """Open the root and all directories of *name*, without following a link. *stack* closes them."""
        opened = [os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)]
        stack.callback(os.close, opened[0])
        for part in name.split("/")[:-1]:
            if create:
                with contextlib.suppress(FileExistsError):
                    # The group and its bit come from the parent, the mode from the umask: see application().
                    os.mkdir(part, 0o775, dir_fd=opened[-1])
            try:
                flags = os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW | os.O_CLOEXEC
                opened.append(os.open(part, flags, dir_fd=opened[-1]))
            except OSError as error:
                if error.errno == errno.ELOOP:
                    raise NotADirectoryError(errno.ENOTDIR, "a link is no directory here") from error
                raise
            stack.callback(os.close, opened[-1])
        return opened

    def _sync(self, directories: list[int], name: str) -> None:
        """Make the new entry durable, and those of the directories that lead to it."""
        os.fsync(directories[-1])
        path = ""
        parts = name.split("/")[:-1]
        for parent, child, part in zip(directories, directories[1:], parts, strict=False):
            path = f"{path}/{part}"
            status = os.fstat(child)
            known = (path, status.st_dev, status.st_ino)
            # Also one that was there before: who made it may not have come to its fsync.
            if known not in self._durable:
                os.fsync(parent)
                if len(self._durable) >= _REMEMBERED:
                    self._durable.clear()
                self._durable.add(known)


def _unlink_if_there(name: str, directory: int) -> None:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(name, dir_fd=directory)


def _sha256(descriptor: int) -> str:
    hasher, at = hashlib.sha256(), 0
    while chunk := os.pread(descriptor, CHUNK, at):
        hasher.update(chunk)
        at += len(chunk)
    return hasher.hexdigest()


def _range(first: str, last: str, size: int) -> tuple[int, int]:
    """Return the first and the last byte of a range, of which one side may be empty."""
    if first:
        low, high = int(first), min(int(last), size - 1) if last else size - 1
    else:
        low, high = max(0, size - int(last)), size - 1
    if low > high or (last and not first and int(last) == 0):
        raise Refused(
            HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE,
            "there are no such bytes",
            **{"Content-Range": f"bytes */{size}"},
        )
    return low, high


class _Window:
    """The bytes of an open file from *at* to *end*, piece by piece."""

    def __init__(self, descriptor: int, at: int, end: int) -> None:
        self._descriptor, self._at, self._end = descriptor, at, end

    def __iter__(self) -> Iterator[bytes]:
        while self._at < self._end:
            chunk = os.pread(self._descriptor, min(CHUNK, self._end - self._at), self._at)
            if not chunk:
                raise OSError(errno.EIO, "the file became shorter while it was read")
            self._at += len(chunk)
            yield chunk

    def close(self) -> None:
        """Called by the server in the end, whatever happened."""
        descriptor, self._descriptor = self._descriptor, -1
        if descriptor >= 0:
            os.close(descriptor)

    def __del__(self) -> None:
        self.close()


# Configuration


def _keys(path: Path, variable: str = "TRIBRICK_RECEIVER_KEYS") -> dict[str, str]:
    """Read the secrets of signatures; *variable* is who names the file, for messages."""
    try:
        if path.stat().st_mode & stat.S_IRWXO:
            raise ReceiverError(f"{variable}: everybody may read {path}")
        keys = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ReceiverError(f"{variable}: {path} cannot be read: {error}") from error
    good = isinstance(keys, dict) and keys and all(isinstance(key, str) and key for key in keys.values())
    if not good:
        raise ReceiverError(f'{variable}: {path} must hold {{"key id": "secret"}}')
    return dict(keys)


def application(environ: Mapping[str, str] | None = None) -> Receiver:
    """Return the application that the environment describes; raise :class:`ReceiverError` if it cannot work."""
    given = os.environ if environ is None else environ

    def setting(key: str) -> str | None:
        return given.get(f"TRIBRICK_RECEIVER_{key}") or None

    root, state, ledger, keys = setting("ROOT"), setting("STATE"), setting("LEDGER"), setting("KEYS")
    if root is None or state is None:
        raise ReceiverError("TRIBRICK_RECEIVER_ROOT and TRIBRICK_RECEIVER_STATE must be given")
    largest, limit = setting("MAX_BYTES") or str(MAX_BYTES), setting("LIMIT")
    for key, number in (("MAX_BYTES", largest), ("LIMIT", limit)):
        if number is not None and not _NUMBER.fullmatch(number):
            raise ReceiverError(f"TRIBRICK_RECEIVER_{key}: {number!r} is not a number of bytes")
    if (lists := setting("LIST") or "0") not in ("0", "1"):
        raise ReceiverError(f"TRIBRICK_RECEIVER_LIST: {lists!r} is neither 0 nor 1")
    # The group may write to directories, so that the site's user can delete in them.
    os.umask(0o002)
    return Receiver(
        root,
        state,
        ledger=ledger,
        keys=None if keys is None else _keys(Path(keys)),
        max_bytes=int(largest),
        accel=setting("ACCEL"),
        limit=None if limit is None else int(limit),
        lists=lists == "1",
    )
