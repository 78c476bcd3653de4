"""FusedMoE: the op as a torch module, with weights taken from a Hugging Face experts block."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from moelab.config import KernelConfig
from moelab.errors import RoutingError
from moelab.experts_block import read_experts
from moelab.fused_moe import fused_moe
from moelab.reference import check_activation
from moelab.shapes import MoEShape


def _share(share: float | None) -> float | None:
    if share is not None and not (isinstance(share, int | float) and 0 < share <= 1):
        raise RoutingError(
            f"expected_share is {share!r:.40}. Expected a number above 0 and at most 1: an expert gets a token once. Pass "
            "top_k over the number of the model's experts, or leave it out."
        )
    return share


class FusedMoE(nn.Module):
    """The experts of one MoE layer; forward takes hidden states and a routing, or router logits.

    Parameters w13 (E, 2N, H) ((E, N, H) ungated), w2 (E, H, N), and with bias=True b13 (E, 2N), b2 (E, H).
    impl, config, down_config and form are those of moelab.fused_moe.fused_moe, and may be set between calls. expected_share:
    rows that an expert of this rank is expected to get for each token of a batch, where experts of other ranks come as ids of
    -1: top_k over all experts of the model; None takes all for this rank's.
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
        expected_share: float | None = None,
        dtype: torch.dtype = torch.bfloat16,
        device: str | torch.device | None = None,
    ) -> None:
        super().__init__()
        check_activation(activation, gated)
        if not 1 <= top_k <= num_experts and (top_k < 1 or expected_share is None):  # a token's others may be elsewhere
            raise RoutingError(
                f"top_k = {top_k} with {num_experts} experts. Expected 1 <= top_k <= num_experts. Take it from the model's "
                "config.json; where other ranks have more experts, pass expected_share."
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
        self.expected_share = _share(expected_share)
        self.form: str | None = None
        self.config: KernelConfig | None = None
        self.down_config: KernelConfig | None = None

    @classmethod
    def from_shape(cls, shape: MoEShape, *, bias: bool = False, **options: Any) -> FusedMoE:
        """An empty module of a shape's sizes and activation."""
        return cls(
            shape.num_experts, shape.top_k, shape.hidden_size, shape.moe_intermediate_size,
            activation=shape.activation, gated=shape.gated, bias=bias, **{"expected_share": shape.expected_rows(1), **options},
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
        Either bias may be missing.
        activation: None asks the block, by computing its own gate on points in float64; a name is held against those
        values, and trusted only where there are none (a state dict).
        interleaved: whether gate and up rows alternate, as in gpt-oss; None asks the block, and where biases come as
        bare tensors, which gpt-oss has and others have too, raises rather than guess.
        transposed: whether the block stores (E, H, 2N) and (E, N, H); None asks the block or the sizes, which tell
        wherever there is a gate.
        Only the experts are read: a forward that does more around them (Llama-4 weighs their input: pass
        apply_router_weight_on_input=True) is the caller's to know.
        Raises ShapeError where the tensors are none of these, or more than these, or the block has a norm after the
        experts; UnknownNameError where the activation is none of moelab's, or not the one passed; DtypeError for quantised
        weights and for more than one dtype; LayoutError for sharded ones and for those without values; RoutingError for one
        rank's share under expert parallelism.
        """
        found = read_experts(block, activation, interleaved, transposed)
        experts, _, hidden = found.w13.shape
        parts = {name: getattr(found, name) for name in ("w13", "w2", "b13", "b2")}
        module = cls(
            experts, top_k, hidden, found.w2.shape[2], activation=found.activation, gated=found.gated,
            bias=found.b13 is not None or found.b2 is not None, dtype=found.w13.dtype, device=found.w13.device, **options,
        )  # fmt: skip
        for name, tensor in parts.items():
            if tensor is None:
                setattr(module, name, None)
            else:
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
            expected_rows=None if self.expected_share is None else self.expected_share * max(flat.shape[0], 1), form=self.form,
        )  # fmt: skip
        return out.view(hidden_states.shape)

    def extra_repr(self) -> str:
        experts, rows, hidden = self.w13.shape
        return f"E={experts}, k={self.top_k}, H={hidden}, rows={rows}, {self.activation}, impl={self.impl!r}"
