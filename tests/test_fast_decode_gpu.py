"""fast_decode.cu on a real Hopper GPU; what of it runs anywhere is in test_fast_decode.py."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_cases import CASES, LARGE_CASES, Case, judge

from moelab.inputs import MoEInputs
from moelab.kernels import fast_decode as room
from moelab.kernels.fast_decode import ALL, FewTokens, counters_on, fast_decode, form_for

pytestmark = pytest.mark.gpu

SCOUT = Case("Scout tp4", 1, 16, 1, 5120, 2048)
REAL = [
    Case("Qwen3-30B-A3B tp1", 4, 128, 8, 2048, 768),
    replace(SCOUT, num_tokens=4),
    Case("LFM2-8B tp1", 3, 32, 4, 2048, 1792),
    Case("DeepSeek-V3 tp8", 8, 256, 8, 7168, 256),
    Case("Mixtral tp2", 4, 8, 2, 4096, 7168),
    Case("Qwen3-235B tp4", 8, 128, 8, 4096, 384),
]
ODD = [
    Case("odd sizes", 7, 5, 3, 1032, 520),
    Case("experts of another rank", 8, 12, 3, 264, 136, foreign=True),
    Case("an input weighed, a scale", 5, 6, 2, 2056, 72, on_input=True, scale=2.5),
    Case("fewer rows than blocks", 2, 3, 1, 8, 8),
]


def plain(case: Case) -> bool:
    """Whether a form takes this case."""
    silu = case.activation == "silu" and case.gated and not case.bias
    few = form_for(case.num_tokens, case.top_k, case.hidden, case.inner) is not None
    return silu and few and case.hidden % 8 == case.inner % 8 == 0


def by(form: FewTokens | None, case: Case, i: MoEInputs, **options: bool) -> torch.Tensor:
    """By that form, or with None by the one for such a batch."""
    form = form or form_for(i.topk_ids.shape[0], case.top_k, case.hidden, case.inner)
    assert form is not None
    given = (i.hidden_states, i.w13, i.w2, i.topk_weights, i.topk_ids.int(), form)
    return fast_decode(*given, scale=case.scale, weights_on_input=case.on_input, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*(each for each in CASES + LARGE_CASES if plain(each)), *ODD, *REAL], ids=str)
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, "cuda")
    judge(case, inputs, by(None, case, inputs))
    assert not counters_on(0).any()


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize(
    "form", [*ALL, replace(ALL[0], prefetch=False), FewTokens(2, stages=2), FewTokens(4, slice=1024)], ids=str
)
def test_every_form_serves_every_batch(form: FewTokens, overlap: bool) -> None:
    for num_tokens in range(1, form.tokens + 1):
        case = replace(ODD[0], num_tokens=num_tokens)
        inputs = case.inputs(torch.bfloat16, "cuda")
        judge(case, inputs, by(form, case, inputs, overlap=overlap))


def test_launches_one_after_another() -> None:
    """Each starts while the one before ends, with the same counters and often the same scratch memory."""
    case = replace(REAL[0], num_tokens=2)
    inputs = [replace(case, routing=routing).inputs(torch.bfloat16, "cuda") for routing in ("uniform", "zipf")]
    first = [by(None, case, each, overlap=False) for each in inputs]
    torch.cuda.synchronize()
    later = [by(None, case, inputs[n % 2]) for n in range(200)]
    assert all(out.equal(first[n % 2]) for n, out in enumerate(later))


@pytest.mark.parametrize("num_tokens", [1, 3, 8])
@pytest.mark.parametrize("warm", [True, False])
def test_in_a_cuda_graph_with_a_routing_that_changes(
    num_tokens: int, warm: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Captured after a launch, or with counters that the capture makes."""
    case = Case("graph", num_tokens, 16, 4, 256, 128)
    first, second = case.inputs(torch.bfloat16, "cuda"), replace(case, routing="zipf").inputs(torch.bfloat16, "cuda")
    by(None, case, first)
    torch.cuda.synchronize()
    if not warm:
        monkeypatch.setattr(room, "_counters", {})
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = by(None, case, first)
    first.topk_ids.copy_(second.topk_ids)
    first.hidden_states.copy_(second.hidden_states)
    first.topk_weights.copy_(second.topk_weights)
    for _ in range(3):
        graph.replay()
    judge(case, first, out)


@pytest.mark.parametrize("case", REAL, ids=str)
def test_twenty_runs_are_equal_bit_by_bit(case: Case) -> None:
    inputs = case.inputs(torch.bfloat16, "cuda")
    first = by(None, case, inputs)
    assert all(by(None, case, inputs).equal(first) for _ in range(19))


def test_weights_past_2_to_31_elements() -> None:
    """w13 of 2^31 + elements: the last experts lie past what an int32 offset reaches."""
    case = Case("past 2^31", 8, 260, 2, 4096, 1024)
    inputs = case.inputs(torch.bfloat16, "cuda")
    ids = torch.arange(244, 260, device="cuda", dtype=torch.int32).view(8, 2)
    inputs = replace(inputs, topk_ids=ids)
    own = replace(inputs, w13=inputs.w13[244:].clone(), w2=inputs.w2[244:].clone(), topk_ids=ids - 244)
    judge(case, own, by(None, case, inputs))
