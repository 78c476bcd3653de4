"""What the strategy race says of its own judge."""

from __future__ import annotations

import math

import pytest

from moelab.plots.strategy_race import Traces, standing
from moelab.tuner.regret import Point


def ending(*worst: float, name: str = "grid") -> Traces:
    runs = [[Point("screen", 10, 1.0, 0.02, math.inf), Point("layers", 20, 9.0, 0.002, each)] for each in worst]
    return Traces((1, 64), "made up", {name: runs})


def test_where_layers_chose_otherwise_the_sum_is_said_to_be_the_weaker() -> None:
    said = standing(ending(0.1013, 0.11, 0.09), 9.0).sentence
    assert "even grid, which measured every config, ends at 10.13 %" in said and "that sum is the weaker" in said


@pytest.mark.parametrize(
    "traces",
    [ending(0.004), ending(0.1, name="race"), ending(math.inf)],  # agreed; no strategy measured everything; no choice
)
def test_nothing_is_said_of_a_judge_that_agrees_or_is_not_there(traces: Traces) -> None:
    assert "weaker" not in standing(traces, 9.0).sentence
