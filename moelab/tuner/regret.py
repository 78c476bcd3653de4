"""Regret: how much slower than the best a search's choice is, judged by a landscape's medians in the finals' protocol."""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from moelab.tuner.board import Board
from moelab.tuner.evaluate import Request, Result
from moelab.tuner.problem import GEMMS, Pair, Problem
from moelab.tuner.replay import ReplayEvaluator, Table
from moelab.tuner.results import TuneResult
from moelab.tuner.search import Settings
from moelab.tuner.session import TuneSession
from moelab.tuner.space import build_space


@dataclass(frozen=True)
class Point:
    """A search at one moment. samples: taken so far; seconds: on the simulated clock; median, worst: over batch sizes, the
    regret of what it would choose then (0.01 is 1 % slower than the best; infinite before there is a choice)."""

    phase: str
    samples: int
    seconds: float
    median: float
    worst: float


class Truth:
    """The best pair of each batch size by `Table.median_us`, GEMM1 plus GEMM2 under one BLOCK_SIZE_M."""

    def __init__(self, table: Table, problem: Problem) -> None:
        self.table, self.problem = table, problem
        self.board = Board(problem, build_space(problem))
        for gemm in GEMMS:
            for b in problem.batch_sizes:
                known = [table.median_us(gemm, b, (config,)) for config in self.board.configs[gemm]]
                self.board.put(gemm, b, np.nan_to_num(known, nan=math.inf))
        self.best_us = {b: self.board.best_us(b) for b in problem.batch_sizes}

    def regret(self, num_tokens: int, pair: Pair | None) -> float:
        """How much slower that pair is than the best; infinite for None and for what has no recorded time."""
        if pair is None:
            return math.inf
        board, row = self.board, self.board.row[num_tokens]
        own = [
            board.times(gemm, num_tokens)[board.representative[gemm][row][board.index[gemm][config]]]
            for gemm, config in zip(GEMMS, pair, strict=True)
        ]
        return float(sum(own)) / self.best_us[num_tokens] - 1


class _Traced(ReplayEvaluator):
    """A replay that calls back once a result is on the board."""

    def __init__(self, *given: Any, every: int, **more: Any) -> None:
        super().__init__(*given, **more)
        self.every, self.samples = every, 0
        self.after: Callable[[], None] = lambda: None

    def run(self, requests: Sequence[Request]) -> Generator[Result, None, None]:
        for number, result in enumerate(super().run(requests), 1):
            self.samples += sum(len(o.samples_us) for o in result.outcomes)
            yield result
            if number % self.every == 0 or number == len(requests):
                self.after()


def replayed(
    truth: Truth, strategy: str, seed: int, *, settings: Settings | None = None, every: int = 50
) -> tuple[list[Point], TuneResult]:
    """One replayed search of the truth's problem: regret after every so many requests and of its result, and that result."""
    problem, points = replace(truth.problem, seed=seed), list[Point]()
    evaluator = _Traced(truth.table, problem, seed=seed, every=every)
    session = TuneSession(problem, evaluator, strategy=strategy, settings=settings)

    def look(choice: dict[int, Pair | None] | None = None) -> None:
        pairs = choice or {b: session.board.best_pair(b) for b in problem.batch_sizes}
        found = [truth.regret(b, pair) for b, pair in pairs.items()]
        phase = session.progress().phase
        points.append(Point(phase, evaluator.samples, evaluator.clock_s(), statistics.median(found), max(found)))

    evaluator.after = look
    result = session.run()
    look({b: (x.up, x.down) if x.up and x.down else None for b, x in result.batches.items()})
    return points, result


def trace(truth: Truth, strategy: str, seed: int, *, settings: Settings | None = None, every: int = 50) -> list[Point]:
    """Regret during one replayed search of the truth's problem: after every so many requests, and of its result."""
    return replayed(truth, strategy, seed, settings=settings, every=every)[0]
