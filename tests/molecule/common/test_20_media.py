"""An upload through any node is everywhere at once, and the same bytes."""

from __future__ import annotations

import json
import time

import pytest

from helpers import NODES, picture, wait_until


@pytest.mark.parametrize("node", NODES)
def test_upload_is_read_on_the_others_within_a_second(rig, node):
    content = picture()
    row = rig.upload(node, content)
    start = time.monotonic()
    for other in NODES:
        answer = rig.fetch(other, row)
        assert answer.status_code == 200, f"{other}: {answer.status_code}"
        assert answer.content == content
    assert time.monotonic() - start < 1.0
    assert row["node"] == node



def test_delete_is_seen_everywhere(rig):
    row = rig.upload("node1")
    for node in NODES:  # twice: where there is a cache, it is in it
        assert [rig.fetch(node, row).status_code for _ in range(2)] == [200, 200]
    answer = rig.request("DELETE", "node3", f"/api/media/{row['name']}", headers=rig.auth)
    assert answer.status_code == 204
    del rig.known[row["name"]]
    for node in NODES:
        wait_until(f"404 on {node}", lambda node=node: rig.fetch(node, row).status_code == 404, 5)
        assert rig.request("GET", node, f"/api/media/{row['name']}", headers=rig.auth).status_code == 404


def test_new_version_has_a_new_name(rig):
    old = rig.upload("node1")
    content = picture()
    answer = rig.request("PUT", "node2", f"/api/media/{old['name']}", headers=rig.auth,
                         files={"file": ("second.png", content)})
    assert answer.status_code == 201, answer.text
    assert answer.json()["name"] != old["name"]
    assert rig.fetch("node3", answer.json()).content == content


def test_status_page_and_healthz(rig):
    for node in NODES:
        assert rig.request("GET", node, "/healthz").json() == {"status": "alive", "node": node}
        assert json.loads(rig.request("GET", node, "/readyz").text)["status"] == "ready"
        assert node in rig.request("GET", node, "/").text
