"""Other ways to have the same files on several servers, from Debian's packages, on a lab's nodes for a while.

The packages are downloaded by apt and unpacked into a directory of their own; nothing is installed, so no service is
started, no user made and no file of the system touched. What runs are transient units whose names start with
``UNITS``, also an sshd of its own with a key that only lives there. All of it goes away with `Field.clear`.
"""

from __future__ import annotations

import contextlib
import shlex
import uuid
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import ClassVar, Final

from kit.bench import Say
from kit.benchlib import Quiet
from kit.faults import everywhere, inside
from kit.lab import NODES, Lab
from kit.run import KitError, wait_for

UNITS: Final = "tribrick-bench-peer-"
SSH_PORT: Final = 18_022
MOOSEFS_PORT: Final = 19_419  # and the three after it
CEPH_PORT: Final = 13_300
CEPH_PORTS: Final = (16_800, 16_899)
SYNCTHING_PORT: Final = 22_101
PERIOD: Final = 1.0  # seconds between two looks of what cannot be told of a change
FREE_MIB: Final = 2500  # unpacked packages, Ceph's stores, files
FIRST, *OTHERS = NODES  # files are stored on the first

# Files, for the programs


def sshd_config(place: str) -> str:
    """Return the configuration of an sshd that only the key in *place* opens."""
    return f"""Port {SSH_PORT}
HostKey {place}/host
AuthorizedKeysFile {place}/authorized_keys
AllowUsers root
PermitRootLogin prohibit-password
PasswordAuthentication no
KbdInteractiveAuthentication no
UsePAM no
MaxSessions 100
PidFile none
"""


def ssh_config(place: str) -> str:
    """Return the configuration of its client: one connection to each node, which stays."""
    return f"""Host *
User root
Port {SSH_PORT}
IdentityFile {place}/id
IdentitiesOnly yes
BatchMode yes
UserKnownHostsFile {place}/known_hosts
ControlMaster auto
ControlPath {place}/c-%h
ControlPersist 60
"""


def lsyncd_lua(source: str, targets: Sequence[str], rsh: str) -> str:
    """Return lsyncd's configuration: rsync as soon as a file was closed, and not 15 s later."""
    head = 'settings { nodaemon = true, insist = true, inotifyMode = "CloseWrite" }\n'
    syncs = [
        f'sync {{ default.rsync, source = "{source}/", target = "{target}/", delay = 0,\n'
        f'  rsync = {{ archive = true, rsh = "{rsh}" }} }}\n'
        for target in targets
    ]
    return head + "".join(syncs)


def syncthing_xml(folder: str, own: str, devices: Mapping[str, tuple[str, str]]) -> str:
    """Return Syncthing's configuration for the node *own*; *devices*: node -> its id and its address.

    It tells the others at once, not after ten seconds, and asks nobody outside where they are.
    """
    members = "".join(f'<device id="{identity}"/>' for identity, _ in devices.values())
    peers = "".join(
        f'<device id="{identity}" name="{node}" compression="never">'
        f"<address>tcp://{address}:{SYNCTHING_PORT}</address></device>\n"
        for node, (identity, address) in devices.items()
    )
    return f"""<configuration version="35">
<folder id="bench" path="{folder}" type="sendreceive" rescanIntervalS="3600"
  fsWatcherEnabled="true" fsWatcherDelayS="0.01">
{members}</folder>
{peers}<gui enabled="false"/>
<options>
<listenAddress>tcp://{devices[own][1]}:{SYNCTHING_PORT}</listenAddress>
<globalAnnounceEnabled>false</globalAnnounceEnabled>
<localAnnounceEnabled>false</localAnnounceEnabled>
<relaysEnabled>false</relaysEnabled>
<natEnabled>false</natEnabled>
<urAccepted>-1</urAccepted>
<crashReportingEnabled>false</crashReportingEnabled>
<startBrowser>false</startBrowser>
<autoUpgradeIntervalH>0</autoUpgradeIntervalH>
<reconnectionIntervalS>1</reconnectionIntervalS>
</options>
</configuration>
"""


def moosefs_files(place: str, master: str, network: str) -> dict[str, str]:
    """Return MooseFS's configuration files, all that lie on every node, by their names."""
    owner = "WORKING_USER = root\nWORKING_GROUP = root\n"
    return {
        "master.cfg": f"""{owner}DATA_PATH = {place}/master
EXPORTS_FILENAME = {place}/exports.cfg
TOPOLOGY_FILENAME = {place}/topology.cfg
MATOML_LISTEN_PORT = {MOOSEFS_PORT}
MATOCS_LISTEN_PORT = {MOOSEFS_PORT + 1}
MATOCL_LISTEN_PORT = {MOOSEFS_PORT + 2}
""",
        "exports.cfg": f"{network} / rw,alldirs,admin,maproot=0:0\n",
        "topology.cfg": "# one rack\n",
        "chunkserver.cfg": f"""{owner}DATA_PATH = {place}/chunkserver
HDD_CONF_FILENAME = {place}/disks.cfg
MASTER_HOST = {master}
MASTER_PORT = {MOOSEFS_PORT + 1}
CSSERV_LISTEN_PORT = {MOOSEFS_PORT + 3}
HDD_LEAVE_SPACE_DEFAULT = 0.1GiB
""",
        "disks.cfg": f"{place}/chunks\n",
    }


def ceph_conf(place: str, libraries: str, cluster: str, addresses: Mapping[str, str]) -> str:
    """Return Ceph's configuration: three copies, two of which must be there. Neither keys nor TLS."""
    monitors = ",".join(f"[v2:{addresses[node]}:{CEPH_PORT}]" for node in NODES)
    return f"""[global]
fsid = {cluster}
mon host = {monitors}
mon initial members = {", ".join(NODES)}
auth cluster required = none
auth service required = none
auth client required = none
osd pool default size = 3
osd pool default min size = 2
run dir = {place}
admin socket =
log file = {place}/$name.log
crash dir = {place}
mon data = {place}/mon
osd data = {place}/osd
mds data = {place}/mds
plugin dir = {libraries}/ceph
erasure code dir = {libraries}/ceph/erasure-code
osd class dir = {libraries}/rados-classes
osd memory target = 939524096
bluestore block size = 2147483648
ms bind msgr1 = false
ms bind port min = {CEPH_PORTS[0]}
ms bind port max = {CEPH_PORTS[1]}
"""


# The ground on which they stand


class Field:
    """A directory on each node, on the bricks' disk, with the unpacked programs in it."""

    def __init__(self, lab: Lab, log: Path, say: Say) -> None:
        shared = lab.site_variables()
        self.lab, self.log, self.tell = lab, log, say
        self.place = f"{shared['tribrick_brick_mount']}/bench-peers"
        self.user = str(shared["tribrick_user"])
        self.media = str(shared["tribrick_media_root"])
        self.root = f"{self.place}/root"
        self.libraries = f"{self.root}/usr/lib/native"  # a link
        self.rsh = f"ssh -F {self.place}/ssh/config"

    @property
    def environment(self) -> str:
        """Shell commands, after which the unpacked programs are found."""
        usr = f"{self.root}/usr"
        return (
            f"export PATH={usr}/bin:{usr}/sbin:/usr/local/sbin:/usr/sbin:/usr/bin:/sbin:/bin HOME={self.place} "
            f"LD_LIBRARY_PATH={self.libraries}:{self.libraries}/ceph PYTHONPATH={usr}/lib/python3/dist-packages "
            f"CEPH_CONF={self.place}/cephfs/ceph.conf UNISON={self.place}/unison/archive LC_ALL=C.UTF-8"
        )

    def do(self, node: str, script: str, deadline: float = 30.0, check: bool = True) -> str:
        """Run a script as root that may use the unpacked programs."""
        return inside(self.lab, node, f"set -eu; {self.environment}; {script}", deadline=deadline, check=check)

    def write(self, node: str, path: str, text: str) -> None:
        """Write a file."""
        self.do(node, f"mkdir -p {path.rpartition('/')[0]}; printf %s {shlex.quote(text)} >{path}")

    def start(self, node: str, name: str, command: str, user: str = "root") -> None:
        """Start a program as a transient unit; what it says goes to a log beside its files."""
        peer, _, rest = name.partition("-")
        log = f"{self.place}/{peer}/{rest or peer}.log"
        script = f"{self.environment}; exec {command}"
        unit = (
            f"systemd-run --quiet --collect --unit={UNITS}{name} --property=User={user} "
            f"--property=TimeoutStopSec=15 --property=StandardOutput=append:{log} --property=StandardError=append:{log}"
        )
        inside(self.lab, node, f"{unit} sh -c {shlex.quote(script)}")

    def unmount(self, node: str) -> None:
        """Unmount what is mounted below our place; what hangs is cut off."""
        listed = f"awk '$2 ~ \"^{self.place}/\" {{print $2}}' /proc/self/mounts"
        inside(self.lab, node, f"for m in $({listed}); do timeout 15 umount $m || umount -l $m; done", deadline=90)

    def stop(self, *names: str) -> None:
        """End units on all nodes, one name after the other; mounts go first, while their servers are there."""
        everywhere(self.unmount, list(NODES))
        for name in names:
            self._end(name)

    def _end(self, name: str) -> None:
        # One that ends by itself just now, its mount being gone, is an error of systemctl's; asked again, it is not.
        script = f"n=0; until systemctl stop '{UNITS}{name}*'; do n=$((n + 1)); test $n -lt 5 || exit 1; done"
        everywhere(lambda node: inside(self.lab, node, script, deadline=90), list(NODES))

    def clear(self) -> None:
        """Remove everything, also what a run that was killed has left."""
        self.stop("")
        # What an interrupted run had started here ends once its files are gone; until then it may still write.
        script = f"n=0; until rm -rf {self.place}; do n=$((n + 1)); test $n -lt 60 || exit 1; sleep 0.5; done"
        everywhere(lambda node: inside(self.lab, node, script, deadline=120), list(NODES))

    def known(self, package: str) -> bool:
        """Tell whether the nodes' release has a package."""
        said = inside(self.lab, FIRST, f"apt-cache show --no-all-versions {package} 2>/dev/null || :")
        return bool(said.strip())

    def make(self) -> None:
        """Make the directory, and learn what apt can give."""
        everywhere(self._make, list(NODES))

    def _make(self, node: str) -> None:
        """Do so on a node; refuse a disk that is too small."""
        inside(self.lab, node, f"install -d -m 0755 {self.place}")
        free = int(inside(self.lab, node, f"df --output=avail --block-size=1M {self.place} | tail -n 1"))
        if free < FREE_MIB:
            raise KitError(f"{node} has {free} MiB free below {self.place}; this bench needs {FREE_MIB}.")
        inside(self.lab, node, "apt-get -q update", deadline=180)

    def unpack(self, packages: Sequence[str]) -> None:
        """Download packages and what they need, and unpack them."""
        if not packages:
            return
        debs = f"{self.place}/debs"
        script = f"""set -eu
mkdir -p {debs}/partial {self.root}
apt-get -q -y -o Dir::Cache::archives={debs} -o APT::Sandbox::User=root --no-install-recommends --download-only \
  install {" ".join(packages)} >/dev/null
for deb in {debs}/*.deb; do test ! -e $deb || dpkg-deb --extract $deb {self.root}; done
rm -rf {debs}
for directory in {self.root}/usr/lib/*-linux-gnu*; do test ! -d $directory || ln -sfn $directory {self.libraries}; done
"""
        everywhere(lambda node: inside(self.lab, node, script, deadline=400), list(NODES))

    def directories(self, path: str) -> None:
        """Make a directory of the site's user on all nodes."""
        everywhere(lambda node: self.do(node, f"install -d -o {self.user} -g {self.user} {path}"), list(NODES))

    def wait(self, what: str, node: str, script: str, deadline: float = 60.0) -> None:
        """Wait until a script gives exit code 0 on a node."""

        def probe() -> str | None:
            said = self.do(node, f"if {script}; then echo; echo is-so; fi 2>&1", check=False)
            *seen, last = said.strip().splitlines() or [""]
            return None if last == "is-so" else " ".join([*seen, last]).strip()[-200:] or "not yet"

        wait_for(Quiet(), f"{what} on {node}", probe, deadline=deadline)

    def wait_mounted(self, path: str) -> None:
        """Wait until something is mounted on all nodes."""
        for node in NODES:
            self.wait(path, node, f"grep -q ' {path} ' /proc/self/mounts")

    def keep_logs(self, peer: str) -> None:
        """Copy the ends of a peer's logs to the bench's own log."""
        script = (
            f'cd {self.place}/{peer} && for f in *.log; do test ! -f $f || {{ echo "== $f"; tail -n 20 $f; }}; done'
        )
        with self.log.open("a", encoding="utf-8") as log:
            for node in NODES:
                log.write(f"==== {node}\n{inside(self.lab, node, script, check=False)}\n")

    def ssh(self) -> None:
        """Let root on the first node into the others, by an sshd and a key of our own."""
        place, first = f"{self.place}/ssh", self.lab.addresses[FIRST]
        self.do(FIRST, f"install -d -m 0700 {place}; ssh-keygen -q -t ed25519 -N '' -C bench -f {place}/id")
        public = self.do(FIRST, f"cat {place}/id.pub").strip()
        known = list[str]()
        for node in OTHERS:
            self.do(node, f"install -d -m 0700 {place}; ssh-keygen -q -t ed25519 -N '' -f {place}/host")
            self.write(node, f"{place}/authorized_keys", f'from="{first}",restrict {public}\n')
            self.write(node, f"{place}/sshd_config", sshd_config(place))
            self.start(node, "ssh", f"/usr/sbin/sshd -D -e -f {place}/sshd_config")
            key = " ".join(self.do(node, f"cat {place}/host.pub").split()[:2])
            known.append(f"[{self.lab.addresses[node]}]:{SSH_PORT} {key}\n")
        self.write(FIRST, f"{place}/known_hosts", "".join(known))
        self.write(FIRST, f"{place}/config", ssh_config(place))
        for node in OTHERS:
            self.wait(f"SSH to {node}", FIRST, f"{self.rsh} {self.lab.addresses[node]} true")


@contextlib.contextmanager
def field(lab: Lab, log: Path, say: Say) -> Iterator[Field]:
    """Have it for a while."""
    made = Field(lab, log, say)
    made.clear()
    try:
        made.make()
        yield made
    finally:
        say("removing the peers")
        made.clear()


# The peers


class Peer:
    """One way to have the files on all nodes; started before its turn, stopped after it."""

    name: ClassVar[str]
    label: ClassVar[str]
    packages: ClassVar[tuple[str, ...]] = ()
    needs_ssh: ClassVar[bool] = False
    period: ClassVar[float] = 0.0  # seconds between two looks, of what looks

    def __init__(self, ground: Field) -> None:
        self.field = ground
        self.place = f"{ground.place}/{self.name}"

    @classmethod
    def missing(cls, ground: Field) -> str:
        """Return which packages the nodes' release lacks; empty if none."""
        return ", ".join(package for package in cls.packages if not ground.known(package))

    @property
    def root(self) -> str:
        """Where files are stored on the first node and appear on the others."""
        return f"{self.place}/data"

    def prepare(self) -> None:
        """Make what is made once."""
        self.field.directories(self.root)

    def start(self) -> None:
        """Start it, and wait until it can be used."""

    def stop(self) -> None:
        """End it."""
        self.field.stop(self.name)

    def targets(self) -> list[str]:
        """Return the others' addresses."""
        return [self.field.lab.addresses[node] for node in OTHERS]


class Rsync(Peer):
    """A pass of rsync over SSH to both others, a second, the next pass: cron without its minute."""

    name, label = "rsync", f"rsync over SSH, {PERIOD:g} s between passes"
    packages = ("rsync",)
    needs_ssh = True
    period = PERIOD

    def start(self) -> None:
        """Start the passes."""
        copy = f"rsync --archive --delete --rsh='{self.field.rsh}' {self.root}/"
        one = " & ".join(f"{copy} {target}:{self.root}/" for target in self.targets())
        self.field.start(FIRST, self.name, f"sh -c {shlex.quote(f'while :; do {one} & wait; sleep {PERIOD:g}; done')}")


class Lsyncd(Peer):
    """Rsync over SSH of what the kernel says has changed."""

    name, label = "lsyncd", "lsyncd: rsync over SSH on each change"
    packages = ("lsyncd", "rsync")
    needs_ssh = True

    def prepare(self) -> None:
        """Write its configuration."""
        super().prepare()
        targets = [f"{target}:{self.root}" for target in self.targets()]
        self.field.write(FIRST, f"{self.place}/lsyncd.lua", lsyncd_lua(self.root, targets, self.field.rsh))

    def start(self) -> None:
        """Start it."""
        self.field.start(FIRST, self.name, f"lsyncd {self.place}/lsyncd.lua")


class Unison(Peer):
    """Both ways between the first node and each other one. Debian's has no program that watches for changes."""

    name, label = "unison", f"unison over SSH, {PERIOD:g} s between passes"
    packages = ("unison",)
    needs_ssh = True
    period = PERIOD

    def start(self) -> None:
        """Start one for each of the others."""
        self.field.do(FIRST, f"rm -f {self.place}/archive/lk*")
        server = f"env HOME={self.field.place} UNISON={self.place}/archive {self.field.root}/usr/bin/unison"
        for node, target in zip(OTHERS, self.targets(), strict=True):
            words = (
                f"-ui text -batch -auto -repeat {PERIOD:g} -confirmbigdel=false -times -owner -group -numericids "
                f"-sshargs '-F {self.field.place}/ssh/config' -servercmd '{server}'"
            )
            self.field.do(node, f"rm -f {self.place}/archive/lk*")  # locks of the turn before, which was ended
            self.field.start(FIRST, f"{self.name}-{node}", f"unison {self.root} ssh://{target}/{self.root} {words}")


class Syncthing(Peer):
    """Every node with every other one, blocks by TLS."""

    name, label = "syncthing", "Syncthing, both ways"
    packages = ("syncthing",)

    def prepare(self) -> None:
        """Make keys, and tell the nodes of each other."""
        super().prepare()
        home, user = f"{self.place}/home", self.field.user
        self.field.directories(home)
        self.field.directories(f"{self.root}/.stfolder")  # its sentinel

        def identity(node: str) -> str:
            run = f"runuser -u {user} -- env PATH=$PATH HOME={home} syncthing"
            self.field.do(node, f"cd /; {run} generate --home={home} >/dev/null", deadline=60)
            return self.field.do(node, f"cd /; {run} --home={home} --device-id").strip()

        devices = {n: (found, self.field.lab.addresses[n]) for n, found in everywhere(identity, list(NODES)).items()}
        for node in NODES:
            self.field.write(node, f"{home}/config.xml", syncthing_xml(self.root, node, devices))

    def start(self) -> None:
        """Start it as the site's user, to whom the files belong."""
        home = f"{self.place}/home"
        for node in NODES:
            command = f"env HOME={home} STNOUPGRADE=1 syncthing serve --no-browser --no-restart --home={home}"
            self.field.start(node, self.name, command, self.field.user)


class MooseFS(Peer):
    """A file system: one master, three chunk servers, three copies, a FUSE mount on each node."""

    name, label = "moosefs", "MooseFS, three copies, one master"
    packages = ("moosefs-master", "moosefs-chunkserver", "moosefs-client")

    def prepare(self) -> None:
        """Write its configuration."""
        files = moosefs_files(self.place, self.field.lab.addresses[FIRST], self.field.lab.recall()["subnet"])
        for node in NODES:
            self.field.do(node, f"mkdir -p {self.place}; cd {self.place}; mkdir master chunkserver chunks data")
            for name, text in files.items():
                self.field.write(node, f"{self.place}/{name}", text)
        self.field.write(FIRST, f"{self.place}/master/metadata.mfs", "MFSM NEW")

    def start(self) -> None:
        """Start it, and see that there are three copies."""
        self.field.start(FIRST, f"{self.name}-master", f"mfsmaster -f -a -c {self.place}/master.cfg start")
        where = f"-H {self.field.lab.addresses[FIRST]} -P {MOOSEFS_PORT + 2}"
        open_ = f"timeout 1 bash -c '</dev/tcp/{self.field.lab.addresses[FIRST]}/{MOOSEFS_PORT + 2}'"
        self.field.wait("MooseFS's master", FIRST, open_)
        for node in NODES:
            server = f"mfschunkserver -f -c {self.place}/chunkserver.cfg start"
            self.field.start(node, f"{self.name}-chunkserver", server)
            self.field.start(node, f"{self.name}-mount", f"mfsmount -f {self.root} {where} -o allow_other")
        self.field.wait_mounted(self.root)
        # Debian 13's MooseFS calls three copies so; Debian 12's, an older one, by their number.
        copies = f"mfssetsclass 3CP {self.root} >/dev/null 2>&1 || mfssetsclass 3 {self.root} >/dev/null"
        self.field.do(FIRST, f"{copies}; chown {self.field.user}: {self.root}")
        probe = f"{self.root}/probe"
        found = f"timeout 20 mfsfileinfo {probe} | grep -c 'copy .*VALID'"
        self.field.wait(
            "three copies", FIRST,
            f"rm -f {probe}; echo x | timeout 20 dd of={probe} status=none && test $({found}) = 3",
        )  # fmt: skip


class CephFS(Peer):
    """A file system: three monitors, three OSDs on a file each, one metadata server, a FUSE mount on each node.

    Without its manager, which only counts and shows, and without keys.
    """

    name, label = "cephfs", "CephFS, three copies"
    packages = ("ceph-mon", "ceph-osd", "ceph-mds", "ceph-fuse")

    def __init__(self, ground: Field) -> None:
        super().__init__(ground)
        self.fresh = True

    def start_monitors(self) -> None:
        """Start them, and wait until they agree."""
        for node in NODES:
            self.field.start(node, f"{self.name}-mon", f"ceph-mon -f -i {node}")
        self.field.wait("Ceph's monitors", FIRST, "timeout 20 ceph quorum_status >/dev/null", deadline=90)

    def prepare(self) -> None:
        """Make the cluster."""
        cluster, addresses = str(uuid.uuid4()), self.field.lab.addresses
        text = ceph_conf(self.place, self.field.libraries, cluster, addresses)
        added = " ".join(f"--addv {node} '[v2:{addresses[node]}:{CEPH_PORT}]'" for node in NODES)
        disks = {node: (number, uuid.uuid4()) for number, node in enumerate(NODES)}

        def monitor(node: str) -> None:
            self.field.do(node, f"mkdir -p {self.place}; cd {self.place}; mkdir mon osd mds data")
            self.field.write(node, f"{self.place}/ceph.conf", text)
            script = f"cd {self.place}; monmaptool --create --fsid {cluster} {added} monmap >/dev/null"
            self.field.do(node, f"{script}; ceph-mon --mkfs -i {node} --monmap monmap", deadline=60)

        def disk(node: str) -> None:
            number, identity = disks[node]
            script = f"ceph-osd -i {number} --mkfs --osd-uuid {identity} >{self.place}/mkfs.log 2>&1"
            self.field.do(node, script, deadline=120)

        everywhere(monitor, list(NODES))
        self.start_monitors()
        for number, identity in disks.values():
            self.field.do(FIRST, f"timeout 30 ceph osd new {identity} {number} >/dev/null", deadline=60)
        everywhere(disk, list(NODES))
        self.stop()

    def stop(self) -> None:
        """End it, the monitors last: else those of the next turn believe for a minute that the others still run."""
        self.field.stop(*(f"{self.name}-{daemon}" for daemon in ("mount", "mds", "osd", "mon")))

    def start(self) -> None:
        """Start it; at the first time make the file system."""
        self.start_monitors()
        for number, node in enumerate(NODES):
            self.field.start(node, f"{self.name}-osd", f"ceph-osd -f -i {number}")
        up = f"timeout 20 ceph osd stat | grep '{len(NODES)} up'"
        self.field.wait("Ceph's disks", FIRST, up, deadline=120)
        if self.fresh:
            pools = "; ".join(f"timeout 60 ceph osd pool create {pool} 16" for pool in ("metadata", "data"))
            self.field.do(FIRST, f"({pools}; timeout 60 ceph fs new bench metadata data) 2>&1", deadline=200)
        self.field.start(FIRST, f"{self.name}-mds", f"ceph-mds -f -i {FIRST}")
        self.field.wait("Ceph's metadata server", FIRST, "timeout 20 ceph mds stat | grep 'up:active'", deadline=120)
        for node in NODES:
            self.field.start(node, f"{self.name}-mount", f"ceph-fuse -f -n client.admin {self.root} -o allow_other")
        self.field.wait_mounted(self.root)
        if self.fresh:
            self.field.do(FIRST, f"chown {self.field.user}: {self.root}")
        self.fresh = False


PEERS: Final[dict[str, type[Peer]]] = {kind.name: kind for kind in (Rsync, Lsyncd, Unison, Syncthing, MooseFS, CephFS)}
