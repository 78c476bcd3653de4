"""config_files: how moelab, sglang and vLLM search, each decision with its reason.

What the peers find was checked against their own loaders (sglang 0.5.23, vLLM 0.33.0) on random trees; the cases
below are the ones in which they differ.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab import config_files as cf
from moelab.config import KernelConfig, default_config
from moelab.errors import ConfigFileError, UnknownNameError

NAMES = ("moelab", "sglang", "vllm")
E, N = 4, 128
UP = f"E={E},N={N},device_name=NVIDIA_H200.json"
DOWN = UP.replace(".json", "_down.json")


def put(path: Path, *block_m: int, keys: tuple[int, ...] = (1, 64), **more: object) -> Path:
    """A config file with one BLOCK_SIZE_M for each key; `more` goes into every entry, or to the top as triton_version."""
    path.parent.mkdir(parents=True, exist_ok=True)
    version = {"triton_version": more.pop("triton_version")} if "triton_version" in more else {}
    rows = block_m if len(block_m) == len(keys) else block_m * len(keys)
    entries = {str(k): KernelConfig(m, 32, 64, 1).to_json() | more for k, m in zip(keys, rows, strict=True)}
    path.write_text(json.dumps(version | entries) + "\n")
    return path


def search(folder: Path, rules: str, num_tokens: int = 3, device: str = "NVIDIA H200", **more: object) -> cf.Lookup:
    given = {"triton_version": "3.6.0", **more}
    return cf.lookup(E, N, device, num_tokens=num_tokens, config_dir=folder, rules=rules, **given)


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "name"),
    [
        ("moelab", "E=8,N=16,device_name=NVIDIA_H200_NVL,dtype=fp8_w8a8,block_shape=[128, 64].json"),
        ("sglang", "E=8,N=16,device_name=NVIDIA_H200_NVL,dtype=fp8_w8a8,block_shape=[128, 64].json"),
        ("vllm", "E=8,N=16,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128,64].json"),
    ],
)
def test_each_loader_spells_a_name_its_way(rules: str, name: str) -> None:
    assert cf.file_name(8, 16, "NVIDIA H200 NVL", "fp8_w8a8", (128, 64), rules=rules) == name


def test_vllm_takes_only_whole_words_for_an_h200() -> None:
    for device, spelled in {
        "NVIDIA H200": "NVIDIA_H200",
        "NVIDIA GH200 480GB": "NVIDIA_GH200_480GB",
        "AMD  X/Y": "AMD_X_Y",
    }.items():
        assert cf.file_name(8, 16, device, rules="vllm") == f"E=8,N=16,device_name={spelled}.json"


def test_vllms_names_have_no_place_for_down_and_per_channel_quant() -> None:
    name = cf.FileName(8, 16, "X", "fp8_w8a8", per_channel_quant=True, down=True)
    assert name.text("vllm") == "E=8,N=16,device_name=X,dtype=fp8_w8a8.json"
    assert name.unsaid("vllm") == ("down", "per_channel_quant") and name.unsaid("sglang") == ()


def test_vllm_counts_values_where_int4_is_packed() -> None:
    name = cf.FileName(384, 128, "X", "int4_w4a16")
    assert name.text() == "E=384,N=128,device_name=X,dtype=int4_w4a16.json"
    assert name.text("vllm") == "E=384,N=256,device_name=X,dtype=int4_w4a16.json"
    assert cf.parse_file_name(name.text("vllm"), "vllm") == cf.parse_file_name(name.text()) == name
    with pytest.raises(ConfigFileError, match="odd N"):
        cf.parse_file_name("E=384,N=25,device_name=X,dtype=int4_w4a16.json", "vllm")


@pytest.mark.parametrize(("rules", "unknown"), [("vllm", "int8_w8a8"), ("sglang", "fp8_w8a16"), ("moelab", "bf16")])
def test_selectors_differ(rules: str, unknown: str) -> None:
    with pytest.raises(UnknownNameError, match=f"{unknown}.*{rules}"):
        cf.file_name(8, 16, "X", unknown, rules=rules)


def test_a_kernels_file_is_read_back_and_asked_for_by_moelab_alone() -> None:
    for down in (False, True):
        name = cf.FileName(8, 16, "X", "float32", kernel="split_k_workspace", down=down)
        assert name.text() == "E=8,N=16,device_name=X,dtype=float32,kernel=split_k_workspace" + "_down" * down + ".json"
        assert cf.parse_file_name(name.text()) == name
        assert [rules for rules in NAMES if not name.unsaid(rules)] == ["moelab"]


devices = st.text(st.characters(codec="utf-8", exclude_characters=",/\n"), min_size=1, max_size=20)


@given(devices, st.sampled_from(("sglang", "vllm")), st.booleans(), st.booleans())
def test_no_peer_can_ask_for_a_kernels_file(device: str, rules: str, down: bool, quant: bool) -> None:
    """Whatever a driver calls its device: a comma ends the device name, and no peer writes `kernel=`."""
    asked = cf.FileName(8, 16, device, None, None, quant, down).text(rules)
    assert ",kernel=" not in asked


# --- where each looks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "place", "found"),
    [
        ("moelab", "triton_3_6_0", True),
        ("moelab", "configs/triton_3_6_0", False),
        ("sglang", "configs/triton_3_6_0", True),
        ("sglang", "configs/triton_3_1_0", True),
        ("sglang", "configs/triton_3_6", True),  # two numbers: a fallback, never the version in use
        ("sglang", "configs/triton_3.6.0", False),  # it is sorted among the versions, then looked for with _
        ("sglang", "triton_3_6_0", False),
        ("vllm", ".", True),
        ("vllm", "triton_3_6_0", False),
        ("vllm", "configs", False),
    ],
)
def test_folders(rules: str, place: str, found: bool, tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    path = put(tmp_path / place / UP, 16)
    answer = search(tmp_path, rules)
    assert (answer.path == path) == found == (not answer.is_default)
    assert answer.rules == rules


@pytest.mark.parametrize("rules", NAMES)
def test_the_variable_names_the_folder(rules: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = {"moelab": "triton_3_6_0", "sglang": "configs/triton_3_6_0", "vllm": "."}[rules]
    path = put(tmp_path / place / UP, 16)
    monkeypatch.setenv(cf.RULES[rules].environment, str(tmp_path))
    assert cf.lookup(E, N, "NVIDIA H200", num_tokens=1, triton_version="3.6.0", rules=rules).path == path


@pytest.mark.parametrize(("package", "below"), [("sglang", "triton_3_6_0"), ("vllm", ".")])
def test_a_peers_own_folder(package: str, below: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found without importing the package; vLLM looks there after the variable's folder, sglang instead of it."""
    (tmp_path / package).mkdir()
    (tmp_path / package / "__init__.py").write_text("raise ImportError('imported')")
    own = put(tmp_path / package / cf.RULES[package].package_folder / below / UP, 16)
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.delenv(cf.RULES[package].environment, raising=False)
    asked = {"num_tokens": 1, "triton_version": "3.6.0", "rules": package}
    assert cf.lookup(E, N, "NVIDIA H200", **asked).path == own
    named = tmp_path / "named"
    (named / "configs").mkdir(parents=True)
    assert cf.lookup(E, N, "NVIDIA H200", config_dir=named, **asked).path == (own if package == "vllm" else None)


def test_vllm_reads_the_version_from_no_folder_and_sglang_from_no_file(tmp_path: Path) -> None:
    put(tmp_path / UP, 16, triton_version="3.1.0")
    assert search(tmp_path, "vllm", triton_version="3.7.1").config == KernelConfig(16, 32, 64, 1)
    put(tmp_path / "configs" / "triton_3_6_0" / UP, 16, triton_version="3.6.0")
    with pytest.raises(ConfigFileError, match=r"triton_version.*ValueError"):
        search(tmp_path, "sglang")


def test_a_local_version_is_a_folder_of_its_own_for_sglang(tmp_path: Path) -> None:
    put(tmp_path / "configs" / "triton_3_6_0" / UP, 16)
    for rules, folder, tries in (("sglang", tmp_path, 2), ("moelab", tmp_path / "configs", 1)):
        answer = search(folder, rules, triton_version="3.6.0+git77")
        assert answer.config == KernelConfig(16, 32, 64, 1) and len(answer.steps) == tries + 1
        assert ("another Triton version" in answer.steps[-2].reason) == (rules == "sglang")


def test_where_sglang_ends_with_an_error(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, match=r"FileNotFoundError.*SGLANG_MOE_CONFIG_DIR"):
        search(tmp_path, "sglang")
    put(tmp_path / "configs" / "triton_3_5_1" / UP, 16)
    (tmp_path / "configs" / "triton_old").mkdir()
    with pytest.raises(ConfigFileError, match=r"triton_old.*ValueError"):
        search(tmp_path, "sglang")
    assert search(tmp_path, "sglang", triton_version="3.5.1").key == 1  # found at once, before the folders are listed
    assert search(tmp_path / "configs", "moelab").key == 1  # not one of the tree's: left alone


# --- _down --------------------------------------------------------------------------------------------------


def test_down_in_each_loader(tmp_path: Path) -> None:
    put(tmp_path / "configs" / "triton_3_6_0" / UP, 16)
    put(tmp_path / UP, 16)
    put(tmp_path / "configs" / "triton_3_5_1" / DOWN, 64)
    moelab = search(tmp_path / "configs", "moelab", down=True)
    assert moelab.config == KernelConfig(64, 32, 64, 1) and "changed" not in {s.result for s in moelab.steps}
    sglang = search(tmp_path, "sglang", down=True)
    assert (
        sglang.config == KernelConfig(16, 32, 64, 1)
        and sglang.path == moelab.path.parent.parent / "triton_3_5_1" / DOWN
    )
    changed = next(step for step in sglang.steps if step.result == "changed")
    assert "64" in changed.what and "16" in changed.reason and UP in changed.reason
    vllm = search(tmp_path, "vllm", down=True)
    assert vllm.path == tmp_path / UP
    assert (vllm.steps[0].what, vllm.steps[0].result) == ("down", "left out")


def test_down_alone_gets_the_default_configs_block_m_from_sglang(tmp_path: Path) -> None:
    put(tmp_path / "configs" / "triton_3_6_0" / DOWN, 64)
    answer = search(tmp_path, "sglang", down=True)
    assert answer.config is not None and answer.config.BLOCK_SIZE_M == default_config(3, E).BLOCK_SIZE_M == 16
    assert "default rule" in next(step.reason for step in answer.steps if step.result == "changed")


# --- kernels ------------------------------------------------------------------------------------------------


def test_a_kernels_configs_are_found_by_the_same_search(tmp_path: Path) -> None:
    put(tmp_path / "triton_3_6_0" / UP, 16)
    ours = put(tmp_path / "triton_3_5_1" / UP.replace(".json", ",kernel=split_k_workspace.json"), 32, SPLIT_K=4)
    for down in (False, True):
        answer = search(tmp_path, "moelab", kernel="split_k_workspace", down=down)
        assert answer.path == ours and answer.config == KernelConfig(32, 32, 64, 1, SPLIT_K=4)
    other = search(tmp_path, "moelab", kernel="gated")
    assert other.is_default and other.config is None and "launcher" in other.steps[-1].reason
    assert search(tmp_path, "moelab").config == KernelConfig(16, 32, 64, 1)


def test_no_peer_looks_up_a_kernel(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, match="rules='moelab'"):
        search(tmp_path, "vllm", kernel="split_k_workspace")


# --- decisions ----------------------------------------------------------------------------------------------


def test_what_was_passed_over_is_a_step(tmp_path: Path) -> None:
    for place in ("triton_3_6_0/" + UP, "triton_3_5_1/" + UP, "triton_3_5_1/" + DOWN):
        put(tmp_path / place, 16)
    answer = search(tmp_path, "moelab", down=True)
    assert [(step.what, step.result) for step in answer.steps] == [
        ("triton_3_6_0/" + DOWN, "absent"),
        ("triton_3_5_1/" + DOWN, "found"),
        ("triton_3_6_0/" + UP, "passed over"),
        ("triton_3_5_1/" + UP, "passed over"),
        ("batch size 1", "used"),
    ]
    assert all(step.path == tmp_path / step.what for step in answer.steps[:-1])


def test_keys_of_sglangs_own_are_left_out_and_said(tmp_path: Path) -> None:
    put(tmp_path / "configs" / "triton_3_6_0" / UP, 16, USE_TMA=True)
    answer = search(tmp_path, "sglang")
    assert answer.config == KernelConfig(16, 32, 64, 1)
    assert [step.what for step in answer.steps if step.result == "left out"] == ["USE_TMA = True"]
    put(tmp_path / "configs" / "triton_3_6_0" / UP, 16, num_ctas=1)
    with pytest.raises(ConfigFileError, match="unknown key 'num_ctas'"):
        search(tmp_path / "configs", "moelab")


@pytest.mark.parametrize(
    ("value", "words"), [(True, "`tma` reads weights by TMA"), (False, "as moelab's `triton` does")]
)
def test_use_tma_is_read_and_its_meaning_said(value: bool, words: str, tmp_path: Path) -> None:
    """sglang ships it for H100s under Triton 3.7.1: the rest of such an entry is a config like any other."""
    put(tmp_path / "triton_3_6_0" / UP, 16, USE_TMA=value)
    answer = search(tmp_path, "moelab")
    assert answer.config == KernelConfig(16, 32, 64, 1)
    (step,) = [step for step in answer.steps if step.result == "left out"]
    assert step.what == f"USE_TMA = {value}" and words in step.reason


@pytest.mark.parametrize(
    ("rules", "selector", "block_shape", "num_tokens", "expected"),
    [
        ("sglang", None, None, 4, "16x32x64 g1 w4 s3"),
        ("sglang", None, None, 5, "64x64x32 g8 w4 s3"),
        ("sglang", "fp8_w8a8", None, 4, "64x128x128 g1 w4 s4"),
        ("sglang", "fp8_w8a8", None, 5, "128x256x128 g32 w8 s4"),
        ("sglang", "fp8_w8a8", (128, 64), 5, "64x128x64 g32 w4 s3"),
        ("sglang", "int8_w8a8", None, 5, "64x64x32 g8 w4 s3"),
        ("vllm", None, None, 32, "16x64x128 g1 w4 s4"),
        ("vllm", None, None, 64, "32x64x128 g1 w4 s3"),
        ("vllm", None, None, 512, "64x128x64 g1 w8 s3"),
        ("vllm", None, None, 4096, "128x128x64 g16 w8 s3"),
        ("vllm", "fp8_w8a8", None, 4096, "128x128x128 g16 w8 s3"),
        ("vllm", "fp8_w8a8", (128, 128), 4, "16x64x128 g1 w4 s4"),
        ("vllm", "fp8_w8a8", (128, 128), 8, "16x64x128 g1 w4 s3"),
        ("vllm", "fp8_w8a8", (128, 128), 65, "64x128x128 g32 w4 s3"),
    ],
)
def test_defaults_of_the_peers(
    rules: str, selector: str, block_shape: tuple, num_tokens: int, expected: str, tmp_path: Path
) -> None:
    """Values that the peers' own functions returned for an H200."""
    (tmp_path / "configs").mkdir()
    answer = search(tmp_path, rules, num_tokens, dtype_selector=selector, block_shape=block_shape)
    assert answer.is_default and answer.config is not None and answer.config.short() == expected


def test_defaults_on_amd_and_where_no_name_says_enough(tmp_path: Path) -> None:
    (tmp_path / "configs").mkdir()
    for rules in ("sglang", "vllm"):
        amd = search(tmp_path, rules, device="AMD Instinct MI325X", dtype_selector="fp8_w8a8")
        assert amd.config is not None and amd.config.num_stages == 2
    answer = search(tmp_path, "vllm", dtype_selector="int4_w4a16", block_shape=(64, 64))
    assert answer.config is None and answer.is_default


@pytest.mark.parametrize("rules", NAMES)
def test_every_rule_that_differs_is_shown_with_a_reason(rules: str) -> None:
    loader = cf.RULES[rules]
    fields = {f.name for f in dataclasses.fields(loader)}
    assert set(loader.reasons) <= fields and all(loader.reasons.values())
    table = {row["rule"]: row for row in cf.rules_table()}
    assert all(len({row[name] for name in cf.RULES}) > 1 for row in table.values())  # what all do alike is left out
    assert len(table) == len(cf.rules_table()) and all(row[rules] and row["why"] for row in table.values())
    assert table["block_shape in a name"][rules] == loader.block_shape.format(128, 64)


def test_differences_are_counted_by_pairs_of_loaders() -> None:
    """The table leaves out what all do alike, so that all of it differs somewhere: what two differ in says something."""
    from moelab.plots import in_short

    rows = [{"moelab": a, "sglang": b, "vllm": c} for a, b, c in ("xxy", "xyx", "xyy")]
    said = in_short.differences(rows)
    assert (
        said == "Of the 3 rules listed below sglang and vLLM differ in 2, moelab and sglang in 2, moelab and vLLM in 2."
    )


# --- laws ---------------------------------------------------------------------------------------------------

kernel_configs = st.builds(
    KernelConfig,
    st.sampled_from((16, 32, 64)),
    st.sampled_from((32, 64, 128)),
    st.sampled_from((32, 64)),
    st.sampled_from((1, 8, 16)),
    st.sampled_from((4, 8)),
    st.sampled_from((2, 3)),
)
tables = st.dictionaries(st.integers(1, 5000), kernel_configs, min_size=1, max_size=6)


@settings(max_examples=60)
@given(
    configs=tables,
    batches=st.lists(st.integers(1, 9000), min_size=1, max_size=8),
    rules=st.sampled_from(NAMES),
    data=st.data(),
)
def test_what_is_exported_is_found_for_every_batch_size(
    configs: dict[int, KernelConfig],
    batches: list[int],
    rules: str,
    data: st.DataObject,
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    selector = data.draw(st.sampled_from((None, *cf.RULES[rules].dtype_selectors)))
    block_shape = data.draw(st.none() | st.just((128, 128)))
    quant = rules != "vllm" and data.draw(st.booleans())
    device = data.draw(st.sampled_from(("NVIDIA H200", "NVIDIA H200 NVL", "Abacus 9")))
    name = cf.FileName(E, N, device, selector, block_shape, quant)
    out = tmp_path_factory.mktemp("out")
    done = cf.export(configs, name, rules=rules, out=out, triton_version="3.6.0")
    ordered = sorted(configs)
    for num_tokens in [*batches, *configs]:
        answer = cf.lookup(
            E, N, device, num_tokens=num_tokens, triton_version="3.6.0", config_dir=out, rules=rules,
            dtype_selector=selector, block_shape=block_shape, per_channel_quant=quant,
        )  # fmt: skip
        nearest = min(ordered, key=lambda key: (abs(key - num_tokens), key))
        assert (answer.path, answer.key, answer.config) == (done.path, nearest, configs[nearest])
