"""The command line under abuse: what no shell, terminal, disk or network may make of it."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from cut_short import as_another_user

from moelab import cli, presets, runtime
from moelab import config_files as cf
from moelab.config import KernelConfig
from moelab.errors import UnknownModelError

PRESET = ["--model", "qwen3-30b-a3b"]
LANDSCAPE = "qwen3-30b-a3b-tp1-NVIDIA_H200"


# --- values -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "version",
    ["3.6.0/x/y", "3.6.0/../..", "3.6", "3.6.0\n", "x3.6.0", "٣.٦.٠", "3.6.0 ", "3.6.0+", "3.6.0+a/b", "3.6.0x"],
)
def test_a_version_is_matched_whole(version: str, run, tmp_path: Path) -> None:
    """Before: whatever began with three numbers was taken, and `/x/y` made folders."""
    (source, *_) = cf.sources(runtime.config_dir())
    for command in (
        ("export", source.origin, "--rules", "moelab", "--out", tmp_path / "out"),
        ("explain", *PRESET, "--device", "NVIDIA H200", "--batch-size", 1),
    ):
        status, out, err = run(*command, "--triton-version", version)
        assert (status, out) == (2, "") and "not a whole version" in err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    "version", ["3.6.0", "3.7.0rc1", "3.6.0.post1", "3.6.0+git1234", "3.7.0a0+abc.def", "3.8.0-dev"]
)
def test_versions_as_packages_have_them(version: str) -> None:
    assert runtime.is_version(version)


@pytest.mark.parametrize(
    ("option", "values"),
    [
        ("--budget", ["9" * 400, "1e3", "-5m", "0", "0s", "5 m", "٥m", "1001h", "nan", "inf", "5m5s"]),
        ("--seed", ["-1", str(2**63), "9" * 5000, "1.5", "x"]),
        ("--gpus", ["0,0", "0,", ",", "-1", "٣", "9" * 30, "0;1", "cuda:0"]),
        ("--batch-size", ["0", "-1", str(2**31), str(2**62), "9" * 5000, "x"]),
    ],
)
def test_numbers_of_a_tuner(option: str, values: list[str], run) -> None:
    for value in values:
        more = PRESET if option == "--gpus" else ["--replay", LANDSCAPE]
        status, out, err = run("tune", *more, f"{option}={value}")
        assert (status, out) == (2, "") and ("Invalid value" in err or "Error" in err), (value, err)


@pytest.mark.parametrize(
    "command", [("explain", *PRESET, "--device", "NVIDIA H200", "--kernel", "fast"), ("bench", *PRESET)]
)
def test_a_batch_that_no_tensor_holds(command: tuple, run) -> None:
    """Before: `explain --kernel fast` ended in torch's RuntimeError."""
    status, out, err = run(*command, "--batch-size", 2**62)
    assert (status, out) == (2, "") and "--batch-size" in err


def test_the_largest_batch_has_an_answer(run) -> None:
    assert run("explain", *PRESET, "--device", "NVIDIA H200", "--kernel", "fast", "--batch-size", 2**31 - 1)[0] == 0


def test_an_empty_argument_is_a_variable_that_is_not_set(run, tmp_path: Path, monkeypatch) -> None:
    """Before: `--out "$UNSET"` wrote into the folder one was in, `--budget "$UNSET"` searched without one."""
    monkeypatch.chdir(tmp_path)
    for name in ("--out", "--budget", "--freeze", "--resume"):
        for arguments in ([name, ""], [f"{name}="]):
            status, out, err = run("tune", "--replay", LANDSCAPE, *arguments)
            assert (status, out) == (2, "") and f"An argument for {name} is empty. Expected a value" in err
    assert run("doctor", "")[0] == 2 and not list(tmp_path.iterdir())


# --- what reaches a terminal --------------------------------------------------------------------------------------

ESCAPES = "\x1b[31mX\x1b]0;title\x07\x9b2J\r\u202e"


def unsafe(text: str) -> list[str]:
    return [c for c in text if c in "\x1b\x07\x9b\r\u202e" or "\ud800" <= c <= "\udfff"]


@pytest.mark.parametrize(
    "arguments",
    [
        ("shape", *PRESET, "--device", ESCAPES), ("shape", *PRESET, "--device", ESCAPES, "--json"),
        ("shape", "--model", ESCAPES), ("shape", *PRESET, "--dtype", ESCAPES), ("shape", *PRESET, "--rules", ESCAPES),
        ("explain", *PRESET, "--batch-size", 1, "--device", ESCAPES), ("explain", *PRESET, "--batch-size", ESCAPES),
        ("explain", *PRESET, "--batch-size", 1, "--device", "H", "--kernel", ESCAPES),
        ("tune", "--replay", ESCAPES), ("tune", *PRESET, "--routing", ESCAPES), ("tune", *PRESET, "--kernel", ESCAPES),
        ("bench", *PRESET, "--impl", ESCAPES), ("record", ESCAPES), (ESCAPES,), (f"--{ESCAPES}",),
        ("doctor", ESCAPES), ("export", ESCAPES, "--rules", "moelab", "--out", "x"), ("shape", "--model", "a\udcffb"),
    ],
)  # fmt: skip
def test_no_escape_reaches_the_terminal(arguments: tuple, run) -> None:
    _, out, err = run(*arguments)
    assert unsafe(out + err) == [] and out + err


@pytest.fixture
def models(tmp_path: Path) -> Path:
    """The path of a model whose name, source and architecture are terminal escapes."""
    found = json.loads((runtime.data_dir() / "models" / "qwen3-30b-a3b.json").read_text())
    folder = tmp_path / f"m\x1b[2J{ESCAPES[:4]}\nx"
    folder.mkdir()
    changed = found | {"source": ESCAPES, "architectures": [ESCAPES], "hidden_act": ESCAPES}
    (folder / "config.json").write_text(json.dumps(changed))
    return folder / "config.json"


def test_a_models_file_sends_no_escape(models: Path, run) -> None:
    for more in ([], ["--json"]):
        _, out, err = run("shape", "--model", models, *more)
        assert unsafe(out + err) == []


def test_a_table_keeps_its_lines(run) -> None:
    """A name with a line's end in it writes no line of its own."""
    _, plain, _ = run("shape", *PRESET, "--device", "X")
    _, out, _ = run("shape", *PRESET, "--device", "X\nproblems  none\tat all")
    assert len(out.splitlines()) == len(plain.splitlines())


def test_what_stdout_cannot_encode_is_written_out(tmp_path: Path) -> None:
    """Before: a UnicodeEncodeError's traceback, after the files had been written."""
    name = cf.FileName(4, 128, "NVIDIA_H200")
    cf.export({1: KernelConfig(16, 64, 64, 1)}, name, rules="moelab", out=tmp_path / "ü", triton_version="3.6.0")
    for more in ({"PYTHONIOENCODING": "ascii"}, {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"}):
        command = [sys.executable, "-m", "moelab", "export", str(tmp_path / "ü"), "--rules", "moelab", "--overwrite"]
        ran = subprocess.run([*command, "--out", str(tmp_path / "é")], env={**os.environ, **more}, capture_output=True)
        assert ran.returncode == 0 and b"Traceback" not in ran.stderr, ran.stderr
        assert ran.stdout.isascii() and (rb"/\xe9/" in ran.stdout or rb"/\udcc3\udca9/" in ran.stdout)


def test_a_stream_that_is_full_ends_with_a_status(run, monkeypatch) -> None:
    full = open("/dev/full", "w")  # noqa: SIM115 (what it could not write, it cannot when it is closed)
    monkeypatch.setattr(sys, "stdout", full)
    status = cli.main(["models"])
    monkeypatch.undo()
    with contextlib.suppress(OSError):
        full.close()
    assert status == 2


# --- doctor -------------------------------------------------------------------------------------------------------


@pytest.fixture
def open_folder() -> Iterator[Path]:
    """One that other users may read, as pytest's own are not."""
    folder = Path(tempfile.mkdtemp())
    folder.chmod(0o755)
    yield folder
    for path in folder.rglob("*"):
        path.chmod(0o700)
    shutil.rmtree(folder)


def test_a_doctor_says_what_it_may_not_read(open_folder: Path) -> None:
    """Before: 0 errors, exit status 0."""
    config = {size: KernelConfig(16, 64, 64, 1) for size in (1, 4, 16, 64, 256, 1024)}
    for version in ("3.6.0", "3.5.0"):
        cf.export(config, cf.FileName(4, 128, "NVIDIA_H200"), rules="moelab", out=open_folder, triton_version=version)
    assert cf.doctor(open_folder).errors == ()
    closed = open_folder / "triton_3_5_0"
    other = open_folder / "triton_3_6_0" / "mine.json"
    other.write_text("{}")
    for path in (closed, other):
        path.chmod(0)

    def look() -> None:
        report = cf.doctor(open_folder)
        found = {(finding.path, finding.severity, finding.problem) for finding in report.findings}
        assert found == {(path, "error", "unreadable") for path in (closed, other)}, found

    assert as_another_user(look) == (0, "")


# --- Hugging Face -------------------------------------------------------------------------------------------------


@pytest.fixture
def silent_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A hub that takes connections and never answers."""
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen(8)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.getsockname()[1]}")
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        yield constants.ENDPOINT


def test_a_hub_out_of_reach_is_given_up_at_once(silent_hub, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: its client tried again for 26 s. Each way of being out of reach ends within the limit, and a little."""
    from huggingface_hub import constants

    monkeypatch.setattr(presets, "HUB_LIMIT_S", 0.3)
    free = socket.socket()
    free.bind(("127.0.0.1", 0))
    address = f"http://127.0.0.1:{free.getsockname()[1]}"
    free.close()
    for endpoint in (silent_hub, address, "http://no-such-host.invalid"):
        monkeypatch.setattr(constants, "ENDPOINT", endpoint)
        begin = time.monotonic()
        with pytest.raises(UnknownModelError, match=r"could not be fetched.*Check the id and the network"):
            presets.source_of("nobody/nothing-of-the-kind")
        assert time.monotonic() - begin < 10


@pytest.mark.parametrize("name", ["{folder}/modles", "nobody/config.json5.txt", "nobody/model.safetensors"])
def test_what_looks_like_a_path_is_not_asked_for(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "data").mkdir()
    monkeypatch.chdir(tmp_path)
    asked: list[object] = []
    monkeypatch.setattr(presets, "_require_hub", lambda: asked.append(1))
    with pytest.raises(UnknownModelError, match=r"nothing at .*Hugging Face was not asked.*Expected"):
        presets.source_of(name.format(folder="data"))
    assert asked == []


def test_streams_are_put_back(capsys: pytest.CaptureFixture[str]) -> None:
    before = sys.stdout, sys.stderr
    for arguments in (["models"], ["nothing"], ["--version"]):
        cli.main(arguments)
        assert (sys.stdout, sys.stderr) == before


def test_a_stream_without_an_encoding(monkeypatch: pytest.MonkeyPatch) -> None:
    said = io.StringIO()
    monkeypatch.setattr(sys, "stdout", said)
    assert cli.main(["shape", *PRESET, "--device", "ü\x1b"]) == 0
    assert "ü\\x1b" in said.getvalue()


# --- other doors --------------------------------------------------------------------------------------------------


def test_an_apps_panel_writes_below_its_folder_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before: its folder field took any that its owner may write to."""
    from moelab.widgets.fields import place_to_write

    (tmp_path / "app").mkdir()
    (tmp_path / "app" / "link").symlink_to(tmp_path)
    assert place_to_write(str(tmp_path)) is None  # in JupyterLab
    monkeypatch.setenv("MOELAB_APP_FOLDER", str(tmp_path / "app"))
    for inside in ("app", "app/export/moelab", "app/../app/x"):
        assert place_to_write(str(tmp_path / inside)) is None
    for outside in ("", "elsewhere", "app/../x", "app/link", "app/link/x", "application"):
        assert "where alone an app may write" in str(place_to_write(str(tmp_path / outside))), outside
