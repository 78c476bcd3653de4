"""What a panel brings into the page besides its controls: they stay in sight, and its figures are drawn once, not three times.

JupyterLab's renderer of plotly figures makes a PNG of each for the saved notebook, which draws it a second time, and draws it
once more for its size, which it has. Inside a panel, whose outputs no notebook saves, both are left out. Tables there bring no
style sheet: for each that comes or goes a browser asks anew how every element of the page looks.
Where the renderer is not the one expected, the script finds nothing and changes nothing.
"""

from __future__ import annotations

import ipywidgets as widgets

from moelab.plots.panel import TABLES
from moelab.widgets.spoken import spoken_names

STYLE = (
    """<style>
.moelab-panel, .moelab-panel > .widget-vbox { overflow: visible; min-width: 0; max-width: 100%; }
.moelab-panel > .jupyter-widgets-output-area, .moelab-panel > .widget-output { min-width: 0; max-width: 100%; overflow-x: auto; }
.moelab-controls > *, .moelab-controls .widget-dropdown { min-width: 0; max-width: 100%; }
.jp-OutputArea-child:has(.moelab-panel), .jp-OutputArea-output:has(.moelab-panel), .jp-OutputArea:has(.moelab-panel),
.jp-Cell-outputWrapper:has(.moelab-panel), .jp-Cell:has(.moelab-panel) { overflow: visible; min-width: 0; }
.moelab-controls {
  position: sticky; top: 0; z-index: 5; overflow: visible; padding: 4px 0;
  background: var(--jp-layout-color0, var(--jp-layout-color1, Canvas)); border-bottom: 1px solid var(--jp-border-color2, #888);
}
.moelab-controls .widget-html { max-width: 100%; }
.moelab-panel textarea:disabled { opacity: 1; color: inherit; }
"""
    + f"{TABLES}</style>"
)

DRAW_ONCE = """
(async () => {
  if (window.moelabDrawsOnce) return;
  window.moelabDrawsOnce = true;
  const extension = window._JUPYTERLAB?.['jupyterlab-plotly'];
  const renderer = extension && (await extension.get('./mimeExtension'))()?.RenderedPlotly;
  if (!renderer?.loadingPlotly) return;
  await renderer.loadingPlotly;
  const own = renderer.Plotly;
  const within = plot => plot?.closest?.('.moelab-panel');
  const instead = {
    toImage: (plot, how) => within(plot) ? new Promise(() => {}) : own.toImage(plot, how),
    redraw: plot => within(plot) ? Promise.resolve(plot) : own.redraw(plot),  // a change of size follows, where there is one
  };
  renderer.Plotly = new Proxy(own, { get: (from, name) => instead[name] ?? from[name] });
})();
"""


def panel(controls: list[widgets.Widget], views: list[widgets.Widget]) -> widgets.VBox:
    """The controls above the views, in sight for as long as one of the views is."""
    box = widgets.VBox()
    furnish(box, controls, views)
    return box


def furnish(box: widgets.VBox, controls: list[widgets.Widget], views: list[widgets.Widget]) -> None:
    """Make `box` a panel: `controls` stay above, `views` below them."""
    rows = [each for each in controls if isinstance(each, widgets.Box)]
    above = controls[0] if len(controls) == 1 and rows else widgets.VBox(controls)
    above.add_class("moelab-controls")
    box.children = [above, *views, widgets.HTML(STYLE), _scripts()]
    box.add_class("moelab-panel")


def _scripts() -> widgets.Output:
    output = spoken_names()
    drawn = {
        "output_type": "display_data",
        "data": {"application/javascript": DRAW_ONCE, "text/plain": ""},
        "metadata": {},
    }
    output.outputs = (*output.outputs, drawn)
    return output
