"""`moelab tune --kernel fast`: forms of the fastest layer, not configs of one kernel."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import typer

from moelab.cli import asking, printing

NOT_FOR_FORMS = ("replay", "resume", "ray", "gpus", "freeze", "strategy", "down", "rules")
"""Options that say nothing of a race of forms: it is measured on the first GPU, and its file is moelab's own."""


def tune_fast(
    asked: Mapping[str, Any], given: Mapping[str, Any], budget_s: float | None, out: Path, as_json: bool,
    line: Callable[[str], None],
) -> bool:  # fmt: skip
    """Measure, write, and report; whether every batch size has its form. asked: as `asking.tuned_shape` takes it, with
    batch_sizes, routing and seed. given: options of the command line. line: for what is said on the way."""
    if passed_over := [name for name in NOT_FOR_FORMS if name in given]:
        raise typer.BadParameter(
            f"--{', --'.join(passed_over)} would be passed over: --kernel fast measures forms of the whole layer, on the first "
            "GPU. Expected none of them beside it. Leave them out; a stopped run goes on with the --batch-size that are left."
        )
    from moelab.tuner.form_tuning import tune_forms

    begin = time.monotonic()
    options = {name: asked[name] for name in ("batch_sizes", "routing", "seed")}
    try:
        found, path = tune_forms(asking.tuned_shape(asked), out, **options, budget_s=budget_s, say=line)
    except KeyboardInterrupt:
        line(
            f"stopped; what was measured is in the file below {out}: go on with the batch sizes that are left (--batch-size)"
        )
        raise
    written = path if any(each.form for each in found) else None
    rows = [each.row() for each in found]
    if as_json:
        spent = time.monotonic() - begin
        printing.print_json(
            {"kernel": "fast", "files": [str(written)] if written else [], "spent_s": spent, "batches": rows}
        )
    else:
        print(printing.table([_shown(row) for row in rows]))
        print(f"\nwrote {written}" if written else "\nwrote nothing")
    return all(each.form for each in found)


def _shown(row: Mapping[str, Any]) -> dict[str, Any]:
    if row["form"] is None:
        return {"tokens": row["num_tokens"], "form": None, "": row["error"]}
    shown = {
        "tokens": row["num_tokens"], "form": row["form"],
        "layer us": f"{row['layer_us']:.2f} ({row['low_us']:.2f} ... {row['high_us']:.2f})",
    }  # fmt: skip
    for name in ("predicted", "current"):
        gain = row.get(f"over_{name}")
        low, high = row.get(f"over_{name}_low"), row.get(f"over_{name}_high")
        shown[f"over {name}"] = None if gain is None else f"{gain:.3f} ({low:.3f} ... {high:.3f})"
    return shown | {"error": f"{row['rel_error']:.2g}", "": ""}
