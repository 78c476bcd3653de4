"""moelab: a research workbench for fused Mixture-of-Experts kernels.

Importing this package loads neither torch nor triton nor plotly: names resolve when they are first used,
and the choice between GPU and Triton's interpreter is made at the first kernel import
(see `moelab.runtime.prepare_triton`). The op itself is `from moelab.fused_moe import fused_moe`: a module and its
function cannot both be `moelab.fused_moe`.
"""

from __future__ import annotations

import importlib
from typing import Any

__version__ = "0.1.0"

_HOMES = {
    "MoEShape": "shapes",
    "preset": "shapes",
    "preset_names": "shapes",
    "load_model": "shapes",
    "KernelConfig": "config",
    "default_config": "config",
    "make_routing": "routing",
    "make_inputs": "inputs",
    "FusedMoE": "module",
    "IMPLEMENTATIONS": "implementations",
    "route": "kernels.route",
    "expert_order": "kernels.expert_order",
    "sum_reduce": "kernels.sum_reduce",
    "SUM_REDUCE": "kernels.sum_reduce",
    "MoelabError": "errors",
}

_MODULES = frozenset(
    """errors runtime architectures model_config shapes config weights call implementations routing inputs reference
    torch_layers kernels pipelines fused_moe module precision measure roofline recordings config_files suites tuner plots
    widgets cli""".split()  # noqa: SIM905
)

__all__ = sorted([*_HOMES, "__version__"])


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        value = getattr(importlib.import_module(f"{__name__}.{_HOMES[name]}"), name)
        globals()[name] = value
        return value
    if name in _MODULES:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module 'moelab' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *_HOMES, *_MODULES})
