"""What the playbooks make of the inventory for each media back end, worked out by Ansible itself."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import yaml
from ansible.parsing.dataloader import DataLoader
from ansible.template import Templar, trust_as_template

ROOT = Path(__file__).resolve().parents[3]
BACKENDS = ("volume", "hybrid", "async", "distributed")
SPOOL = "volume with a spool"
ONE = "volume with one address"
LEFT = "volume with one address, and node2 left out"
SITES = (*BACKENDS, SPOOL, ONE, LEFT)
WANTED = """\
{{ {'environment': django_site_environment, 'peers': media_web_peers, 'sentinel': media_web_sentinel,
    'mount': django_site_media_mount_unit, 'umask': django_site_umask, 'server': media_receiver_server,
    'brick': media_receiver_brick, 'writers': media_receiver_writers, 'client': media_receiver_client,
    'edge': media_web_edge, 'edge_peers': media_edge_peers, 'edge_spools': media_edge_spools,
    'standby': media_receiver_standby, 'max_age': media_web_browser_max_age,
    'root': media_receiver_root, 'state': media_receiver_state, 'prefix': media_receiver_prefix,
    'edge_prefix': media_edge_spools_prefix, 'limit': media_receiver_limit_mib,
    'socket': media_web_socket, 'names': media_web_names, 'alive': media_web_alive_path,
    'balanced': media_vip_nodes, 'balancer_port': media_vip_port,
    'services': django_site_services | map(attribute='name') | list} | to_json }}"""


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Return the variables of node1 of inventories/example by back end."""
    work = tmp_path_factory.mktemp("variables")
    [site, *_] = yaml.safe_load((ROOT / "playbooks/deploy_site.yml").read_text(encoding="utf-8"))
    [receiver] = yaml.safe_load((ROOT / "playbooks/deploy_receiver.yml").read_text(encoding="utf-8"))
    web = next(role["vars"] for role in site["roles"] if role["role"].endswith(".media_web"))
    edge = next(role["vars"] for role in site["roles"] if role["role"].endswith(".media_edge"))
    balancer = next(task["vars"] for task in site["pre_tasks"] if task.get("when") == "__vip | length > 0")
    defaults = yaml.safe_load((ROOT / "roles/media_receiver/defaults/main.yml").read_text(encoding="utf-8"))
    own = {name: defaults[name] for name in ("media_receiver_state", "media_receiver_prefix")}
    variables = {**own, **site["vars"], **balancer, **web, **edge, **receiver["vars"], **receiver["roles"][0]["vars"]}
    secrets = {"vault_tribrick_django_secret_key": "x", "tribrick_database_url": "postgres://x"}
    tasks = [
        {
            "name": backend,
            "ansible.builtin.copy": {"dest": str(work / backend), "content": WANTED, "mode": "0600"},
            "vars": {
                **variables,
                **secrets,
                "media_backend": backend.split()[0],
                "media_spool": backend == SPOOL,
                "tribrick_vip": "192.0.2.10/24" if backend in (ONE, LEFT) else "",
                **({"absent": "node2"} if backend == LEFT else {}),
            },
        }
        for backend in SITES
    ]
    play = {"hosts": "node1", "connection": "local", "gather_facts": False, "tasks": tasks}
    (work / "play.yml").write_text(yaml.safe_dump([play]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", f"--inventory={ROOT}/inventories/example",
         f"--extra-vars=ansible_python_interpreter={sys.executable}", str(work / "play.yml")],
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {backend: json.loads((work / backend).read_text(encoding="utf-8")) for backend in SITES}


@pytest.mark.parametrize("nothing", ["", None])
@pytest.mark.parametrize(
    ("file", "name", "without"),
    [("deploy_base", "firewall_rules", []), ("check_preflight", "preflight_ports", {"tribrick_receiver_port": 7443})],
)
def test_an_address_that_is_left_empty_is_none(file: str, name: str, without: object, nothing: object) -> None:
    """`tribrick_vip:` with nothing behind it is not text."""
    [play] = yaml.safe_load((ROOT / f"playbooks/{file}.yml").read_text(encoding="utf-8"))
    [asked] = [role["vars"][name] for role in play["roles"] if name in role["vars"]]
    variables = {"tribrick_vip": nothing, "__rules": [], "__vip_rules": ["vrrp"]}
    assert Templar(loader=DataLoader(), variables=variables).template(trust_as_template(asked)) == without


def test_the_firewall_closes_the_port_that_the_database_has() -> None:
    [play] = yaml.safe_load((ROOT / "playbooks/deploy_base.yml").read_text(encoding="utf-8"))
    [rules] = [role["vars"]["__rules"] for role in play["roles"] if "__rules" in role["vars"]]
    [asked] = [rule["ports"][0] for rule in rules if rule["name"] == "postgresql"]
    for given, port in (({}, 5432), ({"database_port": 5433}, 5433)):
        assert Templar(loader=DataLoader(), variables=given).template(trust_as_template(asked)) == port


def test_a_spool_has_receivers_a_service_and_readers(found):
    volume, spool = found["volume"], found[SPOOL]
    more = {name: value for name, value in spool["environment"].items() if name not in volume["environment"]}
    assert {key: str(value) for key, value in more.items()} == {
        "TRIBRICK_SPOOL": "/srv/media-spool", "TRIBRICK_SPOOL_PEERS": "node2:7443,node3:7443",
        "TRIBRICK_SPOOL_COPIES": "2", "TRIBRICK_SPOOL_LIMIT": str(4096 << 20),
    }  # fmt: skip
    transport = {"TRIBRICK_TRANSPORT": spool["environment"]["TRIBRICK_TRANSPORT"]}
    assert {**volume["environment"], **more, **transport} == spool["environment"]
    assert (spool["server"], spool["root"], spool["limit"]) == ("tribrick", "/srv/media-spool", 4096)
    assert [peer["name"] for peer in spool["edge_spools"]] == ["node1", "node2", "node3"]
    assert spool["peers"] == volume["edge_spools"] == []
    assert spool["sentinel"] == volume["sentinel"] and spool["brick"] == volume["brick"]
    assert set(spool["services"]) - set(volume["services"]) == {"tribrick-drain"}


def test_a_receiver_of_trees_knows_nothing_of_what_left_the_spool(found):
    """What was drained has a tombstone in the spool's receiver; in the tree it is a living file."""
    assert found[SPOOL]["state"] == "/var/lib/tribrick-spool"
    assert found["hybrid"]["state"] == "/var/lib/tribrick-receiver"


def test_who_works_with_the_spools_never_reaches_a_tree(found):
    """A node that has missed the switch to Gluster-free mode goes on draining: it must not delete in the trees."""
    spool, tree = (json.loads(found[one]["environment"]["TRIBRICK_TRANSPORT"])["base_url"] for one in (SPOOL, "hybrid"))
    assert (spool, tree) == ("https:///spool/", "https:///files/")
    assert found[SPOOL]["prefix"] == found[SPOOL]["edge_prefix"] == "/spool/"
    assert found["hybrid"]["prefix"] == "/files/"


def test_with_a_volume_every_nodes_brick_is_a_copy_and_nobody_stores_files(found):
    volume = found["volume"]
    copies = json.loads(volume["environment"]["TRIBRICK_COPIES"])
    assert copies == [
        {"name": f"brick-node{n}", "kind": "hashes", "address": f"https://node{n}:7443/hashes/"} for n in (1, 2, 3)
    ]
    assert volume["environment"]["TRIBRICK_MEDIA_HOSTS"] == ""
    assert volume["environment"]["TRIBRICK_WRITE_QUORUM"] == ""
    assert (volume["server"], volume["peers"], volume["sentinel"]) == ("none", [], ".tribrick-volume")
    assert (volume["mount"], volume["umask"]) == ("srv-media.mount", "0022")
    assert volume["edge_peers"] == [{"name": f"node{n}", "address": f"192.0.2.1{n}:7443"} for n in (2, 3)]
    assert (volume["edge"], volume["standby"]) == ("tribrick_media", "/run/tribrick/standby.sock")
    assert volume["max_age"] == 2592000
    assert len(volume["environment"]["TRIBRICK_STANDBY_KEY"]) == 64
    assert volume["brick"] == "/srv/gluster/media/brick"


@pytest.mark.parametrize("backend", BACKENDS[1:])
def test_without_a_volume_an_acknowledged_file_is_on_two_of_three(found, backend):
    made = found[backend]
    hosts = made["environment"]["TRIBRICK_MEDIA_HOSTS"].split(",")
    quorum = int(made["environment"]["TRIBRICK_WRITE_QUORUM"])
    own = ["node1:7443"] if backend == "distributed" else []
    assert hosts == [*own, "node2:7443", "node3:7443"]
    # Of the other back ends the node itself has it, too.
    assert quorum + (backend != "distributed") == 2
    assert made["environment"]["TRIBRICK_BACKEND"] == backend
    assert json.loads(made["environment"]["TRIBRICK_COPIES"]) == []
    assert (made["server"], made["sentinel"], made["mount"], made["umask"]) == ("tribrick", "", "", "0002")
    assert (made["edge"], made["standby"]) == ("", "") and "TRIBRICK_STANDBY_KEY" not in made["environment"]
    assert (made["brick"], made["client"]) == ("", "node1.site")
    assert made["writers"] == ["node1.site", "node2.site", "node3.site"]
    assert made["peers"] == [{"name": f"node{n}", "address": f"192.0.2.1{n}:7443"} for n in (2, 3)]
    transport = json.loads(made["environment"]["TRIBRICK_TRANSPORT"])
    assert transport["base_url"] == "https:///files/"
    assert transport["certificate"].endswith("/client.crt")


def test_without_glusterfs_sites_receivers_and_mirrors_work_on_the_trees(tmp_path: Path) -> None:
    """The variables with which fallback_enable imports a playbook win over the inventory's."""
    plays = yaml.safe_load((ROOT / "playbooks/fallback_enable.yml").read_text(encoding="utf-8"))
    imports = {
        play["ansible.builtin.import_playbook"]: play["vars"]
        for play in plays
        if "vars" in play and "hosts" not in play
    }
    [site, *_] = yaml.safe_load((ROOT / "playbooks/deploy_site.yml").read_text(encoding="utf-8"))
    [receiver] = yaml.safe_load((ROOT / "playbooks/deploy_receiver.yml").read_text(encoding="utf-8"))
    [mirror] = yaml.safe_load((ROOT / "playbooks/deploy_mirror.yml").read_text(encoding="utf-8"))
    web = next(role["vars"] for role in site["roles"] if role["role"].endswith(".media_web"))
    told = {
        "deploy_site.yml": "django_site_environment, media_web_media_root, media_web_sentinel, media_web_peers"
        ", django_site_umask, media_web_edge, media_web_socket, __volume",
        "deploy_receiver.yml": "media_receiver_root, media_receiver_server, media_receiver_limit_mib",
        "deploy_mirror.yml": "media_mirror_source, media_mirror_volume_id, media_backend",
    }
    variables = {
        "deploy_site.yml": {**site["vars"], **web},
        "deploy_receiver.yml": {**receiver["vars"], **receiver["roles"][0]["vars"]},
        "deploy_mirror.yml": mirror["roles"][0]["vars"],
    }
    assert set(imports) == set(told)
    secrets = {"vault_tribrick_django_secret_key": "x", "tribrick_database_url": "postgres://x"}
    for name, words in told.items():
        copy = {"dest": str(tmp_path / f"{name}.json"), "content": f"{{{{ [{words}] | to_json }}}}", "mode": "0600"}
        task = {"name": name, "ansible.builtin.copy": copy}
        given = {**variables[name], **secrets, "tribrick_vip": "192.0.2.10/24"}
        play = {"hosts": "node1", "connection": "local", "gather_facts": False, "vars": given, "tasks": [task]}
        (tmp_path / name).write_text(yaml.safe_dump([play]), encoding="utf-8")
    book = [{"ansible.builtin.import_playbook": name, "vars": given} for name, given in imports.items()]
    (tmp_path / "play.yml").write_text(yaml.safe_dump(book), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", f"--inventory={ROOT}/inventories/example",
         f"--extra-vars=ansible_python_interpreter={sys.executable}", str(tmp_path / "play.yml")],
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    found = {name: json.loads((tmp_path / f"{name}.json").read_text(encoding="utf-8")) for name in told}
    tree = "/srv/media-mirror/live"
    environment, root, sentinel, peers, umask, edge, socket, volume = found["deploy_site.yml"]
    assert (environment["TRIBRICK_BACKEND"], environment["MEDIA_ROOT"]) == ("hybrid", tree)
    assert environment["TRIBRICK_MEDIA_HOSTS"] == "node2:7443,node3:7443" and "TRIBRICK_SPOOL" not in environment
    assert str(environment["TRIBRICK_WRITE_QUORUM"]) == "1", "the node itself and one other"
    assert environment["TRIBRICK_SENTINEL_ID"] == "00000000-0000-4000-8000-000000000000", "by which the volume is known"
    assert (root, sentinel, umask) == (tree, "", "0002") and [one["name"] for one in peers] == ["node2", "node3"]
    by_name = {role["role"].rpartition(".")[2]: role for role in site["roles"]}
    assert by_name["media_edge"]["when"] == "__volume"
    # Neither cache nor origin, which would read the volume; the balancer stays between nginx and the sites.
    assert (edge, volume, socket) == ("", False, "/run/tribrick-balancer/site.sock")
    assert found["deploy_receiver.yml"] == [tree, "tribrick", 0]
    source, identity, backend = found["deploy_mirror.yml"]
    assert (source, backend) == (tree, "volume") and identity != environment["TRIBRICK_SENTINEL_ID"]
    assert len(identity) == 36


def test_one_address_is_a_name_of_the_site_and_nginx_asks_the_balancer(found):
    plain, one = found["volume"], found[ONE]
    # In this order: the file of a generated certificate is named after it.
    assert plain["names"] == ["media.example", "node1", "192.0.2.11"]
    assert one["names"] == [*plain["names"], "192.0.2.10"]
    hosts = [set(made["environment"]["ALLOWED_HOSTS"].split(",")) for made in (plain, one)]
    assert hosts[1] - hosts[0] == {"192.0.2.10"} and hosts[0] < hosts[1]
    assert (plain["socket"], plain["alive"]) == ("/run/tribrick/site.sock", "")
    assert (one["socket"], one["alive"]) == ("/run/tribrick-balancer/site.sock", "/_tribrick_alive")


def test_requests_go_to_every_node_that_the_rollout_reaches(found):
    nodes = {"node1": "192.0.2.11", "node2": "192.0.2.12", "node3": "192.0.2.13"}
    assert found[ONE]["balanced"] == nodes
    del nodes["node2"]
    assert found[LEFT]["balanced"] == nodes, "its media may lie elsewhere"
    assert found[ONE]["balancer_port"] == 7445


def test_a_balancer_and_the_address_change_nothing_else(found):
    """With tribrick_vip a node is what it is without, but for what the tests above look at."""
    told = {"names", "socket", "alive", "balanced", "environment"}
    plain, one = ({key: value for key, value in found[site].items() if key not in told} for site in ("volume", ONE))
    assert plain == one
    before, after = (found[site]["environment"] for site in ("volume", ONE))
    assert {key for key in after if after[key] != before.get(key)} == {"ALLOWED_HOSTS"} and set(after) == set(before)


def test_without_one_address_nginx_gets_what_it_has_by_itself(found):
    defaults = yaml.safe_load((ROOT / "roles/media_web/defaults/main.yml").read_text(encoding="utf-8"))
    balancer = yaml.safe_load((ROOT / "roles/media_vip/defaults/main.yml").read_text(encoding="utf-8"))
    assert found["volume"]["socket"] == defaults["media_web_socket"] == balancer["media_vip_site_socket"]
    assert found["volume"]["alive"] == defaults["media_web_alive_path"]
    assert found[ONE]["socket"] == balancer["media_vip_socket"]
    assert found[ONE]["alive"] == balancer["media_vip_alive_path"]


@pytest.fixture(scope="module")
def around(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """Firewall and health of node1, and what a renewal reloads: plain, with watchers, with one address, with both."""
    work = tmp_path_factory.mktemp("around")

    def given(playbook: str, role: str = "") -> dict[str, Any]:
        play = yaml.safe_load((ROOT / "playbooks" / playbook).read_text(encoding="utf-8"))[0]
        own = next((one["vars"] for one in play.get("roles", []) if one["role"].endswith(f".{role}")), {})
        return {**play.get("vars", {}), **own}

    variables = given("deploy_base.yml", "firewall") | given("deploy_health.yml", "health")
    reloaded = given("renew_certificates.yml")["certificate_renewal_reloaded_units"]
    variables |= {"certificate_renewal_reloaded_units": reloaded, "__apps": "{{ groups['app_servers'] }}"}
    variables["tribrick_database_url"] = "postgres://db1"
    wanted = """{{ {'rules': firewall_rules, 'units': health_units, 'address': health_address,
        'reloaded': certificate_renewal_reloaded_units} | to_json }}"""
    tasks = [
        {
            "name": name,
            "ansible.builtin.copy": {"dest": str(work / name), "content": wanted, "mode": "0600"},
            "vars": {**variables, "peer_watch_enabled": watch, "tribrick_vip": vip},
        }
        for name, watch, vip in (
            ("plain", False, ""), ("watch", True, ""), ("one", False, "192.0.2.10/24"), ("both", True, "192.0.2.10/24"),
        )
    ]  # fmt: skip
    play = {"hosts": "node1", "connection": "local", "gather_facts": False, "tasks": tasks}
    (work / "play.yml").write_text(yaml.safe_dump([play]), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-m", "ansible", "playbook", f"--inventory={ROOT}/inventories/example",
         f"--extra-vars=ansible_python_interpreter={sys.executable}", str(work / "play.yml")],
        env=os.environ | {"ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"), "ANSIBLE_NOCOLOR": "1"},
        capture_output=True, text=True, timeout=300, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return {path.name: json.loads(path.read_text(encoding="utf-8")) for path in work.iterdir() if not path.suffix}


def test_watchers_and_one_address_add_their_own_and_nothing_else(around):
    plain, watch, one, both = (around[name] for name in ("plain", "watch", "one", "both"))
    assert [rule["name"] for rule in plain["rules"]] == ["gluster", "postgresql", "receiver", "peer_watch"]
    assert (plain["address"], plain["reloaded"]) == ("", [])
    assert not {"tribrick-peer-watch.service", "tribrick-balancer.service"} & set(plain["units"])
    assert watch["rules"] == plain["rules"], "closed to strangers whether somebody listens or not"
    assert set(watch["units"]) - set(plain["units"]) == {"tribrick-peer-watch.service"}
    nodes = ["192.0.2.11", "192.0.2.12", "192.0.2.13"]
    added = [
        {"name": "balancer", "ports": [7445], "sources": nodes},
        {"name": "vrrp", "protocol": 112, "sources": nodes},
    ]
    assert one["rules"] == [*plain["rules"], *added]
    assert set(one["units"]) - set(plain["units"]) == {"tribrick-balancer.service", "tribrick-address.service"}
    assert (one["address"], one["reloaded"]) == ("192.0.2.10", ["tribrick-balancer.service"])
    assert both["rules"] == one["rules"] and set(both["units"]) == set(one["units"]) | set(watch["units"])
    heard = {(rule.get("protocol", "tcp"), port) for rule in both["rules"] for port in rule.get("ports", [])}
    assert {("udp", 7444), ("tcp", 7445)} <= heard and ("tcp", 7444) not in heard
