"""The fastest layer there is here over fp8 weights in blocks, for Hopper: which instance of the one-launch layer serves."""

from __future__ import annotations

from torch import Tensor

from moelab.call import MoECall
from moelab.kernels import checks
from moelab.kernels.expert_order import expert_order_unchecked, new_expert_order
from moelab.kernels.fast_instances import CODED, CODED_PERMUTED, Instance
from moelab.kernels.fast_quantised import check_coded_layer, coded, coded_layer
from moelab.kernels.launch import checked, signature
from moelab.kernels.token_tiles import token_tiles_unchecked

MOST_ROWS = {16: 11.0, 48: 32.0, 96: 80.0}
"""Widest tile of tokens -> the most rows, as an expert gets them if tokens spread evenly, that it is used for."""


def instance_for(num_tokens: int, top_k: int, num_experts: int) -> Instance:
    """The instance for a batch, by the rows that an expert gets if tokens spread evenly. Sizes as on this rank."""
    rows = num_tokens * top_k / num_experts
    fits = next((most for most, limit in MOST_ROWS.items() if rows <= limit or num_tokens <= most), None)
    return CODED_PERMUTED if fits is None else CODED[fits]


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
    instance = form or instance_for(call.num_tokens, call.top_k, call.num_experts)
    order = new_expert_order(ids.numel(), call.num_experts, x.device)
    expert_order_unchecked(ids, call.num_experts, order)
    grain = 64 if instance.scaled == 2 else 16
    tiles = token_tiles_unchecked(
        order.sorted_slots, order.expert_offsets, instance.tokens, grain, instance.cluster > 1
    )
    return coded_layer(
        coded(x, tiles, call.top_k, instance, w.format), w, call.topk_weights, ids, tiles, instance, x.dtype,
        scale=call.routed_scaling_factor, weights_on_input=call.apply_router_weight_on_input,
    )  # fmt: skip
