"""sm90_fast_layer.cu: its arithmetic and its waiting on an emulated chip, its instances through the real compiler."""

from __future__ import annotations

import ctypes
from pathlib import Path

import emulated_gpu
import pytest
import torch
from fast_cases import (
    MIDDLE,
    MIDDLE_APART,
    MIDDLE_PAIR,
    SMALL,
    SMALL_PAIR,
    SMALL_PAIR_APART,
    STAGED_IN_ONE,
    WIDE,
    compare,
    needs_compiler,
    ordered,
)  # fmt: skip
from hypothesis import given, settings
from hypothesis import strategies as st
from kept import hopper_code
from sampling import sampled, whole

from moelab.chips import TARGETS
from moelab.errors import DtypeError, RuntimeModeError, ShapeError
from moelab.kernels import cubin, fast_layer
from moelab.kernels.fast_instances import ALL, INSTANCES, PERMUTED, STORAGE, Instance, instance_for
from moelab.kernels.fast_layer import check_fast_layer


@needs_compiler
@pytest.mark.parametrize(
    "instance, sizes, blocks",
    [
        whole(SMALL, (1, 4, 2, 128, 64), 1),
        (SMALL, (3, 5, 1, 72, 40), 3),  # K and both kinds of rows end inside a tile
        whole(SMALL, (40, 2, 2, 64, 64), 1),  # three tiles of tokens an expert
        (MIDDLE, (40, 3, 2, 136, 72), 3),
        whole(MIDDLE, (70, 1, 1, 200, 136), 1),
        (MIDDLE, (9, 20, 3, 64, 8), 3),  # most experts have a row or none
        # Nine steps of K: the next record's rows are asked for before this one's last.
        whole(MIDDLE, (90, 3, 2, 520, 72), 1),
        whole(WIDE, (100, 2, 2, 64, 104), 3),
        (STAGED_IN_ONE, (100, 2, 2, 72, 104), 1),
        (SMALL, (20, 12, 11, 72, 40), 3),  # more slots than are on their way at once
        whole(MIDDLE, (20, 12, 8, 72, 40), 1),
        whole(MIDDLE, (33, 5, 4, 72, 40), 3),
        (MIDDLE, (20, 5, 3, 136, 40), 1),
        whole(MIDDLE_APART, (20, 12, 11, 72, 40), 3),
        (MIDDLE_APART, (70, 5, 4, 136, 40), 1),
        whole(MIDDLE_APART, (257, 3, 2, 72, 40), 3),  # the sums' last block has one place
        (MIDDLE_APART, (9, 2, 1, 64, 40), 1),  # nothing to add up
    ],
)
def test_the_layer_is_right_and_ends(instance: Instance, sizes: tuple[int, ...], blocks: int) -> None:
    compare(instance, *sizes, blocks=blocks)


@needs_compiler
@pytest.mark.parametrize("instance", [whole(MIDDLE), MIDDLE_PAIR])
def test_in_bfloat16(instance: Instance) -> None:
    compare(instance, 20, 3, 2, 128, 64, dtype=torch.bfloat16, narrow=True)


@needs_compiler
@pytest.mark.parametrize("instance", [whole(SMALL), whole(MIDDLE), MIDDLE_APART, SMALL_PAIR, whole(MIDDLE_PAIR)])
def test_weights_on_the_input(instance: Instance) -> None:
    compare(instance, 20, 3, 1, 128, 64, on_input=True, narrow=instance.cluster > 1)


@needs_compiler
@pytest.mark.parametrize("instance", [SMALL, SMALL_PAIR, whole(SMALL_PAIR_APART)])
def test_slots_of_other_ranks_count_nothing(instance: Instance) -> None:
    ids = torch.tensor([[0, -1], [-1, -1], [1, 0], [-1, 1]], dtype=torch.int32)
    compare(instance, 4, 3, 2, 64, 64, ids=ids)
    compare(instance, 12, 3, 9, 64, 64, ids=(torch.arange(108, dtype=torch.int32) % 5 - 1).view(12, 9))  # 3: of nobody
    compare(instance, 2, 3, 2, 64, 64, ids=torch.full((2, 2), -1, dtype=torch.int32))


@needs_compiler
@pytest.mark.parametrize(("instance", "top_k"), sampled([SMALL, MIDDLE, MIDDLE_APART], [1, 2, 3], together=1))
def test_ids_of_64_bits_are_not_narrowed(instance: Instance, top_k: int) -> None:
    """2^32 + 1 is no expert, where its low half would be expert 1; its weight may be anything."""
    ids = torch.arange(9 * top_k).view(9, top_k) % 4
    wide = torch.where(ids == 3, 2**32 + 1, ids)
    compare(instance, 9, 3, top_k, 64, 64, ids=wide, lost_weights=float("nan"))


@needs_compiler
@pytest.mark.parametrize("instance", [whole(MIDDLE), MIDDLE_PAIR])
def test_one_expert_that_takes_all(instance: Instance) -> None:
    compare(instance, 90, 6, 1, 64, 64, ids=torch.full((90, 1), 4, dtype=torch.int32), blocks=4)


@needs_compiler
@pytest.mark.parametrize(("instance", "grids"), [whole(SMALL, (1, 2, 4)), (SMALL_PAIR, (2, 4, 8))])
def test_the_same_bits_every_time(instance: Instance, grids: tuple[int, ...]) -> None:
    g = torch.Generator().manual_seed(1)
    x, weights = torch.randn(33, 64, generator=g).half(), torch.rand(33, 2, generator=g)
    w13, w2 = torch.randn(4, 128, 64, generator=g).half(), torch.randn(4, 64, 64, generator=g).half()
    ids = torch.stack([torch.randperm(4, generator=g)[:2] for _ in range(33)]).int()
    tiles = ordered(ids, 4, instance)
    runs = [emulated_gpu.run_layer(x, w13, w2, weights, ids, tiles, instance, blocks=blocks)[0] for blocks in grids]
    assert runs[0].equal(runs[1]) and runs[0].equal(runs[2])


@needs_compiler
@pytest.mark.parametrize(
    ("short_of", "says"),
    [
        (0, r"rows that a tile multiplies of tile descriptor 0 \(1 counts|all tiles of GEMM2, to add up \(2 counts"),
        (1, r"all tiles of GEMM2, to add up \(1 counts"),
    ],
)
def test_a_wait_that_never_ends_says_what_it_was_for(short_of: int, says: str) -> None:
    """A count that starts below zero is never reached: of GEMM1's tiles, which GEMM2 reads; of GEMM2's, before the sums.
    Where GEMM2 waits, so do the sums for it: whose patience ends first is the machine's to say."""
    x, ids = torch.randn(2, 64).half(), torch.tensor([[0, 0], [0, 0]], dtype=torch.int32)
    tiles = ordered(ids, 1, MIDDLE)
    tiles.ready[short_of if not short_of else tiles.most] = -1
    w13, w2 = torch.randn(1, 128, 64).half(), torch.randn(1, 64, 64).half()
    with pytest.raises(RuntimeError, match=rf"waited for (the )?({says}) missing"):
        emulated_gpu.run_layer(x, w13, w2, torch.rand(2, 2), ids, tiles, MIDDLE, patience_s=1)


@needs_compiler
@pytest.mark.whole
def test_consumers_that_never_empty_a_stage_are_seen_by_their_producer(tmp_path: Path) -> None:
    """They watch no clock themselves. Here the last stage of all is kept, which nobody would fill again."""
    kept = "    release<S>(done);\n}"
    source = emulated_gpu.altered(
        tmp_path, ("sm90_fast_mainloop.cuh", kept, "    if (k_steps != 2) release<S>(done);\n}")
    )
    x, ids = torch.randn(2, 64).half(), torch.zeros(2, 1, dtype=torch.int32)
    w13, w2 = torch.randn(1, 256, 64).half(), torch.randn(1, 64, 128).half()
    given = (x, w13, w2, torch.rand(2, 1), ids, ordered(ids, 1, MIDDLE), MIDDLE)
    with pytest.raises(RuntimeError, match="waited for consumers to empty a stage of weights and tokens"):
        emulated_gpu.run_layer(*given, blocks=1, patience_s=1, source=source)


@needs_compiler
def test_sizes_are_those_of_the_source() -> None:
    said = [(f"Shared<{each.shape}>", each.shared_bytes) for each in (SMALL, MIDDLE_PAIR, WIDE, STAGED_IN_ONE, *ALL)]
    said += [(f"Layer<{STORAGE[torch.float16][0]}>", ctypes.sizeof(fast_layer.LayerArguments))]
    said.append((f"Shared<{SMALL.shape}>", 1))  # it can fail
    refused = emulated_gpu.refused(f"static_assert(sizeof({what}) == {size});" for what, size in said)
    assert refused.count("static assertion failed") == refused.count("error:") == 1, refused
    assert f"({SMALL.shared_bytes} == 1)" in refused, refused


@pytest.mark.parametrize(
    ("instance", "dtype"),
    [
        (INSTANCES[16], torch.float16),
        whole(INSTANCES[96], torch.float16),
        *((each, torch.bfloat16) for each in (INSTANCES[48], PERMUTED)),
        *(whole(each, torch.bfloat16) for each in ALL if each not in (INSTANCES[48], PERMUTED)),
    ],
    ids=str,
)
def test_instances_compile_for_hopper(instance: Instance, dtype: torch.dtype) -> None:
    """No spill, no wgmma that the compiler had to serialise, and as many blocks an SM as it says."""
    assert (instance.shared_bytes + 1024) * instance.ctas_per_sm <= 228 * 1024
    code = hopper_code(instance.source(dtype), instance.expression(dtype))
    registers, spilled = cubin.usage(code)
    assert not spilled and registers * instance.threads * instance.ctas_per_sm <= 64 * 1024
    sass = cubin.disassembly(code)
    products, shapes = sass.count("HGMMA"), len(range(instance.tokens, 0, -instance.grain))
    assert products >= shapes * 4 * instance.row_blocks
    # Two waits a loop: for all but the newest group, and after the last. A product that is serialised has its own.
    assert sass.count("WARPGROUP.DEPBAR") <= products // (4 * instance.row_blocks) * 2


@pytest.mark.parametrize(
    ("top_k", "slots", "dtype", "ids"),
    [
        (2, 2, torch.bfloat16, torch.int32),
        (3, 4, torch.float16, torch.int64),
        (4, 4, torch.bfloat16, torch.int64),
        (9, 8, torch.float16, torch.int32),
        (5, 8, torch.bfloat16, torch.int64),
    ],
)
def test_sums_compile_for_hopper(dtype: torch.dtype, ids: torch.dtype, top_k: int, slots: int) -> None:
    """No spill, and four blocks an SM at the least: half of the threads that it holds."""
    expression = fast_layer.sum_expression(top_k, dtype, ids)
    assert expression.endswith(f", {slots}, {'long long' if ids == torch.int64 else 'int'}>")
    registers, spilled = cubin.usage(hopper_code(fast_layer.sum_source(), expression))
    assert not spilled and registers * fast_layer.SUM_THREADS * 4 <= 64 * 1024


def test_sums_have_a_thread_for_eight_columns_of_a_token() -> None:
    assert [fast_layer.sum_ctas(*sizes) for sizes in ((1, 8), (256, 8), (257, 8), (8192, 7168))] == [1, 1, 2, 28672]


def test_every_wait_but_the_consumers_own_may_be_given_up() -> None:
    """A trap in each loop that could last for ever; none where the clock is compiled out, to be measured beside."""
    expression, source = INSTANCES[16].expression(torch.bfloat16), INSTANCES[16].source(torch.bfloat16)
    watched, unwatched = (
        cubin.disassembly(hopper_code(before + source, expression)) for before in ("", "#define MOELAB_UNWATCHED\n")
    )
    assert watched.count("BPT.TRAP") >= 5 and watched.count("SR_GLOBALTIMERHI") == 2 * watched.count("BPT.TRAP")
    assert "BPT.TRAP" not in unwatched and "GLOBALTIMER" not in unwatched
    assert "CALL" not in watched and "CALL" not in unwatched, "a call would make ptxas serialise wgmma"


@given(num_tokens=st.integers(1, 20000), top_k=st.integers(1, 8), experts=st.integers(8, 512))
@settings(max_examples=50)
def test_a_batch_finds_its_instance(num_tokens: int, top_k: int, experts: int) -> None:
    instance = instance_for(num_tokens, top_k, experts, 256)
    smaller = [most for most in INSTANCES if most < instance.tokens]
    assert not smaller or num_tokens > max(smaller)


def test_what_it_does_not_take() -> None:
    x, w13, w2 = torch.zeros(2, 64).half(), torch.zeros(2, 128, 64).half(), torch.zeros(2, 64, 64).half()
    hopper = TARGETS["sm_90"]
    check_fast_layer(x, w13, w2, hopper)
    for target in (None, TARGETS["sm_100"]):
        with pytest.raises(RuntimeModeError, match="Hopper"):
            check_fast_layer(x, w13, w2, target)
    with pytest.raises(DtypeError, match="float32"):
        check_fast_layer(x.float(), w13.float(), w2.float(), hopper)
    with pytest.raises(ShapeError, match="multiple of 8"):
        check_fast_layer(torch.zeros(2, 63).half(), w13, w2, hopper)
    with pytest.raises(ShapeError, match="16 bytes"):
        check_fast_layer(torch.zeros(129).half()[1:].view(2, 64), w13, w2, hopper)
