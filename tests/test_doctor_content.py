"""config_files.doctor: files that a lookup reaches, and no kernel takes or that do less than they could."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from test_doctor import DOWN, GOOD, UP, V, entries, only, put

from moelab import config_files as cf
from moelab.config import KernelConfig

# --- what a lookup reaches and no kernel takes --------------------------------------------------------------

FP8 = "E=4,N=128,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json"
FLAT_FP8 = FP8.replace("[128, 128]", "[128,128]")


@pytest.mark.parametrize(
    ("name", "content", "problem", "words"),
    [
        (
            UP,
            entries({"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 256, "BLOCK_SIZE_K": 128, "num_warps": 8}),
            "shared_memory",
            "232448",
        ),
        (UP, entries({"BLOCK_SIZE_M": 48}), "not_power_of_two", "BLOCK_SIZE_M = 48"),
        (UP, entries({"BLOCK_SIZE_M": 8}), "invalid_value", "under 16"),
        (UP, entries({"num_warps": 3}), "invalid_value", "num_warps = 3"),
        (UP, entries({}, without="BLOCK_SIZE_N"), "missing_key", "BLOCK_SIZE_N"),
        (UP, entries({"BLOCKSIZE_N": 64}), "unknown_key", "Did you mean BLOCK_SIZE_N"),
        (UP, entries({"waves_per_eu": 2}), "unknown_key", "AMD"),
        (UP, entries({"num_warps": 4.0}), "not_an_integer", "4.0"),
        (UP, entries({"num_warps": True}), "not_an_integer", "True"),
        (UP, entries({"num_warps": "4"}), "not_an_integer", "'4'"),
        (UP, json.dumps(GOOD)[:-30], "not_json", "it is not strict JSON"),
        (UP, json.dumps(GOOD).replace('"16"', '"4"'), "not_json", "the key '4' twice"),
        (UP, [GOOD], "not_batch_sizes", "list"),
        (UP, '{"triton_version": "3.6.0"}', "no_batch_size", "default"),
        (UP, GOOD | {"many": GOOD["1"]}, "batch_size", "'many'"),
        (UP, GOOD | {"0": GOOD["1"]}, "batch_size", "'0'"),
        (UP, GOOD | {"1": 3}, "not_a_config", "int"),
        (FP8, entries({"BLOCK_SIZE_K": 256}), "block_shape", "does not divide"),
    ],
)
def test_untaken(name: str, content: object, problem: str, words: str, tmp_path: Path) -> None:
    path = put(tmp_path / V / name, content)
    finding = only(cf.doctor(tmp_path))
    assert (finding.path, finding.severity, finding.problem) == (path, "error", problem)
    assert words in finding.reason


def test_not_utf8_and_not_readable(tmp_path: Path) -> None:
    put(tmp_path / V / UP).write_bytes(b"\xff\xfe{}")
    assert only(cf.doctor(tmp_path)).problem == "not_json"
    (tmp_path / V / UP).unlink()
    (tmp_path / V / UP).symlink_to(tmp_path / "gone")
    assert only(cf.doctor(tmp_path)).problem == "unreadable"


def test_batch_sizes_with_one_fault_are_one_finding(tmp_path: Path) -> None:
    put(tmp_path / V / UP, entries({"BLOCK_SIZE_M": 48}) | {"1": GOOD["1"]})
    assert only(cf.doctor(tmp_path)).reason.startswith("batch 4, 16, 64, 256 and 1 more: ")


@pytest.mark.parametrize(
    ("content", "moelab", "sglang", "vllm"),
    [
        (GOOD | {"triton_version": "3.6.0"}, "", "triton_version", ""),
        (entries({"USE_TMA": True}), "left_out", "", "unknown_key"),
        (entries({"USE_TMA": False}), "", "", "unknown_key"),
        (entries({"USE_TMA": 1}), "not_an_integer", "not_an_integer", "unknown_key"),
        (entries({"num_ctas": 1}), "unknown_key", "", ""),
        (entries({"SPLIT_K": 1}), "", "unknown_key", ""),
        (entries({"SPLIT_K": 2}), "", "unknown_key", "invalid_value"),
        (entries({"BLOCK_SIZE_M": 8}), "invalid_value", "", ""),
    ],
)
def test_loaders_differ_in_what_they_take(content: dict, moelab: str, sglang: str, vllm: str, tmp_path: Path) -> None:
    put(tmp_path / "configs" / V / UP, content)
    put(tmp_path / "flat" / UP, content)
    trees = {"moelab": "configs", "sglang": ".", "vllm": "flat"}
    found = {rules: cf.doctor(tmp_path / folder, rules) for rules, folder in trees.items()}
    problems = {
        rules: {f.problem for f in report.findings if f.problem != "wrong_folder"} for rules, report in found.items()
    }
    assert all(f.severity == "note" for report in found.values() for f in report.findings if f.problem == "left_out")
    expected = {"moelab": moelab, "sglang": sglang, "vllm": vllm}
    assert problems == {rules: {problem} - {""} for rules, problem in expected.items()}


def test_vllm_cuts_block_k(tmp_path: Path) -> None:
    put(tmp_path / FLAT_FP8, entries({"BLOCK_SIZE_K": 256}))
    assert only(cf.doctor(tmp_path, "vllm")).problem == "cut_step"


def test_the_device_decides(tmp_path: Path) -> None:
    """64 KiB on an MI325X, 227 KiB on an H200; on a device that nobody described, a note says what was not checked."""
    content = entries({"BLOCK_SIZE_M": 128, "BLOCK_SIZE_N": 128, "num_stages": 4})
    put(tmp_path / V / UP, content)
    assert cf.doctor(tmp_path).findings == ()
    put(tmp_path / V / UP.replace("NVIDIA_H200", "AMD_Instinct_MI325X"), content | entries({"waves_per_eu": 2}))
    assert cf.doctor(tmp_path).findings == ()
    put(tmp_path / V / UP.replace("NVIDIA_H200", "AMD_Instinct_MI325X"), content)
    assert only(cf.doctor(tmp_path)).problem == "shared_memory"
    (tmp_path / V / UP.replace("NVIDIA_H200", "AMD_Instinct_MI325X")).unlink()
    put(tmp_path / V / UP.replace("NVIDIA_H200", "Abacus_9"), content)
    assert (only(cf.doctor(tmp_path)).severity, only(cf.doctor(tmp_path)).problem) == ("note", "unknown_device")


# --- what is read and does less than it could ---------------------------------------------------------------


@pytest.mark.parametrize(("rules", "severity"), [("moelab", "error"), ("sglang", "warning")])
def test_up_and_down_that_differ_in_block_m(rules: str, severity: str, tmp_path: Path) -> None:
    put(tmp_path / "configs" / V / UP, GOOD | {"64": KernelConfig(64, 64, 64, 1).to_json()})
    put(tmp_path / "configs" / "triton_3_5_1" / DOWN)  # the up file is found in another version's folder
    finding = only(cf.doctor(tmp_path / "configs" if rules == "moelab" else tmp_path, rules))
    assert (finding.path.name, finding.severity, finding.problem) == (DOWN, severity, "block_m_mismatch")
    assert "batch 64: 16, up 64" in finding.reason


def test_down_with_other_batch_sizes_differs_between_them(tmp_path: Path) -> None:
    """Equal at the down file's own keys; at the up file's key 64 the nearest down key is 16."""
    put(tmp_path / V / UP, GOOD | {"64": KernelConfig(64, 64, 64, 1).to_json()})
    put(tmp_path / V / DOWN, {key: GOOD[key] for key in ("1", "4", "16", "256", "1024")})
    finding = next(f for f in cf.doctor(tmp_path).findings if f.problem == "block_m_mismatch")
    assert "batch 64" in finding.reason


def test_down_without_an_up_file_is_held_against_the_default(tmp_path: Path) -> None:
    put(tmp_path / V / DOWN)
    assert "the default" in only(cf.doctor(tmp_path)).reason
    put(tmp_path / V / UP, "{")
    assert only(cf.doctor(tmp_path)).path.name == UP  # broken: said once


def at(*keys: str) -> dict:
    return {key: GOOD["1"] for key in keys}


@pytest.mark.parametrize(
    ("place", "content", "end", "problem", "words"),
    [
        (f"triton_3_6/{UP}", None, "\n", "version_folder", ""),  # two numbers are only a fallback
        (f"{V}/{UP}", None, "", "no_newline", ""),
        (f"{V}/{UP}", at("8", "32", "128", "512", "1024"), "\n", "sparse", "under 8"),
        (f"{V}/{UP}", at("1", "4", "32", "128", "512", "1024"), "\n", "sparse", "between 4 and 32"),
        (f"{V}/{UP}", at("1", "4", "16", "64"), "\n", "sparse", "over 64"),
    ],
)
def test_warnings(place: str, content: dict | None, end: str, problem: str, words: str, tmp_path: Path) -> None:
    put(tmp_path / place, content, end)
    finding = only(cf.doctor(tmp_path))
    assert (finding.severity, finding.problem) == ("warning", problem) and words in finding.reason


def test_a_file_that_two_models_share(tmp_path: Path) -> None:
    put(tmp_path / V / "E=128,N=768,device_name=NVIDIA_H200.json")
    finding = only(cf.doctor(tmp_path))
    assert (finding.severity, finding.problem) == ("note", "shared")
    assert "qwen3-30b-a3b tp 1 (hidden size 2048" in finding.reason and "qwen3-235b-a22b tp 2" in finding.reason
    shutil.rmtree(tmp_path / V)
    put(tmp_path / V / "E=32,N=1792,device_name=NVIDIA_H200.json")  # LFM2-8B-A1B's alone
    assert cf.doctor(tmp_path).findings == ()
