"""The README and docs/figures.md keep their word: code runs, output is real, figures are the recordings'."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from moelab import cli, recordings
from moelab.errors import MoelabError
from moelab.plots import pictures

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
FIGURES = (ROOT / "docs" / "figures.md").read_text(encoding="utf-8")


def blocks(kind: str, text: str = README) -> list[str]:
    """The contents of fenced blocks of a kind."""
    return re.findall(rf"^```{kind}\n(.*?)^```$", text, flags=re.DOTALL | re.MULTILINE)


def sessions(text: str = README) -> list[tuple[str, str]]:
    """(command, output) of every console block."""
    found = [block.partition("\n") for block in blocks("console", text)]
    return [(first.removeprefix("$ "), output) for first, _, output in found]


def test_python_blocks_run() -> None:
    code = blocks("python")
    assert code
    for block in code:
        done = subprocess.run([sys.executable, "-c", block], capture_output=True, text=True, cwd=ROOT, timeout=200)
        assert done.returncode == 0 and done.stdout, done.stderr


@pytest.mark.parametrize(("command", "output"), sessions(), ids=lambda value: value.splitlines()[0][:60])
def test_console_output_is_real(command: str, output: str, capsys: pytest.CaptureFixture[str]) -> None:
    name, *arguments = shlex.split(command)
    status = cli.main(arguments)
    assert (name, status) == ("moelab", 0)
    assert capsys.readouterr().out == output, "the README quotes another output: paste what the command prints"


def test_readme_is_short() -> None:
    assert len(README.encode()) < 10_000


def test_figures_are_those_of_the_recordings() -> None:
    made = pictures.panels()
    recorded = {item.suite for item in recordings.list_recordings() if item.recording}
    headings = [name for name in pictures.HEADINGS if name != "quantised" or name in recorded]  # on a GPU, one day
    assert [*made] == headings and [*pictures.HEADINGS] == [*pictures.ALT]
    message = "the README's figure or docs/figures.md is behind data/recordings or moelab/plots: run `make pictures`"
    assert pictures.replaced(README, pictures.short(made)) == README, message
    assert pictures.text(made) == FIGURES, message
    assert made[pictures.FIRST].sentence in README and made[pictures.FIRST].sentence in FIGURES


def test_stale_figures_are_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One sample of one recording changed, and the text differs."""
    recorded = recordings.load("tuned_gain")
    row = recorded.select(target="qwen3-30b-a3b/tp1", config_name="tuned", num_tokens=64)[0]
    slower = {**row, "samples_us": [2 * s for s in row["samples_us"]]}
    rows = tuple(slower if each is row else each for each in recorded.rows)
    changed = recordings.Recording(recorded.suite, recorded.provenance, recorded.protocol, rows)
    before = pictures.text(pictures.panels())
    monkeypatch.setattr(recordings, "recordings_dir", lambda: tmp_path)
    for item in ("ceilings", "layer_classic", "tuned_gain"):
        source = ROOT / "data" / "recordings" / f"{item}.json"
        (tmp_path / source.name).write_bytes(source.read_bytes())
    same = pictures.text(pictures.panels())
    recordings.write(changed, tmp_path / "tuned_gain.json")
    assert before != same != pictures.text(pictures.panels())


def test_readme_without_markers_is_refused() -> None:
    with pytest.raises(MoelabError, match="Expected both markers"):
        pictures.replaced("# moelab", "block")


@pytest.mark.parametrize(("folder", "text"), [("", README), ("docs", FIGURES)], ids=["README", "figures"])
def test_pictures_and_links_are_there(folder: str, text: str) -> None:
    names = re.findall(r'<img src="([^"]+)"', text)
    assert names and all((ROOT / folder / name).read_bytes().startswith(b"\x89PNG") for name in names)
    links = [link for link in re.findall(r"\]\(([^)#]+)\)", text) if "://" not in link]
    assert links and [link for link in links if not (ROOT / folder / link).exists()] == []
    headings = {
        re.sub(r"[^\w -]", "", each).lower().replace(" ", "-") for each in re.findall(r"^#+ (.+)$", text, re.MULTILINE)
    }
    assert {*re.findall(r"\]\(#([^)]+)\)", text)} <= headings


def test_commands_of_the_table_exist(capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["--help"])
    known = capsys.readouterr().out
    named = set(re.findall(r"^\| `moelab ([\w-]+)", README, flags=re.MULTILINE))
    assert named == set(re.findall(r"^  ([a-z][a-z-]*)  ", known, flags=re.MULTILINE))


def test_pictures_are_drawn_on_white() -> None:
    panel = pictures.panels()["layer"]
    drawn = pictures.on_white(panel.figure)
    assert drawn.layout.paper_bgcolor == "white" and panel.figure.layout.paper_bgcolor != "white"
    assert all(len(line) <= pictures.CHARACTERS for line in drawn.layout.title.subtitle.text.split("<br>"))
