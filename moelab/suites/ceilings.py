"""What this GPU reaches: copy and read bandwidth, and a large product, measured by the same protocol as kernels."""

from __future__ import annotations

import torch

from moelab import runtime
from moelab.inputs import random_tensor
from moelab.measure import Protocol, measure
from moelab.recordings import Recording

_GIB = 1 << 30


def record() -> Recording:
    """Copy 2 GiB (read + write counted, a negation), read 4 GiB (a sum), and multiply 8192^3 in bfloat16 on random data."""
    runtime.require_cuda("the suite 'ceilings'")
    protocol = Protocol(rotations=1, rounds=40, graph_us=10_000.0)
    source = random_tensor((_GIB,), 1.0, dtype=torch.bfloat16, device="cuda", seed=0)
    target = torch.empty_like(source)
    wide = random_tensor((2 * _GIB // 4096, 4096), 1.0, dtype=torch.bfloat16, device="cuda", seed=1)
    a, b = (random_tensor((8192, 8192), 1.0, dtype=torch.bfloat16, device="cuda", seed=seed) for seed in (2, 3))
    contenders = {
        # A kernel that copies: in a graph, copy_ becomes a memcpy node, which is far from the ceiling.
        "copy": lambda _: torch.neg(source, out=target),
        "read": lambda _: torch.sum(wide, dim=1),
        "product": lambda _: torch.mm(a, b),
    }
    work = {"copy": 2 * source.nbytes, "read": wide.nbytes, "product": 2 * 8192**3}
    rows = []
    for name, result in measure(contenders, protocol).items():
        unit = "FLOP" if name == "product" else "bytes"
        rows.append(
            {
                "what": name,
                unit: work[name],
                "per_second": work[name] / (result.median_us * 1e-6),
                "samples_us": list(result.samples_us),
            }
        )
    return Recording("ceilings", runtime.provenance(seed=0), protocol.describe(), tuple(rows))
