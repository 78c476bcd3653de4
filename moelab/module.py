"""FusedMoE: the op as a torch module, with weights taken from a Hugging Face experts block."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moelab.config import KernelConfig
from moelab.errors import RoutingError, ShapeError, UnknownNameError
from moelab.fused_moe import fused_moe
from moelab.reference import check_activation
from moelab.shapes import MoEShape


class FusedMoE(nn.Module):
    """The experts of one MoE layer; forward takes hidden states and a routing, or router logits.

    Parameters w13 (E, 2N, H) ((E, N, H) ungated), w2 (E, H, N), and with bias=True b13 (E, 2N), b2 (E, H).
    impl, config and down_config are those of moelab.fused_moe.fused_moe, and may be set between calls.
    """

    def __init__(
        self,
        num_experts: int,
        top_k: int,
        hidden_size: int,
        moe_intermediate_size: int,
        *,
        activation: str = "silu",
        gated: bool = True,
        bias: bool = False,
        impl: str = "triton",
        routed_scaling_factor: float = 1.0,
        renormalize: bool = True,
        apply_router_weight_on_input: bool = False,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation, gated)
        if not 1 <= top_k <= num_experts:
            raise RoutingError(
                f"top_k = {top_k} with {num_experts} experts. Expected 1 <= top_k <= num_experts. Take it from the model's "
                "config.json."
            )
        rows = (2 if gated else 1) * moe_intermediate_size

        def empty(*size: int) -> nn.Parameter:
            return nn.Parameter(torch.empty(size, dtype=dtype, device=device), requires_grad=False)

        self.w13 = empty(num_experts, rows, hidden_size)
        self.w2 = empty(num_experts, hidden_size, moe_intermediate_size)
        self.b13 = empty(num_experts, rows) if bias else None
        self.b2 = empty(num_experts, hidden_size) if bias else None
        self.top_k, self.activation, self.gated = top_k, activation, gated
        self.impl, self.routed_scaling_factor, self.renormalize = impl, routed_scaling_factor, renormalize
        self.apply_router_weight_on_input = apply_router_weight_on_input
        self.config: KernelConfig | None = None
        self.down_config: KernelConfig | None = None

    @classmethod
    def from_shape(cls, shape: MoEShape, *, bias: bool = False, **options: Any) -> FusedMoE:
        """An empty module of a shape's sizes and activation."""
        return cls(
            shape.num_experts, shape.top_k, shape.hidden_size, shape.moe_intermediate_size,
            activation=shape.activation, gated=shape.gated, bias=bias, **options,
        )  # fmt: skip

    @classmethod
    def from_hf(
        cls,
        block: nn.Module | Mapping[str, Tensor],
        *,
        top_k: int,
        activation: str | None = None,
        interleaved: bool | None = None,
        transposed: bool | None = None,
        **options: Any,
    ) -> FusedMoE:
        """A module with the weights of a Hugging Face experts block, or of its state dict.

        Understands fused tensors, `gate_up_proj` and `down_proj` (Mixtral, Qwen3-MoE and others in transformers 5;
        transposed in Llama-4 and gpt-oss), `up_proj` and `down_proj` without a gate (NemotronH), and one set per expert
        (`0.gate_proj.weight`, `0.up_proj.weight`, `0.down_proj.weight`, or Mixtral's w1, w3, w2).
        activation: the model's ("swiglu_oai" for gpt-oss); None asks the block's act_fn.
        interleaved: whether gate and up rows alternate, as in gpt-oss; None asks the block, and where biases come as
        bare tensors, which gpt-oss has and others have too, raises rather than guess.
        transposed: whether the block stores (E, H, 2N) and (E, N, H); None asks the block or the sizes, which tell
        wherever there is a gate.
        Llama-4 weighs the input of its experts: pass apply_router_weight_on_input=True.
        Raises ShapeError where the tensors are none of these, or more than these (a norm after the experts, say),
        UnknownNameError where the activation cannot be told.
        """
        activation = activation or _asks_activation(block)
        _refuse_other_clamp(block, activation)
        state = dict(block.state_dict()) if isinstance(block, nn.Module) else dict(block)
        state = {key.removeprefix("experts."): tensor for key, tensor in state.items()}
        if interleaved is None:
            interleaved = _asks_interleaved(block, state)
        if transposed is None:
            transposed = getattr(block, "is_transposed", None)
        tensors = _fused(state, transposed) if _named(state, "down_proj") is not None else _per_expert(state)
        if interleaved:
            for name in ("w13", "b13"):
                if name in tensors:
                    tensors[name] = torch.cat([tensors[name][:, ::2], tensors[name][:, 1::2]], dim=1)
        w13, w2 = tensors["w13"], tensors["w2"]
        (experts, rows, hidden), inner = w13.shape, w2.shape[2]
        module = cls(
            experts, top_k, hidden, inner, activation=activation, gated=rows == 2 * inner, bias="b13" in tensors,
            dtype=w13.dtype, device=w13.device, **options,
        )  # fmt: skip
        for name, tensor in tensors.items():
            getattr(module, name).data.copy_(tensor)
        return module

    def forward(
        self,
        hidden_states: Tensor,
        router_logits: Tensor | None = None,
        *,
        topk_weights: Tensor | None = None,
        topk_ids: Tensor | None = None,
    ) -> Tensor:
        """(..., H) -> (..., H). Routing as in fused_moe: router_logits (tokens, E), or topk_weights and topk_ids."""
        flat = hidden_states.reshape(-1, hidden_states.shape[-1])
        out = fused_moe(
            flat, self.w13, self.w2,
            router_logits=router_logits, top_k=self.top_k if router_logits is not None else None,
            topk_weights=topk_weights, topk_ids=topk_ids, renormalize=self.renormalize,
            impl=self.impl, config=self.config, down_config=self.down_config,
            activation=self.activation, gated=self.gated, b13=self.b13, b2=self.b2,
            routed_scaling_factor=self.routed_scaling_factor,
            apply_router_weight_on_input=self.apply_router_weight_on_input,
        )  # fmt: skip
        return out.view(hidden_states.shape)

    def extra_repr(self) -> str:
        experts, rows, hidden = self.w13.shape
        return f"E={experts}, k={self.top_k}, H={hidden}, rows={rows}, {self.activation}, impl={self.impl!r}"


def _named(state: Mapping[str, Tensor], ending: str) -> Tensor | None:
    return next((tensor for key, tensor in state.items() if key.split(".")[-1] == ending), None)


# Class names of torch and of transformers.activations.
_ACTIVATIONS = {
    "SiLU": "silu", "SiLUActivation": "silu", "GELU": "gelu", "GELUActivation": "gelu",
    "GELUTanh": "gelu_tanh", "PytorchGELUTanh": "gelu_tanh", "ReLUSquaredActivation": "relu2",
}  # fmt: skip


def _asks_activation(block: nn.Module | Mapping[str, Tensor]) -> str:
    found = type(getattr(block, "act_fn", None)).__name__
    if found not in _ACTIVATIONS:
        raise UnknownNameError(
            f"The block does not tell its activation (act_fn: {found}). Expected one of "
            f"{sorted(set(_ACTIVATIONS.values()) | {'swiglu_oai'})}. Pass activation=, the model's hidden_act."
        )
    return _ACTIVATIONS[found]


def _refuse_other_clamp(block: nn.Module | Mapping[str, Tensor], activation: str) -> None:
    """swiglu_oai clamps at 7 with alpha 1.702, the others not at all: refuse a block whose own numbers differ."""
    expected = {"limit": 7.0, "swiglu_limit": 7.0, "alpha": 1.702} if activation == "swiglu_oai" else {"alpha": 1.0}
    for name in ("limit", "swiglu_limit", "alpha"):
        found = getattr(block, name, None)
        if not isinstance(found, int | float) or math.isinf(found) or found == expected.get(name):
            continue
        raise UnknownNameError(
            f"The block clamps or scales its activation ({name} = {found}), and {activation!r} has "
            f"{expected.get(name, 'no such number')}. Expected a block whose activation moelab has. Use the block itself."
        )


def _refuse_leftovers(state: Mapping[str, Tensor], used: set[str]) -> None:
    if set(state) - used:
        raise ShapeError(
            f"The block holds {sorted(set(state) - used)[:4]} besides its expert weights. Expected nothing else: FusedMoE "
            "would leave them out. Pass the experts block itself, or build FusedMoE by hand."
        )


def _asks_interleaved(block: nn.Module | Mapping[str, Tensor], state: Mapping[str, Tensor]) -> bool:
    if isinstance(block, nn.Module) and hasattr(block, "is_concatenated"):
        return not block.is_concatenated
    if _named(state, "gate_up_proj_bias") is not None:
        raise ShapeError(
            "The tensors carry biases but do not say whether gate and up rows alternate. Expected interleaved=True "
            "(gpt-oss) or interleaved=False. Pass it."
        )
    return False


def _refuse_twice(roles: list[Any]) -> None:
    twice = sorted({str(role) for role in roles if roles.count(role) > 1})
    if twice:
        raise ShapeError(
            f"The tensors hold {', '.join(twice[:4])} more than once. Expected one layer's experts. Pass the state dict of one "
            "experts block."
        )


_FUSED_NAMES = ("gate_up_proj", "up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias")


def _fused(state: Mapping[str, Tensor], transposed: bool | None) -> dict[str, Tensor]:
    gated = _named(state, "gate_up_proj") is not None
    w13, w2 = _named(state, "gate_up_proj" if gated else "up_proj"), _named(state, "down_proj")
    if w13 is None or w2 is None or w13.ndim != 3 or w2.ndim != 3:
        raise ShapeError(
            f"The block holds {sorted(state)}. Expected 3-dimensional gate_up_proj (or up_proj) and down_proj. "
            "Pass the experts block itself, not the layer around it."
        )
    _refuse_leftovers(state, {key for key in state if key.split(".")[-1] in _FUSED_NAMES})
    _refuse_twice([key.split(".")[-1] for key in state])
    if _is_transposed(w13, w2, 2 if gated else 1, transposed):
        w13, w2 = w13.transpose(1, 2), w2.transpose(1, 2)
    biases = {"b13": _named(state, "gate_up_proj_bias"), "b2": _named(state, "down_proj_bias")}
    return {"w13": w13, "w2": w2} | {name: bias for name, bias in biases.items() if bias is not None}


def _is_transposed(w13: Tensor, w2: Tensor, halves: int, told: bool | None) -> bool:
    """Whether the block stores (E, H, 2N) and (E, N, H); with a gate no sizes fit both readings, without one both do."""
    straight = w13.shape[2] == w2.shape[1] and w13.shape[1] == halves * w2.shape[2]
    turned = w13.shape[1] == w2.shape[2] and w13.shape[2] == halves * w2.shape[1]
    fits = {False: straight, True: turned}
    if told is None and straight and turned:
        raise ShapeError(
            f"up_proj {tuple(w13.shape)} and down_proj {tuple(w2.shape)} fit both ways of storing them. Expected to be "
            "told. Pass transposed=False for (E, N, H), transposed=True for (E, H, N)."
        )
    if told is None and (straight or turned):
        return turned
    if told is not None and fits[told]:
        return told
    raise ShapeError(
        f"The first weight {tuple(w13.shape)} and down_proj {tuple(w2.shape)} do not belong together. Expected "
        "(E, 2N, H) and (E, H, N), or both transposed. Check that both come from one layer."
    )


_PER_EXPERT = re.compile(r"(?:^|\.)(\d+)\.(gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
_ROLES = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}


def _per_expert(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    found: dict[str, dict[int, Tensor]] = {"gate": {}, "up": {}, "down": {}}
    _refuse_twice([(_ROLES[m[2]], m[1]) for key in state if (m := _PER_EXPERT.search(key))])
    for key, tensor in state.items():
        match = _PER_EXPERT.search(key)
        if match:
            found[_ROLES[match[2]]][int(match[1])] = tensor
    _refuse_leftovers(state, {key for key in state if _PER_EXPERT.search(key)})
    count = len(found["gate"])
    if count == 0 or any(sorted(part) != list(range(count)) for part in found.values()):
        raise ShapeError(
            f"The block holds {sorted(state)[:8]}. Expected gate_up_proj and down_proj, or gate, up and down weights for "
            "experts 0, 1, 2, ... Pass the experts block itself, not the layer around it."
        )
    for role, part in found.items():
        if len({tuple(tensor.shape) for tensor in part.values()}) > 1:
            raise ShapeError(
                f"The {role} weights differ in shape from expert to expert. Expected one shape. Check the state dict."
            )
    gate, up, down = (torch.stack([part[i] for i in range(count)]) for part in found.values())
    return {"w13": torch.cat([gate, up], dim=1), "w2": down}
