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
from moelab.chips import TARGETS, Target
from moelab.config import KernelConfig
from moelab.errors import ConfigError, DeviceError, DtypeError, LayoutError, ShapeError
from moelab.routing import Alignment

FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


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
        wanted = " or ".join(str(dtype).removeprefix("torch.") for dtype in expected)
        found = str(tensor.dtype).removeprefix("torch.")
        raise DtypeError(f"{name} is {found}. Expected {wanted}. Cast it with .to(...), or cast the others to match.")


def check_together(**tensors: Tensor | None) -> None:
    """Raise DeviceError or LayoutError unless all tensors lie on one device and are contiguous (None is skipped)."""
    given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
    first_name, first = next(iter(given.items()))
    for name, tensor in given.items():
        if tensor.device != first.device:
            raise DeviceError(
                f"{name} is on {tensor.device} and {first_name} on {first.device}. Expected one device. Move them together."
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


@functools.lru_cache(maxsize=4096)
def checked_config(config: KernelConfig, dtype: torch.dtype, K: int | None = None) -> KernelConfig:
    """The config itself, once it has passed the rules for this dtype, device and inner size (ConfigError otherwise)."""
    config_room.check(config, dtype=str(dtype).removeprefix("torch."), target=current_target(), K=K)
    return config


@functools.cache
def current_target() -> Target | None:
    """The current GPU as config.py knows it, or with the limits its driver reports; None without a GPU."""
    if runtime.current().mode != "gpu":
        return None
    properties = torch.cuda.get_device_properties()
    nvidia = f"sm_{properties.major}{properties.minor}"
    name = properties.gcnArchName.split(":")[0] if torch.version.hip else nvidia
    limit = properties.shared_memory_per_block_optin  # type: ignore[attr-defined]
    return TARGETS.get(name) or Target(name, limit, threads_per_warp=properties.warp_size)


def launch_options(config: KernelConfig) -> dict[str, int]:
    """num_warps, num_stages and, where set, AMD's options, as a Triton launch takes them."""
    options = {"num_warps": config.num_warps, "num_stages": config.num_stages}
    if torch.version.hip:
        amd = {name: getattr(config, name) for name in ("waves_per_eu", "matrix_instr_nonkdim", "kpack")}
        options |= {name: value for name, value in amd.items() if value is not None}
    return options


def check_gemm(
    a: Tensor,
    w: Tensor,
    alignment: Alignment,
    config: KernelConfig,
    num_pairs: int,
    top_k: int,
    bias: Tensor | None,
    topk_weights: Tensor | None,
    a_rows: int | None = None,
) -> tuple[int, int]:
    """(N, K) of a grouped product whose operands, alignment and config fit together; raises what its launcher names.

    a_rows: rows of a where they are not one per top_k pairs.
    """
    check_kernel_device("a", a)
    check_dtype("a", a, FLOATS)
    check_shape("w", w, ("E", "N", "K"))
    experts, N, K = w.shape
    if top_k < 1 or num_pairs % top_k:
        raise ShapeError(
            f"{num_pairs} pairs are no multiple of top_k = {top_k}. Expected num_tokens * top_k. Pass top_k=1 for GEMM2."
        )
    check_shape("a", a, (num_pairs // top_k if a_rows is None else a_rows, K))
    check_dtype("w", w, (a.dtype,))
    parts = {name: getattr(alignment, name) for name in ("sorted_token_ids", "expert_ids", "num_tokens_post_padded")}
    for name, part in parts.items():
        check_dtype(name, part, (torch.int32,))
    check_together(a=a, w=w, bias=bias, topk_weights=topk_weights, **parts)
    if bias is not None:
        check_shape("bias", bias, (experts, N))
        check_dtype("bias", bias, (a.dtype,))
    if topk_weights is not None:
        check_dtype("topk_weights", topk_weights, (torch.float32,))
        if topk_weights.numel() != num_pairs:
            raise ShapeError(
                f"topk_weights holds {topk_weights.numel()} values for {num_pairs} pairs. Expected one per pair. "
                "Pass the (num_tokens, top_k) weights of this batch."
            )
    checked_config(config, a.dtype, K)
    if (alignment.num_pairs, alignment.num_experts) != (num_pairs, experts):
        raise ShapeError(
            f"The alignment is of {alignment.num_pairs} pairs to {alignment.num_experts} experts, the call of {num_pairs} "
            f"pairs to {experts}. Expected the same. Align this batch's topk_ids to w's experts."
        )
    if alignment.block_size != config.BLOCK_SIZE_M:
        raise ConfigError(
            f"Rows are aligned to {alignment.block_size} but the config's BLOCK_SIZE_M is {config.BLOCK_SIZE_M}. "
            "Expected the same: one sort serves both GEMMs. Align again, or give both GEMMs one BLOCK_SIZE_M."
        )
    return N, K


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


def gemm_constants(config: KernelConfig, K: int, **constants: Any) -> tuple[dict[str, Any], dict[str, int]]:
    """Constants and launch options of a grouped product's kernel, as a Launcher takes them."""
    names = ("BLOCK_SIZE_M", "BLOCK_SIZE_N", "BLOCK_SIZE_K", "GROUP_SIZE_M")
    tile = {name: getattr(config, name) for name in names}
    return {**tile, "EVEN_K": K % config.BLOCK_SIZE_K == 0, **constants}, launch_options(config)


def tiles_of(config: KernelConfig, num_rows: int, N: int) -> int:
    """Tiles of a product of num_rows by N."""
    return -(-num_rows // config.BLOCK_SIZE_M) * -(-N // config.BLOCK_SIZE_N)


def rows_in_use(alignment: Alignment, num_pairs: int) -> int:
    """Rows a grid must cover: with fewer pairs than a block has rows, at most one block per pair is in use."""
    return min(alignment.sorted_token_ids.shape[0], num_pairs * alignment.block_size)


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """float32, float64 for float64: what the kernels sum in."""
    return torch.promote_types(dtype, torch.float32)
