"""A transformers model's decode step compiled whole, with CUDA graphs where there is a GPU: its experts are one node of it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from moelab import hf, runtime

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
hf.register()

DEVICE = runtime.current().device
CONTEXT, STEPS = 5, 4


def model_of(dtype: torch.dtype) -> Any:
    """Two layers of 16 experts, of sizes that every kernel takes."""
    config = transformers.AutoConfig.for_model(
        "qwen3_moe", vocab_size=128, hidden_size=256, intermediate_size=256, moe_intermediate_size=128, num_hidden_layers=2,
        num_attention_heads=4, num_key_value_heads=2, head_dim=64, num_experts=16, num_experts_per_tok=4, eos_token_id=None,
        pad_token_id=0, bos_token_id=1,
    )  # fmt: skip
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(config, dtype=dtype).eval().requires_grad_(False)
    for name, parameter in model.named_parameters():
        if "experts" in name:
            nn.init.normal_(parameter, std=0.1)
    return model.to(DEVICE)


def decoded(model: Any, name: str, compiled: bool) -> list[torch.Tensor]:
    """The logits of some steps over a static cache, each over the same tokens."""
    from transformers import StaticCache

    model.set_experts_implementation(name)
    cache = StaticCache(config=model.config, max_cache_len=CONTEXT + STEPS)
    ids = torch.arange(2, 2 + 2 * (CONTEXT + STEPS), device=DEVICE).reshape(2, -1)
    forward = torch.compile(model.forward, fullgraph=True, mode="reduce-overhead") if compiled else model.forward
    found = []
    with torch.no_grad():
        model(input_ids=ids[:, :CONTEXT], past_key_values=cache, use_cache=True)
        for i in range(CONTEXT, CONTEXT + STEPS):
            if compiled:
                torch.compiler.cudagraph_mark_step_begin()
            found.append(forward(input_ids=ids[:, i : i + 1], past_key_values=cache, use_cache=True).logits.clone())
    return found


def judge(model: Any, name: str) -> None:
    """As near to the eager step as two eager steps under other kernels are: the rest of the model is fused otherwise."""
    eager = decoded(model, name, False)
    torch.compiler.reset()
    ours = decoded(model, name, True)
    for one, other in zip(eager, ours, strict=True):
        assert one.isfinite().all() and one.abs().max() > 0
        assert (one.double() - other.double()).norm() <= 0.02 * one.double().norm()


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["moelab_fast", "moelab_triton", "moelab"])
def test_a_compiled_decode_step_holds_its_experts_in_one_graph(name: str) -> None:
    judge(model_of(torch.bfloat16), name)


@pytest.mark.whole
@pytest.mark.skipif(DEVICE != "cpu", reason="has a GPU, which does it itself")
def test_a_compiled_decode_step_on_a_cpu() -> None:
    judge(model_of(torch.float32), "moelab_torch")
