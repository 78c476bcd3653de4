"""Kernels in CUDA C++ for Hopper, loaded and launched: what the one-launch layers have in common."""

from __future__ import annotations

import ctypes
import functools
import os
from dataclasses import dataclass
from typing import Any

import torch

from moelab.errors import RuntimeModeError
from moelab.kernels import nvrtc


@dataclass(frozen=True)
class Form:
    """A compiled form of a kernel, as the launcher sees it.

    source: CUDA C++; expression: the template instance in it; threads: of a block; shared_bytes: most dynamic shared memory of
    a block, bytes; per_processor: blocks that a multiprocessor must hold; cluster: blocks that form a cluster; name: for
    messages.
    """

    source: str
    expression: str
    threads: int
    shared_bytes: int
    per_processor: int
    cluster: int
    name: str


@dataclass(frozen=True)
class Loaded:
    """A form on a GPU. grid: blocks that the GPU holds at once."""

    kernel: Any  # kept, since it owns the code
    function: Any
    grid: int


def loaded(device: int, form: Form) -> Loaded:
    """The form on that GPU, allowed its shared memory, and the blocks that the GPU holds at once. Compiles: keep the result.

    Raises RuntimeModeError where the driver refuses, or where blocks that wait for each other would not all find room.
    """
    from cuda.bindings import driver

    core = nvrtc.cuda_core()
    core.Device(device).set_current()
    watched = "#define MOELAB_WATCHDOG\n" if os.environ.get("MOELAB_WATCHDOG") else ""
    code = nvrtc.compiled("sm_90a", watched + form.source, form.expression)
    kernel = code.get_kernel(form.expression)
    names = driver.CUfunction_attribute
    for name, value in (
        (names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, form.shared_bytes),
        (names.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),  # per cent: all that per_processor blocks need
    ):
        (error,) = driver.cuKernelSetAttribute(name, value, kernel.handle, driver.CUdevice(device))
        require(error, f"{name.name} = {value}")
    fit = kernel.occupancy.max_active_blocks_per_multiprocessor(form.threads, form.shared_bytes)
    if fit < form.per_processor:  # blocks wait for each other: one that finds no room would make the others hang
        raise RuntimeModeError(
            f"A multiprocessor holds {fit} blocks of {form.name}. Expected {form.per_processor}. Use impl='triton', and "
            "report the GPU and its driver."
        )
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    function = driver.CUfunction(int(kernel.handle))
    blocks = processors * form.per_processor
    return Loaded(kernel, function, grid_of(form.cluster, blocks, clusters_at_once(function, form, blocks), form.name))


def clusters_at_once(function: Any, form: Form, blocks: int) -> int:
    """Clusters that the GPU holds at once, whose multiprocessors hold so many blocks."""
    if form.cluster == 1:
        return blocks
    from cuda.bindings import driver

    whole = blocks // form.cluster * form.cluster
    config = launch_config(whole, form.threads, form.shared_bytes, 0, overlap=False, cluster=form.cluster)
    error, clusters = driver.cuOccupancyMaxActiveClusters(function, config)
    require(error, f"to say how many clusters of {form.cluster} blocks fit")
    return clusters


def grid_of(cluster: int, blocks: int, clusters: int, name: str) -> int:
    """Blocks to launch, all of which the GPU holds at once: no more than multiprocessors hold, nor than clusters hold.

    Raises RuntimeModeError where not one cluster fits.
    """
    if not clusters:
        raise RuntimeModeError(
            f"The GPU holds no cluster of {cluster} blocks of {name}. Expected at least one. Use an instance of "
            "cluster=1, and report the GPU and its driver."
        )
    return min(blocks // cluster, clusters) * cluster


def require(error: Any, what: str) -> None:
    """Raise RuntimeModeError where the driver answered with an error."""
    if error.value:
        raise RuntimeModeError(
            f"The CUDA driver refused {what}: {error.name}. Expected a Hopper GPU with a driver for CUDA 12.8 or later. "
            "Look at nvidia-smi, or use impl='triton'."
        )


def launch(found: Loaded, config: Any, parameters: tuple[int, ...]) -> None:
    """On the stream of a `launch_config`. parameters: the host addresses of the kernel's. Raises RuntimeModeError."""
    from cuda.bindings import driver

    addresses = (ctypes.c_void_p * len(parameters))(*parameters)
    (error,) = driver.cuLaunchKernelEx(config, found.function, ctypes.addressof(addresses), 0)
    require(error, f"a launch of {config.gridDimX} blocks of {config.blockDimX} threads")


@functools.lru_cache(maxsize=256)
def launch_config(grid: int, threads: int, shared_bytes: int, stream: int, *, overlap: bool, cluster: int = 1) -> Any:
    """A launch of so many blocks. overlap: programmatic dependent launch; cluster: blocks in each."""
    from cuda.bindings import driver

    config = driver.CUlaunchConfig()
    config.gridDimX, config.gridDimY, config.gridDimZ = grid, 1, 1
    config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
    config.sharedMemBytes, config.hStream = shared_bytes, driver.CUstream(stream)
    attributes = []
    if overlap:
        attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
        value.programmaticStreamSerializationAllowed = 1
        attribute.value = value
        attributes.append(attribute)
    if cluster > 1:
        attribute, value = driver.CUlaunchAttribute(), driver.CUlaunchAttributeValue()
        attribute.id = driver.CUlaunchAttributeID.CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
        value.clusterDim.x, value.clusterDim.y, value.clusterDim.z = cluster, 1, 1
        attribute.value = value
        attributes.append(attribute)
    if attributes:
        config.attrs, config.numAttrs = attributes, len(attributes)
    return config
