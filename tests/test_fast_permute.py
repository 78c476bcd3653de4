"""sm90_fast_layer.cu with PERMUTES: tokens first written out by expert, on an emulated chip; and outputs that GEMM2 writes
itself."""

from __future__ import annotations

from pathlib import Path

import emulated_gpu
import pytest
import torch
from fast_cases import (
    MIDDLE,
    MIDDLE_PAIR,
    MIDDLE_PERMUTED,
    PAIR_PERMUTED,
    SMALL,
    WIDE_PERMUTED,
    compare,
    needs_compiler,
    ordered,
)
from sampling import whole

from moelab.kernels import fast_layer
from moelab.kernels.fast_instances import PERMUTED, Instance


@needs_compiler
@pytest.mark.parametrize(
    "instance, sizes, blocks",
    [
        whole(MIDDLE_PERMUTED, (1, 4, 2, 128, 64), 4),
        whole(MIDDLE_PERMUTED, (40, 3, 2, 136, 72), 2),
        # Several descriptors of one expert, K and both kinds of rows end inside a tile.
        (MIDDLE_PERMUTED, (70, 2, 2, 200, 136), 4),
        whole(MIDDLE_PERMUTED, (9, 20, 3, 64, 8), 4),  # most experts have a row or none
        (MIDDLE_PERMUTED, (33, 3, 2, 1032, 72), 2),  # a row of several pieces, the last of one unit
        whole(WIDE_PERMUTED, (100, 2, 2, 64, 104), 4),
        (PAIR_PERMUTED, (40, 3, 2, 136, 72), 2),
        whole(PAIR_PERMUTED, (150, 1, 1, 200, 136), 4),
        (PAIR_PERMUTED, (9, 20, 3, 64, 8), 2),  # all second halves are empty
    ],
)
def test_the_layer_is_right_and_ends(instance: Instance, sizes: tuple[int, ...], blocks: int) -> None:
    compare(instance, *sizes, blocks=blocks)


@needs_compiler
@pytest.mark.parametrize("instance", [whole(MIDDLE_PERMUTED), PAIR_PERMUTED])
def test_weights_on_the_input(instance: Instance) -> None:
    compare(instance, 20, 3, 2, 128, 64, on_input=True)


@needs_compiler
@pytest.mark.parametrize("instance", [MIDDLE_PERMUTED, whole(PAIR_PERMUTED)])
def test_in_bfloat16(instance: Instance) -> None:
    compare(instance, 20, 3, 2, 128, 64, dtype=torch.bfloat16)


@needs_compiler
@pytest.mark.parametrize("instance", [SMALL, *map(whole, (MIDDLE, MIDDLE_PAIR, MIDDLE_PERMUTED)), PAIR_PERMUTED])
def test_of_one_slot_a_token_gemm2_writes_the_output(instance: Instance) -> None:
    """Scaled, by routed weights of either part; zeros for tokens whose expert is on another rank, all of them too."""
    for on_input in (False, True):
        compare(instance, 20, 3, 1, 128, 64, on_input=on_input)
    ids = torch.tensor([[0], [-1], [1], [-1], [2]], dtype=torch.int32)
    compare(instance, 5, 3, 1, 64, 64, ids=ids)
    compare(instance, 5, 3, 1, 64, 64, ids=torch.full((5, 1), -1, dtype=torch.int32))


@needs_compiler
def test_slots_of_other_ranks_count_nothing() -> None:
    ids = torch.tensor([[0, -1], [-1, -1], [1, 0], [-1, 1]], dtype=torch.int32)
    compare(MIDDLE_PERMUTED, 4, 3, 2, 64, 64, ids=ids)


@needs_compiler
def test_rows_are_those_of_the_order() -> None:
    """Each written once, as they were; and GEMM2 alone asks for none of them."""
    g = torch.Generator().manual_seed(3)
    x, weights = torch.randn(90, 72, generator=g).half(), torch.rand(90, 2, generator=g)
    w13, w2 = torch.randn(3, 32, 72, generator=g).half(), torch.randn(3, 72, 16, generator=g).half()
    ids = torch.stack([torch.randperm(3, generator=g)[:2] for _ in range(90)]).int()
    tiles = ordered(ids, 3, MIDDLE_PERMUTED)
    given = (x, w13, w2, weights, ids, tiles, MIDDLE_PERMUTED)
    *_, rows = emulated_gpu.run_layer(*given)
    assert rows.equal(x[tiles.sorted_slots.long() // 2])
    *_, rows = emulated_gpu.run_layer(*given, parts=fast_layer.GEMM2)
    assert rows.isnan().all()


@needs_compiler
@pytest.mark.whole
def test_rows_that_are_not_waited_for_are_seen(tmp_path: Path) -> None:
    """Without the wait TMA reads what no warp has written yet, all of them being a quarter of a second late: not-a-number."""
    waits = "    wait_for_count(&layer.ready[scheduler.tokens], count,"
    unless = waits.replace("wait_for", "if (scheduler.gemm) wait_for")
    start = "    const int lane = threadIdx.x & 31;\n"
    sleeps = (
        "sm90_fast_permute.cuh",
        start,
        f"    std::this_thread::sleep_for(std::chrono::milliseconds(250));\n{start}",
    )
    source = emulated_gpu.altered(tmp_path / "wrong", sleeps, ("sm90_fast_producers.cuh", waits, unless))
    compare(MIDDLE_PERMUTED, 64, 2, 2, 1032, 64, source=emulated_gpu.altered(tmp_path / "right", sleeps))
    with pytest.raises(AssertionError, match="nan"):
        compare(MIDDLE_PERMUTED, 64, 2, 2, 1032, 64, source=source)


def test_a_form_that_gathers_keeps_its_recorded_name() -> None:
    assert (
        repr(PERMUTED).endswith("per_processor=1, permutes=1, apart=1)") and Instance.named(repr(PERMUTED)) == PERMUTED
    )
    assert repr(PAIR_PERMUTED).endswith("cluster=2, permutes=1)") and "permutes" not in repr(MIDDLE_PAIR)
    assert PERMUTED.shape == "Shape<2, 2, 4, 176, 16, 16, 1, 1, 1, 1, 0>"
