"""Bad input is refused before any change, in a sentence that names the host, what was found and what to do."""

from __future__ import annotations

import shutil
from dataclasses import dataclass, field

import pytest
import yaml

from helpers import NODES, Rig, wait_until

OTHER = "/srv/gluster/media/other"


@dataclass
class Case:
    """One kind of bad input."""

    sentences: tuple[str, ...]
    extra: dict[str, object] = field(default_factory=dict)
    break_: dict[str, str] = field(default_factory=dict)  # host -> script that makes the fault
    mend: dict[str, str] = field(default_factory=dict)
    proof: dict[str, str] = field(default_factory=dict)  # host -> script that succeeds only if the fault is there
    inventory: dict[str, object] = field(default_factory=dict)  # file -> what to add to it, or a word of `scratch`
    report: bool = True  # the preflight's numbered report, not Ansible's own word


FAKETIME = """cat >/usr/local/bin/five-minutes-on <<'END'
#!/bin/sh
LD_PRELOAD=$(ls /usr/lib/*/faketime/libfaketime.so.1) FAKETIME=+300s exec /usr/bin/python3 "$@"
END
chmod 755 /usr/local/bin/five-minutes-on"""

CASES = {
    "two nodes": Case(
        (r"gluster_servers has 2 host\(s\) \(node1 and node2\)", r"Add 1 host\(s\) to the group"),
        inventory={"hosts.yml": "two"},
    ),
    "even replica": Case((r"asks for replica 2", r"set replica 3"), {"tribrick_replica": 2}),
    "brick path not empty": Case(
        (rf"node2: {OTHER} is not empty \(it holds somebodys\)", r"Move its content away"),
        {"tribrick_brick_path": OTHER, "tribrick_volume": "second"},
        {"node2": f"mkdir -p {OTHER} && echo x >{OTHER}/somebodys"}, {"node2": f"rm -r {OTHER}"},
        {"node2": f"test -s {OTHER}/somebodys"},
    ),
    "brick of another volume": Case(
        (rf"node3: {OTHER} belongs to a volume with the id 0123", r"otherwise choose another tribrick_brick_path"),
        {"tribrick_brick_path": OTHER, "tribrick_volume": "second"},
        {"node3": f"mkdir -p {OTHER} && setfattr -n trusted.glusterfs.volume-id "
                  f"-v 0x0123456789abcdef0123456789abcdef {OTHER}"},
        {"node3": f"rm -r {OTHER}"}, {"node3": f"getfattr -n trusted.glusterfs.volume-id {OTHER}"},
    ),
    "brick on the root file system": Case(
        (r"node1: /srv is no mount point", r"node3: /srv is no mount point", r"Make a file system for the brick"),
        {"tribrick_brick_mount": "/srv", "tribrick_brick_path": "/srv/brick", "tribrick_volume": "second",
         "tribrick_allow_shared_filesystem": False},
    ),
    "node unreachable": Case(
        (r"node2 does not answer over SSH", r"Check power, network, address \(198\.18\.1\.99\)", r"-e absent=node2"),
        inventory={"group_vars/all/hosts.yml": "moved"},
    ),
    "clock five minutes off": Case(
        (r"The clock of node2 is (299|300|301)\.\d s ahead of", r"let NTP keep it"),
        break_={"node2": FAKETIME}, mend={"node2": "rm /usr/local/bin/five-minutes-on"},
        proof={"node2": "test $(($(/usr/local/bin/five-minutes-on -c 'import time; print(int(time.time()))')"
                        " - $(date +%s))) -gt 290"},
        inventory={"host_vars/node2.yml": "ansible_python_interpreter: /usr/local/bin/five-minutes-on\n"},
    ),
    "wrong vault password": Case((r"[Dd]ecryption failed",), inventory={"": "wrong password"}, report=False),
    "disk too small": Case(
        (r"node1: the file system of the brick \(/srv/gluster/media\) has [\d.]+ GiB; 1e\+06 GiB|1000000 GiB",
         r"Use a larger one"), {"preflight_min_brick_gib": 1000000},
    ),
    "unsupported release": Case(
        (r"node1 runs debian 13; tested are Debian 12", r"tribrick_allow_untested_release"),
        {"preflight_debian_releases": ["12"]},
    ),
    "mixed releases": Case(
        (r"different releases \(node1 and node3: debian 13; node2: debian 12\)", r"Install the same release on all"),
        break_={"node2": "sed 's/13/12/g; s/trixie/bookworm/g' /usr/lib/os-release >/run/os-release "
                         "&& mount --bind /run/os-release /usr/lib/os-release"},
        mend={"node2": "umount /usr/lib/os-release"},
        proof={"node2": "grep -q 'VERSION_ID=\"12\"' /etc/os-release"},
    ),
    "taken uid": Case(
        (r"node2 has given uid 2999 to the user squatter|node2 has the user tribrick with uid 2971",
         r"set (another )?tribrick_uid before the first rollout"),
        {"tribrick_uid": 2999}, {"node2": "useradd -u 2999 -M squatter"}, {"node2": "userdel squatter"},
        {"node2": "id squatter"},
    ),
    "misspelt variable": Case(
        (r"The variable tribrick_volme \(set for all hosts\)", r"Did you mean 'tribrick_volume'\?", r"Correct or rem"),
        {"tribrick_volme": "photos"},
    ),
    "volume with other bricks": Case(
        (r"volume media exists with other bricks", rf"wanted are node1:{OTHER}", r"Correct hosts and tribrick_brick_"),
        {"tribrick_brick_path": OTHER},
    ),
}
WATCHED = "/etc /opt/tribrick /usr/local /var/lib/glusterd /srv/gluster/media"


def scratch(rig: Rig, case: Case, directory):
    """Return a copy of the inventory with the case's faults, and the vault password file to use."""
    inventory, password = directory / "inventory", rig.lab.vault_password
    shutil.copytree(rig.lab.inventory, inventory)
    for name, content in case.inventory.items():
        file = inventory / name
        if content == "two":
            hosts = yaml.safe_load(file.read_text())
            for group in hosts.values():
                (group.get("hosts") or {}).pop("node3", None)
            file.write_text(yaml.safe_dump(hosts))
        elif content == "moved":
            hosts = yaml.safe_load(file.read_text())
            hosts["tribrick_hosts"]["node2"]["address"] = rig.address("node2").rsplit(".", 1)[0] + ".99"
            file.write_text(yaml.safe_dump(hosts))
        elif content == "wrong password":
            password = directory / "password"
            password.write_text("not the right one\n")
        else:
            with file.open("a") as stream:
                stream.write(content)
    return inventory, password


CHANGED = (
    f"find $(ls -d {WATCHED} 2>/dev/null) -xdev {{}} ! -path '*/.glusterfs/*' ! -name '__pycache__' ! -name '*.pyc' "
    "! -path '/etc/mtab'"
)


@pytest.fixture(scope="module", autouse=True)
def _settled(rig):
    """Uploads of earlier tests have ended on the bricks: GlusterFS clears its marks a second after a write."""
    recent = CHANGED.format("-newerct '3 seconds ago'")
    wait_until("nothing to change", lambda: not any(rig.everywhere(lambda n: rig.root(n, recent)).values()), 60)


@pytest.mark.parametrize("name", CASES)
def test_refused_before_any_change(rig, tmp_path, name):
    case = CASES[name]
    inventory, password = scratch(rig, case, tmp_path)
    variables = tmp_path / "extra.yml"
    variables.write_text(yaml.safe_dump(case.extra))
    try:
        for host, script in case.break_.items():
            rig.root(host, script)
        for host, script in case.proof.items():
            rig.root(host, script)
        volume = rig.volume_state()
        rig.everywhere(lambda n: rig.root(n, "touch /run/before"), (*NODES, "db1"))
        done = rig.rollout("-e", f"@{variables}", inventory=inventory, password=password, deadline=120)
        report = (r"to put right before the rollout; nothing was changed",) if case.report else ()
        done.refused(*report, *case.sentences)
        assert done.seconds < 30
        changes = rig.everywhere(lambda n: rig.root(n, CHANGED.format("-cnewer /run/before")), (*NODES, "db1"))
        assert not any(changes.values()), changes
        assert rig.volume_state() == volume
    finally:
        for host, script in case.mend.items():
            rig.root(host, script)


def test_the_watch_for_changes_sees_one(rig):
    """The check of the tests above can fail: a file that is written is found."""
    rig.root("node1", "touch /run/before && sleep 0.05 && touch /etc/tribrick/new")
    try:
        assert "/etc/tribrick/new" in rig.root("node1", f"find {WATCHED} -xdev -cnewer /run/before")
    finally:
        rig.root("node1", "rm /etc/tribrick/new")


def test_afterwards_the_rollout_finds_nothing_to_do(rig):
    assert set(rig.rollout("--check").good().changed().values()) == {0}
