"""The rollout with an address run again, and, in the long set, without one: it is taken away, and the site goes on."""

from __future__ import annotations

from helpers import LONG, NODES, wait_until

OURS = ("tribrick-address.service", "tribrick-balancer.service")


def test_second_rollout_changes_nothing(rig):
    holder = rig.holder()
    again = rig.rollout().good()
    assert not any(again.changed().values()), again.tasks_that_changed()
    assert rig.holder() == holder, "the address moved"
    print(f"second site.yml with an address: {again.seconds:.0f} s")


def test_everything_is_served_by_every_node(rig):
    rig.settle(90)


def left(rig, node: str) -> list[str]:
    """Return what there still is of address and balancer on a node."""
    script = (
        "ls /etc/tribrick/haproxy.cfg /etc/tribrick/keepalived.conf /run/tribrick-balancer 2>/dev/null;"
        f" ls {' '.join(f'/etc/systemd/system/{unit}' for unit in OURS)} 2>/dev/null;"
        f" systemctl is-active {' '.join(OURS)} | grep -x active; ip -o address show to {rig.vip};"
        " nft list ruleset | grep -E '7445|vrrp'; grep -r tribrick-balancer /etc/nginx;"
        " pgrep -l 'haproxy|keepalived'; :"
    )
    return rig.root(node, script).splitlines()


if LONG:

    def test_without_an_address_nothing_of_it_is_left(rig):
        row = rig.upload("node1")
        assert all(left(rig, node) for node in NODES)
        assert any(rig.rollout("-e", "tribrick_vip=").good().changed().values())
        assert {node: left(rig, node) for node in NODES} == {node: [] for node in NODES}
        rig.settle(90)
        assert all(rig.fetch(node, row).status_code == 200 for node in NODES)
        again = rig.rollout("-e", "tribrick_vip=").good()
        assert not any(again.changed().values()), again.tasks_that_changed()
        rig.rollout().good()
        wait_until("one node to hold the address again", lambda: len(rig.holders()) == 1, 30)
