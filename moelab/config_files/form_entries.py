"""Config files of the kernel "fast": for a layer, batch size -> the form that serves it, not a config.

    {"forms_version": 1,
     "layers": {"hidden_size=2048,top_k=8,experts=128": {
         "8": {"form": "few_tokens", "name": "FewTokens(...)"},
         "256": {"form": "gated_tma", "up": {"BLOCK_SIZE_M": 16, ...}, "down": {...}}}}}

A file's name knows neither hidden size nor top_k nor how many experts other ranks have, and a form is chosen by all of them: so
layers are apart. A form of Triton's is a kind and a pair of configs; any other a kind and the name that recordings have. What a
name means, `moelab.pipelines.form_files` knows: nothing here needs torch.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from moelab.config import KernelConfig
from moelab.config_files.content import batch_key, parse
from moelab.errors import ConfigError, ConfigFileError

KERNEL = "fast"
"""What `kernel=` says in the names of these files."""

VERSION = 1
"""Of the forms: raised when a form that a file may name becomes another."""

_AGAIN = "Tune it again: moelab tune --kernel fast."


@dataclass(frozen=True)
class FormEntry:
    """kind: as `moelab.pipelines.form_times.KINDS`. name: of a form, None for a pair of configs. up, down: that pair."""

    kind: str
    name: str | None = None
    up: KernelConfig | None = None
    down: KernelConfig | None = None

    def to_json(self) -> dict[str, Any]:
        """As a file has it."""
        if self.up is None or self.down is None:
            return {"form": self.kind, "name": self.name}
        return {"form": self.kind, "up": self.up.to_json(), "down": self.down.to_json()}

    @classmethod
    def from_json(cls, entry: Any) -> FormEntry:
        """Raises ConfigError for what `to_json` did not write."""
        if isinstance(entry, Mapping) and isinstance(entry.get("form"), str):
            kind = entry["form"]
            if set(entry) == {"form", "name"} and isinstance(entry["name"], str):
                return cls(kind, entry["name"])
            if set(entry) == {"form", "up", "down"}:
                return cls(kind, None, *(KernelConfig.from_json(entry[side]) for side in ("up", "down")))
        raise ConfigError(
            f"{str(entry)[:120]} is no form. Expected form and name, or form, up and down. Correct the entry, or remove it."
        )


Layers = dict[str, dict[int, FormEntry]]
"""What a file holds: a layer, as `layer_key` names it, -> batch size -> form."""

_LAYER = re.compile(r"hidden_size=[1-9]\d{0,6},top_k=[1-9]\d{0,4},experts=[1-9]\d{0,5}")


def layer_key(hidden_size: int, top_k: int, experts: int) -> str:
    """The name of a layer in a file. experts: that a token chooses among, on all ranks."""
    return f"hidden_size={hidden_size},top_k={top_k},experts={experts}"


def read_form_file(path: str | Path) -> Layers:
    """Its layers, batch sizes in the file's order. Raises ConfigFileError for a file that is missing, broken, empty, or of
    another version of the forms."""
    path = Path(path)
    content = parse(path)
    if (version := content.get("forms_version")) != VERSION:
        raise ConfigFileError(
            f"{path} is of version {str(version)[:40]} of the forms. Expected forms_version {VERSION}: what it names may be "
            f"another form now. {_AGAIN}"
        )
    layers = content.get("layers")
    if set(content) != {"forms_version", "layers"} or not isinstance(layers, dict) or not layers:
        raise ConfigFileError(
            f"{path} holds {', '.join(map(str, content))[:120]}. Expected forms_version and one layer at least. {_AGAIN}"
        )
    return {_layer(name, path): _batches(name, entries, path) for name, entries in layers.items()}


def _layer(name: str, path: Path) -> str:
    if not _LAYER.fullmatch(name):
        raise ConfigFileError(
            f"{path} has the layer {name[:80]!r}. Expected a name as {layer_key(2048, 8, 128)!r}. Correct it, or remove it."
        )
    return name


def _batches(name: str, entries: Any, path: Path) -> dict[int, FormEntry]:
    found = {}
    for key, entry in entries.items() if isinstance(entries, dict) else ():
        try:
            found[batch_key(key, path)] = FormEntry.from_json(entry)
        except ConfigError as error:
            raise ConfigFileError(f"{path}, {name}, batch size {key[:20]}: {error}") from error
    if not found:
        raise ConfigFileError(f"{path} holds no batch size for {name}. Expected at least one. {_AGAIN}")
    return found


def form_text(layers: Mapping[str, Mapping[int, FormEntry]]) -> str:
    """The file's text, batch sizes ascending."""
    content = {
        name: {str(key): entries[key].to_json() for key in sorted(entries)} for name, entries in sorted(layers.items())
    }
    return json.dumps({"forms_version": VERSION, "layers": content}, indent=4) + "\n"
