"""Emulated launches of sm90_fast_layer.cu over fp8 codes against float64, stage by stage, and small forms of it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import emulated_gpu
import torch
from fast_cases import ordered
from torch import Tensor

from moelab import reference
from moelab.formats import Format, get_format
from moelab.kernels.fast_instances import BLOCK, SOURCE, Instance
from moelab.kernels.fast_quantised import Coded, scale_place
from moelab.kernels.token_tiles import TokenTiles
from moelab.quantised_weights import dequantise, dequantise_activations, quantise, quantise_activations
from moelab.weights import ExpertWeights

BLOCKS = get_format("fp8_w8a8_block_128x128")
SMALL = Instance(2, 2, 2, 16, 16, 16, ctas_per_sm=2, scaled=1)
MIDDLE = Instance(2, 2, 2, 48, 16, 16, scaled=1)
WIDE = Instance(2, 2, 2, 128, 64, 16, apart=1, scaled=1)
PAIR, PERMUTED = (replace(MIDDLE, apart=1, **more) for more in ({"cluster": 2}, {"permutes": 1}))
PERMUTED_PAIR = replace(PERMUTED, cluster=2)
FIRST = Instance(2, 2, 2, 128, 64, 64, apart=1, scaled=2)
"""Tokens as wgmma's M."""
FIRST_PERMUTED = replace(FIRST, permutes=1)
FIRST_PAIR = replace(FIRST_PERMUTED, cluster=2)


class Case(NamedTuple):
    """A layer's tensors: x as it is, its codes by token, weights, routing."""

    x: Tensor
    weights: ExpertWeights
    topk_weights: Tensor
    ids: Tensor

    @property
    def format(self) -> Format:
        return self.weights.format


def case(
    num_tokens: int, experts: int, top_k: int, hidden: int, size: int, *, ids: Tensor | None = None,
    format: Format = BLOCKS, dtype: torch.dtype = torch.float16, seed: int = 0,
) -> Case:  # fmt: skip
    """Blocks of weights and groups of activations of very different magnitudes: a scale that is another's shows."""
    g = torch.Generator().manual_seed(seed)

    def matrix(rows: int, columns: int) -> Tensor:
        spread = torch.exp2(torch.randint(-3, 4, (experts, rows // BLOCK, columns // BLOCK), generator=g).float())
        wide = spread.repeat_interleave(BLOCK, 1).repeat_interleave(BLOCK, 2)
        return torch.randn(experts, rows, columns, generator=g) * wide * columns**-0.5

    up, down = quantise(matrix(2 * size, hidden), format), quantise(matrix(hidden, size), format)
    x = torch.randn(num_tokens, hidden, generator=g)
    x *= torch.exp2(torch.randint(-3, 4, (num_tokens, hidden // BLOCK), generator=g).float()).repeat_interleave(
        BLOCK, 1
    )
    if ids is None:
        ids = torch.stack([torch.randperm(experts, generator=g)[:top_k] for _ in range(num_tokens)]).int()
    return Case(x.to(dtype), ExpertWeights.of(up, down), torch.rand(ids.shape, generator=g), ids)


def coded(of: Case, tiles: TokenTiles, instance: Instance) -> Coded:
    """x as that instance reads it, by torch."""
    codes, scale = quantise_activations(of.x, of.format)
    if not instance.permutes:
        return Coded(codes, scale)
    token = tiles.sorted_slots.long().clamp(0, of.ids.numel() - 1) // of.ids.shape[1]  # left out slots: no matter whose
    tiled = torch.full((tiles.most, scale.shape[1], instance.tokens), float("nan"))
    for tile, (first, rows, *_) in enumerate(tiles.tiles[: int(tiles.num_tiles)].tolist()):
        places = torch.tensor([scale_place(row, instance) for row in range(rows)], dtype=torch.long)
        tiled[tile][:, places] = scale[token[first : first + rows]].T
    return Coded(codes.view(torch.uint8)[token].view(codes.dtype), tiled)


def stages(
    of: Case, instance: Instance, *, blocks: int = 2, on_input: bool = False, source: Path = SOURCE, late: int = -1,
    scale: float = 1.5, lost_weights: float | None = None,
) -> dict[str, float]:  # fmt: skip
    """Of one emulated layer, against float64 over what each stage was given: the largest error of inner over its group's scale;
    of its scales, relative; of rows of y over the row's largest; of out over its largest."""
    tiles = ordered(of.ids, of.weights.num_experts, instance)
    lost = (of.ids < 0) | (of.ids >= of.weights.num_experts)
    weights = of.topk_weights if lost_weights is None else torch.where(lost, lost_weights, of.topk_weights)
    out, ready, inner, inner_scale, y = emulated_gpu.run_coded(
        coded(of, tiles, instance), of.weights, weights, of.ids, tiles, instance, of.x.dtype, scale=scale,
        weights_on_input=on_input, blocks=blocks, source=source, late=late,
    )  # fmt: skip
    assert not ready.any()  # left as it was found
    found = {"inner": 0.0, "scale": 0.0, "y": 0.0}
    num_tokens, top_k = of.ids.shape
    x = dequantise_activations(*quantise_activations(of.x, of.format), of.format)
    w13, w2 = dequantise(of.weights.up), dequantise(of.weights.down)
    total = torch.zeros(num_tokens, of.x.shape[1], dtype=torch.float64)
    for tile, (first, rows, expert, _) in enumerate(tiles.tiles[: int(tiles.num_tiles)].tolist()):
        slots = tiles.sorted_slots[first : first + rows].long()
        by = of.topk_weights.flatten()[slots].double()[:, None]
        h = x[slots // top_k] @ w13[expert].T
        exact = reference.activation_ref(h * by if on_input else h, "silu", gated=True)
        places = torch.tensor([scale_place(row, instance) for row in range(rows)], dtype=torch.long)
        scales = inner_scale[tile][:, places].T
        expected = quantise_activations(exact.float(), of.format)[1]
        given = dequantise_activations(inner[first : first + rows], scales, of.format)
        found["scale"] = max(found["scale"], float((scales / expected - 1).abs().max())) if rows else found["scale"]
        off = (given - exact).abs().unflatten(1, (-1, BLOCK)) / scales.double().unsqueeze(-1)
        found["inner"] = max(found["inner"], float(off.nan_to_num(nan=float("inf")).max())) if rows else found["inner"]
        wanted = given @ w2[expert].T * (1.0 if on_input else by) * (scale if top_k == 1 else 1.0)
        got = (out if top_k == 1 else y)[slots].double()
        error = (got - wanted).abs().amax(1) / wanted.abs().amax(1)
        found["y"] = max(found["y"], float(error.nan_to_num(nan=float("inf")).max())) if rows else found["y"]
        total.index_add_(0, slots // top_k, got * (1.0 if top_k == 1 else scale))
    found["out"] = float(
        (out.double() - total).abs().nan_to_num(nan=float("inf")).max() / total.abs().max().clamp(min=1e-9)
    )
    return found


BOUNDS = {"inner": 16.5, "scale": 1e-5, "y": 2**-10, "out": 2**-10}
"""A code next to 448 is 32 from the one before it, so a rounding moves a value by 16; float16 rounds y by 2^-11 of itself."""


def compare(instance: Instance, *sizes: int, **options: Any) -> None:
    """One emulated layer within BOUNDS at each stage."""
    runs = {
        name: options.pop(name) for name in ("blocks", "on_input", "source", "late", "lost_weights") if name in options
    }
    found = stages(case(*sizes, **options), instance, **runs)
    assert all(found[name] <= bound for name, bound in BOUNDS.items()), found
