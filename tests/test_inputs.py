"""Inputs repeat, have the shapes and scales that they promise, and keep every intermediate of order one."""

from __future__ import annotations

import torch

from moelab.inputs import make_inputs
from moelab.reference import activation_ref
from moelab.shapes import MoEShape

SHAPE = MoEShape.from_sizes(num_experts=6, top_k=2, hidden_size=256, moe_intermediate_size=96)


def test_shapes_and_dtypes() -> None:
    i = make_inputs(SHAPE, 5, dtype=torch.float16, device="cpu", bias=True)
    assert i.hidden_states.shape == (5, 256) and i.w13.shape == (6, 192, 256) and i.w2.shape == (6, 256, 96)
    assert i.b13.shape == (6, 192) and i.b2.shape == (6, 256)
    assert i.topk_ids.dtype == torch.int32 and i.topk_weights.dtype == torch.float32
    assert {t.dtype for t in (i.hidden_states, i.w13, i.w2, i.b13, i.b2)} == {torch.float16}
    assert i.to(torch.float64).w13.dtype == torch.float64 and i.to(torch.float64).topk_ids is i.topk_ids


def test_the_same_seed_gives_the_same_tensors() -> None:
    a, b, c = (make_inputs(SHAPE, 5, dtype=torch.float32, device="cpu", seed=s) for s in (1, 1, 2))
    assert torch.equal(a.w13, b.w13) and torch.equal(a.topk_ids, b.topk_ids) and not torch.equal(a.w13, c.w13)
    assert not torch.equal(a.w13[0], a.w13[1])


def test_intermediates_stay_of_order_one() -> None:
    i = make_inputs(SHAPE, 200, dtype=torch.float32, device="cpu")
    h = i.hidden_states @ i.w13[0].T
    y = activation_ref(h, "silu") @ i.w2[0].T
    assert 0.8 < float(h.std()) < 1.2 and 0.2 < float(y.std()) < 1.2
