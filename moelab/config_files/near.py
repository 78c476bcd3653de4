"""What a lookup just missed, and what to do where it found no file for the layer, or one of another Triton version."""

from __future__ import annotations

import contextlib
import functools
import json
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from moelab.config_files.names import FileName, parse_file_name
from moelab.config_files.places import folders, version_folders
from moelab.config_files.questions import Question
from moelab.config_files.rules import Rules, get_rules
from moelab.config_files.search import Lookup, find
from moelab.config_files.shipped_quantised import shipped_data
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
    """What `answer`, a lookup of `asked`, just missed: in the folders that it searched, and among what its server ships.

    device: as the driver gives it. options: of the command that tunes the layer. Raises what `folders` does.
    """
    name, loader = asked.name(device, down=down), get_rules(asked.rules)
    fallback = answer.path is not None and loader.version_folders and not _same(answer.path.parent.name, triton_version)
    if answer.path is not None and not fallback:
        return Near()
    theirs = [file for file in shipped_names(asked.rules) if file.name.down == down]
    own = [file for file in theirs if file.name == name]
    if fallback:  # a file of the layer's own serves, and only one of the version in use would be better
        exact = [file for file in own if _same(file.folder, triton_version)]
        return Near(
            tuple(_shipped(exact, asked.rules, triton_version)),
            (_tune(asked, options, f" and Triton {triton_version}"),),
        )
    here = [file for folder, _ in folders(loader, config_dir) for file in _files(folder, loader.name)]
    ours = [file for file in here if file.name.down == down]
    alike = _alike(name, [*ours, *theirs])
    misses = [
        *_shipped(own, asked.rules, triton_version), *_unfused(asked, name, ours, theirs), *_spelled(alike),
        *_other_devices(name, alike, [*ours, *theirs]), *_other_weights(asked, name, ours), *_other_shards(name, ours),
    ]  # fmt: skip
    if alike and not own:
        return Near(tuple(misses), (f"correct --device: {' or '.join(map(shlex.quote, alike))}",))
    return Near(tuple(misses), tuple(_todo(asked, options, bool(own), name, ours)))


def elsewhere(asked: Question, device: str, *, triton_version: str, down: bool = False) -> str:
    """Where a file for a layer is although its loader has no tree here, as the end of an error: what sglang ships, what moelab
    has. Empty if neither has one."""
    name = asked.name(device, down=down)
    shipped = [file for file in shipped_names(asked.rules) if file.name == name]
    said = [f"{sentence}." for sentence in _shipped(shipped, asked.rules, triton_version)]
    answer = find(name, get_rules("moelab"), 1, triton_version)
    if answer.path is not None and not name.unsaid(asked.rules):
        said.append(
            f"moelab's own tree has {answer.path.parent.name}/{answer.path.name}: leave --rules out to see it, or export it, "
            f"which says how to serve it: moelab export {shlex.quote(str(answer.path))} --rules {asked.rules} --out FOLDER."
        )
    return "".join(f" {sentence}" for sentence in said)


@functools.cache
def shipped_names(rules: str = "sglang") -> tuple[_File, ...]:
    """The config files that a loader's package has, by name, as data/upstream holds them: of sglang every one, of vLLM those of
    quantised experts, of moelab, which asks as sglang does, sglang's.

    Raises RecordingError where the files cannot be read.
    """
    from moelab import runtime

    loader, path = _whose(rules), runtime.data_dir() / "upstream" / "sglang_shipped_names.json"
    try:
        plain = json.loads(path.read_text(encoding="utf-8"))["files"] if loader.name == "sglang" else {}
        pairs = [(folder, text) for folder, names in plain.items() for text in names]
    except (OSError, ValueError, KeyError, AttributeError) as error:
        raise RecordingError(
            f"Cannot read {path}: {error}. Expected the names of sglang's config files. Restore the file from git."
        ) from error
    rows = [row for peer in shipped_data()["peers"] if peer["peer"] == loader.name for row in peer["quantised"]]
    pairs += [(f"triton_{row['triton'].replace('.', '_')}" if "triton" in row else "", row["name"]) for row in rows]
    return tuple(file for folder, text in pairs for file in _file(text, folder, loader.name))


def _whose(rules: str) -> Rules:
    """The peer whose shipped files answer a question."""
    return get_rules("vllm" if rules == "vllm" else "sglang")


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


def _shipped(own: Sequence[_File], rules: str, triton_version: str) -> Iterator[str]:
    if not own:
        return
    exact = [file for file in own if not file.folder or _same(file.folder, triton_version)]
    newest = max(own, key=lambda file: [int(number) for number in file.folder.split("_")[1:]])
    count = f", the newest of {len(own)}" if len(own) > 1 else ""
    other = "" if exact else f"{count}, for another Triton version than {triton_version}"
    yield f"{_whose(rules).version} ships this file: {[*exact, newest][0].shown}{other}"


def _unfused(asked: Question, name: FileName, ours: Sequence[_File], theirs: Sequence[_File]) -> Iterator[str]:
    count = asked.shape.num_shared_experts_fused
    if not count:
        return
    without = replace(name, num_experts=name.num_experts - count)
    for files, whose in ((ours, "here"), (theirs, f"shipped by {_whose(asked.rules).version}")):
        if found := [file for file in files if file.name == without]:
            yield (
                f"E={without.num_experts} is {whose} ({found[-1].shown}): the layer without its fused shared expert, which a "
                "server started with --disable-shared-experts-fusion asks for"
            )


def _alike(name: FileName, files: Sequence[_File]) -> dict[str, _File]:
    """Files of the layer for a device whose name may mean this one, by that name: other case or signs, or this name and more."""
    words = _words(name.device_name)
    found: dict[str, _File] = {}
    for file in files:
        theirs = _words(file.name.device_name)
        meant = words == theirs or (words < theirs and any(any(map(str.isdigit, word)) for word in words))
        if meant and file.name.device_name != name.device_name and _for(name.device_name, file) == name:
            found.setdefault(file.name.device_name, file)
    return found


def _for(device: str, file: _File) -> FileName:
    """A file's name, were it for that device."""
    return replace(file.name, device_name=device)


def _spelled(alike: Mapping[str, _File]) -> Iterator[str]:
    for other, file in alike.items():
        yield f"{file.shown} is for a device spelled {other}: --device {shlex.quote(other)}, if that is what the driver says"


def _words(device: str) -> frozenset[str]:
    return frozenset(re.split(r"[ _-]+", device.lower().strip()))


def _other_devices(name: FileName, alike: Mapping[str, _File], files: Sequence[_File]) -> Iterator[str]:
    named = {file.name.device_name for file in files if _for(name.device_name, file) == name}
    if named := named - {name.device_name, *alike}:
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
    peer = _whose(asked.rules)
    if shipped and peer.environment_adds:
        yield f"nothing: {peer.version} searches its own folder after {peer.environment}'s"
    elif shipped:
        yield (
            f"{peer.version} finds its own file as long as {peer.environment} is not set; `moelab explain --rules sglang "
            "--config-dir FOLDER`, FOLDER holding a copy of its configs/, says what is in it"
        )
    devices = sorted({file.name.device_name for file in ours})
    if devices and name.device_name not in devices:
        yield f"no file there is for {name.device_name}, but for {', '.join(devices)}: tune on this GPU, or run the default"
    yield _tune(asked, options)


def _tune(asked: Question, options: str, version: str = "") -> str:
    server = "sglang" if asked.rules == "moelab" else asked.rules
    return (
        f"on a machine with this GPU{version}: moelab tune {options} --rules {server}; then moelab export tuned --rules {server} "
        "--out FOLDER, which prints how to serve it"
    )
