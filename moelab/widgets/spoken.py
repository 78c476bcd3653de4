"""Names for what ipywidgets leaves without one: a screen reader hears them, a test of accessibility finds them.

ipywidgets writes a slider's description beside it, but gives the handle, which takes the focus, no name, and has it speak
of its position ("3") in place of its value ("64"). Nothing in its Python says otherwise, so a few lines of script do, once a
page: they also name the buttons of Play, and each figure by its title.
"""

from __future__ import annotations

import ipywidgets as widgets

SCRIPT = """
(() => {
  if (window.moelabNames) return;
  const set = (node, name, value) => { if (value && node.getAttribute(name) !== value) node.setAttribute(name, value); };
  const speak = () => {
    for (const box of document.querySelectorAll('.widget-slider, .widget-hslider')) {
      const text = selector => (box.querySelector(selector)?.textContent ?? '').trim();
      const handles = [...box.querySelectorAll('.noUi-handle')];
      handles.forEach((handle, i) => {
        set(handle, 'aria-label', text('.widget-label') + (handles.length < 2 ? '' : i ? ', highest' : ', lowest'));
        set(handle, 'aria-valuetext', text('.widget-readout'));
      });
    }
    for (const readout of document.querySelectorAll('.moelab-panel .widget-readout')) {
      set(readout, 'contenteditable', 'false');  // a stop of the Tab key where nothing can be typed
    }
    for (const box of document.querySelectorAll('.widget-play')) {
      ['Play', 'Stop', 'Repeat'].forEach((name, i) => {
        const button = box.querySelectorAll('button')[i];
        if (button) set(button, 'aria-label', name);
      });
    }
    for (const plot of document.querySelectorAll('.js-plotly-plot')) {
      set(plot, 'role', 'figure');
      set(plot, 'aria-label', (plot.querySelector('.gtitle')?.textContent ?? '').trim());
    }
  };
  let due = false;
  const later = () => { if (!due) { due = true; requestAnimationFrame(() => { due = false; speak(); }); } };
  window.moelabNames = new MutationObserver(later);
  window.moelabNames.observe(document.body, { childList: true, subtree: true, characterData: true });
  speak();
})();
"""


def spoken_names() -> widgets.Output:
    """An Output that draws nothing and gives the page's controls and figures their names, those to come as well."""
    shown = {
        "output_type": "display_data",
        "data": {"application/javascript": SCRIPT, "text/plain": ""},
        "metadata": {},
    }
    return widgets.Output(outputs=(shown,))
