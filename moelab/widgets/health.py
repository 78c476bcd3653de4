"""The controls of 06_config_health: a doctor for any folder, a lookup's path, and matrices of transfer."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from moelab import runtime
from moelab.config_files import doctor
from moelab.config_files.findings import SEVERITIES
from moelab.config_files.rules import RULES
from moelab.config_files.shipped import files_below
from moelab.errors import MoelabError
from moelab.plots import config_health, lookup_path
from moelab.plots import transfer as plots_transfer
from moelab.plots.literal import literal
from moelab.plots.panel import Panel
from moelab.roofline import device_names
from moelab.tuner.transfer import PARTS, Transfer
from moelab.widgets.config_search import FORMATS
from moelab.widgets.fields import Checked, dropdown, number_between, place_to_read, text
from moelab.widgets.panels import interactive_panel, model_controls

OTHER = "another folder"
SHOWN: Mapping[str, Sequence[str]] = {
    "everything": SEVERITIES,
    "errors and warnings": SEVERITIES[:2],
    "errors": SEVERITIES[:1],
}
TRITONS = ("3.2.0", "3.3.1", "3.4.0", "3.5.1", "3.6.0", "3.7.1")
MOST_TOKENS = 1 << 20
MATRICES = ("batch by batch", "shortcuts", "other devices’ files", "other formats’ files")


def config_doctor(
    trees: Mapping[str, Path], planted: Mapping[str, Callable[[str], Mapping[str, tuple[str, str]]]] | None = None
) -> widgets.VBox:
    """`plots.config_health.findings` with Tree, Folder, Rules and Show to choose; typing a Folder chooses it as the tree.

    trees: name -> folder. planted: name -> what was done to its files, as `findings` takes it, by a loader's rules. A folder
    that cannot be examined shows the error's sentence in place of the figure.
    """
    names = [*trees, OTHER]
    tree, rules = dropdown("Tree", names, names[0]), dropdown("Rules", ["auto", *RULES], "auto")
    typed = text("Folder", placeholder="a path, then Enter", width="320px")
    folder = Checked(typed, lambda value: place_to_read(value) if value.strip() or tree.value == OTHER else None)
    typed.observe(lambda _: setattr(tree, "value", OTHER), "value")
    tree.observe(folder.examine, "value")

    def draw(tree: str, folder: str, rules: str, show: str) -> Panel:
        place = Path(folder).expanduser() if tree == OTHER else trees[tree]
        if tree == OTHER and not folder.strip():
            return Panel(None, [], "**Type a folder’s path into Folder, then press Enter.**")
        try:
            report = doctor(place, rules)
        except MoelabError as error:
            return Panel(None, [], f"**{literal(error)}**")
        made = (planted or {}).get(tree)
        return config_health.findings(report, SHOWN[show], made(report.rules) if made else None)

    controls = {"tree": tree, "folder": folder, "rules": rules, "show": dropdown("Show", list(SHOWN), "everything")}
    return interactive_panel(draw, controls)


def config_path(trees: Mapping[str, Path], model: str = "qwen3-30b-a3b", num_tokens: int = 64) -> widgets.VBox:
    """`plots.lookup_path.explain` with everything that a lookup depends on to choose.

    trees: name -> folder that holds configs/triton_X_Y_Z.
    """
    models, degrees = model_controls(model, 1, quantised=True)
    devices = [name.replace("_", " ") for name in device_names()]
    controls: dict[str, Any] = {
        "tree": dropdown("Tree", list(trees), next(iter(trees))),
        "model": models,
        "tp_size": degrees,
        "dtype": dropdown("Format", FORMATS, FORMATS[0][1]),
        "num_tokens": Checked(
            widgets.IntText(
                num_tokens,
                description="Batch",
                continuous_update=False,
                style={"description_width": "initial"},
                layout=widgets.Layout(width="160px"),
            ),
            number_between(1, MOST_TOKENS),
        ),
        "device": dropdown("Device", devices, "NVIDIA H200"),
        "triton_version": dropdown("Triton", TRITONS, "3.6.0"),
        "down": dropdown("GEMM", [("GEMM1", False), ("GEMM2", True)], False),
        "rules": dropdown("Rules", [lookup_path.ALL, *RULES], lookup_path.ALL),
    }
    return interactive_panel(lambda tree, **given: lookup_path.explain(trees[tree], **given), controls)


def config_transfer(runs: Mapping[str, Transfer], shipped: Sequence[Mapping[str, Any]]) -> widgets.VBox:
    """The matrices of `plots.transfer` with Matrix, Run and GEMM to choose.

    runs: name -> a run; "another run’s winner" is the next one's of the same layer, if there is one. shipped:
    `config_files.shipped_files()`.
    """
    names = list(runs)
    every = {"moelab": files_below(runtime.config_dir()), "sglang": shipped}

    def draw(matrix: str, run: str, part: Any) -> Panel:
        if matrix == MATRICES[0]:
            return plots_transfer.by_batch(runs[run], part)
        if matrix == MATRICES[2]:
            return plots_transfer.by_file(runs[run], shipped, part)
        if matrix == MATRICES[3]:
            return plots_transfer.by_format(runs[run], every, part)
        after = names[names.index(run) + 1 :] + names[: names.index(run)]
        other = next((runs[n] for n in after if runs[n].problem.shape == runs[run].problem.shape), None)
        return plots_transfer.choices(runs[run], part, other)

    parts = [(plots_transfer.PARTS[part], part) for part in PARTS]
    controls = {
        "matrix": dropdown("Matrix", MATRICES, MATRICES[0]),
        "run": dropdown("Run", names, names[0]),
        "part": dropdown("GEMM", parts, PARTS[0]),
    }
    return interactive_panel(draw, controls)
