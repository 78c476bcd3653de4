"""The numeric gate: nothing is timed before its result is finite everywhere and near float64 on rows that tell.

The rows are chosen where masks and tile borders can go wrong: of the experts with most and with fewest rows, the first,
the last and some between, the first and last rows of the run that is padded to tiles, and one in the middle; and rows of
another rank's experts. Every row is seen to be written: results start as NaN, and one NaN anywhere is a failure. The bound
is precision's: twice torch's own error in the same dtype, and a rounding. Layers whose activations are quantised are held step
by step, each against float64 of what the steps before it wrote (`coded_gate.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelab import precision
from moelab.dtypes import accumulator_dtype
from moelab.formats import Format
from moelab.quantised_weights import as_multiplied, dequantise_activations
from moelab.reference import grouped_gemm_ref
from moelab.routing import Routing
from moelab.shapes import MoEShape
from moelab.suites.layer_classic import sample_rows
from moelab.weights import ExpertWeights, GemmWeights

EXPERTS = 8
"""Experts whose rows are looked at, at most."""

TOKENS_EACH = 3
"""Tokens of a whole layer that are looked at, from head, middle and tail each."""


@dataclass(frozen=True)
class Gate:
    """rows: indices into the result's rows. exact: those rows in float64. bound: on the largest absolute error; slack: what each
    value may be off beyond it, of a product that hardware sums in fewer digits."""

    rows: Tensor
    exact: Tensor
    bound: float
    slack: Tensor | None = None

    def judge(self, written: Written) -> tuple[str, str] | None:
        """`verdict` of a launch's result."""
        return self.verdict(written.result)

    def verdict(self, result: Tensor) -> tuple[str, str] | None:
        """("nan" or "wrong", a sentence), or None for a result that passes. One synchronisation with the host."""
        wide = accumulator_dtype(result.dtype)
        total = result.sum(dtype=wide).double()
        off = (result[self.rows].double() - self.exact).abs()
        worst = (off if self.slack is None else off - self.slack).max()
        seen = torch.stack([total, worst]).tolist()
        if not all(abs(value) < float("inf") for value in seen):
            return "nan", "the result holds NaN or infinity, or a row was not written"
        if seen[1] > self.bound:
            return "wrong", f"off from float64 by {seen[1]:.3g}, over the bound of {self.bound:.3g}"
        return None


class Written(NamedTuple):
    """What a launch wrote at rotation 0. result: in the order of pairs, or of tokens. steps: what each step wrote, of which the
    last is the result's. codes: of GEMM2's operand, and their scales, where activations are quantised."""

    result: Tensor
    steps: tuple[Tensor, ...] = ()
    codes: tuple[Tensor, Tensor | None] | None = None


def telling_pairs(routing: Routing) -> Tensor:
    """Indices of pairs (token * top_k + slot), ascending, on the routing's device; see the module for which."""
    ids = routing.topk_ids.flatten().long().cpu()
    local = (ids >= 0) & (ids < routing.num_experts)
    counts = torch.bincount(ids[local], minlength=routing.num_experts)
    touched = counts.nonzero().flatten()
    chosen: list[int] = []
    if len(touched):
        between = touched[torch.linspace(0, len(touched) - 1, EXPERTS - 2).round().long()].tolist()
        chosen = [int(touched[counts[touched].argmax()]), int(touched[counts[touched].argmin()]), *between]
    pairs: set[int] = set()
    for run in [(ids == expert).nonzero().flatten() for expert in dict.fromkeys(chosen)] + [
        (~local).nonzero().flatten()
    ]:
        places = {0, 1, len(run) // 2, len(run) - 2, len(run) - 1}
        pairs |= {int(run[place]) for place in places if 0 <= place < len(run)}
    return torch.tensor(sorted(pairs), dtype=torch.long, device=routing.topk_ids.device)


def gemm_gate(
    a: Tensor,
    weights: GemmWeights,
    routing: Routing,
    *,
    top_k: int,
    weighted: bool,
    activated: tuple[str, bool] | None = None,
    coded: tuple[Tensor, Tensor] | None = None,
) -> Gate:
    """For a grouped product of a (num_tokens, K) with top_k the layer's, or (pairs, K) with top_k 1.

    activated: the activation, and whether it is gated, that the kernel applies to its sums; None for none. coded: the codes and
    scales of a that are multiplied in its place.
    """
    pairs = telling_pairs(routing)
    ids = routing.topk_ids.flatten()[pairs]
    own = ids[ids >= 0].unique().long()  # float64 copies of the experts that are named, not of all
    local = torch.where(ids >= 0, torch.searchsorted(own, ids.long().contiguous()), -1)
    row, few = pairs // top_k, as_multiplied(weights, a.dtype, own)
    if coded is None:
        rows = a[row]
    else:
        codes, scale = coded
        rows = dequantise_activations(codes[row], scale[row] if scale.ndim else scale, weights.format)
    given: dict[str, Any] = {"top_k": 1, "topk_weights": routing.topk_weights.flatten()[pairs] if weighted else None}
    rounded = None if coded is None else a.dtype
    plain, exact = precision.gemm_references(rows, few, local, activated=activated, rounded=rounded, **given)
    slack = None
    if summed_in_few_digits(weights.format, a.device.type):
        slack = cut_off(a.shape[1]) * grouped_gemm_ref(rows.abs(), few.abs(), local, **given)
    return Gate(pairs, exact, precision.tolerance(plain, exact), slack)


def summed_in_few_digits(format: Format, device: str) -> bool:
    """Whether a product's sum over all of K stays in a tensor core that keeps 14 bits of it: fp8 without blocks, on a GPU."""
    return device == "cuda" and format.weight_dtype == "float8_e4m3fn" and format.granularity != "block"


def cut_off(K: int) -> float:
    """What such a sum may be off, times the sum of the products' magnitudes: each 32 of them, and the sum so far, are cut behind
    some 13 bits of the largest."""
    return 33 * -(-K // 32) * 2.0**-14


def layer_gate(x: Tensor, weights: ExpertWeights, routing: Routing, shape: MoEShape) -> Gate:
    """For the whole layer, x (num_tokens, hidden_size)."""
    tokens = sample_rows(x.shape[0], TOKENS_EACH).to(x.device)
    options: dict[str, Any] = {"activation": shape.activation, "gated": shape.gated}
    references = []
    for token in tokens.tolist():  # one by one: float64 copies of top_k experts at a time
        ids = routing.topk_ids[token : token + 1]
        own = ids[ids >= 0].unique().long()
        local = torch.where(ids >= 0, torch.searchsorted(own, ids.long().contiguous()), -1)
        row = x[token : token + 1]
        up, down = (as_multiplied(part, x.dtype, own) for part in (weights.up, weights.down))
        factors = routing.topk_weights[token : token + 1]
        references.append(precision.layer_references(row, up, down, factors, local, **options))
    plain, exact = (torch.cat(each) for each in zip(*references, strict=True))
    return Gate(tokens, exact, precision.tolerance(plain, exact))
