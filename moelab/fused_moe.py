"""The public op: router logits or top-k in, hidden states out, by an implementation named in a dict.

    from moelab.fused_moe import fused_moe
    out = fused_moe(hidden_states, w13, w2, router_logits=logits, top_k=8)

No implementation is ever replaced by another: what cannot run raises. Under torch.compile the call becomes the
custom op `moelab::fused_moe`, opaque to the compiler; in eager mode it is a plain Python call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import asdict
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moelab import runtime, torch_layers
from moelab.config import KernelConfig
from moelab.errors import (
    ConfigError,
    RoutingError,
    RuntimeModeError,
    ShapeError,
    UnknownNameError,
    nearest_names,
)
from moelab.pipelines import NEED_TMA, PIPELINES
from moelab.pipelines.call import MoECall
from moelab.reference import check_activation
from moelab.routers import softmax_topk
from moelab.routing import check_ids


def _tensors(call: MoECall) -> tuple[Any, ...]:
    """The arguments that every layer of moelab.torch_layers takes."""
    return (
        call.hidden_states, call.w13, call.w2, call.topk_weights, call.topk_ids, call.b13, call.b2,
        call.activation, call.gated, call.routed_scaling_factor, call.apply_router_weight_on_input,
    )  # fmt: skip


def _torch(call: MoECall) -> Tensor:
    """A loop over experts in eager torch. Synchronises with the host for each expert: no CUDA graph takes it."""
    return torch_layers.loop_layer(*_tensors(call))


@functools.cache
def _compile(layer: Callable[..., Tensor]) -> Callable[..., Tensor]:
    return torch.compile(layer, dynamic=True)


def _compiled(call: MoECall) -> Tensor:
    """torch.compile of `torch_layers.static_layer`; takes CUDA graphs."""
    layer = torch_layers.static_layer(call.hidden_states.dtype, call.w13, call.w2)
    return _compile(layer)(*_tensors(call))


def _fast(call: MoECall) -> Tensor:
    """Everything in one launch on Hopper; see `moelab.pipelines.fast`."""
    from moelab.pipelines.fast import fast_pipeline

    return fast_pipeline(call)


IMPLEMENTATIONS: dict[str, Callable[[MoECall], Tensor]] = {
    **PIPELINES,
    "torch": _torch,
    "compiled": _compiled,
}

HOPPER_ONLY: dict[str, Callable[[MoECall], Tensor]] = {"fast": _fast}
"""By name only, never among "all": what one generation of chips alone runs, and there not every layer."""


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
    impl: a name in IMPLEMENTATIONS: "triton" (default), the same with weights by TMA ("tma"), "split_k_atomic",
    "split_k_workspace"; with the activation inside GEMM1 and GEMM2 over sorted rows: "gated", "gated_tma", and with
    atomic sums over slots in float32 "gated_atomic", "gated_tma_atomic", in hidden_states' dtype "gated_atomic_out",
    which rounds every sum and may err more than torch; "fast", what is recorded fastest on Hopper for the batch
    (sm_90; bfloat16 or float16, silu-gated, no biases, H and N multiples of 8); "torch", "compiled". Those with "tma" need
    sm_90 or later, and H and N times the element's bytes to be multiples of 16.
    config, down_config: for GEMM1 and GEMM2 of those made of kernels, without them sglang's default rule, and the first
    for both where only it is given; the Split-K ones take SPLIT_K from each. "gated" and its kin count gate and up rows
    together as BLOCK_SIZE_N, at least 32. "fast" chooses its form by the batch and the tuned files, and the classic layer with
    the configs given where none of its forms serves (`moelab.pipelines.fast.choose` says why), and torch's own forms have
    nothing to configure.
    check_routing: look for ids out of range. None means always on CPU, and never on a GPU, where it would
    synchronise with the host.
    Returns (M, H) in hidden_states' dtype. Deterministic, but for those with "atomic" in their name on a GPU. Only
    "torch" and "compiled" have a backward.

    Raises UnknownNameError, ShapeError, DtypeError, DeviceError, LayoutError, RoutingError, ConfigError,
    SharedMemoryError or RuntimeModeError, each saying what was expected.
    """
    _check_impl(impl)
    _check_configs(config, down_config)
    if router_logits is not None:
        topk_weights, topk_ids = _route(router_logits, topk_weights, topk_ids, top_k, renormalize, hidden_states, w13)
    elif top_k is not None and topk_ids is not None and top_k != topk_ids.shape[-1]:
        raise RoutingError(
            f"top_k = {top_k} but topk_ids has shape {tuple(topk_ids.shape)}. Expected top_k columns. Leave top_k out: it "
            "goes with router_logits."
        )
    if topk_weights is None or topk_ids is None:
        raise RoutingError(
            "No routing given. Expected topk_weights and topk_ids, or router_logits and top_k. Pass one of the pairs."
        )
    call = MoECall(
        hidden_states, w13, w2, topk_weights, topk_ids, b13, b2, activation, gated,
        routed_scaling_factor, apply_router_weight_on_input, config, down_config,
    )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    if compiling:
        _check_call(call)
    else:
        _check_once(call)
    _check_grad(call, impl, compiling)
    if check_routing or (check_routing is None and not compiling and hidden_states.device.type == "cpu"):
        check_ids(topk_ids, w13.shape[0])
    if call.num_tokens == 0:
        return torch.empty_like(hidden_states)
    if compiling:
        return _through_custom_op(call, impl)
    return _implementation(impl)(call)


def _implementation(impl: str) -> Callable[[MoECall], Tensor]:
    return IMPLEMENTATIONS.get(impl) or HOPPER_ONLY[impl]


def _check_impl(impl: str) -> None:
    if impl not in IMPLEMENTATIONS and impl not in HOPPER_ONLY:
        known = [*IMPLEMENTATIONS, *HOPPER_ONLY]
        raise UnknownNameError(
            f"Unknown implementation {impl!r}. Expected one of {known}.{nearest_names(impl, known)} "
            "Add your own to moelab.fused_moe.IMPLEMENTATIONS."
        )


def _check_configs(*configs: KernelConfig | None) -> None:
    for config in configs:
        if config is not None and not isinstance(config, KernelConfig):
            raise ConfigError(
                f"config is a {type(config).__name__}. Expected a KernelConfig or None. Build one with "
                "KernelConfig.from_json(entry)."
            )


def _check_grad(call: MoECall, impl: str, compiling: bool) -> None:
    """Refuse to lose a gradient: only plain torch has a backward."""
    if not torch.is_grad_enabled() or (impl in ("torch", "compiled") and not compiling):
        return
    tensors = {"hidden_states": call.hidden_states, "w13": call.w13, "w2": call.w2, "topk_weights": call.topk_weights}
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise RuntimeModeError(
                f"{name} requires a gradient, and impl={impl!r} has no backward. Expected inference. Call it under "
                "torch.no_grad() or torch.inference_mode(), or use impl='torch' outside torch.compile."
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


def _check_once(call: MoECall) -> None:
    """`_check_call`, once for each signature: in eager decode every microsecond of it is one that the GPU waits."""
    launch = _launch_room()
    tensors = launch.signature(
        call.hidden_states, call.w13, call.w2, call.topk_weights, call.topk_ids, call.b13, call.b2
    )
    launch.checked(("fused_moe", call.activation, call.gated, tensors), lambda: _check_call(call))


@functools.cache
def _launch_room() -> ModuleType:
    """moelab.kernels.launch, which imports triton: not before the first call."""
    from moelab.kernels import launch

    return launch


def _check_call(call: MoECall) -> None:
    from moelab.kernels import checks

    check_activation(call.activation, call.gated)
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
    if hidden_states.device.type == "cpu":
        check_ids(topk_ids, w13.shape[0])
    return _implementation(impl)(call)


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
    """The names in IMPLEMENTATIONS that run in this process on `dtype`; only built-in ones are judged."""
    mode = runtime.current().mode
    runs = dict.fromkeys(PIPELINES, runtime.runs_kernels(dtype))
    if mode == "gpu":
        from moelab.kernels import checks

        target = checks.current_target()
        runs |= dict.fromkeys(NEED_TMA, target is not None and target.has_tma)
    return tuple(name for name in IMPLEMENTATIONS if runs.get(name, True))
