"""Error against float64, and the one policy that says whether it is small enough.

A result is judged by its error against a float64 reference of the same (low-precision) inputs, and the bound
is twice the error that torch itself makes in the same dtype: never a tolerance raised by hand until it passes.

float64 results need a reference with more digits than they have, or torch's own error is zero by construction:
`moelab.double_double` has one for the sum-reduce, a grouped product and the whole layer. `layer_references` and
`gemm_references` choose by dtype; nothing else in moelab decides what "exact" is.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch

from moelab.double_double import fused_moe_double_double, grouped_gemm_double_double
from moelab.double_double import sum_reduce_double_double as sum_reduce_double_double
from moelab.dtypes import dtype_name
from moelab.errors import DtypeError, PrecisionError, ShapeError, UnknownNameError
from moelab.formats import PLAIN, Format
from moelab.reference import activation_ref, fused_moe_ref, grouped_gemm_ref, quantised_moe_ref

UPSTREAM_TOLERANCE: Mapping[str, float] = {
    "float64": 1e-12,
    "float32": 1e-6,
    "bfloat16": 1e-2,
    "float16": 1e-2,
}
"""atol = rtol of the sum-reduce check in sglang #10654, by dtype."""

TINY_ULP = 1.0
"""`tiny` of the policy, in ULP of the dtype at the reference's largest magnitude: where torch happens to round every
output right, a contender's last rounding may still fall the other way."""


# A percentile of more values than this is taken from every n-th of them: a sort of 2^31 would not fit beside them.
_PERCENTILE_SAMPLE = 1 << 24


@dataclass(frozen=True)
class ErrorReport:
    """How far a result is from its reference.

    max_abs, mean_abs: |out - ref|. max_rel: max_abs over the largest |ref|. rel_fro: Frobenius norm of out -
    ref over that of ref. max_ulp, mean_ulp, p99_ulp (99th percentile): |out - ref| in spacings of `dtype` at |ref|;
    where sums cancel to near zero max_ulp explodes, and the percentile says more. finite: no NaN or
    infinity on either side; where there is one, every error is infinite. n: elements compared. dtype: the
    result's.
    """

    max_abs: float
    mean_abs: float
    max_rel: float
    rel_fro: float
    max_ulp: float
    mean_ulp: float
    p99_ulp: float
    finite: bool
    n: int
    dtype: str


def _dtype_of(dtype: torch.dtype | str) -> torch.dtype:
    found = getattr(torch, dtype_name(dtype), None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise DtypeError(
            f"{dtype!r} is not a floating-point dtype. Expected one of {', '.join(UPSTREAM_TOLERANCE)}. Cast it."
        )
    return found


def ulp(value: torch.Tensor, dtype: torch.dtype | str) -> torch.Tensor:
    """Spacing of `dtype` at |value|: float64, of value's shape; value: any float tensor, finite.

    The gap between neighbours in the binade [2^e, 2^(e+1)) that holds |value|: 2^e * eps, and never less than
    the smallest subnormal, which is the gap from zero to the end of the first normal binade. A power of two
    gets the gap above it. Values past the dtype's range get the spacing of its last binade.
    """
    info = torch.finfo(_dtype_of(dtype))
    magnitude = value.detach().to(torch.float64).abs()
    _, exponent = torch.frexp(magnitude.clamp(min=info.smallest_normal, max=info.max))
    power = exponent.to(torch.float64) - 1.0 + math.log2(info.eps)  # frexp's mantissa lies in [0.5, 1)
    return torch.exp2(power)


def error(out: torch.Tensor, ref_f64: torch.Tensor, dtype: torch.dtype | str | None = None) -> ErrorReport:
    """Measure `out` (any float dtype) against `ref_f64` (float64, the same shape), on out's device.

    dtype: whose spacing a ULP is; default out's own. Raises ShapeError for shapes that differ, DtypeError for
    a reference that is not float64. Not-finite values are reported, not raised: `check` refuses them.
    """
    if out.shape != ref_f64.shape:
        raise ShapeError(
            f"out is {tuple(out.shape)}, the reference {tuple(ref_f64.shape)}. Expected the same shape. Compare like "
            "with like."
        )
    if ref_f64.dtype != torch.float64:
        raise DtypeError(f"The reference is {ref_f64.dtype}. Expected torch.float64. Compute it from inputs cast up.")
    unit = _dtype_of(dtype if dtype is not None else out.dtype)
    name = dtype_name(unit)
    ref = ref_f64.detach().to(out.device)
    got = out.detach().to(torch.float64)
    if out.numel() == 0:
        return ErrorReport(0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, True, 0, name)
    if not (torch.isfinite(got).all() and torch.isfinite(ref).all()):
        inf = math.inf
        return ErrorReport(inf, inf, inf, inf, inf, inf, inf, False, out.numel(), name)
    difference = (got - ref).abs()
    in_ulp = difference / ulp(ref, unit)
    max_abs = difference.max().item()
    return ErrorReport(
        max_abs=max_abs,
        mean_abs=difference.mean().item(),
        max_rel=_ratio(max_abs, ref.abs().max().item()),
        rel_fro=_ratio(torch.linalg.vector_norm(difference).item(), torch.linalg.vector_norm(ref).item()),
        max_ulp=in_ulp.max().item(),
        mean_ulp=in_ulp.mean().item(),
        p99_ulp=_percentile_99(in_ulp),
        finite=True,
        n=out.numel(),
        dtype=name,
    )


def _percentile_99(values: torch.Tensor) -> float:
    few = values.flatten()[:: 1 + values.numel() // _PERCENTILE_SAMPLE]
    return few.kthvalue(math.ceil(0.99 * few.numel())).values.item()


def _ratio(numerator: float, denominator: float) -> float:
    if denominator:
        return numerator / denominator
    return math.inf if numerator else 0.0


# --- what is exact ------------------------------------------------------------------------------------------


def _double(value: Any) -> Any:
    return value.double() if isinstance(value, torch.Tensor) and value.is_floating_point() else value


def layer_references(
    hidden_states: torch.Tensor,
    w13: torch.Tensor,
    w2: torch.Tensor,
    topk_weights: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    format: Format = PLAIN,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(torch's layer in hidden_states' dtype, what it should have been: float64), both (num_tokens, hidden_size).

    Weights may be wider than hidden_states, as dequantised ones are: torch's layer multiplies them rounded to its dtype.
    format: one that quantises activations makes both do so, ahead of either GEMM, and torch's multiply in float32 and round
    where kernels do.
    The second is the oracle in float64 on the same inputs, and for float64 inputs the layer in twice the digits, rounded
    once. options: of `reference.fused_moe_ref`.
    """
    dtype = hidden_states.dtype
    if format.activations != "none":
        routing = (topk_weights, topk_ids, format)
        plain = quantised_moe_ref(hidden_states, w13.float(), w2.float(), *routing, rounded=dtype, **options)
        return plain, quantised_moe_ref(hidden_states, w13.double(), w2.double(), *routing, **options)
    given = (hidden_states, w13.to(dtype), w2.to(dtype), topk_weights, topk_ids)
    plain = fused_moe_ref(*given, **options)
    if dtype == torch.float64:
        return plain, fused_moe_double_double(*given, **options)
    wide = {name: _double(value) for name, value in options.items()}
    x, w13, w2 = hidden_states.double(), w13.double(), w2.double()
    return plain, fused_moe_ref(x, w13, w2, topk_weights, topk_ids, **wide)


def gemm_references(
    a: torch.Tensor,
    w: torch.Tensor,
    topk_ids: torch.Tensor,
    *,
    activated: tuple[str, bool] | None = None,
    rounded: torch.dtype | None = None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(torch's grouped product in a's dtype, what it should have been: float64), both (pairs, columns); w may be wider.

    rounded: of operands that are codes times scales, in float64: torch's product is then in float32, rounded to this dtype.
    activated: (activation, gated) of what follows the product, if any. options: of `reference.grouped_gemm_ref`.
    """
    if rounded is None:
        plain = grouped_gemm_ref(a, w.to(a.dtype), topk_ids, **options)
    else:
        plain = grouped_gemm_ref(a.float(), w.float(), topk_ids, **options).to(rounded)
    plain = activation_ref(plain, activated[0], gated=activated[1]) if activated else plain
    if a.dtype == torch.float64 and rounded is None:
        return plain, grouped_gemm_double_double(a, w, topk_ids, activated=activated, **options)
    wide = {name: _double(value) for name, value in options.items()}
    exact = grouped_gemm_ref(a.double(), w.double(), topk_ids, **wide)
    return plain, activation_ref(exact, activated[0], gated=activated[1]) if activated else exact


# --- the policy ---------------------------------------------------------------------------------------------


def tolerance(torch_out: torch.Tensor, ref_f64: torch.Tensor, tiny: float | None = None) -> float:
    """The bound on a contender's largest absolute error: 2 * torch's own + tiny.

    torch_out: torch's result in the contender's dtype, from the same inputs. tiny: absolute; default TINY_ULP
    spacings of that dtype at the reference's largest magnitude. Raises PrecisionError where torch's own
    result, or the reference, is not finite: there is then nothing to judge by.
    """
    own = error(torch_out, ref_f64)
    if not own.finite:
        raise PrecisionError(
            "torch's own result, or the float64 reference, holds NaN or infinity: nothing can be judged by it. "
            "Expected finite values. Draw inputs whose result fits the dtype."
        )
    if tiny is None:
        largest = ref_f64.detach().abs().max() if ref_f64.numel() else torch.zeros((), dtype=torch.float64)
        tiny = TINY_ULP * ulp(largest, own.dtype).item()
    return 2.0 * own.max_abs + tiny


def passes(out: torch.Tensor, torch_out: torch.Tensor, ref_f64: torch.Tensor, tiny: float | None = None) -> bool:
    """Whether `out` is finite, of torch_out's dtype, and within `tolerance` of the float64 reference."""
    return _verdict(out, torch_out, ref_f64, tiny) is None


def check(
    out: torch.Tensor,
    torch_out: torch.Tensor,
    ref_f64: torch.Tensor,
    *,
    name: str = "the result",
    tiny: float | None = None,
) -> ErrorReport:
    """Return the error of `out`; raise PrecisionError, with figures, where `passes` is false."""
    problem = _verdict(out, torch_out, ref_f64, tiny)
    if problem:
        raise PrecisionError(
            f"{name}: {problem}. Expected a result as near to float64 as torch's is. Look for a wrong mask, index or "
            "accumulator type before timing it."
        )
    return error(out, ref_f64)


def _verdict(out: torch.Tensor, torch_out: torch.Tensor, ref_f64: torch.Tensor, tiny: float | None) -> str | None:
    if out.dtype != torch_out.dtype:
        return f"is {out.dtype} where torch gives {torch_out.dtype}; a bound in another dtype would say nothing"
    bound = tolerance(torch_out, ref_f64, tiny)
    report = error(out, ref_f64)
    if not report.finite:
        return "holds NaN or infinity"
    if report.max_abs <= bound:
        return None
    return (
        f"is off by {report.max_abs:.3g} ({report.max_ulp:.3g} ULP) at worst, over the bound of {bound:.3g} "
        f"= twice torch's own error in {report.dtype} and a rounding"
    )


def upstream_check(out: torch.Tensor, torch_out: torch.Tensor) -> bool:
    """The fixed check of sglang #10654: allclose to torch's result, atol = rtol from UPSTREAM_TOLERANCE.

    NaN never passes, not even where torch has one too. Raises UnknownNameError for a dtype the table lacks.
    """
    name = dtype_name(torch_out.dtype)
    if name not in UPSTREAM_TOLERANCE:
        raise UnknownNameError(
            f"Upstream gives no tolerance for {name}. Expected {' or '.join(UPSTREAM_TOLERANCE)}. Use `check`."
        )
    if out.shape != torch_out.shape or out.dtype != torch_out.dtype:
        raise ShapeError(
            f"Cannot compare {out.dtype} {tuple(out.shape)} with {torch_out.dtype} {tuple(torch_out.shape)}. "
            "Expected the same dtype and shape. Compare like with like."
        )
    bound = UPSTREAM_TOLERANCE[name]
    return torch.allclose(out.to(torch.float64), torch_out.to(torch.float64), atol=bound, rtol=bound)


def compare(
    contenders: Mapping[str, torch.Tensor],
    ref_f64: torch.Tensor,
    torch_name: str = "torch",
    tiny: float | None = None,
) -> list[dict[str, Any]]:
    """One row per contender, side by side: its ErrorReport's fields, and both verdicts.

    Columns besides ErrorReport's: name; bound, passes (the policy); max_abs_from_torch, upstream_tolerance,
    upstream_passes (the fixed check). contenders[torch_name] is torch's result; all have its dtype. Raises
    UnknownNameError if it is missing.
    """
    if torch_name not in contenders:
        raise UnknownNameError(
            f"No {torch_name!r} among {', '.join(contenders)}. Expected torch's own result: the bound comes from it. "
            "Add it."
        )
    torch_out = contenders[torch_name]
    bound = tolerance(torch_out, ref_f64, tiny)
    rows = []
    for name, out in contenders.items():
        report = error(out, ref_f64)
        rows.append(
            {
                "name": name,
                **asdict(report),
                "bound": bound,
                "passes": passes(out, torch_out, ref_f64, tiny),
                "max_abs_from_torch": error(out, torch_out.to(torch.float64)).max_abs,
                "upstream_tolerance": UPSTREAM_TOLERANCE.get(report.dtype),
                "upstream_passes": upstream_check(out, torch_out) if report.dtype in UPSTREAM_TOLERANCE else None,
            }
        )
    return rows
