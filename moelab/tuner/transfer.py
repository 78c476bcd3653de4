"""Transfer: what a config that was chosen for something else loses, from one recorded landscape.

A landscape holds two kinds of times: short looks at everything (1 to 13 samples, calls back to back) and the finals (20
samples in a CUDA graph, interleaved). The two disagree by a factor that depends on GEMM and batch size, and on the clock of
the moment. So a config that was not in the finals gets its short median times the median of that factor over the configs
that have both; `spread` says by how much those differ. Nothing that was not measured gets a time.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import product
from typing import Any, Literal

from moelab.config import KernelConfig
from moelab.config_files.search import nearest_key
from moelab.errors import LandscapeError
from moelab.tuner.landscape import Landscape
from moelab.tuner.problem import GEMMS, Gemm, Pair, default_of
from moelab.tuner.space import build_space, effective_group, row_blocks

Part = Literal["up", "down", "both"]
PARTS: tuple[Part, ...] = ("both", "up", "down")
"""GEMM1, GEMM2, or their sum under one BLOCK_SIZE_M: what of the layer depends on configs."""

Cells = dict[int, "Loss | None"]
"""Batch size run at -> what is lost there, None where no time was recorded."""


@dataclass(frozen=True)
class Loss:
    """percent: over the best of the finals there. final: timed in those finals too, side by side with the best; otherwise
    from a short look, and good to the `spread` of the two protocols only."""

    percent: float
    final: bool


@dataclass(frozen=True)
class _Time:
    us: float
    final: bool


class Transfer:
    """A landscape's times on the scale of its finals, looked up by the program that a config runs."""

    def __init__(self, landscape: Landscape) -> None:
        self.landscape, self.problem = landscape, landscape.problem
        self.batches = self.problem.batch_sizes
        self._programs: dict[tuple[Gemm, int, KernelConfig], KernelConfig] = {}
        short: dict[tuple[Gemm, int], dict[KernelConfig, list[float]]] = {
            key: {} for key in product(GEMMS, self.batches)
        }
        final: dict[tuple[Gemm, int], dict[KernelConfig, list[float]]] = {
            key: {} for key in product(GEMMS, self.batches)
        }
        self._named: dict[tuple[Gemm, int], dict[KernelConfig, KernelConfig]] = {key: {} for key in final}
        for row in landscape.rows:
            if row.stage == "layer" or not row.outcome.samples_us:
                continue
            config, key = row.contender[0], (row.stage, row.num_tokens)
            program = self._program(*key, config)
            (final if row.interleaved else short)[key].setdefault(program, []).extend(row.outcome.samples_us)
            self._named[key].setdefault(program, config)
        self._short, self._final = _medians(short), _medians(final)
        absent = [f"{gemm}, batch {b}" for (gemm, b), times in self._final.items() if not times]
        if absent:
            raise LandscapeError(
                f"The landscape {landscape.name} has no finals for {absent[0]}. Expected some for both GEMMs at every batch "
                "size. Take the run up with --resume, and freeze it again."
            )
        factors = {key: self._factors(key) for key in self._final}
        self._factor = {key: statistics.median(found) if found else None for key, found in factors.items()}
        self.spread = {key: max(found) / min(found) - 1 if found else 0.0 for key, found in factors.items()}
        """(GEMM, batch) -> by how much finals over short look differs among the configs that have both, as a share."""

    def _program(self, gemm: Gemm, num_tokens: int, config: KernelConfig) -> KernelConfig:
        """The config with the GROUP_SIZE_M that decides its tile order: equal for configs that run the same program."""
        key = (gemm, num_tokens, config)
        if key not in self._programs:
            columns = -(-self.problem.columns(gemm) // config.BLOCK_SIZE_N)
            rows = row_blocks(self.problem, num_tokens, config.BLOCK_SIZE_M)
            self._programs[key] = replace(config, GROUP_SIZE_M=effective_group(config, rows, columns))
        return self._programs[key]

    def _factors(self, key: tuple[Gemm, int]) -> list[float]:
        short = self._short[key]
        return [us / short[program] for program, us in self._final[key].items() if program in short]

    def _time(self, gemm: Gemm, num_tokens: int, config: KernelConfig) -> _Time | None:
        key, program = (gemm, num_tokens), self._program(gemm, num_tokens, config)
        if program in self._final[key]:
            return _Time(self._final[key][program], True)
        factor = self._factor[key]
        if factor is None or program not in self._short[key]:
            return None
        return _Time(self._short[key][program] * factor, False)

    def time_of(self, part: Part, num_tokens: int, pair: Pair) -> _Time | None:
        """Microseconds of that part under (GEMM1's config, GEMM2's), None where one of them was not measured."""
        found = [self._time(gemm, num_tokens, pair[GEMMS.index(gemm)]) for gemm in _gemms(part)]
        times = [time for time in found if time is not None]
        if len(times) < len(found):
            return None
        return _Time(sum(time.us for time in times), all(time.final for time in times))

    @cached_property
    def winners(self) -> Mapping[Part, Mapping[int, Pair]]:
        """The best pair of every batch size: for one GEMM its fastest in the finals (twice), for both the fastest sum under
        one BLOCK_SIZE_M."""
        alone = {
            gemm: {b: min(self._final[gemm, b], key=self._final[gemm, b].__getitem__) for b in self.batches}
            for gemm in GEMMS
        }
        named = {gemm: {b: self._named[gemm, b][c] for b, c in found.items()} for gemm, found in alone.items()}
        return {
            "both": {b: self._best_pair(b) for b in self.batches},
            **{gemm: {b: (c, c) for b, c in found.items()} for gemm, found in named.items()},
        }

    def _best_pair(self, num_tokens: int) -> Pair:
        ups, downs = (self._final[gemm, num_tokens] for gemm in GEMMS)
        pairs = [(u, d) for u, d in product(ups, downs) if u.BLOCK_SIZE_M == d.BLOCK_SIZE_M]
        up, down = min(pairs, key=lambda pair: ups[pair[0]] + downs[pair[1]])
        return self._named["up", num_tokens][up], self._named["down", num_tokens][down]

    def loss(self, part: Part, num_tokens: int, pair: Pair) -> Loss | None:
        """What the pair loses to that batch size's winner; None where it was not measured. Under 0 where a short look, or the
        spread between the two protocols, flatters it."""
        mine, best = (self.time_of(part, num_tokens, each) for each in (pair, self.winners[part][num_tokens]))
        if mine is None or best is None:
            return None
        return Loss(100 * (mine.us / best.us - 1), mine.final)

    def cells(self, part: Part, pairs: Callable[[int], Pair | None]) -> Cells:
        """The losses of pairs(batch) at every batch size; None of pairs is None of losses."""
        asked = {b: pairs(b) for b in self.batches}
        return {b: self.loss(part, b, pair) if pair else None for b, pair in asked.items()}

    def by_batch(self, part: Part) -> dict[int, Cells]:
        """Batch tuned for -> batch run at -> loss: what a file with that one key costs."""
        return {b: self.cells(part, lambda _, pair=pair: pair) for b, pair in self.winners[part].items()}  # type: ignore[misc]

    def choices(self, part: Part, other: Transfer | None = None) -> dict[str, Cells]:
        """Ways to choose a config -> batch -> loss. other: another run of the same problem, whose winners are tried here."""
        best, one = self.winners[part], self.one_for_all(part)
        default = {b: default_of(self.problem.shape, self.problem.device, b) for b in self.batches}
        found = {"the nearest other key": self.cells(part, lambda b: best[self._nearest_other(b)])}
        if one:
            found["one config for all batches"] = self.cells(part, lambda b: one)
        if part != "up":
            ups = self.winners["both"]
            found["GEMM1’s config for GEMM2 too"] = self.cells(part, lambda b: (ups[b][0], ups[b][0]))
        if part == "both":
            found["the best one for both GEMMs"] = self.cells(part, self.shared.get)
        found["sglang’s default"] = self.cells(part, lambda b: (default[b], default[b]))
        if before := self.problem.incumbents.get("current"):
            found["the file before this run"] = self.cells(part, before.get)
        if other is not None:
            found["another run’s winner"] = self.cells(part, other.winners[part].get)
        return found

    def _nearest_other(self, num_tokens: int) -> int:
        return nearest_key([b for b in self.batches if b != num_tokens], num_tokens)

    @cached_property
    def candidates(self) -> Mapping[Gemm, tuple[KernelConfig, ...]]:
        """The configs of the search space, without those that failed in this run."""
        rows = self.landscape.rows
        failed = {(row.stage, c) for row in rows if row.outcome.failure for c in row.contender}
        space = build_space(self.problem)
        return {gemm: tuple(c for c in space.configs[gemm] if (gemm, c) not in failed) for gemm in GEMMS}

    @cached_property
    def whole(self) -> tuple[int, ...]:
        """Batch sizes at which every candidate was measured, or an equal program, for both GEMMs."""
        return tuple(
            b for b in self.batches if all(self._time(gemm, b, c) for gemm in GEMMS for c in self.candidates[gemm])
        )

    def one_for_all(self, part: Part) -> Pair | None:
        """The one pair that loses least (geometric mean) over the batch sizes in `whole`, if there are two of those; for both
        GEMMs the best of each under one BLOCK_SIZE_M."""
        if len(self.whole) < 2:
            return None
        scores = {gemm: self._mean_over_batches[gemm] for gemm in _gemms(part)}
        if part != "both":
            best = min(scores[part], key=scores[part].__getitem__)
            return best, best
        best_of = {gemm: _best_by_block_m(scores[gemm]) for gemm in GEMMS}
        shared = best_of["up"].keys() & best_of["down"].keys()
        block = min(shared, key=lambda m: sum(scores[gemm][best_of[gemm][m]] for gemm in GEMMS))
        return best_of["up"][block], best_of["down"][block]

    @cached_property
    def _mean_over_batches(self) -> dict[Gemm, dict[KernelConfig, float]]:
        """Each config's mean microseconds over the best of its batch size, geometric, over the batch sizes in `whole`."""
        return {
            gemm: {
                c: statistics.geometric_mean([1 + self.loss(gemm, b, (c, c)).percent / 100 for b in self.whole])  # type: ignore[union-attr]
                for c in self.candidates[gemm]
            }
            for gemm in GEMMS
        }

    @cached_property
    def shared(self) -> Mapping[int, Pair]:
        """The fastest config that both GEMMs were timed under: the best that a file without a _down file beside it can hold.

        Among those in the finals of either GEMM, for the least of many short looks would be luck.
        """
        found: dict[int, Pair] = {}
        for b in self.batches:
            known = {self._named[gemm, b][c] for gemm in GEMMS for c in self._final[gemm, b]}
            times = {c: time.us for c in known if (time := self.time_of("both", b, (c, c)))}
            if times:
                best = min(times, key=lambda c: (times[c], c.short()))
                found[b] = (best, best)
        return found

    def of_file(
        self, part: Part, up: Mapping[int, KernelConfig], down: Mapping[int, KernelConfig] | None = None
    ) -> Cells:
        """Losses of a config file, and of the _down file beside it if given, each batch size under its nearest key; the down
        config runs under the up config's BLOCK_SIZE_M, as sglang's loader has it."""

        def pair(num_tokens: int) -> Pair:
            first = up[nearest_key(up, num_tokens)]
            second = down[nearest_key(down, num_tokens)] if down else first
            return first, replace(second, BLOCK_SIZE_M=first.BLOCK_SIZE_M)

        return self.cells(part, pair)


def _gemms(part: Part) -> Sequence[Gemm]:
    return GEMMS if part == "both" else (part,)


def _best_by_block_m(scores: Mapping[KernelConfig, float]) -> dict[int, KernelConfig]:
    """BLOCK_SIZE_M -> the config of the lowest score that has it."""
    worst_first = sorted(scores, key=lambda c: (-scores[c], c.short()))
    return {config.BLOCK_SIZE_M: config for config in worst_first}


def _medians(samples: Mapping[Any, Mapping[KernelConfig, Sequence[float]]]) -> dict[Any, dict[KernelConfig, float]]:
    return {key: {c: statistics.median(values) for c, values in found.items()} for key, found in samples.items()}
