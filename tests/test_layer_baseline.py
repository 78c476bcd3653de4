"""The suite layer_baseline, whole, on small sizes with the clock replaced: what it chooses, checks and writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moelab import config, recordings, runtime
from moelab.config import KernelConfig
from moelab.errors import ConfigError
from moelab.implementations import IMPLEMENTATIONS, Implementation, of_triton
from moelab.measure import Measurement
from moelab.shapes import MoEShape
from moelab.suites import layer_baseline, screening
from moelab.suites.layer_classic import Layer, weight_sets

SMALL = MoEShape.from_sizes(num_experts=4, top_k=2, hidden_size=64, moe_intermediate_size=64, dtype="float32")
TILES = [KernelConfig(16, n, 32, 1, 4, 2) for n in (64, 128)]


def fake_measure(contenders: dict, protocol: object) -> dict:
    for run in contenders.values():
        run(0)
    return {name: Measurement(name, (1.0, 2.0, 3.0)) for name in contenders}


def clock_only(contenders: dict, protocol: object) -> dict:
    """For what the suite has called already: in the interpreter every call more is a second."""
    return fake_measure(dict.fromkeys(contenders, lambda rotation: None), protocol)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_baseline, "measure", fake_measure)
    for module, name in ((layer_baseline, "measure_eager"), (screening, "measure")):
        monkeypatch.setattr(module, name, clock_only)
    monkeypatch.setattr(runtime, "require_cuda", lambda what: None)
    monkeypatch.setattr(layer_baseline, "shape_of", lambda name: SMALL)
    monkeypatch.setattr(layer_baseline, "candidates", lambda rows, *, splits: {16: TILES})


def test_every_pipeline_gets_a_row_that_loads(small: None, tmp_path: Path) -> None:
    kept: list[int] = []
    made = layer_baseline.record(("small",), (3,), tuple(of_triton()), on_rows=lambda rows: kept.append(len(rows)))
    assert kept == [len(made.rows)]
    rows = recordings.load(recordings.write(made, tmp_path / "layer_baseline.json")).rows
    assert [row["impl"] for row in rows] == list(of_triton())
    for row in rows:
        assert row["within_bound"] and row["samples_us"] == [1.0, 2.0, 3.0] and row["eager_samples_us"]
        assert row["tried"] == 4 and not row["failed"]
        assert row["padded_rows_ratio"] >= 16 / 6  # at least one block of 16 for 6 pairs


def test_the_fastest_tile_of_each_gemm_is_chosen(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def by_tile(contenders: dict, rotations: int) -> dict:
        cost = {64: 2.0, 128: 1.0}
        return {
            pair: Measurement("", (cost[pair[0].BLOCK_SIZE_N] + 1 / cost[pair[1].BLOCK_SIZE_N],)) for pair in contenders
        }

    monkeypatch.setattr(layer_baseline, "quick", by_tile)
    layer = Layer(SMALL, 3, 2, weight_sets(SMALL))
    chosen = layer_baseline.choose(layer, "triton", 2)
    assert (chosen.up.BLOCK_SIZE_N, chosen.down.BLOCK_SIZE_N) == (128, 64)


def test_a_tile_that_cannot_run_is_counted_and_passed_over(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    bad = replace(TILES[0], SPLIT_K=2)  # the classic kernel refuses it
    monkeypatch.setattr(layer_baseline, "candidates", lambda rows, *, splits: {16: [bad, TILES[1]]})
    layer = Layer(SMALL, 3, 2, weight_sets(SMALL))
    with pytest.raises(ConfigError, match="runs under none of 2 pairs"):
        layer_baseline.choose(
            layer, "triton", 2
        )  # GEMM2's first candidate, which GEMM1's are tried with, is the bad one
    monkeypatch.setattr(layer_baseline, "candidates", lambda rows, *, splits: {16: [TILES[1], bad]})
    chosen = layer_baseline.choose(layer, "triton", 2)
    assert chosen.up == chosen.down == TILES[1]
    assert len(chosen.failed) == 2 and all("SPLIT_K = 2" in why for why in chosen.failed)


def test_an_implementation_that_refuses_is_a_row_that_says_so(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(call: object) -> torch.Tensor:
        raise ConfigError("no. Expected yes. Leave it.")

    monkeypatch.setitem(IMPLEMENTATIONS, "refuses", Implementation(refuse, triton=True))
    rows = layer_baseline.record(("small",), (3,), ("triton", "refuses")).rows
    assert rows[0]["within_bound"] and "samples_us" not in rows[1]
    assert "runs under none" in rows[1]["refused"]


@pytest.mark.parametrize("rows", [1, 12, 13, 24, 25, 160, 161, 4000])
@pytest.mark.parametrize("splits", [False, True])
def test_candidates_are_legal_on_an_h200(rows: float, splits: bool) -> None:
    groups = layer_baseline.candidates(rows, splits=splits)
    assert all(block == tile.BLOCK_SIZE_M for block, tiles in groups.items() for tile in tiles)
    every = [tile for tiles in groups.values() for tile in tiles]
    assert not [why for tile in every for why in config.violations(tile, target="sm_90")]
    assert {tile.SPLIT_K for tile in every} == ({1, 2, 4, 8} if splits and rows <= 24 else {1})
