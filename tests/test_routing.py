"""Routing rules against hand-made cases, laws of alignment, and routing files."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given
from hypothesis import strategies as st

from moelab.errors import RoutingError, ShapeError, UnknownNameError
from moelab.routers import grouped_topk, sigmoid_topk, softmax_topk
from moelab.routing import (
    ROUTINGS,
    check_ids,
    count_experts,
    expected_experts_touched,
    load_routing,
    make_routing,
    max_padded_pairs,
    moe_align_block_size_ref,
)


def test_softmax_topk_by_hand() -> None:
    logits = torch.tensor([[1.0, 3.0, 2.0, 0.0]])
    weights, ids = softmax_topk(logits, 2)
    assert ids.tolist() == [[1, 2]] and ids.dtype == torch.int32
    e = torch.tensor([3.0, 2.0]).exp()
    torch.testing.assert_close(weights, (e / e.sum())[None])
    plain, _ = softmax_topk(logits, 2, renormalize=False)
    torch.testing.assert_close(plain, torch.softmax(logits, -1)[:, [1, 2]])


def test_a_bias_chooses_but_does_not_weigh() -> None:
    logits = torch.tensor([[2.0, 1.0, 0.0]])
    weights, ids = sigmoid_topk(logits, 1, correction_bias=torch.tensor([0.0, 0.0, 5.0]))
    assert ids.item() == 2
    torch.testing.assert_close(weights, torch.sigmoid(torch.tensor([[0.0]])))


def test_groups_keep_their_best_and_drop_the_rest() -> None:
    # Groups (0, 1), (2, 3), (4, 5); the best group by its best expert is the last, then the first.
    logits = torch.tensor([[5.0, -9.0, 4.9, 4.8, 6.0, -9.0]])
    _, ids = grouped_topk(logits, 2, num_groups=3, top_k_groups=2)
    assert sorted(ids[0].tolist()) == [0, 4]
    # With a bias a group's score is the sum of its two best: then the middle group wins over the first.
    _, ids = grouped_topk(logits, 2, num_groups=3, top_k_groups=1, score="sigmoid", correction_bias=torch.zeros(6))
    assert sorted(ids[0].tolist()) == [2, 3]


@given(st.integers(0, 2**31), st.integers(1, 12), st.integers(1, 9))
def test_one_group_is_no_group(seed: int, num_experts: int, num_tokens: int) -> None:
    logits = torch.randn(num_tokens, num_experts, generator=torch.Generator().manual_seed(seed))
    top_k = 1 + seed % num_experts
    grouped, plain = grouped_topk(logits, top_k), softmax_topk(logits, top_k)
    if top_k > 1:
        torch.testing.assert_close(grouped[0], plain[0])
    assert torch.equal(grouped[1], plain[1])


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (dict(top_k=5), "top_k = 5 with 4 experts"),
        (dict(top_k=0), "top_k = 0"),
        (dict(top_k=1, num_groups=3), "groups"),
        (dict(top_k=3, num_groups=2, top_k_groups=1), "hold 2 experts"),
    ],
)
def test_routings_that_cannot_be(arguments: dict, words: str) -> None:
    with pytest.raises(RoutingError, match=words):
        grouped_topk(torch.zeros(2, 4), **arguments)


def test_logits_of_another_rank() -> None:
    with pytest.raises(ShapeError, match="num_tokens, num_experts"):
        softmax_topk(torch.zeros(2, 3, 4), 1)


@pytest.mark.parametrize("name", ROUTINGS)
@pytest.mark.parametrize(("num_tokens", "num_experts", "top_k"), [(1, 1, 1), (3, 8, 8), (600, 60, 4), (0, 4, 2)])
def test_made_routings_are_valid_and_repeat(name: str, num_tokens: int, num_experts: int, top_k: int) -> None:
    routing = make_routing(name, num_tokens, num_experts, top_k, seed=3)
    check_ids(routing.topk_ids, num_experts)
    assert routing.topk_ids.shape == (num_tokens, top_k)
    torch.testing.assert_close(routing.topk_weights.sum(1), torch.ones(num_tokens))
    again = make_routing(name, num_tokens, num_experts, top_k, seed=3)
    assert torch.equal(routing.topk_ids, again.topk_ids) and torch.equal(routing.topk_weights, again.topk_weights)


def test_zipf_is_skewed_and_uniform_is_not() -> None:
    counts = {name: make_routing(name, 4000, 32, 2, seed=1).tokens_per_expert() for name in ("uniform", "zipf")}
    assert counts["zipf"].max() > 3 * counts["uniform"].max()


def test_expected_experts_touched_is_the_mean_of_uniform_routings() -> None:
    drawn = [make_routing("uniform", 20, 64, 4, seed=s).experts_touched() for s in range(300)]
    expected = expected_experts_touched(64, 4, 20)
    standard_error = np.std(drawn) / len(drawn) ** 0.5
    assert abs(np.mean(drawn) - expected) < 4 * standard_error


@given(st.integers(1, 9), st.integers(1, 40), st.sampled_from([1, 4, 16]), st.integers(0, 2**31), st.floats(0, 1))
def test_alignment_law(num_experts: int, num_tokens: int, block: int, seed: int, foreign: float) -> None:
    """Every pair stands once, in a block of its expert; runs are stable, padded, and within the bound."""
    routing = make_routing("zipf", num_tokens, num_experts, 1 + seed % num_experts, seed=seed)
    rng = np.random.default_rng(seed)
    ids = routing.topk_ids.clone()
    ids[torch.from_numpy(rng.random(ids.shape) < foreign)] = -1
    flat, pairs = ids.flatten(), ids.numel()
    aligned = moe_align_block_size_ref(ids, block, num_experts)
    total = int(aligned.num_tokens_post_padded)
    assert total % block == 0 and total <= aligned.sorted_token_ids.numel() == max_padded_pairs(
        pairs, block, num_experts
    )
    blocks = aligned.sorted_token_ids[:total].view(-1, block)
    for expert, block_rows in zip(aligned.expert_ids[: total // block].tolist(), blocks.tolist(), strict=True):
        own = [pair for pair in block_rows if pair < pairs]
        assert own and own == sorted(own) and all(int(flat[pair]) == expert for pair in own)
    used = [pair for pair in aligned.sorted_token_ids[:total].tolist() if pair < pairs]
    assert sorted(used) == list(range(pairs))


def test_counts_leave_foreign_experts_out() -> None:
    assert count_experts(torch.tensor([[0, 2], [2, -1], [9, 1]]), 3).tolist() == [1, 1, 2]


SAVERS = {
    ".npy": lambda ids, path: np.save(path, ids.numpy()),
    ".pt": torch.save,
    ".safetensors": lambda ids, path: safetensors.torch.save_file({"topk_ids": ids}, path, {"made": "by a test"}),
}


@pytest.mark.parametrize("suffix", SAVERS)
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64, torch.uint8, torch.uint16, torch.uint32, torch.uint64])
def test_recorded_ids_come_back(tmp_path: Path, suffix: str, dtype: torch.dtype) -> None:
    ids = make_routing("zipf", 10, 16, 4).topk_ids
    path = tmp_path / f"ids{suffix}"
    SAVERS[suffix](ids.to(dtype), path)
    routing = load_routing(path, 16)
    assert torch.equal(routing.topk_ids, ids) and routing.name == path.name


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (np.zeros((2, 2, 2), np.int32), "int"),
        (np.zeros((4, 2), np.float32), "float32"),
        (np.array([[0, 16]]), r"\[0, 16\]"),
        (np.array([[3, 3]]), "twice"),
        (np.array([[2**64 - 1, 3]], np.uint64), "2147483647"),
        (np.zeros((4, 2), bool), "bool"),
        (np.zeros(4, [("a", "i4")]), "holds"),
    ],
)
def test_recorded_ids_that_nobody_can_use(tmp_path: Path, content: np.ndarray, words: str) -> None:
    np.save(tmp_path / "ids.npy", content)
    with pytest.raises(RoutingError, match=words):
        load_routing(tmp_path / "ids.npy", 16)


@pytest.mark.parametrize("suffix", SAVERS)
@pytest.mark.parametrize("share", [0, 0.02, 0.5])
def test_a_truncated_routing_file(tmp_path: Path, suffix: str, share: float) -> None:
    path = tmp_path / f"ids{suffix}"
    SAVERS[suffix](torch.zeros((100, 2), dtype=torch.int32), path)
    whole = path.read_bytes()
    path.write_bytes(whole[: round(share * len(whole))])
    with pytest.raises(RoutingError, match="Record topk_ids again"):
        load_routing(path, 16)


def safetensors_file(header: object, data: bytes = bytes(64)) -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


TENSOR = {"dtype": "I32", "shape": [8, 2], "data_offsets": [0, 64]}


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (safetensors_file({"a": TENSOR | {"data_offsets": [0, 80]}}), "64 bytes of data, at data_offsets .0, 80."),
        (safetensors_file({"a": TENSOR | {"data_offsets": [0, 80]}}, bytes(60)), "60 bytes of data"),
        (safetensors_file({"a": TENSOR | {"data_offsets": [16, 80], "shape": [6, 2]}}), "data_offsets .16, 80."),
        (safetensors_file({"a": TENSOR | {"data_offsets": [-64, 64]}}), "holds -64 at a"),
        (safetensors_file({"a": TENSOR | {"shape": [10**30, 2]}}), "shape"),
        (safetensors_file({"a": TENSOR | {"dtype": "F32"}}), "F32, which is no integer"),
        (safetensors_file(b"[" * 100_000), "nested deeper"),
        (safetensors_file([TENSOR]), "should be a valid dictionary"),
        (safetensors_file({}), "holds 0 tensors"),
        (b"\xff" * 8, "header alone would end at"),
    ],
)
def test_a_safetensors_header_is_checked(content: bytes, words: str, tmp_path: Path) -> None:
    (tmp_path / "ids.safetensors").write_bytes(content)
    with pytest.raises(RoutingError, match=words):
        load_routing(tmp_path / "ids.safetensors", 16)


def test_a_small_file_that_claims_endless_ids(tmp_path: Path) -> None:
    torch.save(torch.zeros((1, 1), dtype=torch.int32).expand(10**12, 1), tmp_path / "ids.pt")
    with pytest.raises(RoutingError, match="at most"):
        load_routing(tmp_path / "ids.pt", 16)


@pytest.mark.parametrize("suffix", SAVERS)
def test_what_is_no_file_holds_no_routing(suffix: str, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / f"fifo{suffix}")
    (tmp_path / f"zeros{suffix}").symlink_to("/dev/zero")
    (tmp_path / f"folder{suffix}").mkdir()
    for name, words in {"fifo": "a FIFO", "zeros": "a device", "folder": "Is a directory"}.items():
        with pytest.raises(RoutingError, match=words):
            load_routing(tmp_path / f"{name}{suffix}", 16)


def test_a_file_of_several_tensors_is_refused(tmp_path: Path) -> None:
    ids = torch.zeros((4, 1), dtype=torch.int32)
    safetensors.torch.save_file({"layer.0": ids, "layer.1": ids + 1}, tmp_path / "ids.safetensors")
    with pytest.raises(RoutingError, match="Record topk_ids again"):
        load_routing(tmp_path / "ids.safetensors", 16)


def test_unknown_routing_offers_the_nearest() -> None:
    with pytest.raises(UnknownNameError, match="uniform"):
        make_routing("unifrom", 4, 4, 1)
