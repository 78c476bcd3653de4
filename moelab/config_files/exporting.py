"""Hand configs to a loader: written in its naming and format, and read back through its rules."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moelab import runtime, writing
from moelab.config import KernelConfig
from moelab.config_files import form_entries
from moelab.config_files.content import file_text, parse, read_config_file, read_with_rest
from moelab.config_files.defaults import device_target
from moelab.config_files.names import FileName, checked_name, parse_file_name
from moelab.config_files.places import VERSION_FOLDER, version_folders
from moelab.config_files.rules import Rules, get_rules
from moelab.config_files.running import run_violations
from moelab.config_files.search import Lookup, find, nearest_key
from moelab.errors import ConfigError, ConfigFileError


@dataclass(frozen=True)
class Exported:
    """A file that was written and found again. lookups: batch size -> what its lookup found."""

    path: Path
    rules: str
    lookups: Mapping[int, Lookup]


@dataclass(frozen=True)
class Source:
    """Configs to export: batch size -> config, whose they are, and the Triton version they were tuned under. lost: batch
    size -> keys that sglang's kernel would have heeded and that are not written again, such as a true USE_TMA."""

    configs: Mapping[int, KernelConfig]
    name: FileName
    triton_version: str | None
    origin: Path
    lost: Mapping[int, Mapping[str, Any]] = field(default_factory=dict)


def export(
    configs: Mapping[int, KernelConfig],
    name: FileName,
    *,
    rules: str,
    out: str | Path,
    triton_version: str,
    overwrite: bool = False,
) -> Exported:
    """Write one file: `export_together` of it alone."""
    items = [(name, configs)]
    return export_together(items, rules=rules, out=out, triton_version=triton_version, overwrite=overwrite)[0]


def export_together(
    items: Sequence[tuple[FileName, Mapping[int, KernelConfig]]],
    *,
    rules: str,
    out: str | Path,
    triton_version: str,
    overwrite: bool = False,
) -> tuple[Exported, ...]:
    """Write a file, or the up and the down file of a pair, under `out` as the loader `rules` names and formats them, then find
    each config through its lookup. Both are there in the end, or what was there before.

    out: what the rules' environment variable would name. The files lie in out/triton_X_Y_Z (moelab),
    out/configs/triton_X_Y_Z (sglang) or out itself (vLLM, with a top-level triton_version). Batch sizes are
    written ascending.
    Raises ConfigFileError for a version that is not three numbers, where a file exists and overwrite is not set,
    where the loader's names cannot say what a name says, where a down config's BLOCK_SIZE_M is not its up
    config's, or where the lookup does not find a file; ConfigError for a config that the loader's kernel, or
    the device (if data/devices knows it), cannot run; WriteError where another process does not leave the folder.
    """
    loader = get_rules(rules)
    if not runtime.is_version(triton_version):
        raise ConfigFileError(
            f"{triton_version!r} is not a whole Triton version. Expected three numbers, such as 3.6.0, for they name the "
            "folder. Pass the one that the configs were tuned under (--triton-version)."
        )
    files, texts = dict[FileName, Mapping[int, KernelConfig]](), dict[Path, str]()
    for given, configs in sorted(items, key=lambda item: item[0].down):
        name = checked_name(**vars(given), rules=loader)
        _refuse_what_cannot_be_said(name, loader)
        _refuse_what_cannot_run(configs, name, loader)
        path = export_path(name, rules=rules, out=out, triton_version=triton_version)
        files[name] = configs
        texts[path] = file_text(path, configs, triton_version=triton_version if loader.writes_triton_version else None)
    with writing.locked(next(iter(texts)).parent):
        there = [path for path in texts if os.path.lexists(path)]
        if there and not overwrite:
            raise ConfigFileError(
                f"{there[0]} exists already. Expected a new file. Name another folder, or pass overwrite=True (--overwrite)."
            )
        _refuse_two_block_m(files, loader, out, triton_version)
        with writing.together(texts):
            return tuple(
                Exported(path, rules, _read_back(configs, name, path, loader, out, triton_version))
                for path, (name, configs) in zip(texts, files.items(), strict=True)
            )


def export_path(name: FileName, *, rules: str, out: str | Path, triton_version: str) -> Path:
    """Where `export` writes: the folder of this Triton version, or the flat folder, under `out`."""
    loader = get_rules(rules)
    folder = Path(out) / loader.below
    if loader.version_folders:
        folder /= runtime.triton_key(triton_version)
    return folder / name.text(loader)


def sources(path: str | Path) -> tuple[Source, ...]:
    """What can be exported from `path`: one config file, or every one in a folder and its version folders.

    The one place that knows what `moelab export` takes; a tuner's run, which holds configs and their name, joins
    here. Raises ConfigFileError where there is nothing to export, or a file that cannot be read.
    """
    path = Path(path)
    writing.settle(path.parent)
    if path.is_file():
        return (_source(path),)
    found = [file for folder in (path, path / "configs") for file in _config_files_in(folder)]  # a pair stands up, down
    if not found:
        raise ConfigFileError(
            f"There is no config file in {path}. Expected one, or a folder of them or of triton_X_Y_Z folders. Name one."
        )
    return tuple(_source(file) for file in found)


def _config_files_in(folder: Path) -> list[Path]:
    places = (folder, *version_folders(folder))
    for place in places:
        writing.settle(place)
    return sorted(file for place in places for file in place.glob("E=*.json"))


def _source(path: Path) -> Source:
    match = VERSION_FOLDER.fullmatch(path.resolve().parent.name)
    inside = parse(path).get("triton_version")
    version = match[1].replace("_", ".") if match else inside if isinstance(inside, str) else None
    name = parse_file_name(path.name, "moelab" if match else "vllm")
    if name.kernel == form_entries.KERNEL:
        return Source({}, name, version, path, {})
    configs, rest = read_with_rest(path, "moelab")
    lost = {key: {k: v for k, v in left.items() if v} for key, left in rest.items()}
    return Source(configs, name, version, path, {key: left for key, left in lost.items() if left})


def left_out(name: FileName, rules: str) -> str | None:
    """Why this loader could not ask for such a file, so that `export` refuses it; None if it could."""
    loader = get_rules(rules)
    if name.kernel == form_entries.KERNEL:
        return "a file of forms holds no configs: only moelab's 'fast' reads it, as it is"
    unsaid = tuple(part for part in name.unsaid(loader) if part != "per_channel_quant")  # `shared_name` tells of that
    if not unsaid:
        return None
    why = loader.reasons.get(f"names_{unsaid[0]}", "its names have no place for it")
    return f"{loader.name} has no file of its own for {', '.join(unsaid)}: {why}"


def shared_name(name: FileName, rules: str) -> str | None:
    """That this loader's name for such a file is also another layer's; None if it is not."""
    loader = get_rules(rules)
    if "per_channel_quant" not in name.unsaid(loader):
        return None
    return (
        f"{loader.name}'s names do not say per channel: as {name.text(loader)} it also serves experts of these sizes with a "
        "scale a matrix, which it was not tuned for"
    )


def _refuse_what_cannot_be_said(name: FileName, rules: Rules) -> None:
    reason = left_out(name, rules.name)
    if reason:
        raise ConfigFileError(
            f"{reason}, so none of its lookups would find {name.text()}. Expected a file that {rules.name} can ask for. Skip "
            "this one, or export it under other rules."
        )


def _refuse_what_cannot_run(configs: Mapping[int, KernelConfig], name: FileName, rules: Rules) -> None:
    target = device_target(name.device_name)
    for num_tokens, config in configs.items():
        broken = run_violations(config, name, rules, target)
        if broken:
            raise ConfigError(
                f"The config {config.short()} for batch size {num_tokens} cannot run on {name.device_name} under {rules.name}: "
                f"{'; '.join(broken)}. Expected a config without that. Tune the shape again, or correct the entry."
            )


def _refuse_two_block_m(
    files: Mapping[FileName, Mapping[int, KernelConfig]], rules: Rules, out: str | Path, triton_version: str
) -> None:
    """A _down config is sorted for by the up config: raise where they would differ in BLOCK_SIZE_M once `files` are written
    among those that are there."""
    up_name = replace(next(iter(files)), down=False)
    down_name = replace(up_name, down=True)
    if down_name.unsaid(rules):
        return
    there = export_path(down_name, rules=rules.name, out=out, triton_version=triton_version)
    down = files.get(down_name) or (read_config_file(there, rules) if there.exists() else {})
    for num_tokens, config in sorted(down.items()):
        up, source = _up_for(num_tokens, files.get(up_name), up_name, rules, out, triton_version)
        if up is not None and up.BLOCK_SIZE_M != config.BLOCK_SIZE_M:
            whose = "" if down_name in files else f" of {there}, which stays,"
            raise ConfigFileError(
                f"The down config{whose} for batch size {num_tokens} has BLOCK_SIZE_M = {config.BLOCK_SIZE_M}, and {source} has "
                f"{up.BLOCK_SIZE_M}. Expected the same: one sort by expert serves both GEMMs. Tune the two under one "
                "BLOCK_SIZE_M, and write both at once: name the folder that holds them."
            )


def _up_for(
    num_tokens: int,
    written: Mapping[int, KernelConfig] | None,
    name: FileName,
    rules: Rules,
    out: str | Path,
    version: str,
) -> tuple[KernelConfig | None, object]:
    """The up config for a batch size, and whence: of the file that is about to be written, or else by lookup."""
    if written:
        return written[nearest_key(sorted(written), num_tokens)], "the up file"
    up = find(name, rules, num_tokens, version, out)
    return up.config, up.path or f"the default, for there is no up file in {out}"


def _read_back(
    configs: Mapping[int, KernelConfig], name: FileName, path: Path, rules: Rules, out: str | Path, triton_version: str
) -> dict[int, Lookup]:
    """Each batch size through the loader's rules. Raises ConfigFileError where it finds anything but what was written."""
    found = {}
    for num_tokens, config in sorted(configs.items()):
        answer = find(name, rules, num_tokens, triton_version, out)
        if answer.path != path or answer.key != num_tokens or answer.config != config:
            got = answer.config.short() if answer.config else "no config"
            raise ConfigFileError(
                f"{rules.name}'s lookup for batch size {num_tokens} does not find what was written to {path}: it finds {got} "
                f"in {answer.path} ({answer.steps[-1].reason}). Expected {config.short()}. Nothing was kept. Look at the other "
                "files of that folder with `moelab doctor`."
            )
        found[num_tokens] = answer
    return found
