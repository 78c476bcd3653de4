"""Replay: an evaluator that answers from a recorded landscape, with its noise redrawn and its costs charged.

Samples are drawn with replacement from those recorded for that config, stage and batch size. The draw depends on the
seed and on the request, not on what was asked before, so that a run that was killed and resumed sees what an
undisturbed one would have seen, and several replays share one run's requests. A config is charged its recorded compile
time once for each GEMM, whatever the number of batch sizes, and every sample its share of the recorded measuring time.

The short looks and the finals of a landscape are two protocols, which read up to a quarter apart for the same config: a short
request is answered with short samples, an interleaved one with those of the finals. What was recorded under one of them
alone stands in for the other, times the median ratio of the configs that have both at that GEMM and batch size. The true
median of a config is the finals', the protocol in which winners are decided.

"layer" pairs that were all recorded are drawn from. Where one of a request was not, every layer of it is a sum: a drawn
GEMM1, a drawn GEMM2, and what the recorded pairs took beyond theirs (activation and sum-reduce, which no config changes), the
median of that, or 0. Likewise the parts: finals if every config of a GEMM has them, else short looks for all. So an
estimate never races a measurement: it would win by the protocol, not by the config.
"""

from __future__ import annotations

import statistics
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from moelab.errors import LandscapeError
from moelab.tuner.evaluate import Contender, Outcome, Request, Result, Stage, config_key
from moelab.tuner.landscape import Landscape
from moelab.tuner.problem import GEMMS, Problem

COMPILE_PROCESSES = 15
"""Processes among which compile time is shared on the simulated clock; a host with 16 cores keeps one for itself."""


@dataclass
class _Cell:
    """One stage at one batch size. values: all samples, those of contender i at start[i] : start[i] + count[i]."""

    index: dict[Contender, int] = field(default_factory=dict)
    samples: list[list[float]] = field(default_factory=list)
    failures: list[tuple[str, str] | None] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)
    values: NDArray[np.float64] = field(default_factory=lambda: np.empty(0))
    start: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))
    count: NDArray[np.int64] = field(default_factory=lambda: np.empty(0, dtype=np.int64))

    def add(self, contender: Contender, outcome: Outcome) -> None:
        i = self.index.setdefault(contender, len(self.index))
        if i == len(self.samples):
            self.samples.append([])
            self.failures.append(None)
            self.seconds.append(0.0)
        self.samples[i] += outcome.samples_us
        self.seconds[i] += outcome.measure_s
        if outcome.failure is not None:
            self.failures[i] = (outcome.failure, outcome.message)

    def seal(self) -> None:
        self.count = np.array([len(s) for s in self.samples], dtype=np.int64)
        self.start = np.cumsum(self.count) - self.count
        self.values = np.array([value for s in self.samples for value in s])

    def median(self, contender: Contender) -> float:
        """Of every recorded sample, microseconds; NaN where there is none, or a failure."""
        i = self.index.get(contender)
        if i is None or self.failures[i] is not None or not self.samples[i]:
            return float("nan")
        return statistics.median(self.samples[i])

    def ratio(self, other: _Cell) -> float:
        """How many times as long the contenders of both cells took here, the median over them; 1 where there are none."""
        ratios = [self.median(c) / other.median(c) for c in self.index if c in other.index]
        known = [r for r in ratios if not np.isnan(r)]
        return float(np.median(known)) if known else 1.0

    def filled(self, other: _Cell, factor: float) -> _Cell:
        """This cell, and from the other one what is missing here, its samples times that factor."""
        found = _Cell()
        for cell, by in ((self, 1.0), (other, factor)):
            for contender, i in cell.index.items():
                if contender in self.index and cell is not self:
                    continue
                name, message = cell.failures[i] or (None, "")
                samples = tuple(by * s for s in cell.samples[i])
                found.add(contender, Outcome(samples, name, message, measure_s=cell.seconds[i]))
        found.seal()
        return found


class Table:
    """A landscape by stage and batch size, ready to draw from and to look true medians up in.

    cells: short looks, and whole layers. finals: of single GEMMs; where none was recorded, the short looks themselves.
    scaled: the short looks alone, read as finals. final_ones: whom the finals were recorded of.
    """

    def __init__(self, landscape: Landscape) -> None:
        self.landscape = landscape
        self.cells: dict[tuple[Stage, int], _Cell] = {}
        self.finals: dict[tuple[Stage, int], _Cell] = {}
        self.scaled: dict[tuple[Stage, int], _Cell] = {}
        self.final_ones: dict[tuple[Stage, int], frozenset[Contender]] = {}
        self.compile_s: dict[tuple[Stage, str], float] = {}
        self.uncompiled: dict[tuple[Stage, str], tuple[str, str]] = {}
        for row in landscape.rows:
            outcome = row.outcome
            for stage, config in zip(
                ("up", "down") if row.stage == "layer" else (row.stage,), row.contender, strict=True
            ):
                name = (cast(Stage, stage), config_key(config))
                self.compile_s[name] = max(self.compile_s.get(name, 0.0), outcome.compile_s / len(row.contender))
                if outcome.failure in ("compile", "resources"):
                    self.uncompiled[name] = (outcome.failure, outcome.message)
            if outcome.samples_us or outcome.failure:
                cells = self.finals if row.interleaved and row.stage != "layer" else self.cells
                cells.setdefault((row.stage, row.num_tokens), _Cell()).add(row.contender, outcome)
        for key in {*self.cells, *self.finals}:
            self._complete(key)
        self._rest: dict[int, float] = {}

    def _complete(self, key: tuple[Stage, int]) -> None:
        """Have each protocol stand in for what the other lacks."""
        short, final = self.cells.get(key, _Cell()), self.finals.get(key)
        if final is None:
            short.seal()
            self.finals[key] = self.scaled[key] = short
            return
        ratio = final.ratio(short)
        self.final_ones[key], self.scaled[key] = frozenset(final.index), _Cell().filled(short, ratio)
        self.cells[key], self.finals[key] = short.filled(final, 1 / ratio), final.filled(short, ratio)

    def on_one_footing(self, stage: Stage, num_tokens: int, contenders: Sequence[Contender]) -> _Cell | None:
        """Samples in the finals' protocol, of one origin for all of the contenders that have any; None where nobody has."""
        key = stage, num_tokens
        known, final = self.finals.get(key, _Cell()).index, self.final_ones.get(key, frozenset())
        everyone = all(contender in final for contender in contenders if contender in known)
        return (self.finals if everyone else self.scaled).get(key)

    def median_us(self, stage: Stage, num_tokens: int, contender: Contender) -> float:
        """The median by the finals' protocol, microseconds ("layer": composed where it was not recorded); NaN if there is
        none."""
        cell = self.finals.get((stage, num_tokens))
        found = cell.median(contender) if cell else float("nan")
        if stage == "layer" and np.isnan(found):
            parts = [self.median_us(gemm, num_tokens, (c,)) for gemm, c in zip(GEMMS, contender, strict=True)]
            return sum(parts) + self.rest_us(num_tokens)
        return found

    def rest_us(self, num_tokens: int) -> float:
        """What the recorded layers of that batch size took beyond their two GEMMs, median, microseconds."""
        if num_tokens not in self._rest:
            cell, beyond = self.finals.get(("layer", num_tokens)), []
            for up, down in cell.index if cell else ():
                parts = self.median_us("up", num_tokens, (up,)) + self.median_us("down", num_tokens, (down,))
                beyond.append(cast(_Cell, cell).median((up, down)) - parts)
            known = [b for b in beyond if not np.isnan(b)]
            self._rest[num_tokens] = max(0.0, float(np.median(known))) if known else 0.0
        return self._rest[num_tokens]


class ReplayEvaluator:
    """Answers requests from a landscape, in order. seed: of the redrawn noise.

    Raises LandscapeError if the problem's batch sizes are not all in the landscape.
    """

    def __init__(
        self,
        landscape: Landscape | Table,
        problem: Problem | None = None,
        *,
        seed: int = 0,
        compile_processes: int = COMPILE_PROCESSES,
    ) -> None:
        self.table = landscape if isinstance(landscape, Table) else Table(landscape)
        self.seed, self.compile_processes = seed, compile_processes
        self._compiled: set[tuple[Stage, str]] = set()
        self._compile_s = self._measure_s = 0.0
        if problem is not None:
            _require_same(problem, self.table.landscape)

    def describe(self) -> dict[str, Any]:
        """See `Evaluator`. "source" says what is replayed."""
        landscape = self.table.landscape
        return {
            "kind": "replay", "measured": False, "landscape": str(landscape.path.resolve() if landscape.path else landscape.name),
            "source": landscape.source(), "seed": self.seed, "compile_processes": self.compile_processes,
            "protocol": landscape.evaluator.get("protocol"),
        }  # fmt: skip

    def recall(self, results: Sequence[Result]) -> None:
        """See `Evaluator`: what was compiled is not charged again, and the clock goes on where it stood."""
        for result in results:
            self._charge(result)
            for contender, outcome in zip(result.request.contenders, result.outcomes, strict=True):
                if outcome.failure != "unrecorded":
                    self._compiled.update(_kernels(result.request.stage, contender))

    def run(self, requests: Sequence[Request]) -> Generator[Result, None, None]:
        """See `Evaluator`."""
        for request in requests:
            result = Result(request, self._answer(request))
            self._charge(result)
            yield result

    def clock_s(self) -> float:
        """Simulated seconds: compile time shared by `compile_processes`, then measuring time on one device."""
        return self._compile_s / self.compile_processes + self._measure_s

    def close(self) -> None:
        """Nothing to stop."""

    def _charge(self, result: Result) -> None:
        self._compile_s += sum(o.compile_s for o in result.outcomes)
        self._measure_s += sum(o.measure_s for o in result.outcomes)

    def _answer(self, request: Request) -> tuple[Outcome, ...]:
        compiled = [self._compile(request.stage, contender) for contender in request.contenders]
        if request.rounds == 0:
            return tuple(compiled)
        drawn = self._draw(request)
        return tuple(
            c if c.failure else Outcome(d.samples_us, d.failure, d.message, c.compile_s, d.measure_s)
            for c, d in zip(compiled, drawn, strict=True)
        )

    def _compile(self, stage: Stage, contender: Contender) -> Outcome:
        cost, failure = 0.0, None
        for kernel in _kernels(stage, contender):
            if kernel not in self._compiled and kernel in self.table.compile_s:
                self._compiled.add(kernel)
                cost += self.table.compile_s[kernel]
            failure = failure or self.table.uncompiled.get(kernel)
        name, message = failure or (None, "")
        return Outcome((), name, message, compile_s=cost)

    def _draw(self, request: Request) -> list[Outcome]:
        draws = np.random.default_rng([self.seed, int(request.key(), 16)])
        stop = None if request.interleaved else request.stop_above_us
        if request.stage != "layer":
            cells = self.table.finals if request.interleaved else self.table.cells
            cell = cells.get((request.stage, request.num_tokens))
            return self._draw_cell(cell, request, request.contenders, draws, stop)
        layers = self.table.cells.get(("layer", request.num_tokens))
        timed = self._draw_cell(layers, request, request.contenders, draws, stop)
        if all(outcome.failure != "unrecorded" for outcome in timed):
            return timed
        sums = self._sums(request, draws)
        pairs = list(zip(timed, sums, strict=True))
        none_gained = all(of.failure for was, of in pairs if was.failure == "unrecorded")
        if none_gained or any(of.failure for was, of in pairs if was.failure is None):
            return timed  # what was measured, before a sum that lacks one of its parts
        return [was if was.failure not in (None, "unrecorded") else of for was, of in pairs]

    def _sums(self, request: Request, draws: np.random.Generator) -> list[Outcome]:
        """Every layer as the sum of its parts."""
        parts = []
        for side, gemm in enumerate(GEMMS):
            configs: list[Contender] = [(contender[side],) for contender in request.contenders]
            cell = self.table.on_one_footing(gemm, request.num_tokens, configs)
            parts.append(self._draw_cell(cell, request, configs, draws, None))
        rest = self.table.rest_us(request.num_tokens)
        return [_sum(up, down, rest) for up, down in zip(*parts, strict=True)]

    def _draw_cell(
        self,
        cell: _Cell | None,
        request: Request,
        contenders: Sequence[Contender],
        draws: np.random.Generator,
        stop_above_us: float | None,
    ) -> list[Outcome]:
        uniform = draws.random(
            (len(contenders), request.rounds)
        )  # drawn whole: the rest must not hang on what is known
        if cell is None:
            return [_UNRECORDED] * len(contenders)
        at = np.array([cell.index.get(contender, -1) for contender in contenders], dtype=np.int64)
        known = (at >= 0) & (cell.count[at] > 0) if len(cell.count) else np.zeros(len(at), dtype=bool)
        counts, starts = np.where(known, cell.count[at], 1), np.where(known, cell.start[at], 0)
        picks = starts[:, None] + (uniform * counts[:, None]).astype(np.int64)
        samples = cell.values[picks] if len(cell.values) else np.zeros(picks.shape)
        taken = np.full(len(at), request.rounds, dtype=np.int64)
        if stop_above_us is not None:
            taken[samples[:, 0] > stop_above_us] = 1
        outcomes = []
        for i, values, n, is_known in zip(*(x.tolist() for x in (at, samples, taken, known)), strict=True):
            failure = cell.failures[i] if i >= 0 else None
            if failure is not None:
                outcomes.append(Outcome((), failure[0], failure[1], measure_s=cell.seconds[i]))
            elif not is_known:
                outcomes.append(_UNRECORDED)
            else:
                cost = cell.seconds[i] / int(cell.count[i]) * n
                outcomes.append(Outcome(tuple(values[:n]), measure_s=cost))
        return outcomes


_UNRECORDED = Outcome((), "unrecorded", "the landscape has no measurement of this config here")


def _kernels(stage: Stage, contender: Contender) -> Iterator[tuple[Stage, str]]:
    gemms: tuple[Stage, ...] = ("up", "down") if stage == "layer" else (stage,)
    for gemm, config in zip(gemms, contender, strict=True):
        yield gemm, config_key(config)


def _sum(up: Outcome, down: Outcome, rest_us: float) -> Outcome:
    for part in (up, down):
        if part.failure:
            return part
    samples = tuple(a + b + rest_us for a, b in zip(up.samples_us, down.samples_us, strict=True))
    return Outcome(samples, measure_s=up.measure_s + down.measure_s)


def _require_same(problem: Problem, landscape: Landscape) -> None:
    recorded = landscape.problem
    differ: dict[str, tuple[Any, Any]] = {
        name: (getattr(problem, name), getattr(recorded, name))
        for name in ("device", "target", "kernel", "routing")
        if getattr(problem, name) != getattr(recorded, name)
    }
    if _sizes(problem) != _sizes(recorded):
        differ = {"sizes": (_sizes(problem), _sizes(recorded)), **differ}
    for name, (asked, had) in differ.items():
        raise LandscapeError(
            f"The landscape {landscape.name} has the {name} {had}, not {asked}. Expected a recording of the same layer on "
            "the same device. Choose another landscape, or tune on a GPU."
        )
    absent = [b for b in problem.batch_sizes if b not in recorded.batch_sizes]
    if absent:
        raise LandscapeError(
            f"The landscape {landscape.name} has no batch size {absent[0]}. Expected some of "
            f"{', '.join(map(str, recorded.batch_sizes))}. Pass those as --batch-size, or tune on a GPU."
        )


def _sizes(problem: Problem) -> dict[str, Any]:
    """What a kernel sees of a shape: names and sources of sizes left out."""
    names = ("num_experts", "top_k", "hidden_size", "moe_intermediate_size", "dtype", "gated")
    return {name: getattr(problem.shape, name) for name in names} | {"format": problem.shape.format.name}
