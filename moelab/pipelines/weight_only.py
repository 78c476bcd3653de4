"""The layer over quantised weights and bfloat16 activations: what of weight_only.cu serves a batch, or that the classic does."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from moelab.call import MoECall
from moelab.formats import Format
from moelab.kernels import checks
from moelab.kernels.align import align_unchecked
from moelab.kernels.launch import checked, signature
from moelab.kernels.sum_reduce import sum_reduce_unchecked
from moelab.kernels.weight_only import ROWS_DOWN, ROWS_UP, Cut, WeightOnly, check_weight_only, weight_only
from moelab.pipelines.layers import triton_pipeline

# From tests/weight_only_forms.py on an H200 (132 SMs), 2026-12-01: Qwen3-30B-A3B tp1 and DeepSeek-V3 tp8 in int4 by groups of
# 128, mxfp4 and int8, 1 to 128 tokens, every cut of each launch. What it printed is not kept; one command makes it again.

MOST_REREAD = 1.2
"""Weights read by pairs over weights read once an expert, if tokens choose evenly, up to which programs of one pair are faster
than blocks of an expert's pairs: Qwen3 at 4 tokens (1.10) and DeepSeek-V3 at 8 (1.12), not at 16 (1.26); Qwen3 at 8 (1.24) is
within 5 % either way."""

FEW_TILES = 264
"""Tiles of a launch, two an SM, up to which eight warps divide K of each; four above. At 256 tiles GEMM1 takes 14.7 us by eight
and 19.9 by four (DeepSeek-V3, int4, 2 tokens), at 512 27.0 and 26.5."""

TILES_TO_SPLIT = 3700
"""Tiles of GEMM1 over blocks, 28 an SM, up to which four warps divide K: at 1,640 tiles 69.6 us against 73.5 undivided
(DeepSeek-V3, int4, 16 tokens), at 3,950 51.5 against 45.6 (Qwen3)."""

TILES_TO_TURN = 7500
"""Tiles of GEMM2 over blocks, 57 an SM, from which a warp goes through four, else through two."""

ROWS_FOR_16 = {4: 12, 8: 6}
"""Bits of a code -> rows an expert, if tokens choose evenly, above which blocks are of 16: what is widened serves more columns,
but fewer warps fit. At 8 rows (Qwen3, 128 tokens) blocks of 16 take 0.97 of the time in mxfp4 and 0.86 in int8. int4 in groups of
whole chunks, whose products of 16 columns need the most registers, stays at 8: there blocks of 16 take 1.38 times as long."""

MOST_ROWS = 24
"""Rows an expert, if tokens choose evenly, up to which this beats the compatible kernel where both leave activations as they are:
at 16 rows (Qwen3 in int4, 256 tokens) it takes 0.75 of the time of the fastest of a few tiles, at 32 1.02. Blocks are read again
for each of their columns' number of rows."""


def form_for(
    num_tokens: int,
    top_k: int,
    num_experts: int,
    hidden_size: int,
    moe_intermediate_size: int,
    format: Format,
    expected_rows: float | None = None,
) -> WeightOnly | None:
    """The form for a batch of at least one token, whatever its routing: the host does not know it. None where the compatible
    kernel serves. Sizes as on this rank. expected_rows: of an expert, if tokens choose evenly; None takes all pairs for this
    rank's."""
    share = min((num_tokens * top_k / num_experts if expected_rows is None else expected_rows) / num_tokens, 1.0)
    pairs, touched = num_tokens * num_experts * share, num_experts * (1 - (1 - share) ** num_tokens)
    up, down = moe_intermediate_size // ROWS_UP, hidden_size // ROWS_DOWN
    rows = pairs / touched  # of an expert that has any
    if rows <= MOST_REREAD:
        return WeightOnly(_divided(pairs * up), _divided(num_tokens * down))
    if rows > MOST_ROWS and format.activations == "none":
        return None
    narrow = format.family == "int4_w4a16_group" and format.sizes[0] % 128 == 0
    columns = 16 if rows > ROWS_FOR_16[format.bits] and not narrow else 8
    blocks = touched * max(1.0, rows / columns)
    first = Cut(2, 4, 4) if blocks * up < TILES_TO_SPLIT else Cut(2, 4, 1)
    return WeightOnly(first, Cut(2, 4, 1, 4 if blocks * down > TILES_TO_TURN else 2), True, columns)


def _divided(tiles: float) -> Cut:
    warps = 8 if tiles <= FEW_TILES else 4
    return Cut(2, warps, warps)


def weight_only_pipeline(call: MoECall, form: WeightOnly | None = None) -> Tensor:
    """Two launches for a few tokens; else align, two launches over blocks of one expert's pairs, and the sum-reduce; from many
    rows an expert on, of formats that leave activations as they are, the classic layer under the call's configs.

    form: that one, whatever the batch. Raises what `check_weight_only` does.
    """
    x, w, (num_tokens, top_k) = call.hidden_states, call.weights, call.topk_ids.shape
    aligned = not (x.data_ptr() | w.w13.data_ptr() | w.w2.data_ptr()) % 16
    checked(
        ("weight_only_pipeline", signature(x, w.w13, w.w2, w.w13_scale, w.w2_scale), w.format, top_k, aligned),
        lambda: check_weight_only(x, w, top_k, checks.current_target()),
    )
    checks.check_kernel_device("hidden_states", x)  # each time: what device is current is no part of a signature
    if form is None:
        form = form_for(num_tokens, top_k, w.num_experts, x.shape[1], w.w13.shape[1] // 2, w.format, call.expected_rows)
    if form is None:
        return triton_pipeline(call)
    options: dict[str, Any] = {"activation": call.activation, "weights_on_input": call.apply_router_weight_on_input}
    given = (x, w, call.topk_weights, call.topk_ids, form)
    if not form.sorted:
        return weight_only(*given, scale=call.routed_scaling_factor, out=call.out, **options)
    y = weight_only(*given, align_unchecked(call.topk_ids, form.columns, w.num_experts), **options)
    return sum_reduce_unchecked(y.view(num_tokens, top_k, -1), call.routed_scaling_factor, call.result())
