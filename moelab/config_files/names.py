"""The names of config files: built, and read back.

`E=128,N=768,device_name=NVIDIA_H200.json`, N being the last dimension of w2 (in vLLM twice that for int4_w4a16,
whose values are packed in pairs: a FileName holds w2's). Hidden size and top_k are not in the name.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from moelab.config_files.rules import Rules, get_rules
from moelab.errors import ConfigFileError, UnknownNameError, nearest_names

_NAME = re.compile(
    r"E=(?P<num_experts>\d+),N=(?P<moe_intermediate_size>\d+),device_name=(?!_down\.json)(?P<device_name>[^,]+?)"
    r"(?:,dtype=(?P<dtype_selector>[^,]+?))?"
    r"(?:,block_shape=\[(?P<block_n>\d+),\s*(?P<block_k>\d+)\])?"
    r"(?P<per_channel_quant>,per_channel_quant=True)?"
    r"(?:,kernel=(?P<kernel>[a-z0-9_]+?))?(?P<down>_down)?\.json"
)
_KERNEL = re.compile(r"[a-z][a-z0-9_]*")


@dataclass(frozen=True)
class FileName:
    """What a config file's name says. device_name has `_` for spaces; down: for GEMM2 (w2) alone; kernel: of which
    kernel beside the compatible kernel; None for the compatible kernel itself."""

    num_experts: int
    moe_intermediate_size: int
    device_name: str
    dtype_selector: str | None = None
    block_shape: tuple[int, int] | None = None
    per_channel_quant: bool = False
    down: bool = False
    kernel: str | None = None

    def text(self, rules: str | Rules = "sglang") -> str:
        """The name that this loader asks for. What its names do not say (see `unsaid`) is left out.

        `,kernel=NAME` stands there under every rules, for the file is moelab's own.
        """
        rules = get_rules(rules)
        columns = self.moe_intermediate_size * _values_per_column(self.dtype_selector, rules)
        name = f"E={self.num_experts},N={columns},device_name={rules.device(self.device_name)}"
        if self.dtype_selector:
            name += f",dtype={self.dtype_selector}"
        if self.block_shape and all(self.block_shape):
            name += f",block_shape={rules.block_shape.format(*self.block_shape)}"
        if self.per_channel_quant and rules.names_per_channel_quant:
            name += ",per_channel_quant=True"
        if self.kernel:
            name += f",kernel={self.kernel}"
        return name + "_down" * (self.down and (rules.names_down or bool(self.kernel))) + ".json"

    def unsaid(self, rules: str | Rules) -> tuple[str, ...]:
        """Which parts of this name the loader's names have no place for; empty if it can ask for just this file."""
        rules = get_rules(rules)
        known = {
            "down": rules.names_down,
            "per_channel_quant": rules.names_per_channel_quant,
            "kernel": rules.names_kernel,
        }
        return tuple(part for part, says in known.items() if getattr(self, part) and not says)


def _values_per_column(selector: str | None, rules: Rules) -> int:
    return 2 if rules.doubles_int4_n and selector == "int4_w4a16" else 1


def checked_name(
    num_experts: int,
    moe_intermediate_size: int,
    device_name: str,
    dtype_selector: str | None = None,
    block_shape: tuple[int, int] | None = None,
    per_channel_quant: bool = False,
    down: bool = False,
    kernel: str | None = None,
    *,
    rules: str | Rules = "sglang",
) -> FileName:
    """A FileName of parts that have been checked; arguments and errors of `file_name`."""
    rules = get_rules(rules)
    if num_experts < 1 or moe_intermediate_size < 1:
        raise ConfigFileError(
            f"No config file is named by E={num_experts}, N={moe_intermediate_size}. Expected 1 or more of each. Take "
            "them from a MoEShape."
        )
    device = rules.device(device_name)
    if not device or "," in device or "/" in device:
        raise ConfigFileError(
            f"The device name {device_name!r} cannot stand in a file name. Expected one such as 'NVIDIA H200'; "
            "take this machine's from moelab.runtime.device_key()."
        )
    selectors = rules.dtype_selectors
    if dtype_selector is not None and dtype_selector not in selectors:
        raise UnknownNameError(
            f"Unknown dtype selector {dtype_selector!r} in {rules.name}'s names.{nearest_names(dtype_selector, selectors)} "
            f"Expected one of {', '.join(selectors)}, or None for bfloat16 and float16. Name one, or "
            "take a layer's from question()."
        )
    if kernel is not None and (not _KERNEL.fullmatch(kernel) or kernel.endswith("_down")):
        raise ConfigFileError(
            f"The kernel {kernel!r} cannot stand in a file name. Expected small letters, digits and _, and no _down at "
            "the end, as in 'split_k_workspace'. Rename it."
        )
    block = (block_shape[0], block_shape[1]) if block_shape else None
    return FileName(num_experts, moe_intermediate_size, device, dtype_selector, block, per_channel_quant, down, kernel)


def file_name(
    num_experts: int,
    moe_intermediate_size: int,
    device_name: str,
    dtype_selector: str | None = None,
    block_shape: tuple[int, int] | None = None,
    per_channel_quant: bool = False,
    down: bool = False,
    kernel: str | None = None,
    *,
    rules: str | Rules = "sglang",
) -> str:
    """The file's name, as the loader `rules` spells it. device_name: as the driver gives it, or with `_` for spaces.

    dtype_selector: one of the rules' dtype_selectors, None for bfloat16 and float16; `question` has a layer's.
    block_shape: (n, k) of block-quantised weights; (0, g), for groups, is not written. kernel: a kernel beside the
    sglang/vLLM-compatible one, by the name of its implementation in `fused_moe`, which only moelab looks up (`,kernel=NAME`:
    no device name has a comma, so no peer can ask for it).
    Raises ConfigFileError for sizes under 1, an empty device name or a kernel's name that cannot stand there,
    UnknownNameError for another selector.
    """
    name = checked_name(
        num_experts, moe_intermediate_size, device_name, dtype_selector, block_shape, per_channel_quant, down, kernel,
        rules=rules,
    )  # fmt: skip
    return name.text(rules)


def operand_dtype(selector: str | None) -> str:
    """The dtype whose size counts for shared memory under a selector, torch's spelling.

    For weights narrower than the activations (w8a16, w4a16) the weights' dtype, one byte: a lower bound.
    """
    if selector == "float32":
        return "float32"
    return "bfloat16" if selector is None else "float8_e4m3fn" if selector.startswith("fp8") else "int8"


def parse_file_name(name: str, rules: str | Rules = "sglang") -> FileName:
    """Read a file name back; both peers' spellings of block_shape. Raises ConfigFileError if it is no such name.

    rules: whose N it is, which matters for int4_w4a16 alone.

    The dtype selector is not judged: a file with an unknown one has a name, though no lookup asks for it.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise ConfigFileError(
            f"{name!r} is not a config file's name. Expected E=<experts>,N=<intermediate size per rank>,"
            "device_name=<device>[,dtype=<selector>][,block_shape=[n, k]][,per_channel_quant=True][,kernel=<name>]"
            "[_down].json. Rename it; file_name() builds one."
        )
    found = match.groupdict()
    columns, odd = divmod(
        int(found["moe_intermediate_size"]), _values_per_column(found["dtype_selector"], get_rules(rules))
    )
    if odd:
        raise ConfigFileError(
            f"{name!r} has an odd N. Expected an even one in {get_rules(rules).name}'s names of int4_w4a16, which pack two "
            "values into a byte. Rename it; file_name() builds one."
        )
    block = (int(found["block_n"]), int(found["block_k"])) if found["block_n"] else None
    return FileName(
        int(found["num_experts"]),
        columns,
        found["device_name"],
        found["dtype_selector"],
        block,
        bool(found["per_channel_quant"]),
        bool(found["down"]),
        found["kernel"],
    )
