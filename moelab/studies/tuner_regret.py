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
from moelab.tuner.landscape import Landscape, landscape_names, landscapes_dir, load
from moelab.tuner.regret import Point, Truth, replayed
from moelab.tuner.replay import COMPILE_PROCESSES, Table
from moelab.tuner.search import Settings, settings_json
from moelab.tuner.strategies import STRATEGIES
from moelab.tuner.survey import Survey

LAYER = "qwen3-30b-a3b-tp1-NVIDIA_H200"
"""The landscape whose runs are replayed where none is named."""

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
    """Replay every strategy with every seed on each landscape (default: the runs of LAYER in data/landscapes).

    Rows of kind "end": one search, what it took and what its choice loses, by its own landscape and by the others of the
    same layer. Rows of kind "curve": at a number of samples, or of simulated seconds, QUANTILES over the seeds of the
    median and of the worst regret over batch sizes, null where a quantile has no choice yet.
    Raises LandscapeError without a landscape, or where those named are not of one layer.
    """
    landscapes = [load(name) for name in names or shipped()]
    _require_one_layer(landscapes)
    sizes = common_batch_sizes(landscapes)
    truths = {
        found.name: Truth(Table(found), replace(found.problem, batch_sizes=sizes, incumbents=_cut(found, sizes)))
        for found in landscapes
    }
    rows: list[dict[str, Any]] = []
    for name, truth in truths.items():
        others = [other for key, other in truths.items() if key != name]
        runs = {s: [_one(truth, others, s, seed) for seed in range(seeds)] for s in strategies}
        rows += [{"kind": "end", "landscape": name, **end} for found in runs.values() for _, end in found]
        rows += [
            {"kind": "curve", "landscape": name, **row}
            for row in curves({s: [p for p, _ in f] for s, f in runs.items()})
        ]
    return Recording("tuner_regret", _provenance(landscapes), _protocol(landscapes, sizes, seeds), tuple(rows))


def shipped() -> tuple[str, ...]:
    """The landscapes of LAYER in data/landscapes: its runs, which can judge each other."""
    return tuple(name for name in landscape_names() if name == LAYER or name.startswith(f"{LAYER}-seed"))


def common_batch_sizes(landscapes: Sequence[Landscape]) -> tuple[int, ...]:
    """Batch sizes where each of them measured nearly the whole grid."""
    covered = [set(Survey(found).well_covered) for found in landscapes]
    return tuple(b for b in landscapes[0].problem.batch_sizes if all(b in c for c in covered))


def _require_one_layer(landscapes: Sequence[Landscape]) -> None:
    layers = {(found.problem.shape, found.problem.device, found.problem.kernel) for found in landscapes}
    if len(layers) != 1:
        raise LandscapeError(
            f"Regret is judged on {len(layers)} layers ({', '.join(found.name for found in landscapes) or 'no landscape'} in "
            f"{landscapes_dir()}). Expected landscapes of one layer on one device. Name those of one."
        )


def _cut(landscape: Landscape, sizes: Sequence[int]) -> dict[str, Any]:
    incumbents = landscape.problem.incumbents
    return {label: {b: pair for b, pair in pairs.items() if b in sizes} for label, pairs in incumbents.items()}


def _one(truth: Truth, others: Sequence[Truth], strategy: str, seed: int) -> tuple[list[Point], dict[str, Any]]:
    """One search: its points, and what it came to."""
    points, result = replayed(truth, strategy, seed, every=EVERY)
    pairs = {b: (x.up, x.down) if x.up and x.down else None for b, x in result.batches.items()}
    judged = [other.regret(b, pair) for other in others for b, pair in pairs.items()]
    known = [regret for regret in judged if math.isfinite(regret)]
    end = points[-1]
    row: dict[str, Any] = {"strategy": strategy, "seed": seed, "samples": end.samples, "seconds": round(end.seconds, 2)}
    row |= {"median": _short(end.median), "worst": _short(end.worst)}
    row |= {"other_median": _short(statistics.median(known)), "other_worst": _short(max(known))} if known else {}
    return points, row | ({"other_unknown": len(judged) - len(known)} if others else {})


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


def _provenance(landscapes: Sequence[Landscape]) -> dict[str, Any]:
    """The landscape's, whose GPU's times these are; "replayed" says by which moelab, and when."""
    here = runtime.provenance()
    own = {key: here[key] for key in ("git_commit", "date", "python", "moelab")}
    own |= {name: importlib.metadata.version(name) for name in ("numpy", "scikit-learn")}
    return {**landscapes[0].provenance, "replayed": own}


def _protocol(landscapes: Sequence[Landscape], sizes: Sequence[int], seeds: int) -> dict[str, Any]:
    files = {found.name: hashlib.sha256(found.path.read_bytes()).hexdigest() for found in landscapes if found.path}
    return {
        "kind": "strategies replayed on recorded landscapes", "regret": REGRET, "seeds": seeds,
        "batch_sizes": list(sizes), "quantiles": list(QUANTILES), "every": EVERY,
        "compile_processes": COMPILE_PROCESSES, "settings": settings_json(Settings()), "sha256": files,
    }  # fmt: skip
