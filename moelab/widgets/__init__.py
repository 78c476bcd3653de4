"""Interactive panels: the only room that imports ipywidgets."""

from moelab.widgets.choice import Choice
from moelab.widgets.config_search import landscape_browser, layer_picker
from moelab.widgets.live_tuner import LiveTuner
from moelab.widgets.panels import explorer, interactive_panel, padding_picture, still
from moelab.widgets.strategy_race import strategy_race
from moelab.widgets.winner import ExportPanel, WinnerCard

__all__ = [
    "Choice",
    "ExportPanel",
    "LiveTuner",
    "WinnerCard",
    "explorer",
    "interactive_panel",
    "landscape_browser",
    "layer_picker",
    "padding_picture",
    "still",
    "strategy_race",
]
