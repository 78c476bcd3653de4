"""Tuned-config files: their names, their content, and which of them a lookup uses, with its reasons.

A file holds batch size -> KernelConfig for one (E, N, device, dtype, ...), named as sglang and vLLM name it:
`E=128,N=768,device_name=NVIDIA_H200.json`, N being the last dimension of w2. Hidden size and top_k are not in
the name. Files lie in `triton_X_Y_Z/` folders, because what is fast under one Triton need not be under
another.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.config import KernelConfig, default_config
from moelab.errors import ConfigError, ConfigFileError, UnknownNameError, nearest_names
from moelab.recordings import write_atomically

DTYPE_SELECTORS = ("fp8_w8a8", "int8_w8a8", "int8_w8a16", "int4_w4a16", "float32")
"""What may follow `dtype=` in a file name; bfloat16 and float16 have no selector."""

_NAME = re.compile(
    r"E=(?P<num_experts>\d+),N=(?P<moe_intermediate_size>\d+),device_name=(?P<device_name>[^,]+?)"
    r"(?:,dtype=(?P<dtype_selector>[^,]+?))?"
    r"(?:,block_shape=\[(?P<block_n>\d+),\s*(?P<block_k>\d+)\])?"
    r"(?P<per_channel_quant>,per_channel_quant=True)?(?P<down>_down)?\.json"
)
_VERSION_FOLDER = re.compile(r"triton_(\d+(?:_\d+)*)")


# --- names --------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FileName:
    """What a config file's name says. device_name has `_` for spaces; down: for GEMM2 (w2) alone."""

    num_experts: int
    moe_intermediate_size: int
    device_name: str
    dtype_selector: str | None = None
    block_shape: tuple[int, int] | None = None
    per_channel_quant: bool = False
    down: bool = False

    def text(self) -> str:
        """The name as sglang spells it (a space in block_shape, which vLLM leaves out)."""
        name = f"E={self.num_experts},N={self.moe_intermediate_size},device_name={self.device_name}"
        if self.dtype_selector:
            name += f",dtype={self.dtype_selector}"
        if self.block_shape and all(self.block_shape):
            name += f",block_shape=[{self.block_shape[0]}, {self.block_shape[1]}]"
        return name + ",per_channel_quant=True" * self.per_channel_quant + "_down" * self.down + ".json"


def file_name(
    num_experts: int,
    moe_intermediate_size: int,
    device_name: str,
    dtype_selector: str | None = None,
    block_shape: tuple[int, int] | None = None,
    per_channel_quant: bool = False,
    down: bool = False,
) -> str:
    """The file's name, in sglang's spelling. device_name: as the driver gives it, or with `_` for spaces.

    dtype_selector: one of DTYPE_SELECTORS, None for bfloat16 and float16; `dtype_selector` below maps a
    dtype. Raises ConfigFileError for sizes under 1 or an empty device name, UnknownNameError for another
    selector.
    """
    if num_experts < 1 or moe_intermediate_size < 1:
        raise ConfigFileError(
            f"No config file is named by E={num_experts}, N={moe_intermediate_size}. Expected 1 or more of each. Take "
            "them from "
            "a MoEShape."
        )
    device = device_name.strip().replace(" ", "_")
    if not device or "," in device or "/" in device:
        raise ConfigFileError(
            f"The device name {device_name!r} cannot stand in a file name. Expected one such as 'NVIDIA H200'; "
            "take this machine's from moelab.runtime.device_key()."
        )
    if dtype_selector is not None and dtype_selector not in DTYPE_SELECTORS:
        raise UnknownNameError(
            f"Unknown dtype selector {dtype_selector!r}.{nearest_names(dtype_selector, DTYPE_SELECTORS)} "
            f"Expected one of {', '.join(DTYPE_SELECTORS)}, or None for bfloat16 and float16. Name one, or see "
            "dtype_selector()."
        )
    block = (block_shape[0], block_shape[1]) if block_shape else None
    return FileName(num_experts, moe_intermediate_size, device, dtype_selector, block, per_channel_quant, down).text()


def dtype_selector(dtype: str) -> str | None:
    """The selector of an unquantised dtype: "float32" for float32 (float64 shares it), None for 16-bit ones."""
    return "float32" if str(dtype).removeprefix("torch.") in ("float32", "float64") else None


def parse_file_name(name: str) -> FileName:
    """Read a file name back; both peers' spellings of block_shape. Raises ConfigFileError if it is no such name.

    The dtype selector is not judged: a file with an unknown one has a name, though no lookup asks for it.
    """
    match = _NAME.fullmatch(name)
    if not match:
        raise ConfigFileError(
            f"{name!r} is not a config file's name. Expected E=<experts>,N=<intermediate size per rank>,"
            "device_name=<device>[,dtype=<selector>][,block_shape=[n, k]][,per_channel_quant=True][_down].json. "
            "Rename it; file_name() builds one."
        )
    found = match.groupdict()
    block = (int(found["block_n"]), int(found["block_k"])) if found["block_n"] else None
    return FileName(
        int(found["num_experts"]),
        int(found["moe_intermediate_size"]),
        found["device_name"],
        found["dtype_selector"],
        block,
        bool(found["per_channel_quant"]),
        bool(found["down"]),
    )


# --- content ------------------------------------------------------------------------------------------------


def read_config_file(path: str | Path) -> dict[int, KernelConfig]:
    """Read batch size -> config, in the file's order (the order decides ties). A `triton_version` is skipped.

    Raises ConfigFileError when the file is missing, not JSON, empty, or an entry is not a KernelConfig; the
    message names the batch size. Values a kernel cannot run are let through: `config.check` knows the chip,
    this does not.
    """
    path = Path(path)
    try:
        content = json.loads(path.read_text(encoding="utf-8"), object_pairs_hook=_no_duplicates)
    except OSError as error:
        raise ConfigFileError(
            f"Cannot read {path}: {error.strerror}. Expected a config file. Check the folder and the name."
        ) from error
    except (ValueError, RecursionError) as error:
        raise ConfigFileError(
            f"{path} is not JSON: {error}. Expected a whole file; it may be cut short. Restore it from git or tune the "
            "shape again."
        ) from error
    if not isinstance(content, dict):
        raise ConfigFileError(
            f"{path} holds a JSON {type(content).__name__}. Expected batch size -> config. Restore it from git."
        )
    content.pop("triton_version", None)  # vLLM writes it, and skips it when reading
    configs = {}
    for key, entry in content.items():
        configs[_batch_key(key, path)] = _entry(key, entry, path)
    if not configs:
        raise ConfigFileError(f"{path} holds no batch size. Expected at least one. Tune the shape again.")
    return configs


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    keys = [key for key, _ in pairs]
    twice = sorted({key for key in keys if keys.count(key) > 1})
    if twice:
        raise ValueError(f"the key {twice[0]!r} stands there twice")
    return dict(pairs)


def _batch_key(key: str, path: Path) -> int:
    if not re.fullmatch(r"[1-9][0-9]*", key):
        raise ConfigFileError(
            f"{path} has the batch size {key!r}. Expected a positive integer in digits. Correct the key."
        )
    return int(key)


def _entry(key: str, entry: Any, path: Path) -> KernelConfig:
    try:
        return KernelConfig.from_json(entry)
    except ConfigError as error:
        raise ConfigFileError(f"{path}, batch size {key}: {error}") from error


def write_config_file(path: str | Path, configs: Mapping[int, KernelConfig]) -> Path:
    """Write batch size -> config as sglang writes it (indent 4, keys ascending, a newline at the end), atomically.

    Every config is first held against the chip-independent rules. Raises ConfigFileError for an empty mapping
    or a batch size under 1, ConfigError for a config that breaks a rule, OSError from the disk.
    """
    from moelab.config import check

    path = Path(path)
    if not configs:
        raise ConfigFileError(f"There is nothing to write to {path}. Expected at least one batch size. Pass one.")
    wrong = [key for key in configs if type(key) is not int or key < 1]
    if wrong:
        raise ConfigFileError(
            f"The batch size {wrong[0]!r} cannot be a key of {path}. Expected an integer >= 1. Correct the key."
        )
    for config in configs.values():
        check(config)
    entries = {str(key): configs[key].to_json() for key in sorted(configs)}
    write_atomically(path, json.dumps(entries, indent=4) + "\n")
    return path


# --- lookup -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Rules:
    """How one loader searches. other_versions: try folders of other Triton versions, newest first;
    down_to_up: where no `_down` file exists, use the up file."""

    name: str
    other_versions: bool
    down_to_up: bool


RULES: Mapping[str, Rules] = {"moelab": Rules("moelab", other_versions=True, down_to_up=True)}
"""Loaders by name. moelab's rules are sglang 0.5.23's."""


@dataclass(frozen=True)
class Step:
    """One thing a lookup tried. what: the file or rule; result: "found", "absent" or "used"; reason: a sentence."""

    what: str
    result: str
    reason: str


@dataclass(frozen=True)
class Lookup:
    """What a lookup answers.

    config: never None for moelab's rules (the default stands in). path and key: the file and its batch size,
    None for the default. is_default: no file was used. steps: what was tried, in order, each with its reason.
    """

    config: KernelConfig | None
    path: Path | None
    key: int | None
    is_default: bool
    steps: tuple[Step, ...]


def nearest_key(keys: Mapping[int, Any] | list[int], num_tokens: int) -> int:
    """The batch size nearest to num_tokens; of two equally near, the one listed first.

    Raises ConfigFileError if there is none.
    """
    if not keys:
        raise ConfigFileError(
            "There is no batch size to choose from. Expected a config file with at least one. Tune the shape."
        )
    return min(keys, key=lambda key: abs(key - num_tokens))


def version_folders(config_dir: Path) -> list[Path]:
    """The triton_X_Y_Z folders below config_dir, newest version first; other names are left out."""
    if not config_dir.is_dir():
        return []
    found = [
        (tuple(map(int, match[1].split("_"))), path)
        for path in config_dir.iterdir()
        if path.is_dir() and (match := _VERSION_FOLDER.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, key=lambda pair: pair[0], reverse=True)]


def lookup(
    num_experts: int,
    moe_intermediate_size: int,
    device: str,
    *,
    num_tokens: int,
    triton_version: str,
    down: bool = False,
    dtype_selector: str | None = None,
    block_shape: tuple[int, int] | None = None,
    per_channel_quant: bool = False,
    config_dir: str | Path | None = None,
    rules: str = "moelab",
) -> Lookup:
    """Find the config for a batch of num_tokens, and say why that one.

    The order: the folder of triton_version, then every other version folder, newest first; for down=True the
    same again with the up file's name; then the default rule. In a file the nearest batch size counts.
    device: as the driver gives it. triton_version: "3.6.0". config_dir: holds the triton_X_Y_Z folders;
    default runtime.config_dir().
    Raises UnknownNameError for unknown rules, ConfigFileError when the file that should be used is broken: a
    broken file is never skipped in silence.
    """
    if rules not in RULES:
        raise UnknownNameError(
            f"Unknown rules {rules!r}.{nearest_names(rules, RULES)} Expected one of {', '.join(RULES)}. Name one."
        )
    if num_tokens < 1:
        raise ConfigFileError(
            f"num_tokens is {num_tokens}. Expected 1 or more: an empty batch needs no config. Skip the call."
        )

    def name(down: bool) -> str:
        return file_name(
            num_experts, moe_intermediate_size, device, dtype_selector, block_shape, per_channel_quant, down
        )

    names = [name(down)] + ([name(False)] if down and RULES[rules].down_to_up else [])
    steps: list[Step] = []
    for path, step in _candidates(_folder(config_dir), names, triton_version, RULES[rules]):
        steps.append(step)
        if path is not None:
            return _from_file(path, num_tokens, steps)
    config = default_config(num_tokens, num_experts)
    relation = "at most" if num_tokens <= num_experts else "more than"
    reason = f"no file was found; batch {num_tokens} is {relation} the {num_experts} experts, so {config.short()}"
    return Lookup(config, None, None, True, (*steps, Step("default rule", "used", reason)))


def _folder(config_dir: str | Path | None) -> Path:
    if config_dir is not None:
        return Path(config_dir)
    from moelab import runtime

    return runtime.config_dir()


def _candidates(
    folder: Path, names: list[str], triton_version: str, rules: Rules
) -> Iterator[tuple[Path | None, Step]]:
    """Each place in the order of search: (path if the file is there, what to report)."""
    from moelab import runtime

    exact = folder / runtime.triton_key(triton_version)
    others = [f for f in version_folders(folder) if f.name != exact.name] if rules.other_versions else []
    for index, name in enumerate(names):
        stand_in = "; no _down file exists, so GEMM2 takes the up file's config" if index else ""
        for place in (exact, *others):
            kind = "the Triton version in use" if place == exact else "another Triton version"
            doubt = "" if place == exact else ", so it may not be the best"
            path = place / name
            if path.is_file():
                yield path, Step(f"{place.name}/{name}", "found", f"it is for {kind}{doubt}{stand_in}")
            else:
                yield None, Step(f"{place.name}/{name}", "absent", f"there is no such file for {kind}")


def _from_file(path: Path, num_tokens: int, steps: list[Step]) -> Lookup:
    configs = read_config_file(path)
    key = nearest_key(configs, num_tokens)
    tied = [k for k in configs if k != key and abs(k - num_tokens) == abs(key - num_tokens)]
    reason = f"of {len(configs)} batch sizes {key} is the nearest to {num_tokens}"
    if tied:
        reason += f"; {tied[0]} is as near, and the one listed first counts"
    return Lookup(configs[key], path, key, False, (*steps, Step(f"batch size {key}", "used", reason)))
