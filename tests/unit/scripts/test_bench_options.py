"""./scripts/bench options: a volume to throw away, trials in turns, figures; the program that works runs here."""

from __future__ import annotations

import argparse
import contextlib
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml

from kit import bench, bench_options, benchvolume
from kit.lab import ROOT
from kit.run import KitError

INFO = """
Volume Name: media
Status: Started
Options Reconfigured:
cluster.quorum-type: auto
auth.allow: 198.18.0.11,198.18.0.12
client.ssl: on
"""


def test_the_options_that_are_set() -> None:
    assert benchvolume.options_set(INFO) == {
        "cluster.quorum-type": "auto", "auth.allow": "198.18.0.11,198.18.0.12", "client.ssl": "on",
    }  # fmt: skip
    assert benchvolume.options_set("Volume Name: media\nStatus: Created\n") == {}


def status(*bricks: str) -> str:
    nodes = "".join(f"<node><hostname>n</hostname><path>/b</path><status>{one}</status></node>" for one in bricks)
    healer = "<node><hostname>Self-heal Daemon</hostname><path>localhost</path><status>1</status></node>"
    return f"<cliOutput><opRet>0</opRet><volStatus>{nodes}{healer}</volStatus></cliOutput>"


def test_bricks_that_run() -> None:
    assert benchvolume.online(status("1", "0", "1")) == 2
    with pytest.raises(KitError, match="no XML"):
        benchvolume.online("Another transaction is in progress")


@pytest.mark.parametrize("form", ["direct", "rename", "none"])
def test_the_work(tmp_path: Path, form: str) -> None:
    fill = [sys.executable, "-c", bench_options.FILL, str(tmp_path), "20", "100"]
    subprocess.run(fill, check=True, timeout=30)
    words = [str(tmp_path), "20", "100", "0.2", "2", form]
    done = subprocess.run(
        [sys.executable, "-", *words], input=bench_options.WORK, capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert set(found) == {"cold", "hot", "stat"} | (set() if form == "none" else {"save"})
    assert all(rate > 0 for rate in found.values())
    assert list((tmp_path / "saved").iterdir()) == [], "what was saved is gone"
    (tmp_path / "7").write_bytes(b"short")
    done = subprocess.run(
        [sys.executable, "-", *words], input=bench_options.WORK, capture_output=True, text=True, timeout=60
    )
    assert done.returncode != 0 and "short" in done.stderr


class FakeScratch:
    """In place of the volume; notes what is done to it."""

    def __init__(self) -> None:
        self.options, self.done = (
            {"performance.flush-behind": "off", "client.ssl": "on", "server.ssl": "on"},
            list[str](),
        )

    def option(self, name: str) -> str:
        return self.options.get(name, "")

    def set(self, values: dict[str, str]) -> None:
        self.options = {name: value for name, value in (self.options | values).items() if value}
        self.done.append("set")

    def __getattr__(self, name: str) -> Any:
        return lambda *_words: self.done.append(name)

    @contextlib.contextmanager
    def there(self) -> Iterator[None]:
        yield


def test_an_option_is_put_back() -> None:
    volume: Any = FakeScratch()
    before = dict(volume.options)
    seen: list[str] = []

    def ends() -> None:
        with bench_options.different(volume, bench_options.TRIALS["quick-read"]):
            seen.append(volume.options["performance.quick-read"])
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        ends()
    assert seen == ["off"]
    assert volume.options == before and volume.done == ["unmount", "set"] * 2


def test_what_bricks_take_at_their_start_only() -> None:
    volume: Any = FakeScratch()
    with bench_options.different(volume, bench_options.TRIALS["tls"]):
        assert volume.options["client.ssl"] == "off"
    assert volume.options["client.ssl"] == "on"
    assert volume.done == ["unmount", "stop", "set", "start"] * 2


def test_a_trial_that_leaves_the_volume_alone() -> None:
    volume: Any = FakeScratch()
    with bench_options.different(volume, bench_options.TRIALS["read-only"]):
        pass
    assert volume.done == []


def test_a_run_takes_turns(monkeypatch: pytest.MonkeyPatch) -> None:
    volume, asked = FakeScratch(), list[tuple[str, str, str]]()

    def work(volume_: Any, mount: dict[str, str], form: str, _ciphers: str = "") -> dict[str, float]:
        asked.append((volume_.option("performance.flush-behind"), bench_options.mount_options(mount), form))
        rate = 200.0 if volume_.option("performance.flush-behind") == "on" or "ro" in mount else 100.0
        return {kind: rate for kind in bench_options.WORKS if form != "none" or kind != "save"}

    monkeypatch.setattr(bench_options, "Scratch", lambda _lab: volume)
    monkeypatch.setattr(bench_options, "inside", lambda *_words, **_more: "glusterfs 11.1\n")
    monkeypatch.setattr(bench_options, "work", work)
    labs: list[str] = []
    monkeypatch.setattr(bench_options, "Volume", lambda _lab: argparse.Namespace(unclean=lambda: labs.append("asked")))
    options = argparse.Namespace(option=["flush-behind", "read-only"], all=False, blocks=2)
    figures = bench_options.run(Any, options, lambda _text: None)  # type: ignore[arg-type]  # no lab is asked
    bench.check_flat(figures)
    assert [one[0] for one in asked[1:5]] == ["off", "on", "on", "off"]
    assert asked[6][1].startswith("log-level=WARNING,attribute-timeout=30,") and asked[6][1].endswith(",ro")
    assert {one[2] for one in asked[5:]} == {"none"}, "the same work both ways"
    assert figures["flush_behind_save"] == 2.0 and "read_only_save" not in figures and figures["read_only_cold"] == 2.0
    assert labs == ["asked"], "the lab's own volume has come through it"
    told = bench_options.lines(figures | {"debian": "13"})
    assert len(told) == 4 and told[3].split()[-1] == "-"
    assert bench_options.picture(figures).count("<circle") == 2 + 3


class FakeNode:
    """Runs a node's scripts here; *clients* are what pgrep finds."""

    def __init__(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.clients = list[subprocess.Popen[bytes]]()
        monkeypatch.setattr(bench_options, "OPENSSL", str(tmp_path / "openssl.cnf"))
        monkeypatch.setattr(bench_options, "inside", self.inside)

    def inside(self, _lab: Any, _node: str, script: str, **_more: Any) -> str:
        found = " ".join(str(one.pid) for one in self.clients)
        script = script.replace("pgrep -x glusterfs", f"echo {found}")
        return subprocess.run(["sh", "-c", script], capture_output=True, text=True, check=True, timeout=30).stdout


@pytest.mark.parametrize("ciphers", ["TLS_AES_128_GCM_SHA256", "TLS_CHACHA20_POLY1305_SHA256"])
def test_a_client_that_offers_other_ciphers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, ciphers: str) -> None:
    node = FakeNode(tmp_path, monkeypatch)
    volume: Any = argparse.Namespace(lab=None, mount="/mnt/tribrick-bench")
    variable = bench_options.offered(volume.lab, ciphers)
    assert variable == f"OPENSSL_CONF={tmp_path}/openssl.cnf"
    with pytest.raises(KitError, match="does not have"):
        bench_options.check_environment(volume, variable)
    # Another mount's client first, then this one's.
    for mount in ("/srv/media", volume.mount, volume.mount):
        words = ["sh", "-c", "read _", "glusterfs", mount]
        node.clients.append(
            subprocess.Popen(words, stdin=subprocess.PIPE, env={"OPENSSL_CONF": variable.partition("=")[2]})
        )
        with contextlib.suppress(KitError) if mount != volume.mount else contextlib.nullcontext():
            bench_options.check_environment(volume, variable)
            assert mount == volume.mount, "the client of another mount says nothing of this one"
    for one in node.clients:
        one.communicate(b"\n")


def test_ciphers_that_openssl_does_not_take(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    FakeNode(tmp_path, monkeypatch)
    monkeypatch.setattr(bench_options, "CIPHERS", "# {ciphers}\n")
    with pytest.raises(KitError, match="was to offer"):
        bench_options.offered(None, "TLS_AES_128_GCM_SHA256")  # type: ignore[arg-type]


def test_what_is_measured_by_default() -> None:
    parser = argparse.ArgumentParser()
    bench_options.arguments(parser)
    assert not parser.parse_args([]).all and set(bench_options.USUAL) < set(bench_options.TRIALS)
    with pytest.raises(SystemExit):
        parser.parse_args(["--all", "--option", "tls"])


def test_the_mount_is_the_kits() -> None:
    role = ROOT / "roles" / "media_mount"
    defaults = yaml.safe_load((role / "defaults" / "main.yml").read_text(encoding="utf-8"))
    assert bench_options.MOUNT["attribute-timeout"] == str(defaults["media_mount_attribute_timeout"])
    assert bench_options.MOUNT["entry-timeout"] == str(defaults["media_mount_entry_timeout"])
    unit = (role / "templates" / "mount.j2").read_text(encoding="utf-8")
    assert "'log-level=WARNING'" in unit and "'negative-timeout=0'" in unit


def test_no_trial_is_the_profiles_own_value() -> None:
    defaults = yaml.safe_load((ROOT / "roles/gluster_volume/defaults/main.yml").read_text(encoding="utf-8"))
    profile = {one["name"]: str(one["value"]) for one in defaults["gluster_volume_options"]}
    for name, trial in bench_options.TRIALS.items():
        same = {option for option, value in trial.options.items() if profile.get(option) == value}
        assert not same, f"{name}: the kit's own value"


class FakeLab:
    """A lab whose commands are noted; *volumes* are what gluster knows."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.done, self.volumes, self.busy = list[str](), {"media": INFO}, 0
        self.refused = 0
        monkeypatch.setattr(benchvolume, "inside", self.inside)

    def site_variables(self) -> dict[str, Any]:
        return {
            "tribrick_volume": "media", "tribrick_media_root": "/srv/media",
            "tribrick_brick_path": "/srv/gluster/media/brick",
        }  # fmt: skip

    def inside(self, _lab: Any, node: str, script: str, **_more: Any) -> str:
        self.done.append(f"{node} {script}")
        if "umount" in script:
            self.busy -= 1
            return "umount: target is busy.\nmounted\n" if self.busy >= 0 else ""
        if script.endswith("volume list"):
            return "\n".join(self.volumes)
        if "volume info" in script:
            return self.volumes.get(script.split()[-1], "")
        if "volume create" in script:
            self.volumes["tribrick-bench"] = "Status: Started\nOptions Reconfigured:\nclient.ssl: on\n"
        if "volume delete" in script:
            self.refused -= 1
            if self.refused >= 0:
                raise KitError("Another transaction is in progress")
            del self.volumes["tribrick-bench"]
        if "volume status" in script:
            return status("1", "1", "1")
        return "1\n"


def test_a_volume_like_the_labs_for_a_while(monkeypatch: pytest.MonkeyPatch) -> None:
    lab: Any = FakeLab(monkeypatch)
    volume = benchvolume.Scratch(lab)
    with volume.there():
        volume.remount("ro")
        assert set(lab.volumes) == {"media", "tribrick-bench"}
    assert set(lab.volumes) == {"media"}
    said = "\n".join(lab.done)
    assert "volume set tribrick-bench cluster.quorum-type auto auth.allow 198.18.0.11,198.18.0.12\n" in said
    assert "mount -t glusterfs -o ro node1:/tribrick-bench /mnt/tribrick-bench" in said
    assert not [one for one in lab.done if " media" in one and "info media" not in one], "the lab's own is left alone"
    for node in ("node1", "node2", "node3"):
        removed = [one for one in lab.done[-5:] if one.startswith(f"{node} rm -rf /srv/gluster/media/bench-volume;")]
        assert len(removed) == 1 and "mnt-tribrick-bench.log*" in removed[0]


def test_a_mount_that_a_program_still_works_in_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    lab: Any = FakeLab(monkeypatch)
    lab.busy = 2
    benchvolume.Scratch(lab).unmount()
    assert sum("umount" in one for one in lab.done) == 3


def test_a_volume_that_a_killed_run_has_left(monkeypatch: pytest.MonkeyPatch) -> None:
    lab: Any = FakeLab(monkeypatch)
    lab.volumes["tribrick-bench"], lab.refused = "Status: Started\n", 1
    with benchvolume.Scratch(lab).there():
        before, _, _ = "\n".join(lab.done).partition("volume create")
        assert "volume stop tribrick-bench force" in before and before.count("volume delete tribrick-bench") == 2
