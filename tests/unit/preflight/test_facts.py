"""What preflight_facts reads from a host, and how its answer is turned into one report's input."""

from __future__ import annotations

import os
import socket
import threading
from pathlib import Path

import pytest
from ansible_collections.tribrick.media.plugins.action import preflight_facts as action
from ansible_collections.tribrick.media.plugins.modules import host_pins
from ansible_collections.tribrick.media.plugins.modules import preflight_facts as module

MOUNTS = """\
21 1 254:0 / / rw,relatime shared:1 - ext4 /dev/vda1 rw
30 21 0:25 / /run rw,nosuid shared:5 - tmpfs tmpfs rw,size=100k
44 21 254:16 / /srv/gluster/media rw,relatime shared:9 - xfs /dev/vdb rw
45 21 254:32 / /srv/gluster/with\\040space rw - xfs /dev/vdc rw
46 21 254:48 / /srv/gluster/media rw,relatime shared:9 - ext4 /dev/vdd rw
"""


@pytest.mark.parametrize(
    ("path", "point", "kind"),
    [
        ("/srv/gluster/media/brick", "/srv/gluster/media", "ext4"),  # the later mount covers
        ("/srv/gluster/media2", "/", "ext4"),
        ("/srv/gluster/with space/brick", "/srv/gluster/with space", "xfs"),
        ("/run/x", "/run", "tmpfs"),
    ],
)
def test_the_mount_of_a_path(path: str, point: str, kind: str) -> None:
    found = module.mount_of(MOUNTS, path)
    assert (found["point"], found["type"]) == (point, kind)


@pytest.mark.parametrize(
    ("text", "version"),
    [
        ("glusterfs-server:\n  Installed: (none)\n  Candidate: 11.1-6\n", "11.1-6"),
        ("glusterfs-server:\n  Installed: (none)\n  Candidate: (none)\n", None),
        ("", None),
    ],
)
def test_the_candidate_version(text: str, version: str | None) -> None:
    assert module.candidate(text) == version


def test_pins_of_the_kit_are_told_from_others() -> None:
    text = "192.0.2.1 a\n# BEGIN tribrick names\n192.0.2.2\tb b.example # c\n# END tribrick names\n192.0.2.3 d\n"
    assert module.kit_pins(text) == ["b", "b.example"]


def test_the_marks_of_the_pins_are_the_writers() -> None:
    assert (module.PINS_BEGIN, module.PINS_END) == (host_pins.BEGIN, host_pins.END)


def test_the_pool_is_read_from_glusterds_store(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "GLUSTERD", str(tmp_path))
    assert module.pool() == {"uuid": None, "peers": [], "volumes": {}}
    (tmp_path / "vols/media/bricks").mkdir(parents=True)
    (tmp_path / "peers").mkdir()
    (tmp_path / "glusterd.info").write_text("UUID=1111\noperating-version=110000\n")
    (tmp_path / "peers/2222").write_text("uuid=2222\nstate=3\nhostname1=node2\n")
    (tmp_path / "vols/media/info").write_text("type=2\nvolume-id=3333\nbrick-0=node1:-srv-b\n")
    (tmp_path / "vols/media/bricks/node1:-srv-b").write_text("hostname=node1\npath=/srv/b\nreal_path=/srv/b\n")
    assert module.pool() == {
        "uuid": "1111",
        "peers": ["node2"],
        "volumes": {"media": {"id": "3333", "bricks": ["node1:/srv/b"]}},
    }


def test_a_brick_as_it_lies_there(tmp_path: Path) -> None:
    path = tmp_path / "mount" / "brick"
    found = module.brick(str(tmp_path / "mount"), str(path))
    assert not found["mount_exists"]
    assert not found["exists"]
    assert found["bytes"] == os.statvfs(tmp_path).f_frsize * os.statvfs(tmp_path).f_blocks
    path.mkdir(parents=True)
    (path / "b").touch()
    (path / "a").touch()
    found = module.brick(str(tmp_path / "mount"), str(path))
    assert found["entries"] == ["a", "b"]
    assert found["volume_id"] is None
    assert not found["mounted"]
    path.rename(tmp_path / "moved")
    path.symlink_to(tmp_path / "moved")
    found = module.brick(str(tmp_path / "mount"), str(path))
    assert found["exists"]
    assert not found["directory"], "a link could lead to another file system"


def test_connections_tell_open_from_closed_from_silent() -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        assert module.connect("127.0.0.1", port, 2) == "open"
    assert module.connect("127.0.0.1", port, 2) == "closed"
    # A full queue leaves the next connection without an answer, like a rule that drops packets.
    with socket.create_server(("127.0.0.1", 0), backlog=0) as server:
        port = server.getsockname()[1]
        held = [socket.socket() for _ in range(4)]
        for each in held:
            each.setblocking(False)
            each.connect_ex(("127.0.0.1", port))
        assert module.connect("127.0.0.1", port, 0.3) == "no answer"
        for each in held:
            each.close()


def test_names_that_do_not_exist_have_no_address() -> None:
    assert module.forward("localhost")
    assert module.forward("no-such-host.invalid") == []


def test_the_module_does_not_wait_for_a_hanging_lookup(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from ansible.module_utils.testing import patch_module_args

    never = threading.Event()
    monkeypatch.setattr(module, "forward", lambda _name: never.wait(60))
    with patch_module_args({"names": {"node1": "127.0.0.1"}, "deadline": 0.1}), pytest.raises(SystemExit):
        module.main()
    never.set()
    assert '"names": {"node1": []}' in capsys.readouterr().out


@pytest.mark.parametrize("late", [0.0, 1.5])
def test_the_clocks_offset_survives_a_slow_start(late: float) -> None:
    """True offset 300 s; the way there took `late` + 0.1 s, the way back 0.1 s."""
    found = action.clock(sent=1000.0, start=1300.1 + late, end=1302.1 + late, received=1002.2 + late)
    assert abs(found["offset"] - 300.0) <= found["uncertainty"] + 1e-6
    assert found["uncertainty"] == pytest.approx(0.1 + late / 2)


def test_the_last_words_of_ssh() -> None:
    text = "debug1: x\n\nWarning: y\nssh: connect to host node2 port 22: Connection timed out\n"
    assert action.last_words(text).endswith("port 22: Connection timed out")
    text = "Data could not be sent. Make sure this host can be reached over ssh: ssh: timed out\n"
    assert action.last_words(text) == "ssh: timed out"
    assert len(action.last_words("x" * 5000)) == 303
    assert action.last_words("") == ""


LINKS = """\
[{"ifname": "lo", "addr_info": [{"family": "inet", "local": "127.0.0.1", "prefixlen": 8}]},
 {"ifname": "eth0", "addr_info": [{"local": "192.0.2.11", "prefixlen": 24}, {"local": "fe80::1", "prefixlen": 64}]},
 {}, {"ifname": "eth1", "addr_info": [{"local": "198.51.100.7", "prefixlen": 24}]}]
"""


def test_interfaces_and_their_addresses() -> None:
    assert module.interfaces(LINKS) == {
        "lo": ["127.0.0.1"], "eth0": ["192.0.2.11", "fe80::1"], "eth1": ["198.51.100.7"],
    }  # fmt: skip
    assert module.interfaces("") == {}


def test_an_arp_answer_is_believed_only_for_the_address_that_was_asked_for() -> None:
    probe = module.who_has("192.0.2.10", bytes.fromhex("020000000001"))
    assert len(probe) == 42 and probe[:6] == b"\xff" * 6
    assert probe[28:32] == bytes(4), "a probe claims no address"
    assert module.answer_to(probe, "192.0.2.10") is None, "our own question is no answer"
    stranger = bytes.fromhex("02005e000099")
    reply = probe[:20] + b"\0\x02" + stranger + socket.inet_aton("192.0.2.10") + probe[32:]
    assert module.answer_to(reply, "192.0.2.10") == "02:00:5e:00:00:99"
    assert module.answer_to(reply, "192.0.2.11") is None
    assert module.answer_to(reply[:30], "192.0.2.10") is None
    assert module.answer_to(reply[:12] + b"\x08\0" + reply[14:], "192.0.2.10") is None


@pytest.mark.parametrize(
    ("vip", "wanted", "written", "interface", "held", "ours", "asked"),
    [
        ("192.0.2.10", "", "", "eth0", None, False, True),
        ("192.0.2.10", "eth1", "", "eth1", None, False, True),
        ("192.0.2.10", "eth9", "", None, None, False, False),
        ("198.51.100.7", "", "", "eth0", "eth1", False, False),
        ("192.0.2.10", "", " 192.0.2.10/24", "eth0", None, True, False),
        ("192.0.2.1", "", " 192.0.2.10/24", "eth0", None, False, True),
        ("photos", "", "", "eth0", None, False, False),
    ],
)
def test_the_sites_address_as_a_host_sees_it(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    vip: str,
    wanted: str,
    written: str,
    interface: str | None,
    held: str | None,
    ours: bool,
    asked: bool,
) -> None:
    (tmp_path / "conf").write_text(written)
    monkeypatch.setattr(module, "ADDRESS", str(tmp_path / "conf"))
    monkeypatch.setattr(module, "asked_for", lambda address, link, _: f"{address} on {link}")
    found = module.one_address(module.interfaces(LINKS), vip, "192.0.2.11", wanted, 1.0)
    said = f"{vip} on {interface}" if asked else None
    assert found == {"interface": interface, "held": held, "ours": ours, "answered_by": said}


def test_the_file_with_the_address_is_the_roles() -> None:
    role = Path(__file__).resolve().parents[3] / "roles/media_vip"
    assert f": {module.BALANCER}\n" in (role / "vars/main.yml").read_text()
    assert f": {module.ADDRESS}\n" in (role / "vars/main.yml").read_text()
    assert "\n        {{ media_vip_address }}\n" in (role / "templates/keepalived.conf.j2").read_text()


def test_uploads_that_are_left_in_a_spool(tmp_path: Path) -> None:
    spool = tmp_path / "spool"
    environment = f'# written\nTRIBRICK_BACKEND="volume"\nTRIBRICK_SPOOL="{spool}"\n'
    assert module.spooled(environment) is None, "it is not there yet"
    (spool / ".tribrick-incoming").mkdir(parents=True)
    (spool / ".tribrick-incoming/half").touch()
    (spool / "photos/a").mkdir(parents=True)
    (spool / "photos/a/.new").touch()
    assert module.spooled(environment) is None, "nothing of it was acknowledged"
    (spool / "photos/a/cat.png").touch()
    assert module.spooled(environment) == f"{spool}/photos/a/cat.png"
    assert module.spooled('TRIBRICK_BACKEND="volume"\n') is None
    assert module.spooled("") is None
