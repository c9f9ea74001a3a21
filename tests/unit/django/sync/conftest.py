"""Sides in temporary directories, and a real sshd through whose keys they reach each other."""

from __future__ import annotations

import contextlib
import getpass
import os
import shutil
import socket
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.conf import settings

from tribrick.sync.side import Side
from tribrick.sync.state import State
from tribrick.testing import wait_for

SOURCES = Path(__file__).resolve().parents[4]
NODES = ("n1", "n2", "n3")

if not apps.is_installed("tribrick"):
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "tribrick"]
    apps.set_installed_apps(settings.INSTALLED_APPS)


@dataclass
class Place:
    """A directory with its state."""

    node: str
    root: Path
    path: Path
    skew: int = 0

    def open(self, **more: Any) -> contextlib.AbstractContextManager[Side]:
        """Open the state and give the side."""

        @contextlib.contextmanager
        def opened() -> Iterator[Side]:
            with State.open(self.path) as state:
                yield Side(state, **more)

        return opened()

    def write(self, name: str, data: bytes) -> None:
        """Write as somebody does who knows nothing of us: in place."""
        target = self.root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(data)

    def tree(self) -> dict[str, bytes]:
        """Return what a visitor sees."""
        return {
            str(path.relative_to(self.root)): path.read_bytes()
            for path in sorted(self.root.rglob("*"))
            if path.is_file() and not path.relative_to(self.root).parts[0].startswith(".")
        }

    def contents(self) -> set[bytes]:
        """Return what the history holds."""
        return {path.read_bytes() for path in (self.root / ".tribrick-history" / "objects").glob("*/*")}

    def scan(self, **more: Any) -> Any:
        """Look at the disk."""
        with self.open() as side, side.state.locked():
            return side.scan(**more)


def make_place(directory: Path, node: str) -> Place:
    """Make a side."""
    place = Place(node, directory / node, directory / f"{node}.sqlite")
    place.root.mkdir()
    with State.create(place.path, node=node, root=place.root) as state:
        state.set_meta("quiet", "0")  # files are recorded as soon as they are written
        Side(state).begin()
    return place


@pytest.fixture
def make() -> Any:
    """Give :func:`make_place`."""
    return make_place


@pytest.fixture
def place(tmp_path: Path) -> Place:
    """One side."""
    return make_place(tmp_path, "n1")


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A server on a port of the loopback address; the file of its keys is written by tests."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or shutil.which("rsync") is None:
        pytest.fail("These tests need sshd and rsync: apt-get install openssh-server rsync", pytrace=False)
    path = tmp_path_factory.mktemp("sshd")
    path.chmod(0o700)
    for name in ("host", *NODES):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path / name], check=True, timeout=60)
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    (path / "authorized_keys").touch()
    (path / "known_hosts").write_text(f"[127.0.0.1]:{port} {(path / 'host.pub').read_text()}")
    (path / "config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {path}/host\nAuthorizedKeysFile {path}/authorized_keys\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nPidFile none\n"
        "MaxStartups 100\nKexAlgorithms curve25519-sha256\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with (path / "log").open("wb") as log:
        server = subprocess.Popen([program, "-D", "-e", "-f", path / "config"], stderr=log, stdin=subprocess.DEVNULL)

        def answers() -> bool:
            assert server.poll() is None, (path / "log").read_text()
            with socket.socket() as probe:
                return probe.connect_ex(("127.0.0.1", port)) == 0

        wait_for(answers, "sshd listens", 20)
        yield {"path": path, "port": port}
        server.terminate()
        server.wait(10)


@pytest.fixture
def places(tmp_path: Path, sshd: dict[str, Any]) -> list[Place]:
    """Three sides, and for each a key that opens its door."""
    made = [make_place(tmp_path, node) for node in NODES]
    lines = []
    for place in made:
        door = f"env PYTHONPATH={SOURCES / 'src'} {sys.executable} -m tribrick.sync.door {place.path}"
        lines.append(f'restrict,command="{door}" {(sshd["path"] / f"{place.node}.pub").read_text()}')
    (sshd["path"] / "authorized_keys").write_text("".join(lines))
    return made


@pytest.fixture
def entries(sshd: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """What a peer's entry in the setting is, by node."""
    return {
        node: {
            "name": node, "address": f"{getpass.getuser()}@127.0.0.1", "port": sshd["port"],
            "identity": str(sshd["path"] / node), "known_hosts": str(sshd["path"] / "known_hosts"),
        }
        for node in NODES
    }  # fmt: skip
