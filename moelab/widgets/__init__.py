"""Interactive panels: the only room that imports ipywidgets."""

from moelab.widgets.health import config_doctor, config_path, config_transfer, shown
from moelab.widgets.panels import explorer, interactive_panel, padding_picture

__all__ = [
    "config_doctor",
    "config_path",
    "config_transfer",
    "explorer",
    "interactive_panel",
    "padding_picture",
    "shown",
]
