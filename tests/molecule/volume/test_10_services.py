"""What holds on each node where the media lie on a volume."""

from __future__ import annotations

import pytest

OURS = [
    "glusterd.service", "tribrick-bricks.service", "tribrick-media-guard.service", "tribrick-media-keeper.timer",
    "tribrick-hashes.socket", "tribrick-hashes.service", "tribrick-origin.service", "tribrick-standby.socket",
    "tribrick-standby.service", "tribrick-brick.socket", "tribrick-brick.service", "tribrick-purge.service",
]


@pytest.mark.parametrize("unit", OURS)
def test_unit_of_the_volume_runs_is_the_kits_and_starts_at_boot(host, unit):
    service = host.service(unit)
    assert service.is_running, host.run(f"journalctl -n 40 --no-pager -u {unit}").stdout
    assert service.is_enabled
    path = host.check_output(f"systemctl show --property=FragmentPath --value {unit}")
    assert path == f"/etc/systemd/system/{unit}"


def test_hash_directories_belong_to_the_site(host):
    directory = host.file("/srv/media/photos/0/f")
    assert directory.is_directory
    assert (directory.uid, directory.gid) == (2971, 2971)


def test_bricks_outlive_glusterd_by_their_unit(host):
    assert host.check_output("systemctl show --property=KillMode --value glusterd") == "process"


def test_media_root_is_the_volume(host):
    mount = host.mount_point("/srv/media")
    assert mount.exists
    assert mount.filesystem == "fuse.glusterfs"
    sentinel = host.file("/srv/media/.tribrick-volume")
    assert sentinel.is_file
    assert sentinel.mode == 0o444


def test_gluster_packages_are_held(host):
    held = host.check_output("apt-mark showhold").split()
    assert {"glusterfs-server", "glusterfs-client", "glusterfs-common"} <= set(held)


def test_management_tls_is_on_and_the_key_is_private(host):
    assert host.file("/var/lib/glusterd/secure-access").is_file
    assert host.file("/etc/ssl/glusterfs.key").mode & 0o077 == 0
    subject = host.check_output("openssl x509 -in /etc/ssl/glusterfs.pem -noout -subject")
    assert subject.split("CN")[1].strip(" =") == host.check_output("hostname")


def test_brick_ports_are_within_the_range_that_the_firewall_knows(host):
    ports = [
        int(line.split()[3].rsplit(":", 1)[1])
        for line in host.check_output("ss -Hltnp").splitlines() if '"glusterfsd"' in line
    ]
    assert ports
    assert all(49152 <= port <= 49251 for port in ports)
