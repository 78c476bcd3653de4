"""A tree of configs with every mistake that the doctor knows, for its tests and for 06_config_health.

The specimen lies as sglang's tree does (configs/triton_X_Y_Z), so that `doctor` reads it under sglang's rules. Its files
have numbers of experts that no preset has, one for each mistake: a name can say little more, for the name is what loaders
search by.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.config import KernelConfig

VERSION = "configs/triton_3_6_0"
GONE = "a link to a file that is not there"
"""The content of a mistake whose file cannot be read."""

_KEYS = (1, 4, 16, 64, 256, 1024)
_GOOD = {str(key): KernelConfig(16, 64, 64, 1).to_json() for key in _KEYS}
_TEXT = json.dumps(_GOOD, indent=4)


@dataclass(frozen=True)
class Mistake:
    """One thing done wrong. problem: what the doctor calls it; what: what was done; path: below the specimen.

    content: the file's JSON, or its text as it stands; None makes a folder. rules: whose doctor calls it that.
    """

    problem: str
    what: str
    path: str
    content: Any
    rules: str = "sglang"


def _changed(change: Mapping[str, Any], without: str = "") -> dict[str, Any]:
    return {key: {k: v for k, v in {**entry, **change}.items() if k != without} for key, entry in _GOOD.items()}


def _named(num_experts: int, rest: str = "", device: str = "NVIDIA_H200", size: int = 128) -> str:
    return f"E={num_experts},N={size},device_name={device}{rest}.json"


def _here(num_experts: int, rest: str = "", device: str = "NVIDIA_H200", size: int = 128) -> str:
    return f"{VERSION}/{_named(num_experts, rest, device, size)}"


_FLAT_DOWN = _named(1003, "_down")
_FP8 = ",dtype=fp8_w8a8,block_shape=[128, 128]"

_FLAT_FP8 = _named(1065, _FP8.replace(", 128]", ",128]"))

MISTAKES: tuple[Mistake, ...] = (
    Mistake("wrong_folder", "in a folder that the loader once read", f"old/triton_3_6_0/{_named(1001)}", _GOOD),
    Mistake("wrong_folder", "beside configs/, as vLLM's files lie", _FLAT_DOWN, _GOOD),
    Mistake("never_asked_for", "a _down file, for which vLLM never asks", _FLAT_DOWN, _GOOD, "vllm"),
    Mistake("wrong_folder", "a block file beside configs/", _FLAT_FP8, _changed({"BLOCK_SIZE_K": 256})),
    Mistake("cut_step", "a step over the block, which vLLM cuts", _FLAT_FP8, _changed({"BLOCK_SIZE_K": 256}), "vllm"),
    Mistake("version_folder", "in triton-3.6.0 instead of triton_3_6_0", f"configs/triton-3.6.0/{_named(1005)}", _GOOD),
    Mistake("version_folder", "a version of two numbers, which is never in use", "configs/triton_3_5", None),
    Mistake("stopping_folder", "a folder that starts with triton_ and goes on without numbers", "configs/triton_old", None),
    Mistake("empty_device_name", "tuned where the GPU could not be asked for its name", _here(1007, device=""), _GOOD),
    Mistake("device_name", "spaces left in the device's name", _here(1009, device="NVIDIA H200"), _GOOD),
    Mistake("dtype_selector", "a selector that no loader has", _here(1011, ",dtype=fp8_w8a9"), _GOOD),
    Mistake("dtype_selector", "a selector for a dtype that needs none", _here(1013, ",dtype=bfloat16"), _GOOD),
    Mistake("block_shape", "block_shape spelled as vLLM does", _here(1015, _FP8.replace(", 128]", ",128]")), _GOOD),
    Mistake("misspelt_name", "small e and n", f"{VERSION}/e=1017,n=128,device_name=NVIDIA_H200.json", _GOOD),
    Mistake("misspelt_name", "a backup copy", f"{VERSION}/{_named(1019)}.bak", _GOOD),
    Mistake("shared_memory", "more shared memory than the chip has", _here(1021),
            _changed({"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 256, "BLOCK_SIZE_K": 128, "num_warps": 8})),
    Mistake("not_power_of_two", "BLOCK_SIZE_M of 48", _here(1023), _changed({"BLOCK_SIZE_M": 48})),
    Mistake("invalid_value", "three warps", _here(1025), _changed({"num_warps": 3})),
    Mistake("missing_key", "no BLOCK_SIZE_N", _here(1027), _changed({}, without="BLOCK_SIZE_N")),
    Mistake("unknown_key", "BLOCKSIZE_N for BLOCK_SIZE_N", _here(1029), _changed({"BLOCKSIZE_N": 64})),
    Mistake("unknown_key", "a key of AMD's on an NVIDIA chip", _here(1031), _changed({"waves_per_eu": 2})),
    Mistake("not_an_integer", "num_warps of 4.0", _here(1033), _changed({"num_warps": 4.0})),
    Mistake("not_json", "cut short", _here(1035), _TEXT[:-30] + "\n"),
    Mistake("not_json", "a batch size twice", _here(1037), _TEXT.replace('"16"', '"4"') + "\n"),
    Mistake("not_batch_sizes", "a list of tables", _here(1039), [_GOOD]),
    Mistake("no_batch_size", "an empty table", _here(1041), {}),
    Mistake("batch_size", "a batch size in words", _here(1043), _GOOD | {"many": _GOOD["1"]}),
    Mistake("not_a_config", "a number where a config should be", _here(1045), _GOOD | {"1": 3}),
    Mistake("triton_version", "vLLM's triton_version in sglang's tree", _here(1047), _GOOD | {"triton_version": "3.6.0"}),
    Mistake("block_shape", "BLOCK_SIZE_K over the quantisation block", _here(1049, _FP8), _changed({"BLOCK_SIZE_K": 256})),
    Mistake("unreadable", GONE, _here(1051), GONE),
    Mistake("sparse", "tuned for batch 1 and 1024 alone", _here(1053), {key: _GOOD[key] for key in ("1", "1024")}),
    Mistake("no_newline", "no newline at the end", _here(1055), _TEXT),
    Mistake("block_m_mismatch", "GEMM2 tuned under another BLOCK_SIZE_M", _here(1057, "_down"),
            _changed({"BLOCK_SIZE_M": 32})),
    Mistake("unknown_device", "a device that data/devices does not have", _here(1059, device="Abacus_9"), _GOOD),
    Mistake("left_out", "USE_TMA, which only sglang's kernel heeds", _here(1063), _changed({"USE_TMA": True}), "moelab"),
    Mistake("unpacked_columns", "an int4 file named by values, not bytes", _here(384, ",dtype=int4_w4a16", size=2048), _GOOD),
    Mistake("forms", "a file of forms of another version", _here(1069, ",kernel=fast"), {"forms_version": 0, "layers": {}}),
    Mistake("shared", "a name that fits two models", _here(128, size=768), _GOOD),
)  # fmt: skip
"""Every kind of finding, most of them once."""

SOUND = (_here(1057), "configs/triton_3_5/" + _named(1061))
"""Files of the specimen that have nothing wrong: one is the up file beside the _down file, one makes a folder."""


def write_specimen(folder: str | Path) -> Path:
    """Write every mistake below `folder`, which is made if it is not there, and return it."""
    root = Path(folder)
    for mistake in MISTAKES:
        place = root / mistake.path
        place.parent.mkdir(parents=True, exist_ok=True)
        if mistake.content is None:
            place.mkdir(exist_ok=True)
        elif mistake.content is GONE:
            place.unlink(missing_ok=True)
            place.symlink_to("gone.json")
        else:
            place.write_text(_text(mistake.content), encoding="utf-8")
    for path in SOUND:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).write_text(_text(_GOOD), encoding="utf-8")
    return root


def _text(content: Any) -> str:
    return content if isinstance(content, str) else json.dumps(content, indent=4) + "\n"


def planted(rules: str = "sglang") -> dict[str, tuple[str, str]]:
    """path -> (problem, what was done), as the doctor under `rules` should find it; the specimen's path with /."""
    return {mistake.path: (mistake.problem, mistake.what) for mistake in MISTAKES if mistake.rules == rules}
