"""What `moelab serve-bench` takes and refuses: models, layers, memory, and the command itself, on a tiny model on the CPU."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from tiny_serving import CONFIG, DEVICE, QUICK, a_file, alone

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
from moelab.serving import coded, model, suite
from moelab.suites.partial import keeper

transformers = pytest.importorskip("transformers", reason="transformers is not installed")


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    yield from alone()


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return a_file(tmp_path_factory.mktemp("tiny"))


IN_BLOCKS = {"quant_method": "fp8", "activation_scheme": "dynamic", "weight_block_size": [8, 8]}


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        (
            {"num_attention_heads": None, "vocab_size": None},
            ConfigFileError,
            "num_attention_heads, vocab_size.*defaults",
        ),
        ({"num_key_value_heads": None}, ConfigFileError, "num_key_value_heads or kv_lora_rank"),
        ({"quantization_config": {"quant_method": "fp8"}}, FormatError, "fp8_w8a8_tensor .fp8.*fp8 in blocks"),
        ({"quantization_config": {**IN_BLOCKS, "scale_fmt": "ue8m0"}}, FormatError, "_ue8m0 .*float32 scales"),
        ({"quantization_config": {"quant_method": "mxfp4"}}, FormatError, "mxfp4_w4a16.*in bfloat16"),
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


def test_a_preset_in_fp8_has_the_codes_of_its_experts_and_nothing_else_in_fp8() -> None:
    found = model.read_config("qwen3-30b-a3b-fp8", 2)
    plain = model.weight_bytes(model.read_config("qwen3-30b-a3b", 2), torch.bfloat16)
    codes = 128 * 3 * 2048 * 768
    saved = codes - 4 * codes // 128**2
    sizes = model.weight_bytes(found, torch.bfloat16)
    assert (plain["all"] - sizes["all"], plain["last layer"] - sizes["last layer"]) == (2 * saved, saved)


def test_experts_that_are_plain_in_a_quantised_checkpoint_are_plain(tmp_path: Path) -> None:
    ignored = {**IN_BLOCKS, "modules_to_not_convert": ["re:.*experts.*"]}
    assert coded.kept("it", {"quantization_config": ignored}, CONFIG) is None


def test_a_transformers_without_fp8_experts_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(coded.hf_fp8, "interface", lambda: None)
    with pytest.raises(FormatError, match=f"transformers {transformers.__version__} has no FP8ExpertsInterface"):
        model.read_config({**CONFIG, "quantization_config": IN_BLOCKS})


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
