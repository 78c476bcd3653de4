"""The fused MoE layer in plain torch: a loop over experts, and two forms of static shapes for torch.compile.

Pairs of an expert out of range (-1: another rank's) add nothing. They round where the kernels of sglang and vLLM do, as the
oracle in moelab.reference does, but batch the tokens of an expert and add in another order.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
from torch import Tensor

from moelab.call import MoECall
from moelab.dtypes import accumulator_dtype
from moelab.quantised_weights import as_multiplied, dequantise_activations, quantise_activations
from moelab.reference import activation_ref
from moelab.weights import GemmWeights


def loop_pipeline(call: MoECall) -> Tensor:
    """Expert by expert, each adding to the output's rows; synchronises with the host for each expert."""
    if not call.weights.format.is_plain:
        return coded_loop(call)
    x, (w13, w2, b13, b2, *_) = call.hidden_states, call.weights
    wide, on_input = accumulator_dtype(x.dtype), call.apply_router_weight_on_input
    out = torch.zeros(x.shape, dtype=wide, device=x.device)
    for expert in range(w13.shape[0]):
        token, slot = torch.where(call.topk_ids == expert)
        if token.numel() == 0:
            continue
        pair_weights = call.topk_weights[token, slot].to(wide).unsqueeze(-1)
        h = x[token] @ w13[expert].T
        h = h if b13 is None else h + b13[expert]
        h = (h * pair_weights).to(x.dtype) if on_input else h
        h = activation_ref(h, call.activation, gated=call.gated)
        y = h @ w2[expert].T
        y = y if b2 is None else y + b2[expert]
        y = y if on_input else (y * pair_weights).to(x.dtype)
        out.index_add_(0, token, y.to(wide))
    return (out * call.routed_scaling_factor).to(x.dtype)


def coded_loop(call: MoECall) -> Tensor:
    """`loop_pipeline` over quantised weights: one expert dequantised at a time, activations through codes and back where the
    format has them; products in float32 (float64 of float64), rounded to the layer's dtype where the compatible kernels round."""
    x, weights = call.hidden_states, call.weights
    wide, on_input = accumulator_dtype(x.dtype), call.apply_router_weight_on_input

    def product(a: Tensor, part: GemmWeights, expert: int) -> Tensor:
        w = as_multiplied(part, x.dtype, torch.tensor([expert], device=a.device))[0]
        y = a @ w.to(wide).T
        return y if part.bias is None else y + part.bias[expert].to(wide)

    def read(a: Tensor, part: GemmWeights) -> Tensor:
        if part.format.activations == "none":
            return a.to(wide)
        return dequantise_activations(*quantise_activations(a, part.format, part.a_scale), part.format).to(wide)

    ids, factors = call.topk_ids.flatten(), call.topk_weights.flatten().unsqueeze(1).to(wide)
    here = [expert for expert in ids.unique().tolist() if 0 <= expert < weights.num_experts]
    rows, size = read(x, weights.up), weights.w13.shape[1] // (2 if call.gated else 1)
    inner = x.new_zeros(ids.numel(), size)
    for expert in here:
        pair = torch.where(ids == expert)[0]
        h = product(rows[pair // call.top_k], weights.up, expert)
        h = (h * factors[pair] if on_input else h).to(x.dtype)
        inner[pair] = activation_ref(h, call.activation, gated=call.gated)
    rows, out = read(inner, weights.down), x.new_zeros(ids.numel(), x.shape[1])
    for expert in here:
        pair = torch.where(ids == expert)[0]
        y = product(rows[pair], weights.down, expert)
        out[pair] = (y if on_input else y * factors[pair]).to(x.dtype)
    total = out.view(*call.topk_ids.shape, -1).to(wide).sum(1)
    return (total * call.routed_scaling_factor).to(x.dtype)


def grouped_mm_layer(call: MoECall) -> Tensor:
    """Static shapes throughout: sort pairs by expert, torch's grouped product twice, unsort, sum."""
    x, (w13, w2, b13, b2, *_) = call.hidden_states, call.weights
    ids, on_input, num_experts = call.topk_ids, call.apply_router_weight_on_input, w13.shape[0]
    flat = ids.flatten()
    foreign = (flat < 0) | (flat >= num_experts)
    bucket = torch.where(foreign, num_experts - 1, flat)  # computed in vain by the last expert, and then zeroed
    order = bucket.argsort(stable=True)
    expert = bucket[order]
    ends = (torch.arange(num_experts, device=x.device).unsqueeze(1) >= expert.unsqueeze(0)).sum(1).int()
    pair_weights = call.topk_weights.flatten()[order].unsqueeze(1)
    h = torch.nn.functional.grouped_mm(x[order // ids.shape[1]], w13.transpose(1, 2), offs=ends)
    h = h if b13 is None else h + b13[expert]
    h = (h * pair_weights).to(x.dtype) if on_input else h
    h = activation_ref(h, call.activation, gated=call.gated)
    y = torch.nn.functional.grouped_mm(h, w2.transpose(1, 2), offs=ends)
    y = y if b2 is None else y + b2[expert]
    y = y if on_input else (y * pair_weights).to(x.dtype)
    y = torch.where(foreign[order].unsqueeze(1), 0.0, y)
    pairs = torch.zeros_like(y).index_copy(0, order, y).view(*ids.shape, -1)
    return (pairs.to(accumulator_dtype(x.dtype)).sum(1) * call.routed_scaling_factor).to(x.dtype)


def dense_layer(call: MoECall) -> Tensor:
    """Every expert on every token, then the chosen ones kept: E / k times the arithmetic, in any dtype.

    Weighted inputs make GEMM2 another product for each slot: top_k times its arithmetic again.
    """
    x, (w13, w2, b13, b2, *_) = call.hidden_states, call.weights
    wide, ids = accumulator_dtype(x.dtype), call.topk_ids.T.unsqueeze(1)  # (k, 1, M)
    chosen = ids == torch.arange(w13.shape[0], device=x.device).unsqueeze(-1)  # (k, E, M)
    combine = torch.where(chosen, call.topk_weights.T.unsqueeze(1), 0.0).to(wide).unsqueeze(-1)  # (k, E, M, 1)
    h = x.unsqueeze(0) @ w13.transpose(1, 2)
    h = h if b13 is None else h + b13.unsqueeze(1)

    def second(h: Tensor) -> Tensor:
        y = activation_ref(h, call.activation, gated=call.gated) @ w2.transpose(1, 2)
        return y if b2 is None else y + b2.unsqueeze(1)

    if call.apply_router_weight_on_input:
        out = torch.zeros(x.shape, dtype=wide, device=x.device)
        for mine, weight in zip(chosen, combine, strict=True):
            out = out + torch.where(mine.unsqueeze(-1), second((h * weight).to(x.dtype)), 0.0).to(wide).sum(0)
    else:
        y = (second(h) * combine.sum(0)).to(x.dtype)
        out = torch.where(chosen.any(0).unsqueeze(-1), y, 0.0).to(wide).sum(0)
    return (out * call.routed_scaling_factor).to(x.dtype)


def static_layer(call: MoECall) -> Callable[[MoECall], Tensor]:
    """The form of static shapes that suits: torch's grouped product takes bfloat16 rows of whole 16 bytes, only."""
    w13, w2 = call.weights.w13, call.weights.w2
    whole = not any(size % 8 for size in (*w13.shape[1:], *w2.shape[1:]))
    return grouped_mm_layer if w13.dtype == torch.bfloat16 and whole else dense_layer


@functools.cache
def _compile(layer: Callable[[MoECall], Tensor]) -> Callable[[MoECall], Tensor]:
    return torch.compile(layer, dynamic=True)


def compiled_pipeline(call: MoECall) -> Tensor:
    """torch.compile of `static_layer`; takes CUDA graphs."""
    return _compile(static_layer(call))(call._replace(config=None, down_config=None))
