"""What `moelab tune` tunes: the layer that a server runs, and which servers will ask for its file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from moelab.config_files import Question
    from moelab.shapes import MoEShape
    from moelab.tuner.problem import Problem


def _question(asked: Mapping[str, Any], rules: str, device: str | None = None) -> Question:
    from moelab.config_files import ask

    names = ("model", "tp_size", "ep_size", "dtype", "disable_shared_experts_fusion")
    return ask(**{name: asked[name] for name in names}, rules=rules, device=device)


def asked_dtype(dtype: str, per_channel_quant: bool, block_shape: tuple[int, int] | None) -> str | None:
    """What --dtype and its switches mean for `load_served`: None for the model's own, a dtype, or a format's name.

    Raises FormatError for switches beside a dtype that they say nothing of.
    """
    from moelab.errors import FormatError
    from moelab.formats import SELECTORS, format_of_selector

    if not per_channel_quant and block_shape is None:
        return None if dtype == "auto" else dtype
    if dtype not in SELECTORS:
        switch = "--per-channel-quant" if per_channel_quant else "--block-shape"
        raise FormatError(
            f"{switch} beside --dtype {dtype}. Expected one of {', '.join(SELECTORS)} with it. Name one as --dtype, or leave "
            f"{switch} out: auto is what the model's config.json says."
        )
    return format_of_selector(dtype, per_channel_quant=per_channel_quant, block_shape=block_shape).name


def tuned_shape(asked: Mapping[str, Any]) -> MoEShape:
    """The layer that the server named by `rules` runs. Raises ShardError for a shard that it would not load, FormatError for
    weights in a format that has no config files."""
    from moelab.errors import ShardError

    found = _question(asked, asked["rules"])
    found.name("any")
    if found.misfits:
        raise ShardError(f"{found.shape.name} at tp_size {asked['tp_size']}: {'. '.join(found.misfits)}.")
    return found.shape


def who_asks(asked: Mapping[str, Any], problem: Problem) -> list[str]:
    """For each server whether it will ask for the file that is tuned, and by which rule of which version.

    A quantised checkpoint that is tuned in plain weights is asked for in its own format all the same.
    """
    from moelab.config_files import get_rules, question

    sentences = []
    for rules in ("sglang", "vllm"):
        theirs = _question({**asked, "dtype": None}, rules, problem.device)
        theirs = _question(asked, rules, problem.device) if theirs.shape.format.is_plain else theirs
        ours = question(problem.shape, rules)
        version, because = get_rules(rules).version, "; ".join(theirs.because)
        if theirs.shape.format.file and theirs.name(problem.device) == ours.name(problem.device):
            sentences.append(f"{version} will ask for this file: {because}")
            continue
        other = f"for {theirs.file_name(problem.device)}" if theirs.shape.format.file else "for no file of this kind"
        how = f" (--rules {rules})" if theirs.num_experts != ours.num_experts else ""
        sentences.append(f"{version} will not ask for this file, but {other}{how}: {because}")
    return [*sentences, *published_otherwise(problem.shape)]


def published_otherwise(shape: MoEShape) -> list[str]:
    """That a preset of plain weights stands for a checkpoint that is published quantised, or nothing."""
    from moelab.presets import published_as

    published = published_as(shape.name) if shape.format.is_plain else None
    return (
        [f"{shape.name} is the layer in plain weights; its checkpoint is quantised: --model {published}"]
        if published
        else []
    )
