"""Copying a brick into an empty one, on real directories with real extended attributes (as root, as on a node)."""

from __future__ import annotations

import fcntl
import io
import json
import os
import shutil
import socket
import threading
import uuid
from pathlib import Path
from typing import Any

import pytest
from ansible.module_utils.basic import AnsibleModule
from ansible.module_utils.testing import patch_module_args
from ansible_collections.tribrick.media.plugins.module_utils import brick_seed
from ansible_collections.tribrick.media.plugins.module_utils.brick_seed import (
    SeedError,
    handle_of,
    receive,
    send,
    settle,
)
from ansible_collections.tribrick.media.plugins.module_utils.gluster import Cli
from ansible_collections.tribrick.media.plugins.modules import brick_seed as module_
from ansible_collections.tribrick.media.plugins.plugin_utils import certificates
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

VOLUME = uuid.UUID("6b6b1a40-0000-4000-8000-00000000abcd")
ROOT = uuid.UUID(int=1)


def mark(path: Path, gfid: uuid.UUID, **more: bytes) -> None:
    os.setxattr(path, brick_seed.GFID, gfid.bytes)
    for name, value in more.items():
        os.setxattr(path, name.replace("__", "."), value)


def empty(path: Path) -> Path:
    (path / ".glusterfs" / "00" / "00").mkdir(parents=True)
    mark(path, ROOT)
    os.setxattr(path, brick_seed.MARK, VOLUME.bytes)
    (path / ".glusterfs" / "00" / "00" / str(ROOT)).symlink_to("../../..")
    return path


def add(brick: Path, name: str, data: bytes | None = None, gfid: uuid.UUID | None = None) -> uuid.UUID:
    """Make a directory or a file as GlusterFS does, its handle too."""
    gfid = gfid or uuid.uuid4()
    place, handle = brick / name, Path(handle_of(str(brick), gfid.bytes))
    handle.parent.mkdir(parents=True, exist_ok=True)
    if data is None:
        place.mkdir(0o2750)
        mark(place, gfid, trusted__glusterfs__dht=b"dht")
        parent = str(uuid.UUID(bytes=os.getxattr(place.parent, brick_seed.GFID)))
        handle.symlink_to(f"../../{parent[:2]}/{parent[2:4]}/{parent}/{place.name}")
    else:
        place.write_bytes(data)
        place.chmod(0o640)
        mark(place, gfid, trusted__glusterfs__mdata=b"mdata", user__x=b"1")
        os.setxattr(place, "trusted.afr.media-client-1", b"pending!")
        os.link(place, handle)
        os.utime(place, ns=(10**18, 10**18 + 123))
    return gfid


@pytest.fixture
def good(tmp_path: Path) -> Path:
    brick = empty(tmp_path / "good")
    add(brick, "photos")
    add(brick, "photos/a")
    add(brick, "photos/a/1.jpg", b"one" * 100_000)
    add(brick, "photos/a/empty.jpg", b"")
    add(brick, "photos/b")
    add(brick, "photos/b/\udcff ü.jpg", b"odd name")
    add(brick, "other.bin", os.urandom(3 << 20))
    return brick


@pytest.fixture
def sink(tmp_path: Path) -> Path:
    return empty(tmp_path / "sink")


def stream(brick: Path) -> io.BytesIO:
    out = io.BytesIO()
    send(str(brick), out)
    out.seek(0)
    return out


def seed(good: Path, sink: Path, staging: Path) -> int:
    assert receive(str(sink), str(staging), str(VOLUME), stream(good)) >= 0
    return settle(str(sink), str(staging))


def shown(brick: Path) -> dict[str, object]:
    """All that a copy is to have: names, contents, attributes, owners, times, handles."""
    found: dict[str, object] = {}
    for path in sorted(brick.rglob("*")):
        name = str(path.relative_to(brick))
        info = path.lstat()
        if path.is_symlink():
            found[name] = os.readlink(path)
        elif name.startswith(".glusterfs"):
            found[name] = path.is_dir() or path.read_bytes()
        else:
            data = None if path.is_dir() else path.read_bytes()
            found[name] = (data, brick_seed.attributes(str(path)), info.st_mode, info.st_uid, info.st_gid,
                           info.st_mtime_ns, None if path.is_dir() else info.st_nlink)  # fmt: skip
    return found


def test_a_copy_is_the_same(good: Path, sink: Path, tmp_path: Path) -> None:
    assert seed(good, sink, tmp_path / "staging") == 4
    assert shown(sink) == shown(good)
    one = sink / "photos/a/1.jpg"
    assert "trusted.afr.media-client-1" not in os.listxattr(one), "it would accuse whom the good one accuses"
    assert os.path.samefile(one, handle_of(str(sink), os.getxattr(one, brick_seed.GFID)))


def test_a_file_with_two_names(good: Path, sink: Path, tmp_path: Path) -> None:
    os.link(good / "other.bin", good / "photos/again.bin")
    assert seed(good, sink, tmp_path / "staging") == 5
    assert (sink / "other.bin").samefile(sink / "photos/again.bin") and (sink / "other.bin").stat().st_nlink == 3


def test_nothing_that_is_there_is_replaced(good: Path, sink: Path, tmp_path: Path) -> None:
    photos = uuid.UUID(bytes=os.getxattr(good / "photos", brick_seed.GFID))
    one = uuid.UUID(bytes=os.getxattr(good / "photos/a/1.jpg", brick_seed.GFID))
    add(sink, "photos", gfid=photos)  # GlusterFS was faster, here and with another directory of that name
    add(sink, "photos/b")
    add(sink, "photos/moved.jpg", b"healed", gfid=one)
    add(sink, "photos/new-name.jpg", b"healed", gfid=add(good, "photos/old-name.jpg", b"healed"))
    assert seed(good, sink, tmp_path / "staging") == 2, "the empty one and other.bin"
    assert (sink / "photos/moved.jpg").read_bytes() == b"healed" and not list((sink / "photos/b").iterdir())
    assert not (sink / "photos/old-name.jpg").exists()
    assert not (sink / "photos/a/1.jpg").exists() and (sink / "photos/a/empty.jpg").exists()


def test_until_it_is_settled_the_brick_is_empty(good: Path, sink: Path, tmp_path: Path) -> None:
    before = shown(sink)
    receive(str(sink), str(tmp_path / "staging"), str(VOLUME), stream(good))
    assert shown(sink) == before


def test_handles_that_a_killed_copy_left(
    good: Path, sink: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    receive(str(sink), str(tmp_path / "staging"), str(VOLUME), stream(good))

    def killed(*_words: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", killed)
        with pytest.raises(KeyboardInterrupt):
            settle(str(sink), str(tmp_path / "staging"))
    shutil.rmtree(tmp_path / "staging")
    assert sorted(path.name for path in sink.iterdir()) == [".glusterfs"]
    assert seed(good, sink, tmp_path / "staging") == 4 and shown(sink) == shown(good)


@pytest.mark.parametrize("at", [0.0, 0.3, 0.9, 0.99999])
def test_a_stream_that_ends_early(good: Path, sink: Path, tmp_path: Path, at: float) -> None:
    whole = stream(good).getvalue()
    with pytest.raises(SeedError, match="ended in the middle"):
        receive(str(sink), str(tmp_path / "staging"), str(VOLUME), io.BytesIO(whole[: int(len(whole) * at)]))


def test_a_damaged_stream(good: Path, sink: Path, tmp_path: Path) -> None:
    text = stream(good).getvalue().replace(b"oneone", b"oneonE", 1)
    with pytest.raises(SeedError, match=r"1\.jpg' did not arrive"):
        receive(str(sink), str(tmp_path / "staging"), str(VOLUME), io.BytesIO(text))


@pytest.mark.parametrize("name", ["/etc/passwd", "../x", "a/../../x", "", "a//b", ".glusterfs/indices", "./a"])
def test_a_name_outside(sink: Path, tmp_path: Path, name: str) -> None:
    lines = [{"volume": str(VOLUME)}, {"kind": "directory", "name": name, "attributes": {}}]
    text = b"".join(json.dumps(line).encode() + b"\n" for line in lines)
    with pytest.raises(SeedError, match="no name within a brick"):
        receive(str(sink), str(tmp_path / "staging"), str(VOLUME), io.BytesIO(text))


def test_another_volume(good: Path, sink: Path, tmp_path: Path) -> None:
    os.setxattr(good, brick_seed.MARK, uuid.uuid4().bytes)
    with pytest.raises(SeedError, match="a brick of the volume"):
        receive(str(sink), str(tmp_path / "staging"), str(VOLUME), stream(good))


def test_a_file_written_to_while_it_is_sent_is_left_to_the_heal(
    good: Path, sink: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(brick_seed, "_same", lambda before, _after: before.st_size != 8)
    assert seed(good, sink, tmp_path / "staging") == 3
    assert not (sink / "photos/b/\udcff ü.jpg").exists() and (sink / "photos/a/1.jpg").exists()


def test_a_file_cut_while_it_is_sent_is_left_to_the_heal(
    good: Path, sink: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = brick_seed.owner

    def cut(info: os.stat_result) -> dict[str, object]:  # between its size and its bytes
        if info.st_size == 3 << 20:
            os.truncate(good / "other.bin", 10)
        return real(info)

    monkeypatch.setattr(brick_seed, "owner", cut)
    assert seed(good, sink, tmp_path / "staging") == 3
    assert not (sink / "other.bin").exists() and (sink / "photos/a/1.jpg").exists()


def test_files_without_an_identity_and_pipes_are_left_out(good: Path, sink: Path, tmp_path: Path) -> None:
    (good / "fresh").write_bytes(b"no gfid yet")
    (good / "fresh-directory").mkdir()
    os.mkfifo(good / "pipe")
    (good / "link").symlink_to("/etc/passwd")
    assert seed(good, sink, tmp_path / "staging") == 4
    assert sorted(path.name for path in sink.iterdir()) == [".glusterfs", "other.bin", "photos"]


def test_another_file_system(good: Path, sink: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    real = os.stat

    def stat(path: object, **more: object) -> os.stat_result:
        info = real(path, **more)  # type: ignore[call-overload]
        return (
            os.stat_result([*list(info)[:2], info.st_dev + 1, *list(info)[3:]]) if str(path).endswith("tree") else info
        )

    monkeypatch.setattr(os, "stat", stat)
    with pytest.raises(SeedError, match="not on the file system"):
        receive(str(sink), str(tmp_path / "staging"), str(VOLUME), stream(good))


# --- the module, both sides over TLS on loopback; only the brick's process is made up


class Ended(Exception):
    """How the module ended."""

    def __init__(self, result: dict[str, Any]) -> None:
        super().__init__(str(result))
        self.result = result


class Pool:
    """An authority and what each node has of it."""

    def __init__(self, place: Path) -> None:
        self.place, self.key = place, ec.generate_private_key(ec.SECP256R1())
        self.ca = certificates.authority("", self.key, "Tribrick", 10)
        place.mkdir()
        (place / "ca").write_text(certificates.to_pem(self.ca))

    def node(self, name: str) -> dict[str, str]:
        key = ec.generate_private_key(ec.SECP256R1())
        subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
        asked = x509.CertificateSigningRequestBuilder().subject_name(subject).sign(key, hashes.SHA256())
        pem = asked.public_bytes(serialization.Encoding.PEM).decode()
        (self.place / name).write_text(certificates.to_pem(certificates.issue("", pem, self.ca, self.key, 5)))
        (self.place / f"{name}.key").write_bytes(
            key.private_bytes(
                serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption()
            )
        )
        return {
            "certificate": str(self.place / name), "key": str(self.place / f"{name}.key"), "ca": str(self.place / "ca")
        }  # fmt: skip


class Side:
    """The brick's process and gluster, as far as the module sees them."""

    def __init__(self) -> None:
        self.runs, self.done = True, list[str]()


@pytest.fixture
def side(monkeypatch: pytest.MonkeyPatch) -> Side:
    side = Side()

    def kill(_pid: int, _number: int) -> None:
        side.done.append("stopped")
        side.runs = False

    def change(_cli: Cli, *words: str) -> None:
        side.done.append(" ".join(words))
        side.runs = True

    monkeypatch.setattr(module_, "find_process", lambda *_words: "4711" if side.runs else "")
    monkeypatch.setattr(module_, "find_brick", lambda _path: "S" if side.runs else "")
    monkeypatch.setattr(module_.os, "kill", kill)
    monkeypatch.setattr(Cli, "change", change)
    monkeypatch.setattr(module_, "brick_mark", lambda _path: str(VOLUME))

    def end(_module: AnsibleModule, **result: Any) -> None:
        raise Ended(result)

    monkeypatch.setattr(AnsibleModule, "exit_json", end)
    monkeypatch.setattr(AnsibleModule, "fail_json", end)
    return side


def port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


def call() -> dict[str, Any]:
    with pytest.raises(Ended) as caught:
        module_.main()
    return caught.value.result


def run(**arguments: Any) -> dict[str, Any]:
    with patch_module_args(arguments):
        return call()


def both(
    tmp_path: Path, serving: dict[str, str], fetching: dict[str, str], expected: str = "localhost", wait: int = 5
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Run both sides; the module's arguments are read one after the other, so the server starts first."""
    good, sink = tmp_path / "good", tmp_path / "sink"
    if not good.exists():
        empty(good)
        add(good, "photos")
        add(good, "photos/1.jpg", b"picture" * 1000)
        empty(sink)
    number, answers = port(), list[dict[str, Any]]()
    common: dict[str, Any] = {"port": number, "wait": wait}
    with patch_module_args({"state": "serve", "path": str(good), "peer": expected, **common, **serving}):
        started = threading.Event()
        create = socket.create_server

        def listening(*words: Any, **more: Any) -> socket.socket:
            made = create(*words, **more)
            started.set()
            return made

        module_.socket.create_server = listening  # type: ignore[assignment]
        server = threading.Thread(target=lambda: answers.append(call()))
        server.start()
        assert started.wait(10)
        module_.socket.create_server = create
    fetched = run(
        state="fetch", name="media", node="sink", path=str(sink),
        peer="localhost", **common, **fetching,
    )  # fmt: skip
    server.join(20)
    return answers[0], fetched


def test_a_brick_is_filled(tmp_path: Path, side: Side) -> None:
    pool = Pool(tmp_path / "pool")
    served, fetched = both(tmp_path, pool.node("localhost"), pool.node("sink"), expected="sink")
    assert (served["files"], served["why"]) == (1, "") and (fetched["files"], fetched["why"]) == (1, "")
    assert (tmp_path / "sink/photos/1.jpg").read_bytes() == b"picture" * 1000
    assert side.done == ["stopped", "volume start media force"] and not (tmp_path / ".tribrick-seed").exists()


def test_a_stranger_gets_nothing(tmp_path: Path, side: Side) -> None:
    pool, other = Pool(tmp_path / "pool"), Pool(tmp_path / "other")
    stranger = other.node("sink") | {"ca": str(tmp_path / "pool/ca")}
    served, fetched = both(tmp_path, pool.node("localhost"), stranger, expected="sink", wait=1)
    assert served["files"] == 0 and "refused" in served["why"]
    assert fetched["files"] == 0 and fetched["why"] and not list((tmp_path / "sink").glob("p*"))
    assert side.runs, "the heal does the work then"


def test_another_node_of_the_pool_gets_nothing(tmp_path: Path, side: Side) -> None:
    pool = Pool(tmp_path / "pool")
    served, fetched = both(tmp_path, pool.node("localhost"), pool.node("sink"), expected="node9", wait=1)
    assert "refused: sink" in served["why"] and fetched["why"] and side.runs


def test_a_wrong_server_is_not_believed(tmp_path: Path, side: Side) -> None:
    pool = Pool(tmp_path / "pool")
    _, fetched = both(tmp_path, pool.node("node9"), pool.node("sink"), expected="sink", wait=1)
    assert "shows the certificate of node9" in fetched["why"] and side.runs
    assert not list((tmp_path / "sink").glob("p*"))


def test_nobody_serves(tmp_path: Path, side: Side) -> None:
    pool = Pool(tmp_path / "pool")
    empty(tmp_path / "sink")
    fetched = run(
        state="fetch", name="media", node="sink", path=str(tmp_path / "sink"),
        peer="localhost", port=port(), wait=0, **pool.node("sink"),
    )  # fmt: skip
    assert "does not offer its files" in fetched["why"] and fetched["changed"]
    assert side.done == ["stopped", "volume start media force"] and not (tmp_path / ".tribrick-seed").exists()


def test_nobody_fetches(tmp_path: Path, side: Side) -> None:
    pool = Pool(tmp_path / "pool")
    empty(tmp_path / "good")
    served = run(state="serve", path=str(tmp_path / "good"), peer="sink", port=port(), wait=0, **pool.node("localhost"))
    assert served["why"] == "sink did not come within 0 s" and not served["changed"] and side.done == []


def test_a_copy_that_goes_on_without_its_playbook_is_awaited(
    tmp_path: Path, side: Side, monkeypatch: pytest.MonkeyPatch
) -> None:
    pool, staging = Pool(tmp_path / "pool"), tmp_path / ".tribrick-seed"
    empty(tmp_path / "sink")
    staging.mkdir()
    other = os.open(tmp_path, os.O_RDONLY)
    fcntl.flock(other, fcntl.LOCK_EX)

    def waits(*_words: object) -> None:
        assert side.done == [], "the brick is left alone meanwhile"
        staging.rmdir()  # the other one is done
        os.close(other)

    monkeypatch.setattr(module_, "wait_until", waits)
    ended = run(
        state="fetch", name="media", node="sink", path=str(tmp_path / "sink"), peer="localhost",
        port=port(), wait=0, **pool.node("sink"),
    )  # fmt: skip
    assert not ended["changed"] and side.done == []


def test_a_port_that_is_taken_is_awaited(tmp_path: Path, side: Side) -> None:
    pool, number = Pool(tmp_path / "pool"), port()
    empty(tmp_path / "good")
    with socket.create_server(("", number)):
        served = run(
            state="serve", path=str(tmp_path / "good"), peer="sink", port=number, wait=1, **pool.node("localhost")
        )
    assert "in use" in served["why"] and side.done == []


def test_one_that_says_nothing_does_not_hold_the_server_up(tmp_path: Path, side: Side) -> None:
    pool, number, answers = Pool(tmp_path / "pool"), port(), list[dict[str, Any]]()
    empty(tmp_path / "good")
    with patch_module_args(
        {"state": "serve", "path": str(tmp_path / "good"), "peer": "sink", "port": number, "wait": 2}
        | pool.node("localhost")
    ):
        server = threading.Thread(target=lambda: answers.append(call()), daemon=True)
        server.start()
        silent = None
        for _ in range(200):
            try:
                silent = socket.create_connection(("localhost", number), timeout=5)
                break
            except OSError:
                threading.Event().wait(0.02)
        assert silent is not None, "nobody listened"
        server.join(15)
        silent.close()
    assert not server.is_alive() and "sink did not come" in answers[0]["why"] and side.done == []
