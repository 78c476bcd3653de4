"""Where the one-launch layer goes wrong on a GPU: each part alone, each in a process that a hang may not outlive.

`python tests/bring_up.py` prints for every instance, part and size the largest error against float64, and the first rows and
columns that are off. The emulated chip (emulated_gpu.py) is the place for what is wrong in the algorithm; this is for
what only the hardware shows. A wait that the kernel gives up is said at the end of its instance's lines.
"""

from __future__ import annotations

import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from moelab.kernels.fast_instances import Instance

DEADLINE_S = 120
SIZES = ((1, 8, 2, 128, 64), (20, 6, 2, 256, 128), (300, 5, 2, 264, 200), (2000, 8, 2, 512, 384))


def forms() -> list[Instance]:
    """The instances in use, and the candidates whose CTAs share weights."""
    from moelab.suites.fast_choice import ALL, CANDIDATES

    return list(dict.fromkeys([*ALL, *(each for each in CANDIDATES if each.cluster > 1 or each.permutes)]))


def part(number: int, parts: int, sizes: tuple[int, ...]) -> str:
    """One launch of the parts asked for, after those before them by torch."""
    import torch

    from moelab.inputs import make_inputs
    from moelab.kernels import fast_layer as module
    from moelab.kernels.expert_order import expert_order
    from moelab.pipelines.fast import tiles_for
    from moelab.shapes import MoEShape

    num_tokens, experts, top_k, hidden, size = sizes
    shape = MoEShape.from_sizes(num_experts=experts, top_k=top_k, hidden_size=hidden, moe_intermediate_size=size)
    i = make_inputs(shape, num_tokens, dtype=torch.bfloat16, device="cuda", seed=3)
    ids = i.topk_ids.int()
    instance = forms()[number]
    tiles = tiles_for(expert_order(ids, experts), instance)
    slots = tiles.sorted_slots.long()
    expert = ids.flatten()[slots].long()
    rows = i.hidden_states.double()[slots // top_k]
    h = torch.stack([i.w13[e].double() @ row for e, row in zip(expert.tolist(), rows, strict=True)])
    inner = (torch.nn.functional.silu(h[:, :size]) * h[:, size:]).bfloat16()
    y = torch.stack([i.w2[e].double() @ row for e, row in zip(expert.tolist(), inner.double(), strict=True)])
    y = torch.empty_like(y).index_copy(0, slots, y * i.topk_weights.flatten()[slots].double()[:, None])
    nan = float("nan")
    scratch = (
        torch.full_like(inner, nan) if parts & module.GEMM1 else inner,
        y.bfloat16() if parts == module.SUM else torch.full_like(y, nan, dtype=torch.bfloat16),
    )
    out = module.fast_layer(
        i.hidden_states,
        i.w13,
        i.w2,
        i.topk_weights,
        ids,
        tiles,
        instance,
        parts=parts,
        scratch=scratch,
    )
    torch.cuda.synchronize()
    found, expected = {
        1: (scratch[0], inner.double()), 2: (scratch[1], y),
    }.get(parts, (out, y.view(num_tokens, top_k, -1).sum(1)))  # fmt: skip
    error = (found.double() - expected).abs().nan_to_num(nan=float("inf"))
    bad = error > 0.03
    where = f" rows {bad.any(1).nonzero().flatten().tolist()[:8]} columns {bad.any(0).nonzero().flatten().tolist()[:8]}"
    counters = " counters left" if tiles.ready.any() else ""
    return f"{float(error.max()):.4f}{where if bad.any() else ''}{counters}"


def started(number: int) -> subprocess.Popen[str]:
    """A process for one instance."""
    command = [sys.executable, "-u", __file__, str(number)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def main() -> int:
    """Every form, in processes side by side; 1 if anything is off."""
    running = {each: started(number) for number, each in enumerate(forms())}
    end, failed = time.monotonic() + DEADLINE_S, False
    for instance, process in running.items():
        try:
            said, _ = process.communicate(timeout=max(end - time.monotonic(), 1))
        except subprocess.TimeoutExpired:
            process.kill()
            said = process.communicate()[0] + "HANGS\n"
        failed |= process.returncode != 0
        print("".join(f"{instance.shape} {line}\n" for line in said.splitlines()[-24:]), end="", flush=True)
    return int(failed)


def child(number: int) -> int:
    """All parts and sizes of one instance."""
    wrong = False
    for parts in (1, 2, 4, 7):
        for sizes in SIZES:
            print(f"parts {parts} {sizes}: ", end="")
            said = part(number, parts, sizes)
            print(said)
            wrong |= len(said) > 6
    return int(wrong)


if __name__ == "__main__":
    sys.exit(child(int(sys.argv[1])) if len(sys.argv) > 1 else main())
