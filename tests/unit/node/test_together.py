"""Edge and one address together: nginx with cache, origin and standbys, and the site behind two balancers."""

from __future__ import annotations

import contextlib
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest
import requests

from tribrick.testing import wait_for

from .test_edge import SMALL, Node, name, pair
from .test_one_address import free_port, haproxy, program

ADDRESSES = {"node1": "127.0.1.1", "node2": "127.0.1.2"}


def balance(node: Node, port: int) -> subprocess.Popen[bytes]:
    """Start the balancer of a node."""
    text = haproxy(
        node.work / "admin.sock",
        media_vip_node=node.name,
        media_vip_nodes=ADDRESSES,
        media_vip_port=port,
        media_vip_socket=str(node.work / "balancer.sock"),
        media_vip_site_socket=str(node.work / "site.sock"),
        media_vip_certificate=str(node.tls / "node.crt"),
        media_vip_ca=str(node.tls / "ca.crt"),
    )
    file = node.work / "haproxy.cfg"
    file.write_text(text)
    with (node.work / "haproxy.log").open("ab") as log:
        process = subprocess.Popen([program("haproxy"), "-db", "-f", str(file)], stdout=log, stderr=log)
    wait_for((node.work / "balancer.sock").exists, f"the balancer of {node.name} listens")
    return process


@pytest.fixture
def node(tmp_path: Path) -> Iterator[Node]:
    program("haproxy")
    with contextlib.contextmanager(pair)(tmp_path, spools=False) as one, contextlib.ExitStack() as stack:
        port = free_port()
        for each in (one, one.other):
            (each.run / "open").touch()
            process = balance(each, port)
            stack.callback(process.wait, 30)
            stack.callback(process.kill)
            each.switch(each.edge | {"media_web_socket": str(each.work / "balancer.sock")})
        yield one


def with_page(answer: requests.Response, words: str) -> None:
    """It is nginx's own page, and says when to come again."""
    assert (answer.status_code, answer.headers["Retry-After"], words in answer.text) == (503, "5", True)


def test_a_private_file_by_the_site_of_another_node_and_the_disks_of_this_one(node: Node) -> None:
    private, path = name(top="private"), node.work / "site.sock"
    for root in (node.mount, node.mirror):
        node.put(root, private, SMALL)
    node.note("added", private, SMALL)
    path.rename(path.with_suffix(".away"))

    def answered() -> bool:
        return node.get(f"/{private}", Cookie="signed").status_code == 200

    wait_for(answered, "the other node's site answers", 15)
    answer = node.get(f"/{private}")
    assert (answer.status_code, answer.content) == (200, SMALL)
    assert answer.headers["Content-Type"] == "image/x-of-the-site"
    assert answer.headers["X-Tribrick-Source"] == "origin"
    assert "private" in answer.headers["Cache-Control"]
    assert {"X-Accel-Redirect", "X-Tribrick-Signed"} & set(answer.headers) == set()

    with_page(node.get("/readyz"), "Back in a moment")  # who asks this node means this node
    assert node.get("/_tribrick_alive").status_code == 204
    assert node.other.get("/readyz").status_code != 503

    with node.hung():
        answer = node.get(f"/{private}", Cookie="signed")
        assert (answer.status_code, answer.content) == (200, SMALL)
        assert answer.headers["X-Tribrick-Source"] == "standby", "it has seen what the other node's site has signed"
        assert node.get(f"/{private}").status_code == 503, "nobody has signed"


def test_when_no_site_answers_visitors_get_the_page_of_nginx_and_pictures(node: Node) -> None:
    picture = name()
    node.put(node.mount, picture, SMALL)
    for each in (node, node.other):
        path = each.work / "site.sock"
        path.rename(path.with_suffix(".away"))
    with_page(node.get("/page"), "Back in a moment")
    with_page(node.get("/api/photos", "POST"), '"status": 503')
    assert node.get(f"/media/{picture}").content == SMALL
