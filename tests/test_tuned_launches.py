"""Kernels beside the compatible kernel as the rig launches them, held against the gate."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch
from error_rows import unhelpful
from sampling import sampled

from moelab import runtime
from moelab.config import KernelConfig
from moelab.errors import ConfigError, WorkspaceError
from moelab.fused_moe import fused_moe
from moelab.routing import Alignment
from moelab.shapes import MoEShape
from moelab.tuner import rig as module
from moelab.tuner import sorted_rows
from moelab.tuner.problem import COMPATIBLE, Problem
from moelab.tuner.rig import Rig
from moelab.tuner.tuned_kernels import TUNED, implementation_of

# hidden 72 and inner 40: neither is a multiple of a tile, in columns or in K; their rows are of whole 16 bytes.
SHAPE = MoEShape("tiny", num_experts=4, top_k=2, hidden_size=72, moe_intermediate_size=40, dtype="float32")
SMALL_TILE, TALL_TILE = KernelConfig(16, 32, 32, 1), KernelConfig(32, 64, 16, 2)
OTHERS = tuple(name for name in TUNED if name != COMPATIBLE)

interpreted = pytest.mark.skipif(runtime.current().mode == "gpu", reason="the gpu tests hold this against a GPU")


@pytest.fixture(scope="module", params=OTHERS)
def rig(request: pytest.FixtureRequest) -> Rig:
    module.MOST_ROTATIONS, before = 2, module.MOST_ROTATIONS  # each is aligned by an interpreted kernel
    kernel = request.param
    problem = Problem(SHAPE, "cpu", "sm_90", "3.7.1", (1, 21), kernel=kernel, split_k=implementation_of(kernel).split_k)
    made = Rig(problem)
    made.block_sizes = [16, 32]
    for b in problem.batch_sizes:
        for stage in ("up", "down", "layer"):
            made.prepare(stage, b)
    module.MOST_ROTATIONS = before
    return made


def contenders(rig: Rig, stage: str) -> list[tuple[KernelConfig, ...]]:
    """Two tiles, and the largest SPLIT_K that fits the smallest K."""
    split = 2 if max(rig.problem.split_k) > 1 else 1
    large = dataclasses.replace(TALL_TILE, SPLIT_K=split)
    return [(SMALL_TILE,) * (1 + (stage == "layer")), (large,) * (1 + (stage == "layer"))]


@interpreted
@pytest.mark.parametrize(("stage", "b"), sampled(["up", "down", "layer"], [21, 1], together=1))
def test_right_kernels_pass_the_gate(rig: Rig, stage: str, b: int) -> None:
    for contender in contenders(rig, stage):
        assert rig.check(stage, b, contender) is None, contender


@interpreted
def test_the_layer_that_is_timed_is_the_layer_that_is_served(rig: Rig) -> None:
    """Bit for bit what `fused_moe` gives under that implementation and those configs."""
    cell = rig.cell(21)
    for pair in contenders(rig, "layer"):
        timed = rig.launch("layer", 21, pair)
        timed.run(0)
        served = fused_moe(
            cell.states[0], rig.w13[0].w, rig.w2[0].w, topk_weights=cell.routings[0].topk_weights,
            topk_ids=cell.routings[0].topk_ids, impl=TUNED[rig.problem.kernel], config=pair[0], down_config=pair[1],
        )  # fmt: skip
        assert torch.equal(timed.result(), served)


@interpreted
@pytest.mark.parametrize(
    ("stage", "how"), sampled(["up", "down", "layer"], ["scaled", "a row missing", "nothing"], together=1)
)
def test_wrong_kernels_do_not(rig: Rig, monkeypatch, stage: str, how: str) -> None:
    def spoilt(right):
        def wrong(call, out) -> None:
            if how != "nothing":
                right(call, out)
            if how == "scaled":
                out *= 1.001
            elif how == "a row missing":
                out[0] = float("nan")

        return wrong

    monkeypatch.setattr(rig, "gemms", {gemm: spoilt(right) for gemm, right in rig.gemms.items()})
    verdict = rig.check(stage, 21, contenders(rig, stage)[0])
    assert verdict is not None and verdict[0] == ("wrong" if how == "scaled" else "nan")


@interpreted
def test_another_activation_is_seen(rig: Rig, monkeypatch) -> None:
    """Where GEMM1 applies it: the gate's exact rows are activated too."""
    up = rig.gemms["up"]

    def wrong(call, out) -> None:
        up(call._replace(activation="gelu"), out)

    monkeypatch.setitem(rig.gemms, "up", wrong)
    verdict = rig.check("up", 21, contenders(rig, "up")[0])
    assert (verdict and verdict[0]) == ("wrong" if rig.kernel.activates else None)


@interpreted
def test_the_workspace_holds_the_largest_of_all(rig: Rig) -> None:
    needed = max(rig.problem.split_k) * 21 * SHAPE.top_k * max(2 * SHAPE.moe_intermediate_size, SHAPE.hidden_size)
    assert rig.workspace.numel() == (needed if max(rig.problem.split_k) > 1 else 0)


@interpreted
def test_nothing_is_allocated_while_it_is_timed(rig: Rig, monkeypatch) -> None:
    for stage in ("up", "down", "layer"):
        run = rig.launch(stage, 21, contenders(rig, stage)[1]).run
        with monkeypatch.context() as patched:
            for maker in ("empty", "zeros", "empty_like"):
                patched.setattr(torch, maker, lambda *args, maker=maker, **options: pytest.fail(f"torch.{maker}"))
            run(1)


@interpreted
@pytest.mark.parametrize("kernel", [name for name in TUNED if not implementation_of(name).needs_tma])
def test_pairs_of_another_ranks_experts(tmp_path: Path, monkeypatch, kernel: str) -> None:
    """A recorded routing of one rank of two: half of its ids are -1, and their rows of the results are zeros."""
    ids = np.stack([np.arange(7) % 4, np.full(7, -1)], axis=1).astype(np.int32)
    ids[3] = -1
    np.save(tmp_path / "ids.npy", ids)
    monkeypatch.setattr(module, "MOST_ROTATIONS", 1)
    made = Rig(Problem(SHAPE, "cpu", "sm_90", "3.7.1", (7,), routing=str(tmp_path / "ids.npy"), kernel=kernel))
    made.block_sizes = [16, 32]
    assert all((routing.topk_ids < 0).any() for routing in made.cell(7).routings)
    for stage in ("up", "down", "layer"):
        assert made.check(stage, 7, contenders(made, stage)[0]) is None, stage


def test_rows_are_laid_where_pairs_lie_and_gathered_again() -> None:
    """5 pairs in blocks of 4 rows: expert 0 has pairs 1 and 4, expert 1 pair 0, expert -1 the others."""
    ids = torch.tensor([[1], [0], [-1], [-1], [0]], dtype=torch.int32)
    order = torch.tensor([1, 4, 5, 5, 0, 5, 5, 5, 2, 3, 5, 5, 77, 0], dtype=torch.int32)  # the last two are not in use
    alignment = Alignment(order, torch.tensor([0, 1, -1]), torch.tensor([12]), 4, 5, 2)
    place = sorted_rows.places(alignment, ids)
    assert place.tolist() == [4, 0, -1, -1, 1]
    pairs = torch.arange(1.0, 11.0).view(5, 2)
    rows = sorted_rows.laid(pairs, place, 12)
    assert rows.isnan().all(dim=1).nonzero().flatten().tolist() == [2, 3, *range(5, 12)]
    pairs[2:4] = 0
    assert torch.equal(sorted_rows.gathered(rows, place), pairs)


@interpreted
def test_a_config_that_the_kernel_cannot_run_is_refused(rig: Rig, monkeypatch) -> None:
    if max(rig.problem.split_k) == 1:
        with pytest.raises(ConfigError, match=f"SPLIT_K = 2.*{rig.problem.kernel}"):
            rig.launch("up", 21, (dataclasses.replace(TALL_TILE, SPLIT_K=2),))
    else:
        monkeypatch.setattr(rig, "_most_splits", 1)
        with pytest.raises(WorkspaceError, match=r"SPLIT_K = 2.*holds 1 slices") as caught:
            rig.launch("down", 21, (dataclasses.replace(TALL_TILE, SPLIT_K=2),))
        assert unhelpful(str(caught.value)) is None
