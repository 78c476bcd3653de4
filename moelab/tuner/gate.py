"""The numeric gate: nothing is timed before its result is finite everywhere and near float64 on rows that tell.

The rows are chosen where masks and tile borders can go wrong: of the experts with most and with fewest rows, the first,
the last and some between, the first and last rows of the run that is padded to tiles, and one in the middle; and rows of
another rank's experts. Every row is seen to be written: results start as NaN, and one NaN anywhere is a failure. The bound
is precision's: twice torch's own error in the same dtype, and a rounding.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moelab import precision
from moelab.dtypes import accumulator_dtype
from moelab.quantised_weights import as_multiplied
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
    """rows: indices into the result's rows. exact: those rows in float64. bound: on the largest absolute error."""

    rows: Tensor
    exact: Tensor
    bound: float

    def verdict(self, result: Tensor) -> tuple[str, str] | None:
        """("nan" or "wrong", a sentence), or None for a result that passes. One synchronisation with the host."""
        wide = accumulator_dtype(result.dtype)
        total = result.sum(dtype=wide).double()
        worst = (result[self.rows].double() - self.exact).abs().max()
        seen = torch.stack([total, worst]).tolist()
        if not all(abs(value) < float("inf") for value in seen):
            return "nan", "the result holds NaN or infinity, or a row was not written"
        if seen[1] > self.bound:
            return "wrong", f"off from float64 by {seen[1]:.3g}, over the bound of {self.bound:.3g}"
        return None


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
) -> Gate:
    """For a grouped product of a (num_tokens, K) with top_k the layer's, or (pairs, K) with top_k 1.

    activated: the activation, and whether it is gated, that the kernel applies to its sums; None for none.
    """
    pairs = telling_pairs(routing)
    ids = routing.topk_ids.flatten()[pairs]
    own = ids[ids >= 0].unique().long()  # float64 copies of the experts that are named, not of all
    local = torch.where(ids >= 0, torch.searchsorted(own, ids.long().contiguous()), -1)
    rows, few = a[pairs // top_k], as_multiplied(weights, a.dtype, own)
    given: dict[str, Any] = {"top_k": 1, "topk_weights": routing.topk_weights.flatten()[pairs] if weighted else None}
    plain, exact = precision.gemm_references(rows, few, local, activated=activated, **given)
    return Gate(pairs, exact, precision.tolerance(plain, exact))


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
