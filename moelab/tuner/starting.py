"""What a run starts from: the problem of this machine's GPU, and who answers a run that is taken up again."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from moelab import runtime
from moelab.errors import RuntimeModeError
from moelab.shapes import MoEShape
from moelab.tuner.evaluate import Evaluator
from moelab.tuner.evaluators import load_evaluator, make_gpu_evaluator
from moelab.tuner.header import header_of
from moelab.tuner.landscape import Landscape, load
from moelab.tuner.problem import BATCH_SIZES, COMPATIBLE, Problem, find_incumbents
from moelab.tuner.replay import Table
from moelab.tuner.tuned_kernels import implementation_of, kernel_name, require_tunable


def gpu_problem(
    shape: MoEShape,
    batch_sizes: Sequence[int] | None = None,
    *,
    routing: str = "uniform",
    seed: int = 0,
    separate_down: bool = True,
    kernel: str = COMPATIBLE,
) -> Problem:
    """What there is to tune on this machine's GPU, with the configs to beat.

    kernel: a name of `tuned_kernels.TUNED`, or of the implementation of `fused_moe` that runs it.
    Raises RuntimeModeError without a GPU, or on one whose limits are not known; what `require_tunable` raises.
    """
    kernel = kernel_name(kernel)
    mode = runtime.current()
    if mode.mode != "gpu":
        raise RuntimeModeError(
            f"Tuning measures kernels, and here {mode.reason}. Expected a GPU, or a recorded landscape. Run this on a GPU "
            "node, or pass --replay LANDSCAPE."
        )
    from moelab.kernels.checks import current_target

    target = current_target()
    if target is None:
        raise RuntimeModeError(
            f"Nothing is known of the limits of {mode.device_name}. Expected an architecture of moelab.chips.TARGETS. Add "
            "its shared memory there."
        )
    version, sizes = runtime.triton_version() or "unknown", tuple(batch_sizes or BATCH_SIZES)
    incumbents = find_incumbents(shape, mode.device_name, version, sizes, separate_down=separate_down, kernel=kernel)
    problem = Problem(
        shape, mode.device_name, target.name, version, sizes, routing=routing, seed=seed, kernel=kernel,
        split_k=implementation_of(kernel).split_k, separate_down=separate_down, incumbents=incumbents,
    )  # fmt: skip
    require_tunable(problem)
    return problem


def replay_problem(
    landscape: Landscape,
    batch_sizes: Sequence[int] | None = None,
    *,
    shape: MoEShape | None = None,
    seed: int = 0,
    separate_down: bool = True,
    kernel: str | None = None,
) -> Problem:
    """The landscape's own problem at some of its batch sizes: what `moelab tune --replay` and a notebook's Start search alike.

    shape: a layer of the same sizes under another name. separate_down: False for one config that serves both GEMMs, of what is
    to be beaten too. kernel: as for `gpu_problem`.
    """
    recorded = landscape.problem
    incumbents: Mapping[str, Mapping[int, Any]] = recorded.incumbents
    if not separate_down:
        incumbents = {
            label: {b: (up, up) for b, (up, _) in pairs.items()} for label, pairs in recorded.incumbents.items()
        }
    return replace(
        recorded, shape=shape or recorded.shape, batch_sizes=tuple(batch_sizes or recorded.batch_sizes), seed=seed,
        separate_down=separate_down, incumbents=incumbents, kernel=kernel_name(kernel) if kernel else recorded.kernel,
    )  # fmt: skip


def replay_of(landscape: Landscape | Table, problem: Problem, *, seed: int = 0, speed: float = math.inf) -> Evaluator:
    """Who answers for a recorded landscape: all of it, finals and whole layers too, whoever asks. speed: simulated seconds a
    second; infinite for no waiting, which changes no answer."""
    if math.isinf(speed):
        return load_evaluator("replay")(landscape, problem, seed=seed)
    return load_evaluator("paced replay")(landscape, problem, seed=seed, speed=speed)


def evaluator_of(
    run: str | Path,
    problem: Problem,
    *,
    ray: str | None = None,
    gpus: Sequence[int] = (0,),
    speed: float = math.inf,
    known: Sequence[Table] = (),
) -> Evaluator:
    """Who goes on with a run: the replay of the same landscape with the same seed, or GPUs. speed: of a replay. known: tables
    of landscapes that are loaded already. Raises JournalError."""
    about = header_of(run)["evaluator"]
    if about.get("kind") == "replay":
        named = about["landscape"]
        own = (table for table in known if named in (_place(table.landscape), table.landscape.name))
        return replay_of(next(own, None) or load(Path(named)), problem, seed=about["seed"], speed=speed)
    return make_gpu_evaluator(problem, ray=ray, gpus=gpus, quarantine=Path(run).with_suffix(".quarantine"))


def _place(landscape: Landscape) -> str | None:
    return str(landscape.path.resolve()) if landscape.path else None
