"""One launch that sorts slots by expert: emulated on a CPU, compiled for Hopper, and on a GPU behind its callers."""

from __future__ import annotations

import contextlib

import pytest
import torch
from emulated_order import run
from kept import hopper_code
from sampling import sampled

from moelab.kernels import cubin, slot_order
from moelab.kernels.align import moe_align_block_size
from moelab.kernels.expert_order import expert_order, ordered_tiles
from moelab.kernels.slot_order import DENSE, MOST_ROUNDS, Cut, Kind, aligned, cut_for
from moelab.kernels.token_tiles import TokenTiles, new_token_tiles, token_tiles_ref
from moelab.routing import expert_order_ref, make_routing, max_padded_pairs, moe_align_block_size_ref
from moelab.suites.slot_order import forced

CUTS = (Cut(1, 2, 1, 288), Cut(1, 2, 2, 544), Cut(2, 2, 1, 256), Cut(2, 2, 4, 288))
"""64 threads a CTA, as each is a thread of the system."""


def ids_of(num_slots: int, num_experts: int, dtype: torch.dtype) -> torch.Tensor:
    """Skewed, a fifth of them of other ranks, some past the last expert, which itself gets none where there are several."""
    drawn = torch.Generator().manual_seed(num_slots + num_experts)
    ids = (torch.rand(num_slots, generator=drawn) ** 3 * max(1, num_experts - 1)).long()
    away = torch.rand(num_slots, generator=drawn)
    ids[away < 0.1], ids[away > 0.9] = -1, num_experts + 5
    return ids.view(-1, 1).to(dtype)


def filled(*size: int) -> torch.Tensor:
    return torch.full(size, -77, dtype=torch.int32).share_memory_()


def tiles_in_memory(num_slots: int, num_experts: int, tile_rows: int, for_clusters: bool) -> TokenTiles:
    made = new_token_tiles(filled(num_slots), num_experts, tile_rows, for_clusters)
    return TokenTiles(*(t.fill_(-77).clone().share_memory_() for t in made))


CASES = sampled(CUTS, ["all", "less", "one"], [1, 2, 40, 63], [torch.int32, torch.int64], together=1)


def sized(cut: Cut, size: str) -> int:
    return {"all": cut.slots, "less": cut.slots * 2 // 3 + 1, "one": 1}[size]


@pytest.mark.parametrize(("cut", "size", "num_experts", "dtype"), CASES)
def test_emulated_alignment(cut: Cut, size: str, num_experts: int, dtype: torch.dtype) -> None:
    ids = ids_of(sized(cut, size), num_experts, dtype)
    for block in (16, 128):
        expected = moe_align_block_size_ref(ids, block, num_experts)
        length = max_padded_pairs(ids.numel(), block, num_experts)
        tokens, experts, total = filled(length), filled(length // block), filled(1)
        given = slot_order.arguments(ids, num_experts, tokens, block_experts=experts, rows_in_use=total)
        run(aligned(block), cut, dtype, given)
        rows = int(expected.num_tokens_post_padded)
        assert int(total) == rows
        assert torch.equal(tokens[:rows], expected.sorted_token_ids[:rows])
        assert torch.equal(experts[: rows // block], expected.expert_ids[: rows // block])
        assert (tokens[rows:] == -77).all() and (experts[rows // block :] == -77).all()


@pytest.mark.parametrize(("cut", "size", "num_experts", "dtype"), CASES)
def test_emulated_order_and_tiles(cut: Cut, size: str, num_experts: int, dtype: torch.dtype) -> None:
    ids = ids_of(sized(cut, size), num_experts, dtype)
    expected = expert_order_ref(ids, num_experts)
    slots, offsets = filled(ids.numel()), filled(num_experts + 1)
    run(DENSE, cut, dtype, slot_order.arguments(ids, num_experts, slots, first_rows=offsets))
    assert torch.equal(slots, expected.sorted_slots) and torch.equal(offsets, expected.expert_offsets)
    for rows, grain, in_pairs in ((8, 8, False), (48, 16, True), (5, 1, True), (16, 8, False)):
        check_tiles(cut, ids, num_experts, rows, grain, in_pairs)


def check_tiles(
    cut: Cut, ids: torch.Tensor, num_experts: int, rows: int, grain: int, in_pairs: bool, source: str | None = None
) -> None:
    order = expert_order_ref(ids, num_experts)
    expected = token_tiles_ref(order.sorted_slots, order.expert_offsets, rows, grain, in_pairs)
    made, offsets = tiles_in_memory(ids.numel(), num_experts, rows, in_pairs), filled(num_experts + 1)
    given = slot_order.tile_arguments(ids, num_experts, made, offsets)
    run(Kind("TILED", rows, grain, in_pairs), cut, ids.dtype, given, source)
    count = int(expected.num_tiles)
    assert int(made.num_tiles) == count and made.tiles[:count].tolist() == expected.tiles[:count].tolist()
    assert torch.equal(made.sorted_slots, order.sorted_slots) and torch.equal(offsets, order.expert_offsets)
    assert not made.ready.any()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ("c < rank ? count : 0", "c <= rank ? count : 0"),  # the CTAs below and this one
        ("K::SIZES - 1 - each / K::GRAIN", "each / K::GRAIN"),  # the smallest first
        (
            "below = same & ((1u << lane) - 1);\n            const int before",
            "below = same;\n            const int before",
        ),
    ],
)
def test_a_planted_fault_is_found(old: str, new: str) -> None:
    text = slot_order.source()
    assert text.count(old) == 1
    cut = CUTS[2]
    ids = ids_of(cut.slots, 20, torch.int32)
    with pytest.raises((AssertionError, RuntimeError)):  # or it runs into the ground
        check_tiles(cut, ids, 20, 48, 8, False, text.replace(old, new))


@pytest.mark.parametrize(("num_slots", "num_experts"), [(1, 1), (1024, 287), (2048, 512), (8192, 256), (131072, 543)])
def test_cuts_hold_their_slots(num_slots: int, num_experts: int) -> None:
    cut = cut_for(num_slots, num_experts)
    assert cut is not None and cut.slots >= num_slots and num_experts < min(cut.buckets, cut.warps * 32)


@pytest.mark.parametrize(("num_slots", "num_experts"), [(131073, 8), (8, 544)])
def test_what_no_cut_holds(num_slots: int, num_experts: int) -> None:
    assert cut_for(num_slots, num_experts) is None


EVERY = [(slots, experts) for slots in (8, 2000, 8192, 8192 * 16) for experts in (8, 512)]


KINDS = (aligned(16), aligned(128), DENSE, Kind("TILED", 16, 8), Kind("TILED", 96, 16, True), Kind("TILED", 176, 16))


@pytest.mark.parametrize(("kind", "size", "ids"), sampled(KINDS, EVERY, [torch.int32, torch.int64], together=1))
def test_compiles_for_hopper_without_spills(kind: str, size: tuple[int, int], ids: torch.dtype) -> None:
    cut = cut_for(*size)
    assert cut is not None and (size[0] < 8192 * 16 or cut.rounds == MOST_ROUNDS)
    registers, stack = cubin.usage(hopper_code(slot_order.source(), cut.expression(kind, ids)))
    assert stack == 0 and registers * cut.warps * 32 <= 65536


def test_more_shared_memory_than_asked_for_is_refused_when_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Cut, "shared_bytes", lambda *_: 4 << 10)
    with pytest.raises(Exception, match="static assertion"):
        hopper_code(slot_order.source(), Cut(1, 8, 1, 288).expression(DENSE, torch.int32))


@pytest.mark.gpu
@pytest.mark.parametrize("num_experts", [8, 32, 128, 257, 512])
@pytest.mark.parametrize("num_tokens", [1, 3, 96, 128, 300, 1024, 2500, 8192])
@pytest.mark.parametrize("always", [True, False])
def test_on_a_gpu(num_experts: int, num_tokens: int, always: bool) -> None:
    """As callers get it, and the launch itself at every size."""
    with forced(True) if always else contextlib.nullcontext():
        check_on_a_gpu(num_experts, num_tokens)


def check_on_a_gpu(num_experts: int, num_tokens: int) -> None:
    top_k = min(8, num_experts)
    ids = make_routing("zipf", num_tokens, num_experts, top_k, seed=num_tokens, device="cuda").topk_ids
    for each in (ids, torch.where(ids % 3 == 0, -1, ids).long()):
        assert slot_order.takes(DENSE, each, num_experts)
        order, dense = expert_order(each, num_experts), expert_order_ref(each, num_experts)
        assert torch.equal(order.sorted_slots, dense.sorted_slots)
        assert torch.equal(order.expert_offsets, dense.expert_offsets)
        for block in (8, 16, 128):
            found, expected = (
                moe_align_block_size(each, block, num_experts),
                moe_align_block_size_ref(each, block, num_experts),
            )
            rows = int(expected.num_tokens_post_padded)
            assert int(found.num_tokens_post_padded) == rows
            assert torch.equal(found.sorted_token_ids[:rows], expected.sorted_token_ids[:rows])
            assert torch.equal(found.expert_ids[: rows // block], expected.expert_ids[: rows // block])
        for tile_rows, grain, in_pairs in ((16, 8, False), (48, 16, False), (96, 16, True), (176, 16, False)):
            made = ordered_tiles(each, num_experts, tile_rows, grain, in_pairs)
            cpu = dense.sorted_slots.cpu(), dense.expert_offsets.cpu()
            oracle = token_tiles_ref(*cpu, tile_rows, grain, in_pairs)
            count = int(oracle.num_tiles)
            assert int(made.num_tiles) == count and made.tiles[:count].tolist() == oracle.tiles[:count].tolist()
            assert torch.equal(made.sorted_slots, dense.sorted_slots) and not made.ready.any()
