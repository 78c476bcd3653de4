"""The strategy `forest`: a random forest learns the time of a config from a few, and says which to measure next.

One model for both GEMMs and all batch sizes, of log(time / roofline floor) over `features`. It starts from configs drawn
at random, the same at every batch size, and asks in rounds for those it believes best, each under the BLOCK_SIZE_M of its
best partner; the spread of its trees counts in favour. Together they are `fraction` of what `grid` measures, and each gets
a short look only: the model averages noise over configs, and the finals time the best again. Of an H200's landscapes that
takes 7 % of the samples of `grid`, finals included, for the same choice (tests/test_shipped_landscapes.py).
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moelab.errors import RuntimeModeError
from moelab.tuner.evaluate import Request
from moelab.tuner.features import features, floor_us
from moelab.tuner.problem import GEMMS, Gemm
from moelab.tuner.search import Plan, Search, Step, samples_of

TREES = 32
START_SHARE = 0.4
"""Share of the measurements that the random start takes; the rounds share the others."""
ROUNDS = 4
CURIOSITY = 0.5
"""How many standard deviations of the trees are taken off a predicted log time."""

Floats = NDArray[np.float64]


def forest(search: Search) -> Plan:
    """See the module. Its settings: fraction, brief. Raises RuntimeModeError without scikit-learn."""
    make = _regressor()
    inputs = {
        (gemm, b): features(search.problem, gemm, b, search.space.configs[gemm])
        for gemm in GEMMS
        for b in search.problem.batch_sizes
    }
    first: list[Request] = []
    for side, gemm in enumerate(GEMMS):
        configs = len(search.space.configs[gemm])
        count = max(4, round(START_SHARE * search.settings.fraction * configs))
        drawn = search.draws(3, side).permutation(configs)[:count]
        for b in search.problem.batch_sizes:
            same = search.board.representative[gemm][search.board.row[b]]
            first += search.requests(gemm, b, sorted({int(same[i]) for i in drawn}), search.settings.brief)
    in_a_round = round(samples_of(first) * (1 - START_SHARE) / START_SHARE / ROUNDS)
    yield (Step("start", tuple(first), later=ROUNDS * in_a_round))
    for number in range(ROUNDS):
        predicted = _predict(search, make(number), inputs)
        if predicted is None:
            return
        later = (ROUNDS - number - 1) * in_a_round
        yield (Step(f"round {number + 1}", tuple(_wanted(search, predicted)), later=later))


def _regressor() -> Any:
    try:
        from sklearn.ensemble import RandomForestRegressor
    except ImportError:
        raise RuntimeModeError(
            "The strategy 'forest' learns with scikit-learn, which is not here. Expected the extra forest. Install it: pip "
            "install 'moelab[forest]'; or take the strategy race."
        ) from None
    return lambda seed: RandomForestRegressor(TREES, max_features=0.5, random_state=seed)


def _predict(
    search: Search, model: Any, inputs: dict[tuple[Gemm, int], Floats]
) -> dict[tuple[Gemm, int], Floats] | None:
    """(gemm, batch size) -> the time of every config in microseconds: measured where it was, else as believed. None
    before anything could be measured."""
    measured = {(gemm, b): search.board.times(gemm, b)[: len(x)] for (gemm, b), x in inputs.items()}
    floors = {(gemm, b): floor_us(search.problem, gemm, b) for gemm, b in inputs}
    known = {key: np.isfinite(times) for key, times in measured.items()}
    if not any(mask.any() for mask in known.values()):
        return None
    x = np.vstack([inputs[key][known[key]] for key in inputs])
    y = np.concatenate([np.log(measured[key][known[key]] / floors[key]) for key in inputs])
    model.fit(x, y)
    everything = np.vstack(list(inputs.values())).astype(np.float32)  # what each tree would cast it to
    trees = np.stack([tree.predict(everything) for tree in model.estimators_])
    believed = np.exp(trees.mean(axis=0) - CURIOSITY * trees.std(axis=0))
    parts = np.split(believed, np.cumsum([len(x) for x in inputs.values()])[:-1])
    return {
        key: np.where(known[key], measured[key], part * floors[key]) for key, part in zip(inputs, parts, strict=True)
    }


def _wanted(search: Search, predicted: dict[tuple[Gemm, int], Floats]) -> list[Request]:
    """The best unmeasured candidates of each GEMM and batch size, by the time of the best pair they can be part of."""
    board, found = search.board, []
    share = (1 - START_SHARE) / ROUNDS * search.settings.fraction
    for b in search.problem.batch_sizes:
        for gemm in GEMMS:
            other: Gemm = "down" if gemm == "up" else "up"
            theirs = predicted[other, b]
            blocks = board.blocks_m[other][: len(theirs)]
            best = {m: float(np.min(theirs[blocks == m], initial=math.inf)) for m in np.unique(board.blocks_m[gemm])}
            known, failed = board.times(gemm, b), board.looked_at[gemm][board.row[b]]
            open_ones = [i for i in board.candidates(gemm, b) if not (math.isfinite(known[i]) or failed[i])]
            partner = [best[m] for m in board.blocks_m[gemm][open_ones]]
            scores = predicted[gemm, b][open_ones] + np.array(partner)
            count = max(1, round(share * len(board.candidates(gemm, b))))
            chosen = sorted(open_ones[i] for i in np.argsort(scores, kind="stable")[:count])
            found += search.requests(gemm, b, chosen, search.settings.brief)
    return found
