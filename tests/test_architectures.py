"""The table of architectures against what transformers' own modelling code builds.

tests/data/transformers_moe_configs.json holds, for every model type of transformers 5.23 whose config counts
experts (100 of them), its default config and the sizes of the expert weights that its model then has;
tests/make_transformers_moe_configs.py wrote it. It stands in for transformers, which the tests do not need.
"""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from moelab.architectures import BY_NAME
from moelab.errors import UnknownArchitectureError
from moelab.model_config import read_model_config

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
