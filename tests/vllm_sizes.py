"""The layer sizes of vLLM's own fused MoE tests through every implementation that takes them, on a GPU, against float64.

    python tests/vllm_sizes.py [--processes 9] [--dtype bfloat16]

Sizes: vLLM 0.33.0, tests/kernels/moe/test_moe.py: m 1, 33, 64, 222; n 128, 1024, 2048; k 128, 511, 1024; e 8, 64, 192; top-k 2
and 6; one rank and the first of four, where other ranks' ids are -1 and carry weights that are no numbers. Each call is as a user
makes it: no configs. Prints a line per implementation and ends with 1 if any result is wrong, or one that takes such layers is
never right; "refused" counts calls that an implementation says it does not take. A group of sizes is a process, since compiling
takes most of the time.
"""

from __future__ import annotations

import argparse
import concurrent.futures
import itertools
import json
import multiprocessing
import sys
from collections import Counter

M, N, K, E, TOP_K, EP = (1, 33, 64, 222), (128, 1024, 2048), (128, 511, 1024), (8, 64, 192), (2, 6), (1, 4)


def group(n: int, k: int, dtype_name: str) -> tuple[dict[str, Counter[str]], list[str]]:
    """Every case of one inner and hidden size: implementation -> counts of "right", "wrong", "refused"; and what was wrong."""
    import torch

    from moelab import precision
    from moelab.errors import MoelabError, PrecisionError
    from moelab.fused_moe import fused_moe
    from moelab.implementations import IMPLEMENTATIONS
    from moelab.inputs import make_inputs
    from moelab.reference import fused_moe_ref
    from moelab.shapes import MoEShape

    counts: dict[str, Counter[str]] = {name: Counter() for name in IMPLEMENTATIONS}
    wrong: list[str] = []
    for e, top_k, ep in itertools.product(E, TOP_K, EP):
        shape = MoEShape.from_sizes(
            num_experts=e, top_k=top_k, hidden_size=k, moe_intermediate_size=n, dtype=dtype_name, tp_size=ep, ep_size=ep
        )
        for m in M:
            i = make_inputs(shape, m, device="cuda", seed=m)
            bad = torch.tensor([float("nan"), float("inf")], device="cuda").repeat(top_k // 2)
            routing = (torch.where(i.topk_ids < 0, bad, i.topk_weights), i.topk_ids)
            plain = fused_moe_ref(i.hidden_states, i.w13, i.w2, *routing)
            exact = fused_moe_ref(i.hidden_states.double(), i.w13.double(), i.w2.double(), *routing)
            for name, one in IMPLEMENTATIONS.items():
                case = f"{name}: m {m}, n {n}, k {k}, e {e}, top-k {top_k}, ep {ep}"
                roundings = 1 + (top_k if one.rounds_every_sum else 0)
                tiny = roundings * float(precision.ulp(exact.abs().max(), plain.dtype))
                try:
                    out = fused_moe(i.hidden_states, i.weights, topk_weights=routing[0], topk_ids=routing[1], impl=name)
                    precision.check(out, plain, exact, name=case, tiny=tiny)
                    counts[name]["right"] += 1
                except PrecisionError as error:
                    counts[name]["wrong"] += 1
                    wrong.append(str(error))
                except MoelabError as error:
                    counts[name]["refused"] += 1
                    counts[name][f"refused: {type(error).__name__}"] += 1
    return counts, wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--processes", type=int, default=9)
    parser.add_argument("--dtype", default="bfloat16")
    asked = parser.parse_args()
    total: dict[str, Counter[str]] = {}
    wrong: list[str] = []
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(asked.processes, mp_context=spawn) as pool:
        for counts, bad in pool.map(group, *zip(*itertools.product(N, K), strict=True), itertools.repeat(asked.dtype)):
            wrong += bad
            for name, found in counts.items():
                total.setdefault(name, Counter()).update(found)
    for name, found in total.items():
        print(f"{name:20} {json.dumps(dict(sorted(found.items())))}")
    print(*wrong[:20], sep="\n")
    judged = sum(found["right"] + found["wrong"] for found in total.values())
    print(f"{len(wrong)} wrong of {judged}")
    from moelab.implementations import LayerKind, taking
    from moelab.kernels.checks import current_target

    due = taking(LayerKind(asked.dtype, hidden_size=min(K), moe_intermediate_size=min(N)), current_target())
    silent = [name for name in due if not total[name]["right"]]
    if silent:
        print(f"nothing right of {', '.join(silent)}: every case was refused")
    return bool(wrong or silent)


if __name__ == "__main__":
    sys.exit(main())
