# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""What the modules of the site share: asking it over its socket, and comparing what it was started with."""

from __future__ import annotations

import hashlib
import http.client
import os
import socket
import time
from collections.abc import Callable, Iterable


class UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket."""

    def __init__(self, path: str, timeout: float) -> None:
        super().__init__("localhost", timeout=timeout)
        self.path = path

    def connect(self) -> None:
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(self.path)


def ask(path: str, target: str, host: str, timeout: float) -> tuple[int | None, str]:
    """Status and the begin of the answer; the status is None when there was no answer."""
    connection = UnixConnection(path, timeout)
    try:
        connection.request("GET", target, headers={"Host": host, "X-Forwarded-Proto": "https", "Connection": "close"})
        answer = connection.getresponse()
        text = answer.read(2000).decode("utf-8", "replace")
        return answer.status, " ".join(text.split())[:300]
    except (OSError, http.client.HTTPException) as error:
        return None, f"{type(error).__name__}: {error}"
    finally:
        connection.close()


def wait_ready(
    probe: Callable[[float], tuple[int | None, str]], seconds: float, pause: float = 0.2
) -> tuple[bool, str]:
    """Probe until 200 or the deadline; also return what was seen last."""
    deadline = time.monotonic() + seconds
    while True:
        status, text = probe(max(0.5, min(10.0, deadline - time.monotonic())))
        seen = f"{status} {text}" if status is not None else f"no answer ({text})"
        if status == 200:
            return True, seen
        if time.monotonic() >= deadline:
            return False, seen
        time.sleep(pause)


def started_with(inputs: Iterable[str], release: str) -> str:
    """The record that the unit writes when it starts: a hash of each input, then the release."""
    lines = []
    for path in inputs:
        try:
            with open(path, "rb") as stream:
                lines.append(f"{hashlib.file_digest(stream, 'sha256').hexdigest()}  {path}\n")
        except FileNotFoundError:
            lines.append(f"-  {path}\n")
    return "".join(lines) + f"{os.path.realpath(release)}\n"


def differences(recorded: str, wanted: str) -> list[str]:
    """Names of what differs between two records."""
    before = dict(
        reversed(line.split("  ", 1)) if "  " in line else ("release", line) for line in recorded.splitlines()
    )
    after = dict(reversed(line.split("  ", 1)) if "  " in line else ("release", line) for line in wanted.splitlines())
    return [name for name in after if before.get(name) != after[name]] + [name for name in before if name not in after]
