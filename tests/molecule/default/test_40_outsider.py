"""An outsider in the same network: what is closed to it, and that a certificate alone opens nothing."""

from __future__ import annotations

import datetime

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import rsa
from cryptography.x509.oid import NameOID

from helpers import LONG, NODES, wait_until

TARGETS = NODES if LONG else ("node1",)
CONNECT = """
python3 - {address} {port} <<'END'
import socket, sys
s = socket.socket(); s.settimeout(2)
try:
    s.connect((sys.argv[1], int(sys.argv[2]))); print("open")
except TimeoutError:
    print("silent")
except OSError as error:
    print("refused", error)
END
"""


def connect(rig, source, target, port):
    return rig.root(source, CONNECT.format(address=rig.address(target), port=port)).split()[0]


def brick_port(rig, node):
    lines = rig.root(node, "ss -Hltnp").splitlines()
    return next(int(line.split()[3].rsplit(":", 1)[1]) for line in lines if '"glusterfsd"' in line)


@pytest.mark.parametrize("target", NODES)
def test_outsider_reaches_the_web_but_not_gluster(rig, target):
    port = brick_port(rig, target)
    assert connect(rig, "outsider", target, 80) == "open"  # it can reach the node at all
    assert connect(rig, "outsider", target, 24007) == "silent"
    assert connect(rig, "outsider", target, port) == "silent"
    peer = next(node for node in NODES if node != target)
    assert connect(rig, peer, target, 24007) == "open"  # both listen
    assert connect(rig, peer, target, port) == "open"


def test_outsider_does_not_reach_the_database(rig):
    assert connect(rig, "outsider", "db1", 22) == "open"
    assert connect(rig, "outsider", "db1", 5432) == "silent"
    assert connect(rig, "node1", "db1", 5432) == "open"


# --- behind the firewall


def sets(rig, node):
    """The sets of the kit's table that let peers in."""
    names = rig.root(node, "nft list table inet tribrick").split()
    return [names[i + 1] for i, word in enumerate(names[:-1]) if word == "set" and names[i + 1].endswith("_ipv4")]


def clean_outsider(rig):
    rig.root("outsider", """
        systemctl stop glusterd; pkill glusterfsd; pkill -x glusterfs; pkill -x glusterd; umount -l /mnt 2>/dev/null
        rm -rf /etc/ssl/glusterfs.* /var/lib/glusterd/secure-access /var/lib/glusterd/peers/* /var/log/glusterfs/*
        true""")


@pytest.fixture(scope="module")
def let_in(rig):
    """The outsider's address is allowed in every firewall, so that only TLS stands in its way."""
    address = rig.address("outsider")
    before = rig.volume_state()["options"]["auth.allow"]
    for node in NODES:
        for name in sets(rig, node):
            rig.root(node, f"nft add element inet tribrick {name} '{{ {address} }}'")
    rig.gluster("node1", f"volume set {rig.volume} auth.allow {before},{address}")
    clean_outsider(rig)
    try:
        assert connect(rig, "outsider", "node1", 24007) == "open"
        yield
    finally:
        clean_outsider(rig)
        rig.gluster("node1", f"volume set {rig.volume} auth.allow {before}")
        for node in NODES:
            rig.root(node, "systemctl reload tribrick-firewall.service")
    assert connect(rig, "outsider", "node1", 24007) == "silent"


def give_certificate(rig, name):
    """Give the outsider a certificate for a name, signed by the pool's own CA."""
    secrets = rig.secrets()
    ca = x509.load_pem_x509_certificate(secrets["vault_tribrick_gluster_ca_certificate"].encode())
    ca_key = serialization.load_pem_private_key(secrets["vault_tribrick_gluster_ca_key"].encode(), None)
    key = rsa.generate_private_key(65537, 2048)
    now = datetime.datetime.now(datetime.timezone.utc)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)]))
        .issuer_name(ca.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(ca_key, hashes.SHA256())
    )
    files = {
        "pem": certificate.public_bytes(serialization.Encoding.PEM).decode(),
        "key": key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.TraditionalOpenSSL,
                                 serialization.NoEncryption()).decode(),
        "ca": secrets["vault_tribrick_gluster_ca_certificate"],
    }
    for suffix, text in files.items():
        rig.root("outsider", f"cat >/etc/ssl/glusterfs.{suffix}", text_in=text)
    rig.root("outsider", "mkdir -p /var/lib/glusterd && touch /var/lib/glusterd/secure-access")


def mount(rig, server="node1", patience=25):
    """Try to mount the volume on the outsider; return whether a file could be listed, and what was said."""
    done = rig.run_root("outsider", f"mount -t glusterfs {server}:/{rig.volume} /mnt && ls -a /mnt", timeout=patience)
    ok = done.returncode == 0 and ".tribrick-volume" in done.stdout
    log = rig.run_root("outsider", "tail -n 30 /var/log/glusterfs/mnt.log").stdout
    rig.root("outsider", "umount -l /mnt 2>/dev/null; pkill -x glusterfs; pkill -x glusterfsd; true")
    return ok, done.stdout + done.stderr + log


def test_firewall_alone_keeps_the_outsider_from_gluster(rig):
    # Before `let_in`: nothing but the firewall is asked here.
    # Nothing answers, so only patience ends these.
    ok, said = mount(rig, patience=8)
    assert not ok, said
    done = rig.run_root("outsider", "gluster --mode=script --remote-host=node1 volume list", timeout=8)
    assert done.returncode != 0
    assert rig.volume not in done.stdout
    clean_outsider(rig)


@pytest.mark.parametrize("target", TARGETS)
def test_without_certificate_nothing_opens(rig, let_in, target):
    clean_outsider(rig)
    ok, said = mount(rig, target)
    assert not ok, said
    done = rig.run_root("outsider", f"gluster --mode=script --remote-host={target} volume list", timeout=20)
    assert done.returncode != 0
    assert rig.volume not in done.stdout


@pytest.mark.parametrize("target", TARGETS)
def test_without_certificate_no_probe(rig, let_in, target):
    clean_outsider(rig)
    rig.root("outsider", "systemctl start glusterd", timeout=90)
    try:
        done = rig.run_root("outsider", f"gluster --mode=script peer probe {target}", timeout=40)
        assert done.returncode != 0, done.stdout
        peers = rig.gluster(target, "pool list")
        assert sorted(p.findtext("hostname") for p in peers.iter("peer")) == sorted({*NODES, "localhost"} - {target})
    finally:
        clean_outsider(rig)


def test_certificate_with_a_wrong_name_does_not_mount(rig, let_in):
    clean_outsider(rig)
    give_certificate(rig, "node2")  # a right name here mounts, so that the refusal below is about the name
    ok, said = mount(rig)
    assert ok, f"the positive control failed, so the test proves nothing: {said}"
    clean_outsider(rig)
    give_certificate(rig, "outsider")
    ok, said = mount(rig)
    assert not ok, said


def test_the_pool_is_unharmed(rig):
    wait_until("all bricks online", lambda: sorted(rig.bricks_online()) == sorted(NODES), 30)
    assert rig.upload("node1")["node"] == "node1"
