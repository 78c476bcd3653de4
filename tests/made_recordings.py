"""Made-up recordings for the tests of figures: plainly none of a GPU's."""

from __future__ import annotations

import json
import math
import random
import re
from collections.abc import Callable, Mapping

import pytest

from moelab import roofline
from moelab.recordings import Recording
from moelab.shapes import load_model

PROVENANCE = {"gpu": "Made up", "driver": None, "torch": "2.13.0", "triton": "3.7.1", "cuda": None, "python": "3.12",
              "git_commit": None, "date": "2026-01-02", "moelab": "0"}  # fmt: skip
LAUNCHES = {
    "no TMA, through Triton": 44.0, "no TMA": 14.0, "TMA, allocator and descriptor each call": 25.5,
    "TMA, descriptor each call": 25.0, "TMA, kept descriptor": 16.0, "set_allocator alone": 0.5, "descriptor alone": 8.0,
}  # fmt: skip
STEPS = {"align": 12.0, "activation": 7.0, "sum_reduce": 8.0}
LAYERS = {
    "triton": 61.0, "split_k_atomic": 70.0, "split_k_workspace": 82.0, "tma": 65.0, "gated": 50.0, "gated_atomic": 45.0,
    "gated_atomic_out": 44.0, "gated_tma": 56.0, "gated_tma_atomic": 53.0,
}  # fmt: skip
SHAPES = {
    "qwen3-30b-a3b/tp1": ("qwen3-30b-a3b", 1), "scout/tp4": ("llama-4-scout", 4), "lfm2-8b/tp1": ("lfm2-8b-a1b", 1),
    "deepseek-v3/tp8": ("deepseek-v3", 8),
}  # fmt: skip
BATCHES = (1, 4, 16, 64, 256, 1024, 4096, 8192)
FACTORS = {
    "triton": (1.5, 1.5), "split_k_atomic": (1.4, 2.2), "split_k_workspace": (1.35, 2.4), "tma": (1.55, 1.4),
    "gated": (1.4, 1.45), "gated_atomic": (1.25, 1.6), "gated_atomic_out": (1.2, 1.55), "gated_tma": (1.45, 1.3),
    "gated_tma_atomic": (1.38, 1.3), "compiled": (4.0, 1.8),
}  # fmt: skip
"""Implementation -> time over floor at one token and at 8192."""


def numbers(sentence: str) -> list[float]:
    """What a sentence says in numbers, in order: tests hold these, not the words between them."""
    return [float(found.replace(",", "")) for found in re.findall(r"(?<![\w.])\d[\d,]*(?:\.\d+)?", sentence)]


def whole(panel: object, *sources: str) -> None:
    """A title, a source, titled axes, a conclusion, a table, JSON without NaN."""
    if panel.figure is not None:
        layout = panel.figure.layout
        assert layout.title.text and layout.title.subtitle.text and layout.width is None
        assert not sources or any(source in layout.title.subtitle.text for source in sources)
        axes = (*panel.figure.select_xaxes(), *panel.figure.select_yaxes())
        assert any(axis.title.text or axis.ticktext for axis in axes)
    assert panel.sentence.startswith("**") and panel.sentence.endswith((".", ".**", ".)")) and panel.table
    assert "NaN" not in json.dumps(panel.bundles(), allow_nan=False) and "nan " not in panel.sentence


def each_is_whole(panels: Mapping[str, Callable[..., object]], **given: Recording) -> Callable[..., None]:
    """A test of every panel of each recording."""

    @pytest.mark.parametrize("found", given.values(), ids=given)
    @pytest.mark.parametrize("draw", panels.values(), ids=panels)
    def test(draw: Callable[..., object], found: Recording) -> None:
        whole(draw(found), found.source())

    return test


def host_samples(middle: float, count: int = 160, seed: int = 0) -> list[float]:
    """Samples with this median, more or less, and a tail to the right, as host times have."""
    draw = random.Random(f"{seed} {middle}")
    return [
        round(middle * (1 + 0.02 * draw.gauss(0, 1) + 0.1 * draw.expovariate(1.0) ** 3 / 6), 2) for _ in range(count)
    ]


def tma_overhead(count: int = 160, launches: dict[str, float] | None = None, past: tuple[str, ...] = ()) -> Recording:
    """Rows of the suite tma_overhead; `launches` changes some, the layers named in `past` are beyond their bound."""
    rows = [
        {"kind": "launch", "name": name, "samples_us": host_samples(us, count)}
        for name, us in (LAUNCHES | (launches or {})).items()
    ]
    rows += [{"kind": "step", "name": name, "samples_us": host_samples(us, count)} for name, us in STEPS.items()]
    rows += [{"kind": "layer", "name": name, "samples_us": host_samples(us, count), "max_abs_error": 0.4, "rel_error": 1e-3,
              "bound": 1.0, "within_bound": name not in past} for name, us in LAYERS.items()]  # fmt: skip
    about = {"shape": "qwen3-30b-a3b/tp4", "num_tokens": 1, "host": "a processor", "kind": "made up"}
    return Recording("tma_overhead", PROVENANCE, about, tuple(rows))


def baseline_row(
    shape: str, num_tokens: int, impl: str, us: float, eager: float | None = None, **fields: object
) -> dict:
    """A row of layer_baseline whose samples are `us` +- 1 %."""
    model, tp_size = SHAPES[shape]
    size = load_model(model, tp_size=tp_size, disable_shared_experts_fusion=True)
    cost = roofline.layer_cost(size, num_tokens)
    wobble = [1 + 0.01 * (i - 4) / 4 for i in range(9)]
    return {
        "shape": shape, "num_tokens": num_tokens, "impl": impl, "experts_touched": 8.0, "bytes": cost.bytes, "flops": cost.flops,
        "max_abs_error": 0.4, "rel_error": 1e-3, "bound": 1.0, "within_bound": True, "samples_us": [us * w for w in wobble],
        "eager_samples_us": [max(us * 1.02, eager or 0.0) * w for w in wobble],
    } | fields  # fmt: skip


def layer_baseline(batches: tuple[int, ...] = BATCHES) -> Recording:
    """Every implementation on the four shapes; gated_atomic_out past its bound at batch 64, tma refused at one cell."""
    rows = []
    for shape, (model, tp_size) in SHAPES.items():
        size = load_model(model, tp_size=tp_size, disable_shared_experts_fusion=True)
        for batch in batches:
            floor = roofline.floor_us(
                roofline.layer_cost(size, batch), roofline.load_ceilings("NVIDIA_H200", "floors")
            ).us
            for impl, (small, large) in FACTORS.items():
                share = math.log(batch) / math.log(8192)
                factor = 1.02 + (small - 1.02) * (1 - share) ** 4 + (large - 1.02) * share**4
                host = LAYERS.get(impl, 120.0)
                row = baseline_row(shape, batch, impl, floor * factor, host)
                if impl == "gated_atomic_out" and batch == 64:
                    row |= {"within_bound": False, "max_abs_error": 2.0}
                if impl == "tma" and (shape, batch) == ("scout/tp4", 1):
                    kept = {k: v for k, v in row.items() if "samples" not in k}
                    row = kept | {
                        "within_bound": None,
                        "max_abs_error": None,
                        "rel_error": None,
                        "refused": "ConfigError: no",
                    }
                rows.append(row)
    return Recording("layer_baseline", PROVENANCE, {"kind": "made up"}, tuple(rows))
