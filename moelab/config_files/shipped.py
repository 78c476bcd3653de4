"""What sglang 0.5.23 ships for a few models, in bf16 and in fp8 blocks, as data/upstream/sglang_shipped_configs.json holds it."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from moelab import runtime, writing
from moelab.config_files.content import read_config_file
from moelab.config_files.names import FileName, checked_name, parse_file_name
from moelab.errors import ConfigFileError, RecordingError
from moelab.reading import read_json


def shipped_files() -> list[dict[str, Any]]:
    """Config files that sglang 0.5.23 ships, as data/upstream/sglang_shipped_configs.json holds them.

    Each: num_experts, moe_intermediate_size, device, triton, down, timed_as_shipped, configs (batch size -> entry); of quantised
    experts dtype_selector and block_shape too.
    Raises RecordingError where the file cannot be read.
    """
    path = runtime.data_dir() / "upstream" / "sglang_shipped_configs.json"
    try:
        return read_json(path)["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RecordingError(
            f"Cannot read {path}: {error}. Expected sglang's config files. Restore the file from git."
        ) from error


def name_of(file: Mapping[str, Any]) -> FileName:
    """The name of one of `shipped_files`, or of `files_below`."""
    return checked_name(
        file["num_experts"], file["moe_intermediate_size"], file["device"], file.get("dtype_selector"),
        file.get("block_shape"), file.get("per_channel_quant", False), down=file["down"], rules="sglang",
    )  # fmt: skip


def files_below(folder: str | Path) -> list[dict[str, Any]]:
    """The compatible kernel's files in the triton_X_Y_Z folders of a tree, as `shipped_files` gives sglang's.

    What is no such file, or cannot be read, is left out: the doctor names it.
    """
    found = []
    for path in sorted(Path(folder).glob("triton_*/*.json")):
        with contextlib.suppress(ConfigFileError):
            name, configs = parse_file_name(path.name, "sglang"), read_config_file(path)
            row = asdict(name) | {"device": name.device_name, "triton": path.parent.name[7:].replace("_", ".")}
            row |= {"timed_as_shipped": None, "configs": {str(b): config.to_json() for b, config in configs.items()}}
            found += [row] if name.kernel is None else []
    return found


def write_shipped(folder: str | Path, files: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Write `files` (default: `shipped_files()`) as sglang's tree has them, configs/triton_X_Y_Z, and return `folder`."""
    for file in shipped_files() if files is None else files:
        name = name_of(file).text("sglang")
        place = Path(folder) / "configs" / f"triton_{file['triton'].replace('.', '_')}" / name
        writing.write(place, json.dumps(file["configs"], indent=4) + "\n")
    return Path(folder)
