"""Twice float64's digits, in torch: what float64 results are judged by.

A `Wide` is an unevaluated sum of two float64 tensors, about 32 decimal digits. Sums and products carry their rounding
errors along (Knuth, TAOCP 2, 4.2.2; Dekker, Numer. Math. 18, 1971); a matrix product cuts its operands into slices so short
that float64 adds up their products without a rounding (Ozaki et al., Numer. Algorithms 59, 2012), so its cost is ten plain
products. Every public function rounds once, at its end. Magnitudes must stay under 1e290.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from moelab.errors import ShapeError
from moelab.reference import check_activation

SLICES = 4
"""Slices of an operand of a product. At K = 8192 one holds 20 bits: 80 below a row's largest magnitude, of 53 in float64."""

_LN2 = (0.6931471805599453, 2.3190468138462996e-17)
_ROOT_HALF = (0.7071067811865476, -4.833646656726457e-17)  # sqrt(1 / 2)
_TWO_OVER_ROOT_PI = (1.1283791670955126, 1.533545961316588e-17)  # 2 / sqrt(pi)
_TWICE_ROOT_TWO_OVER_PI = (1.5957691216057308, -9.96930880911092e-17)  # 2 sqrt(2 / pi)


class Wide(NamedTuple):
    """high + low, |low| at most half a ULP of high; both float64, of one shape."""

    high: Tensor
    low: Tensor

    def rounded(self) -> Tensor:
        return self.high + self.low


def wide(value: Tensor) -> Wide:
    """A tensor of any float dtype, exactly."""
    return Wide(value.detach().to(torch.float64), torch.zeros_like(value, dtype=torch.float64))


def _constant(pair: tuple[float, float], like: Tensor) -> Wide:
    return Wide(torch.full_like(like, pair[0]), torch.full_like(like, pair[1]))


def two_sum(a: Tensor, b: Tensor) -> Wide:
    """The rounded a + b and its exact rounding error."""
    total = a + b
    b_part = total - a
    return Wide(total, (a - (total - b_part)) + (b - b_part))


def _split(value: Any) -> tuple[Any, Any]:
    scaled = value * 134217729.0  # 2^27 + 1 cuts 53 bits into two halves whose products are exact
    high = scaled - (scaled - value)
    return high, value - high


def two_product(a: Tensor, b: Any) -> Wide:
    """The rounded a * b and its exact rounding error."""
    product = a * b
    (a_high, a_low), (b_high, b_low) = _split(a), _split(b)
    return Wide(product, a_low * b_low - (((product - a_high * b_high) - a_low * b_high) - a_high * b_low))


def add(a: Wide, b: Wide) -> Wide:
    total, lost = two_sum(a.high, b.high)
    return two_sum(total, lost + (a.low + b.low))


def mul(a: Wide, b: Wide) -> Wide:
    product, lost = two_product(a.high, b.high)
    return two_sum(product, lost + (a.high * b.low + a.low * b.high))


def _negative(a: Wide) -> Wide:
    return Wide(-a.high, -a.low)


def div(a: Wide, b: Wide) -> Wide:
    guess = a.high / b.high
    rest = add(a, _negative(mul(b, wide(guess))))
    return two_sum(guess, rest.high / b.high)


def exp(x: Wide) -> Wide:
    """e^x; x above 700 counts as 700, below -700 as -700."""
    bounded = x.high.clamp(-700.0, 700.0)
    x = Wide(bounded, torch.where(bounded == x.high, x.low, 0.0))
    power = (x.high / _LN2[0]).round()
    rest = add(x, _negative(mul(wide(power), _constant(_LN2, power))))
    small = Wide(rest.high / 256, rest.low / 256)  # at most 0.0014: 11 terms give 2^-120
    one = wide(torch.ones_like(power))
    total = one
    for n in range(11, 0, -1):
        total = add(one, div(mul(small, total), wide(torch.full_like(power, float(n)))))
    for _ in range(8):
        total = mul(total, total)
    return Wide(torch.ldexp(total.high, power), torch.ldexp(total.low, power))


def sigmoid(x: Wide) -> Wide:
    one = wide(torch.ones_like(x.high))
    return div(one, add(one, exp(_negative(x))))


def erf(x: Wide) -> Wide:
    """2/sqrt(pi) e^(-x^2) sum of 2^n x^(2n+1) / (2n+1)!!, whose terms share a sign; from |x| = 7 on it is +-1 to 2^-74."""
    inside = x.high.abs() < 7
    small = Wide(torch.where(inside, x.high, 0.0), torch.where(inside, x.low, 0.0))
    square = mul(small, small)
    term = total = small
    for n in range(1, 240):  # at |x| = 7 the terms fall below 2^-106 of the sum after 230
        term = div(mul(term, Wide(2 * square.high, 2 * square.low)), wide(torch.full_like(x.high, 2.0 * n + 1)))
        total = add(total, term)
    near = mul(mul(_constant(_TWO_OVER_ROOT_PI, x.high), exp(_negative(square))), total)
    return Wide(torch.where(inside, near.high, x.high.sign()), torch.where(inside, near.low, 0.0))


# --- matrix products ------------------------------------------------------------------------------------------------


def _slices(x: Wide, bits: int) -> list[Tensor]:
    """SLICES tensors that add up to x (rows, K): integers of `bits` - 1 bits, times a power of two for each row."""
    rest, low = x
    parts = []
    for _ in range(SLICES):
        _, exponent = torch.frexp(rest.abs().amax(dim=-1, keepdim=True))
        # Adding 1.5 * 2^(e + 53 - bits) leaves room for no more than the leading bits, of either sign.
        unit = torch.ldexp(torch.full_like(rest[..., :1], 1.5), exponent + (53 - bits))
        part = (rest + unit) - unit
        parts.append(part)
        rest, low = two_sum(rest - part, low)
    return parts


def matmul(a: Wide, b: Wide) -> Wide:
    """a (M, K) @ b (N, K) transposed: (M, N). Right to 2^-(SLICES * bits) of the rows' largest magnitudes."""
    bits = (55 - max(1, math.ceil(math.log2(max(2, a.high.shape[1]))))) // 2
    left, right = _slices(a, bits), _slices(b, bits)
    total = wide(a.high.new_zeros(a.high.shape[0], b.high.shape[0]))
    for order in reversed(range(SLICES)):  # the smallest first
        for i in range(order + 1):
            total = add(total, wide(left[i] @ right[order - i].T))
    return total


# --- the layer ------------------------------------------------------------------------------------------------------


def wide_activation(x: Wide, activation: str, gated: bool) -> Wide:
    """The activations of moelab.reference, (rows, 2N) -> (rows, N) with a gate."""
    check_activation(activation, gated)
    if not gated:
        return mul(_relu(x), _relu(x)) if activation == "relu2" else mul(x, _factor(x, activation))
    inner = x.high.shape[1] // 2
    gate, up = (Wide(x.high[:, half], x.low[:, half]) for half in (slice(inner), slice(inner, None)))
    if activation != "swiglu_oai":
        return mul(mul(gate, _factor(gate, activation)), up)
    gate, up = _clamp(gate, -math.inf, 7.0), _clamp(up, -7.0, 7.0)
    one = wide(torch.ones_like(up.high))
    return mul(mul(add(up, one), gate), sigmoid(mul(_constant((1.702, 0.0), gate.high), gate)))


def _factor(x: Wide, activation: str) -> Wide:
    """What x is multiplied by: Phi(x), its approximation by tanh, or sigmoid(x)."""
    one = wide(torch.ones_like(x.high))
    if activation == "gelu":
        twice = add(one, erf(mul(_constant(_ROOT_HALF, x.high), x)))
        return Wide(twice.high / 2, twice.low / 2)
    if activation == "gelu_tanh":  # (1 + tanh(u)) / 2 = sigmoid(2u)
        cubic = mul(_constant((0.044715, 0.0), x.high), mul(x, x))
        return sigmoid(mul(mul(_constant(_TWICE_ROOT_TWO_OVER_PI, x.high), x), add(one, cubic)))
    return sigmoid(x)


def _relu(x: Wide) -> Wide:
    return _clamp(x, 0.0, math.inf)


def _clamp(x: Wide, low: float, high: float) -> Wide:
    outside = (x.rounded() < low) | (x.rounded() > high)
    return Wide(x.high.clamp(low, high), torch.where(outside, 0.0, x.low))


def grouped_gemm_double_double(
    a: Tensor,
    w: Tensor,
    topk_ids: Tensor,
    *,
    top_k: int,
    bias: Tensor | None = None,
    topk_weights: Tensor | None = None,
    activated: tuple[str, bool] | None = None,
) -> Tensor:
    """reference.grouped_gemm_ref, and with `activated` (name, gated) its activation, rounded once to float64."""
    flat = topk_ids.flatten()
    weights = None if topk_weights is None else topk_weights.flatten()
    rows = _by_expert(wide(a[torch.arange(len(flat), device=a.device) // top_k]), w, flat, bias, weights)
    out = (wide_activation(rows, *activated) if activated else rows).rounded()
    return torch.where(flat[:, None] < 0, 0.0, out)


def _by_expert(a: Wide, w: Tensor, ids: Tensor, bias: Tensor | None, weights: Tensor | None) -> Wide:
    """A row for each pair: a's, times its expert's matrix, plus bias, times weight; zeros for an id of -1."""
    out = wide(a.high.new_zeros(len(ids), w.shape[1]))
    for expert in ids[ids >= 0].unique().tolist():
        own = torch.where(ids == expert)[0]
        rows = matmul(Wide(a.high[own], a.low[own]), wide(w[expert]))
        out.high[own], out.low[own] = _affine(rows, bias, expert, None if weights is None else weights[own])
    return out


def _affine(rows: Wide, bias: Tensor | None, expert: int, weights: Tensor | None) -> Wide:
    """(rows + bias of the expert) * weights, each where there is one."""
    if bias is not None:
        rows = add(rows, wide(bias[expert].expand_as(rows.high)))
    return rows if weights is None else mul(rows, wide(weights.unsqueeze(1).expand_as(rows.high)))


def fused_moe_double_double(
    hidden_states: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    *,
    activation: str = "silu",
    gated: bool = True,
    b13: Tensor | None = None,
    b2: Tensor | None = None,
    routed_scaling_factor: float = 1.0,
    apply_router_weight_on_input: bool = False,
) -> Tensor:
    """reference.fused_moe_ref, rounded once to float64: (num_tokens, hidden_size). Same arguments, any float dtypes."""
    top_k, flat, weights = topk_ids.shape[1], topk_ids.flatten(), topk_weights.flatten()
    first, second = (weights, None) if apply_router_weight_on_input else (None, weights)
    rows = _by_expert(wide(hidden_states.repeat_interleave(top_k, 0)), w13, flat, b13, first)
    rows = _by_expert(
        wide_activation(rows, activation, gated), w2, flat, b2, second
    )  # at once: hundreds of small steps
    total = wide(rows.high.new_zeros(topk_ids.shape[0], w2.shape[1]))
    for high, low in zip(
        rows.high.view(-1, top_k, w2.shape[1]).unbind(1), rows.low.view(-1, top_k, w2.shape[1]).unbind(1), strict=True
    ):
        total = add(total, Wide(high, low))
    return mul(total, _constant((float(routed_scaling_factor), 0.0), total.high)).rounded()


def sum_reduce_double_double(x: Tensor, routed_scaling_factor: float = 1.0) -> Tensor:
    """x (M, k, H), any float dtype, summed over k and scaled: (M, H) float64 on x's device, right to the last bit.

    Exact but for near-ties of the rounding at the end. Raises ShapeError unless x has three axes.
    """
    if x.dim() != 3:
        raise ShapeError(f"x has shape {tuple(x.shape)}. Expected (num_tokens, top_k, hidden_size). Reshape it.")
    total = wide(torch.zeros(x.shape[0], x.shape[2], device=x.device))
    lost = torch.zeros_like(total.high)
    for slot in x.detach().unbind(1):
        high, rounding = two_sum(total.high, slot.to(torch.float64))
        lost += rounding
        total = Wide(high, lost)
    total = two_sum(total.high, lost)
    product, rounding = two_product(total.high, float(routed_scaling_factor))
    return product + (rounding + total.low * routed_scaling_factor)
