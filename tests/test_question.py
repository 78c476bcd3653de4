"""Which file a server asks for: by loader, model, parallelism, format and platform, and which rule of which version says so."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_formats import formats

from moelab import config_files as cf
from moelab.errors import FormatError
from moelab.formats import Format, get_format
from moelab.shapes import MoEShape, load_model, load_served

DEEPSEEK: dict[str, Any] = {
    "architectures": ["DeepseekV3ForCausalLM"], "n_routed_experts": 256, "n_shared_experts": 1, "num_experts_per_tok": 8,
    "hidden_size": 7168, "moe_intermediate_size": 2048, "hidden_act": "silu", "num_hidden_layers": 4,
}  # fmt: skip
GLM = {**DEEPSEEK, "architectures": ["Glm4MoeForCausalLM"], "n_routed_experts": 160}
QWEN = {
    **DEEPSEEK, "architectures": ["Qwen3NextForCausalLM"], "num_experts": 512, "moe_intermediate_size": 512,
    "shared_expert_intermediate_size": 512,
}  # fmt: skip
LING = {**DEEPSEEK, "architectures": ["BailingMoeV3ForCausalLM"], "num_experts": 256, "num_shared_experts": 1}
BLOCK = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
INT4 = {"targets": ["Linear"], "weights": {"type": "int", "num_bits": 4, "strategy": "group", "group_size": 32}}
KIMI_INT4 = {"quant_method": "compressed-tensors", "config_groups": {"group_0": INT4}}
for each in (QWEN, LING):
    del each["n_routed_experts"], each["n_shared_experts"]


@pytest.mark.parametrize(
    ("model", "degrees", "sglang", "vllm"),
    [
        ("deepseek-v3", (8, 1), (257, 9, 256), (256, 8, 256)),
        ("deepseek-v3", (8, 8), (32, 8, 2048), (32, 8, 2048)),
        ("deepseek-v3-fp8", (8, 1), (257, 9, 256), (256, 8, 256)),
        ("kimi-k2", (8, 1), (384, 8, 256), (384, 8, 256)),
        ("kimi-k2-thinking", (8, 1), (384, 8, 256), (384, 8, 256)),
        ("llama-4-scout", (4, 1), (16, 1, 2048), (16, 1, 2048)),
        ("glm-4.5", (8, 1), (161, 9, 192), (160, 8, 192)),
        ("glm-4.5", (8, 8), (20, 8, 1536), (20, 8, 1536)),
        ("qwen3-next-80b-a3b", (1, 1), (513, 11, 512), (512, 10, 512)),  # sglang ships E=513,N=512 for an H200
        ("qwen3-next-80b-a3b", (4, 4), (129, 11, 512), (128, 10, 512)),
        ("qwen2-57b-a14b", (1, 1), (64, 8, 2560), (64, 8, 2560)),  # in AITER alone
        ("deepseek-v2", (1, 1), (160, 6, 1536), (160, 6, 1536)),  # two shared experts
        ("kimi-vl-a3b", (1, 1), (64, 6, 1408), (64, 6, 1408)),
        ("ling-mini-2.0", (1, 1), (256, 8, 512), (256, 8, 512)),  # the second version keeps it apart
    ],
)
def test_experts_that_each_server_runs(
    model: str, degrees: tuple[int, int], sglang: tuple[int, int, int], vllm: tuple[int, int, int]
) -> None:
    """Before: one reading of sglang's tuning script for all, 385, 17, 257 and 33 for the first rows."""
    tp, ep = degrees
    for rules, expected in (("sglang", sglang), ("vllm", vllm), ("moelab", sglang)):
        asked = cf.ask(model, rules, tp_size=tp, ep_size=ep)
        assert (asked.num_experts, asked.top_k, asked.shape.moe_intermediate_size) == expected
        version = "vLLM 0.33.0" if rules == "vllm" else "sglang 0.5.23"
        assert asked.because[0].startswith(version) and cf.get_rules("vllm").version == "vLLM 0.33.0"


def fused(config: dict[str, Any], tmp_path: Path, **how: Any) -> int:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(config))
    return load_served(path, **{"loader": "sglang", **how}).shape.num_shared_experts_fused


CASES: dict[str, tuple[dict[str, Any], dict[str, Any], int]] = {
    "as published": (DEEPSEEK, {}, 1),
    "no count: the class's default, 1": ({k: v for k, v in DEEPSEEK.items() if k != "n_shared_experts"}, {}, 1),
    "a count of null": ({**DEEPSEEK, "n_shared_experts": None}, {}, 0),
    "none": ({**DEEPSEEK, "n_shared_experts": 0}, {}, 0),
    "two": ({**DEEPSEEK, "n_shared_experts": 2}, {}, 0),
    "another number of experts": ({**DEEPSEEK, "n_routed_experts": 64}, {}, 0),
    "384 experts": ({**DEEPSEEK, "n_routed_experts": 384}, {}, 0),
    "384 experts of a GLM-5": ({**DEEPSEEK, "architectures": ["GlmMoeDsaForCausalLM"], "n_routed_experts": 384}, {}, 0),
    "256 experts of a GLM-5": ({**DEEPSEEK, "architectures": ["GlmMoeDsaForCausalLM"]}, {}, 1),
    "DeepSeek-V3.2 by its own architecture": ({**DEEPSEEK, "architectures": ["DeepseekV32ForCausalLM"]}, {}, 0),
    "a wrapper that asks its text model": (
        {"architectures": ["KimiK25ForConditionalGeneration"], "text_config": DEEPSEEK}, {}, 1,
    ),
    "a wrapper that nobody knows": ({"architectures": ["NewVLForConditionalGeneration"], "text_config": DEEPSEEK}, {}, 0),
    "sglang's switch": (DEEPSEEK, {"disable_shared_experts_fusion": True}, 0),
    "vLLM": (DEEPSEEK, {"loader": "vllm"}, 0),
    "fp8 in blocks": ({**DEEPSEEK, "quantization_config": BLOCK}, {}, 1),
    "int4 of compressed-tensors": ({**DEEPSEEK, "quantization_config": KIMI_INT4}, {}, 0),
    "int4 of GLM": ({**GLM, "quantization_config": KIMI_INT4}, {}, 1),
    "expert parallelism": (GLM, {"tp_size": 8, "ep_size": 2}, 0),
    "expert parallelism on CDNA3": (GLM, {"tp_size": 8, "ep_size": 2, "platform": "gfx942"}, 1),
    "CDNA2": (GLM, {"platform": "gfx90a"}, 0),
    "Volta": (GLM, {"platform": "sm_70"}, 0),
    "Blackwell": (GLM, {"platform": "sm_100a"}, 1),
    "GLM-4.7-Flash on CDNA3": ({**GLM, "architectures": ["Glm4MoeLiteForCausalLM"]}, {"platform": "gfx950"}, 0),
    "GLM-4.7-Flash": ({**GLM, "architectures": ["Glm4MoeLiteForCausalLM"]}, {}, 1),
    "Qwen3-Next": (QWEN, {}, 1),
    "Qwen3-Next with a wider shared expert": ({**QWEN, "shared_expert_intermediate_size": 1024}, {}, 0),
    "Qwen3-Next without one": ({**QWEN, "shared_expert_intermediate_size": 0}, {}, 0),
    "Ling 3 under expert parallelism": (LING, {"tp_size": 8, "ep_size": 8}, 1),
    "Ling 3, shared and routed sizes differ": ({**LING, "moe_shared_expert_intermediate_size": 1024}, {}, 0),
    "Ling 3, blocks that the shards cut": ({**LING, "moe_intermediate_size": 1536, "quantization_config": BLOCK},
                                           {"tp_size": 8}, 0),
}  # fmt: skip


@pytest.mark.parametrize("label", CASES)
def test_when_sglang_fuses(label: str, tmp_path: Path) -> None:
    config, how, expected = CASES[label]
    assert fused(config, tmp_path, **how) == expected


def test_the_sentence_names_the_rule() -> None:
    said = {rules: cf.ask("kimi-k2", rules, tp_size=8).because[0] for rules in ("sglang", "vllm")}
    assert "models/deepseek_v2.py" in said["sglang"] and "384 routed experts" in said["sglang"]
    assert "vLLM 0.33.0 fuses no shared expert" in said["vllm"]
    assert "ep_size 8" in cf.ask("deepseek-v3", "sglang", tp_size=8, ep_size=8).because[0]
    assert "--disable-shared" in cf.ask("deepseek-v3", "sglang", disable_shared_experts_fusion=True).because[0]


# --- The file's name by loader and format, as the peers' own name functions and shipped files have it.
NAMES: dict[str, tuple[str | None, str | None]] = {
    "plain": ("E=8,N=512,device_name=D.json",) * 2,
    "fp8_w8a8_tensor": ("E=8,N=512,device_name=D,dtype=fp8_w8a8.json",) * 2,
    "fp8_w8a8_channel": (
        "E=8,N=512,device_name=D,dtype=fp8_w8a8,per_channel_quant=True.json", "E=8,N=512,device_name=D,dtype=fp8_w8a8.json",
    ),
    "fp8_w8a8_block": (
        "E=8,N=512,device_name=D,dtype=fp8_w8a8,block_shape=[128, 128].json",
        "E=8,N=512,device_name=D,dtype=fp8_w8a8,block_shape=[128,128].json",
    ),
    "int8_w8a8_channel": ("E=8,N=512,device_name=D,dtype=int8_w8a8,per_channel_quant=True.json", "E=8,N=512,device_name=D.json"),
    "int8_w8a8_block": (
        "E=8,N=512,device_name=D,dtype=int8_w8a8,block_shape=[128, 128].json",
        "E=8,N=512,device_name=D,block_shape=[128,128].json",
    ),
    "int8_w8a16_channel": ("E=8,N=512,device_name=D,dtype=int8_w8a16.json",) * 2,
    "int8_w8a16_group_128": ("E=8,N=512,device_name=D,dtype=int8_w8a16.json",) * 2,
    "int4_w4a16_group_32": ("E=8,N=256,device_name=D,dtype=int4_w4a16.json", "E=8,N=512,device_name=D,dtype=int4_w4a16.json"),
}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_names_by_loader(name: str) -> None:
    shape = MoEShape("any", 8, 2, 1024, 512, format=get_format(name))
    found = tuple(cf.question(shape, rules).file_name("D") for rules in ("sglang", "vllm"))
    assert found == NAMES[name]
    assert cf.question(shape, "moelab").file_name("D", down=True) == found[0].replace(".json", "_down.json")


def test_a_float32_layer_and_a_format_without_files() -> None:
    assert "dtype=float32" in cf.question(MoEShape("any", 8, 2, 1024, 512, dtype="float32")).file_name("D")
    asked = cf.ask("openai/gpt-oss-120b", "sglang", tp_size=8)
    with pytest.raises(FormatError, match=r"No config file is asked for.*triton_kernels.*Expected"):
        asked.file_name("NVIDIA H200")
    assert asked.misfits == (), "the servers pad 360 to whole groups"


@given(formats(), st.sampled_from(list(cf.RULES)), st.integers(1, 600), st.integers(1, 64), st.booleans())
def test_a_file_name_is_read_back_to_the_same_question(
    format: Format, rules: str, experts: int, sixteenths: int, down: bool
) -> None:
    """Of every loader and format: name -> text -> parse -> the same name, but for what the loader's names do not say."""
    shape = MoEShape("any", experts, 1, 1024, 16 * sixteenths, format=format)
    asked = cf.question(shape, rules)
    if not format.file:
        return
    name = asked.name("NVIDIA H200", down=down)
    text = name.text(rules)
    read = cf.parse_file_name(text, rules)
    loader = cf.get_rules(rules)
    block = name.block_shape if name.block_shape and all(name.block_shape) else None
    assert (read.num_experts, read.moe_intermediate_size) == (experts, asked.columns)
    assert (read.dtype_selector, read.block_shape, read.device_name) == (name.dtype_selector, block, "NVIDIA_H200")
    assert read.per_channel_quant == (name.per_channel_quant and loader.names_per_channel_quant)
    assert read.down == (down and loader.names_down) and read.text(rules) == text


# --- Shards that no block divides.
def test_vllm_refines_blocks_and_sglang_does_not_load_the_shard() -> None:
    """Qwen3-30B-A3B-FP8 on four ranks: N is 192. vLLM 0.33.0 halves the block; sglang 0.5.23 ends with a ValueError."""
    theirs, ours = (cf.ask("qwen3-30b-a3b-fp8", rules, tp_size=4) for rules in ("vllm", "sglang"))
    assert theirs.misfits == () and theirs.block_shape == (64, 64) and "refines" in theirs.because[-1]
    assert theirs.file_name("D") == "E=128,N=192,device_name=D,dtype=fp8_w8a8,block_shape=[64,64].json"
    assert "192" in ours.misfits[0] and ours.misfits[-1].endswith("Choose tp_size 1, 2")


def test_vllm_divides_experts_over_all_ranks_or_none() -> None:
    assert [bool(cf.ask("mixtral-8x7b", "vllm", tp_size=8, ep_size=ep).misfits) for ep in (1, 2, 8)] == [
        False,
        True,
        False,
    ]
    assert cf.ask("mixtral-8x7b", "sglang", tp_size=8, ep_size=2).misfits == ()


def test_vllm_refines_no_further_than_32() -> None:
    shape = MoEShape("any", 8, 2, 1024, 48, format=get_format("fp8_w8a8_block"))
    assert cf.question(shape, "vllm").misfits and cf.question(shape, "vllm").block_shape == (128, 128)
    other = MoEShape("any", 8, 2, 1024, 96, format=get_format("fp8_w8a8_block"))
    assert cf.question(other, "vllm").block_shape == (32, 32)
    assert cf.question(other, "vllm", method="compressed-tensors").misfits, "only fp8's own checkpoints are refined"


def test_whom_a_file_is_for() -> None:
    fused, apart = (cf.parse_file_name(f"E={e},N=256,device_name=NVIDIA_H200.json") for e in (257, 256))
    why = cf.not_asked_for(fused, "vllm")
    assert why and "deepseek-v3 tp 8" in why and "E=256, N=256" in why
    assert cf.not_asked_for(fused, "sglang") is None and cf.not_asked_for(apart, "vllm") is None
    assert cf.not_asked_for(cf.parse_file_name("E=7,N=11,device_name=X.json"), "vllm") is None, "nothing is known of it"


@pytest.mark.parametrize(
    ("device", "meant"),
    [("H200", "NVIDIA_H200"), ("nvidia h200", "NVIDIA_H200"), ("NVIDIA H2O0", "NVIDIA_H20"), ("MI300X", "AMD_")],
)
def test_a_doubtful_device_is_told(device: str, meant: str) -> None:
    doubt = cf.device_doubt(device)
    assert doubt and meant in doubt and "Expected the name as the driver gives it" in doubt


@pytest.mark.parametrize("device", ["NVIDIA H200", "NVIDIA_H200", "NVIDIA H20", "AMD Instinct MI300X"])
def test_a_known_device_is_not(device: str) -> None:
    assert cf.device_doubt(device) is None


def test_the_platform_of_a_device() -> None:
    assert cf.platform_of("NVIDIA H200") == "sm_90" and cf.platform_of("AMD Instinct MI325X") == "gfx942"
    assert cf.platform_of(None) == cf.platform_of("NVIDIA Something") == "sm_90"
    with_ep = [
        cf.ask("glm-4.5", tp_size=8, ep_size=8, device=d).num_experts for d in ("NVIDIA H200", "AMD Instinct MI300X")
    ]
    assert with_ep == [20, 21]
    assert load_model("glm-4.5", tp_size=8, ep_size=8, platform="gfx942").num_experts == 21
