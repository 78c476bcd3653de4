"""The widgets of 05_config_search that tune: a run begins, is held, watched, taken up again; its winners judged and exported."""

from __future__ import annotations

import dataclasses
import json
import math
import time
from pathlib import Path

import pytest
from panels import LANDSCAPE, PROBLEM, controls, output, said, text
from panels import finals as finals  # a fixture of most tests here

from moelab import widgets
from moelab.errors import LandscapeError
from moelab.plots import tuning as plots_tuning
from moelab.tuner.finals import Finals
from moelab.tuner.paced import PacedReplay
from moelab.tuner.replay import ReplayEvaluator
from moelab.tuner.session import TuneSession

# --- the tuner ----------------------------------------------------------------------------------------------------


def a_tuner(folder: Path, finals: Finals, speed: float = math.inf) -> widgets.LiveTuner:
    return widgets.LiveTuner(LANDSCAPE, folder, widgets.Choice(finals), speed=speed)


def test_a_run_from_start_to_finish(tmp_path: Path, finals: Finals) -> None:
    tuner = a_tuner(tmp_path, finals)
    assert "no GPU here, so this replays" in text(tuner) and not list(tmp_path.iterdir())
    tuner.strategy.value = "random"
    tuner.start()
    tuner.wait(60)
    assert "finished: phase layers" in text(tuner) and "Replay of what was" in text(tuner)
    assert "Finalists at batch" in text(tuner) and "Failures:" in text(tuner)
    assert tuner.choice.finals is not finals, "the winners are those of this run"
    assert "random-replay" in tuner.found.label and "; finished" in tuner.found.label
    tuner.shown.value = 1
    assert "Batch 1: best so far" in text(tuner)


def test_before_a_run_there_is_no_empty_figure_and_nothing_to_stop(tmp_path: Path, finals: Finals) -> None:
    tuner = a_tuner(tmp_path, finals, speed=1.0)
    plotly = "application/vnd.plotly.v1+json"
    assert not any(plotly in each["data"] for each in output(tuner).outputs)
    assert "synthetic-small; no GPU here" in text(tuner)
    buttons = {name: controls(tuner)[name] for name in ("Pause", "Go on", "Stop")}
    begin = {name: controls(tuner)[name] for name in ("Start", "Take up")}
    assert all(button.disabled for button in buttons.values()) and not any(b.disabled for b in begin.values())
    tuner.start()
    assert not any(button.disabled for button in buttons.values()) and all(b.disabled for b in begin.values())
    tuner.stop()
    tuner.wait(60)
    assert all(button.disabled for button in buttons.values()) and not any(b.disabled for b in begin.values())


def test_the_first_sign_of_life_comes_before_the_work(
    tmp_path: Path, finals: Finals, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Listing the candidates takes a second: until then Start is off and says so; a run that cannot begin gives it back."""
    tuner = a_tuner(tmp_path, finals)
    seen = []

    def refused() -> None:
        seen.append((said(tuner), controls(tuner)["Start"].disabled, controls(tuner)["Stop"].disabled))
        raise LandscapeError("There is nothing to tune. Expected a landscape. Choose one.")

    monkeypatch.setattr(tuner, "_new", refused)
    controls(tuner)["Start"].click()
    ((sign, *disabled),) = seen
    assert sign.startswith("Starting") and disabled == [True, True]
    assert "nothing to tune" in said(tuner) and not controls(tuner)["Start"].disabled


def until(condition: object) -> None:
    deadline = time.monotonic() + 60
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.01)
    assert condition()


def test_pause_stop_and_another_kernel_takes_it_up(tmp_path: Path, finals: Finals) -> None:
    tuner = a_tuner(tmp_path, finals, speed=1.0)
    tuner.start()
    until(lambda: tuner.session.progress().done > 0)
    tuner.pause()
    until(lambda: tuner.session.progress().state == "paused")
    held = tuner.session.progress().done
    tuner.start()
    assert "A run is under way" in text(tuner) and tuner.session.progress().done == held
    tuner.take_up()
    assert "A run is under way" in text(tuner)
    tuner.go_on()
    tuner.stop()
    tuner.wait(60)
    assert "stopped:" in text(tuner)

    other = a_tuner(tmp_path, finals)
    assert "not finished" in other.found.label
    other.take_up()
    other.wait(60)
    assert "finished: phase layers" in text(other)
    undisturbed = a_tuner(tmp_path / "undisturbed", finals)
    undisturbed.start()
    undisturbed.wait(60)
    assert other.choice.result().batches == undisturbed.choice.result().batches


def test_a_time_limit_that_cuts_the_search_short_is_said(tmp_path: Path, finals: Finals) -> None:
    tuner = a_tuner(tmp_path, finals)
    tuner.start()
    tuner.wait(60)
    assert "cut the search short" not in text(tuner)
    tuner.budget.options = [("short", 0.01)]
    tuner.start()
    tuner.wait(60)
    assert "The budget of 0.01 s cut the search short" in text(tuner) and "Nothing was searched" in text(tuner)


def test_what_cannot_be_taken_up_is_said(tmp_path: Path, finals: Finals) -> None:
    tuner = a_tuner(tmp_path, finals)
    controls(tuner)["Take up"].click()
    assert "no run to take up" in text(tuner)
    first, second = a_tuner(tmp_path, finals, speed=1.0), a_tuner(tmp_path, finals)
    first.start()
    second.find_runs()
    controls(second)["Take up"].click()
    assert "Another tuner is writing" in text(second)
    first.stop()
    first.wait(60)


def test_a_drawing_function_that_breaks_under_way_is_raised_by_wait(
    tmp_path: Path, finals: Finals, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuner = a_tuner(tmp_path, finals)
    drawn = plots_tuning.status

    def broken(history: list, *rest: object) -> object:
        if history[-1].progress.phase == "finalists":
            raise RuntimeError("the drawing function is broken")
        return drawn(history, *rest)

    monkeypatch.setattr(plots_tuning, "status", broken)
    tuner.start()
    with pytest.raises(RuntimeError, match="drawing function is broken"):
        tuner.wait(60)
    assert tuner.session.progress().state == "finished", "the run itself went on"


# --- watching -----------------------------------------------------------------------------------------------------


def a_run(path: Path, problem=PROBLEM, strategy: str = "random", **given) -> None:
    TuneSession(problem, ReplayEvaluator(LANDSCAPE, problem), strategy=strategy, run=path, **given).run()


def test_runs_of_another_process_side_by_side(tmp_path: Path) -> None:
    folder = tmp_path / "runs"
    watcher = widgets.RunWatcher(folder)
    assert "There is no folder" in said(watcher.place) and "no run here yet" in text(watcher)
    a_run(folder / "one.jsonl")
    controls(watcher)["Look again"].click()
    assert said(watcher.place) == "" and "one is finished" in text(watcher) and watcher.batch.value == 1
    few = dataclasses.replace(PROBLEM, batch_sizes=(16, 64))
    a_run(folder / "two.jsonl", few, "grid")
    watcher.look_again()
    assert watcher.watched.value.stem == "one", "what is watched stays"
    watcher.beside.value = folder / "two.jsonl"
    assert list(watcher.batch.options) == [("16", 16), ("64", 64)] and "one is finished. two is finished." in text(
        watcher
    )
    assert "Batch 16: best so far" in text(watcher) and " against " in text(watcher)
    watcher.batch.value = 64
    assert "Batch 64: best so far" in text(watcher)
    (folder / "two.jsonl").write_text("{}\n")
    watcher.draw()
    assert "is not a run's header" in said(watcher)
    watcher.folder.value = str(tmp_path / "nowhere")
    assert "There is no folder" in said(watcher.place)


def test_a_watcher_follows_a_run_to_its_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("moelab.widgets.run_watcher.FOLLOW_EVERY_S", 0.02)
    path = tmp_path / "run.jsonl"
    session = TuneSession(
        PROBLEM, PacedReplay(LANDSCAPE, PROBLEM, speed=1.0), strategy="random", run=path, on_progress=lambda p: None
    )
    session.start()
    until(lambda: session.progress().done > 0)
    watcher = widgets.RunWatcher(tmp_path)
    assert "under way" in text(watcher)
    watcher.follow.value = True
    session.evaluator.speed = math.inf
    session.wait(60)
    until(lambda: "run is finished" in text(watcher))
    until(lambda: watcher.follow.value is False)


# --- winner and export --------------------------------------------------------------------------------------------


def test_winner_card(finals: Finals) -> None:
    choice = widgets.Choice(finals)
    card = widgets.WinnerCard(choice)
    choose = controls(card)
    assert "Over the loader's default" in text(card) or "tie" in text(card) or "stays" in text(card)
    before = text(card)
    choose["Batch"].value = 64
    assert text(card) != before and "Batch 64:" in text(card)
    winner = choice.finals.winner(64)
    assert json.loads(choose["JSON"].value) == {"up": winner.up.to_json(), "down": winner.down.to_json()}
    choose["Exclude"].click()
    assert choice.excluded == {(64, (winner.up, winner.down))} and choice.result().batches[64].up is not None
    assert (choice.result().batches[64].up, choice.result().batches[64].down) != (winner.up, winner.down)
    choose["Restore all"].click()
    assert choice.result().batches[64] == winner
    choose["Re-time now"].click()
    assert "Not timed again: that needs a GPU" in text(card)


def test_the_card_turns_to_the_winner_of_another_run(finals: Finals) -> None:
    choice = widgets.Choice(finals)
    card = widgets.WinnerCard(choice)
    first = choice.finals.winner(1)
    choice.exclude(1, (first.up, first.down))
    assert card.pair.value == (first.up, first.down), "what the reader chose stays"
    session = TuneSession(PROBLEM, ReplayEvaluator(LANDSCAPE, PROBLEM, seed=7), strategy="race")
    session.run()
    choice.take(Finals.of_results(PROBLEM, session.results(), "made up", measured=False))
    won = choice.finals.winner(1)
    assert card.pair.value == (won.up, won.down)


def test_each_loader_has_a_folder_until_one_is_typed(tmp_path: Path, finals: Finals) -> None:
    panel = widgets.ExportPanel(widgets.Choice(finals), tmp_path / "out")
    panel.rules.value = "vllm"
    assert panel.folder.value == str(tmp_path / "out" / "vllm")
    panel.write()
    assert f"start vllm with VLLM_TUNED_CONFIG_FOLDER={tmp_path / 'out' / 'vllm'}" in text(panel)
    panel.folder.value = str(tmp_path / "mine")
    panel.rules.value = "sglang"
    assert panel.folder.value == str(tmp_path / "mine")


@pytest.mark.parametrize("rules", ["moelab", "sglang", "vllm"])
def test_export_panel_reads_back_what_it_writes(tmp_path: Path, finals: Finals, rules: str) -> None:
    choice = widgets.Choice(finals)
    panel = widgets.ExportPanel(choice, tmp_path / "out")
    choose = controls(panel)
    choose["Loader"].value = rules
    assert f"For {rules}:" in text(panel) and not (tmp_path / "out").exists()
    choose["Write files"].click()
    assert "Wrote " in text(panel)
    files = sorted((tmp_path / "out").rglob("*.json"))
    assert len(files) == (1 if rules == "vllm" else 2)
    content = json.loads(min(files, key=lambda path: len(path.name)).read_text())
    assert content["64"] == choice.result().batches[64].up.to_json()
    for contest in finals.contests(64):
        choice.exclude(64, contest.pair)
    before = [path.read_bytes() for path in files]
    choose["Write files"].click()
    assert "Nothing was written" in said(panel) and "exists already" in said(panel) and "tick Overwrite" in said(panel)
    assert [path.read_bytes() for path in files] == before, "refused, as `moelab export` refuses"
    files[0].unlink()
    choose["Write files"].click()
    assert rules == "vllm" or "exists already" in said(panel)
    assert rules == "vllm" or not files[0].exists(), "neither of a pair, where one is there"
    choose["Overwrite"].value = True
    choose["Write files"].click()
    assert "Wrote " in said(panel) and "2 batch sizes" in text(panel), "a batch size without a winner is left out"


BAD_FOLDERS = {
    "empty": ("", "No folder is named"), "spaces": ("   ", "No folder is named"), "a file": ("{}/file", "is a file"),
    "below a file": ("{}/file/below", "is a file"), "a zero byte": ("a\x00b", "can be no path"),
    "too long": ("x" * 5000, "can be no path"), "no such user": ("~nobody-of-that-name/x", "can be no path"),
}  # fmt: skip


@pytest.mark.parametrize("kind", BAD_FOLDERS)
def test_a_folder_that_is_none_is_said_beside_the_field(
    tmp_path: Path, finals: Finals, kind: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed, sentence = BAD_FOLDERS[kind]
    (tmp_path / "file").write_text("mine")
    monkeypatch.chdir(tmp_path)
    panel = widgets.ExportPanel(widgets.Choice(finals), tmp_path / "out")
    panel.folder.value = typed.format(tmp_path)
    assert sentence in said(panel.place)
    controls(panel)["Write files"].click()
    assert "Nothing was written" in said(panel) and [path.name for path in tmp_path.iterdir()] == ["file"]
    panel.folder.value = str(tmp_path / "new")
    assert said(panel.place) == "Not there yet; Write files makes it."
    controls(panel)["Write files"].click()
    assert "Wrote " in said(panel) and said(panel.place) == ""


def test_nothing_to_export_is_said(tmp_path: Path, finals: Finals) -> None:
    choice = widgets.Choice(finals)
    panel = widgets.ExportPanel(choice, tmp_path)
    for b in PROBLEM.batch_sizes:
        for contest in finals.contests(b):
            choice.exclude(b, contest.pair)
    assert "no winner to write" in text(panel)
    controls(panel)["Write files"].click()
    assert "Nothing was written" in text(panel) and not list(tmp_path.iterdir())
