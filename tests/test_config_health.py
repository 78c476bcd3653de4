"""The specimen has every mistake that the doctor knows; a report and a lookup's path are drawn as they are."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest
import specimen

from moelab import config_files, runtime
from moelab.config_files import doctor
from moelab.errors import RecordingError
from moelab.plots import config_health, lookup_path

MODULES = ("checks", "reach", "diagnosis")


@pytest.fixture(scope="module")
def ill(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return specimen.write_specimen(tmp_path_factory.mktemp("specimen"))


@pytest.fixture(scope="module")
def shipped(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return config_files.write_shipped(tmp_path_factory.mktemp("shipped"))


# --- the specimen -------------------------------------------------------------------------------------------------


def kinds_in_the_source() -> set[str]:
    """The kinds of finding that the doctor's code can name: where a Finding or a problem is made."""
    found = set()
    for module in MODULES:
        for node in ast.walk(ast.parse((Path(config_files.__file__).parent / f"{module}.py").read_text())):
            if isinstance(node, ast.Call) and ast.unparse(node.func) in ("Finding", "_error") and len(node.args) > 3:
                found.add(node.args[2 if ast.unparse(node.func) == "Finding" else 1])
            elif isinstance(node, ast.Yield) and isinstance(node.value, ast.Tuple):
                found.add(node.value.elts[1])
            elif isinstance(node, ast.Return) and isinstance(node.value, ast.Tuple):
                found.add(node.value.elts[0])
            elif isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "_KINDS":
                found |= {pair.elts[1] for pair in node.value.elts}
    words = {node.value for node in found if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    return {word for word in words if word.replace("_", "").isalpha()}


def test_every_kind_of_finding_is_planted() -> None:
    """`invalid_value` is a default in the code, and no constant of its own there."""
    kinds = kinds_in_the_source()
    assert {"wrong_folder", "block_m_mismatch", "shared_memory", "sparse", "device_name"} <= kinds
    assert kinds <= {mistake.problem for mistake in specimen.MISTAKES}


@pytest.mark.parametrize("rules", ["moelab", "sglang", "vllm"])
def test_each_mistake_is_found_by_its_name(rules: str, ill: Path) -> None:
    report = doctor(ill, rules)
    found = {(report.shown(finding.path), finding.problem) for finding in report.findings}
    assert {(path, problem) for path, (problem, _) in specimen.planted(rules).items()} <= found


def test_nothing_else_is_found(ill: Path) -> None:
    report = doctor(ill)
    assert report.rules == "sglang" and len(report.findings) == len(specimen.planted())
    assert {report.shown(finding.path) for finding in report.findings} == {*specimen.planted()}
    assert {path.relative_to(ill.resolve()).as_posix() for path in report.files} >= {*specimen.SOUND}


def test_writing_it_twice_changes_nothing(tmp_path: Path) -> None:
    before = doctor(specimen.write_specimen(tmp_path / "deep" / "down")).rows()
    assert doctor(specimen.write_specimen(tmp_path / "deep" / "down")).rows() == before


def test_sglangs_files_are_sound_and_in_place(shipped: Path) -> None:
    report = doctor(shipped)
    assert report.rules == "sglang" and not report.errors and not report.of("warning")
    assert len(report.files) == len(config_files.shipped_files()) == 17
    assert sum("dtype=fp8_w8a8,block_shape=[128, 128]" in file.name for file in report.files) == 7


def test_the_shipped_configs_that_were_timed_are_those_of_their_file() -> None:
    """The origin that the file claims for h200_sglang.json's shipped configs, entry by entry."""
    from moelab.suites.layer_classic import peer_rows

    timed = {
        file["timed_as_shipped"]: file["configs"] for file in config_files.shipped_files() if file["timed_as_shipped"]
    }
    seen = 0
    for row in peer_rows():
        if row.get("shipped_cfg"):
            configs = timed[row["name"]]
            key = config_files.nearest_key([int(key) for key in configs], row["M"])
            assert configs[str(key)] == row["shipped_cfg"], row["name"]
            seen += 1
    assert seen == 24 and len(timed) == 3


def test_a_lost_data_file_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MOELAB_DATA_DIR", str(tmp_path))
    with pytest.raises(RecordingError, match="Expected sglang's config files"):
        config_files.shipped_files()


# --- the report ---------------------------------------------------------------------------------------------------


def test_bars_count_findings(ill: Path) -> None:
    report = doctor(ill)
    panel = config_health.findings(report, planted=specimen.planted())
    drawn = {(bar.name, kind): n for bar in panel.figure.data for kind, n in zip(bar.y, bar.x, strict=True)}
    assert drawn["error", "wrong_folder"] == 3 and drawn["warning", "version_folder"] == 1
    assert sum(n for (name, _), n in drawn.items() if name == "error") == len(report.errors)
    assert drawn["nothing to repair", "nothing to repair"] == 5  # three that sglang takes, two with a note alone
    assert len(panel.table) == len(report.findings) and all(row["what was done"] for row in panel.table)
    assert f"All {len(specimen.planted())} planted mistakes were found" in panel.sentence
    assert not any(str(ill) in text for row in panel.table for text in row.values())


def test_severities_are_left_out(ill: Path) -> None:
    panel = config_health.findings(doctor(ill), ["error"])
    assert {row["severity"] for row in panel.table} == {"error"} and "what was done" not in panel.table[0]
    assert [bar.name for bar in panel.figure.data] == ["nothing to repair", "error"]


def test_a_mistake_that_was_missed_is_said(ill: Path) -> None:
    panel = config_health.findings(doctor(ill), planted=specimen.planted() | {"configs/x.json": ("sparse", "made up")})
    assert "1 were missed: configs/x.json" in panel.sentence


def test_ours_are_healthy() -> None:
    panel = config_health.findings(doctor(runtime.config_dir()))
    assert panel.sentence.startswith("**0 errors, 0 warnings") and "Nothing to do" in panel.sentence


# --- the path -----------------------------------------------------------------------------------------------------


def kinds(panel: object, rules: str) -> list[str]:
    return [row["result"] for row in panel.table if row["rules"] == rules]


def test_three_paths_side_by_side(shipped: Path) -> None:
    """GEMM2 on an H100 under Triton 3.6.0: moelab and sglang take the newer folder's _down file, vLLM none."""
    panel = lookup_path.explain(
        shipped, device="NVIDIA H100 80GB HBM3", num_tokens=100, triton_version="3.6.0", down=True
    )
    assert kinds(panel, "sglang") == ["variable", "absent", "found", "passed over", "passed over", "used", "config"]
    assert kinds(panel, "moelab") == kinds(panel, "sglang")
    assert kinds(panel, "vllm") == ["variable", "left out", "absent", "used", "config"]
    assert "2 different answers" in panel.figure.layout.title.text
    assert (
        "moelab, sglang: 16x128x128 g1 w4 s2, batch size 96 of" in panel.sentence
        and "vllm: no file, so the default" in panel.sentence
    )
    assert not any(str(shipped) in str(value) for row in panel.table for value in row.values())


def test_a_key_of_sglangs_kernel_alone_is_a_node_of_its_own(shipped: Path) -> None:
    """At batch 4096 that file says USE_TMA: both leave it out, and moelab says what it means here."""
    panel = lookup_path.explain(
        shipped, device="NVIDIA H100 80GB HBM3", num_tokens=4096, triton_version="3.7.1", down=True
    )
    said = {row["rules"]: row["why"] for row in panel.table if row["what"] == "USE_TMA = True"}
    assert set(said) == {"moelab", "sglang"} and "`tma` reads weights by TMA" in said["moelab"]
    assert not {"error"} & set(kinds(panel, "moelab"))


def test_each_loader_is_pointed_by_its_variable() -> None:
    home = runtime.config_dir().parent
    panel = lookup_path.explain(home)
    first = {row["rules"]: row["what"] for row in panel.table if row["step"] == 1}
    assert first == {
        "moelab": "MOELAB_CONFIG_DIR = configs",
        "sglang": "SGLANG_MOE_CONFIG_DIR = the tree",
        "vllm": "VLLM_TUNED_CONFIG_FOLDER = configs/triton_3_6_0",
    }
    assert "all agree" in panel.figure.layout.title.text and panel.sentence.startswith("**moelab, sglang, vllm: ")


def test_a_path_is_of_the_checkpoints_own_format(shipped: Path) -> None:
    """Of DeepSeek-V3 sglang takes the file in fp8 blocks, with its fused expert; a format without files ends the search."""
    panel = lookup_path.explain(shipped, "deepseek-v3-fp8", 8, 64, triton_version="3.5.1", rules="sglang", dtype=None)
    assert "E=257,N=256,device_name=NVIDIA_H200,dtype=fp8_w8a8,block_shape=[128, 128].json" in panel.table[-1]["why"]
    assert "E=257, N=256, fp8_w8a8_block_128x128, Triton 3.5.1" in panel.figure.layout.title.subtitle.text
    plain = lookup_path.explain(shipped, "deepseek-v3-fp8", 8, 64, triton_version="3.5.1", rules="sglang")
    assert "bfloat16" in plain.figure.layout.title.subtitle.text and plain.table[-1]["why"] == "the default rule"
    none = lookup_path.explain(shipped, "gpt-oss-20b-mxfp4", dtype=None)
    assert none.figure.layout.title.text.endswith("all agree") and none.table[-1]["result"] == "error"
    assert "No config file is asked for" in none.table[-1]["why"]


def test_one_loaders_path_is_alone(ill: Path) -> None:
    panel = lookup_path.explain(ill, triton_version="3.7.1", rules="sglang")
    assert {row["rules"] for row in panel.table} == {"sglang"} and panel.table[-1]["result"] == "error"
    assert panel.figure.layout.title.text.endswith("an error") and "triton_old" in panel.table[-1]["why"]


def test_every_node_has_its_label(shipped: Path) -> None:
    panel = lookup_path.explain(shipped, num_tokens=7)
    texts = [trace for trace in panel.figure.data if trace.mode == "text"]
    assert [len(trace.text) for trace in texts] == [len(kinds(panel, rules)) for rules in ("moelab", "sglang", "vllm")]
    for trace in texts:
        assert list(trace.y) == sorted(trace.y) and max(trace.y) < panel.figure.layout.yaxis.range[0]


def test_lines_are_broken_and_nothing_is_lost() -> None:
    text = "triton_3_6_0/E=128,N=768,device_name=NVIDIA_H200_down.json, and <words> with more, at the end"
    lines = lookup_path._wrapped(text, 24)
    assert max(map(len, lines)) <= 30  # escaped brackets are longer than what is seen
    assert "".join(lines).replace(" ", "") == text.replace(" ", "").replace("<", "&lt;").replace(">", "&gt;")
