"""One checked call of the layer, as implementations get it."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor

from moelab.config import KernelConfig
from moelab.errors import ConfigError
from moelab.weights import ExpertWeights

Config = KernelConfig | Literal["default"] | None
"""Of a GEMM: this one, sglang's default rule, or None for the tuned file of this device and, where there is none, that rule."""


class MoECall(NamedTuple):
    """One checked call, as implementations get it: hidden_states (M, H), the experts' weights, topk_weights (M, k), float32 or
    hidden_states' dtype, and topk_ids (M, k), then what kind of layer it is, and under which configs; expected_rows, form and
    out as `fused_moe` has them."""

    hidden_states: Tensor
    weights: ExpertWeights
    topk_weights: Tensor
    topk_ids: Tensor
    activation: str = "silu"
    gated: bool = True
    routed_scaling_factor: float = 1.0
    apply_router_weight_on_input: bool = False
    config: Config = None
    down_config: Config = None
    expected_rows: float | None = None
    form: str | None = None
    out: Tensor | None = None

    def result(self) -> Tensor:
        """(M, H) to write the layer's result to: `out`, or where none was given a new one."""
        return torch.empty_like(self.hidden_states) if self.out is None else self.out

    @property
    def num_tokens(self) -> int:
        return self.topk_ids.shape[0]

    @property
    def top_k(self) -> int:
        return self.topk_ids.shape[1]

    @property
    def num_pairs(self) -> int:
        return self.topk_ids.numel()

    @property
    def num_experts(self) -> int:
        return self.weights.num_experts

    @property
    def rows_an_expert(self) -> float:
        """Rows that an expert of this rank is expected to get: as given, or as if all pairs were this rank's."""
        return self.num_pairs / self.num_experts if self.expected_rows is None else self.expected_rows

    @property
    def moe_intermediate_size(self) -> int:
        return self.weights.w2.shape[2]

    def require_plain(self, name: str) -> None:
        """Raise ConfigError unless this is a layer of silu-gated experts and no more: for an implementation of only that."""
        asked = {
            f"activation={self.activation!r}": self.activation != "silu", "gated=False": not self.gated,
            "biases": self.weights.has_bias,
            f"routed_scaling_factor={self.routed_scaling_factor}": self.routed_scaling_factor != 1.0,
            "apply_router_weight_on_input": self.apply_router_weight_on_input,
        }  # fmt: skip
        if more := [what for what, given in asked.items() if given]:
            raise ConfigError(
                f"{name} was asked for {', '.join(more)}. Expected silu-gated experts without biases or scaling, weighted "
                "after GEMM2. Use impl='triton', or teach it."
            )
