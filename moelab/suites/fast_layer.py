"""The fastest layer beside the classic one and torch's grouped product, and what each of its ideas is worth.

Order, tiles and alignment are made beforehand for all, as sglang's rows were timed (data/upstream/h200_sglang.json); the layer
from router logits, routing and order included, is a figure of its own.
"""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from moelab import runtime
from moelab.config import KernelConfig
from moelab.errors import MoelabError
from moelab.fused_moe import fused_moe
from moelab.inputs import random_tensor
from moelab.kernels import few_tokens as few_room
from moelab.kernels.align import align
from moelab.kernels.fast_instances import ALL, Instance
from moelab.kernels.fast_layer import GEMM1, GEMM2, SUM, fast_layer
from moelab.kernels.few_tokens import FewTokens, few_tokens
from moelab.kernels.gated_gemm import gated_gemm
from moelab.kernels.route import route
from moelab.kernels.sorted_gemm import sorted_gemm
from moelab.kernels.sum_reduce import sum_reduce
from moelab.kernels.token_tiles import TokenTiles
from moelab.measure import Measurement, measure
from moelab.pipelines.fast import choose_unchecked, here, route_for, tiles_for, tuned
from moelab.pipelines.form_choice import Classic, Form, Gated, kind_of
from moelab.pipelines.form_times import GATED, ONE_LAUNCH
from moelab.recordings import Recording
from moelab.shapes import MoEShape, load_model
from moelab.suites import layer_classic
from moelab.suites.bench import cost_of, judge
from moelab.suites.fast_rivals import classic, grouped_mm
from moelab.suites.layer_classic import Layer, protocol_for, weight_sets
from moelab.suites.partial import OnRows, ignore
from moelab.suites.screening import quick

SHAPES = {
    **layer_classic.SHAPES,
    "mixtral-8x7b/tp2": ("mixtral-8x7b", 2),
    "qwen3-235b-a22b/tp4": ("qwen3-235b-a22b", 4),
}
BATCHES = (1, 4, 16, 64, 256, 1024, 4096, 8192)
ROUTINGS = ("uniform", "zipf")

Contender = Callable[[int], Tensor]


def shape_of(name: str) -> MoEShape:
    """The sharded shape behind a name of SHAPES, without fused shared experts."""
    model, tp_size = SHAPES[name]
    return load_model(model, tp_size=tp_size, disable_shared_experts_fusion=True)


def served_by(shape: MoEShape, num_tokens: int) -> Form:
    """The form that serves such a batch here: what a user gets."""
    return choose_unchecked(shape, num_tokens, *here()).form


def instance_of(shape: MoEShape, num_tokens: int) -> Instance:
    """The one-launch layer's instance for such a batch, whether or not that is what serves it."""
    form = choose_unchecked(shape, num_tokens, *here(), ONE_LAUNCH).form
    assert isinstance(form, Instance)
    return form


def gated_of(shape: MoEShape, num_tokens: int) -> Gated | None:
    """What the tuned files here have for such a batch."""
    sizes = shape.num_experts, shape.moe_intermediate_size
    found = tuned(GATED, *sizes, *here(), shape.dtype, num_tokens, os.environ.get("MOELAB_CONFIG_DIR"))
    return found if isinstance(found, Gated) else None


def name_of(form: Form) -> str:
    """As rows name it."""
    return kind_of(form) if isinstance(form, Gated | Classic) else repr(form)


def note_of(form: Form) -> dict[str, Any]:
    """What a row says of its form."""
    if isinstance(form, Gated | Classic):
        return {"instance": name_of(form), "config": form.up.to_json(), "down_config": form.down.to_json()}
    return {"instance": name_of(form)}


# --- contenders ---------------------------------------------------------------------------------------------------


def tiles_of(layer: Layer, instance: Instance) -> list[TokenTiles]:
    """For each rotation, its slots in tiles of that instance."""
    return [tiles_for(order, instance) for order in layer.orders]


def by_expert(tiles: TokenTiles, cluster: int) -> TokenTiles:
    """The same tiles in the order of their experts, in place of the largest first; what a cluster takes stays together."""
    used = int(tiles.num_tiles)
    records = tiles.tiles.clone()
    taken = records[:used].view(-1, cluster, 4)
    records[:used] = taken[torch.argsort(taken[:, 0, 0], stable=True)].view(-1, 4)
    return tiles._replace(tiles=records)


def fast(
    layer: Layer,
    instance: Instance,
    *,
    parts: Sequence[int] = (GEMM1 | GEMM2 | SUM,),
    overlap: bool = True,
    lpt_order: bool = True,
) -> Contender:
    """The layer by one instance, a launch for each of `parts`."""
    tiles = tiles_of(layer, instance)
    if not lpt_order:
        tiles = [by_expert(each, instance.cluster) for each in tiles]
    slots, shape = layer.num_tokens * layer.shape.top_k, layer.shape

    def run(i: int) -> Tensor:
        x, w, r = layer.states[i], layer.weights[i], layer.routings[i]
        scratch = (x.new_empty((slots, shape.moe_intermediate_size)), x.new_empty((slots, shape.hidden_size)))
        for part in parts:
            out = fast_layer(
                x,
                w.w13,
                w.w2,
                r.topk_weights,
                r.topk_ids,
                tiles[i],
                instance,
                parts=part,
                scratch=scratch,
                overlap=overlap,
            )
        return out

    return run


def of_few_tokens(layer: Layer, form: FewTokens, *, overlap: bool = True, side_by_side: bool = True) -> Contender:
    """The layer by a form for a few tokens, which takes no order and no tiles."""

    def run(i: int) -> Tensor:
        w, r = layer.weights[i], layer.routings[i]
        given = (layer.states[i], w.w13, w.w2, r.topk_weights, r.topk_ids, form)
        return few_tokens(*given, overlap=overlap, side_by_side=side_by_side)

    return run


def of_gated(layer: Layer, form: Gated, *, tma: bool = True) -> Contender:
    """The gated pipeline over an alignment made beforehand."""
    shape, pairs = layer.shape, layer.num_tokens * layer.shape.top_k
    aligned = [align(r.topk_ids, form.up.BLOCK_SIZE_M, shape.num_experts) for r in layer.routings]

    def run(i: int) -> Tensor:
        w, weights = layer.weights[i], layer.routings[i].topk_weights
        h = gated_gemm(
            layer.states[i], w.w13, aligned[i], form.up, num_pairs=pairs, top_k=shape.top_k, activation=shape.activation,
            tma=tma,
        )  # fmt: skip
        y = sorted_gemm(h, w.w2, aligned[i], form.down, num_pairs=pairs, topk_weights=weights, tma=tma)
        return sum_reduce(y.view(layer.num_tokens, shape.top_k, -1))

    return run


def by_form(layer: Layer, form: Form) -> Contender:
    """The layer by that form."""
    if isinstance(form, FewTokens):
        return of_few_tokens(layer, form)
    if isinstance(form, Classic):
        return layer.contender(form.up, form.down)
    return of_gated(layer, form) if isinstance(form, Gated) else fast(layer, form)


def alone(layer: Layer, instance: Instance) -> dict[str, Contender]:
    """Each part in a launch of its own, over what the parts before it left: where the layer's time goes."""
    tiles, shape = tiles_of(layer, instance), layer.shape
    slots = layer.num_tokens * shape.top_k
    left: dict[int, tuple[Tensor, Tensor]] = {}

    def run(i: int, parts: int) -> Tensor:
        x, w, r = layer.states[i], layer.weights[i], layer.routings[i]
        if i not in left:
            left[i] = (x.new_empty((slots, shape.moe_intermediate_size)), x.new_empty((slots, shape.hidden_size)))
            run(i, GEMM1 | GEMM2 | SUM)
        return fast_layer(x, w.w13, w.w2, r.topk_weights, r.topk_ids, tiles[i], instance, parts=parts, scratch=left[i])

    named = {"GEMM1": GEMM1, "GEMM2": GEMM2, "the sum": SUM}
    return {name: functools.partial(run, parts=part) for name, part in named.items()}


def without(layer: Layer, instance: Instance) -> dict[str, Contender]:
    """The layer with each idea switched off alone, by the idea's name; only those that this instance makes use of."""
    launches = "both GEMMs in one launch" if instance.apart else "one launch"
    off = {
        launches: fast(layer, instance, parts=(GEMM1, GEMM2, SUM)),
        "programmatic dependent launch (PDL)": fast(layer, instance, overlap=False),
        "longest tiles first (LPT)": fast(layer, instance, lpt_order=False),
        "a pipeline of more than two stages": fast(layer, replace(instance, stages=2)),
        "tile N fitted to the tokens": fast(layer, replace(instance, grain=instance.tokens)),
    }
    if instance.row_blocks > 1:
        off[f"{instance.rows} weight rows a tile"] = fast(layer, replace(instance, row_blocks=1))
    if instance.apart and layer.shape.top_k > 1:
        off["sums in a launch of their own"] = fast(layer, replace(instance, apart=0))
    if instance.permutes:
        off["permuted activations"] = fast(layer, replace(instance, permutes=0))
    if instance.cluster > 1:
        off["clusters of two CTAs, weights by multicast"] = fast(layer, replace(instance, cluster=1))
    if instance.ctas_per_sm > 1:
        off["two CTAs an SM"] = fast(layer, replace(instance, ctas_per_sm=1))
    return off


def from_logits(layer: Layer, form: Form) -> Contender:
    """The whole layer from router logits by that form; the Triton layers aligned by `align`."""
    shape = layer.shape
    size = (layer.num_tokens, shape.num_experts)
    logits = [
        random_tensor(size, 1.0, dtype=w.w13.dtype, device=w.w13.device.type, seed=200 + i)
        for i, w in enumerate(layer.weights)
    ]

    def run(i: int) -> Tensor:
        x, w = layer.states[i], layer.weights[i]
        if isinstance(form, Instance):
            routed, tiles = route_for(logits[i], shape.top_k, form)
            return fast_layer(x, w.w13, w.w2, routed.topk_weights, routed.topk_ids, tiles, form)
        routed = route(logits[i], shape.top_k)
        weights, ids = routed.topk_weights, routed.topk_ids
        if isinstance(form, FewTokens):
            return few_tokens(x, w.w13, w.w2, weights, ids, form)
        return fused_moe(
            x, w.w13, w.w2, topk_weights=weights, topk_ids=ids, impl=kind_of(form), config=form.up, down_config=form.down
        )  # fmt: skip

    return run


# --- the recording ------------------------------------------------------------------------------------------------


def fastest_form(layer: Layer, among: Sequence[Form]) -> Form:
    """The fastest of a short pass."""
    times = quick({each: by_form(layer, each) for each in among}, protocol_for(layer.num_tokens).rotations)
    return min(times, key=lambda each: times[each].median_us)


def near(instance: Instance) -> list[Instance]:
    """An instance and its neighbours among all in use."""
    place = ALL.index(instance)
    return list(ALL[max(0, place - 1) : place + 2])


def forms_near(shape: MoEShape, num_tokens: int) -> list[Form]:
    """Forms that may be the fastest for a batch: what serves it, instances about the rule's, those for a few tokens."""
    served = served_by(shape, num_tokens)
    few = few_room.FORMS if num_tokens <= few_room.MOST_TOKENS else ()
    return list(dict.fromkeys([served, *near(instance_of(shape, num_tokens)), *few]))


def ablated(layer: Layer, form: Form) -> tuple[dict[str, Contender], dict[str, Contender]]:
    """What is served without each of its ideas, and its parts alone; of the classic layer neither."""
    if isinstance(form, FewTokens):
        return {
            "programmatic dependent launch (PDL)": of_few_tokens(layer, form, overlap=False),
            "prefetch of weights before griddepcontrol.wait": of_few_tokens(layer, replace(form, early=0)),
            "grid order for L2 reuse": of_few_tokens(layer, form, side_by_side=False),
        }, {}
    if isinstance(form, Gated):
        return {"weights by TMA": of_gated(layer, form, tma=False)}, {}
    return ({}, {}) if isinstance(form, Classic) else (without(layer, form), alone(layer, form))


def cell(name: str, layer: Layer, routing: str, *, ablation: bool) -> list[dict[str, Any]]:
    """A row for each contender at one shape, batch size and routing: checked, then timed interleaved.

    "fast" is what serves the batch; "fast, best instance" the fastest form, where that is
    another.
    """
    protocol, served = protocol_for(layer.num_tokens), served_by(layer.shape, layer.num_tokens)
    best = fastest_form(layer, forms_near(layer.shape, layer.num_tokens))
    run_classic, tiles = classic(layer, name)
    contenders: dict[str, Contender] = {
        "classic": run_classic,
        "grouped_mm": grouped_mm(layer),
        "fast": by_form(layer, served),
    }
    notes: dict[str, dict[str, Any]] = {"classic": tiles, "fast": note_of(served)}
    if best != served:
        contenders["fast, best instance"], notes["fast, best instance"] = by_form(layer, best), note_of(best)
    ideas, parts = ablated(layer, served) if ablation else ({}, {})
    contenders |= {f"fast without {idea}": run for idea, run in ideas.items()}
    judged = judge(layer, contenders)
    pair = KernelConfig.from_json(tiles["config"]), KernelConfig.from_json(tiles["down_config"])
    timed = dict(contenders)
    if routing == "uniform":
        timed["classic, from logits"] = from_logits(layer, Classic(*pair))
        timed["fast, from logits"] = from_logits(layer, served)
    timed |= {f"fast, {name} alone": run for name, run in parts.items()}
    measured = measure({label: run for label, run in timed.items() if "refused" not in judged.get(label, {})}, protocol)
    cost = cost_of(layer)
    common = {
        "shape": name, "num_tokens": layer.num_tokens, "routing": routing, "experts_touched": layer.experts_touched(),
        "bytes": cost.bytes, "flops": cost.flops, "rotations": protocol.rotations,
    }  # fmt: skip
    return [
        {**common, "impl": label, **judged.get(label, {}), **notes.get(label, {}), **samples_of(measured, label)}
        for label in timed
    ]


def samples_of(measured: Mapping[Any, Measurement], label: Any) -> dict[str, Any]:
    """What a row says of a contender's times: nothing where it was not timed."""
    return {"samples_us": [round(s, 4) for s in measured[label].samples_us]} if label in measured else {}


def record(
    names: Sequence[str] = tuple(SHAPES),
    batches: Sequence[int] = BATCHES,
    routings: Sequence[str] = ROUTINGS,
    on_rows: OnRows = ignore,
) -> Recording:
    """Six shapes, from one token to 8192, uniform and skewed. Minutes on an H200. Raises RuntimeModeError elsewhere."""
    runtime.require_cuda("the suite 'fast_layer'")
    rows: list[dict[str, Any]] = []
    for name in names:
        shape = shape_of(name)
        weights = weight_sets(shape)
        for routing in routings:
            for num_tokens in batches:
                layer = Layer(shape, num_tokens, protocol_for(num_tokens).rotations, weights, routing)
                try:
                    rows += cell(name, layer, routing, ablation=routing == "uniform")
                except MoelabError as error:  # the other cells are still worth having
                    rows.append({"shape": name, "num_tokens": num_tokens, "routing": routing, "refused": str(error)})
                on_rows(rows)
        del weights, layer
        torch.cuda.empty_cache()
    protocol = {
        **protocol_for(1).describe(), "rotations": "in each row", "alignment": "made beforehand, but from logits",
        "classic": "fastest of the tuned files and of what layer_baseline and sglang's rows found",
    }  # fmt: skip
    return Recording("fast_layer", runtime.provenance(seed=0), protocol, tuple(rows))
