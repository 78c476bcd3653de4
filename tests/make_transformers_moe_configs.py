"""Writes tests/data/transformers_moe_configs.json: what transformers builds from its configs.

Run by hand, with transformers installed: `python tests/make_transformers_moe_configs.py`. Every config class
whose default config counts experts is instantiated, its model is built on torch's meta device, and the sizes
are taken from the shapes of the expert weights that come out, never from a key of the config. Where a default
config cannot be built, or has no experts, OVERRIDES says with which values it was built instead.
"""

from __future__ import annotations

import importlib
import json
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

OUT = Path(__file__).parent / "data" / "transformers_moe_configs.json"

_GEMMA = {"num_experts": 128, "top_k_experts": 8, "moe_intermediate_size": 704, "hidden_size": 2816}
_INDEXER = {"n_heads": 4, "kv_heads": 1, "head_dim": 256, "budget": 2048, "compress_ratio": 4}
_QWEN4 = {f"indexer_{key}": value for key, value in _INDEXER.items()}
_MUSE = {"moe_hidden_size": 3072}
_ARIA = {"hidden_size": 2560, "intermediate_size": 1664, "moe_num_experts": 64, "moe_topk": 6}
_LAYERS4 = {"num_hidden_layers": 4, "layer_types": ["conv", "conv", "full_attention", "conv"]}
OVERRIDES: dict[str, dict[str, Any]] = {
    # Default sizes that coincide would hide a key taken for another.
    "aria": {"text_config": _ARIA},
    "aria_text": _ARIA,
    "gpt_oss": {"intermediate_size": 1440},
    "mistral_large4": {"text_config": {"moe_intermediate_size": 3072}},
    "mistral_large4_text": {"moe_intermediate_size": 3072},
    "muse_spark": {"text_config": _MUSE},
    "muse_spark_text": _MUSE,
    "olmoe": {"intermediate_size": 1024},
    "openai_privacy_filter": {"intermediate_size": 320},
    "zaya": {"moe_intermediate_size": 1024},
    # Defaults that do not build, or build no experts.
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 10752, "moe_num_experts": 16, "moe_top_k": 4},
        "d_model": 6144,
    },
    "deepseek_ocr2": {"text_config": {"num_experts_per_tok": 6, "mlp_layer_types": ["dense"] + ["sparse"] * 31}},
    "deepseek_ocr2_text": {"num_experts_per_tok": 6, "mlp_layer_types": ["dense"] + ["sparse"] * 31},
    "deepseek_v2": {"num_experts_per_tok": 6},
    "diffusion_gemma": {"text_config": _GEMMA},
    "diffusion_gemma_text": _GEMMA,
    "gemma4": {"text_config": {**_GEMMA, "enable_moe_block": True}},
    "gemma4_text": {**_GEMMA, "enable_moe_block": True},
    "dots1": {"n_routed_experts": 128, "n_shared_experts": 2, "num_experts_per_tok": 6},
    "hunyuan_v1_moe": {
        "num_experts": 64,
        "moe_topk": 8,
        "head_dim": 128,
        "hidden_size": 4096,
        "intermediate_size": 3072,
    },
    "lfm2_moe": _LAYERS4,
    "qwen4_exp": {"text_config": _QWEN4},
    "qwen4_exp_text": _QWEN4,
}
NO_READING: dict[str, str] = {
    "doge": "its experts are rows of an embedding (product keys), not matrices",
    "vitpose": "its experts are output heads picked by data set, not routed to",
    "vitpose_backbone": "its experts are output heads picked by data set, not routed to",
    "dots3_note_vision_encoder": "the number of experts differs by layer",
}
VARIANTS: tuple[tuple[str, dict[str, Any]], ...] = (
    ("nemotron_h", {"moe_latent_size": 1024}),
    ("hunyuan_v1_moe", {**OVERRIDES["hunyuan_v1_moe"], "moe_topk": [8] * 32}),
    ("granitemoehybrid", {"num_local_experts": 62, "num_experts_per_tok": 6, "intermediate_size": 512}),
    ("qwen3_moe", {"num_experts": 160, "moe_intermediate_size": 2560, "hidden_size": 6144}),
    ("jamba", {"num_experts": 8, "intermediate_size": 2000}),
)
"""More configs of types above, for keys whose default leaves them out of play."""
DENSE: tuple[str, ...] = ("gemma4", "gemma4_text", "dots1", "diffusion_gemma_text", "hunyuan_v1_moe")
"""Types whose default config has no experts: kept as cases of their own, that must be refused."""

_COUNTS = re.compile(r"^(moe_)?(num|n)_(local_|routed_|moe_)?experts$")
_KEPT = re.compile(
    r"expert|moe|top_?k|intermediate|hidden_size|hidden_act|activation|act_fn|ffn|d_model|d_ff|dense|sparse"
    r"|swiglu|softcap|latent|dtype|num_hidden_layers|layers_block_type|model_type|architectures|per_layer_config|^name$"
)
_ACTIVATION = {"SiLUActivation": "silu", "silu": "silu", "GELUTanh": "gelu_tanh", "GELUActivation": "gelu"}
_ACTIVATION |= {
    "ReLUSquaredActivation": "relu2",
    "ReLU": "relu",
    "Inkling2SoftcappedSwiGLU": "swiglu_softcapped",
}


def kept(config: dict[Any, Any]) -> dict[str, Any]:
    """The part of a config that could bear on its experts, traps included."""
    out: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, dict):
            inner = kept(value)
            if set(inner) - {"model_type", "dtype", "architectures"}:
                out[str(key)] = inner
        elif _KEPT.search(str(key)) and "loss" not in str(key) and "index_" not in str(key):
            out[str(key)] = value
    return out


def counts_experts(config: dict[Any, Any]) -> bool:
    return any(
        counts_experts(value) if isinstance(value, dict) else bool(_COUNTS.match(str(key)))
        for key, value in config.items()
    )


def truth(model: Any, config: Any) -> dict[str, Any] | None:
    """Sizes of the text model's experts, from their weights' shapes; None if the model has none."""
    modules = dict(model.named_modules())
    for path, module in modules.items():
        kind = type(module).__name__
        weights = {name: tuple(p.shape) for name, p in module.named_parameters(recurse=False)}
        if re.search(r"vision|visual|audio|self_attention|shared_expert", path):
            continue
        sizes = _sizes_of(module, kind, weights)
        if sizes is not None:
            return {**sizes, "top_k": _top_k(modules, path, config)}
    return None


def _sizes_of(module: Any, kind: str, weights: dict[str, tuple[int, ...]]) -> dict[str, Any] | None:
    if len(weights.get("down_proj", ())) == 3:
        experts, a, b = weights["down_proj"]
        gated = "gate_up_proj" in weights
        _, c, d = weights["gate_up_proj" if gated else "up_proj"]
        hidden, inner = (a, b) if (c, d) == ((2 if gated else 1) * b, a) else (b, a)  # else stored transposed
        return _row(experts, hidden, inner, _activation(module), gated)
    if kind == "DbrxExpertGLU":
        return _row(module.moe_num_experts, weights["w1"][1], weights["w1"][0] // module.moe_num_experts, "silu", True)
    if kind == "JetMoeMoE":
        experts, hidden, inner = module.output_linear.weight.shape
        gated = module.input_linear.weight.shape[1] == 2 * inner
        return _row(experts, hidden, inner, _activation(module), gated)
    if kind in ("SwitchTransformersExperts", "NllbMoeExperts"):
        experts = [child for name, child in module.named_children() if name.startswith("expert_")]
        linear = getattr(experts[0], "wi", None) or experts[0].fc1
        act = getattr(experts[0], "act", None) or experts[0].act_fn
        return _row(len(experts), linear.in_features, linear.out_features, _ACTIVATION[type(act).__name__], False)
    return None


def _row(experts: int, hidden: int, inner: int, activation: str, gated: bool) -> dict[str, Any]:
    sizes = {"num_experts": experts, "hidden_size": hidden, "moe_intermediate_size": inner}
    return {**sizes, "activation": activation, "gated": gated}


def _activation(module: Any) -> str:
    if hasattr(module, "alpha") or hasattr(module, "swiglu_alpha"):
        return "swiglu_oai"
    act = getattr(module, "act_fn", None) or getattr(module, "activation", None)
    name = "silu" if act is None else getattr(act, "__name__", type(act).__name__)
    limit = getattr(module, "limit", None) or getattr(module, "swiglu_limit", None)
    return _ACTIVATION[name] + ("_clamped" if limit not in (None, float("inf")) else "")


def _top_k(modules: dict[str, Any], path: str, config: Any) -> int:
    """What the layer's router asks torch.topk for."""
    parent = path
    while parent:
        for child, module in modules.items():
            if child.startswith(parent) and "self_att" not in child and isinstance(getattr(module, "top_k", None), int):
                return module.top_k
        parent = parent.rpartition(".")[0]
    kind = type(config).__name__
    return {"SwitchTransformersConfig": 1, "NllbMoeConfig": 2}.get(kind) or _ask_config(config)


def _ask_config(config: Any) -> int:
    """For a router that reads its config when called, with no attribute to look at."""
    text = config.get_text_config()
    for key in ("num_experts_per_tok", "top_k_experts"):
        if isinstance(getattr(text, key, None), int):
            return getattr(text, key)
    raise LookupError(f"no top_k in {type(config).__name__}")


def models_of(config: Any) -> Iterator[Any]:
    """The model classes of a config's package that build with this config, language models first."""
    from transformers import PreTrainedModel

    package = type(config).__module__.rpartition(".")[0]
    folder = Path(importlib.import_module(package).__file__ or "").parent
    for file in sorted(folder.glob("modeling_*.py")):
        module = importlib.import_module(f"{package}.{file.stem}")
        classes = [c for c in vars(module).values() if isinstance(c, type) and issubclass(c, PreTrainedModel)]
        own = [c for c in classes if c.__module__ == module.__name__ and not c.__name__.endswith("PreTrainedModel")]
        yield from sorted(own, key=lambda c: ("For" not in c.__name__, "TokenC" in c.__name__, len(c.__name__)))


def build(config: Any) -> tuple[str, dict[str, Any]]:
    """(class name, truth) of the first model that builds with experts. Raises LookupError with why not."""
    import torch

    if config.model_type == "qwen3_omni_moe":  # its language model is the thinker
        return "Qwen3OmniMoeForConditionalGeneration", build(config.thinker_config)[1]
    if config.model_type == "qwen3_omni_moe_talker_text":
        config.shared_expert_intermediate_size = 768  # read by its modelling code, missing from its config class
    problems = []
    for cls in models_of(config):
        if not isinstance(cls.config_class, type) or cls.config_class is type(config):
            try:
                with torch.device("meta"):
                    found = truth(cls(config), config)
            except Exception as error:
                problems.append(f"{cls.__name__}: {error!r}"[:200])
                continue
            if found is not None:
                return cls.__name__, found
    raise LookupError("; ".join(problems) or "no model class with experts")


def configs() -> Iterator[tuple[str, Any]]:
    """(model type, config) of every type whose config counts experts, as default or overridden; variants."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    for model_type in sorted(CONFIG_MAPPING.keys()):
        try:
            default = CONFIG_MAPPING[model_type]()
        except Exception:
            continue  # two types of 5.23 have no default config: gemma4_assistant, nougat
        if not counts_experts(default.to_dict()):
            continue
        if model_type in NO_READING or model_type in DENSE:
            yield model_type, default
        if model_type not in NO_READING:
            yield model_type, CONFIG_MAPPING[model_type](**OVERRIDES.get(model_type, {}))
    for model_type, values in VARIANTS:
        yield model_type, CONFIG_MAPPING[model_type](**values)


def cases() -> Iterator[dict[str, Any]]:
    refused = set()
    for model_type, config in configs():
        error = NO_READING.get(model_type) or ("no experts by default" if model_type in DENSE else None)
        if error and model_type not in refused:
            refused.add(model_type)
            yield {"model_type": model_type, "config": kept(config.to_dict()), "error": error}
            continue
        if model_type == "dbrx":
            config.attn_config.rope_theta = 500000.0  # read by its modelling code, missing from its config class
        architecture, expected = build(config)
        config.architectures = [architecture]
        yield {"model_type": model_type, "config": kept(config.to_dict()), "expected": expected}


def main() -> None:
    import transformers

    warnings.filterwarnings("ignore")
    rows = []
    for case in cases():
        print(case["model_type"], case.get("expected") or case["error"], file=sys.stderr)
        rows.append(json.dumps(case, sort_keys=True, allow_nan=False, default=str))
    head = f'{{"transformers": "{transformers.__version__}", "cases": [\n'
    OUT.write_text(head + ",\n".join(rows) + "\n]}\n", encoding="utf-8")


if __name__ == "__main__":
    main()
