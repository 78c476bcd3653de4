"""The classic layer over quantised weights on an H200: right by stages, its time over the floor, and its error.

    python tests/quantised_layers.py [--models qwen3-30b-a3b ...] [--formats fp8_w8a8_block_128x128 ...] [--batches 1 16 64 1024]

For each model, format and batch: microseconds of the whole layer (alignment and codes of the activations included) in a CUDA
graph over rotated weights and routings, under sglang's default rule and under the best of a few tiles; over the floor max(bytes /
4.3 TB/s, FLOP / rate), rate 1300 TFLOP/s in fp8 and 790 otherwise; and the largest error over its bound, which is twice torch's
over the same codes and scales, and a rounding.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from dataclasses import replace
from itertools import product
from pathlib import Path

TILES = {
    False: (
        (16, 64, 128, 1, 4, 4), (16, 128, 128, 1, 4, 4), (16, 64, 128, 1, 4, 6), (16, 128, 64, 1, 4, 5),
        (16, 32, 128, 1, 4, 4), (16, 32, 256, 1, 4, 3), (16, 64, 256, 1, 4, 3),
    ),
    True: (
        (64, 128, 128, 16, 4, 3), (64, 64, 128, 16, 4, 4), (128, 128, 128, 16, 8, 3), (64, 128, 128, 16, 8, 3),
        (128, 64, 128, 16, 4, 3),
    ),
}  # fmt: skip
"""By whether an expert gets more than 24 rows."""


FORMATS = ("plain", "fp8_w8a8_block_128x128", "int4_w4a16_group_128", "mxfp4_w4a16")


def cell(shape, batch: int, weights) -> dict:
    from triton.runtime.errors import OutOfResources

    from moelab import precision, roofline
    from moelab.config import KernelConfig
    from moelab.errors import MoelabError
    from moelab.measure import measure
    from moelab.suites.layer_classic import Layer, protocol_for

    protocol = replace(protocol_for(batch), rounds=9)
    layer = Layer(shape, batch, protocol.rotations, weights)
    limit = shape.format.sizes[-1] if shape.format.granularity == "block" else 256
    rows = batch * shape.top_k / shape.num_experts
    configs = {"default": "default"} | {
        "/".join(map(str, tile)): KernelConfig(*tile[:2], min(limit, tile[2]), *tile[3:]) for tile in TILES[rows > 24]
    }
    contenders, refused = {}, {}
    for name, config in configs.items():
        run = layer.whole(config)
        try:
            run(0)
            contenders[name] = run
        except (MoelabError, OutOfResources) as error:  # a tile that this format or chip does not take
            if name == "default":
                raise
            refused[name] = f"{type(error).__name__}: {str(error)[:90]}"
    found = {name: one.median_us for name, one in measure(contenders, protocol).items()}
    best = min(found, key=lambda name: found[name])
    cost = roofline.layer_cost(shape, batch, experts_touched=layer.experts_touched())
    eight = shape.format.weight_dtype == "float8_e4m3fn" or shape.format.family.startswith("int8_w8a8")
    floor = max(cost.bytes / 4.3e6, cost.flops / (1300e6 if eight else 790e6))
    tokens, plain, exact = layer.references(0)
    bound = precision.tolerance(plain, exact)
    error = max(precision.error(run(0)[tokens], exact).max_abs for run in contenders.values()) / bound
    return {
        "us": found, "best": best, "default_over_floor": found["default"] / floor, "over_floor": found[best] / floor,
        "floor_us": floor, "error_over_bound": error, "refused": refused,
    }  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=["qwen3-30b-a3b/1"], help="preset/tp_size")
    parser.add_argument("--formats", nargs="+", default=list(FORMATS))
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 1024])
    asked = parser.parse_args()
    import torch

    from moelab.shapes import load_model
    from moelab.suites.layer_classic import weight_sets

    rows = []
    for (model, tp), name in product((each.split("/") for each in asked.models), asked.formats):
        shape = replace(load_model(model, tp_size=int(tp), dtype="bfloat16"), format=name)
        weights = weight_sets(shape)
        for batch in asked.batches:
            row = {
                "model": model,
                "tp_size": int(tp),
                "format": name,
                "num_tokens": batch,
                **cell(shape, batch, weights),
            }
            rows.append(row)
            print(
                f"{model:18} tp{tp} {name:24} {batch:5}  {row['us'][row['best']]:9.1f} us  {row['over_floor']:.2f} of the floor "
                f"(default {row['default_over_floor']:.2f})  error {row['error_over_bound']:.2f} of its bound  "
                f"{row['best']}{' refused ' + str(len(row['refused'])) if row['refused'] else ''}",
                flush=True,
            )
        del weights
        torch.cuda.empty_cache()
    if "OUT" in os.environ:
        (Path(os.environ["OUT"]) / "quantised_layers.json").write_text(json.dumps(rows))
    wrong = [row for row in rows if not row["error_over_bound"] <= 1.0]
    print(f"{len(wrong)} of {len(rows)} over their bound")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
