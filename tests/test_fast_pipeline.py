"""fused_moe(impl="fast") on a real Hopper GPU; what of it runs anywhere is in test_fast_layer.py."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from forms import choose, instance_for
from moe_cases import CASES, LARGE_CASES, Case, judge

from moelab import runtime
from moelab.config import KernelConfig
from moelab.config_files import read_config_file
from moelab.errors import ConfigError, RoutingError, RuntimeModeError
from moelab.fused_moe import available_implementations, fused_moe
from moelab.inputs import MoEInputs
from moelab.kernels.expert_order import expert_order
from moelab.kernels.fast_instances import ALL, INSTANCES, Instance
from moelab.kernels.fast_layer import GEMM1, GEMM2, SUM, fast_layer
from moelab.kernels.few_tokens import FORMS
from moelab.module import FusedMoE
from moelab.pipelines import fast
from moelab.pipelines.fast import choose_for, tiles_for, tuned
from moelab.pipelines.form_choice import Classic, Gated, kind_of
from moelab.shapes import MoEShape

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
    instance = instance_for(case.num_tokens, case.top_k, case.num_experts, case.inner, case.hidden)
    return by(instance, i, scale=case.scale, weights_on_input=case.on_input)


QWEN3, SCOUT = (128, 8, 2048, 768), (16, 1, 5120, 2048)
SERVED = [
    (Case("one token", 1, *QWEN3), "few_tokens"),
    (Case("a few tokens", 4, *QWEN3), "few_tokens"),
    (Case("a few tokens of four experts", 5, 4, 1, 512, 256), "few_tokens"),
    (Case("tuned configs, skewed", 64, *QWEN3, routing="zipf"), "gated_tma"),
    (Case("tuned configs, experts of another rank", 33, *QWEN3, foreign=True, scale=2.5), "gated_tma"),
    (Case("no tuned file, few rows", 21, 24, 4, 1032, 640), "gated_tma"),
    (Case("no tuned file, twenty rows", 120, 24, 4, 264, 640, routing="zipf", scale=2.5), "gated_tma"),
    (Case("64 rows", 1024, *QWEN3, routing="zipf"), "one_launch"),
    (Case("128 rows, weights on the input", 1024, 8, 1, 1032, 520, on_input=True), "one_launch"),
    (Case("256 rows", 4096, *QWEN3), "one_launch"),
    (Case("512 rows, experts of another rank", 8192, *QWEN3, foreign=True), "one_launch"),
]
"""A batch for each kind of form but the classic layer, which serves where it is asked for, and what serves it on the device of
the recordings."""


def ids_of(cases: list[tuple[Case, object]]) -> list[str]:
    return [str(case) for case, _ in cases]


@pytest.mark.parametrize(("case", "kind"), SERVED, ids=ids_of(SERVED))
def test_each_kind_serves_a_case(case: Case, kind: str) -> None:
    """So that the comparison of these with float64, on a GPU, has them all."""
    shape = MoEShape.from_sizes(
        num_experts=case.num_experts, top_k=case.top_k, hidden_size=case.hidden, moe_intermediate_size=case.inner
    )
    assert kind_of(choose_for(shape, case.num_tokens, None, "NVIDIA H200", "3.6.0").form) == kind


def test_elsewhere_it_says_so(device: str) -> None:
    assert "fast" not in available_implementations(torch.float16)  # by name only
    if device == "cuda":
        return
    inputs = CASES[1].inputs(torch.float16, device)
    with pytest.raises(RuntimeModeError, match="Expected a Hopper GPU"):
        served(CASES[1], inputs)


TILE = KernelConfig(16, 32, 32, 1, 4, 2)


def test_tuned_configs_are_those_of_the_shipped_files(tmp_path: Path) -> None:
    """By the files of kernel=gated_tma, of the nearest batch size; none for a layer or a device that has no such file."""
    h200 = ("NVIDIA H200", "3.6.0", "bfloat16")

    def gated(num_experts: int, device: str, num_tokens: int, folder: str | None = None) -> Gated | Classic | None:
        return tuned("gated_tma", num_experts, 768, device, *h200[1:], num_tokens, folder)

    found = gated(128, h200[0], 64)
    assert isinstance(found, Gated) and found.up.BLOCK_SIZE_M == found.down.BLOCK_SIZE_M
    files = [
        read_config_file(
            runtime.config_dir() / "triton_3_6_0" / f"E=128,N=768,device_name=NVIDIA_H200,kernel=gated_tma{end}.json"
        )
        for end in ("", "_down")
    ]
    assert (found.up, found.down) == (files[0][64], files[1][64])
    assert gated(128, h200[0], 70) == found
    assert isinstance(tuned("triton", 128, 768, *h200, 64, None), Classic)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MOELAB_CONFIG_DIR", str(tmp_path))
        assert gated(128, h200[0], 64, str(tmp_path)) is None
    assert gated(127, h200[0], 64) is None and gated(128, "NVIDIA H7", 64) is None


@pytest.fixture
def hopper(monkeypatch: pytest.MonkeyPatch) -> None:
    """What only a Hopper GPU runs, checks its sizes, or has TMA, left out."""
    sorted_pipeline = fast.sorted_pipeline
    monkeypatch.setattr(fast, "_check", lambda call: None)
    monkeypatch.setattr(fast, "sorted_pipeline", lambda call, tma: sorted_pipeline(call, False))


def test_the_classic_layer_runs_under_its_predicted_configs(hopper: None, device: str) -> None:
    """Asked for as a kind of form: its result is the classic layer's own under those configs, bit by bit."""
    i = Case("small", 5, 2, 1, 64, 32).inputs(torch.float16, device)
    given = {"topk_weights": i.topk_weights, "topk_ids": i.topk_ids}
    form = choose(5, 1, 2, 32, 64, override="triton", dtype="float16").form
    out = fused_moe(i.hidden_states, i.w13, i.w2, impl="fast", form="triton", **given)
    assert isinstance(form, Classic)
    again = fused_moe(i.hidden_states, i.w13, i.w2, impl="triton", config=form.up, down_config=form.down, **given)
    assert out.equal(again)


def test_an_override_by_argument_comes_before_the_environment(
    hopper: None, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    ran = []
    monkeypatch.setattr(fast, "few_tokens", lambda x, *given, **options: ran.append("few_tokens") or x)
    monkeypatch.setattr(fast, "triton_pipeline", lambda call: ran.append("triton") or call.hidden_states)
    monkeypatch.setattr(fast, "sorted_pipeline", lambda call, tma: ran.append("gated_tma") or call.hidden_states)
    i = Case("small", 5, 4, 2, 64, 32).inputs(torch.float16, device)
    given = {"topk_weights": i.topk_weights, "topk_ids": i.topk_ids, "impl": "fast"}
    monkeypatch.setenv(fast.OVERRIDE, "triton")
    fused_moe(i.hidden_states, i.w13, i.w2, **given)
    fused_moe(i.hidden_states, i.w13, i.w2, **given, form="gated_tma")
    monkeypatch.setenv(fast.OVERRIDE, "gated")
    with pytest.raises(
        ConfigError, match=r"'gated' serves no such batch here.*Expected a kind, one of .*gated_tma.*leave it out"
    ):
        fused_moe(i.hidden_states, i.w13, i.w2, **given)
    monkeypatch.delenv(fast.OVERRIDE)
    many = Case("more", 40, 4, 2, 64, 32).inputs(torch.float16, device)
    with pytest.raises(ConfigError, match="'few_tokens' serves no such batch"):
        fused_moe(
            many.hidden_states, many.w13, many.w2, topk_weights=many.topk_weights, topk_ids=many.topk_ids, impl="fast",
            form="few_tokens",
        )  # fmt: skip
    with pytest.raises(ConfigError, match=r"form='triton' came with impl='torch'.*Leave it out"):
        fused_moe(i.hidden_states, i.w13, i.w2, **{**given, "impl": "torch"}, form="triton")
    assert ran == ["triton", "gated_tma"]


@pytest.mark.parametrize("rows", [0, -1.0, 6, float("nan"), True, "2"])
def test_an_expectation_that_cannot_be_is_refused(rows: object, device: str) -> None:
    i = Case("small", 5, 4, 2, 64, 32).inputs(torch.float32, device)
    with pytest.raises(
        RoutingError, match=r"expected_rows is .* of 5 tokens. Expected a number above 0 and at most theirs"
    ):
        fused_moe(
            i.hidden_states, i.w13, i.w2, topk_weights=i.topk_weights, topk_ids=i.topk_ids, impl="torch", expected_rows=rows
        )  # fmt: skip


def test_what_serves_follows_the_expectation(hopper: None, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank's experts of many: taken for all, they would get all pairs, and the batch would be another."""
    asked, chosen = [], fast.chosen
    monkeypatch.setattr(fast, "chosen", lambda batch, *rest: asked.append(batch.rows) or chosen(batch, *rest))
    monkeypatch.setattr(fast, "triton_pipeline", lambda call: call.hidden_states)
    monkeypatch.setenv(fast.OVERRIDE, "triton")
    i = Case("small", 6, 4, 2, 64, 32).inputs(torch.float16, device)
    given = {"topk_weights": i.topk_weights, "topk_ids": i.topk_ids, "impl": "fast"}
    fused_moe(i.hidden_states, i.w13, i.w2, **given)
    fused_moe(i.hidden_states, i.w13, i.w2, **given, expected_rows=0.75)
    module = FusedMoE.from_shape(MoEShape.from_sizes(
        num_experts=16, top_k=2, hidden_size=64, moe_intermediate_size=32, dtype="float16", tp_size=4, ep_size=4
    ), dtype=torch.float16, device=device, impl="fast")  # fmt: skip
    module(i.hidden_states, topk_weights=i.topk_weights, topk_ids=i.topk_ids)
    assert asked == [3.0, 0.75, 0.75]
    wide = MoEShape("ep8", 32, 8, 7168, 2048, tp_size=8, ep_size=8)
    right = choose_for(wide, 256, None).form
    wrong = choose(256, 8, 32, 2048, 7168).form
    assert wide.expected_rows(256) == 8.0 and right != wrong


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
    (found,) = asked
    assert (
        found[0] == torch.int64
        and found[1] in FORMS
        and found[2] == {"scale": 2.5, "weights_on_input": True, "out": None}
    )


def test_tuned_configs_go_to_the_gated_kernels(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    """The result is that of the implementation "gated" under the same configs, bit by bit: TMA changes how weights come."""
    tile = KernelConfig(16, 32, 32, 1, 4, 2)
    monkeypatch.setattr(fast, "_check", lambda call: None)
    monkeypatch.setattr(fast, "_chosen", lambda call: Gated(tile, tile))
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
