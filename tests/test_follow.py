"""follow: the picture's rows are the run's rows, and its controls, and those of 07, let every exception out."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from broken_cells import assert_each_fails
from test_widgets import title

from moelab import widgets
from moelab.config import KernelConfig
from moelab.inputs import make_inputs
from moelab.kernels.activation import activation
from moelab.kernels.align import align
from moelab.kernels.grouped_gemm import grouped_gemm
from moelab.kernels.sum_reduce import sum_reduce
from moelab.plots import follow
from moelab.shapes import MoEShape


def run(num_tokens: int = 3, num_experts: int = 4, top_k: int = 2, hidden: int = 6, inner: int = 4) -> follow.Trace:
    """A trace as 00_welcome makes it."""
    shape = MoEShape.from_sizes(num_experts=num_experts, top_k=top_k, hidden_size=hidden, moe_intermediate_size=inner,
                                dtype="float32")  # fmt: skip
    x, config, pairs = make_inputs(shape, num_tokens), KernelConfig(16, 16, 16, 1), num_tokens * top_k
    aligned = align(x.topk_ids, 16, num_experts)
    up = grouped_gemm(x.hidden_states, x.w13, aligned, config, num_pairs=pairs, top_k=top_k)
    act = activation(up, "silu")
    down = grouped_gemm(act, x.w2, aligned, config, num_pairs=pairs, top_k=1, topk_weights=x.topk_weights)
    out = sum_reduce(down.view(num_tokens, top_k, -1))
    used = int(aligned.num_tokens_post_padded)
    ids = aligned.sorted_token_ids[:used].tolist(), aligned.expert_ids[: used // 16].tolist()
    stages = [t.tolist() for t in (x.hidden_states, up, act, down, out)]
    return follow.Trace(x.topk_ids.tolist(), x.topk_weights.tolist(), *ids, 16, *stages)


@pytest.fixture(scope="module")
def trace() -> follow.Trace:
    return run()


@pytest.mark.parametrize("step", follow.STEPS)
@pytest.mark.parametrize("token", [None, 0, 2])
def test_every_step_is_a_whole_panel(trace: follow.Trace, step: str, token: int | None) -> None:
    panel = follow.follow(trace, step, token)
    assert panel.figure.layout.title.text.startswith(f"Step {follow.STEPS.index(step) + 1} of 7, {step}: ")
    assert panel.figure.layout.title.subtitle.text and panel.figure.layout.width is None
    assert panel.sentence.startswith("**") and panel.table
    assert (f"Token {token} goes to" in panel.sentence) == (token is not None)
    assert "NaN" not in json.dumps(panel.bundles(), allow_nan=False)


@pytest.mark.parametrize(
    "sizes",
    [
        {"num_tokens": 1, "num_experts": 1, "top_k": 1},  # one block, one row in use
        {"num_tokens": 20, "num_experts": 2, "top_k": 2},  # an expert with more rows than a block has
        {"num_tokens": 2, "num_experts": 9, "top_k": 1},  # more colours than tokens, experts without any
    ],
)
def test_odd_runs_draw(sizes: dict[str, int]) -> None:
    trace = run(**sizes)
    panel = follow.follow(trace, "alignment")
    assert sum(row["rows in use"] for row in panel.table) == trace.num_pairs
    assert sum(row["rows in use"] + row["padding"] for row in panel.table) == len(trace.sorted_token_ids)
    follow.follow(trace, token=0)


def test_strips_hold_the_runs_values_where_their_rows_lie(trace: follow.Trace) -> None:
    strips = {t.name: t for t in follow.follow(trace).figure.data if t.type == "heatmap"}
    assert set(strips) == set(follow.TENSORS)
    order = [pair for pair in trace.sorted_token_ids if pair < trace.num_pairs]
    for name, field in follow.TENSORS.items():
        values = getattr(trace, field)
        rows = order if name in follow.SORTED else range(len(values))
        assert np.array_equal(strips[name].z[::2], np.array([values[r] for r in rows], dtype=np.float32))
        assert (np.diff(strips[name].y) > 0).all() and len(strips[name].y) == len(strips[name].z) + 1


def test_padding_is_drawn_row_by_row(trace: follow.Trace) -> None:
    figure = follow.follow(trace, "GEMM1").figure
    padding = [t for t in figure.data if t.name == "padding"]
    assert len(padding) == 2  # in the alignment and in GEMM1
    assert all(len(t.x) == 3 * (len(trace.sorted_token_ids) - trace.num_pairs) for t in padding)
    assert [a.text for a in figure.layout.annotations] == [f"expert {e}" for e in trace.expert_ids]


def test_a_followed_token_stands_out(trace: follow.Trace) -> None:
    lines = [t for t in follow.follow(trace, "routing", 1).figure.data if t.type == "scatter"]
    assert {t.name for t in lines if t.opacity > follow.FADED} == {"token 1"}


def test_the_weighted_rows_add_up(trace: follow.Trace) -> None:
    down = torch.tensor(trace.down).view(trace.num_tokens, trace.top_k, -1)
    assert torch.allclose(down.sum(1), torch.tensor(trace.out), atol=1e-6)


def test_controls_change_step_and_token(trace: follow.Trace) -> None:
    box = widgets.follow_tokens(trace)
    step, token = box.children[0].children
    assert (step.description, token.description) == ("Step", "Token")
    assert list(token.options) == ["all", "0", "1", "2"]

    for number, name in enumerate(follow.STEPS, start=1):
        step.value = name
        assert title(box) == f"Step {number} of 7, {name}: all tokens"
    token.value = "2"
    assert title(box) == "Step 7 of 7, sum: token 2"


# --- in a notebook ------------------------------------------------------------------------------------------------

SETUP = """
from moelab import recordings, widgets
from moelab.plots import follow, your_kernel
from moelab.roofline import load_ceilings
trace = follow.Trace([[0]], [[1.0]], [0], [0], 1, [[1.0]], [[1.0, 2.0]], [[1.0]], [[1.0]], [[1.0]])
steps = widgets.follow_tokens(trace)
recorded, at = recordings.load("layer_baseline"), load_ceilings("NVIDIA_H200", "floors")
roof = widgets.kernel_roof(recorded, at, "mine", ["triton"])
sizes = {"num_experts": 2, "top_k": 1, "hidden_size": 8, "moe_intermediate_size": 4}
check = widgets.kernel_check(["torch", "triton"], sizes, [8, 16], ["float32", "float64"], 1, "here")
"""
BREAK = "follow.follow = your_kernel.on_the_roof = your_kernel.error_map = broken\n"
CASES = {
    "follow, plain": "follow.follow(trace)",
    "follow is made": "widgets.follow_tokens(trace)",
    "step changes": 'steps.children[0].children[0].value = "routing"',
    "token changes": 'steps.children[0].children[1].value = "0"',
    "roof is made": 'widgets.kernel_roof(recorded, at, "mine", ["triton"])',
    "shape changes": 'roof.children[0].children[0].value = "scout/tp4"',
    "kernel changes": 'check.children[0].children[0].value = "triton"',
    "size changes": "check.children[0].children[1].value = 16",
    "dtype changes": 'check.children[0].children[2].value = "float64"',
}


def test_a_broken_drawing_function_fails_the_cell() -> None:
    assert_each_fails(SETUP, BREAK, CASES)
