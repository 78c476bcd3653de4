"""Weights of quantised formats that a wrong scale shows on, and room for activations' codes."""

from __future__ import annotations

from typing import TypeAlias

import torch
from torch import Tensor

from moelab.formats import Format
from moelab.kernels.quantise_activations import quantise_activations_unchecked
from moelab.quantised_weights import empty_activations
from moelab.tuner.problem import Gemm
from moelab.weights import GemmWeights

Codes: TypeAlias = tuple[Tensor, Tensor | None]
"""Activations as a GEMM multiplies them, and their scales where they are codes."""

STATIC_SCALE = {"up": 6.0 / 448.0, "down": 3.0 / 448.0}
"""A checkpoint's scale of activations, by GEMM: six standard deviations of the rig's become the largest fp8 code."""


def as_tuned(weights: GemmWeights, gemm: Gemm, seed: int) -> GemmWeights:
    """Random weights with scales that lie up to three powers of two apart, and the activations' scale that a static format has.

    The scales of normal weights are all but equal, and a kernel that reads its neighbour's would hardly be off.
    """
    format = weights.format
    if weights.scale is None:
        return weights
    generator = torch.Generator(device=weights.scale.device).manual_seed(seed)
    powers = torch.randint(-2, 2, weights.scale.shape, generator=generator, device=weights.scale.device)
    scale = (weights.scale.float() * torch.exp2(powers.float())).to(weights.scale.dtype)
    static = torch.tensor(STATIC_SCALE[gemm], device=scale.device) if format.activations == "static" else None
    return weights._replace(scale=scale, a_scale=static)


class Coder:
    """Quantises a GEMM's activations into memory of its own, again and again."""

    def __init__(self, format: Format, rows: int, columns: int, dtype: torch.dtype, device: str) -> None:
        self.format = format
        self._room: Codes | None = None
        if format.activations != "none":
            self._room = empty_activations(format, rows, columns, dtype, device)
        self.last: Codes | None = None

    def __call__(self, x: Tensor, weights: GemmWeights) -> Codes:
        """x (rows, columns) as the GEMM of these weights reads it, of no more rows than there is room for."""
        if self._room is None:
            return x, None
        codes, scale = self._room
        assert scale is not None  # a format that quantises has scales
        out = codes[: len(x)], scale[: len(x)] if scale.ndim else scale
        self.last = quantise_activations_unchecked(x, self.format, weights.a_scale, out)
        return self.last

    def clear(self) -> None:
        """Make what was there no codes: NaN scales."""
        if self._room is not None and self._room[1] is not None:
            self._room[1].fill_(float("nan"))
        self.last = None
