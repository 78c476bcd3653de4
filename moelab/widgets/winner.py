"""The winner's card, and the files that hand the winners over."""

from __future__ import annotations

import html
import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from moelab import runtime
from moelab.config_files import RULES, get_rules
from moelab.errors import ConfigFileError, MoelabError
from moelab.plots import handover as plots_handover
from moelab.plots import winner as plots_winner
from moelab.plots.literal import literal
from moelab.plots.panel import Panel
from moelab.tuner.finals import Contest, Finals
from moelab.tuner.problem import Pair
from moelab.widgets import page
from moelab.widgets.choice import Choice
from moelab.widgets.fields import Checked, dropdown, place_is_new, place_to_write, text
from moelab.widgets.panels import show

RETIME_ROUNDS = 30
"""Samples of each pair when it is timed again: as many as in a final (search.Settings.layer)."""


class WinnerCard(widgets.VBox):
    """The final of one batch size: Batch and Pair to choose, the pair's JSON to copy, and buttons to time it again (on a
    GPU) and to exclude it. Every button calls the method of its name."""

    def __init__(self, choice: Choice) -> None:
        super().__init__()
        self.choice, self._said, self._finals = choice, "", choice.finals
        self.batch = dropdown("Batch", list(choice.finals.layers), next(iter(choice.finals.layers)))
        self.pair = dropdown("Pair", self._pairs(self.batch.value), None)
        self.pair.layout.max_width = "420px"
        self.text = widgets.Textarea(description="JSON", rows=5, disabled=True, layout=widgets.Layout(width="640px"))
        self.output = widgets.Output()
        buttons = [
            _button("Exclude", "This pair may not win", self.exclude),
            _button("Restore all", "Nothing is excluded", self.restore),
            _button("Re-time now", "Measure this pair beside the winner; needs a GPU", self.retime),
        ]
        row = widgets.HBox([self.batch, self.pair, *buttons], layout=widgets.Layout(flex_flow="row wrap"))
        page.furnish(self, [row], [self.text, self.output])
        self._filling = False
        self._fill()
        self.batch.observe(self._fill, "value")
        self.pair.observe(self._tell, "value")
        choice.follow(self._follow)

    def _pairs(self, num_tokens: int) -> list[tuple[str, Pair]]:
        return [(plots_winner.label(c), c.pair) for c in self.choice.finals.contests(num_tokens)]

    def _follow(self) -> None:
        """The finals changed, or what is excluded of them."""
        sizes = list(self.choice.finals.layers)
        if list(self.batch.options) != sizes:
            self._filling = True
            self.batch.options = sizes
            self._filling = False
        if self.choice.finals is not self._finals:  # of another run: its winner is what the reader asks for
            self._finals, self._said = self.choice.finals, ""
            self._filling, self.pair.value = True, None
            self._filling = False
        self._fill()

    def _fill(self, _: object = None) -> None:
        """Offer the pairs of the batch size, the winner first chosen, and draw."""
        if self._filling:
            return
        self._filling, chosen = True, self.pair.value
        options = self._pairs(self.batch.value)
        self.pair.options = options
        won = self.choice.finals.winner(self.batch.value, self.choice.excluded)
        known = [pair for _, pair in options]
        if chosen in known:
            self.pair.value = chosen
        elif won.up is not None and won.down is not None and (won.up, won.down) in known:
            self.pair.value = (won.up, won.down)
        self._filling = False
        self._tell()

    def _tell(self, _: object = None) -> None:
        if self._filling:
            return
        up, down = self.pair.value
        self.text.value = json.dumps({"up": up.to_json(), "down": down.to_json()})
        self.draw()

    def draw(self) -> None:
        """Show the card."""
        panel = plots_winner.card(self.choice.finals, self.batch.value, self.choice.excluded, self.pair.value)
        if self._said:
            panel = replace(panel, sentence=f"**{literal(self._said)}** {panel.sentence}")
        show(self.output, panel)

    def exclude(self) -> None:
        """The chosen pair may not win at this batch size."""
        self._said = ""
        self.choice.exclude(self.batch.value, self.pair.value)

    def restore(self) -> None:
        """Nothing is excluded any more."""
        self._said = ""
        self.choice.restore()

    def retime(self) -> None:
        """Time the chosen pair beside the winner on this machine's GPU, or say why not."""
        try:
            self._said = _retimed(self.choice.finals, self.batch.value, self.pair.value)
        except MoelabError as error:
            self._said = str(error)
        self.draw()


def _retimed(finals: Finals, num_tokens: int, pair: Pair) -> str:
    here = runtime.current()
    if here.mode != "gpu":
        return f"Not timed again: that needs a GPU, and {here.reason}. What is recorded stays."
    from moelab.tuner.evaluate import Request
    from moelab.tuner.evaluators import make_gpu_evaluator
    from moelab.tuner.starting import gpu_problem

    problem = gpu_problem(finals.problem.shape, [num_tokens], kernel=finals.problem.kernel)
    won = finals.winner(num_tokens)
    pairs = dict.fromkeys([pair, *([(won.up, won.down)] if won.up and won.down else [])])
    evaluator = make_gpu_evaluator(problem)
    try:
        results = list(evaluator.run([Request("layer", num_tokens, tuple(pairs), RETIME_ROUNDS, True)]))
    finally:
        evaluator.close()
    again = Finals.of_results(problem, results, f"measured on {problem.device}", measured=True)
    said = ", ".join(map(_time, again.contests(num_tokens)))
    return f"Now, on {problem.device}: {said or 'nothing could be timed'}."


def _time(contest: Contest) -> str:
    return f"{plots_winner.label(contest)} {contest.median_us:.2f} µs ({contest.low_us:.2f} … {contest.high_us:.2f})"


class ExportPanel(widgets.VBox):
    """The winners as files of a loader, read back through its rules: Loader and Folder to choose, and a button to write.
    Until it is pressed, files are written to a throwaway folder only; over files that are there only where Overwrite is ticked.
    Folder starts as one below `folder` for each loader, and stays what the reader makes it."""

    def __init__(self, choice: Choice, folder: str | Path) -> None:
        super().__init__()
        self.choice, self._said, self._below = choice, "", Path(folder)
        self.rules = dropdown("Loader", tuple(RULES), "moelab")
        self.folder = text("Folder", str(self._below / self.rules.value))
        self.place = Checked(self.folder, place_to_write, place_is_new)
        self.overwrite = widgets.Checkbox(
            False, description="Overwrite", indent=False, layout=widgets.Layout(width="auto"),
            tooltip="Write over files that are there: all batch sizes that are only in them are lost",
        )  # fmt: skip
        self.output, self.outcome = widgets.Output(), widgets.HTML()
        write = _button("Write files", "Write them into the folder", self.write)
        row = widgets.HBox([self.rules, self.place, self.overwrite, write], layout=widgets.Layout(flex_flow="row wrap"))
        page.furnish(self, [row, self.outcome], [self.output])
        self.draw()
        self.rules.observe(self._offer, "value")
        self.rules.observe(self._changed, "value")
        self.folder.observe(self._changed, "value")
        choice.follow(self._changed)

    def _offer(self, change: Mapping[str, Any]) -> None:
        """The other loader's own folder, unless the reader has typed one."""
        if self.folder.value == str(self._below / change["old"]):
            self.folder.value = str(self._below / change["new"])

    def _changed(self, _: object = None) -> None:
        self._say("")
        self.draw()

    def _say(self, sentence: str) -> None:
        self.outcome.value = f'<b role="status">{html.escape(sentence)}</b>' if sentence else ""

    def draw(self) -> None:
        """Show the files and what the loader finds in them."""
        try:
            panel = plots_handover.preview(self.choice.result(), self.rules.value)
        except MoelabError as error:
            panel = Panel(None, [], f"**{literal(error)}**")
        show(self.output, panel)

    def write(self) -> None:
        """Write the files into the folder, and say where they lie; refused as `moelab export` refuses, and where the folder is
        none to write into."""
        self.place.examine()
        if self.place.doubt is not None:
            self._say(f"Nothing was written: {self.place.doubt}")
            return
        rules, folder = self.rules.value, Path(self.folder.value).expanduser().resolve()
        try:
            written = plots_handover.write(self.choice.result(), rules, folder, overwrite=self.overwrite.value)
        except ConfigFileError as error:
            said = str(error).replace("pass overwrite=True (--overwrite)", "tick Overwrite")
            self._say(f"Nothing was written: {said}")
            return
        except (MoelabError, OSError) as error:
            self._say(f"Nothing was written: {error}")
            return
        names = ", ".join(str(each.path.resolve().relative_to(folder)) for each in written)
        self._say(
            f"Wrote {names} into {folder}. To use them, start {rules} with {get_rules(rules).environment}={folder}."
        )
        self.place.examine()


def _button(name: str, tooltip: str, call) -> widgets.Button:  # type: ignore[no-untyped-def]  # any callable without arguments
    button = widgets.Button(description=name, tooltip=tooltip, layout=widgets.Layout(width="auto"))
    button.on_click(lambda _: call())
    return button
