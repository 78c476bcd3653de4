"""The command line over models as they are served: quantised checkpoints, each loader's question, doubtful devices."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from moelab import config_files
from moelab.config import KernelConfig
from moelab.shapes import load_model
from moelab.tuner.problem import Problem

H200 = ("--device", "NVIDIA H200")
QWEN_FP8 = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048,
    "moe_intermediate_size": 768, "hidden_act": "silu", "num_hidden_layers": 4, "torch_dtype": "bfloat16",
    "quantization_config": {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]},
}  # fmt: skip


@pytest.fixture
def fp8(tmp_path: Path) -> Path:
    (tmp_path / "config.json").write_text(json.dumps(QWEN_FP8))
    return tmp_path


def test_a_quantised_checkpoint_gets_its_own_file_and_bytes(run, fp8: Path) -> None:
    """Before: E=128,N=384,device_name=NVIDIA_H200.json, bfloat16, 1,207,959,552 bytes."""
    status, out, _ = run("shape", "--model", fp8, "--tp-size", 2, *H200, "--json")
    answer = json.loads(out)
    assert status == 0 and answer["format"] == "fp8_w8a8_block_128x128"
    assert answer["config_file"] == "E=128,N=384,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json"
    assert answer["weight_bytes"] == 128 * 3 * 384 * 2048 + 4 * 128 * 3 * 384 * 2048 // 128**2
    vllm = json.loads(run("shape", "--model", fp8, "--tp-size", 2, *H200, "--rules", "vllm", "--json")[1])
    assert vllm["config_file"] == "E=128,N=384,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json"
    assert vllm["config_file_down"] is None
    plain = json.loads(run("shape", "--model", fp8, "--tp-size", 2, *H200, "--dtype", "bf16", "--json")[1])
    assert plain["format"] == "plain" and plain["config_file"] == "E=128,N=384,device_name=NVIDIA_H200.json"


def test_explain_looks_for_that_file(run, fp8: Path, tmp_path: Path) -> None:
    configs = tmp_path / "configs"
    name = "E=128,N=384,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json"
    config_files.write_config_file(configs / "triton_3_6_0" / name, {64: KernelConfig(64, 128, 128, 1)})
    asked = ("explain", "--model", fp8, "--tp-size", 2, "--batch-size", 64, *H200, "--triton-version", "3.6.0")
    status, out, _ = run(*asked, "--config-dir", configs, "--json")
    answer = json.loads(out)
    assert status == 0 and answer["path"].endswith(name) and answer["format"] == "fp8_w8a8_block_128x128"
    broken = config_files.write_config_file(configs / "triton_3_6_0" / name, {64: KernelConfig(64, 128, 256, 1)})
    status, out, _ = run(*asked, "--config-dir", configs)
    assert status == 1 and "BLOCK_SIZE_K = 256 does not divide" in out and broken.exists()
    default = json.loads(run(*asked, "--config-dir", tmp_path, "--json")[1])
    assert default["is_default"] and "block-quantised fp8" in default["steps"][-1]["reason"]


@pytest.mark.parametrize("command", ["shape", "explain"])
def test_a_shard_that_no_block_divides_is_said(run, fp8: Path, command: str) -> None:
    sizes = () if command == "shape" else ("--batch-size", 8, "--triton-version", "3.6.0", "--rules", "moelab")
    status, out, _ = run(command, "--model", fp8, "--tp-size", 4, *H200, *sizes)
    assert status == (0 if command == "shape" else 1) and "is 192, which no whole number of a block of 128" in out
    assert "Choose tp_size 1, 2" in out


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tune", "--tp-size", 4), ("192", "Choose tp_size 1, 2")),
        (("explain", "--tp-size", 4, "--batch-size", 8, "--kernel", "fast", *H200), ("moe_intermediate_size is 192",)),
    ],
)
def test_what_has_no_quantised_kernel_yet_refuses_by_name(
    run, fp8: Path, arguments: Any, words: tuple[str, ...]
) -> None:
    """Before, each of them ran the layer in bfloat16."""
    command, *rest = arguments
    status, out, err = run(command, "--model", fp8, *rest)
    assert status == 2 and out == "" and all(word in err for word in words) and "Traceback" not in err


def test_explain_says_what_fast_runs_over_codes(run, fp8: Path) -> None:
    """Before, it took plain weights alone."""
    status, out, _ = run("explain", "--model", fp8, "--batch-size", 4096, "--kernel", "fast", *H200)
    assert status == 0 and out.startswith("one launch over fp8 codes, and one for the sums: 256 rows an expert")


def test_a_kernel_of_plain_weights_is_not_tuned_for_others() -> None:
    from moelab.errors import FormatError
    from moelab.tuner.tuned_kernels import require_tunable

    shape = load_model("kimi-k2-thinking", tp_size=8)
    assert require_tunable(Problem(shape, "NVIDIA H200", "sm_90", "3.6.0")).kernel == "grouped_gemm"
    with pytest.raises(FormatError, match="int4_w4a16_group_32"):
        require_tunable(Problem(shape, "NVIDIA H200", "sm_90", "3.6.0", kernel="gated"))


def test_each_loader_is_answered_for_itself(run) -> None:
    """Before, `explain --rules vllm` asked for 257 and missed the file that is there."""
    asked = (
        "explain",
        "--model",
        "deepseek-v3",
        "--tp-size",
        8,
        "--batch-size",
        64,
        *H200,
        "--triton-version",
        "3.6.0",
    )
    answers = {r: json.loads(run(*asked, "--rules", r, "--config-dir", d, "--json")[1]) for r, d in TREES.items()}
    assert (answers["vllm"]["num_experts"], answers["vllm"]["top_k"]) == (256, 8)
    assert answers["vllm"]["path"].endswith("E=256,N=256,device_name=NVIDIA_H200.json")
    assert (answers["sglang"]["num_experts"], answers["sglang"]["top_k"]) == (257, 9)
    assert answers["sglang"]["because"][0].startswith("sglang 0.5.23 fuses")
    text = run(*asked, "--rules", "vllm", "--config-dir", TREES["vllm"])[1]
    assert text.startswith("E=256, top_k 8, N=256, plain, bfloat16\n     vLLM 0.33.0 fuses no shared expert")


TREES = {"sglang": Path(__file__).parent.parent, "vllm": Path(__file__).parent.parent / "configs" / "triton_3_6_0"}


@pytest.mark.parametrize("device", ["H200", "nvidia h200"])
def test_a_doubtful_device_is_told(run, tmp_path: Path, device: str) -> None:
    """Before, only `doctor` could tell; a file for no device was named, looked for and written."""
    status, _, err = run("shape", "--model", "mixtral-8x7b", "--device", device)
    assert status == 0 and "Did you mean NVIDIA_H200" in err
    sizes = ("--batch-size", 8, "--triton-version", "3.6.0")
    status, out, err = run("explain", "--model", "mixtral-8x7b", "--device", device, *sizes, "--json")
    assert status == 0 and "NVIDIA_H200" in json.loads(out)["warnings"][0] and "NVIDIA_H200" in err
    name = f"E=8,N=14336,device_name={device.replace(' ', '_')}.json"
    source = config_files.write_config_file(tmp_path / "triton_3_6_0" / name, {64: KernelConfig(16, 64, 64, 1)})
    status, _, err = run("export", source, "--rules", "sglang", "--out", tmp_path / "out")
    assert status == 0 and "Did you mean NVIDIA_H200" in err


def test_export_says_when_a_loader_would_ask_for_another_file(run, tmp_path: Path) -> None:
    name = "E=257,N=256,device_name=NVIDIA_H200.json"
    source = config_files.write_config_file(tmp_path / "triton_3_6_0" / name, {64: KernelConfig(16, 64, 64, 1)})
    err = {rules: run("export", source, "--rules", rules, "--out", tmp_path / rules)[2] for rules in ("sglang", "vllm")}
    assert "there it asks for E=256, N=256" in err["vllm"] and "vLLM 0.33.0" in err["vllm"]
    assert err["sglang"] == ""


def test_tune_says_who_will_ask(run, tmp_path: Path) -> None:
    replay = ("tune", "--replay", "llama-4-scout-tp4-NVIDIA_H200", "--batch-size", 64, "--strategy", "random")
    status, _, err = run(*replay, "--model", "llama-4-scout", "--tp-size", 4)
    assert status == 0 and len(re.findall("will ask for this file", err)) == 2
    status, _, err = run(*replay, "--model", "llama-4-scout", "--tp-size", 4, "--rules", "vllm")
    assert status == 0 and "vLLM 0.33.0 will ask for this file" in err


def test_who_asks_for_what_is_tuned() -> None:
    from moelab.cli import asking

    asked = {"model": "deepseek-v3", "tp_size": 8, "ep_size": 1, "dtype": None, "disable_shared_experts_fusion": False}
    for rules, words in (("sglang", ("will ask", "will not ask")), ("vllm", ("will not ask", "will ask"))):
        shape = asking.tuned_shape(asked | {"rules": rules})
        *said, published = asking.who_asks(asked, Problem(shape, "NVIDIA H200", "sm_90", "3.6.0"))
        assert "deepseek-v3-fp8" in published
        assert [word in sentence for word, sentence in zip(words, said, strict=True)] == [True, True]
    assert "E=257,N=256,device_name=NVIDIA_H200.json (--rules sglang)" in said[0]


def test_a_quantised_checkpoint_is_asked_for_in_its_own_format_all_the_same(fp8: Path) -> None:
    from moelab.cli import asking

    asked = {"model": str(fp8), "tp_size": 2, "ep_size": 1, "dtype": "bfloat16", "disable_shared_experts_fusion": False}
    shape = asking.tuned_shape(asked | {"rules": "moelab"})
    said = asking.who_asks(asked, Problem(shape, "NVIDIA H200", "sm_90", "3.6.0"))
    assert shape.format.is_plain and all("will not ask for this file, but for E=128,N=384" in each for each in said)
    assert "block_shape=[128, 128]" in said[0] and "block_shape=[128,128]" in said[1]


def test_a_preset_of_plain_weights_names_the_published_one(run) -> None:
    err = run("shape", "--model", "deepseek-v3", *H200)[2]
    assert "--model deepseek-v3-fp8" in err and run("shape", "--model", "mixtral-8x22b", *H200)[2] == ""
