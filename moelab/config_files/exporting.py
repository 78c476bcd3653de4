"""Hand configs to a loader: written in its naming and format, and read back through its rules."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from moelab.config import KernelConfig
from moelab.config_files.content import parse, read_with_rest, write_config_file
from moelab.config_files.defaults import device_target
from moelab.config_files.names import FileName, checked_name, parse_file_name
from moelab.config_files.places import VERSION_FOLDER, version_folders
from moelab.config_files.rules import Rules, get_rules
from moelab.config_files.running import run_violations
from moelab.config_files.search import Lookup, find
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
    """Write configs under `out` as the loader `rules` names and formats them, then find each through its lookup.

    out: what the rules' environment variable would name. The file lies in out/triton_X_Y_Z (moelab),
    out/configs/triton_X_Y_Z (sglang) or out itself (vLLM, with a top-level triton_version). Batch sizes are
    written ascending. A file that is found as something else is taken back.
    Raises ConfigFileError for a version that is not three numbers, where the file exists and overwrite is not set,
    where the loader's names cannot say what `name` says, where a down config's BLOCK_SIZE_M is not its up
    config's, or where the lookup does not find the file; ConfigError for a config that the loader's kernel, or
    the device (if data/devices knows it), cannot run.
    """
    loader = get_rules(rules)
    name = checked_name(**vars(name), rules=loader)
    if not re.match(r"\d+\.\d+\.\d+", triton_version):
        raise ConfigFileError(
            f"{triton_version!r} is not a whole Triton version. Expected three numbers, such as 3.6.0, for they name the "
            "folder. Pass the one that the configs were tuned under (--triton-version)."
        )
    _refuse_what_cannot_be_said(name, loader)
    _refuse_what_cannot_run(configs, name, loader)
    path = export_path(name, rules=rules, out=out, triton_version=triton_version)
    if path.exists() and not overwrite:
        raise ConfigFileError(
            f"{path} exists already. Expected a new file. Name another folder, or pass overwrite=True (--overwrite)."
        )
    if name.down:
        _refuse_two_block_m(configs, name, loader, out, triton_version)
    with _taken_back_on_failure(path):
        version = triton_version if loader.writes_triton_version else None
        write_config_file(path, configs, triton_version=version)
        return Exported(path, rules, _read_back(configs, name, path, loader, out, triton_version))


def export_path(name: FileName, *, rules: str, out: str | Path, triton_version: str) -> Path:
    """Where `export` writes: the folder of this Triton version, or the flat folder, under `out`."""
    from moelab import runtime

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
    if path.is_file():
        return (_source(path),)
    found = [file for folder in (path, path / "configs") for file in _config_files_in(folder)]
    if not found:
        raise ConfigFileError(
            f"There is no config file in {path}. Expected one, or a folder of them or of triton_X_Y_Z folders. Name one."
        )
    return tuple(_source(file) for file in found)


def _config_files_in(folder: Path) -> list[Path]:
    return sorted(file for place in (folder, *version_folders(folder)) for file in place.glob("E=*.json"))


def _source(path: Path) -> Source:
    match = VERSION_FOLDER.fullmatch(path.resolve().parent.name)
    inside = parse(path).get("triton_version")
    version = match[1].replace("_", ".") if match else inside if isinstance(inside, str) else None
    name = parse_file_name(path.name, "moelab" if match else "vllm")
    configs, rest = read_with_rest(path, "moelab")
    lost = {key: {k: v for k, v in left.items() if v} for key, left in rest.items()}
    return Source(configs, name, version, path, {key: left for key, left in lost.items() if left})


def left_out(name: FileName, rules: str) -> str | None:
    """Why this loader could not ask for such a file, so that `export` refuses it; None if it could."""
    loader = get_rules(rules)
    unsaid = name.unsaid(loader)
    if not unsaid:
        return None
    why = loader.reasons.get(f"names_{unsaid[0]}", "its names have no place for it")
    return f"{loader.name} has no file of its own for {', '.join(unsaid)}: {why}"


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
    configs: Mapping[int, KernelConfig], name: FileName, rules: Rules, out: str | Path, triton_version: str
) -> None:
    """A _down config is sorted for by the up config: raise where they differ in BLOCK_SIZE_M."""
    for num_tokens, config in sorted(configs.items()):
        up = find(replace(name, down=False), rules, num_tokens, triton_version, out)
        if up.config is not None and up.config.BLOCK_SIZE_M != config.BLOCK_SIZE_M:
            source = up.path or f"the default, for there is no up file in {out}"
            raise ConfigFileError(
                f"The down config for batch size {num_tokens} has BLOCK_SIZE_M = {config.BLOCK_SIZE_M}, and {source} has "
                f"{up.config.BLOCK_SIZE_M}. Expected the same: one sort by expert serves both GEMMs. Tune the two under one "
                "BLOCK_SIZE_M, and write the up file first."
            )


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


@contextlib.contextmanager
def _taken_back_on_failure(path: Path) -> Iterator[None]:
    """If the block fails, put back what lay at path before: its old bytes, or nothing."""
    before = path.read_bytes() if path.exists() else None
    try:
        yield
    except BaseException:
        if before is None:
            path.unlink(missing_ok=True)
        else:
            path.write_bytes(before)
        raise
