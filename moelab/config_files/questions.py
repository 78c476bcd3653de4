"""Which config file a server asks for: an answer of loader, model, parallelism, format, platform and version together."""

from __future__ import annotations

import contextlib
import functools
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.config_files.defaults import device_target
from moelab.config_files.names import FileName, checked_name
from moelab.config_files.rules import RULES, Rules, get_rules
from moelab.config_files.search import Lookup, find
from moelab.errors import FormatError, MoelabError
from moelab.shapes import ModelRead, MoEShape, Served, load_served, preset_names, read_model, serve

DEGREES = (1, 2, 4, 8, 16)
"""Ranks over which presets are sharded, by tensor and by expert, where files are matched with models."""

_FINEST_REFINED = 32  # vLLM 0.33.0, oracle/fp8.py, refine_fp8_moe_block_shape


@dataclass(frozen=True)
class Question:
    """What one loader asks for, for one layer on one rank.

    rules: the loader's name. shape: the layer as its server runs it, shared experts that it fuses among E and top_k. columns:
    w2's last dimension, the N of a FileName (half of N where two weights share a byte). dtype_selector, block_shape,
    per_channel_quant: as the loader passes them. because: which rule of which version decided, a sentence each. misfits: why
    the server would not load such a shard, empty if it would.
    """

    rules: str
    shape: MoEShape
    columns: int
    dtype_selector: str | None
    block_shape: tuple[int, int] | None
    per_channel_quant: bool
    because: tuple[str, ...] = ()
    misfits: tuple[str, ...] = ()

    @property
    def num_experts(self) -> int:
        """E of the file's name."""
        return self.shape.num_experts

    @property
    def top_k(self) -> int:
        """Rows that a token contributes; no part of the name."""
        return self.shape.top_k

    def name(self, device: str, *, down: bool = False, kernel: str | None = None) -> FileName:
        """The file's name on a device. Raises FormatError where no such kernel runs, ConfigFileError for a device that
        cannot stand in a name."""
        format = self.shape.format
        if not format.file:
            raise FormatError(
                f"No config file is asked for {self.shape.name}: {format.name} is run by {format.served_by}. Expected a format "
                "of the Triton kernel that reads these files. Pass dtype= (--dtype bfloat16) for the same sizes in plain weights."
            )
        return checked_name(
            self.num_experts, self.columns, device, self.dtype_selector, self.block_shape, self.per_channel_quant, down, kernel,
            rules=self.rules,
        )  # fmt: skip

    def file_name(self, device: str, *, down: bool = False, kernel: str | None = None) -> str:
        """`name` as the loader spells it."""
        return self.name(device, down=down, kernel=kernel).text(self.rules)

    def lookup(
        self,
        device: str,
        *,
        num_tokens: int,
        triton_version: str,
        down: bool = False,
        kernel: str | None = None,
        config_dir: str | Path | None = None,
    ) -> Lookup:
        """Which config the loader's lookup finds, and why; as `config_files.lookup`, with its errors."""
        name = self.name(device, down=down, kernel=kernel)
        return find(name, get_rules(self.rules), num_tokens, triton_version, config_dir)


def ask(
    model: str | Path,
    rules: str | Rules = "moelab",
    *,
    tp_size: int = 1,
    ep_size: int = 1,
    dtype: object = None,
    disable_shared_experts_fusion: bool = False,
    device: str | None = None,
) -> Question:
    """What the loader `rules` asks for when its server runs `model` so. device: as the driver names it; its chip decides which
    rules hold, and an NVIDIA chip of sm_90 is taken where nothing is known of it. Raises what `load_served` does."""
    loader = get_rules(rules)
    served = load_served(
        model, tp_size=tp_size, ep_size=ep_size, dtype=dtype, loader=loader.name, platform=platform_of(device),
        disable_shared_experts_fusion=disable_shared_experts_fusion,
    )  # fmt: skip
    return _asked(served, loader)


def _asked(served: Served, loader: Rules) -> Question:
    return question(served.shape, loader, method=served.method, because=(served.because,))


def platform_of(device: str | None) -> str:
    """The chip of a device: what data/devices says, or a guess by its maker's name."""
    target = device_target(device) if device else None
    if target is not None:
        return target.name
    return "gfx942" if device and device.lower().startswith("amd") else "sm_90"


def question(
    shape: MoEShape, rules: str | Rules = "moelab", *, method: str = "fp8", because: tuple[str, ...] = ()
) -> Question:
    """What a loader asks for a layer whose experts are counted already. method: the checkpoint's quant_method."""
    loader, format = get_rules(rules), shape.format
    selector, block, reasons = format.dtype_selector(shape.dtype), format.block_shape, list(because)
    if selector is not None and selector not in loader.dtype_selectors:
        reasons.append(f"{loader.version} has no selector {selector}: {loader.reasons['dtype_selectors']}")
        selector = None
    misfits = format.misfits(shape.hidden_size, shape.moe_intermediate_size) if format.file else ()  # else they pad
    if misfits and format.granularity == "block" and loader.refines_blocks and method == "fp8":
        side = math.gcd(*format.sizes, shape.moe_intermediate_size, shape.hidden_size)
        if side >= _FINEST_REFINED:
            reasons.append(f"{loader.version} refines blocks of {list(format.sizes)} to {[side, side]}: {misfits[0]}")
            block, misfits = (side, side), ()
    if misfits:
        misfits = (*misfits, _remedy(shape))
    if loader.experts_over_all_ranks and shape.ep_size not in (1, shape.tp_size):
        alone = (
            f"{loader.version} divides experts over all ranks or none, and here over {shape.ep_size} of {shape.tp_size}"
        )
        misfits = (*misfits, f"{alone}. Expected the one or the other. Choose ep_size 1 or {shape.tp_size}")
    return Question(
        loader.name, shape, shape.moe_intermediate_size // format.values_per_byte, selector, block,
        format.per_channel_quant, tuple(reasons), tuple(misfits),
    )  # fmt: skip


def _remedy(shape: MoEShape) -> str:
    """Which other shards of the layer the format fits, in a sentence."""
    fitting = []
    for degree in DEGREES:
        try:
            part = shape.shard(degree * shape.ep_size, shape.ep_size)
        except MoelabError:
            continue
        if not shape.format.misfits(part.hidden_size, part.moe_intermediate_size):
            fitting.append(degree * shape.ep_size)
    if not fitting:
        return "Expected sizes that whole blocks make: no tensor parallelism gives them; plain weights (--dtype bfloat16) would"
    sizes = ", ".join(map(str, fitting))
    return f"Expected sizes that whole blocks make. Choose tp_size {sizes}" + f" at ep_size {shape.ep_size}" * (
        shape.ep_size > 1
    )


def users_of(name: FileName, rules: str | Rules = "moelab") -> list[tuple[str, MoEShape]]:
    """Which presets and usual shards of theirs a loader asks for this file for, whatever the device: (label, the layer)."""
    loader = get_rules(rules).name
    return _asked_by(loader).get(_key(name, loader), [])


@functools.cache
def _asked_by(rules: str) -> dict[tuple[Any, ...], list[tuple[str, MoEShape]]]:
    """What a loader asks for over all presets and their usual shards."""
    found: dict[tuple[Any, ...], list[tuple[str, MoEShape]]] = {}
    shards = dict.fromkeys((size, ep) for size in DEGREES for ep in (1, size))
    for model, read in _presets_read().items():
        for tp, ep in shards:
            try:
                asked = _asked(serve(read, tp_size=tp, ep_size=ep, loader=rules), get_rules(rules))
                name = asked.name("any")
            except MoelabError:
                continue  # a degree that does not divide, or a format without files
            if not asked.misfits:
                label = f"{model} tp {tp}" + (f" ep {ep}" if ep > 1 else "")
                found.setdefault(_key(name, rules), []).append((label, asked.shape))
    return found


@functools.cache
def _presets_read() -> dict[str, ModelRead]:
    """Every preset that can be read: most of a question's time, and the same for each shard and loader."""
    found = {}
    for model in preset_names(quantised=True):
        with contextlib.suppress(MoelabError):  # an architecture or a format that no server here runs
            found[model] = read_model(model)
    return found


def _key(name: FileName, rules: str) -> tuple[Any, ...]:
    block = name.block_shape if name.block_shape and all(name.block_shape) else None
    per_channel = name.per_channel_quant and get_rules(rules).names_per_channel_quant
    return name.num_experts, name.moe_intermediate_size, name.dtype_selector, block, per_channel


def not_asked_for(name: FileName, rules: str | Rules) -> str | None:
    """Why the loader would not ask for this file although another does, as far as the presets know; None if it may.

    A file that no preset is known to ask for under any loader says nothing.
    """
    loader = get_rules(rules)
    if users_of(name, loader):
        return None
    users = {label: other for other in RULES for label, _ in users_of(name, other)}
    if not users:
        return None
    label, other = next(iter(users.items()))
    return f"{RULES[other].version} asks for it for {label}, {loader.version} for no preset: {_instead(label, loader)}"


def _instead(label: str, loader: Rules) -> str:
    model, *degrees = label.split()
    sizes = dict(zip(degrees[::2], map(int, degrees[1::2]), strict=True))
    asked = ask(model, loader, tp_size=sizes.get("tp", 1), ep_size=sizes.get("ep", 1))
    return f"there it asks for E={asked.num_experts}, N={asked.columns} ({'; '.join(asked.because)})"
