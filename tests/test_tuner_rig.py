"""The tensors that are tuned over, the gate, and the rotations of samples: real kernels in Triton's interpreter."""

from __future__ import annotations

import dataclasses
import functools
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab import runtime
from moelab.config import KernelConfig
from moelab.errors import RoutingError, UnknownNameError
from moelab.measure import rotations_for
from moelab.routing import Routing, make_routing
from moelab.shapes import MoEShape
from moelab.tuner import rig as rigs
from moelab.tuner.device import GpuDevice
from moelab.tuner.evaluate import Request
from moelab.tuner.gate import telling_pairs
from moelab.tuner.problem import Problem
from moelab.tuner.rig import Rig, routings_of
from moelab.tuner.worker import Task, Worker, classify

# hidden 72 and inner 40: neither is a multiple of a tile, in columns or in K.
SHAPE = MoEShape("tiny", num_experts=4, top_k=2, hidden_size=72, moe_intermediate_size=40, dtype="float32")
PROBLEM = Problem(SHAPE, "cpu", "sm_90", "3.7.1", (1, 21))
SMALL, TALL = KernelConfig(16, 32, 32, 1), KernelConfig(32, 64, 64, 2)
STAGES = {"up": (SMALL,), "down": (TALL,), "layer": (SMALL, dataclasses.replace(SMALL, BLOCK_SIZE_N=64))}

interpreted = pytest.mark.skipif(runtime.current().mode == "gpu", reason="the gpu tests hold this against a GPU")


@pytest.fixture(scope="module")
def rig() -> Rig:
    rigs.MOST_ROTATIONS, before = 2, rigs.MOST_ROTATIONS  # each is aligned by an interpreted kernel
    made = Rig(PROBLEM)
    for b in PROBLEM.batch_sizes:
        for stage in STAGES:
            made.prepare(stage, b)
    rigs.MOST_ROTATIONS = before
    return made


@interpreted
@pytest.mark.parametrize("stage", STAGES)
@pytest.mark.parametrize("b", PROBLEM.batch_sizes)
def test_right_kernels_pass_the_gate(rig: Rig, stage: str, b: int) -> None:
    assert rig.check(stage, b, STAGES[stage]) is None


def spoilt(right, how: str):
    def wrong(call, out) -> None:
        right(call, out)
        if how == "scaled":
            out *= 1.0001
        elif how == "unweighted" and call.topk_weights is not None:
            right(call._replace(topk_weights=None), out)
        elif how == "a row missing":
            out[len(out) // 2] = float("nan")
        elif how == "infinite":
            out[-1, -1] = float("inf")
        elif how == "last row of a run":
            last = call.alignment.sorted_token_ids[: int(call.alignment.num_tokens_post_padded)][-1]
            out[int(last.clamp(max=call.num_pairs - 1))] *= 1.01

    return wrong


@interpreted
@pytest.mark.parametrize(
    ("how", "stage", "failure"),
    [
        ("scaled", "up", "wrong"), ("scaled", "down", "wrong"), ("scaled", "layer", "wrong"),
        ("unweighted", "down", "wrong"), ("unweighted", "layer", "wrong"), ("unweighted", "up", None),
        ("a row missing", "up", "nan"), ("a row missing", "layer", "nan"), ("infinite", "down", "nan"),
        ("last row of a run", "up", "wrong"),
    ],
)  # fmt: skip
def test_wrong_kernels_do_not(rig: Rig, monkeypatch: pytest.MonkeyPatch, how: str, stage: str, failure: str) -> None:
    monkeypatch.setattr(rig, "gemms", {gemm: spoilt(right, how) for gemm, right in rig.gemms.items()})
    verdict = rig.check(stage, 21, STAGES[stage])
    assert (verdict and verdict[0]) == failure


@interpreted
def test_a_result_left_from_before_is_no_result(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    assert rig.check("up", 21, (SMALL,)) is None
    monkeypatch.setattr(rig, "gemms", dict.fromkeys(rig.gemms, lambda *args: None))
    for stage in ("up", "layer"):
        assert rig.check(stage, 21, STAGES[stage])[0] == "nan"


@interpreted
def test_a_worker_over_real_kernels(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """What cannot be launched fails by its class, and costs nobody else anything."""
    monkeypatch.setattr(Rig, "sample", lambda self, stage, b, c, rounds, stop: [1.0] * rounds, raising=False)
    monkeypatch.setattr(Rig, "trouble", lambda self: None, raising=False)
    odd = dataclasses.replace(SMALL, BLOCK_SIZE_N=48)
    said: list[tuple] = []
    Worker(rig, said.append).run(Task(3, Request("up", 21, ((SMALL,), (odd,), (TALL,)), 2), (0, 1, 2)))
    assert [m[0] for m in said] == ["begin", *["begin", "end"] * 3, "done"]
    outcomes = [m[3] for m in said if m[0] == "end"]
    assert [o.failure for o in outcomes] == [None, "launch", None] and outcomes[0].samples_us == (1.0, 1.0)
    assert "not a power of two" in outcomes[1].message


def test_failures_by_name() -> None:
    class OutOfMemoryError(RuntimeError): ...

    class TritonError(Exception): ...

    class OutOfResources(TritonError): ...

    class PTXASError(TritonError): ...

    found = [
        OutOfMemoryError(),
        OutOfResources(),
        PTXASError(),
        RuntimeError("CUDA error: out of memory"),
        KeyError("x"),
    ]
    assert [classify(e) for e in found] == ["memory", "resources", "compile", "memory", "launch"]


@interpreted
def test_the_order_of_rotations_in_a_short_look(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every contender's sample s calls the same rotations; the one that was just checked comes last."""
    device = GpuDevice.__new__(GpuDevice)
    device.__dict__.update(rig.__dict__)
    seen: list[list[list[int]]] = []

    def queued(run, turns) -> list[float]:
        seen.append([list(turn) for turn in turns])
        return [10.0] * len(turns)

    monkeypatch.setattr(device, "_queued", queued)
    monkeypatch.setattr(device, "calls_per_sample", lambda stage, b: 3)
    R = rig.cell(21).rotations
    expected = [[(1 + 3 * s + j) % R for j in range(3)] for s in range(4)]
    assert device.sample("up", 21, (SMALL,), 4, None) == [10.0] * 4 and seen == [expected]
    seen.clear()
    assert device.sample("up", 21, (SMALL,), 4, 11.0) == [10.0] * 4 and seen == [expected[:1], expected[1:]]
    seen.clear()
    assert device.sample("up", 21, (SMALL,), 4, 9.0) == [10.0] and seen == [expected[:1]]
    monkeypatch.setattr("moelab.tuner.device.MOST_QUEUED", 6)
    seen.clear()
    assert len(device.sample("up", 21, (SMALL,), 4, None)) == 4 and seen == [expected[:2], expected[2:]]


def test_calls_per_sample_follow_the_bytes(rig: Rig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelab.tuner.device.rotations_for", functools.partial(rotations_for, l2_bytes=60e6))
    device = GpuDevice.__new__(GpuDevice)
    device.__dict__.update(rig.__dict__)
    assert device.calls_per_sample("up", 1) == rig.cell(1).rotations  # a tiny layer: all there are
    large = MoEShape("large", num_experts=128, top_k=8, hidden_size=2048, moe_intermediate_size=768)
    device.shape = large
    assert device.bytes_per_call("up", 1) == pytest.approx(8 * 1536 * 2048 * 2)
    assert device.bytes_per_call("layer", 4096) == pytest.approx(128 * 3 * 768 * 2048 * 2)
    cell = dataclasses.replace(rig.cell(1), routings=rig.cell(1).routings * 8)
    device._cells = {1: cell, 4096: cell}
    assert [device.calls_per_sample("up", b) for b in (1, 4096)] == [10, 1]


# --- rows that are looked at, routings ---------------------------------------------------------------------------------


@settings(max_examples=60)
@given(st.integers(1, 60), st.integers(1, 9), st.integers(0, 99), st.booleans())
def test_telling_pairs_hold_the_ends_of_the_fullest_run(tokens: int, experts: int, seed: int, foreign: bool) -> None:
    routing = make_routing("zipf", tokens, experts, min(2, experts), seed=seed)
    ids = torch.where(routing.topk_ids == 0, -1, routing.topk_ids) if foreign else routing.topk_ids
    routing = Routing(ids, routing.topk_weights, experts)
    pairs, flat = telling_pairs(routing), ids.flatten()
    assert pairs.tolist() == sorted(set(pairs.tolist())) and int(pairs.min()) >= 0 and int(pairs.max()) < flat.numel()
    assert len(pairs) <= 50
    counts = routing.tokens_per_expert()
    if counts.max() > 0:
        run = (flat == int(counts.argmax())).nonzero().flatten()
        assert {int(run[0]), int(run[-1])} <= set(pairs.tolist())
    if (flat < 0).any():
        assert (flat[pairs] < 0).any()


def test_recorded_routings_are_runs_of_the_file(tmp_path: Path) -> None:
    ids = np.stack([np.arange(10) % 4, (np.arange(10) + 1) % 4], axis=1)
    np.save(tmp_path / "ids.npy", ids)
    problem = dataclasses.replace(PROBLEM, routing=str(tmp_path / "ids.npy"))
    found = routings_of(problem, 25, 3, "cpu")
    assert len(found) == 3 and all(r.topk_ids.shape == (25, 2) and r.topk_ids.dtype == torch.int32 for r in found)
    for r in found:
        assert ((r.topk_ids[1:, 0] - r.topk_ids[:-1, 0]) % 4).unique().numel() <= 2  # consecutive, but for the wrap
    assert torch.equal(found[1].topk_ids, routings_of(problem, 25, 3, "cpu")[1].topk_ids)
    np.save(tmp_path / "one.npy", ids[:, :1])
    with pytest.raises(RoutingError, match="top_k"):
        routings_of(dataclasses.replace(problem, routing=str(tmp_path / "one.npy")), 25, 1, "cpu")


def test_another_kernel_is_refused() -> None:
    with pytest.raises(UnknownNameError, match="grouped_gemm"):
        Rig(dataclasses.replace(PROBLEM, kernel="split_k_atomic"))
