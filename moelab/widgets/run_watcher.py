"""Runs that other processes write, watched from a notebook: `moelab tune` on a node, its folder shared; or two side by side."""

from __future__ import annotations

import html
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets

from moelab.errors import MoelabError
from moelab.plots import tuning as plots
from moelab.plots.panel import Panel
from moelab.tuner import runs as run_files
from moelab.tuner.watching import Watched, common_sizes, watch
from moelab.widgets import page
from moelab.widgets.fields import Checked, dropdown, place_to_read, text
from moelab.widgets.panels import show

NOBODY = ("none", "")
"""No run, no batch size: a dropdown shows nothing for None."""

FOLLOW_EVERY_S = 2.0


class RunWatcher(widgets.VBox):
    """Two runs of a folder, or one: Folder, Watched, Beside and Shown batch to choose; Follow looks again every FOLLOW_EVERY_S
    seconds until what is watched has ended. A journal is read only: neither locked nor written."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.folder = text("Journals in", str(folder))
        self.place = Checked(self.folder, place_to_read)
        self.watched, self.beside = dropdown("Watched", [NOBODY], ""), dropdown("Beside", [NOBODY], "")
        self.watched.layout.max_width = self.beside.layout.max_width = "430px"
        self.batch = dropdown("Shown batch", [NOBODY], "")
        self.follow = widgets.Checkbox(False, description="Follow", indent=False, layout=widgets.Layout(width="auto"))
        again = widgets.Button(description="Look again", tooltip="Read the folder and the journals once more")
        again.layout.width = "auto"
        self.note, self.output = widgets.HTML(), widgets.Output()
        self._filling, self._stop, self._error = False, threading.Event(), None
        self._thread: threading.Thread | None = None
        row = widgets.HBox(
            [self.place, self.watched, self.beside, self.batch, self.follow, again],
            layout=widgets.Layout(flex_flow="row wrap"),
        )
        page.furnish(self, [row, self.note], [self.output])
        self.look_again()
        self.place.observe(self.look_again, "value")
        for control in (self.watched, self.beside, self.batch):
            control.observe(self.draw, "value")
        again.on_click(self.look_again)
        self.follow.observe(self._followed, "value")

    def look_again(self, _: object = None) -> None:
        """The folder's runs, newest first, and what is watched of them."""
        self.place.examine()
        found = (
            [(run.label(), run.path) for run in run_files.find_runs(self.place.value)] if not self.place.doubt else []
        )
        self._fill(self.watched, found or [NOBODY])
        self._fill(self.beside, [NOBODY, *found])
        self.draw()

    def _fill(self, control: widgets.Dropdown, options: Sequence[tuple[str, Any]]) -> None:
        self._filling, kept = True, control.value
        try:
            control.options = list(options)
            values = [value for _, value in options]
            control.value = kept if kept in values else values[0]
        finally:
            self._filling = False

    def draw(self, _: object = None) -> None:
        """Read the journals and show them."""
        if self._filling:
            return
        chosen = list(dict.fromkeys(path for path in (self.watched.value, self.beside.value) if path))
        try:
            seen = [watch(path, self.batch.value or None) for path in chosen]
        except MoelabError as error:
            self._say(str(error))
            return
        if not seen:
            show(self.output, Panel(None, [], "**There is no run here yet.** `moelab tune` writes one below OUT/runs."))
            return
        sizes = common_sizes([each.problem for each in seen])
        if not sizes:
            self._say("The two runs have no batch size in common. Expected one that both measured. Choose another run.")
            return
        self._fill(self.batch, [(str(b), b) for b in sizes])
        if any(each.num_tokens != self.batch.value for each in seen):
            seen = [watch(path, self.batch.value) for path in chosen]
        self._say("")
        show(self.output, plots.watched(seen))
        self._ended(seen)

    def _ended(self, seen: Sequence[Watched]) -> None:
        if self.follow.value and all(each.state == "finished" for each in seen):
            self.follow.value = False

    def _say(self, sentence: str) -> None:
        self.note.value = f'<b role="status">{html.escape(sentence)}</b>' if sentence else ""

    def _followed(self, _: object) -> None:
        if not self.follow.value:
            self._stop.set()
            return
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._keep_looking, args=(self._stop,), name="moelab-watch", daemon=True)
        self._thread.start()

    def _keep_looking(self, stop: threading.Event) -> None:
        before: object = None
        while not stop.wait(FOLLOW_EVERY_S):
            now = [
                (path, path.stat().st_size)
                for path in (self.watched.value, self.beside.value)
                if path and path.exists()
            ]
            if now != before:
                before = now
                self.draw()
