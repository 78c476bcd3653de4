"""Bad configs and config files: each a named exception, as tests/test_errors.py says."""

from __future__ import annotations

import dataclasses
import importlib.util
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from error_rows import CONFIG, DEVICE, HUGE, Row, cut, gemm, judge, moe, unhelpful, with_environment, x

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


CONFIGS = [
    Row(
        "SPLIT_K for grouped_gemm",
        lambda _: gemm(config=KernelConfig(16, 16, 16, 1, SPLIT_K=2)),
        ConfigError,
        ("SPLIT_K = 2",),
    ),
    Row(
        "SPLIT_K with empty slices",
        lambda _: gemm(way=split_k_atomic_f32, config=KernelConfig(16, 16, 16, 1, SPLIT_K=4)),
        ConfigError,
        ("SPLIT_K = 4", "empty slices", "K = 32 has 2 blocks"),
    ),
    Row(
        "SPLIT_K with empty slices of GEMM2",
        lambda _: moe("split_k_workspace", config=KernelConfig(16, 16, 16, 1, SPLIT_K=2)),
        ConfigError,
        ("SPLIT_K = 2", "K = 16 has 1 block of"),
    ),
    Row(
        "SPLIT_K under one",
        lambda _: gemm(way=split_k_workspace, config=KernelConfig(16, 16, 16, 1, SPLIT_K=-2)),
        ConfigError,
        ("SPLIT_K = -2", "positive power of two"),
    ),
    Row(
        "SPLIT_K of three",
        lambda _: gemm(way=split_k_atomic_f32, config=KernelConfig(16, 16, 16, 1, SPLIT_K=3)),
        ConfigError,
        ("SPLIT_K = 3",),
    ),
    Row(
        "SPLIT_K in int16",
        lambda _: gemm(way=split_k_workspace, config=KernelConfig(16, 16, 16, 1, SPLIT_K=torch.tensor(2).short())),
        ConfigError,
        ("SPLIT_K is tensor(2, dtype=torch.int16)", "not an integer"),
    ),
    Row(
        "a workspace that does not fit",
        lambda _: new_workspace(16, 2**40, 4096, torch.float32, DEVICE),
        WorkspaceError,
        (str(16 * 2**40 * 4096 * 4), "16 slices"),
    ),
    Row(
        "a workspace too small",
        lambda _: gemm(way=split_k_workspace, workspace=x(3)),
        WorkspaceError,
        ("12 bytes", "1280 bytes"),
    ),
    Row(
        "a workspace in another dtype",
        lambda _: gemm(way=split_k_workspace, workspace=x(999, dtype=torch.float64)),
        DtypeError,
        ("workspace is float64", "float32"),
    ),
    Row("rows aligned for another config", lambda _: gemm(alignment_rows=32), ConfigError, ("aligned to 32", "is 16")),
    Row(
        "two BLOCK_SIZE_M",
        lambda _: moe(config=CONFIG, down_config=KernelConfig(32, 16, 16, 1)),
        ConfigError,
        ("16", "32", "both GEMMs"),
    ),
    Row(
        "a block of 24",
        lambda _: gemm(config=KernelConfig(16, 24, 16, 1)),
        ConfigError,
        ("BLOCK_SIZE_N = 24", "power of two"),
    ),
    Row(
        "a block of 8", lambda _: moe(config=KernelConfig(16, 16, 8, 1)), ConfigError, ("BLOCK_SIZE_K = 8", "under 16")
    ),
    Row(
        "three warps", lambda _: config.check(KernelConfig(16, 16, 16, 1, num_warps=3)), ConfigError, ("num_warps = 3",)
    ),
    Row(
        "a field that is text",
        lambda _: config.check(KernelConfig("16", 16, 16, 1)),
        ConfigError,
        ("BLOCK_SIZE_M", "integer"),
    ),
    Row(
        "over shared memory",
        lambda _: config.check(HUGE, target="sm_90"),
        SharedMemoryError,
        ("393216", "232448", "num_stages"),
    ),
    Row("a target nobody knows", lambda _: config.check(CONFIG, target="sm_9"), UnknownNameError, ("sm_9", "sm_90")),
    Row(
        "a key that is misspelt",
        lambda _: KernelConfig.from_json(CONFIG.to_json() | {"num_warp": 4}),
        ConfigError,
        ("num_warp", "num_warps"),
    ),
    Row(
        "a key that is missing",
        lambda _: KernelConfig.from_json({"BLOCK_SIZE_M": 16}),
        ConfigError,
        ("missing key 'BLOCK_SIZE_N'",),
    ),
    Row("an empty batch", lambda _: config.default_config(0, 8), ConfigError, ("num_tokens = 0",)),
    Row(
        "a config file cut short",
        lambda p: config_files.read_config_file(a_config_file(p, cut)),
        ConfigFileError,
        ("not JSON", "cut short"),
    ),
    Row(
        "a config file that is not there",
        lambda p: config_files.read_config_file(p / "E=1"),
        ConfigFileError,
        ("E=1", "Cannot read"),
    ),
    Row(
        "a config file of a list",
        lambda p: config_files.read_config_file(a_config_file(p, lambda _: "[]")),
        ConfigFileError,
        ("list",),
    ),
    Row(
        "a config file without batches",
        lambda p: config_files.read_config_file(a_config_file(p, lambda _: "{}")),
        ConfigFileError,
        ("no batch size",),
    ),
    Row(
        "a batch size of -1",
        lambda p: config_files.read_config_file(a_config_file(p, lambda t: t.replace('"1"', '"-1"'))),
        ConfigFileError,
        ("'-1'",),
    ),
    Row(
        "a config file's name",
        lambda _: config_files.parse_file_name("E=8.json"),
        ConfigFileError,
        ("E=8.json", "device_name"),
    ),
    Row(
        "a device name with a comma",
        lambda _: config_files.file_name(8, 64, "a,b"),
        ConfigFileError,
        ("a,b", "NVIDIA H200"),
    ),
    Row(
        "a dtype selector", lambda _: config_files.file_name(8, 64, "X", "fp8"), UnknownNameError, ("'fp8'", "fp8_w8a8")
    ),
    Row("rules nobody knows", lambda p: look_up(p, rules="vllmm"), UnknownNameError, ("vllmm", "moelab")),
    Row("a broken file is not skipped", lambda p: look_up(p, change=cut), ConfigFileError, ("not JSON",)),
    Row(
        "a kernel's name in a file name",
        lambda _: config_files.file_name(8, 64, "X", kernel="Split-K"),
        ConfigFileError,
        ("'Split-K'", "split_k_workspace"),
    ),
    Row(
        "a kernel that a peer does not look up",
        lambda p: look_up(p, rules="vllm", kernel="split_k_workspace"),
        ConfigFileError,
        ("split_k_workspace", "rules='moelab'"),
    ),
    Row(
        "sglang without configs/ below its folder",
        lambda p: look_up(p, rules="sglang"),
        ConfigFileError,
        ("FileNotFoundError", "SGLANG_MOE_CONFIG_DIR", "configs/"),
    ),
    Row(
        "a folder that ends sglang's search",
        lambda p: look_up(
            make(p / "configs"), rules="sglang", config_dir=p, more=("triton_old",), triton_version="3.7.1"
        ),
        ConfigFileError,
        ("triton_old", "ValueError"),
    ),
    Row(
        "vLLM's format in sglang's tree",
        lambda p: config_files.read_config_file(
            a_config_file(p, lambda t: t.replace("{", '{"triton_version": "3.6.0",', 1)), "sglang"
        ),
        ConfigFileError,
        ("'triton_version'", "moelab export"),
    ),
    Row(
        "a variable that names no folder of configs",
        lambda p: with_environment("MOELAB_CONFIG_DIR", str(p / "gone"), lambda: look_up_in_variable("moelab")),
        FolderError,
        ("MOELAB_CONFIG_DIR", "gone", "triton_X_Y_Z"),
    ),
    Row("a peer that is not installed", lambda _: no_folder("vllm"), ConfigFileError, ("VLLM_TUNED_CONFIG_FOLDER",)),
    Row(
        "an export over a file that is there",
        lambda p: [exported(p) for _ in range(2)],
        ConfigFileError,
        ("exists already", "--overwrite"),
    ),
    Row(
        "an export that no lookup would find",
        lambda p: exported(p, rules="vllm", down=True),
        ConfigFileError,
        ("_down", "vllm", "one config serves both"),
    ),
    Row(
        "an export of what the device cannot run",
        lambda p: exported(p, HUGE),
        ConfigError,
        ("batch size 1", "NVIDIA_H200", "shared memory"),
    ),
    Row(
        "an export of SPLIT_K to a peer",
        lambda p: exported(p, dataclasses.replace(CONFIG, SPLIT_K=2), rules="vllm"),
        ConfigError,
        ("SPLIT_K = 2", "vllm"),
    ),
    Row(
        "an export of a down config with another BLOCK_SIZE_M",
        lambda p: exported(p, KernelConfig(64, 64, 64, 1), down=True),
        ConfigFileError,
        ("BLOCK_SIZE_M = 64", "has 16", "up file first"),
    ),
    Row("an export's Triton version", lambda p: exported(p, version="3.6"), ConfigFileError, ("'3.6'", "3.6.0")),
    Row(
        "an export of a folder that a peer has no names for",
        lambda p: exported(p, down=True) and config_commands.export(p, rules="vllm", out=p / "out"),
        ConfigFileError,
        ("vllm", "Nothing of"),
    ),
    Row(
        "an odd N in vLLM's int4 names",
        lambda _: config_files.parse_file_name("E=8,N=5,device_name=X,dtype=int4_w4a16.json", "vllm"),
        ConfigFileError,
        ("odd N", "even"),
    ),
    Row("an export of nothing", config_files.sources, ConfigFileError, ("no config file",)),
    Row("an export of an unknown version", export_flat, ConfigFileError, ("--triton-version",)),
    Row("a doctor with no folder", lambda p: config_files.doctor(p / "gone"), ConfigFileError, ("gone",)),
    Row("a doctor with no files", config_files.doctor, ConfigFileError, ("no config file", "device_name")),
    Row(
        "a doctor between two trees",
        lambda p: [exported(p / name) for name in "ab"] and config_files.doctor(p),
        ConfigFileError,
        ("2 trees", "/a", "/b"),
    ),
    Row(
        "a doctor's rules",
        lambda p: exported(p) and config_files.doctor(p, "vlm"),
        UnknownNameError,
        ("'vlm'", "Did you mean vllm"),
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


@pytest.mark.parametrize("row", CONFIGS, ids=lambda row: row.label)
def test_bad_input_is_named(row: Row, tmp_path: Path) -> None:
    complaint = unhelpful(judge(row, tmp_path))
    assert complaint is None, complaint
