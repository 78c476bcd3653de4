"""Inputs repeat, have the shapes and scales that they promise, and keep every intermediate of order one."""

from __future__ import annotations

import torch

from moelab.inputs import make_inputs, routing_for
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


def test_fused_shared_experts_get_every_token_and_other_ranks_experts_none() -> None:
    shape = MoEShape("s", 5, 3, 64, 32, ep_size=2, tp_size=2, num_shared_experts_fused=1)  # 4 of 8 routed, 1 shared
    routing = routing_for(shape, 400, seed=1)
    assert (routing.topk_ids[:, -1] == 4).all() and (routing.topk_weights[:, -1] == 1).all()
    routed = routing.topk_ids[:, :-1]
    assert routed.min() == -1 and routed.max() == 3
    share = float((routed >= 0).float().mean())
    assert abs(share - 0.5) < 0.1  # half of the routed experts are here; 800 draws, standard error 0.018
    assert make_inputs(shape, 3, dtype=torch.float32, device="cpu").topk_ids.shape == (3, 3)


def test_intermediates_stay_of_order_one() -> None:
    i = make_inputs(SHAPE, 200, dtype=torch.float32, device="cpu")
    h = i.hidden_states @ i.w13[0].T
    y = activation_ref(h, "silu") @ i.w2[0].T
    assert 0.8 < float(h.std()) < 1.2 and 0.2 < float(y.std()) < 1.2
