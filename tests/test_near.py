"""What a lookup just missed, and what to do: `moelab explain` where it finds no file of the layer's own."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest

from moelab import config_files, runtime
from moelab.config_files import Near, ask, near
from moelab.config_files.shipped import name_of
from moelab.config_files.shipped_quantised import shipped_data

H200 = "NVIDIA H200"


def missed(
    model: str, device: str = H200, version: str = "3.6.0", config_dir: Path | None = None, **how: object
) -> Near:
    rules, down = str(how.pop("rules", "moelab")), bool(how.pop("down", False))
    asked = ask(model, rules, device=device, **how)  # type: ignore[arg-type]
    answer = asked.lookup(device, num_tokens=64, triton_version=version, down=down, config_dir=config_dir)
    return near(asked, answer, device, triton_version=version, down=down, config_dir=config_dir)


def tree(folder: Path, name: str) -> Path:
    """A tree of one file, which holds Qwen3's configs."""
    source = config_files.read_config_file(runtime.config_dir() / "triton_3_6_0" / f"{QWEN}.json")
    config_files.write_config_file(folder / "triton_3_6_0" / name, source)
    return folder


QWEN = "E=128,N=768,device_name=NVIDIA_H200"


def test_nothing_is_said_where_the_file_is_there() -> None:
    assert missed("qwen3-30b-a3b") == missed("qwen3-30b-a3b", down=True) == Near()


def test_the_layer_without_its_fused_expert() -> None:
    """Before: DeepSeek-V3 in bf16 asks for E=257, and nothing said that E=256 lies there."""
    found = missed("deepseek-v3", tp_size=8)
    assert any(
        "E=256 is here (triton_3_6_0/E=256,N=256" in s and "--disable-shared-experts-fusion" in s for s in found.misses
    )
    assert not any("E=256" in s for s in missed("deepseek-v3", tp_size=8, disable_shared_experts_fusion=True).misses)


def test_what_sglang_ships(tmp_path: Path) -> None:
    here = {"tp_size": 8, "config_dir": tmp_path}  # where no file is, whatever moelab's own tree has
    found = missed("deepseek-v3-fp8", **here)
    file = "triton_3_5_1/E=257,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json"
    assert (
        f"sglang 0.5.23 ships this file: {file}, the newest of 3, for another Triton version than 3.6.0" in found.misses
    )
    assert "SGLANG_MOE_CONFIG_DIR" in found.todo[0] and "moelab tune --model MODEL --rules sglang" in found.todo[-1]
    assert f"sglang 0.5.23 ships this file: {file}" in missed("deepseek-v3-fp8", version="3.5.1", **here).misses


def test_another_triton_version_serves_and_is_said_so() -> None:
    found = missed("qwen3-30b-a3b", version="3.7.1")
    assert found.misses == () and "and Triton 3.7.1: moelab tune --model MODEL --rules sglang; " in found.todo[0]


@pytest.mark.parametrize(
    ("spelled", "asked_for", "said"),
    [
        ("nvidia-h200", H200, True),
        ("NVIDIA_H200_141GB", H200, True),
        ("NVIDIA_H20", H200, False),
        (H200, "H200", True),
        (H200, "NVIDIA", False),
    ],
)
def test_a_device_spelled_otherwise(spelled: str, asked_for: str, said: bool, tmp_path: Path) -> None:
    file = f"E=8,N=7168,device_name={spelled.replace(' ', '_')}.json"
    found = missed("mixtral-8x7b", asked_for, config_dir=tree(tmp_path, file), tp_size=2)
    assert any("spelled" in s and file in s for s in found.misses) == said
    shipped = any("ships this file" in sentence for sentence in found.misses)
    assert (found.todo[0].startswith("correct --device: ") and len(found.todo) == 1) == (said and not shipped)


def test_a_device_without_files_is_told_what_to_do() -> None:
    found = missed("qwen3-30b-a3b", "NVIDIA H100 80GB HBM3", version="3.7.1")
    assert (
        "sglang 0.5.23 ships this file: triton_3_7_1/E=128,N=768,device_name=NVIDIA_H100_80GB_HBM3.json" in found.misses
    )
    assert any("NVIDIA_H200: not to be copied" in sentence for sentence in found.misses)
    assert any("no file there is for NVIDIA_H100_80GB_HBM3, but for NVIDIA_H200" in sentence for sentence in found.todo)
    assert "moelab tune" in found.todo[-1] and "moelab export tuned --rules sglang" in found.todo[-1]


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("E=128,N=384,device_name=NVIDIA_H200.json", "E=128 is here for this device with N=384"),
        (f"{QWEN},dtype=fp8_w8a8.json", "is for weights of another format than plain"),
        (f"{QWEN}.json", ""),
    ],
)
def test_another_size_and_another_format(name: str, words: str, tmp_path: Path) -> None:
    sentences = missed("qwen3-30b-a3b", config_dir=tree(tmp_path, name)).misses
    assert any(words in sentence for sentence in sentences) if words else sentences == ()


def test_vllm_is_offered_its_own(tmp_path: Path) -> None:
    found = missed("deepseek-v3-fp8", rules="vllm", config_dir=tmp_path, tp_size=8)
    file = "E=256,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
    assert f"vLLM 0.33.0 ships this file: {file}" in found.misses and found.todo[0].startswith("nothing: vLLM 0.33.0")
    assert missed("qwen3-30b-a3b", rules="vllm", config_dir=tmp_path).misses == ()  # of plain ones no name is known


def test_shipped_names_are_those_of_the_files_that_are_here() -> None:
    """The three models' files in data/upstream were copied from the same package."""
    known = {(file.folder, file.name) for file in config_files.shipped_names()}
    for file in config_files.shipped_files():
        text = name_of(file).text()
        if file.get("dtype_selector"):  # of quantised experts the names are listed apart
            known_too = [
                row for peer in shipped_data()["peers"] if peer["peer"] == "sglang" for row in peer["quantised"]
            ]
            (row,) = (r for r in known_too if (r["name"], r["triton"]) == (text, file["triton"]))
            steps = {int(b): int(step) for step, batches in row["steps"].items() for b in batches}
            assert steps == {int(b): entry["BLOCK_SIZE_K"] for b, entry in file["configs"].items()}
            continue
        assert (f"triton_{file['triton'].replace('.', '_')}", config_files.parse_file_name(text)) in known


def test_explain_says_it_in_both_forms(run) -> None:
    arguments = ("explain", "--model", "deepseek-v3", "--tp", 8, "--batch-size", 64, "--device", H200)
    arguments += ("--triton-version", "3.6.0")
    status, out, _ = run(*arguments)
    lines = out[out.index("\nnear   - E=256 is here") :].splitlines()
    assert status == 0 and max(map(len, lines)) <= 118 and any(line.startswith("to do  - ") for line in lines)
    assert "moelab tune --model deepseek-v3 --tp 8 --rules sglang" in " ".join(line.strip() for line in lines)
    answer = json.loads(run(*arguments, "--json")[1])
    assert answer["near"] and answer["to_do"] and dataclasses.asdict(missed("deepseek-v3", tp_size=8))["misses"]


def test_explain_without_sglangs_tree_names_what_it_ships(run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("SGLANG_MOE_CONFIG_DIR", raising=False)
    monkeypatch.setenv("MOELAB_CONFIG_DIR", str(tmp_path))
    arguments = ("explain", "--model", "deepseek-v3-fp8", "--tp", 8, "--batch-size", 64, "--device", H200)
    status, _, err = run(*arguments, "--triton-version", "3.6.0", "--rules", "sglang")
    assert status == 2 and "--config-dir" in err and "sglang 0.5.23 ships this file: triton_3_5_1/E=257,N=256" in err
    assert "moelab's own tree" not in err
    monkeypatch.delenv("MOELAB_CONFIG_DIR")
    for rules in ("sglang", "vllm"):
        monkeypatch.delenv("VLLM_TUNED_CONFIG_FOLDER", raising=False)
        plain = (
            "explain",
            "--model",
            "qwen3-30b-a3b",
            "--batch-size",
            64,
            "--device",
            H200,
            "--triton-version",
            "3.6.0",
        )
        status, _, err = run(*plain, "--rules", rules)
        assert (
            status == 2
            and f"moelab's own tree has triton_3_6_0/{QWEN}.json" in err
            and "which says how to serve" in err
        )
