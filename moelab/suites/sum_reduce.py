"""moe_sum_reduce: how far each implementation is from float64, and how long it takes."""

from __future__ import annotations

from typing import Any

import torch

from moelab import precision, roofline, runtime
from moelab.inputs import random_tensor
from moelab.kernels.sum_reduce import SUM_REDUCE, available_sum_reduce, sum_reduce
from moelab.measure import Protocol, measure
from moelab.recordings import Recording

UPSTREAM_CASE: dict[str, Any] = {"num_tokens": 1024, "top_k": 9, "hidden": 4096, "scale": 0.3}
DTYPES = ("float64", "float32", "bfloat16", "float16")
# The sizes of sglang's Triton kernel as measured on an H200 (data/upstream/h200_sum_reduce.json).
SPEED_CASES = [
    (num_tokens, top_k, hidden)
    for num_tokens in (1, 16, 64, 256, 1024, 4096, 8192, 16384)
    for top_k, hidden in ((8, 2048), (9, 4096), (8, 7168))
]


def precision_rows(
    dtypes: tuple[str, ...] = DTYPES,
    *,
    num_tokens: int = 1024,
    top_k: int = 9,
    hidden: int = 4096,
    scale: float = 0.3,
    seed: int = 0,
    device: str | None = None,
) -> list[dict[str, Any]]:
    """One row per dtype and implementation that runs here: error against float64 and ULP, and upstream's verdict.

    x ~ N(0, 1), drawn in float32 and rounded to the dtype (float64: drawn in float64). The reference has
    twice float64's digits, so that float64 results, torch's among them, have an error of their own.
    """
    device = device or runtime.current().device
    rows = []
    for name in dtypes:
        dtype = runtime.torch_dtype(name)
        x = random_tensor((num_tokens, top_k, hidden), 1.0, dtype=dtype, device=device, seed=seed)
        outs = {impl: sum_reduce(x, scale, impl=impl) for impl in available_sum_reduce(dtype)}
        size = {"num_tokens": num_tokens, "top_k": top_k, "hidden": hidden, "scale": scale}
        for row in precision.compare(outs, precision.sum_reduce_double_double(x, scale)):
            rows.append({"dtype": name, "impl": row.pop("name"), **size, **row})
    return rows


def record_precision() -> Recording:
    """The table of sglang #10654 (1024 x 9 x 4096, scale 0.3), in four dtypes, on this device."""
    protocol = {"kind": "error", "reference": "double-double sum, rounded once to float64"}
    return Recording(
        "sum_reduce_precision", runtime.provenance(seed=0), protocol, tuple(precision_rows(**UPSTREAM_CASE))
    )


def record_speed(
    cases: list[tuple[int, int, int]] = SPEED_CASES, dtypes: tuple[str, ...] = ("bfloat16", "float64")
) -> Recording:
    """Every implementation on every size, checked against float64 first, then timed interleaved."""
    runtime.require_cuda("the suite 'sum_reduce'")
    rows: list[dict[str, Any]] = []
    for name in dtypes:
        for num_tokens, top_k, hidden in cases:
            rows += _speed_rows(runtime.torch_dtype(name), num_tokens, top_k, hidden)
    return Recording("sum_reduce", runtime.provenance(seed=0), speed_protocol(1).describe(), tuple(rows))


def speed_protocol(rotations: int) -> Protocol:
    """The suite's protocol for a number of rotated inputs."""
    return Protocol(rotations=rotations, rounds=25, graph_us=600.0)


def _speed_rows(dtype: torch.dtype, num_tokens: int, top_k: int, hidden: int) -> list[dict[str, Any]]:
    name = str(dtype).removeprefix("torch.")
    cost = roofline.sum_reduce_cost(num_tokens, top_k, hidden, name)
    # Three times the L2 between two uses of an input; below 64 inputs of that size the whole set fits the L2,
    # as GEMM2's output does when the sum follows it at once.
    rotations = max(2, min(64, -(-180_000_000 // int(cost.bytes))))
    device, size = runtime.current().device, (num_tokens, top_k, hidden)
    xs = [random_tensor(size, 1.0, dtype=dtype, device=device, seed=i) for i in range(rotations)]
    outs = [x.new_empty((num_tokens, hidden)) for x in xs]
    check_all(torch.cat(xs[: -(-256 // num_tokens)])[:256])
    impls = available_sum_reduce(dtype)
    contenders = {impl: _contender(impl, xs, outs) for impl in impls}
    base = {"dtype": name, "num_tokens": num_tokens, "top_k": top_k, "hidden": hidden}
    extra = {"bytes": cost.bytes, "rotations": rotations}
    return [
        {**base, "impl": impl, **extra, "samples_us": list(result.samples_us)}
        for impl, result in measure(contenders, speed_protocol(rotations)).items()
    ]


def _contender(impl: str, xs: list[torch.Tensor], outs: list[torch.Tensor]) -> Any:
    # The dict's function, not the checking front: what is timed is the launch.
    return lambda rotation: SUM_REDUCE[impl](xs[rotation], 0.3, outs[rotation])


def check_all(x: torch.Tensor, scale: float = 0.3) -> None:
    """Raise PrecisionError if an implementation that claims x's dtype is further off than twice torch's error.

    `triton_f32` in float64 is let off: it is kept to show that failure.
    """
    reference = precision.sum_reduce_double_double(x, scale)
    torch_out = sum_reduce(x, scale, impl="torch")
    for impl in available_sum_reduce(x.dtype):
        if impl == "triton_f32" and x.dtype == torch.float64:
            continue
        precision.check(sum_reduce(x, scale, impl=impl), torch_out, reference, name=f"sum_reduce {impl}")
