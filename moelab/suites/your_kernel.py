"""What a new implementation of the layer is asked first: is it right, under which tiles, and how fast beside the others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from moelab import precision, runtime
from moelab.config import KernelConfig
from moelab.errors import ConfigError, PrecisionError
from moelab.fused_moe import fused_moe
from moelab.inputs import MoEInputs, make_inputs
from moelab.measure import Measurement, Protocol, measure
from moelab.shapes import MoEShape
from moelab.suites.bench import judge
from moelab.suites.layer_baseline import cell
from moelab.suites.layer_classic import Layer, protocol_for, shape_of, weight_sets
from moelab.suites.screening import usable


def _shape(sizes: Mapping[str, int], dtype: str) -> MoEShape:
    named: dict[str, Any] = dict(sizes)
    return MoEShape.from_sizes(**named, dtype=dtype)


JUDGED_BY = 64
"""Tokens that torch's own error is taken from, at least: over a few hundred outputs the largest is luck, and a right kernel is
refused for one draw in ten."""


def _drawn(
    sizes: Mapping[str, int], num_tokens: int, dtype: str, seed: int
) -> tuple[MoEInputs, torch.Tensor, torch.Tensor, float]:
    """Inputs of num_tokens, torch's layer, the exact one, and the `tiny` that makes the bound that of JUDGED_BY tokens."""
    more = make_inputs(_shape(sizes, dtype), max(num_tokens, JUDGED_BY), seed=seed)
    plain, exact = precision.layer_references(more.hidden_states, more.w13, more.w2, more.topk_weights, more.topk_ids)
    few = slice(num_tokens)
    given = replace(more, hidden_states=more.hidden_states[few], topk_weights=more.topk_weights[few],
                    topk_ids=more.topk_ids[few])  # fmt: skip
    tiny = precision.tolerance(plain, exact) - 2 * precision.error(plain[few], exact[few]).max_abs
    return given, plain[few], exact[few], tiny


def _out(impl: str, given: MoEInputs, config: KernelConfig | None) -> torch.Tensor:
    routing: dict[str, Any] = {"topk_weights": given.topk_weights, "topk_ids": given.topk_ids}
    return fused_moe(given.hidden_states, given.w13, given.w2, impl=impl, config=config, **routing)


def error_rows(
    impls: Sequence[str], sizes: Mapping[str, int], num_tokens: int, dtypes: Sequence[str], *, seed: int = 0
) -> list[dict[str, Any]]:
    """Every implementation against float64 in every dtype: the rows of `precision.compare`, with dtype; torch's first.

    sizes: num_experts, top_k, hidden_size, moe_intermediate_size. Small ones: here it is often the interpreter that runs.
    """
    rows = []
    for dtype in dtypes:
        given, plain, exact, tiny = _drawn(sizes, num_tokens, dtype, seed)
        outs = {"torch": plain} | {impl: _out(impl, given, None) for impl in impls}
        rows += [{"dtype": dtype, **row} for row in precision.compare(outs, exact, tiny=tiny)]
    return rows


def error_map(
    impl: str,
    sizes: Mapping[str, int],
    num_tokens: int,
    dtype: str,
    *,
    config: KernelConfig | None = None,
    seed: int = 0,
) -> dict[str, Any]:
    """Where one implementation is wrong: |out - exact| of every output, and both verdicts.

    Keys: errors (num_tokens rows of hidden_size), bound, max_abs, max_ulp, passes, problem (None if it passes), and
    upstream_passes, upstream_tolerance: the fixed check of `precision.upstream_check`.
    """
    given, plain, exact, tiny = _drawn(sizes, num_tokens, dtype, seed)
    out = _out(impl, given, config)
    problem = None
    try:
        precision.check(out, plain, exact, name=impl, tiny=tiny)
    except PrecisionError as error:
        problem = str(error)
    report = precision.error(out, exact)
    return {
        "errors": (out.double() - exact).abs().tolist(), "bound": precision.tolerance(plain, exact, tiny),
        "max_abs": report.max_abs, "max_ulp": report.max_ulp, "passes": problem is None, "problem": problem,
        "upstream_passes": precision.upstream_check(out, plain),
        "upstream_tolerance": precision.UPSTREAM_TOLERANCE[dtype],
    }  # fmt: skip


def small_layer(sizes: Mapping[str, int], num_tokens: int, dtype: str = "float32") -> Layer:
    """A layer of the suites in a size for the interpreter."""
    shape = _shape(sizes, dtype)
    return Layer(shape, num_tokens, 1, weight_sets(shape)[:1])


def recorded_layer(shape: str, num_tokens: int) -> Layer:
    """A layer of a shape that recordings know ("qwen3-30b-a3b/tp1"), as they were timed. For a GPU."""
    sizes = shape_of(shape)
    return Layer(sizes, num_tokens, protocol_for(num_tokens).rotations, weight_sets(sizes))


def tune(layer: Layer, impl: str, tiles: Sequence[KernelConfig]) -> list[dict[str, Any]]:
    """An implementation under every tile: each held against float64 first, then, on a GPU, timed interleaved.

    Rows: config (its label), tile (the KernelConfig), what `bench.judge` says of it (or failed, what Triton said), and on a
    GPU samples_us of those within their bound; fastest first, elsewhere in the order given. Raises ConfigError for no tile.
    """
    if not tiles:
        raise ConfigError(f"No tiles to try for {impl}. Expected at least one KernelConfig. Pass a list of them.")
    on_gpu = runtime.current().mode == "gpu"
    named = {tile.short(): tile for tile in tiles}
    contenders = {label: layer.whole(tile, impl=impl) for label, tile in named.items()}
    run, failed = usable(contenders) if on_gpu else (contenders, {})
    judged = judge(layer, run) if run else {}
    right = {label: run[label] for label in run if judged[label]["within_bound"]}
    timed: Mapping[str, Measurement] = {}
    if on_gpu and right:
        timed = measure(right, Protocol(protocol_for(layer.num_tokens).rotations, rounds=15, graph_us=300.0))
    rows = [
        {
            "config": label, "tile": tile, **judged.get(label, {"within_bound": None, "failed": failed.get(label)}),
            **({"samples_us": list(timed[label].samples_us)} if label in timed else {}),
        }
        for label, tile in named.items()
    ]  # fmt: skip
    return sorted(rows, key=lambda row: timed[row["config"]].median_us if row["config"] in timed else float("inf"))


def live_rows(shape: str, batches: Sequence[int], impls: Sequence[str]) -> list[dict[str, Any]]:
    """Rows as the recording layer_baseline holds them, measured here and now: none without a GPU."""
    if runtime.current().mode != "gpu":
        return []
    return [row for batch in batches for row in cell(shape, recorded_layer(shape, batch), impls)]
