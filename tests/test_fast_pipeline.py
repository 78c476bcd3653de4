"""fused_moe(impl="fast") on a real Hopper GPU; what of it runs anywhere is in test_fast_layer.py."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from moe_cases import CASES, LARGE_CASES, Case, judge

from moelab import recordings, runtime
from moelab.config import KernelConfig
from moelab.config_files import read_config_file
from moelab.errors import RuntimeModeError
from moelab.fused_moe import available_implementations, fused_moe
from moelab.inputs import MoEInputs
from moelab.kernels.expert_order import expert_order
from moelab.kernels.fast_instances import (
    ALL,
    CLUSTERED,
    INSTANCES,
    PERMUTED,
    Instance,
    instance_for,
)
from moelab.kernels.fast_layer import GEMM1, GEMM2, SUM, fast_layer
from moelab.kernels.few_tokens import FORMS
from moelab.measure import tie
from moelab.pipelines import fast
from moelab.pipelines.fast import Gated, choose, choose_for, tiles_for, tuned_gated
from moelab.plots.panel import timing
from moelab.shapes import MoEShape
from moelab.suites import fast_layer as fast_layer_suite

DTYPES = (torch.bfloat16, torch.float16)


def plain(case: Case) -> bool:
    """Whether the kernel does what this case asks for."""
    options = case.options
    return (
        options.get("activation", "silu") == "silu" and options.get("gated", True) and not case.bias
        and case.hidden % 8 == case.inner % 8 == 0
    )  # fmt: skip


def served(case: Case, i: MoEInputs) -> torch.Tensor:
    """As a user gets it: by the form that is chosen for the batch, under the tuned files of this device."""
    return fused_moe(
        i.hidden_states, i.w13, i.w2, topk_weights=i.topk_weights, topk_ids=i.topk_ids, impl="fast", **case.options
    )


def by(instance: Instance, i: MoEInputs, **options: object) -> torch.Tensor:
    tiles = tiles_for(expert_order(i.topk_ids, i.w13.shape[0]), instance)
    return fast_layer(i.hidden_states, i.w13, i.w2, i.topk_weights, i.topk_ids, tiles, instance, **options)


def in_one_launch(case: Case, i: MoEInputs) -> torch.Tensor:
    """Whether or not that is what serves such a batch best."""
    instance = instance_for(case.num_tokens, case.top_k, case.num_experts, case.inner)
    return by(instance, i, scale=case.scale, weights_on_input=case.on_input)


QWEN3, SCOUT = (128, 8, 2048, 768), (16, 1, 5120, 2048)
SERVED = [
    (Case("one token", 1, *QWEN3), FORMS[0]),
    (Case("a few tokens", 4, *QWEN3), FORMS[1]),
    (Case("tuned configs for six tokens", 6, *QWEN3), "gated_tma"),
    (Case("tuned configs, skewed", 64, *QWEN3, routing="zipf"), "gated_tma"),
    (Case("tuned configs, experts of another rank", 33, *QWEN3, foreign=True, scale=2.5), "gated_tma"),
    (Case("too few tiles", 5, 4, 1, 512, 256), None),
    (Case("no tuned file, few rows", 21, 24, 4, 1032, 640), INSTANCES[16]),
    (Case("a third of few experts elsewhere", 129, *SCOUT, foreign=True), INSTANCES[16]),
    (Case("no tuned file, twenty rows", 120, 24, 4, 264, 640, routing="zipf", scale=2.5), INSTANCES[48]),
    (Case("64 rows", 1024, *QWEN3, routing="zipf"), INSTANCES[96]),
    (Case("128 rows, weights on the input", 1024, 8, 1, 1032, 520, on_input=True), INSTANCES[176]),
    (Case("256 rows", 4096, *QWEN3), CLUSTERED),
    (Case("512 rows, experts of another rank", 8192, *QWEN3, foreign=True), PERMUTED),
]
"""A batch for each form, and what serves it on the device of the recordings."""


def ids_of(cases: list[tuple[Case, object]]) -> list[str]:
    return [str(case) for case, _ in cases]


@pytest.mark.parametrize(("case", "form"), SERVED, ids=ids_of(SERVED))
def test_each_form_serves_a_case(case: Case, form: object) -> None:
    """So that the comparison of these with float64, on a GPU, has them all."""
    shape = MoEShape.from_sizes(
        num_experts=case.num_experts, top_k=case.top_k, hidden_size=case.hidden, moe_intermediate_size=case.inner
    )
    found = choose_for(shape, case.num_tokens, None, "NVIDIA H200", "3.6.0").form
    assert ("gated_tma" if isinstance(found, Gated) else found) == form
    assert {each for _, each in SERVED if isinstance(each, Instance)} == set(ALL)


def test_elsewhere_it_says_so(device: str) -> None:
    assert "fast" not in available_implementations(torch.float16)  # by name only
    if device == "cuda":
        return
    inputs = CASES[1].inputs(torch.float16, device)
    with pytest.raises(RuntimeModeError, match="Expected a Hopper GPU"):
        served(CASES[1], inputs)


TILE = KernelConfig(16, 32, 32, 1, 4, 2)


def test_a_choice_says_why() -> None:
    some, many = choose(5, 8, 128, 768, 2048), choose(8192, 8, 128, 768, 2048)
    assert some.form is INSTANCES[16] and some.reason.startswith("one launch: 0.312 rows an expert")
    assert many.form is PERMUTED and "512 rows" in many.reason and many.reason.endswith("activations permuted first")
    few, short = choose(5, 1, 4, 256, 5120), choose(64, 8, 256, 256, 7168)
    assert few.form is None and "classic: GEMM1 has at most 16 tiles" in few.reason
    assert short.form is None and "classic: an inner size of 256" in short.reason
    assert choose(4096, 8, 256, 256, 7168).form is choose(8192, 8, 256, 256, 7168).form is CLUSTERED
    assert choose(16384, 8, 256, 256, 7168).form is INSTANCES[176]
    two = choose(4096, 8, 128, 768, 2048)
    assert two.form is CLUSTERED and two.reason.endswith(
        "1 CTA an SM, in clusters of two that share an expert's weights"
    )
    assert choose(2816, 8, 128, 768, 2048).form is INSTANCES[176] and choose(5632, 8, 128, 768, 2048).form is CLUSTERED
    assert choose(5633, 8, 128, 768, 2048).form is PERMUTED
    assert choose(1024, 2, 8, 7168, 4096).form is INSTANCES[176], "256 rows of few experts"
    assert choose(2048, 2, 8, 7168, 4096).form is PERMUTED
    assert choose(8192, 4, 32, 1792, 2048).form is PERMUTED
    assert choose(8192, 8, 128, 640, 2048).form is INSTANCES[176] and choose(8192, 8, 128, 641, 2048).form is PERMUTED


def test_few_experts_get_forms_that_a_skewed_batch_does_not_slow() -> None:
    """Of 8 or 16 experts one may get most of a batch: not the forms of their even share."""
    gated = Gated(TILE, TILE)
    assert choose(256, 2, 8, 7168, 4096, gated).form is INSTANCES[176]
    assert choose(256, 16, 64, 7168, 4096).form is INSTANCES[96]
    assert choose(128, 1, 16, 2048, 5120, gated).form is gated
    assert choose(129, 1, 16, 2048, 5120, gated).form is INSTANCES[16]
    assert choose(129, 2, 32, 2048, 5120, gated).form is gated


def test_a_few_tokens_have_a_form_of_their_own() -> None:
    """Whether or not there are tuned configs; but not where pairs would read an expert's weights too often."""
    gated = Gated(TILE, TILE)
    for configs in (None, gated):
        few = choose(4, 8, 128, 768, 2048, configs)
        assert few.form is FORMS[1] and "two launches for a few tokens: 32 pairs" in few.reason
        assert choose(8, 8, 256, 256, 7168, configs).form is FORMS[4]
    assert choose(5, 8, 128, 768, 2048, gated).form is gated and choose(4, 2, 8, 7168, 4096, gated).form is gated
    assert choose(4, 2, 8, 7168, 4096).form is INSTANCES[16]
    assert choose(1, 8, 128, 768 * 200, 2048).form is INSTANCES[16]
    assert choose(0, 8, 128, 768, 2048).form is None


def test_tuned_configs_serve_up_to_as_many_rows_as_they_are_recorded_faster_at() -> None:
    gated = Gated(TILE, TILE)
    middle, more = choose(384, 8, 128, 768, 2048, gated), choose(385, 8, 128, 768, 2048, gated)
    assert middle.form is gated and middle.reason.startswith("gated_tma with its tuned configs: 24 rows")
    assert more.form is INSTANCES[96] and choose(64, 8, 256, 256, 7168, gated).form is gated
    short, longer = choose(1023, 8, 256, 256, 7168, gated), choose(1024, 8, 256, 256, 7168, gated)
    assert short.form is gated and short.reason.endswith("under 32") and longer.form is INSTANCES[96]


def test_tuned_configs_are_those_of_the_shipped_files(tmp_path: Path) -> None:
    """By the files of kernel=gated_tma, of the nearest batch size; none for a layer or a device that has no such file."""
    h200 = ("NVIDIA H200", "3.6.0", "bfloat16")
    found = tuned_gated(128, 768, *h200, 64)
    assert found is not None and found.up.BLOCK_SIZE_M == found.down.BLOCK_SIZE_M
    files = [
        read_config_file(
            runtime.config_dir() / "triton_3_6_0" / f"E=128,N=768,device_name=NVIDIA_H200,kernel=gated_tma{end}.json"
        )
        for end in ("", "_down")
    ]
    assert (found.up, found.down) == (files[0][64], files[1][64])
    assert tuned_gated(128, 768, *h200, 70) == found
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELAB_CONFIG_DIR", str(tmp_path))
        assert tuned_gated(128, 768, *h200, 64) is None
    assert (
        tuned_gated(127, 768, *h200, 64) is None and tuned_gated(128, 768, "NVIDIA H7", "3.6.0", "bfloat16", 64) is None
    )


@pytest.mark.parametrize("routing", fast_layer_suite.ROUTINGS)
def test_what_serves_is_not_slower_than_the_classic_layer(routing: str) -> None:
    """In no cell of fast_layer beyond its interval; and "fast" there is what is chosen now."""
    layers = recordings.load("fast_layer")
    for name, b in itertools.product(fast_layer_suite.SHAPES, fast_layer_suite.BATCHES):
        here = {row["impl"]: row for row in layers.select(shape=name, num_tokens=b, routing=routing)}
        form = choose_for(fast_layer_suite.shape_of(name), b, None, layers.provenance["gpu"]).form
        assert form is not None and here["fast"]["instance"] == fast_layer_suite.name_of(form)
        classic, fast = timing(here["classic"]), timing(here["fast"])
        assert tie(fast, classic) or fast.median_us < classic.median_us, (name, b)


def test_what_is_chosen_as_classic_runs_as_the_classic_layer(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """A small batch over two small experts: its result is the classic layer's own, bit by bit."""
    monkeypatch.setattr(fast, "_check", lambda call: None)
    inputs = Case("small", 5, 2, 1, 64, 32).inputs(torch.float16, device)
    given = {"topk_weights": inputs.topk_weights, "topk_ids": inputs.topk_ids}
    assert choose(5, 1, 2, 32, 64).form is None
    out = fused_moe(inputs.hidden_states, inputs.w13, inputs.w2, impl="fast", **given)
    assert out.equal(fused_moe(inputs.hidden_states, inputs.w13, inputs.w2, impl="triton", **given))


def test_a_few_tokens_go_to_their_kernel(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """With ids as they came, the scale and where the weight goes."""
    asked = []

    def stand_in(x, w13, w2, weights, ids, form, **options):
        asked.append((ids.dtype, form, options))
        return x

    monkeypatch.setattr(fast, "_check", lambda call: None)
    monkeypatch.setattr(fast, "few_tokens", stand_in)
    case = Case("scaled", 1, 6, 3, 64, 32, on_input=True, scale=2.5)
    i = case.inputs(torch.float16, device)
    given = {"topk_weights": i.topk_weights, "topk_ids": i.topk_ids.long()}
    out = fused_moe(i.hidden_states, i.w13, i.w2, impl="fast", **given, **case.options)
    assert out.equal(i.hidden_states)
    assert asked == [(torch.int64, FORMS[0], {"scale": 2.5, "weights_on_input": True})]


def test_tuned_configs_go_to_the_gated_kernels(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The result is that of the implementation "gated" under the same configs, bit by bit: TMA changes how weights come."""
    tile = KernelConfig(16, 32, 32, 1, 4, 2)
    monkeypatch.setattr(fast, "_check", lambda call: None)
    monkeypatch.setattr(fast, "tuned_gated", lambda *asked: Gated(tile, tile))
    asked, sorted_pipeline = [], fast.sorted_pipeline

    def without_tma(call, tma):
        asked.append(tma)
        return sorted_pipeline(call, False)

    monkeypatch.setattr(fast, "sorted_pipeline", without_tma)
    i = Case("tuned", 9, 4, 2, 64, 32).inputs(torch.float16, device)
    given = {"topk_weights": i.topk_weights, "topk_ids": i.topk_ids}
    out = fused_moe(i.hidden_states, i.w13, i.w2, impl="fast", **given)
    assert asked == [True]
    assert out.equal(fused_moe(i.hidden_states, i.w13, i.w2, impl="gated", config=tile, down_config=tile, **given))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "case", [*(case for case, _ in SERVED), *(c for c in CASES + LARGE_CASES if plain(c))], ids=str
)
def test_what_serves_a_batch_against_float64(case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, "cuda")
    judge(case, inputs, served(case, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("case", [case for case in CASES + LARGE_CASES if plain(case)], ids=str)
def test_one_launch_against_float64(case: Case) -> None:
    inputs = case.inputs(torch.bfloat16, "cuda")
    judge(case, inputs, in_one_launch(case, inputs))


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 3, 4, 5])
def test_small_batches_as_they_are_served(num_tokens: int) -> None:
    case = Case("served", num_tokens, 16, 4, 512, 1024)
    i = case.inputs(torch.bfloat16, "cuda")
    judge(case, i, served(case, i))


ODD = Case("odd", 77, 12, 3, 264, 136)
FOREIGN = Case("experts of another rank", 90, 12, 3, 264, 136, foreign=True)
WIDE = Case("wide", 700, 6, 2, 1032, 520)


@pytest.mark.gpu
@pytest.mark.parametrize(
    "case", [ODD, FOREIGN, WIDE, replace(WIDE, routing="zipf"), Case("one", 1, 8, 2, 512, 256)], ids=str
)
@pytest.mark.parametrize("instance", ALL, ids=str)
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
@pytest.mark.parametrize("run", [served, in_one_launch])
@pytest.mark.parametrize("num_tokens", [1, 3, 64, 600])
def test_in_a_cuda_graph_with_a_routing_that_changes(num_tokens: int, run: Callable) -> None:
    case = Case("graph", num_tokens, 16, 4, 256, 128)
    first, second = case.inputs(torch.bfloat16, "cuda"), replace(case, routing="zipf").inputs(torch.bfloat16, "cuda")
    run(case, first)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = run(case, first)
    first.topk_ids.copy_(second.topk_ids)
    first.hidden_states.copy_(second.hidden_states)
    for _ in range(3):
        graph.replay()
    judge(case, first, out)


@pytest.mark.gpu
@pytest.mark.parametrize("instance", ALL, ids=str)
def test_twenty_runs_are_equal_bit_by_bit(instance: Instance) -> None:
    inputs = Case("qwen3-like", 200, 32, 8, 2048, 768).inputs(torch.bfloat16, "cuda")
    first = by(instance, inputs)
    assert all(by(instance, inputs).equal(first) for _ in range(19))


@pytest.mark.gpu
def test_outputs_past_2_to_31_elements() -> None:
    """GEMM2's output (M * k, H) of 2^31 + elements; the last tokens are checked."""
    case = Case("rows past 2^31", 70_000, 4, 4, 8192, 64)
    inputs = case.inputs(torch.bfloat16, "cuda")
    out = in_one_launch(case, inputs)[-32:]
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
    judge(case, own, in_one_launch(case, inputs))
