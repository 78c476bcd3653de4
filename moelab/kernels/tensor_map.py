"""TMA's tensor maps for kernels in CUDA C++: what a map says, and the 128 bytes that the driver makes of it."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from moelab.errors import RuntimeModeError

BYTES = 128
"""Size of an encoded map (CUDA driver API, CUtensorMap)."""


@dataclass(frozen=True)
class TensorMap:
    """A tensor in memory and the box of it that one load brings, innermost dimension first, under the 128-byte swizzle.

    sizes, box: elements. strides: elements between neighbours of each dimension after the first, whose own are adjacent.
    What a box holds outside of the tensor arrives as zeros.
    """

    sizes: tuple[int, ...]
    strides: tuple[int, ...]
    box: tuple[int, ...]

    def encode(self, tensor: Tensor) -> ctypes.Array[ctypes.c_char]:
        """The map of that tensor's memory, as a kernel takes it by value.

        Raises RuntimeModeError with the driver's reason where it refuses: an address or a stride that is no multiple of
        16 bytes, a side of a box over 256.
        """
        from cuda.bindings import driver

        kinds = driver.CUtensorMapDataType
        kind = {
            torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16
        }[tensor.dtype]  # fmt: skip
        error, found = driver.cuTensorMapEncodeTiled(
            kind,
            len(self.sizes),
            tensor.data_ptr(),
            [driver.cuuint64_t(size) for size in self.sizes],
            [driver.cuuint64_t(stride * tensor.itemsize) for stride in self.strides],
            [driver.cuuint32_t(side) for side in self.box],
            [driver.cuuint32_t(1)] * len(self.box),
            driver.CUtensorMapInterleave.CU_TENSOR_MAP_INTERLEAVE_NONE,
            driver.CUtensorMapSwizzle.CU_TENSOR_MAP_SWIZZLE_128B,
            driver.CUtensorMapL2promotion.CU_TENSOR_MAP_L2_PROMOTION_L2_256B,
            driver.CUtensorMapFloatOOBfill.CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE,
        )
        if error != driver.CUresult.CUDA_SUCCESS:
            raise RuntimeModeError(
                f"The driver takes no tensor map of sizes {self.sizes}, strides {self.strides}, box {self.box}: {error.name}. "
                "Expected addresses and strides of whole 16 bytes and sides of at most 256. Check the tensor's layout."
            )
        return ctypes.create_string_buffer(ctypes.string_at(found.getPtr(), BYTES), BYTES)
