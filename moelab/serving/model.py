"""A transformers model of a config.json's sizes and random weights, made on the device that it runs on."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moelab import hf
from moelab.errors import (
    ConfigFileError,
    OptionError,
    RuntimeModeError,
    UnknownArchitectureError,
    nearest_names,
)
from moelab.model_config import load_config_file, read_model_config
from moelab.presets import source_of
from moelab.serving.coded import filled, format_of, kept, with_codes

SIZES = (
    ("num_hidden_layers",), ("num_attention_heads",), ("num_key_value_heads", "kv_lora_rank"), ("vocab_size",),
)  # fmt: skip
"""Sizes of the model around its experts, of each line one: transformers would put a default of its own in their place."""

SPARE = 0.05
"""Of the memory, left for activations; a cell whose cache finds no room is an outcome of its own."""


def read_config(model: str | Path | Mapping[str, Any], layers: int | None = None) -> Any:
    """The transformers config of a preset, an id, a config.json or what stands in one, of its first `layers` layers.

    Quantised experts: fp8 in blocks, as `moelab.serving.coded` has them. Raises ConfigFileError for a file without the
    attention's sizes, FormatError for other quantised weights, OptionError for a number of layers that the model has not,
    UnknownArchitectureError for one that transformers does not know, UnknownModelError.
    """
    source = "The config" if isinstance(model, Mapping) else source_of(model)[0]
    content = dict(model) if isinstance(model, Mapping) else load_config_file(source)
    section = dict(read_model_config(content).section)
    kind = section.get("model_type") or content.get("model_type")
    coded = kept(source, content, section)
    section.pop("quantization_config", None)
    lacking = [" or ".join(names) for names in SIZES if not any(section.get(name) for name in names)]
    if lacking:
        raise ConfigFileError(
            f"{source} says no {', '.join(lacking)}. Expected the sizes of the whole model, not of its experts alone: "
            "transformers would put its own defaults in their place. Give the path of the config.json as it was published."
        )
    config = _config_class(kind).from_dict(section)
    if coded is not None:
        config.quantization_config = coded
    return cut(config, layers)


def _config_class(kind: Any) -> Any:
    hf.register()  # says what to do where transformers is missing
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    known = list(CONFIG_MAPPING.keys())
    if kind not in known:
        from transformers import __version__

        raise UnknownArchitectureError(
            f"transformers {__version__} has no model_type {kind!r}.{nearest_names(str(kind), known)} Expected one that it has. "
            "Install a newer transformers, or correct the config.json."
        )
    return CONFIG_MAPPING[kind]


def cut(config: Any, layers: int | None) -> Any:
    """The config with its first `layers` layers; what lists a kind for each layer is cut with it."""
    whole = config.num_hidden_layers
    if layers is None or layers == whole:
        return config
    if not 1 <= layers <= whole:
        raise OptionError(f"--layers {layers}: the model has {whole}. Expected 1 to {whole}. Correct it.")
    for name, value in config.to_dict().items():
        if isinstance(value, list) and len(value) == whole and all(isinstance(kind, str) for kind in value):
            setattr(config, name, value[:layers])
    config.num_hidden_layers = layers
    return config


def build(config: Any, device: str, dtype: torch.dtype, seed: int = 0) -> Any:
    """The model for inference, its weights drawn where they lie; of experts in fp8 the codes, and nothing else in fp8.

    Raises RuntimeModeError, before anything is made, where the memory holds it not: it says how many layers would fit.
    """
    from transformers import AutoModelForCausalLM

    require_room(config, device, dtype)
    torch.manual_seed(seed)
    if format_of(config) is None:
        with torch.device(device):
            model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    else:
        model = filled(_on_meta(config, dtype), device, seed)
    hf.experts_of(model)  # raises where none of the layers has any
    return model.eval().requires_grad_(False)


def require_room(config: Any, device: str, dtype: torch.dtype) -> None:
    """Raise RuntimeModeError unless the weights fit the free memory, with SPARE of it left over."""
    sizes = weight_bytes(config, dtype)
    free = free_bytes(device) * (1 - SPARE)
    if sizes["all"] <= free:
        return
    layers = config.num_hidden_layers
    fit = int(max(0, layers - -(-(sizes["all"] - free) // max(1, sizes["last layer"]))))
    raise RuntimeModeError(
        f"Weights of {layers} layers take {sizes['all'] / 2**30:.1f} GiB, and {free / 2**30:.1f} GiB are free on {device}. "
        f"Expected a model that fits. {f'Pass --layers {fit}, or fewer' if fit else 'Not one layer fits: take a smaller model'}."
    )


def weight_bytes(config: Any, dtype: torch.dtype) -> Mapping[str, int]:
    """Bytes of the model's weights ("all") and of its last layer's, found without making them."""
    model = _on_meta(config, dtype)
    lists = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == config.num_hidden_layers]
    return {"all": _bytes_of(model), "last layer": _bytes_of(lists[0][-1]) if lists else 0}


def _on_meta(config: Any, dtype: torch.dtype) -> Any:
    """The model without values."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype, attn_implementation="sdpa")
    format = format_of(config)
    return model if format is None else with_codes(model, format)


def _bytes_of(module: nn.Module) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in module.parameters())


def free_bytes(device: str) -> int:
    """Free memory of the GPU; of a machine without one, all that it has."""
    if device == "cuda":
        return torch.cuda.mem_get_info()[0]
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
