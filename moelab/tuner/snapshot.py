"""A session at one moment, in plain values: what a page shows of it while its thread goes on."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

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
    return Snapshot(session.progress(), {b: _standing(board, b) for b in session.problem.batch_sizes})


def _standing(board: Board, num_tokens: int) -> Standing:
    leaders = tuple(
        _leader(board, gemm, num_tokens, board.configs[gemm][i])
        for gemm in GEMMS
        for i in board.ranked(gemm, num_tokens, LEADERS)
    )
    pair = board.best_pair(num_tokens)
    if pair is None:
        return Standing(math.inf, math.inf, math.inf, None, leaders)
    both = [_leader(board, gemm, num_tokens, config) for gemm, config in zip(GEMMS, pair, strict=True)]
    best, low, high = (sum(getattr(x, name) for x in both) for name in ("median_us", "low_us", "high_us"))
    return Standing(best, low, high, pair, leaders)


def _leader(board: Board, gemm: Gemm, num_tokens: int, config: KernelConfig) -> Leader:
    import statistics

    from moelab.measure import median_interval

    samples = board.samples(gemm, num_tokens, config)
    if not samples:
        return Leader(gemm, config, math.inf, math.inf, math.inf, 0)
    return Leader(gemm, config, statistics.median(samples), *median_interval(samples), len(samples))
