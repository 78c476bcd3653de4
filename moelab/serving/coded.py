"""A model whose experts are fp8 codes in blocks, as transformers' quantiser makes them, of random codes and scales.

Only the experts: transformers computes its fp8 linears by kernels that it downloads (deepgemm, finegrained-fp8), which a node
without a network has not. All else keeps the plain dtype.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import nn

from moelab import hf, hf_fp8
from moelab.errors import FormatError
from moelab.formats import Format
from moelab.quantization import read_quantisation

REST = "the experts alone; linears are plain, for transformers has their fp8 kernels from a hub"
"""What of a checkpoint in fp8 is not had, as a protocol says it."""

CODES = 64.0
"""Standard deviation of random codes: seven of them are e4m3's largest, 448."""

DEVIATION = 0.02
"""Of the values that they stand for, where the config names no initializer_range: what transformers draws plain weights by."""


def kept(source: str | Path, content: Mapping[str, Any], section: Mapping[str, Any]) -> dict[str, Any] | None:
    """The `quantization_config` of a config.json whose experts are fp8 in blocks; None for plain experts.

    source: to begin the sentence. Raises FormatError for any other, and where transformers has no such experts.
    """
    found = read_quantisation(content, section)
    if found.format.is_plain:
        return None
    if found.method != "fp8" or found.format.family != hf_fp8.FAMILY or found.format.power_of_two_scales:
        raise FormatError(
            f"{source} has experts in the format {found.format.name} ({found.method}). Expected plain weights, or fp8 in blocks "
            "with float32 scales (quant_method 'fp8' with a weight_block_size), for which transformers has experts of its own. "
            "Name the config.json of the model in bfloat16."
        )
    if hf_fp8.interface() is None:
        from transformers import __version__

        raise FormatError(
            f"{source} has experts in the format {found.format.name}, and transformers {__version__} has no FP8ExpertsInterface. "
            "Expected one that has. Install a newer one, or name the config.json of the model in bfloat16."
        )
    return dict(content.get("quantization_config") or section["quantization_config"])


def format_of(config: Any) -> Format | None:
    """The format of the experts of a config that `kept` has had its say of; None for plain ones."""
    found = getattr(config, "quantization_config", None)
    return read_quantisation({"quantization_config": found}, config.to_dict()).format if found else None


def with_codes(model: nn.Module, format: Format) -> nn.Module:
    """The model, on meta, with transformers' FP8Experts in place of its experts, without values.

    Raises UnknownNameError for a model whose experts transformers does not dispatch, FormatError for experts that it has not in
    fp8.
    """
    from transformers import FineGrainedFP8Config
    from transformers.integrations.finegrained_fp8 import replace_with_fp8_linear

    hf.experts_of(model)  # raises where there are none
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    asked = FineGrainedFP8Config(weight_block_size=format.block_shape or (128, 128), modules_to_not_convert=linears)
    try:
        replace_with_fp8_linear(model, modules_to_not_convert=linears, quantization_config=asked)
        why = ", ".join({type(block).__name__ for block in hf.experts_of(model).values() if not hf_fp8.is_coded(block)})
    except (AssertionError, AttributeError) as error:  # biases, or a config that names their number otherwise
        why = f"{type(error).__name__}: {error}"
    if why:
        raise FormatError(
            f"transformers makes no FP8Experts of {type(model).__name__}'s ({why}). Expected experts that it has in fp8. Name "
            "the config.json of the model in bfloat16."
        )
    return model


def filled(model: Any, device: str, seed: int) -> Any:
    """The model of `with_codes` on the device, its weights drawn there: plain ones as transformers does, codes normal, each
    block's scale positive and up to three times another's."""
    model.to_empty(device=device)
    model.init_weights()
    deviation = getattr(model.config.get_text_config(), "initializer_range", DEVIATION)
    drawn = torch.Generator(device).manual_seed(seed)
    for block in hf.experts_of(model).values():
        for name, codes in block.named_parameters(recurse=False):
            if codes.dtype == torch.float8_e4m3fn:
                for expert in codes.data:
                    values = torch.randn(expert.shape, generator=drawn, device=device)
                    expert.copy_(values.mul_(CODES).clamp_(-448, 448))
                scale = getattr(block, f"{name}_scale_inv").data
                scale.uniform_(0.5, 1.5, generator=drawn).mul_(deviation / CODES)
    return model
