"""The layer for a few tokens in two launches: in the interpreter, and on a GPU at the sizes of real models."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_cases import CASES, LARGE_CASES, Case, judge
from sampling import sampled

from moelab.inputs import MoEInputs
from moelab.kernels import few_tokens as module
from moelab.kernels.few_tokens import FORMS, MOST_PROGRAMS, MOST_TOKENS, FewTokens, Tile, few_tokens, serves

SMALL = FewTokens(Tile(4, 64, 4), Tile(8, 32, 2))
ODD = [
    Case("odd sizes", 4, 5, 3, 136, 72),
    Case("one element", 1, 1, 1, 8, 8),
    Case("experts of another rank", 4, 12, 3, 72, 40, foreign=True),
    Case("an input weighed, a scale", 3, 6, 2, 136, 72, on_input=True, scale=2.5),
    Case("tokens share all experts", 4, 2, 2, 64, 40),
]
REAL = [
    Case("Qwen3-30B-A3B tp1", 4, 128, 8, 2048, 768),
    Case("Scout tp4", 4, 16, 1, 5120, 2048),
    Case("LFM2-8B tp1", 3, 32, 4, 2048, 1792),
    Case("DeepSeek-V3 tp8", 2, 256, 8, 7168, 256),
    Case("Mixtral tp2", 1, 8, 2, 4096, 7168),
    Case("Qwen3-235B tp4", 4, 128, 8, 4096, 384),
]


def plain(case: Case) -> bool:
    """Whether the kernel does what this case asks for."""
    silu = case.activation == "silu" and case.gated and not case.bias
    return silu and case.hidden % 8 == case.inner % 8 == 0 and case.num_tokens <= 40


def by(form: FewTokens, case: Case, i: MoEInputs, **options: bool) -> torch.Tensor:
    given = (i.hidden_states, i.w13, i.w2, i.topk_weights, i.topk_ids.int(), form)
    return few_tokens(*given, scale=case.scale, weights_on_input=case.on_input, **options)


@pytest.mark.parametrize(("case", "dtype"), sampled(ODD, [torch.float16, torch.float32], together=1), ids=str)
def test_the_layer_is_right(case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = case.inputs(dtype, device)
    judge(case, inputs, by(SMALL, case, inputs, overlap=False))


def test_programs_may_run_side_by_side_or_not(device: str) -> None:
    """Bit by bit the same: who runs beside whom changes no sum."""
    case = ODD[-1]
    inputs = case.inputs(torch.float16, device)
    found = [by(SMALL, case, inputs, overlap=False, side_by_side=each) for each in (True, False)]
    assert found[0].equal(found[1])


def test_ids_that_are_no_experts_here_count_nothing(device: str) -> None:
    case = Case("ids", 3, 3, 2, 64, 40)
    inputs = case.inputs(torch.float32, device)
    past = torch.tensor([[3, 0], [-1, 2], [-1, 9]], dtype=torch.int32, device=device)
    foreign = torch.where((past < 0) | (past >= 3), -1, past)
    found = by(SMALL, case, replace(inputs, topk_ids=past), overlap=False)
    judge(case, replace(inputs, topk_ids=foreign), found)
    assert not found[2].any()


def test_a_weight_that_is_not_a_number_stays_with_its_expert(device: str) -> None:
    """The first expert stands in for ids that count nothing: what it holds must not show."""
    case = Case("nan", 1, 2, 2, 64, 40)
    inputs = case.inputs(torch.float32, device)
    inputs.w2[0] = inputs.w13[0] = float("nan")
    found = by(SMALL, case, replace(inputs, topk_ids=torch.tensor([[-1, 1]], device=device).int()), overlap=False)
    assert found.isfinite().all()


@pytest.mark.parametrize("on_input", [False, True])
@pytest.mark.parametrize("wide", [torch.int32, torch.int64], ids=str)
def test_an_id_of_no_expert_adds_nothing_whatever_its_weight(on_input: bool, wide: torch.dtype, device: str) -> None:
    """Issue 16, faults 1 and 12: NaN and Inf at ids of -1, an id past int32, NaN in an expert and a token that nobody has."""
    case = Case("ids", 4, 4, 2, 32, 16, on_input=on_input)
    i = case.inputs(torch.float32, device)
    past = 2**32 + 1 if wide == torch.int64 else 5
    ids = torch.tensor([[0, -1], [2, past], [-1, -1], [past, 2]], dtype=wide, device=device)
    weights = i.topk_weights.clone()
    weights[0, 1] = weights[1, 1] = float("nan")
    weights[2] = weights[3, 0] = float("inf")
    clean = replace(i, topk_ids=torch.where((ids < 0) | (ids > 3), -1, ids).int(), topk_weights=i.topk_weights)
    w13, w2, x = i.w13.clone(), i.w2.clone(), i.hidden_states.clone()
    w13[[1, 3]] = w2[[1, 3]] = x[2] = float("nan")
    found = few_tokens(x, w13, w2, weights, ids, SMALL, weights_on_input=on_input, overlap=False)
    judge(case, clean, found)
    assert not found[2].any()


@pytest.mark.gpu
@pytest.mark.parametrize("scales", [(2, 2.5), (2.5, 2), (True, 2.5)])
def test_a_scale_may_be_an_int_and_then_a_float(scales: tuple[float, ...]) -> None:
    """The compiled instance of the first call serves the second: an int at first was a TypeError for every float after it."""
    case = Case("scales", 3, 3, 2, 64 + 8 * int(2 * scales[0]), 40)
    i = case.inputs(torch.bfloat16, "cuda")
    for scale in scales:
        judge(replace(case, scale=scale), i, by(FORMS[0], replace(case, scale=scale), i))


def test_the_launcher_is_given_a_scale_in_float(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a test without a GPU can see of the above: the type that a compiled instance is kept for."""
    given = []
    launch = module._down
    monkeypatch.setattr(module, "_down", lambda *a: given.append(a[3][1]) or launch(*a))
    case = Case("scale", 1, 2, 1, 64, 40)
    for scale in (2, 2.5, True):
        by(SMALL, replace(case, scale=scale), case.inputs(torch.float32, device), overlap=False)
    assert given == [2.0, 2.5, 1.0] and {type(each) for each in given} == {float}


def test_who_has_a_form() -> None:
    """Unless programs grow too long to unroll or too many, and up to as many tokens as are recorded."""
    served = [serves(FORMS[0], tokens, 8, 2048, 768) for tokens in (0, 1, MOST_TOKENS, MOST_TOKENS + 1)]
    assert served == [False, True, True, False]
    assert serves(FORMS[0], 1, 8, 2048, 512 * 32) and not serves(FORMS[0], 1, 8, 2048, 512 * 32 + 8)
    assert serves(FORMS[0], 1, 1, 64, MOST_PROGRAMS) and not serves(FORMS[0], 1, 1, 64, MOST_PROGRAMS + 1)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("case", [*(c for c in CASES + LARGE_CASES if plain(c)), *ODD, *REAL], ids=str)
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, "cuda")
    form = next(
        (form for form in FORMS if serves(form, case.num_tokens, case.top_k, case.hidden, case.inner)), FORMS[0]
    )
    judge(case, inputs, by(form, case, inputs, overlap=True))


@pytest.mark.gpu
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("form", FORMS, ids=str)
def test_every_form_serves_every_batch(form: FewTokens, overlap: bool) -> None:
    for num_tokens in range(1, 9):
        case = replace(ODD[0], num_tokens=num_tokens)
        inputs = case.inputs(torch.bfloat16, "cuda")
        judge(case, inputs, by(form, case, inputs, overlap=overlap))
        judge(case, inputs, by(replace(form, early=0), case, inputs, overlap=overlap, side_by_side=False))


@pytest.mark.gpu
def test_launches_one_after_another() -> None:
    """Each is set up while the one before ends, and often has the same scratch memory."""
    case = replace(REAL[0], num_tokens=2)
    inputs = [replace(case, routing=routing).inputs(torch.bfloat16, "cuda") for routing in ("uniform", "zipf")]
    first = [by(FORMS[0], case, each, overlap=False) for each in inputs]
    torch.cuda.synchronize()
    later = [by(FORMS[0], case, inputs[n % 2], overlap=True) for n in range(200)]
    assert all(out.equal(first[n % 2]) for n, out in enumerate(later))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 3])
def test_in_a_cuda_graph_with_a_routing_that_changes(num_tokens: int) -> None:
    case = Case("graph", num_tokens, 16, 4, 256, 128)
    first, second = case.inputs(torch.bfloat16, "cuda"), replace(case, routing="zipf").inputs(torch.bfloat16, "cuda")
    by(FORMS[0], case, first, overlap=True)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = by(FORMS[0], case, first, overlap=True)
    first.topk_ids.copy_(second.topk_ids)
    first.hidden_states.copy_(second.hidden_states)
    first.topk_weights.copy_(second.topk_weights)
    for _ in range(3):
        graph.replay()
    judge(case, replace(first, topk_ids=first.topk_ids), out)


@pytest.mark.gpu
@pytest.mark.parametrize("case", REAL, ids=str)
def test_twenty_runs_are_equal_bit_by_bit(case: Case) -> None:
    inputs = case.inputs(torch.bfloat16, "cuda")
    first = by(FORMS[0], case, inputs, overlap=True)
    assert all(by(FORMS[0], case, inputs, overlap=True).equal(first) for _ in range(19))


@pytest.mark.gpu
def test_weights_past_2_to_31_elements() -> None:
    """w13 of 2^31 + elements: the last experts lie past what an int32 offset reaches."""
    case = Case("past 2^31", 4, 260, 2, 4096, 1024)
    inputs = case.inputs(torch.bfloat16, "cuda")
    ids = torch.arange(252, 260, device="cuda", dtype=torch.int32).view(4, 2)
    inputs = replace(inputs, topk_ids=ids)
    own = replace(inputs, w13=inputs.w13[252:].clone(), w2=inputs.w2[252:].clone(), topk_ids=ids - 252)
    judge(case, own, by(FORMS[0], case, inputs, overlap=True))
