"""Interactive panels: the only package that imports ipywidgets."""

from moelab.widgets.choice import Choice
from moelab.widgets.config_search import landscape_browser, layer_picker
from moelab.widgets.follow import follow_tokens
from moelab.widgets.health import config_doctor, config_path, config_transfer
from moelab.widgets.kernels import kernel_check, kernel_roof
from moelab.widgets.live_tuner import LiveTuner
from moelab.widgets.panels import explorer, interactive_panel, interactive_panels, padding_picture
from moelab.widgets.quantised import weights_way
from moelab.widgets.run_watcher import RunWatcher
from moelab.widgets.strategy_race import strategy_race
from moelab.widgets.winner import ExportPanel, WinnerCard

__all__ = [
    "Choice",
    "ExportPanel",
    "LiveTuner",
    "RunWatcher",
    "WinnerCard",
    "config_doctor",
    "config_path",
    "config_transfer",
    "explorer",
    "follow_tokens",
    "interactive_panel",
    "interactive_panels",
    "kernel_check",
    "kernel_roof",
    "landscape_browser",
    "layer_picker",
    "padding_picture",
    "strategy_race",
    "weights_way",
]
