"""The fastest layer beside its rivals: who is counted, and over which floor."""

from __future__ import annotations

import copy
import json

import pytest

from moelab import recordings, roofline, runtime
from moelab.plots import fast_layer, rivals
from moelab.plots.panel import geometric_mean

FAST = recordings.load("fast_layer")
AT = roofline.load_ceilings("NVIDIA_H200", "floors")
APART = fast_layer.load_rivals()
SGLANG, FLASHINFER = APART.sglang, APART.flashinfer


def test_each_contender_is_over_the_floor_of_its_own_rows() -> None:
    rows = {(r["who"], r["shape"], r["num_tokens"]): r["over"] for r in rivals.rows_of(FAST, AT, APART)}
    theirs = next(r for r in FLASHINFER["rows"] if (r["name"], r["M"]) == ("mixtral-8x7b/tp2", 16))
    assert rows[rivals.FLASHINFER, "mixtral-8x7b/tp2", 16] == theirs["rival"] / theirs["floor"]
    assert rows[rivals.ORDERING, "mixtral-8x7b/tp2", 16] == theirs["moelab"] / theirs["floor"]
    best = next(r for r in SGLANG["rows"] if (r["name"], r["M"]) == ("scout/tp4", 1))
    assert (
        rows[rivals.SGLANG, "scout/tp4", 1]
        == min(best[key] for key in fast_layer.SGLANG if best.get(key)) / best["floor"]
    )
    assert not any(
        shape == "qwen3-235b-a22b/tp4" and who in (rivals.SGLANG, rivals.FLASHINFER) for who, shape, _ in rows
    )


def test_the_mean_is_over_the_shapes_that_all_have() -> None:
    panel = rivals.beside(FAST, AT, APART)
    shapes = {"qwen3-30b-a3b/tp1", "lfm2-8b/tp1", "deepseek-v3/tp8"}
    for trace in panel.figure.data[: len(rivals.LOOKS)]:
        table = [row for row in panel.table if row["who"] == trace.name and row["time / floor"] in shapes]
        assert len(table) == 3
        assert list(trace.y) == pytest.approx([geometric_mean([row[str(b)] for row in table]) for b in trace.x])
    assert {row["time / floor"] for row in panel.table} > shapes


def test_a_rival_that_wins_is_said_to() -> None:
    faster = copy.deepcopy(FLASHINFER)
    for row in faster["rows"]:
        row["rival"] = row["moelab"] / 1.5
    said = rivals.beside(FAST, AT, fast_layer.Rivals(SGLANG, faster)).sentence
    assert "ahead in 40 by at most 50%" in said and said.index("FlashInfer, order") < said.index("moelab fast 1")


def test_flashinfers_rows_have_their_source_and_their_floor() -> None:
    """bytes over 4.3 TB/s, FLOP over 790 TFLOP/s, as the file says."""
    sizes = {"qwen3-30b-a3b/tp1": (2048, 768), "mixtral-8x7b/tp2": (4096, 7168), "deepseek-v3/tp8": (7168, 256),
             "lfm2-8b/tp1": (2048, 1792), "glm-4.5-air/tp2": (4096, 704)}  # fmt: skip
    text = (runtime.data_dir() / "upstream" / "h200_flashinfer_cutedsl.json").read_text()
    content = json.loads(text)
    assert "0.7.4" in content["source"] and len(content["rows"]) == 40
    for row in content["rows"]:
        hidden, inner = sizes[row["name"]]
        memory = (row["uniq"] * 3 * inner * hidden * 2 + 2 * row["M"] * hidden * 2) / 4.3e6
        assert row["floor"] >= memory * 0.999 and row["rival"] > 0 and row["moelab"] > 0
