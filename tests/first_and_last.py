"""A pytest plugin (`-p first_and_last`, with tests/ on PYTHONPATH): of each test only its first and its last case."""

from __future__ import annotations

import pytest


@pytest.hookimpl(trylast=True)  # after -m and -k
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Keep the two ends of what is left of every parametrised test, in the order that they came in."""
    of_test: dict[str, list[pytest.Item]] = {}
    for item in items:
        of_test.setdefault(item.nodeid.partition("[")[0], []).append(item)
    kept = {item for cases in of_test.values() for item in (cases[0], cases[-1])}
    config.hook.pytest_deselected(items=[item for item in items if item not in kept])
    items[:] = [item for item in items if item in kept]
