"""A session at one moment, in plain values: what a page shows of it while its thread goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from moelab.config import KernelConfig
from moelab.tuner.board import Board
from moelab.tuner.problem import GEMMS, Gemm, Pair
from moelab.tuner.progress import Progress
from moelab.tuner.session import TuneSession

LEADERS = 5
"""Configs of each GEMM that a snapshot names."""


@dataclass(frozen=True)
class Leader:
    """One of the best configs of a GEMM so far. low_us, high_us: 95 % interval of its median."""

    gemm: Gemm
    config: KernelConfig
    median_us: float
    low_us: float
    high_us: float
    samples: int


@dataclass(frozen=True)
class Standing:
    """One batch size. best_us: GEMM1 plus GEMM2 of the best pair so far; low_us, high_us: the sums of their intervals'
    ends, which is wider than an interval of the sum; infinite before there is a pair."""

    best_us: float
    low_us: float
    high_us: float
    pair: Pair | None
    leaders: tuple[Leader, ...]


@dataclass(frozen=True)
class Snapshot:
    """Progress, and a Standing for each batch size."""

    progress: Progress
    standings: Mapping[int, Standing]


def snapshot(session: TuneSession) -> Snapshot:
    """Take one. Call it in the session's thread (on_progress), or once the session has ended."""
    board = session.board
    return Snapshot(session.progress(), {b: standing(board, b) for b in session.problem.batch_sizes})


def best_until(
    moments: Sequence[tuple[float, Standing]], board: Board, num_tokens: int
) -> tuple[tuple[float, Standing], ...]:
    """(seconds, Standing) of the moments that had a pair, each with the best pair until then, by all that the board knows now.

    More samples can make a pair's median worse, and a search then turns to another: what it had believed before was never
    there. Judged by what is known now, the best so far never gets worse.
    """
    known: dict[Pair, tuple[float, float, float]] = {}
    found: list[tuple[float, Standing]] = []
    best: Standing | None = None
    for seconds, then in moments:
        if then.pair is None:
            continue
        if then.pair not in known:
            known[then.pair] = _sums(board, num_tokens, then.pair)
        us, low, high = known[then.pair]
        if best is None or us < best.best_us:
            best = replace(then, best_us=us, low_us=low, high_us=high)
        found.append((seconds, replace(best, leaders=then.leaders)))
    return tuple(found)


def standing(board: Board, num_tokens: int) -> Standing:
    """One batch size, now."""
    leaders = tuple(
        _leader(board, gemm, num_tokens, board.configs[gemm][i])
        for gemm in GEMMS
        for i in board.ranked(gemm, num_tokens, LEADERS)
    )
    pair = board.best_pair(num_tokens)
    if pair is None:
        return Standing(math.inf, math.inf, math.inf, None, leaders)
    return Standing(*_sums(board, num_tokens, pair), pair, leaders)


def _sums(board: Board, num_tokens: int, pair: Pair) -> tuple[float, float, float]:
    both = [_leader(board, gemm, num_tokens, config) for gemm, config in zip(GEMMS, pair, strict=True)]
    best, low, high = (sum(getattr(x, name) for x in both) for name in ("median_us", "low_us", "high_us"))
    return best, low, high


def _leader(board: Board, gemm: Gemm, num_tokens: int, config: KernelConfig) -> Leader:
    import statistics

    from moelab.measure import median_interval

    samples = board.samples(gemm, num_tokens, config)
    if not samples:
        return Leader(gemm, config, math.inf, math.inf, math.inf, 0)
    return Leader(gemm, config, statistics.median(samples), *median_interval(samples), len(samples))
