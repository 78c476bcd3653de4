"""Experts' weights into a format and back, in plain torch: the oracle's side of every quantised kernel.

Dequantising is exact where it is asked for in float64: codes times scales. What a kernel multiplies is a rounding later for
some formats, which `as_multiplied` has. Sources: the layouts of the fused MoE kernels of sglang 0.5.23 and vLLM 0.33.0 for
int4, int8 and fp8; the OCP microscaling specification v1.0 for mxfp4.
"""

from __future__ import annotations

import torch
from torch import Tensor

from moelab.errors import DtypeError, FormatError, ShapeError
from moelab.formats import Format
from moelab.weights import GemmWeights

FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
"""The magnitudes of e2m1, by their three low bits; the fourth bit is the sign."""

_SMALLEST_SCALE = 2.0**-126
"""A block of zeros gets this scale: any does, and this one is no denormal."""

_LARGEST = {"float8_e4m3fn": 448.0, "int8": 127.0}


def empty_weights(
    format: Format, num_experts: int, rows: int, columns: int, dtype: torch.dtype, device: str | torch.device
) -> GemmWeights:
    """Memory for (E, rows, columns) weights as the format stores them; dtype: of plain ones. "meta" gives shapes alone."""

    def empty(size: tuple[int, ...], of: torch.dtype) -> Tensor:
        return torch.empty(size, dtype=of, device=device)

    codes, scales, zeros = format.stored_shapes(num_experts, rows, columns)
    if format.is_plain:
        return GemmWeights(empty(codes, dtype))
    return GemmWeights(
        empty(codes, getattr(torch, str(format.weight_dtype))), None, empty(scales, getattr(torch, format.scale_dtype)),
        empty(zeros, torch.uint8) if format.zero_points else None, format,
    )  # fmt: skip


def empty_activations(
    format: Format, rows: int, columns: int, dtype: torch.dtype, device: str | torch.device
) -> tuple[Tensor, Tensor | None]:
    """Memory for (rows, columns) activations as the format's GEMM reads them, and for their scales, where it quantises them."""
    if format.activations == "none":
        return torch.empty((rows, columns), dtype=dtype, device=device), None
    codes = torch.empty((rows, columns), dtype=getattr(torch, str(format.weight_dtype)), device=device)
    return codes, torch.empty(format.activation_scales(rows, columns), dtype=torch.float32, device=device)


def quantise(w: Tensor, format: Format) -> GemmWeights:
    """w (E, N, K), floating, into `format`: each scale as small as its largest value allows.

    Scales: (E,) by tensor, (E, N) by channel, (E, N / n, K / k) rounded up by block, (E, N, K / g) by group. Codes have w's
    shape, but for 4 bits, two to a byte along K, the even column in the low half: (E, N, K / 2) uint8. Zero points of 4 bits
    are packed along N: (E, N / 2, K / g) uint8. Without zero points 4-bit codes are 8 over their value and uint8 ones 128 over.
    Raises ShapeError for what is no (E, N, K), a group that does not divide K, and 4 bits of an odd K, or of an odd N with zero
    points.
    """
    if w.ndim != 3 or not w.is_floating_point():
        raise ShapeError(f"w is {w.dtype} of shape {tuple(w.shape)}. Expected (E, N, K), floating. Pass the weights.")
    if format.is_plain:
        return GemmWeights(w, format=format)
    if format.granularity == "group" and w.shape[2] % format.sizes[0]:
        raise ShapeError(
            f"K = {w.shape[2]} is no whole number of groups of {format.sizes[0]}. Expected one. Choose another group size."
        )
    odd = [
        n for n, size, packed in (("K", w.shape[2], True), ("N", w.shape[1], format.zero_points)) if packed and size % 2
    ]
    if format.bits == 4 and odd:
        raise ShapeError(
            f"w has shape {tuple(w.shape)}, and {format.name} stores two values of {' and of '.join(odd)} to a byte. Expected an "
            "even size. Pad it, or choose a format of 8 bits."
        )
    parts = [_one_expert(w[e].float(), format) for e in range(w.shape[0])]
    codes, scales = torch.stack([part[0] for part in parts]), torch.stack([part[1] for part in parts])
    zeros = [part[2] for part in parts if part[2] is not None]
    return GemmWeights(codes, None, scales, torch.stack(zeros) if zeros else None, format)


def _one_expert(w: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor | None]:
    if format.family == "mxfp4_w4a16":
        return _mxfp4(w, format)
    if format.zero_points:
        return _with_zero_points(w, format)
    largest = _largest(w.abs(), format)
    limit = _LARGEST.get(str(format.weight_dtype), 7.0 if format.bits == 4 else 127.0)
    scale = (largest / limit).clamp(min=_SMALLEST_SCALE)
    if format.power_of_two_scales:
        scale = torch.exp2(torch.ceil(torch.log2(scale)))
    scale = scale.to(getattr(torch, format.scale_dtype))
    ratio = w / _spread(scale.float(), w.shape, format)
    if format.weight_dtype == "float8_e4m3fn":
        return ratio.clamp(-limit, limit).to(torch.float8_e4m3fn), scale, None
    codes = ratio.round().clamp(-limit, limit)
    if format.weight_dtype == "int8":
        return codes.to(torch.int8), scale, None
    codes = (codes + _middle(format)).to(torch.uint8)
    return _pack(codes) if format.bits == 4 else codes, scale, None


def _with_zero_points(w: Tensor, format: Format) -> tuple[Tensor, Tensor, Tensor]:
    top = 2.0**format.bits - 1
    grouped = w.unflatten(1, (-1, format.sizes[0]))
    low, high = grouped.amin(-1).clamp(max=0.0), grouped.amax(-1).clamp(min=0.0)
    scale = ((high - low) / top).clamp(min=_SMALLEST_SCALE).to(getattr(torch, format.scale_dtype))
    wide = scale.float()
    zero = (-low / wide).round().clamp(0, top)
    codes = (grouped / wide.unsqueeze(-1)).round().add(zero.unsqueeze(-1)).clamp(0, top).flatten(1).to(torch.uint8)
    packed = zero.to(torch.uint8)
    if format.bits == 4:
        return _pack(codes), scale, _pack(packed.T).T.contiguous()
    return codes, scale, packed


def _mxfp4(w: Tensor, format: Format) -> tuple[Tensor, Tensor, None]:
    """Scale 2^(floor(log2 of the largest) - 2), 2 being the largest exponent of e2m1 (OCP v1.0, section 6.3)."""
    largest = _largest(w.abs(), format).clamp(min=_SMALLEST_SCALE)
    exponent = torch.floor(torch.log2(largest)) - 2.0
    ratio = w / _spread(torch.exp2(exponent), w.shape, format)
    magnitudes = torch.tensor(FP4_VALUES, device=w.device)
    edges = (magnitudes[1:] + magnitudes[:-1]) / 2
    codes = torch.bucketize(ratio.abs(), edges)  # a tie goes to the smaller magnitude
    odd_tie = (ratio.abs().unsqueeze(-1) == edges).any(-1) & (codes % 2 == 1)  # to the even code, as IEEE rounds
    codes = (codes + odd_tie).to(torch.uint8) | (ratio.signbit().to(torch.uint8) << 3)
    return _pack(codes), torch.exp2(exponent).to(torch.float8_e8m0fnu), None


def _largest(magnitudes: Tensor, format: Format) -> Tensor:
    """The largest of what shares one scale, in the scale's shape without experts."""
    rows, columns = magnitudes.shape
    if format.granularity == "tensor":
        return magnitudes.amax()
    if format.granularity == "channel":
        return magnitudes.amax(1)
    if format.granularity == "group":
        return magnitudes.unflatten(1, (-1, format.sizes[0])).amax(-1)
    n, k = format.sizes
    whole = torch.nn.functional.pad(magnitudes, (0, -columns % k, 0, -rows % n))
    return whole.unflatten(1, (-1, k)).unflatten(0, (-1, n)).amax((1, 3))


def _spread(scale: Tensor, shape: torch.Size, format: Format) -> Tensor:
    """A scale for each value of a (..., N, K) matrix."""
    rows, columns = shape[-2:]
    if format.granularity == "tensor":
        return scale[..., None, None]
    if format.granularity == "channel":
        return scale[..., None]
    if format.granularity == "group":
        return scale.repeat_interleave(format.sizes[0], -1)
    n, k = format.sizes
    return scale.repeat_interleave(n, -2)[..., :rows, :].repeat_interleave(k, -1)[..., :columns]


def _middle(format: Format) -> int:
    """What stored codes of uint8 are over their value without zero points: 8 for 4 bits, 128 for 8."""
    return 1 << (format.bits - 1)


def _pack(codes: Tensor) -> Tensor:
    """Two 4-bit codes a byte along the last dimension, the even one low."""
    return (codes[..., 0::2] | (codes[..., 1::2] << 4)).contiguous()


def _unpack(packed: Tensor) -> Tensor:
    return torch.stack([packed & 15, packed >> 4], -1).flatten(-2)


def dequantise(weights: GemmWeights, dtype: torch.dtype = torch.float64, experts: Tensor | None = None) -> Tensor:
    """w (E, N, K), or of the `experts` named alone: codes times scales, computed in float64 and rounded once to dtype."""
    w, _, scale, zeros, format, _ = weights
    if experts is not None:
        w, scale, zeros = (None if t is None else t[experts] for t in (w, scale, zeros))  # type: ignore[assignment]
    if format.is_plain:
        return w.to(dtype)
    if scale is None or (format.zero_points and zeros is None):
        raise FormatError(
            f"The weights say that they are {format.name} and have no scales, or no zero points. Expected them. Make such "
            "weights with moelab.quantised_weights.quantise, or read them whole."
        )
    codes = _unpack(w) if format.bits == 4 else w
    if format.family == "mxfp4_w4a16":
        magnitudes = torch.tensor(FP4_VALUES, dtype=torch.float64, device=w.device)[(codes & 7).long()]
        values = torch.where(codes >= 8, -magnitudes, magnitudes)
    else:
        values = codes.to(torch.float64)
        if format.zero_points:
            assert zeros is not None  # checked above
            points = _unpack(zeros.transpose(-1, -2)).transpose(-1, -2) if format.bits == 4 else zeros
            values = values - points.to(torch.float64).repeat_interleave(format.sizes[0], -1)
        elif format.weight_dtype == "uint8":
            values = values - _middle(format)
    wide = scale.float().to(torch.float64)  # e8m0 has no way to float64 of its own
    return (values * _spread(wide, values.shape, format)).to(dtype)


def as_multiplied(weights: GemmWeights, dtype: torch.dtype, experts: Tensor | None = None) -> Tensor:
    """The values that a kernel with activations of `dtype` multiplies, in float64.

    Formats by groups are dequantised in the loop and rounded to the activations' dtype before the product; those with quantised
    activations, and int8 by channel, multiply codes and scale their sums, which rounds nothing here.
    """
    exact = dequantise(weights, torch.float64, experts)
    if weights.format.granularity == "group" and weights.format.activations == "none":
        return exact.to(dtype).to(torch.float64)
    return exact


def require_values(weights: GemmWeights, name: str = "w") -> None:
    """Raise FormatError for scales and codes that no checkpoint's weights have: NaN and infinity, and scales that are negative.

    Once, when weights are read: it reads all of them and waits for the device, which a launch does not. Scales of zero pass: a
    quantiser may give one to a block of zeros. Of e8m0 two codes are no scale of a kernel's: 255 (NaN, which it would take for
    infinity), and, over weights that are not zero, 0 (2^-127, which it would take for 0).
    """
    scale, format = weights.scale, weights.format
    wrong = []
    if scale is not None and scale.dtype == torch.float8_e8m0fnu:
        wrong += _wrong_exponents(weights.w, scale.view(torch.uint8), format)
    elif scale is not None:
        wide = scale.float()
        found = {"NaN or infinity": ~torch.isfinite(wide), "negative numbers": wide < 0}
        wrong += [f"scales that are {what} ({int(hits.sum())})" for what, hits in found.items() if bool(hits.any())]
    if weights.w.is_floating_point():
        count = sum(int((~torch.isfinite(part.float())).sum()) for part in weights.w)
        wrong += [f"codes or weights that are NaN or infinity ({count})"] if count else []
    if wrong:
        raise FormatError(
            f"{name} in the format {format.name} has {' and '.join(wrong)}. Expected finite values, and scales of 0 or more. "
            "Read the checkpoint again, or look at what quantised it."
        )


def _wrong_exponents(w: Tensor, codes: Tensor, format: Format) -> list[str]:
    """What of e8m0 scales a kernel reads otherwise than the format means it. w: the codes that they scale, two to a byte."""
    expert, row, group = torch.nonzero(codes == 0, as_tuple=True)
    bytes_of = w.unflatten(-1, (-1, format.sizes[0] // 2))[expert, row, group]
    lost = (bytes_of & 0x77 != 0).any(-1)  # without the signs
    found = {
        "code 255, which is NaN": codes == 255,
        "code 0, which is 2^-127 and reads as 0 in a kernel, over weights that are not": lost,
    }
    return [f"e8m0 scales of {what} ({int(hits.sum())})" for what, hits in found.items() if bool(hits.any())]


# --- activations --------------------------------------------------------------------------------------------------


def quantise_activations(x: Tensor, format: Format, static_scale: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """x (rows, K) as the format's activations: codes (rows, K), scales () by tensor, (rows, 1) by token, (rows, K / g) by group.

    fp8: largest / 448, never under 1e-10 / 448, codes clamped to +-448; int8: largest / 127, rounded to nearest, but truncated by
    groups, as sglang 0.5.23 and vLLM 0.33.0 do. static_scale: a checkpoint's, for a format that has one.
    Raises FormatError for a format whose activations stay as they are, for a static format without static_scale or another with
    it, DtypeError for x that is not floating.
    """
    if format.activations == "none":
        raise FormatError(
            f"{format.name} leaves activations as they are. Expected one that quantises them. Pass x itself."
        )
    if not x.is_floating_point():
        raise DtypeError(f"x is {x.dtype}. Expected a floating dtype. Quantise once.")
    format.require_static_scale(static_scale is not None)
    wide = x.float()
    limit = _LARGEST[str(format.weight_dtype)]
    scale = _activation_scale(wide, format, limit) if static_scale is None else static_scale.float()
    spread = scale.repeat_interleave(format.sizes[-1], -1)[:, : x.shape[1]] if format.activations == "group" else scale
    ratio = (wide / spread).clamp(-limit, limit)
    if format.weight_dtype == "float8_e4m3fn":
        return ratio.to(torch.float8_e4m3fn), scale
    return (ratio if format.activations == "group" else ratio.round()).to(torch.int8), scale


def _activation_scale(x: Tensor, format: Format, limit: float) -> Tensor:
    if format.activations == "tensor":
        largest = x.abs().amax() if x.numel() else x.new_zeros(())
    elif format.activations == "token":
        largest = x.abs().amax(-1, keepdim=True)
    else:
        group = format.sizes[-1]
        largest = torch.nn.functional.pad(x.abs(), (0, -x.shape[1] % group)).unflatten(1, (-1, group)).amax(-1)
    scale = largest.clamp(min=1e-10) / limit
    return torch.exp2(torch.ceil(torch.log2(scale))) if format.power_of_two_scales else scale


def dequantise_activations(codes: Tensor, scale: Tensor, format: Format) -> Tensor:
    """Codes times scales, in float64."""
    wide = scale.double()
    spread = (
        wide.repeat_interleave(format.sizes[-1], -1)[:, : codes.shape[1]] if format.activations == "group" else wide
    )
    return codes.to(torch.float64) * spread
