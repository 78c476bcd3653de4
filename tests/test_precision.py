"""precision: spacings against torch.nextafter, errors by hand, and a policy nothing wrong slips through."""

from __future__ import annotations

import math
from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelab import precision
from moelab.errors import DtypeError, PrecisionError, ShapeError, UnknownNameError

DTYPES = [torch.bfloat16, torch.float16, torch.float32, torch.float64]


def _gap_above(value: torch.Tensor) -> torch.Tensor:
    return torch.nextafter(value, torch.full_like(value, math.inf)).double() - value.double()


# --- ULP ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@given(seed=st.integers(0, 1 << 32), sign=st.sampled_from([-1.0, 1.0]))
def test_ulp_is_nextafters_gap(dtype: torch.dtype, seed: int, sign: float) -> None:
    """Mantissas at random in every binade of the dtype, subnormals among them."""
    info = torch.finfo(dtype)
    low, high = math.frexp(info.smallest_normal * info.eps)[1], math.frexp(info.max)[1] - 1
    exponent = torch.arange(low - 1, high, dtype=torch.float64)
    mantissa = 1 + torch.rand(exponent.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    value = (mantissa * torch.exp2(exponent)).to(dtype)
    assert torch.equal(precision.ulp(sign * value, dtype), _gap_above(value))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ulp_at_the_edges(dtype: torch.dtype) -> None:
    """Zero, the smallest subnormal, the smallest normal and its neighbours, one, and powers of two."""
    info = torch.finfo(dtype)
    least = info.smallest_normal * info.eps
    edges = [0.0, least, 3 * least, info.smallest_normal - least, info.smallest_normal, 1 - info.eps / 2, 1.0, 2.0]
    value = torch.tensor(edges, dtype=torch.float64).to(dtype)
    assert torch.equal(precision.ulp(value, dtype), _gap_above(value))
    last_binade = precision.ulp(torch.tensor(info.max, dtype=torch.float64), dtype).item()
    assert last_binade == 2.0 ** (math.frexp(info.max)[1] - 1) * info.eps
    assert precision.ulp(torch.tensor(1e308, dtype=torch.float64), "float16").item() == 32.0


@pytest.mark.parametrize("dtype", DTYPES[:3])
@given(value=st.floats(-60000, 60000))
def test_rounding_a_float64_costs_at_most_half_an_ulp(dtype: torch.dtype, value: float) -> None:
    ref = torch.tensor([value], dtype=torch.float64)
    assert precision.error(ref.to(dtype), ref).max_ulp <= 0.5


# --- errors -------------------------------------------------------------------------------------------------


def test_error_by_hand() -> None:
    out = torch.tensor([1.0, 2.5, -4.0], dtype=torch.float32)
    ref = torch.tensor([1.0, 2.0, -3.0], dtype=torch.float64)
    report = precision.error(out, ref, "bfloat16")
    assert (report.max_abs, report.mean_abs, report.n, report.dtype) == (1.0, 0.5, 3, "bfloat16")
    assert report.max_rel == pytest.approx(1 / 3)
    assert report.rel_fro == pytest.approx(math.sqrt(1.25 / 14))
    assert report.max_ulp == 1.0 / 2**-6  # bfloat16 has 7 stored bits: spacing 2^-6 in [2, 4)
    assert precision.error(out, ref).max_ulp == 1.0 / 2**-22


def test_the_percentile_is_no_outliers() -> None:
    """200 values off by one ULP of float32 at 1, two of them (1 %) next to a reference that cancelled to nothing."""
    ref = torch.ones(200, dtype=torch.float64)
    ref[:2] = 1e-9
    report = precision.error((ref + 2**-23).float(), ref)
    assert report.p99_ulp == 1.0
    assert report.max_ulp > 1e6
    assert precision.error((ref + 2**-23).float()[:100], ref[:100]).p99_ulp > 1e6  # now 2 % of them are


def test_zero_reference_and_empty() -> None:
    zero = torch.zeros(2, dtype=torch.float64)
    assert precision.error(zero, zero).max_rel == 0.0
    assert precision.error(zero + 1, zero).max_rel == math.inf
    assert precision.error(zero[:0], zero[:0]).finite


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("side", ["out", "torch", "ref"])
def test_not_finite_never_passes(bad: float, side: str) -> None:
    tensors = {name: torch.ones(3, dtype=torch.float64) for name in ("out", "torch", "ref")}
    tensors[side][1] = bad
    report = precision.error(tensors["out"], tensors["ref"])
    assert report.finite == (side == "torch")
    if side == "out":
        assert not precision.passes(tensors["out"], tensors["torch"], tensors["ref"])
        assert not precision.upstream_check(tensors["out"], tensors["torch"])
    with pytest.raises(PrecisionError):
        precision.check(tensors["out"], tensors["torch"], tensors["ref"])


def test_nan_in_both_is_no_agreement() -> None:
    nan = torch.full((2,), math.nan)
    assert not precision.upstream_check(nan, nan)


def test_bad_input() -> None:
    out, ref = torch.ones(2), torch.ones(2, dtype=torch.float64)
    with pytest.raises(ShapeError, match=r"\(2,\).*\(1,\)"):
        precision.error(out, ref[:1])
    with pytest.raises(DtypeError, match=r"Expected torch\.float64"):
        precision.error(out, out)
    with pytest.raises(DtypeError, match="floating-point"):
        precision.ulp(ref, "int32")
    with pytest.raises(UnknownNameError, match="No 'torch' among"):
        precision.compare({"a": out}, ref)


# --- the policy ---------------------------------------------------------------------------------------------


def test_the_bound_is_twice_torchs_error_and_one_rounding() -> None:
    ref = torch.tensor([1.0, 3.0], dtype=torch.float64)
    torch_out = torch.tensor([1.0, 3.0 + 2**-20], dtype=torch.float32)
    bound = 2 * 2**-20 + 2**-22  # spacing of float32 in [2, 4)
    assert precision.tolerance(torch_out, ref) == bound
    assert precision.tolerance(torch_out, ref, tiny=0.0) == 2 * 2**-20
    just = torch.tensor([1.0, 3.0 + bound], dtype=torch.float32)
    over = torch.tensor([1.0, 3.0 + bound + 2**-21], dtype=torch.float32)
    assert precision.passes(just, torch_out, ref)
    assert not precision.passes(over, torch_out, ref)
    with pytest.raises(PrecisionError, match="gemm: is off by"):
        precision.check(over, torch_out, ref, name="gemm")


def test_another_dtype_cannot_borrow_a_wider_bound() -> None:
    ref = torch.ones(2, dtype=torch.float64)
    assert not precision.passes(ref, ref.bfloat16(), ref)


def test_sum_reduce_contenders_side_by_side() -> None:
    """Section 4's table in small, in float64: a float32 accumulator fails, a float64 one passes, both by far."""
    x = torch.randn(33, 9, 511, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    reversed_sum = x.flip(1).sum(1) * 0.3
    outs = {"torch": x.sum(1) * 0.3, "reversed": reversed_sum, "triton_f32": (x.float().sum(1) * 0.3).double()}
    rows = {row["name"]: row for row in precision.compare(outs, precision.sum_reduce_double_double(x, 0.3))}
    assert [rows[name]["passes"] for name in outs] == [True, True, False]
    assert [rows[name]["upstream_passes"] for name in outs] == [True, True, False]
    assert rows["torch"]["max_abs_from_torch"] == 0.0
    assert rows["triton_f32"]["max_abs"] > 1e-8 > 1e-14 > rows["reversed"]["max_abs"]


def test_float64_can_be_judged_against_exact_arithmetic() -> None:
    """The reference the policy relies on in float64 is the exact sum, rounded once."""
    x = torch.randn(3, 9, 17, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    columns = x.transpose(1, 2).reshape(-1, 9).tolist()
    exact = [float(Fraction(0.3) * sum(map(Fraction, column))) for column in columns]
    assert precision.sum_reduce_double_double(x, 0.3).flatten().tolist() == exact


def test_upstream_tolerances() -> None:
    one = torch.ones(2, dtype=torch.float32)
    assert precision.upstream_check(one + 1.9e-6, one)  # atol + rtol * |1|
    assert not precision.upstream_check(one + 2.2e-6, one)
    with pytest.raises(ShapeError):
        precision.upstream_check(one, one.double())
