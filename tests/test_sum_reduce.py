"""Five sum-reduces against twice float64's digits, at sizes that once broke others."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import sampled

from moelab import precision, runtime
from moelab.dtypes import accumulator_dtype
from moelab.errors import DtypeError, LayoutError, RuntimeModeError, ShapeError, UnknownNameError
from moelab.inputs import random_tensor
from moelab.kernels import sum_reduce_cuda
from moelab.kernels.sum_reduce import SUM_REDUCE, available_sum_reduce, sum_reduce

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]
# (num_tokens, top_k, hidden): hidden % 16 == 8 left sglang's last 8 columns unwritten; 511 takes no vector; 40 slots
# are past every unrolled loop; 1 slot is a copy.
ODD = [(1, 1, 1), (3, 1, 511), (600, 2, 8), (5, 40, 264), (7, 9, 2056), (2, 6, 1000)]


def judge(x: torch.Tensor, impl: str, scale: float = 0.3) -> None:
    out = torch.full((x.shape[0], x.shape[2]), float("nan"), dtype=x.dtype, device=x.device)
    sum_reduce(x, scale, impl=impl, out=out)
    plain, exact = sum_reduce(x, scale, impl="torch"), precision.sum_reduce_double_double(x, scale)
    # Of a handful of sums torch's largest error is a matter of luck, so it is also taken from 64 tokens more.
    more = random_tensor((64, *x.shape[1:]), 1.0, dtype=x.dtype, device=x.device.type, seed=1)
    luck = own_error(more, scale) - precision.error(plain, exact).max_abs
    rounding = float(precision.ulp(exact.abs().max(), x.dtype))
    precision.check(out, plain, exact, tiny=2 * max(luck, 0.0) + rounding, name=f"{impl} {tuple(x.shape)} {x.dtype}")


def own_error(x: torch.Tensor, scale: float) -> float:
    """The largest error of torch's own sum and product."""
    exact = precision.sum_reduce_double_double(x, scale)
    return precision.error(sum_reduce(x, scale, impl="torch"), exact).max_abs


def supported(impl: str, dtype: torch.dtype) -> bool:
    return impl in available_sum_reduce(dtype) and not (impl == "triton_f32" and dtype == torch.float64)


@pytest.mark.parametrize(("size", "dtype"), sampled(ODD, DTYPES, together=1), ids=str)
def test_against_float64(size: tuple[int, int, int], dtype: torch.dtype, device: str) -> None:
    x = random_tensor(size, 1.0, dtype=dtype, device=device, seed=0)
    for impl in SUM_REDUCE:
        if supported(impl, dtype) and impl != "compiled":
            judge(x, impl)


def test_compiled_against_float64(device: str) -> None:
    judge(torch.randn(5, 9, 264, device=device, dtype=torch.float64), "compiled")


@pytest.mark.gpu
@pytest.mark.parametrize("size", [*ODD, (1024, 9, 4096), (70_001, 2, 8), (70_001, 3, 7)], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_implementation_on_the_gpu(size: tuple[int, int, int], dtype: torch.dtype) -> None:
    x = torch.randn(size, device="cuda", dtype=torch.float64).to(dtype)
    assert "cuda" in available_sum_reduce(dtype)
    for impl in SUM_REDUCE:
        if supported(impl, dtype):
            judge(x, impl)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "triton_f32", "cuda"])
def test_past_2_to_31_elements(impl: str) -> None:
    x = torch.randn(70_000, 8, 4096, device="cuda", dtype=torch.bfloat16)
    assert x.numel() > 2**31
    out = sum_reduce(x, impl=impl)
    for rows in (slice(0, 64), slice(65_500, 65_600), slice(69_900, 70_000)):
        exact = precision.sum_reduce_double_double(x[rows])
        precision.check(out[rows], sum_reduce(x[rows].clone(), impl="torch"), exact, name=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("offset", [1, 3])
def test_cuda_reads_what_does_not_start_on_16_bytes(offset: int) -> None:
    flat = torch.randn(offset + 4 * 2 * 64, device="cuda", dtype=torch.bfloat16)
    x = flat[offset:].view(4, 2, 64)
    judge(x, "cuda")


def test_the_float32_accumulator_fails_in_float64_and_the_wide_one_does_not(device: str) -> None:
    x = torch.randn(64, 9, 512, dtype=torch.float64, device=device, generator=torch.Generator(device).manual_seed(0))
    reference = sum_reduce(x, 0.3, impl="torch")
    assert not precision.upstream_check(sum_reduce(x, 0.3, impl="triton_f32"), reference)
    assert precision.upstream_check(sum_reduce(x, 0.3, impl="triton"), reference)


@settings(max_examples=20)
@given(st.integers(1, 5), st.integers(1, 12), st.integers(1, 70), st.floats(0.01, 100))
def test_powers_of_two_scale_exactly(num_tokens: int, top_k: int, hidden: int, scale: float) -> None:
    """Scaling the input by 2 scales the output by exactly 2, whatever routed_scaling_factor is."""
    x = torch.randn(num_tokens, top_k, hidden, dtype=torch.float64, device=runtime.current().device)
    assert torch.equal(sum_reduce(2 * x, scale), 2 * sum_reduce(x, scale))
    assert torch.equal(sum_reduce(x, scale / 2), sum_reduce(x, scale) / 2)


@pytest.mark.parametrize(
    ("scale", "dtype"), sampled([1.0, 0.3, 2.5, -1e-3, 1 / 3, 1e-40, 1e300], DTYPES, together=1), ids=str
)
def test_a_factor_is_rounded_once_to_the_accumulators_type(device: str, dtype: torch.dtype, scale: float) -> None:
    """Bit for bit what a constant in the kernel gives: slot after slot, times the factor, rounded."""
    if not supported("triton", dtype):
        pytest.skip("not in the interpreter")
    wide = accumulator_dtype(dtype)
    x = torch.randn(3, 9, 72, device=device).to(dtype)
    total = torch.zeros(3, 72, dtype=wide, device=device)
    for slot in range(9):
        total += x[:, slot].to(wide)
    expected = (total * torch.tensor(scale, dtype=torch.float64).to(wide).to(device)).to(dtype)
    assert torch.equal(sum_reduce(x, scale, impl="triton"), expected)


def test_wrong_calls(device: str) -> None:
    x = torch.zeros(4, 3, 16, device=device)
    with pytest.raises(ShapeError, match="num_tokens, top_k, hidden"):
        sum_reduce(x[0])
    with pytest.raises(LayoutError, match="contiguous"):
        sum_reduce(x.transpose(1, 2))
    with pytest.raises(DtypeError, match="int32"):
        sum_reduce(x.int())
    with pytest.raises(ShapeError, match="out has shape"):
        sum_reduce(x, out=torch.zeros(4, 15, device=device))
    with pytest.raises(UnknownNameError, match="Did you mean triton"):
        sum_reduce(x, impl="tritn")
    assert sum_reduce(torch.zeros(0, 3, 16, device=device)).shape == (0, 16)


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="about machines without a GPU")
def test_cuda_without_a_gpu_says_what_to_use() -> None:
    with pytest.raises(RuntimeModeError, match="use 'triton' or 'torch'"):
        sum_reduce(torch.zeros(1, 1, 8), impl="cuda")


@pytest.mark.parametrize(
    ("dtype", "arch", "sizes"),
    sampled(DTYPES, ["sm_80", "sm_90", "sm_100"], [(8, 2048), (40, 511)], together=1),
    ids=str,
)
def test_cuda_source_compiles_without_a_gpu(arch: str, dtype: torch.dtype, sizes: tuple[int, int]) -> None:
    top_k, hidden = sizes
    cut = sum_reduce_cuda.plan(1024, top_k, hidden, dtype)
    code, expression = sum_reduce_cuda.compile_kernel(arch, cut.expression(dtype))
    assert len(code.code) > 1000 and code.symbol_mapping[expression]


@given(st.integers(1, 10**6), st.integers(1, 64), st.integers(1, 20_000), st.sampled_from(DTYPES), st.booleans())
def test_plans_cover_every_column_and_fit_a_block(
    num_tokens: int, top_k: int, hidden: int, dtype: torch.dtype, aligned: bool
) -> None:
    cut = sum_reduce_cuda.plan(num_tokens, top_k, hidden, dtype, aligned=aligned)
    assert hidden % cut.vec == 0 and cut.vec * dtype.itemsize <= 16 and (aligned or cut.vec == 1)
    assert 32 <= cut.threads <= 1024 and cut.threads % 32 == 0
    assert cut.top_k in (0, top_k)
