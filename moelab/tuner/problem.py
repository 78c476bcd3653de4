"""Problem: what one tuning run tunes, complete enough to be written down, compared and taken up again."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from moelab.chips import get_target
from moelab.config import KernelConfig, default_config
from moelab.errors import JournalError, ShapeError
from moelab.shapes import MoEShape

Gemm = Literal["up", "down"]
GEMMS: tuple[Gemm, ...] = ("up", "down")
"""GEMM1 and GEMM2 of the layer, as config files call them."""

COMPATIBLE = "grouped_gemm"
"""The kernel that sglang and vLLM run, whose config files are theirs too."""

Pair = tuple[KernelConfig, KernelConfig]
"""Configs of GEMM1 and GEMM2, which share BLOCK_SIZE_M."""

BATCH_SIZES = (1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 256, 512, 1024, 1536, 2048, 3072, 4096)
"""The 18 batch sizes of sglang's and vLLM's tuners (sglang 0.5.23, get_default_batch_sizes)."""


@dataclass(frozen=True)
class Problem:
    """One layer on one kind of device, at some batch sizes.

    shape: sizes per rank, dtype among them. device: as the driver names it. target: its architecture ("sm_90").
    triton_version: decides the folder of the config file. batch_sizes: tokens, ascending. routing: a name that
    `routing.make_routing` takes, or the file of recorded ids. seed: of inputs, of routings, and of the search.
    kernel: whose configs, a name of `tuned_kernels.TUNED`. split_k: values of SPLIT_K to try.
    axes: field of KernelConfig -> values to try, for a grid other than the peers'; None is theirs (space.py).
    separate_down: a config of its own for GEMM2 (the `_down` file); otherwise one config serves both.
    incumbents: label -> batch size -> configs to beat; "default" is the loader's default, "current" what its files
    say today, frozen at the start so that a resumed run beats the same ones.
    Raises ShapeError for batch sizes that are none, UnknownNameError for an unknown target.
    """

    shape: MoEShape
    device: str
    target: str
    triton_version: str
    batch_sizes: tuple[int, ...] = BATCH_SIZES
    routing: str = "uniform"
    seed: int = 0
    kernel: str = COMPATIBLE
    split_k: tuple[int, ...] = (1,)
    axes: Mapping[str, tuple[int, ...]] | None = None
    separate_down: bool = True
    incumbents: Mapping[str, Mapping[int, Pair]] = field(default_factory=dict)

    def __post_init__(self) -> None:
        get_target(self.target)
        wrong = [b for b in self.batch_sizes if type(b) is not int or b < 1]
        if wrong or not self.batch_sizes:
            raise ShapeError(
                f"Cannot tune for the batch size{'' if wrong else 's'} {wrong[0] if wrong else 'of an empty list'}. "
                "Expected whole numbers of at least 1. Correct --batch-size, or leave it out for the usual 18."
            )
        object.__setattr__(self, "batch_sizes", tuple(sorted(set(self.batch_sizes))))

    @property
    def file_kernel(self) -> str | None:
        """What `kernel=` says in the names of its config files; None for the compatible kernel, whose names lack it."""
        return None if self.kernel == COMPATIBLE else self.kernel

    def inner_size(self, gemm: Gemm) -> int:
        """K of that GEMM: hidden_size for "up", moe_intermediate_size for "down"."""
        return self.shape.hidden_size if gemm == "up" else self.shape.moe_intermediate_size

    def columns(self, gemm: Gemm) -> int:
        """Output columns of that GEMM: the rows of an expert's w13 or w2."""
        return (self.shape.w13_shape if gemm == "up" else self.shape.w2_shape)[1]

    def to_json(self) -> dict[str, Any]:
        """Plain JSON values; `from_json` reads them back to an equal Problem."""
        values = {f.name: getattr(self, f.name) for f in dataclasses.fields(self)}
        values["incumbents"] = {
            label: {str(b): [c.to_json() for c in pair] for b, pair in by_batch.items()}
            for label, by_batch in self.incumbents.items()
        }
        return {k: list(v) if isinstance(v, tuple) else v for k, v in values.items()} | {"shape": self.shape.to_json()}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Problem:
        """Read what `to_json` wrote. Raises JournalError for anything else, another MoelabError for a layer that cannot be."""
        from moelab.schemas import first_problem
        from moelab.tuner.schemas import PROBLEM

        if problem := first_problem(PROBLEM, dict(content) if isinstance(content, Mapping) else content):
            raise JournalError(
                f"The problem that was tuned {problem}. Expected what this moelab writes. Read it with the moelab that wrote it."
            )
        values = dict(content)
        values["shape"] = MoEShape.from_json(values["shape"])
        for name in ("batch_sizes", "split_k"):
            values[name] = tuple(values[name])
        if values["axes"] is not None:
            values["axes"] = {name: tuple(axis) for name, axis in values["axes"].items()}
        values["incumbents"] = {
            label: {
                int(b): (KernelConfig.from_json(up), KernelConfig.from_json(down)) for b, (up, down) in pairs.items()
            }
            for label, pairs in values["incumbents"].items()
        }
        return cls(**values)


def default_of(shape: MoEShape, device: str, num_tokens: int) -> KernelConfig:
    """sglang's rule where it finds no file, for the layer's format; that of 16-bit weights where it says nothing."""
    from moelab.config_files import question
    from moelab.config_files.defaults import default_rule
    from moelab.config_files.rules import get_rules

    plain = default_config(num_tokens, shape.num_experts, shape.dtype)
    if shape.format.is_plain:
        return plain
    found, _ = default_rule(get_rules("sglang"), question(shape).name(device), num_tokens)
    return found or plain


def find_incumbents(
    shape: MoEShape,
    device: str,
    triton_version: str,
    batch_sizes: tuple[int, ...],
    *,
    config_dir: str | Path | None = None,
    separate_down: bool = True,
    kernel: str = COMPATIBLE,
) -> dict[str, dict[int, Pair]]:
    """What a tuned config has to beat: "default" at every batch size, "current" where a config file has one.

    A kernel beside the compatible kernel has files of its own; where there are none, those of the compatible kernel stand in.
    A `_down` file that disagrees with its up file in BLOCK_SIZE_M cannot run beside it: the up config then stands in.
    Raises ConfigFileError for a broken file: what it would have said is not known.
    """
    from moelab.config_files import Lookup, question

    asked = question(shape)

    def look_up(num_tokens: int, is_down: bool, whose: str | None) -> Lookup:
        return asked.lookup(
            device,
            num_tokens=num_tokens,
            down=is_down,
            kernel=whose,
            triton_version=triton_version,
            config_dir=config_dir,
        )

    own = None if kernel == COMPATIBLE else kernel
    found: dict[str, dict[int, Pair]] = {"default": {}, "current": {}}
    for num_tokens in batch_sizes:
        default = default_of(shape, device, num_tokens)
        found["default"][num_tokens] = (default, default)
        whose = None if own and look_up(num_tokens, False, own).is_default else own
        up, down = (look_up(num_tokens, is_down, whose) for is_down in (False, separate_down))
        if up.config is not None and not up.is_default:
            fits = down.config is not None and down.config.BLOCK_SIZE_M == up.config.BLOCK_SIZE_M
            found["current"][num_tokens] = (up.config, down.config if fits and down.config else up.config)
    return {label: pairs for label, pairs in found.items() if pairs}
