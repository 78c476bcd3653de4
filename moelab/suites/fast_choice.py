"""Which form of the fastest layer serves a batch best: of the one-launch layer, for a few tokens, or gated under tuned configs.

Every candidate is checked against float64 and timed, a short pass each, at every shape and batch size of the suite fast_layer,
and at those between where a few tokens end.
`moelab.pipelines.form_times` is fitted on what it found, and tests/test_fast_fit.py holds the choice to the recording.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import torch

from moelab import runtime
from moelab.kernels import few_tokens
from moelab.kernels.fast_instances import ALL, Instance
from moelab.pipelines.form_choice import Form, near_instances
from moelab.recordings import Recording
from moelab.shapes import MoEShape
from moelab.suites import fast_layer as suite
from moelab.suites.bench import judge
from moelab.suites.layer_classic import Layer, protocol_for, weight_sets
from moelab.suites.partial import OnRows, ignore
from moelab.suites.screening import quick, short_pass

CANDIDATES = (
    *ALL,
    Instance(2, 1, 10, 48, 16, 16),  # one CTA an SM, with a deeper pipeline
    Instance(1, 2, 3, 96, 16, 16, 2, apart=1),  # two CTAs: one multiplies while the other stores
    Instance(1, 2, 3, 160, 16, 16, 2, apart=1),
    Instance(2, 1, 6, 96, 16, 16, apart=1),
    Instance(2, 1, 5, 176, 16, 16, apart=1),
    Instance(2, 2, 5, 96, 16, 16, permutes=1, apart=1),  # permuted activations, for TMA
    Instance(2, 2, 5, 96, 16, 16, apart=1),  # single CTAs
    Instance(2, 2, 4, 176, 16, 16, cluster=2, permutes=1, apart=1),  # both
)
"""Those in use, and what might be better, by the reason beside each."""

BATCHES = tuple(sorted({*suite.BATCHES, 2, 8}))


def candidates_for(num_tokens: int, shape: MoEShape) -> list[Instance]:
    """Candidates whose tiles are near what an expert gets if tokens spread evenly, the one that is chosen first."""
    by_rule = suite.instance_of(shape, num_tokens)
    return list(dict.fromkeys([by_rule, *near_instances(shape.expected_rows(num_tokens), CANDIDATES)]))


def forms_for(num_tokens: int, shape: MoEShape) -> list[Form]:
    """All candidates for a batch, what serves it first."""
    instances, served = candidates_for(num_tokens, shape), suite.served_by(shape, num_tokens)
    few = few_tokens.FORMS if num_tokens <= few_tokens.MOST_TOKENS else ()
    gated = suite.gated_of(shape, num_tokens)
    return list(dict.fromkeys([served, *instances, *few, *([gated] if gated else [])]))


def cell(name: str, layer: Layer, routing: str) -> list[dict[str, Any]]:
    """A row for each candidate: its error beside the bound, and the samples of a short pass; those refused say why."""
    num_tokens, shape = layer.num_tokens, layer.shape
    forms = forms_for(num_tokens, shape)
    contenders = {each: suite.by_form(layer, each) for each in forms}
    judged = judge(layer, {suite.name_of(each): run for each, run in contenders.items()})
    right = {each: run for each, run in contenders.items() if judged[suite.name_of(each)]["within_bound"]}
    timed = quick(right, len(layer.routings))
    return [
        {
            "shape": name, "num_tokens": num_tokens, "routing": routing, "rotations": len(layer.routings),
            **suite.note_of(each), "by_rule": each == forms[0],
            **judged[suite.name_of(each)], **suite.samples_of(timed, each),
        }
        for each in contenders
    ]  # fmt: skip


def record(
    names: Sequence[str] = tuple(suite.SHAPES),
    batches: Sequence[int] = BATCHES,
    routings: Sequence[str] = suite.ROUTINGS,
    on_rows: OnRows = ignore,
) -> Recording:
    """Every candidate at every cell. Raises RuntimeModeError without a GPU."""
    runtime.require_cuda("the suite 'fast_choice'")
    rows: list[dict[str, Any]] = []
    for name in names:
        shape = suite.shape_of(name)
        weights = weight_sets(shape)
        for routing, num_tokens in itertools.product(routings, batches):
            layer = Layer(shape, num_tokens, protocol_for(num_tokens).rotations, weights, routing)
            rows += cell(name, layer, routing)
            on_rows(rows)
        del weights, layer
        torch.cuda.empty_cache()
    protocol = {**short_pass(protocol_for(1).rotations).describe(), "rotations": "in each row"}
    return Recording("fast_choice", runtime.provenance(seed=0), protocol, tuple(rows))
