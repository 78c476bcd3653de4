"""What the tuner's files must hold, as pydantic schemas: problems, configs, outcomes. See `moelab.schemas`, which these extend.

Imported only by who reads a journal, a landscape or a repro.
"""

from __future__ import annotations

import dataclasses
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, Field, JsonValue, TypeAdapter, with_config
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on only

from moelab.config import LARGEST_VALUE, KernelConfig
from moelab.errors import nearest_names
from moelab.implementations import IMPLEMENTATIONS
from moelab.schemas import CLOSED, OPEN, Index, Microseconds, Name, Positive, Seconds, Size, known_target
from moelab.tuner.evaluate import FAILURES

Value = Annotated[int, Field(ge=0, le=LARGEST_VALUE)]
Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
Stage = Literal["up", "down", "layer"]
When = Annotated[str, Field(pattern=r"^\d{4}(-\d\d-\d\d(T[0-9:.]+\+00:00)?)?$", max_length=40)]
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
LineDigest = Annotated[str, Field(pattern=r"^[0-9a-f]{16}$")]


def _known_failure(name: str) -> str:
    if name not in FAILURES:
        raise ValueError(f"which is no class of failure; expected one of {', '.join(FAILURES)}")
    return name


def _known_kernel(name: str) -> str:
    known = [one.tuning.kernel for one in IMPLEMENTATIONS.values() if one.tuning]
    if name not in known:
        raise ValueError(f"which nobody tunes here.{nearest_names(name, known)} Expected one of {', '.join(known)}")
    return name


Failure = Annotated[str, AfterValidator(_known_failure)]


class Config(TypedDict):
    """A KernelConfig as `to_json` writes it."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    BLOCK_SIZE_M: Size
    BLOCK_SIZE_N: Size
    BLOCK_SIZE_K: Size
    GROUP_SIZE_M: Size
    num_warps: NotRequired[Size]
    num_stages: NotRequired[Size]
    SPLIT_K: NotRequired[Size]
    waves_per_eu: NotRequired[Value]
    matrix_instr_nonkdim: NotRequired[Value]
    kpack: NotRequired[Value]


class _Shape(TypedDict):
    """A MoEShape as `to_json` writes it; its names of dtypes, activations and formats are its own to check."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    name: Name
    num_experts: Size
    top_k: Size
    hidden_size: Size
    moe_intermediate_size: Size
    dtype: Name
    activation: Name
    gated: bool
    tp_size: Size
    ep_size: Size
    num_shared_experts_fused: Index
    architecture: str
    keys_used: list[str]
    format: NotRequired[Name]


BatchSize = Annotated[str, Field(pattern=r"^[1-9][0-9]{0,9}$")]
Pair = Annotated[list[Config], Field(min_length=2, max_length=2)]


class _Problem(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    shape: _Shape
    device: Name
    target: Annotated[str, AfterValidator(known_target)]
    triton_version: Annotated[str, Field(pattern=r"^\d+\.\d+\.\d+[.+a-z0-9]*$", max_length=60)]
    batch_sizes: Annotated[list[Tokens], Field(min_length=1, max_length=10_000)]
    routing: Name
    seed: Annotated[int, Field(ge=0, le=2**64 - 1)]
    kernel: Annotated[str, AfterValidator(_known_kernel)]
    split_k: Annotated[list[Size], Field(min_length=1)]
    axes: dict[str, list[Value]] | None
    separate_down: bool
    incumbents: dict[Name, dict[BatchSize, Pair]]


PROBLEM: TypeAdapter[Any] = TypeAdapter(_Problem)


class _Evaluator(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]
    kind: Name
    measured: bool


# --- landscapes ----------------------------------------------------------------------------------------------------


class _About(TypedDict):
    """The metadata of a landscape's file."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    schema: Annotated[int, Field(ge=1, le=1)]
    problem: _Problem
    provenance: dict[str, JsonValue]
    evaluator: _Evaluator
    space: dict[str, JsonValue]
    digest: Digest


ABOUT: TypeAdapter[Any] = TypeAdapter(_About)


_FIELDS = [f.name for f in dataclasses.fields(KernelConfig)]
_OPTIONAL = [f.name for f in dataclasses.fields(KernelConfig) if f.default is None]

_COLUMNS: dict[str, Any] = (
    {
        "stage": list[Stage], "num_tokens": list[Tokens],
        **{name: list[Value | None] if name in _OPTIONAL else list[Size] for name in _FIELDS},
        **{f"down_{name}": list[Value | None] for name in _FIELDS},
        "samples_us": list[list[Microseconds]], "failure": list[Failure | None], "message": list[str | None],
        "compile_s": list[Seconds], "measure_s": list[Seconds], "interleaved": list[bool], "at": list[When],
    }
)  # fmt: skip
_Columns = TypedDict("_Columns", _COLUMNS)  # type: ignore[misc]

COLUMNS: TypeAdapter[Any] = TypeAdapter(with_config(CLOSED)(_Columns))
"""A landscape's columns, each as a list."""


# --- journals ------------------------------------------------------------------------------------------------------

Json = dict[str, JsonValue]


class _Header(TypedDict):
    """A journal's first line. What it says of problem, strategy and evaluator is checked by who takes the run up."""

    __pydantic_config__ = CLOSED  # type: ignore[misc]
    kind: Literal["header"]
    schema: Annotated[int, Field(ge=1, le=1)]
    provenance: Json
    problem: Json
    strategy: Json
    space: Json
    evaluator: Json
    at: When
    digest: NotRequired[LineDigest]


class _Outcome(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    configs: Annotated[list[Config], Field(min_length=1, max_length=2)]
    samples_us: NotRequired[list[Microseconds]]
    failure: NotRequired[Failure]
    message: NotRequired[str]
    compile_s: NotRequired[Seconds]
    measure_s: NotRequired[Seconds]


class _Result(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    kind: Literal["result"]
    key: Annotated[str, Field(pattern=r"^[0-9a-f]{24}$")]
    stage: Stage
    num_tokens: Tokens
    rounds: Annotated[int, Field(ge=0, le=1_000_000)]
    interleaved: bool
    stop_above_us: NotRequired[Microseconds]
    repeat: NotRequired[Index]
    outcomes: Annotated[list[_Outcome], Field(min_length=1)]
    at: When
    digest: NotRequired[LineDigest]


class _Note(TypedDict):
    """What is no result: a phase that began, or was cut, a run that was taken up, or ended."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    kind: Literal["resumed", "phase", "cut", "finished"]
    name: NotRequired[Name]
    phase: NotRequired[Name]
    clock_s: NotRequired[Annotated[float, Field(ge=0, le=1e9)]]
    budget_s: NotRequired[Positive | None]
    provenance: NotRequired[Json]
    evaluator: NotRequired[Json]
    winners: NotRequired[list[JsonValue]]
    at: When
    digest: NotRequired[LineDigest]


class _Strategy(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]
    name: Name
    settings: dict[str, Annotated[float, Field(ge=0, le=1e6)]]
    budget_s: NotRequired[Positive | None]


class _Run(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]
    problem: _Problem
    strategy: _Strategy
    evaluator: _Evaluator


HEADER: TypeAdapter[Any] = TypeAdapter(_Header)
RESULT: TypeAdapter[Any] = TypeAdapter(_Result)
NOTE: TypeAdapter[Any] = TypeAdapter(_Note)
RUN: TypeAdapter[Any] = TypeAdapter(_Run)
"""What a journal's header says of a run, to take it up."""


class _Repro(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    problem: _Problem
    stage: Stage
    num_tokens: Tokens
    configs: Annotated[list[Config], Field(min_length=1, max_length=2)]
    failure: Failure
    why: str
    run: str


REPRO: TypeAdapter[Any] = TypeAdapter(_Repro)
