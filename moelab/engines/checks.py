"""What the engines' plugins ask before they take a layer, and what they say once they have.

A plugin never lets a layer pass to another kernel unsaid: what it was asked for and does not take raises, by name.
"""

from __future__ import annotations

import importlib.metadata
import os
from collections import Counter
from collections.abc import Callable, Mapping

from torch import Tensor

from moelab.call_checks import OUT_BYTES
from moelab.dtypes import dtype_name
from moelab.errors import ConfigError, LayoutError, RuntimeModeError
from moelab.implementations import IMPLEMENTATIONS, named, not_taken

READ: Mapping[str, str] = {"sglang": "0.5.23", "vllm": "0.33.0"}
"""Engine -> the version whose interfaces its plugin was written and tested against. They are internals, and move monthly."""

CHOICE = "MOELAB_EXPERTS"
"""Environment variable: the implementation to run, or AUTO."""

AUTO = "auto"
"""What runs is the first of `hf.PREFERRED` that takes the layer on this device: "fast", then "triton" with the tuned file."""

TRUST = "MOELAB_TRUST_ENGINE"
"""Environment variable: `engine==version`, another version that the user answers for."""

taken: Counter[str] = Counter()
"""Engine -> layers of this process that its plugin has taken."""

_said: set[tuple[str, str, str]] = set()


def require_read(engine: str) -> None:
    """Raise RuntimeModeError unless the installed engine is the version that was read, or one that the user answers for."""
    read = READ[engine]
    try:
        installed = importlib.metadata.version(engine)
    except importlib.metadata.PackageNotFoundError as error:
        raise RuntimeModeError(
            f"{engine} is not installed here. Expected {engine}=={read}, whose interfaces moelab's plugin was read against. "
            "Install moelab into the engine's environment."
        ) from error
    if installed.split("+")[0] != read and os.environ.get(TRUST) != f"{engine}=={installed}":
        raise RuntimeModeError(
            f"{engine} {installed} is installed, and moelab's plugin uses internals of {engine} that were read at {read} only. "
            f"Expected {engine}=={read}. Install it, or set {TRUST}={engine}=={installed} to try this one, and compare its "
            "answers with those without the plugin."
        )


def chosen() -> str | None:
    """What CHOICE names: an implementation, AUTO, or None where it is unset or empty. Raises UnknownNameError."""
    name = os.environ.get(CHOICE, "").strip()
    if name not in ("", AUTO):
        named(name)
    return name or None


def require_fit(engine: str, where: str, faults: Mapping[str, bool], off: str) -> None:
    """Raise ConfigError that names each fault that holds. where: the layer; off: how to run without the plugin, a clause."""
    if found := [fault for fault, holds in faults.items() if holds]:
        raise ConfigError(
            f"moelab's plugin for {engine} was asked to run the experts of {where} with {', '.join(found)}, which it does not "
            f"take. Expected plain bfloat16 or float16 experts, as docs/engines.md has it. Leave that out, or {off}."
        )


def implementation(w13: Tensor, w2: Tensor, activation: str, gated: bool) -> str:
    """The implementation that runs a layer of those weights, by CHOICE. w13 (E, 2N, H), w2 (E, H, N), both as `fused_moe` has it.

    Raises UnknownNameError for an activation or implementation that there is not, LayoutError for weights in another memory
    order, ConfigError for an implementation that does not take the layer or waits for the host in a CUDA graph.
    """
    from moelab import hf  # torch's compiler comes with it: not in every process of an engine
    from moelab.reference import check_activation

    check_activation(activation, gated)
    for which, weights in (("w13", w13), ("w2", w2)):
        if not weights.is_contiguous():
            raise LayoutError(
                f"{which} has shape {tuple(weights.shape)} with strides {weights.stride()}. Expected contiguous weights. Switch "
                "off what pads or reorders the engine's weights."
            )
    name = chosen() or AUTO
    if name == AUTO:
        return hf.preferred(w2, activation, gated, biases=False)
    one, kind = named(name), hf.kind_of(w2, activation, gated, biases=False)
    why = not_taken(one, kind)
    if why is None and one.no_graph and w2.device.type != "cpu":
        why = "a CUDA graph"
    if why:
        others = [it for it, one in IMPLEMENTATIONS.items() if not_taken(one, kind) is None and not one.no_graph]
        raise ConfigError(
            f"{CHOICE}={name} was asked for {why}, which it does not take. Expected {AUTO}, or one of {', '.join(others)} that "
            "runs on this device. Set the variable to one of them."
        )
    return name


def expected_rows(topk_ids: Tensor, num_experts: int | None) -> float | None:
    """Rows that an expert gets if tokens choose evenly among the model's num_experts, of whom other ranks have some; None where
    their number is not known, or there is no token. topk_ids (M, k)."""
    if num_experts is None or num_experts < 1 or not topk_ids.numel():
        return None
    return min(topk_ids.numel() / num_experts, float(topk_ids.shape[0]))


def say(engine: str, log: Callable[[str], object], where: str, impl: str, w2: Tensor, activation: str) -> None:
    """Log that it runs a layer, once for each kind of layer in this process. where: the layer's name; w2 (E, H, N)."""
    experts, hidden, inner = w2.shape
    sizes = f"{experts} experts, hidden {hidden}, intermediate {inner}, {dtype_name(w2.dtype)}, {activation}"
    if (engine, impl, sizes) in _said:
        return
    _said.add((engine, impl, sizes))
    log(
        f"moelab: {impl!r} runs the experts of {where}, and of all layers like it ({sizes}). Layers taken: {taken[engine]}."
    )


def takes_result(output: Tensor, hidden_states: Tensor) -> bool:
    """Whether the last kernel may write to an engine's buffer: of the input's dtype, whole rows, aligned, and not the input
    itself, as where an engine works in place."""
    apart = output.untyped_storage().data_ptr() != hidden_states.untyped_storage().data_ptr()
    aligned = output.is_contiguous() and output.data_ptr() % OUT_BYTES == 0
    return output.dtype == hidden_states.dtype and aligned and apart
