"""The place of the tests of the scenario `storages`."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import pytest

from helpers import NODES, Rig
from proof import DIRECTORY, HERE, ON_NODES, Proof, make_database, make_place


@pytest.fixture(scope="session")
def proof(rig: Rig) -> Iterator[Proof]:
    """The place of these tests, fresh, with one agent on each node."""
    proof = Proof(rig, sentinel=secrets.token_hex(16))
    make_database(rig, DIRECTORY)
    text = (HERE / "agent.py").read_text(encoding="utf-8")
    for host in NODES:
        rig.root(host, f"mkdir -p {ON_NODES} && cat > {ON_NODES}/agent.py", text_in=text)
    make_place(rig, DIRECTORY, proof.sentinel)
    try:
        proof.agents.update(rig.everywhere(proof.agent))
        proof.agents["node1"].ask("migrate")
        yield proof
    finally:
        for agent in proof.agents.values():
            agent.close()
