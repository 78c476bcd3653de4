"""What `moelab serve-bench` takes and refuses: models, layers, memory, and the command itself, on a tiny model on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_serving import DEVICE, QUICK, a_file, alone

from moelab import recordings, runtime
from moelab.errors import (
    ConfigFileError,
    FormatError,
    MoelabError,
    OptionError,
    RuntimeModeError,
    UnknownArchitectureError,
    UnknownNameError,
)
from moelab.serving import model, suite
from moelab.suites.partial import keeper

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    yield from alone()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_file(tmp_path_factory.mktemp("tiny"))


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"num_attention_heads": None, "vocab_size": None},
            ConfigFileError,
            "num_attention_heads, vocab_size.*defaults",
        ),
        ({"num_key_value_heads": None}, ConfigFileError, "num_key_value_heads or kv_lora_rank"),
        ({"quantization_config": {"quant_method": "fp8"}}, FormatError, "registries of their own"),
        ({"num_experts": None, "num_experts_per_tok": None}, UnknownArchitectureError, "num_experts"),
        ({"architectures": None, "model_type": "qwen3_mo"}, UnknownArchitectureError, "Did you mean qwen3_moe"),
    ],
)
def test_a_config_that_no_model_can_be_made_of(
    tmp_path: Path, changes: dict, error: type[MoelabError], words: str
) -> None:
    with pytest.raises(error, match=words):
        model.read_config(a_file(tmp_path, **changes))


def test_the_presets_that_name_the_whole_model() -> None:
    found = model.read_config("qwen3-30b-a3b")
    assert (found.num_attention_heads, found.num_key_value_heads, found.head_dim, found.vocab_size) == (
        32,
        4,
        128,
        151936,
    )
    assert found.rope_parameters["rope_theta"] == 1e6 and found.norm_topk_prob is True
    assert model.weight_bytes(found, torch.bfloat16)["all"] == 2 * 30_532_122_624, "as its card says: 30.5B"
    with pytest.raises(ConfigFileError, match="as it was published"):
        model.read_config("mixtral-8x22b")


def test_the_first_layers_alone(config: Path) -> None:
    assert model.read_config(config, 2).num_hidden_layers == 2
    kinds = ["conv", "full_attention", "conv"]
    mixed = transformers.AutoConfig.for_model("lfm2_moe", num_hidden_layers=3, layer_types=kinds)
    assert model.cut(mixed, 2).layer_types == kinds[:2]
    with pytest.raises(OptionError, match="Expected 1 to 3"):
        model.read_config(config, 4)
    dense = model.read_config("glm-4.5-air", 1)
    dense.update(
        {"hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2, "head_dim": 16, "vocab_size": 64}
    )
    with pytest.raises(UnknownNameError, match="no experts"):
        model.build(dense, DEVICE, torch.float32)


def test_no_room_says_how_many_layers_fit(config: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = model.read_config(config)
    sizes = model.weight_bytes(found, torch.float32)
    for short, words in (
        (1, "--layers 2,"),
        (sizes["last layer"] + 1, "--layers 1,"),
        (sizes["all"], "Not one layer fits"),
    ):
        monkeypatch.setattr(model, "free_bytes", lambda _, short=short: (sizes["all"] - short) / (1 - model.SPARE))
        with pytest.raises(RuntimeModeError, match=words):
            model.build(found, DEVICE, torch.float32)
    monkeypatch.setattr(model, "free_bytes", lambda _: sizes["all"] / (1 - model.SPARE) + 1)
    model.require_room(found, DEVICE, torch.float32)


SMALL = (
    "--dtype",
    "float32",
    "--experts",
    "eager",
    "--decode",
    "1",
    "--prefill",
    "1x4",
    "--context",
    "4",
    "--requests",
    "0",
)


def test_the_command_prints_and_writes(run, config: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(suite, "Protocol", lambda: QUICK)
    out = tmp_path / "a.json"
    status, printed, told = run("serve-bench", "--model", str(config), *SMALL, "--layers", "1", "--out", str(out))
    assert status == 0 and "decode 1x4" in printed and "wrote" in told and "1 layers" in told
    assert recordings.load(out).rows and [path.name for path in tmp_path.iterdir()] == ["a.json"]
    status, again, _ = run("serve-bench", "--replay", str(out))
    assert status == 0 and again == printed, "as it was printed, and without a model made"
    status, _, told = run("serve-bench", "--replay", str(out), "--model", "mixtral-8x7b")
    assert status == 2 and "with that model" in told
    status, _, told = run("serve-bench")
    assert status == 2 and "--replay" in told
    keeper("serve_bench", out)(recordings.load(out).rows[:3])
    status, again, _ = run("serve-bench", "--replay", f"{out}.partial")
    assert status == 0 and "decode 1x4" in again
    Path(f"{out}.partial").unlink()
    status, printed, _ = run("serve-bench", "--model", str(config), *SMALL, "--limit", "1", "--json")
    assert status == 0 and set(json.loads(printed)) == {"source", "protocol", "times", "serving", "errors", "verdicts"}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (("--prefill", "4*2048"), "no batch and length"),
        (("--rate", "0"), "no rate"),
        (("--rate", "fast"), "no rate"),
        (("--routing", "even"), "Unknown routing"),
        (("--experts", "fast"), "Unknown implementation"),
        (("--dtype", "int8"), "no dtype of weights"),
        (("--tree", "nowhere"), "holds no config file"),
    ],
)
def test_bad_options_are_named(run, config: Path, options: tuple[str, ...], words: str) -> None:
    status, _, told = run("serve-bench", "--model", str(config), *SMALL, *options)
    assert status == 2 and words in " ".join(told.split())


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="has a GPU, and would measure")
def test_the_suite_needs_a_gpu() -> None:
    with pytest.raises(RuntimeModeError, match="'serve_bench' needs an NVIDIA GPU"):
        suite.record()


# --- the path of a GPU, with stand-ins for its graphs, streams and events ----------------------------------------------------
