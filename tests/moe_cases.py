"""Cases that several test files share: odd sizes on purpose, and a check against float64 by the house's policy."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch

from moelab import precision
from moelab.config import KernelConfig
from moelab.inputs import MoEInputs, make_inputs
from moelab.reference import fused_moe_ref
from moelab.shapes import MoEShape

# Small tiles of uneven sides: sizes that are no multiple of them are easy to find.
TILE = KernelConfig(16, 32, 64, 4, 4, 3)


@dataclass(frozen=True)
class Case:
    """A layer: sizes, and why it is here."""

    why: str
    num_tokens: int
    num_experts: int
    top_k: int
    hidden: int
    inner: int
    routing: str = "uniform"
    activation: str = "silu"
    gated: bool = True
    bias: bool = False
    foreign: bool = False
    on_input: bool = False
    scale: float = 1.0

    def __str__(self) -> str:
        return self.why.replace(" ", "-")

    def inputs(self, dtype: torch.dtype, device: str) -> MoEInputs:
        """Tensors of this case; with `foreign`, a third of the experts are another rank's."""
        shape = MoEShape.from_sizes(
            num_experts=self.num_experts, top_k=self.top_k, hidden_size=self.hidden, moe_intermediate_size=self.inner,
            activation=self.activation, gated=self.gated,
        )  # fmt: skip
        made = make_inputs(
            shape, self.num_tokens, dtype=dtype, device=device, routing=self.routing, bias=self.bias, seed=1
        )
        ids = made.topk_ids
        return replace(made, topk_ids=torch.where(ids % 3 == 1, -1, ids)) if self.foreign else made

    @property
    def options(self) -> dict:
        """Keyword arguments that fused_moe and fused_moe_ref share."""
        return {
            "activation": self.activation,
            "gated": self.gated,
            "routed_scaling_factor": self.scale,
            "apply_router_weight_on_input": self.on_input,
        }


CASES = [
    Case("one expert", 5, 1, 1, 64, 32),
    Case("one token", 1, 8, 2, 96, 48),
    Case("top_k is num_experts", 3, 4, 4, 64, 40),
    Case("empty experts, skewed", 17, 16, 2, 64, 32, routing="zipf"),
    Case("sizes no multiple of a tile", 7, 3, 2, 511, 33),
    Case("hidden % 16 == 8", 4, 3, 2, 264, 40, scale=2.5),
    Case("experts of another rank", 9, 6, 3, 64, 32, foreign=True, bias=True, activation="gelu"),
    Case("weights on the input", 6, 4, 1, 64, 32, on_input=True),
    Case("gpt-oss: clamped, biases", 5, 4, 2, 80, 48, activation="swiglu_oai", bias=True),
    Case("no gate", 5, 4, 2, 64, 48, activation="relu2", gated=False),
    Case("tanh gelu", 3, 2, 1, 64, 32, activation="gelu_tanh"),
]

# What a GPU takes in its stride and the interpreter does not.
LARGE_CASES = [
    Case("600 tokens", 600, 60, 4, 2048, 1408),
    Case("hidden 511", 33, 5, 2, 511, 100),
    Case("hidden 2056", 3, 7, 3, 2056, 200, routing="zipf"),
    Case("Mixtral tp8", 128, 8, 2, 4096, 1792),
]


def reference(case: Case, inputs: MoEInputs, dtype: torch.dtype) -> torch.Tensor:
    """The oracle in `dtype`."""
    i = inputs.to(dtype)
    return fused_moe_ref(i.hidden_states, i.w13, i.w2, i.topk_weights, i.topk_ids, b13=i.b13, b2=i.b2, **case.options)


def judge(
    case: Case, inputs: MoEInputs, out: torch.Tensor, plain: torch.Tensor | None = None, roundings: int = 0
) -> None:
    """Raise PrecisionError unless `out` is within twice torch's own error of float64, and a rounding.

    plain: torch's own result; None takes the oracle in out's dtype. roundings: more of them, for sums of several
    products that are rounded one by one; a running sum may pass its final value, here by no more than twice.
    """
    i = inputs.to(out.dtype)
    own, exact = precision.layer_references(
        i.hidden_states, i.w13, i.w2, i.topk_weights, i.topk_ids, b13=i.b13, b2=i.b2, **case.options
    )
    tiny = (1 + roundings) * float(precision.ulp(2 * exact.abs().max(), out.dtype)) if roundings else None
    precision.check(out, own if plain is None else plain, exact, name=f"{case.why} in {out.dtype}", tiny=tiny)
