"""./scripts/bench peers: programs on the nodes, what is written for others' programs, turns, cleaning up, figures."""

from __future__ import annotations

import argparse
import configparser
import hashlib
import json
import os
import select
import socket
import subprocess
import sys
import threading
import xml.etree.ElementTree as ET
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kit import bench, bench_peers, benchnode_peers, benchpeers
from kit.benchnode_peers import Told
from kit.lab import NODES
from kit.run import KitError

ROOT = Path(__file__).resolve().parents[3]
ADDRESSES = {node: f"192.0.2.{10 + number}" for number, node in enumerate(NODES)}


# The programs on the nodes


def told(path: Path, content: bytes) -> Told:
    return Told(str(path), len(content), hashlib.sha256(content).hexdigest())


def test_a_file_is_read_when_it_is_whole(tmp_path: Path) -> None:
    file, content = tmp_path / "a", os.urandom(1000)
    wanted = told(file, content)
    assert "FileNotFoundError" in str(benchnode_peers.look(wanted))
    file.write_bytes(content[:999])
    assert "999 of 1000" in str(benchnode_peers.look(wanted))
    file.write_bytes(bytes(1000))
    assert "other bytes" in str(benchnode_peers.look(wanted))
    late = threading.Timer(0.1, lambda: file.write_bytes(content))
    late.start()
    assert benchnode_peers.read_all([wanted], 10) == {"missing": 0}
    late.join()


def test_what_does_not_come_is_told(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    files = [told(tmp_path / name, name.encode()) for name in "abc"]
    answer = benchnode_peers.read_all(files, 0.05)
    assert answer["missing"] == 2 and "/b'" in answer["seen"]


class Program:
    """One of the two, as the bench runs it."""

    def __init__(self, *words: str, **environment: str) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", str(benchnode_peers.__file__), *words],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env={**os.environ, **environment},
        )  # fmt: skip

    def answer(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        assert select.select([self.process.stdout], [], [], 30)[0], "no answer in 30 s"
        answer: dict[str, Any] = json.loads(self.process.stdout.readline())
        return answer

    def ask(self, **command: Any) -> dict[str, Any]:
        assert self.process.stdin is not None
        self.process.stdin.write(json.dumps(command).encode() + b"\n")
        self.process.stdin.flush()
        return self.answer()

    def close(self) -> int:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        code = self.process.wait(30)
        self.process.stdout.close()
        return code


def free_port() -> str:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return str(probe.getsockname()[1])


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """A site with a directory as its volume."""
    (tmp_path / "media").mkdir()
    (tmp_path / "bench_peers_site.py").write_text(
        f"MEDIA_ROOT = {str(tmp_path / 'media')!r}\nSECRET_KEY = 'x'\nFILE_UPLOAD_PERMISSIONS = 0o644\n"
        "TRIBRICK = {'SENTINEL_ID': False, 'HASH_LEVELS': 1, 'HASH_WIDTH': 1, 'NODE': 'n'}\n",
        encoding="utf-8",
    )
    return {"DJANGO_SETTINGS_MODULE": "bench_peers_site", "PYTHONPATH": f"{ROOT / 'src'}:{tmp_path}"}


def test_files_are_stored_here_and_read_there(tmp_path: Path, environment: dict[str, str]) -> None:
    port, media = free_port(), tmp_path / "media"
    reader = Program("read", port, "127.0.0.1")
    assert reader.answer() == {"ready": int(port)}
    writer = Program("write", port, "127.0.0.1", **environment)
    assert writer.answer() == {"ready": 1}
    for way, root in (("ours", media), ("gluster", media), ("lsyncd", tmp_path / "peer")):
        single = {"way": way, "root": str(root), "size": 5000, "deadline": 10, "period": 0.0}
        assert len(writer.ask(do="latency", count=3, **single)["ms"]) == 3
        assert writer.ask(do="burst", count=4, **single)["seconds"] > 0
    # Ours lie in directories by hash.
    assert len(list(media.glob("bench-peers/?/*"))) == 7 and len(list(media.glob("bench-peers/*.jpg"))) == 7
    assert len(list((tmp_path / "peer").glob("bench-peers/*.jpg"))) == 7
    assert {file.stat().st_size for file in tmp_path.glob("*/bench-peers/**/*") if file.is_file()} == {5000}
    assert writer.close() == 0 and reader.close() == 0
    assert not (media / "bench-peers").exists()


def test_a_file_that_another_node_never_gets(tmp_path: Path, environment: dict[str, str]) -> None:
    """The reader sees another directory under the same path: nothing copies."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def nothing() -> None:
            connection, _ = listener.accept()
            with connection, connection.makefile("rw", encoding="utf-8") as stream:
                stream.readline()
                stream.write(json.dumps({"missing": 1, "seen": "it is empty here"}) + "\n")
                stream.flush()
                stream.readline()

        thread = threading.Thread(target=nothing, daemon=True)
        thread.start()
        writer = Program("write", str(listener.getsockname()[1]), "127.0.0.1", **environment)
        writer.answer()
        asked = {"way": "lsyncd", "root": str(tmp_path / "peer"), "size": 10, "deadline": 1}
        error = writer.ask(do="burst", count=1, **asked)["error"]
        assert "127.0.0.1 lacked 1 of 1" in error and "it is empty here" in error
        assert writer.close() != 0
        thread.join(10)


def test_a_reader_answers_its_writer_alone(tmp_path: Path) -> None:
    (tmp_path / "a").write_bytes(b"a")
    port = free_port()
    reader = Program("read", port, "192.0.2.1")
    reader.answer()
    with socket.create_connection(("127.0.0.1", int(port)), timeout=10) as stranger:
        asked = {"files": [told(tmp_path / "a", b"a")], "deadline": 1}
        stranger.sendall(json.dumps(asked).encode() + b"\n")
        try:
            assert stranger.recv(100) == b""
        except ConnectionResetError:
            pass
    assert reader.close() == 0


# What is written for others' programs


def test_only_our_key_opens_the_sshd() -> None:
    lines = dict(line.split(" ", 1) for line in benchpeers.sshd_config("/p").splitlines())
    assert lines["AuthorizedKeysFile"] == "/p/authorized_keys" and lines["AllowUsers"] == "root"
    assert lines["PasswordAuthentication"] == lines["KbdInteractiveAuthentication"] == "no"
    assert lines["Port"] != "22" and f"Port {lines['Port']}\n" in benchpeers.ssh_config("/p")
    assert "StrictHostKeyChecking" not in benchpeers.ssh_config("/p"), "ssh asks, and in batch mode that is a refusal"


def test_lsyncd_goes_to_both_others() -> None:
    text = benchpeers.lsyncd_lua("/d", ["a:/d", "b:/d"], "ssh -F /c")
    assert text.count("sync {") == 2 and text.count("delay = 0") == 2 and text.count("{") == text.count("}")
    assert 'target = "b:/d/"' in text and 'rsh = "ssh -F /c"' in text


def test_syncthing_knows_all_and_asks_nobody_outside() -> None:
    devices = {node: (f"ID-{node}", address) for node, address in ADDRESSES.items()}
    root = ET.fromstring(benchpeers.syncthing_xml("/d", "node2", devices))  # noqa: S314  our own text
    assert {one.get("id") for one in root.findall("folder/device")} == {f"ID-{node}" for node in NODES}
    assert len(root.findall("device")) == 3
    assert root.findtext("options/listenAddress", "").startswith(f"tcp://{ADDRESSES['node2']}:")
    outside = ("globalAnnounceEnabled", "localAnnounceEnabled", "relaysEnabled", "natEnabled", "crashReportingEnabled")
    assert {root.findtext(f"options/{name}") for name in outside} == {"false"}


def test_cephs_and_moosefs_configuration() -> None:
    ceph = configparser.ConfigParser(interpolation=None)
    ceph.read_string(benchpeers.ceph_conf("/p", "/l", "f", ADDRESSES))
    values = ceph["global"]
    assert all(f"[v2:{address}:{benchpeers.CEPH_PORT}]" in values["mon host"] for address in ADDRESSES.values())
    assert (values["osd pool default size"], values["osd pool default min size"]) == ("3", "2")
    assert values["osd class dir"] == "/l/rados-classes"
    files = benchpeers.moosefs_files("/p", "192.0.2.10", "192.0.2.0/24")
    assert files["exports.cfg"].startswith("192.0.2.0/24 /") and "MASTER_HOST = 192.0.2.10" in files["chunkserver.cfg"]
    # The servers' port at both ends.
    port = benchpeers.MOOSEFS_PORT + 1
    assert f"MATOCS_LISTEN_PORT = {port}" in files["master.cfg"] and f"MASTER_PORT = {port}" in files["chunkserver.cfg"]


def test_ports_are_nobody_elses() -> None:
    moosefs = range(benchpeers.MOOSEFS_PORT, benchpeers.MOOSEFS_PORT + 4)
    ceph = range(benchpeers.CEPH_PORTS[0], benchpeers.CEPH_PORTS[1] + 1)
    ports = [*moosefs, *ceph, benchpeers.CEPH_PORT, benchpeers.SSH_PORT, benchpeers.SYNCTHING_PORT]
    assert len(set(ports)) == len(ports)
    assert all(port < 24_007 for port in ports), "the kit's firewall filters GlusterFS's ports and the bricks'"


# The ground: scripts of a node run here


@pytest.fixture
def ground(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> benchpeers.Field:
    """Scripts of all nodes run here, in one place, with programs that note how they were called."""
    programs, debs = tmp_path / "bin", tmp_path / "place" / "bench-peers" / "debs"
    programs.mkdir()
    for name, script in {
        "systemctl": f'echo "$@" >>{tmp_path}/systemctl',
        "systemd-run": f'echo "$@" >>{tmp_path}/systemd-run; while test "$1" != sh; do shift; done; exec "$@"',
        "apt-cache": 'case "$3" in moosefs*) exit 100;; *) echo "Package: $3";; esac',
        "apt-get": f'echo "$@" >>{tmp_path}/apt-get; test "$2" = update || touch {debs}/a.deb',
        "dpkg-deb": 'test -e "$2" && mkdir -p "$3/usr/lib/x86_64-linux-gnu"',
        "umount": f'echo "$@" >>{tmp_path}/umount',
    }.items():
        (programs / name).write_text(f"#!/bin/sh\n{script}\n", encoding="utf-8")
        (programs / name).chmod(0o755)
    (tmp_path / "place").mkdir()
    monkeypatch.setattr(benchpeers, "FREE_MIB", 1)
    calls = threading.Lock()

    def inside(_lab: Any, _node: str, script: str, deadline: float = 30.0, check: bool = True) -> str:
        script = script.replace("export PATH=", f"export PATH={programs}:")
        environment = {**os.environ, "PATH": f"{programs}:{os.environ['PATH']}"}
        with calls:  # all nodes are one here
            done = subprocess.run(
                ["sh", "-c", script], capture_output=True, text=True, timeout=deadline, env=environment
            )
        if check and done.returncode:
            raise KitError(done.stderr.strip())
        return done.stdout

    monkeypatch.setattr(benchpeers, "inside", inside)
    values = {
        "tribrick_brick_mount": str(tmp_path / "place"),
        "tribrick_user": "u",
        "tribrick_media_root": "/srv/media",
    }
    lab: Any = SimpleNamespace(
        addresses=ADDRESSES, site_variables=lambda: values, recall=lambda: {"subnet": "192.0.2.0/24"}
    )
    return benchpeers.Field(lab, tmp_path / "log", lambda _text: None)


def test_packages_are_unpacked_and_not_installed(ground: benchpeers.Field, tmp_path: Path) -> None:
    ground.make()
    ground.unpack(["lsyncd", "rsync"])
    called = (tmp_path / "apt-get").read_text(encoding="utf-8").splitlines()
    installs = [line for line in called if "install" in line.split()]
    assert len(installs) == len(NODES)
    assert all("--download-only" in line and line.endswith("lsyncd rsync") for line in installs)
    assert Path(ground.libraries).is_dir() and not Path(f"{ground.place}/debs").exists()
    ground.unpack([])
    assert (tmp_path / "apt-get").read_text(encoding="utf-8").splitlines() == called


def test_a_disk_that_is_too_small(ground: benchpeers.Field, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(benchpeers, "FREE_MIB", 10**9)
    with pytest.raises(KitError, match=r"MiB free below .*; this bench needs 1000000000"):
        ground.make()


def test_a_unit_has_its_name_its_log_and_the_programs(ground: benchpeers.Field, tmp_path: Path) -> None:
    ground.start("node1", "moosefs-master", f"printenv LD_LIBRARY_PATH >'{tmp_path}/it is'", "u")
    called = (tmp_path / "systemd-run").read_text(encoding="utf-8")
    assert "--unit=tribrick-bench-peer-moosefs-master" in called and "User=u" in called
    assert f"append:{ground.place}/moosefs/master.log" in called
    assert (tmp_path / "it is").read_text(encoding="utf-8").startswith(ground.libraries)


def test_all_is_ended_and_removed_also_after_an_interruption(ground: benchpeers.Field, tmp_path: Path) -> None:
    left = Path(ground.place) / "left"
    left.mkdir(parents=True)

    def interrupted() -> None:
        with benchpeers.field(ground.lab, tmp_path / "log", lambda _text: None) as made:
            assert not left.exists(), "of a run that was killed"
            (Path(made.place) / "new").mkdir()
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert not Path(ground.place).exists()
    ended = (tmp_path / "systemctl").read_text(encoding="utf-8").splitlines()
    assert ended == ["stop tribrick-bench-peer-*"] * (2 * len(NODES))


def test_ceph_ends_its_monitors_last(ground: benchpeers.Field, tmp_path: Path) -> None:
    benchpeers.CephFS(ground).stop()
    ended = (tmp_path / "systemctl").read_text(encoding="utf-8").splitlines()
    assert [line.rpartition("-")[2] for line in ended[:: len(NODES)]] == ["mount*", "mds*", "osd*", "mon*"]
    benchpeers.Rsync(ground).stop()
    ended = (tmp_path / "systemctl").read_text(encoding="utf-8").splitlines()
    assert ended[-1] == "stop tribrick-bench-peer-rsync*"


def test_a_unit_that_ends_while_it_is_stopped(ground: benchpeers.Field, tmp_path: Path) -> None:
    program = tmp_path / "bin" / "systemctl"
    script = f'#!/bin/sh\necho "$@" >>{tmp_path}/systemctl; test $(wc -l <{tmp_path}/systemctl) -ge '
    program.write_text(f"{script}2 || exit 5\n", encoding="utf-8")
    benchpeers.Lsyncd(ground).stop()
    assert len((tmp_path / "systemctl").read_text(encoding="utf-8").splitlines()) == 1 + len(NODES)
    program.write_text(f"{script}100 || exit 5\n", encoding="utf-8")
    with pytest.raises(KitError):
        benchpeers.Lsyncd(ground).stop()


def test_waiting_tells_what_was_seen(ground: benchpeers.Field) -> None:
    ground.wait("it", "node1", "true")
    with pytest.raises(KitError, match="for it on node1; at the end: not today"):
        ground.wait("it", "node1", "{ echo not today; false; }", deadline=0.1)
    with pytest.raises(KitError, match="at the end: not yet"):
        ground.wait("it", "node1", "false", deadline=0.1)


def test_logs_are_kept(ground: benchpeers.Field) -> None:
    Path(ground.place, "lsyncd").mkdir(parents=True)
    Path(ground.place, "lsyncd", "lsyncd.log").write_text("it failed\n", encoding="utf-8")
    ground.keep_logs("lsyncd")
    assert ground.log.read_text(encoding="utf-8").count("it failed") == len(NODES)


# Turns


class FakePeer:
    """Notes when it runs."""

    name, needs_ssh, packages, period, root = "lsyncd", False, ("x",), 0.5, "/d"
    lacks = ""

    def __init__(self, ground: Any) -> None:
        self.ground = ground

    @classmethod
    def missing(cls, _ground: Any) -> str:
        return cls.lacks

    def prepare(self) -> None:
        self.ground.seen.append("prepare")

    def start(self) -> None:
        self.ground.seen.append("start")

    def stop(self) -> None:
        self.ground.seen.append("stop")


class FakeRemote:
    """In place of the programs on the nodes."""

    seen: list[str] = []  # noqa: RUF012  each test begins with a new one, see the fixture
    fails = ""

    def __init__(self, _ssh: Any, _program: Path, words: list[str], _log: Path) -> None:
        self.seen.append(" ".join(words))

    def answer(self, _deadline: float) -> dict[str, Any]:
        return {"ready": 1}

    def ask(self, command: dict[str, Any], _deadline: float) -> dict[str, Any]:
        if command["way"] == self.fails:
            raise KitError("node2 lacked 1 of 1 files")
        self.seen.append(f"{command['way']} {command['do']} {command['count']} {command.get('period')}")
        slow = 4.0 if command["way"] == "lsyncd" else 1.0
        return {"ms": [10.0 * slow] * command["count"], "seconds": slow * 2}

    def __enter__(self) -> FakeRemote:
        return self

    def __exit__(self, *_error: object) -> None:
        self.seen.append("closed")


@pytest.fixture
def lab(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A lab in which nothing happens; all that is done is noted in one list."""
    seen = list[str]()
    monkeypatch.setattr(FakeRemote, "seen", seen)
    monkeypatch.setattr(FakeRemote, "fails", "")
    monkeypatch.setattr(FakePeer, "lacks", "")

    class FakeField(benchpeers.Field):
        def __init__(self, *_words: Any) -> None:
            self.seen, self.media, self.log = seen, "/srv/media", tmp_path / "bench.log"

        def clear(self) -> None:
            seen.append("clear")

        def make(self) -> None:
            seen.append("make")

        def unpack(self, packages: Any) -> None:
            seen.append(f"unpack {' '.join(packages)}")

        def ssh(self) -> None:
            seen.append("ssh")

        def keep_logs(self, peer: str) -> None:
            seen.append(f"logs of {peer}")

    monkeypatch.setattr(benchpeers, "Field", FakeField)
    monkeypatch.setattr(bench_peers, "PEERS", {"lsyncd": FakePeer})
    monkeypatch.setattr(bench_peers, "Remote", FakeRemote)
    return SimpleNamespace(
        state=tmp_path, ssh=lambda _node: [], addresses=ADDRESSES, seen=seen,
        site_variables=lambda: {"tribrick_brick_ports": {"last": 49251}},
    )  # fmt: skip


def go(lab: Any, blocks: int = 1) -> bench.Figures:
    options = argparse.Namespace(peer=None, blocks=blocks, files=10)
    return bench_peers.run(lab, options, lambda _text: None)


def test_a_peer_runs_in_its_turn_only(lab: Any) -> None:
    figures = go(lab, blocks=2)
    bench.check_flat(figures)
    steps = [step for step in lab.seen if step.endswith("None") or step in ("start", "stop", "clear", "closed")]
    one = ["ours burst 10 None", "gluster burst 10 None", "start", "lsyncd burst 10 None", "stop"]
    other = ["start", "lsyncd burst 10 None", "stop", "gluster burst 10 None", "ours burst 10 None"]
    # The programs on the nodes end before the ground is cleared.
    assert steps == ["clear", *one, *other, "closed", "closed", "closed", "clear"]
    assert f"lsyncd latency {bench_peers.COUNT} 0.5" in lab.seen and f"ours latency {bench_peers.COUNT} 0.0" in lab.seen
    assert lab.seen.count(f"lsyncd latency {bench_peers.WARM_UP} 0.0") == 2
    assert (figures["lsyncd_p50_ms"], figures["ours_files_per_second"]) == (40.0, 5.0)
    assert (figures["lsyncd_speed_to_ours"], figures["lsyncd_files_to_ours"]) == (0.25, 0.25)
    assert "ours_files_to_ours" not in figures
    assert "read 49251 192.0.2.10" in lab.seen and "write 49251 192.0.2.11 192.0.2.12" in lab.seen


def test_a_peer_that_fails_is_no_figure(lab: Any) -> None:
    FakeRemote.fails = "lsyncd"
    with pytest.raises(KitError, match=r"lsyncd: node2 lacked 1 of 1 files \(what it said: .*bench.log; without it"):
        go(lab)
    assert lab.seen[-6:] == ["logs of lsyncd", "stop", "closed", "closed", "closed", "clear"]


def test_a_release_without_a_package(lab: Any) -> None:
    FakePeer.lacks = "moosefs-master"
    figures = go(lab)
    assert figures["lsyncd_left_out"] == "this release has no moosefs-master" and "lsyncd_p50_ms" not in figures
    assert "prepare" not in lab.seen and "unpack " in lab.seen
    text = bench_peers.lines(figures | {"debian": "12"})
    assert text[-1] == "lsyncd: left out, this release has no moosefs-master"


def test_which_package_is_missing(ground: benchpeers.Field) -> None:
    assert benchpeers.MooseFS.missing(ground) == "moosefs-master, moosefs-chunkserver, moosefs-client"
    assert benchpeers.CephFS.missing(ground) == ""


def test_ssh_is_set_up_for_those_that_need_it(lab: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    go(lab)
    assert "ssh" not in lab.seen
    monkeypatch.setattr(FakePeer, "needs_ssh", True)
    go(lab)
    assert lab.seen.count("ssh") == 1


def test_tables_and_picture(lab: Any) -> None:
    figures = go(lab, blocks=2) | {"debian": "13"}
    text = bench_peers.lines(figures)
    assert len(text) == 2 + 3 and text[2].rstrip().endswith("-") and "0.25 (0.25-0.25)" in text[4]
    assert "40.0" in text[4]
    drawn = bench_peers.picture(figures)
    assert ">lsyncd<" in drawn and ">gluster<" in drawn and ">ours<" not in drawn


def test_every_peer_has_a_label() -> None:
    assert set(bench_peers.LABELS) == {"ours", "gluster", *benchpeers.PEERS}
    assert all(name == kind.name and kind.packages for name, kind in benchpeers.PEERS.items())
