"""Hopper's warpgroup product, as CUDA C++: a function for each number of columns that a kernel asks for."""

from __future__ import annotations

from collections.abc import Iterable


def functions(columns: Iterable[int], storage: str, kind: str) -> str:
    """`wgmma<storage, n>` for each n: sums (64, n) += a (64, 16) x b (n, 16)^T, both in shared memory, K innermost.

    columns: multiples of 8 up to 256. storage: the C++ type of an element; kind: PTX's name for it, "bf16" or "f16".
    Operands and shapes: PTX ISA 9.0, "Asynchronous Warpgroup Level Matrix Multiply-Accumulate Instructions". To be put
    after sm90.cuh.
    """
    head = "template <typename T, int N> DEVICE void wgmma(float (&sums)[N / 2], uint64_t a, uint64_t b);"
    return "\n".join(["namespace sm90 {", head, *(_function(n, storage, kind) for n in columns), "}"])


def _function(n: int, storage: str, kind: str) -> str:
    half = n // 2
    sums = ", ".join(f"%{i}" for i in range(half))
    operands = ", ".join(f'"+f"(sums[{i}])' for i in range(half))
    return (
        f"template <> DEVICE void wgmma<{storage}, {n}>(float (&sums)[{half}], uint64_t a, uint64_t b) {{\n"
        f'asm volatile("wgmma.mma_async.sync.aligned.m64n{n}k16.f32.{kind}.{kind} {{{sums}}}, %{half}, %{half + 1}, '
        f'1, 1, 1, 0, 0;" : {operands} : "l"(a), "l"(b)); }}'
    )
