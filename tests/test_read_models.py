"""What stands in a model's or a device's file is checked before it is believed: kinds, ranges, depth, special files."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from moelab import presets, roofline, runtime, shapes
from moelab.errors import ConfigFileError, DeviceFileError, UnknownArchitectureError

GOOD = json.loads((runtime.data_dir() / "models" / "deepseek-v3.json").read_text())
FUSES = GOOD | {"torch_dtype": "float16"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"mlp_layer_types": [[1]]}, "mlp_layer_types"),
        ({"torch_dtype": 5}, "holds 5 at torch_dtype"),
        ({"torch_dtype": []}, "torch_dtype"),
        ({"dtype": ""}, "dtype"),
        ({"dtype": "bfloat16", "torch_dtype": "x"}, "holds 'x' at torch_dtype"),
        ({"n_shared_experts": True}, "holds True at n_shared_experts"),
        ({"n_shared_experts": 8.0}, "holds 8.0 at n_shared_experts"),
        ({"n_shared_experts": -1}, "n_shared_experts"),
        ({"n_routed_experts": 10**30}, "n_routed_experts is beyond"),
        ({"hidden_size": 10**400}, "hidden_size is beyond"),
        ({"num_hidden_layers": 10**9}, "num_hidden_layers"),
        ({"architectures": "DeepseekV3ForCausalLM"}, "architectures"),
        ({"quantization_config": "fp8"}, "quantization_config"),
        ({"quantization_config": {"quant_method": "fp8", "ignored_layers": "lm_head"}}, "ignored_layers"),
        ({"quantization_config": {"quant_method": "fp8", "ignore": ["*" + "[" * 100_000]}}, "at most 1000 characters"),
    ],
)
def test_a_value_of_another_kind_is_refused(change: dict, words: str) -> None:
    with pytest.raises(UnknownArchitectureError, match=words):
        shapes.load_served(a_file(FUSES | change))


def test_a_dtype_around_the_section_of_the_experts_is_looked_at() -> None:
    around = json.loads((runtime.data_dir() / "models" / "llama-4-scout.json").read_text())
    with pytest.raises(UnknownArchitectureError, match="'x' at torch_dtype"):
        shapes.load_served(a_file(around | {"torch_dtype": "x"}))


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def a_file(content: object) -> Path:
    path = Path("config.json")
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[" * 100_000, "nested deeper"),
        (json.dumps(GOOD)[:-1] + ', "n_routed_experts": 64}', "'n_routed_experts' twice"),
        (json.dumps(GOOD).replace("7168", "9" * 5000), "number out of range"),
        (json.dumps(GOOD).replace("silu", "\\ud800"), "not strict JSON"),
        (json.dumps(GOOD).replace("7168", "NaN"), "NaN"),
    ],
)
def test_a_document_that_is_no_strict_json_is_refused(text: str, words: str) -> None:
    with pytest.raises(ConfigFileError, match=words):
        shapes.load_served(a_file(text))


def test_what_is_no_file_is_no_model() -> None:
    os.mkfifo("fifo.json")
    Path("zeros.json").symlink_to("/dev/zero")
    Path("vast.json").touch()
    os.truncate("vast.json", 1 << 40)
    for name, words in {"fifo": "a FIFO", "zeros": "a device", "vast": "over the"}.items():
        with pytest.raises(ConfigFileError, match=words):
            shapes.load_served(Path(f"{name}.json"))


@pytest.mark.parametrize("content", ["[" * 100_000, "[]", "{", '{"source": 5'])
def test_a_broken_preset_hides_no_other(content: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run) -> None:
    models = tmp_path / "data" / "models"
    models.mkdir(parents=True)
    shutil.copy(runtime.data_dir() / "models" / "mixtral-8x7b.json", models)
    (models / "zz.json").write_text(content)
    monkeypatch.setenv("MOELAB_DATA_DIR", str(models.parent))
    assert presets.preset_names() == ("mixtral-8x7b",) and list(presets.broken_presets()) == ["zz"]
    assert shapes.load_model("mixtral-8x7b").num_experts == 8
    with pytest.raises(ConfigFileError, match=r"zz\.json"):
        shapes.load_model("zz")
    status, out, err = run("models")
    assert status == 0 and "mixtral-8x7b" in out and "left out zz" in err


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ([], "should be a valid dictionary"),
        ({}, "has no"),
        ({"SMs": -1}, "SMs"),
        ({"SMs": True}, "SMs"),
        ({"target": "sm_9"}, "'sm_9' at target"),
        ({"device": "NVIDIA H100"}, "is of 'NVIDIA H100'"),
        ({"more": 1}, "the field more"),
        ({"ceilings": {"measured": {"copy_bytes_per_s": -1.0, "flops_per_s": {}, "source": "x"}}}, "copy_bytes_per_s"),
    ],
)
def test_a_device_file_is_checked(
    change: object, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, run
) -> None:
    good = json.loads((runtime.data_dir() / "devices" / "NVIDIA_H200.json").read_text())
    (tmp_path / "data" / "devices").mkdir(parents=True)
    content = good | change if isinstance(change, dict) and change else change
    (tmp_path / "data" / "devices" / "NVIDIA_H200.json").write_text(json.dumps(content))
    monkeypatch.setenv("MOELAB_DATA_DIR", str(tmp_path / "data"))
    with pytest.raises(DeviceFileError, match=words):
        roofline.load_ceilings("NVIDIA H200")
