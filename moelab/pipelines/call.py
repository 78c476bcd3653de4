"""One checked call of the layer, as implementations get it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moelab.config import KernelConfig


class MoECall(NamedTuple):
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
