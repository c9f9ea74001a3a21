"""Three nodes on one machine: nginx as media_web and media_receiver configure it, and real receivers behind it."""

from __future__ import annotations

import contextlib
import datetime
import hashlib
import os
import shutil
import signal
import socket
import socketserver
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec

ROOT = Path(__file__).resolve().parents[3]
NAMES = ("node1", "node2", "node3")
NGINX = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin") or "nginx"
PICTURE = b"\x89PNG\r\n\x1a\n" + bytes(range(256)) * 40


def issue(folder: Path, file: str, name: str, ca: tuple[Any, Any] | None = None) -> tuple[Any, Any]:
    """Write FILE.key and FILE.crt; without a CA it is one itself."""
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.timezone.utc)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(ca[0].subject if ca else subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca is None, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.DNSName(name)]), critical=False)
    )
    certificate = builder.sign(ca[1] if ca else key, hashes.SHA256())
    private = key.private_bytes(
        serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
    )
    (folder / f"{file}.key").write_bytes(private)
    (folder / f"{file}.crt").write_bytes(certificate.public_bytes(serialization.Encoding.PEM))
    return certificate, key


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def wait_for(port: int, process: subprocess.Popen[bytes], log: Path) -> None:
    end = time.monotonic() + 60
    while True:
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.settimeout(1)
            probe.connect(("127.0.0.1", port))
            return
        said = log.read_text(errors="replace") if log.exists() else ""
        assert process.poll() is None, f"it has ended: {said}"
        assert time.monotonic() < end, f"nobody listens on {port}: {said}"
        time.sleep(0.05)


class Site(BaseHTTPRequestHandler):
    """The Django site's part: it sends everybody to the protected place of what he asks for."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("X-Accel-Redirect", f"/_protected{self.path}")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def address_string(self) -> str:
        return "local"

    def log_message(self, *args: object) -> None:
        """Quiet."""


class Node:
    """One node: its files, its nginx, its receiver. With a spool the receiver's files lie apart from a volume's."""

    def __init__(self, name: str, work: Path, ports: dict[str, tuple[int, int]], spool: bool = False) -> None:
        self.name, self.work, self.ports = name, work, ports
        self.web, self.peer = ports[name]
        self.root, self.tls = work / "media", work / "tls"
        self.stored = work / "spool" if spool else self.root
        for folder in (*{self.root, self.stored}, self.tls, work / "state", work / "nginx", work / "temporary"):
            folder.mkdir(parents=True)
        work.chmod(0o755)
        self.processes: dict[str, subprocess.Popen[bytes]] = {}

    def render(self, role: str, template: str, **more: Any) -> str:
        """Render a template as the action does, with the role's defaults and variables."""
        base = ROOT / "roles" / role
        # The spelling of Debian 12's nginx is understood, with a warning, by this machine's whatever its age.
        variables: dict[str, Any] = {"ansible_managed": "test", "ansible_facts": {"distribution_major_version": "12"}}
        for file in ("defaults/main.yml", "vars/main.yml"):
            variables |= yaml.safe_load((base / file).read_text(encoding="utf-8"))
        text = (base / "templates" / template).read_text(encoding="utf-8")
        templar = Templar(loader=DataLoader(), variables=variables | more)
        rendered = templar.template(trust_as_template(text), escape_backslashes=False, overrides={"trim_blocks": True})
        return str(rendered).replace("/etc/nginx/tribrick/", f"{self.work}/nginx/")

    def configure(self) -> None:
        spool = self.stored != self.root
        # Of a spool this node's own receiver is the first that is asked.
        asked = ([self.name] if spool else []) + [name for name in NAMES if name != self.name]
        web = {
            "media_web_media_root": str(self.root),
            "media_web_sentinel": ".tribrick-volume" if spool else "",
            "media_web_http_port": self.web,
            "media_web_https_port": free_port(),
            "media_web_ipv6": False,
            "media_web_socket": str(self.work / "site.sock"),
            "media_web_static_root": str(self.work / "static"),
            "media_web_peers": [{"name": name, "address": f"127.0.0.1:{self.ports[name][1]}"} for name in asked],
            "media_web_peers_ca": str(self.tls / "ca.crt"),
            "media_web_peers_certificate": str(self.tls / "node.crt"),
            "media_web_peers_key": str(self.tls / "node.key"),
            "__media_web_tls": str(self.tls / "node"),
        }
        for file in ("maps.conf", "locations.conf", "media-types.conf", "proxy.conf"):
            (self.work / "nginx" / file).write_text(self.render("media_web", f"{file}.j2", **web))
        receiver = {
            "media_receiver_node": self.name,
            "media_receiver_address": "127.0.0.1",
            "media_receiver_port": self.peer,
            "media_receiver_server": "tribrick",
            "media_receiver_root": str(self.stored),
            "media_receiver_readers": [*(f"{name}.site" for name in NAMES), *NAMES],
            "media_receiver_writers": [f"{name}.site" for name in NAMES],
            "__media_receiver_tls": str(self.tls),
            "__media_receiver_socket": str(self.work / "receiver.sock"),
        }
        kinds = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
        temporary = "".join(f"{kind}_temp_path {self.work}/temporary/{kind};\n" for kind in kinds)
        peers = self.render("media_receiver", "site.conf.j2", **receiver).replace(
            "/var/lib/nginx/body", f"{self.work}/temporary/body"
        )
        user = "user root;" if os.geteuid() == 0 else ""
        (self.work / "nginx.conf").write_text(
            f"{user}\ndaemon off;\npid {self.work}/nginx.pid;\nevents {{}}\nhttp {{\n{temporary}access_log off;\n"
            f"{self.render('media_web', 'site.conf.j2', **web)}\n{peers}\n}}\n"
        )

    def start(self, what: str) -> None:
        log = self.work / f"{what}.log"
        if what == "nginx":
            command = [NGINX, "-e", str(log), "-p", str(self.work), "-c", str(self.work / "nginx.conf")]
        else:
            command = [sys.executable, "-m", "gunicorn", f"--bind=unix:{self.work}/receiver.sock", "--threads=4"]
            command += ["--log-level=warning", "--no-control-socket", "tribrick.receiver:application()"]
        given = {"ROOT": str(self.stored), "STATE": str(self.work / "state"), "ACCEL": "/_stored/"}
        environment = {f"TRIBRICK_RECEIVER_{key}": value for key, value in given.items()}
        with (self.work / f"{what}.out").open("ab") as out:
            self.processes[what] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=out, stderr=out,
                env=os.environ | environment | {"PYTHONPATH": str(ROOT / "src")},
            )  # fmt: skip
        if what == "nginx":
            wait_for(self.web, self.processes[what], self.work / "nginx.out")
            return
        end = time.monotonic() + 60
        while not (self.work / "receiver.sock").exists():
            said = (self.work / "receiver.out").read_text()
            assert self.processes[what].poll() is None, said
            assert time.monotonic() < end, said
            time.sleep(0.05)

    def stop(self, what: str) -> None:
        process = self.processes.pop(what, None)
        if process is not None:
            process.send_signal(signal.SIGTERM)
            process.wait(20)

    def get(self, path: str, **headers: str) -> requests.Response:
        return requests.get(f"http://127.0.0.1:{self.web}{path}", headers=headers, timeout=30)

    def put(self, name: str, content: bytes) -> None:
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


@pytest.fixture(scope="module")
def nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Node]]:
    with running(tmp_path_factory.mktemp("peers")) as found:
        yield found


@pytest.fixture(scope="module")
def spools(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Node]]:
    with running(tmp_path_factory.mktemp("spools"), spool=True) as found:
        yield found


@contextlib.contextmanager
def running(base: Path, spool: bool = False) -> Iterator[dict[str, Node]]:
    for folder in (base, base.parent):
        folder.chmod(0o755)
    ports = {name: (free_port(), free_port()) for name in NAMES}
    ca = issue(base, "ca", "Tribrick nodes")
    found = {name: Node(name, base / name, ports, spool) for name in NAMES}
    sites = []
    try:
        for name, node in found.items():
            issue(node.tls, "node", name, ca)
            issue(node.tls, "client", f"{name}.site", ca)
            shutil.copy(base / "ca.crt", node.tls / "ca.crt")
            node.configure()
            site = socketserver.ThreadingUnixStreamServer(str(node.work / "site.sock"), Site)
            threading.Thread(target=site.serve_forever, daemon=True).start()
            sites.append(site)
            node.start("receiver")
            node.start("nginx")
        yield found
    finally:
        for node in found.values():
            for what in list(node.processes):
                node.stop(what)
        for site in sites:
            site.shutdown()
            site.server_close()


def ask(
    nodes: dict[str, Node], method: str, name: str, content: bytes = b"", pair: str | None = "client", at: str = "files"
) -> int:
    """Ask node2 for a file with a certificate of node1; 0 when it does not come to an answer."""
    one, two = nodes["node1"], nodes["node2"]
    given = None if pair is None else (str(one.tls / f"{pair}.crt"), str(one.tls / f"{pair}.key"))
    address = f"https://127.0.0.1:{two.peer}/{at}/{name}"
    headers = {"X-Content-SHA256": hashlib.sha256(content).hexdigest()} if method == "PUT" else {}
    try:
        # The name in the certificate is nginx's concern here; requests knows the node by its address only.
        return requests.request(
            method, address, data=content or None, headers=headers, cert=given, verify=False, timeout=30,  # noqa: S501
        ).status_code  # fmt: skip
    except requests.exceptions.SSLError:
        return 0


def test_a_file_that_is_not_here_comes_from_the_node_that_has_it(nodes):
    nodes["node3"].put("photos/a/one.png", PICTURE)
    for node in nodes.values():
        answer = node.get("/media/photos/a/one.png")
        assert (answer.status_code, answer.content) == (200, PICTURE), node.name
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.headers["Cache-Control"] == "public, max-age=2592000, immutable"
        assert answer.headers["Content-Security-Policy"] == "default-src 'none'; sandbox"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        part = node.get("/media/photos/a/one.png", Range="bytes=2-5")
        assert (part.status_code, part.content) == (206, PICTURE[2:6])


def test_names_that_need_escapes_and_files_that_may_change(nodes):
    nodes["node3"].put("photos/a b%20é.svg", b"<svg/>")
    answer = nodes["node1"].get("/media/photos/a%20b%2520%C3%A9.svg")
    assert (answer.status_code, answer.content) == (200, b"<svg/>")
    assert answer.headers["Content-Disposition"] == "attachment"
    assert answer.headers["Content-Type"] == "application/octet-stream"
    nodes["node3"].put("derived/t.png", PICTURE)
    for node in nodes.values():
        assert node.get("/media/derived/t.png").headers["Cache-Control"] == "no-cache", node.name


def test_not_found_is_said_only_when_all_have_said_so(nodes):
    assert nodes["node1"].get("/media/photos/none.png").status_code == 404
    nodes["node3"].put("photos/three.png", PICTURE)
    for away in ("node2", "node3"):
        nodes[away].stop("nginx")
        try:
            missing = nodes["node1"].get("/media/photos/none.png")
            assert missing.status_code == 503, f"without {away}"
            assert missing.headers["Retry-After"]
            assert nodes["node1"].get("/media/photos/three.png").status_code == (200 if away == "node2" else 503)
        finally:
            nodes[away].start("nginx")
    nodes["node3"].stop("receiver")
    try:
        assert nodes["node1"].get("/media/photos/three.png").status_code == 503
    finally:
        nodes["node3"].start("receiver")
    assert nodes["node1"].get("/media/photos/three.png").status_code == 200


def test_private_files_come_by_the_site_alone_wherever_they_are(nodes):
    nodes["node2"].put("private/p.png", PICTURE)
    for node in nodes.values():
        for path in ("/media/private/p.png", "/media//private/p.png", "/media/x/../private/p.png"):
            assert node.get(path).status_code == 404, f"{node.name} {path}"
        assert node.get("/_protected/private/p.png").status_code == 404
        answer = node.get("/private/p.png")
        assert (answer.status_code, answer.content) == (200, PICTURE), node.name
        assert "private" in answer.headers["Cache-Control"]
        assert "public" not in answer.headers["Cache-Control"]
    assert nodes["node1"].get("/private/none.png").status_code == 404
    nodes["node2"].put("photos/.hidden.png", PICTURE)
    assert nodes["node1"].get("/media/photos/.hidden.png").status_code == 404


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_only_a_site_of_a_node_stores_and_deletes(nodes):
    one = nodes["node1"].tls
    issue(one, "foreign", "node1.site")
    known = x509.load_pem_x509_certificate((one.parents[1] / "ca.crt").read_bytes())
    key = serialization.load_pem_private_key((one.parents[1] / "ca.key").read_bytes(), None)
    issue(one, "stranger", "node9.site", (known, key))
    assert ask(nodes, "PUT", "photos/new.png", PICTURE, None) in (0, 400)
    assert ask(nodes, "GET", "photos/new.png", pair=None) in (0, 400)
    assert ask(nodes, "PUT", "photos/new.png", PICTURE, "foreign") in (0, 400)
    assert ask(nodes, "PUT", "photos/new.png", PICTURE, "stranger") == 403
    assert ask(nodes, "GET", "photos/new.png", pair="stranger") == 403
    assert ask(nodes, "PUT", "photos/new.png", PICTURE, "node") == 403
    assert not (nodes["node2"].root / "photos/new.png").exists()
    assert ask(nodes, "PUT", "photos/new.png", PICTURE) == 201, "the positive control"
    assert (nodes["node2"].root / "photos/new.png").read_bytes() == PICTURE
    assert ask(nodes, "GET", "photos/new.png", pair="node") == 200
    assert ask(nodes, "DELETE", "photos/new.png", pair="node") == 403
    assert ask(nodes, "POST", "photos/new.png", PICTURE) == 403
    assert ask(nodes, "PUT", ".tribrick-incoming/x", PICTURE) == 400
    assert ask(nodes, "DELETE", "photos/new.png") == 204
    assert ask(nodes, "PUT", "photos/new.png", PICTURE) == 410


@pytest.fixture
def mounted(spools: dict[str, Node]) -> dict[str, Node]:
    """All three see the volume."""
    for node in spools.values():
        node.put(".tribrick-volume", b"{}")
        node.put("photos/old.png", PICTURE)
    return spools


def keep(node: Node, name: str, content: bytes = PICTURE) -> None:
    """Put a file into a node's spool."""
    path = node.stored / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)


@pytest.mark.parametrize("holder", NAMES)
def test_a_spooled_file_is_read_through_every_node_with_the_volume_and_without_it(mounted, holder):
    name = f"photos/{holder}.png"
    keep(mounted[holder], name)
    for volume in (True, False):
        for node in mounted.values():
            if not volume:
                (node.root / ".tribrick-volume").unlink()
            answer = node.get(f"/media/{name}")
            assert (answer.status_code, answer.content) == (200, PICTURE), (node.name, volume)
            assert answer.headers["Content-Type"] == "image/png"
            assert "immutable" in answer.headers["Cache-Control"]


def test_what_no_spool_has_is_not_found_only_while_the_volume_is_there(mounted):
    for node in mounted.values():
        assert node.get("/media/photos/old.png").status_code == 200, "the volume is asked first"
        assert node.get("/media/photos/none.png").status_code == 404, node.name
        (node.root / ".tribrick-volume").unlink()
        missing = node.get("/media/photos/none.png")
        assert (missing.status_code, bool(missing.headers.get("Retry-After"))) == (503, True), node.name


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_a_deleted_file_is_not_served_from_a_spool_where_it_is_left(mounted):
    keep(mounted["node2"], "photos/dead.png")
    assert mounted["node2"].get("/media/photos/dead.png").status_code == 200
    assert ask(mounted, "DELETE", "photos/dead.png") == 204
    keep(mounted["node2"], "photos/dead.png")
    for node in mounted.values():
        assert node.get("/media/photos/dead.png").status_code == 404, node.name


def test_private_files_of_a_spool_come_by_the_site_alone(mounted):
    keep(mounted["node3"], "private/spooled.png")
    for node in mounted.values():
        assert node.get("/media/private/spooled.png").status_code == 404
        assert node.get("/_protected/private/spooled.png").status_code == 404
        answer = node.get("/private/spooled.png")
        assert (answer.status_code, answer.content) == (200, PICTURE), node.name


@pytest.mark.parametrize("server", ["none", "tribrick", "nginx", "lighttpd"])
def test_nginx_takes_each_kind_of_configuration(nodes, tmp_path, server):
    """With a volume (no peers, a sentinel, a brick) and with each server of files."""
    node = nodes["node1"]
    (tmp_path / "sets").mkdir()
    web = {"media_web_peers": [], "media_web_ipv6": False, "__media_web_tls": str(node.tls / "node")}
    receiver = {
        "media_receiver_node": "node1",
        "media_receiver_address": "127.0.0.1",
        "media_receiver_server": server,
        "media_receiver_root": str(tmp_path),
        "media_receiver_brick": "/srv/gluster/media/brick" if server == "none" else "",
        "media_receiver_writers": ["node1.site"],
        "__media_receiver_tls": str(node.tls),
    }
    sets = f"{tmp_path}/sets/"
    for file in ("maps.conf", "locations.conf", "media-types.conf", "proxy.conf"):
        text = node.render("media_web", f"{file}.j2", **web).replace(f"{node.work}/nginx/", sets)
        (tmp_path / "sets" / file).write_text(text)
    site = node.render("media_web", "site.conf.j2", **web).replace(f"{node.work}/nginx/", sets)
    peers = node.render("media_receiver", "site.conf.j2", **receiver).replace("/var/lib/nginx/body", str(tmp_path))
    (tmp_path / "nginx.conf").write_text(
        f"pid {tmp_path}/pid;\nevents {{}}\nhttp {{\nclient_body_temp_path {tmp_path}/body;\naccess_log off;\n"
        f"{site}\n{peers}\n}}\n"
    )
    command = [NGINX, "-t", "-e", str(tmp_path / "log"), "-c", str(tmp_path / "nginx.conf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert ("/hashes/walk" in peers) == (server == "none")
    assert ("location /files/" in peers) == (server != "none")


def test_a_receiver_answers_under_its_own_path_alone(nodes):
    """Who takes a tree for a spool, or a spool for a tree, is not told that files are not there."""
    given = {"media_receiver_node": "node1", "media_receiver_address": "127.0.0.1", "__media_receiver_tls": "/tls"}
    given["media_receiver_server"] = "tribrick"
    text = nodes["node1"].render("media_receiver", "site.conf.j2", **given, media_receiver_prefix="/spool/")
    assert "location /spool/ {\n        if ($tribrick_peer_refused)" in text
    assert "location /files/ { return 503; }" in text


@pytest.mark.filterwarnings("ignore:Unverified HTTPS request")
def test_a_tree_is_read_by_who_still_takes_it_for_a_spool(nodes):
    """On the way into the Gluster-free mode. Nothing is stored or deleted that way, nothing is said to be nowhere."""
    assert ask(nodes, "PUT", "photos/tree.png", PICTURE) == 201
    assert ask(nodes, "GET", "photos/tree.png", at="spool") == 200
    assert ask(nodes, "HEAD", "photos/tree.png", at="spool") == 200
    assert ask(nodes, "GET", "photos/tree.png", at="spool", pair=None) in (0, 400)
    assert ask(nodes, "PUT", "photos/other.png", PICTURE, at="spool") == 503
    assert ask(nodes, "DELETE", "photos/tree.png", at="spool") == 503
    assert ask(nodes, "GET", "photos/tree.png") == 200, "it is still there"
    assert ask(nodes, "GET", "photos/none.png", at="spool") == 503
    assert ask(nodes, "DELETE", "photos/tree.png") == 204
    assert ask(nodes, "GET", "photos/tree.png") == 410
    assert ask(nodes, "GET", "photos/tree.png", at="spool") == 503
