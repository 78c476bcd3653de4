"""Slots sorted by expert in one launch for Hopper, padded, dense, or cut into tiles: the launcher of slot_order.cu.

`moelab.kernels.align` and `expert_order` launch it where it serves, and their Triton kernels elsewhere: the results are the
same bit by bit. Compiling needs no GPU; running it needs sm_90.
"""

from __future__ import annotations

import ctypes
import functools
import importlib.util
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from moelab.kernels import checks, nvrtc
from moelab.kernels.cuda_launch import launch, launch_config
from moelab.kernels.residency import require
from moelab.kernels.token_tiles import TokenTiles

SOURCE = Path(__file__).with_name("slot_order.cu")

SERVING, OVERLAP = True, True
"""For measurements (the suite slot_order): without SERVING, the Triton kernels do it all; without OVERLAP, a launch begins when
the one before it has ended, in place of programmatic dependent launch."""

KINDS = ("ALIGNED", "DENSE", "TILED")

WARPS = 32
"""Of a CTA: its threads are as many as a bucket each needs, and no fewer than hide the votes of one another."""

MOST_CTAS = 8
"""Of a cluster that every GPU of this kind takes (CUDA C++ Programming Guide, thread block clusters)."""

MOST_SIZES = 36
"""Sizes of tiles that are told apart: rows of the widest in whole grains, and none."""

SHARED_BYTES = {288: 32 << 10, 544: 58 << 10}
"""Buckets that there is room for, one an expert and one for all others' -> shared memory of a CTA."""

MOST_ROUNDS = 16
"""Slots of a thread, in registers."""


@dataclass(frozen=True)
class Cut:
    """How a batch is cut: CTAs of the cluster, slots a thread, and room for buckets."""

    ctas: int
    rounds: int
    buckets: int
    warps: int = WARPS

    @property
    def shared_bytes(self) -> int:
        return SHARED_BYTES[self.buckets]

    def expression(self, kind: str, ids: torch.dtype) -> str:
        """The template instance to compile, as NVRTC names it. ids: int32 or int64."""
        storage = "long long" if ids == torch.int64 else "int"
        sizes = self.warps, self.ctas, self.rounds, self.buckets, self.shared_bytes
        return f"slot_order<{storage}, {kind}, {', '.join(map(str, sizes))}>"


@functools.lru_cache(maxsize=4096)
def cut_for(num_slots: int, num_experts: int) -> Cut | None:
    """One CTA up to 2,048 slots, above it a cluster; None for more slots, or experts, than that holds."""
    buckets = next((room for room in SHARED_BYTES if num_experts < room), None)
    if buckets is None:
        return None
    threads = WARPS * 32
    if num_slots <= 2 * threads:
        return Cut(1, 1 if num_slots <= threads else 2, buckets)
    rounds = 1
    while rounds * MOST_CTAS * threads < num_slots:
        rounds *= 2
    return Cut(MOST_CTAS, rounds, buckets) if rounds <= MOST_ROUNDS else None


@functools.cache
def _available() -> bool:
    found = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.core") is not None
    target = checks.current_target()
    return found and target is not None and target.name == "sm_90"


def serves(ids: Tensor, num_experts: int, tile_rows: int = 1, grain: int = 1) -> bool:
    """Whether one launch sorts these ids, and cuts them into such tiles: on a Hopper GPU, with the extra `cuda`."""
    few_sizes = tile_rows // grain < MOST_SIZES
    return SERVING and ids.is_cuda and few_sizes and _available() and cut_for(ids.numel(), num_experts) is not None


class OrderArguments(ctypes.Structure):
    """`Order` of slot_order.cu, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "sorted", "first_rows", "block_experts", "rows_in_use")),
        *((name, ctypes.c_void_p) for name in ("tiles", "num_tiles", "ready")),
        *((name, ctypes.c_int) for name in ("num_slots", "num_experts", "block_size", "tile_rows", "grain")),
        *((name, ctypes.c_int) for name in ("in_pairs", "counters")),
    ]


def arguments(ids: Tensor, num_experts: int, sorted_slots: Tensor, **more: Tensor | int | bool) -> OrderArguments:
    """The kernel's arguments. more: the other fields, those that the kind has no use for left out."""
    given = {name: value.data_ptr() if isinstance(value, Tensor) else int(value) for name, value in more.items()}
    return OrderArguments(
        ids=ids.data_ptr(), sorted=sorted_slots.data_ptr(), num_slots=ids.numel(), num_experts=num_experts, **given
    )


def tile_arguments(
    ids: Tensor, num_experts: int, tiles: TokenTiles, first_rows: Tensor, tile_rows: int, grain: int, in_pairs: bool
) -> OrderArguments:
    """`arguments` for TILED: the order too goes to `tiles`, first_rows is (E + 1,) int32."""
    return arguments(
        ids, num_experts, tiles.sorted_slots, first_rows=first_rows, tiles=tiles.tiles, num_tiles=tiles.num_tiles,
        ready=tiles.ready, tile_rows=tile_rows, grain=grain, in_pairs=in_pairs, counters=tiles.ready.shape[0],
    )  # fmt: skip


def order_slots(kind: str, ids: Tensor, given: OrderArguments) -> None:
    """Sort ids, (num_tokens, top_k) int32 or int64, contiguous, at least one. For callers that have checked all of it, and
    `serves`. kind: of KINDS."""
    cut = cut_for(given.num_slots, given.num_experts)
    assert cut is not None
    _, function = _loaded(ids.get_device(), cut, kind, ids.dtype)
    stream = torch.cuda.current_stream(ids.device).cuda_stream
    config = launch_config(cut.ctas, cut.warps * 32, cut.shared_bytes, stream, OVERLAP, cut.ctas)
    launch(function, config, (ctypes.addressof(given),))


def source() -> str:
    """slot_order.cu as it is compiled."""
    return f"enum {{ {', '.join(KINDS)} }};\nconstexpr int MOST_SIZES = {MOST_SIZES};\n{SOURCE.read_text()}"


@functools.cache
def _loaded(device: int, cut: Cut, kind: str, ids: torch.dtype) -> tuple[Any, Any]:
    """(kernel, to be kept; function) on that GPU, allowed its shared memory."""
    from cuda.bindings import driver

    nvrtc.cuda_core().Device(device).set_current()
    expression = cut.expression(kind, ids)
    kernel = nvrtc.compiled("sm_90a", source(), expression).get_kernel(expression)
    name = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuKernelSetAttribute(name, cut.shared_bytes, kernel.handle, driver.CUdevice(device))
    require(error, f"{name.name} = {cut.shared_bytes}")
    return kernel, driver.CUfunction(int(kernel.handle))
