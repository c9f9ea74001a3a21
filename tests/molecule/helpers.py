"""What the scenarios' tests share: the scenario's lab seen from outside (HTTP, SSH, Docker)."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import os
import random
import re
import secrets
import shlex
import subprocess
import sys
import threading
import time
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import urlsplit

import requests
import yaml
from ansible.parsing.vault import VaultLib, VaultSecret

from kit.lab import ROOT, VIP, Lab

NODES = ("node1", "node2", "node3")
SITE = "the address"  # in the place of a host: the address that the nodes hold in turn
LONG = os.environ.get("TRIBRICK_SET", "short") == "long"
SEED = os.environ.get("TRIBRICK_SEED", "0")
T = TypeVar("T")

# One request of a node to port 7443 of another, with the certificate named; run on the node, which may have no curl.
_PEER = """
import base64, http.client, json, ssl, sys
q = json.load(sys.stdin)
context = ssl.create_default_context(cafile="/etc/tribrick/receiver/ca.crt")
if q["certificate"]:
    context.load_cert_chain(q["certificate"] + ".crt", q["certificate"] + ".key")
c = http.client.HTTPSConnection(q["node"], 7443, timeout=20, context=context)
try:
    c.request(q["method"], q["path"], body=base64.b64decode(q["body"]) or None, headers=q["headers"])
    a = c.getresponse()
    print(json.dumps([a.status, base64.b64encode(a.read()).decode()]))
except (OSError, http.client.HTTPException) as error:
    print(json.dumps([0, base64.b64encode(repr(error).encode()).decode()]))
"""
CLIENT = "/etc/tribrick/receiver/client"

# Enough of a PNG for a picture that was never there before; the chunk `tEXt` makes it unique.
_PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360f8cf500f0003860180"
    "5a347d6b0000000049454e44ae426082"
)


def chance(purpose: str) -> random.Random:
    """Random numbers that the commit decides; the purpose keeps two tests' numbers apart."""
    return random.Random(f"{SEED} {purpose}")


def picture(size: int = 20_000) -> bytes:
    """Return a PNG with bytes that no earlier call returned; what follows its end is ignored by readers."""
    return _PNG + secrets.token_bytes(size)


def sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()


def wait_until(what: str, probe: Callable[[], T], deadline: float, interval: float = 0.2) -> T:
    """Ask until the answer is true; fail with what was waited for and what was seen last."""
    end, seen = time.monotonic() + deadline, "nothing"
    while True:
        try:
            value = probe()
            if value:
                return value
            seen = repr(value)
        except (AssertionError, OSError, subprocess.SubprocessError) as error:
            seen = f"{type(error).__name__}: {error}"
        if time.monotonic() > end:
            raise AssertionError(f"Waited {deadline:.0f} s for {what}; at the end: {seen[:1500]}")
        time.sleep(interval)


@dataclass
class Rollout:
    """A finished ansible-playbook."""

    code: int
    output: str
    seconds: float

    @property
    def text(self) -> str:
        """The output on one line, since Ansible folds long sentences."""
        return " ".join(self.output.split())

    def changed(self) -> dict[str, int]:
        """Host -> tasks that changed something, by the recap."""
        found = dict(re.findall(r"^(\S+)\s+: ok=\d+\s+changed=(\d+)", self.output, re.MULTILINE))
        assert found, f"no recap in:\n{self.output[-3000:]}"
        return {host: int(number) for host, number in found.items()}

    def tasks_that_changed(self) -> list[str]:
        """Return task and host of each change."""
        found, task = [], ""
        for line in self.output.splitlines():
            if named := re.match(r"TASK \[(.*)\] \*", line):
                task = named[1]
            elif host := re.match(r"changed: \[([^\]]+)\]", line):
                found.append(f"{task}: {host[1]}")
        return found

    def good(self) -> Rollout:
        """Fail unless the playbook succeeded."""
        assert self.code == 0, f"exit code {self.code}:\n{self.output[-5000:]}"
        return self

    def refused(self, *sentences: str) -> Rollout:
        """Fail unless the playbook refused with these words."""
        assert self.code != 0, "the rollout was not refused"
        for sentence in sentences:
            assert re.search(sentence, self.text), f"{sentence!r} is not in:\n{self.output[-5000:]}"
        return self


@dataclass
class Rig:
    """The scenario's lab."""

    lab: Lab
    token: str = ""
    password: str = ""
    known: dict[str, str] = field(default_factory=dict)  # stored name -> SHA-256, of everything that was acknowledged

    # --- hosts

    def container(self, host: str) -> str:
        return self.lab.container(host)

    def root(self, host: str, script: str, check: bool = True, timeout: float = 60, text_in: str = "") -> str:
        """Run a shell script as root in a host's container; return its output."""
        done = self.run_root(host, script, timeout=timeout, text_in=text_in)
        said = f"{host}: {script!r} gave {done.returncode}: {done.stdout} {done.stderr}"
        assert not check or done.returncode == 0, said
        return done.stdout

    def run_root(
        self, host: str, script: str, timeout: float = 60, text_in: str = ""
    ) -> subprocess.CompletedProcess[str]:
        """As `root`, with the exit code."""
        return subprocess.run(
            ["docker", "exec", "-i", self.container(host), "timeout", "-k", "2", str(timeout), "sh", "-c", script],
            capture_output=True, text=True, input=text_in, timeout=timeout + 30, check=False,
        )

    def ssh(self, host: str, script: str, timeout: float = 60) -> str:
        """Run a shell script as root over SSH, the operators' way."""
        done = subprocess.run(
            [*self.lab.ssh(host), f"sudo sh -c {shlex.quote(script)}"],
            capture_output=True, text=True, stdin=subprocess.DEVNULL, timeout=timeout, check=False,
        )
        assert done.returncode == 0, f"{host}: {script!r} gave {done.returncode}: {done.stdout} {done.stderr}"
        return done.stdout

    def everywhere(self, work: Callable[[str], T], hosts: Sequence[str] = NODES) -> dict[str, T]:
        """Do something for several hosts side by side."""
        with ThreadPoolExecutor(len(hosts)) as pool:
            return dict(zip(hosts, pool.map(work, hosts), strict=True))

    def docker(self, *words: str, timeout: float = 180) -> str:
        done = subprocess.run(["docker", *words], capture_output=True, text=True, timeout=timeout, check=False)
        assert done.returncode == 0, f"docker {words}: {done.stderr}"
        return done.stdout

    def running(self, host: str) -> bool:
        return self.docker("inspect", "--format={{.State.Running}}", self.container(host)).strip() == "true"

    def address(self, host: str) -> str:
        return self.lab.addresses[host]

    def peer(
        self, asker: str, method: str, node: str, path: str, body: bytes = b"",
        headers: dict[str, str] | None = None, certificate: str = CLIENT,
    ) -> tuple[int, bytes]:
        """Ask a node's port for its peers from another node; return status (0: no answer) and body."""
        question = {
            "method": method, "node": node, "path": path, "headers": headers or {}, "certificate": certificate,
            "body": base64.b64encode(body).decode(),
        }
        status, said = json.loads(
            self.root(asker, f"python3 -c {shlex.quote(_PEER)}", text_in=json.dumps(question))
        )
        return status, base64.b64decode(said)

    # --- Gluster

    def gluster(self, host: str, command: str, timeout: float = 60) -> ET.Element:
        """Run a gluster command on a node; return the parsed XML."""
        return ET.fromstring(self.root(host, f"gluster --mode=script --xml {command}", timeout=timeout))  # noqa: S314 - our own lab

    @property
    def variables(self) -> dict[str, Any]:
        return self.lab.site_variables()

    @property
    def volume(self) -> str:
        return str(self.variables["tribrick_volume"])

    @property
    def brick(self) -> str:
        return str(self.variables["tribrick_brick_path"])

    @property
    def mount(self) -> str:
        return str(self.variables["tribrick_media_root"])

    def bricks_online(self, host: str = "node1") -> list[str]:
        """Return the nodes whose bricks are online, as one node sees it."""
        tree = self.gluster(host, f"volume status {self.volume}")
        return [
            node.findtext("hostname", "")
            for node in tree.iter("node")
            if node.findtext("path") == self.brick and node.findtext("status") == "1"
        ]

    def unhealed(self, host: str = "node1") -> int:
        """Return how many entries wait to be healed; a brick that does not answer is an error."""
        tree = self.gluster(host, f"volume heal {self.volume} info summary")
        numbers = [number.text or "" for number in tree.iter("totalNumberOfEntries")]
        assert len(numbers) == len(NODES) and all(number.isdigit() for number in numbers), f"heal info: {numbers}"
        return sum(map(int, numbers))

    def volume_state(self, host: str = "node1") -> dict[str, Any]:
        """Return what defines the volume: bricks, status, options."""
        tree = self.gluster(host, f"volume info {self.volume}")
        return {
            "status": tree.findtext(".//statusStr"),
            "replicas": tree.findtext(".//replicaCount"),
            "bricks": [brick.findtext("name") for brick in tree.iter("brick")],
            "options": {o.findtext("name"): o.findtext("value") for o in tree.iter("option")},
        }

    # --- web

    def url(self, host: str) -> str:
        return f"http://{self.vip}" if host == SITE else self.lab.url(host)

    @property
    def vip(self) -> str:
        return self.lab.address(VIP)

    def holders(self, hosts: Sequence[str] = NODES) -> list[str]:
        """Return the nodes that have the site's address on an interface; those that do not run have not."""
        ask = f"ip -oneline address show to {self.vip}"
        seen = self.everywhere(lambda host: self.running(host) and self.root(host, ask).strip(), hosts)
        return [host for host, held in seen.items() if held]

    def holder(self, deadline: float = 60) -> str:
        """Return the one node that has the address."""

        def one() -> str:
            held = self.holders()
            assert len(held) == 1, f"held by {held}"
            return held[0]

        return wait_until("one node to hold the address", one, deadline)

    def request(self, method: str, host: str, path: str, timeout: float = 30, **more: Any) -> requests.Response:
        return requests.request(method, self.url(host) + path, timeout=timeout, allow_redirects=False, **more)

    @property
    def auth(self) -> dict[str, str]:
        return {"Authorization": f"Token {self.token}"}

    def try_upload(
        self, host: str, content: bytes, name: str = "test.png", headers: dict[str, str] | None = None,
        data: dict[str, str] | None = None, timeout: float = 60,
    ) -> requests.Response:
        """Upload by the API; remember what was acknowledged."""
        answer = self.request("POST", host, "/api/media/", headers={**self.auth, **(headers or {})}, data=data or {},
                              files={"file": (name, content)}, timeout=timeout)
        if answer.status_code == 201:
            row = answer.json()
            assert row["sha256"] == sha256(content) and row["size"] == len(content), row
            if not row["name"].startswith("private/"):
                self.known[row["name"]] = row["sha256"]
        return answer

    def upload(self, host: str, content: bytes | None = None, name: str = "test.png", **more: Any) -> dict[str, Any]:
        """Upload by the API; fail unless it is acknowledged."""
        answer = self.try_upload(host, picture() if content is None else content, name, **more)
        assert answer.status_code == 201, f"{host} answered {answer.status_code}: {answer.text[:500]}"
        row = answer.json()
        assert isinstance(row, dict)
        return row

    def fetch(self, host: str, row: dict[str, Any], timeout: float = 30, **more: Any) -> requests.Response:
        return self.request("GET", host, urlsplit(row["url"]).path, timeout=timeout, **more)

    def ready(self, host: str) -> bool:
        answer = self.request("GET", host, "/readyz", timeout=10)
        assert answer.status_code == 200, f"{host} /readyz {answer.status_code}: {answer.text[:300]}"
        return True

    def wait_ready(self, deadline: float, hosts: Sequence[str] = NODES) -> None:
        for host in hosts:
            wait_until(f"{host} to be ready", lambda host=host: self.ready(host), deadline)

    def check_known(self, hosts: Sequence[str] = NODES) -> None:
        """Everything that was ever acknowledged is served unchanged by these nodes."""
        assert self.known, "nothing was uploaded before"
        for name, wanted in self.known.items():
            for host in hosts:
                answer = self.request("GET", host, f"/media/{name}")
                assert answer.status_code == 200, f"{host} {name}: {answer.status_code}"
                assert sha256(answer.content) == wanted, f"{host} {name}: other bytes"

    def settle(self, deadline: float, hosts: Sequence[str] = NODES) -> None:
        """Wait until all is well again: web, bricks, heal; then prove writes and reads."""
        self.wait_ready(deadline, hosts)
        wait_until("all bricks to be online", lambda: sorted(self.bricks_online()) == sorted(NODES), deadline)
        wait_until("heal to end", lambda: self.unhealed() == 0, deadline)
        self.check_known(hosts)
        for host in hosts:
            row = self.upload(host)
            for other in hosts:
                assert sha256(self.fetch(other, row).content) == row["sha256"]

    def account(self) -> None:
        """Make the tests' account and its token."""
        self.token, self.password = secrets.token_hex(20), secrets.token_urlsafe(12)
        script = (
            f"export P={self.password} K={self.token}; "
            "tribrick-manage ensure_account tester --superuser --password-env P --token-env K"
        )
        self.root("node1", script, timeout=120)

    # --- rollouts

    def arguments(self, *more: str, inventory: Path | None = None, password: Path | None = None) -> list[str]:
        return [
            str(Path(sys.executable).parent / "ansible-playbook"),
            f"--inventory={inventory or self.lab.inventory}",
            f"--vault-password-file={password or self.lab.vault_password}",
            *more, "site.yml",
        ]

    @property
    def environment(self) -> dict[str, str]:
        mine = {key: value for key, value in os.environ.items() if not key.startswith("ANSIBLE_")}
        return mine | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1", "LC_ALL": "C.UTF-8"}

    def rollout(self, *more: str, deadline: float = 900, **where: Path) -> Rollout:
        """Run site.yml to its end."""
        start = time.monotonic()
        done = subprocess.run(
            self.arguments(*more, **where), cwd=ROOT, env=self.environment, stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, timeout=deadline, check=False,
        )
        return Rollout(done.returncode, done.stdout, time.monotonic() - start)

    def secrets(self) -> dict[str, str]:
        """Return what the inventory's vault holds."""
        secret = VaultSecret(self.lab.vault_password.read_bytes().strip())
        text = VaultLib([("default", secret)]).decrypt((self.lab.inventory / "group_vars/all/vault.yml").read_bytes())
        return dict(yaml.safe_load(text))


@dataclass
class Load:
    """Continuous requests against all nodes; whatever is not as it should be is kept."""

    rig: Rig
    reads: int = 0
    writes: int = 0
    problems: list[str] = field(default_factory=list)
    longest: float = 0.0

    @contextlib.contextmanager
    def running(self) -> Iterator[Load]:
        """Keep two requests a node under way: one reads a picture and a page, one uploads."""
        stop = threading.Event()
        rows = [self.rig.upload(host) for host in NODES]

        def timed(what: str, ask: Callable[[], requests.Response], good: int) -> bool:
            start = time.monotonic()
            try:
                answer = ask()
                fault = "" if answer.status_code == good else f"{answer.status_code} {answer.text[:100]!r}"
            except requests.RequestException as error:
                fault = repr(error)
            self.longest = max(self.longest, time.monotonic() - start)
            if fault:
                self.problems.append(f"{time.strftime('%H:%M:%S')} {what}: {fault}")
            return not fault

        def read(host: str) -> None:
            while not stop.wait(0.05):
                for row in rows:
                    self.reads += timed(f"{host} media", lambda row=row: self.rig.fetch(host, row), 200)
                self.reads += timed(f"{host} page", lambda: self.rig.request("GET", host, "/"), 200)

        def write(host: str) -> None:
            while not stop.wait(0.25):
                self.writes += timed(f"{host} upload", lambda: self.rig.try_upload(host, picture(5000)), 201)

        threads = [threading.Thread(target=work, args=(host,)) for host in NODES for work in (read, write)]
        for thread in threads:
            thread.start()
        try:
            yield self
        finally:
            stop.set()
            for thread in threads:
                thread.join(timeout=120)
