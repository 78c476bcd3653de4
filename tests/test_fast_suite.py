"""The suite fast_layer, whole, on small sizes, with the clock and the Hopper kernel replaced."""

from __future__ import annotations

import itertools
import statistics
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from moelab import fused_moe, recordings, reference, runtime
from moelab.config import KernelConfig
from moelab.errors import UnknownNameError
from moelab.kernels.expert_order import expert_order
from moelab.kernels.fast_instances import ALL, INSTANCES, Instance
from moelab.kernels.fast_layer import GEMM1, GEMM2, SUM
from moelab.kernels.few_tokens import FORMS, FewTokens
from moelab.measure import Measurement
from moelab.pipelines.form_choice import Classic, Gated, near_instances
from moelab.shapes import MoEShape
from moelab.suites import bench, fast_choice, fast_layer, fast_rivals, layer_classic, screening
from moelab.suites.layer_classic import Layer, weight_sets

SMALL = MoEShape.from_sizes(num_experts=8, top_k=2, hidden_size=64, moe_intermediate_size=32, dtype="float32")
TILE = KernelConfig(16, 32, 32, 1, 4, 2)


def fake_measure(contenders: dict, protocol: object) -> dict:
    for run in contenders.values():
        run(0)
    return {name: Measurement(name, (1.0, 2.0, 3.0)) for name in contenders}


def stand_in(x, w13, w2, weights, ids, tiles, instance, *, parts=7, scratch=None, overlap=True):
    """By the oracle, as far as the parts go: what GEMM2 leaves in its scratch memory, and the sum of it."""
    y = scratch[1] if scratch else x.new_empty((ids.numel(), x.shape[1]))
    if parts & GEMM2:
        one = reference.fused_moe_ref(
            x.repeat_interleave(ids.shape[1], 0), w13, w2, weights.flatten()[:, None], ids.flatten()[:, None]
        )
        y.copy_(one)
    return y.view(*ids.shape, -1).sum(1) if parts & SUM else torch.full_like(x, float("nan"))


def few_stand_in(x, w13, w2, weights, ids, form, *, overlap=True, side_by_side=True):
    return reference.fused_moe_ref(x, w13, w2, weights, ids)


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (fast_layer, screening):
        monkeypatch.setattr(module, "measure", fake_measure)
    # Else so small a layer gets 48 rotations, each with an alignment of its own.
    monkeypatch.setattr(layer_classic, "rotations_for", lambda *given, **bounds: 2)
    monkeypatch.setattr(runtime, "require_cuda", lambda what: None)
    monkeypatch.setattr(fast_layer, "shape_of", lambda name: SMALL)
    monkeypatch.setattr(fast_layer, "fast_layer", stand_in)
    monkeypatch.setattr(fast_layer, "few_tokens", few_stand_in)
    monkeypatch.setattr(fast_rivals, "known_configs", lambda layer, name: [(TILE, TILE)])


def recorded(num_tokens: int, tmp_path: Path) -> dict[str, list[dict]]:
    """Rows of one cell by routing, as they load, all of them right and timed."""
    kept: list[int] = []
    made = fast_layer.record(("small",), (num_tokens,), on_rows=lambda rows: kept.append(len(rows)))
    assert kept[0] < kept[1] == len(made.rows) and len(kept) == len(fast_layer.ROUTINGS), "after each routing"
    rows = recordings.load(recordings.write(made, tmp_path / "fast_layer.json")).rows
    for row in rows:
        assert row["samples_us"] == [1.0, 2.0, 3.0]
        assert row.get("within_bound", "logits" in row["impl"] or "alone" in row["impl"]), row
    return {routing: [row for row in rows if row["routing"] == routing] for routing in fast_layer.ROUTINGS}


def test_every_contender_gets_a_row_that_loads(small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    served = fast_layer.instance_of(SMALL, 3)
    monkeypatch.setattr(fast_layer, "served_by", lambda *asked: served)
    rows = recorded(3, tmp_path)
    uniform = [row["impl"] for row in rows["uniform"]]
    assert uniform[:3] == ["classic", "grouped_mm", "fast"] and rows["uniform"][2]["instance"] == repr(served)
    assert uniform[-5:-3] == ["classic, from logits", "fast, from logits"]
    assert uniform[-3:] == ["fast, GEMM1 alone", "fast, GEMM2 alone", "fast, the sum alone"]
    assert "fast without one launch" in uniform and "fast without two CTAs an SM" in uniform
    skewed = [row["impl"] for row in rows["zipf"]]
    assert set(skewed) <= {"classic", "grouped_mm", "fast", "fast, best instance"}


def test_a_few_tokens_are_timed_as_they_are_served(small: None, tmp_path: Path) -> None:
    rows = recorded(1, tmp_path)["uniform"]
    assert [row["instance"] for row in rows if row["impl"] == "fast"] == [repr(fast_layer.served_by(SMALL, 1))]
    ideas = {row["impl"].removeprefix("fast without ") for row in rows if "without" in row["impl"]}
    assert ideas == {
        "programmatic dependent launch (PDL)", "prefetch of weights before griddepcontrol.wait", "grid order for L2 reuse",
    }  # fmt: skip
    assert "fast, from logits" in {row["impl"] for row in rows} and not any("alone" in row["impl"] for row in rows)


def test_the_gated_kernels_are_timed_where_they_serve(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With their configs in the row, over an alignment made beforehand, and without TMA as their idea switched off."""
    gated, asked = Gated(TILE, TILE), []
    gemm = fast_layer.gated_gemm
    monkeypatch.setattr(fast_layer, "served_by", lambda *asked: gated)
    monkeypatch.setattr(fast_layer, "gated_gemm", lambda *a, tma, **k: asked.append(tma) or gemm(*a, tma=False, **k))
    rows = {row["impl"]: row for row in recorded(3, tmp_path)["zipf"]}
    assert rows["fast"]["instance"] == "gated_tma" and rows["fast"]["config"] == TILE.to_json()
    layer = Layer(SMALL, 3, 1, weight_sets(SMALL))
    ideas, parts = fast_layer.ablated(layer, gated)
    asked.clear()
    ideas["weights by TMA"](0)
    assert asked == [False] and not parts


def test_where_the_classic_layer_serves_its_run_is_fast(
    small: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three tokens of this layer: the classic layer's configs under "fast", and the best form beside them."""
    called = []
    layer_of = Layer.contender
    monkeypatch.setattr(fast_layer, "served_by", lambda *asked: Classic(TILE, TILE))
    monkeypatch.setattr(Layer, "contender", lambda self, *pair: called.append(pair) or layer_of(self, *pair))
    rows = {row["impl"]: row for row in recorded(3, tmp_path)["uniform"]}
    assert set(called) == {(TILE, TILE)}
    assert rows["fast"]["config"] == rows["classic"]["config"] and rows["fast"]["instance"] == "triton"
    best = rows.get("fast, best instance", rows["fast"])["instance"]
    assert best in map(fast_layer.name_of, fast_layer.forms_near(SMALL, 3))
    assert not any("without" in impl or "alone" in impl for impl in rows)


def test_the_forms_for_a_few_tokens_may_be_the_best() -> None:
    assert set(FORMS) < set(fast_layer.forms_near(SMALL, 1)) and set(FORMS) < set(fast_layer.forms_near(SMALL, 4))
    assert set(FORMS) < set(fast_layer.forms_near(SMALL, 12))
    assert not any(isinstance(each, FewTokens) for each in fast_layer.forms_near(SMALL, 13))


def test_each_idea_of_a_few_tokens_is_off_alone(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(fast_layer, "few_tokens", lambda *a, **options: asked.append((a[5], *options.values())))
    layer = Layer(SMALL, 1, 1, weight_sets(SMALL))
    for run in (fast_layer.by_form(layer, FORMS[0]), *fast_layer.ablated(layer, FORMS[0])[0].values()):
        run(0)
    late = replace(FORMS[0], early=0)
    assert asked == [(FORMS[0], True, True), (FORMS[0], False, True), (late, True, True), (FORMS[0], True, False)]


@pytest.mark.parametrize("instance", ALL, ids=str)
def test_each_idea_off_is_another_instance_or_launch(small: None, instance: Instance) -> None:
    layer = Layer(SMALL, 3, 1, weight_sets(SMALL))
    off = fast_layer.without(layer, instance)
    assert (f"{instance.rows} weight rows a tile" in off) == (instance.row_blocks == 2)
    out = fast_layer.fast(layer, instance)(0)
    assert all(run(0).allclose(out, rtol=1e-4, atol=1e-5) for run in off.values())


def test_a_part_alone_works_on_what_the_parts_before_it_left(small: None) -> None:
    layer = Layer(SMALL, 3, 2, weight_sets(SMALL))
    parts = fast_layer.alone(layer, INSTANCES[16])
    whole = fast_layer.fast(layer, INSTANCES[16])
    for i in range(2):
        assert parts["GEMM2"](i).isnan().all(), "no sum is made"
        assert parts["the sum"](i).allclose(whole(i), rtol=1e-4, atol=1e-5)


def test_tiles_by_expert_hold_the_same_rows() -> None:
    ids = torch.tensor([[0, 3], [3, 5], [3, 0], [1, 3]], dtype=torch.int32)
    found = fast_layer.tiles_for(expert_order(ids, 8), INSTANCES[16])
    again = fast_layer.by_expert(found, 1)
    used = int(found.num_tiles)
    assert sorted(found.tiles[:used].tolist()) == sorted(again.tiles[:used].tolist())
    assert again.tiles[:used, 2].tolist() == [0, 1, 3, 5] and found.tiles[0, 2] in (0, 3)
    many = torch.tensor([0] * 40 + [1] * 80 + [2] * 18, dtype=torch.int32)[:, None]  # three, five and two tiles
    found = fast_layer.tiles_for(expert_order(many, 3), replace(INSTANCES[16], cluster=2))
    again = fast_layer.by_expert(found, 2)
    assert again.tiles[: int(found.num_tiles), 2].tolist() == [0, 0, 0, 1, 1, 1, 1, 1, 2, 2]


def test_known_configs_are_of_this_cell() -> None:
    layer = type("layer", (), {"shape": fast_layer.shape_of("scout/tp4"), "num_tokens": 64})()
    pairs = fast_rivals.known_configs(layer, "scout/tp4")
    assert pairs and all(up.BLOCK_SIZE_M == down.BLOCK_SIZE_M for up, down in pairs)
    assert set(fast_rivals.known_configs(layer, "nobody")) < set(pairs)


def test_without_a_file_there_is_no_known_config(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The loader's default is none: the classic layer is then searched for, not set up to lose."""
    monkeypatch.setenv("MOELAB_CONFIG_DIR", str(tmp_path))
    layer = type("layer", (), {"shape": SMALL, "num_tokens": 3})()
    assert fast_rivals.known_configs(layer, "nobody") == []


def test_what_hopper_alone_runs_answers_to_its_name_alone() -> None:
    assert "fast" not in fused_moe.available_implementations(torch.bfloat16)
    with pytest.raises(UnknownNameError, match="Unknown implementation 'fsat'"):
        bench.bench(SMALL, [1], ["fsat"])


def test_neighbours() -> None:
    first, second = ALL[:2]
    assert fast_layer.near(first) == [first, second]
    assert len(fast_layer.near(second)) == 3
    assert GEMM1 | GEMM2 | SUM == 7


@pytest.mark.parametrize(
    ("num_tokens", "top_k", "num_experts"), [(1, 8, 128), (64, 8, 128), (8192, 2, 8), (4096, 8, 256)]
)
def test_candidates_are_near_the_rows_of_an_expert(num_tokens: int, top_k: int, num_experts: int) -> None:
    shape = MoEShape.from_sizes(num_experts=num_experts, top_k=top_k, hidden_size=64, moe_intermediate_size=768)
    found = fast_choice.candidates_for(num_tokens, shape)
    assert found[0] == fast_layer.instance_of(shape, num_tokens) and 1 < len(found) == len(set(found))
    assert set(near_instances(shape.expected_rows(num_tokens), fast_choice.CANDIDATES)) == set(found)
    smallest = sorted({each.tokens for each in ALL})
    assert (
        num_tokens > 1 or max(each.tokens for each in found) <= smallest[1]
    )  # the smallest fits, and its neighbour is tried
    assert num_tokens < 4096 or min(each.tokens for each in found) >= 32


@pytest.mark.parametrize("num_tokens", [1, 2, 12, 13])
def test_candidates_for_a_few_tokens(num_tokens: int) -> None:
    found = fast_choice.forms_for(num_tokens, SMALL)
    few = [each for each in found if isinstance(each, FewTokens)]
    assert set(few) == (set(FORMS) if num_tokens < 13 else set()) and len(set(found)) == len(found)
    assert found[0] == fast_layer.served_by(SMALL, num_tokens)


def test_candidates_fit_a_processor() -> None:
    for each in fast_choice.CANDIDATES:
        assert each.ctas_per_sm * (each.shared_bytes + 1024) <= 228 * 1024 and each.shared_bytes <= 227 * 1024
        assert each.tokens % each.box == each.tokens % each.grain == 0


def test_every_candidate_gets_a_row_that_loads(small: None, tmp_path: Path) -> None:
    kept: list[int] = []
    made = fast_choice.record(("small",), (1, 3), on_rows=lambda rows: kept.append(len(rows)))
    assert kept == sorted(set(kept)) and kept[-1] == len(made.rows) and len(kept) == 4, (
        "after each batch size and routing"
    )
    rows = recordings.load(recordings.write(made, tmp_path / "fast_choice.json")).rows
    assert {row["num_tokens"] for row in rows} == {1, 3}
    for num_tokens, routing in itertools.product((1, 3), fast_layer.ROUTINGS):
        of_cell = [row for row in rows if (row["num_tokens"], row["routing"]) == (num_tokens, routing)]
        assert [row["by_rule"] for row in of_cell] == [True] + [False] * (len(of_cell) - 1)
        assert all(row["samples_us"] == [1.0, 2.0, 3.0] and row["within_bound"] for row in of_cell)


def test_a_candidate_that_is_wrong_is_told_and_not_timed(small: None, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = fast_choice.candidates_for(3, SMALL)[1]
    assert not isinstance(wrong, FewTokens)
    monkeypatch.setattr(fast_layer, "fast_layer", lambda *a, **k: stand_in(*a, **k) + (a[6] == wrong))
    (row,) = [row for row in fast_choice.record(("small",), (3,), ("uniform",)).rows if not row["within_bound"]]
    assert row["instance"] == repr(wrong) and row["problem"] and "samples_us" not in row


def ratios(form: Instance, other: Instance, routing: str) -> dict[tuple[str, float], float]:
    """(Shape, rows an expert gets) -> recorded time of that form over that of the other, in every cell that has both."""
    found, recorded = {}, recordings.load("fast_choice")
    for name, b in itertools.product(fast_layer.SHAPES, fast_layer.BATCHES):
        rows = recorded.select(shape=name, num_tokens=b, routing=routing)
        times = {row["instance"]: statistics.median(row["samples_us"]) for row in rows}
        shape = fast_layer.shape_of(name)
        if {repr(form), repr(other)} <= set(times):
            found[name, b * shape.top_k / shape.num_experts] = times[repr(form)] / times[repr(other)]
    return found


def test_small_tiles_are_those_of_16_alone() -> None:
    """Up to 3 rows an expert they take the time of the tiles of 8 and of one CTA an SM that went."""
    eight, one_token = Instance(1, 2, 6, 8, 8, 8, 2), Instance(2, 1, 12, 8, 8, 8)
    for other, routing in itertools.product((eight, one_token), fast_layer.ROUTINGS):
        few = [found for (_, rows), found in ratios(INSTANCES[16], other, routing).items() if rows <= 3]
        assert len(few) == 18 and 0.98 < statistics.geometric_mean(few) < 1.0
