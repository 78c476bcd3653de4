"""The suite quantised, whole, on small sizes with the clock replaced: formats beside each other, and its figure."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from moelab import recordings, runtime
from moelab.config import KernelConfig, violations
from moelab.errors import RuntimeModeError
from moelab.formats import get_format
from moelab.measure import Measurement
from moelab.shapes import MoEShape
from moelab.suites import quantised, screening
from moelab.suites.layer_classic import Layer, weight_sets

SMALL = MoEShape.from_sizes(num_experts=4, top_k=2, hidden_size=64, moe_intermediate_size=64, dtype="float16")
FORMATS = ("plain", "int8_w8a8_block_64x64", "int4_w4a16_group_32")


def by_position(contenders: dict, protocol: object) -> dict:
    """A later contender is faster; what the suite has called already runs no more."""
    return {name: Measurement(name, (10.0 - i, 11.0 - i)) for i, name in enumerate(contenders)}


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quantised, "measure", by_position)
    monkeypatch.setattr(screening, "measure", by_position)
    monkeypatch.setattr(runtime, "require_cuda", lambda what: None)
    monkeypatch.setattr(quantised, "shape_of", lambda name, format: replace(SMALL, format=get_format(format)))
    monkeypatch.setattr(quantised, "_FEW", ((16, 32, 32, 1, 4, 2), (16, 64, 128, 1, 4, 2)))
    monkeypatch.setattr(quantised, "_GATED", {True: ((16, 32, 64, 1, 4, 2), (16, 128, 64, 1, 4, 2)), False: ()})


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="fp16 carriers in the interpreter")
def test_every_format_gets_its_rows_in_one_run(small: None, tmp_path: Path) -> None:
    kept: list[int] = []
    made = quantised.record(("small",), FORMATS, (3,), on_rows=lambda rows: kept.append(len(rows)))
    assert kept == [len(made.rows)] == [7]
    rows = recordings.load(recordings.write(made, tmp_path / "quantised.json")).rows
    classic, gated = ("triton default", "triton searched"), "gated searched"
    assert [(row["format"], f"{row['impl']} {row['config_name']}") for row in rows] == [
        (get_format(name).name, label)
        for name in FORMATS
        for label in ((*classic, gated) if "block" in name else classic)
    ]
    assert all(row["within_bound"] and row["samples_us"] for row in rows)
    searched = [row for row in rows if row["config_name"] == "searched"]
    assert all(row["tried"] == 2 and not row["failed"] for row in searched)
    steps = {row["format"]: row["config"]["BLOCK_SIZE_K"] for row in searched}
    assert steps == {"plain": 128, "int8_w8a8_block_64x64": 64, "int4_w4a16_group_32": 128}  # cut to its block
    assert [row["multiplies"] for row in rows] == ["float16"] * 2 + ["int8"] * 3 + ["float16"] * 2
    assert rows[0]["bytes"] > rows[2]["bytes"] > rows[5]["bytes"]
    assert len({row["samples_us"][0] for row in rows}) == 7  # all took turns in one measurement


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="the interpreter refuses fp8")
def test_a_format_that_does_not_run_here_is_a_row_that_says_so(small: None) -> None:
    rows = quantised.record(("small",), ("fp8_w8a8_block_64x64", "plain"), (3,)).rows
    assert "interpreter" in rows[0]["refused"] and "samples_us" not in rows[0]
    assert rows[1]["format"] == "plain" and rows[1]["samples_us"]


@pytest.mark.parametrize("name", quantised.FORMATS)
@pytest.mark.parametrize("num_tokens", quantised.BATCHES)
def test_candidates_run_on_an_h200(name: str, num_tokens: int) -> None:
    format = get_format(name)
    for shape in quantised.SHAPES:
        tiles = quantised.candidates(quantised.shape_of(shape, format), num_tokens)
        assert len(tiles) >= 4 and len(set(tiles)) == len(tiles)
        gated = quantised.candidates(quantised.shape_of(shape, format), num_tokens, "gated")
        for tile in [*tiles, *(gated if format.granularity == "block" else ())]:
            rules = {"dtype": format.product_dtype("bfloat16"), "weight_bits": format.widened_bits}
            assert violations(tile, target="sm_90", **rules) == () and format.step_refused(tile.BLOCK_SIZE_K) is None


def test_tiles_that_do_not_run_are_named(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    shape = replace(SMALL, format=get_format("int4_w4a16_group_32"))
    layer = Layer(shape, 3, 1, weight_sets(shape))
    bad = KernelConfig(16, 64, 32, 1, SPLIT_K=2)
    monkeypatch.setattr(quantised, "candidates", lambda shape, num_tokens, impl: [bad])
    best, tried, failed = quantised.choose(layer, 1, "triton")
    assert (best, tried) == (None, 1) and "SPLIT_K = 2" in failed[0]


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="there is one")
def test_without_a_gpu_it_says_so() -> None:
    with pytest.raises(RuntimeModeError, match="quantised"):
        quantised.record()
