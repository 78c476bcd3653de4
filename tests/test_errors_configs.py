"""Bad configs and config files: each a named exception, as tests/test_errors.py says."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from error_rows import CONFIG, DEVICE, HUGE, Row, cut, every, gemm, judge, moe, rows, with_environment, x

from moelab import config, config_files
from moelab.cli import config_commands
from moelab.config import KernelConfig
from moelab.errors import (
    ConfigError,
    ConfigFileError,
    DtypeError,
    FolderError,
    SharedMemoryError,
    UnknownNameError,
    WorkspaceError,
)
from moelab.kernels.split_k_atomic import split_k_atomic_f32
from moelab.kernels.split_k_workspace import new_workspace, split_k_workspace


def a_config_file(folder: Path, change: Callable[[str], str]) -> Path:
    path = folder / "E=8,N=14336,device_name=NVIDIA_H200.json"
    config_files.write_config_file(path, {1: CONFIG})
    path.write_text(change(path.read_text()))
    return path


def exported(
    folder: Path,
    with_config: KernelConfig | None = None,
    rules: str = "moelab",
    version: str = "3.6.0",
    down: bool = False,
) -> object:
    name = config_files.FileName(8, 14336, "NVIDIA_H200", down=down)
    return config_files.export({1: with_config or CONFIG}, name, rules=rules, out=folder, triton_version=version)


def export_flat(folder: Path) -> None:
    """A file that says nowhere under which Triton version it was tuned, through the command itself."""
    config_commands.export(a_config_file(folder, str), rules="vllm", out=folder / "out")


def no_folder(rules: str) -> object:
    if importlib.util.find_spec(rules) or config_files.RULES[rules].environment in os.environ:
        pytest.skip(f"{rules} has a folder here")
    return look_up_in_variable(rules)


def split(splits: object) -> KernelConfig:
    return dataclasses.replace(CONFIG, SPLIT_K=splits)


def read_changed(folder: Path, change: Callable[[str], str], *rules: str) -> object:
    return config_files.read_config_file(a_config_file(folder, change), *rules)


CONFIGS = [
    *rows(
        ConfigError,
        ("SPLIT_K = 2", lambda _: gemm(config=split(2))),
        ("SPLIT_K = 4|empty slices|K = 32 has 2 blocks", lambda _: gemm(way=split_k_atomic_f32, config=split(4))),
        ("SPLIT_K = 2|K = 16 has 1 block of", lambda _: moe("split_k_workspace", config=split(2))),
        ("SPLIT_K = -2|positive power of two", lambda _: gemm(way=split_k_workspace, config=split(-2))),
        ("SPLIT_K = 3", lambda _: gemm(way=split_k_atomic_f32, config=split(3))),
        (
            "SPLIT_K is tensor(2, dtype=torch.int16)|not an integer",
            lambda _: gemm(way=split_k_workspace, config=split(torch.tensor(2).short())),
        ),
        ("aligned to 32|is 16", lambda _: gemm(alignment_rows=32)),
        ("16|32|both GEMMs", lambda _: moe(config=CONFIG, down_config=KernelConfig(32, 16, 16, 1))),
        ("BLOCK_SIZE_N = 24|power of two", lambda _: gemm(config=KernelConfig(16, 24, 16, 1))),
        ("BLOCK_SIZE_K = 8|under 16", lambda _: moe(config=KernelConfig(16, 16, 8, 1))),
        ("num_warps = 3", lambda _: config.check(KernelConfig(16, 16, 16, 1, num_warps=3))),
        ("BLOCK_SIZE_M|integer", lambda _: config.check(KernelConfig("16", 16, 16, 1))),
        ("num_warp|num_warps", lambda _: KernelConfig.from_json(CONFIG.to_json() | {"num_warp": 4})),
        ("missing key 'BLOCK_SIZE_N'", lambda _: KernelConfig.from_json({"BLOCK_SIZE_M": 16})),
        ("num_tokens = 0", lambda _: config.default_config(0, 8)),
        ("batch size 1|NVIDIA_H200|shared memory", lambda p: exported(p, HUGE)),
        ("SPLIT_K = 2|vllm", lambda p: exported(p, split(2), rules="vllm")),
    ),
    *rows(
        WorkspaceError,
        (f"{16 * 2**40 * 4096 * 4}|16 slices", lambda _: new_workspace(16, 2**40, 4096, torch.float32, DEVICE)),
        ("12 bytes|1280 bytes", lambda _: gemm(way=split_k_workspace, workspace=x(3))),
    ),
    *rows(
        DtypeError,
        ("workspace is float64|float32", lambda _: gemm(way=split_k_workspace, workspace=x(999, dtype=torch.float64))),
    ),
    Row(SharedMemoryError, "393216|232448|num_stages", lambda _: config.check(HUGE, target="sm_90")),
    Row(UnknownNameError, "sm_9|sm_90", lambda _: config.check(CONFIG, target="sm_9")),
    Row(UnknownNameError, "'fp8'|fp8_w8a8", lambda _: config_files.file_name(8, 64, "X", "fp8")),
    Row(UnknownNameError, "vllmm|moelab", lambda p: look_up(p, rules="vllmm")),
    Row(UnknownNameError, "'vlm'|Did you mean vllm", lambda p: exported(p) and config_files.doctor(p, "vlm")),
    *rows(
        ConfigFileError,
        ("not strict JSON|cut short", lambda p: read_changed(p, cut)),
        ("E=1|Cannot read", lambda p: config_files.read_config_file(p / "E=1")),
        ("list", lambda p: read_changed(p, lambda _: "[]")),
        ("no batch size", lambda p: read_changed(p, lambda _: "{}")),
        ("'-1'", lambda p: read_changed(p, lambda t: t.replace('"1"', '"-1"'))),
        ("E=8.json|device_name", lambda _: config_files.parse_file_name("E=8.json")),
        ("a,b|NVIDIA H200", lambda _: config_files.file_name(8, 64, "a,b")),
        ("not strict JSON", lambda p: look_up(p, change=cut)),
        ("'Split-K'|split_k_workspace", lambda _: config_files.file_name(8, 64, "X", kernel="Split-K")),
        ("split_k_workspace|rules='moelab'", lambda p: look_up(p, rules="vllm", kernel="split_k_workspace")),
        ("FileNotFoundError|SGLANG_MOE_CONFIG_DIR|configs/", lambda p: look_up(p, rules="sglang")),
        (
            "triton_old|ValueError",
            lambda p: look_up(
                make(p / "configs"), rules="sglang", config_dir=p, more=("triton_old",), triton_version="3.7.1"
            ),
        ),
        (
            "'triton_version'|moelab export",
            lambda p: read_changed(p, lambda t: t.replace("{", '{"triton_version": "3.6.0",', 1), "sglang"),
        ),
        ("VLLM_TUNED_CONFIG_FOLDER", lambda _: no_folder("vllm")),
        ("exists already|--overwrite", lambda p: [exported(p) for _ in range(2)]),
        ("_down|vllm|one config serves both", lambda p: exported(p, rules="vllm", down=True)),
        ("BLOCK_SIZE_M = 64|has 16|write both at once", lambda p: exported(p, KernelConfig(64, 64, 64, 1), down=True)),
        ("'3.6'|3.6.0", lambda p: exported(p, version="3.6")),
        (
            "vllm|Nothing of",
            lambda p: exported(p, down=True) and config_commands.export(p, rules="vllm", out=p / "out"),
        ),
        ("odd N|even", lambda _: config_files.parse_file_name("E=8,N=5,device_name=X,dtype=int4_w4a16.json", "vllm")),
        ("no config file", config_files.sources),
        ("--triton-version", export_flat),
        ("gone", lambda p: config_files.doctor(p / "gone")),
        ("no config file|device_name", config_files.doctor),
        ("2 trees|/a|/b", lambda p: [exported(p / name) for name in "ab"] and config_files.doctor(p)),
    ),
    Row(
        FolderError,
        "MOELAB_CONFIG_DIR|gone|triton_X_Y_Z",
        lambda p: with_environment("MOELAB_CONFIG_DIR", str(p / "gone"), lambda: look_up_in_variable("moelab")),
    ),
]


def look_up(
    folder: Path,
    *,
    change: Callable[[str], str] = str,
    more: tuple[str, ...] = (),
    config_dir: Path | None = None,
    triton_version: str = "3.6.0",
    **given: object,
) -> object:
    """Look up a file that lies in folder/triton_3_6_0, beside folders named `more`."""
    a_config_file(folder, change).rename(make(folder / "triton_3_6_0") / "E=8,N=14336,device_name=NVIDIA_H200.json")
    for name in more:
        make(folder / name)
    return config_files.lookup(
        8, 14336, "NVIDIA H200", num_tokens=1, triton_version=triton_version, config_dir=config_dir or folder, **given
    )


def look_up_in_variable(rules: str) -> object:
    return config_files.lookup(8, 64, "X", num_tokens=1, triton_version="3.6.0", rules=rules)


def make(folder: Path) -> Path:
    folder.mkdir()
    return folder


@every(CONFIGS)
def test_bad_input_is_named(row: Row, tmp_path: Path) -> None:
    judge(row, tmp_path)
