"""A doctor for trees of configs: what no lookup reaches, and what a lookup reaches but no kernel takes."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

from moelab import writing
from moelab.config_files.checks import check_content, shared_by
from moelab.config_files.content import read_config_file
from moelab.config_files.findings import Finding, Report, in_order
from moelab.config_files.names import FileName, parse_file_name
from moelab.config_files.places import VERSION_FOLDER
from moelab.config_files.reach import Tree, folder_findings, looks_like_a_name, tree_of, unreached, walk
from moelab.config_files.rules import RULES
from moelab.config_files.search import find, nearest_key
from moelab.errors import ConfigFileError, MoelabError
from moelab.reading import UnreadableError, read_json

LARGEST_SNIFFED = 1 << 20
"""Bytes up to which a .json file of another name is opened to see whether it holds configs; 18 of them take 4 KiB."""


def doctor(folder: str | Path, rules: str = "auto") -> Report:
    """Look at every config file below `folder` and report what no lookup reaches, or no kernel takes.

    rules: whose lookup: "moelab", "sglang", "vllm", or "auto", which tells from a copy of the loader's package or
    from the layout (triton_ folders here, below configs/, or files here). A file that is not reached is one
    error, and its content is not judged. `kernel=` files are judged by moelab's rules everywhere.
    Config files are those named E=..., and in the folder that is read every .json that holds configs.
    Raises ConfigFileError where there is no config file, or no telling which of several trees is read,
    UnknownNameError for unknown rules.
    """
    root = Path(folder)
    if not root.is_dir():
        raise ConfigFileError(f"There is no folder {root}. Expected one that holds config files. Name one.")
    root = root.resolve()
    tree = tree_of(root, rules)
    unread: list[OSError] = []
    files = tuple(_config_files(root, tree, unread.append))
    if not files and not unread:
        raise ConfigFileError(
            f"There is no config file below {root}. Expected files named E=<n>,N=<n>,device_name=<device>.json. Name the "
            "folder that holds them."
        )
    findings = [finding for finding in folder_findings(tree) if finding.path.is_relative_to(root)]
    findings += [_unreadable(error) for error in unread]
    for path in files:
        findings += _examine(path, tree)
    return Report(root, tree.rules.name, tree.root, files, in_order(findings))


def _unreadable(error: OSError) -> Finding:
    reason = f"it cannot be read: {error.strerror}, so nobody knows which configs it holds"
    return Finding(Path(error.filename), "error", "unreadable", reason, "Check its permissions.")


def _config_files(root: Path, tree: Tree, tell: Callable[[OSError], object]) -> Iterator[Path]:
    """tell: of what cannot be read."""
    for place, _, files in walk(root, tell):
        inside = place.is_relative_to(tree.root)
        writing.settle(place)
        for file in files:
            if any(mark in file for mark in tree.rules.other_names):
                continue
            if looks_like_a_name(file) or (inside and _holds_configs(place / file, tell)):
                yield place / file


def _holds_configs(path: Path, tell: Callable[[OSError], object]) -> bool:
    """Whether a .json file of another name maps batch sizes to configs."""
    if path.suffix.lower() != ".json" or path.name.startswith("N="):  # N=..,K=..: the peers' block-scaled GEMM
        return False
    try:
        content = read_json(path, LARGEST_SNIFFED)
    except UnreadableError:
        return False
    except OSError as error:
        tell(error)
        return False
    return isinstance(content, dict) and any(
        key.isdigit() and isinstance(entry, dict) and "BLOCK_SIZE_M" in entry for key, entry in content.items()
    )


def _examine(path: Path, tree: Tree) -> list[Finding]:
    problem = unreached(path, tree)
    if problem:
        return [problem]
    name = parse_file_name(path.name, tree.rules)
    found = check_content(path, name, tree.rules)
    shared = shared_by(path, name)
    found += [shared] if shared else []
    if name.down and not any(finding.severity == "error" for finding in found):
        mismatch = _block_m_mismatch(path, name, tree)
        found += [mismatch] if mismatch else []
    return found


def _block_m_mismatch(path: Path, name: FileName, tree: Tree) -> Finding | None:
    """Where the _down file's BLOCK_SIZE_M is not the up config's for the same batch."""
    match = VERSION_FOLDER.fullmatch(path.parent.name)
    version = match[1].replace("_", ".") if match else ""
    rules = RULES["moelab"] if name.kernel else tree.rules
    config_dir = tree.root if name.kernel else tree.config_dir
    up_name = replace(name, down=False)
    try:
        down = read_config_file(path, rules)
        ups = {key: find(up_name, rules, key, version, config_dir) for key in down}
        used = {up.path for up in ups.values() if up.path}
        keys = {*down, *(key for file in used for key in read_config_file(file, rules))}
        ups |= {key: find(up_name, rules, key, version, config_dir) for key in keys - {*ups}}
    except MoelabError:
        return None  # the up file is broken, which is its own finding
    differ = []
    for key in sorted(keys):
        up, rows = ups[key].config, down[nearest_key(down, key)].BLOCK_SIZE_M
        if up is not None and rows != up.BLOCK_SIZE_M:
            differ.append(f"batch {key}: {rows}, up {up.BLOCK_SIZE_M}")
    if not differ:
        return None
    more = f" and {len(differ) - 4} more" if len(differ) > 4 else ""
    against = "the up file" if any(up.path for up in ups.values()) else "the default, for there is no up file"
    what = f"BLOCK_SIZE_M differs from {against} ({'; '.join(differ[:4])}{more})"
    if rules.down_takes_up_block_m:
        reason = f"{what}: {rules.name} runs GEMM2 under the up config's, which is not what was tuned"
        return Finding(path, "warning", "block_m_mismatch", reason, _TOGETHER)
    return Finding(path, "error", "block_m_mismatch", f"{what}: one sort by expert serves both GEMMs", _TOGETHER)


_TOGETHER = "Tune up and down under one BLOCK_SIZE_M."
