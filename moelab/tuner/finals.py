"""The finals of a run, whole layers timed side by side: who won, and who would have without some of the contenders."""

from __future__ import annotations

import statistics
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, replace

from moelab.errors import LandscapeError
from moelab.tuner.evaluate import Result
from moelab.tuner.landscape import Landscape
from moelab.tuner.problem import Pair, Problem
from moelab.tuner.results import BatchResult, TuneResult, decide

Excluded = Collection[tuple[int, Pair]]


@dataclass(frozen=True)
class Contest:
    """One pair in the final of one batch size, by its samples. label: "default", "current", or "" for a contender."""

    pair: Pair
    label: str
    median_us: float
    low_us: float
    high_us: float
    samples: int


@dataclass(frozen=True)
class Finals:
    """The last comparison of whole layers at each batch size. source: what was measured, or replayed. measured: whether
    the times are this source's own, False for a replay, whose layers may be sums of recorded parts."""

    problem: Problem
    layers: Mapping[int, Result]
    source: str
    measured: bool

    @classmethod
    def of_results(cls, problem: Problem, results: Iterable[Result], source: str, *, measured: bool) -> Finals:
        """From all results of a session; batch sizes whose final has not been run are left out."""
        found = {r.request.num_tokens: r for r in results if r.request.stage == "layer" and r.request.interleaved}
        return cls(problem, {b: found[b] for b in problem.batch_sizes if b in found}, source, measured)

    @classmethod
    def of_landscape(cls, landscape: Landscape) -> Finals:
        """Those that were recorded with a landscape. Raises LandscapeError if none were."""
        from moelab.tuner.evaluate import Request

        rows = [row for row in landscape.rows if row.stage == "layer" and row.interleaved]
        results = []
        for b in landscape.problem.batch_sizes:
            here = [row for row in rows if row.num_tokens == b]
            if here:
                rounds = max(len(row.outcome.samples_us) for row in here)
                request = Request("layer", b, tuple(row.contender for row in here), rounds, True)
                results.append(Result(request, tuple(row.outcome for row in here)))
        if not results:
            raise LandscapeError(
                f"The landscape {landscape.name} holds no finals. Expected whole layers, timed side by side. Record one with "
                "`moelab tune --freeze`, whose runs end with them."
            )
        return cls.of_results(landscape.problem, results, landscape.source(), measured=True)

    def contests(self, num_tokens: int) -> list[Contest]:
        """Who ran at that batch size, fastest first."""
        from moelab.measure import median_interval

        result, labels = self.layers[num_tokens], {p: label for label, p in self._incumbents(num_tokens)}
        found = [
            Contest(
                (pair[0], pair[1]), labels.get((pair[0], pair[1]), ""), statistics.median(o.samples_us),
                *median_interval(o.samples_us), len(o.samples_us),
            )
            for pair, o in zip(result.request.contenders, result.outcomes, strict=True)
            if o.samples_us
        ]  # fmt: skip
        return sorted(found, key=lambda contest: contest.median_us)

    def winner(self, num_tokens: int, excluded: Excluded = ()) -> BatchResult:
        """The winner by `decide`, as if the excluded pairs had not been candidates. The default and the file's config, if
        excluded, are not beaten either: there is no gain over them."""
        result = self.layers.get(num_tokens)
        incumbents = [(label, p) for label, p in self._incumbents(num_tokens) if (num_tokens, p) not in excluded]
        return decide(num_tokens, incumbents, None if result is None else _without(result, num_tokens, excluded))

    def _incumbents(self, num_tokens: int) -> list[tuple[str, Pair]]:
        return [(label, pairs[num_tokens]) for label, pairs in self.problem.incumbents.items() if num_tokens in pairs]

    def result(self, excluded: Excluded = ()) -> TuneResult:
        """The winners of all batch sizes, as a run returns them; no seconds, no failures."""
        batches = {b: self.winner(b, excluded) for b in self.layers}
        return TuneResult(self.problem, batches, self.source, 0.0, (), {})


def _without(result: Result, num_tokens: int, excluded: Excluded) -> Result | None:
    kept = [
        (pair, outcome)
        for pair, outcome in zip(result.request.contenders, result.outcomes, strict=True)
        if (num_tokens, pair) not in excluded
    ]
    if not kept:
        return None
    return Result(replace(result.request, contenders=tuple(p for p, _ in kept)), tuple(o for _, o in kept))
