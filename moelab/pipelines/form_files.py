"""Forms of the fastest layer as config files name them, and which of them serves a batch (`kernel=fast`)."""

from __future__ import annotations

import functools
import re
from pathlib import Path
from typing import NamedTuple

from moelab.config_files.form_entries import KERNEL, FormEntry, layer_key, read_form_file
from moelab.config_files.names import checked_name
from moelab.config_files.search import first_path, nearest_key
from moelab.errors import ConfigFileError, nearest_names
from moelab.formats import PLAIN
from moelab.kernels import few_tokens
from moelab.kernels.fast_instances import ALL, Instance
from moelab.kernels.few_tokens import FORMS, FewTokens, Tile
from moelab.pipelines.form_choice import Classic, Form, Gated, kind_of
from moelab.pipelines.form_times import CLASSIC, GATED
from moelab.pipelines.spread import Batch


class FileForm(NamedTuple):
    """A form that a file names for a batch, the batch size it was tuned at, and the file."""

    form: Form
    key: int
    path: Path


def label(form: Form) -> str:
    """A name of its own for each form: of instances and forms for a few tokens what `named` reads."""
    if isinstance(form, Gated | Classic):
        return f"{kind_of(form)} {form.up.short()} / {form.down.short()}"
    return repr(form)


def named(text: str) -> Instance | FewTokens | None:
    """The instance or form for a few tokens of that name, in use or not; None for anything else."""
    if text.startswith("Instance("):
        return Instance.named(text)
    if text.startswith("FewTokens("):
        rows, columns, warps, *second, early = (int(value) for value in re.findall(r"=(\d+)", text))
        return FewTokens(Tile(rows, columns, warps), Tile(*second), early)
    return None


def entry_of(form: Form) -> FormEntry:
    """As a file has it."""
    if isinstance(form, Gated | Classic):
        return FormEntry(kind_of(form), None, form.up, form.down)
    return FormEntry(kind_of(form), repr(form))


def form_of(entry: FormEntry, where: str) -> Form:
    """The form of an entry. Raises ConfigFileError for one that is not in use. where: of the entry, for that."""
    if entry.up is not None and entry.down is not None:
        if entry.kind in (GATED, CLASSIC):
            return (Gated if entry.kind == GATED else Classic)(entry.up, entry.down)
        raise ConfigFileError(
            f"{where}: {entry.kind!r:.40} has no configs. Expected {GATED} or {CLASSIC}. Tune it again."
        )
    forms: tuple[Instance | FewTokens, ...] = (*ALL, *FORMS)
    in_use, name = {repr(form): form for form in forms}, str(entry.name)
    found = in_use.get(name)
    if found is None or kind_of(found) != entry.kind:
        raise ConfigFileError(
            f"{where}: there is no form {entry.kind} {name[:120]}.{nearest_names(name, in_use)} Expected one that is in use. "
            "Tune it again: moelab tune --kernel fast."
        )
    return found


def layer_of(batch: Batch) -> str:
    """What a file calls the layer of that batch."""
    return layer_key(batch.hidden_size, batch.top_k, round(batch.top_k / batch.share))


@functools.lru_cache(maxsize=4096)
def tuned_form(batch: Batch, device: str, triton_version: str, dtype: str, config_dir: str | None) -> FileForm | None:
    """What the file of that layer has for the nearest batch size, if the form serves this batch; None without one. Kept: a file
    is read once a batch size. config_dir: MOELAB_CONFIG_DIR. Raises ConfigFileError for a file that is broken."""
    name = checked_name(
        batch.num_experts, batch.moe_intermediate_size, device, PLAIN.dtype_selector(dtype), kernel=KERNEL, rules="moelab"
    )  # fmt: skip
    path = first_path(name, triton_version, config_dir)
    entries = {} if path is None else read_form_file(path).get(layer_of(batch), {})
    if path is None or not entries:
        return None
    key = nearest_key(entries, batch.num_tokens)
    form = form_of(entries[key], f"{path}, batch size {key}")
    sizes = batch.num_tokens, batch.top_k, batch.hidden_size, batch.moe_intermediate_size
    if isinstance(form, FewTokens) and not few_tokens.serves(form, *sizes):
        return None
    return FileForm(form, key, path)
