"""The weights of a layer's experts: what travels from `fused_moe`'s door to the kernels as one thing."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from moelab.formats import PLAIN, Format


class GemmWeights(NamedTuple):
    """One GEMM's part: w (E, N, K) for GEMM1 (N counts gate and up rows) or GEMM2; bias (E, N) or None.

    scale, zero_point: of a quantised format, as `moelab.quantised_weights.quantise` makes them; None for plain weights.
    a_scale: () float32, a checkpoint's for the activations, in a format that has one (`static`); None otherwise.
    """

    w: Tensor
    bias: Tensor | None = None
    scale: Tensor | None = None
    zero_point: Tensor | None = None
    format: Format = PLAIN
    a_scale: Tensor | None = None

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, of those that there are."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}


class ExpertWeights(NamedTuple):
    """w13 (E, 2N, H), gate rows and then up rows ((E, N, H) without a gate), and w2 (E, H, N), of one rank's experts.

    b13 (E, 2N) and b2 (E, H): biases in the weights' dtype, or None. format: how the weights are stored; moelab.implementations
    says who takes it. w13_scale, w2_scale, w13_zero_point, w2_zero_point: of a quantised format, None for plain weights;
    a1_scale, a2_scale: of activations, where a checkpoint brings them.
    """

    w13: Tensor
    w2: Tensor
    b13: Tensor | None = None
    b2: Tensor | None = None
    w13_scale: Tensor | None = None
    w2_scale: Tensor | None = None
    w13_zero_point: Tensor | None = None
    w2_zero_point: Tensor | None = None
    format: Format = PLAIN
    a1_scale: Tensor | None = None
    a2_scale: Tensor | None = None

    @classmethod
    def of(cls, up: GemmWeights, down: GemmWeights) -> ExpertWeights:
        """Both GEMMs' parts as one."""
        return cls(
            up.w,
            down.w,
            up.bias,
            down.bias,
            up.scale,
            down.scale,
            up.zero_point,
            down.zero_point,
            up.format,
            up.a_scale,
            down.a_scale,
        )

    @property
    def num_experts(self) -> int:
        """Experts on this rank."""
        return self.w13.shape[0]

    @property
    def has_bias(self) -> bool:
        """Whether either GEMM adds one."""
        return self.b13 is not None or self.b2 is not None

    @property
    def up(self) -> GemmWeights:
        """GEMM1's part."""
        return GemmWeights(self.w13, self.b13, self.w13_scale, self.w13_zero_point, self.format, self.a1_scale)

    @property
    def down(self) -> GemmWeights:
        """GEMM2's part."""
        return GemmWeights(self.w2, self.b2, self.w2_scale, self.w2_zero_point, self.format, self.a2_scale)

    def tensors(self) -> dict[str, Tensor]:
        """Name -> tensor, of those that there are."""
        return {name: value for name, value in self._asdict().items() if isinstance(value, Tensor)}
