"""quantization_config of real models, and of models that cannot be read, which are refused by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab.errors import FormatError
from moelab.quantization import METHODS, read_quantisation
from moelab.shapes import MoEShape, load_model

MODEL: dict[str, Any] = {
    "architectures": ["Qwen3MoeForCausalLM"], "num_experts": 128, "num_experts_per_tok": 8, "hidden_size": 2048,
    "moe_intermediate_size": 768, "hidden_act": "silu", "num_hidden_layers": 4, "torch_dtype": "bfloat16",
}  # fmt: skip


def scheme(weights: dict[str, Any], inputs: dict[str, Any] | None = None, **more: Any) -> dict[str, Any]:
    """A quantization_config of compressed-tensors with one group over all Linear modules."""
    group = {"targets": ["Linear"], "weights": weights, "input_activations": inputs}
    return {"quant_method": "compressed-tensors", "config_groups": {"group_0": group}, **more}


def args(kind: str, bits: int, strategy: str, **more: Any) -> dict[str, Any]:
    return {"type": kind, "num_bits": bits, "strategy": strategy, "symmetric": True, **more}


BLOCK = {"quant_method": "fp8", "fmt": "e4m3", "activation_scheme": "dynamic", "weight_block_size": [128, 128]}
TOKEN8, TOKEN_INT8 = (args(kind, 8, "token", dynamic=True) for kind in ("float", "int"))
INT4 = args("int", 4, "group", group_size=32)
GPTQ = {"quant_method": "gptq", "bits": 4, "group_size": 128, "desc_act": False, "sym": True}
AWQ = {"quant_method": "awq", "bits": 4, "group_size": 128, "zero_point": True}

READ: dict[str, tuple[dict[str, Any], str]] = {
    "DeepSeek-V3, Qwen3-FP8": (BLOCK, "fp8_w8a8_block_128x128"),
    "DeepSeek-V3.1": ({**BLOCK, "scale_fmt": "ue8m0"}, "fp8_w8a8_block_128x128_ue8m0"),
    "DeepSeek-V4.1's blocks": ({**BLOCK, "weight_block_size": [32, 32]}, "fp8_w8a8_block_32x32"),
    "Hy3-FP8": ({"quant_method": "fp8", "activation_scheme": "static"}, "fp8_w8a8_tensor_static"),
    "fp8 by tensor": ({"quant_method": "fp8", "activation_scheme": "dynamic"}, "fp8_w8a8_tensor"),
    "routers and heads ignored": ({**BLOCK, "modules_to_not_convert": ["gate", "lm_head", "model.layers.2.mlp.gate"]},
                                  "fp8_w8a8_block_128x128"),
    "shared experts ignored": ({**BLOCK, "ignored_layers": ["model.layers.0.mlp.shared_experts"]}, "fp8_w8a8_block_128x128"),
    "a layer that is not there": ({**BLOCK, "ignored_layers": ["model.layers.92.mlp.experts"]}, "fp8_w8a8_block_128x128"),
    "GLM-4.5-FP8, Llama-4-FP8": (scheme(args("float", 8, "channel"), TOKEN8), "fp8_w8a8_channel"),
    "FP8_BLOCK of llm-compressor": (
        scheme(args("float", 8, "block", block_structure=[128, 128]), args("float", 8, "group", group_size=128, dynamic=True)),
        "fp8_w8a8_block_128x128",
    ),
    "W8A8": (scheme(args("int", 8, "channel"), TOKEN_INT8), "int8_w8a8_channel"),
    "W8A16": (scheme(args("int", 8, "channel")), "int8_w8a16_channel"),
    "W8A16 by groups": (scheme(args("int", 8, "group", group_size=128)), "int8_w8a16_group_128"),
    "fp8 by tensor, static": (scheme(args("float", 8, "tensor"), args("float", 8, "tensor", dynamic=False)),
                              "fp8_w8a8_tensor_static"),
    "Kimi-K2-Thinking": (scheme(INT4), "int4_w4a16_group_32"),
    "int4 with zero points": (scheme({**INT4, "symmetric": False}), "int4_w4a16_group_32_zp"),
    "mxfp4 of llm-compressor": (scheme(args("float", 4, "group", group_size=32)), "mxfp4_w4a16_32"),
    "AWQ": ({**AWQ, "modules_to_not_convert": ["gate"]}, "int4_w4a16_group_128_zp"),
    "GPTQ": (GPTQ, "int4_w4a16_group_128"),
    "GPTQ, asymmetric": ({**GPTQ, "sym": False}, "int4_w4a16_group_128_zp"),
    "GPTQ int8": ({**GPTQ, "bits": 8}, "int8_w8a16_group_128"),
    "GPTQ int8 per channel": ({**GPTQ, "bits": 8, "group_size": -1}, "int8_w8a16_channel"),
    "GPTQ, other modules' rules": ({**GPTQ, "dynamic": {"-:.*self_attn.*": {}}}, "int4_w4a16_group_128"),
    "R1-Block-INT8": ({"quant_method": "blockwise_int8", "weight_block_size": [128, 128]}, "int8_w8a8_block_128x128"),
    "R1-Channel-INT8": ({"quant_method": "w8a8_int8"}, "int8_w8a8_channel"),
    "gpt-oss": (
        {"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.self_attn", "model.layers.*.mlp.router"]},
        "mxfp4_w4a16_32",
    ),
    "NVIDIA FP8": ({"quant_method": "modelopt", "quant_algo": "FP8", "kv_cache_quant_algo": "FP8"}, "fp8_w8a8_tensor_static"),
    "all experts ignored, by pattern": (scheme(INT4, ignore=["re:.*experts.*"]), "plain"),
    "all experts ignored, by name": ({**BLOCK, "modules_to_not_convert": ["mlp.experts"]}, "plain"),
    "all experts ignored, by wildcard": ({"quant_method": "mxfp4", "modules_to_not_convert": ["model.layers.*.mlp"]}, "plain"),
    "all experts ignored, in one tensor": (
        {**BLOCK, "modules_to_not_convert": [f"model.layers.{i}.feed_forward.experts.{p}_proj" for i in range(4) for p in
                                             ("gate_up", "down")]},
        "plain",
    ),
    "all experts ignored, of a Nemotron": ({**BLOCK, "exclude_modules": ["backbone.layers.*.mixer.experts*"]}, "plain"),
    "an empty section": ({}, "plain"),
}  # fmt: skip


@pytest.mark.parametrize("label", READ)
def test_formats_of_checkpoints(label: str, tmp_path: Path) -> None:
    """Before, each of these was read as bfloat16, twice the bytes and more, under bf16's file."""
    section, expected = READ[label]
    config = {**MODEL, "quantization_config": section}
    assert MoEShape.from_config(config).format.name == expected
    assert MoEShape.from_config(config, dtype="bfloat16").format.name == "plain", "asked for in plain weights"
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_model(tmp_path, tp_size=2).format.name == expected


def test_where_the_section_lies() -> None:
    nested = {
        "architectures": ["KimiK25ForConditionalGeneration"],
        "text_config": {**MODEL, "quantization_config": BLOCK},
    }
    outer = {
        "architectures": ["KimiVLForConditionalGeneration"],
        "text_config": MODEL,
        "compression_config": scheme(INT4),
    }
    assert MoEShape.from_config(nested).format.name == "fp8_w8a8_block_128x128"
    assert MoEShape.from_config(outer).format.name == "int4_w4a16_group_32"


TWO_GROUPS = {"group_0": {"targets": ["Linear"], "weights": args("float", 8, "channel"), "input_activations": TOKEN8}}
DOWN = {"targets": ["re:.*experts.*down_proj"], "weights": INT4, "input_activations": None}
LAYER = {**DOWN, "targets": ["re:.*layers\\.1\\.mlp\\.experts.*"]}

REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "nobody's method": ({"quant_method": "fp9"}, "fp9.*Did you mean fp8"),
    "without a method": ({"bits": 4}, "without a quant_method"),
    "mxfp8 by its method": ({"quant_method": "mxfp8", "weight_block_size": [1, 32]}, "mxfp8"),
    "mxfp8 by its block": ({**BLOCK, "weight_block_size": [1, 32]}, "mxfp8"),
    "nvfp4": ({"quant_method": "modelopt", "quant_algo": "NVFP4"}, "NVFP4"),
    "nvfp4 of llm-compressor": (scheme(args("float", 4, "tensor_group", group_size=16)), "nvfp4"),
    "modelopt, mixed": ({"quant_method": "modelopt", "quant_algo": "MIXED_PRECISION"}, "MIXED_PRECISION"),
    "e5m2": ({**BLOCK, "fmt": "e5m2"}, "e5m2"),
    "scales in nobody's format": ({**BLOCK, "scale_fmt": "e5m2"}, "scale_fmt is 'e5m2'"),
    "blocks and static activations": ({**BLOCK, "activation_scheme": "static"}, "dynamic activations only"),
    "a block of one size": ({**BLOCK, "weight_block_size": [128]}, "not two sizes"),
    "actorder of gptq": ({**GPTQ, "desc_act": True}, "actorder"),
    "actorder of compressed-tensors": (scheme({**INT4, "actorder": "group"}), "actorder"),
    "a precision for some experts": ({**GPTQ, "dynamic": {"+:.*experts.0.*": {"bits": 8}}}, "precision of their own"),
    "int4 per channel": ({**GPTQ, "group_size": -1}, "group_size is -1 with 4 bits"),
    "three bits": ({**GPTQ, "bits": 3}, "3 bits"),
    "AWQ in 8 bits": ({**AWQ, "bits": 8}, "8 bits"),
    "W4A8": (scheme(INT4, TOKEN_INT8), "int4 weights by group with int8 activations"),
    "fp8 weights, static activations by token": (
        scheme(args("float", 8, "channel"), args("float", 8, "token", dynamic=False)), "by token, static",
    ),
    "sparse weights": (scheme(INT4, sparsity_config={"format": "sparse-24-bitmask"}), "sparse"),
    "no groups": ({"quant_method": "compressed-tensors", "config_groups": {}}, "no config_groups"),
    "experts in no group": (
        {"quant_method": "compressed-tensors", "config_groups": {"group_0": {**DOWN, "targets": ["re:.*self_attn.*"]}}},
        "mixed precision.*none",
    ),
    "w2 in a group of its own": (
        {"quant_method": "compressed-tensors", "config_groups": {**TWO_GROUPS, "group_1": DOWN}},
        "mixed precision.*group_0, group_1",
    ),
    "a layer in a group of its own": (
        {"quant_method": "compressed-tensors", "config_groups": {**TWO_GROUPS, "group_1": LAYER}}, "mixed precision",
    ),
    "some layers ignored": ({**BLOCK, "ignored_layers": ["model.layers.1.mlp.experts"]}, "layers 1 are ignored"),
    "w2 ignored": ({**BLOCK, "ignored_layers": ["down_proj"]}, "only .*down_proj is ignored"),
    "a pattern that is none": (scheme(INT4, ignore=["re:*("]), "value of another kind"),
    "a list for a group": ({"quant_method": "compressed-tensors", "config_groups": {"group_0": []}}, "another kind"),
}  # fmt: skip


@pytest.mark.parametrize("label", REFUSED)
def test_what_cannot_be_read_is_refused_by_name(label: str) -> None:
    section, why = REFUSED[label]
    with pytest.raises(FormatError, match=f"(?s){why}") as caught:
        MoEShape.from_config({**MODEL, "quantization_config": section})
    assert "Expected one of fp8" in str(caught.value) and "dtype=" in str(caught.value)
    assert MoEShape.from_config({**MODEL, "quantization_config": section}, dtype="float16").format.is_plain


def test_experts_of_a_format_of_their_own() -> None:
    """DeepSeek-V4: fp8 but for its experts, which are fp4."""
    for dtype, quantised in (("fp8", {}), ("bfloat16", {"quantization_config": BLOCK})):
        with pytest.raises(FormatError, match=rf"expert_dtype.*{dtype}"):
            MoEShape.from_config({**MODEL, **quantised, "expert_dtype": dtype})
    with pytest.raises(FormatError, match=r"expert_dtype.*fp4"):
        MoEShape.from_config({**MODEL, "quantization_config": BLOCK, "expert_dtype": "fp4"})


WORDS = st.sampled_from(["float", "int", "group", "Linear", "re:.*"])
INNER_KEYS = st.sampled_from(["weights", "targets", "group_0", "dynamic"])
values = st.recursive(
    st.none() | st.booleans() | st.integers(-2, 200) | st.text(max_size=5) | WORDS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(INNER_KEYS, inner),
    max_leaves=6,
)
KEYS = "weight_block_size activation_scheme bits group_size config_groups ignore dynamic fmt sym quant_algo".split()  # noqa: SIM905


@settings(max_examples=300, deadline=None)
@given(st.sampled_from([*METHODS, "other"]), st.dictionaries(st.sampled_from(KEYS), values))
def test_anything_is_read_or_refused(method: str, section: dict[str, Any]) -> None:
    try:
        read_quantisation({"quantization_config": {**section, "quant_method": method}}, MODEL)
    except FormatError as error:
        assert "Expected" in str(error)
