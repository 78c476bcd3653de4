"""Which instance of the one-launch layer serves a batch best: `python -m moelab.suites.fast_choice --out FILE`, on an H200.

Every candidate is checked against float64 and timed, a short pass each, at every shape and batch size of the suite fast_layer.
What it finds goes into `moelab.kernels.fast_instances` by hand: INSTANCES and the rule `instance_for` are reckoned, as yet.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moelab import recordings, runtime
from moelab.errors import MoelabError
from moelab.kernels.fast_instances import INSTANCES, Instance, instance_for
from moelab.recordings import Recording
from moelab.suites import fast_layer as suite
from moelab.suites.bench import judge
from moelab.suites.layer_classic import Layer, protocol_for, weight_sets
from moelab.suites.screening import quick

CANDIDATES = (
    *INSTANCES.values(),
    Instance(1, 2, 6, 8, 8, 8, 2),  # twice the weight rows: half as many tiles to wait for
    Instance(2, 1, 12, 8, 8, 8),  # one block a multiprocessor
    Instance(1, 2, 6, 16, 8, 8, 2),
    Instance(1, 2, 4, 48, 16, 16, 2),  # two blocks: one multiplies while the other stores
    Instance(1, 2, 3, 96, 16, 16, 2),
    Instance(1, 2, 3, 160, 16, 16, 2),
    Instance(2, 1, 6, 96, 16, 16),
    Instance(2, 1, 5, 176, 16, 16),  # half the weight rows: more tiles to share out where an expert has few columns
)
"""Those in use, and what might be better, by the reason beside each."""

NEAR = 4
"""Candidates that are timed hold at most so many times the rows that an expert gets, or at the least a NEARth of them."""


def candidates_for(num_tokens: int, top_k: int, num_experts: int) -> list[Instance]:
    """Candidates whose tiles are near what an expert gets if tokens spread evenly, the rule's choice among them."""
    by_rule = instance_for(num_tokens, top_k, num_experts)
    rows = max(1.0, min(num_tokens, num_tokens * top_k / num_experts))
    most = max(each.tokens for each in CANDIDATES)
    near = [each for each in CANDIDATES if min(rows, most) / NEAR <= each.tokens <= max(NEAR * rows, 16)]
    return list(dict.fromkeys([by_rule, *near]))


def cell(name: str, layer: Layer, routing: str) -> list[dict[str, Any]]:
    """A row for each candidate: its error beside the bound, and the samples of a short pass; those refused say why."""
    num_tokens, shape = layer.num_tokens, layer.shape
    by_rule = instance_for(num_tokens, shape.top_k, shape.num_experts)
    contenders = {each: suite.fast(layer, each) for each in candidates_for(num_tokens, shape.top_k, shape.num_experts)}
    judged = judge(layer, {repr(each): run for each, run in contenders.items()})
    right = {each: run for each, run in contenders.items() if judged[repr(each)]["within_bound"]}
    timed = quick(right, len(layer.routings))
    return [
        {
            "shape": name, "num_tokens": num_tokens, "routing": routing, "instance": repr(each), "by_rule": each == by_rule,
            **judged[repr(each)],
            **({"samples_us": [round(s, 4) for s in timed[each].samples_us]} if each in timed else {}),
        }
        for each in contenders
    ]  # fmt: skip


def summary(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Of one cell, a line each: the rule's choice and the fastest three, fastest first; then what failed, and how."""
    timed = sorted((r for r in rows if "samples_us" in r), key=lambda r: statistics.median(r["samples_us"]))
    lines = [
        f"{statistics.median(r['samples_us']):10.2f} us  {r['instance']}{'  (by the rule)' if r['by_rule'] else ''}"
        for place, r in enumerate(timed)
        if place < 3 or r["by_rule"]
    ]
    failed = [r for r in rows if "samples_us" not in r]
    return lines + [f"    not timed  {r['instance']}: {r.get('refused') or r.get('problem', '')}" for r in failed]


def record(
    out: Path, names: Sequence[str], batches: Sequence[int] = suite.BATCHES, routings: Sequence[str] = ("uniform",)
) -> Recording:
    """Every candidate at every cell, written to `out` after each of them. Raises RuntimeModeError without a GPU."""
    runtime.require_cuda("moelab.suites.fast_choice")
    rows: list[dict[str, Any]] = []
    origin, protocol = (
        runtime.provenance(seed=0),
        {"kind": "short passes", "passes": "as moelab.suites.screening.quick"},
    )
    for name in names:
        weights = weight_sets(suite.shape_of(name))
        for routing, num_tokens in itertools.product(routings, batches):
            layer = Layer(suite.shape_of(name), num_tokens, protocol_for(num_tokens).rotations, weights, routing)
            found = cell(name, layer, routing)
            print(f"{name}, {num_tokens} tokens, {routing}:", *summary(found), sep="\n", flush=True)
            rows += found
            recording = Recording("fast_choice", origin, protocol, tuple(rows))
            recordings.write(recording, out)
    return recording


def main(arguments: Sequence[str] | None = None) -> int:
    """The command: 0 if every candidate that was timed is right, 1 if not, 2 for bad use, 130 after Ctrl-C."""
    parser = argparse.ArgumentParser(
        prog="python -m moelab.suites.fast_choice", description=(__doc__ or "").split("\n\n")[0]
    )
    parser.add_argument("shapes", nargs="*", help=f"some of {', '.join(suite.SHAPES)}; default: all")
    parser.add_argument("--batch-size", nargs="+", type=int, default=list(suite.BATCHES), help="default: %(default)s")
    parser.add_argument("--routing", nargs="+", choices=suite.ROUTINGS, default=["uniform"], help="default: uniform")
    parser.add_argument("--out", type=Path, default=Path("fast_choice.json"), help="default: %(default)s")
    given = parser.parse_args(arguments)
    if unknown := [name for name in given.shapes if name not in suite.SHAPES]:
        parser.error(f"no shape is named {', '.join(unknown)}. Expected some of {', '.join(suite.SHAPES)}.")
    try:
        made = record(given.out, given.shapes or list(suite.SHAPES), given.batch_size, given.routing)
    except MoelabError as error:
        parser.error(f"{type(error).__name__}: {error}")
    except KeyboardInterrupt:
        print(f"\nstopped; the cells so far are in {given.out}, if there was one", flush=True)
        return 130
    return int(any(row["within_bound"] is False for row in made.rows))


if __name__ == "__main__":
    sys.exit(main())
