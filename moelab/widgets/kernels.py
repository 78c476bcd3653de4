"""Controls around a kernel of the reader's own: where it is wrong, and its place under the roof."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import ipywidgets as widgets

from moelab.plots import your_kernel as plots_your_kernel
from moelab.plots.panel import Panel, Row
from moelab.recordings import Recording
from moelab.roofline import Ceilings
from moelab.widgets.fields import dropdown, slider
from moelab.widgets.panels import interactive_panel


def kernel_check(
    impls: Sequence[str], sizes: Mapping[str, int], hidden_sizes: Sequence[int], dtypes: Sequence[str], num_tokens: int,
    source: str,
) -> widgets.VBox:  # fmt: skip
    """`plots.your_kernel.error_map` of a layer run anew for each choice of Kernel, Hidden size and Dtype.

    impls: names in IMPLEMENTATIONS. sizes: as suites.your_kernel.error_map takes them, hidden_size replaced by the choice.
    """
    from moelab.suites import your_kernel

    def draw(impl: str, hidden_size: int, dtype: str) -> Panel:
        chosen = {**sizes, "hidden_size": hidden_size}
        found = your_kernel.error_map(impl, chosen, num_tokens, dtype)
        return plots_your_kernel.error_map(impl, chosen, dtype, found, source)

    return interactive_panel(draw, {
        "impl": dropdown("Kernel", impls, impls[0]), "hidden_size": slider("Hidden size", hidden_sizes, hidden_sizes[0]),
        "dtype": dropdown("Dtype", dtypes, dtypes[0]),
    })  # fmt: skip


def kernel_roof(
    recording: Recording,
    at: Ceilings,
    mine: str,
    ours: Sequence[str],
    live: Sequence[Row] = (),
    here: str = "",
    one: Recording | None = None,
) -> widgets.VBox:
    """`plots.your_kernel.on_the_roof` with the recording's Shape to choose."""
    from moelab.suites.layer_classic import shape_of

    def draw(shape: str) -> Panel:
        return plots_your_kernel.on_the_roof(shape, shape_of(shape), recording, at, mine, ours, live, here, one)

    shapes = list(dict.fromkeys(row["shape"] for row in recording.rows))
    return interactive_panel(draw, {"shape": dropdown("Shape", shapes, shapes[0])})
