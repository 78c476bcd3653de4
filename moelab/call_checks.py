"""What a call of `fused_moe` is held against before it runs: each error says what was expected, and what to do."""

from __future__ import annotations

import functools
import numbers
from dataclasses import replace
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from moelab.call import MoECall
from moelab.config import KernelConfig
from moelab.dtypes import dtype_name
from moelab.errors import ConfigError, DtypeError, LayoutError, RoutingError, RuntimeModeError, ShapeError
from moelab.implementations import IMPLEMENTATIONS, LayerKind, named, not_taken, taking
from moelab.reference import check_activation

OUT_BYTES = 16
"""What `out` begins at a multiple of: kernels write so many bytes at once."""


def require_tensors(**given: Any) -> None:
    """Raise DtypeError for what is no tensor, LayoutError for one that is not strided."""
    for name, value in given.items():
        if not isinstance(value, Tensor):
            raise DtypeError(
                f"{name} is {type(value).__name__}. Expected a torch.Tensor. Make one with torch.as_tensor, or leave out what "
                "is optional."
            )
        if value.layout is not torch.strided:
            raise LayoutError(f"{name} is {value.layout}. Expected a strided tensor. Call .to_dense() on it.")


def scale_of(factor: Any) -> float:
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


def another_top_k(top_k: int, topk_ids: Tensor) -> RoutingError:
    """For a top_k beside ids of another number of columns."""
    return RoutingError(
        f"top_k = {top_k} but topk_ids has shape {tuple(topk_ids.shape)}. Expected top_k columns. Leave top_k out: it goes with "
        "router_logits."
    )


def expectation(rows: Any, topk_ids: Tensor) -> float | None:
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


def check_arguments(config: Any, down_config: Any, top_k: Any, impl: str, form: Any) -> None:
    """Raise ConfigError or RoutingError for what is no config, no number of experts, or no form of that implementation."""
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


def check_grad(call: MoECall, impl: str, compiling: bool) -> None:
    """Refuse to lose a gradient: only plain torch has a backward, and none through codes or `out`."""
    plain = call.weights.format.is_plain
    backward = IMPLEMENTATIONS[impl].backward and plain and call.out is None
    if not torch.is_grad_enabled() or (backward and not compiling):
        return
    tensors = {"hidden_states": call.hidden_states, **call.weights.tensors(), "topk_weights": call.topk_weights}
    tensors |= {} if call.out is None else {"out": call.out}
    why = " with out" if call.out is not None else "" if plain else " over quantised weights"
    for name, tensor in tensors.items():
        if tensor.requires_grad:
            raise RuntimeModeError(
                f"{name} requires a gradient, and impl={impl!r} has no backward{why}. Expected inference. Call it under "
                "torch.no_grad() or torch.inference_mode()"
                f"{', or use impl=' + repr('torch') + ' outside torch.compile' if not why else ''}."
            )


def check_once(call: MoECall, impl: str) -> None:
    """`check_call`, once for each signature: in eager decode every microsecond of it is one that the GPU waits."""
    launch, w = _launching(), call.weights
    tensors = launch.signature(
        call.hidden_states, w.w13, w.w2, call.topk_weights, call.topk_ids, w.b13, w.b2,
        w.w13_scale, w.w2_scale, w.w13_zero_point, w.w2_zero_point, w.a1_scale, w.a2_scale,
    )  # fmt: skip
    launch.checked(("fused_moe", impl, call.activation, call.gated, w.format, tensors), lambda: check_call(call, impl))


@functools.cache
def _launching() -> ModuleType:
    """moelab.kernels.launch, which imports triton: not before the first call."""
    from moelab.kernels import launch

    return launch


def check_call(call: MoECall, impl: str) -> None:
    """Raise unless the tensors are a layer that the implementation takes somewhere."""
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


def check_out(call: MoECall) -> None:
    """Raise unless the result may be written to the call's `out`, if it has one: each time, for where tensors lie is no part of a
    signature."""
    out, x = call.out, call.hidden_states
    if out is None:
        return
    from moelab.kernels import checks

    checks.check_out(out, x, tuple(x.shape))
    if not out.is_contiguous() or out.data_ptr() % OUT_BYTES:
        raise LayoutError(
            f"out has strides {out.stride()} and begins {out.data_ptr() % OUT_BYTES} bytes past a multiple of {OUT_BYTES}. "
            "Expected contiguous rows at one. Pass a whole tensor, or rows of one, not columns."
        )
    read = {"hidden_states": x, "topk_weights": call.topk_weights, "topk_ids": call.topk_ids, **call.weights.tensors()}
    begin, end = _bytes_of(out)
    for name, tensor in read.items():
        first, last = _bytes_of(tensor)
        if first < end and begin < last:
            raise LayoutError(
                f"out and {name} share memory. Expected one of its own: {name} is read while the result is written. Pass another."
            )


def _bytes_of(tensor: Tensor) -> tuple[int, int]:
    """Addresses of the first byte and behind the last, of a tensor as it lies."""
    begin = tensor.data_ptr()
    if not tensor.numel():
        return begin, begin
    last = sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return begin, begin + (last + 1) * tensor.element_size()
