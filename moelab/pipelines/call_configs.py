"""Which configs a call runs under: those given, else the tuned files' of this device, else sglang's default rule."""

from __future__ import annotations

import functools
import os

from moelab import runtime
from moelab.call import Config, MoECall
from moelab.config import KernelConfig, default_config
from moelab.config_files import FileName, get_rules, lookup
from moelab.config_files.defaults import default_rule
from moelab.dtypes import dtype_name
from moelab.errors import ConfigError
from moelab.formats import PLAIN, Format


def call_configs(call: MoECall, kernel: str | None = None) -> tuple[KernelConfig, KernelConfig]:
    """The configs of GEMM1 and GEMM2.

    As given; GEMM1's for both where only it is given; "default" is sglang's default rule. Where none is given, those of the
    tuned files for this device, Triton and batch size, as the servers look them up, and that rule where there is no file.
    kernel: whose files (`kernel=NAME`); None for the compatible kernel's, which name none.
    Raises ConfigError if their BLOCK_SIZE_M differ, ConfigFileError for a file that is broken.
    """
    up, down = call.config, call.down_config
    if up is None and down is None:
        size, dtype = call.moe_intermediate_size, dtype_name(call.hidden_states.dtype)
        up, down = tuned_configs(call.num_experts, size, dtype, call.num_tokens, kernel, call.weights.format)
    else:
        up = _resolved(up, call)
        down = up if down is None else _resolved(down, call)
    if up.BLOCK_SIZE_M != down.BLOCK_SIZE_M:
        raise ConfigError(
            f"config has BLOCK_SIZE_M = {up.BLOCK_SIZE_M} and down_config {down.BLOCK_SIZE_M}. Expected the same: one "
            "sort by expert serves both GEMMs. Tune the two under one BLOCK_SIZE_M."
        )
    return up, down


def _resolved(config: Config, call: MoECall) -> KernelConfig:
    if isinstance(config, KernelConfig):
        return config
    return default_of(call.num_experts, call.moe_intermediate_size, call.num_tokens, call.weights.format)


def default_of(num_experts: int, size: int, num_tokens: int, format: Format) -> KernelConfig:
    """sglang's rule where it finds no file; for formats that it has no file names for, that of 16-bit weights."""
    if format.is_plain or format.dtype_selector("bfloat16") is None:
        return default_config(num_tokens, num_experts)
    name = FileName(
        num_experts, size, runtime.current().device_name, format.selector, format.block_shape, format.per_channel_quant
    )
    found, _ = default_rule(get_rules("sglang"), name, num_tokens)
    return found if isinstance(found, KernelConfig) else default_config(num_tokens, num_experts)


def tuned_configs(
    num_experts: int,
    moe_intermediate_size: int,
    dtype: str,
    num_tokens: int,
    kernel: str | None = None,
    format: Format = PLAIN,
) -> tuple[KernelConfig, KernelConfig]:
    """GEMM1's and GEMM2's of the tuned files for this device and Triton; sglang's default rule where there is no file.

    dtype: of plain weights and of activations. Kept: a file is read once a batch size, as the servers do. Raises
    ConfigFileError for a file that is broken.
    """
    device, config_dir = runtime.current().device_name, os.environ.get("MOELAB_CONFIG_DIR")
    return _tuned(num_experts, moe_intermediate_size, device, dtype, num_tokens, kernel, format, config_dir)


@functools.lru_cache(maxsize=4096)
def _tuned(
    num_experts: int, size: int, device: str, dtype: str, num_tokens: int, kernel: str | None, format: Format,
    config_dir: str | None,
) -> tuple[KernelConfig, KernelConfig]:  # fmt: skip
    default = default_of(num_experts, size, num_tokens, format)
    if not format.file:
        return default, default
    version, block = runtime.triton_version() or "unknown", format.block_shape
    up, down = (
        lookup(
            num_experts, size // format.values_per_byte, device, num_tokens=num_tokens, triton_version=version,
            down=of_gemm2, dtype_selector=format.dtype_selector(dtype), block_shape=block if block and block[0] else None,
            per_channel_quant=format.per_channel_quant, kernel=kernel,
        )
        for of_gemm2 in (False, True)
    )  # fmt: skip
    first = default if up.is_default or up.config is None else up.config
    return first, first if down.is_default or down.config is None else down.config
