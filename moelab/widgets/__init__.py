"""Interactive panels: the only room that imports ipywidgets."""

from moelab.widgets.panels import explorer, interactive_panel, padding_picture

__all__ = ["explorer", "interactive_panel", "padding_picture"]
