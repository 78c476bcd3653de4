"""A tiny Qwen3-MoE for the tests of the serving benchmark: its config.json, and a plan of a quick run."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from moelab import runtime
from moelab.serving import requests, suite
from moelab.serving.clock import Protocol

transformers = pytest.importorskip("transformers", reason="transformers is not installed")
E, K, LAYERS = 8, 2, 3
CONFIG = {
    "architectures": ["Qwen3MoeForCausalLM"], "model_type": "qwen3_moe", "num_experts": E, "num_experts_per_tok": K,
    "hidden_size": 32, "moe_intermediate_size": 24, "intermediate_size": 48, "num_hidden_layers": LAYERS,
    "hidden_act": "silu", "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16, "vocab_size": 64,
}  # fmt: skip
QUICK = Protocol(sample_ms=0.01, cell_s=0.01, fewest=2, most=2)
DEVICE = runtime.current().device
PAIR = (
    ("eager", "moelab_torch") if DEVICE == "cpu" else ("batched_mm", "moelab_triton")
)  # on a GPU those that a graph takes


def a_file(folder: Path, **changes: Any) -> Path:
    path = folder / "config.json"
    path.write_text(json.dumps({key: value for key, value in {**CONFIG, **changes}.items() if value is not None}))
    return path


def plan(config: Path, **changes: Any) -> suite.Plan:
    load = requests.Load(2, 5, 3, rate=math.inf, runs=1)
    given = {"dtype": "float32", "contenders": PAIR, "prefills": ((2, 8),), "decodes": (3,), "context": 6,
             "load": load, "protocol": QUICK}  # fmt: skip
    return suite.Plan(str(config), **given | changes)


def alone() -> Iterator[None]:
    """For a fixture: one thread. A tiny model gains nothing by more, and beside other processes each call would wait for them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
