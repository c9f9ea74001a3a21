#!/usr/bin/python
# Copyright (c) 2026, the Tribrick authors
# SPDX-License-Identifier: BSD-3-Clause
"""Collect what a rollout must know about a host before it changes anything."""

from __future__ import annotations

DOCUMENTATION = r"""
module: preflight_facts
short_description: Collect what a rollout must know about a host before it changes anything
description:
  - Looks at one host and reports; judges nothing and changes nothing, so it runs the same in check mode.
  - Everything that can hang (names, connections, package tools) runs side by side under one deadline.
  - The action plugin of the same name adds the clock's offset and turns an unreachable host into an answer.
options:
  names:
    description: Host name to address, as the inventory has them; looked up on the host in both directions.
    type: dict
    default: {}
  connect:
    description: TCP end points to try. A refused connection counts as a way through.
    type: list
    elements: dict
    default: []
    suboptions:
      host: {description: Name for the report., type: str, required: true}
      address: {description: Plain address., type: str, required: true}
      port: {description: TCP port., type: int, required: true}
  deadline:
    description: Seconds that names and connections may take together.
    type: float
    default: 3
  brick_mount:
    description: Mount point of the brick's file system. Leave out on a host without brick.
    type: path
  brick_path:
    description: Directory of the brick.
    type: path
  user:
    description: User and group to look up by name. Leave out where the site's user is not needed.
    type: str
  uid:
    description: Number to look up among users.
    type: int
  gid:
    description: Number to look up among groups.
    type: int
  vip:
    description: Address that the site is to have. Looked up among the host's own, and asked for on its network.
    type: str
  vip_interface:
    description: Interface that gets it. Empty is the one that has O(own_address).
    type: str
    default: ""
  own_address:
    description: The host's address as its peers know it.
    type: str
    default: ""
  variable_prefixes:
    description: Prefixes of variable names to report. Used by the action plugin alone.
    type: list
    elements: str
    default: []
author: [Tribrick authors]
attributes:
  check_mode:
    description: Reads only.
    support: full
  diff_mode:
    description: There is nothing to show.
    support: none
"""

EXAMPLES = r"""
- name: Look at a node
  tribrick.media.preflight_facts:
    names: {node1: 192.0.2.11, node2: 192.0.2.12, node3: 192.0.2.13}
    connect: [{host: node2, address: 192.0.2.12, port: 24007}]
    brick_mount: /srv/gluster/media
    brick_path: /srv/gluster/media/brick
  become: true
  register: seen
"""

RETURN = r"""
facts:
  description: What was found; the input of the filter M(tribrick.media.preflight_findings).
  returned: when the host answered
  type: dict
unreachable_reason:
  description: Why the host did not answer over SSH.
  returned: when it did not
  type: str
problem:
  description: Why nothing could be collected although the host answered, for example a wrong sudo password.
  returned: when so
  type: str
clock:
  description: Seconds by which the host's clock is ahead of the controller's, and how uncertain that is.
  returned: when the host answered
  type: dict
variables:
  description: Names of the host's variables that start with one of O(variable_prefixes).
  returned: always
  type: list
  elements: str
"""

import errno
import glob
import grp
import json
import os
import pwd
import select
import socket
import stat
import struct
import sys
import threading
import time
import uuid

from ansible.module_utils.basic import AnsibleModule

GLUSTERD = "/var/lib/glusterd"
SITE = "/etc/tribrick/site.env"  # as the role django_site writes it
ADDRESS = "/etc/tribrick/keepalived.conf"  # as the role media_vip writes them
BALANCER = "/etc/tribrick/haproxy.cfg"
PINS_BEGIN = "# BEGIN tribrick names"  # as the module host_pins writes them
PINS_END = "# END tribrick names"


def read(path: str) -> str:
    """Text of a file; empty when there is none."""
    try:
        with open(path, encoding="utf-8", errors="surrogateescape") as stream:
            return stream.read()
    except (FileNotFoundError, NotADirectoryError):
        return ""


def pairs(text: str) -> dict[str, str]:
    """The key=value lines of os-release and of glusterd's store."""
    lines = (line.partition("=") for line in text.splitlines() if "=" in line)
    return {key.strip(): value.strip().strip('"') for key, _sep, value in lines}


def kit_pins(text: str) -> list[str]:
    """Names that the kit itself has put into /etc/hosts, and will put right itself."""
    names, inside = [], False
    for line in text.splitlines():
        if line.strip() in (PINS_BEGIN, PINS_END):
            inside = line.strip() == PINS_BEGIN
        elif inside:
            names += line.split("#", 1)[0].split()[1:]
    return names


def candidate(text: str) -> str | None:
    """The candidate version in the answer of apt-cache policy."""
    for line in text.splitlines():
        word, _sep, version = line.strip().partition(": ")
        if word == "Candidate":
            return None if version == "(none)" else version
    return None


def mount_of(mountinfo: str, path: str) -> dict[str, str]:
    """The mount that a path lies on: its mount point, type and source."""
    best = {"point": "", "type": "", "source": ""}
    for line in mountinfo.splitlines():
        left, _sep, right = line.partition(" - ")
        point = left.split()[4].encode().decode("unicode_escape")
        inside = path == point or path.startswith(point.rstrip("/") + "/")
        if inside and len(point) >= len(best["point"]):  # later mounts cover earlier ones
            kind, source = right.split()[:2]
            best = {"point": point, "type": kind, "source": source}
    return best


def existing(path: str) -> str:
    """The path, or its nearest parent that exists."""
    while not os.path.exists(path):
        path = os.path.dirname(path)
    return path


def size_of(path: str) -> dict[str, int]:
    answer = os.statvfs(path)
    return {"bytes": answer.f_frsize * answer.f_blocks, "free": answer.f_frsize * answer.f_bavail}


def brick(mount: str, path: str) -> dict[str, object]:
    """The brick's file system and directory, as they are."""
    root = os.stat("/").st_dev
    place = existing(mount)
    found: dict[str, object] = {
        "mount_exists": os.path.isdir(mount),
        "mounted": os.path.ismount(mount),
        "on_root": os.stat(place).st_dev == root,
        "filesystem": mount_of(read("/proc/self/mountinfo"), os.path.realpath(place))["type"],
        "exists": os.path.lexists(path),
        "directory": False,
        "entries": [],
        "volume_id": None,
        **size_of(place),
    }
    if os.path.lexists(path):
        found["directory"] = stat.S_ISDIR(os.lstat(path).st_mode)
    if found["directory"]:
        found["entries"] = sorted(os.listdir(path))[:3]
        try:
            raw = os.getxattr(path, "trusted.glusterfs.volume-id")
            found["volume_id"] = str(uuid.UUID(bytes=raw)) if len(raw) == 16 else raw.hex()
        except OSError as error:
            if error.errno not in (errno.ENODATA, errno.ENOTSUP):
                raise
    return found


def backend(environment: str) -> str | None:
    """Where the site on this host keeps its files, by its environment; None without a site."""
    return pairs(environment).get("TRIBRICK_BACKEND", "volume") if environment else None


def spooled(environment: str) -> str | None:
    """A file that still lies in the spool of the site on this host, by its environment; None if there is none."""
    for folder, folders, names in os.walk(pairs(environment).get("TRIBRICK_SPOOL", "")):
        folders[:] = [name for name in folders if not name.startswith(".")]
        for name in names:
            if not name.startswith("."):
                return os.path.join(folder, name)
    return None


def pool() -> dict[str, object]:
    """What glusterd knows. Its store is read, not the daemon asked: it may be down, or not there yet."""
    volumes = {}
    for folder in sorted(glob.glob(f"{GLUSTERD}/vols/*/info")):
        bricks = [pairs(read(name)) for name in sorted(glob.glob(f"{os.path.dirname(folder)}/bricks/*"))]
        volumes[os.path.basename(os.path.dirname(folder))] = {
            "id": pairs(read(folder)).get("volume-id"),
            "bricks": sorted(f"{b['hostname']}:{b['path']}" for b in bricks if "hostname" in b and "path" in b),
        }
    peers = [pairs(read(name)) for name in sorted(glob.glob(f"{GLUSTERD}/peers/*"))]
    return {
        "uuid": pairs(read(f"{GLUSTERD}/glusterd.info")).get("UUID"),
        "peers": sorted(peer["hostname1"] for peer in peers if "hostname1" in peer),
        "volumes": volumes,
    }


def account(user: str, uid: int, gid: int) -> dict[str, object]:
    """Who has the names and numbers that the site's user needs."""
    found: dict[str, object] = {"uid": None, "gid": None, "uid_name": None, "gid_name": None}
    try:
        found["uid"] = pwd.getpwnam(user).pw_uid
    except KeyError:
        pass
    try:
        found["gid"] = grp.getgrnam(user).gr_gid
    except KeyError:
        pass
    try:
        found["uid_name"] = pwd.getpwuid(uid).pw_name
    except KeyError:
        pass
    try:
        found["gid_name"] = grp.getgrgid(gid).gr_name
    except KeyError:
        pass
    return found


def forward(name: str) -> list[str]:
    """Addresses of a name; none when it has none."""
    try:
        return sorted({str(entry[4][0]) for entry in socket.getaddrinfo(name, None, proto=socket.IPPROTO_TCP)})
    except OSError:
        return []


def reverse(address: str) -> list[str]:
    """Names of an address; none when it has none."""
    try:
        name, aliases, _addresses = socket.gethostbyaddr(address)
    except OSError:
        return []
    return [name, *aliases]


def connect(address: str, port: int, deadline: float) -> str:
    """Try a TCP connection: open, closed (refused: the way is free), or what went wrong."""
    try:
        with socket.create_connection((address, port), timeout=deadline):
            return "open"
    except ConnectionRefusedError:
        return "closed"
    except TimeoutError:
        return "no answer"
    except OSError as error:
        return (error.strerror or str(error)).lower()


def interfaces(answer: str) -> dict[str, list[str]]:
    """Interface to its addresses, from ``ip -json address show``."""
    found: dict[str, list[str]] = {}
    for link in json.loads(answer or "[]"):
        if "ifname" in link:
            found[link["ifname"]] = [entry["local"] for entry in link.get("addr_info", []) if "local" in entry]
    return found


def plain(address: str) -> bool:
    """Whether it is an IPv4 address; what else the inventory may hold has a sentence of its own."""
    try:
        return len(socket.inet_pton(socket.AF_INET, address)) == 4
    except OSError:
        return False


def who_has(address: str, mac: bytes) -> bytes:
    """An ARP probe (RFC 5227): it asks without claiming anything."""
    ethernet = b"\xff" * 6 + mac + struct.pack("!H", 0x0806)
    head = struct.pack("!HHBBH", 1, 0x0800, 6, 4, 1)
    return ethernet + head + mac + bytes(4) + bytes(6) + socket.inet_aton(address)


def answer_to(frame: bytes, address: str) -> str | None:
    """Who says in an ARP frame that the address is theirs: a hardware address, or nobody."""
    if len(frame) < 42 or frame[12:14] != b"\x08\x06" or frame[28:32] != socket.inet_aton(address):
        return None
    return ":".join(f"{byte:02x}" for byte in frame[22:28])


def asked_for(address: str, interface: str, deadline: float) -> str | None:
    """The hardware address that answers to an address on this network; None for nobody."""
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(0x0806)) as wire:
        wire.bind((interface, 0))
        mac = wire.getsockname()[4]
        if len(mac) != 6:
            return None
        end = time.monotonic() + deadline
        again = 0.0
        while time.monotonic() < end:
            if time.monotonic() >= again:
                wire.send(who_has(address, mac))
                again = time.monotonic() + deadline / 3
            if select.select([wire], [], [], 0.1)[0]:
                found = answer_to(wire.recv(2048), address)
                if found:
                    return found
    return None


def one_address(links: dict[str, list[str]], vip: str, own: str, wanted: str, deadline: float) -> dict[str, object]:
    """What there is of the site's address on this host and on its network."""
    interface = wanted or next((name for name, addresses in links.items() if own in addresses), "")
    held = next((name for name, addresses in links.items() if vip in addresses), None)
    ours = f" {vip}/" in read(ADDRESS)
    found: dict[str, object] = {
        "interface": interface if interface in links else None,
        "held": held,
        "ours": ours,
        "answered_by": None,
    }
    if found["interface"] and not held and not ours and plain(vip):
        found["answered_by"] = asked_for(vip, interface, deadline)
    return found


def main() -> None:
    start = time.time()
    module = AnsibleModule(
        argument_spec={
            "names": {"type": "dict", "default": {}},
            "connect": {
                "type": "list",
                "elements": "dict",
                "default": [],
                "options": {
                    "host": {"type": "str", "required": True},
                    "address": {"type": "str", "required": True},
                    "port": {"type": "int", "required": True},
                },
            },
            "deadline": {"type": "float", "default": 3},
            "brick_mount": {"type": "path"},
            "brick_path": {"type": "path"},
            "user": {"type": "str"},
            "uid": {"type": "int"},
            "gid": {"type": "int"},
            "vip": {"type": "str"},
            "vip_interface": {"type": "str", "default": ""},
            "own_address": {"type": "str", "default": ""},
            "variable_prefixes": {"type": "list", "elements": "str", "default": []},
        },
        required_together=[("brick_mount", "brick_path"), ("user", "uid", "gid")],
        supports_check_mode=True,
    )
    wanted = module.params

    # What may hang: one thread each, one deadline for all. Daemon threads do not outlive the module.
    waiting: dict[tuple[str, str, int], object] = {}
    threads = []

    def ask(key, question, *arguments):
        def work():
            waiting[key] = question(*arguments)

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        threads.append(thread)

    for name, address in wanted["names"].items():
        ask(("name", name, 0), forward, name)
        ask(("address", name, 0), reverse, address)
    for end in wanted["connect"]:
        ask(("connect", end["host"], end["port"]), connect, end["address"], end["port"], wanted["deadline"])

    def run(*command):
        words = ["timeout", "-k", "2", "60", *command]
        return module.run_command(words, environ_update={"LC_ALL": "C", "LANG": "C", "LANGUAGE": "C"})

    release = pairs(read("/etc/os-release"))
    installed = available = None
    if release.get("ID") == "debian" or "debian" in release.get("ID_LIKE", "").split():
        status, words, _err = run("dpkg-query", "-W", "-f", "${db:Status-Status} ${Version}", "glusterfs-server")
        state, _sep, version = words.partition(" ")
        installed = version if status == 0 and state == "installed" else None
        status, words, err = run("apt-cache", "policy", "glusterfs-server")
        if status != 0:
            module.fail_json(msg=f"apt-cache policy failed: {(err or words).strip()}")
        available = candidate(words)

    memory = next(line for line in read("/proc/meminfo").splitlines() if line.startswith("MemTotal:"))
    facts = {
        "release": {"id": release.get("ID", ""), "version": release.get("VERSION_ID", "")},
        "gluster": {"installed": installed, "candidate": available},
        "memory_mib": int(memory.split()[1]) // 1024,
        "system_free_mib": size_of(existing("/var/lib"))["free"] >> 20,
        "systemd": read("/proc/1/comm").strip() == "systemd",
        "python": ".".join(str(part) for part in sys.version_info[:3]),
        "brick": brick(wanted["brick_mount"], wanted["brick_path"]) if wanted["brick_path"] else None,
        "account": account(wanted["user"], wanted["uid"], wanted["gid"]) if wanted["user"] else None,
        "pool": pool(),
        "pins": kit_pins(read("/etc/hosts")),
        "backend": backend(read(SITE)),
        "spooled": spooled(read(SITE)),
        "one_address": any(os.path.exists(path) for path in (ADDRESS, BALANCER)),
    }

    if wanted["vip"]:
        status, words, err = run("ip", "-json", "address", "show")
        if status != 0:
            module.fail_json(msg=f"ip address show failed: {(err or words).strip()}")
        links = interfaces(words)
        facts["vip"] = one_address(links, wanted["vip"], wanted["own_address"], wanted["vip_interface"], 1.0)

    limit = time.monotonic() + wanted["deadline"] + 0.5
    for thread in threads:
        thread.join(max(0.0, limit - time.monotonic()))
    answers = dict(waiting)
    facts["names"] = {name: answers.get(("name", name, 0), []) for name in wanted["names"]}
    facts["addresses"] = {name: answers.get(("address", name, 0), []) for name in wanted["names"]}
    facts["connect"] = [
        {
            "host": end["host"],
            "address": end["address"],
            "port": end["port"],
            "result": answers.get(("connect", end["host"], end["port"]), "no answer"),
        }
        for end in wanted["connect"]
    ]
    module.exit_json(changed=False, facts=facts, start=start, end=time.time())


if __name__ == "__main__":
    main()
