"""The role media_vip: its configurations are taken by the programs they are for, and three balancers at work."""

from __future__ import annotations

import contextlib
import http.client
import os
import re
import shutil
import socket
import socketserver
import ssl
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

from .test_peers import free_port, issue

ROOT = Path(__file__).resolve().parents[3]
ROLE = ROOT / "roles/media_vip"
NODES = {"node1": "127.0.1.1", "node2": "127.0.1.2", "node3": "127.0.1.3"}


def program(name: str) -> str:
    """Return where a program of Debian's is, or skip."""
    found = shutil.which(name, path=f"{os.environ['PATH']}:/usr/sbin:/sbin")
    if found is None:
        pytest.skip(f"{name} is not installed; on Debian: apt-get install {name}")
    return found


def render(role: str, template: str, **given: Any) -> str:
    """Render a template as the action does, with the role's defaults and variables."""
    base = ROOT / "roles" / role
    variables: dict[str, Any] = {"ansible_managed": "test", "ansible_facts": {"distribution_major_version": "12"}}
    for file in ("defaults/main.yml", "vars/main.yml"):
        if (base / file).exists():
            variables |= yaml.safe_load((base / file).read_text(encoding="utf-8"))
    text = (base / "templates" / template).read_text(encoding="utf-8")
    templar = Templar(loader=DataLoader(), variables=variables | given)
    return str(templar.template(trust_as_template(text), escape_backslashes=False, overrides={"trim_blocks": True}))


# --- keepalived ---------------------------------------------------------------------------


def keepalived(**given: Any) -> str:
    nodes = {"node1": "192.0.2.11", "node2": "192.0.2.12", "node3": "192.0.2.13"}
    wanted = {"media_vip_node": "node2", "media_vip_nodes": nodes, "media_vip_address": "192.0.2.10/24"}
    return render("media_vip", "keepalived.conf.j2", **wanted, __media_vip_device="eth7", **given)


def test_keepalived_speaks_to_the_other_nodes_alone_one_a_line() -> None:
    lines = [line.strip() for line in keepalived().splitlines()]
    start = lines.index("unicast_peer {")
    assert lines[start + 1 : lines.index("}", start)] == ["192.0.2.11 min_ttl 255", "192.0.2.13 min_ttl 255"]
    for line in ("unicast_src_ip 192.0.2.12", "192.0.2.10/24", "interface eth7", "version 3", "unicast_ttl 255"):
        assert line in lines


def test_a_dead_nginx_weighs_more_than_a_site_that_is_not_ready_and_somebody_always_holds_the_address() -> None:
    text = keepalived()
    found = re.findall(r"vrrp_script (\w+) {(.*?)\n}", text, re.DOTALL)
    checks = {
        name: (re.findall(r"http://\S+[^\s\"]", body), int(body.rpartition("weight ")[2])) for name, body in found
    }
    (edge, dead), (ready, sick) = checks["edge_alive"], checks["site_ready"]
    assert edge == ["http://127.0.0.1:80/_tribrick_alive"] and ready == ["http://localhost/readyz"]
    assert "--unix-socket /run/tribrick-balancer/site.sock http://localhost/readyz" in text
    # Every node starts with the same priority; a check without a weight would leave the address to nobody.
    assert 100 > 100 + sick > 100 + dead > 0
    assert {word for word in text.split("track_script {")[1].split() if word != "}"} == set(checks)


def test_keepalived_takes_the_configuration(tmp_path: Path) -> None:
    link = next((name for _, name in socket.if_nameindex() if name != "lo"), None)
    if link is None:
        pytest.skip("this machine has no network interface but lo, which VRRP refuses")
    file = tmp_path / "keepalived.conf"
    command = [program("keepalived"), "--config-test", "--use-file", str(file)]
    file.write_text(keepalived().replace("interface eth7", f"interface {link}"))
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout + done.stderr) == (0, "")
    file.write_text(file.read_text().replace("priority 100", "priority many"))
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0


# --- nginx --------------------------------------------------------------------------------


def web(**given: Any) -> str:
    files = ("site.conf.j2", "locations.conf.j2")
    return "\n".join(render("media_web", file, inventory_hostname="node1", **given) for file in files)


def test_nginx_answers_for_itself_only_where_it_is_wanted() -> None:
    assert "alive" not in web() and "return 308" in web(media_web_https_redirect=True)
    text = web(media_web_alive_path="/_tribrick_alive", media_web_https_redirect=True)
    assert text.count("location = /_tribrick_alive { access_log off; return 204; }") == 2, "on both ports"
    assert "location / { return 308 https://$host$request_uri; }" in text


# --- three balancers ----------------------------------------------------------------------


class Handler(BaseHTTPRequestHandler):
    """A site: says whether it is ready, keeps what is uploaded, can die in the middle."""

    site: Fake
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        site = self.site
        if self.path == "/readyz":
            # A site that wants HTTPS sends plain HTTP elsewhere.
            https = self.headers.get("X-Forwarded-Proto") == "https" and self.headers.get("Host")
            self.answer(200 if site.ready and https else 503, "ready" if site.ready else "not ready")
        elif self.path == "/healthz":
            self.answer(200, "alive")
        else:
            self.answer(200, f"{self.headers.get('X-Forwarded-For')} {self.headers.get('X-Forwarded-Proto')}")

    def do_POST(self) -> None:
        site = self.site
        body = self.rfile.read(int(self.headers["Content-Length"]))
        site.stored.append(body)
        if site.dies:
            site.close()
            self.connection.shutdown(socket.SHUT_RDWR)
            self.close_connection = True
        elif site.ready:
            self.answer(201, "stored")
        else:
            self.answer(503, "the site's own 503")

    def answer(self, status: int, text: str) -> None:
        self.send_response(status)
        self.send_header("X-Node", self.site.name)
        self.send_header("X-Accel-Redirect", "/_protected/a")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text.encode())

    def address_string(self) -> str:
        return "local"

    def log_message(self, *args: object) -> None:
        """Quiet."""


class Fake:
    """The Django site's part on one node."""

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.ready, self.dies = True, False
        self.stored: list[bytes] = []
        self.server: socketserver.ThreadingUnixStreamServer | None = None
        self.open()

    def open(self) -> None:
        self.path.unlink(missing_ok=True)
        handler = type("H", (Handler,), {"site": self})
        self.server = socketserver.ThreadingUnixStreamServer(str(self.path), handler)
        self.server.daemon_threads = True
        self.path.chmod(0o666)
        threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()

    def close(self) -> None:
        """Stop listening, like a node that is gone."""
        server, self.server = self.server, None
        if server is not None:
            self.path.unlink(missing_ok=True)
            server.shutdown()
            server.server_close()


def haproxy(admin: Path, **given: Any) -> str:
    """The balancer's configuration, for a test: users and the directory of the unit are those of a node."""
    text = render("media_vip", "haproxy.cfg.j2", **given)
    for there, here in (
        ("    user haproxy\n", ""),
        ("    group www-data\n", ""),
        (" user root group www-data", ""),
        ("/run/tribrick-balancer/admin.sock", str(admin)),
    ):
        assert there in text
        text = text.replace(there, here)
    return text


def test_the_order_of_the_nodes_is_of_no_account() -> None:
    """Ansible's filter `difference` gives another one each time, and a configuration that differs is reloaded."""
    given = {"media_vip_node": "node2", "media_vip_address": "192.0.2.10/24", "__media_vip_device": "eth0"}
    orders = (NODES, dict(reversed(NODES.items())))
    for file in ("haproxy.cfg.j2", "keepalived.conf.j2"):
        one, other = (render("media_vip", file, media_vip_nodes=nodes, **given) for nodes in orders)
        assert one == other, file


class Balanced:
    """Three sites, three balancers."""

    def __init__(self, work: Path) -> None:
        self.work, self.port = work, free_port()
        work.chmod(0o755)
        ca = issue(work, "ca", "Tribrick nodes")
        self.sites: dict[str, Fake] = {}
        self.processes: dict[str, subprocess.Popen[bytes]] = {}
        for name in NODES:
            issue(work, name, name, ca)
            self.sites[name] = Fake(name, work / f"{name}.site")
        issue(work, "stranger", "node4", ca)
        issue(work, "site", "node2.site", ca)
        for name in NODES:
            self.start(name)

    def configuration(self, name: str, left_out: str = "") -> Path:
        text = haproxy(
            self.work / f"{name}.admin",
            media_vip_node=name,
            media_vip_nodes={node: address for node, address in NODES.items() if node != left_out},
            media_vip_port=self.port,
            media_vip_socket=str(self.work / f"{name}.sock"),
            media_vip_site_socket=str(self.work / f"{name}.site"),
            media_vip_certificate=str(self.work / f"{name}.crt"),
            media_vip_ca=str(self.work / "ca.crt"),
            media_vip_answer_timeout=10,
        )
        file = self.work / f"{name}.cfg"
        file.write_text(text)
        return file

    def start(self, name: str, left_out: str = "") -> None:
        log = (self.work / f"{name}.log").open("ab")
        command = [program("haproxy"), "-db", "-f", str(self.configuration(name, left_out))]
        self.processes[name] = subprocess.Popen(command, stdout=log, stderr=log)

    def kill(self, name: str) -> None:
        """A node dies: balancer and site together."""
        self.processes[name].kill()
        self.processes[name].wait(30)
        self.sites[name].close()

    def roll_out_without(self, left_out: str) -> None:
        """A rollout with `absent`; who is left out keeps what it has."""
        for name in NODES:
            if name != left_out:
                self.processes[name].kill()
                self.processes[name].wait(30)
                self.start(name, left_out)

    def ask(self, node: str, method: str, path: str, body: bytes | None = None) -> tuple[int, dict[str, str], str]:
        """Ask a node's balancer as its nginx does."""
        connection = http.client.HTTPConnection("localhost", timeout=30)
        connection.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        connection.sock.settimeout(30)
        connection.sock.connect(str(self.work / f"{node}.sock"))
        headers = {"X-Forwarded-For": "203.0.113.9", "X-Forwarded-Proto": "https"}
        with contextlib.closing(connection):
            connection.request(method, path, body=body, headers=headers)
            answer = connection.getresponse()
            return answer.status, {k.lower(): v for k, v in answer.getheaders()}, answer.read().decode()

    def answered_by(self, node: str, count: int = 12) -> set[str]:
        """The sites that answer requests through a node's balancer."""
        return {self.ask(node, "GET", "/page")[1].get("x-node", "nobody") for _ in range(count)}

    def wait(self, what: str, condition: Callable[[], bool], deadline: float = 30) -> None:
        end = time.monotonic() + deadline
        while True:
            with contextlib.suppress(OSError, http.client.HTTPException):
                if condition():
                    return
            logs = "\n".join(file.read_text(errors="replace")[-2000:] for file in sorted(self.work.glob("*.log")))
            assert time.monotonic() < end, f"not within {deadline} s: {what}\n{logs}"
            time.sleep(0.05)  # ask again, until the deadline

    def close(self) -> None:
        for process in self.processes.values():
            process.kill()
            process.wait(30)
        for site in self.sites.values():
            site.close()


@pytest.fixture
def balanced(tmp_path: Path) -> Iterator[Balanced]:
    program("haproxy")
    here = Balanced(tmp_path)
    try:
        here.wait("all take part", lambda: here.answered_by("node1") == set(NODES))
        yield here
    finally:
        here.close()


def test_haproxy_takes_the_configuration_and_refuses_a_broken_one(balanced: Balanced) -> None:
    command = [program("haproxy"), "-c", "-f", str(balanced.configuration("node2"))]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr
    assert "WARNING" not in done.stderr
    file = balanced.work / "node2.cfg"
    file.write_text(file.read_text().replace("balance leastconn", "balance fairly"))
    assert subprocess.run(command, capture_output=True, timeout=60, check=False).returncode != 0


def test_requests_go_to_all_nodes_with_the_visitors_address_and_scheme(balanced: Balanced) -> None:
    for node in NODES:
        balanced.wait("all take part", lambda node=node: balanced.answered_by(node) == set(NODES))
        for _ in range(6):
            status, headers, text = balanced.ask(node, "GET", "/page")
            assert (status, text) == (200, "203.0.113.9 https")
            assert headers["x-accel-redirect"] == "/_protected/a", "nginx must see it, wherever the site is"


def test_who_asks_a_node_how_it_is_hears_of_that_node(balanced: Balanced) -> None:
    balanced.sites["node2"].ready = False
    for node in NODES:
        for path in ("/readyz", "/healthz"):
            answers = {balanced.ask(node, "GET", path)[1]["x-node"] for _ in range(6)}
            assert answers == {node}
    assert balanced.ask("node2", "GET", "/readyz")[0] == 503


def test_a_node_that_is_not_ready_leaves_and_returns(balanced: Balanced) -> None:
    balanced.sites["node2"].ready = False
    for node in NODES:
        balanced.wait("node2 is left out", lambda node=node: balanced.answered_by(node) == {"node1", "node3"}, 15)
    assert balanced.ask("node2", "POST", "/upload", b"x")[0] == 201, "its own visitors upload to the others"
    balanced.sites["node2"].ready = True
    for node in NODES:
        balanced.wait("node2 is back", lambda node=node: balanced.answered_by(node) == set(NODES), 15)


def test_a_node_that_a_rollout_leaves_out_is_by_itself(balanced: Balanced) -> None:
    """It may have its media elsewhere, so no request of one side may come to the other."""
    balanced.roll_out_without("node2")
    sides = {"node1": {"node1", "node3"}, "node3": {"node1", "node3"}, "node2": {"node2"}}
    for node in sides:
        balanced.wait(f"{node} asks its side", lambda node=node: balanced.answered_by(node) == sides[node], 15)
    balanced.sites["node2"].ready = False
    log = balanced.work / "node2.log"
    balanced.wait("node2 knows of nobody who is ready", lambda: "ready has no server available" in log.read_text(), 15)
    answers = [balanced.ask("node2", "POST", "/upload", b"x") for _ in range(12)]
    assert {(answer[0], answer[1].get("x-node")) for answer in answers} == {(503, "node2")}, "its own words"
    for node in ("node1", "node3"):
        assert balanced.answered_by(node) == sides[node]


def test_when_none_is_ready_all_stay_in_and_the_site_itself_refuses_uploads(balanced: Balanced) -> None:
    for site in balanced.sites.values():
        site.ready = False
    balanced.wait("none is ready", lambda: balanced.ask("node1", "POST", "/upload", b"x")[0] == 503, 15)
    balanced.wait("all stay in", lambda: balanced.answered_by("node1") == set(NODES), 15)
    status, headers, text = balanced.ask("node1", "POST", "/upload", b"x")
    assert (status, text) == (503, "the site's own 503")
    assert headers["x-node"] in NODES


def test_a_dead_node_costs_no_request(balanced: Balanced) -> None:
    balanced.kill("node2")
    answers = [balanced.ask("node1", "GET", "/page") for _ in range(20)]
    uploads = [balanced.ask("node1", "POST", "/upload", b"%d" % number) for number in range(20)]
    assert {answer[0] for answer in answers} == {200}
    assert {answer[0] for answer in uploads} == {201}, "nothing had been sent, so another node may be tried"
    kept = [body for site in balanced.sites.values() for body in site.stored]
    assert sorted(kept) == sorted(b"%d" % number for number in range(20)), "each once"


def test_an_upload_is_not_sent_again_when_its_node_dies_in_the_middle(balanced: Balanced) -> None:
    for site in balanced.sites.values():
        site.dies = True
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as wire:
        wire.settimeout(30)
        wire.connect(str(balanced.work / "node1.sock"))
        # In one piece, as nginx sends it: HAProxy has all that it would need to send it again.
        wire.sendall(b"POST /upload HTTP/1.1\r\nHost: x\r\nContent-Length: 9\r\n\r\nonly once")
        line = wire.makefile("rb").readline()
    assert line == b"", "no answer: nginx makes its page with Retry-After of it"
    assert [body for site in balanced.sites.values() for body in site.stored] == [b"only once"]


def test_without_any_site_nginx_gets_no_answer_and_makes_its_own_page(balanced: Balanced) -> None:
    for site in balanced.sites.values():
        site.close()
    end = time.monotonic() + 30
    while True:
        try:
            status = balanced.ask("node1", "GET", "/page")[0]
        except http.client.RemoteDisconnected:
            break
        assert status == 200 and time.monotonic() < end, "an answer that nobody has given"


def test_strangers_get_nowhere(balanced: Balanced) -> None:
    def page(name: str) -> bytes:
        context = ssl.create_default_context(cafile=str(balanced.work / "ca.crt"))
        if name:
            context.load_cert_chain(balanced.work / f"{name}.crt", balanced.work / f"{name}.key")
        plain = socket.create_connection((NODES["node1"], balanced.port), timeout=20)
        with context.wrap_socket(plain, server_hostname="node1") as wire:
            wire.sendall(b"GET /page HTTP/1.1\r\nHost: node1\r\nConnection: close\r\n\r\n")
            return wire.makefile("rb").readline()

    assert page("node3") == b"HTTP/1.1 200 OK\r\n"
    assert page("stranger") == b"", "of the same CA, and no node of the site"
    assert page("site") == b"", "a process of the site cannot say who the visitor is"
    with pytest.raises(OSError, match=r"certificate required|reset|closed"):
        page("")
