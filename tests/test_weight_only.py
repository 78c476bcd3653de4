"""The weight-only layer of CUDA C++, emulated and on a GPU: every format against float64 of the dequantised weights."""

from __future__ import annotations

import shutil
from dataclasses import replace
from typing import Any

import pytest
import torch
from emulated_weight_only import run_weight_only
from kept import hopper_code
from sampling import sampled

from moelab import precision
from moelab.call import MoECall
from moelab.chips import TARGETS
from moelab.errors import (
    ConfigError,
    DtypeError,
    FormatError,
    MoelabError,
    PrecisionError,
    RuntimeModeError,
    ShapeError,
)
from moelab.formats import FORMATS, get_format
from moelab.fused_moe import fused_moe
from moelab.inputs import MoEInputs, make_inputs
from moelab.kernels import cubin, weight_only
from moelab.kernels.weight_only import Cut, WeightOnly, check_weight_only, not_taken
from moelab.pipelines.weight_only import form_for, weight_only_pipeline
from moelab.quantised_weights import dequantise, empty_weights
from moelab.shapes import MoEShape

needs_compiler = pytest.mark.skipif(shutil.which("g++") is None, reason="no g++ to build the emulated kernel with")
NAMES = [name for name, format in FORMATS.items() if not format.is_plain and format.activations != "static"]
SMALL = MoEShape("tiny", num_experts=5, top_k=2, hidden_size=256, moe_intermediate_size=128)
TAILS = MoEShape("tails", num_experts=3, top_k=2, hidden_size=96, moe_intermediate_size=160)
"""Sizes that end within a chunk of 64 bytes of codes, 4 bits or 8 a code, and within a CTA's tiles."""

FEW = WeightOnly(Cut(2, 2, 2), Cut(4, 2, 2))
SORTED = WeightOnly(Cut(2, 4, 2), Cut(2, 2, 1, turns=3), sorted=True)
OF_16 = WeightOnly(Cut(4, 2, 1, turns=2), Cut(2, 2, 2), sorted=True, columns=16)
FORMS = {"few": FEW, "sorted": SORTED, "of-16": OF_16}
KINDS = (
    "fp8_w8a8_block_128x128", "fp8_w8a8_channel", "int8_w8a8_channel", "int8_w8a16_group_128", "int4_w4a16_group_128_zp",
    "int4_w4a16_group_32", "mxfp4_w4a16_32",
)  # fmt: skip
"""One of each way of widening and scaling; the others are whole."""


def references(i: MoEInputs, **options: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """torch's layer over the dequantised weights, and float64's; activations stay as they are."""
    wide = i.to(torch.float64)
    given = (i.hidden_states, wide.w13, wide.w2, i.topk_weights, i.topk_ids)
    return precision.layer_references(*given, b13=i.b13, b2=i.b2, **options)


def judge(i: MoEInputs, out: torch.Tensor, **options: Any) -> None:
    precision.check(out, *references(i, **options), name=i.format.name)


def emulated(i: MoEInputs, form: WeightOnly, **options: Any) -> torch.Tensor:
    return run_weight_only(i.hidden_states, i.weights, i.topk_weights, i.topk_ids, form, **options)


def _marked(name: str) -> Any:
    return name if name in KINDS else pytest.param(name, marks=pytest.mark.whole)


@needs_compiler
@pytest.mark.parametrize("name", [_marked(name) for name in NAMES])
def test_every_format_on_the_emulated_chip(name: str) -> None:
    i = make_inputs(replace(SMALL, format=name), 5, device="cpu")
    judge(i, emulated(i, list(FORMS.values())[NAMES.index(name) % 3]))


@needs_compiler
@pytest.mark.parametrize(
    ("name", "form", "activation"),
    sampled(
        ("int8_w8a16_channel", "int4_w4a16_group_32", "mxfp4_w4a16_32"),
        list(FORMS),
        ("swiglu_oai", "gelu_tanh"),
        together=1,
    ),
)
def test_tails_biases_and_other_ranks_experts(name: str, form: str, activation: str) -> None:
    i = make_inputs(replace(TAILS, format=name, activation=activation), 4, device="cpu", bias=True)
    ids, weights = i.topk_ids.clone(), i.topk_weights.clone()
    ids[1, 1], ids[2] = -1, torch.tensor([-1, -1])
    weights[1, 1], weights[2] = float("nan"), float("inf")
    i = replace(i, topk_ids=ids.long(), topk_weights=weights.bfloat16())  # as transformers hands them on
    on_input = form == "sorted"
    out = emulated(i, FORMS[form], activation=activation, scale=2.5, weights_on_input=on_input)
    sound = replace(i, topk_weights=torch.where(ids < 0, 0.0, i.topk_weights))
    judge(
        sound, out, activation=activation, routed_scaling_factor=2.5, apply_router_weight_on_input=on_input
    )  # fmt: skip
    assert not out[2].any()


@needs_compiler
def test_warps_past_the_last_tile_meet_the_others() -> None:
    """H = 96 are three tiles of GEMM2 for pairs of warps, in a block of pairs of another rank's experts too."""
    i = make_inputs(replace(TAILS, format="int8_w8a16_channel"), 3, device="cpu")
    i.topk_ids[0, 1] = -1
    form = WeightOnly(Cut(2, 4, 2), Cut(2, 4, 2), sorted=True)
    judge(replace(i, topk_weights=torch.where(i.topk_ids < 0, 0.0, i.topk_weights)), emulated(i, form))


@needs_compiler
def test_scales_of_mxfp4_from_end_to_end() -> None:
    """e8m0 codes of 0, over 128, and 255, which is NaN, beside the usual ones."""
    i = make_inputs(replace(SMALL, format="mxfp4_w4a16_32"), 3, device="cpu")
    ids = torch.tensor([[0, 1], [1, 2], [2, 0]], dtype=torch.int32)
    scales = i.w13_scale.view(torch.uint8)
    scales[1, :, 0], scales[2, 5, 1] = 0, 131
    i.w2_scale.view(torch.uint8)[2, 9] = 255
    out = emulated(replace(i, topk_ids=ids), SORTED)
    assert out[1:, 9].isnan().all()
    out[1:, 9] = 0.0
    i.w2_scale.view(torch.uint8)[2, 9] = 127
    i.w2[2, 9] = 0
    exact = references(replace(i, topk_ids=ids))
    keep = torch.ones(256, dtype=torch.bool)
    keep[9] = False
    precision.check(out[:, keep], *(each[:, keep] for each in exact), name="mxfp4")


@needs_compiler
@pytest.mark.parametrize("form", ["few", "sorted"])
def test_nan_goes_where_it_belongs(form: str) -> None:
    """A NaN of e4m3 in one row of the weights of an expert, in a token, and in weights that nobody chose."""
    i = make_inputs(replace(SMALL, format="fp8_w8a8_block_128x128"), 4, device="cpu")
    ids = torch.tensor([[0, 1], [1, 2], [2, 3], [3, 0]], dtype=torch.int32)
    i = replace(i, topk_ids=ids)
    i.w13.view(torch.uint8)[4] = 0x7F
    i.w2.view(torch.uint8)[1, 7, 100] = 0xFF
    i.hidden_states[2, 5] = float("nan")
    out = emulated(i, FORMS[form])
    assert out[:2, 7].isnan().all() and out[2].isnan().all()
    assert out[:2, :7].isfinite().all() and out[:2, 8:].isfinite().all() and out[3].isfinite().all()


FAULTS = {
    "fp8_w8a8_block_128x64": ("chunk * W::CHUNK / W::STEP;", "(chunk ^ 1) * W::CHUNK / W::STEP;"),
    "int4_w4a16_group_128_zp": ("128.0f + static_cast", "129.0f + static_cast"),
    "int8_w8a8_channel": ("load_once(codes + (i / 2 * APART", "load_once(codes + (0 * APART"),
    "mxfp4_w4a16_32": ("permute(read.y, read.w, 0x7632)", "permute(read.y, read.w, 0x5410)"),
}
"""Format -> the neighbour block's scale; a zero point off by one; gate rows for up rows; a code with another's activation."""


@needs_compiler
@pytest.mark.parametrize("name", [*FAULTS][:1] + [pytest.param(f, marks=pytest.mark.whole) for f in [*FAULTS][1:]])
def test_a_planted_fault_is_found(name: str) -> None:
    old, new = FAULTS[name]
    i = make_inputs(replace(SMALL, format=name), 5, device="cpu")
    wrong = weight_only.source().replace(old, new)
    assert wrong != weight_only.source()
    with pytest.raises(PrecisionError):
        judge(i, emulated(i, SORTED, source=wrong))


def test_hopper_code_keeps_its_registers() -> None:
    """Of what serves Qwen3-30B-A3B at 64 tokens: no spills, and four CTAs of four warps an SM."""
    format = get_format("int4_w4a16_group_128")
    form = form_for(64, 8, 128, 2048, 768, format)
    assert form is not None and form.sorted
    for gemm, size in (("up", (1536, 2048)), ("down", (2048, 768))):
        weights = empty_weights(format, 2, *size, torch.bfloat16, "meta")
        registers, stack = cubin.usage(hopper_code(weight_only.source(), form.expression(gemm, weights)))
        assert registers <= 128 and stack == 0


def test_what_it_does_not_take_is_named() -> None:
    assert not_taken(get_format("fp8_w8a8_block_128x128"), 7168, 256) is None
    for format, hidden, inner, word in (
        ("plain", 256, 128, "plain"), ("fp8_w8a8_block_32x32", 256, 128, "blocks of 32x32"),
        ("int4_w4a16_group_16", 256, 128, "groups of 16"), ("int8_w8a8_channel", 2048, 200, "moe_intermediate_size = 200"),
        ("mxfp4_w4a16", 2896, 128, "hidden_size = 2896"),
    ):  # fmt: skip
        assert word in str(not_taken(get_format(format), hidden, inner))
    i = make_inputs(replace(SMALL, format="int4_w4a16_group_32"), 3, device="cpu")
    sm_90 = TARGETS["sm_90"]
    check_weight_only(i.hidden_states, i.weights, 2, sm_90)
    refusals: list[tuple[type[MoelabError], tuple[Any, ...]]] = [
        (RuntimeModeError, (i.hidden_states, i.weights, 2, TARGETS["sm_80"])),
        (RuntimeModeError, (i.hidden_states, i.weights, 2, None)),
        (ConfigError, (i.hidden_states, i.weights, 65, sm_90)),
        (ShapeError, (torch.zeros(3, 257, dtype=torch.bfloat16).view(-1)[1:769].view(3, 256), i.weights, 2, sm_90)),
        (FormatError, (i.hidden_states, replace(i, format=get_format("plain")).weights, 2, sm_90)),
        (DtypeError, (i.hidden_states, i.weights._replace(w2_scale=i.weights.w2_scale.half()), 2, sm_90)),
    ]
    for error, given in refusals:
        with pytest.raises(error, match="Expected"):
            check_weight_only(*given)


@pytest.mark.parametrize("name", KINDS)
def test_every_batch_has_a_form_that_runs(name: str) -> None:
    """Whatever is chosen compiles for these sizes: splits and turns are not both, warps divide, stages are even."""
    for tokens in (1, 2, 3, 7, 8, 16, 40, 64, 200, 1000, 8192):
        form = form_for(tokens, 8, 128, 2048, 768, get_format(name))
        assert form is not None or tokens >= 300
        if form is None:
            continue
        for cut in (form.up, form.down):
            assert cut.warps % cut.split == 0 and cut.stages % 2 == 0 and (cut.split == 1 or cut.turns == 1)
        assert form.columns == 8 or form.sorted


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 9, 64, 300])
@pytest.mark.parametrize("name", NAMES)
def test_on_the_gpu(name: str, num_tokens: int) -> None:
    """The served path, against float64, bitwise the same again; sizes of a shard of Qwen3-30B-A3B."""
    inner = 192 if get_format(name).granularity in ("channel", "tensor") else 256
    i = make_inputs(MoEShape("shard", 32, 8, 2048, inner, format=name), num_tokens, device="cuda")
    i = replace(i, topk_weights=i.topk_weights.bfloat16())
    given = {"topk_weights": i.topk_weights, "topk_ids": i.topk_ids, "impl": "weight_only"}
    first, second = (fused_moe(i.hidden_states, i.weights, **given) for _ in range(2))
    assert torch.equal(first, second)
    judge(i, first)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("name", KINDS)
def test_forms_on_the_gpu_with_other_ranks_experts(name: str, form: str) -> None:
    sizes = TAILS if get_format(name).sizes in ((), (32,)) else SMALL
    shape = replace(sizes, format=name, activation="swiglu_oai")
    i = make_inputs(shape, 37, device="cuda", bias=True)
    i.topk_ids[3, 1], i.topk_weights[3, 1] = -1, float("nan")
    i.topk_ids[5] = -1
    call = fused_moe_call(i, shape.activation)
    out = weight_only_pipeline(call, FORMS[form])
    judge(replace(i, topk_weights=i.topk_weights.nan_to_num(0.0)), out, activation=shape.activation)
    assert not out[5].any()


def fused_moe_call(i: MoEInputs, activation: str) -> MoECall:
    return MoECall(i.hidden_states, i.weights, i.topk_weights, i.topk_ids, activation)


@pytest.mark.gpu
def test_past_two_to_the_31st_on_the_gpu() -> None:
    """E * 2N * H / 2 bytes of codes past 2^31, the last experts chosen."""
    shape = MoEShape("wide", 320, 2, 4096, 2048, format="int4_w4a16_group_128")
    i = make_inputs(shape, 5, device="cuda")
    i.topk_ids[:] = torch.tensor([[318, 319], [319, 0], [1, 317], [316, 319], [2, 318]], device="cuda")
    out = fused_moe(i.hidden_states, i.weights, topk_weights=i.topk_weights, topk_ids=i.topk_ids, impl="weight_only")
    few, ids = torch.unique(i.topk_ids, return_inverse=True)
    wide = [dequantise(part, torch.float64, few.long()) for part in (i.weights.up, i.weights.down)]
    precision.check(
        out, *precision.layer_references(i.hidden_states, *wide, i.topk_weights, ids.int()), name="past 2^31"
    )
