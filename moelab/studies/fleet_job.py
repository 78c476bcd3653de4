"""One run of a fleet: begun, taken up again or found complete; then its config files and its landscape."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from moelab.errors import JournalError, RuntimeModeError
from moelab.studies.targets import Target
from moelab.tuner import journal, landscape
from moelab.tuner.evaluate import Evaluator
from moelab.tuner.evaluators import make_gpu_evaluator
from moelab.tuner.finals import Finals
from moelab.tuner.problem import BATCH_SIZES, Problem
from moelab.tuner.progress import Progress
from moelab.tuner.results import TuneResult
from moelab.tuner.session import TuneSession
from moelab.tuner.starting import gpu_problem

TUNED_AT = (*BATCH_SIZES, 8192)
GRID_AT = (1, 8, 64, 256, 1024, 4096)

COMPLETE = "complete already"
"""The status of what was on disk in full, and was not measured again."""

LARGEST_LANDSCAPE = 600_000
"""Bytes of a landscape that still belongs into the repository."""


@dataclass(frozen=True)
class Job:
    """One run. part: of the fleet; via: "gpus" or "ray". files: whether its winners become config files."""

    part: str
    target: Target
    strategy: str = "race"
    seed: int = 0
    batch_sizes: tuple[int, ...] = TUNED_AT
    gpus: tuple[int, ...] = (0,)
    via: str = "gpus"
    files: bool = False

    @property
    def stem(self) -> str:
        """The run's name: of its journal, and in the timeline."""
        name = f"{self.target.stem}-{self.part}"
        name += f"-seed{self.seed}" if self.seed else ""
        return name + (f"-{len(self.gpus)}-{self.via}" if self.part == "scaling" else "")


@dataclass(frozen=True)
class Done:
    """What became of a job. status: "tuned", "resumed", "complete already", "cut" or a failure's words. result: winners, of
    a run that is complete. paths: what was written of it."""

    job: Job
    status: str
    seconds: float = 0.0
    result: TuneResult | None = None
    paths: tuple[Path, ...] = ()
    failed: bool = False


@dataclass(frozen=True)
class Makers:
    """Where problems and evaluators come from; others in tests."""

    problem: Callable[[Job], Problem] = lambda job: gpu_problem(job.target.shape(), job.batch_sizes, seed=job.seed)
    evaluator: Callable[[Job, Problem, Path], Evaluator] = lambda job, problem, quarantine: make_gpu_evaluator(
        problem, ray="local" if job.via == "ray" else None, gpus=job.gpus, quarantine=quarantine, actors=len(job.gpus)
    )
    show: Callable[[Job, Progress], None] = field(default=lambda job, progress: None)


def journal_of(job: Job, out: Path) -> Path:
    """Where a job's journal lies."""
    return out / "runs" / f"{job.stem}.jsonl"


def is_complete(path: Path) -> bool:
    """Whether a run went through its finals. A file without a whole header is no run yet."""
    if not path.is_file() or b"\n" not in path.read_bytes()[: 1 << 20]:
        return False
    return any(note["kind"] == "finished" for note in journal.read(path).notes)


def run(job: Job, out: Path, makers: Makers) -> Done:
    """Run a job, from where it was cut if it was; what is complete is not run again. Its files are written in any case.

    Ctrl-C passes through, with the journal whole. Raises what ends a run.
    """
    path, begin = journal_of(job, out), time.monotonic()
    status = COMPLETE
    if not is_complete(path):
        session, status = _session(job, path, out, makers)
        session.run()
    result = result_of(path)
    paths = tuple(result.write(out / "configs")) if job.files else ()
    try:
        paths += _landscape(job, path, out)
    except RuntimeModeError as error:  # no pyarrow: the run is whole, and its journal can be frozen elsewhere
        return Done(job, f"{status}, no landscape: {error}", time.monotonic() - begin, result, paths, failed=True)
    return Done(job, status, time.monotonic() - begin, result, paths)


def _session(job: Job, path: Path, out: Path, makers: Makers) -> tuple[TuneSession, str]:
    def evaluator(problem: Problem) -> Evaluator:
        return makers.evaluator(job, problem, out / "runs" / f"{job.stem}.quarantine")

    def show(progress: Progress) -> None:
        makers.show(job, progress)

    if path.is_file() and b"\n" in path.read_bytes()[: 1 << 20]:
        _require_same(job, path)
        return TuneSession.resume(path, evaluator, on_progress=show), "resumed"
    problem = makers.problem(job)
    return TuneSession(problem, evaluator(problem), strategy=job.strategy, run=path, on_progress=show), "tuned"


def _require_same(job: Job, path: Path) -> None:
    header = journal.read(path).header
    was = (header["strategy"]["name"], tuple(header["problem"]["batch_sizes"]), header["problem"]["seed"])
    if was != (job.strategy, tuple(sorted(job.batch_sizes)), job.seed):
        raise JournalError(
            f"The run {path} was begun with strategy, batch sizes and seed {was}. Expected {job.strategy}, "
            f"{job.batch_sizes}, {job.seed}. Move that file away, or choose another --out."
        )


def result_of(path: Path) -> TuneResult:
    """The winners of a run's finals. Raises LandscapeError where it holds none."""
    content = journal.read(path)
    problem = Problem.from_json(content.header["problem"])
    source = f"measured on {problem.device}, triton {problem.triton_version}"
    return Finals.of_results(problem, content.results.values(), source, measured=True).result()


def _landscape(job: Job, path: Path, out: Path) -> tuple[Path, ...]:
    """The run's landscape, unless it is there and newer than the journal; none of runs whose seconds alone count."""
    if job.part == "scaling":
        return ()
    name = landscape.default_name(Problem.from_json(journal.read(path).header["problem"]))
    name += f"-{job.part}" * (job.part == "grid") + f"-seed{job.seed}" * bool(job.seed)
    file = out / "landscapes" / f"{name}.parquet"
    if not file.is_file() or file.stat().st_mtime < path.stat().st_mtime:
        landscape.freeze(path, file)
    return (file,)


def gain_over_default(result: TuneResult) -> float | None:
    """Geometric mean of the gains over the default config, over the batch sizes where that ran."""
    found = [gain.factor for batch in result.batches.values() if (gain := batch.gain("default")) is not None]
    return math.exp(statistics.fmean(map(math.log, found))) if found else None
