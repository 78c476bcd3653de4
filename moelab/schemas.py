"""What files of others must hold, as pydantic schemas: types, ranges, known fields. Imported only by who reads one.

Schemas are strict: 16.0, "16" and true are no 16. A number is finite; a time is positive and at most 11 days. Those of the
tuner's files are in `moelab.tuner.schemas`.
"""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal, NotRequired

from pydantic import AfterValidator, ConfigDict, Field, JsonValue, TypeAdapter, ValidationError
from typing_extensions import TypedDict  # pydantic takes typing's from Python 3.12 on only

from moelab.chips import TARGETS
from moelab.dtypes import DTYPES, dtype_name
from moelab.reading import UnreadableError

CLOSED = ConfigDict(strict=True, extra="forbid", allow_inf_nan=False)
"""For what moelab writes itself: a field that nobody knows is a mistake."""

OPEN = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)
"""For what others write, of which a few fields are read."""

Microseconds = Annotated[float, Field(gt=0, le=1e12)]
Seconds = Annotated[float, Field(ge=0, le=1e6)]
Positive = Annotated[float, Field(gt=0, le=1e24)]
Index = Annotated[int, Field(ge=0, le=2**31 - 1)]
Size = Annotated[int, Field(ge=1, le=2**31 - 1)]
Name = Annotated[str, Field(min_length=1, max_length=1000)]


def first_problem(schema: TypeAdapter[Any], value: Any) -> str | None:
    """The first thing wrong with a value, as the end of a sentence that begins with its file's name; None if it is sound."""
    try:
        schema.validate_python(value)
    except ValidationError as error:
        return said(error)
    return None


def parsed(schema: TypeAdapter[Any], text: bytes) -> Any:
    """A small document of strict JSON by its schema, both at once. Raises UnreadableError. (A key that stands twice is taken
    as it stands last: a digest, not a schema, tells.)"""
    try:
        return schema.validate_json(text)
    except ValidationError as error:
        raise UnreadableError(said(error)) from None


def said(error: ValidationError) -> str:
    """What pydantic found first: "holds -1.0 at rows.3.samples_us.0, where it should be greater than 0"."""
    first = error.errors(include_url=False, include_context=False)[0]
    where, kind, why = (
        ".".join(part for part in map(str, first["loc"]) if not _UNION.match(part)),
        first["type"],
        first["msg"],
    )
    if kind == "json_invalid":
        return f"is not strict JSON ({why.removeprefix('Invalid JSON: ')})"
    if kind == "missing":
        return f"has no {where}"
    if kind == "extra_forbidden":
        return f"has the field {where}, which nothing here knows"
    why = re.sub(r"^\w+ should", "where it should", why.removeprefix("Value error, "))
    return f"holds {shown(first['input'])}{f' at {where}' if where else ''}, {why}"


_UNION = re.compile(r"(list|tuple|dict)\[|constrained-|\[key\]|function-")
"""What pydantic puts into a place for the member of a union that it tried."""


def shown(value: Any) -> str:
    """A value for a message, cut to 60 characters."""
    if isinstance(value, dict | list):
        return f"a JSON {'object' if isinstance(value, dict) else 'list'}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


# --- recordings ----------------------------------------------------------------------------------------------------


class _Row(TypedDict, total=False):
    """A row of a recording: what a suite says, of which these are what they are called."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    samples_us: Annotated[list[Microseconds], Field(min_length=1)]
    eager_samples_us: Annotated[list[Microseconds], Field(min_length=1)]
    median_us: Microseconds
    low_us: Microseconds
    high_us: Microseconds
    screened_us: Microseconds
    duration_ns: Positive
    compile_s: Seconds
    measure_s: Seconds
    wall_s: Seconds
    num_tokens: Index
    rotations: Size
    within_bound: bool


class _Recording(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    schema: Annotated[int, Field(ge=1, le=1)]
    suite: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_.-]*$", max_length=100)]
    provenance: dict[str, JsonValue]
    protocol: dict[str, JsonValue]
    digest: Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
    rows: Annotated[list[_Row], Field(min_length=1)]


RECORDING: TypeAdapter[Any] = TypeAdapter(_Recording)


# --- devices -------------------------------------------------------------------------------------------------------


def known_target(name: str) -> str:
    if name not in TARGETS:
        raise ValueError(f"which is no chip here; expected one of {', '.join(TARGETS)}")
    return name


Range = Annotated[list[Positive], Field(min_length=2, max_length=2)]


class _Ceiling(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    copy_bytes_per_s: Positive
    flops_per_s: dict[str, Positive]
    copy_range_bytes_per_s: NotRequired[Range]
    read_range_bytes_per_s: NotRequired[Range]
    source: Name


class _Device(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    device: Name
    target: Annotated[str, AfterValidator(known_target)]
    SMs: Size
    SM_flops_per_clock: NotRequired[dict[str, Positive | str]]
    memory_bytes: Positive | None
    shared_memory_per_block: Size
    l2_bytes: Index
    l2_source: NotRequired[Name]
    ceilings: dict[Literal["measured", "floors", "datasheet"], _Ceiling]


DEVICE: TypeAdapter[Any] = TypeAdapter(_Device)


# --- what predicts the times of forms -------------------------------------------------------------------------------------

_Numbers = Annotated[list[float], Field(max_length=1000)]


class _Chip(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    device: Name
    sms: Size


class _FastTimes(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    schema: Annotated[int, Field(ge=1, le=1)]
    shared: dict[Literal["one_launch", "few_tokens", "gated_tma", "triton"], dict[str, Positive]]
    own: dict[Literal["one_launch", "few_tokens", "gated_tma", "triton"], dict[str, _Numbers]]
    anchors: Annotated[list[_Numbers], Field(max_length=1000)]
    widths: _Numbers
    before: dict[Literal["order", "align"], _Numbers]
    chip: _Chip
    sources: list[Name]


FAST_TIMES: TypeAdapter[Any] = TypeAdapter(_FastTimes)


# --- a model's config.json -----------------------------------------------------------------------------------------

Strings = list[str] | tuple[str, ...] | None
Layers = Annotated[int, Field(ge=0, le=10_000)] | None
Shared = Annotated[int, Field(ge=0, le=2**31 - 1)] | None


Modules = list[Annotated[str, Field(max_length=1000)]] | None
"""Patterns of names; translating one of 100,000 brackets takes minutes."""


def _known_dtype(name: str) -> str:
    others = {other for dtype in DTYPES.values() for other in dtype.others}
    if dtype_name(name) not in {*DTYPES, *others, "auto"}:
        raise ValueError(f"which is no dtype here; expected one of {', '.join(DTYPES)}, or auto")
    return name


Dtype = Annotated[str, AfterValidator(_known_dtype)]


class _Quantisation(TypedDict, total=False):
    __pydantic_config__ = OPEN  # type: ignore[misc]
    quant_method: str | None
    ignored_layers: Modules
    modules_to_not_convert: Modules
    ignore: Modules
    exclude_modules: Modules
    config_groups: dict[str, Any] | None


class _Model(TypedDict, total=False):
    """A config.json, or the section of it that describes the experts: of all keys those that are read by these names. The
    sizes are checked where they are read, for their names are the architecture's."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    architectures: Strings
    model_type: str | None
    _name_or_path: str | None
    source: str
    dtype: Dtype | None
    torch_dtype: Dtype | None
    expert_dtype: Name | None
    n_shared_experts: Shared
    num_shared_experts: Shared
    shared_expert_intermediate_size: Shared
    moe_shared_expert_intermediate_size: Shared
    num_hidden_layers: Layers
    first_k_dense_replace: Layers
    num_dense_layers: Layers
    interleave_moe_layer_step: Layers
    mlp_layer_types: Strings
    layers_block_type: Strings
    hybrid_override_pattern: str | None
    enable_moe_block: bool | None
    is_moe: bool | None
    per_layer_config: dict[str, Any] | None
    quantization_config: _Quantisation | None
    compression_config: _Quantisation | None


MODEL: TypeAdapter[Any] = TypeAdapter(_Model)


# --- routing files -------------------------------------------------------------------------------------------------

Offset = Annotated[int, Field(ge=0, le=2**40)]


class _Tensor(TypedDict):
    __pydantic_config__ = CLOSED  # type: ignore[misc]
    dtype: str
    shape: Annotated[list[Index], Field(max_length=8)]
    data_offsets: Annotated[list[Offset], Field(min_length=2, max_length=2)]


SAFETENSORS: TypeAdapter[Any] = TypeAdapter(dict[str, _Tensor | dict[str, str]])
"""The header of a safetensors file: name -> tensor, and texts under __metadata__."""


class _Input(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]
    type: str
    path: NotRequired[str]
    tensor_key: NotRequired[str]


class _Workload(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]
    inputs: dict[str, _Input]


class _Trace(TypedDict):
    __pydantic_config__ = OPEN  # type: ignore[misc]
    definition: Name
    workload: _Workload


TRACE: TypeAdapter[Any] = TypeAdapter(_Trace)
"""A line of FlashInfer-Bench's workloads: of it what says where the ids lie."""


class _Around(TypedDict, total=False):
    """What is read of a config.json around the section that describes the experts."""

    __pydantic_config__ = OPEN  # type: ignore[misc]
    dtype: Dtype | None
    torch_dtype: Dtype | None


AROUND: TypeAdapter[Any] = TypeAdapter(_Around)
