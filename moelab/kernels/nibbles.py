"""Codes of four bits widened two at a time, for kernels in Triton: two numbers of 16 bits in a register's halves.

A code put into the fraction of a power of two is that power more than itself; an e2m1 code has its fields moved. Then come a
multiply-add of two numbers at once, exact, and one by the scale, which rounds once, as (code - zero point) * scale in float32,
rounded to 16 bits, does: the bits are the same, for every code, zero point and scale (tests/test_nibbles.py). PTX ISA 9.0: prmt,
lop3, fma.rn.bf16x2 (since sm_80) and f16x2; neither Triton's interpreter nor AMD has them.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402


def _program(kind: str, by: str, widened: str) -> str:
    """Of four bytes $4, the low nibbles' weights ($0 and $1, two each) and the high ones' ($2, $3).

    widened: what makes of {of}, two nibbles at the low ends of its halves, two numbers in {to}, which are multiplied by `by`,
    twice the same. $5 and $6: minus what they are then too large by; $7, $8: scales.
    """
    lines = [
        "{ .reg .b32 p0, p1, q0, q1, m, by, zero;",
        f"mov.b32 by, {by};",
        "mov.b32 zero, 0x80008000;",
        "prmt.b32 p0, $4, 0, 0x4140;",
        "prmt.b32 p1, $4, 0, 0x4342;",
    ]
    lines += ["shr.u32 q0, p0, 4;", "shr.u32 q1, p1, 4;"]
    for to, of in enumerate(("p0", "p1", "q0", "q1")):
        lines.append(widened.format(to=f"${to}", of=of))
        lines.append(f"fma.rn.{kind} ${to}, ${to}, by, ${5 + to % 2};")
        lines.append(f"fma.rn.{kind} ${to}, ${to}, ${7 + to % 2}, zero;")  # and minus zero: a zero keeps its sign
    return " ".join([*lines, "}"])


_INTEGER = "lop3.b32 {{to}}, {{of}}, 0x000F000F, {base}, 0xEA;"
INT4_BF16 = tl.constexpr(_program("bf16x2", "0x3F803F80", _INTEGER.format(base="0x43004300")))
INT4_F16 = tl.constexpr(_program("f16x2", "0x3C003C00", _INTEGER.format(base="0x64006400")))
"""128 or 1024 and the code, times 1, less that and the zero point: exact in both."""

_E2M1 = (
    "shl.b32 m, {of}, 6; and.b32 m, m, 0x01C001C0; shl.b32 {to}, {of}, 12; lop3.b32 {to}, {to}, 0x80008000, m, 0xEA;"
)
FP4_BF16 = tl.constexpr(_program("bf16x2", "0x7E807E80", _E2M1))
"""e2m1 in bfloat16's places, times 2^126: its bias is 1, bfloat16's 127; denormals too. $5 and $6: minus zero."""

_REGISTERS = tl.constexpr("=r,=r,=r,=r,r,r,r,r,r")


@triton.jit
def weights_of_pairs(stored, scale, zero, dtype: tl.constexpr, FP4: tl.constexpr):
    """(BN, 2 BYTES) of dtype, bfloat16 or (not FP4) float16, of stored (BN, BYTES) uint8, the even column's code low.

    scale: of dtype, or FP4's e8m0 as uint8; zero: int32, of integers. Both for each byte, broadcast to `stored`.
    """
    if FP4:
        minus = tl.full(stored.shape, -0.0, dtype=tl.bfloat16)
        by = tl.broadcast_to((scale.to(tl.int16) << 7).to(tl.bfloat16, bitcast=True), stored.shape)
    else:
        more: tl.constexpr = 128.0 if dtype == tl.bfloat16 else 1024.0
        minus = (tl.zeros(stored.shape, dtype=tl.float32) - (more + zero)).to(dtype)
        by = tl.broadcast_to(scale, stored.shape)
    if FP4:
        low, high = tl.inline_asm_elementwise(
            FP4_BF16, _REGISTERS, [stored, minus, by], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    elif dtype == tl.bfloat16:
        low, high = tl.inline_asm_elementwise(
            INT4_BF16, _REGISTERS, [stored, minus, by], dtype=(tl.bfloat16, tl.bfloat16), is_pure=True, pack=4
        )
    else:
        low, high = tl.inline_asm_elementwise(
            INT4_F16, _REGISTERS, [stored, minus, by], dtype=(tl.float16, tl.float16), is_pure=True, pack=4
        )
    return tl.interleave(low, high)
