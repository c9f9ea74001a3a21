"""What the tests of the scenario `storages` share: agents on the nodes, in a place of their own."""

from __future__ import annotations

import contextlib
import io
import json
import os
import queue
import re
import subprocess
import sys
import tarfile
import tempfile
import threading
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from helpers import NODES, Rig, wait_until
from kit.lab import ROOT

HERE = Path(__file__).resolve().parent
DIRECTORY = "proof"  # of the mount, and the name of the database
ON_NODES = "/opt/proof"
ANSWER_WAIT = 180.0
INSTALL_WAIT = 300.0


class AgentError(AssertionError):
    """The agent could not do what it was asked."""


class Agent:
    """A process on a node in the site's environment that runs agent.py."""

    def __init__(self, rig: Rig, host: str, options: dict[str, Any]) -> None:
        self.rig, self.host = rig, host
        self.process = subprocess.Popen(
            ["docker", "exec", "-i", rig.container(host), "tribrick-manage", "--python", f"{ON_NODES}/agent.py",
             json.dumps(options)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )  # fmt: skip
        self.answers: queue.Queue[str] = queue.Queue()
        self.said: list[str] = []
        threading.Thread(target=self._read, daemon=True).start()
        threading.Thread(target=self._listen, daemon=True).start()
        self.pid: int = self.ask("hello")["pid"]

    def _read(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.answers.put(line)
        self.answers.put("")

    def _listen(self) -> None:
        assert self.process.stderr is not None
        self.said.extend(self.process.stderr)

    def send(self, command: str, *args: Any, **kwargs: Any) -> None:
        """Give a command; `answer` fetches what it gave."""
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps([command, args, kwargs]) + "\n")
        self.process.stdin.flush()

    def answer(self, timeout: float = ANSWER_WAIT) -> Any:
        try:
            line = self.answers.get(timeout=timeout)
        except queue.Empty:
            raise AgentError(f"the agent on {self.host} did not answer within {timeout:.0f} s") from None
        if not line:
            raise AgentError(f"the agent on {self.host} ended: {''.join(self.said)[-3000:]}")
        said = json.loads(line)
        if "error" in said:
            raise AgentError(f"{self.host}: {said['error']}: {said['text']}\n{''.join(self.said)[-2000:]}")
        return said["result"]

    def ask(self, command: str, *args: Any, timeout: float = ANSWER_WAIT, **kwargs: Any) -> Any:
        """Give a command and return its result."""
        self.send(command, *args, **kwargs)
        return self.answer(timeout)

    def tribrick(self, *words: str) -> dict[str, Any]:
        """Run `manage.py tribrick ...`; return exit code and answer."""
        answer: dict[str, Any] = self.ask("command", *words)
        return answer

    def kill(self) -> None:
        """Kill the process on the node, as the out-of-memory killer would."""
        self.rig.root(self.host, f"kill -9 {self.pid}")

    def close(self) -> None:
        assert self.process.stdin is not None
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        try:
            self.process.wait(timeout=20)
        except subprocess.TimeoutExpired:
            self.process.kill()


@dataclass
class Proof:
    """The place of these tests: a directory of the mount with a sentinel, a database, agents."""

    rig: Rig
    sentinel: str
    agents: dict[str, Agent] = field(default_factory=dict)

    @property
    def root(self) -> str:
        return f"{self.rig.mount}/{DIRECTORY}"

    @property
    def brick(self) -> str:
        return f"{self.rig.brick}/{DIRECTORY}"

    def agent(self, host: str, **tribrick: Any) -> Agent:
        """Start an agent with settings of its own."""
        return Agent(self.rig, host, {
            "root": self.root, "database": DIRECTORY, "sentinel": self.sentinel, "node": host, "tribrick": tribrick,
        })

    def restart(self) -> None:
        """Start all agents again, after their nodes died."""
        for agent in self.agents.values():
            agent.close()
        self.agents.update(self.rig.everywhere(self.agent))

    @contextlib.contextmanager
    def another(self, host: str, **tribrick: Any) -> Iterator[Agent]:
        """An agent for one test."""
        agent = self.agent(host, **tribrick)
        try:
            yield agent
        finally:
            agent.close()

    def on_bricks(self, names: list[str]) -> dict[str, dict[str, str | None]]:
        """Return node -> name -> the hash of the bytes on its brick, None where there is no file."""
        program = (
            "import hashlib, json, pathlib, sys\n"
            "root, names = pathlib.Path(sys.argv[1]), json.load(sys.stdin)\n"
            "print(json.dumps({n: hashlib.sha256((root / n).read_bytes()).hexdigest()\n"
            "                  if (root / n).is_file() else None for n in names}))\n"
        )

        def look(host: str) -> dict[str, str | None]:
            done = subprocess.run(
                ["docker", "exec", "-i", self.rig.container(host), "python3", "-c", program, self.brick],
                input=json.dumps(names), capture_output=True, text=True, timeout=120, check=True,
            )
            found: dict[str, str | None] = json.loads(done.stdout)
            return found

        return self.rig.everywhere(look)

    def check_clean(self, agent: Agent) -> dict[str, str]:
        """Catalog, mounts and bricks agree to the byte; return the stored names with their hashes."""
        stored = {row["name"]: row["sha256"] for row in agent.ask("rows") if row["state"] == "stored"}
        report = agent.tribrick("audit")
        assert report["code"] == 0 and report["said"]["clean"] and report["said"]["checked"] >= len(stored), report
        for host in NODES:
            wait_until(f"{host} to show what the catalog says and nothing else",
                       lambda host=host: same(self.agents[host].ask("walk"), stored), 15)
        return stored


def same(found: dict[str, Any], wanted: dict[str, Any]) -> bool:
    """Fail with the difference."""
    more = sorted(set(found) - set(wanted))[:5]
    less = sorted(set(wanted) - set(found))[:5]
    other = sorted(name for name in set(found) & set(wanted) if found[name] != wanted[name])[:5]
    assert not (more or less or other), f"too many: {more}; missing: {less}; other bytes: {other}"
    return True


def build_wheels(requirements: Path) -> Path:
    """Return a tar of locked wheels for the nodes' Python and of the package's own, made by the kit's module."""
    arguments = {
        "requirements": str(requirements), "projects": [str(ROOT)], "python_version": "3.13", "keep": 20,
        "cache": str(ROOT / ".lab" / "wheels"),
    }  # fmt: skip
    done = subprocess.run(
        [str(Path(sys.executable).parent / "ansible"), "localhost", "--inventory=localhost,", "--connection=local",
         f"--extra-vars=ansible_python_interpreter={sys.executable}",
         "--module-name=tribrick.media.wheelhouse", f"--args={json.dumps(arguments)}"],
        cwd=ROOT, env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=900, check=False,
    )  # fmt: skip
    found = re.search(r"^ +bundle: (\S+)$", done.stdout, re.MULTILINE)
    assert done.returncode == 0 and found, f"{done.stdout[-3000:]} {done.stderr[-2000:]}"
    return Path(found[1])


def install_wheels(rig: Rig, host: str, bundle: Path, directory: str) -> None:
    """Make a virtual environment on a host from a tar of wheels, without a package index, unless it is there."""
    if rig.run_root(host, f"test -e {directory}/.made-of-{bundle.stem}").returncode == 0:
        return
    rig.root(host, f"rm -rf {directory}; mkdir -p {directory}")
    with bundle.open("rb") as content:
        unpack(rig, host, content, directory)
    rig.root(host, f"""
    set -eu
    python3 -m venv --without-pip {directory}
    export PYTHONPATH="$(ls /usr/share/python-wheels/pip-*.whl)"
    nice {directory}/bin/python3 -m pip install -q --no-index --no-deps --no-cache-dir {directory}/wheels/*.whl
    nice {directory}/bin/python3 -m pip check
    touch {directory}/.made-of-{bundle.stem}
    """, timeout=INSTALL_WAIT)


def unpack(rig: Rig, host: str, content: IO[bytes], directory: str) -> None:
    """Unpack a tar on a host."""
    subprocess.run(
        ["docker", "exec", "-i", rig.container(host), "tar", "-x", "--no-same-owner", f"--directory={directory}"],
        stdin=content, check=True, timeout=INSTALL_WAIT,
    )


def copy_directory(rig: Rig, source: str, targets: Sequence[str], directory: str, made_of: Path) -> None:
    """Copy a virtual environment from one host to others that do not have it."""
    for target in targets:
        if rig.run_root(target, f"test -e {directory}/.made-of-{made_of.stem}").returncode == 0:
            continue
        rig.root(target, f"rm -rf {directory}; mkdir -p {directory}")
        with subprocess.Popen(
            ["docker", "exec", rig.container(source), "tar", "--create", f"--directory={directory}", "."],
            stdout=subprocess.PIPE,
        ) as sender:
            assert sender.stdout is not None
            unpack(rig, target, sender.stdout, directory)
        assert sender.returncode == 0


def packed(files: Mapping[str, Path], texts: Mapping[str, str] | None = None) -> IO[bytes]:
    """Return a tar of files and directories under the names given."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as archive:
        for name, path in files.items():
            archive.add(path, name, filter=lambda member: None if "__pycache__" in member.name else member)
        for name, text in (texts or {}).items():
            member = tarfile.TarInfo(name)
            member.size, member.mode = len(text.encode()), 0o644
            archive.addfile(member, io.BytesIO(text.encode()))
    spool = tempfile.TemporaryFile()
    spool.write(out.getvalue())
    spool.seek(0)
    return spool


def make_place(rig: Rig, name: str, sentinel: str) -> str:
    """Make an empty directory on the mount with a sentinel of its own; return its path."""
    root = f"{rig.mount}/{name}"
    text = json.dumps({"tribrick": 1, "volume": name, "id": sentinel})
    rig.root("node1", f"rm -rf {root}; mkdir {root}; cat > {root}/.tribrick-volume; chown -R tribrick:tribrick {root};"
                      f" sync {root}/.tribrick-volume",  # a power cut may come soon
             text_in=text)
    show = f"cat {root}/.tribrick-volume"
    for host in NODES:
        wait_until(f"{host} to show {root}", lambda host=host: rig.root(host, show) == text, 10)
    return root


def make_database(rig: Rig, name: str) -> None:
    """Make a database of its own for the site's role, which may connect to it like to the site's."""
    user, own = str(rig.variables["tribrick_database_user"]), str(rig.variables["tribrick_database_name"])
    script = f"""
    set -eu
    as() {{ runuser -u postgres -- "$@"; }}
    cd /
    as dropdb --if-exists --force {name}
    as createdb --owner {user} --encoding UTF8 --template template0 {name}
    hba="$(as psql -AtXc 'SHOW hba_file')"
    grep -q '^host *{name} ' "$hba" || sed -n 's/^host *{own} /host {name} /p' "$hba" > /tmp/more
    test ! -s /tmp/more || {{ cat /tmp/more >> "$hba"; rm /tmp/more; }}
    as psql -AtXc 'SELECT pg_reload_conf()'
    """
    rig.root("db1", script)
