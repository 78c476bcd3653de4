"""What every launcher asks of its tensors, and of the configuration it is handed, before anything is launched."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from moelab import config as config_room
from moelab import runtime
from moelab.chips import TARGETS, Target, gpu_target
from moelab.config import KernelConfig
from moelab.dtypes import LAYER_DTYPES, dtype_name, torch_dtype
from moelab.errors import ConfigError, DeviceError, DtypeError, FormatError, LayoutError, ShapeError
from moelab.formats import PLAIN, Format
from moelab.weights import ExpertWeights, GemmWeights

FLOATS = tuple(torch_dtype(name) for name in LAYER_DTYPES)


def check_shape(name: str, tensor: Tensor, expected: tuple[int | str, ...]) -> None:
    """Raise ShapeError unless the tensor's sizes match; a string stands for any size and names it."""
    found = tuple(tensor.shape)
    fits = len(found) == len(expected) and all(
        isinstance(want, str) or want == size for want, size in zip(expected, found, strict=True)
    )
    if not fits:
        wanted = ", ".join(str(size) for size in expected)
        raise ShapeError(
            f"{name} has shape {found}. Expected ({wanted}). Reshape it, or check that weights and inputs belong together."
        )


def check_dtype(name: str, tensor: Tensor, expected: Iterable[torch.dtype]) -> None:
    """Raise DtypeError unless the tensor's dtype is one of `expected`."""
    expected = tuple(expected)
    if tensor.dtype not in expected:
        wanted = " or ".join(dtype_name(dtype) for dtype in expected)
        found = dtype_name(tensor.dtype)
        raise DtypeError(f"{name} is {found}. Expected {wanted}. Cast it with .to(...), or cast the others to match.")


def check_routed(topk_weights: Tensor, dtype: torch.dtype) -> None:
    """Raise DtypeError unless routed weights are float32, or of the layer's dtype, as transformers hands them on."""
    check_dtype("topk_weights", topk_weights, dict.fromkeys((torch.float32, dtype)))


def check_given(name: str, tensor: Tensor | None, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Raise FormatError without the tensor, ShapeError or DtypeError unless it has this shape and dtype."""
    if tensor is None:
        raise FormatError(f"There is no {name}. Expected {shape} of {dtype_name(dtype)}. Pass it with the codes.")
    check_shape(name, tensor, shape)
    check_dtype(name, tensor, (dtype,))


def check_stored(name: str, weights: GemmWeights, experts: int, N: int, K: int) -> None:
    """Raise FormatError, ShapeError or DtypeError unless codes, scales and zero points are those of (E, N, K) weights in their
    format, as `moelab.quantised_weights.quantise` makes them."""
    w, _, scale, zero_point, format, _ = weights
    codes, scales, zeros = format.stored_shapes(experts, N, K)
    check_dtype(name, w, (getattr(torch, str(format.weight_dtype)),))
    check_shape(name, w, codes)
    if format.granularity == "group" and K % format.sizes[0]:
        raise ShapeError(f"{name} has K = {K}. Expected whole groups of {format.sizes[0]}. Shard the layer otherwise.")
    wide = (
        (torch.bfloat16, torch.float16) if format.scale_dtype == "bfloat16" else (getattr(torch, format.scale_dtype),)
    )
    check_given(f"{name}'s scale", scale, scales, scale.dtype if scale is not None and scale.dtype in wide else wide[0])
    if format.zero_points:
        check_given(f"{name}'s zero_point", zero_point, zeros, torch.uint8)
    elif zero_point is not None:
        raise FormatError(f"{name} came with zero points, and {format.name} has none. Expected none. Leave them out.")


def check_static_scales(weights: ExpertWeights) -> None:
    """Raise FormatError, ShapeError or DtypeError unless a checkpoint's scales of the activations are there just where the format
    has them: one more would be passed over, and for one that lacks the batch's own would be taken."""
    for name, scale in (("a1_scale", weights.a1_scale), ("a2_scale", weights.a2_scale)):
        weights.format.require_static_scale(scale is not None)
        if scale is not None:
            check_given(name, scale, (), torch.float32)


def check_together(**tensors: Tensor | None) -> None:
    """Raise DeviceError or LayoutError unless all tensors lie on one device, plain and contiguous (None is skipped)."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.device != first.device:
            raise DeviceError(
                f"{name} is on {tensor.device} and {first_name} on {first.device}. Expected one device. Move them together."
            )
        if not torch.compiler.is_compiling() and tensor.is_neg():  # no graph holds the question; the op asks again
            raise LayoutError(
                f"{name} carries torch's negative bit: it is a view whose memory holds the values with the other sign. "
                "Expected a plain tensor. Call .resolve_neg() once, outside the hot path."
            )
        if not tensor.is_contiguous():
            raise LayoutError(
                f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}. Expected a contiguous tensor. "
                "Call .contiguous() once, outside the hot path."
            )


COMPILED_ONLY: ContextVar[list[Any] | None] = ContextVar("compiled_only", default=None)
"""Inside `launch.compiling`, where a launch's compiled kernel is put; None elsewhere."""


def check_kernel_device(name: str, tensor: Tensor) -> None:
    """Raise RuntimeModeError or DeviceError unless Triton kernels take this tensor in this process."""
    if tensor.is_meta and COMPILED_ONLY.get() is not None:
        return
    mode = runtime.require_kernels(tensor.dtype)
    if tensor.device.type != mode.device:
        raise DeviceError(
            f"{name} is on {tensor.device}, but kernels run on {mode.device} here ({mode.reason}). "
            f"Expected a {mode.device} tensor. Move it there."
        )
    if tensor.is_cuda and tensor.get_device() != torch.cuda.current_device():
        raise DeviceError(
            f"{name} is on {tensor.device}, but the current device is cuda:{torch.cuda.current_device()}. Expected the "
            "current one: Triton launches there. Wrap the call in `with torch.cuda.device(tensor.device)`."
        )


def checked_config(
    config: KernelConfig, dtype: torch.dtype, K: int | None = None, format: Format = PLAIN
) -> KernelConfig:
    """The config itself, once it has passed the rules for this dtype, device and inner size (ConfigError otherwise).

    dtype: of the activations. format: of the weights, which decides what is multiplied and how it is stored.
    """
    return _checked_config(config, dtype, K, format, current_target())


@functools.lru_cache(maxsize=4096)
def _checked_config(
    config: KernelConfig, dtype: torch.dtype, K: int | None, format: Format, target: Target | None
) -> KernelConfig:
    multiplied = format.product_dtype(dtype_name(dtype))
    config_room.check(config, dtype=multiplied, target=target, K=K, weight_bits=format.widened_bits)
    return config


def current_target() -> Target | None:
    """The current device's chip, or with the limits its driver reports; None without a GPU."""
    return gpu_target(torch.cuda.current_device()) if runtime.current().mode == "gpu" else None


def launch_target() -> Target | None:
    """The chip that a launch is for: the current device's, and inside `launch.compiling` the one that is compiled for."""
    if COMPILED_ONLY.get() is None:
        return current_target()
    from triton.runtime.driver import driver

    target = driver.active.get_current_target()
    return TARGETS.get(f"sm_{target.arch}" if target.backend == "cuda" else str(target.arch))


def launch_options(config: KernelConfig) -> dict[str, int]:
    """num_warps, num_stages and, where set, AMD's options, as a Triton launch takes them."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if torch.version.hip:
        amd = {name: getattr(config, name) for name in ("waves_per_eu", "matrix_instr_nonkdim", "kpack")}
        options |= {name: value for name, value in amd.items() if value is not None}
    return options


def check_one_split(kernel: str, config: KernelConfig) -> None:
    """Raise ConfigError where a config splits K and the kernel does not."""
    if config.SPLIT_K != 1:
        raise ConfigError(
            f"{kernel} got SPLIT_K = {config.SPLIT_K}. Expected 1: this kernel sums K in one program. "
            "Use a Split-K kernel, or dataclasses.replace(config, SPLIT_K=1)."
        )


def check_out(out: Tensor | None, a: Tensor, shape: tuple[int, ...], dtype: torch.dtype | None = None) -> None:
    """Raise unless a result tensor, where one is handed in, has this shape, this dtype (a's) and a's device."""
    if out is not None:
        check_shape("out", out, shape)
        check_dtype("out", out, (dtype or a.dtype,))
        check_together(a=a, out=out)
