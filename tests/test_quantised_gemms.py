"""The quantised kernels given codes and scales: against float64 of the dequantised operands, at odd sizes, in every format.

Triton's interpreter computes no fp8, so there fp8 formats are held by the gpu tests; the same kernels run here in int8.
"""

from __future__ import annotations

import dataclasses

import pytest
import torch
from sampling import sampled

from moelab import precision, runtime
from moelab.config import KernelConfig
from moelab.errors import ConfigError, DtypeError, FormatError, ShapeError
from moelab.formats import Format, get_format
from moelab.kernels.align import align
from moelab.kernels.channel_scaled_gemm import channel_scaled_gemm
from moelab.kernels.gemm_call import GemmCall
from moelab.kernels.quantise_activations import quantise_activations
from moelab.kernels.quantised import GEMMS
from moelab.quantised_weights import as_multiplied, dequantise_activations, quantise
from moelab.quantised_weights import quantise_activations as plain_codes
from moelab.reference import grouped_gemm_ref
from moelab.weights import GemmWeights

NAMES = (
    "fp8_w8a8_tensor", "fp8_w8a8_tensor_static", "fp8_w8a8_channel", "fp8_w8a8_block_128x128", "fp8_w8a8_block_64x32",
    "fp8_w8a8_block_128x128_ue8m0", "int8_w8a8_channel", "int8_w8a8_block_128x128", "int8_w8a8_block_64x32",
    "int8_w8a16_channel", "int8_w8a16_group_64", "int4_w4a16_group_32", "int4_w4a16_group_64_zp",
    "int4_w4a16_group_128", "int4_w4a16_group_128_zp", "mxfp4_w4a16",
)  # fmt: skip
HERE = [name for name in NAMES if not name.startswith("fp8")]
E = 4


def problem(name: str, pairs: int, N: int, K: int, dtype: torch.dtype, device: str) -> tuple[GemmCall, torch.Tensor]:
    """A call whose weights and rows spread over decades by expert, row, group and token; some pairs are another rank's."""
    format, top_k = get_format(name), 2
    g = torch.Generator().manual_seed(N + K)
    size = torch.logspace(-2, 0, E)[:, None, None] * torch.logspace(-1, 0, N)[None, :, None]
    size = size * (1.0 + 7.0 * (torch.arange(K) // 32 % 3 == 0))  # groups of 32 of another size
    w = torch.randn(E, N, K, generator=g) * size * K**-0.5
    x = torch.randn(pairs // top_k, K, generator=g) * torch.logspace(-1, 1, pairs // top_k)[:, None]
    x[0, 0] = 40.0  # an outlier in one token's first group
    ids = torch.randint(
        -1, E - 1, (pairs // top_k, top_k), generator=g, dtype=torch.int32
    )  # the last expert gets nobody
    w[E - 1] *= 1e3  # seen where it is read, though NaN has no code in most formats
    weights = GemmWeights(*(t if t is None else t.to(device) for t in quantise(w, format)[:4]), format=format)
    x, ids = x.to(device, dtype), ids.to(device)
    factors = torch.rand(pairs, generator=g).to(device)
    static = torch.tensor(0.05, device=device) if format.activations == "static" else None
    a, a_scale = (x, None) if format.activations == "none" else (*plain_codes(x, format, static),)
    step = min(64, *(format.sizes[-1:] if format.granularity == "block" else (64,)))
    config = KernelConfig(16, 64, step, 2)
    alignment = align(ids, 16, E)
    return GemmCall(a, weights, alignment, config, pairs, top_k, factors, a_scale=a_scale), ids


def wide(call: GemmCall, dtype: torch.dtype) -> torch.Tensor:
    """The operand that the product multiplies, in float64."""
    return (
        call.a.double() if call.a_scale is None else dequantise_activations(call.a, call.a_scale, call.weights.format)
    )


def judge(call: GemmCall, ids: torch.Tensor, out: torch.Tensor) -> None:
    """Within twice the error of torch in float32 over the same operands, rounded once, of float64."""
    a, w = wide(call, out.dtype), as_multiplied(call.weights, out.dtype)
    given, bias = {"top_k": call.top_k, "topk_weights": call.topk_weights}, call.weights.bias
    exact = grouped_gemm_ref(a, w, ids, **given, bias=None if bias is None else bias.double())
    plain = grouped_gemm_ref(a.float(), w.float(), ids, **given, bias=None if bias is None else bias.float()).to(
        out.dtype
    )
    precision.check(out, plain, exact, name=call.weights.format.name)
    assert (out[(ids.flatten() < 0)] == 0).all()


def product(call: GemmCall, dtype: torch.dtype) -> torch.Tensor:
    check, launch = GEMMS[call.weights.format.family]
    out = torch.full((call.num_pairs, call.sizes[0]), float("nan"), dtype=dtype, device=call.a.device)
    check(call, out)
    launch(call, out)
    return out


@pytest.mark.parametrize(
    ("name", "sizes"), sampled(HERE, [(22, 192, 256), (2, 72, 384)], together=1), ids=str
)  # N that straddles blocks and tiles
def test_against_float64(name: str, sizes: tuple[int, int, int]) -> None:
    pairs, N, K = sizes
    call, ids = problem(name, pairs, N, K, torch.float16, "cpu")
    judge(call, ids, product(call, torch.float16))


@pytest.mark.parametrize(
    "name", ["int8_w8a8_block_128x128", "int8_w8a8_block_64x32", "int8_w8a8_channel", "int4_w4a16_group_32"]
)
def test_a_k_that_no_step_divides(name: str) -> None:
    call, ids = problem(name, 22, 72, 288, torch.float16, "cpu")
    judge(call, ids, product(call, torch.float16))


@pytest.mark.parametrize(
    "name", ["int8_w8a8_block_64x32", "int8_w8a8_channel", "int8_w8a16_channel", "int4_w4a16_group_32"]
)
def test_a_bias_comes_after_the_scales(name: str) -> None:
    call, ids = problem(name, 2, 72, 128, torch.float16, "cpu")
    bias = torch.randn(E, 72, generator=torch.Generator().manual_seed(1)).half()
    call = call._replace(weights=call.weights._replace(bias=bias))
    judge(call, ids, product(call, torch.float16))


@pytest.mark.parametrize("name", ["int8_w8a8_block_128x128", "int8_w8a8_channel"])
def test_operands_that_change_places(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What Hopper does in fp8 below 64 rows, here in int8: the same sums."""
    from moelab.kernels import block_scaled_gemm, channel_scaled_gemm

    call, ids = problem(name, 22, 192, 256, torch.float16, "cpu")
    straight = product(call, torch.float16)
    for module in (block_scaled_gemm, channel_scaled_gemm):
        monkeypatch.setattr(module, "swaps_operands", lambda call: True)
    turned = product(call, torch.float16)
    judge(call, ids, turned)
    assert torch.equal(straight, turned)


@pytest.mark.gpu
@pytest.mark.parametrize("tile", [(16, 64, 64), (64, 128, 128), (128, 128, 64), (16, 32, 128)], ids=str)
@pytest.mark.parametrize(("pairs", "N", "K"), [(22, 192, 256), (600, 320, 896), (2, 2880, 2880)], ids=str)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_on_the_gpu(name: str, dtype: torch.dtype, pairs: int, N: int, K: int, tile: tuple[int, int, int]) -> None:
    """2880 is gpt-oss's: no multiple of 128."""
    format = get_format(name)
    if format.granularity == "group" and K % format.sizes[0]:
        pytest.skip("a group that does not divide K is refused")
    call, ids = problem(name, pairs, N, K, dtype, "cuda")
    m, n, k = tile
    if format.granularity == "block":
        k = min(k, format.sizes[-1])
    call = call._replace(config=KernelConfig(m, n, k, 4, 4, 3), alignment=align(ids, m, E))
    first, *others = (product(call, dtype) for _ in range(3))
    assert all(torch.equal(first, other) for other in others)
    if name.startswith("fp8") and format.granularity != "block":
        judge_unpromoted(call, ids, first)
    else:
        judge(call, ids, first)


def judge_unpromoted(call: GemmCall, ids: torch.Tensor, out: torch.Tensor) -> None:
    """A tensor core aligns each 32 products of fp8, and the sum so far, to the largest of them and cuts every one behind some 13
    bits: held to what that can come to. With each step of K added in float32 it is held as every other is."""
    a, w = wide(call, out.dtype), as_multiplied(call.weights, out.dtype)
    given = {"top_k": call.top_k, "topk_weights": call.topk_weights}
    exact = grouped_gemm_ref(a, w, ids, **given)
    magnitudes = grouped_gemm_ref(a.abs(), w.abs(), ids, **given)
    rounding = precision.ulp(exact, out.dtype)
    cuts = 33 * -(-call.sizes[1] // 32)
    assert ((out.double() - exact).abs() <= cuts * 2.0**-14 * magnitudes + rounding).all()
    judge(call, ids, channel_scaled_gemm(call, torch.empty_like(out), promote=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name in HERE if get_format(name).activations != "none"])
def test_codes_are_the_plain_ones_but_at_ties(name: str, dtype: torch.dtype) -> None:
    codes_agree(get_format(name), dtype, "cpu")


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("name", [name for name in NAMES if get_format(name).activations != "none"])
def test_codes_are_the_plain_ones_on_the_gpu(name: str, dtype: torch.dtype) -> None:
    codes_agree(get_format(name), dtype, "cuda")


def codes_agree(format: Format, dtype: torch.dtype, device: str) -> None:
    g = torch.Generator().manual_seed(0)
    x = (torch.randn(13, 300, generator=g) * torch.logspace(-3, 2, 13)[:, None]).to(device, dtype)
    x[4] = 0.0
    static = torch.tensor(0.25, device=device) if format.activations == "static" else None
    (codes, scale), (wanted, exact) = quantise_activations(x, format, static), plain_codes(x, format, static)
    torch.testing.assert_close(scale, exact, rtol=3e-7, atol=0)
    spread = exact.repeat_interleave(format.sizes[-1], -1)[:, :300] if format.activations == "group" else exact
    differ = codes.float() != wanted.float()
    assert differ.float().mean() < 0.01
    ratio = (x.double() / spread.double())[differ]
    middle = ((codes.double() + wanted.double()) / 2)[differ]
    truncates = format.weight_dtype == "int8" and format.activations == "group"
    edge = torch.where(codes.double().abs() > wanted.double().abs(), codes.double(), wanted.double())[differ]
    near = edge if truncates else middle
    assert ((ratio - near).abs() <= 1e-5 * ratio.abs().clamp(min=1.0)).all()


PLANTED = {
    "the scale of the neighbour block": lambda w: w._replace(scale=w.scale.roll(1, -1)),
    "the scale of the neighbour expert": lambda w: w._replace(scale=w.scale.roll(1, 0)),
    "the halves of a byte changed": lambda w: w._replace(w=(w.w >> 4) | (w.w << 4)),
    "a zero point off by one": lambda w: w._replace(zero_point=w.zero_point ^ 0x11),
}


@pytest.mark.parametrize(
    ("what", "name"),
    [
        ("the scale of the neighbour block", "int8_w8a8_block_128x128"),
        ("the scale of the neighbour block", "int4_w4a16_group_32"),
        ("the scale of the neighbour block", "mxfp4_w4a16"),
        ("the scale of the neighbour expert", "int8_w8a8_channel"),
        ("the halves of a byte changed", "mxfp4_w4a16"),
        ("a zero point off by one", "int4_w4a16_group_64_zp"),
    ],
)
def test_a_planted_fault_is_found(what: str, name: str) -> None:
    call, ids = problem(name, 22, 72, 256, torch.float16, "cpu")
    weights = PLANTED[what](call.weights)
    out = product(call._replace(weights=weights), torch.float16)
    with pytest.raises(AssertionError):
        judge(call, ids, out)


def test_what_does_not_fit_is_named() -> None:
    call, _ = problem("int8_w8a8_block_128x128", 22, 72, 256, torch.float16, "cpu")
    out = torch.empty(22, 72, dtype=torch.float16)
    check = GEMMS["int8_w8a8_block"][0]
    with pytest.raises(ConfigError, match="BLOCK_SIZE_K = 256 and scales by groups of 128"):
        check(call._replace(config=KernelConfig(16, 64, 256, 1)), out)
    with pytest.raises(FormatError, match="There is no a_scale"):
        check(call._replace(a_scale=None), out)
    with pytest.raises(ShapeError, match=r"w's scale has shape \(4, 2, 1\)"):
        check(call._replace(weights=call.weights._replace(scale=call.weights.scale.transpose(1, 2).contiguous())), out)
    with pytest.raises(DtypeError, match="a is float16"):
        check(call._replace(a=call.a.half()), out)
    with pytest.raises(FormatError, match="came with zero points"):
        check(call._replace(weights=call.weights._replace(zero_point=torch.zeros(1))), out)
    with pytest.raises(FormatError, match="Expected one of int4_w4a16_group"):
        GEMMS["mxfp4_w4a16"][0](call, out)
    other = dataclasses.replace(call.weights.format, family="int8_w8a8_channel", granularity="channel", sizes=())
    with pytest.raises(FormatError, match="Expected one of fp8_w8a8_block"):
        check(call._replace(weights=call.weights._replace(format=other)), out)


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="the interpreter's rule")
def test_fp8_is_refused_under_the_interpreter() -> None:
    from moelab.errors import RuntimeModeError

    call, _ = problem("fp8_w8a8_block_128x128", 22, 72, 256, torch.float16, "cpu")
    with pytest.raises(RuntimeModeError, match="float8_e4m3fn under Triton's interpreter"):
        product(call, torch.float16)
