"""./scripts/torture from its words to its exit code, on a site and mounts of this process instead of a lab."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import os
from pathlib import Path
from typing import Any

import pytest

from faults import nemesis, observer, torture, workload
from faults.checker import Seen
from faults.history import content, load


class LocalMount:
    """In place of a program on a node: the same directory for all nodes."""

    root = ""

    def __init__(self, lab: Any, node: str) -> None:
        pass

    def ask(self, question: dict[str, Any]) -> str:
        path = Path(question["name"])
        if question["what"] == "create":
            seed, label, size = question["content"].split()
            path.write_bytes(content(seed, label, int(size)))
        else:
            path.rename(question["target"])
        return ""

    def close(self) -> None:
        pass


class Fault:
    """Does nothing but what a test wants at its injection."""

    def __init__(self, lab: Any, hosts: list[str]) -> None:
        self.lab, self.hosts = lab, hosts

    def inject(self) -> None:
        self.lab.during()

    def proof(self) -> str:
        return "it holds"

    def lift(self) -> None:
        pass

    def ended(self) -> str | None:
        return None


@pytest.fixture
def lab(site: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    shop, lab = site
    mount = tmp_path / "mount"
    mount.mkdir()
    lab.name, lab.state, lab.mount, lab.shop = "unit", tmp_path / "state", mount, shop
    lab.during = lambda: None
    lab.alone = contextlib.nullcontext
    lab.site_variables = lambda: {"tribrick_media_root": str(mount)}
    lab.recall = lambda: {"subnet": "198.18.0.0/24"}
    web = observer.look

    def look(lab_: Any, kind: str, node: str, names: list[str]) -> list[Seen]:
        if kind == "web":
            return web(lab_, kind, node, names)
        found = []
        for name in names:
            data = shop.files.get(name) if name.startswith("photos/") else None
            path = mount / name
            if data is None and path.is_file():
                data = path.read_bytes()
            hashed = "" if data is None else hashlib.sha256(data).hexdigest()
            found.append(Seen(f"{kind} {node}", name, "absent" if data is None else "file", len(data or b""), hashed))
        return found

    LocalMount.root = str(mount)
    monkeypatch.setattr(workload, "MountClient", LocalMount)
    monkeypatch.setattr(observer, "look", look)
    monkeypatch.setattr(observer, "without_gluster", lambda lab_: False)
    monkeypatch.setattr(observer, "clean", lambda lab_, under_way=0: None)
    monkeypatch.setattr(torture, "inside", lambda lab_, node, script, **more: os.system(script) and None)  # noqa: S605
    monkeypatch.setattr(torture, "account", lambda lab_, user: "t")
    monkeypatch.setattr(torture, "containers", lambda lab_: {"node1": "running"})
    monkeypatch.setattr(torture, "Lab", lambda name: lab)
    monkeypatch.setattr(torture, "STEADY", 1.0)
    monkeypatch.setattr(torture, "GONE_WAIT", 1.0)
    monkeypatch.setattr(nemesis.faults, "make", lambda lab_, name, hosts: Fault(lab_, hosts))
    return lab


WORDS = [
    "--scenario",
    "node_loss",
    "--seed",
    "7",
    "--minutes",
    "0.05",
    "--clients",
    "3",
    "--hold",
    "0.5",
    "--pause",
    "0.2",
]


def test_a_run_without_a_violation(lab: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert torture.main(WORDS) == 0
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "operations acknowledged; files: 0 corrupt, 0 torn, 0 lost, 0 resurrected," in last
    place = lab.state / "torture" / "node_loss-7"
    facts = json.loads((place / "report.json").read_text(encoding="utf-8"))
    assert facts["numbers"]["acknowledged"] == int(last.split()[0]) > 50
    assert facts["numbers"]["acknowledged_under_fault"] > 0
    assert {fault["fault"] for fault in facts["faults"]} <= set(nemesis.SCENARIOS["node_loss"]) and facts["faults"]
    assert facts["counts"]["stable"] > 20 and facts["numbers"]["operations"]["rename"] > 0
    assert (place / "timeline.png").stat().st_size > 1000 and len(load(place / "history.jsonl")) > 100
    assert not any(lab.mount.iterdir()), "its directory on the mount is removed"


def test_an_outage_needs_spools(lab: Any, capsys: pytest.CaptureFixture[str]) -> None:
    lab.spool = ""
    words = ["--scenario", "outage", *WORDS[2:]]
    assert torture.main(words) == 2
    assert "The lab 'unit' has no spool" in capsys.readouterr().err
    lab.spool = "/srv/spool"
    assert torture.main(words) == 0


def test_two_seeds(lab: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert torture.main([*WORDS, "--seeds", "2", "--files", "4"]) == 0
    told = capsys.readouterr().out.splitlines()
    runs = [int(line.split(": ")[1].split()[0]) for line in told if line.startswith(("seed 7:", "seed 8:"))]
    assert len(runs) == 2 and int(told[-1].split()[0]) == sum(runs)
    facts = json.loads((lab.state / "torture" / "node_loss-7-to-8.json").read_text(encoding="utf-8"))
    assert facts["numbers"]["acknowledged"] == sum(runs) and facts["seed"] == "7 to 8"
    assert not lab.shop.files, "each run removes its files"


def test_without_faults(lab: Any) -> None:
    assert torture.main(["--scenario", "none", "--minutes", "0.02", "--clients", "2"]) == 0


def test_a_file_that_a_fault_took(lab: Any, capsys: pytest.CaptureFixture[str]) -> None:
    def during() -> None:
        for name in list(lab.shop.files)[:3]:
            with lab.shop.lock:
                lab.shop.files.pop(name, None)

    lab.during = during
    assert torture.main(WORDS) == 1
    assert " 0 lost" not in capsys.readouterr().out.splitlines()[-1]


def test_a_lab_that_does_not_become_clean_is_no_verdict(
    lab: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(observer, "clean", lambda lab_, under_way=0: "node2 is exited")
    monkeypatch.setattr(torture, "CLEAN_WAIT", 0.1)
    assert torture.main(WORDS) == 2
    assert "Waited 0 s for the lab to be clean; at the end: node2 is exited" in capsys.readouterr().err


def test_a_client_that_died_is_no_verdict(
    lab: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(LocalMount, "ask", lambda self, question: 1 // 0)
    assert torture.main(WORDS) == 2
    assert "ZeroDivisionError" in capsys.readouterr().err


@pytest.mark.parametrize("told", ["", "[Errno 107] Transport endpoint is not connected"])
@pytest.mark.parametrize(("kind", "times", "red"), [("mount", 1, False), ("mount", 1000, True), ("brick", 1, True)])
def test_old_names_that_only_a_mount_remembers(
    lab: Any, monkeypatch: pytest.MonkeyPatch, kind: str, times: int, red: bool, told: str
) -> None:
    ask = LocalMount.ask
    monkeypatch.setattr(
        LocalMount, "ask", lambda mount, words: ask(mount, words) or (told if words["what"] == "rename" else "")
    )
    monkeypatch.setattr(torture, "CACHED", 0.05)
    monkeypatch.setattr(torture, "CACHE_WAIT", 0.4)
    honest, asked = observer.look, dict[str, int]()

    def look(lab_: Any, kind_: str, node: str, names: list[str]) -> list[Seen]:
        found = []
        for one in honest(lab_, kind_, node, names):
            current = next(lab.mount.glob(f"{one.name.rpartition('-')[0]}-*"), None)
            remembers = (kind_, node) == (kind, "node2") and one.state == "absent" and current is not None
            if remembers and asked.setdefault(one.name, 0) < times:
                asked[one.name] += 1
                behind = honest(lab_, kind_, node, [str(current.relative_to(lab.mount))])[0]
                found.append(dataclasses.replace(behind, name=one.name))
            else:
                found.append(one)
        return found

    monkeypatch.setattr(observer, "look", look)
    assert torture.main([*WORDS, "--minutes", "0.02", "--pause", "0.1"]) == (1 if red else 0)
    assert asked, "nothing was renamed"


def test_in_gluster_free_mode_trees_are_looked_at_and_nobody_renames_on_mounts(
    lab: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(observer, "without_gluster", lambda lab_: True)
    look, places = observer.look, set()

    def seen(lab_: Any, kind: str, node: str, names: list[str]) -> list[Seen]:
        places.add(f"{kind} {node}")
        return look(lab_, kind, node, names)

    monkeypatch.setattr(observer, "look", seen)
    assert torture.main(["--scenario", "none", "--minutes", "0.02", "--clients", "2"]) == 0
    assert places == set(observer.places(("web", "tree")))
    facts = json.loads((lab.state / "torture" / "none-1" / "report.json").read_text(encoding="utf-8"))
    assert facts["numbers"]["operations"]["create"] == 0 and facts["counts"]["stable"] > 0


@pytest.mark.parametrize(
    ("marks", "mode"),
    [
        (["", "", ""], False),
        (['{"entered": true}', "", '{"entered": true}'], False),
        (['{"entered": true}', '{"entered": false}', '{"entered": true}'], False),
        (['{"entered": true}'] * 3, True),
    ],
)
def test_the_mode_is_that_of_all_nodes(monkeypatch: pytest.MonkeyPatch, marks: list[str], mode: bool) -> None:
    said = dict(zip(observer.NODES, marks, strict=True))
    monkeypatch.setattr(observer, "state", lambda _lab, _node: "running")
    monkeypatch.setattr(observer, "inside", lambda _lab, node, _script: said[node])
    assert observer.without_gluster(None) is mode  # type: ignore[arg-type]
