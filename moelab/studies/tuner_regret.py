"""The strategies replayed on recorded landscapes with many seeds: regret against samples taken and against simulated time."""

from __future__ import annotations

import hashlib
import importlib.metadata
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from moelab import runtime
from moelab.errors import LandscapeError
from moelab.recordings import Recording
from moelab.tuner.finals import Finals
from moelab.tuner.landscape import Landscape, landscape_names, landscapes_dir, load
from moelab.tuner.regret import Point, Truth, replayed
from moelab.tuner.replay import COMPILE_PROCESSES, Table
from moelab.tuner.search import Settings, settings_json
from moelab.tuner.strategies import STRATEGIES
from moelab.tuner.survey import Survey

WHOLE = "-grid"
"""How the name of a landscape ends whose run measured the whole grid: its best is the best there is."""

SEEDS = 32
EVERY = 5
"""Requests, of up to 64 configs each, between two looks at what a search would choose."""

STOPS = 32
"""Places on each axis where the regrets of the seeds are summed up."""

QUANTILES = (0.1, 0.5, 0.9)

REGRET = (
    "how much slower than the best recorded pair the chosen one is, GEMM1 plus GEMM2 in the finals' protocol, as a share; "
    "`other` where the landscape of an independent run is the judge"
)


def record(names: Sequence[str] = (), seeds: int = SEEDS, strategies: Sequence[str] = tuple(STRATEGIES)) -> Recording:
    """Replay every strategy with every seed on each landscape (default: the whole grids in data/landscapes).

    Rows of kind "end": one search, what it took and what its choice loses, by its own landscape and by the others of the
    same layer. Rows of kind "curve": at a number of samples, or of simulated seconds, QUANTILES over the seeds of the
    median and of the worst regret over batch sizes, null where a quantile has no choice yet. Rows of kind "run": what a
    search that really ran chose at a batch size, judged by a whole grid of its layer that was measured apart from it.
    Landscapes under another routing judge nothing: other configs win there.
    Raises LandscapeError without a landscape.
    """
    replayed_ones = [load(name) for name in names or shipped()]
    runs = [] if names else [load(name) for name in landscape_names() if not name.endswith(WHOLE)]
    if not replayed_ones:
        raise LandscapeError(
            f"There is nothing to replay: no landscape of a whole grid is in {landscapes_dir()}. Expected NAME{WHOLE}.parquet. "
            "Name landscapes, or record one: make tuned."
        )
    truths = {found.name: _truth(found) for found in (*replayed_ones, *runs)}
    rows: list[dict[str, Any]] = []
    for found in replayed_ones:
        truth = truths[found.name]
        others = [truths[other.name] for other in _of_layer(found, (*replayed_ones, *runs)) if other.name != found.name]
        done = {s: [_one(truth, others, s, seed) for seed in range(seeds)] for s in strategies}
        rows += [{"kind": "end", "landscape": found.name, **end} for each in done.values() for _, end in each]
        searches = curves({s: [points for points, _ in each] for s, each in done.items()})
        rows += [{"kind": "curve", "landscape": found.name, **row} for row in searches]
        rows += [row for run in _of_layer(found, runs) for row in judged(run, found.name, truth)]
    here = runtime.provenance()  # the times are the landscape's GPU's; "replayed" says by which moelab, and when
    own = {key: here[key] for key in ("git_commit", "date", "python", "moelab")}
    own |= {name: importlib.metadata.version(name) for name in ("numpy", "scikit-learn")}
    provenance = {**replayed_ones[0].provenance, "replayed": own}
    return Recording("tuner_regret", provenance, _protocol(replayed_ones, runs, seeds), tuple(rows))


def shipped() -> tuple[str, ...]:
    """The landscapes of whole grids in data/landscapes."""
    return tuple(name for name in landscape_names() if name.endswith(WHOLE))


def judged(run: Landscape, name: str, truth: Truth) -> list[dict[str, Any]]:
    """What that run's finals chose at each batch size of the truth, and what it loses there."""
    winners = Finals.of_landscape(run).result().batches
    rows = []
    for b in truth.problem.batch_sizes:
        winner = winners.get(b)
        pair = (winner.up, winner.down) if winner and winner.up and winner.down else None
        rows.append(
            {
                "kind": "run",
                "landscape": name,
                "run": run.name,
                "num_tokens": b,
                "regret": _short(truth.regret(b, pair)),
            }
        )
    return rows


def _truth(found: Landscape) -> Truth:
    sizes = Survey(found).well_covered
    return Truth(Table(found), replace(found.problem, batch_sizes=sizes, incumbents=_cut(found, sizes)))


def _of_layer(found: Landscape, others: Sequence[Landscape]) -> list[Landscape]:
    """Those of the same layer on the same device, under the same routing."""

    def layer(each: Landscape) -> tuple[object, ...]:
        # under another routing other configs win: such a run is no judge of this one's choices
        return each.problem.shape, each.problem.device, each.problem.kernel, each.problem.routing

    return [other for other in others if layer(other) == layer(found)]


def _cut(landscape: Landscape, sizes: Sequence[int]) -> dict[str, Any]:
    incumbents = landscape.problem.incumbents
    return {label: {b: pair for b, pair in pairs.items() if b in sizes} for label, pairs in incumbents.items()}


def _one(truth: Truth, others: Sequence[Truth], strategy: str, seed: int) -> tuple[list[Point], dict[str, Any]]:
    """One search: its points, and what it came to."""
    points, result = replayed(truth, strategy, seed, every=EVERY)
    pairs = {b: (x.up, x.down) if x.up and x.down else None for b, x in result.batches.items()}
    verdicts = [other.regret(b, pair) for other in others for b, pair in pairs.items() if b in other.best_us]
    known = [regret for regret in verdicts if math.isfinite(regret)]
    end = points[-1]
    row: dict[str, Any] = {"strategy": strategy, "seed": seed, "samples": end.samples, "seconds": round(end.seconds, 2)}
    row |= {"median": _short(end.median), "worst": _short(end.worst)}
    row |= {"other_median": _short(statistics.median(known)), "other_worst": _short(max(known))} if known else {}
    return points, row | ({"other_unknown": len(verdicts) - len(known)} if others else {})


def curves(runs: Mapping[str, Sequence[Sequence[Point]]]) -> list[dict[str, Any]]:
    """What the seeds of each strategy would choose at STOPS places on each axis, evenly spaced on a log axis."""
    rows = []
    for axis in ("samples", "seconds"):
        values = [getattr(p, axis) for found in runs.values() for run in found for p in run if math.isfinite(p.worst)]
        stops = np.geomspace(min(values), max(values), STOPS)
        for strategy, found in runs.items():
            for stop in stops.tolist():
                regrets = [_at(run, axis, stop) for run in found]
                row: dict[str, Any] = {"strategy": strategy, "axis": axis, "at": _short(stop)}
                for i, which in enumerate(("median", "worst")):
                    row[which] = [_short(v) for v in quantiles([pair[i] for pair in regrets])]
                rows.append(row)
    return rows


def quantiles(values: Sequence[float]) -> list[float]:
    """QUANTILES of the values by rank, the next higher one, so that infinite values (no choice yet) need no arithmetic."""
    ordered = sorted(values)
    return [ordered[min(len(ordered) - 1, math.ceil(q * (len(ordered) - 1)))] for q in QUANTILES]


def _at(run: Sequence[Point], axis: str, stop: float) -> tuple[float, float]:
    """(median, worst) of the last look up to there; infinite before the first."""
    seen = [p for p in run if getattr(p, axis) <= stop * (1 + 1e-9)]
    return (seen[-1].median, seen[-1].worst) if seen else (math.inf, math.inf)


def _short(value: float) -> float | None:
    """Four digits, the regret to a thousandth of a per cent; None for what is not finite."""
    return float(f"{round(value, 5):.4g}") if math.isfinite(value) else None


def _protocol(replayed_ones: Sequence[Landscape], runs: Sequence[Landscape], seeds: int) -> dict[str, Any]:
    judges = [run for run in runs if any(_of_layer(found, [run]) for found in replayed_ones)]
    files = {
        each.name: hashlib.sha256(each.path.read_bytes()).hexdigest() for each in (*replayed_ones, *judges) if each.path
    }
    return {
        "kind": "strategies replayed on recorded landscapes", "regret": REGRET, "seeds": seeds,
        "batch_sizes": {found.name: list(Survey(found).well_covered) for found in replayed_ones},
        "quantiles": list(QUANTILES), "every": EVERY,
        "compile_processes": COMPILE_PROCESSES, "settings": settings_json(Settings()), "sha256": files,
    }  # fmt: skip
