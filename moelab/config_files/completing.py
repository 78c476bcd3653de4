"""The files that sglang ships, added to an exported tree: the variable that names the tree replaces sglang's own."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

from moelab import writing
from moelab.config_files.names import FileName, parse_file_name
from moelab.config_files.places import version_folders
from moelab.config_files.reach import tree_of
from moelab.config_files.rules import get_rules
from moelab.errors import ConfigFileError


@dataclass(frozen=True)
class Completed:
    """What was added to a tree. written: files; left_out: shipped files of layers that have files of their own in the tree."""

    written: tuple[Path, ...]
    left_out: tuple[Path, ...]


def complete(out: str | Path, shipped: str | Path, rules: str = "sglang") -> Completed:
    """Copy into `out` the config files of a loader's own tree, so that layers which were not tuned keep what they had.

    out: the folder that the loader's variable names, which has files already. shipped: a copy of the loader's package, or of
    its configs. What is found for a layer that has files of its own in `out` stays as it is: no shipped file of it is copied,
    GEMM2's and other Triton versions' neither. A copy that was cut short is taken up.
    Raises ConfigFileError where the loader needs no completing, or there is nothing to copy.
    """
    source, target = own_tree(shipped, rules), Path(out).resolve() / get_rules(rules).below
    files = {path.relative_to(source): name for path, name in _files(source)}
    if source == target:
        raise ConfigFileError(
            f"{source} is the tree itself. Expected a copy of sglang's. Name that one for --complete."
        )
    texts = {place: (source / place).read_text(encoding="utf-8") for place in files}
    own = {
        _layer(name)
        for path, name in _files(target)
        if path.read_text(encoding="utf-8") != texts.get(path.relative_to(target))
    }
    wanted = [place for place, name in files.items() if _layer(name) not in own]
    for place in wanted:
        writing.write(target / place, texts[place])
    return Completed(
        tuple(target / place for place in wanted), tuple(source / place for place in files if place not in wanted)
    )


def own_tree(shipped: str | Path, rules: str = "sglang") -> Path:
    """The folder of triton_X_Y_Z folders in a copy of a loader's package or configs. Raises what `complete` does."""
    loader = get_rules(rules)
    if loader.environment_adds or loader.package is None:
        why = loader.reasons["environment"]
        raise ConfigFileError(
            f"{loader.name}'s tree needs no completing: {why}. Expected sglang's rules, whose variable replaces its own tree. "
            "Run export without --complete."
        )
    source = tree_of(Path(shipped).resolve(), loader.name).root
    if not any(_files(source)):
        raise ConfigFileError(
            f"{source} holds no config file of {loader.name}'s to add. Expected a copy of its package, or of the folder "
            f"{loader.package_folder} in it: triton_X_Y_Z folders with files. Name that one."
        )
    return source


def _files(root: Path) -> Iterator[tuple[Path, FileName]]:
    """Every file in a version folder whose name a lookup could ask for."""
    for folder in version_folders(root):
        for path in sorted(folder.glob("E=*.json")):
            try:
                yield path, parse_file_name(path.name)
            except ConfigFileError:
                continue  # a name that no lookup asks for: the doctor's business


def _layer(name: FileName) -> FileName:
    """What GEMM1's and GEMM2's file of a layer share."""
    return replace(name, down=False)
