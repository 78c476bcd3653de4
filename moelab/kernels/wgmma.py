"""Hopper's warpgroup product, as CUDA C++: a function for each number of columns that a kernel asks for."""

from __future__ import annotations

from collections.abc import Iterable

CODES = "e4m3"
"""Storage and kind of products of fp8 codes."""


def functions(columns: Iterable[int], storage: str, kind: str) -> str:
    """`wgmma<storage, n>` for each n: sums (64, n) += a (64, K) x b (n, K)^T, both in shared memory, K innermost: 32 bytes of it.
    Of CODES also `wgmma_first<storage, n>`, which takes what sums were for zeros.

    columns: multiples of 8 up to 256. storage: the C++ type of an element; kind: PTX's name for it, "bf16", "f16" or "e4m3".
    Operands and shapes: PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions". To be put
    after sm90.cuh.
    """
    head = "template <typename T, int N> DEVICE void wgmma(float (&sums)[N / 2], uint64_t a, uint64_t b);"
    if kind != CODES:
        return "\n".join(["namespace sm90 {", head, *(_function(n, storage, kind) for n in columns), "}"])
    first = head.replace(" wgmma(", " wgmma_first(")
    both = [_of_codes(n, adds) for n in columns for adds in (False, True)]
    return "\n".join(["namespace sm90 {", head, first, *both, "}"])


def _function(n: int, storage: str, kind: str) -> str:
    half = n // 2
    sums = ", ".join(f"%{i}" for i in range(half))
    operands = ", ".join(f'"+f"(sums[{i}])' for i in range(half))
    return (
        f"template <> DEVICE void wgmma<{storage}, {n}>(float (&sums)[{half}], uint64_t a, uint64_t b) {{\n"
        f'asm volatile("wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{sums}}}, %{half}, %{half + 1}, '
        f'1, 1, 1, 0, 0;" : {operands} : "l"(a), "l"(b)); }}'
    )


def _of_codes(n: int, adds: bool) -> str:
    half, name, kept = n // 2, "wgmma" if adds else "wgmma_first", "+f" if adds else "=f"
    sums = ", ".join(f"%{i}" for i in range(half))
    operands = ", ".join(f'"{kept}"(sums[{i}])' for i in range(half))
    return (
        f"template <> DEVICE void {name}<{CODES}, {n}>(float (&sums)[{half}], uint64_t a, uint64_t b) {{\n"
        f'asm volatile("wgmma.mma_async.sync.aligned.m64n{n}k32.f32.e4m3.e4m3 {{{sums}}}, %{half}, %{half + 1}, '
        f'{int(adds)}, 1, 1;" : {operands} : "l"(a), "l"(b)); }}'
    )
