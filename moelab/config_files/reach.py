"""Which folder of a tree a loader reads, and why it does not reach a file."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from moelab.config_files.findings import Finding
from moelab.config_files.names import FileName, parse_file_name
from moelab.config_files.places import VERSION_FOLDER, stopping_folders, version_folders
from moelab.config_files.quantised_names import meant_selector, never_asked
from moelab.config_files.rules import RULES, Rules, get_rules
from moelab.errors import ConfigFileError, nearest_names

_LIKE_A_NAME = re.compile(r"e=.*\bn=|e=.*device_name", re.IGNORECASE)
_SIXTEEN_BIT = ("bfloat16", "float16", "bf16", "fp16")


@dataclass(frozen=True)
class Tree:
    """A loader and the folder that it reads: it holds the triton_X_Y_Z folders, or (vLLM) the files themselves."""

    rules: Rules
    root: Path

    @property
    def config_dir(self) -> Path:
        """What the rules' environment variable would name."""
        return self.root.parent if self.rules.below else self.root

    def places(self) -> str:
        """Where this loader reads, in words."""
        return f"{self.root}/triton_X_Y_Z" if self.rules.version_folders else f"{self.root} itself"


def tree_of(folder: Path, rules: str) -> Tree:
    """The tree that a loader reads below `folder`. rules: a loader's name, or "auto".

    A copy of a loader's package is known by the loader's own module, or by the folder where its package keeps
    configs. Otherwise the layout decides: triton_ folders here (moelab), below configs/ (sglang), files here
    (vLLM), one such folder further down. Raises ConfigFileError where more than one could be meant.
    """
    if rules != "auto":
        loader = get_rules(rules, also=("auto",))
        return _package_tree(folder, loader) or Tree(loader, _root_by_layout(folder, loader))
    for loader in RULES.values():
        if found := _package_tree(folder, loader):
            return found
    if VERSION_FOLDER.fullmatch(folder.name):
        return Tree(RULES["moelab"], folder.parent)
    if _has_versions(folder):
        return Tree(RULES["moelab"], folder)
    if _has_versions(folder / "configs"):
        return Tree(RULES["sglang"], folder / "configs")
    if any(looks_like_a_name(path.name) for path in folder.iterdir() if path.is_file()):
        return Tree(RULES["vllm"], folder)
    return _only_tree(folder)


def _package_tree(folder: Path, rules: Rules) -> Tree | None:
    """The tree of a copy of the loader's package below `folder`, if there is one."""
    if rules.package is None:
        return None
    module = Path(rules.loader_module).parts
    own = Path(rules.package_folder).parts[-4:]
    places = [(place, files) for place, _, files in walk(folder)]
    found = {p / "configs" for p, files in places for file in files if (*p.parts, file)[-len(module) :] == module}
    found = found or {place for place, _ in places if place.parts[-4:] == own}
    if len(found) > 1:
        raise _ambiguous(folder, sorted(found))
    return Tree(rules, found.pop()) if found else None


def _root_by_layout(folder: Path, rules: Rules) -> Path:
    if VERSION_FOLDER.fullmatch(folder.name) and rules.version_folders:
        return folder.parent
    if not rules.version_folders or (_has_versions(folder) and (not rules.below or folder.name == rules.below)):
        return folder
    return folder / "configs" if rules.below or _has_versions(folder / "configs") else folder


def _only_tree(folder: Path) -> Tree:
    found = sorted(place for place, _, _ in walk(folder) if version_folders(place))
    if len(found) > 1:
        raise _ambiguous(folder, found)
    if not found:
        return Tree(RULES["moelab"], folder)
    return Tree(RULES["sglang" if found[0].name == "configs" else "moelab"], found[0])


def _ambiguous(folder: Path, found: list[Path]) -> ConfigFileError:
    listed = ", ".join(map(str, found[:4]))
    return ConfigFileError(
        f"Below {folder} lie {len(found)} trees of configs ({listed}), and nothing says which of them a loader reads. "
        "Expected one. Name the folder that is read, or one that holds the loader's package."
    )


def _has_versions(folder: Path) -> bool:
    return folder.is_dir() and any(path.is_dir() and path.name.startswith("triton_") for path in folder.iterdir())


def walk(
    folder: Path, onerror: Callable[[OSError], object] | None = None
) -> Iterator[tuple[Path, list[str], list[str]]]:
    """os.walk in order, without hidden folders and caches: (folder, its folders, its files). onerror: told of each folder that
    cannot be listed."""
    for place, below, files in os.walk(folder, onerror=onerror):
        below[:] = sorted(name for name in below if not name.startswith(".") and name != "__pycache__")
        yield Path(place), below, sorted(name for name in files if not name.startswith("."))


def looks_like_a_name(name: str) -> bool:
    """Whether a file was meant to be a config file, by its name: right, or nearly so."""
    return bool(_LIKE_A_NAME.match(name))


def unreached(path: Path, tree: Tree) -> Finding | None:
    """Why no lookup of the tree's loader reaches the file, or None if one does."""
    return _wrong_place(path, tree) or wrong_name(path, tree.rules)


def folder_findings(tree: Tree) -> list[Finding]:
    """What is wrong with the tree's folders themselves."""
    found = []
    if tree.rules.version_folders and tree.rules.odd_folder_stops:
        for odd in stopping_folders(tree.root):
            reason = (
                f"{tree.rules.name} sorts every triton_ name as numbers; this one ends each lookup that does not find its "
                "file at once with a ValueError"
            )
            found.append(
                Finding(odd, "error", "stopping_folder", reason, "Rename it to begin otherwise, or move it out.")
            )
    for place in version_folders(tree.root) if tree.rules.version_folders else []:
        if place.name.count("_") != 3:
            reason = "Triton's versions have three numbers, so this is never the version in use, only a fallback"
            found.append(Finding(place, "warning", "version_folder", reason, "Rename it, as in triton_3_6_0."))
    return found


def _wrong_place(path: Path, tree: Tree) -> Finding | None:
    rules, parent = tree.rules, path.parent
    if not rules.version_folders:
        if parent == tree.root:
            return None
        return _error(
            path, "wrong_folder", f"{rules.name} reads {tree.places()} and no other folder", _move(path, tree)
        )
    if parent.parent == tree.root:
        if VERSION_FOLDER.fullmatch(parent.name):
            return None
        numbers = "_".join(re.findall(r"\d+", parent.name))
        reason = f"the folder {parent.name} is not named as a Triton version, so {rules.name} never looks into it"
        rename = f"Rename the folder to triton_{numbers}." if numbers else "Move the file to triton_X_Y_Z."
        return _error(path, "version_folder", reason, rename)
    return _error(path, "wrong_folder", f"{rules.name} reads {tree.places()} and no other folder", _move(path, tree))


def _move(path: Path, tree: Tree) -> str:
    if not tree.rules.version_folders:
        return f"Move it to {tree.root}."
    version = path.parent.name if VERSION_FOLDER.fullmatch(path.parent.name) else "triton_X_Y_Z"
    known = "" if version != "triton_X_Y_Z" else ", of the Triton version it was tuned under"
    return f"Move it to {tree.root / version}{known}."


def wrong_name(path: Path, rules: Rules) -> Finding | None:
    """Why the loader asks for no file of this name, wherever it lies; None if it may."""
    try:
        name = parse_file_name(path.name, rules)
    except ConfigFileError as error:
        return _misspelt(path, error)
    if name.kernel:  # moelab's own files beside the compatible kernel's, whoever reads the rest of the folder
        rules = RULES["moelab"]
    if name.dtype_selector is not None and name.dtype_selector not in rules.dtype_selectors:
        return _unknown_selector(path, name, rules)
    if unsaid := name.unsaid(rules):
        why = rules.reasons.get(f"names_{unsaid[0]}", "its names have no place for it")
        reason = f"{rules.name} asks for no file with {unsaid[0]} in its name: {why}"
        return _error(
            path, "never_asked_for", reason, f"Move it to a tree of sglang's, or remove it from {rules.name}'s."
        )
    wanted = name.text(rules)
    if wanted == path.name:
        together = never_asked(name, rules)
        return _error(path, "no_layer_asks", *together) if together else None
    problem, reason = _difference(path.name, name, rules)
    return _error(path, problem, f"{reason}, so {rules.name} asks for {wanted}", f"Rename it to {wanted}.")


def _difference(text: str, name: FileName, rules: Rules) -> tuple[str, str]:
    if rules.device(name.device_name) != name.device_name:
        return "device_name", f"the device {name.device_name} goes by the name {rules.device(name.device_name)}"
    if name.block_shape and not all(name.block_shape):
        return "block_shape", "a block_shape with a 0 stands in no name"
    if name.block_shape and rules.block_shape.format(*name.block_shape) not in text:
        return "block_shape", f"block_shape is spelled {rules.block_shape.format(*name.block_shape)}"
    return "misspelt_name", "numbers are written without leading zeros"


def _unknown_selector(path: Path, name: FileName, rules: Rules) -> Finding:
    selector = str(name.dtype_selector)
    reason = f"{rules.name} asks for no dtype={selector}"
    if selector in _SIXTEEN_BIT:
        return _error(path, "dtype_selector", reason, "Rename it without dtype=: 16-bit weights have no selector.")
    if meant := meant_selector(selector, rules):
        return _error(path, "dtype_selector", f"{reason}: {meant[0]}", meant[1])
    hint = nearest_names(selector, rules.dtype_selectors)
    reason = f"{reason}, but for one of {', '.join(rules.dtype_selectors)}{'.' + hint if hint else ''}"
    return _error(path, "dtype_selector", reason, "Rename it with one of those, or without dtype= for 16-bit weights.")


def _misspelt(path: Path, error: ConfigFileError) -> Finding:
    if re.search(r"device_name=(?=[,.]|_down|$)", path.name):
        reason = "the device name is empty: the tuner ran where it could not ask the GPU for its name"
        return _error(path, "empty_device_name", reason, "Rename it with the device, as in device_name=NVIDIA_H200.")
    if "per_channel_quant=" in path.name and "per_channel_quant=True" not in path.name:
        reason = "per_channel_quant stands in a name as =True, or not at all"
        return _error(path, "misspelt_name", reason, "Rename it without per_channel_quant=.")
    if "odd N" in str(error):
        return _error(
            path, "misspelt_name", "N is odd, though two int4 values share a byte", "Rename it with the right N."
        )
    pattern = "E=<n>,N=<n>,device_name=<device>[,dtype=..][,block_shape=[n, k]][,per_channel_quant=True][_down].json"
    return _error(path, "misspelt_name", f"the name is not of the form {pattern}", "Rename it; file_name() builds one.")


def _error(path: Path, problem: str, reason: str, remedy: str) -> Finding:
    return Finding(path, "error", problem, reason, remedy)
