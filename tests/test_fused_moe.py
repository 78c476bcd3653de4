"""The public op: every implementation against float64, no silent fallback, torch.compile and CUDA graphs."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from moe_cases import CASES, LARGE_CASES, TILE, Case, judge
from sampling import sampled, whole

from moelab.call import MoECall
from moelab.config import KernelConfig
from moelab.errors import ConfigError, LayoutError, RoutingError, RuntimeModeError, ShapeError, UnknownNameError
from moelab.fused_moe import available_implementations, fused_moe
from moelab.implementations import IMPLEMENTATIONS, Implementation
from moelab.inputs import MoEInputs
from moelab.torch_layers import static_layer

HERE = [torch.float16, torch.float32, torch.float64]


def call(case: Case, i: MoEInputs, impl: str, **more: object) -> torch.Tensor:
    options = {**case.options, **more}
    return fused_moe(
        i.hidden_states, i.w13, i.w2, topk_weights=i.topk_weights, topk_ids=i.topk_ids, b13=i.b13, b2=i.b2,
        impl=impl, **options,
    )  # fmt: skip


@pytest.mark.parametrize(("impl", "case", "dtype"), sampled(["triton", "torch"], CASES, HERE), ids=str)
def test_against_float64(impl: str, case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = case.inputs(dtype, device)
    judge(case, inputs, call(case, inputs, impl, config=TILE if impl == "triton" else None))


SPLIT_IMPLS = [name for name, one in IMPLEMENTATIONS.items() if one.splits]


def split_configs(case: Case, most: int = 2) -> dict[str, KernelConfig]:
    """Tiles for GEMM1 and GEMM2, each with up to `most` parts of its inner size and none of them empty."""
    tile = KernelConfig(16, 64, 32, 4, 4, 3)
    up, down = (min(most, 1 << ((-(-K // 32)).bit_length() - 1)) for K in (case.hidden, case.inner))
    return {"config": replace(tile, SPLIT_K=up), "down_config": replace(tile, SPLIT_K=down)}


@pytest.mark.parametrize(("impl", "case", "dtype"), sampled(SPLIT_IMPLS, CASES, HERE, together=1), ids=str)
def test_split_k_against_float64(impl: str, case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = case.inputs(dtype, device)
    judge(case, inputs, call(case, inputs, impl, **split_configs(case)))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, *HERE[:2]], ids=str)
@pytest.mark.parametrize("case", CASES + LARGE_CASES, ids=str)
@pytest.mark.parametrize("impl", SPLIT_IMPLS)
def test_split_k_on_the_gpu_against_float64(impl: str, case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, "cuda")
    judge(case, inputs, call(case, inputs, impl, **split_configs(case, most=16)))
    judge(case, inputs, call(case, inputs, impl))  # without a config: SPLIT_K is 1


SORTED_IMPLS = [name for name in IMPLEMENTATIONS if name.startswith("gated")]


def takes_tma(case: Case, dtype: torch.dtype) -> bool:
    """Whether rows of both weights are a multiple of 16 bytes."""
    return all(size * dtype.itemsize % 16 == 0 for size in (case.hidden, case.inner))


def judge_sorted(case: Case, inputs: MoEInputs, impl: str, **more: object) -> None:
    out = call(case, inputs, impl, **more)
    judge(case, inputs, out, roundings=case.top_k if IMPLEMENTATIONS[impl].rounds_every_sum else 0)


@pytest.mark.parametrize(("impl", "case"), sampled(["tma", *SORTED_IMPLS], CASES, together=1), ids=str)
def test_tma_and_sorted_rows_against_float64(impl: str, case: Case, device: str) -> None:
    inputs = case.inputs(torch.float16, device)
    if IMPLEMENTATIONS[impl].needs_tma and not takes_tma(case, torch.float16):
        with pytest.raises(LayoutError, match=r"A row of w1?3? is 1022 bytes"):
            call(case, inputs, impl, config=TILE)
        return
    judge_sorted(case, inputs, impl, config=TILE)


@pytest.mark.parametrize(
    ("impl", "case", "dtype"),
    sampled(["tma", "gated", "gated_tma", "gated_atomic_out"], [CASES[1], CASES[6], CASES[7]], HERE[1:]),
    ids=str,
)
def test_tma_and_sorted_rows_in_wide_dtypes(impl: str, case: Case, dtype: torch.dtype, device: str) -> None:
    judge_sorted(case, case.inputs(dtype, device), impl, config=TILE, down_config=KernelConfig(16, 64, 32, 1))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, *HERE[:2]], ids=str)
@pytest.mark.parametrize("case", CASES + LARGE_CASES, ids=str)
@pytest.mark.parametrize("impl", ["tma", *SORTED_IMPLS])
def test_tma_and_sorted_rows_on_the_gpu(impl: str, case: Case, dtype: torch.dtype) -> None:
    if IMPLEMENTATIONS[impl].needs_tma and not takes_tma(case, dtype):
        pytest.skip("rows that TMA does not take")
    judge_sorted(case, case.inputs(dtype, "cuda"), impl)
    judge_sorted(case, case.inputs(dtype, "cuda"), impl, config=KernelConfig(64, 128, 64, 8, 4, 3))


def test_a_split_of_nothing_is_named(device: str) -> None:
    case = CASES[1]  # inner 48: one block of 64
    inputs = case.inputs(torch.float32, device)
    with pytest.raises(ConfigError, match="leaves empty slices: K = 48 has 1 block of BLOCK_SIZE_K = 64"):
        call(case, inputs, "split_k_workspace", config=replace(TILE, SPLIT_K=2))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("case", "dtype"),
    sampled([CASES[6], CASES[0], CASES[7], CASES[8]], [torch.float64, torch.bfloat16], together=0),
    ids=str,
)
def test_compiled_against_float64(case: Case, dtype: torch.dtype, device: str) -> None:
    inputs = case.inputs(dtype, device)
    judge(case, inputs, call(case, inputs, "compiled"))


def test_compiled_once_against_float64(device: str) -> None:
    inputs = CASES[5].inputs(torch.bfloat16, device)  # 264 and 40 are whole 16-byte rows: torch's grouped product
    judge(CASES[5], inputs, call(CASES[5], inputs, "compiled"))


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, *HERE[:2]], ids=str)
@pytest.mark.parametrize("case", CASES + LARGE_CASES, ids=str)
@pytest.mark.parametrize("impl", ["triton", "torch", "compiled"])
def test_on_the_gpu_against_float64(impl: str, case: Case, dtype: torch.dtype) -> None:
    inputs = case.inputs(dtype, "cuda")
    out = call(case, inputs, impl)
    # `compiled` is torch: its batched product may err more than the oracle's plain one, but not more than in eager.
    judge(case, inputs, out, eager_layer(case, inputs) if impl == "compiled" else None)


def eager_layer(case: Case, i: MoEInputs) -> torch.Tensor:
    """What `compiled` compiles, uncompiled."""
    call = MoECall(
        i.hidden_states, i.weights, i.topk_weights, i.topk_ids, case.activation, case.gated, case.scale, case.on_input
    )
    return static_layer(call)(call)


def test_both_gemms_take_their_own_config(device: str) -> None:
    case = CASES[4]
    inputs = case.inputs(torch.float32, device)
    judge(case, inputs, call(case, inputs, "triton", config=TILE, down_config=KernelConfig(16, 64, 32, 1)))
    with pytest.raises(ConfigError, match="BLOCK_SIZE_M = 16 and down_config 32"):
        call(case, inputs, "triton", config=TILE, down_config=KernelConfig(32, 64, 32, 1))


@pytest.mark.parametrize("impl", ["triton", "split_k_workspace", *map(whole, ("tma", "gated")), "gated_tma"])
def test_repeated_runs_are_bitwise_equal(impl: str, device: str) -> None:
    inputs = CASES[3].inputs(torch.float16, device)
    configs = split_configs(CASES[3]) if impl in SPLIT_IMPLS else {"config": TILE}
    first = call(CASES[3], inputs, impl, **configs)
    again = 3 if device == "cuda" else 1  # the interpreter runs programs in one order, so more would show nothing
    assert all(torch.equal(first, call(CASES[3], inputs, impl, **configs)) for _ in range(again))


@pytest.mark.parametrize("on_input", [False, True])
def test_weights_of_the_layers_dtype_are_as_good_as_float32(on_input: bool, device: str) -> None:
    """As transformers' routers hand them on: read as they are, to the same bits; NaN at an id of -1 adds nothing."""
    case = replace(CASES[3], on_input=on_input)
    i = case.inputs(torch.float16, device)
    narrow = i.topk_weights.half()
    i.topk_ids[0, 0], narrow[0, 0] = -1, float("nan")
    wide = narrow.float()
    for impl in ("torch", "triton", *SPLIT_IMPLS, "tma", *SORTED_IMPLS):
        configs = split_configs(case) if impl in SPLIT_IMPLS else {"config": TILE}
        both = [call(case, replace(i, topk_weights=weights), impl, **configs) for weights in (narrow, wide)]
        assert torch.equal(*both), impl


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 40, 700])
@pytest.mark.parametrize("impl", ["fast", "triton", "gated_tma"])
def test_weights_of_the_layers_dtype_on_the_gpu(impl: str, num_tokens: int) -> None:
    case = Case("narrow", num_tokens, 16, 4, 512, 256)
    i = case.inputs(torch.bfloat16, "cuda")
    narrow = i.topk_weights.bfloat16()
    both = [call(case, replace(i, topk_weights=weights), impl) for weights in (narrow, narrow.float())]
    assert torch.equal(*both)
    judge(case, replace(i, topk_weights=narrow), both[0])


def test_router_logits_are_routed(device: str) -> None:
    case = CASES[1]
    i = case.inputs(torch.float32, device)
    logits = torch.randn(case.num_tokens, case.num_experts, device=device)
    weights, ids = torch.softmax(logits, -1).topk(2, -1)
    expected = call(case, replace(i, topk_ids=ids.int(), topk_weights=weights / weights.sum(-1, keepdim=True)), "torch")
    out = fused_moe(i.hidden_states, i.w13, i.w2, router_logits=logits, top_k=2, impl="torch")
    torch.testing.assert_close(out, expected)


def test_no_tokens_is_no_work(device: str) -> None:
    i = replace(CASES[0], num_tokens=0).inputs(torch.float32, device)
    for impl in available_implementations():
        assert call(CASES[0], i, impl).shape == (0, CASES[0].hidden)


def test_a_kernel_of_ones_own_is_one_dict_entry(monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "mine", Implementation(lambda call: torch.full_like(call.hidden_states, 7.0)))
    assert (call(CASES[0], CASES[0].inputs(torch.float32, device), "mine") == 7).all()


def test_through_torch_compile_in_one_graph(device: str) -> None:
    case = CASES[6]
    inputs = case.inputs(torch.float32, device)

    def layer(x: torch.Tensor) -> torch.Tensor:
        return call(case, replace(inputs, hidden_states=x * 2), "triton", config=TILE) + 1

    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(inputs.hidden_states), layer(inputs.hidden_states))


def test_through_torch_compile_with_batches_that_change(device: str) -> None:
    case = CASES[1]
    fixed = case.inputs(torch.float32, device)

    def layer(x: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        return fused_moe(x, fixed.w13, fixed.w2, topk_weights=weights, topk_ids=ids, config=TILE)

    compiled = torch.compile(layer, fullgraph=True, dynamic=True, backend="aot_eager")
    for num_tokens in (2, 5, 9):
        i = replace(case, num_tokens=num_tokens).inputs(torch.float32, device)
        arguments = i.hidden_states, i.topk_ids, i.topk_weights
        assert torch.equal(compiled(*arguments), layer(*arguments))


def test_both_configs_reach_the_custom_op(device: str) -> None:
    inputs = CASES[1].inputs(torch.float32, device)
    down = KernelConfig(32, 64, 32, 1)
    with pytest.raises(Exception, match="BLOCK_SIZE_M = 16 and down_config 32"):
        torch.compile(lambda: call(CASES[1], inputs, "triton", config=TILE, down_config=down), backend="aot_eager")()


def test_no_gradient_is_lost_in_silence(device: str) -> None:
    inputs = CASES[1].inputs(torch.float32, device)
    inputs.w2.requires_grad_()
    with pytest.raises(RuntimeModeError, match=r"w2 requires a gradient.*torch.no_grad"):
        call(CASES[1], inputs, "triton", config=TILE)
    assert call(CASES[1], inputs, "torch").requires_grad
    with torch.no_grad():
        call(CASES[1], inputs, "triton", config=TILE)


def test_ids_are_checked_on_cpu_under_torch_compile_too() -> None:
    inputs = CASES[1].inputs(torch.float32, "cpu")
    wrong = replace(inputs, topk_ids=inputs.topk_ids + 99)
    with pytest.raises(RoutingError, match="Expert ids span"):
        torch.compile(lambda: call(CASES[1], wrong, "triton", config=TILE), backend="aot_eager")()


def test_the_custom_op_keeps_torchs_rules(device: str) -> None:
    i = CASES[2].inputs(torch.float32, device)
    arguments = (
        i.hidden_states, i.w13, i.w2, i.topk_weights, i.topk_ids, None, None, [None] * 4, "plain", "triton",
        [16, 32, 64, 4, 4, 3, 1, -1, -1, -1], [], "silu", True, 1.0, False,
    )  # fmt: skip
    torch.library.opcheck(torch.ops.moelab.fused_moe.default, arguments, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "compiled", "tma", *SPLIT_IMPLS, *SORTED_IMPLS])
@pytest.mark.parametrize("num_tokens", [1, 3, 64, 600])
def test_in_a_cuda_graph_with_a_routing_that_changes(impl: str, num_tokens: int) -> None:
    case = Case("graph", num_tokens, 16, 4, 256, 128)
    first, second = case.inputs(torch.bfloat16, "cuda"), replace(case, routing="zipf").inputs(torch.bfloat16, "cuda")
    call(case, first, impl)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = call(case, first, impl)
    first.topk_ids.copy_(second.topk_ids)
    first.hidden_states.copy_(second.hidden_states)
    graph.replay()
    judge(case, first, out, roundings=case.top_k if IMPLEMENTATIONS[impl].rounds_every_sum else 0)


@pytest.mark.parametrize(
    ("change", "error", "words"),
    [
        (lambda i: {"topk_ids": i.topk_ids + 99}, RoutingError, "Expert ids span"),
        (lambda i: {"topk_ids": i.topk_ids[:, :1].contiguous()}, ShapeError, "topk_weights has shape"),
        (lambda i: {"w2": i.w2[:, :, :-1].contiguous()}, ShapeError, "w2 has shape"),
    ],
)
def test_wrong_calls(change: object, error: type[Exception], words: str, device: str) -> None:
    inputs = CASES[1].inputs(torch.float32, device)
    with pytest.raises(error, match=words):
        call(CASES[1], replace(inputs, **change(inputs)), "torch", **{"check_routing": True})


def test_a_routing_must_be_given_once(device: str) -> None:
    i = CASES[1].inputs(torch.float32, device)
    with pytest.raises(RoutingError, match="No routing given"):
        fused_moe(i.hidden_states, i.w13, i.w2)
    with pytest.raises(RoutingError, match="router_logits came with"):
        fused_moe(i.hidden_states, i.w13, i.w2, router_logits=torch.zeros(1, 8), topk_ids=i.topk_ids)
    with pytest.raises(UnknownNameError, match="triton"):
        call(CASES[1], i, "tritn")


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "tma", "gated", "gated_tma"])
def test_weights_past_2_to_31_elements(impl: str) -> None:
    """w13 of 2^31 + elements: the last experts lie past what an int32 offset reaches."""
    case = Case("past 2^31", 16, 260, 2, 4096, 1024)  # w13: 260 * 2048 * 4096 = 2.18e9
    inputs = case.inputs(torch.bfloat16, "cuda")
    assert inputs.w13.numel() > 2**31
    ids = torch.arange(228, 260, device="cuda", dtype=torch.int32).view(16, 2)
    inputs = replace(inputs, topk_ids=ids)
    judge_last_experts(case, inputs, call(case, inputs, impl))


def judge_last_experts(case: Case, inputs: MoEInputs, out: torch.Tensor) -> None:
    """`judge` on the experts that are named only, so that float64 copies of the weights stay small."""
    first = int(inputs.topk_ids.min())
    own = replace(
        inputs, w13=inputs.w13[first:].clone(), w2=inputs.w2[first:].clone(), topk_ids=inputs.topk_ids - first
    )
    judge(case, own, out)


@pytest.mark.gpu
@pytest.mark.parametrize("impl", ["triton", "gated", "gated_atomic_out"])
def test_outputs_past_2_to_31_elements(impl: str) -> None:
    """GEMM2's output (M * k, H) of 2^31 + elements; the last tokens are checked."""
    case = Case("rows past 2^31", 70_000, 4, 4, 8192, 64)
    inputs = case.inputs(torch.bfloat16, "cuda")
    assert 70_000 * 4 * 8192 > 2**31
    out = call(case, inputs, impl)[-32:]
    tail = replace(
        inputs, hidden_states=inputs.hidden_states[-32:], topk_ids=inputs.topk_ids[-32:],
        topk_weights=inputs.topk_weights[-32:],
    )  # fmt: skip
    judge(case, tail, out)
