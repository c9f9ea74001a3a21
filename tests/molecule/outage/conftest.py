"""The files of the scenario: load and the judge where a file asks for them."""

from __future__ import annotations

import pytest

from judged import asked, under_load


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the files that ./scripts/test was asked for."""
    kept = asked(items)
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = kept


run = pytest.fixture(scope="module", name="run")(under_load)
