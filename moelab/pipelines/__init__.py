"""The fused MoE layer made of this house's kernels, by name.

Kernels are imported when a pipeline first runs, so that the public op loads without triton.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

from torch import Tensor

from moelab.pipelines.call import MoECall


@functools.cache
def _layer(name: str) -> Callable[[MoECall], Tensor]:
    from moelab.pipelines import layers

    found: Callable[[MoECall], Tensor] = getattr(layers, name)
    return found


def _late(name: str) -> Callable[[MoECall], Tensor]:
    def run(call: MoECall) -> Tensor:
        return _layer(name)(call)

    return run


PIPELINES: dict[str, Callable[[MoECall], Tensor]] = {
    "triton": _late("triton_pipeline"),
    "split_k_atomic": _late("split_k_atomic_pipeline"),
    "split_k_workspace": _late("split_k_workspace_pipeline"),
}
"""Name of each -> the layer by it. Made of Triton kernels, which the interpreter does not run in bfloat16."""
