"""Errors of formats, quantising and rounding apart, and the figures of notebook 08."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from made_recordings import numbers, whole

from moelab import quantised_error, roofline, runtime
from moelab.config_files.shipped_quantised import shipped_quantised
from moelab.formats import FORMATS, get_format
from moelab.plots import in_short, quantised_times
from moelab.plots import quantised as plots
from moelab.plots.style import LOOKS
from moelab.quantised_error import LayerError, cut_sum, layer_error, product_errors, way
from moelab.quantised_weights import dequantise, quantise
from moelab.shapes import MoEShape, load_model

LAYER = MoEShape("small", num_experts=2, top_k=1, hidden_size=128, moe_intermediate_size=128)
SHAPE = load_model("deepseek-v3", tp_size=8, dtype="bfloat16", disable_shared_experts_fusion=True)
NAMES = ["plain", "fp8_w8a8_block_128x128", "int4_w4a16_group_128", "int8_w8a8_channel"]

# --- errors ----------------------------------------------------------------------------------------------------------


def test_a_plain_layer_is_not_quantised() -> None:
    found = layer_error("plain", LAYER, 4)
    assert found.quantising == 0 and 1e-3 < found.rounding < 1e-2 and found.kernel is None


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="fp16 in the interpreter")
def test_the_two_errors_are_apart() -> None:
    """Coarser groups quantise worse and round alike; the kernel's error is torch's, but for its order of sums."""
    fine, coarse = (layer_error(f"int4_w4a16_group_{g}", LAYER, 4) for g in (32, 128))
    assert 0.1 < fine.quantising < coarse.quantising < 0.3
    for found in (fine, coarse):
        assert found.rounding < found.quantising / 10
        assert found.kernel is not None and found.torch_beside is not None
        assert found.kernel <= 2 * found.torch_beside and found.kernel_dtype == "float16"


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="the interpreter refuses fp8")
def test_a_kernel_that_does_not_run_here_says_why() -> None:
    found = layer_error("fp8_w8a8_block_128x128", LAYER, 4)
    assert found.kernel is None and "float8" in found.why and 0.03 < found.quantising < 0.1


def test_a_tensor_cores_sum_grows_with_k_and_promoted_does_not() -> None:
    short, long = (product_errors("fp8_w8a8_channel", K) for K in (256, 2048))
    assert long["tensor core"] > 2 * short["tensor core"]
    promoted = "tensor core, float32 every 128"
    assert 0.5 < long[promoted] / short[promoted] < 2 and long["float32 sum"] < long[promoted] < long["tensor core"]
    assert "tensor core" not in product_errors("fp8_w8a8_block_128x128", 256)


def test_a_cut_sum_of_few_bits_is_exact() -> None:
    """Products of small integers, whose sum stays below 2^13, lose nothing; one large product cuts the small ones away."""
    g = torch.Generator().manual_seed(0)
    a, w = (torch.randint(-3, 4, (3, 64), generator=g).double() for _ in range(2))
    assert torch.equal(cut_sum(a, w, 64), a @ w.T)
    a[:, 0], w[:, 0] = 256.0, 256.0
    assert not torch.equal(cut_sum(a, w, 64), a @ w.T)


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "plain" and not name.endswith("static")])
def test_a_weights_way_is_the_formats(name: str) -> None:
    found, format = way(name, 8.0), get_format(name)
    g = torch.Generator().manual_seed(0)
    w = torch.randn(1, 128, 128, generator=g).mul(0.02).bfloat16()
    w[0, 0, 3] *= 8.0
    exact = dequantise(quantise(w, format))[0, 0, :32]
    assert found.back == pytest.approx(exact.tolist(), rel=5e-3)  # a group's weight is rounded to bf16
    assert {len(code) for code in found.codes} == {format.bits}
    assert len(found.levels) == (16 if format.bits == 4 and name != "mxfp4_w4a16_32" else 15 if format.bits == 4 else 0)
    if found.levels:  # the first group's: all 32 share its scale
        assert all(min(abs(level - b) for level in found.levels) <= 5e-3 * abs(b) + 1e-9 for b in found.back)


# --- figures ---------------------------------------------------------------------------------------------------------


def test_floors_follow_bytes_and_then_the_rate() -> None:
    panel = plots.floors(SHAPE, NAMES)
    whole(panel, "computed")
    rows = {row["format"]: row for row in panel.table}
    assert rows["plain"]["bits a weight"] == 16 and 8 < rows["fp8_w8a8_block_128x128"]["bits a weight"] < 8.01
    assert rows["int4_w4a16_group_128"]["bits a weight"] == pytest.approx(4 + 16 / 128)
    assert rows["int8_w8a8_channel"]["floor at 1, µs"] is None and "int8_w8a8_channel" in panel.sentence
    one = roofline.floor_us(roofline.layer_cost(SHAPE, 1), roofline.load_ceilings("NVIDIA_H200", "floors"))
    assert rows["plain"]["floor at 1, µs"] == pytest.approx(one.us)
    assert any(found == pytest.approx(2.0, abs=0.05) for found in numbers(panel.sentence))


def test_floors_by_format_turn_where_their_products_do() -> None:
    panel = plots.floor_map(SHAPE, NAMES)
    whole(panel, "arithmetic")
    rows = {row["format"]: row for row in panel.table}
    assert list(rows) == NAMES[:3] and "int8 channel" in panel.sentence
    rates = {name: row["TFLOP/s"] for name, row in rows.items()}
    assert rates == {NAMES[0]: 790.0, NAMES[1]: 1300.0, NAMES[2]: 790.0}
    for name, row in rows.items():
        shape = replace(SHAPE, format=get_format(name))
        at = roofline.load_ceilings("NVIDIA_H200", "floors", shape.format.product_dtype("bfloat16"))
        assert row["floor at 64, µs"] == pytest.approx(roofline.floor_us(roofline.layer_cost(shape, 64), at).us)
    assert "790 or 1300 TFLOP/s" in panel.figure.layout.title.subtitle.text
    assert panel.figure.layout.title.text.startswith("What bounds deepseek-v3 tp 8, by format: ")


def test_verdicts_are_of_rounding_alone() -> None:
    worse = LayerError("int8_w8a8_channel", 0.02, 0.004, 9e-4, 4e-4, "float16")
    panel = plots.judged([*FOUND, worse])
    whole(panel)
    verdicts = {row["format"]: row["verdict"] for row in panel.table}
    assert verdicts == {
        "int4_w4a16_group_32": "passes", "fp8_w8a8_channel": "not run here: refused", "int8_w8a8_channel": "FAILS",
    }  # fmt: skip
    assert numbers(panel.sentence)[:2] == [2.25, 2] and "2.0% to 16.0%" in panel.sentence


FOUND = [
    LayerError("plain", 0.0, 0.004),
    LayerError("int4_w4a16_group_32", 0.16, 0.004, 5e-4, 6e-4, "float16"),
    LayerError("fp8_w8a8_channel", 0.06, 0.016, why="refused"),
]


def test_panels_are_whole() -> None:
    errors = plots.errors(FOUND, "computed here")
    whole(errors, "computed here")
    assert "3.75 to 40.0" in errors.sentence and "0.833 times" in errors.sentence
    whole(plots.errors_by_k(quantised_error.by_k(["fp8_w8a8_channel"], (64, 256))), "simulated")
    drawn = plots.way(way("int4_w4a16_group_32", 8.0))
    whole(drawn, "computed here")
    assert len(drawn.figure.layout.shapes) == 16
    files = plots.shipped({name: shipped_quantised(name) for name in ("sglang", "vllm")}, "packages")
    whole(files, "packages")
    assert files.figure.data[0].marker.color == LOOKS["sglang"].color and files.figure.layout.barmode == "stack"
    *bars, counted = files.figure.data
    assert (
        list(counted.y)
        == [sum(each) for each in zip(*(bar.y for bar in bars), strict=True)]
        == list(map(int, counted.text))
    )
    assert "dotted: what codes × scales can say" in drawn.figure.layout.title.subtitle.text
    assert {13, 176, 61, 182} <= set(numbers(files.sentence))
    said = in_short.quantised(plots.floors(SHAPE, NAMES), errors, files, quantised_times.times()).sentence
    assert said.count("\n") == 3 and "6.0%" in said and "13 of sglang's 176" in said
