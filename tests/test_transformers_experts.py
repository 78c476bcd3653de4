"""Every experts class of the installed transformers: computed as its own forward does, or refused by name."""

from __future__ import annotations

import functools
import importlib
import inspect
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from moelab import precision
from moelab.errors import MoelabError
from moelab.module import FusedMoE
from moelab.routing import make_routing

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
E, K, H, N, TOKENS = 4, 2, 32, 16, 6
ROOT = Path(transformers.__file__).parent / "models"
DECORATED = re.compile(r"@use_experts_implementation[^\n]*\n(?:@[^\n]*\n)*class (\w+)")
SIZES = (
    (re.compile(r"^(num|n|moe_num)_(?!.*(shared|group)).*experts?$"), E),
    (re.compile(r"intermediate_size|expert_.*size|ffn_hidden"), N),
    (re.compile(r"^(hidden_size|moe_latent_size)$"), H),
)
REFUSED = {
    "DeepseekV4Experts": "none of moelab's",  # clamped at 10
    "Glm5NextTextExperts": "none of moelab's",
    "HYV4Experts": "none of moelab's",
    "Inkling2Experts": "none of moelab's",  # softcapped
    "MuseSparkExperts": "a norm after its experts",
}
"""transformers 5.23.0: class -> what moelab says."""


def classes() -> Iterator[tuple[str, str]]:
    for path in sorted(ROOT.glob("*/modeling_*.py")):
        for match in DECORATED.finditer(path.read_text()):
            yield f"{path.parent.name}.{path.stem}", match[1]


def small(config: Any) -> Any:
    """The config with its sizes replaced, whatever they are called."""
    for key in vars(config):
        value = next((size for pattern, size in SIZES if pattern.search(key)), None)
        if value is not None and not isinstance(vars(config)[key], bool | list):
            setattr(config, key, value)
    return config


def tiny_block(module: str, name: str) -> nn.Module:
    """One experts block of that class, made from whichever config of its file has what it asks for."""
    found = importlib.import_module(f"transformers.models.{module}")
    base, made = transformers.PreTrainedConfig, getattr(found, name)
    configs = [c for c in vars(found).values() if isinstance(c, type) and issubclass(c, base) and c is not base]
    rest = [key for key in list(inspect.signature(made.__init__).parameters)[2:] if key not in ("args", "kwargs")]
    named = {key: N if "intermediate_size" in key else 0 for key in rest}
    reasons = []
    for config in sorted(configs, key=lambda c: ("Text" not in c.__name__, c.__name__)):
        for part in (lambda c: c, lambda c: c.get_text_config()):
            try:
                block = made(small(part(config())), **named)
            except Exception as error:
                reasons.append(f"{config.__name__}: {error}")
                continue
            block.config._experts_implementation = "eager"
            return block.double()
    raise AssertionError(f"{name} could not be made: {reasons}")


@functools.cache
def drawn() -> tuple[torch.Tensor, Any]:
    return torch.randn(TOKENS, H, dtype=torch.float64, generator=torch.Generator().manual_seed(3)), make_routing(
        "uniform", TOKENS, E, K
    )


@pytest.mark.slow
@pytest.mark.parametrize(("module", "name"), [pytest.param(*found, id=found[1]) for found in classes()])
def test_equal_to_its_own_forward_or_refused_by_name(module: str, name: str) -> None:
    torch.manual_seed(0)
    block = tiny_block(module, name)
    for parameter in block.parameters():
        nn.init.normal_(parameter, std=0.8)  # wide enough that clamps at 7 are met
    if name in REFUSED:
        with pytest.raises(MoelabError, match=REFUSED[name]):
            FusedMoE.from_hf(block, top_k=K)
        return
    x, routing = drawn()
    with torch.no_grad():
        expected = block(x, routing.topk_ids.long(), routing.topk_weights.double())
    out = FusedMoE.from_hf(block, top_k=K, impl="torch")(
        x, topk_ids=routing.topk_ids, topk_weights=routing.topk_weights
    )
    # float32 inside, on purpose, in two of them: Beam's gate and the privacy filter's sum.
    unit = torch.finfo(torch.float32 if name in ("BeamExperts", "OpenAIPrivacyFilterExperts") else torch.float64).eps
    assert precision.error(out, expected).max_rel < 100 * unit, name


def test_the_list_is_found() -> None:
    names = {name for _, name in classes()}
    assert len(names) > 50 and {"MixtralExperts", "Qwen3MoeExperts", "GptOssExperts", "Lfm2MoeExperts"} <= names
