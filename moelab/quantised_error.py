"""What a format costs in accuracy, its two parts apart: quantising itself, and the rounding of a kernel that is given the codes.

The first is the same for every kernel and nobody's fault; the second is what kernels are judged by. Errors are relative, in the
Frobenius norm, against float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab import precision, runtime
from moelab.dtypes import torch_dtype
from moelab.errors import MoelabError
from moelab.formats import Format, get_format
from moelab.fused_moe import fused_moe
from moelab.inputs import MoEInputs, make_inputs
from moelab.quantised_weights import (
    FP4_VALUES,
    as_multiplied,
    dequantise,
    dequantise_activations,
    quantise,
    quantise_activations,
)
from moelab.reference import fused_moe_ref, quantised_moe_ref
from moelab.shapes import MoEShape

KEPT_BITS = 13
"""Bits behind the largest's first that Hopper's tensor core keeps of each product of fp8, and of the sum so far."""

PRODUCTS = 32
"""Products of fp8 that it adds at a time."""


def relative(out: Tensor, exact: Tensor) -> float:
    """Frobenius norm of the difference over that of `exact`."""
    return precision.error(out.double(), exact.double()).rel_fro


# --- a layer, by format ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class LayerError:
    """quantising: of the exact layer over codes, from the exact layer over the weights themselves. rounding: of torch with a
    kernel's rounding points, from the exact layer over codes; kernel: of the kernel, the same way, in `kernel_dtype`, beside
    torch's there; None where it does not run here, and `why`."""

    format: str
    quantising: float
    rounding: float
    kernel: float | None = None
    torch_beside: float | None = None
    kernel_dtype: str = ""
    why: str = ""


def layer_error(
    name: str | Format, shape: MoEShape, num_tokens: int, *, kernel_dtype: str = "float16", seed: int = 0
) -> LayerError:
    """Of a layer of that shape with its experts in that format; the shape's own format and dtype are the plain ones."""
    format = get_format(name)
    plain = make_inputs(shape, num_tokens, device="cpu", seed=seed)
    whole = _exact(plain, plain)
    coded = _in_format(plain, format)
    over_codes = _exact(coded, plain)
    rounding = relative(_torch(coded), over_codes)
    found = LayerError(format.name, relative(over_codes, whole), rounding)
    if format.is_plain:
        return found
    narrow = _in_format(plain.to(torch_dtype(kernel_dtype)), format)
    try:
        runtime.prepare_triton()
        out = fused_moe(
            narrow.hidden_states, narrow.weights, topk_weights=narrow.topk_weights, topk_ids=narrow.topk_ids, impl="triton",
            config="default", activation=shape.activation, gated=shape.gated,
        )  # fmt: skip
    except MoelabError as error:
        return LayerError(format.name, found.quantising, rounding, why=str(error).partition(".")[0])
    exact = _exact(narrow, narrow)
    return LayerError(
        format.name, found.quantising, rounding, relative(out, exact), relative(_torch(narrow), exact), kernel_dtype
    )


def _in_format(plain: MoEInputs, format: Format) -> MoEInputs:
    up, down = quantise(plain.w13, format), quantise(plain.w2, format)
    return MoEInputs(
        plain.hidden_states, up.w, down.w, plain.topk_weights, plain.topk_ids, None, None, up.scale, down.scale, up.zero_point,
        down.zero_point, format,
    )  # fmt: skip


def _exact(given: MoEInputs, routed: MoEInputs) -> Tensor:
    """The layer in float64 over what is given, its activations' codes included."""
    wide, routing = given.to(torch.float64), (routed.topk_weights, routed.topk_ids)
    if given.format.activations == "none":
        return fused_moe_ref(wide.hidden_states, wide.w13, wide.w2, *routing)
    return quantised_moe_ref(wide.hidden_states, wide.w13, wide.w2, *routing, given.format)


def _torch(given: MoEInputs) -> Tensor:
    """torch's layer over the same codes, rounded where kernels round."""
    wide = given.to(torch.float64)
    plain, _ = precision.layer_references(
        given.hidden_states, wide.w13, wide.w2, given.topk_weights, given.topk_ids, format=given.format
    )
    return plain


# --- a product, by K --------------------------------------------------------------------------------------------------------


def product_errors(name: str | Format, K: int, *, rows: int = 8, columns: int = 16, seed: int = 0) -> dict[str, float]:
    """Of (rows, K) @ (columns, K).T in a format: "quantising", and given its codes "float32 sum"; of fp8 also "tensor core" (its
    sum over all of K, simulated) and "tensor core, float32 every 128". What is rounded at the end is not in it."""
    format = get_format(name)
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(rows, K, generator=g, dtype=torch.float64).bfloat16()
    weights = torch.randn(1, columns, K, generator=g, dtype=torch.float64).mul(K**-0.5).bfloat16()
    coded = quantise(weights, format)
    w = as_multiplied(coded, torch.bfloat16)[0]
    codes, scale = (x, None) if format.activations == "none" else quantise_activations(x, format)
    a = x.double() if scale is None else dequantise_activations(codes, scale, format)
    exact = a @ w.T
    found = {
        "quantising": relative(exact, x.double() @ weights[0].double().T),
        "float32 sum": relative(a.float() @ w.float().T, exact),
    }
    if format.weight_dtype == "float8_e4m3fn" and format.granularity != "block":
        factors = torch.ones(rows, 1, dtype=torch.float64) if scale is None else scale.double().reshape(-1, 1)
        by = (a / factors, w / _row_scales(coded.scale))
        sums = {"tensor core": cut_sum(*by, K), "tensor core, float32 every 128": cut_sum(*by, 128)}
        found |= {label: relative(total * factors * _row_scales(coded.scale).T, exact) for label, total in sums.items()}
    return found


def _row_scales(scale: Tensor | None) -> Tensor:
    assert scale is not None  # of a quantised format
    return scale[0].double().reshape(-1, 1)


def cut_sum(a: Tensor, w: Tensor, promoted_after: int) -> Tensor:
    """a (rows, K) @ w (columns, K).T as Hopper's tensor core adds products of fp8, simulated in float64: each PRODUCTS of them,
    and the sum so far, are cut behind KEPT_BITS of the largest; after `promoted_after` columns the sum goes to float32."""
    total = torch.zeros(a.shape[0], w.shape[0])
    for start in range(0, a.shape[1], promoted_after):
        part = torch.zeros(a.shape[0], w.shape[0], dtype=torch.float64)
        for k in range(start, min(start + promoted_after, a.shape[1]), PRODUCTS):
            terms = a[:, None, k : k + PRODUCTS] * w[None, :, k : k + PRODUCTS]
            largest = torch.maximum(terms.abs().amax(-1), part.abs()).clamp(min=2.0**-100)
            unit = torch.exp2(torch.floor(torch.log2(largest)) - KEPT_BITS)
            part = (torch.trunc(terms / unit[..., None]).sum(-1) + torch.trunc(part / unit)) * unit
        total = total + part.float()
    return total.double()


# --- one weight ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Way:
    """The first weights of a row, into a format and back. values: as they were; scales: each one's; codes: what is stored, as
    text; back: what a kernel multiplies. levels: the values that codes of the first one's scale can have, ascending."""

    format: Format
    values: tuple[float, ...]
    scales: tuple[float, ...]
    codes: tuple[str, ...]
    back: tuple[float, ...]
    levels: tuple[float, ...]


def way(name: str | Format, outlier: float = 1.0, *, count: int = 32, seed: int = 0) -> Way:
    """Of normal bfloat16 weights (a block of 128 x 128), the fourth of which is `outlier` times as large."""
    format = get_format(name)
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(1, 128, 128, generator=g).mul(0.02).bfloat16()
    w[0, 0, 3] *= outlier
    coded, values = quantise(w, format), tuple(w[0, 0, :count].double().tolist())
    back = tuple(as_multiplied(coded, torch.bfloat16)[0, 0, :count].tolist())
    if format.is_plain:
        return Way(format, values, (1.0,) * count, tuple(f"{v:.3g}" for v in values), back, ())
    ones = coded._replace(scale=torch.ones_like(coded.scale.float()).to(coded.scale.dtype))  # type: ignore[union-attr]
    steps = dequantise(ones)[0, 0, :count]
    scales = _scales_of_row(coded.scale, format, count)  # type: ignore[arg-type]
    return Way(
        format, values, scales, _stored(coded.w[0, 0], steps, format, count), back, _levels(format, coded, scales[0])
    )


def _scales_of_row(scale: Tensor, format: Format, count: int) -> tuple[float, ...]:
    wide = scale[0].float().double()
    if format.granularity in ("tensor", "channel"):
        return (float(wide.reshape(-1)[0]),) * count
    row = wide[0].repeat_interleave(format.sizes[-1])
    return tuple(row[:count].tolist())


def _stored(row: Tensor, steps: Tensor, format: Format, count: int) -> tuple[str, ...]:
    if format.bits == 4:
        codes = torch.stack([row & 15, row >> 4], -1).flatten()[:count].tolist()
        return tuple(f"{int(code):04b}" for code in codes)
    return tuple(f"{int(code):08b}" for code in row.view(torch.uint8)[:count].tolist())


def _levels(format: Format, coded: object, scale: float) -> tuple[float, ...]:
    """Of 4 bits: of 8 there are too many to draw."""
    if format.family == "mxfp4_w4a16":
        return tuple(sorted({sign * value * scale for value in FP4_VALUES for sign in (-1.0, 1.0)}))
    if format.bits != 4:
        return ()
    zero = 8
    points = getattr(coded, "zero_point", None)
    if points is not None:
        zero = int(points[0, 0, 0]) & 15
    return tuple((code - zero) * scale for code in range(16))


def by_k(names: Sequence[str], sizes: Sequence[int]) -> dict[str, dict[int, dict[str, float]]]:
    """`product_errors` of each format at each K."""
    return {name: {K: product_errors(name, K) for K in sizes} for name in names}
