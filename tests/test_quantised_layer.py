"""The layer over quantised weights through the public op: in every format, against float64 with codes at the same points."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from moelab import precision
from moelab.config import KernelConfig, default_config
from moelab.errors import ConfigError, FormatError, ShapeError
from moelab.formats import FORMATS, get_format
from moelab.fused_moe import fused_moe
from moelab.implementations import IMPLEMENTATIONS
from moelab.inputs import MoEInputs, make_inputs
from moelab.pipelines.call_configs import tuned_configs
from moelab.quantised_weights import dequantise, require_values
from moelab.shapes import MoEShape
from moelab.weights import ExpertWeights, GemmWeights

NAMES = [name for name, format in FORMATS.items() if not format.is_plain and format.activations != "static"]
HERE = [name for name in NAMES if not name.startswith("fp8")]
SMALL = MoEShape("tiny", num_experts=5, top_k=2, hidden_size=256, moe_intermediate_size=128, dtype="float16")


def run(i: MoEInputs, **more: object) -> torch.Tensor:
    given = {"topk_weights": i.topk_weights, "topk_ids": i.topk_ids, **more}
    return fused_moe(i.hidden_states, i.weights, impl="triton", **given)


def judge(i: MoEInputs, out: torch.Tensor) -> None:
    wide = i.to(torch.float64)
    plain, exact = precision.layer_references(
        i.hidden_states, wide.w13, wide.w2, i.topk_weights, i.topk_ids, format=i.format
    )
    precision.check(out, plain, exact, name=i.format.name)


ONE_OF_A_KIND = {(get_format(name).family, get_format(name).zero_points): name for name in HERE}.values()


@pytest.mark.parametrize(
    "name", [name if name in ONE_OF_A_KIND else pytest.param(name, marks=pytest.mark.whole) for name in HERE]
)
def test_against_float64(name: str) -> None:
    i = make_inputs(replace(SMALL, format=name), 7, device="cpu")
    judge(i, run(i))


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_torch_takes_every_format(name: str, on_input: bool) -> None:
    """fp8 too, which Triton's interpreter cannot cast; rounded where the judge's torch is, so that both err alike."""
    i = make_inputs(replace(SMALL, format=name), 7, device="cpu")
    i.topk_ids[2, 1], i.topk_weights[2, 1] = -1, float("nan")
    out = fused_moe(
        i.hidden_states, i.weights, topk_weights=i.topk_weights, topk_ids=i.topk_ids, impl="torch",
        apply_router_weight_on_input=on_input, routed_scaling_factor=0.5,
    )  # fmt: skip
    wide = i.to(torch.float64)
    plain, exact = precision.layer_references(
        i.hidden_states, wide.w13, wide.w2, i.topk_weights.nan_to_num(0.0), i.topk_ids, format=i.format,
        apply_router_weight_on_input=on_input,
    )  # fmt: skip
    precision.check(out, plain * 0.5, exact * 0.5, name=name)


def test_torch_takes_a_checkpoints_scale_of_activations_and_biases() -> None:
    i = make_inputs(replace(SMALL, format="fp8_w8a8_tensor_static"), 7, device="cpu")
    routing = {"topk_weights": i.topk_weights, "topk_ids": i.topk_ids}
    wide = i.to(torch.float64)
    scales = {"a1_scale": i.weights.a1_scale, "a2_scale": i.weights.a2_scale}
    plain, exact = precision.layer_references(
        i.hidden_states, wide.w13, wide.w2, i.topk_weights, i.topk_ids, format=i.format, **scales
    )
    precision.check(fused_moe(i.hidden_states, i.weights, impl="torch", **routing), plain, exact)
    plain_layer = make_inputs(replace(SMALL, format="int8_w8a16_channel"), 7, device="cpu")
    w = plain_layer.weights
    b13, b2 = torch.randn(w.w13.shape[:2]).half(), torch.randn(w.w2.shape[:2]).half()
    out = fused_moe(plain_layer.hidden_states, w._replace(b13=b13, b2=b2), impl="torch", **routing)
    stood_for = ExpertWeights(dequantise(w.up), dequantise(w.down), b13.double(), b2.double())
    expected = fused_moe(
        plain_layer.hidden_states.double(),
        stood_for,
        impl="torch",
        topk_weights=i.topk_weights.double(),
        topk_ids=i.topk_ids,
    )
    assert precision.error(out, expected).rel_fro < 2e-3


@pytest.mark.parametrize("name", HERE[:1] + HERE[-1:])
def test_foreign_experts_and_torch_compile(name: str) -> None:
    i = make_inputs(replace(SMALL, format=name), 7, device="cpu")
    i.topk_ids[2, 1] = -1
    i.topk_weights[2, 1] = float("nan")
    out = run(i)
    judge(replace(i, topk_weights=i.topk_weights.nan_to_num(0.0)), out)
    compiled = torch.compile(lambda x: run(replace(i, hidden_states=x)), fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(i.hidden_states), out)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 9, 64, 300])
@pytest.mark.parametrize("name", NAMES)
def test_on_the_gpu(name: str, num_tokens: int) -> None:
    """Sizes of a fine shard of Qwen3-30B-A3B, whose 192 inner columns only blocks of 64 divide."""
    inner = 192 if get_format(name).granularity in ("channel", "tensor") else 256
    shape = MoEShape("shard", 32, 8, 2048, inner, format=name)
    i = make_inputs(shape, num_tokens, device="cuda")
    first, second = run(i), run(i)
    assert torch.equal(first, second)
    judge(i, first)


def test_configs_are_those_of_the_format() -> None:
    """Without a file, sglang's rule for fp8 in blocks, not that of 16 bits; mxfp4, which it has no file for, takes the latter."""
    block = get_format("fp8_w8a8_block_128x128")
    up, down = tuned_configs(256, 256, "bfloat16", 16, None, block)
    assert up == down == KernelConfig(64, 128, 128, 32, 4, 3)
    assert tuned_configs(256, 256, "bfloat16", 16, None, get_format("mxfp4_w4a16"))[0] == default_config(16, 256)


def test_who_does_not_take_a_format_says_who_does() -> None:
    i = make_inputs(replace(SMALL, format="int8_w8a16_channel"), 3, device="cpu")
    for name in [name for name, one in IMPLEMENTATIONS.items() if "int8_w8a16_channel" not in one.formats]:
        with pytest.raises(ConfigError, match=r"int8_w8a16_channel.*triton"):
            fused_moe(i.hidden_states, i.weights, topk_weights=i.topk_weights, topk_ids=i.topk_ids, impl=name)


def test_what_does_not_fit_is_named() -> None:
    i = make_inputs(replace(SMALL, format="int4_w4a16_group_128"), 3, device="cpu")
    with pytest.raises(FormatError, match="There is no w13's scale"):
        run(replace(i, w13_scale=None))
    with pytest.raises(ShapeError, match="w2's scale has shape"):
        run(replace(i, w2_scale=i.w2_scale[:, :-1].contiguous()))
    with pytest.raises(ShapeError, match="w2 has shape"):
        run(replace(i, w2=i.w2[:, :-1].contiguous()))
    block = make_inputs(replace(SMALL, format="int8_w8a8_block_128x128"), 3, device="cpu")
    with pytest.raises(ConfigError, match="BLOCK_SIZE_K = 256"):
        run(block, config=KernelConfig(16, 64, 256, 1))


@pytest.mark.parametrize("name", ["int8_w8a8_channel", "int4_w4a16_group_128"])
def test_router_weights_on_the_input(name: str) -> None:
    """GEMM1's rows carry them, ahead of the activation, whose codes they change."""
    i = make_inputs(replace(SMALL, format=name), 7, device="cpu")
    wide = i.to(torch.float64)
    given = {"format": i.format, "apply_router_weight_on_input": True}
    plain, exact = precision.layer_references(i.hidden_states, wide.w13, wide.w2, i.topk_weights, i.topk_ids, **given)
    precision.check(run(i, apply_router_weight_on_input=True), plain, exact, name=name)


def test_a_static_scale_is_there_just_where_the_format_has_one() -> None:
    """One more was passed over, and for one that lacked the batch's own largest value was taken."""
    one = torch.tensor(0.02)
    for name in HERE:
        i = make_inputs(replace(SMALL, format=name), 3, device="cpu")
        with pytest.raises(FormatError, match="static_scale"):
            run(replace(i, a1_scale=one, a2_scale=one))
    i = make_inputs(replace(SMALL, format="fp8_w8a8_tensor_static"), 3, device="cpu")
    assert i.a1_scale is not None
    with pytest.raises(FormatError, match="no static_scale"):
        run(replace(i, a2_scale=None))
    with pytest.raises(ShapeError, match="a1_scale"):
        run(replace(i, a1_scale=one.expand(5).contiguous()))


@pytest.mark.parametrize("name", ["fp8_w8a8_channel", "int4_w4a16_group_128", "mxfp4_w4a16", "plain"])
def test_values_that_no_checkpoint_has_are_named(name: str) -> None:
    weights = make_inputs(replace(SMALL, format=name), 1, device="cpu").weights.up
    require_values(weights)
    if weights.scale is not None and name != "mxfp4_w4a16":  # whose scales are exponents
        wide = weights.scale.float()
        wide[0, 3] = float("nan")
        with pytest.raises(FormatError, match=r"w13 in the format .* scales that are NaN or infinity"):
            require_values(weights._replace(scale=wide.to(weights.scale.dtype)), "w13")
        with pytest.raises(FormatError, match="negative numbers"):
            require_values(weights._replace(scale=-weights.scale))
    if weights.w.is_floating_point():
        w = weights.w.float()
        w[1, 2, 3] = float("nan")
        with pytest.raises(FormatError, match=r"codes or weights that are NaN or infinity \(1\)"):
            require_values(weights._replace(w=w.to(weights.w.dtype)))


def test_exponents_that_a_kernel_reads_otherwise_are_named() -> None:
    """mxfp4's e8m0 code 255 is NaN and 0 is 2^-127: so the oracle has them, and the kernel shifts both into a float32, where
    they are infinity and 0. A group of zeros may have any exponent but NaN."""
    weights = make_inputs(replace(SMALL, format="mxfp4_w4a16"), 1, device="cpu").weights.up
    assert weights.scale is not None

    def scaled(code: int) -> GemmWeights:
        codes = weights.scale.view(torch.uint8).clone()
        codes[1, 3, 1] = code
        return weights._replace(scale=codes.view(torch.float8_e8m0fnu))

    with pytest.raises(FormatError, match=r"w13 in the format .* e8m0 scales of code 255, which is NaN \(1\)"):
        require_values(scaled(255), "w13")
    assert dequantise(scaled(255))[1, 3, 32:64].isnan().all()
    with pytest.raises(FormatError, match=r"e8m0 scales of code 0, which is 2\^-127 .* \(1\)"):
        require_values(scaled(0))
    group = dequantise(scaled(0))[1, 3, 32:64]
    assert bool(group.any()) and group.abs().max() <= 6 * 2.0**-127
    zeros = weights.w.clone()
    zeros[1, 3, 16:32] = 0x80  # zeros of either sign
    require_values(scaled(0)._replace(w=zeros))
    require_values(scaled(254))
