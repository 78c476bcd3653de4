"""The table of element types is torch's and Triton's own; what sums are kept in."""

from __future__ import annotations

import math

import pytest
import torch

from moelab.dtypes import (
    DTYPES,
    LAYER_DTYPES,
    accumulator_dtype,
    dtype_bytes,
    dtype_name,
    get_dtype,
    interpreted,
    torch_dtype,
)
from moelab.errors import DtypeError, UnknownNameError


@pytest.mark.parametrize("name", DTYPES)
def test_the_table_says_what_torch_says(name: str) -> None:
    dtype, entry = getattr(torch, name), DTYPES[name]
    assert dtype_name(dtype) == name and get_dtype(dtype) is get_dtype(name) is get_dtype(f"torch.{name}") is entry
    assert dtype_bytes(dtype) == dtype.itemsize
    if dtype.is_floating_point:
        info = torch.finfo(dtype)
        assert entry.fraction_bits == -math.log2(info.eps)
        assert entry.smallest_exponent == math.log2(info.smallest_normal)
    else:
        assert (entry.fraction_bits, entry.smallest_exponent) == (0, 0)


@pytest.mark.parametrize("name", [name for name, entry in DTYPES.items() if entry.triton])
def test_the_table_says_what_triton_says(name: str) -> None:
    canonical = pytest.importorskip("triton._utils").canonicalize_dtype
    assert canonical(getattr(torch, name)) == DTYPES[name].triton


def test_no_spelling_means_two_dtypes() -> None:
    spellings = [spelling for dtype in DTYPES.values() for spelling in (dtype.name, *dtype.others)]
    assert len(set(spellings)) == len(spellings)


def test_layers_take_four_and_the_interpreter_three_of_them() -> None:
    assert [torch_dtype(name) for name in LAYER_DTYPES] == [torch.bfloat16, torch.float16, torch.float32, torch.float64]
    assert [name for name in LAYER_DTYPES if interpreted(name)] == ["float16", "float32", "float64"]
    assert not interpreted(torch.float8_e4m3fn) and interpreted(torch.int32) and interpreted(torch.complex64)
    for other in ("bf16", "int8", "float8_e4m3fn"):
        with pytest.raises(DtypeError, match="Expected one of bfloat16, float16, float32, float64"):
            torch_dtype(other)
    with pytest.raises(UnknownNameError, match=r"Did you mean bfloat16.* Expected one of"):
        get_dtype("bfloat61")


@pytest.mark.parametrize("dtype", [getattr(torch, name) for name in DTYPES])
def test_sums_are_kept_in_float32_or_float64(dtype: torch.dtype) -> None:
    wide = accumulator_dtype(dtype)
    assert wide == (torch.float64 if dtype == torch.float64 else torch.float32)
    try:
        assert wide == torch.promote_types(dtype, torch.float32)
    except RuntimeError:  # torch promotes no float8: what the function is for
        assert dtype_name(dtype).startswith("float8")
