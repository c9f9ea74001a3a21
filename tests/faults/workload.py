"""Seeded clients: they upload, replace, delete and read through all nodes, and rename on the mounts."""

from __future__ import annotations

import itertools
import json
import queue
import random
import subprocess
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import IO
from urllib.parse import quote

import requests
from urllib3.exceptions import ConnectTimeoutError, NewConnectionError

from faults.checker import wrong_bytes
from faults.history import CLASSES, Event, History, content
from kit.lab import NODES, Lab
from kit.run import KitError

CONNECT, ANSWER = 3.0, 20.0  # how long a client waits: for a connection, then for (the rest of) an answer
BUDGET = 24 * 1024 * 1024  # bytes that one client leaves alive: the disks are small
PAUSE = 0.02  # at most so long does a client wait between two operations
EXTENSION = ".bin"  # no picture: the site makes no thumbnail of it

# Runs on a node; makes and renames files on the mount. One line of JSON in, one out. Contents as in history.content.
MOUNT_CLIENT = """
import json, os, random, sys
for line in sys.stdin:
    ask = json.loads(line)
    try:
        if ask["what"] == "create":
            data = random.Random(ask["content"]).randbytes(ask["size"])
            handle = os.open(ask["name"], os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o640)
            while data:
                data = data[os.write(handle, data):]
        else:
            os.rename(ask["name"], ask["target"])
            handle = os.open(ask["target"], os.O_WRONLY)
        os.fsync(handle)  # of the file, under its final name: nothing else makes a name durable on Gluster
        os.close(handle)
        said = ""
    except OSError as error:
        said = str(error)
    print(json.dumps({"op": ask["op"], "error": said}), flush=True)
"""


@dataclass
class Known:
    """Files that were acknowledged, for readers to choose from; shared by all clients."""

    lock: threading.Lock = field(default_factory=threading.Lock)
    files: dict[str, tuple[str, int]] = field(default_factory=dict)  # stored name -> label, size
    recent: list[str] = field(default_factory=list)

    def add(self, name: str, label: str, size: int) -> None:
        """A file is there from now on."""
        with self.lock:
            self.files[name] = (label, size)
            self.recent = [*self.recent[-19:], name]

    def drop(self, name: str) -> None:
        """A file will be deleted: nobody may expect it any more."""
        with self.lock:
            self.files.pop(name, None)
            self.recent = [one for one in self.recent if one != name]

    def choose(self, chance: random.Random) -> tuple[str, str, int] | None:
        """Return name, label and size of a file, a recent one every second time."""
        with self.lock:
            if not self.files:
                return None
            pool = self.recent if self.recent and chance.random() < 0.5 else list(self.files)
            name = chance.choice(pool)
            return (name, *self.files[name])


@dataclass
class Workload:
    """All clients of one run."""

    lab: Lab
    token: str
    seed: str
    history: History
    clients: int = 8
    readers: Sequence[str] = tuple(NODES)
    largest: int = 8 * 1024 * 1024
    pause: float = PAUSE
    files: int = 0  # that a client keeps at most; 0: as many as fit into BUDGET
    known: Known = field(default_factory=Known)
    stop: threading.Event = field(default_factory=threading.Event)
    threads: list[threading.Thread] = field(default_factory=list)
    urls: dict[str, str] = field(default_factory=dict)
    directory: str = ""  # on the mount, for renames; empty: none are made
    problems: list[str] = field(default_factory=list)  # errors of the clients themselves

    def start(self) -> None:
        """Let the clients run."""
        self.urls = {node: self.lab.url(node) for node in NODES}
        for number in range(self.clients):
            self._thread(self._uploader, f"c{number}")
        for node in self.readers:
            self._thread(self._reader, node)
        if self.directory:
            for node in self.readers:
                self._thread(self._renamer, node)

    def finish(self, patience: float = 120.0) -> None:
        """Let each end what it is doing."""
        self.stop.set()
        for thread in self.threads:
            thread.join(patience)

    def tidy(self) -> None:
        """Delete all that the clients have stored and still have. Fails if a node does not."""
        hosts = itertools.cycle(NODES)
        with ThreadPoolExecutor(self.clients) as pool:
            session = self._session()
            answers = pool.map(
                lambda one: self._ask(session, "DELETE", one[1], f"/api/media/{quote(one[0])}"),
                zip(list(self.known.files), hosts, strict=False),
            )
            bad = [note or str(answer and answer.status_code) for answer, _, note in answers
                   if answer is None or answer.status_code not in (204, 404)]  # fmt: skip
        if bad:
            raise KitError(f"{len(bad)} files could not be deleted: {bad[0]}")

    def _thread(self, work: Callable[[str], None], name: str) -> None:
        def guarded() -> None:
            try:
                work(name)
            except Exception as error:  # noqa: BLE001 - a client that died is a finding of its own, not silence
                self.problems.append(f"client {name}: {error!r}")

        thread = threading.Thread(target=guarded, name=name, daemon=True)
        self.threads.append(thread)
        thread.start()

    def _size(self, chance: random.Random) -> int:
        """Choose a size: each class often enough, the largest not too often."""
        word = chance.choices(list(CLASSES), weights=(25, 27, 27, 14, 7))[0]
        return min(chance.choice(CLASSES[word]), self.largest)

    # --- the web addresses

    def _uploader(self, client: str) -> None:
        chance = random.Random(f"{self.seed} {client}")
        session = self._session()
        own: dict[str, tuple[str, int]] = {}
        number = 0
        while not self.stop.wait(self.pause * chance.random()):
            alive = sum(size for _, size in own.values())
            what = chance.choices(("upload", "read", "replace", "delete"), weights=(40, 35, 12, 13))[0]
            if alive > BUDGET or (self.files and len(own) > self.files):
                name = max(own, key=lambda one: own[one][1])
                what = "delete"
            elif own:
                name = chance.choice(list(own))
            elif what in ("replace", "delete"):
                what = "upload"
            host = chance.choice(list(NODES))
            if what == "read":
                self._read(session, client, host, chance)
            elif what == "delete":
                self.known.drop(name)
                del own[name]
                self._delete(session, client, host, name)
            else:
                number += 1
                label, size = f"{client}-{number:06d}", self._size(chance)
                stored = self._send(session, client, host, what, label, size, name if what == "replace" else "", chance)
                if stored:
                    own[stored] = (label, size)
                    self.known.add(stored, label, size)

    def _session(self) -> requests.Session:
        session = requests.Session()
        session.headers["Authorization"] = f"Token {self.token}"
        return session

    def _ask(
        self, session: requests.Session, method: str, host: str, path: str, **more: object
    ) -> tuple[requests.Response | None, str, str]:
        """Make one request; return the answer or None, then what an error means (fail, info) and says."""
        try:
            answer = session.request(
                method,
                self.urls[host] + path,
                timeout=(CONNECT, ANSWER),
                allow_redirects=False,
                **more,  # type: ignore[arg-type]
            )
        except requests.ConnectionError as error:
            cause = getattr(error.args[0], "reason", None) if error.args else None
            never_sent = isinstance(cause, (NewConnectionError, ConnectTimeoutError))
            return None, "fail" if never_sent else "info", type(cause or error).__name__
        except requests.RequestException as error:
            return None, "info", type(error).__name__
        return answer, "ok", ""

    def _send(
        self,
        session: requests.Session,
        client: str,
        host: str,
        what: str,
        label: str,
        size: int,
        old: str,
        chance: random.Random,
    ) -> str:
        """Upload or replace; every second time an unknown outcome is asked for again, with the same key."""
        op = self.history.number()
        data = content(self.seed, label, size)
        self.history.add(Event(op, "invoke", what, 0.0, client, host, label, size, target=old))
        method, path = ("PUT", f"/api/media/{quote(old)}") if what == "replace" else ("POST", "/api/media/")
        again = chance.random() < 0.5
        unknown = False
        while True:
            answer, kind, note = self._ask(
                session, method, host, path,
                headers={"Idempotency-Key": f"{self.seed}-{label}"}, files={"file": (f"{label}{EXTENSION}", data)},
            )  # fmt: skip
            status = 0 if answer is None else answer.status_code
            name = ""
            if answer is not None and status == 201:
                row = answer.json()
                name = row["name"]
                if row["size"] != size:
                    note = f"acknowledged as {row['size']} bytes"
            elif answer is not None:
                kind = "info" if status >= 500 else "fail"
                note = _refusal(answer)
            unknown |= kind == "info"
            if kind == "info" and again and not self.stop.is_set():
                again = False
                host = chance.choice([node for node in NODES if node != host])
                continue
            if kind == "fail" and unknown:
                kind = "info"
            self.history.add(Event(op, kind, what, 0.0, client, host, label, size, name, status=status, note=note))
            return name

    def _delete(self, session: requests.Session, client: str, host: str, name: str) -> None:
        op = self.history.number()
        self.history.add(Event(op, "invoke", "delete", 0.0, client, host, name=name))
        answer, kind, note = self._ask(session, "DELETE", host, f"/api/media/{quote(name)}")
        status = 0 if answer is None else answer.status_code
        if answer is not None and status != 204:
            kind, note = ("info" if status >= 500 else "fail"), _refusal(answer)
        self.history.add(Event(op, kind, "delete", 0.0, client, host, name=name, status=status, note=note))

    def _read(self, session: requests.Session, client: str, host: str, chance: random.Random) -> None:
        chosen = self.known.choose(chance)
        if chosen is None:
            return
        name, label, size = chosen
        op = self.history.number()
        self.history.add(Event(op, "invoke", "read", 0.0, client, host, label, size, name))
        answer, kind, note = self._ask(session, "GET", host, f"/media/{quote(name)}")
        status = 0 if answer is None else answer.status_code
        seen = ""
        if answer is not None and status == 200:
            seen = wrong_bytes(content(self.seed, label, size), answer.content)
        elif answer is not None and status not in (404, 410):
            kind, note = "fail", _refusal(answer)
        elif kind == "info":
            kind = "fail"  # nothing is unknown of a read without an answer
        end = Event(op, kind, "read", 0.0, client, host, label, size, name, status=status, seen=seen, note=note)
        self.history.add(end)

    def _reader(self, node: str) -> None:
        """Watch one node all the time."""
        chance = random.Random(f"{self.seed} reader {node}")
        session = self._session()
        while not self.stop.wait(3 * self.pause):
            self._read(session, f"reader-{node}", node, chance)

    # --- the mounts

    def _renamer(self, node: str) -> None:
        chance = random.Random(f"{self.seed} mount {node}")
        mount = MountClient(self.lab, node)
        own: list[tuple[str, str, int]] = []  # label, name, size
        number = 0
        while not self.stop.wait(0.1 + 10 * self.pause * chance.random()):
            op = self.history.number()
            if own and chance.random() < 0.6:
                label, name, size = own.pop(chance.randrange(len(own)))
                target = f"{self.directory}/{label}-{op}"
                event = Event(op, "invoke", "rename", 0.0, f"m-{node}", node, label, size, name, target)
            elif len(own) < 40:
                number += 1
                label, target, size = f"m-{node}-{number:06d}", "", min(self._size(chance), 131_073)
                name = f"{self.directory}/{label}-{op}"
                event = Event(op, "invoke", "create", 0.0, f"m-{node}", node, label, size, name)
            else:
                continue
            self.history.add(event)
            error = mount.ask(
                {
                    "op": op, "what": event.what, "name": f"{mount.root}/{name}", "target": f"{mount.root}/{target}",
                    "size": size, "content": f"{self.seed} {label} {size}",
                }
            )  # fmt: skip
            kind = "info" if error else "ok"
            self.history.add(
                Event(op, kind, event.what, 0.0, event.client, node, label, size, name, target, note=error)
            )
            if not error:
                own.append((label, target or name, size))
        mount.close()


def _refusal(answer: requests.Response) -> str:
    wait = answer.headers.get("Retry-After")
    return f"{answer.text[:120].strip()}{'' if wait is None else f' Retry-After {wait}'}"


class MountClient:
    """A program on a node that works on its mount; started anew after it hung or died."""

    def __init__(self, lab: Lab, node: str) -> None:
        """Start nothing yet."""
        self.lab, self.node = lab, node
        self.root = str(lab.site_variables()["tribrick_media_root"])
        self.process: subprocess.Popen[str] | None = None
        self.answers: queue.Queue[str] = queue.Queue()

    def ask(self, question: dict[str, object]) -> str:
        """Return an empty text when it was done, else what went wrong; a time-out is that too."""
        if self.process is None or self.process.poll() is not None:
            self.process = subprocess.Popen(
                ["docker", "exec", "-i", self.lab.container(self.node), "python3", "-c", MOUNT_CLIENT],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            self.answers = queue.Queue()
            threading.Thread(target=self._listen, args=(self.process.stdout, self.answers), daemon=True).start()
        assert self.process.stdin is not None
        try:
            self.process.stdin.write(json.dumps(question) + "\n")
            self.process.stdin.flush()
            line = self.answers.get(timeout=ANSWER)
        except (OSError, queue.Empty) as error:
            self.close()
            return type(error).__name__
        try:
            return str(json.loads(line)["error"])
        except ValueError:  # nothing, or what Docker says of a container that is gone
            self.close()
            return "the node died"

    @staticmethod
    def _listen(output: IO[str], answers: queue.Queue[str]) -> None:
        for line in output:
            answers.put(line)
        answers.put("")

    def close(self) -> None:
        """End the program; one that hangs on the mount ends when the mount lets it."""
        if self.process is not None:
            self.process.kill()
            self.process = None
