"""What every strategy is made of: the steps it asks for, its settings, and the finals that all of them share.

A strategy is a generator: it yields a `Step` of requests, and goes on once all of them are answered and on the board (but
for those skipped because the budget ran out); it is sent the results, None for one that was skipped. It draws its random
numbers from the problem's seed and sees no clock, so that the same answers always lead to the same questions.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from moelab.config import KernelConfig
from moelab.tuner.board import Board
from moelab.tuner.evaluate import Contender, Request, Result, Stage
from moelab.tuner.order import promising
from moelab.tuner.problem import GEMMS, Gemm, Pair, Problem
from moelab.tuner.space import Space

SEARCH_SHARE = 0.8
"""Share of a budget after which nothing is begun that can be left out: the rest is for the finals."""

COMPILE_SHARE = 0.6
"""Share of a budget after which no more candidates are compiled: those that are get the looks that fit before SEARCH_SHARE."""

COMPILE_CHUNK = 32
"""Most kernels in a request that only compiles: the clock is looked at after each."""


@dataclass(frozen=True)
class Settings:
    """How much a search measures. Rounds are samples for each contender; shares are of the candidates.

    brief, long, final, layer: rounds of the first look, of a longer one, of the finalists of each GEMM, and of whole
    layers. finalists: configs of each GEMM and batch size in the final. pairs: layers timed end to end, beside the
    incumbents. chunk: contenders in a request. stop_factor: a first look ends after one sample that is this many times
    the best of the scouts, which are drawn at random. anchor_stride: every how many batch sizes all candidates are
    looked at; between_share: of those, how many of the best are looked at in between. long_share: how many get the
    longer look. neighbours: best configs that a batch size's final takes from the next smaller and larger one.
    fraction: share of the candidates that `random` measures, and that `forest` may.
    """

    brief: int = 3
    long: int = 10
    final: int = 20
    layer: int = 30
    finalists: int = 16
    pairs: int = 4
    chunk: int = 64
    stop_factor: float = 1.3
    scouts: int = 32
    anchor_stride: int = 2
    between_share: float = 0.25
    long_share: float = 0.1
    neighbours: int = 2
    fraction: float = 0.1


@dataclass(frozen=True)
class Step:
    """Requests that may be answered in any order. phase: its name for people. needed: measured even past the budget.
    later: about how many samples will be asked for after this step. share: of a budget, after which no more of it is begun."""

    phase: str
    requests: tuple[Request, ...]
    needed: bool = False
    later: int = 0
    share: float = SEARCH_SHARE


Answers = Sequence[Result | None]
Plan = Generator[Step, Answers, None]
Finals = Generator[Step, Answers, dict[int, Result | None]]


@dataclass(frozen=True)
class Search:
    """One search: what is asked (problem, space, settings) and what is known (board)."""

    problem: Problem
    space: Space
    board: Board
    settings: Settings

    def draws(self, *purpose: int) -> np.random.Generator:
        """A generator of random numbers of its own for each purpose."""
        return np.random.default_rng([self.problem.seed, *purpose])

    def requests(
        self,
        gemm: Gemm,
        num_tokens: int,
        indices: Iterable[int],
        rounds: int,
        *,
        stop_above_us: float | None = None,
        chunk: int | None = None,
    ) -> list[Request]:
        """Requests of up to `chunk` contenders each (default: the settings') for configs of the board, by index."""
        contenders: list[Contender] = [(self.board.configs[gemm][i],) for i in indices]
        size = chunk or self.settings.chunk
        return [
            Request(gemm, num_tokens, tuple(contenders[i : i + size]), rounds, False, stop_above_us)
            for i in range(0, len(contenders), size)
        ]

    @cached_property
    def _promise(self) -> dict[KernelConfig, int]:
        every = list(dict.fromkeys(config for gemm in GEMMS for config in self.board.configs[gemm]))
        incumbents = self.problem.incumbents.values()
        known = dict.fromkeys(config for pairs in incumbents for pair in pairs.values() for config in pair)
        return {every[i]: rank for rank, i in enumerate(promising(every, list(known), self.draws(4)))}

    def by_promise(self, gemm: Gemm, indices: Iterable[int]) -> list[int]:
        """Configs of the board, by index, the most promising first; the same order for both GEMMs."""
        return sorted(indices, key=lambda i: self._promise[self.board.configs[gemm][i]])

    def compile_all(self) -> Plan:
        """Compile every candidate once, for all batch sizes, the most promising first and the GEMMs by turns. What does not
        compile, and what the budget's share for compiling did not reach, is asked for no more."""
        board, first, chunk = self.board, self.problem.batch_sizes[0], min(COMPILE_CHUNK, self.settings.chunk)
        requests = by_turns(
            self.requests(gemm, first, self.by_promise(gemm, range(len(board.configs[gemm]))), 0, chunk=chunk)
            for gemm in GEMMS
        )
        answers = yield (Step("compile", requests, share=COMPILE_SHARE))
        for request, answer in zip(requests, answers, strict=True):
            if answer is None and request.stage != "layer":
                board.leave_out(request.stage, [config for (config,) in request.contenders])


def by_turns(groups: Iterable[Sequence[Request]]) -> tuple[Request, ...]:
    """The first request of each group, then the second ones: a budget that ends a step early then cuts all groups alike."""
    turns = itertools.zip_longest(*groups)
    return tuple(request for turn in turns for request in turn if request is not None)


def samples_of(requests: Iterable[Request]) -> int:
    """How many samples they ask for at most; a compile counts as one."""
    return sum(len(r.contenders) * max(1, r.rounds) for r in requests)


def finals(search: Search) -> Finals:
    """The end of every strategy: finalists of each GEMM timed interleaved, then the best pairs, whole layers, interleaved
    with the incumbents. Returns the layers' results by batch size: contenders are the best pairs, then the incumbents in
    `Board.incumbents` order where they are not among those; None where no pair could be formed."""
    problem, settings = search.problem, search.settings
    batch_sizes = problem.batch_sizes
    shortlists = {(gemm, b): _finalists(search, gemm, b) for gemm in GEMMS for b in batch_sizes}
    requests = tuple(
        Request(gemm, b, tuple((c,) for c in configs), settings.final, interleaved=True)
        for (gemm, b), configs in shortlists.items()
        if configs
    )
    later = len(batch_sizes) * (settings.pairs + len(problem.incumbents)) * settings.layer
    answers = yield (Step("finalists", requests, needed=True, later=later))
    fresh = _medians(answers)
    layers = {b: _layer_request(search, b, fresh) for b in batch_sizes}
    asked = [request for request in layers.values() if request is not None]
    answers = yield (Step("layers", tuple(asked), needed=True))
    by_batch = {result.request.num_tokens: result for result in answers if result is not None}
    return {b: by_batch.get(b) for b in batch_sizes}


def _finalists(search: Search, gemm: Gemm, num_tokens: int) -> list[KernelConfig]:
    """The best here, the best of the neighbouring batch sizes, and the incumbents, each program once."""
    board, settings = search.board, search.settings
    row, configs = board.row[num_tokens], board.configs[gemm]
    found = board.ranked(gemm, num_tokens, settings.finalists)
    for near in (row - 1, row + 1):
        if 0 <= near < len(search.problem.batch_sizes):
            found += board.ranked(gemm, search.problem.batch_sizes[near], settings.neighbours)
    found += [board.index[gemm][pair[GEMMS.index(gemm)]] for _, pair in board.incumbents(num_tokens)]
    same = board.representative[gemm][row]
    return [configs[i] for i in dict.fromkeys(int(same[i]) for i in found) if not board.broken[gemm][i]]


def _medians(answers: Answers) -> dict[tuple[Stage, int], dict[KernelConfig, float]]:
    found: dict[tuple[Stage, int], dict[KernelConfig, float]] = {}
    for result in answers:
        if result is not None:
            here = found.setdefault((result.request.stage, result.request.num_tokens), {})
            for contender, outcome in zip(result.request.contenders, result.outcomes, strict=True):
                if outcome.samples_us:
                    here[contender[0]] = float(np.median(outcome.samples_us))
    return found


def _layer_request(
    search: Search, num_tokens: int, fresh: dict[tuple[Stage, int], dict[KernelConfig, float]]
) -> Request | None:
    """The best pairs by the sum of their finalists' medians, and the incumbents."""
    ups, downs = fresh.get(("up", num_tokens), {}), fresh.get(("down", num_tokens), {})
    if search.problem.separate_down:
        pairs = [(u, d) for u, d in itertools.product(ups, downs) if u.BLOCK_SIZE_M == d.BLOCK_SIZE_M]
    else:
        pairs = [(c, c) for c in ups if c in downs]
    pairs.sort(key=lambda pair: ups[pair[0]] + downs[pair[1]])
    chosen: list[Pair] = pairs[: search.settings.pairs]
    chosen += [pair for _, pair in search.board.incumbents(num_tokens)]
    contenders = tuple(dict.fromkeys(chosen))
    if not contenders:
        return None
    return Request("layer", num_tokens, contenders, search.settings.layer, interleaved=True)


def settings_json(settings: Settings) -> dict[str, float]:
    """For a journal's header; `Settings(**...)` reads it back."""
    return dataclasses.asdict(settings)
