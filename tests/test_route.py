"""Routing by kernel: experts and order equal to torch's, weights within its error, in one program and in many."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sampling import sampled, whole

from moelab import precision, runtime
from moelab.errors import RoutingError, ShapeError
from moelab.kernels import route as module
from moelab.kernels.route import new_routed, route, tiles_in_one_launch
from moelab.kernels.token_tiles import new_token_tiles, token_tiles_ref
from moelab.routing import Routed, expert_order_ref, route_ref

DEVICE = runtime.current().device

# What these models' routers do (transformers 5: modeling_qwen3_moe, _llama4, _lfm2_moe, _deepseek_v3, _deepseek_v2);
# "bias" stands for a correction bias of the right size.
ROUTERS: dict[str, tuple[int, int, dict[str, Any]]] = {
    "qwen3": (128, 8, {}),
    "scout": (16, 1, {"score": "sigmoid"}),
    "lfm2": (32, 4, {"score": "sigmoid", "bias": True}),
    "deepseek-v3": (
        256,
        8,
        {"score": "sigmoid", "bias": True, "num_groups": 8, "top_k_groups": 4, "routed_scaling_factor": 2.5},
    ),
    # 160 experts in 8 groups of 20, as DeepSeek-V2: no power of two
    "deepseek-v2": (160, 6, {"num_groups": 8, "top_k_groups": 3, "renormalize": False, "routed_scaling_factor": 16.0}),
}
ODD: dict[str, tuple[int, int, dict[str, Any]]] = {
    "60 experts": (60, 4, {"renormalize": False}),
    "257 experts": (257, 3, {}),  # one more than a power of two
    "one expert": (1, 1, {}),
    "all experts": (5, 5, {"score": "sigmoid"}),
    "three groups": (12, 4, {"num_groups": 3, "top_k_groups": 2, "bias": True, "score": "sigmoid"}),
    "groups of one": (6, 2, {"num_groups": 6, "top_k_groups": 3, "bias": True}),
    "a group for a token": (12, 4, {"num_groups": 3, "top_k_groups": 1}),  # all of a group chosen
}


def drawn(name: str, num_tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, int, dict[str, Any]]:
    """(logits, top_k, rule) of a router."""
    num_experts, top_k, rule = (ROUTERS | ODD)[name]
    rule = dict(rule)
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(num_tokens, num_experts, generator=generator)
    if rule.pop("bias", False):
        rule["correction_bias"] = torch.randn(num_experts, generator=generator).to(DEVICE) / 8
    return logits.to(dtype).to(DEVICE), top_k, rule


def same(found: Routed, expected: Routed) -> None:
    """Equal but for weights, which are compared where both are numbers; a NaN must be one in both."""
    assert torch.equal(found.topk_ids, expected.topk_ids)
    assert torch.equal(found.order.sorted_slots, expected.order.sorted_slots)
    assert torch.equal(found.order.expert_offsets, expected.order.expert_offsets)
    torch.testing.assert_close(found.topk_weights, expected.topk_weights, equal_nan=True)


def judge(logits: torch.Tensor, top_k: int, rule: dict[str, Any], name: str) -> None:
    found, in_torch = route(logits, top_k, **rule), route_ref(logits, top_k, **rule)
    same(found, in_torch)
    exact = route_ref(logits.double(), top_k, **rule)
    assert torch.equal(exact.topk_ids, found.topk_ids)
    precision.check(found.topk_weights, in_torch.topk_weights, exact.topk_weights, name=name)


@pytest.mark.parametrize(
    ("name", "num_tokens"),
    sampled([*ROUTERS, "60 experts", "one expert", "three groups"], [1, 3, 8], together=1),
    ids=str,
)
def test_tiles_along_with_the_order(name: str, num_tokens: int) -> None:
    logits, top_k, rule = drawn(name, num_tokens, torch.float32)
    num_experts = logits.shape[1]
    out = new_routed(num_tokens, num_experts, top_k, logits.device)
    tiles = new_token_tiles(out.order.sorted_slots, num_experts, 8)
    tiles.ready.fill_(9)
    same(route(logits, top_k, out=out, tiles=tiles, **rule), route_ref(logits, top_k, **rule))
    expected = token_tiles_ref(out.order.sorted_slots.cpu(), out.order.expert_offsets.cpu(), 8)
    used = int(tiles.num_tiles)
    assert tiles.tiles[:used].tolist() == sorted(expected.tiles[: int(expected.num_tiles)].tolist())
    assert not tiles.ready.any() and tiles.ready.shape == expected.ready.shape


def test_tiles_need_a_result_and_one_program() -> None:
    logits, top_k, rule = drawn("qwen3", 40, torch.float32)
    out = new_routed(40, 128, top_k, logits.device)
    tiles = new_token_tiles(out.order.sorted_slots, 128, 64)
    assert tiles_in_one_launch(1, 128) and not tiles_in_one_launch(40, 128) and not tiles_in_one_launch(0, 128)
    with pytest.raises(RoutingError, match="with 40 tokens"):
        route(logits, top_k, out=out, tiles=tiles, **rule)
    with pytest.raises(RoutingError, match="no result to write to"):
        route(logits[:1], top_k, tiles=tiles, **rule)


# 16 bits leave module for a lane in a key, 32 do not: two ways of choosing.
DTYPES = pytest.mark.parametrize("dtype", [torch.float16, torch.float32], ids=str)


@pytest.mark.parametrize(
    ("name", "num_tokens", "dtype"),
    sampled([*ROUTERS, *ODD], [1, 3, 17], [torch.float16, torch.float32], together=1),
    ids=str,
)
def test_equals_torch(name: str, num_tokens: int, dtype: torch.dtype) -> None:
    judge(*drawn(name, num_tokens, dtype), name)


@pytest.mark.parametrize("name", [whole("60 experts"), "three groups"])
def test_equals_torch_by_many_programs(name: str) -> None:
    logits, top_k, rule = drawn(name, 600, torch.float32)  # 2400 slots: ordered in three launches
    judge(logits, top_k, rule, name)
    judge(logits[:65].contiguous(), top_k, rule, name)  # the last program has one row of four


@pytest.mark.parametrize(
    ("num_tokens", "lanes", "rows"),
    [(1, 8192, 1), (2, 128, 4), (16, 256, 16), (17, 256, None), (17, 16, 64), (64, 64, 64), (65, 1, None)],
)
def test_which_way(num_tokens: int, lanes: int, rows: int | None) -> None:
    """The sizes of these tests lie on both sides of where one program stops."""
    assert module.one_program_rows(num_tokens, lanes) == rows


@DTYPES
def test_ties_go_to_the_lower_expert(dtype: torch.dtype) -> None:
    logits = torch.tensor([[1.0, 2.0, 2.0, 0.0, 2.0], [0.0, -0.0, 0.0, -0.0, -1.0]], dtype=dtype, device=DEVICE)
    assert route(logits, 4).topk_ids.tolist() == [[1, 2, 4, 0], [0, 1, 2, 3]]
    same(route(logits, 4), route_ref(logits, 4))
    equal = torch.full((3, 60), -0.5, dtype=dtype, device=DEVICE)
    assert route(equal, 4).topk_ids.tolist() == [[0, 1, 2, 3]] * 3
    grouped = dict(num_groups=3, top_k_groups=2, score="sigmoid", correction_bias=torch.zeros(60, device=DEVICE))
    same(route(equal, 4, **grouped), route_ref(equal, 4, **grouped))


def test_neighbours_whose_scores_round_to_a_tie_go_by_logit() -> None:
    """Sigmoid is 1 in float32 from 17 on: by score the first would win, where Llama 4 takes the greatest logit."""
    logits = torch.tensor([[20.0, 30.0, 25.0]], device=DEVICE)
    assert route(logits, 1, score="sigmoid").topk_ids.item() == 1


INF, NAN = float("inf"), float("nan")


@pytest.mark.parametrize("rule", [{}, {"score": "sigmoid"}, {"num_groups": 2, "top_k_groups": 1}], ids=str)
@pytest.mark.parametrize(
    "row",
    [
        [-INF, 1.0, -INF, 0.0, -INF, -INF],  # masked experts: weight 0, the lower first
        [-INF] * 6,  # every expert masked: softmax has no answer
        [INF, 1.0, INF, 0.0, -INF, 2.0],
        [0.0, NAN, 5.0, NAN, 1.0, 2.0],
        [NAN] * 6,
        [3e38, -3e38, 1e-45, 0.0, -1e-45, 1.0],  # the ends of float32 (infinite in float16), and subnormals
        [65504.0, -65504.0, 6e-8, 0.0, -6e-8, 1.2e-7],  # the same of float16
    ],
    ids=str,
)
@DTYPES
def test_logits_that_are_no_numbers(row: list[float], rule: dict, dtype: torch.dtype) -> None:
    logits = torch.tensor([row, [1.0, 2.0, 3.0, 4.0, 5.0, 6.0]], device=DEVICE).to(dtype)
    found = route(logits, 3, **rule)
    same(found, route_ref(logits, 3, **rule))
    assert found.topk_weights[1].isfinite().all()  # a bad row is not its neighbour's
    if any(value != value for value in row):
        assert found.topk_weights[0].isnan().any()


def test_one_expert_takes_everything() -> None:
    logits = torch.zeros(20, 60, device=DEVICE)
    logits[:, 7] = 9.0
    order = route(logits, 1).order
    assert order.sorted_slots.tolist() == list(range(20))
    assert order.expert_offsets.tolist() == [0] * 8 + [20] * 53


@settings(max_examples=40)
@given(
    num_tokens=st.integers(1, 40), group_size=st.integers(1, 9), num_groups=st.integers(1, 4), seed=st.integers(0, 2**31),
    score=st.sampled_from(["softmax", "sigmoid"]), renormalize=st.booleans(),
    dtype=st.sampled_from([torch.float16, torch.float32]),
)  # fmt: skip
def test_routing_law(
    num_tokens: int, group_size: int, num_groups: int, seed: int, score: str, renormalize: bool, dtype: torch.dtype
) -> None:
    """Distinct experts of few enough groups, descending logits, weights that sum to 1 where renormalised, their order.

    Logits are quarters, so that many tie.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = (4 * torch.randn(num_tokens, group_size * num_groups, generator=generator)).round().to(DEVICE, dtype) / 4
    top_k_groups = 1 + seed % num_groups
    top_k = 1 + seed % (group_size * top_k_groups)
    rule: dict[str, Any] = {"score": score, "renormalize": renormalize}
    rule |= {"num_groups": num_groups, "top_k_groups": top_k_groups}
    routed = route(logits, top_k, **rule)
    same(routed, route_ref(logits, top_k, **rule))
    assert (routed.topk_ids.sort(dim=1).values.diff(dim=1) > 0).all()
    assert (logits.gather(1, routed.topk_ids.long()).diff(dim=1) <= 0).all()
    assert all(len(set(row)) <= top_k_groups for row in (routed.topk_ids // group_size).tolist())
    if renormalize and top_k > 1:
        torch.testing.assert_close(routed.topk_weights.sum(1), torch.ones(num_tokens, device=DEVICE))
    order = expert_order_ref(routed.topk_ids, logits.shape[1])
    assert torch.equal(order.sorted_slots, routed.order.sorted_slots)


@pytest.mark.parametrize(
    ("local", "num_tokens"),  # 80 of 60 experts: many programs
    sampled([range(13, 59), range(0, 13), range(0, 60), range(59, 60)], [80, 17, 1], together=1),
    ids=str,
)
def test_a_rank_of_expert_parallelism(num_tokens: int, local: range) -> None:
    """Ids count from the rank's first expert; the slots of other ranks are -1, and num_slots behind the order."""
    logits, top_k, rule = drawn("60 experts", num_tokens, torch.float32)
    found, everywhere = route(logits, top_k, local_experts=local, **rule), route(logits, top_k, **rule)
    same(found, route_ref(logits, top_k, local_experts=local, **rule))
    here = torch.isin(everywhere.topk_ids, torch.tensor(list(local), dtype=torch.int32, device=DEVICE))
    assert torch.equal(found.topk_ids, torch.where(here, everywhere.topk_ids - local.start, -1))
    assert torch.equal(found.topk_weights, everywhere.topk_weights)
    assert found.order.expert_offsets.shape == (len(local) + 1,)
    assert (found.order.sorted_slots == num_tokens * top_k).sum() == (~here).sum()


@pytest.mark.parametrize("num_tokens", [0, 1, 5, 70])
def test_out_is_written_and_nothing_beside_it(num_tokens: int) -> None:
    logits, top_k, rule = drawn("60 experts", num_tokens, torch.float32)
    out = new_routed(num_tokens, 60, top_k, DEVICE)
    tensors = (out.topk_weights, out.topk_ids, out.order.sorted_slots, out.order.expert_offsets)
    storage = torch.empty(0, dtype=torch.int32, device=DEVICE).set_(out.topk_ids.untyped_storage())
    storage.fill_(-77)
    assert all(tensor.data_ptr() % 16 == 0 for tensor in tensors)  # one compiled kernel serves every size
    assert route(logits, top_k, out=out, **rule) is out
    same(out, route_ref(logits, top_k, **rule))
    assert (storage == -77).sum() == storage.numel() - sum(tensor.numel() for tensor in tensors)


def test_a_result_for_another_batch_is_refused() -> None:
    logits, top_k, rule = drawn("60 experts", 3, torch.float32)
    for wrong in (new_routed(4, 60, top_k, DEVICE), new_routed(3, 61, top_k, DEVICE)):
        with pytest.raises(ShapeError, match=r"out\.\w+"):
            route(logits, top_k, out=wrong, **rule)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("num_tokens", [1, 2, 4, 5, 16, 17, 64, 65, 256, 600, 8192])
@pytest.mark.parametrize("name", ["qwen3", "scout", "deepseek-v2", "60 experts", "257 experts", "all experts"])
def test_on_the_gpu(name: str, num_tokens: int, dtype: torch.dtype) -> None:
    judge(*drawn(name, num_tokens, dtype), name)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["qwen3", "scout", "deepseek-v2", "60 experts", "257 experts", "all experts"])
def test_within_the_bound_where_torch_is_lucky(name: str) -> None:
    """Of a few weights torch may round every one right, and leave 1 ULP: that must do, whatever is drawn."""
    for seed in range(50):
        judge(*drawn(name, 1 + seed % 3, torch.float32, seed), f"{name} {seed}")


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 2, 16, 17, 256, 8192])
@pytest.mark.parametrize("name", ["lfm2", "deepseek-v3", "three groups"])
def test_on_the_gpu_with_a_bias(name: str, num_tokens: int) -> None:
    """Scores that differ by less than they are rounded may go either way: at most one token of a thousand does."""
    logits, top_k, rule = drawn(name, num_tokens, torch.bfloat16)
    found, expected = route(logits, top_k, **rule), route_ref(logits, top_k, **rule)
    rows = (found.topk_ids == expected.topk_ids).all(dim=1)
    assert (~rows).sum() <= num_tokens / 1000
    torch.testing.assert_close(found.topk_weights[rows], expected.topk_weights[rows])
    order = expert_order_ref(found.topk_ids, logits.shape[1])
    assert torch.equal(found.order.sorted_slots, order.sorted_slots)
    assert torch.equal(found.order.expert_offsets, order.expert_offsets)


@pytest.mark.gpu
@pytest.mark.parametrize("num_tokens", [1, 16, 600, 8192])
@pytest.mark.parametrize("name", ROUTERS)
def test_in_a_cuda_graph_and_deterministic(name: str, num_tokens: int) -> None:
    logits, top_k, rule = drawn(name, num_tokens, torch.bfloat16)
    eager = route(logits, top_k, **rule)
    out = new_routed(num_tokens, logits.shape[1], top_k, "cuda")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        route(logits, top_k, out=out, **rule)
    for _ in range(3):
        graph.replay()
        same(out, eager)
        assert torch.equal(out.topk_weights, eager.topk_weights)


@pytest.mark.gpu
def test_batch_sizes_share_compiled_kernels() -> None:
    """A router compiles at most one kernel for each size of the one program's tile, and one for many programs."""
    before = len(module._route_one._instances), len(module._route_many._instances)
    for num_tokens in (*range(1, 40), 100, 128, 129):
        route(torch.randn(num_tokens, 48, device="cuda"), 3)
    assert len(module._route_one._instances) - before[0] <= len(module._ROWS)
    assert len(module._route_many._instances) - before[1] == 1


@pytest.mark.gpu
def test_logits_past_2_to_31_elements() -> None:
    """2^31 + logits of 1024 experts; the last tokens are checked, and that every slot has a place."""
    num_tokens = 2**31 // 1024 + 5
    logits = torch.zeros(num_tokens, 1024, dtype=torch.bfloat16, device="cuda")
    assert logits.numel() > 2**31
    logits[-9:] = torch.randn(9, 1024, device="cuda")
    found, last = route(logits, 2), route(logits[-9:], 2)
    assert torch.equal(found.topk_ids[-9:], last.topk_ids)
    assert torch.equal(found.topk_weights[-9:], last.topk_weights)
    assert found.order.expert_offsets[-1] == found.order.sorted_slots.unique().numel() == 2 * num_tokens
