"""The public op: router logits or top-k in, hidden states out, by an implementation named in a table.

    from moelab.fused_moe import fused_moe
    out = fused_moe(hidden_states, w13, w2, router_logits=logits, top_k=8)

No implementation is ever replaced by another: what cannot run raises. Under torch.compile the call becomes the
custom op `moelab::fused_moe` (`moelab.custom_op`), opaque to the compiler; in eager mode it is a plain Python call.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelab import call_checks
from moelab.call import Config, MoECall
from moelab.custom_op import through_custom_op
from moelab.dtypes import dtype_name
from moelab.errors import RoutingError, ShapeError
from moelab.formats import PLAIN
from moelab.implementations import IMPLEMENTATIONS, LayerKind, named, taking
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
    out: Tensor | None = None,
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
    out: (M, H), hidden_states' dtype, contiguous from a multiple of 16 bytes and apart from what is read: the result is written
    there by the last kernel, without a copy (torch's own layers copy), and `out` is returned.
    check_routing: look for ids out of range. None means always on CPU, and never on a GPU, where it would
    synchronise with the host.
    Returns (M, H) in hidden_states' dtype. Deterministic, but for those that the table says are not, on a GPU. Only "torch"
    and "compiled" have a backward, over plain weights.

    Raises UnknownNameError, ShapeError, DtypeError, DeviceError, LayoutError, RoutingError, ConfigError,
    SharedMemoryError or RuntimeModeError, each saying what was expected.
    """
    named(impl)
    call_checks.check_arguments(config, down_config, top_k, impl, form)
    weights = _weights(w13, w2, b13, b2)
    optional = {name: t for name, t in weights._asdict().items() if t is not None and name != "format"}
    call_checks.require_tensors(**{"hidden_states": hidden_states, "w13": weights.w13, "w2": weights.w2, **optional})
    topk_weights, topk_ids = _routing(router_logits, topk_weights, topk_ids, top_k, renormalize, hidden_states, weights)
    if out is not None:
        call_checks.require_tensors(out=out)
    call = MoECall(
        hidden_states, weights, topk_weights, topk_ids, activation, gated,
        call_checks.scale_of(routed_scaling_factor), apply_router_weight_on_input, config, down_config,
        call_checks.expectation(expected_rows, topk_ids), form, out,
    )  # fmt: skip
    compiling = torch.compiler.is_compiling()
    if compiling:
        call_checks.check_call(call, impl)
    else:
        call_checks.check_once(call, impl)
    call_checks.check_grad(call, impl, compiling)
    if not compiling:  # a traced tensor lies nowhere: the op looks
        call_checks.check_out(call)
    if check_routing or (check_routing is None and not compiling and hidden_states.device.type == "cpu"):
        check_ids(topk_ids, weights.num_experts)
    if call.num_tokens == 0:
        return call.result()
    if compiling:
        return through_custom_op(call, impl)
    return IMPLEMENTATIONS[impl](call)


def _weights(w13: Tensor | ExpertWeights, w2: Tensor | None, b13: Tensor | None, b2: Tensor | None) -> ExpertWeights:
    if not isinstance(w13, ExpertWeights):
        # A w2 of None is told by the next check. PLAIN by name: torch 2.11 does not trace a default that is no plain value.
        return ExpertWeights(w13, w2, b13, b2, format=PLAIN)  # type: ignore[arg-type]
    if w2 is not None or b13 is not None or b2 is not None:
        raise ShapeError(
            "ExpertWeights came with w2, b13 or b2 beside it. Expected all in the one. Put them into its fields."
        )
    return w13


def _routing(
    logits: Tensor | None,
    weights: Tensor | None,
    ids: Tensor | None,
    top_k: int | None,
    renormalize: bool,
    x: Tensor,
    experts: ExpertWeights,
) -> tuple[Tensor, Tensor]:
    """Top-k weights and ids, as given or by the logits."""
    if logits is not None:
        call_checks.require_tensors(router_logits=logits)
        if weights is not None or ids is not None or top_k is None:
            raise RoutingError(
                "router_logits came with topk_weights or topk_ids, or without top_k. Expected router_logits and top_k "
                "alone. For another rule than softmax, call a function of moelab.routing and pass its result."
            )
        return _route(logits, top_k, renormalize, (*x.shape[:1], experts.num_experts))
    if weights is None or ids is None:
        raise RoutingError(
            "No routing given. Expected topk_weights and topk_ids, or router_logits and top_k. Pass one of the pairs."
        )
    call_checks.require_tensors(topk_weights=weights, topk_ids=ids)
    if top_k is not None and top_k != ids.shape[-1]:
        raise call_checks.another_top_k(top_k, ids)
    return weights, ids


def _route(logits: Tensor, top_k: int, renormalize: bool, wanted: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    # A column too many would route to an expert that w13 lacks, which counts as another rank's: a sum too small.
    if logits.ndim == 2 and tuple(logits.shape) != wanted:
        raise ShapeError(
            f"router_logits has shape {tuple(logits.shape)}. Expected {wanted}: a row per token, a column per expert of "
            "w13. Route the tokens that you pass; under expert parallelism pass topk_ids, mapped to this rank's experts."
        )
    return softmax_topk(logits, top_k, renormalize=renormalize)


def available_implementations(dtype: torch.dtype = torch.float32) -> tuple[str, ...]:
    """The implementations that run in this process on `dtype`, for a silu-gated layer without biases."""
    from moelab.kernels.checks import current_target

    return taking(LayerKind(dtype_name(dtype)), current_target())
