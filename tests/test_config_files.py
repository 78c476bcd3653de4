"""config_files: names both ways, strict reading, sglang's formatting, and a lookup that says why."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_config import valid_configs

from moelab import config_files as cf
from moelab import runtime
from moelab.config import KernelConfig, default_config, violations
from moelab.config_files.names import operand_dtype
from moelab.errors import ConfigError, ConfigFileError, UnknownNameError
from moelab.shapes import MoEShape

SMALL = KernelConfig(16, 64, 128, 1, 4, 3)
LARGE = KernelConfig(128, 256, 64, 16, 8, 4)


# --- names --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((128, 768, "NVIDIA H200"), "E=128,N=768,device_name=NVIDIA_H200.json"),
        ((16, 2048, "NVIDIA_B200", None, None, False, True), "E=16,N=2048,device_name=NVIDIA_B200_down.json"),
        (
            (256, 256, "NVIDIA H100 80GB HBM3", "fp8_w8a8", (128, 128)),
            "E=256,N=256,device_name=NVIDIA_H100_80GB_HBM3,dtype=fp8_w8a8,block_shape=[128, 128].json",
        ),
        (
            (8, 7168, "AMD Instinct MI325X", "int8_w8a8", None, True, True),
            "E=8,N=7168,device_name=AMD_Instinct_MI325X,dtype=int8_w8a8,per_channel_quant=True_down.json",
        ),
    ],
)
def test_names_as_the_peers_spell_them(arguments: tuple, name: str) -> None:
    assert cf.file_name(*arguments) == name
    assert cf.parse_file_name(name).text() == name


def test_vllm_spells_block_shape_without_a_space() -> None:
    spaced = cf.parse_file_name("E=8,N=16,device_name=X,dtype=fp8_w8a8,block_shape=[128, 64].json")
    assert cf.parse_file_name("E=8,N=16,device_name=X,dtype=fp8_w8a8,block_shape=[128,64].json") == spaced
    assert spaced.block_shape == (128, 64)


names = st.builds(
    cf.FileName,
    st.integers(1, 4096),
    st.integers(1, 65536),
    st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_\-]{0,30}", fullmatch=True).filter(lambda name: not name.endswith("_down")),
    st.none() | st.sampled_from(cf.DTYPE_SELECTORS),
    st.none() | st.tuples(st.integers(1, 512), st.integers(1, 512)),
    st.booleans(),
    st.booleans(),
)


@given(names)
def test_names_round_trip(name: cf.FileName) -> None:
    assert cf.parse_file_name(name.text()) == name
    assert cf.file_name(**vars(name)) == name.text()


@pytest.mark.parametrize(
    "name",
    [
        "",
        "config.json",
        "E=8,N=16.json",
        "E=8,N=16,device_name=.json",
        "E=8,N=16,device_name=_down.json",
        "E=8,N=16,device_name=X",
        "E=,N=1,device_name=X.json",
    ],
)
def test_other_names_are_refused(name: str) -> None:
    with pytest.raises(ConfigFileError, match="not a config file's name"):
        cf.parse_file_name(name)


def test_bad_parts_of_a_name() -> None:
    with pytest.raises(UnknownNameError, match="Did you mean fp8_w8a8"):
        cf.file_name(8, 16, "X", "fp8_w8a9")
    for device in ("", "  ", "a,b", "a/b"):
        with pytest.raises(ConfigFileError, match="device name"):
            cf.file_name(8, 16, device)
    with pytest.raises(ConfigFileError, match="E=0"):
        cf.file_name(0, 16, "X")


def test_selectors_of_unquantised_dtypes() -> None:
    for dtype, selector in (
        ("bfloat16", None),
        ("torch.float16", None),
        ("float32", "float32"),
        ("float64", "float32"),
    ):
        shape = MoEShape("any", 8, 2, 64, 32, dtype=dtype)
        assert cf.question(shape).dtype_selector == selector


# --- content ------------------------------------------------------------------------------------------------


@given(configs=st.dictionaries(st.integers(1, 1 << 20), valid_configs, min_size=1, max_size=8))
def test_files_round_trip(configs: dict[int, KernelConfig], tmp_path_factory: pytest.TempPathFactory) -> None:
    path = cf.write_config_file(tmp_path_factory.mktemp("c") / "x.json", configs)
    assert cf.read_config_file(path) == configs


def test_sglangs_formatting(tmp_path: Path) -> None:
    text = cf.write_config_file(tmp_path / "new" / "x.json", {64: LARGE, 1: SMALL}).read_text()
    assert text == json.dumps({"1": SMALL.to_json(), "64": LARGE.to_json()}, indent=4) + "\n"


def test_vllms_triton_version_is_skipped(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(json.dumps({"triton_version": "3.6.0", "1": SMALL.to_json()}))
    assert cf.read_config_file(tmp_path / "x.json") == {1: SMALL}


GOOD = json.dumps({"1": SMALL.to_json(), "64": LARGE.to_json()})
BROKEN = [
    ("", "not strict JSON"),
    (GOOD[:-30], "not strict JSON"),
    ("[1]", "holds a JSON list"),
    ("{}", "no batch size"),
    ('{"triton_version": "3.6.0"}', "no batch size"),
    (GOOD.replace('"64"', '"many"'), "batch size 'many'"),
    (GOOD.replace('"64"', '"-64"'), "batch size '-64'"),
    (GOOD.replace('"64"', '"1"'), "the key '1' twice"),
    (GOOD.replace('"num_warps": 8', '"num_warps": 8.0'), "batch size 64: .*num_warps is 8.0"),
    (GOOD.replace('"num_warps": 8', '"warps": 8'), "batch size 64: .*unknown key 'warps'"),
    (GOOD.replace('"BLOCK_SIZE_N": 256, ', ""), "batch size 64: .*missing key 'BLOCK_SIZE_N'"),
    ('{"1": 3}', "batch size 1: .*must be a JSON object"),
]


@pytest.mark.parametrize(("text", "named"), BROKEN)
def test_broken_files_are_refused(text: str, named: str, tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text(text)
    with pytest.raises(ConfigFileError, match=named):
        cf.read_config_file(tmp_path / "x.json")


def test_missing_file_and_bad_content_to_write(tmp_path: Path) -> None:
    with pytest.raises(ConfigFileError, match="Cannot read"):
        cf.read_config_file(tmp_path / "x.json")
    for configs in ({}, {0: SMALL}, {"1": SMALL}):
        with pytest.raises(ConfigFileError):
            cf.write_config_file(tmp_path / "x.json", configs)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="BLOCK_SIZE_M = 48"):
        cf.write_config_file(tmp_path / "x.json", {1: KernelConfig(48, 64, 64, 1)})
    assert list(tmp_path.iterdir()) == []


# --- lookup -------------------------------------------------------------------------------------------------


@given(st.lists(st.integers(1, 10_000), min_size=1, unique=True), st.integers(1, 20_000))
def test_nearest_key_law(keys: list[int], num_tokens: int) -> None:
    key = cf.nearest_key(keys, num_tokens)
    distance = abs(key - num_tokens)
    assert all(abs(k - num_tokens) > distance for k in keys[: keys.index(key)])  # nothing before is as near
    assert all(abs(k - num_tokens) >= distance for k in keys)


def test_a_tie_takes_the_first_listed(tmp_path: Path) -> None:
    for order, expected in ((("8", "16"), 8), (("16", "8"), 16)):
        folder = tmp_path / "-".join(order) / "triton_3_6_0"
        folder.mkdir(parents=True)
        entries = {key: (SMALL if key == "8" else LARGE).to_json() for key in order}
        (folder / "E=4,N=8,device_name=X.json").write_text(json.dumps(entries))
        found = cf.lookup(4, 8, "X", num_tokens=12, triton_version="3.6.0", config_dir=folder.parent)
        assert found.key == expected
        assert "is as near" in found.steps[-1].reason


def _tree(root: Path, *places: str) -> Path:
    """A config tree with a one-entry file at each "version/name" place; GROUP_SIZE_M tells them apart (1, 2, ...)."""
    for index, place in enumerate(places, start=1):
        cf.write_config_file(root / place, {1: KernelConfig(16, 32, 64, index)})
    return root


UP, DOWN = "E=4,N=8,device_name=X.json", "E=4,N=8,device_name=X_down.json"


@pytest.mark.parametrize(
    ("places", "version", "down", "used"),
    [
        (("triton_3_6_0/" + UP, "triton_3_7_1/" + UP), "3.6.0", False, 1),  # the exact version before a newer one
        (("triton_3_9_0/" + UP, "triton_3_10_0/" + UP), "3.6.0", False, 2),  # 3.10 is newer than 3.9: numbers, not text
        (("triton_3_6_0/" + UP,), "3.7.1", False, 1),  # an older version as a fallback
        (("triton_3_6_0/" + UP,), "3.6.0+git77", False, 1),
        (("triton_3_6_0/" + UP, "triton_3_5_1/" + DOWN), "3.6.0", True, 2),  # any version's _down before the up file
        (("triton_3_5_1/" + UP, "triton_3_6_0/" + UP), "3.6.0", True, 2),  # the up file by the same order
        (("triton_3_6_0/" + DOWN,), "3.6.0", False, None),  # a _down file never serves GEMM1
        (("triton_old/" + UP, "3_6_0/" + UP, "triton_3_6_0/sub/" + UP), "3.6.0", False, None),  # no version folders
        ((), "3.6.0", True, None),
    ],
)
def test_order_of_search(places: tuple, version: str, down: bool, used: int | None, tmp_path: Path) -> None:
    root = _tree(tmp_path, *places)
    found = cf.lookup(4, 8, "X", num_tokens=3, triton_version=version, down=down, config_dir=root)
    assert found.is_default == (used is None) == (found.path is None) == (found.key is None)
    expected = default_config(3, 4) if used is None else KernelConfig(16, 32, 64, used)
    assert found.config == expected
    assert found.steps[-1].result == "used"
    assert all(step.reason for step in found.steps)


def test_every_place_tried_is_a_step(tmp_path: Path) -> None:
    root = _tree(tmp_path, "triton_3_5_1/" + UP)
    (root / "triton_3_7_1").mkdir()
    found = cf.lookup(4, 8, "X", num_tokens=3, triton_version="3.6.0", down=True, config_dir=root)
    assert [(step.what, step.result) for step in found.steps] == [
        ("triton_3_6_0/" + DOWN, "absent"),
        ("triton_3_7_1/" + DOWN, "absent"),
        ("triton_3_5_1/" + DOWN, "absent"),
        ("triton_3_6_0/" + UP, "absent"),
        ("triton_3_7_1/" + UP, "absent"),
        ("triton_3_5_1/" + UP, "found"),
        ("batch size 1", "used"),
    ]
    assert "GEMM2 takes the up file's config" in found.steps[-2].reason


def test_a_broken_file_is_not_skipped(tmp_path: Path) -> None:
    root = _tree(tmp_path, "triton_3_5_1/" + UP)
    (root / "triton_3_6_0").mkdir()
    (root / "triton_3_6_0" / UP).write_text("{")
    with pytest.raises(ConfigFileError, match="not strict JSON"):
        cf.lookup(4, 8, "X", num_tokens=3, triton_version="3.6.0", config_dir=root)


def test_bad_questions(tmp_path: Path) -> None:
    with pytest.raises(UnknownNameError, match="Expected one of moelab"):
        cf.lookup(4, 8, "X", num_tokens=3, triton_version="3.6.0", rules="tgi", config_dir=tmp_path)
    with pytest.raises(ConfigFileError, match="num_tokens is 0"):
        cf.lookup(4, 8, "X", num_tokens=0, triton_version="3.6.0", config_dir=tmp_path)


# --- the files in the repository ----------------------------------------------------------------------------

SHIPPED = sorted(runtime.config_dir().rglob("*.json"))


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.name)
def test_shipped_files_are_reached_and_run_on_their_chip(path: Path) -> None:
    name = cf.parse_file_name(path.name)
    target = {"NVIDIA_H200": "sm_90"}[name.device_name]
    version = path.parent.name.removeprefix("triton_").replace("_", ".")
    for num_tokens, config in cf.read_config_file(path).items():
        assert violations(config, dtype=operand_dtype(name.dtype_selector), target=target) == ()
        found = cf.lookup(
            name.num_experts,
            name.moe_intermediate_size,
            name.device_name,
            num_tokens=num_tokens,
            triton_version=version,
            down=name.down,
            kernel=name.kernel,
            dtype_selector=name.dtype_selector,
            block_shape=name.block_shape,
            per_channel_quant=name.per_channel_quant,
        )
        assert (found.path, found.key, found.config) == (path, num_tokens, config)
    assert path.read_bytes().endswith(b"}\n")


def test_there_are_shipped_files() -> None:
    assert {path.name for path in SHIPPED} >= {
        "E=128,N=768,device_name=NVIDIA_H200.json",
        "E=16,N=2048,device_name=NVIDIA_H200.json",
        "E=32,N=1792,device_name=NVIDIA_H200.json",
        "E=256,N=256,device_name=NVIDIA_H200.json",
        "E=64,N=1536,device_name=NVIDIA_H200.json",
        "E=128,N=768,device_name=NVIDIA_H200,kernel=gated_tma.json",
    }
    assert {f"{path.stem}_down.json" for path in SHIPPED if not path.stem.endswith("_down")} == {
        path.name for path in SHIPPED if path.stem.endswith("_down")
    }


def test_every_shipped_file_is_in_the_table_of_its_readme() -> None:
    told = (runtime.config_dir() / "README.md").read_text(encoding="utf-8")
    own = [path for path in SHIPPED if ",kernel=" not in path.name and not path.stem.endswith("_down")]
    assert [path.name for path in own if f"| `{path.parent.name}/{path.name}` |" not in told] == []


@pytest.mark.parametrize("path", [path for path in SHIPPED if ",kernel=" in path.name], ids=lambda path: path.name)
def test_no_peer_finds_a_file_of_a_kernel_beside_the_compatible_kernel(path: Path) -> None:
    """What a peer finds for that layer is a file of the compatible kernel; moelab finds this one where it is asked for it."""
    name, tree = cf.parse_file_name(path.name), runtime.config_dir()
    asked = (name.num_experts, name.moe_intermediate_size, name.device_name)
    given = {"num_tokens": 1, "triton_version": "3.6.0", "down": name.down}
    assert cf.lookup(*asked, **given, kernel=name.kernel).path == path
    for rules, folder in (("moelab", tree), ("sglang", tree.parent), ("vllm", path.parent)):
        found = cf.lookup(*asked, **given | {"down": name.down and rules != "vllm"}, rules=rules, config_dir=folder)
        assert found.path is not None and ",kernel=" not in found.path.name, rules
