"""survey: a landscape as arrays, the smallest cover, and what a parameter explains."""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import numpy as np
import pytest
from synthetic import AXES, small_problem, synthetic_landscape

from moelab.tuner.evaluate import Outcome
from moelab.tuner.landscape import Landscape, Row
from moelab.tuner.problem import GEMMS
from moelab.tuner.survey import PARAMETERS, Survey, cover, importance, one_protocol, plateau

PROBLEM = small_problem((1, 16, 64, 256))
LANDSCAPE = synthetic_landscape(PROBLEM)


@pytest.fixture(scope="module")
def survey() -> Survey:
    return Survey(LANDSCAPE)


def with_final(landscape: Landscape, factor: float) -> Landscape:
    """The landscape after a final of its first measured config, timed under a protocol that reads `factor` times as much."""
    first = next(row for row in landscape.rows if row.outcome.samples_us and row.stage == "up")
    samples = tuple(factor * s for s in first.outcome.samples_us) * 9
    return replace(
        landscape, rows=(*landscape.rows, Row("up", first.num_tokens, first.contender, Outcome(samples), True, ""))
    )


def test_finals_do_not_move_the_finalists(survey: Survey) -> None:
    """Interleaved samples read differently; they must not count beside the short ones."""
    again = Survey(with_final(LANDSCAPE, 0.8))
    for gemm in GEMMS:
        assert np.array_equal(again.times[gemm], survey.times[gemm])
    assert len(one_protocol(with_final(LANDSCAPE, 0.8)).rows) == len(LANDSCAPE.rows)


def test_shares_are_of_the_best_and_unmeasured_is_not_a_number(survey: Survey) -> None:
    for gemm in GEMMS:
        share = survey.best_share[gemm]
        assert np.array_equal(np.isnan(share), np.isinf(survey.times[gemm]))
        assert np.nanmax(share, axis=1) == pytest.approx(np.ones(len(survey.batch_sizes)))
        assert np.isnan(share).any(), "the synthetic landscape has configs that fail"


def test_well_covered_asks_for_both_gemms() -> None:
    rows = tuple(r for r in LANDSCAPE.rows if not (r.stage == "down" and r.num_tokens == 64 and r.outcome.samples_us))
    partly = tuple(r for r in LANDSCAPE.rows if r.stage == "down" and r.num_tokens == 64 and r.outcome.samples_us)[:30]
    found = Survey(replace(LANDSCAPE, rows=rows + partly))
    assert 64 not in found.well_covered
    assert found.coverage["down"][found.row(64)] < 0.5 < found.coverage["up"][found.row(64)]


def brute_force(good: np.ndarray) -> int:
    """The size of the smallest set of columns that covers every row, by trying all."""
    columns = np.unique(good, axis=1).T
    for size in range(1, len(good) + 1):
        if any(np.logical_or.reduce(group).all() for group in itertools.combinations(columns, size)):
            return size
    raise AssertionError


@pytest.mark.parametrize("gemm", GEMMS)
@pytest.mark.parametrize("within", [0.0, 0.01, 0.05, 0.3])
def test_the_cover_is_the_smallest_and_covers(survey: Survey, gemm: str, within: float) -> None:
    found, share = cover(survey, gemm, within), survey.best_share[gemm]
    good = np.nan_to_num(share, nan=0.0) >= 1 / (1 + within) - 1e-12
    assert len(found.chosen) == brute_force(good)
    assert sorted(b for batches in found.chosen.values() for b in batches) == list(survey.batch_sizes)
    index = {c: i for i, c in enumerate(survey.configs[gemm])}
    for config, batches in found.chosen.items():
        for b in batches:
            assert good[survey.row(b), index[config]]


def test_plateaus_count_programs_not_configs() -> None:
    """With few row blocks GROUP_SIZE_M 16 and 32 are one program."""
    problem = small_problem((1, 16), axes=AXES | {"GROUP_SIZE_M": (16, 32)})
    twice = Survey(synthetic_landscape(problem))
    everything = plateau(twice, "up", 1e9)
    programs = len(set(twice.representative["up"][0].tolist()))
    assert everything[1] <= programs < len(twice.configs["up"])
    assert all(1 <= plateau(twice, "up", 0.02)[b] <= everything[b] for b in twice.batch_sizes)


def test_importance_finds_the_parameter_that_decides(survey: Survey) -> None:
    """Times that follow one parameter alone: it explains all, and a constant explains nothing."""
    made = Survey(LANDSCAPE)
    column = PARAMETERS.index("num_stages")
    made.times["up"][:] = np.exp(made.values["up"][:, column])
    found = importance(made, "up", 16)
    assert found["num_stages"] == pytest.approx(1.0)
    assert max(v for name, v in found.items() if name != "num_stages") < 0.05
    made.times["up"][:] = 3.0
    assert set(importance(made, "up", 16).values()) == {0.0}


def test_details(survey: Survey) -> None:
    best = int(np.argmin(survey.times["down"][survey.row(64)]))
    (detail,) = survey.details("down", 64, [best])
    assert detail.low_us <= detail.median_us <= detail.high_us and detail.samples == 10
    assert detail.padding >= 1 and detail.shared_bytes > 0
    assert math.isnan(detail.waves) and math.isnan(detail.roof), "nothing is known of a synthetic device"


def test_nothing_is_expected_of_a_routing_that_is_not_uniform() -> None:
    """Padding, waves and the floor are those of uniform routing: of a skewed one they would be wrong."""
    for routing, known in (("uniform", True), ("zipf", False)):
        problem = replace(small_problem((16,)), routing=routing, device="NVIDIA H200")
        made = Survey(replace(LANDSCAPE, problem=problem))
        (detail,) = made.details("up", 16, [0])
        assert [math.isfinite(v) for v in (detail.waves, detail.padding, detail.roof)] == [known] * 3
        assert math.isfinite(made.floor_us("up", 16)) == known
        assert ("zipf routing" in made.landscape.source()) == (not known)
