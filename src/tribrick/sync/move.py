"""What comes from a peer over SSH: its versions, and contents by rsync.

A peer is asked through its :mod:`tribrick.sync.door`. Host keys must be known, nothing is asked for.
Everything that is read is checked before it is used: versions one by one, contents by their hash.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from django.core.exceptions import ImproperlyConfigured

from tribrick.conf import setting
from tribrick.copies import CopyAway
from tribrick.far_copies import CONNECT, SILENCE, SshCopy, _lines, _plain, _run
from tribrick.sync.plan import Fetch
from tribrick.sync.side import Side, _copy
from tribrick.sync.state import Peer
from tribrick.sync.versions import NODE, BadVersion, Version, parse

_OPTIONS: Final = {"port", "identity", "known_hosts"}


class PeerAway(OSError):
    """A peer cannot be reached, or does not answer as a peer does. Nothing it said was used."""


@dataclass(frozen=True)
class Pulled:
    """What a peer answered: versions that became known there after what was known here before."""

    versions: list[Version]
    progress: Peer
    refused: dict[str, str]
    """Files there that it cannot record, and why."""


class Door:
    """A peer as ``TRIBRICK["SYNC"]["peers"]`` has it: ``name``, ``address`` (``user@host``), and options of SSH."""

    def __init__(self, entry: Mapping[str, Any]) -> None:
        unknown = set(entry) - {"name", "address"} - _OPTIONS
        if unknown or not {"name", "address"} <= set(entry):
            raise ImproperlyConfigured(
                f'TRIBRICK["SYNC"]["peers"]: {dict(entry)!r} needs name and address, and may have '
                f"{', '.join(sorted(_OPTIONS))}"
            )
        self.name = str(entry["name"])
        if not NODE.fullmatch(self.name):
            raise ImproperlyConfigured(f'TRIBRICK["SYNC"]["peers"]: {self.name!r} cannot be the name of a peer')
        options = {key: value for key, value in entry.items() if key in _OPTIONS}
        # Its address has a path; a door needs none.
        self._ssh = SshCopy(self.name, f"{entry['address']}:/", **options)

    def pull(self, known: Peer, *, scan: bool) -> Pulled:
        """Ask for what is new there. Raises :class:`PeerAway`."""
        ask = f"tribrick-sync 1 changes {known.seq} {known.state or '-'} {'scan' if scan else 'look'}"
        command = [*self._ssh._command(), "-T", "--", self._ssh._to, ask]
        try:
            with contextlib.closing(_lines(_run(command, b"", CONNECT + SILENCE, self.name), self.name)) as lines:
                return self._parsed(lines)
        except (CopyAway, BadVersion) as error:
            raise PeerAway(getattr(error, "errno", None) or errno.EPROTO, _said(self.name, error)) from error

    def _parsed(self, lines: Iterator[Any]) -> Pulled:
        head: Any = next((line for line in lines if line != {"busy": True}), None)
        try:
            state, start, refused = str(head["state"]), int(head["after"]), dict(head["scan"].get("refused", {}))
            if head["tribrick-sync"] != 1 or len(state) != 32:
                raise ValueError("another protocol")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise CopyAway(errno.EPROTO, f"{self.name}: this is not the answer of a door") from error
        found: list[Version] = []
        last, ended = start, False
        for line in lines:
            if ended or line == "end":
                ended = not ended
                continue
            if not (isinstance(line, list) and len(line) == 2 and type(line[0]) is int and line[0] > last):
                raise CopyAway(errno.EPROTO, f"{self.name}: {str(line)[:100]!r} is not a numbered version")
            last = line[0]
            found.append(parse(line[1]))
        if not ended:
            raise CopyAway(errno.EPROTO, f"{self.name}: the answer broke off")
        return Pulled(found, Peer(self.name, state, last, 0.0), {str(key): str(why) for key, why in refused.items()})

    def wake(self) -> bool:
        """Tell the peer that something is new here; return whether it was told."""
        command = [*self._ssh._command(), "-T", "--", self._ssh._to, "tribrick-sync 1 wake"]
        try:
            done = subprocess.run(
                command, stdin=subprocess.DEVNULL, capture_output=True, timeout=CONNECT + SILENCE, check=False,
                env=_plain(),
            )  # fmt: skip
        except (OSError, subprocess.TimeoutExpired):
            return False
        return done.returncode == 0

    def fetch(self, fetch: Fetch, side: Side) -> tuple[set[str], str]:
        """Bring contents into the history; return those that came, and what rsync complained about.

        rsync starts from the content that a file had before, and from what an interrupted transfer left.
        """
        area = side.history / "fetch"
        new, partial = area / "new", area / "partial"
        shutil.rmtree(new, ignore_errors=True)
        partial.mkdir(mode=0o700, parents=True, exist_ok=True)
        for sha256, basis in fetch.contents:
            (new / sha256[:2]).mkdir(mode=0o700, parents=True, exist_ok=True)
            if basis and side.has(basis):
                with contextlib.suppress(OSError):
                    os.link(side.object(basis), new / sha256[:2] / sha256)
        complaint = self._rsync(fetch, new, partial)
        came: set[str] = set()
        for sha256, _basis in fetch.contents:
            path = new / sha256[:2] / sha256
            with contextlib.suppress(FileNotFoundError):
                descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
                try:
                    right = _copy(descriptor, None) == sha256
                finally:
                    os.close(descriptor)
                if right:
                    came.add(sha256)
        side.keep((new / sha256[:2] / sha256, sha256) for sha256 in came)
        shutil.rmtree(new, ignore_errors=True)
        return came, complaint

    def _rsync(self, fetch: Fetch, new: Path, partial: Path) -> str:
        command = ["rsync", f"--rsh={shlex.join([*self._ssh._command(), '-T'])}", "--times", "--ignore-times"]
        command += ["--no-implied-dirs", "--omit-dir-times", "--files-from=-", "--from0"]
        command += [f"--partial-dir={partial}", f"--timeout={max(1, round(SILENCE))}"]
        command += ["--compress"] if fetch.compress else []
        names = b"".join(f"{sha256[:2]}/{sha256}\0".encode() for sha256, _basis in fetch.contents)
        limit = CONNECT + SILENCE + fetch.size / float(setting("MINIMUM_RATE"))
        address = f"{self._ssh._login_host}:./"
        with tempfile.TemporaryFile() as complaints:
            try:
                process = subprocess.Popen(
                    [*command, address, f"{new}/"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=complaints,
                    env=_plain(),
                )  # fmt: skip
            except FileNotFoundError as error:
                raise PeerAway(errno.ENOENT, "rsync is not installed here") from error
            try:
                # Its output ends when its last process has: one of them may still put aside what has arrived.
                process.communicate(names, timeout=limit)
            except subprocess.TimeoutExpired:
                process.terminate()  # lets rsync keep what has arrived, for the next attempt
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.communicate(timeout=CONNECT)
                return f"{self.name}: rsync did not end within {limit:.0f} s"
            finally:
                process.kill()
                process.wait()
            if process.returncode == 0:
                return ""
            complaints.seek(0)
            said = " ".join(complaints.read(2000).decode(errors="replace").split())[:500]
            return f"{self.name}: rsync ended with {process.returncode}: {said}"


def _said(name: str, error: Exception) -> str:
    text = (error.strerror or str(error)) if isinstance(error, OSError) else str(error)
    return text if text.startswith(name) else f"{name}: {text}"


def doors(entries: Iterable[Mapping[str, Any]]) -> list[Door]:
    """Return the peers of a setting."""
    found = [Door(entry) for entry in entries]
    if len({door.name for door in found}) != len(found):
        raise ImproperlyConfigured('TRIBRICK["SYNC"]["peers"]: two peers have the same name')
    return found
