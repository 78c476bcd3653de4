"""plots.split_k: verdicts, ties and what is said of them follow the rows; int32 wraps where it should."""

from __future__ import annotations

import json
import math

import pytest
from made_recordings import numbers, whole

from moelab import recordings, runtime
from moelab.plots import split_k as plots
from moelab.recordings import Recording
from moelab.shapes import load_model
from moelab.suites.split_k import SHAPES, shape_of

PROVENANCE = {"gpu": "NVIDIA Test", "triton": "3.6.0", "date": "2026-01-02"}
REPORTED = json.loads((runtime.data_dir() / "upstream" / "split_k_h20.json").read_text())


def row(variant: str, split_k: int, us: float, num_tokens: int = 1, stage: str = "up", **fields: object) -> dict:
    """A recorded row of shape "s" whose samples are `us` +- 1 %."""
    config = {"BLOCK_SIZE_M": 16, "BLOCK_SIZE_N": 32, "BLOCK_SIZE_K": 64, "num_stages": 3}
    return {
        "shape": "s", "stage": stage, "num_tokens": num_tokens, "variant": variant, "split_k": split_k, "config": config,
        "max_abs_error": 0.5, "bound": 1.0, "within_bound": True, "runs": 20, "distinct": 1, "spread_abs": 0.0,
        "samples_us": [us * (1 + 0.01 * (i - 4) / 4) for i in range(9)],
    } | fields  # fmt: skip


def cell(times: dict[tuple[str, int], float], num_tokens: int = 1, **fields: object) -> list[dict]:
    """A whole cell: every kind at SPLIT_K 1 and 2, 100 us where `times` names no other."""
    keys = [("classic", 1), *((kind, split) for kind in plots.KINDS for split in (1, 2))]
    return [row(*key, times.get(key, 100.0), num_tokens, **fields) for key in keys]


def made(*cells: list[dict]) -> Recording:
    return Recording("split_k", PROVENANCE, {}, tuple(r for rows in cells for r in rows))


@pytest.mark.parametrize(("us", "verdict"), [(80.0, "faster"), (100.2, "tie")])
def test_the_best_split_is_judged(us: float, verdict: str) -> None:
    (found,) = plots.outcomes(made(cell({("workspace", 2): us, ("atomic_f32", 2): 130.0, ("atomic_out", 2): 130.0})))
    assert (found["kind"], found["SPLIT_K"], found["verdict"]) == ("workspace", 2, verdict)
    assert found["Split-K / classic"] == pytest.approx(us / 100)


def test_a_loss_is_said() -> None:
    slow = dict.fromkeys([(kind, 2) for kind in plots.KINDS], 150.0)
    panel = plots.win_map(made(cell(slow)), ["s"])
    assert panel.sentence.startswith("**Of 1 cell Split-K wins 0, ties 0 and loses 1.**")
    assert "1.50 (s, up, batch 1" in panel.sentence


def test_wins_are_counted_by_batch_kind_and_cause() -> None:
    """A win that the unsplit kernel shares is the fused step's; skipped rows are no cells."""
    split = cell({("workspace", 2): 60.0}, 1)
    fused = cell({("atomic_out", 1): 70.0, ("atomic_out", 2): 70.0}, 4)
    lost = cell(dict.fromkeys([(kind, 2) for kind in plots.KINDS], 150.0), 8)
    skipped = [
        {"shape": "s", "stage": "up", "num_tokens": 1, "variant": "workspace", "split_k": 16, "skipped": "empty"}
    ]
    panel = plots.win_map(made(split, fused, lost, skipped), ["s"])
    assert [row["verdict"] for row in panel.table] == ["faster", "faster", "slower"]
    assert [row["against SPLIT_K = 1"] for row in panel.table][:2] == ["faster", "tie"]
    found = numbers(panel.sentence)
    assert found[:4] == [3, 2, 0, 1] and {0.60, 1.50} <= set(found)
    assert "1/1 at 1, 1/1 at 4, 0/1 at 8" in panel.sentence and "left out" not in panel.sentence


def test_what_is_past_its_error_bound_wins_nothing() -> None:
    wrong = cell({("atomic_out", 2): 50.0, ("workspace", 2): 90.0})
    wrong = [r | {"within_bound": r["variant"] != "atomic_out"} for r in wrong]
    panel = plots.win_map(made(wrong), ["s"])
    assert panel.table[0]["Split-K / classic"] == pytest.approx(0.9) and panel.table[0]["faster, past the bound"]
    assert "1 cell something faster is left out" in panel.sentence


def test_ties_are_drawn_apart() -> None:
    panel = plots.win_map(made(cell({}), cell({("workspace", 2): 60.0}, 4)), ["s"])
    decided, ties, text = panel.figure.data
    assert decided.z[0][1] == pytest.approx(math.log(0.6)) and ties.z[0][0] == pytest.approx(0.0)
    assert math.isnan(decided.z[0][0]) and math.isnan(ties.z[0][1])
    assert text.text[1] == "0.60 ws×2" and len(text.text) == 2


def test_by_split_names_the_fastest() -> None:
    said = plots.by_split(made(cell({("workspace", 2): 60.0})), "s", "up", 1).sentence
    assert "workspace" in said and numbers(said)[:3] == [2, 0.60, 100.0]
    beaten = made(cell({("classic", 1): 50.0}))
    assert "Fastest: classic" in plots.by_split(beaten, "s", "up", 1).sentence


def test_spread_is_of_the_runs() -> None:
    shaky = [
        r | {"distinct": 20, "spread_abs": 0.25} if r["variant"] != "workspace" and r["split_k"] > 1 else r
        for r in cell({})
    ]
    panel = plots.error_and_spread(made(shaky))
    assert "every cell: workspace." in panel.sentence
    found = {(row["kind"], row["SPLIT_K"]): row for row in panel.table}
    assert found["atomic_out", 2]["all runs equal"] == 0 and found["atomic_out", 2]["largest spread / bound"] == 0.25
    every = made([r | {"distinct": 2} for r in cell({})])
    assert "no kind" in plots.error_and_spread(every).sentence


@pytest.mark.parametrize("split", [1, 2, 16])
def test_int32_limit_is_the_smallest_batch(split: int) -> None:
    shape = load_model("deepseek-v3", disable_shared_experts_fusion=True)
    (found,) = plots.int32_limits("deepseek-v3", shape, (split,)).table[:1]
    per_token = split * shape.top_k * 2 * shape.moe_intermediate_size
    batch = found["smallest batch past int32"]
    assert (batch - 1) * per_token - 1 < 2**31 <= batch * per_token - 1 == found["largest offset"]
    assert found["in int32"] < 0


def test_int32_map_is_red_exactly_past_the_limit() -> None:
    """deepseek-v3/tp1: the last batch that fits reads 1 and is white, the one after it is past."""
    panel = plots.int32_limits("deepseek-v3/tp1", shape_of("deepseek-v3/tp1"))
    logs, texts = panel.figure.data[0], panel.figure.data[2]
    said = dict(zip(zip(texts.y, texts.x, strict=True), texts.text, strict=True))
    for row in panel.table[:-1]:
        last = row["smallest batch past int32"] - 1  # a power of two here
        heights = dict(zip(logs.x, logs.z[[*logs.y].index(row["buffer"])], strict=True))
        assert said[row["buffer"], str(last)] == "1" and heights[str(last)] <= 0 < heights[str(2 * last)]
    assert plots._times(2**31 - 1) == "1" and plots._times(2**31) == "> 1"


@pytest.mark.parametrize("value", [0, 2**31 - 1, 2**31, 2**32 + 5, 255 * 4096 * 7168])
def test_wraps_as_numpy_does(value: int) -> None:
    import numpy as np

    assert plots.as_int32(value) == np.array(value, dtype=np.int64).astype(np.int32)


DRAWN = {
    "map": lambda found: plots.win_map(found, list(SHAPES)),
    "by_split": lambda found: plots.by_split(found, "llama-4-scout/tp16", "up", 1),
    "skipped": lambda found: plots.by_split(found, "qwen3-30b-a3b/tp8", "down", 128),
    "spread": plots.error_and_spread,
    "upstream": lambda found: plots.versus_upstream(found, REPORTED),
    "int32": lambda found: plots.int32_limits("deepseek-v3/tp1", shape_of("deepseek-v3/tp1")),
}


@pytest.mark.parametrize("name", DRAWN)
def test_the_shipped_recording_draws(name: str) -> None:
    found = recordings.load("split_k")
    panel = DRAWN[name](found)
    whole(panel, *[found.source()] * (name != "int32"))


def test_shipped_workspace_repeats_and_the_map_is_whole() -> None:
    found = recordings.load("split_k")
    assert {r["distinct"] for r in found.select(variant="workspace") if "skipped" not in r} == {1}
    assert len(plots.outcomes(found)) == sum(2 * len(batches) for batches in SHAPES.values())
