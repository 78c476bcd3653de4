"""TMA descriptors made on the host: a weight's are kept, an activation's are not.

A descriptor tells the tensor memory accelerator (sm_90 and later) where a matrix lies and which box of it one
instruction copies. Making a checked one cost sglang's launcher 3.7 us a call on an H200's host, and a weight's is the
same for every step. Kernels here take their descriptors from the host, so they ask for no scratch memory;
`ensure_allocator` is for kernels that make their own on the device.
"""

from __future__ import annotations

from moelab import runtime

runtime.prepare_triton()

import os  # noqa: E402
import threading  # noqa: E402
import weakref  # noqa: E402
from collections import OrderedDict  # noqa: E402
from collections.abc import Hashable  # noqa: E402
from functools import partial  # noqa: E402
from typing import Any, NamedTuple  # noqa: E402

import torch  # noqa: E402
import triton  # noqa: E402
from torch import Tensor  # noqa: E402
from triton.tools.tensor_descriptor import TensorDescriptor  # noqa: E402

from moelab.chips import Target  # noqa: E402
from moelab.config import KernelConfig, tma_shared_memory_bytes  # noqa: E402
from moelab.dtypes import dtype_name  # noqa: E402
from moelab.errors import ConfigError, DeviceError, LayoutError, ShapeError, SharedMemoryError  # noqa: E402
from moelab.kernels import checks  # noqa: E402

BOUND_VARIABLE = "MOELAB_TMA_DESC_CACHE_MAX"
DEFAULT_BOUND = 64
_ALIGNMENT = 16  # bytes; this and the 256: CUDA driver API, cuTensorMapEncodeTiled
_LONGEST_SIDE = 256


class CacheInfo(NamedTuple):
    """Of the kept descriptors: how many calls found one, how many made one, how many there are, at most how many."""

    hits: int
    misses: int
    size: int
    bound: int


class _Entry(NamedTuple):
    weight: weakref.ref[Tensor]
    descriptor: TensorDescriptor


class _Cache:
    """Descriptors of weights, the least recently used dropped first. Neither key nor value keeps a weight alive.

    Single operations of an OrderedDict are atomic; a weight may die, and take its entry along, between any two.
    """

    def __init__(self) -> None:
        self._entries: OrderedDict[Hashable, _Entry] = OrderedDict()
        self._lock = threading.RLock()  # a weight may die, and call _forget, inside of the thread that holds it
        self.hits = self.misses = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, w: Tensor, block: tuple[int, int]) -> TensorDescriptor:
        # id and address both: an address serves another tensor once this one is gone, and `w.data = ...` moves this one.
        key = (id(w), w.data_ptr(), w.shape, w.dtype, block)
        entry = self._entries.get(key)
        if entry is None or entry.weight() is not w:
            return self._make(key, w, block)
        try:
            self._entries.move_to_end(key)
        except KeyError:  # another thread has just dropped it; it serves this call all the same
            return entry.descriptor
        self.hits += 1
        return entry.descriptor

    def _make(self, key: Hashable, w: Tensor, block: tuple[int, int]) -> TensorDescriptor:
        bound = _bound()
        experts, N, K = _weight_shape(w)
        check_tma("w", w, block)
        # A proxy: Triton reads the base's dtype and address, and its interpreter the memory, none of which pins it.
        descriptor = _descriptor(weakref.proxy(w), experts * N, K, block)
        self.misses += 1
        if bound == 0:
            return descriptor
        with self._lock:
            self._entries[key] = _Entry(weakref.ref(w, partial(self._forget, key)), descriptor)
            while len(self._entries) > bound:
                self._entries.popitem(last=False)
        return descriptor

    def _forget(self, key: Hashable, dead: weakref.ref[Tensor]) -> None:
        with self._lock:
            entry = self._entries.get(key)
            if entry is not None and entry.weight is dead:  # not that of a later tensor at the same place
                del self._entries[key]

    def clear(self) -> None:
        with self._lock:
            self._entries.clear()
            self.hits = self.misses = 0


_weights = _Cache()


def weight_descriptor(w: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """The descriptor of w (E, N, K), contiguous, as the matrix (E * N, K): row expert * N + n, boxes of `block`.

    block: (rows, columns of K), each at most 256. Kept for the next call with this tensor: the least recently used go
    first, past MOELAB_TMA_DESC_CACHE_MAX (64; 0 keeps none), and each goes when its weight does, which it does not
    keep alive. A weight moved or resized in place gets a new one.
    Raises ShapeError, DtypeError, DeviceError, LayoutError, ConfigError.
    """
    return _weights.get(w, block)


def activation_descriptor(a: Tensor, block: tuple[int, int]) -> TensorDescriptor:
    """A descriptor of a (rows, K), contiguous, with boxes of `block`; made anew at each call.

    Not kept: activations are temporaries, seldom the same tensor twice, so a cache would miss, and its entries could
    only keep dead ones in memory. `check_tma` is for its caller, once; the address alone is looked at here.
    Raises LayoutError.
    """
    _check_address("a", a)
    return _descriptor(a, a.shape[0], a.shape[1], block)


def clear() -> None:
    """Drop every kept descriptor, and count from zero."""
    _weights.clear()


def cache_info() -> CacheInfo:
    """Hits, misses, size and bound since the last `clear`. Raises ConfigError for a bound that is none."""
    return CacheInfo(_weights.hits, _weights.misses, len(_weights), _bound())


def ensure_allocator() -> None:
    """Give Triton an allocator of scratch memory, from torch, in a context that has none; one that is set stays.

    Only for kernels that make descriptors on the device, as Triton's tl.make_tensor_descriptor does. Triton keeps the
    allocator in a ContextVar: a new thread starts without one, so call this in each, once.
    """
    from triton.runtime import _allocation

    if isinstance(_allocation._allocator.get(), _allocation.NullAllocator):
        triton.set_allocator(_scratch)


def _scratch(size: int, alignment: int, stream: int | None) -> Tensor:
    return torch.empty(size, dtype=torch.int8, device="cuda")  # torch aligns to 512 bytes, Triton asks for 128


def check_tma_config(config: KernelConfig, dtype: torch.dtype, target: Target | None = None) -> None:
    """Raise SharedMemoryError where TMA's buffers and barriers put a config over the chip's shared memory.

    target: as in `check_tma`.
    """
    target = target or checks.current_target()
    if target is None:
        return
    name = dtype_name(dtype)
    needs, limit = tma_shared_memory_bytes(config, name, target), target.shared_memory_per_block
    if needs > limit:
        raise SharedMemoryError(
            f"The config {config.short()} needs up to {needs} bytes of shared memory in {name} with TMA, {target.name} gives a "
            f"block {limit}. Expected no more than that. Lower num_stages or a BLOCK_SIZE, or use the kernel without TMA."
        )


def check_tma(name: str, tensor: Tensor, block: tuple[int, int], target: Target | None = None) -> None:
    """Raise unless boxes of `block` of this tensor's rows can go through TMA here; leading axes are rows too.

    target: the chip; None takes the current GPU. Triton's interpreter has TMA, to its own rules of alignment.
    Raises DeviceError on a chip without TMA, DtypeError, LayoutError (not contiguous, or not on 16 bytes), ConfigError.
    """
    target = target or checks.current_target()
    if target is not None and not target.has_tma:
        raise DeviceError(
            f"TMA was asked for on {target.name}. Expected sm_90 or later: this chip has none. Use the kernel without it "
            "(grouped_gemm, or tma=False)."
        )
    checks.check_dtype(name, tensor, checks.FLOATS)
    if not tensor.is_contiguous():
        raise LayoutError(
            f"{name} has strides {tensor.stride()} for shape {tuple(tensor.shape)}. Expected a contiguous tensor: a "
            "descriptor takes its rows one after another. Call .contiguous() once, outside the hot path."
        )
    row_bytes = tensor.shape[-1] * tensor.element_size()
    if row_bytes % _ALIGNMENT:
        raise LayoutError(
            f"A row of {name} is {row_bytes} bytes ({tensor.shape[-1]} of {tensor.dtype}). Expected a multiple of "
            f"{_ALIGNMENT} bytes for TMA. Use the kernel without it, or pad the inner size."
        )
    _check_address(name, tensor)
    if max(block) > _LONGEST_SIDE:
        raise ConfigError(
            f"TMA boxes of {block[0]} x {block[1]} were asked for, (rows, columns of K) of {name}. Expected sides of at most "
            f"{_LONGEST_SIDE}. Lower that BLOCK_SIZE."
        )


def _check_address(name: str, tensor: Tensor) -> None:
    if tensor.data_ptr() % _ALIGNMENT:
        raise LayoutError(
            f"{name} starts {tensor.data_ptr() % _ALIGNMENT} bytes past a multiple of {_ALIGNMENT}. Expected an address on "
            f"{_ALIGNMENT} bytes for TMA. Call .clone() on the slice once, outside the hot path."
        )


def _weight_shape(w: Tensor) -> tuple[int, int, int]:
    checks.check_shape("w", w, ("E", "N", "K"))
    experts, N, K = w.shape
    if not w.numel() or experts * N >= 2**31:
        raise ShapeError(
            f"w has {experts} experts of {N} rows of {K}. Expected at least one element, and fewer than 2^31 rows "
            "together: TMA's coordinates are int32. Split the experts over ranks, or use the kernel without TMA."
        )
    return experts, N, K


def _descriptor(base: Any, rows: int, K: int, block: tuple[int, int]) -> TensorDescriptor:
    """TensorDescriptor(base, [rows, K], [K, 1], block) without its own checks, most of its cost: check_tma's are more."""
    descriptor = TensorDescriptor.__new__(TensorDescriptor)
    descriptor.base, descriptor.shape, descriptor.strides = base, [rows, K], [K, 1]
    descriptor.block_shape = list(block)
    return descriptor


def _bound() -> int:
    """MOELAB_TMA_DESC_CACHE_MAX, looked up where a descriptor is made, which is seldom."""
    text = os.environ.get(BOUND_VARIABLE, "")
    if not text:
        return DEFAULT_BOUND
    if not text.isdecimal():
        raise ConfigError(
            f"{BOUND_VARIABLE} is {text!r}. Expected a whole number of descriptors, 0 to keep none. Correct it, or take it "
            f"out of the environment for {DEFAULT_BOUND}."
        )
    return int(text)
