"""The weight-only layer on an H200: right, and which cut of its two launches is fastest, by format, shape and batch.

    python tests/weight_only_forms.py [--models qwen3-30b-a3b/1 ...] [--formats ...] [--batches 1 4 16 64] [--longest SECONDS]

For each cell: GEMM1 and GEMM2 alone under each cut, three replays each, over rotated weights and routings; then the layer under
the best of them, as it is served, and the classic one under its default and the best of a few tiles. Times over the floor,
bytes/4.3 TB/s; errors over their bound, which is twice torch's over the dequantised weights, and a rounding. The thresholds of
moelab/pipelines/weight_only.py come from here.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

import torch

from moelab import roofline
from moelab.kernels import weight_only as room
from moelab.kernels.align import align
from moelab.kernels.weight_only import Cut, WeightOnly
from moelab.measure import measure
from moelab.pipelines.weight_only import weight_only_pipeline
from moelab.routing import Alignment
from moelab.shapes import load_model
from moelab.suites.bench import judge
from moelab.suites.layer_classic import Layer, protocol_for, weight_sets
from moelab.suites.quantised import candidates
from moelab.suites.screening import quick, usable

FORMATS = ("int4_w4a16_group_128", "mxfp4_w4a16", "int8_w8a16_channel")
FEW = ((4, 4, 1), (8, 8, 1), (4, 2, 1), (8, 4, 1))
SORTED = ((4, 1, 1), (4, 1, 2), (4, 1, 4), (4, 2, 1), (4, 4, 1))
"""Warps, how many of them divide K, turns."""


@dataclass(frozen=True)
class Cell:
    """A layer under forms of one kind, with what their launches write and read between them."""

    layer: Layer
    base: WeightOnly

    def aligned(self) -> list[Alignment | None]:
        return [
            align(r.topk_ids, self.base.columns, self.layer.shape.num_experts) if self.base.sorted else None
            for r in self.layer.routings
        ]

    def cuts(self) -> list[Cut]:
        stages = (2, 4) if self.base.columns == 8 else (2,)
        return [Cut(s, *one) for s in stages for one in (SORTED if self.base.sorted else FEW)]

    def timed(self, gemm: int) -> dict[Cut, float]:
        """Microseconds of one launch under each cut. gemm: 0 or 1."""
        layer, aligned = self.layer, self.aligned()
        shape, x = layer.shape, layer.states
        inner = x[0].new_empty((layer.num_tokens * shape.top_k, shape.moe_intermediate_size)).normal_()
        out = x[0].new_empty((inner.shape[0] if self.base.sorted else layer.num_tokens, shape.hidden_size))

        def launch(form: WeightOnly) -> Any:
            def run(i: int) -> None:
                r, w = layer.routings[i], layer.weights[i].weights
                both = room.launches(
                    x[i], w, r.topk_weights, r.topk_ids, inner, out, form, aligned[i], activation=shape.activation
                )
                room.start(x[i], both[gemm], True)

            return run

        forms = {cut: replace(self.base, **{("up", "down")[gemm]: cut}) for cut in self.cuts()}
        ran, lost = usable({cut: launch(form) for cut, form in forms.items()})
        for cut, why in lost.items():
            print(f"{cut}: {why}")
        return {cut: one.median_us for cut, one in quick(ran, len(x)).items()}


def run_of(layer: Layer, form: WeightOnly) -> Any:
    """The layer under that form."""
    from moelab.call import MoECall

    def run(i: int) -> torch.Tensor:
        r = layer.routings[i]
        call = MoECall(layer.states[i], layer.weights[i].weights, r.topk_weights, r.topk_ids, layer.shape.activation)
        return weight_only_pipeline(call, form)

    return run


def kinds(batch: int) -> list[tuple[bool, int]]:
    """Sorted or not, and columns, of the forms that are tried."""
    few, eight, sixteen = (False, 8), (True, 8), (True, 16)
    return [few] if batch == 1 else [few, eight] if batch <= 16 else [eight] if batch <= 64 else [eight, sixteen]


def cell(layer: Layer) -> dict[str, Any]:
    shape, batch = layer.shape, layer.num_tokens
    cost = roofline.layer_cost(shape, batch, experts_touched=layer.experts_touched())
    row: dict[str, Any] = {"floor_us": cost.bytes / 4.3e6, "cuts": {}}
    contenders: dict[str, Any] = {"served": layer.whole(None, impl="weight_only"), "classic": layer.whole("default")}
    ours = ["served"]
    for sorted_, columns in kinds(batch):
        name = f"{'sorted' if sorted_ else 'few'}{columns}"
        of = Cell(layer, WeightOnly(Cut(2, 4, 4), Cut(2, 4, 4), sorted_, columns))
        times = [of.timed(gemm) for gemm in (0, 1)]
        best = [min(each, key=lambda cut: each[cut]) for each in times]
        row["cuts"][name] = [{repr(cut): round(us, 2) for cut, us in each.items()} for each in times]
        row[f"{name} best"] = [f"{cut.stages}/{cut.warps}/{cut.split}/{cut.turns}" for cut in best]
        contenders[name] = run_of(layer, replace(of.base, up=best[0], down=best[1]))
        ours.append(name)
    tiles, _ = usable({tile: layer.whole(tile) for tile in candidates(shape, batch)})
    screened = quick(tiles, len(layer.states))
    contenders["tiles"] = tiles[min(screened, key=lambda tile: screened[tile].median_us)]
    judged = judge(layer, contenders, ours)
    row["error"] = {name: one["max_abs_error"] / one["bound"] for name, one in judged.items()}
    row["equal"] = all(torch.equal(contenders[name](0), contenders[name](0)) for name in ours)
    protocol = replace(protocol_for(batch), rounds=9)
    return row | {"us": {name: one.median_us for name, one in measure(contenders, protocol).items()}}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["qwen3-30b-a3b/1"], help="preset/tp_size")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64])
    parser.add_argument("--longest", type=float, default=1e9, help="seconds after which no cell begins")
    asked = parser.parse_args()
    rows, begun = [], time.monotonic()
    for (model, tp), name in product((each.split("/") for each in asked.models), asked.formats):
        plain = load_model(model, tp_size=int(tp), dtype="bfloat16", disable_shared_experts_fusion=True)
        shape = replace(plain, format=name)
        weights = weight_sets(shape)
        for batch in asked.batches:
            if time.monotonic() - begun > asked.longest:
                break
            layer = Layer(shape, batch, protocol_for(batch).rotations, weights)
            row = {"model": model, "tp_size": int(tp), "format": name, "num_tokens": batch, **cell(layer)}
            rows.append(row)
            over = {k: f"{us / row['floor_us']:.2f}" for k, us in row["us"].items()}
            worst = max(row["error"].values())
            best = {k: " ".join(v) for k, v in row.items() if k.endswith("best")}
            print(
                f"{model[:14]:14} {name[:14]:14} {batch:4} {over} error {worst:.2f} {row['equal']} {best}", flush=True
            )
            if "OUT" in os.environ:
                (Path(os.environ["OUT"]) / "weight_only.json").write_text(json.dumps(rows))
        del weights, layer
        torch.cuda.empty_cache()
    wrong = [row for row in rows if not (row["equal"] and max(row["error"].values()) <= 1.0)]
    print(f"{len(wrong)} of {len(rows)} over their bound or not the same again")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
