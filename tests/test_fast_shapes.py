"""The suite fast_shapes, whole, on small sizes, with the clock and the Hopper kernels replaced."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from moelab import recordings, runtime
from moelab.call import MoECall
from moelab.config import KernelConfig
from moelab.kernels.fast_instances import INSTANCES, Instance
from moelab.kernels.few_tokens import FewTokens
from moelab.measure import Measurement
from moelab.pipelines import fast, form_choice
from moelab.pipelines.form_choice import Classic, Gated
from moelab.shapes import MoEShape
from moelab.studies import fast_check, fast_shapes
from moelab.suites import fast_layer, layer_classic, screening
from moelab.tuner import form_race
from moelab.tuner.compile import Compiled
from tests.test_fast_suite import few_stand_in, stand_in

SMALL = MoEShape.from_sizes(num_experts=8, top_k=2, hidden_size=64, moe_intermediate_size=32, dtype="float32", ep_size=2,
    tp_size=2)  # fmt: skip


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    def clock(contenders: dict, protocol: object) -> dict:
        return {name: Measurement(name, (1.0 + i, 2.0 + i)) for i, name in enumerate(contenders)}

    gemm, down = fast_layer.gated_gemm, fast_layer.sorted_gemm
    monkeypatch.setattr(screening, "measure", clock)
    monkeypatch.setattr(layer_classic, "rotations_for", lambda *given, **bounds: 1)
    monkeypatch.setattr(fast_shapes, "protocol_for", lambda num_tokens: screening.short_pass(2))
    monkeypatch.setattr(runtime, "require_cuda", lambda what: None)
    monkeypatch.setattr(fast_shapes, "shape_of", lambda name: SMALL)
    monkeypatch.setattr(fast_layer, "fast_layer", stand_in)
    monkeypatch.setattr(fast_layer, "few_tokens", few_stand_in)
    monkeypatch.setattr(fast_layer, "gated_gemm", lambda *a, tma, **k: gemm(*a, tma=False, **k))
    monkeypatch.setattr(fast_layer, "sorted_gemm", lambda *a, tma, **k: down(*a, tma=False, **k))
    tiles = {16: (KernelConfig(16, 32, 32, 1, 4, 2), KernelConfig(16, 64, 32, 1, 4, 2))}
    monkeypatch.setattr(fast_shapes, "TILES", tiles)
    monkeypatch.setattr(form_choice, "TILES", tiles)
    monkeypatch.setattr(fast_shapes, "STEPS", (("uniform", (3,)), ("zipf", (3,)), ("uniform", (1,))))


def test_every_form_gets_a_row_that_loads_and_a_run_goes_on(small: None, tmp_path: Path) -> None:
    """Some ids are -1, of the other rank's experts; a run without time is cut before its first cell, and goes on later."""
    nothing = fast_shapes.record(("small",), budget_s=-1.0)
    assert not nothing.rows
    kept: list[int] = []
    made = fast_shapes.record(("small",), on_rows=lambda rows: kept.append(len(rows)))
    rows = recordings.load(recordings.write(made, tmp_path / "fast_shapes.json")).rows
    assert len(kept) == 3 and kept[-1] == len(rows)
    assert all(row["samples_us"] and row.get("within_bound", row["kind"] == "beforehand") for row in rows), rows
    assert {row["kind"] for row in rows} == {"one_launch", "few_tokens", "gated_tma", "triton", "beforehand"}
    skewed = [row["kind"] for row in rows if row["routing"] == "zipf"]
    assert skewed.count("triton") == skewed.count("gated_tma") == 4
    first = [row for row in rows if (row["routing"], row["num_tokens"]) == ("uniform", 3)]
    again = fast_shapes.record(("small",), before=first)
    assert [row["form"] for row in again.rows] == [row["form"] for row in rows]


def test_a_form_whose_kernel_was_not_compiled_says_so(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    forms = fast_shapes.forms_for(SMALL, 3)
    gated = next(each for each in forms if isinstance(each, Gated))
    compiled = {fast_shapes.jobs_of(SMALL, [gated])[0]: Compiled(0.1, "resources", "too much")}
    failed = fast_shapes.refused(SMALL, forms, compiled)
    assert gated in failed and not any(isinstance(each, Classic | Instance | FewTokens) for each in failed)
    layer = layer_classic.Layer(SMALL, 3, 1, layer_classic.weight_sets(SMALL))
    rows = fast_shapes.cell("small", layer, "uniform", [gated, *[f for f in forms if f not in failed]], failed)
    assert rows[0]["refused"] == "resources: too much" and "samples_us" not in rows[0]


def test_each_shape_is_there_and_every_batch_has_each_kind_of_form() -> None:
    for name in fast_shapes.SHAPES:
        shape = fast_shapes.shape_of(name)
        assert shape.dtype == "bfloat16" and shape.activation == "silu" and shape.format.is_plain
        for _, batches in fast_shapes.STEPS:
            for num_tokens in batches:
                kinds = {fast_shapes.kind_of(each) for each in fast_shapes.forms_for(shape, num_tokens)}
                assert {"gated_tma", "triton", "one_launch"} <= kinds


def test_kernels_compile_ahead_in_other_processes() -> None:
    """One of each kind, by the process's own class, in this process's stead: jobs are what a launch later looks for."""
    shape = fast_shapes.shape_of("olmoe-1b-7b/tp1")
    forms = fast_shapes.forms_for(shape, 3)
    jobs = fast_shapes.jobs_of(shape, forms)
    assert len(jobs) == len(set(jobs)) and {kernel for _, kernel, _ in jobs} == {"gated_tma", "grouped_gemm"}
    assert torch.bfloat16 == getattr(torch, shape.dtype)


def test_the_choice_is_set_beside_the_fastest_and_another_rule(
    small: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture, tmp_path: Path
) -> None:
    """The whole layer, order included, by each form; ids of the other rank's experts among them."""

    def clock(contenders: dict, protocol: object) -> dict:
        return {name: Measurement(name, (5.0 - i, 5.0 - i)) for i, name in enumerate(contenders)}

    def without_tma(call: MoECall, tma: bool) -> torch.Tensor:
        return sorted_pipeline(call, False)

    sorted_pipeline = fast.sorted_pipeline
    for name, stand in (("few_tokens", few_stand_in), ("fast_layer", stand_in), ("sorted_pipeline", without_tma)):
        monkeypatch.setattr(fast, name, stand if name == "sorted_pipeline" else lambda *a, stand=stand, **k: stand(*a))
    monkeypatch.setattr(fast, "_check", lambda call: None)
    monkeypatch.setattr(form_race, "measure", clock)
    monkeypatch.setattr(fast_check, "shape_of", lambda name: SMALL)
    monkeypatch.setattr(fast_check, "protocol_for", lambda num_tokens: screening.short_pass(1))
    monkeypatch.setattr(fast_check, "STEPS", (("uniform", (3,)), ("zipf", (3,))))
    monkeypatch.setattr(form_race, "EACH", 1)
    monkeypatch.setattr(form_race, "LIKELY", 1.0)
    monkeypatch.setattr(form_choice, "TILES", {16: (KernelConfig(16, 32, 32, 1, 4, 2),)})
    fast.chosen.cache_clear()
    form_choice._configs.cache_clear()
    other = repr(INSTANCES[16])
    made = fast_check.record(("small",), others={"small|3": other})
    rows = recordings.load(recordings.write(made, tmp_path / "fast_check.json")).rows
    assert [row["routing"] for row in rows] == ["uniform", "zipf"] and not any(row["wrong"] for row in rows)
    assert all(row["tried"] >= 4 and row["other"] and row["chosen"] and row["best"] for row in rows)
    printed = capsys.readouterr().out
    assert printed.count("small") == 2 and "%" in printed
    assert "chosen" in fast_check.summary(rows) and "other" in fast_check.summary(rows)
    fast.chosen.cache_clear()
    form_choice._configs.cache_clear()
