"""The layers that are tuned for the config files in configs/: which models, at which tensor parallelism."""

from __future__ import annotations

from dataclasses import dataclass

from moelab.errors import UnknownNameError, nearest_names
from moelab.shapes import MoEShape, load_model

DTYPE = "bfloat16"


@dataclass(frozen=True)
class Target:
    """One layer to tune. keep: its landscape belongs into the repository. grid: its whole grid is recorded as well."""

    model: str
    tp_size: int
    keep: bool = False
    grid: bool = False

    @property
    def name(self) -> str:
        """As in recordings: "qwen3-30b-a3b/tp1"."""
        return f"{self.model}/tp{self.tp_size}"

    def shape(self) -> MoEShape:
        """Sizes per rank, routed experts alone, as the peers' files in bf16 are tuned."""
        return load_model(self.model, tp_size=self.tp_size, dtype=DTYPE, disable_shared_experts_fusion=True)


TARGETS: tuple[Target, ...] = (
    Target("qwen3-30b-a3b", 1, keep=True, grid=True),
    Target("llama-4-scout", 4, keep=True, grid=True),
    Target("deepseek-v3", 8),
    Target("lfm2-8b-a1b", 1),
    Target("mixtral-8x7b", 2),
    Target("qwen3-30b-a3b", 2),
    Target("qwen3-30b-a3b", 4),
    Target("lfm2-24b-a2b", 1),
)
"""By value: what is recorded elsewhere in data/ first, then layers that have no file of their own yet."""


def target_of(name: str) -> Target:
    """The target of that name ("qwen3-30b-a3b/tp1"). Raises UnknownNameError."""
    known = {target.name: target for target in TARGETS}
    if name not in known:
        raise UnknownNameError(
            f"Unknown target {name!r}.{nearest_names(name, known)} Expected some of {', '.join(known)}. Name those, or "
            "add it to moelab/studies/targets.py."
        )
    return known[name]
