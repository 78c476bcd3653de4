"""The layer in one launch, for Hopper: what serves a batch, and why."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelab import runtime
from moelab.chips import TARGETS, Target
from moelab.errors import ConfigError
from moelab.kernels import checks, fast_decode
from moelab.kernels.expert_order import expert_order_unchecked, new_expert_order
from moelab.kernels.fast_decode import FewTokens, form_for
from moelab.kernels.fast_instances import Instance, instance_for
from moelab.kernels.fast_layer import check_fast_layer, fast_layer
from moelab.kernels.launch import checked, signature
from moelab.kernels.route import new_routed, route, tiles_in_one_launch
from moelab.kernels.token_tiles import TokenTiles, new_token_tiles, token_tiles_unchecked
from moelab.pipelines.call import MoECall
from moelab.pipelines.layers import triton_pipeline
from moelab.routing import ExpertOrder, Routed
from moelab.shapes import MoEShape

FEW_TILES = 40
"""GEMM1 tiles of 128 weight rows, over all experts that a batch can touch, under which most multiprocessors would have
nothing to read: the classic layer, with narrower tiles, is recorded faster at 32 (data/recordings/fast_layer.json, Llama-4-Scout
tp4 and DeepSeek-V3 tp8 at one token), and not at 48, where no tuned config of it was known (Qwen3-235B-A22B tp4)."""

SHORT_INNER, ENOUGH_ROWS = 256, 32
"""An inner size on this rank of so few elements makes GEMM2's tiles four steps of 64, whose beginnings and ends weigh more than
the steps, until an expert has so many rows: by the recordings of DeepSeek-V3 tp8, slower in every form from 4 to 256 tokens."""


class Choice(NamedTuple):
    """The form for a batch, None for the classic layer, and a sentence that says why."""

    instance: Instance | FewTokens | None
    reason: str


def choose(num_tokens: int, top_k: int, num_experts: int, moe_intermediate_size: int, hidden_size: int) -> Choice:
    """What serves a batch of that size, whatever its routing: the host does not know it. Sizes as on this rank."""
    few = form_for(num_tokens, top_k, hidden_size, moe_intermediate_size)
    if few is not None and 0 < num_tokens <= fast_decode.MOST_TOKENS:
        return Choice(
            few,
            f"one launch for at most {few.tokens} token{'s' * (few.tokens > 1)}: no tiles, the rows of all weights in use are "
            "shared out evenly over the multiprocessors",
        )
    rows = num_tokens * top_k / num_experts
    even = f"{rows:.3g} rows an expert if tokens spread evenly"
    tiles = min(num_tokens * top_k, num_experts) * -(-2 * moe_intermediate_size // 128)
    if tiles < FEW_TILES:
        return Choice(
            None,
            f"classic: GEMM1 has at most {tiles} tiles of 128 weight rows, too few for all multiprocessors",
        )
    if moe_intermediate_size <= SHORT_INNER and rows < ENOUGH_ROWS:
        return Choice(None, f"classic: an inner size of {moe_intermediate_size} is short for one launch, with {even}")
    instance = instance_for(num_tokens, top_k, num_experts)
    blocks = f"{instance.per_processor} block{'s' * (instance.per_processor > 1)} a multiprocessor"
    return Choice(
        instance,
        f"one launch: {even}: tiles of at most {instance.tokens} tokens by {instance.rows} weight rows, {blocks}",
    )


def tiles_for(order: ExpertOrder, instance: Instance, hidden_size: int) -> TokenTiles:
    """An order's slots in the tiles of that instance."""
    grain = min(8 if instance.tokens % 16 else 16, instance.grain) * instance.cluster
    counters = instance.column_counters(hidden_size)
    return token_tiles_unchecked(order.sorted_slots, order.expert_offsets, instance.tile_rows, grain, counters)


def route_for(
    router_logits: Tensor, top_k: int, instance: Instance | FewTokens, hidden_size: int, **rule: Any
) -> tuple[Routed, TokenTiles | None]:
    """`moelab.kernels.route.route`, and the tiles of that instance, None where it needs none: for few tokens in one launch.
    rule: as route has it.

    For a router whose experts are all here.
    """
    if isinstance(instance, FewTokens):
        return route(router_logits, top_k, **rule), None
    num_tokens, num_experts = router_logits.shape
    few = num_tokens <= instance.tile_rows and tiles_in_one_launch(num_tokens, num_experts, rule.get("num_groups", 1))
    if not few:
        routed = route(router_logits, top_k, **rule)
        return routed, tiles_for(routed.order, instance, hidden_size)
    out = new_routed(num_tokens, num_experts, top_k, router_logits.device)
    counters = instance.column_counters(hidden_size)
    tiles = new_token_tiles(out.order.sorted_slots, num_experts, instance.tile_rows, counters)
    return route(router_logits, top_k, out=out, tiles=tiles, **rule), tiles


def fast_pipeline(call: MoECall, instance: Instance | FewTokens | None = None) -> Tensor:
    """Order by expert, tiles, and the layer in one launch; for a few tokens that launch alone; or `triton_pipeline` with the
    call's configs, where `choose` says so.

    instance: that one, whatever the batch. Raises RuntimeModeError, DtypeError, ShapeError, ConfigError.
    """
    x, w13, w2, ids = call.hidden_states, call.w13, call.w2, call.topk_ids
    aligned = not (x.data_ptr() | w13.data_ptr() | w2.data_ptr()) % 16
    what = (call.activation, call.gated, call.b13 is None, call.b2 is None, aligned)
    checked(("fast_pipeline", signature(x, w13, w2), what), lambda: _check(call))
    if instance is None:
        instance = choose(call.num_tokens, call.top_k, call.num_experts, w2.shape[2], x.shape[1]).instance
    if instance is None:
        return triton_pipeline(call)
    ids = ids.to(torch.int32)
    options: dict[str, Any] = {
        "scale": call.routed_scaling_factor, "weights_on_input": call.apply_router_weight_on_input
    }  # fmt: skip
    if isinstance(instance, FewTokens):
        return fast_decode.fast_decode(x, w13, w2, call.topk_weights, ids, instance, **options)
    order = new_expert_order(ids.numel(), call.num_experts, x.device)
    expert_order_unchecked(ids, call.num_experts, order)
    tiles = tiles_for(order, instance, x.shape[1])
    return fast_layer(x, w13, w2, call.topk_weights, ids, tiles, instance, **options)


def _check(call: MoECall) -> None:
    check_kind(call.activation, call.gated, biases=call.b13 is not None or call.b2 is not None)
    check_fast_layer(call.hidden_states, call.w13, call.w2, checks.current_target())


def check_kind(activation: str, gated: bool, *, biases: bool) -> None:
    """Raise ConfigError for a kind of layer that one launch does not compute."""
    asked = {f"activation={activation!r}": activation != "silu", "gated=False": not gated, "biases": biases}
    if more := [what for what, given in asked.items() if given]:
        raise ConfigError(
            f"impl='fast' was asked for {', '.join(more)}. Expected silu-gated experts without biases. Use impl='triton' for "
            "these."
        )


def choose_for(shape: MoEShape, num_tokens: int, target: Target | None) -> Choice:
    """`choose` for a layer's sizes. target: the chip, None where it is not known.

    Raises what `fused_moe(impl="fast")` would for such a layer there: ConfigError, RuntimeModeError, DtypeError, ShapeError.
    """
    check_kind(shape.activation, shape.gated, biases=False)
    dtype = runtime.torch_dtype(shape.dtype)
    w13, w2 = (torch.empty(size, dtype=dtype, device="meta") for size in (shape.w13_shape, shape.w2_shape))
    x = torch.empty((num_tokens, shape.hidden_size), dtype=dtype, device="meta")
    check_fast_layer(x, w13, w2, target or TARGETS["sm_90"])
    return choose(num_tokens, shape.top_k, shape.num_experts, shape.moe_intermediate_size, shape.hidden_size)
