"""A model's config.json through `moelab shape`, and what of a model is read of it."""

from __future__ import annotations

import functools
import json
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from fuzz import Case, command, spoil
from moelab import runtime
from moelab.errors import MoelabError
from moelab.model_config import read_model_config

TYPED = (
    "torch_dtype", "dtype", "architectures", "model_type", "n_shared_experts", "num_shared_experts", "num_hidden_layers",
    "first_k_dense_replace", "mlp_layer_types", "layers_block_type", "quantization_config", "enable_moe_block",
)  # fmt: skip
"""Keys that are read by their names: a value of another kind is refused, whatever it would come to."""

LEFT_OUT = ("weight_bytes", "warnings")


def cases(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Two of three spoil a value, the others bytes, or the file."""
    folder.mkdir(parents=True, exist_ok=True)
    path, goods = folder / "config.json", _goods()
    while True:
        good = rng.choice(goods)
        how = rng.choice(("value", "value", "value", "typed", "bytes", "twice", "special"))
        path = spoil.cleared(path)
        if how == "special":
            what, make = rng.choice(list(spoil.SPECIAL.items()))
            make(path)
            yield Case(what, functools.partial(_shape, path), lambda _: False)
            continue
        what, data, right = _spoiled(rng, how, good)
        path.write_bytes(data)
        yield Case(what, functools.partial(_shape, path), right)


def _goods() -> list[dict[str, Any]]:
    files = sorted((runtime.data_dir() / "models").glob("*.json"))
    return [json.loads(file.read_text()) for file in files]


def _shape(path: Path) -> dict[str, Any]:
    said = command("shape", "--model", path, "--device", "NVIDIA H200", "--json")
    return {key: value for key, value in json.loads(said).items() if key not in LEFT_OUT}


def _spoiled(rng: random.Random, how: str, good: dict[str, Any]) -> tuple[str, bytes, Any]:
    if how == "bytes":
        what, data = spoil.spoiled_bytes(rng, json.dumps(good, indent=2).encode())
        return what, data, lambda answer: answer["hidden_size"] == getattr(_plainly(data), "hidden_size", None)
    if how == "twice":
        text = json.dumps(good)[:-1] + ', "num_experts_per_tok": 3, "num_experts_per_tok": 4}'
        return "num_experts_per_tok put in twice", text.encode(), lambda _: False
    reading = read_model_config(good)
    read = [key.split(".") for key in reading.keys_used if "." not in key]
    if how == "typed" or not read:
        key = rng.choice(TYPED)
        value = rng.choice([v for v in spoil.HOSTILE if v is not None and not _is_meant(key, v)])
        return f"{key} = {str(value)[:40]!r}", spoil.dumps(good | {key: value}).encode(), lambda _: False
    (key,) = rng.choice(read)
    value = rng.choice([v for v in spoil.HOSTILE if v is not None and spoil.is_hostile_to(good[key], v)])
    if isinstance(good[key], str) and isinstance(value, str):
        return _spoiled(rng, how, good)
    return f"{key} = {str(value)[:40]!r}", spoil.dumps(good | {key: value}).encode(), lambda _: False


def _is_meant(key: str, value: Any) -> bool:
    """Whether a value may stand under that key."""
    if isinstance(value, spoil.Raw):
        return False
    kinds = {
        "torch_dtype": str, "dtype": str, "model_type": str, "enable_moe_block": bool, "quantization_config": dict,
        "architectures": list, "mlp_layer_types": list, "layers_block_type": list,
    }  # fmt: skip
    kind = kinds.get(key, int)
    if kind is list:
        return value == []
    if kind is str:
        return key == "model_type" and isinstance(value, str)
    return type(value) is kind and kind is not int


def _plainly(data: bytes) -> Any:
    try:
        return read_model_config(json.loads(data.decode("utf-8")))
    except (ValueError, RecursionError, MoelabError, TypeError):
        return None
