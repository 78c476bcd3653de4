"""The folders that each loader searches."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
from pathlib import Path

from moelab.config_files.names import parse_file_name
from moelab.config_files.rules import Rules, get_rules
from moelab.errors import ConfigFileError

VERSION_FOLDER = re.compile(r"triton_(\d+(?:_\d+)*)")
"""The name of a folder of configs for one Triton version."""


def folders(rules: Rules, config_dir: str | Path | None = None) -> list[tuple[Path, str]]:
    """The folders that hold version folders, or the files themselves, in the order of search: (folder, whose).

    config_dir: what the environment variable would name; None: what it does name, and without it the loader's
    own folder. For sglang that is the folder above configs/. Raises ConfigFileError where there is none, FolderError
    where moelab's variable names no folder; a peer's is taken as the peer takes it.
    """
    if config_dir is None and rules.package is None:
        return _own_folder(rules)
    given = config_dir if config_dir is not None else os.environ.get(rules.environment)
    found = [] if given is None else [(Path(given) / rules.below, rules.environment)]
    if not found or rules.environment_adds:
        found += _own_folder(rules)
    if not found:
        raise ConfigFileError(
            f"There is no folder of {rules.name}'s to search: {rules.environment} is not set and {rules.package} is not "
            f"installed. Expected one of them. Pass config_dir (--config-dir), as {rules.environment} would name it."
        )
    return found


def kernels_with_files(config_dir: str | Path | None = None) -> list[str]:
    """The kernels beside the compatible kernel that have files where moelab's lookup searches, for whatever shape, device and
    Triton version; sorted. config_dir: as in `folders`."""
    found = set()
    for folder, _ in folders(get_rules("moelab"), config_dir):
        for path in (path for version in version_folders(folder) for path in version.glob("*,kernel=*.json")):
            with contextlib.suppress(ConfigFileError):  # a name that no lookup asks for: the doctor's business
                found.add(str(parse_file_name(path.name, "moelab").kernel))
    return sorted(found)


def _own_folder(rules: Rules) -> list[tuple[Path, str]]:
    if rules.package is None:
        from moelab import runtime

        return [(runtime.config_dir(), "moelab's own")]
    try:
        spec = importlib.util.find_spec(rules.package)  # finds a top-level package without importing it
    except ValueError:
        spec = None
    places = list(spec.submodule_search_locations or []) if spec else []
    return [(Path(place) / rules.package_folder, f"{rules.name}'s own") for place in places[:1]]


def version_folders(config_dir: Path) -> list[Path]:
    """The triton_X_Y_Z folders below config_dir, newest version first; other names are left out."""
    if not config_dir.is_dir():
        return []
    found = [
        (tuple(map(int, match[1].split("_"))), path)
        for path in config_dir.iterdir()
        if path.is_dir() and (match := VERSION_FOLDER.fullmatch(path.name))
    ]
    return [path for _, path in sorted(found, key=lambda pair: pair[0], reverse=True)]


def stopping_folders(config_dir: Path) -> list[Path]:
    """What lies in config_dir as triton_<not numbers>: sglang's search, once the first look failed, ends there."""
    if not config_dir.is_dir():
        return []
    names = {
        path: path.name.removeprefix("triton_") for path in config_dir.iterdir() if path.name.startswith("triton_")
    }
    return sorted(path for path, rest in names.items() if not re.fullmatch(r"\d+([._]\d+)*", rest))
