"""The opener: opens files of a directory that only root can read, and hands over the open file.

A brick belongs to GlusterFS: its directories may be closed to everybody else. The standby is the one
that verifies and serves bytes, so it must not have the right to read everything. The opener has it,
serves nobody but the standby, and gives away descriptors for reading, one file at a time::

    python -m tribrick.opener --root /srv/gluster/media/brick --proof .glusterfs --socket /run/tribrick/brick.sock

It needs the standard library only, and listens on a Unix socket, made by itself or passed by systemd
(``LISTEN_FDS``). Who may connect is decided by the socket's mode and group.

A connection is one question: a name in UTF-8, up to the end of what the asker sends. The answer is one
JSON object: ``{}`` with the descriptor, or ``{"error"}`` with ``missing`` or ``unreadable``, and
``detail``, as the hasher says it. An empty name asks whether the root is there. Which names there are,
and that no link is followed, is as in :mod:`tribrick.hasher`.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import os
import socket
import socketserver
import sys
import threading
from typing import Any, Final

from tribrick.hasher import RootMissing, Tree, _wrong, listen, passed_socket

PARALLEL: Final = 16
"""Questions at a time. On a disk that hangs so many are outstanding; others are turned away at once."""
_LONGEST: Final = 4096
_IDLE: Final = 10.0


class Bounded(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
    """A server on a listening Unix socket, with a thread for each connection and at most *limit* of them."""

    daemon_threads = True
    block_on_close = False

    def __init__(self, listening: socket.socket, handler: type[socketserver.BaseRequestHandler], limit: int) -> None:
        self.free = threading.BoundedSemaphore(limit)
        super().__init__(str(listening.getsockname()), handler, bind_and_activate=False)
        self.socket.close()
        self.socket = listening

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; a Unix socket has no address, and handlers want one."""
        return self.socket.accept()[0], ("", 0)

    def process_request(self, request: Any, client_address: Any) -> None:
        """Begin a thread, or turn the connection away."""
        if not self.free.acquire(blocking=False):
            self.turn_away(request)
            self.shutdown_request(request)
            return
        try:
            super().process_request(request, client_address)
        except BaseException:  # no thread to be had
            self.free.release()
            raise

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        """Serve one connection, in its thread."""
        try:
            super().process_request_thread(request, client_address)
        finally:
            self.free.release()

    def turn_away(self, request: socket.socket) -> None:
        """Answer a connection for which there is no thread; nothing by default."""

    def handle_error(self, request: Any, client_address: Any) -> None:  # noqa: ARG002  the base class names them
        """Say in one line what went wrong with a connection."""
        error = sys.exc_info()[1]
        if not isinstance(error, (ConnectionError, TimeoutError)):
            print(f"a request failed: {error}", file=sys.stderr, flush=True)


class Opener(Bounded):
    """Opens the files of *tree* for who connects."""

    def __init__(self, tree: Tree, listening: socket.socket) -> None:
        self.tree = tree
        super().__init__(listening, _Question, PARALLEL)


class _Question(socketserver.BaseRequestHandler):
    server: Opener

    def handle(self) -> None:
        self.request.settimeout(_IDLE)
        given = b""
        while len(given) <= _LONGEST and (more := self.request.recv(_LONGEST)):
            given += more
        answer, descriptors = self._answer(given)
        try:
            socket.send_fds(self.request, [json.dumps(answer).encode()], descriptors)
        finally:
            for descriptor in descriptors:
                os.close(descriptor)

    def _answer(self, given: bytes) -> tuple[dict[str, str], list[int]]:
        try:
            self.server.tree.check()
            if not given:
                return {}, []
            if len(given) > _LONGEST:
                raise FileNotFoundError(errno.ENOENT, "no file can have this name")
            return {}, [self.server.tree.open(given.decode("utf-8", "surrogateescape"))]
        except RootMissing as error:
            return {"error": "unreadable", "detail": str(error)}, []
        except OSError as error:
            return _wrong(error), []


def ask(path: str | os.PathLike[str], name: str, seconds: float) -> int | None:
    """Ask the opener at the socket *path* for a descriptor of *name*, which the caller closes.

    With an empty name it is asked whether the root is there; None then. Raises ``FileNotFoundError`` for a
    name that it has not, and another ``OSError`` when it cannot read the file or does not answer within
    *seconds* a step.
    """
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as line, contextlib.ExitStack() as stack:
        line.settimeout(seconds)
        try:
            line.connect(os.fspath(path))
        except FileNotFoundError as error:  # of the socket, not of the name
            raise ConnectionRefusedError(errno.ECONNREFUSED, "nobody listens") from error
        line.sendall(os.fsencode(name))
        line.shutdown(socket.SHUT_WR)
        said, descriptors, _flags, _address = socket.recv_fds(line, _LONGEST, 1)
        for descriptor in descriptors:
            stack.callback(os.close, descriptor)
            os.set_inheritable(descriptor, False)  # recv_fds does not pass on a flag for that
        try:
            answer = json.loads(said)
        except ValueError as error:
            raise OSError(errno.EIO, "it turned the question away") from error
        if answer.get("error") == "missing":
            raise FileNotFoundError(errno.ENOENT, "there is no such file")
        if answer or bool(name) != bool(descriptors):
            raise OSError(errno.EIO, str(answer.get("detail", "the answer is none")))
        if not name:
            return None
        stack.pop_all()
        return descriptors[0]


def main(arguments: list[str] | None = None) -> int:
    """Serve until the process is ended."""
    parser = argparse.ArgumentParser(
        prog="python -m tribrick.opener",
        description="Open the files of a directory for who may connect to a socket, for reading.",
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
            listening = listen(options.socket, options.group)
    except (OSError, KeyError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    with Opener(tree, listening) as server:
        server.serve_forever()
    return 0


if __name__ == "__main__":
    sys.exit(main())
