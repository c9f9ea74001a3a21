"""From the bare image: the rollout installed what it needs, and a Python index was not part of that."""

from __future__ import annotations


def test_packages_came_with_the_rollout(host):
    for package in ("glusterfs-server", "glusterfs-client", "nginx", "nftables"):
        assert host.package(package).is_installed


def test_wheels_came_from_the_controller(host):
    assert host.run("ls /opt/tribrick/wheelhouse/*.tar").rc == 0
    assert host.file("/opt/tribrick/site").is_symlink
