"""Survey: a recorded landscape as arrays, and the questions one asks of it.

Every time here is of one protocol, the short one that every config went through (back to back, rotated inputs). The
finals of a run are timed interleaved in a CUDA graph, which reads up to a quarter apart for the same config: pooled with the
rest, they would move the finalists against everything they are compared with.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moelab import roofline
from moelab.chips import get_target
from moelab.config import KernelConfig, shared_memory_bytes
from moelab.tuner.landscape import Landscape
from moelab.tuner.problem import GEMMS, Gemm
from moelab.tuner.regret import Truth
from moelab.tuner.replay import Table

PARAMETERS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages")
"""Fields of KernelConfig that the peers' grid varies on NVIDIA."""

WELL_COVERED = 0.95
"""Share of the different programs at a batch size that must have a time before the batch size stands for the grid."""

WARPS_PER_PROCESSOR = 64
"""Warps resident on one SM (CUDA C++ Programming Guide, compute capability 8.0, 9.0 and 10.0)."""

Floats = NDArray[np.float64]


def one_protocol(landscape: Landscape) -> Landscape:
    """The landscape without the finals of single GEMMs; whole layers, which were timed in no other way, stay."""
    rows = tuple(row for row in landscape.rows if row.stage == "layer" or not row.interleaved)
    return replace(landscape, rows=rows)


@dataclass(frozen=True)
class Detail:
    """One config of one GEMM at one batch size. low_us, high_us: 95 % interval of the median. waves: programs over what
    the chip holds at once, by shared memory (a processor's taken as one block's limit) and warps, NaN for an unknown chip;
    registers are not recorded. padding: rows computed per row that exists. roof: floor over time, NaN without ceilings.
    waves, padding and roof are expectations under uniform routing, so that they are NaN for a landscape of any other."""

    config: KernelConfig
    median_us: float
    low_us: float
    high_us: float
    samples: int
    shared_bytes: int
    waves: float
    padding: float
    roof: float


class Survey:
    """A landscape by GEMM: configs, and times[gemm] (batch sizes, configs) in microseconds, infinite where none was
    measured; configs that run the same program at a batch size share its time.

    Raises LandscapeError where the landscape holds nothing but finals.
    """

    def __init__(self, landscape: Landscape) -> None:
        self.landscape = landscape
        self.problem = landscape.problem
        self.table = Table(one_protocol(landscape))
        board = Truth(self.table, self.problem).board
        self.batch_sizes = self.problem.batch_sizes
        self.configs: Mapping[Gemm, tuple[KernelConfig, ...]] = board.configs
        self.representative = board.representative
        self.times: Mapping[Gemm, Floats] = {g: np.array([board.times(g, b) for b in self.batch_sizes]) for g in GEMMS}
        self.values: Mapping[Gemm, NDArray[np.int64]] = {
            g: np.array([[getattr(c, name) for name in PARAMETERS] for c in board.configs[g]]) for g in GEMMS
        }

    def row(self, num_tokens: int) -> int:
        """The index of a batch size in `times`."""
        return self.batch_sizes.index(num_tokens)

    @functools.cached_property
    def best_share(self) -> dict[Gemm, Floats]:
        """(batch sizes, configs): best time over time, 1 for the best, NaN where nothing was measured."""
        found = {}
        for gemm, times in self.times.items():
            share = times.min(axis=1, keepdims=True) / times
            found[gemm] = np.where(np.isfinite(times), share, np.nan)
        return found

    @functools.cached_property
    def coverage(self) -> dict[Gemm, Floats]:
        """(batch sizes,): share of the different programs there that have a time."""
        found = {}
        for gemm in GEMMS:
            own = self.representative[gemm] == np.arange(self.times[gemm].shape[1])
            found[gemm] = (own & np.isfinite(self.times[gemm])).sum(axis=1) / own.sum(axis=1)
        return found

    @functools.cached_property
    def well_covered(self) -> tuple[int, ...]:
        """Batch sizes where WELL_COVERED of the programs of both GEMMs have a time."""
        share = np.minimum(self.coverage["up"], self.coverage["down"])
        return tuple(b for b, s in zip(self.batch_sizes, share, strict=True) if s >= WELL_COVERED)

    def chosen(self, gemm: Gemm, allowed: Mapping[str, Sequence[int]]) -> NDArray[np.bool_]:
        """(configs,): whether each parameter that is named has one of the values allowed it; {} allows all."""
        keep = np.ones(len(self.configs[gemm]), dtype=bool)
        for name, values in allowed.items():
            keep &= np.isin(self.values[gemm][:, PARAMETERS.index(name)], list(values))
        return keep

    def axis(self, name: str) -> list[int]:
        """The values of a parameter in the landscape, ascending."""
        column = PARAMETERS.index(name)
        return sorted({int(v) for gemm in GEMMS for v in self.values[gemm][:, column]})

    def details(self, gemm: Gemm, num_tokens: int, indices: Sequence[int]) -> list[Detail]:
        """What is known of those configs at that batch size; each must have a time."""
        return [self._detail(gemm, num_tokens, int(i)) for i in indices]

    @functools.cache  # noqa: B019  (a notebook keeps one survey a landscape)
    def _detail(self, gemm: Gemm, num_tokens: int, index: int) -> Detail:
        from moelab.measure import median_interval

        config, row = self.configs[gemm][index], self.row(num_tokens)
        uniform = self.problem.routing == "uniform"
        padding = self._padding(num_tokens, config.BLOCK_SIZE_M).waste if uniform else math.nan
        cell = self.table.cells[gemm, num_tokens]
        same = self.configs[gemm][self.representative[gemm][row][index]]
        samples = cell.samples[cell.index[(same,)]]
        low, high = median_interval(samples)
        format = self.problem.shape.format
        multiplied = format.product_dtype(self.problem.shape.dtype)
        shared = shared_memory_bytes(config, multiplied, self.problem.target, weight_bits=format.widened_bits)
        time = float(self.times[gemm][row, index])
        return Detail(
            config, time, low, high, len(samples), shared,
            self._waves(gemm, num_tokens, config, shared) if uniform else math.nan,
            padding, self.floor_us(gemm, num_tokens) / time,
        )  # fmt: skip

    @functools.cache  # noqa: B019
    def _padding(self, num_tokens: int, block_size_m: int) -> roofline.Padding:
        return roofline.padding_waste(self.problem.shape, num_tokens, block_size_m)

    @functools.cache  # noqa: B019
    def floor_us(self, gemm: Gemm, num_tokens: int) -> float:
        """The GEMM's floor at the device's measured ceilings, microseconds; NaN for a device without ceilings, and for a
        routing that is not uniform, which touches fewer experts than `gemm_cost` expects."""
        known = self.problem.device.replace(" ", "_") in roofline.device_names()
        if not known or self.problem.routing != "uniform":
            return math.nan
        cost = roofline.gemm_cost(self.problem.shape, num_tokens, 1 if gemm == "up" else 2)
        multiplied = self.problem.shape.format.product_dtype(self.problem.shape.dtype)
        at = roofline.load_ceilings(self.problem.device, "floors", multiplied)
        return roofline.floor_us(cost, at).us

    @functools.cached_property
    def _processors(self) -> float:
        known = self.problem.device.replace(" ", "_") in roofline.device_names()
        device: Mapping[str, Any] = roofline.device_data(self.problem.device) if known else {}
        return float(device.get("SMs", math.nan))

    def _waves(self, gemm: Gemm, num_tokens: int, config: KernelConfig, shared: int) -> float:
        """Tiles of the expected padded rows, over what all SMs hold at once."""
        rows = self._padding(num_tokens, config.BLOCK_SIZE_M).padded_rows
        tiles = rows / config.BLOCK_SIZE_M * math.ceil(self.problem.columns(gemm) / config.BLOCK_SIZE_N)
        fits = get_target(self.problem.target).shared_memory_per_block // max(1, shared)
        return tiles / (self._processors * max(1, min(fits, WARPS_PER_PROCESSOR // config.num_warps)))


@dataclass(frozen=True)
class Cover:
    """The fewest configs of which every batch size has one within `within` of its best. chosen: config -> the batch sizes
    it is taken for. Batch sizes where a config was not measured count as not covered by it."""

    within: float
    chosen: Mapping[KernelConfig, tuple[int, ...]]


def cover(survey: Survey, gemm: Gemm, within: float) -> Cover:
    """The smallest set cover, exact: branch on the batch size with the fewest configs, deepen by one."""
    share = survey.best_share[gemm]
    good = np.nan_to_num(share, nan=0.0) >= 1 / (1 + within) - 1e-12
    masks: dict[int, int] = {}
    for index in np.argsort(-np.nansum(share, axis=0), kind="stable"):
        mask = sum(1 << int(b) for b in np.flatnonzero(good[:, index]))
        masks.setdefault(mask, int(index))
    useful = [m for m in masks if m and not any(m != o and m & o == m for o in masks)]
    everything = (1 << len(good)) - 1
    taken: tuple[int, ...] | None = None
    for size in range(1, len(good) + 1):
        taken = _cover(useful, everything, size)
        if taken is not None:
            break
    configs = survey.configs[gemm]
    indices = [masks[m] for m in taken or ()]
    owner = [max(indices, key=lambda i: np.nan_to_num(share[b, i])) for b in range(len(good))]
    chosen = {configs[i]: tuple(b for b, o in zip(survey.batch_sizes, owner, strict=True) if o == i) for i in indices}
    return Cover(within, chosen)


def _cover(masks: Sequence[int], missing: int, size: int) -> tuple[int, ...] | None:
    if not missing:
        return ()
    if size == 0:
        return None
    bits = [1 << b for b in range(missing.bit_length()) if missing >> b & 1]
    options = min(([m for m in masks if m & bit] for bit in bits), key=len)
    for mask in sorted(options, key=lambda m: -(m & missing).bit_count()):
        rest = _cover(masks, missing & ~mask, size - 1)
        if rest is not None:
            return (mask, *rest)
    return None


def plateau(survey: Survey, gemm: Gemm, within: float) -> dict[int, int]:
    """Batch size -> how many different programs are within that share of the best there."""
    good = np.nan_to_num(survey.best_share[gemm], nan=0.0) >= 1 / (1 + within) - 1e-12
    own = survey.representative[gemm] == np.arange(good.shape[1])
    return {b: int(n) for b, n in zip(survey.batch_sizes, (good & own).sum(axis=1), strict=True)}


def importance(survey: Survey, gemm: Gemm, num_tokens: int, within: float = math.inf) -> dict[str, float]:
    """Share of the variance of log time that each parameter explains alone: between its values' means, over all (the
    correlation ratio, eta squared; R. A. Fisher, Statistical Methods for Research Workers).

    Every measured config at most `within` slower than the best counts once. The pruned grid is not balanced, so
    parameters share some of what they explain, and what only a combination explains is no one's: the shares need not
    add up to 1.
    """
    times = survey.times[gemm][survey.row(num_tokens)]
    known = np.isfinite(times) & (times <= times.min() * (1 + within))
    logs, values = np.log(times[known]), survey.values[gemm][known]
    total = float(((logs - logs.mean()) ** 2).sum())
    found = {}
    for column, name in enumerate(PARAMETERS):
        groups = [logs[values[:, column] == v] for v in np.unique(values[:, column])]
        between = sum(len(g) * (g.mean() - logs.mean()) ** 2 for g in groups)
        found[name] = float(between / total) if total else 0.0
    return found


def short_names() -> dict[str, str]:
    """Parameter -> its label on an axis: "BLOCK_SIZE_M" -> "BLOCK M"."""
    names = [f.name for f in dataclasses.fields(KernelConfig) if f.name in PARAMETERS]
    return {n: n.replace("BLOCK_SIZE_", "BLOCK ").replace("_SIZE_M", " M").replace("num_", "") for n in names}
