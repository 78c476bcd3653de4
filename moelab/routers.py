"""What routers make of their logits: weights and experts of each token, by the rules of the models, in torch.

On any device, without a host synchronisation, so that it may be captured in a CUDA graph. `moelab.kernels.route` does the
same work in one launch; this is what it is checked with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from moelab.dtypes import accumulator_dtype
from moelab.errors import RoutingError, ShapeError, UnknownNameError


def check_top_k(num_experts: int, top_k: int) -> None:
    """Raise RoutingError unless a token can go to so many of the experts."""
    if not isinstance(top_k, int) or not 1 <= top_k <= num_experts:
        raise RoutingError(
            f"top_k = {top_k} with {num_experts} experts. Expected 1 <= top_k <= num_experts, "
            "since a token goes to an expert at most once. Lower top_k."
        )


def _check_logits(logits: Tensor, top_k: int) -> None:
    if logits.ndim != 2:
        raise ShapeError(
            f"Router logits have shape {tuple(logits.shape)}. Expected (num_tokens, num_experts). Flatten the batch "
            "first."
        )
    check_top_k(logits.shape[1], top_k)


def softmax_topk(logits: Tensor, top_k: int, *, renormalize: bool = True) -> tuple[Tensor, Tensor]:
    """Softmax over experts, then the top_k of each token (Mixtral, Qwen-MoE).

    logits: (num_tokens, num_experts), any float dtype; computed in float32. Ties fall as torch.topk lets them.
    Returns topk_weights (num_tokens, top_k) float32 and topk_ids (num_tokens, top_k) int32.
    renormalize: make each token's weights sum to 1 (Qwen3's norm_topk_prob).
    Raises ShapeError on another rank, RoutingError where top_k does not fit.
    """
    _check_logits(logits, top_k)
    weights, ids = torch.softmax(logits.float(), dim=-1).topk(top_k, dim=-1)
    if renormalize:
        weights = weights / weights.sum(dim=-1, keepdim=True)
    return weights, ids.int()


def sigmoid_topk(
    logits: Tensor, top_k: int, *, correction_bias: Tensor | None = None, renormalize: bool = True
) -> tuple[Tensor, Tensor]:
    """Sigmoid scores; the bias chooses experts but does not weigh them (Llama-4 with top_k 1, LFM2-MoE).

    Shapes, dtypes and errors as in `softmax_topk`; correction_bias: (num_experts,) float.
    """
    return grouped_topk(logits, top_k, score="sigmoid", correction_bias=correction_bias, renormalize=renormalize)


def grouped_topk(
    logits: Tensor,
    top_k: int,
    *,
    num_groups: int = 1,
    top_k_groups: int = 1,
    score: str = "softmax",
    correction_bias: Tensor | None = None,
    renormalize: bool = True,
    routed_scaling_factor: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Top-k among the experts of the best groups (DeepSeek-V2: softmax; DeepSeek-V3: sigmoid with a bias).

    A group's score is its best expert's without a bias, and the sum of its two best with one, as in the
    DeepSeek-V2 and -V3 reports (arXiv 2405.04434 section 2.1.2, arXiv 2412.19437 section 2.1.2).
    Which experts: by logit without a bias (Llama 4 does so; scores round neighbours to ties), by score + bias with one;
    greatest first, of equals the lower id. A NaN is greater than all, so that it reaches a weight and is seen.
    Shapes and dtypes as in `softmax_topk`, float64 logits in float64; with top_k = 1 weights are not renormalised, as in
    those models, whose single weight would become 1. Raises RoutingError where the groups do not divide the experts, or
    the chosen groups hold fewer than top_k experts, UnknownNameError on another score.
    """
    _check_logits(logits, top_k)
    check_router(logits.shape[1], top_k, num_groups, top_k_groups, score, correction_bias)
    logits = logits.to(accumulator_dtype(logits.dtype))
    scores = SCORES[score](logits)
    choice = logits if correction_bias is None else scores + correction_bias.to(scores.dtype)
    order = _descending(choice)
    if num_groups > 1:
        grouped = choice.unflatten(1, (num_groups, -1))
        two = correction_bias is not None and grouped.shape[2] > 1
        best = grouped.gather(2, _descending(grouped)[..., : 1 + two]).sum(-1)
        keep = torch.zeros_like(best).scatter_(1, _descending(best)[:, :top_k_groups], 1.0)
        kept = keep.repeat_interleave(grouped.shape[2], dim=1).gather(1, order)
        order = order.gather(1, _descending(kept))
    ids = order[:, :top_k]
    weights = scores.gather(1, ids)
    if renormalize and top_k > 1:
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
    return weights * routed_scaling_factor, ids.int()


SCORES: Mapping[str, Callable[[Tensor], Tensor]] = {
    "softmax": lambda logits: torch.softmax(logits, dim=-1),
    "sigmoid": torch.sigmoid,
}
"""What a router makes of its logits, by name; both grow with the logit."""


def _descending(values: Tensor) -> Tensor:
    """Places along the last dimension, the greatest value first: NaN before all, equals in order of their place."""
    return values.sort(dim=-1, descending=True, stable=True).indices


def check_router(
    num_experts: int,
    top_k: int,
    num_groups: int = 1,
    top_k_groups: int = 1,
    score: str = "softmax",
    correction_bias: Tensor | None = None,
) -> None:
    """Raise RoutingError, UnknownNameError or ShapeError unless a router's rule fits its experts, as `grouped_topk` says."""
    check_top_k(num_experts, top_k)
    if score not in SCORES:
        raise UnknownNameError(f"Unknown score {score!r}. Expected one of {sorted(SCORES)}. Name one of them.")
    if num_groups < 1 or num_experts % num_groups or not 1 <= top_k_groups <= num_groups:
        raise RoutingError(
            f"{num_groups} groups ({top_k_groups} chosen) over {num_experts} experts. Expected groups that divide the "
            "experts, and 1 <= top_k_groups <= num_groups. Take n_group and topk_group from the model's config.json."
        )
    if top_k > top_k_groups * (num_experts // num_groups):
        raise RoutingError(
            f"top_k = {top_k} but {top_k_groups} groups hold {top_k_groups * (num_experts // num_groups)} experts. "
            "Expected top_k experts to choose from. Raise top_k_groups."
        )
    if correction_bias is not None and correction_bias.shape != (num_experts,):
        raise ShapeError(
            f"correction_bias has shape {tuple(correction_bias.shape)}. Expected ({num_experts},): one value an expert. "
            "Pass the layer's e_score_correction_bias."
        )


def check_local_experts(local_experts: range | None, num_experts: int) -> range:
    """The experts of this rank, all of them if None; raises RoutingError on a range that is no part of them."""
    local = range(num_experts) if local_experts is None else local_experts
    if local.step != 1 or not 0 <= local.start < local.stop <= num_experts:
        raise RoutingError(
            f"local_experts = {local} of {num_experts} experts. Expected range(first, last + 1) within "
            f"range(0, {num_experts}). Pass the experts whose weights this rank holds."
        )
    return local
