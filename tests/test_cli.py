"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from error_rows import unhelpful

from moelab import config_files, recordings, runtime, shapes
from moelab.config import KernelConfig
from moelab.config_files import questions
from moelab.recordings import Recording

NEED_A_DEVICE = (["explain", "--model", "mixtral-8x7b"], ["explain", "--model", "mixtral-8x7b", "--kernel", "fast"])
ROOT = Path(__file__).resolve().parent.parent
H200 = ("--device", "NVIDIA H200", "--triton-version", "3.6.0")


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60)


# --- the whole ------------------------------------------------------------------------------------------------


def test_python_m_moelab() -> None:
    from moelab import __version__

    done = python("-m", "moelab", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"moelab {__version__}\n", "")


@pytest.mark.parametrize(
    "command",
    [
        ["--help"],
        ["models"],
        ["bench", "--help"],
        ["doctor", "ONE FILE"],
        ["shape", "--model", "mixtral-8x7b"],
        ["explain", "--model", "mixtral-8x7b", "--batch-size", "1", *H200],
        ["export", "ONE FILE", "--rules", "sglang", "--out", "OUT"],
    ],
)
def test_light_commands_load_nothing_heavy(command: list[str], tmp_path: Path) -> None:
    source = tmp_path / "triton_3_6_0"
    source.mkdir()
    shutil.copy(min((ROOT / "configs").glob("triton_3_6_0/E=*H200.json")), source)
    command = [{"ONE FILE": str(tmp_path), "OUT": str(tmp_path / "out")}.get(word, word) for word in command]
    script = f"import sys; from moelab.cli import main; main({command!r}); print(*sys.modules, file=sys.stderr)"
    done = python("-c", script)
    assert done.stdout and done.returncode == 0
    assert not {"torch", "triton", "plotly", "pandas", "numpy"} & set(done.stderr.split())


def test_help_says_each_command_in_a_whole_line(run) -> None:
    lines = run("--help")[1].partition("Commands:")[2].split("\n")
    assert len([line for line in lines if line.strip()]) == 8 and not any("..." in line for line in lines)


def test_help_names_every_command(run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert all(
        f"  {name} " in out for name in ("models", "shape", "explain", "tune", "bench", "record", "export", "doctor")
    )


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["shape"], ["Missing option '--model'"]),
        (["shape", "--model", "mixtral-8x7b", "--tp-size", "0"], ["Invalid value for '--tp-size'"]),
        (["shape", "--model", "mixtral-8x7b", "--tp-size", "two"], ["Invalid value for '--tp-size'", "valid integer"]),
        (["shapes"], ["No such command 'shapes'"]),
        (["explain", "--model", "mixtral-8x7b"], ["Missing option '--batch-size'"]),
        (["record"], ["name a suite"]),
        (["explain", "--model", "mixtral-8x7b", "--batch-size", "1", "--triton-version", "3.6"], ["three numbers"]),
        (["explain", "--model", "mixtral-8x7b", "--batch-size", "1", *H200, "--config-dir", "no/such"], ["no/such"]),
        # what a module refuses
        (["shape", "--model", "qwen3-30b"], ["qwen3-30b-a3b", "Did you mean"]),
        (["shape", "--model", "mixtral-8x7b", "--tp-size", "3"], ["does not divide", "2, 4"]),
        (["shape", "--model", "mixtral-8x7b", "--dtype", "fp12"], ["fp12", "bfloat16"]),
        (["shape", "--model", "mixtral-8x7b", "--device", "a,b"], ["a,b", "device name"]),
        (["explain", "--model", "mixtral-8x7b", "--batch-size", "1", *H200, "--rules", "moelabs"], ["moelabs"]),
        (["bench", "--model", "mixtral-8x7b", "--impl", "tritn"], ["tritn", "Did you mean triton"]),
        (["bench", "--model", "mixtral-8x7b", "--routing", "zipff"], ["zipff", "Did you mean zipf"]),
        (["bench", "--model", "mixtral-8x7b", "--ep-size", "2"], ["ep_size = 2", "does not divide"]),
        (["record", "sum_redce", "--out", "nowhere"], ["sum_redce", "Did you mean sum_reduce"]),
        (["doctor", "no/such"], ["no/such"]),
        (["doctor", "configs", "--rules", "aut"], ["Did you mean auto", "auto, moelab, sglang, vllm."]),
        *[([*needs, "--batch-size", "8"], ["--device"]) for needs in NEED_A_DEVICE if runtime.current().mode != "gpu"],
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_use_is_status_2_and_says_why(run, arguments: list[str], words: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert all(word in err for word in words), err
    assert "Traceback" not in err and "\n\n\n" not in err


def raising(error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise error

    monkeypatch.setattr(questions, "load_served", broken)


def test_interrupt_is_status_130(run, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(KeyboardInterrupt(), monkeypatch)
    status, out, err = run("shape", "--model", "mixtral-8x7b")
    assert (status, out) == (130, "") and "Traceback" not in err


def test_an_error_nobody_meant_is_not_hidden(run, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(ZeroDivisionError(), monkeypatch)
    with pytest.raises(ZeroDivisionError):
        run("shape", "--model", "mixtral-8x7b")


@pytest.mark.parametrize(
    "arguments", [["models"], ["shape", "--model", "mixtral-8x7b"], ["record", "--list"]], ids=lambda given: given[0]
)
def test_a_data_variable_that_names_no_folder(run, arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_DATA_DIR", "no/such")
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and "MOELAB_DATA_DIR is 'no/such'" in err


def test_models_of_an_empty_folder_are_none(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_DATA_DIR", str(tmp_path))
    assert run("models") == (0, "none\n", "")
    assert run("models", "--json") == (0, "[]\n", "")


# --- models and shape -----------------------------------------------------------------------------------------


def test_models_lists_every_preset(run) -> None:
    status, out, _ = run("models", "--json")
    rows = {row["preset"]: row for row in json.loads(out)}
    assert status == 0 and tuple(rows) == shapes.preset_names(quantised=True)
    scout = rows["llama-4-scout"]  # 16 routed experts: the fused shared one is serving's, not the model's
    assert (scout["E"], scout["k"], scout["H"], scout["N"]) == (16, 1, 5120, 8192)
    text = run("models")[1].splitlines()
    assert len(text) == len(rows) + 1 and text[0].split()[:5] == ["preset", "E", "k", "H", "N"]


def test_shape_of_a_shard(run) -> None:
    arguments = ("shape", "--model", "deepseek-v3", "--tp-size", "8", "--device", "NVIDIA H200")
    status, out, _ = run(*arguments, "--disable-shared-experts-fusion", "--json")
    answer = json.loads(out)
    assert status == 0
    assert (answer["num_experts"], answer["top_k"], answer["moe_intermediate_size"]) == (256, 8, 256)
    assert answer["config_file"] == "E=256,N=256,device_name=NVIDIA_H200.json"
    assert answer["config_file_down"] == "E=256,N=256,device_name=NVIDIA_H200_down.json"
    assert answer["weight_bytes"] == 256 * 3 * 256 * 7168 * 2
    assert "n_routed_experts" in answer["keys_used"]
    fused = json.loads(run(*arguments, "--json")[1])
    assert (fused["num_experts"], fused["num_shared_experts_fused"]) == (257, 1)
    assert "E=257,N=256,device_name=NVIDIA_H200.json" in run(*arguments)[1]


@pytest.mark.parametrize("command", ["shape", "explain", "bench"])
def test_help_and_error_list_the_same_dtypes(run, command: str) -> None:
    known = ", ".join(dict.fromkeys(shapes.DTYPES.values()))
    assert f"{known};" in " ".join(run(command, "--help")[1].split())
    sizes = ("--batch-size", "1") if command != "shape" else ()
    status, _, err = run(command, "--model", "mixtral-8x7b", *sizes, "--dtype", "fp8")
    assert status == 2 and f"Expected one of {known};" in err and "fp8_w8a8" in err


def test_shape_under_expert_parallelism_and_in_float32(run) -> None:
    sizes = ("--tp-size", "8", "--ep-size", "4", "--dtype", "fp32", "--device", "X")
    answer = json.loads(run("shape", "--model", "qwen3-30b-a3b", *sizes, "--json")[1])
    assert (answer["num_experts"], answer["moe_intermediate_size"]) == (32, 384)
    assert answer["config_file"] == "E=32,N=384,device_name=X,dtype=float32.json"


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="has a GPU, whose name stands in the file's")
def test_shape_without_a_device_says_that_the_name_is_a_placeholder(run) -> None:
    out = run("shape", "--model", "mixtral-8x7b")[1]
    assert "device_name=<device>.json" in out and "<device> stands for it" in out
    assert json.loads(run("shape", "--model", "mixtral-8x7b", "--json")[1])["device"] is None


def test_shape_from_a_config_json(run, tmp_path: Path) -> None:
    config = {"model_type": "mixtral", "num_local_experts": 4, "num_experts_per_tok": 2, "hidden_size": 64}
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 96}))
    answer = json.loads(run("shape", "--model", str(tmp_path), "--json")[1])
    assert (answer["name"], answer["w13_shape"], answer["w2_shape"]) == (tmp_path.name, [4, 192, 64], [4, 64, 96])


# --- explain --------------------------------------------------------------------------------------------------


def test_explain_says_which_file_and_key(run) -> None:
    status, out, _ = run("explain", "--model", "qwen3-30b-a3b", "--batch-size", "20", *H200, "--json")
    answer = json.loads(out)
    assert status == 0 and not answer["is_default"] and answer["key"] == 16 and answer["problems"] == []
    assert answer["path"].endswith("triton_3_6_0/E=128,N=768,device_name=NVIDIA_H200.json")
    text = run("explain", "--model", "qwen3-30b-a3b", "--batch-size", "20", *H200)[1]
    assert "16 is the nearest to 20" in text and KernelConfig.from_json(answer["config"]).short() in text


def test_explain_says_at_once_all_that_it_lacks(run, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU and Triton it asked for the device, and on a second try for the version."""
    monkeypatch.setattr(runtime, "gpu_name", lambda: None)
    monkeypatch.setitem(sys.modules, "triton", None)
    arguments = ["explain", "--model", "qwen3-30b-a3b", "--batch-size", "8"]
    (status, _, both), (_, _, one) = run(*arguments), run(*arguments, "--triton-version", "3.6.0")
    assert status != 0 and "--device 'NVIDIA H200', and --triton-version, the server's" in both
    assert "--device 'NVIDIA H200'.\n" in one


@pytest.mark.parametrize("batch_size", ["64", "20"])
def test_explain_does_not_compare_one_batch_size(run, batch_size: str, tmp_path: Path) -> None:
    path = tmp_path / "triton_3_6_0" / "E=8,N=14336,device_name=NVIDIA_H200.json"
    config_files.write_config_file(path, {64: KernelConfig(16, 64, 64, 1)})
    arguments = ("explain", "--model", "mixtral-8x7b", "--batch-size", batch_size, *H200, "--config-dir", str(tmp_path))
    status, out, _ = run(*arguments)
    assert status == 0 and "64 is the only batch size of that file" in out and "nearest" not in out


def test_explain_reads_the_variables_folder(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    arguments = ("explain", "--model", "mixtral-8x7b", "--batch-size", "8", *H200)
    monkeypatch.setenv("MOELAB_CONFIG_DIR", str(tmp_path))
    assert run(*arguments)[0] == 0, "an empty folder has no file"
    monkeypatch.setenv("MOELAB_CONFIG_DIR", str(tmp_path / "gone"))
    for more in ((), ("--kernel", "tma")):
        status, out, err = run(*arguments, *more)
        assert (status, out) == (2, "") and "MOELAB_CONFIG_DIR" in err and "Expected a folder" in err


def test_explain_falls_back_with_reasons(run, tmp_path: Path) -> None:
    arguments = ("explain", "--model", "mixtral-8x7b", "--batch-size", "8", *H200, "--config-dir", str(tmp_path))
    status, out, _ = run(*arguments, "--down", "--json")
    answer = json.loads(out)
    assert status == 0 and answer["is_default"] and answer["path"] is None
    assert [step["result"] for step in answer["steps"]] == ["absent", "absent", "used"]
    assert "_down.json" in answer["steps"][0]["what"]


def test_explain_finds_a_config_that_the_device_cannot_run(run, tmp_path: Path) -> None:
    huge = KernelConfig(128, 256, 128, 1, 8, 4)  # 4 buffers of 96 KiB where an H200 gives 227 KiB
    path = tmp_path / "triton_3_6_0" / "E=8,N=14336,device_name=NVIDIA_H200.json"
    config_files.write_config_file(path, {1: huge})
    arguments = ("explain", "--model", "mixtral-8x7b", "--batch-size", "8", *H200, "--config-dir", str(tmp_path))
    status, out, _ = run(*arguments)
    assert status == 1 and "problem: needs 393216 bytes of shared memory" in out
    path.write_text(path.read_text()[:-20])
    status, out, err = run(*arguments)
    assert (status, out) == (2, "") and "not strict JSON" in err and str(path) in err


# --- record ---------------------------------------------------------------------------------------------------


def small_recording(suite: str = "tiny") -> Recording:
    return Recording(suite, runtime.provenance(seed=0), {"kind": "test"}, ({"samples_us": [1.0, 2.0]},))


def test_record_writes_into_a_folder(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moelab import suites

    monkeypatch.setitem(suites.SUITES, "tiny", small_recording)
    status, out, _ = run("record", "tiny", "--out", str(tmp_path))
    assert status == 0 and str(tmp_path / "tiny.json") in out
    assert len(recordings.load(tmp_path / "tiny.json").rows) == 1


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="has a GPU, which may record in place")
def test_record_without_a_gpu_replaces_nothing(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_DATA_DIR", str(tmp_path))
    status, _, err = run("record", "sum_reduce_precision")
    assert status == 2 and "--out" in err and not list(tmp_path.iterdir())


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="has a GPU, and would measure")
def test_record_that_needs_a_gpu_offers_no_implementation(run, tmp_path: Path) -> None:
    status, _, err = run("record", "sum_reduce", "--out", str(tmp_path))
    assert status == 2 and err.endswith("Run it on a GPU node.\n") and "the suite 'sum_reduce' needs" in err


def test_record_list_shows_suites_and_broken_files(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recordings").mkdir()
    monkeypatch.setenv("MOELAB_DATA_DIR", str(tmp_path))
    recordings.write(small_recording("ceilings"))
    status, out, _ = run("record", "--list", "--json")
    rows = {row["suite"]: row for row in json.loads(out)}
    assert status == 0 and rows["ceilings"]["rows"] == 1 and "not recorded" in rows["sum_reduce"]["recording"]
    (tmp_path / "recordings" / "layer_classic.json").write_text("{")
    status, out, _ = run("record", "--list")
    assert status == 1 and "BROKEN" in out


def test_record_list_of_another_folder(run, tmp_path: Path) -> None:
    recordings.write(small_recording("ceilings"), tmp_path / "ceilings.json")
    (tmp_path / "split_k.json.partial").touch()
    status, out, _ = run("record", "--list", "--out", str(tmp_path), "--json")
    rows = {row["suite"]: row for row in json.loads(out)}
    assert status == 0 and {name for name, row in rows.items() if row["rows"]} == {"ceilings"}
    assert "tune_timeline" not in rows and rows["split_k"]["cut"] == str(tmp_path / "split_k.json.partial")
    status, out, err = run("record", "--list", "--out", str(tmp_path / "gone"))
    assert (status, out) == (2, "") and "gone" in err and "--out" in err


def test_record_into_a_place_that_cannot_be_written(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moelab import suites

    monkeypatch.setitem(suites.SUITES, "tiny", small_recording)
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file" / "below", tmp_path / "file"):
        status, _, err = run("record", "tiny", "--out", str(out))
        assert status == 2 and err.startswith(f"moelab: {out}: ") and "Errno" not in err
        assert unhelpful(err.removeprefix("moelab: ").strip()) is None and "a file is in its way" in err


@pytest.mark.parametrize(
    "error", [PermissionError(13, "Permission denied", "x.json"), OSError(28, "No space left", "x.json")]
)
def test_what_the_system_refuses_says_what_to_do(run, error: OSError, monkeypatch: pytest.MonkeyPatch) -> None:
    raising(error, monkeypatch)
    status, _, err = run("shape", "--model", "mixtral-8x7b")
    assert status == 2 and f"x.json: {error.strerror}." in err and unhelpful(err.strip()) is None
