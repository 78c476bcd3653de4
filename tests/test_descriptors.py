"""TMA descriptors: kept as long as their weight lives and is used, never a moment past it; and what TMA refuses."""

from __future__ import annotations

import contextvars
import gc
import threading
import weakref

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelab import runtime
from moelab.chips import TARGETS, Target
from moelab.config import KernelConfig, shared_memory_bytes
from moelab.errors import ConfigError, DeviceError, DtypeError, LayoutError, ShapeError, SharedMemoryError
from moelab.kernels import descriptors
from moelab.kernels.descriptors import (
    activation_descriptor,
    cache_info,
    check_tma,
    check_tma_config,
    weight_descriptor,
)

BLOCK = (16, 16)


@pytest.fixture(autouse=True)
def empty_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv(descriptors.BOUND_VARIABLE, raising=False)
    descriptors.clear()


def weight(device: str, experts: int = 2, dtype: torch.dtype = torch.float16) -> torch.Tensor:
    return torch.zeros(experts, 8, 16, dtype=dtype, device=device)


def test_rows_of_experts_are_one_matrix(device: str) -> None:
    w = weight(device, experts=3)
    found = weight_descriptor(w, (16, 32))
    assert (list(found.shape), list(found.strides), list(found.block_shape)) == ([24, 16], [16, 1], [16, 32])
    assert found.base.data_ptr() == w.data_ptr() and found.base.dtype == w.dtype and found.padding == "zero"


def test_one_is_made_per_tensor_and_block(device: str) -> None:
    w, other = weight(device), weight(device)
    first = weight_descriptor(w, BLOCK)
    assert weight_descriptor(w, BLOCK) is first
    assert weight_descriptor(w, (8, 16)) is not first
    assert weight_descriptor(other, BLOCK) is not first
    assert weight_descriptor(w.view_as(w), BLOCK) is not first  # same memory, another tensor, with a life of its own
    assert cache_info()[:2] == (1, 4)


def test_the_least_recently_used_goes_first(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(descriptors.BOUND_VARIABLE, "2")
    a, b, c = (weight(device) for _ in range(3))
    kept = weight_descriptor(a, BLOCK)
    dropped = weight_descriptor(b, BLOCK)
    weight_descriptor(a, BLOCK)
    weight_descriptor(c, BLOCK)
    assert weight_descriptor(a, BLOCK) is kept
    assert weight_descriptor(b, BLOCK) is not dropped
    assert cache_info() == (2, 4, 2, 2)


@given(st.lists(st.integers(0, 5), max_size=30), st.integers(0, 4))
def test_it_is_an_lru_cache(uses: list[int], bound: int) -> None:
    """Hits and misses as an obvious list has them."""
    device = runtime.current().device
    weights, model, hits = [weight(device) for _ in range(6)], [], 0
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(descriptors.BOUND_VARIABLE, str(bound))
        descriptors.clear()
        for use in uses:
            weight_descriptor(weights[use], BLOCK)
            hits += use in model
            model = [*(kept for kept in model if kept != use), use][-bound:] if bound else []
        assert cache_info() == (hits, len(uses) - hits, len(model), bound)


def test_a_bound_of_zero_keeps_none(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(descriptors.BOUND_VARIABLE, "0")
    w = weight(device)
    assert weight_descriptor(w, BLOCK) is not weight_descriptor(w, BLOCK)
    assert cache_info() == (0, 2, 0, 0)


@pytest.mark.parametrize("value", ["-1", "many", "6.4", " "])
def test_a_bound_that_is_none(value: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(descriptors.BOUND_VARIABLE, value)
    with pytest.raises(ConfigError, match="MOELAB_TMA_DESC_CACHE_MAX is"):
        weight_descriptor(weight(device), BLOCK)


def test_neither_weight_nor_memory_is_kept_alive(device: str) -> None:
    w = weight(device)
    found = weight_descriptor(w, BLOCK)
    alive, storage = weakref.ref(w), weakref.ref(w.untyped_storage())
    assert cache_info().size == 1 and alive() is w and storage() is not None
    del w
    gc.collect()
    assert alive() is None and storage() is None
    assert cache_info().size == 0
    with pytest.raises(ReferenceError):
        found.base.data_ptr()


def test_a_weight_in_a_circle_goes_too(device: str) -> None:
    w = weight(device)
    w.itself = [w]
    weight_descriptor(w, BLOCK)
    del w
    gc.collect()
    assert cache_info().size == 0


def test_an_address_that_is_used_again_is_no_hit(device: str) -> None:
    """The memory of one weight after another: each gets a descriptor of its own."""
    memory = torch.zeros(2 * 8 * 16, dtype=torch.float16, device=device)
    seen = []
    for _ in range(3):
        w = memory.view(2, 8, 16)
        seen.append((weight_descriptor(w, BLOCK), w.data_ptr()))
        del w
    assert len({id(found) for found, _ in seen}) == 3 and len({address for _, address in seen}) == 1
    assert cache_info()[:3] == (0, 3, 0)


def test_a_late_farewell_takes_nothing_else_along(device: str) -> None:
    """A callback that comes after another weight took the same key finds that weight's entry, and leaves it."""
    w = weight(device)
    weight_descriptor(w, BLOCK)
    key = next(iter(descriptors._weights._entries))
    descriptors._weights._forget(key, weakref.ref(weight(device)))
    assert cache_info().size == 1


def test_a_weight_that_is_changed_in_place(device: str) -> None:
    w = weight(device)
    first = weight_descriptor(w, BLOCK)
    w.data = weight(device, experts=3)
    moved = weight_descriptor(w, BLOCK)
    assert moved is not first and list(moved.shape) == [24, 16] and moved.base.data_ptr() == w.data_ptr()
    w.resize_(1, 8, 16)
    assert list(weight_descriptor(w, BLOCK).shape) == [8, 16]
    w.data = torch.zeros(129, dtype=torch.float16, device=device)[1:].view(1, 8, 16)  # same sizes, off 16 bytes
    with pytest.raises(LayoutError, match="starts 2 bytes past"):
        weight_descriptor(w, BLOCK)
    w.as_strided_((1, 16, 8), (128, 1, 16))
    with pytest.raises(LayoutError, match="contiguous"):
        weight_descriptor(w, BLOCK)


def test_threads_share_it(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(descriptors.BOUND_VARIABLE, "3")
    weights, wrong = [weight(device, experts=e) for e in range(1, 7)], []

    def use(seed: int) -> None:
        for i in range(300):
            w = weights[(i * seed + i // 7) % 6]
            found = weight_descriptor(w, BLOCK)
            if list(found.shape) != [8 * w.shape[0], 16] or found.base.data_ptr() != w.data_ptr():
                wrong.append(i)
            weight_descriptor(weight(device), BLOCK)  # dies at once

    threads = [threading.Thread(target=use, args=(seed,)) for seed in (1, 2, 3, 5)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert wrong == [] and cache_info().size <= 3


def test_activations_are_not_kept(device: str) -> None:
    a = torch.zeros(32, 16, dtype=torch.float16, device=device)
    first, second = activation_descriptor(a, BLOCK), activation_descriptor(a, BLOCK)
    assert first is not second and list(first.shape) == [32, 16] and first.base is a
    assert cache_info() == (0, 0, 0, descriptors.DEFAULT_BOUND)
    with pytest.raises(LayoutError, match="a starts 2 bytes past"):
        activation_descriptor(a.flatten()[1:17].view(1, 16), BLOCK)


def test_an_allocator_only_where_there_is_none(monkeypatch: pytest.MonkeyPatch) -> None:
    import triton
    from triton.runtime import _allocation

    def mine(size: int, alignment: int, stream: int | None) -> None:
        return None

    def in_a_new_context() -> None:
        assert isinstance(_allocation._allocator.get(), _allocation.NullAllocator)
        descriptors.ensure_allocator()
        first = _allocation._allocator.get()
        descriptors.ensure_allocator()
        assert _allocation._allocator.get() is first is descriptors._scratch
        triton.set_allocator(mine)
        descriptors.ensure_allocator()
        assert _allocation._allocator.get() is mine

    contextvars.Context().run(in_a_new_context)


@pytest.mark.parametrize("name", TARGETS)
def test_which_chips_have_it(name: str, device: str) -> None:
    w = weight(device)
    if name in ("sm_90", "sm_100", "sm_120"):
        check_tma("w", w, BLOCK, TARGETS[name])
        return
    with pytest.raises(DeviceError, match=rf"TMA was asked for on {name}\. Expected sm_90"):
        check_tma("w", w, BLOCK, TARGETS[name])


def test_chips_that_are_not_in_the_table() -> None:
    assert Target("sm_103", 232448).has_tma and Target("sm_90a", 232448).has_tma
    assert not any(Target(name, 1).has_tma for name in ("sm_75", "gfx1100", "gfx90a", "cpu", "sm_"))


def test_what_tma_refuses(device: str) -> None:
    w = weight(device)
    with pytest.raises(LayoutError, match="w has strides"):
        weight_descriptor(w.transpose(1, 2), BLOCK)
    with pytest.raises(LayoutError, match=r"A row of w is 24 bytes \(12 of"):
        weight_descriptor(w[..., :12].contiguous(), BLOCK)
    with pytest.raises(LayoutError, match="w starts 2 bytes past a multiple of 16"):
        weight_descriptor(torch.zeros(257, dtype=torch.float16, device=device)[1:].view(2, 8, 16), BLOCK)
    with pytest.raises(ConfigError, match="boxes of 16 x 512"):
        weight_descriptor(w, (16, 512))
    with pytest.raises(DtypeError, match="w is int8"):
        weight_descriptor(w.to(torch.int8), BLOCK)
    with pytest.raises(ShapeError, match="at least one element"):
        weight_descriptor(w[:0], BLOCK)
    with pytest.raises(ShapeError, match=r"fewer than 2\^31 rows"):
        weight_descriptor(w[:1, :1].expand(2**20, 2**11, 16), BLOCK)
    assert cache_info().size == 0


def test_barriers_count_as_shared_memory() -> None:
    """Four stages of (64 + 64) x 64 fit a chip to the byte: without barriers, that is."""
    config = KernelConfig(64, 64, 64, 1, 4, 4)
    exact = shared_memory_bytes(config, "bfloat16", "sm_90")
    tight = Target("sm_90", exact, wide_dot_warps=(4, 8, 16))
    with pytest.raises(SharedMemoryError, match=f"up to {exact + 128} bytes .* gives a block {exact}"):
        check_tma_config(config, torch.bfloat16, tight)
    check_tma_config(config, torch.bfloat16, TARGETS["sm_90"])
