"""One address, while the node that holds it is killed, hangs or has its cable cut, and while no site is ready."""

from __future__ import annotations

import contextlib
import json
import time

import pytest

from helpers import NODES, SITE, picture, wait_until
from kit import faults
from kit.lab import ROOT
from visitors import Browser, Visitors, warm

# Seconds; docs/one-address.md and docs/serving.md have what was measured.
TAKEOVER = 2.5  # from the fault until cached pictures are served by another node
LEFT = 6.0  # until nobody hands anything to the lost node any more, and its fence stands
AFTERWARDS = {"cached": 1.0, "uncached": 3.0, "page": 3.0, "upload": 3.0}  # longest of what is begun later than that
HOLD = 8.0  # how long the fault goes on after that
BACK = 90.0  # from the end of the fault until the node takes part again
FAULTS = ("kill", "pause", "unplug")


def sql(rig, query: str) -> str:
    ask = f"su postgres -c 'psql -qtA -d {rig.variables['tribrick_database_name']}'"
    return rig.root("db1", ask, text_in=query).strip()


def balanced(rig, node: str) -> dict[str, str]:
    """Return what a node's HAProxy thinks of each site: UP, DOWN..."""
    ask = (
        "import socket; s = socket.socket(socket.AF_UNIX); s.connect('/run/tribrick-balancer/admin.sock');"
        " s.sendall(b'show stat\\n'); print(b''.join(iter(lambda: s.recv(65536), b'')).decode())"
    )
    rows = [line.split(",") for line in rig.root(node, f'python3 -c "{ask}"').splitlines()]
    return {row[1]: row[17] for row in rows if row[0] == "ready" and row[1] in NODES}


def well(rig) -> bool:
    """One node holds the address, and every node balances over all three."""
    held = rig.holders()
    assert len(held) == 1, f"held by {held}"
    for node in NODES:
        states = balanced(rig, node)
        assert set(states) == set(NODES) and all(one.startswith("UP") for one in states.values()), f"{node}: {states}"
    return True


def sent_once(rig, visitors) -> None:
    """No upload has two rows, and each that was acknowledged has one."""
    listed = ", ".join(f"'{one}'" for one in visitors.sent)
    query = f"select sha256, count(*) from tribrick_mediafile where sha256 in ({listed}) group by sha256"  # noqa: S608 - hashes that were made here
    rows = dict(line.split("|") for line in sql(rig, query).split())
    assert not [one for one, count in rows.items() if count != "1"], f"uploads were stored twice: {rows}"
    missing = [name for one, name in visitors.sent.items() if name and one not in rows]
    assert not missing, f"acknowledged, but without a row: {missing}"


def figures(visitors, since: float) -> dict[str, object]:
    """Return what a fault cost its visitors."""
    seens = visitors.seens.begun(since - 2)
    kinds = ("cached", "uncached", "page", "upload", "gallery", "form", "own page", "delete")
    found: dict[str, object] = {}
    for kind in kinds:
        mine = seens.of(kind)
        found[kind] = {
            "asked": len(mine.every), "failed": len(mine.faults), "gap": round(mine.gap, 2),
            "longest": round(mine.longest, 2),
            "last failure": max((round(one.began - since, 2) for one in mine.every if one.fault), default=None),
        }  # fmt: skip
    bad = [one for one in seens.every if one.fault]
    found["failures"] = [f"{one.began - since:.2f} {one.what} {one.took:.2f} s {one.fault[:90]}" for one in bad]
    return found


def test_address_is_held_by_one_node_and_leads_to_every_site(rig):
    wait_until("one holder, and all sites balanced", lambda: well(rig), 30)
    seen = {rig.upload(SITE)["node"] for _ in range(12)}
    assert seen == set(NODES), f"uploads went to {seen}"
    # Who asks how a node is hears of the holder, whoever the site's answers come from.
    asked = {rig.request("GET", SITE, "/healthz").json()["node"] for _ in range(6)}
    assert asked == {rig.holder()}


def test_a_browser_at_the_address(rig):
    """Each step by whichever node; the session is everywhere."""
    browser, content = Browser(rig), picture(30_000)
    browser.sign_in()
    page = browser.upload(content)
    assert browser.look_around()
    browser.check(page, content)
    assert browser.forged(content) == 403
    browser.delete(page)


@pytest.mark.parametrize("fault", FAULTS)
def test_the_holder_is_lost(rig, fault):
    wait_until("one holder, and all sites balanced", lambda: well(rig), 30)
    lost = rig.holder()
    rest = [node for node in NODES if node != lost]
    visitors = Visitors(rig)
    made = faults.make(rig.lab, fault, [lost])
    with visitors.at_work(), contextlib.ExitStack() as stack:
        stack.callback(made.lift)
        began = time.monotonic()
        made.inject()
        since = time.monotonic()
        print(f"{fault} of {lost}: {made.proof()}")
        wait_until(f"one of {rest} to hold the address", lambda: len(rig.holders(rest)) == 1, 10)
        wait_until("the visitors to be served again", lambda: time.monotonic() > since + LEFT + HOLD, 60)
        stack.close()
        lifted = time.monotonic()
        wait_until(f"the end of {fault}", lambda: made.ended() is None, BACK)
        wait_until(f"uploads by {lost}", lambda: any(a > lifted and n == lost for a, n in visitors.answered_by), BACK)
        back = time.monotonic() - lifted
    found = figures(visitors, since)
    record(rig, fault, found | {"back": round(back, 1), "injecting": round(since - began, 2)})
    seens = visitors.seens
    pictures = seens.of("cached")
    assert pictures.begun(began, since + LEFT).gap <= TAKEOVER, found
    assert not pictures.begun(since + TAKEOVER).faults
    later = seens.begun(since + LEFT, lifted)
    assert not later.faults
    for kind, limit in AFTERWARDS.items():
        mine = later.of(kind)
        assert mine.every and mine.longest <= limit, f"{kind} took {mine.longest:.2f} s: {found}"
    assert not seens.begun(lifted).faults, "the return of the node is felt"
    wait_until("one holder, and all sites balanced", lambda: well(rig), BACK)
    sent_once(rig, visitors)
    wait_until("heal to end", lambda: rig.unhealed() == 0, BACK)
    rig.check_known([SITE])


def record(rig, fault: str, found: dict[str, object]) -> None:
    """Show figures, and keep them for docs/one-address.md."""
    print(json.dumps({fault: found}, indent=1))
    place = ROOT / ".lab" / "test" / rig.lab.name
    place.mkdir(parents=True, exist_ok=True)
    (place / f"{fault}.json").write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


def test_no_site_is_ready(rig):
    """Without the database cached pictures go on, and an upload is refused by a site, not by silence."""
    rows = [rig.upload(SITE) for _ in range(3)]
    warm(rig, rows)
    uncached = rig.upload(SITE)
    with faults.make(rig.lab, "database-stop").holding():
        states = "no node is ready in the balancer of any"
        wait_until(states, lambda: not any("UP" in s for n in NODES for s in balanced(rig, n).values()), 30)
        refused = rig.try_upload(SITE, picture(), timeout=30)
        assert refused.status_code == 503, f"{refused.status_code} {refused.text[:200]}"
        assert int(refused.headers["Retry-After"]) > 0
        for row in rows:
            answer = rig.fetch(SITE, row, timeout=2)
            assert (answer.status_code, answer.headers["X-Cache"]) == (200, "HIT")
        assert rig.fetch(SITE, uncached, timeout=10).status_code == 200
        assert rig.request("GET", SITE, "/healthz", timeout=10).status_code == 200
        # Whoever has noticed it first has given the address away; all are equally bad now, so it stays.
        assert rig.holder(10)
    wait_until("uploads again", lambda: rig.try_upload(SITE, picture()).status_code == 201, 60)
    wait_until("one holder, and all sites balanced", lambda: well(rig), 60)


def test_a_sick_node_leaves_and_returns(rig):
    """The holder's nginx is stopped: another node has the address; started, it takes part again."""
    row = rig.upload(SITE)
    warm(rig, [row])
    sick = rig.holder()
    rig.root(sick, "systemctl stop nginx")
    try:
        assert rig.run_root(sick, "systemctl is-active -q nginx").returncode != 0
        wait_until("another node to hold the address", lambda: rig.holders() not in ([], [sick]), 10)
        assert rig.fetch(SITE, row, timeout=5).status_code == 200
    finally:
        rig.root(sick, "systemctl start nginx")
    rig.wait_ready(60)
    wait_until("one holder, and all sites balanced", lambda: well(rig), 30)
