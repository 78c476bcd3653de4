"""Landscapes and recordings: their values, sealed again as if moelab had written them; their bits; routing files; devices."""

from __future__ import annotations

import dataclasses
import io
import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from synthetic import small_problem, synthetic_landscape

from fuzz import Case, spoil
from moelab import recordings, roofline, runtime
from moelab.routing import load_routing, make_routing
from moelab.tuner import landscape, landscape_file

# --- landscapes --------------------------------------------------------------------------------------------------------


def landscapes(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Values of columns and of the metadata, and whole files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "a.parquet"
    good = _small()
    data = landscape.write(good, folder / "good.parquet").read_bytes()
    columns, about = landscape_file.read(folder / "good.parquet")
    about = {key: value for key, value in about.items() if key != "digest"}
    while True:
        how = rng.choice(("column", "column", "about", "about", "bytes", "special"))
        spoil.cleared(path)
        if how == "special":
            what, make = rng.choice(list(spoil.SPECIAL.items()))
            make(path)
        elif how == "bytes":
            what, spoiled = spoil.spoiled_bytes(rng, data)
            path.write_bytes(spoiled)
        elif how == "column":
            what = _write_column(rng, columns, about, path)
        else:
            what = _write_about(rng, columns, about, path)
        yield Case(what, lambda: landscape.load(path), lambda found: _same(found, good))


def _small() -> landscape.Landscape:
    made = synthetic_landscape(small_problem((1, 64)), samples=3)
    timed = [row for row in made.rows if row.outcome.samples_us][:30]
    found = dataclasses.replace(made, rows=(*timed, *[row for row in made.rows if row.outcome.failure][:3]))
    as_stored = [
        dataclasses.replace(row, outcome=dataclasses.replace(
            row.outcome, samples_us=tuple(float(np.float32(s)) for s in row.outcome.samples_us),
            compile_s=float(np.float32(row.outcome.compile_s)), measure_s=float(np.float32(row.outcome.measure_s)),
        ))
        for row in found.rows
    ]  # fmt: skip
    return dataclasses.replace(found, rows=tuple(as_stored))


def _same(found: landscape.Landscape, good: landscape.Landscape) -> bool:
    return (found.rows, found.problem, found.provenance) == (good.rows, good.problem, good.provenance)


NUMBERS = (-1, 0, -(2**31))
TIMES = (-1.0, 0.0, float("nan"), float("inf"), -float("inf"), 1e30)


def _write_column(rng: random.Random, columns: Mapping[str, list[Any]], about: Any, path: Path) -> str:
    """One value of one column, or a column that is missing, or unknown."""
    changed = {name: list(values) for name, values in columns.items()}
    name = rng.choice(list(changed))
    row = rng.randrange(len(changed[name]))
    how = rng.choice(("value", "value", "value", "gone", "more"))
    if how == "gone":
        del changed[name]
    elif how == "more":
        changed["wholly_unknown"] = changed["num_tokens"]
    else:
        value: Any = rng.choice(NUMBERS)
        if name == "samples_us":
            row, value = rng.randrange(20), [1.0, rng.choice(TIMES)]
        elif name in ("compile_s", "measure_s"):
            value = rng.choice([time for time in TIMES if time != 0])
        elif name in ("stage", "failure", "at"):
            value = rng.choice(("side", "", "x"))
        elif name in ("message", "interleaved"):
            name, value = "num_tokens", rng.choice((-1, 0, 65))
        elif name.endswith(("waves_per_eu", "matrix_instr_nonkdim", "kpack")):
            value = rng.choice((-1, 99))
        changed[name][row] = value
    _sealed(changed, about, path)
    return f"column {name}, row {row}: {how} {changed.get(name, [None] * 99)[row]}"


def _write_about(rng: random.Random, columns: Any, about: Any, path: Path) -> str:
    places = [p for p in spoil.paths(about) if p[0] not in ("provenance", "space") or len(p) == 1]
    place = rng.choice([p for p in places if p[:2] not in (("evaluator", "protocol"),)])
    there = spoil.at(about, place)
    values = [v for v in spoil.HOSTILE if not isinstance(v, spoil.Raw) and spoil.is_hostile_to(there, v)]
    values = [v for v in values if not (there is None and (v is None or v == {}))]
    value = rng.choice([v for v in values if v != 10**400 and not (isinstance(there, dict) and v == {})])
    _sealed(columns, spoil.replaced(about, place, value), path)
    return f"metadata {'.'.join(map(str, place))} = {str(value)[:40]!r}"


def _sealed(columns: Mapping[str, list[Any]], about: Any, path: Path) -> None:
    """Write what the writer would refuse, with a right digest."""
    import pyarrow as pa

    types = {"samples_us": pa.list_(pa.float32()), "compile_s": pa.float32(), "measure_s": pa.float32()}
    arrays = {name: pa.array(values, types.get(name)) for name, values in columns.items()}
    landscape_file._write(pa.table(arrays), about, path)


# --- bits --------------------------------------------------------------------------------------------------------------


def landscape_bits(rng: random.Random, folder: Path) -> Iterator[Case]:
    """One flipped bit in a shipped landscape."""
    source = runtime.data_dir() / "landscapes" / "qwen3-30b-a3b-tp1-NVIDIA_H200-zipf.parquet"
    yield from _bits(rng, folder, source, landscape.load, lambda found: (found.rows, found.problem, found.provenance))


def recording_bits(rng: random.Random, folder: Path) -> Iterator[Case]:
    """One flipped bit in each of two shipped recordings in turn."""
    each = [
        _bits(rng, folder, recordings.recordings_dir() / f"{name}.json", recordings.load,
              lambda found: (found.suite, found.rows, found.provenance, found.protocol))
        for name in ("sum_reduce", "ceilings")
    ]  # fmt: skip
    while True:
        for one in each:
            yield next(one)


def _bits(rng: random.Random, folder: Path, source: Path, load: Callable, of: Callable) -> Iterator[Case]:
    folder.mkdir(parents=True, exist_ok=True)
    data, good, path = source.read_bytes(), of(load(source)), folder / source.name
    while True:
        what, spoiled = spoil.flipped(rng, data)
        path.write_bytes(spoiled)
        yield Case(f"{source.name}: {what}", lambda: of(load(path)), lambda found: found == good)


# --- recordings ----------------------------------------------------------------------------------------------------------


def recorded(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Values of a recording: as a hand changes them, and sealed again; and whole files."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "sum_reduce.json"
    good = recordings.load("ceilings")
    text = recordings.recordings_dir().joinpath("ceilings.json").read_text()
    content = json.loads(text)
    while True:
        how = rng.choice(("hand", "sealed", "sealed", "bytes", "special"))
        spoil.cleared(path)
        if how == "special":
            what, make = rng.choice(list(spoil.SPECIAL.items()))
            make(path)
        elif how == "bytes":
            what, data = spoil.spoiled_bytes(rng, text.encode())
            path.write_bytes(data)
        else:
            what, changed = _changed(rng, content, how)
            path.write_text(changed)
        yield Case(f"{how}: {what}", lambda: recordings.load(path), lambda found: _is(found, good))


def _is(found: recordings.Recording, good: recordings.Recording) -> bool:
    return (found.rows, found.provenance, found.protocol) == (good.rows, good.provenance, good.protocol)


def _changed(rng: random.Random, content: dict[str, Any], how: str) -> tuple[str, str]:
    """By hand: any number, a little. Sealed: a value that no field of that name may hold."""
    if how == "hand":
        row = rng.randrange(len(content["rows"]))
        place: tuple[Any, ...] = ("rows", row, "samples_us", rng.randrange(40))
        value: Any = spoil.at(content, place) + rng.choice((1e-6, -1e-6, 1.0))
        return f"{place} = {value}", spoil.dumps(spoil.replaced(content, place, value), 1)
    row = rng.randrange(len(content["rows"]))
    samples = ("rows", row, "samples_us")
    place = rng.choice(
        (samples, (*samples, 3), ("rows", row), ("rows",), ("suite",), ("schema",), ("provenance",), ("protocol",))
    )
    there = spoil.at(content, place)
    value = rng.choice([v for v in spoil.HOSTILE if spoil.is_hostile_to(there, v) or v in ([], "", "x", {})])
    if (isinstance(there, str) and value == "x") or (place == ("protocol",) and value in ({}, {"a": 1})):
        value = None
    if place == ("rows", row) and value in ({}, {"a": 1}):
        value = 5
    changed = spoil.replaced(content, place, value)
    try:
        changed["digest"] = recordings._digest(changed)
    except (TypeError, AttributeError, ValueError, KeyError):
        changed["digest"] = "0" * 64
    return f"{place} = {str(value)[:40]!r}", spoil.dumps(changed, 1)


# --- routing files ---------------------------------------------------------------------------------------------------------

IDS = make_routing("zipf", 10, 16, 4).topk_ids


def routings(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Arrays of other kinds, ids out of range, bytes, and special files, in each of three formats."""
    folder.mkdir(parents=True, exist_ok=True)
    while True:
        suffix = rng.choice((".npy", ".pt", ".safetensors"))
        path = spoil.cleared(folder / f"ids{suffix}")
        how = rng.choice(("array", "array", "bytes", "bytes", "special"))
        if how == "special":
            what, make = rng.choice(list(spoil.SPECIAL.items()))
            make(path)
            yield _routing(f"{suffix}: {what}", path, lambda _: False)
        elif how == "bytes":
            data = bytearray(_saved(IDS.numpy(), suffix))
            what, spoiled = spoil.spoiled_bytes(rng, bytes(data))
            path.write_bytes(spoiled)
            yield _routing(f"{suffix}: {what}", path, _is_routing)
        else:
            what, array, right = _array(rng)
            path.write_bytes(_saved(array, suffix))
            yield _routing(f"{suffix}: {what}", path, lambda ids, right=right: bool(right) and torch.equal(ids, IDS))


def _routing(what: str, path: Path, right: Callable[[torch.Tensor], bool]) -> Case:
    return Case(what, lambda: load_routing(path, 16).topk_ids, right)


def _is_routing(ids: torch.Tensor) -> bool:
    """No digest guards these files: what is read keeps to the rules at least."""
    in_range = bool(((ids >= -1) & (ids < 16)).all())
    return (
        in_range
        and ids.ndim == 2
        and all(len({i for i in row if i >= 0}) == sum(i >= 0 for i in row) for row in ids.tolist())
    )


def _array(rng: random.Random) -> tuple[str, np.ndarray, bool]:
    """(what, the array, whether it is the good one in another type)."""
    good = IDS.numpy()
    name = rng.choice(("int8", "int16", "int64", "uint8", "uint16", "uint32", "uint64", "float32", "bool", "complex64"))
    how = rng.choice(("type", "type", "over", "under", "twice", "flat", "deep", "wide"))
    array = good.astype(name)
    if how == "over":
        array[0, 0] = 16
    elif how == "under":
        array = np.full((3, 4), -2, np.int64)
    elif how == "twice":
        array[1, :] = array[1, 0]
    elif how in ("flat", "deep"):
        array = array.reshape(-1) if how == "flat" else array[None]
    elif how == "wide":
        array = np.arange(40, dtype=np.int64)[None]
    return f"{how}, {array.dtype}", array, how == "type" and array.dtype.kind in "iu"


def _saved(array: np.ndarray, suffix: str) -> bytes:
    file = io.BytesIO()
    if suffix == ".npy":
        np.save(file, array)
    elif suffix == ".pt":
        torch.save(torch.from_numpy(np.ascontiguousarray(array)), file)
    else:
        import safetensors.numpy

        return safetensors.numpy.save({"topk_ids": np.ascontiguousarray(array)})
    return file.getvalue()


# --- devices ---------------------------------------------------------------------------------------------------------------


def devices(rng: random.Random, folder: Path) -> Iterator[Case]:
    """Files of data/devices, through what asks for ceilings."""
    places = folder / "devices"
    places.mkdir(parents=True, exist_ok=True)
    good = json.loads((runtime.data_dir() / "devices" / "NVIDIA_H200.json").read_text())
    path = places / "NVIDIA_H200.json"
    while True:
        spoil.cleared(path)
        how = rng.choice(("value", "value", "bytes", "special"))
        if how == "special":
            what, make = rng.choice(list(spoil.SPECIAL.items()))
            make(path)
        elif how == "bytes":
            what, data = spoil.spoiled_bytes(rng, json.dumps(good, indent=2).encode())
            path.write_bytes(data)
        else:
            place = rng.choice(list(spoil.paths(good)))
            there = spoil.at(good, place)
            values = [v for v in spoil.HOSTILE if spoil.is_hostile_to(there, v) and v is not None]
            values = [
                v
                for v in values
                if not (isinstance(there, str) and isinstance(v, str) and not isinstance(v, spoil.Raw))
            ]
            value = rng.choice(values)
            if place[-1] == "source":
                value = spoil.Raw("NaN")
            what = f"{'.'.join(map(str, place))} = {str(value)[:40]!r}"
            path.write_text(spoil.dumps(spoil.replaced(good, place, value)))
        yield Case(what, lambda: _device(folder), _is_device)


def _device(folder: Path) -> Any:
    import os

    before = os.environ.get("MOELAB_DATA_DIR")
    os.environ["MOELAB_DATA_DIR"] = str(folder)
    try:
        return roofline.load_ceilings("NVIDIA H200"), roofline.device_data("NVIDIA H200")
    finally:
        os.environ.pop("MOELAB_DATA_DIR")
        if before is not None:
            os.environ["MOELAB_DATA_DIR"] = before


def _is_device(found: Any) -> bool:
    """A flipped bit may leave another number that could be one; no digest guards what is written by hand."""
    ceilings, data = found
    return ceilings.copy_bytes_per_s > 0 and ceilings.flops_per_s > 0 and data["SMs"] >= 1
