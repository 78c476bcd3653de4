"""Controls by kind, each with its name wholly shown, and fields that say beside them what is wrong with what was typed."""

from __future__ import annotations

import html
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import ipywidgets as widgets
import traitlets

from moelab import runtime

Doubt = Callable[[Any], str | None]
"""What is wrong with a value, a sentence that says what was expected; None for a sound one."""

_NAMED = {"description_width": "initial"}


def dropdown(description: str, options: Sequence[Any], value: Any) -> widgets.Dropdown:
    """One of several."""
    return widgets.Dropdown(
        options=list(options), value=value, description=description, style=_NAMED, layout=widgets.Layout(width="auto")
    )


def slider(description: str, options: Sequence[Any], value: Any) -> widgets.SelectionSlider:
    """One of several that have an order; drawn anew when it is let go."""
    shown = [(str(option), option) for option in options]
    return widgets.SelectionSlider(options=shown, value=value, description=description, continuous_update=False)


def text(description: str, value: str = "", placeholder: str = "", width: str = "420px") -> widgets.Text:
    """A line of text, taken over on Enter or when it is left."""
    return widgets.Text(
        value, description=description, placeholder=placeholder, continuous_update=False, style=_NAMED,
        layout=widgets.Layout(width=width),
    )  # fmt: skip


class Checked(widgets.HBox):
    """A field and, beside it, what is wrong with what was typed. `value` is the last sound one; `doubt` the sentence now, None
    if there is none. hint: said beside a sound value."""

    value = traitlets.Any()

    def __init__(self, field: widgets.Widget, check: Doubt, hint: Doubt = lambda _: None) -> None:
        self.field, self.check, self.hint = field, check, hint
        self.description: str = field.description
        self.doubt: str | None = None
        self.note = widgets.HTML()
        super().__init__([field, self.note], value=field.value)
        self.examine()
        field.observe(self.examine, "value")
        self.observe(lambda change: setattr(field, "value", change["new"]), "value")

    def examine(self, _: object = None) -> None:
        """Look at what is typed once more: what it names may have come or gone."""
        self.doubt = self.check(self.field.value)
        said = self.doubt or self.hint(self.field.value)
        self.note.value = f'<span role="status">{html.escape(said)}</span>' if said else ""
        if self.doubt is None:
            self.value = self.field.value


def number_between(low: int, high: int) -> Doubt:
    """Whole numbers from low to high."""

    def doubt(value: Any) -> str | None:
        if isinstance(value, int) and low <= value <= high:
            return None
        return f"{value} is out of range. Expected {low} to {high}; what is shown is of the last number that was."

    return doubt


def place_to_write(typed: str) -> str | None:
    """A folder that is there, or that can be made."""
    if not typed.strip():
        return "No folder is named. Expected one to write into. Type its path; . is the notebook's own."
    folder = _path(typed)
    if folder is None:
        return f"{typed[:60]!r} can be no path. Expected a folder's."
    if folder.is_dir():
        nearest = folder
    else:
        nearest = next(parent for parent in (folder, *folder.absolute().parents) if os.path.lexists(parent))
        if not nearest.is_dir():
            return f"{nearest} is a file. Expected a folder, or a place for one. Type another."
    if not os.access(nearest, os.W_OK | os.X_OK):
        return f"{nearest} may not be written to. Expected a folder of yours. Type another, or change its permissions."
    below = runtime.app_folder()
    if below is not None and not folder.resolve().is_relative_to(below):
        return f"{typed[:60]} is not below {below}, where alone an app may write. Expected a folder there. Type one."
    return None


def place_to_read(typed: str) -> str | None:
    """A folder that is there."""
    if not typed.strip():
        return "No folder is named. Expected one to read. Type its path, then Enter."
    folder = _path(typed)
    if folder is None:
        return f"{typed[:60]!r} can be no path. Expected a folder's."
    if not folder.is_dir():
        return (
            f"{folder} is a file. Expected a folder."
            if folder.exists()
            else f"There is no folder {folder}. Type another."
        )
    if not os.access(folder, os.R_OK | os.X_OK):
        return f"{folder} may not be read. Expected a folder of yours. Type another, or change its permissions."
    return None


def place_is_new(typed: str) -> str | None:
    """That the folder is not there yet."""
    folder = _path(typed)
    return None if folder is None or folder.is_dir() else "Not there yet; Write files makes it."


def _path(typed: str) -> Path | None:
    """None for what no path can be: with a zero byte, of an unknown user, too long."""
    try:
        path = Path(typed).expanduser()
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return path
    except (ValueError, RuntimeError, OSError):
        return None
    return path
