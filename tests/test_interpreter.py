"""The interpreter made faster: what it computes, what it leaves behind, and where it is left alone."""

from __future__ import annotations

import types

import numpy as np
import pytest
import torch

from moelab import runtime

runtime.prepare_triton()

import triton  # noqa: E402
import triton.language as tl  # noqa: E402

import moelab.kernels.launch  # noqa: E402, F401
from moelab.kernels.interpreter import NEEDED, hasten  # noqa: E402

pytestmark = pytest.mark.skipif(runtime.current().mode != "interpreter", reason="kernels run on a GPU here")


@triton.jit
def _twice(x):
    return x + tl.sum(tl.where(x > 0, x, 0.0), axis=0) - tl.sum(tl.maximum(x, 0.0), axis=0) + x


@triton.jit
def _kernel(x_ptr, out_ptr, BLOCK: tl.constexpr):
    at = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = _twice(tl.load(x_ptr + at))
    order = tl.sort(x)
    tl.store(out_ptr + at, tl.cumsum(order, axis=0))


@triton.jit
def _broken(x_ptr, BLOCK: tl.constexpr):
    tl.store(x_ptr + tl.arange(0, BLOCK), tl.arange(0, 2 * BLOCK))


def launch() -> None:
    """A kernel that calls device functions, ours and the language's own, against numpy."""
    x = torch.randn(32, dtype=torch.float64)
    out = torch.empty_like(x)
    _kernel[(2,)](x, out, BLOCK=16)
    expected = torch.from_numpy(np.sort(2 * x.view(2, 16).numpy(), axis=1)).cumsum(1)
    assert out.view(2, 16).allclose(expected)


def test_it_is_hastened() -> None:
    launch()
    assert triton.runtime.interpreter._hastened
    assert not triton.runtime.interpreter.interpreter_builder.options.sanitize_overflow


def test_what_a_launch_replaces_is_put_back() -> None:
    """Whether it ends or fails: the language's functions are its own again, and the next launch is right."""
    before = {name: getattr(tl, name) for name in ("load", "store", "arange", "sum", "program_id")}
    member = tl.tensor.__add__
    launch()
    with pytest.raises(Exception, match=r"shape|broadcast|Cannot"):
        _broken[(1,)](torch.zeros(4), BLOCK=4)
    assert all(getattr(tl, name) is value for name, value in before.items()) and tl.tensor.__add__ is member
    launch()


def test_another_interpreter_is_left_alone() -> None:
    for missing in NEEDED:
        other = types.SimpleNamespace(**{name: None for name in NEEDED if name != missing})
        assert not hasten(other, tl) and not hasattr(other, "_hastened")  # type: ignore[arg-type]
    assert not hasten(triton.runtime.interpreter, tl), "once a process"


def test_a_type_is_numpys_as_triton_says() -> None:
    kept = triton.runtime.interpreter._get_np_dtype
    block, pointer = tl.block_type(tl.float16, [4, 8]), tl.pointer_type(tl.float16)
    for of in (tl.int1, tl.bfloat16, tl.float8e5, block, pointer, tl.block_type(pointer, [4])):
        for _ in range(2):
            assert kept(of) == kept.__wrapped__(of)
