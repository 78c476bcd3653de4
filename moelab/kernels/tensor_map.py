"""TMA's tensor maps for kernels in CUDA C++: what a map says, and the 128 bytes that the driver makes of it."""

from __future__ import annotations

import ctypes
import functools
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

    def encode(self, tensor: Tensor) -> Encoded:
        """The map of that tensor's memory, as a kernel takes it by value.

        Raises RuntimeModeError with the driver's reason where it refuses: an address or a stride that is no multiple of
        16 bytes, a side of a box over 256.
        """
        return _encoded(tensor.data_ptr(), tensor.dtype, self)


class Encoded:
    """The driver's form of a map. address: of its 128 bytes, on a multiple of 64."""

    def __init__(self) -> None:
        self._room = ctypes.create_string_buffer(BYTES + 64)
        self.address = -(-ctypes.addressof(self._room) // 64) * 64


@functools.lru_cache(maxsize=4096)  # says nothing of the tensor but where it lies: no tensor is kept alive
def _encoded(address: int, dtype: torch.dtype, spec: TensorMap) -> Encoded:
    from cuda.bindings import driver

    kinds, swizzles, promotions = driver.CUtensorMapDataType, driver.CUtensorMapSwizzle, driver.CUtensorMapL2promotion
    kind = {
        torch.bfloat16: kinds.CU_TENSOR_MAP_DATA_TYPE_BFLOAT16, torch.float16: kinds.CU_TENSOR_MAP_DATA_TYPE_FLOAT16,
        torch.float8_e4m3fn: kinds.CU_TENSOR_MAP_DATA_TYPE_UINT8,
    }[dtype]  # fmt: skip
    rank, found = len(spec.sizes), Encoded()
    sides = ctypes.c_uint32 * rank
    # Not through cuda-bindings, which writes to an object of its own, at whatever address: the driver asks for 64 bytes.
    error = _libcuda().cuTensorMapEncodeTiled(
        ctypes.c_void_p(found.address), ctypes.c_int(kind.value), ctypes.c_uint32(rank), ctypes.c_void_p(address),
        (ctypes.c_uint64 * rank)(*spec.sizes),
        (ctypes.c_uint64 * (rank - 1))(*(stride * dtype.itemsize for stride in spec.strides)),
        sides(*spec.box), sides(*[1] * rank), ctypes.c_int(0),
        ctypes.c_int(swizzles.CU_TENSOR_MAP_SWIZZLE_128B.value),
        ctypes.c_int(promotions.CU_TENSOR_MAP_L2_PROMOTION_L2_256B.value), ctypes.c_int(0),
    )  # fmt: skip
    if error:
        raise RuntimeModeError(
            f"The driver takes no tensor map of sizes {spec.sizes}, strides {spec.strides}, box {spec.box}: error {error}. "
            "Expected addresses and strides of whole 16 bytes and sides of at most 256. Check the tensor's layout."
        )
    return found


@functools.cache
def _libcuda() -> ctypes.CDLL:
    try:
        return ctypes.CDLL("libcuda.so.1")
    except OSError as error:
        raise RuntimeModeError(
            f"No NVIDIA driver: {error}. Expected libcuda.so.1, which makes tensor maps. Run this on a machine with a GPU."
        ) from error
