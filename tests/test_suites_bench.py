"""The suite bench, whole on small sizes with its clock replaced."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from test_suites import SMALL, fake_measure

from moelab import config_files, roofline, runtime
from moelab.cli import printing
from moelab.config import KernelConfig
from moelab.errors import ConfigError, RoutingError, UnknownNameError
from moelab.implementations import IMPLEMENTATIONS, Implementation
from moelab.inputs import make_inputs
from moelab.measure import Measurement
from moelab.shapes import MoEShape
from moelab.suites import bench, layer_classic


@pytest.fixture
def timed(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[str]]:
    """A bench whose clock is replaced; what it was asked to time: {"graph": names, "eager": names}."""
    asked: dict[str, list[str]] = {}

    def clock(kind: str, us: float):
        def fake(contenders: dict, protocol: object) -> dict:
            asked[kind] = list(contenders)
            fake_measure(contenders, protocol)
            # Later names are faster; the one that is wrong, or comes last, would win.
            starts = {name: us - i for i, name in enumerate(contenders)}
            return {name: Measurement(name, tuple(at + i / 100 for i in range(9))) for name, at in starts.items()}

        return fake

    monkeypatch.setattr(bench, "measure", clock("graph", 50.0))
    monkeypatch.setattr(bench, "measure_eager", clock("eager", 500.0))
    monkeypatch.setattr(bench, "require_gpu", lambda: None)
    return asked


def refuses(call: object) -> torch.Tensor:
    raise ConfigError("No such tile. Expected another. Take it.")


def test_a_bench_takes_any_names_and_calls_no_wrong_one_fastest(timed: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    right = IMPLEMENTATIONS["torch"]
    for name, impl in {
        "mine": lambda call: right(call), "refuses": refuses, "wrong": lambda call: right(call) * 1.001,
        "nan": lambda call: right(call) * float("nan"), "narrow": lambda call: right(call).half(),
    }.items():  # fmt: skip
        monkeypatch.setitem(IMPLEMENTATIONS, name, Implementation(impl))
    names = ["triton", "torch", "refuses", "mine", "wrong", "nan", "narrow", "mine"]
    (result,) = bench.bench(SMALL, [5], names)
    rows = {row["impl"]: row for row in result.rows}
    assert list(rows) == ["mine", "triton", "torch", "narrow", "nan", "wrong", "refuses"]
    assert timed == {
        "graph": ["triton", "mine", "wrong", "nan", "narrow"],
        "eager": ["triton", "torch", "mine", "wrong", "nan", "narrow"],
    }  # fmt: skip
    assert {name for name in rows if rows[name]["within_bound"]} == {"triton", "torch", "mine"}
    assert [name for name in rows if rows[name].get("fastest")] == ["mine"]
    assert [name for name in rows if rows[name].get("eager_fastest")] == ["mine"]
    assert not any(rows[name].get("tie") or rows[name].get("eager_tie") for name in ("wrong", "nan", "narrow"))
    assert rows["wrong"]["max_abs_error"] > rows["wrong"]["bound"] > rows["mine"]["max_abs_error"]
    assert "torch.float16" in rows["narrow"]["problem"] and "problem" not in rows["mine"]
    assert rows["nan"]["max_abs_error"] is None and rows["nan"]["median_us"] < rows["mine"]["median_us"]
    assert rows["refuses"]["refused"].startswith("ConfigError: No such tile") and "median_us" not in rows["refuses"]
    assert "median_us" not in rows["torch"] and "asks the host" in rows["torch"]["note"]
    assert len(rows["torch"]["eager_samples_us"]) == 9
    assert result.protocols["eager"]["rotations"] == result.protocols["graph"]["rotations"] == 8


def test_a_bench_takes_the_kernels_own_files(
    timed: dict, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Of those that have some; the others take the compatible kernel's."""
    monkeypatch.setenv("MOELAB_CONFIG_DIR", str(tmp_path))
    up, down = KernelConfig(16, 32, 16, 1, SPLIT_K=2), KernelConfig(16, 64, 16, 1)
    folder = tmp_path / runtime.triton_key(runtime.versions()["triton"] or "")
    for best, is_down in ((up, False), (down, True)):
        name = config_files.question(SMALL).file_name("cpu", down=is_down, kernel="split_k_workspace")
        config_files.write_config_file(folder / name, {4: best})
    given: dict[str, object] = {}
    for impl in ("triton", "split_k_workspace", "split_k_atomic"):
        right = IMPLEMENTATIONS[impl]

        def seen(call, impl=impl, right=right):
            given[impl] = (call.config, call.down_config)
            return right(call)

        monkeypatch.setitem(IMPLEMENTATIONS, impl, replace(right, run=seen, options={}))
    (result,) = bench.bench(SMALL, [5], ["triton", "split_k_workspace", "split_k_atomic"], eager=False)
    default = (result.config.config, result.down.config)
    assert given == {"triton": default, "split_k_workspace": (up, down), "split_k_atomic": default}
    rows = {row["impl"]: row for row in result.rows}
    assert [name for name in rows if "own_configs" in rows[name]] == ["split_k_workspace"]
    printing.print_bench(SMALL, result)
    assert f"split_k_workspace: {up.short()} and {down.short()} from {folder}" in capsys.readouterr().out


def test_a_bench_without_eager_times_and_one_that_all_refuse(timed: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(IMPLEMENTATIONS, "refuses", Implementation(refuses))
    (result,) = bench.bench(SMALL, [1], ["torch"], eager=False)
    assert timed == {} and result.protocols["eager"] is None
    assert not [key for row in result.rows for key in row if "_us" in key]
    with pytest.raises(ConfigError, match="No such tile"):
        bench.bench(SMALL, [1], ["refuses"])


def test_a_bench_is_out_of_memory_as_torch_says(timed: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    def hungry(call: object) -> torch.Tensor:
        raise torch.OutOfMemoryError

    monkeypatch.setitem(IMPLEMENTATIONS, "hungry", Implementation(hungry))
    with pytest.raises(torch.OutOfMemoryError):
        bench.bench(SMALL, [1], ["torch", "hungry"])


def ranked(routing: str, num_tokens: int = 40, ep_size: int = 4) -> layer_classic.Layer:
    shape = MoEShape.from_sizes(
        num_experts=16, top_k=3, hidden_size=32, moe_intermediate_size=16, dtype="float32", tp_size=4, ep_size=ep_size
    )
    return layer_classic.Layer(shape, num_tokens, 4, layer_classic.weight_sets(shape), routing)


@pytest.mark.parametrize("routing", ["uniform", "zipf", "dirichlet"])
def test_a_rank_gets_its_share_of_the_models_routing(routing: str) -> None:
    from moelab.routing import make_routing

    layer = ranked(routing)
    assert layer.shape.num_experts == 4
    for seed, found in enumerate(layer.routings):
        everywhere = make_routing(routing, 40, 16, 3, seed=seed).topk_ids
        assert torch.equal(found.topk_ids.cpu(), torch.where(everywhere < 4, everywhere, -1))


@pytest.mark.parametrize("routing", ["uniform", "zipf"])
def test_floor_and_padding_count_what_the_rank_has(routing: str) -> None:
    layer = ranked(routing)
    ids = [r.topk_ids.cpu() for r in layer.routings]
    rows = sum(int((i >= 0).sum()) for i in ids) / 4
    read = sum(int((i >= 0).any(1).sum()) for i in ids) / 4
    cost = bench.cost_of(layer)
    assert cost.flops == pytest.approx(6 * rows * 32 * 16)
    assert cost.bytes_activations == pytest.approx((read + 40) * 32 * 4)
    assert cost.bytes_weights == pytest.approx(layer.experts_touched() * 3 * 32 * 16 * 4)
    used = bench._lookup(layer.shape, 40, down=False)
    padding = bench.padding_of(layer, used)
    blocks = sum(-(-int((i == expert).sum()) // used.config.BLOCK_SIZE_M) for i in ids for expert in range(4))
    assert padding == roofline.Padding(rows, blocks * used.config.BLOCK_SIZE_M / 4)


def test_the_whole_models_floor_is_the_rooflines() -> None:
    layer = ranked("uniform", ep_size=1)
    assert bench.cost_of(layer) == roofline.layer_cost(layer.shape, 40, layer.experts_touched())


def test_a_bench_judges_a_rotation_that_has_work_here(timed: dict, monkeypatch: pytest.MonkeyPatch) -> None:
    """One token on one rank of 16: most routings leave it nothing, and a kernel that returns zeros would pass."""
    shape = MoEShape.from_sizes(
        num_experts=16, top_k=1, hidden_size=32, moe_intermediate_size=16, dtype="float32", tp_size=4, ep_size=4
    )
    monkeypatch.setitem(IMPLEMENTATIONS, "zeros", Implementation(lambda call: torch.zeros_like(call.hidden_states)))
    (result,) = bench.bench(shape, [1], ["torch", "zeros", "triton"])
    assert 0 < result.experts_touched < 1
    assert {row["impl"]: row["within_bound"] for row in result.rows} == {"torch": True, "triton": True, "zeros": False}


@pytest.mark.parametrize("name", ["mxfp4_w4a16", "int8_w8a8_channel", "int4_w4a16_group_32"])
def test_a_bench_of_quantised_weights(name: str, timed: dict) -> None:
    """By who takes the format, against float64 with codes at the same points; mxfp4 has no files, and gets the default rule."""
    shape = MoEShape(
        "quantised", num_experts=4, top_k=2, hidden_size=64, moe_intermediate_size=32, dtype="float16", format=name
    )
    impls = bench.taking_of(shape)
    (result,) = bench.bench(shape, [5], impls, eager=False)
    assert impls == ["triton", "torch"] and result.config.is_default
    assert all(row["within_bound"] for row in result.rows)


def test_a_routing_of_another_layer_fails_before_anything_is_measured(tmp_path: Path) -> None:
    shape = MoEShape("small", num_experts=8, top_k=2, hidden_size=32, moe_intermediate_size=16)
    np.save(tmp_path / "ids.npy", np.array([[0, 1, 2]]))
    with pytest.raises(RoutingError, match=r"1 tokens of 3 experts each\. Expected at least one, of 2 experts"):
        bench.bench(shape, [4], ["torch"], routing=str(tmp_path / "ids.npy"))
    with pytest.raises(RoutingError, match="No such file"):
        bench.bench(shape, [4], ["torch"], routing=str(tmp_path / "none.npy"))
    with pytest.raises(UnknownNameError, match="Did you mean uniform"):
        bench.bench(shape, [4], ["torch"], routing="unifrm")
    np.save(tmp_path / "ids.npy", np.array([[0, 1], [2, 3], [4, 5]]))
    layer = layer_classic.Layer(shape, 4, 2, [make_inputs(shape, 1)], str(tmp_path / "ids.npy"))
    assert [r.num_tokens for r in layer.routings] == [4, 4]
    assert all(set(map(tuple, r.topk_ids.tolist())) == {(0, 1), (2, 3), (4, 5)} for r in layer.routings)
