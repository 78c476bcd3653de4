"""The fastest layer there is here over fp8 weights in blocks, for Hopper: which instance of the one-launch layer serves."""

from __future__ import annotations

import torch
from torch import Tensor

from moelab.call import MoECall
from moelab.chips import Target
from moelab.dtypes import torch_dtype
from moelab.kernels import checks
from moelab.kernels.expert_order import ordered_tiles
from moelab.kernels.fast_instances import CODED, CODED_SHARED, Instance
from moelab.kernels.fast_quantised import check_coded_layer, coded, coded_cut, coded_layer
from moelab.kernels.launch import checked, signature
from moelab.quantised_weights import empty_weights
from moelab.shapes import MoEShape
from moelab.weights import ExpertWeights

MOST_ROWS = {16: 3.0, 48: 40.0}
"""Widest tile of tokens -> the most rows, as an expert is expected to get them, that it is used for (tests/coded_forms.py times
every instance)."""

SHARED_READS, SHARED_ROWS = 8, 80
"""Tiles of weight rows that read the same tokens, and rows of an expert, from and above which CODED_SHARED serves."""


def coded_instance_for(num_tokens: int, rows: float, moe_intermediate_size: int) -> Instance:
    """The instance for a batch, by the rows that an expert is expected to get. Sizes as on this rank."""
    fits = next((most for most, limit in MOST_ROWS.items() if rows <= limit or num_tokens <= most), None)
    if fits is not None:
        return CODED[fits]
    reads = -(-2 * moe_intermediate_size // CODED_SHARED.rows)
    return CODED_SHARED if reads >= SHARED_READS and rows > SHARED_ROWS else CODED[128]


def coded_choice(shape: MoEShape, num_tokens: int, target: Target) -> tuple[Instance, str]:
    """The instance for a layer's sizes, and a sentence that says why. Raises what `check_coded_layer` does."""
    up, down = (
        empty_weights(shape.format, *size, torch_dtype(shape.dtype), "meta")
        for size in (shape.w13_shape, shape.w2_shape)
    )
    x = torch.empty((num_tokens, shape.hidden_size), dtype=torch_dtype(shape.dtype), device="meta")
    check_coded_layer(x, ExpertWeights.of(up, down), target)
    rows = shape.expected_rows(num_tokens)
    instance = coded_instance_for(num_tokens, rows, shape.moe_intermediate_size)
    how = "in order of expert" if instance.permutes else "as they lie"
    return instance, (
        f"one launch over fp8 codes, and one for the sums: {rows:.3g} rows an expert if tokens spread evenly: tiles of at most "
        f"{instance.tokens} tokens by {instance.rows} weight rows, activations made codes {how} ahead"
    )


def coded_pipeline(call: MoECall, form: Instance | None = None) -> Tensor:
    """Order by expert, tiles, codes of the activations, one launch, and one for the sums.

    form: that instance, whatever the batch. What `fast_layer` says of launches beside each other holds here. Raises what
    `check_coded_layer` does; KernelTimeoutError where an earlier launch waited for seconds and ended itself.
    """
    x, w, ids = call.hidden_states, call.weights, call.topk_ids
    aligned = not (x.data_ptr() | w.w13.data_ptr() | w.w2.data_ptr()) % 16
    checked(
        ("coded_pipeline", signature(x, w.w13, w.w2, w.w13_scale, w.w2_scale), w.format, aligned),
        lambda: check_coded_layer(x, w, checks.current_target()),
    )
    checks.check_kernel_device("hidden_states", x)  # each time: what device is current is no part of a signature
    instance = form or coded_instance_for(call.num_tokens, call.rows_an_expert, call.moe_intermediate_size)
    tiles = ordered_tiles(ids, call.num_experts, *coded_cut(instance))
    return coded_layer(
        coded(x, tiles, call.top_k, instance, w.format), w, call.topk_weights, ids, tiles, instance, x.dtype,
        scale=call.routed_scaling_factor, weights_on_input=call.apply_router_weight_on_input, out=call.out,
    )  # fmt: skip
