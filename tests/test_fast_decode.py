"""fast_decode.cu: its arithmetic and its waiting on an emulated chip, its forms through the real compiler."""

from __future__ import annotations

import ctypes
from dataclasses import replace
from pathlib import Path

import emulated_decode
import emulated_gpu
import pytest
import torch
from emulated_decode import compare, layer, run
from fast_cases import needs_compiler

from moelab.errors import ShapeError
from moelab.kernels import cubin, fast_decode, nvrtc
from moelab.kernels.fast_decode import ALL, SOURCE, FewTokens, form_for
from moelab.suites.fast_choice import FEW

ONE, TWO, FOUR, EIGHT = (FewTokens(tokens, warps=2, stages=3, slice=256) for tokens in (1, 2, 4, 8))
DEEP = FewTokens(4, warps=4, stages=2)  # stages of 512 elements a row, two loads for each lane
WAITING = replace(TWO, prefetch=False)


@needs_compiler
@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize(
    "form, sizes",
    [
        (ONE, (1, 4, 2, 128, 64)),
        (ONE, (1, 1, 1, 8, 8)),  # one row pair, eight columns: most blocks and warps have nothing
        (ONE, (1, 9, 8, 264, 24)),  # both in slices of unequal length
        (TWO, (2, 3, 2, 24, 72)),
        (TWO, (1, 4, 2, 64, 40)),  # fewer tokens than the form is for
        (WAITING, (2, 3, 2, 72, 264)),
        (FOUR, (3, 2, 2, 72, 40)),  # tokens share all experts
        (FOUR, (4, 12, 3, 264, 24)),
        (EIGHT, (7, 5, 3, 40, 56)),
        (EIGHT, (8, 20, 8, 24, 8)),  # 64 pairs
        (DEEP, (4, 3, 2, 1032, 520)),  # slices in three and in two
    ],
)
def test_the_layer_is_right_and_ends(form: FewTokens, sizes: tuple[int, ...], blocks: int) -> None:
    compare(layer(*sizes), form, blocks=blocks)


@needs_compiler
@pytest.mark.parametrize("form", [ONE, DEEP])
def test_whole_slices(form: FewTokens) -> None:
    compare(layer(1, 2, 2, 2 * form.slice, form.slice), form)


@needs_compiler
def test_in_bfloat16() -> None:
    compare(layer(3, 4, 2, 136, 72, dtype=torch.bfloat16), FOUR)


@needs_compiler
@pytest.mark.parametrize("form", [ONE, FOUR])
def test_weights_on_the_input(form: FewTokens) -> None:
    compare(layer(form.tokens, 3, 2, 64, 40), form, on_input=True)


IDS = {
    "slots of other ranks": [[0, -1], [-1, -1], [1, 0], [-1, 1]],
    "ids past the last": [[3, 0], [2, 7], [3, 3], [1, 2]],
    "none": [[-1, -1]] * 4,
    "an expert twice in a token": [[1, 1], [0, 1], [2, 2], [1, 0]],
    "one that all take twice": [[1, 1]] * 4,
}


@needs_compiler
@pytest.mark.parametrize("ids", IDS.values(), ids=IDS)
def test_who_goes_where(ids: list[list[int]]) -> None:
    """Ids outside of the three experts count nothing; each pair counts once."""
    compare(layer(4, 3, 2, 64, 40, ids=torch.tensor(ids, dtype=torch.int32)), FOUR)


@needs_compiler
@pytest.mark.parametrize(
    ("ids", "read"),
    [
        ([[2], [2], [2], [2]], 1),
        ([[0, 1], [1, 0], [0, 1], [2, -1]], 3),
        ([[1, 1], [1, 0], [0, 1], [-1, 7]], 3),  # expert 1 twice, since token 0 names it twice
        ([[-1]] * 4, 0),
    ],
)
def test_an_expert_is_read_once_for_all_its_tokens(ids: list[list[int]], read: int) -> None:
    given = layer(4, 3, len(ids[0]), 264, 72, ids=torch.tensor(ids, dtype=torch.int32))
    assert run(given, FOUR, blocks=3).weight_bytes == read * 3 * 264 * 72 * 2


@needs_compiler
def test_the_same_bits_whatever_the_number_of_blocks() -> None:
    given = layer(4, 4, 2, 136, 72)
    first, *others = (run(given, FOUR, blocks=blocks).out for blocks in (1, 2, 5))
    assert all(other.equal(first) for other in others)


@needs_compiler
def test_a_wait_that_never_ends_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    """A count that starts below zero is never reached."""
    zeros = torch.zeros
    monkeypatch.setattr(torch, "zeros", lambda *size, **kwargs: zeros(*size, **kwargs) - (size == (2,)))
    with pytest.raises((TimeoutError, RuntimeError)):
        run(layer(1, 2, 1, 64, 8), ONE, timeout_s=2)


WRONG = {
    "gate and up from the same rows": ("fast_decode.cu", "* 2 + copier.second) * size", "* 2) * size"),
    "a token's x for another": ("fast_decode.cu", "group.pair[token] : token) *", "group.pair[token] : 0) *"),
    "rows that no block takes": ("fast_decode.cuh", "rows * (block + 1) / blocks", "rows * (block + 1) / blocks - 1"),
    "w2 with no weight": ("fast_decode.cu", "(batch.on_input ? 1.0f : group.routed[token]) *", ""),
    "twice the same expert in one group": ("fast_decode.cuh", "id * PAIRS + earlier", "id * PAIRS"),
    "a last slice as long as the others": ("fast_decode.cuh", "slice + 1 < count ? S::SLICE", "true ? S::SLICE"),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("change", WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_seen(tmp_path: Path, change: tuple[str, str, str]) -> None:
    source = emulated_gpu.altered(tmp_path, change, source=SOURCE)
    ids = torch.tensor([[1, 1], [0, 1], [2, 2], [1, 0]], dtype=torch.int32)
    with pytest.raises(AssertionError):
        compare(layer(4, 3, 2, 264, 40, ids=ids), FOUR, source=source)


LATE = "    if (blockIdx.x == 1) std::this_thread::sleep_for(std::chrono::milliseconds(300));\n"
BEGIN = "    compute_gemm1(shared, batch, place);\n"


@needs_compiler
@pytest.mark.parametrize("form", [TWO, WAITING])
def test_a_block_that_is_late_is_waited_for(tmp_path: Path, form: FewTokens) -> None:
    """What it has yet to write is not-a-number."""
    given, late = layer(2, 3, 2, 64, 40), ("fast_decode.cu", BEGIN, LATE + BEGIN)
    compare(given, form, blocks=3, source=emulated_gpu.altered(tmp_path, late, source=SOURCE))
    wait = "wait_for_count(&batch.counters[0], gridDim.x);"
    source = emulated_gpu.altered(tmp_path, late, ("fast_decode.cu", wait, ""), source=SOURCE)
    emulated_decode.built.cache_clear()
    with pytest.raises(AssertionError, match="nan"):
        compare(given, form, blocks=3, source=source)


@needs_compiler
@pytest.mark.parametrize("form", [ONE, EIGHT, DEEP])
def test_sizes_are_those_of_the_source(form: FewTokens) -> None:
    library = emulated_decode.built(form, torch.float16)
    assert library.fixed_bytes() == form.fixed_bytes and library.stage_bytes() == form.stage_bytes
    assert library.argument_bytes() == ctypes.sizeof(fast_decode.BatchArguments)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("form", [*ALL, replace(ALL[0], prefetch=False), *(f for f in FEW if f.tokens == 8)], ids=str)
def test_forms_compile_for_hopper(form: FewTokens, dtype: torch.dtype) -> None:
    """No spill, no more registers than a multiprocessor has, and copies that are one instruction each."""
    code = nvrtc.compiled("sm_90a", form.source(), form.expression(dtype)).code
    registers, spilled = cubin.usage(code)
    assert not spilled and -(-registers // 8) * 8 * form.threads <= 64 * 1024
    assert "UBLKCP" in cubin.disassembly(code)


def test_the_watchdog_compiles() -> None:
    source = "#define MOELAB_WATCHDOG\n" + ALL[0].source()
    assert b"waits for ever" in nvrtc.compiled("sm_90a", source, ALL[0].expression(torch.bfloat16)).code


def test_a_batch_finds_its_form() -> None:
    """Of sizes of real models: x or the activated rows beside the ring."""
    assert [form_for(tokens, 8, 2048, 768) for tokens in (1, 2, 3, 4, 8)] == [ALL[0], ALL[1], ALL[2], ALL[2], ALL[3]]
    assert form_for(9, 1, 2048, 768) is None
    assert form_for(7, 8, 2048, 768) is ALL[3] and form_for(7, 10, 2048, 768) is None  # 70 pairs
    assert form_for(4, 2, 4096, 7168) is ALL[2] and form_for(8, 2, 4096, 7168) is None  # 224 KiB of activated rows
    assert form_for(8, 8, 7168, 256) is ALL[3]


def test_the_ring_takes_what_is_left() -> None:
    form = ALL[2]
    region = form.region_bytes(4, 8, 7168, 256)
    assert region == 4 * 7168 * 2
    stages = form.stages_beside(region)
    assert stages == 5 and form.fixed_bytes + region + 6 * form.stage_bytes > 227 * 1024
    assert form.stages_beside(0) == 6 and form.stages_beside(250_000) == 0
    assert form.region_bytes(1, 3, 8, 8) == 128


def test_what_it_does_not_take() -> None:
    given = layer(2, 2, 1, 64, 8)
    with pytest.raises(ShapeError, match="at most 1 tokens"):
        fast_decode.fast_decode(*given, ONE)
