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

OVERLAP = True
"""For measurements (the suite slot_order): without it a launch begins when the one before it has ended, in place of programmatic
dependent launch."""

MOST_CTAS, MOST_WARPS = 8, 32
"""Of a cluster that every GPU of this kind takes (CUDA C++ Programming Guide, thread block clusters), and of a CTA."""

MOST_SIZES = 36
"""Sizes of tiles that are told apart: rows of the widest in whole grains, and none."""

ROOMS = (256, 288, 544)
"""Buckets that instances have room for: one an expert, and one for all others' slots."""

MOST_ROUNDS = 16
"""Slots of a thread, in registers."""

FEW_SLOTS, FEW_PRODUCT, FEW_EXPERTS = 2048, 1 << 17, 256
MANY_SLOTS, MANY_EXPERTS = 32768, 128
"""Where Triton's launches are faster: see `serves`. Few: slots, slots times experts, and of ALIGNED experts, at most."""

LEFT = 1024
"""More than experts whose last tile is in no pair."""


@dataclass(frozen=True)
class Kind:
    """What becomes of the slots. name: "ALIGNED", padded to blocks of `rows`, a power of two; "DENSE"; or "TILED", dense and cut
    into tiles of at most `rows`, multiples of `grain`, in_pairs or not, as `moelab.kernels.token_tiles` has them."""

    name: str
    rows: int = 1
    grain: int = 1
    in_pairs: bool = False

    @property
    def sizes(self) -> int:
        """Of tiles, none among them."""
        return self.rows // self.grain + 1

    @property
    def expression(self) -> str:
        """As slot_order.cu spells it."""
        return f"Kind<{self.name}, {self.rows}, {self.grain}, {str(self.in_pairs).lower()}>"


def aligned(block_size: int) -> Kind:
    """Padded to blocks of so many rows."""
    return Kind("ALIGNED", block_size, block_size)


DENSE = Kind("DENSE")


@dataclass(frozen=True)
class Cut:
    """How a batch is cut: CTAs of the cluster, warps of each, slots a thread, and room for buckets."""

    ctas: int
    warps: int
    rounds: int
    buckets: int

    @property
    def slots(self) -> int:
        """That it holds."""
        return self.ctas * self.warps * 32 * self.rounds

    def shared_bytes(self, kind: Kind) -> int:
        """Of a CTA, in whole KiB: `Memory` of slot_order.cu."""
        words = 7 * self.buckets + self.warps + kind.sizes
        halves = self.buckets + self.warps * (self.buckets + kind.sizes)
        return -(-(4 * words + 2 * halves + 16) // 1024) * 1024

    def expression(self, kind: Kind, ids: torch.dtype) -> str:
        """The template instance to compile, as NVRTC names it. ids: int32 or int64."""
        storage = "long long" if ids == torch.int64 else "int"
        sizes = self.warps, self.ctas, self.rounds, self.buckets, self.shared_bytes(kind)
        return f"slot_order<{storage}, {kind.expression}, {', '.join(map(str, sizes))}>"


@functools.lru_cache(maxsize=4096)
def cut_for(num_slots: int, num_experts: int) -> Cut | None:
    """The fewest threads that have a bucket each, in one CTA, else in a cluster of eight; None for more slots, or experts, than
    that holds."""
    buckets = next((room for room in ROOMS if num_experts < room), None)
    if buckets is None:
        return None
    for warps in (8, 16, MOST_WARPS):
        for rounds in (1, 2):
            cut = Cut(1, warps, rounds, buckets)
            if num_experts < warps * 32 and num_slots <= cut.slots:
                return cut
    rounds = 1
    while rounds * MOST_CTAS * MOST_WARPS * 32 < num_slots:
        rounds *= 2
    return Cut(MOST_CTAS, MOST_WARPS, rounds, buckets) if rounds <= MOST_ROUNDS else None


@functools.cache
def _available() -> bool:
    found = importlib.util.find_spec("cuda") is not None and importlib.util.find_spec("cuda.core") is not None
    target = checks.current_target()
    return found and target is not None and target.name == "sm_90"


def takes(kind: Kind, ids: Tensor, num_experts: int) -> bool:
    """Whether one launch can do it: on a Hopper GPU, with the extra `cuda`."""
    return ids.is_cuda and kind.sizes <= MOST_SIZES and _available() and cut_for(ids.numel(), num_experts) is not None


def serves(kind: Kind, ids: Tensor, num_experts: int) -> bool:
    """Whether it takes it, and serves it best: tiles always, else neither few slots of few experts nor very many slots of some,
    where Triton's launches take less time (data/recordings/slot_order.json)."""
    if not takes(kind, ids, num_experts):
        return False
    slots = ids.numel()
    few = slots <= FEW_SLOTS and slots * num_experts <= FEW_PRODUCT and (kind == DENSE or num_experts <= FEW_EXPERTS)
    return kind.name == "TILED" or not (few or (slots >= MANY_SLOTS and num_experts <= MANY_EXPERTS))


class OrderArguments(ctypes.Structure):
    """`Order` of slot_order.cu, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("ids", "sorted", "first_rows", "block_experts", "rows_in_use")),
        *((name, ctypes.c_void_p) for name in ("tiles", "num_tiles", "ready")),
        *((name, ctypes.c_int) for name in ("num_slots", "num_experts", "counters")),
    ]


def arguments(ids: Tensor, num_experts: int, sorted_slots: Tensor, **more: Tensor) -> OrderArguments:
    """The kernel's arguments. more: what else the kind writes, by its field."""
    given = {name: tensor.data_ptr() for name, tensor in more.items()}
    return OrderArguments(
        ids=ids.data_ptr(), sorted=sorted_slots.data_ptr(), num_slots=ids.numel(), num_experts=num_experts, **given
    )


def tile_arguments(ids: Tensor, num_experts: int, tiles: TokenTiles, first_rows: Tensor) -> OrderArguments:
    """`arguments` for TILED: the order too goes to `tiles`; first_rows (E + 1,) int32."""
    parts = {"tiles": tiles.tiles, "num_tiles": tiles.num_tiles, "ready": tiles.ready}
    found = arguments(ids, num_experts, tiles.sorted_slots, first_rows=first_rows, **parts)
    found.counters = tiles.ready.shape[0]
    return found


def order_slots(kind: Kind, ids: Tensor, given: OrderArguments) -> None:
    """Sort ids, (num_tokens, top_k) int32 or int64, contiguous, at least one. For callers that have checked all of it, and
    `serves`."""
    cut = cut_for(given.num_slots, given.num_experts)
    assert cut is not None
    _, function = _loaded(ids.get_device(), cut, kind, ids.dtype)
    stream = torch.cuda.current_stream(ids.device).cuda_stream
    config = launch_config(cut.ctas, cut.warps * 32, cut.shared_bytes(kind), stream, OVERLAP, cut.ctas)
    launch(function, config, (ctypes.addressof(given),))


def source() -> str:
    """slot_order.cu as it is compiled."""
    return f"enum {{ ALIGNED, DENSE, TILED }};\nconstexpr int LEFT = {LEFT};\n{SOURCE.read_text()}"


@functools.cache
def _loaded(device: int, cut: Cut, kind: Kind, ids: torch.dtype) -> tuple[Any, Any]:
    """(kernel, to be kept; function) on that GPU, allowed its shared memory."""
    from cuda.bindings import driver

    nvrtc.cuda_core().Device(device).set_current()
    expression = cut.expression(kind, ids)
    kernel = nvrtc.compiled("sm_90a", source(), expression).get_kernel(expression)
    name = driver.CUfunction_attribute.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
    (error,) = driver.cuKernelSetAttribute(name, cut.shared_bytes(kind), kernel.handle, driver.CUdevice(device))
    require(error, f"{name.name} = {cut.shared_bytes(kind)}")
    return kernel, driver.CUfunction(int(kernel.handle))
