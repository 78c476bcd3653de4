"""The order of slots by expert: its laws, and the kernels equal to torch bit by bit."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from sampling import sampled

from moelab import runtime
from moelab.errors import ShapeError
from moelab.kernels.expert_order import expert_order, new_expert_order
from moelab.routing import ExpertOrder, expert_order_ref, make_routing

DEVICE = runtime.current().device


def drawn_ids(num_tokens: int, num_experts: int, top_k: int, seed: int, foreign: float = 0.0) -> torch.Tensor:
    """A zipf routing, a share of its ids -1."""
    ids = make_routing("zipf", num_tokens, num_experts, top_k, seed=seed).topk_ids
    lost = torch.rand(ids.shape, generator=torch.Generator().manual_seed(seed)) < foreign
    return torch.where(lost, -1, ids).to(DEVICE)


def same(found: ExpertOrder, expected: ExpertOrder) -> None:
    assert torch.equal(found.sorted_slots, expected.sorted_slots)
    assert torch.equal(found.expert_offsets, expected.expert_offsets)
    assert found.sorted_slots.dtype == found.expert_offsets.dtype == torch.int32


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 1.0]))
def test_order_law(num_experts: int, num_tokens: int, seed: int, foreign: float) -> None:
    """Every slot of this rank stands once, in its expert's run, in ascending order; the rest is num_slots."""
    ids = drawn_ids(num_tokens, num_experts, 1 + seed % num_experts, seed, foreign)
    order, flat = expert_order_ref(ids, num_experts), ids.flatten().tolist()
    offsets, slots = order.expert_offsets.tolist(), order.sorted_slots.tolist()
    assert len(offsets) == num_experts + 1 and offsets == sorted(offsets) and offsets[0] == 0
    for expert in range(num_experts):
        own = slots[offsets[expert] : offsets[expert + 1]]
        assert own == [slot for slot, of in enumerate(flat) if of == expert]
    assert slots[offsets[-1] :] == [len(flat)] * flat.count(-1)


@settings(max_examples=15)
@example(num_tokens=1, num_experts=1, seed=0, foreign=0.0)
@example(num_tokens=700, num_experts=6, seed=5, foreign=0.3)  # 4200 slots: three launches
@example(num_tokens=700, num_experts=6, seed=5, foreign=1.0)  # nothing for this rank
@given(
    num_tokens=st.integers(1, 60), num_experts=st.integers(1, 20), seed=st.integers(0, 999),
    foreign=st.sampled_from([0.0, 0.3, 1.0]),
)  # fmt: skip
def test_equals_torch(num_tokens: int, num_experts: int, seed: int, foreign: float) -> None:
    ids = drawn_ids(num_tokens, num_experts, 1 + seed % num_experts, seed, foreign)
    same(expert_order(ids, num_experts), expert_order_ref(ids, num_experts))


# 127 to 129 and 2047 to 2049 slots: a chunk of the tile, and of the three launches, full, short, and one over.
@pytest.mark.parametrize(
    ("num_slots", "num_experts"),  # 63 and two buckets more are past 64
    sampled([127, 128, 129, 512, 513, 2047, 2048, 2049, 2176], [1, 62, 60, 63], together=1),
)
def test_edges_of_chunks_and_buckets(num_slots: int, num_experts: int) -> None:
    if runtime.current().mode != "gpu" and num_slots > 513 and num_experts not in (1, 62):
        pytest.skip("slow under the interpreter; others of these sizes run")
    ids = drawn_ids(num_slots, num_experts, 1, num_slots, 0.1)
    same(expert_order(ids, num_experts), expert_order_ref(ids, num_experts))


@pytest.mark.parametrize("num_tokens", [3, 1500])  # one launch, three
def test_one_expert_takes_everything(num_tokens: int) -> None:
    ids = torch.full((num_tokens, 2), 3, dtype=torch.int32, device=DEVICE)
    order = expert_order(ids, 5)
    assert order.sorted_slots.tolist() == list(range(2 * num_tokens))
    assert order.expert_offsets.tolist() == [0, 0, 0, 0, 2 * num_tokens, 2 * num_tokens]


@pytest.mark.parametrize("num_tokens", [3, 1500])
def test_int64_ids_are_ids_and_out_is_written(num_tokens: int) -> None:
    ids = drawn_ids(num_tokens, 7, 2, 4)
    out = new_expert_order(ids.numel(), 7, DEVICE)
    assert expert_order(ids.long(), 7, out=out) is out
    same(out, expert_order_ref(ids, 7))


@pytest.mark.parametrize("num_tokens", [3, 1500])  # one launch, three
def test_an_id_past_32_bits_is_no_expert(num_tokens: int) -> None:
    """The low half of 2^32 + 1 is expert 1, of -2^32 expert 0."""
    ids = drawn_ids(num_tokens, 7, 2, 4).long()
    lost = torch.where(ids == 3, 2**32 + 1, torch.where(ids == 5, -(2**32), ids))
    same(expert_order(lost, 7), expert_order_ref(torch.where((ids == 3) | (ids == 5), -1, ids), 7))


def test_no_slots() -> None:
    empty = torch.empty(0, 4, dtype=torch.int32, device=DEVICE)
    order = expert_order(empty, 8)
    assert order.sorted_slots.numel() == 0 and order.expert_offsets.tolist() == [0] * 9


def test_an_order_for_another_batch_is_refused() -> None:
    ids = drawn_ids(3, 7, 2, 4)
    with pytest.raises(ShapeError, match=r"out\.sorted_slots has shape \(8,\)\. Expected \(6\)"):
        expert_order(ids, 7, out=new_expert_order(8, 7, DEVICE))
    with pytest.raises(ShapeError, match=r"out\.expert_offsets"):
        expert_order(ids, 7, out=new_expert_order(6, 8, DEVICE))


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"),
    [(1, 128, 8), (16, 128, 8), (256, 128, 8), (257, 256, 8), (8192, 256, 8), (8192, 16, 1), (600, 60, 4)],
)
@pytest.mark.parametrize("foreign", [0.0, 0.5])
def test_equals_torch_at_real_sizes(num_tokens: int, num_experts: int, top_k: int, foreign: float) -> None:
    ids = drawn_ids(num_tokens, num_experts, top_k, 3, foreign)
    expected = expert_order_ref(ids, num_experts)
    for _ in range(3):  # deterministic
        same(expert_order(ids, num_experts), expected)
