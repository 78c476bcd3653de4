"""Board: what a search knows so far, as arrays over configs and batch sizes."""

from __future__ import annotations

import statistics
from collections import Counter
from collections.abc import Iterable, Sequence
from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from moelab.config import KernelConfig
from moelab.tuner.evaluate import Result
from moelab.tuner.problem import GEMMS, Gemm, Pair, Problem
from moelab.tuner.space import Space, representatives

Floats = NDArray[np.float64]


class Board:
    """Medians of every config at every batch size, per GEMM, with equal programs sharing what one of them measured.

    All by one protocol, the short looks that every strategy takes: the finals read up to a quarter apart for the same config,
    and would move the finalists against the others; who wins is for `results.decide`.

    configs[gemm]: those of the space, then the incumbents that are not in it. failures: how many outcomes by class.
    compiled[gemm] (configs,): went through the compiler; left_out[gemm]: shall not, for want of time.
    looked_at[gemm] (batch sizes, configs): was measured, finals aside.
    """

    def __init__(self, problem: Problem, space: Space) -> None:
        self.problem, self.space = problem, space
        self.failures: Counter[str] = Counter()
        self.configs: dict[Gemm, tuple[KernelConfig, ...]] = {}
        for side, gemm in enumerate(GEMMS):
            own = [pairs[b][side] for pairs in problem.incumbents.values() for b in sorted(pairs)]
            self.configs[gemm] = tuple(dict.fromkeys([*space.configs[gemm], *own]))
        self.index = {gemm: {c: i for i, c in enumerate(configs)} for gemm, configs in self.configs.items()}
        self.row = {b: j for j, b in enumerate(problem.batch_sizes)}
        size = {gemm: (len(self.row), len(configs)) for gemm, configs in self.configs.items()}
        self._median: dict[Gemm, Floats] = {gemm: np.full(size[gemm], np.inf) for gemm in GEMMS}
        self._samples: dict[tuple[Gemm, int, int], list[float]] = {}
        self.broken, self.compiled, self.left_out = (
            {gemm: np.zeros(size[gemm][1], dtype=bool) for gemm in GEMMS} for _ in range(3)
        )
        self.looked_at = {gemm: np.zeros(size[gemm], dtype=bool) for gemm in GEMMS}

    @cached_property
    def representative(self) -> dict[Gemm, NDArray[np.int64]]:
        """(batch sizes, configs): the index of the config that is measured in each one's place, none that was left out in
        the place of one that was not."""
        found = {}
        for gemm, configs in self.configs.items():
            rows, index = [], self.index[gemm]
            first = [configs[i] for i in np.argsort(self.left_out[gemm], kind="stable")]
            for b in self.problem.batch_sizes:
                same = representatives(first, self.problem, gemm, b)
                rows.append([index[same[config]] for config in configs])
            found[gemm] = np.array(rows, dtype=np.int64).reshape(len(rows), len(configs))
        return found

    @cached_property
    def blocks_m(self) -> dict[Gemm, NDArray[np.int64]]:
        """BLOCK_SIZE_M of every config."""
        return {gemm: np.array([c.BLOCK_SIZE_M for c in configs]) for gemm, configs in self.configs.items()}

    @cached_property
    def _blocks_m_of(self) -> dict[Gemm, tuple[NDArray[np.int64], NDArray[np.int64]]]:
        """The distinct BLOCK_SIZE_M, and the place of every config's among them."""
        return {gemm: np.unique(blocks, return_inverse=True) for gemm, blocks in self.blocks_m.items()}

    def candidates(self, gemm: Gemm, num_tokens: int) -> list[int]:
        """Indices of the space's configs worth a measurement at that batch size: not left out, nor refused by the compiler,
        and one of each program."""
        count, own = len(self.space.configs[gemm]), self.representative[gemm][self.row[num_tokens]]
        keep = (own == np.arange(len(own))) & ~self.broken[gemm] & ~self.left_out[gemm]
        return np.flatnonzero(keep[:count]).tolist()

    def leave_out(self, gemm: Gemm, configs: Iterable[KernelConfig]) -> None:
        """These are not compiled, and not measured; before anything is."""
        self.left_out[gemm][[self.index[gemm][config] for config in configs]] = True
        self.__dict__.pop("representative", None)

    def add(self, results: Iterable[Result]) -> None:
        """Take in what came back."""
        for result in results:
            request = result.request
            for contender, outcome in zip(request.contenders, result.outcomes, strict=True):
                if outcome.failure is not None:
                    self.failures[outcome.failure] += 1
                if request.stage == "layer":
                    continue
                gemm, i = request.stage, self.index[request.stage][contender[0]]
                if request.rounds == 0 or outcome.failure != "unrecorded":
                    self.compiled[gemm][i] = True
                    if request.rounds and not request.interleaved:
                        self.looked_at[gemm][self.row[request.num_tokens], i] = True
                if outcome.failure is not None:
                    if request.rounds == 0:
                        self.broken[gemm][i] = True
                    continue
                if outcome.samples_us and not request.interleaved:
                    row = self.row[request.num_tokens]
                    samples = self._samples.setdefault((gemm, row, i), [])
                    samples.extend(outcome.samples_us)
                    self._median[gemm][row, i] = statistics.median(samples)

    def samples(self, gemm: Gemm, num_tokens: int, config: KernelConfig) -> tuple[float, ...]:
        """Every short sample of the program that the config runs there, microseconds; empty before there is one."""
        row = self.row[num_tokens]
        measured = int(self.representative[gemm][row][self.index[gemm][config]])
        return tuple(self._samples.get((gemm, row, measured), ()))

    def put(self, gemm: Gemm, num_tokens: int, times_us: Floats) -> None:
        """Set every config's median at once, infinite where there is none: what a landscape knows."""
        self._median[gemm][self.row[num_tokens]] = times_us

    def times(self, gemm: Gemm, num_tokens: int) -> Floats:
        """(configs,) medians in microseconds, infinite where nothing was measured."""
        row = self.row[num_tokens]
        return self._median[gemm][row][self.representative[gemm][row]]

    def scores(self, gemm: Gemm, num_tokens: int) -> Floats:
        """(configs,) time of the best layer that uses each config for this GEMM: its own, plus the best other GEMM's
        under the same BLOCK_SIZE_M (under the same config, if one serves both)."""
        other: Gemm = "down" if gemm == "up" else "up"
        mine, theirs = self.times(gemm, num_tokens), self.times(other, num_tokens)
        if not self.problem.separate_down:
            at = [self.index[other].get(config, -1) for config in self.configs[gemm]]
            return mine + np.where(np.array(at) < 0, np.inf, theirs[at])
        blocks, place = self._blocks_m_of[gemm]
        best = np.array([np.min(theirs[self.blocks_m[other] == m], initial=np.inf) for m in blocks])
        return mine + best[place]

    def ranked(self, gemm: Gemm, num_tokens: int, count: int) -> list[int]:
        """Indices of the `count` best by `scores`, best first, one of each program, none without a measurement."""
        scores, own = self.scores(gemm, num_tokens), self.representative[gemm][self.row[num_tokens]]
        order = np.argsort(np.where(own == np.arange(len(own)), scores, np.inf), kind="stable")[:count]
        return [int(i) for i in order if np.isfinite(scores[i])]

    def best_us(self, num_tokens: int) -> float:
        """GEMM1 plus GEMM2 of the best pair so far, microseconds; infinite before there is one."""
        return float(np.min(self.scores("up", num_tokens), initial=np.inf))

    def best_pair(self, num_tokens: int) -> Pair | None:
        """The pair that `best_us` is the time of."""
        ups = self.ranked("up", num_tokens, 1)
        if not ups:
            return None
        up = self.configs["up"][ups[0]]
        if not self.problem.separate_down:
            return up, up
        times = np.where(self.blocks_m["down"] == up.BLOCK_SIZE_M, self.times("down", num_tokens), np.inf)
        return up, self.configs["down"][int(np.argmin(times))]

    def incumbents(self, num_tokens: int) -> Sequence[tuple[str, Pair]]:
        """(label, pair) of each incumbent at that batch size."""
        return [(label, pairs[num_tokens]) for label, pairs in self.problem.incumbents.items() if num_tokens in pairs]
