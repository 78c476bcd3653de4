"""Where a model's config.json is found: a preset in data/models, a path, or Hugging Face."""

from __future__ import annotations

import functools
import queue
import threading
from pathlib import Path
from typing import Any

from moelab.errors import MoelabError, UnknownModelError, nearest_names
from moelab.model_config import load_config_file
from moelab.runtime import data_dir

HUB_LIMIT_S = 3.0
"""Until Hugging Face is taken to be out of reach."""

_FILES = (".json", ".safetensors", ".gguf", ".bin", ".pt", ".yaml", ".yml", ".txt", ".md", ".py")


def preset_names(*, quantised: bool = False) -> tuple[str, ...]:
    """Names of the presets in data/models, sorted: those of plain weights, or all."""
    return tuple(name for name, plain in _presets(models_dir()).items() if plain or quantised)


def published_as(name: str) -> str | None:
    """The quantised preset of the checkpoint whose layer, in plain weights, is this preset; None for any other name."""
    source = _sources(models_dir()).get(name)
    alias = preset_stem(source) if source else None
    return alias if alias != name else None


def broken_presets() -> dict[str, str]:
    """Files of data/models that are no config.json, by name -> what is wrong. Such a one hides no other; asked for by its
    name, it raises that."""
    return {stem: found for stem, found in _files(models_dir()).items() if isinstance(found, str)}


@functools.cache
def _files(folder: Path) -> dict[str, dict[str, Any] | str]:
    """Name -> the content of that file, or what is wrong with it; sorted."""
    found: dict[str, dict[str, Any] | str] = {}
    for file in sorted(folder.glob("*.json"), key=lambda file: file.stem):
        try:
            found[file.stem] = load_config_file(file)
        except MoelabError as error:
            found[file.stem] = str(error)
    return found


@functools.cache
def _sources(folder: Path) -> dict[str, str]:
    """Preset -> the Hugging Face id that it was read from."""
    sound = {stem: content for stem, content in _files(folder).items() if isinstance(content, dict)}
    return {stem: source if isinstance(source := content.get("source"), str) else "" for stem, content in sound.items()}


@functools.cache
def _presets(folder: Path) -> dict[str, bool]:
    """Preset -> whether its weights are plain."""
    return {
        stem: "quantization_config" not in content
        for stem, content in _files(folder).items()
        if isinstance(content, dict)
    }


def source_of(model: str | Path) -> tuple[str | Path, str | None]:
    """(what holds the config.json, the layer's name, if that is not the file's)."""
    text = str(model)
    if not text.strip():
        raise UnknownModelError(
            f"The model's name is empty. Expected a preset ({listed()}), a Hugging Face id, or a path. Name one of them."
        )
    if isinstance(model, str) and (stem := preset_stem(model)):
        return models_dir() / f"{stem}.json", stem
    if _can_only_be_a_path(model) or Path(text).exists():
        return Path(text), None
    return _from_hugging_face(text), text


def models_dir() -> Path:
    """Where the presets lie."""
    return data_dir() / "models"


def preset_stem(name: str) -> str | None:
    """The preset that goes by this name, in any case, or None."""
    return _aliases(models_dir()).get(name.strip().lower())


@functools.cache
def _aliases(folder: Path) -> dict[str, str]:
    """Lower-case name, Hugging Face id and last part of that id -> preset. Of two from one id, the quantised one has it:
    that is what is published there."""
    found: dict[str, str] = {}
    by_kind = sorted(_presets(folder).items(), key=lambda item: not item[1])
    for stem, _ in by_kind:
        source = _sources(folder)[stem]
        for alias in (source, source.rpartition("/")[2]):
            found[alias.lower()] = stem
    found.pop("", None)
    return found | {stem.lower(): stem for stem in _files(folder)}


def _can_only_be_a_path(model: str | Path) -> bool:
    text = str(model)
    return (
        isinstance(model, Path)
        or text.count("/") > 1
        or text.startswith((".", "/", "~"))
        or text.endswith(("/", ".json"))
    )


def listed() -> str:
    """The presets' names, for a message."""
    return ", ".join(preset_names(quantised=True)) or "none: there is no preset here"


def _refuse_a_path(model: str) -> None:
    """Raise for what has the form of an id, and is a path that somebody mistyped: the hub is not asked for it."""
    owner, name = model.split("/")
    if Path(owner).is_dir():
        why = f"{owner} is a folder here, and holds no {name}"
    elif Path(name).suffix.lower() in _FILES:
        why = "it is named as a file is"
    else:
        return
    raise UnknownModelError(
        f"There is nothing at {model}; Hugging Face was not asked for it, because {why}. Expected a preset, a path, or a Hugging "
        f"Face id. Correct the path{', or ask from another folder' if Path(owner).is_dir() else ''}."
        f"{nearest_names(model, preset_names(quantised=True))}"
    )


def _require_hub() -> None:
    """Raise what keeps the hub from being asked, within HUB_LIMIT_S: its own client tries again for half a minute."""
    from huggingface_hub import constants
    from huggingface_hub.utils import get_session

    said: queue.SimpleQueue[Exception | None] = queue.SimpleQueue()

    def ask() -> None:
        try:
            get_session().head(constants.ENDPOINT, timeout=HUB_LIMIT_S)
            said.put(None)
        except Exception as error:  # the transport's own, of any kind: it is raised below
            said.put(error)

    threading.Thread(target=ask, daemon=True).start()  # a name server may take longer than the limit given above
    try:
        error = said.get(timeout=HUB_LIMIT_S)
    except queue.Empty:
        raise TimeoutError(f"{constants.ENDPOINT} did not answer within {HUB_LIMIT_S:.0f} s") from None
    if error is not None:
        raise error


def _first_line(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")


def _from_hugging_face(model: str) -> Path:
    """Path of the config.json of a Hugging Face id, from its local cache or else from the hub."""
    if model.count("/") != 1:
        raise UnknownModelError(
            f"{model!r} is neither a preset, nor an existing path, nor a Hugging Face id (owner/name)."
            f"{nearest_names(model, preset_names(quantised=True))} Expected one of the three. Presets: {listed()}. "
            "Name one of them, or give the path of a config.json."
        )
    try:
        from huggingface_hub import hf_hub_download, try_to_load_from_cache
    except ImportError:
        raise UnknownModelError(
            f"{model!r} is no preset and no path here, and fetching it from Hugging Face takes a package that is not "
            "here. Expected the extra hf. Install it: pip install 'moelab[hf]'; "
            f"or give the path of its config.json.{nearest_names(model, preset_names(quantised=True))}"
        ) from None
    try:
        cached = try_to_load_from_cache(model, "config.json")
        if isinstance(cached, str):
            return Path(cached)
        _refuse_a_path(model)
        _require_hub()
        return Path(hf_hub_download(model, "config.json"))
    except MoelabError:
        raise
    except Exception as error:  # the hub's own errors, its transport's, and invalid ids: all mean "not at hand"
        raise UnknownModelError(
            f"{model!r} is no preset and no path here, and its config.json could not be fetched from Hugging Face "
            f"({type(error).__name__}: {_first_line(error)}). Expected an id that is there. "
            "Check the id and the network, or give the path of a config.json."
            f"{nearest_names(model, preset_names(quantised=True))}"
        ) from error
