"""config_files.doctor: every kind of file that no lookup reaches or no kernel takes, and nothing else."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from moelab import config_files as cf
from moelab import runtime, shapes
from moelab.config import KernelConfig
from moelab.errors import ConfigFileError, MoelabError

KEYS = (1, 4, 16, 64, 256, 1024)
GOOD = {str(key): KernelConfig(16, 64, 64, 1).to_json() for key in KEYS}
UP = "E=4,N=128,device_name=NVIDIA_H200.json"  # sizes that no preset has
DOWN = UP.replace(".json", "_down.json")
V = "triton_3_6_0"


def put(path: Path, content: object = None, end: str = "\n") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text((content if isinstance(content, str) else json.dumps(content or GOOD, indent=4)) + end)
    return path


def entries(change: dict, *, without: str = "") -> dict:
    return {key: {k: v for k, v in (entry | change).items() if k != without} for key, entry in GOOD.items()}


def only(report: cf.Report) -> cf.Finding:
    assert len(report.findings) == 1, report.rows()
    finding = report.findings[0]
    assert finding.reason and finding.remedy.endswith(".")
    return finding


# --- upstream's mistake -------------------------------------------------------------------------------------


def plant_upstreams_mistake(tree: Path) -> tuple[set[Path], set[Path]]:
    """sglang's package with good files where the loader reads, and 33 in the folder that it no longer reads.

    (read, planted): 24 of LFM2 (two models, four tensor-parallel sizes, three devices) and 9 of Hy3, `_down` among
    them, as in sglang #22791.
    """
    moe = tree / "python" / "sglang" / "srt" / "layers" / "moe"
    new, old = moe / "moe_runner" / "triton_utils", moe / "fused_moe_triton"
    put(new / "fused_moe_triton_config.py", "def get_moe_configs(): ...")
    read = {put(new / "configs" / "triton_3_5_1" / name) for name in (UP, DOWN)}
    read |= {put(new / "configs" / "triton_3_6_0" / file.name, file.read_text(), "") for file in shipped()}
    planted = set()
    for model in ("lfm2-8b-a1b", "lfm2-24b-a2b"):
        for device, version in (
            ("NVIDIA H100 80GB HBM3", "3_5_1"),
            ("NVIDIA B200", "3_5_1"),
            ("AMD Instinct MI325X", "3_6_0"),
        ):
            planted |= {old / "configs" / f"triton_{version}" / name_of(model, tp, device) for tp in (1, 2, 4, 8)}
    for tp in (2, 4, 8):
        for more in ({}, {"down": True}, {"dtype_selector": "fp8_w8a8"}):
            planted.add(old / "configs" / "triton_3_6_0" / name_of("hy3", tp, "NVIDIA H20", **more))
    return read, {put(path) for path in planted}


def name_of(model: str, tp: int, device: str, **more: object) -> str:
    shape = shapes.preset(model).shard(tp)
    return cf.file_name(shape.num_experts, shape.moe_intermediate_size, device, **more)


def shipped() -> list[Path]:
    return sorted(runtime.config_dir().rglob("E=*.json"))


@pytest.mark.parametrize("known_by", ["module", "folder"])
@pytest.mark.parametrize("rules", ["auto", "sglang"])
def test_upstreams_mistake(rules: str, known_by: str, tmp_path: Path) -> None:
    read, planted = plant_upstreams_mistake(tmp_path)
    assert len(planted) == 33 and sum("_down" in path.name for path in planted) == 3
    if known_by == "folder":
        next(tmp_path.rglob("fused_moe_triton_config.py")).unlink()
    report = cf.doctor(tmp_path, rules)
    assert report.rules == "sglang" and set(report.files) == read | planted
    assert {finding.path for finding in report.findings if finding.severity != "note"} == planted
    assert {finding.path for finding in report.errors} == planted and len(report.errors) == 33
    assert {finding.problem for finding in report.errors} == {"wrong_folder"}
    for finding in report.errors:
        assert str(report.root / finding.path.parent.name) in finding.remedy
    assert {f.problem for f in report.of("note")} <= {"shared"}


def test_after_the_remedy_nothing_is_wrong(tmp_path: Path) -> None:
    _, planted = plant_upstreams_mistake(tmp_path)
    root = cf.doctor(tmp_path).root
    for path in planted:
        (root / path.parent.name).mkdir(exist_ok=True)
        shutil.move(path, root / path.parent.name / path.name)
    assert cf.doctor(tmp_path).errors == ()


@pytest.mark.parametrize("rules", ["auto", "moelab", "sglang"])
def test_our_own_configs_are_healthy(rules: str) -> None:
    """Two presets of different hidden size share some of the names: a note, for it is in the names' nature. The few batch
    sizes of a file for a kernel beside the compatible kernel are no remark."""
    report = cf.doctor(runtime.config_dir(), rules)
    assert any(",kernel=" in path.name for path in report.files)
    assert [f for f in report.findings if f.severity != "note"] == []
    assert {finding.problem for finding in report.findings} <= {"shared"}
    assert set(report.files) == {path.resolve() for path in shipped()}


def test_our_own_configs_serve_vllm_too(tmp_path: Path) -> None:
    for source in cf.sources(runtime.config_dir()):
        if cf.left_out(source.name, "vllm"):
            assert source.name.down or source.name.kernel
            continue
        cf.export(source.configs, source.name, rules="vllm", out=tmp_path, triton_version="3.6.0")
    report = cf.doctor(tmp_path)
    assert report.rules == "vllm" and {finding.problem for finding in report.findings} <= {"shared"}


# --- what no lookup reaches ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("rules", "place", "problem", "remedy"),
    [
        ("moelab", UP, "wrong_folder", V[:7] + "X_Y_Z"),
        ("moelab", f"{V}/sub/{UP}", "wrong_folder", "triton_X_Y_Z"),
        ("moelab", f"old/{V}/{UP}", "wrong_folder", V),
        ("moelab", f"triton-3.6.0/{UP}", "version_folder", "triton_3_6_0"),
        ("moelab", f"3_6_0/{UP}", "version_folder", "triton_3_6_0"),
        ("moelab", f"triton_new/{UP}", "version_folder", "triton_X_Y_Z"),
        ("sglang", f"configs/triton_3.6.0/{UP}", "version_folder", "triton_3_6_0"),
        ("sglang", f"{V}/{UP}", "wrong_folder", f"configs/{V}"),
        ("vllm", f"{V}/{UP}", "wrong_folder", "Move it to"),
        ("moelab", f"{V}/E=4,N=128,device_name=.json", "empty_device_name", "NVIDIA_H200"),
        ("moelab", f"{V}/E=4,N=128,device_name=,dtype=int4_w4a16_down.json", "empty_device_name", "NVIDIA_H200"),
        ("vllm", "E=4,N=128,device_name=_down.json", "empty_device_name", "NVIDIA_H200"),
        ("vllm", "E=4,N=128,device_name=.json", "empty_device_name", "NVIDIA_H200"),
        ("moelab", f"{V}/E=4,N=128,device_name=NVIDIA H200.json", "device_name", UP),
        ("vllm", "E=4,N=128,device_name=NVIDIA_H200_NVL.json", "device_name", UP),
        ("moelab", f"{V}/E=4,N=128,device_name=X,dtype=fp8_w8a9.json", "dtype_selector", "those"),
        ("moelab", f"{V}/E=4,N=128,device_name=X,dtype=bfloat16.json", "dtype_selector", "without dtype="),
        ("vllm", "E=4,N=128,device_name=X,dtype=int8_w8a8.json", "dtype_selector", "remove it"),
        ("moelab", f"{V}/E=4,N=128,device_name=X,block_shape=[128,128].json", "block_shape", "[128, 128]"),
        ("vllm", "E=4,N=128,device_name=X,block_shape=[128, 128].json", "block_shape", "[128,128]"),
        (
            "moelab",
            f"{V}/E=4,N=128,device_name=X,block_shape=[0, 128].json",
            "block_shape",
            "E=4,N=128,device_name=X.json",
        ),
        ("moelab", f"{V}/E=04,N=128,device_name=X.json", "misspelt_name", "E=4,N=128,device_name=X.json"),
        ("moelab", f"{V}/E=4,N=128.json", "misspelt_name", "file_name()"),
        ("moelab", f"{V}/e=4,n=128,device_name=X.json", "misspelt_name", "file_name()"),
        ("moelab", f"{V}/E=4,N=128,device_name=X.json.bak", "misspelt_name", "file_name()"),
        ("moelab", f"{V}/E=4,N=128,device_name=X,per_channel_quant=False.json", "misspelt_name", "per_channel_quant"),
        ("moelab", f"{V}/h200_tuned.json", "misspelt_name", "file_name()"),  # known by what it holds
        ("vllm", "E=4,N=25,device_name=X,dtype=int4_w4a16.json", "misspelt_name", "N"),
        ("vllm", DOWN, "never_asked_for", "remove it"),
        ("vllm", "E=4,N=128,device_name=X,per_channel_quant=True.json", "never_asked_for", "remove it"),
    ],
)
def test_unreached(rules: str, place: str, problem: str, remedy: str, tmp_path: Path) -> None:
    path = put(tmp_path / place)
    (tmp_path / "configs").mkdir(exist_ok=True)
    finding = only(cf.doctor(tmp_path, rules))
    assert (finding.path, finding.severity, finding.problem) == (path, "error", problem)
    assert remedy in finding.remedy


def test_a_folder_that_ends_sglangs_search(tmp_path: Path) -> None:
    put(tmp_path / "configs" / V / UP)
    (tmp_path / "configs" / "triton_old").mkdir()
    finding = only(cf.doctor(tmp_path))
    assert (finding.problem, finding.path.name) == ("stopping_folder", "triton_old") and "ValueError" in finding.reason
    assert cf.doctor(tmp_path / "configs", "moelab").findings == ()


def test_files_of_other_things_are_left_alone(tmp_path: Path) -> None:
    put(tmp_path / V / UP)
    put(tmp_path / V / "README.md", "# not a config")
    put(tmp_path / V / "summary.json", '{"best": 3}')
    put(tmp_path / "N=128,K=64,device_name=NVIDIA_H200.json")  # of another kernel of the peers'
    put(tmp_path / ".git" / UP)
    assert cf.doctor(tmp_path).files == ((tmp_path / V / UP).resolve(),)
    put(tmp_path / "flat" / UP)
    put(tmp_path / "flat" / "E=384,N=256,device_name=X,dtype=int4_w4a16,backend=flydsl.json", '{"1": {"tile_m": 16}}')
    assert cf.doctor(tmp_path / "flat", "vllm").findings == ()


def test_our_kernels_files_are_no_fault_in_a_peers_tree(tmp_path: Path) -> None:
    small = {"1": KernelConfig(1, 8, 256, 1, SPLIT_K=2).to_json()}
    put(tmp_path / "configs" / V / UP)
    put(tmp_path / "configs" / V / UP.replace(".json", ",kernel=decode.json"), small)
    for folder, rules in ((tmp_path, "sglang"), (tmp_path / "configs", "moelab")):
        assert cf.doctor(folder, rules).findings == ()
    put(tmp_path / "configs" / V / UP.replace(".json", ",kernel=decode.json"), {"1": {"BLOCK_SIZE_M": 3}})
    assert {finding.problem for finding in cf.doctor(tmp_path).findings} == {"missing_key"}


# --- which tree ---------------------------------------------------------------------------------------------


def test_auto_tells_the_loader(tmp_path: Path) -> None:
    ours, theirs, flat = (put(tmp_path / place / UP) for place in (f"a/{V}", f"b/configs/{V}", "c"))
    package = put(tmp_path / "d" / "vllm" / "model_executor" / "layers" / "fused_moe" / "configs" / UP)
    for folder, rules, file in (
        ("a", "moelab", ours),
        ("b", "sglang", theirs),
        ("c", "vllm", flat),
        ("d", "vllm", package),
    ):
        report = cf.doctor(tmp_path / folder)
        assert (report.rules, report.findings, report.files) == (rules, (), (file.resolve(),))
    assert cf.doctor(ours.parent).rules == "moelab" and cf.doctor(ours.parent).findings == ()


def test_one_tree_further_down_is_found_and_two_are_not_guessed_between(tmp_path: Path) -> None:
    put(tmp_path / "deep" / "configs" / V / UP)
    assert (cf.doctor(tmp_path).rules, cf.doctor(tmp_path).findings) == ("sglang", ())
    put(tmp_path / "other" / V / UP)
    with pytest.raises(ConfigFileError, match=r"2 trees.*Name the folder"):
        cf.doctor(tmp_path)


def test_report_as_json(tmp_path: Path) -> None:
    put(tmp_path / V / UP, end="")
    put(tmp_path / UP)
    answer = json.loads(json.dumps(cf.doctor(tmp_path, "moelab").to_json()))
    assert (answer["errors"], answer["warnings"], answer["notes"], answer["files"]) == (1, 1, 0, 2)
    assert [row["severity"] for row in answer["findings"]] == ["error", "warning"]
    assert set(answer["findings"][0]) == {"severity", "problem", "file", "reason", "remedy"}
    assert answer["findings"][0]["file"] == UP


# --- the doctor and the lookup agree ------------------------------------------------------------------------

parts = st.tuples(
    st.sampled_from(("NVIDIA_H200", "NVIDIA_H200_NVL", "NVIDIA H200", "", "X")),
    st.sampled_from(("", ",dtype=fp8_w8a8", ",dtype=int8_w8a8", ",dtype=fp8_w8a16", ",dtype=bf16")),
    st.sampled_from(("", ",block_shape=[128, 64]", ",block_shape=[128,64]")),
    st.sampled_from(("", ",per_channel_quant=True")),
    st.sampled_from(("", "_down")),
)
places = st.sampled_from((".", V, "triton_3.6.0", f"configs/{V}", "configs", "configs/triton_3_5", f"old/{V}"))


@settings(max_examples=150)
@given(given_parts=parts, place=places, rules=st.sampled_from(("moelab", "sglang", "vllm")))
def test_what_the_doctor_calls_unreached_no_lookup_finds(
    given_parts: tuple, place: str, rules: str, tmp_path_factory: pytest.TempPathFactory
) -> None:
    root = tmp_path_factory.mktemp("tree")
    device, selector, block, quant, down = given_parts
    path = put(root / place / f"E=4,N=128,device_name={device}{selector}{block}{quant}{down}.json")
    (root / "configs").mkdir(exist_ok=True)
    unreached = {"wrong_folder", "version_folder", "device_name", "dtype_selector", "block_shape", "empty_device_name"}
    unreached |= {"misspelt_name", "never_asked_for"}
    report = cf.doctor(root, rules)
    assert report.root == root / (
        "configs" if rules == "sglang" or (place.startswith("configs/") and rules == "moelab") else ""
    )
    said = any(f.path == path and f.severity == "error" and f.problem in unreached for f in report.findings)
    config_dir = report.root.parent if rules == "sglang" else report.root
    try:
        answer = cf.lookup(
            4, 128, device.replace("_", " "), num_tokens=3, triton_version="3.6.0", down=bool(down),
            dtype_selector=selector.removeprefix(",dtype=") or None, block_shape=(128, 64) if block else None,
            per_channel_quant=bool(quant), config_dir=config_dir, rules=rules,
        )  # fmt: skip
        found = answer.path == path
    except MoelabError:
        found = False
    assert said == (not found), report.rows()
