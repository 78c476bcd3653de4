"""Forms of the fastest layer against each other at one batch size: what is likely to be fastest, checked, timed, and timed again.

The whole layer from top-k ids, order or alignment included. Forms that are predicted within LIKELY of the fastest, and the
fastest few of each kind, are held against float64 and timed by a short pass; the fastest of that are timed again, interleaved.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from moelab.call import MoECall
from moelab.errors import PrecisionError
from moelab.kernels.fast_instances import Instance
from moelab.kernels.few_tokens import FewTokens
from moelab.measure import Measurement, Protocol, measure
from moelab.pipelines.fast import fast_pipeline
from moelab.pipelines.form_choice import Choice, Classic, Form, Gated, kind_of
from moelab.pipelines.form_files import label
from moelab.pipelines.form_times import KINDS
from moelab.shapes import MoEShape
from moelab.suites.bench import judge
from moelab.suites.layer_classic import Layer
from moelab.suites.screening import quick, usable
from moelab.tuner.ahead import Job
from moelab.tuner.compile import Compiled
from moelab.tuner.problem import COMPATIBLE

LIKELY, EACH, MOST = 1.06, 3, 20
"""Predicted time over the fastest's up to which a form is tried; how many of each kind are, whatever they are predicted; how many
of all."""

FINALISTS = 3
"""Of the short pass, that are timed again."""

Contender = Callable[[int], Any]


def likely(choice: Choice) -> list[Form]:
    """What may be the fastest, by the prediction; the chosen first."""
    least, left = choice.predicted[0].us, dict.fromkeys(KINDS, EACH)
    first, rest = [choice.form], []
    for each in choice.predicted:
        if left[kind_of(each.form)] > 0:
            first.append(each.form)
        elif each.us <= LIKELY * least:
            rest.append(each.form)
        left[kind_of(each.form)] -= 1
    return list(dict.fromkeys([*first, *rest]))[:MOST]


def whole(layer: Layer, form: Form) -> Contender:
    """The layer by that form from top-k ids."""

    def run(i: int) -> Tensor:
        r, w = layer.routings[i], layer.weights[i]
        return fast_pipeline(MoECall(layer.states[i], w.weights, r.topk_weights, r.topk_ids), form)

    return run


def jobs_of(shape: MoEShape, forms: Sequence[Form]) -> list[Job]:
    """What is to be compiled for these forms by Triton."""
    found: list[Job] = []
    for form in forms:
        kernel = "gated_tma" if isinstance(form, Gated) else COMPATIBLE
        if isinstance(form, FewTokens):
            found.append((shape, kernel, form))
        elif isinstance(form, Gated | Classic):
            found += [(shape, kernel, ("up", form.up)), (shape, kernel, ("down", form.down))]
    return list(dict.fromkeys(found))


def refused(shape: MoEShape, forms: Sequence[Form], compiled: Mapping[Job, Compiled]) -> dict[Form, str]:
    """Forms that cannot run, for a kernel of theirs was not compiled or takes more than there is: why."""
    found = {}
    for form in forms:
        made = [compiled[job] for job in jobs_of(shape, [form]) if job in compiled]
        if why := [f"{each.failure}: {each.message}" for each in made if each.failure]:
            found[form] = why[0]
    return found


@dataclass(frozen=True)
class Raced:
    """tried: forms that are right; wrong: labels of those that are not, or do not run. finals: the fastest, and those that were
    asked for, timed interleaved. judged: label -> max_abs_error, rel_error, within_bound of every form that ran."""

    tried: tuple[Form, ...]
    wrong: tuple[str, ...]
    finals: Mapping[Form, Measurement]
    judged: Mapping[str, Mapping[str, Any]]

    @property
    def best(self) -> Form:
        """The lowest median of the finals."""
        return min(self.finals, key=lambda form: self.finals[form].median_us)


def race(layer: Layer, forms: Sequence[Form], failed: Mapping[Form, str], keep: Sequence[Form], rounds: int) -> Raced:
    """Those forms but `failed` at the layer's batch size; the right ones of `keep` are in the finals whatever the short pass
    says. rounds: samples of a finalist.

    Raises PrecisionError where none of them is right.
    """
    contenders = {form: whole(layer, form) for form in dict.fromkeys(forms) if form not in failed}
    in_triton: dict[Form, Contender] = {form: run for form, run in contenders.items() if not isinstance(form, Instance)}
    runs: dict[Form, Contender] = {
        **usable(in_triton)[0],
        **{form: run for form, run in contenders.items() if isinstance(form, Instance)},
    }
    judged = judge(layer, {label(form): run for form, run in runs.items()})
    right = {form: run for form, run in runs.items() if judged[label(form)]["within_bound"]}
    if not right:
        said = [f"{name}: {row.get('refused') or 'over its bound'}" for name, row in judged.items()]
        raise PrecisionError(
            f"None of {len(set(forms))} forms is right ({next(iter([*said, *failed.values()]), 'none ran')[:200]}). Expected one "
            "at least. Hold the layer against float64 with `moelab bench`, and leave this batch size out."
        )
    times = {form: found.median_us for form, found in quick(right, len(layer.routings)).items()}
    fastest = sorted(times, key=lambda form: times[form])[:FINALISTS]
    finals = list(dict.fromkeys([*fastest, *(form for form in keep if form in right)]))
    protocol = Protocol(len(layer.routings), rounds=rounds, graph_us=300.0)
    timed = measure({label(form): right[form] for form in finals}, protocol)
    wrong = tuple(label(form) for form in dict.fromkeys(forms) if form not in right)
    return Raced(tuple(right), wrong, {form: timed[label(form)] for form in finals}, judged)
