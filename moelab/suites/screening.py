"""Choosing tiles before a comparison: what compiles and fits stays, and the fastest of a short pass is taken."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch

from moelab import runtime
from moelab.errors import MoelabError
from moelab.measure import Measurement, Protocol, measure

Label = TypeVar("Label", bound=Hashable)
Contender = Callable[[int], Any]


def usable(contenders: Mapping[Label, Contender]) -> tuple[dict[Label, Contender], dict[Label, str]]:
    """(those that ran once, the others and why not). What fails for a tile: Triton's own errors and a broken rule.

    On a GPU in threads: most of a compile is spent outside Python's lock. Other errors pass through.
    """
    failures: dict[Label, str] = {}
    from triton.errors import TritonError

    def attempt(label: Label) -> None:
        try:
            contenders[label](0)
        except (MoelabError, TritonError) as error:
            failures[label] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"

    if runtime.current().mode == "gpu":
        device = torch.cuda.current_device()
        with ThreadPoolExecutor(16, initializer=torch.cuda.set_device, initargs=(device,)) as pool:
            for done in [pool.submit(attempt, label) for label in contenders]:
                done.result()
        torch.cuda.synchronize()
    else:  # the interpreter patches triton.language while it runs a kernel: one at a time
        for label in contenders:
            attempt(label)
    return {label: run for label, run in contenders.items() if label not in failures}, failures


def short_pass(rotations: int) -> Protocol:
    """Three replays of one pass over the rotations each: enough to drop what is clearly slower, no more."""
    return Protocol(rotations, rounds=3, graph_us=1.0)


def quick(contenders: Mapping[Label, Contender], rotations: int) -> dict[Label, Measurement]:
    """Each contender's `short_pass`, interleaved."""
    names = {f"{i}": label for i, label in enumerate(contenders)}
    found = measure({name: contenders[label] for name, label in names.items()}, short_pass(rotations))
    return {label: found[name] for name, label in names.items()}
