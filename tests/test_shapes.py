"""MoEShape: sizes, shards, presets, and how a model is found."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from moelab import presets
from moelab.errors import ConfigFileError, DtypeError, ShapeError, ShardError, UnknownModelError
from moelab.presets import published_as
from moelab.runtime import data_dir
from moelab.shapes import MoEShape, dtype_name, load_model, preset, preset_names

DEEPSEEK = {
    "architectures": ["DeepseekV3ForCausalLM"],
    "n_routed_experts": 256,
    "n_shared_experts": 1,
    "num_experts_per_tok": 8,
    "hidden_size": 7168,
    "moe_intermediate_size": 2048,
    "intermediate_size": 18432,
    "hidden_act": "silu",
    "torch_dtype": "bfloat16",
}


def e_k_h_n(shape: MoEShape) -> tuple[int, int, int, int]:
    return (shape.num_experts, shape.top_k, shape.hidden_size, shape.moe_intermediate_size)


# --- The four shapes that everything here is measured on.
@pytest.mark.parametrize(
    ("model", "tp_size", "expected"),
    [
        ("qwen3-30b-a3b", 1, (128, 8, 2048, 768)),
        ("llama-4-scout", 4, (16, 1, 5120, 2048)),
        ("lfm2-8b-a1b", 1, (32, 4, 2048, 1792)),
        ("deepseek-v3", 8, (256, 8, 7168, 256)),
    ],
)
def test_the_four_shapes(model: str, tp_size: int, expected: tuple[int, int, int, int]) -> None:
    shape = load_model(model, tp_size=tp_size, disable_shared_experts_fusion=True)
    assert e_k_h_n(shape) == expected
    assert (shape.tp_size, shape.dtype, shape.activation, shape.gated) == (tp_size, "bfloat16", "silu", True)


# --- Presets. E, k, H, N of the whole model, fusion off, as its maker publishes them.
PRESETS = {
    "dbrx": (16, 4, 6144, 10752),
    "deepseek-v2": (160, 6, 5120, 1536),
    "deepseek-v2-lite": (64, 6, 2048, 1408),
    "deepseek-v3": (256, 8, 7168, 2048),
    "ernie-4.5-21b-a3b": (64, 6, 2560, 1536),
    "glm-4.5": (160, 8, 5120, 1536),
    "glm-4.5-air": (128, 8, 4096, 1408),
    "gpt-oss-120b": (128, 4, 2880, 2880),
    "gpt-oss-20b": (32, 4, 2880, 2880),
    "granite-3.0-3b-a800m": (40, 8, 1536, 512),
    "grok-2": (8, 2, 8192, 16384),
    "hunyuan-a13b": (64, 8, 4096, 3072),
    "hy3": (192, 8, 4096, 1536),
    "jamba-v0.1": (16, 2, 4096, 14336),
    "kimi-k2": (384, 8, 7168, 2048),
    "kimi-vl-a3b": (64, 6, 2048, 1408),
    "lfm2-24b-a2b": (64, 4, 2048, 1536),
    "lfm2-8b-a1b": (32, 4, 2048, 1792),
    "ling-mini-2.0": (256, 8, 2048, 512),
    "llama-4-maverick": (128, 1, 5120, 8192),
    "llama-4-scout": (16, 1, 5120, 8192),
    "minimax-m2": (256, 8, 3072, 1536),
    "minimax-text-01": (32, 2, 6144, 9216),
    "mixtral-8x22b": (8, 2, 6144, 16384),
    "mixtral-8x7b": (8, 2, 4096, 14336),
    "nemotron-3-nano-30b-a3b": (128, 6, 2688, 1856),
    "olmoe-1b-7b": (64, 8, 2048, 1024),
    "phi-3.5-moe": (16, 2, 4096, 6400),
    "qwen1.5-moe-a2.7b": (60, 4, 2048, 1408),
    "qwen2-57b-a14b": (64, 8, 3584, 2560),
    "qwen3-235b-a22b": (128, 8, 4096, 1536),
    "qwen3-30b-a3b": (128, 8, 2048, 768),
    "qwen3-coder-480b-a35b": (160, 8, 6144, 2560),
    "qwen3-next-80b-a3b": (512, 10, 2048, 512),
    "qwen3-vl-30b-a3b": (128, 8, 2048, 768),
}


QUANTISED = {
    "deepseek-v3-fp8": ("deepseek-v3", "fp8_w8a8_block_128x128"),
    "glm-4.5-air-fp8": ("glm-4.5-air", "fp8_w8a8_channel"),
    "gpt-oss-120b-mxfp4": ("gpt-oss-120b", "mxfp4_w4a16_32"),
    "gpt-oss-20b-mxfp4": ("gpt-oss-20b", "mxfp4_w4a16_32"),
    "kimi-k2-fp8": ("kimi-k2", "fp8_w8a8_block_128x128"),
    "kimi-k2-thinking": ("kimi-k2", "int4_w4a16_group_32"),
    "llama-4-maverick-fp8": ("llama-4-maverick", "fp8_w8a8_channel"),
    "minimax-m2-fp8": ("minimax-m2", "fp8_w8a8_block_128x128"),
    "mixtral-8x7b-awq": ("mixtral-8x7b", "int4_w4a16_group_128_zp"),
    "qwen3-235b-a22b-fp8": ("qwen3-235b-a22b", "fp8_w8a8_block_128x128"),
    "qwen3-30b-a3b-fp8": ("qwen3-30b-a3b", "fp8_w8a8_block_128x128"),
    "qwen3-coder-480b-a35b-fp8": ("qwen3-coder-480b-a35b", "fp8_w8a8_block_128x128"),
}
"""Preset -> the plain one of the same sizes, and its format."""


def test_every_preset_is_listed_above() -> None:
    assert preset_names() == tuple(sorted(PRESETS))
    assert preset_names(quantised=True) == tuple(sorted({*PRESETS, *QUANTISED}))


@pytest.mark.parametrize("name", QUANTISED)
def test_quantised_presets(name: str) -> None:
    plain, format = QUANTISED[name]
    shape, same = preset(name), preset(plain)
    assert shape.format.name == format and e_k_h_n(shape) == e_k_h_n(same)
    assert shape.weight_bytes < 0.6 * same.weight_bytes
    assert load_model(name, dtype="bfloat16").format.is_plain


def test_an_id_means_what_is_published_under_it() -> None:
    """A preset of plain weights keeps its name; the Hugging Face id of a quantised checkpoint is not read as bf16."""
    assert preset("deepseek-v3").format.is_plain and preset("gpt-oss-20b").format.is_plain
    assert preset("deepseek-ai/DeepSeek-V3").format.name == "fp8_w8a8_block_128x128"
    assert preset("openai/gpt-oss-20b").format.name == "mxfp4_w4a16_32"
    assert published_as("deepseek-v3") == "deepseek-v3-fp8" and published_as("qwen3-30b-a3b") is None


@pytest.mark.parametrize("name", PRESETS)
def test_presets(name: str) -> None:
    shape = preset(name)
    assert e_k_h_n(shape) == PRESETS[name]
    assert shape.name == name and shape.keys_used and shape.architecture


@pytest.mark.parametrize("name", sorted({*PRESETS, *QUANTISED}))
def test_preset_files_name_their_source_and_end_in_a_newline(name: str) -> None:
    text = (data_dir() / "models" / f"{name}.json").read_text(encoding="utf-8")
    assert text.endswith("}\n")
    source = json.loads(text)["source"]
    assert source.count("/") == 1
    assert preset(source) == preset(source.upper()) == preset(published_as(name) or name)


def test_activations_that_differ() -> None:
    assert preset("gpt-oss-20b").activation == "swiglu_oai"
    assert preset("grok-2").activation == "gelu"
    nemotron = preset("nemotron-3-nano-30b-a3b")
    assert (nemotron.activation, nemotron.gated, nemotron.w13_shape) == ("relu2", False, (128, 1856, 2688))


# --- What a server makes of shared experts: tests/test_question.py has the rules.
def test_a_config_is_read_without_shared_experts() -> None:
    assert MoEShape.from_config(DEEPSEEK).num_experts == preset("deepseek-v3").num_experts == 256
    assert load_model("deepseek-v3", tp_size=8).num_shared_experts_fused == 1  # as sglang's server runs it
    assert load_model("deepseek-v3", tp_size=8, loader="vllm").num_shared_experts_fused == 0
    assert e_k_h_n(load_model("deepseek-v3", tp_size=8)) == (257, 9, 7168, 256)  # sglang ships E=257,N=256
    assert e_k_h_n(load_model("glm-4.5", tp_size=8)) == (161, 9, 5120, 192)  # and E=161,N=192


# --- Laws of sharding.
degrees = st.sampled_from([1, 2, 4, 8, 16])


@st.composite
def layouts(draw: st.DrawFn) -> tuple[int, int]:
    tp_size = draw(degrees)
    return tp_size, draw(st.sampled_from([d for d in (1, 2, 4, 8, 16) if tp_size % d == 0]))


@st.composite
def shapes(draw: st.DrawFn) -> MoEShape:
    routed = draw(st.integers(1, 40)) * 16
    fused = draw(st.integers(0, 2))
    return MoEShape(
        "any",
        num_experts=routed + fused,
        top_k=draw(st.integers(1, routed + fused)),
        hidden_size=draw(st.integers(1, 9000)),
        moe_intermediate_size=draw(st.integers(1, 200)) * 16,
        num_shared_experts_fused=fused,
    )


@given(shapes(), layouts())
def test_the_ranks_together_hold_the_model(shape: MoEShape, layout: tuple[int, int]) -> None:
    tp_size, ep_size = layout
    part = shape.shard(tp_size, ep_size)
    routed_weights = part.num_routed_experts * part.moe_intermediate_size * tp_size
    assert routed_weights == shape.num_routed_experts * shape.moe_intermediate_size
    assert part.num_experts == part.num_routed_experts + shape.num_shared_experts_fused
    assert (part.top_k, part.hidden_size) == (shape.top_k, shape.hidden_size)


@given(shapes(), layouts(), layouts())
def test_degrees_count_from_the_whole_model(shape: MoEShape, first: tuple[int, int], second: tuple[int, int]) -> None:
    assert shape.shard(*first).shard(*second) == shape.shard(*second)
    assert shape.shard(*first).shard(1) == shape
    assert shape.shard(1) == shape


@given(st.integers(2, 512), st.integers(1, 4096), st.integers(1, 64), st.integers(1, 64))
def test_it_shards_exactly_when_it_divides(experts: int, inner: int, tp_size: int, ep_size: int) -> None:
    shape = MoEShape("any", experts, 1, 128, inner)
    fits = tp_size % ep_size == 0 and experts % ep_size == 0 and inner % max(tp_size // ep_size, 1) == 0
    if fits:
        part = shape.shard(tp_size, ep_size)
        assert part.num_experts * ep_size == experts
        assert part.moe_intermediate_size * (tp_size // ep_size) == inner
    else:
        with pytest.raises(ShardError):
            shape.shard(tp_size, ep_size)


@pytest.mark.parametrize(
    ("tp_size", "ep_size", "says"),
    [
        (5, 1, ["moe_intermediate_size of qwen3-30b-a3b is 768", "tp_size = 5", "1, 2, 3, 4, 6, 8, 12, 16"]),
        (10, 2, ["moe_intermediate_size of qwen3-30b-a3b is 768", "tp_size // ep_size = 5"]),
        (3, 3, ["num_experts of qwen3-30b-a3b is 128", "ep_size = 3", "1, 2, 4, 8, 16, 32, 64"]),
        (8, 3, ["tp_size is 8", "ep_size = 3", "1, 2, 4, 8"]),
    ],
)
def test_shard_errors_name_size_degree_and_what_divides(tp_size: int, ep_size: int, says: list[str]) -> None:
    with pytest.raises(ShardError) as caught:
        load_model("qwen3-30b-a3b", tp_size=tp_size, ep_size=ep_size)
    assert all(part in str(caught.value) for part in says)


# --- By hand.
def test_from_sizes_shards_the_whole_model() -> None:
    shape = MoEShape.from_sizes(
        num_experts=64,
        top_k=4,
        hidden_size=2056,
        moe_intermediate_size=1536,
        tp_size=4,
        ep_size=2,
        dtype="fp16",
    )
    assert e_k_h_n(shape) == (32, 4, 2056, 768)
    assert (shape.w13_shape, shape.w2_shape, shape.dtype) == ((32, 1536, 2056), (32, 2056, 768), "float16")


def test_one_expert_and_all_experts_are_layers() -> None:
    assert MoEShape("one", 1, 1, 511, 100).w2_shape == (1, 511, 100)
    assert MoEShape("all", 8, 8, 64, 64).top_k == 8


def test_top_k_may_exceed_the_experts_of_a_rank() -> None:
    assert e_k_h_n(load_model("mixtral-8x7b", tp_size=8, ep_size=8)) == (1, 2, 4096, 14336)


SIZES: dict[str, Any] = {"num_experts": 8, "top_k": 2, "hidden_size": 64, "moe_intermediate_size": 32}


@pytest.mark.parametrize(
    "change",
    [
        {"top_k": 9},
        {"top_k": 0},
        {"num_experts": 0},
        {"hidden_size": -64},
        {"moe_intermediate_size": 32.0},
        {"hidden_size": True},
        {"num_shared_experts_fused": 8},
        {"num_shared_experts_fused": -1},
        {"tp_size": 0},
        {"tp_size": 4, "ep_size": 3},
    ],
)
def test_impossible_sizes_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ShapeError):
        MoEShape("bad", **{**SIZES, **change})


def test_dtypes() -> None:
    assert dtype_name("torch.bfloat16") == dtype_name("bf16") == "bfloat16"
    assert MoEShape("x", **SIZES).with_dtype("double").dtype == "float64"
    assert load_model("mixtral-8x7b", dtype="fp32").dtype == "float32"
    with pytest.raises(DtypeError, match="int7"):
        MoEShape("x", **SIZES).with_dtype("int7")
    with pytest.raises(DtypeError, match="float8"):
        MoEShape.from_config({**DEEPSEEK, "torch_dtype": "float8_e4m3fn"})
    assert MoEShape.from_config({**DEEPSEEK, "torch_dtype": "float16"}).dtype == "float16"
    assert MoEShape.from_config({**DEEPSEEK, "torch_dtype": None}).dtype == "bfloat16"


# --- Where a model is found.
def test_a_path_or_its_folder(tmp_path: Path) -> None:
    folder = tmp_path / "my-model"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(DEEPSEEK))
    by_folder, by_file = load_model(folder, tp_size=8), load_model(str(folder / "config.json"), tp_size=8)
    assert by_folder == by_file
    assert (by_folder.name, e_k_h_n(by_folder)) == ("my-model", (257, 9, 7168, 256))


@pytest.mark.parametrize("model", ["a.json", "./a", "/no/such", "~no/such/", "a/b/c", "a/b.json", Path("a/b")])
def test_a_path_that_is_not_there_is_no_name(model: str | Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnknownModelError, match="does not exist") as caught:
        load_model(model)
    assert "preset" not in str(caught.value)


def test_a_truncated_file_is_named(tmp_path: Path) -> None:
    file = tmp_path / "config.json"
    file.write_text(json.dumps(DEEPSEEK)[:100])
    with pytest.raises(ConfigFileError, match=r"config\.json is not strict JSON"):
        load_model(file)


@pytest.mark.parametrize("lookup", [preset, load_model])
def test_an_unknown_name_offers_the_nearest(lookup: Any) -> None:
    with pytest.raises(UnknownModelError, match=r"Did you mean .*qwen3-30b-a3b"):
        lookup("qwen3-30b")


def test_a_hugging_face_id_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")
    file = tmp_path / "config.json"
    file.write_text(json.dumps(DEEPSEEK))
    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda repo, name: str(file) if repo == "me/mine" else None)
    assert e_k_h_n(load_model("me/mine", tp_size=8)) == (257, 9, 7168, 256)
    assert load_model("me/mine").name == "me/mine"


def test_a_hugging_face_id_that_cannot_be_fetched(monkeypatch: pytest.MonkeyPatch) -> None:
    hub = pytest.importorskip("huggingface_hub")

    def offline(*_: object, **__: object) -> str:
        raise OSError("no network")

    monkeypatch.setattr(hub, "try_to_load_from_cache", lambda *_: None)
    monkeypatch.setattr(hub, "hf_hub_download", offline)
    monkeypatch.setattr(presets, "_require_hub", lambda: None)
    with pytest.raises(UnknownModelError, match=r"Qwen/Qwen3-30B-A3.*no path here.*OSError.*Did you mean"):
        load_model("Qwen/Qwen3-30B-A3")


def test_a_hugging_face_id_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UnknownModelError, match=r"no path here.* pip install 'moelab\[hf\]'"):
        load_model("someone/some-model")


def test_importing_shapes_loads_no_heavy_package() -> None:
    heavy = "{'torch', 'triton', 'plotly', 'transformers', 'huggingface_hub', 'numpy'}"
    code = f"import sys, moelab.shapes; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
