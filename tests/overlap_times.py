"""What programmatic dependent launch (PDL) takes off a layer in Triton, on an NVIDIA GPU since Hopper: both ways, interleaved.

    python tests/overlap_times.py [--models qwen3-30b-a3b/1 deepseek-v3-fp8/8 ...] [--impls triton gated_tma] [--batches 1 4 ...]

Whole layers under the configs that their users get, alignment and codes of activations included, in a CUDA graph over rotated
weights and routings. Prints microseconds of both and their ratio; results are held against each other bit by bit.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from itertools import product

import torch

from moelab.fused_moe import available_implementations
from moelab.kernels import launch, slot_order
from moelab.measure import measure
from moelab.shapes import load_model
from moelab.suites.bench import taking_of
from moelab.suites.layer_classic import Layer, protocol_for, weight_sets

WAYS = {"serial": False, "PDL": True}


def by(layer: Callable[[int], torch.Tensor], overlap: bool) -> Callable[[int], torch.Tensor]:
    def run(i: int) -> torch.Tensor:
        launch.OVERLAP = slot_order.OVERLAP = overlap
        try:
            return layer(i)
        finally:
            launch.OVERLAP = slot_order.OVERLAP = True

    return run


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    models = ["qwen3-30b-a3b/1", "deepseek-v3/8", "deepseek-v3-fp8/8", "kimi-k2-thinking/8"]
    parser.add_argument("--models", nargs="+", default=models, help="preset/tp_size")
    parser.add_argument("--impls", nargs="+", default=["triton", "gated_tma"], choices=available_implementations())
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 4, 16, 64, 256, 2048])
    asked = parser.parse_args()
    for model in asked.models:
        preset, tp_size = model.split("/")
        shape = load_model(preset, tp_size=int(tp_size), disable_shared_experts_fusion=True)
        weights = weight_sets(shape)
        for num_tokens, impl in product(asked.batches, [impl for impl in asked.impls if impl in taking_of(shape)]):
            layer = Layer(shape, num_tokens, protocol_for(num_tokens).rotations, weights)
            ways = {name: by(layer.whole(None, impl=impl), overlap) for name, overlap in WAYS.items()}
            equal = torch.equal(*(run(0) for run in ways.values()))
            found = {name: one.median_us for name, one in measure(ways, protocol_for(num_tokens)).items()}
            ratio = found["PDL"] / found["serial"]
            print(f"{model:22} {impl:10} {num_tokens:5} {found['serial']:9.2f} {found['PDL']:9.2f} us {ratio:.3f}"
                  f"{'' if equal else '  DIFFERENT RESULTS'}", flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
