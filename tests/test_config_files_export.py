"""config_files.export: the loader's naming and format, read back before it says done; and nothing lost on the way."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from moelab import config_files as cf
from moelab import runtime, writing
from moelab.config import KernelConfig
from moelab.config_files import exporting
from moelab.errors import ConfigError, ConfigFileError, UnknownNameError

CONFIGS = {64: KernelConfig(64, 128, 64, 16, 8, 4), 1: KernelConfig(16, 64, 128, 1, 4, 3)}
NAME = cf.FileName(8, 256, "NVIDIA_H200", "fp8_w8a8", (128, 128))
ENTRIES = {"1": CONFIGS[1].to_json(), "64": CONFIGS[64].to_json()}


def files_in(folder: Path) -> list[str]:
    """But for the one that its writer holds."""
    return [name for name in os.listdir(folder) if name != writing.LOCK]


def put(out: Path, name: cf.FileName = NAME, configs: dict | None = None, rules: str = "sglang", **more: object):
    return cf.export(configs or CONFIGS, name, rules=rules, out=out, triton_version="3.6.0", **more)


@pytest.mark.parametrize(
    ("rules", "path", "head"),
    [
        ("moelab", "triton_3_6_0/E=8,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json", {}),
        (
            "sglang",
            "configs/triton_3_6_0/E=8,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json",
            {},
        ),
        (
            "vllm",
            "E=8,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,128].json",
            {"triton_version": "3.6.0"},
        ),
    ],
)
def test_naming_and_format(rules: str, path: str, head: dict, tmp_path: Path) -> None:
    done = put(tmp_path, rules=rules)
    assert done.path == tmp_path / path == cf.export_path(NAME, rules=rules, out=tmp_path, triton_version="3.6.0")
    assert done.path.read_text() == json.dumps(head | ENTRIES, indent=4) + "\n"
    assert {key: answer.config for key, answer in done.lookups.items()} == CONFIGS
    assert files_in(done.path.parent) == [done.path.name]  # no temporary file


def test_a_file_that_is_there_is_replaced_only_when_told(tmp_path: Path) -> None:
    path = put(tmp_path).path
    before = path.read_bytes()
    with pytest.raises(ConfigFileError, match=r"exists already.*overwrite"):
        put(tmp_path, configs={1: CONFIGS[1]})
    assert path.read_bytes() == before
    put(tmp_path, configs={1: CONFIGS[1]}, overwrite=True)
    assert cf.read_config_file(path) == {1: CONFIGS[1]}


@pytest.mark.parametrize("there_before", [False, True])
def test_what_is_not_found_again_is_taken_back(
    there_before: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = put(tmp_path).path.read_bytes() if there_before else None
    path = cf.export_path(NAME, rules="sglang", out=tmp_path, triton_version="3.6.0")

    def disk_that_forgets(*_: object, **__: object) -> str:
        return json.dumps({"1": CONFIGS[64].to_json(), "64": CONFIGS[64].to_json()})

    monkeypatch.setattr(exporting, "file_text", disk_that_forgets)
    with pytest.raises(ConfigFileError, match=r"batch size 1 does not find.*Nothing was kept"):
        put(tmp_path, overwrite=True)
    assert (path.read_bytes() if path.exists() else None) == before


def test_a_full_disk_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = put(tmp_path).path
    before = path.read_bytes()

    def no_space(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", no_space)
    with pytest.raises(OSError, match="No space"):
        put(tmp_path, configs={1: CONFIGS[1]}, overwrite=True)
    assert path.read_bytes() == before and files_in(path.parent) == [path.name]


def test_what_a_loader_cannot_ask_for_is_not_written(tmp_path: Path) -> None:
    for name in (
        cf.FileName(8, 256, "NVIDIA_H200", down=True),
        cf.FileName(8, 256, "NVIDIA_H200", kernel="split_k_workspace"),
    ):
        with pytest.raises(ConfigFileError, match="no file of its own"):
            put(tmp_path, name, rules="vllm")
    with pytest.raises(ConfigFileError, match="kernel"):
        put(tmp_path, cf.FileName(8, 256, "NVIDIA_H200", kernel="split_k_workspace"), rules="sglang")
    with pytest.raises(UnknownNameError, match="int8_w8a8"):
        put(tmp_path, cf.FileName(8, 256, "NVIDIA_H200", "int8_w8a8"), rules="vllm")
    assert not list(tmp_path.iterdir())


def test_a_name_that_does_not_say_per_channel_is_shared(tmp_path: Path) -> None:
    """vLLM asks by it for per-channel experts too; a second file of that name is refused."""
    name = cf.FileName(8, 256, "NVIDIA_H200", "fp8_w8a8", per_channel_quant=True)
    written = put(tmp_path, name, rules="vllm").path
    assert written.name == "E=8,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8.json"
    assert written.name in str(cf.shared_name(name, "vllm")) and cf.shared_name(name, "sglang") is None
    with pytest.raises(ConfigFileError, match="exists already"):
        put(tmp_path, cf.FileName(8, 256, "NVIDIA_H200", "fp8_w8a8"), rules="vllm")


@pytest.mark.parametrize(
    ("config", "rules", "named"),
    [
        (KernelConfig(128, 256, 128, 1, 8, 5), "moelab", "shared memory"),  # 5 stages of 48 KiB in fp8, over 227 KiB
        (KernelConfig(16, 64, 256, 1), "sglang", "quantisation block"),
        (KernelConfig(16, 64, 64, 1, SPLIT_K=2), "sglang", "SPLIT_K"),
        (KernelConfig(16, 64, 64, 1, SPLIT_K=2), "vllm", "SPLIT_K"),
        (KernelConfig(48, 64, 64, 1), "vllm", "power of two"),
    ],
)
def test_what_no_kernel_takes_is_not_written(config: KernelConfig, rules: str, named: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"batch size 7.*{named}"):
        put(tmp_path, configs={1: CONFIGS[1], 7: config}, rules=rules)
    assert not list(tmp_path.iterdir())


def test_vllm_cuts_block_k_itself(tmp_path: Path) -> None:
    assert put(tmp_path, configs={1: KernelConfig(16, 64, 256, 1)}, rules="vllm").path.exists()


@pytest.mark.parametrize("rules", ["moelab", "sglang"])
def test_up_and_down_share_block_m(rules: str, tmp_path: Path) -> None:
    up = cf.FileName(8, 256, "NVIDIA_H200")
    down = cf.FileName(8, 256, "NVIDIA_H200", down=True)
    same = {1: KernelConfig(16, 128, 128, 1), 64: KernelConfig(64, 64, 64, 8)}
    (tmp_path / "configs").mkdir()
    with pytest.raises(ConfigFileError, match=r"no up file.*write both at once"):
        put(tmp_path, down, {1: CONFIGS[64]}, rules)  # at batch 1 the default has 16
    put(tmp_path, up, rules=rules)
    assert put(tmp_path, down, same, rules).path.name.endswith("_down.json")
    with pytest.raises(ConfigFileError, match=r"batch size 1 has BLOCK_SIZE_M = 32.*has 16"):
        put(tmp_path, down, {1: KernelConfig(32, 64, 64, 1)}, rules, overwrite=True)


def test_a_kernels_configs_may_have_small_blocks(tmp_path: Path) -> None:
    """A decode kernel that multiplies and sums has one row a program; the compatible kernel's `tl.dot` takes 16."""
    small = {1: KernelConfig(1, 8, 256, 1)}
    name = cf.FileName(8, 256, "NVIDIA_H200", kernel="decode")
    assert put(tmp_path, name, small, "moelab").lookups[1].config == small[1]
    with pytest.raises(ConfigError, match="under 16"):
        put(tmp_path, cf.FileName(8, 256, "NVIDIA_H200"), small, "moelab")


# --- what can be exported -----------------------------------------------------------------------------------


def test_sources_of_a_file_a_folder_and_a_tree(tmp_path: Path) -> None:
    ours = runtime.config_dir()
    every = cf.sources(ours)
    assert len(every) == len(list(ours.rglob("E=*.json"))) and {s.triton_version for s in every} == {"3.6.0"}
    assert cf.sources(ours / "triton_3_6_0") == every
    assert cf.sources(every[0].origin) == every[:1]
    flat = put(tmp_path, rules="vllm").path
    assert cf.sources(tmp_path)[0].triton_version == cf.sources(flat)[0].triton_version == "3.6.0"
    assert cf.sources(put(tmp_path / "sglang").path.parents[2])[0].configs == CONFIGS
    with pytest.raises(ConfigFileError, match="no config file"):
        cf.sources(ours / "nothing")


def test_there_and_back_again(tmp_path: Path) -> None:
    """Through all three formats, the bytes are the first ones."""
    first = source = next(one for one in cf.sources(runtime.config_dir()) if not one.name.unsaid("vllm"))
    for turn, rules in enumerate(("vllm", "sglang", "moelab")):
        done = cf.export(source.configs, source.name, rules=rules, out=tmp_path / str(turn), triton_version="3.6.0")
        source = cf.sources(done.path)[0]
    assert source.origin.read_bytes() == first.origin.read_bytes() and source.origin.name == first.origin.name


def test_int4_there_and_back_again(tmp_path: Path) -> None:
    """N in vLLM's name counts values, in the others' bytes."""
    name = cf.FileName(8, 256, "NVIDIA_H200", "int4_w4a16")
    flat = put(tmp_path, name, rules="vllm").path
    assert "N=512," in flat.name and cf.sources(flat)[0].name == name
    assert cf.doctor(tmp_path).errors == ()
