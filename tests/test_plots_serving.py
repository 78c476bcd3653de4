"""The figures of notebook 09: from a recording with intervals, and from the single medians there are until one is made."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from made_recordings import PROVENANCE, numbers, whole

from moelab import recordings
from moelab.errors import RecordingError
from moelab.plots import in_short, served
from moelab.plots import serving as plots
from moelab.recordings import Recording
from moelab.serving import measured
from moelab.serving.measured import Measured

MODEL = "qwen3-30b-a3b"
BATCHES = (1, 64)
STEPS = {"grouped_mm": 1.0, "batched_mm": 0.9, "moelab_triton_default": 0.85, "moelab_triton": 0.82, "moelab_fast": 0.8}
"""Contender -> its step, in parts of grouped_mm's; what it saves are its experts', which are half of that."""


def made(steps: Mapping[str, float] = STEPS) -> Recording:
    rows: list[dict[str, Any]] = []
    common = {"model": MODEL, "layers": 48, "moe_layers": 48, "routing": "balanced"}

    def add(kind: str, batch: int, length: int, us: Mapping[str, float]) -> None:
        tokens = batch * (1 if "decode" in kind else length)
        for name, time in us.items():
            samples = [time * (1 + i / 1000) for i in range(-4, 5)]
            rows.append({**common, "kind": kind, "batch": batch, "length": length, "num_tokens": tokens, "impl": name,
                         "experts_touched": 8.0, "load": 1.0, "samples_us": samples})  # fmt: skip

    for batch in BATCHES:
        whole_step = 1e4 * batch**0.5
        add("decode", batch, 256, {name: whole_step * part for name, part in steps.items()})
        add("experts of decode", batch, 256, {name: whole_step * (part - 0.5) for name, part in steps.items()})
        add("decode, eager", batch, 256, dict.fromkeys(steps, 9e4))
    add("prefill", 1, 2048, dict.fromkeys(steps, 7e4))
    add("experts of prefill", 1, 2048, {name: 7e4 * (part - 0.5) for name, part in steps.items()})
    for name, part in steps.items():
        rows.append({**common, "kind": "serving", "batch": 16, "length": 512, "impl": name, "run": 0, "ttft_ms": [100.0, 200.0],
                     "tpot_ms": [9.0 * part], "itl_ms": [9.0 * part] * 9, "output_tok_s": 100 / part})  # fmt: skip
    rows.append(
        {
            **common,
            "kind": "decode",
            "batch": 256,
            "length": 256,
            "impl": "batched_mm",
            "refused": "OutOfMemoryError: 24 GiB",
        }
    )
    rows.append({**common, "kind": "error", "batch": 1, "length": 64, "impl": "moelab_fast", "within_bound": True})
    protocol = {"decode": "in a CUDA graph"}
    return Recording("serve_bench", PROVENANCE | {"transformers": "5.17.0"}, protocol, tuple(rows))


RECORDED, PEER = measured.of(made(), MODEL), measured.upstream()


@pytest.mark.parametrize("draw", [plots.gains, plots.walk, plots.predictions, plots.host])
@pytest.mark.parametrize("found", [RECORDED, PEER], ids=["recorded", "single"])
def test_each_figure_is_whole(draw: Any, found: Measured) -> None:
    whole(draw(found), "Made up" if not found.single else "transformers 5.17.0")


def test_gains_are_over_grouped_mm() -> None:
    panel = plots.gains(RECORDED)
    fast = {row["step"]: row for row in panel.table if row["experts"] == "moelab_fast"}
    assert fast["decode 64"]["gain"] == pytest.approx(1.25) and not fast["decode 64"]["tie"]
    assert fast["prefill 1 × 2048"]["gain"] == 1.0 and fast["prefill 1 × 2048"]["tie"]
    assert numbers(panel.sentence)[:4] == [1.25, 1, 1.25, 1] and "1.04 times as fast at decode" in panel.sentence
    assert panel.sentence.endswith("Without a time: batched_mm at decode 256 (OutOfMemoryError).")
    bars = [trace.error_y.array is not None for trace in panel.figure.data if trace.name == "moelab_fast"]
    assert bars == [True, True]
    for axis in ("xaxis", "xaxis2"):  # half a cell on either side: a label keeps within its plot
        low, high = panel.figure.layout[axis].range
        assert low == -0.5 and high % 1 == 0.5


def test_single_medians_call_no_tie() -> None:
    panel = plots.gains(PEER)
    assert "nobody can say" in panel.sentence and all("tie" not in row for row in panel.table)
    assert all(trace.error_y.array is None for trace in panel.figure.data)
    assert {row["experts"] for row in panel.table} >= {"moelab_fast", "moelab_triton_default", "batched_mm"}


def test_a_step_is_its_experts_and_the_rest() -> None:
    for found in (RECORDED, PEER):
        panel = plots.walk(found)
        assert all(row["ms"] == pytest.approx(row["experts, ms"] + row["the rest, ms"]) for row in panel.table)
    share = {
        row["experts' implementation"]: row["share"] for row in plots.walk(RECORDED).table if row["step"] == "decode 64"
    }
    assert share == {"grouped_mm": pytest.approx(0.5), "moelab_fast": pytest.approx(0.3 / 0.8)}


def test_a_prediction_that_is_off_says_why() -> None:
    panel = plots.predictions(RECORDED)
    by_step = {(row["step"], row["experts"]): row for row in panel.table}
    assert by_step["decode 64", "moelab_fast"]["why"] is None and by_step["decode 64", "moelab_fast"][
        "predicted"
    ] == pytest.approx(1.25)
    assert "host" in by_step["prefill 1 × 2048", "moelab_fast"]["why"]
    assert "8 of 8 decode steps within 3%" in panel.sentence
    assert {row["experts"] for row in plots.predictions(PEER).table} == {"moelab_fast"}, (
        "what the recording of the layer has"
    )


def test_without_a_graph_the_host_sets_the_time() -> None:
    panel = plots.host(RECORDED)
    assert {row["without, ms"] for row in panel.table} == {90.0} and numbers(panel.sentence)[0] == pytest.approx(11.2)


def test_a_serving_run_is_drawn_once_there_is_one() -> None:
    panel = served.served(RECORDED)
    whole(panel)
    assert panel.sentence.startswith("**moelab_fast puts out 125 tokens a second, grouped_mm 100")
    assert served.served(PEER).figure is None and "moelab record serve_bench" in served.served(PEER).sentence


def test_what_nothing_is_known_of_is_said() -> None:
    bare = Measured([row for row in RECORDED.rows if row["kind"] == "decode" and row["impl"] != "moelab_fast"], "none")
    for draw in (plots.walk, plots.predictions, plots.host):
        assert draw(bare).figure is None and draw(bare).sentence.startswith("**")


def test_in_short_is_of_the_same_numbers() -> None:
    said = in_short.real_model(RECORDED).sentence
    assert "1.25 to 1.25 times" in said and "50% to 50%" in said and said.count("\n- **") == 2
    assert "What does a faster layer gain?" in in_short.real_model(PEER).sentence


def test_a_recording_takes_the_place_of_the_single_medians(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(recordings, "recordings_dir", lambda: tmp_path)
    assert measured.load(MODEL).single
    recordings.write(made(), tmp_path / "serve_bench.json")
    assert not measured.load(MODEL).single
    with pytest.raises(RecordingError, match="no rows of mixtral"):
        measured.load("mixtral")
    monkeypatch.setenv("MOELAB_DATA_DIR", str(tmp_path))
    with pytest.raises(RecordingError, match="h200_realmodel"):
        measured.upstream()


def test_a_prefill_in_a_graph_stands_for_the_eager_one() -> None:
    """Of it the host is no part: its prediction holds, and the walk shows it."""
    rows = [dict(row) for row in RECORDED.rows]
    for row in [row for row in rows if row["kind"] == "prefill"]:
        samples = [us * STEPS[row["impl"]] for us in row["samples_us"]]
        rows.append({**row, "kind": "prefill, graph", "samples_us": samples})
    found = Measured(rows, "made up")
    lines = {(row["step"], row["experts"]): row for row in plots.predictions(found).table}
    assert lines["prefill, graph 1 × 2048", "moelab_fast"]["why"] is None
    assert lines["prefill 1 × 2048", "moelab_fast"]["why"] is not None
    steps = {row["step"] for row in plots.walk(found).table}
    assert "prefill, graph 1 × 2048" in steps and "prefill 1 × 2048" not in steps
    assert "4 of 4 captured prefills within 3%" in plots.predictions(found).sentence
    whole(plots.gains(found), "made up")
