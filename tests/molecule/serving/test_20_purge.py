"""Deleted files leave every cache: while they are being filled in, and on a node that was cut off."""

from __future__ import annotations

import threading
import time

import pytest
import requests

from faults.observer import look
from helpers import NODES, SITE, picture, wait_until
from kit import faults
from visitors import warm

MIB = 1 << 20
PURGED = 5.0  # seconds from a delete, or from a node's return, until no edge has the file


def pieces(rig, node: str, name: str) -> list[str]:
    """Return the files in a node's cache that hold a piece of this one, those being filled too."""
    found = rig.root(node, f"grep -rlaF 'KEY: /media/{name}' /var/cache/nginx/media || :")
    return found.split()


def delete(rig, host: str, row: dict[str, object], timeout: float = 90) -> float:
    """Delete a file; return when the answer came."""
    answer = rig.request("DELETE", host, f"/api/media/{row['name']}", headers=rig.auth, timeout=timeout)
    assert answer.status_code == 204, f"{host}: {answer.status_code} {answer.text[:200]}"
    del rig.known[row["name"]]
    return time.monotonic()


def test_a_delete_while_the_caches_are_filled(rig):
    """Every node fills the pieces of large files, over and over, while these are deleted."""
    rows = [rig.upload(SITE, picture(size * MIB), timeout=120) for size in (8, 12, 16)]
    stop, seen = threading.Event(), []

    def ask(host: str, row: dict[str, object], number: int) -> None:
        """Read pieces from a place of one's own on."""
        while not stop.is_set():
            for start in range(number * 3, 48):
                first = (start * MIB) % row["size"]
                began = time.monotonic()
                try:
                    answer = rig.fetch(host, row, headers={"Range": f"bytes={first}-{first + 9}"}, timeout=30)
                except requests.RequestException as error:
                    seen.append((began, host, row["name"], repr(error)))
                    continue
                seen.append((began, host, row["name"], answer.status_code))
                if stop.is_set():
                    return

    threads = [
        threading.Thread(target=ask, args=(host, row, number), daemon=True)
        for number, row in enumerate(rows) for host in (*NODES, SITE)
    ]  # fmt: skip
    for thread in threads:
        thread.start()
    try:
        wait_until("the files to be read", lambda: sum(code == 206 for *_, code in seen) > 12, 30)
        ends = {row["name"]: delete(rig, SITE, row) for row in rows}
        filled = [code for began, _, name, code in seen if code == 206 and began < ends[name]]
        wait_until("the purges to be over", lambda: time.monotonic() > max(ends.values()) + PURGED, 30)
        after = len(seen)
        wait_until("each node to be asked again", lambda: len(seen) > after + 60, 30)
    finally:
        stop.set()
        for thread in threads:
            thread.join(timeout=60)
    assert len(filled) > 12
    late = [one for one in seen if one[0] > ends[one[2]] + PURGED and one[3] != 404]
    assert not late, f"{len(late)} answers were not 404 {PURGED:.0f} s after the delete: {late[:5]}"
    print(f"last 206 {max(b - ends[n] for b, _, n, code in seen if code == 206):.1f} s after the answer to the delete")
    for node in NODES:
        for row in rows:
            assert not pieces(rig, node, row["name"]), f"{node} keeps pieces of {row['name']}"


@pytest.mark.parametrize("held", [False, True], ids=["another node", "the holder"])
def test_a_delete_while_a_node_is_cut_off(rig, held):
    """Some seconds after it is back it has heard of the delete, and does not serve what it had cached."""
    holder = rig.holder()
    cut = holder if held else next(node for node in NODES if node != holder)
    row, kept = rig.upload(SITE, picture(2 * MIB)), rig.upload(SITE)
    warm(rig, [row, kept])
    assert pieces(rig, cut, row["name"])
    fault = faults.make(rig.lab, "unplug", [cut])
    with fault.holding():
        wait_until("another node to hold the address", lambda: rig.holders([n for n in NODES if n != cut]), 15)
        gone = delete(rig, SITE, row)
        wait_until("404 at the address", lambda: rig.fetch(SITE, row, timeout=10).status_code == 404, PURGED + 2)
        assert time.monotonic() - gone < PURGED + 2
        assert pieces(rig, cut, row["name"]), "the node was to be cut off, but knows of the delete"
        fault.lift()
        back = time.monotonic()
        said: list[tuple[float, str, int]] = []

        def quiet() -> bool:
            for host in (cut, SITE):
                try:
                    said.append((time.monotonic() - back, host, rig.fetch(host, row, timeout=10).status_code))
                except requests.RequestException:
                    continue
            return time.monotonic() > back + PURGED + 5

        wait_until("the node to be asked for a while", quiet, 60)
    assert [one for one in said if one[1] == cut], "the node did not answer at all"
    late = [one for one in said if one[2] == 200 and one[0] > PURGED]
    assert not late, f"a deleted file was served: {late[:5]}"
    last = max((after for after, _, code in said if code == 200), default=0.0)
    print(f"{cut} served it for {last:.1f} s after its return")
    assert not pieces(rig, cut, row["name"])
    rig.wait_ready(90)
    assert rig.fetch(cut, kept).status_code == 200
    assert {one.state for one in look(rig.lab, "web", cut, [row["name"]])} == {"absent"}
    rig.settle(90)
