"""What a model of kernel time can see of a config at a batch size: tiles, waves, shared memory, roofline."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from moelab import roofline
from moelab.chips import get_target
from moelab.config import KernelConfig, accumulators_per_thread, shared_memory_bytes
from moelab.dtypes import dtype_bytes
from moelab.errors import UnknownNameError
from moelab.tuner.problem import GEMMS, Gemm, Problem

Floats = NDArray[np.float64]

_KNOBS = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M", "num_warps", "num_stages", "SPLIT_K")
NAMES = (
    *_KNOBS, "waves_per_eu", "gemm", "num_tokens", "padded_rows", "programs", "k_steps", "shared_memory", "accumulators",
    "blocks_per_processor", "waves", "last_wave", "compute_us", "memory_us",
)  # fmt: skip
"""Columns of `features`: sizes and times as logarithms to base 2."""

_STAND_IN = "NVIDIA_H200"
_RESIDENT_WARPS = 64  # per SM: CUDA C++ Programming Guide, compute capability 8.0 and 9.0


@functools.cache
def _device(device: str, dtype: str) -> tuple[float, float, int]:
    """Bytes and FLOPs per second and SMs. A device that data/devices lacks borrows the H200's: a surrogate
    learns from measurements, and needs only features that rank tiles, not true ceilings."""
    for name in (device, _STAND_IN):
        for kind in ("measured", "datasheet"):
            try:
                found = roofline.load_ceilings(name, kind, dtype)  # type: ignore[arg-type]
                count = roofline.device_data(name).get("SMs")
            except UnknownNameError:
                continue
            if count:
                return found.copy_bytes_per_s, found.flops_per_s, int(count)
    return roofline.load_ceilings(_STAND_IN).copy_bytes_per_s, roofline.load_ceilings(_STAND_IN).flops_per_s, 132


def features(problem: Problem, gemm: Gemm, num_tokens: int, configs: Sequence[KernelConfig]) -> Floats:
    """(configs, len(NAMES)) for one GEMM at one batch size."""
    format = problem.shape.format
    multiplied = format.product_dtype(problem.shape.dtype)
    bandwidth, rate, processors = _device(problem.device, multiplied)
    target, element = get_target(problem.target), dtype_bytes(multiplied)
    stored = format.bits / 8 if format.widened_bits else element
    knobs = np.array([[getattr(c, name) for name in _KNOBS] for c in configs], dtype=float)
    bm, bn, bk, _, warps, _, split_k = knobs.T
    waves_per_eu = np.array([c.waves_per_eu or 0 for c in configs], dtype=float)
    of_program = [shared_memory_bytes(c, multiplied, target, weight_bits=format.widened_bits) for c in configs]
    shared = np.array(of_program, dtype=float)
    held = np.array([accumulators_per_thread(c, target) for c in configs])
    rows = {m: roofline.padding_waste(problem.shape, num_tokens, int(m)).padded_rows for m in np.unique(bm)}
    padded = np.array([max(1.0, rows[m]) for m in bm])
    inner, columns = problem.inner_size(gemm), problem.columns(gemm)
    programs = padded / bm * np.ceil(columns / bn) * split_k
    steps = np.ceil(inner / bk / split_k)
    fitting = np.minimum(target.shared_memory_per_block // shared, _RESIDENT_WARPS // warps)
    resident = np.clip(fitting, 1, 32) * processors
    waves = programs / resident
    compute_us = 2 * padded * np.ceil(columns / bn) * bn * inner / rate * 1e6
    memory_us = programs * (bm * element + bn * stored) * bk * steps / bandwidth * 1e6
    log = [
        knobs,
        np.full((len(configs), 1), num_tokens),
        *(x[:, None] for x in (padded, programs, steps, shared, held)),
    ]
    log += [x[:, None] for x in (resident / processors, np.ceil(waves), compute_us, memory_us)]
    knob, tokens, row, program, step, memory, acc, blocks, whole, compute, traffic = (np.log2(part) for part in log)
    plain = (np.full((len(configs), 1), GEMMS.index(gemm)), (waves / np.ceil(waves))[:, None], waves_per_eu[:, None])
    return np.hstack(
        [knob, plain[2], plain[0], tokens, row, program, step, memory, acc, blocks, whole, plain[1], compute, traffic]
    )


def floor_us(problem: Problem, gemm: Gemm, num_tokens: int) -> float:
    """The roofline floor of that GEMM, microseconds: what a surrogate's times are divided by."""
    bandwidth, rate, _ = _device(problem.device, problem.shape.format.product_dtype(problem.shape.dtype))
    cost = roofline.gemm_cost(problem.shape, num_tokens, 1 if gemm == "up" else 2)
    return roofline.floor_us(cost, roofline.Ceilings(bandwidth, rate, problem.device, "")).us
