"""The lab's disks and faults, as far as no lab is needed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from kit import disks, faults, lab
from kit.run import Console, KitError


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> lab.Lab:
    monkeypatch.setattr(lab, "ROOT", tmp_path)
    made = lab.Lab("unit")
    made.note(subnet="198.18.99.0/24")
    return made


def test_every_fault_says_what_it_is() -> None:
    for name, fault in faults.FAULTS.items():
        assert name == fault.name and fault.summary and fault.__doc__
        for step in ("inject", "proof", "lift", "ended"):
            assert getattr(fault, step) is not getattr(faults.Fault, step), f"{name} lacks {step}"


def test_hosts_of_a_fault(here: lab.Lab) -> None:
    assert faults.make(here, "kill", ["node2", "node1", "node2"]).hosts == ["node2", "node1"]
    assert faults.make(here, "database-stop", ["node1"]).hosts == ["db1"]
    for name, hosts in (("kill", []), ("kill", ["db1"]), ("silence", ["node1", "node9"])):
        with pytest.raises(KitError, match="node1, node2, node3"):
            faults.make(here, name, hosts)
    with pytest.raises(KitError, match=r"no fault 'storm'.*power-cut"):
        faults.make(here, "storm", ["node1"])


@pytest.mark.parametrize(
    ("name", "hosts", "cut"),
    [
        ("partition", ["node2"], {("node1", "node2"), ("node2", "node3")}),
        ("partition", ["node1", "node2"], {("node1", "node3"), ("node2", "node3")}),
        ("alone", ["node1"], {("node1", "node2"), ("node1", "node3"), ("node2", "node3")}),
        ("bridge", ["node2"], {("node1", "node3")}),
    ],
)
def test_who_is_cut_from_whom(here: lab.Lab, name: str, hosts: list[str], cut: set[tuple[str, str]]) -> None:
    fault = faults.make(here, name, hosts)
    assert isinstance(fault, faults.Partition)
    broken, whole = fault.pairs()
    assert {tuple(sorted(pair)) for pair in broken} == cut
    assert len(broken) + len(whole) == (2 + len(cut) if name == "bridge" else 3)


def test_an_unplugged_node_is_one_whose_port_is_disabled(
    here: lab.Lab, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name, index in (("veth1", 7), ("veth2", 71)):
        (tmp_path / name / "brport").mkdir(parents=True)
        (tmp_path / name / "ifindex").write_text(f"{index}\n")
        (tmp_path / name / "brport/state").write_text("3\n")

    def capture(command: list[str], **_more: Any) -> None:
        assert command[:4] == ["bridge", "link", "set", "dev"] and command[5:-1] == ["state"]
        (tmp_path / command[4] / "brport/state").write_text(f"{command[-1]}\n")

    monkeypatch.setattr(faults, "NETWORK", tmp_path)
    monkeypatch.setattr(faults, "capture", capture)
    monkeypatch.setattr(faults, "inside", lambda *_words: "71\n")
    monkeypatch.setattr(faults, "state", lambda _lab, _host: "running")
    monkeypatch.setattr(faults, "running", lambda _lab, _hosts: None)
    monkeypatch.setattr(faults, "reach", lambda _address: "silent")
    fault = faults.make(here, "unplug", ["node2"])
    with pytest.raises(KitError, match="was to be unplugged"):
        fault.proof()
    fault.inject()
    assert "no answer" in fault.proof() and fault.ended() == "node2 is still unplugged"
    assert (tmp_path / "veth1/brport/state").read_text() == "3\n", "another node's"
    fault.lift()
    assert fault.ended() is None
    monkeypatch.setattr(faults, "inside", lambda *_words: "9\n")
    with pytest.raises(KitError, match="not found"):
        fault.inject()


def test_a_lab_without_disks_says_how_to_get_them(here: lab.Lab) -> None:
    with pytest.raises(KitError, match="--disks xfs"):
        faults.disk(here, "node1")


def test_a_full_disk_takes_what_others_free_meanwhile(here: lab.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    fault = faults.make(here, "disk-full", ["node1"])
    assert isinstance(fault, faults.DiskFull)
    free, filled = 3, list[str]()
    monkeypatch.setattr(lab.Lab, "site_variables", lambda _lab: {"tribrick_brick_mount": "/srv/gluster/media"})
    monkeypatch.setattr(faults.DiskFull, "_fill", lambda _fault, host: filled.append(host))
    monkeypatch.setattr(faults, "inside", lambda *_words: "No space left on device" if len(filled) >= free else "")
    fault.inject()
    assert "no space left" in fault.proof() and filled == ["node1"] * 3
    free = 100
    with pytest.raises(KitError, match="was to be full"):
        fault.proof()
    assert len(filled) == 3 + fault.fills


@pytest.mark.parametrize(("text", "seconds"), [("30s", 30), ("2m", 120)])
def test_times(text: str, seconds: float) -> None:
    assert lab._seconds(text) == seconds


@pytest.mark.parametrize("text", ["", "30", "s", "0s", "-1s", "1.5m", "2h"])
def test_bad_times(text: str) -> None:
    with pytest.raises(lab.argparse.ArgumentTypeError, match="30s, 2m"):
        lab._seconds(text)


def test_removing_disks_leaves_nothing(tmp_path: Path) -> None:
    place = tmp_path / "disks"
    disks.remove(Console(), place)  # nothing there: nothing to do
    (place / "node1").mkdir(parents=True)
    (place / "node2.img").write_bytes(b"x")
    (place / "node3.new").write_bytes(b"x")
    assert [disk.node for disk in disks.found(place)] == ["node1", "node2"]
    disks.remove(Console(), place)
    assert not place.exists()


def test_a_mounted_disk_is_never_deleted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "disks"
    (place / "node1").mkdir(parents=True)
    (place / "node1" / "file").write_bytes(b"x")
    monkeypatch.setattr(disks, "_mounted", lambda point: True)

    def busy(*args: object, **more: object) -> None:
        raise KitError("target is busy")

    monkeypatch.setattr(disks, "capture", busy)
    with pytest.raises(KitError, match="busy"):
        disks.remove(Console(), place)
    with pytest.raises(KitError, match="not formatted"):
        disks.Disk(place, "node1").format()
    assert (place / "node1" / "file").exists()


@pytest.fixture
def unmade(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing of a lab is made but its inventory."""
    monkeypatch.setattr(lab, "containers", lambda lab_: {})
    monkeypatch.setattr(lab, "ready_disks", lambda console, lab_: None)
    monkeypatch.setattr(lab, "forget_disks", lambda console, lab_: None)
    monkeypatch.setattr(lab, "_docker_subnets", list)
    monkeypatch.setattr(lab.images, "ensure", lambda console, release, kind: "tag")


def overrides(here: lab.Lab) -> dict[str, Any]:
    """The lab's own values."""
    text = (here.inventory / "group_vars/all/tribrick_overrides.yml").read_text(encoding="utf-8")
    return dict(yaml.safe_load(text))


@pytest.mark.usefixtures("unmade")
@pytest.mark.parametrize(
    ("disk_kind", "words", "path"),
    [
        ("volume", None, ""),
        ("volume", True, "/srv/media-spool"),
        ("xfs", True, "/srv/gluster/media/spool"),
        ("xfs", False, ""),
    ],
)
def test_spools_of_a_lab(here: lab.Lab, disk_kind: str, words: bool | None, path: str) -> None:
    lab.prepare(lab.Console(), here, None, None, disk_kind, None, words)
    values = overrides(here)
    assert here.spool == path
    assert values.get("media_spool", False) is bool(path)
    assert values.get("media_spool_path", "/srv/media-spool") == (path or "/srv/media-spool")


@pytest.mark.usefixtures("unmade")
def test_one_address_of_a_lab_stays_until_it_is_taken_away(here: lab.Lab, monkeypatch: pytest.MonkeyPatch) -> None:
    def up(*words: str) -> Any:
        lab.prepare_as_asked(lab.Console(), here, lab.parser().parse_args(["up", *words]))
        monkeypatch.setattr(lab, "containers", lambda lab_: dict.fromkeys(lab.NODES, "running"))
        return overrides(here).get("tribrick_vip")

    assert up() is None
    assert up("--vip", "--spool") == up() == f"{here.address(lab.VIP)}/24"
    assert here.spool, "one option leaves the others alone"
    assert (up("--no-vip"), up()) == (None, None)
    assert here.spool


def test_a_killed_brick_is_started_once_glusterd_has_time(here, monkeypatch):
    fault = faults.make(here, "brick-kill", ["node2"])
    running: list[str] = []
    busy = ["busy", "busy"]

    def inside(_lab, host, script, deadline):
        assert (host, "start" in script, deadline) == ("node2", True, 60)
        if busy:
            busy.pop()
            raise KitError("volume start: media: failed: Another transaction is in progress. Please try again.")
        running.append("4711")

    variables = {"tribrick_volume": "media", "tribrick_brick_path": "/srv/brick"}
    monkeypatch.setattr(lab.Lab, "site_variables", lambda _lab: variables)
    monkeypatch.setattr(faults, "state", lambda _lab, _host: "running")
    monkeypatch.setattr(faults, "processes", lambda _lab, _host, _pattern: running)
    monkeypatch.setattr(faults, "inside", inside)
    fault.lift()
    assert running == ["4711"] and not busy
    fault.lift()
    assert running == ["4711"], "one that runs is left alone"

    def broken(*_words, **_more):
        raise KitError("volume start: media: failed: Volume media does not exist")

    running.clear()
    monkeypatch.setattr(faults, "inside", broken)
    with pytest.raises(KitError, match="does not exist"):
        fault.lift()
