"""Real media hosts: the receiver under gunicorn behind nginx, nginx alone, lighttpd alone.

nginx and lighttpd run with the files of templates/receiver, in which only addresses and paths are
replaced, so what the documents recommend is what is tested.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from django.apps import apps
from django.conf import settings
from django.core.files.storage import storages
from django.test import override_settings

from tribrick.storage.transport import DefaultTransport
from tribrick.testing import wait_for

if not apps.is_installed("tribrick"):
    settings.INSTALLED_APPS = [*settings.INSTALLED_APPS, "tribrick"]
    apps.set_installed_apps(settings.INSTALLED_APPS)

ROOT = Path(__file__).resolve().parents[4]
TEMPLATES = ROOT / "templates" / "receiver"
KEYS = {"web": "a secret of the web servers"}


def find_program(name: str, package: str) -> str:
    """Return the path of a program of a Debian package."""
    found = shutil.which(name, path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/libexec/litmus:/usr/lib/litmus")
    if found is None:
        pytest.fail(f"{name} is not there: apt-get install {package}", pytrace=False)
    return found


def free_port() -> int:
    """Return a port of the loopback address that is free."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def answers(address: tuple[str, int] | str) -> bool:
    """Return whether somebody listens."""
    with socket.socket(socket.AF_UNIX if isinstance(address, str) else socket.AF_INET) as probe:
        probe.settimeout(1)
        try:
            probe.connect(address)
        except OSError:
            return False
        return True


def filled(template: str, values: Mapping[str, str], changed: Mapping[str, str] | None = None) -> str:
    """Return a file of templates/receiver with other addresses and paths; each must occur in it."""
    text = (TEMPLATES / template).read_text()
    for old, new in {**values, **(changed or {})}.items():
        assert old in text, f"{template} has no {old}"
        text = text.replace(old, new)
    assert not re.search(r"192\.0\.2\.|/srv/|/run/|/etc/|/var/", re.sub(r"(?m)^ *#.*$", "", text)), text
    return text


@dataclass
class Running:
    """A media host that runs, and where its files lie."""

    kind: str
    host: str
    files: Path
    base_url: str
    options: dict[str, str] = field(default_factory=dict)
    process: subprocess.Popen[bytes] | None = None

    def transport(self, **options: str) -> DefaultTransport:
        """A transport that may write there."""
        return DefaultTransport(**{"base_url": self.base_url, **self.options, **options})

    def prepare(self, name: str) -> None:
        """Make the directories of *name* where the host itself makes none."""
        if self.kind == "lighttpd":
            (self.files / name).parent.mkdir(parents=True, exist_ok=True)

    def names(self) -> list[str]:
        """What is visible of its files."""
        return sorted(
            str(path.relative_to(self.files))
            for path in self.files.rglob("*")
            if path.is_file() and not path.relative_to(self.files).parts[0].startswith(".")
        )


class Machine:
    """Starts the programs of media hosts in one directory, and ends them."""

    def __init__(self, work: Path, stack: contextlib.ExitStack) -> None:
        self.work, self._stack = work, stack

    def start(
        self, what: str, command: list[str], address: tuple[str, int] | str, **environment: str
    ) -> subprocess.Popen[bytes]:
        """Start a program and wait until it listens."""
        said = self.work / f"{what}.out"
        with said.open("ab") as out:
            process = subprocess.Popen(
                command,
                cwd=self.work,
                env={"PATH": os.environ["PATH"], "HOME": str(self.work), "LC_ALL": "C.UTF-8", **environment},
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=subprocess.STDOUT,
            )
        self._stack.callback(self.stop, process)

        def up() -> bool:
            assert process.poll() is None, f"{what} has ended:\n{said.read_text(errors='replace')[-3000:]}"
            return answers(address)

        wait_for(up, f"{what} listens; it said {said.read_text(errors='replace')[-500:]}", 30)
        return process

    @staticmethod
    def stop(process: subprocess.Popen[bytes]) -> None:
        """End a program that was started here, and wait for it."""
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait(15)

    def directory(self, name: str, mode: int = 0o755) -> Path:
        """Make a directory with this mode, whatever the umask is."""
        made = self.work / name
        made.mkdir(parents=True, exist_ok=True)
        made.chmod(mode)
        return made

    # Programs.

    def gunicorn(self, *, workers: int = 2, **environment: str) -> tuple[subprocess.Popen[bytes], str]:
        """Start the receiver; return it and its socket."""
        files, state = self.directory("files", 0o2775), self.directory("state", 0o750)
        listening = str(self.work / "receiver.sock")
        given = {"ROOT": str(files), "STATE": str(state), **environment}
        command = [sys.executable, "-m", "gunicorn", "--bind", f"unix:{listening}", "--workers", str(workers)]
        # As the kit's role runs it. The control socket would appear in the home directory, at a moment of its own.
        command += ["--no-control-socket"]
        command += ["--threads", "4", "--timeout", "60", "--graceful-timeout", "5", "--log-level", "warning"]
        process = self.start(
            "gunicorn",
            [*command, "tribrick.receiver:application()"],
            listening,
            PYTHONPATH=str(ROOT / "src"),
            **{f"TRIBRICK_RECEIVER_{key}": value for key, value in given.items()},
        )
        return process, listening

    def nginx(self, server: str, port: int, *, modules: tuple[str, ...] = (), what: str = "nginx") -> None:
        """Start nginx with one file of templates/receiver."""
        work = self.directory(what)
        (work / "server.conf").write_text(server)
        user = "user root;" if os.geteuid() == 0 else ""
        loaded = "".join(f"load_module /usr/lib/nginx/modules/{module}.so;\n" for module in modules)
        temporary = "".join(f"{kind}_temp_path {work}/{kind};\n" for kind in ("proxy", "fastcgi", "uwsgi", "scgi"))
        if "client_body_temp_path" not in server:
            temporary += f"client_body_temp_path {work}/body;\n"
        (work / "nginx.conf").write_text(
            f"{loaded}{user}\ndaemon off;\nworker_processes 2;\npid {work}/nginx.pid;\nerror_log {work}/error.log;\n"
            f"events {{}}\nhttp {{\naccess_log {work}/access.log;\n{temporary}include {work}/server.conf;\n}}\n"
        )
        command = [
            find_program("nginx", "nginx-light"),
            "-e",
            f"{work}/error.log",
            "-p",
            str(work),
            "-c",
            f"{work}/nginx.conf",
        ]
        self.start(what, command, ("127.0.0.1", port))

    # Media hosts.

    def receiver(
        self,
        *,
        keys: bool = True,
        writers: str = "127.0.0.0/8",
        changed: Mapping[str, str] | None = None,
        certificates: Path | None = None,
        **environment: str,
    ) -> Running:
        """The receiver behind nginx, with mutual TLS; *certificates* is where another one has made them."""
        if certificates is None:
            certificates = self.work
            make_certificates(certificates)
        if keys:
            file = self.work / "keys.json"
            file.write_text(json.dumps(KEYS))
            file.chmod(0o600)
            environment["KEYS"] = str(file)
        process, listening = self.gunicorn(ACCEL="/_files/", MAX_BYTES=str(4 * 1024**3), **environment)
        port = free_port()
        self.nginx(
            filled(
                "nginx-receiver.conf",
                {
                    "192.0.2.11:8443": f"127.0.0.1:{port}",
                    "192.0.2.0/24": writers,
                    "/run/tribrick-receiver/receiver.sock": listening,
                    "/etc/tribrick/receiver": str(certificates),
                    "/srv/media-host/files": str(self.work / "files"),
                },
                changed,
            ),
            port,
        )
        trust = {
            "ca": f"{certificates}/ca.pem",
            "certificate": f"{certificates}/client.pem",
            "key": f"{certificates}/client.key",
        }
        signing = {"hmac_key": KEYS["web"], "hmac_key_id": "web"} if keys else {}
        options = {**trust, **signing, "server_name": "media1.example"}
        return Running("receiver", f"127.0.0.1:{port}", self.work / "files", "https:///store/", options, process)

    def nginx_dav(
        self,
        *,
        writers: str = "127.0.0.0/8",
        changed: Mapping[str, str] | None = None,
        modules: tuple[str, ...] = (),
    ) -> Running:
        """nginx alone."""
        for name in ("files", "incoming"):
            self.directory(name)
        port = free_port()
        values = {"192.0.2.11:8080": f"127.0.0.1:{port}", "192.0.2.0/24": writers, "/srv/media-host": str(self.work)}
        self.nginx(filled("nginx-dav.conf", values, changed), port, modules=modules)
        return Running("nginx", f"127.0.0.1:{port}", self.work / "files", "/media/")

    def lighttpd_dav(self, *, writers: str = "127.0.0.0/8", changed: Mapping[str, str] | None = None) -> Running:
        """lighttpd alone."""
        for name in ("files", "incoming", "lighttpd"):
            self.directory(name)
        port = free_port()
        text = filled(
            "lighttpd-dav.conf",
            {
                '"192.0.2.11"': '"127.0.0.1"',
                "server.port = 8080": f"server.port = {port}",
                "192.0.2.0/24": writers,
                "/srv/media-host": str(self.work),
                "/run/lighttpd.pid": f"{self.work}/lighttpd.pid",
                "/var/log/lighttpd/error.log": f"{self.work}/lighttpd/error.log",
                "/var/empty": f"{self.work}/lighttpd",
            },
            changed,
        )
        if os.geteuid() == 0:  # its own user could not reach the temporary directory
            text = re.sub(r"(?m)^server\.(user|group)name.*\n", "", text)
        file = self.work / "lighttpd.conf"
        file.write_text(text)
        self.start("lighttpd", [find_program("lighttpd", "lighttpd"), "-D", "-f", str(file)], ("127.0.0.1", port))
        return Running("lighttpd", f"127.0.0.1:{port}", self.work / "files", "/media/")


def make_certificates(directory: Path) -> None:
    """Make a CA with a server's and a client's certificate, and another CA with a client's."""

    def openssl(*arguments: str) -> None:
        subprocess.run(["openssl", *arguments], cwd=directory, check=True, capture_output=True, timeout=60)

    key = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256", "-nodes")
    for authority, holders in (("ca", ("server", "client")), ("other-ca", ("stranger",))):
        subject = ("-subj", f"/CN={authority}")
        openssl("req", "-x509", *key, "-days", "2", "-keyout", f"{authority}.key", "-out", f"{authority}.pem", *subject)
        for holder in holders:
            name = "media1.example" if holder == "server" else holder
            openssl("req", *key, "-keyout", f"{holder}.key", "-out", f"{holder}.csr", "-subj", f"/CN={name}")
            (directory / f"{holder}.ext").write_text(f"subjectAltName=DNS:{name}\n")
            by = ("-CA", f"{authority}.pem", "-CAkey", f"{authority}.key", "-CAcreateserial")
            made = ("-in", f"{holder}.csr", "-out", f"{holder}.pem", "-extfile", f"{holder}.ext")
            openssl("x509", "-req", *made, *by, "-days", "2")


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Callable[[str], Machine]]:
    """Make a :class:`Machine` of a name; all its programs end with the module's tests."""
    with contextlib.ExitStack() as stack:
        yield lambda name: Machine(tmp_path_factory.mktemp(name), stack)


@pytest.fixture
def one_machine(tmp_path: Path) -> Iterator[Machine]:
    """A :class:`Machine` for one test."""
    with contextlib.ExitStack() as stack:
        yield Machine(tmp_path, stack)


@pytest.fixture
def site(tmp_path: Path) -> Iterator[Callable[..., Any]]:
    """Make a storage on media hosts the site's default one."""
    backends = {"hybrid": "tribrick.storage.HybridStorage", "distributed": "tribrick.storage.DistributedStorage"}
    with contextlib.ExitStack() as stack:

        def configure(kind: str, hosts: list[Running], **tribrick: Any) -> Any:
            local = {} if kind == "distributed" else {"location": str(tmp_path / "local")}
            (tmp_path / "local").mkdir(exist_ok=True)
            default = {"BACKEND": backends[kind], "OPTIONS": local}
            given = {**settings.TRIBRICK, "MEDIA_HOSTS": [host.host for host in hosts], **tribrick}
            stack.enter_context(override_settings(STORAGES={**settings.STORAGES, "default": default}, TRIBRICK=given))
            vars(storages).update(backends=settings.STORAGES, _storages={})  # 4.2 loses overridden OPTIONS
            return storages["default"]

        yield configure


@pytest.fixture
def program() -> Callable[[str, str], str]:
    """Give :func:`find_program`."""
    return find_program
