"""Interactive panels: the only room that imports ipywidgets."""

from moelab.widgets.follow import follow_tokens
from moelab.widgets.kernels import kernel_check, kernel_roof
from moelab.widgets.panels import explorer, interactive_panel, padding_picture

__all__ = ["explorer", "follow_tokens", "interactive_panel", "kernel_check", "kernel_roof", "padding_picture"]
