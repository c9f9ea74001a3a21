"""Copies on other machines that are asked for hashes, so that an audit moves no bytes.

``hashes`` is :mod:`tribrick.hasher` beside a directory that only root can read, such as a brick.
``ssh`` is a directory on a host with OpenSSH, Python 3.8 and, to be repaired, rsync.

Each question has an end: a copy that does not answer is away (:class:`tribrick.copies.CopyAway`).
"""

from __future__ import annotations

import contextlib
import errno
import http.client
import json
import os
import re
import secrets
import select
import shlex
import socket
import ssl
import subprocess
import tempfile
import threading
import urllib.parse
from collections.abc import Generator, Iterable, Iterator, Sequence
from datetime import datetime, timezone
from pathlib import Path
from typing import IO, Any, Final

from django.core.exceptions import ImproperlyConfigured

from tribrick import hasher, names
from tribrick.conf import setting
from tribrick.copies import CHUNK, QUARANTINE, AuditError, Copy, CopyAway, Found, PathCopy, Seen
from tribrick.ledger import Known
from tribrick.storage.transport import Deadline, _Connection, _TimedSocket

CONNECT = 10.0
SILENCE = 30.0
"""Seconds without an answer, besides what reading the files may take, after which a copy is away."""
_NAMES: Final = 200
_BYTES: Final = 64 * CHUNK
_LINE: Final = 64 * 1024


def _portions(wanted: Sequence[Known]) -> Iterator[list[Known]]:
    """Cut a list so that the answer to no part takes long."""
    part: list[Known] = []
    for known in wanted:
        if part and (len(part) >= _NAMES or sum(one.size for one in part) + known.size > _BYTES):
            yield part
            part = []
        part.append(known)
    if part:
        yield part


def _asked(files: Sequence[Known]) -> bytes:
    return "".join(json.dumps(known.name) + "\n" for known in files).encode()


def _patience(files: Sequence[Known]) -> float:
    return float(SILENCE + sum(known.size for known in files) / float(setting("MINIMUM_RATE")))


def _lines(blocks: Iterable[bytes], what: str) -> Generator[Any, None, None]:
    """Yield the JSON of each line."""
    rest = b""
    for block in blocks:
        *lines, rest = (rest + block).split(b"\n")
        for line in lines:
            yield _parsed(line, what)
        if len(rest) > _LINE:
            raise CopyAway(errno.EPROTO, f"{what}: the answer is not one of JSON lines")
    if rest:
        raise CopyAway(errno.EPROTO, f"{what}: the answer broke off")


def _parsed(line: bytes, what: str) -> Any:
    try:
        return json.loads(line)
    except ValueError as error:
        raise CopyAway(errno.EPROTO, f"{what}: the answer is not one of JSON lines") from error


def _seen(files: Sequence[Known], answers: Iterator[Any], what: str) -> Iterator[Seen | OSError]:
    """Make of each answer what :meth:`Copy.look` yields; they must be about these files, in order."""
    for known in files:
        answer: Any = next(answers, None)
        try:
            if answer["name"] != known.name:
                raise KeyError(answer["name"])
            if answer.get("error") == "missing":
                yield FileNotFoundError(errno.ENOENT, f"{what} does not have {known.name}")
            elif "error" in answer:
                yield OSError(errno.EIO, str(answer.get("detail") or answer["error"]))
            else:
                yield Seen(str(answer["sha256"]), int(answer["size"]), bool(answer["zero_tail"]))
        except (KeyError, TypeError, AttributeError, ValueError) as error:
            raise CopyAway(errno.EPROTO, f"{what}: no answer, or a wrong one, about {known.name}") from error


def _found(answers: Iterator[Any], what: str) -> Iterator[Found]:
    for answer in answers:
        try:
            found = Found(str(answer["name"]), int(answer["size"]), float(answer["changed"]), float(answer["modified"]))
        except (KeyError, TypeError, ValueError) as error:
            raise CopyAway(errno.EPROTO, f"{what}: a wrong answer in a walk") from error
        yield found


class _FarCopy(Copy):
    """What both have in common."""

    batched = True

    def exists(self, name: str) -> bool:
        (seen,) = self.look([Known(name, "stored", "", "", 0)])
        return not isinstance(seen, FileNotFoundError)

    def check(self) -> None:
        self.exists(names.new_token())

    def look(self, wanted: Sequence[Known]) -> Iterator[Seen | OSError]:
        for files in _portions(wanted):
            with contextlib.closing(self._hashes(files)) as answers:
                yield from _seen(files, answers, self.name)

    def _hashes(self, files: Sequence[Known]) -> Generator[Any, None, None]:
        """Return a generator of what the far side answers for these names."""
        raise NotImplementedError


# Hashes


class _UnixConnection(_Connection):
    def __init__(self, path: str) -> None:
        super().__init__("localhost", 80, None, "")
        self._path = path

    def connect(self) -> None:
        plain = socket.socket(socket.AF_UNIX)
        try:
            plain.settimeout(self.deadline.left())
            plain.connect(self._path)
        except BaseException:
            plain.close()
            raise
        self._plain, self.sock = plain, _TimedSocket(plain, self)


class HashesCopy(_FarCopy):
    """A directory behind a hasher: ``unix:/path`` or ``https://host[:port]/prefix/``.

    For ``https`` the certificates are those of ``TRIBRICK["TRANSPORT"]``: ``ca``, ``certificate`` and
    ``key``, perhaps ``server_name``.
    """

    why_not = "only hashes come from there"
    readable = False

    def __init__(self, name: str, address: str) -> None:
        parts = urllib.parse.urlsplit(address)
        self.name, self.address = name, address
        if parts.scheme == "unix" and parts.path.startswith("/") and not parts.netloc:
            self._socket: str | None = urllib.parse.unquote(address.removeprefix("unix:"))
            self._prefix = "/"
        elif parts.scheme == "https" and parts.hostname and not (parts.query or parts.fragment or parts.username):
            self._socket = None
            self._prefix = parts.path.rstrip("/") + "/"
            self._host, self._port = parts.hostname, parts.port or 443
            given = setting("TRANSPORT")
            if not (given.get("ca") and given.get("certificate")):
                raise ImproperlyConfigured(
                    f'TRIBRICK["COPIES"]: {name} needs "ca", "certificate" and "key" in TRIBRICK["TRANSPORT"]'
                )
        else:
            raise ImproperlyConfigured(
                f"the copy {name} needs an address like unix:/run/tribrick/hashes.sock or https://host:port/prefix/, "
                f"not {address!r}"
            )

    def _connection(self) -> _Connection:
        if self._socket is not None:
            return _UnixConnection(self._socket)
        given = setting("TRANSPORT")
        context = ssl.create_default_context(cafile=given["ca"])
        context.minimum_version = ssl.TLSVersion.TLSv1_2
        context.load_cert_chain(given["certificate"], given.get("key"))
        return _Connection(self._host, self._port, context, given.get("server_name") or self._host)

    def _blocks(self, method: str, path: str, body: bytes | None, patience: float) -> Iterator[bytes]:
        connection = None
        try:
            connection = self._connection()
            connection.deadline = Deadline(CONNECT)
            connection.connect()
            connection.deadline = Deadline(patience)
            connection.request(method, self._prefix + path, body=body)
            response = connection.getresponse()
            if response.status != http.HTTPStatus.OK:
                said = response.read(300).decode(errors="replace").strip()
                raise CopyAway(errno.EIO, f"{self.address}: {response.status} {said}")
            if response.length is None and not response.chunked:
                raise CopyAway(errno.EPROTO, f"{self.address}: an answer whose end cannot be seen")
            while block := response.read1(_LINE):
                yield block
                connection.deadline = Deadline(patience)
            if response.length:
                raise CopyAway(errno.EPROTO, f"{self.address}: the answer broke off")
        except CopyAway:
            raise
        except (OSError, http.client.HTTPException) as error:
            reason = " ".join(str(error).split()) or type(error).__name__
            raise CopyAway(getattr(error, "errno", None) or errno.EIO, f"{self.address}: {reason}") from error
        finally:
            if connection is not None:
                connection.close()

    def _hashes(self, files: Sequence[Known]) -> Generator[Any, None, None]:
        return _lines(self._blocks("POST", "hashes", _asked(files), _patience(files)), self.address)

    def walk(self) -> Iterator[Found]:
        return _found(_lines(self._blocks("GET", "walk", None, _patience(())), self.address), self.address)


# SSH

_ADDRESS: Final = re.compile(
    r"(?P<login>(?:[A-Za-z0-9_][A-Za-z0-9_.-]*@)?)(?P<host>[A-Za-z0-9][A-Za-z0-9.-]*|\[[0-9A-Fa-f:.]+\]):(?P<path>/.*)"
)
# Reads the program from its input, then leaves the rest to it. Nothing but this text meets the far shell.
_START: Final = (
    "exec python3 -c 'import sys; "
    'far = {"__name__": "far"}; '
    'exec(compile(sys.stdin.buffer.read(int(sys.stdin.buffer.readline())), "hasher", "exec"), far); '
    'far["converse"](sys.stdin, sys.stdout)\''
)


class SshCopy(_FarCopy):
    """A directory on a host that is reached over SSH: ``user@host:/path``. rsync repairs it.

    Host keys must be known, nothing is asked for: *known_hosts* and *identity* are paths of files.
    """

    def __init__(
        self,
        name: str,
        address: str,
        *,
        writable: bool = True,
        port: int | None = None,
        identity: str | None = None,
        known_hosts: str | None = None,
    ) -> None:
        match = _ADDRESS.fullmatch(address)
        if match is None:
            raise ImproperlyConfigured(f"the copy {name} needs an address like user@host:/path, not {address!r}")
        if port is not None and not (isinstance(port, int) and 0 < port < 65536):
            raise ImproperlyConfigured(f"the copy {name}: {port!r} is not a port")
        for path in (identity, known_hosts):
            if path is not None and re.search(r"[\s\"'\\%]", str(path)):
                raise ImproperlyConfigured(f"the copy {name}: the path {path!r} must be without spaces and quotes")
        self.name, self.address, self.writable = name, address, bool(writable)
        self._to = match["login"] + match["host"].strip("[]")
        self._login_host, self._root = match["login"] + match["host"], match["path"]
        self._ssh = ["ssh", "-oBatchMode=yes", "-oStrictHostKeyChecking=yes", "-oPasswordAuthentication=no"]
        self._ssh += ["-oServerAliveInterval=5", "-oServerAliveCountMax=3", "-oForwardAgent=no", "-oLogLevel=ERROR"]
        self._ssh += ["-oControlPath=none", "-oClearAllForwardings=yes"]
        if port is not None:
            self._ssh += ["-p", str(port)]
        if identity is not None:
            self._ssh += ["-i", str(identity), "-oIdentitiesOnly=yes"]
        if known_hosts is not None:
            self._ssh += [f"-oUserKnownHostsFile={known_hosts}", "-oGlobalKnownHostsFile=/dev/null"]

    def check(self) -> None:
        """Nothing: the first question finds out, and a connection more is dear."""

    def _command(self) -> list[str]:
        return [*self._ssh, f"-oConnectTimeout={max(1, round(CONNECT))}"]

    def _ask(self, do: str, files: Sequence[Known], patience: float, **more: Any) -> Generator[Any, None, None]:
        """Yield the far side's answers to one question; see :func:`tribrick.hasher.converse`."""
        program = Path(hasher.__file__).read_bytes()
        question = json.dumps({"root": self._root, "do": do, **more}) + "\n"
        text = b"%d\n%s%s" % (len(program), program, question.encode() + _asked(files))
        answers = _lines(_run([*self._command(), "-T", "--", self._to, _START], text, patience, self.name), self.name)
        last = None
        with contextlib.closing(answers):
            for answer in answers:
                if last is not None:
                    yield last
                last = answer
        if last != "end":
            raise CopyAway(errno.EPROTO, f"{self.name}: the answer broke off")

    def _hashes(self, files: Sequence[Known], *, durable: bool = False) -> Generator[Any, None, None]:
        return self._ask("hashes", files, CONNECT + _patience(files), durable=durable)

    def walk(self) -> Iterator[Found]:
        return _found(self._ask("walk", (), CONNECT + _patience(())), self.name)

    def chunks(self, name: str) -> Iterator[bytes]:
        with self.at_hand([Known(name, "stored", "", "", 0)]) as near:
            yield from near.chunks(name)

    # Repairs.

    def remove(self, known: Known) -> str:
        return _raised(next(self.remove_all([known])))

    def remove_all(self, wanted: Sequence[Known]) -> Iterator[str | Exception]:
        if not self.writable:
            yield from (AuditError(f"{self.name}: {self.why_not}") for _ in wanted)
            return
        for files in _portions(wanted):
            answers = list(self._ask("remove", files, CONNECT + _patience(())))
            for known, answer in zip(files, answers, strict=True):
                error = answer.get("detail") or answer.get("error")
                yield AuditError(f"{self.name}: {known.name}: {error}") if error else "removed"

    def put(self, known: Known, source: Copy) -> str:
        return _raised(next(self.put_all([known], source)))

    def put_all(self, wanted: Sequence[Known], source: Copy) -> Iterator[str | Exception]:
        """Bring files there with rsync, each under another name first, and compare the hashes then.

        What is replaced goes to the quarantine there.
        """
        if not self.writable:
            yield from (AuditError(f"{self.name}: {self.why_not}") for _ in wanted)
            return
        list(self._ask("prepare", (), CONNECT + _patience(())))
        today = datetime.now(timezone.utc).strftime("%Y-%m-%d")
        with _as_directory(source, wanted) as root:
            trouble = self._rsync(
                [
                    "--checksum", "--perms", f"--temp-dir={hasher.INCOMING}", "--backup",
                    f"--backup-dir={QUARANTINE}/{today}", f"--suffix=.{secrets.token_hex(4)}", f"{root}/",
                    f"{self._login_host}:{self._root}/",
                ],
                wanted,
            )  # fmt: skip
        for files in _portions(wanted):
            answers = self._hashes(files, durable=True)
            for known, seen in zip(files, _seen(files, answers, self.name), strict=True):
                if isinstance(seen, Seen) and (seen.sha256, seen.size) == (known.sha256, known.size):
                    yield f"written from {source.name}"
                else:
                    why = seen if isinstance(seen, OSError) else "it has other bytes"
                    yield AuditError(f"{self.name}: after the transfer of {known.name}: {why}{trouble}")

    @contextlib.contextmanager
    def at_hand(self, wanted: Sequence[Known]) -> Iterator[Copy]:
        """Fetch these files into a temporary directory."""
        with tempfile.TemporaryDirectory(prefix="tribrick-") as near:
            self._rsync([f"{self._login_host}:{self._root}/", f"{near}/"], wanted)
            yield PathCopy(self.name, near, writable=False)

    def _rsync(self, arguments: Sequence[str], files: Sequence[Known]) -> str:
        """Run rsync for these names; return what it complained about. Never deletes anything."""
        named = b"".join(b"./" + os.fsencode(known.name) + b"\0" for known in files)
        command = ["rsync", f"--rsh={shlex.join(self._command())}", "--protect-args", "--times", "--omit-dir-times"]
        command += ["--no-implied-dirs", "--files-from=-", "--from0", f"--timeout={max(1, round(SILENCE))}"]
        limit = CONNECT + 2 * _patience(files)
        try:
            done = subprocess.run(
                [*command, *arguments], input=named, capture_output=True, timeout=limit, check=False, env=_plain()
            )
        except FileNotFoundError as error:
            raise AuditError("rsync is not installed here") from error
        except subprocess.TimeoutExpired as error:
            raise AuditError(f"{self.name}: rsync did not end within {limit:.0f} s") from error
        if done.returncode == 0:
            return ""
        said = " ".join(done.stderr.decode(errors="replace").split())[:500]
        return f" (rsync ended with {done.returncode}: {said})"


def _raised(what: str | Exception) -> str:
    if isinstance(what, Exception):
        raise what
    return what


def _plain() -> dict[str, str]:
    """Return the environment without what changes the meaning of rsync's options."""
    return {key: value for key, value in os.environ.items() if not key.startswith("RSYNC_")}


@contextlib.contextmanager
def _as_directory(source: Copy, files: Sequence[Known]) -> Iterator[str]:
    """Yield a directory that holds these files of *source*."""
    if isinstance(source, PathCopy):
        yield str(source.root)
        return
    with tempfile.TemporaryDirectory(prefix="tribrick-") as near:
        for known in files:
            target = Path(near, known.name)
            with contextlib.suppress(OSError):
                target.parent.mkdir(parents=True, exist_ok=True)
                with target.open("wb") as file:
                    for chunk in source.chunks(known.name):
                        file.write(chunk)
        yield near


def _run(command: Sequence[str], text: bytes, patience: float, what: str) -> Iterator[bytes]:
    """Run a program with this input and yield its output; end it when it is silent for too long."""
    with tempfile.TemporaryFile() as complaints:
        try:
            process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints, bufsize=0
            )
        except FileNotFoundError as error:
            raise CopyAway(errno.ENOENT, f"{command[0]} is not installed here") from error
        assert process.stdin is not None  # noqa: S101  it was asked for, and so was the next
        assert process.stdout is not None  # noqa: S101
        feeder = threading.Thread(target=_feed, args=(process.stdin, text), daemon=True)
        feeder.start()
        try:
            poll = select.poll()
            poll.register(process.stdout, select.POLLIN | select.POLLHUP)
            while True:
                if not poll.poll(patience * 1000):
                    raise CopyAway(errno.ETIMEDOUT, f"{what}: silent for {patience:.0f} s")
                block = os.read(process.stdout.fileno(), _LINE)
                if not block:
                    break
                yield block
            if process.wait(CONNECT) != 0:
                complaints.seek(0)
                said = " ".join(complaints.read(2000).decode(errors="replace").split())
                raise CopyAway(errno.EIO, f"{what}: {said or f'{command[0]} ended with {process.returncode}'}")
        except subprocess.TimeoutExpired as error:
            raise CopyAway(errno.ETIMEDOUT, f"{what}: {command[0]} does not end") from error
        finally:
            process.kill()
            process.wait()
            feeder.join()
            process.stdout.close()


def _feed(pipe: IO[bytes], text: bytes) -> None:
    with contextlib.suppress(OSError), pipe:
        view = memoryview(text)
        while view:
            view = view[pipe.write(view) :]
