"""Times of quantised layers over their floor: whose, by format, and where they are drawn."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from made_recordings import PROVENANCE, numbers, whole

from moelab import recordings, roofline, runtime
from moelab.errors import RecordingError
from moelab.plots import pictures
from moelab.plots import quantised_times as times
from moelab.plots.style import CONFIGS
from moelab.recordings import Recording
from moelab.shapes import load_model


def test_the_peers_times_are_those_of_the_file() -> None:
    data = json.loads((runtime.data_dir() / "upstream" / "h200_fp8_sglang.json").read_text())
    panel = times.peer(data)
    whole(panel, "NVIDIA H200")
    colors = [CONFIGS[kind].color for kind in ("default", "shipped", "searched")]
    assert [line.line.color for line in panel.figure.data] == colors, "as in 01"
    assert [round(value, 2) for value in numbers(panel.sentence)[:3]] == [1.7, 24.0, 1.57]
    assert {row["shapes"] for row in panel.table} == {2}  # those that sglang ships a file for


def made(times: dict[str, float], **changes: object) -> Recording:
    """Two shapes at two batches, each format ("NAME" or "NAME IMPLEMENTATION") at so many times its floor."""
    rows = []
    for shape in ("a", "b"):
        for batch in (1, 64):
            for name, factor in times.items():
                cost = roofline.layer_cost(load_model("mixtral-8x7b", tp_size=8), batch)
                floor = roofline.floor_us(cost, roofline.load_ceilings("NVIDIA_H200", "floors")).us
                rows.append({"shape": shape, "format": name, "num_tokens": batch, "config_name": "searched", "bytes": cost.bytes,
                             "flops": cost.flops, "multiplies": "bfloat16", "within_bound": True,
                             "samples_us": [floor * factor] * 3} | changes)  # fmt: skip
                rows[-1] |= {"format": name.partition(" ")[0]}
                rows[-1] |= {"impl": name.partition(" ")[2]} if " " in name else {}
    return Recording("quantised", PROVENANCE | {"gpu": "NVIDIA H200"}, {"kind": "made up"}, tuple(rows))


def test_recorded_layers_over_their_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    panel = times.over_the_floor(made({"plain": 1.2, "int4_w4a16_group_128": 1.5}))
    whole(panel, "NVIDIA H200")
    assert [row["1"] for row in panel.table] == pytest.approx([1.2, 1.5])
    assert {1.2, 1.5} <= set(numbers(panel.sentence))
    assert math.isclose(panel.table[1]["64"], 1.5)
    assert [row["implementation"] for row in panel.table] == ["triton"] * 2 and "Without a floor" not in panel.sentence
    bare = made({"int8_w8a8_channel": 1.3}, multiplies="int8")
    both = Recording("quantised", bare.provenance, bare.protocol, (*made({"plain": 1.2}).rows, *bare.rows))
    assert "measured rate of their products: int8_w8a8_channel." in times.over_the_floor(both).sentence
    wrong = made({"plain": 1.2})
    wrong = Recording(
        wrong.suite, wrong.provenance, wrong.protocol, (*wrong.rows[1:], wrong.rows[0] | {"within_bound": False})
    )
    assert "1 results past their bound" in times.over_the_floor(wrong).sentence
    monkeypatch.setattr(recordings, "load", lambda name: made({"plain": 1.2}))
    assert times.times().figure is not None


def test_the_fastest_implementation_stands_for_a_format() -> None:
    """Rows without one are the classic layer's; each is in the table, and the hover says who is ahead where."""
    int4 = "int4_w4a16_group_128"
    factors = {"plain": 1.2, int4: 1.5, f"{int4} gated": 1.4, f"{int4} fast": 1.1, "mxfp4_w4a16 fast": 1.3}
    panel = times.over_the_floor(made(factors))
    whole(panel, "NVIDIA H200")
    rows = {(row["format"], row["implementation"]): row["64"] for row in panel.table}
    assert rows == pytest.approx({
        ("plain", "triton"): 1.2, (int4, "triton"): 1.5, (int4, "gated"): 1.4, (int4, "fast"): 1.1, (int4, "fastest"): 1.1,
        ("mxfp4_w4a16", "fast"): 1.3,
    })  # fmt: skip
    assert [list(line.y) for line in panel.figure.data] == [pytest.approx([value] * 2) for value in (1.2, 1.1, 1.3)]
    assert list(panel.figure.data[1].customdata) == ["fast", "fast"]
    assert [row["implementation"] for row in panel.table] == ["triton", "triton", "gated", "fast", "fastest", "fast"]
    assert (
        "int4 group 128 1.10 (triton 1.50, gated 1.40, fast 1.10), bf16 1.20, mxfp4 32 1.30 (fast)." in panel.sentence
    )


def test_a_cell_is_taken_under_the_searched_config_where_there_is_one() -> None:
    """An implementation without such rows has tiles of its own, and is taken as it was timed."""
    plain = made({"plain": 1.2})
    default, own = (made({name: 1.1}, config_name="default") for name in ("plain", "plain fast"))
    both = Recording("quantised", plain.provenance, plain.protocol, (*plain.rows, *default.rows, *own.rows))
    rows = {row["implementation"]: row["1"] for row in times.over_the_floor(both).table}
    assert rows == pytest.approx({"triton": 1.2, "fast": 1.1, "fastest": 1.1})


def test_a_broken_recording_is_no_missing_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recordings, "recordings_dir", lambda: tmp_path)
    (tmp_path / "quantised.json").write_text("{")
    with pytest.raises(RecordingError, match="quantised"):
        times.times()


def test_a_recording_that_appears_is_drawn_outside_notebooks_too(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """docs/figures.md gets its picture with the next `make pictures`."""
    monkeypatch.setattr(recordings, "recordings_dir", lambda: tmp_path)
    assert "quantised" not in pictures.panels()
    recordings.write(made({"plain": 1.2, "int4_w4a16_group_128 gated": 1.4}), tmp_path / "quantised.json")
    panels = pictures.panels()
    assert list(panels) == ["quantised"] and "bf16 1.20" in panels["quantised"].sentence
    assert pictures.HEADINGS["quantised"] in pictures.text(panels)


def test_without_a_recording_its_command_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(recordings, "recordings_dir", lambda: tmp_path)
    assert "`moelab record quantised`" in times.times().sentence


def test_ours_beside_the_peers_kernel() -> None:
    ratios = {
        ("fp8_w8a8_block_128x128", 1): (0.5, 2.0),
        ("fp8_w8a8_block_128x128", 64): (0.9, 0.9),
        ("int4_w4a16_group_128", 1): (0.3,),
    }
    rows = [
        {"shape": f"shape {i}", "format": format, "gemm": "up", "num_tokens": batch, "config_name": "default", "impl": impl,
         "samples_us": [us] * 3}
        for (format, batch), of in ratios.items()
        for i, ratio in enumerate(of)
        for impl, us in (("ours", 10 * ratio), ("sglang", 10.0))
    ]  # fmt: skip
    panel = times.beside(
        Recording("peer_kernels", PROVENANCE | {"gpu": "NVIDIA H200"}, {"kind": "made up"}, tuple(rows))
    )
    whole(panel, "NVIDIA H200")
    blocks, int4 = panel.table
    assert (blocks["1"], blocks["64"], blocks["worst"], blocks["products"]) == pytest.approx((1.0, 0.9, 2.0, 4))
    assert int4["geometric mean"] == pytest.approx(0.3) and 0.3 in numbers(panel.sentence)
