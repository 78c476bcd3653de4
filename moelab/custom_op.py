"""`fused_moe` as custom ops, opaque to torch.compile: moelab::fused_moe, and moelab::fused_moe_out, which writes to `out`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from moelab.call import Config, MoECall
from moelab.call_checks import check_once, check_out
from moelab.config import KernelConfig
from moelab.formats import get_format
from moelab.implementations import IMPLEMENTATIONS
from moelab.routing import check_ids
from moelab.weights import ExpertWeights

_CONFIG_FIELDS = tuple(KernelConfig.__dataclass_fields__)


def _pack(config: Config) -> list[int]:
    """[] for None, [0] for the default rule, else the fields."""
    if config is None:
        return []
    if not isinstance(config, KernelConfig):
        return [0]
    values = [getattr(config, name) for name in _CONFIG_FIELDS]
    return [-1 if value is None else value for value in values]


def _unpack(values: list[int]) -> Config:
    if len(values) < 2:
        return "default" if values else None
    named: dict[str, Any] = dict(zip(_CONFIG_FIELDS, (None if v == -1 else v for v in values), strict=False))
    return KernelConfig(**named)


_ARGUMENTS = (
    "Tensor hidden_states, Tensor w13, Tensor w2, Tensor topk_weights, Tensor topk_ids, Tensor? b13, Tensor? b2, "
    "Tensor?[] scales, str format, str impl, SymInt[] config, SymInt[] down_config, str activation, bool gated, "
    "float routed_scaling_factor, bool apply_router_weight_on_input, float? expected_rows=None, str? form=None"
)
"""Of both ops, in the order in which `_run` takes them after `out`."""


def _run(
    out: Tensor | None, hidden_states: Tensor, w13: Tensor, w2: Tensor, topk_weights: Tensor, topk_ids: Tensor,
    b13: Tensor | None, b2: Tensor | None, scales: list[Tensor | None], format: str, impl: str, config: list[int],
    down_config: list[int], activation: str, gated: bool, routed_scaling_factor: float, apply_router_weight_on_input: bool,
    expected_rows: float | None = None, form: str | None = None,
) -> Tensor:  # fmt: skip
    weights = ExpertWeights(
        w13, w2, b13, b2, scales[0], scales[1], scales[2], scales[3], get_format(format), *scales[4:]
    )
    call = MoECall(
        hidden_states, weights, topk_weights, topk_ids, activation, gated,
        routed_scaling_factor, apply_router_weight_on_input, _unpack(config), _unpack(down_config),
        expected_rows, form, out,
    )  # fmt: skip
    check_once(call, impl)
    check_out(call)
    if hidden_states.device.type == "cpu":
        check_ids(topk_ids, w13.shape[0])
    return IMPLEMENTATIONS[impl](call)


@torch.library.custom_op("moelab::fused_moe", mutates_args=(), schema=f"({_ARGUMENTS}) -> Tensor")
def _fused_moe_op(*given: Any) -> Tensor:
    return _run(None, *given)


@_fused_moe_op.register_fake
def _(hidden_states: Tensor, *given: object) -> Tensor:
    return torch.empty_like(hidden_states)


@torch.library.custom_op("moelab::fused_moe_out", mutates_args=("out",), schema=f"(Tensor(a!) out, {_ARGUMENTS}) -> ()")
def _fused_moe_out_op(out: Tensor, *given: Any) -> None:
    _run(out, *given)


@_fused_moe_out_op.register_fake
def _(*given: object) -> None:
    return None


def through_custom_op(call: MoECall, impl: str) -> Tensor:
    """The layer as one node of a compiled graph: its result, the call's `out` if it has one."""
    w = call.weights
    given = (
        call.hidden_states, w.w13, w.w2, call.topk_weights, call.topk_ids, w.b13, w.b2,
        [w.w13_scale, w.w2_scale, w.w13_zero_point, w.w2_zero_point, w.a1_scale, w.a2_scale], w.format.name, impl,
        _pack(call.config), _pack(call.down_config), call.activation, call.gated,
        call.routed_scaling_factor, call.apply_router_weight_on_input, call.expected_rows, call.form,
    )  # fmt: skip
    if call.out is None:
        return _fused_moe_op(*given)
    _fused_moe_out_op(call.out, *given)
    return call.out
