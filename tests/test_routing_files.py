"""Workloads that FlashInfer-Bench captured, read as a routing: the ids of every line, and what is wrong with a set."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch

from moelab.errors import RoutingError
from moelab.routing import load_routing, make_routing

NAME = "moe_bf16_topk4_e16_h64_i32"
BLOBS = f"blob/workloads/moe/{NAME}"
HERE = {"type": "safetensors", "path": f"{BLOBS}/0.safetensors"}


def line(number: int, definition: str = NAME, **inputs: Any) -> dict[str, Any]:
    at = {"type": "safetensors", "path": f"./{BLOBS}/{number}.safetensors"}
    known = {
        "hidden_states": {"type": "random"},
        "topk_ids": at | {"tensor_key": "ids"},
        "scale": {"type": "scalar", "value": 1.0},
    }
    workload = {"uuid": str(number), "axes": {"seq_len": 5 + number}, "inputs": known | inputs}
    return {"definition": definition, "workload": workload, "solution": None, "evaluation": None}


def written(root: Path, lines: list[Any]) -> Path:
    """A set of workloads of 5 and 6 tokens, with a second tensor in each file."""
    (root / BLOBS).mkdir(parents=True, exist_ok=True)
    for number in range(2):
        ids = make_routing("zipf", 5 + number, 16, 4, seed=number).topk_ids
        tensors = {"a": torch.zeros(3), "ids": ids, "z": torch.ones(2, 2)}
        safetensors.torch.save_file(tensors, root / BLOBS / f"{number}.safetensors")
    path = root / "workloads" / "moe" / f"{NAME}.jsonl"
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("\n".join(one if isinstance(one, str) else json.dumps(one) for one in lines) + "\n")
    return path


def test_the_ids_of_every_workload_come_one_after_another(tmp_path: Path) -> None:
    found = load_routing(written(tmp_path, [line(0), line(1)]), 16)
    expected = torch.cat([make_routing("zipf", 5 + n, 16, 4, seed=n).topk_ids for n in range(2)])
    assert torch.equal(found.topk_ids, expected) and found.name == f"{NAME}.jsonl"
    with pytest.raises(RoutingError, match="with 8 experts"):
        load_routing(written(tmp_path, [line(0)]), 8)


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        ([], "holds no workload"),
        (["{"], "a line 1 that"),
        ([line(0), {"definition": NAME}], "a line 2 that"),
        ([line(0), line(1, "another")], "2 definitions"),
        ([line(0, topk_ids={"type": "random"})], "hold no ids .*from logits only"),
        ([line(7)], "7.safetensors, which is in none of"),
        ([line(0, topk_ids={"type": "safetensors", "path": "/etc/passwd", "tensor_key": "a"})], "no path below its set"),
        ([line(0, topk_ids={"type": "safetensors", "path": "../x", "tensor_key": "a"})], "no path below its set"),
        ([line(0, topk_ids=HERE | {"tensor_key": "b"})], "no tensor 'b', but a, "),
        ([line(0, topk_ids=HERE | {"tensor_key": "a"})], "F32, which is no int"),
    ],
)  # fmt: skip
def test_a_set_that_cannot_be_read_says_where(tmp_path: Path, lines: list[Any], words: str) -> None:
    with pytest.raises(RoutingError, match=words):
        load_routing(written(tmp_path, lines), 16)


def test_ids_of_another_width_are_no_routing_of_one_layer(tmp_path: Path) -> None:
    path = written(tmp_path, [line(0), line(1)])
    safetensors.torch.save_file({"ids": torch.zeros(3, 2, dtype=torch.int32)}, tmp_path / BLOBS / "1.safetensors")
    with pytest.raises(RoutingError, match=r"shapes \(5, 4\), \(3, 2\)"):
        load_routing(path, 16)
