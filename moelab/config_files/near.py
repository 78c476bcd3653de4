"""What a lookup just missed, and what to do where it found no file for the layer, or one of another Triton version."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shlex
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moelab.config_files.names import FileName, parse_file_name
from moelab.config_files.places import folders, version_folders
from moelab.config_files.questions import Question
from moelab.config_files.rules import RULES, get_rules
from moelab.config_files.search import Lookup
from moelab.errors import ConfigFileError, RecordingError


@dataclass(frozen=True)
class Near:
    """Sentences for who got no file of the own. misses: files that are nearly the one asked for, and whose they are; todo: what
    to do, the easiest first. Both are empty where the lookup found the file of the Triton version in use."""

    misses: tuple[str, ...] = ()
    todo: tuple[str, ...] = ()


@dataclass(frozen=True)
class _File:
    """A file, and how to name it."""

    name: FileName
    shown: str
    folder: str


def near(
    asked: Question,
    answer: Lookup,
    device: str,
    *,
    triton_version: str,
    options: str = "--model MODEL",
    down: bool = False,
    config_dir: str | Path | None = None,
) -> Near:
    """What `answer`, a lookup of `asked`, just missed: in the folders that it searched, and among what sglang ships.

    device: as the driver gives it. options: of the command that tunes the layer. Raises what `folders` does.
    """
    name, loader = asked.name(device, down=down), get_rules(asked.rules)
    fallback = answer.path is not None and loader.version_folders and not _same(answer.path.parent.name, triton_version)
    if answer.path is not None and not fallback:
        return Near()
    theirs = [file for file in shipped_names() if file.name.down == down and loader.name != "vllm"]
    own = [file for file in theirs if file.name == name]
    if fallback:  # a file of the layer's own serves, and only one of the version in use would be better
        exact = [file for file in own if _same(file.folder, triton_version)]
        return Near(tuple(_shipped(exact, triton_version)), (_tune(asked, options, f" and Triton {triton_version}"),))
    here = [file for folder, _ in folders(loader, config_dir) for file in _files(folder, loader.name)]
    ours = [file for file in here if file.name.down == down]
    misses = [
        *_shipped(own, triton_version), *_unfused(asked, name, ours, theirs), *_spelled(name, [*ours, *theirs]),
        *_other_devices(name, [*ours, *theirs]), *_other_weights(asked, name, ours), *_other_shards(name, ours),
    ]  # fmt: skip
    return Near(tuple(misses), tuple(_todo(asked, options, bool(own), name, ours)))


def ships(asked: Question, device: str, *, triton_version: str, down: bool = False) -> str:
    """Which file sglang ships for a layer, as the end of an error; empty if it ships none."""
    own = [file for file in shipped_names() if file.name == asked.name(device, down=down)]
    return "".join(f" {sentence}." for sentence in _shipped(own, triton_version))


@functools.cache
def shipped_names() -> tuple[_File, ...]:
    """Every config file that sglang ships, by name, as data/upstream/sglang_shipped_names.json holds them.

    Raises RecordingError where the file cannot be read.
    """
    from moelab import runtime

    path = runtime.data_dir() / "upstream" / "sglang_shipped_names.json"
    try:
        folders = json.loads(path.read_text(encoding="utf-8"))["files"]
        return tuple(
            file for folder, names in folders.items() for text in names for file in _file(text, folder, "sglang")
        )
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RecordingError(
            f"Cannot read {path}: {error}. Expected the names of sglang's config files. Restore the file from git."
        ) from error


def _files(folder: Path, rules: str) -> list[_File]:
    """The files that a loader can find in one folder, or in its version folders."""
    places = version_folders(folder) if get_rules(rules).version_folders else [folder]
    return [
        file
        for place in places
        for path in sorted(place.glob("E=*.json"))
        for file in _file(path.name, place.name if place != folder else "", rules)
    ]


def _file(text: str, folder: str, rules: str) -> Iterator[_File]:
    with contextlib.suppress(ConfigFileError):  # a name that no lookup asks for: the doctor's business
        yield _File(parse_file_name(text, rules), f"{folder}/{text}" if folder else text, folder)


def _same(folder: str, triton_version: str) -> bool:
    """Whether a folder is the one of this Triton version."""
    from moelab import runtime

    return folder in (runtime.triton_key(triton_version), "triton_" + triton_version.replace(".", "_"))


# --- near misses ----------------------------------------------------------------------------------------------------


def _shipped(own: Sequence[_File], triton_version: str) -> Iterator[str]:
    if not own:
        return
    exact = [file for file in own if _same(file.folder, triton_version)]
    newest = max(own, key=lambda file: [int(number) for number in file.folder.split("_")[1:]])
    count = f", the newest of {len(own)}" if len(own) > 1 else ""
    other = "" if exact else f"{count}, for another Triton version than {triton_version}"
    yield f"{RULES['sglang'].version} ships this file: {[*exact, newest][0].shown}{other}"


def _unfused(asked: Question, name: FileName, ours: Sequence[_File], theirs: Sequence[_File]) -> Iterator[str]:
    count = asked.shape.num_shared_experts_fused
    if not count:
        return
    without = replace(name, num_experts=name.num_experts - count)
    for files, whose in ((ours, "here"), (theirs, f"shipped by {RULES['sglang'].version}")):
        if found := [file for file in files if file.name == without]:
            yield (
                f"E={without.num_experts} is {whose} ({found[-1].shown}): the layer without its fused shared expert, which a "
                "server started with --disable-shared-experts-fusion asks for"
            )


def _spelled(name: FileName, files: Sequence[_File]) -> Iterator[str]:
    """Files of a device whose name may mean this one: other case or signs, or this name and more."""
    words = _words(name.device_name)
    alike: dict[str, _File] = {}
    for file in files:
        other = file.name.device_name
        if other != name.device_name and replace(file.name, device_name=name.device_name) == name:
            theirs = _words(other)
            if words == theirs or (words < theirs and len(words) > 1):
                alike.setdefault(other, file)
    for other, file in alike.items():
        yield f"{file.shown} is for a device spelled {other}: --device {shlex.quote(other)}, if that is what the driver says"


def _words(device: str) -> frozenset[str]:
    return frozenset(re.split(r"[ _-]+", device.lower().strip()))


def _other_devices(name: FileName, files: Sequence[_File]) -> Iterator[str]:
    named = {file.name.device_name for file in files if replace(file.name, device_name=name.device_name) == name}
    if named := named - {name.device_name}:
        yield (
            f"this layer has files for {', '.join(sorted(named))}: not to be copied under this device's name, for what is fast "
            "on one GPU can be slower than the default on another (notebooks/06_config_health.ipynb)"
        )


def _other_weights(asked: Question, name: FileName, ours: Sequence[_File]) -> Iterator[str]:
    same = (name.num_experts, name.moe_intermediate_size, name.device_name)
    for file in ours:
        other = file.name
        if (
            (other.num_experts, other.moe_intermediate_size, other.device_name) == same
            and not other.kernel
            and other != name
        ):
            yield f"{file.shown} is for weights of another format than {asked.shape.format.name}"


def _other_shards(name: FileName, ours: Sequence[_File]) -> Iterator[str]:
    sizes = {
        file.name.moe_intermediate_size
        for file in ours
        if replace(file.name, moe_intermediate_size=name.moe_intermediate_size) == name
    } - {name.moe_intermediate_size}
    if sizes:
        shown = ", ".join(f"N={size}" for size in sorted(sizes))
        yield f"E={name.num_experts} is here for this device with {shown}: another model, or another --tp-size"


# --- what to do -----------------------------------------------------------------------------------------------------


def _todo(asked: Question, options: str, shipped: bool, name: FileName, ours: Sequence[_File]) -> Iterator[str]:
    if shipped:
        yield (
            f"{RULES['sglang'].version} finds its own file as long as SGLANG_MOE_CONFIG_DIR is not set; `moelab explain --rules "
            "sglang --config-dir FOLDER`, FOLDER holding a copy of its configs/, says what is in it"
        )
    devices = sorted({file.name.device_name for file in ours})
    if devices and name.device_name not in devices:
        yield f"no file there is for {name.device_name}, but for {', '.join(devices)}: tune on this GPU, or run the default"
    yield _tune(asked, options)


def _tune(asked: Question, options: str, version: str = "") -> str:
    shape, server = asked.shape, "sglang" if asked.rules == "moelab" else asked.rules
    if not shape.format.is_plain:
        return (
            f"moelab tune takes plain weights alone: {shape.format.name} is tuned by {server}'s own tuner, on the GPU that "
            "serves; `moelab doctor` then says whether its file is found"
        )
    return (
        f"on a machine with this GPU{version}: moelab tune {options} --rules {server}; then moelab export tuned --rules {server} "
        "--out FOLDER, which prints how to serve it"
    )
