# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""What speaks against a rollout: pure functions from facts and wishes to sentences.

Each sentence names the host, says what was found there and what to do about it.
"""

from __future__ import annotations

import difflib
import ipaddress
import posixpath
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

REPLICA = 3
BACKENDS = ("volume", "hybrid", "async", "distributed")
RECEIVERS = ("tribrick", "nginx", "lighttpd")
TLS = ("generated", "given")
PORTS = {22: "SSH", 80: "nginx", 443: "nginx", 5432: "PostgreSQL", 24007: "GlusterFS", 24008: "GlusterFS"}
GIB = 1 << 30
NO_VOLUME_ID = "00000000-0000-4000-8000-000000000000"  # as inventories/example/ has it

LONGEST_NAME = 59  # a certificate's name has 64 characters, and the site's is NAME.site
_LABEL = re.compile(r"[A-Za-z0-9]([A-Za-z0-9-]{0,61}[A-Za-z0-9])?")

Facts = Mapping[str, Mapping[str, Any]]
Wish = Mapping[str, Any]


def join(words: Iterable[str]) -> str:
    """Words in a sentence: a, b and c."""
    *first, last = list(words) or ["none"]
    return f"{', '.join(first)} and {last}" if first else last


def nearest(word: str, words: Iterable[str]) -> str:
    """A question that offers the most similar word, or nothing."""
    found = difflib.get_close_matches(word, list(words), n=1, cutoff=0.7)
    return f" Did you mean '{found[0]}'?" if found else ""


def is_node_name(name: str) -> bool:
    """Whether GlusterFS, certificates and /etc/hosts take it."""
    labels = name.split(".")
    return len(name) <= LONGEST_NAME and all(map(_LABEL.fullmatch, labels)) and not labels[-1].isdigit()


def sets_of_three(servers: Sequence[str]) -> list[Sequence[str]]:
    """Which servers hold the same files: each three in the inventory's order."""
    return [servers[at : at + REPLICA] for at in range(0, len(servers), REPLICA)]


def targets(paths: Iterable[Mapping[str, Any]], node: str, addresses: Mapping[str, str]) -> list[dict[str, Any]]:
    """The end points that a host must reach: of each path that starts there, all others."""
    wanted = {
        (host, int(port)): None
        for path in paths
        if node in path["sources"]
        for host in path["targets"]
        for port in path["ports"]
        if host != node and host in addresses
    }
    return [{"host": host, "address": addresses[host], "port": port} for host, port in wanted]


# --- the inventory itself -----------------------------------------------------------------


def about_inventory(wish: Wish) -> list[str]:
    """Faults that need no look at a host."""
    found = about_backend(wish)
    addresses = wish["addresses"]
    if has_volume(wish):
        found += about_volume(wish)
    nodes = {*wish["gluster_servers"], *wish["app_servers"]}
    for host in wish["hosts"]:
        if host in nodes and not is_node_name(host):
            found.append(
                f"'{host}' cannot be a node's name: GlusterFS and certificates take letters, digits, hyphens and dots, "
                f"at most {LONGEST_NAME} characters, and no address. Give it another one in hosts.yml; its address "
                "belongs into tribrick_hosts."
            )
        address = addresses.get(host)
        if address is None:
            found.append(f"{host} has no address: add it to tribrick_hosts in group_vars/all/hosts.yml.")
            continue
        try:
            plain = ipaddress.ip_address(address)
        except ValueError:
            found.append(
                f"{host} has the address '{address}', which is no plain IP address: give it in "
                "tribrick_hosts without prefix and port, since GlusterFS takes no networks."
            )
            continue
        if plain.is_loopback or plain.is_unspecified:
            found.append(
                f"{host} has the address {address}, where other hosts cannot reach it: put the "
                "address that its peers use into tribrick_hosts."
            )
        elif plain.version != 4 and host in nodes:
            found.append(
                f"{host} has the address {address}, which is of IPv6: among nodes, GlusterFS and nginx are set up for "
                "IPv4 alone. Give its address of IPv4 in tribrick_hosts; visitors may come by either."
            )
    for address, count in Counter(addresses.get(host) for host in wish["hosts"]).items():
        if address is not None and count > 1:
            names = [host for host in wish["hosts"] if addresses.get(host) == address]
            found.append(f"{join(names)} have the same address {address} in tribrick_hosts: correct it.")
    for name, present in wish["secrets"].items():
        if not present:
            found.append(
                f"The secret {name} is missing or empty: scripts/new-site makes it; put it into "
                "group_vars/all/vault.yml with 'ansible-vault edit'."
            )
    return found + about_certificate(wish) + about_ports(wish) + about_address(wish)


def has_volume(wish: Wish) -> bool:
    """Whether the media lie on a GlusterFS volume; a back end that is none is taken for one until it is corrected."""
    return wish["media_backend"] not in BACKENDS[1:]


def about_backend(wish: Wish) -> list[str]:
    """Whether the media back end exists, and whether there are enough nodes for what it promises."""
    found = []
    backend, server, nodes = wish["media_backend"], wish["receiver_server"], list(wish["app_servers"])
    if backend not in BACKENDS:
        found.append(
            f"media_backend is '{backend}', which is none of {join(BACKENDS)}.{nearest(str(backend), BACKENDS)}"
            " Correct it in the inventory."
        )
    if server not in RECEIVERS:
        found.append(
            f"tribrick_receiver_server is '{server}', which is none of {join(RECEIVERS)}."
            f"{nearest(str(server), RECEIVERS)} Correct it in the inventory."
        )
    elif server != RECEIVERS[0] and backend in BACKENDS[1:3]:
        found.append(
            f"tribrick_receiver_server is '{server}', but with media_backend {backend} the site writes to the same "
            f"directories, and what one of two users has made the other cannot remove. "
            f"Set tribrick_receiver_server: {RECEIVERS[0]}, or media_backend: distributed."
        )
    if not has_volume(wish) and len(nodes) < REPLICA:
        found.append(
            f"The group app_servers has {len(nodes)} host(s) ({join(nodes)}): with media_backend {backend} they keep "
            f"the files, and three are the least. Add {REPLICA - len(nodes)} host(s) to the group."
        )
    return found


def about_volume(wish: Wish) -> list[str]:
    """Faults in what the inventory says of the volume."""
    found = []
    servers = list(wish["gluster_servers"])
    if wish["replica"] != REPLICA:
        why = (
            "an even number of copies has no majority when the nodes disagree"
            if wish["replica"] % 2 == 0
            else "the kit is built and tested for three copies"
        )
        found.append(f"The inventory asks for replica {wish['replica']}, but {why}: set replica 3.")
    if len(servers) < REPLICA:
        found.append(
            f"The group gluster_servers has {len(servers)} host(s) ({join(servers)}): three are the "
            "least, since with two neither can tell a dead peer from a cut line. Add "
            f"{REPLICA - len(servers)} host(s) to the group."
        )
    elif len(servers) > REPLICA:
        found.append(
            f"The group gluster_servers has {len(servers)} hosts ({join(servers)}): the kit takes three. Audit, "
            "proof and recovery take all bricks for copies of each other, and with six a file is on three of them "
            "only. Leave three hosts in the group; those without a brick may run the site, in app_servers."
        )
    mount, path = wish["brick_mount"].rstrip("/"), posixpath.normpath(wish["brick_path"])
    if not path.startswith(mount + "/"):
        found.append(
            f"The brick's directory {path} does not lie below the brick's mount point {mount}: with "
            "its file system unmounted, the brick would fill the disk below. Choose a directory "
            f"such as {mount}/brick."
        )
    if wish["volume_id"] in ("", NO_VOLUME_ID):
        found.append(
            "The inventory has no volume id of its own (it was copied from the example): set "
            "tribrick_volume_id to a new UUID, or make the inventory with scripts/new-site."
        )
    return found


def about_address(wish: Wish) -> list[str]:
    """The one address of the site, by the inventory alone."""
    vip, nodes = wish["vip"], list(wish["app_servers"])
    if not vip:
        return []
    try:
        wanted = ipaddress.ip_interface(vip)
    except ValueError:
        return [_NO_ADDRESS.format(vip=vip, why="is no address")]
    if wanted.version != 4:
        return [_NO_ADDRESS.format(vip=vip, why="is of IPv6, which is not built yet")]
    network = wanted.network
    if "/" not in vip or network.prefixlen > 30:
        return [_NO_ADDRESS.format(vip=vip, why="says nothing of the network that it belongs to")]
    found = []
    if wanted.ip in (network.network_address, network.broadcast_address):
        found.append(_NO_ADDRESS.format(vip=vip, why=f"is no host's address in {network}"))
    plain = _plain({host: address for host, address in wish["addresses"].items() if address})
    for host in wish["hosts"]:
        if plain.get(host) == str(wanted.ip):
            found.append(
                f"tribrick_vip is {wanted.ip}, which is the own address of {host}: it moves from node to node, so it "
                "must be one that no host has. Choose a free address of the same network."
            )
    outside = [host for host in nodes if host in plain and ipaddress.ip_address(plain[host]) not in network]
    if outside:
        listed = join(f"{host} ({plain[host]})" for host in outside)
        found.append(
            f"tribrick_vip is {vip}, but {listed} {'lies' if len(outside) == 1 else 'lie'} outside of {network}: only "
            "hosts of one network can hand an address over. Correct address and prefix, or put a balancer in front."
        )
    if len(nodes) < 2:
        found.append("tribrick_vip needs two hosts in app_servers at the least: with one nobody could take it over.")
    return found


def about_certificate(wish: Wish) -> list[str]:
    """What browsers are shown; a key that does not fit would keep nginx from starting at the next boot."""
    if wish["tls"] not in TLS:
        return [f"tribrick_tls is '{wish['tls']}', which is neither {' nor '.join(TLS)}: correct it in the inventory."]
    if not wish["tls_problem"]:
        return []
    files = "tribrick_tls_certificate and tribrick_tls_key, which name files on this machine"
    return [f"tribrick_tls is given, but {wish['tls_problem']}: correct {files}."]


def about_ports(wish: Wish) -> list[str]:
    """TCP ports of the inventory that something else has on the same host."""
    found, taken = [], dict(PORTS)
    for name, port in wish["ports"].items():
        other = taken.setdefault(int(port), name)
        if other != name:
            found.append(f"{name} is {port}, which {other} has: give it a TCP port of its own.")
    return found


_NO_ADDRESS = "tribrick_vip is '{vip}', which {why}: give an address of IPv4 with its prefix, such as 192.0.2.10/24."


def about_variables(facts: Facts, wish: Wish) -> list[str]:
    """Names that start like ours, but that nothing reads."""
    hosts_of: dict[str, list[str]] = {}
    known = set(wish["known_variables"])
    for host, seen in facts.items():
        for name in seen.get("variables", []):
            if name not in known:
                hosts_of.setdefault(name, []).append(host)
    return [
        f"The variable {name} (set for {'all hosts' if len(hosts) == len(facts) else join(hosts)}) "
        f"is known to no part of the kit.{nearest(name, known)} Correct or remove it; a variable of "
        "your own needs another first word, or an entry in preflight_known_variables."
        for name, hosts in sorted(hosts_of.items())
    ]


# --- which hosts take part ----------------------------------------------------------------


def about_absent(facts: Facts, wish: Wish) -> list[str]:
    """Whether the hosts named as absent may be left out."""
    found = []
    absent, servers = list(wish["absent"]), list(wish["gluster_servers"])
    for host in absent:
        if host not in wish["hosts"]:
            found.append(
                f"absent names {host}, which is no host of the inventory "
                f"({join(wish['hosts'])}).{nearest(host, wish['hosts'])} Correct '-e absent='."
            )
        elif host in wish["database_servers"]:
            found.append(
                f"absent names {host}, where the site's database runs: migrations need it. Bring "
                f"{host} back first; until then public pictures are still served."
            )
    if not has_volume(wish):
        return found + _too_few_receivers(wish, absent)
    gone = [host for host in servers if host in absent]
    for three in sets_of_three(servers):
        left = [host for host in three if host not in absent]
        if 2 * len(left) <= len(three):
            found.append(
                f"Without {join(h for h in three if h in absent)} only {join(left)} of {join(three)} "
                "is left, which is no majority: the volume takes no writes, and a rollout could "
                "not be proved. Bring one of them back first."
            )
    volume = wish["volume"]
    if gone and not any(volume in _volumes(seen) for seen in facts.values()):
        found.append(
            f"absent names {join(gone)}, but the volume {volume} does not exist yet, and creating "
            "it needs every node. Repair or replace the node, then run without absent."
        )
    return found


def _too_few_receivers(wish: Wish, absent: Sequence[str]) -> list[str]:
    nodes = list(wish["app_servers"])
    left = [host for host in nodes if host not in absent]
    if 2 * len(left) > len(nodes):
        return []
    gone = join(host for host in nodes if host in absent)
    text = f"Without {gone} only {join(left)} of {join(nodes)} is left, which is no majority: uploads are refused, and "
    return [text + "a rollout could not be proved. Bring one of them back first."]


def about_reach(facts: Facts, wish: Wish) -> list[str]:
    """Hosts that are not in the run, do not answer, or do not let us in."""
    found = []
    for host in wish["hosts"]:
        seen = facts.get(host, {})
        if "unreachable_reason" in seen:
            leave = (
                f" If it is dead, run again with '-e absent={','.join([*wish['absent'], host])}'."
                if host not in wish["database_servers"]
                else ""
            )
            found.append(
                f"{host} does not answer over SSH: {seen['unreachable_reason'] or 'no reason given'}."
                f" Check power, network, address ({wish['addresses'].get(host, 'none')}), login user "
                f"and host key.{leave}"
            )
        elif "problem" in seen:
            found.append(
                f"{host} answers, but nothing could be looked up as root: {seen['problem']}. Check "
                "that the login user may use sudo (ask for the password with '-K')."
            )
    left_out = [host for host in wish["hosts"] if host not in wish["absent"] and host not in facts]
    if left_out:
        verb = "belongs" if len(left_out) == 1 else "belong"
        found.append(
            f"{join(left_out)} {verb} to the inventory, but not to this run: leave out '--limit'. A dead "
            "node is left out with '-e absent=NAME'."
        )
    return found


# --- each host ----------------------------------------------------------------------------


def about_host(host: str, facts: Mapping[str, Any], wish: Wish) -> list[str]:
    """Release, memory, system disk, init."""
    found = []
    release = facts["release"]
    name = f"{release['id'] or 'an unknown system'} {release['version']}".strip()
    supported = [str(version) for version in wish["debian_releases"]]
    tested = release["id"] == "debian" and release["version"] in supported
    if not tested and not wish["allow_untested_release"]:
        found.append(
            f"{host} runs {name}; tested are Debian {join(supported)}. Install one of these, or "
            "accept the risk with tribrick_allow_untested_release: true."
        )
    if not facts["systemd"]:
        found.append(
            f"{host} was not started by systemd (process 1 is another program): the kit's services "
            "are systemd units. Use a full machine or a container that boots systemd."
        )
    if facts["memory_mib"] < wish["min_memory_mib"]:
        found.append(
            f"{host} has {facts['memory_mib']} MiB of memory; {wish['min_memory_mib']} MiB are the "
            "least. Add memory, or lower preflight_min_memory_mib and watch it swap."
        )
    if facts["system_free_mib"] < wish["min_system_free_mib"]:
        found.append(
            f"{host} has {facts['system_free_mib']} MiB free on the disk of /var/lib; packages and "
            f"the site need {wish['min_system_free_mib']} MiB. Make room there."
        )
    return found


def about_account(host: str, facts: Mapping[str, Any], wish: Wish) -> list[str]:
    """The site's user: one name, one pair of numbers, on every node."""
    seen, user = facts["account"], wish["user"]
    if seen is None:
        return []
    found = []
    for kind, number in (("uid", wish["uid"]), ("gid", wish["gid"])):
        what = "user" if kind == "uid" else "group"
        have, owner = seen[kind], seen[f"{kind}_name"]
        if have is not None and have != number:
            found.append(
                f"{host} has the {what} {user} with {kind} {have}, the inventory says {number}: files "
                f"on the bricks belong to numbers, so all nodes must agree. Change the {what} there "
                f"(and its files), or set tribrick_{kind} before the first rollout."
            )
        elif owner not in (None, user):
            found.append(
                f"{host} has given {kind} {number} to the {what} {owner}, who would own the site's "
                f"files: free the number there, or set another tribrick_{kind} before the first "
                "rollout."
            )
    return found


def about_clock(facts: Facts, wish: Wish) -> list[str]:
    """Clocks that are certainly further off than allowed."""
    limit = float(wish["max_clock_offset"])
    offsets = {host: seen["clock"]["offset"] for host, seen in facts.items() if "clock" in seen}
    off = {
        host: offset for host, offset in offsets.items() if abs(offset) - facts[host]["clock"]["uncertainty"] > limit
    }
    slack = max((seen["clock"]["uncertainty"] for seen in facts.values() if "clock" in seen), default=0)
    together = max(offsets.values(), default=0) - min(offsets.values(), default=0) <= limit + slack
    if len(off) > 1 and len(off) == len(offsets) and together:
        text = f"{join(off)} agree with each other, but are {_ahead(min(off.values()))} this machine's clock: "
        return [text + "set the time here (NTP), or certificates will not be valid yet."]
    return [
        f"The clock of {host} is {_ahead(offset)} this machine's; {limit:g} s are allowed. Set its "
        "time and let NTP keep it (for example: apt install systemd-timesyncd)."
        for host, offset in off.items()
    ]


def _ahead(seconds: float) -> str:
    return f"{abs(seconds):.1f} s {'ahead of' if seconds > 0 else 'behind'}"


def about_names(host: str, facts: Mapping[str, Any], wish: Wish) -> list[str]:
    """Names that mean another machine on this host than in the inventory."""
    found = []
    addresses = _plain(wish["addresses"])
    for name, address in addresses.items():
        if name in facts["pins"]:  # written by an earlier rollout, put right by this one
            continue
        same_family = [a for a in facts["names"].get(name, []) if (":" in a) == (":" in address)]
        other = [a for a in same_family if ipaddress.ip_address(a.split("%")[0]) != ipaddress.ip_address(address)]
        own = name == host and all(ipaddress.ip_address(a.split("%")[0]).is_loopback for a in other)
        if other and not (own and wish["names_pinned"]):
            found.append(
                f"{host} finds {name} at {join(other)}, the inventory says {address}: correct "
                f"tribrick_hosts, or the entry in the name server or in /etc/hosts of {host}."
            )
        elif not same_family and not wish["names_pinned"]:
            found.append(
                f"{host} finds no address for {name}: add {address} to the name server or to "
                f"/etc/hosts of {host}, or let the kit pin names (preflight_names_pinned: true)."
            )
        back = facts["addresses"].get(name, [])
        strangers = [n for n in back if n != name and n in addresses and n not in facts["pins"]]
        if strangers and name not in back:
            found.append(
                f"{host} takes {address} for {join(strangers)}, the inventory for {name}: correct "
                f"tribrick_hosts, or the entry in the name server or in /etc/hosts of {host}."
            )
        elif not wish["names_pinned"] and name not in [n.split(".")[0] for n in back] + back:
            found.append(
                f"{host} finds the name {join(back)} for {address}, the inventory says {name}: add "
                "the reverse entry, or let the kit pin names (preflight_names_pinned: true)."
            )
    return found


def _plain(addresses: Mapping[str, str]) -> dict[str, str]:
    """The addresses that can be right, in one spelling; the others have sentences of their own."""
    plain = {}
    for name, address in addresses.items():
        try:
            ip = ipaddress.ip_address(address)
        except ValueError:
            continue
        if not (ip.is_loopback or ip.is_unspecified):
            plain[name] = str(ip)
    return plain


def about_paths(host: str, facts: Mapping[str, Any], present: Iterable[str]) -> list[str]:
    """Ways between hosts that are blocked. A host that does not answer at all has its own sentence."""
    blocked: dict[tuple[str, str, str], list[int]] = {}
    here = set(present)
    for end in facts["connect"]:
        if end["result"] not in ("open", "closed") and end["host"] in here:
            blocked.setdefault((end["host"], end["address"], end["result"]), []).append(end["port"])
    return [
        f"{host} cannot reach {peer} ({address}) on TCP {'port' if len(ports) == 1 else 'ports'} "
        f"{join(str(port) for port in ports)}: {result}. Open the way in the network between them "
        f"and in the firewalls of {host} and {peer}."
        for (peer, address, result), ports in blocked.items()
    ]


def about_holders(facts: Facts, wish: Wish) -> list[str]:
    """Who has the site's address now, on the hosts and on their network."""
    found = []
    seen = {host: entry["facts"]["vip"] for host, entry in facts.items() if entry["facts"].get("vip")}
    address = wish["vip"].partition("/")[0]
    for host, there in seen.items():
        if there["interface"] is None:
            named = wish["vip_interface"]
            what = f"no interface {named}" if named else "its own address on no interface"
            found.append(
                f"{host} has {what}: name the interface that gets {address} in tribrick_vip_interface, or correct "
                "the host's address in tribrick_hosts."
            )
        # A host's own address has a sentence of its own.
        if there["held"] and not there["ours"] and wish["addresses"].get(host) != address:
            found.append(
                f"{host} has tribrick_vip ({address}) on {there['held']} already, and not from the kit: take it away "
                "there and from the host's network configuration, or choose a free address."
            )
    others = sorted({there["answered_by"] for there in seen.values() if there["answered_by"]})
    # Where the kit has been, it is a node that holds the address, perhaps one that is left out.
    if others and not any(there["ours"] or there["held"] for there in seen.values()):
        found.append(
            f"tribrick_vip ({address}) answers already, from the hardware address {join(others)}, which is none of the "
            "site's nodes: two hosts with one address cut each other off. Choose a free address."
        )
    return found


# --- storage ------------------------------------------------------------------------------


def _volumes(seen: Mapping[str, Any]) -> Mapping[str, Any]:
    known: Mapping[str, Any] = seen.get("facts", {}).get("pool", {}).get("volumes", {})
    return known


def _brick_owner(host: str, path: str, volumes: Mapping[str, Any]) -> str | None:
    return next((name for name, v in volumes.items() if f"{host}:{path}" in v["bricks"]), None)


def about_brick(host: str, facts: Mapping[str, Any], wish: Wish, known_ids: Iterable[str]) -> list[str]:
    """The brick's file system and directory on one node."""
    seen = facts["brick"]
    if seen is None:
        return []
    found = []
    mount, path, volume = wish["brick_mount"], wish["brick_path"], wish["volume"]
    if not wish["allow_shared_filesystem"]:
        if not seen["mounted"]:
            what = "is no mount point" if seen["mount_exists"] else "does not exist"
            found.append(
                f"{host}: {mount} {what}, so the brick would lie on the disk below and fill it. Make "
                f"a file system for the brick (XFS), mount it there and add it to /etc/fstab; if it "
                "is there already, mount it."
            )
        elif seen["on_root"]:
            found.append(
                f"{host}: {mount} lies on the root file system, which a full brick would fill. Give "
                "the brick a file system of its own (for a lab: tribrick_allow_shared_filesystem)."
            )
    if seen["bytes"] < float(wish["min_brick_gib"]) * GIB:
        found.append(
            f"{host}: the file system of the brick ({mount}) has {seen['bytes'] / GIB:.1f} GiB; "
            f"{wish['min_brick_gib']:g} GiB are the least. Use a larger one, or lower "
            "preflight_min_brick_gib."
        )
    owner = _brick_owner(host, path, facts["pool"]["volumes"])
    ids = set(known_ids)
    if owner not in (None, volume):
        found.append(
            f"{host}: {path} is the brick of another volume, {owner}. Choose another "
            "tribrick_brick_path, or the volume's own name in tribrick_volume."
        )
    elif seen["exists"] and not seen["directory"]:
        found.append(f"{host}: {path} is no directory. Move it away, or choose another path.")
    elif seen["volume_id"] is not None and seen["volume_id"] not in ids:
        what = f"not to {volume} ({join(sorted(ids))})" if ids else f"and {volume} does not exist yet"
        found.append(
            f"{host}: {path} belongs to a volume with the id {seen['volume_id']}, {what}. If nothing "
            "in it is needed, move the directory away; otherwise choose another tribrick_brick_path."
        )
    elif seen["volume_id"] is None and seen["entries"]:
        found.append(
            f"{host}: {path} is not empty (it holds {join(seen['entries'])}) and no brick of a "
            "volume. Move its content away; files are never taken over from a directory."
        )
    return found


def about_bricks(facts: Facts, wish: Wish) -> list[str]:
    """Whether the bricks that hold the same files are of one size."""
    found = []
    for three in sets_of_three(list(wish["gluster_servers"])):
        sizes = {
            host: facts[host]["facts"]["brick"]["bytes"]
            for host in three
            if facts.get(host, {}).get("facts", {}).get("brick")
        }
        if not sizes:
            continue
        small, large = min(sizes, key=sizes.__getitem__), max(sizes, key=sizes.__getitem__)
        if sizes[large] - sizes[small] > sizes[large] * float(wish["brick_tolerance_percent"]) / 100:
            listed = join(f"{host} {size / GIB:.1f} GiB" for host, size in sizes.items())
            found.append(
                f"The brick of {small} is smaller than its peers' ({listed}): the volume is full "
                f"when the smallest is. Enlarge the file system of {wish['brick_mount']} on {small}."
            )
    return found


def about_pool(facts: Facts, wish: Wish) -> list[str]:
    """What the nodes' stores say about pool and volume."""
    found = []
    servers, volume = list(wish["gluster_servers"]), wish["volume"]
    wanted = {f"{host}:{wish['brick_path']}" for host in servers}
    owners: dict[str, list[str]] = {}
    wrong: dict[tuple[str, ...], list[str]] = {}
    ids: dict[str, list[str]] = {}
    for host in servers:
        pool = facts.get(host, {}).get("facts", {}).get("pool")
        if pool is None:
            continue
        if pool["uuid"]:
            owners.setdefault(pool["uuid"], []).append(host)
        if volume in pool["volumes"]:
            seen = pool["volumes"][volume]
            ids.setdefault(str(seen["id"]), []).append(host)
            if set(seen["bricks"]) != wanted:
                wrong.setdefault(tuple(seen["bricks"]), []).append(host)
    for uuid, hosts in owners.items():
        if len(hosts) > 1:
            found.append(
                f"{join(hosts)} have the same GlusterFS identity {uuid}, as copies of one machine "
                f"have: on {join(hosts[1:])} stop glusterd and remove /var/lib/glusterd, which no "
                "volume needs yet."
            )
    for bricks, hosts in wrong.items():
        found.append(
            f"On {join(hosts)} the volume {volume} exists with other bricks than the inventory says: "
            f"it has {join(bricks)}; wanted are {join(sorted(wanted))}. Correct hosts and "
            "tribrick_brick_path, or choose another tribrick_volume; bricks are never exchanged by "
            "a rollout. If a new host takes a lost one's place: playbooks/recover_node.yml -e node=NEW "
            "-e instead_of=LOST -e confirm=yes."
        )
    if len(ids) > 1:
        listed = "; ".join(f"{join(hosts)}: {number}" for number, hosts in ids.items())
        found.append(
            f"The nodes know different volumes by the name {volume} ({listed}): they belong to "
            "different pools. Name only the nodes of one pool in gluster_servers."
        )
    return found


def about_mix(facts: Facts, wish: Wish) -> list[str]:
    """One release on all nodes of pool and site, one GlusterFS major version in the pool."""
    found = []
    releases: dict[str, list[str]] = {}
    versions: dict[str, list[str]] = {}
    for host in dict.fromkeys([*wish["gluster_servers"], *wish["app_servers"]]):
        seen = facts.get(host, {}).get("facts")
        if seen is None:
            continue
        release = f"{seen['release']['id']} {seen['release']['version']}"
        releases.setdefault(release, []).append(host)
        version = seen["gluster"]["installed"] or seen["gluster"]["candidate"]
        major = re.match(r"(?:\d+:)?(\d+)", version or "")
        if major and has_volume(wish) and host in wish["gluster_servers"]:
            versions.setdefault(major[1], []).append(host)
    if len(releases) > 1:
        listed = "; ".join(f"{join(hosts)}: {release}" for release, hosts in releases.items())
        found.append(
            f"The nodes run different releases ({listed}): the pool needs one GlusterFS version and "
            "the site one Python. Install the same release on all."
        )
    if len(versions) > 1:
        listed = "; ".join(f"{join(hosts)}: {version}" for version, hosts in versions.items())
        found.append(
            f"The nodes have or would get different GlusterFS major versions ({listed}): install the "
            "same one on all, from the same package source."
        )
    return found


def about_switch(facts: Facts, wish: Wish) -> list[str]:
    """Whether the hosts already run another media back end, whose files nobody would find again."""
    runs: dict[str, list[str]] = {}
    for host in wish["app_servers"]:
        here = facts.get(host, {}).get("facts", {})
        found = here.get("backend") or ("volume" if wish["volume"] in here.get("pool", {}).get("volumes", {}) else None)
        if found not in (None, wish["media_backend"]):
            runs.setdefault(found, []).append(host)
    return [
        f"{join(hosts)} already {'run' if len(hosts) > 1 else 'runs'} media_backend {backend}, the inventory says "
        f"{wish['media_backend']}: the site would not find its files. Set media_backend: {backend} again; moving the "
        "files to another back end is an operation of its own, not a rollout."
        for backend, hosts in runs.items()
    ]


def about_spool(facts: Facts, wish: Wish) -> list[str]:
    """Uploads that only a spool has, which is to be given up: no site would find them."""
    if wish["spool"]:
        return []
    kept = {host: entry["facts"].get("spooled") for host, entry in facts.items()}
    return [
        f"{host} still keeps uploads in its spool ({file}), and without media_spool nobody would look there: set "
        "media_spool: true again, run 'tribrick drain' on every node until it ends with 0, and give it up then. "
        "What has no row in the catalog leaves the spool after a day."
        for host, file in kept.items()
        if file
    ]


# --- the report ---------------------------------------------------------------------------


def findings(facts: Facts, wish: Wish) -> list[str]:
    """All that speaks against a rollout, the inventory's faults first, then host by host."""
    seen = {host: entry for host, entry in facts.items() if "facts" in entry}
    present = list(seen)
    known_ids = {
        str(volumes[wish["volume"]]["id"]) for volumes in map(_volumes, seen.values()) if wish["volume"] in volumes
    }
    found = about_inventory(wish) + about_variables(facts, wish)
    found += about_reach(facts, wish) + about_absent(facts, wish)
    found += about_mix(seen, wish) + about_clock(seen, wish)
    for host, entry in seen.items():
        here = entry["facts"]
        found += about_host(host, here, wish) + about_account(host, here, wish)
        found += about_names(host, here, wish) + about_paths(host, here, present)
        if has_volume(wish):
            found += about_brick(host, here, wish, known_ids)
    found += about_holders(seen, wish) if wish["vip"] else []
    found += about_switch(seen, wish) + about_spool(seen, wish)
    return found + (about_bricks(seen, wish) + about_pool(seen, wish) if has_volume(wish) else [])


def numbered(sentences: Sequence[str]) -> str:
    """The report as people read it."""
    count = len(sentences)
    head = f"{count} thing{'s' * (count != 1)} to put right before the rollout; nothing was changed:"
    return "\n".join([head, *(f"{at}. {text}" for at, text in enumerate(sentences, 1))])


def absent_report(
    absent: Sequence[str],
    groups: Mapping[str, Sequence[str]],
    pending: Iterable[str] = (),
    facts: Facts | None = None,
) -> list[str]:
    """What the hosts left out still need; empty when none was."""
    found = []
    for host in absent:
        jobs = {
            "gluster_servers": "GlusterFS settings and certificate",
            "app_servers": "the site's release",
            "edge_servers": "the web server's configuration",
        }
        needs = [job for group, job in jobs.items() if host in groups.get(group, [])]
        alive = [
            peer
            for peer, entry in (facts or {}).items()
            for end in entry.get("facts", {}).get("connect", [])
            if end["host"] == host and end["result"] == "open"
        ]
        text = f"{host} was left out and may be out of date: {join([*needs, 'packages and firewall rules'])}."
        if alive:
            text += f" It does answer {join(dict.fromkeys(alive))}: it is not dead."
        text += (
            f" When {host} is back, run the rollout once without absent"
            + (", and wait until nothing is left to heal" if host in groups.get("gluster_servers", []) else "")
            + "."
        )
        found.append(text)
    return found + [f"Put off: {words}." for words in pending]
