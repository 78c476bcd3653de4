"""The oracle: a fused MoE layer that anyone believes at sight.

Plain torch, loops over tokens and experts, in whatever dtype the tensors have: float64 inputs give the value
every kernel is judged against. Rounds to the tensors' dtype wherever the kernels of sglang and vLLM do: after
GEMM1, after the activation, after the weighted GEMM2, and after the sum.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

from moelab.dtypes import accumulator_dtype
from moelab.errors import UnknownNameError, nearest_names
from moelab.formats import Format
from moelab.quantised_weights import dequantise_activations, quantise_activations


def swiglu_oai(gate: Tensor, up: Tensor, *, alpha: float = 1.702, limit: float = 7.0) -> Tensor:
    """gpt-oss's clamped SwiGLU: (up + 1) * gate * sigmoid(alpha * gate), gate <= limit, |up| <= limit.

    Source: gpt-oss model card (arXiv 2508.10925) and its config's swiglu_limit = 7.0; alpha = 1.702.
    """
    gate, up = gate.clamp(max=limit), up.clamp(-limit, limit)
    return (up + 1) * gate * torch.sigmoid(alpha * gate)


GATED: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "silu": lambda gate, up: F.silu(gate) * up,
    "gelu": lambda gate, up: F.gelu(gate) * up,
    "gelu_tanh": lambda gate, up: F.gelu(gate, approximate="tanh") * up,
    "swiglu_oai": swiglu_oai,
}
UNGATED: dict[str, Callable[[Tensor], Tensor]] = {
    "silu": F.silu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "relu2": lambda x: F.relu(x).square(),
}


def check_activation(activation: str, gated: bool) -> None:
    """Raise UnknownNameError unless `activation` exists with (or without) a gate."""
    table = GATED if gated else UNGATED
    if activation not in table:
        kind = "gated" if gated else "ungated"
        raise UnknownNameError(
            f"Unknown {kind} activation {activation!r}. Expected one of {sorted(table)}."
            f"{nearest_names(activation, table)} Take the one that the model's config.json names."
        )


def activation_ref(x: Tensor, activation: str = "silu", *, gated: bool = True) -> Tensor:
    """(..., 2N) -> (..., N) for a gated activation (first half gate, second half up), (..., N) -> (..., N) otherwise.

    bf16 and fp16 are computed in float32 and rounded once, as the kernels do; float32 and float64 in themselves.
    """
    check_activation(activation, gated)
    wide = x.float() if x.dtype in (torch.bfloat16, torch.float16) else x
    out = GATED[activation](*wide.chunk(2, dim=-1)) if gated else UNGATED[activation](wide)
    return out.to(x.dtype)


def grouped_gemm_ref(
    a: Tensor,
    w: Tensor,
    topk_ids: Tensor,
    *,
    top_k: int,
    bias: Tensor | None = None,
    topk_weights: Tensor | None = None,
) -> Tensor:
    """Each pair's row times its expert's weight: (M * top_k, N), row token * top_k + slot.

    a: (M, K), row `token` serves its top_k slots, or (M * top_k, K) with top_k = 1; w: (E, N, K); topk_ids:
    (M', slots) flattened pair by pair; pairs of expert -1 give zeros. topk_weights scales rows after the bias.
    """
    flat = topk_ids.flatten()
    out = torch.zeros(flat.numel(), w.shape[1], dtype=a.dtype, device=a.device)
    for pair, expert in enumerate(flat.tolist()):
        if expert < 0:
            continue
        row = w[expert] @ a[pair // top_k]
        if bias is not None:
            row = row + bias[expert]
        if topk_weights is not None:
            row = row * topk_weights.flatten()[pair].to(row.dtype)
        out[pair] = row
    return out


def sum_reduce_ref(x: Tensor, routed_scaling_factor: float = 1.0) -> Tensor:
    """(num_tokens, top_k, hidden) -> (num_tokens, hidden): sum over top_k, then times routed_scaling_factor."""
    total = x[:, 0].clone()
    for slot in range(1, x.shape[1]):
        total += x[:, slot]
    return total * routed_scaling_factor


def fused_moe_ref(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """One fused MoE layer, expert by expert: out[t] = s * sum_j weight[t, j] * w2[e] @ act(w13[e] @ x[t]).

    Shapes as in moelab.inputs.MoEInputs; computed in hidden_states' dtype; pairs of expert -1 add nothing.
    apply_router_weight_on_input: GEMM1's rows carry the weight instead of GEMM2's (Llama-4).
    """
    num_tokens, top_k = topk_ids.shape
    dtype = hidden_states.dtype
    weights = topk_weights.to(accumulator_dtype(dtype))
    pairs = torch.zeros(num_tokens, top_k, w2.shape[1], dtype=dtype, device=hidden_states.device)
    for expert in range(w13.shape[0]):
        token, slot = torch.where(topk_ids == expert)
        if token.numel() == 0:
            continue
        scale = weights[token, slot].unsqueeze(1)
        h = hidden_states[token] @ w13[expert].T
        h = h if b13 is None else h + b13[expert]
        h = (h * scale).to(dtype) if apply_router_weight_on_input else h
        h = activation_ref(h, activation, gated=gated)
        y = h @ w2[expert].T
        y = y if b2 is None else y + b2[expert]
        pairs[token, slot] = y if apply_router_weight_on_input else (y * scale).to(dtype)
    wide = pairs.to(accumulator_dtype(dtype))
    return (wide.sum(dim=1) * routed_scaling_factor).to(dtype)


def quantised_moe_ref(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    format: Format,
    *,
    rounded: torch.dtype | None = None,
    activation: str = "silu",
    gated: bool = True,
    a1_scale: Tensor | None = None,
    a2_scale: Tensor | None = None,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """`fused_moe_ref` of a format that quantises activations, ahead of either GEMM, where the servers do.

    w13, w2: dequantised, float32 or float64, which is what products are computed in. rounded: to this dtype where kernels round
    (after GEMM1, after the activation, after the weighted GEMM2, after the sum); None rounds nothing but the codes. a1_scale,
    a2_scale: of a format with static scales.
    """
    wide, (num_tokens, top_k) = w13.dtype, topk_ids.shape

    def coded(x: Tensor, scale: Tensor | None) -> Tensor:
        return dequantise_activations(*quantise_activations(x, format, scale), format).to(wide)

    def round_to(x: Tensor) -> Tensor:
        return x if rounded is None else x.to(rounded).to(wide)

    x = coded(hidden_states, a1_scale)
    inner = torch.zeros(num_tokens * top_k, w2.shape[2], dtype=wide, device=x.device)
    flat, factors = topk_ids.flatten(), topk_weights.flatten().unsqueeze(1).to(wide)
    for expert in flat[flat >= 0].unique().tolist():
        pair = torch.where(flat == expert)[0]
        h = x[pair // top_k] @ w13[expert].T
        h = round_to(h * factors[pair] if apply_router_weight_on_input else h)
        inner[pair] = round_to(activation_ref(h, activation, gated=gated))
    inner = coded(inner if rounded is None else inner.to(rounded), a2_scale)
    out = torch.zeros(num_tokens * top_k, w2.shape[1], dtype=wide, device=x.device)
    for expert in flat[flat >= 0].unique().tolist():
        pair = torch.where(flat == expert)[0]
        y = inner[pair] @ w2[expert].T
        out[pair] = round_to(y if apply_router_weight_on_input else y * factors[pair])
    total = out.view(num_tokens, top_k, -1).sum(1)
    return total if rounded is None else total.to(rounded)
