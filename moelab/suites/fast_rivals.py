"""What the one-launch layer is set beside: the classic layer at its best, and torch's grouped product."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from moelab import runtime
from moelab.config import KernelConfig
from moelab.config_files import question
from moelab.errors import RecordingError
from moelab.kernels.expert_order import expert_order
from moelab.recordings import load
from moelab.reference import activation_ref
from moelab.shapes import MoEShape
from moelab.suites import layer_classic
from moelab.suites.layer_baseline import choose
from moelab.suites.layer_classic import Layer, protocol_for
from moelab.suites.screening import quick

Contender = Callable[[int], Tensor]


def classic(layer: Layer, name: str) -> tuple[Contender, dict[str, Any]]:
    """The classic kernel under the fastest of what is known for this cell: tuned files, what layer_baseline chose."""
    pairs = known_configs(layer, name)
    if not pairs:
        chosen = choose(layer, "triton", protocol_for(layer.num_tokens).rotations)
        pairs = [(chosen.up, chosen.down)]
    contenders = {pair: layer.contender(*pair) for pair in pairs}
    times = quick(contenders, protocol_for(layer.num_tokens).rotations)
    best = min(times, key=lambda pair: times[pair].median_us)
    return contenders[best], {"config": best[0].to_json(), "down_config": best[1].to_json(), "tried": len(pairs)}


def known_configs(layer: Layer, name: str) -> list[tuple[KernelConfig, KernelConfig]]:
    """Pairs recorded as fastest for this shape and batch size: by the tuner's files, by layer_baseline, by sglang's rows."""
    pairs = []
    try:
        rows = load("layer_baseline").rows
    except RecordingError:
        rows = ()
    for row in rows:
        if (row["shape"], row["num_tokens"], row["impl"]) == (name, layer.num_tokens, "triton") and row.get("config"):
            pairs.append((KernelConfig.from_json(row["config"]), KernelConfig.from_json(row["down_config"])))
    up, down = (tuned(layer.shape, layer.num_tokens, down=down) for down in (False, True))
    if up is not None and down is not None and up.BLOCK_SIZE_M == down.BLOCK_SIZE_M:
        pairs.append((up, down))
    for row in layer_classic.peer_rows():
        if (row["name"], row["M"]) == (name, layer.num_tokens) and row.get("tuned_cfg"):
            one = KernelConfig.from_json(row["tuned_cfg"])
            pairs.append((one, one))
    return list(dict.fromkeys(pairs))


def tuned(shape: MoEShape, num_tokens: int, *, down: bool) -> KernelConfig | None:
    """What the loader finds for this device, if it finds a file."""
    found = question(shape).lookup(
        runtime.current().device_name, num_tokens=num_tokens, triton_version=runtime.versions()["triton"] or "unknown",
        down=down,
    )  # fmt: skip
    return None if found.is_default else found.config


def grouped_mm(layer: Layer) -> Contender:
    """torch's grouped product over tokens sorted beforehand; what is between and after in eager torch."""
    shape = layer.shape
    orders = [expert_order(r.topk_ids, shape.num_experts) for r in layer.routings]
    sorted_slots = [order.sorted_slots.long() for order in orders]

    def run(i: int) -> Tensor:
        w, r, slots, ends = layer.weights[i], layer.routings[i], sorted_slots[i], orders[i].expert_offsets[1:]
        h = torch.nn.functional.grouped_mm(layer.states[i][slots // shape.top_k], w.w13.transpose(1, 2), offs=ends)
        h = activation_ref(h, shape.activation, gated=shape.gated)
        y = torch.nn.functional.grouped_mm(h, w.w2.transpose(1, 2), offs=ends)
        y = y * r.topk_weights.flatten()[slots].unsqueeze(1).to(y.dtype)
        return torch.empty_like(y).index_copy(0, slots, y).view(layer.num_tokens, shape.top_k, -1).sum(1)

    return run
