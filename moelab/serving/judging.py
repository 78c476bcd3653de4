"""Is a contender right: one block's result against float64, and the logits against a model whose experts are float64's."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from moelab import hf, precision
from moelab.errors import PrecisionError
from moelab.serving.contenders import EXACT, exact, failures, release, told, use
from moelab.serving.routes import routed, top_k_of
from moelab.serving.steps import random_ids

TOKENS = 64
"""Of the prompt that is judged: every expert of 64 that a token has eight of is likely to be asked."""

Row = dict[str, Any]


def judged(model: Any, names: Sequence[str], own: str) -> list[Row]:
    """A row for each contender and kind, "error" (one block) and "logits": rel_error, rel_error_eager, within_bound.

    Both by moelab's policy: at most twice the error of `own`, the model's `yardstick` (its own experts, "eager"; another is named
    in the row, as `beside`), and a rounding. For logits the experts of the reference are float64's, all else the model's; their
    routing is balanced, for under gates of random weights a rounding would send tokens elsewhere.
    """
    with torch.no_grad():
        rows = _of_block(model, names, own)
        with routed(model, "balanced", TOKENS):
            return rows + _of_logits(model, names, own)


def _of_block(model: Any, names: Sequence[str], own: str) -> list[Row]:
    block: Any = next(iter(hf.experts_of(model).values()))
    experts, *sizes = block.down_proj.shape
    drawn = torch.Generator().manual_seed(0)
    x = torch.randn((TOKENS, sizes[block.is_transposed]), generator=drawn).to(model.device, model.dtype)
    logits = torch.randn((TOKENS, experts), generator=drawn).to(x.device)
    weights, ids = logits.softmax(-1).topk(top_k_of(block))
    weights = weights.to(x.dtype)
    return _rows("error", model, names, own, lambda: block(x, ids, weights), exact(block, x, ids, weights))


def _of_logits(model: Any, names: Sequence[str], own: str) -> list[Row]:
    ids = random_ids(model, 1, TOKENS, seed=1)

    def run() -> Tensor:
        return model(input_ids=ids, use_cache=False).logits[0]

    use(model, EXACT)
    return _rows("logits", model, names, own, run, run().double())


def _rows(kind: str, model: Any, names: Sequence[str], beside: str, run: Any, exact: Tensor) -> list[Row]:
    use(model, beside)
    own = run()
    rows = []
    for name in names:
        row: Row = {"kind": kind, "impl": name, "num_tokens": TOKENS}
        row |= {} if beside == "eager" else {"beside": beside}
        try:
            use(model, name)
            row |= _verdict(run(), own, exact)
        except failures() as error:
            row["refused"] = told(error)
        if "refused" in row:
            release()
        rows.append(row)
    return rows


def _verdict(out: Tensor, own: Tensor, exact: Tensor) -> Row:
    report = precision.error(out, exact)
    row: Row = {"rel_error_eager": precision.error(own, exact).rel_fro, "within_bound": True}
    if report.finite:
        row["rel_error"] = report.rel_fro
    try:
        precision.check(out, own, exact)
    except PrecisionError as error:
        row |= {"within_bound": False, "problem": str(error)}
    return row
