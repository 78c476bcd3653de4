"""Repro: one contender that cost a worker its life, written down, and run again alone, in this process, unsupervised.

`python -m moelab.tuner.repro FILE` checks and times it where a debugger, or compute-sanitizer, can watch.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

from moelab import writing
from moelab.config import KernelConfig
from moelab.errors import JournalError, MoelabError
from moelab.reading import MIB, UnreadableError, read_json
from moelab.tuner.evaluate import Contender, Request, Stage, config_key
from moelab.tuner.problem import Problem


def write(
    folder: Path, problem: Problem, stage: Stage, num_tokens: int, contender: Contender, failure: str, why: str
) -> Path:
    """Write down a contender that was quarantined, and why; the file. An existing one is overwritten."""
    path = folder / f"{stage}-{num_tokens}-{'-'.join(config_key(config) for config in contender)}.json"
    content = {
        "problem": problem.to_json(), "stage": stage, "num_tokens": num_tokens,
        "configs": [config.to_json() for config in contender], "failure": failure, "why": why,
        "run": f"python -m moelab.tuner.repro {path}",
    }  # fmt: skip
    return writing.write(path, json.dumps(content, indent=1) + "\n")


def load(path: str | Path) -> tuple[Problem, Request]:
    """The problem, and a request of the one contender. Raises JournalError for a file that `write` did not write."""
    from moelab.schemas import first_problem
    from moelab.tuner.schemas import REPRO

    try:
        content = read_json(path, MIB)
        if problem := first_problem(REPRO, content):
            raise UnreadableError(problem)
        contender = tuple(KernelConfig.from_json(entry) for entry in content["configs"])
        return Problem.from_json(content["problem"]), Request(content["stage"], content["num_tokens"], (contender,), 3)
    except (OSError, UnreadableError, MoelabError) as error:
        raise JournalError(
            f"Cannot read a repro from {path} ({type(error).__name__}: {error}). Expected a file that the tuner wrote for a "
            "contender it quarantined. Check the path."
        ) from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a repro file: prints each report, 0 if the contender was timed."""
    paths = list(sys.argv[1:] if arguments is None else arguments)
    if len(paths) != 1:
        print("usage: python -m moelab.tuner.repro FILE", file=sys.stderr)
        return 2
    problem, request = load(paths[0])
    from moelab.tuner.device import GpuDevice
    from moelab.tuner.worker import Task, Worker

    said: list[tuple[object, ...]] = []

    def report(message: tuple[object, ...]) -> None:
        print(*message, flush=True)
        said.append(message)

    Worker(GpuDevice(problem), report).run(Task(0, request, (0,)))
    return 0 if any(m[0] == "end" and getattr(m[-1], "samples_us", ()) for m in said) else 1


if __name__ == "__main__":
    try:
        sys.exit(main())
    except MoelabError as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr)
        sys.exit(2)
