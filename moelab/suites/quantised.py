"""Layers of quantised experts beside each other and plain ones: time over the floor by format and batch, and the error.

Each is called as a server would, through `fused_moe`: alignment, codes of the activations and the sum over slots are inside the
time. The classic layer runs under sglang's default rule and under the fastest of a few tiles (a short screening pass, no tuning),
`gated` under the latter where it takes the format, and OTHERS as they serve the batch. All formats of one shape and batch take
turns, over the same routings.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from moelab import config as config_room
from moelab import runtime
from moelab.config import KernelConfig
from moelab.errors import MoelabError
from moelab.formats import Format, get_format
from moelab.implementations import IMPLEMENTATIONS
from moelab.inputs import MoEInputs
from moelab.kernels.checks import current_target
from moelab.measure import measure
from moelab.pipelines.call_configs import default_of
from moelab.recordings import Recording
from moelab.routing import expected_experts_touched
from moelab.shapes import MoEShape, load_model
from moelab.suites.bench import cost_of, judge, taking_of
from moelab.suites.layer_classic import Layer, protocol_for, weight_sets
from moelab.suites.partial import OnRows, ignore
from moelab.suites.screening import quick, usable

SHAPES: Mapping[str, tuple[str, int, int]] = {
    "deepseek-v3/tp8": ("deepseek-v3", 8, 1),
    "qwen3-30b-a3b/tp1": ("qwen3-30b-a3b", 1, 1),
    "glm-4.5-air/tp1": ("glm-4.5-air", 1, 1),
    "deepseek-v3/ep8": ("deepseek-v3", 8, 8),
}
"""Name -> preset, tp_size, ep_size: the shapes of data/upstream/h200_fp8_sglang.json."""

FORMATS = (
    "plain", "fp8_w8a8_block_128x128", "fp8_w8a8_channel", "int8_w8a8_channel", "int4_w4a16_group_128", "mxfp4_w4a16"
)  # fmt: skip
BATCHES = (1, 4, 16, 64, 256, 1024, 4096)

OTHERS = ("fast", "weight_only")
"""Implementations beside the classic one that are made for few rows or for this chip."""

FEW_ROWS = 24
"""Rows an expert up to which tiles of 16 are tried."""

_FEW = (
    (16, 64, 128, 1, 4, 4), (16, 128, 128, 1, 4, 4), (16, 64, 128, 1, 4, 6), (16, 128, 64, 1, 4, 5),
    (16, 32, 128, 1, 4, 4), (16, 32, 256, 1, 4, 3), (16, 64, 256, 1, 4, 3), (32, 64, 128, 1, 4, 4),
)  # fmt: skip
_MANY = (
    (64, 128, 128, 16, 4, 3), (64, 64, 128, 16, 4, 4), (128, 128, 128, 16, 8, 3), (64, 128, 128, 16, 8, 3),
    (128, 64, 128, 16, 4, 3), (128, 128, 64, 16, 4, 4), (128, 256, 64, 16, 8, 3),
)  # fmt: skip
_GATED = {
    True: (
        (16, 64, 128, 1, 4, 4), (16, 64, 128, 1, 4, 6), (16, 128, 128, 1, 4, 4), (16, 256, 128, 1, 4, 3),
        (16, 256, 128, 1, 8, 4),
    ),
    False: (
        (64, 256, 128, 16, 8, 3), (64, 256, 128, 16, 8, 4), (64, 128, 128, 16, 4, 3), (128, 128, 128, 16, 8, 3),
        (128, 256, 128, 16, 8, 3), (64, 256, 128, 16, 4, 3),
    ),
}  # fmt: skip
"""Tiles of `gated`, by whether rows are few. BLOCK_SIZE_N counts gate and up rows: 256 of them hold a group of the result."""


def shape_of(name: str, format: str | Format) -> MoEShape:
    """The layer behind a name of SHAPES with its experts in that format, without fused shared experts."""
    model, tp_size, ep_size = SHAPES[name]
    plain = load_model(
        model, tp_size=tp_size, ep_size=ep_size, dtype="bfloat16", disable_shared_experts_fusion=True
    )  # fmt: skip
    return replace(plain, format=get_format(format))


def candidates(shape: MoEShape, num_tokens: int, impl: str = "triton") -> list[KernelConfig]:
    """Tiles to choose from at that batch size, of those that the format and this chip take; a step longer than a block of
    scales is cut to it."""
    format, everywhere = shape.format, shape.num_experts * shape.ep_size
    rows = num_tokens * shape.top_k / expected_experts_touched(everywhere, shape.top_k, num_tokens)
    longest = format.sizes[-1] if format.granularity == "block" else 1 << 30
    few = rows <= FEW_ROWS
    tried = _GATED[few] if impl == "gated" else _FEW if few else _MANY
    tiles = [KernelConfig(m, n, min(k, longest), *rest) for m, n, k, *rest in tried]
    found = [tile for tile in dict.fromkeys(tiles) if format.step_refused(tile.BLOCK_SIZE_K) is None]
    rules: dict[str, Any] = {
        "dtype": format.product_dtype(shape.dtype), "weight_bits": format.widened_bits, "target": current_target()
    }  # fmt: skip
    return [tile for tile in found if not config_room.violations(tile, **rules)]


def choose(layer: Layer, rotations: int, impl: str) -> tuple[KernelConfig | None, int, tuple[str, ...]]:
    """The fastest tile of a short pass, for both GEMMs; how many were tried; those that did not run, with why."""
    tiles = candidates(layer.shape, layer.num_tokens, impl)
    ran, lost = usable({tile: layer.whole(tile, impl=impl) for tile in tiles})
    times = quick(ran, rotations) if ran else {}
    best = min(times, key=lambda tile: times[tile].median_us) if times else None
    return best, len(tiles), tuple(sorted(f"{tile.short()}: {why}" for tile, why in lost.items()))


def cell(name: str, layers: Mapping[str, Layer]) -> list[dict[str, Any]]:
    """Rows of one shape and batch size: each format's implementations and configs, checked, then timed interleaved."""
    run: dict[str, Callable[[int], torch.Tensor]] = {}
    rows: dict[str, dict[str, Any]] = {}
    for format, layer in layers.items():
        for label, row, contender in _contenders(name, layer):
            rows[f"{format} {label}"] = row
            if contender is not None:
                run[f"{format} {label}"] = contender
    protocol = protocol_for(next(iter(layers.values())).num_tokens)
    for key, found in measure(run, protocol).items() if run else ():
        rows[key]["samples_us"] = [round(sample, 4) for sample in found.samples_us]
    return list(rows.values())


def _contenders(name: str, layer: Layer) -> list[tuple[str, dict[str, Any], Callable[[int], torch.Tensor] | None]]:
    shape, protocol = layer.shape, protocol_for(layer.num_tokens)
    default = default_of(shape.num_experts, shape.moe_intermediate_size, layer.num_tokens, shape.format)
    asked = {"default": layer.whole("default")}
    notes: dict[str, dict[str, Any]] = {
        "default": {"impl": "triton", "config_name": "default", "config": default.to_json()}
    }
    takers = taking_of(shape)
    for impl in ("triton",) if shape.format.is_plain or "gated" not in takers else ("triton", "gated"):
        searched, tried, failed = choose(layer, protocol.rotations, impl)
        if searched is not None:
            label = f"searched {impl}"
            asked[label] = layer.whole(searched, impl=impl)
            notes[label] = {
                "impl": impl, "config_name": "searched", "config": searched.to_json(), "tried": tried, "failed": list(failed)
            }  # fmt: skip
    for impl in OTHERS:
        if impl in takers:
            asked[impl] = layer.whole(None, impl=impl)
            notes[impl] = {"impl": impl, "config_name": "served"}
    cost = cost_of(layer)
    common = {
        "shape": name, "format": shape.format.name, "num_tokens": layer.num_tokens, "experts_touched": layer.experts_touched(),
        # Whose rate the floor has: the format's for all implementations alike, though weight_only multiplies bfloat16.
        "bytes": cost.bytes, "flops": cost.flops, "multiplies": shape.format.product_dtype(shape.dtype),
        "rotations": protocol.rotations,
    }  # fmt: skip
    try:
        judged = judge(layer, asked, [impl for impl in OTHERS if IMPLEMENTATIONS[impl].weight_only])
    except MoelabError as error:
        refused = f"{type(error).__name__}: {error}"
        return [("default", {**common, **notes["default"], "refused": refused}, None)]
    rows = {label: {**common, **notes[label], **judged[label]} for label in asked}
    return [(label, row, None if "refused" in row else asked[label]) for label, row in rows.items()]


def record(
    names: Sequence[str] = tuple(SHAPES),
    formats: Sequence[str] = FORMATS,
    batches: Sequence[int] = BATCHES,
    on_rows: OnRows = ignore,
) -> Recording:
    """Every format on four shapes, from one token to 4096.

    Raises RuntimeModeError without a GPU, or where Triton's interpreter stands in for one.
    """
    runtime.require_cuda("the suite 'quantised'")
    rows: list[dict[str, Any]] = []
    for name in names:
        shapes = {format: shape_of(name, format) for format in formats}
        weights: dict[str, Sequence[MoEInputs]] = {format: weight_sets(shape) for format, shape in shapes.items()}
        for num_tokens in batches:
            rotations = protocol_for(num_tokens).rotations
            layers = {f: Layer(shape, num_tokens, rotations, weights[f]) for f, shape in shapes.items()}
            rows += cell(name, layers)
            on_rows(rows)
        del weights, layers
        torch.cuda.empty_cache()
    protocol = {
        **protocol_for(1).describe(), "rotations": "in each row", "alignment": "included",
        "activations": "quantised inside the time where the format does, but by weight_only, which leaves them as they are",
        "configs": "default: sglang's rule; searched: the fastest of a screening pass of 3 replays each; served: as the "
        "implementation chooses for the batch",
    }  # fmt: skip
    return Recording("quantised", runtime.provenance(seed=0), protocol, tuple(rows))
