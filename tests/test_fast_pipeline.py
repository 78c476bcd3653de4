"""fused_moe(impl="fast") on a real Hopper GPU; what of it runs anywhere is in test_fast_layer.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_cases import CASES, LARGE_CASES, Case, judge

from moelab.errors import RuntimeModeError
from moelab.fused_moe import available_implementations, fused_moe
from moelab.inputs import MoEInputs
from moelab.kernels.expert_order import expert_order
from moelab.kernels.fast_instances import INSTANCES, Instance
from moelab.kernels.fast_layer import GEMM1, GEMM2, SUM, fast_layer
from moelab.pipelines.fast import choose, tiles_for

DTYPES = (torch.bfloat16, torch.float16)


def plain(case: Case) -> bool:
    """Whether the kernel does what this case asks for."""
    options = case.options
    return (
        options.get("activation", "silu") == "silu" and options.get("gated", True) and not case.bias
        and case.hidden % 8 == case.inner % 8 == 0
    )  # fmt: skip


def call(case: Case, i: MoEInputs) -> torch.Tensor:
    return fused_moe(
        i.hidden_states, i.w13, i.w2, topk_weights=i.topk_weights, topk_ids=i.topk_ids, impl="fast", **case.options
    )


def by(instance: Instance, i: MoEInputs, **options: object) -> torch.Tensor:
    ids = i.topk_ids.int()
    tiles = tiles_for(expert_order(ids, i.w13.shape[0]), instance, i.w2.shape[1])
    return fast_layer(i.hidden_states, i.w13, i.w2, i.topk_weights, ids, tiles, instance, **options)


def test_elsewhere_it_says_so(device: str) -> None:
    assert "fast" not in available_implementations(torch.float16)  # experimental: by name only
    if device == "cuda":
        return
    inputs = CASES[1].inputs(torch.float16, device)
    with pytest.raises(RuntimeModeError, match="Expected a Hopper GPU"):
        call(CASES[1], inputs)


def test_a_choice_says_why() -> None:
    assert choose(1, 8, 128).instance is INSTANCES[8] and "0.0625 rows an expert" in choose(1, 8, 128).reason
    assert choose(8192, 8, 128).instance is INSTANCES[176] and "512 rows" in choose(8192, 8, 128).reason


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES + LARGE_CASES if plain(case)], ids=str)
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, "cuda")
    judge(case, inputs, call(case, inputs))


ODD = Case("odd", 77, 12, 3, 264, 136)
FOREIGN = Case("experts of another rank", 90, 12, 3, 264, 136, foreign=True)
WIDE = Case("wide", 700, 6, 2, 1032, 520)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [ODD, FOREIGN, WIDE, replace(WIDE, routing="zipf"), Case("one", 1, 8, 2, 512, 256)], ids=str
)
@pytest.mark.parametrize("most", INSTANCES)
def test_every_instance_serves_every_batch(most: int, case: Case) -> None:
    inputs = case.inputs(torch.bfloat16, "cuda")
    judge(case, inputs, by(INSTANCES[most], inputs))


@pytest.mark.gpu
def test_in_parts() -> None:
    inputs = WIDE.inputs(torch.bfloat16, "cuda")
    slots, (hidden, size) = inputs.topk_ids.numel(), inputs.w2.shape[1:]
    x = inputs.hidden_states
    scratch = (x.new_empty((slots, size)), x.new_empty((slots, hidden)))
    whole = by(INSTANCES[96], inputs)
    for parts in (GEMM1, GEMM2, SUM):
        out = by(INSTANCES[96], inputs, parts=parts, scratch=scratch)
    assert out.equal(whole)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3, 64, 600])
def test_in_a_cuda_graph_with_a_routing_that_changes(num_tokens: int) -> None:
    case = Case("graph", num_tokens, 16, 4, 256, 128)
    first, second = case.inputs(torch.bfloat16, "cuda"), replace(case, routing="zipf").inputs(torch.bfloat16, "cuda")
    call(case, first)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(case, first)
    first.topk_ids.copy_(second.topk_ids)
    first.hidden_states.copy_(second.hidden_states)
    for _ in range(3):
        graph.replay()
    judge(case, first, out)


@pytest.mark.gpu
@pytest.mark.parametrize("most", INSTANCES)
def test_twenty_runs_are_equal_bit_by_bit(most: int) -> None:
    inputs = Case("qwen3-like", 200, 32, 8, 2048, 768).inputs(torch.bfloat16, "cuda")
    first = by(INSTANCES[most], inputs)
    assert all(by(INSTANCES[most], inputs).equal(first) for _ in range(19))


@pytest.mark.gpu
def test_outputs_past_2_to_31_elements() -> None:
    """GEMM2's output (M * k, H) of 2^31 + elements; the last tokens are checked."""
    case = Case("rows past 2^31", 70_000, 4, 4, 8192, 64)
    inputs = case.inputs(torch.bfloat16, "cuda")
    out = call(case, inputs)[-32:]
    tail = replace(
        inputs, hidden_states=inputs.hidden_states[-32:], topk_ids=inputs.topk_ids[-32:],
        topk_weights=inputs.topk_weights[-32:],
    )  # fmt: skip
    judge(case, tail, out)


@pytest.mark.gpu
def test_weights_past_2_to_31_elements() -> None:
    """w13 of 2^31 + elements: the last experts lie past what an int32 offset reaches."""
    case = Case("past 2^31", 16, 260, 2, 4096, 1024)
    inputs = case.inputs(torch.bfloat16, "cuda")
    ids = torch.arange(228, 260, device="cuda", dtype=torch.int32).view(16, 2)
    inputs = replace(inputs, topk_ids=ids)
    own = replace(inputs, w13=inputs.w13[228:].clone(), w2=inputs.w2[228:].clone(), topk_ids=ids - 228)
    judge(case, own, call(case, inputs))
