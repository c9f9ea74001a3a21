"""A node loses its disk, glusterd's state, its place in the pool, or all of it; the operator's playbook mends that."""

from __future__ import annotations

import datetime
import subprocess
import sys

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization

from faults.history import content
from helpers import CLIENT, LONG, NODES, chance, wait_until
from judged import faults, goes_on, nodes, others, verdict
from kit.faults import reach
from kit.lab import NODES as KIT_NODES
from kit.lab import ROOT, SPARE, containers, create, http, prepare
from kit.run import capture
from mending import fault, holds, keep, kill, playbook, recovery, turn

WHATS = ("upload", "read")
STATE = "/var/lib/glusterd"


def of(node: str) -> tuple[str, str]:
    return f"--extra-vars=node={node}", "--extra-vars=confirm=yes"


def peers(rig, host: str) -> dict[str, str]:
    """Return the other nodes as one sees them, with their states."""
    tree = rig.gluster(host, "peer status")
    return {one.findtext("hostname", ""): one.findtext("stateStr", "") for one in tree.iter("peer")}


def told(rig, node: str, *words: str) -> None:
    """The check of a node's health says what is wrong and what to run."""
    page = rig.run_root(node, "tribrick-health", timeout=120).stdout
    assert all(one in page for one in words), f"{words} are not in:\n{page}"


def well(rig) -> None:
    """The pool is whole, and the page that an operator looks at names nothing to do."""
    for node in NODES:
        assert peers(rig, node) == dict.fromkeys(others(node), "Peer in Cluster")
    playbook(rig, "check_health").good()


@pytest.mark.parametrize(("name", "node"), faults("disk-wiped"))
def test_the_disk_is_replaced_at_the_same_path(run, rig, name, node):
    with run.nemesis.under(name, [node], ["recover_brick", *of(node)]):
        goes_on(run, NODES, WHATS, 90)
        told(rig, node, "it was wiped, or its disk replaced", f"recover_brick.yml -e node={node} -e confirm=yes")
        if turn("recover_brick"):
            kill(run, rig, "recover_brick", *of(node))
    well(rig)


@pytest.mark.parametrize("node", nodes("glusterd's state lost"))
def test_glusterds_state_is_lost(run, rig, node):
    pattern = f"pgrep -f 'glusterfs[d] .*--brick-name {rig.brick}'"
    brick = rig.root(node, pattern)
    with fault(run, "glusterd's state lost", node):
        rig.root(node, "systemctl kill -s KILL --kill-whom=main glusterd; systemctl stop glusterd", timeout=120)
        rig.root(node, f"rm -r {STATE}/*; systemctl reset-failed glusterd; systemctl start glusterd", timeout=120)
        assert not peers(rig, node)
        assert rig.root(node, pattern) == brick
        told(rig, node, "glusterd knows no other node", f"recover_glusterd.yml -e node={node} -e confirm=yes")
        holds(run, "glusterd knows no other node; its brick is the same process", node)
        goes_on(run, NODES, WHATS, 90)
        recovery(run, rig, "recover_glusterd", *of(node))
        run.history.mark("lift", node)
    well(rig)


@pytest.mark.parametrize("node", nodes("peer rejected"))
def test_the_pool_rejects_a_node(run, rig, node):
    with fault(run, "peer rejected", node):
        rig.root(node, "systemctl stop glusterd", timeout=120)
        # Another configuration of the same version: nobody can tell which one is newer.
        info = f"{STATE}/vols/{rig.volume}/info"
        rig.root(node, f"sed -i s/^network.ping-timeout=.*/network.ping-timeout=21/ {info}")
        rig.root(node, "systemctl start glusterd", timeout=120)
        for other in others(node):
            wait_until(
                f"{other} to reject {node}", lambda other=other: peers(rig, other)[node] == "Peer Rejected", 60,
            )  # fmt: skip
        told(rig, node, f"the pool rejects {node}", f"recover_glusterd.yml -e node={node} -e confirm=yes")
        holds(run, f"{' and '.join(others(node))} reject {node}", node)
        goes_on(run, NODES, WHATS, 90)
        recovery(run, rig, "recover_glusterd", *of(node))
        run.history.mark("lift", node)
        assert rig.volume_state(node)["options"]["network.ping-timeout"] == "20"
    well(rig)


def lose(run, rig, node: str) -> None:
    """Take a node and all that its disk held away."""
    disk = rig.lab.disks[node]
    capture(["docker", "rm", "--force", "--volumes", rig.container(node)], deadline=60)
    disk.unmount()
    disk.format()
    assert node not in containers(rig.lab)
    assert reach(rig.address(node)) != "open"
    holds(run, f"{node} and its disk are gone", node)


def arrive(run, rig, node: str) -> None:
    """A host without anything, and an empty disk."""
    rig.lab.disks[node].mount()
    create(run.console, rig.lab, rig.lab.recall(), outsider=False)
    assert not rig.root(node, f"ls -A {rig.brick} 2>/dev/null; cat {STATE}/glusterd.info 2>/dev/null || :")


def rename(run, rig, old: str, new: str) -> None:
    """The operator writes the new node into the inventory where the old one stood."""
    numbers = {SPARE[0]: SPARE[1]} | KIT_NODES
    names = [new if node == old else node for node in rig.lab.members]
    rig.lab.note(members={name: numbers[name] for name in names})
    prepare(run.console, rig.lab, None, None)


def same_name(run, rig, node: str) -> None:
    """A fresh host gets its name and address, and an empty disk."""
    lost = f"glusterd on {node} does not answer"
    told(rig, others(node)[0], lost, f"recover_node.yml -e node={node} -e confirm=yes")
    arrive(run, rig, node)
    recovery(run, rig, "recover_node", *of(node))


def another_name(run, rig, node: str) -> None:
    """A host of another name gets its place; then that one is lost, and one of the old name takes the place back."""
    spare, left = SPARE[0], others(node)
    playbook(rig, "recover_node", *of(node), f"--extra-vars=instead_of={node}").refused(f"still has {node}")
    rename(run, rig, node, spare)
    arrive(run, rig, spare)
    playbook(rig, "check_preflight").refused("recover_node.yml -e node=NEW -e instead_of=LOST")
    recovery(run, rig, "recover_node", *of(spare), f"--extra-vars=instead_of={node}")
    for host in (*left, spare):
        assert peers(rig, host) == dict.fromkeys({*left, spare} - {host}, "Peer in Cluster")
    options = rig.volume_state(left[0])["options"]
    assert sorted(options["auth.ssl-allow"].split(",")) == sorted([*left, spare])
    assert sorted(options["auth.allow"].split(",")) == sorted(rig.lab.addresses[host] for host in (*left, spare))
    name = keep(run, rig, "through-the-spare", 70_000, spare)
    for host in (*left, spare):
        status, body = http("GET", f"{rig.lab.url(host)}/media/{name}")
        assert (status, body) == (200, content(run.seed, "through-the-spare", 70_000)), host
    lose(run, rig, spare)
    rename(run, rig, spare, node)
    arrive(run, rig, node)
    recovery(run, rig, "recover_node", *of(node), f"--extra-vars=instead_of={spare}")


WAYS = (same_name, another_name)


@pytest.mark.parametrize("way", WAYS if LONG else [chance("node lost").choice(WAYS)])
@pytest.mark.parametrize("node", nodes("node lost"))
def test_a_node_is_lost_for_good(run, rig, node, way):
    with fault(run, "node lost", node):
        lose(run, rig, node)
        goes_on(run, others(node), WHATS, 90)
        way(run, rig, node)
        run.history.mark("lift", node)
    goes_on(run, NODES, WHATS, 90)
    well(rig)


BETWEEN = CLIENT.rpartition("/")[0]
# Certificate -> its key.
PAIRS = {"/etc/ssl/glusterfs.pem": "/etc/ssl/glusterfs.key"} | {
    f"{BETWEEN}/{one}.crt": f"{BETWEEN}/{one}.key" for one in ("node", "client")
}
RENEWAL = "renew_certificates", "--extra-vars=confirm=yes"


def run_out(rig, node: str) -> None:
    """Replace a node's certificates by ones for the same keys and names that ended an hour ago."""
    values = rig.secrets()
    key = serialization.load_pem_private_key(values["vault_tribrick_gluster_ca_key"].encode(), None)
    end = datetime.datetime.now(datetime.timezone.utc) - datetime.timedelta(hours=1)
    for path in PAIRS:
        old = x509.load_pem_x509_certificate(rig.root(node, f"cat {path}").encode())
        builder = x509.CertificateBuilder(old.issuer, old.subject, old.public_key(), x509.random_serial_number())
        builder = builder.not_valid_before(end - datetime.timedelta(days=9)).not_valid_after(end)
        for one in old.extensions:
            builder = builder.add_extension(one.value, one.critical)
        pem = builder.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)
        rig.root(node, f"cat >{path}", text_in=pem.decode())
    rig.root(node, "systemctl reload nginx")


def serials(rig) -> dict[tuple[str, str], tuple[str, str]]:
    """Return (node, certificate) -> its serial number, and the hash of its public key."""
    script = "openssl x509 -noout -serial -in {0}; openssl x509 -noout -pubkey -in {0} | sha256sum"
    return {
        (node, path): tuple(rig.root(node, script.format(path)).split()[:2]) for node in NODES for path in PAIRS
    }  # fmt: skip


def believed(rig, node: str) -> list[str]:
    """Return the CAs that a node believes, for GlusterFS, by their fingerprints."""
    text = rig.root(node, "cat /etc/ssl/glusterfs.ca")
    return [one.fingerprint(hashes.SHA256()).hex() for one in x509.load_pem_x509_certificates(text.encode())]


def renewed(rig, before) -> None:
    """Every key and certificate is another one, they fit and hold, and everybody speaks to everybody with them."""
    after = serials(rig)
    for which, (serial, key) in after.items():
        assert serial != before[which][0], f"{which}: the certificate is the old one"
        assert key != before[which][1], f"{which}: the key is the old one"
    for node in NODES:
        rig.root(node, "openssl verify -CAfile /etc/ssl/glusterfs.ca /etc/ssl/glusterfs.pem")
        for other in others(node):
            assert rig.peer(node, "GET", other, "/hashes/walk")[0] == 200
    # Each brick has the self-heal daemons and the mounts of all nodes.
    tree = rig.gluster("node1", f"volume status {rig.volume} clients")
    for one in tree.iter("clientsStatus"):
        hosts = [(client.text or "").rpartition(":")[0] for client in one.iter("hostname")]
        assert all(hosts.count(rig.address(node)) >= 2 for node in NODES), hosts


@pytest.mark.parametrize("node", nodes("certificates run out"))
def test_all_certificates_have_run_out(run, rig, node):
    """Of all nodes, as they were made on one day. What is connected stays so; one node restarts and is not let in."""
    before = serials(rig)
    with fault(run, "certificates run out", node):
        for one in NODES:
            run_out(rig, one)
        rig.root(node, "/usr/local/lib/tribrick/stop-bricks; systemctl restart glusterd tribrick-bricks", timeout=120)
        for other in others(node):
            tree = rig.gluster(other, "peer status")
            seen = {peer.findtext("hostname"): peer.findtext("connected") for peer in tree.iter("peer")}
            assert seen[node] == "0", f"{other} was to have lost {node}: {seen}"
        assert rig.run_root(node, "openssl verify -CAfile /etc/ssl/glusterfs.ca /etc/ssl/glusterfs.pem").returncode != 0
        assert rig.peer(node, "GET", others(node)[0], "/hashes/walk")[0] in (0, 400)
        told(rig, node, "ran out on", "renew_certificates.yml -e confirm=yes")
        holds(run, f"{node} was restarted, and no other node lets it in", node)
        goes_on(run, others(node), WHATS, 90)
        recovery(run, rig, *RENEWAL)
        run.history.mark("lift", node)
    renewed(rig, before)
    well(rig)


def test_the_ca_is_exchanged(run, rig):
    """Under load, one node after the other; the old CA is worth nothing afterwards."""
    before, old = serials(rig), believed(rig, "node1")
    with fault(run, "CA exchanged", ",".join(NODES)):
        password = f"--vault-password-file={rig.lab.vault_password}"
        words = [sys.executable, "-m", "kit.new_ca", str(rig.lab.inventory), password]
        subprocess.run(words, cwd=ROOT, check=True, timeout=60)
        playbook(rig, "deploy_volume").refused("the CA is being exchanged", "renew_certificates.yml")
        holds(run, "the vault has another CA than the nodes, and a rollout refuses", ",".join(NODES))
        recovery(run, rig, *RENEWAL)
        run.history.mark("lift", ",".join(NODES))
    goes_on(run, NODES, WHATS, 90)
    renewed(rig, before)
    for node in NODES:
        assert len(believed(rig, node)) == 1 and believed(rig, node) != old
    well(rig)
    assert not any(playbook(rig, *RENEWAL).good().changed().values())
    assert not any(playbook(rig, "deploy_volume").good().changed().values())


def test_verdict(run):
    verdict(run)
