"""One model's rows to draw: of the recording `serve_bench`, or, while there is none, of data/upstream."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from moelab import recordings, runtime
from moelab.errors import RecordingError
from moelab.reading import UnreadableError, read_json
from moelab.recordings import Recording

Row = Mapping[str, Any]


@dataclass(frozen=True)
class Measured:
    """rows: as `moelab.serving.suite` writes them, of one model. source: a sentence. single: medians without samples."""

    rows: Sequence[Row]
    source: str
    single: bool = False

    @property
    def model(self) -> str:
        return str(self.rows[0]["model"])


def load(model: str = "qwen3-30b-a3b") -> Measured:
    """That model's rows of the recording; where there is none, of data/upstream. Raises RecordingError for a broken file."""
    path = recordings.recordings_dir() / "serve_bench.json"
    if path.is_file():
        return of(recordings.load(path), model)
    return upstream()


def of(recording: Recording, model: str) -> Measured:
    """That model's rows. Raises RecordingError where it has none."""
    rows = recording.select(model=model)
    if not rows:
        there = ", ".join(dict.fromkeys(str(row["model"]) for row in recording.rows))
        raise RecordingError(f"The recording has no rows of {model}. Expected one of {there}. Name one of them.")
    what = f"{model}, {rows[0]['layers']} layers, random weights"
    return Measured(
        rows, f"{what}; {recording.source()}, transformers {recording.provenance.get('transformers', 'unknown')}"
    )


def upstream() -> Measured:
    """data/upstream/h200_realmodel.json. Raises RecordingError where it cannot be read."""
    path = runtime.data_dir() / "upstream" / "h200_realmodel.json"
    try:
        data = read_json(path)
        rows = [row for cell in data["rows"] for row in _of_peer(cell, data)]
    except (OSError, UnreadableError, KeyError, TypeError) as error:
        raise RecordingError(f"Cannot read {path}: {error}. Expected its rows. Restore the file from git.") from error
    return Measured(
        rows, f"{data['model']}, {data['layers']} layers, random weights; {data['source']}; single medians", True
    )


def _of_peer(cell: Row, data: Row) -> list[Row]:
    common = {"model": data["model"], "layers": data["layers"], "moe_layers": data["moe_layers"], "routing": "balanced"}
    common |= {"batch": cell["batch"], "length": cell["length"]}
    common["num_tokens"] = cell["batch"] * (cell["length"] if cell["kind"] == "prefill" else 1)
    found: list[Row] = []
    for name, told in cell.items():
        if name in ("kind", "batch", "length"):
            continue
        kind = "decode, eager" if name.endswith("_eager") else cell["kind"]
        time = {"refused": told} if isinstance(told, str) else {"samples_us": [told * 1e3]}
        found.append({**common, "kind": kind, "impl": name.removesuffix("_eager"), **time})
    return found
