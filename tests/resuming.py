"""Runs that are cut at a chosen point and taken up again, and how much of what stood in the journal was measured again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Generator, Sequence
from pathlib import Path

from moelab.tuner.evaluate import Request, Result
from moelab.tuner.problem import Problem
from moelab.tuner.replay import ReplayEvaluator, Table
from moelab.tuner.results import TuneResult
from moelab.tuner.search import COMPILE_SHARE, SEARCH_SHARE, Settings
from moelab.tuner.session import TuneSession

FINALS = ("finalists", "layers")


class Interrupted(ReplayEvaluator):
    """A replay in which Ctrl-C comes in the step of that number, once that share of its requests is answered."""

    def __init__(self, table: Table, problem: Problem, step: int, share: float, **more: int) -> None:
        super().__init__(table, problem, **more)
        self.left, self.share = step, share

    def run(self, requests: Sequence[Request]) -> Generator[Result, None, None]:
        self.left -= 1
        for number, result in enumerate(super().run(requests)):
            if self.left < 0 and number >= self.share * len(requests):
                raise KeyboardInterrupt
            yield result


def looks(line: dict) -> list[tuple]:
    """What a line of a journal measured: stage, batch size, configs, rounds and protocol of each contender."""
    what = (line["stage"], line["num_tokens"], line["rounds"], line["interleaved"])
    return [(*what, json.dumps(outcome["configs"])) for outcome in line["outcomes"]]


def again(path: Path) -> Counter[str]:
    """What was measured after the last resume, by what stood in the journal before it. "again": compiles and short looks that
    stood there, and finals in which nobody is new; "joined": finals that a newcomer made necessary; "new": all others. Read
    without moelab's reader."""
    lines = [json.loads(line) for line in path.read_text().splitlines()]
    resumed = max(i for i, line in enumerate(lines) if line["kind"] == "resumed")
    before = {look for line in lines[:resumed] if line["kind"] == "result" for look in looks(line)}
    found: Counter[str] = Counter()
    for line in lines[resumed:]:
        if line["kind"] == "result":
            old = [look in before for look in looks(line)]
            if line["interleaved"]:
                found["again" if all(old) else "joined" if any(old) else "new"] += 1
            else:
                found["again"] += sum(old)
                found["new"] += len(old) - sum(old)
    return +found


def budget_for(free: TuneResult, phase: str, share: float) -> float:
    """The budget in seconds that ends a run like `free` in that share of the phase."""
    before = 0.0
    for name, seconds in free.timeline:
        if name == phase:
            return (before + share * seconds) / (COMPILE_SHARE if phase == "compile" else SEARCH_SHARE)
        before += seconds
    raise KeyError(phase)


def cut_run(
    path: Path,
    table: Table,
    problem: Problem,
    strategy: str,
    *,
    budget_s: float | None = None,
    interrupt: tuple[int, float] | None = None,
    settings: Settings | None = None,
) -> TuneResult | None:
    """A run with a journal at `path`: to its end under the budget (its result), or to a Ctrl-C at (step, share) (None)."""
    path.unlink(missing_ok=True)
    evaluator = Interrupted(table, problem, *interrupt) if interrupt else ReplayEvaluator(table, problem)
    session = TuneSession(problem, evaluator, strategy=strategy, run=path, budget_s=budget_s, settings=settings)
    try:
        return session.run()
    except KeyboardInterrupt:
        return None


def taken_up(path: Path, table: Table, budget_s: float | None = None) -> TuneResult:
    """The run at `path`, gone on with to its end."""
    return TuneSession.resume(path, lambda problem: ReplayEvaluator(table, problem), budget_s=budget_s).run()
