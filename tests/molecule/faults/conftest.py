"""A run of the judge a file: load from the first test on, faults under it, the verdict at the end."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from faults.torture import Run
from helpers import SEED, Rig
from judged import CLIENTS, FILES, LARGEST, ONLY, PAUSE
from kit.lab import ROOT
from kit.run import Console


def word(path: object) -> str:
    """Return the scenario's name of a file: test_10_node_loss.py -> node_loss."""
    return str(path).rsplit("/", 1)[-1].removesuffix(".py").split("_", 2)[2]


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the files that ./scripts/test was asked for."""
    if ONLY:
        config.hook.pytest_deselected(items=[item for item in items if word(item.path) not in ONLY])
        items[:] = [item for item in items if word(item.path) in ONLY]


@pytest.fixture(scope="module")
def run(request: pytest.FixtureRequest, rig: Rig) -> Iterator[Run]:
    """Load on all nodes for as long as the file's tests last. Its last test calls `verdict`."""
    name = word(request.path)
    place = ROOT / ".lab" / "test" / "faults" / name
    run = Run(rig.lab, Console(), f"{SEED}-{name}", place, CLIENTS, largest=LARGEST, pause=PAUSE, files=FILES)
    run.nemesis.recover()
    run.start()
    yield run
    run.load.finish()
    if FILES and not request.session.testsfailed:  # what was found is to be looked at
        run.load.tidy()
