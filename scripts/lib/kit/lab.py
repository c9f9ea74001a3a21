"""The command ./scripts/lab: three nodes and a database in Docker, rolled out like a real site."""

from __future__ import annotations

import argparse
import contextlib
import fcntl
import hashlib
import io
import ipaddress
import json
import os
import secrets
import shlex
import shutil
import sys
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from http.client import HTTPException
from pathlib import Path
from typing import Any
from urllib.error import HTTPError, URLError
from urllib.parse import quote, urljoin, urlsplit
from urllib.request import Request, urlopen

import yaml

from kit import disks, images
from kit.engine import ensure_engine, ensure_ssh
from kit.inventory import BACKENDS, SiteError, SiteSpec, render
from kit.run import Console, KitError, capture, stream, wait_for

ROOT = Path(__file__).resolve().parents[3]
# Labs with a fixed place; any other name gets the first free subnet from 198.18.16.0/24 on.
SUBNETS = {
    "lab": "198.18.0.0/24",
    "default": "198.18.1.0/24",
    "debian12": "198.18.2.0/24",
    "bare": "198.18.3.0/24",
    "backends": "198.18.4.0/24",
    "storages": "198.18.5.0/24",
    "faults": "198.18.6.0/24",
    "outage": "198.18.7.0/24",
    "serving": "198.18.8.0/24",
}
FIRST_FREE_SUBNET = 16
NODES = {"node1": 11, "node2": 12, "node3": 13}
SPARE = ("node4", 14)  # takes the place of a node that is lost for good
DATABASE = ("db1", 21)
OUTSIDER = ("outsider", 31)
VIP = 10  # the last number of the address that the nodes hold in turn, if the lab has one
DISKS = ("volume", "xfs")
SPOOL_ON_DISK = "/srv/gluster/media/spool"  # beside the brick, on the disk that can be cut
SSH_USER = "operator"
ACCOUNT = "lab"
CREATE_WAIT, ROLLOUT_WAIT, WEB_WAIT = 600.0, 1800.0, 60.0
PLAYBOOK = [sys.executable, "-m", "ansible", "playbook"]

EXAMPLES = """\
examples:
  ./scripts/lab up                     all of it on Debian 13; ends by serving a picture
  ./scripts/lab up --debian 12 --name twelve
  ./scripts/lab up --image bare        the rollout installs every package itself
  ./scripts/lab up --disks xfs         each brick on a disk of its own, which can be cut, filled or wiped
  ./scripts/lab up --spool             uploads go on while the volume is away
  ./scripts/lab up --vip               one address for the site, which a node at a time holds
  ./scripts/lab up --no-site           containers and SSH only
  ./scripts/lab up --profile           also names the ten slowest tasks
  ./scripts/lab status [--json]
  ./scripts/lab ssh node1 sudo gluster volume status
  ./scripts/lab fault silence node2 --for 30s
  ./scripts/lab fault power-cut all    ./scripts/lab fault power-cut all --lift
  docker kill tribrick-lab-node2       break something; ./scripts/lab up repairs it
  ./scripts/lab down                   removes containers, network, volumes, inventory, keys

Debian comes from this machine's own apt mirrors; TRIBRICK_DEBIAN_MIRROR and
TRIBRICK_DEBIAN_SECURITY_MIRROR name others.
"""


@dataclass(frozen=True)
class Lab:
    """One lab by its name: where its things are."""

    name: str

    @property
    def state(self) -> Path:
        """Keys, known hosts, vault password, log."""
        return ROOT / ".lab" / self.name

    @property
    def inventory(self) -> Path:
        """The rendered inventory."""
        return ROOT / "inventories" / ("lab" if self.name == "lab" else f"lab-{self.name}")

    @property
    def vault_password(self) -> Path:
        """The file that opens the inventory's vault."""
        return self.state / "vault-password"

    @property
    def members(self) -> dict[str, int]:
        """The nodes that the inventory has, in its order, with the last numbers of their addresses."""
        noted: dict[str, int] = self.recall().get("members") or NODES
        return noted

    @property
    def disks(self) -> dict[str, disks.Disk]:
        """The nodes' disks, in a lab that was made with `--disks xfs`."""
        return {node: disks.Disk(self.state / "disks", node) for node in {**NODES, **self.members}}

    @property
    def spool(self) -> str:
        """The directory of the nodes' spools; empty in a lab without them."""
        noted = self.recall()
        if not noted.get("spool"):
            return ""
        on_disk = noted.get("disks") == "xfs"
        return SPOOL_ON_DISK if on_disk else str(self.site_variables()["media_spool_path"])

    def container(self, host: str) -> str:
        """Return the name of a host's container."""
        return f"tribrick-{self.name}-{host}"

    def recall(self) -> dict[str, Any]:
        """Return what an earlier run noted down."""
        file = self.state / "state.json"
        if not file.exists():
            return {}
        noted: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
        return noted

    def note(self, **values: object) -> dict[str, Any]:
        """Note something down for later runs."""
        self.state.mkdir(parents=True, exist_ok=True, mode=0o700)
        noted = {**self.recall(), **values}
        fresh = self.state / "state.json.new"
        fresh.touch(mode=0o600)
        fresh.write_text(json.dumps(noted, indent=2) + "\n", encoding="utf-8")
        fresh.replace(self.state / "state.json")
        return noted

    def address(self, last: int) -> str:
        """Return the address with the given last number in this lab's subnet."""
        network = ipaddress.IPv4Network(self.recall()["subnet"])
        return str(network.network_address + last)

    @property
    def addresses(self) -> dict[str, str]:
        """The addresses of all hosts, the outsider included."""
        numbers = {**NODES, **self.members, DATABASE[0]: DATABASE[1], OUTSIDER[0]: OUTSIDER[1]}
        return {host: self.address(last) for host, last in numbers.items()}

    def url(self, host: str) -> str:
        """Return a node's web address."""
        return f"http://{self.addresses[host]}"

    def ssh(self, host: str) -> list[str]:
        """Return the ssh command up to, not including, what is to run."""
        return [
            "ssh",
            *("-F", "none", "-i", str(self.state / "id_ed25519")),
            *("-o", "IdentitiesOnly=yes", "-o", "BatchMode=yes", "-o", "ConnectTimeout=5"),
            *("-o", "LogLevel=ERROR", "-o", "StrictHostKeyChecking=yes"),
            *("-o", f"UserKnownHostsFile={self.state / 'known_hosts'}"),
            f"{SSH_USER}@{self.addresses[host]}",
        ]

    def site_variables(self) -> dict[str, Any]:
        """Return the plain shared variables of the rendered inventory."""
        file = self.inventory / "group_vars" / "all" / "tribrick.yml"
        values: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        return values

    @contextlib.contextmanager
    def alone(self) -> Iterator[None]:
        """Keep a second command from changing the same lab meanwhile."""
        lock = ROOT / ".lab" / f"{self.name}.lock"
        lock.parent.mkdir(parents=True, exist_ok=True)
        with lock.open("w") as stream_:
            try:
                fcntl.flock(stream_, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise KitError(f"Another command is at work on the lab '{self.name}'; let it end first.") from None
            yield


def containers(lab: Lab) -> dict[str, str]:
    """Return the lab's hosts with the state of their containers (running, exited, paused...)."""
    done = capture(
        [
            "docker",
            "ps",
            "--all",
            f"--filter=label=tribrick.lab={lab.name}",
            '--format={{.Label "tribrick.host"}} {{.State}}',
        ],
        deadline=60,
    )
    return dict(line.split(" ", 1) for line in sorted(done.stdout.splitlines()))


def choose_subnet(name: str, taken: Sequence[str]) -> str:
    """Return the subnet of a new lab: its fixed one, or the first that no network uses."""
    if name in SUBNETS:
        return SUBNETS[name]
    used = [ipaddress.IPv4Network(text) for text in taken if ":" not in text]
    for number in range(FIRST_FREE_SUBNET, 512):
        subnet = ipaddress.IPv4Network(f"198.{18 + number // 256}.{number % 256}.0/24")
        if not any(subnet.overlaps(other) for other in used):
            return str(subnet)
    raise KitError("Every subnet of 198.18.0.0/15 is in use by Docker networks; remove some labs.")


def _docker_subnets() -> list[str]:
    ids = capture(["docker", "network", "ls", "--quiet"], deadline=60).stdout.split()
    form = "{{range .IPAM.Config}}{{.Subnet}} {{end}}"
    return capture(["docker", "network", "inspect", f"--format={form}", *ids], deadline=60).stdout.split()


class AnsibleOutput:
    """Condenses ansible-playbook's output to plays, tasks, failures and recaps."""

    def __init__(self) -> None:
        """Start outside of any failure or recap."""
        self.keep = False
        self.task = "starting"

    def __call__(self, line: str) -> str | None:
        """Return what to print of a line, if anything."""
        if line.startswith(("PLAY RECAP", "TASKS RECAP", "PLAYBOOK RECAP")):
            self.keep = True
        elif line.startswith(("TASK [", "RUNNING HANDLER [", "PLAY [")):
            self.keep = False
            kind = "==" if line.startswith("PLAY") else "  "
            self.task = line.split("[", 1)[1].rsplit("]", 1)[0].removeprefix("tribrick.media.")
            return f"{kind} {self.task}"
        elif line.startswith(("fatal:", "failed:", "[ERROR]", "ERROR!", "[WARNING]")):
            self.keep = True
        elif line.startswith(("ok:", "changed:", "skipping:", "included:")):
            self.keep = False
        return line if self.keep and line.strip() else None


def playbook(console: Console, name: str, arguments: Sequence[str], deadline: float, profile: bool = False) -> None:
    """Run a playbook of this repository."""
    env = {
        "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg"),
        "ANSIBLE_NOCOLOR": "1",
        "ANSIBLE_FORCE_COLOR": "0",
        "PYTHONUNBUFFERED": "1",
        "LC_ALL": "C.UTF-8",
    }
    if profile:
        env |= {
            "ANSIBLE_CALLBACKS_ENABLED": "ansible.posix.profile_tasks",
            "ANSIBLE_PROFILE_TASKS_TASK_OUTPUT_LIMIT": "10",
            "PROFILE_TASKS_TASK_OUTPUT_LIMIT": "10",
        }
    output = AnsibleOutput()
    stream(
        console,
        [*PLAYBOOK, *arguments, name],
        what=name,
        deadline=deadline,
        show=output,
        now_at=lambda: output.task,
        env=env,
        cwd=ROOT,
    )


def forget_disks(console: Console, lab: Lab) -> None:
    """Remove the disks of nodes that are gone: bricks of a volume that no node knows help nobody."""
    named = ["volume", "ls", "--quiet", f"--filter=label=tribrick.lab={lab.name}"]
    volumes = capture(["docker", *named], deadline=60).stdout.split()
    if volumes or disks.found(lab.state / "disks"):
        console.say("the lab's nodes are gone, only their disks were left: starting with fresh disks")
    if volumes:
        capture(["docker", "volume", "rm", *volumes], deadline=120)
    disks.remove(console, lab.state / "disks")


def ready_disks(console: Console, lab: Lab) -> None:
    """Make and mount the disks; one whose file system died is mounted anew, its node stopped before."""
    disks.ensure_tools(console)
    for node, disk in lab.disks.items():
        if disk.dead:
            console.say(f"{node}: the disk's file system is shut down; stopping the node, mounting it again")
            if containers(lab).get(node) in {"running", "paused"}:
                capture(["docker", "kill", lab.container(node)], deadline=60)
            disk.unmount()
        if not disk.image.exists():
            if node in containers(lab):
                raise KitError(f"{disk.image} is gone, but its node is there; take the lab down: ./scripts/lab down")
            disk.format()
        disk.mount()


def prepare(
    console: Console,
    lab: Lab,
    release: str | None,
    kind: str | None,
    disk_kind: str | None = None,
    backend: str | None = None,
    spool: bool | None = None,
    vip: bool | None = None,
) -> dict[str, Any]:
    """Settle the lab's place and base, make its images, disks and inventory."""
    noted = lab.recall()
    running = containers(lab)
    for option, old, new in (
        ("Debian", noted.get("release"), release),
        ("the image", noted.get("kind"), kind),
        ("disks of kind", noted.get("disks", "volume"), disk_kind),
        ("the media back end", noted.get("backend", BACKENDS[0]), backend),
    ):
        if running and old and new and old != new:
            raise KitError(
                f"The lab '{lab.name}' runs on {option} {old}; first take it down: ./scripts/lab down --name {lab.name}"
            )
    keep = noted if running else {}
    release = release or keep.get("release", "13")
    kind = kind or keep.get("kind", "ready")
    disk_kind = disk_kind or keep.get("disks", "volume")
    backend = backend or keep.get("backend", BACKENDS[0])
    spool = keep.get("spool", False) if spool is None else spool
    vip = keep.get("vip", False) if vip is None else vip
    with console.phase("images"):
        tag = images.ensure(console, release, kind)
    if not running.keys() & NODES.keys():
        forget_disks(console, lab)
        lab.note(members=NODES)
    if disk_kind == "xfs":
        ready_disks(console, lab)
    noted = lab.note(
        disks=disk_kind,
        release=release,
        kind=kind,
        backend=backend,
        spool=spool,
        vip=vip,
        tag=tag,
        subnet=noted.get("subnet") or choose_subnet(lab.name, _docker_subnets()),
    )
    if disk_kind == "xfs":  # small, so that one is full soon
        overrides: dict[str, Any] = {"preflight_min_brick_gib": 1.0}
    else:
        overrides = {"tribrick_allow_shared_filesystem": True}
    if spool:
        overrides["media_spool"] = True
        if disk_kind == "xfs":  # no other disk of a node loses what was not synced when its power is cut
            overrides["media_spool_path"] = SPOOL_ON_DISK
    if vip:
        overrides["tribrick_vip"] = f"{lab.address(VIP)}/{ipaddress.IPv4Network(noted['subnet']).prefixlen}"
    spec = SiteSpec(
        name="lab" if lab.name == "lab" else f"lab-{lab.name}",
        nodes={host: lab.address(last) for host, last in lab.members.items()},
        database_host=(DATABASE[0], lab.address(DATABASE[1])),
        ssh_user=SSH_USER,
        ssh_private_key=lab.state / "id_ed25519",
        known_hosts=lab.state / "known_hosts",
        backend=backend,
        overrides=overrides | {"tribrick_http_redirect": False},
    )
    changed = render(spec, lab.inventory, lab.vault_password, update=True)
    if changed:
        console.say(f"wrote {lab.inventory.relative_to(ROOT)}/ ({len(changed)} files)")
    return noted


def prepare_as_asked(console: Console, lab: Lab, options: argparse.Namespace) -> dict[str, Any]:
    """Do so with the options of the command line."""
    kinds = (options.debian, options.image, options.disks, options.backend)
    return prepare(console, lab, *kinds, spool=options.spool, vip=options.vip)


def create(console: Console, lab: Lab, noted: dict[str, Any], outsider: bool) -> None:
    """Create or start the containers."""
    values = {
        "lab_name": lab.name,
        "lab_subnet": noted["subnet"],
        "lab_debian": noted["release"],
        "lab_image": noted["kind"],
        "lab_image_tag": noted["tag"],
        "lab_disks": noted["disks"],
        "lab_members": [
            *({"name": host, "address": lab.address(last), "brick": True} for host, last in lab.members.items()),
            {"name": DATABASE[0], "address": lab.address(DATABASE[1])},
        ],
        "lab_outsider": outsider or OUTSIDER[0] in containers(lab),
    }
    with console.phase("containers"):
        playbook(
            console,
            "playbooks/lab_create.yml",
            ["--inventory=localhost,", "--extra-vars", json.dumps(values)],
            CREATE_WAIT,
        )
        hosts = list(containers(lab))

        def reach(host: str) -> None:
            def probe() -> str | None:
                done = capture([*lab.ssh(host), "true"], deadline=15, check=False)
                return None if done.returncode == 0 else done.stderr.strip() or "no answer"

            wait_for(console, f"SSH on {host}", probe, deadline=60)

        with ThreadPoolExecutor(len(hosts)) as pool:
            list(pool.map(reach, hosts))
    console.say(f"containers up, reachable by SSH: {', '.join(hosts)}")


def ensure_account(lab: Lab) -> dict[str, Any]:
    """Make the lab's account and API token on the site, the same at every run."""
    noted = lab.recall()
    if "token" not in noted:
        noted = lab.note(token=secrets.token_hex(20), password=secrets.token_urlsafe(12))
    # By standard input: neither may be seen in a list of processes.
    script = (
        f"export TRIBRICK_LAB_PASSWORD={shlex.quote(noted['password'])}\n"
        f"export TRIBRICK_LAB_TOKEN={shlex.quote(noted['token'])}\n"
        f"exec tribrick-manage ensure_account {ACCOUNT} --superuser "
        "--password-env TRIBRICK_LAB_PASSWORD --token-env TRIBRICK_LAB_TOKEN\n"
    )
    done = capture([*lab.ssh("node1"), "sudo", "bash", "-s"], deadline=120, check=False, text_in=script)
    if done.returncode != 0:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        raise KitError(f"The account '{ACCOUNT}' could not be made on node1: {said[-1] if said else 'no word why'}")
    return noted


def http(
    method: str,
    url: str,
    *,
    token: str | None = None,
    body: bytes | None = None,
    kind: str | None = None,
    deadline: float = 30.0,
) -> tuple[int, bytes]:
    """Make one HTTP request; return status and body, or fail with what happened."""
    request = Request(url, data=body, method=method)  # noqa: S310 - only http:// addresses of the lab
    if token:
        request.add_header("Authorization", f"Token {token}")
    if kind:
        request.add_header("Content-Type", kind)
    try:
        with urlopen(request, timeout=deadline) as answer:  # noqa: S310 - as above
            return answer.status, answer.read()
    except HTTPError as error:
        return error.code, error.read()
    except (URLError, HTTPException, OSError) as error:
        raise KitError(f"{method} {url}: {error}") from None


def make_picture(title: str) -> bytes:
    """Return a JPEG that did not exist before: a title on a coloured field."""
    from PIL import Image, ImageDraw

    seed = secrets.token_bytes(3)
    top, bottom = tuple(64 + value // 2 for value in seed), tuple(32 + v // 4 for v in seed[::-1])
    image = Image.new("RGB", (960, 640))
    draw = ImageDraw.Draw(image)
    for y in range(640):
        shade = tuple(round(a + (b - a) * y / 639) for a, b in zip(top, bottom, strict=True))
        draw.line([(0, y), (959, y)], fill=shade)
    for index, row in enumerate((title, time.strftime("%Y-%m-%d %H:%M:%S"), secrets.token_hex(16))):
        draw.text((60, 200 + 70 * index), row, fill="white", font_size=40)
    output = io.BytesIO()
    image.save(output, "JPEG", quality=90)
    return output.getvalue()


def upload(url: str, token: str, name: str, content: bytes) -> dict[str, Any]:
    """Upload a file by the site's API and return the answer."""
    mark = secrets.token_hex(16)
    head = (
        f'--{mark}\r\nContent-Disposition: form-data; name="file"; filename="{name}"\r\n'
        "Content-Type: image/jpeg\r\n\r\n"
    )
    body = head.encode() + content + f"\r\n--{mark}--\r\n".encode()
    status, said = http(
        "POST",
        f"{url}/api/media/",
        token=token,
        body=body,
        kind=f"multipart/form-data; boundary={mark}",
    )
    if status != 201:
        raise KitError(f"The upload to {url}/api/media/ was answered {status}: {said[:300]!r}")
    answer: dict[str, Any] = json.loads(said)
    return answer


def prove(console: Console, lab: Lab, token: str) -> list[dict[str, str]]:
    """Upload a new picture through node1, fetch it from every node, compare; return the table."""
    for node in NODES:

        def ready(url: str = f"{lab.url(node)}/readyz") -> str | None:
            try:
                status, said = http("GET", url, deadline=10)
            except KitError as error:
                return str(error)
            return None if status == 200 else f"{status} {said[:200]!r}"

        wait_for(console, f"{node} to be ready", ready, deadline=WEB_WAIT)
    picture = make_picture(f"Tribrick lab '{lab.name}'")
    wanted = hashlib.sha256(picture).hexdigest()
    answer = upload(lab.url("node1"), token, "tribrick-lab.jpg", picture)
    if answer["sha256"] != wanted:
        raise KitError(f"node1 stored other bytes than were sent: {answer['sha256']}, not {wanted}.")
    rows = []
    for node in NODES:
        address = urljoin(lab.url(node), urlsplit(answer["url"]).path)
        status, content = http("GET", address)
        found = hashlib.sha256(content).hexdigest()
        if status != 200 or found != wanted:
            raise KitError(
                f"{address} was answered {status} with {len(content)} bytes, SHA-256 {found}; "
                f"wanted {len(picture)} bytes, {wanted}."
            )
        rows.append({"node": node, "served": f"{len(content)} bytes {found[:12]}", "url": address})
    if lab.recall().get("picture"):
        # A browser has the first run's picture to look at; this one was only a probe.
        status, said = http("DELETE", f"{lab.url('node1')}/api/media/{quote(answer['name'])}", token=token)
        if status != 204:
            raise KitError(f"The probe picture could not be deleted: {status} {said[:300]!r}")
    else:
        lab.note(picture=answer["name"])
    return rows


def table(rows: Sequence[dict[str, str]]) -> str:
    """Lay rows out in columns under their keys."""
    columns = list(rows[0])
    width = {c: max(len(c), *(len(row[c]) for row in rows)) for c in columns}
    lines = ["  ".join(c.upper().ljust(width[c]) for c in columns)]
    lines += ["  ".join(row[c].ljust(width[c]) for c in columns) for row in rows]
    return "\n".join(line.rstrip() for line in lines)


def node_states(lab: Lab) -> list[dict[str, str]]:
    """Look at every node from outside and by SSH; nothing here touches the mount itself."""
    variables = lab.site_variables()
    mount, brick = variables["tribrick_media_root"], variables["tribrick_brick_path"]
    states = containers(lab)
    script = (
        f"findmnt --noheadings --output FSTYPE --mountpoint {shlex.quote(mount)} || echo none\n"
        f"pgrep --full --count 'glusterfsd.*--brick-name {brick}' || :\n"
    )

    def look(node: str) -> dict[str, str]:
        row = {
            "node": node,
            "container": states.get(node, "absent"),
            "brick": f"{brick} ?",
            "mount": f"{mount} ?",
            "web": "no answer",
        }
        if row["container"] != "running":
            return row
        done = capture([*lab.ssh(node), "bash", "-s"], deadline=20, check=False, text_in=script)
        words = done.stdout.split()
        if done.returncode == 0 and len(words) == 2:
            row["mount"] = f"{mount} {'mounted' if words[0] == 'fuse.glusterfs' else words[0]}"
            row["brick"] = f"{brick} {'online' if words[1] != '0' else 'offline'}"
        try:
            status, _ = http("GET", f"{lab.url(node)}/readyz", deadline=10)
            row["web"] = "ready" if status == 200 else f"readyz {status}"
        except KitError:
            pass
        return row

    with ThreadPoolExecutor(len(NODES)) as pool:
        return list(pool.map(look, NODES))


def held(lab: Lab) -> str:
    """The address that the nodes hold in turn, and who has it now."""
    address = lab.address(VIP)

    def has(node: str) -> bool:
        done = capture([*lab.ssh(node), "ip", "-oneline", "address", "show", "to", address], deadline=20, check=False)
        return done.returncode == 0 and bool(done.stdout.strip())

    states = containers(lab)
    holders = [node for node in NODES if states.get(node) == "running" and has(node)]
    return f"http://{address}  held by {' and '.join(holders) or 'nobody'}"


def command_up(console: Console, lab: Lab, options: argparse.Namespace) -> None:
    """Build what is missing, start the hosts, roll out, prove."""
    lab.state.mkdir(parents=True, exist_ok=True, mode=0o700)
    console.log = lab.state / "up.log"
    console.log.unlink(missing_ok=True)
    with console.phase("engine"):
        ensure_ssh(console)
        ensure_engine(console, ROOT / ".lab")
    noted = prepare_as_asked(console, lab, options)
    create(console, lab, noted, options.outsider)
    if options.no_site:
        console.say(f"without the site, as asked; {console.timings()}")
        return
    extra = [word for pair in options.extra_vars for word in ("--extra-vars", pair)]
    with console.phase("site.yml"):
        playbook(
            console,
            "site.yml",
            ["--inventory", str(lab.inventory), "--vault-password-file", str(lab.vault_password), *extra],
            ROLLOUT_WAIT,
            profile=options.profile,
        )
    with console.phase("proof"):
        noted = ensure_account(lab)
        console.say("uploading a picture through node1 and fetching it from every node")
        served = prove(console, lab, noted["token"])
        rows = [{**state, "served": row["served"]} for state, row in zip(node_states(lab), served, strict=True)]
    flag = "" if lab.name == "lab" else f" --name {lab.name}"
    one = f"The site's address:  {held(lab)}\n" if noted.get("vip") else ""
    text = f"""
{table(rows)}

{one}Open in a browser:  {"  ".join(lab.url(node) for node in NODES)}
Sign in as:         {ACCOUNT} / {noted["password"]}     API token: {noted["token"]}
Break something:    docker kill {lab.container("node2")}     (silence: docker pause; then look again)
Repair it:          ./scripts/lab up{flag}
Look around:        ./scripts/lab status{flag}     ./scripts/lab ssh{flag} node1     full log: {console.log}
"""
    print(text)
    console.say(console.timings())


def command_status(lab: Lab, as_json: bool) -> None:
    """Print how the lab is, for people or for programs."""
    noted = lab.recall()
    if not noted.get("subnet") or not lab.inventory.exists():
        raise KitError(f"There is no lab '{lab.name}'; make it: ./scripts/lab up")
    if as_json:
        variables = lab.site_variables()
        nodes = [
            {
                "name": node,
                "url": lab.url(node),
                "mount": variables["tribrick_media_root"],
                "brick": variables["tribrick_brick_path"],
            }
            for node in NODES
        ]
        print(json.dumps({"nodes": nodes, "token": noted.get("token")}, indent=2))
        return
    print(f"lab '{lab.name}', Debian {noted['release']}, image {noted['kind']}, {noted['subnet']}")
    print(table([{**row, "address": lab.url(row["node"])} for row in node_states(lab)]))
    if noted.get("vip"):
        print(f"address {held(lab)}")
    others = {host: state for host, state in containers(lab).items() if host not in NODES}
    for host, state in others.items():
        print(f"{host}: {state}, {lab.addresses.get(host, '')}")


def command_ssh(lab: Lab, host: str, words: Sequence[str]) -> None:
    """Become ssh to a host; one word is a shell line, several are a program and its arguments."""
    if not lab.recall().get("subnet"):
        raise KitError(f"There is no lab '{lab.name}'; make it: ./scripts/lab up")
    if host not in lab.addresses:
        raise KitError(f"The lab has no host '{host}'; it has {', '.join(lab.addresses)}.")
    remote = list(words) if len(words) == 1 else [shlex.join(words)] if words else []
    os.execvp("ssh", [*lab.ssh(host), *remote])  # noqa: S606 - no shell is meant


def command_down(console: Console, lab: Lab) -> None:
    """Remove everything that belongs to the lab; images stay."""
    ensure_engine(console, ROOT / ".lab")
    playbook(
        console,
        "playbooks/lab_destroy.yml",
        ["--inventory=localhost,", "--extra-vars", json.dumps({"lab_name": lab.name})],
        CREATE_WAIT,
    )
    for directory in (lab.inventory, lab.state):
        if directory.exists():
            shutil.rmtree(directory)
    console.say(f"the lab '{lab.name}' is gone; its images stay for the next one")


def command_fault(console: Console, lab: Lab, options: argparse.Namespace) -> None:
    """Make a fault, or lift it."""
    from kit import faults

    if not lab.recall().get("subnet") or not containers(lab):
        raise KitError(f"There is no lab '{lab.name}'; make it: ./scripts/lab up")
    hosts = list(NODES) if options.hosts == "all" else options.hosts.split(",") if options.hosts else []
    fault = faults.make(lab, options.fault, hosts)
    where = ", ".join(fault.hosts)

    def lift() -> None:
        fault.lift()
        wait_for(console, f"the end of {fault.name}", fault.ended, deadline=120)
        console.say(f"{fault.name} on {where} is over; what it left behind heals from now on")

    if options.lift:
        lift()
        return
    if fault.name == faults.Flapping.name and options.seconds is None:
        raise KitError("flapping is made by the running command; say how long: --for 60s")
    try:
        fault.inject()
        console.say(f"{fault.name} on {where} holds: {fault.proof()}")
    except BaseException:
        fault.lift()
        raise
    if options.seconds is None:
        flag = "" if lab.name == "lab" else f" --name {lab.name}"
        target = "" if fault.database else f" {','.join(fault.hosts)}"
        console.say(f"lift it with: ./scripts/lab fault{flag} {fault.name}{target} --lift")
        return
    try:
        faults.stay(options.seconds)
    finally:
        lift()


def _seconds(text: str) -> float:
    unit = {"s": 1, "m": 60}.get(text[-1:], 0)
    if not unit or not text[:-1].isdigit() or int(text[:-1]) == 0:
        raise argparse.ArgumentTypeError("a time is a number with s or m: 30s, 2m")
    return float(int(text[:-1]) * unit)


def _list_of_faults() -> str:
    from kit.faults import FAULTS

    width = max(map(len, FAULTS))
    return "faults:\n" + "".join(f"  {name.ljust(width)}  {fault.summary}\n" for name, fault in FAULTS.items())


def _name(text: str) -> str:
    if not (
        text[:1].isalnum()
        and text.replace("-", "").isalnum()
        and text == text.lower()
        and text.isascii()
        and len(text) <= 24
    ):
        raise argparse.ArgumentTypeError("a lab's name has lower-case letters, digits and hyphens, at most 24")
    return text


def parser() -> argparse.ArgumentParser:
    """Describe the command line."""
    main_ = argparse.ArgumentParser(
        prog="./scripts/lab",
        description=__doc__,
        epilog=EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    named = argparse.ArgumentParser(add_help=False)
    named.add_argument("--name", type=_name, default="lab", help="which lab (default: lab)")
    base = argparse.ArgumentParser(add_help=False)
    base.add_argument("--debian", choices=sorted(images.CODENAMES), help="release (default: 13)")
    base.add_argument(
        "--image",
        choices=images.KINDS,
        help="ready: Debian's packages are preinstalled (default); bare: nothing is",
    )
    disked = argparse.ArgumentParser(add_help=False)
    disked.add_argument(
        "--disks",
        choices=DISKS,
        help="volume: bricks are Docker volumes on this machine's disk (default); xfs: each on a disk of its own",
    )
    disked.add_argument("--backend", choices=BACKENDS, help="where the media lie (default: volume)")
    disked.add_argument(
        "--spool",
        action=argparse.BooleanOptionalAction,
        help="keep uploads while the volume is away (docs/spool.md); without: as before, at first no",
    )
    disked.add_argument(
        "--vip",
        action=argparse.BooleanOptionalAction,
        help="one address for the site, which a node at a time holds; without: as before, at first no",
    )
    commands = main_.add_subparsers(dest="command", required=True, metavar="COMMAND")
    up = commands.add_parser("up", parents=[named, base, disked], help="create or repair, roll out, prove")
    up.add_argument("--outsider", action="store_true", help="one more host that belongs to nothing")
    up.add_argument("--no-site", action="store_true", help="stop before the rollout")
    up.add_argument("--profile", action="store_true", help="name the ten slowest tasks")
    up.add_argument(
        "-e",
        "--extra-vars",
        action="append",
        default=[],
        metavar="VARS",
        help="passed to site.yml, e.g. -e absent=node2",
    )
    status = commands.add_parser("status", parents=[named], help="how the nodes are")
    status.add_argument("--json", action="store_true", help="addresses and token for programs")
    ssh = commands.add_parser("ssh", parents=[named], help="a shell or a command on a host")
    ssh.add_argument("node", metavar="NODE")
    ssh.add_argument("words", nargs=argparse.REMAINDER, metavar="CMD")
    fault = commands.add_parser(
        "fault",
        parents=[named],
        help="break something on purpose, or lift it",
        epilog=_list_of_faults(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    fault.add_argument("fault", metavar="FAULT", help="see below")
    fault.add_argument("hosts", metavar="NODE", nargs="?", default="", help="node1, several with commas, or all")
    ending = fault.add_mutually_exclusive_group()
    ending.add_argument("--for", dest="seconds", type=_seconds, metavar="TIME", help="lift it after this time: 30s, 2m")
    ending.add_argument("--lift", action="store_true", help="end a fault that was made before")
    commands.add_parser("down", parents=[named], help="remove the lab")
    commands.add_parser("images", parents=[base], help="build what is missing of the images")
    commands.add_parser("prepare", parents=[named, base, disked], help="images and inventory, for a Molecule scenario")
    return main_


def _run(options: argparse.Namespace, console: Console) -> None:
    if options.command == "images":
        ensure_engine(console, ROOT / ".lab")
        with console.phase("images"):
            tag = images.ensure(console, options.debian or "13", options.image or "ready")
        console.say(f"{tag} is there; {console.timings()}")
        return
    lab = Lab(options.name)
    if options.command == "status":
        command_status(lab, options.json)
    elif options.command == "ssh":
        words = options.words[1:] if options.words[:1] == ["--"] else options.words
        command_ssh(lab, options.node, words)
    else:
        with lab.alone():
            if options.command == "fault":
                command_fault(console, lab, options)
            elif options.command == "up":
                command_up(console, lab, options)
            elif options.command == "down":
                command_down(console, lab)
            else:
                ensure_engine(console, ROOT / ".lab")
                prepare_as_asked(console, lab, options)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; errors are one sentence and exit code 1."""
    options = parser().parse_args(arguments)
    console = Console()
    try:
        _run(options, console)
    except (KitError, SiteError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("interrupted; run the same command again to go on", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
