"""What an upload leaves on the bricks, and what may be asked about them."""

from __future__ import annotations

import io
import json

from PIL import Image

from helpers import CLIENT, NODES, picture, sha256


def test_same_hash_on_bricks_mounts_and_web_servers(rig):
    content = picture(300_000)
    wanted = sha256(content)
    row = rig.upload("node2", content)
    for node in NODES:
        said = rig.ssh(node, f"sha256sum {rig.brick}/{row['name']} {rig.mount}/{row['name']}")
        on_brick, on_mount = said.split()[::2]
        assert on_brick == wanted, f"brick of {node}"
        assert on_mount == wanted, f"mount of {node}"
        assert sha256(rig.fetch(node, row).content) == wanted, f"web of {node}"


def test_volume_is_as_designed(rig):
    state = rig.volume_state()
    assert state["status"] == "Started"
    assert state["replicas"] == "3"
    assert state["bricks"] == [f"{node}:{rig.brick}" for node in NODES]
    wanted = {"client.ssl": "on", "server.ssl": "on", "network.ping-timeout": "20", "cluster.quorum-type": "auto"}
    assert {name: state["options"].get(name) for name in wanted} == wanted
    assert set(state["options"]["auth.ssl-allow"].split(",")) == set(NODES)
    assert sorted(rig.bricks_online()) == sorted(NODES)


def test_every_node_tells_the_site_of_every_other_what_lies_on_its_brick(rig):
    content = picture(40_000)
    name = rig.upload("node1", content)["name"]
    question = "".join(json.dumps(one) + "\n" for one in (name, "photos/none.png")).encode()
    for asker in NODES:
        for node in NODES:
            status, said = rig.peer(asker, "POST", node, "/hashes/hashes", question)
            assert status == 200, said
            there, missing = map(json.loads, said.splitlines())
            assert there == {"name": name, "sha256": sha256(content), "size": len(content), "zero_tail": False}
            assert missing == {"name": "photos/none.png", "error": "missing"}
    status, said = rig.peer("node2", "GET", "node3", "/hashes/walk")
    names = [json.loads(line)["name"] for line in said.splitlines()]
    assert status == 200
    assert name in names
    assert not [one for one in names if one.startswith(".")]


def test_nobody_else_is_told_and_nothing_else_is_answered(rig):
    def ask(method, path, body=b"", **more):
        return rig.peer("node1", method, "node2", path, body, **more)[0]

    assert ask("GET", "/hashes/walk") == 200, "the positive control"
    assert ask("GET", "/hashes/walk", certificate="") in (0, 400)
    assert ask("DELETE", "/hashes/hashes") == 403
    assert ask("GET", "/hashes/../etc/passwd") in (400, 404)
    assert ask("PUT", "/files/photos/x.png", b"x") == 404


def test_the_sites_certificate_is_none_of_the_pool_nor_the_other_way_round(rig):
    pool = "openssl verify -CAfile /etc/ssl/glusterfs.ca"
    assert rig.run_root("node1", f"{pool} /etc/ssl/glusterfs.pem").returncode == 0, "the positive control"
    assert rig.run_root("node1", f"{pool} {CLIENT}.crt").returncode != 0
    rig.root("node1", "cp /etc/ssl/glusterfs.pem /run/pool.crt; cp /etc/ssl/glusterfs.key /run/pool.key")
    assert rig.peer("node1", "GET", "node2", "/hashes/walk", certificate="/run/pool")[0] in (0, 400)


def test_the_hasher_can_only_read(rig):
    pid = rig.root("node1", "systemctl show --property=MainPID --value tribrick-hashes").strip()
    lines = rig.root("node1", f"cat /proc/{pid}/status").splitlines()
    status = dict(line.split(":\t", 1) for line in lines if ":\t" in line)
    assert int(status["CapEff"], 16) == 1 << 2, "CAP_DAC_READ_SEARCH and nothing more"
    assert status["Uid"].split()[1] != "0"
    networks = rig.root("node1", f"cat /proc/{pid}/net/dev").splitlines()[2:]
    assert {line.split(":")[0].strip() for line in networks} <= {"lo"}


def test_catalog_and_volume_agree(rig):
    """Every file has its row and every row its file, thumbnails too; and the site's role sees all sessions."""
    whole = io.BytesIO()
    Image.new("RGB", (60, 40), (200, 80, 40)).save(whole, "PNG")  # one that can be decoded has a thumbnail
    row = rig.upload("node1", whole.getvalue())
    told = rig.request("GET", "node2", f"/api/media/{row['name']}", headers=rig.auth).json()
    thumbnail = told["thumbnail"].partition("/media/")[2]
    report = json.loads(rig.root("node3", "tribrick audit --json", timeout=300))
    assert report["checked"] >= 2, report
    assert not report["findings"], report
    rig.root("node1", "tribrick sweep", timeout=120)
    for name in (row["name"], thumbnail):
        assert rig.root("node2", f"tribrick versions {name} --json").count(name) == 1
    assert rig.request("DELETE", "node2", f"/api/media/{row['name']}", headers=rig.auth).status_code == 204
    del rig.known[row["name"]]
    for name in (row["name"], thumbnail):
        assert rig.run_root("node1", f"test -e {rig.brick}/{name}").returncode == 1
