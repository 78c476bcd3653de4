"""Whether a loader's kernel can run a config on a device: asked by export before it writes, and by the doctor."""

from __future__ import annotations

from dataclasses import replace

from moelab.chips import Target
from moelab.config import MIN_DOT_BLOCK, KernelConfig, violations
from moelab.config_files.names import FileName, operand_dtype
from moelab.config_files.rules import Rules

_PADDED = ("BLOCK_SIZE_M", "BLOCK_SIZE_N")


def split_k_violation(config: KernelConfig, rules: Rules) -> str | None:
    """What is wrong with SPLIT_K under these rules, if it is: only moelab's kernels have one."""
    if config.SPLIT_K == 1 or not (rules.sets_split_k or "SPLIT_K" in rules.unknown_keys):
        return None
    why = "its launcher sets it to 1" if rules.sets_split_k else "it has no such parameter"
    return f"SPLIT_K = {config.SPLIT_K} does not reach {rules.name}'s kernel: {why}"


def _as_launched(config: KernelConfig, name: FileName, rules: Rules) -> KernelConfig:
    """The config with what the peers' launchers change, so that it is judged as it runs."""
    block = name.block_shape
    if rules.clamps_block_k and block and all(block):
        config = replace(config, BLOCK_SIZE_K=min(config.BLOCK_SIZE_K, *block))
    if rules.pads_small_blocks:
        config = replace(config, **{key: MIN_DOT_BLOCK for key in _PADDED if getattr(config, key) in (1, 2, 4, 8)})
    return config


def run_violations(config: KernelConfig, name: FileName, rules: Rules, target: Target | None) -> tuple[str, ...]:
    """Every rule that `config` breaks as the loader's kernel would run it; empty if it can run.

    target: the device's chip, None leaves out what depends on it. A kernel beside the compatible kernel is held
    only against what is true of every kernel: its shared memory is its own, and its blocks may be under 16.
    """
    if name.kernel:
        return violations(config, uses_dot=False)
    block = name.block_shape
    config = _as_launched(config, name, rules)
    selector = name.dtype_selector or ""
    stored = (
        int(selector[3]) if selector.startswith("int") and selector.endswith("a16") else None
    )  # widened in the loop
    found = violations(
        config, dtype=operand_dtype(name.dtype_selector), target=target, block_shape=block, weight_bits=stored
    )
    split = split_k_violation(config, rules)
    return (*found, split) if split else found
