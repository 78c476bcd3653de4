"""Interactive panels: the only room that imports ipywidgets."""

from moelab.widgets.config_search import landscape_browser, layer_picker
from moelab.widgets.panels import explorer, interactive_panel, padding_picture

__all__ = ["explorer", "interactive_panel", "landscape_browser", "layer_picker", "padding_picture"]
