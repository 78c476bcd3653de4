"""fused_moe(impl="fast") on a real Hopper GPU; what of it runs anywhere is in test_fast_layer.py."""

from __future__ import annotations

import statistics
from dataclasses import replace

import pytest
import torch
from fast_cases import CLUSTERS
from moe_cases import CASES, LARGE_CASES, Case, judge
from moelab.kernels.fast_decode import FewTokens

from moelab import recordings
from moelab.errors import RuntimeModeError
from moelab.fused_moe import available_implementations, fused_moe
from moelab.inputs import MoEInputs
from moelab.kernels import fast_decode
from moelab.kernels.expert_order import expert_order
from moelab.kernels.fast_instances import ALL, INSTANCES, ONE_TOKEN, Instance, instance_for
from moelab.kernels.fast_layer import GEMM1, GEMM2, SUM, fast_layer
from moelab.kernels.route import route
from moelab.pipelines import fast
from moelab.pipelines.fast import Choice, choose, route_for, tiles_for
from moelab.suites import fast_layer as fast_layer_suite

DTYPES = (torch.bfloat16, torch.float16)


def plain(case: Case) -> bool:
    """Whether the kernel does what this case asks for."""
    options = case.options
    return (
        options.get("activation", "silu") == "silu" and options.get("gated", True) and not case.bias
        and case.hidden % 8 == case.inner % 8 == 0
    )  # fmt: skip


def call(case: Case, i: MoEInputs) -> torch.Tensor:
    """In one launch, whether or not that is what serves such a batch best."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            fast,
            "choose",
            lambda tokens, top_k, experts, inner, hidden: Choice(instance_for(tokens, top_k, experts), ""),
        )
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
    some, many = choose(5, 8, 128, 768, 2048), choose(8192, 8, 128, 768, 2048)
    assert some.instance is INSTANCES[8] and some.reason.startswith("one launch: 0.312 rows an expert")
    assert many.instance is INSTANCES[176] and "512 rows" in many.reason
    few, short = choose(5, 1, 4, 256, 5120), choose(64, 8, 256, 256, 7168)
    assert few.instance is None and "classic: GEMM1 has at most 16 tiles" in few.reason
    assert short.instance is None and "classic: an inner size of 256" in short.reason
    assert choose(4096, 8, 256, 256, 7168).instance is INSTANCES[176]


def test_a_few_tokens_have_forms_of_their_own() -> None:
    one, four = choose(1, 8, 128, 768, 2048), choose(3, 8, 128, 768, 2048)
    assert one.instance == FewTokens(1) and "one launch for at most 1 token: no tiles" in one.reason
    assert four.instance == FewTokens(4) and "at most 4 tokens: no tiles" in four.reason


def test_what_has_no_form_for_a_few_tokens_goes_on() -> None:
    """More pairs than there is room for, more shared memory, more tokens, none: each as before."""
    assert choose(4, 17, 64, 768, 2048).instance is INSTANCES[8]  # 68 pairs
    assert choose(4, 4, 64, 14336, 4096).instance is INSTANCES[8]  # 448 KiB of activated rows
    assert choose(1, 8, 128, 768, 200_000).instance is ONE_TOKEN
    assert choose(0, 8, 128, 768, 2048).instance is None


def test_the_classic_layer_is_chosen_only_where_it_is_recorded_faster() -> None:
    """Faster than the form that the rule would choose: fast_layer's time of another form, times what fast_choice has
    between the two."""
    layers, forms, chosen = recordings.load("fast_layer"), recordings.load("fast_choice"), 0
    for name in fast_layer_suite.SHAPES:
        shape = fast_layer_suite.shape_of(name)
        for b in fast_layer_suite.BATCHES:
            sizes = shape.top_k, shape.num_experts, shape.moe_intermediate_size, shape.hidden_size
            if choose(b, *sizes).instance is not None:
                continue
            chosen += 1
            here = {row["impl"]: row for row in layers.select(shape=name, num_tokens=b, routing="uniform")}
            classic, fast = here["classic"], here["fast"] if "instance" in here["fast"] else here["fast, best instance"]
            times = {
                row["instance"]: statistics.median(row["samples_us"]) for row in forms.select(shape=name, num_tokens=b)
            }
            in_use = repr(instance_for(b, shape.top_k, shape.num_experts))
            one_launch = statistics.median(fast["samples_us"]) * times[in_use] / times[fast["instance"]]
            assert statistics.median(classic["samples_us"]) < one_launch, (name, b)
    assert 3 <= chosen <= 8


def test_what_is_chosen_as_classic_runs_as_the_classic_layer(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """A small batch over two small experts: its result is the classic layer's own, bit by bit."""
    monkeypatch.setattr(fast, "_check", lambda call: None)
    inputs = Case("small", 5, 2, 1, 64, 32).inputs(torch.float16, device)
    given = {"topk_weights": inputs.topk_weights, "topk_ids": inputs.topk_ids}
    assert choose(5, 1, 2, 32, 64).instance is None
    out = fused_moe(inputs.hidden_states, inputs.w13, inputs.w2, impl="fast", **given)
    assert out.equal(fused_moe(inputs.hidden_states, inputs.w13, inputs.w2, impl="triton", **given))


def test_a_few_tokens_are_routed_without_tiles(device: str) -> None:
    logits = torch.randn(3, 8, device=device)
    routed, tiles = route_for(logits, 2, FewTokens(4), 64)
    plain = route(logits, 2)
    assert tiles is None and routed.topk_ids.equal(plain.topk_ids) and routed.topk_weights.equal(plain.topk_weights)


def test_a_few_tokens_go_to_their_kernel_alone(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """With ids in int32, the scale and where the weight goes; and by a form that is asked for, whatever the batch."""
    asked = []

    def stand_in(x, w13, w2, weights, ids, form, **options):
        asked.append((ids.dtype, form, options))
        return x

    monkeypatch.setattr(fast, "_check", lambda call: None)
    monkeypatch.setattr(fast_decode, "fast_decode", stand_in)
    case = Case("scaled", 2, 6, 3, 64, 32, on_input=True, scale=2.5)
    i = case.inputs(torch.float16, device)
    given = {"topk_weights": i.topk_weights, "topk_ids": i.topk_ids.long()}
    out = fused_moe(i.hidden_states, i.w13, i.w2, impl="fast", **given, **case.options)
    assert out.equal(i.hidden_states)
    assert asked == [(torch.int32, FewTokens(2), {"scale": 2.5, "weights_on_input": True})]


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("case", [case for case in CASES + LARGE_CASES if plain(case)], ids=str)
def test_against_float64(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, "cuda")
    judge(case, inputs, call(case, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5])
def test_small_batches_as_they_are_served(num_tokens: int) -> None:
    case = Case("served", num_tokens, 16, 4, 512, 1024)
    i = case.inputs(torch.bfloat16, "cuda")
    given = {"topk_weights": i.topk_weights, "topk_ids": i.topk_ids}
    judge(case, i, fused_moe(i.hidden_states, i.w13, i.w2, impl="fast", **given))


ODD = Case("odd", 77, 12, 3, 264, 136)
FOREIGN = Case("experts of another rank", 90, 12, 3, 264, 136, foreign=True)
WIDE = Case("wide", 700, 6, 2, 1032, 520)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [ODD, FOREIGN, WIDE, replace(WIDE, routing="zipf"), Case("one", 1, 8, 2, 512, 256)], ids=str
)
@pytest.mark.parametrize("instance", (*ALL, *CLUSTERS), ids=str)
def test_every_instance_serves_every_batch(instance: Instance, case: Case) -> None:
    inputs = case.inputs(torch.bfloat16, "cuda")
    judge(case, inputs, by(instance, inputs))


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
@pytest.mark.parametrize("instance", (*ALL, *CLUSTERS), ids=str)
def test_twenty_runs_are_equal_bit_by_bit(instance: Instance) -> None:
    inputs = Case("qwen3-like", 200, 32, 8, 2048, 768).inputs(torch.bfloat16, "cuda")
    first = by(instance, inputs)
    assert all(by(instance, inputs).equal(first) for _ in range(19))


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
