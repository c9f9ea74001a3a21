"""Every fault that the preflight knows: one good site, one change each, one sentence."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template
from ansible_collections.tribrick.media.plugins.filter import preflight as filters
from ansible_collections.tribrick.media.plugins.module_utils import preflight
from cryptography.hazmat.primitives import serialization
from unit.node.test_peers import issue

ROOT = Path(__file__).resolve().parents[3]
NODES = {"node1": "192.0.2.11", "node2": "192.0.2.12", "node3": "192.0.2.13"}
HOSTS = {**NODES, "db1": "192.0.2.21"}
BRICK = "/srv/gluster/media/brick"
VOLUME_ID = "6f0c1d9e-4a4b-4a39-9b0c-2f6a2b8c1d11"
OTHER_ID = "11111111-2222-4333-8444-555555555555"
GIB = 1 << 30

Site = dict[str, Any]


def good_wish() -> dict[str, Any]:
    return {
        "hosts": list(HOSTS),
        "addresses": dict(HOSTS),
        "absent": [],
        "gluster_servers": list(NODES),
        "app_servers": list(NODES),
        "edge_servers": list(NODES),
        "database_servers": ["db1"],
        "media_backend": "volume",
        "spool": False,
        "receiver_server": "tribrick",
        "ports": {"tribrick_receiver_port": 7443, "tribrick_balancer_port": "7445"},
        "tls": "generated",
        "tls_problem": "",
        "vip": "",
        "vip_interface": "",
        "volume": "media",
        "volume_id": "2b0e4a70-3f5e-4d0e-a58d-0a52f6f6a111",
        "replica": 3,
        "brick_mount": "/srv/gluster/media",
        "brick_path": BRICK,
        "user": "tribrick",
        "uid": 2971,
        "gid": 2971,
        "secrets": {"vault_tribrick_django_secret_key": True},
        "names_pinned": True,
        "known_variables": ["tribrick_media_root", "tribrick_volume", "gluster_volume_options"],
        "debian_releases": ["12", "13"],
        "allow_untested_release": False,
        "allow_shared_filesystem": False,
        "max_clock_offset": 2.0,
        "min_memory_mib": 900,
        "min_system_free_mib": 500,
        "min_brick_gib": 5.0,
        "brick_tolerance_percent": 5.0,
    }


def good_facts(host: str) -> dict[str, Any]:
    """A fresh host, as the module describes it."""
    storage = host in NODES
    facts: dict[str, Any] = {
        "release": {"id": "debian", "version": "13"},
        "gluster": {"installed": None, "candidate": "11.1-6"},
        "memory_mib": 2000,
        "system_free_mib": 9000,
        "systemd": True,
        "python": "3.13.5",
        "brick": None,
        "account": None,
        "pool": {"uuid": None, "peers": [], "volumes": {}},
        "pins": [],
        "names": {name: [address] for name, address in HOSTS.items()},
        "addresses": {name: [name] for name in HOSTS},
        "connect": [],
    }
    if storage:
        facts["brick"] = {
            "mount_exists": True,
            "mounted": True,
            "on_root": False,
            "filesystem": "xfs",
            "exists": False,
            "directory": False,
            "entries": [],
            "volume_id": None,
            "bytes": 100 * GIB,
            "free": 99 * GIB,
        }
        facts["account"] = {"uid": None, "gid": None, "uid_name": None, "gid_name": None}
        facts["connect"] = [
            {"host": peer, "address": address, "port": port, "result": "closed"}
            for peer, address in NODES.items()
            for port in (24007, 49152)
            if peer != host
        ]
    return facts


def fresh() -> Site:
    """Four hosts on which nothing has been rolled out."""
    entries = {
        host: {
            "facts": good_facts(host),
            "clock": {"offset": 0.02, "uncertainty": 0.1},
            "variables": ["tribrick_media_root", "tribrick_volume"],
        }
        for host in HOSTS
    }
    return {"facts": entries, "wish": good_wish()}


def deployed() -> Site:
    """The same hosts after a rollout."""
    site = fresh()
    for number, host in enumerate(NODES):
        facts = site["facts"][host]["facts"]
        facts["gluster"]["installed"] = "11.1-6"
        facts["pins"] = list(HOSTS)
        facts["account"] = {"uid": 2971, "gid": 2971, "uid_name": "tribrick", "gid_name": "tribrick"}
        facts["brick"] |= {"exists": True, "directory": True, "volume_id": VOLUME_ID}
        facts["brick"]["entries"] = [".glusterfs", ".tribrick-volume", "photos"]
        facts["pool"] = {
            "uuid": f"00000000-0000-4000-8000-00000000000{number}",
            "peers": [peer for peer in NODES if peer != host],
            "volumes": {"media": {"id": VOLUME_ID, "bricks": [f"{node}:{BRICK}" for node in NODES]}},
        }
        for end in facts["connect"]:
            end["result"] = "open"
    return site


def judge(site: Site) -> list[str]:
    return preflight.findings(site["facts"], site["wish"])


def leave_out(site: Site, *hosts: str) -> Site:
    """As a run with -e absent=... sees it: those hosts are not in the play."""
    site["wish"]["absent"] = list(hosts)
    for host in hosts:
        site["facts"].pop(host, None)
    return site


@pytest.mark.parametrize("make", [fresh, deployed])
def test_a_good_site_gives_no_finding(make: Callable[[], Site]) -> None:
    site = make()
    before = copy.deepcopy(site)
    assert judge(site) == []
    assert site == before, "judging changes nothing"


def test_a_dead_node_of_a_deployed_site_may_be_left_out() -> None:
    site = leave_out(deployed(), "node2")
    for host in ("node1", "node3"):
        for end in site["facts"][host]["facts"]["connect"]:
            if end["host"] == "node2":
                end["result"] = "no answer"
    assert judge(site) == []


def test_without_a_volume_nothing_is_asked_of_bricks_and_pool() -> None:
    site = fresh()
    site["wish"] |= {
        "media_backend": "distributed", "gluster_servers": [], "volume_id": "", "brick_path": "/x", "replica": 1,
    }  # fmt: skip
    for host in NODES:
        site["facts"][host]["facts"] |= {"brick": None, "backend": "distributed"}
        site["facts"][host]["facts"]["gluster"] = {"installed": None, "candidate": None}
    assert judge(site) == []
    assert judge(leave_out(site, "node2")) == []
    (only,) = judge(leave_out(site, "node2", "node3"))
    assert only.startswith("Without node2 and node3 only node1")


def test_a_replaced_disk_is_no_fault() -> None:
    """An empty brick under a volume that exists: recovery fills it."""
    site = deployed()
    site["facts"]["node2"]["facts"]["brick"] |= {"volume_id": None, "entries": [], "exists": False, "directory": False}
    assert judge(site) == []


def test_an_address_that_the_kits_own_node_holds_is_no_fault() -> None:
    site = deployed()
    vip("192.0.2.10/24")(site)
    assert judge(site) == []
    vip("192.0.2.10/24", node1={"ours": True, "held": "eth0"}, node2={"ours": True})(site)
    assert judge(site) == []
    # A fresh node beside them, and a node that is left out and still holds it.
    vip("192.0.2.10/24", node1={"ours": True}, node3={"answered_by": STRANGER})(site)
    assert judge(site) == []


def test_one_address_needs_somebody_to_take_it_over() -> None:
    site = fresh()
    vip("192.0.2.10/24")(site)
    site["wish"]["app_servers"] = ["node1"]
    assert [text for text in judge(site) if "two hosts in app_servers" in text]


def test_an_old_pin_of_the_kit_is_no_fault() -> None:
    """The address changed in the inventory: the rollout itself corrects /etc/hosts."""
    site = deployed()
    site["facts"]["node1"]["facts"]["names"]["node2"] = ["192.0.2.99"]
    assert judge(site) == []


def test_debians_own_127_0_1_1_is_no_fault_when_names_are_pinned() -> None:
    site = fresh()
    site["facts"]["node1"]["facts"]["names"]["node1"] = ["127.0.1.1"]
    assert judge(site) == []
    site["facts"]["node2"]["facts"]["names"]["node1"] = ["127.0.1.1"]
    (only,) = judge(site)
    assert only.startswith("node2 finds node1 at 127.0.1.1")


def test_unknown_names_are_no_fault_when_names_are_pinned() -> None:
    site = fresh()
    site["facts"]["node1"]["facts"]["names"] = {}
    site["facts"]["node1"]["facts"]["addresses"] = {"node2": ["host-12.provider.example"]}
    assert judge(site) == []
    site["wish"]["names_pinned"] = False
    found = judge(site)
    assert any("node1 finds no address for node2" in text for text in found)
    assert any("node1 finds the name host-12.provider.example for 192.0.2.12" in text for text in found)


def in_wish(**change: Any) -> Callable[[Site], None]:
    return lambda site: site["wish"].update(change)


def on(host: str, part: str | None = None, **change: Any) -> Callable[[Site], None]:
    """Change facts of one host."""

    def act(site: Site) -> None:
        facts = site["facts"][host]["facts"]
        (facts[part] if part else facts).update(change)

    return act


def entry(host: str, **change: Any) -> Callable[[Site], None]:
    """Replace what is known of one host."""
    return lambda site: site["facts"].update({host: change})


def clock(host: str, offset: float, uncertainty: float = 0.1) -> Callable[[Site], None]:
    return lambda site: site["facts"][host].update(clock={"offset": offset, "uncertainty": uncertainty})


def blocked(host: str, peer: str, port: int, result: str) -> Callable[[Site], None]:
    def act(site: Site) -> None:
        for end in site["facts"][host]["facts"]["connect"]:
            if (end["host"], end["port"]) == (peer, port):
                end["result"] = result

    return act


def other_bricks(*hosts: str) -> Callable[[Site], None]:
    def act(site: Site) -> None:
        bricks = [f"{node}:/data/old" for node in NODES]
        for host in hosts:
            facts = site["facts"][host]["facts"]
            facts["pool"]["volumes"]["media"] = {"id": VOLUME_ID, "bricks": bricks}

    return act


def variables(name: str, *hosts: str) -> Callable[[Site], None]:
    def act(site: Site) -> None:
        for host in hosts:
            site["facts"][host]["variables"] = ["tribrick_volume", name]

    return act


STRANGER = "02:00:5e:00:00:99"


def vip(address: str, **hosts: dict[str, Any]) -> Callable[[Site], None]:
    """The site's one address, and what is told of it on some nodes; on the others all is well."""

    def act(site: Site) -> None:
        site["wish"]["vip"] = address
        for host in NODES:
            well = {"interface": "eth0", "held": None, "ours": False, "answered_by": None}
            site["facts"][host]["facts"]["vip"] = well | hosts.get(host, {})

    return act


# (name, base, change, what the one sentence must hold: host, what was found, what to do)
FAULTS: list[tuple[str, Callable[[], Site], Callable[[Site], Any], list[str]]] = [
    # inventory
    ("replica 2", fresh, in_wish(replica=2), ["replica 2", "no majority", "set replica 3"]),
    ("replica 5", fresh, in_wish(replica=5), ["replica 5", "three copies"]),
    ("no address", fresh, lambda s: s["wish"]["addresses"].pop("node3"), ["node3 has no address", "tribrick_hosts"]),
    ("network", fresh, lambda s: s["wish"]["addresses"].update(db1="192.0.2.0/24"), ["db1", "192.0.2.0/24", "prefix"]),
    ("loopback", fresh, lambda s: s["wish"]["addresses"].update(db1="127.0.0.1"), ["db1", "127.0.0.1", "peers use"]),
    ("brick outside", fresh, in_wish(brick_path="/srv/brick"), ["/srv/brick", "/srv/gluster/media/brick"]),
    ("brick is mount", fresh, in_wish(brick_path="/srv/gluster/media"), ["does not lie below"]),
    ("no volume id", fresh, in_wish(volume_id=preflight.NO_VOLUME_ID), ["volume id", "scripts/new-site"]),
    ("secret", fresh, in_wish(secrets={"vault_x": False}), ["vault_x", "missing", "ansible-vault edit"]),
    # back ends
    ("back end", fresh, in_wish(media_backend="hybird"), ["'hybird'", "Did you mean 'hybrid'?", "Correct it"]),
    ("receiver", fresh, in_wish(receiver_server="apache"), ["tribrick_receiver_server", "'apache'", "lighttpd"]),
    (
        "receiver that shares directories",
        fresh,
        in_wish(media_backend="async", receiver_server="nginx"),
        ["'nginx'", "media_backend async", "Set tribrick_receiver_server: tribrick"],
    ),
    (
        "two receivers",
        fresh,
        in_wish(media_backend="hybrid", app_servers=["node1", "node2"]),
        ["app_servers has 2 host(s)", "three are the least", "Add 1 host(s)"],
    ),
    (
        "switch from a volume",
        deployed,
        in_wish(media_backend="hybrid"),
        ["node1, node2 and node3 already run media_backend volume", "says hybrid", "Set media_backend: volume again"],
    ),
    (
        "spool",
        fresh,
        on("node2", spooled="/srv/media-spool/photos/a.png"),
        ["node2 still keeps uploads in its spool (/srv/media-spool/photos/a.png)", "media_spool: true", "drain"],
    ),
    ("switch", fresh, on("node2", backend="async"), ["node2 already runs media_backend async", "says volume"]),
    # ports
    (
        "one port twice",
        fresh,
        in_wish(ports={"tribrick_receiver_port": 7443, "tribrick_balancer_port": "7443"}),
        ["tribrick_balancer_port is 7443, which tribrick_receiver_port has", "TCP port of its own"],
    ),
    ("the port of nginx", fresh, in_wish(ports={"tribrick_balancer_port": 443}), ["is 443, which nginx has"]),
    # one address
    ("vip without prefix", fresh, vip("192.0.2.10"), ["'192.0.2.10'", "says nothing of the network", "192.0.2.10/24"]),
    ("vip as a name", fresh, vip("photos.example"), ["'photos.example'", "is no address"]),
    ("vip of IPv6", fresh, vip("2001:db8::10/64"), ["2001:db8::10/64", "IPv6", "give an address of IPv4"]),
    ("vip is the network", fresh, vip("192.0.2.0/24"), ["no host's address in 192.0.2.0/24"]),
    (
        "vip is a node's own",
        fresh,
        vip("192.0.2.12/24", node2={"held": "eth0"}),
        ["the own address of node2", "Choose a free address"],
    ),
    ("vip is the database's own", fresh, vip("192.0.2.21/24"), ["the own address of db1", "Choose a free address"]),
    (
        "vip outside",
        fresh,
        vip("198.51.100.10/24"),
        ["node1 (192.0.2.11), node2 (192.0.2.12) and node3 (192.0.2.13) lie outside of 198.51.100.0/24", "Correct"],
    ),
    (
        "vip with a narrow prefix",
        fresh,
        vip("192.0.2.10/30"),
        ["node2 (192.0.2.12) and node3 (192.0.2.13) lie outside of 192.0.2.8/30"],
    ),
    (
        "vip held by hand",
        deployed,
        vip("192.0.2.10/24", node2={"held": "eth0"}),
        ["node2 has tribrick_vip (192.0.2.10) on eth0", "not from the kit", "take it away there"],
    ),
    (
        "vip of somebody else",
        fresh,
        vip("192.0.2.10/24", node1={"answered_by": STRANGER}, node2={"answered_by": STRANGER}),
        ["tribrick_vip (192.0.2.10) answers already", STRANGER, "Choose a free address"],
    ),
    (
        "vip without interface",
        fresh,
        vip("192.0.2.10/24", node3={"interface": None}),
        ["node3 has its own address on no interface", "tribrick_vip_interface"],
    ),
    (
        "vip on an interface that is not there",
        fresh,
        lambda s: (vip("192.0.2.10/24", node3={"interface": None})(s), s["wish"].update(vip_interface="bond0")),
        ["node3 has no interface bond0", "tribrick_vip_interface"],
    ),
    # variables
    (
        "typo",
        fresh,
        variables("tribrick_media_rot", *HOSTS),
        ["tribrick_media_rot", "all hosts", "Did you mean 'tribrick_media_root'?", "remove it"],
    ),
    (
        "typo on one host",
        fresh,
        variables("gluster_volume_optons", "node2"),
        ["set for node2", "gluster_volume_options"],
    ),
    # who takes part
    (
        "unreachable",
        deployed,
        entry("node2", unreachable_reason="Connection timed out", variables=[]),
        ["node2 does not answer over SSH: Connection timed out", "192.0.2.12", "'-e absent=node2'"],
    ),
    (
        "unreachable database",
        deployed,
        entry("db1", unreachable_reason="No route to host", variables=[]),
        ["db1 does not answer", "Check power"],
    ),
    ("sudo", fresh, entry("node1", problem="Incorrect sudo password", variables=[]), ["node1", "Incorrect sudo", "-K"]),
    ("limit", deployed, lambda s: s["facts"].pop("node3"), ["node3 belongs", "--limit", "absent=NAME"]),
    ("absent unknown", deployed, in_wish(absent=["nod2"]), ["nod2", "Did you mean 'node2'?", "absent="]),
    ("absent database", deployed, lambda s: leave_out(s, "db1"), ["db1", "migrations", "back first"]),
    (
        "absent majority",
        deployed,
        lambda s: leave_out(s, "node1", "node2"),
        ["Without node1 and node2", "only node3", "no majority", "back first"],
    ),
    ("absent at first", fresh, lambda s: leave_out(s, "node2"), ["node2", "does not exist yet", "without absent"]),
    # each host
    (
        "release",
        fresh,
        on("db1", release={"id": "ubuntu", "version": "24.04"}),
        ["db1 runs ubuntu 24.04", "Debian 12 and 13", "tribrick_allow_untested_release"],
    ),
    ("init", fresh, on("node1", systemd=False), ["node1", "systemd", "Use a full machine"]),
    ("memory", fresh, on("node3", memory_mib=512), ["node3 has 512 MiB of memory", "900", "Add memory"]),
    ("system disk", fresh, on("db1", system_free_mib=20), ["db1 has 20 MiB free", "Make room"]),
    ("user uid", fresh, on("node2", "account", uid=1001), ["node2 has the user tribrick with uid 1001", "2971"]),
    ("uid taken", fresh, on("node2", "account", uid_name="backup2"), ["node2", "uid 2971", "user backup2", "free"]),
    ("group gid", fresh, on("node1", "account", gid=1001), ["node1 has the group tribrick with gid 1001"]),
    ("gid taken", fresh, on("node1", "account", gid_name="ops"), ["node1", "gid 2971", "group ops", "free"]),
    ("clock ahead", fresh, clock("node2", 300.0), ["clock of node2 is 300.0 s ahead", "NTP"]),
    ("clock behind", fresh, clock("node2", -300.0), ["clock of node2 is 300.0 s behind", "NTP"]),
    (
        "controller's clock",
        fresh,
        lambda s: [clock(host, -300.0)(s) for host in HOSTS],
        ["node1, node2, node3 and db1 agree", "300.0 s behind", "set the time here"],
    ),
    (
        "name elsewhere",
        fresh,
        lambda s: s["facts"]["node3"]["facts"]["names"].update(node1=["192.0.2.99"]),
        ["node3 finds node1 at 192.0.2.99", "192.0.2.11", "/etc/hosts of node3"],
    ),
    (
        "address of another",
        fresh,
        lambda s: s["facts"]["node3"]["facts"]["addresses"].update(node1=["node2"]),
        ["node3 takes 192.0.2.11 for node2", "correct"],
    ),
    (
        "port",
        fresh,
        blocked("node1", "node3", 24007, "no answer"),
        ["node1 cannot reach node3 (192.0.2.13) on TCP port 24007: no answer", "firewalls of node1 and node3"],
    ),
    # storage
    ("no mount", fresh, on("node2", "brick", mounted=False), ["node2", "is no mount point", "/etc/fstab"]),
    (
        "no directory",
        fresh,
        on("node2", "brick", mounted=False, mount_exists=False, on_root=True),
        ["node2: /srv/gluster/media does not exist", "Make a file system"],
    ),
    ("root disk", fresh, on("node2", "brick", on_root=True), ["node2", "root file system", "of its own"]),
    (
        "file as brick",
        fresh,
        on("node1", "brick", exists=True),
        [f"node1: {BRICK} is no directory", "Move it away"],
    ),
    (
        "not empty",
        fresh,
        on("node3", "brick", exists=True, directory=True, entries=["holiday.jpg"]),
        [f"node3: {BRICK} is not empty (it holds holiday.jpg)", "Move its content away"],
    ),
    (
        "old brick",
        fresh,
        on("node3", "brick", exists=True, directory=True, volume_id=OTHER_ID, entries=[".glusterfs"]),
        ["node3", OTHER_ID, "media does not exist yet", "another tribrick_brick_path"],
    ),
    (
        "brick of another",
        deployed,
        on("node3", "brick", volume_id=OTHER_ID),
        ["node3", OTHER_ID, f"not to media ({VOLUME_ID})", "move the directory away"],
    ),
    (
        "another volume's brick",
        fresh,
        lambda s: (
            on("node1", "brick", exists=True, directory=True, volume_id=OTHER_ID)(s),
            on("node1", "pool", volumes={"films": {"id": OTHER_ID, "bricks": [f"node1:{BRICK}"]}})(s),
        ),
        [f"node1: {BRICK} is the brick of another volume, films", "Choose another"],
    ),
    (
        "other bricks",
        deployed,
        other_bricks(*NODES),
        ["On node1, node2 and node3", "node1:/data/old", f"node1:{BRICK}", "another tribrick_volume"],
    ),
    (
        "two pools",
        deployed,
        lambda s: (
            s["facts"]["node3"]["facts"]["pool"]["volumes"]["media"].update(id=OTHER_ID),
            on("node3", "brick", volume_id=OTHER_ID)(s),
        ),
        ["different volumes", f"node1 and node2: {VOLUME_ID}", f"node3: {OTHER_ID}", "one pool"],
    ),
    (
        "cloned",
        fresh,
        lambda s: [on(host, "pool", uuid=OTHER_ID)(s) for host in ("node1", "node2")],
        ["node1 and node2 have the same GlusterFS identity", "on node2 stop glusterd"],
    ),
    ("unequal", fresh, on("node2", "brick", bytes=90 * GIB), ["brick of node2 is smaller", "90.0 GiB", "Enlarge"]),
    (
        "mixed gluster",
        fresh,
        on("node3", gluster={"installed": "10.3-5", "candidate": "11.1-6"}),
        ["node1 and node2: 11", "node3: 10", "same one on all"],
    ),
    (
        "mixed releases",
        fresh,
        on("node3", release={"id": "debian", "version": "12"}),
        ["node1 and node2: debian 13; node3: debian 12", "same release on all"],
    ),
]


@pytest.mark.parametrize(("base", "change", "parts"), [f[1:] for f in FAULTS], ids=[f[0] for f in FAULTS])
def test_each_fault_gives_its_one_sentence(
    base: Callable[[], Site], change: Callable[[Site], Any], parts: list[str]
) -> None:
    site = base()
    change(site)
    found = judge(site)
    assert len(found) == 1, found
    for part in parts:
        assert part in found[0]
    assert found[0].endswith((".", ")."))


def test_small_disks_are_refused_one_by_one() -> None:
    site = fresh()
    for host in NODES:
        site["facts"][host]["facts"]["brick"]["bytes"] = GIB
    found = judge(site)
    assert [text.split(":")[0] for text in found] == list(NODES)
    assert all("1.0 GiB; 5 GiB are the least" in text for text in found)


@pytest.mark.parametrize(
    ("count", "words"), [(0, "0 host"), (2, "2 host(s) (node1 and node2)"), (4, "4 hosts"), (6, "6 hosts")]
)
def test_the_number_of_nodes(count: int, words: str) -> None:
    site = fresh()
    site["wish"]["gluster_servers"] = [*NODES, "db1", "node5", "node6"][:count]
    assert any(words in text for text in judge(site))


def test_a_spool_that_is_in_use_may_have_uploads() -> None:
    site = fresh()
    on("node2", spooled="/srv/media-spool/photos/a.png")(site)
    site["wish"]["spool"] = True
    assert judge(site) == []


def test_what_browsers_are_shown() -> None:
    site = fresh()
    site["wish"]["tls"] = "givn"
    assert any("tribrick_tls is 'givn', which is neither generated nor given" in text for text in judge(site))
    site["wish"] |= {"tls": "given", "tls_problem": "the certificate cannot be read"}
    assert any("given, but the certificate cannot be read: correct tribrick_tls_cert" in text for text in judge(site))


def test_a_given_certificate_is_read_with_its_key(tmp_path: Path) -> None:
    """By the role's own variables, from files."""
    one, two, sealed = tmp_path / "one", tmp_path / "two", tmp_path / "sealed.key"
    ca = issue(tmp_path, "ca", "CA")
    for folder in (one, two):
        folder.mkdir()
        _, key = issue(folder, "node", folder.name, ca)
    form = serialization.PrivateFormat.PKCS8
    sealed.write_bytes(key.private_bytes(serialization.Encoding.PEM, form, serialization.BestAvailableEncryption(b"x")))
    assert shown(one / "node.crt", one / "node.key") == ""
    assert shown(one / "node.crt", two / "node.key") == "the key is not that of the first certificate in the file"
    assert shown(one / "node.crt", sealed) == "the key cannot be read, or has a passphrase"
    assert shown(one / "node.crt", tmp_path / "absent") == "the key cannot be read, or has a passphrase"
    assert shown(tmp_path / "absent", one / "node.key") == "the certificate cannot be read"
    assert shown(tmp_path / "absent", tmp_path / "absent", tls="generated") == ""


def shown(certificate: Path, key: Path, tls: str = "given") -> str:
    """Why this certificate and key are refused, as the role's variables work it out."""
    variables = yaml.safe_load((ROOT / "roles/preflight/vars/main.yml").read_text(encoding="utf-8"))
    wish = trust_as_template(variables.pop("__preflight_wish")["tls_problem"])
    own = {name: trust_as_template(text) if isinstance(text, str) else text for name, text in variables.items()}
    given = {"preflight_tls": tls, "preflight_tls_certificate": str(certificate), "preflight_tls_key": str(key)}
    return str(Templar(loader=DataLoader(), variables=own | given).template(wish))


@pytest.mark.parametrize(("servers", "password", "there"), [([], "", True), (["db1"], "", False), (["db1"], "x", True)])
def test_the_database_of_the_kit_needs_its_password(servers: list[str], password: str, there: bool) -> None:
    [play] = yaml.safe_load((ROOT / "playbooks/check_preflight.yml").read_text(encoding="utf-8"))
    secrets = play["roles"][0]["vars"]["preflight_secrets"]
    variables = {"groups": {"database_servers": servers}, "vault_tribrick_database_password": password}
    asked = trust_as_template(secrets["vault_tribrick_database_password"])
    assert Templar(loader=DataLoader(), variables=variables).template(asked) is there


def test_nodes_work_together_by_ipv4_alone() -> None:
    """GlusterFS would not listen, and nginx takes no ADDRESS:PORT of IPv6; a database is only connected to."""
    site = fresh()
    site["wish"]["addresses"] |= {"node2": "2001:db8::12", "db1": "2001:db8::21"}
    [only] = [text for text in preflight.about_inventory(site["wish"]) if "IPv6" in text]
    assert only.startswith("node2 has the address 2001:db8::12, which is of IPv6") and "in tribrick_hosts" in only


@pytest.mark.parametrize("name", ["node_1", "10.0.0.1", "node 1", "-node", f"{'n' * 55}.test", "node1."])
def test_names_that_glusterfs_or_a_certificate_refuses(name: str) -> None:
    site = fresh()
    site["wish"] |= {"hosts": [name], "addresses": {name: "192.0.2.11"}, "app_servers": [name]}
    [only] = [text for text in preflight.about_inventory(site["wish"]) if "cannot be a node's name" in text]
    assert only.startswith(f"'{name}'")


@pytest.mark.parametrize("name", ["node1", "Node-1", "1.example.test", "n" * 59, "xn--bcher-kva.example"])
def test_names_that_may_be(name: str) -> None:
    assert preflight.is_node_name(name)


def test_two_hosts_with_one_address() -> None:
    site = fresh()
    site["wish"]["addresses"]["db1"] = "192.0.2.11"
    assert any("node1 and db1 have the same address 192.0.2.11" in text for text in judge(site))


def test_uncertain_clocks_are_not_accused() -> None:
    site = fresh()
    clock("node2", 3.0, uncertainty=1.5)(site)
    assert judge(site) == []


def test_versions_count_where_they_are_known_and_matter() -> None:
    site = fresh()
    on("node3", gluster={"installed": None, "candidate": None})(site)  # package lists not fetched yet
    site["wish"]["app_servers"] = ["db1"]
    on("db1", gluster={"installed": None, "candidate": "10.3-5"})(site)  # carries no brick
    assert judge(site) == []


def test_what_may_be_allowed_is_allowed() -> None:
    site = fresh()
    for host in HOSTS:
        on(host, release={"id": "ubuntu", "version": "24.04"})(site)
    for host in NODES:
        on(host, "brick", mounted=False, on_root=True)(site)
    assert len(judge(site)) == len(HOSTS) + len(NODES)
    site["wish"] |= {"allow_untested_release": True, "allow_shared_filesystem": True}
    assert judge(site) == []


def test_a_dead_host_is_named_once() -> None:
    """Its peers cannot reach it either; that is not said again."""
    site = deployed()
    entry("node2", unreachable_reason="timed out", variables=[])(site)
    for host in ("node1", "node3"):
        for port in (24007, 49152):
            blocked(host, "node2", port, "no answer")(site)
    (only,) = judge(site)
    assert only.startswith("node2 does not answer")


def test_each_set_of_three_keeps_its_majority() -> None:
    six = {f"node{n}": f"192.0.2.{10 + n}" for n in range(1, 7)}
    wish = good_wish() | {"gluster_servers": list(six), "hosts": list(six), "absent": ["node1", "node4"]}
    seen = {"node2": {"facts": {"pool": {"volumes": {"media": {}}}}}}
    assert preflight.about_absent(seen, wish) == []
    (only,) = preflight.about_absent(seen, wish | {"absent": ["node4", "node5"]})
    assert "only node6 of node4, node5 and node6" in only


def test_the_report_counts_and_numbers() -> None:
    assert preflight.numbered(["A.", "B."]).splitlines() == [
        "2 things to put right before the rollout; nothing was changed:",
        "1. A.",
        "2. B.",
    ]
    assert preflight.numbered(["A."]).startswith("1 thing to")


def test_end_points_of_a_host() -> None:
    paths = [
        {"sources": ["node1", "node2"], "targets": ["node1", "node2", "gone"], "ports": [24007, "49152"]},
        {"sources": ["node1"], "targets": ["node2"], "ports": [24007]},
        {"sources": ["node2"], "targets": ["db1"], "ports": [5432]},
    ]
    assert preflight.targets(paths, "node1", HOSTS) == [
        {"host": "node2", "address": "192.0.2.12", "port": 24007},
        {"host": "node2", "address": "192.0.2.12", "port": 49152},
    ]
    assert preflight.targets(paths, "db1", HOSTS) == []


def test_the_absent_are_told_what_they_still_need() -> None:
    site = leave_out(deployed(), "node2")
    first, last = preflight.absent_report(["node2"], site["wish"], ["option a.b waits for node2"])
    assert first.startswith("node2 was left out and may be out of date: GlusterFS settings")
    assert "run the rollout once without absent, and wait until nothing is left to heal" in first
    assert "not dead" not in first
    assert last == "Put off: option a.b waits for node2."
    (alive,) = preflight.absent_report(["node2"], site["wish"], facts=site["facts"])
    assert "It does answer node1 and node3: it is not dead." in alive
    assert preflight.absent_report([], site["wish"]) == []


def test_all_variables_of_the_kit_are_known() -> None:
    known = filters.known_variables(str(ROOT), ["tribrick_of_my_own"])
    assert {"tribrick_of_my_own", "tribrick_tls_key", "preflight_uid", "tribrick_hosts"} <= set(known)
    assert {"vault_tribrick_gluster_ca_key", "vault_tribrick_database_password"} <= set(known)
    prefixes = tuple(filters.variable_prefixes(str(ROOT)))
    for file in (ROOT / "inventories/example/group_vars/all").iterdir():
        for name in yaml.safe_load(file.read_text()):
            assert name in known or not name.startswith(prefixes), f"{file.name}: {name}"


def test_a_wrong_directory_is_not_taken_for_the_kit(tmp_path: Path) -> None:
    with pytest.raises(filters.AnsibleFilterError, match="is it the kit's directory"):
        filters.known_variables(str(tmp_path))


def test_role_and_filters_agree_on_the_wish() -> None:
    wish = yaml.safe_load((ROOT / "roles/preflight/vars/main.yml").read_text())["__preflight_wish"]
    assert set(wish) == set(good_wish())
