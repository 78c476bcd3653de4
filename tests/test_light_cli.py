"""`make cli`: the commands that read configs and models, in an environment of a few packages."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from moelab import cli

ROOT = Path(__file__).resolve().parent.parent
LIGHT = re.findall(r"^LIGHT := (.+)$", (ROOT / "Makefile").read_text(), flags=re.MULTILINE)[0].split()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
NEEDED = [re.split(r"[^\w-]", each)[0] for each in PROJECT["dependencies"] + PROJECT["optional-dependencies"]["hf"]]
WITHOUT = """
import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {absent}:
            raise ModuleNotFoundError(f"No module named {{name!r}}", name=name)
sys.meta_path.insert(0, Absent())
from moelab.cli import main
sys.exit(main({command}))
"""
H200 = ["--device", "NVIDIA H200", "--triton-version", "3.6.0"]


def run(*command: str) -> subprocess.CompletedProcess[str]:
    """A command where none of moelab's dependencies but LIGHT can be imported."""
    code = WITHOUT.format(absent=sorted({*NEEDED} - {*LIGHT}), command=list(command))
    clean = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    return subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True, cwd=ROOT, timeout=60)


@pytest.mark.parametrize(
    "command",
    [
        ["models"],
        ["shape", "--model", "deepseek-v3-fp8", "--tp", "8"],
        ["explain", "--model", "deepseek-v3-fp8", "--tp", "8", "--batch-size", "64", *H200],
        ["export", "configs/triton_3_6_0/E=128,N=768,device_name=NVIDIA_H200.json", "--rules", "vllm", "--out", "OUT"],
        ["doctor", "configs"],
    ],
    ids=lambda command: command[0],
)
def test_commands_that_read_need_few_packages(command: list[str], tmp_path: Path) -> None:
    assert {*LIGHT} < {*NEEDED}
    done = run(*[str(tmp_path) if word == "OUT" else word for word in command])
    assert (done.returncode, done.stderr) == (0, "") and done.stdout


def test_what_is_left_out_is_named() -> None:
    assert {*cli.HEAVY} == {*NEEDED} - {*LIGHT}


def test_the_others_say_what_they_lack() -> None:
    done = run("tune", "--replay", "qwen3-30b-a3b-tp1-NVIDIA_H200")
    assert (done.returncode, done.stdout) == (2, "")
    assert "needs the package" in done.stderr and "make setup" in done.stderr and "Traceback" not in done.stderr
