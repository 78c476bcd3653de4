"""From a tuner to a server: the recipe, and a tree that keeps what sglang ships."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest

from moelab import config_files, runtime
from moelab.config_files import RULES
from moelab.errors import ConfigFileError

FILE = "E=128,N=768,device_name=NVIDIA_H200.json"
OTHER = "E=16,N=2048,device_name=NVIDIA_B200.json"


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    """sglang's tree as far as data/upstream has it."""
    return config_files.write_shipped(tmp_path / "sglang")


def export(out: Path, *files: str) -> list[Path]:
    own = runtime.config_dir() / "triton_3_6_0"
    done = [config_files.sources(own / file)[0] for file in files]
    return [config_files.export(s.configs, s.name, rules="sglang", out=out, triton_version="3.6.0").path for s in done]


@pytest.mark.parametrize("rules", RULES)
def test_recipe_goes_from_tuner_to_server(rules: str, tmp_path: Path) -> None:
    steps = config_files.tune_to_serve(rules, tmp_path / "it's here", model="qwen3-30b-a3b", tp_size=2)
    how = [step.how for step in steps]
    assert "moelab tune --model qwen3-30b-a3b --tp 2" in how[0] and how[1].startswith("moelab export tuned")
    value = subprocess.run(
        ["sh", "-c", f'{how[2]}; printf %s "${RULES[rules].environment}"'], capture_output=True, text=True, check=True
    ).stdout
    assert value == str(tmp_path / "it's here")
    assert all(step.do and step.how and step.why.endswith(".") for step in steps)
    assert [line for line in config_files.as_text(steps).splitlines() if line.strip() in how] == [
        "     " + h for h in how
    ]
    assert config_files.as_markdown(steps).startswith("1. ") and how[-1] in config_files.as_markdown(steps)


def test_recipe_names_the_file_that_the_log_will_name(tmp_path: Path) -> None:
    [path] = export(tmp_path, FILE)
    last = config_files.to_serve("sglang", tmp_path, [path])[-1]
    assert last.how == f"Using MoE kernel config from {path.resolve()}."


def test_completed_tree_keeps_both(shipped: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    [ours] = export(out, FILE)
    before = ours.read_bytes()
    files = {path.relative_to(shipped) for path in shipped.rglob("*.json")}
    theirs = {path for path in files if path.name in (FILE, FILE.replace(".json", "_down.json"))}
    done = config_files.complete(out, shipped)
    assert ours.read_bytes() == before and theirs and theirs != files
    assert {path.relative_to(out) for path in done.written} == files - theirs
    assert {path.relative_to(shipped) for path in done.left_out} == theirs
    found = config_files.lookup(
        16, 2048, "NVIDIA B200", num_tokens=1, triton_version="3.6.0", config_dir=out, rules="sglang"
    )
    assert (found.path is not None) == any(path.name == OTHER for path in files)
    down = config_files.lookup(
        128, 768, "NVIDIA H200", num_tokens=1, triton_version="3.6.0", config_dir=out, rules="sglang", down=True
    )
    assert down.path == ours  # tuned for both GEMMs: no shipped _down file of another version takes GEMM2


def test_completing_that_was_cut_is_taken_up(shipped: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    export(out, FILE)
    first = config_files.complete(out, shipped)
    for path in first.written[::2]:
        path.unlink()
    assert config_files.complete(out, shipped) == first and all(path.is_file() for path in first.written)


def test_completing_takes_a_copy_of_the_package(shipped: Path, tmp_path: Path) -> None:
    place = tmp_path / "site-packages" / "sglang" / RULES["sglang"].package_folder
    shutil.copytree(shipped / "configs", place)
    export(tmp_path / "out", FILE)
    done = config_files.complete(tmp_path / "out", tmp_path / "site-packages" / "sglang")
    assert done.written and all(path.is_relative_to(tmp_path / "out" / "configs") for path in done.written)


def test_completing_with_nothing_is_refused(shipped: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    with pytest.raises(ConfigFileError, match=r"no config file of sglang's.*Expected a copy of its package"):
        config_files.complete(tmp_path / "out", tmp_path / "empty")
    with pytest.raises(ConfigFileError, match="is the tree itself"):
        config_files.complete(shipped, shipped)
    for rules in ("vllm", "moelab"):
        with pytest.raises(ConfigFileError, match="needs no completing"):
            config_files.complete(tmp_path / "out", shipped, rules)


def test_export_prints_the_recipe_and_completes_the_tree(run, shipped: Path, tmp_path: Path) -> None:
    source, out = runtime.config_dir() / "triton_3_6_0" / FILE, tmp_path / "out"
    status, printed, err = run("export", source, "--rules", "sglang", "--out", out, "--complete", shipped)
    assert status == 0 and f"export SGLANG_MOE_CONFIG_DIR={out.resolve()}" in printed
    assert f"Using MoE kernel config from {out.resolve()}/configs/triton_3_6_0/{FILE}." in printed
    added = len(config_files.shipped_files()) - 2
    assert f"added {added} files that sglang ships; left out 2 files" in err
    assert "To serve" not in run("export", source, "--rules", "sglang", "--out", out, "--overwrite", "--json")[1]


def test_export_refuses_to_complete_before_it_writes(run, shipped: Path, tmp_path: Path) -> None:
    source = runtime.config_dir() / "triton_3_6_0" / FILE
    status, printed, err = run("export", source, "--rules", "vllm", "--out", tmp_path / "out", "--complete", shipped)
    assert (status, printed) == (2, "") and "needs no completing" in err and not (tmp_path / "out").exists()
