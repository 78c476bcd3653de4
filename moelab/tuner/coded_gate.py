"""The numeric gate of layers whose activations are quantised: each step is given what the steps before it wrote.

A code that falls the other way, for one rounding in the step before, moves a result by more than any rounding: end to end, a
bound that holds would be loose. So GEMM1 is held against float64 of its codes times scales, as any product is;
the activation against float64 of what GEMM1 wrote; the codes made of it against the plain quantiser's, equal but where a quotient
lies within rounding of two codes' border; GEMM2 against float64 of those codes; the sum against float64 of GEMM2's rows. What
quantising itself loses is nobody's fault here.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from moelab import precision
from moelab.dtypes import accumulator_dtype
from moelab.errors import PrecisionError
from moelab.formats import Format
from moelab.quantised_weights import quantise_activations
from moelab.reference import activation_ref
from moelab.routing import Routing
from moelab.shapes import MoEShape
from moelab.suites.layer_classic import sample_rows
from moelab.tuner.coded_inputs import Codes
from moelab.tuner.gate import TOKENS_EACH, Gate, Written, gemm_gate, telling_pairs
from moelab.weights import GemmWeights

Verdict = tuple[str, str] | None

SCALE_ULPS = 1.0
"""By how many units in the last place of float32 a scale may differ: one division."""

NEAR = 1e-5
"""How near to the border of two codes, in codes, a quotient of two float32 may fall on either side."""


def wrong_codes(
    x: Tensor,
    codes: Tensor,
    scale: Tensor,
    format: Format,
    static_scale: Tensor | None = None,
    rows: Tensor | None = None,
) -> str | None:
    """What is wrong with codes (rows, K) and scales of x, a sentence; None where they are the plain quantiser's, but at ties.

    rows: those that are looked at, None for all; a scale that serves the whole batch is held against the whole batch.
    """
    if format.activations == "tensor":
        _, static_scale = quantise_activations(x, format)
        format = replace(format, activations="static")
    if rows is not None:
        x, codes = x[rows], codes[rows]
        scale = scale[rows] if scale.ndim else scale
    wanted, exact = quantise_activations(x, format, static_scale)
    off = (scale.double() - exact.double()).abs() / precision.ulp(exact.double(), torch.float32)
    worst = off.max().item() if off.numel() else 0.0
    if not worst <= SCALE_ULPS:  # NaN too
        return f"a scale of the activations is off by {worst:.3g} units in its last place, over {SCALE_ULPS:g}"
    found, plain = codes.double(), wanted.double()
    differ = found != plain
    if not bool(differ.any()):
        return None
    ratio = x.double() / _spread(exact.double(), x, format)
    truncates = format.weight_dtype == "int8" and format.activations == "group"
    border = torch.where(found.abs() > plain.abs(), found, plain) if truncates else (found + plain) / 2
    far = differ & ~((ratio - border).abs() <= NEAR * ratio.abs().clamp(min=1.0))
    count = int(far.sum())
    return f"{count} of {codes.numel()} codes of the activations are not the nearest" if count else None


def _spread(scale: Tensor, x: Tensor, format: Format) -> Tensor:
    return scale.repeat_interleave(format.sizes[-1], -1)[:, : x.shape[1]] if format.activations == "group" else scale


def coded_gemm_gate(
    x: Tensor,
    quantised: Codes,
    weights: GemmWeights,
    routing: Routing,
    *,
    top_k: int,
    weighted: bool,
) -> Gate:
    """For a grouped product of x, given the codes and scales that a kernel made of it.

    Raises PrecisionError where those are not the plain quantiser's.
    """
    codes, scale = quantised
    assert scale is not None  # codes have one
    rows = (telling_pairs(routing) // top_k).unique()
    if problem := wrong_codes(x, codes, scale, weights.format, weights.a_scale, rows):
        raise PrecisionError(
            f"{problem}. Expected those of quantised_weights.quantise_activations. Look at the kernel that makes them."
        )
    return gemm_gate(x, weights, routing, top_k=top_k, weighted=weighted, coded=(codes, scale))


@dataclass(frozen=True)
class CodedLayerGate:
    """For the whole layer. up: GEMM1's gate. down: GEMM2's weights."""

    up: Gate
    down: GemmWeights
    routing: Routing
    shape: MoEShape

    def judge(self, written: Written) -> Verdict:
        """("nan" or "wrong", a sentence that names the step), or None."""
        h, act, y, out = written.steps
        assert written.codes is not None  # the rig hands them over for such a format
        codes = written.codes
        steps: dict[str, Callable[[], Verdict]] = {
            "GEMM1": lambda: self.up.verdict(h),
            "the activation": lambda: self._activation(h, act),
            "GEMM2": lambda: self._down(act, codes, y),
            "the sum over slots": lambda: self._sum(y, out),
        }
        for name, step in steps.items():
            if (found := step()) is not None:
                return found[0], f"{name}: {found[1]}"
        return None

    def _activation(self, h: Tensor, act: Tensor) -> Verdict:
        pairs = telling_pairs(self.routing)
        given = (self.shape.activation,)
        plain = activation_ref(h[pairs], *given, gated=self.shape.gated)
        exact = activation_ref(h[pairs].double(), *given, gated=self.shape.gated)
        return Gate(pairs, exact, precision.tolerance(plain, exact)).verdict(act)

    def _down(self, act: Tensor, codes: Codes, y: Tensor) -> Verdict:
        try:
            gate = coded_gemm_gate(act, codes, self.down, self.routing, top_k=1, weighted=True)
        except PrecisionError as error:
            return "wrong", str(error)
        return gate.verdict(y)

    def _sum(self, y: Tensor, out: Tensor) -> Verdict:
        tokens = sample_rows(out.shape[0], TOKENS_EACH).to(out.device)
        slots = y.view(out.shape[0], -1, out.shape[1])[tokens]
        plain = slots.to(accumulator_dtype(out.dtype)).sum(1).to(out.dtype)
        exact = slots.double().sum(1)
        return Gate(tokens, exact, precision.tolerance(plain, exact)).verdict(out)
