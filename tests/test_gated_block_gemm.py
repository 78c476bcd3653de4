"""GEMM1 over blocks with its activation, and codes that are made on the way: the sums and codes of the steps one by one.

Triton's interpreter computes no fp8: here in int8, and in fp8 by the gpu tests.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from test_quantised_gemms import problem, product, wide
from test_quantised_layer import SMALL
from test_quantised_layer import judge as judge_layer

from moelab import precision
from moelab.config import KernelConfig
from moelab.errors import ConfigError, MoelabError, ShapeError
from moelab.formats import get_format
from moelab.fused_moe import fused_moe
from moelab.inputs import make_inputs
from moelab.kernels import gated_block_gemm as room
from moelab.kernels.gated_block_gemm import gated_block_gemm
from moelab.kernels.gemm_call import GemmCall
from moelab.quantised_weights import as_multiplied, dequantise_activations, quantise_activations
from moelab.reference import GATED, grouped_gemm_ref
from moelab.shapes import MoEShape
from moelab.weights import GemmWeights

NAME = "int8_w8a8_block_64x32"


def gated(call: GemmCall, config: KernelConfig, **more: Any) -> GemmCall:
    return call._replace(config=config, activation="silu", gated=True, **more)


def exact_and_plain(call: GemmCall, ids: torch.Tensor, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """activation(gate) * up in float64, and in float32 rounded to dtype."""
    a, w = wide(call, dtype), as_multiplied(call.weights, dtype)
    found = []
    for kind in (torch.float64, torch.float32):
        h = grouped_gemm_ref(a.to(kind), w.to(kind), ids, top_k=call.top_k, topk_weights=call.topk_weights)
        found.append(GATED["silu"](*h.chunk(2, dim=1)))
    return found[0], found[1].to(dtype)


@pytest.mark.parametrize("swapped", [False, True])
def test_against_float64(swapped: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """N = 192: three blocks of gate rows, three of up rows; operands that change places give the same."""
    call, ids = problem(NAME, 22, 384, 96, torch.float16, "cpu")
    call = gated(call, KernelConfig(16, 128 if swapped else 32, 32, 2))
    monkeypatch.setattr(room, "swaps_operands", lambda call: swapped)
    out, scale = gated_block_gemm(call, torch.float16)
    exact, plain = exact_and_plain(call, ids, torch.float16)
    here = ids.flatten() >= 0
    assert scale is None
    precision.check(out[here], plain[here], exact[here], name="gated_block_gemm")


def test_codes_made_on_the_way_are_those_of_the_launch_before() -> None:
    call, ids = problem(NAME, 22, 384, 96, torch.float16, "cpu")
    x = (
        torch.randn(11, 96, generator=torch.Generator().manual_seed(3)).half()
        * torch.logspace(-2, 2, 11)[:, None].half()
    )
    codes, scale = quantise_activations(x, call.weights.format)
    here = ids.flatten() >= 0
    for config in (KernelConfig(16, 64, 32, 1), KernelConfig(16, 128, 32, 1)):
        apart, _ = gated_block_gemm(gated(call, config, a=codes, a_scale=scale), torch.float16)
        inside, _ = gated_block_gemm(gated(call, config, a=x, a_scale=None), torch.float16)
        assert torch.equal(apart[here], inside[here])
    both = [
        product(call._replace(a=a, a_scale=s, config=KernelConfig(16, 64, 32, 1)), torch.float16)
        for a, s in ((codes, scale), (x, None))
    ]
    assert torch.equal(*both)


def test_a_tile_of_one_group_leaves_as_codes() -> None:
    """In blocks of 64 x 64 a tile of 64 gate rows is a group of GEMM2's columns."""
    call, ids = problem("int8_w8a8_block_64x64", 22, 384, 128, torch.float16, "cpu")
    codes, scale = gated_block_gemm(gated(call, KernelConfig(16, 128, 64, 1)), torch.float16)
    assert codes.dtype == torch.int8 and scale is not None and scale.shape == (22, 3)
    sums, none = gated_block_gemm(gated(call, KernelConfig(16, 64, 64, 1)), torch.float32)
    here = ids.flatten() >= 0
    wanted, of = quantise_activations(sums[here], call.weights.format)
    assert none is None and torch.equal(codes[here], wanted) and torch.equal(scale[here], of)
    exact, _ = exact_and_plain(call, ids, torch.float16)
    back = dequantise_activations(codes[here], scale[here], call.weights.format)
    step = scale[here].repeat_interleave(64, 1)  # int8 by groups truncates: off by a code at most
    assert ((back - exact[here]).abs() <= 1.01 * step).all()


@pytest.mark.parametrize("name", ["int8_w8a8_block_64x32", "int8_w8a8_block_64x64", "int8_w8a8_block_128x128"])
@pytest.mark.parametrize("tile", [(16, 64), (16, 128), (64, 128)], ids=str)
def test_the_layer(name: str, tile: tuple[int, int]) -> None:
    """Few rows, whose codes are made on the way; a group a tile; many rows."""
    i = make_inputs(replace(SMALL, format=name), 7, device="cpu")
    i.topk_ids[2, 1] = -1
    i.topk_weights[2, 1] = float("nan")
    config = KernelConfig(*tile, get_format(name).sizes[-1], 1)
    out = fused_moe(
        i.hidden_states, i.weights, topk_weights=i.topk_weights, topk_ids=i.topk_ids, impl="gated", config=config
    )
    judge_layer(replace(i, topk_weights=i.topk_weights.nan_to_num(0.0)), out)


def test_a_wrong_scale_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The gate's scales for the up rows, which spread over decades here."""
    call, ids = problem(NAME, 22, 384, 96, torch.float16, "cpu")
    scale = call.weights.scale
    assert scale is not None
    wrong = scale.clone()
    wrong[:, 3:] = scale[:, :3]
    out, _ = gated_block_gemm(
        gated(call, KernelConfig(16, 64, 32, 1), weights=call.weights._replace(scale=wrong)), torch.float16
    )
    exact, plain = exact_and_plain(call, ids, torch.float16)
    here = ids.flatten() >= 0
    with pytest.raises(MoelabError):
        precision.check(out[here], plain[here], exact[here], name="gated_block_gemm")


def test_what_does_not_fit_is_named() -> None:
    call, _ = problem(NAME, 22, 384, 96, torch.float16, "cpu")
    uncoded = {"a": torch.zeros(11, 96, dtype=torch.float16), "a_scale": None}
    short = GemmWeights(
        *(t if t is None else t[:, :n].contiguous() for t, n in zip(call.weights[:3], (320, 0, 5), strict=True))
    )
    refusals: list[tuple[type[MoelabError], GemmCall]] = [
        (ConfigError, gated(call, KernelConfig(16, 16, 32, 1))),
        (ConfigError, gated(call, KernelConfig(16, 256, 32, 1))),
        (ConfigError, gated(call, KernelConfig(16, 64, 64, 1))),
        (ConfigError, gated(call, KernelConfig(16, 64, 16, 1), **uncoded)),
        (ShapeError, gated(call, KernelConfig(16, 64, 32, 1), weights=short._replace(format=call.weights.format))),
    ]
    for error, wrong in refusals:
        with pytest.raises(error, match="Expected"):
            gated_block_gemm(wrong, torch.float16)
    i = make_inputs(replace(SMALL, format=NAME, activation="relu2", gated=False), 3, device="cpu")
    with pytest.raises(ConfigError, match=r"gated=False.*triton"):
        fused_moe(
            i.hidden_states, i.weights, topk_weights=i.topk_weights, topk_ids=i.topk_ids, impl="gated", activation="relu2",
            gated=False, config=KernelConfig(16, 64, 32, 1),
        )  # fmt: skip


@pytest.mark.gpu
@pytest.mark.parametrize(
    "tile", [(16, 64, 4), (16, 128, 4), (16, 256, 4), (64, 256, 8), (64, 128, 4), (128, 128, 8)], ids=str
)
@pytest.mark.parametrize("name", ["fp8_w8a8_block_128x128", "fp8_w8a8_block_128x128_ue8m0", "int8_w8a8_block_128x128"])
@pytest.mark.parametrize("num_tokens", [1, 9, 300])
def test_the_layer_on_the_gpu(name: str, num_tokens: int, tile: tuple[int, int, int]) -> None:
    rows, columns, warps = tile
    i = make_inputs(MoEShape("shard", 32, 8, 2048, 256, format=name), num_tokens, device="cuda")
    i.topk_ids[0, 1] = -1
    config = KernelConfig(rows, columns, 128, 1, warps, 3)
    given = {"topk_weights": i.topk_weights, "topk_ids": i.topk_ids, "impl": "gated", "config": config}
    down = KernelConfig(rows, 128, 128, 1, 4, 3)
    first, second = (fused_moe(i.hidden_states, i.weights, **given, down_config=down) for _ in range(2))
    assert torch.equal(first, second)
    judge_layer(i, first)
