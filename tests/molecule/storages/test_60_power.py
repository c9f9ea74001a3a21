"""Power cut of all three bricks at once: what was acknowledged is there, what was deleted stays deleted."""

from __future__ import annotations

from typing import Any

import pytest

from helpers import LONG, NODES, chance, wait_until
from kit.faults import power_cut, power_on
from proof import Proof, same

SIZES = (1, 50_000, 2**20, 8 * 2**20)
CYCLES, EACH = (4, 3) if LONG else (1, 1)
FORMS = ("add", "write")  # saved under a name of its own making; opened for writing, published when closed
UNDURABLE = "undurable"


def busy(proof: Proof, cycle: int) -> tuple[dict[str, str], list[str]]:
    """Save and delete on all nodes at once, in a seeded order; return what was acknowledged: hashes, deleted names."""

    def work(host: str) -> tuple[list[dict[str, Any]], list[str]]:
        agent, dice = proof.agents[host], chance(f"power {cycle} {host}")
        doomed = [agent.ask("add", "power/doomed.bin", size)["name"] for size in SIZES for _ in range(EACH)]
        order = [(form, size) for form in FORMS for size in SIZES for _ in range(EACH)]
        order += [("delete", name) for name in doomed]
        dice.shuffle(order)
        kept = []
        for command, what in order:
            if command == "add":
                kept.append(agent.ask("add", "power/kept.bin", what))
            elif command == "write":
                kept.append(agent.ask("write", "power", what))
            else:
                agent.ask("delete", what)
        return kept, doomed

    done = proof.rig.everywhere(work)
    saved = {row["name"]: row["wanted"] for kept, _ in done.values() for row in kept}
    return saved, [name for _, doomed in done.values() for name in doomed]


@pytest.mark.parametrize("cycle", range(CYCLES))
def test_power_cut_of_all_bricks(proof: Proof, cycle: int, capsys: pytest.CaptureFixture[str]) -> None:
    rig = proof.rig
    before = proof.check_clean(proof.agents["node1"])
    saved, deleted = busy(proof, cycle)
    assert len(deleted) == len(NODES) * len(SIZES) * EACH and len(saved) == len(FORMS) * len(deleted)
    # Last of all, what makes no promise: Django's own storage. If all of it survives, the cut took nothing.
    plain: dict[str, str] = {}
    for agent in proof.agents.values():
        agent.send("undurable", f"{UNDURABLE}/{agent.host}", 50_000, 5)
    for agent in proof.agents.values():
        plain |= agent.answer()
    seen = power_cut(rig.lab, NODES)
    assert len(seen) == len(NODES), seen
    power_on(rig.lab, chance(f"power on {cycle}").sample(NODES, len(NODES)))

    rig.wait_ready(120)
    wait_until("all bricks to be online", lambda: sorted(rig.bricks_online()) == sorted(NODES), 60)
    proof.restart()
    survived = proof.on_bricks(list(plain))
    lost = [name for name in plain if not any(found[name] == plain[name] for found in survived.values())]
    assert lost, "every file without fsync survived: this test would not see a save that is not durable"

    # What was deleted may be back, since an unlink is not durable; the tombstones take it away again.
    back = [name for name, found in proof.agents["node1"].ask("hashes", deleted).items() if found]
    answer = proof.agents["node1"].tribrick("replicate", "--once", "--again")
    assert answer["code"] == 0, answer
    wait_until("heal to end", lambda: rig.unhealed() == 0, 120)
    wanted = before | saved
    for host, found in proof.on_bricks(list(wanted)).items():
        same(found, wanted)
        assert sum(value is not None for value in found.values()) == len(wanted), host
    for host, found in proof.on_bricks(deleted).items():
        assert not any(found.values()), (host, {name for name, value in found.items() if value})
    rig.root("node1", f"rm -rf {proof.root}/{UNDURABLE}")
    same(proof.check_clean(proof.agents["node2"]), wanted)
    with capsys.disabled():
        print(f" {len(lost)} of {len(plain)} unsynced lost, {len(back)} of {len(deleted)} deleted were back ", end="")


