"""Two checkouts of moelab beside each other on one GPU: the same layers, timed in turn by a process of each.

    python tests/beside.py OLD [--rounds 8] [--shapes qwen3-30b-a3b/tp1 deepseek-v3/tp8] [--batches 1 64 1024]

OLD: the root of the other checkout. Each process holds its own tensors, of the same seeds, and times a cell when it is told
to, in a CUDA graph over rotated weights and routings (`moelab.measure`); they take turns, so that a clock drifts for both.
Prints for each cell the ratio of medians, new over old, and the geometric mean by implementation. For a change that is to change
no time: 0.995 to 1.005 is what two runs of one commit differ by.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
IMPLS = ("triton", "gated_tma", "fast")


def serve(shapes: list[str], batches: list[int]) -> None:
    """In a checkout's own process: a line "shape batch impl" in, the samples of one short measurement out."""
    from moelab.config import default_config
    from moelab.measure import measure
    from moelab.suites.layer_classic import Layer, protocol_for, shape_of, weight_sets

    made: dict[tuple[str, int], Layer] = {}
    weights = {name: weight_sets(shape_of(name)) for name in shapes}
    for line in sys.stdin:
        name, batch, impl = line.split()
        key, shape = (name, int(batch)), shape_of(name)
        if key not in made:
            made[key] = Layer(shape, key[1], protocol_for(key[1]).rotations, weights[name])
        config = None if impl == "fast" else default_config(key[1], shape.num_experts)
        from dataclasses import replace

        protocol = replace(protocol_for(key[1]), rounds=7)
        found = measure({impl: made[key].whole(config, impl=impl)}, protocol)
        print(json.dumps(list(found[impl].samples_us)), flush=True)


def start(root: Path, asked: argparse.Namespace) -> subprocess.Popen[str]:
    command = [sys.executable, str(Path(__file__).resolve()), "--serve", "--shapes", *asked.shapes]
    environment = {**os.environ, "PYTHONPATH": str(root)}
    return subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, cwd=root, env=environment
    )


def ask(process: subprocess.Popen[str], cell: tuple[str, int, str]) -> list[float]:
    assert process.stdin and process.stdout
    print(*cell, file=process.stdin, flush=True)
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"a process ended at {cell}: its message is above")
    return json.loads(line)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("old", nargs="?", type=Path)
    parser.add_argument("--serve", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--shapes", nargs="+", default=["qwen3-30b-a3b/tp1", "deepseek-v3/tp8"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 16, 64, 256, 1024, 8192])
    asked = parser.parse_args()
    if asked.serve:
        serve(asked.shapes, asked.batches)
        return
    processes = {"old": start(asked.old.resolve(), asked), "new": start(ROOT, asked)}
    ratios: dict[str, list[float]] = {impl: [] for impl in IMPLS}
    for name in asked.shapes:
        for batch in asked.batches:
            for impl in IMPLS:
                samples: dict[str, list[float]] = {"old": [], "new": []}
                for turn in range(asked.rounds):
                    for who in ("old", "new") if turn % 2 else ("new", "old"):
                        samples[who] += ask(processes[who], (name, batch, impl))
                old, new = (statistics.median(samples[who]) for who in ("old", "new"))
                ratios[impl].append(new / old)
                print(f"{name:20} {batch:5} {impl:10} {old:10.2f} {new:10.2f} us  {new / old:.4f}", flush=True)
    for impl, found in ratios.items():
        print(f"{impl}: geometric mean {math.exp(statistics.fmean(map(math.log, found))):.4f}, worst {max(found):.4f}")


if __name__ == "__main__":
    main()
