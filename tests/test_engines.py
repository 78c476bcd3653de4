"""The engines' plugins where no engine is installed; with them, tests/test_engine_sglang.py and tests/test_engine_vllm.py."""

from __future__ import annotations

import importlib
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import torch

from moelab.engines import checks, sglang, vllm
from moelab.errors import ConfigError, LayoutError, RuntimeModeError, UnknownNameError

ROOT = Path(__file__).resolve().parent.parent


def installed(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    monkeypatch.setattr("importlib.metadata.version", lambda name: version)


def test_the_version_that_was_read_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    for engine, version in checks.READ.items():
        for build in (version, f"{version}+cu129"):
            installed(monkeypatch, build)
            checks.require_read(engine)


@pytest.mark.parametrize("version", ["0.5.22", "0.5.24", "0.5.23rc1", "0.5.23.post1"])
def test_another_version_is_refused_until_its_user_answers_for_it(
    monkeypatch: pytest.MonkeyPatch, version: str
) -> None:
    installed(monkeypatch, version)
    for answered in ("", "sglang==0.5.23", f"vllm=={version}"):
        monkeypatch.setenv(checks.TRUST, answered)
        with pytest.raises(RuntimeModeError, match=f"sglang {version} .* MOELAB_TRUST_ENGINE=sglang=={version}"):
            checks.require_read("sglang")
    monkeypatch.setenv(checks.TRUST, f"sglang=={version}")
    checks.require_read("sglang")


def test_pins_are_the_versions_that_were_read() -> None:
    for engine, version in checks.READ.items():
        assert f"{engine}=={version}\n" in (ROOT / f"tests/engines/{engine}.txt").read_text()
        assert f"{engine} {version}" in (ROOT / "docs/engines.md").read_text().lower()


def test_entry_points_lead_to_the_plugins() -> None:
    groups = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
    found = {}
    for group in ("sglang.srt.plugins", "vllm.general_plugins"):
        module, name = groups[group]["moelab"].split(":")
        found[group] = getattr(importlib.import_module(module), name)
    assert found == {"sglang.srt.plugins": sglang.register, "vllm.general_plugins": vllm.register}


def test_an_engine_loads_neither_kernels_nor_notebooks_nor_the_other_engine() -> None:
    script = (
        "import sys, moelab.engines.sglang, moelab.engines.vllm; print(*{name.split('.')[0] for name in sys.modules})"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, cwd=ROOT)
    assert not {"triton", "plotly", "pandas", "ipywidgets", "jupyterlab", "IPython", "ray", "sglang", "vllm"} & set(
        done.stdout.split()
    )


@pytest.fixture()
def without_engines(monkeypatch: pytest.MonkeyPatch) -> None:
    def version(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr("importlib.metadata.version", version)
    monkeypatch.delenv(checks.CHOICE, raising=False)


def test_vllm_is_left_alone_until_the_variable_asks(without_engines: None, monkeypatch: pytest.MonkeyPatch) -> None:
    vllm.register()
    monkeypatch.setenv(checks.CHOICE, checks.AUTO)
    with pytest.raises(RuntimeModeError, match="vllm is not installed here"):
        vllm.register()


def test_sglang_is_left_alone_with_a_warning(without_engines: None, caplog: pytest.LogCaptureFixture) -> None:
    sglang.register()
    assert "No --moe-runner-backend moelab: sglang is not installed here" in caplog.text


def test_an_unknown_implementation_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(checks.CHOICE, "fasst")
    with pytest.raises(UnknownNameError, match=r"'fasst'.*fast"):
        vllm.register()


def weights(device: str = "cpu") -> tuple[torch.Tensor, torch.Tensor]:
    return torch.empty(4, 64, 32, dtype=torch.bfloat16, device=device), torch.empty(
        4, 32, 32, dtype=torch.bfloat16, device=device
    )


def test_the_implementation_is_the_one_asked_for(monkeypatch: pytest.MonkeyPatch) -> None:
    for asked, expected in (("", "torch"), ("auto", "torch"), ("triton", "triton"), (" compiled ", "compiled")):
        monkeypatch.setenv(checks.CHOICE, asked)
        assert checks.implementation(*weights(), "silu", True) == expected


def test_what_waits_for_the_host_is_refused_off_the_cpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(checks.CHOICE, "torch")
    with pytest.raises(ConfigError, match="MOELAB_EXPERTS=torch was asked for a CUDA graph"):
        checks.implementation(*weights("meta"), "silu", True)


def test_weights_in_another_order_are_refused() -> None:
    w13, w2 = weights()
    with pytest.raises(LayoutError, match="w13 has shape"):
        checks.implementation(w13.mT.contiguous().mT, w2, "silu", True)


def test_global_ids_become_this_ranks() -> None:
    ids = torch.tensor([[0, 3], [-1, 2]], dtype=torch.int32)
    held = torch.tensor([-1, -1, 0, 1], dtype=torch.int32)
    assert vllm.local_ids(ids, held).tolist() == [[-1, 1], [-1, 0]]
    assert vllm.local_ids(ids, None) is ids


def test_an_expert_is_expected_to_get_its_share_of_the_models_rows() -> None:
    ids = torch.zeros(6, 4, dtype=torch.int32)
    assert checks.expected_rows(ids, 48) == 0.5 and checks.expected_rows(ids, 2) == 6
    assert checks.expected_rows(ids, None) is checks.expected_rows(ids, -1) is checks.expected_rows(ids[:0], 8) is None
