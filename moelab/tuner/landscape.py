"""Landscapes: every measurement of a tuning run, frozen into one Parquet file with where it comes from.

A row is one contender of one request: stage, num_tokens, the fields of its config (of GEMM2's too, under down_*, for
"layer"), samples_us or a class of failure, and what compiling and measuring cost. Rows without samples and failure say
only that the config compiled. The file's metadata holds, as JSON under "moelab", the schema, the provenance and the
problem, and a digest of the whole file (`landscape_file`). `load` reads it back for replay and for plots.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import math
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from moelab import recordings
from moelab.config import KernelConfig, violations
from moelab.errors import LandscapeError, MoelabError, nearest_names
from moelab.formats import PLAIN
from moelab.presets import preset_stem
from moelab.reading import UnreadableError
from moelab.shapes import MoEShape, load_model
from moelab.tuner import journal, landscape_file
from moelab.tuner.evaluate import Contender, Outcome, Stage
from moelab.tuner.problem import Problem

if TYPE_CHECKING:
    import pandas as pd

SCHEMA = 1
"""Version of the file that this code reads and writes."""

FIELDS = tuple(f.name for f in dataclasses.fields(KernelConfig))
_REMEDY = "Record it again with `moelab tune --strategy grid` and freeze that run, or restore the file from git."


@dataclass(frozen=True)
class Row:
    """One contender of one request. at: when it was written (UTC, ISO 8601)."""

    stage: Stage
    num_tokens: int
    contender: Contender
    outcome: Outcome
    interleaved: bool
    at: str


@dataclass(frozen=True)
class Landscape:
    """A recorded landscape. evaluator, space: what the run's header says of them. path: its file, if any."""

    problem: Problem
    provenance: Mapping[str, Any]
    evaluator: Mapping[str, Any]
    space: Mapping[str, Any]
    rows: tuple[Row, ...]
    path: Path | None = None

    @property
    def name(self) -> str:
        """The file's stem, or the shape's name."""
        return self.path.stem if self.path else self.problem.shape.name

    def source(self) -> str:
        """Where the numbers come from, e.g. "recorded on NVIDIA H200, triton 3.6.0, 2026-11-21"; with the routing where it
        is not uniform."""
        source = recordings.Recording(self.name, self.provenance, {}, ()).source()
        return source if self.problem.routing == "uniform" else f"{source}, {self.problem.routing} routing"

    def frame(self) -> pd.DataFrame:
        """A row each with its config's fields, median_us and the number of samples, for plots and tables."""
        import pandas as pd

        return pd.DataFrame(
            {
                "stage": row.stage,
                "num_tokens": row.num_tokens,
                **{name: getattr(row.contender[0], name) for name in FIELDS},
                **{f"down_{name}": getattr(c, name) for c in row.contender[1:] for name in FIELDS},
                "config": " + ".join(c.short() for c in row.contender),
                "median_us": float(np.median(row.outcome.samples_us)) if row.outcome.samples_us else math.nan,
                "samples": len(row.outcome.samples_us),
                "failure": row.outcome.failure,
                "interleaved": row.interleaved,
            }
            for row in self.rows
        )


# --- from a journal -----------------------------------------------------------------------------------------------


def from_journal(path: str | Path) -> Landscape:
    """The landscape that a run measured, finished or not.

    Raises JournalError if the journal cannot be read, LandscapeError if it holds no measurement of its own: what a
    replay redrew is never frozen as if it had been measured.
    """
    content = journal.read(path)
    if not content.header["evaluator"].get("measured"):
        raise LandscapeError(
            f"The run {path} is a {content.header['evaluator'].get('kind')}, not a measurement. Expected a run on a device. "
            "Tune on a GPU, without --replay, and freeze that run."
        )
    rows = tuple(
        Row(r.request.stage, r.request.num_tokens, contender, outcome, r.request.interleaved, content.times[key])
        for key, r in content.results.items()
        for contender, outcome in zip(r.request.contenders, r.outcomes, strict=True)
    )
    header = content.header
    found = Landscape(
        Problem.from_json(header["problem"]), header["provenance"], header["evaluator"], header["space"], rows
    )
    _require_sound(found, f"The run {path}")
    return found


def freeze(run: str | Path, out: str | Path | None = None) -> Path:
    """Freeze a run's journal into a Parquet file and return its path (default: below data/landscapes, by shape and
    device). Written atomically. Raises as `from_journal` does, RuntimeModeError without pyarrow."""
    found = from_journal(run)
    return write(found, out if out is not None else landscapes_dir() / f"{default_name(found.problem)}.parquet")


def default_name(problem: Problem) -> str:
    """What a problem's landscape is called: "qwen3-30b-a3b-tp1-NVIDIA_H200"."""
    return layer_name(problem.shape, problem.device, problem.file_kernel)


def layer_name(shape: MoEShape, device: str, kernel: str | None = None) -> str:
    """`default_name` of a layer on a device, and of a kernel beside the compatible kernel.

    Of a preset as it is served, its name says all. The format stands there where it is another, and the number of shared experts
    that run among the routed ones: the same model without them is another layer.
    """
    served = None
    with contextlib.suppress(MoelabError):  # no preset of that name is sharded so
        served = (
            load_model(shape.name, tp_size=shape.tp_size, ep_size=shape.ep_size) if preset_stem(shape.name) else None
        )
    format, shared = (served.format, served.num_shared_experts_fused) if served else (PLAIN, 0)
    parts = [shape.name.replace("/", "_"), f"tp{shape.tp_size}"]
    parts += [f"ep{shape.ep_size}"] if shape.ep_size > 1 else []
    parts += [f"shared{shape.num_shared_experts_fused}"] if shape.num_shared_experts_fused != shared else []
    parts += [shape.dtype] if shape.dtype != "bfloat16" else []
    parts += [shape.format.name] if shape.format != format else []
    parts += [kernel] if kernel else []
    return "-".join([*parts, device.replace(" ", "_")])


# --- the file -----------------------------------------------------------------------------------------------------


def landscapes_dir() -> Path:
    """The folder of the landscapes: data/landscapes, or below MOELAB_DATA_DIR."""
    from moelab import runtime

    return runtime.data_dir() / "landscapes"


def landscape_names() -> tuple[str, ...]:
    """Names of the landscapes in data/landscapes, sorted."""
    return tuple(sorted(path.stem for path in landscapes_dir().glob("*.parquet")))


def layer_landscapes() -> tuple[str, ...]:
    """Of `landscape_names` those of a layer's own tuning: no other seed's, routing's or whole grid's, whose names go on."""
    names = landscape_names()
    return tuple(name for name in names if not any(name.startswith(f"{other}-") for other in names))


def write(landscape: Landscape, path: str | Path) -> Path:
    """Write a landscape atomically. Raises LandscapeError for what `load` would refuse, RuntimeModeError without pyarrow."""
    what = f"The landscape {landscape.name!r}"
    try:
        _require_sound(landscape, what)
        return landscape_file.write(_columns(landscape.rows), _about(landscape), Path(path))
    except UnreadableError as error:
        raise LandscapeError(f"{what} {error}. Expected what `load` takes. {_REMEDY}") from None


def load(name: str | Path) -> Landscape:
    """Read a landscape by name (of data/landscapes) or path.

    Raises LandscapeError when the file is missing, is not what was frozen (its digest says so), no Parquet, of another
    schema, without provenance, or holds a value no measurement can have; RuntimeModeError without pyarrow.
    """
    text = str(name)
    is_path = isinstance(name, Path) or text.endswith(".parquet") or os.sep in text
    path = Path(name) if is_path else landscapes_dir() / f"{text}.parquet"
    try:
        columns, about = landscape_file.read(path)
    except FileNotFoundError:
        known = sorted(p.stem for p in path.parent.glob("*.parquet"))
        raise LandscapeError(
            f"There is no landscape at {path}.{nearest_names(path.stem, known)} Expected one of those there: "
            f"{', '.join(known) or 'none yet'}. {_REMEDY}"
        ) from None
    except OSError as error:
        raise LandscapeError(f"{path} cannot be read ({error.strerror}). Expected a Parquet file. {_REMEDY}") from None
    except UnreadableError as error:
        raise LandscapeError(f"{path} {error}. Expected a landscape that moelab froze, whole. {_REMEDY}") from error
    try:
        found = Landscape(
            Problem.from_json(about["problem"]), about["provenance"], about["evaluator"], about["space"],
            tuple(_rows(columns)), path,
        )  # fmt: skip
    except MoelabError as error:
        raise LandscapeError(f"{path} describes no layer: {error} Expected what moelab froze. {_REMEDY}") from error
    _require_sound(found, str(path))
    return found


def _about(landscape: Landscape) -> dict[str, Any]:
    """What the metadata holds beside the digest."""
    about = {"schema": SCHEMA, "problem": landscape.problem.to_json()}
    return about | {name: dict(getattr(landscape, name)) for name in ("provenance", "evaluator", "space")}


def _columns(rows: Sequence[Row]) -> dict[str, list[Any]]:
    """Rows as columns, in the file's order."""
    up_down = [(row.contender[0], row.contender[1] if len(row.contender) > 1 else None) for row in rows]
    return {
        "stage": [row.stage for row in rows],
        "num_tokens": [row.num_tokens for row in rows],
        **{name: [getattr(up, name) for up, _ in up_down] for name in FIELDS},
        **{f"down_{name}": [down and getattr(down, name) for _, down in up_down] for name in FIELDS},
        "samples_us": [list(row.outcome.samples_us) for row in rows],
        "failure": [row.outcome.failure for row in rows],
        "message": [row.outcome.message or None for row in rows],
        "compile_s": [row.outcome.compile_s for row in rows],
        "measure_s": [row.outcome.measure_s for row in rows],
        "interleaved": [row.interleaved for row in rows],
        "at": [row.at for row in rows],
    }


def _rows(data: Mapping[str, list[Any]]) -> Iterable[Row]:
    ups = _configs([data[name] for name in FIELDS])
    downs = _configs([data[f"down_{name}"] for name in FIELDS])
    for i, (up, down) in enumerate(zip(ups, downs, strict=True)):
        outcome = Outcome(
            tuple(data["samples_us"][i]), data["failure"][i], data["message"][i] or "",
            data["compile_s"][i], data["measure_s"][i],
        )  # fmt: skip
        contender = (cast(KernelConfig, up),) if down is None else (cast(KernelConfig, up), down)
        yield Row(data["stage"][i], data["num_tokens"][i], contender, outcome, data["interleaved"][i], data["at"][i])


def _configs(columns: list[list[int | None]]) -> Iterable[KernelConfig | None]:
    made: dict[tuple[int | None, ...], KernelConfig | None] = {}
    for values in zip(*columns, strict=True):
        if values not in made:
            is_none = all(value is None for value in values)
            made[values] = None if is_none else KernelConfig(*values)  # type: ignore[arg-type]
        yield made[values]


# --- what makes one sound -----------------------------------------------------------------------------------------


def _require_sound(landscape: Landscape, what: str) -> None:
    problem = _problem(landscape)
    if problem:
        raise LandscapeError(
            f"{what} {problem}. Expected rows of positive, finite samples or a named failure, with provenance. {_REMEDY}"
        )


def _problem(landscape: Landscape) -> str | None:
    """The first thing wrong that no schema sees, as the end of a sentence; None if it is sound."""
    missing = [key for key in recordings.PROVENANCE_KEYS if key not in landscape.provenance]
    missing += [key for key in ("gpu", "date") if key not in missing and not landscape.provenance[key]]
    if missing:
        return f"has no {', '.join(missing)} in its provenance"
    if not any(row.outcome.samples_us for row in landscape.rows):
        return "holds no measurement"
    for index, row in enumerate(landscape.rows):
        if found := _row_problem(row, landscape.problem):
            return f"{found} in row {index}"
    return None


def _row_problem(row: Row, problem: Problem) -> str | None:
    if row.num_tokens not in problem.batch_sizes:
        return f"holds {row.num_tokens} tokens, which are no batch size of its problem,"
    if len(row.contender) != (2 if row.stage == "layer" else 1):
        return f"holds {len(row.contender)} configs for {row.stage!r}"
    if row.outcome.failure is not None and row.outcome.samples_us:
        return f"holds the failure {row.outcome.failure!r} beside samples"
    broken = _violations(row.contender)
    return f"holds a config that no kernel takes ({broken})" if broken else None


@functools.lru_cache(maxsize=65536)
def _violations(contender: Contender) -> str:
    return "; ".join(broken for config in contender for broken in violations(config, uses_dot=False))
