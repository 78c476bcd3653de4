"""The recording fast_layer over its floor: the fastest layer beside the classic one, torch's, sglang's and FlashInfer's."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from moelab import runtime
from moelab.config import KernelConfig, default_config
from moelab.errors import counted
from moelab.plots import ratio_map
from moelab.plots.cells import conclude, names_of, table_of, timed
from moelab.plots.cells import over_floor as times_over_floor
from moelab.plots.panel import Panel, Row, geometric_mean
from moelab.plots.style import Look, look
from moelab.recordings import Recording
from moelab.roofline import Ceilings

LOOKS: Mapping[str, Look] = {name: look(name) for name in ("classic", "grouped_mm", "fast")}
"""Contenders of the recording."""

SGLANG = ("default", "shipped", "tuned", "tuned_sep", "fuse_sep")
"""Columns of sglang's rows: its rule without a file, the file it ships, a short search's config for both GEMMs, one for each, and
that with SwiGLU fused into GEMM1."""

LEVEL = 0.02
"""Means of time that differ by less are called level."""

NOTHING = "**Nothing of it was timed.** Record it again: `moelab record fast_layer`."


def default_only(recording: Recording) -> list[str]:
    """Shapes where the classic layer had no config but the one that loaders fall back to without a file, in some cell.

    Told by the rows: one config tried, and both GEMMs' configs are `moelab.config.default_config`'s for few tokens or many.
    """
    fallbacks = (default_config(1, 1), default_config(2, 1))
    found = [
        row
        for row in recording.select(impl="classic", tried=1)
        if all(KernelConfig.from_json(row[key]) in fallbacks for key in ("config", "down_config"))
    ]
    return names_of(found, "shape")


def runs_of(chosen: Sequence[int], among: Sequence[int]) -> str:
    """Some of the batch sizes, neighbours drawn together: "1–16, 256"."""
    runs: list[list[int]] = []
    for place, batch in enumerate(among):
        if batch in chosen:
            if place and among[place - 1] in chosen:
                runs[-1].append(batch)
            else:
                runs.append([batch])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}–{run[-1]}" for run in runs)


def fast_rows(one: Recording) -> list[Row]:
    """The rows of *fast* under uniform routing, of the recording fast_layer."""
    return [row for row in timed(one) if row["impl"] == "fast" and row["routing"] == "uniform"]


# --- over the floor -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rivals:
    """What others' layers took, of data/upstream: each with its source and its rows, which name their own floor."""

    sglang: Mapping[str, Any]
    flashinfer: Mapping[str, Any]

    def rows(self) -> list[dict[str, Any]]:
        """(shape, batch) -> time over floor, of sglang the best of its configs, of FlashInfer the best of its tactics."""
        found = []
        for name, peer in (("sglang", self.sglang), ("FlashInfer", self.flashinfer)):
            for row in peer["rows"]:
                us = min(row[key] for key in (*SGLANG, "rival") if row.get(key)) / row["floor"]
                found.append({"impl": name, "shape": row["name"], "num_tokens": row["M"], "over": (us, us, us)})
        return found

    def said(self) -> str:
        """fast beside FlashInfer in one run, each ordering the tokens itself."""
        rows = [row for row in self.flashinfer["rows"] if row.get("moelab")]
        ours, theirs = (geometric_mean([row[key] / row["floor"] for row in rows]) for key in ("moelab", "rival"))
        behind = [row["moelab"] / row["rival"] - 1 for row in rows if row["rival"] < row["moelab"]]
        return (f"fast {ours:.3f}, FlashInfer {theirs:.3f} over {counted(len(rows), 'cell')}, FlashInfer ahead in {len(behind)}"
                + f" by at most {max(behind):.0%}" * bool(behind))  # fmt: skip


def load_rivals() -> Rivals:
    """From data/upstream."""
    folder = runtime.data_dir() / "upstream"
    names = ("h200_sglang", "h200_flashinfer_cutedsl")
    return Rivals(*(json.loads((folder / f"{name}.json").read_text(encoding="utf-8")) for name in names))


def over_floor(recording: Recording, at: Ceilings, routing: str = "uniform") -> Panel:
    """Map of contender by batch: time over the floor, geometric mean over shapes, the nearest first; the table has every shape.

    The mean is over shapes whose classic layer had tuned configs to choose from, where there are any, and that have every
    contender at that batch. `moelab.plots.rivals` draws fast beside what others measured.
    """
    rows = [{**row, "over": times_over_floor(row, at)[0]} for row in timed(recording)
            if row["routing"] == routing and row["impl"] in LOOKS and row["within_bound"]]  # fmt: skip
    if not rows:
        return Panel(None, [], NOTHING)
    shapes, batches = names_of(rows, "shape"), sorted(names_of(rows, "num_tokens"))
    fallen = [shape for shape in default_only(recording) if shape in shapes]
    compared = [shape for shape in shapes if shape not in fallen] or shapes
    means = _means([row for row in rows if row["shape"] in compared], names_of(rows, "impl"))
    ratios = (means.classic / means.fast).to_dict() if {"classic", "fast"} <= {*means} else {}
    cells = {(name, batch): ratio_map.cell_of(over, False) for name in means for batch, over in means[name].items()}
    note = f"<br>no tuned file, so sglang’s default config alone, and not in the mean: {', '.join(fallen)}"
    figure = ratio_map.chart(
        f"Time over floor, {routing} routing: {_short(ratios, batches)}",
        f"{recording.source()}, geometric mean of {', '.join(compared)}{note if 0 < len(fallen) < len(shapes) else ''}",
        cells, sorted(means, key=lambda name: geometric_mean(means[name].tolist())), list(means.index), tall=44, low=None,
        span=math.log(3), bar="time / floor",
    )  # fmt: skip
    return Panel(
        figure, table_of(rows, "time / floor", lambda row: row["over"]), _said(ratios, means, routing, compared, fallen)
    )


def _means(rows: Sequence[Row], impls: Sequence[str]) -> pd.DataFrame:
    """Batch by contender: geometric means of time over floor, over the shapes that have all contenders at that batch."""
    found = pd.DataFrame(rows)
    wide = found.pivot(index=["shape", "num_tokens"], columns="impl", values="over").reindex(columns=impls).dropna()
    return np.exp(np.log(wide).groupby("num_tokens").mean())


def _short(ratios: Mapping[int, float], batches: Sequence[int]) -> str:
    """Where fast is ahead of classic, level with it or behind it, on average."""
    groups: dict[str, list[int]] = {"ahead": [], "level": [], "behind": []}
    for batch, ratio in ratios.items():
        groups["level" if abs(ratio - 1) < LEVEL else "ahead" if ratio > 1 else "behind"].append(batch)
    parts = [f"{word} at {runs_of(group, batches)}" for word, group in groups.items() if group]
    return f"fast is {', '.join(parts)}".replace(" at ", " at batch ", 1) if parts else "nothing to compare"


def _said(
    ratios: Mapping[int, float], means: pd.DataFrame, routing: str, compared: Sequence[str], fallen: Sequence[str]
) -> str:
    if not ratios:
        return f"**No shape has fast and classic at the same batch size under {routing} routing.**"
    best, worst = max(ratios, key=lambda b: ratios[b]), min(ratios, key=lambda b: ratios[b])
    head = (f"Under {routing} routing the mean of {counted(len(compared), 'shape')} has classic at {ratios[best]:.2f} times "
            f"fast’s time at batch {best}, and at {ratios[worst]:.2f} times at batch {worst}.")  # fmt: skip
    return conclude(head, {
        "Times the floor, over all batch sizes": [f"{name} {geometric_mean(means[name].tolist()):.2f}" for name in means],
        "Drawn and not counted, without a tuned file": fallen if list(compared) != list(fallen) else (),
    })  # fmt: skip
