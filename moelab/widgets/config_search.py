"""Controls over a layer's sizes and its config file, and over a recorded landscape."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import ipywidgets as widgets

from moelab import config_files, roofline, runtime
from moelab.errors import ShardError
from moelab.plots import landscape as plots_landscape
from moelab.plots import landscape_linked as plots_linked
from moelab.plots import loading as plots_loading
from moelab.plots.panel import Panel
from moelab.plots.roofline import tp_choices
from moelab.shapes import load_model, preset_names
from moelab.tuner import landscape
from moelab.tuner.problem import BATCH_SIZES, Gemm
from moelab.tuner.survey import PARAMETERS, Survey, short_names
from moelab.widgets.fields import dropdown
from moelab.widgets.panels import interactive_panel, interactive_panels

FORMATS = (("the checkpoint’s own", ""), *((f"plain {name}", name) for name in ("bfloat16", "float16", "float32")))
"""What the weights are taken as: a preset of a quantised checkpoint names its own format."""

FUSION = (("as the server does", True), ("left apart", False))
"""sglang's --disable-shared-experts-fusion is the second."""
WITHIN = (0.02, 0.05, 0.1, 0.2, 0.5, 10.0)
"""Distances from the best that can be brushed; the last is everything measured in practice."""


def layer_picker(
    model: str = "qwen3-30b-a3b",
    tp_size: int = 1,
    device: str = "NVIDIA H200",
    num_tokens: int = 64,
    triton_version: str | None = None,
) -> widgets.VBox:
    """Sizes per rank, and the file that a loader would use, with Model, TP, EP, Format, Shared experts, Device, Batch, Triton and
    Loader to choose; degrees that do not divide a model are not offered."""
    folders = config_files.version_folders(runtime.config_dir())
    found = [folder.name.removeprefix("triton_").replace("_", ".") for folder in folders]
    triton_versions = list(dict.fromkeys([*found, runtime.triton_version() or "unknown"]))
    controls = {
        "model": dropdown("Model", preset_names(quantised=True), model),
        "tp_size": dropdown("TP", tp_choices(model), tp_size),
        "ep_size": dropdown("EP", ep_choices(model, tp_size), 1),
        "dtype": dropdown("Format", FORMATS, ""),
        "fused": dropdown("Shared experts", FUSION, True),
        "device": dropdown("Device", devices(device), device),
        "num_tokens": dropdown("Batch", (*BATCH_SIZES, 8192), num_tokens),
        "triton_version": dropdown("Triton", triton_versions, triton_version or triton_versions[0]),
        "rules": dropdown("Loader", tuple(config_files.RULES), "moelab"),
    }
    return interactive_panel(_Degrees(controls).draw, controls)


class _Degrees:
    """Keeps TP and EP to what divides the model: while they are being changed, the last panels stay."""

    def __init__(self, controls: dict[str, widgets.Dropdown]) -> None:
        self.controls, self.changing, self.last = controls, False, list[Panel]()
        controls["model"].observe(self.offer, "value")  # before the redraw, which is observed later
        controls["tp_size"].observe(self.offer, "value")

    def offer(self, _: object) -> None:
        if self.changing:
            return
        self.changing = True
        try:
            model, tp, ep = (self.controls[name] for name in ("model", "tp_size", "ep_size"))
            _keep(tp, tp_choices(model.value))
            _keep(ep, ep_choices(model.value, tp.value))
        finally:
            self.changing = False

    def draw(self, **chosen: Any) -> list[Panel]:
        if not self.changing:
            chosen["dtype"] = chosen["dtype"] or None
            layer = {
                name: chosen[name] for name in ("model", "tp_size", "ep_size", "dtype", "device", "rules", "fused")
            }
            self.last = [plots_loading.sizes(**layer), plots_loading.lookup(**chosen)]
        return self.last


def _keep(control: widgets.Dropdown, options: Sequence[Any]) -> None:
    """Other options, the value kept where it is among them."""
    value = control.value if control.value in options else options[0]
    control.options = list(options)
    control.value = value


def ep_choices(model: str, tp_size: int) -> list[int]:
    """The degrees of expert parallelism within tp_size ranks that divide a model; the others are left out."""
    fitting = []
    for degree in (1, 2, 4, 8, 16):
        try:
            load_model(model, tp_size=tp_size, ep_size=degree)
        except ShardError:
            continue
        fitting.append(degree)
    return fitting


def devices(first: str) -> list[str]:
    """Devices by the driver's name: `first`, this machine's GPU, and those that data/devices knows."""
    here = runtime.current()
    own = [here.device_name] if here.mode == "gpu" else []
    return list(dict.fromkeys([first, *own, *(name.replace("_", " ") for name in roofline.device_names())]))


def landscape_browser(survey: Survey, num_tokens: int = 64, landscapes: Sequence[str] = ()) -> widgets.VBox:
    """Scatter, parallel coordinates and heat map of the same brushed configs: GEMM, Batch, Within, X axis, and a range for
    each parameter; above them Landscape, where there is one among `landscapes`, names in data/landscapes, beside the survey's."""
    names = list(dict.fromkeys([survey.landscape.name, *landscapes]))
    if len(names) == 1:
        return _browser(survey, num_tokens)
    chosen, box = dropdown("Landscape", names, names[0]), widgets.VBox()
    box.add_class("moelab-panel")  # so that the controls of what is in it stay in sight

    def browse(_: object = None) -> None:
        found = survey if chosen.value == names[0] else Survey(landscape.load(chosen.value))
        near = min(found.batch_sizes, key=lambda b: abs(b - num_tokens))
        box.children = [chosen, _browser(found, near)]

    chosen.observe(browse, "value")
    browse()
    return box


def _browser(survey: Survey, num_tokens: int) -> widgets.VBox:
    within = [("all", w) if w == WITHIN[-1] else (f"{w:.0%}", w) for w in WITHIN]
    known = survey.problem.routing == "uniform"  # of another routing a survey has no waves to draw over
    controls: dict[str, widgets.Widget] = {
        "gemm": dropdown("GEMM", [(name, key) for key, name in plots_landscape.GEMM_NAMES.items()], "up"),
        "num_tokens": dropdown("Batch", survey.batch_sizes, num_tokens),
        "within": dropdown("Within", within, 0.2),
        "x": dropdown("X axis", tuple(plots_linked.AXES), "waves" if known else "shared memory"),
    }
    names = short_names()
    controls |= {name: _range(names[name], survey.axis(name)) for name in PARAMETERS}

    def allowed(values: Mapping[str, Any]) -> dict[str, list[int]]:
        return {n: [v for v in survey.axis(n) if values[n][0] <= v <= values[n][1]] for n in PARAMETERS}

    views: list[Callable[..., Panel]] = [
        lambda gemm, num_tokens, within, x, **r: plots_linked.scatter(survey, gemm, num_tokens, allowed(r), within, x),
        lambda gemm, num_tokens, within, x, **r: plots_linked.parallel(survey, gemm, num_tokens, allowed(r), within),
        lambda gemm, num_tokens, within, x, **r: plots_landscape.heat_map(survey, gemm, allowed(r)),
    ]

    def answer(gemm: Gemm, num_tokens: int, within: float, x: str, **ranges: Any) -> str:
        return plots_linked.in_a_line(survey, gemm, num_tokens, allowed(ranges), within)

    return interactive_panels(views, controls, answer)


def _range(description: str, values: Sequence[int]) -> widgets.SelectionRangeSlider:
    return widgets.SelectionRangeSlider(
        options=[(str(v), v) for v in values], index=(0, len(values) - 1), description=description,
        continuous_update=True, style={"description_width": "70px"}, layout=widgets.Layout(width="300px"),
    )  # fmt: skip
