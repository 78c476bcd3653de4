"""Quantise and dequantise: exact codes come back, errors are half a step at most, and layouts are the peers'."""

from __future__ import annotations

import pytest
import torch

from moelab.errors import FormatError, ShapeError
from moelab.formats import FORMATS, PLAIN, Format, get_format
from moelab.kernels.quantise_activations import quantise_activations as by_kernel
from moelab.quantised_weights import (
    FP4_VALUES,
    as_multiplied,
    dequantise,
    dequantise_activations,
    quantise,
    quantise_activations,
)
from moelab.weights import GemmWeights

QUANTISED = [name for name, each in FORMATS.items() if not each.is_plain] + [
    "fp8_w8a8_block_64x32", "fp8_w8a8_block_128x128_ue8m0", "int8_w8a16_group_64",
]  # fmt: skip
E, N, K = 3, 192, 256  # N straddles a block of 128


def drawn(seed: int = 0) -> torch.Tensor:
    """Weights whose size spreads over decades by expert and by row."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(E, N, K, generator=g)
    return w * torch.logspace(-3, 1, E)[:, None, None] * torch.logspace(-1, 1, N)[None, :, None]


def step(format: Format, weights: GemmWeights) -> torch.Tensor:
    """The widest gap between neighbouring values at each weight, in float64."""
    from moelab.quantised_weights import _spread

    assert weights.scale is not None
    scale = _spread(weights.scale.float().double(), torch.Size((E, N, K)), format)
    if format.family == "mxfp4_w4a16":
        return 2.0 * scale
    if format.weight_dtype == "float8_e4m3fn":
        return 32.0 * scale  # between 256 and 448
    return scale


@pytest.mark.parametrize("name", QUANTISED)
def test_an_error_is_half_a_step_at_most(name: str) -> None:
    format, w = get_format(name), drawn()
    weights = quantise(w, format)
    back = dequantise(weights)
    worst = ((back - w.double()).abs() / step(format, weights)).max()
    limit = (
        1.0 if format.family == "mxfp4_w4a16" or format.zero_points else 0.5
    )  # ends of the range may clip by half a step
    rounded = 8 * 2.0**-8 if format.scale_dtype == "bfloat16" else 1e-5  # a scale rounded down clips its largest
    assert worst <= limit + rounded
    assert (back.abs().amax((1, 2)) > 0).all()


@pytest.mark.parametrize("name", [name for name in QUANTISED if not get_format(name).zero_points])
def test_what_came_back_stays(name: str) -> None:
    """Quantising dequantised weights gives them again: codes and scales are a fixed point. A zero point may round otherwise."""
    format = get_format(name)
    first = dequantise(quantise(drawn(), format))
    torch.testing.assert_close(dequantise(quantise(first.float(), format)), first, rtol=1e-2, atol=0)


@pytest.mark.parametrize("name", QUANTISED)
def test_shapes_are_the_kernels(name: str) -> None:
    format = get_format(name)
    codes, _, scale, zeros, *_ = quantise(drawn(), format)
    assert codes.shape == (E, N, K // 2 if format.bits == 4 else K)
    wanted = {
        "tensor": (E,), "channel": (E, N), "group": (E, N, K // format.sizes[-1] if format.sizes else 0),
        "block": (E, -(-N // format.sizes[0]), -(-K // format.sizes[-1])) if len(format.sizes) == 2 else (),
    }[format.granularity]  # fmt: skip
    assert scale is not None and scale.shape == wanted and str(scale.dtype).removeprefix("torch.") == format.scale_dtype
    assert (zeros is not None) is format.zero_points
    if zeros is not None:
        assert zeros.shape == (E, N // 2, K // format.sizes[0]) and zeros.is_contiguous()
    held = sum(t.numel() * t.element_size() for t in (codes, scale, zeros) if t is not None)
    assert held == E * format.matrix_bytes(N, K)


def test_int4_by_hand() -> None:
    """Values -8 ... 7 of one group: code 8 over the value, even column in the low half of a byte."""
    format = get_format("int4_w4a16_group_32")
    w = torch.arange(32.0).remainder(15).sub(7).reshape(1, 1, 32).repeat(1, 2, 1)
    codes, _, scale, *_ = quantise(w, format)
    assert scale is not None and (scale == 1.0).all()
    low, high = codes & 15, codes >> 4
    assert torch.equal(low.float() - 8, w[..., 0::2]) and torch.equal(high.float() - 8, w[..., 1::2])


def test_zero_points_by_hand() -> None:
    """Values 0 ... 15 need the zero point 0, values -15 ... 0 the zero point 15; packed along N, the even row low."""
    format = get_format("int4_w4a16_group_32_zp")
    up = torch.arange(32.0).remainder(16)
    weights = quantise(torch.stack([up, -up]).unsqueeze(0), format)
    assert weights.zero_point is not None and weights.zero_point.tolist() == [[[0 | 15 << 4]]]
    assert torch.equal(dequantise(weights)[0], torch.stack([up, -up]).double())


def test_mxfp4_values_come_back() -> None:
    values = torch.tensor([*FP4_VALUES, *(-v for v in FP4_VALUES)]).repeat(2).reshape(1, 1, 32)
    weights = quantise(values * 2.0**-5, get_format("mxfp4_w4a16"))
    assert torch.equal(dequantise(weights), values.double() * 2.0**-5)
    ties = torch.zeros(1, 1, 32)
    ties[0, 0, :4] = torch.tensor([6.0, 0.25, 0.75, 2.5])  # 0.25 to 0, 0.75 to 1, 2.5 to 2: the even codes
    assert dequantise(quantise(ties, get_format("mxfp4_w4a16")))[0, 0, :4].tolist() == [6.0, 0.0, 1.0, 2.0]


@pytest.mark.parametrize("name", QUANTISED)
def test_zeros_stay_zeros_and_experts_can_be_named(name: str) -> None:
    w = drawn()
    w[1] = 0.0
    weights = quantise(w, get_format(name))
    back = dequantise(weights)
    assert (back[1] == 0).all() and back.isfinite().all()
    assert torch.equal(dequantise(weights, experts=torch.tensor([2, 0])), back[[2, 0]])


def test_groups_are_rounded_before_the_product_and_sums_are_scaled_after_it() -> None:
    by_group = quantise(drawn(), get_format("int4_w4a16_group_128"))
    assert not torch.equal(as_multiplied(by_group, torch.bfloat16), dequantise(by_group))
    assert torch.equal(as_multiplied(by_group, torch.bfloat16), dequantise(by_group).bfloat16().double())
    by_channel = quantise(drawn(), get_format("int8_w8a16_channel"))
    assert torch.equal(as_multiplied(by_channel, torch.bfloat16), dequantise(by_channel))


@pytest.mark.parametrize("name", [name for name in QUANTISED if get_format(name).activations not in ("none", "static")])
def test_activations(name: str) -> None:
    format = get_format(name)
    g = torch.Generator().manual_seed(0)
    x = torch.randn(7, 200, generator=g) * torch.logspace(-4, 2, 7)[:, None]  # 200 is no whole number of groups of 128
    x[3] = 0.0
    codes, scale = quantise_activations(x, format)
    back = dequantise_activations(codes, scale, format)
    limit = 448.0 if format.weight_dtype == "float8_e4m3fn" else 127.0
    spread = scale.double().repeat_interleave(format.sizes[-1], -1)[:, :200] if format.activations == "group" else scale
    gap = 32.0 if limit == 448.0 else (2.0 if format.activations == "group" else 1.0)  # truncation errs by a whole step
    assert ((back - x.double()).abs() <= gap / 2 * spread * (1 + limit * 2.0**-23)).all()
    assert (codes[3].float() == 0).all() and codes.float().abs().max() <= limit


@pytest.mark.parametrize("name", ["fp8_w8a8_tensor_static", "fp8_w8a8_tensor", "int8_w8a8_block_128x128"])
def test_a_static_scale_goes_with_a_static_format(name: str) -> None:
    scale = None if name.endswith("static") else torch.tensor(0.5)
    with pytest.raises(FormatError, match=f"{name}.*static_scale"):
        quantise_activations(torch.ones(2, 256), get_format(name), scale)
    with pytest.raises(FormatError, match=f"{name}.*static_scale"):
        by_kernel(torch.ones(2, 256), get_format(name), scale)


@pytest.mark.parametrize(("name", "N", "K"), [("int4_w4a16_group_32_zp", 3, 32), ("int4_w4a16_group_33", 4, 33)])
def test_four_bits_of_an_odd_size_are_refused(name: str, N: int, K: int) -> None:
    with pytest.raises(ShapeError, match="two values"):
        quantise(torch.ones(1, N, K), get_format(name))


def test_static_scales_are_the_checkpoints() -> None:
    format = get_format("fp8_w8a8_tensor_static")
    codes, scale = quantise_activations(torch.full((2, 8), 500.0), format, torch.tensor(0.5))
    assert scale.item() == 0.5 and (codes.float() == 448).all()  # 1000 clamps


def test_what_cannot_be_is_named() -> None:
    with pytest.raises(ShapeError, match="no whole number of groups of 128"):
        quantise(torch.zeros(1, 4, 96), get_format("int4_w4a16_group_128"))
    with pytest.raises(ShapeError, match=r"Expected \(E, N, K\)"):
        quantise(torch.zeros(4, 96), PLAIN)
    with pytest.raises(FormatError, match="no scales"):
        dequantise(GemmWeights(torch.zeros(1, 4, 96, dtype=torch.int8), format=get_format("int8_w8a16_channel")))
    with pytest.raises(FormatError, match="leaves activations as they are"):
        quantise_activations(torch.zeros(1, 4), get_format("mxfp4_w4a16"))
