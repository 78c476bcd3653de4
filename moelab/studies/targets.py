"""The layers that are tuned for the config files in configs/: which models, in which format, at which tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from moelab.errors import UnknownNameError, nearest_names
from moelab.shapes import MoEShape, load_model
from moelab.tuner.landscape import layer_name


@dataclass(frozen=True)
class Target:
    """One layer to tune.

    model: a preset, whose weights' format is the layer's: "deepseek-v3" is plain, "deepseek-v3-fp8" as it is published.
    fused: with the shared experts that sglang runs among the routed ones; those files say one expert more.
    keep: its landscape belongs into the repository. grid: its whole grid is recorded as well.
    """

    model: str
    tp_size: int
    keep: bool = False
    grid: bool = False
    fused: bool = False

    @property
    def name(self) -> str:
        """As in recordings: "qwen3-30b-a3b/tp1", "deepseek-v3-fp8/tp8/fused"."""
        return f"{self.model}/tp{self.tp_size}" + "/fused" * self.fused

    @property
    def stem(self) -> str:
        """The name as a part of a file's."""
        return self.name.replace("/", "-")

    def shape(self) -> MoEShape:
        """Sizes per rank and format: routed experts alone, as the peers' files in bf16 are tuned, or with those fused."""
        return load_model(self.model, tp_size=self.tp_size, disable_shared_experts_fusion=not self.fused)

    def landscape(self, device: str, seed: int = 0) -> str:
        """What the landscape of its tuning on a device is called."""
        return layer_name(self.shape(), device) + (f"-seed{seed}" if seed else "")


TARGETS: tuple[Target, ...] = (
    Target("qwen3-30b-a3b", 1, keep=True, grid=True),
    Target("llama-4-scout", 4, keep=True, grid=True),
    Target("deepseek-v3", 8),
    Target("lfm2-8b-a1b", 1),
    Target("mixtral-8x7b", 2),
    Target("qwen3-30b-a3b", 2),
    Target("qwen3-30b-a3b", 4),
    Target("lfm2-24b-a2b", 1),
    Target("deepseek-v3-fp8", 8, keep=True, fused=True),
    Target("deepseek-v3-fp8", 8),
    Target("qwen3-30b-a3b-fp8", 1),
    Target("qwen3-235b-a22b-fp8", 4),
    Target("glm-4.5-air-fp8", 2),
    Target("llama-4-maverick-fp8", 8),
    Target("kimi-k2-thinking", 8),
    Target("glm-4.5-air-fp8", 2, fused=True),
)
"""By value, plain layers and then quantised ones: what is recorded elsewhere in data/ first, then layers that have no file of
their own yet. Two are what sglang asks for by default: it fuses the shared expert of DeepSeek-V3 and of GLM-4.5-Air."""


def target_of(name: str) -> Target:
    """The target of that name ("qwen3-30b-a3b/tp1"). Raises UnknownNameError."""
    known = {target.name: target for target in TARGETS}
    if name not in known:
        raise UnknownNameError(
            f"Unknown target {name!r}.{nearest_names(name, known)} Expected some of {', '.join(known)}. Name those, or "
            "add it to moelab/studies/targets.py."
        )
    return known[name]
