"""Codes of four bits widened two at a time: the program's text run in Python for every code, and on a GPU by its chip."""

from __future__ import annotations

import re

import pytest
import torch
from sampling import sampled

from moelab import runtime
from moelab.formats import get_format
from moelab.inputs import random_tensor
from moelab.kernels import nibbles, packed_gemm
from moelab.quantised_weights import dequantise, quantise

PROGRAMS = {
    "int4 bf16": (nibbles.INT4_BF16, torch.bfloat16), "int4 f16": (nibbles.INT4_F16, torch.float16),
    "fp4 bf16": (nibbles.FP4_BF16, torch.bfloat16),
}  # fmt: skip
E2M1 = torch.tensor([0, 0.5, 1, 1.5, 2, 3, 4, 6, -0.0, -0.5, -1, -1.5, -2, -3, -4, -6], dtype=torch.float64)


def halves(register: int, dtype: torch.dtype) -> torch.Tensor:
    signed = [half - (half >> 15 << 16) for half in (register & 0xFFFF, register >> 16)]
    return torch.tensor(signed, dtype=torch.int16).view(dtype)


def register(pair: torch.Tensor) -> int:
    low, high = (int(half) & 0xFFFF for half in pair.view(torch.int16))
    return low | high << 16


def fma(dtype: torch.dtype, a: int, b: int, c: int) -> int:
    """Exact in float64 for what is tried here, then rounded once."""
    wide = [halves(each, dtype).double() for each in (a, b, c)]
    return register((wide[0] * wide[1] + wide[2]).to(dtype))


def done(op: str, v: list[int], dtype: torch.dtype) -> int:
    """What an instruction makes of its operands."""
    if op == "prmt.b32":
        eight = v[0] | v[1] << 32
        return sum((eight >> 8 * (v[2] >> 4 * i & 7) & 0xFF) << 8 * i for i in range(4))
    if op == "lop3.b32":
        assert v[3] == 0xEA
        return v[0] & v[1] | v[2]
    if op.startswith("fma.rn."):
        return fma(dtype, *v)
    return {"mov.b32": v[0], "shr.u32": v[0] >> v[-1] % 32, "shl.b32": v[0] << v[-1] % 32, "and.b32": v[0] & v[-1]}[op]


def run(program: str, dtype: torch.dtype, *given: int) -> list[int]:
    """What is in $0 to $3 after it. given: $4 and on."""
    held = {f"${4 + i}": value for i, value in enumerate(given)}
    for line in program.strip("{} ").split(";")[1:]:
        if not line.strip():
            continue
        op, rest = line.split(None, 1)
        to, *names = (word.strip() for word in rest.split(","))
        v = [held[name] if name in held else int(name, 0) for name in names]
        held[to] = done(op, v, dtype) & 0xFFFFFFFF
    return [held[f"${i}"] for i in range(4)]


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("scale", [1.0, 0.0123, -3.7, 2.0**-12])
def test_every_code_becomes_what_float32_rounds_to(name: str, scale: float) -> None:
    program, dtype = PROGRAMS[name]
    fp4 = name.startswith("fp4")
    by = torch.tensor([2.0 ** round(torch.tensor(abs(scale)).log2().item()) if fp4 else scale] * 2).to(dtype)
    more = 128 if dtype == torch.bfloat16 else 1024
    for zero in (0,) if fp4 else (0, 8, 15):
        minus = register(torch.tensor([-0.0 if fp4 else -(more + zero)] * 2).to(dtype))
        for first in range(0, 256, 4):
            codes = [first, first + 1, first + 2, (first * 7 + 3) % 256]
            four = sum(code << 8 * i for i, code in enumerate(codes))
            found = run(str(program.value), dtype, four, minus, minus, register(by), register(by))
            values = torch.cat([halves(each, dtype) for each in found])
            nibs = torch.tensor([code & 15 for code in codes] + [code >> 4 for code in codes])
            exact = E2M1[nibs] if fp4 else (nibs - zero).double()
            expected = (exact * by[0].double()).float().to(dtype)
            assert torch.equal(values, expected) and torch.equal(values.signbit(), expected.signbit())


def test_who_widens_pairs() -> None:
    """Nobody under the interpreter, which knows no PTX."""
    assert re.search("fma.rn.bf16x2", str(nibbles.INT4_BF16.value)) and not re.search(
        "bf16", str(nibbles.INT4_F16.value)
    )
    if runtime.current().mode != "gpu":
        from moelab.kernels.checks import launch_target

        assert launch_target() is None


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("name", "dtype"),
    sampled(("int4_w4a16_group_128", "int4_w4a16_group_32_zp", "mxfp4_w4a16"), [torch.bfloat16, torch.float16]),
)
def test_the_gpu_gives_the_bits_of_the_plain_way(
    name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    from moelab.config import KernelConfig
    from moelab.kernels.align import align
    from moelab.kernels.gemm_call import GemmCall

    experts, rows, columns, tokens = 4, 192, 512, 40
    weights = quantise(
        random_tensor((experts, rows, columns), 0.05, dtype=dtype, device="cuda", seed=1), get_format(name)
    )
    x = random_tensor((tokens, columns), 1.0, dtype=dtype, device="cuda", seed=3)
    ids = (torch.arange(tokens, device="cuda", dtype=torch.int32) % experts).view(-1, 1)
    for config in (KernelConfig(16, 64, 128, 1), KernelConfig(64, 128, 64, 8)):
        call = GemmCall(x, weights, align(ids, config.BLOCK_SIZE_M, experts), config, tokens, 1)
        both = []
        for pairs in (True, False):
            monkeypatch.setattr(packed_gemm, "widens_pairs", lambda _, pairs=pairs: pairs and dtype == torch.bfloat16)
            both.append(packed_gemm.packed_gemm(call, x.new_empty((tokens, rows))))
        assert torch.equal(*both)
        exact = torch.einsum("tk,tnk->tn", x.double(), dequantise(weights, torch.float64)[ids.flatten().long()])
        assert (both[0].double() - exact).norm() <= 0.01 * exact.norm()
