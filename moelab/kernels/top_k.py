"""Small jit helpers of routing: scores, and the greatest of a row by maxima of integers.

float32 is mapped to int32 in the same order: an integer maximum over a warp is one instruction from sm_80 on, and equal
values and NaN have a place. Rows of a tile are tokens, its lanes experts.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

LOWEST = tl.constexpr(-(2**31))  # below the key of every float32: lanes without an expert, and experts already taken


@triton.jit
def key_of(x):
    """float32 as int32 in the same order: -0 equals 0, and NaN is above all, so that it is chosen and seen."""
    bits = tl.where(x == 0.0, 0.0, x).to(tl.int32, bitcast=True)
    return tl.where(x == x, bits ^ ((bits >> 31) & 0x7FFFFFFF), 0x7FFFFFFF)


@triton.jit
def float_of(key):
    """The float32 of a key; of the NaNs' key a NaN."""
    return (key ^ ((key >> 31) & 0x7FFFFFFF)).to(tl.float32, bitcast=True)


@triton.jit
def is_first_best(key, AXIS: tl.constexpr):
    """Which place along the last axis holds the greatest key, the first of equals: a 0/1 tile with one 1 a row."""
    places = tl.arange(0, key.shape[AXIS])
    for _ in tl.static_range(AXIS):
        places = tl.expand_dims(places, 0)
    best = tl.expand_dims(tl.max(key, axis=AXIS), AXIS)
    first = tl.min(tl.where(key == best, places, key.shape[AXIS]), axis=AXIS)
    return places == tl.expand_dims(first, AXIS)


@triton.jit
def within_best_groups(key, SUM_OF_TWO: tl.constexpr, GROUPS: tl.constexpr, TOP_K_GROUPS: tl.constexpr):
    """key (ROWS, LANES) with all but the best groups' lanes lowered to LOWEST; lanes lie group by group."""
    ROWS: tl.constexpr = key.shape[0]
    LANES: tl.constexpr = key.shape[1]
    grouped = tl.reshape(key, (ROWS, GROUPS, LANES // GROUPS))
    best = tl.max(grouped, axis=2)
    if SUM_OF_TWO:
        second = tl.max(tl.where(is_first_best(grouped, 2), LOWEST, grouped), axis=2)
        best = tl.where(best == LOWEST, LOWEST, key_of(float_of(best) + float_of(second)))
    keep = tl.zeros((ROWS, GROUPS), tl.int32)
    for _ in range(TOP_K_GROUPS):
        chosen = is_first_best(best, 1)
        keep = tl.where(chosen, 1, keep)
        best = tl.where(chosen, LOWEST, best)
    return tl.reshape(tl.where(tl.expand_dims(keep, 2) == 1, grouped, LOWEST), (ROWS, LANES))


@triton.jit
def close_exp(x):
    """exp(x) of x <= 0 in float32, within an ULP, and 0 below 2^-126; NaN stays NaN.

    A weight's tolerance has no room for the 2 ULP of a GPU's own power of two. So: 2^n exp(r) with |r| <= ln(2) / 2, ln(2)
    in two parts of which n times the first is exact (Cody and Waite, 1980), and Taylor's series up to r^7 / 7!, past which
    there is 5e-9.
    """
    n = tl.floor(x * 1.4426950408889634 + 0.5)
    r = tl.fma(n, 2.12194440054690583e-4, tl.fma(n, -0.693359375, x))
    power = tl.fma(r, 1 / 5040, 1 / 720)
    power = tl.fma(power, r, 1 / 120)
    power = tl.fma(power, r, 1 / 24)
    power = tl.fma(power, r, 1 / 6)
    power = tl.fma(power, r, 0.5)
    power = tl.fma(power, r, 1.0)
    power = tl.fma(power, r, 1.0)
    scale = ((tl.maximum(n, -126.0).to(tl.int32) + 127) << 23).to(tl.float32, bitcast=True)
    return tl.where(x < -87.3, 0.0, power * scale)


@triton.jit
def shares(values, total):
    """values (ROWS, LANES) / total (ROWS,), rounded to float32 once: a division a row, and a Newton step a value.

    total is float64: summed in float32 it would be off by 2 ULP or 3, and with it every weight of a token.
    """
    high = total.to(tl.float32)
    low = tl.expand_dims((total - high).to(tl.float32), 1)
    inverse = tl.expand_dims(tl.div_rn(1.0, high), 1)
    quotient = values * inverse
    rest = tl.fma(-quotient, low, tl.fma(-quotient, tl.expand_dims(high, 1), values))
    return tl.fma(inverse, rest, quotient)


@triton.jit
def close_sigmoid(x):
    """1 / (1 + exp(-x)) in float32, within 2 ULP: Triton's quotient, which may be 2 ULP off, and a Newton step.

    A division rounded right would be a branch for each value.
    """
    power = close_exp(-tl.abs(x))  # at most 1, so that 1 + power and its inverse are in reach of the step
    inverse = 1 / (1 + power)
    inverse = tl.fma(inverse, tl.fma(-inverse, power, 1 - inverse), inverse)
    return tl.where(x >= 0, inverse, power * inverse)


@triton.jit
def router_scores(logits, SCORE: tl.constexpr, UP_TO_A_FACTOR: tl.constexpr):
    """What the router makes of its logits (ROWS, LANES), float32; lanes without an expert hold -inf.

    UP_TO_A_FACTOR: a softmax may go without its sum, as weights that are renormalised do not depend on it.
    """
    if SCORE == "softmax":
        # The maximum over keys: that of floats would pass over a NaN.
        powers = close_exp(logits - tl.expand_dims(float_of(tl.max(key_of(logits), axis=1)), 1))
        return powers if UP_TO_A_FACTOR else shares(powers, tl.sum(powers.to(tl.float64), axis=1))
    else:
        tl.static_assert(SCORE == "sigmoid", "unknown score")
        return close_sigmoid(logits)


@triton.jit
def with_lane(key):
    """Keys of float32 that were 16 bits wide, each row's made unique: greater for the first of equals.

    The 13 low bits of such a float32 say nothing (float16 has 10 of the 23 bits behind the point), so a lane fits in.
    """
    LANES: tl.constexpr = key.shape[1]
    tl.static_assert(LANES <= 8192, "13 bits number 8192 lanes")
    return (key & -LANES) | (tl.arange(0, LANES) ^ (LANES - 1))[None, :]


@triton.jit
def top_k_ranks(key, TOP_K: tl.constexpr, UNIQUE: tl.constexpr):
    """The place of each lane among its row's TOP_K greatest keys, -1 for the others; of equals the first comes first.

    UNIQUE: there are no equals, which saves every second reduction.
    """
    rank = tl.full(key.shape, -1, tl.int32)
    for j in range(TOP_K):
        chosen = key == tl.expand_dims(tl.max(key, axis=1), 1) if UNIQUE else is_first_best(key, 1)
        rank = tl.where(chosen, j, rank)
        key = tl.where(chosen, LOWEST, key)
    return rank
