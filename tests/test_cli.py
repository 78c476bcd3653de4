"""The command line: what it prints, where, and with which exit status."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from moelab import cli, config_files, recordings, roofline, runtime, shapes
from moelab.config import KernelConfig
from moelab.measure import Measurement
from moelab.recordings import Recording

ROOT = Path(__file__).resolve().parent.parent
H200 = ("--device", "NVIDIA H200", "--triton-version", "3.6.0")


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]):
    """run(*arguments) -> (exit status, stdout, stderr)."""

    def call(*arguments: str) -> tuple[int, str, str]:
        status = cli.main(list(arguments))
        return status, *capsys.readouterr()

    return call


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT, timeout=60)


# --- the whole ------------------------------------------------------------------------------------------------


def test_python_m_moelab() -> None:
    from moelab import __version__

    done = python("-m", "moelab", "--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"moelab {__version__}\n", "")


@pytest.mark.parametrize("command", [["--help"], ["models"], ["shape", "--help"], ["bench", "--help"]])
def test_light_commands_load_nothing_heavy(command: list[str]) -> None:
    script = f"import sys; from moelab.cli import main; main({command!r}); print(*sys.modules, file=sys.stderr)"
    done = python("-c", script)
    assert done.stdout and done.returncode == 0
    assert not {"torch", "triton", "plotly", "pandas", "numpy"} & set(done.stderr.split())


def test_help_names_every_command(run) -> None:
    status, out, _ = run("--help")
    assert status == 0
    assert all(f"  {name} " in out for name in ("models", "shape", "explain", "tune", "bench", "record"))


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
        # what a room refuses
        (["shape", "--model", "qwen3-30b"], ["qwen3-30b-a3b", "Did you mean"]),
        (["shape", "--model", "mixtral-8x7b", "--tp-size", "3"], ["does not divide", "2, 4"]),
        (["shape", "--model", "mixtral-8x7b", "--dtype", "fp12"], ["fp12", "bfloat16"]),
        (["shape", "--model", "mixtral-8x7b", "--device", "a,b"], ["a,b", "device name"]),
        (["explain", "--model", "mixtral-8x7b", "--batch-size", "1", *H200, "--rules", "moelabs"], ["moelabs"]),
        (["bench", "--model", "mixtral-8x7b", "--impl", "tritn"], ["tritn", "Did you mean triton"]),
        (["record", "sum_redce", "--out", "nowhere"], ["sum_redce", "Did you mean sum_reduce"]),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_bad_use_is_status_2_and_says_why(run, arguments: list[str], words: list[str]) -> None:
    status, out, err = run(*arguments)
    assert (status, out) == (2, "")
    assert all(word in err for word in words), err
    assert "Traceback" not in err and "\n\n\n" not in err


def test_interrupt_is_status_130(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(shapes, "load_model", interrupted)
    status, out, err = run("shape", "--model", "mixtral-8x7b")
    assert (status, out) == (130, "") and "Traceback" not in err


def test_an_error_nobody_meant_is_not_hidden(run, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*_: object, **__: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr(shapes, "load_model", broken)
    with pytest.raises(ZeroDivisionError):
        run("shape", "--model", "mixtral-8x7b")


# --- models and shape -----------------------------------------------------------------------------------------


def test_models_lists_every_preset(run) -> None:
    status, out, _ = run("models", "--json")
    rows = {row["preset"]: row for row in json.loads(out)}
    assert status == 0 and tuple(rows) == shapes.preset_names()
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
    assert (status, out) == (2, "") and "not JSON" in err and str(path) in err


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="has a GPU to look up configs for")
def test_explain_needs_a_device(run) -> None:
    status, _, err = run("explain", "--model", "mixtral-8x7b", "--batch-size", "8")
    assert status == 2 and "--device" in err


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


def test_record_into_a_place_that_cannot_be_written(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from moelab import suites

    monkeypatch.setitem(suites.SUITES, "tiny", small_recording)
    (tmp_path / "file").write_text("")
    status, _, err = run("record", "tiny", "--out", str(tmp_path / "file" / "below"))
    assert status == 2 and err.startswith("moelab: ") and "file" in err


# --- bench ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="has a GPU, and would measure")
def test_bench_without_a_gpu_points_to_recordings(run) -> None:
    status, out, err = run("bench", "--model", "qwen3-30b-a3b", "--batch-size", "1")
    assert (status, out) == (2, "")
    assert "layer_classic" in err and "moelab record --list" in err and "Expected a GPU" in err


def test_bench_rows_say_who_ties_and_who_was_not_timed() -> None:
    from moelab.suites import bench

    def measured(name: str, start: float) -> Measurement:
        return Measurement(name, tuple(start + i / 10 for i in range(25)))

    impls = ("torch", "compiled", "triton", "mine")
    found = {"compiled": measured("compiled", 20.0), "triton": measured("triton", 10.0), "mine": measured("mine", 10.3)}
    errors = {name: {"max_abs_error": 0.5, "rel_error": 0.1} for name in impls}
    rows = bench.rows_of(impls, errors, found, floor=5.6)
    assert [row["impl"] for row in rows] == ["triton", "mine", "compiled", "torch"]
    assert [row.get("tie") for row in rows] == [False, True, False, None]
    assert rows[0]["floor_fraction"] == pytest.approx(0.5) and rows[0]["median_us"] == pytest.approx(11.2)
    assert "not timed" in rows[3]["note"] and "CUDA graph" in rows[3]["note"] and "median_us" not in rows[3]
    assert bench.rows_of(impls, errors, found, floor=None)[0]["floor_fraction"] is None


def test_bench_prints_floor_configs_ties_and_notes(capsys: pytest.CaptureFixture[str]) -> None:
    from moelab.cli import printing
    from moelab.suites import bench

    shape = shapes.preset("qwen3-30b-a3b")
    found = {name: Measurement(name, tuple(10 + i / 10 for i in range(25))) for name in ("triton", "compiled")}
    errors = {name: {"max_abs_error": 0.003, "rel_error": 0.1} for name in (*found, "torch")}
    rows = tuple(bench.rows_of(list(errors), errors, found, 5.6))
    used = config_files.lookup(128, 768, "NVIDIA H200", num_tokens=16, triton_version="3.6.0")
    printing.print_bench(shape, bench.Result(16, 5.6, "somebody", used, used, rows))
    lines = capsys.readouterr().out.splitlines()
    assert "qwen3-30b-a3b" in lines[0] and "16 tokens: floor 5.60 us" in lines[0]
    assert used.config is not None and used.config.short() in lines[1] and "GEMM2" in lines[2]
    assert [line.split()[0] for line in lines[3:7]] == ["impl", "triton", "compiled", "torch"]
    assert "11.20" in lines[4] and "50%" in lines[4] and "tie" not in lines[4]
    assert "tie with the fastest" in lines[5] and "not timed" in lines[6]


def test_bench_floor_of_a_known_and_of_an_unknown_device() -> None:
    from moelab.suites import bench

    cost = roofline.layer_cost(shapes.preset("qwen3-30b-a3b"), 1)
    floor, source = bench.floor_of(cost, "bfloat16", "NVIDIA H200")
    assert floor == pytest.approx(17.559456744186047)  # sglang's row in data/upstream/h200_sglang.json
    assert "NVIDIA H200" in source
    assert bench.floor_of(cost, "bfloat16", "Abacus 9")[0] is None
    assert bench.floor_of(cost, "float64", "NVIDIA H200")[0] is None  # no such ceiling among `floors`


@pytest.mark.gpu
def test_bench_on_a_gpu(run) -> None:
    arguments = ("bench", "--model", "qwen3-30b-a3b", "--tp-size", "4", "--batch-size", "1", "--batch-size", "16")
    status, out, err = run(*arguments, "--json")
    results = json.loads(out)
    assert status == 0, err
    assert [result["num_tokens"] for result in results] == [1, 16]
    for result in results:
        rows = {row["impl"]: row for row in result["rows"]}
        assert rows["triton"]["low_us"] <= rows["triton"]["median_us"] <= rows["triton"]["high_us"]
        assert "not timed" in rows["torch"]["note"] and rows["torch"]["max_abs_error"] > 0
    assert "tokens: floor" in run(*arguments[:-2])[1]
