"""The workload and the web's observer against a small site of three addresses, honest or not."""

from __future__ import annotations

import threading
import time
from pathlib import Path
from typing import Any

from faults import observer
from faults.checker import Report, report
from faults.history import CLASSES, Event, History, load, operations
from faults.workload import EXTENSION, Workload
from kit.lab import NODES

PLACES = [f"web {node}" for node in NODES]


def work(lab: Any, path: Path, enough: int = 250, clients: int = 4) -> list[Event]:
    """Let the clients run until there is enough; return the history."""
    history = History(path / "history.jsonl")
    load_ = Workload(lab, "t", "s", history, clients, largest=65_537)
    load_.start()
    end = time.monotonic() + 60
    while len(history.events) < 2 * enough:
        assert time.monotonic() < end and not load_.problems, load_.problems
        threading.Event().wait(0.05)
    load_.finish()
    assert not load_.problems
    history.close()
    assert load(path / "history.jsonl") == history.events
    return history.events


def judged(lab: Any, events: list[Event]) -> Report:
    listed = observer.listing(lab, "t", "node1", EXTENSION)
    names = {
        op.name for op in operations(events) if op.invoke.what in ("upload", "replace") and op.name
    } | listed.keys()
    seen = [one for node in NODES for one in observer.look(lab, "web", node, sorted(names))]
    return report("s", events, seen, listed, PLACES)


def test_an_honest_site(site: tuple[Any, Any], tmp_path: Path) -> None:
    shop, lab = site
    events = work(lab, tmp_path)
    result = judged(lab, events)
    assert not result.red and result.counts["stale"] == result.counts["unknown"] == 0, result.line()
    ops = list(operations(events))
    assert {op.outcome for op in ops} == {"ok"}
    assert {op.invoke.what for op in ops} == {"upload", "replace", "delete", "read"}
    assert {op.invoke.host for op in ops} == set(NODES)
    assert {op.end.seen for op in ops if op.invoke.what == "read" and op.end and op.end.status == 200} == {"match"}
    assert result.counts["stable"] == len(shop.files) + len(shop.deleted)
    assert all(share >= 0.05 for word, share in result.numbers["sizes"].items() if word in ("1 B", "64 KiB")), CLASSES


def test_a_client_keeps_no_more_files_than_it_may(site: tuple[Any, Any], tmp_path: Path) -> None:
    shop, lab = site
    history = History(tmp_path / "history.jsonl")
    load_ = Workload(lab, "t", "s", history, 4, largest=65_537, files=5)
    load_.start()
    end = time.monotonic() + 60
    while len(history.events) < 600:
        assert time.monotonic() < end and not load_.problems, load_.problems
        threading.Event().wait(0.05)
    load_.finish()
    uploads = sum(event.kind == "ok" and event.what in ("upload", "replace") for event in history.events)
    assert uploads > 60 and len(load_.known.files) <= 4 * 6, "and with replaced ones, which are kept beside the new"
    load_.tidy()
    assert not shop.files


def test_unknown_outcomes_are_asked_for_again_and_never_red(site: tuple[Any, Any], tmp_path: Path) -> None:
    shop, lab = site
    shop.unknown = 0.5
    events = work(lab, tmp_path)
    result = judged(lab, events)
    assert not result.red, result.line()
    ops = [op for op in operations(events) if op.invoke.what in ("upload", "replace")]
    again = [op for op in ops if op.end and op.end.host != op.invoke.host]
    assert any(op.outcome == "ok" for op in again) and any(op.outcome == "info" for op in ops)
    assert result.counts["unknown"] == sum(op.outcome == "info" for op in ops)
    assert any("Retry-After 1" in op.end.note for op in ops if op.end)


def test_a_lost_file_a_changed_one_and_one_that_came_back(site: tuple[Any, Any], tmp_path: Path) -> None:
    shop, lab = site
    events = work(lab, tmp_path)
    big = [name for name, content in shop.files.items() if len(content) > 1000]
    lost, spoiled = shop.files.pop(big[0]), big[1]
    shop.files[spoiled] = b"x" + shop.files[spoiled][1:]
    back = shop.deleted[0]
    shop.files[back] = b"again"
    result = judged(lab, events)
    found = {v.name: v.verdict for v in result.verdicts if v.verdict != "stable"}
    assert found[big[0]] == "lost" and found[spoiled] == "corrupt" and found[back] in ("resurrected", "torn", "corrupt")
    assert len(found) == 3 and lost and result.red


def test_readers_notice_torn_files_that_are_whole_in_the_end(site: tuple[Any, Any], tmp_path: Path) -> None:
    shop, lab = site
    shop.torn_for = 1.0
    result = judged(lab, work(lab, tmp_path))
    assert result.red and result.counts["torn"] > 0 and not result.counts["lost"], result.line()


def test_a_node_that_refuses_connections(site: tuple[Any, Any], tmp_path: Path) -> None:
    _, lab = site
    lab.ports["node2"] = 1
    events = work(lab, tmp_path)
    refused = [op for op in operations(events) if op.invoke.host == "node2"]
    assert refused and all(op.outcome == "fail" for op in refused if op.end and op.end.host == "node2")
    lab.ports["node2"] = lab.ports["node1"]
    result = judged(lab, events)
    assert not result.red and result.counts["unknown"] > 0


def test_refused_at_the_second_try_is_unknown_after_the_first(site: tuple[Any, Any], tmp_path: Path) -> None:
    shop, lab = site
    shop.unknown = 1.0
    lab.ports["node3"] = 1
    ops = [op for op in operations(work(lab, tmp_path, 60)) if op.invoke.what == "upload" and op.end]
    second = [op for op in ops if op.end and op.end.host == "node3" and op.invoke.host != "node3"]
    assert second and {op.outcome for op in second} == {"info"}
    assert {op.outcome for op in ops if op.end and op.end.host == op.invoke.host == "node3"} == {"fail"}
