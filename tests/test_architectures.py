"""The table of architectures against what transformers' own modelling code builds.

tests/data/transformers_moe_configs.json holds, for every model type of transformers 5.23 whose config counts
experts (100 of them), its default config and the sizes of the expert weights that its model then has;
tests/make_transformers_moe_configs.py wrote it. It stands in for transformers, which the tests do not need.
"""

from __future__ import annotations

import importlib.util
import json
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from moelab.architectures import ACTIVATIONS, BY_NAME, EFFECTS, GENERIC, TABLE
from moelab.errors import ConfigFileError, UnknownArchitectureError, UnknownModelError
from moelab.model_config import load_config_file, read_model_config

HERE = Path(__file__).parent
CASES: list[dict[str, Any]] = json.loads((HERE / "data" / "transformers_moe_configs.json").read_text())["cases"]
QWEN3 = {
    "architectures": ["Qwen3MoeForCausalLM"],
    "model_type": "qwen3_moe",
    "num_experts": 128,
    "num_experts_per_tok": 8,
    "hidden_size": 2048,
    "moe_intermediate_size": 768,
    "intermediate_size": 6144,
    "hidden_act": "silu",
}
SIZES = {key: value for key, value in QWEN3.items() if key not in ("architectures", "model_type")}


def sizes(config: dict[str, Any]) -> dict[str, Any]:
    reading = read_model_config(config)
    return {
        "num_experts": reading.num_experts,
        "top_k": reading.top_k,
        "hidden_size": reading.hidden_size,
        "moe_intermediate_size": reading.moe_intermediate_size,
        "activation": reading.activation,
        "gated": reading.gated,
    }


def anonymous(config: dict[str, Any]) -> dict[str, Any]:
    """The same config from an architecture nobody has heard of."""
    return {
        key: anonymous(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if key not in ("architectures", "model_type")
    }


def test_the_data_covers_some_90_model_types() -> None:
    assert len({case["model_type"] for case in CASES if "expected" in case}) >= 90
    assert sum("error" in case for case in CASES) >= 5


READABLE = [case for case in CASES if "expected" in case]
IN_TABLE = [case for case in READABLE if case["config"]["architectures"][0] in BY_NAME]


def without(config: dict[str, Any], key: str) -> dict[str, Any]:
    return {name: value for name, value in config.items() if name != key}


def test_reads_what_the_modelling_code_builds() -> None:
    """By both of what names an architecture, and by either alone."""
    for dropped, cases in (("", READABLE), ("architectures", READABLE), ("model_type", IN_TABLE)):
        found = [(case["model_type"], sizes(without(case["config"], dropped)), case["expected"]) for case in cases]
        assert [each for each in found if each[1] != each[2]] == [], f"without {dropped}"


@pytest.mark.parametrize("case", [c for c in CASES if "error" in c], ids=lambda c: c["model_type"])
def test_refuses_what_has_no_such_experts(case: dict[str, Any]) -> None:
    with pytest.raises(UnknownArchitectureError):
        read_model_config(case["config"])


def test_an_unknown_architecture_is_never_read_wrong() -> None:
    """And a fair share is read: 51 of 110 with transformers 5.23; the rest leave a doubt."""
    read, wrong = 0, []
    for case in CASES:
        try:
            found = sizes({**anonymous(case["config"]), "architectures": ["MysteryForCausalLM"]})
        except UnknownArchitectureError:
            continue
        read += 1
        wrong += [] if found == case.get("expected") else [(case["model_type"], found)]
    assert wrong == [] and read >= 40


@pytest.mark.whole
def test_live_transformers_agrees() -> None:
    """With transformers installed, of whatever version: its configs are read right or refused, none wrong. What the pinned one
    says is in the data of the tests above."""
    pytest.importorskip("transformers")
    spec = importlib.util.spec_from_file_location("maker", HERE / "make_transformers_moe_configs.py")
    assert spec is not None and spec.loader is not None
    maker = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(maker)
    right, wrong = 0, []
    for model_type, config in maker.configs():
        try:
            architecture, expected = maker.build(config)
            config.architectures = [architecture]
            found = sizes(maker.kept(config.to_dict()))
        except (LookupError, TypeError, ValueError):  # does not build, has no experts, or is refused
            continue
        right += found == expected
        wrong += [(model_type, found, expected)] if found != expected else []
    assert not wrong
    assert right >= 70


# --- Real config.json files of architectures that transformers does not hold, cut to the keys that matter.
REMOTE: dict[str, tuple[dict[str, Any], tuple[int, int, int, int, str]]] = {
    "Grok-2: moe_intermediate_size beats intermediate_size": (
        {
            "architectures": ["Grok1ForCausalLM"],
            "model_type": "git",
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
            "hidden_size": 8192,
            "moe_intermediate_size": 16384,
            "intermediate_size": 32768,
            "hidden_act": "gelu",
        },
        (8, 2, 8192, 16384, "gelu"),
    ),
    "Grok-1: intermediate_size alone": (
        {
            "architectures": ["Grok1ModelForCausalLM"],
            "num_experts": 8,
            "num_experts_per_tok": 2,
            "hidden_size": 6144,
            "intermediate_size": 32768,
        },
        (8, 2, 6144, 32768, "gelu"),
    ),
    "Kimi-VL: nested, with a DeepSeek text model": (
        {
            "architectures": ["KimiVLForConditionalGeneration"],
            "model_type": "kimi_vl",
            "text_config": {
                "architectures": ["DeepseekV3ForCausalLM"],
                "n_routed_experts": 64,
                "n_shared_experts": 2,
                "num_experts_per_tok": 6,
                "hidden_size": 2048,
                "moe_intermediate_size": 1408,
                "intermediate_size": 11264,
                "hidden_act": "silu",
            },
        },
        (64, 6, 2048, 1408, "silu"),
    ),
    "ERNIE-4.5-VL as published: flat, lists of (text, vision)": (
        {
            "architectures": ["Ernie4_5_VLMoeForConditionalGeneration"],
            "model_type": "ernie4_5_moe_vl",
            "moe_num_experts": [64, 64],
            "moe_k": 6,
            "hidden_size": 2560,
            "intermediate_size": 12288,
            "moe_intermediate_size": [1536, 512],
            "hidden_act": "silu",
        },
        (64, 6, 2560, 1536, "silu"),
    ),
    "JetMoE as published: Megatron's spelling": (
        {
            "architectures": ["JetMoEForCausalLM"],
            "model_type": "jetmoe",
            "moe_num_experts": 8,
            "moe_top_k": 2,
            "hidden_size": 2048,
            "ffn_hidden_size": 5632,
            "activation_function": "silu",
        },
        (8, 2, 2048, 5632, "silu"),
    ),
    "Hunyuan-A13B: one entry a layer": (
        {
            "architectures": ["HunYuanMoEV1ForCausalLM"],
            "num_experts": 64,
            "moe_topk": [8] * 32,
            "hidden_size": 4096,
            "intermediate_size": 3072,
            "moe_intermediate_size": [3072] * 32,
            "hidden_act": "silu",
        },
        (64, 8, 4096, 3072, "silu"),
    ),
    "an unknown wrapper around a known text model": (
        {
            "architectures": ["NewVLForConditionalGeneration"],
            "llm_config": QWEN3,
            "vision_config": {"hidden_size": 1},
        },
        (128, 8, 2048, 768, "silu"),
    ),
}


@pytest.mark.parametrize("label", REMOTE)
def test_reads_published_configs(label: str) -> None:
    config, (experts, top_k, hidden, inner, activation) = REMOTE[label]
    expected = {"num_experts": experts, "top_k": top_k, "hidden_size": hidden, "moe_intermediate_size": inner}
    assert sizes(config) == {**expected, "activation": activation, "gated": True}


def test_keys_used_name_the_keys_with_their_path() -> None:
    assert read_model_config(QWEN3).keys_used == (
        "num_experts",
        "num_experts_per_tok",
        "hidden_size",
        "moe_intermediate_size",
        "hidden_act",
    )
    nested = read_model_config({"model_type": "new", "deep": {"text_config": SIZES}})
    assert nested.keys_used[0] == "deep.text_config.num_experts"


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
