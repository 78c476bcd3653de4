"""What each loader runs where no file has a config."""

from __future__ import annotations

from moelab.chips import Target, get_target
from moelab.config import KernelConfig as Config
from moelab.config import default_config
from moelab.config_files.names import FileName
from moelab.config_files.rules import Rules

LOW_SHARED_MEMORY = 128 * 1024
"""Bytes a block: under this, sglang 0.5.23 takes smaller tiles for fp8."""


def default_rule(rules: Rules, name: FileName, num_tokens: int) -> tuple[Config | None, str]:
    """The config and the reason for it; None where it depends on more than a file name says.

    On a device that data/devices does not know, an NVIDIA chip with at least 128 KiB of shared memory a block
    is taken for granted, which only quantised weights and vLLM's stages depend on.
    """
    if name.kernel:
        return None, f"no file was found, so {name.kernel} takes the config that its launcher starts from"
    if rules.name == "vllm":
        return _vllm(name, num_tokens)
    if name.dtype_selector == "fp8_w8a8":  # moelab's own files follow sglang's rule
        return _sglang_fp8(name, num_tokens)
    config = default_config(num_tokens, name.num_experts)
    relation = "at most" if num_tokens <= name.num_experts else "more than"
    reason = f"no file was found; batch {num_tokens} is {relation} the {name.num_experts} experts, so {config.short()}"
    return config, reason


def device_target(device_name: str) -> Target | None:
    """The chip of a device that data/devices knows, None for another."""
    from moelab.roofline import device_data, device_names

    key = device_name.replace(" ", "_")
    return get_target(device_data(key)["target"]) if key in device_names() else None


def _sglang_fp8(name: FileName, num_tokens: int) -> tuple[Config, str]:
    target = device_target(name.device_name)
    amd, few = target is not None and target.is_amd, num_tokens <= name.num_experts
    if name.block_shape and all(name.block_shape):
        block_n, block_k = name.block_shape
        config = Config(64, block_n, block_k, 32, 4, 2 if amd else 3)
        return config, f"no file was found; for block-quantised fp8 {config.short()}, whatever the batch"
    if target is not None and not amd and target.shared_memory_per_block < LOW_SHARED_MEMORY:
        config = Config(32, 64, 256, 1, 4, 4) if few else Config(64, 128, 256, 64, 4, 2)
    else:
        stages = 2 if amd else 4
        config = Config(64, 128, 128, 1, 4, stages) if few else Config(128, 256, 128, 32, 8, stages)
    relation = "at most" if few else "more than"
    return config, (
        f"no file was found; fp8, batch {num_tokens} is {relation} the {name.num_experts} experts, so {config.short()}"
    )


def _vllm(name: FileName, num_tokens: int) -> tuple[Config | None, str]:
    target = device_target(name.device_name)
    amd = target is not None and target.is_amd
    block = name.block_shape if name.block_shape and all(name.block_shape) else None
    if name.block_shape and name.dtype_selector in ("int4_w4a16", "int8_w8a16"):  # (0, group), or a block
        return (
            None,
            "no file was found; for block-quantised 16-bit activations the launcher computes one from all sizes",
        )
    if block and name.dtype_selector == "fp8_w8a8":
        config = _vllm_block_fp8(block, num_tokens, amd)
        return config, f"no file was found; for block-quantised fp8 and batch {num_tokens}, {config.short()}"
    config = _vllm_general(name, num_tokens, amd)
    return config, f"no file was found; for batch {num_tokens} and {name.num_experts} experts, {config.short()}"


def _vllm_block_fp8(block: tuple[int, int], num_tokens: int, amd: bool) -> Config:
    narrow = not amd and num_tokens <= 8 and block[0] % 64 == 0
    stages = 2 if amd else 4 if narrow and num_tokens <= 4 else 3
    rows, group = (16 if num_tokens <= 64 else 64), (1 if num_tokens <= 16 else 32)
    return Config(rows, 64 if narrow else block[0], block[1], group, 4, stages)


def _vllm_general(name: FileName, num_tokens: int, amd: bool) -> Config:
    rows = next((rows for most, rows in ((32, 16), (96, 32), (512, 64)) if num_tokens <= most), 128)
    columns = 64 if num_tokens <= 64 else 128
    inner = 128 if name.dtype_selector == "fp8_w8a8" or num_tokens <= 64 else 64
    group = 16 if num_tokens // name.num_experts > 128 else 1
    stages = 2 if amd else 4 if num_tokens <= 32 else 3
    return Config(rows, columns, inner, group, 4 if num_tokens <= 128 else 8, stages)
