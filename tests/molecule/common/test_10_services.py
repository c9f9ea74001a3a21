"""Services, units and the mount, as testinfra finds them over SSH with the rendered inventory."""

from __future__ import annotations

import pytest

OURS = [
    "tribrick-firewall.service", "tribrick-site.socket", "tribrick-site.service",
    "tribrick-ledger.service", "tribrick-replicate.service",
]


@pytest.mark.parametrize("unit", [*OURS, "nginx.service"])
def test_unit_runs_and_starts_at_boot(host, unit):
    service = host.service(unit)
    assert service.is_running, host.run(f"journalctl -n 40 --no-pager -u {unit}").stdout
    # The site is started by its socket or by itself, either way without hands.
    by_socket = unit == "tribrick-site.service" and host.service("tribrick-site.socket").is_enabled
    assert service.is_enabled or by_socket


@pytest.mark.parametrize("unit", OURS)
def test_unit_file_is_the_kits(host, unit):
    path = host.check_output(f"systemctl show --property=FragmentPath --value {unit}")
    assert path == f"/etc/systemd/system/{unit}"
    text = host.file(path).content_string
    assert "Tribrick" in text.splitlines()[0] + text.splitlines()[1]


def test_nothing_failed_and_nothing_waits_for_a_reload(host):
    assert host.check_output("systemctl --failed --no-legend --plain") == ""
    stale = host.check_output("systemctl show --property=NeedDaemonReload '*.service' '*.timer' '*.socket' '*.mount'")
    assert "NeedDaemonReload=yes" not in stale


def test_site_user_has_the_fixed_numbers(host):
    user = host.user("tribrick")
    assert (user.uid, user.gid) == (2971, 2971)
    directory = host.file("/srv/media/photos")
    assert directory.is_directory
    assert (directory.uid, directory.gid) == (2971, 2971)





def test_only_our_table_was_added(host):
    assert "table inet tribrick" in host.check_output("nft list tables")


def test_site_runs_confined_as_its_own_user(host):
    pid = host.check_output("systemctl show --property=MainPID --value tribrick-site.service")
    assert pid != "0"
    assert host.check_output(f"ps -o user= -p {pid}") == "tribrick"
    assert "NoNewPrivs:\t1" in host.file(f"/proc/{pid}/status").content_string


@pytest.mark.parametrize("name", ["tribrick-ledger", "tribrick-replicate"])
def test_services_run_the_release_in_service_as_the_sites_user(host, name):
    pid = host.check_output(f"systemctl show --property=MainPID --value {name}")
    assert pid != "0", host.run(f"journalctl -n 20 --no-pager -u {name}").stdout
    assert host.check_output(f"ps -o user= -p {pid}") == "tribrick"
    release = host.check_output("readlink -f /opt/tribrick/site")
    command = host.file(f"/proc/{pid}/cmdline").content_string.split("\0")
    assert command[0].startswith(f"{release}/"), command
    # A service that ends again and again would be running at the moment of looking, too.
    assert host.check_output(f"systemctl show --property=NRestarts --value {name}") == "0"
    assert host.check_output("stat -c %U:%a /var/lib/tribrick") == "tribrick:750"


def test_ledger_of_the_node_is_in_order(host):
    assert "in order up to change" in host.check_output("tribrick ledger verify")
    assert host.run("tribrick --help").stdout.startswith("usage:")
