"""Where kernels run is decided once, before triton is imported, and told with its reason."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from moelab import runtime
from moelab.errors import FolderError, RuntimeModeError

ROOT = Path(__file__).resolve().parent.parent


def run(code: str, **environment: str) -> str:
    """What a fresh Python prints, without this session's TRITON_INTERPRET."""
    clean = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    clean |= {"PYTHONPATH": str(ROOT), "CUDA_VISIBLE_DEVICES": "", **environment}
    return subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, check=True).stdout


def test_without_a_gpu_the_interpreter_is_chosen_before_triton_is_imported() -> None:
    code = "from moelab.kernels import tiles; import triton; print(triton.knobs.runtime.interpret)"
    assert run(code).strip() == "True"


def test_an_explicit_choice_is_obeyed() -> None:
    code = "from moelab import runtime; print(runtime.current().mode)"
    assert run(code, TRITON_INTERPRET="1").strip() == "interpreter"
    assert run(code, TRITON_INTERPRET="0").strip() == "none"


def test_triton_imported_first_leaves_no_kernels_and_says_so() -> None:
    code = (
        "import triton\nfrom moelab import runtime\nfrom moelab.errors import RuntimeModeError\n"
        "try: runtime.require_kernels()\nexcept RuntimeModeError as e: print(e)"
    )
    printed = run(code)
    assert "triton was imported before moelab" in printed and "TRITON_INTERPRET=1" in printed


@pytest.mark.skipif(runtime.current().mode != "interpreter", reason="about the interpreter")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float8_e4m3fn])
def test_dtypes_that_the_interpreter_gets_wrong_are_refused(dtype: torch.dtype) -> None:
    with pytest.raises(RuntimeModeError, match="wrong numbers"):
        runtime.require_kernels(dtype)
    for fine in (torch.float16, torch.float32, torch.float64):
        assert runtime.require_kernels(fine).mode == "interpreter"


def test_keys_are_spelled_as_config_files_spell_them() -> None:
    assert runtime.device_key("NVIDIA H100 80GB HBM3") == "NVIDIA_H100_80GB_HBM3"
    assert runtime.triton_key("3.6.0+git8a1c2d3") == "triton_3_6_0"
    assert runtime.triton_key("3.5.1") == "triton_3_5_1"


def test_provenance_names_what_a_recording_needs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_GIT_COMMIT", "abc123")
    found = runtime.provenance(seed=7)
    assert found["git_commit"] == "abc123" and found["seed"] == 7 and found["torch"] == torch.__version__
    assert len(found["date"].split("-")) == 3


def test_folders_are_the_checkouts_unless_overridden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("MOELAB_DATA_DIR", raising=False)
    assert runtime.data_dir() == ROOT / "data"
    monkeypatch.setenv("MOELAB_DATA_DIR", str(tmp_path))
    assert runtime.data_dir() == tmp_path


@pytest.mark.parametrize("find", [runtime.data_dir, runtime.config_dir])
def test_a_variable_that_names_no_folder_is_refused(find, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    variable = {"data_dir": "MOELAB_DATA_DIR", "config_dir": "MOELAB_CONFIG_DIR"}[find.__name__]
    (tmp_path / "file").touch()
    for named, there in {
        str(tmp_path / "gone"): "nothing",
        str(tmp_path / "file"): "a file",
        "~nobody/x": "nothing",
    }.items():
        monkeypatch.setenv(variable, named)
        with pytest.raises(FolderError, match=f"{variable} is '{named}', where there is {there}"):
            find()
    for empty in (str(tmp_path), ""):
        monkeypatch.setenv(variable, empty)
        assert find() == (tmp_path if empty else ROOT / find.__name__.replace("_dir", "").replace("config", "configs"))


def test_a_folder_to_write_to_need_not_be_there(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("MOELAB_CONFIG_DIR", str(tmp_path / "new"))
    assert runtime.config_dir(to_write=True) == tmp_path / "new"


@pytest.fixture
def two_kinds(monkeypatch: pytest.MonkeyPatch):
    """A machine with an H200 as cuda:0 and an RTX 6000 Ada as cuda:1; switch(index) makes one the current device."""
    from moelab import chips

    found = [
        SimpleNamespace(name="NVIDIA H200", major=9, minor=0, shared_memory_per_block_optin=232448, warp_size=32),
        SimpleNamespace(
            name="NVIDIA RTX 6000 Ada", major=8, minor=9, shared_memory_per_block_optin=101376, warp_size=32
        ),
    ]
    at = [0]
    monkeypatch.setattr(runtime, "prepare_triton", lambda: runtime.Runtime("gpu", "cuda", found[0].name, "pretended"))
    monkeypatch.setattr(torch.cuda, "current_device", lambda: at[0])
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda index=None: found[at[0] if index is None else index]
    )
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index=None: found[at[0] if index is None else index].name)
    cached = runtime._named, chips.gpu_target
    for kept in cached:
        kept.cache_clear()
    yield lambda index: at.__setitem__(0, index)
    for kept in cached:
        kept.cache_clear()


def test_the_current_device_is_the_one_that_is_asked(two_kinds, monkeypatch: pytest.MonkeyPatch) -> None:
    """cuda:1 of another kind was named and checked by cuda:0, which had been asked first."""
    from moelab.config import KernelConfig
    from moelab.errors import SharedMemoryError
    from moelab.kernels import checks
    from moelab.pipelines import call_configs, fast

    asked: list[str] = []

    def no_file(experts: int, size: int, device: str, **rest: object) -> SimpleNamespace:
        asked.append(device)
        return SimpleNamespace(is_default=True, config=None)

    monkeypatch.setattr(call_configs, "lookup", no_file)
    large = KernelConfig(128, 128, 128, 1, num_warps=8, num_stages=3)  # 128 KiB on sm_89, 192 on sm_90
    for index, name, target in (
        (0, "NVIDIA H200", "sm_90"),
        (1, "NVIDIA RTX 6000 Ada", "sm_89"),
        (0, "NVIDIA H200", "sm_90"),
    ):
        two_kinds(index)
        assert runtime.current().device_name == name and runtime.device_key() == name.replace(" ", "_")
        assert runtime.provenance()["gpu"] == fast.here()[0] == name
        call_configs.tuned_configs(3, 48, "float16", 7)
        assert asked[-1] == name or index == 0
        found = checks.current_target()
        assert found is not None and found.name == target
        if index == 0:
            assert checks.checked_config(large, torch.float16) is large
        else:
            with pytest.raises(SharedMemoryError, match="sm_89"):
                checks.checked_config(large, torch.float16)


def test_the_gpu_is_named_by_the_driver_without_torch() -> None:
    code = "import sys; from moelab import runtime; print(runtime.gpu_name(), 'torch' in sys.modules)"
    assert run(code, TRITON_INTERPRET="1").split() == ["None", "False"]
    if runtime.current().mode != "gpu":
        assert run(code).split() == ["None", "False"]


@pytest.mark.parametrize(
    ("failing", "expected"), [(None, "NVIDIA H200"), ("cuInit", None), ("cuDeviceGet", None), ("cuDeviceGetName", None)]
)
def test_what_the_driver_answers(failing: str | None, expected: str | None) -> None:
    def named(buffer: object, length: int, device: object) -> int:
        buffer.value = b"NVIDIA H200"[:length]  # type: ignore[attr-defined]
        return 0

    driver = {"cuInit": lambda flags: flags, "cuDeviceGet": lambda device, ordinal: ordinal, "cuDeviceGetName": named}
    if failing:
        driver[failing] = lambda *_: 100  # CUDA_ERROR_NO_DEVICE
    assert runtime._name_by_driver(SimpleNamespace(**driver)) == expected


@pytest.mark.parametrize(
    ("variables", "below"),
    [
        ({}, None),
        ({"SERVER_SOFTWARE": "nginx"}, None),
        ({"SERVER_SOFTWARE": "voila/0.5.13"}, runtime.repo_root() / "tuned"),
        ({"MOELAB_APP_FOLDER": "/srv/app"}, Path("/srv/app")),
        ({"MOELAB_APP_FOLDER": "/srv/app", "SERVER_SOFTWARE": "voila/0.5.13"}, Path("/srv/app")),
    ],
)
def test_where_an_app_may_write(variables: dict, below: Path | None, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("MOELAB_APP_FOLDER", "SERVER_SOFTWARE"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert runtime.app_folder() == below
