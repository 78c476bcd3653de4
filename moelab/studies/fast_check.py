"""The choice of a form on models that no recording holds: beside the fastest of all forms that are likely, timed in the same run.

Each cell is a race as the tuner has it (`moelab.tuner.form_race`); the chosen form and, with --beside, what another rule would
run are in its finals.

`python -m moelab.studies.fast_check --out FILE --budget SECONDS` prints a line for each cell and stops when the time is over.
"""

from __future__ import annotations

import argparse
import itertools
import json
import statistics
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from moelab import recordings, runtime
from moelab.config import default_config
from moelab.dtypes import torch_dtype
from moelab.errors import MoelabError
from moelab.kernels.fast_instances import Instance
from moelab.measure import Protocol
from moelab.pipelines.fast import choose_unchecked, here
from moelab.pipelines.form_choice import Choice, Classic, Form
from moelab.pipelines.form_files import label, named
from moelab.recordings import Recording
from moelab.shapes import MoEShape, load_model
from moelab.studies import fast_shapes
from moelab.suites.layer_classic import Layer, protocol_for, weight_sets
from moelab.suites.partial import OnRows, ignore, keeper
from moelab.tuner.ahead import compile_all
from moelab.tuner.form_race import jobs_of, likely, race, refused

SHAPES = {
    "ling-mini-2.0/tp1": ("ling-mini-2.0", 1, 1),
    "qwen3-coder-480b/tp8": ("qwen3-coder-480b-a35b", 8, 1),
    "minimax-m2/tp4": ("minimax-m2", 4, 1),
    "deepseek-v3/ep32": ("deepseek-v3", 32, 32),
    "hunyuan-a13b/tp4": ("hunyuan-a13b", 4, 1),
    "phi-3.5-moe/tp2": ("phi-3.5-moe", 2, 1),
    "ernie-4.5-21b/tp1": ("ernie-4.5-21b-a3b", 1, 1),
    "qwen2-57b/tp4": ("qwen2-57b-a14b", 4, 1),
}
"""Name -> preset, tp_size, ep_size."""

STEPS = (
    ("uniform", (20, 90, 333)),
    ("zipf", (90, 333)),
    ("uniform", (2, 6, 1500)),
    ("zipf", (20, 1500)),
    ("uniform", (6000,)),
)


def shape_of(name: str) -> MoEShape:
    """The sharded shape behind a name of SHAPES, in plain weights of silu-gated experts, without fused shared experts."""
    model, tp_size, ep_size = SHAPES[name]
    return fast_shapes.plain(load_model(
        model, tp_size=tp_size, ep_size=ep_size, dtype="bfloat16", disable_shared_experts_fusion=True
    ))  # fmt: skip


def other_form(said: str, choice: Choice, num_tokens: int, num_experts: int) -> Form | None:
    """What another rule runs, as its file says: an instance or a form for a few tokens as recordings name it, "classic" under
    sglang's default rule."""
    if said == "classic":
        config = default_config(num_tokens, num_experts)
        return Classic(config, config)
    return named(said)


def cell(
    name: str, layer: Layer, routing: str, choice: Choice, other: Form | None, failed: Mapping[Form, str]
) -> dict[str, Any]:
    """One row: what is chosen, the fastest, and what the other rule runs, each with its samples."""
    others = [other] if other is not None else []
    raced = race(layer, [*likely(choice), *others], failed, [choice.form, *others], rounds=9)
    row: dict[str, Any] = {
        "shape": name, "num_tokens": layer.num_tokens, "routing": routing, "rotations": len(layer.routings),
        "tried": len(raced.tried), "wrong": list(raced.wrong), "predicted_us": choice.predicted[0].us,
    }  # fmt: skip
    for role, form in (("chosen", choice.form), ("best", raced.best), ("other", other)):
        if form is not None and form in raced.finals:
            row |= {role: label(form), f"{role}_samples_us": list(raced.finals[form].samples_us)}
    return row


def median(row: Mapping[str, Any], role: str) -> float | None:
    """Of a role's samples; None where it was not timed."""
    samples = row.get(f"{role}_samples_us")
    return statistics.median(samples) if samples else None


def line(row: Mapping[str, Any]) -> str:
    """A row as it is printed: regrets of the choice and of the other rule."""
    best, chosen, other = (median(row, role) for role in ("best", "chosen", "other"))
    assert best is not None
    regrets = "".join(f"{'-' if us is None else f'{100 * (us / best - 1):.1f} %':>9}" for us in (chosen, other))
    return (
        f"{row['shape']:<22}{row['num_tokens']:>6} {row['routing']:<8}{best:>9.1f} us{regrets}   {row.get('chosen', '')[:60]}"
        f"{'' if row['best'] == row.get('chosen') else ', best ' + row['best'][:60]}"
    )


def record(
    names: Sequence[str] = tuple(SHAPES), budget_s: float = float("inf"), others: Mapping[str, str] | None = None,
    on_rows: OnRows = ignore,
) -> Recording:  # fmt: skip
    """Every cell of STEPS, until the time is over. others: "shape|tokens" -> what another rule runs. Raises RuntimeModeError
    without a GPU."""
    runtime.require_cuda("the study 'fast_check'")
    begin, rows = time.perf_counter(), list[dict[str, Any]]()
    shapes = {name: shape_of(name) for name in names}
    todo = [(routing, name, m) for routing, batches in STEPS for name, m in itertools.product(names, batches)]
    choices = {(name, m): choose_unchecked(shapes[name], m, *here()) for _, name, m in todo}
    other = {
        (name, m): other_form((others or {}).get(f"{name}|{m}", ""), choices[name, m], m, shapes[name].num_experts)
        for _, name, m in todo
    }
    forms = {key: [*likely(choice), *([other[key]] if other[key] else [])] for key, choice in choices.items()}
    jobs = list(dict.fromkeys(job for (name, _), found in forms.items() for job in jobs_of(shapes[name], found)))  # type: ignore[arg-type]
    instances = dict.fromkeys(form for found in forms.values() for form in found if isinstance(form, Instance))
    compiled = {}
    if runtime.current().mode == "gpu":
        compiled = compile_all(jobs, list(instances), torch_dtype("bfloat16"), begin + budget_s / 3)
        print(f"{len(compiled)} kernels compiled after {time.perf_counter() - begin:.0f} s", flush=True)
    weights: dict[str, Any] = {}
    for routing, name, m in todo:
        if time.perf_counter() - begin > budget_s:
            print(f"the time is over before {name} {m} {routing}", flush=True)
            break
        weights.setdefault(name, None)
        weights[name] = weights[name] or weight_sets(shapes[name])
        layer = Layer(shapes[name], m, protocol_for(m).rotations, weights[name], routing)
        failed = refused(shapes[name], forms[name, m], compiled)  # type: ignore[arg-type]
        try:
            rows.append(cell(name, layer, routing, choices[name, m], other[name, m], failed))
            print(line(rows[-1]), flush=True)
        except MoelabError as error:
            print(f"{name} {m} {routing}: {error}", flush=True)
        on_rows(rows)
    protocol = {**Protocol(8, 9, 300.0).describe(), "rotations": "in each row", "order": "included"}
    return Recording("fast_check", runtime.provenance(seed=0), protocol, tuple(rows))


def summary(rows: Sequence[Mapping[str, Any]]) -> str:
    """Regrets of the choice and of the other rule over all rows, even and skewed."""
    said = []
    for routing, role in itertools.product(("uniform", "zipf"), ("chosen", "other")):
        pairs = [(median(row, role), median(row, "best")) for row in rows if row["routing"] == routing]
        lost = [100 * (us / best - 1) for us, best in pairs if us is not None and best is not None]
        if lost:
            worst, mean = max(lost), statistics.mean(lost)
            said.append(f"{routing:<8}{role:<7}{len(lost):>4} cells: mean {mean:.2f} %, worst {worst:.1f} %")
    return "\n".join(said)


def main() -> None:
    """The command line: see above."""
    parser = argparse.ArgumentParser(prog="python -m moelab.studies.fast_check")
    parser.add_argument("--out", type=Path, required=True, help="file of the recording")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--beside", type=Path, help="JSON of what another rule runs: SHAPE|TOKENS -> form")
    asked = parser.parse_args()
    others = json.loads(asked.beside.read_text()) if asked.beside else None
    own: list[Path] = []
    found = record(budget_s=asked.budget, others=others, on_rows=keeper("fast_check", asked.out, own))
    recordings.write(found, asked.out)
    for path in own:
        path.unlink(missing_ok=True)
    torch.cuda.synchronize()
    print(summary(found.rows))


if __name__ == "__main__":
    main()
