"""What runs in a Ray actor, and the door to Ray itself."""

from __future__ import annotations

import os
import socket
from collections.abc import Sequence
from typing import Any

from moelab.errors import RuntimeModeError
from moelab.tuner.evaluate import Request, Result
from moelab.tuner.landscape import Landscape
from moelab.tuner.problem import Problem


def import_ray(local: bool = False) -> Any:
    """The module ray. Raises RuntimeModeError where it is not installed.

    local: for a cluster that is started here, which then listens on 127.0.0.1 alone, as Ray does by default on Windows and
    macOS: who reaches a cluster runs code on it. ray.init makes another address of 127.0.0.1, so that it cannot be told there.
    """
    if local:
        os.environ[_MANY_NODES] = "0"
    try:
        import ray

        if local:
            from ray._private import ray_constants  # read from the variable once, perhaps before it was set

            ray_constants.ENABLE_RAY_CLUSTER = False
    except ModuleNotFoundError as error:
        raise RuntimeModeError(
            "Tuning on a cluster needs the package ray, which is not installed. Expected the extra 'ray'. Install it with "
            "pip install 'moelab[ray]' on every node, or tune on this machine's GPU without --ray."
        ) from error
    return ray


_MANY_NODES = "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"


class Host:
    """What runs in an actor: an evaluator, of the actor's one GPU, or of a landscape to replay."""

    def __init__(self, problem: Problem, landscape: Landscape | None) -> None:
        self.problem = problem
        if landscape is not None:
            from moelab.tuner.replay import ReplayEvaluator

            self.evaluator: Any = ReplayEvaluator(landscape, problem, seed=problem.seed)
        else:
            from moelab.tuner.gpu import GpuEvaluator

            self.evaluator = GpuEvaluator(problem)

    def about(self) -> dict[str, Any]:
        """Where it is: "node", "device" and what its evaluator says of itself."""
        from moelab import runtime

        described = self.evaluator.describe()
        device = runtime.current().device_name if described["measured"] else self.problem.device
        return {"node": socket.gethostname(), "device": device, "described": described}

    def learn(self, results: Sequence[Result]) -> None:
        """What others found: kernels that this node's cache holds, contenders that cost workers their lives."""
        getattr(self.evaluator, "learn", self.evaluator.recall)(results)

    def answer(self, request: Request) -> tuple[Result, float]:
        """The result, and the seconds that it took on the evaluator's clock."""
        begin = self.evaluator.clock_s()
        (result,) = self.evaluator.run([request])
        return result, self.evaluator.clock_s() - begin
