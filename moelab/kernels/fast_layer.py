"""A whole fused MoE layer in one launch of CUDA C++, or two, for Hopper: the launcher of sm90_fast_layer.cu and sm90_fast_sum.cu.

Compiling needs no GPU (see `moelab.kernels.nvrtc`); running one needs sm_90.
"""

from __future__ import annotations

import ctypes
import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from moelab.chips import Target
from moelab.dtypes import dtype_name
from moelab.errors import DtypeError, RuntimeModeError, ShapeError
from moelab.kernels import nvrtc, residency
from moelab.kernels.cuda_launch import launch, launch_config
from moelab.kernels.fast_instances import (
    BLOCK,
    GEMM1,
    GEMM2,
    SOURCE,
    STORAGE,
    SUM,
    SUM_THREADS,
    Instance,
    constants,
)
from moelab.kernels.residency import require
from moelab.kernels.tensor_map import TensorMap
from moelab.kernels.token_tiles import TokenTiles

WATCHED, COOPERATIVE = True, False
"""For measurements (tests/two_streams.py): without WATCHED, instances are compiled with waits that may last for ever; with
COOPERATIVE, launched as a cooperative grid, which CUDA starts when all of it fits. PDL may be asked for beside that
(CUlaunchAttributeID excludes no pair of attributes); what it costs has not been recorded."""

SUM_SOURCE = SOURCE.with_name("sm90_fast_sum.cu")


class LayerArguments(ctypes.Structure):
    """`Layer` of sm90_fast_layer.cu, field for field."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("x", "rows", "inner", "y", "out", "topk_weights", "topk_ids")),
        *((name, ctypes.c_void_p) for name in ("sorted_slots", "tiles", "num_tiles", "ready", "report")),
        *((name, ctypes.c_int) for name in ("most_tiles", "counters", "num_experts", "num_tokens", "top_k")),
        *((name, ctypes.c_int) for name in ("hidden", "inner_size", "parts", "wide_ids", "wide_weights", "weighted")),
        ("scale", ctypes.c_float),
        ("powers", ctypes.c_int),
        *((name, ctypes.c_void_p) for name in ("x_scale", "w13_scale", "w2_scale", "rows_scale", "inner_scale")),
    ]


def layer_arguments(
    x: Tensor,
    rows: Tensor,
    inner: Tensor,
    y: Tensor,
    out: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    tiles: TokenTiles,
    num_experts: int,
    parts: int,
    *,
    report: Tensor,
    scale: float,
    weights_on_input: bool,
    powers: bool = False,
    scales: tuple[Tensor, ...] = (),
) -> LayerArguments:
    """The kernel's arguments for these tensors, all of them on one device, and sizes as `fast_layer` has them. report:
    `residency.report_of`. powers, scales: of an instance over codes, as sm90_fast_tiles.cuh has them."""
    return LayerArguments(
        *(t.data_ptr() for t in (x, rows, inner, y, out, topk_weights, topk_ids, *tiles, report)),
        tiles.most, tiles.ready.shape[0], num_experts, *topk_ids.shape, out.shape[1], inner.shape[1], parts,
        topk_ids.dtype == torch.int64, topk_weights.dtype == torch.float32, GEMM1 if weights_on_input else GEMM2, scale, powers,
        *(t.data_ptr() for t in scales),
    )  # fmt: skip


def tensor_maps(instance: Instance, w13: Tensor, w2: Tensor, rows: Tensor, inner: Tensor) -> tuple[TensorMap, ...]:
    """Maps of w13 (E, 2N, H), w2 (E, H, N), rows (S, H) and inner (S, N), in the boxes of that instance.

    w13's dimensions are H, row in a group of eight, gate or up, group, expert: a box brings groups of gate and of up rows
    in turn. Of codes: H, pair of rows, row of a pair, group of eight pairs, gates or ups of an expert: a box brings groups of
    even rows and of odd ones in turn, all gates first.
    """
    experts, doubled, hidden = w13.shape
    size, step = doubled // 2, instance.step
    rows_of_a_load = instance.rows // instance.cluster
    of_w13 = TensorMap(
        (hidden, 8, 2, size // 8, experts),
        (hidden, size * hidden, 8 * hidden, doubled * hidden),
        (step, 8, 2, rows_of_a_load // 16, 1),
    )
    if instance.scaled == 2:
        return (
            _in_chunks(hidden, experts * doubled, 16),
            _in_chunks(size, experts * hidden, 8),
            *(
                TensorMap((each.shape[1], each.shape[0]), (each.shape[1],), (step, instance.box))
                for each in (rows, inner)
            ),
        )
    if instance.scaled:
        of_w13 = TensorMap(
            (hidden, 8, 2, size // 16, 2 * experts),
            (2 * hidden, hidden, 16 * hidden, size * hidden),
            (step, 8, 2, BLOCK // 16, rows_of_a_load // BLOCK),
        )
    return (
        of_w13,
        TensorMap((size, hidden, experts), (size, hidden * size), (step, rows_of_a_load, 1)),
        *(TensorMap((each.shape[1], each.shape[0]), (each.shape[1],), (step, instance.box)) for each in (rows, inner)),
    )


def _in_chunks(K: int, rows: int, chunk: int) -> TensorMap:
    """Of all experts' rows of K codes: boxes of BLOCK rows, of which wgmma leaves a thread whole chunks of `chunk` neighbours. A
    thread's columns are 8 j + 2 q and the next, q being its lane's number in four: in shared memory the rows of a chunk are
    eight apart, two by two, and the chunks of four lanes side by side."""
    return TensorMap(
        (K, 2, 4, chunk // 2, rows // (4 * chunk)),
        (K, chunk * K, 2 * K, 4 * chunk * K),
        (BLOCK, 2, 4, chunk // 2, BLOCK // (4 * chunk)),
    )


def check_fast_layer(x: Tensor, w13: Tensor, w2: Tensor, target: Target | None) -> None:
    """Raise unless the kernel takes these sizes and dtypes on that chip: RuntimeModeError, DtypeError, ShapeError."""
    if target is None or target.name != "sm_90":
        raise RuntimeModeError(
            f"impl='fast' was asked for on {'no GPU' if target is None else target.name}. Expected a Hopper GPU (sm_90), whose "
            "wgmma and TMA it is written for. Use impl='triton', or 'gated_tma' on later chips."
        )
    if x.dtype not in STORAGE:
        raise DtypeError(
            f"hidden_states is {dtype_name(x.dtype)}. Expected bfloat16 or float16 for impl='fast'. Cast it, "
            "or use impl='triton'."
        )
    for name, size in (("hidden_size", x.shape[1]), ("moe_intermediate_size", w2.shape[2])):
        if size % 8:
            raise ShapeError(
                f"{name} is {size}. Expected a multiple of 8 for impl='fast', whose copies are of 16 bytes. Pad it, or use "
                "impl='triton'."
            )
    for name, tensor in (("hidden_states", x), ("w13", w13), ("w2", w2)):
        if tensor.data_ptr() % 16:
            raise ShapeError(
                f"{name} starts {tensor.data_ptr() % 16} bytes past a multiple of 16. Expected an address on 16 bytes for TMA. "
                "Call .clone() on the slice once, outside the hot path."
            )


@dataclass(frozen=True)
class _Loaded:
    kernel: Any  # kept, since it owns the code
    function: Any
    grid: int


@functools.cache
def _loaded(device: int, instance: Instance, dtype: torch.dtype, watched: bool) -> _Loaded:
    """The instance on that GPU, allowed its shared memory, and the CTAs that the GPU holds at once."""
    from cuda.bindings import driver

    core = nvrtc.cuda_core()
    core.Device(device).set_current()
    expression = instance.expression(dtype)
    unwatched = "" if watched else "#define MOELAB_UNWATCHED\n"
    code = nvrtc.compiled("sm_90a", unwatched + instance.source(dtype), expression)
    kernel = code.get_kernel(expression)
    names = driver.CUfunction_attribute
    for name, value in (
        (names.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES, instance.shared_bytes),
        (names.CU_FUNC_ATTRIBUTE_PREFERRED_SHARED_MEMORY_CARVEOUT, 100),  # per cent: all that ctas_per_sm CTAs need
    ):
        (error,) = driver.cuKernelSetAttribute(name, value, kernel.handle, driver.CUdevice(device))
        require(error, f"{name.name} = {value}")
    fit = kernel.occupancy.max_active_blocks_per_multiprocessor(instance.threads, instance.shared_bytes)
    if fit < instance.ctas_per_sm:  # CTAs wait for each other: one that finds no room would make the others hang
        raise RuntimeModeError(
            f"An SM holds {fit} CTAs of {instance}. Expected {instance.ctas_per_sm}. Use impl='triton', and "
            "report the GPU and its driver."
        )
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    function = driver.CUfunction(int(kernel.handle))
    ctas = processors * instance.ctas_per_sm
    return _Loaded(kernel, function, grid_of(instance, ctas, _clusters_at_once(function, instance, ctas)))


def sum_expression(top_k: int, dtype: torch.dtype, ids: torch.dtype = torch.int32, *, looks: bool = False) -> str:
    """The template instance of sm90_fast_sum.cu to compile, as NVRTC names it. ids: int32 or int64. looks: at them first, to read
    no row that counts for nothing."""
    slots = next((slots for slots in (2, 4) if top_k <= slots), 8)
    more = ", true" if looks else ""
    return f"fast_sum<{STORAGE[dtype][0]}, {slots}, {'long long' if ids == torch.int64 else 'int'}{more}>"


def sum_source() -> str:
    """sm90_fast_sum.cu as it is compiled."""
    return f'#include "sm90.cuh"\n{constants()}{SUM_SOURCE.read_text()}'


def sum_ctas(num_tokens: int, hidden: int) -> int:
    """Blocks of sm90_fast_sum.cu for so many tokens."""
    return -(-num_tokens * (hidden // 8) // SUM_THREADS)


@functools.cache
def _loaded_sum(device: int, expression: str) -> tuple[Any, Any]:
    """(kernel, to be kept; function) of sm90_fast_sum.cu on that GPU."""
    from cuda.bindings import driver

    nvrtc.cuda_core().Device(device).set_current()
    kernel = nvrtc.compiled("sm_90a", sum_source(), expression).get_kernel(expression)
    return kernel, driver.CUfunction(int(kernel.handle))


def _clusters_at_once(function: Any, instance: Instance, ctas: int) -> int:
    """Clusters that the GPU holds at once, whose SMs hold so many CTAs."""
    if instance.cluster == 1:
        return ctas
    from cuda.bindings import driver

    config = _instance_config(instance, ctas // instance.cluster * instance.cluster, 0, False)
    error, clusters = driver.cuOccupancyMaxActiveClusters(function, config)
    require(error, f"to say how many clusters of {instance.cluster} CTAs fit")
    return clusters


def grid_of(instance: Instance, ctas: int, clusters: int) -> int:
    """CTAs to launch, all of which the GPU holds at once: no more than SMs hold, nor than clusters hold.

    Raises RuntimeModeError where not one cluster fits.
    """
    if not clusters:
        raise RuntimeModeError(
            f"The GPU holds no cluster of {instance.cluster} CTAs of {instance}. Expected at least one. Use an instance of "
            "cluster=1, and report the GPU and its driver."
        )
    return min(ctas // instance.cluster, clusters) * instance.cluster


def fast_layer(
    x: Tensor,
    w13: Tensor,
    w2: Tensor,
    topk_weights: Tensor,
    topk_ids: Tensor,
    tiles: TokenTiles,
    instance: Instance,
    *,
    scale: float = 1.0,
    weights_on_input: bool = False,
    parts: int = GEMM1 | GEMM2 | SUM,
    scratch: tuple[Tensor, Tensor] | None = None,
    overlap: bool = True,
    out: Tensor | None = None,
) -> Tensor:
    """The layer of checked tensors (`check_fast_layer`): x (M, H), w13 (E, 2N, H), w2 (E, H, N); out (M, H).

    topk_weights (M, k), float32 or x's dtype, topk_ids (M, k) int32 or int64; tiles: of at most instance.tokens rows, in pairs
    where instance.cluster is 2 (moelab.pipelines.fast.tiles_for makes them). weights_on_input: weigh GEMM1's rows, before the
    activation. parts: GEMM1, GEMM2, SUM, to leave some out; where instance.apart, SUM is a launch of its own. scratch: (S, N) and
    (S, H), what GEMM1 and GEMM2 write; its own unless given. overlap: programmatic dependent launch, which sets CTAs up while the
    launch before this one ends.
    Deterministic; no host synchronisation. CTAs of a launch wait for each other, so all must be resident on the GPU at once.
    The grid is what the GPU holds alone. Launches of this process from a second stream, and from a second branch of a graph that
    is being captured, are ordered behind the first (`residency.Order`). Nobody orders a graph's replay against another graph or
    stream that holds this kernel, or against another process under MPS: do not run them at the same time. Streams of a green
    context are refused. A launch that waits for seconds all the same ends itself, and the process's CUDA context.
    Raises RuntimeModeError; KernelTimeoutError where an earlier launch of this process has ended itself.
    """
    residency.raise_if_lost()
    device = x.get_device()
    num_slots, size = topk_ids.numel(), w2.shape[2]
    out = torch.empty_like(x) if out is None else out
    direct = num_slots == x.shape[0] and parts & GEMM2 and parts & SUM  # GEMM2 writes the output
    inner, y = scratch or (x.new_empty((num_slots, size)), out if direct else x.new_empty((num_slots, x.shape[1])))
    y = out if direct else y
    rows = x.new_empty((num_slots, x.shape[1])) if instance.permutes else x
    mapped = (w13, w2, rows, inner)
    given = (x, rows, inner, y, out, topk_weights, topk_ids)
    arguments = layer_arguments(
        *given,
        tiles,
        w13.shape[0],
        parts,
        report=residency.report_of(device),
        scale=scale,
        weights_on_input=weights_on_input,
    )
    launch_layer(instance, mapped, arguments, out, topk_ids, overlap=overlap)
    return out


def launch_layer(
    instance: Instance,
    mapped: tuple[Tensor, Tensor, Tensor, Tensor],
    arguments: LayerArguments,
    out: Tensor,
    topk_ids: Tensor,
    *,
    overlap: bool,
    looks: bool = False,
) -> None:
    """The launch of those arguments on torch's current stream, behind what `residency.Order` says, and the sums' where they are
    apart. mapped: w13, w2, rows and inner, for TMA. looks: of the sums, at ids first (`sum_expression`)."""
    device, parts = out.get_device(), arguments.parts
    direct = arguments.y == arguments.out
    stream = torch.cuda.current_stream(device).cuda_stream
    if parts & (GEMM1 | GEMM2) or not instance.apart:
        loaded = _loaded(device, instance, out.dtype, WATCHED)
        maps = [spec.encode(each) for spec, each in zip(tensor_maps(instance, *mapped), mapped, strict=True)]
        parameters = (*(each.address for each in maps), ctypes.addressof(arguments))
        order = residency.order_of(device)
        with order.lock:
            waits = order.follow(stream)
            launch(loaded.function, _instance_config(instance, loaded.grid, stream, overlap and not waits), parameters)
    if instance.apart and parts & SUM and not direct:
        _, function = _loaded_sum(device, sum_expression(topk_ids.shape[1], out.dtype, topk_ids.dtype, looks=looks))
        config = launch_config(sum_ctas(*out.shape), SUM_THREADS, 0, stream, overlap)
        launch(function, config, (ctypes.addressof(arguments),))


def _instance_config(instance: Instance, grid: int, stream: int, overlap: bool) -> Any:
    return launch_config(grid, instance.threads, instance.shared_bytes, stream, overlap, instance.cluster, COOPERATIVE)
