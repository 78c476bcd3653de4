"""Evaluators by name, loaded when one is asked for: each brings what only it needs (torch and a GPU, or Ray)."""

from __future__ import annotations

import importlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from moelab.errors import RuntimeModeError, UnknownNameError, nearest_names
from moelab.tuner.evaluate import Evaluator
from moelab.tuner.problem import Problem

EVALUATORS: Mapping[str, str] = {
    "replay": "moelab.tuner.replay:ReplayEvaluator",
    "paced replay": "moelab.tuner.paced:PacedReplay",
    "gpu": "moelab.tuner.gpu:GpuEvaluator",
    "ray": "moelab.tuner.cluster:RayEvaluator",
}
"""name -> module:class. A class is called with the problem and what the command line knows: the replays with the landscape
first, "gpu" with the problem, "ray" with the problem, `address=` and, for replayed devices, `landscape=`."""


def load_evaluator(name: str) -> type[Any]:
    """The class of that name. Raises UnknownNameError for another name, RuntimeModeError where its module is not here."""
    if name not in EVALUATORS:
        raise UnknownNameError(
            f"Unknown evaluator {name!r}.{nearest_names(name, EVALUATORS)} Expected one of {', '.join(EVALUATORS)}. Name one."
        )
    module, _, attribute = EVALUATORS[name].partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except ModuleNotFoundError as error:
        if error.name != module:
            raise
        raise RuntimeModeError(
            f"This moelab has no evaluator {name!r} ({module} is not there). Expected a version that brings it. Pass --replay "
            "to tune against a recorded landscape."
        ) from None


def make_gpu_evaluator(
    problem: Problem,
    *,
    ray: str | None = None,
    gpus: Sequence[int] = (0,),
    quarantine: Path | None = None,
    actors: int | None = None,
) -> Evaluator:
    """Who measures on this machine's GPUs, or on a Ray cluster's at that address ("local": this machine's), all of them or
    as many as `actors`.

    quarantine: folder for what hung or crashed a worker twice, each a file to repeat it by; None keeps none.
    """
    if ray is not None:
        return load_evaluator("ray")(problem, address=ray, actors=actors)
    return load_evaluator("gpu")(problem, gpus, quarantine=quarantine)
