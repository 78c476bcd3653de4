"""What sglang 0.5.23 ships for a few models, in bf16 and in fp8 blocks, as data/upstream/sglang_shipped_configs.json holds it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moelab import runtime, writing
from moelab.config_files.names import FileName, checked_name
from moelab.errors import RecordingError
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
    """The name of one of `shipped_files`."""
    return checked_name(
        file["num_experts"], file["moe_intermediate_size"], file["device"], file.get("dtype_selector"),
        file.get("block_shape"), down=file["down"], rules="sglang",
    )  # fmt: skip


def write_shipped(folder: str | Path, files: Sequence[Mapping[str, Any]] | None = None) -> Path:
    """Write `files` (default: `shipped_files()`) as sglang's tree has them, configs/triton_X_Y_Z, and return `folder`."""
    for file in shipped_files() if files is None else files:
        name = name_of(file).text("sglang")
        place = Path(folder) / "configs" / f"triton_{file['triton'].replace('.', '_')}" / name
        writing.write(place, json.dumps(file["configs"], indent=4) + "\n")
    return Path(folder)
