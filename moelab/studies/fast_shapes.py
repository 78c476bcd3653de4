"""Every form of the fastest layer, and both Triton layers under a small grid of untuned configs, where fast_choice has nothing.

What `moelab.pipelines.fast` predicts of a form's time is fitted on it: many small experts, few large ones, expert parallelism,
batch sizes off the usual grid. Each contender is checked against float64 once and timed by a short pass; order and alignment,
made beforehand for all, are timed beside them. Kernels are compiled in parallel before anything is timed.

`python -m moelab.studies.fast_shapes --out FILE --budget SECONDS` stops with what it has when the time is over; `--before FILE`
goes on from there. `moelab record fast_shapes` takes all of it.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moelab import config as config_room
from moelab import recordings, runtime
from moelab.config import KernelConfig
from moelab.dtypes import torch_dtype
from moelab.errors import MoelabError
from moelab.kernels import few_tokens
from moelab.kernels.align import align
from moelab.kernels.checks import current_target
from moelab.kernels.expert_order import ordered_tiles
from moelab.kernels.fast_instances import CLUSTERED, INSTANCES, Instance
from moelab.pipelines.fast import cut_of
from moelab.pipelines.form_choice import TILES, Classic, Form, Gated, kind_of, near_blocks, near_instances
from moelab.pipelines.form_files import label
from moelab.recordings import Recording
from moelab.shapes import MoEShape, load_model
from moelab.suites import fast_choice, fast_layer, partial
from moelab.suites.bench import cost_of, judge
from moelab.suites.layer_classic import Layer, protocol_for, weight_sets
from moelab.suites.partial import OnRows, ignore
from moelab.suites.screening import quick, short_pass, usable
from moelab.tuner.ahead import Job, compile_all
from moelab.tuner.compile import Compiled
from moelab.tuner.form_race import Contender, jobs_of, refused

SHAPES = {
    "qwen3-next/tp2": ("qwen3-next-80b-a3b", 2, 1),
    "kimi-k2/tp8": ("kimi-k2", 8, 1),
    "deepseek-v3/ep8": ("deepseek-v3", 8, 8),
    "glm-4.5-air/tp2": ("glm-4.5-air", 2, 1),
    "qwen3-30b-a3b/ep4": ("qwen3-30b-a3b", 4, 4),
    "mixtral-8x22b/tp4": ("mixtral-8x22b", 4, 1),
    "gpt-oss-120b/tp2": ("gpt-oss-120b", 2, 1),
    "olmoe-1b-7b/tp1": ("olmoe-1b-7b", 1, 1),
}
"""Name -> preset, tp_size, ep_size. Of gpt-oss the sizes alone: its activation is one that the fast layer has not."""

STEPS = (
    ("uniform", (40, 150, 700)),
    ("uniform", (3, 12, 2500)),
    ("zipf", (150, 700)),
    ("uniform", (1,)),
    ("zipf", (40,)),
)
"""Routing and batch sizes, what tells most first: a run that is cut has all shapes at the first of them."""

LIKELY = 4
"""Configs of each Triton layer that are timed on a skewed batch: the fastest of the even one."""


def shape_of(name: str) -> MoEShape:
    """The sharded shape behind a name of SHAPES, in plain weights, without fused shared experts."""
    model, tp_size, ep_size = SHAPES[name]
    return plain(load_model(
        model, tp_size=tp_size, ep_size=ep_size, dtype="bfloat16", disable_shared_experts_fusion=True
    ))  # fmt: skip


def plain(shape: MoEShape) -> MoEShape:
    """The sizes of a layer, with the activation that the fast layer has."""
    return replace(shape, activation="silu")


# --- what is tried ------------------------------------------------------------------------------------------------


def tile_pairs(rows: float, shape: MoEShape) -> list[tuple[KernelConfig, KernelConfig]]:
    """Config pairs of TILES near so many rows an expert: each tile for both GEMMs, and beside its neighbour for GEMM2."""
    found = []
    for m in near_blocks(rows):
        tiles = TILES[m]
        for up, down in [*zip(tiles, tiles, strict=True), *zip(tiles, [*tiles[1:], tiles[0]], strict=True)]:
            if _runs(up, shape.hidden_size, shape.dtype) and _runs(down, shape.moe_intermediate_size, shape.dtype):
                found.append((up, down))
    return found


def _runs(config: KernelConfig, K: int, dtype: str) -> bool:
    return not config_room.violations(config, dtype=dtype, target=current_target(), K=K)


def forms_for(shape: MoEShape, num_tokens: int) -> list[Form]:
    """All that is timed for a batch of that size; the classic layer's default among them."""
    rows = max(1.0, shape.expected_rows(num_tokens))
    instances = near_instances(rows, fast_choice.CANDIDATES)
    few = few_tokens.FORMS if num_tokens <= few_tokens.MOST_TOKENS else ()
    default = config_room.default_config(num_tokens, shape.num_experts, shape.dtype)
    pairs = tile_pairs(rows, shape)
    served = fast_layer.served_by(shape, num_tokens)
    return list(dict.fromkeys([
        served, *instances, *few, *(Gated(*pair) for pair in pairs),
        Classic(default, default), *(Classic(*pair) for pair in pairs),
    ]))  # fmt: skip


def likely(forms: Sequence[Form], even: Sequence[Mapping[str, Any]]) -> list[Form]:
    """What is timed on a skewed batch: of the Triton layers the LIKELY fastest of the even one's rows, of others all."""
    times = {row["form"]: statistics.median(row["samples_us"]) for row in even if "samples_us" in row}
    best = []
    for kind in (Gated, Classic):
        of_kind = [each for each in forms if isinstance(each, kind)]
        best += sorted(of_kind, key=lambda each: times.get(label(each), float("inf")))[:LIKELY]
    return [each for each in forms if not isinstance(each, Gated | Classic) or each in best]


# --- a cell -------------------------------------------------------------------------------------------------------


def beforehand(layer: Layer) -> dict[str, Contender]:
    """What is made beforehand for the others: order and tiles of the one-launch layer, alignment of the Triton layers."""
    ids, experts = [r.topk_ids for r in layer.routings], layer.shape.num_experts

    def ordered(instance: Instance) -> Contender:
        return lambda i: ordered_tiles(ids[i], experts, *cut_of(instance))

    def aligned(block_size: int) -> Contender:
        return lambda i: align(ids[i], block_size, experts)

    return {
        "order 48 1": ordered(INSTANCES[48]), "order 176 2": ordered(CLUSTERED), "align 16": aligned(16), "align 64": aligned(64)
    }  # fmt: skip


def cell(
    name: str, layer: Layer, routing: str, forms: Sequence[Form], failed: Mapping[Form, str]
) -> list[dict[str, Any]]:
    """A row for each form, and for order and alignment alone; those that have failed, are refused or wrong say why and are not
    timed."""
    shape = layer.shape
    contenders = {form: fast_layer.by_form(layer, form) for form in forms if form not in failed}
    in_triton: dict[Form, Contender] = {form: run for form, run in contenders.items() if not isinstance(form, Instance)}
    failed = {**failed, **usable(in_triton)[1]}
    runs = {label(form): run for form, run in contenders.items() if form not in failed}
    judged = judge(layer, runs)
    right = {label: run for label, run in runs.items() if judged[label]["within_bound"]}
    timed = quick({**right, **beforehand(layer)}, len(layer.routings))
    cost = cost_of(layer)
    common = {
        "shape": name, "num_tokens": layer.num_tokens, "routing": routing, "rotations": len(layer.routings),
        "experts_touched": layer.experts_touched(), "bytes": cost.bytes, "flops": cost.flops,
    }  # fmt: skip
    served = fast_layer.served_by(shape, layer.num_tokens)
    rows = [
        {
            **common, "kind": kind_of(form), "form": label(form), **fast_layer.note_of(form), "by_rule": form == served,
            **({"refused": failed[form]} if form in failed else judged[label(form)]),
            **fast_layer.samples_of(timed, label(form)),
        }
        for form in forms
    ]  # fmt: skip
    return rows + [
        {**common, "kind": "beforehand", "form": part, **fast_layer.samples_of(timed, part)}
        for part in beforehand(layer)
    ]


# --- the recording ------------------------------------------------------------------------------------------------


def cells(names: Sequence[str]) -> Iterator[tuple[str, str, int]]:
    """(routing, shape, batch size) in the order in which they are timed."""
    for routing, batches in STEPS:
        for name, num_tokens in itertools.product(names, batches):
            yield routing, name, num_tokens


def record(
    names: Sequence[str] = tuple(SHAPES),
    budget_s: float = float("inf"),
    before: Sequence[Mapping[str, Any]] = (),
    on_rows: OnRows = ignore,
) -> Recording:
    """Every cell of STEPS that `before`, rows of an earlier run, has not, until the time is over: a cell that has begun is done.

    Raises RuntimeModeError without a GPU.
    """
    runtime.require_cuda("the suite 'fast_shapes'")
    begin = time.perf_counter()
    rows: list[dict[str, Any]] = [dict(row) for row in before]
    done = {(row["routing"], row["shape"], row["num_tokens"]) for row in rows}
    shapes = {name: shape_of(name) for name in names}
    todo = [each for each in cells(names) if each not in done]
    forms = {(name, m): forms_for(shapes[name], m) for _, name, m in todo}
    jobs = [job for (name, _), of_cell in forms.items() for job in jobs_of(shapes[name], of_cell)]
    instances = dict.fromkeys(form for of_cell in forms.values() for form in of_cell if isinstance(form, Instance))
    compiled: dict[Job, Compiled] = {}
    if jobs and runtime.current().mode == "gpu":
        dtype = torch_dtype(shapes[names[0]].dtype)
        compiled = compile_all(list(dict.fromkeys(jobs)), list(instances), dtype, begin + budget_s / 3)
        print(f"{len(compiled)} kernels compiled after {time.perf_counter() - begin:.0f} s", flush=True)
    weights: dict[str, Any] = {}
    for routing, name, num_tokens in todo:
        if time.perf_counter() - begin > budget_s:
            print(f"the time is over before {name} {num_tokens} {routing}", flush=True)
            break
        if name not in weights:
            weights[name] = weight_sets(shapes[name])
        even = [r for r in rows if (r["routing"], r["shape"], r["num_tokens"]) == ("uniform", name, num_tokens)]
        of_cell = forms[name, num_tokens]
        of_cell = likely(of_cell, even) if routing != "uniform" and even else of_cell
        layer = Layer(shapes[name], num_tokens, protocol_for(num_tokens).rotations, weights[name], routing)
        try:
            rows += cell(name, layer, routing, of_cell, refused(shapes[name], of_cell, compiled))
        except MoelabError as error:  # the other cells are still worth having
            rows.append({"shape": name, "num_tokens": num_tokens, "routing": routing, "refused": str(error)})
        on_rows(rows)
        print(f"{name} {num_tokens} {routing}: {len(rows)} rows, {time.perf_counter() - begin:.0f} s", flush=True)
    protocol = {**short_pass(protocol_for(1).rotations).describe(), "rotations": "in each row"}
    return Recording("fast_shapes", runtime.provenance(seed=0), protocol, tuple(rows))


def main() -> None:
    """The command line: see above."""
    parser = argparse.ArgumentParser(prog="python -m moelab.studies.fast_shapes")
    parser.add_argument("--out", type=Path, required=True, help="file of the recording")
    parser.add_argument("--budget", type=float, default=float("inf"), help="seconds")
    parser.add_argument("--before", type=Path, help="recording of an earlier run, to go on from")
    asked = parser.parse_args()
    before = recordings.load(asked.before).rows if asked.before else ()
    own: list[Path] = []
    keep = partial.keeper("fast_shapes", asked.out, own)
    recordings.write(record(budget_s=asked.budget, before=before, on_rows=keep), asked.out)
    for path in own:
        path.unlink(missing_ok=True)


if __name__ == "__main__":
    main()
