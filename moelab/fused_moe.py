"""The public op: router logits or top-k in, hidden states out, by an implementation named in a table.

    from moelab.fused_moe import fused_moe
    out = fused_moe(hidden_states, w13, w2, router_logits=logits, top_k=8)

No implementation is ever replaced by another: what cannot run raises. Under torch.compile the call becomes the
custom op `moelab::fused_moe`, opaque to the compiler; in eager mode it is a plain Python call.
"""

from __future__ import annotations

import functools
import numbers
from dataclasses import asdict, replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moelab.call import Config, MoECall
from moelab.config import KernelConfig
from moelab.dtypes import dtype_name
from moelab.errors import ConfigError, DtypeError, LayoutError, RoutingError, RuntimeModeError, ShapeError
from moelab.formats import get_format
from moelab.implementations import IMPLEMENTATIONS, LayerKind, named, not_taken, taking
from moelab.reference import check_activation
from moelab.routers import softmax_topk
from moelab.routing import check_ids
from moelab.weights import ExpertWeights


def fused_moe(
    hidden_states: Tensor,
    w13: Tensor | ExpertWeights,
    w2: Tensor | None = None,
    *,
    topk_weights: Tensor | None = None,
    topk_ids: Tensor | None = None,
    router_logits: Tensor | None = None,
    top_k: int | None = None,
    renormalize: bool = True,
    impl: str = "triton",
    config: Config = None,
    down_config: Config = None,
    activation: str = "silu",
    gated: bool = True,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    apply_router_weight_on_input: bool = False,
    expected_rows: float | None = None,
    form: str | None = None,
    check_routing: bool | None = None,
) -> Tensor:
    """out[t] = scale * sum over slots j of weight[t, j] * w2[e] @ activation(w13[e] @ hidden_states[t]), e = ids[t, j].

    hidden_states: (M, H), bfloat16, float16, float32 or float64, contiguous. w13: (E, 2N, H), gate rows and then up
    rows, or (E, N, H) with gated=False; w2: (E, H, N); b13 (E, 2N) and b2 (E, H) optional; all in one dtype. Or, in place of
    the four, one `ExpertWeights`, also of a quantised format, which "triton" and "torch" take: `moelab.quantised_weights` makes
    them, and its `require_values` looks, once, for scales that no checkpoint has.
    Routing: either topk_weights (M, k), float32 or hidden_states' dtype, and topk_ids (M, k) int32 or int64, or router_logits
    (M, E) with top_k (softmax, then top-k, weights renormalised unless told otherwise).
    An id of -1 is another rank's expert and adds nothing, whatever its weight, NaN and infinity too; NaN and infinity go
    where plain arithmetic on a token's chosen experts takes them, and nowhere else: not from another token, nor from rows of
    weights that this token did not choose.
    impl: a name in moelab.implementations.IMPLEMENTATIONS, where each says what it is and what it takes; "triton" is the
    layer of sglang and vLLM, "fast" what is recorded fastest on Hopper for the batch, "weight_only" for few rows of quantised
    experts, leaving activations as they are in every format, "torch" a loop over experts.
    "fast" runs large batches in one persistent launch whose CTAs wait for each other, so all of them must be resident on the GPU
    at once: launches of one process on several streams, or in branches of one captured graph, are ordered by moelab; do not
    replay two such graphs (or a graph and eager calls) at the same time, and do not share the GPU through MPS or green contexts.
    A wait that lasts seconds ends the launch with KernelTimeoutError, and the process's CUDA context with it.
    config, down_config: for GEMM1 and GEMM2 of those made of Triton kernels; the first for both where only it is given. None
    looks up the tuned file for this device, these sizes and this batch size, as the servers do, once each; sglang's default
    rule serves where there is none, or where "default" asks for it. The Split-K ones take SPLIT_K from each. "gated" and its
    kin count gate and up rows together as BLOCK_SIZE_N, at least 32. "fast" and "weight_only" choose theirs, torch has none.
    expected_rows: of an expert, which those two choose by; None: M * k / E; where other ranks have experts too, M * k over the
    model's. form: of "fast", a kind or one as `moelab explain --kernel fast` names it; None: MOELAB_FAST_FORM, or the fastest.
    check_routing: look for ids out of range. None means always on CPU, and never on a GPU, where it would
    synchronise with the host.
    Returns (M, H) in hidden_states' dtype. Deterministic, but for those that the table says are not, on a GPU. Only "torch"
    and "compiled" have a backward, over plain weights.

    Raises UnknownNameError, ShapeError, DtypeError, DeviceError, LayoutError, RoutingError, ConfigError,
    SharedMemoryError or RuntimeModeError, each saying what was expected.
    """
    named(impl)
    _check_arguments(config, down_config, top_k, impl, form)
    weights = _weights(w13, w2, b13, b2)
    optional = {name: t for name, t in weights._asdict().items() if t is not None and name != "format"}
    _require_tensors(**{"hidden_states": hidden_states, "w13": weights.w13, "w2": weights.w2, **optional})
    if router_logits is not None:
        _require_tensors(router_logits=router_logits)
        topk_weights, topk_ids = _route(
            router_logits, topk_weights, topk_ids, top_k, renormalize, hidden_states, weights
        )
    elif top_k is not None and topk_ids is not None and top_k != topk_ids.shape[-1]:
        raise _another_top_k(top_k, topk_ids)
    if topk_weights is None or topk_ids is None:
        raise RoutingError(
            "No routing given. Expected topk_weights and topk_ids, or router_logits and top_k. Pass one of the pairs."
        )
    _require_tensors(topk_weights=topk_weights, topk_ids=topk_ids)
    call = MoECall(
        hidden_states, weights, topk_weights, topk_ids, activation, gated,
        _scale(routed_scaling_factor), apply_router_weight_on_input, config, down_config,
        _expectation(expected_rows, topk_ids), form,
    )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    if compiling:
        _check_call(call, impl)
    else:
        _check_once(call, impl)
    _check_grad(call, impl, compiling)
    if check_routing or (check_routing is None and not compiling and hidden_states.device.type == "cpu"):
        check_ids(topk_ids, weights.num_experts)
    if call.num_tokens == 0:
        return torch.empty_like(hidden_states)
    if compiling:
        return _through_custom_op(call, impl)
    return IMPLEMENTATIONS[impl](call)


def _weights(w13: Tensor | ExpertWeights, w2: Tensor | None, b13: Tensor | None, b2: Tensor | None) -> ExpertWeights:
    if not isinstance(w13, ExpertWeights):
        return ExpertWeights(w13, w2, b13, b2)  # type: ignore[arg-type]  # a w2 of None is told by the next check
    if w2 is not None or b13 is not None or b2 is not None:
        raise ShapeError(
            "ExpertWeights came with w2, b13 or b2 beside it. Expected all in the one. Put them into its fields."
        )
    return w13


def _require_tensors(**given: Any) -> None:
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise DtypeError(
                f"{name} is {type(value).__name__}. Expected a torch.Tensor. Make one with torch.as_tensor, or leave out what "
                "is optional."
            )
        if value.layout is not torch.strided:
            raise LayoutError(f"{name} is {value.layout}. Expected a strided tensor. Call .to_dense() on it.")


def _scale(factor: Any) -> float:
    """The factor as a float: an int and a float of one value are one compiled kernel."""
    if type(factor) is float:
        return factor
    try:
        if isinstance(factor, bool) or not isinstance(factor, numbers.Real):
            raise TypeError
        return float(factor)
    except (TypeError, OverflowError) as error:
        shown = repr(factor) if len(repr(factor)) < 40 else f"{repr(factor)[:30]}..."
        raise ConfigError(
            f"routed_scaling_factor is {shown} ({type(factor).__name__}). Expected a number that a float holds. Pass 1.0 for "
            "none."
        ) from error


def _another_top_k(top_k: int, topk_ids: Tensor) -> RoutingError:
    return RoutingError(
        f"top_k = {top_k} but topk_ids has shape {tuple(topk_ids.shape)}. Expected top_k columns. Leave top_k out: it goes with "
        "router_logits."
    )


def _expectation(rows: Any, topk_ids: Tensor) -> float | None:
    """Rows expected of an expert as a float, if any are said."""
    if rows is None:
        return None
    num_tokens = topk_ids.shape[0] if topk_ids.ndim else 0
    number = isinstance(rows, numbers.Real) and not isinstance(rows, bool)
    if not number or not (0 < rows <= num_tokens or num_tokens == 0):
        raise RoutingError(
            f"expected_rows is {rows!r:.40} of {num_tokens} tokens. Expected a number above 0 and at most theirs: an expert "
            "gets a token once. Pass num_tokens * top_k over the number of the model's experts, or leave it out."
        )
    return float(rows)


def _check_arguments(config: Any, down_config: Any, top_k: Any, impl: str, form: Any) -> None:
    if form is not None and (impl != "fast" or not isinstance(form, str)):
        raise ConfigError(
            f"form={form!r:.60} came with impl={impl!r}. Expected a name, with impl='fast', which has several. Leave it out."
        )
    for one in (config, down_config):
        if one is not None and one != "default" and not isinstance(one, KernelConfig):
            raise ConfigError(
                f"config is {one!r:.60}. Expected a KernelConfig, None or 'default'. Build one with "
                "KernelConfig.from_json(entry)."
            )
    if top_k is not None and (isinstance(top_k, bool) or not isinstance(top_k, int)):
        raise RoutingError(f"top_k is {top_k!r:.60}. Expected a whole number of experts. Pass an int.")


def _check_grad(call: MoECall, impl: str, compiling: bool) -> None:
    """Refuse to lose a gradient: only plain torch has a backward, and none through codes."""
    plain = call.weights.format.is_plain
    if not torch.is_grad_enabled() or (IMPLEMENTATIONS[impl].backward and plain and not compiling):
        return
    tensors = {"hidden_states": call.hidden_states, **call.weights.tensors(), "topk_weights": call.topk_weights}
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise RuntimeModeError(
                f"{name} requires a gradient, and impl={impl!r} has no backward{'' if plain else ' over quantised weights'}. "
                "Expected inference. Call it under torch.no_grad() or torch.inference_mode()"
                f"{', or use impl=' + repr('torch') + ' outside torch.compile' if plain else ''}."
            )


def _route(
    logits: Tensor,
    weights: Tensor | None,
    ids: Tensor | None,
    top_k: int | None,
    renormalize: bool,
    x: Tensor,
    experts: ExpertWeights,
) -> tuple[Tensor, Tensor]:
    if weights is not None or ids is not None or top_k is None:
        raise RoutingError(
            "router_logits came with topk_weights or topk_ids, or without top_k. Expected router_logits and top_k "
            "alone. For another rule than softmax, call a function of moelab.routing and pass its result."
        )
    # A column too many would route to an expert that w13 lacks, which counts as another rank's: a sum too small.
    wanted = (*x.shape[:1], experts.num_experts)
    if logits.ndim == 2 and tuple(logits.shape) != wanted:
        raise ShapeError(
            f"router_logits has shape {tuple(logits.shape)}. Expected {wanted}: a row per token, a column per expert of "
            "w13. Route the tokens that you pass; under expert parallelism pass topk_ids, mapped to this rank's experts."
        )
    return softmax_topk(logits, top_k, renormalize=renormalize)


def _check_once(call: MoECall, impl: str) -> None:
    """`_check_call`, once for each signature: in eager decode every microsecond of it is one that the GPU waits."""
    launch, w = _launching(), call.weights
    tensors = launch.signature(
        call.hidden_states, w.w13, w.w2, call.topk_weights, call.topk_ids, w.b13, w.b2,
        w.w13_scale, w.w2_scale, w.w13_zero_point, w.w2_zero_point, w.a1_scale, w.a2_scale,
    )  # fmt: skip
    launch.checked(("fused_moe", impl, call.activation, call.gated, w.format, tensors), lambda: _check_call(call, impl))


@functools.cache
def _launching() -> ModuleType:
    """moelab.kernels.launch, which imports triton: not before the first call."""
    from moelab.kernels import launch

    return launch


def _check_call(call: MoECall, impl: str) -> None:
    from moelab.kernels import checks

    check_activation(call.activation, call.gated)
    x, ids, w = call.hidden_states, call.topk_ids, call.weights
    checks.check_shape("hidden_states", x, ("num_tokens", "hidden_size"))
    hidden = x.shape[1] // (1 if w.format.is_plain else w.format.values_per_byte)
    checks.check_shape("w13", w.w13, ("num_experts", "rows", hidden))
    rows = w.w13.shape[1]
    if call.gated and rows % 2:
        raise ShapeError(
            f"w13 has {rows} rows an expert. Expected an even number, gate rows and then up rows. Pass gated=False for "
            "none."
        )
    inner = rows // 2 if call.gated else rows
    if w.format.is_plain:
        checks.check_shape("w2", w.w2, (w.num_experts, x.shape[1], inner))
    for name, sizes in (("hidden_states", x.shape[1:]), ("w13", w.w13.shape), ("w2", w.w2.shape)):
        if not all(sizes):
            raise ShapeError(
                f"{name} has shape {tuple(getattr(w, name, x).shape)}. Expected no size of 0 but the number of tokens. Give "
                "the layer at least one expert, row and column."
            )
    checks.check_dtype("hidden_states", x, checks.FLOATS)
    _require_taken(call, impl)
    checks.check_shape("topk_ids", ids, (x.shape[0], "top_k"))
    checks.check_shape("topk_weights", call.topk_weights, tuple(ids.shape))
    if w.format.is_plain:
        checks.check_dtype("w13", w.w13, (x.dtype,))
        checks.check_dtype("w2", w.w2, (x.dtype,))
    else:
        checks.check_stored("w13", w.up, w.num_experts, rows, x.shape[1])
        checks.check_stored("w2", w.down, w.num_experts, x.shape[1], inner)
        checks.check_static_scales(w)
    checks.check_dtype("topk_ids", ids, (torch.int32, torch.int64))
    checks.check_routed(call.topk_weights, x.dtype)
    if ids.shape[1] < 1:
        raise RoutingError(f"topk_ids has shape {tuple(ids.shape)}. Expected at least one expert a token. Raise top_k.")
    for name, bias, size in (("b13", w.b13, rows), ("b2", w.b2, x.shape[1])):
        if bias is not None:
            checks.check_shape(name, bias, (w.num_experts, size))
            checks.check_dtype(name, bias, (x.dtype,))
    checks.check_together(hidden_states=x, topk_ids=ids, topk_weights=call.topk_weights, **w.tensors())


def kind_of(call: MoECall) -> LayerKind:
    """What decides which implementations take the call."""
    x, w = call.hidden_states, call.weights
    dtype = dtype_name(x.dtype)
    return LayerKind(dtype, w.format, call.activation, call.gated, w.has_bias, x.shape[1], call.moe_intermediate_size)


def _require_taken(call: MoECall, impl: str) -> None:
    """Raise DtypeError or ConfigError for a kind of layer that the implementation takes nowhere.

    What sizes it takes, and what this chip lacks, its kernels tell.
    """
    one, kind = named(impl), kind_of(call)
    if what := not_taken(one, replace(kind, hidden_size=None, moe_intermediate_size=None)):
        from moelab.kernels.checks import current_target

        others = taking(kind, current_target())
        error = ConfigError if kind.dtype in one.dtypes else DtypeError
        raise error(
            f"impl={impl!r} was asked for {what}, which it does not take. Expected one of those that do and run here: "
            f"{', '.join(others) or 'none'}. Name one of them."
        )


# --- torch custom op ----------------------------------------------------------------------------------------------

_CONFIG_FIELDS = tuple(KernelConfig.__dataclass_fields__)


def _pack(config: Config) -> list[int]:
    """[] for None, [0] for the default rule, else the fields."""
    if config is None:
        return []
    if not isinstance(config, KernelConfig):
        return [0]
    values = asdict(config)
    return [-1 if values.get(name) is None else values[name] for name in _CONFIG_FIELDS]


def _unpack(values: list[int]) -> Config:
    if len(values) < 2:
        return "default" if values else None
    named: dict[str, Any] = dict(zip(_CONFIG_FIELDS, (None if v == -1 else v for v in values), strict=False))
    return KernelConfig(**named)


@torch.library.custom_op("moelab::fused_moe", mutates_args=())
def _fused_moe_op(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    b13: Tensor | None,
    b2: Tensor | None,
    scales: list[Tensor | None],
    format: str,
    impl: str,
    config: list[int],
    down_config: list[int],
    activation: str,
    gated: bool,
    routed_scaling_factor: float,
    apply_router_weight_on_input: bool,
    expected_rows: float | None = None,
    form: str | None = None,
) -> Tensor:
    weights = ExpertWeights(
        w13, w2, b13, b2, scales[0], scales[1], scales[2], scales[3], get_format(format), *scales[4:]
    )
    call = MoECall(
        hidden_states, weights, topk_weights, topk_ids, activation, gated,
        routed_scaling_factor, apply_router_weight_on_input, _unpack(config), _unpack(down_config),
        expected_rows, form,
    )  # fmt: skip
    _check_once(call, impl)
    if hidden_states.device.type == "cpu":
        check_ids(topk_ids, w13.shape[0])
    return IMPLEMENTATIONS[impl](call)


@_fused_moe_op.register_fake
def _(hidden_states: Tensor, *args: object) -> Tensor:
    return torch.empty_like(hidden_states)


def _through_custom_op(call: MoECall, impl: str) -> Tensor:
    w = call.weights
    return _fused_moe_op(
        call.hidden_states, w.w13, w.w2, call.topk_weights, call.topk_ids, w.b13, w.b2,
        [w.w13_scale, w.w2_scale, w.w13_zero_point, w.w2_zero_point, w.a1_scale, w.a2_scale], w.format.name, impl,
        _pack(call.config), _pack(call.down_config), call.activation, call.gated,
        call.routed_scaling_factor, call.apply_router_weight_on_input, call.expected_rows, call.form,
    )  # fmt: skip


def available_implementations(dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """The implementations that run in this process on `dtype`, for a silu-gated layer without biases."""
    from moelab.kernels.checks import current_target

    return taking(LayerKind(dtype_name(dtype)), current_target())
