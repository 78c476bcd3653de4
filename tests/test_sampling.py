"""sampled: every combination is there, and what runs by default holds each value, or each pair of values."""

from __future__ import annotations

import itertools

import pytest
from sampling import sampled

AXES = ("ab", range(11), "xyz")


@pytest.mark.parametrize("together", [1, 2, 3])
def test_what_runs_by_default_holds_every_combination_of_so_many(together: int) -> None:
    params = sampled(*AXES, together=together)
    assert {each.values for each in params} == set(itertools.product(*AXES)) and len(params) == 66
    default = [each.values for each in params if not each.marks]
    for places in itertools.combinations(range(3), together):
        held = {tuple(one[i] for i in places) for one in default}
        assert held == set(itertools.product(*(AXES[i] for i in places)))
    assert len(default) <= {1: 11, 2: 36, 3: 66}[together]
