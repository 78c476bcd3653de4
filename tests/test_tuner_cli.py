"""`moelab tune`: on a laptop by replay, interrupted and taken up again, and refused where it cannot run."""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from synthetic import small_problem, synthetic_landscape

from moelab import config_files, runtime
from moelab.errors import ConfigFileError
from moelab.tuner import journal, landscape, replay
from moelab.tuner.results import TuneResult

ROOT = Path(__file__).resolve().parent.parent
PROBLEM = small_problem((1, 64))


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return landscape.write(synthetic_landscape(PROBLEM), tmp_path_factory.mktemp("landscapes") / "small.parquet")


def test_an_out_that_is_a_file(run, recorded: Path, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    status, out, err = run("tune", "--replay", recorded, "--budget", "1s", "--out", tmp_path / "file")
    assert (status, out) == (2, "") and str(tmp_path / "file") in err and "a file" in err and "Errno" not in err


def test_replay_prints_a_table_and_writes_nothing(run, recorded: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    status, out, err = run("tune", "--replay", recorded)
    assert status == 0 and not list(tmp_path.iterdir())
    assert out.startswith("recorded on SYNTHETIC") and "over default" in out and "in all: compile" in out
    assert [line.split()[0] for line in out.splitlines()[3:5]] == ["1", "64"]
    assert err.splitlines()[0].startswith("compile ") and any(line.startswith("layers ") for line in err.splitlines())


def test_replay_into_a_folder(run, recorded: Path, tmp_path: Path) -> None:
    status, out, _ = run(
        "tune", "--replay", recorded, "--out", tmp_path, "--json", "--strategy", "grid", "--batch-size", 64
    )
    answer = json.loads(out)
    assert status == 0 and [row["num_tokens"] for row in answer["batches"]] == [64]
    up, down = (config_files.read_config_file(path) for path in answer["files"])
    assert {64: answer["configs"]["up"]["64"]} == {b: c.to_json() for b, c in up.items()}
    assert up[64].BLOCK_SIZE_M == down[64].BLOCK_SIZE_M
    assert journal.read(answer["run"]).header["strategy"]["name"] == "grid"
    assert dict(answer["timeline"]).keys() == {"compile", "grid", "finalists", "layers"}


def test_a_budget_that_leaves_nothing_to_search_says_so(run, recorded: Path, tmp_path: Path) -> None:
    status, out, _ = run("tune", "--replay", recorded, "--budget", "1s", "--out", tmp_path)
    said = [line for line in out.splitlines() if line.startswith(("The budget", "Nothing", "Compiled", "About"))]
    assert status == 0 and said[0].startswith("The budget of 1 s cut the search short, in: compile")
    command = said[-1].partition("moelab ")[2].split()
    journal.read(command[2])
    answer = json.loads(run("tune", "--replay", recorded, "--budget", "1s", "--json")[1])["search"]
    assert answer["budget_s"] == 1 < answer["needed_s"] and answer["cut"][0] == "compile"
    assert all(row["compiled"] < row["candidates"] and row["measured"] == 0 for row in answer["batches"])
    status, out, _ = run(*command, "--json")
    assert status == 0 and json.loads(out)["search"]["cut"] == [] and json.loads(out)["search"]["needed_s"] is None


def test_a_run_without_a_budget_counts_its_candidates_and_says_nothing(run, recorded: Path) -> None:
    out = run("tune", "--replay", recorded)[1]
    assert "budget" not in out and "candidates" not in out
    answer = json.loads(run("tune", "--replay", recorded, "--json")[1])["search"]
    assert answer["budget_s"] is None and all(row["measured"] > 0 for row in answer["batches"])


def test_sglangs_flags_are_taken(run, recorded: Path) -> None:
    flags = ("--tp", 1, "--ep", 1, "--dtype", "auto", "--seed", 1, "--batch-sizes", 1, "--batch-sizes", 64, "--tune")
    assert run("tune", "--replay", recorded, *flags, "--no-down", "--budget", "5m", "--json")[0] == 0


def test_an_interrupted_run_says_how_to_go_on(run, recorded: Path, tmp_path: Path, monkeypatch) -> None:
    real, answered = replay.ReplayEvaluator.run, []

    def interrupted(self, requests):
        for result in real(self, requests):
            answered.append(result)
            if len(answered) == 12:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(replay.ReplayEvaluator, "run", interrupted)
    status, out, err = run("tune", "--replay", recorded, "--out", tmp_path)
    assert (status, out) == (130, "") and "Traceback" not in err
    command = next(line for line in err.splitlines() if "--resume" in line).partition("moelab ")[2].split()
    monkeypatch.undo()
    resumed, plain = run(*command, "--json"), run("tune", "--replay", recorded, "--json")
    assert resumed[0] == 0 and json.loads(resumed[1])["batches"] == json.loads(plain[1])["batches"]
    assert (tmp_path / "triton_3_6_0").is_dir()


def go_on(err: str) -> list[str]:
    """The arguments of the command that stderr names."""
    command = next(line for line in err.splitlines() if "go on with: moelab " in line).partition("go on with: ")[2]
    return shlex.split(command)[1:]


@pytest.mark.parametrize(
    "error", [KeyboardInterrupt, OSError(28, "No space left on device"), ConfigFileError("not so")]
)
def test_what_comes_between_search_and_files_says_how_to_go_on(
    run, recorded: Path, tmp_path: Path, monkeypatch, error: BaseException
) -> None:
    """And what goes on measures nothing, under the budget that held."""

    def refused(*_: object) -> None:
        raise error

    monkeypatch.setattr(TuneResult, "write", refused)
    out = tmp_path / "a folder"
    status, said, err = run("tune", "--replay", recorded, "--out", out, "--budget", "1.5h")
    assert (status, said) == (130 if error is KeyboardInterrupt else 2, "") and "Traceback" not in err
    command = go_on(err)
    assert command[-2:] == ["--budget", "5400s"]
    monkeypatch.undo()
    lines = len(journal.read(command[2]).results)
    status, said, _ = run(*command, "--json")
    assert status == 0 and len(journal.read(command[2]).results) == lines > 0
    assert all(Path(path).is_relative_to(out) for path in json.loads(said)["files"])


def test_how_to_go_on_names_what_the_run_was_resumed_with(run, recorded: Path, tmp_path: Path, monkeypatch) -> None:
    first = json.loads(run("tune", "--replay", recorded, "--out", tmp_path, "--budget", "1s", "--json")[1])["run"]
    other = tmp_path / "other"
    status, out, _ = run("tune", "--resume", first, "--out", other, "--budget", "2s")
    told = next(line for line in out.splitlines() if "would do: " in line).partition("would do: ")[2]
    assert status == 0 and shlex.split(told)[:6] == ["moelab", "tune", "--resume", first, "--out", str(other)]
    monkeypatch.setattr(TuneResult, "write", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    _, _, err = run("tune", "--resume", first, "--out", other, "--budget", "2s", "--json")
    assert go_on(err) == ["tune", "--resume", first, "--out", str(other), "--json", "--budget", "2s"]
    _, _, err = run("tune", "--resume", first)
    assert go_on(err) == ["tune", "--resume", first, "--budget", "2s"], "the last one holds, and is named"
    _, _, err = run("tune", "--resume", first, "--budget", "none")
    assert go_on(err) == ["tune", "--resume", first]
    assert go_on(run("tune", "--resume", first)[2]) == ["tune", "--resume", first]


def test_two_runs_in_one_second(run, recorded: Path, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setattr(time, "strftime", lambda *_: "20260101-000000")
    answers = [run("tune", "--replay", recorded, "--out", tmp_path, "--budget", "1s", "--json") for _ in range(2)]
    assert [status for status, *_ in answers] == [0, 0], answers[1][2]
    assert len({json.loads(out)["run"] for _, out, _ in answers}) == 2 == len(list(tmp_path.glob("runs/*.jsonl")))


@pytest.mark.parametrize("how", ["journal", "folder"])
def test_what_is_removed_under_a_run_is_no_success(run, recorded: Path, tmp_path: Path, monkeypatch, how: str) -> None:
    out, real, answered = tmp_path / "tuned", replay.ReplayEvaluator.run, []

    def removing(self, requests):
        for result in real(self, requests):
            answered.append(result)
            if len(answered) == 12:
                shutil.rmtree(out) if how == "folder" else next(out.glob("runs/*.jsonl")).unlink()
            yield result

    monkeypatch.setattr(replay.ReplayEvaluator, "run", removing)
    status, said, err = run("tune", "--replay", recorded, "--out", out)
    assert (status, said) == (2, "") and "removed while the run went on" in err and "Traceback" not in err
    kept = Path(err.rpartition("--resume ")[2].strip().removesuffix("."))
    assert len(journal.read(kept).results) == 11
    monkeypatch.undo()
    assert run("tune", "--resume", kept)[0] == 0


def test_ctrl_c_in_a_process_of_its_own(recorded: Path, tmp_path: Path) -> None:
    script = (
        # a shell that runs the tests in the background hands them a SIGINT that is ignored
        "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "import sys, time; from moelab.tuner import replay; real = replay.ReplayEvaluator.run\n"
        "def slow(self, requests, seen=[]):\n    for r in real(self, requests):\n"
        "        seen.append(r); time.sleep(0.05 if len(seen) < 8 else 20); yield r\n"
        "replay.ReplayEvaluator.run = slow\nfrom moelab.cli import main; sys.exit(main(sys.argv[1:]))"
    )
    arguments = ["tune", "--replay", str(recorded), "--out", str(tmp_path)]
    child = subprocess.Popen([sys.executable, "-c", script, *arguments], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 60
    while not (found := list(tmp_path.glob("runs/*.jsonl"))) or len(found[0].read_bytes().splitlines()) < 5:
        assert time.monotonic() < deadline and child.poll() is None
        time.sleep(0.02)
    os.kill(child.pid, signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 130 and f"--resume {found[0]}" in err and "Traceback" not in err
    assert len(journal.read(found[0]).results) > 0


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["tune"], ["--model", "--replay", "--resume"]),
        (["tune", "--replay", "nowhere"], ["nowhere", "landscape"]),
        (["tune", "--resume", "nowhere.jsonl"], ["nowhere.jsonl", "journal"]),
        (["tune", "--replay", "{}", "--strategy", "rase"], ["rase", "Did you mean"]),
        (["tune", "--replay", "{}", "--batch-size", "7"], ["no batch size 7", "1, 64"]),
        (["tune", "--replay", "{}", "--batch-size", "0"], ["--batch-size"]),
        (["tune", "--replay", "{}", "--budget", "soon"], ["'soon'", "5m"]),
        (["tune", "--replay", "{}", "--budget", "0"], ["'0'"]),
        (["tune", "--replay", "{}", "--budget", "9" * 400], ["'999", "no time"]),
        (["tune", "--replay", "{}", "--budget", "٣m"], ["no time"]),
        (["tune", "--replay", "{}", "--model", "mixtral-8x7b"], ["sizes", "landscape"]),
        (["tune", "--replay", "{}", "--freeze", "a.parquet"], ["--freeze", "replay"]),
        (["tune", "--replay", "{}", "--dtype", "fp8_w8a8", "--model", "mixtral-8x7b"], ["fp8_w8a8"]),
        (
            ["tune", "--replay", "{}", "--tp", "4", "--dtype", "float16"],
            ["--tp-size, --dtype", "the landscape", "--model"],
        ),
        (["tune", "--replay", "{}", "--routing", "zipf"], ["--routing", "Leave them out."]),
        (["tune", "--resume", "a.jsonl", "--strategy", "grid", "--replay", "{}"], ["--strategy, --replay", "journal"]),
        (["tune", "--replay", "{}", "--out", __file__], ["--out", "is a file"]),
    ],
    ids=lambda value: " ".join(value)[:80] if isinstance(value, list) else None,
)
def test_bad_use_is_status_2_and_says_why(run, recorded: Path, arguments: list[str], words: list[str]) -> None:
    status, out, err = run(*(argument.format(recorded) for argument in arguments))
    assert (status, out) == (2, "") and all(word in err for word in words), err
    assert "Traceback" not in err


def test_entries_of_other_batch_sizes_stay(run, recorded: Path, tmp_path: Path) -> None:
    """Tuned whole, then one batch size again: the other's entries are those of the first run, of both files."""
    _, out, _ = run("tune", "--replay", recorded, "--out", tmp_path, "--json")
    files = [Path(path) for path in json.loads(out)["files"]]
    before = [config_files.read_config_file(path) for path in files]
    again = ("tune", "--replay", recorded, "--out", tmp_path, "--batch-size", 64, "--strategy", "random", "--json")
    answer = json.loads(run(*again)[1])
    for path, side, old in zip(files, ("up", "down"), before, strict=True):
        now = config_files.read_config_file(path)
        assert list(now) == list(old) == [1, 64] and now[1] == old[1]
        assert now[64].to_json() == answer["configs"][side]["64"]


def test_a_file_that_cannot_be_read_is_not_written_over(run, recorded: Path, tmp_path: Path) -> None:
    """And is told before anything is measured: no journal is begun."""
    (path, *_) = map(Path, json.loads(run("tune", "--replay", recorded, "--out", tmp_path, "--json")[1])["files"])
    path.write_text(path.read_text()[:-20])
    runs = set(tmp_path.glob("runs/*"))
    status, out, err = run("tune", "--replay", recorded, "--out", tmp_path, "--batch-size", 64)
    assert (status, out) == (2, "") and path.name in err and "move it away first" in err
    assert set(tmp_path.glob("runs/*")) == runs


def test_without_a_file_for_gemm2_one_config_serves_both(run, tmp_path: Path) -> None:
    """Also what is to be beaten: a pair of two configs could not be written."""
    command = (
        "tune",
        "--replay",
        "qwen3-30b-a3b-tp1-NVIDIA_H200",
        "--no-down",
        "--batch-size",
        1,
        "--out",
        tmp_path,
        "--json",
    )
    (row,) = json.loads(run(*command)[1])["batches"]
    assert row["up"] == row["down"]


@pytest.mark.skipif(runtime.current().mode == "gpu", reason="has a GPU")
def test_without_a_gpu_and_without_replay(run) -> None:
    status, out, err = run("tune", "--model", "mixtral-8x7b", "--tp-size", "2")
    assert (status, out) == (2, "") and "GPU" in err and "--replay" in err


def test_help_loads_nothing_heavy() -> None:
    code = "import sys; from moelab.cli import main; main(['tune', '--help']); print(*sys.modules, file=sys.stderr)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert "--replay" in done.stdout and not {"torch", "numpy", "pyarrow", "sklearn"} & set(done.stderr.split())
