"""Compiles sum_reduce.cu (see `moelab.kernels.nvrtc`) for a size, and launches it on torch's current stream."""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelab import runtime
from moelab.dtypes import LAYER_DTYPES, torch_dtype
from moelab.kernels import nvrtc

SOURCE = Path(__file__).with_name("sum_reduce.cu")
STORAGE = {
    torch_dtype(name): (dtype.cuda, "double" if name == "float64" else "float") for name, dtype in LAYER_DTYPES.items()
}
"""What a dtype is stored in, and summed in."""
# Slots held in registers at once: 16 loads of 16 bytes are 64 registers; beyond that the loop runs by four.
_MAX_UNROLLED_TOP_K = 16


@dataclass(frozen=True)
class Plan:
    """How a size is cut: values a thread loads at once, threads a CTA, slots unrolled (0: none)."""

    vec: int
    threads: int
    top_k: int

    def expression(self, dtype: torch.dtype) -> str:
        """The template instance to compile, as NVRTC names it."""
        storage, wide = STORAGE[dtype]
        return f"sum_reduce<{storage}, {wide}, {self.vec}, {self.top_k}>"


def plan(num_tokens: int, top_k: int, hidden: int, dtype: torch.dtype, *, aligned: bool = True) -> Plan:
    """The plan for a size: 16-byte loads where every row starts on 16 bytes, else the widest that divides hidden.

    aligned: whether x and out start on 16 bytes.
    """
    vec = 16 // dtype.itemsize if aligned else 1
    while hidden % vec:
        vec //= 2
    columns = -(-hidden // vec)
    # From a sweep on an H200 over the sizes of the suite `sum_reduce`: many small CTAs while tokens are few, one
    # CTA a row once there are enough.
    most = 64 if num_tokens < 256 else 1024
    threads = min(most, -(-columns // 32) * 32)
    return Plan(vec, threads, top_k if top_k <= _MAX_UNROLLED_TOP_K else 0)


@functools.cache
def compile_kernel(arch: str, expression: str) -> tuple[Any, str]:
    """Compile one template instance for `arch` ("sm_80", "sm_90", "sm_100"): (object code, mangled name's key)."""
    return nvrtc.compiled(arch, SOURCE.read_text(), expression), expression


@functools.cache
def _kernel(device_index: int, expression: str) -> tuple[Any, Any]:
    core = nvrtc.cuda_core()
    device = core.Device(device_index)
    device.set_current()
    code, name = compile_kernel(f"sm_{device.arch}", expression)
    return device, code.get_kernel(name)


def launch(x: Tensor, out: Tensor, routed_scaling_factor: float) -> None:
    """out[t, h] = routed_scaling_factor * sum over slots of x[t, slot, h], on checked, contiguous CUDA tensors."""
    runtime.require_cuda("sum_reduce's 'cuda' implementation", "use 'triton' or 'torch'")
    num_tokens, top_k, hidden = x.shape
    core = nvrtc.cuda_core()
    aligned = x.data_ptr() % 16 == 0 and out.data_ptr() % 16 == 0
    cut = plan(num_tokens, top_k, hidden, x.dtype, aligned=aligned)
    device, kernel = _kernel(x.device.index or 0, cut.expression(x.dtype))
    stream = device.create_stream(nvrtc.TorchStream(torch.cuda.current_stream(x.device)))
    grid = (num_tokens, -(-hidden // (cut.vec * cut.threads)), 1)
    config = core.LaunchConfig(grid=grid, block=(cut.threads, 1, 1))
    scalar = ctypes.c_double if x.dtype == torch.float64 else ctypes.c_float
    sizes = ctypes.c_int(top_k), ctypes.c_longlong(hidden)
    core.launch(stream, config, kernel, x.data_ptr(), out.data_ptr(), *sizes, scalar(routed_scaling_factor))
