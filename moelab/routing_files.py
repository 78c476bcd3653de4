"""Files of expert ids: an array, a tensor, safetensors, or the workloads that FlashInfer-Bench captures from a server."""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from moelab.reading import UnreadableError, parse_json, read_bytes

LARGEST_FILE = 1 << 30
"""Bytes of the largest routing file: 16 million tokens to 8 experts in int64."""

IDS = ("topk_ids", "token_selected_experts", "selected_experts", "topk_indices", "topk_idx")
"""What definitions call the input that says which experts each token goes to."""

INTEGERS = {
    "I8": "i1", "I16": "<i2", "I32": "<i4", "I64": "<i8", "U8": "u1", "U16": "<u2", "U32": "<u4", "U64": "<u8",
}  # fmt: skip
"""safetensors' names of dtypes -> numpy's."""


def read_ids(path: Path) -> Any:
    """What the file holds, an array of ids if it is sound.

    Raises OSError, UnreadableError, and errors of the parsers' own: three read other people's bytes.
    """
    if path.suffix == ".jsonl":
        return _read_workloads(path)
    return _READERS.get(path.suffix, _read_npy)(read_bytes(path, LARGEST_FILE))


def _read_npy(data: bytes) -> np.ndarray:
    return np.load(io.BytesIO(data))


def _read_pt(data: bytes) -> Any:
    found = torch.load(io.BytesIO(data), weights_only=True)
    return found.detach().numpy() if isinstance(found, Tensor) else found


def _read_safetensors(data: bytes, key: str | None = None) -> np.ndarray:
    """The tensor of that name, or the only one, of a safetensors file. Its format: the length of a JSON header (8 bytes,
    little-endian), the header with each tensor's dtype, shape and data_offsets, then the data without a hole (the README of its
    project, section Format)."""
    from moelab.schemas import SAFETENSORS, first_problem

    start = 8 + int.from_bytes(data[:8], "little")
    if start > len(data):
        raise UnreadableError(f"has {len(data)} bytes, and its header alone would end at {start}")
    header = parse_json(data[8:start])
    if problem := first_problem(SAFETENSORS, header):
        raise UnreadableError(problem)
    tensors = {name: about for name, about in header.items() if name != "__metadata__"}
    if key is None and len(tensors) != 1:
        raise UnreadableError(f"holds {len(tensors)} tensors, and one layer has one")
    if key is not None and key not in tensors:
        raise UnreadableError(f"holds no tensor {key!r:.60}, but {', '.join(tensors)[:200] or 'none'}")
    about = tensors[key] if key is not None else next(iter(tensors.values()))
    if about["dtype"] not in INTEGERS:
        raise UnreadableError(f"holds {about['dtype']}, which is no integer")
    kind, shape = np.dtype(INTEGERS[about["dtype"]]), about["shape"]
    first, last = about["data_offsets"]
    whole = key is not None or (first, start + last) == (0, len(data))
    if last - first != kind.itemsize * math.prod(shape) or start + last > len(data) or not whole:
        raise UnreadableError(
            f"has {len(data) - start} bytes of data, at data_offsets {about['data_offsets']}, for {about['dtype']} {shape}"
        )
    return np.frombuffer(data[start + first : start + last], kind).reshape(shape)


def _read_workloads(path: Path) -> np.ndarray:
    """The ids of each workload of a .jsonl of FlashInfer-Bench 0.1 (data/workload.py, data/trace.py), one after another.

    A line is a trace: a definition's name and a workload, whose inputs say in which safetensors file, below the folder of the
    whole set, each tensor lies. Raises UnreadableError for workloads of several definitions, or without ids.
    """
    lines = [line for line in read_bytes(path).splitlines() if line.strip()]
    traces = [_trace(number, line) for number, line in enumerate(lines, start=1)]
    if not traces:
        raise UnreadableError("holds no workload")
    if len(names := {trace["definition"] for trace in traces}) > 1:
        raise UnreadableError(
            f"holds workloads of {len(names)} definitions, {', '.join(sorted(names))[:200]}: one layer is one"
        )
    found = [_ids_of(path, number, trace["workload"]["inputs"]) for number, trace in enumerate(traces, start=1)]
    if any(ids.ndim != 2 or ids.shape[1] != found[0].shape[1] for ids in found):
        raise UnreadableError(f"holds ids of shapes {', '.join(str(ids.shape) for ids in found)[:200]}")
    return np.concatenate([ids.astype(np.int64) for ids in found])


def _trace(number: int, line: bytes) -> dict[str, Any]:
    from moelab.schemas import TRACE, first_problem

    try:
        trace = parse_json(line)
    except UnreadableError as error:
        raise UnreadableError(f"has a line {number} that {error}") from None
    if problem := first_problem(TRACE, trace):
        raise UnreadableError(f"has a line {number} that {problem}")
    return trace


def _ids_of(path: Path, number: int, inputs: Mapping[str, Any]) -> np.ndarray:
    name = next((name for name in IDS if inputs.get(name, {}).get("type") == "safetensors"), None)
    if name is None:
        raise UnreadableError(
            f"has a line {number} whose inputs hold no ids ({', '.join(IDS)}), but {', '.join(inputs)[:200]}: from logits only "
            "the model's own rule knows who is chosen"
        )
    file = _blob(path, str(inputs[name].get("path", "")))
    try:
        return _read_safetensors(read_bytes(file, LARGEST_FILE), str(inputs[name].get("tensor_key", name)))
    except UnreadableError as error:
        raise UnreadableError(f"names {file}, which {error}") from None


def _blob(path: Path, named: str) -> Path:
    """The file that a workload names: relative to the folder of the whole set, which is one of those above the .jsonl."""
    if not named or Path(named).is_absolute() or ".." in Path(named).parts:
        raise UnreadableError(f"names {named!r:.100}, which is no path below its set")
    roots = path.resolve().parents[:4]
    found = next((root / named for root in roots if (root / named).is_file()), None)
    if found is None:
        raise UnreadableError(f"names {named:.200}, which is in none of {', '.join(map(str, roots))[:400]}")
    return found


_READERS: Mapping[str, Callable[[bytes], Any]] = {".pt": _read_pt, ".safetensors": _read_safetensors}
