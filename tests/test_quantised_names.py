"""What names of quantised files a loader can ask for, and the peers' shipped files that none is ever asked for."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from moelab import runtime
from moelab.config_files import doctor, question
from moelab.config_files.names import parse_file_name
from moelab.config_files.quantised_names import (
    MEANT,
    asked_names,
    cut_steps,
    meant_selector,
    never_asked,
    unpacked_columns,
)
from moelab.config_files.rules import RULES
from moelab.config_files.shipped_quantised import Shipped, shipped_data, shipped_quantised
from moelab.errors import FormatError
from moelab.formats import FORMATS, SELECTORS
from moelab.shapes import MoEShape

V = "triton_3_6_0"
ENTRY = {
    "BLOCK_SIZE_M": 64,
    "BLOCK_SIZE_N": 64,
    "BLOCK_SIZE_K": 128,
    "GROUP_SIZE_M": 1,
    "num_warps": 4,
    "num_stages": 3,
}


@pytest.mark.parametrize("rules", RULES)
@pytest.mark.parametrize("format", FORMATS.values(), ids=lambda format: format.name)
def test_what_a_question_names_is_asked_for(rules: str, format) -> None:
    """The set is derived from the formats as `question` is: no layer's file is called one that nobody asks for."""
    shape = MoEShape("s", num_experts=8, top_k=2, hidden_size=1024, moe_intermediate_size=512, format=format)
    try:
        name = question(shape, rules).name("X")
    except FormatError:
        assert not format.file
        return
    spelled = parse_file_name(name.text(rules), rules)
    assert never_asked(spelled, RULES[rules]) is None


def test_the_sets_are_small() -> None:
    assert (None, False, False) in asked_names(RULES["sglang"])
    assert ("int8_w8a8", False, True) in asked_names(RULES["sglang"])
    assert not {("int8_w8a8", False, False), (None, True, False)} & asked_names(RULES["sglang"])
    assert {selector for selector, *_ in asked_names(RULES["vllm"])} == {None, *RULES["vllm"].dtype_selectors}


@pytest.mark.parametrize(
    ("rules", "name", "problem", "words"),
    [
        (
            "sglang",
            "dtype=int8_w8a8",
            "no_layer_asks",
            ("only with per_channel_quant=True or with a block_shape", "Rename"),
        ),
        ("sglang", "block_shape=[128, 128]", "no_layer_asks", ("this name has a block_shape",)),
        ("moelab", "dtype=int8_w8a8", "no_layer_asks", ("per_channel_quant=True.json",)),
        ("vllm", "dtype=float8", "dtype_selector", ("Rename it with dtype=fp8_w8a8",)),
        ("vllm", "dtype=int8_w8a8", "dtype_selector", ("such weights take the file without a selector",)),
        ("sglang", "dtype=fp8_w8a8,block_shape=[128, 128]", "block_shape", ("BLOCK_SIZE_K = 256 does not divide",)),
        ("vllm", "dtype=fp8_w8a8,block_shape=[128,128]", "cut_step", ("BLOCK_SIZE_K = 256 runs as 128",)),
        ("sglang", "dtype=int4_w4a16", "unpacked_columns", ("asks for E=384,N=1024", "kimi-k2-thinking tp 1")),
    ],
)
def test_the_doctor_finds_it(tmp_path: Path, rules: str, name: str, problem: str, words: tuple[str, ...]) -> None:
    folder = {"sglang": tmp_path / "configs" / V, "moelab": tmp_path / V, "vllm": tmp_path}[rules]
    folder.mkdir(parents=True, exist_ok=True)
    step = 256 if "fp8_w8a8" in name else 128
    entries = {str(b): {**ENTRY, "BLOCK_SIZE_K": step} for b in (1, 4, 16, 64, 256, 1024)}
    columns = 2048 if "int4" in name else 256  # the values of all of kimi-k2-thinking's rows, not their bytes
    (folder / f"E=384,N={columns},device_name=NVIDIA_H200,{name}.json").write_text(json.dumps(entries) + "\n")
    found = [finding for finding in doctor(tmp_path, rules).findings if finding.problem == problem]
    assert len(found) == 1, doctor(tmp_path, rules).rows()
    said = f"{found[0].reason} {found[0].remedy}"
    assert all(word in said for word in words), said


@pytest.mark.parametrize("step", [128, 64])
def test_steps_within_a_block_are_not_cut(step: int) -> None:
    from moelab.config import KernelConfig

    name = parse_file_name("E=4,N=256,device_name=X,dtype=fp8_w8a8,block_shape=[128,128].json", "vllm")
    assert cut_steps(KernelConfig(16, 64, step, 1), name, RULES["vllm"]) is None


def test_int4_files_that_are_asked_for_are_left_alone() -> None:
    for rules, columns in (("sglang", 128), ("vllm", 256)):
        name = parse_file_name(f"E=384,N={columns},device_name=NVIDIA_H200,dtype=int4_w4a16.json", rules)
        assert unpacked_columns(name, RULES[rules]) is None
    assert meant_selector("bf16", RULES["vllm"]) is None and meant_selector("fp8_w8a16", RULES["sglang"]) is None


# --- the peers' files, by their names and steps in data/upstream -------------------------------------------------------


def test_what_the_peers_ship_that_nobody_can_use() -> None:
    """Found in the packages themselves: 9 int8_w8a8 files without per_channel_quant, one file in blocks without a selector, two
    without a device, one whose steps of K are longer than its blocks; 7 selectors that vLLM does not know, 54 files it cuts."""
    found = {
        loader: Counter(each.problem for each in shipped_quantised(loader) if each.problem)
        for loader in ("sglang", "vllm")
    }
    assert found["sglang"] == {"never asked for": 10, "no device": 2, "wrong scales": 1}
    assert found["vllm"] == {"unknown selector": 7, "steps cut": 54}


def test_only_files_of_quantised_experts_are_listed() -> None:
    """A name with dtype=bf16 has a wrong selector, and is of plain experts."""
    for peer in shipped_data()["peers"]:
        for row in peer["quantised"]:
            name = parse_file_name(row["name"].replace("device_name=,", "device_name=X,"), peer["peer"])
            meant = MEANT.get(str(name.dtype_selector), name.dtype_selector)
            assert meant in SELECTORS or (meant is None and name.block_shape), row


def test_each_says_why() -> None:
    wrong: list[Shipped] = [each for loader in ("sglang", "vllm") for each in shipped_quantised(loader) if each.problem]
    assert all(each.why for each in wrong)
    (scales,) = [each for each in wrong if each.problem == "wrong scales"]
    assert "H100" in scales.name and scales.batches == (64, 128, 256, 512)
    total = json.loads((runtime.data_dir() / "upstream" / "quantised_files.json").read_text())
    assert [len(list(shipped_quantised(p["peer"]))) for p in total["peers"]] == [
        len(p["quantised"]) for p in total["peers"]
    ]
