"""The public op: router logits or top-k in, hidden states out, by an implementation named in a dict.

    from moelab.fused_moe import fused_moe
    out = fused_moe(hidden_states, w13, w2, router_logits=logits, top_k=8)

No implementation is ever replaced by another: what cannot run raises. Under torch.compile the call becomes the
custom op `moelab::fused_moe`, opaque to the compiler; in eager mode it is a plain Python call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from moelab import runtime
from moelab.config import KernelConfig, default_config
from moelab.errors import ConfigError, RoutingError, ShapeError, UnknownNameError, nearest_names
from moelab.reference import activation_ref, check_activation
from moelab.routing import check_ids, softmax_topk


@dataclass(frozen=True)
class MoECall:
    """One checked call, as implementations get it. Shapes as in moelab.inputs.MoEInputs."""

    hidden_states: Tensor
    w13: Tensor
    w2: Tensor
    topk_weights: Tensor
    topk_ids: Tensor
    b13: Tensor | None
    b2: Tensor | None
    activation: str
    gated: bool
    routed_scaling_factor: float
    apply_router_weight_on_input: bool
    config: KernelConfig | None
    down_config: KernelConfig | None

    @property
    def num_tokens(self) -> int:
        return self.topk_ids.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def num_experts(self) -> int:
        return self.w13.shape[0]


def _triton(call: MoECall) -> Tensor:
    """align, GEMM1, activation, GEMM2, sum-reduce: the pipeline of sglang and vLLM, five launches."""
    from moelab.kernels.activation import activation
    from moelab.kernels.align import align
    from moelab.kernels.grouped_gemm import grouped_gemm
    from moelab.kernels.sum_reduce import sum_reduce

    up, down = call_configs(call)
    num_pairs = call.topk_ids.numel()
    alignment = align(call.topk_ids, up.BLOCK_SIZE_M, call.num_experts)
    weights_up = call.topk_weights if call.apply_router_weight_on_input else None
    weights_down = None if call.apply_router_weight_on_input else call.topk_weights
    h = grouped_gemm(
        call.hidden_states, call.w13, alignment, up,
        num_pairs=num_pairs, top_k=call.top_k, bias=call.b13, topk_weights=weights_up,
    )  # fmt: skip
    h = activation(h, call.activation, gated=call.gated)
    y = grouped_gemm(h, call.w2, alignment, down, num_pairs=num_pairs, top_k=1, bias=call.b2, topk_weights=weights_down)
    return sum_reduce(y.view(call.num_tokens, call.top_k, -1), call.routed_scaling_factor, impl="triton")


def call_configs(call: MoECall) -> tuple[KernelConfig, KernelConfig]:
    """The configs of GEMM1 and GEMM2: as given, else sglang's default rule. Raises ConfigError if their rows differ.

    Tuned files are looked up by name, with moelab.config_files.lookup, and passed in: the op itself reads no files.
    """
    up = call.config or default_config(call.num_tokens, call.num_experts)
    down = call.down_config or up
    if up.BLOCK_SIZE_M != down.BLOCK_SIZE_M:
        raise ConfigError(
            f"config has BLOCK_SIZE_M = {up.BLOCK_SIZE_M} and down_config {down.BLOCK_SIZE_M}. Expected the same: one "
            "sort by expert serves both GEMMs. Tune the two under one BLOCK_SIZE_M."
        )
    return up, down


def _weighted(call: MoECall, x: Tensor, weights: Tensor, on_input: bool) -> Tensor:
    return x * weights.unsqueeze(-1) if call.apply_router_weight_on_input == on_input else x


def _torch(call: MoECall) -> Tensor:
    """A loop over experts in eager torch. Synchronises with the host for each expert: no CUDA graph takes it."""
    wide = torch.promote_types(call.hidden_states.dtype, torch.float32)
    out = torch.zeros(call.hidden_states.shape, dtype=wide, device=call.hidden_states.device)
    for expert in range(call.num_experts):
        token, slot = torch.where(call.topk_ids == expert)
        if token.numel() == 0:
            continue
        weights = call.topk_weights[token, slot].to(wide)
        h = call.hidden_states[token] @ call.w13[expert].T
        h = h if call.b13 is None else h + call.b13[expert]
        h = _weighted(call, h, weights, on_input=True).to(call.hidden_states.dtype)
        h = activation_ref(h, call.activation, gated=call.gated)
        y = h @ call.w2[expert].T
        y = y if call.b2 is None else y + call.b2[expert]
        out.index_add_(0, token, _weighted(call, y, weights, on_input=False).to(call.hidden_states.dtype).to(wide))
    return (out * call.routed_scaling_factor).to(call.hidden_states.dtype)


def _grouped_mm_layer(
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
    wide = torch.promote_types(x.dtype, torch.float32)
    return (pairs.to(wide).sum(1) * scale).to(x.dtype)


def _dense_layer(
    x: Tensor, w13: Tensor, w2: Tensor, weights: Tensor, ids: Tensor, b13: Tensor | None, b2: Tensor | None,
    activation: str, gated: bool, scale: float, on_input: bool,
) -> Tensor:  # fmt: skip
    """Every expert on every token, then the chosen ones kept: E / k times the arithmetic, in any dtype."""
    wide = torch.promote_types(x.dtype, torch.float32)
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


@functools.cache
def _compiled_layer(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(layer, dynamic=True)


def compiled_layer(call: MoECall) -> Callable[..., Tensor]:
    """What `compiled` compiles: torch's grouped product, which takes bfloat16 rows of whole 16 bytes, else "
    "`_dense_layer`."""
    sizes = (*call.w13.shape[1:], *call.w2.shape[1:])
    grouped = call.hidden_states.dtype == torch.bfloat16 and not any(size % 8 for size in sizes)
    return _grouped_mm_layer if grouped else _dense_layer


def _compiled(call: MoECall) -> Tensor:
    """torch.compile of `compiled_layer`; takes CUDA graphs."""
    return _compiled_layer(compiled_layer(call))(
        call.hidden_states, call.w13, call.w2, call.topk_weights, call.topk_ids, call.b13, call.b2,
        call.activation, call.gated, call.routed_scaling_factor, call.apply_router_weight_on_input,
    )  # fmt: skip


IMPLEMENTATIONS: dict[str, Callable[[MoECall], Tensor]] = {
    "triton": _triton,
    "torch": _torch,
    "compiled": _compiled,
}


def fused_moe(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    *,
    topk_weights: Tensor | None = None,
    topk_ids: Tensor | None = None,
    router_logits: Tensor | None = None,
    top_k: int | None = None,
    renormalize: bool = True,
    impl: str = "triton",
    config: KernelConfig | None = None,
    down_config: KernelConfig | None = None,
    activation: str = "silu",
    gated: bool = True,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    apply_router_weight_on_input: bool = False,
    check_routing: bool | None = None,
) -> Tensor:
    """out[t] = scale * sum over slots j of weight[t, j] * w2[e] @ activation(w13[e] @ hidden_states[t]), e = ids[t, j].

    hidden_states: (M, H), bfloat16, float16, float32 or float64, contiguous. w13: (E, 2N, H), gate rows and then up
    rows, or (E, N, H) with gated=False; w2: (E, H, N); b13 (E, 2N) and b2 (E, H) optional; all in one dtype.
    Routing: either topk_weights (M, k) float32 and topk_ids (M, k) int32, ids of -1 being another rank's experts, or
    router_logits (M, E) with top_k (softmax, then top-k, weights renormalised unless told otherwise).
    impl: a name in IMPLEMENTATIONS: "triton" (default), "torch", "compiled".
    config, down_config: for GEMM1 and GEMM2 ("triton"); without them sglang's default rule.
    check_routing: look for ids out of range. None means always on CPU, and never on a GPU, where it would
    synchronise with the host.
    Returns (M, H) in hidden_states' dtype. Deterministic.

    Raises UnknownNameError, ShapeError, DtypeError, DeviceError, LayoutError, RoutingError, ConfigError,
    SharedMemoryError or RuntimeModeError, each saying what was expected.
    """
    _check_impl(impl)
    if router_logits is not None:
        topk_weights, topk_ids = _route(router_logits, topk_weights, topk_ids, top_k, renormalize, hidden_states, w13)
    if topk_weights is None or topk_ids is None:
        raise RoutingError(
            "No routing given. Expected topk_weights and topk_ids, or router_logits and top_k. Pass one of the pairs."
        )
    call = MoECall(
        hidden_states, w13, w2, topk_weights, topk_ids, b13, b2, activation, gated,
        routed_scaling_factor, apply_router_weight_on_input, config, down_config,
    )  # fmt: skip
    check_activation(activation, gated)
    _check_call(call)
    compiling = torch.compiler.is_compiling()
    if check_routing or (check_routing is None and not compiling and hidden_states.device.type == "cpu"):
        check_ids(topk_ids, w13.shape[0])
    if call.num_tokens == 0:
        return torch.empty_like(hidden_states)
    if compiling:
        return _through_custom_op(call, impl)
    return IMPLEMENTATIONS[impl](call)


def _check_impl(impl: str) -> None:
    if impl not in IMPLEMENTATIONS:
        raise UnknownNameError(
            f"Unknown implementation {impl!r}. Expected one of {list(IMPLEMENTATIONS)}."
            f"{nearest_names(impl, IMPLEMENTATIONS)} Add your own to moelab.fused_moe.IMPLEMENTATIONS."
        )


def _route(
    logits: Tensor,
    weights: Tensor | None,
    ids: Tensor | None,
    top_k: int | None,
    renormalize: bool,
    x: Tensor,
    w13: Tensor,
) -> tuple[Tensor, Tensor]:
    if weights is not None or ids is not None or top_k is None:
        raise RoutingError(
            "router_logits came with topk_weights or topk_ids, or without top_k. Expected router_logits and top_k "
            "alone. For another rule than softmax, call a function of moelab.routing and pass its result."
        )
    # A column too many would route to an expert that w13 lacks, which counts as another rank's: a sum too small.
    wanted = (*x.shape[:1], *w13.shape[:1])
    if logits.ndim == 2 and tuple(logits.shape) != wanted:
        raise ShapeError(
            f"router_logits has shape {tuple(logits.shape)}. Expected {wanted}: a row per token, a column per expert of "
            "w13. Route the tokens that you pass; under expert parallelism pass topk_ids, mapped to this rank's experts."
        )
    return softmax_topk(logits, top_k, renormalize=renormalize)


def _check_call(call: MoECall) -> None:
    # Plain comparisons first: in eager decode every microsecond of validation is one that the GPU waits.
    from moelab.kernels import checks

    x, w13, w2, ids = call.hidden_states, call.w13, call.w2, call.topk_ids
    checks.check_shape("hidden_states", x, ("num_tokens", "hidden_size"))
    checks.check_shape("w13", w13, ("num_experts", "rows", x.shape[1]))
    rows = w13.shape[1]
    if call.gated and rows % 2:
        raise ShapeError(
            f"w13 has {rows} rows an expert. Expected an even number, gate rows and then up rows. Pass gated=False for "
            "none."
        )
    checks.check_shape("w2", w2, (w13.shape[0], x.shape[1], rows // 2 if call.gated else rows))
    checks.check_shape("topk_ids", ids, (x.shape[0], "top_k"))
    checks.check_shape("topk_weights", call.topk_weights, tuple(ids.shape))
    checks.check_dtype("hidden_states", x, checks.FLOATS)
    checks.check_dtype("w13", w13, (x.dtype,))
    checks.check_dtype("w2", w2, (x.dtype,))
    checks.check_dtype("topk_ids", ids, (torch.int32, torch.int64))
    checks.check_dtype("topk_weights", call.topk_weights, (torch.float32,))
    if ids.shape[1] < 1:
        raise RoutingError(f"topk_ids has shape {tuple(ids.shape)}. Expected at least one expert a token. Raise top_k.")
    for name, bias, size in (("b13", call.b13, rows), ("b2", call.b2, x.shape[1])):
        if bias is not None:
            checks.check_shape(name, bias, (w13.shape[0], size))
            checks.check_dtype(name, bias, (x.dtype,))
    checks.check_together(
        hidden_states=x, w13=w13, w2=w2, topk_ids=ids, topk_weights=call.topk_weights, b13=call.b13, b2=call.b2
    )


# --- torch custom op ----------------------------------------------------------------------------------------------

_CONFIG_FIELDS = tuple(KernelConfig.__dataclass_fields__)


def _pack(config: KernelConfig | None) -> list[int]:
    values = asdict(config) if config else {}
    return [-1 if values.get(name) is None else values[name] for name in _CONFIG_FIELDS] if config else []


def _unpack(values: list[int]) -> KernelConfig | None:
    named: dict[str, Any] = dict(zip(_CONFIG_FIELDS, (None if v == -1 else v for v in values), strict=False))
    return KernelConfig(**named) if values else None


@torch.library.custom_op("moelab::fused_moe", mutates_args=())
def _fused_moe_op(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    impl: str,
    config: list[int],
    down_config: list[int],
    activation: str,
    gated: bool,
    routed_scaling_factor: float,
    apply_router_weight_on_input: bool,
) -> Tensor:
    call = MoECall(
        hidden_states, w13, w2, topk_weights, topk_ids, b13, b2, activation, gated,
        routed_scaling_factor, apply_router_weight_on_input, _unpack(config), _unpack(down_config),
    )  # fmt: skip
    return IMPLEMENTATIONS[impl](call)


@_fused_moe_op.register_fake
def _(hidden_states: Tensor, *args: object) -> Tensor:
    return torch.empty_like(hidden_states)


def _through_custom_op(call: MoECall, impl: str) -> Tensor:
    return _fused_moe_op(
        call.hidden_states, call.w13, call.w2, call.topk_weights, call.topk_ids, call.b13, call.b2, impl,
        _pack(call.config), _pack(call.down_config), call.activation, call.gated,
        call.routed_scaling_factor, call.apply_router_weight_on_input,
    )  # fmt: skip


def available_implementations(dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """The names in IMPLEMENTATIONS that run in this process on `dtype`, built-in ones only judged."""
    mode = runtime.current().mode
    triton_runs = mode == "gpu" or (mode == "interpreter" and dtype != torch.bfloat16)
    return tuple(name for name in IMPLEMENTATIONS if name != "triton" or triton_runs)
