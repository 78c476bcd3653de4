"""Budgets: a share of them is left for measuring, what comes first is most promising, and what was left out is said."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
from synthetic import small_problem, synthetic_landscape

from moelab.tuner.board import Board
from moelab.tuner.coverage import Coverage
from moelab.tuner.order import promising
from moelab.tuner.problem import GEMMS
from moelab.tuner.regret import Truth
from moelab.tuner.replay import ReplayEvaluator, Table
from moelab.tuner.results import TuneResult
from moelab.tuner.search import COMPILE_SHARE, SEARCH_SHARE, Search, Settings
from moelab.tuner.session import TuneSession
from moelab.tuner.space import build_space

PROBLEM = small_problem((1, 64, 1024))
TABLE = Table(synthetic_landscape(PROBLEM))
SETTINGS = Settings(chunk=8)


def evaluator(processes: int = 1) -> ReplayEvaluator:
    """One process that compiles: it costs far more than measuring."""
    return ReplayEvaluator(TABLE, PROBLEM, compile_processes=processes)


def tuned(strategy: str, budget_s: float | None, run: Path | None = None, **more) -> TuneResult:
    return TuneSession(
        PROBLEM, evaluator(), strategy=strategy, budget_s=budget_s, settings=SETTINGS, run=run, **more
    ).run()


@functools.cache
def free(strategy: str) -> TuneResult:
    """What a strategy does without a budget; once a process, when the first test asks."""
    return tuned(strategy, None)


def compiling(strategy: str) -> float:
    return dict(free(strategy).timeline)["compile"]


# --- a share is left for measuring ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["race", "grid"])
def test_compiling_leaves_a_share_of_the_budget(strategy: str) -> None:
    """A budget that compiling alone would eat: it stops at its share, and what was compiled is measured and can win."""
    budget = compiling(strategy) / 2
    result = tuned(strategy, budget)
    spent = dict(result.timeline)
    assert spent["compile"] == pytest.approx(COMPILE_SHARE * budget, rel=0.1)
    for num_tokens, here in result.coverage.batches.items():
        assert 0 < here.measured <= here.compiled < here.candidates, num_tokens
    truth = Truth(TABLE, PROBLEM)
    for b, batch in result.batches.items():
        assert batch.kept is None and truth.regret(b, (batch.up, batch.down)) < truth.regret(
            b, PROBLEM.incumbents["default"][b]
        )


def test_nothing_is_compiled_past_its_share() -> None:
    """Of what was left out, nothing is compiled for the looks or the finals: that would eat the rest of the budget."""
    budget = compiling("race") / 2
    session = TuneSession(PROBLEM, evaluator(), budget_s=budget, settings=SETTINGS)
    session.run()
    later = [r for r in session.results() if r.request.rounds]
    assert later and not any(o.compile_s for r in later for o in r.outcomes)


def test_a_cut_run_is_taken_up_with_a_longer_budget(tmp_path: Path) -> None:
    path = tmp_path / "run.jsonl"
    cut = tuned("race", compiling("race") / 2, path)
    resumed = TuneSession.resume(path, lambda _: evaluator(), budget_s=2 * cut.coverage.needed_s).run()
    assert cut.coverage.cut and not resumed.coverage.cut
    for b, whole in free("race").coverage.batches.items():
        here = resumed.coverage.batches[b]
        assert (here.candidates, here.compiled) == (whole.candidates, whole.compiled)
        assert here.measured == whole.measured or b == 64  # in between, where the near ones hang on the noise


@pytest.mark.parametrize("strategy", ["race", "grid"])
def test_a_budget_that_ends_the_looks_cuts_all_batch_sizes_alike(strategy: str) -> None:
    phases = dict(free(strategy).timeline)
    looks = "screen" if strategy == "race" else "grid"
    quick = ReplayEvaluator(TABLE, PROBLEM, compile_processes=1000)
    before = phases["compile"] / 1000 + phases.get("scouts", 0)
    budget = (before + phases[looks] / 2) / SEARCH_SHARE
    result = TuneSession(PROBLEM, quick, strategy=strategy, budget_s=budget, settings=SETTINGS).run()
    shares = [
        here.measured / here.candidates for b, here in result.coverage.batches.items() if strategy == "grid" or b != 64
    ]
    assert result.coverage.cut[0] == looks and 0.3 < min(shares) <= max(shares) < 0.95


def test_both_gemms_are_compiled_by_turns() -> None:
    board = Board(PROBLEM, build_space(PROBLEM))
    step = next(Search(PROBLEM, board.space, board, SETTINGS).compile_all())
    assert {r.stage for r in step.requests[:2]} == set(GEMMS) and step.share == COMPILE_SHARE < SEARCH_SHARE
    asked = {gemm: [c for r in step.requests if r.stage == gemm for (c,) in r.contenders] for gemm in GEMMS}
    assert {gemm: set(found) for gemm, found in asked.items()} == {g: set(board.configs[g]) for g in GEMMS}
    assert all(len(found) == len(set(found)) for found in asked.values())


def test_one_config_for_both_gemms_under_a_short_budget() -> None:
    problem = dataclasses.replace(PROBLEM, separate_down=False)
    alone = ReplayEvaluator(TABLE, problem, compile_processes=1)
    result = TuneSession(problem, alone, budget_s=compiling("race") / 3, settings=SETTINGS).run()
    assert result.coverage.cut and all(batch.up == batch.down is not None for batch in result.batches.values())


def test_an_equal_program_stands_in_for_one_that_was_left_out() -> None:
    problem = small_problem((1,), axes={**PROBLEM.axes, "GROUP_SIZE_M": (16, 32)})
    board = Board(problem, build_space(problem))
    first = next(i for i, r in enumerate(board.representative["up"][0]) if r != i)
    stood_for = int(board.representative["up"][0][first])
    assert first not in board.candidates("up", 1) and stood_for in board.candidates("up", 1)
    board.leave_out("up", [board.configs["up"][stood_for]])
    assert first in board.candidates("up", 1) and stood_for not in board.candidates("up", 1)


# --- the order -----------------------------------------------------------------------------------------------------------


def test_the_most_promising_come_first() -> None:
    configs = build_space(PROBLEM).configs["up"]
    known = [configs[77]]
    order = promising(configs, known, np.random.default_rng(0))
    assert sorted(order) == list(range(len(configs))) and order[0] == 77
    near = [i for i in order[2:40:2]]
    same = [sum(getattr(configs[i], f) != getattr(known[0], f) for f in PROBLEM.axes) for i in near]
    assert max(same[:5]) == 1 and np.mean(same) < 2.5
    drawn = order[1:60:2]
    assert {configs[i].BLOCK_SIZE_M for i in drawn} == set(PROBLEM.axes["BLOCK_SIZE_M"]), "not all near what is known"
    assert (
        order
        == promising(configs, known, np.random.default_rng(0))
        != promising(configs, known, np.random.default_rng(1))
    )
    assert sorted(promising(configs, [], np.random.default_rng(0))) == list(range(len(configs)))


# --- and what was left out is said ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("strategy", ["race", "grid"])
def test_a_run_that_was_not_cut_says_nothing(strategy: str) -> None:
    coverage = free(strategy).coverage
    assert coverage.cut == () and coverage.needed_s is None and coverage.sentences() == []
    space = build_space(PROBLEM)
    board = Board(PROBLEM, space)
    for b, here in coverage.batches.items():
        assert here.candidates == sum(len(board.candidates(gemm, b)) for gemm in GEMMS) == here.compiled
    assert coverage.batches[1].measured == sum(len(board.candidates(g, 1)) - len(broken(g)) for g in GEMMS)


def broken(gemm: str) -> set:
    return {config for stage, config in TABLE.uncompiled if stage == gemm}


def test_a_long_budget_cuts_nothing() -> None:
    assert tuned("race", 10 * free("race").spent_s).coverage == dataclasses.replace(
        free("race").coverage, budget_s=10 * free("race").spent_s
    )


def test_a_budget_that_leaves_nothing_says_so() -> None:
    result = tuned("race", 0.001)
    coverage = result.coverage
    assert result.complete and coverage.cut[0] == "compile"
    assert all(here.measured == 0 for here in coverage.batches.values())
    said = " ".join(coverage.sentences())
    assert "Nothing was searched" in said and "batch 1, 64, 1024" in said and "0 of" in said
    assert f"--budget {coverage.needed()}" in said
    assert coverage.sentences(None)[-1] == f"About {coverage.needed()} would do."


@pytest.mark.parametrize("strategy", ["race", "grid", "forest", "random"])
@pytest.mark.parametrize("share", [0.05, 0.3, 0.6])
def test_the_budget_that_it_names_is_about_enough(strategy: str, share: float) -> None:
    """It is no wild guess, and with a little more nothing is cut, or next to nothing. On the simulated clock."""
    least = free(strategy).spent_s
    coverage = tuned(strategy, share * least).coverage
    assert coverage.cut and coverage.needed_s > share * least
    assert 0.4 * least < coverage.needed_s < 4 * least, (coverage.needed_s, least)
    if strategy == "forest":  # whose rounds meet new kernels, as many as it then believes in
        return
    again = tuned(strategy, coverage.needed_s * 1.3).coverage
    assert not again.cut or again.needed_s < 1.5 * coverage.needed_s


def test_coverage_as_json_and_in_words() -> None:
    result = tuned("grid", compiling("grid") / 2)
    told = result.coverage.to_json()
    assert told["budget_s"] == result.coverage.budget_s and told["cut"] == list(result.coverage.cut)
    assert told["needed_s"] == result.coverage.needed_s
    assert [row["num_tokens"] for row in told["batches"]] == [1, 64, 1024]
    assert set(told["batches"][0]) == {"num_tokens", "candidates", "compiled", "measured"}
    first, last = result.coverage.sentences()[0], result.coverage.sentences()[-1]
    assert "compile" in first and "moelab tune --resume RUN" in last
    assert Coverage(90.0, ("grid",), {}, 3601.0).needed() == "3610s"


def test_a_run_with_no_share_for_a_kernel_that_is_there_already() -> None:
    """Nothing to compile: only measuring is cut, and the estimate is made of that."""
    free = ReplayEvaluator(Table(dataclasses.replace(TABLE.landscape, rows=without_cost())), PROBLEM)
    session = TuneSession(PROBLEM, free, strategy="grid", settings=SETTINGS)
    whole = session.run().spent_s
    again = ReplayEvaluator(Table(dataclasses.replace(TABLE.landscape, rows=without_cost())), PROBLEM)
    coverage = TuneSession(PROBLEM, again, strategy="grid", budget_s=whole / 3, settings=SETTINGS).run().coverage
    assert coverage.cut == ("grid",) and whole / 2 < coverage.needed_s < 2 * whole


def without_cost() -> tuple:
    return tuple(
        dataclasses.replace(r, outcome=dataclasses.replace(r.outcome, compile_s=0.0)) for r in TABLE.landscape.rows
    )


def test_the_shape_of_these_tests() -> None:
    """Compiling is what costs here, as in the runs that these tests are about."""
    assert compiling("race") > free("race").spent_s / 2
