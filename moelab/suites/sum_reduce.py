"""moe_sum_reduce: how far each implementation is from float64, and how long it takes."""

from __future__ import annotations

from typing import Any

import torch

from moelab import precision, roofline, runtime
from moelab.dtypes import dtype_name, torch_dtype
from moelab.inputs import random_tensor
from moelab.kernels.sum_reduce import SUM_REDUCE, available_sum_reduce, sum_reduce
from moelab.measure import Contender, Protocol, measure, rotations_for
from moelab.recordings import Recording
from moelab.suites.layer_classic import sample_rows
from moelab.suites.partial import OnRows, ignore

UPSTREAM_CASE: dict[str, Any] = {"num_tokens": 1024, "top_k": 9, "hidden": 4096, "scale": 0.3}
SCALE = 0.3
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
        dtype = torch_dtype(name)
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
    cases: list[tuple[int, int, int]] = SPEED_CASES,
    dtypes: tuple[str, ...] = ("bfloat16", "float64"),
    on_rows: OnRows = ignore,
) -> Recording:
    """Every implementation on every size, checked against float64 first, then timed interleaved."""
    runtime.require_cuda("the suite 'sum_reduce'")
    rows: list[dict[str, Any]] = []
    for name in dtypes:
        for num_tokens, top_k, hidden in cases:
            rows += _speed_rows(torch_dtype(name), num_tokens, top_k, hidden)
            on_rows(rows)
    protocol = speed_protocol(1).describe() | {"rotations": "in each row"}
    return Recording("sum_reduce", runtime.provenance(seed=0), protocol, tuple(rows))


def speed_protocol(rotations: int) -> Protocol:
    """The suite's protocol for a number of rotated inputs."""
    return Protocol(rotations=rotations, rounds=25, graph_us=600.0)


def _speed_rows(dtype: torch.dtype, num_tokens: int, top_k: int, hidden: int) -> list[dict[str, Any]]:
    name = dtype_name(dtype)
    cost = roofline.sum_reduce_cost(num_tokens, top_k, hidden, name)
    # Where 64 inputs do not pass three times the L2, the whole set stays in it, as GEMM2's output does in a layer.
    rotations = rotations_for(cost.bytes)
    device, size = runtime.current().device, (num_tokens, top_k, hidden)
    xs = [random_tensor(size, 1.0, dtype=dtype, device=device, seed=i) for i in range(rotations)]
    outs = [x.new_empty((num_tokens, hidden)) for x in xs]
    contenders = {impl: _contender(impl, xs, outs) for impl in available_sum_reduce(dtype)}
    rows = sample_rows(xs[0].shape[0]).to(xs[0].device)
    x = xs[0][rows]
    plain, exact = sum_reduce(x, SCALE, impl="torch"), precision.sum_reduce_double_double(x, SCALE)
    usual = _own_error(torch.cat(xs[: -(-256 // xs[0].shape[0])])[:256])
    luck = max(0.0, usual - precision.error(plain, exact).max_abs)
    tiny = 2 * luck + float(precision.ulp(exact.abs().max(), x.dtype))
    for impl, run in contenders.items():
        outs[0].fill_(float("nan"))
        run(0)
        if impl != "triton_f32" or x.dtype != torch.float64:
            precision.check(outs[0][rows], plain, exact, tiny=tiny, name=f"sum_reduce {impl} {tuple(xs[0].shape)}")
    base = {"dtype": name, "num_tokens": num_tokens, "top_k": top_k, "hidden": hidden}
    extra = {"bytes": cost.bytes, "rotations": rotations}
    return [
        {**base, "impl": impl, **extra, "samples_us": list(result.samples_us)}
        for impl, result in measure(contenders, speed_protocol(rotations)).items()
    ]


def _contender(impl: str, xs: list[torch.Tensor], outs: list[torch.Tensor]) -> Contender:
    # The dict's function, not the checking front: what is timed is the launch.
    return lambda rotation: SUM_REDUCE[impl](xs[rotation], SCALE, outs[rotation])


def _own_error(x: torch.Tensor) -> float:
    """The largest error of torch's own sum and product."""
    return precision.error(sum_reduce(x, SCALE, impl="torch"), precision.sum_reduce_double_double(x, SCALE)).max_abs
