"""What is recorded of the tuner itself: how its strategies do, what its configs gain, how long it takes.

`moelab record SUITE` finds these beside the suites of `moelab.suites`, which measure kernels and know nothing of a tuner.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from moelab import suites
from moelab.recordings import Recording
from moelab.suites.later import Later

STUDIES: Mapping[str, Callable[..., Recording]] = {
    "tuned_gain": Later("moelab.studies.tuned_gain"),
    "fast_shapes": Later("moelab.studies.fast_shapes"),
    "tuner_regret": Later("moelab.studies.tuner_regret"),
}

ANYWHERE = ("tuner_regret",)
"""Studies whose numbers come from recorded landscapes: they are the same with a GPU and without."""


def known() -> dict[str, Callable[..., Recording]]:
    """Every suite and study by name."""
    return {**suites.SUITES, **STUDIES}
