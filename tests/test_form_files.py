"""Files of forms (`kernel=fast`): what they say, what reads them, and what is wrong with them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from moelab import config_files
from moelab.chips import TARGETS
from moelab.config import KernelConfig
from moelab.config_files.form_entries import FormEntry, form_text, layer_key, read_form_file
from moelab.errors import ConfigError, ConfigFileError
from moelab.kernels import few_tokens
from moelab.kernels.fast_instances import ALL, CODED, INSTANCES
from moelab.pipelines import fast, form_files
from moelab.pipelines.form_choice import Classic, Form, Gated
from moelab.shapes import MoEShape, load_model

DEVICE, VERSION = "NVIDIA H200", "3.6.0"
PAIR = KernelConfig(64, 128, 64, 8, 4, 3), KernelConfig(64, 64, 64, 1, 4, 4)
FORMS: list[Form] = [*ALL, *few_tokens.FORMS, Gated(*PAIR), Classic(*PAIR)]
SHAPE = load_model("qwen3-30b-a3b", dtype="bfloat16")
LAYER = layer_key(2048, 8, 128)


@pytest.fixture
def tree(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of configs without a file, which `fast` reads; its file of that shape's forms would be this path."""
    monkeypatch.setenv("MOELAB_CONFIG_DIR", str(tmp_path))
    folder = tmp_path / "triton_3_6_0"
    folder.mkdir()
    return folder / "E=128,N=768,device_name=NVIDIA_H200,kernel=fast.json"


def put(path: Path, forms: dict[int, Form], layer: str = LAYER) -> None:
    path.write_text(form_text({layer: {key: form_files.entry_of(form) for key, form in forms.items()}}))
    form_files.tuned_form.cache_clear()
    fast.chosen.cache_clear()


def chosen(num_tokens: int, shape: MoEShape = SHAPE, override: str | None = None) -> Form:
    return fast.choose_for(shape, num_tokens, TARGETS["sm_90"], DEVICE, VERSION, override).form


@pytest.mark.parametrize("form", FORMS, ids=form_files.label)
def test_a_form_is_read_back(form: Form, tmp_path: Path) -> None:
    path = tmp_path / "one.json"
    put(path, {8: form})
    (entry,) = read_form_file(path)[LAYER].values()
    assert form_files.form_of(entry, "here") == form
    if not isinstance(form, Gated | Classic):
        assert form_files.named(form_files.label(form)) == form


def test_what_was_measured_overrules_the_prediction(tree: Path) -> None:
    before = chosen(200)
    other = next(each for each in (INSTANCES[16], INSTANCES[96]) if each != before)
    put(tree, {256: other, 8: few_tokens.FORMS[0]})
    assert chosen(200) == other and chosen(8192) == other  # the nearest batch size
    assert chosen(7) == few_tokens.FORMS[0]
    reason = fast.choose_for(SHAPE, 200, TARGETS["sm_90"], DEVICE, VERSION).reason
    assert "256 tokens" in reason and tree.name in reason
    assert chosen(200, override="one_launch:256x176x4") == INSTANCES[176]  # what is asked for comes first
    assert fast.choose_for(SHAPE, 200, TARGETS["sm_90"], None).form == before  # without a device no file counts


def test_a_form_that_does_not_serve_the_batch_is_left(tree: Path) -> None:
    before = chosen(100)
    put(tree, {8: few_tokens.FORMS[0]})
    assert chosen(8) == few_tokens.FORMS[0] and chosen(100) == before


@pytest.mark.parametrize("other", [layer_key(4096, 8, 128), layer_key(2048, 4, 128), layer_key(2048, 8, 512)])
def test_another_layer_of_the_same_name_has_forms_of_its_own(tree: Path, other: str) -> None:
    before = chosen(200)
    put(tree, {256: next(each for each in ALL if each != before)}, other)
    assert chosen(200) == before


def test_experts_of_other_ranks_are_of_the_layer() -> None:
    alone = load_model("qwen3-30b-a3b", dtype="bfloat16")
    shared = load_model("qwen3-30b-a3b", tp_size=4, ep_size=4, dtype="bfloat16")
    assert form_files.layer_of(fast.batch_of(alone, 33)) == form_files.layer_of(fast.batch_of(shared, 33)) == LAYER
    assert shared.num_experts == 32


BROKEN = {
    "version": {"forms_version": 2, "layers": {LAYER: {"8": {"form": "few_tokens", "name": "x"}}}},
    "no version": {"layers": {LAYER: {}}},
    "a config": {"8": PAIR[0].to_json()},
    "no layer": {"forms_version": 1, "layers": {}},
    "layer": {"forms_version": 1, "layers": {"E=128": {"8": {"form": "few_tokens", "name": "x"}}}},
    "no batch": {"forms_version": 1, "layers": {LAYER: {}}},
    "batch": {"forms_version": 1, "layers": {LAYER: {"08": {"form": "few_tokens", "name": "x"}}}},
    "entry": {"forms_version": 1, "layers": {LAYER: {"8": {"form": "few_tokens"}}}},
    "pair": {"forms_version": 1, "layers": {LAYER: {"8": {"form": "triton", "up": {}, "down": {}}}}},
    "list": {"forms_version": 1, "layers": {LAYER: {"8": ["few_tokens"]}}},
}  # fmt: skip


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_told_and_found(tree: Path, name: str) -> None:
    tree.write_text(json.dumps(BROKEN[name]) + "\n")
    form_files.tuned_form.cache_clear()
    fast.chosen.cache_clear()
    with pytest.raises(ConfigFileError, match="Expected"):
        chosen(8)
    assert [finding.problem for finding in config_files.doctor(tree.parent.parent).errors] == ["forms"]


@pytest.mark.parametrize(
    "entry",
    [
        FormEntry("one_launch", repr(CODED[16])),
        FormEntry("few_tokens", repr(INSTANCES[16])),
        FormEntry("one_launch", "Instance(nonsense)"),
        FormEntry("one_launch", None, *PAIR),
    ],
)
def test_a_form_that_is_not_in_use_is_told(tree: Path, entry: FormEntry) -> None:
    tree.write_text(form_text({LAYER: {8: entry}}))
    form_files.tuned_form.cache_clear()
    fast.chosen.cache_clear()
    with pytest.raises(ConfigFileError, match="Tune it again"):
        chosen(8)


def test_a_sound_file_has_no_finding_and_one_of_gemm2_has(tree: Path) -> None:
    put(tree, {8: few_tokens.FORMS[0]})
    assert config_files.doctor(tree.parent.parent).errors == ()
    tree.rename(tree.with_name(tree.name.replace(".json", "_down.json")))
    assert [finding.problem for finding in config_files.doctor(tree.parent.parent).errors] == ["forms"]


def test_an_entry_is_a_form_or_refused() -> None:
    with pytest.raises(ConfigError, match="no form"):
        FormEntry.from_json({"form": 3, "name": "x"})


@pytest.mark.parametrize("rules", ["moelab", "sglang", "vllm"])
def test_a_file_of_forms_is_no_file_of_configs_to_export(tree: Path, rules: str) -> None:
    put(tree, {8: few_tokens.FORMS[0]})
    (source,) = config_files.sources(tree.parent.parent)
    assert source.name.kernel == "fast" and "forms" in str(config_files.left_out(source.name, rules))
