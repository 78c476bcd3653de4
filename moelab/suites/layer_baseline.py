"""Every implementation of the layer beside the others, each with its own best tiles: what each idea is worth, where.

Alignment included: each is called as a server would, through fused_moe. GEMM1 and GEMM2 have tiles of their own under
one BLOCK_SIZE_M, chosen for each implementation, shape and batch size by a short screening pass over few tiles. That is
no tuning (moelab.tuner does that), but the same effort for all.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from moelab import config as config_room
from moelab import roofline, runtime
from moelab.config import KernelConfig
from moelab.errors import ConfigError
from moelab.implementations import IMPLEMENTATIONS
from moelab.kernels.checks import current_target
from moelab.measure import EagerProtocol, Measurement, measure, measure_eager
from moelab.recordings import Recording
from moelab.routing import expected_experts_touched
from moelab.suites.bench import cost_of, judge
from moelab.suites.layer_classic import SHAPES, Layer, protocol_for, shape_of, weight_sets
from moelab.suites.partial import OnRows, ignore
from moelab.suites.screening import quick, usable

BATCHES = (1, 4, 16, 64, 256, 1024, 4096, 8192)
IMPLS = tuple(name for name, one in IMPLEMENTATIONS.items() if not one.no_graph and one.chips is None)
"""All that a CUDA graph takes on any chip."""

_TILES = (
    # rows an expert at most, then BLOCK_SIZE_M -> (BLOCK_SIZE_N, BLOCK_SIZE_K, warps, stages)
    (12, {16: ((32, 128, 4, 4), (64, 128, 4, 4), (128, 128, 4, 4), (32, 256, 4, 3), (64, 256, 4, 3), (128, 64, 4, 5))}),
    (
        160,
        {
            16: ((64, 128, 4, 4), (128, 128, 4, 4)),
            32: ((64, 128, 4, 4), (128, 128, 4, 3), (128, 64, 4, 4)),
            64: ((64, 128, 4, 3), (128, 64, 4, 4), (128, 128, 4, 3), (256, 64, 8, 4)),
        },
    ),
    (
        float("inf"),
        {
            64: ((128, 64, 4, 4), (256, 64, 8, 4)),
            128: ((128, 64, 8, 3), (128, 64, 4, 4), (256, 64, 8, 3), (256, 64, 8, 4), (128, 128, 8, 3)),
        },
    ),
)
_SPLITS = (1, 2, 4, 8)
_SPLIT_ROWS = 24  # rows an expert up to which splitting K is tried: the recording split_k has the rest of that map


@dataclass(frozen=True)
class Chosen:
    """Tiles of GEMM1 and GEMM2, and how many pairs of them were tried or could not run."""

    up: KernelConfig
    down: KernelConfig
    tried: int
    failed: tuple[str, ...]


def candidates(rows_per_expert: float, *, splits: bool) -> dict[int, list[KernelConfig]]:
    """BLOCK_SIZE_M -> tiles to choose from; with SPLIT_K where the implementation takes it and rows are few."""
    tiles = next(tiles for most, tiles in _TILES if rows_per_expert <= most)
    tried = _SPLITS if splits and rows_per_expert <= _SPLIT_ROWS else (1,)
    group = 1 if rows_per_expert <= _SPLIT_ROWS else 16
    return {
        rows: [KernelConfig(rows, n, k, group, warps, stages, SPLIT_K=split) for n, k, warps, stages in of for split in tried]
        for rows, of in tiles.items()
    }  # fmt: skip


def choose(layer: Layer, impl: str, rotations: int) -> Chosen:
    """The fastest tiles of a short pass: GEMM1's first, with a middling tile for GEMM2, then GEMM2's under them.

    Raises RuntimeModeError without a GPU, ConfigError where no candidate runs.
    """
    shape = layer.shape
    rows = layer.num_tokens * shape.top_k / expected_experts_touched(shape.num_experts, shape.top_k, layer.num_tokens)
    best: tuple[float, KernelConfig, KernelConfig] | None = None
    tried, failed = 0, []
    for tiles in candidates(rows, splits=IMPLEMENTATIONS[impl].splits).values():
        ups, downs = (_valid(tiles, K, shape.dtype) for K in (shape.hidden_size, shape.moe_intermediate_size))
        if not ups or not downs:
            continue
        time = _timer(layer, impl, rotations)
        first, lost = time([(up, downs[0]) for up in ups])
        failed += lost
        if not first:
            continue
        up = min(first, key=lambda pair: first[pair].median_us)[0]
        second, lost = time([(up, down) for down in downs])
        failed, tried = failed + lost, tried + len(first) + len(second)
        for pair, found in second.items():
            if best is None or found.median_us < best[0]:
                best = (found.median_us, *pair)
    if best is None:
        raise ConfigError(
            f"{impl} runs under none of {len(failed)} pairs of tiles ({'; '.join(failed[:1])}). Expected one that does. "
            "Leave it out, or give it tiles in moelab/suites/layer_baseline.py."
        )
    return Chosen(best[1], best[2], tried, tuple(sorted(set(failed))))


def _valid(tiles: Sequence[KernelConfig], K: int, dtype: str) -> list[KernelConfig]:
    return [tile for tile in tiles if not config_room.violations(tile, dtype=dtype, target=current_target(), K=K)]


Pair = tuple[KernelConfig, KernelConfig]


def _timer(
    layer: Layer, impl: str, rotations: int
) -> Callable[[Sequence[Pair]], tuple[dict[Pair, Measurement], list[str]]]:
    def time(pairs: Sequence[Pair]) -> tuple[dict[Pair, Measurement], list[str]]:
        contenders = {pair: layer.whole(pair[0], down_config=pair[1], impl=impl) for pair in pairs}
        ran, lost = usable(contenders)
        return (quick(ran, rotations) if ran else {}), [
            f"{up.short()} / {down.short()}: {why}" for (up, down), why in lost.items()
        ]

    return time


def cell(name: str, layer: Layer, impls: Sequence[str]) -> list[dict[str, Any]]:
    """A row for every implementation at one shape and batch size: checked, then timed interleaved, both ways."""
    protocol = protocol_for(layer.num_tokens)
    chosen: dict[str, Chosen] = {}
    refused: dict[str, str] = {}
    for impl in (impl for impl in impls if IMPLEMENTATIONS[impl].triton):
        try:
            chosen[impl] = choose(layer, impl, protocol.rotations)
        except ConfigError as error:
            refused[impl] = str(error)
    contenders = {impl: _contender(layer, impl, chosen) for impl in impls if impl not in refused}
    judged = {**judge(layer, contenders), **{impl: {"refused": why} for impl, why in refused.items()}}
    run = {impl: contenders[impl] for impl in contenders if "refused" not in judged[impl]}
    graphs = measure(run, protocol)
    eager = measure_eager(run, EagerProtocol(rotations=protocol.rotations, rounds=9))
    cost, counts = cost_of(layer), torch.cat([r.tokens_per_expert() for r in layer.routings]).tolist()
    common = {
        "shape": name, "num_tokens": layer.num_tokens, "experts_touched": layer.experts_touched(), "bytes": cost.bytes,
        "flops": cost.flops, "rotations": protocol.rotations,
    }  # fmt: skip
    rows = []
    for impl in impls:
        row = {**common, "impl": impl, **judged[impl], **_tiles_of(chosen.get(impl), counts)}
        if impl in run:
            row["samples_us"] = [round(sample, 4) for sample in graphs[impl].samples_us]
            row["eager_samples_us"] = [round(sample, 3) for sample in eager[impl].samples_us]
        rows.append(row)
    return rows


def _contender(layer: Layer, impl: str, chosen: Mapping[str, Chosen]) -> Callable[[int], torch.Tensor]:
    tiles = chosen.get(impl)
    if tiles is None:
        return layer.whole(None, impl=impl)
    return layer.whole(tiles.up, down_config=tiles.down, impl=impl)


def _tiles_of(chosen: Chosen | None, counts: Sequence[int]) -> dict[str, Any]:
    if chosen is None:
        return {}
    padding = roofline.realised_padding(counts, chosen.up.BLOCK_SIZE_M)
    return {
        "config": chosen.up.to_json(), "down_config": chosen.down.to_json(), "tried": chosen.tried,
        "failed": list(chosen.failed), "padded_rows_ratio": padding.padded_rows / padding.useful_rows,
    }  # fmt: skip


def record(
    names: Sequence[str] = tuple(SHAPES),
    batches: Sequence[int] = BATCHES,
    impls: Sequence[str] = IMPLS,
    on_rows: OnRows = ignore,
) -> Recording:
    """Every implementation on the peers' four shapes, from one token to 8192. Some minutes on an H200.

    Raises RuntimeModeError without a GPU.
    """
    runtime.require_cuda("the suite 'layer_baseline'")
    rows: list[dict[str, Any]] = []
    for name in names:
        shape = shape_of(name)
        weights = weight_sets(shape)
        for num_tokens in batches:
            layer = Layer(shape, num_tokens, protocol_for(num_tokens).rotations, weights)
            rows += cell(name, layer, impls)
            on_rows(rows)
        del weights, layer
        torch.cuda.empty_cache()
    protocol = {
        **protocol_for(1).describe(), "rotations": "in each row", "alignment": "included",
        "tiles": "per implementation, from a screening pass of 3 replays each",
        "eager": EagerProtocol(rounds=9).describe(),
    }  # fmt: skip
    return Recording("layer_baseline", runtime.provenance(seed=0), protocol, tuple(rows))
