"""The recording fast_layer over its floor: the fastest layer beside the classic one, torch's, sglang's and FlashInfer's."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moelab import runtime
from moelab.config import KernelConfig, default_config
from moelab.errors import counted
from moelab.plots.cells import names_of, timed
from moelab.plots.panel import Row, geometric_mean
from moelab.plots.style import Look, look
from moelab.recordings import Recording

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
