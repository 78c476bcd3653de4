"""Every kernel once, at small odd shapes: what `make sanitize` runs under NVIDIA's compute-sanitizer.

A caching allocator would hide an access past a tensor's end, so PYTORCH_NO_CUDA_MEMORY_CACHING=1 goes with it.
"""

from __future__ import annotations

from dataclasses import replace

import torch
from moe_cases import CASES, TILE, Case

from moelab.call import MoECall
from moelab.config import KernelConfig
from moelab.formats import FORMATS, PLAIN
from moelab.fused_moe import fused_moe
from moelab.implementations import IMPLEMENTATIONS, LayerKind, taking
from moelab.inputs import make_inputs
from moelab.kernels import checks, fast_instances, few_tokens
from moelab.kernels.align import align, align_pairs, moe_align_block_size
from moelab.kernels.expert_order import expert_order
from moelab.kernels.fast_layer import fast_layer
from moelab.kernels.route import route
from moelab.kernels.split_k_atomic import split_k_atomic_out
from moelab.kernels.sum_reduce import SUM_REDUCE, sum_reduce
from moelab.kernels.weight_only import Cut, WeightOnly, not_taken
from moelab.pipelines.fast import tiles_for
from moelab.pipelines.fast_quantised import coded_pipeline
from moelab.pipelines.weight_only import weight_only_pipeline
from moelab.routing import make_routing
from moelab.shapes import MoEShape


def layers() -> None:
    """The kernel pipelines that this chip has, on every case of the tests, in bfloat16 and float32."""
    for case in CASES:
        for dtype in (torch.bfloat16, torch.float32):
            i = case.inputs(dtype, "cuda")
            blocks = min(-(-size // TILE.BLOCK_SIZE_K) for size in (case.hidden, case.inner))
            kind = LayerKind(
                str(dtype).removeprefix("torch."),
                PLAIN,
                case.activation,
                case.gated,
                case.bias,
                case.hidden,
                case.inner,
            )
            for impl in taking(kind, checks.current_target()):
                if not IMPLEMENTATIONS[impl].triton:
                    continue
                config = replace(TILE, SPLIT_K=min(2, blocks) if IMPLEMENTATIONS[impl].splits else 1)
                fused_moe(
                    i.hidden_states, i.w13, i.w2, topk_weights=i.topk_weights, topk_ids=i.topk_ids, b13=i.b13, b2=i.b2,
                    impl=impl, config=config, **case.options,
                )  # fmt: skip


def parts() -> None:
    """What the pipelines do not reach: large alignments, routing, the output-dtype atomics, every sum-reduce."""
    for num_tokens, num_experts, top_k in ((1, 9, 2), (40, 7, 3), (701, 6, 3)):
        ids = make_routing("zipf", num_tokens, num_experts, top_k, device="cuda").topk_ids
        for way in (align_pairs, moe_align_block_size):
            way(torch.where(ids == 1, -1, ids), 16, num_experts)
        expert_order(torch.where(ids == 1, -1, ids), num_experts)
        logits = torch.randn(num_tokens, 3 * num_experts, device="cuda")
        route(logits, top_k, local_experts=range(1, num_experts))
        route(logits.bfloat16(), top_k, score="sigmoid", correction_bias=logits[0], num_groups=3, top_k_groups=2)
    case = CASES[5]
    i = case.inputs(torch.bfloat16, "cuda")
    aligned = align(i.topk_ids, TILE.BLOCK_SIZE_M, case.num_experts)
    pairs = i.topk_ids.numel()
    split_k_atomic_out(i.hidden_states, i.w13, aligned, replace(TILE, SPLIT_K=2), num_pairs=pairs, top_k=case.top_k)
    for size in ((1, 1, 1), (3, 1, 511), (7, 9, 264), (5, 40, 33), (1025, 2, 24)):
        x = torch.randn(size, device="cuda").bfloat16()
        for impl in ("triton", "triton_f32", "cuda"):
            assert impl in SUM_REDUCE
            sum_reduce(x, 0.3, impl=impl)


def hopper() -> None:
    """What `impl="fast"` runs beside those kernels, where the chip is a Hopper: the few tokens' form, and every compiled one."""
    target = checks.current_target()
    if target is None or target.name != "sm_90":
        return
    # The last but one has two tiles an expert, for pairs to share; the last more slots than are added up at once.
    sizes = ((1, 9, 2, 136, 72), (4, 7, 3, 264, 40), (77, 12, 3, 264, 136), (400, 2, 1, 264, 136), (30, 12, 9, 136, 72))
    for num_tokens, num_experts, top_k, hidden, size in sizes:
        i = Case("odd", num_tokens, num_experts, top_k, hidden, size).inputs(torch.bfloat16, "cuda")
        ids = i.topk_ids.int()
        if num_tokens <= 4:
            for form in few_tokens.FORMS:
                few_tokens.few_tokens(i.hidden_states, i.w13, i.w2, i.topk_weights, ids, form)
        for instance in fast_instances.ALL:
            tiles = tiles_for(expert_order(ids, num_experts), instance)
            fast_layer(i.hidden_states, i.w13, i.w2, i.topk_weights, ids, tiles, instance)


def quantised() -> None:
    """Every format through every implementation that takes it, with ids of other ranks; each form of the weight-only layer."""
    cut, turned = Cut(2, 4, 2), Cut(2, 4, 1, 3)
    forms = (WeightOnly(cut, cut), WeightOnly(cut, turned, True), WeightOnly(turned, cut, True, 16))
    for format in FORMATS.values():
        if format.is_plain or format.activations == "static":
            continue
        whole = format.sizes[-1] if format.sizes else 32
        for num_tokens, hidden, size in ((1, 96, 160), (5, 256, 128), (37, 2 * whole, 3 * whole)):
            if not_taken(format, hidden, size) or format.misfits(hidden, size):
                continue
            i = make_inputs(MoEShape("odd", 5, 2, hidden, size, format=format), num_tokens, device="cuda")
            i.topk_ids[0, 1] = -1
            routing = {"topk_weights": i.topk_weights, "topk_ids": i.topk_ids}
            step = min(whole, 64) if format.granularity == "block" else 32
            for impl in taking(LayerKind("bfloat16", format), checks.current_target()):
                config = KernelConfig(16, 2 * min(whole, 32), step, 1) if IMPLEMENTATIONS[impl].triton else None
                fused_moe(i.hidden_states, i.weights, **routing, impl=impl, config=config)
                if impl == "fast":
                    for instance in fast_instances.ALL_CODED:
                        call = MoECall(i.hidden_states, i.weights, i.topk_weights, i.topk_ids)
                        coded_pipeline(call, instance)
                if impl == "weight_only":
                    for form in forms:
                        weight_only_pipeline(MoECall(i.hidden_states, i.weights, i.topk_weights, i.topk_ids), form)


if __name__ == "__main__":
    layers()
    parts()
    hopper()
    quantised()
    torch.cuda.synchronize()
    print("every kernel ran")
