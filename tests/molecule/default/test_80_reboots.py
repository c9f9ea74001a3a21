"""Reboots by systemd's own shutdown: everything comes back without hands, nothing is lost."""

from __future__ import annotations

import json
import random
import time

import pytest

from helpers import LONG, NODES, chance, wait_until

FLAG = "/etc/lab/link-down-on-stop"
BACK = 90  # seconds for everything to be well again after the containers have been started


def reboot(rig, hosts):
    """Shut down and start hosts side by side; return the seconds of their clock when it began."""
    since = time.time()
    started = rig.everywhere(lambda n: rig.root(n, "ps -o lstart= -p 1"), hosts)
    rig.everywhere(lambda n: rig.docker("restart", "--timeout", "100", rig.container(n)), hosts)
    for host in hosts:
        assert rig.root(host, "ps -o lstart= -p 1") != started[host]  # it was down
    return since


def journal(rig, host, since):
    """Return (time, message) of what the journal kept of the shutdown."""
    lines = rig.root(host, f"journalctl --since=@{since:.0f} -o json --output-fields=MESSAGE --no-pager").splitlines()
    entries = [json.loads(line) for line in lines]
    return [(int(e["__REALTIME_TIMESTAMP"]), str(e.get("MESSAGE"))) for e in entries]


def check_order(rig, host, since):
    """The bricks ended before the network did."""
    entries = journal(rig, host, since)
    stopped = [at for at, text in entries if "bricks stopped" in text]
    down = [at for at, text in entries if "lab network down" in text]
    assert stopped, f"{host}: no brick was stopped: {[t for _, t in entries][:80]}"
    assert down, f"{host}: the network was not stopped by systemd"
    assert stopped[0] < down[0], f"{host}: the network went before the bricks"
    asked = [text.rpartition(":")[2].split() for _, text in entries if "stopping bricks and self-heal daemon:" in text]
    assert len(asked[0]) == 2, f"{host}: one brick and the self-heal daemon were to be stopped: {asked}"
    assert not [text for _, text in entries if "timed out" in text.lower() and "stop" in text.lower()], host


@pytest.mark.parametrize("node", chance("reboot").sample(NODES, len(NODES) if LONG else 1))
def test_reboot_of_one_node(rig, node):
    rig.upload(node)
    # A delete whose unlink was lost, as a power cut of all nodes leaves it: the bytes are back.
    doomed = rig.upload(node)
    file = f"/srv/media/{doomed['name']}"
    answer = rig.request("DELETE", node, f"/api/media/{doomed['name']}", headers=rig.auth, timeout=60)
    assert answer.status_code == 204, answer.text
    del rig.known[doomed["name"]]
    wait_until("its bytes to be gone", lambda: rig.run_root(node, f"test ! -e {file}").returncode == 0, 30)
    rig.root(node, f"echo back > {file}")
    since = reboot(rig, [node])
    rig.settle(BACK)
    check_order(rig, node, since)
    wait_until("the deleted file to be gone again", lambda: rig.run_root(node, f"test ! -e {file}").returncode == 0, 60)


@pytest.mark.parametrize("link_down", [False, True], ids=["network stopped", "link taken down"])
def test_reboot_of_all_three(rig, link_down):
    for node in NODES:
        rig.upload(node)
        rig.root(node, f"touch {FLAG}" if link_down else f"rm -f {FLAG}")
    try:
        since = reboot(rig, random.Random(0).sample(NODES, 3))
        rig.settle(BACK)
        for node in NODES:
            check_order(rig, node, since)
    finally:
        for node in NODES:
            rig.root(node, f"rm -f {FLAG}")


def test_after_the_reboots_the_rollout_finds_nothing_to_do(rig):
    assert set(rig.rollout().good().changed().values()) == {0}
