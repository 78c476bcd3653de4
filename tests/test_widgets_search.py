"""The widgets of 05_config_search that explore: they follow their controls; and none of the notebook's hides an exception."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
from broken_cells import assert_each_fails
from ipywidgets import HTML, Box, Dropdown, Output
from panels import LANDSCAPE, PROBLEM, all_shown, below, controls, text
from panels import finals as finals  # a fixture

from moelab import runtime, widgets
from moelab.plots import strategy_race as plots_race
from moelab.plots.strategy_race import run_all
from moelab.plots.style import contrast
from moelab.roofline import load_ceilings
from moelab.tuner.finals import Finals
from moelab.tuner.survey import Survey


@pytest.fixture(scope="module")
def survey() -> Survey:
    return Survey(LANDSCAPE)


def test_layer_picker_follows_every_control() -> None:
    box = widgets.layer_picker("qwen3-30b-a3b", 1, "NVIDIA H200", 64, "3.6.0")
    choose = controls(box)
    names = ["Model", "TP", "EP", "Format", "Shared experts", "Device", "Batch", "Triton", "Loader"]
    assert list(choose) == names
    changes = {"TP": 4, "EP": 4, "Format": "float32", "Device": "NVIDIA B200", "Batch": 512, "Loader": "vllm"}
    for name, value in ({"Model": "mixtral-8x7b"} | changes).items():
        before = text(box)
        choose[name].value = value
        assert text(box) != before, name
    assert "mixtral-8x7b, TP 4, EP 4, float32: a rank holds 2 experts" in text(box)


def test_layer_picker_has_every_switch_of_a_server() -> None:
    """The checkpoint's own format, sglang's fusion of shared experts, and who fuses none: each another file."""
    box = widgets.layer_picker("deepseek-v3-fp8", 8)
    choose = controls(box)
    assert "257 experts" in text(box) and "dtype=fp8_w8a8,block_shape=[128, 128].json" in json.dumps(all_shown(box))
    choose["Shared experts"].value = False
    assert "256 experts" in text(box) and "--disable-shared-experts-fusion" in text(box)
    choose["Shared experts"].value, choose["Loader"].value = True, "vllm"
    assert "256 experts" in text(box) and "block_shape=[128,128].json" in json.dumps(all_shown(box))
    choose["Format"].value = "bfloat16"
    assert "EP 1, bfloat16" in text(box) and "fp8" not in text(box).replace("deepseek-v3-fp8", "")
    choose["Model"].value, choose["Format"].value = "gpt-oss-120b-mxfp4", ""
    assert "No config file is asked for" in text(box)


def test_layer_picker_never_meets_a_split_that_does_not_fit() -> None:
    box = widgets.layer_picker("dbrx", 16)
    choose = controls(box)
    choose["EP"].value = 16
    for model in ("mixtral-8x7b", "deepseek-v3", "qwen3-30b-a3b", "grok-2"):
        choose["Model"].value = model
        choose["TP"].value, choose["EP"].value = choose["TP"].options[-1], choose["EP"].options[-1]
        assert f"{model}, TP {choose['TP'].value}" in text(box)


def test_landscape_browser_links_its_views(survey: Survey) -> None:
    box = widgets.landscape_browser(survey)
    choose = controls(box)
    for name, value in {
        "GEMM": "down", "Batch": 16, "Within": 0.5, "X axis": "padding", "BLOCK M": (64, 128), "warps": (4, 4),
    }.items():  # fmt: skip
        before = all_shown(box)
        choose[name].value = value
        assert all_shown(box) != before, name
    answer, scatter, lines, heat = (line for line in text(box).splitlines() if line.startswith("GEMM2"))
    assert "BLOCK M 64–128, warps 4" in scatter and "BLOCK M 64–128, warps 4" in heat
    count = scatter.split(": ")[1].split()[0]
    assert f"the same {count} configs" in lines and f"BLOCK M 64–128, warps 4: {count} configs" in answer


def test_the_browser_opens_on_an_axis_that_is_known() -> None:
    """Waves are those of uniform routing; under a skewed one the scatter would open without a point."""
    for routing, axis in (("uniform", "waves"), ("zipf", "shared memory")):
        skewed = dataclasses.replace(LANDSCAPE, problem=dataclasses.replace(PROBLEM, routing=routing))
        box = widgets.landscape_browser(Survey(skewed))
        assert controls(box)["X axis"].value == axis
        assert ("zipf routing" in json.dumps(all_shown(box))) == (routing == "zipf")


def test_a_view_that_a_control_does_not_touch_is_not_sent_again(survey: Survey) -> None:
    box = widgets.landscape_browser(survey)
    sent = []
    for number, child in enumerate(box.children[1:4]):
        child.observe(lambda _, number=number: sent.append(number), "outputs")
    choose = controls(box)
    for name, value, views in (
        ("GEMM", "down", [0, 1, 2]), ("Batch", 16, [0, 1]), ("Within", 0.5, [0, 1]), ("X axis", "padding", [0]),
    ):  # fmt: skip
        sent.clear()
        choose[name].value = value
        assert sent == views, name


@pytest.mark.parametrize("which", ["median", "worst"])
def test_the_race_fills_its_axis_and_keeps_it(survey: Survey, which: str) -> None:
    """0.01 to 1000 % of which a decade and a half was used; what is to come could not be seen on a dark page."""
    traces = run_all(survey, (0,), ("race", "random"))
    figures = [plots_race.standing(traces, budget_s, which).figure for budget_s in traces.frames()[::13]]
    assert len({figure.layout.yaxis.range for figure in figures}) == 1
    low, high = figures[0].layout.yaxis.range
    drawn = np.log10(np.concatenate([trace.y for trace in figures[0].data if trace.name]))
    assert low - 1e-6 <= drawn.min() < low + 1 and (high - 1 < drawn.max() <= high + 1e-6 or high == low + 1)
    for one in plots_race.LOOKS.values():
        parts = [int(one.color[i : i + 2], 16) for i in (1, 3, 5)]
        for paper in ("#ffffff", "#111111"):
            ground = int(paper[1:3], 16)
            mixed = "#" + "".join(f"{round(ground + plots_race.FAINT * (part - ground)):02x}" for part in parts)
            assert contrast(mixed, paper) >= 2.2, (one, paper)


def test_strategy_race_follows_budget_play_and_measure(survey: Survey) -> None:
    traces = run_all(survey, (0, 1), ("random", "grid"))
    box = widgets.strategy_race(traces)
    choose = controls(box)
    assert {"Play", "Budget", "Regret"} <= set(choose)
    before = text(box)
    choose["Play"].value += 5
    assert text(box) != before and choose["Budget"].index == choose["Play"].value
    choose["Budget"].index = 0
    assert choose["Play"].value == 0 and "nobody has a choice yet" in text(box)
    choose["Budget"].index = len(choose["Budget"].options) - 1
    finished = text(box)
    assert "finished: random, grid" in finished
    choose["Regret"].value = "worst"
    assert text(box) != finished


# --- exceptions come out ------------------------------------------------------------------------------------------

SETUP = """
import math, tempfile
from synthetic import small_problem, synthetic_landscape
from moelab import widgets
from moelab.plots import handover, landscape, landscape_linked, loading, strategy_race, tuning, winner
from moelab.tuner.finals import Finals
from moelab.tuner.replay import ReplayEvaluator
from moelab.tuner.session import TuneSession
from moelab.tuner.survey import Survey
problem = small_problem((1, 64))
made = synthetic_landscape(problem)
survey = Survey(made)
session = TuneSession(problem, ReplayEvaluator(made, problem), strategy="random")
session.run()
choice = widgets.Choice(Finals.of_results(problem, session.results(), "made up", measured=False))
traces = strategy_race.run_all(survey, (0,), ("random",))
picker, browser = widgets.layer_picker(), widgets.landscape_browser(survey)
race, card = widgets.strategy_race(traces), widgets.WinnerCard(choice)
runs = tempfile.mkdtemp()
TuneSession(problem, ReplayEvaluator(made, problem), strategy="random", run=f"{runs}/a.jsonl").run()
watcher = widgets.RunWatcher(runs)
tuner, export = widgets.LiveTuner(made, tempfile.mkdtemp(), choice), widgets.ExportPanel(choice, "out")
"""
BREAK = """
loading.sizes = landscape.heat_map = landscape.plateaus = landscape.importances = landscape_linked.scatter = broken
strategy_race.standing = tuning.status = tuning.watched = winner.card = handover.preview = broken
"""
CASES = {
    "picker is made": "widgets.layer_picker()",
    "model changes": 'picker.children[0].children[0].value = "dbrx"',
    "browser is made": "widgets.landscape_browser(survey)",
    "within changes": "browser.children[0].children[0].children[2].value = 0.02",
    "range changes": "browser.children[0].children[0].children[4].index = (1, 1)",
    "plateaus": "landscape.plateaus(survey)",
    "importances": "landscape.importances(survey)",
    "race is made": "widgets.strategy_race(traces)",
    "budget changes": "race.children[0].children[0].children[2].index = 1",
    "tuner is made": "widgets.LiveTuner(made, tempfile.mkdtemp(), choice)",
    "another batch is shown": "tuner.shown.value = 1",
    "watcher is made": "widgets.RunWatcher(runs)",
    "another batch is watched": "watcher.batch.value = 64",
    "card is made": "widgets.WinnerCard(choice)",
    "card's batch changes": "card.batch.value = 64",
    "export is made": 'widgets.ExportPanel(choice, "out")',
    "loader changes": 'export.rules.value = "vllm"',
    "a run ends": "choice.take(choice.finals)",
}


def test_a_broken_drawing_function_fails_the_cell() -> None:
    assert_each_fails(SETUP, BREAK, CASES, sound_first=False)


def test_every_control_has_a_name(tmp_path: Path, survey: Survey, finals: Finals) -> None:
    choice = widgets.Choice(finals)
    boxes = [
        widgets.layer_picker(), widgets.landscape_browser(survey), widgets.LiveTuner(LANDSCAPE, tmp_path, choice),
        widgets.RunWatcher(tmp_path),
        widgets.WinnerCard(choice), widgets.ExportPanel(choice, tmp_path), widgets.config_doctor({"ours": tmp_path.parent}),
        widgets.config_path({"ours": runtime.config_dir().parent}), widgets.explorer(load_ceilings()),
    ]  # fmt: skip
    for box in boxes:
        takes_focus = [each for each in below(box) if not isinstance(each, Box | HTML | Output)]
        assert len(takes_focus) >= 2 and [each for each in takes_focus if not each.description] == []
        assert [each.description for each in takes_focus if isinstance(each, Dropdown) and each.index is None] == []
