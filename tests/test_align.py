"""The device's alignment equals torch's, in each of its three ways."""

from __future__ import annotations

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from moelab.errors import DtypeError, ShapeError
from moelab.kernels.align import align, align_pairs, moe_align_block_size
from moelab.routing import make_routing, moe_align_block_size_ref


def same(ids: torch.Tensor, block: int, num_experts: int) -> None:
    found, expected = moe_align_block_size(ids, block, num_experts), moe_align_block_size_ref(ids, block, num_experts)
    total = int(expected.num_tokens_post_padded)
    assert int(found.num_tokens_post_padded) == total
    assert torch.equal(found.sorted_token_ids[:total], expected.sorted_token_ids[:total])
    assert torch.equal(found.expert_ids[: total // block], expected.expert_ids[: total // block])


@settings(max_examples=15)
@example(num_tokens=1, num_experts=1, block=16, seed=0, foreign=False)
@example(num_tokens=700, num_experts=6, block=16, seed=5, foreign=True)  # 4200 pairs: two launches
@given(
    num_tokens=st.integers(1, 60), num_experts=st.integers(1, 20), block=st.sampled_from([16, 64]),
    seed=st.integers(0, 999), foreign=st.booleans(),
)  # fmt: skip
def test_equals_torch(num_tokens: int, num_experts: int, block: int, seed: int, foreign: bool) -> None:
    from moelab import runtime

    device = runtime.current().device
    ids = make_routing("zipf", num_tokens, num_experts, 1 + seed % num_experts, seed=seed, device=device).topk_ids
    same(torch.where(ids % 3 == 0, -1, ids) if foreign else ids, block, num_experts)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("num_tokens", "num_experts", "top_k"), [(8192, 128, 8), (8192, 256, 8), (1, 256, 8), (600, 60, 4)]
)
@pytest.mark.parametrize("block", [16, 32, 64, 128, 256])
def test_equals_torch_at_real_sizes(num_tokens: int, num_experts: int, top_k: int, block: int) -> None:
    same(make_routing("zipf", num_tokens, num_experts, top_k, device="cuda").topk_ids, block, num_experts)


def test_pairs_have_a_block_each(device: str) -> None:
    ids = torch.tensor([[3, -1], [3, 0]], dtype=torch.int32, device=device)
    found = align_pairs(ids, 16, 4)
    assert found.expert_ids.tolist() == [3, -1, 3, 0] and found.num_tokens_post_padded.item() == 64
    blocks = found.sorted_token_ids.view(4, 16)
    assert blocks[:, 0].tolist() == [0, 1, 2, 3] and (blocks[:, 1:] == 4).all()


def test_small_batches_of_many_experts_are_not_sorted(device: str) -> None:
    ids = make_routing("uniform", 1, 32, 8, device=device).topk_ids
    assert align(ids, 16, 32).sorted_token_ids.numel() == 8 * 16
    assert align(ids, 16, 31).sorted_token_ids.numel() == 8 * 16  # 8 buckets in use at most
    assert align(ids, 16, 31).expert_ids.tolist() == sorted(ids.flatten().tolist())


@pytest.mark.parametrize("num_tokens", [1, 40, 1500])  # a block a pair, one launch, three launches
def test_int64_ids_are_ids(num_tokens: int, device: str) -> None:
    ids = make_routing("zipf", num_tokens, 32, 2, seed=4, device=device).topk_ids
    narrow, wide = align(ids, 16, 32), align(ids.long(), 16, 32)
    total = int(narrow.num_tokens_post_padded)
    assert int(wide.num_tokens_post_padded) == total
    assert torch.equal(narrow.sorted_token_ids[:total], wide.sorted_token_ids[:total])
    assert torch.equal(narrow.expert_ids[: total // 16], wide.expert_ids[: total // 16])


def test_no_pairs(device: str) -> None:
    empty = torch.empty(0, 4, dtype=torch.int32, device=device)
    assert moe_align_block_size(empty, 16, 8).num_tokens_post_padded.item() == 0
    assert align_pairs(empty, 16, 8).num_tokens_post_padded.item() == 0


def test_bad_arguments(device: str) -> None:
    ids = torch.zeros(2, 2, dtype=torch.int32, device=device)
    with pytest.raises(ShapeError, match="power of two"):
        align(ids, 24, 4)
    with pytest.raises(ShapeError, match="num_tokens, top_k"):
        align(ids.flatten(), 16, 4)
    with pytest.raises(DtypeError, match="int32 or int64"):
        align(ids.float(), 16, 4)
