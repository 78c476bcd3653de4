"""A run that is taken up again measures nothing twice, with the same budget and with a larger one, wherever it was cut."""

from __future__ import annotations

import dataclasses
import functools
import json
import math
from collections.abc import Sequence
from pathlib import Path

import pytest
from landscapes import shipped
from resuming import FINALS, again, budget_for, cut_run, taken_up
from synthetic import small_problem, synthetic_landscape

from moelab.config import KernelConfig
from moelab.errors import JournalError
from moelab.tuner.board import Board
from moelab.tuner.evaluate import Outcome, Request, Result
from moelab.tuner.header import make_header, read_header
from moelab.tuner.journal import read
from moelab.tuner.known import Known
from moelab.tuner.problem import Problem
from moelab.tuner.replay import ReplayEvaluator, Table
from moelab.tuner.results import TuneResult
from moelab.tuner.search import Settings
from moelab.tuner.session import TuneSession
from moelab.tuner.space import build_space

PROBLEM = small_problem((1, 64, 1024))
TABLE = Table(synthetic_landscape(PROBLEM))
CHUNKS = Settings(chunk=24)
PHASES = {
    "race": ("compile", "scouts", "screen", "neighbours", "longer", *FINALS),
    "forest": ("start", "round 1", "round 2", "round 3", "round 4", *FINALS),
}
SAMPLED = {"race": ("compile", "screen", "finalists"), "forest": ("round 2",)}
"""Where the default run of the tests cuts; the others are for `make whole`."""
STEPS = [
    pytest.param(strategy, phase, marks=[] if phase in SAMPLED[strategy] else pytest.mark.whole)
    for strategy, phases in PHASES.items()
    for phase in phases
]
SEARCHES = [step for step in STEPS if step.values[1] not in FINALS]


@functools.cache
def free(strategy: str) -> TuneResult:
    """What a strategy does without a budget."""
    return TuneSession(PROBLEM, ReplayEvaluator(TABLE, PROBLEM), strategy=strategy, settings=CHUNKS).run()


# --- what is known ----------------------------------------------------------------------------------------------------

CONFIGS = [KernelConfig(16, 32, 64, group, 4, 2) for group in (1, 16, 32)]
ONE_A_SIZE = small_problem((1, 1024), axes={**PROBLEM.axes, "GROUP_SIZE_M": (1, 16, 32)})


def known(*results: Result) -> Known:
    return Known(Board(ONE_A_SIZE, build_space(ONE_A_SIZE)), results)


def look(num_tokens: int, configs: Sequence[KernelConfig], rounds: int = 3, **more) -> Request:
    return Request("up", num_tokens, tuple((c,) for c in configs), rounds, **more)


def answered(request: Request, us: float = 1.0) -> Result:
    return Result(request, tuple(Outcome((us + i,) * request.rounds) for i in range(len(request.contenders))))


def test_a_look_is_known_whatever_request_it_was_in() -> None:
    one, two, three = CONFIGS
    found = known(answered(look(1024, [one, two]), 1.0))
    assert found.answer(look(1024, [two, one])).outcomes == (Outcome((2.0,) * 3), Outcome((1.0,) * 3))
    assert found.answer(look(1024, [one], stop_above_us=5.0)) is not None, "how it was cut is not what was measured"
    assert found.answer(look(1024, [one, three])) is None
    assert found.missing([look(1024, [one, two]), look(1024, [three, two])]) == [look(1024, [three])]
    for other in (look(1, [one]), look(1024, [one], 10), look(1024, [one], repeat=1)):
        assert found.missing([other, other]) == [other]


def test_equal_programs_share_a_look_and_not_a_compile() -> None:
    """At one token a group of 16 blocks of rows and one of 32 are all of them; at 1024 they are not."""
    _, two, three = CONFIGS
    for b, same in ((1, True), (1024, False)):
        assert (known(answered(look(b, [two]))).answer(look(b, [three])) is not None) is same
    assert known(answered(look(1, [two], 0))).answer(look(1, [three], 0)) is None


def test_a_comparison_is_known_to_some_of_it_and_not_to_a_newcomer() -> None:
    one, two, three = CONFIGS
    final = look(1024, [one, two], 20, interleaved=True)
    found = known(answered(final, 1.0))
    assert found.answer(look(1024, [two], 20, interleaved=True)).outcomes == (Outcome((2.0,) * 20),)
    larger = look(1024, [one, three], 20, interleaved=True)
    assert found.missing([larger]) == [larger] and found.answer(larger) is None, "sample beside sample"
    found.add(answered(larger, 5.0))
    assert found.answer(look(1024, [one], 20, interleaved=True)).outcomes == (Outcome((5.0,) * 20),), "the latest"
    assert found.answer(final).outcomes[0].samples_us[0] == 1.0


def test_what_is_known_is_told_once() -> None:
    one, two, three = CONFIGS
    found = known(answered(look(1024, [one, two])))
    (told,) = found.untold([look(1024, [two, three])])
    assert told == Result(look(1024, [two]), (Outcome((2.0,) * 3),))
    assert [r.request for r in found.untold([look(1024, [one, two, three])])] == [look(1024, [one])]
    found.add(answered(look(1024, [three])))
    assert not list(found.untold([look(1024, [one, two, three])]))


# --- nothing twice ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("larger", [None, 2.5, math.inf])
@pytest.mark.parametrize(("strategy", "phase"), SEARCHES)
def test_what_a_budget_cut_goes_on_without_repeats(
    tmp_path: Path, strategy: str, phase: str, larger: float | None
) -> None:
    path, budget = tmp_path / "run.jsonl", budget_for(free(strategy), phase, 0.5)
    cut = cut_run(path, TABLE, PROBLEM, strategy, budget_s=budget, settings=CHUNKS)
    assert cut.coverage.cut
    resumed = taken_up(path, TABLE, larger and larger * budget)
    assert not again(path)["again"]
    if larger is None:
        assert not again(path) and resumed.rows() == cut.rows()
    elif larger == math.inf:
        assert again(path)["new"] and not resumed.coverage.cut
    taken_up(path, TABLE)  # with the budget that it had last
    assert not again(path)


@pytest.mark.parametrize("budgets", [(None, None), (0.5, None), (0.5, math.inf)])
@pytest.mark.parametrize(("strategy", "phase"), STEPS)
def test_what_ctrl_c_cut_goes_on_without_repeats(tmp_path: Path, strategy: str, phase: str, budgets: tuple) -> None:
    budget = budgets[0] and budget_for(free(strategy), PHASES[strategy][0], budgets[0])
    path, step = tmp_path / "run.jsonl", PHASES[strategy].index(phase)
    ended = cut_run(path, TABLE, PROBLEM, strategy, budget_s=budget, interrupt=(step, 0.5), settings=CHUNKS)
    taken_up(path, TABLE, budgets[1])
    assert not again(path)["again"]
    if budget is None:
        assert ended is None and again(path)["new"] and not again(path)["joined"]


@functools.cache
def recorded(name: str) -> tuple[Table, Problem]:
    found = shipped(name)
    return Table(found), dataclasses.replace(found.problem, batch_sizes=found.problem.batch_sizes[::6])


@functools.cache
def recorded_free(name: str, strategy: str) -> TuneResult:
    table, problem = recorded(name)
    return TuneSession(problem, ReplayEvaluator(table, problem), strategy=strategy).run()


@pytest.mark.whole
@pytest.mark.parametrize(("strategy", "phase"), [step.values for step in STEPS])
@pytest.mark.parametrize("name", ["qwen3-30b-a3b-tp1-NVIDIA_H200", "llama-4-scout-tp4-NVIDIA_H200"])
def test_nothing_is_repeated_on_a_shipped_landscape(tmp_path: Path, name: str, strategy: str, phase: str) -> None:
    (table, problem), whole, path = recorded(name), recorded_free(name, strategy), tmp_path / "run.jsonl"
    if phase not in FINALS:
        budget = budget_for(whole, phase, 0.5)
        for larger in (None, 2 * budget, math.inf):
            assert cut_run(path, table, problem, strategy, budget_s=budget).coverage.cut
            taken_up(path, table, larger)
            assert not again(path)["again"], larger
            taken_up(path, table)
            assert not again(path), larger
    budget, step = budget_for(whole, PHASES[strategy][0], 0.7), PHASES[strategy].index(phase)
    for first, second in ((None, None), (budget, None), (budget, 3 * budget)):
        cut_run(path, table, problem, strategy, budget_s=first, interrupt=(step, 0.5))
        taken_up(path, table, second)
        assert not again(path)["again"], (first, second)


def test_programs_that_are_equal_are_not_measured_twice(tmp_path: Path) -> None:
    """A config that the budget left out stands in for an equal program once it is compiled; it has that one's look."""
    problem = small_problem((1, 64, 1024), axes={**PROBLEM.axes, "GROUP_SIZE_M": (8, 16, 32, 64)})
    table, path = Table(synthetic_landscape(problem)), tmp_path / "run.jsonl"
    budget = budget_for(TuneSession(problem, ReplayEvaluator(table, problem)).run(), "compile", 0.5)
    cut_run(path, table, problem, "race", budget_s=budget)
    before = len(read(path).results)
    taken_up(path, table, math.inf)
    seen: set[tuple] = set()
    programs = Known(Board(problem, build_space(problem)))
    for number, result in enumerate(read(path).results.values()):
        request = result.request
        if request.rounds and not request.interleaved:
            what = (request.stage, request.num_tokens, request.rounds, request.repeat, False)
            looks = {(what, programs._program(what, c)) for c in request.contenders}
            assert number < before or not looks & seen
            seen |= looks


# --- the budget -------------------------------------------------------------------------------------------------------


def budgets(path: Path) -> list[float | None]:
    return [n["budget_s"] for n in map(json.loads, path.read_text().splitlines()) if n["kind"] == "resumed"]


def test_the_last_budget_holds_until_another_is_named(tmp_path: Path) -> None:
    path, budget = tmp_path / "run.jsonl", budget_for(free("race"), "compile", 0.4)
    cut_run(path, TABLE, PROBLEM, "race", budget_s=budget, settings=CHUNKS)
    longer = budget_for(free("race"), "screen", 0.5)
    for given in (None, longer, None, math.inf, None):
        taken_up(path, TABLE, given)
    assert budgets(path) == [budget, longer, longer, None, None]


class Forgetful(ReplayEvaluator):
    """Whose clock does not know what a run has cost before: one that counts starts and waits is a little like it."""

    def recall(self, results: Sequence[Result]) -> None:
        """Compiled is compiled, and it was free."""
        super().recall(results)
        self._compile_s = self._measure_s = 0.0


@pytest.mark.parametrize(("strategy", "phase"), SEARCHES)
def test_what_the_budget_ended_stays_ended(tmp_path: Path, strategy: str, phase: str) -> None:
    path = tmp_path / "run.jsonl"
    cut = cut_run(path, TABLE, PROBLEM, strategy, budget_s=budget_for(free(strategy), phase, 0.5), settings=CHUNKS)
    resumed = TuneSession.resume(path, lambda problem: Forgetful(TABLE, problem)).run()
    assert not again(path) and resumed.rows() == cut.rows() and resumed.coverage.cut == cut.coverage.cut


def test_a_phase_that_is_taken_up_again_counts_its_own_seconds(tmp_path: Path) -> None:
    path, budget = tmp_path / "run.jsonl", budget_for(free("race"), "compile", 0.5)
    cut = dict(cut_run(path, TABLE, PROBLEM, "race", budget_s=budget, settings=CHUNKS).timeline)
    resumed = taken_up(path, TABLE, math.inf)
    spent = dict(resumed.timeline)
    assert (
        spent["compile"] == pytest.approx(dict(free("race").timeline)["compile"]) and spent["compile"] > cut["compile"]
    )
    assert sum(spent.values()) == pytest.approx(resumed.spent_s)


def test_a_journal_from_before_budgets_were_noted(tmp_path: Path) -> None:
    """Notes without a budget, and no phase noted as cut: the header's budget holds, and the clock says what is cut."""
    path, budget = tmp_path / "run.jsonl", budget_for(free("race"), "screen", 0.5)
    cut = cut_run(path, TABLE, PROBLEM, "race", budget_s=budget, settings=CHUNKS)
    taken_up(path, TABLE)
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    old = [
        {k: v for k, v in line.items() if k not in ("budget_s", "digest")} for line in lines if line["kind"] != "cut"
    ]
    path.write_text("".join(json.dumps(line) + "\n" for line in old))
    assert taken_up(path, TABLE).rows() == cut.rows() and not again(path)


@pytest.mark.parametrize("phase", ["compile", "screen", "longer"])
def test_the_budget_that_it_names_does_when_it_is_taken_up(tmp_path: Path, phase: str) -> None:
    """Named once or twice: the estimate is of what is left, and the clock of a run holds its finals."""
    path = tmp_path / "run.jsonl"
    coverage = cut_run(
        path, TABLE, PROBLEM, "race", budget_s=budget_for(free("race"), phase, 0.5), settings=CHUNKS
    ).coverage
    for _ in range(2):
        if coverage.cut:
            assert coverage.needed_s > coverage.budget_s
            coverage = taken_up(path, TABLE, coverage.needed_s).coverage
    assert not coverage.cut


def test_settings_that_count_are_whole_numbers() -> None:
    """2.5 samples a layer, in a line whose digest fits, was taken up."""
    session = TuneSession(PROBLEM, ReplayEvaluator(TABLE, PROBLEM), settings=CHUNKS)
    header = json.loads(json.dumps(make_header(session.search, "race", None, session.evaluator)))
    assert read_header("run", header) == (PROBLEM, CHUNKS)
    header["strategy"]["settings"]["layer"] = 2.5
    with pytest.raises(JournalError, match=r"2\.5 at strategy\.settings\.layer"):
        read_header("run", header)
