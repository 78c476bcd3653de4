"""What a config file's name says of quantised weights, held against what a loader can ask for, and what its launcher does."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import replace

from moelab.config import KernelConfig
from moelab.config_files.names import FileName
from moelab.config_files.questions import users_of
from moelab.config_files.rules import DTYPE_SELECTORS, Rules
from moelab.formats import FAMILIES

Asked = tuple[str | None, bool, bool]
"""Of a name: its selector, whether it has a block_shape, whether it says per_channel_quant."""

MEANT = {
    "float8": "fp8_w8a8",
    "fp8": "fp8_w8a8",
    "float8_e4m3fn": "fp8_w8a8",
    "int8": "int8_w8a8",
    "int4": "int4_w4a16",
}
"""What tuners have written for a selector -> the selector."""


def asked_names(rules: Rules) -> frozenset[Asked]:
    """What stands together in the names that a loader asks for, over all formats of weights that have files."""
    return _asked(rules.dtype_selectors, rules.names_per_channel_quant)


@functools.cache
def _asked(selectors: tuple[str, ...], names_per_channel: bool) -> frozenset[Asked]:
    formats = [family for family in FAMILIES.values() if family.file]
    known = {
        (
            each.selector if each.selector in selectors else None,
            each.granularity == "block",
            each.per_channel_quant and names_per_channel,
        )
        for each in formats
    }
    others = set(selectors) - {each.selector for each in formats}
    return frozenset(known | {(selector, block, False) for selector in others for block in (False, True)})


def never_asked(name: FileName, rules: Rules) -> tuple[str, str] | None:
    """(why, what to do) for a name whose selector, block_shape and per_channel_quant the loader never asks for together."""
    has_block = bool(name.block_shape and all(name.block_shape))
    found = (name.dtype_selector, has_block, name.per_channel_quant)
    wanted = asked_names(rules)
    if found in wanted or name.kernel:
        return None
    ways = [_said(block, channel) for selector, block, channel in sorted(wanted, key=str) if selector == found[0]]
    of = f"dtype={name.dtype_selector}" if name.dtype_selector else "files without dtype="
    reason = f"{rules.name} asks for {of} only {' or '.join(ways)}, and this name has {_said(*found[1:]).removeprefix('with ')}"
    if (found[0], found[1], True) in wanted:
        return (
            reason,
            f"Rename it to {replace(name, per_channel_quant=True).text(rules)}, if it was tuned with a scale a channel.",
        )
    return reason, "Rename it as the layer that it was tuned for is asked for (moelab explain), or remove it."


def _said(block: bool, channel: bool) -> str:
    parts = [word for word, there in (("a block_shape", block), ("per_channel_quant=True", channel)) if there]
    return f"with {' and '.join(parts)}" if parts else "with neither block_shape nor per_channel_quant"


def meant_selector(selector: str, rules: Rules) -> tuple[str, str] | None:
    """(why, what to do) for a selector that is another loader's, or another word for one; None for what is neither."""
    meant = MEANT.get(selector, selector)
    if meant not in DTYPE_SELECTORS:
        return None
    if meant in rules.dtype_selectors:
        return f"its selector for those weights is {meant}", f"Rename it with dtype={meant}."
    return rules.reasons["dtype_selectors"], f"Move it to a tree of sglang's, or remove it from {rules.name}'s."


def cut_steps(config: KernelConfig, name: FileName, rules: Rules) -> str | None:
    """That the loader's launcher runs a shorter step of K than the entry says, and so not what was written down."""
    block = name.block_shape
    if not rules.clamps_block_k or not block or not all(block) or min(block) >= config.BLOCK_SIZE_K:
        return None
    return f"BLOCK_SIZE_K = {config.BLOCK_SIZE_K} runs as {min(block)}: {rules.reasons['clamps_block_k']}"


def unpacked_columns(name: FileName, rules: Rules) -> str | None:
    """That N of an int4 file counts values where the loader asks with w2's packed columns; None where some model asks so."""
    half, odd = divmod(name.moe_intermediate_size, 2)
    if name.dtype_selector != "int4_w4a16" or rules.doubles_int4_n or odd or users_of(name, rules):
        return None
    users = _labels(users_of(replace(name, moe_intermediate_size=half), rules))
    if not users:
        return None
    wanted = replace(name, moe_intermediate_size=half).text(rules)
    return f"{rules.name} asks for {wanted} ({users}): N is w2's last dimension, which holds two values a byte"


def _labels(users: Iterable[tuple[str, object]]) -> str:
    labels = [label for label, _ in users]
    return ", ".join(labels[:2]) + (f" and {len(labels) - 2} more" if len(labels) > 2 else "")
