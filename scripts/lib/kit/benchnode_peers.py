"""Runs on the nodes in the site's environment, for ``./scripts/bench peers``.

``benchnode_peers.py read PORT WRITER``         reads the files that WRITER, an address, names, until they are whole
``benchnode_peers.py write PORT READER...``     stores files, as it is told on standard input, and has them read

All times are taken by the writer's clock: from the start of a save until the last reader has told that it has read
all bytes. A name is told after the save only, as a site does. Both programs end, and clean up, when their standard
input does.
"""

from __future__ import annotations

import contextlib
import hashlib
import itertools
import json
import os
import random
import shutil
import socket
import sys
import threading
import time
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

DIRECTORY = "bench-peers"  # below the root of each way
LOOK = 0.002  # seconds between two looks at a file that is not there yet


class Told(NamedTuple):
    """A file that somebody shall read."""

    path: str
    size: int
    sha256: str


def say(answer: dict[str, Any]) -> None:
    """Answer with one line."""
    print(json.dumps(answer), flush=True)


# Reading


def look(file: Told) -> str | None:
    """Return None if all of it can be read here, else what was seen."""
    try:
        content = Path(file.path).read_bytes()
    except OSError as error:  # not there yet; what stays an error is told when time is up
        return f"{type(error).__name__}: {error}"
    if len(content) != file.size:
        return f"{file.path} has {len(content)} of {file.size} bytes"
    return None if hashlib.sha256(content).hexdigest() == file.sha256 else f"{file.path} has other bytes"


def read_all(files: Sequence[Told], deadline: float) -> dict[str, Any]:
    """Read files, one after the other, each as soon as it is whole; tell what is missing when time is up."""
    end = time.monotonic() + deadline
    for number, file in enumerate(files):
        while (seen := look(file)) is not None:
            if time.monotonic() > end:
                return {"missing": len(files) - number, "seen": seen}
            time.sleep(LOOK)  # between two looks; the deadline is above
    return {"missing": 0}


def serve(listener: socket.socket, writer: str) -> None:
    """Answer the writer, and nobody else, for ever."""
    while True:
        connection, (address, *_rest) = listener.accept()
        with connection, connection.makefile("rw", encoding="utf-8") as stream:
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            for line in stream if address == writer else ():
                asked = json.loads(line)
                answer = read_all([Told(*file) for file in asked["files"]], asked["deadline"])
                stream.write(json.dumps(answer) + "\n")
                stream.flush()


def read(port: int, writer: str) -> None:
    """Be a reader until standard input ends."""
    with socket.create_server(("", port), reuse_port=False) as listener:
        threading.Thread(target=serve, args=(listener, writer), daemon=True).start()
        say({"ready": port})
        sys.stdin.read()


# Writing


class Reader:
    """A connection to another node's reader."""

    def __init__(self, host: str, port: int) -> None:
        self.host = host
        self.socket = socket.create_connection((host, port), timeout=30)
        self.socket.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self.stream = self.socket.makefile("rw", encoding="utf-8")

    def tell(self, files: Sequence[Told], deadline: float) -> None:
        """Name the files that it shall read."""
        self.socket.settimeout(deadline + 30)
        self.stream.write(json.dumps({"files": files, "deadline": deadline}) + "\n")
        self.stream.flush()

    def answer(self) -> dict[str, Any]:
        """Wait until it has read them, or has given up."""
        line = self.stream.readline()
        if not line:
            raise RuntimeError(f"the reader on {self.host} has ended")
        answer: dict[str, Any] = json.loads(line)
        return answer


class Writer:
    """Stores files in each way and waits until they can be read on all nodes."""

    def __init__(self, readers: Sequence[Reader]) -> None:
        from django.conf import settings

        self.readers = readers
        self.media = Path(settings.MEDIA_ROOT)
        self.storages: dict[str, Any] = {}

    def storage(self, way: str, root: str) -> Any:
        """Return the storage of a way: this kit's on the volume, Django's own anywhere else."""
        if way not in self.storages:
            from django.core.files.storage import FileSystemStorage

            from tribrick.storage import VolumeStorage

            # It keeps no rows: the catalog's app is not installed here.
            self.storages[way] = VolumeStorage() if way == "ours" else FileSystemStorage(location=root)
        return self.storages[way]

    def prepare(self) -> None:
        """Make the directories that a rollout makes for a site."""
        storage = self.storage("ours", "")
        digits = ["".join(one) for one in itertools.product("0123456789abcdef", repeat=storage.hash_width)]
        for path in itertools.product(digits, repeat=storage.hash_levels):
            (self.media / DIRECTORY).joinpath(*path).mkdir(parents=True)

    def save(self, storage: Any, content: bytes) -> Told:
        """Save one file under a name that nobody has used."""
        from django.core.files.base import ContentFile

        name = storage.save(f"{DIRECTORY}/{random.getrandbits(64):016x}.jpg", ContentFile(content))
        return Told(storage.path(name), len(content), hashlib.sha256(content).hexdigest())

    def have_read(self, files: Sequence[Told], deadline: float) -> None:
        """Wait until the files are whole here and on all other nodes."""
        for reader in self.readers:
            reader.tell(files, deadline)
        answers = {"this node": read_all(files, deadline)} | {reader.host: reader.answer() for reader in self.readers}
        for host, answer in answers.items():
            if answer["missing"]:
                raise RuntimeError(
                    f"{host} lacked {answer['missing']} of {len(files)} files after {deadline:g} s; {answer['seen']}"
                )

    def latency(self, storage: Any, count: int, size: int, period: float, deadline: float) -> list[float]:
        """Store files one by one; return the milliseconds until each can be read everywhere.

        *period*: what looks for new files only so often is met anywhere in its period, not always after its last look.
        """
        found = list[float]()
        for _ in range(count):
            content = os.urandom(size)
            time.sleep(random.random() * period)  # noqa: S311  no secret; the moment in *period*, see above
            started = time.perf_counter()
            self.have_read([self.save(storage, content)], deadline)
            found.append((time.perf_counter() - started) * 1000)
        return found

    def burst(self, storage: Any, count: int, size: int, deadline: float) -> float:
        """Store files without a pause; return the seconds until all can be read everywhere."""
        contents = [os.urandom(size) for _ in range(count)]
        started = time.perf_counter()
        self.have_read([self.save(storage, content) for content in contents], deadline)
        return time.perf_counter() - started

    def do(self, command: dict[str, Any]) -> dict[str, Any]:
        """Do what is asked."""
        storage = self.storage(command["way"], command["root"])
        words = (command["count"], command["size"])
        if command["do"] == "latency":
            return {"ms": self.latency(storage, *words, command["period"], command["deadline"])}
        return {"seconds": self.burst(storage, *words, command["deadline"])}

    def clean(self) -> None:
        """Remove what lies on the volume, also of a run that was killed; the rest is removed by who made it."""
        if (place := self.media / DIRECTORY).exists():
            shutil.rmtree(place)


def configure() -> None:
    """Take the site's volume, and nothing else of the site: no database."""
    import django
    from django.conf import Settings, settings

    site: Any = Settings(os.environ["DJANGO_SETTINGS_MODULE"])
    settings.configure(
        MEDIA_ROOT=site.MEDIA_ROOT,
        SECRET_KEY=site.SECRET_KEY,
        FILE_UPLOAD_PERMISSIONS=site.FILE_UPLOAD_PERMISSIONS,
        TRIBRICK={key: value for key, value in site.TRIBRICK.items() if key.startswith(("SENTINEL", "HASH"))},
        USE_TZ=True,
    )
    django.setup()


def write(port: int, hosts: Iterable[str]) -> None:
    """Do what standard input says until it ends."""
    configure()
    writer = Writer([Reader(host, port) for host in hosts])
    writer.clean()
    try:
        writer.prepare()
        say({"ready": len(writer.readers)})
        for line in sys.stdin:
            say(writer.do(json.loads(line)))
    finally:
        writer.clean()


def main() -> None:
    """Run the command line; an error is the answer."""
    what, port, *hosts = sys.argv[1:]
    try:
        if what == "read":
            read(int(port), hosts[0])
        else:
            write(int(port), hosts)
    except Exception as error:
        with contextlib.suppress(BrokenPipeError):
            say({"error": f"{type(error).__name__}: {error}"})
        raise


if __name__ == "__main__":
    main()
