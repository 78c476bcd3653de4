"""What a config file holds: batch size -> KernelConfig, read strictly, written as sglang or vLLM write it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from moelab import writing
from moelab.config import KernelConfig, check
from moelab.config_files.rules import Rules, get_rules
from moelab.errors import ConfigError, ConfigFileError
from moelab.reading import MIB, UnreadableError, read_json

LARGEST = 16 * MIB
"""Bytes of the largest config file that is read: 100,000 batch sizes; the peers' have some 20."""

BATCH_KEY = re.compile(r"[1-9][0-9]{0,9}")
"""A batch size as a key: a positive integer in digits, of a size that a batch may have."""

TRITON_VERSION = re.compile(r"\d+\.\d+\.\d+([.+a-z0-9]*)")
"""What a triton_version says: three numbers, and what a development version puts behind them."""


def read_config_file(path: str | Path, rules: str | Rules = "moelab") -> dict[int, KernelConfig]:
    """Read batch size -> config, in the file's order (the order decides ties), as the loader `rules` would.

    vLLM's top-level `triton_version` is skipped, but under sglang's rules it is an error, for it ends sglang's
    load. Keys that only the peers' kernels take (`Rules.extra_keys`) are left out.
    Raises ConfigFileError when the file is missing, not JSON, empty, or an entry is not a KernelConfig; the
    message names the batch size. Values a kernel cannot run are let through: `config.check` knows the chip,
    this does not.
    """
    return read_with_rest(path, rules)[0]


def read_with_rest(path: str | Path, rules: str | Rules) -> tuple[dict[int, KernelConfig], dict[int, dict[str, Any]]]:
    """The configs of `read_config_file`, and for each batch size the keys that were left out."""
    path, rules = Path(path), get_rules(rules)
    content = parse(path)
    version = content.pop("triton_version", None)
    if version is not None and not (isinstance(version, str) and TRITON_VERSION.fullmatch(version)):
        raise ConfigFileError(
            f"{path} has the triton_version {str(version)[:60]!r}. Expected three numbers in a string, such as 3.6.0. Correct it."
        )
    if version is not None and not rules.reads_triton_version:
        raise ConfigFileError(
            f"{path} has the key 'triton_version', which ends {rules.name}'s load with a ValueError: it reads every key as "
            "a batch size. Expected batch sizes alone. Correct the file: `moelab export` writes it in either format."
        )
    configs, rest = {}, {}
    for text, entry in content.items():
        key = batch_key(text, path)
        configs[key], rest[key] = _entry(text, entry, path, rules)
    if not configs:
        raise ConfigFileError(f"{path} holds no batch size. Expected at least one. Tune the shape again.")
    return configs, rest


def parse(path: Path) -> dict[str, Any]:
    """The file's JSON object. Raises ConfigFileError when it is missing, not JSON, or another kind of JSON."""
    try:
        content = read_json(path, LARGEST)
    except OSError as error:
        raise ConfigFileError(
            f"Cannot read {path}: {error.strerror}. Expected a config file. Check the folder and the name."
        ) from error
    except UnreadableError as error:
        raise ConfigFileError(
            f"{path} {error}. Expected a whole config file; it may be cut short. Restore it from git or tune the shape again."
        ) from None
    if not isinstance(content, dict):
        raise ConfigFileError(
            f"{path} holds a JSON {type(content).__name__}. Expected batch size -> config. Restore it from git."
        )
    return content


def batch_key(key: str, path: Path) -> int:
    """A batch size as a key of the file. Raises ConfigFileError for anything but a positive integer in digits."""
    if not BATCH_KEY.fullmatch(key):
        raise ConfigFileError(
            f"{path} has the batch size {key[:60]!r}. Expected a positive integer of at most ten digits. Correct the key."
        )
    return int(key)


def split_entry(entry: Any, rules: Rules) -> tuple[Any, dict[str, Any]]:
    """An entry without the keys that only the peer's kernel takes, and those keys."""
    if not isinstance(entry, Mapping):
        return entry, {}
    rest = {key: entry[key] for key in rules.extra_keys if key in entry}
    return {key: value for key, value in entry.items() if key not in rest}, rest


def _entry(key: str, entry: Any, path: Path, rules: Rules) -> tuple[KernelConfig, dict[str, Any]]:
    ours, rest = split_entry(entry, rules)
    try:
        return KernelConfig.from_json(ours), rest
    except ConfigError as error:
        raise ConfigFileError(f"{path}, batch size {key}: {error}") from error


def config_text(configs: Mapping[int, KernelConfig], *, triton_version: str | None = None) -> str:
    """The file's text: indent 4, batch sizes ascending, a newline at the end; triton_version first, if given."""
    head = {} if triton_version is None else {"triton_version": triton_version}
    return json.dumps(head | {str(key): configs[key].to_json() for key in sorted(configs)}, indent=4) + "\n"


def write_config_file(
    path: str | Path, configs: Mapping[int, KernelConfig], *, triton_version: str | None = None
) -> Path:
    """Write batch size -> config as sglang writes it, or with triton_version as vLLM does, atomically.

    Raises what `file_text` raises, OSError from the disk.
    """
    return writing.write(path, file_text(path, configs, triton_version=triton_version))


def file_text(path: str | Path, configs: Mapping[int, KernelConfig], *, triton_version: str | None = None) -> str:
    """The text of a config file that is to lie at `path`: what `write_config_file` writes.

    Every config is first held against the chip-independent rules (in a `kernel=` file, blocks may be under 16:
    such a kernel need not use `tl.dot`). Raises ConfigFileError for an empty mapping or a batch size under 1,
    ConfigError for a config that breaks a rule.
    """
    path = Path(path)
    if not configs:
        raise ConfigFileError(f"There is nothing to write to {path}. Expected at least one batch size. Pass one.")
    wrong = [key for key in configs if type(key) is not int or key < 1]
    if wrong:
        raise ConfigFileError(
            f"The batch size {wrong[0]!r} cannot be a key of {path}. Expected an integer >= 1. Correct the key."
        )
    for config in configs.values():
        check(config, uses_dot=",kernel=" not in path.name)
    return config_text(configs, triton_version=triton_version)
