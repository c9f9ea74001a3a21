"""Media without a shared file system: what was acknowledged is where it was promised, whoever is away."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from urllib.parse import urlsplit

import pytest

from helpers import CLIENT, NODES, Rig, chance, picture, sha256, wait_until

ROOT = "/srv/media"


@pytest.fixture(scope="module")
def backend(rig: Rig) -> str:
    return str(rig.variables["media_backend"])


@pytest.fixture(scope="module")
def away(rig: Rig) -> str:
    """Return the node that is away in this run."""
    return chance("away").choice(NODES)


def on_disk(rig: Rig, name: str, nodes: tuple[str, ...] | list[str] = NODES) -> dict[str, str]:
    """Return node -> SHA-256 of a file on its disk, of those that have it."""
    found = {}
    for node in nodes:
        done = rig.run_root(node, f"sha256sum {ROOT}/{name}")
        if done.returncode == 0:
            found[node] = done.stdout.split()[0]
    return found


@contextlib.contextmanager
def without_receiver(rig: Rig, *nodes: str) -> Iterator[None]:
    """Stop receivers, and let connections be refused as if nobody listened."""
    for node in nodes:
        rig.root(node, "systemctl stop tribrick-receiver.socket tribrick-receiver.service")
    try:
        yield
    finally:
        for node in nodes:
            rig.root(node, "systemctl start tribrick-receiver.socket tribrick-receiver.service")


def everywhere_on_disk(rig: Rig, row: dict, deadline: float = 60) -> None:
    wanted = dict.fromkeys(NODES, row["sha256"])
    wait_until(f"{row['name']} on all disks", lambda: on_disk(rig, row["name"]) == wanted, deadline)


@pytest.mark.parametrize("node", NODES)
def test_an_upload_is_read_through_all_nodes_and_on_the_promised_disks_before_the_answer(rig, backend, node):
    content = picture(60_000)
    row = rig.upload(node, content)
    promised = on_disk(rig, row["name"])
    least = 1 if backend == "async" else 2
    assert len(promised) >= least, promised
    assert set(promised.values()) == {sha256(content)}
    if backend != "distributed":
        assert node in promised
    for other in NODES:
        answer = rig.fetch(other, row)
        assert answer.status_code == 200, f"{other}: {answer.status_code}"
        assert answer.content == content
        assert answer.headers["Content-Type"] == "image/png"
        assert answer.headers["X-Content-Type-Options"] == "nosniff"
        assert "immutable" in answer.headers["Cache-Control"]
    everywhere_on_disk(rig, row, 20)


def test_a_file_that_a_node_has_not_got_is_served_from_another(rig):
    content = picture()
    row = rig.upload("node1", content)
    everywhere_on_disk(rig, row, 20)
    path = f"{ROOT}/{row['name']}"
    try:
        for node in NODES:
            rig.root(node, f"mv {path} {ROOT}/kept")
        rig.root("node2", f"mv {ROOT}/kept {path}")
        for node in NODES:
            answer = rig.fetch(node, row)
            assert (answer.status_code, answer.content) == (200, content), node
            assert answer.headers["Content-Type"] == "image/png"
            assert "sandbox" in answer.headers["Content-Security-Policy"]
            assert rig.fetch(node, row, headers={"Range": "bytes=10-19"}).content == content[10:20]
        rig.root("node2", f"mv {path} {ROOT}/kept")
        assert rig.fetch("node1", row).status_code == 404, "all nodes have said that there is none"
        with without_receiver(rig, "node2"):
            assert rig.fetch("node1", row).status_code == 503, "one node did not say anything"
    finally:
        for node in NODES:
            rig.root(node, f"test ! -e {ROOT}/kept || mv {ROOT}/kept {path}")
    everywhere_on_disk(rig, row, 5)


def test_private_files_are_for_their_owner_only_on_every_node(rig):
    content = picture()
    row = rig.upload("node2", content, data={"private": "1"})
    assert row["name"].startswith("private/"), row
    wait_until("it on all disks", lambda: len(on_disk(rig, row["name"])) == len(NODES), 20)
    for gone in (False, True):
        if gone:  # now it comes from another node, if at all
            rig.root("node1", f"rm {ROOT}/{row['name']}")
        for node in NODES:
            for path in (f"/media/{row['name']}", f"/_protected/{row['name']}"):
                assert rig.request("GET", node, path).status_code == 404, f"{node} {path}"
            path = urlsplit(row["url"]).path
            assert rig.request("GET", node, path).status_code in (302, 401, 403, 404)
            answer = rig.request("GET", node, path, headers=rig.auth)
            assert (answer.status_code, answer.content) == (200, content), f"{node} {path}"
            assert "private" in answer.headers["Cache-Control"]


def test_strangers_cannot_store_or_delete(rig):
    body = picture(100)
    headers = {"X-Content-SHA256": sha256(body)}
    name = f"/files/photos/{sha256(body)[:20]}.png"

    def ask(method: str, **more) -> int:
        data = body if method == "PUT" else b""
        return rig.peer("node1", method, "node2", more.pop("path", name), data, headers, **more)[0]

    assert ask("PUT", certificate="") in (0, 400)
    assert ask("GET", certificate="") in (0, 400)
    # Of the right CA, but the certificate of a node (which may read) and not of a site.
    assert ask("PUT", certificate="/etc/tribrick/receiver/node") == 403
    assert ask("DELETE", certificate="/etc/tribrick/receiver/node") == 403
    # Of another CA, with the right name.
    rig.root(
        "node1",
        "openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 1 -subj /CN=node1.site"
        " -keyout /run/foreign.key -out /run/foreign.crt 2>/dev/null",
    )
    assert ask("PUT", certificate="/run/foreign") in (0, 400)
    assert on_disk(rig, name.removeprefix("/files/")) == {}
    for bad in ("/files/../etc/passwd", "/files/photos/../../x", "/files/.tribrick-incoming/x", "/photos/x.png"):
        assert ask("PUT", path=bad) in (400, 404), bad
    assert ask("PUT") == 201, "the positive control"
    assert on_disk(rig, name.removeprefix("/files/")) == {"node2": sha256(body)}
    assert ask("DELETE") == 204
    assert ask("PUT") == 410, "a deleted name never comes back"
    key = rig.root("node1", f"stat -c %U:%G:%a {CLIENT}.key").strip()
    assert key == "root:tribrick:640"


def test_a_node_away_misses_nothing(rig, backend, away):
    others = [node for node in NODES if node != away]
    doomed = rig.upload(others[0])
    everywhere_on_disk(rig, doomed)
    rig.docker("kill", rig.container(away))
    rows = [rig.upload(node) for node in others]
    for row in rows:
        least = 1 if backend == "async" else 2
        assert len(on_disk(rig, row["name"], others)) >= least
        for node in others:
            assert sha256(rig.fetch(node, row).content) == row["sha256"]
    answer = rig.request("DELETE", others[1], f"/api/media/{doomed['name']}", headers=rig.auth, timeout=60)
    assert answer.status_code == 204, answer.text
    del rig.known[doomed["name"]]
    # A worker that is killed meanwhile loses none of it.
    rig.root(others[0], "systemctl kill --signal=KILL tribrick-replicate.service")
    rig.docker("start", rig.container(away))
    rig.wait_ready(120, [away])
    for row in rows:
        everywhere_on_disk(rig, row, 120)
    wait_until("the bytes to be gone", lambda: on_disk(rig, doomed["name"]) == {}, 120)
    for node in NODES:
        assert rig.fetch(node, doomed).status_code in (404, 410), node
    rig.check_known()


def test_with_two_receivers_away_an_upload_is_refused_and_leaves_nothing(rig, backend):
    def files() -> dict[str, set[str]]:
        return rig.everywhere(lambda n: set(rig.root(n, f"find {ROOT}/photos -type f").split()))

    if backend == "async":
        with without_receiver(rig, "node2", "node3"):
            row = rig.upload("node1")
            assert on_disk(rig, row["name"]) == {"node1": row["sha256"]}
        everywhere_on_disk(rig, row, 120)
        return
    before = files()
    with without_receiver(rig, "node2", "node3"):
        answer = rig.try_upload("node1", picture())
        assert answer.status_code == 503, f"{answer.status_code} {answer.text[:300]}"
    assert files() == before
    row = rig.upload("node1")
    everywhere_on_disk(rig, row)


def test_preflight_refuses_another_back_end_and_a_wrong_one(rig, backend):
    other = "async" if backend == "hybrid" else "hybrid"
    rig.rollout("-e", f"media_backend={other}").refused(
        rf"node1, node2 and node3 already run media_backend {backend}, the inventory says {other}"
    )
    rig.rollout("-e", "media_backend=hybird").refused(r"Did you mean 'hybrid'\?")
    rig.rollout("-e", "tribrick_receiver_server=apache").refused(r"tribrick_receiver_server is 'apache'")


def test_no_gluster_and_no_mount_is_there(rig):
    for node in NODES:
        assert rig.run_root(node, "systemctl is-active glusterd").stdout.strip() in ("inactive", "unknown")
        assert rig.run_root(node, f"mountpoint -q {ROOT}").returncode != 0
        assert json.loads(rig.request("GET", node, "/readyz").text)["status"] == "ready"
