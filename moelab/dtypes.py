"""The one table of element types: their names, their sizes, and what computes in them.

Names are torch's ("bfloat16"), with or without "torch." in front. Torch itself is imported only by what returns its objects.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from moelab.errors import DtypeError, UnknownNameError, nearest_names

if TYPE_CHECKING:
    import torch


@dataclass(frozen=True)
class DType:
    """One element type.

    name: torch's spelling; others: what else it is called. bytes: of one element. triton, cuda: its name in a Triton
    kernel's signature and in CUDA C++ ("" where there is none). fraction_bits: stored ones, so that numbers in
    [2^e, 2^(e+1)) are 2^(e - bits) apart (0 for integers). smallest_exponent: of the smallest normal number (0 for integers).
    layer: whether the unquantised layer, and every kernel of it, takes tensors of this type.
    interpreted: whether Triton's interpreter computes right in it.
    """

    name: str
    bytes: int
    triton: str
    cuda: str
    fraction_bits: int = 0
    smallest_exponent: int = 0
    others: tuple[str, ...] = ()
    layer: bool = False
    interpreted: bool = True


# Sources: IEEE 754-2019 table 3.5 (float16, 32, 64); OCP 8-bit Floating Point Specification 1.0 (e4m3fn, e5m2); OCP
# Microscaling Formats 1.0 (e8m0fnu, a scale); e4m3fnuz is AMD's (gfx942), which CUDA C++ has no name for. Triton 3.7.1's
# interpreter computes bfloat16 and float8 wrongly, and says nothing.
DTYPES: Mapping[str, DType] = {
    dtype.name: dtype
    for dtype in (
        DType("bfloat16", 2, "bf16", "__nv_bfloat16", 7, -126, ("bf16",), layer=True, interpreted=False),
        DType("float16", 2, "fp16", "__half", 10, -14, ("fp16", "half"), layer=True),
        DType("float32", 4, "fp32", "float", 23, -126, ("fp32", "float"), layer=True),
        DType("float64", 8, "fp64", "double", 52, -1022, ("fp64", "double"), layer=True),
        DType("float8_e4m3fn", 1, "fp8e4nv", "__nv_fp8_e4m3", 3, -6, ("fp8", "fp8_e4m3"), interpreted=False),
        DType("float8_e4m3fnuz", 1, "fp8e4b8", "", 3, -7, interpreted=False),
        DType("float8_e5m2", 1, "fp8e5", "__nv_fp8_e5m2", 2, -14, ("fp8_e5m2",), interpreted=False),
        DType("float8_e8m0fnu", 1, "", "__nv_fp8_e8m0", 0, -127, ("e8m0", "ue8m0"), interpreted=False),
        DType("int8", 1, "i8", "signed char"),
        DType("uint8", 1, "u8", "unsigned char"),
        DType("int32", 4, "i32", "int"),
        DType("int64", 8, "i64", "long long"),
    )
}
"""Element types by torch's name."""

LAYER_DTYPES: Mapping[str, DType] = {name: dtype for name, dtype in DTYPES.items() if dtype.layer}
"""Those of the unquantised layer's tensors."""


def dtype_name(dtype: object) -> str:
    """A dtype's name as the table spells it: torch.bfloat16 -> "bfloat16". Any dtype of torch, any string; raises nothing."""
    return str(dtype).removeprefix("torch.")


def get_dtype(dtype: object) -> DType:
    """The table's entry of a dtype (torch's, or its name). Raises UnknownNameError."""
    name = dtype_name(dtype)
    if name not in DTYPES:
        raise UnknownNameError(
            f"Unknown dtype {name!r}.{nearest_names(name, DTYPES)} Expected one of {', '.join(DTYPES)}. Name one."
        )
    return DTYPES[name]


def dtype_bytes(dtype: object) -> int:
    """Bytes per element of a dtype (torch's, or its name). Raises UnknownNameError."""
    return get_dtype(dtype).bytes


def interpreted(dtype: object) -> bool:
    """Whether Triton's interpreter computes right in a dtype; one that is not in the table is not vouched for here: True."""
    found = DTYPES.get(dtype_name(dtype))
    return found is None or found.interpreted


def torch_dtype(name: str) -> torch.dtype:
    """The torch dtype of a layer's dtype, by its name ("bfloat16", "float16", "float32", "float64"). Raises DtypeError."""
    import torch

    if name not in LAYER_DTYPES:
        raise DtypeError(
            f"Unknown dtype {name!r}. Expected one of {', '.join(LAYER_DTYPES)}. Give the name as torch spells it."
        )
    found: torch.dtype = getattr(torch, name)
    return found


def accumulator_dtype(dtype: torch.dtype) -> torch.dtype:
    """What sums of a dtype are kept in: float64 for float64, float32 for every other (float8 and integers too)."""
    import torch

    return torch.float64 if dtype is torch.float64 else torch.float32
