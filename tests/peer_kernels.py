"""The compatible kernels of quantised weights beside sglang's own, on an NVIDIA GPU: same config, same problem, one run.

    python tests/peer_kernels.py PATH/fused_moe_triton_kernels.py [--models deepseek-v3/8/8 ...] [--batches 1 16 ...]

PATH: sglang 0.5.23's kernels, out of its published wheel (sglang/kernels/ops/moe); nothing of it lies here. What it imports from
its package is replaced by answers for Hopper. One grouped product at a time (GEMM1, or GEMM2 with the routed weight), its codes,
scales and alignment made beforehand, in a CUDA graph over rotated weights and routings, both interleaved. Prints microseconds of
both, the ratio, ours over theirs, how far apart their results are, and the ratio's geometric mean by format. The recording, by
default data/recordings/peer_kernels.json, is written after each product.
"""

from __future__ import annotations

import argparse
import importlib.util
import math
import statistics
import sys
import types
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import torch
import triton.language as tl

from moelab import recordings, runtime
from moelab.config import KernelConfig
from moelab.inputs import random_tensor, routing_for
from moelab.kernels.align import align
from moelab.kernels.gemm_call import GemmCall, swaps_operands
from moelab.kernels.quantise_activations import quantise_activations
from moelab.kernels.quantised import GEMMS
from moelab.measure import measure, rotations_for
from moelab.pipelines.call_configs import default_of
from moelab.recordings import Recording
from moelab.shapes import load_model
from moelab.suites.layer_classic import protocol_for
from moelab.suites.stages import weight_sets

FORMATS = (
    "fp8_w8a8_block_128x128",
    "fp8_w8a8_channel",
    "int8_w8a8_channel",
    "int8_w8a16_channel",
    "int4_w4a16_group_128",
)
MODELS = {
    "deepseek-v3/8": FORMATS, "qwen3-30b-a3b/1": FORMATS, "glm-4.5-air/1": FORMATS[:1], "deepseek-v3/8/8": FORMATS[:1]
}  # fmt: skip
"""What is recorded: the layers of data/upstream/h200_fp8_sglang.json in blocks, the first two in every format."""
TILES = {16: (16, 64, 128, 1, 4, 4), 64: (64, 128, 128, 16, 4, 3)}
"""By BLOCK_SIZE_M: for few rows an expert, and for many."""


def peer(path: Path) -> Any:
    """sglang's module of kernels, what it imports from its own package replaced."""
    answers = {"is_cuda": True, "is_sm90_supported": True, "is_arch_support_pdl": True}

    def answer(name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return types.SimpleNamespace(SGLANG_USE_AITER=types.SimpleNamespace(get=lambda: False)) if name == "envs" else (
            lambda *_, **__: answers.get(name, 0)
        )  # fmt: skip

    for name in (
        "sglang", "sglang.kernels", "sglang.kernels.jit", "sglang.kernels.jit.utils", "sglang.kernels.ops",
        "sglang.kernels.ops.quantization", "sglang.kernels.ops.quantization.fp8_kernel",
        "sglang.kernels.ops.quantization.int8_kernel", "sglang.srt", "sglang.srt.batch_invariant_ops", "sglang.srt.environ",
        "sglang.srt.layers", "sglang.srt.layers.moe", "sglang.srt.layers.moe.utils", "sglang.srt.utils",
    ):  # fmt: skip
        module = types.ModuleType(name)
        module.__path__ = []
        module.__getattr__ = answer  # type: ignore[method-assign]
        sys.modules[name] = module
    spec = importlib.util.spec_from_file_location("peer_kernels_of_sglang", path)
    assert spec and spec.loader
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found
    spec.loader.exec_module(found)
    return found


def theirs(module: Any, call: GemmCall, out: torch.Tensor) -> None:
    """The launch that sglang 0.5.23's invoke_fused_moe_kernel makes of the call."""
    w, (N, K), config, format = call.weights, call.sizes, call.config, call.weights.format
    ids, experts, padded = call.row_tensors
    ids = ids[: call.num_rows]
    grid = (call.num_tiles,)
    tile = {k: v for k, v in config.to_json().items() if k != "SPLIT_K"}
    common = {
        "MUL_ROUTED_WEIGHT": call.topk_weights is not None, "top_k": call.top_k, "compute_type": tl.bfloat16,
        "even_Ks": K % config.BLOCK_SIZE_K == 0,
    }  # fmt: skip
    factors, scale = call.topk_weights if call.topk_weights is not None else call.a, w.scale
    assert scale is not None
    if format.granularity == "group":
        module.fused_moe_kernel_gptq_awq[grid](
            call.a, w.w, out, scale, w.zero_point, factors, ids, experts, padded, N, K, ids.shape[0], call.num_pairs,
            *call.a.stride(), w.w.stride(0), w.w.stride(2), w.w.stride(1), *out.stride(), scale.stride(0), scale.stride(2),
            scale.stride(1), 0, 0, 0, group_size=format.sizes[0], has_zp=False, use_int4_w4a16=format.bits == 4,
            use_int8_w8a16=format.bits == 8, **common, **tile,
        )  # fmt: skip
        return
    a_scale, block = call.a_scale, format.granularity == "block"
    by_row = a_scale.stride() if a_scale is not None else (0, 0)
    blocks = (scale.stride(0), scale.stride(2), scale.stride(1)) if block else (scale.stride(0), 0, scale.stride(1))
    few = call.a.shape[0] <= 512
    module.fused_moe_kernel[grid](
        call.a, None, w.w, None, None, out, a_scale, scale, factors, ids, experts, padded, None, N, K, ids.shape[0],
        call.num_pairs, *call.a.stride(), w.w.stride(0), w.w.stride(2), w.w.stride(1), 0, 0, *out.stride(), *by_row, *blocks,
        *(format.sizes if block else (0, 0)), use_fp8_w8a8=format.family.startswith("fp8"),
        use_int8_w8a8=format.family.startswith("int8_w8a8"), use_int8_w8a16=format.family == "int8_w8a16_channel",
        per_channel_quant=format.per_channel_quant, c_sorted=False, swap_ab=swaps_operands(call), FUSE_ADD_TO_OUTPUT=False,
        MASK_OUTPUT=False, FUSE_SUM_ALL_REDUCE=False, ROUTER_TOPK=1, USE_GDC=True, launch_pdl=True, GDC_EARLY=few, **common,
        **tile,
    )  # fmt: skip


def cell(module: Any, shape: Any, which: str, batch: int, config: KernelConfig, sets: list[Any]) -> dict[str, Any]:
    """One product: samples of both, and the largest difference over the largest value."""
    pairs, format = batch * shape.top_k, shape.format
    top_k, K = (shape.top_k, shape.hidden_size) if which == "up" else (1, shape.moe_intermediate_size)
    weight_bytes = sets[0].w.numel() * min(1.0, pairs / shape.num_experts)
    count = max(len(sets), rotations_for(weight_bytes, at_least=1, at_most=32))
    calls = []
    for i in range(count):
        routing = routing_for(shape, batch, seed=i, device="cuda")
        x = random_tensor((pairs // top_k, K), 1.0, dtype=torch.bfloat16, device="cuda", seed=100 + i)
        a, a_scale = (x, None) if format.activations == "none" else quantise_activations(x, format)
        factors = routing.topk_weights if which == "down" else None
        aligned = align(routing.topk_ids, config.BLOCK_SIZE_M, shape.num_experts)
        calls.append(GemmCall(a, sets[i % len(sets)], aligned, config, pairs, top_k, factors, a_scale=a_scale))
    out = [torch.full((pairs, calls[0].sizes[0]), float("nan"), dtype=torch.bfloat16, device="cuda") for _ in range(2)]
    check, launch = GEMMS[format.family]
    check(calls[0], out[0])
    launch(calls[0], out[0])
    theirs(module, calls[0], out[1])
    apart = ((out[0].float() - out[1].float()).abs().max() / out[0].float().abs().max()).item()
    protocol = replace(protocol_for(batch), rotations=count, rounds=15)

    def ours(i: int) -> torch.Tensor:
        launch(calls[i], out[0])
        return out[0]

    def peers(i: int) -> torch.Tensor:
        theirs(module, calls[i], out[1])
        return out[1]

    found = measure({"ours": ours, "sglang": peers}, protocol)
    return {name: one.samples_us for name, one in found.items()} | {"apart": apart}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="preset/tp_size[/ep_size]")
    parser.add_argument("--formats", nargs="+", help="default: those of MODELS")
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 256, 1024, 4096])
    parser.add_argument("--out", type=Path)
    asked = parser.parse_args()
    module, rows, logs = peer(asked.path), list[dict[str, Any]](), dict[str, list[float]]()
    protocol = {
        **protocol_for(1).describe(),
        "rotations": "in each row",
        "sglang": "0.5.23, its kernels out of its wheel",
    }
    every = [(model, name) for model in asked.models for name in asked.formats or MODELS.get(model, FORMATS)]
    for (model, name), which in product(every, ("up", "down")):
        preset, *sizes = model.split("/")
        tp_size, ep_size = (int(size) for size in (*sizes, "1")[:2])
        plain = load_model(
            preset, tp_size=tp_size, ep_size=ep_size, dtype="bfloat16", disable_shared_experts_fusion=True
        )  # fmt: skip
        shape = replace(plain, format=name)
        sets = weight_sets(which, shape)
        for batch in asked.batches:
            many = batch * shape.top_k / shape.num_experts > 24
            configs = {
                "default": default_of(shape.num_experts, shape.moe_intermediate_size, batch, shape.format),
                "tile": KernelConfig(*TILES[64 if many else 16]),
            }
            for label, config in configs.items():
                found = cell(module, shape, which, batch, config, sets)
                row = {"shape": model, "format": name, "gemm": which, "num_tokens": batch, "config_name": label,
                       "config": config.to_json(), "apart": found["apart"]}  # fmt: skip
                rows += [{**row, "impl": impl, "samples_us": found[impl]} for impl in ("ours", "sglang")]
                ours, theirs = (statistics.median(found[impl]) for impl in ("ours", "sglang"))
                logs.setdefault(name, []).append(math.log(ours / theirs))
                print(
                    f"{model:18} {name:24} {which:4} {batch:5} {label:8} {ours:9.2f} {theirs:9.2f} us {ours / theirs:.3f}"
                    f"  apart {found['apart']:.1e}",
                    flush=True,
                )
        recordings.write(Recording("peer_kernels", runtime.provenance(seed=0), protocol, tuple(rows)), asked.out)
        del sets
        torch.cuda.empty_cache()
    for name, of in logs.items():
        print(f"{name}: ours over sglang's, geometric mean of {len(of)}: {math.exp(statistics.mean(of)):.3f}")


if __name__ == "__main__":
    main()
