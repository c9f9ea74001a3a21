"""Faults of a lab, made from outside: Docker, the disks' file systems, packet filters in a container's network.

Each fault is a class with four steps that keep nothing in memory, so that one command can inject and another lift:
`inject` makes it, `proof` says how it is seen to hold (or fails), `lift` ends it, `ended` returns None once it is over,
else what is still wrong. Lifting what is not there does nothing.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import shlex
import signal
import socket
import subprocess
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import ClassVar, TypeVar

from kit.disks import Disk
from kit.lab import DATABASE, NODES, Lab, containers
from kit.run import Console, KitError, capture, wait_for

TABLE = "lab_fault"  # the nftables table of these faults, beside the kit's own
NETWORK = Path("/sys/class/net")
SSH_PORT = 22
STEP_WAIT = 60.0
BUSY = "Another transaction is in progress"  # of glusterd, for as long as some other command runs
FILLS = 20  # times that a full disk is filled up again while a load frees places on it
T = TypeVar("T")


def everywhere(work: Callable[[str], T], hosts: Sequence[str]) -> dict[str, T]:
    """Do something for several hosts side by side."""
    with ThreadPoolExecutor(max(1, len(hosts))) as pool:
        return dict(zip(hosts, pool.map(work, hosts), strict=True))


def inside(lab: Lab, host: str, script: str, deadline: float = 30.0, check: bool = True) -> str:
    """Run a shell script as root in a host's container, which needs no network there; return its output."""
    done = subprocess.run(
        ["docker", "exec", lab.container(host), "timeout", "-k", "2", str(deadline), "sh", "-c", script],
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=deadline + 30,
        check=False,
    )
    if check and done.returncode != 0:
        raise KitError(f"{host}: '{script[:80]}' gave {done.returncode}: {(done.stderr or done.stdout).strip()}")
    return done.stdout


def reach(address: str, port: int = SSH_PORT, patience: float = 2.0) -> str:
    """Try to connect; return open, refused, or silent."""
    try:
        socket.create_connection((address, port), timeout=patience).close()
    except ConnectionRefusedError:
        return "refused"
    except OSError:  # a time-out, or no route: nobody answered
        return "silent"
    return "open"


def state(lab: Lab, host: str) -> str:
    """Return the state of a host's container."""
    return containers(lab).get(host, "absent")


def disk(lab: Lab, node: str) -> Disk:
    """Return a node's disk, if the lab has disks."""
    found = lab.disks[node]
    if not found.image.exists():
        raise KitError(f"The lab '{lab.name}' has no disks that can be cut; make it with: ./scripts/lab up --disks xfs")
    return found


def start(lab: Lab, hosts: Sequence[str]) -> None:
    """Start hosts in this order."""
    for host in hosts:
        capture(["docker", "start", lab.container(host)], deadline=STEP_WAIT)


# --- packet filters


def filter_on(lab: Lab, host: str, rules_in: Sequence[str], rules_out: Sequence[str]) -> None:
    """Put rules into a host's network, in a table of their own; an earlier table of ours is replaced."""
    script = f"""table inet {TABLE} {{}}
delete table inet {TABLE}
table inet {TABLE} {{
  chain incoming {{ type filter hook input priority -300; policy accept; iif lo accept; {"; ".join(rules_in)}; }}
  chain outgoing {{ type filter hook output priority -300; policy accept; oif lo accept; {"; ".join(rules_out)}; }}
}}
"""
    inside(lab, host, f"printf %s {shlex.quote(script)} | nft -f -")


def filter_off(lab: Lab, host: str) -> None:
    """Remove our table. A host that does not run has none: its network went with it."""
    if state(lab, host) == "running":
        inside(lab, host, f"nft list tables | grep -qx 'table inet {TABLE}' || exit 0; nft delete table inet {TABLE}")


def filtered(lab: Lab, host: str) -> bool:
    """Tell whether our table is there."""
    return state(lab, host) == "running" and TABLE in inside(lab, host, "nft list tables")


def drop_from(addresses: Sequence[str]) -> str:
    """Return a rule for what comes from these addresses."""
    return f"ip saddr {{ {', '.join(addresses)} }} counter drop"


def drop_to(addresses: Sequence[str]) -> str:
    """Return a rule for what goes to these addresses."""
    return f"ip daddr {{ {', '.join(addresses)} }} counter drop"


def can_connect(lab: Lab, host: str, other: str, port: int = SSH_PORT) -> bool:
    """Tell whether a host's new connection to another one's port opens within two seconds."""
    script = f"timeout 2 bash -c '</dev/tcp/{lab.addresses[other]}/{port}' 2>/dev/null && echo open || :"
    return "open" in inside(lab, host, script)


# --- power


def power_cut(lab: Lab, nodes: Sequence[str]) -> list[str]:
    """Cut the power of nodes at once; return per node how the loss of unsynced data was seen.

    First silence, so that no peer sees a closed connection; then each brick's file system stops without writing its
    log; then the processes die; then the disks are mounted again on this machine, which replays their logs.
    Only bricks lose data: the rest of a node is on Docker's overlay file system, which outlives a killed container
    together with its page cache. So glusterd's state, the catalog's ledger and the site survive unsynced here.
    """
    disks = {node: disk(lab, node) for node in nodes}
    everywhere(lambda node: filter_on(lab, node, ["counter drop"], ["counter drop"]), nodes)
    probe, kept = f"unsynced-{secrets.token_hex(8)}", secrets.token_bytes(4096)

    def lose(node: str) -> None:
        # Nothing is synced here: an fsync of ours would carry the whole log, and with it what others failed to sync.
        (disks[node].point / probe).write_bytes(kept)
        disks[node].cut()

    everywhere(lose, nodes)
    everywhere(lambda node: capture(["docker", "kill", lab.container(node)], deadline=STEP_WAIT), nodes)
    seen = []
    for node, one in disks.items():
        one.unmount()
        one.mount()
        unsynced = one.point / probe
        if unsynced.exists() and unsynced.read_bytes() == kept:
            raise KitError(f"{node}: bytes that nobody synced outlived the power cut, so it was none.")
        if not one.intact():
            raise KitError(
                f"{node}: bytes that were synced long ago are gone: the disk lost more than a power cut takes."
            )
        unsynced.unlink(missing_ok=True)
        seen.append(f"{node}: {len(kept)} unsynced bytes gone, synced ones kept")
    return seen


def power_on(lab: Lab, nodes: Sequence[str]) -> None:
    """Start nodes after a power cut, in this order; disks that are not mounted are mounted first."""
    for node in nodes:
        one = disk(lab, node)
        if one.dead:
            one.unmount()
        one.mount()
    start(lab, nodes)


# --- the faults


@dataclass
class Fault:
    """One fault of some hosts."""

    lab: Lab
    hosts: Sequence[str]

    name: ClassVar[str] = ""
    summary: ClassVar[str] = ""  # one line of --help
    database: ClassVar[bool] = False  # of the database's host, not of nodes
    least: ClassVar[int] = 1  # how many nodes it takes

    def inject(self) -> None:
        """Make the fault."""
        raise NotImplementedError

    def proof(self) -> str:
        """Say how the fault is seen from outside; fail if it is not."""
        raise NotImplementedError

    def lift(self) -> None:
        """End the fault."""
        raise NotImplementedError

    def ended(self) -> str | None:
        """Return None once the fault is over, else what is left of it. Not whether all is healed."""
        raise NotImplementedError

    @property
    def lab_addresses(self) -> dict[str, str]:
        """The nodes' addresses."""
        return {node: self.lab.addresses[node] for node in NODES}

    def others(self, host: str) -> list[str]:
        """Return the nodes besides one."""
        return [node for node in NODES if node != host]

    @contextlib.contextmanager
    def holding(self, console: Console | None = None) -> Iterator[str]:
        """Inject, prove, and lift again at the end whatever happens meanwhile."""
        try:
            self.inject()
            yield self.proof()
        finally:
            self.lift()
            wait_for(console or Console(), f"the end of {self.name}", self.ended, deadline=STEP_WAIT)


def running(lab: Lab, hosts: Sequence[str]) -> str | None:
    """Return None when these hosts answer by SSH, else which does not."""
    for host in hosts:
        if state(lab, host) != "running":
            return f"{host} is {state(lab, host)}"
        if (seen := reach(lab.addresses[host])) != "open":
            return f"{host} is {seen} on port {SSH_PORT}"
    return None


class Kill(Fault):
    """The node's processes die at once; peers see closed connections; page cache and disks stay."""

    name = "kill"
    summary = "every process of the node dies (docker kill)"

    def inject(self) -> None:
        """Kill the containers."""
        everywhere(lambda host: capture(["docker", "kill", self.lab.container(host)], deadline=STEP_WAIT), self.hosts)

    def proof(self) -> str:
        """The containers have ended and refuse or ignore connections."""
        for host in self.hosts:
            if (seen := state(self.lab, host)) != "exited" or reach(self.lab.addresses[host]) == "open":
                raise KitError(f"{host} was to be dead and is {seen}.")
        return f"{', '.join(self.hosts)} exited"

    def lift(self) -> None:
        """Start the containers."""
        start(self.lab, [host for host in self.hosts if state(self.lab, host) != "running"])

    def ended(self) -> str | None:
        """SSH answers."""
        return running(self.lab, self.hosts)


class PowerCut(Fault):
    """As `power_cut`."""

    name = "power-cut"
    summary = "silence, then the brick loses all that was not synced, then the node dies (needs --disks xfs)"
    seen: tuple[str, ...] = ()

    def inject(self) -> None:
        """Cut the power."""
        self.seen = tuple(power_cut(self.lab, self.hosts))

    def proof(self) -> str:
        """What power_cut saw, which fails by itself when probe bytes survived."""
        for host in self.hosts:
            if state(self.lab, host) != "exited":
                raise KitError(f"{host} was to be without power and is {state(self.lab, host)}.")
        return "; ".join(self.seen)

    def lift(self) -> None:
        """Power on, in the order of the hosts."""
        power_on(self.lab, [host for host in self.hosts if state(self.lab, host) != "running"])

    def ended(self) -> str | None:
        """SSH answers."""
        return running(self.lab, self.hosts)


def host_pids(lab: Lab, host: str) -> dict[int, str]:
    """Return a running container's processes as this machine numbers them, with their states."""
    if state(lab, host) != "running":
        return {}
    rows = capture(["docker", "top", lab.container(host), "-eo", "pid,stat"], deadline=STEP_WAIT).stdout.splitlines()[
        1:
    ]
    return {int(pid): letters[:1] for pid, letters in (row.split() for row in rows)}


def send_all(lab: Lab, host: str, number: signal.Signals) -> None:
    """Signal every process of a host, init included: a signal from outside its namespace reaches that as well."""
    for pid in host_pids(lab, host):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, number)


class Pause(Fault):
    """The node hangs: its kernel acknowledges packets, no process answers.

    By signals, not by `docker pause`: its freezer gives up on a process that waits for a mount whose own process is
    frozen already.
    """

    name = "pause"
    summary = "every process of the node hangs, its kernel still answers (SIGSTOP)"

    def inject(self) -> None:
        """Stop every process, until none is left that could make another one."""

        def stop(host: str) -> None:
            def awake() -> str | None:
                send_all(self.lab, host, signal.SIGSTOP)
                left = [pid for pid, letter in host_pids(self.lab, host).items() if letter in "RSI"]
                return f"{len(left)} processes run" if left else None

            wait_for(Console(), f"all processes of {host} to stop", awake, deadline=STEP_WAIT, interval=0.05)

        everywhere(stop, self.hosts)

    def proof(self) -> str:
        """A connection opens, but no banner comes."""
        for host in self.hosts:
            with socket.create_connection((self.lab.addresses[host], SSH_PORT), timeout=2) as line:
                line.settimeout(1)
                with contextlib.suppress(TimeoutError):
                    raise KitError(f"{host} was to hang and said {line.recv(20)!r}.")
        return f"{', '.join(self.hosts)} accept connections and say nothing"

    def lift(self) -> None:
        """Let all go on."""
        for host in self.hosts:
            send_all(self.lab, host, signal.SIGCONT)

    def ended(self) -> str | None:
        """No process is stopped, and SSH answers."""
        for host in self.hosts:
            if "T" in host_pids(self.lab, host).values():
                send_all(self.lab, host, signal.SIGCONT)
                return f"{host} has stopped processes"
        return running(self.lab, self.hosts)


class Filtered(Fault):
    """What the faults made of packet filters have in common."""

    @property
    def touched(self) -> list[str]:
        """The hosts that get rules."""
        return list(self.hosts)

    def lift(self) -> None:
        """Remove the rules."""
        everywhere(lambda host: filter_off(self.lab, host), self.touched)

    def ended(self) -> str | None:
        """No rule is left, and SSH answers."""
        for host in self.touched:
            if filtered(self.lab, host):
                return f"{host} still drops packets"
        return running(self.lab, self.touched)

    def cut_between(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Cut pairs of nodes, both ways, at both ends."""
        peers: dict[str, list[str]] = {}
        for one, other in pairs:
            peers.setdefault(one, []).append(self.lab.addresses[other])
            peers.setdefault(other, []).append(self.lab.addresses[one])
        everywhere(
            lambda host: filter_on(self.lab, host, [drop_from(peers[host])], [drop_to(peers[host])]), sorted(peers)
        )

    def prove_pairs(self, cut: Sequence[tuple[str, str]], whole: Sequence[tuple[str, str]]) -> str:
        """Fail unless new connections of the cut pairs do not open and those of the whole ones do."""
        for one, other in cut:
            if can_connect(self.lab, one, other):
                raise KitError(f"{one} was to be cut from {other}, but connects to it.")
        for one, other in whole:
            if not can_connect(self.lab, one, other):
                raise KitError(f"{one} was to reach {other}, but does not.")
        return f"no connection opens between {', '.join(f'{one} and {other}' for one, other in cut)}"


class Silence(Filtered):
    """The node falls silent: nothing in, nothing out, no goodbye."""

    name = "silence"
    summary = "no IP packet enters or leaves the node; it still answers ARP"

    def inject(self) -> None:
        """Drop everything but loopback."""
        everywhere(lambda host: filter_on(self.lab, host, ["counter drop"], ["counter drop"]), self.hosts)

    def proof(self) -> str:
        """Nobody answers, not even a refusal, while the container runs."""
        for host in self.hosts:
            seen = reach(self.lab.addresses[host])
            if seen != "silent" or state(self.lab, host) != "running":
                raise KitError(f"{host} was to be silent and is {seen}, {state(self.lab, host)}.")
        return f"{', '.join(self.hosts)}: no answer on port {SSH_PORT}, container running"


class Unplug(Silence):
    """The node's port of the network is dead: as silence, and no ARP gets through, by which a node says what it owns.

    Made on this machine's side, so it cuts what a program in the node sends past its packet filter, as keepalived does.
    """

    name = "unplug"
    summary = "the node's port of the network is dead: no packet and no ARP (cut cable)"
    FORWARDING: ClassVar[int] = 3
    DISABLED: ClassVar[int] = 0

    def port(self, host: str) -> Path:
        """Return the node's port of the bridge."""
        index = inside(self.lab, host, "cat /sys/class/net/eth0/iflink").strip()
        for file in sorted(NETWORK.glob("*/ifindex")):
            if file.read_text(encoding="ascii").strip() == index:
                return file.parent
        raise KitError(f"{host}: its end of the network on this machine is not found.")

    def passes(self, host: str) -> bool:
        """Tell whether the port forwards."""
        return int((self.port(host) / "brport" / "state").read_text(encoding="ascii")) == self.FORWARDING

    def switch(self, host: str, number: int) -> None:
        """Set the state of the node's port."""
        # `ip link` says that it has done so and has not.
        words = ["dev", self.port(host).name, "state", str(number)]
        capture(["bridge", "link", "set", *words], deadline=STEP_WAIT)

    def inject(self) -> None:
        """Disable the ports."""
        everywhere(lambda host: self.switch(host, self.DISABLED), self.hosts)

    def proof(self) -> str:
        """As silence, and the ports do not forward."""
        for host in self.hosts:
            if self.passes(host):
                raise KitError(f"{host} was to be unplugged and is not.")
        return super().proof()

    def lift(self) -> None:
        """Have the ports forward. A node that was started again has a new one."""
        up = [host for host in self.hosts if state(self.lab, host) == "running"]
        everywhere(lambda host: self.switch(host, self.FORWARDING), up)

    def ended(self) -> str | None:
        """The ports forward, and SSH answers."""
        for host in self.hosts:
            if state(self.lab, host) == "running" and not self.passes(host):
                return f"{host} is still unplugged"
        return running(self.lab, self.hosts)


class OneWay(Filtered):
    """The node hears its peers, who do not hear it. Browsers and the database reach it as ever."""

    name = "one-way"
    summary = "the node hears the other nodes, they do not hear it"

    def inject(self) -> None:
        """Drop what goes to the other nodes."""
        for host in self.hosts:
            filter_on(self.lab, host, [], [drop_to([self.lab.addresses[other] for other in self.others(host)])])

    def proof(self) -> str:
        """No connection opens either way, and packets were dropped on the way out only."""
        for host in self.hosts:
            if any(can_connect(self.lab, host, other) for other in self.others(host)):
                raise KitError(f"{host} was to be unheard, but connects to another node.")
            if "counter packets 0 " in inside(self.lab, host, f"nft list table inet {TABLE}"):
                raise KitError(f"{host}: no packet was dropped.")
        return f"{', '.join(self.hosts)} cannot connect to the other nodes; packets out are dropped"


class Partition(Filtered):
    """One node against two. Browsers and the database reach all of them."""

    name = "partition"
    summary = "the node and the two others do not hear each other"

    @property
    def touched(self) -> list[str]:
        """Rules stand at both ends."""
        return list(NODES)

    def pairs(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Return the cut pairs and the whole ones."""
        every = [(one, other) for one in NODES for other in NODES if one < other]
        cut = [pair for pair in every if len(set(pair) & set(self.hosts)) == 1]
        return cut, [pair for pair in every if pair not in cut]

    def inject(self) -> None:
        """Cut the pairs."""
        self.cut_between(self.pairs()[0])

    def proof(self) -> str:
        """New connections open only within the parts."""
        return self.prove_pairs(*self.pairs())


class Alone(Partition):
    """Every node is alone."""

    name = "alone"
    summary = "no node hears another one (names of nodes do not matter)"

    def pairs(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """All pairs are cut."""
        return [(one, other) for one in NODES for other in NODES if one < other], []


class Bridge(Partition):
    """The node hears both others, which do not hear each other."""

    name = "bridge"
    summary = "the other two nodes do not hear each other; the node hears both"

    def pairs(self) -> tuple[list[tuple[str, str]], list[tuple[str, str]]]:
        """Only the two others are cut."""
        one, other = (node for node in NODES if node not in self.hosts[:1])
        return [(one, other)], [(one, self.hosts[0]), (self.hosts[0], other)]


@dataclass
class Flapping(Partition):
    """A partition that comes and goes, by its nature only while the program that injects it runs."""

    seconds: float = 5.0
    stop: threading.Event = field(default_factory=threading.Event)
    thread: threading.Thread | None = None
    turns: int = 0

    name: ClassVar[str] = "flapping"
    summary: ClassVar[str] = "a partition of the node that comes and goes every 5 s; only with --for"

    def inject(self) -> None:
        """Cut now; go on in a thread."""
        super().inject()
        self.stop.clear()
        self.thread = threading.Thread(target=self.flap, daemon=True)

    def flap(self) -> None:
        """Heal and cut in turn."""
        while not self.stop.wait(self.seconds):
            self.turns += 1
            if self.turns % 2:
                everywhere(lambda host: filter_off(self.lab, host), self.touched)
            else:
                super().inject()

    def proof(self) -> str:
        """The first cut is seen; then the flapping starts."""
        seen = super().proof()
        if self.thread is not None and not self.thread.ident:
            self.thread.start()
        return f"{seen}, for {self.seconds:.0f} s at a time"

    def lift(self) -> None:
        """End the thread, remove the rules."""
        self.stop.set()
        if self.thread is not None and self.thread.ident:
            self.thread.join()
        super().lift()


# --- processes


def processes(lab: Lab, host: str, pattern: str) -> list[int]:
    """Return the numbers of a host's processes whose command line matches."""
    if state(lab, host) != "running":
        return []
    # The brackets keep pgrep's own shell out of the answer.
    return [int(pid) for pid in inside(lab, host, f"pgrep -f {shlex.quote(pattern)} || :").split()]


def process_states(lab: Lab, host: str, pids: Sequence[int]) -> str:
    """Return one letter for each process: R, S, D, T (stopped)..."""
    if not pids:
        return ""
    return "".join(inside(lab, host, f"ps -o state= -p {','.join(map(str, pids))} || :").split())


class OfProcesses(Fault):
    """What the faults of single processes have in common."""

    def pattern(self) -> str:
        """Return the regular expression of the command lines."""
        raise NotImplementedError

    def pids(self, host: str) -> list[int]:
        """Return the processes, which must be there."""
        found = processes(self.lab, host, self.pattern())
        if not found:
            raise KitError(f"{host} runs no process like '{self.pattern()}'.")
        return found

    def send(self, name: str) -> None:
        """Send a signal to the processes of all hosts."""

        def kill(host: str) -> None:
            inside(self.lab, host, f"kill -{name} {' '.join(map(str, self.pids(host)))}")

        everywhere(kill, self.hosts)

    def stopped(self, host: str) -> bool:
        """Tell whether the host's processes are all stopped."""
        return set(process_states(self.lab, host, processes(self.lab, host, self.pattern()))) == {"T"}

    def cont(self) -> None:
        """Let the processes of all hosts go on."""
        for host in self.hosts:
            if found := processes(self.lab, host, self.pattern()):
                inside(self.lab, host, f"kill -CONT {' '.join(map(str, found))}")


def brick_pattern(lab: Lab) -> str:
    """Return the pattern of a brick's process."""
    return f"glusterfs[d] .*--brick-name {lab.site_variables()['tribrick_brick_path']} "


class BrickKill(OfProcesses):
    """The brick's process dies; glusterd and the mount go on."""

    name = "brick-kill"
    summary = "the node's brick process dies"
    before: ClassVar[dict[str, list[int]]] = {}

    def pattern(self) -> str:
        """The brick's."""
        return brick_pattern(self.lab)

    def inject(self) -> None:
        """Kill it."""
        self.send("KILL")

    def proof(self) -> str:
        """It is gone."""
        for host in self.hosts:
            if processes(self.lab, host, self.pattern()):
                raise KitError(f"{host}: the brick's process was to be dead.")
        return f"{', '.join(self.hosts)}: no brick process"

    def lift(self) -> None:
        """Let glusterd start it."""
        for host in self.hosts:
            wait_for(Console(), f"the start of the brick of {host}", partial(self._start, host), deadline=STEP_WAIT)

    def _start(self, host: str) -> str | None:
        if state(self.lab, host) != "running" or processes(self.lab, host, self.pattern()):
            return None
        volume = self.lab.site_variables()["tribrick_volume"]
        try:
            inside(self.lab, host, f"gluster --mode=script volume start {volume} force", deadline=60)
        except KitError as error:
            if BUSY not in str(error):
                raise
            return str(error)  # the check of a node's health asks just now
        return None

    def ended(self) -> str | None:
        """It runs."""
        missing = [host for host in self.hosts if not processes(self.lab, host, self.pattern())]
        return f"no brick process on {', '.join(missing)}" if missing else None


class BrickFreeze(OfProcesses):
    """The brick's process hangs; its connections stay."""

    name = "brick-freeze"
    summary = "the node's brick process hangs (SIGSTOP)"

    def pattern(self) -> str:
        """The brick's."""
        return brick_pattern(self.lab)

    def inject(self) -> None:
        """Stop it."""
        self.send("STOP")

    def proof(self) -> str:
        """It is stopped."""
        for host in self.hosts:
            if not self.stopped(host):
                raise KitError(f"{host}: the processes like '{self.pattern()}' were to be stopped.")
        return f"{', '.join(self.hosts)}: stopped (T)"

    def lift(self) -> None:
        """Let it go on."""
        self.cont()

    def ended(self) -> str | None:
        """It is not stopped."""
        left = [
            host
            for host in self.hosts
            if "T" in process_states(self.lab, host, processes(self.lab, host, self.pattern()))
        ]
        return f"stopped on {', '.join(left)}" if left else None


def mount_pattern(lab: Lab) -> str:
    """Return the pattern of the process behind the media mount."""
    return f"glusterf[s] .*{lab.site_variables()['tribrick_media_root']}$"


class MountHang(BrickFreeze):
    """The process behind the mount hangs, and every call on the mount with it."""

    name = "mount-hang"
    summary = "the process behind the node's mount hangs (SIGSTOP)"

    def pattern(self) -> str:
        """The mount's."""
        return mount_pattern(self.lab)

    def proof(self) -> str:
        """It is stopped, and a call on the mount gives no answer."""
        seen = super().proof()
        root = self.lab.site_variables()["tribrick_media_root"]
        for host in self.hosts:
            if "in time" in inside(self.lab, host, f"timeout -s KILL 2 ls {root} >/dev/null && echo in time || :"):
                raise KitError(f"{host}: a call on {root} was to hang.")
        return f"{seen}; a listing of {root} hangs"


class MountKill(OfProcesses):
    """The process behind the mount dies; the node itself mounts again."""

    name = "mount-kill"
    summary = "the process behind the node's mount dies"

    def pattern(self) -> str:
        """The mount's."""
        return mount_pattern(self.lab)

    def inject(self) -> None:
        """Kill it."""
        self.killed = {host: self.pids(host) for host in self.hosts}
        for host, pids in self.killed.items():
            inside(self.lab, host, f"kill -KILL {' '.join(map(str, pids))}")

    def proof(self) -> str:
        """Those processes are gone."""
        for host, pids in self.killed.items():
            if set(processes(self.lab, host, self.pattern())) & set(pids):
                raise KitError(f"{host}: the mount's process was to be dead.")
        return f"{', '.join(self.hosts)}: the mount's process is gone"

    def lift(self) -> None:
        """Nothing: the node mounts again by itself."""

    def ended(self) -> str | None:
        """It is mounted."""
        root = self.lab.site_variables()["tribrick_media_root"]
        for host in self.hosts:
            if "sentinel" not in inside(self.lab, host, f"test -e {root}/.tribrick-volume && echo sentinel || :", 10):
                return f"{host}: {root} is not mounted"
        return None


# --- disks


class DiskFull(Fault):
    """The brick's file system has no free block; the node's other disks have."""

    name = "disk-full"
    summary = "the brick's disk is full (needs --disks xfs)"
    filler: ClassVar[str] = "filler"
    fills: ClassVar[int] = 10  # how often what others free is taken, too

    def inject(self) -> None:
        """Take every free block. Only the file system counts them: this machine's disk stays as it is."""
        for host in self.hosts:
            self._fill(host)

    def _fill(self, host: str) -> None:
        handle = os.open(disk(self.lab, host).point / self.filler, os.O_CREAT | os.O_WRONLY)
        try:
            step = 1 << 30
            while step >= 4096:
                try:
                    os.posix_fallocate(handle, os.fstat(handle).st_size, step)
                except OSError:
                    step //= 2
            os.fsync(handle)
        finally:
            os.close(handle)

    def proof(self) -> str:
        """The node cannot store another 64 KiB there."""
        mount = self.lab.site_variables()["tribrick_brick_mount"]
        probe = f"{mount}/full-probe"
        script = f"head -c 65536 /dev/zero 2>&1 >{probe}; sync {probe} 2>&1; rm -f {probe}"
        for host in self.hosts:
            for _ in range(self.fills):
                if "No space left" in inside(self.lab, host, script):
                    break
                self._fill(host)  # a client has deleted a file meanwhile
            else:
                raise KitError(f"{host}: {mount} was to be full.")
        return f"{', '.join(self.hosts)}: no space left on the brick's disk"

    def lift(self) -> None:
        """Give the space back."""
        for host in self.hosts:
            (disk(self.lab, host).point / self.filler).unlink(missing_ok=True)

    def ended(self) -> str | None:
        """There is space."""
        for host in self.hosts:
            if os.statvfs(disk(self.lab, host).point).f_bavail == 0:
                return f"{host}: the brick's disk is full"
        return None


class InodesFull(Fault):
    """The brick's file system takes no further file, though it has free blocks."""

    name = "inodes-full"
    summary = "the brick's disk takes no further file, though it has space (needs --disks xfs)"

    def inject(self) -> None:
        """Lower the file system's limit to a hundredth, then use what is left up."""
        for host in self.hosts:
            capture(["xfs_growfs", "-m", "1", str(disk(self.lab, host).point)], deadline=STEP_WAIT)
            self.fill(host)

    def fill(self, host: str) -> None:
        """Use up what is left."""
        place = disk(self.lab, host).point / "fillers"
        place.mkdir(exist_ok=True)
        number = len(os.listdir(place))
        with contextlib.suppress(OSError):
            while number < 1_000_000:
                os.close(os.open(place / f"{number}", os.O_CREAT | os.O_WRONLY))
                number += 1

    def proof(self) -> str:
        """The node can make no file there, while blocks are free. What deletes free meanwhile is used up again."""
        mount = self.lab.site_variables()["tribrick_brick_mount"]
        script = f"touch {mount}/inode-probe 2>&1 && rm {mount}/inode-probe || :"
        for host in self.hosts:
            for _ in range(FILLS):
                if "No space left" in inside(self.lab, host, script):
                    break
                self.fill(host)
            else:
                raise KitError(f"{host}: {mount} was to take no file.")
            if os.statvfs(disk(self.lab, host).point).f_bavail == 0:
                raise KitError(f"{host}: {mount} was to have space.")
        return f"{', '.join(self.hosts)}: no further file on the brick's disk, though space is free"

    def lift(self) -> None:
        """Give the files and the limit back."""
        for host in self.hosts:
            one = disk(self.lab, host)
            place = one.point / "fillers"
            if place.is_dir():
                for path in place.iterdir():
                    path.unlink()
                place.rmdir()
            capture(["xfs_growfs", "-m", "25", str(one.point)], deadline=STEP_WAIT)

    def ended(self) -> str | None:
        """Files can be made."""
        for host in self.hosts:
            path = disk(self.lab, host).point / "inode-probe"
            try:
                path.touch()
                path.unlink()
            except OSError as error:
                return f"{host}: {error}"
        return None


class ReadOnly(Fault):
    """The brick's file system became read-only, as after a disk error."""

    name = "read-only"
    summary = "the brick's disk is read-only (needs --disks xfs)"

    def inject(self) -> None:
        """Remount it; a file that is being written stands in the way for a moment."""
        for host in self.hosts:
            one = disk(self.lab, host)

            def remount(one: Disk = one) -> str | None:
                words = ["mount", "-o", "remount,ro", str(one.point)]
                done = capture(words, deadline=STEP_WAIT, check=False)
                return None if done.returncode == 0 else done.stderr.strip()

            wait_for(Console(), f"{host}'s disk to become read-only", remount, deadline=30, interval=0.02)

    def proof(self) -> str:
        """The node cannot write there."""
        mount = self.lab.site_variables()["tribrick_brick_mount"]
        for host in self.hosts:
            if "Read-only" not in inside(self.lab, host, f"touch {mount}/probe 2>&1 || :"):
                raise KitError(f"{host}: {mount} was to be read-only.")
        return f"{', '.join(self.hosts)}: read-only file system"

    def lift(self) -> None:
        """Make it writable."""
        for host in self.hosts:
            capture(["mount", "-o", "remount,rw", str(disk(self.lab, host).point)], deadline=STEP_WAIT)

    def ended(self) -> str | None:
        """It can be written."""
        for host in self.hosts:
            if not os.access(disk(self.lab, host).point, os.W_OK):
                return f"{host}: the disk is read-only"
        return None


# Waits until glusterd has run for 15 s: while it still starts bricks, reset-brick can crash it.
SETTLED = (
    "until test $(($(cut -d. -f1 /proc/uptime) - "
    "$(systemctl show -P ActiveEnterTimestampMonotonic glusterd) / 1000000)) -ge 15; do sleep 0.5; done"
)


class DiskWiped(Fault):
    """The node comes back with an empty new disk. Lifting it is a recovery: the brick is filled from the others."""

    name = "disk-wiped"
    summary = "the node restarts with an empty new disk (needs --disks xfs; not lifted by itself)"

    def inject(self) -> None:
        """Replace the disk while the node is off."""
        for host in self.hosts:
            one = disk(self.lab, host)
            if state(self.lab, host) == "running":
                capture(["docker", "kill", self.lab.container(host)], deadline=STEP_WAIT)
            one.unmount()
            one.format()
            one.mount()
            start(self.lab, [host])
        wait_for(Console(), "the node to boot", lambda: running(self.lab, self.hosts), deadline=STEP_WAIT)

    def proof(self) -> str:
        """There is no volume's mark on the brick's directory."""
        path = self.lab.site_variables()["tribrick_brick_path"]
        for host in self.hosts:
            if inside(self.lab, host, f"ls -A {path} 2>/dev/null | head -1"):
                raise KitError(f"{host}: {path} was to be empty.")
        return f"{', '.join(self.hosts)}: an empty disk"

    def lift(self) -> None:
        """Make the brick anew and let Gluster fill it, as replacing a disk at the same place needs."""
        variables = self.lab.site_variables()
        volume, path = variables["tribrick_volume"], variables["tribrick_brick_path"]
        for host in self.hosts:
            if inside(self.lab, host, f"ls -A {path} 2>/dev/null | head -1"):
                continue
            brick = f"{host}:{path}"
            run = "gluster --mode=script volume"
            inside(
                self.lab,
                host,
                f"{SETTLED}; mkdir -p {path}; {run} reset-brick {volume} {brick} start"
                f" && {run} reset-brick {volume} {brick} {brick} commit force && {run} heal {volume} full",
                deadline=120,
            )

    def ended(self) -> str | None:
        """The brick's process runs."""
        missing = [host for host in self.hosts if not processes(self.lab, host, brick_pattern(self.lab))]
        return f"no brick process on {', '.join(missing)}" if missing else None


# --- glusterd, database


class GlusterdKill(OfProcesses):
    """The management daemon dies; bricks and mounts go on."""

    name = "glusterd-kill"
    summary = "the node's glusterd dies; systemd may start it again"

    def pattern(self) -> str:
        """The daemon's, not the bricks'."""
        return "/usr/sbin/gluster[d] "

    def inject(self) -> None:
        """Stop the unit after the kill, so that it stays away until it is lifted."""
        everywhere(
            lambda host: inside(
                self.lab, host, "systemctl kill -s KILL --kill-whom=main glusterd || :; systemctl stop glusterd"
            ),
            self.hosts,
        )

    def proof(self) -> str:
        """It is gone, the brick is not."""
        for host in self.hosts:
            if processes(self.lab, host, self.pattern()):
                raise KitError(f"{host}: glusterd was to be dead.")
            if not processes(self.lab, host, brick_pattern(self.lab)):
                raise KitError(f"{host}: the brick died with glusterd.")
        return f"{', '.join(self.hosts)}: no glusterd, the brick goes on"

    def lift(self) -> None:
        """Start it."""
        for host in self.hosts:
            inside(self.lab, host, "systemctl reset-failed glusterd || :; systemctl start glusterd", deadline=90)

    def ended(self) -> str | None:
        """It runs."""
        missing = [host for host in self.hosts if not processes(self.lab, host, self.pattern())]
        return f"no glusterd on {', '.join(missing)}" if missing else None


class GlusterdRestart(GlusterdKill):
    """The management daemon is restarted as an operator or a package does."""

    name = "glusterd-restart"
    summary = "the node's glusterd is restarted; over at once"

    def inject(self) -> None:
        """Restart it."""
        self.bricks = {host: processes(self.lab, host, brick_pattern(self.lab)) for host in self.hosts}
        everywhere(lambda host: inside(self.lab, host, "systemctl restart glusterd", deadline=90), self.hosts)

    def proof(self) -> str:
        """The bricks are the same processes as before."""
        for host, before in self.bricks.items():
            if not before or processes(self.lab, host, brick_pattern(self.lab)) != before:
                raise KitError(f"{host}: the brick did not outlive the restart of glusterd.")
        return f"{', '.join(self.hosts)}: glusterd restarted, the brick lived on"

    def lift(self) -> None:
        """Nothing to lift."""


class GlusterStop(Fault):
    """GlusterFS is gone: glusterd, brick and self-heal daemon are dead and stay so. The mounts' processes live."""

    name = "gluster-stop"
    summary = "the node's glusterd, brick and self-heal daemon die and stay away"

    def patterns(self) -> tuple[str, ...]:
        """Those of glusterd, the brick and the self-heal daemon."""
        return "/usr/sbin/gluster[d] ", brick_pattern(self.lab), "glusterf[s] .*shd/"

    def left(self, host: str) -> list[int]:
        """Return what runs of them."""
        return [pid for pattern in self.patterns() for pid in processes(self.lab, host, pattern)]

    def inject(self) -> None:
        """Kill them, glusterd first: it would start the others again. Its unit is stopped, so that it stays away."""

        def kill(host: str) -> None:
            stop = "systemctl kill -s KILL --kill-whom=main glusterd || :; systemctl stop glusterd"
            inside(self.lab, host, stop, deadline=90)
            if found := self.left(host):
                inside(self.lab, host, f"kill -KILL {' '.join(map(str, found))} || :")

        everywhere(kill, self.hosts)

    def proof(self) -> str:
        """None of them is left."""
        for host in self.hosts:
            if found := self.left(host):
                raise KitError(f"{host}: GlusterFS was to be gone; there is still {found}.")
        return f"{', '.join(self.hosts)}: no glusterd, no brick, no self-heal daemon"

    def lift(self) -> None:
        """Start glusterd, which starts the others; side by side, since one alone has no quorum."""
        script = "systemctl reset-failed glusterd || :; systemctl start glusterd"
        alive = [host for host in self.hosts if state(self.lab, host) == "running"]
        everywhere(lambda host: inside(self.lab, host, script, deadline=90), alive)

    def ended(self) -> str | None:
        """glusterd and the brick run."""
        for host in self.hosts:
            for pattern in self.patterns()[:2]:
                if not processes(self.lab, host, pattern):
                    return f"{host} runs no process like '{pattern}'"
        return None


class DatabaseStop(Fault):
    """PostgreSQL is away; its host refuses connections."""

    name = "database-stop"
    summary = "PostgreSQL is stopped"
    database = True
    port: ClassVar[int] = 5432

    def inject(self) -> None:
        """Stop every server."""
        inside(self.lab, DATABASE[0], "systemctl stop 'postgresql*'", deadline=90)

    def proof(self) -> str:
        """The port opens for no node. Strangers never reach it."""
        if self.reached():
            raise KitError("PostgreSQL was to be stopped, but its port is open.")
        return "PostgreSQL's port is closed"

    def reached(self) -> bool:
        """Tell whether any node that runs connects to PostgreSQL."""
        nodes = [node for node in NODES if state(self.lab, node) == "running"]
        return any(can_connect(self.lab, node, DATABASE[0], self.port) for node in nodes)

    def lift(self) -> None:
        """Start it."""
        inside(self.lab, DATABASE[0], "systemctl start postgresql", deadline=90)

    def ended(self) -> str | None:
        """A query is answered."""
        said = inside(self.lab, DATABASE[0], "su postgres -c 'psql -qtAc \"select 1\"' 2>&1 || :")
        return None if said.strip() == "1" else said.strip() or "no answer"


class DatabaseCut(Filtered):
    """PostgreSQL's host is silent."""

    name = "database-cut"
    summary = "no packet enters or leaves the database's host"
    database = True

    def inject(self) -> None:
        """Drop everything but loopback."""
        filter_on(self.lab, DATABASE[0], ["counter drop"], ["counter drop"])

    def proof(self) -> str:
        """Nobody answers."""
        if (seen := reach(self.lab.addresses[DATABASE[0]])) != "silent":
            raise KitError(f"{DATABASE[0]} was to be silent and is {seen}.")
        return f"{DATABASE[0]}: no answer, container running"


class DatabaseRestart(DatabaseStop):
    """PostgreSQL is restarted: open connections break."""

    name = "database-restart"
    summary = "PostgreSQL is restarted; over at once"

    def inject(self) -> None:
        """Restart it."""
        query = "su postgres -c 'psql -qtAc \"select pg_postmaster_start_time()\"'"
        before = inside(self.lab, DATABASE[0], query)
        inside(self.lab, DATABASE[0], "systemctl restart 'postgresql@*'", deadline=90)
        wait_for(Console(), "PostgreSQL to answer", self.ended, deadline=STEP_WAIT)
        if inside(self.lab, DATABASE[0], query) == before:
            raise KitError("PostgreSQL was to be restarted, but is the one of before.")

    def proof(self) -> str:
        """Checked while it was made."""
        return "PostgreSQL runs since now"

    def lift(self) -> None:
        """Nothing to lift."""


class DatabaseFull(DatabaseStop):
    """PostgreSQL's disk is full: it answers, and stores nothing more.

    The lab's database lies on this machine's disk, which nobody wants to fill. So its data is moved to a small file
    system first, and back in the end; PostgreSQL is stopped for either.
    """

    name = "database-full"
    summary = "PostgreSQL's data is moved to a small disk, which is filled"
    spare: ClassVar[int] = 48  # MiB that are free before the disk is filled
    data: ClassVar[str] = "set -eu; set -- $(pg_lsclusters -h); data=$6"  # the one cluster's directory

    def inject(self) -> None:
        """Move, unless that was done before, and fill."""
        script = f"""{self.data}; small=$data.small
if ! mountpoint -q $data; then
  systemctl stop 'postgresql*'
  mkdir -p $small
  mount -t tmpfs -o size=$(($(du -sm $data | cut -f1) + {self.spare}))m tmpfs $small
  cp -a $data/. $small/
  mount --bind $small $data
  umount $small
  rmdir $small
  systemctl start postgresql
fi
for step in 64k 4k; do dd if=/dev/zero bs=$step 2>&1 >>$data/filler | grep -q 'No space left'; done
"""
        inside(self.lab, DATABASE[0], script, deadline=120)

    def proof(self) -> str:
        """Another 4 KiB cannot be stored beside PostgreSQL's files, and nodes still connect to it."""
        probe = f"{self.data}; head -c 4096 /dev/zero 2>&1 >$data/probe || :; rm -f $data/probe"
        if "No space left" not in inside(self.lab, DATABASE[0], probe):
            raise KitError("PostgreSQL's disk was to be full.")
        if not self.reached():
            raise KitError("PostgreSQL was to run on its full disk, but no node connects to it.")
        return "no space left beside PostgreSQL's files; its port is open"

    def free(self) -> None:
        """Give the space back, as an operator would; the data stays where it is."""
        inside(self.lab, DATABASE[0], f"{self.data}; rm -f $data/filler")

    def lift(self) -> None:
        """Give the space back and move the data home."""
        script = f"""{self.data}; kept=$data.kept
mountpoint -q $data || exit 0
rm -f $data/filler
systemctl stop 'postgresql*'
rm -rf $kept
cp -a $data $kept
sync -f $kept
umount $data
rm -rf $data
mv $kept $data
systemctl reset-failed 'postgresql*'
systemctl start postgresql
"""
        inside(self.lab, DATABASE[0], script, deadline=120)


FAULTS: dict[str, type[Fault]] = {
    fault.name: fault
    for fault in (
        Kill, PowerCut, Pause, Silence, Unplug, OneWay, Partition, Alone, Bridge, Flapping,
        BrickKill, BrickFreeze, DiskFull, InodesFull, ReadOnly, DiskWiped,
        MountKill, MountHang, GlusterdKill, GlusterdRestart, GlusterStop,
        DatabaseStop, DatabaseCut, DatabaseRestart, DatabaseFull,
    )
}  # fmt: skip


def make(lab: Lab, name: str, hosts: Sequence[str] = ()) -> Fault:
    """Return a fault by its name, ready to inject; fail with one sentence if it cannot be."""
    if name not in FAULTS:
        raise KitError(f"There is no fault '{name}'; there are: {', '.join(FAULTS)}.")
    kind = FAULTS[name]
    if kind.database:
        return kind(lab, [DATABASE[0]])
    if not hosts or any(host not in NODES for host in hosts):
        raise KitError(f"The fault {name} is one of nodes: {', '.join(NODES)}, several with commas, or all.")
    return kind(lab, list(dict.fromkeys(hosts)))


def stay(seconds: float) -> None:
    """Let a fault hold for this long."""
    threading.Event().wait(seconds)
