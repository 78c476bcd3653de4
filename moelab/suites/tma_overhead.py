"""What the host does for one launch in eager mode: without TMA, with it in four ways, and for a whole layer.

One token of Qwen3-30B-A3B on 4 ranks, the sharding of sglang #18782, whose two savings are told apart here. The host's
time hardly depends on sizes; the GPU's is not what is measured.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import triton

from moelab import runtime
from moelab.config import default_config
from moelab.implementations import of_triton
from moelab.kernels import descriptors
from moelab.kernels.activation import activation
from moelab.kernels.align import align
from moelab.kernels.gemm_call import GemmCall, gemm_constants
from moelab.kernels.grouped_gemm import _grouped_gemm_kernel, grouped_gemm
from moelab.kernels.grouped_gemm_tma import grouped_gemm_tma
from moelab.kernels.sum_reduce import sum_reduce
from moelab.measure import HostProtocol, Measurement, measure_host
from moelab.recordings import Recording
from moelab.shapes import load_model
from moelab.suites.bench import judge
from moelab.suites.layer_classic import Layer, weight_sets
from moelab.weights import GemmWeights

MODEL, TP_SIZE, NUM_TOKENS = "qwen3-30b-a3b", 4, 1
Contender = Callable[[int], Any]


def allocator(size: int, alignment: int, stream: int | None) -> torch.Tensor:
    """Scratch memory from torch, as a server would hand to Triton."""
    return torch.empty(size, dtype=torch.int8, device=runtime.current().device)


def launches(layer: Layer) -> dict[str, Contender]:
    """One GEMM1 of the layer, by each way of launching it, and the parts of those ways alone."""
    config, k = default_config(layer.num_tokens, layer.shape.num_experts), layer.shape.top_k
    pairs, w = layer.num_tokens * k, layer.weights[0].w13
    aligned = align(layer.routings[0].topk_ids, config.BLOCK_SIZE_M, layer.shape.num_experts)
    given: dict[str, Any] = {"num_pairs": pairs, "top_k": k}
    x = layer.states[0]
    block = (config.BLOCK_SIZE_N, config.BLOCK_SIZE_K)

    def rebuilt(i: int) -> torch.Tensor:
        descriptors.clear()
        return grouped_gemm_tma(x, w, aligned, config, **given)

    def allocated(i: int) -> torch.Tensor:
        triton.set_allocator(allocator)
        return rebuilt(i)

    def descriptor(i: int) -> None:
        descriptors.clear()
        descriptors.weight_descriptor(w, block)

    return {
        "no TMA, through Triton": _through_triton(layer, aligned, config),
        "no TMA": lambda i: grouped_gemm(x, w, aligned, config, **given),
        "TMA, allocator and descriptor each call": allocated,
        "TMA, descriptor each call": rebuilt,
        "TMA, kept descriptor": lambda i: grouped_gemm_tma(x, w, aligned, config, **given),
        "set_allocator alone": lambda i: triton.set_allocator(allocator),
        "descriptor alone": descriptor,
    }


def _through_triton(layer: Layer, aligned: Any, config: Any) -> Contender:
    """The classic kernel by Triton's own launch, output and all: what grouped_gemm cost before kernels/launch.py."""
    w, k = layer.weights[0].w13, layer.shape.top_k
    N, K = w.shape[1:]
    pairs = layer.num_tokens * k
    x = layer.states[0]
    call = GemmCall(x, GemmWeights(w), aligned, config, pairs, k)
    constants, options = gemm_constants(config, K, TOP_K=k)
    grid, rows, ids = (call.num_tiles, 1), call.num_rows, call.row_tensors

    def run(i: int) -> torch.Tensor:
        out = x.new_empty((pairs, N))
        _grouped_gemm_kernel[grid](x, w, out, None, None, *ids, N, K, pairs, rows, **constants, **options)
        return out

    return run


def steps(layer: Layer) -> dict[str, Contender]:
    """The other steps of the classic layer."""
    shape = layer.shape
    pairs, dtype = layer.num_tokens * shape.top_k, layer.states[0].dtype
    config = default_config(layer.num_tokens, shape.num_experts)
    h = torch.randn(pairs, 2 * shape.moe_intermediate_size, device=layer.states[0].device).to(dtype)
    y = torch.randn(layer.num_tokens, shape.top_k, shape.hidden_size, device=h.device).to(dtype)
    ids = layer.routings[0].topk_ids
    return {
        "align": lambda i: align(ids, config.BLOCK_SIZE_M, shape.num_experts),
        "activation": lambda i: activation(h, shape.activation, gated=shape.gated),
        "sum_reduce": lambda i: sum_reduce(y),
    }


def record(protocol: HostProtocol | None = None) -> Recording:
    """Every way of launching, the other steps, and the layer through fused_moe by every pipeline, interleaved.

    Layers are checked against float64 first; a pipeline over its bound is timed all the same, and its row says so.
    Raises RuntimeModeError without a GPU, DeviceError on one without TMA.
    """
    runtime.require_cuda("the suite 'tma_overhead'")
    protocol = protocol or HostProtocol(rotations=1, rounds=160)
    shape = load_model(MODEL, tp_size=TP_SIZE, disable_shared_experts_fusion=True)
    layer = Layer(shape, NUM_TOKENS, 1, weight_sets(shape)[:1])
    layers = {name: layer.whole("default", impl=name) for name in of_triton()}
    judged = judge(layer, layers)
    kinds = {
        "launch": launches(layer),
        "step": steps(layer),
        "layer": {name: run for name, run in layers.items() if "refused" not in judged[name]},
    }
    together = {name: run for contenders in kinds.values() for name, run in contenders.items()}
    measured = measure_host(together, protocol)
    rows = [
        {**_row(kind, name, measured[name]), **(judged[name] if kind == "layer" else {})}
        for kind, contenders in kinds.items()
        for name in contenders
    ]
    about = {"shape": f"{MODEL}/tp{TP_SIZE}", "num_tokens": NUM_TOKENS, "host": runtime.processor()}
    return Recording("tma_overhead", runtime.provenance(seed=0), {**protocol.describe(), **about}, tuple(rows))


def _row(kind: str, name: str, found: Measurement) -> dict[str, Any]:
    return {"kind": kind, "name": name, "samples_us": list(found.samples_us)}
