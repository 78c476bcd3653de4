"""The fused MoE layer made of this house's kernels, by name.

Kernels are imported when a pipeline first runs, so that the public op loads without triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from torch import Tensor

from moelab.pipelines.call import MoECall


@functools.cache
def _layer(name: str) -> Callable[..., Tensor]:
    from moelab.pipelines import layers

    found: Callable[..., Tensor] = getattr(layers, name)
    return found


def _late(name: str, **options: Any) -> Callable[[MoECall], Tensor]:
    def run(call: MoECall) -> Tensor:
        return _layer(name)(call, **options)

    return run


PIPELINES: dict[str, Callable[[MoECall], Tensor]] = {
    "triton": _late("triton_pipeline"),
    "split_k_atomic": _late("split_k_atomic_pipeline"),
    "split_k_workspace": _late("split_k_workspace_pipeline"),
    "tma": _late("tma_pipeline"),
    "gated": _late("sorted_pipeline", combine="scatter", tma=False),
    "gated_atomic": _late("sorted_pipeline", combine="atomic_f32", tma=False),
    "gated_atomic_out": _late("sorted_pipeline", combine="atomic_out", tma=False),
    "gated_tma": _late("sorted_pipeline", combine="scatter", tma=True),
    "gated_tma_atomic": _late("sorted_pipeline", combine="atomic_f32", tma=True),
}
"""Name of each -> the layer by it. Made of Triton kernels, which the interpreter does not run in bfloat16."""

NEED_TMA = frozenset(("tma", "gated_tma", "gated_tma_atomic"))
"""Those for sm_90 and later, and for inner sizes whose rows are a multiple of 16 bytes."""

ROUND_EVERY_SUM = frozenset(("gated_atomic_out",))
"""Those that round to the layer's dtype after every addition, where torch does once: they may be past twice torch's error,
and then win nothing."""
