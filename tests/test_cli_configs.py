"""`moelab export`, `moelab doctor`, and `moelab explain` under each loader's rules."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from test_doctor import plant_upstreams_mistake

from moelab import config_files, runtime
from moelab.config import KernelConfig

ROOT = Path(__file__).resolve().parent.parent
QWEN = ("explain", "--model", "qwen3-30b-a3b", "--batch-size", "20", "--device", "NVIDIA H200")
FILE = "E=128,N=768,device_name=NVIDIA_H200.json"


# --- doctor -------------------------------------------------------------------------------------------------


def test_doctor_on_upstreams_mistake(run, tmp_path: Path) -> None:
    _, planted = plant_upstreams_mistake(tmp_path)
    status, out, err = run("doctor", tmp_path)
    assert (status, err) == (1, "")
    assert "error: wrong_folder, 33 files" in out and "33 errors, 0 warnings" in out
    assert all(str(path.relative_to(tmp_path)) in out for path in planted)
    status, out, _ = run("doctor", tmp_path, "--json")
    rows = json.loads(out)["findings"]
    assert status == 1
    assert {row["file"] for row in rows if row["severity"] == "error"} == {
        str(p.relative_to(tmp_path)) for p in planted
    }


def test_doctor_on_our_own_configs(run) -> None:
    status, out, err = run("doctor", runtime.config_dir())
    assert (status, err) == (0, "")
    assert len(out.splitlines()) == 3 and "0 errors, 0 warnings" in out  # which folder, an empty line, the counts
    answer = json.loads(run("doctor", runtime.config_dir(), "--json")[1])
    assert (answer["errors"], answer["warnings"]) == (0, 0)
    with_notes = run("doctor", runtime.config_dir(), "--notes")[1]
    told = {row["file"] for row in answer["findings"] if row["severity"] == "note"}
    assert len(told) <= answer["notes"] and all(file in with_notes for file in told)


def test_doctor_warns_without_failing(run, tmp_path: Path) -> None:
    source = runtime.config_dir() / "triton_3_6_0" / FILE
    (tmp_path / FILE).write_text(source.read_text().rstrip("\n"))
    status, out, _ = run("doctor", tmp_path, "--rules", "vllm")
    assert status == 0 and "warning: no_newline, 1 file\n" in out and "remedy  Add" in out
    assert "; 1 config file below" in out and out.endswith("0 errors, 1 warning, 1 note (--notes shows it)\n")


# --- export -------------------------------------------------------------------------------------------------


def asked_for_by_all() -> config_files.Source:
    """A file of ours that every loader has a name of its own for."""
    own = config_files.sources(runtime.config_dir())
    return next(one for one in own if not any(map(one.name.unsaid, config_files.RULES)))


@pytest.mark.parametrize(
    ("rules", "below"), [("moelab", "triton_3_6_0"), ("sglang", "configs/triton_3_6_0"), ("vllm", ".")]
)
def test_export_then_doctor_then_explain(run, rules: str, below: str, tmp_path: Path) -> None:
    status, out, err = run("export", runtime.config_dir(), "--rules", rules, "--out", tmp_path, "--json")
    own = config_files.sources(runtime.config_dir())
    skipped = [reason for reason in (config_files.left_out(source.name, rules) for source in own) if reason]
    kinds = list(dict.fromkeys(skipped))  # a line for each reason, not for each file
    said = [line for line in err.splitlines() if ": left out " in line]  # others doubt that a file will be asked for
    assert status == 0 and all(reason in line for reason, line in zip(kinds, said, strict=True))
    assert all(f"left out {skipped.count(reason)} file" in err for reason in kinds)
    assert any("no file of its own for kernel" in reason for reason in skipped) == (rules != "moelab")
    assert any("no file of its own for down" in reason for reason in skipped) == (rules == "vllm")
    rows = json.loads(out)
    assert {Path(row["wrote"]) for row in rows} >= {tmp_path / below / FILE}
    sizes = [len(source.configs) for source in own if not config_files.left_out(source.name, rules)]
    assert sorted(row["batch sizes"] for row in rows) == sorted(sizes) and {row["found by"] for row in rows} == {rules}
    assert run("doctor", tmp_path)[0] == 0
    status, out, _ = run(*QWEN, "--triton-version", "3.6.0", "--rules", rules, "--config-dir", tmp_path, "--json")
    answer = json.loads(out)
    assert status == 0 and Path(answer["path"]) == tmp_path / below / FILE and answer["key"] == 16
    text = run(*QWEN, "--triton-version", "3.7.1", "--rules", rules, "--config-dir", tmp_path, "--down")[1]
    assert ("another Triton version" in text) == (rules != "vllm")


def test_export_asks_before_it_replaces(run, tmp_path: Path) -> None:
    source = runtime.config_dir() / "triton_3_6_0" / FILE
    arguments = ("export", source, "--rules", "vllm", "--out", tmp_path)
    assert run(*arguments)[0] == 0
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and "--overwrite" in err
    assert run(*arguments, "--overwrite")[0] == 0


def test_export_needs_a_triton_version(run, tmp_path: Path) -> None:
    (tmp_path / FILE).write_text((runtime.config_dir() / "triton_3_6_0" / FILE).read_text())
    arguments = ("export", tmp_path / FILE, "--rules", "sglang", "--out", tmp_path / "out")
    status, _, err = run(*arguments)
    assert status == 2 and "--triton-version" in err
    for wrong in ("3.6", "new"):
        assert run(*arguments, "--triton-version", wrong)[0] == 2
    assert run(*arguments, "--triton-version", "3.7.1")[0] == 0
    assert (tmp_path / "out" / "configs" / "triton_3_7_1" / FILE).exists()


def test_export_of_two_versions_into_one_flat_folder_is_refused(run, tmp_path: Path) -> None:
    source = asked_for_by_all()
    for version in ("3.5.1", "3.6.0"):
        config_files.export(source.configs, source.name, rules="moelab", out=tmp_path, triton_version=version)
    status, _, err = run("export", tmp_path, "--rules", "vllm", "--out", tmp_path / "flat")
    assert status == 2 and "exists already" in err
    assert "wrote" in err and str(tmp_path / "flat") in err.splitlines()[0]  # what was done is not kept quiet


def test_export_of_a_folder_leaves_out_what_the_loader_has_no_name_for(run, tmp_path: Path) -> None:
    source = asked_for_by_all()
    for more in ({}, {"down": True}, {"kernel": "split_k_workspace"}):
        name = dataclasses.replace(source.name, **more)
        config_files.export(source.configs, name, rules="moelab", out=tmp_path, triton_version="3.6.0")
    status, out, err = run("export", tmp_path, "--rules", "vllm", "--out", tmp_path / "flat", "--json")
    assert status == 0 and len(json.loads(out)) == 1
    assert "_down.json: vllm has no file of its own for down" in err and "kernel=split_k_workspace.json: vllm" in err
    (down,) = tmp_path.rglob("*_down.json")
    status, _, err = run("export", down, "--rules", "vllm", "--out", tmp_path / "flat")
    assert status == 2 and "no file of its own" in err
    for path in tmp_path.glob(f"triton_3_6_0/{source.origin.name}"):
        path.unlink()
    status, _, err = run("export", tmp_path, "--rules", "vllm", "--out", tmp_path / "flat")
    assert status == 2 and "Nothing of" in err


# --- explain ------------------------------------------------------------------------------------------------


def test_explain_under_sglang_names_what_it_would_stumble_over(run) -> None:
    arguments = (*QWEN, "--triton-version", "3.7.1", "--rules", "sglang", "--config-dir", runtime.config_dir())
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and "folder above configs/" in err
    assert run(*arguments[:-1], runtime.config_dir().parent)[0] == 0


def test_explain_under_vllm_shows_its_own_default(run, tmp_path: Path) -> None:
    arguments = (*QWEN, "--triton-version", "3.6.0", "--rules", "vllm", "--config-dir", tmp_path, "--json")
    answer = json.loads(run(*arguments)[1])
    assert answer["is_default"] and answer["config"]["num_stages"] == 4 and answer["config"]["BLOCK_SIZE_K"] == 128


def test_export_says_which_keys_it_does_not_write(run, tmp_path: Path) -> None:
    """sglang's own tree for the H100 exports, less USE_TMA: where and how often is said."""
    from moelab.config_files.shipped import shipped_files, write_shipped

    files = [f for f in shipped_files() if (f["device"], f["triton"]) == ("NVIDIA_H100_80GB_HBM3", "3.7.1")]
    tree = write_shipped(tmp_path / "sglang", files)
    status, _, err = run("export", str(tree), "--rules", "moelab", "--out", str(tmp_path / "out"))
    assert status == 0 and err.count("left out USE_TMA at") == len(files) == 2 and "of 18 batch sizes" in err
    assert not any("USE_TMA" in path.read_text() for path in (tmp_path / "out").rglob("*.json"))


EXPLAIN_KERNEL = (*QWEN, "--triton-version", "3.6.0", "--kernel")


def test_explain_warns_of_a_kernel_that_nobody_has(run) -> None:
    status, out, err = run(*EXPLAIN_KERNEL, "gated_tmaa")
    assert status == 0 and "default rule" in out and "'gated_tmaa'" in err and "Did you mean gated_tma" in err
    assert all(name in err for name in ("tma", "split_k_workspace", "gated", "fast")) and "\n" not in err.strip()
    status, out, err = run(*EXPLAIN_KERNEL, "gated_tmaa", "--json")
    answer = json.loads(out)
    assert status == 0 and answer["is_default"] and [w in err for w in answer["warnings"]] == [True]


@pytest.mark.parametrize(
    "kernel", ["gated_tma", "tma", "split_k_workspace", "gated_atomic_out", "triton", "grouped_gemm"]
)
def test_explain_knows_every_kernel_there_is(run, kernel: str) -> None:
    _, out, err = run(*EXPLAIN_KERNEL, kernel, "--json")
    assert json.loads(out)["warnings"] == [] and err == ""
    assert json.loads(out)["is_default"] == (kernel in ("split_k_workspace", "gated_atomic_out"))


def test_explain_takes_a_readers_own_kernel_that_has_files(run, tmp_path: Path) -> None:
    """For another shape, device and Triton version: the name is no typing error."""
    mine = tmp_path / "triton_3_5_0" / "E=4,N=64,device_name=NVIDIA_L4,kernel=mine_down.json"
    config_files.write_config_file(mine, {1: KernelConfig(16, 32, 64, 1)})
    asked = (*EXPLAIN_KERNEL, "mine", "--config-dir", tmp_path, "--json")
    _, out, err = run(*asked)
    assert json.loads(out)["warnings"] == [] and err == ""
    near = run(*EXPLAIN_KERNEL, "mini", "--config-dir", tmp_path)[2]
    assert "Did you mean mine?" in near
    mine.rename(tmp_path / "triton_3_5_0" / "not a config file,kernel=mine.json")
    assert "'mine'" in run(*asked)[2]


def test_explain_says_what_fast_runs(run) -> None:
    asked = ("--disable-shared-experts-fusion", "--kernel", "fast")
    scout = ("explain", "--model", "llama-4-scout", "--tp-size", "4", *asked, "--device", "NVIDIA H200")
    status, out, _ = run(*scout, "--batch-size", "1")
    assert status == 0 and out.startswith("few_tokens:1x512/4x256, predicted fastest: ")
    deepseek = ("explain", "--model", "deepseek-v3", "--tp-size", "8", *asked, "--batch-size", "64", "--device")
    status, out, _ = run(*deepseek, "NVIDIA H200")
    assert (
        status == 0
        and out.startswith("gated_tma:16x")
        and "under its tuned configs, predicted" in out
        and "2 rows an" in out
    )
    status, out, _ = run(*deepseek, "NVIDIA H100")
    assert status == 0 and out.startswith("gated_tma:16x") and "tuned" not in out
    best, *others = [line for line in out.splitlines() if line.startswith(("* ", "  "))]
    assert best.startswith("* gated_tma:16x") and {line.split(":")[0].strip() for line in others} >= {
        "triton",
        "one_launch",
    }
    status, out, err = run(*deepseek, "NVIDIA H20", "--json")
    (warning,) = json.loads(out)["warnings"]
    assert status == 0 and err == f"moelab: {warning}\n" and "'NVIDIA H20'" in warning and "NVIDIA_H200" in warning
    assert not json.loads(run(*deepseek, "NVIDIA_H200", "--json")[1])["warnings"]
    status, out, _ = run(*scout, "--batch-size", "64", "--json")
    said = json.loads(out)
    assert status == 0 and said["form"]["kind"] == "gated_tma" and said["form"]["up"]["BLOCK_SIZE_M"] == 16
    status, out, _ = run(*scout, "--batch-size", "8192", "--json")
    said = json.loads(out)
    assert status == 0 and said["form"]["tokens"] == 176 and said["form"]["permutes"] == 1
    assert (
        said["reason"].startswith("one_launch:256x176x4-permuted, predicted fastest: ")
        and "512 rows an expert" in said["reason"]
    )
    first, second, *_ = said["predicted"]
    assert first["name"] == said["form"]["name"] and first["even_us"] > 0
    assert first["even_us"] * first["skewed_us"] <= second["even_us"] * second["skewed_us"]


def test_explain_of_fast_refuses_what_fast_refuses(run) -> None:
    asked = ("explain", "--batch-size", "1", "--kernel", "fast", "--device")
    status, _, err = run(*asked, "NVIDIA A100-SXM4-80GB", "--model", "mixtral-8x7b")
    assert status != 0 and "sm_80" in err and "Hopper" in err
    status, _, err = run(*asked, "NVIDIA H200", "--model", "mixtral-8x7b", "--dtype", "float32")
    assert status != 0 and "float32" in err
    status, _, err = run(*asked, "NVIDIA H200", "--model", "gpt-oss-20b")
    assert status != 0 and "activation=" in err
    status, _, err = run(*asked, "NVIDIA H200", "--model", "kimi-k2-thinking", "--tp", "8")
    assert (
        status != 0 and "int4_w4a16_group_32" in err and "fp8_w8a8_block_128x128" in err
    )  # what it takes beside plain ones
    status, out, _ = run(*asked, "NVIDIA H200", "--model", "deepseek-v3-fp8", "--tp", "8")
    assert status == 0 and "fp8 codes" in out and "predicted" not in out  # a table without rows
    for option in (["--down"], ["--rules", "vllm"], ["--config-dir", "."]):
        status, _, err = run(*asked, "NVIDIA H200", "--model", "mixtral-8x7b", *option)
        assert status == 2 and "takes no" in err, option
