"""The fused MoE layer in plain torch: a loop over experts, and two forms of static shapes for torch.compile.

All take the same arguments: hidden_states (M, H), w13, w2, topk_weights, topk_ids, b13, b2 as in
moelab.inputs.MoEInputs, then activation, gated, routed_scaling_factor, apply_router_weight_on_input. Pairs of an
expert out of range (-1: another rank's) add nothing. They round where the kernels of sglang and vLLM do, as the
oracle in moelab.reference does, but batch the tokens of an expert and add in another order.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from moelab.dtypes import accumulator_dtype
from moelab.reference import activation_ref


def loop_layer(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, b13: Tensor | None, b2: Tensor | None,
    activation: str, gated: bool, scale: float, on_input: bool,
) -> Tensor:  # fmt: skip
    """Expert by expert, each adding to the output's rows; synchronises with the host for each expert."""
    wide = accumulator_dtype(x.dtype)
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    for expert in range(w13.shape[0]):
        token, slot = torch.where(ids == expert)
        if token.numel() == 0:
            continue
        pair_weights = weights[token, slot].to(wide).unsqueeze(-1)
        h = x[token] @ w13[expert].T
        h = h if b13 is None else h + b13[expert]
        h = (h * pair_weights).to(x.dtype) if on_input else h
        h = activation_ref(h, activation, gated=gated)
        y = h @ w2[expert].T
        y = y if b2 is None else y + b2[expert]
        y = y if on_input else (y * pair_weights).to(x.dtype)
        out.index_add_(0, token, y.to(wide))
    return (out * scale).to(x.dtype)


def grouped_mm_layer(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, b13: Tensor | None, b2: Tensor | None,
    activation: str, gated: bool, scale: float, on_input: bool,
) -> Tensor:  # fmt: skip
    """Static shapes throughout: sort pairs by expert, torch's grouped product twice, unsort, sum."""
    num_experts, top_k = w13.shape[0], ids.shape[1]
    flat = ids.flatten()
    foreign = (flat < 0) | (flat >= num_experts)
    bucket = torch.where(foreign, num_experts - 1, flat)  # computed in vain by the last expert, and then zeroed
    order = bucket.argsort(stable=True)
    expert = bucket[order]
    ends = (torch.arange(num_experts, device=x.device).unsqueeze(1) >= expert.unsqueeze(0)).sum(1).int()
    pair_weights = weights.flatten()[order].unsqueeze(1)
    h = torch.nn.functional.grouped_mm(x[order // top_k], w13.transpose(1, 2), offs=ends)
    h = h if b13 is None else h + b13[expert]
    h = (h * pair_weights).to(x.dtype) if on_input else h
    h = activation_ref(h, activation, gated=gated)
    y = torch.nn.functional.grouped_mm(h, w2.transpose(1, 2), offs=ends)
    y = y if b2 is None else y + b2[expert]
    y = y if on_input else (y * pair_weights).to(x.dtype)
    y = torch.where(foreign[order].unsqueeze(1), 0.0, y)
    pairs = torch.zeros_like(y).index_copy(0, order, y).view(*ids.shape, -1)
    wide = accumulator_dtype(x.dtype)
    return (pairs.to(wide).sum(1) * scale).to(x.dtype)


def dense_layer(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, b13: Tensor | None, b2: Tensor | None,
    activation: str, gated: bool, scale: float, on_input: bool,
) -> Tensor:  # fmt: skip
    """Every expert on every token, then the chosen ones kept: E / k times the arithmetic, in any dtype."""
    wide = accumulator_dtype(x.dtype)
    experts = torch.arange(w13.shape[0], device=x.device)
    chosen = ids.unsqueeze(-1) == experts  # (M, k, E)
    combine = (weights.unsqueeze(-1) * chosen).sum(1).T.unsqueeze(-1).to(wide)  # (E, M, 1)
    h = x.unsqueeze(0) @ w13.transpose(1, 2)
    h = h if b13 is None else h + b13.unsqueeze(1)
    h = (h * combine).to(x.dtype) if on_input else h
    h = activation_ref(h, activation, gated=gated)
    y = h @ w2.transpose(1, 2)
    y = y if b2 is None else y + b2.unsqueeze(1)
    y = y if on_input else (y * combine).to(x.dtype)
    y = torch.where(chosen.any(1).T.unsqueeze(-1), y, 0.0)
    return (y.to(wide).sum(0) * scale).to(x.dtype)


def static_layer(dtype: torch.dtype, w13: Tensor, w2: Tensor) -> Callable[..., Tensor]:
    """The form of static shapes that suits: torch's grouped product takes bfloat16 rows of whole 16 bytes, only."""
    sizes = (*w13.shape[1:], *w2.shape[1:])
    return grouped_mm_layer if dtype == torch.bfloat16 and not any(size % 8 for size in sizes) else dense_layer
