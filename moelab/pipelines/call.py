"""One checked call of the layer, as implementations get it."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moelab.config import KernelConfig
from moelab.errors import ConfigError


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

    def require_plain(self, name: str) -> None:
        """Raise ConfigError unless this is a layer of silu-gated experts and no more: for an implementation of only that."""
        asked = {
            f"activation={self.activation!r}": self.activation != "silu", "gated=False": not self.gated,
            "biases": self.b13 is not None or self.b2 is not None,
            f"routed_scaling_factor={self.routed_scaling_factor}": self.routed_scaling_factor != 1.0,
            "apply_router_weight_on_input": self.apply_router_weight_on_input,
        }  # fmt: skip
        if more := [what for what, given in asked.items() if given]:
            raise ConfigError(
                f"{name} was asked for {', '.join(more)}. Expected silu-gated experts without biases or scaling, weighted "
                "after GEMM2. Use impl='triton', or teach it."
            )
