"""The hasher: says what lies in a directory, by hash, and as a service changes nothing.

It lets an audit compare a brick, which only root can read, without giving away a byte of it::

    python -m tribrick.hasher --root /srv/gluster/media/brick --socket /run/tribrick/hashes.sock

It needs the standard library only. It speaks HTTP/1.1 on a Unix socket, made by itself or passed by
systemd (``LISTEN_FDS``). Who may connect is decided by the socket's mode and group.

``POST /hashes``
    One JSON string a line, each a name. The answer has one JSON object a line, in the same order:
    ``{"name", "sha256", "size", "zero_tail"}``, or ``{"name", "error"}`` with the error ``missing``
    or ``unreadable`` and, of the latter, the reason as ``detail``. ``zero_tail`` says that the last
    4096 bytes are zeros, as after a write that never reached the disk.
``GET /walk``
    One JSON object a line for every file: ``{"name", "size", "changed", "modified"}``. ``changed``
    is the later of its two times of change.
``GET /-/ready``
    200 when the root is there.

Answers are chunked, so one that broke off can be told from one that has ended. Links are not
followed. Dot names in the root (``.glusterfs``) are not there, except the storage's own temporary
files. GlusterFS's pointers to other bricks (mode ``---------T``) are not there either. 503 means that
the root is not what it must be; ``--proof NAME`` makes that a question of whether NAME is in it, since
the empty directory under a brick that is not mounted would have every file missing.

The same over SSH: :class:`tribrick.far_copies.SshCopy` sends this file there and has ``converse``
answer one question, so the far side needs Python 3.8 and nothing installed. Only that way a directory
can be changed.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import grp
import hashlib
import json
import os
import re
import socket
import socketserver
import stat
import sys
import threading
import time
from collections.abc import Iterable, Iterator
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import IO, Any, Final

CHUNK: Final = 1024 * 1024
MAX_QUESTION: Final = 4 * 1024 * 1024
PARALLEL: Final = 2
# As tribrick.storage.saving has it; not imported, because that needs Django.
TEMPORARY: Final = re.compile(r"\.[a-z2-7]{20}\.part")
INCOMING: Final = ".tribrick-incoming"
"""Where files on their way lie. What is older than ``OLD`` seconds was left by a killed transfer."""
OLD: Final = 24 * 3600
READY: Final = "/-/ready"
_TAIL: Final = 4096
_IDLE: Final = 60.0
_POINTER: Final = "trusted.glusterfs.dht.linkto"


class RootMissing(Exception):
    """The directory is not there, or not the right one."""


class Tree:
    """A directory that is only read. *proof* is a name that must be in it."""

    def __init__(self, root: str | os.PathLike[str], *, proof: str | None = None) -> None:
        self.root, self.proof = Path(root), proof

    def check(self) -> None:
        """Raise :class:`RootMissing` unless the root is there."""
        if not self.root.is_dir():
            raise RootMissing(f"{self.root} is not a directory")
        if self.proof is not None and not os.path.lexists(self.root / self.proof):
            raise RootMissing(f"{self.root} has no {self.proof}, so it is not what it should be")

    def hash(self, name: str, *, durable: bool = False) -> dict[str, Any]:
        """Return what is known of *name* after reading it; with *durable* it is flushed under its name."""
        try:
            with contextlib.ExitStack() as stack:
                directory, last = self._directory(stack, name)
                file = _open(stack, directory, last)
                found = _read(file)
                if durable:
                    os.fsync(file)
                    os.fsync(directory)
                return {"name": name, **found}
        except OSError as error:
            return {"name": name, **_wrong(error)}

    def open(self, name: str) -> int:
        """Return a descriptor for reading *name*, which the caller closes; ``OSError`` if there is no such file."""
        with contextlib.ExitStack() as stack:
            directory, last = self._directory(stack, name)
            return os.dup(_open(stack, directory, last))

    def _directory(self, stack: contextlib.ExitStack, name: str) -> tuple[int, str]:
        """Open the directory in which *name* lies, through no link; return it and the rest of the name."""
        *parts, last = name.split("/")
        if not _allowed(name) or any(part in ("", ".", "..") or "\0" in part for part in [*parts, last]):
            raise FileNotFoundError(errno.ENOENT, "no file can have this name")
        try:
            os.fsencode(name)
        except UnicodeEncodeError as error:
            raise FileNotFoundError(errno.ENOENT, "no file can have this name") from error
        at = os.open(self.root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        stack.callback(os.close, at)
        for part in parts:
            at = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_DIRECTORY | os.O_CLOEXEC, dir_fd=at)
            stack.callback(os.close, at)
        return at, last

    def walk(self) -> Iterator[dict[str, Any]]:
        """Yield every file, directory by directory, each in order of names."""
        waiting = [""]
        while waiting:
            directory = waiting.pop()
            try:
                with os.scandir(self.root / directory) as entries:
                    listed = sorted(entries, key=lambda entry: entry.name)
            except FileNotFoundError:
                if not directory:
                    raise
                continue
            below = []
            for entry in listed:
                name = f"{directory}/{entry.name}" if directory else entry.name
                if not _allowed(name):
                    continue
                if entry.is_dir(follow_symlinks=False):
                    below.append(name)
                    continue
                with contextlib.suppress(FileNotFoundError):
                    status = entry.stat(follow_symlinks=False)
                    if not _is_pointer(status.st_mode, entry.path):
                        changed = max(status.st_mtime, status.st_ctime)
                        yield {"name": name, "size": status.st_size, "changed": changed, "modified": status.st_mtime}
            waiting.extend(reversed(below))

    # Over SSH only.

    def prepare(self) -> None:
        """Make the directory for files on their way, and remove what killed transfers left in it."""
        incoming = self.root / INCOMING
        incoming.mkdir(mode=0o700, exist_ok=True)
        with os.scandir(incoming) as entries:
            for entry in entries:
                if entry.is_file(follow_symlinks=False) and time.time() - entry.stat().st_mtime > OLD:
                    os.unlink(entry.path)

    def remove(self, name: str) -> dict[str, Any]:
        """Unlink a file; one that is gone already is no error."""
        try:
            with contextlib.ExitStack() as stack:
                directory, last = self._directory(stack, name)
                os.unlink(last, dir_fd=directory)
        except OSError as error:
            wrong = _wrong(error)
            if wrong["error"] != "missing":
                return {"name": name, **wrong}
        return {"name": name}


def _wrong(error: OSError) -> dict[str, str]:
    if isinstance(error, (FileNotFoundError, NotADirectoryError)) or error.errno == errno.ENAMETOOLONG:
        return {"error": "missing"}
    return {"error": "unreadable", "detail": error.strerror or str(error)}


def _open(stack: contextlib.ExitStack, directory: int, name: str) -> int:
    file = os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK, dir_fd=directory)
    stack.callback(os.close, file)
    status = os.fstat(file)
    if not stat.S_ISREG(status.st_mode):
        raise OSError(errno.EINVAL, "is not a regular file")
    if _is_pointer(status.st_mode, file):
        raise FileNotFoundError(errno.ENOENT, "the file lies on another brick")
    return file


def _allowed(name: str) -> bool:
    first, slash, _ = name.partition("/")
    return not first.startswith(".") or (not slash and TEMPORARY.fullmatch(first) is not None)


def _is_pointer(mode: int, file: int | str) -> bool:
    """Whether a file of a brick only says that the bytes lie on another one."""
    if not stat.S_ISREG(mode) or not mode & stat.S_ISVTX:
        return False
    if stat.S_IMODE(mode) == stat.S_ISVTX:
        return True
    try:
        return bool(os.getxattr(file, _POINTER))
    except OSError:
        return False


def _read(descriptor: int) -> dict[str, Any]:
    hasher, size, tail = hashlib.sha256(), 0, b""
    while chunk := os.read(descriptor, CHUNK):
        hasher.update(chunk)
        size += len(chunk)
        tail = (tail + chunk[-_TAIL:])[-_TAIL:]
    # What was read once for an audit must not push what visitors read out of memory.
    with contextlib.suppress(OSError):
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    return {"sha256": hasher.hexdigest(), "size": size, "zero_tail": bool(tail) and not any(tail)}


# Over SSH


def converse(lines: Iterable[str], out: IO[str]) -> None:
    """Answer one question. Its first line is ``{"root", "do"}``, each further one a name in JSON.

    The answers are those of the service, ``"end"`` is the last one. ``do`` is ``walk``, ``hashes``,
    perhaps with ``"durable": true``, ``prepare`` or ``remove``.
    """
    given = (json.loads(line) for line in lines)
    question = next(given)
    tree = Tree(question["root"])
    try:
        tree.check()
    except RootMissing as error:
        raise SystemExit(str(error)) from None
    answers: Iterable[dict[str, Any]] = ()
    if question["do"] == "walk":
        answers = tree.walk()
    elif question["do"] == "hashes":
        answers = (tree.hash(name, durable=question["durable"]) for name in given)
    elif question["do"] == "remove":
        answers = map(tree.remove, given)
    else:
        tree.prepare()
    for answer in answers:
        out.write(json.dumps(answer) + "\n")
        out.flush()
    out.write('"end"\n')
    out.flush()


# The server


class Server(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """Serves *tree* on a listening socket."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, tree: Tree, listening: socket.socket) -> None:
        self.tree = tree
        # Reading a brick competes with those who serve from it: a few at a time, the others wait.
        self.turn = threading.BoundedSemaphore(PARALLEL)
        super().__init__(str(listening.getsockname()), Handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  the base class names them
        """Say in one line what went wrong with a connection."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print(f"a request failed: {error}", file=sys.stderr, flush=True)


class Handler(BaseHTTPRequestHandler):
    """One connection."""

    protocol_version = "HTTP/1.1"
    timeout = _IDLE
    server: Server

    def log_message(self, *arguments: object) -> None:
        """Say nothing of requests."""

    def address_string(self) -> str:
        """Return nothing: a Unix socket has no address."""
        return ""

    def do_GET(self) -> None:
        """Answer ``/walk`` and ``/-/ready``."""
        if self.path == "/walk":
            if self._may():
                self._stream(self.server.tree.walk())
        elif self.path == READY:
            if self._may():
                self._say(HTTPStatus.OK, "ready")
        else:
            self._say(HTTPStatus.NOT_FOUND, "there is GET /walk, GET /-/ready and POST /hashes")

    def do_POST(self) -> None:
        """Answer ``/hashes``."""
        if self.path != "/hashes":
            self.close_connection = True
            self._say(HTTPStatus.NOT_FOUND, "there is GET /walk, GET /-/ready and POST /hashes")
            return
        names = self._names()
        if names is not None and self._may():
            self._stream(map(self.server.tree.hash, names))

    def _names(self) -> list[str] | None:
        given = self.headers.get("Content-Length", "")
        if not re.fullmatch(r"[0-9]{1,18}", given) or int(given) > MAX_QUESTION:
            self.close_connection = True
            status = HTTPStatus.REQUEST_ENTITY_TOO_LARGE if given else HTTPStatus.LENGTH_REQUIRED
            self._say(status, f"a question needs a Content-Length of at most {MAX_QUESTION}")
            return None
        body = self.rfile.read(int(given))
        try:
            names = [json.loads(line) for line in body.splitlines() if line]
        except (ValueError, RecursionError):
            names = [None]
        if len(body) != int(given) or not all(isinstance(name, str) for name in names):
            self._say(HTTPStatus.BAD_REQUEST, "a question has one JSON string a line")
            return None
        return names

    def _may(self) -> bool:
        if self.request_version != "HTTP/1.1":
            # Without chunks nobody could tell an answer that broke off.
            self._say(HTTPStatus.HTTP_VERSION_NOT_SUPPORTED, "HTTP/1.1 is needed; of nginx, proxy_http_version 1.1")
            return False
        try:
            self.server.tree.check()
        except (RootMissing, OSError) as error:
            self._say(HTTPStatus.SERVICE_UNAVAILABLE, str(error))
            return False
        return True

    def _say(self, status: HTTPStatus, text: str) -> None:
        data = f"{text}\n".encode()
        self.send_response(status)
        self.send_header("Content-Type", "text/plain; charset=utf-8")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _stream(self, objects: Iterable[dict[str, Any]]) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/x-ndjson")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        self.close_connection = True  # unless the last chunk was sent
        with self.server.turn:
            for one in objects:
                # ASCII, so that a name that is no UTF-8 passes as the lone surrogates that Python makes of it.
                line = json.dumps(one).encode() + b"\n"
                self.wfile.write(b"%x\r\n%s\r\n" % (len(line), line))
        self.wfile.write(b"0\r\n\r\n")
        self.close_connection = self.headers.get("Connection", "").lower() == "close"


def passed_socket() -> socket.socket | None:
    """Return the listening socket that systemd has passed, if it did."""
    if os.environ.get("LISTEN_PID") != str(os.getpid()) or os.environ.get("LISTEN_FDS") != "1":
        return None
    return socket.socket(fileno=3)


def listen(path: str, group: str | None) -> socket.socket:
    """Make the socket *path*, for its owner and *group* only; one that nobody listens on is replaced."""
    listening = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    with contextlib.suppress(FileNotFoundError):
        if not stat.S_ISSOCK(os.lstat(path).st_mode):
            raise OSError(errno.EEXIST, f"{path} is there and is not a socket")
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as other:
            try:
                other.connect(path)
            except ConnectionRefusedError:
                os.unlink(path)
            else:
                raise OSError(errno.EADDRINUSE, f"somebody listens on {path}")
    before = os.umask(0o117)
    try:
        listening.bind(path)
    finally:
        os.umask(before)
    if group is not None:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
    listening.listen(16)
    return listening


def main(arguments: list[str] | None = None) -> int:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(
        prog="python -m tribrick.hasher", description="Say what lies in a directory, by hash."
    )
    parser.add_argument("--root", required=True, help="the directory, e.g. that of a brick")
    parser.add_argument("--socket", help="path of the Unix socket; not needed when systemd passes one")
    parser.add_argument("--group", help="group whose members may connect")
    parser.add_argument("--proof", metavar="NAME", help="a name that must be in the root, e.g. .glusterfs")
    options = parser.parse_args(arguments)
    tree = Tree(options.root, proof=options.proof)
    try:
        listening = passed_socket()
        if listening is None:
            if not options.socket:
                parser.error("--socket must be given, because systemd passes none")
            tree.check()
            listening = listen(options.socket, options.group)
    except (RootMissing, OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with Server(tree, listening) as server:
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
