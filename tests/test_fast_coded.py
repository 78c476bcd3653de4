"""sm90_fast_layer.cu over fp8 codes: on an emulated chip, stage by stage; its instances through the real compiler; on a GPU."""

from __future__ import annotations

import ctypes
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import coded_cases
import emulated_gpu
import pytest
import torch
from coded_cases import (
    FIRST,
    FIRST_PAIR,
    FIRST_PERMUTED,
    MIDDLE,
    PAIR,
    PERMUTED,
    PERMUTED_PAIR,
    SMALL,
    WIDE,
    case,
    compare,
)
from fast_cases import needs_compiler, ordered
from kept import hopper_code
from sampling import whole

from moelab.chips import TARGETS
from moelab.errors import DtypeError, FormatError, RuntimeModeError, ShapeError
from moelab.formats import get_format
from moelab.implementations import IMPLEMENTATIONS, LayerKind, not_taken
from moelab.inputs import make_inputs
from moelab.kernels import cubin, fast_layer
from moelab.kernels.fast_instances import ALL_CODED, CODED, CODED_SHARED, Instance
from moelab.kernels.fast_quantised import check_coded_layer, scale_place
from moelab.kernels.quantise_activations import quantise_activations_unchecked
from moelab.kernels.quantise_tiles import quantise_tiles_unchecked
from moelab.precision import check, layer_references
from moelab.quantised_weights import dequantise
from moelab.shapes import MoEShape
from moelab.weights import ExpertWeights


@needs_compiler
@pytest.mark.parametrize(
    "instance, sizes, blocks",
    [
        (SMALL, (5, 3, 2, 384, 256), 2),  # GEMM2's last tile has one of two blocks of rows
        whole(SMALL, (40, 2, 2, 256, 128), 1),  # several tiles of tokens an expert
        whole(SMALL, (3, 4, 1, 128, 128), 1),  # one step of K, and one slot a token: GEMM2 writes the output
        (MIDDLE, (9, 12, 3, 256, 128), 3),  # most experts have a row or none
        whole(MIDDLE, (90, 3, 2, 512, 384), 2),
        whole(MIDDLE, (20, 12, 9, 256, 128), 2),  # more slots than are added up at once
        (WIDE, (100, 2, 2, 128, 256), 2),
        (PAIR, (70, 2, 2, 256, 128), 2),
        whole(PAIR, (150, 3, 2, 384, 256), 4),
        (PERMUTED, (40, 3, 2, 384, 128), 2),
        whole(PERMUTED_PAIR, (70, 3, 2, 256, 256), 4),
        (FIRST, (40, 3, 2, 384, 128), 3),  # GEMM2's last tile has one of two blocks; both warpgroups have all tokens
        whole(FIRST, (3, 4, 1, 128, 128), 1),
        (FIRST_PERMUTED, (140, 2, 2, 256, 256), 2),  # several tiles of tokens an expert
        whole(FIRST_PAIR, (270, 2, 2, 384, 256), 4),
    ],
)
def test_each_stage_is_right_and_ends(instance: Instance, sizes: tuple[int, ...], blocks: int) -> None:
    compare(instance, *sizes, blocks=blocks)


@needs_compiler
@pytest.mark.parametrize("instance", [SMALL, *map(whole, (PERMUTED, PAIR, FIRST))])
def test_slots_of_other_ranks_count_nothing(instance: Instance) -> None:
    ids = torch.tensor([[0, -1], [-1, -1], [1, 0], [-1, 1]], dtype=torch.int32)
    compare(instance, 4, 3, 2, 256, 128, ids=ids)
    compare(instance, 4, 3, 2, 256, 128, ids=torch.where(ids == 1, 2**32 + 1, ids.long()), lost_weights=float("nan"))
    compare(instance, 2, 3, 2, 128, 128, ids=torch.full((2, 2), -1, dtype=torch.int32))


@needs_compiler
@pytest.mark.parametrize("instance", [whole(SMALL), whole(MIDDLE), PERMUTED, FIRST])
def test_weights_on_the_input(instance: Instance) -> None:
    """Ahead of the activation, whose codes they change."""
    compare(instance, 20, 3, 2, 256, 128, on_input=True)


@needs_compiler
@pytest.mark.parametrize("instance", [whole(MIDDLE), PAIR, whole(FIRST_PAIR)])
def test_one_expert_that_takes_all(instance: Instance) -> None:
    compare(instance, 100, 6, 1, 128, 128, ids=torch.full((100, 1), 4, dtype=torch.int32), blocks=4)


@needs_compiler
def test_scales_that_are_powers_of_two() -> None:
    for instance in (SMALL, FIRST):
        compare(instance, 9, 3, 2, 256, 128, format=get_format("fp8_w8a8_block_128x128_ue8m0"))


@needs_compiler
def test_in_bfloat16() -> None:
    found = coded_cases.stages(case(20, 3, 2, 256, 128, dtype=torch.bfloat16), MIDDLE)
    assert found["inner"] <= 16.5 and found["scale"] < 1e-5 and found["y"] <= 2**-7 and found["out"] <= 2**-7, found


PRODUCERS, SCALED = "sm90_fast_producers.cuh", "sm90_fast_scaled.cuh"
STORED = "to[step] = from[block * apart + step];\n        }\n"
WRONG = {
    "the neighbour's block of weight rows": (
        PRODUCERS, "gemm ? 2 * scheduler.weights : scheduler.weights;", "gemm ? 2 * scheduler.weights : 1 - scheduler.weights;"
    ),
    "one block's for gates and ups": (SCALED, "scales_apart = gemm ? 0 : MOST_STEPS;", "scales_apart = 0;"),
    "one warpgroup's for both": (SCALED, "block_scales[gemm ? group : 0];", "block_scales[0];"),
    "weights' transposed": (
        PRODUCERS, STORED, f"{STORED}auto& found = shared.block_scales[buffer];\nfound[0][1] = found[1][0];\n"
    ),
    "the step's before": (SCALED, "scales_apart + step];", "scales_apart + (step ? step - 1 : 0)];"),
    "another token's": (PRODUCERS, "(first + i * TOKEN_THREADS), layer", "((first + i * TOKEN_THREADS) ^ 1), layer"),
    "another step's of tokens": (PRODUCERS, "x_scale + starts[i] + step);", "x_scale + starts[i] + (step ^ 1));"),
    "another group's of inner": (PRODUCERS, "scheduler.k_steps() + step;", "scheduler.k_steps() + (step ^ 1);"),
    "one warp's largest": (SCALED, "if ((lane & 4) == 0) {", "if ((lane & 4) == 0 && warp == 0) {"),
}  # fmt: skip


@needs_compiler
@pytest.mark.parametrize("kind", [each if n in (1, 4, 7) else whole(each) for n, each in enumerate(WRONG)])
def test_a_wrong_scale_is_found(kind: str, tmp_path: Path) -> None:
    """Every block and group has a magnitude of its own, and each stage is judged by what it was given."""
    source = emulated_gpu.altered(tmp_path, WRONG[kind])
    with pytest.raises(AssertionError):
        compare(SMALL, 6, 2, 2, 256, 256, source=source)


@needs_compiler
@pytest.mark.parametrize(
    "change",
    [
        ("{low * by, high * by};", "{low * by, low * by};"),  # one token's for both of a thread's
        whole(("const float by = block_scales[block][step]", "const float by = block_scales[0][step]")),
        whole(("fmaxf(largest[half], from_lane(largest[half], 2));", "largest[half];")),  # half of a token's group
        ("bits_float(other[row]));", "0.0f);"),  # one warpgroup's half
    ],
)
def test_a_wrong_scale_is_found_where_tokens_come_first(change: tuple[str, str], tmp_path: Path) -> None:
    source = emulated_gpu.altered(tmp_path, ("sm90_fast_rows.cuh", *change))
    with pytest.raises(AssertionError):
        compare(FIRST, 12, 2, 2, 256, 256, source=source)


@needs_compiler
@pytest.mark.parametrize("instance", [SMALL, whole(PERMUTED_PAIR)])
def test_the_same_bits_every_time(instance: Instance) -> None:
    of = case(33, 4, 2, 256, 128)
    tiles = ordered(of.ids, 4, instance)
    x = coded_cases.coded(of, tiles, instance)
    given = (x, of.weights, of.topk_weights, of.ids, tiles, instance, torch.float16)
    runs = [emulated_gpu.run_coded(*given, blocks=blocks)[0] for blocks in (2, 4)]
    assert runs[0].equal(runs[1])


@needs_compiler
def test_a_wait_that_never_ends_says_what_it_was_for() -> None:
    of = case(2, 1, 2, 128, 128, ids=torch.zeros(2, 2, dtype=torch.int32))
    tiles = ordered(of.ids, 1, SMALL)
    tiles.ready[0] = -1
    given = (coded_cases.coded(of, tiles, SMALL), of.weights, of.topk_weights, of.ids, tiles, SMALL, torch.float16)
    with pytest.raises(RuntimeError, match=r"waited for (the rows that a tile multiplies|all tiles of GEMM2)"):
        emulated_gpu.run_coded(*given, patience_s=1)


@needs_compiler
def test_sizes_and_places_are_those_of_the_source() -> None:
    forms = (SMALL, MIDDLE, WIDE, PAIR, PERMUTED, FIRST_PAIR, *ALL_CODED)
    lines = [f"static_assert(sizeof(Shared<{each.shape}>) == {each.shared_bytes});" for each in forms]
    lines += [f"static_assert(sizeof(Layer<__half>) == {ctypes.sizeof(fast_layer.LayerArguments)});"]
    lines += [f"static_assert(sizeof(Shared<{SMALL.shape}>) == 1);"]  # it can fail
    refused = emulated_gpu.refused(lines)
    assert refused.count("static assertion failed") == refused.count("error:") == 1, refused
    assert sorted(scale_place(row, SMALL) for row in range(128)) == list(range(128))
    assert [scale_place(row, SMALL) for row in (0, 1, 8, 9, 2, 16)] == [
        0,
        1,
        2,
        3,
        4,
        16,
    ]  # 16 bytes of a thread's four columns


@pytest.mark.parametrize(
    "instance", [each if each in (CODED[16], CODED_SHARED) else whole(each) for each in ALL_CODED], ids=str
)
def test_instances_compile_for_hopper(instance: Instance) -> None:
    """No spill, no wgmma that the compiler had to serialise, and as many blocks an SM as it says. Where tokens come first two
    words are put by at the start; in clusters one of them is read once between products, else nothing is."""
    assert (instance.shared_bytes + 1024) * instance.ctas_per_sm <= 228 * 1024
    code = hopper_code(instance.source(torch.bfloat16), instance.expression(torch.bfloat16))
    registers, spilled = cubin.usage(code)
    assert spilled <= 8 * (instance.scaled == 2) and registers * instance.threads * instance.ctas_per_sm <= 64 * 1024
    sass, shapes = cubin.disassembly(code), instance.tokens // instance.grain
    assert sass.count("QGMMA") == shapes * 4 * 2 and "HGMMA" not in sass
    assert sass.count("WARPGROUP.DEPBAR") == shapes * 2  # one wait for the four products of a block of rows
    products = [at.start() for at in re.finditer("QGMMA", sass)]
    between = "".join(sass[products[i] : products[i + 7]] for i in range(0, 8 * shapes, 8))
    assert re.findall("LDL|STL", between) == ["LDL"] * (instance.cluster - 1)


@pytest.mark.skipif(torch.cuda.is_available(), reason="on the CPU, through the interpreter")
def test_codes_in_order_of_expert() -> None:
    """Those of `quantise_activations`, each token's as often as it has slots."""
    of = case(70, 3, 2, 640, 128)
    tiles = ordered(of.ids, 3, PERMUTED)
    codes, scale = quantise_tiles_unchecked(of.x, tiles, 2, PERMUTED.tokens, of.format, in_rows=False)
    expected = coded_cases.coded(of, tiles, PERMUTED)
    real = ~expected.scale.isnan()
    assert torch.equal(scale[real], expected.scale[real]) and real.sum() == 140 * 5
    by_token = quantise_activations_unchecked(of.x, of.format)[0].view(torch.uint8)
    assert torch.equal(codes.view(torch.uint8), by_token[tiles.sorted_slots.long() // 2])


def test_what_it_does_not_take() -> None:
    def layer(hidden: int, size: int, name: str = "fp8_w8a8_block_128x128") -> tuple[torch.Tensor, ExpertWeights]:
        shape = MoEShape("odd", 2, 2, hidden, size, format=name, dtype="float16")
        i = make_inputs(shape, 2, device="cpu")
        return i.hidden_states, i.weights

    hopper = TARGETS["sm_90"]
    check_coded_layer(*layer(256, 128), hopper)
    with pytest.raises(RuntimeModeError, match="Hopper"):
        check_coded_layer(*layer(256, 128), TARGETS["sm_100"])
    with pytest.raises(FormatError, match=r"64x64.*128x128"):
        check_coded_layer(*layer(256, 128, "fp8_w8a8_block_64x64"), hopper)
    with pytest.raises(ShapeError, match=r"hidden_size is 192.*multiple of 128"):
        check_coded_layer(*layer(192, 128), hopper)
    x, weights = layer(256, 128)
    with pytest.raises(DtypeError, match="float32"):
        check_coded_layer(x.float(), weights, hopper)
    wide = weights._replace(w2=torch.empty(2, 16512, 128, dtype=torch.float8_e4m3fn, device="meta"))
    with pytest.raises(ShapeError, match=r"hidden_size is 16512.*at most 16384"):
        check_coded_layer(torch.empty(2, 16512, dtype=torch.float16, device="meta"), wide, hopper)
    with pytest.raises(ShapeError, match="w13 starts 8 bytes"):
        storage = torch.zeros(weights.w13.numel() + 8, dtype=torch.uint8)
        moved = storage[8:].view(weights.w13.shape).view(torch.float8_e4m3fn)
        check_coded_layer(x, weights._replace(w13=moved), hopper)


def test_the_table_knows_what_it_does_not_take() -> None:
    """Before a launch: who asks for what serves a layer is not given one that refuses it."""
    of = {name: LayerKind(format=get_format(f"fp8_w8a8_block_{name}")) for name in ("128x128", "64x64", "128x64")}
    assert not_taken(IMPLEMENTATIONS["fast"], of["128x128"]) is None
    assert not_taken(IMPLEMENTATIONS["triton"], of["64x64"]) is None
    for name in ("64x64", "128x64"):
        assert not_taken(IMPLEMENTATIONS["fast"], of[name]) == f"weights in the format fp8_w8a8_block_{name}"
    narrow = replace(of["128x128"], hidden_size=256, moe_intermediate_size=192)
    assert "moe_intermediate_size = 192" in str(not_taken(IMPLEMENTATIONS["fast"], narrow))


hopper_only = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper GPU"
)


@pytest.mark.gpu
@hopper_only
@pytest.mark.parametrize("num_tokens", [1, 20, 200, 700, 3000])
@pytest.mark.parametrize("instance", [None, *ALL_CODED], ids=str)
def test_on_the_gpu(instance: Instance | None, num_tokens: int) -> None:
    """Through fused_moe's own door where no instance is named; with ids of other ranks; the same bits again."""
    from moelab.call import MoECall
    from moelab.fused_moe import fused_moe
    from moelab.pipelines.fast_quantised import coded_pipeline

    shape = MoEShape("shard", 16, 4, 1152, 384, format="fp8_w8a8_block_128x128")
    i = make_inputs(shape, num_tokens, device="cuda")
    ids = i.topk_ids.clone()
    ids[::7, 1] = -1

    def run() -> torch.Tensor:
        if instance is None:
            return fused_moe(i.hidden_states, i.weights, topk_weights=i.topk_weights, topk_ids=ids, impl="fast")
        return coded_pipeline(MoECall(i.hidden_states, i.weights, i.topk_weights, ids), instance)

    first = run()
    assert all(torch.equal(run(), first) for _ in range(19))
    options: dict[str, Any] = {"format": i.format}
    given = (i.hidden_states, dequantise(i.weights.up), dequantise(i.weights.down), i.topk_weights, ids)
    plain, exact = layer_references(*given, **options)
    check(first, plain, exact, name=str(instance))
