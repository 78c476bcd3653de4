"""Forms of the fastest layer as tests ask for them."""

from __future__ import annotations

from moelab.kernels.fast_instances import Instance
from moelab.pipelines import form_choice, form_times
from moelab.pipelines.form_choice import Choice
from moelab.pipelines.form_times import ONE_LAUNCH, Chip
from moelab.pipelines.spread import Batch


def batch_of(
    num_tokens: int, top_k: int, num_experts: int, inner: int, hidden: int, rows: float | None = None
) -> Batch:
    """A batch whose experts are all here, unless `rows` says what one gets."""
    found = min(num_tokens * top_k / num_experts, num_tokens) if rows is None else rows
    return Batch(num_tokens, top_k, num_experts, hidden, inner, found)


def choose(*sizes: int, rows: float | None = None, **options: object) -> Choice:
    """`form_choice.choose` on the GPU of the recordings. sizes: as `batch_of` takes them."""
    chip = Chip(int(form_times.fitted().chip["sms"]))
    return form_choice.choose(batch_of(*sizes, rows=rows), chip, **options)  # type: ignore[arg-type]


def instance_for(num_tokens: int, top_k: int, num_experts: int, inner: int, hidden: int = 2048) -> Instance:
    """The one-launch instance that is predicted fastest."""
    form = choose(num_tokens, top_k, num_experts, inner, hidden, override=ONE_LAUNCH).form
    assert isinstance(form, Instance)
    return form
