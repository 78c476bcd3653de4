"""Launching what NVRTC compiled by the driver's own call: arguments by address, and programmatic dependent launch."""

from __future__ import annotations

import ctypes
import functools
from typing import Any

from moelab.kernels.residency import require


def launch(function: Any, config: Any, parameters: tuple[int, ...]) -> None:
    """Launch it. parameters: addresses of its arguments. Raises RuntimeModeError where the driver refuses."""
    from cuda.bindings import driver

    addresses = (ctypes.c_void_p * len(parameters))(*parameters)
    (error,) = driver.cuLaunchKernelEx(config, function, ctypes.addressof(addresses), 0)
    require(error, f"a launch of {config.gridDimX} CTAs of {config.blockDimX} threads")


@functools.lru_cache(maxsize=1024)
def launch_config(
    grid: int, threads: int, shared_bytes: int, stream: int, overlap: bool, cluster: int = 1, cooperative: bool = False
) -> Any:
    """A one-dimensional grid on that stream. overlap: programmatic dependent launch."""
    from cuda.bindings import driver

    config, names = driver.CUlaunchConfig(), driver.CUlaunchAttributeID
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, driver.CUstream(stream)
    values: dict[Any, Any] = {}
    if overlap:
        value = values[names.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION] = driver.CUlaunchAttributeValue()
        value.programmaticStreamSerializationAllowed = 1
    if cluster > 1:
        value = values[names.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION] = driver.CUlaunchAttributeValue()
        value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = cluster, 1, 1
    if cooperative:
        value = values[names.CU_LAUNCH_ATTRIBUTE_COOPERATIVE] = driver.CUlaunchAttributeValue()
        value.cooperative = 1
    attributes = [driver.CUlaunchAttribute() for _ in values]
    for attribute, (name, value) in zip(attributes, values.items(), strict=True):
        attribute.id, attribute.value = name, value
    if attributes:
        config.attrs, config.numAttrs = attributes, len(attributes)
    return config
