"""What a run starts from: the problem of this machine's GPU, and who answers a run that is taken up again."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from moelab import runtime
from moelab.errors import RuntimeModeError
from moelab.shapes import MoEShape
from moelab.tuner.evaluate import Evaluator
from moelab.tuner.evaluators import load_evaluator, make_gpu_evaluator
from moelab.tuner.header import header_of
from moelab.tuner.landscape import load
from moelab.tuner.problem import BATCH_SIZES, COMPATIBLE, Problem, find_incumbents
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


def evaluator_of(run: str | Path, problem: Problem, *, ray: str | None = None, gpus: Sequence[int] = (0,)) -> Evaluator:
    """Who goes on with a run: the replay of the same landscape with the same seed, or GPUs. Raises JournalError."""
    about = header_of(run)["evaluator"]
    if about.get("kind") == "replay":
        return load_evaluator("replay")(load(Path(about["landscape"])), problem, seed=about["seed"])
    return make_gpu_evaluator(problem, ray=ray, gpus=gpus, quarantine=Path(run).with_suffix(".quarantine"))
