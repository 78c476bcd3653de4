"""`moelab bench --csv FILE`: a row for each implementation at each batch size, for a spreadsheet or pandas."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moelab.errors import FolderError

if TYPE_CHECKING:
    from moelab.shapes import MoEShape
    from moelab.suites.bench import Result

TIMES = ("median_us", "low_us", "high_us", "fastest", "tie")
JUDGED = ("max_abs_error", "bound", "within_bound")
ORIGIN = ("gpu", "driver", "torch", "triton", "moelab", "git_commit", "date")


def require_new(path: Path) -> None:
    """Raise FolderError, before anything is measured, where the file could not be written or is there already."""
    if path.exists():
        raise FolderError(f"{path} exists already. Expected a new file for --csv. Name another, or move it.")
    if not path.resolve().parent.is_dir():
        raise FolderError(
            f"There is no folder {path.resolve().parent}. Expected one for --csv. Make it, or name another."
        )


def rows(found: MoEShape, results: Sequence[Result]) -> list[dict[str, Any]]:
    """What is written: the layer, how it was timed, an implementation's times and error, and where."""
    sizes = {
        "model": found.name, "tp_size": found.tp_size, "ep_size": found.ep_size, "dtype": found.dtype,
        "format": found.format.name, "E": found.num_experts, "top_k": found.top_k, "hidden_size": found.hidden_size,
        "moe_intermediate_size": found.moe_intermediate_size,
    }  # fmt: skip
    return [
        {
            **sizes, "num_tokens": result.num_tokens, "routing": result.routing, "impl": row["impl"],
            "floor_us": result.floor_us,
            **{key: row.get(key) for key in TIMES}, **{f"eager_{key}": row.get(f"eager_{key}") for key in TIMES},
            **{key: row.get(key) for key in JUDGED},
            "problem": row.get("refused") or row.get("problem") or row.get("note"),
            **{key: result.provenance.get(key) for key in ORIGIN},
        }
        for result in results
        for row in result.rows
    ]  # fmt: skip


def write(path: Path, found: MoEShape, results: Sequence[Result]) -> None:
    """Write the rows, whole or not at all; empty cells for what was not timed or not asked for."""
    from moelab import writing

    table = rows(found, results)
    text = io.StringIO()
    writer = csv.DictWriter(text, list(table[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(table)
    writing.write(path, text.getvalue())
