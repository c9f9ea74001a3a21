"""Copies on other machines: hashes by socket and by TLS, a directory over a real sshd and rsync."""

from __future__ import annotations

import contextlib
import getpass
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
from django.conf import settings
from django.core.exceptions import ImproperlyConfigured
from django.core.files.base import ContentFile
from django.core.management import CommandError, call_command
from django.test import override_settings

from tribrick import audit, catalog, far_copies, hasher
from tribrick.copies import CopyAway, copies
from tribrick.ledger import Known
from tribrick.models import MediaFile
from tribrick.storage import StoredFile
from tribrick.testing import wait_for

HOSTILE = [
    "-rf",
    "--delete",
    "a\nb",
    "quote\"s and 's",
    "$(touch HACKED)`touch HACKED`;touch HACKED",
    "#comment",
    ";x",
    "*.jpg",
    "\\back",
    "été 漢字 \U0001f600",
    " spaces ",
    "dir/-x/--rsh=touch",
    "a:b/c:d",
    "x" * 240,
]


def root() -> Path:
    return Path(settings.MEDIA_ROOT)


def add(data: bytes = b"one", name: str = "photos/a.txt") -> MediaFile:
    return catalog.add(ContentFile(data), name)


def add_named(name: str, data: bytes) -> MediaFile:
    """A foreign name that was adopted."""
    path = root() / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    import hashlib

    return catalog.record(StoredFile(name, hashlib.sha256(data).hexdigest(), len(data)))


def copy_to(target: Path, *rows: MediaFile) -> None:
    for row in rows:
        (target / row.name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(root() / row.name, target / row.name)


def tribrick(*arguments: str) -> tuple[int, Any]:
    """Run the command; return its exit code and what it says in JSON."""
    out = io.StringIO()
    code = 0
    try:
        call_command("tribrick", *arguments, "--json", stdout=out, stderr=io.StringIO())
    except CommandError as error:
        code = error.returncode
    return code, json.loads(out.getvalue()) if out.getvalue() else None


def findings(said: Any) -> set[tuple[str, str, str]]:
    return {(one["copy"], one["kind"], one["name"]) for one in said["findings"]}


def tree(path: Path) -> dict[str, tuple[bytes, int, float]]:
    """Return content, inode and time of everything below *path*."""
    return {
        str(file.relative_to(path)): (file.read_bytes(), file.stat().st_ino, file.stat().st_mtime)
        for file in path.rglob("*")
        if file.is_file()
    }


@pytest.fixture
def use(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[..., None]]:
    """Set ``TRIBRICK["COPIES"]`` and more; files are old at once."""
    monkeypatch.setattr(audit, "YOUNG", timedelta(0))
    with contextlib.ExitStack() as stack:
        yield lambda *entries, **more: stack.enter_context(
            override_settings(TRIBRICK={**settings.TRIBRICK, "COPIES": list(entries), **more})
        )


@pytest.fixture
def elsewhere(tmp_path: Path) -> Path:
    path = tmp_path / "elsewhere"
    path.mkdir()
    return path


def make_every_difference(there: Path) -> tuple[list[MediaFile], set[tuple[str, str]]]:
    """Fill a copy; return the rows and what an audit must find there."""
    fine, missing, torn, zeros, different = (add(b"%d" % n * 5000) for n in range(5))
    dead = add()
    copy_to(there, fine, torn, zeros, different, dead)
    catalog.delete(dead)
    (there / torn.name).write_bytes(b"2")
    (there / zeros.name).write_bytes(bytes(5000))
    (there / different.name).write_bytes(b"x" * 5001)
    (there / "foreign.txt").write_bytes(b"x")
    (there / ".hidden").mkdir()
    (there / ".hidden" / "x").write_bytes(b"x")
    expected = {
        ("missing", missing.name),
        ("torn", torn.name),
        ("torn", zeros.name),
        ("different", different.name),
        ("dead", dead.name),
        ("extra", "foreign.txt"),
    }
    return [fine, missing, torn, zeros, different, dead], expected


# Servers


def free_port() -> int:
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        return int(found.getsockname()[1])


def wait_for_port(port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    def answers() -> bool:
        assert server.poll() is None, log.read_text()
        with socket.socket() as probe:
            return probe.connect_ex(("127.0.0.1", port)) == 0

    wait_for(answers, "a server listens", 20)


# Hashes


class Faulty(hasher.Handler):
    """The real hasher, with faults."""

    server: Any

    def _names(self) -> list[str] | None:
        names = super()._names()
        self.server.asked.append(names)
        return names

    def _may(self) -> bool:
        fault = self.server.fault
        if fault == "silent":
            self.server.stop.wait(20)
            self.close_connection = True
            return False
        if fault == "503":
            self.server.tree.root /= "nowhere"
        return super()._may()

    def send_header(self, keyword: str, value: str) -> None:
        if self.server.fault != "endless" or keyword != "Transfer-Encoding":
            super().send_header(keyword, value)

    def _stream(self, objects: Any) -> None:
        super()._stream(self._spoiled(objects))

    def _spoiled(self, objects: Any) -> Iterator[Any]:
        fault = self.server.fault
        for number, answer in enumerate(objects):
            if fault == "breaks off" and number:
                raise ConnectionError
            if fault == "swaps":
                answer["name"] += "x"
            yield ["junk"] if fault == "junk" else answer


def openssl(*arguments: str) -> None:
    subprocess.run(["openssl", *arguments], check=True, capture_output=True, timeout=60)


@pytest.fixture(scope="session")
def certificates(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority, a server's and a client's certificate, and a client nobody signed."""
    path = tmp_path_factory.mktemp("certificates")
    # Without the extensions of Debian's own configuration, and with all that Python 3.13 asks for.
    (path / "plain.cnf").write_text("[req]\ndistinguished_name = name\n[name]\n")
    new = ["req", "-config", f"{path}/plain.cnf", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1"]
    new += ["-nodes", "-days", "2", "-addext", "subjectKeyIdentifier=hash"]
    authority = ["-addext", "basicConstraints=critical,CA:TRUE", "-addext", "keyUsage=critical,keyCertSign"]
    leaf = ["-addext", "basicConstraints=critical,CA:FALSE", "-addext", "subjectAltName=DNS:localhost"]
    openssl(*new, "-keyout", f"{path}/ca.key", "-out", f"{path}/ca.pem", "-subj", "/CN=ca", *authority)
    sign = ["-CA", f"{path}/ca.pem", "-CAkey", f"{path}/ca.key", "-addext", "authorityKeyIdentifier=keyid", *leaf]
    for name in ("server", "client"):
        openssl(*new, *sign, "-keyout", f"{path}/{name}.key", "-out", f"{path}/{name}.pem", "-subj", f"/CN={name}")
    openssl(*new, "-keyout", f"{path}/other.key", "-out", f"{path}/other.pem", "-subj", "/CN=other", *leaf)
    return path


@pytest.fixture(scope="module")
def front(tmp_path_factory: pytest.TempPathFactory, certificates: Path) -> Iterator[tuple[Path, int]]:
    """nginx with TLS before the socket of a hasher; the socket's path and nginx's port."""
    program = shutil.which("nginx", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None:
        pytest.fail("These tests need nginx: apt-get install nginx-light", pytrace=False)
    work, port = tmp_path_factory.mktemp("front"), free_port()
    (work / "nginx.conf").write_text(
        f"daemon off; worker_processes 1; pid {work}/pid; error_log {work}/error.log;\n"
        f"{'user root;' if os.geteuid() == 0 else ''} events {{}}\n"
        f"http {{ access_log off; client_body_temp_path {work}/body; proxy_temp_path {work}/proxy;\n"
        f"fastcgi_temp_path {work}/f; uwsgi_temp_path {work}/u; scgi_temp_path {work}/s;\n"
        f"server {{ listen 127.0.0.1:{port} ssl; ssl_certificate {certificates}/server.pem;\n"
        f"ssl_certificate_key {certificates}/server.key; ssl_client_certificate {certificates}/ca.pem;\n"
        "ssl_verify_client on; client_max_body_size 4m;\n"
        f"location /in/here/ {{ proxy_pass http://unix:{work}/s.sock:/; proxy_http_version 1.1;\n"
        "proxy_buffering off; } } }\n"
    )
    server = subprocess.Popen([program, "-e", f"{work}/error.log", "-p", str(work), "-c", f"{work}/nginx.conf"])
    wait_for_port(port, server, work / "error.log")
    yield work / "s.sock", port
    server.terminate()
    server.wait(10)


@pytest.fixture(params=["unix", "https"])
def brick(
    request: pytest.FixtureRequest, elsewhere: Path, tmp_path: Path, use: Callable[..., None], certificates: Path
) -> Iterator[Any]:
    """A hasher beside ``elsewhere``, which is the copy ``brick``."""
    path, address = tmp_path / "s", f"unix:{tmp_path}/s"
    if request.param == "https":
        path, port = request.getfixturevalue("front")
        address = f"https://localhost:{port}/in/here/"
    server: Any = hasher.Server(hasher.Tree(elsewhere), hasher.listen(str(path), None))
    server.RequestHandlerClass = Faulty
    server.fault, server.asked, server.stop = "", [], threading.Event()
    transport = {name: str(certificates / f"{file}") for name, file in
                 {"ca": "ca.pem", "certificate": "client.pem", "key": "client.key"}.items()}  # fmt: skip
    use({"name": "brick", "kind": "hashes", "address": address}, TRANSPORT=transport)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True)
    thread.start()
    yield server
    server.stop.set()
    server.shutdown()
    server.server_close()
    path.unlink()
    thread.join(10)


def test_the_program_itself(elsewhere: Path, tmp_path: Path, use: Callable[..., None]) -> None:
    rows, expected = make_every_difference(elsewhere)
    sources = Path(hasher.__file__).parents[1]
    command = [sys.executable, "-m", "tribrick.hasher", "--root", str(elsewhere), "--socket", str(tmp_path / "s")]
    with subprocess.Popen(command, env=os.environ | {"PYTHONPATH": str(sources)}) as process:
        try:
            wait_for((tmp_path / "s").exists, "the hasher listens", 20)
            use({"name": "brick", "kind": "hashes", "address": f"unix:{tmp_path}/s"})
            assert findings(tribrick("audit")[1]) == {("brick", kind, name) for kind, name in expected}
        finally:
            process.terminate()
    code, said = tribrick("audit")
    assert code == 2 and list(said["away"]) == ["brick"] and rows


def test_a_brick_is_compared_by_hash(brick: Any, elsewhere: Path) -> None:
    rows, expected = make_every_difference(elsewhere)
    (root() / rows[0].name).unlink()
    before = tree(elsewhere)
    code, said = tribrick("audit")
    assert code == 1
    there = {("brick", kind, name) for kind, name in expected}
    assert findings(said) == {*there, ("storage", "missing", rows[0].name)}
    assert len([asked for asked in brick.asked if len(asked) > 1]) == 1, "names go together"
    code, said = tribrick("reconcile", "--apply")
    assert code == 1
    what = {(one["copy"], one["name"]): (one["ok"], one["what"]) for one in said["repairs"]}
    assert what[("storage", rows[0].name)] == (False, "no copy has the bytes"), "hashes are no bytes"
    assert what[("brick", rows[1].name)] == (
        False, "brick: only hashes come from there; storage has the bytes",
    )  # fmt: skip
    assert what[("brick", rows[5].name)] == (False, "brick: only hashes come from there")
    assert tree(elsewhere) == before


def test_hostile_names_by_hash(brick: Any, elsewhere: Path) -> None:
    rows = [add_named(name, name.encode()) for name in HOSTILE]
    copy_to(elsewhere, *rows)
    assert tribrick("audit")[0] == 0
    shutil.rmtree(elsewhere)
    elsewhere.mkdir()
    assert findings(tribrick("audit")[1]) == {("brick", "missing", name) for name in HOSTILE}


@pytest.mark.parametrize("fault", ["silent", "503", "breaks off", "swaps", "junk", "endless"])
def test_a_hasher_in_trouble_is_away(brick: Any, elsewhere: Path, fault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if fault == "endless" and settings.TRIBRICK["COPIES"][0]["address"].startswith("https"):
        return  # nginx makes an end of it
    monkeypatch.setattr(far_copies, "SILENCE", 0.5)
    copy_to(elsewhere, add(), add())
    assert tribrick("audit")[0] == 0
    brick.fault = fault
    started = time.monotonic()
    code, said = tribrick("audit")
    assert code == 2 and list(said["away"]) == ["brick"] and not said["findings"]
    assert time.monotonic() - started < 5
    if fault == "503":
        assert "503" in said["away"]["brick"]


def test_a_hasher_that_goes_away_in_the_middle(brick: Any, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(audit, "PAGE", 1)
    rows = [add() for _ in range(3)]
    copy_to(elsewhere, *rows)
    real = far_copies.HashesCopy._hashes

    def later(self: Any, files: Any) -> Any:
        if len(brick.asked) == 2:
            brick.fault = "503"
        return real(self, files)

    monkeypatch.setattr(far_copies.HashesCopy, "_hashes", later)
    code, said = tribrick("audit")
    assert code == 2 and list(said["away"]) == ["brick"] and not said["findings"]
    assert said["checked"] == 3, "the other copies were compared to the end"


def test_the_walk_of_a_hasher_breaks_off(brick: Any, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_to(elsewhere, add(), add())
    real = far_copies.HashesCopy.walk

    def walk(self: Any) -> Any:
        brick.fault = "breaks off"
        return real(self)

    monkeypatch.setattr(far_copies.HashesCopy, "walk", walk)
    code, said = tribrick("audit")
    assert code == 2 and list(said["away"]) == ["brick"] and not said["findings"]


@pytest.mark.parametrize("brick", ["https"], indirect=True)
@pytest.mark.parametrize("wrong", ["client", "ca"])
def test_certificates_are_asked_for(brick: Any, use: Callable[..., None], certificates: Path, wrong: str) -> None:
    given = dict(settings.TRIBRICK["TRANSPORT"])
    if wrong == "client":
        given |= {"certificate": f"{certificates}/other.pem", "key": f"{certificates}/other.key"}
    else:
        given["ca"] = f"{certificates}/other.pem"
    use(*settings.TRIBRICK["COPIES"], TRANSPORT=given)
    add()
    code, said = tribrick("audit")
    assert code == 2 and list(said["away"]) == ["brick"] and not brick.asked


def test_nobody_listens(tmp_path: Path, use: Callable[..., None]) -> None:
    use({"name": "brick", "kind": "hashes", "address": f"unix:{tmp_path}/nobody"})
    add()
    code, said = tribrick("audit")
    assert code == 2 and list(said["away"]) == ["brick"]


@pytest.mark.parametrize(
    "entry",
    [
        {"kind": "hashes", "address": "http://x/"},
        {"kind": "hashes", "address": "unix:relative"},
        {"kind": "hashes", "address": "https://host/"},  # no certificate in TRANSPORT
        {"kind": "hashes", "address": "unix:/x", "writable": True},
        {"kind": "ssh", "address": "user@host"},
        {"kind": "ssh", "address": "user@host:relative"},
        {"kind": "ssh", "address": "-oProxyCommand=touch x@host:/path"},
        {"kind": "ssh", "address": "user@-oProxyCommand=x:/path"},
        {"kind": "ssh", "address": "user@host:/x", "port": "22; touch x"},
        {"kind": "ssh", "address": "user@host:/x", "identity": "/a b"},
        {"kind": "ssh", "address": "user@host:/x", "password": "x"},
    ],
)
def test_wrong_settings_are_refused(entry: dict[str, Any], use: Callable[..., None]) -> None:
    use({"name": "far", **entry})
    with pytest.raises(ImproperlyConfigured, match="far"):
        copies()


# SSH

SOME = pytest.mark.sample(5, "ssh")


@pytest.fixture(scope="session")
def sshd(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, Any]]:
    """A server of its own on a port of the loopback address; what a copy's entry needs to reach it."""
    program = shutil.which("sshd", path=f"{os.environ['PATH']}:/usr/sbin")
    if program is None or shutil.which("rsync") is None:
        pytest.fail("These tests need sshd and rsync: apt-get install openssh-server rsync", pytrace=False)
    path = tmp_path_factory.mktemp("sshd")
    path.chmod(0o700)
    for name in ("host", "user", "other"):
        subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", path / name], check=True, timeout=60)
    port = free_port()
    shutil.copy(path / "user.pub", path / "authorized_keys")
    (path / "known_hosts").write_text(f"[127.0.0.1]:{port} {(path / 'host.pub').read_text()}")
    (path / "wrong_hosts").write_text(f"[127.0.0.1]:{port} {(path / 'other.pub').read_text()}")
    (path / "config").write_text(
        f"ListenAddress 127.0.0.1:{port}\nHostKey {path}/host\nAuthorizedKeysFile {path}/authorized_keys\n"
        "StrictModes no\nUsePAM no\nPasswordAuthentication no\nPermitRootLogin prohibit-password\nPidFile none\n"
        "MaxStartups 100\nKexAlgorithms curve25519-sha256\n"
    )
    if os.geteuid() == 0:
        Path("/run/sshd").mkdir(mode=0o755, exist_ok=True)
    with (path / "log").open("wb") as log:
        server = subprocess.Popen([program, "-D", "-e", "-f", path / "config"], stderr=log, stdin=subprocess.DEVNULL)
        wait_for_port(port, server, path / "log")
        yield {
            "name": "far", "kind": "ssh", "address": f"{getpass.getuser()}@127.0.0.1:", "port": port,
            "identity": str(path / "user"), "known_hosts": str(path / "known_hosts"),
        }  # fmt: skip
        server.terminate()
        server.wait(10)


@pytest.fixture
def ssh(sshd: dict[str, Any], elsewhere: Path, use: Callable[..., None]) -> dict[str, Any]:
    """The copy ``far``: ``elsewhere``, over SSH."""
    entry = {**sshd, "address": f"{sshd['address']}{elsewhere}"}
    use(entry)
    return entry


def test_audit_and_repair_over_ssh(ssh: Any, elsewhere: Path) -> None:
    rows, expected = make_every_difference(elsewhere)
    fine = rows[0]
    before = tree(elsewhere)
    code, said = tribrick("audit")
    assert code == 1 and findings(said) == {("far", kind, name) for kind, name in expected}

    code, said = tribrick("reconcile")
    assert code == 0 and not said["applied"]
    assert {one["what"] for one in said["repairs"] if one["ok"]} == {"to be written from storage", "to be removed"}
    assert tree(elsewhere) == before, "a dry run changes nothing"

    code, said = tribrick("reconcile", "--host", "far", "--apply")
    assert code == 0, said
    assert {one["what"] for one in said["repairs"] if one["ok"]} == {"written from storage", "removed"}
    after = tree(elsewhere)
    for row in rows[:5]:
        assert (elsewhere / row.name).read_bytes() == (root() / row.name).read_bytes()
    assert not (elsewhere / rows[5].name).exists()
    assert after[fine.name] == before[fine.name]
    assert after["foreign.txt"] == before["foreign.txt"], "nothing that is extra is removed"
    (day,) = (elsewhere / audit.QUARANTINE).iterdir()
    [kept] = day.glob(f"{rows[4].name}.*")
    assert kept.read_bytes() == b"x" * 5001, "what was replaced is kept"
    assert list((elsewhere / hasher.INCOMING).iterdir()) == []
    assert findings(tribrick("audit")[1]) == {("far", "extra", "foreign.txt")}


def test_what_was_replaced_on_one_day_is_all_kept(ssh: Any, elsewhere: Path) -> None:
    row = add(b"right")
    copy_to(elsewhere, row)
    for wrong in (b"one", b"two"):
        (elsewhere / row.name).write_bytes(wrong)
        assert tribrick("reconcile", "--apply")[0] == 0
    kept = [path.read_bytes() for path in (elsewhere / ".tribrick-quarantine").rglob("*") if path.is_file()]
    assert sorted(kept) == [b"one", b"two"]


@SOME
def test_a_right_file_is_not_sent_again(ssh: Any, elsewhere: Path) -> None:
    row = add(b"x" * 100_000)
    copy_to(elsewhere, row)
    os.utime(elsewhere / row.name, (1, 1))
    before = (elsewhere / row.name).stat()
    (copy,) = [one for one in copies() if one.name == "far"]
    (storage,) = [one for one in copies() if one.name == "storage"]
    known = Known(row.name, "stored", "default", row.sha256, row.size)
    assert copy.put(known, storage) == "written from storage"
    assert (elsewhere / row.name).stat().st_ino == before.st_ino, "it was asked for, and found right"


@SOME
def test_the_storage_is_repaired_over_ssh(ssh: Any, elsewhere: Path) -> None:
    missing, torn, lies = add(b"1" * 5000), add(b"2" * 5000), add(b"3" * 5000)
    copy_to(elsewhere, missing, torn, lies)
    (root() / missing.name).unlink()
    (root() / torn.name).write_bytes(bytes(5000))
    (root() / lies.name).unlink()
    (elsewhere / lies.name).write_bytes(b"bad")
    code, said = tribrick("reconcile", "--apply", "--host", "storage")
    assert code == 1
    assert {one["name"]: (one["ok"], one["what"]) for one in said["repairs"]} == {
        missing.name: (True, "written from far"),
        torn.name: (True, "written from far"),
        lies.name: (False, "no copy has the bytes"),
    }
    assert (root() / missing.name).read_bytes() == b"1" * 5000
    assert (root() / torn.name).read_bytes() == b"2" * 5000
    assert not list(root().rglob(".*.part"))


@SOME
def test_from_one_host_to_another(ssh: Any, elsewhere: Path, tmp_path: Path, use: Callable[..., None]) -> None:
    (tmp_path / "third").mkdir()
    third = {**ssh, "name": "third", "address": ssh["address"].replace("elsewhere", "third")}
    use(ssh, third)
    row = add(b"1" * 5000)
    copy_to(elsewhere, row)
    (root() / row.name).unlink()
    code, said = tribrick("reconcile", "--apply", "--host", "third")
    assert code == 0 and said["repairs"][0]["what"] == "written from far"
    assert (tmp_path / "third" / row.name).read_bytes() == b"1" * 5000


@SOME
def test_hostile_names_over_ssh(ssh: Any, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "cwd").mkdir()
    monkeypatch.chdir(tmp_path / "cwd")
    rows = [add_named(name, name.encode() * 50) for name in HOSTILE]
    code, said = tribrick("reconcile", "--apply")
    assert code == 0, said
    assert {row.name: (elsewhere / row.name).read_bytes() for row in rows} == {
        name: name.encode() * 50 for name in HOSTILE
    }
    before = tree(elsewhere)
    assert tribrick("audit")[0] == 0
    for row in rows:
        (root() / row.name).unlink()
    assert tribrick("reconcile", "--apply")[0] == 0, "and back again"
    assert tribrick("audit")[0] == 0
    assert tree(elsewhere) == before
    for row in rows:
        catalog.delete(row)
        copy_to_again = elsewhere / row.name
        assert copy_to_again.exists()
    assert tribrick("reconcile", "--apply")[0] == 0
    assert tree(elsewhere) == {}
    assert not list((tmp_path / "cwd").iterdir()) and not list(tmp_path.rglob("HACKED"))
    assert not Path("~/HACKED").expanduser().exists()


@SOME
@pytest.mark.parametrize("why", ["refused", "host key", "user key", "no directory", "hangs", "no python"])
def test_a_host_that_is_away(
    why: str, sshd: Any, elsewhere: Path, tmp_path: Path, use: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {**sshd, "address": f"{sshd['address']}{elsewhere}"}
    directory = Path(sshd["identity"]).parent
    silent = socket.socket()
    if why == "refused":
        entry["port"] = free_port()
    elif why == "host key":
        entry["known_hosts"] = str(directory / "wrong_hosts")
    elif why == "user key":
        entry["identity"] = str(directory / "other")
    elif why == "no directory":
        entry["address"] += "/nowhere"
    elif why == "hangs":
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        entry["port"] = silent.getsockname()[1]
        monkeypatch.setattr(far_copies, "CONNECT", 1.0)
        monkeypatch.setattr(far_copies, "SILENCE", 1.0)
    else:
        monkeypatch.setattr(far_copies, "_START", "exec no-such-python")
    use(entry)
    row = add()
    started = time.monotonic()
    for arguments in (["audit"], ["reconcile", "--apply", "--host", "far"]):
        code, said = tribrick(*arguments)
        assert code == 2 and list(said["away"]) == ["far"]
    assert time.monotonic() - started < 15
    assert (root() / row.name).exists()
    silent.close()


@SOME
def test_rsync_is_killed_in_the_middle(
    ssh: Any, elsewhere: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = [add(os.urandom(600_000)) for _ in range(3)]
    copy_to(elsewhere, rows[0])
    (elsewhere / rows[0].name).write_bytes(b"old")
    real = shutil.which("rsync")
    (tmp_path / "bin").mkdir()
    wrapper = tmp_path / "bin" / "rsync"
    wrapper.write_text(
        f'#!/bin/sh\ncase "$*" in *--server*) exec {real} "$@";; esac\n'
        f'exec timeout -s KILL 1 {real} --bwlimit=300 "$@"\n'
    )
    wrapper.chmod(0o755)
    with monkeypatch.context() as patch:
        patch.setenv("PATH", f"{tmp_path}/bin:{os.environ['PATH']}")
        code, said = tribrick("reconcile", "--apply", "--host", "far")
    assert code == 1
    failed = {one["name"] for one in said["repairs"] if not one["ok"]}
    assert failed, "it was killed before the end"
    assert all("rsync ended with" in one["what"] for one in said["repairs"] if not one["ok"])
    for row in rows:  # a name holds what it held, or all of the new bytes
        there = elsewhere / row.name
        if row.name in failed:
            assert (there.read_bytes() == b"old") if row == rows[0] else not there.exists()
        else:
            assert there.read_bytes() == (root() / row.name).read_bytes()
    assert tribrick("reconcile", "--apply", "--host", "far")[0] == 0
    assert tribrick("audit")[0] == 0, "nothing half is left in sight"


@SOME
def test_left_overs_of_killed_transfers_are_removed(ssh: Any, elsewhere: Path) -> None:
    (elsewhere / hasher.INCOMING).mkdir()
    old, young = elsewhere / hasher.INCOMING / ".a.old", elsewhere / hasher.INCOMING / ".a.young"
    old.write_bytes(b"x")
    young.write_bytes(b"x")
    os.utime(old, (1, 1))
    add()
    assert tribrick("reconcile", "--apply")[0] == 0
    assert not old.exists() and young.exists()


@SOME
def test_bytes_that_change_on_the_way_are_not_called_right(
    ssh: Any, elsewhere: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = add(b"1" * 500)
    real = far_copies.SshCopy._rsync

    def late(self: Any, *arguments: Any) -> str:
        (root() / row.name).write_bytes(b"2" * 500)
        return real(self, *arguments)

    monkeypatch.setattr(far_copies.SshCopy, "_rsync", late)
    code, said = tribrick("reconcile", "--apply", "--host", "far")
    assert code == 1 and "other bytes" in said["repairs"][0]["what"]


@SOME
def test_a_file_deleted_during_a_repair_over_ssh(ssh: Any, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    row = add()
    real = far_copies.SshCopy._rsync

    def late(self: Any, *arguments: Any) -> str:
        said = real(self, *arguments)
        catalog.delete(row)
        return said

    monkeypatch.setattr(far_copies.SshCopy, "_rsync", late)
    code, said = tribrick("reconcile", "--apply", "--host", "far")
    assert code == 0 and said["repairs"][0]["what"] == "deleted meanwhile, removed again"
    assert tree(elsewhere) == {}


@SOME
def test_nothing_is_written_where_nothing_may_be(ssh: Any, elsewhere: Path, use: Callable[..., None]) -> None:
    use({**ssh, "writable": False})
    row, dead = add(), add()
    copy_to(elsewhere, dead)
    catalog.delete(dead)
    code, said = tribrick("reconcile", "--apply")
    assert code == 1
    assert {one["name"]: one["what"] for one in said["repairs"]} == {
        row.name: "far: nothing may be written there; storage has the bytes",
        dead.name: "far: nothing may be written there",
    }
    assert list(tree(elsewhere)) == [dead.name]


@SOME
def test_a_far_side_that_breaks_off(ssh: Any, elsewhere: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    copy_to(elsewhere, add(), add())
    start = far_copies._START.replace("exec python3", "python3") + " | head -n 1"
    monkeypatch.setattr(far_copies, "_START", start)
    (copy,) = [one for one in copies() if one.name == "far"]
    with pytest.raises(CopyAway):
        list(copy.look([Known(row.name, "stored", "", "", 3) for row in MediaFile.objects.all()]))
    with pytest.raises(CopyAway):
        list(copy.walk() or ())
