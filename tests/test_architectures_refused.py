"""The table of architectures: what is refused by name, and keys that change sizes or arithmetic."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest
from test_architectures import QWEN3, SIZES, sizes, without

from moelab.architectures import ACTIVATIONS, EFFECTS, GENERIC, TABLE
from moelab.errors import ConfigFileError, UnknownArchitectureError, UnknownModelError
from moelab.model_config import load_config_file, read_model_config

DENSE: dict[str, dict[str, Any]] = {
    "num_experts null": {**QWEN3, "num_experts": None},
    "num_experts 0": {**QWEN3, "num_experts": 0},
    "num_experts 1": {**QWEN3, "num_experts": 1},
    "n_routed_experts null": {
        "model_type": "deepseek_v3",
        "n_routed_experts": None,
        "intermediate_size": 18432,
    },
    "all layers dense": {**QWEN3, "mlp_layer_types": ["dense"] * 4},
    "dense up to the last": {**QWEN3, "num_hidden_layers": 4, "first_k_dense_replace": 4},
    "MoE switched off": {**QWEN3, "enable_moe_block": False},
    "Nemotron-H without E": {**SIZES, "model_type": "nemotron_h", "hybrid_override_pattern": "M-M*-"},
    "Nemotron-H without moe": {
        **SIZES,
        "model_type": "nemotron_h",
        "layers_block_type": ["mamba", "attention"],
    },
}


@pytest.mark.parametrize("label", DENSE)
def test_a_dense_model_is_told_so(label: str) -> None:
    with pytest.raises(UnknownArchitectureError, match="has no MoE layers"):
        read_model_config(DENSE[label])


GPT_OSS = {**SIZES, "architectures": ["GptOssForCausalLM"], "num_local_experts": 128, "intermediate_size": 768}
DEEPSEEK_V4 = {**SIZES, "architectures": ["DeepseekV4ForCausalLM"]}
KIMI_K3 = {**SIZES, "model_type": "kimi_linear", "hidden_size": 7168, "routed_expert_hidden_size": 3584}
UNREADABLE: dict[str, tuple[dict[str, Any], str]] = {
    "intermediate_size alone could be the dense layers'": (
        without(SIZES, "moe_intermediate_size"),
        "may be the dense layers'",
    ),
    "two counts that disagree": ({**SIZES, "n_routed_experts": 64}, "disagree"),
    "two expert sizes that disagree": ({**SIZES, "expert_hidden_dim": 512}, "disagree"),
    "experts in two places": ({"text_config": SIZES, "audio_config": SIZES}, "2 places"),
    "experts nowhere": ({"architectures": ["LlamaForCausalLM"], "hidden_size": 4096}, "no key of it counts"),
    "no top_k": (without(SIZES, "num_experts_per_tok"), "num_experts_per_tok"),
    "no activation": (without(SIZES, "hidden_act"), "hidden_act"),
    "gated or not?": ({**SIZES, "hidden_act": "gelu"}, "gated"),
    "experts in a latent space": ({**SIZES, "moe_latent_size": 1024}, "moe_latent_size"),
    "a clamp of unknown form": ({**SIZES, "swiglu_limit": 7.0}, "swiglu_limit"),
    "product keys": ({**SIZES, "model_type": "doge", "is_moe": True, "moe_intermediate_size": None}, "doge"),
    "a known one without its key": ({**QWEN3, "moe_intermediate_size": None}, "moe_intermediate_size"),
    "sizes that differ by layer": ({**QWEN3, "moe_intermediate_size": [768, 1024]}, "not one number"),
    "a size that is no number": ({**QWEN3, "hidden_size": "2048"}, "whole number"),
    "more experts a token than experts": ({**QWEN3, "num_experts_per_tok": 129}, "129 of 128"),
    "an activation nobody knows": ({**QWEN3, "hidden_act": "mish"}, "mish"),
    "a known one with a clamp that it does not have": (
        {**QWEN3, "architectures": ["DeepseekV3ForCausalLM"], "model_type": "deepseek_v3", "swiglu_limit": 10.0},
        "swiglu_limit = 10.0",
    ),
    "gpt-oss with another clamp than its activation's": ({**GPT_OSS, "swiglu_limit": 10.0}, "swiglu_limit is 10.0"),
    "gpt-oss with another slope": ({**GPT_OSS, "swiglu_alpha": 1.0}, "swiglu_alpha is 1.0"),
    "a clamp of null where the class needs one": ({**DEEPSEEK_V4, "swiglu_limit": None}, "a number over 0"),
    "a known one in a latent space": ({**QWEN3, "moe_latent_size": 1024}, "moe_latent_size"),
    "a known one with experts of another hidden size": ({**QWEN3, "routed_expert_hidden_size": 1024}, "routed_expert"),
    "an unknown one with experts of another hidden size": (
        {**SIZES, "routed_expert_hidden_size": 1024},
        "routed_expert",
    ),
    "Kimi-K3 with its own activation": ({**KIMI_K3, "activation_situ_beta": 1.5}, "activation_situ_beta"),
}


def test_keys_that_change_sizes_or_arithmetic_are_looked_for_in_known_architectures() -> None:
    """Read before: 10.0 as 7.0, a clamp as none, and a hidden size of 7168 for 3584."""
    assert read_model_config(GPT_OSS).activation == "swiglu_oai"
    assert read_model_config({**GPT_OSS, "swiglu_limit": 7.0, "swiglu_alpha": 1.702}).activation == "swiglu_oai"
    assert read_model_config({**DEEPSEEK_V4, "swiglu_limit": 10.0}).activation == "silu_clamped"
    assert read_model_config(KIMI_K3).hidden_size == 3584
    assert (
        read_model_config({"architectures": ["KimiK3ForConditionalGeneration"], "text_config": KIMI_K3}).hidden_size
        == 3584
    )
    off = {"swiglu_limit": None, "swiglu_limits": [0.0, None], "moe_latent_size": 0}
    assert read_model_config({**QWEN3, **off}).activation == "silu"


def test_layers_with_experts_of_their_own_are_refused() -> None:
    """Gemma-4, as transformers 5.23 saves it, has heads of another size in some layers: no concern of the experts."""
    heads, experts = {"05": {"head_dim": 512}}, {"05": {"head_dim": 512, "num_local_experts": 4}}
    for config in (QWEN3, SIZES):
        assert read_model_config({**config, "per_layer_config": heads}).num_experts == 128
        with pytest.raises(UnknownArchitectureError, match="per_layer_config"):
            read_model_config({**config, "per_layer_config": experts})


def test_a_clamp_after_the_activation_is_another_activation() -> None:
    """Step-3.7 and Ling 3 clamp silu(gate); DeepSeek-V4 clamps gate, and then takes silu of it."""
    step = {**SIZES, "architectures": ["Step3p5ForCausalLM"], "n_routed_experts": 128, "swiglu_limits": [0.0, 7.0]}
    ling = {**QWEN3, "architectures": ["BailingMoeV3ForCausalLM"], "expert_swiglu_limit_list": [0.0, 7.0]}
    assert {read_model_config(config).activation for config in (step, ling)} == {"silu_then_clamped"}
    assert read_model_config({**ling, "expert_swiglu_limit_list": [0.0, 0.0]}).activation == "silu"


def test_an_absent_key_means_the_classs_default() -> None:
    """DeepSeek-V4, GLM-5-Next and HunYuan-V4 clamp at 10.0 unless told otherwise (transformers 5.23)."""
    assert read_model_config(DEEPSEEK_V4).activation == "silu_clamped"
    for name in ("HYV4ForCausalLM", "Glm5NextForConditionalGeneration"):
        assert (
            read_model_config({**DEEPSEEK_V4, "architectures": [name], "model_type": name}).activation == "silu_clamped"
        )


@pytest.mark.slow
def test_every_class_has_the_default_that_its_row_says() -> None:
    """Of transformers, as installed: each row's limit and known values against the config class's own defaults."""
    pytest.importorskip("transformers")
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    held = 0
    for row in TABLE:
        for name in row.names.split():
            if name not in CONFIG_MAPPING:
                continue
            config = CONFIG_MAPPING[name]()
            section = getattr(config, row.nested, config) if row.nested else config
            for entry in (row.limit, *row.knows.split()):
                key, _, value = entry.partition("=")
                if value and hasattr(section, key):
                    assert float(getattr(section, key)) == float(value), (name, key)
                    held += 1
            written = section.to_dict()
            assert [key for key in EFFECTS if written.get(key) and key not in f"{row}"] == [], name
            if written.get("per_layer_config"):  # as transformers saves it: of attention alone
                read_model_config({**SIZES, "per_layer_config": written["per_layer_config"]})
    assert held >= 8


@pytest.mark.parametrize("label", UNREADABLE)
def test_no_guess(label: str) -> None:
    config, why = UNREADABLE[label]
    with pytest.raises(UnknownArchitectureError, match=why) as caught:
        read_model_config(config)
    message = str(caught.value)
    assert "known architectures: Qwen2MoeForCausalLM" in message
    assert "MoEShape.from_sizes(" in message and "--model" in message


def test_a_near_miss_is_offered() -> None:
    with pytest.raises(UnknownArchitectureError, match=r"Did you mean .*MixtralForCausalLM"):
        read_model_config({"architectures": ["MixtralMoeForCausalLM"], "num_local_experts": 8})


def test_the_hand_written_file_of_the_message_is_read(tmp_path: Path) -> None:
    """What the error tells people to write must itself be readable."""
    with pytest.raises(UnknownArchitectureError) as caught:
        read_model_config({})
    text = str(caught.value)
    file = tmp_path / "sizes.json"
    file.write_text(text[text.index("{") : text.index("}") + 1])
    assert sizes(load_config_file(file))["moe_intermediate_size"] == 768


def test_the_table_is_sound() -> None:
    names = [name for row in TABLE for name in row.names.split()]
    assert len(names) == len(set(names)), "one name, one row"
    for row in (*TABLE, GENERIC):
        for field in fields(row):
            value = getattr(row, field.name)
            assert not isinstance(value, str) or (value == value.strip() and "||" not in value)
        constant = row.activation.rpartition("=")[2] if "=" in row.activation else "silu"
        assert constant in ACTIVATIONS
    assert "intermediate_size" not in GENERIC.moe_intermediate_size.split("|")


BAD_FILES = {
    "truncated": '{"num_experts": 128, "hidden',
    "empty": "",
    "a list": "[1, 2]",
    "no JSON": "num_experts = 128",
}


@pytest.mark.parametrize("label", BAD_FILES)
def test_bad_files_are_named(label: str, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(BAD_FILES[label])
    with pytest.raises(ConfigFileError, match=r"config\.json"):
        load_config_file(tmp_path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UnknownModelError, match="does not exist"):
        load_config_file(tmp_path / "nowhere.json")
    (tmp_path / "config.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigFileError, match="not strict JSON"):
        load_config_file(tmp_path)
